"""The checkpoints of a run: save, find the newest complete one, remove old ones.

A checkpoint is a folder `step-NNNNNNNN` that `storage.atomic` publishes, so it is complete or absent. A resume takes the newest
one that its manifest verifies and that this run wrote; damaged ones are reported and passed over, one of another run is an
error. With `keep: N` the newest N complete ones remain, and a pinned one: the step that checkpoint selection would publish now.
Everything else in the folder is left alone and named.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch

from postgrad.distributed.shard_files import publish_on_ranks
from postgrad.distributed.world import World
from postgrad.errors import CheckpointError, DiskError, PostgradError, ResumeError
from postgrad.storage.atomic import STAGING, disk_error, remove_folder, remove_staging, verify
from postgrad.training.checkpoint_state import CheckpointOwner, read_progress

_ALONE = World(torch.device("cpu"))
_Stamp = tuple[tuple[str, int, int, int], ...]
"""Name, size, time of change and inode of each file of a folder."""


class Checkpoints:
    """The folder of a run's checkpoints, `step-00000100` and so on."""

    def __init__(
        self,
        folder: Path,
        owner: CheckpointOwner | None = None,
        *,
        keep: int | None = None,
        max_pinned: int = 0,
        warn: Callable[[str], None] = lambda message: None,
    ) -> None:
        """`owner`: the run that trains here (None: only read); `keep`: how many of the newest to keep (None: all).

        `max_pinned`: how many others `save` may pin. `warn` gets a message for each damaged or foreign entry.
        """
        self.folder, self.owner, self.keep, self.max_pinned, self.warn = folder, owner, keep, max_pinned, warn
        # What this process has verified or found damaged is not hashed again unless its files change.
        self._checked: dict[Path, tuple[_Stamp, bool]] = {}

    def step_folder(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.folder / f"step-{step:08d}"

    def list_folders(self) -> list[Path]:
        """Every folder with the name of a checkpoint, oldest first."""
        steps = (_step_of(path) for path in _entries(self.folder) if path.is_dir())
        return [self.step_folder(step) for step in sorted(step for step in steps if step is not None)]

    def find_newest(self) -> Path | None:
        """The newest complete checkpoint.

        Raises `CheckpointError` when there are checkpoints and none is complete: training never restarts silently. Raises
        `ResumeError` for a complete checkpoint of another run.
        """
        if self.owner:
            remove_staging(self.folder)
        folders = self.list_folders()
        for path in _entries(self.folder):
            if path not in folders:
                self.warn(f"{path} is not a checkpoint of this run; it is left alone")
        cause: CheckpointError | None = None
        for folder in reversed(folders):
            try:
                self.check(folder)
                return folder
            except CheckpointError as error:
                self.warn(f"{error}; falling back to the previous checkpoint")
                cause = error
        if cause:
            raise CheckpointError(
                "all checkpoints of this run are damaged",
                where=str(self.folder),
                hint="remove the checkpoints folder to train this stage from its start",
            ) from cause
        return None

    def check(self, folder: Path) -> None:
        """Verify a checkpoint. Raises `CheckpointError` when it is damaged, `ResumeError` when another run wrote it."""
        stamp = _stamp(folder)
        if self._checked.get(folder) == (stamp, True):
            return
        self._checked[folder] = (stamp, False)
        verify(folder)
        progress = read_progress(folder)
        if self.owner and (changes := self.owner.differences(progress)):
            raise ResumeError(
                f"another run wrote this checkpoint: {'; '.join(changes)}",
                where=str(folder),
                expected="checkpoints of this run only",
                hint=f"move it out of this folder; a stage can start from it with `model: {folder.name}` and its new path",
            )
        if self.step_folder(progress.step) != folder:
            raise CheckpointError(f"the checkpoint is that of step {progress.step}", where=str(folder))
        self._checked[folder] = (stamp, True)

    def save(
        self,
        step: int,
        write: Callable[[Path], Collection[str]],
        pinned_step: int | None = None,
        world: World = _ALONE,
    ) -> Path:
        """Publish a checkpoint, then remove the oldest ones, except that of `pinned_step`. Collective.

        `write` writes this rank's files, and returns their names. A complete checkpoint of this step is not written again.
        """
        target = self.step_folder(step)
        if not world.from_first(lambda: self._make_way(target)):
            publish_on_ranks(target, write, world)  # verifies what it has written
            self._checked[target] = (_stamp(target), True)
        world.from_first(lambda: self._remove_old(step, pinned_step))
        return target

    def _make_way(self, target: Path) -> bool:
        """Whether there is a complete checkpoint at `target`; anything else there makes way for one."""
        if is_complete := self._is_complete(target):
            return is_complete
        self._clear(target)
        return False

    def _remove_old(self, step: int, pinned_step: int | None) -> None:
        """Remove this run's checkpoints behind the newest `keep` complete ones, of which that of `step` is the first."""
        complete = 0
        for folder in reversed([f for f in self.list_folders() if f <= self.step_folder(step)]):
            if self.keep is None or complete < self.keep:
                complete += self._is_complete(folder)
            elif not (pinned_step is not None and folder == self.step_folder(pinned_step)) and self._is_own(folder):
                remove_folder(folder)

    def _is_complete(self, folder: Path) -> bool:
        """Whether a folder is a complete checkpoint of this run; a warning names each one that is not, once."""
        if not os.path.lexists(folder):
            return False
        known = self._checked.get(folder)
        if known and known[0] == _stamp(folder):
            return known[1]
        try:
            self.check(folder)
        except PostgradError as error:
            self.warn(f"{error}; it does not count as a checkpoint")
            return False
        return True

    def _is_own(self, folder: Path) -> bool:
        """Whether this run wrote a folder, complete or not."""
        try:
            progress = read_progress(folder)
        except PostgradError:
            return False
        is_own = self.owner is None or not self.owner.differences(progress)
        return is_own and self.step_folder(progress.step) == folder and not folder.is_symlink()

    def _clear(self, target: Path) -> None:
        """Make way for a checkpoint: remove this run's damaged one; rename anything else."""
        if not os.path.lexists(target):
            return
        if self._is_own(target):
            remove_folder(target)
            return
        names = (target.with_name(f"{target.name}.aside-{n}") for n in itertools.count(1))
        aside = next(path for path in names if not os.path.lexists(path))
        try:
            os.rename(target, aside)
        except OSError as error:
            raise disk_error(error, target) from error
        self.warn(f"{target} is not a checkpoint of this run; it is renamed to {aside.name}")

    def require_room(self, needed: int, total: int) -> None:
        """Raise `DiskError` when the disk has no room for the checkpoints of the run: `total`, of `needed` bytes each."""
        existing = next(p for p in (self.folder, *self.folder.parents) if p.exists())
        free = shutil.disk_usage(existing).free
        # A new checkpoint is published before the oldest is removed: one more than `keep` exists for a moment.
        most = total if self.keep is None else min(total, self.keep + self.max_pinned + 1)
        room = needed * max(1, most - len(self.list_folders()))
        if free < room:
            raise DiskError(
                f"the checkpoints of this run need {room:,} bytes, only {free:,} are free",
                where=str(self.folder),
                hint="free disk space, set `save.keep: 1`, or put `output` on another disk",
            )


def _entries(folder: Path) -> Iterator[Path]:
    """What is in a folder of checkpoints, unfinished writes aside."""
    return (path for path in sorted(folder.glob("*")) if not path.name.startswith(STAGING))


def _step_of(path: Path) -> int | None:
    """The step of a checkpoint's folder; None for another name."""
    digits = path.name.removeprefix("step-")
    if not (digits.isascii() and digits.isdecimal()):
        return None
    return int(digits) if path.name == f"step-{int(digits):08d}" else None


def _stamp(folder: Path) -> _Stamp:
    """What `os.stat` says of each file of a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stats = [(str(path.relative_to(folder)), path.stat()) for path in files]
    return tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats)
