"""Which texts have nearly the same words as one before? MinHash signatures in bands.

The share of five-word runs that two texts have in common (Jaccard) is estimated from the least hash of each under many hash
functions (Broder 1997); signatures are cut into bands, and texts that agree in a whole band are compared (Leskovec, Rajaraman &
Ullman, Mining of Massive Datasets, chapter 3). With 16 bands of 8, texts that share 80 % of their runs meet with a probability
of .95, those that share half with .06.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict

import numpy as np

_WORD_PATTERN = re.compile(r"\w+")
RUN_WORDS = 5
"""Words of a run; a shorter text is one run."""
MIN_THRESHOLD = 0.7
"""The share of common runs below which two texts hardly ever meet in a band."""
_BANDS, _BAND_ROWS = 16, 8


class NearDuplicateIndex:
    """Texts that were met, and whether a new one is nearly one of them."""

    def __init__(self, threshold: float = 0.8) -> None:
        """`threshold`: the share of common runs from which two texts are nearly the same."""
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
        """The number of the first text that this is nearly the same as; None for a new one, which is remembered."""
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
        """The least hash of the text's runs under each function."""
        words = _WORD_PATTERN.findall(text.lower())
        runs = {" ".join(words[i : i + RUN_WORDS]) for i in range(max(1, len(words) - RUN_WORDS + 1))}
        hashes = [int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest(), "little") for run in runs]
        # Odd factors modulo 2^64 (Dietzfelbinger et al. 1997) permute the hashes; they overflow on purpose.
        with np.errstate(over="ignore"):
            return (np.array(hashes, np.uint64)[:, None] * self._factor + self._offset).min(0)


def repetition_share(words: list[str] | list[int], run_length: int = 8) -> float:
    """The share of a text that stands in runs which occurred before in it: 0 for none, near 1 for a text in a loop."""
    met: set[tuple[str | int, ...]] = set()
    again = np.zeros(len(words), bool)
    for i in range(len(words) - run_length + 1):
        here = tuple(words[i : i + run_length])
        if here in met:
            again[i : i + run_length] = True
        met.add(here)
    return float(again.mean()) if len(words) else 0.0
