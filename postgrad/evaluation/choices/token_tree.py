"""Token trees: sequences with common prefixes, packed into rows so that each prefix is encoded once.

Legend: N sequences, T tokens of a row, P tokens of a trunk, A answers (scored tokens).

In sorted order, the longest prefix that a sequence shares with any earlier one it shares with its predecessor. So a row is a
tree in depth-first order: each sequence appends the tokens that its predecessor does not have. For example

    sequences  a b c    a b d    a e        row  a b c d e        end  5 4 3 4 5

All descendants of token j are then contiguous, from j to `end[j]`, so attention to ancestors is one comparison: token i sees
token j when `j <= i < end[j]`. The position of a token is its depth.

A prefix of very many sequences (instructions, demonstrations) would be repeated in every row. It becomes the *trunk* of a group
of rows instead: it is prefilled once, and all rows of the group attend to its keys and values (`decoder`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

ROW_TOKENS = 256
"""Tokens of a row. Longer rows spend more on masked attention, shorter ones copy the trunk's keys more often."""
_MAX_ROW_TOKENS = 4 * ROW_TOKENS
_GROUP_COST = 256
"""The cost of a group in tokens: one more forward pass for its trunk, and batches that are less full."""


class Branch(NamedTuple):
    """A sequence with scored tokens at its end.

    `ids` are the inputs. The predictions after the tokens `context_length` - 1, `context_length`, ... are scored against
    `targets`; these answers have the numbers `slot`, `slot + 1`, ...
    """

    ids: np.ndarray
    context_length: int
    targets: tuple[int, ...]
    slot: int


@dataclass(frozen=True)
class TreeRow:
    """A tree of tokens in depth-first order; `ids`, `depth` and `end` are of shape (T,)."""

    ids: np.ndarray
    depth: np.ndarray
    """Each token's position in its sequences, including the trunk."""
    end: np.ndarray
    """The index after the last descendant of each token."""
    source_A: np.ndarray
    """The index of the token whose prediction is scored."""
    target_A: np.ndarray
    slot_A: np.ndarray
    prefix_length: int = 0
    """Tokens at the beginning with bidirectional attention."""


@dataclass(frozen=True)
class TreeBatch:
    """Rows of one forward pass on a trunk (P,), which may be empty."""

    trunk: np.ndarray
    rows: tuple[TreeRow, ...]

    @property
    def width(self) -> int:
        """Tokens of the longest row."""
        return max(len(row.ids) for row in self.rows)


def build_shared_batches(branches: Sequence[Branch], batch_tokens: int) -> list[TreeBatch]:
    """The branches as trees in batches of about `batch_tokens` at most; the batches of a trunk are consecutive."""
    ordered = sorted(branches, key=_sort_key)
    batches: list[TreeBatch] = []
    for trunk, members in _trunk_groups(ordered):
        rows = [build_tree(part, trunk) for part in _split_rows(members, trunk)]
        ids = members[0].ids[:trunk]
        batches += [TreeBatch(ids, tuple(group)) for group in _split_batches(rows, trunk, batch_tokens)]
    return batches


def build_single_batches(branches: Sequence[Branch], batch_tokens: int) -> list[TreeBatch]:
    """Every distinct sequence in a row of its own."""
    empty = np.empty(0, np.int64)
    rows = [build_tree(same, 0) for same in _group_identical(branches).values()]
    return [TreeBatch(empty, tuple(group)) for group in _split_batches(rows, 0, batch_tokens)]


def build_prefix_lm_batches(branches: Sequence[Branch], batch_tokens: int) -> list[TreeBatch]:
    """Each context once, with all its continuations. Bidirectional states depend on all of it, so no prefix is shared."""
    by_context: dict[bytes, list[Branch]] = {}
    for branch in sorted(branches, key=_sort_key):
        by_context.setdefault(branch.ids[: branch.context_length].tobytes(), []).append(branch)
    parts = (part for members in by_context.values() for part in _split_rows(members, 0))
    rows = [replace(build_tree(part, 0), prefix_length=part[0].context_length) for part in parts]
    empty = np.empty(0, np.int64)
    return [TreeBatch(empty, tuple(group)) for group in _split_batches(rows, 0, batch_tokens)]


def count_single_tokens(branches: Sequence[Branch]) -> int:
    """Input tokens when every sequence is a row of its own."""
    return sum(len(same[0].ids) for same in _group_identical(branches).values())


def _group_identical(branches: Sequence[Branch]) -> dict[bytes, list[Branch]]:
    """Branches by their sequence."""
    out: dict[bytes, list[Branch]] = {}
    for branch in branches:
        out.setdefault(branch.ids.tobytes(), []).append(branch)
    return out


def count_tokens(batches: Sequence[TreeBatch]) -> int:
    """Input tokens without padding: each trunk once, and all rows."""
    trunks = {id(batch.trunk): len(batch.trunk) for batch in batches}
    return sum(trunks.values()) + sum(len(row.ids) for batch in batches for row in batch.rows)


def build_tree(branches: Sequence[Branch], trunk_length: int) -> TreeRow:
    """Sorted sequences as one tree, without their common first `trunk_length` tokens."""
    ids: list[np.ndarray] = []
    depths: list[np.ndarray] = []
    end: list[int] = []
    sources: list[int] = []
    path: list[int] = []
    """The row indices of the last sequence's tokens."""
    last = np.empty(0, np.int64)
    for branch in branches:
        own = branch.ids[trunk_length:]
        shared = _common_prefix_length(last, own)
        size = len(end)
        # The tokens of the last sequence that this one does not share have no more descendants.
        for index in path[shared:]:
            end[index] = size
        path[shared:] = range(size, size + len(own) - shared)
        ids.append(own[shared:])
        depths.append(np.arange(trunk_length + shared, trunk_length + len(own)))
        end += [0] * (len(own) - shared)
        begin = branch.context_length - 1 - trunk_length
        sources += path[begin : begin + len(branch.targets)]
        last = own
    size = len(end)
    for index in path:
        end[index] = size
    return TreeRow(
        np.concatenate(ids),
        np.concatenate(depths),
        np.array(end, np.int64),
        np.array(sources, np.int64),
        np.array([token for branch in branches for token in branch.targets], np.int64),
        np.array([branch.slot + i for branch in branches for i in range(len(branch.targets))], np.int64),
    )


def _sort_key(branch: Branch) -> bytes:
    return branch.ids.astype(">u4").tobytes()


def _common_prefix_length(a: np.ndarray, b: np.ndarray) -> int:
    """The length of the common prefix of two sequences."""
    size = min(len(a), len(b))
    differing = np.flatnonzero(a[:size] != b[:size])
    return int(differing[0]) if len(differing) else size


def _trunk_groups(ordered: Sequence[Branch]) -> Iterator[tuple[int, list[Branch]]]:
    """Each group's trunk length and its members in order; at most one group has no trunk.

    The sorted sequences form a hierarchy of intervals: within [begin, stop) all share the smallest common prefix of neighbours,
    and where that minimum is attained the interval is cut into parts that share more. From the whole inwards, an interval
    becomes a group of its own when the tokens that its longer trunk saves exceed the cost of prefilling it. Parts that keep
    no group inherit the enclosing one. At last, groups whose members have mostly moved on to inner ones are dissolved.
    """
    # Scored positions must be in a row, so a trunk ends before the last token of a context.
    common = [
        min(_common_prefix_length(a.ids, b.ids), a.context_length - 1, b.context_length - 1)
        for a, b in pairwise(ordered)
    ]
    common_N = np.array([0, *common], np.int64)
    owner_N = np.full(len(ordered), -1)
    trunks: list[int] = []
    intervals = [(0, len(ordered), -1)]
    while intervals:
        begin, stop, owner = intervals.pop()
        owner_N[begin:stop] = owner
        if stop - begin < 2:
            continue
        inner = common_N[begin + 1 : stop]
        trunk = int(inner.min())
        if _saved_tokens(ordered[begin:stop], trunk, trunks[owner] if owner >= 0 else 0) > trunk + _GROUP_COST:
            owner = len(trunks)
            trunks.append(trunk)
            owner_N[begin:stop] = owner
        cuts = [begin, *(begin + 1 + np.flatnonzero(inner == trunk)).tolist(), stop]
        intervals += [(a, b, owner) for a, b in pairwise(cuts) if b - a > 1]
    rest: list[Branch] = []
    for owner, trunk in enumerate(trunks):
        members = [ordered[i] for i in np.flatnonzero(owner_N == owner).tolist()]
        if _saved_tokens(members, trunk, 0) > trunk + _GROUP_COST:
            yield trunk, members
        else:
            rest += members
    rest = sorted([*rest, *(ordered[i] for i in np.flatnonzero(owner_N < 0).tolist())], key=_sort_key)
    if rest:
        yield 0, rest


def _saved_tokens(members: Sequence[Branch], trunk_length: int, outer_length: int) -> int:
    """Tokens that rows save with a trunk of `trunk_length` instead of `outer_length`."""
    rows = sum(1 for _ in _split_rows(members, trunk_length)) if trunk_length > outer_length else 0
    return rows * (trunk_length - outer_length)


def _split_rows(members: Sequence[Branch], trunk_length: int) -> Iterator[list[Branch]]:
    """Sorted sequences in rows: a full row ends where little has to be repeated, or where it grows too long."""
    part: list[Branch] = []
    size = 0
    for branch in members:
        length = len(branch.ids) - trunk_length
        shared = _common_prefix_length(part[-1].ids, branch.ids) - trunk_length if part else 0
        new_size = size + length - shared
        full = (new_size > ROW_TOKENS and 4 * shared < length) or (new_size > _MAX_ROW_TOKENS and length > shared)
        if part and full:
            yield part
            part, new_size = [], length
        part.append(branch)
        size = new_size
    if part:
        yield part


def _split_batches(rows: Sequence[TreeRow], trunk_length: int, batch_tokens: int) -> Iterator[list[TreeRow]]:
    """Rows of similar length for one batch; their masks, of rows x T x (P + T) entries, are bounded too."""
    group: list[TreeRow] = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        size = len(row.ids)
        tokens = (len(group) + 1) * size
        if group and (tokens > batch_tokens or tokens * (trunk_length + size) > batch_tokens * 2048):
            yield group
            group = []
        group.append(row)
    if group:
        yield group
