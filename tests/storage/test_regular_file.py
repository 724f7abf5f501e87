"""Pipes, sockets and devices are refused at once wherever a path is opened."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

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
