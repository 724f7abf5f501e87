"""JSON documents and lines with a checksum of their own content; `storage.array_files` has the same for arrays.

The checksum is a key of the document, so content and checksum become final in one rename. It begins
with the file's owner, a run's id or the key of a cache entry: a file that was moved to another owner is refused as well.

A file without a checksum is read as it is: an earlier version wrote it, or a user edited it and removed the key. The broken
file of a run is an error that names it; the broken file of a cache counts as absent and is made again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from postgrad.errors import PostgradError
from postgrad.foreign_text import mask_secrets
from postgrad.storage.atomic import write_atomically
from postgrad.storage.read_json import MAX_BYTES, Value, parse_json, read_file, validate_json

CHECKSUM = "checksum"
OWNER_LENGTH = 8
_DIGEST_FORM = re.compile(rf"\S{{0,{OWNER_LENGTH}}}-[0-9a-f]{{16}}")
"""A checksum: the owner's first characters, and the digest."""


def add_checksum(document: Mapping[str, Any], owner: str = "") -> dict[str, Any]:
    """A JSON document with its checksum as the last key."""
    plain = json.loads(json.dumps(document))
    return {**plain, CHECKSUM: f"{owner[:OWNER_LENGTH]}-{_digest(plain)}"}


def find_damage(document: Mapping[str, Any], owner: str = "") -> str:
    """What is wrong with a document by its checksum: empty when nothing is, and without a checksum."""
    found = document.get(CHECKSUM)
    if found is None:
        last = list(document.values())[-1:]
        return "the key of its checksum is damaged" if last and _DIGEST_FORM.fullmatch(str(last[0])) else ""
    own, _, digest = str(found).rpartition("-")
    if digest != _digest({key: value for key, value in document.items() if key != CHECKSUM}):
        return "the content does not match its checksum"
    return find_other_owner(own, owner)


def write_checked_json(
    path: Path, document: Mapping[str, Any], owner: str = "", *, without_secrets: bool = False
) -> None:
    """Write a JSON document with its checksum, atomically; `without_secrets`: one that is made to be passed on."""
    if without_secrets:
        document = json.loads(mask_secrets(json.dumps(document)))
    write_atomically(path, json.dumps(add_checksum(document, owner), indent=1) + "\n")


def read_checked_json(
    path: Path,
    kind: type[Value],
    owner: str = "",
    *,
    error: type[PostgradError] = PostgradError,
    hint: str = "",
    max_bytes: int = MAX_BYTES,
) -> Value:
    """A JSON document of type `kind`, without its checksum.

    Raises `error` for one that is missing, unreadable, changed, or another owner's.
    """
    data, where = read_file(path, max_bytes, error=error, hint=hint), str(path)
    document: dict[str, Any] = parse_json(data, dict[str, Any], where=where, error=error, hint=hint)
    if problem := find_damage(document, owner):
        edited = f"for a file that you edited, remove its key `{CHECKSUM}`"
        raise error(problem, where=where, hint=f"{hint}; {edited}" if hint else edited)
    document.pop(CHECKSUM, None)
    return validate_json(json.dumps(document), kind, where=where, error=error, hint=hint)


def read_cached_json(path: Path, kind: type[Value], owner: str = "") -> Value | None:
    """A JSON document of a cache; None when it is missing or broken."""
    try:
        return read_checked_json(path, kind, owner)
    except PostgradError:
        return None


def find_other_owner(own: str, owner: str) -> str:
    """What is wrong when a file of the owner `own` is read for `owner`: empty when nothing is, or one of them is unknown."""
    is_other = own and owner and own != owner[:OWNER_LENGTH]
    return "the file belongs to another run or cache entry" if is_other else ""


def _digest(plain: Mapping[str, Any]) -> str:
    """blake2b-8 of plain JSON data, whatever the order of its keys."""
    return hashlib.blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=8).hexdigest()
