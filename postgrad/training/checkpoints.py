"""The checkpoints of a run: save, find the newest complete one, remove old ones.

A checkpoint is a folder that `storage.atomic` publishes, so it is complete or absent. A resume takes the newest one whose
manifest verifies; damaged ones are reported and passed over. With `keep: N` only the newest N remain, and a pinned one: the
step that checkpoint selection would publish now.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from postgrad.errors import CheckpointError, DiskError
from postgrad.storage.atomic import publish_folder, remove_folder, remove_staging, verify


class Checkpoints:
    """The folder of a run's checkpoints, `step-00000100` and so on."""

    def __init__(self, folder: Path, keep: int | None, max_pinned: int = 0) -> None:
        """`keep`: how many of the newest to keep (None: all); `max_pinned`: how many others `save` may pin."""
        self.folder, self.keep, self.max_pinned = folder, keep, max_pinned

    def step_folder(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.folder / f"step-{step:08d}"

    def list_folders(self) -> list[Path]:
        """Every checkpoint's folder, oldest first."""
        return sorted(self.folder.glob("step-*"))

    def find_newest(self, warn: Callable[[str], None]) -> Path | None:
        """The newest complete checkpoint. `warn` gets a message for each damaged one, which stays on disk.

        Raises `CheckpointError` when there are checkpoints and none is complete: training never restarts silently.
        """
        remove_staging(self.folder)
        cause: CheckpointError | None = None
        for folder in reversed(self.list_folders()):
            try:
                verify(folder)
                return folder
            except CheckpointError as error:
                warn(f"{error}; falling back to the previous checkpoint")
                cause = error
        if cause:
            raise CheckpointError(
                "all checkpoints of this run are damaged",
                where=str(self.folder),
                hint="remove the checkpoints folder to train this stage from its start",
            ) from cause
        return None

    def save(self, step: int, write: Callable[[Path], None], pinned_step: int | None = None) -> Path:
        """Publish a checkpoint, then remove the oldest ones, except that of `pinned_step`.

        A complete checkpoint of this step is not written again.
        """
        target = self.step_folder(step)
        if target.exists() and not _is_complete(target):
            remove_folder(target)
        if not target.exists():
            publish_folder(target, write)
        if self.keep is not None:
            for old in self.list_folders()[: -self.keep]:
                if pinned_step is None or old != self.step_folder(pinned_step):
                    remove_folder(old)
        return target

    def require_room(self, needed: int) -> None:
        """Raise `DiskError` when the disk has no room for the checkpoints of the run, of `needed` bytes each."""
        existing = next(p for p in (self.folder, *self.folder.parents) if p.exists())
        free = shutil.disk_usage(existing).free
        # A new checkpoint is published before the oldest is removed: one more than `keep` exists for a moment.
        room = needed * max(1, (self.keep or 1) + self.max_pinned + 1 - len(self.list_folders()))
        if free < room:
            raise DiskError(
                f"the checkpoints of this run need {room:,} bytes, only {free:,} are free",
                where=str(self.folder),
                hint="free disk space, set `save.keep: 1`, or put `output` on another disk",
            )


def _is_complete(folder: Path) -> bool:
    try:
        verify(folder)
    except CheckpointError:
        return False
    return True
