"""A folder is read as its owner means it: as `datasets` reads it, and what is passed over is named."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import zstandard

from postgrad.data.read import folders, text_lines
from postgrad.data.read.documents import read_documents
from postgrad.data.read.files import RawSource, list_files
from postgrad.errors import DataError

CARD = "---\nlicense: mit\n{configs}---\n# A card\n"
FILES = """configs:
- config_name: default
  data_files:
  - split: train
    path: ["old/*.jsonl", "new.jsonl"]
  - split: test
    path: held/**
"""
LAYOUTS: dict[str, tuple[list[str], str | None]] = {
    "shards": (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl"], ""),
    "other splits": (["data/seen-00000-of-00001.jsonl", "data/train-00000-of-00001.jsonl", "data/x.jsonl"], ""),
    "folders": (["train/a.jsonl", "train/b/c.jsonl", "dev/a.jsonl", "extra.jsonl"], None),
    "names": (["my_train.1.jsonl", "my_test.jsonl", "my-valid.jsonl", "notes.jsonl"], None),
    "words within names": (["trainer.jsonl", "contest.jsonl", "latest.jsonl", "development.jsonl"], None),
    "folders before names": (["training/test.jsonl", "evaluation/train.jsonl"], None),
    "no splits": (["a.jsonl", "b/c.jsonl", "__MACOSX/d.jsonl", ".cache/e.jsonl"], ""),
    "a card's files": (["old/a.jsonl", "old/b/c.jsonl", "new.jsonl", "held/x/y.jsonl", "train.jsonl"], FILES),
    "one pattern": (["a/b.jsonl", "c.jsonl", "test.jsonl"], "configs:\n- config_name: x\n  data_files: a/*.jsonl\n"),
    "a folder of a card": (["en/train.jsonl", "en/test.jsonl", "de/train.jsonl"],
                           "configs:\n- config_name: en\n  data_dir: en\n"),
    "the default of several": (["en.jsonl", "de.jsonl"], "configs:\n- config_name: en\n  data_files: en.jsonl\n"
                               "- config_name: de\n  data_files: de.jsonl\n  default: true\n"),
}  # fmt: skip


def fill(folder: Path, names: list[str], card: str | None = None) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": f"of {name}"}) + "\n")
    if card is not None:
        (folder / "README.md").write_text(CARD.format(configs=card))
    return folder


def read_as_datasets(folder: Path) -> dict[str, list[str]]:
    files = datasets.load_dataset_builder(str(folder)).config.data_files
    assert files is not None
    return {
        str(split): sorted(Path(str(file)).relative_to(folder).as_posix() for file in members)
        for split, members in files.items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_files_of_each_split_are_those_of_datasets(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    names, card = LAYOUTS[layout]
    folder = fill(tmp_path / "set", names, card)
    expected = read_as_datasets(folder)
    for split, files in expected.items():
        listing = list_files("set", tmp_path, "data", (split,))
        assert sorted(file.relative_to(folder).as_posix() for file in listing.files) == files
        told = {name for names_of_reason in listing.passed_over.values() for name in names_of_reason}
        everything = {file.relative_to(folder).as_posix() for file in folder.rglob("*.*") if file.is_file()}
        assert told == {name for name in everything if not name.startswith(("_", "."))} - set(files)
    assert list_files("set", tmp_path, "data").files == list_files("set", tmp_path, "data", ("train",)).files


def test_without_splits_by_name_the_test_split_would_be_trained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The mutant: every file is data."""
    monkeypatch.setattr(folders, "_find_splits", lambda *_, **__: {})
    with pytest.raises(AssertionError):
        test_the_files_of_each_split_are_those_of_datasets(tmp_path, "names", monkeypatch)


def test_a_folder_of_documents_is_no_data_set(tmp_path: Path) -> None:
    names = ["README.md", "training.md", "guide/test-first.md", "guide/README.md"]
    listing = list_files(str(fill(tmp_path / "docs", names)), tmp_path, "data")
    assert len(listing.files) == 4 and not listing.passed_over and not listing.split
    listing = list_files(str(fill(tmp_path / "wiki", ["train.txt", "test.txt", "valid.txt"], "")), tmp_path, "data")
    assert [file.name for file in listing.files] == ["train.txt"] and listing.split == "train"
    assert listing.passed_over == {
        "a data card": ("README.md",), "split test": ("test.txt",), "split validation": ("valid.txt",)
    }  # fmt: skip


def test_what_names_a_file_is_obeyed(tmp_path: Path) -> None:
    folder = fill(tmp_path / "set", ["train.jsonl", "test.jsonl"], "")
    assert [file.name for file in list_files("set/*.jsonl", tmp_path, "data").files] == ["test.jsonl", "train.jsonl"]
    assert list_files("set/README.md", tmp_path, "data").files == (folder / "README.md",)
    held_out = ("test", "validation", "train")
    assert [file.name for file in list_files("set", tmp_path, "evaluation", held_out).files] == ["test.jsonl"]


def test_a_split_that_is_not_there_is_told(tmp_path: Path) -> None:
    fill(tmp_path / "set", ["test.jsonl", "dev.jsonl"])
    fill(tmp_path / "plain", ["a.jsonl"])
    with pytest.raises(DataError, match=r"has the splits (validation, test|test, validation), and no train"):
        list_files("set", tmp_path, "data")
    with pytest.raises(DataError, match="has the splits train, and no test"):
        list_files("plain", tmp_path, "data", ("test",))
    (tmp_path / "set" / "dev.jsonl").unlink()
    assert [file.name for file in list_files("set", tmp_path, "data").files] == ["test.jsonl"]


@pytest.mark.parametrize(
    ("configs", "problem"),
    [
        (
            "configs:\n- config_name: a\n  data_files: a.jsonl\n- config_name: b\n  data_files: b.jsonl\n",
            "configurations a, b",
        ),
        ("configs:\n- config_name: a\n  data_files: ../x.jsonl\n", "names ../x.jsonl, and no file matches"),
        ("configs:\n- config_name: a\n  data_files: /etc/*\n", "no file matches"),
    ],
)
def test_a_card_that_cannot_be_obeyed_is_an_error(tmp_path: Path, configs: str, problem: str) -> None:
    fill(tmp_path / "set", ["a.jsonl", "b.jsonl"], configs)
    (tmp_path / "x.jsonl").write_text("{}")
    with pytest.raises(DataError, match=problem):
        list_files("set", tmp_path, "data")


@pytest.mark.parametrize(
    "configs", ["configs: 3\n", "configs: [3]\n", "configs: {\n", "a: &a [*a]\n", "configs:\n- {}\n"]
)
def test_a_broken_card_is_only_a_card(tmp_path: Path, configs: str) -> None:
    fill(tmp_path / "set", ["a.jsonl"], configs)
    assert [file.name for file in list_files("set", tmp_path, "data").files] == ["a.jsonl"]


def texts(path: Path) -> list[str | None]:
    return [document.text for document in read_documents(RawSource("s", str(path)))]


def test_saved_data_sets_are_read(tmp_path: Path) -> None:
    rows = {"text": [f"text {n}" for n in range(700)], "id": list(range(700))}
    saved = datasets.Dataset.from_dict(rows)
    saved.save_to_disk(str(tmp_path / "one"), num_shards=3)
    saved.select(range(5)).map(
        lambda row: {"text": "cached " + row["text"]}, cache_file_name=str(tmp_path / "one/cache-1.arrow")
    )
    assert texts(tmp_path / "one") == rows["text"]
    assert texts(tmp_path / "one" / "data-00000-of-00003.arrow") == rows["text"][:234]
    listing = list_files("one", tmp_path, "data")
    assert listing.passed_over == {
        "metadata": ("dataset_info.json", "state.json"), "not of the saved data set": ("cache-1.arrow",)
    }  # fmt: skip
    both = datasets.DatasetDict({"train": saved.select(range(9)), "test": saved.select(range(9, 12))})
    both.save_to_disk(str(tmp_path / "both"))
    assert texts(tmp_path / "both") == rows["text"][:9]
    documents = read_documents(RawSource("s", str(tmp_path / "both"), splits=("test",)))
    assert [document.text for document in documents] == rows["text"][9:12]


def test_arrow_files_and_broken_ones(tmp_path: Path) -> None:
    import pyarrow as pa

    table = pa.table({"text": ["a", None, "c"], "id": [1, 2, 3]})
    with pa.ipc.new_file(tmp_path / "file.arrow", table.schema) as writer:
        writer.write_table(table)
    documents = list(read_documents(RawSource("s", str(tmp_path / "file.arrow"))))
    assert [document.text for document in documents] == ["a", "", "c"] and documents[2].location.endswith(
        "file.arrow:3"
    )
    assert documents[0].unused == ("id",)
    data = (tmp_path / "file.arrow").read_bytes()
    for name, content in (("cut.arrow", data[: len(data) // 2]), ("none.arrow", b"text\n" * 9), ("empty.arrow", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="not a complete Arrow file") as caught:
            texts(tmp_path / name)
        assert name in caught.value.where


def test_tables_with_an_index_or_tabs(tmp_path: Path) -> None:
    (tmp_path / "index.csv").write_text(",text,label\n0,a,1\n1,b,0\n")
    (tmp_path / "tabs.tsv").write_text('text\tid\n"a, b"\t1\nc\t2\n')
    (tmp_path / "lines.ndjson").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert texts(tmp_path / "index.csv") == ["a", "b"]
    assert texts(tmp_path / "tabs.tsv") == ["a, b", "c"]
    assert texts(tmp_path / "lines.ndjson") == ["a", "b"]


def test_zstandard_with_a_long_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(compressor.compress(b'{"text": "a"}\n' * 3) + compressor.flush())
    assert texts(path) == ["a"] * 3
    monkeypatch.setattr(text_lines, "_ZSTD_WINDOW", 2**27)  # the mutant: what the package allows by default
    with pytest.raises(DataError, match="too much memory"):
        texts(path)
