"""Which words and pairs of words does a text have? Counts in hashed buckets, the features of DSIR and of the shift meter.

Legend: F hashed features.

10,000 buckets of unigrams and bigrams (Xie et al. 2023, arXiv 2302.03169, section 3: hashed n-gram features).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np

WORD_PATTERN = re.compile(r"\w+|[^\w\s]+")
"""Words and runs of signs, as NLTK's wordpunct tokenizer parts them."""

FEATURE_COUNT = 10_000


def split_words(text: str) -> list[str]:
    """Words and runs of signs of a text."""
    return WORD_PATTERN.findall(text)


def hash_ngrams(words: Sequence[str]) -> np.ndarray:
    """The bucket of every word and of every pair of words: CRC-32 modulo `FEATURES`, as uint16."""
    out: list[int] = []
    before: int | None = None
    for word in words:
        data = word.encode()
        alone = zlib.crc32(data)
        out.append(alone)
        if before is not None:
            out.append(zlib.crc32(b" " + data, before))  # goes on where the word before ended: of both with a space
        before = alone
    return (np.array(out, np.uint32) % FEATURE_COUNT).astype(np.uint16)


def count_buckets(buckets: np.ndarray) -> np.ndarray:
    """How often each bucket occurs, of shape (F,)."""
    return np.bincount(buckets, minlength=FEATURE_COUNT)
