"""Models as hidden states plus an output head, so that losses never hold all logits.

Legend: B batch, T time, D model width, V vocabulary, C classes.

Whether hidden states and head give the logits of an architecture is verified, not assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from postgrad.errors import ModelError
from postgrad.models.architecture_errors import SHORTER, as_model_error
from postgrad.models.isolation import (
    SHORT_DOCUMENT,
    UNSUPPORTED,
    Leak,
    document_arguments,
    find_leak,
    random_ids,
    verify_right_padding,
)
from postgrad.models.output_head import ModelRun, OutputHead, find_head_function, make_head, run_body
from postgrad.models.prefix_lm_attention import attention_window, model_prefix_mask
from postgrad.models.task import Task

_TOLERANCE = 1e-4
"""Difference of logits that is rounding."""


@dataclass(frozen=True)
class Output:
    """The output for a batch: hidden states and the head that maps them to logits.

    Without a head the hidden states are the logits of a task layer, whose classes are few.
    """

    hidden: Tensor
    head: OutputHead | None
    router_logits: tuple[Tensor, ...] = ()
    """Of each layer of a mixture of experts, where they are recorded."""

    def logits(self) -> Tensor:
        """All logits at once; objectives should work in chunks where they can."""
        return self.hidden if self.head is None else self.head.logits(self.hidden)


class Model(nn.Module):
    """A Hugging Face model of any task, called with the named arrays of a batch."""

    def __init__(self, pretrained: PreTrainedModel) -> None:
        super().__init__()
        self.pretrained = pretrained

    @property
    def body(self) -> nn.Module:
        """The backbone, without its task layer."""
        return self.pretrained.base_model

    def forward(self, **inputs: Tensor) -> Output:
        """The logits of a task layer, of shape (B, C) or (B, T, C)."""
        return Output(self.pretrained(**inputs).logits, None)

    def head(self) -> OutputHead | None:
        """The head with the current weights; None when the model returns logits."""
        return None


class LanguageModel(Model):
    """A language model as its own forward pass up to the output embedding, and a head."""

    def __init__(self, pretrained: PreTrainedModel) -> None:
        super().__init__(pretrained)
        self.head_function = find_head_function(pretrained)

    def run(self, **inputs: Any) -> ModelRun:
        """The input of the output embedding, of shape (B, T, D), and all that the model returns, such as its cache."""
        return run_body(self.pretrained, **inputs)

    def head(self) -> OutputHead:
        """The head with the current weights."""
        return make_head(self.pretrained, self.head_function)


class CausalModel(LanguageModel):
    """A causal language model; `records_routers`: the output has the routers' logits."""

    records_routers = False

    def __init__(self, pretrained: PreTrainedModel) -> None:
        super().__init__(pretrained)
        self.passes_documents = False
        """Whether the borders of packed documents are arguments of the model; see `find_model_leak`."""

    def forward(
        self, *, prefix: Tensor | None = None, document_lengths: Sequence[int] | None = None, **inputs: Tensor
    ) -> Output:
        """Hidden states of packed rows, whose documents are separated by position ids that restart.

        Without a cache and an attention mask, transformers keeps such documents apart; with either it does not. Attention among
        the tokens of a `prefix` (B, T) is bidirectional, which needs position ids. `document_lengths` of
        packed rows; without them a model that takes borders of documents reads position ids from the device.
        """
        shape_BT = inputs["input_ids"].shape
        if prefix is not None:
            inputs["attention_mask"] = model_prefix_mask(self.pretrained, prefix, inputs["position_ids"])
        elif self.passes_documents and "position_ids" in inputs:
            inputs = _join_rows(document_lengths, **inputs)
        options = {"output_router_logits": True} if self.records_routers else {}
        run = self.run(**inputs, use_cache=False, **options)
        hidden_BTD = run.hidden if run.hidden.shape[:-1] == shape_BT else run.hidden.reshape(*shape_BT, -1)
        return Output(hidden_BTD, self.head(), run.output.router_logits if self.records_routers else ())

    def compute_hidden(self, **inputs: Tensor) -> Tensor:
        """The last hidden states (B, T, D)."""
        return self(**inputs).hidden


def _join_rows(lengths: Sequence[int] | None, input_ids: Tensor, position_ids: Tensor) -> dict[str, Any]:
    """Packed rows joined to one: kernels take the borders of documents of a single row."""
    if lengths is None:
        starts = (position_ids == 0).flatten().nonzero().flatten().tolist()
        lengths = [end - begin for begin, end in pairwise([*starts, position_ids.numel()])]
    joined = {"input_ids": input_ids.reshape(1, -1), "position_ids": position_ids.reshape(1, -1)}
    return {**joined, **document_arguments(lengths, position_ids.device)}


class HeadedModel(LanguageModel):
    """A masked or encoder-decoder language model."""

    def __init__(self, pretrained: PreTrainedModel) -> None:
        super().__init__(pretrained)
        self.options = {"use_cache": False} if pretrained.config.is_encoder_decoder else {}

    def forward(self, **inputs: Tensor) -> Output:
        """The input of the output embedding, of shape (B, T, D)."""
        return Output(self.run(**inputs, **self.options).hidden, self.head())


def wrap_model(pretrained: PreTrainedModel, task: Task) -> Model:
    """The wrapper for a model of a task."""
    if task == Task.CAUSAL:
        return CausalModel(pretrained)
    return Model(pretrained) if task.is_classifier else HeadedModel(pretrained)


def verify_model(
    model: Model, *, packed: bool = True, row_length: int = 2 * SHORT_DOCUMENT, prefix_tokens: int = 0
) -> None:
    """Verify on random ids that hidden states and head give the model's logits.

    For a causal model also that documents of `packed` rows of `row_length` do not attend to each other, or of unpacked rows
    that padding changes nothing, and, with `prefix_tokens`, that attention over prefixes of rows of that length is
    bidirectional. Raises `ModelError` for an architecture that fails: recurrent and hybrid models carry state across
    documents, others ignore the mask or transform the logits.
    """
    length = min(SHORT_DOCUMENT, row_length)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        if isinstance(model, CausalModel):
            _verified_logits(model, {"input_ids": random_ids(model.pretrained, (2, length))}, use_cache=False)
            if not packed:
                verify_right_padding(model.pretrained, model.compute_hidden, length)
            elif leak := find_model_leak(model, row_length):
                raise leak.as_error(model.pretrained)
            if prefix_tokens:
                _verify_prefixes(model, length, prefix_tokens)
        elif isinstance(model, HeadedModel):
            ids = random_ids(model.pretrained, (2, length))
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if model.pretrained.config.is_encoder_decoder:
                inputs["decoder_input_ids"] = ids.flip(0)
            _verified_logits(model, inputs, **model.options)
    model.train(was_training)


def find_model_leak(model: CausalModel, row_length: int) -> Leak | None:
    """The leak between packed documents of rows of `row_length`, or None.

    A model that leaks gets the borders of documents as arguments, where its kernels on this machine keep to them.
    """
    model.passes_documents = False
    with as_model_error(model.pretrained, f"the forward pass on rows of {row_length:,} tokens", SHORTER):
        leak = find_leak(model.pretrained, model.compute_hidden, row_length)
    if leak is None:
        return None
    model.passes_documents = True
    try:
        # Transformers refuses these arguments where only its reference implementation is at hand.
        model.passes_documents = find_leak(model.pretrained, model.compute_hidden, row_length) is None
    except torch.OutOfMemoryError:
        raise
    except UNSUPPORTED:
        model.passes_documents = False
    return None if model.passes_documents else leak


def _verify_prefixes(model: CausalModel, length: int, prefix_tokens: int) -> None:
    """Verify on two packed documents that attention follows the mask of a prefix language model."""
    config = model.pretrained.config
    window = attention_window(config)
    if window is not None and prefix_tokens > window:
        raise ModelError(
            f"rows have {prefix_tokens:,} tokens, and the attention window of this model is {window:,}: beyond it attention "
            "over a prefix is not bidirectional",
            where="data.sequence_length",
            expected=f"at most {window:,}",
        )
    length = length if window is None else min(length, window)
    half = length // 2
    ids = random_ids(model.pretrained, (1, 2 * length))
    positions = torch.arange(length, device=ids.device).repeat(2)[None]
    other_prefix, other_rest = ids.clone(), ids.clone()
    other_prefix[:, length + 1 : length + half] = ids[:, 1:half]
    other_rest[:, length + half :] = ids[:, half:length]

    def logits(ids: Tensor, size: int) -> Tensor:
        return model(input_ids=ids, position_ids=positions, prefix=(positions < size).long()).logits().float()

    try:
        plain = model(input_ids=ids, position_ids=positions).logits().float()
        alone, ours = logits(ids, 1), logits(ids, half)
        size = _TOLERANCE * max(1.0, plain.abs().max().item())

        def off(one: Tensor, two: Tensor, begin: int, end: int) -> float:
            return (one - two)[:, begin:end].abs().max().item()

        failures = {
            "a prefix of one token differs from causal attention": off(plain, alone, 0, 2 * length) > size,
            "the first token does not attend to the prefix": off(ours, logits(other_prefix, half), length, length + 1)
            < 1e-6,
            "a prefix attends to later tokens": off(ours, logits(other_rest, half), length, length + half) > size,
            "documents attend to each other's prefixes": off(ours, logits(other_prefix, half), 0, length) > size,
        }
        wrong = [what for what, failed in failures.items() if failed]
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        wrong = [f"it takes no custom mask ({type(error).__name__})"]
    if wrong:
        raise ModelError(
            f"this architecture ({config.model_type}) has no bidirectional attention over prefixes: {wrong[0]}",
            where="objectives",
            expected="a model whose attention takes a custom mask",
            hint="use next-token, or a model with plain attention layers",
        )


def _verified_logits(model: Model, inputs: dict[str, Tensor], **options: bool) -> None:
    """Verify that hidden states and head give the model's own logits. Raises `ModelError`."""
    ours = model(**inputs).logits().float()
    plain = model.pretrained(**inputs, **options).logits.float()
    size = max(1.0, plain.abs().max().item())
    if ours.shape != plain.shape or not (ours - plain).abs().max().item() <= _TOLERANCE * size:
        raise ModelError(
            f"the logits of this architecture ({model.pretrained.config.model_type}) are not its output embedding applied "
            "to its last hidden states",
            where="model",
            expected="a language model with a plain, scaled or soft-capped head",
        )
