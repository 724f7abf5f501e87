"""What does an encoder-decoder model read, and what should it say? A source, and a target that begins where it ends.

Legend: N documents, R rows, T tokens of the source, S labels.

A marked document is an example: its last answer is the target, everything before it is the source. A plain text becomes a
source and its continuation, the cut drawn anew at each position of the mixture (the prefix language model of Raffel et al.
2020, section 3.2.1, as in the adaptation of Lester et al. 2021, section 2.2). The encoder's input ends with an EOS; so do the
labels, except where a target was cut: a model should not learn to stop in the middle.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from postgrad.data.layouts.rows import Row, RowOptions
from postgrad.data.layouts.windows import (
    MarkedStore,
    TextSpans,
    TooLongPolicy,
    Windows,
    has_marks,
    locate_texts,
    make_ledger,
    max_text_tokens,
    split_windows,
)
from postgrad.data.random_streams import RandomStreams


def make_seq2seq_row(input_ids: np.ndarray, labels: np.ndarray, decoder_start: int) -> Row:
    """A row for an encoder-decoder model: the decoder reads the labels one place later."""
    decoder_ids = np.empty_like(labels)
    decoder_ids[0] = decoder_start
    decoder_ids[1:] = labels[:-1]
    mask = np.ones(len(input_ids), np.int64)
    inputs = {"input_ids": input_ids, "attention_mask": mask, "decoder_input_ids": decoder_ids}
    return Row(inputs, labels, len(labels))


class Seq2SeqRows:
    """Rows of an example or a window each: `input_ids`, `attention_mask`, `decoder_input_ids`, and labels of shape (S,).

    `too_long`, for a source longer than `length`, frame and EOS included:

        cut-context   leave out its beginning: in a conversation the last question stands at the end
        cut-end       leave out its end, as T5 does
        drop          leave the example out

    Of a target of more than `target_length` the end is cut. `lead`: tokens at each document's start that are no text (1 for a
    BOS). `skipped` counts documents by the reason why they are no rows, `cut` rows that lost something by what it is. Where
    a plain text is cut is drawn, so `trained` in its ledger is what it comes to on average.
    Raises `StageError` when a row has no room for text.
    """

    layout = "pairs"

    def __init__(
        self,
        store: MarkedStore,
        options: RowOptions,
        *,
        target_length: int,
        eos: int,
        decoder_start: int,
        seed: int,
        too_long: TooLongPolicy = "cut-end",
    ) -> None:
        self.store, self.frame, self.decoder_start = store, options.frame, decoder_start
        self.eos = np.array([eos], np.int64)
        self.random_streams = RandomStreams(seed)
        around = options.frame.size(1) + 1
        kept = options.select_documents(store)
        texts = locate_texts(store, kept, options.lead)
        if has_marks(store):
            found = _example_windows(store, texts, max_text_tokens(options.length, around, 1), target_length, too_long)
            self.skipped = {
                "no answer": len(texts.document_N) - len(found.windows) - found.dropped,
                "too long": found.dropped,
            }
        else:
            # Room for two tokens on a side: then equal windows have two at least, and each can be cut.
            rooms = (
                max_text_tokens(options.length, around, 2),
                max_text_tokens(target_length, 1, 2, where="data.target_length"),
            )
            found = _text_windows(texts, min(rooms))
            self.skipped = {"a single token": len(np.setdiff1d(texts.document_N, found.windows.document_R))}
        self.windows, self.borders_R2, self.truncations = found.windows, found.borders_R2, found.truncations
        self.document_R = self.windows.document_R
        placed = int(self.windows.stored_R.sum())
        self.ledger = make_ledger(kept, placed=placed, truncated=found.truncated, trained=found.trained)

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def is_random(self) -> bool:
        """Where a plain text is cut is."""
        return self.borders_R2 is None

    def get_row(self, row: int, position: int) -> Row:
        """Source and target; of a plain text with the cut that is drawn for this position."""
        windows = self.windows
        document, start, stop = int(windows.document_R[row]), int(windows.start_R[row]), int(windows.stop_R[row])
        if self.borders_R2 is None:
            source_stop = target_start = start + int(
                self.random_streams.generator(row, position).integers(1, stop - start)
            )
        else:
            source_stop, target_start = map(int, self.borders_R2[row])
        source_T = self.frame.wrap(self.store.read(document, start, source_stop))
        target_S = self.store.read(document, target_start, stop)
        labels_S = np.concatenate((target_S, self.eos[: int(windows.has_eos_R[row])]))
        return make_seq2seq_row(np.concatenate((source_T, self.eos)), labels_S, self.decoder_start)


@dataclass(frozen=True)
class _SourceTargetWindows:
    """Windows from the source's start to the target's end; where the source ends and the target starts, if that is known."""

    windows: Windows
    borders_R2: np.ndarray | None
    truncated: int
    trained: int
    dropped: int = 0
    truncations: dict[str, int] = field(default_factory=dict)


def _text_windows(texts: TextSpans, max_tokens: int) -> _SourceTargetWindows:
    """Plain text in windows so short that wherever one is cut both sides fit."""
    windows = split_windows(texts, max_tokens + 1)
    windows = windows.select(windows.size_R >= 2)
    # Any cut from 1 to size - 1 is as likely as the others, so half of a window is target.
    return _SourceTargetWindows(windows, None, 0, int(windows.size_R.sum()) // 2 + int(windows.has_eos_R.sum()))


def _example_windows(
    store: MarkedStore, texts: TextSpans, max_source_tokens: int, target_length: int, too_long: TooLongPolicy
) -> _SourceTargetWindows:
    """Examples by their marks: as much of the source as fits, and the last answer."""
    answer_N2 = np.array([_last_answer(store, *place) for place in texts.spans()], np.int64).reshape(-1, 2)
    some_N = answer_N2[:, 0] < answer_N2[:, 1]
    long_N = answer_N2[:, 0] - texts.start_N > max_source_tokens
    dropped_N = some_N & long_N & (too_long == "drop")
    some_N &= ~dropped_N
    start_R, (answer_R, end_R) = texts.start_N[some_N], answer_N2[some_N].T
    lost_R = np.maximum(answer_R - start_R - max_source_tokens, 0)
    first_R = start_R + (lost_R if too_long == "cut-context" else 0)
    source_stop_R = answer_R - (lost_R if too_long == "cut-end" else 0)
    stop_R = np.minimum(end_R, answer_R + target_length)
    # An answer that is cut, here or before, does not end; one that just fits has no room for the EOS.
    ended_R = texts.has_eos_N[some_N] & (end_R - answer_R < target_length)
    lead_R = start_R  # the BOS goes with the text
    stored_R = lead_R + source_stop_R - first_R + stop_R - answer_R + ended_R
    whole_R = texts.stop_N[some_N] + texts.has_eos_N[some_N]
    windows = Windows(texts.document_N[some_N], first_R, stop_R, ended_R, stored_R)
    which = "the beginning" if too_long == "cut-context" else "the end"
    return _SourceTargetWindows(
        windows,
        np.stack((source_stop_R, answer_R), 1),
        int((whole_R - stored_R).sum()),
        int((stop_R - answer_R + ended_R).sum()),
        int(dropped_N.sum()),
        {
            f"{which} of what is read": int((lost_R > 0).sum()),
            "the end of what is written": int((stop_R < end_R).sum()),
        },
    )


def _last_answer(store: MarkedStore, document: int, start: int, stop: int) -> tuple[int, int]:
    """Where the last run of marked tokens begins and ends; nowhere, `(start, start)`, when none is marked."""
    marks = store.marks(document, start, stop)
    assert marks is not None, "all documents of a store are marked, or none"
    answered = np.flatnonzero(marks)
    if not len(answered):
        return start, start
    end = int(answered[-1]) + 1
    before = np.flatnonzero(marks[:end] == 0)
    return start + (int(before[-1]) + 1 if len(before) else 0), start + end
