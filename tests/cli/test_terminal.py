"""Text of models, files and libraries cannot control the terminal, in whatever way a verb shows it."""

from __future__ import annotations

import ast
import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from postgrad.cli import options, progress, terminal
from postgrad.cli.terminal import guard_streams, make_console, raw_stream
from postgrad.run.events import InfoMessage, PhaseStarted, WarningMessage
from tests.cli.test_main import Command, postgrad  # noqa: F401 (a fixture)
from tests.conftest import write_jsonl
from tests.test_foreign_text import is_harmless

HOSTILE = "\x1b[2J\x1b]0;title\x07 words\r\u202e"
CLI = Path(terminal.__file__).parent


class Screen(io.StringIO):
    """A terminal that keeps what it is told."""

    def isatty(self) -> bool:
        return True


def test_streams_are_guarded_inside_and_as_before_outside(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with guard_streams(), guard_streams():
        assert (raw_stream(sys.stdout), raw_stream(sys.stderr)) == before
        print(HOSTILE, "tab\tand line")
        print(HOSTILE, "https://me:hunter22@host/", file=sys.stderr)
        logging.StreamHandler().emit(logging.LogRecord("x", 30, "x", 1, HOSTILE, (), None))
        sys.stderr.writelines([HOSTILE, "\n"])
        sys.stderr.write("\r50% of a bar")
        sys.stderr.write("\n\x1b[A")
        assert sys.stdout.isatty() is before[0].isatty()
    assert (sys.stdout, sys.stderr) == before
    out, err = capsys.readouterr()
    assert is_harmless(out) and "words" in out and "tab\tand line" in out
    assert is_harmless(err.replace("\r50%", "").replace("\n\x1b[A", "")) and "hunter22" not in err
    assert err.count("words") == 3 and "\r50% of a bar\n\x1b[A" in err


@pytest.mark.parametrize("screen", ["plain", "bar", "json"])
def test_every_screen_is_harmless(monkeypatch: pytest.MonkeyPatch, screen: str) -> None:
    stream = Screen() if screen == "bar" else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")  # nothing of rich's own
    with guard_streams():
        shown = progress.make_screen(screen == "json")
        for event in (InfoMessage(HOSTILE + "[/b]"), WarningMessage(HOSTILE), PhaseStarted(HOSTILE + "[/b]")):
            shown.show(event)
        shown.show_tokenizing(HOSTILE, 1, 2)
        shown.close()
    assert "words" in stream.getvalue()
    assert is_harmless(stream.getvalue())


def test_rich_draws_with_its_own_codes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := Screen())
    console = make_console(stderr=True)
    with console.status(HOSTILE):
        console.print(HOSTILE, "[red]markup[/red]", style="bold")
    assert HOSTILE not in stream.getvalue() and "\x1b[2J" not in stream.getvalue() and "\x07" not in stream.getvalue()
    assert "[red]markup[/red]" in stream.getvalue()


def calls(file: Path) -> set[str]:
    """What a module calls, and the names that it imports."""
    tree = ast.parse(file.read_text())
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    return found | {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def test_nothing_else_writes_to_the_terminal() -> None:
    """Only `terminal` makes a console, and nothing prints but the command line."""
    for file in CLI.parent.rglob("*.py"):
        found = calls(file)
        assert not {"sys.stdout.write", "sys.stderr.write", "os.write", "click.echo", "typer.echo"} & found, file
        if file.parent != CLI:
            assert "print" not in found, file
            assert not {"Console", "rich.print"} & found or file.name == "preview_text.py", file
        elif file.name != "terminal.py":
            assert "Console" not in found, file


def test_names_of_columns_and_texts_are_harmless(postgrad: Command, base: Path, tmp_path: Path) -> None:  # noqa: F811
    """In errors, in the preview of rows, in results and in what a model continues."""
    (tmp_path / "column.jsonl").write_text(json.dumps({HOSTILE: "x"}) + "\n")
    (tmp_path / f"{HOSTILE}.jsonl").write_text(json.dumps({HOSTILE: "x"}) + "\n")
    texts = write_jsonl(tmp_path / "text.jsonl", [f"{HOSTILE} number {n}" for n in range(60)])
    shown = [
        postgrad("eval", base / "base", tmp_path / "column.jsonl"),
        postgrad("eval", base / "base", tmp_path / f"{HOSTILE}.jsonl"),
        postgrad("eval", tmp_path / HOSTILE, texts),
        postgrad("init", "stage", "--data", texts, "--model", base / "base"),
        postgrad("check", "stage.yaml", "--show", "1"),
        postgrad("generate", base / "base", "--prompt", HOSTILE, "--max-new-tokens", "4"),
    ]
    assert [each.code for each in shown] == [2, 2, 2, 0, 0, 0]
    for each in shown:
        assert "words" in each.out + each.err
        assert is_harmless(each.out) and is_harmless(each.err), each
    exact = postgrad("generate", base / "base", "--prompt", HOSTILE, "--max-new-tokens", "4", "--json")
    assert exact.json["prompt"] == HOSTILE  # JSON has the exact text, escaped


def test_an_unguarded_verb_would_be_noticed(
    postgrad: Command,  # noqa: F811
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mutant: streams as they are."""

    class Unguarded:
        def __enter__(self) -> None: ...
        def __exit__(self, *_: Any) -> None: ...

    monkeypatch.setattr(options, "guard_streams", Unguarded)
    done = postgrad("generate", base / "base", "--prompt", HOSTILE, "--max-new-tokens", "4")
    assert not is_harmless(done.out)
