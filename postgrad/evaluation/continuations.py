"""Greedy continuations of held-out prompts, shown in reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from postgrad.data.render.frame import TextPrefix
from postgrad.evaluation.held_out import HeldOutSet, HeldOutText
from postgrad.models.prefix_lm_attention import is_prefix_lm, prefill_prompt
from postgrad.models.sampling import suppressed_ids

PROMPT_TOKENS, NEW_TOKENS = 32, 48


@dataclass(frozen=True)
class ContinuationPrompt:
    """The beginning of a held-out document and its true continuation."""

    set_name: str
    ids: np.ndarray
    reference: np.ndarray


def select_prompts(held_out: HeldOutSet, count: int) -> list[ContinuationPrompt]:
    """The beginnings of the first texts that are long enough; none of rows of a task."""
    if not isinstance(held_out, HeldOutText):
        return []
    long = [d for d in held_out.documents if len(d) >= PROMPT_TOKENS + 8]
    return [
        ContinuationPrompt(held_out.name, d[:PROMPT_TOKENS], d[PROMPT_TOKENS : PROMPT_TOKENS + NEW_TOKENS])
        for d in long[:count]
    ]


@torch.no_grad()
def generate_continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[ContinuationPrompt],
    prefix: TextPrefix,
) -> list[str]:
    """The model's greedy continuation of each prompt, as text; the soft prompts of `prefix` are added."""
    out = []
    was_training = model.training
    model.eval()
    suppressed = suppressed_ids(model, tokenizer)
    with torch.compiler.set_stance("force_eager"):
        for prompt in prompts:
            inputs = torch.from_numpy(prefix.insert(prompt.ids))
            ids = inputs[None].to(next(model.parameters()).device)
            cache = {"past_key_values": prefill_prompt(model, ids)} if is_prefix_lm(model.config) else {}
            output = model.generate(  # pyrefly: ignore[not-callable]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                suppress_tokens=suppressed,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                **cache,
            )
            out.append(decode_ids(tokenizer, output[0, ids.shape[1] :]))
    model.train(was_training)
    return out


def decode_ids(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray | torch.Tensor) -> str:
    """Ids as text."""
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))
