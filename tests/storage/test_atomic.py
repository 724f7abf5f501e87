"""A folder is there whole or not at all: every changed bit is found, and a full disk leaves what was there before."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from postgrad.errors import CheckpointError, DiskError
from postgrad.models.pretrained import save_pretrained
from postgrad.storage import atomic as publishing
from postgrad.storage.atomic import (
    MANIFEST,
    publish_file,
    publish_folder,
    remove_folder,
    remove_staging,
    sha256,
    verify,
    write_atomically,
)
from tests.conftest import make_llama, make_tokenizer

CONTENTS = {
    "weights.bin": bytes(range(256)) * 16,
    "config.json": b'{"layers": 2}',
    "inner/shard-00001-of-00002.bin": b"one",
    "inner/shard-00002-of-00002.bin": b"two" * 100,
    "empty.txt": b"",
}


def write_contents(folder: Path) -> None:
    for name, data in CONTENTS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)


def everything(folder: Path) -> dict[str, bytes | None]:
    """All names under a folder, hidden ones too, and what is in them."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def hidden(folder: Path) -> list[str]:
    return [p.name for p in folder.glob(".*")]


def test_a_published_folder_holds_what_was_written_and_its_manifest(tmp_path: Path) -> None:
    place = publish_folder(tmp_path / "deep" / "er" / "place", write_contents)
    assert {n: d for n, d in everything(place).items() if d is not None and n != MANIFEST} == CONTENTS
    listing = verify(place)
    assert listing == json.loads((place / MANIFEST).read_text())
    assert {name: entry["size"] for name, entry in listing.items()} == {n: len(d) for n, d in CONTENTS.items()}
    digest = subprocess.run(
        ["sha256sum", place / "weights.bin"], capture_output=True, text=True, check=True
    ).stdout.split()[0]
    assert listing["weights.bin"]["sha256"] == digest == sha256(place / "weights.bin")
    assert hidden(place.parent) == []


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    place = publish_folder(tmp_path / "place", write_contents)
    rng = random.Random(0)
    files = [place / MANIFEST, *(place / name for name, data in CONTENTS.items() if data)]
    tried = 0
    for path in files:
        whole = path.read_bytes()
        bits = set(rng.sample(range(8 * len(whole)), min(32, 8 * len(whole))))
        if path.name == MANIFEST:  # also every bit of a key, and of a name that one bit parts from its neighbour's
            for word in (b"size", b"shard-00002"):
                bits |= {8 * whole.index(word) + i for i in range(8 * len(word))}
        for bit in bits:
            changed = bytearray(whole)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            with pytest.raises(CheckpointError):
                verify(place)
            tried += 1
        path.write_bytes(whole)
    verify(place)
    assert tried >= 200


def test_what_is_cut_longer_or_missing_is_found_and_named(tmp_path: Path) -> None:
    place = publish_folder(tmp_path / "place", write_contents)
    for name, data in CONTENTS.items():
        path = place / name
        for changed in {data[: len(data) // 2], data + b"\0"} - {data}:
            path.write_bytes(changed)
            with pytest.raises(
                CheckpointError, match=rf"{path.name}: the file has [\d,]+ bytes[\s\S]*{len(data):,} bytes"
            ):
                verify(place)
        path.unlink()
        with pytest.raises(CheckpointError, match=f"{path.name}: the file is missing"):
            verify(place)
        path.write_bytes(data)
    for text in ("", "[]", '{"weights.bin": 3}', '{"weights.bin": {"size": 4096}}', json.dumps([1])):
        (place / MANIFEST).write_text(text)
        with pytest.raises(CheckpointError, match=r"manifest\.json is missing or unreadable"):
            verify(place)
    (place / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing or unreadable"):
        verify(place)
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing or unreadable"):
        verify(tmp_path / "nowhere")


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o027])
def test_files_have_the_permissions_of_new_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int) -> None:
    """Weights too, which safetensors writes readable to the owner alone: others may load a shared model."""

    def write_weights(path: Path) -> None:
        save_file({"weight": torch.zeros(2)}, path)

    def modes(*paths: Path) -> set[int]:
        return {stat.S_IMODE(path.stat().st_mode) for path in paths}

    before = os.umask(umask)
    try:
        folder = publish_folder(tmp_path / "model", lambda staged: write_weights(staged / "model.safetensors"))
        publish_file(tmp_path / "importance.safetensors", write_weights)
        write_atomically(tmp_path / "record.json", "{}")
        assert modes(*folder.iterdir(), *tmp_path.glob("*.*")) == {0o666 & ~umask}
        monkeypatch.setattr(publishing, "_set_mode", lambda path, mode: None)  # the mutant
        publish_file(tmp_path / "importance.safetensors", write_weights)
        assert modes(tmp_path / "importance.safetensors") == {0o600}
    finally:
        os.umask(before)


def test_the_same_size_is_not_enough(tmp_path: Path) -> None:
    place = publish_folder(tmp_path / "place", write_contents)
    (place / "config.json").write_bytes(b'{"layers": 3}')
    assert all((place / n).stat().st_size == e["size"] for n, e in json.loads((place / MANIFEST).read_text()).items())
    with pytest.raises(
        CheckpointError, match=r"config\.json: the content of the file has changed since it was written"
    ):
        verify(place)


def test_what_is_there_already_is_not_touched(tmp_path: Path) -> None:
    place = publish_folder(tmp_path / "place", write_contents)
    before = everything(tmp_path)
    with pytest.raises(DiskError):
        publish_folder(place, lambda folder: (folder / "other").write_text("x") and None)
    assert everything(tmp_path) == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DiskError):
        publish_folder(tmp_path / "file", write_contents)
    with pytest.raises(DiskError):
        publish_folder(tmp_path / "file" / "below", write_contents)
    with pytest.raises(DiskError):
        write_atomically(tmp_path / "file" / "below", "x")
    with pytest.raises(DiskError):
        write_atomically(place, "x")
    assert (tmp_path / "file").read_text() == "mine"
    verify(place)


def test_what_an_interrupted_publication_left_is_written_over(tmp_path: Path) -> None:
    left = tmp_path / ".staging-place"
    left.mkdir()
    (left / "rubbish").write_text("half")
    publish_folder(tmp_path / "place", write_contents)
    assert "rubbish" not in everything(tmp_path / "place")
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_a_writer_that_fails_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def failing(folder: Path) -> None:
        write_contents(folder)
        raise error("in the middle")

    with pytest.raises(error, match="in the middle"):
        publish_folder(tmp_path / "place", failing)
    assert everything(tmp_path) == {}


def test_sweeping_removes_leftovers_and_nothing_else(tmp_path: Path) -> None:
    publish_folder(tmp_path / "place", write_contents)
    (tmp_path / ".hidden").write_text("mine")
    before = everything(tmp_path)
    (tmp_path / ".staging-place").mkdir()
    (tmp_path / ".staging-place" / "x").write_text("half")
    (tmp_path / ".staging-old-place").mkdir()
    (tmp_path / ".staging-record.json").write_text("half")
    remove_staging(tmp_path)
    assert everything(tmp_path) == before
    remove_staging(tmp_path / "nowhere")


def test_a_removed_folder_is_gone_and_never_half_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = publish_folder(tmp_path / "place", write_contents)

    def killed(path: Path, **_: object) -> None:
        (Path(path) / "weights.bin").unlink(missing_ok=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as m, contextlib.suppress(KeyboardInterrupt):
        m.setattr(shutil, "rmtree", lambda path, **kw: killed(path) if Path(path).exists() else None)
        remove_folder(place)
    assert not place.exists()
    remove_staging(tmp_path)
    assert everything(tmp_path) == {}
    remove_folder(publish_folder(place, write_contents))
    assert everything(tmp_path) == {}
    with pytest.raises(DiskError):
        remove_folder(place)


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "record.json"
    write_atomically(path, "old")
    write_atomically(path, "new ü")
    assert path.read_text(encoding="utf-8") == "new ü"
    write_atomically(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    assert hidden(path.parent) == []


WRITER = """
import sys
from pathlib import Path
from postgrad.storage.atomic import write_atomically
for _ in range(60):
    write_atomically(Path(sys.argv[1]), sys.argv[2] * 50_000)
"""


def test_two_processes_may_replace_the_same_file(tmp_path: Path) -> None:
    """Runs side by side share a cache: each must see a whole file, whoever was last."""
    path = tmp_path / "scores.npz"
    write_atomically(path, "a" * 50_000)
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), letter], stderr=subprocess.PIPE, text=True)
        for letter in "ab"
    ]
    while any(w.poll() is None for w in writers):
        assert path.read_text() in ("a" * 50_000, "b" * 50_000)
    for writer in writers:
        _, said = writer.communicate()
        assert writer.returncode == 0, said
    assert hidden(tmp_path) == []


# -- no room ----------------------------------------------------------------------------------------------------------


class Full:
    """Counts the calls that can fail on a full disk, and lets the n-th one fail."""

    def __init__(self, fail_at: int) -> None:
        self.fail_at, self.count = fail_at, 0

    def wrap(self, call: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: object, **more: object) -> object:
            is_regular_file = any(isinstance(arg, int) and arg & os.O_NONBLOCK for arg in args)
            if is_regular_file or "rb" in (*args, *more.values()):  # reading needs no room
                return call(*args, **more)
            self.count += 1
            if self.count == self.fail_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*args, **more)

        return counted

    def install(self, m: pytest.MonkeyPatch) -> None:
        calls = ((os, "fsync"), (os, "rename"), (os, "replace"), (os, "open"), (Path, "mkdir"), (Path, "open"))
        for where, name in calls:
            m.setattr(where, name, self.wrap(getattr(where, name)))


def failures(work: Callable[[], object], look: Callable[[int], None]) -> int:
    """Run `work` with each call failing in turn; `look` sees what each failure left. Returns the number of failures."""
    point = 1
    while True:
        full = Full(point)
        with pytest.MonkeyPatch.context() as m:
            full.install(m)
            try:
                work()
            except DiskError as error:
                assert "disk is full" in str(error)
                assert "free disk space" in str(error)
            else:
                assert full.count < point  # every call was allowed: nothing is left to fail
                return point - 1
        look(point)
        point += 1


def test_a_full_disk_at_any_moment_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    place = tmp_path / "runs" / "place"
    outcomes = set()

    def look(_: int) -> None:
        assert hidden(tmp_path) == []
        assert not place.parent.exists() or hidden(place.parent) == []
        outcomes.add(place.exists())
        if place.exists():  # only the last sync failed: it has its name and is whole
            verify(place)
            shutil.rmtree(place)

    assert failures(lambda: publish_folder(place, write_contents), look) > 15
    assert outcomes == {True, False}
    verify(place)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text("old")
    seen = []

    def look(_: int) -> None:
        assert hidden(tmp_path) == []
        seen.append(path.read_text())
        path.write_text("old")

    assert failures(lambda: write_atomically(path, "new"), look) >= 4
    assert set(seen) == {"old", "new"}
    assert seen[:3] == ["old"] * 3
    assert path.read_text() == "new"


def test_other_failures_are_told_as_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "rename", refused)
    with pytest.raises(DiskError, match=r"Permission denied[\s\S]*check that the folder"):
        publish_folder(tmp_path / "place", write_contents)
    assert everything(tmp_path) == {}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here (that takes root)")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.skipif(os.name != "posix" or shutil.which("mount") is None, reason="there is no mount command")
def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    old = publish_folder(small_disk / "old", write_contents)
    before = everything(small_disk)

    def large(folder: Path) -> None:
        (folder / "weights.bin").write_bytes(bytes(2 << 20))

    def model(folder: Path) -> None:  # safetensors tells of a full disk with an error of its own
        save_pretrained(
            make_llama(hidden_size=256, intermediate_size=512), make_tokenizer(), folder, dtype=torch.float32
        )

    for write in (large, model):
        with pytest.raises(DiskError, match=r"the disk is full \([\d,]+ bytes free\)[\s\S]*free disk space"):
            publish_folder(small_disk / "new", write)
        assert everything(small_disk) == before
    with pytest.raises(DiskError, match="the disk is full"):
        write_atomically(small_disk / "old" / "config.json", bytes(2 << 20))
    assert everything(small_disk) == before
    verify(old)
    (small_disk / "filler").write_bytes(bytes(1 << 18))
    publish_folder(small_disk / "new", write_contents)


def test_a_publisher_that_writes_in_place_would_be_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant of the law above: without the hidden folder a failure leaves half a folder under its final name."""
    place = tmp_path / "place"

    def in_place(place: Path, write: Callable[[Path], None]) -> None:
        place.mkdir()
        write(place)
        (place / MANIFEST).write_bytes(b"{}")
        publishing.sync(place / MANIFEST)

    monkeypatch.setattr(os, "fsync", Full(1).wrap(os.fsync))
    with pytest.raises(OSError, match="No space"):
        in_place(place, write_contents)
    assert place.exists()
