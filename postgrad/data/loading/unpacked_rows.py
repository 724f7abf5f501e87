"""Unpacked rows: the documents of packed rows as rows of their own, for models in which packed documents see each other.

Legend: T positions of a row, N documents, P positions of a padded document.

Which tokens a step reads, and which of them are labels, does not depend on this: a packed row is split where its position ids
restart, and what follows a document's last label is cut. The documents of a global batch are sorted by length and divided into
batches such that padding and the number of batches are small; lengths are rounded up to one of at most 64.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np

from postgrad.data.layouts.rows import IGNORED, Row

PACKED_LAYOUTS = ("packed", "prefix")
"""Layouts of rows with several documents, whose position ids restart with each; all rows have the same length."""
_MAX_LENGTHS = 64
_MULTIPLE = 8
_BATCH_COSTS = (1 / 2, 1 / 3, 1 / 4, 1 / 6, 1 / 8, 1 / 12, 1 / 16, 1 / 24, 1 / 32)
"""Padding that is better than one more forward and backward pass, as a share of the largest batch: the first is taken whose
padding is below `_MAX_PADDING`. A pass has a cost of its own, which on fast devices is that of hundreds of tokens."""
_MAX_PADDING = 0.1

Array = TypeVar("Array")


class Document(NamedTuple):
    """A document of a packed row as a row of its own, and the number of labels before it in the packed row."""

    row: Row
    first_label: int


def split_documents(row: Row) -> list[Document]:
    """The documents of a packed row that have labels. Rows with prefixes keep their position ids, which their mask needs."""
    positions_T = row.inputs["position_ids"]
    starts = np.flatnonzero(np.diff(positions_T, prepend=-2) != 1).tolist()
    inputs = row.inputs if "prefix" in row.inputs else drop_positions(row.inputs)
    documents: list[Document] = []
    first_label = 0
    for begin, stop in zip(starts, [*starts[1:], len(positions_T)], strict=True):
        labelled = np.flatnonzero(row.labels[begin:stop] != IGNORED)
        if len(labelled):
            end = begin + int(labelled[-1]) + 1
            arrays = {name: array[begin:end] for name, array in inputs.items()}
            contexts = tuple(
                each._replace(position=each.position - begin, begin=0, stop=end - begin)
                for each in row.contexts
                if each.begin == begin
            )
            documents.append(Document(Row(arrays, row.labels[begin:end], len(labelled), contexts), first_label))
            first_label += len(labelled)
    return documents


def drop_positions(inputs: dict[str, Array]) -> dict[str, Array]:
    """Inputs without position ids, which in a row of one document are the default ones."""
    return {name: array for name, array in inputs.items() if name != "position_ids"}


def padded_length(length: int, row_length: int) -> int:
    """A document's length rounded up to one of at most 64 for rows of `row_length`, and no longer than a row."""
    step = -(-row_length // (_MAX_LENGTHS * _MULTIPLE)) * _MULTIPLE
    return min(-(-length // step) * step, max(row_length, length))


def group_by_length(lengths: Sequence[int], row_length: int, max_positions: int) -> list[list[int]]:
    """Indices of documents in batches of at most `max_positions` positions (one document always fits), by ascending length.

    As few batches as have little padding; a function of the lengths alone.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)  # stable
    widths = [padded_length(lengths[document], row_length) for document in order]
    bounds: list[int] = [0]
    for batch_cost in _BATCH_COSTS:
        bounds, positions = _divide(widths, max_positions, batch_cost * max_positions)
        if positions * (1 - _MAX_PADDING) <= sum(lengths):
            break
    return [order[begin:end] for begin, end in pairwise(bounds)]


def _divide(widths: Sequence[int], max_positions: int, batch_cost: float) -> tuple[list[int], int]:
    """Bounds of batches of documents of ascending widths, and their positions.

    Of all divisions it is one with the smallest sum of positions and `batch_cost` for each batch.
    """
    cost_N = np.zeros(len(widths) + 1)
    begin_N = np.zeros(len(widths) + 1, np.int64)
    for end, width in enumerate(widths, 1):
        first = max(0, min(end - 1, end - max_positions // width))
        costs = cost_N[first:end] + width * np.arange(end - first, 0, -1)
        best = int(np.argmin(costs))
        begin_N[end], cost_N[end] = first + best, costs[best] + batch_cost
    bounds = [len(widths)]
    while bounds[-1]:
        bounds.append(int(begin_N[bounds[-1]]))
    return bounds[::-1], round(cost_N[-1] - batch_cost * (len(bounds) - 1))
