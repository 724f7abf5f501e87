"""Files with a checksum of their own content: JSON documents, lines of JSON, and archives of arrays.

The checksum is a key of the document (an entry of the archive), so content and checksum become final in one rename. It begins
with the file's owner, a run's id or the key of a cache entry: a file that was moved to another owner is refused as well.

A file without a checksum is read as it is: an earlier version wrote it, or a user edited it and removed the key. The broken
file of a run is an error that names it; the broken file of a cache counts as absent and is made again.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from postgrad.errors import PostgradError
from postgrad.storage.atomic import write_atomically
from postgrad.storage.read_json import MAX_BYTES, Value, parse_json, read_json, read_regular_file

CHECKSUM, _OWNER = "checksum", "owner"
_OWNER_LENGTH = 8
_MAX_ARRAY_BYTES = 2**34


def add_checksum(document: Mapping[str, Any], owner: str = "") -> dict[str, Any]:
    """A JSON document with its checksum as the last key."""
    plain = json.loads(json.dumps(document))
    return {**plain, CHECKSUM: f"{owner[:_OWNER_LENGTH]}-{_digest(plain)}"}


def find_damage(document: Mapping[str, Any], owner: str = "") -> str:
    """What is wrong with a document by its checksum: empty when nothing is, and without a checksum."""
    found = document.get(CHECKSUM)
    if found is None:
        return ""
    own, _, digest = str(found).rpartition("-")
    if digest != _digest({key: value for key, value in document.items() if key != CHECKSUM}):
        return "the content does not match its checksum"
    return _find_other_owner(own, owner)


def write_checked_json(path: Path, document: Mapping[str, Any], owner: str = "") -> None:
    """Write a JSON document with its checksum, atomically."""
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
    document: dict[str, Any] = read_json(path, dict[str, Any], error=error, hint=hint, max_bytes=max_bytes)
    if problem := find_damage(document, owner):
        edited = f"for a file that you edited, remove its key `{CHECKSUM}`"
        raise error(problem, where=str(path), hint=f"{hint}; {edited}" if hint else edited)
    document.pop(CHECKSUM, None)
    return parse_json(json.dumps(document).encode(), kind, where=str(path), error=error, hint=hint)


def read_cached_json(path: Path, kind: type[Value], owner: str = "") -> Value | None:
    """A JSON document of a cache; None when it is missing or broken."""
    try:
        return read_checked_json(path, kind, owner)
    except PostgradError:
        return None


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], owner: str = "") -> None:
    """Write arrays as one .npz file, atomically. Its checksums are those of the archive; an entry names the owner."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{**arrays, _OWNER: np.array(owner[:_OWNER_LENGTH])})
    write_atomically(path, buffer.getvalue())


def read_arrays(
    path: Path, owner: str = "", *, error: type[PostgradError] = PostgradError, hint: str = ""
) -> dict[str, np.ndarray]:
    """What `write_arrays` wrote. Raises `error` for a file that is missing, unreadable, changed, or another owner's."""
    try:
        arrays = _unpack_arrays(read_regular_file(path, _MAX_ARRAY_BYTES))
    except FileNotFoundError:
        raise error("there is no such file", where=str(path), hint=hint) from None
    except Exception as problem:  # zipfile and numpy raise errors of a dozen types
        text = f"the file is damaged ({type(problem).__name__}: {problem})"
        raise error(text, where=str(path), expected="an .npz archive", hint=hint) from problem
    if problem := _find_other_owner(str(arrays.pop(_OWNER, "")), owner):
        raise error(problem, where=str(path), hint=hint)
    return arrays


def read_cached_arrays(path: Path, owner: str = "") -> dict[str, np.ndarray] | None:
    """The arrays of a cache; None when they are missing or broken."""
    try:
        return read_arrays(path, owner)
    except PostgradError:
        return None


def _unpack_arrays(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of an archive. Each entry is read to its end, where its crc32 is compared.

    `np.load` stops where the header of an entry says that the array ends: a changed header would hide the rest and the crc32.
    """
    arrays: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError("a compressed entry")
            content = io.BytesIO(archive.read(entry))
            arrays[entry.filename.removesuffix(".npy")] = np.lib.format.read_array(content, allow_pickle=False)
    return arrays


def _find_other_owner(own: str, owner: str) -> str:
    return "the file belongs to another run or cache entry" if own and owner and own != owner[:_OWNER_LENGTH] else ""


def _digest(plain: Mapping[str, Any]) -> str:
    """blake2b-8 of plain JSON data, whatever the order of its keys."""
    return hashlib.blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=8).hexdigest()
