"""Output that nobody reads and signals: a run goes on or saves, says which, and never shows a traceback."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from postgrad.cli import main, progress
from postgrad.cli.streams import LastingFile, stop_on_signals
from postgrad.commands import train
from postgrad.distributed.world import World
from postgrad.lineage.record import read_record
from postgrad.run.events import RunFinished, RunStopped, StepCompleted
from postgrad.run.run import run_stage
from postgrad.run.run_folder import Interrupt
from tests.cli.test_main import Command, StageFile, postgrad, stage_file  # noqa: F401 (fixtures)
from tests.conftest import StageOf
from tests.laws.test_kill_and_resume import in_child
from tests.run.test_run import events_of, plan_of, trace

# ruff: noqa: F811 (fixtures that are imported are named again where they are used)


def broken_pipe(*_: object) -> int:
    """The writing end of a pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full_disk(folder: Path) -> int:
    """A file that cannot grow: a stand-in for a full disk."""
    handle = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 22, resource.RLIM_INFINITY))
    os.lseek(handle, 1 << 22, os.SEEK_SET)
    return handle


def run_command(
    words: list[str], *, out: Callable[[Path], int] | None, err: Callable[[Path], int] | None, folder: Path
) -> int:
    """The exit code of a command in a forked process with these standard streams; the rest of them goes to files."""

    def work() -> None:
        for number, (make, name) in enumerate(((out, "out.txt"), (err, "err.txt")), 1):
            os.dup2(make(folder) if make else os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        sys.argv = ["postgrad", *words]
        try:
            main.main()
        except SystemExit as ended:
            os._exit(int(ended.code or 0))

    return in_child(work)


@pytest.mark.parametrize("make", [broken_pipe, full_disk])
def test_a_run_goes_on_when_nobody_reads_its_log(
    make: Callable[[Path], int], stage_file: StageFile, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`postgrad train stage.yaml 2>&1 | head -1`, or a log on a full disk."""
    monkeypatch.setenv("POSTGRAD_CACHE", str(cache))
    file = str(stage_file())
    out = make if make is broken_pipe else None
    assert run_command(["train", file], out=out, err=make, folder=tmp_path) == 0
    assert read_record(tmp_path / "run").status == "finished"
    # The mutant: streams as Python makes them.
    monkeypatch.setattr(main, "lasting_streams", lambda: nullcontext(lambda: None))
    assert run_command(["train", file, f"output={tmp_path / 'mutant'}"], out=out, err=make, folder=tmp_path) != 0
    assert not (tmp_path / "mutant" / "record.json").exists()


def test_a_result_that_cannot_be_written_is_an_error(stage_file: StageFile, tmp_path: Path) -> None:
    code = run_command(["check", str(stage_file())], out=full_disk, err=None, folder=tmp_path)
    assert code == 1
    assert "error: standard output: File too large" in (tmp_path / "err.txt").read_text()


def test_what_follows_an_error_is_dropped(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    file = LastingFile(writer, "w")
    assert file.write(b"one") == 3 and file.error is None
    os.close(reader)
    assert file.write(b"two") == file.write(b"six") == 3
    assert isinstance(file.error, BrokenPipeError)
    file.close()


# -- several processes -------------------------------------------------------------------------------------------------


def test_an_error_of_planning_is_printed_by_one_rank(
    postgrad: Command, stage_file: StageFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks plan before they form a group. `torchrun` ends the others once the first one has failed."""

    def end_by_signal(_: float) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def error_of(rank: int, wait: Callable[[float], None] = lambda _: pytest.fail("the first rank waits")) -> str:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setattr(main.time, "sleep", wait)
        done = postgrad("train", stage_file(tokens=-1))
        assert done.code == 2
        return done.err

    assert "tokens" in error_of(0)
    assert error_of(1, end_by_signal) == ""
    assert error_of(1, lambda _: None) == error_of(0)  # its own error: the first rank goes on
    monkeypatch.setattr(main, "_is_reported_here", lambda error: True)  # the mutant
    assert "tokens" in error_of(1)


# -- signals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_text_is_tokenised_stops_and_keeps_what_is_done(
    number: signal.Signals, postgrad: Command, stage_file: StageFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def signalled(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(10)

    monkeypatch.setattr(train, "make_plan", signalled)
    done = postgrad("train", stage_file())
    assert done.code == 3 and "the same command resumes; finished parts are kept" in done.err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_in_the_tokeniser_keeps_the_finished_shards(
    postgrad: Command, stage_file: StageFile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from postgrad.data.tokens import batches, tokenize

    monkeypatch.setenv("POSTGRAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(batches, "SHARD_CHARACTERS", 2000)
    publish, published = tokenize.publish_shard, list[int]()

    def interrupted(building: Path, number: int, *rest: Any) -> Any:
        if len(published) == 2:
            published.append(-1)
            os.kill(os.getpid(), signal.SIGTERM)
        published.append(number)
        return publish(building, number, *rest)

    monkeypatch.setattr(tokenize, "publish_shard", interrupted)
    assert postgrad("check", stage_file()).code == 3
    assert published[:3] == [0, 1, -1]
    (building,) = (tmp_path / "cache" / "building").iterdir()
    assert {path.name for path in building.iterdir()} == {"shard-00000", "shard-00001"}
    published.clear()
    published += [-1, -1, -1]
    assert postgrad("check", stage_file()).code == 0
    assert published[3] == 2  # the first two are not made again


def test_sighup_saves_and_stops(stage_of: StageOf, cache: Path, tmp_path: Path) -> None:
    """A terminal that is closed: the run is saved, and resumes to the same bits."""
    events_of(stage_of(output=str(tmp_path / "whole"), tokens=2000), cache)
    raw = stage_of(output=str(tmp_path / "parts"), tokens=2000)
    last = None
    for last in run_stage(plan_of(raw, cache), command="test", cache=cache):
        if isinstance(last, StepCompleted) and last.report.step == 3:
            os.kill(os.getpid(), signal.SIGHUP)
    assert isinstance(last, RunStopped) and last.step == 3
    assert isinstance(events_of(raw, cache)[-1], RunFinished)
    assert trace(tmp_path / "parts") == trace(tmp_path / "whole")


@contextmanager
def handler(number: signal.Signals, handle: Any) -> Iterator[None]:
    before = signal.signal(number, handle)
    try:
        yield
    finally:
        signal.signal(number, before)


def test_an_ignored_signal_stays_ignored() -> None:
    """`nohup` ignores SIGHUP: neither the command nor the run may handle it."""
    with handler(signal.SIGHUP, signal.SIG_IGN), stop_on_signals(), Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not interrupt.requested
    with stop_on_signals(), Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGHUP)
        assert interrupt.requested


def test_the_second_signal_quits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # a third one needs no Python
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_the_echo_of_torchrun_is_not_a_second_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.requested
        interrupt._requested_at -= 10
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_outside_of_the_main_thread_nothing_is_handled() -> None:
    def work() -> None:
        with stop_on_signals(), Interrupt() as interrupt:
            assert not interrupt.requested_on_any_rank(World("cpu"))  # type: ignore[arg-type]

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_a_second_ctrl_c_ends_the_command(
    postgrad: Command, stage_file: StageFile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)

    def twice(self: progress._PlainScreen, event: object) -> None:
        if isinstance(event, StepCompleted) and event.report.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(progress._PlainScreen, "show", twice)
    done = postgrad("train", stage_file())
    assert done.code == 3 and "stopped at once; what was saved is kept" in done.err


def test_a_run_that_is_left_takes_no_handler_from_a_later_one() -> None:
    """An iterator of events that nobody finishes ends when it is collected, perhaps during the next run."""
    before = signal.getsignal(signal.SIGTERM)
    left, later = Interrupt(), Interrupt()
    left.__enter__()
    later.__enter__()
    left.__exit__()
    assert signal.getsignal(signal.SIGTERM) == later._handle_signal
    later.__exit__()
    assert signal.getsignal(signal.SIGTERM) == before
