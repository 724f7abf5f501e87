"""Quantisation of a model's frozen weights for QLoRA, in 4 or 8 bits, by bitsandbytes.

    nf4    the blocks' linear layers in 4-bit normal floats, double quantised: Dettmers et al. 2023 (arXiv 2305.14314)
    int8   in 8-bit integers, with outlier columns in higher precision: Dettmers et al. 2022 (arXiv 2208.07339)

Everything else (embeddings, heads, norms, routers) keeps its precision, and so do layers that an architecture marks as fp32,
such as T5's `wo`. Products run in the dtype of the layer's input.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from postgrad.errors import MissingExtra, TuningError
from postgrad.tuning.parameter_location import replace_module
from postgrad.tuning.targets import linear_layers
from postgrad.tuning.tuning import check_choice

Precision = Literal["nf4", "int8"]


def make_quantizer(model: PreTrainedModel, precision: Precision) -> Callable[[], None]:
    """A function that replaces the blocks' linear layers by quantised ones, in place; quantised ones stay as they are.

    Raises, before anything changes, `MissingExtra` without the package bitsandbytes, and `TuningError` for transposed layers
    (GPT-2's), for layers with adapters, and if the model has no layer to quantise.
    """
    check_choice(precision, get_args(Precision), "quantization")
    bits = _import_bitsandbytes()
    fp32_names = set(model._keep_in_fp32_modules or ()) | set(model._keep_in_fp32_modules_strict or ())
    plain: dict[str, nn.Linear] = {}
    for layer in linear_layers(model):
        if not layer.is_targetable or fp32_names & set(layer.name.split(".")) or is_quantized(layer.module):
            continue
        if not isinstance(layer.module, nn.Linear):
            raise TuningError(
                f"{layer.name} is a {type(layer.module).__name__}, which cannot be quantised",
                where="tuning.quantization",
                expected="plain linear layers without adapters",
            )
        plain[layer.name] = layer.module
    if not plain and not any(is_quantized(module) for module in model.modules()):
        raise TuningError(f"{type(model).__name__} has no layer to quantise", where="tuning.quantization")
    make = {"nf4": _quantize_nf4, "int8": _quantize_int8}[precision]

    def quantise() -> None:
        for name, layer in plain.items():
            replace_module(model, name, make(bits, layer))

    return quantise


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer's weight is stored as integers."""
    weight = getattr(layer, "weight", None)
    return isinstance(weight, torch.Tensor) and not weight.is_floating_point()


def _quantize_nf4(bits: ModuleType, plain: nn.Linear) -> nn.Module:
    has_bias = plain.bias is not None
    layer = bits.nn.Linear4bit(plain.in_features, plain.out_features, has_bias, quant_type="nf4", device="meta")
    # On some CPUs it would repack its weights in the first forward pass, then compute in bf16 and dequantise to other values.
    layer.support_avx512bf16_for_cpu = False
    layer.weight = bits.nn.Params4bit(
        plain.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
    )
    return _match_placement(plain, layer)


def _quantize_int8(bits: ModuleType, plain: nn.Linear) -> nn.Module:
    settings = {"has_fp16_weights": False, "threshold": 6.0, "device": "meta"}
    layer = bits.nn.Linear8bitLt(plain.in_features, plain.out_features, plain.bias is not None, **settings)
    layer.weight = bits.nn.Int8Params(plain.weight.data, requires_grad=False, has_fp16_weights=False)
    return _match_placement(plain, layer)


def _match_placement(plain: nn.Linear, quantized: nn.Module) -> nn.Module:
    """Move the new layer to the old one's device, which quantises its weight."""
    quantized.bias = plain.bias
    return quantized.to(plain.weight.device).train(plain.training)


def _import_bitsandbytes() -> ModuleType:
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError:
        raise MissingExtra(
            "quantisation needs the package bitsandbytes", where="tuning.quantization", hint="pip install bitsandbytes"
        ) from None
