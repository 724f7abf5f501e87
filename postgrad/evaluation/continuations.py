"""What does a model write? Greedy continuations of held-out beginnings, for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from postgrad.evaluation.held_out import AnyHeldOut, HeldOut, behind_bos
from postgrad.models.prefix_lm_attention import prefilled, reads_prefixes

PROMPT_TOKENS, NEW_TOKENS = 32, 48


@dataclass(frozen=True)
class Prompt:
    """The beginning of a held-out document and how it really goes on."""

    set: str
    ids: np.ndarray
    reference: np.ndarray


def prompts(held_out: AnyHeldOut, count: int) -> list[Prompt]:
    """The beginnings of the first texts that are long enough; rows of a task have none."""
    if not isinstance(held_out, HeldOut):
        return []
    long = [d for d in held_out.documents if len(d) >= PROMPT_TOKENS + 8]
    return [
        Prompt(held_out.name, d[:PROMPT_TOKENS], d[PROMPT_TOKENS : PROMPT_TOKENS + NEW_TOKENS]) for d in long[:count]
    ]


@torch.no_grad()
def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    wanted: Sequence[Prompt],
    before: Sequence[int] = (),
    bos: int | None = None,
) -> list[str]:
    """The model's greedy continuation of each prompt, as text; `before` is set before each (a soft prompt's places)."""
    out = []
    was_training = model.training
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        for prompt in wanted:
            given = torch.from_numpy(behind_bos(prompt.ids, before, bos))
            ids = given[None].to(next(model.parameters()).device)
            read = {"past_key_values": prefilled(model, ids)} if reads_prefixes(model.config) else {}
            written = model.generate(  # pyrefly: ignore[not-callable]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                **read,
            )
            out.append(text_of(tokenizer, written[0, ids.shape[1] :]))
    model.train(was_training)
    return out


def text_of(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray | torch.Tensor) -> str:
    """Ids as text."""
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))
