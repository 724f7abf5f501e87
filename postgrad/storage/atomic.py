"""How does a folder become final? Staged, synced, listed with its hashes, renamed, verified: never half there.

    stage   write everything into a hidden folder beside the place
    sync    fsync each file and folder
    list    manifest.json: size and sha256 of each file
    rename  one atomic rename, then fsync the parent
    verify  read back what the manifest promises

A process killed anywhere in between leaves either the old state or the new one, and perhaps a hidden staging folder that
the next `sweep` removes. The manifest proves integrity, not origin: whoever can change the files can change it too.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from postgrad.errors import CheckpointError, DiskError

MANIFEST = "manifest.json"
_STAGING = ".staging-"


def publish_folder(target: Path, write: Callable[[Path], None]) -> Path:
    """Make the folder `place` with what `write(folder)` puts there; `place` must not exist yet.

    Raises `DiskError` when there is no room or no permission; the old state is then left, or, when nothing but the last
    sync failed, the whole new one. Whatever else `write` raises leaves the old state too.
    """
    staging = target.parent / f"{_STAGING}{target.name}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if staging.exists():
            shutil.rmtree(staging)
        staging.mkdir()
        write(staging)
        _write_synced(staging / MANIFEST, json.dumps(_listing(staging), indent=1, sort_keys=True).encode())
        for folder, _, files in os.walk(staging):
            for name in files:
                _sync(Path(folder) / name)
            _sync(Path(folder))
        os.rename(staging, target)
        _sync(target.parent)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError):
            raise disk_error(error, target) from error
        if f"(os error {errno.ENOSPC})" in str(error):  # safetensors writes from Rust and has an error of its own
            raise disk_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), target) from error
        raise
    verify(target)
    return target


def verify(folder: Path) -> dict[str, dict[str, str | int]]:
    """Check every file of a published folder against its manifest, and return the manifest's listing.

    Raises `CheckpointError` naming the first file that is missing, of another size, or of other contents.
    """
    try:
        listing = json.loads((folder / MANIFEST).read_bytes(), object_pairs_hook=_reject_duplicate_keys)
        promises = [(name, promised["size"], promised["sha256"]) for name, promised in listing.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            "there is no readable manifest.json", where=str(folder), expected="a published folder"
        ) from error
    for name, size, digest in promises:
        path = folder / name
        if not path.is_file():
            raise CheckpointError("the file is missing", where=str(path))
        if path.stat().st_size != size:
            raise CheckpointError(
                f"the file has {path.stat().st_size:,} bytes", where=str(path), expected=f"{size:,} bytes"
            )
        if sha256(path) != digest:
            raise CheckpointError(
                "the file's contents are not what was written", where=str(path), expected=f"sha256 {digest}"
            )
    return listing


def remove_staging(parent: Path) -> None:
    """Remove what an interrupted publication or removal left under `parent`."""
    for path in parent.glob(f"{_STAGING}*") if parent.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a published folder: renamed away first, so that it is never half there under its own name.

    Raises `DiskError` when that is not allowed.
    """
    staging = folder.parent / f"{_STAGING}old-{folder.name}"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        os.rename(folder, staging)
        shutil.rmtree(staging)
    except OSError as error:
        raise disk_error(error, folder) from error


def write_atomically(path: Path, data: str | bytes) -> None:
    """Replace a file as a whole: another process sees the old contents or the new ones."""
    # Runs side by side share a cache, so each process stages under a name of its own.
    staging = path.parent / f"{_STAGING}{path.name}.{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_synced(staging, data.encode() if isinstance(data, str) else data)
        os.replace(staging, path)
        _sync(path.parent)
    except BaseException as error:
        with suppress(OSError):
            staging.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise disk_error(error, path) from error
        raise


def sha256(path: Path) -> str:
    """The sha256 of a file's contents, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def disk_error(error: OSError, path: Path) -> DiskError:
    """The same failure, told with what is free and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        existing = next(p for p in (path, *path.parents) if p.exists())
        free = shutil.disk_usage(existing).free
        return DiskError(
            f"the disk is full ({free:,} bytes free)",
            where=str(path),
            hint="make room, then give the same command again: it goes on from the last checkpoint",
        )
    return DiskError(error.strerror or str(error), where=str(path), hint="check the folder and its permissions")


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys all differ: a name that a flipped bit made equal to its neighbour must not hide a file."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def _listing(folder: Path) -> dict[str, dict[str, str | int]]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): {"size": p.stat().st_size, "sha256": sha256(p)} for p in files}


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
