from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from postgrad.errors import DataError, PostgradError
from postgrad.storage import read_json as module
from postgrad.storage.read_json import parse_json, read_json


@dataclass(frozen=True)
class Size:
    """A record of the tests."""

    name: str
    shape: tuple[int, ...]
    rate: float = 1.0


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "broken JSON"),
    "cut off": (b'{"name": "a", "sha', "broken JSON"),
    "another type": (b"[1]", "size"),
    "a missing field": (b'{"name": "a"}', "shape: field required"),
    "a number as text": (b'{"name": "a", "shape": ["1"]}', "shape.0: input should be a valid integer"),
    "text as a number": (b'{"name": 1, "shape": [1]}', "name: input should be a valid string"),
    "a repeated key": (b'{"name": "a", "shape": [1], "name": "b"}', "'name' is repeated"),
    "a repeated key further down": (b'{"name": "a", "shape": [1], "more": {"x": 1, "x": 2}}', "'x' is repeated"),
    "nested": (b'{"name": "a", "shape": [1], "more": ' + b"[" * 9999 + b"]" * 9999 + b"}", "nested too deeply"),
    "thousands of digits": (b'{"name": "a", "shape": [' + b"1" * 9999 + b"]}", "out of range"),
    "half a character": (b'{"name": "\\ud800", "shape": [1]}', "broken JSON"),
    "bytes": (bytes(range(256)), "broken JSON"),
}


def test_a_valid_file(tmp_path: Path) -> None:
    path = tmp_path / "size.json"
    path.write_text('{"name": "a", "shape": [1, 2], "rate": 2, "unknown": null}')
    assert read_json(path, Size) == Size("a", (1, 2), 2.0)
    assert read_json(path, dict[str, Any])["shape"] == [1, 2]


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_an_error_that_names_it(name: str, tmp_path: Path) -> None:
    data, message = BROKEN[name]
    path = tmp_path / "size.json"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        read_json(path, Size, error=DataError, hint="make it again")
    assert str(path) in caught.value.where
    assert caught.value.hint == "make it again"


def test_what_is_no_regular_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_text(" " * 100 + "{}")
    monkeypatch.setattr(module, "MAX_BYTES", 50)
    for name, message in {
        "pipe": "not a regular file",
        ".": "Is a directory",
        "large": "more than 50",
        "x": "no such file",
    }.items():
        with pytest.raises(PostgradError, match=message) as caught:
            read_json(tmp_path / name, Size)
        assert caught.value.where == str(tmp_path / name)


def test_a_line_of_a_file() -> None:
    with pytest.raises(PostgradError, match=r"metrics\.jsonl:3: broken JSON"):
        parse_json(b'{"a": 1', dict[str, Any], where="metrics.jsonl:3")


def test_without_the_guard_a_repeated_key_hides_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_refuse_repeated_keys", dict)
    assert parse_json(BROKEN["a repeated key"][0], Size, where="").name == "b"
