"""Archives of arrays (.npz) with their owner: the id of a run, or the key of a cache entry.

A zip archive has a crc32 of each entry, and the names twice. A broken archive of a run is an error that names it; that of a
cache counts as absent and is made again.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from postgrad.errors import PostgradError
from postgrad.storage.atomic import write_atomically
from postgrad.storage.checked_files import OWNER_LENGTH, find_other_owner
from postgrad.storage.regular_file import read_regular_file

_OWNER = "owner"
_MAX_BYTES = 2**34
_LOCAL_HEADER = 30
"""Bytes before the name of an entry; the last four are the lengths of the name and of the extra field behind it."""
_LIST_MARK = b"PK\1\2"


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], owner: str = "") -> None:
    """Write arrays as one .npz file, atomically. Its checksums are those of the archive; an entry names the owner."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{**arrays, _OWNER: np.array(owner[:OWNER_LENGTH])})
    write_atomically(path, buffer.getvalue())


def read_arrays(
    path: Path, owner: str = "", *, error: type[PostgradError] = PostgradError, hint: str = ""
) -> dict[str, np.ndarray]:
    """What `write_arrays` wrote. Raises `error` for a file that is missing, unreadable, changed, or another owner's."""
    try:
        arrays = _unpack_arrays(read_regular_file(path, _MAX_BYTES))
    except FileNotFoundError:
        raise error("there is no such file", where=str(path), hint=hint) from None
    except Exception as problem:  # zipfile and numpy raise errors of a dozen types
        text = f"the file is damaged ({type(problem).__name__}: {problem})"
        raise error(text, where=str(path), expected="an .npz archive", hint=hint) from problem
    if problem := find_other_owner(str(arrays.pop(_OWNER, "")), owner):
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
        _refuse_gaps(data, archive.infolist())
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError("a compressed entry")
            content = io.BytesIO(archive.read(entry))
            arrays[entry.filename.removesuffix(".npy")] = np.lib.format.read_array(content, allow_pickle=False)
    return arrays


def _refuse_gaps(data: bytes, entries: Sequence[zipfile.ZipInfo]) -> None:
    """Raise `ValueError` unless each entry begins where the last one ends, and the list of entries behind them.

    The list has no crc32: a changed length in it hides the entries that follow.
    """
    end = 0
    for entry in entries:
        if entry.header_offset != end:
            break
        end += _LOCAL_HEADER + sum(struct.unpack_from("<HH", data, end + _LOCAL_HEADER - 4)) + entry.compress_size
    else:
        if data[end : end + 4] == _LIST_MARK:
            return
    raise ValueError("an entry is missing from the list of entries")
