"""Rows for encoder-decoder models: source and target of an example, or running text split at random.

Legend: N documents, R rows, T tokens of the source, S labels.

The last answer of an example is the target, everything before it the source. Running text becomes a source and its
continuation, split anew at each position of the mixture (the prefix language model of Raffel et al. 2020, section 3.2.1, as
in the adaptation of Lester et al. 2021, section 2.2). Source and labels have the special tokens that the tokenizer adds
around them; a truncated target has none at its end, since it must not teach the model to stop in the middle.
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
    read_marks,
    split_windows,
)
from postgrad.data.random_streams import RandomStreams
from postgrad.data.render.frame import Frame


def make_seq2seq_row(input_ids: np.ndarray, labels: np.ndarray, decoder_start: int) -> Row:
    """A row for an encoder-decoder model; the decoder input is the labels shifted right."""
    decoder_ids = np.concatenate(([decoder_start], labels[:-1])).astype(labels.dtype)
    mask = np.ones(len(input_ids), np.int64)
    inputs = {"input_ids": input_ids, "attention_mask": mask, "decoder_input_ids": decoder_ids}
    return Row(inputs, labels, len(labels))


class Seq2SeqRows:
    """Rows of an example or a window each: `input_ids`, `attention_mask`, `decoder_input_ids`, and labels of shape (S,).

    `target`: the frame of the labels. `too_long`, for a source that does not fit `length` with its frame:

        cut-context   truncate its beginning: the last question of a conversation is at the end
        cut-end       truncate its end, as T5 does
        drop          drop the example

    Targets are truncated to `target_length`. `skipped` counts documents that are no rows, `truncations` truncated rows, both
    by kind. For running text, `trained` in the ledger is an expectation. Raises `StageError` when there is no room for text.
    """

    layout = "pairs"

    def __init__(
        self,
        store: MarkedStore,
        options: RowOptions,
        *,
        target_length: int,
        target: Frame,
        decoder_start: int,
        seed: int,
        too_long: TooLongPolicy = "cut-end",
    ) -> None:
        self.store, self.frame, self.target, self.decoder_start = store, options.frame, target, decoder_start
        self.random_streams = RandomStreams(seed)
        frame_tokens = options.frame.size(1)
        selected = options.select_documents(store)
        texts = locate_texts(store, selected, options.lead)
        if has_marks(store):
            max_tokens = max_text_tokens(options.length, frame_tokens, 1)
            max_target = max_text_tokens(target_length, len(target.prefix_ids), 1, where="objectives.target_length")
            split = _example_windows(store, texts, max_tokens, max_target, target, too_long)
            no_answer = len(texts.document_N) - len(split.windows) - split.dropped
            self.skipped = {"no answer": no_answer, "too long": split.dropped}
        else:
            # Two tokens on each side: then windows of equal size have at least two tokens, and each can be split.
            max_source = max_text_tokens(options.length, frame_tokens, 2)
            max_target = max_text_tokens(target_length, target.size(1), 2, where="objectives.target_length")
            split = _text_windows(texts, min(max_source, max_target), target)
            self.skipped = {"a single token": len(np.setdiff1d(texts.document_N, split.windows.document_R))}
        self.windows, self.borders_R2, self.truncations = split.windows, split.borders_R2, split.truncations
        self.document_R = self.windows.document_R
        placed = int(self.windows.stored_R.sum())
        self.ledger = make_ledger(selected, placed=placed, truncated=split.truncated, trained=split.trained)

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def is_random(self) -> bool:
        return self.borders_R2 is None

    def get_row(self, row: int, position: int) -> Row:
        document, start, stop = self.windows.span(row)
        if self.borders_R2 is None:
            rng = self.random_streams.generator(row, position)
            source_stop = target_start = start + int(rng.integers(1, stop - start))
        else:
            source_stop, target_start = map(int, self.borders_R2[row])
        source_T = self.frame.wrap(self.store.read(document, start, source_stop))
        labels_S = self.target.wrap(self.store.read(document, target_start, stop))
        if not self.windows.has_eos_R[row]:
            labels_S = labels_S[: len(labels_S) - len(self.target.suffix_ids)]
        return make_seq2seq_row(source_T, labels_S, self.decoder_start)


@dataclass(frozen=True)
class _SourceTargetWindows:
    """Windows from a source's start to its target's end; `borders_R2`: source end and target start, None if random."""

    windows: Windows
    borders_R2: np.ndarray | None
    truncated: int
    trained: int
    dropped: int = 0
    truncations: dict[str, int] = field(default_factory=dict)


def _text_windows(texts: TextSpans, max_tokens: int, target: Frame) -> _SourceTargetWindows:
    """Running text in windows so short that both sides fit, wherever a window is split."""
    windows = split_windows(texts, max_tokens + 1)
    windows = windows.select(windows.size_R >= 2)
    # The split is uniform over 1 to size - 1, so on average half of a window is target.
    target_text = int(windows.size_R.sum()) // 2
    return _SourceTargetWindows(windows, None, 0, target_text + int(_framing_labels(windows.has_eos_R, target).sum()))


def _framing_labels(has_eos_R: np.ndarray, target: Frame) -> np.ndarray:
    """How many labels of each row are special tokens around the target."""
    return len(target.prefix_ids) + has_eos_R * len(target.suffix_ids)


def _example_windows(
    store: MarkedStore,
    texts: TextSpans,
    max_source_tokens: int,
    max_target_tokens: int,
    target: Frame,
    too_long: TooLongPolicy,
) -> _SourceTargetWindows:
    """Examples by their marks: the last answer, and as much of the source as fits."""
    answer_N2 = np.array([_last_answer(store, *span) for span in texts.spans()], np.int64).reshape(-1, 2)
    is_row_N = answer_N2[:, 0] < answer_N2[:, 1]
    is_long_N = answer_N2[:, 0] - texts.start_N > max_source_tokens
    is_dropped_N = is_row_N & is_long_N & (too_long == "drop")
    is_row_N &= ~is_dropped_N
    text_start_R, (target_start_R, answer_end_R) = texts.start_N[is_row_N], answer_N2[is_row_N].T
    lost_R = np.maximum(target_start_R - text_start_R - max_source_tokens, 0)
    start_R = text_start_R + (lost_R if too_long == "cut-context" else 0)
    source_stop_R = target_start_R - (lost_R if too_long == "cut-end" else 0)
    stop_R = np.minimum(answer_end_R, target_start_R + max_target_tokens)
    # A truncated answer has no EOS, and one that just fits leaves no room for it.
    room_R = max_target_tokens - (answer_end_R - target_start_R)
    has_eos_R = texts.has_eos_N[is_row_N] & (room_R >= len(target.suffix_ids))
    answer_R = stop_R - target_start_R
    # A text starts after its prefix, so its start is the length of the prefix, which the ledger counts with the text.
    stored_R = text_start_R + source_stop_R - start_R + answer_R + has_eos_R
    full_R = texts.stop_N[is_row_N] + texts.has_eos_N[is_row_N]
    side = "beginning" if too_long == "cut-context" else "end"
    return _SourceTargetWindows(
        Windows(texts.document_N[is_row_N], start_R, stop_R, has_eos_R, stored_R),
        np.stack((source_stop_R, target_start_R), 1),
        truncated=int((full_R - stored_R).sum()),
        trained=int((answer_R + _framing_labels(has_eos_R, target)).sum()),
        dropped=int(is_dropped_N.sum()),
        truncations={
            f"the {side} of the source": int((lost_R > 0).sum()),
            "the end of the target": int((stop_R < answer_end_R).sum()),
        },
    )


def _last_answer(store: MarkedStore, document: int, start: int, stop: int) -> tuple[int, int]:
    """Start and end of the last run of marked tokens; `(start, start)` when no token is marked."""
    marks = read_marks(store, document, start, stop)
    answer_tokens = np.flatnonzero(marks)
    if not len(answer_tokens):
        return start, start
    end = int(answer_tokens[-1]) + 1
    context_tokens = np.flatnonzero(marks[:end] == 0)
    return start + (int(context_tokens[-1]) + 1 if len(context_tokens) else 0), start + end
