"""JSON files that postgrad reads as a whole: its own, and the configurations of models and adapters.

A file is a regular one, of bounded size and depth, without repeated keys, and of the declared type. Any other file is an
error that names the file, and the field.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from postgrad.errors import PostgradError
from postgrad.storage.regular_file import read_regular_file

MAX_BYTES = 64 * 2**20
"""Size limit of one file. A record of 100 sources has about 100 kB."""

Value = TypeVar("Value")


def read_json(
    path: Path,
    kind: type[Value],
    *,
    error: type[PostgradError] = PostgradError,
    expected: str = "",
    hint: str = "",
) -> Value:
    """The value in a JSON file, of type `kind`: a pydantic model, a dataclass, a TypedDict, or a plain type.

    Raises `error`, with `expected` and `hint`, for a file that cannot be read or holds something else.
    """
    data = read_file(path, MAX_BYTES, error=error, expected=expected, hint=hint)
    return parse_json(data, kind, where=str(path), error=error, expected=expected, hint=hint)


def read_file(path: Path, max_bytes: int, *, error: type[PostgradError], expected: str = "", hint: str = "") -> bytes:
    """The bytes of a regular file of at most `max_bytes`. Raises `error` for any other."""
    try:
        return read_regular_file(path, max_bytes)
    except OSError as problem:
        text = "there is no such file" if isinstance(problem, FileNotFoundError) else problem.strerror or str(problem)
        raise error(text, where=str(path), expected=expected, hint=hint) from problem


def parse_json(
    data: bytes,
    kind: type[Value],
    *,
    where: str,
    error: type[PostgradError] = PostgradError,
    expected: str = "",
    hint: str = "",
) -> Value:
    """The value of a JSON text, of type `kind`. `where` names the text in errors. Raises `error` for anything else."""
    value = validate_json(data, kind, where=where, error=error, expected=expected, hint=hint)
    try:
        json.loads(data, object_pairs_hook=_refuse_repeated_keys)
    except ValueError as problem:
        raise error(str(problem), where=where, expected=expected, hint=hint) from None
    return value


def validate_json(
    data: bytes | str, kind: type[Value], *, where: str, error: type[PostgradError], expected: str = "", hint: str = ""
) -> Value:
    """The same for a text without repeated keys."""
    try:
        # Strict: the number 1 is no string, and the string "1" no number. The parser refuses more than 200 levels.
        return _get_adapter(kind).validate_json(data, strict=True)
    except ValidationError as problem:
        first = problem.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        text = first["msg"].replace("Invalid JSON: recursion limit exceeded", "the JSON is nested too deeply")
        text = f"{text[:1].lower()}{text[1:]}".replace("invalid JSON: ", "broken JSON: ")
        raise error(f"{field}: {text}" if field else text, where=where, expected=expected, hint=hint) from None


@lru_cache(maxsize=64)
def _get_adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, refused when a key repeats: a flipped bit that makes two names equal must not hide an entry."""
    entries: dict[str, Any] = {}
    for key, value in pairs:
        if key in entries:
            raise ValueError(f"the key {key!r} is repeated")
        entries[key] = value
    return entries
