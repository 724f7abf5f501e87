"""Tokenisation of a source into a token store: parallel, restartable and cached.

A renderer turns rows with parts into text. Their tokens come with character offsets, so that each token gets the mark of the
piece it belongs to, wherever the tokenizer splits the text.

A store's name is the hash of everything its bytes depend on: the contents of the files, the tokenizer and the options. The
ends of shards depend on the documents alone, so a killed build keeps its finished shards, resumes after them, and produces
the same bytes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

from postgrad.data.read import text_files
from postgrad.data.read.documents import READING, detect_kind, read_documents
from postgrad.data.read.files import RawSource
from postgrad.data.read.row_kinds import RUNNING_TEXT_KINDS, RowKind
from postgrad.data.render.renderer import Renderer
from postgrad.data.tokens import batches
from postgrad.data.tokens.batches import EncodingBatch, document_kind, split_batches
from postgrad.data.tokens.encode import EncodedBatch, encode_batch, encode_examples, encode_parallel
from postgrad.data.tokens.encoder import Encoder
from postgrad.data.tokens.source_files import SourceFiles, hash_json, sorted_filter
from postgrad.data.tokens.store import (
    FORMAT,
    MARKED_FORMAT,
    ExtraColumns,
    ShardWriter,
    TokenStore,
    finished_shards,
    publish_shard,
    publish_store,
    remove_leftovers,
)
from postgrad.errors import DataError
from postgrad.storage.atomic import disk_errors, remove_staging
from postgrad.storage.file_lock import file_lock

ProgressCallback = Callable[[int, int], None]
"""Called with the bytes done and the total, in bytes of the source's files (0 where unknown, as on the Hub)."""


def build_store(
    source: RawSource,
    encoder: Encoder,
    cache: Path,
    progress: ProgressCallback | None = None,
    workers: int | None = None,
    renderer: Renderer | None = None,
) -> TokenStore:
    """The token store of a source, from `cache` or built now.

    `workers`: number of threads (default: the cores available to this process). `renderer` turns rows with parts into text;
    running text ignores it. Raises `DataError` with a location for invalid data, and `DiskError` when the disk is full.
    """
    if renderer is not None and detect_kind(source) in RUNNING_TEXT_KINDS:
        renderer = None
    with disk_errors(cache):
        for folder in ("stores", "building", "locks"):
            (cache / folder).mkdir(parents=True, exist_ok=True)
    source_files = SourceFiles.from_source(source, cache)
    fingerprint = _store_fingerprint(source, encoder, renderer, source_files)
    final = cache / "stores" / fingerprint
    if store := _open_published(final, cache):
        return store
    with file_lock(cache / "locks" / f"{fingerprint}.lock") as is_locked:
        building = cache / "building" / (fingerprint if is_locked else f"{fingerprint}-{os.getpid()}")
        return _open_published(final, cache) or _build(
            source, encoder, renderer, source_files, building, final, progress, workers or _available_cores()
        )


def _store_fingerprint(
    source: RawSource, encoder: Encoder, renderer: Renderer | None, source_files: SourceFiles
) -> str:
    # Options at their defaults are left out: new ones must not change the names of existing stores.
    options: dict[str, Any] = {} if source.kind in ("auto", RowKind.TEXT) else {"kind": source.kind}
    if source.no_label is None:
        options["no_label"] = None
    if source.row_filter:
        options["only"] = sorted_filter(source)
    if source.context is not None:
        options["teacher_context"] = list(source.context)
    if renderer is not None:
        options |= {"format": MARKED_FORMAT, "reading": READING, "renderer": renderer.fingerprint}
    cuts = (text_files.SINGLE_FILE_BYTES, text_files.PASSAGE_CHARACTERS, text_files.PARAGRAPH_CAP)
    return hash_json(
        {
            "format": FORMAT,
            "encoder": encoder.fingerprint,
            "inputs": source_files.fingerprint,
            "columns": dict(source.columns),
            "documents": source.documents,
            "cuts": [*cuts, batches.WHOLE_DOCUMENT, batches.PIECE],
            "shard": batches.SHARD_CHARACTERS,
            **options,
        }
    )


def _open_published(final: Path, cache: Path) -> TokenStore | None:
    """The store if it is there and undamaged; a damaged one is removed."""
    if not final.is_dir():
        return None
    try:
        store = remove_leftovers(TokenStore.open(final))
        store.verify(cache)
        return store
    except DataError:
        shutil.rmtree(final, ignore_errors=True)
        return None


def _build(
    source: RawSource,
    encoder: Encoder,
    renderer: Renderer | None,
    source_files: SourceFiles,
    building: Path,
    final: Path,
    progress: ProgressCallback | None,
    workers: int,
) -> TokenStore:
    """Read, encode and write the shards that are missing, then publish the store. (Long: the stages share their state.)"""
    remove_staging(building)
    tokenizer = encoder.load()
    if renderer is not None:
        tokenizer.post_processor = None  # it adds nothing here, but would trim white space from the offsets
    bytes_read = 0

    def on_read(count: int) -> None:
        nonlocal bytes_read
        bytes_read += count

    documents = read_documents(source, on_read)
    shards = finished_shards(building)
    kind = ""
    for document in islice(documents, sum(shard.read_count for shard in shards)):
        kind = kind or document_kind(document)

    def encode(batch: EncodingBatch) -> EncodedBatch:
        if renderer is None:
            return encode_batch(batch, tokenizer, encoder)
        return encode_examples(batch, tokenizer, encoder, renderer)

    extras = ExtraColumns() if renderer is None else ExtraColumns(marks=True, width=renderer.width)
    results = encode_parallel(split_batches(documents), encode, workers)
    with closing(results), _sweep_on_error(building):
        while first := next(results, None):

            def write(writer: ShardWriter, first: tuple[EncodingBatch, EncodedBatch] = first) -> int:
                nonlocal kind
                empty = 0
                for batch, encoded in chain([first], results):
                    kind = kind or batch.kind
                    writer.add(*encoded[:5], marks=encoded.marks, values=encoded.values, is_partial=not batch.is_last)
                    writer.skipped.update(batch.skipped + encoded.skipped)
                    writer.unused.update(batch.unused)
                    writer.omitted.update(encoded.omitted)
                    empty += batch.read_count - len(encoded.lengths) * batch.is_last
                    if progress:
                        progress(min(bytes_read, source_files.size), source_files.size)
                    if batch.ends_shard:
                        break
                source_files.check_unchanged()
                return empty

            shards.append(publish_shard(building, len(shards), encoder.vocabulary, write, extras))
    if not sum(shard.documents for shard in shards):
        shutil.rmtree(building, ignore_errors=True)
        raise DataError(
            f"every document of '{source.name}' is empty",
            where=source.where,
            expected="text with at least one token",
        )
    header = {
        "vocabulary": encoder.vocabulary,
        "bos": encoder.stored_prefix,
        "eos": encoder.eos,
        "kind": kind,
        "fingerprint": final.name,
    }
    if renderer is not None and renderer.labels is not None:
        header |= {"labels": renderer.labels.names or None, "problem": renderer.labels.problem}
    store = publish_store(building, final, shards, header, extras)
    if progress:
        progress(source_files.size, source_files.size)
    return store


@contextmanager
def _sweep_on_error(building: Path) -> Iterator[None]:
    """On an error, remove what was being written; finished shards stay for the next build."""
    try:
        yield
    except BaseException:
        remove_staging(building)
        raise


def _available_cores() -> int:
    """The cores that this process may run on; more threads would only compete."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1
