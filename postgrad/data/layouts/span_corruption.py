"""How is text corrupted for a text-to-text model? Random spans give way to sentinels, and the model gives them back.

Legend: R rows, K spans of a row, T tokens of a window, S labels.

Raffel et al. 2020, section 3.1.4: of a window of L tokens round(density L) are noise (at least one, and not all), in
round(noise / mean span) spans; noise and the rest are each parted into so many pieces at random, and they alternate, the
rest first. The inputs have a sentinel in each span's place; the targets have the spans, each after its sentinel:

    text      a b c d e f g        spans: c d, g
    inputs    a b <0> e f <1> </s>
    targets   <0> c d <1> g </s>

No token is lost: inputs and targets rebuild the text. Windows are pieces of one document each, so that documents do not mix.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from postgrad.data.layouts.rows import Row, RowOptions
from postgrad.data.layouts.seq2seq import make_seq2seq_row
from postgrad.data.layouts.windows import locate_texts, make_ledger, max_text_tokens, split_windows
from postgrad.data.random_streams import RandomStreams
from postgrad.data.tokens.held_out_split import DocumentStore
from postgrad.errors import StageError


def noise_counts(size: np.ndarray, density: float, mean_span: float) -> tuple[np.ndarray, np.ndarray]:
    """`(noise tokens, spans)` of windows of at least two tokens."""
    noise = np.clip(np.rint(size * density).astype(np.int64), 1, size - 1)
    spans = np.clip(np.rint(noise / mean_span).astype(np.int64), 1, np.minimum(noise, size - noise))
    return noise, spans


def corrupted_lengths(inputs: int, density: float = 0.15, mean_span: float = 3.0) -> tuple[int, int]:
    """`(raw, targets)`: how much text fits `inputs` tokens once it is corrupted, and how long its targets are.

    Both count an EOS. `inputs`: at least 3.
    """
    raw = np.arange(2, int(inputs / (1 - density)) + 2)
    noise, spans = noise_counts(raw, density, mean_span)
    # Longer text never has shorter inputs, so the last that fits is found by halving.
    best = int(np.searchsorted(raw - noise + spans + 1, inputs, side="right")) - 1
    return int(raw[best]), int(noise[best] + spans[best] + 1)


class SpanCorruptionRows:
    """Rows of a window each: `input_ids`, `attention_mask`, `decoder_input_ids`, and labels of shape (S,); not padded.

    `sentinels`: their ids, the first span's first. `lead`: tokens at each document's start that are no text (1 for a BOS).
    `skipped` counts windows by the reason why they are no rows. Raises `StageError` when there are fewer sentinels than spans
    in a full row, or when a row has no room for text.
    """

    layout = "pairs"
    is_random = True

    def __init__(
        self,
        store: DocumentStore,
        options: RowOptions,
        *,
        sentinels: Sequence[int],
        eos: int,
        decoder_start: int,
        seed: int,
        density: float = 0.15,
        mean_span: float = 3.0,
    ) -> None:
        self.store, self.frame, self.decoder_start = store, options.frame, decoder_start
        self.eos, self.sentinels = np.array([eos], np.int64), np.array(sentinels, np.int64)
        self.random_streams = RandomStreams(seed)
        # Room for windows of three tokens: then equal windows have two at least, and each can be corrupted.
        raw, _ = corrupted_lengths(max_text_tokens(options.length, options.frame.size(1), 4), density, mean_span)
        most = int(noise_counts(np.array([raw]), density, mean_span)[1][0])
        if most > len(sentinels):
            raise StageError(
                f"rows of {raw:,} tokens have up to {most:,} corrupted spans, and there are {len(sentinels):,} sentinels",
                where="data.sequence_length",
                expected="a sentinel for each span",
                hint="shorter rows, longer spans, or a tokenizer with more sentinels (T5's own has 100)",
            )
        kept = options.select_documents(store)
        windows = split_windows(locate_texts(store, kept, options.lead), raw)
        self.windows = windows.select(windows.size_R >= 2)
        self.document_R = self.windows.document_R
        self.noise_R, self.spans_R = noise_counts(self.windows.size_R, density, mean_span)
        self.skipped = {"a single token": len(windows) - len(self.windows)}
        self.ledger = make_ledger(
            kept,
            placed=int(self.windows.stored_R.sum()),
            trained=int((self.noise_R + self.spans_R + 1).sum()),
        )

    def __len__(self) -> int:
        return len(self.windows)

    def get_row(self, row: int, position: int) -> Row:
        """The window with its spans drawn for this position."""
        windows, draws = self.windows, self.random_streams.generator(row, position)
        text_T = self.store.read(int(windows.document_R[row]), int(windows.start_R[row]), int(windows.stop_R[row]))
        noise, spans = int(self.noise_R[row]), int(self.spans_R[row])
        rest_K1 = _random_borders(len(text_T) - noise, spans, draws)
        noise_K1 = _random_borders(noise, spans, draws)
        # A span starts behind as much of the rest as comes before it; a stretch of the rest behind as much noise.
        rest_at_K, noise_at_K = (rest_K1 + noise_K1)[:-1], rest_K1[1:] + noise_K1[:-1]
        step_T = np.zeros(len(text_T), np.int8)
        step_T[rest_at_K] -= 1
        step_T[noise_at_K] += 1
        step_T[0] = 0
        is_noise_T = np.cumsum(step_T, dtype=np.int8).view(bool)
        # What is left out gives way to one sentinel a stretch: in the inputs the noise, in the targets the rest.
        inputs = self._replace_spans(is_noise_T, noise_at_K, text_T)
        targets = self._replace_spans(~is_noise_T, rest_at_K, text_T)
        return make_seq2seq_row(
            np.concatenate((self.frame.wrap(inputs), self.eos)),
            np.concatenate((targets, self.eos)),
            self.decoder_start,
        )

    def _replace_spans(self, removed_T: np.ndarray, starts_K: np.ndarray, text_T: np.ndarray) -> np.ndarray:
        told_T = text_T.astype(np.int64)
        told_T[starts_K] = self.sentinels[: len(starts_K)]
        stays_T = ~removed_T
        stays_T[starts_K] = True
        return told_T[stays_T]


def _random_borders(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Borders, from 0 to `total`, of so many non-empty parts, each way to cut being as likely as any other."""
    borders = np.empty(parts + 1, np.int64)
    borders[0], borders[-1] = 0, total
    borders[1:-1] = rng.choice(total - 1, parts - 1, replace=False, shuffle=False)
    borders[1:-1] += 1
    borders[1:-1].sort()
    return borders
