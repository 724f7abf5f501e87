"""How does a decoder read a prefix in both directions? Its tokens see each other, all others what stands before them.

Legend: B batch, T time.

A prefix language model (Liu et al. 2018; Raffel et al. 2020, section 3.2.1) is a causal model under another mask: token
`q` sees token `k` of its own document when `k <= q`, or when both are of the prefix. The mask is handed to transformers
ready made, which passes one of four dimensions on as it is, so any attention that adds a mask serves. What knows only its
own causal mask does not.

A published model says by `KEY` in its configuration that it was trained so. `prefilled` lets it read a prompt so; what it
then writes is read causally, with the cache, as always.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from postgrad.errors import ModelError

PREFIX_LM_KEY = "postgrad_prefix_lm"
"""In a model's configuration: it was trained to read a prompt in both directions. Plain transformers does not look at it."""


def is_prefix_lm(config: PreTrainedConfig) -> bool:
    """Whether a model was trained to read a prompt in both directions."""
    return bool(getattr(config, PREFIX_LM_KEY, False))


def mark_prefix_lm(config: PreTrainedConfig, prefix_lm: bool) -> None:
    """Let a configuration say that its model reads prompts in both directions, or nothing of the sort."""
    if prefix_lm:
        setattr(config, PREFIX_LM_KEY, True)
    elif hasattr(config, PREFIX_LM_KEY):
        delattr(config, PREFIX_LM_KEY)


def attention_window(config: PreTrainedConfig) -> int | None:
    """How far a token sees back in the layers that see the least; None where all layers see everything."""
    kinds = getattr(config, "layer_types", None)
    local = kinds is None or any("sliding" in kind or "chunked" in kind for kind in kinds)
    sizes = [getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size")] if local else []
    return min((int(size) for size in sizes if size), default=None)


def prefix_lm_mask(prefix_BT: Tensor, positions_BT: Tensor) -> Tensor:
    """Which token sees which, of shape (B, 1, T, T): `[b, 0, q, k]` is true when q sees k.

    `prefix_BT`: not 0 for the tokens of prefixes. `positions_BT` start again with each document (as transformers tells packed
    documents apart).
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
    """The mask that a model's attention takes: what is seen, or what is added to the scores (for `eager`)."""
    seen = prefix_lm_mask(prefix_BT, positions_BT)
    if model.config._attn_implementation != "eager":
        return seen
    return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, torch.finfo(torch.float32).min)


@torch.no_grad()
def prefill_prompt(model: PreTrainedModel, ids_BT: Tensor) -> Cache:
    """Keys and values of a prompt that was read in both directions, but for those of its last token.

    With them transformers' `generate` goes on from the whole prompt: the last token sees all others in either way of
    reading, so it may be read once more. Raises `ModelError` for a prompt that is longer than the window of a layer.
    """
    length, window = ids_BT.shape[1], attention_window(model.config)
    if window is not None and length >= window:
        raise ModelError(
            f"the text has {length:,} tokens, and layers of this model see {window:,}",
            where="model",
            expected="a text inside the window: beyond it a prefix cannot be read in both directions",
        )
    positions_BT = torch.arange(length, device=ids_BT.device).expand_as(ids_BT)
    mask = model_prefix_mask(model, torch.ones_like(ids_BT), positions_BT)
    cache = model.base_model(
        input_ids=ids_BT, position_ids=positions_BT, attention_mask=mask, use_cache=True
    ).past_key_values
    cache.crop(-1)
    return cache
