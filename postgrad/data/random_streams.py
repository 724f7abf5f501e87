"""Which random numbers belong to a row? A stream of its own for each `(seed, row, position)`, found without walking there."""

from __future__ import annotations

import numpy as np

from postgrad.data.loading.mixture import derive_key


class RandomStreams:
    """Philox streams keyed by a seed, counted by row and position; none overlaps another."""

    def __init__(self, seed: int) -> None:
        self.key = np.array([derive_key(seed, 0xD4A5), derive_key(seed, 0x5EED)], np.uint64)

    def generator(self, row: int, position: int) -> np.random.Generator:
        """The stream of a row at a position of the mixture."""
        # A stream counts in the two low words; row and position are the two high ones.
        counter = np.array([0, 0, row, position], np.uint64)
        return np.random.Generator(np.random.Philox(key=self.key, counter=counter))
