"""The mixture: the order in which a stage reads its sources, a pure function `(seed, position) -> (source, row)`.

It has no state and draws no random numbers. The i-th row of a source with rate w (its rows per row of the mixture) is due at
the ideal time (i + 1/2)/w; the mixture is all sources' rows sorted by due time. So every prefix of the mixture has each
source's share to within a row, the contents of a block (one global batch) are the difference of two prefixes, and any
position of a mixture of any length is found by counting.

The order within a block is shuffled. Within a pass over a source, its rows come in the order of a keyed permutation, so no
row repeats within a pass and each pass has an order of its own.

Shares are in *trained tokens*: a source whose rows have fewer trained tokens (short documents, padding) gets more rows.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from postgrad.data.random_streams import derive_key, mix_bits, permute_indices

_SCALE = 1 << 40


class Apportionment:
    """The number of rows of each source among the first n, for fixed rates; exact and monotone in n."""

    def __init__(self, rates: Sequence[float]) -> None:
        # Integer weights: sums and comparisons are exact for any n.
        self.weights = [round(rate / sum(rates) * _SCALE) for rate in rates]
        self.total = sum(self.weights)

    def counts(self, n: int) -> tuple[int, ...]:
        """Rows of each source among the first n; they sum to n."""
        active = [k for k, weight in enumerate(self.weights) if weight]
        counts = [0] * len(self.weights)
        # All rows due by time t number at most t + (sources)/2, as each count round(w t) rounds up by at most half a row.
        # So rows due by n - (sources) are among the first n; the few that remain are taken one by one, by due time.
        time = max(0, n - len(active))
        for k in active:
            counts[k] = (2 * time * self.weights[k] + self.total) // (2 * self.total)
        due = [(Fraction(2 * counts[k] + 1, self.weights[k]), k) for k in active]
        heapq.heapify(due)
        for _ in range(n - sum(counts)):
            _, k = due[0]
            counts[k] += 1
            heapq.heapreplace(due, (Fraction(2 * counts[k] + 1, self.weights[k]), k))
        return tuple(counts)


@dataclass(frozen=True)
class Segment:
    """From row `start` on (a multiple of the block), sources have these rates (rows per row)."""

    start: int
    rates: tuple[float, ...]


class Mixture:
    """The order of rows of a stage. `sizes[k]`: rows of source k in one pass."""

    def __init__(self, seed: int, sizes: Sequence[int], segments: Sequence[Segment], block_size: int) -> None:
        if not segments or segments[0].start != 0:
            raise ValueError("the first segment starts at row 0")
        if any(segment.start % block_size for segment in segments):
            raise ValueError("segments start at block borders")
        self.seed, self.sizes, self.segments, self.block_size = seed, tuple(sizes), tuple(segments), block_size
        self._apportionments = [Apportionment(segment.rates) for segment in segments]
        # Rows of each source before each segment.
        self._rows_before = [tuple([0] * len(sizes))]
        for apportionment, (segment, following) in zip(
            self._apportionments, itertools.pairwise(segments), strict=False
        ):
            counts = apportionment.counts(following.start - segment.start)
            self._rows_before.append(tuple(a + b for a, b in zip(self._rows_before[-1], counts, strict=True)))

    def counts(self, n: int) -> tuple[int, ...]:
        """Rows of each source among the first n rows of the mixture."""
        index = max(i for i, segment in enumerate(self.segments) if segment.start <= n)
        within = self._apportionments[index].counts(n - self.segments[index].start)
        return tuple(a + b for a, b in zip(self._rows_before[index], within, strict=True))

    def locate(self, position: int) -> tuple[int, int]:
        """`(source, row)` at a position, in constant time."""
        sources, rows = self.rows(position // self.block_size)
        return int(sources[position % self.block_size]), int(rows[position % self.block_size])

    def rows(self, block_index: int) -> tuple[np.ndarray, np.ndarray]:
        """`(sources, rows)` of a block, each of shape (block,)."""
        return _block_rows(self, block_index)

    def passes(self, n: int) -> tuple[float, ...]:
        """Passes over each source in the first n rows."""
        return tuple(c / s if s else 0.0 for c, s in zip(self.counts(n), self.sizes, strict=True))


@lru_cache(maxsize=64)
def _block_rows(mixture: Mixture, block_index: int) -> tuple[np.ndarray, np.ndarray]:
    begin = block_index * mixture.block_size
    first, last = mixture.counts(begin), mixture.counts(begin + mixture.block_size)
    source = np.repeat(np.arange(len(first)), [b - a for a, b in zip(first, last, strict=True)])
    with np.errstate(over="ignore"):
        keys = np.arange(len(source), dtype=np.uint64) + np.uint64(derive_key(mixture.seed, 0x5EED, block_index))
    source = source[np.argsort(mix_bits(keys), kind="stable")]
    row = np.empty(len(source), np.int64)
    # Each source fills its shuffled slots with its a-th to b-th read; read i is entry i % size of pass i // size.
    for k, (a, b) in enumerate(zip(first, last, strict=True)):
        reads, size = np.arange(a, b, dtype=np.int64), mixture.sizes[k]
        rows = np.empty(b - a, np.int64)
        for epoch in range(a // size, (b - 1) // size + 1) if b > a else ():
            in_epoch = reads // size == epoch
            rows[in_epoch] = permute_indices(reads[in_epoch] % size, size, derive_key(mixture.seed, k, epoch))
        row[source == k] = rows
    source.setflags(write=False)
    row.setflags(write=False)
    return source, row


def row_rates(shares: Sequence[float], trained_per_row: Sequence[float]) -> tuple[float, ...]:
    """Rows per row of the mixture, for shares in trained tokens."""
    raw = [share / trained for share, trained in zip(shares, trained_per_row, strict=True)]
    return tuple(rate / sum(raw) for rate in raw)
