"""Encoding of documents: `prefix + ids + [eos]` with one prefix and one EOS, and a mark for each token of an example.

Threads are enough: the `tokenizers` package releases the GIL while it encodes, and one tokenizer with its cache of words
serves all threads (as fast as its own threads, and faster than worker processes).
"""

from __future__ import annotations

import os
from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from postgrad.data.read.examples import Example
from postgrad.data.read.row_kinds import RUNNING_TEXT_KINDS, RowKind
from postgrad.data.render.frame import count_repeated
from postgrad.data.render.renderer import RenderedExample, Renderer
from postgrad.data.render.renderers import TEACHER_CONTEXT
from postgrad.data.tokens.batches import EncodingBatch
from postgrad.data.tokens.encoder import Encoder
from postgrad.data.tokens.store import MARK_DTYPE, digest
from postgrad.errors import DataError


class EncodedBatch(NamedTuple):
    """The non-empty documents of a batch, as arguments of `ShardWriter.add`, and the reasons of skipped ones."""

    ids: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray
    digests: np.ndarray
    locations: list[str]
    marks: np.ndarray | None = None
    values: np.ndarray | None = None
    skipped: tuple[str, ...] = ()
    omitted: tuple[str, ...] = ()
    """Parts of rows that the rendered text leaves out."""


def encode_parallel(
    batches: Iterator[EncodingBatch], encode: Callable[[EncodingBatch], EncodedBatch], workers: int
) -> Generator[tuple[EncodingBatch, EncodedBatch], None, None]:
    """The batches in order; up to `workers` are encoded while the next ones are read."""
    waiting: deque[tuple[EncodingBatch, Future[EncodedBatch]]] = deque()
    with _no_tokenizer_threads(), ThreadPoolExecutor(workers, thread_name_prefix="encode") as pool:
        try:
            for batch in batches:
                waiting.append((batch, pool.submit(encode, batch)))
                if len(waiting) > workers + 1:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _no_tokenizer_threads() -> Iterator[None]:
    """Keep `tokenizers` from starting threads within ours; it reads this variable at every call."""
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


def encode_batch(batch: EncodingBatch, tokenizer: Tokenizer, encoder: Encoder) -> EncodedBatch:
    """Encode running text, or take over token ids."""
    if batch.kind not in ("", *RUNNING_TEXT_KINDS):
        raise DataError(
            f"rows of kind `{batch.kind}` instead of running text",
            where=batch.documents[0].location,
            expected="rows with `text` or `input_ids`",
            hint="name the column of running text with columns: {text: <column>}",
        )
    flat = array("I")  # filling it from lists takes half as long as numpy's own ways
    lengths: list[int] = []
    sizes: list[int] = []
    digests: list[int] = []
    locations: list[str] = []
    eos, prefix = encoder.eos, encoder.prefix_ids if batch.is_first else ()
    for document, (ids, size, content_hash) in zip(batch.documents, _tokenize_batch(batch, tokenizer), strict=True):
        if batch.is_last and ids and ids[-1] == eos:
            end = len(ids)
            while end and ids[end - 1] == eos:
                end -= 1
            del ids[end:]
        del ids[: count_repeated(ids, prefix)]
        if not ids and batch.is_first and batch.is_last:  # only BOS and EOS, or removed by normalisation
            continue
        before = len(flat)
        flat.extend(prefix)
        flat.fromlist(ids)
        if batch.is_last:
            flat.append(eos)
        lengths.append(len(flat) - before)
        sizes.append(size)
        digests.append(content_hash)
        locations.append(document.location)
    return EncodedBatch(
        np.frombuffer(flat, np.uint32),
        np.array(lengths, np.int64),
        np.array(sizes, np.uint64),
        np.array(digests, np.uint64),
        locations,
    )


def _tokenize_batch(batch: EncodingBatch, tokenizer: Tokenizer) -> Iterator[tuple[list[int], int, int]]:
    """`(ids, UTF-8 bytes of the text, digest)` of each document."""
    documents = batch.documents
    if not documents:
        return
    try:
        if batch.kind == RowKind.TEXT:
            texts = [document.text or "" for document in documents]
            encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            if not (batch.is_first and batch.is_last):
                size, content_hash = batch.full_document or (0, 0)
                yield encodings[0].ids, size, content_hash
                return
            for text, encoding in zip(texts, encodings, strict=True):
                data = text.encode()
                yield encoding.ids, len(data), digest(data)
        else:
            arrays = [document.ids for document in documents if document.ids is not None]
            lists = [ids.tolist() for ids in arrays]
            decoded = tokenizer.decode_batch(lists, skip_special_tokens=True)
            for ids, values, text in zip(lists, arrays, decoded, strict=True):
                yield ids, len(text.encode()), digest(values.astype("<u4").data)
    except (MemoryError, DataError):
        raise
    except Exception as error:  # the package raises bare Exception
        raise _tokenizer_error(error, batch) from None


def _tokenizer_error(error: Exception, batch: EncodingBatch) -> DataError:
    return DataError(
        f"the tokenizer fails: {error}",
        where=f"{batch.documents[0].location} to {batch.documents[-1].location}",
        expected="a tokenizer that can encode every text",
    )


# --- examples -----------------------------------------------------------------------------------------


def encode_examples(batch: EncodingBatch, tokenizer: Tokenizer, encoder: Encoder, renderer: Renderer) -> EncodedBatch:
    """Render and encode examples: `prefix + teacher's context + ids + [eos]`, and a mark for each token."""
    rendered = [render_example(document.example, document.location, renderer) for document in batch.documents]
    texts = [text for each in rendered for text in _tokenized_texts(each)]
    encodings = iter(_tokenize_with_offsets(texts, tokenizer, batch))
    contexts = _tokenize_contexts(batch, tokenizer)
    ids: list[np.ndarray] = []
    marks: list[np.ndarray] = []
    indices: list[int] = []
    for index, each in enumerate(rendered):
        spans = [each.pieces] if each.is_joint else [(piece,) for piece in each.pieces]
        own_ids, own_offsets = zip(*(next(encodings) for _ in spans), strict=True)
        own_marks = [
            token_marks(pieces, offsets, each.mark_first_token)
            for pieces, offsets in zip(spans, own_offsets, strict=True)
        ]
        ids_T, marks_T = np.concatenate(own_ids), np.concatenate(own_marks)
        # A prefix at the start and an EOS at the end are the document's own.
        others = np.flatnonzero(ids_T != encoder.eos)
        stop = int(others[-1]) + 1 if len(others) else 0
        prefix = encoder.prefix_ids
        start = count_repeated(ids_T[:stop], prefix)
        if start == stop:
            continue
        eos_mark = 0 if each.mark_first_token else each.pieces[-1][1]
        context = contexts.get(index, np.empty(0, np.int64))
        ids.append(np.concatenate([np.array(prefix, np.int64), context, ids_T[start:stop], [encoder.eos]]))
        context_marks = np.full(len(context), TEACHER_CONTEXT)
        marks.append(np.concatenate([[0] * len(prefix), context_marks, marks_T[start:stop], [eos_mark]]))
        indices.append(index)
    return EncodedBatch(
        np.concatenate(ids).astype(np.int64) if ids else np.zeros(0, np.int64),
        np.array([len(each) for each in ids], np.int64),
        np.array([len("".join(_tokenized_texts(rendered[index])).encode()) for index in indices], np.uint64),
        np.array([digest((batch.documents[index].text or "").encode()) for index in indices], np.uint64),
        [batch.documents[index].location for index in indices],
        np.concatenate(marks).astype(MARK_DTYPE) if marks else np.zeros(0, MARK_DTYPE),
        np.array([rendered[index].values for index in indices], np.float32).reshape(len(indices), renderer.width),
        ("no tokens",) * (len(rendered) - len(indices)),
        tuple(part for each in rendered for part in each.omitted),
    )


def _tokenize_contexts(batch: EncodingBatch, tokenizer: Tokenizer) -> dict[int, np.ndarray]:
    """The ids of the teacher's contexts, by the index of the document, for those that have one."""
    texts = {i: d.example.teacher_context for i, d in enumerate(batch.documents) if d.example}
    texts = {i: text for i, text in texts.items() if text}
    encodings = _tokenize_with_offsets(list(texts.values()), tokenizer, batch)
    return {i: ids for i, (ids, _) in zip(texts, encodings, strict=True)}


def render_example(example: Example | None, location: str, renderer: Renderer) -> RenderedExample:
    """Render an example. Raises the renderer's `DataError`, with the location of the row."""
    assert example is not None
    try:
        return renderer.render(example)
    except DataError as error:
        where = error.where or location
        raise DataError(error.problem, where=where, expected=error.expected, hint=error.hint) from None


def _tokenized_texts(rendered: RenderedExample) -> list[str]:
    """The texts to tokenise: all pieces joined, or each piece."""
    texts = [text for text, _ in rendered.pieces]
    return ["".join(texts)] if rendered.is_joint else texts


def _tokenize_with_offsets(
    texts: list[str], tokenizer: Tokenizer, batch: EncodingBatch
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The ids of each text, and the characters (from, to) of each id, of shape (T, 2)."""
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
    """The mark of each token: the greatest mark of the pieces that its characters (`offsets`) overlap.

    With `mark_first_token`, only the first token that overlaps a piece, unless an earlier piece has marked it.
    """
    marks = np.zeros(len(offsets), np.int64)
    starts, stops = offsets[:, 0], offsets[:, 1]
    begin = 0
    for text, mark in pieces:
        end = begin + len(text)
        if mark and text:
            # Tokens that end after the piece's start and start before its end.
            first, last = np.searchsorted(stops, begin, "right"), np.searchsorted(starts, end, "left")
            if not mark_first_token:
                marks[first:last] = np.maximum(marks[first:last], mark)
            elif first < last and not marks[first]:
                marks[first] = mark
        begin = end
    return marks
