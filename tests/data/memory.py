"""A token store in memory: documents are lists of ids, with marks, values and labels where a test needs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np

from postgrad.data.layouts.rows import RowOptions

_Rows = TypeVar("_Rows")
_SHARED = {field.name for field in fields(RowOptions)}


def lay_out(layout: Callable[..., _Rows], store: object, length: int, **options: Any) -> _Rows:
    """Rows of a layout, with the options that all layouts share and its own."""
    shared = {name: options.pop(name) for name in _SHARED & options.keys()}
    return layout(store, RowOptions(length, **shared), **options)


class InMemoryStore:
    """What rows read of a token store."""

    def __init__(
        self,
        documents: Sequence[Sequence[int]],
        marks: Sequence[Sequence[int]] | None = None,
        values: Sequence[Sequence[float]] | None = None,
        labels: Sequence[str] = (),
    ) -> None:
        self.ids = [np.array(d, np.uint16) for d in documents]
        self.mark_arrays = None if marks is None else [np.array(m, np.uint16) for m in marks]
        self.values = None if values is None else np.array(values, np.float32)
        self.labels = list(labels)
        self.documents = np.zeros(len(documents), [("tokens", "<u4"), ("digest", "<u8")])
        self.documents["tokens"] = [len(d) for d in documents]
        # Digests that spread, so that a share can be held out.
        self.documents["digest"] = np.arange(1, len(documents) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        for array in [*self.ids, *(self.mark_arrays or [])]:
            array.setflags(write=False)

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.ids[document][start:stop]

    def marks(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray | None:
        return None if self.mark_arrays is None else self.mark_arrays[document][start:stop]
