"""Which tokens is a masked language model asked for? Some of every row, drawn anew at each position of the mixture.

Legend: T tokens of a row, M labels of a row, R rows, V vocabulary.

Of 15 % of the tokens, eight in ten are replaced by the mask, one in ten by a random token, and one in ten stays; all of them
are labels (Devlin et al. 2019, section 3.1). A row is a window of one document inside its frame. It has equally many labels
wherever it is read, so the ledger knows them beforehand; which tokens they are depends on seed, row and position alone: a
row that is read for a score at one position is scored on the same tokens each time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from postgrad.data.layouts.rows import IGNORED, Row, RowOptions
from postgrad.data.layouts.windows import locate_texts, make_ledger, max_text_tokens, split_windows
from postgrad.data.random_streams import RandomStreams
from postgrad.data.tokens.held_out_split import DocumentStore

MASK_TOKEN_SHARE, RANDOM_TOKEN_SHARE = 0.8, 0.1
"""Of the labels: the share behind a mask, and the share in whose place a random token stands."""


class MaskedRows:
    """Rows of a window each: `input_ids`, `attention_mask` and labels, all of shape (T,), not padded.

    `special_ids` are never masked and never put in another token's place. With `continues_V` (whether an id goes on with the
    word before it) whole words are masked: they are drawn one after the other, and the last is masked as far as the row's
    number of labels reaches. `lead`: tokens at each document's start that the frame replaces (1 for a BOS or [CLS]).
    `skipped` counts windows by the reason why they are no rows. Raises `StageError` when a row has no room for text.
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
        kept = options.select_documents(store)
        windows = split_windows(
            locate_texts(store, kept, options.lead), max_text_tokens(options.length, options.frame.size(1), 1)
        )
        read = map(store.read, windows.document_R.tolist(), windows.start_R.tolist(), windows.stop_R.tolist())
        maskable_R = windows.size_R - np.fromiter((self.special_V[text].sum() for text in read), int, len(windows))
        self.windows = windows.select(maskable_R > 0)
        self.document_R = self.windows.document_R
        self.labels_R = np.maximum(1, np.rint(mask_rate * maskable_R[maskable_R > 0]).astype(np.int64))
        self.skipped = {"nothing to mask": len(windows) - len(self.windows)}
        self.ledger = make_ledger(kept, placed=int(self.windows.stored_R.sum()), trained=int(self.labels_R.sum()))

    def __len__(self) -> int:
        return len(self.windows)

    def get_row(self, row: int, position: int) -> Row:
        """The window inside its frame with some tokens hidden, and labels where they were."""
        windows, draws = self.windows, self.random_streams.generator(row, position)
        text_T = self.store.read(int(windows.document_R[row]), int(windows.start_R[row]), int(windows.stop_R[row]))
        ids_T = self.frame.wrap(text_T)
        labels_T = np.full(len(ids_T), IGNORED, np.int64)
        chosen_M = self._choose_positions(text_T, int(self.labels_R[row]), draws)
        tokens_M, fate_M = text_T[chosen_M], draws.random(len(chosen_M))
        random_M = self.maskable_ids[draws.integers(len(self.maskable_ids), size=len(chosen_M))]
        places_M = chosen_M + len(self.frame.prefix_ids)
        labels_T[places_M] = tokens_M
        seen_M = np.where(fate_M < MASK_TOKEN_SHARE + RANDOM_TOKEN_SHARE, random_M, tokens_M)
        seen_M[fate_M < MASK_TOKEN_SHARE] = self.mask_id
        ids_T[places_M] = seen_M
        return Row({"input_ids": ids_T, "attention_mask": np.ones(len(ids_T), np.int64)}, labels_T, len(chosen_M))

    def _choose_positions(self, text_T: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        """Places of the tokens whose turn comes first; the tokens of a word have one turn."""
        turn_T = rng.random(len(text_T))
        if self.continues_V is not None:
            starts_T = ~self.continues_V[text_T]
            starts_T[0] = True
            turn_T = turn_T[np.cumsum(starts_T) - 1]
        turn_T[self.special_V[text_T]] = 1.0
        return np.argsort(turn_T, kind="stable")[:count]
