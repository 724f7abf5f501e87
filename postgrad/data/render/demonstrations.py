"""Few-shot demonstrations: training rows, retrieved or random, before each example; never the example itself.

They are the hard prompt of instruction prompt tuning (Singhal et al. 2022, arXiv 2212.13138, section 3.3.2), with retrieved
instead of fixed exemplars: examples with their answers, as context before the example to answer.
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
from postgrad.data.words import SEGMENTATION, split_words

RetrievalMethod = Literal["bm25", "embedding", "seed", "once", "balanced"]
"""Most similar by words or by vectors; random for each question; random once for all; or once, balanced over the answers."""
SEPARATOR = "\n\n"
"""Text between two examples."""


@dataclass(frozen=True)
class Demonstrations:
    """A renderer that adds demonstrations before each example of another renderer.

    `pool`: the examples to select from, without those with the same question. Only questions are compared, as the answer is
    unknown at inference. Of the `count` most similar examples, the least similar are dropped until the rest takes at most
    `max_tokens`. The most similar comes last, next to the question. `embed` (for `embedding`): text to a vector (D,).
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
        """Includes the answers of the pool, and the vectors for similarity."""
        pool = hashlib.sha256("".join(f"{mark:016x}" for mark in sorted(map(_digest, self._texts))).encode())
        if self.method == "embedding":
            pool.update(self._embeddings.tobytes())
        parts = [self.renderer.fingerprint, pool.hexdigest(), self.count, self.method, self.max_tokens, self.seed]
        if self.method == "bm25":
            parts.append(SEGMENTATION)
        return hashlib.sha256(json.dumps(["demonstrations", *parts]).encode()).hexdigest()

    def render(self, example: Example) -> RenderedExample:
        """The demonstrations as context, then the example itself."""
        own = self.renderer.render(example)
        demonstrations = [self._texts[i] + SEPARATOR for i in self._select(_question_text(own))]
        lengths = [self.count_tokens(text) for text in demonstrations]
        while demonstrations and sum(lengths) > self.max_tokens:
            demonstrations.pop(0)
            lengths.pop(0)
        if not demonstrations:
            return own
        return own._replace(pieces=(("".join(demonstrations), 0), *own.pieces))

    def select(self, example: Example) -> list[Example]:
        """The demonstrations of an example, the most similar last."""
        return [self.pool[i] for i in self._select(_question_text(self.renderer.render(example)))]

    def _select(self, question: str) -> list[int]:
        own_digest = _digest(question)
        others = [i for i in self._ranking(question, own_digest) if int(self._digests[i]) != own_digest]
        return others[: self.count][::-1]

    def _ranking(self, question: str, question_digest: int) -> list[int]:
        """Indices of the pool, the most similar first; more than `count`, as copies of the question are removed later."""
        limit = min(len(self.pool), self.count + int((self._digests == question_digest).sum()))
        match self.method:
            case "bm25":
                scores = np.asarray(self._bm25_index.get_scores(_bm25_words(question)))
            case "embedding":
                assert self.embed is not None
                scores = self._unit_embeddings @ _normalize(self.embed(question))
            case "seed":
                rng = np.random.default_rng(derive_key(self.seed, question_digest))
                return rng.permutation(len(self.pool)).tolist()
            case "once":
                return np.random.default_rng(self.seed).permutation(len(self.pool)).tolist()
            case "balanced":
                is_in_pool = (self._digests == question_digest).any()
                return self._balanced_order(question_digest) if is_in_pool else self._shared_balanced_order
        return np.argsort(-scores, kind="stable")[:limit].tolist()

    def _balanced_order(self, question_digest: int | None) -> list[int]:
        """One random example of each answer, then one more of each, and so on; the first `count`, in random order."""
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
        """The order for all questions that are not in the pool."""
        return self._balanced_order(None)

    @cached_property
    def _answers(self) -> list[Any]:
        """The values to balance: labels, indices of the correct choice, or rendered answers."""
        texts = ("".join(text for text, mark in rendered.pieces if mark) for rendered in self._rendered_pool)
        return [
            next((example.fields[key] for key in example.kind.label_fields if key in example.fields), text)
            for example, text in zip(self.pool, texts, strict=True)
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
    """The context of a rendered example, without the answer."""
    return "".join(text for text, mark in rendered.pieces if not mark)


def _digest(text: str) -> int:
    return digest(text.encode())


def _bm25_words(text: str) -> list[str]:
    """The words of a text for BM25, which needs one."""
    return split_words(text) or [""]


def _normalize(vector: np.ndarray) -> np.ndarray:
    return vector / max(float(np.linalg.norm(vector)), 1e-12)
