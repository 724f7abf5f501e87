"""Verification of published files at later uses: whole once, then sampled blocks.

A file is read whole, and its sha256 compared with the listed one, at its first use on this machine and whenever its size,
times or inode have changed since. Any later use reads `SAMPLED_BLOCKS` random blocks of the folder and compares their crc32.
So a change through the file system is always found, and decay below it is found in time, at a cost that does not grow with
the files. The memo is in the cache folder, one small file for each verified folder; without it, files are read whole again.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
import zlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

from postgrad.errors import CheckpointError, DiskError
from postgrad.storage.atomic import FileEntry, Manifest, check_sha256, check_size, read_manifest, write_atomically
from postgrad.storage.regular_file import read_regular_file

SAMPLED_BLOCKS = 2
_BLOCK_BYTES = 2**16
_MAX_BLOCKS = 2**14
"""Blocks of a file; those of a larger file are larger."""
_MAX_MEMO_BYTES = 2**30
_CLOCK_GRAIN_NS = 2e9
"""A file this young may change again without new times, so it is read whole again."""


@dataclass(frozen=True)
class _VerifiedFile:
    """A file that was read whole."""

    state: list[int]
    """Size, times and inode."""
    sha256: str
    block_bytes: int

    @property
    def block_count(self) -> int:
        return -(-self.state[0] // self.block_bytes)


@dataclass(frozen=True)
class _Memo:
    """The verified files of a folder, and the crc32 of their blocks, four bytes each."""

    files: dict[str, _VerifiedFile]
    crc32: dict[str, bytes]


def verify_published(folder: Path, cache: Path) -> Manifest:
    """Verify a published folder by its manifest. Raises `CheckpointError` with the first file that differs."""
    manifest = read_manifest(folder)
    verify_files(folder, manifest, cache)
    return manifest


def is_intact(folder: Path, cache: Path) -> bool:
    """Whether a published folder exists and is undamaged."""
    try:
        verify_published(folder, cache)
    except CheckpointError:
        return False
    return True


def verify_files(folder: Path, entries: Mapping[str, FileEntry], cache: Path | None) -> None:
    """Verify the listed files of a folder; without `cache` whole. Raises `CheckpointError` with the first file that differs."""
    memo_file = _memo_file(folder, cache) if cache else None
    known = _read_memo(memo_file) if memo_file else _Memo({}, {})
    memo = _Memo({}, {})
    unchanged: list[str] = []
    for name, entry in entries.items():
        path = folder / name
        status = check_size(path, entry)
        state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        file = known.files.get(name)
        if file and file.state == state and file.sha256 == entry["sha256"]:
            memo.files[name], memo.crc32[name] = file, known.crc32[name]
            unchanged.append(name)
            continue
        file, crc32 = _read_whole(path, state)
        check_sha256(path, file.sha256, entry)
        if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) >= _CLOCK_GRAIN_NS:
            memo.files[name], memo.crc32[name] = file, crc32
    if memo_file and memo.files != known.files:
        with suppress(DiskError):  # a read-only cache
            _write_memo(memo_file, memo)
    for name in _find_changed_blocks(folder, memo, unchanged):
        file, _ = _read_whole(folder / name, [])
        check_sha256(folder / name, file.sha256, entries[name])  # decides: the memo may be what has changed


def _memo_file(folder: Path, cache: Path) -> Path:
    return cache / "verified" / hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]


def _write_memo(memo_file: Path, memo: _Memo) -> None:
    """Write the crc32 of a line, the line (JSON), and behind it the crc32 of all blocks."""
    line = json.dumps({name: asdict(file) for name, file in memo.files.items()}).encode()
    blocks = b"".join(memo.crc32[name] for name in memo.files)
    write_atomically(memo_file, zlib.crc32(line).to_bytes(4, "little") + line + b"\n" + blocks)


def _read_memo(memo_file: Path) -> _Memo:
    """The memo; empty when it is missing or broken. It is read at every start, so it has a cheaper form than other files."""
    try:
        data = read_regular_file(memo_file, _MAX_MEMO_BYTES)
    except OSError:
        return _Memo({}, {})
    line, _, blocks = data[4:].partition(b"\n")
    if not line or data[:4] != zlib.crc32(line).to_bytes(4, "little"):
        return _Memo({}, {})
    files = {name: _VerifiedFile(**each) for name, each in json.loads(line).items()}
    ends = list(accumulate(4 * file.block_count for file in files.values()))
    spans = zip(files, [0, *ends], ends, strict=False)
    return _Memo(files, {name: blocks[start:end] for name, start, end in spans})


def _read_whole(path: Path, state: list[int]) -> tuple[_VerifiedFile, bytes]:
    """Read a file once, for its sha256 and the crc32 of each block. Raises `CheckpointError` when it cannot be read."""
    try:
        size = max(_BLOCK_BYTES, 1 << max(0, path.stat().st_size - 1).bit_length() >> _MAX_BLOCKS.bit_length() - 1)
        hasher, crc32 = hashlib.sha256(), bytearray()
        with path.open("rb") as file:
            while block := file.read(size):
                hasher.update(block)
                crc32 += zlib.crc32(block).to_bytes(4, "little")
    except OSError as error:
        raise CheckpointError(f"the file cannot be read ({error.strerror})", where=str(path)) from error
    return _VerifiedFile(state, hasher.hexdigest(), size), bytes(crc32)


def _find_changed_blocks(folder: Path, memo: _Memo, names: Sequence[str]) -> set[str]:
    """The files with a changed block among a few random ones, each as likely as any other."""
    ends = list(accumulate(memo.files[name].block_count for name in names))
    changed: set[str] = set()
    for block in random.sample(range(ends[-1] if ends else 0), min(SAMPLED_BLOCKS, ends[-1] if ends else 0)):
        number = bisect_right(ends, block)
        name, i = names[number], block - (ends[number - 1] if number else 0)
        size = memo.files[name].block_bytes
        with (folder / name).open("rb") as file:
            file.seek(i * size)
            found = zlib.crc32(file.read(size)).to_bytes(4, "little")
        if found != memo.crc32[name][4 * i : 4 * i + 4]:
            changed.add(name)
    return changed
