"""The loader: every row of a global batch once, equally many micro-batches on every rank, alike rows together."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postgrad.data.layouts.rows import IGNORED, Ledger, Row, ignore_labels
from postgrad.data.loading.loader import Loader, MicroBatchPlan, MixtureRow
from postgrad.data.loading.mixture import Mixture, Segment

LEDGER = Ledger(0, 0, 0, 0, 0, 0, 0, 0)


@dataclass
class Numbered:
    """Rows that say what they are: `ids = [row, position]`."""

    layout: str
    size: int
    ledger: Ledger = LEDGER
    document_R: np.ndarray | None = None

    def __len__(self) -> int:
        return self.size

    def get_row(self, row: int, position: int) -> Row:
        return Row({"input_ids": np.array([row, position])}, np.array([1, IGNORED]), 1)


LAYOUTS = ("packed", "masked", "pairs", "packed")
OBJECTIVES = ((0,), (1,), (0,), (2,))
SIZES = (70, 40, 30, 9)


def loaders(kinds: int, shares: list[float], rows: int, micro: int, ranks: int, loader: type[Loader]) -> list[Loader]:
    """A loader for each rank; a global batch has `rows` times as many rows as a micro-batch of all ranks."""
    mixture = Mixture(3, SIZES[:kinds], [Segment(0, tuple(shares[:kinds]))], micro * ranks * rows)
    sources = [Numbered(layout, size) for layout, size in zip(LAYOUTS, SIZES, strict=True)][:kinds]
    return [
        loader(sources, mixture, micro_batch_size=micro, objectives=OBJECTIVES[:kinds], rank=rank, world_size=ranks)
        for rank in range(ranks)
    ]


def alike_on_all_ranks(found: list[Loader]) -> bool:
    """The law: in every step all ranks make the same sorts of micro-batches in the same order."""
    for step in (1, 2, 5):
        sorts = [
            [
                (loader.sources[part.mixture_rows[0].source].layout, part.objectives)
                for part in loader.micro_batches(step)
            ]
            for loader in found
        ]
        if any(sort != sorts[0] for sort in sorts):
            return False
    return True


cases = st.tuples(
    st.integers(1, 4),
    st.lists(st.floats(0.02, 1), min_size=4, max_size=4),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 4),
)


@settings(max_examples=200)
@given(cases)
def test_all_ranks_make_the_same_micro_batches_and_every_row_is_read_once(
    case: tuple[int, list[float], int, int, int],
) -> None:
    found = loaders(*case, Loader)
    assert alike_on_all_ranks(found)
    for step in (1, 2, 5):
        parts = [part for loader in found for part in loader.micro_batches(step)]
        drawn = [(d.source, d.row) for part in parts if not part.is_padding for d in part.mixture_rows]
        assert Counter(drawn) == Counter(found[0].rows(step))
        positions = sorted(d.position for part in parts if not part.is_padding for d in part.mixture_rows)
        assert positions == list(range((step - 1) * len(positions), step * len(positions)))
        assert all(1 <= len(part.mixture_rows) <= found[0].micro_batch_size for part in parts)
        batches = [batch for loader in found for batch in loader.read_batches(step)]
        assert sum(batch.label_count for batch in batches) == len(drawn)
        for part, batch in zip(parts, batches, strict=True):
            assert batch.objectives == part.objectives and (batch.label_count == 0) == part.is_padding
            ids = [[d.row, d.position] for d in part.mixture_rows]
            assert batch.inputs["input_ids"].tolist() == ids and batch.source_B.tolist() == [
                d.source for d in part.mixture_rows
            ]


class Slices(Loader):
    """The mutant: every rank takes its slice of the global batch and sorts that."""

    def micro_batches(self, step: int) -> list[MicroBatchPlan]:
        rows = self.rows(step)
        share = len(rows) // self.world_size
        mine = list(enumerate(rows))[self.rank * share : (self.rank + 1) * share]
        alike: dict[tuple[str, tuple[int, ...]], list[MixtureRow]] = {}
        for i, (source, row) in mine:
            alike.setdefault((self.sources[source].layout, self.objectives[source]), []).append(
                MixtureRow(source, row, i)
            )
        return [
            MicroBatchPlan(draws[i : i + self.micro_batch_size], sort[1])
            for sort, draws in sorted(alike.items())
            for i in range(0, len(draws), self.micro_batch_size)
        ]


def test_ranks_that_sort_for_themselves_would_wait_for_one_another() -> None:
    case = (3, [0.5, 0.3, 0.2, 0.1], 3, 2, 2)
    assert alike_on_all_ranks(loaders(*case, Loader)) and not alike_on_all_ranks(loaders(*case, Slices))


def test_rows_of_one_sort_are_parted_without_a_silent_one() -> None:
    for loader in loaders(1, [1.0] * 4, 3, 2, 2, Loader):
        assert [len(part.mixture_rows) for part in loader.micro_batches(1)] == [2, 2, 2]


@pytest.mark.parametrize("dtype", [np.int64, np.float32])
def test_a_silent_row_has_its_inputs_and_nothing_to_learn(dtype: type) -> None:
    row = Row({"input_ids": np.arange(3)}, np.array([0, 1, 1], dtype), 3)
    silent = ignore_labels(row)
    assert silent.inputs is row.inputs and silent.label_count == 0
    assert silent.labels.dtype == row.labels.dtype and np.isfinite(silent.labels).all()
    if dtype is np.int64:
        assert (silent.labels == IGNORED).all()


def test_a_global_batch_that_does_not_part() -> None:
    mixture = Mixture(3, [9], [Segment(0, (1.0,))], 6)
    with pytest.raises(ValueError, match="a global batch of 6 rows does not divide into 2 ranks of 2"):
        Loader([Numbered("packed", 9)], mixture, micro_batch_size=2, world_size=2)
