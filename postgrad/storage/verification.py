"""Verification of published files at later uses: whole once, then sampled blocks.

A file is read whole, and its sha256 compared with the listed one, at its first use on this machine and whenever its size,
times or inode have changed since. Any later use reads `SAMPLED_BLOCKS` random blocks of the folder and compares their crc32.
So a change through the file system is always found, and decay below it is found in time, at a cost that does not grow with
the files. The memo is in the cache folder, one small file for each verified folder; without it, files are read whole again.
"""

from __future__ import annotations

import base64
import hashlib
import os
import random
import time
import zlib
from bisect import bisect_right
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

from postgrad.errors import CheckpointError, DiskError
from postgrad.storage.atomic import FileEntry, Manifest, check_sha256, check_size, read_manifest
from postgrad.storage.checked_files import read_cached_json, write_checked_json

SAMPLED_BLOCKS = 4
_BLOCK_BYTES = 2**16
_MAX_BLOCKS = 2**12
"""Blocks of a file; those of a larger file are larger."""
_CLOCK_GRAIN_NS = 2e9
"""A file this young may change again without new times, so it is read whole again."""


@dataclass(frozen=True)
class _VerifiedFile:
    """A file that was read whole."""

    state: list[int]
    """Size, times and inode."""
    sha256: str
    block_bytes: int
    crc32: str
    """Of each block, four bytes each, in base64."""


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
    known = _read_memo(memo_file) if memo_file else {}
    verified: dict[str, _VerifiedFile] = {}
    unchanged: dict[str, _VerifiedFile] = {}
    for name, entry in entries.items():
        path = folder / name
        found = check_size(path, entry)
        state = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
        earlier = known.get(name)
        if earlier and earlier.state == state and earlier.sha256 == entry["sha256"]:
            verified[name] = unchanged[name] = earlier
            continue
        file = _read_whole(path, state)
        check_sha256(path, file.sha256, entry)
        if time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) >= _CLOCK_GRAIN_NS:
            verified[name] = file
    if memo_file and verified != known:
        with suppress(DiskError):  # a read-only cache
            write_checked_json(memo_file, {name: asdict(each) for name, each in verified.items()}, memo_file.stem)
    _verify_sample(folder, unchanged)


def _memo_file(folder: Path, cache: Path) -> Path:
    return cache / "verified" / f"{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]}.json"


def _read_memo(memo_file: Path) -> dict[str, _VerifiedFile]:
    return read_cached_json(memo_file, dict[str, _VerifiedFile], memo_file.stem) or {}


def _read_whole(path: Path, state: list[int]) -> _VerifiedFile:
    """Read a file once, for its sha256 and the crc32 of each block. Raises `CheckpointError` when it cannot be read."""
    size = _BLOCK_BYTES
    while size * _MAX_BLOCKS < state[0]:
        size *= 2
    hasher, crc32 = hashlib.sha256(), bytearray()
    try:
        with path.open("rb") as file:
            while block := file.read(size):
                hasher.update(block)
                crc32 += zlib.crc32(block).to_bytes(4, "little")
    except OSError as error:
        raise CheckpointError(f"the file cannot be read ({error.strerror})", where=str(path)) from error
    return _VerifiedFile(state, hasher.hexdigest(), size, base64.b64encode(crc32).decode())


def _verify_sample(folder: Path, files: Mapping[str, _VerifiedFile]) -> None:
    """Compare random blocks, each as likely as any other. Raises `CheckpointError` for one that differs."""
    counts = [-(-each.state[0] // each.block_bytes) for each in files.values()]
    ends = list(accumulate(counts))
    for block in random.sample(range(sum(counts)), min(SAMPLED_BLOCKS, sum(counts))):
        number = bisect_right(ends, block)
        name, each = list(files.items())[number]
        i = block - ends[number] + counts[number]
        with (folder / name).open("rb") as file:
            file.seek(i * each.block_bytes)
            found = zlib.crc32(file.read(each.block_bytes)).to_bytes(4, "little")
        if found != base64.b64decode(each.crc32)[4 * i : 4 * i + 4]:
            raise CheckpointError(
                f"block {i} ({each.block_bytes:,} bytes each) has changed since the file was verified",
                where=str(folder / name),
                expected=f"sha256 {each.sha256}",
            )
