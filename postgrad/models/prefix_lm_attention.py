"""Prefix language models: decoders with bidirectional attention over a prefix and causal attention after it.

Legend: B batch, T time.

A prefix language model (Liu et al. 2018; Raffel et al. 2020, section 3.2.1) is a causal model under another mask: token `q`
sees token `k` of its own document when `k <= q`, or when both are of the prefix. The mask is passed to transformers as a 4-D
tensor, which transformers uses unchanged, so every attention implementation that takes a mask works.

`PREFIX_LM_KEY` in the configuration marks a model that was trained so. `prefill_prompt` encodes its prompt bidirectionally;
generation then goes on causally, with the KV cache.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from postgrad.errors import ModelError

PREFIX_LM_KEY = "postgrad_prefix_lm"
"""Marks a configuration of a prefix language model. Plain transformers ignores it."""


def is_prefix_lm(config: PreTrainedConfig) -> bool:
    """Whether a configuration is that of a prefix language model."""
    return bool(getattr(config, PREFIX_LM_KEY, False))


def mark_prefix_lm(config: PreTrainedConfig, prefix_lm: bool) -> None:
    """Set or remove the mark of a prefix language model."""
    if prefix_lm:
        setattr(config, PREFIX_LM_KEY, True)
    elif hasattr(config, PREFIX_LM_KEY):
        delattr(config, PREFIX_LM_KEY)


def attention_window(config: PreTrainedConfig) -> int | None:
    """The smallest attention window of the layers; None where all attend to everything."""
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    local = kinds is None or any("sliding" in kind or "chunked" in kind for kind in kinds)
    sizes = [getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size")] if local else []
    return min((int(size) for size in sizes if size), default=None)


def prefix_lm_mask(prefix_BT: Tensor, positions_BT: Tensor) -> Tensor:
    """Which token sees which, of shape (B, 1, T, T): `[b, 0, q, k]` is true when q sees k.

    `prefix_BT`: not 0 for the tokens of prefixes. `positions_BT` restart with each document.
    """
    starts_BT = torch.ones_like(positions_BT)
    starts_BT[:, 1:] = positions_BT.diff(dim=1) != 1
    document_BT = starts_BT.cumsum(1)
    length = positions_BT.shape[1]
    before_TT = torch.ones(length, length, dtype=torch.bool, device=positions_BT.device).tril()
    prefix_BT = prefix_BT.bool()
    both_BTT = prefix_BT[:, :, None] & prefix_BT[:, None, :]
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    return (same_BTT & (before_TT | both_BTT))[:, None]


def model_prefix_mask(model: PreTrainedModel, prefix_BT: Tensor, positions_BT: Tensor) -> Tensor:
    """The mask for a model's attention: boolean, or additive for `eager`."""
    seen = prefix_lm_mask(prefix_BT, positions_BT)
    if model.config._attn_implementation != "eager":
        return seen
    return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, torch.finfo(torch.float32).min)


@torch.no_grad()
def prefill_prompt(model: PreTrainedModel, ids_BT: Tensor) -> Cache:
    """The KV cache of a bidirectionally encoded prompt, without its last token.

    transformers' `generate` continues from the whole prompt with it: the last token sees all others in either case, so it may
    be encoded again. Raises `ModelError` for a prompt longer than the attention window.
    """
    length, window = ids_BT.shape[1], attention_window(model.config)
    if window is not None and length >= window:
        raise ModelError(
            f"the text has {length:,} tokens, and the attention window of this model is {window:,}",
            where="model",
            expected="a text within the window: beyond it attention over a prefix is not bidirectional",
        )
    positions_BT = torch.arange(length, device=ids_BT.device).expand_as(ids_BT)
    mask = model_prefix_mask(model, torch.ones_like(ids_BT), positions_BT)
    cache = model.base_model(
        input_ids=ids_BT, position_ids=positions_BT, attention_mask=mask, use_cache=True
    ).past_key_values
    cache.crop(-1)
    return cache
