"""Which examples stand before a question? Those of the training rows that are most like it, never the question itself.

The hard part of an instruction prompt (Singhal et al. 2022, arXiv 2212.13138, section 3.3.2, with exemplars retrieved instead
of fixed): retrieved examples with their answers, as context, before the example that is to be answered.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from postgrad.data.examples import Example, Labels, Rendered, Renderer
from postgrad.data.mixture import derived
from postgrad.data.store import digest

By = Literal["bm25", "embedding", "seed"]
BETWEEN = "\n\n"
"""What stands between two examples."""


@dataclass(frozen=True)
class Demonstrations:
    """A renderer that sets retrieved examples before each one that another renderer words.

    `pool`: the examples to draw from; one with the words of the question is never drawn. `size` counts the tokens of a text:
    of the `count` examples most like the question, the least alike are left out until the rest takes at most `tokens`.
    The most alike stands last, next to the question. `vectors` gives a vector of shape (D,) for a text, for `by: embedding`.
    """

    inner: Renderer
    pool: Sequence[Example]
    count: int
    by: By
    tokens: int
    size: Callable[[str], int]
    vectors: Callable[[str], np.ndarray] | None = None
    seed: int = 0
    labels: Labels | None = field(default=None, init=False)
    width: int = field(default=0, init=False)

    @cached_property
    def fingerprint(self) -> str:
        """Of all that decides the text."""
        pool = hashlib.sha256("".join(f"{mark:016x}" for mark in sorted(self._digests.tolist())).encode()).hexdigest()
        parts = [self.inner.fingerprint, pool, self.count, self.by, self.tokens, self.seed]
        return hashlib.sha256(json.dumps(["demonstrations", *parts]).encode()).hexdigest()

    def render(self, example: Example) -> Rendered:
        """The chosen examples with their answers as context, then the example itself."""
        own = self.inner.render(example)
        shown = [_text(self.inner.render(found)) + BETWEEN for found in self.chosen(example)]
        lengths = [self.size(text) for text in shown]
        while shown and sum(lengths) > self.tokens:
            shown.pop(0)
            lengths.pop(0)
        return own._replace(pieces=(("".join(shown), 0), *own.pieces)) if shown else own

    def chosen(self, example: Example) -> list[Example]:
        """The examples before this one, the most alike last."""
        mark = digest(example.text.encode())
        found = [i for i in self._order(example, mark) if int(self._digests[i]) != mark]
        return [self.pool[i] for i in found[: self.count]][::-1]

    def _order(self, example: Example, mark: int) -> list[int]:
        """Numbers of the pool, the most alike first: more than are wanted, as copies of the question fall out."""
        most = min(len(self.pool), self.count + int((self._digests == mark).sum()))
        match self.by:
            case "bm25":
                scores = np.asarray(self._index.get_scores(_words(example.text)))
            case "embedding":
                assert self.vectors is not None
                scores = self._matrix @ _unit(self.vectors(example.text))
            case "seed":
                return np.random.default_rng(derived(self.seed, mark)).permutation(len(self.pool)).tolist()
        return np.argsort(-scores, kind="stable")[:most].tolist()

    @cached_property
    def _digests(self) -> np.ndarray:
        return np.array([digest(example.text.encode()) for example in self.pool], np.uint64)

    @cached_property
    def _index(self) -> Any:
        import bm25s

        index = bm25s.BM25()
        index.index([_words(example.text) for example in self.pool], show_progress=False)
        return index

    @cached_property
    def _matrix(self) -> np.ndarray:
        assert self.vectors is not None
        return np.stack([_unit(self.vectors(example.text)) for example in self.pool])


def _text(rendered: Rendered) -> str:
    return "".join(text for text, _ in rendered.pieces)


def _words(text: str) -> list[str]:
    """Lower-case words: what BM25 compares."""
    return "".join(letter if letter.isalnum() else " " for letter in text.lower()).split() or [""]


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(float(np.linalg.norm(vector)), 1e-12)
