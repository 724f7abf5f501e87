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
from postgrad.evaluation.choices.decoder import Answers, answers, filled
from postgrad.evaluation.choices.token_tree import Branch, Row, grown
from postgrad.models.model import HeadedModel

_KEYS_AT_ONCE = 4
"""How many times the tokens of a batch may be kept as keys and values for the rows of answers."""


class Asked(NamedTuple):
    """A choice behind a context (S,); its tokens' answers have the numbers from `slot` on."""

    context: np.ndarray
    choice: tuple[int, ...]
    slot: int


class _Question(NamedTuple):
    """A context with some of its choices: the row that only begins, and the rows that go on."""

    context: np.ndarray
    begins: Row
    goes_on: tuple[Row, ...]


class EncoderDecoder:
    """An encoder-decoder and the batches of questions that it reads."""

    def __init__(self, model: HeadedModel, wanted: Sequence[Asked], pad: int, at_once: int) -> None:
        self.model, self.pad = model, pad
        self.start = _start(model)
        questions = list(self._questions(wanted, at_once))
        longest = max(questions, key=lambda question: len(question.context), default=None)
        self.once = longest is not None and self._agrees(longest)
        self.batches = list(_together(questions, at_once))
        self.more = any(question.goes_on for question in questions)
        decoded = sum(len(row.ids) for question in questions for row in question.goes_on)
        if self.once:
            self.read = decoded + sum(len(question.context) + 1 for question in questions)
        else:
            whole = [len(question.context) * max(1, len(question.goes_on)) for question in questions]
            self.read = decoded + sum(whole)

    def __len__(self) -> int:
        return len(self.batches)

    def same(self, a: int, b: int) -> bool:
        """Nothing is kept from one batch to the next."""
        return True

    def before(self, turn: Sequence[int], mine: int) -> None:
        """Nothing stands before a batch."""

    def answers(self, number: int) -> Answers:
        """The answers of a batch of questions."""
        return (self._once if self.once else self._whole)(self.batches[number])

    def _questions(self, wanted: Sequence[Asked], at_once: int) -> Iterator[_Question]:
        """Each context once, in the order of lengths; one with very many choices more than once."""
        by_context: dict[bytes, list[Asked]] = {}
        for asked in wanted:
            by_context.setdefault(asked.context.tobytes(), []).append(asked)
        for some in sorted(by_context.values(), key=lambda some: len(some[0].context)):
            most = max(1, _KEYS_AT_ONCE * at_once // len(some[0].context))
            for begin in range(0, len(some), most):
                part = some[begin : begin + most]
                begins = [Branch(np.array([self.start]), 1, a.choice[:1], a.slot) for a in part]
                longer: dict[tuple[int, ...], list[Branch]] = {}
                for a in part:
                    if len(a.choice) > 1:
                        branch = Branch(np.array(a.choice[:-1], np.int64), 1, a.choice[1:], a.slot + 1)
                        longer.setdefault(a.choice[:-1], []).append(branch)
                rows = (grown(same, 0) for same in longer.values())
                yield _Question(part[0].context, grown(begins, 0), tuple(rows))

    def _agrees(self, question: _Question) -> bool:
        """Whether a question that is encoded once says the same as one that is encoded for each answer."""
        two = question._replace(goes_on=question.goes_on[:2])
        try:
            whole = self._whole([two])
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
            self.more = bool(two.goes_on)
            once = self._once([two])
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError):
            return False
        by_slot = dict(zip(whole.slot.tolist(), whole.log_p.tolist(), strict=True))
        plain = np.array([by_slot[slot] for slot in once.slot.tolist()])
        tolerance = torch.finfo(next(self.model.parameters()).dtype).eps ** 0.5
        return bool((np.abs(once.log_p - plain) <= tolerance * np.maximum(1, np.abs(plain))).all())

    def _once(self, questions: Sequence[_Question]) -> Answers:
        contexts_BS, seen_BS = self._contexts([question.context for question in questions])
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        begin_B1 = torch.full((len(questions), 1), self.start, device=contexts_BS.device)
        with _heard(self.model.pretrained.get_encoder()) as heard:
            output = self.model(
                input_ids=contexts_BS, attention_mask=seen_BS, decoder_input_ids=begin_B1, past_key_values=cache
            )
        first = answers(output.hidden, output.head, [question.begins for question in questions])
        if not self.more:
            return first
        rows = [row for question in questions for row in question.goes_on]
        counts = [len(question.goes_on) for question in questions]
        of = torch.from_numpy(np.repeat(np.arange(len(questions)), counts)).to(contexts_BS.device)
        alone = not rows  # beside ranks that have some
        if alone:
            rows, of = [grown([Branch(np.array([self.pad]), 1, (self.pad,), 0)], 0)], of.new_zeros(1)
        cache.batch_select_indices(of)
        output = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=heard[0][of]),
            attention_mask=seen_BS[of],
            decoder_input_ids=self._ids(rows),
            past_key_values=cache,
        )
        return first if alone else _joined(first, answers(output.hidden, output.head, rows))

    def _whole(self, questions: Sequence[_Question]) -> Answers:
        contexts = [question.context for question in questions for _ in question.goes_on or (None,)]
        rows = [row for question in questions for row in self._complete(question)]
        contexts_BS, seen_BS = self._contexts(contexts)
        output = self.model(input_ids=contexts_BS, attention_mask=seen_BS, decoder_input_ids=self._ids(rows))
        return answers(output.hidden, output.head, rows)

    def _complete(self, question: _Question) -> list[Row]:
        """The rows that go on behind what the decoder begins with, the first of them with what is asked there."""
        rows = []
        for row in question.goes_on:
            ids = np.append(self.start, row.ids)
            size = np.full(len(ids), len(ids))
            rows.append(Row(ids, np.arange(len(ids)), size, row.asked_A + 1, row.wanted_A, row.slot_A))
        if not rows:
            return [question.begins]
        first, begins = rows[0], question.begins
        rows[0] = Row(
            first.ids,
            first.depth,
            first.end,
            np.append(begins.asked_A, first.asked_A),
            np.append(begins.wanted_A, first.wanted_A),
            np.append(begins.slot_A, first.slot_A),
        )
        return rows

    def _contexts(self, contexts: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Ids and what of them is seen, (B, S)."""
        width = max(map(len, contexts))
        ids = np.full((len(contexts), width), self.pad, np.int64)
        for i, context in enumerate(contexts):
            ids[i, : len(context)] = context
        sizes = np.array([len(context) for context in contexts])
        seen = (np.arange(width) < sizes[:, None]).astype(np.int64)
        device = next(self.model.parameters()).device
        return torch.from_numpy(ids).to(device), torch.from_numpy(seen).to(device)

    def _ids(self, rows: Sequence[Row]) -> Tensor:
        """What the decoder reads, (B, T); padding stands on the right, where nothing looks."""
        ids_BT = filled(rows, max(len(row.ids) for row in rows), 0, self.pad)[0]
        return torch.from_numpy(ids_BT).to(next(self.model.parameters()).device)


def _start(model: HeadedModel) -> int:
    """What a decoder begins with. Raises `ModelError` when the configuration names nothing."""
    config: Any = model.pretrained.config
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        token = getattr(config, name, None)
        if token is not None:
            return int(token)
    raise ModelError("the configuration names no decoder_start_token_id", where="model")


def _together(questions: Sequence[_Question], at_once: int) -> Iterator[list[_Question]]:
    """Questions of like length, as many as may be read at once."""
    group: list[_Question] = []
    rows = 0
    for question in questions:  # in the order of lengths, so the newest is the longest
        size, more = len(question.context), max(1, len(question.goes_on))
        if group and ((len(group) + 1) * size > at_once or (rows + more) * size > _KEYS_AT_ONCE * at_once):
            yield group
            group, rows = [], 0
        group.append(question)
        rows += more
    if group:
        yield group


def _joined(a: Answers, b: Answers) -> Answers:
    return Answers(*(np.concatenate(pair) for pair in zip(a, b, strict=True)))


@contextmanager
def _heard(module: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, the first output of every call of a module is kept."""
    heard: list[Tensor] = []
    hook = module.register_forward_hook(lambda _module, _inputs, output: heard.append(output[0]))
    try:
        yield heard
    finally:
        hook.remove()
