"""An exclusive lock between processes, for work that only one of them should do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from postgrad.storage.atomic import disk_errors
from postgrad.storage.regular_file import open_regular_file


def is_locked(lock: Path) -> bool:
    """Whether a process holds the lock."""
    try:
        import fcntl

        with open_regular_file(lock) as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):  # no locks here, or no file
        return False
    return False


@contextmanager
def file_lock(lock: Path) -> Iterator[bool]:
    """Hold the lock, waiting for any other process that has it; it is released when its process ends, in whatever way.

    Yields False where locks are unsupported: then each process does the work, and the first to publish its result wins.
    """
    try:
        import fcntl
    except ImportError:
        yield False
        return
    is_locked = False
    with disk_errors(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = open_regular_file(lock, append=True)
    with handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_locked = True
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:  # a file system without locks
                break
        yield is_locked
