"""Rows for classifiers, taggers, regression and cloze prompts: labelled examples inside their frame.

Legend: N documents, R rows, T tokens of a row, C classes, K values of a document.

Three layouts: an example with one label (`LabelledRows`), with a tag for each word (`TaggedRows`), and with a mask in its
frame, at which the class's word is the label (`ClozeRows`: pattern-exploiting training, Schick & Schütze 2021, section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from postgrad.data.layouts.rows import IGNORED, Row, RowOptions
from postgrad.data.layouts.windows import MarkedStore, locate_texts, make_ledger, max_text_tokens
from postgrad.data.problem_type import ProblemType
from postgrad.errors import DataError, StageError


class LabelledStore(MarkedStore, Protocol):
    """A token store whose documents have values: a class index, a 0 or 1 for each class, or a number."""

    @property
    def values(self) -> np.ndarray | None: ...

    @property
    def labels(self) -> Sequence[str | int] | None: ...


class FramedExamples:
    """The examples of a store inside a frame, one for each row.

    Texts that do not fit are truncated at their ends: the longer one first, down to the length of the other, then both. The
    frame is never truncated. `skipped` counts documents that are no rows, by reason; `truncations` counts truncated rows.
    Raises `StageError` when a row has no room for text.
    """

    def __init__(self, store: MarkedStore, options: RowOptions) -> None:
        self.store, self.frame = store, options.frame
        max_text_tokens(options.length, self.frame.size(2), 2)
        selected = options.select_documents(store)
        texts = locate_texts(store, selected, options.lead)
        texts = texts.select(texts.size_N > 0)
        self.skipped = {"no text": len(selected.documents) - len(texts.document_N)}
        self.document_R, self.start_R = texts.document_N, texts.start_N
        self.split_R = np.array([_second_text_start(store, *span) for span in texts.spans()], np.int64)
        first_R, second_R = self.split_R - texts.start_N, texts.stop_N - self.split_R
        room_R = options.length - np.where(second_R > 0, self.frame.size(2), self.frame.size(1))
        self.first_R, self.second_R = truncated_lengths(first_R, second_R, room_R)
        lost_R = first_R + second_R - self.first_R - self.second_R
        truncated = int(lost_R.sum())
        self.truncations = {"the end of the longer text": int((lost_R > 0).sum())}
        placed = int((texts.stop_N + texts.has_eos_N).sum()) - truncated
        self.ledger = make_ledger(selected, placed=placed, truncated=truncated, trained=len(self.document_R))

    def __len__(self) -> int:
        return len(self.document_R)

    def ids(self, row: int) -> np.ndarray:
        """The one or two texts inside the frame, of shape (T,)."""
        document, start, split = int(self.document_R[row]), int(self.start_R[row]), int(self.split_R[row])
        first_T = self.store.read(document, start, start + int(self.first_R[row]))
        second = int(self.second_R[row])
        return self.frame.wrap(first_T, self.store.read(document, split, split + second) if second else None)


def truncated_lengths(first: Any, second: Any, max_tokens: Any) -> tuple[Any, Any]:
    """Lengths of two texts (numbers or arrays) cut to `max_tokens` together: the longer first, until both are equal."""
    first_length = np.minimum(first, np.maximum(max_tokens - second, -(-max_tokens // 2)))
    return first_length, np.minimum(second, max_tokens - first_length)


def _second_text_start(store: MarkedStore, document: int, start: int, stop: int) -> int:
    """The start of the second text; `stop` when there is only one."""
    marks = store.marks(document, start, stop)
    if marks is None or not marks.any():
        return stop
    return start + int(np.argmax(marks != 0))


def _label_values(store: LabelledStore, document_R: np.ndarray, kind: ProblemType) -> np.ndarray:
    """The labels of rows: (R,) int64 for classes, (R, C) or (R,) float32. Raises `DataError` for an invalid value."""
    if store.values is None:
        raise DataError("documents without labels", expected="a column of labels")
    values_RK = np.asarray(store.values)[document_R]
    classes = len(store.labels or ())
    match kind:
        case ProblemType.CLASS:
            is_valid_RK = (values_RK >= 0) & (values_RK < classes) & (values_RK == np.floor(values_RK))
            expected = f"a class below {classes:,}"
        case ProblemType.MULTI_LABEL:
            is_valid_RK, expected = (values_RK == 0) | (values_RK == 1), "0 or 1 for each class"
        case _:
            is_valid_RK, expected = np.isfinite(values_RK), "a finite number"
    if not is_valid_RK.all():
        row, column = np.argwhere(~is_valid_RK)[0]
        where = f"document {document_R[row]:,}"
        raise DataError(f"{values_RK[row, column]:g} as a label", where=where, expected=expected)
    if kind == ProblemType.MULTI_LABEL:
        return values_RK.astype(np.float32)
    return values_RK[:, 0].astype(np.int64 if kind == ProblemType.CLASS else np.float32)


class LabelledRows(FramedExamples):
    """Rows of an example each: `input_ids`, `attention_mask`, with `token_types` also `token_type_ids`, of shape (T,).

    Labels: a class of shape () and int64, 0 or 1 for each class of shape (C,), or a number of shape (), both float32.
    Raises `DataError` for a label that is invalid for its `kind`.
    """

    layout = "labelled"
    is_random = False

    def __init__(
        self, store: LabelledStore, options: RowOptions, *, kind: ProblemType, token_types: bool = False
    ) -> None:
        super().__init__(store, options)
        self.token_types = token_types
        self.labels_R = _label_values(store, self.document_R, kind)

    def get_row(self, row: int, position: int) -> Row:
        ids_T = self.ids(row)
        inputs = {"input_ids": ids_T, "attention_mask": np.ones(len(ids_T), np.int64)}
        if self.token_types:
            inputs["token_type_ids"] = self._token_type_ids(row, len(ids_T))
        return Row(inputs, self.labels_R[row, ...], 1)

    def _token_type_ids(self, row: int, length: int) -> np.ndarray:
        """1 from the second text on (Devlin et al. 2019, section 3)."""
        types_T = np.zeros(length, np.int64)
        second = int(self.second_R[row])
        if second:
            types_T[length - second - len(self.frame.suffix_ids) :] = 1
        return types_T


class TaggedRows:
    """Rows of a text each: `input_ids`, `attention_mask`, and labels of shape (T,): the tag at each word's first token.

    Marks are 0 within a word, and 1 + the tag at its start. Texts that do not fit are truncated at their ends. `skipped`,
    `truncations` and `StageError` as for `FramedExamples`.
    """

    layout = "tagged"
    is_random = False

    def __init__(self, store: MarkedStore, options: RowOptions) -> None:
        self.store, self.frame = store, options.frame
        selected = options.select_documents(store)
        texts = locate_texts(store, selected, options.lead)
        max_tokens = max_text_tokens(options.length, self.frame.size(1), 1)
        fitted = replace(texts, stop_N=np.minimum(texts.stop_N, texts.start_N + max_tokens))
        label_count_N = np.array([np.count_nonzero(_read_tags(store, *span)) for span in fitted.spans()], np.int64)
        has_tags_N = label_count_N > 0
        self.texts, self.label_count_R = fitted.select(has_tags_N), label_count_N[has_tags_N]
        self.document_R = self.texts.document_N
        self.skipped = {"no tags": int((~has_tags_N).sum())}
        lost_R = (texts.stop_N - fitted.stop_N)[has_tags_N]
        self.truncations = {"their end": int((lost_R > 0).sum())}
        self.ledger = make_ledger(
            selected,
            placed=int((self.texts.stop_N + self.texts.has_eos_N).sum()),
            truncated=int(lost_R.sum()),
            trained=int(self.label_count_R.sum()),
        )

    def __len__(self) -> int:
        return len(self.document_R)

    def get_row(self, row: int, position: int) -> Row:
        texts = self.texts
        span = int(texts.document_N[row]), int(texts.start_N[row]), int(texts.stop_N[row])
        ids_T = self.frame.wrap(self.store.read(*span))
        tags_T = _read_tags(self.store, *span).astype(np.int64)
        labels_T = np.full(len(ids_T), IGNORED, np.int64)
        begin = len(self.frame.prefix_ids)
        labels_T[begin : begin + len(tags_T)] = np.where(tags_T > 0, tags_T - 1, IGNORED)
        inputs = {"input_ids": ids_T, "attention_mask": np.ones(len(ids_T), np.int64)}
        return Row(inputs, labels_T, int(self.label_count_R[row]))


def _read_tags(store: MarkedStore, document: int, start: int, stop: int) -> np.ndarray:
    marks = store.marks(document, start, stop)
    if marks is None:
        raise DataError("documents without tags", expected="a tag for each word")
    return marks


class ClozeRows(FramedExamples):
    """Rows of an example each: `input_ids`, `attention_mask`, and labels of shape (T,): the class's word at the mask.

    `verbalisers`: one token for each class. Raises `DataError` as `LabelledRows` does, and `StageError` when the frame does
    not have exactly one mask or a class has no word.
    """

    layout = "masked"
    is_random = False

    def __init__(self, store: LabelledStore, options: RowOptions, *, mask_id: int, verbalisers: Sequence[int]) -> None:
        classes = [str(label) for label in store.labels or ()]
        if len(verbalisers) != len(classes):
            raise StageError(
                f"{len(verbalisers):,} words for {len(classes):,} classes ({', '.join(classes)})",
                where="data.sources.label_words",
                expected="one word for each class",
            )
        super().__init__(store, options)
        self.label_ids_R = np.array(verbalisers, np.int64)[_label_values(store, self.document_R, ProblemType.CLASS)]
        self.mask_positions_R = _mask_positions(self, mask_id)

    def get_row(self, row: int, position: int) -> Row:
        ids_T = self.ids(row)
        labels_T = np.full(len(ids_T), IGNORED, np.int64)
        labels_T[self.mask_positions_R[row]] = self.label_ids_R[row]
        return Row({"input_ids": ids_T, "attention_mask": np.ones(len(ids_T), np.int64)}, labels_T, 1)


def _mask_positions(examples: FramedExamples, mask_id: int) -> np.ndarray:
    """The position of the frame's mask in each row; masks within the texts do not count."""
    parts = examples.frame.arrays
    masks = [(part, offset) for part, ids in enumerate(parts) for offset in np.flatnonzero(ids == mask_id).tolist()]
    if len(masks) != 1:
        raise StageError(f"the template has {len(masks):,} masks", where="tuning.template", expected="one mask")
    part, offset = masks[0]
    is_pair_R = examples.second_R > 0
    if part == 1 and not is_pair_R.all():
        raise DataError(
            "an example with only one text",
            where=f"document {examples.document_R[np.argmin(is_pair_R)]:,}",
            expected="two texts, as the mask is between them in the template",
        )
    # Starts of the three parts of the frame: before, between and after the texts.
    separator_R = len(parts[0]) + examples.first_R
    suffix_R = separator_R + len(parts[1]) * is_pair_R + examples.second_R
    return offset + (np.zeros_like(separator_R), separator_R, suffix_R)[part]
