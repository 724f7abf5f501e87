"""Which examples stand before a question? Training rows that are most like it, or drawn ones, never the question itself.

The hard part of an instruction prompt (Singhal et al. 2022, arXiv 2212.13138, section 3.3.2, with exemplars retrieved instead
of fixed): retrieved examples with their answers, as context, before the example that is to be answered.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, zip_longest
from typing import Any, Literal

import numpy as np

from postgrad.data.random_streams import derive_key
from postgrad.data.read.examples import Example
from postgrad.data.read.labels import Labels
from postgrad.data.render.renderer import RenderedExample, Renderer
from postgrad.data.tokens.store import digest

RetrievalMethod = Literal["bm25", "embedding", "seed", "once", "balanced"]
"""Most alike by words or by vectors; drawn anew for each question; drawn once for all; or once, as evenly over the answers as
can be."""
SEPARATOR = "\n\n"
"""What stands between two examples."""


@dataclass(frozen=True)
class Demonstrations:
    """A renderer that sets retrieved examples before each one that another renderer words.

    `pool`: the examples to draw from; one that asks the same is never drawn. What is compared are the questions alone: the
    answer to the one at hand is not known where the model is used. `size` counts the tokens of a text: of the `count` examples
    most like the question, the least alike are left out until the rest takes at most `tokens`. The most alike stands last,
    next to the question. `vectors` gives a vector of shape (D,) for a text, for `by: embedding`.
    """

    renderer: Renderer
    pool: Sequence[Example]
    count: int
    method: RetrievalMethod
    max_tokens: int
    count_tokens: Callable[[str], int]
    embed: Callable[[str], np.ndarray] | None = None
    seed: int = 0
    labels: Labels | None = field(default=None, init=False)
    width: int = field(default=0, init=False)

    @cached_property
    def fingerprint(self) -> str:
        """Of all that decides the text: the answers of the pool too, and the vectors that it is compared by."""
        pool = hashlib.sha256("".join(f"{mark:016x}" for mark in sorted(map(_digest, self._texts))).encode())
        if self.method == "embedding":
            pool.update(self._embeddings.tobytes())
        parts = [self.renderer.fingerprint, pool.hexdigest(), self.count, self.method, self.max_tokens, self.seed]
        return hashlib.sha256(json.dumps(["demonstrations", *parts]).encode()).hexdigest()

    def render(self, example: Example) -> RenderedExample:
        """The chosen examples with their answers as context, then the example itself."""
        own = self.renderer.render(example)
        shown = [self._texts[i] + SEPARATOR for i in self._select(_question_text(own))]
        lengths = [self.count_tokens(text) for text in shown]
        while shown and sum(lengths) > self.max_tokens:
            shown.pop(0)
            lengths.pop(0)
        return own._replace(pieces=(("".join(shown), 0), *own.pieces)) if shown else own

    def select(self, example: Example) -> list[Example]:
        """The examples before this one, the most alike last."""
        return [self.pool[i] for i in self._select(_question_text(self.renderer.render(example)))]

    def _select(self, question: str) -> list[int]:
        mark = _digest(question)
        found = [i for i in self._ranking(question, mark) if int(self._digests[i]) != mark]
        return found[: self.count][::-1]

    def _ranking(self, question: str, question_digest: int) -> list[int]:
        """Numbers of the pool, the most alike first: more than are wanted, as copies of the question fall out."""
        most = min(len(self.pool), self.count + int((self._digests == question_digest).sum()))
        match self.method:
            case "bm25":
                scores = np.asarray(self._bm25_index.get_scores(_bm25_words(question)))
            case "embedding":
                assert self.embed is not None
                scores = self._unit_embeddings @ _normalize(self.embed(question))
            case "seed":
                return (
                    np.random.default_rng(derive_key(self.seed, question_digest)).permutation(len(self.pool)).tolist()
                )
            case "once":
                return np.random.default_rng(self.seed).permutation(len(self.pool)).tolist()
            case "balanced":
                return (
                    self._balanced_order(question_digest)
                    if (self._digests == question_digest).any()
                    else self._shared_balanced_order
                )
        return np.argsort(-scores, kind="stable")[:most].tolist()

    def _balanced_order(self, question_digest: int | None) -> list[int]:
        """One of each answer, then one more of each, and so on, drawn; in an order that tells nothing of the answers."""
        generator = np.random.default_rng(self.seed)
        by_answer: dict[Any, list[int]] = {}
        for i in generator.permutation(len(self.pool)).tolist():
            if int(self._digests[i]) != question_digest:
                by_answer.setdefault(self._answers[i], []).append(i)
        groups = [list(by_answer.values())[i] for i in generator.permutation(len(by_answer))]
        rounds = [i for i in chain.from_iterable(zip_longest(*groups)) if i is not None]
        first = rounds[: self.count]
        return [first[i] for i in generator.permutation(len(first))]

    @cached_property
    def _shared_balanced_order(self) -> list[int]:
        """For every question that the pool does not ask."""
        return self._balanced_order(None)

    @cached_property
    def _answers(self) -> list[Any]:
        """What is balanced: the label, the place of the right choice, or the answer as it is worded."""
        worded = ("".join(text for text, mark in rendered.pieces if mark) for rendered in self._rendered_pool)
        keys = {"labelled": ("label", "labels"), "choices": ("answer",)}
        return [
            next((example.fields[key] for key in keys.get(example.kind, ()) if key in example.fields), said)
            for example, said in zip(self.pool, worded, strict=True)
        ]

    @cached_property
    def _rendered_pool(self) -> list[RenderedExample]:
        return [self.renderer.render(example) for example in self.pool]

    @cached_property
    def _texts(self) -> list[str]:
        return ["".join(text for text, _ in rendered.pieces) for rendered in self._rendered_pool]

    @cached_property
    def _questions(self) -> list[str]:
        return [_question_text(rendered) for rendered in self._rendered_pool]

    @cached_property
    def _digests(self) -> np.ndarray:
        return np.array([_digest(question) for question in self._questions], np.uint64)

    @cached_property
    def _bm25_index(self) -> Any:
        import bm25s

        index = bm25s.BM25()
        index.index([_bm25_words(question) for question in self._questions], show_progress=False)
        return index

    @cached_property
    def _embeddings(self) -> np.ndarray:
        assert self.embed is not None
        return np.stack([self.embed(question) for question in self._questions])

    @cached_property
    def _unit_embeddings(self) -> np.ndarray:
        return np.stack([_normalize(vector) for vector in self._embeddings])


def _question_text(rendered: RenderedExample) -> str:
    """What is read, without what is to be answered."""
    return "".join(text for text, mark in rendered.pieces if not mark)


def _digest(text: str) -> int:
    return digest(text.encode())


def _bm25_words(text: str) -> list[str]:
    """Lower-case words: what BM25 compares."""
    return "".join(letter if letter.isalnum() else " " for letter in text.lower()).split() or [""]


def _normalize(vector: np.ndarray) -> np.ndarray:
    return vector / max(float(np.linalg.norm(vector)), 1e-12)
