"""Law: shares are of trained tokens, also where one source trains every token and another nothing but its answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from postgrad.data.layouts.packed_examples import PackedExampleRows
from postgrad.data.layouts.packed_text import PackedRows
from postgrad.data.layouts.rows import Rows
from postgrad.data.loading.loader import Loader
from postgrad.data.loading.mixture import Mixture, Segment, row_rates
from tests.data.memory import InMemoryStore, lay_out

LENGTH, EOS = 16, 1


def texts() -> PackedRows:
    """Rows of which every position is trained."""
    return lay_out(PackedRows, InMemoryStore([[*range(10, 9 + LENGTH), EOS] for _ in range(60)]), LENGTH)


def answers(asked: int, answered: int) -> PackedExampleRows:
    """Rows of examples that are alike: `asked` tokens that are only read, `answered` that are trained, with the EOS."""
    document = [*range(10, 9 + asked + answered), EOS]
    return lay_out(PackedExampleRows, InMemoryStore([document] * 120, [[0] * asked + [1] * answered] * 120), LENGTH)


def trained(
    rows: Sequence[Rows], shares: Sequence[float], rates: Sequence[float], blocks: int, block: int
) -> np.ndarray:
    """Trained tokens of each source in each block, counted in the batches themselves: of shape (blocks, sources)."""
    mixture = Mixture(1, [len(r) for r in rows], [Segment(0, tuple(rates))], block)
    loader = Loader(rows, mixture, micro_batch_size=4)
    counts = np.zeros((blocks, len(shares)), np.int64)
    for step in range(blocks):
        for batch in loader.read_batches(step + 1):
            np.add.at(counts[step], batch.source_B, batch.label_count_B)
    return counts


def exact(counts: np.ndarray, shares: Sequence[float], largest: Sequence[int]) -> bool:
    """After every block each source has its share of all that was trained, to within a row and a half of each."""
    total = counts.cumsum(0)
    off = np.abs(total - total.sum(1, keepdims=True) * np.array(shares))
    return bool((off <= 1.5 * sum(largest)).all())


@settings(max_examples=60)
@given(
    st.floats(0.02, 0.98),
    st.integers(1, 8),
    st.integers(1, 5),
    st.integers(2, 12).map(lambda n: 4 * n),
)
def test_shares_are_exact_in_trained_tokens(share: float, asked: int, answered: int, block: int) -> None:
    rows: list[Rows] = [texts(), answers(asked, answered)]
    per_row = [r.ledger.trained / len(r) for r in rows]
    shares = (share, 1 - share)
    counts = trained(rows, shares, row_rates(shares, per_row), 12, block)
    largest = [max(r.get_row(i, 0).label_count for i in range(len(r))) for r in rows]
    assert exact(counts, shares, largest)


def test_shares_of_rows_would_be_caught() -> None:
    """The mutant: as many rows as the share says; the answers, few of a row, are then far too few."""
    rows: list[Rows] = [texts(), answers(6, 2)]
    shares = (0.5, 0.5)
    per_row = [r.ledger.trained / len(r) for r in rows]
    assert per_row[0] == LENGTH - 1 and per_row[1] == 4
    good, bad = (trained(rows, shares, rates, 12, 16) for rates in (row_rates(shares, per_row), shares))
    assert exact(good, shares, [15, 4]) and not exact(bad, shares, [15, 4])
    assert bad.sum(0)[1] / bad.sum() < 0.25
