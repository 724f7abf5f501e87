"""Which tokens must a decoder read, when what many sequences begin with is read once? Trees of tokens, packed into rows.

Legend: N sequences, T tokens of a row, P tokens of a trunk, A answers that are asked for.

Sequences that are sorted have what they share with earlier ones in common with the one just before them. So a row is a
tree written down depth first: each sequence adds the tokens that the one before it has not. In that order everything
that follows a token lies in one piece behind it, from the token's own number to its `end`: token i reads token j when
`j <= i < end[j]`. What very many sequences begin with (instructions, demonstrations) would have to be in every row; it
becomes the trunk of a group, is read once, and its keys and values stand before all rows of the group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

ROW_TOKENS = 256
"""Tokens of a row. A longer one spends more on attention to others' tokens, shorter ones copy the trunk's keys more often."""
_MAX_ROW_TOKENS = 4 * ROW_TOKENS
_GROUP_COST = 256
"""What a group of its own costs, in tokens: one more forward pass for the trunk, and batches that are less full."""


class Branch(NamedTuple):
    """A sequence, and what is asked at its end.

    `ids` are read; from token `first` - 1 on the next token is asked for, which is `wanted[0]`, `wanted[1]`, ...; the
    answers have the numbers `slot`, `slot + 1`, ...
    """

    ids: np.ndarray
    context_length: int
    targets: tuple[int, ...]
    slot: int


@dataclass(frozen=True)
class TreeRow:
    """A tree of tokens depth first; all but `asked_A` and what belongs to it of shape (T,)."""

    ids: np.ndarray
    depth: np.ndarray
    """Each token's place in its sequences, the trunk counted."""
    end: np.ndarray
    """The number after the last token that follows each token."""
    source_A: np.ndarray
    """After which token (its number in the row) the next one is asked for."""
    target_A: np.ndarray
    slot_A: np.ndarray
    prefix_length: int = 0
    """Tokens at the beginning that see each other in both directions."""


@dataclass(frozen=True)
class TreeBatch:
    """Rows that are read together behind a trunk (P,), which may be empty."""

    trunk: np.ndarray
    rows: tuple[TreeRow, ...]

    @property
    def width(self) -> int:
        """Tokens of the longest row."""
        return max(len(row.ids) for row in self.rows)


def build_shared_batches(branches: Sequence[Branch], batch_tokens: int) -> list[TreeBatch]:
    """The branches as trees in batches of at most about `most` tokens; every trunk's batches follow one another."""
    ordered = sorted(branches, key=_sort_key)
    batches: list[TreeBatch] = []
    for trunk, members in _trunk_groups(ordered):
        rows = [build_tree(part, trunk) for part in _split_rows(members, trunk)]
        ids = members[0].ids[:trunk]
        batches += [TreeBatch(ids, tuple(some)) for some in _split_batches(rows, trunk, batch_tokens)]
    return batches


def build_single_batches(branches: Sequence[Branch], batch_tokens: int) -> list[TreeBatch]:
    """Every sequence in a row of its own, once; nothing else is shared."""
    none = np.empty(0, np.int64)
    rows = [build_tree(alike, 0) for alike in _group_identical(branches).values()]
    return [TreeBatch(none, tuple(some)) for some in _split_batches(rows, 0, batch_tokens)]


def build_prefix_lm_batches(branches: Sequence[Branch], batch_tokens: int) -> list[TreeBatch]:
    """Each context, read in both directions, once with all that is behind it: nothing of it is as in another context."""
    by_context: dict[bytes, list[Branch]] = {}
    for branch in sorted(branches, key=_sort_key):
        by_context.setdefault(branch.ids[: branch.context_length].tobytes(), []).append(branch)
    parts = (part for members in by_context.values() for part in _split_rows(members, 0))
    rows = [replace(build_tree(part, 0), prefix_length=part[0].context_length) for part in parts]
    none = np.empty(0, np.int64)
    return [TreeBatch(none, tuple(some)) for some in _split_batches(rows, 0, batch_tokens)]


def count_single_tokens(branches: Sequence[Branch]) -> int:
    """How many tokens are read when every sequence stands in a row of its own."""
    return sum(len(alike[0].ids) for alike in _group_identical(branches).values())


def _group_identical(branches: Sequence[Branch]) -> dict[bytes, list[Branch]]:
    """Branches by their sequence."""
    out: dict[bytes, list[Branch]] = {}
    for branch in branches:
        out.setdefault(branch.ids.tobytes(), []).append(branch)
    return out


def count_tokens(batches: Sequence[TreeBatch]) -> int:
    """How many tokens are read, padding left out: each trunk once, and all rows."""
    trunks = {id(batch.trunk): len(batch.trunk) for batch in batches}
    return sum(trunks.values()) + sum(len(row.ids) for batch in batches for row in batch.rows)


def build_tree(branches: Sequence[Branch], trunk_length: int) -> TreeRow:
    """Sorted sequences that share their first `trunk` tokens, which are left out, as one tree."""
    ids: list[np.ndarray] = []
    depths: list[np.ndarray] = []
    end: list[int] = []
    asked: list[int] = []
    path: list[int] = []
    """The numbers of the last sequence's tokens."""
    last = np.empty(0, np.int64)
    for branch in branches:
        own = branch.ids[trunk_length:]
        shared = _common_prefix_length(last, own)
        size = len(end)
        for number in path[shared:]:
            end[number] = size
        path[shared:] = range(size, size + len(own) - shared)
        ids.append(own[shared:])
        depths.append(np.arange(trunk_length + shared, trunk_length + len(own)))
        end += [0] * (len(own) - shared)
        begin = branch.context_length - 1 - trunk_length
        asked += path[begin : begin + len(branch.targets)]
        last = own
    size = len(end)
    for number in path:
        end[number] = size
    return TreeRow(
        np.concatenate(ids),
        np.concatenate(depths),
        np.array(end, np.int64),
        np.array(asked, np.int64),
        np.array([token for branch in branches for token in branch.targets], np.int64),
        np.array([branch.slot + i for branch in branches for i in range(len(branch.targets))], np.int64),
    )


def _sort_key(branch: Branch) -> bytes:
    return branch.ids.astype(">u4").tobytes()


def _common_prefix_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences begin with alike."""
    size = min(len(a), len(b))
    other = np.flatnonzero(a[:size] != b[:size])
    return int(other[0]) if len(other) else size


def _trunk_groups(ordered: Sequence[Branch]) -> Iterator[tuple[int, list[Branch]]]:
    """Each group's trunk (how many tokens) and its members in order; one group may be without a trunk."""
    # What is asked for stands in a row, so a trunk ends before the last token of a context.
    alike = [
        min(_common_prefix_length(a.ids, b.ids), a.context_length - 1, b.context_length - 1)
        for a, b in pairwise(ordered)
    ]
    alike_N = np.array([0, *alike], np.int64)
    owner_N = np.full(len(ordered), -1)
    trunks: list[int] = []
    waiting = [(0, len(ordered), -1)]
    while waiting:
        begin, stop, owner = waiting.pop()
        owner_N[begin:stop] = owner
        if stop - begin < 2:
            continue
        inner = alike_N[begin + 1 : stop]
        trunk = int(inner.min())
        if _saved_tokens(ordered[begin:stop], trunk, trunks[owner] if owner >= 0 else 0) > trunk + _GROUP_COST:
            owner = len(trunks)
            trunks.append(trunk)
            owner_N[begin:stop] = owner
        cuts = [begin, *(begin + 1 + np.flatnonzero(inner == trunk)).tolist(), stop]
        waiting += [(a, b, owner) for a, b in pairwise(cuts) if b - a > 1]
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
    """Tokens that rows are spared when they stand behind `trunk` tokens and not behind `before`."""
    rows = sum(1 for _ in _split_rows(members, trunk_length)) if trunk_length > outer_length else 0
    return rows * (trunk_length - outer_length)


def _split_rows(members: Sequence[Branch], trunk_length: int) -> Iterator[list[Branch]]:
    """Sorted sequences in rows: a row that is full ends where little has to be read again, or where it grows too long."""
    part: list[Branch] = []
    size = 0
    for branch in members:
        length = len(branch.ids) - trunk_length
        shared = _common_prefix_length(part[-1].ids, branch.ids) - trunk_length if part else 0
        grows = size + length - shared
        if part and ((grows > ROW_TOKENS and 4 * shared < length) or (grows > _MAX_ROW_TOKENS and length > shared)):
            yield part
            part, grows = [], length
        part.append(branch)
        size = grows
    if part:
        yield part


def _split_batches(rows: Sequence[TreeRow], trunk_length: int, batch_tokens: int) -> Iterator[list[TreeRow]]:
    """Rows of like length that are read at once; their masks, of rows x T x (P + T) places, stay small too."""
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
