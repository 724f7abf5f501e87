"""Near-duplicate detection with MinHash signatures and locality-sensitive hashing.

The Jaccard similarity of two texts' sets of five-word shingles is the probability that a random hash function has the same
minimum on both (Broder 1997), so it is estimated as the fraction of equal minima under many hash functions, the signature.
Signatures are split into bands, and only texts that agree in a whole band are compared (Leskovec, Rajaraman & Ullman, Mining
of Massive Datasets, chapter 3). With 16 bands of 8 rows, texts of similarity s are compared with probability
1 - (1 - s^8)^16: .95 for s = .8, and .06 for s = .5.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict

import numpy as np

from postgrad.data.words import split_words

RUN_WORDS = 5
"""Words of a shingle; a shorter text is one shingle."""
_BANDS, _BAND_ROWS = 16, 8


class NearDuplicateIndex:
    """An index of texts that finds near duplicates of a new one."""

    def __init__(self, threshold: float = 0.8) -> None:
        """`threshold`: estimated similarity from which two texts are near duplicates."""
        self.threshold = threshold
        rng = np.random.default_rng(0)
        count = _BANDS * _BAND_ROWS
        self._factor = rng.integers(0, 1 << 63, count, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._offset = rng.integers(0, 1 << 63, count, dtype=np.uint64)
        self._bands: dict[tuple[int, bytes], list[int]] = defaultdict(list)
        self._signatures: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self._signatures)

    def find_or_add(self, text: str) -> int | None:
        """The number of the first near duplicate of a text; None for a new text, which is added."""
        signature = self._signature(text)
        keys = [(band, signature[band * _BAND_ROWS : (band + 1) * _BAND_ROWS].tobytes()) for band in range(_BANDS)]
        for number in sorted({number for key in keys for number in self._bands.get(key, ())}):
            if float((self._signatures[number] == signature).mean()) >= self.threshold:
                return number
        for key in keys:
            self._bands[key].append(len(self._signatures))
        self._signatures.append(signature)
        return None

    def _signature(self, text: str) -> np.ndarray:
        """The minimum hash of the text's shingles under each hash function."""
        words = split_words(text)
        runs = {" ".join(words[i : i + RUN_WORDS]) for i in range(max(1, len(words) - RUN_WORDS + 1))}
        hashes = [int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest(), "little") for run in runs]
        # Multiplication by odd factors modulo 2^64 (Dietzfelbinger et al. 1997) permutes the hashes; overflow is intended.
        with np.errstate(over="ignore"):
            return (np.array(hashes, np.uint64)[:, None] * self._factor + self._offset).min(0)


def repetition_share(words: list[str] | list[int], run_length: int = 8) -> float:
    """The share of words within runs that occurred before in the text: 0 for none, near 1 for a text in a loop."""
    seen: set[tuple[str | int, ...]] = set()
    is_repeated = np.zeros(len(words), bool)
    for i in range(len(words) - run_length + 1):
        run = tuple(words[i : i + run_length])
        if run in seen:
            is_repeated[i : i + run_length] = True
        seen.add(run)
    return float(is_repeated.mean()) if len(words) else 0.0
