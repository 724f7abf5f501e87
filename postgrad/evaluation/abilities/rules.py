"""Rules that an answer must keep, checked by code: what makes an answer to a probe right.

A rule is a name and a value; the rules of a probe are a mapping, and are stored as JSON. The score of an answer is the smallest
over its rules: 0 or 1, and with `copy` a share. An answer without a word or number is wrong by every rule. What precedes
`</think>` is no part of an answer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from postgrad.errors import DataError, suggest_nearest
from postgrad.evaluation.abilities.languages import detect_language

Rules = Mapping[str, Any]

_END_OF_REASONING = "</think>"
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_NUMBER = re.compile(r"[-−+]?\d[\d,]*(?:\.\d+)?")
_SENTENCE_END = re.compile(r"[.!?]+(?=[\s\"'”’)]|$)")
_FENCE = re.compile(r"```\w*\n(.*?)\n?```", re.DOTALL)
_QUOTES = "\"'`“”‘’«»*"
_DECLINED = re.compile(
    r"\bi(?:'m| am) (?:so |very |really )?sorry\b"
    r"|^\W*sorry\b"
    r"|\bi (?:can't|cannot|can not|won't|will not|shouldn't|must not)"
    r"(?! (?:wait|stress|emphasi[sz]e|overstate|help but|recommend .* enough))"
    r"|\bi(?:'m| am) (?:unable|not able|not willing|not going|not comfortable)\b"
    r"|\bi (?:must|have to|need to) (?:decline|refuse)\b"
    r"|\bi(?:'d| would) rather not\b"
    r"|\bi (?:do not|don't) (?:feel comfortable|think i (?:can|should))\b"
)
_DECLINED_WITHIN = 200
"""Characters in which a refusal is looked for: it comes first."""


def score_answer(rules: Rules, answer: str) -> float:
    """The score of an answer, from 0 to 1. Raises `DataError` for a rule that is unknown."""
    for name in rules:
        if name not in RULES:
            raise DataError(f"unknown rule {name!r}", expected=", ".join(RULES), hint=suggest_nearest(name, RULES))
    answer = answer.rpartition(_END_OF_REASONING)[2].strip()
    if not _WORD.search(answer):
        return 0.0
    return min(float(RULES[name](value, answer)) for name, value in rules.items())


def score_by_reference(answer: str, references: Sequence[str]) -> float:
    """The score of an answer whose last reference holds the rules as JSON; those before it are right answers, to be read."""
    return score_answer(json.loads(references[-1]), answer)


def split_answer_words(text: str) -> list[str]:
    """The words of an answer; those with a hyphen or an apostrophe are one."""
    return _WORD.findall(text)


def _lower_words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def _unquoted(text: str) -> str:
    return text.strip().strip(_QUOTES).strip()


def _copied_share(text: str, answer: str) -> float:
    """The words that are right up to the first that is not, as a share of the longer text: extra words are no copy either."""
    expected, given = text.split(), _unquoted(answer).split()
    matching = next(
        (i for i, (ours, theirs) in enumerate(zip(given, expected, strict=False)) if ours != theirs),
        min(len(given), len(expected)),
    )
    return matching / max(len(given), len(expected))


def _is_number(value: float, answer: str) -> bool:
    """Whether the last number of the answer is `value`."""
    found = _NUMBER.findall(answer)
    return bool(found) and math.isclose(float(found[-1].replace(",", "").replace("−", "-")), value, abs_tol=1e-9)


def _is_json(value: Any, answer: str) -> bool:
    """Whether the answer is JSON alone, fenced or not, of equal values and types."""
    fenced = _FENCE.fullmatch(answer)
    try:
        found = json.loads(fenced[1] if fenced else answer)
    except (ValueError, RecursionError):
        return False
    return json.dumps(found, sort_keys=True) == json.dumps(value, sort_keys=True)


def _are_lines(lines: Sequence[str], answer: str) -> bool:
    """Whether the lines of the answer are these; empty lines and the case of letters do not count."""
    given = [line.strip().lower() for line in answer.splitlines() if line.strip()]
    return given == [line.lower() for line in lines]


def _is_one_word(word: str, answer: str) -> bool:
    """Whether the answer is this word alone; quotes and a full stop do not count."""
    return _unquoted(_unquoted(answer).rstrip(".")).lower() == word.lower()


def _is_in_case(case: str, answer: str) -> bool:
    return answer == (answer.lower() if case == "lower" else answer.upper())


def _count_sentences(answer: str) -> int:
    """Sentences by their ends; what follows the last end is one more."""
    ends = list(_SENTENCE_END.finditer(answer))
    rest = answer[ends[-1].end() :] if ends else answer
    return len(ends) + bool(_WORD.search(rest))


def is_declined(answer: str) -> bool:
    """Whether an answer in English declines the request."""
    return bool(_DECLINED.search(answer.replace("’", "'").lower()[:_DECLINED_WITHIN]))


RULES: Mapping[str, Callable[[Any, str], float]] = MappingProxyType(
    {
        "copy": _copied_share,
        "number": _is_number,
        "json": _is_json,
        "lines": _are_lines,
        "word": _is_one_word,
        "words": lambda limits, answer: limits[0] <= len(_WORD.findall(answer)) <= limits[1],
        "sentences": lambda count, answer: _count_sentences(answer) == count,
        "include": lambda words, answer: set(words) <= set(_lower_words(answer)),
        "exclude": lambda words, answer: not set(words) & set(_lower_words(answer)),
        "begin": lambda word, answer: _lower_words(answer)[:1] == [word],
        "end": lambda word, answer: _lower_words(answer)[-1:] == [word],
        "case": _is_in_case,
        "language": lambda language, answer: detect_language(answer) == language,
        "declined": lambda declined, answer: is_declined(answer) == declined,
    }
)
"""By name: `(value, answer) -> score`. `words`: fewest and most; `include`, `exclude`, `begin`, `end`: words in lower case."""
