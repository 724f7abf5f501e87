"""Log-likelihoods of the choices of multiple-choice items.

Legend: C choices of an item, A answers (scored tokens of choices).

`log p(choice | context)` is the sum over the choice's tokens (Brown et al. 2020, arXiv 2005.14165, section 2.4). It equals
lm-eval's `loglikelihood` on the same ids, with far fewer tokens: a common prefix of items is encoded once (`token_tree`), a
context once for all its choices, and a choice of one token costs no input of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from postgrad.data.render.frame import Frame, count_repeated
from postgrad.errors import DataError, ModelError
from postgrad.evaluation.choices.decoder import DecoderScorer, TokenScores
from postgrad.evaluation.choices.encoder_decoder import ChoiceRequest, EncoderDecoderScorer
from postgrad.evaluation.choices.token_tree import Branch
from postgrad.models.model import CausalModel, HeadedModel, Model
from postgrad.models.task_head_model import decoder_start_token

_TOKENS_AT_ONCE = 8192
BatchScores = tuple[int, TokenScores]
"""The number of a batch, and its scores."""
GatherScores = Callable[[list[BatchScores]], list[BatchScores]]


@dataclass(frozen=True)
class ChoiceItem:
    """One question as ids.

    `context`: everything before the answer (with BOS and soft prompt placeholders); never empty. `choices`: the ids of each
    possible answer, none of them empty.
    """

    context: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ChoiceScores:
    """Scores of the choices, item by item; the arrays of an item have the shape (C,)."""

    log_likelihoods: tuple[np.ndarray, ...]
    """`log p(choice | context)` in nats, so 0 or less; empty for an item that does not fit the context."""
    tokens: tuple[np.ndarray, ...]
    """Tokens of each choice."""
    greedy: tuple[np.ndarray, ...]
    """Whether the choice is the model's greedy continuation."""
    too_long: tuple[int, ...]
    """The numbers of items that exceed the context; they are not scored, and nothing is truncated."""
    tokens_read: int
    """Tokens that went through the model, without padding."""

    def best_choices(self) -> np.ndarray:
        """The number of each item's likeliest choice, -1 for an item that does not fit."""
        return np.array([int(log_p.argmax()) if len(log_p) else -1 for log_p in self.log_likelihoods], np.int64)


def encode_item(
    tokenizer: PreTrainedTokenizerBase,
    frame: Frame,
    context: str,
    choices: Sequence[str],
    *,
    empty: int,
    separate: bool = False,
) -> ChoiceItem:
    """A question and its possible answers as ids; see `encode_items`."""
    return encode_items(tokenizer, frame, [(context, choices)], empty=empty, separate=separate)[0]


def encode_items(
    tokenizer: PreTrainedTokenizerBase,
    frame: Frame,
    questions: Sequence[tuple[str, Sequence[str]]],
    *,
    empty: int,
    separate: bool = False,
) -> list[ChoiceItem]:
    """Questions as ids, split between context and answer as lm-eval does it (`TemplateLM._encode_pair`).

    Spaces at the end of the context belong to the answer. Both are tokenised as one text, and the answer begins after as many
    tokens as the context alone has; with `separate` (encoder-decoders) each is tokenised by itself. The context gets the
    special tokens of `frame`, the answer none. An empty context without special tokens is the token `empty`, a BOS or EOS.

    Raises `DataError` for a choice that has no token of its own.
    """
    texts: list[str] = []
    answers: list[str] = []
    for context, choices in questions:
        bare = context.rstrip()
        own = [context[len(bare) :] + choice for choice in choices]
        answers += own
        texts += [bare, *([] if separate or not bare else [bare + each for each in own])]
    ids = iter(_tokenize(tokenizer, texts))
    alone = iter(_tokenize(tokenizer, answers))
    items = []
    for context, choices in questions:
        own_ids = next(ids)
        tails = [tuple(next(alone)) for _ in choices]
        if not separate and context.rstrip():
            tails = [tuple(next(ids))[len(own_ids) :] for _ in choices]
        before = frame.wrap_once(own_ids) or (empty,)
        if not separate and not own_ids:
            tails = [tail[count_repeated(tail, before) :] for tail in tails]
        for choice, tail in zip(choices, tails, strict=True):
            if not tail:
                raise DataError(
                    f"the choice {choice[:60]!r} has no token of its own after {context[-40:]!r}",
                    expected="choices that add at least one token to the question",
                )
        items.append(ChoiceItem(before, tuple(tails)))
    return items


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Texts as ids, without special tokens."""
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


class ChoiceScorer(Protocol):
    """A model with its batches."""

    tokens_read: int
    """Tokens that go through the model, without padding."""

    def __len__(self) -> int:
        """How many batches there are."""
        ...

    def shares_trunk(self, a: int, b: int) -> bool:
        """Whether batch `b` needs no `prepare` after batch `a`."""
        ...

    def prepare(self, batch_numbers: Sequence[int], own_number: int) -> None:
        """Prefill the trunk of batch `own_number`; `batch_numbers` are those of all ranks."""
        ...

    def score_batch(self, number: int) -> TokenScores:
        """The answers of a batch."""
        ...


@torch.no_grad()
def score_choices(
    model: Model,
    items: Sequence[ChoiceItem],
    *,
    context: int,
    pad: int,
    batch_tokens: int = _TOKENS_AT_ONCE,
    gather: GatherScores | None = None,
    rank: int = 0,
    ranks: int = 1,
    decoder_prefix: Sequence[int] = (),
) -> ChoiceScores:
    """Score every choice of every item, with a decoder or an encoder-decoder.

    `context`: the most tokens of an input; an item with a choice that needs more is listed in `too_long` and not scored. (The
    last token of a choice is no input.) `decoder_prefix`: the ids before each choice in an encoder-decoder; default: the start
    token of its configuration. `batch_tokens`: tokens of a batch. Each of several ranks scores a part of the batches,
    and `gather` collects the parts of all; every rank calls the model equally often, as sharded models need.

    Raises `ModelError` for a model that does not generate, `DataError` for an item without context or with an empty choice.
    """
    _check_items(items)
    is_encoder_decoder = isinstance(model, HeadedModel) and model.pretrained.config.is_encoder_decoder
    if is_encoder_decoder:
        decoder_prefix = decoder_prefix or (decoder_start_token(model.pretrained.config),)
        needs = [_encoder_decoder_length(item, len(decoder_prefix)) for item in items]
    else:
        needs = [_decoder_length(item) for item in items]
    too_long = tuple(i for i, need in enumerate(needs) if need > context)
    tokens = [np.array([len(choice) for choice in item.choices], np.int64) for item in items]
    starts = np.cumsum([0, *(int(counts.sum()) for counts in tokens)]).tolist()
    requests = [r for i, need in enumerate(needs) if need <= context for r in _make_requests(items[i], starts[i])]
    was_training = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            scorer = _make_scorer(model, requests, pad, batch_tokens, decoder_prefix)
            parts = _score_rank_batches(scorer, rank, ranks)
    finally:
        model.train(was_training)
    log_p_A, greedy_A = np.zeros(starts[-1]), np.zeros(starts[-1], bool)
    for _, scores in gather(parts) if gather else parts:
        log_p_A[scores.slot], greedy_A[scores.slot] = scores.log_p, scores.greedy
    pieces = [
        [] if need > context else np.split(np.arange(start, start + counts.sum()), np.cumsum(counts)[:-1])
        for start, counts, need in zip(starts, tokens, needs, strict=False)
    ]
    return ChoiceScores(
        tuple(np.array([log_p_A[piece].sum() for piece in some]) for some in pieces),
        tuple(tokens),
        tuple(np.array([greedy_A[piece].all() for piece in some], bool) for some in pieces),
        too_long,
        scorer.tokens_read,
    )


def _check_items(items: Sequence[ChoiceItem]) -> None:
    for i, item in enumerate(items):
        if not item.context or not item.choices or not all(item.choices):
            what = "no context" if not item.context else "no choices" if not item.choices else "an empty choice"
            raise DataError(
                f"item {i} has {what}",
                expected="at least one token of context (a BOS), and choices of at least one token each",
            )


def _decoder_length(item: ChoiceItem) -> int:
    """The longest input of a decoder."""
    return len(item.context) + max(map(len, item.choices)) - 1


def _encoder_decoder_length(item: ChoiceItem, prefix_size: int) -> int:
    """The longest input of encoder or decoder; the last token of an answer is no input."""
    return max(len(item.context), *(prefix_size + len(choice) - 1 for choice in item.choices))


def _make_requests(item: ChoiceItem, slot: int) -> list[ChoiceRequest]:
    context = np.array(item.context, np.int64)
    out = []
    for choice in item.choices:
        out.append(ChoiceRequest(context, choice, slot))
        slot += len(choice)
    return out


def _make_scorer(
    model: Model, requests: Sequence[ChoiceRequest], pad: int, batch_tokens: int, decoder_prefix: Sequence[int]
) -> ChoiceScorer:
    if isinstance(model, CausalModel):
        branches = [
            Branch(np.append(r.context, np.array(r.choice[:-1], np.int64)), len(r.context), r.choice, r.slot)
            for r in requests
        ]
        return DecoderScorer(model, branches, pad, batch_tokens)
    if isinstance(model, HeadedModel) and model.pretrained.config.is_encoder_decoder:
        return EncoderDecoderScorer(model, requests, pad, batch_tokens, decoder_prefix)
    raise ModelError(
        f"{type(model.pretrained).__name__} is not a generative model, so it has no likelihoods of answers",
        where="model",
        expected="a decoder or an encoder-decoder with a language modelling head",
    )


def _score_rank_batches(scorer: ChoiceScorer, rank: int, ranks: int) -> list[BatchScores]:
    """The parts of one rank. Ranks go from batch to batch together, and all prefill when any of them must."""
    numbers = list(range(len(scorer)))
    while len(numbers) % ranks:
        numbers.append(numbers[-1])
    parts: list[BatchScores] = []
    last: list[int] | None = None
    for begin in range(0, len(numbers), ranks):
        batch_numbers = numbers[begin : begin + ranks]
        if last is None or not all(map(scorer.shares_trunk, last, batch_numbers)):
            scorer.prepare(batch_numbers, batch_numbers[rank])
        parts.append((batch_numbers[rank], scorer.score_batch(batch_numbers[rank])))
        last = batch_numbers
    return parts
