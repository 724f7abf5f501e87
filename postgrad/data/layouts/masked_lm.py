"""Rows for masked language models: random tokens of every row are hidden, anew at each position of the mixture.

Legend: T tokens of a row, M labels of a row, R rows, V vocabulary.

Of the selected tokens (15 % by default), 80 % become the mask, 10 % a random token, and 10 % stay; all of them are labels
(Devlin et al. 2019, section 3.1). A row is a window of one document inside its frame. Its number of labels is fixed, so the
ledger is known in advance; which tokens they are depends on seed, row and position alone, so a row that is scored at one
position is scored on the same tokens every time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from postgrad.data.layouts.rows import IGNORED, Row, RowOptions
from postgrad.data.layouts.windows import locate_texts, make_ledger, max_text_tokens, split_windows
from postgrad.data.random_streams import RandomStreams
from postgrad.data.tokens.held_out_split import DocumentStore

MASK_TOKEN_SHARE, RANDOM_TOKEN_SHARE = 0.8, 0.1
"""Fractions of the selected tokens that the mask, and that a random token replaces."""


class MaskedRows:
    """Rows of a window each: `input_ids`, `attention_mask` and labels, all of shape (T,), not padded.

    `special_ids` are never masked and never used as random tokens. With `continues_V` (whether an id continues the word
    before it) whole words are masked; the last one is cut where the row's number of labels is reached. `skipped` counts
    windows that are no rows, by reason. Raises `StageError` when a row has no room for text.
    """

    layout = "masked"
    is_random = True

    def __init__(
        self,
        store: DocumentStore,
        options: RowOptions,
        *,
        mask_id: int,
        vocabulary: int,
        special_ids: Sequence[int],
        seed: int,
        mask_rate: float = 0.15,
        continues_V: np.ndarray | None = None,
    ) -> None:
        self.store, self.frame, self.mask_id, self.continues_V = store, options.frame, mask_id, continues_V
        self.special_V = np.zeros(vocabulary, bool)
        self.special_V[[token for token in special_ids if token < vocabulary]] = True
        self.maskable_ids = np.flatnonzero(~self.special_V)
        self.random_streams = RandomStreams(seed)
        max_tokens = max_text_tokens(options.length, options.frame.size(1), 1)
        selected = options.select_documents(store)
        windows = split_windows(locate_texts(store, selected, options.lead), max_tokens)
        texts = (store.read(*windows.span(row)) for row in range(len(windows)))
        maskable_R = windows.size_R - np.fromiter((self.special_V[text].sum() for text in texts), int, len(windows))
        self.windows = windows.select(maskable_R > 0)
        self.document_R = self.windows.document_R
        self.label_count_R = np.maximum(1, np.rint(mask_rate * maskable_R[maskable_R > 0]).astype(np.int64))
        self.skipped = {"nothing to mask": len(windows) - len(self.windows)}
        placed, trained = int(self.windows.stored_R.sum()), int(self.label_count_R.sum())
        self.ledger = make_ledger(selected, placed=placed, trained=trained)

    def __len__(self) -> int:
        return len(self.windows)

    def get_row(self, row: int, position: int) -> Row:
        rng = self.random_streams.generator(row, position)
        text_T = self.store.read(*self.windows.span(row))
        ids_T = self.frame.wrap(text_T)
        labels_T = np.full(len(ids_T), IGNORED, np.int64)
        selected_M = self._choose_positions(text_T, int(self.label_count_R[row]), rng)
        tokens_M, uniform_M = text_T[selected_M], rng.random(len(selected_M))
        random_M = self.maskable_ids[rng.integers(len(self.maskable_ids), size=len(selected_M))]
        positions_M = selected_M + len(self.frame.prefix_ids)
        labels_T[positions_M] = tokens_M
        inputs_M = np.where(uniform_M < MASK_TOKEN_SHARE + RANDOM_TOKEN_SHARE, random_M, tokens_M)
        inputs_M[uniform_M < MASK_TOKEN_SHARE] = self.mask_id
        ids_T[positions_M] = inputs_M
        return Row({"input_ids": ids_T, "attention_mask": np.ones(len(ids_T), np.int64)}, labels_T, len(selected_M))

    def _choose_positions(self, text_T: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        """The `count` positions with the smallest random priorities; all tokens of a word share one priority."""
        priority_T = rng.random(len(text_T))
        if self.continues_V is not None:
            is_word_start_T = ~self.continues_V[text_T]
            is_word_start_T[0] = True
            priority_T = priority_T[np.cumsum(is_word_start_T) - 1]
        priority_T[self.special_V[text_T]] = 1.0
        return np.argsort(priority_T, kind="stable")[:count]
