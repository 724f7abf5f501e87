"""Hashed n-gram features: counts of words and word pairs, for DSIR and domain shift.

Legend: F hashed features.

10,000 buckets of unigrams and bigrams (Xie et al. 2023, arXiv 2302.03169, section 3: hashed n-gram features).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

FEATURE_COUNT = 10_000


def hash_ngrams(words: Sequence[str]) -> np.ndarray:
    """The bucket of every word and every word pair: CRC-32 modulo `FEATURE_COUNT`, as uint16."""
    out: list[int] = []
    previous: int | None = None
    for word in words:
        data = word.encode()
        own = zlib.crc32(data)
        out.append(own)
        if previous is not None:
            out.append(zlib.crc32(b" " + data, previous))  # continues the CRC: that of both words and a space
        previous = own
    return (np.array(out, np.uint32) % FEATURE_COUNT).astype(np.uint16)


def count_buckets(buckets: np.ndarray) -> np.ndarray:
    """Counts of each bucket, of shape (F,)."""
    return np.bincount(buckets, minlength=FEATURE_COUNT)
