"""Batches of documents to encode, and the ends of shards. Both depend on the documents alone, so builds are reproducible."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from postgrad.data.read.documents import Document
from postgrad.data.read.row_kinds import RowKind
from postgrad.data.tokens.store import digest

SHARD_CHARACTERS = 64 * 2**20
"""Characters (four for an id) after which a shard ends: the most work that a killed process loses."""

BATCH_CHARACTERS = 2**16
"""Characters that a thread encodes at once. An encoding takes about 110 bytes of memory a character."""
BATCH_DOCUMENTS = 4096

WHOLE_DOCUMENT = 2**19
"""Characters up to which a document is encoded at once (60 MB a thread); a longer one is split between lines."""
PIECE = 2**18


@dataclass(frozen=True, slots=True)
class EncodingBatch:
    """The work of one thread: some documents, or one piece of a long one."""

    documents: list[Document]
    read_count: int
    """Documents that it accounts for, the empty ones included."""
    ends_shard: bool
    is_first: bool = True
    is_last: bool = True
    full_document: tuple[int, int] | None = None
    """Bytes and digest of the document of which this is the last piece."""
    skipped: tuple[str, ...] = ()
    """Reasons of the skipped rows."""
    unused: Mapping[str, int] = field(default_factory=dict)
    """Numbers of rows, by the column that nothing reads."""

    @property
    def kind(self) -> str:
        return document_kind(self.documents[0]) if self.documents else ""


def document_kind(document: Document) -> str:
    """The kind of a document; empty for a skipped row."""
    if document.example is not None:
        return document.example.kind.value
    if document.skip_reason:
        return ""
    return RowKind.TEXT.value if document.text is not None else RowKind.INPUT_IDS.value


def split_batches(documents: Iterator[Document]) -> Iterator[EncodingBatch]:
    """Batches of about `BATCH_CHARACTERS`, and shards of about `SHARD_CHARACTERS`."""
    batch: list[Document] = []
    skipped: list[str] = []
    unused: Counter[str] = Counter()
    size = shard_size = read_count = 0
    for document in documents:
        read_count += 1
        unused.update(document.unused)
        text, ids = document.text, document.ids
        if text is not None and len(text) > WHOLE_DOCUMENT and document.example is None:
            if batch or read_count > 1:
                yield EncodingBatch(batch, read_count - 1, False, skipped=tuple(skipped), unused=unused)
                skipped, unused = [], Counter()
            ends_shard = shard_size + len(text) >= SHARD_CHARACTERS
            yield from _piece_batches(text, document.location, ends_shard)
            batch, size, read_count, shard_size = [], 0, 0, 0 if ends_shard else shard_size + len(text)
            continue
        if not document.is_empty:
            batch.append(document)
            length = len(text) if text is not None else 4 * len(ids)  # type: ignore[arg-type]
            size += length
            shard_size += length
        elif document.skip_reason:
            skipped.append(document.skip_reason)
        ends_shard = shard_size >= SHARD_CHARACTERS
        if ends_shard or size >= BATCH_CHARACTERS or read_count >= BATCH_DOCUMENTS:
            yield EncodingBatch(batch, read_count, ends_shard, skipped=tuple(skipped), unused=unused)
            unused = Counter()
            batch, skipped, size, read_count, shard_size = [], [], 0, 0, 0 if ends_shard else shard_size
    if read_count:
        yield EncodingBatch(batch, read_count, True, skipped=tuple(skipped), unused=unused)


def _piece_batches(text: str, location: str, ends_shard: bool) -> Iterator[EncodingBatch]:
    """The pieces of a long document."""
    data = text.encode()
    full_document = len(data), digest(data)
    del data
    start = 0
    while start < len(text):
        end = _split_position(text, start + PIECE) if len(text) - start > 2 * PIECE else len(text)
        is_last = end == len(text)
        piece = [Document(text[start:end], None, location)]
        yield EncodingBatch(
            piece,
            int(is_last),
            is_last and ends_shard,
            is_first=start == 0,
            is_last=is_last,
            full_document=full_document if is_last else None,
        )
        start = end


_LINE_START = re.compile(r"\n(?=[^\W\d_])")


def _split_position(text: str, limit: int) -> int:
    """A position shortly before `limit` at which a tokenizer splits the text anyway.

    That is after a newline followed by a letter; without one, before a space; without that, at `limit`.
    """
    window = range(max(1, limit - 2**16), limit)
    ends = [match.end() for match in _LINE_START.finditer(text, window.start, window.stop)]
    if ends:
        return ends[-1]
    space = text.rfind(" ", window.start, window.stop)
    return space if space > 0 else limit
