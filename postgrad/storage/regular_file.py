"""Regular files only: opening a pipe waits for ever, and reading a device may never end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import IO

_SPECIAL_FILES = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def describe_special_file(path: Path) -> str:
    """`a named pipe`, `a socket` or `a device`; empty for every other path, and for one that does not exist."""
    try:
        return _SPECIAL_FILES.get(stat.S_IFMT(os.stat(path).st_mode), "")
    except (OSError, ValueError):
        return ""


def find_special_file(folder: Path) -> Path | None:
    """The first entry of a folder that is a pipe, a socket or a device."""
    return next((path for path in sorted(folder.iterdir()) if describe_special_file(path)), None)


def open_regular_file(path: Path, *, append: bool = False) -> IO[bytes]:
    """Open a file for reading, or (made if there is none) also for appending.

    Raises `OSError` for what is no regular file, as for a file that cannot be opened.
    """
    if not (kind := describe_special_file(path)):
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT if append else os.O_RDONLY
        # Nothing waits here, even if the path became a pipe since; `fdopen` refuses a folder.
        handle = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        file = os.fdopen(handle, "ab+" if append else "rb")
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
        file.close()
        kind = "a special file"
    raise OSError(errno.EINVAL, f"{kind}, not a regular file", str(path))


def read_regular_file(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file. Raises `OSError` for any other path, and for a file of more than `max_bytes`."""
    with open_regular_file(path) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"the file has more than {max_bytes:,} bytes", str(path))
    return data
