"""What does a model write to each of many prompts? Greedy answers, several at once, up to a stop.

Legend: B batch, T time.

Prompts of a decoder are filled up on the left, so that the answers begin in one column; masked positions count for nothing, so
what is written does not depend on who shares the batch. An encoder-decoder reads its prompts filled up on the right. A prefix
language model reads prompts of one length together, in both directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from postgrad.models.prefix_lm_attention import is_prefix_lm, prefill_prompt

_TOKENS_AT_ONCE = 16_384
_PROMPTS_AT_ONCE = 64


@dataclass(frozen=True)
class StoppingRule:
    """When an answer ends: at an end-of-text token, before any of these texts, or after `most` tokens."""

    max_new_tokens: int
    stop_strings: tuple[str, ...] = ()

    def truncate(self, text: str) -> str:
        """The text up to the first stop in it."""
        places = [at for each in self.stop_strings if (at := text.find(each)) >= 0]
        return text[: min(places)] if places else text


class _StopStringCriteria(StoppingCriteria):
    """Which answers of a batch already hold a stop."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stopping: StoppingRule, prompt_length: int) -> None:
        self.tokenizer, self.stopping, self.prompt_length = tokenizer, stopping, prompt_length
        self.done: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:  # pyrefly: ignore[bad-override]
        done = torch.zeros(len(input_ids), dtype=torch.bool) if self.done is None else self.done
        for row in (~done).nonzero().flatten().tolist():
            text = _decode(self.tokenizer, input_ids[row, self.prompt_length :].tolist())
            done[row] = any(stop in text for stop in self.stopping.stop_strings)
        self.done = done
        return done.to(input_ids.device)


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    stopping: StoppingRule,
    *,
    eos_ids: Sequence[int],
    pad: int,
) -> list[str]:
    """The likeliest answer to each prompt, token by token (greedily), as text without special tokens and without its stop.

    `prompts`: ids, those of a soft prompt's places included; none is empty, and each leaves the context room for
    `until.most` more. `ends`: tokens that end an answer, beside those that the model's folder names.
    """
    out = [""] * len(prompts)
    device = next(model.parameters()).device
    apart, prefixes = bool(model.config.is_encoder_decoder), is_prefix_lm(model.config)
    own = getattr(model.generation_config, "eos_token_id", None)
    stops = sorted({*eos_ids, *([own] if isinstance(own, int) else own or [])})
    was_training = model.training
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        for group in _length_batches(
            [len(prompt) for prompt in prompts], stopping.max_new_tokens, same_length=prefixes
        ):
            arrays = _pad_prompts([prompts[i] for i in group], pad, left=not apart)
            ids_BT, mask_BT = (array.to(device) for array in arrays)
            read = {"past_key_values": prefill_prompt(model, ids_BT)} if prefixes else {}
            begun = 1 if apart else ids_BT.shape[1]
            criteria = [_StopStringCriteria(tokenizer, stopping, begun)] if stopping.stop_strings else []
            written = model.generate(  # pyrefly: ignore[not-callable]
                input_ids=ids_BT,
                attention_mask=mask_BT,
                max_new_tokens=stopping.max_new_tokens,
                min_new_tokens=None,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,  # a folder may ask for one; it would look up ids that are no words
                no_repeat_ngram_size=0,
                eos_token_id=stops,
                pad_token_id=pad,
                stopping_criteria=StoppingCriteriaList(criteria),
                **read,
            )
            for i, row in zip(group, written[:, begun:].tolist(), strict=True):
                end = next((at for at, token in enumerate(row) if token in stops), len(row))
                out[i] = stopping.truncate(_decode(tokenizer, row[:end]))
    model.train(was_training)
    return out


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _length_batches(lengths: Sequence[int], max_new_tokens: int, *, same_length: bool = False) -> Iterator[list[int]]:
    """Prompts of like length together (`alike`: of the same), so many that they and their answers stay within the tokens."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):  # the newest is the longest
        full = (len(group) + 1) * (lengths[i] + max_new_tokens) > _TOKENS_AT_ONCE or len(group) == _PROMPTS_AT_ONCE
        if group and (full or (same_length and lengths[i] != lengths[group[0]])):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def _pad_prompts(prompts: Sequence[Sequence[int]], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids of shape (B, T) and the mask of what is no filling."""
    longest = max(map(len, prompts))
    ids_BT = torch.full((len(prompts), longest), pad, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        place = slice(longest - len(prompt), longest) if left else slice(0, len(prompt))
        ids_BT[row, place] = torch.tensor(list(prompt))
        mask_BT[row, place] = 1
    return ids_BT, mask_BT
