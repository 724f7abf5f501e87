"""What does a model go on from, when it is to write itself? The beginnings of texts, with room behind them.

Running text is cut into windows, and each window's first tokens are a prompt; of an example it is everything before its
answer. The places behind a prompt are labelled with a token that means nothing: what is written there is decided when the row
is read, by the model in training. With a prompt of no tokens all begins at the BOS, or, where a tokenizer sets none, at the
end of another text.

Legend: R rows, P tokens of a prompt, T positions of a row.
"""

from __future__ import annotations

import numpy as np

from postgrad.data.layouts.rows import IGNORED, Row, keep
from postgrad.data.layouts.windows import Marked, ledger_of, room_for_text, texts_of, windows_of
from postgrad.data.render.frame import BARE, Frame

PLACE = 0
"""The label of a place that is still to be written."""


class PromptRows:
    """Rows of a prompt and `new` places: `input_ids`, `position_ids` and labels, of shape (T,) with T = P + new - 1.

    `prompt`: tokens of running text that a prompt has. The beginning of one that has no room is cut. `lead`: tokens at each
    document's start that the frame replaces (1 for a BOS). The ledger's `trained` are the places: a text may end before.
    Raises `StageError` when a row has no room.
    """

    layout = "prompts"
    drawn = False

    def __init__(
        self,
        store: Marked,
        length: int,
        *,
        prompt: int,
        new: int,
        eos: int,
        frame: Frame = BARE,
        lead: int = 0,
        held_out: float = 0.0,
        excluded: np.ndarray | None = None,
        max_document_tokens: int | None = None,
    ) -> None:
        self.store, self.frame, self.new, self.eos = store, frame, new, eos
        room = room_for_text(length, frame.size(2) + new - 1, 1)
        kept = keep(store, held_out=held_out, excluded=excluded, most=max_document_tokens)
        texts = texts_of(store, kept, lead)
        texts = texts.only(texts.size_N > 0)
        self.skipped = {"no text": len(kept.documents) - len(texts.document_N)}
        self.marked = store.marks(0) is not None
        if self.marked:
            split_N = np.array([_asked(store, *place) for place in texts.places()], np.int64)
            some_N = split_N > texts.start_N
            self.skipped["no question"] = int((~some_N).sum())
            self.document_R, self.stop_R = texts.document_N[some_N], split_N[some_N]
            self.start_R = np.maximum(texts.start_N[some_N], self.stop_R - room)
        else:
            windows = windows_of(texts, max(prompt, 1) + new)
            self.document_R, self.start_R = windows.document_R, windows.start_R
            self.stop_R = np.minimum(windows.start_R + min(prompt, room), windows.stop_R)
        placed = int((self.stop_R - self.start_R).sum())
        ledger = ledger_of(kept, placed=placed, trained=placed)
        self.ledger = type(ledger)(**{**ledger.as_dict(), "trained": len(self) * new, "context": placed})

    def __len__(self) -> int:
        return len(self.document_R)

    def at(self, row: int, position: int) -> Row:
        """The prompt, and places behind it."""
        before, between, _ = self.frame.parts
        text = self.store.read(int(self.document_R[row]), int(self.start_R[row]), int(self.stop_R[row]))
        ids_P = np.concatenate((before, text, between if self.marked else between[:0])).astype(np.int64)
        if not len(ids_P):
            ids_P = np.array([self.eos], np.int64)
        ids_T = np.concatenate((ids_P, np.full(self.new - 1, PLACE, np.int64)))
        labels_T = np.full(len(ids_T), IGNORED, np.int64)
        labels_T[len(ids_P) - 1 :] = PLACE
        return Row({"input_ids": ids_T, "position_ids": np.arange(len(ids_T))}, labels_T, self.new)


def _asked(store: Marked, document: int, start: int, stop: int) -> int:
    """Where the first answer of a marked document begins; its start when there is none."""
    marks = store.marks(document, start, stop)
    assert marks is not None, "all documents of a store are marked, or none"
    return start + int(np.argmax(marks != 0)) if marks.any() else start
