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

from postgrad.data.layouts.packed_examples import TooLong, WholeRows
from postgrad.data.layouts.rows import IGNORED, Row
from postgrad.data.layouts.windows import Marked
from postgrad.data.random_streams import Draws
from postgrad.data.render.frame import BARE, Frame


class PrefixRows(WholeRows):
    """Rows of whole pieces, as `WholeRows` has them, with `prefix` of shape (T,) among the inputs: 1 for tokens of a prefix.

    Of running text `trained` in the ledger is what it comes to on average. Raises what `WholeRows` raises.
    """

    layout = "prefix"

    def __init__(
        self,
        store: Marked,
        length: int,
        *,
        seed: int,
        frame: Frame = BARE,
        too_long: TooLong = "cut-context",
        lead: int = 0,
        together: bool = True,
        held_out: float = 0.0,
        excluded: np.ndarray | None = None,
        max_document_tokens: int | None = None,
    ) -> None:
        super().__init__(
            store,
            length,
            frame=frame,
            too_long=too_long,
            lead=lead,
            together=together,
            held_out=held_out,
            excluded=excluded,
            max_document_tokens=max_document_tokens,
        )
        self.draws = Draws(seed)
        if not self.marked:
            # Of n tokens any number from 1 to n - 1 is as likely as the others.
            trained = int((self.pieces.stop_P - self.pieces.start_P).sum()) // 2
            self.ledger = replace(self.ledger, trained=trained, context=self.ledger.placed - trained)

    @property
    def drawn(self) -> bool:
        """Where the prefix of a running text ends is."""
        return not self.marked

    def at(self, row: int, position: int) -> Row:
        """The row with the prefix of each of its pieces; a label that stands inside a prefix is none."""
        inputs, labels_T, _ = super().at(row, position)
        labels_T, prefix_T = labels_T.copy(), np.zeros(len(labels_T), np.int64)
        draws, begin = self.draws.at(row, position), 0
        pieces = self.pieces
        for piece in self.pieces_of(row):
            end = begin + int(pieces.positions_P[piece])
            if self.marked:  # the label of a token is the next one, so the first stands at the prefix's last
                size = int(np.argmax(labels_T[begin:end] != IGNORED)) + 1
            else:
                size = len(self.frame.before) + int(draws.integers(1, pieces.stop_P[piece] - pieces.start_P[piece]))
            labels_T[begin : begin + size - 1] = IGNORED
            prefix_T[begin : begin + size] = 1
            begin = end
        return Row({**inputs, "prefix": prefix_T}, labels_T, int((labels_T != IGNORED).sum()))
