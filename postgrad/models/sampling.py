"""Sampling from a model in training (on-policy distillation), with the KV cache and given uniform random numbers.

A token is a function of the model and a uniform number, so samples are reproducible. The model is in eval mode (no dropout), in
its compute dtype.

Legend: B rows, P tokens of a prompt, N sampled tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from postgrad.models.cpu_attention import CAUSAL_BLOCKS
from postgrad.models.decoding import Decoder, find_decoding_way
from postgrad.models.model import CausalModel
from postgrad.models.sublayers import eval_mode


def count_token_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """The ids up to the tokenizer's last one; the embeddings behind them only fill a table to a round size."""
    return max(tokenizer.get_vocab().values()) + 1


def suppressed_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """What `generate` must not emit: the ids that the generation config names, and those that are no tokens."""
    output = model.get_output_embeddings()
    # A model that generates nothing, such as an encoder, has no generation config.
    named = getattr(getattr(model, "generation_config", None), "suppress_tokens", None) or []
    return [*named, *range(count_token_ids(tokenizer), 0 if output is None else len(output.weight))] or None


@torch.no_grad()
def sample_continuations(
    model: CausalModel,
    prompt_BP: Tensor,
    uniform_BN: np.ndarray,
    *,
    temperature: float,
    eos: int,
    mask_BP: Tensor | None = None,
    token_ids: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Continuations (B, N) of prompts of one length, and the number of tokens of each, including its EOS.

    The i-th token is where the i-th uniform number falls in the cumulated softmax(logits / temperature). `mask_BP`: 0 where
    shorter prompts are padded on the left, for a model that supports it. `token_ids`: only ids below it are sampled.
    """
    rows = len(prompt_BP)
    sampled_BN = torch.full(uniform_BN.shape, eos, dtype=torch.int64, device=prompt_BP.device)
    size_B = torch.full((rows,), uniform_BN.shape[1], dtype=torch.int64, device=prompt_BP.device)
    uniform = torch.from_numpy(uniform_BN).to(prompt_BP.device)
    active_B = torch.ones(rows, dtype=torch.bool, device=prompt_BP.device)
    ids = prompt_BP
    with eval_mode(model), _cache_capable_attention(model), torch.compiler.set_stance("force_eager"):
        decoder = Decoder(model, find_decoding_way(model, padded=mask_BP is not None))
        for i in range(uniform_BN.shape[1]):
            logits_BV = model.head().logits(decoder(ids, mask_BP))[:, :token_ids].double() / temperature
            sums_BV = logits_BV.softmax(-1).cumsum(-1)
            at_B1 = uniform[:, i : i + 1] * sums_BV[:, -1:]
            token_B = torch.searchsorted(sums_BV, at_B1, right=True)[:, 0].clamp(max=sums_BV.shape[1] - 1)
            sampled_BN[:, i] = token_B.where(active_B, eos)
            size_B = size_B.where(~(active_B & (token_B == eos)), i + 1)
            active_B = active_B & (token_B != eos)
            if not active_B.any():
                break
            ids = sampled_BN[:, i : i + 1]
            mask_BP = None if mask_BP is None else torch.cat([mask_BP, torch.ones_like(ids)], 1)
    return sampled_BN, size_B


@contextmanager
def _cache_capable_attention(model: CausalModel) -> Iterator[None]:
    """Inside, the model has an attention implementation that supports a cache."""
    before = model.pretrained.config._attn_implementation
    if before != CAUSAL_BLOCKS:
        yield
        return
    model.pretrained.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.pretrained.set_attn_implementation(before)
