"""Does every row and every line end in the document it belongs to?"""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from postgrad.data import formats
from postgrad.data.formats import read_documents
from postgrad.data.sources import Source
from postgrad.errors import DataError


def source(folder: Path, name: str, **options: Any) -> Source:
    return Source("s", path=name, root=folder, where="data.sources[0]", **options)


def texts(folder: Path, text: str, documents: str) -> list[str]:
    (folder / "a.txt").write_bytes(text.encode())
    return [document.text or "" for document in read_documents(source(folder, "a.txt", documents=documents))]


def rows(folder: Path, *values: dict[str, Any]) -> Path:
    file = folder / "a.jsonl"
    file.write_text("".join(json.dumps(value) + "\n" for value in values))
    return file


# --- rows ---------------------------------------------------------------------------------------------


def test_text_and_ids(tmp_path: Path) -> None:
    rows(tmp_path, {"text": "eins", "n": 1}, {"text": ""}, {"text": "drei"})
    met = list(read_documents(source(tmp_path, "a.jsonl")))
    assert [document.text for document in met] == ["eins", "", "drei"]
    assert [document.empty for document in met] == [False, True, False]
    assert met[2].place == f"{tmp_path / 'a.jsonl'}:3"

    rows(tmp_path, {"input_ids": [1, 2**32 - 1]}, {"input_ids": []})
    met = list(read_documents(source(tmp_path, "a.jsonl")))
    assert met[0].ids is not None
    assert met[0].ids.tolist() == [1, 2**32 - 1]
    assert met[0].ids.dtype == np.uint32
    assert met[1].empty


def test_columns_rename(tmp_path: Path) -> None:
    rows(tmp_path, {"text": "title", "abstract": "body", "ids": [3]})
    by_name = source(tmp_path, "a.jsonl", columns=MappingProxyType({"text": "abstract"}))
    assert next(read_documents(by_name)).text == "body"
    as_ids = source(tmp_path, "a.jsonl", columns={"input_ids": "ids"})
    assert next(read_documents(as_ids)).text is None


@pytest.mark.parametrize(
    ("row", "columns", "told"),
    [
        ({"messages": []}, {}, "chat rows (`messages`) cannot be trained on yet"),
        ({"conversations": [], "id": 1}, {}, "chat rows (`conversations`)"),
        ({"instruction": "a", "input": "", "output": "b"}, {}, "instruction rows (`instruction`, `output`)"),
        ({"prompt": "a", "completion": "b"}, {}, "prompt rows (`prompt`, `completion`)"),
        ({"source": "a", "target": "b"}, {}, "pair rows (`source`, `target`)"),
        ({"messages": []}, {}, "columns: {text: ...}"),
        ({"instruction": "a", "output": "b", "input": ""}, {}, "met `instruction`, `output`, `input`"),
        ({"txt": "a"}, {}, "did you mean 'txt'?"),
        ({"abstract": "a"}, {"text": "abstrct"}, "did you mean 'abstract'?"),
        ({"abstract": "a"}, {"txt": "abstract"}, "did you mean 'text'?"),
    ],
)
def test_other_rows_are_named(tmp_path: Path, row: dict[str, Any], columns: dict[str, str], told: str) -> None:
    rows(tmp_path, row)
    with pytest.raises(DataError) as caught:
        list(read_documents(source(tmp_path, "a.jsonl", columns=columns)))
    assert told in str(caught.value)


def test_a_mapped_column_makes_any_row_text(tmp_path: Path) -> None:
    rows(tmp_path, {"instruction": "a", "output": "b"})
    assert next(read_documents(source(tmp_path, "a.jsonl", columns={"text": "output"}))).text == "b"


def test_kinds_do_not_mix(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"input_ids": [1]}\n')
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(DataError, match="one kind of rows"):
        list(read_documents(source(tmp_path, ".")))


def test_an_unknown_cut_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'passages'"):
        read_documents(source(tmp_path, "a.txt", documents="passage"))


# --- text files ---------------------------------------------------------------------------------------

POEM = "one\n  two\n\n\nthree\r\n \t\nfour"


def test_the_cuts(tmp_path: Path) -> None:
    assert texts(tmp_path, POEM, "file") == [POEM]
    assert texts(tmp_path, POEM, "auto") == [POEM]
    assert texts(tmp_path, POEM, "lines") == ["one", "  two", "three", "four"]
    assert texts(tmp_path, POEM, "paragraphs") == ["one\n  two", "three", "four"]
    assert texts(tmp_path, POEM, "passages") == ["one\n  two\n\n\nthree\r\n \t\nfour"]
    places = [document.place for document in read_documents(source(tmp_path, "a.txt", documents="paragraphs"))]
    assert [place.rpartition(":")[2] for place in places] == ["1", "5", "7"]


def test_auto_depends_on_the_size(tmp_path: Path) -> None:
    line = "x" * 63 + "\n"
    whole = line * (formats.WHOLE_FILE // 64)
    assert texts(tmp_path, whole, "auto") == [whole]
    assert len(texts(tmp_path, whole + "y", "auto")) > 60


def test_passages_hold_whole_paragraphs_up_to_their_size(tmp_path: Path) -> None:
    paragraph = ("word " * 20 + "\n") * 9  # 909 characters
    met = texts(tmp_path, (paragraph + "\n") * 10, "passages")
    assert [text.count("\n\n") + 1 for text in met] == [4, 4, 2]
    long = "z" * 100 + "\n"
    assert [len(text) for text in texts(tmp_path, "a\n\n" + long * 90 + "\nb", "passages")] == [1, 9089, 1]
    no_blank = texts(tmp_path, long * 90, "passages")
    assert [len(text) for text in no_blank] == [39 * 101 - 1, 39 * 101 - 1, 12 * 101 - 1]
    endless = texts(tmp_path, "a\n\n" + long * 500, "passages")  # a list rather than a paragraph
    assert max(map(len, endless)) < formats.PASSAGE


def test_a_sea_of_blank_lines_is_not_kept_in_memory(tmp_path: Path) -> None:
    assert texts(tmp_path, "a" + "\n" * 100_000 + "b", "passages") == ["a", "b"]


def solid(parts: list[str]) -> str:
    return "".join("".join(part.split()) for part in parts)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(st.sampled_from("ab \n\n\n\r\t.é\u2028"), min_size=1, max_size=300),
    cut=st.sampled_from(formats.CUTS),
    size=st.integers(1, 60),
)
@example(text="a\n\nb\n\nc", cut="passages", size=1)
def test_nothing_is_lost_but_separators(tmp_path: Path, text: str, cut: str, size: int) -> None:
    """Joined, the documents are the text less its white space at the seams."""
    before = formats.PASSAGE, formats.PARAGRAPH_CAP, formats.WHOLE_FILE
    formats.PASSAGE, formats.PARAGRAPH_CAP, formats.WHOLE_FILE = size, 2 * size, 40
    try:
        met = texts(tmp_path, text, cut)
    except DataError:
        assert not text.strip()
        return
    finally:
        formats.PASSAGE, formats.PARAGRAPH_CAP, formats.WHOLE_FILE = before
    assert solid(met) == solid([text])
    position = 0
    for document in met:  # in order, each verbatim, only white space in between
        at = text.index(document, position)
        assert not text[position:at].strip()
        position = at + len(document)
    assert not text[position:].strip()


def test_mutant_a_cutter_that_loses_the_last_passage_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = formats._units
    monkeypatch.setattr(formats, "_units", lambda lines: iter(list(whole(lines))[:-1]))
    with pytest.raises(AssertionError):
        test_nothing_is_lost_but_separators.hypothesis.inner_test(tmp_path, "a\n\nb\n\nc", "passages", 1)
