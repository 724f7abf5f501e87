"""What is a row of a task with labels? One example inside its frame, and its class, its number, its tags or a word for it.

Legend: N documents, R rows, T tokens of a row, C classes, K values of a document.

Three layouts: an example with one label (`LabelledRows`), with a tag for each word (`TaggedRows`), and with a mask in its frame
where a word for the class is to stand (`ClozeRows`: pattern-exploiting training, Schick & Schütze 2021, section 3.1).
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
    """A token store whose documents have values: a class, one of 0 and 1 for each class, or a number."""

    @property
    def values(self) -> np.ndarray | None: ...

    @property
    def labels(self) -> Sequence[str | int] | None: ...


class FramedExamples:
    """The examples of a store inside a frame: ids of a row, and where its second text begins.

    Texts that do not fit are cut at their ends: the longer one until both are equally long, then both; the frame never is.
    `lead`: tokens at each document's start that the frame replaces (1 for a BOS or [CLS]). `skipped` counts documents by the
    reason why they are no rows, `cut` rows that lost something by what it is. Raises `StageError` when a row has no room for
    text.
    """

    def __init__(
        self,
        store: MarkedStore,
        options: RowOptions,
    ) -> None:
        max_text_tokens(options.length, options.frame.size(2), 2)
        self.store, self.frame = store, options.frame
        kept = options.select_documents(store)
        texts = locate_texts(store, kept, options.lead)
        texts = texts.select(texts.size_N > 0)
        self.skipped = {"no text": len(kept.documents) - len(texts.document_N)}
        self.document_R, self.start_R = texts.document_N, texts.start_N
        self.split_R = np.array([_second_text_start(store, *place) for place in texts.spans()], np.int64)
        whole_R, rest_R = self.split_R - texts.start_N, texts.stop_N - self.split_R
        room_R = np.where(rest_R > 0, options.length - self.frame.size(2), options.length - self.frame.size(1))
        self.first_R, self.second_R = truncated_lengths(whole_R, rest_R, room_R)
        lost_R = whole_R + rest_R - self.first_R - self.second_R
        cut = int(lost_R.sum())
        self.truncations = {"the end of the longer text": int((lost_R > 0).sum())}
        placed = int((texts.stop_N + texts.has_eos_N).sum()) - cut
        self.ledger = make_ledger(kept, placed=placed, truncated=cut, trained=len(self.document_R))

    def __len__(self) -> int:
        return len(self.document_R)

    def ids(self, row: int) -> np.ndarray:
        """The one or two texts inside the frame, of shape (T,)."""
        document, start, split = int(self.document_R[row]), int(self.start_R[row]), int(self.split_R[row])
        first_T = self.store.read(document, start, start + int(self.first_R[row]))
        second = int(self.second_R[row])
        return self.frame.wrap(first_T, self.store.read(document, split, split + second) if second else None)


def truncated_lengths(first: Any, second: Any, max_tokens: Any) -> tuple[Any, Any]:
    """How much of two texts (numbers, or arrays of them) is kept: the longer is cut until both are alike, then both."""
    kept = np.minimum(first, np.maximum(max_tokens - second, -(-max_tokens // 2)))
    return kept, np.minimum(second, max_tokens - kept)


def _second_text_start(store: MarkedStore, document: int, start: int, stop: int) -> int:
    """Where the second text begins; at the end, when there is only one."""
    marks = store.marks(document, start, stop)
    if marks is None or not marks.any():
        return stop
    return start + int(np.argmax(marks != 0))


def _label_values(store: LabelledStore, document_R: np.ndarray, kind: ProblemType) -> np.ndarray:
    """The labels of rows: (R,) of int64, (R, C) or (R,) of float32. Raises `DataError` for what is none of its kind."""
    values = store.values
    if values is None:
        raise DataError("documents without labels", expected="a column of labels")
    values_RK = np.asarray(values)[document_R]
    classes = len(store.labels or ())
    fine_RK = {
        ProblemType.CLASS: (values_RK >= 0) & (values_RK < classes) & (values_RK == np.floor(values_RK)),
        ProblemType.MULTI_LABEL: (values_RK == 0) | (values_RK == 1),
        ProblemType.NUMBER: np.isfinite(values_RK),
    }[kind]
    if not fine_RK.all():
        row, column = np.argwhere(~fine_RK)[0]
        raise DataError(
            f"{values_RK[row, column]:g} as a label",
            where=f"document {document_R[row]:,}",
            expected={
                ProblemType.CLASS: f"a class below {classes:,}",
                ProblemType.MULTI_LABEL: "0 or 1 for each class",
                ProblemType.NUMBER: "a finite number",
            }[kind],
        )
    return {
        ProblemType.CLASS: lambda: values_RK[:, 0].astype(np.int64),
        ProblemType.MULTI_LABEL: lambda: values_RK.astype(np.float32),
        ProblemType.NUMBER: lambda: values_RK[:, 0].astype(np.float32),
    }[kind]()


class LabelledRows:
    """Rows of an example each: `input_ids`, `attention_mask`, with `types` also `token_type_ids`, all of shape (T,).

    The labels are a class of shape () and int64, 0 or 1 for each class of shape (C,), or a number of shape (), both float32.
    Options and errors as for `Examples`; `DataError` for a label that is none of its kind.
    """

    layout = "labelled"
    is_random = False

    def __init__(
        self,
        store: LabelledStore,
        options: RowOptions,
        *,
        kind: ProblemType,
        token_types: bool = False,
    ) -> None:
        self.examples = FramedExamples(
            store,
            options,
        )
        self.token_types = token_types
        self.document_R, self.skipped, self.truncations, self.ledger = (
            self.examples.document_R,
            self.examples.skipped,
            self.examples.truncations,
            self.examples.ledger,
        )
        self.labels_R = _label_values(store, self.document_R, kind)

    def __len__(self) -> int:
        return len(self.examples)

    def get_row(self, row: int, position: int) -> Row:
        """The example, and its label."""
        ids_T = self.examples.ids(row)
        inputs = {"input_ids": ids_T, "attention_mask": np.ones(len(ids_T), np.int64)}
        if self.token_types:
            inputs["token_type_ids"] = self._token_type_ids(row, len(ids_T))
        return Row(inputs, self.labels_R[row, ...], 1)

    def _token_type_ids(self, row: int, length: int) -> np.ndarray:
        """1 from the second text on (Devlin et al. 2019, section 3)."""
        types_T = np.zeros(length, np.int64)
        examples, second = self.examples, int(self.examples.second_R[row])
        if second:
            types_T[length - second - len(examples.frame.suffix_ids) :] = 1
        return types_T


class TaggedRows:
    """Rows of a text each: `input_ids`, `attention_mask`, and labels of shape (T,): a tag where a word begins.

    A mark is 0 inside a word, else 1 + the word's tag. A text that does not fit is cut at its end. `lead`, `skipped` and
    `StageError` as for `Examples`.
    """

    layout = "tagged"
    is_random = False

    def __init__(
        self,
        store: MarkedStore,
        options: RowOptions,
    ) -> None:
        self.store, self.frame = store, options.frame
        kept = options.select_documents(store)
        texts = locate_texts(store, kept, options.lead)
        fits = replace(
            texts,
            stop_N=np.minimum(texts.stop_N, texts.start_N + max_text_tokens(options.length, options.frame.size(1), 1)),
        )
        counted_N = np.array([np.count_nonzero(_read_tags(store, *place)) for place in fits.spans()], np.int64)
        some_N = counted_N > 0
        self.texts, self.label_count_R = fits.select(some_N), counted_N[some_N]
        self.document_R = self.texts.document_N
        self.skipped = {"no tags": int((~some_N).sum())}
        lost_R = (texts.stop_N - fits.stop_N)[some_N]
        cut = int(lost_R.sum())
        self.truncations = {"their end": int((lost_R > 0).sum())}
        placed = int((self.texts.stop_N + self.texts.has_eos_N).sum())
        self.ledger = make_ledger(kept, placed=placed, truncated=cut, trained=int(self.label_count_R.sum()))

    def __len__(self) -> int:
        return len(self.document_R)

    def get_row(self, row: int, position: int) -> Row:
        """The text inside its frame, and its tags."""
        texts = self.texts
        place = int(texts.document_N[row]), int(texts.start_N[row]), int(texts.stop_N[row])
        ids_T = self.frame.wrap(self.store.read(*place))
        tags_T = _read_tags(self.store, *place).astype(np.int64)
        labels_T = np.full(len(ids_T), IGNORED, np.int64)
        begin = len(self.frame.prefix_ids)
        labels_T[begin : begin + len(tags_T)] = np.where(tags_T > 0, tags_T - 1, IGNORED)
        return Row(
            {"input_ids": ids_T, "attention_mask": np.ones(len(ids_T), np.int64)},
            labels_T,
            int(self.label_count_R[row]),
        )


def _read_tags(store: MarkedStore, document: int, start: int, stop: int) -> np.ndarray:
    marks = store.marks(document, start, stop)
    if marks is None:
        raise DataError("documents without tags", expected="a tag for each word")
    return marks


class ClozeRows:
    """Rows of an example each: `input_ids`, `attention_mask` and labels of shape (T,): its class's word at the frame's mask.

    `verbalisers`: a token for each class. Options and errors as for `LabelledRows` of classes; `StageError` when the frame has
    not one mask, or when a class has no word.
    """

    layout = "masked"
    is_random = False

    def __init__(
        self,
        store: LabelledStore,
        options: RowOptions,
        *,
        mask_id: int,
        verbalisers: Sequence[int],
    ) -> None:
        classes = [str(label) for label in store.labels or ()]
        if len(verbalisers) != len(classes):
            raise StageError(
                f"{len(verbalisers):,} words for {len(classes):,} classes ({', '.join(classes)})",
                where="data.verbalisers",
                expected="a word for each class",
            )
        self.examples = FramedExamples(
            store,
            options,
        )
        self.document_R, self.skipped, self.truncations, self.ledger = (
            self.examples.document_R,
            self.examples.skipped,
            self.examples.truncations,
            self.examples.ledger,
        )
        self.label_ids_R = np.array(verbalisers, np.int64)[_label_values(store, self.document_R, ProblemType.CLASS)]
        self.mask_positions_R = _mask_positions(self.examples, mask_id)

    def __len__(self) -> int:
        return len(self.examples)

    def get_row(self, row: int, position: int) -> Row:
        """The example, and at the mask the word for its class."""
        ids_T = self.examples.ids(row)
        labels_T = np.full(len(ids_T), IGNORED, np.int64)
        labels_T[self.mask_positions_R[row]] = self.label_ids_R[row]
        return Row({"input_ids": ids_T, "attention_mask": np.ones(len(ids_T), np.int64)}, labels_T, 1)


def _mask_positions(examples: FramedExamples, mask_id: int) -> np.ndarray:
    """Where in each row the frame's one mask stands; a mask in a text is not it."""
    parts = examples.frame.arrays
    found = [(part, place) for part, ids in enumerate(parts) for place in np.flatnonzero(ids == mask_id).tolist()]
    if len(found) != 1:
        raise StageError(f"a template with {len(found):,} masks", where="data.template", expected="one mask")
    part, place = found[0]
    paired_R = examples.second_R > 0
    if part == 1 and not paired_R.all():
        raise DataError(
            "an example of one text",
            where=f"document {examples.document_R[np.argmin(paired_R)]:,}",
            expected="two texts, as the template has its mask between them",
        )
    before, between = len(parts[0]), len(parts[1])
    ends_R = examples.first_R + before, examples.first_R + before + examples.second_R + between * paired_R
    return place + (np.zeros_like(ends_R[0]), *ends_R)[part]
