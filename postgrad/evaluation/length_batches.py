"""Batches of rows of similar length, within a budget of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def length_batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Numbers of rows in the order of their lengths, in groups whose padded size fits `max_tokens` (one row always does).

    The order is stable, so the batches are a function of the lengths alone.
    """
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):  # ascending: the newest row is the longest
        if group and (len(group) + 1) * lengths[i] > max_tokens:
            yield group
            group = []
        group.append(i)
    if group:
        yield group
