"""Published files are read whole once, and again when they change; then blocks are sampled."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from postgrad.errors import CheckpointError, StageError
from postgrad.storage import verification
from postgrad.storage.atomic import publish_folder
from postgrad.storage.checked_files import (
    CHECKSUM,
    add_checksum,
    find_damage,
    read_cached_json,
    read_checked_json,
    write_checked_json,
)
from postgrad.storage.verification import is_intact, verify_published


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two files of several blocks, and files that are never too young."""
    monkeypatch.setattr(verification, "_BLOCK_BYTES", 64)
    monkeypatch.setattr(verification, "_CLOCK_GRAIN_NS", 0)

    def write(folder: Path) -> None:
        for name, size in (("a.bin", 1000), ("b.bin", 130), ("empty", 0)):
            (folder / name).write_bytes(random.Random(name).randbytes(size))

    return publish_folder(tmp_path / "place", write)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files that are read whole."""
    names: list[str] = []
    original = verification._read_whole

    def counted(path: Path, state: list[int]) -> object:
        names.append(path.name)
        return original(path, state)

    monkeypatch.setattr(verification, "_read_whole", counted)
    return names


def test_files_are_read_whole_once_and_when_they_change(place: Path, tmp_path: Path, reads: list[str]) -> None:
    for _ in range(3):
        verify_published(place, tmp_path / "cache")
    assert reads == ["a.bin", "b.bin", "empty"]
    os.utime(place / "b.bin")
    verify_published(place, tmp_path / "cache")
    assert reads[3:] == ["b.bin"]
    place.rename(tmp_path / "moved")
    verify_published(tmp_path / "moved", tmp_path / "cache")
    assert len(reads) == 7


def test_a_young_file_is_read_whole_again(
    place: Path, tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "_CLOCK_GRAIN_NS", 1e12)
    for _ in range(2):
        verify_published(place, tmp_path / "cache")
    assert reads == ["a.bin", "b.bin", "empty"] * 2


def test_a_flipped_bit_is_found_though_size_and_modification_time_are_the_same(place: Path, tmp_path: Path) -> None:
    verify_published(place, tmp_path / "cache")
    path = place / "a.bin"
    times = path.stat()
    time.sleep(0.02)  # the change has a time of its own, as `st_ctime` is that of the clock's last tick
    with path.open("r+b") as file:
        file.write(bytes([path.read_bytes()[0] ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(CheckpointError, match=r"a\.bin: the content of the file has changed"):
        verify_published(place, tmp_path / "cache")
    assert not is_intact(place, tmp_path / "cache") and not is_intact(tmp_path / "nowhere", tmp_path / "cache")


def test_decay_below_the_file_system_is_found_by_a_sample(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change that no time tells of; some verification finds it, and the mutant that samples nothing never does."""
    verify_published(place, tmp_path / "cache")
    memo = verification._read_memo(verification._memo_file(place, tmp_path / "cache"))
    content = bytearray((place / "a.bin").read_bytes())
    content[500] ^= 4
    (place / "a.bin").write_bytes(content)
    found = (place / "a.bin").stat()
    memo.files["a.bin"].state[:] = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
    monkeypatch.setattr(verification, "_read_memo", lambda memo_file: memo)
    random.seed(0)
    problems = 0
    for _ in range(50):
        try:
            verify_published(place, tmp_path / "cache")
        except CheckpointError as error:
            assert "has changed" in error.problem and error.where.endswith("a.bin")
            problems += 1
    # Of 19 blocks 2 are read.
    assert 1 <= problems <= 15
    monkeypatch.setattr(verification, "SAMPLED_BLOCKS", 0)
    verify_published(place, tmp_path / "cache")


def test_a_broken_memo_is_ignored(place: Path, tmp_path: Path, reads: list[str]) -> None:
    verify_published(place, tmp_path / "cache")
    (memo,) = (tmp_path / "cache" / "verified").iterdir()
    whole = memo.read_bytes()
    for content in (
        b"",
        b"\0" * 4,
        b"[]",
        whole.replace(b"state", b"stete"),
        whole[:50],
        whole[:-9],
        whole[:-9] + b"\0" * 9,
    ):
        memo.write_bytes(content)
        for _ in range(5):
            verify_published(place, tmp_path / "cache")
    assert len(reads) >= 12


def test_a_document_is_found_changed_by_its_checksum(tmp_path: Path) -> None:
    document = {"name": "a", "values": [1, 2.5, None, float("inf")], "more": {"x": True, "1": "b"}}
    path = tmp_path / "d.json"
    write_checked_json(path, document, "owner-1")
    assert read_checked_json(path, dict[str, object], "owner-1") == document
    assert find_damage(add_checksum(document)) == "" == find_damage(document)
    content = path.read_bytes()
    rng = random.Random(0)
    for bit in rng.sample(range(8 * len(content)), 300):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        found = read_cached_json(path, dict[str, object], "owner-1")
        assert found is None or {key: found.get(key) for key in document} == document
    path.write_bytes(content)
    with pytest.raises(StageError, match="another run"):
        read_checked_json(path, dict[str, object], "another", error=StageError)
    assert CHECKSUM not in read_checked_json(path, dict[str, object])
