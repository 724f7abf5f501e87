"""Does a store give back the tokens it was given, and refuse what it cannot hold?"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from postgrad.data.tokens.store import (
    FORMAT,
    MARKED_FORMAT,
    ExtraColumns,
    ShardWriter,
    TokenStore,
    digest,
    finished_shards,
    publish_shard,
    publish_store,
    token_dtype,
)
from postgrad.errors import DataError


def build(folder: Path, shards: Sequence[Sequence[Sequence[int]]], vocabulary: int) -> TokenStore:
    """A store of the given documents, one `add` a document."""
    building = folder / "building"
    building.mkdir()
    made = []
    for number, documents in enumerate(shards):

        def write(writer: ShardWriter, documents: Sequence[Sequence[int]] = documents) -> int:
            for n, ids in enumerate(documents):
                array = np.array(ids, np.int64)
                mark = digest(array.astype("<u4").data)
                writer.add(array, np.array([len(ids)]), np.array([3 * n]), np.array([mark], np.uint64), [f"f:{n}"])
            return 1

        made.append(publish_shard(building, number, vocabulary, write))
    assert finished_shards(building) == made
    header = {"vocabulary": vocabulary, "bos": None, "eos": 0, "kind": "input_ids", "fingerprint": "f"}
    return publish_store(building, folder / "final", made, header)


@pytest.mark.parametrize(("vocabulary", "width"), [(65_535, 2), (65_536, 2), (65_537, 4), (262_144, 4)])
def test_the_width_holds_every_id(tmp_path: Path, vocabulary: int, width: int) -> None:
    assert token_dtype(vocabulary).itemsize == width
    store = build(tmp_path, [[[0, vocabulary - 1], [vocabulary - 1]]], vocabulary)
    assert store.dtype.itemsize == width
    assert store.read(0).tolist() == [0, vocabulary - 1]
    assert (store.path / "shard-00000" / "tokens.bin").stat().st_size == 3 * width


@pytest.mark.parametrize("vocabulary", [65_535, 65_536, 65_537, 262_144])
@pytest.mark.parametrize("over", [0, 1, 65_536, 2**31])
def test_an_id_outside_the_vocabulary_is_refused_with_its_place(tmp_path: Path, vocabulary: int, over: int) -> None:
    with pytest.raises(DataError) as caught:
        build(tmp_path, [[[1, 2], [3, vocabulary + over, 4]]], vocabulary)
    assert caught.value.where == "f:1"
    assert f"{vocabulary + over:,}" in str(caught.value)


def test_the_place_is_found_inside_a_batch(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 0, 10)
    with pytest.raises(DataError, match=r"^b: token id 10"):
        writer.add(np.array([1, 2, 10, 3]), np.array([2, 1, 1]), np.zeros(3), np.zeros(3), ["a", "b", "c"])
    with pytest.raises(DataError, match=r"^c: token id -1"):
        writer.add(np.array([1, 2, 1, -1]), np.array([2, 1, 1]), np.zeros(3), np.zeros(3), ["a", "b", "c"])
    writer.close()


def test_mutant_without_the_range_check_ids_wrap_in_silence() -> None:
    """Why the check is there: 70,000 would become 4,464."""
    assert np.array([70_000]).astype(token_dtype(65_536)).tolist() == [4_464]


documents = st.lists(st.lists(st.integers(0, 299), min_size=1, max_size=12), max_size=6)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shards=st.lists(documents, min_size=1, max_size=4), data=st.data())
def test_what_is_read_is_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[list[int]]], data: st.DataObject
) -> None:
    store = build(tmp_path_factory.mktemp("store"), shards, 300)
    flat = [ids for shard in shards for ids in shard]
    assert len(store) == len(flat) == len(store.documents)
    assert store.tokens == sum(map(len, flat)) == int(store.documents["tokens"].sum())
    assert store.bytes == int(store.documents["bytes"].sum())
    assert store.empty_count == len(shards)
    for number, ids in enumerate(flat):
        start = data.draw(st.integers(0, 14))
        stop = data.draw(st.one_of(st.none(), st.integers(0, 14)))
        assert store.read(number).tolist() == ids
        assert store.read(number, start, stop).tolist() == ids[start:stop]
        assert store.documents["digest"][number] == digest(np.array(ids, "<u4").data)
    store.verify()


def test_a_document_may_come_in_pieces(tmp_path: Path) -> None:
    def write(writer: ShardWriter) -> int:
        def add(ids: list[int], lengths: list[int], size: int, *, open_end: bool) -> None:
            n = len(lengths)
            writer.add(
                np.array(ids),
                np.array(lengths),
                np.full(n, size),
                np.full(n, 7, np.uint64),
                ["p"] * n,
                is_partial=open_end,
            )

        add([1, 2, 3], [1, 2], 5, open_end=True)
        add([4], [1], 0, open_end=True)
        add([5, 6], [2], 9, open_end=False)
        add([7], [1], 1, open_end=False)
        return 0

    (tmp_path / "b").mkdir()
    shard = publish_shard(tmp_path / "b", 0, 10, write)
    header = {"vocabulary": 10, "bos": None, "eos": 0, "kind": "text", "fingerprint": "f"}
    store = publish_store(tmp_path / "b", tmp_path / "f", [shard], header)
    assert [store.read(n).tolist() for n in range(3)] == [[1], [2, 3, 4, 5, 6], [7]]
    assert store.documents["bytes"].tolist() == [5, 9, 1]


# --- marks and values ---------------------------------------------------------------------------------

Marked = tuple[list[int], list[int], list[float]]


def build_marked(folder: Path, shards: Sequence[Sequence[Marked]], width: int) -> TokenStore:
    """A store of documents with marks and values; each shard has left out a row, two of them for one reason."""
    building = folder / "building"
    building.mkdir()
    extras = ExtraColumns(marks=True, width=width)
    made = []
    for number, documents in enumerate(shards):

        def write(writer: ShardWriter, documents: Sequence[Marked] = documents, number: int = number) -> int:
            for ids, marks, values in documents:
                one = np.zeros(1)
                writer.add(
                    np.array(ids), np.array([len(ids)]), one, one, ["f:1"],
                    marks=np.array(marks), values=np.array([values]).reshape(1, width),
                )  # fmt: skip
            writer.skipped.update(["b" if number else "a"])
            return 1

        made.append(publish_shard(building, number, 70_000, write, extras))
    assert finished_shards(building) == made
    header = {"vocabulary": 70_000, "bos": None, "eos": 0, "kind": "labelled", "fingerprint": "f"}
    header |= {"labels": ["x", "y"], "problem": "class"}
    return publish_store(building, folder / "final", made, header, extras)


MARKED: list[list[Marked]] = [
    [([1, 2, 3], [0, 65_535, 1], [1.5]), ([69_999], [2], [-2.0])],
    [],
    [([5, 0], [0, 1], [0.0])],
]


def test_marks_and_values_are_what_was_written(tmp_path: Path) -> None:
    store = build_marked(tmp_path, MARKED, 1)
    flat = [document for shard in MARKED for document in shard]
    for number, (ids, marks, _) in enumerate(flat):
        assert store.read(number).tolist() == ids
        for start, stop in ((0, None), (1, None), (0, 1), (1, 2), (2, 9), (5, 9)):
            given = store.marks(number, start, stop)
            assert given is not None
            assert given.tolist() == marks[start:stop]
            assert len(given) == len(store.read(number, start, stop))
    assert store.values is not None
    assert (store.values.dtype, store.values.tolist()) == (np.float32, [values for _, _, values in flat])
    assert (store.labels, store.problem) == (["x", "y"], "class")
    assert (store.skipped, store.empty_count) == ({"a": 1, "b": 2}, 3)
    assert store.header["format"] == MARKED_FORMAT
    store.verify()
    again = pickle.loads(pickle.dumps(store))
    assert again.marks(0).tolist() == [0, 65_535, 1]
    files = {str(file.relative_to(store.path)) for file in store.path.rglob("*") if file.is_file()}
    shards = {f"shard-0000{n}/{name}.bin" for n in range(3) for name in ("tokens", "marks")}
    assert files == {"documents.npy", "values.npy", "store.json", *shards}


def test_several_values_or_none(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    store = build_marked(tmp_path / "a", [[([1], [1], [1.0, 0.0, 1.0])], [([1], [1], [0.0, 1.0, 0.0])]], 3)
    assert store.values is not None
    assert store.values.tolist() == [[1, 0, 1], [0, 1, 0]]
    assert build_marked(tmp_path / "b", [[([1], [1], [])]], 0).values is None


def test_a_store_of_running_text_has_neither(tmp_path: Path) -> None:
    store = build(tmp_path, [[[1, 2, 3]]], 10)
    assert store.header["format"] == FORMAT == 1
    assert not {"skipped", "labels", "problem"} & store.header.keys()
    assert (store.marks(0), store.values, store.labels, store.problem, store.skipped) == (None, None, None, None, {})


def test_marks_must_be_as_many_as_tokens(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 0, 10, ExtraColumns(marks=True))
    for marks in (None, np.zeros(1)):
        with pytest.raises(AssertionError):
            writer.add(np.array([1, 2]), np.array([2]), np.zeros(1), np.zeros(1), ["a"], marks=marks)
    writer.close()


@pytest.mark.parametrize("name", ["values.npy", "shard-00000/marks.bin", "shard-00002/marks.bin"])
def test_every_flipped_bit_of_marks_and_values_is_found(tmp_path: Path, name: str) -> None:
    store = build_marked(tmp_path, MARKED, 1)
    whole = (store.path / name).read_bytes()
    for at in range(0, len(whole), max(1, len(whole) // 20)):
        (store.path / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DataError, match="has changed since it was written"):
            TokenStore.open(store.path).verify()
    (store.path / name).write_bytes(whole[:-1])
    with pytest.raises(DataError, match=f"{name} has"):
        TokenStore.open(store.path)


def test_a_store_travels_as_its_path(tmp_path: Path) -> None:
    store = build(tmp_path, [[[1, 2, 3]]], 10)
    assert len(pickle.dumps(store)) < 500
    assert pickle.loads(pickle.dumps(store)).read(0, 1).tolist() == [2, 3]


def test_reading_copies_nothing_and_cannot_change_the_store(tmp_path: Path) -> None:
    tokens = build(tmp_path, [[[1, 2, 3]]], 10).read(0)
    assert type(tokens) is np.ndarray
    assert not tokens.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 0


def test_leftovers_of_the_build_are_gone(tmp_path: Path) -> None:
    store = build(tmp_path, [[[1]], [[2]]], 10)
    files = sorted(str(file.relative_to(store.path)) for file in store.path.rglob("*") if file.is_file())
    assert files == ["documents.npy", "shard-00000/tokens.bin", "shard-00001/tokens.bin", "store.json"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("store.json", lambda data: data[:-20]),
        ("store.json", lambda data: b"[]"),
        ("store.json", lambda data: b"[" * 100_000),
        ("store.json", lambda data: data.replace(b'"format": 1', b'"format": 9')),
        ("store.json", lambda data: data.replace(b"tokens.bin", b"tokens.bi")),
        ("documents.npy", lambda data: data[:-1]),
        ("shard-00000/tokens.bin", lambda data: data + b"\0"),
        ("shard-00000/tokens.bin", None),
    ],
)
def test_a_damaged_store_is_not_opened(tmp_path: Path, name: str, change: object) -> None:
    path = build(tmp_path, [[[1, 2, 3]]], 10).path
    if callable(change):
        (path / name).write_bytes(change((path / name).read_bytes()))
    else:
        (path / name).unlink()
    with pytest.raises(DataError) as caught:
        TokenStore.open(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["documents.npy", "shard-00000/tokens.bin", "shard-00001/tokens.bin"])
def test_every_flipped_bit_is_found(tmp_path: Path, name: str) -> None:
    store = build(tmp_path, [[[1, 2, 3]], [[4, 5]]], 10)
    whole = (store.path / name).read_bytes()
    for at in range(0, len(whole), max(1, len(whole) // 40)):
        (store.path / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DataError, match="has changed since it was written"):
            TokenStore.open(store.path).verify()


def test_the_first_of_two_builders_has_its_way(tmp_path: Path) -> None:
    first = build(tmp_path, [[[1, 2]]], 10)
    again = build(tmp_path, [[[1, 2]]], 10)
    assert again.path == first.path
    assert not (tmp_path / "building").exists()
    assert again.read(0).tolist() == [1, 2]


def test_some_documents_of_a_store_read_like_a_store_of_those(tmp_path: Path) -> None:
    documents = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 9]]
    store = build(tmp_path, [documents[:3], documents[3:]], 10)
    some = store.select(np.array([3, 0, 2]), "of some")
    again = some.select(np.array([2, 0]), "of fewer")
    for found, chosen, name in ((some, [3, 0, 2], "of some"), (again, [2, 3], "of fewer")):
        for opened in (found, pickle.loads(pickle.dumps(found))):
            assert [opened.read(i).tolist() for i in range(len(opened))] == [documents[n] for n in chosen]
            assert opened.tokens == sum(len(documents[n]) for n in chosen) and opened.fingerprint == name
            assert opened.bytes == int(store.documents["bytes"][chosen].sum())
    assert len(store) == 4 and store.fingerprint == "f"
