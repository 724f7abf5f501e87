"""What does an encoder-decoder think of many answers to one question, which is encoded once?

Legend: B rows, S tokens of the longest context, T tokens of the longest answer.

A batch is read in two steps. The first encodes its contexts and lets the decoder read what it always begins with, which
tells the first token of every answer. The second lets it go on with the answers' tokens but the last, a row for each answer,
with the keys and values that the first step made of the contexts. Whether an architecture allows that is tried; one that
does not reads every answer in a row of its own, with its context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from postgrad.errors import ModelError
from postgrad.evaluation.choices.decoder import TokenScores, pad_rows, score_rows
from postgrad.evaluation.choices.token_tree import Branch, TreeRow, build_tree
from postgrad.models.model import HeadedModel

_KEYS_AT_ONCE = 4
"""How many times the tokens of a batch may be kept as keys and values for the rows of answers."""


class ChoiceRequest(NamedTuple):
    """A choice behind a context (S,); its tokens' answers have the numbers from `slot` on."""

    context: np.ndarray
    choice: tuple[int, ...]
    slot: int


class _ContextChoices(NamedTuple):
    """A context with some of its choices: the row that only begins, and the rows that go on."""

    context: np.ndarray
    first_row: TreeRow
    later_rows: tuple[TreeRow, ...]


class EncoderDecoderScorer:
    """An encoder-decoder and the batches of questions that it reads."""

    def __init__(self, model: HeadedModel, requests: Sequence[ChoiceRequest], pad: int, batch_tokens: int) -> None:
        self.model, self.pad = model, pad
        self.start_token = _start_token(model)
        questions = list(self._group_by_context(requests, batch_tokens))
        longest = max(questions, key=lambda question: len(question.context), default=None)
        self.shares_encoding = longest is not None and self._sharing_agrees(longest)
        self.batches = list(_split_batches(questions, batch_tokens))
        self.has_later_rows = any(question.later_rows for question in questions)
        decoded = sum(len(row.ids) for question in questions for row in question.later_rows)
        if self.shares_encoding:
            self.tokens_read = decoded + sum(len(question.context) + 1 for question in questions)
        else:
            whole = [len(question.context) * max(1, len(question.later_rows)) for question in questions]
            self.tokens_read = decoded + sum(whole)

    def __len__(self) -> int:
        return len(self.batches)

    def shares_trunk(self, a: int, b: int) -> bool:
        """Nothing is kept from one batch to the next."""
        return True

    def prepare(self, batch_numbers: Sequence[int], own_number: int) -> None:
        """Nothing stands before a batch."""

    def score_batch(self, number: int) -> TokenScores:
        """The answers of a batch of questions."""
        return (self._score_shared if self.shares_encoding else self._score_unshared)(self.batches[number])

    def _group_by_context(self, requests: Sequence[ChoiceRequest], batch_tokens: int) -> Iterator[_ContextChoices]:
        """Each context once, in the order of lengths; one with very many choices more than once."""
        by_context: dict[bytes, list[ChoiceRequest]] = {}
        for asked in requests:
            by_context.setdefault(asked.context.tobytes(), []).append(asked)
        for some in sorted(by_context.values(), key=lambda some: len(some[0].context)):
            most = max(1, _KEYS_AT_ONCE * batch_tokens // len(some[0].context))
            for begin in range(0, len(some), most):
                part = some[begin : begin + most]
                begins = [Branch(np.array([self.start_token]), 1, a.choice[:1], a.slot) for a in part]
                longer: dict[tuple[int, ...], list[Branch]] = {}
                for a in part:
                    if len(a.choice) > 1:
                        branch = Branch(np.array(a.choice[:-1], np.int64), 1, a.choice[1:], a.slot + 1)
                        longer.setdefault(a.choice[:-1], []).append(branch)
                rows = (build_tree(same, 0) for same in longer.values())
                yield _ContextChoices(part[0].context, build_tree(begins, 0), tuple(rows))

    def _sharing_agrees(self, question: _ContextChoices) -> bool:
        """Whether a question that is encoded once says the same as one that is encoded for each answer."""
        two = question._replace(later_rows=question.later_rows[:2])
        try:
            whole = self._score_unshared([two])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # something stands behind the output embedding that wants all logits
            raise ModelError(
                f"the logits of this architecture ({self.model.pretrained.config.model_type}) are not its output embedding "
                "applied to what stands before it",
                where="model",
                expected="an encoder-decoder with a plain head, as T5 has it",
            ) from error
        try:
            self.has_later_rows = bool(two.later_rows)
            once = self._score_shared([two])
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError):
            return False
        by_slot = dict(zip(whole.slot.tolist(), whole.log_p.tolist(), strict=True))
        plain = np.array([by_slot[slot] for slot in once.slot.tolist()])
        tolerance = torch.finfo(next(self.model.parameters()).dtype).eps ** 0.5
        return bool((np.abs(once.log_p - plain) <= tolerance * np.maximum(1, np.abs(plain))).all())

    def _score_shared(self, questions: Sequence[_ContextChoices]) -> TokenScores:
        contexts_BS, seen_BS = self._pad_contexts([question.context for question in questions])
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        begin_B1 = torch.full((len(questions), 1), self.start_token, device=contexts_BS.device)
        with _record_outputs(self.model.pretrained.get_encoder()) as heard:
            output = self.model(
                input_ids=contexts_BS, attention_mask=seen_BS, decoder_input_ids=begin_B1, past_key_values=cache
            )
        first = score_rows(output.hidden, output.head, [question.first_row for question in questions])
        if not self.has_later_rows:
            return first
        rows = [row for question in questions for row in question.later_rows]
        counts = [len(question.later_rows) for question in questions]
        of = torch.from_numpy(np.repeat(np.arange(len(questions)), counts)).to(contexts_BS.device)
        alone = not rows  # beside ranks that have some
        if alone:
            rows, of = [build_tree([Branch(np.array([self.pad]), 1, (self.pad,), 0)], 0)], of.new_zeros(1)
        cache.batch_select_indices(of)
        output = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=heard[0][of]),
            attention_mask=seen_BS[of],
            decoder_input_ids=self._decoder_ids(rows),
            past_key_values=cache,
        )
        return first if alone else _concatenate(first, score_rows(output.hidden, output.head, rows))

    def _score_unshared(self, questions: Sequence[_ContextChoices]) -> TokenScores:
        contexts = [question.context for question in questions for _ in question.later_rows or (None,)]
        rows = [row for question in questions for row in self._full_rows(question)]
        contexts_BS, seen_BS = self._pad_contexts(contexts)
        output = self.model(input_ids=contexts_BS, attention_mask=seen_BS, decoder_input_ids=self._decoder_ids(rows))
        return score_rows(output.hidden, output.head, rows)

    def _full_rows(self, question: _ContextChoices) -> list[TreeRow]:
        """The rows that go on behind what the decoder begins with, the first of them with what is asked there."""
        rows = []
        for row in question.later_rows:
            ids = np.append(self.start_token, row.ids)
            size = np.full(len(ids), len(ids))
            rows.append(TreeRow(ids, np.arange(len(ids)), size, row.source_A + 1, row.target_A, row.slot_A))
        if not rows:
            return [question.first_row]
        first, begins = rows[0], question.first_row
        rows[0] = TreeRow(
            first.ids,
            first.depth,
            first.end,
            np.append(begins.source_A, first.source_A),
            np.append(begins.target_A, first.target_A),
            np.append(begins.slot_A, first.slot_A),
        )
        return rows

    def _pad_contexts(self, contexts: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Ids and what of them is seen, (B, S)."""
        width = max(map(len, contexts))
        ids = np.full((len(contexts), width), self.pad, np.int64)
        for i, context in enumerate(contexts):
            ids[i, : len(context)] = context
        sizes = np.array([len(context) for context in contexts])
        seen = (np.arange(width) < sizes[:, None]).astype(np.int64)
        device = next(self.model.parameters()).device
        return torch.from_numpy(ids).to(device), torch.from_numpy(seen).to(device)

    def _decoder_ids(self, rows: Sequence[TreeRow]) -> Tensor:
        """What the decoder reads, (B, T); padding stands on the right, where nothing looks."""
        ids_BT = pad_rows(rows, max(len(row.ids) for row in rows), 0, self.pad)[0]
        return torch.from_numpy(ids_BT).to(next(self.model.parameters()).device)


def _start_token(model: HeadedModel) -> int:
    """What a decoder begins with. Raises `ModelError` when the configuration names nothing."""
    config: Any = model.pretrained.config
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        token = getattr(config, name, None)
        if token is not None:
            return int(token)
    raise ModelError("the configuration names no decoder_start_token_id", where="model")


def _split_batches(questions: Sequence[_ContextChoices], batch_tokens: int) -> Iterator[list[_ContextChoices]]:
    """Questions of like length, as many as may be read at once."""
    group: list[_ContextChoices] = []
    rows = 0
    for question in questions:  # in the order of lengths, so the newest is the longest
        size, more = len(question.context), max(1, len(question.later_rows))
        if group and ((len(group) + 1) * size > batch_tokens or (rows + more) * size > _KEYS_AT_ONCE * batch_tokens):
            yield group
            group, rows = [], 0
        group.append(question)
        rows += more
    if group:
        yield group


def _concatenate(a: TokenScores, b: TokenScores) -> TokenScores:
    return TokenScores(*(np.concatenate(pair) for pair in zip(a, b, strict=True)))


@contextmanager
def _record_outputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, the first output of every call of a module is kept."""
    heard: list[Tensor] = []
    hook = module.register_forward_hook(lambda _module, _inputs, output: heard.append(output[0]))
    try:
        yield heard
    finally:
        hook.remove()
