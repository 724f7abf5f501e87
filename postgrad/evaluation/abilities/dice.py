"""Random choices that are a pure function of integers, the same with every version of every library."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from postgrad.data.random_streams import derive_key

Item = TypeVar("Item")


class Dice:
    """The draws of one probe; `key`: the integers that they are a function of."""

    def __init__(self, *key: int) -> None:
        # Python guarantees the sequence of `random()` for a seed, and of no other method.
        self._uniform = random.Random(derive_key(*key)).random

    def below(self, size: int) -> int:
        """A whole number from 0 to `size` - 1."""
        return int(self._uniform() * size)

    def integer(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`."""
        return low + self.below(high - low + 1)

    def pick(self, items: Sequence[Item]) -> Item:
        """One item."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[Item], count: int) -> list[Item]:
        """Different items, in random order."""
        rest = list(items)
        return [rest.pop(self.below(len(rest))) for _ in range(count)]
