"""Which row is read at which position? A pure function `(seed, position) -> (source, row)`.

Nothing is drawn at random and nothing is remembered. The i-th row of a source with rate w (rows of the source per row of
the mixture) is due at the ideal time (i + 1/2)/w; the mixture is all sources' rows sorted by their due times. So every
prefix of the mixture holds each source's share to within a row, a block (one global batch) holds what its prefix
difference says, and any position of a mixture of any length is found by counting, without walking there.

Inside a block the order is shuffled; inside a pass over a source its rows are visited in the order of a keyed permutation
(a Feistel network), so no row comes twice in a pass and each pass has an order of its own.

Shares are in *trained tokens*. A source whose rows hold fewer trained tokens (short documents, padding) gets more rows.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from postgrad.data.random_streams import derive_key, mix_bits, permute_indices

_SCALE = 1 << 40


class Apportionment:
    """How many of the first n rows belong to each source, for fixed rates; exact and monotone in n."""

    def __init__(self, rates: Sequence[float]) -> None:
        self.weights = [round(rate / sum(rates) * _SCALE) for rate in rates]
        self.total = sum(self.weights)

    def counts(self, n: int) -> tuple[int, ...]:
        """Rows of each source among the first n; they add up to n."""
        live = [k for k, weight in enumerate(self.weights) if weight]
        counts = [0] * len(self.weights)
        # Everything due by this time is certainly among the first n: at most half a row per source is rounded up.
        time = max(0, n - len(live))
        for k in live:
            counts[k] = (2 * time * self.weights[k] + self.total) // (2 * self.total)
        due = [(Fraction(2 * counts[k] + 1, self.weights[k]), k) for k in live]
        heapq.heapify(due)
        for _ in range(n - sum(counts)):
            _, k = due[0]
            counts[k] += 1
            heapq.heapreplace(due, (Fraction(2 * counts[k] + 1, self.weights[k]), k))
        return tuple(counts)


@dataclass(frozen=True)
class Segment:
    """From row `start` on (a multiple of the block), sources are read at these rates (rows per row)."""

    start: int
    rates: tuple[float, ...]


class Mixture:
    """The order of rows of a stage. `sizes[k]` is the number of rows of source k in one pass."""

    def __init__(self, seed: int, sizes: Sequence[int], segments: Sequence[Segment], block_size: int) -> None:
        if not segments or segments[0].start != 0:
            raise ValueError("the first segment starts at row 0")
        if any(segment.start % block_size for segment in segments):
            raise ValueError("segments start at block borders")
        self.seed, self.sizes, self.segments, self.block_size = seed, tuple(sizes), tuple(segments), block_size
        self._apportionments = [Apportionment(segment.rates) for segment in segments]
        # Rows of each source read before each segment.
        self._rows_before = [tuple([0] * len(sizes))]
        for part, (here, following) in zip(self._apportionments, itertools.pairwise(segments), strict=False):
            done = part.counts(following.start - here.start)
            self._rows_before.append(tuple(a + b for a, b in zip(self._rows_before[-1], done, strict=True)))

    def counts(self, n: int) -> tuple[int, ...]:
        """Rows of each source among the first n rows of the mixture (n a multiple of the block, or any n)."""
        index = max(i for i, segment in enumerate(self.segments) if segment.start <= n)
        inside = self._apportionments[index].counts(n - self.segments[index].start)
        return tuple(a + b for a, b in zip(self._rows_before[index], inside, strict=True))

    def locate(self, position: int) -> tuple[int, int]:
        """`(source, row)` at a position; any position costs the same."""
        sources, rows = self.rows(position // self.block_size)
        return int(sources[position % self.block_size]), int(rows[position % self.block_size])

    def rows(self, block_index: int) -> tuple[np.ndarray, np.ndarray]:
        """`(sources, rows)` of a whole block, each of shape (block,)."""
        return _block_rows(self, block_index)

    def passes(self, n: int) -> tuple[float, ...]:
        """How often each source has been read when n rows are done."""
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
    # The block's slots are shuffled; each source then fills its slots in the order of its own pass.
    for k, (a, b) in enumerate(zip(first, last, strict=True)):
        draws, size = np.arange(a, b, dtype=np.int64), mixture.sizes[k]
        out = np.empty(b - a, np.int64)
        for epoch in range(a // size, (b - 1) // size + 1) if b > a else ():
            here = draws // size == epoch
            out[here] = permute_indices(draws[here] % size, size, derive_key(mixture.seed, k, epoch))
        row[source == k] = out
    source.setflags(write=False)
    row.setflags(write=False)
    return source, row


def row_rates(shares: Sequence[float], trained_per_row: Sequence[float]) -> tuple[float, ...]:
    """Rows per row for shares that are meant in trained tokens."""
    raw = [share / trained for share, trained in zip(shares, trained_per_row, strict=True)]
    return tuple(rate / sum(raw) for rate in raw)


def seen_weights(seen_tokens: Mapping[str, float], share: float) -> dict[str, float]:
    """Replay of everything consumed so far, replays included: each origin's tokens over all tokens, times `share`.

    This rule reproduces the data weights of the authors' multi-stage runs (Ibrahim et al. 2024): at a share of 5 %, after
    300B of one corpus and a 100B stage of 95 % new text, 3.8125 % and 1.1875 %; one such stage later 3.088125 %,
    .961875 % and .95 %.
    """
    total = sum(seen_tokens.values())
    return {origin: share * tokens / total for origin, tokens in seen_tokens.items()}
