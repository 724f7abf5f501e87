"""Pipes, sockets and devices are refused at once wherever a path is opened."""

from __future__ import annotations

import ast
import os
import socket
from pathlib import Path

import pytest

from postgrad.storage import regular_file
from postgrad.storage.regular_file import find_special_file, open_regular_file, read_regular_file


def test_only_regular_files_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").write_bytes(b"words")
    (tmp_path / "link").symlink_to(tmp_path / "text")
    (tmp_path / "missing").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    assert find_special_file(tmp_path) is None
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to a pipe").symlink_to(tmp_path / "pipe")
    assert find_special_file(tmp_path) == tmp_path / "pipe"
    for name in ("text", "link"):
        with open_regular_file(tmp_path / name) as file:
            assert file.read() == b"words"
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # the name of a socket is short
        server.bind("socket")
        for path, kind in (
            (tmp_path / "pipe", "a named pipe"),
            (tmp_path / "to a pipe", "a named pipe"),
            (tmp_path / "socket", "a socket"),
            (Path("/dev/zero"), "a device"),
            (tmp_path / "folder", "Is a directory"),
            (tmp_path / "missing", "No such file"),
        ):
            with pytest.raises(OSError, match=kind):
                open_regular_file(path)


def test_a_file_above_the_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"words")
    assert read_regular_file(tmp_path / "text", 5) == b"words"
    with pytest.raises(OSError, match="more than 4 bytes"):
        read_regular_file(tmp_path / "text", 4)


def test_what_is_appended_to_is_a_regular_file(tmp_path: Path) -> None:
    for text in (b"one", b"two"):
        with open_regular_file(tmp_path / "text", append=True) as file:
            file.write(text)
    assert (tmp_path / "text").read_bytes() == b"onetwo"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="a named pipe"):
        open_regular_file(tmp_path / "pipe", append=True)


OPENED_ELSEWHERE = {
    "storage/atomic.py": "the sha256 of a file whose status was checked, or that was just written",
    "storage/verification.py": "files whose status was checked",
    "data/tokens/store.py": "shards that the same call has written",
    "data/tokens/train_vocabulary.py": "a file of the cache that was read before",
    "models/pretrained.py": "a folder without special files, and one that was just written",
    "models/task_head_model.py": "a folder that was just written",
    "studies/run_study.py": "files that `list_files` and `load_stage` have refused to be pipes",
    "commands/synthesize.py": "a file that this command has begun",
    "commands/synthesize_from.py": "files that this command has written",
    "cli/model_verbs.py": "a file that this command has written",
    "cli/demo.py": "a file that this command has written",
    "commands/builtin_corpus.py": "Python's own library",
    "config/editor_schema.py": "the schema of the package",
    "hardware/machine.py": "/proc",
}
"""Where a path is opened for reading without `open_regular_file`, and why it cannot be a pipe."""


def openings(source: str) -> list[int]:
    """The lines that open a path for reading with anything but the functions of `regular_file`."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Attribute(attr="read_text" | "read_bytes", value=value)):
                if not (isinstance(value, ast.Call) and "joinpath" in ast.unparse(value)):  # of the package
                    lines.append(node.lineno)
            case ast.Call(func=ast.Attribute(attr="open") | ast.Name(id="open"), args=args):
                modes = [a.value for a in args if isinstance(a, ast.Constant)]
                owner = ast.unparse(node.func)
                if owner not in ("os.open", "TokenStore.open") and not any(set(str(m)) & set("wax") for m in modes):
                    lines.append(node.lineno)
    return lines


def test_paths_are_opened_in_one_place() -> None:
    root = Path(regular_file.__file__).parents[1]
    found = {str(path.relative_to(root)) for path in root.rglob("*.py") if openings(path.read_text())}
    assert found - {"storage/regular_file.py"} <= OPENED_ELSEWHERE.keys()
    assert openings("path.read_text()\nopen(x)\npath.open('rb')\nos.open(x)\npath.open('w')") == [1, 2, 3]
