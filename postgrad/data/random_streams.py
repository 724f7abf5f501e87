"""Deterministic random numbers: derived keys, keyed permutations, and a Philox stream for each `(seed, row, position)`."""

from __future__ import annotations

import numpy as np

_MASK = (1 << 64) - 1


def mix_bits(x: np.ndarray) -> np.ndarray:
    """The SplitMix64 finaliser (Steele, Lea & Flood 2014) on uint64: every output bit depends on every input bit."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def derive_key(*parts: int) -> int:
    """Hash several integers to one 64-bit key, so that streams for different purposes do not collide by accident."""
    key = 0
    for part in parts:
        key = int(mix_bits(np.array([(key * 0x9E3779B97F4A7C15 + part + 1) & _MASK], np.uint64))[0])
    return key


def permute_indices(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """Apply the permutation of `range(size)` selected by `key` to `indices`, without materialising it.

    A four-round Feistel network is a bijection on numbers of 2 `half` bits, the next even power of two. Results outside of
    `range(size)` go through the network again (cycle walking) until they are inside, which keeps it a bijection on the range.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    shift = np.uint64(half)

    def feistel(x: np.ndarray) -> np.ndarray:
        left, right = x >> shift, x & low
        for round_ in range(4):
            mixed = mix_bits(right + np.uint64(derive_key(key, round_)))
            left, right = right, left ^ (mixed & low)
        return (left << shift) | right

    with np.errstate(over="ignore"):
        out = feistel(indices.astype(np.uint64))
        outside = out >= size
        while outside.any():
            out[outside] = feistel(out[outside])
            outside = out >= size
    return out.astype(np.int64)


class RandomStreams:
    """Non-overlapping Philox streams: the seed is the key, row and position are the counter."""

    def __init__(self, seed: int) -> None:
        self.key = np.array([derive_key(seed, 0xD4A5), derive_key(seed, 0x5EED)], np.uint64)

    def generator(self, row: int, position: int) -> np.random.Generator:
        """The stream of a row at a position of the mixture."""
        # Philox counts draws in the two low words of its counter; row and position take the two high words.
        counter = np.array([0, 0, row, position], np.uint64)
        return np.random.Generator(np.random.Philox(key=self.key, counter=counter))
