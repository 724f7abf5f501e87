"""Scoring of many answers to one question by an encoder-decoder that encodes the question once.

Legend: B rows, S tokens of the longest context, T tokens of the longest answer.

A batch takes two forward passes. The first encodes its contexts and gives the decoder its prefix (the start token, and what
follows it in every answer: BART's BOS, a language code), which scores the first token of every answer. The second decodes the
answers but their last tokens, a row for each answer, with the cross-attention keys and values that the first pass computed
from the contexts. Whether an architecture supports that is tested; for one that
does not, every answer is a row of its own, with its context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

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
"""Cross-attention keys and values of the answers' rows, in multiples of the tokens of a batch."""


class ChoiceRequest(NamedTuple):
    """A choice after a context (S,); the scores of its tokens have the numbers from `slot` on."""

    context: np.ndarray
    choice: tuple[int, ...]
    slot: int


class _ContextChoices(NamedTuple):
    """A context with some of its choices: the row of the decoder's prefix, and the rows of the answers."""

    context: np.ndarray
    first_row: TreeRow
    later_rows: tuple[TreeRow, ...]


class EncoderDecoderScorer:
    """An encoder-decoder and its batches of questions."""

    def __init__(
        self,
        model: HeadedModel,
        requests: Sequence[ChoiceRequest],
        pad: int,
        batch_tokens: int,
        decoder_prefix: Sequence[int],
    ) -> None:
        self.model, self.pad = model, pad
        self.prefix = np.array(decoder_prefix, np.int64)
        questions = list(self._group_by_context(requests, batch_tokens))
        longest = max(questions, key=lambda question: len(question.context), default=None)
        self.shares_encoding = longest is not None and self._sharing_agrees(longest)
        self.batches = list(_split_batches(questions, batch_tokens))
        self.has_later_rows = any(question.later_rows for question in questions)
        decoded = sum(len(row.ids) for question in questions for row in question.later_rows)
        if self.shares_encoding:
            self.tokens_read = decoded + sum(len(question.context) + len(self.prefix) for question in questions)
        else:
            encoded = [len(question.context) * max(1, len(question.later_rows)) for question in questions]
            self.tokens_read = decoded + sum(encoded)

    def __len__(self) -> int:
        return len(self.batches)

    def shares_trunk(self, a: int, b: int) -> bool:
        """Batches share nothing."""
        return True

    def prepare(self, batch_numbers: Sequence[int], own_number: int) -> None:
        """Batches have no trunk."""

    def score_batch(self, number: int) -> TokenScores:
        """The answers of a batch of questions."""
        return (self._score_shared if self.shares_encoding else self._score_unshared)(self.batches[number])

    def _group_by_context(self, requests: Sequence[ChoiceRequest], batch_tokens: int) -> Iterator[_ContextChoices]:
        """Each context once, sorted by length; one with very many choices several times."""
        by_context: dict[bytes, list[ChoiceRequest]] = {}
        for request in requests:
            by_context.setdefault(request.context.tobytes(), []).append(request)
        for group in sorted(by_context.values(), key=lambda group: len(group[0].context)):
            count = max(1, _KEYS_AT_ONCE * batch_tokens // len(group[0].context))
            for begin in range(0, len(group), count):
                part = group[begin : begin + count]
                begins = [Branch(self.prefix, len(self.prefix), a.choice[:1], a.slot) for a in part]
                longer: dict[tuple[int, ...], list[Branch]] = {}
                for a in part:
                    if len(a.choice) > 1:
                        branch = Branch(np.array(a.choice[:-1], np.int64), 1, a.choice[1:], a.slot + 1)
                        longer.setdefault(a.choice[:-1], []).append(branch)
                rows = (build_tree(same, 0) for same in longer.values())
                yield _ContextChoices(part[0].context, build_tree(begins, 0), tuple(rows))

    def _sharing_agrees(self, question: _ContextChoices) -> bool:
        """Whether the answers to a question that is encoded once score as those to one that is encoded for each answer."""
        two = question._replace(later_rows=question.later_rows[:2])
        try:
            unshared = self._score_unshared([two])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # a layer after the output embedding needs full logits
            raise ModelError(
                f"the logits of this architecture ({self.model.pretrained.config.model_type}) are not its output embedding "
                "applied to its last hidden states",
                where="model",
                expected="an encoder-decoder with a plain head, as T5 has it",
            ) from error
        try:
            self.has_later_rows = bool(two.later_rows)
            shared = self._score_shared([two])
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError):
            return False
        by_slot = dict(zip(unshared.slot.tolist(), unshared.log_p.tolist(), strict=True))
        plain = np.array([by_slot[slot] for slot in shared.slot.tolist()])
        tolerance = torch.finfo(next(self.model.parameters()).dtype).eps ** 0.5
        return bool((np.abs(shared.log_p - plain) <= tolerance * np.maximum(1, np.abs(plain))).all())

    def _score_shared(self, questions: Sequence[_ContextChoices]) -> TokenScores:
        contexts_BS, mask_BS = self._pad_contexts([question.context for question in questions])
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        prefix_BP = torch.from_numpy(self.prefix).to(contexts_BS.device).expand(len(questions), -1)
        with _record_outputs(self.model.pretrained.get_encoder()) as encoded:
            output = self.model(
                input_ids=contexts_BS, attention_mask=mask_BS, decoder_input_ids=prefix_BP, past_key_values=cache
            )
        first = score_rows(output.hidden, output.head, [question.first_row for question in questions])
        if not self.has_later_rows:
            return first
        rows = [row for question in questions for row in question.later_rows]
        counts = [len(question.later_rows) for question in questions]
        of = torch.from_numpy(np.repeat(np.arange(len(questions)), counts)).to(contexts_BS.device)
        is_dummy = not rows  # other ranks have some: sharded models need the call
        if is_dummy:
            rows, of = [build_tree([Branch(np.array([self.pad]), 1, (self.pad,), 0)], 0)], of.new_zeros(1)
        cache.batch_select_indices(of)
        output = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded[0][of]),
            attention_mask=mask_BS[of],
            decoder_input_ids=self._decoder_ids(rows),
            past_key_values=cache,
        )
        return first if is_dummy else _concatenate(first, score_rows(output.hidden, output.head, rows))

    def _score_unshared(self, questions: Sequence[_ContextChoices]) -> TokenScores:
        contexts = [question.context for question in questions for _ in question.later_rows or (None,)]
        rows = [row for question in questions for row in self._full_rows(question)]
        contexts_BS, mask_BS = self._pad_contexts(contexts)
        output = self.model(input_ids=contexts_BS, attention_mask=mask_BS, decoder_input_ids=self._decoder_ids(rows))
        return score_rows(output.hidden, output.head, rows)

    def _full_rows(self, question: _ContextChoices) -> list[TreeRow]:
        """The rows of the answers after the decoder's prefix; the first one also scores the answers' first tokens."""
        rows = []
        for row in question.later_rows:
            ids = np.append(self.prefix, row.ids)
            size = np.full(len(ids), len(ids))
            source_A = row.source_A + len(self.prefix)
            rows.append(TreeRow(ids, np.arange(len(ids)), size, source_A, row.target_A, row.slot_A))
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
        """Ids and attention mask, (B, S)."""
        width = max(map(len, contexts))
        ids = np.full((len(contexts), width), self.pad, np.int64)
        for i, context in enumerate(contexts):
            ids[i, : len(context)] = context
        sizes = np.array([len(context) for context in contexts])
        mask = (np.arange(width) < sizes[:, None]).astype(np.int64)
        device = next(self.model.parameters()).device
        return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)

    def _decoder_ids(self, rows: Sequence[TreeRow]) -> Tensor:
        """The decoder's inputs, (B, T); padding is on the right, where causal attention does not look."""
        ids_BT = pad_rows(rows, max(len(row.ids) for row in rows), 0, self.pad)[0]
        return torch.from_numpy(ids_BT).to(next(self.model.parameters()).device)


def _split_batches(questions: Sequence[_ContextChoices], batch_tokens: int) -> Iterator[list[_ContextChoices]]:
    """Questions of similar length, as many as fit the token budgets of encoder and cross-attention."""
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
    """Inside, the first output of every call of a module is recorded."""
    outputs: list[Tensor] = []
    hook = module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output[0]))
    try:
        yield outputs
    finally:
        hook.remove()
