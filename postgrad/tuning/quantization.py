"""How are a model's frozen weights held in few bits? (QLoRA)

Dettmers et al. 2023 (arXiv 2305.14314): the linear layers of the blocks in 4-bit normal floats, with their scales quantised
once more, or Dettmers et al. 2022 (arXiv 2208.07339): in 8-bit integers with outlying columns kept apart. Everything else
(embeddings, heads, norms, routers) stays as it is, and so do the layers that an architecture marks as in need of fp32, such
as T5's `wo`. Computing happens in the dtype of what comes in.
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
from postgrad.tuning.targets import linear_layers

Precision = Literal["nf4", "int8"]


def make_quantizer(model: PreTrainedModel, precision: Precision) -> Callable[[], None]:
    """What replaces the blocks' linear layers by quantised ones, in place; those that are already are left alone.

    Raises `MissingExtra` without the package bitsandbytes, `TuningError` for transposed layers (GPT-2's), for layers that
    carry adapters, and when the model has no layer to quantise. Nothing has changed then.
    """
    if precision not in get_args(Precision):
        raise TuningError(f"'{precision}'", where="tuning.quantization", expected=" or ".join(get_args(Precision)))
    bits = _import_bitsandbytes()
    kept = set(model._keep_in_fp32_modules or ()) | set(model._keep_in_fp32_modules_strict or ())
    plain: dict[str, nn.Linear] = {}
    for layer in linear_layers(model):
        if not layer.is_targetable or kept & set(layer.name.split(".")) or is_quantized(layer.module):
            continue
        if not isinstance(layer.module, nn.Linear):
            raise TuningError(
                f"{layer.name} is a {type(layer.module).__name__}, which is not quantised",
                where="tuning.quantization",
                expected="plain linear layers without adapters",
            )
        plain[layer.name] = layer.module
    if not plain and not any(is_quantized(module) for module in model.modules()):
        raise TuningError(f"{type(model).__name__} has no layer to quantise", where="tuning.quantization")
    make = {"nf4": _quantize_nf4, "int8": _quantize_int8}[precision]

    def quantise() -> None:
        for name, layer in plain.items():
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, make(bits, layer))

    return quantise


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer holds integers."""
    weight = getattr(layer, "weight", None)
    return isinstance(weight, torch.Tensor) and not weight.is_floating_point()


def _quantize_nf4(bits: ModuleType, plain: nn.Linear) -> nn.Module:
    made = bits.nn.Linear4bit(
        plain.in_features, plain.out_features, plain.bias is not None, quant_type="nf4", device="meta"
    )
    # On some CPUs it would pack its weights anew at the first answer, compute in bf16 from then on, and read back as others.
    made.support_avx512bf16_for_cpu = False
    made.weight = bits.nn.Params4bit(
        plain.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=made
    )
    return _match_placement(plain, made)


def _quantize_int8(bits: ModuleType, plain: nn.Linear) -> nn.Module:
    made = bits.nn.Linear8bitLt(
        plain.in_features,
        plain.out_features,
        plain.bias is not None,
        has_fp16_weights=False,
        threshold=6.0,
        device="meta",
    )
    made.weight = bits.nn.Int8Params(plain.weight.data, requires_grad=False, has_fp16_weights=False)
    return _match_placement(plain, made)


def _match_placement(plain: nn.Linear, quantized: nn.Module) -> nn.Module:
    """The new layer where the old one is: moving it is what quantises."""
    quantized.bias = plain.bias
    return quantized.to(plain.weight.device).train(plain.training)


def _import_bitsandbytes() -> ModuleType:
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError:
        raise MissingExtra(
            "quantising needs the package bitsandbytes", where="tuning.quantization", hint="pip install bitsandbytes"
        ) from None
