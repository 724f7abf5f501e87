"""Where does the prefix of a piece end? Before its answer; in running text wherever it is cut, anew at each position.

Legend: T positions in a row, P pieces.

Rows for a prefix language model (Raffel et al. 2020, section 3.2.1): a prefix is read in both directions, the rest
causally, and only the rest is asked for. The last token of the prefix sees all of it and already says what comes next:

    text        a b c d e f      prefix of 3: a b c
    inputs      a b c d e        the last token is only a label
    prefix      1 1 1 0 0
    labels      - - d e f

Of an example everything before its answer is the prefix. Running text is cut into pieces that are no longer than a row; the
end of each piece's prefix is drawn uniformly from all places that leave some text on either side, and depends on seed, row
and position alone: not on what stands around the text, so that models under different prompts are asked for the same.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from postgrad.data.layouts.packed_examples import PackedExampleRows, TooLongPolicy
from postgrad.data.layouts.rows import IGNORED, Row, RowOptions
from postgrad.data.layouts.windows import MarkedStore
from postgrad.data.random_streams import RandomStreams


class PrefixRows(PackedExampleRows):
    """Rows of whole pieces, as `WholeRows` has them, with `prefix` of shape (T,) among the inputs: 1 for tokens of a prefix.

    Of running text `trained` in the ledger is what it comes to on average. Raises what `WholeRows` raises.
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
        super().__init__(
            store,
            options,
            too_long=too_long,
            pack=pack,
        )
        self.random_streams = RandomStreams(seed)
        if not self.is_marked:
            # Of n tokens any number from 1 to n - 1 is as likely as the others.
            trained = int((self.pieces.stop_P - self.pieces.start_P).sum()) // 2
            self.ledger = replace(self.ledger, trained=trained, context=self.ledger.placed - trained)

    @property
    def is_random(self) -> bool:
        """Where the prefix of a running text ends is."""
        return not self.is_marked

    def get_row(self, row: int, position: int) -> Row:
        """The row with the prefix of each of its pieces; a label that stands inside a prefix is none."""
        inputs, labels_T, _ = super().get_row(row, position)
        labels_T, prefix_T = labels_T.copy(), np.zeros(len(labels_T), np.int64)
        draws, begin = self.random_streams.generator(row, position), 0
        pieces = self.pieces
        for piece in self.row_pieces(row):
            end = begin + int(pieces.positions_P[piece])
            if self.is_marked:  # the label of a token is the next one, so the first stands at the prefix's last
                size = int(np.argmax(labels_T[begin:end] != IGNORED)) + 1
            else:
                size = len(self.frame.prefix_ids) + int(draws.integers(1, pieces.stop_P[piece] - pieces.start_P[piece]))
            labels_T[begin : begin + size - 1] = IGNORED
            prefix_T[begin : begin + size] = 1
            begin = end
        return Row({**inputs, "prefix": prefix_T}, labels_T, int((labels_T != IGNORED).sum()))
