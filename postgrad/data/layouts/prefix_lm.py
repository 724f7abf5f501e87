"""Rows for a prefix language model (Raffel et al. 2020, section 3.2.1): attention is bidirectional in the prefix.

Legend: T positions in a row, P pieces.

The prefix of an example ends before its answer; running text is cut at random, anew at each position of the mixture. Only
tokens after the prefix are labels. The last prefix token sees all of the prefix and predicts the first label:

    text        a b c d e f      prefix of 3: a b c
    inputs      a b c d e        the last token is only a label
    prefix      1 1 1 0 0
    labels      - - d e f

Running text is split into pieces no longer than a row. The end of a piece's prefix is uniform over all places that leave
text on both sides. It depends on seed, row and position alone, not on the frame, so that models with different soft prompts
train on the same labels.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from postgrad.data.layouts.packed_examples import PackedExampleRows, TooLongPolicy
from postgrad.data.layouts.rows import IGNORED, Row, RowOptions
from postgrad.data.layouts.windows import MarkedStore
from postgrad.data.random_streams import RandomStreams


class PrefixRows(PackedExampleRows):
    """The rows of `PackedExampleRows` with one more input, `prefix` of shape (T,): 1 for tokens of a prefix.

    For running text, `trained` in the ledger is an expectation. Raises as `PackedExampleRows` does.
    """

    layout = "prefix"

    def __init__(
        self,
        store: MarkedStore,
        options: RowOptions,
        *,
        seed: int,
        too_long: TooLongPolicy = "cut-context",
        pack: bool = True,
    ) -> None:
        super().__init__(store, options, too_long=too_long, pack=pack)
        self.random_streams = RandomStreams(seed)
        if not self.is_marked:
            # A prefix of n tokens of text is uniform over 1 to n - 1, so on average half of a piece is labels.
            trained = int((self.pieces.stop_P - self.pieces.start_P).sum()) // 2
            self.ledger = replace(self.ledger, trained=trained, context=self.ledger.placed - trained)

    @property
    def is_random(self) -> bool:
        return not self.is_marked

    def get_row(self, row: int, position: int) -> Row:
        inputs, labels_T, *_ = super().get_row(row, position)
        labels_T, prefix_T = labels_T.copy(), np.zeros(len(labels_T), np.int64)
        rng, begin = self.random_streams.generator(row, position), 0
        pieces = self.pieces
        for piece in self.row_pieces(row):
            end = begin + int(pieces.positions_P[piece])
            if self.is_marked:  # labels are shifted by one: the first one is at the last token of the prefix
                size = int(np.argmax(labels_T[begin:end] != IGNORED)) + 1
            else:
                size = len(self.frame.prefix_ids) + int(rng.integers(1, pieces.stop_P[piece] - pieces.start_P[piece]))
            labels_T[begin : begin + size - 1] = IGNORED
            prefix_T[begin : begin + size] = 1
            begin = end
        return Row({**inputs, "prefix": prefix_T}, labels_T, int((labels_T != IGNORED).sum()))
