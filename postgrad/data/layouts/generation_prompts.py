"""Prompts for on-policy training: the start of a text, followed by positions for the tokens that the model samples.

Legend: R rows, P tokens of a prompt, T positions of a row.

Running text is split into windows, and the first tokens of each are a prompt; the prompt of an example is everything before
its first answer. The model samples the remaining tokens when the row is used; until then a placeholder id fills them. An
empty prompt is the BOS alone or, for a tokenizer without BOS, an EOS.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from postgrad.data.layouts.rows import IGNORED, Row, RowOptions
from postgrad.data.layouts.teacher_context import CONTEXT_TOO_LONG, split_contexts
from postgrad.data.layouts.windows import (
    MarkedStore,
    locate_texts,
    make_ledger,
    max_text_tokens,
    read_marks,
    split_windows,
)
from postgrad.data.render.renderers import ANSWER

PENDING = 0
"""Placeholder id and label of a token to be sampled."""


class PromptRows:
    """Rows of a prompt and `new_tokens` positions: `input_ids`, `position_ids`, labels, of shape (T,), T = P + new - 1.

    `with_answers`: the labels are a row's own answer, which the sampled one is compared with. `prompt_tokens`: prompt length in
    running text. Prompts that do not fit lose their beginning. `trained` in the ledger
    counts all new positions, though a sampled text may end earlier. Raises `StageError` when a row has no room.
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
        with_answers: bool = False,
    ) -> None:
        self.store, self.frame, self.new_tokens, self.eos = store, options.frame, new_tokens, eos
        self.with_answers = with_answers
        added_tokens = self.frame.size(2) + new_tokens - 1
        max_tokens = max_text_tokens(options.length, added_tokens, 1)
        selected = options.select_documents(store)
        texts = locate_texts(store, selected, options.lead)
        texts, self.contexts = split_contexts(store, texts, options.context, options.length, added_tokens)
        texts = texts.select(texts.size_N > 0)
        self.skipped = {
            "no text": len(selected.documents) - len(texts.document_N) - self.contexts.skipped,
            CONTEXT_TOO_LONG: self.contexts.skipped,
        }
        self.is_marked = store.marks(0) is not None
        if self.is_marked:
            stop_N = np.array([_prompt_end(store, *span) for span in texts.spans()], np.int64)
            has_prompt_N = stop_N > texts.start_N
            self.skipped["no question"] = int((~has_prompt_N).sum())
            self.document_R, self.stop_R = texts.document_N[has_prompt_N], stop_N[has_prompt_N]
            self.start_R = np.maximum(texts.start_N[has_prompt_N], self.stop_R - max_tokens)
        else:
            windows = split_windows(texts, max(prompt_tokens, 1) + new_tokens)
            self.document_R, self.start_R = windows.document_R, windows.start_R
            self.stop_R = np.minimum(windows.start_R + min(prompt_tokens, max_tokens), windows.stop_R)
        placed = int((self.stop_R - self.start_R).sum()) + self.contexts.tokens
        ledger = make_ledger(selected, placed=placed, trained=placed)
        self.ledger = replace(ledger, trained=len(self) * new_tokens, context=placed)

    def __len__(self) -> int:
        return len(self.document_R)

    def get_row(self, row: int, position: int) -> Row:
        prefix, separator, _ = self.frame.arrays
        text = self.store.read(int(self.document_R[row]), int(self.start_R[row]), int(self.stop_R[row]))
        ids_P = np.concatenate((prefix, text, separator if self.is_marked else separator[:0])).astype(np.int64)
        if not len(ids_P):
            ids_P = np.array([self.eos], np.int64)
        ids_T = np.concatenate((ids_P, np.full(self.new_tokens - 1, PENDING, np.int64)))
        labels_T = np.full(len(ids_T), IGNORED, np.int64)
        labels_T[len(ids_P) - 1 :] = PENDING
        if self.with_answers:
            labels_T[len(ids_P) - 1 :] = self._read_answer(row)
        contexts = self.contexts.before(int(self.document_R[row]), len(prefix), 0, len(ids_T))
        return Row({"input_ids": ids_T, "position_ids": np.arange(len(ids_T))}, labels_T, self.new_tokens, contexts)

    def _read_answer(self, row: int) -> np.ndarray:
        """The first answer of a row's document, cut or filled with EOS to `new_tokens`."""
        document, start = int(self.document_R[row]), int(self.stop_R[row])
        stop = int(np.asarray(self.store.documents)["tokens"][document])
        is_answer = read_marks(self.store, document, start, stop) == ANSWER
        size = min(len(is_answer) if is_answer.all() else int(np.argmin(is_answer)), self.new_tokens)
        answer = np.full(self.new_tokens, self.eos, np.int64)
        answer[:size] = self.store.read(document, start, start + size)
        return answer


def _prompt_end(store: MarkedStore, document: int, start: int, stop: int) -> int:
    """The start of a document's first answer; `start` when it has none."""
    marks = read_marks(store, document, start, stop)
    return start + int(np.argmax(marks != 0)) if marks.any() else start
