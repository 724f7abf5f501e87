"""How are tokens kept on the disk, and read back without being loaded?

A store is a folder that is never changed once it has its name:

    store.json       what it is: format, vocabulary, dtype, counts, fingerprint, size and sha256 of its files
    documents.npy    a row for each document: shard, start (tokens inside the shard), tokens, bytes, digest
    shard-00000/     tokens.bin: the ids, little-endian, two bytes each up to a vocabulary of 65,536, else 4

While it grows, each finished shard stands beside the others as a folder of its own, published (staged,
synced, renamed). What is found under its final name is therefore whole, wherever the process was killed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from postgrad.errors import DataError
from postgrad.publish import MANIFEST, disk_error, publish, sha256, verify, write_atomically

FORMAT = 1

DOCUMENT = np.dtype([("shard", "<u4"), ("start", "<u8"), ("tokens", "<u4"), ("bytes", "<u8"), ("digest", "<u8")])
"""A row of the document table. `digest` is blake2b-8 of the text's UTF-8 bytes, or of the ids as `<u4`."""


def token_dtype(vocabulary: int) -> np.dtype[Any]:
    """The narrowest of uint16 and uint32 that holds every id below `vocabulary`."""
    return np.dtype("<u2" if vocabulary <= 2**16 else "<u4")


def digest(data: bytes | memoryview) -> int:
    """blake2b of eight bytes, as the document table keeps it."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class TokenStore:
    """A published store, memory-mapped: opening reads the header, a document is read by touching its pages.

    `documents` is the table (one `DOCUMENT` a row), `tokens` and `bytes` the totals over all documents. It
    can be sent to another process: what travels is its path.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.header = header
        self.vocabulary: int = header["vocabulary"]
        self.eos: int = header["eos"]
        self.kind: str = header["kind"]
        self.fingerprint: str = header["fingerprint"]
        self.tokens: int = header["tokens"]
        self.bytes: int = header["bytes"]
        self.empty: int = header["empty"]
        self.dtype = np.dtype(header["dtype"])

    @classmethod
    def open(cls, path: Path) -> TokenStore:
        """The store at `path`. Raises `DataError` when it is not one, or when a file is missing or cut."""
        try:
            header = json.loads((path / "store.json").read_text("utf-8"))
            version = header["format"]
            if version != FORMAT:
                raise DataError(f"a token store of format {version}", where=str(path), expected=f"format {FORMAT}")
            for name, entry in header["files"].items():
                size = (path / name).stat().st_size
                if size != entry["size"]:
                    raise DataError(
                        f"{name} has {size:,} bytes",
                        where=str(path),
                        expected=f"{entry['size']:,} bytes",
                        way_out="delete this folder; it is rebuilt from its source",
                    )
            return cls(path, header)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(
                f"not a token store ({type(error).__name__}: {error})",
                where=str(path),
                expected="a folder with store.json, documents.npy and its shards",
                way_out="delete this folder; it is rebuilt from its source",
            ) from None

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore.open, (self.path,)

    def __len__(self) -> int:
        return int(self.header["documents"])

    @cached_property
    def documents(self) -> np.ndarray:
        return np.load(self.path / "documents.npy", mmap_mode="r", allow_pickle=False)

    @cached_property
    def _shards(self) -> list[np.ndarray]:
        """Plain arrays over the maps: slicing an `np.memmap` costs several times as much."""
        maps = []
        for name, entry in self.header["files"].items():
            if name.endswith("tokens.bin"):
                mapped = np.memmap(self.path / name, self.dtype, "r") if entry["size"] else np.zeros(0, self.dtype)
                maps.append(np.asarray(mapped))
        return maps

    @cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        table = np.asarray(self.documents)
        return table["shard"], table["start"], table["tokens"]

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens `start` to `stop` of a document: a read-only view, `<u2` or `<u4`, nothing copied.

        Bounds are as in slicing from the front (not negative) and never leave the document.
        """
        shards, starts, lengths = self._places
        length = int(lengths[document])
        first = int(starts[document])
        stop = length if stop is None else min(stop, length)
        return self._shards[shards[document]][first + min(start, length) : first + max(stop, 0)]

    def verify(self) -> None:
        """Reads every byte. Raises `DataError` that names the file which is not what was written."""
        for name, entry in self.header["files"].items():
            if sha256(self.path / name) != entry["sha256"]:
                raise DataError(
                    f"{name} was changed after it was written",
                    where=str(self.path),
                    expected=f"sha256 {entry['sha256']}",
                    way_out="delete this folder; it is rebuilt from its source",
                )


# --- writing ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """What a finished shard says of itself (`shard.json`)."""

    number: int
    documents: int
    empty: int
    tokens: int
    bytes: int

    @property
    def met(self) -> int:
        """Documents read for it, the empty ones included: where reading goes on after it."""
        return self.documents + self.empty


def shard_name(number: int) -> str:
    return f"shard-{number:05d}"


class ShardWriter:
    """Writes the tokens and the document table of one shard into a folder, as they come."""

    def __init__(self, folder: Path, number: int, vocabulary: int) -> None:
        self.number, self.vocabulary = number, vocabulary
        self.dtype = token_dtype(vocabulary)
        self.documents = self.tokens = self.bytes = 0
        self._open_tokens = 0
        self._tokens = open(folder / "tokens.bin", "xb", buffering=0)  # noqa: SIM115 (closed in `close`)
        self._table = open(folder / "documents.bin", "xb", buffering=0)  # noqa: SIM115

    def add(
        self,
        ids: np.ndarray,
        lengths: np.ndarray,
        sizes: np.ndarray,
        digests: np.ndarray,
        places: Sequence[str],
        *,
        open_end: bool = False,
    ) -> None:
        """Documents one after another: all their `ids`, and for each its length, UTF-8 bytes, digest, place.

        With `open_end` the last document is not finished: the first one of the next call continues it (and
        gives its bytes and digest). Raises `DataError` with place and id for an id outside the vocabulary,
        which numpy would wrap in silence.
        """
        if not len(lengths):
            return
        if ids.size and (int(ids.max()) >= self.vocabulary or int(ids.min()) < 0):
            at = int(np.argmax((ids >= self.vocabulary) | (ids < 0)))
            document = int(np.searchsorted(np.cumsum(lengths), at, side="right"))
            raise DataError(
                f"token id {int(ids[at]):,}",
                where=places[document],
                expected=f"ids below the vocabulary size, {self.vocabulary:,}",
                way_out="use the tokenizer that belongs to the model",
            )
        _write(self._tokens, ids.astype(self.dtype).tobytes())
        lengths = lengths.astype(np.int64)
        lengths[0] += self._open_tokens
        closed = len(lengths) - open_end
        self._open_tokens = int(lengths[-1]) if open_end else 0
        table = np.zeros(closed, DOCUMENT)
        table["shard"] = self.number
        table["start"] = self.tokens + np.cumsum(lengths[:closed]) - lengths[:closed]
        table["tokens"] = lengths[:closed]
        table["bytes"] = sizes[:closed]
        table["digest"] = digests[:closed]
        _write(self._table, table.tobytes())
        self.documents += closed
        self.tokens += int(lengths[:closed].sum())
        self.bytes += int(table["bytes"].sum())

    def close(self) -> None:
        self._tokens.close()
        self._table.close()


def publish_shard(building: Path, number: int, vocabulary: int, write: Callable[[ShardWriter], int]) -> Shard:
    """Makes shard `number` of what `write(writer)` adds; that call returns how many documents were empty."""
    made: list[Shard] = []

    def fill(folder: Path) -> None:
        writer = ShardWriter(folder, number, vocabulary)
        try:
            empty = write(writer)
        finally:
            writer.close()
        made.append(Shard(number, writer.documents, empty, writer.tokens, writer.bytes))
        (folder / "shard.json").write_bytes(_json(asdict(made[0])))

    publish(building / shard_name(number), fill)
    return made[0]


def finished_shards(building: Path) -> list[Shard]:
    """The shards that an earlier process published, from the first without a gap."""
    shards: list[Shard] = []
    while (folder := building / shard_name(len(shards))).is_dir():
        shards.append(Shard(**json.loads((folder / "shard.json").read_text("utf-8"))))
    return shards


def publish_store(building: Path, final: Path, shards: Sequence[Shard], header: dict[str, Any]) -> TokenStore:
    """Writes the table and the header over finished shards and gives the folder its final name.

    `header` brings vocabulary, eos, kind and fingerprint; the counts come from the shards.
    """
    documents = sum(shard.documents for shard in shards)
    files: dict[str, Any] = {}
    try:
        with open(building / "documents.npy", "wb") as table:
            table.write(_npy_head(documents))
            for shard in shards:
                folder = building / shard_name(shard.number)
                files[f"{folder.name}/tokens.bin"] = verify(folder)["tokens.bin"]
                with open(folder / "documents.bin", "rb") as part:
                    while block := part.read(2**20):
                        table.write(block)
            table.flush()
            os.fsync(table.fileno())
        written = building / "documents.npy"
        files[written.name] = {"size": written.stat().st_size, "sha256": sha256(written)}
        whole = {
            "format": FORMAT,
            **header,
            "dtype": token_dtype(header["vocabulary"]).str,
            "documents": documents,
            "empty": sum(shard.empty for shard in shards),
            "tokens": sum(shard.tokens for shard in shards),
            "bytes": sum(shard.bytes for shard in shards),
            "files": files,
        }
        write_atomically(building / "store.json", _json(whole))
        try:
            os.rename(building, final)
        except OSError:
            if not final.is_dir():
                raise
            shutil.rmtree(building, ignore_errors=True)  # another process was first: its bytes are the same
    except OSError as error:
        raise disk_error(error, final) from error
    return tidied(TokenStore.open(final))


def tidied(store: TokenStore) -> TokenStore:
    """The store, without what was only of use while it grew."""
    for name in store.header["files"]:
        if name.endswith("tokens.bin"):
            folder = (store.path / name).parent
            for leftover in ("documents.bin", "shard.json", MANIFEST):
                with suppress(OSError):  # a cache shared for reading may be read-only
                    (folder / leftover).unlink(missing_ok=True)
    return store


def _npy_head(rows: int) -> bytes:
    """The head of a .npy file, written here so that the table can be streamed behind it."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": np.lib.format.dtype_to_descr(DOCUMENT), "fortran_order": False, "shape": (rows,)}
    )
    return head.getvalue()


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _write(file: io.FileIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
