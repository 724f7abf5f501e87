"""Selected documents of a token store, with the interface of a store."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from postgrad.data.tokens.store import TokenStore


class Subset:
    """The documents `indices` of a store, in that order."""

    def __init__(self, store: TokenStore, indices: np.ndarray) -> None:
        self.store, self.indices = store, np.asarray(indices, np.int64)

    @cached_property
    def documents(self) -> np.ndarray:
        """Their rows of the document table."""
        return np.asarray(self.store.documents)[self.indices]

    @cached_property
    def values(self) -> np.ndarray | None:
        """Their label values."""
        return None if self.store.values is None else np.asarray(self.store.values)[self.indices]

    @property
    def kind(self) -> str:
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
