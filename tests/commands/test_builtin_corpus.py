"""What is made from the standard library is what it says, apart where it is held out, and the same every time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from postgrad.commands import builtin_corpus
from postgrad.data.read.documents import detect_kind
from postgrad.data.read.files import RawSource

KINDS = {
    "instructions": "instruction",
    "labelled": "labelled",
    "tagged": "tagged",
    "pairs": "pair",
    "choices": "choices",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("material")
    for name in builtin_corpus.ROW_GENERATORS:
        builtin_corpus.write_rows(place, name)
    return place


def rows(folder: Path, name: str, part: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.{part}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", builtin_corpus.ROW_GENERATORS)
def test_rows_are_of_their_kind_and_parts_share_none(folder: Path, name: str) -> None:
    parts = {part: rows(folder, name, part) for part in ("train", "valid", "test")}
    assert all(len(found) >= 20 for found in parts.values())
    seen = [{json.dumps(row, sort_keys=True) for row in found} for found in parts.values()]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    asked = "labelled" if name == "labelled" else "auto"  # a text with a label is running text, unless it is said
    source = RawSource("x", str(folder / f"{name}.train.jsonl"), root=folder, where="x", kind=asked)
    assert detect_kind(source) == KINDS[name]


def test_labels_and_answers_are_right(folder: Path) -> None:
    assert {row["label"] for row in rows(folder, "labelled", "train")} == set(builtin_corpus.LIBRARY_PARTS)
    assert {row["label"] for row in rows(folder, "labelled", "test")} <= set(builtin_corpus.LIBRARY_PARTS)
    says = {f"What does {f.module}.{f.name} do?": f.summary for f in builtin_corpus.documented_functions()}
    for row in rows(folder, "choices", "test"):
        assert len(set(row["choices"])) == 4
        assert row["choices"][row["answer"]] == says[row["question"]]
    for row in rows(folder, "tagged", "train"):
        assert len(row["tokens"]) == len(row["tags"]) and "B-PARAMETER" in row["tags"]


def test_the_same_files_come_every_time(folder: Path, tmp_path: Path) -> None:
    builtin_corpus.write_rows(tmp_path, "choices")
    for part in ("train", "valid", "test"):
        assert (tmp_path / f"choices.{part}.jsonl").read_bytes() == (folder / f"choices.{part}.jsonl").read_bytes()


def test_code_loses_its_prose_and_nothing_else() -> None:
    source = 'def f(x):\n    """Says."""\n    # why\n    y = "kept"  # gone\n    return x\n'
    assert builtin_corpus.strip_prose(source) == 'def f(x):\n    y = "kept"\n    return x'
