"""Where are a run's checkpoints, which one is the newest that is whole, and which may go?"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from postgrad.errors import CheckpointError, DiskError
from postgrad.storage.atomic import publish_folder, remove_folder, remove_staging, verify


class Checkpoints:
    """The folder of a run's checkpoints, `step-00000100` and so on."""

    def __init__(self, folder: Path, keep: int | None, max_pinned: int = 0) -> None:
        """`keep`: how many of the newest stay (None: all); `besides`: how many others may be told to stay."""
        self.folder, self.keep, self.max_pinned = folder, keep, max_pinned

    def step_folder(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.folder / f"step-{step:08d}"

    def list_folders(self) -> list[Path]:
        """Every checkpoint's folder, oldest first."""
        return sorted(self.folder.glob("step-*"))

    def find_newest(self, warn: Callable[[str], None]) -> Path | None:
        """The newest checkpoint that is whole. One that is not is said, left where it is, and passed over.

        Raises `CheckpointError` when there are checkpoints and none is whole: nothing is trained again silently.
        """
        remove_staging(self.folder)
        trouble: CheckpointError | None = None
        for place in reversed(self.list_folders()):
            try:
                verify(place)
                return place
            except CheckpointError as error:
                warn(f"{error}; falling back to the checkpoint before it")
                trouble = error
        if trouble:
            raise CheckpointError(
                "no checkpoint of this run is whole",
                where=str(self.folder),
                hint="remove the checkpoints folder to train this stage from its beginning",
            ) from trouble
        return None

    def save(self, step: int, write: Callable[[Path], None], pinned_step: int | None = None) -> Path:
        """Publish a checkpoint, then let the oldest go, but for that of the step `stays`.

        A step that is there already and whole is left alone.
        """
        place = self.step_folder(step)
        if place.exists() and not _is_complete(place):
            remove_folder(place)
        if not place.exists():
            publish_folder(place, write)
        if self.keep is not None:
            for old in self.list_folders()[: -self.keep]:
                if pinned_step is None or old != self.step_folder(pinned_step):
                    remove_folder(old)
        return place

    def require_room(self, needed: int) -> None:
        """Raise `DiskError` before any work is done when a checkpoint of `needed` bytes would not fit beside the kept ones."""
        existing = next(p for p in (self.folder, *self.folder.parents) if p.exists())
        free = shutil.disk_usage(existing).free
        # One more than is kept exists while a new one is published.
        room = needed * max(1, (self.keep or 1) + self.max_pinned + 1 - len(self.list_folders()))
        if free < room:
            raise DiskError(
                f"the checkpoints of this run need {room:,} bytes and {free:,} are free",
                where=str(self.folder),
                hint="make room, set `save.keep: 1`, or put `output` on another disk",
            )


def _is_complete(folder: Path) -> bool:
    try:
        verify(folder)
    except CheckpointError:
        return False
    return True
