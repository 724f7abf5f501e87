"""Greedy generation of answers to many prompts, in batches, up to a stop string.

Legend: B batch, T time.

Prompts of a decoder are padded on the left, so that all answers begin in one column; padding is masked, so an answer does not
depend on the other rows of its batch; where a model does not support that, prompts of one length go together. Prompts of an
encoder-decoder are padded on the right. A prefix language model gets prompts of one length together, with bidirectional
attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from postgrad.models.decoding import takes_left_padding
from postgrad.models.model import CausalModel
from postgrad.models.prefix_lm_attention import is_prefix_lm, prefill_prompt
from postgrad.models.sampling import suppressed_ids

_TOKENS_AT_ONCE = 16_384
_PROMPTS_AT_ONCE = 64


@dataclass(frozen=True)
class StoppingRule:
    """An answer ends at an EOS, before any of the stop strings, or after `max_new_tokens`."""

    max_new_tokens: int
    stop_strings: tuple[str, ...] = ()

    def truncate(self, text: str) -> str:
        """The text up to its first stop string."""
        ends = [end for stop in self.stop_strings if (end := text.find(stop)) >= 0]
        return text[: min(ends)] if ends else text


class _StopStringCriteria(StoppingCriteria):
    """Stops the answers of a batch that contain a stop string."""

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
    decoder_prefix: Sequence[int] = (),
) -> list[str]:
    """The greedy answer to each prompt, as text without special tokens and stop strings.

    `prompts`: ids with soft prompt placeholders; none is empty, and each leaves room for `max_new_tokens` in the context.
    `eos_ids`: tokens that end an answer, in addition to those of the model's generation config. `decoder_prefix`: the ids
    before each answer in an encoder-decoder.
    """
    out = [""] * len(prompts)
    device = next(model.parameters()).device
    encoder_decoder, prefix_lm = bool(model.config.is_encoder_decoder), is_prefix_lm(model.config)
    own = getattr(model.generation_config, "eos_token_id", None)
    stops = sorted({*eos_ids, *([own] if isinstance(own, int) else own or [])})
    suppressed = suppressed_ids(model, tokenizer)
    was_training = model.training
    model.eval()
    lengths = [len(prompt) for prompt in prompts]
    with torch.compiler.set_stance("force_eager"):
        is_ragged = not encoder_decoder and len(set(lengths)) > 1
        same_length = prefix_lm or (is_ragged and not takes_left_padding(CausalModel(model)))
        for group in _length_batches(lengths, stopping.max_new_tokens, same_length=same_length):
            arrays = _pad_prompts([prompts[i] for i in group], pad, left=not encoder_decoder)
            ids_BT, mask_BT = (array.to(device) for array in arrays)
            cache: dict[str, Any] = {"past_key_values": prefill_prompt(model, ids_BT)} if prefix_lm else {}
            if encoder_decoder and decoder_prefix:
                cache["decoder_input_ids"] = torch.tensor([list(decoder_prefix)] * len(group), device=device)
            begin = max(1, len(decoder_prefix)) if encoder_decoder else ids_BT.shape[1]
            criteria = [_StopStringCriteria(tokenizer, stopping, begin)] if stopping.stop_strings else []
            output = model.generate(  # pyrefly: ignore[not-callable]
                input_ids=ids_BT,
                attention_mask=mask_BT,
                max_new_tokens=stopping.max_new_tokens,
                min_new_tokens=None,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,  # a generation config may set one, which fails on virtual tokens
                no_repeat_ngram_size=0,
                suppress_tokens=suppressed,
                eos_token_id=stops,
                pad_token_id=pad,
                stopping_criteria=StoppingCriteriaList(criteria),
                **cache,
            )
            for i, row in zip(group, output[:, begin:].tolist(), strict=True):
                end = next((at for at, token in enumerate(row) if token in stops), len(row))
                out[i] = stopping.truncate(_decode(tokenizer, row[:end]))
    model.train(was_training)
    return out


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _length_batches(lengths: Sequence[int], max_new_tokens: int, *, same_length: bool = False) -> Iterator[list[int]]:
    """Prompts of similar (or the same) length, as many as fit the token budget together with their answers."""
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
    """Ids and attention mask of shape (B, T)."""
    longest = max(map(len, prompts))
    ids_BT = torch.full((len(prompts), longest), pad, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        columns = slice(longest - len(prompt), longest) if left else slice(0, len(prompt))
        ids_BT[row, columns] = torch.tensor(list(prompt))
        mask_BT[row, columns] = 1
    return ids_BT, mask_BT
