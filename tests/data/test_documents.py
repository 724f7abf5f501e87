"""Does every row and every line end in the document it belongs to?"""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from postgrad.data.read import text_files as formats
from postgrad.data.read.documents import detect_kind, read_documents, read_examples, read_labels
from postgrad.data.read.files import RawSource
from postgrad.errors import DataError


def source(folder: Path, name: str, **options: Any) -> RawSource:
    return RawSource("s", path=name, root=folder, where="data.sources[0]", **options)


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
    assert [document.is_empty for document in met] == [False, True, False]
    assert met[2].location == f"{tmp_path / 'a.jsonl'}:3"

    rows(tmp_path, {"input_ids": [1, 2**32 - 1]}, {"input_ids": []})
    met = list(read_documents(source(tmp_path, "a.jsonl")))
    assert met[0].ids is not None
    assert met[0].ids.tolist() == [1, 2**32 - 1]
    assert met[0].ids.dtype == np.uint32
    assert met[1].is_empty


def test_columns_rename(tmp_path: Path) -> None:
    rows(tmp_path, {"text": "title", "abstract": "body", "ids": [3]})
    by_name = source(tmp_path, "a.jsonl", columns=MappingProxyType({"text": "abstract"}))
    assert next(read_documents(by_name)).text == "body"
    as_ids = source(tmp_path, "a.jsonl", columns={"input_ids": "ids"})
    assert next(read_documents(as_ids)).text is None


KINDS = [
    ({"text": "a"}, "text"),
    ({"text": "a", "label": 1}, "text"),  # as ever: the label has to be asked for
    ({"text": "a", "messages": []}, "text"),
    ({"input_ids": [1]}, "input_ids"),
    ({"messages": []}, "chat"),
    ({"conversations": [], "id": 1}, "chat"),
    ({"instruction": "a", "input": "", "output": "b"}, "instruction"),
    ({"instruction": "a", "output": "b"}, "instruction"),
    ({"prompt": "a", "completion": "b"}, "completion"),
    ({"source": "a", "target": "b"}, "pair"),
    ({"document": "a", "summary": "b", "id": "1"}, "pair"),
    ({"article": "a", "highlights": "b"}, "pair"),
    ({"dialogue": "a", "summary": "b"}, "pair"),
    ({"text": "a", "summary": "b"}, "text"),  # the summary has to be asked for
    ({"id": "1", "translation": {"en": "a", "de": "b"}}, "pair"),
    ({"id": "1", "title": "t", "context": "a", "question": "b", "answers": {"text": ["a"]}}, "question"),
    ({"context": "a", "question": "b", "answer": "a"}, "question"),
    ({"context": "a", "question": "b", "choices": ["a", "b"], "answer": 0}, "choices"),
    ({"question": "a", "choices": ["a", "b"], "answer": 0}, "choices"),
    ({"question": "a", "choices": ["a", "b"], "answerKey": "A"}, "choices"),
    ({"tokens": ["a"], "tags": ["O"]}, "tagged"),
    ({"tokens": ["a"], "pos_tags": [1], "ner_tags": [0]}, "tagged"),
    ({"tokens": ["a"], "labels": [0]}, "tagged"),
    ({"sentence": "a", "label": 0}, "labelled"),
    ({"text_a": "a", "text_b": "b", "label": 0}, "labelled"),
    ({"sentence1": "a", "sentence2": "b", "label": 0.5}, "labelled"),
    ({"premise": "a", "hypothesis": "b", "label": "no"}, "labelled"),
    ({"question1": "a", "question2": "b", "labels": [1]}, "labelled"),
    ({"question": "a", "sentence": "b", "label": 0}, "labelled"),
]


@pytest.mark.parametrize(("row", "kind"), KINDS, ids=[f"{kind}: {' '.join(row)}" for row, kind in KINDS])
def test_the_columns_say_the_kind(tmp_path: Path, row: dict[str, Any], kind: str) -> None:
    rows(tmp_path, row)
    assert detect_kind(source(tmp_path, "a.jsonl")) == kind


@pytest.mark.parametrize(
    ("row", "columns", "kind", "told"),
    [
        ({"txt": "a"}, {}, "auto", "did you mean 'txt'?"),
        ({"abstract": "a"}, {"text": "abstrct"}, "auto", "did you mean 'abstract'?"),
        ({"abstract": "a"}, {"txt": "abstract"}, "auto", "did you mean 'text'?"),
        ({"prompt": "a", "chosen": "b"}, {}, "auto", "kinds text, input_ids, chat, instruction, completion"),
        ({"messages": []}, {}, "chatt", "did you mean 'chat'?"),
        ({"text": "a", "lable": 1}, {}, "labelled", "did you mean 'lable'?"),
        ({"text": "a"}, {}, "chat", "`messages` or `conversations`"),
        ({"q": "a", "a": "b"}, {"prompt": "q"}, "auto", "no column `completion` among `q`, `a`"),
        ({"q": "a", "t": "b"}, {"prompt": "q", "target": "t"}, "auto", "`prompt`, `target` do not go together"),
        ({"text": "a"}, {"text": "text"}, "chat", "`text` do not go together in rows of kind `chat`"),
        ({"messages": []}, {"messages": "messages", "system": "sys"}, "auto", "no column `sys`"),
    ],
)
def test_rows_of_no_kind_are_named(
    tmp_path: Path, row: dict[str, Any], columns: dict[str, str], kind: str, told: str
) -> None:
    rows(tmp_path, row)
    with pytest.raises(DataError) as caught:
        list(read_documents(source(tmp_path, "a.jsonl", columns=columns, kind=kind)))
    assert told in str(caught.value)


def test_a_mapped_column_makes_any_row_text(tmp_path: Path) -> None:
    rows(tmp_path, {"instruction": "a", "output": "b"})
    assert next(read_documents(source(tmp_path, "a.jsonl", columns={"text": "output"}))).text == "b"


def test_kinds_do_not_mix(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"input_ids": [1]}\n')
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(DataError, match="one kind of rows"):
        list(read_documents(source(tmp_path, ".")))


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"text": "a"}, {"messages": [{"role": "user", "content": "a"}]}),
        ({"messages": [], "id": 1}, {"prompt": "a", "completion": "b"}),
        ({"source": "a", "target": "b"}, {"text": "a"}),
        ({"tokens": ["a"], "tags": ["O"]}, {"sentence": "a", "label": 0}),
    ],
)
def test_two_kinds_in_one_file_are_told_with_the_line(
    tmp_path: Path, first: dict[str, Any], then: dict[str, Any]
) -> None:
    file = rows(tmp_path, *[first] * 20, then)
    with pytest.raises(DataError) as caught:
        list(read_documents(source(tmp_path, "a.jsonl")))
    assert caught.value.where == f"{file}:21"
    kinds = []
    for number, row in enumerate((first, then)):
        (tmp_path / str(number)).mkdir()
        rows(tmp_path / str(number), row)
        kinds.append(detect_kind(source(tmp_path / str(number), "a.jsonl")))
    assert f"`{kinds[1]}` after rows of `{kinds[0]}`" in str(caught.value)


def test_two_kinds_in_two_files_are_told_with_the_line(tmp_path: Path) -> None:
    rows(tmp_path, {"source": "a", "target": "b"})
    (tmp_path / "b.jsonl").write_text('\n{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(DataError, match=r"b\.jsonl:2: `completion` after rows of `pair`"):
        list(read_documents(source(tmp_path, ".")))
    (tmp_path / "b.jsonl").unlink()
    (tmp_path / "c.txt").write_text("text")
    with pytest.raises(DataError, match=r"c\.txt:1: `text` after rows of `pair`"):
        list(read_documents(source(tmp_path, ".")))
    with pytest.raises(DataError, match="a text file has no rows of kind `chat`"):
        list(read_documents(source(tmp_path, "c.txt", kind="chat")))


def test_a_row_without_a_column_of_its_kind_is_told_with_the_line(tmp_path: Path) -> None:
    file = rows(tmp_path, {"source": "a", "target": "b"}, {"source": "a"})
    with pytest.raises(DataError, match="no column `target` among `source`") as caught:
        list(read_documents(source(tmp_path, "a.jsonl")))
    assert caught.value.where == f"{file}:2"


# --- examples -----------------------------------------------------------------------------------------


def test_a_label_is_read_when_it_is_asked_for(tmp_path: Path) -> None:
    rows(tmp_path, {"text": "fine", "label": "good"}, {"text": "bad", "label": None})
    plain = list(read_documents(source(tmp_path, "a.jsonl")))
    assert [(document.text, document.example) for document in plain] == [("fine", None), ("bad", None)]
    for options in ({"kind": "labelled"}, {"columns": {"label": "label"}}):
        first, second = read_documents(source(tmp_path, "a.jsonl", **options))
        assert first.example is not None
        assert first.example.fields == {"text": "fine", "label": "good"}
        assert (first.text, first.location) == ("fine", f"{tmp_path / 'a.jsonl'}:1")
        assert (second.example, second.is_empty, second.skip_reason) == (None, True, "no label")
    rows(tmp_path, {"review": "fine", "stars": 5})
    mapped = next(read_examples(source(tmp_path, "a.jsonl", columns={"text": "review", "label": "stars"})))[0]
    assert mapped.fields == {"text": "fine", "label": 5}
    text = next(read_documents(source(tmp_path, "a.jsonl", columns={"text": "review"})))
    assert (text.text, text.example) == ("fine", None)


def test_columns_can_be_renamed_in_every_kind(tmp_path: Path) -> None:
    rows(tmp_path, {"de": "Haus", "en": "house"})
    example, place = next(read_examples(source(tmp_path, "a.jsonl", columns={"source": "de", "target": "en"})))
    assert (example.kind, dict(example.fields)) == ("pair", {"source": "Haus", "target": "house"})
    assert place.endswith("a.jsonl:1")
    rows(tmp_path, {"tokens": ["a"], "pos_tags": [3], "ner_tags": [0]})
    example, _ = next(read_examples(source(tmp_path, "a.jsonl", columns={"tags": "pos_tags"})))
    assert example.fields["tags"] == (3,)


def test_a_summary_of_a_text_is_asked_for(tmp_path: Path) -> None:
    rows(tmp_path, {"text": "long", "summary": "short"})
    for options in ({"kind": "pair"}, {"columns": {"summary": "summary"}}):
        example, _ = next(read_examples(source(tmp_path, "a.jsonl", **options)))
        assert (example.kind, example.fields["source"], example.fields["target"]) == ("pair", "long", "short")


TWO_WAYS = [{"id": str(n), "translation": {"en": f"house {n}", "de": f"Haus {n}"}} for n in range(20)]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_what_is_inside_of_a_column_can_be_named(tmp_path: Path, ending: str) -> None:
    if ending == "jsonl":
        rows(tmp_path, *TWO_WAYS)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TWO_WAYS), tmp_path / "a.parquet")
    plain = [e.fields["target"] for e, _ in read_examples(source(tmp_path, f"a.{ending}"))]
    assert plain == [f"Haus {n}" for n in range(20)]
    turned = {"source": "translation.de", "target": "translation.en"}
    found = [dict(e.fields) for e, _ in read_examples(source(tmp_path, f"a.{ending}", columns=turned))]
    assert found == [{"source": f"Haus {n}", "target": f"house {n}"} for n in range(20)]
    texts = read_documents(source(tmp_path, f"a.{ending}", columns={"text": "translation.de"}))
    assert [document.text for document in texts] == [f"Haus {n}" for n in range(20)]


def test_what_is_not_inside_of_a_column_is_told_with_the_line(tmp_path: Path) -> None:
    file = rows(tmp_path, *TWO_WAYS[:2], {"translation": {"en": "a", "fr": "b"}}, {"translation": "a"}, {"other": 1})
    named = {"source": "translation.en", "target": "translation.de"}
    with pytest.raises(DataError, match=r"there is no `de` in `translation`[\s\S]*`en` or `fr`") as caught:
        list(read_examples(source(tmp_path, "a.jsonl", columns=named)))
    assert caught.value.where == f"{file}:3"
    rows(tmp_path, TWO_WAYS[0], {"translation": "a"})
    with pytest.raises(DataError, match="`translation` is text") as caught:
        list(read_examples(source(tmp_path, "a.jsonl", columns=named)))
    assert caught.value.where == f"{file}:2"
    rows(tmp_path, TWO_WAYS[0], {"other": 1})
    with pytest.raises(DataError, match=r"no column `translation\.en` among `other`|no column `translation\.de` among"):
        list(read_examples(source(tmp_path, "a.jsonl", columns=named)))
    rows(tmp_path, {"a.b": "dotted", "a": {"b": "inside"}})  # a column's own name comes first
    assert next(read_documents(source(tmp_path, "a.jsonl", columns={"text": "a.b"}))).text == "dotted"
    with pytest.raises(DataError, match=r"no column `translatoin\.en`"):
        rows(tmp_path, *TWO_WAYS)
        list(read_examples(source(tmp_path, "a.jsonl", columns={**named, "source": "translatoin.en"})))


def test_a_column_that_only_later_rows_have_is_read(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows(tmp_path, *[{"messages": turns}] * 30, {"messages": turns, "system": "be kind"})
    *_, (last, _) = read_examples(source(tmp_path, "a.jsonl"))
    assert last.messages[0] == {"role": "system", "content": "be kind"}


def test_numbers_in_a_csv_file_are_numbers(tmp_path: Path) -> None:
    def labels(*cells: str) -> list[Any]:
        (tmp_path / "a.csv").write_text("sentence,label\n" + "".join(f"x,{cell}\n" for cell in cells))
        return [example.fields["label"] for example, _ in read_examples(source(tmp_path, "a.csv"))]

    assert labels("1", "-2", "", "10") == [1, -2, 10]
    assert labels("1", "2.5", "3.", ".5e1") == [1, 2.5, 3.0, 5.0]
    assert labels("yes", "1e5", "nan", "1 2") == ["yes", "1e5", "nan", "1 2"]


def test_parquet_gives_the_same_examples_as_lines(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    given = [
        {
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "name": "x"}],
            "system": "s",
        },
        {"messages": [{"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}], "n": 2},
    ]
    rows(tmp_path, *given)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(given), tmp_path / "a.parquet")
    lines, table = (
        [example for example, _ in read_examples(source(tmp_path, name))] for name in ("a.jsonl", "a.parquet")
    )
    assert lines[0].messages[0] == {"role": "system", "content": "s"}
    assert lines == table  # where a message has no name, Parquet says null


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
def test_only_rows_with_the_values_that_are_asked_for(tmp_path: Path, ending: str) -> None:
    """Whatever the columns besides are called, and whether they are read for anything else."""
    given = [{"text": f"row {i}", "task": ["add", "sub", "mul"][i % 3], "size": i // 3} for i in range(9)]
    if ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(given), tmp_path / "a.parquet")
    elif ending == "csv":
        lines = ["text,task,size", *(f"{row['text']},{row['task']},{row['size']}" for row in given)]
        (tmp_path / "a.csv").write_text("\n".join(lines))
    else:
        rows(tmp_path, *given)

    def met(**only: tuple[str, ...]) -> list[int]:
        return [int(d.text[4:]) for d in read_documents(source(tmp_path, f"a.{ending}", row_filter=only)) if d.text]

    assert met(task=("add",)) == [0, 3, 6]
    assert met(task=("add", "mul")) == [0, 2, 3, 5, 6, 8]
    assert met(task=("sub",), size=("0", "2")) == [1, 7]
    with pytest.raises(DataError, match=r"has no document with task div or pow and size 1"):
        met(task=("div", "pow"), size=("1",))
    with pytest.raises(DataError, match=r"no column `tesk`"):
        met(tesk=("add",))


def test_a_text_file_has_nothing_to_choose_by(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(DataError, match="a text file has no columns to filter rows by"):
        list(read_documents(source(tmp_path, "a.txt", row_filter={"task": ("add",)})))


def test_rows_from_which_nothing_can_be_learnt_are_an_error_with_a_place(tmp_path: Path) -> None:
    file = rows(tmp_path, {"prompt": "a", "completion": ""}, {"prompt": "a", "completion": None})
    with pytest.raises(DataError, match=r"no row of .* has anything to learn; .*: empty answer") as caught:
        list(read_documents(source(tmp_path, "a.jsonl")))
    assert caught.value.where == f"{file}:2"


def test_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"source": "a", "target": "b\\ud800"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1: the row holds half a surrogate pair"):
        list(read_documents(source(tmp_path, "a.jsonl")))


def test_running_text_has_no_examples_and_a_conversation_no_labels(tmp_path: Path) -> None:
    rows(tmp_path, {"text": "a"})
    with pytest.raises(DataError, match="running text"):
        list(read_examples(source(tmp_path, "a.jsonl")))
    rows(tmp_path, {"source": "a", "target": "b"})
    with pytest.raises(DataError, match=r"a\.jsonl:1: rows of `pair` have no labels"):
        read_labels(source(tmp_path, "a.jsonl"))


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
    places = [document.location for document in read_documents(source(tmp_path, "a.txt", documents="paragraphs"))]
    assert [place.rpartition(":")[2] for place in places] == ["1", "5", "7"]


def test_auto_depends_on_the_size(tmp_path: Path) -> None:
    line = "x" * 63 + "\n"
    whole = line * (formats.SINGLE_FILE_BYTES // 64)
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
    assert max(map(len, endless)) < formats.PASSAGE_CHARACTERS


def test_a_sea_of_blank_lines_is_not_kept_in_memory(tmp_path: Path) -> None:
    assert texts(tmp_path, "a" + "\n" * 100_000 + "b", "passages") == ["a", "b"]


def solid(parts: list[str]) -> str:
    return "".join("".join(part.split()) for part in parts)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(st.sampled_from("ab \n\n\n\r\t.é\u2028"), min_size=1, max_size=300),
    cut=st.sampled_from(formats.SPLIT_MODES),
    size=st.integers(1, 60),
)
@example(text="a\n\nb\n\nc", cut="passages", size=1)
def test_nothing_is_lost_but_separators(tmp_path: Path, text: str, cut: str, size: int) -> None:
    """Joined, the documents are the text less its white space at the seams."""
    before = formats.PASSAGE_CHARACTERS, formats.PARAGRAPH_CAP, formats.SINGLE_FILE_BYTES
    formats.PASSAGE_CHARACTERS, formats.PARAGRAPH_CAP, formats.SINGLE_FILE_BYTES = size, 2 * size, 40
    try:
        met = texts(tmp_path, text, cut)
    except DataError:
        assert not text.strip()
        return
    finally:
        formats.PASSAGE_CHARACTERS, formats.PARAGRAPH_CAP, formats.SINGLE_FILE_BYTES = before
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
