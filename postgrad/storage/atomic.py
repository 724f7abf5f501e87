"""Atomic writes: a folder or file is published completely or not at all.

    stage   write everything into a hidden folder next to the target
    list    manifest.json: size and sha256 of each file
    sync    fsync each file and folder
    rename  one atomic rename, then fsync the parent
    verify  read the files back and compare them with the manifest (later: `storage.verification`)

A process killed at any point leaves the old state or the new one, and perhaps a hidden staging folder that the next
`remove_staging` removes. The manifest proves integrity, not origin: whoever can change the files can change it too.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from typing_extensions import TypedDict

from postgrad.errors import CheckpointError, DiskError, PostgradError
from postgrad.foreign_text import mask_secrets
from postgrad.storage.read_json import read_json

MANIFEST = "manifest.json"
STAGING = ".staging-"
"""Prefix of the names of unfinished writes."""


class FileEntry(TypedDict):
    """A file as a manifest lists it."""

    size: int
    sha256: str


Manifest = dict[str, FileEntry]
"""The files of a folder, by their path in it."""


def publish_folder(target: Path, write: Callable[[Path], object]) -> Path:
    """Publish what `write(staging)` writes as the folder `target`, which must not exist yet.

    Raises `DiskError` when there is no room or no permission. Any error leaves the old state, except that the new folder is
    complete when only the last sync failed.
    """
    staging = target.parent / f"{STAGING}{target.name}"
    try:
        make_staging(target)
        write(staging)
        publish_staging(staging, target, make_manifest(staging))
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        _raise_disk_error(error, target)
        raise
    verify(target)
    return target


def make_staging(target: Path) -> Path:
    """The empty staging folder of `target`."""
    staging = target.parent / f"{STAGING}{target.name}"
    target.parent.mkdir(parents=True, exist_ok=True)
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir()
    return staging


def publish_staging(staging: Path, target: Path, manifest: Manifest) -> None:
    """Write the manifest of a staging folder, sync all of it, and rename it to `target`."""
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
    mode = stat.S_IMODE((staging / MANIFEST).stat().st_mode)
    for folder, _, files in os.walk(staging):
        for name in files:
            _set_mode(Path(folder) / name, mode)
            sync(Path(folder) / name)
        sync(Path(folder))
    os.rename(staging, target)
    sync(target.parent)


def verify(folder: Path) -> Manifest:
    """Check every file of a published folder against its manifest, and return the manifest.

    Raises `CheckpointError` with the first file that is missing or has another size or content.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest.items():
        check_size(folder / name, entry)
        check_sha256(folder / name, sha256(folder / name), entry)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a published folder. Raises `CheckpointError` when it is missing or unreadable."""
    try:
        return read_json(folder / MANIFEST, Manifest)
    except PostgradError as error:
        raise CheckpointError(
            f"{MANIFEST} is missing or unreadable ({error.problem})", where=str(folder), expected="a published folder"
        ) from error


def check_size(path: Path, entry: FileEntry) -> os.stat_result:
    """The status of a listed file. Raises `CheckpointError` when it is missing or has another size."""
    try:
        status = path.stat()
    except OSError:
        status = None
    if status is None or not stat.S_ISREG(status.st_mode):
        raise CheckpointError("the file is missing", where=str(path))
    if status.st_size != entry["size"]:
        raise CheckpointError(
            f"the file has {status.st_size:,} bytes", where=str(path), expected=f"{entry['size']:,} bytes"
        )
    return status


def check_sha256(path: Path, digest: str, entry: FileEntry) -> None:
    """Raise `CheckpointError` when the sha256 of a file is not the listed one."""
    if digest != entry["sha256"]:
        raise CheckpointError(
            "the content of the file has changed since it was written",
            where=str(path),
            expected=f"sha256 {entry['sha256']}",
        )


def remove_staging(parent: Path) -> None:
    """Remove the staging folders and files of interrupted writes in `parent`."""
    for path in parent.glob(f"{STAGING}*") if parent.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a published folder, renaming it first, so that it never exists partly under its own name.

    Raises `DiskError` when the system does not allow it.
    """
    staging = folder.parent / f"{STAGING}old-{folder.name}"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        os.rename(folder, staging)
        shutil.rmtree(staging)
    except OSError as error:
        raise disk_error(error, folder) from error


def write_atomically(path: Path, data: str | bytes) -> None:
    """Replace a file atomically: other processes see the old content or the new one."""
    publish_file(path, lambda staging: staging.write_bytes(data.encode() if isinstance(data, str) else data))


def write_without_secrets(path: Path, text: str) -> None:
    """Replace a file that is made to be passed on, such as a record or a page. Raises `DiskError`."""
    write_atomically(path, mask_secrets(text))


def publish_file(path: Path, write: Callable[[Path], object]) -> None:
    """Replace a file by what `write(staging)` writes, atomically. Raises `DiskError` as `publish_folder` does."""
    # Concurrent runs share a cache, so the staging name contains the process id.
    staging = path.parent / f"{STAGING}{path.name}.{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging.write_bytes(b"")
        mode = stat.S_IMODE(staging.stat().st_mode)
        write(staging)
        _set_mode(staging, mode)
        sync(staging)
        os.replace(staging, path)
        sync(path.parent)
    except BaseException as error:
        with suppress(OSError):
            staging.unlink(missing_ok=True)
        _raise_disk_error(error, path)
        raise


def write_all(file: io.FileIO, data: bytes) -> None:
    """Write all of `data` to an unbuffered file, whose writes may be partial."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Inside, an error of the disk becomes a `DiskError` that names `path`."""
    try:
        yield
    except Exception as error:
        _raise_disk_error(error, path)
        raise


def _raise_disk_error(error: BaseException, path: Path) -> None:
    """Raise a `DiskError` when `error` is one of the disk. safetensors writes from Rust, with errors of its own."""
    if isinstance(error, OSError):
        raise disk_error(error, path) from error
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        number = int(found[1])
        raise disk_error(OSError(number, os.strerror(number)), path) from error


def sha256(path: Path) -> str:
    """The sha256 of a file's contents, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def disk_error(error: OSError, path: Path) -> DiskError:
    """An `OSError` as a `DiskError` with a hint; for a full disk with the free space."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        existing = next(p for p in (path, *path.parents) if p.exists())
        free = shutil.disk_usage(existing).free
        return DiskError(
            f"the disk is full ({free:,} bytes free)",
            where=str(path),
            hint="free disk space and repeat the command: it resumes from the last checkpoint",
        )
    return DiskError(error.strerror or str(error), where=str(path), hint="check that the folder exists and is writable")


def make_manifest(folder: Path, known: Manifest | None = None) -> Manifest:
    """The entries of all files of a folder; those of `known` are not read."""
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: (known or {}).get(name) or make_entry(path) for name, path in files.items()}


def make_entry(path: Path) -> FileEntry:
    """The entry of a file."""
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def _set_mode(path: Path, mode: int) -> None:
    """Give a file the permissions of all new files: safetensors makes its own readable to the owner alone."""
    if stat.S_IMODE(path.stat().st_mode) != mode:
        path.chmod(mode)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
