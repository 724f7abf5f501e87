"""The other processes of a run: an error of one is told to all, and one that hangs or was killed is named.

While a run goes on, a thread of every rank writes to the store of the process group, once a second, where its rank is. When a
collective call fails, the rank reads what the others wrote: the error of another rank, or which one is silent or elsewhere.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from postgrad.errors import DistributedError, PostgradError

_PERIOD_SECONDS, _GRACE_SECONDS = 1.0, 3.0
_FAILURE = "failure"
_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Heartbeat:
    """Where a rank is: the last event of its run, and the line of its main thread."""

    count: int
    activity: str
    line: str
    is_waiting: bool
    """Whether it waits for other ranks."""


@dataclass(frozen=True)
class _Failure:
    """The first error of a run."""

    rank: int
    text: str


@dataclass(frozen=True)
class _Snapshot:
    """What the store says at a moment."""

    failure: _Failure | None
    heartbeats: dict[int, Heartbeat]


class Peers:
    """This rank's connection to the others; `with` keeps its thread running."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self.activity = "starting"
        self._store, self._rank, self._size = dist.PrefixStore("postgrad", store), rank, size
        self._main_thread, self._count = threading.get_ident(), 0
        self._failure: _Failure | None = None
        self._is_over = self._is_ending = False
        self._wake = threading.Event()
        self._questions: queue.SimpleQueue[queue.SimpleQueue[_Snapshot]] = queue.SimpleQueue()
        # Only this thread uses the store, whose calls block when the process that holds it is stopped.
        self._thread = threading.Thread(target=self._exchange, name="postgrad-peers", daemon=True)

    def __enter__(self) -> Peers:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self._wake.set()
        self._thread.join(_GRACE_SECONDS)

    def explain(self, error: BaseException) -> BaseException:
        """The error to raise for `error`: itself, which the others are told, or that of the rank that has caused it."""
        self._is_ending = True
        if isinstance(error, PostgradError) and error.reported_by is not None:
            return error  # all ranks know it
        if not _is_communication(error):
            reason = str(error) if isinstance(error, PostgradError) else _summary(error)
            first = self._tell(reason)
            if isinstance(error, PostgradError) and first and first.text == reason:
                error.reported_by = first.rank
            return error
        return self._find_cause(error)

    def _find_cause(self, error: BaseException) -> DistributedError:
        before, end = self._look(), time.monotonic() + _GRACE_SECONDS
        while (now := self._look()) and now.failure is None and time.monotonic() < end:
            time.sleep(0.1)
        if now and now.failure:
            cause = DistributedError(f"rank {now.failure.rank} ended the run: {now.failure.text}")
            cause.reported_by = now.failure.rank
            return cause
        frames = [(frame.f_code.co_filename, number) for frame, number in traceback.walk_tb(error.__traceback__)]
        place = f"{self.activity}, {_line(frames[::-1])}"
        if now is None or before is None:
            rank, problem = 0, "the process that holds the store of the group (torchrun, or rank 0) does not respond"
        else:
            rank, problem = self._suspect(before.heartbeats, now.heartbeats)
        cause = DistributedError(
            f"{problem}; rank {self._rank} waited at {place}",
            where=f"rank {rank}",
            hint="the same command resumes from the last checkpoint; compute.collective_timeout_seconds is how long ranks wait",
        )
        if first := self._tell(str(cause)):
            cause.reported_by = first.rank
        return cause

    def _suspect(self, before: dict[int, Heartbeat], now: dict[int, Heartbeat]) -> tuple[int, str]:
        """The rank that the others wait for, and what is known of it."""
        others = [rank for rank in range(self._size) if rank != self._rank]
        for rank in others:
            if rank not in now or (rank in before and before[rank].count == now[rank].count):
                place = f"; last seen at {now[rank].activity}, {now[rank].line}" if rank in now else ""
                return rank, f"it was killed or has stopped{place}"
        for rank in others:
            if not now[rank].is_waiting:
                return rank, f"it hangs at {now[rank].activity}, {now[rank].line}"
        places = "; ".join(f"rank {rank} at {now[rank].activity}, {now[rank].line}" for rank in others)
        return others[0], f"no rank is known to hang ({places})"

    def _tell(self, reason: str) -> _Failure | None:
        """Write why this rank ends, unless another one was first; the first failure of all ranks."""
        self._failure = _Failure(self._rank, reason)
        now = self._look()
        return now.failure if now else None

    def _look(self) -> _Snapshot | None:
        """What the store says now; None when it does not respond."""
        answer: queue.SimpleQueue[_Snapshot] = queue.SimpleQueue()
        self._questions.put(answer)
        self._wake.set()
        with suppress(queue.Empty):
            return answer.get(timeout=_GRACE_SECONDS)
        return None

    def _exchange(self) -> None:
        with suppress(RuntimeError):  # the store has ended
            while not self._is_over:
                self._write()
                with suppress(queue.Empty):
                    while answer := self._questions.get_nowait():
                        self._write()
                        answer.put(self._read())
                self._wake.wait(_PERIOD_SECONDS)
                self._wake.clear()

    def _write(self) -> None:
        self._count += 1
        stack = traceback.walk_stack(sys._current_frames().get(self._main_thread))
        frames = [(frame.f_code.co_filename, number) for frame, number in stack]
        is_waiting = self._is_ending or any("/torch/distributed/" in file for file, _ in frames)
        beat = Heartbeat(self._count, self.activity, _line(frames), is_waiting)
        self._store.set(str(self._rank), json.dumps(asdict(beat)))
        if self._failure:
            self._store.compare_set(_FAILURE, "", json.dumps(asdict(self._failure)))

    def _read(self) -> _Snapshot:
        failure = _Failure(**json.loads(self._store.get(_FAILURE))) if self._store.check([_FAILURE]) else None
        known = [rank for rank in range(self._size) if self._store.check([str(rank)])]
        return _Snapshot(failure, {rank: Heartbeat(**json.loads(self._store.get(str(rank)))) for rank in known})


def _is_communication(error: BaseException) -> bool:
    """Whether an error comes from a collective call, so that another rank may have caused it.

    So does one of this package that such an error has become, as in the trial of a sharded model's architecture.
    """
    if isinstance(error, PostgradError) and error.__cause__ is not None:
        return _is_communication(error.__cause__)
    words = str(error).lower()
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in words for word in ("gloo", "nccl", "connection closed"))
    )


def _line(frames: Sequence[tuple[str, int]]) -> str:
    """The line of this package, below its collective calls, that a stack is at; `frames`: innermost first."""
    for file, number in frames:
        path = Path(file)
        if path.is_relative_to(_PACKAGE) and path.parent != _PACKAGE / "distributed":
            return f"{path.relative_to(_PACKAGE)}:{number}"
    return "no line of this package"


def _summary(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip()
