"""What does a model go on from, when it is to write itself? The beginnings of texts, with room behind them.

Running text is cut into windows, and each window's first tokens are a prompt; of an example it is everything before its
answer. The places behind a prompt are labelled with a token that means nothing: what is written there is decided when the row
is read, by the model in training. With a prompt of no tokens all begins at the BOS, or, where a tokenizer sets none, at the
end of another text.

Legend: R rows, P tokens of a prompt, T positions of a row.
"""

from __future__ import annotations

import numpy as np

from postgrad.data.layouts.rows import IGNORED, Row, RowOptions
from postgrad.data.layouts.windows import MarkedStore, locate_texts, make_ledger, max_text_tokens, split_windows

PENDING = 0
"""The label of a place that is still to be written."""


class PromptRows:
    """Rows of a prompt and `new` places: `input_ids`, `position_ids` and labels, of shape (T,) with T = P + new - 1.

    `prompt`: tokens of running text that a prompt has. The beginning of one that has no room is cut. `lead`: tokens at each
    document's start that the frame replaces (1 for a BOS). The ledger's `trained` are the places: a text may end before.
    Raises `StageError` when a row has no room.
    """

    layout = "prompts"
    is_random = False

    def __init__(
        self,
        store: MarkedStore,
        options: RowOptions,
        *,
        prompt_tokens: int,
        new_tokens: int,
        eos: int,
    ) -> None:
        self.store, self.frame, self.new_tokens, self.eos = store, options.frame, new_tokens, eos
        room = max_text_tokens(options.length, options.frame.size(2) + new_tokens - 1, 1)
        kept = options.select_documents(store)
        texts = locate_texts(store, kept, options.lead)
        texts = texts.select(texts.size_N > 0)
        self.skipped = {"no text": len(kept.documents) - len(texts.document_N)}
        self.is_marked = store.marks(0) is not None
        if self.is_marked:
            split_N = np.array([_prompt_end(store, *place) for place in texts.spans()], np.int64)
            some_N = split_N > texts.start_N
            self.skipped["no question"] = int((~some_N).sum())
            self.document_R, self.stop_R = texts.document_N[some_N], split_N[some_N]
            self.start_R = np.maximum(texts.start_N[some_N], self.stop_R - room)
        else:
            windows = split_windows(texts, max(prompt_tokens, 1) + new_tokens)
            self.document_R, self.start_R = windows.document_R, windows.start_R
            self.stop_R = np.minimum(windows.start_R + min(prompt_tokens, room), windows.stop_R)
        placed = int((self.stop_R - self.start_R).sum())
        ledger = make_ledger(kept, placed=placed, trained=placed)
        self.ledger = type(ledger)(**{**ledger.as_dict(), "trained": len(self) * new_tokens, "context": placed})

    def __len__(self) -> int:
        return len(self.document_R)

    def get_row(self, row: int, position: int) -> Row:
        """The prompt, and places behind it."""
        before, between, _ = self.frame.arrays
        text = self.store.read(int(self.document_R[row]), int(self.start_R[row]), int(self.stop_R[row]))
        ids_P = np.concatenate((before, text, between if self.is_marked else between[:0])).astype(np.int64)
        if not len(ids_P):
            ids_P = np.array([self.eos], np.int64)
        ids_T = np.concatenate((ids_P, np.full(self.new_tokens - 1, PENDING, np.int64)))
        labels_T = np.full(len(ids_T), IGNORED, np.int64)
        labels_T[len(ids_P) - 1 :] = PENDING
        return Row({"input_ids": ids_T, "position_ids": np.arange(len(ids_T))}, labels_T, self.new_tokens)


def _prompt_end(store: MarkedStore, document: int, start: int, stop: int) -> int:
    """Where the first answer of a marked document begins; its start when there is none."""
    marks = store.marks(document, start, stop)
    assert marks is not None, "all documents of a store are marked, or none"
    return start + int(np.argmax(marks != 0)) if marks.any() else start
