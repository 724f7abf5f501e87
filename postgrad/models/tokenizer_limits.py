"""Limits of tokenizers: how much their normalizers and decoders grow a text, and how long they take for one.

The steps of a `tokenizer.json` run in compiled code, which cannot be interrupted, on every text. Growth is bounded from the
file, before it is loaded; time is measured on short texts that are hard for regular expressions.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from postgrad.errors import ModelError, first_line
from postgrad.storage.read_json import read_file, validate_json

_MAX_BYTES = 512 * 2**20
_MAX_GROWTH = 64
"""How many times longer a text may become. Replacements of published tokenizers at most triple it."""
_MAX_SECONDS = 10.0
_HARD_TEXTS = (
    "a" * 500 + "!",
    " " * 500 + "a",
    "a " * 250 + "!",
    "1" * 500 + "a",
    "\n \t" * 200 + "a",
    "aA1 .,-_" * 60,
    "é一\u0301" * 150,
)


@dataclass(frozen=True)
class _TokenizerSteps:
    """The parts of a `tokenizer.json` that change texts. Its vocabulary, nearly all of the file, is not kept."""

    normalizer: dict[str, Any] | None = None
    decoder: dict[str, Any] | None = None


def check_tokenizer_file(path: Path, where: str) -> None:
    """Raise `ModelError` for a `tokenizer.json` that is no JSON, or whose replacements grow a text without end."""
    data = read_file(path, _MAX_BYTES, error=ModelError)
    steps = validate_json(data, _TokenizerSteps, where=str(path), error=ModelError)
    for name, part in (("normalizer", steps.normalizer), ("decoder", steps.decoder)):
        growth = 1.0
        for step in _iter_steps(part):
            growth *= _step_growth(step)
        if growth > _MAX_GROWTH:
            raise ModelError(
                f"the {name} of {path} makes a text up to {growth:,.0f} times as long",
                where=where,
                expected=f"at most {_MAX_GROWTH} times",
                hint=f"remove replacements from `{name}` in the tokenizer.json",
            )


def _iter_steps(part: Any) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer or decoder, those of sequences included. The parser bounds their nesting."""
    if isinstance(part, dict):
        yield part
        for inner in (part.get("normalizers"), part.get("decoders")):
            for item in inner if isinstance(inner, list) else ():
                yield from _iter_steps(item)


def _step_growth(step: dict[str, Any]) -> float:
    """How many times longer one step makes a text, at most."""
    added = len(str(step.get("content") or step.get("prepend") or ""))
    if step.get("type") == "Replace":
        pattern = step.get("pattern")
        found = pattern.get("String") if isinstance(pattern, dict) else None
        # A regular expression may match a single character, or none.
        return max(1.0, added / len(found)) if found else 1.0 + added
    return 1.0 + added / 100 if step.get("type") == "Prepend" else 1.0


def check_tokenizer_speed(tokenizer: PreTrainedTokenizerBase, name: str, where: str) -> None:
    """Raise `ModelError` for a tokenizer that takes seconds for a short text, as some regular expressions do."""
    errors: list[BaseException] = []

    def encode() -> None:
        try:
            for text in _HARD_TEXTS:
                tokenizer.decode(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        except BaseException as error:  # a panic of the package is no Exception
            errors.append(error)

    # A daemon: its thread may never end, and must not hold up the end of the process.
    thread = threading.Thread(target=encode, daemon=True)
    thread.start()
    thread.join(_MAX_SECONDS)
    if thread.is_alive():
        raise ModelError(
            f"the tokenizer of {name} takes more than {_MAX_SECONDS:g} s for {sum(map(len, _HARD_TEXTS)):,} characters",
            where=where,
            expected="a tokenizer whose regular expressions are linear in the text",
        )
    if errors:
        raise ModelError(
            f"the tokenizer of {name} fails on short texts: {first_line(errors[0])}", where=where
        ) from errors[0]
