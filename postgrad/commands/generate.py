"""Generate text with one or more models: continuations of a prompt, or answers in the chat template."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from postgrad.commands.results import Result
from postgrad.commands.score_files import DEFAULT_CONTEXT, load_model_inputs
from postgrad.data.render.chat import apply_chat_template
from postgrad.errors import ModelError, StageError
from postgrad.evaluation.continuations import decode_ids
from postgrad.hardware import machine
from postgrad.hardware.memory import memory_errors
from postgrad.models.finite import sampling_errors
from postgrad.models.location import ModelLocation, locate_model
from postgrad.models.model_sizes import get_model_sizes
from postgrad.models.prefix_lm_attention import is_prefix_lm, prefill_prompt
from postgrad.models.sampling import suppressed_ids
from postgrad.plan.model_inputs import ModelInputs
from postgrad.tuning.open_model import open_model


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are sampled."""

    max_new_tokens: int = 100
    temperature: float = 0.8
    """0 always takes the most likely token."""
    top_p: float = 0.95
    """Nucleus sampling threshold; 1 samples from the whole distribution."""
    seed: int = 0

    def __post_init__(self) -> None:
        for option, value, is_valid, expected in (
            ("--max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 1, "1 or more"),
            ("--temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more"),
            ("--top-p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1"),
        ):
            if not is_valid:
                raise StageError(f"{value} is out of range", where=option, expected=expected)


@dataclass(frozen=True)
class TextModel:
    """A model that generates text, and how its inputs are made."""

    name: str
    model: PreTrainedModel
    inputs: ModelInputs

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self.inputs.tokenizer

    @property
    def continues_prompt(self) -> bool:
        """Whether it continues a prompt, as a decoder does; an encoder-decoder answers it."""
        return not self.inputs.task.is_encoder_decoder

    @property
    def has_chat_template(self) -> bool:
        """Whether the model can answer in a chat template."""
        return bool(self.tokenizer.chat_template)

    def continue_text(self, prompt: str, options: SamplingOptions) -> str:
        """The text after a prompt. Raises `ModelError` when the prompt fills all positions."""
        return _generate_text(self, self.inputs.encode_prompt(prompt), options)

    def answer(self, history: list[dict[str, str]], message: str, options: SamplingOptions) -> str:
        """The answer to a message; both are appended to `history`, whose oldest turns are dropped when they no longer fit."""
        history.append({"role": "user", "content": message})
        while (
            len(history) > 2 and _remaining_positions(self, len(_encode_chat(self, history))) < options.max_new_tokens
        ):
            del history[:2]
        answer = _generate_text(self, _encode_chat(self, history), options)
        history.append({"role": "assistant", "content": answer})
        return answer


@dataclass(frozen=True)
class Continuation(Result):
    """What one model generated."""

    model: str
    text: str
    continues_prompt: bool
    """Whether the text follows the prompt, and is no answer to it."""


@dataclass(frozen=True)
class Generation(Result):
    """What each model generated from one prompt."""

    prompt: str
    continuations: tuple[Continuation, ...]


@memory_errors("generate", "a smaller --max-new-tokens or a shorter --prompt")
def generate(
    models: str | Path | Sequence[str],
    prompt: str,
    *,
    chat: bool = False,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    base: str | None = None,
) -> Generation:
    """Each model's continuation of a prompt; with `chat` its answer in its chat template.

    `temperature`: 0 always takes the most likely token. `base`: the base model of the first model, an adapter's folder whose
    base has moved. Raises `ModelError` for a model that generates no text, or has no chat template for `chat`.
    """
    options = SamplingOptions(max_new_tokens, temperature, top_p, seed)
    continuations: list[Continuation] = []
    for text_model in load_text_models([str(models)] if isinstance(models, str | Path) else models, base):
        if chat and not text_model.has_chat_template:
            raise ModelError(
                f"{text_model.name} has no chat template",
                where="--chat",
                expected="a model that was trained on conversations",
            )
        text = text_model.answer([], prompt, options) if chat else text_model.continue_text(prompt, options)
        continuations.append(Continuation(text_model.name, text, not chat and text_model.continues_prompt))
    return Generation(prompt, tuple(continuations))


def load_text_models(models: Sequence[str], base: str | None = None) -> list[TextModel]:
    """Models that generate text; `base` is the base model of the first one."""
    return [
        _load_text_model(str(name), locate_model(str(name), Path.cwd(), None if number else base))
        for number, name in enumerate(models)
    ]


def _load_text_model(name: str, start: ModelLocation) -> TextModel:
    opened = open_model(start)
    if not opened.task.generates:
        raise ModelError(
            f"{name} generates no text", where="model", expected="a decoder or an encoder-decoder language model"
        )
    torch.nn.Module.to(opened.model, machine.default_device())
    return TextModel(name, opened.model, load_model_inputs(start, DEFAULT_CONTEXT))


def _encode_chat(text_model: TextModel, messages: list[dict[str, str]]) -> tuple[int, ...]:
    """The ids of a conversation up to where the next answer begins, as training rows encode them."""
    tokenizer = text_model.tokenizer
    assert tokenizer.chat_template is not None
    text = apply_chat_template(
        tokenizer.chat_template, tokenizer.special_tokens_map, messages, add_generation_prompt=True
    )
    return text_model.inputs.encode_prompt(text)


def _remaining_positions(text_model: TextModel, length: int) -> float:
    """How many tokens can follow `length` tokens."""
    limit = get_model_sizes(text_model.model.config).positions
    return math.inf if not limit or text_model.inputs.task.is_encoder_decoder else limit - length


@torch.no_grad()
def _generate_text(text_model: TextModel, prompt_ids: Sequence[int], options: SamplingOptions) -> str:
    model, tokenizer = text_model.model, text_model.tokenizer
    torch.manual_seed(options.seed)
    ids = torch.tensor([prompt_ids])
    sampling = {"do_sample": options.temperature > 0}
    if options.temperature > 0:
        sampling |= {"temperature": options.temperature, "top_p": options.top_p}
    room = _remaining_positions(text_model, ids.shape[1])
    if room < 1:
        limit = ids.shape[1] + int(room)
        raise ModelError(f"the prompt has {ids.shape[1]} tokens and the model {limit} positions", where="--prompt")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    stop_ids = model.generation_config.eos_token_id  # pyrefly: ignore[missing-attribute]
    ids = ids.to(model.device)
    prefill: dict[str, Any] = {"past_key_values": prefill_prompt(model, ids)} if is_prefix_lm(model.config) else {}
    decoder_prefix = text_model.inputs.decoder_prefix
    if decoder_prefix:
        prefill["decoder_input_ids"] = torch.tensor([decoder_prefix], device=model.device)
    with sampling_errors("generate"):
        out = model.generate(  # pyrefly: ignore[not-callable]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=int(min(options.max_new_tokens, room)),
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id if stop_ids is None else stop_ids,
            suppress_tokens=suppressed_ids(model, tokenizer),
            **sampling,
            **prefill,
        )
    if decoder_prefix:  # the output holds the answer alone
        return decode_ids(tokenizer, out[0])
    # Decoded together with the prompt: many tokenizers drop the space before a first word.
    known = text_model.inputs.encoder.vocabulary
    before, added = [token for token in prompt_ids if token < known], out[0, ids.shape[1] :].tolist()
    prompt_text, whole = (decode_ids(tokenizer, np.array(part, np.int64)) for part in (before, before + added))
    if whole.startswith(prompt_text):
        return whole.removeprefix(prompt_text)
    return decode_ids(tokenizer, out[0, ids.shape[1] :])
