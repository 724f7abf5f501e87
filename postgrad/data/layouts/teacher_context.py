"""Teacher contexts: tokens of a document that a teacher reads, and the model in training does not.

A context is the document's beginning, or a field of its row, whose tokens the store has before the text, with a mark of their
own. Either way it precedes the text that becomes rows, and each row holds its pieces' contexts beside its inputs.

Legend: N documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from postgrad.data.layouts.rows import BeginningContext, ContextOptions, RowContext
from postgrad.data.layouts.windows import MarkedStore, TextSpans, has_marks, read_marks
from postgrad.data.render.renderers import TEACHER_CONTEXT

CONTEXT_TOO_LONG = "context longer than the teacher's window"
"""The reason of skipped documents."""


@dataclass(frozen=True)
class TeacherContexts:
    """The context of each document, in ascending order: its tokens `start_N` to `stop_N`. `skipped`: documents left out."""

    store: MarkedStore
    document_N: np.ndarray
    start_N: np.ndarray
    stop_N: np.ndarray
    skipped: int = 0

    def before(self, document: int, position: int, begin: int, stop: int) -> tuple[RowContext, ...]:
        """The context of a document's piece in a row; nothing where it is empty."""
        index = int(np.searchsorted(self.document_N, document))
        if index == len(self.document_N) or self.start_N[index] == self.stop_N[index]:
            return ()
        ids = self.store.read(document, int(self.start_N[index]), int(self.stop_N[index])).astype(np.int64)
        return (RowContext(ids, position, begin, stop),)

    @property
    def tokens(self) -> int:
        """Tokens of all contexts."""
        return int((self.stop_N - self.start_N).sum())


def split_contexts(
    store: MarkedStore, texts: TextSpans, options: ContextOptions | None, row_length: int, frame_tokens: int
) -> tuple[TextSpans, TeacherContexts]:
    """Texts without their contexts, and the contexts; without `options` they are left out.

    A document whose context does not fit the teacher together with its own row is skipped: a row of at most `row_length`,
    `frame_tokens` included.
    """
    beginning = options.beginning if options else None
    if beginning:
        size_N = np.array([_beginning_size(store, *span, beginning) for span in texts.spans()], np.int64)
    elif has_marks(store):
        size_N = np.array([_marked_size(store, *span) for span in texts.spans()], np.int64)
    else:
        size_N = np.zeros(len(texts.document_N), np.int64)
    context_N = texts.start_N, texts.start_N + size_N
    rest = TextSpans(texts.document_N, context_N[1], texts.stop_N, texts.has_eos_N)
    if options is None or not size_N.any():
        nothing = np.empty(0, np.int64)
        return rest, TeacherContexts(store, nothing, nothing, nothing)
    row_N = np.minimum(rest.size_N + rest.has_eos_N + frame_tokens, row_length)
    fits_N = np.ones(len(size_N), bool) if options.max_positions is None else size_N + row_N <= options.max_positions
    kept = (array[fits_N] for array in (texts.document_N, *context_N))
    return rest.select(fits_N), TeacherContexts(store, *kept, skipped=int((~fits_N).sum()))


def _marked_size(store: MarkedStore, document: int, start: int, stop: int) -> int:
    if start == stop or read_marks(store, document, start, start + 1)[0] != TEACHER_CONTEXT:
        return 0
    is_text = read_marks(store, document, start, stop) != TEACHER_CONTEXT
    return int(np.argmax(is_text)) if is_text.any() else stop - start


def _beginning_size(store: MarkedStore, document: int, start: int, stop: int, beginning: BeginningContext) -> int:
    size = min(beginning.max_tokens, int(beginning.share * (stop - start)))
    ends = np.flatnonzero(beginning.ends_sentence_V[store.read(document, start, start + size)])
    return int(ends[-1]) + 1 if len(ends) else size
