"""Packed examples: rows filled with whole examples, none of which is cut at a row's border.

Legend: T positions in a row, N documents, P pieces, R rows, E tokens of a piece with its frame.

A piece is an example, or a window of a running text that is too long for a row. Each piece has a frame and position ids of
its own, so pieces in a row do not attend to each other. The last token of a piece is only a label, so a piece of E tokens
takes E - 1 positions; a window of a text shares that token with the next one, so no label is lost where a text is split.
Beside the ledger of all layouts, `rows T = padding + sum of (E - 1)` holds.

Pieces are sorted 1,024 at a time, and the longest go first, each to the row with the least room that fits it (best fit
decreasing). For log-normal lengths this leaves 0.1 to 0.3 % of the positions empty; filling rows in order leaves 2 to 23 %.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from postgrad.data.layouts.rows import IGNORED, Row, RowContext, RowOptions
from postgrad.data.layouts.teacher_context import CONTEXT_TOO_LONG, split_contexts
from postgrad.data.layouts.windows import (
    MarkedStore,
    TextSpans,
    TooLongPolicy,
    has_marks,
    locate_texts,
    make_ledger,
    max_text_tokens,
    read_marks,
)
from postgrad.data.render.frame import Frame
from postgrad.errors import StageError

TrainOn = Literal["answers", "all"]

_MAX_OPEN_ROWS = 1024
"""Pieces sorted together, and rows open at once."""


@dataclass(frozen=True)
class Pieces:
    """Tokens `start_P` to `stop_P` of documents.

    `has_eos_P`: the last token is the document's EOS. `positions_P`: positions that a piece takes of a row. `trained_P`: its
    labels. `stored_P`: stored tokens that are in it and in no earlier piece, the BOS included.
    """

    document_P: np.ndarray
    start_P: np.ndarray
    stop_P: np.ndarray
    has_eos_P: np.ndarray
    positions_P: np.ndarray
    trained_P: np.ndarray
    stored_P: np.ndarray

    def __len__(self) -> int:
        return len(self.document_P)


def assign_rows(size_P: np.ndarray, length: int) -> np.ndarray:
    """The row of each piece, by best fit decreasing on the sizes."""
    row_P = np.empty(len(size_P), np.int64)
    rooms: list[tuple[int, int]] = []  # (room, row) of each open row, sorted: the fullest first
    row_count = 0
    for begin in range(0, len(size_P), _MAX_OPEN_ROWS):
        longest_first = begin + np.argsort(-size_P[begin : begin + _MAX_OPEN_ROWS], kind="stable")
        for piece, size in zip(longest_first.tolist(), size_P[longest_first].tolist(), strict=True):
            best = bisect_left(rooms, (size, -1))  # the first row with room >= size
            if best < len(rooms):
                room, row = rooms.pop(best)
            else:
                room, row, row_count = length, row_count, row_count + 1
                if len(rooms) == _MAX_OPEN_ROWS:
                    rooms.pop(0)
            row_P[piece] = row
            insort(rooms, (room - size, row))
    return row_P


class PackedExampleRows:
    """Rows of whole pieces: `input_ids`, `position_ids` and labels of shape (T,), padded as in `PackedRows`.

    The frame's prefix precedes each piece, its separator the piece's first answer; neither is a label. `train_on`: answers
    only, or all tokens (always the case for running text). `too_long`, for an example that does not fit:

        cut-context   truncate its beginning, at most up to its last answer, and never start within an answer (running
                      text is split into windows, each with the frame)
        cut-end       truncate its end
        drop          drop it

    `pack=False`: each piece is a row of its own, not padded, and `document_R` its document. `skipped` counts documents that
    are no pieces, `truncations` truncated ones, by kind. Raises `StageError` for a frame that does not suit these rows or
    leaves no room.
    """

    layout = "packed"

    def __init__(
        self,
        store: MarkedStore,
        options: RowOptions,
        *,
        train_on: TrainOn = "answers",
        too_long: TooLongPolicy = "cut-context",
        pack: bool = True,
    ) -> None:
        self.store, self.frame, self.train_on = store, options.frame, train_on
        self.is_marked = has_marks(store)
        _check_frame(options.frame, self.is_marked)
        # One more than the positions: the last token is only a label.
        frame_tokens = options.frame.size(2)
        max_tokens = max_text_tokens(options.length, frame_tokens, 1) + 1
        selected = options.select_documents(store)
        texts = locate_texts(store, selected, options.lead)
        texts, self.contexts = split_contexts(store, texts, options.context, options.length, frame_tokens)
        self.skipped: dict[str, int] = {}
        self.truncations: dict[str, int] = {}
        self.pieces = (self._example_pieces if self.is_marked else self._text_pieces)(texts, max_tokens, too_long)
        self.skipped |= {CONTEXT_TOO_LONG: self.contexts.skipped} if self.contexts.skipped else {}
        size_P = self.pieces.positions_P
        row_P = assign_rows(size_P, options.length) if pack else np.arange(len(size_P))
        self.order_P = np.argsort(row_P, kind="stable")
        self.ends_R = np.cumsum(np.bincount(row_P))
        self.lengths_R = np.full(len(self.ends_R), options.length) if pack else size_P
        self.document_R = None if pack else self.pieces.document_P
        full_N = texts.stop_N + texts.has_eos_N
        placed = int(self.pieces.stored_P.sum())
        self.ledger = make_ledger(
            selected,
            placed=placed,
            truncated=int(full_N[np.isin(texts.document_N, self.pieces.document_P)].sum()) - placed,
            padding=int(self.lengths_R.sum() - size_P.sum()),
            trained=int(self.pieces.trained_P.sum()),
        )

    def __len__(self) -> int:
        return len(self.ends_R)

    @property
    def is_random(self) -> bool:
        return False

    def row_pieces(self, row: int) -> list[int]:
        """The indices of a row's pieces, in order."""
        return self.order_P[self.ends_R[row - 1] if row else 0 : self.ends_R[row]].tolist()

    def get_row(self, row: int, position: int) -> Row:
        length = int(self.lengths_R[row])
        ids_T = np.zeros(length, np.int64)
        labels_T = np.full(length, IGNORED, np.int64)
        positions_T = np.empty(length, np.int64)
        begin = label_count = 0
        contexts: tuple[RowContext, ...] = ()
        for piece in self.row_pieces(row):
            ids, labels = self._piece_tokens(piece)
            end = begin + len(labels)
            document = int(self.pieces.document_P[piece])
            contexts += self.contexts.before(document, begin + len(self.frame.prefix_ids), begin, end)
            ids_T[begin:end] = ids
            labels_T[begin:end] = labels
            positions_T[begin:end] = np.arange(len(labels))
            label_count += int(self.pieces.trained_P[piece])
            begin = end
        positions_T[begin:] = np.arange(length - begin)
        return Row({"input_ids": ids_T, "position_ids": positions_T}, labels_T, label_count, contexts)

    def _piece_tokens(self, piece: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and labels of a piece inside its frame, both of shape (E - 1,)."""
        pieces = self.pieces
        span = int(pieces.document_P[piece]), int(pieces.start_P[piece]), int(pieces.stop_P[piece])
        text = self.store.read(*span)
        prefix, separator, _ = self.frame.arrays
        if not self.is_marked:
            ids_E = np.concatenate((prefix, text))
            labels = ids_E[1:].copy()
            # The frame is no label; nor is a later window's first token, the last label of the window before.
            labels[: len(labels) - int(pieces.trained_P[piece])] = IGNORED
            return ids_E[:-1], labels
        is_answer = _answer_mask(self.store, *span, bool(pieces.has_eos_P[piece]))
        is_label = is_answer if self.train_on == "answers" else np.ones(len(text), bool)
        split = int(np.argmax(is_answer))
        separator = separator if is_answer[split] else separator[:0]
        ids_E = np.concatenate((prefix, text[:split], separator, text[split:]))
        is_label_E = np.zeros(len(ids_E), bool)
        is_label_E[len(prefix) : len(prefix) + split] = is_label[:split]
        is_label_E[len(prefix) + split + len(separator) :] = is_label[split:]
        return ids_E[:-1], np.where(is_label_E[1:], ids_E[1:], IGNORED)

    def _text_pieces(self, texts: TextSpans, max_tokens: int, too_long: TooLongPolicy) -> Pieces:
        """Running text: every token but a text's first is a label once, and with a frame the first is one too."""
        size_N = texts.size_N + texts.has_eos_N
        has_labels_N = (texts.size_N > 0) & (size_N > 1)
        fits_N = size_N <= max_tokens
        self.skipped["nothing to learn"] = int((~has_labels_N).sum())
        if too_long == "drop":
            self.skipped["too long"] = int((has_labels_N & ~fits_N).sum())
            has_labels_N &= fits_N
        # Windows overlap by one token, the last label of one and the first input of the next.
        count_N = np.where(has_labels_N, -(-(size_N - 1) // (max_tokens - 1)), 0)
        if too_long == "cut-end":
            self.truncations["their end"] = int((count_N > 1).sum())
            count_N = np.minimum(count_N, 1)
        text_P = np.repeat(np.arange(len(size_N)), count_N)
        number_P = np.arange(len(text_P)) - (np.cumsum(count_N) - count_N)[text_P]
        origin_P, end_P = texts.start_N[text_P], (texts.start_N + size_N)[text_P]
        start_P = origin_P + number_P * (max_tokens - 1)
        stop_P = np.minimum(start_P + max_tokens, end_P)
        is_first_P, labels_P = number_P == 0, stop_P - start_P - 1
        prefix_size = len(self.frame.prefix_ids)
        return Pieces(
            texts.document_N[text_P],
            start_P,
            stop_P,
            texts.has_eos_N[text_P] & (stop_P == end_P),
            positions_P=prefix_size + labels_P,
            trained_P=labels_P + (is_first_P if prefix_size else 0),
            stored_P=labels_P + is_first_P * (1 + origin_P),
        )

    def _example_pieces(self, texts: TextSpans, max_tokens: int, too_long: TooLongPolicy) -> Pieces:
        """Examples by their marks, one piece each."""
        has_text_N = texts.size_N > 0
        self.skipped = {"nothing to learn": int((~has_text_N).sum()), "too long": 0, "answer too long": 0}
        texts = texts.select(has_text_N)
        lost_part = {"cut-context": "their beginning", "cut-end": "their end"}.get(too_long, "")
        pieces: list[tuple[int, ...]] = []
        for (document, start, stop), has_eos in zip(texts.spans(), texts.has_eos_N.tolist(), strict=True):
            is_answer = _answer_mask(self.store, document, start, stop + has_eos, has_eos)
            size = len(is_answer)
            if size > max_tokens and too_long == "drop":
                self.skipped["too long"] += 1
                continue
            begin, end = (0, size) if size <= max_tokens else _CUT_FUNCTIONS[too_long](is_answer, max_tokens)
            frame_size, trained = self._piece_sizes(is_answer[begin:end])
            if not trained:
                self.skipped["answer too long" if is_answer.any() else "nothing to learn"] += 1
                continue
            if end - begin < size:
                self.truncations[lost_part] = self.truncations.get(lost_part, 0) + 1
            positions = frame_size + end - begin - 1
            ends_with_eos = has_eos and end == size
            pieces.append(
                (document, start + begin, start + end, ends_with_eos, positions, trained, start + end - begin)
            )
        return Pieces(*np.array(pieces, np.int64).reshape(-1, len(fields(Pieces))).T)

    def _piece_sizes(self, answer_mask: np.ndarray) -> tuple[int, int]:
        """Frame tokens of a piece, and its labels; a token with nothing before it is no label."""
        if not len(answer_mask):
            return 0, 0
        prefix, separator, _ = map(len, self.frame.arrays)
        is_label = answer_mask if self.train_on == "answers" else np.ones_like(answer_mask)
        starts_row = not prefix and not (separator and answer_mask[0])
        return prefix + separator * bool(answer_mask.any()), int(np.count_nonzero(is_label[int(starts_row) :]))


def _answer_mask(store: MarkedStore, document: int, start: int, stop: int, has_eos: bool) -> np.ndarray:
    """Which tokens are answers; the EOS is one when it follows an answer."""
    is_answer = read_marks(store, document, start, stop) == 1
    if has_eos:
        is_answer[-1] |= is_answer[-2]
    return is_answer


def _cut_context(answer_mask: np.ndarray, max_tokens: int) -> tuple[int, int]:
    """The last `max_tokens` tokens or fewer, starting with context; empty when the last answer does not fit."""
    size = len(answer_mask)
    begin = size - max_tokens
    if answer_mask[begin]:
        # Within an answer, or at the start of one: skip to its end.
        begin += int(np.argmin(answer_mask[begin:])) or max_tokens
    has_answer = answer_mask[begin:].any() or not answer_mask.any()
    return (begin, size) if has_answer else (0, 0)


def _cut_end(answer_mask: np.ndarray, max_tokens: int) -> tuple[int, int]:
    return 0, max_tokens


_CUT_FUNCTIONS = {"cut-context": _cut_context, "cut-end": _cut_end}


def _check_frame(frame: Frame, is_marked: bool) -> None:
    """Refuse a frame with a part that these rows do not use."""
    if frame.suffix_ids:
        raise StageError(
            "the template has a suffix after the text",
            where="tuning.template",
            expected="no suffix: a decoder never attends to it",
        )
    if frame.separator_ids and not is_marked:
        raise StageError(
            "the template has two texts",
            where="tuning.template",
            expected="one text: the documents are running text without answers",
        )
