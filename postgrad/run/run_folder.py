"""Ownership of a run folder (one process at a time, one stage for good), and interruption of a run."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from postgrad.config.renamed_keys import upgrade_stage
from postgrad.distributed.world import World
from postgrad.errors import BusyError, ResumeError
from postgrad.lineage.record import LOCK, PLAN, STAGE
from postgrad.lineage.saved_plan import SavedPlan, read_plan
from postgrad.plan.plan import Plan
from postgrad.storage.atomic import STAGING, disk_error
from postgrad.storage.fingerprint import differences
from postgrad.storage.regular_file import open_regular_file

MODEL = "model"
"""Folder of the published model."""
REPORT = "report.html"
_CHANGEABLE = (
    "output", "save.every", "save.keep", "optimizer.max_skipped_steps", "batch.micro_batch_size",
    "compute.activation_checkpointing", "compute.collective_timeout_seconds", "evaluation.drift_tokens",
    "evaluation.relearning_steps", "parallel", "track",
)  # fmt: skip
"""Keys that may differ on resume: they decide no weight, or (micro-batches, recomputed activations) its rounding only."""


@contextmanager
def lock_run_folder(run_folder: Path, world: World) -> Iterator[None]:
    """Lock the run folder for this process group. Raises `BusyError` when another process has the lock."""
    if not world.is_main:
        yield
        return
    created = [p for p in (run_folder / LOCK, run_folder, *run_folder.parents) if not p.exists()]
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        file = _lock(run_folder / LOCK)
    except OSError as error:
        raise disk_error(error, run_folder) from error
    with file:
        try:
            yield
        except BaseException:
            if not (run_folder / PLAN).exists():  # refused: nothing of it was begun
                _remove_empty(created)
            raise


def _lock(path: Path) -> IO[bytes]:
    """The open lock file. Raises `BusyError` when another process holds the lock."""
    while True:
        file = open_regular_file(path, append=True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read(1000).decode(errors="replace").strip() or "unknown"
            file.close()
            raise BusyError(
                f"another process ({owner}) is using this run folder",
                where=str(path.parent),
                hint="wait for it to end, or set another `output`",
            ) from None
        # A process whose command was refused may have removed the file between the two calls.
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            break
        file.close()
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}".encode())
    file.flush()
    return file


def _remove_empty(paths: Sequence[Path]) -> None:
    """Remove the lock and the empty folders above it, innermost first."""
    for path in paths:
        with suppress(OSError):
            path.rmdir() if path.is_dir() else path.unlink()


def claim_run_folder(run_folder: Path, plan: Plan, fingerprints: dict[str, Any]) -> SavedPlan | None:
    """The plan.json of this run, or None for a new folder. Raises `ResumeError` when the folder belongs to another run."""
    if not (run_folder / PLAN).exists():
        foreign = [
            p.name for p in run_folder.iterdir() if p.name not in (LOCK, STAGE) and not p.name.startswith(STAGING)
        ]
        if foreign:
            raise ResumeError(
                f"the folder is neither empty nor a run folder (it contains {foreign[0]})",
                where=str(run_folder),
                hint="set another `output`, or empty the folder",
            )
        return None
    saved_plan = read_plan(run_folder)
    if saved_plan.fingerprints != fingerprints:
        now = json.loads(json.dumps(plan.stage.model_dump(mode="json")))
        changes = differences(upgrade_stage(saved_plan.stage), now) + [
            line for line in differences(saved_plan.fingerprints, fingerprints) if not line.startswith("stage:")
        ]
        listed = "\n    ".join(line for line in changes if not line.startswith(_CHANGEABLE))
        if listed or not changes:
            raise ResumeError(
                f"this folder contains a run of another stage; the differences are:\n    {listed}",
                where=str(run_folder),
                hint="undo the changes to resume, or give the new stage another `name` or `output`",
            )
    return saved_plan


def _echo_seconds() -> float:
    """How long after a signal another one may be an echo of it."""
    return 2.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0


class Interrupt:
    """Ctrl-C, SIGTERM and SIGHUP: the first one makes the run save and stop, the second one ends it at once.

    A signal that is ignored stays ignored (`nohup` does so with SIGHUP). `torchrun` forwards the signal that its processes have
    already received with the whole group; such an echo is not the second one.
    """

    def __init__(self) -> None:
        self.requested = False
        self._requested_at = 0.0
        self._previous_handlers: dict[int, Any] = {}
        self._has_ended = False

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_IGN:
                continue
            try:
                self._previous_handlers[number] = signal.signal(number, self._handle_signal)
            except ValueError:  # not the main thread, which alone may set handlers
                return self
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the handlers, unless a later run has set its own: an iterator that is left may end after that."""
        self._has_ended = True
        for number in self._previous_handlers:
            owner = getattr(signal.getsignal(number), "__self__", None)
            if owner is self or not isinstance(owner, Interrupt):
                signal.signal(number, self._find_previous(number))

    def _find_previous(self, number: int) -> Any:
        """The handler before this one, of a run that has not ended."""
        handler = self._previous_handlers[number]
        owner = getattr(handler, "__self__", None)
        return owner._find_previous(number) if isinstance(owner, Interrupt) and owner._has_ended else handler

    def _handle_signal(self, number: int, _frame: object) -> None:
        if self.requested:
            if time.monotonic() - self._requested_at < _echo_seconds():
                return
            signal.signal(number, signal.SIG_DFL)  # a third one needs no Python
            raise KeyboardInterrupt
        self.requested, self._requested_at = True, time.monotonic()
        older = getattr(self._previous_handlers.get(number), "__self__", None)
        if isinstance(older, Interrupt):  # a study, which runs several stages, stops too
            older.requested = True

    def requested_on_any_rank(self, world: World) -> bool:
        """Whether any rank was interrupted. Collective."""
        return world.any_rank(self.requested)
