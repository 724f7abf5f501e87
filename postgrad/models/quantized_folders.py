"""Folders with quantised weights: those that transformers dequantises on any machine are read so, others are refused.

What is trained and published is a plain model in full precision; the folder's quantisation is not applied again.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from postgrad.errors import ModelError
from postgrad.models.layers import count_parameters

_DEQUANTIZED = ("mxfp4", "fp8")
"""Values of `quant_method` of gpt-oss, and of DeepSeek-V3 and many others."""
_CONFIG = "quantization_config"


def is_quantized(config: PreTrainedConfig) -> bool:
    """Whether a configuration's weights are quantised."""
    return getattr(config, _CONFIG, None) is not None


def prepare_dequantization(config: PreTrainedConfig, name: str) -> str | None:
    """The method that a configuration's weights are quantised by, which transformers then reverses; None without one.

    Raises `ModelError` for a method that it cannot reverse everywhere.
    """
    settings: Any = getattr(config, _CONFIG, None)
    if settings is None:
        return None
    settings = dict(settings) if isinstance(settings, dict) else settings.to_dict()
    method = str(settings.get("quant_method") or ("bitsandbytes" if settings.get("load_in_4bit") else "unknown"))
    if method not in _DEQUANTIZED:
        raise ModelError(
            f"the weights of {name} are quantised ({_CONFIG}: {method} in config.json), and cannot be trained so",
            where="model",
            expected=f"weights in float32, bfloat16 or float16, or in {' or '.join(_DEQUANTIZED)}, which are dequantised",
            hint="use the model that it was made from, or load it with transformers where that supports the method, then "
            "model.dequantize() and model.save_pretrained(FOLDER); to train on a quantised base: tuning.quantization",
        )
    setattr(config, _CONFIG, {**settings, "dequantize": True})
    return method


def forget_quantization(config: PreTrainedConfig) -> None:
    """Remove the settings of a quantisation from a configuration whose weights come from elsewhere."""
    if hasattr(config, _CONFIG):
        delattr(config, _CONFIG)


def make_plain(model: PreTrainedModel, method: str) -> str:
    """Make a model that was read so a plain one, also when it is saved; what there is to say of it."""
    forget_quantization(model.config)
    # Transformers would save the weights under the names of the quantised ones, which it then cannot read.
    model.__dict__.pop("_weight_conversions", None)
    gigabytes = 4 * count_parameters(model) / 1e9
    return (
        f"the weights are stored in {method} and were dequantised: {gigabytes:,.2g} GB in float32; what is published is not "
        "quantised"
    )
