"""The output head of a language model: from the input of its output embedding to its logits.

Legend: B batch, T time, D model width, V vocabulary.

Families scale or cap their logits (Cohere, Granite, Gemma), or change the hidden states before the output embedding (MiniCPM,
T5). No table of names says which: the model runs once with known numbers in place of the embedding's products, and what comes
out of it is the function that it applies to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from postgrad.errors import ModelError
from postgrad.models.architecture_errors import as_model_error
from postgrad.models.sublayers import eval_mode

_LOGITS_BIAS = "final_logits_bias"
"""Its name in transformers."""
_PRODUCTS = (0.0, 2.0**-20, -1.0, 3.0, 50.0, 1e30)
"""The numbers that are tried: the second has the slope at 0, the last the value at infinity."""
_LARGEST_CAP = 1e20


@dataclass(frozen=True)
class OutputHead:
    """Hidden states to logits: `softcap(scale (h W^T + b))`."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of shape (..., V) for hidden states of shape (..., D)."""
        bias = None if self.bias_V is None else self.bias_V.to(hidden.dtype)
        out = nn.functional.linear(hidden, self.weight_VD.to(hidden.dtype), bias) * self.scale
        return out if self.softcap is None else torch.tanh(out / self.softcap) * self.softcap


class HeadFunction(NamedTuple):
    """What a model does with the products of its output embedding: `softcap(scale z)`."""

    scale: float
    softcap: float | None

    def __call__(self, products: Tensor) -> Tensor:
        out = products * self.scale
        return out if self.softcap is None else torch.tanh(out / self.softcap) * self.softcap


class ModelRun(NamedTuple):
    """A forward pass: the input of the output embedding, of shape (B, T, D), and all that the model returned."""

    hidden: Tensor
    output: Any


def get_output_layer(pretrained: PreTrainedModel) -> nn.Linear:
    """The output embedding. Raises `ModelError` for a model without one."""
    layer = pretrained.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        raise ModelError(f"{type(pretrained).__name__} has no output embedding", where="model")
    return layer


def make_head(pretrained: PreTrainedModel, function: HeadFunction) -> OutputHead:
    """The head with the current weights. A bias that is added behind the output embedding is a buffer, which is not trained."""
    layer = get_output_layer(pretrained)
    biases = [bias.flatten() for bias in (layer.bias, getattr(pretrained, _LOGITS_BIAS, None)) if bias is not None]
    return OutputHead(layer.weight, sum(biases[1:], biases[0]) if biases else None, *function)


def run_body(pretrained: PreTrainedModel, **inputs: Any) -> ModelRun:
    """The model's own forward pass up to its output embedding, whose products are not computed.

    Raises `ModelError` for a model that does not use the embedding once.
    """
    seen: list[Tensor] = []

    def record(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return hidden.new_zeros(*hidden.shape[:-1], 1)

    with _replace_output_layer(pretrained, record):
        output = pretrained(**inputs)
    if len(seen) != 1:
        raise _not_understood(pretrained, f"its output embedding is used {len(seen)} times")
    return ModelRun(_without_slice(seen[0]), output)


def _without_slice(hidden: Tensor) -> Tensor:
    """The tensor that a slice of all of it was taken from: models slice for `logits_to_keep`, and FSDP2 returns no views."""
    base = hidden._base
    is_whole = base is not None and (base.shape, base.stride(), base.storage_offset()) == (
        hidden.shape,
        hidden.stride(),
        hidden.storage_offset(),
    )
    return base if base is not None and is_whole else hidden


@torch.no_grad()
def find_head_function(pretrained: PreTrainedModel) -> HeadFunction:
    """What a model does with the products of its output embedding, found by trying it once.

    Raises `ModelError` for a model whose forward pass fails, or whose logits are another function of the products.
    """
    layer = get_output_layer(pretrained)
    # Of a model without values only the function behind the products is needed, and it is computed on the CPU.
    products = torch.tensor(_PRODUCTS, device="cpu" if layer.weight.is_meta else layer.weight.device)
    ids = ((5 + torch.arange(len(products), device=layer.weight.device)) % layer.out_features)[None]  # no padding
    calls: list[Tensor] = []

    def answer(hidden: Tensor) -> Tensor:
        calls.append(hidden)
        return products[None, :, None].repeat(1, 1, layer.out_features)

    options = {"decoder_input_ids": ids} if pretrained.config.is_encoder_decoder else {}
    with (
        as_model_error(pretrained, "the forward pass"),
        eval_mode(pretrained),
        _replace_output_layer(pretrained, answer),
    ):
        logits = pretrained(input_ids=ids, **options).logits
    if len(calls) != 1 or logits.shape != (1, len(products), layer.out_features):
        raise _not_understood(pretrained, "its output embedding is not used once for each token")
    function = _fit(logits[0, :, 0].double())
    wanted = function(products.double())[:, None]
    if not torch.allclose(logits[0].double(), wanted.expand_as(logits[0]), rtol=_tolerance(logits), atol=1e-30):
        raise _not_understood(pretrained, "they depend on its products in another way")
    return function


def _fit(logits: Tensor) -> HeadFunction:
    zero, small, _, _, _, last = logits.tolist()
    softcap = abs(last) if abs(last) < _LARGEST_CAP else None
    return HeadFunction(_round((small - zero) / _PRODUCTS[1]), None if softcap is None else _round(softcap))


def _round(value: float) -> float:
    """The number of a configuration, or its inverse, that a computation in single precision came from."""
    for number in (float(f"{value:.6g}"), 1 / float(f"{1 / value:.6g}") if value else 0.0):
        if abs(number - value) <= 4e-7 * abs(value):
            return number
    return value


def _tolerance(logits: Tensor) -> float:
    return 1e-5 if logits.dtype in (torch.float32, torch.float64) else 1e-2


def _not_understood(pretrained: PreTrainedModel, reason: str) -> ModelError:
    return ModelError(
        f"the logits of this architecture ({pretrained.config.model_type}) are not its output embedding applied to its last "
        f"hidden states: {reason}",
        where="model",
        expected="a language model with a plain, scaled or soft-capped head",
    )


@contextmanager
def _replace_output_layer(pretrained: PreTrainedModel, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, a function stands in for the output embedding, and no bias is added."""
    layer: nn.Module = get_output_layer(pretrained)
    bias: Tensor | None = getattr(pretrained, _LOGITS_BIAS, None)
    layer.forward = function
    if bias is not None:
        setattr(pretrained, _LOGITS_BIAS, bias.new_zeros(()))  # of no dimension, so that no dtype is changed by it
    try:
        yield
    finally:
        del layer.forward
        if bias is not None:
            setattr(pretrained, _LOGITS_BIAS, bias)
