"""How does a model in training go on from a text? Token by token, with the cache of keys and values, by given random numbers.

Nothing is drawn here: a token follows from the model and a uniform number, so what is written is a function of the two. The
model answers as in evaluation (no dropout), in the dtype that it computes in.

Legend: B rows, P tokens of a prompt, N tokens that are written, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from postgrad.models.cpu_attention import CAUSAL_BLOCKS
from postgrad.models.model import CausalModel
from postgrad.models.sublayers import eval_mode


@torch.no_grad()
def sample_continuations(
    model: CausalModel, prompt_BP: Tensor, uniform_BN: np.ndarray, *, temperature: float, eos: int
) -> tuple[Tensor, Tensor]:
    """Continuations (B, N) of prompts of one length, and how many tokens each has: an EOS is its last, or there is none.

    The i-th token is where the i-th uniform number falls in the cumulated softmax(logits / temperature).
    """
    rows, length = prompt_BP.shape
    written_BN = torch.full(uniform_BN.shape, eos, dtype=torch.int64, device=prompt_BP.device)
    size_B = torch.full((rows,), uniform_BN.shape[1], dtype=torch.int64, device=prompt_BP.device)
    uniform = torch.from_numpy(uniform_BN).to(prompt_BP.device)
    going_B = torch.ones(rows, dtype=torch.bool, device=prompt_BP.device)
    ids, positions, cache = prompt_BP, torch.arange(length, device=prompt_BP.device), None
    with eval_mode(model), _cache_capable_attention(model), torch.compiler.set_stance("force_eager"):
        for i in range(uniform_BN.shape[1]):
            output = model.body(
                input_ids=ids, position_ids=positions.expand(rows, -1), past_key_values=cache, use_cache=True
            )
            cache = output.past_key_values
            logits_BV = model.head().logits(output.last_hidden_state[:, -1]).double() / temperature
            sums_BV = logits_BV.softmax(-1).cumsum(-1)
            at_B1 = uniform[:, i : i + 1] * sums_BV[:, -1:]
            token_B = torch.searchsorted(sums_BV, at_B1, right=True)[:, 0].clamp(max=sums_BV.shape[1] - 1)
            written_BN[:, i] = token_B.where(going_B, eos)
            size_B = size_B.where(~(going_B & (token_B == eos)), i + 1)
            going_B = going_B & (token_B != eos)
            if not going_B.any():
                break
            ids, positions = written_BN[:, i : i + 1], positions[-1:] + 1
    return written_BN, size_B


@contextmanager
def _cache_capable_attention(model: CausalModel) -> Iterator[None]:
    """Inside, the model attends in a way that knows a cache."""
    before = model.pretrained.config._attn_implementation
    if before != CAUSAL_BLOCKS:
        yield
        return
    model.pretrained.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.pretrained.set_attn_implementation(before)
