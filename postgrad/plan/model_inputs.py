"""Model inputs: the ids around a text (special tokens, soft prompts, templates), and special ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from typing import Any

import numpy as np
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from postgrad.config.tunings import AnyTuning, InstructionPromptTuning, PromptTuningConfig, PTuning
from postgrad.data.render.frame import EMPTY_FRAME, Frame
from postgrad.data.render.prompt_template import Template
from postgrad.data.tokens.encoder import Encoder
from postgrad.errors import ModelError, StageError
from postgrad.models.auto_classes import load_config
from postgrad.models.layers import get_embedding_weight
from postgrad.models.location import ModelLocation
from postgrad.models.pretrained import detect_task, load_pretrained
from postgrad.models.task import Task
from postgrad.tuning.open_model import BaseReference

_MAX_SENTINELS = 1000


@dataclass(frozen=True)
class ModelInputs:
    """Everything about a model and its tokenizer that determines the ids of a row."""

    task: Task
    start_model: ModelLocation
    tokenizer: PreTrainedTokenizerBase
    config: Any
    encoder: Encoder
    length: int
    seed: int
    tokenizer_frame: Frame
    """Special tokens that the tokenizer adds around one text or two."""
    lineage_frame: Frame
    """Soft prompts of the model's lineage, as virtual tokens."""
    tuning_frame: Frame
    """Soft prompts and template tokens of the stage's tuning, inside those of the tokenizer."""

    @property
    def lead(self) -> int:
        """Tokens at the start of every stored document that a frame replaces."""
        return 0 if self.encoder.bos is None else 1

    @property
    def virtual_tokens(self) -> tuple[int, ...]:
        """Ids of soft prompts before each text."""
        return self.soft_prompt_frame.prefix_ids

    @cached_property
    def soft_prompt_frame(self) -> Frame:
        """Frames of the lineage and of the stage's tuning, the older outside."""
        outer, inner = self.lineage_frame, self.tuning_frame
        return Frame(
            (*outer.prefix_ids, *inner.prefix_ids),
            (*inner.separator_ids, *outer.separator_ids),
            (*inner.suffix_ids, *outer.suffix_ids),
        )

    @property
    def has_soft_prompt(self) -> bool:
        """Whether texts have soft prompts."""
        return self.soft_prompt_frame != EMPTY_FRAME

    @cached_property
    def frame(self) -> Frame:
        """Ids around the texts of a row: the tokenizer's special tokens, with soft prompts inside of them."""
        first = () if self.encoder.bos is None else (self.encoder.bos,)
        inner = self.soft_prompt_frame
        if self.task == Task.CAUSAL:  # ids after a question precede its answer
            return Frame((*first, *inner.prefix_ids), (*inner.separator_ids, *inner.suffix_ids))
        return Frame(
            (*self.tokenizer_frame.prefix_ids, *inner.prefix_ids),
            (*inner.separator_ids, *self.tokenizer_frame.separator_ids),
            (*inner.suffix_ids, *self.tokenizer_frame.suffix_ids),
        )

    @property
    def first_virtual_id(self) -> int:
        """The first virtual token of the stage's tuning."""
        return self.encoder.vocabulary + _count_virtual_ids(self.lineage_frame, self.encoder.vocabulary)

    def frame_prompt(self, ids: Sequence[int]) -> tuple[int, ...]:
        """A tokenized prompt with soft prompts and templates inside of the tokenizer's special tokens."""
        frame, prompt = self.soft_prompt_frame, tuple(ids)
        prefix, suffix = self.tokenizer_frame.prefix_ids, self.tokenizer_frame.suffix_ids
        begin = len(prefix) if prompt[: len(prefix)] == prefix else 0
        has_suffix = self.task.is_encoder_decoder and suffix and prompt[-len(suffix) :] == suffix
        end = len(prompt) - (len(suffix) if has_suffix else 0)
        return (
            *prompt[:begin],
            *frame.prefix_ids,
            *prompt[begin:end],
            *frame.separator_ids,
            *frame.suffix_ids,
            *prompt[end:],
        )

    @cached_property
    def without_tuning(self) -> ModelInputs:
        """The inputs without the virtual tokens of the stage's tuning, with the same room for text.

        The words and special tokens of a template stay, as a prompt without training.
        """
        first = self.first_virtual_id
        parts = (self.tuning_frame.prefix_ids, self.tuning_frame.separator_ids, self.tuning_frame.suffix_ids)
        plain = Frame(*(tuple(token for token in part if token < first) for part in parts))
        return replace(self, tuning_frame=plain, length=self.length - self.tuning_frame.size(2) + plain.size(2))

    @property
    def pad_id(self) -> int:
        """The padding id; a decoder with a classifier locates the last token by it."""
        named = (*_token_ids(self.config, "pad_token_id"), self.tokenizer.pad_token_id)
        inside = (token for token in named if isinstance(token, int) and 0 <= token < self.encoder.vocabulary)
        return next(inside, self.encoder.eos)

    @property
    def mask_id(self) -> int:
        """The id of the mask token. Raises `ModelError` for a tokenizer without one."""
        mask_id = self.tokenizer.mask_token_id
        if not isinstance(mask_id, int):
            raise ModelError("the tokenizer has no mask token", where="model", expected="a masked language model")
        return mask_id

    @property
    def special_ids(self) -> list[int]:
        """All special ids of the tokenizer."""
        return [int(token) for token in self.tokenizer.all_special_ids]

    @cached_property
    def continues_V(self) -> np.ndarray:
        """Whether each id continues the word before it, of shape (V,)."""
        tokens = self.tokenizer.convert_ids_to_tokens(list(range(len(self.tokenizer))))
        is_word_piece = any(str(token).startswith("##") for token in tokens)
        continues_V = np.zeros(self.encoder.vocabulary, bool)
        continues_V[: len(tokens)] = [
            str(token).startswith("##") if is_word_piece else not str(token).startswith(("Ġ", "▁", "Ċ"))
            for token in tokens
        ]
        return continues_V

    @cached_property
    def sentinels(self) -> list[int]:
        """Ids of `<extra_id_0>`, `<extra_id_1>` ... Raises `ModelError` for a tokenizer without them."""
        vocabulary = self.tokenizer.get_vocab()
        names = takewhile(vocabulary.__contains__, (f"<extra_id_{i}>" for i in range(_MAX_SENTINELS)))
        sentinels = [int(vocabulary[name]) for name in names]
        if not sentinels:
            raise ModelError(
                "the tokenizer has no sentinel tokens", where="model", expected="<extra_id_0> and so on, as in T5"
            )
        return sentinels

    @property
    def decoder_start(self) -> int:
        """The first id of a decoder's input. Raises `ModelError` for a configuration without one."""
        for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
            for token in _token_ids(self.config, name):
                return token
        raise ModelError("the configuration names no decoder_start_token_id", where="model")

    def count_tokens(self, text: str) -> int:
        """Number of tokens of a text."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def mean_embedding(self, text: str) -> np.ndarray:
        """Mean input embedding of a text's tokens, of shape (D,)."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._embeddings_VD[ids].mean(0) if ids else np.zeros(self._embeddings_VD.shape[1], np.float32)

    @cached_property
    def _embeddings_VD(self) -> np.ndarray:
        model = load_pretrained(self.start_model, detect_task(self.start_model.full_model)).model
        return get_embedding_weight(model).detach().numpy().copy()

    @property
    def has_token_types(self) -> bool:
        """Whether the model distinguishes two texts by token types."""
        return "token_type_ids" in self.tokenizer.model_input_names


def _token_ids(config: PreTrainedConfig, name: str) -> list[int]:
    """A special id in a configuration, and in that of its text part."""
    found = [getattr(part, name, None) for part in (config, config.get_text_config())]
    return [token for token in found if isinstance(token, int)]


def make_encoder(tokenizer: PreTrainedTokenizerBase, vocabulary: int, eos: str | None = None) -> Encoder:
    """The tokenizer as a value: its JSON, the BOS that it adds (if it does), the EOS, and the model's vocabulary size.

    Raises `ModelError` for a tokenizer that is larger than the model's embeddings or has no EOS.
    """
    backend_json = tokenizer.backend_tokenizer.to_str()
    behind = {token for token, number in tokenizer.get_vocab().items() if number >= vocabulary}
    if behind and behind == {tokenizer.pad_token}:
        backend_json = _remove_added_token(backend_json, tokenizer.pad_token)  # the EOS pads in its place
    elif behind:
        raise ModelError(
            f"the tokenizer has {len(tokenizer):,} tokens and the model {vocabulary:,} embeddings",
            where="model",
            expected="a tokenizer that belongs to the model",
            hint="use the model's own tokenizer, or resize the model's embeddings first",
        )
    if eos is None:
        # Encoders end a text with their separator.
        eos_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        if eos_id is None:
            raise ModelError(
                "the tokenizer has no end-of-text token",
                where="data.eos",
                expected="the token that ends a document, such as '<|endoftext|>'",
            )
    else:
        eos_id = tokenizer.convert_tokens_to_ids(eos)
        if eos_id is None or (eos_id == tokenizer.unk_token_id and eos != tokenizer.unk_token):
            raise StageError(f"{eos!r} is not a token of this tokenizer", where="data.eos")
    # The model was trained with the BOS if the tokenizer adds it.
    first = tokenizer("a")["input_ids"][:1]
    candidates = [token for token in (tokenizer.bos_token_id, tokenizer.cls_token_id) if token is not None]
    bos = next((token for token in candidates if first == [token]), None)
    assert isinstance(eos_id, int)
    return Encoder(backend_json, bos, eos_id, vocabulary)


def _remove_added_token(tokenizer_json: str, token: str) -> str:
    """The JSON of a tokenizer without one of its added tokens: text that spells it is text."""
    content = json.loads(tokenizer_json)
    content["added_tokens"] = [each for each in content["added_tokens"] if each["content"] != token]
    return json.dumps(content, ensure_ascii=False)


def make_model_inputs(
    task: Task,
    start_model: ModelLocation,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    *,
    length: int,
    seed: int,
    tuning: AnyTuning | None = None,
) -> ModelInputs:
    """The inputs of a start model for a task under a tuning. Raises the errors of the tuning's template."""
    lineage_frame = _get_lineage_frame(start_model)
    first = encoder.vocabulary + _count_virtual_ids(lineage_frame, encoder.vocabulary)
    tokenizer_frame = get_tokenizer_frame(tokenizer)
    return ModelInputs(
        task,
        start_model,
        tokenizer,
        load_config(start_model.name_or_path),
        encoder,
        length,
        seed,
        tokenizer_frame,
        lineage_frame,
        _strip_tokenizer_ids(tokenizer_frame, _make_tuning_frame(tuning, tokenizer, first)),
    )


def count_virtual_tokens(tuning: AnyTuning | None) -> int:
    """Number of virtual tokens of a tuning."""
    match tuning:
        case PromptTuningConfig() | InstructionPromptTuning():
            return tuning.length
        case PTuning():
            return Template.parse(tuning.template).virtual_token_count
        case _:
            return 0


def get_tokenizer_frame(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """Special tokens that a tokenizer adds around one text, and between two."""
    one, two = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "b"))
    alone, pair = tokenizer("a")["input_ids"], tokenizer("a", "b")["input_ids"]
    begin = _find_sublist(alone, one, 0)
    split = _find_sublist(pair, one, 0) + len(one)
    other = _find_sublist(pair, two, split)
    return Frame(tuple(alone[:begin]), tuple(pair[split:other]), tuple(alone[begin + len(one) :]))


def _find_sublist(ids: list[int], part: list[int], start: int) -> int:
    return next(i for i in range(start, len(ids)) if ids[i : i + len(part)] == part)


def _get_lineage_frame(start_model: ModelLocation) -> Frame:
    reference = BaseReference.read_folder(start_model)
    return reference.frame if reference else EMPTY_FRAME


def _count_virtual_ids(frame: Frame, vocabulary: int) -> int:
    """Number of virtual tokens in a frame."""
    return sum(
        token >= vocabulary for part in (frame.prefix_ids, frame.separator_ids, frame.suffix_ids) for token in part
    )


def _strip_tokenizer_ids(tokenizer_frame: Frame, template_frame: Frame) -> Frame:
    """A template without the special tokens at its ends that the tokenizer adds anyway."""
    prefix, suffix = template_frame.prefix_ids, template_frame.suffix_ids
    begin, end = tokenizer_frame.prefix_ids, tokenizer_frame.suffix_ids
    if prefix[: len(begin)] == begin:
        prefix = prefix[len(begin) :]
    if end and suffix[-len(end) :] == end:
        suffix = suffix[: -len(end)]
    return Frame(prefix, template_frame.separator_ids, suffix)


def _make_tuning_frame(tuning: AnyTuning | None, tokenizer: PreTrainedTokenizerBase, first: int) -> Frame:
    """The virtual tokens and template tokens of a tuning."""
    if isinstance(tuning, PTuning):
        special = {
            name: token
            for name in ("bos", "eos", "cls", "sep", "mask", "pad")
            if isinstance(token := getattr(tokenizer, f"{name}_token_id", None), int)
        }

        def literal(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        return Frame.from_template(Template.parse(tuning.template), special, first, literal)
    return Frame(tuple(range(first, first + count_virtual_tokens(tuning))))
