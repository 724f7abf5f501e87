"""Span corruption rows: random spans of a text are replaced by sentinels, and are the target.

Legend: R rows, K spans of a row, T tokens of a window, S labels.

Raffel et al. 2020, section 3.1.4: of a window of L tokens round(density L) are noise (at least one, and not all), in
round(noise / mean span) spans. Noise and the other tokens are each split into that many pieces at random, and the pieces
alternate, starting with text. A sentinel replaces each span in the inputs and precedes it in the targets:

    text      a b c d e f g        spans: c d, g
    inputs    a b <0> e f <1> </s>
    targets   <0> c d <1> g </s>

No token is lost: inputs and targets together rebuild the text. A window is a piece of one document.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from postgrad.data.layouts.rows import Row, RowOptions
from postgrad.data.layouts.seq2seq import make_seq2seq_row
from postgrad.data.layouts.windows import locate_texts, make_ledger, max_text_tokens, split_windows
from postgrad.data.random_streams import RandomStreams
from postgrad.data.render.frame import Frame
from postgrad.data.tokens.held_out_split import DocumentStore
from postgrad.errors import StageError


def noise_counts(size: np.ndarray, density: float, mean_span: float) -> tuple[np.ndarray, np.ndarray]:
    """`(noise tokens, spans)` of windows of at least two tokens."""
    noise = np.clip(np.rint(size * density).astype(np.int64), 1, size - 1)
    spans = np.clip(np.rint(noise / mean_span).astype(np.int64), 1, np.minimum(noise, size - noise))
    return noise, spans


def corrupted_lengths(inputs: int, density: float = 0.15, mean_span: float = 3.0) -> tuple[int, int]:
    """`(raw, targets)`: the longest window whose corrupted inputs fit `inputs` tokens (at least 3), and its target length.

    Both count an EOS.
    """
    raw = np.arange(2, int(inputs / (1 - density)) + 2)
    noise, spans = noise_counts(raw, density, mean_span)
    # The input length never decreases with the raw length, so binary search finds the last that fits.
    best = int(np.searchsorted(raw - noise + spans + 1, inputs, side="right")) - 1
    return int(raw[best]), int(noise[best] + spans[best] + 1)


class SpanCorruptionRows:
    """Rows of a window each: `input_ids`, `attention_mask`, `decoder_input_ids`, and labels of shape (S,); not padded.

    `sentinels`: their ids, the first span's first. `skipped` counts windows that are no rows, by reason. Raises `StageError`
    when a full row has more spans than there are sentinels, or no room for text.
    """

    layout = "pairs"
    is_random = True

    def __init__(
        self,
        store: DocumentStore,
        options: RowOptions,
        *,
        sentinels: Sequence[int],
        target: Frame,
        decoder_start: int,
        seed: int,
        density: float = 0.15,
        mean_span: float = 3.0,
    ) -> None:
        self.store, self.frame, self.target, self.decoder_start = store, options.frame, target, decoder_start
        self.sentinels = np.array(sentinels, np.int64)
        self.random_streams = RandomStreams(seed)
        # Room for windows of three tokens: then windows of equal size have at least two, and each can be corrupted.
        raw, _ = corrupted_lengths(max_text_tokens(options.length, self.frame.size(1), 3) + 1, density, mean_span)
        max_spans = int(noise_counts(np.array([raw]), density, mean_span)[1][0])
        if max_spans > len(sentinels):
            raise StageError(
                f"rows of {raw:,} tokens have up to {max_spans:,} corrupted spans, but only {len(sentinels):,} sentinels exist",
                where="data.sequence_length",
                expected="a sentinel for each span",
                hint="shorter rows, longer spans, or a tokenizer with more sentinels (T5 has 100)",
            )
        selected = options.select_documents(store)
        windows = split_windows(locate_texts(store, selected, options.lead), raw)
        self.windows = windows.select(windows.size_R >= 2)
        self.document_R = self.windows.document_R
        self.noise_R, self.spans_R = noise_counts(self.windows.size_R, density, mean_span)
        self.skipped = {"a single token": len(windows) - len(self.windows)}
        placed, trained = int(self.windows.stored_R.sum()), int((self.noise_R + self.spans_R + target.size(1)).sum())
        self.ledger = make_ledger(selected, placed=placed, trained=trained)

    def __len__(self) -> int:
        return len(self.windows)

    def get_row(self, row: int, position: int) -> Row:
        rng = self.random_streams.generator(row, position)
        text_T = self.store.read(*self.windows.span(row))
        noise, spans = int(self.noise_R[row]), int(self.spans_R[row])
        text_borders_K1 = _random_borders(len(text_T) - noise, spans, rng)
        noise_borders_K1 = _random_borders(noise, spans, rng)
        # Pieces alternate: text 0, noise 0, text 1, noise 1 ... Text k starts after k pieces of each kind, noise k after
        # k + 1 pieces of text and k of noise. The sum of +1 at noise starts and -1 at text starts is 1 within noise.
        text_start_K = (text_borders_K1 + noise_borders_K1)[:-1]
        noise_start_K = text_borders_K1[1:] + noise_borders_K1[:-1]
        step_T = np.zeros(len(text_T), np.int8)
        step_T[text_start_K] -= 1
        step_T[noise_start_K] += 1
        step_T[0] = 0
        is_noise_T = np.cumsum(step_T, dtype=np.int8).view(bool)
        inputs = self._replace_spans(is_noise_T, noise_start_K, text_T)
        targets = self._replace_spans(~is_noise_T, text_start_K, text_T)
        return make_seq2seq_row(self.frame.wrap(inputs), self.target.wrap(targets), self.decoder_start)

    def _replace_spans(self, removed_T: np.ndarray, starts_K: np.ndarray, text_T: np.ndarray) -> np.ndarray:
        """Replace each removed span by one sentinel."""
        ids_T = text_T.astype(np.int64)
        ids_T[starts_K] = self.sentinels[: len(starts_K)]
        remains_T = ~removed_T
        remains_T[starts_K] = True
        return ids_T[remains_T]


def _random_borders(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Borders, from 0 to `total`, of `parts` non-empty parts; all ways to split are equally likely."""
    borders = np.empty(parts + 1, np.int64)
    borders[0], borders[-1] = 0, total
    borders[1:-1] = rng.choice(total - 1, parts - 1, replace=False, shuffle=False)
    borders[1:-1] += 1
    borders[1:-1].sort()
    return borders
