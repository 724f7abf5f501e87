"""Which documents of a token store are meant? A part of a store, in an order of its own, that reads like a store."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from postgrad.data.tokens.store import TokenStore


class Subset:
    """The documents `chosen` of a store, in that order."""

    def __init__(self, store: TokenStore, indices: np.ndarray) -> None:
        self.store, self.indices = store, np.asarray(indices, np.int64)

    @cached_property
    def documents(self) -> np.ndarray:
        """Their rows of the document table."""
        return np.asarray(self.store.documents)[self.indices]

    @cached_property
    def values(self) -> np.ndarray | None:
        """What is said of each beside its tokens."""
        return None if self.store.values is None else np.asarray(self.store.values)[self.indices]

    @property
    def kind(self) -> str:
        """What its rows are."""
        return self.store.kind

    @property
    def labels(self) -> Sequence[str | int]:
        """The names of the classes or tags."""
        return self.store.labels or ()

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens of a document."""
        return self.store.read(int(self.indices[document]), start, stop)

    def marks(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray | None:
        """Marks of a document's tokens."""
        return self.store.marks(int(self.indices[document]), start, stop)
