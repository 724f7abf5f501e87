"""How does a model of this stage read a text: which ids stand around it, and which are special to it?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from transformers import AutoConfig, PreTrainedTokenizerBase

from postgrad.config.tunings import AnyTuning, InstructionPromptTuning, PromptTuningConfig, PTuning
from postgrad.data.render.frame import EMPTY_FRAME, Frame
from postgrad.data.render.prompt_template import Template
from postgrad.data.tokens.tokenize import Encoder
from postgrad.errors import ModelError, StageError
from postgrad.models.layers import get_embedding_weight
from postgrad.models.location import ModelLocation
from postgrad.models.pretrained import detect_task, load_pretrained
from postgrad.models.task import Task
from postgrad.tuning.open_model import BaseReference

_MAX_SENTINELS = 1000


@dataclass(frozen=True)
class ModelInputs:
    """What rows need to know of a model and its tokenizer."""

    task: Task
    start_model: ModelLocation
    tokenizer: PreTrainedTokenizerBase
    config: Any
    encoder: Encoder
    length: int
    seed: int
    tokenizer_frame: Frame
    """What the tokenizer itself sets around one text or two."""
    lineage_frame: Frame
    """What the model's lineage sets around a text: the places of its soft prompts."""
    tuning_frame: Frame
    """What the stage's tuning sets around a text: the places of its vectors, inside of `own`."""

    @property
    def lead(self) -> int:
        """Tokens at the start of every stored document that a frame replaces."""
        return 0 if self.encoder.bos is None else 1

    @property
    def virtual_tokens(self) -> tuple[int, ...]:
        """Ids of soft prompts that stand before each text."""
        return self.soft_prompt_frame.prefix_ids

    @cached_property
    def soft_prompt_frame(self) -> Frame:
        """What the lineage and the stage's tuning set around a text, the older outside."""
        left, added = self.lineage_frame, self.tuning_frame
        return Frame(
            (*left.prefix_ids, *added.prefix_ids),
            (*added.separator_ids, *left.separator_ids),
            (*added.suffix_ids, *left.suffix_ids),
        )

    @property
    def has_soft_prompt(self) -> bool:
        """Whether soft prompts stand around the texts."""
        return self.soft_prompt_frame != EMPTY_FRAME

    @cached_property
    def frame(self) -> Frame:
        """What stands around the texts of a row: the tokenizer's own ids, and soft prompts inside of them."""
        first = () if self.encoder.bos is None else (self.encoder.bos,)
        inner = self.soft_prompt_frame
        if self.task == Task.CAUSAL:  # what stands behind a question stands before its answer
            return Frame((*first, *inner.prefix_ids), (*inner.separator_ids, *inner.suffix_ids))
        return Frame(
            (*self.tokenizer_frame.prefix_ids, *inner.prefix_ids),
            (*inner.separator_ids, *self.tokenizer_frame.separator_ids),
            (*inner.suffix_ids, *self.tokenizer_frame.suffix_ids),
        )

    @property
    def first_virtual_id(self) -> int:
        """The id that stands for the first vector of the stage's tuning."""
        return self.encoder.vocabulary + _count_virtual_ids(self.lineage_frame, self.encoder.vocabulary)

    def frame_prompt(self, ids: Sequence[int]) -> tuple[int, ...]:
        """A prompt as the tokenizer gives it, with soft prompts and templates inside of what the tokenizer sets around it."""
        around, own = self.soft_prompt_frame, self.tokenizer_frame
        prompt = tuple(ids)
        begin = len(own.prefix_ids) if prompt[: len(own.prefix_ids)] == own.prefix_ids else 0
        ends = self.task.is_encoder_decoder and own.suffix_ids and prompt[-len(own.suffix_ids) :] == own.suffix_ids
        end = len(prompt) - (len(own.suffix_ids) if ends else 0)
        return (
            *prompt[:begin],
            *around.prefix_ids,
            *prompt[begin:end],
            *around.separator_ids,
            *around.suffix_ids,
            *prompt[end:],
        )

    @cached_property
    def without_tuning(self) -> ModelInputs:
        """The same without the vectors of the stage's tuning, and with as much room for the text.

        The words and special tokens of a template stay: that is prompting without training.
        """
        first = self.first_virtual_id
        parts = (self.tuning_frame.prefix_ids, self.tuning_frame.separator_ids, self.tuning_frame.suffix_ids)
        plain = Frame(*(tuple(token for token in part if token < first) for part in parts))
        return replace(self, tuning_frame=plain, length=self.length - self.tuning_frame.size(2) + plain.size(2))

    @property
    def pad_id(self) -> int:
        """What short rows are filled up with; a decoder that classifies finds its last token by it."""
        for token in (self.config.pad_token_id, self.tokenizer.pad_token_id, self.encoder.eos):
            if token is not None:
                return int(token)
        raise AssertionError("every encoder has an EOS")

    @property
    def mask_id(self) -> int:
        """The mask. Raises `ModelError` when the tokenizer has none."""
        found = self.tokenizer.mask_token_id
        if not isinstance(found, int):
            raise ModelError("the tokenizer has no mask token", where="model", expected="an encoder trained with masks")
        return found

    @property
    def special_ids(self) -> list[int]:
        """All special ids of the tokenizer."""
        return [int(token) for token in self.tokenizer.all_special_ids]

    @cached_property
    def continues_V(self) -> np.ndarray:
        """Whether a token goes on with the word before it, for every id: of shape (V,)."""
        tokens = self.tokenizer.convert_ids_to_tokens(list(range(len(self.tokenizer))))
        pieces = any(str(token).startswith("##") for token in tokens)
        out = np.zeros(self.encoder.vocabulary, bool)
        out[: len(tokens)] = [
            str(token).startswith("##") if pieces else not str(token).startswith(("Ġ", "▁", "Ċ")) for token in tokens
        ]
        return out

    @cached_property
    def sentinels(self) -> list[int]:
        """The tokens that stand for corrupted spans, the first one first. Raises `ModelError` when there are none."""
        known = self.tokenizer.get_vocab()
        found = []
        for i in range(_MAX_SENTINELS):
            token = known.get(f"<extra_id_{i}>")
            if token is None:
                break
            found.append(int(token))
        if not found:
            raise ModelError(
                "the tokenizer has no sentinel tokens", where="model", expected="<extra_id_0> and so on, as T5 has them"
            )
        return found

    @property
    def decoder_start(self) -> int:
        """What a decoder begins with. Raises `ModelError` when the configuration names nothing."""
        for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
            token = getattr(self.config, name, None)
            if token is not None:
                return int(token)
        raise ModelError("the configuration names no decoder_start_token_id", where="model")

    def count_tokens(self, text: str) -> int:
        """How many tokens a text has."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def mean_embedding(self, text: str) -> np.ndarray:
        """The mean of the input embeddings of a text's tokens, of shape (D,)."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._embeddings_VD[ids].mean(0) if ids else np.zeros(self._embeddings_VD.shape[1], np.float32)

    @cached_property
    def _embeddings_VD(self) -> np.ndarray:
        model = load_pretrained(self.start_model, detect_task(self.start_model.full_model)).model
        return get_embedding_weight(model).detach().numpy().copy()

    @property
    def has_token_types(self) -> bool:
        """Whether the model tells two texts apart by token types."""
        return "token_type_ids" in self.tokenizer.model_input_names


def make_encoder(tokenizer: PreTrainedTokenizerBase, vocabulary: int, eos: str | None = None) -> Encoder:
    """The tokenizer as a value: its JSON, the BOS it sets by itself (if it does), the EOS, and the model's vocabulary.

    Raises `ModelError` when the tokenizer does not fit the model or names no EOS.
    """
    if len(tokenizer) > vocabulary:
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
                "the tokenizer names no end-of-text token",
                where="data.eos",
                expected="the token that ends a document, such as '<|endoftext|>'",
            )
    else:
        eos_id = tokenizer.convert_tokens_to_ids(eos)
        if eos_id is None or (eos_id == tokenizer.unk_token_id and eos != tokenizer.unk_token):
            raise StageError(f"{eos!r} is not a token of this tokenizer", where="data.eos")
    # What the tokenizer itself puts before a text is what the model was trained on.
    first = tokenizer("a")["input_ids"][:1]
    starts = [token for token in (tokenizer.bos_token_id, tokenizer.cls_token_id) if token is not None]
    bos = next((token for token in starts if first == [token]), None)
    assert isinstance(eos_id, int)
    return Encoder(tokenizer.backend_tokenizer.to_str(), bos, eos_id, vocabulary)


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
    """How a model of this start and task, under this tuning, reads a text. Raises the template's errors."""
    left = _get_lineage_frame(start_model)
    first = encoder.vocabulary + _count_virtual_ids(left, encoder.vocabulary)
    own = get_tokenizer_frame(tokenizer)
    return ModelInputs(
        task,
        start_model,
        tokenizer,
        AutoConfig.from_pretrained(start_model.name_or_path),
        encoder,
        length,
        seed,
        own,
        left,
        _strip_tokenizer_ids(own, _make_tuning_frame(tuning, tokenizer, first)),
    )


def count_virtual_tokens(tuning: AnyTuning | None) -> int:
    """How many vectors a tuning sets among the ids."""
    match tuning:
        case PromptTuningConfig() | InstructionPromptTuning():
            return tuning.length
        case PTuning():
            return Template.parse(tuning.template).virtual_token_count
        case _:
            return 0


def get_tokenizer_frame(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """What a tokenizer sets around one text, and between two."""
    one, two = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "b"))
    alone, pair = tokenizer("a")["input_ids"], tokenizer("a", "b")["input_ids"]
    begin = _find_sublist(alone, one, 0)
    split = _find_sublist(pair, one, 0) + len(one)
    other = _find_sublist(pair, two, split)
    return Frame(tuple(alone[:begin]), tuple(pair[split:other]), tuple(alone[begin + len(one) :]))


def _find_sublist(ids: list[int], part: list[int], start: int) -> int:
    return next(i for i in range(start, len(ids)) if ids[i : i + len(part)] == part)


def _get_lineage_frame(start_model: ModelLocation) -> Frame:
    said = BaseReference.read_folder(start_model)
    return said.frame if said else EMPTY_FRAME


def _count_virtual_ids(frame: Frame, vocabulary: int) -> int:
    """How many ids of a frame are places of vectors."""
    return sum(
        token >= vocabulary for part in (frame.prefix_ids, frame.separator_ids, frame.suffix_ids) for token in part
    )


def _strip_tokenizer_ids(tokenizer_frame: Frame, template_frame: Frame) -> Frame:
    """A template without the special tokens at its ends that the tokenizer sets anyway."""
    before, after = template_frame.prefix_ids, template_frame.suffix_ids
    if tokenizer_frame.prefix_ids and before[: len(tokenizer_frame.prefix_ids)] == tokenizer_frame.prefix_ids:
        before = before[len(tokenizer_frame.prefix_ids) :]
    if tokenizer_frame.suffix_ids and after[-len(tokenizer_frame.suffix_ids) :] == tokenizer_frame.suffix_ids:
        after = after[: -len(tokenizer_frame.suffix_ids)]
    return Frame(before, template_frame.separator_ids, after)


def _make_tuning_frame(tuning: AnyTuning | None, tokenizer: PreTrainedTokenizerBase, first: int) -> Frame:
    """The places of a tuning's vectors around a text."""
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
