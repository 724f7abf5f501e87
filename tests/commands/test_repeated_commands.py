"""A command that is given again: it resumes, says that it is complete, or refuses with a hint; a full disk is named."""

# ruff: noqa: F811 (a fixture that is imported is named again where it is used)

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from safetensors import SafetensorError

from postgrad.commands import synthesize as synthesis
from postgrad.commands.export import export_model
from postgrad.commands.grow import grow_vocabulary
from postgrad.commands.importance import measure_importance
from postgrad.commands.results import finish
from postgrad.commands.synthesize import (
    SynthesisRequest,
    SynthesizedText,
    finalize_output,
    is_complete,
    partial_file,
    summary_file,
    synthesize,
)
from postgrad.errors import DiskError, StageError
from postgrad.penalties import importance_file
from postgrad.storage.atomic import write_all
from tests.cli.test_main import Command, postgrad  # noqa: F401 (fixtures)
from tests.conftest import StageOf

REQUEST = SynthesisRequest(tokens=200, max_document_tokens=40, batch_size=4)
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def generated(base: Path, out: Path, request: SynthesisRequest = REQUEST) -> SynthesizedText:
    return finish(synthesize(str(base / "base"), out, request), SynthesizedText)


def test_generated_text_is_not_generated_again(
    base: Path, tmp_path: Path, postgrad: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        "synthesize",
        base / "base",
        "--out",
        "replay.jsonl",
        "--tokens",
        200,
        "--max-tokens",
        40,
        "--batch-size",
        4,
    ]
    first = postgrad(*words)
    written = (tmp_path / "replay.jsonl").read_bytes()
    monkeypatch.setattr(synthesis, "generate_until_target", lambda *_: pytest.fail("generated again"))
    again = postgrad(*words)
    assert (first.code, again.code) == (0, 0)
    assert again.out == f"this text was already complete\n{first.out}"
    assert (tmp_path / "replay.jsonl").read_bytes() == written
    out = tmp_path / "replay.jsonl"
    with pytest.raises(StageError, match=r"not written by this command(?s:.)*hint: *name another file"):
        generated(base, out, replace(REQUEST, seed=1))
    out.write_bytes(written + b"{}\n")
    with pytest.raises(StageError, match="has been changed since"):
        generated(base, out)


class Killed(BaseException):
    """The process ends here."""


def killed_finish(folder: Path, share: float, moment: int, monkeypatch: pytest.MonkeyPatch) -> Path | None:
    """Text whose finish is killed before its n-th change of a name; None when there are fewer changes."""
    folder.mkdir()
    out, lines = folder / "replay.jsonl", [json.dumps({"text": f"document {i}"}) + "\n" for i in range(4)]
    partial_file(out).write_text("".join(lines))
    state = {"options_fingerprint": "x", "size": len("".join(lines)), "documents": 4, "tokens": 9, "ended": 0}
    synthesis._state_file(out).write_text(json.dumps(state))
    count = 0

    def counting(change: Callable[..., object], *args: object, **options: object) -> object:
        nonlocal count
        count += 1
        if count == moment:
            raise Killed
        return change(*args, **options)

    with monkeypatch.context() as patched:
        for owner, name in ((os, "replace"), (Path, "rename"), (Path, "unlink")):
            change = getattr(owner, name)
            wrapped = partial(counting, change)
            patched.setattr(owner, name, (lambda w: lambda *a, **k: w(*a, **k))(wrapped))
        try:
            finish_text(out, share)
        except Killed:
            return out
    return None


def finish_text(out: Path, share: float) -> None:
    """The end of the command, as `synthesize` and `synthesize_chat` do it."""
    if not is_complete(out, "x", diverse_share=share):
        finalize_output(out, (lambda lines: lines[:2]) if share < 1 else None, diverse_share=share)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_killed_at_its_end_the_same_command_finishes_it(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moment = 1
    while out := killed_finish(tmp_path / f"{moment}", share, moment, monkeypatch):
        finish_text(out, share)
        assert len(out.read_text().splitlines()) == (4 if share == 1 else 2)
        assert is_complete(out, "x", diverse_share=share)
        assert sorted(path.name for path in out.parent.iterdir() if not path.name.startswith(".")) == [
            "replay.jsonl", "replay.jsonl.made.json"
        ]  # fmt: skip
        with pytest.raises(StageError, match="already exists"):
            is_complete(out, "x", diverse_share=0.25)
        moment += 1
    assert moment > 3


def test_a_full_disk_under_generated_text_is_named_and_loses_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generated(base, tmp_path / "whole.jsonl")
    count = 0

    def fills_up(file: io.FileIO, data: bytes) -> None:
        nonlocal count
        count += 1
        if count == 2:
            file.write(data[: len(data) // 2])
            raise FULL
        write_all(file, data)

    monkeypatch.setattr(synthesis, "write_all", fills_up)
    with pytest.raises(DiskError, match=r"out\.jsonl\.part: the disk is full"):
        generated(base, tmp_path / "out.jsonl")
    monkeypatch.undo()
    generated(base, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert summary_file(tmp_path / "out.jsonl").read_bytes() == summary_file(tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("error", [FULL, SafetensorError("I/O error: No space left on device (os error 28)")], ids=repr)
def test_a_full_disk_under_an_importance_file_is_named(
    error: Exception, base: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    def measured(**options: bool) -> None:
        measure_importance(
            str(base / "base"), [str(base / "old.jsonl")], out=out, tokens=200, context=32, cache=cache, **options
        )

    out = tmp_path / "importance.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr(importance_file, "save_file", fails)
        with pytest.raises(DiskError, match=r"importance\.safetensors: the disk is full"):
            measured()
    assert list(tmp_path.iterdir()) == []
    measured()
    with pytest.raises(StageError, match=r"already exists(?s:.)*--force"):
        measured()
    measured(force=True)


def test_what_exists_is_not_overwritten(base: Path, tmp_path: Path, stage_of: StageOf) -> None:
    model = str(base / "base")
    for write in (
        lambda: export_model(model, tmp_path, "auto", None, [], 1.0, "cat", None),
        lambda: grow_vocabulary(model, [str(base / "new.jsonl")], tmp_path, tokens=5),
    ):
        with pytest.raises(StageError, match=r"already exists(?s:.)*hint: *name a folder that does not exist"):
            write()
