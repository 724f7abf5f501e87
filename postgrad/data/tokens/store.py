"""Token stores: folders of memory-mapped token ids on disk, immutable once published.

    store.json       header: format, vocabulary, dtype, counts, fingerprint, size and sha256 of its files
    documents.npy    a row for each document: shard, start (tokens within the shard), tokens, bytes, digest
    shard-00000/     tokens.bin: ids, little-endian, two bytes each up to a vocabulary of 65,536, else 4

Stores of rows with parts (conversations, labelled texts ...) also have:

    shard-00000/     marks.bin: two bytes for each token: answer or context, first or second text, or the tag of the word
                     that starts there
    values.npy       a row of float32 for each document with a label: class, classes or number

During a build each finished shard is published as a folder (staged, synced, renamed), so a folder under its final name is
complete, wherever the process was killed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from postgrad.data.problem_type import ProblemType
from postgrad.errors import CheckpointError, DataError, PostgradError
from postgrad.storage.atomic import (
    MANIFEST,
    disk_errors,
    publish_folder,
    read_manifest,
    remove_folder,
    sha256,
    verify,
    write_all,
)
from postgrad.storage.checked_files import read_checked_json, write_checked_json
from postgrad.storage.read_json import read_json
from postgrad.storage.verification import verify_files

FORMAT = 1
MARKED_FORMAT = 2
"""Of a store with marks; a reader that ignores them would train on context."""

_REBUILD_HINT = "delete this folder; it is rebuilt from its source"

MARK_DTYPE = np.dtype("<u2")
VALUE_DTYPE = np.dtype("<f4")

DOCUMENT_DTYPE = np.dtype([("shard", "<u4"), ("start", "<u8"), ("tokens", "<u4"), ("bytes", "<u8"), ("digest", "<u8")])
"""A row of the document table; `digest`: blake2b-8 of the text's UTF-8 bytes, or of the ids as `<u4`."""


def token_dtype(vocabulary: int) -> np.dtype[Any]:
    """The narrowest of uint16 and uint32 that holds every id below `vocabulary`."""
    return np.dtype("<u2" if vocabulary <= 2**16 else "<u4")


def digest(data: bytes | memoryview) -> int:
    """8-byte blake2b, the content hash of the document table."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class TokenStore:
    """A published store, memory-mapped: opening it reads the header, reading a document touches only its pages.

    `documents` is the table of `DOCUMENT_DTYPE`; `tokens` and `bytes` are totals over all documents. Pickling sends the path
    and the selected documents.
    """

    def __init__(self, path: Path, header: dict[str, Any], indices: np.ndarray | None = None) -> None:
        self.path = path
        self._indices = indices
        self.header = header
        self.vocabulary: int = header["vocabulary"]
        self.eos: int = header["eos"]
        self.kind: str = header["kind"]
        self.fingerprint: str = header["fingerprint"]
        self.tokens: int = header["tokens"]
        self.bytes: int = header["bytes"]
        self.empty_count: int = header["empty"]
        self.labels: list[str | int] | None = header.get("labels")
        """The names of the classes or tags, by index."""
        problem = header.get("problem")
        self.problem = ProblemType(problem) if problem else None
        """Type of the labels in `values` or marks: `class`, `multi`, `number` or `tags`."""
        self.skipped: dict[str, int] = header.get("skipped", {})
        """Numbers of skipped documents (part of the empty ones), by reason."""
        self.unused: dict[str, int] = header.get("unused", {})
        """Numbers of rows, by the column that nothing reads."""
        self.omitted: dict[str, int] = header.get("omitted", {})
        """How often the rendered text leaves out a part of a row, by the part."""
        self.dtype = np.dtype(header["dtype"])

    @classmethod
    def open(cls, path: Path) -> TokenStore:
        """Open the store at `path`. Raises `DataError` when it is none, or a file is missing or truncated."""
        header = read_checked_json(path / "store.json", dict[str, Any], path.name, error=DataError, hint=_REBUILD_HINT)
        try:
            version = header["format"]
            if version not in (FORMAT, MARKED_FORMAT):
                raise DataError(
                    f"a token store of format {version}",
                    where=str(path),
                    expected=f"format {FORMAT} or {MARKED_FORMAT}",
                )
            for name, entry in header["files"].items():
                size = (path / name).stat().st_size
                if size != entry["size"]:
                    raise DataError(
                        f"{name} has {size:,} bytes",
                        where=str(path),
                        expected=f"{entry['size']:,} bytes",
                        hint=_REBUILD_HINT,
                    )
            return cls(path, header)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(
                f"not a token store ({type(error).__name__}: {error})",
                where=str(path),
                expected="a folder with store.json, documents.npy and its shards",
                hint=_REBUILD_HINT,
            ) from None

    def select(self, indices: np.ndarray, fingerprint: str) -> TokenStore:
        """The store reduced to the documents `indices`, in that order, with a fingerprint of its own."""
        table = np.asarray(self.documents)[indices]
        counts = {"documents": len(table), "tokens": int(table["tokens"].sum()), "bytes": int(table["bytes"].sum())}
        stored = np.asarray(indices, np.int64) if self._indices is None else self._indices[indices]
        return TokenStore(self.path, {**self.header, **counts, "fingerprint": fingerprint}, stored)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._indices is not None:
            return _reopen, (self.path, self._indices, self.fingerprint)
        return TokenStore.open, (self.path,)

    def __len__(self) -> int:
        return int(self.header["documents"])

    @cached_property
    def documents(self) -> np.ndarray:
        return self._select_rows(np.load(self.path / "documents.npy", mmap_mode="r", allow_pickle=False))

    @cached_property
    def values(self) -> np.ndarray | None:
        """The label of each document, of shape (documents, K); None without labels.

        K is 1 for `problem` class (an index) and number, and the number of classes for multi (0 or 1 for each).
        """
        if "values.npy" not in self.header["files"]:
            return None
        return self._select_rows(np.load(self.path / "values.npy", mmap_mode="r", allow_pickle=False))

    def _select_rows(self, table: np.ndarray) -> np.ndarray:
        return table if self._indices is None else np.asarray(table)[self._indices]

    @cached_property
    def _shards(self) -> list[np.ndarray]:
        return self._memory_maps("tokens.bin", self.dtype)

    @cached_property
    def _marks(self) -> list[np.ndarray]:
        return self._memory_maps("marks.bin", MARK_DTYPE)

    def _memory_maps(self, ending: str, dtype: np.dtype[Any]) -> list[np.ndarray]:
        """Plain arrays over the maps; slicing an `np.memmap` takes several times as long."""
        maps = []
        for name, entry in self.header["files"].items():
            if name.endswith(ending):
                mapped = np.memmap(self.path / name, dtype, "r") if entry["size"] else np.zeros(0, dtype)
                maps.append(np.asarray(mapped))
        return maps

    @cached_property
    def _document_spans(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        table = np.asarray(self.documents)
        return table["shard"], table["start"], table["tokens"]

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens `start` to `stop` of a document: a read-only view, `<u2` or `<u4`.

        Bounds are not negative, and are clipped to the document.
        """
        return self._slice(self._shards, document, start, stop)

    def marks(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray | None:
        """The marks of the same tokens as `read`; None in a store without marks.

        Rows with answers: 1 for an answer. Labelled rows: 1 for the second text. Tagged rows: the tag's index + 1 where a
        word starts. Otherwise 0.
        """
        return self._slice(self._marks, document, start, stop) if self._marks else None

    def _slice(self, arrays: list[np.ndarray], document: int, start: int, stop: int | None) -> np.ndarray:
        shards, starts, lengths = self._document_spans
        length, first = int(lengths[document]), int(starts[document])
        stop = length if stop is None else min(stop, length)
        return arrays[shards[document]][first + min(start, length) : first + max(stop, 0)]

    def verify(self, cache: Path | None = None) -> None:
        """Verify the files: whole once, then sampled blocks; without `cache` whole. Raises `DataError` for a changed one."""
        try:
            verify_files(self.path, self.header["files"], cache)
        except CheckpointError as error:
            raise DataError(error.problem, where=error.where, expected=error.expected, hint=_REBUILD_HINT) from error


def _reopen(path: Path, indices: np.ndarray, fingerprint: str) -> TokenStore:
    return TokenStore.open(path).select(indices, fingerprint)


# --- writing ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """The description of a finished shard (`shard.json`)."""

    number: int
    documents: int
    empty: int
    tokens: int
    bytes: int
    skipped: dict[str, int] = field(default_factory=dict)
    """Numbers of skipped documents (part of the empty ones), by reason."""
    unused: dict[str, int] = field(default_factory=dict)
    omitted: dict[str, int] = field(default_factory=dict)

    @property
    def read_count(self) -> int:
        """Documents read for it, empty ones included; reading resumes after them."""
        return self.documents + self.empty


def shard_name(number: int) -> str:
    return f"shard-{number:05d}"


@dataclass(frozen=True)
class ExtraColumns:
    """What a store has besides tokens: marks of the tokens, and the number of label values of a document."""

    marks: bool = False
    width: int = 0


NO_EXTRAS = ExtraColumns()


class ShardWriter:
    """Writes one shard to a folder: tokens, marks, values and the document table."""

    def __init__(self, folder: Path, number: int, vocabulary: int, extras: ExtraColumns = NO_EXTRAS) -> None:
        self.number, self.vocabulary = number, vocabulary
        self.dtype = token_dtype(vocabulary)
        self.documents = self.tokens = self.bytes = 0
        self.skipped, self.unused, self.omitted = Counter[str](), Counter[str](), Counter[str]()
        self._open_tokens = 0
        self._tokens = open(folder / "tokens.bin", "xb", buffering=0)  # noqa: SIM115 (closed in `close`)
        self._table = open(folder / "documents.bin", "xb", buffering=0)  # noqa: SIM115
        self._marks = open(folder / "marks.bin", "xb", buffering=0) if extras.marks else None  # noqa: SIM115
        self._values = open(folder / "values.bin", "xb", buffering=0) if extras.width else None  # noqa: SIM115

    def add(
        self,
        ids: np.ndarray,
        lengths: np.ndarray,
        sizes: np.ndarray,
        digests: np.ndarray,
        locations: Sequence[str],
        *,
        marks: np.ndarray | None = None,
        values: np.ndarray | None = None,
        is_partial: bool = False,
    ) -> None:
        """Append documents: their concatenated `ids`, and length, UTF-8 bytes, digest and location of each.

        With `ExtraColumns` also `marks` (one for each id) and `values` (documents, width). `is_partial`: the last document
        is incomplete; the first one of the next call continues it, and has its bytes and digest. Raises `DataError` for an
        id outside of the vocabulary, which numpy would silently wrap.
        """
        if not len(lengths):
            return
        if ids.size and (int(ids.max()) >= self.vocabulary or int(ids.min()) < 0):
            index = int(np.argmax((ids >= self.vocabulary) | (ids < 0)))
            document = int(np.searchsorted(np.cumsum(lengths), index, side="right"))
            raise DataError(
                f"token id {int(ids[index]):,}",
                where=locations[document],
                expected=f"ids below the vocabulary size, {self.vocabulary:,}",
                hint="use the model's own tokenizer",
            )
        write_all(self._tokens, ids.astype(self.dtype).tobytes())
        if self._marks is not None:
            assert marks is not None and len(marks) == len(ids)
            write_all(self._marks, marks.astype(MARK_DTYPE).tobytes())
        if self._values is not None:
            assert values is not None and len(values) == len(lengths)
            write_all(self._values, values.astype(VALUE_DTYPE).tobytes())
        lengths = lengths.astype(np.int64)
        lengths[0] += self._open_tokens
        complete = len(lengths) - is_partial
        self._open_tokens = int(lengths[-1]) if is_partial else 0
        table = np.zeros(complete, DOCUMENT_DTYPE)
        table["shard"] = self.number
        table["start"] = self.tokens + np.cumsum(lengths[:complete]) - lengths[:complete]
        table["tokens"] = lengths[:complete]
        table["bytes"] = sizes[:complete]
        table["digest"] = digests[:complete]
        write_all(self._table, table.tobytes())
        self.documents += complete
        self.tokens += int(lengths[:complete].sum())
        self.bytes += int(table["bytes"].sum())

    def close(self) -> None:
        for file in (self._tokens, self._table, self._marks, self._values):
            if file is not None:
                file.close()


def publish_shard(
    building: Path, number: int, vocabulary: int, write: Callable[[ShardWriter], int], extras: ExtraColumns = NO_EXTRAS
) -> Shard:
    """Write and publish shard `number`; `write(writer)` adds its documents and returns how many were empty."""
    shards: list[Shard] = []

    def fill(folder: Path) -> None:
        writer = ShardWriter(folder, number, vocabulary, extras)
        try:
            empty = write(writer)
        finally:
            writer.close()
        counts = (dict(each) for each in (writer.skipped, writer.unused, writer.omitted))
        shard = Shard(number, writer.documents, empty, writer.tokens, writer.bytes, *counts)
        shards.append(shard)
        (folder / "shard.json").write_text(json.dumps(asdict(shard), indent=1))

    publish_folder(building / shard_name(number), fill)
    return shards[0]


def finished_shards(building: Path) -> list[Shard]:
    """The shards published by an earlier process, up to the first gap or damaged one; those after it are removed."""
    shards: list[Shard] = []
    folders = sorted(building.glob("shard-*"))
    for folder in folders:
        try:
            if folder.name != shard_name(len(shards)):
                break
            verify(folder)
            shards.append(read_json(folder / "shard.json", Shard))
        except PostgradError:
            break
    for folder in folders[len(shards) :]:
        remove_folder(folder)
    return shards


def publish_store(
    building: Path, final: Path, shards: Sequence[Shard], header: dict[str, Any], extras: ExtraColumns = NO_EXTRAS
) -> TokenStore:
    """Write table and header of finished shards, and move the folder to its final name.

    `header` has vocabulary, EOS, kind and fingerprint; the counts come from the shards.
    """
    documents = sum(shard.documents for shard in shards)
    streams = ("tokens.bin", "marks.bin") if extras.marks else ("tokens.bin",)
    files: dict[str, Any] = {}
    with disk_errors(final):
        for shard in shards:
            folder = building / shard_name(shard.number)
            manifest = read_manifest(folder)
            files |= {f"{folder.name}/{stream}": manifest[stream] for stream in streams}
        files["documents.npy"] = _concatenate_shards(
            building, shards, "documents", _npy_header(DOCUMENT_DTYPE, (documents,))
        )
        if extras.width:
            files["values.npy"] = _concatenate_shards(
                building, shards, "values", _npy_header(VALUE_DTYPE, (documents, extras.width))
            )
        if extras.marks:
            header = {**header, "format": MARKED_FORMAT, "skipped": _add_counts(shard.skipped for shard in shards)}
        unused, omitted = (_add_counts(getattr(shard, name) for shard in shards) for name in ("unused", "omitted"))
        header |= ({"unused": unused} if unused else {}) | ({"omitted": omitted} if omitted else {})
        full_header = {
            "format": FORMAT,
            **header,
            "dtype": token_dtype(header["vocabulary"]).str,
            "documents": documents,
            "empty": sum(shard.empty for shard in shards),
            "tokens": sum(shard.tokens for shard in shards),
            "bytes": sum(shard.bytes for shard in shards),
            "files": files,
        }
        write_checked_json(building / "store.json", full_header, final.name)
        try:
            os.rename(building, final)
        except OSError:
            if not final.is_dir():
                raise
            shutil.rmtree(building, ignore_errors=True)  # another process was first, with the same bytes
    return remove_leftovers(TokenStore.open(final))


def _add_counts(parts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(total)


def _concatenate_shards(building: Path, shards: Sequence[Shard], name: str, head: bytes) -> dict[str, str | int]:
    """Concatenate a file of all shards to one .npy file; returns its size and hash."""
    path = building / f"{name}.npy"
    with open(path, "wb") as out:
        out.write(head)
        for shard in shards:
            with open(building / shard_name(shard.number) / f"{name}.bin", "rb") as part:
                while block := part.read(2**20):
                    out.write(block)
        out.flush()
        os.fsync(out.fileno())
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def remove_leftovers(store: TokenStore) -> TokenStore:
    """The store, without the files that only its build used."""
    for name in store.header["files"]:
        if name.endswith("tokens.bin"):
            folder = (store.path / name).parent
            for leftover in ("documents.bin", "values.bin", "shard.json", MANIFEST):
                with suppress(OSError):  # a shared cache may be read-only
                    (folder / leftover).unlink(missing_ok=True)
    return store


def _npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """The header of a .npy file, to which rows can be appended as a stream."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    return head.getvalue()
