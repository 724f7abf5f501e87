"""Which whole examples share a row? Those that fill it best; none is cut where a row ends.

Legend: T positions in a row, N documents, P pieces, R rows, E tokens of a piece with its frame.

A piece is an example, or a window of a plain text that is too long for a row. It has a frame to itself and positions of its
own, so pieces in a row do not see each other. The last token of a piece is only a label, so a piece of E tokens takes E - 1
positions; a window of a text shares that token with the next one, so no label is lost where a text is cut. Beside the ledger
of all layouts, `rows T = padding + sum of (E - 1)`.

Rows are filled with pieces in stored order, 1,024 at a time, the longest first, each where it leaves the least room (best
fit decreasing). With lengths of a log-normal spread this leaves 0.1 to 0.3 % of the positions empty, where rows filled one
after the other leave 2 to 23 %.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from postgrad.data.layouts.rows import IGNORED, Row, RowOptions
from postgrad.data.layouts.windows import (
    MarkedStore,
    TextSpans,
    TooLongPolicy,
    has_marks,
    locate_texts,
    make_ledger,
    max_text_tokens,
)
from postgrad.data.render.frame import Frame
from postgrad.errors import StageError

TrainOn = Literal["answers", "all"]

_MAX_OPEN_ROWS = 1024
"""Pieces that are sorted together, and rows that are open at once."""


@dataclass(frozen=True)
class Pieces:
    """Tokens `start_P` to `stop_P` of documents.

    `ended_P`: the last one is the document's EOS. `positions_P`: what a piece takes of a row. `trained_P`: its labels.
    `stored_P`: the stored tokens that are in it and in no earlier piece, the BOS included.
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
    """Which row each piece goes into, given by the sizes alone."""
    row_P = np.empty(len(size_P), np.int64)
    rooms: list[tuple[int, int]] = []  # room and number of each open row, the fullest first
    rows = 0
    for begin in range(0, len(size_P), _MAX_OPEN_ROWS):
        longest_first = begin + np.argsort(-size_P[begin : begin + _MAX_OPEN_ROWS], kind="stable")
        for piece, size in zip(longest_first.tolist(), size_P[longest_first].tolist(), strict=True):
            fits = bisect_left(rooms, (size, -1))
            if fits < len(rooms):
                room, row = rooms.pop(fits)
            else:
                room, row, rows = length, rows, rows + 1
                if len(rooms) == _MAX_OPEN_ROWS:
                    rooms.pop(0)
            row_P[piece] = row
            insort(rooms, (room - size, row))
    return row_P


class PackedExampleRows:
    """Rows of whole pieces: `input_ids`, `position_ids` and labels of shape (T,), padded as in `PackedRows`.

    `frame.before` stands before each piece, `frame.between` before its first answer; neither is a label. `train_on`: the
    answers alone, or every token (of a plain text it is every token). `too_long`, for an example that does not fit:

        cut-context   leave out its beginning, up to its last answer; never begin inside an answer (a plain text is cut
                      into windows, each with the frame)
        cut-end       leave out its end
        drop          leave it out

    `lead`: tokens at each document's start that the frame replaces (1 for a BOS, which the frame may then begin with).
    `together=False`: each piece is a row, not padded, and `document_R` its document. `skipped` counts documents by the reason
    why they are no pieces, `cut` those that lost something by what it is. Raises `StageError` for a frame that has no place in
    these rows or leaves no room.
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
        most = max_text_tokens(options.length, options.frame.size(2), 1) + 1
        kept = options.select_documents(store)
        texts = locate_texts(store, kept, options.lead)
        self.skipped: dict[str, int] = {}
        self.truncations: dict[str, int] = {}
        self.pieces = (self._example_pieces if self.is_marked else self._text_pieces)(texts, most, too_long)
        size_P = self.pieces.positions_P
        row_P = assign_rows(size_P, options.length) if pack else np.arange(len(size_P))
        self.order_P = np.argsort(row_P, kind="stable")
        self.ends_R = np.cumsum(np.bincount(row_P))
        self.lengths_R = np.full(len(self.ends_R), options.length) if pack else size_P
        self.document_R = None if pack else self.pieces.document_P
        whole_N = texts.stop_N + texts.has_eos_N
        placed = int(self.pieces.stored_P.sum())
        self.ledger = make_ledger(
            kept,
            placed=placed,
            truncated=int(whole_N[np.isin(texts.document_N, self.pieces.document_P)].sum()) - placed,
            padding=int(self.lengths_R.sum() - size_P.sum()),
            trained=int(self.pieces.trained_P.sum()),
        )

    def __len__(self) -> int:
        return len(self.ends_R)

    @property
    def is_random(self) -> bool:
        """Nothing is drawn."""
        return False

    def row_pieces(self, row: int) -> list[int]:
        """The numbers of a row's pieces, in the order in which they stand."""
        return self.order_P[self.ends_R[row - 1] if row else 0 : self.ends_R[row]].tolist()

    def get_row(self, row: int, position: int) -> Row:
        """The row's ids, its labels, and positions that restart with each piece."""
        length = int(self.lengths_R[row])
        ids_T = np.zeros(length, np.int64)
        labels_T = np.full(length, IGNORED, np.int64)
        positions_T = np.empty(length, np.int64)
        at = counted = 0
        for piece in self.row_pieces(row):
            ids, labels = self._piece_tokens(piece)
            end = at + len(labels)
            ids_T[at:end] = ids
            labels_T[at:end] = labels
            positions_T[at:end] = np.arange(len(labels))
            counted += int(self.pieces.trained_P[piece])
            at = end
        positions_T[at:] = np.arange(length - at)
        return Row({"input_ids": ids_T, "position_ids": positions_T}, labels_T, counted)

    def _piece_tokens(self, piece: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and labels of a piece inside its frame, both of shape (E - 1,)."""
        pieces = self.pieces
        place = int(pieces.document_P[piece]), int(pieces.start_P[piece]), int(pieces.stop_P[piece])
        text = self.store.read(*place)
        before, between, _ = self.frame.arrays
        if not self.is_marked:
            ids_E = np.concatenate((before, text))
            labels = ids_E[1:].copy()
            # Not the frame; nor a later window's first token, which was the last label of the window before it.
            labels[: len(labels) - int(pieces.trained_P[piece])] = IGNORED
            return ids_E[:-1], labels
        answered = _answer_mask(self.store, *place, bool(pieces.has_eos_P[piece]))
        asked = answered if self.train_on == "answers" else np.ones(len(text), bool)
        split = int(np.argmax(answered))
        between = between if answered[split] else between[:0]
        none = np.zeros(len(before), bool), np.zeros(len(between), bool)
        ids_E = np.concatenate((before, text[:split], between, text[split:]))
        asked_E = np.concatenate((none[0], asked[:split], none[1], asked[split:]))
        return ids_E[:-1], np.where(asked_E[1:], ids_E[1:], IGNORED)

    def _text_pieces(self, texts: TextSpans, max_tokens: int, too_long: TooLongPolicy) -> Pieces:
        """Plain text: every token but a text's first is a label once, and that too where the frame stands before it."""
        size_N = texts.size_N + texts.has_eos_N
        fine_N = (texts.size_N > 0) & (size_N > 1)
        fits_N = size_N <= max_tokens
        self.skipped["nothing to learn"] = int((~fine_N).sum())
        if too_long == "drop":
            self.skipped["too long"] = int((fine_N & ~fits_N).sum())
            fine_N &= fits_N
        count_N = np.where(fine_N, -(-(size_N - 1) // (max_tokens - 1)), 0)
        if too_long == "cut-end":
            self.truncations["their end"] = int((count_N > 1).sum())
            count_N = np.minimum(count_N, 1)
        text_P = np.repeat(np.arange(len(size_N)), count_N)
        number_P = np.arange(len(text_P)) - (np.cumsum(count_N) - count_N)[text_P]
        origin_P, end_P = texts.start_N[text_P], (texts.start_N + size_N)[text_P]
        start_P = origin_P + number_P * (max_tokens - 1)
        stop_P = np.minimum(start_P + max_tokens, end_P)
        first_P, labels_P = number_P == 0, stop_P - start_P - 1
        framed = len(self.frame.prefix_ids)
        return Pieces(
            texts.document_N[text_P],
            start_P,
            stop_P,
            texts.has_eos_N[text_P] & (stop_P == end_P),
            framed + labels_P,
            labels_P + (first_P if framed else 0),
            labels_P + first_P * (1 + origin_P),
        )

    def _example_pieces(self, texts: TextSpans, max_tokens: int, too_long: TooLongPolicy) -> Pieces:
        """Examples by their marks, one piece each."""
        some_N = texts.size_N > 0
        self.skipped = {"nothing to learn": int((~some_N).sum()), "too long": 0, "answer too long": 0}
        texts = texts.select(some_N)
        lost = {"cut-context": "their beginning", "cut-end": "their end"}.get(too_long, "")
        found: list[tuple[int, ...]] = []
        for (document, start, stop), ended in zip(texts.spans(), texts.has_eos_N.tolist(), strict=True):
            answered = _answer_mask(self.store, document, start, stop + ended, ended)
            whole = len(answered)
            if whole > max_tokens and too_long == "drop":
                self.skipped["too long"] += 1
                continue
            begin, end = (0, whole) if whole <= max_tokens else _CUT_FUNCTIONS[too_long](answered, max_tokens)
            framed, trained = self._piece_sizes(answered[begin:end])
            if not trained:
                self.skipped["answer too long" if answered.any() else "nothing to learn"] += 1
                continue
            if end - begin < whole:
                self.truncations[lost] = self.truncations.get(lost, 0) + 1
            ends = ended and end == whole
            positions = framed + end - begin - 1
            found.append((document, start + begin, start + end, ends, positions, trained, start + end - begin))
        return Pieces(*np.array(found, np.int64).reshape(-1, len(fields(Pieces))).T)

    def _piece_sizes(self, answer_mask: np.ndarray) -> tuple[int, int]:
        """Tokens of frame beside a piece, and its labels: what is asked for, but for a token with nothing before it."""
        if not len(answer_mask):
            return 0, 0
        before, between, _ = map(len, self.frame.arrays)
        asked = answer_mask if self.train_on == "answers" else np.ones_like(answer_mask)
        stands_first = not before and not (between and answer_mask[0])
        return before + between * bool(answer_mask.any()), int(np.count_nonzero(asked[int(stands_first) :]))


def _answer_mask(store: MarkedStore, document: int, start: int, stop: int, has_eos: bool) -> np.ndarray:
    """Which tokens are answers; the EOS is one when the answer runs to it."""
    marks = store.marks(document, start, stop)
    assert marks is not None, "all documents of a store are marked, or none"
    answered = marks == 1
    if has_eos:
        answered[-1] |= answered[-2]
    return answered


def _cut_context(answer_mask: np.ndarray, max_tokens: int) -> tuple[int, int]:
    """The last `most` tokens or fewer, so that they begin with context; none when the last answer does not fit."""
    whole = len(answer_mask)
    begin = whole - max_tokens
    if answer_mask[begin]:
        # Inside an answer (or with nothing before it): go on behind it.
        begin += int(np.argmin(answer_mask[begin:])) or max_tokens
    kept = answer_mask[begin:].any() or not answer_mask.any()
    return (begin, whole) if kept else (0, 0)


def _cut_end(answer_mask: np.ndarray, max_tokens: int) -> tuple[int, int]:
    return 0, max_tokens


_CUT_FUNCTIONS = {"cut-context": _cut_context, "cut-end": _cut_end}


def _check_frame(frame: Frame, is_marked: bool) -> None:
    """Refuse a frame with a part that stands nowhere in these rows."""
    if frame.suffix_ids:
        raise StageError(
            "a template with something behind the text",
            where="data.template",
            expected="nothing behind it: a decoder does not look there",
        )
    if frame.separator_ids and not is_marked:
        raise StageError(
            "a template with two texts",
            where="data.template",
            expected="one text: the documents are plain text, without answers",
        )
