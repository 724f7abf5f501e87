"""Are the right files found, and is every row of them read, with its place, or refused with its place?"""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from postgrad.data.read import json_stream, text_lines
from postgrad.data.read.documents import read_documents
from postgrad.data.read.files import HubDataset, RawSource, list_files, matches_path
from postgrad.data.read.records import read_hub, read_records
from postgrad.data.read.text_lines import read_lines
from postgrad.errors import DataError

ROWS = [{"text": f'line {n}\n"quoted", ünï'} for n in range(700)]


def packed(data: bytes, name: str) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :])  # two members
    if name.endswith(".zst"):
        half = len(data) // 2
        return zstandard.compress(data[:half]) + zstandard.compress(data[half:])  # two frames
    return data


def encoded(rows: list[dict[str, str]], kind: str) -> bytes:
    if kind == "jsonl":
        return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    if kind == "json":
        return json.dumps(rows, indent=1).encode()
    if kind == "csv":
        cells = (row["text"].replace('"', '""') for row in rows)
        return ("text\r\n" + "".join(f'"{cell}"\r\n' for cell in cells)).encode()
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table, row_group_size=256)
    return table.getvalue()


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_every_row_is_read_whatever_the_file(tmp_path: Path, kind: str, compression: str) -> None:
    file = tmp_path / f"rows.{kind}{compression}"
    file.write_bytes(packed(encoded(ROWS, kind), file.name))
    met = list(read_records(file))
    assert [dict(row.values) for row in met] == ROWS
    assert met[1].location == f"{file}:{4 if kind == 'csv' else 2}"  # in CSV, the line on which the row begins


@pytest.mark.parametrize("block", [1, 7, 64, 2**18])
def test_blocks_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(text_lines, "_BLOCK", block)
    rows = [*ROWS[:20], {"text": "x" * 5000, "n": -12.5e3, "deep": [[{"a": None}]] * 9}]
    for kind in ("json", "jsonl"):
        file = tmp_path / f"a.{kind}"
        file.write_bytes(b"\xef\xbb\xbf" + encoded(rows, kind))
        assert [row.values for row in read_records(file)] == rows
    text = tmp_path / "a.txt"
    text.write_bytes("eins\r\nzwei\rnoch\n\nüüü".encode())
    assert [tuple(line) for line in read_lines(text)] == [
        (1, "eins\r\n"), (2, "zwei\rnoch\n"), (3, "\n"), (4, "üüü"),
    ]  # fmt: skip


VALUES = st.one_of(st.text(), st.integers(), st.floats(allow_nan=False), st.lists(st.none()))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=4), VALUES, max_size=3), max_size=8),
    block=st.integers(1, 40),
    indent=st.sampled_from([None, 0, 2]),
)
def test_json_array_equals_the_parser_of_the_library(
    tmp_path: Path, rows: list[dict[str, object]], block: int, indent: int | None
) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(rows, indent=indent))
    before, text_lines._BLOCK = text_lines._BLOCK, block
    try:
        assert [row.values for row in read_records(file)] == rows
        file.write_text("\n ".join(json.dumps(row, indent=indent) for row in rows))
        assert [row.values for row in read_records(file)] == rows
    finally:
        text_lines._BLOCK = before


def test_seen_adds_up_to_the_size_on_disk(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.jsonl.gz", "a.json.zst", "a.csv", "a.parquet"):
        file = tmp_path / name
        file.write_bytes(packed(encoded(ROWS, name.split(".")[1]), name))
        told: list[int] = []
        list(read_records(file, on_read=told.append))
        assert sum(told) == file.stat().st_size, name


# --- finding ------------------------------------------------------------------------------------------


def test_a_path_that_is_none_matches_nothing(tmp_path: Path) -> None:
    """`list_files` says what is wrong with it."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in ("x" * 5000, "x" * 300, "loop/x"):
        assert not matches_path(tmp_path / "run" / "record.json", path, tmp_path)
        with pytest.raises(DataError):
            list_files(path, tmp_path, where="data")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in (
        "b.txt",
        "a.jsonl",
        "x[1].txt",
        "deep/er/c.md.gz",
        "deep/.hidden.txt",
        ".git/d.txt",
        "deep/e.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("b.txt", ["b.txt"]),
        (".", ["a.jsonl", "b.txt", "deep/er/c.md.gz", "x[1].txt"]),
        ("deep", ["deep/er/c.md.gz"]),
        ("*.txt", ["b.txt", "x[1].txt"]),
        ("x[1].txt", ["x[1].txt"]),
        ("**/*.gz", ["deep/er/c.md.gz"]),
        ("**", ["a.jsonl", "b.txt", "deep/er/c.md.gz", "x[1].txt"]),
    ],
)
def test_files_are_found_in_order(tree: Path, path: str, found: list[str]) -> None:
    assert [str(file.relative_to(tree)) for file in list_files(path, tree, "data").files] == found


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("c.txt", "did you mean 'b.txt'?"),
        ("deap/er/c.md.gz", "did you mean 'deep'?"),
        ("*.parquet", "x[1].txt"),
        ("deep/e.py", "no file of a known kind"),
        ("empty", "the folder empty has no files"),
        ("", "is not a path"),
        ("a\0b", "is not a path"),
        ("x" * 5000, "x"),
    ],
)
def test_what_is_not_found_is_named(tree: Path, path: str, told: str) -> None:
    with pytest.raises(DataError) as caught:
        list_files(path, tree, "data.sources[3]")
    assert "data.sources[3]" in str(caught.value)
    assert told in str(caught.value)


def test_links_are_followed_to_files_and_not_round_in_circles(tree: Path) -> None:
    (tree / "empty" / "loop").symlink_to(tree)
    (tree / "empty" / "link.txt").symlink_to(tree / "b.txt")
    assert [file.name for file in list_files("empty", tree, "data").files] == ["link.txt"]


# --- malformed input ----------------------------------------------------------------------------------

GOOD = b'{"text": "good"}\n'


def parquet(**columns: list[object]) -> bytes:
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), table)
    return table.getvalue()


def bad_utf8_parquet() -> bytes:
    column = pyarrow.array([b"good", b"bad \xff"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), table)
    return table.getvalue()


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


NUMBER = b"1" * 5000
MALFORMED: list[tuple[str, str, bytes | Callable[[], bytes], int | None]] = [
    # what, file name, contents, the line (None: no line is promised)
    ("bad UTF-8", "a.txt", b"fine\nfine\n\xff\n", 3),
    ("cut UTF-8", "a.txt", b"fine\n\xe2\x82", 2),
    ("overlong UTF-8", "a.txt", b"\xc0\x80\n", 1),
    ("surrogate in UTF-8", "a.txt", b"ok\n\xed\xa0\x80\n", 2),
    ("Latin-1", "a.md", "Grüße".encode("latin-1"), 1),
    ("UTF-16 with BOM", "a.txt", "text".encode("utf-16"), 1),
    ("UTF-16 without BOM", "a.txt", "text\n".encode("utf-16-le"), 1),
    ("UTF-16 big-endian", "a.jsonl", b"\xfe\xff" + "text".encode("utf-16-be"), 1),
    ("UTF-16 JSON", "a.json", "[]".encode("utf-16"), 1),
    ("NUL", "a.txt", b"a\nb\0c\n", 2),
    ("NUL in CSV", "a.csv", b"text\na\0b\n", 2),
    ("binary", "a.txt", bytes(range(256)), None),
    ("empty text", "a.txt", b"", None),
    ("only white space", "a.txt", b" \n\n\t\n", None),
    ("only a BOM", "a.txt", b"\xef\xbb\xbf", None),
    ("empty JSON lines", "a.jsonl", b"", None),
    ("only blank lines", "a.jsonl", b"\n\n", None),
    ("bad UTF-8 in JSON lines", "a.jsonl", GOOD + b'{"text": "\xff"}\n', 2),
    ("broken JSON", "a.jsonl", GOOD + b'{"text": "a"\n', 2),
    ("two objects a line", "a.jsonl", GOOD + GOOD.strip() + GOOD, 2),
    ("single quotes", "a.jsonl", b"{'text': 'a'}\n", 1),
    ("trailing comma", "a.jsonl", GOOD * 3 + b'{"text": "a",}\n', 4),
    ("raw line break in a string", "a.jsonl", b'{"text": "a\nb"}\n', 1),
    ("half an escape", "a.jsonl", b'{"text": "\\u12"}\n', 1),
    ("raw control character", "a.jsonl", GOOD + b'{"text": "\x01"}\n', 2),
    ("raw NUL", "a.jsonl", GOOD + b'{"text": "\0"}\n', 2),
    ("half a surrogate pair", "a.jsonl", GOOD + b'{"text": "\\ud800"}\n', 2),
    ("other half of one", "a.jsonl", GOOD + b'{"text": "\\udc00 x"}\n', 2),
    ("nested 100,000 deep", "a.jsonl", GOOD + b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", 2),
    ("nested objects", "a.jsonl", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 1),
    ("nested and cut", "a.json", b"[" * 100_000, 1),
    ("number of 5,000 digits", "a.jsonl", GOOD + b'{"text": ' + NUMBER + b"}\n", 2),
    ("the same in an array", "a.json", b'[\n{"text": ' + NUMBER + b"}]", 2),
    ("number for a text", "a.jsonl", GOOD + b'{"text": 5}\n', 2),
    ("list for a text", "a.jsonl", GOOD + b'{"text": ["a"]}\n', 2),
    ("row is a number", "a.jsonl", GOOD + b"17\n", 2),
    ("row is a string", "a.jsonl", b'"text"\n', 1),
    ("row is null", "a.jsonl", GOOD + b"null\n", 2),
    ("row is a list", "a.jsonl", b'["text"]\n', 1),
    ("NaN row", "a.jsonl", b"NaN\n", 1),
    ("column lost on the way", "a.jsonl", GOOD * 30 + b'{"txt": "a"}\n', 31),
    ("column missing", "a.jsonl", b'{"txet": "a"}\n', 1),
    ("no columns", "a.jsonl", b"{}\n", 1),
    ("chat", "a.jsonl", b'{"messages": [{"role": "user", "content": "hi"}]}\n', 1),
    ("all texts empty", "a.jsonl", b'{"text": ""}\n{"text": null}\n{"text": "  "}\n', None),
    ("ids that are text", "a.jsonl", b'{"input_ids": "1 2"}\n', 1),
    ("ids with a fraction", "a.jsonl", b'{"input_ids": [1]}\n{"input_ids": [1.5]}\n', 2),
    ("ids with a truth", "a.jsonl", b'{"input_ids": [1, true]}\n', 1),
    ("ids with null", "a.jsonl", b'{"input_ids": [1, null]}\n', 1),
    ("negative id", "a.jsonl", b'{"input_ids": [1, -1]}\n', 1),
    ("huge id", "a.jsonl", b'{"input_ids": [1, 123456789012345678901234567890]}\n', 1),
    ("nested ids", "a.jsonl", b'{"input_ids": [[1]]}\n', 1),
    ("array without end", "a.json", b'[{"text": "a"},\n{"text": "b"}\n', 3),
    ("array with a hole", "a.json", b'[{"text": "a"},\n,{"text": "b"}]', 2),
    ("array without comma", "a.json", b'[{"text": "a"}\n{"text": "b"}]', 2),
    ("array with a trailing comma", "a.json", b'[{"text": "a"},\n]', 2),
    ("something behind the array", "a.json", b'[{"text": "a"}]\nx', 2),
    ("string without end", "a.json", b'[\n\n{"text": "a', 3),
    ("bad UTF-8 in an array", "a.json", b'[{"text": "a"},\n{"text": "\xff"}]', 2),
    ("array of numbers", "a.json", b"[1, 2]", 1),
    ("array of arrays", "a.json", b"[[1], [2]]", 1),
    ("empty array", "a.json", b"[]", None),
    ("empty JSON", "a.json", b"", None),
    ("rows under a key", "a.json", b'{"data": [{"text": "a"}]}', 1),
    ("CSV with a lost quote", "a.csv", b'text,n\nfine,1\n"open,2\nmore,3\n', 3),
    ("CSV with text behind a quote", "a.csv", b'text\n"a"b\n', 2),
    ("CSV row too short", "a.csv", b"text,n\na,1\nb\n", 3),
    ("CSV row too long", "a.csv", b"text\na,b\n", 2),
    ("CSV header twice", "a.csv", b"text,text\na,b\n", 1),
    ("CSV header without a name", "a.csv", b",\na,b\n", 1),
    ("CSV of a header only", "a.csv", b"text,n\n", None),
    ("CSV without the column", "a.csv", b"a;b\n1;2\n", 2),
    ("CSV not UTF-8", "a.csv", b"text\n\xe4\n", 2),
    ("gz that is none", "a.txt.gz", b"plain text", 1),
    ("gz cut off", "a.jsonl.gz", gzip.compress(GOOD * 500)[:-20], None),
    ("gz cut in the head", "a.jsonl.gz", gzip.compress(GOOD)[:5], 1),
    ("gz with a wrong sum", "a.jsonl.gz", flipped(gzip.compress(GOOD * 9), -6), 10),
    ("gz with rubbish behind it", "a.jsonl.gz", gzip.compress(GOOD) + b"rubbish", 2),
    ("empty gz", "a.txt.gz", b"", None),
    ("zst that is none", "a.txt.zst", b"plain text", 1),
    ("zst cut off", "a.jsonl.zst", zstandard.compress(GOOD * 500)[:-9], None),
    ("parquet that is none", "a.parquet", b"plain text", None),
    ("parquet cut off", "a.parquet", parquet(text=["a", "b"])[:-30], None),
    ("parquet without its head", "a.parquet", parquet(text=["a", "b"])[60:], None),
    ("empty parquet", "a.parquet", b"", None),
    ("parquet without rows", "a.parquet", parquet(text=pyarrow.array([], pyarrow.string())), None),
    ("parquet with other columns", "a.parquet", parquet(body=["a"]), 1),
    ("parquet of numbers", "a.parquet", parquet(text=[1, 2]), 1),
    ("parquet not UTF-8", "a.parquet", bad_utf8_parquet, 2),
    ("parquet in a cut gz", "a.parquet.gz", gzip.compress(parquet(text=["a"]))[:-30], None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "data", "line"), [case[1:] for case in MALFORMED],
                         ids=[f"{case[1]}: {case[0]}" for case in MALFORMED])  # fmt: skip
def test_malformed_input_is_refused_with_its_place(
    tmp_path: Path, name: str, data: bytes | Callable[[], bytes], line: int | None
) -> None:
    file = tmp_path / name
    file.write_bytes(data() if callable(data) else data)
    with pytest.raises(DataError) as caught:
        for _ in read_documents(RawSource("s", path=name, root=tmp_path, where="data.sources[0]")):
            pass
    assert caught.value.where
    if line is not None:
        assert caught.value.where == f"{file}:{line}"
    assert len(str(caught.value)) < 1000


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name, data in (
        ("a.txt", b"x"),
        ("a.jsonl", b'{"text": "x"}'),
        ("a.json", b'[{"text": "x"}]'),
        ("a.csv", b"text\nx"),
    ):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + data)
        assert [document.text for document in read_documents(RawSource("s", path=name, root=tmp_path))] == ["x"]


def test_caps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_lines, "LINE_CAP", 1000)
    monkeypatch.setattr(json_stream, "VALUE_CAP", 1000)
    monkeypatch.setattr(text_lines, "_BLOCK", 64)
    for name, data in (
        ("a.txt", b"x\n" + b"x" * 1100),
        ("a.jsonl", b'{"text": "a"}\n{"text": "' + b"x" * 1100 + b'"}\n'),
        ("a.json", b'[{"text": "a"},\n{"text": "' + b"x" * 5000 + b'"}]'),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match="more than 1,000") as caught:
            list(read_records(tmp_path / name))
        assert caught.value.where.endswith(":2")


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet", "a.csv.gz"])
def test_a_pipe_is_refused(tmp_path: Path, name: str) -> None:
    """As the path itself, in a folder, by a pattern, and by a link."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder" / name)
    (tmp_path / f"link-{name}").symlink_to(tmp_path / "folder" / name)
    for path in ("folder", f"folder/{name}", "folder/*", "**/*", f"link-{name}", "/dev/zero"):
        with pytest.raises(DataError, match=r"is a named pipe|is a device"):
            list_files(path, tmp_path, "data.sources[0].path")
    with pytest.raises(DataError, match="not a regular file"):
        list(read_records(tmp_path / "folder" / name))


def test_links_that_lead_back_are_not_followed(tmp_path: Path) -> None:
    """Two of them make 2^40 paths, all of them to the same file."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.txt").write_text("words")
    for name in ("first", "second"):
        (tmp_path / "a" / "b" / name).symlink_to(tmp_path / "a")
    for pattern in ("**/*.txt", "a/**", "a/**/x.txt", "**/b/*.txt", "a", "**/**/x.txt"):
        assert list_files(pattern, tmp_path, "data").files == (tmp_path / "a" / "b" / "x.txt",), pattern
    with pytest.raises(DataError, match="no file matches"):
        list_files("**/a/*.txt", tmp_path, "data")


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every compressed kind; without the limit each of these files would be read."""
    rows = [{"text": "x" * 9000 + str(i % 3)} for i in range(200)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"text\n" + b"".join(r["text"].encode() + b"\n" for r in rows)))
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(lines))
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "dictionary.parquet")
    pyarrow.parquet.write_table(
        table, tmp_path / "prefixes.parquet", use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"}
    )
    pyarrow.parquet.write_table(pyarrow.table({"messages": [[row] * 2 for row in rows]}), tmp_path / "nested.parquet")
    pyarrow.parquet.write_table(
        pyarrow.table({"text": pyarrow.nulls(2**19, pyarrow.string())}), tmp_path / "nulls.parquet"
    )
    pyarrow.parquet.write_table(pyarrow.table({"input_ids": [[1] * 2**19]}), tmp_path / "equal.parquet")
    for name, new in (("file", pyarrow.ipc.new_file), ("stream", pyarrow.ipc.new_stream)):
        options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
        with new(str(tmp_path / f"{name}.arrow"), table.schema, options=options) as writer:
            writer.write_table(table)
    zeros, ones = (pyarrow.array([number] * 500, pyarrow.int32()) for number in (0, 1))
    views = pyarrow.table({"text": pyarrow.ListViewArray.from_arrays(zeros, ones, pyarrow.array(["x" * 9000]))})
    with pyarrow.ipc.new_file(str(tmp_path / "views.arrow"), views.schema) as writer:
        writer.write_table(views)
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress((tmp_path / "prefixes.parquet").read_bytes() + bytes(2**22)))
    for file in sorted(tmp_path.iterdir()):
        monkeypatch.setattr(text_lines, "UNPACK_BYTES", 2**30)
        if file.name != "a.parquet.gz":
            assert sum(1 for _ in read_records(file)) in (1, len(rows), 500, 2**19), file.name
        monkeypatch.setattr(text_lines, "UNPACK_BYTES", 2**20)
        with pytest.raises(DataError, match="200 times its size"):
            list(read_records(file))


BOMB = """
    import sys
    from pathlib import Path
    import pyarrow
    from postgrad.data.read import columnar_files, text_lines
    from postgrad.data.read.records import read_records
    from postgrad.errors import DataError
    text_lines.UNPACK_BYTES = 2**26
    if sys.argv[2] == "all at once":
        columnar_files._EXPANDED_BYTES = 2**40
        columnar_files.UnpackLimit.add = lambda self, size: None
    try:
        rows = sum(len(row.values["text"]) > 0 for row, _ in zip(read_records(Path(sys.argv[1])), range(20)))
    except DataError:
        rows = 0
    print(rows, pyarrow.default_memory_pool().max_memory() // 2**20)
"""


@pytest.mark.parametrize("reader", ["as it is", "all at once"])
def test_a_dictionary_is_not_expanded(tmp_path: Path, reader: str) -> None:
    """200 rows of one text of 1 MB in a file of 1 kB; the mutant expands what it reads at once."""
    text = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 200, pyarrow.int32()), ["a" * 1_000_000])
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(BOMB), str(tmp_path / "a.parquet"), reader],
        capture_output=True,
        text=True,
        check=True,
    )
    rows, peak = map(int, done.stdout.split())
    assert (rows == 0 and peak < 100) if reader == "as it is" else (rows == 20 and peak > 150), done.stdout


MEMORY = """
    import resource, sys
    from pathlib import Path
    from postgrad.data.read.records import read_records
    from postgrad.errors import DataError
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = 0
    try:
        for row in read_records(Path(sys.argv[1])):
            rows += 1
    except DataError as error:
        assert "more than" in str(error), error
    print(rows, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.txt.gz", "a.txt.zst"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    """40 MiB of rows, or a line that a bomb of 300 KiB unpacks to 300 MiB."""
    file = tmp_path / name
    row = "x" * 4096
    if name == "a.json":
        file.write_text("[" + ",".join([json.dumps({"text": row})] * 10_000) + "]")
    elif name == "a.csv":
        file.write_text("text\n" + f'"{row}\n{row}"\n' * 5_000)
    else:
        opener = {
            "a.txt.gz": lambda: gzip.open(file, "wb", 1),  # noqa: SIM115
            "a.txt.zst": lambda: zstandard.open(file, "wb"),
        }
        with opener[name]() as stream:
            for _ in range(300):
                stream.write(bytes(120 for _ in range(2**10)) * 2**10)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY), str(file)], capture_output=True, text=True, check=True
    )
    rows, grown = map(int, done.stdout.split())
    assert rows == {"a.json": 10_000, "a.csv": 5_000}.get(name, 0)
    assert grown < (20 if rows else 300), f"{grown} MiB"


# --- the Hub ------------------------------------------------------------------------------------------


def test_a_folder_is_read_as_a_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(encoded(ROWS[:5], "jsonl"))
    rows = list(read_hub(HubDataset("set"), tmp_path, "data.sources[0]"))
    assert [row.values for row in rows] == ROWS[:5]
    assert rows[1].location == "set/train:2"
    with pytest.raises(DataError, match="cannot read"):
        list(read_hub(HubDataset("set", split="nothing"), tmp_path, "data.sources[0]"))


def test_a_source_is_a_path_or_a_hub_data_set() -> None:
    for wrong in ({}, {"path": "a", "hub": HubDataset("b")}):
        with pytest.raises(DataError, match="exactly one"):
            RawSource("s", **wrong)  # type: ignore[arg-type]
