"""The words of a text, in every script: the segmentation that all text measures, filters and retrieval share.

A word is a run of letters and digits with their marks, divided where Unicode's word segmentation (UAX #29, by the `regex`
package) divides it. So in scripts without spaces (Chinese, Japanese, Thai, Khmer ...) each character with its marks is a word,
and so is a run of katakana. Words are in lower case and composed (NFC).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import cache

import numpy as np
import regex

SEGMENTATION = "UAX 29"
"""Part of the key of every cache that depends on words."""

_CHUNK = 2**18
"""Characters that are segmented at once."""
_PLANES = 4 * 2**16
"""Code points with letters; the later planes have none."""

_CHARACTER = r"[\p{L}\p{N}\p{M}\u200c\u200d]"
_UNICODE_WORD = rf"[\p{{L}}\p{{N}}]{_CHARACTER}*?(?:\b|(?!{_CHARACTER}))"
_WORD, _SEGMENTED_WORD = re.compile(r"[^\W_]+"), regex.compile(rf"(?w){_UNICODE_WORD}")
_WORD_OR_SIGNS = re.compile(r"\w+|[^\w\s]+")
_SEGMENTED_WORD_OR_SIGNS = regex.compile(rf"(?w){_UNICODE_WORD}|(?:(?![\p{{L}}\p{{N}}])\S)+")
_OTHER_SIGNS = re.compile(r"[^\w\x00-\x7f]+")

_UNSPACED = regex.compile(r"(?V1)[[\p{L}\p{N}]&&[\p{Word_Break=Other}\p{Word_Break=Katakana}]]")
_IRREGULAR = regex.compile(r"(?V1)[[\p{L}\p{N}]&&[\p{Word_Break=Other}\p{Word_Break=Katakana}]]|[\p{M}\u200c\u200d]")
"""Characters that Python's `\\w+` does not divide as Unicode does."""
_LETTER = regex.compile(r"[\p{L}\p{N}]+")


def split_words(text: str) -> list[str]:
    """The words of a text."""
    text = _normalize(text)
    return (_SEGMENTED_WORD if _is_irregular(text) else _WORD).findall(text)


def split_words_and_signs(text: str) -> list[str]:
    """The words of a text and the runs of signs between them; in English those of NLTK's wordpunct tokenizer."""
    return [match.group() for match in match_words_and_signs(_normalize(text))]


def match_words_and_signs(text: str) -> Iterator[re.Match[str]]:
    """The words of a text and the runs of signs between them where they are in it, as they are written."""
    return (_SEGMENTED_WORD_OR_SIGNS if _is_irregular(text) else _WORD_OR_SIGNS).finditer(text)


def separate_words(text: str) -> Iterator[str]:
    """A text in parts, with words divided by signs of ASCII only: what is left is to look for those."""
    text = _normalize(text)
    start = 0
    while start < len(text):
        end = min(start + _CHUNK, len(text))
        if end < len(text):
            space = max(text.rfind(" ", start, end), text.rfind("\n", start, end))
            end = space + 1 if space > start else end
        part = text[start:end]
        yield " ".join(_SEGMENTED_WORD.findall(part)) if _is_irregular(part) else _OTHER_SIGNS.sub(" ", part)
        start = end


def split_spaces(text: str) -> list[str]:
    """The parts of a text between spaces; those in a script without spaces are divided into words."""
    return [word for part in text.split() for word in (split_words(part) if has_unspaced_script(part) else [part])]


def has_unspaced_script(text: str) -> bool:
    """Whether a text has a character of a script without spaces between words."""
    return not text.isascii() and _UNSPACED.search(text) is not None


def _normalize(text: str) -> str:
    return unicodedata.normalize("NFC", text.lower())


def _is_irregular(text: str) -> bool:
    """Whether a text needs Unicode's segmentation. Looked up in a table: ten times as fast as a search."""
    if text.isascii():
        return False
    parts = (text[start : start + _CHUNK] for start in range(0, len(text), _CHUNK))
    codes = (np.frombuffer(part.encode("utf-32-le", "surrogatepass"), "<u4") for part in parts)
    return any(_irregular_table()[np.minimum(part, _PLANES)].any() for part in codes)


@cache
def _irregular_table() -> np.ndarray:
    """Marks, the scripts without spaces, and what is a letter in only one of the two packages' versions of Unicode."""
    characters = [chr(code) for code in range(_PLANES)]
    is_letter, is_irregular = (_find_characters(pattern, characters) for pattern in (_LETTER, _IRREGULAR))
    return is_irregular | (is_letter != [*map(str.isalnum, characters), False])


def _find_characters(pattern: regex.Pattern[str], characters: list[str]) -> np.ndarray:
    found = np.zeros(len(characters) + 1, np.bool_)
    for match in pattern.finditer("".join(characters)):
        found[match.start() : match.end()] = True
    return found
