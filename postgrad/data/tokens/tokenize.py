"""How do documents become a token store?

In parallel, restartable and cached. Threads are enough: the `tokenizers` package lets go of Python's lock
while it encodes, and one tokenizer with its cache of words serves them all (measured: as fast as its own
threads, and faster than worker processes). Each document becomes `[bos] + ids + [eos]`, with exactly one eos.

Rows that have parts are put into words by a renderer, which is passed in. Their tokens are found together with
their places in the text, so that each gets the mark of what it stands in, wherever the tokenizer parts the text.

The store's name is the hash of everything its bytes depend on: the files' contents, the tokenizer and the
options. Shards end at places that depend on the documents alone, so that a build which was killed keeps its
finished shards, goes on behind them, and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from postgrad.data.problem_type import ProblemType
from postgrad.data.read import documents as formats
from postgrad.data.read.documents import Document, detect_kind, read_documents, read_labels
from postgrad.data.read.examples import RUNNING_TEXT_KINDS, Example
from postgrad.data.read.files import HubDataset, RawSource, find_files
from postgrad.data.read.labels import Labels, merge_labels
from postgrad.data.render.renderer import RenderedExample, Renderer
from postgrad.data.tokens.store import (
    FORMAT,
    MARK_DTYPE,
    MARKED_FORMAT,
    ExtraColumns,
    ShardWriter,
    TokenStore,
    digest,
    finished_shards,
    publish_shard,
    publish_store,
    remove_leftovers,
)
from postgrad.errors import DataError, DiskError, MissingExtra, ModelError
from postgrad.storage.atomic import disk_error, remove_staging, sha256, write_atomically

SHARD_CHARACTERS = 64 * 2**20
"""Characters (four for an id) after which a shard is closed: what a kill costs at most."""

BATCH_CHARACTERS = 2**16
"""Characters that a thread encodes at once. While an encoding lasts it holds about 110 bytes a character."""
BATCH_DOCUMENTS = 4096

WHOLE_DOCUMENT = 2**19
"""Characters up to which a document is encoded in one go (60 MB a thread); a longer one is cut between lines."""
PIECE = 2**18


@dataclass(frozen=True)
class Encoder:
    """A tokenizer as a value: its `tokenizer.json`, the ids around a document, the size of the vocabulary.

    `vocabulary` is the number of rows of the model's embedding: every id is below it. Raises `ModelError`
    when `bos` or `eos` is not, or when the text is not a tokenizer.
    """

    tokenizer: str
    bos: int | None
    eos: int
    vocabulary: int

    def __post_init__(self) -> None:
        for name, token in (("bos", self.bos), ("eos", self.eos)):
            if token is not None and not 0 <= token < self.vocabulary:
                raise ModelError(
                    f"the {name} id is {token:,}",
                    where="tokenizer",
                    expected=f"an id below the vocabulary size, {self.vocabulary:,}",
                )

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what decides the ids; truncation and padding, which are never used, are left out."""
        try:
            parts = json.loads(self.tokenizer)
            parts.pop("truncation", None)
            parts.pop("padding", None)
        except (ValueError, AttributeError) as error:
            raise _invalid_tokenizer_error(error) from None
        # Not sorted: the vocabulary is long, and whoever writes the file keeps its order.
        written = json.dumps([parts, self.bos, self.eos, self.vocabulary])
        return hashlib.sha256(written.encode()).hexdigest()

    def load(self) -> Tokenizer:
        """The tokenizer, with truncation and padding switched off."""
        try:
            tokenizer = Tokenizer.from_str(self.tokenizer)
        except Exception as error:  # the package raises bare Exception
            raise _invalid_tokenizer_error(error) from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer


def _invalid_tokenizer_error(error: Exception) -> ModelError:
    return ModelError(f"not a tokenizer ({error})", where="tokenizer", expected="the contents of a tokenizer.json")


def build_store(
    source: RawSource,
    encoder: Encoder,
    cache: Path,
    progress: Callable[[int, int], None] | None = None,
    workers: int | None = None,
    renderer: Renderer | None = None,
) -> TokenStore:
    """The store of a source's documents: the one in `cache` if it is there, else built now.

    `progress(bytes_done, bytes_total)` counts bytes of the source's files (the total is 0 where it is
    unknown, as on the Hub). `workers` is the number of threads, by default the cores this process may run on.
    `renderer` puts rows that have parts into words; for running text it makes no difference.
    Raises `DataError` with the place of what cannot be used, and `DiskError` when there is no room.
    """
    if renderer is not None and detect_kind(source) in RUNNING_TEXT_KINDS:
        renderer = None
    try:
        for folder in ("stores", "building", "locks"):
            (cache / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, cache) from error
    inputs = _SourceFiles.from_source(source, cache)
    asked: dict[str, Any] = {} if source.kind in ("auto", "text") else {"kind": source.kind}
    if source.row_filter:
        asked |= {"only": _sorted_filter(source)}
    if renderer is not None:
        asked |= {"format": MARKED_FORMAT, "renderer": renderer.fingerprint}
    fingerprint = _hash(
        {
            "format": FORMAT,
            "encoder": encoder.fingerprint,
            "inputs": inputs.fingerprint,
            "columns": dict(source.columns),
            "documents": source.documents,
            "cuts": [
                formats.SINGLE_FILE_BYTES,
                formats.PASSAGE_CHARACTERS,
                formats.PARAGRAPH_CAP,
                WHOLE_DOCUMENT,
                PIECE,
            ],
            "shard": SHARD_CHARACTERS,
            **asked,
        }
    )
    final = cache / "stores" / fingerprint
    if store := _open_published(final):
        return store
    with file_lock(cache / "locks" / f"{fingerprint}.lock") as alone:
        mine = fingerprint if alone else f"{fingerprint}-{os.getpid()}"
        building = cache / "building" / mine
        return _open_published(final) or _build(source, encoder, renderer, inputs, building, final, progress, workers)


def source_fingerprint(source: RawSource, cache: Path) -> str:
    """Of the contents of a source's files as they are now. Raises `DataError` when one cannot be read."""
    return _SourceFiles.from_source(source, cache).fingerprint


def read_all_labels(sources: Sequence[RawSource], cache: Path) -> Labels:
    """The labels that labelled or tagged sources have together, read once for each state of their files.

    Raises `DataError` as `read_labels` does, and when the sources have labels of different sorts.
    """
    return merge_labels(_cached_labels(source, cache) for source in sources)


def _cached_labels(source: RawSource, cache: Path) -> Labels:
    asked = [
        FORMAT,
        _SourceFiles.from_source(source, cache).fingerprint,
        dict(source.columns),
        source.kind,
        _sorted_filter(source),
    ]
    place = cache / "labels" / f"{_hash(asked)}.json"
    try:
        written = json.loads(place.read_bytes())
        return Labels(ProblemType(written["problem"]), tuple(written["names"]))
    except (OSError, ValueError, KeyError, TypeError):
        labels = read_labels(source)
    with suppress(DiskError):  # only a memo
        write_atomically(place, json.dumps({"problem": labels.problem, "names": labels.names}))
    return labels


def _sorted_filter(source: RawSource) -> dict[str, list[str]]:
    return {column: sorted(values) for column, values in source.row_filter.items()}


def _open_published(final: Path) -> TokenStore | None:
    if not final.is_dir():
        return None
    try:
        return remove_leftovers(TokenStore.open(final))
    except DataError:  # cut or changed since: it is only a cache
        shutil.rmtree(final, ignore_errors=True)
        return None


def _build(
    source: RawSource,
    encoder: Encoder,
    renderer: Renderer | None,
    inputs: _SourceFiles,
    building: Path,
    final: Path,
    progress: Callable[[int, int], None] | None,
    workers: int | None,
) -> TokenStore:
    remove_staging(building)
    tokenizer = encoder.load()
    if renderer is not None:
        tokenizer.post_processor = None  # it adds nothing here, but would take white space out of the tokens' places
    read = 0

    def seen(count: int) -> None:
        nonlocal read
        read += count

    documents = read_documents(source, seen)
    shards = finished_shards(building)
    kind = ""
    for document in islice(documents, sum(shard.read_count for shard in shards)):
        kind = kind or _document_kind(document)

    def encode(batch: _EncodingBatch) -> _EncodedBatch:
        if renderer is None:
            return _encode(batch, tokenizer, encoder)
        return _encode_examples(batch, tokenizer, encoder, renderer)

    extras = ExtraColumns() if renderer is None else ExtraColumns(marks=True, width=renderer.width)
    results = _encode_parallel(_batches(documents), encode, workers or _available_cores())
    with closing(results), _sweep_on_error(building):
        while first := next(results, None):

            def write(writer: ShardWriter, first: tuple[_EncodingBatch, _EncodedBatch] = first) -> int:
                nonlocal kind
                empty = 0
                for batch, encoded in chain([first], results):
                    kind = kind or batch.kind
                    writer.add(*encoded[:5], marks=encoded.marks, values=encoded.values, is_partial=not batch.is_last)
                    writer.skipped.update(batch.skipped + encoded.skipped)
                    empty += batch.read_count - len(encoded.lengths) * batch.is_last
                    if progress:
                        progress(min(read, inputs.size), inputs.size)
                    if batch.ends_shard:
                        break
                inputs.check_unchanged()
                return empty

            shards.append(publish_shard(building, len(shards), encoder.vocabulary, write, extras))
    if not sum(shard.documents for shard in shards):
        shutil.rmtree(building, ignore_errors=True)
        raise DataError(
            f"every document of '{source.name}' is empty",
            where=source.where,
            expected="text that makes tokens",
        )
    header = {
        "vocabulary": encoder.vocabulary,
        "bos": encoder.bos,
        "eos": encoder.eos,
        "kind": kind,
        "fingerprint": final.name,
    }
    if renderer is not None and renderer.labels is not None:
        header |= {"labels": renderer.labels.names or None, "problem": renderer.labels.problem}
    store = publish_store(building, final, shards, header, extras)
    if progress:
        progress(inputs.size, inputs.size)
    return store


@contextmanager
def _sweep_on_error(building: Path) -> Iterator[None]:
    """What was being written when an error came is removed; the finished shards stay for the next time."""
    try:
        yield
    except BaseException:
        remove_staging(building)
        raise


# --- what the bytes depend on -------------------------------------------------------------------------


@dataclass(frozen=True)
class _SourceFiles:
    """The files of a source as they are now, and the hash of their contents."""

    fingerprint: str
    size: int
    files: tuple[tuple[Path, int, int], ...] = ()
    where: str = ""

    @classmethod
    def from_source(cls, source: RawSource, cache: Path) -> _SourceFiles:
        if source.path is not None:
            files = find_files(source.path, source.root, source.where)
        else:
            assert source.hub is not None
            folder = source.root / source.hub.name
            if not folder.is_dir():
                hub = source.hub
                revision = _hub_revision(hub, source.where)
                return cls(_hash([hub.name, hub.subset, hub.split, revision]), 0)
            files = sorted(file for file in folder.rglob("*") if file.is_file())
        memo_file = cache / "hashes.json"
        try:
            memo = json.loads(memo_file.read_bytes())
        except (OSError, ValueError):
            memo = {}
        stats: list[tuple[Path, int, int]] = []
        hashes: list[list[str]] = []
        news: list[str] = []
        try:
            for file in files:
                stat = file.stat()
                key, state = str(file.absolute()), [stat.st_size, stat.st_mtime_ns]
                if memo.get(key, [None])[:2] != state:
                    memo[key] = [*state, sha256(file)]
                    news.append(key)
                stats.append((file, stat.st_size, stat.st_mtime_ns))
                hashes.append([*file.suffixes[-2:], memo[key][2]])
                if time.time_ns() - stat.st_mtime_ns < 2e9:
                    del memo[key]  # younger than the clock's grain: it may change again without a new time
        except OSError as error:
            raise DataError(
                f"{error.filename} cannot be read: {error.strerror}", where=source.where, expected="a readable file"
            ) from None
        if any(key in memo for key in news):
            with suppress(DiskError):  # only a memo
                write_atomically(memo_file, json.dumps(memo))
        parts = hashes if source.hub is None else [source.hub.subset, source.hub.split, hashes]
        return cls(_hash(parts), sum(size for _, size, _ in stats), tuple(stats), source.where)

    def check_unchanged(self) -> None:
        for file, size, time_ns in self.files:
            try:
                now = file.stat()
            except OSError:
                now = None
            if now is None or (now.st_size, now.st_mtime_ns) != (size, time_ns):
                raise DataError(
                    f"{file} was changed while it was read",
                    where=self.where,
                    expected="a file that stays as it is",
                )


def _hub_revision(hub: HubDataset, where: str) -> str:
    """The commit that a Hub data set stands at: a store of yesterday's rows is not taken for today's."""
    if hub.revision and re.fullmatch(r"[0-9a-f]{40}", hub.revision):
        return hub.revision
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise MissingExtra(
            "reading from the Hub needs the package datasets", where=where, hint="pip install datasets"
        ) from None
    try:
        return str(HfApi().dataset_info(hub.name, revision=hub.revision).sha)
    except Exception as error:  # whatever its HTTP client raises
        raise DataError(
            f"the Hub does not tell the state of {hub.name} ({type(error).__name__})",
            where=where,
            expected="a data set that exists, and a connection",
            hint="name a folder, or give `revision` as a commit of 40 digits",
        ) from None


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


@contextmanager
def file_lock(lock: Path) -> Iterator[bool]:
    """One process makes something, others wait for it; a lock dies with its process, however that ends.

    False where there is no such lock: then each process builds for itself, and the first to end has its way.
    """
    try:
        import fcntl
    except ImportError:
        yield False
        return
    locked = False
    with open(lock, "ab") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = True
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:  # a file system without locks
                break
        yield locked


# --- batches ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _EncodingBatch:
    """What one thread encodes at once: some documents, or one piece of a long one."""

    documents: list[Document]
    read_count: int
    """Documents that it accounts for, the empty ones included."""
    ends_shard: bool
    is_first: bool = True
    is_last: bool = True
    full_document: tuple[int, int] | None = None
    """Bytes and digest of the document whose last piece this is."""
    skipped: tuple[str, ...] = ()
    """Why rows were left out that teach nothing."""

    @property
    def kind(self) -> str:
        return _document_kind(self.documents[0]) if self.documents else ""


def _document_kind(document: Document) -> str:
    """What a document is; nothing can be said of a row that was left out."""
    if document.example is not None:
        return document.example.kind
    if document.skip_reason:
        return ""
    return "text" if document.text is not None else "input_ids"


def _batches(documents: Iterator[Document]) -> Iterator[_EncodingBatch]:
    """Where a batch and a shard end depends on the documents alone, so that every build cuts alike."""
    held: list[Document] = []
    skipped: list[str] = []
    size = shard = met = 0
    for document in documents:
        met += 1
        text, ids = document.text, document.ids
        if text is not None and len(text) > WHOLE_DOCUMENT and document.example is None:
            if held or met > 1:
                yield _EncodingBatch(held, met - 1, False)
            data = text.encode()
            whole = len(data), digest(data)
            del data
            ends = shard + len(text) >= SHARD_CHARACTERS
            yield from _piece_batches(text, document.location, whole, ends)
            held, size, met, shard = [], 0, 0, 0 if ends else shard + len(text)
            continue
        if not document.is_empty:
            held.append(document)
            length = len(text) if text is not None else 4 * len(ids)  # type: ignore[arg-type]
            size += length
            shard += length
        elif document.skip_reason:
            skipped.append(document.skip_reason)
        if shard >= SHARD_CHARACTERS:
            yield _EncodingBatch(held, met, True, skipped=tuple(skipped))
            held, skipped, size, met, shard = [], [], 0, 0, 0
        elif size >= BATCH_CHARACTERS or met >= BATCH_DOCUMENTS:
            yield _EncodingBatch(held, met, False, skipped=tuple(skipped))
            held, skipped, size, met = [], [], 0, 0
    if met:
        yield _EncodingBatch(held, met, True, skipped=tuple(skipped))


def _piece_batches(
    text: str, location: str, full_document: tuple[int, int], ends_shard: bool
) -> Iterator[_EncodingBatch]:
    start = 0
    while start < len(text):
        end = _split_position(text, start + PIECE) if len(text) - start > 2 * PIECE else len(text)
        last = end == len(text)
        piece = [Document(text[start:end], None, location)]
        yield _EncodingBatch(piece, int(last), last and ends_shard, start == 0, last, full_document if last else None)
        start = end


_LINE_START = re.compile(r"\n(?=[^\W\d_])")


def _split_position(text: str, limit: int) -> int:
    """A place shortly before `near` where a tokenizer would part the text anyway.

    That is behind a newline that a letter follows; without one, before a space; without that, anywhere.
    """
    window = range(max(1, limit - 2**16), limit)
    ends = [match.end() for match in _LINE_START.finditer(text, window.start, window.stop)]
    if ends:
        return ends[-1]
    space = text.rfind(" ", window.start, window.stop)
    return space if space > 0 else limit


# --- encoding -----------------------------------------------------------------------------------------


class _EncodedBatch(NamedTuple):
    """The non-empty documents of a batch, as `ShardWriter.add` takes them, and why others were left out."""

    ids: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray
    digests: np.ndarray
    locations: list[str]
    marks: np.ndarray | None = None
    values: np.ndarray | None = None
    skipped: tuple[str, ...] = ()


def _encode_parallel(
    batches: Iterator[_EncodingBatch], encode: Callable[[_EncodingBatch], _EncodedBatch], workers: int
) -> Generator[tuple[_EncodingBatch, _EncodedBatch], None, None]:
    """The batches in their order, `workers` of them being encoded while the next ones are read."""
    waiting: deque[tuple[_EncodingBatch, Future[_EncodedBatch]]] = deque()
    with _no_tokenizer_threads(), ThreadPoolExecutor(workers, thread_name_prefix="encode") as pool:
        try:
            for batch in batches:
                waiting.append((batch, pool.submit(encode, batch)))
                if len(waiting) > workers + 1:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _no_tokenizer_threads() -> Iterator[None]:
    """`tokenizers` would start threads of its own inside ours; it looks at this variable at every call."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def _encode(batch: _EncodingBatch, tokenizer: Tokenizer, encoder: Encoder) -> _EncodedBatch:
    if batch.kind not in ("", *RUNNING_TEXT_KINDS):
        raise DataError(
            f"rows of kind `{batch.kind}` where running text is read",
            where=batch.documents[0].location,
            expected="rows with `text` or `input_ids`",
            hint="name the column that holds running text with columns: {text: <column>}",
        )
    flat = array("I")  # filled from lists at half the price of numpy's own ways
    lengths: list[int] = []
    sizes: list[int] = []
    digests: list[int] = []
    places: list[str] = []
    eos, bos = encoder.eos, encoder.bos if batch.is_first else None
    for document, (ids, size, mark) in zip(batch.documents, _tokenize_batch(batch, tokenizer), strict=True):
        if batch.is_last and ids and ids[-1] == eos:
            end = len(ids)
            while end and ids[end - 1] == eos:
                end -= 1
            del ids[end:]
        if bos is not None and ids and ids[0] == bos:
            start = 0
            while start < len(ids) and ids[start] == bos:
                start += 1
            del ids[:start]
        if not ids and batch.is_first and batch.is_last:  # nothing but bos and eos, or all of it normalised away
            continue
        before = len(flat)
        if bos is not None:
            flat.append(bos)
        flat.fromlist(ids)
        if batch.is_last:
            flat.append(eos)
        lengths.append(len(flat) - before)
        sizes.append(size)
        digests.append(mark)
        places.append(document.location)
    return _EncodedBatch(
        np.frombuffer(flat, np.uint32),
        np.array(lengths, np.int64),
        np.array(sizes, np.uint64),
        np.array(digests, np.uint64),
        places,
    )


def _tokenize_batch(batch: _EncodingBatch, tokenizer: Tokenizer) -> Iterator[tuple[list[int], int, int]]:
    """(ids, UTF-8 bytes of the text, digest) of each document."""
    documents = batch.documents
    if not documents:
        return
    try:
        if batch.kind == "text":
            texts = [document.text or "" for document in documents]
            encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            if not (batch.is_first and batch.is_last):
                size, mark = batch.full_document or (0, 0)
                yield encodings[0].ids, size, mark
                return
            for text, encoding in zip(texts, encodings, strict=True):
                data = text.encode()
                yield encoding.ids, len(data), digest(data)
        else:
            arrays = [document.ids for document in documents if document.ids is not None]
            lists = [array.tolist() for array in arrays]
            decoded = tokenizer.decode_batch(lists, skip_special_tokens=True)
            for ids, array, text in zip(lists, arrays, decoded, strict=True):
                yield ids, len(text.encode()), digest(array.astype("<u4").data)
    except (MemoryError, DataError):
        raise
    except Exception as error:  # the package raises bare Exception
        raise _tokenizer_error(error, batch) from None


def _tokenizer_error(error: Exception, batch: _EncodingBatch) -> DataError:
    return DataError(
        f"the tokenizer fails: {error}",
        where=f"{batch.documents[0].location} to {batch.documents[-1].location}",
        expected="a tokenizer that can encode every text",
    )


def _encode_examples(
    batch: _EncodingBatch, tokenizer: Tokenizer, encoder: Encoder, renderer: Renderer
) -> _EncodedBatch:
    """The documents of a batch as `renderer` words them: `[bos] + ids + [eos]` as everywhere, and a mark for each."""
    rendered = [render_example(document.example, document.location, renderer) for document in batch.documents]
    parts = iter(
        _tokenize_with_offsets([text for each in rendered for text in _tokenized_texts(each)], tokenizer, batch)
    )
    ids: list[np.ndarray] = []
    marks: list[np.ndarray] = []
    kept: list[int] = []
    for number, each in enumerate(rendered):
        met = [next(parts) for _ in _tokenized_texts(each)]
        spans = [each.pieces] if each.is_joint else [(piece,) for piece in each.pieces]
        own = np.concatenate([each_ids for each_ids, _ in met])
        its = np.concatenate(
            [token_marks(span, ends, each.mark_first_token) for span, (_, ends) in zip(spans, met, strict=True)]
        )
        others = np.flatnonzero(own != encoder.eos)
        stop = int(others[-1]) + 1 if len(others) else 0
        start = 0
        while encoder.bos is not None and start < stop and own[start] == encoder.bos:
            start += 1
        if start == stop:
            continue
        first = [] if encoder.bos is None else [encoder.bos]
        last = 0 if each.mark_first_token else each.pieces[-1][1]
        ids.append(np.concatenate([first, own[start:stop], [encoder.eos]]))
        marks.append(np.concatenate([[0] * len(first), its[start:stop], [last]]))
        kept.append(number)
    return _EncodedBatch(
        np.concatenate(ids).astype(np.int64) if ids else np.zeros(0, np.int64),
        np.array([len(own) for own in ids], np.int64),
        np.array([len("".join(_tokenized_texts(rendered[number])).encode()) for number in kept], np.uint64),
        np.array([digest((batch.documents[number].text or "").encode()) for number in kept], np.uint64),
        [batch.documents[number].location for number in kept],
        np.concatenate(marks).astype(MARK_DTYPE) if marks else np.zeros(0, MARK_DTYPE),
        np.array([rendered[number].values for number in kept], np.float32).reshape(len(kept), renderer.width),
        ("no tokens",) * (len(rendered) - len(kept)),
    )


def render_example(example: Example | None, location: str, renderer: Renderer) -> RenderedExample:
    """An example in words. Raises the renderer's `DataError`, with the place of the row."""
    assert example is not None
    try:
        return renderer.render(example)
    except DataError as error:
        where = error.where or location
        raise DataError(error.problem, where=where, expected=error.expected, hint=error.hint) from None


def _tokenized_texts(rendered: RenderedExample) -> list[str]:
    """What is tokenised by itself: all pieces as one text, or each."""
    texts = [text for text, _ in rendered.pieces]
    return ["".join(texts)] if rendered.is_joint else texts


def _tokenize_with_offsets(
    texts: list[str], tokenizer: Tokenizer, batch: _EncodingBatch
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each text its ids, and the characters (from, to) that each id stands for, of shape (T, 2)."""
    if not texts:
        return []
    try:
        encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    except Exception as error:  # the package raises bare Exception
        raise _tokenizer_error(error, batch) from None
    return [
        (np.array(encoding.ids, np.int64), np.array(encoding.offsets, np.int64).reshape(-1, 2))
        for encoding in encodings
    ]


def token_marks(pieces: Sequence[tuple[str, int]], offsets: np.ndarray, mark_first_token: bool) -> np.ndarray:
    """The mark of each token, `places` being its characters: the greatest of its pieces' marks.

    With `words` only the first token that a piece has any character of, unless an earlier piece has it already.
    """
    marks = np.zeros(len(offsets), np.int64)
    starts, stops = offsets[:, 0], offsets[:, 1]
    at = 0
    for text, mark in pieces:
        end = at + len(text)
        if mark and text:
            first, last = np.searchsorted(stops, at, "right"), np.searchsorted(starts, end, "left")
            if not mark_first_token:
                marks[first:last] = np.maximum(marks[first:last], mark)
            elif first < last and not marks[first]:
                marks[first] = mark
        at = end
    return marks


def _available_cores() -> int:
    """The cores that this process may run on: more threads than those would only get in each other's way."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1
