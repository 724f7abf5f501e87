"""Pages of Parquet that unpack to more than their file says are refused before they are read."""

from __future__ import annotations

import io
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from postgrad.data.read import columnar_files, text_lines
from postgrad.data.read.parquet_pages import unpacked_page_bytes
from postgrad.data.read.records import read_records
from postgrad.errors import DataError

COUNT = 300
ROWS = pyarrow.table(
    {"text": [f"one two {i} " * 9 for i in range(COUNT)], "list": [[{"a": i, "b": [True]}] for i in range(COUNT)]}
)


def write(file: Path, **options: Any) -> bytes:
    pyarrow.parquet.write_table(ROWS, file, row_group_size=99, data_page_size=2000, **options)
    return file.read_bytes()


def chunks(data: bytes) -> list[Any]:
    metadata = pyarrow.parquet.ParquetFile(io.BytesIO(data)).metadata
    return [
        metadata.row_group(g).column(c) for g, c in product(range(metadata.num_row_groups), range(metadata.num_columns))
    ]


@pytest.mark.parametrize("is_coded", [True, False])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_the_headers_of_all_pages_are_read(compression: str, version: str, is_coded: bool, tmp_path: Path) -> None:
    """Their sum is what the footer says, which counts the headers as well."""
    options = {"compression": compression, "data_page_version": version, "use_dictionary": is_coded}
    data = write(tmp_path / "a.parquet", write_page_checksum=True, **options)
    for chunk in chunks(data):
        unpacked = unpacked_page_bytes(io.BytesIO(data), chunk)
        assert unpacked < chunk.total_uncompressed_size < 1.5 * unpacked + 200
    assert [row.values["text"] for row in read_records(tmp_path / "a.parquet")] == ROWS["text"].to_pylist()


def lying(file: Path) -> bytes:
    """A file whose first page says that it unpacks to 1 MB; the footer knows nothing of it."""
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["one two " * 20] * 1000}), file, compression="gzip", use_dictionary=False
    )
    data = bytearray(file.read_bytes())
    start = chunks(bytes(data))[0].data_page_offset
    assert data[start : start + 3] == b"\x15\0\x15" and data[start + 5] < 128  # a type of 0, and a size of three bytes
    data[start + 3 : start + 6] = b"\xfe\xff\x7f"
    file.write_bytes(data)
    return bytes(data)


def test_a_page_that_says_more_than_the_footer_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.parquet"
    content = lying(file)
    (chunk,) = chunks(content)
    assert chunk.total_uncompressed_size < 2**18 < unpacked_page_bytes(io.BytesIO(content), chunk) < 2**20
    monkeypatch.setattr(text_lines, "UNPACK_BYTES", 2**18)
    pool, default = pyarrow.proxy_memory_pool(pyarrow.default_memory_pool()), pyarrow.default_memory_pool()
    pyarrow.set_memory_pool(pool)  # whose peak is that of this test
    try:
        with pytest.raises(DataError, match="200 times its size"):
            list(read_records(file))
        assert (pool.max_memory() or 0) < 2**19  # the page alone would take twice that
    finally:
        pyarrow.set_memory_pool(default)
    # The mutant: the footer alone.
    monkeypatch.setattr(columnar_files, "unpacked_page_bytes", lambda raw, chunk: 0)
    with pytest.raises(DataError) as caught:
        list(read_records(file))
    assert "200 times" not in str(caught.value)


def test_a_broken_header_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    content = write(file)
    start = chunks(content)[0].dictionary_page_offset
    for damage in (b"\x1c" * 64, b"\xff" * 64, b"\x15" + b"\x80" * 63, b"\0" * 64, b"\x19\xfc" + b"\xff" * 62):
        file.write_bytes(content[:start] + damage + content[start + 64 :])
        with pytest.raises(DataError, match="not a complete Parquet file") as caught:
            list(read_records(file))
        assert caught.value.where == f"{file}:1"


def test_columns_that_share_their_bytes_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A footer may name the same pages over and over, and each reading takes its time."""
    write(tmp_path / "a.parquet")
    monkeypatch.setattr(columnar_files, "_read_chunks", lambda group, names: [group.column(0)] * 1000)
    with pytest.raises(DataError, match="more bytes than the file"):
        list(read_records(tmp_path / "a.parquet"))
