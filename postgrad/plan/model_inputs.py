"""Model inputs: the ids around a text (special tokens, soft prompts, templates), and special ids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice, takewhile
from typing import Any

import numpy as np
from transformers import GenerationConfig, PreTrainedTokenizerBase

from postgrad.config.tunings import AnyTuning, InstructionPromptTuning, PromptTuningConfig, PTuning
from postgrad.data.render.frame import EMPTY_FRAME, Frame, TextPrefix
from postgrad.data.render.prompt_template import Template
from postgrad.data.tokens.encoder import Encoder
from postgrad.data.tokens.store import TokenStore
from postgrad.errors import ModelError, StageError
from postgrad.models.auto_classes import load_config, load_generation_config
from postgrad.models.layers import get_embedding_weight
from postgrad.models.location import ModelLocation
from postgrad.models.pretrained import detect_task, ignored_token_settings, load_pretrained
from postgrad.models.task import Task
from postgrad.models.task_head_model import decoder_start_token
from postgrad.tuning.open_model import BaseReference

_MAX_SENTINELS = 1000
_SENTENCE_ENDS = (".", "!", "?", "…", "。", "！", "？", "\n")
_UNKNOWN_PROBE_TOKENS = 1_000_000
_UNKNOWN_SHARE_TOLD = 0.001


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
        return len(self.encoder.prefix_ids)

    @cached_property
    def text_prefix(self) -> TextPrefix:
        """The ids before a text to continue: the tokenizer's special tokens and the soft prompts."""
        soft = self.soft_prompt_frame
        return TextPrefix(soft.outer_ids, self.encoder.prefix_ids, soft.prefix_ids)

    @property
    def virtual_tokens(self) -> tuple[int, ...]:
        """Ids of soft prompts before each text."""
        return self.text_prefix.virtual_tokens

    @cached_property
    def soft_prompt_frame(self) -> Frame:
        """Frames of the lineage and of the stage's tuning, the older outside."""
        outer, inner = self.lineage_frame, self.tuning_frame
        return Frame(
            (*outer.prefix_ids, *inner.prefix_ids),
            (*inner.separator_ids, *outer.separator_ids),
            (*inner.suffix_ids, *outer.suffix_ids),
            outer.outer_ids,
        )

    @property
    def peft_reads_alike(self) -> bool:
        """Whether PEFT, which puts a soft prompt before everything, puts it where these inputs have it."""
        return not (self.special_frame.prefix_ids and self.text_prefix.inner_ids)

    def notes(self) -> list[str]:
        """What a user should know about the ids around a text."""
        names = self.tokenizer.convert_ids_to_tokens(list(self.special_frame.prefix_ids))
        said = f"texts begin with {''.join(names)}" if names else "nothing precedes a text"
        notes = [
            f"tokenizer_config.json has {name}: {str(not value).lower()}, which transformers 5 ignores and transformers 4 "
            f"obeyed for some families: {said}"
            for name, value in ignored_token_settings(self.tokenizer).items()
        ]
        if not self.peft_reads_alike:
            notes.append(
                f"no folder for PEFT is written: PEFT puts a soft prompt before {''.join(names)}, and here it follows it"
            )
        return notes

    @property
    def has_soft_prompt(self) -> bool:
        """Whether texts have soft prompts."""
        return self.soft_prompt_frame != EMPTY_FRAME

    @cached_property
    def frame(self) -> Frame:
        """Ids around the texts of a row: the tokenizer's special tokens, with soft prompts inside of them."""
        inner = self.soft_prompt_frame
        if self.task == Task.CAUSAL:  # ids after a question precede its answer
            inner = replace(inner, separator_ids=(*inner.separator_ids, *inner.suffix_ids), suffix_ids=())
        return inner.inside(self.special_frame)

    @cached_property
    def special_frame(self) -> Frame:
        """The tokenizer's special tokens around a text; a decoder continues it, so there are none after it."""
        return Frame(self.encoder.prefix_ids) if self.task == Task.CAUSAL else self.tokenizer_frame

    @cached_property
    def target_frame(self) -> Frame:
        """Special tokens around the target of an encoder-decoder: the tokenizer's, and the first one that `generate` forces.

        Raises `ModelError` when these two differ.
        """
        own = get_tokenizer_frame(self.tokenizer, target=True)
        forced, prefix = self._generation_config.forced_bos_token_id, own.prefix_ids
        if forced is not None and prefix[:1] != (forced,):
            if prefix:
                names = self.tokenizer.convert_ids_to_tokens([forced, prefix[0]])
                raise ModelError(
                    f"the generation configuration begins every answer with {names[0]}, and the tokenizer with {names[1]}",
                    where="model",
                    expected="the same first token",
                    hint="correct forced_bos_token_id in generation_config.json, or tgt_lang in tokenizer_config.json",
                )
            prefix = (int(forced),)
        return Frame(prefix, (), own.suffix_ids or (self.encoder.eos,))

    @cached_property
    def _generation_config(self) -> GenerationConfig:
        return load_generation_config(self.start_model.name_or_path)

    @property
    def first_virtual_id(self) -> int:
        """The first virtual token of the stage's tuning."""
        return self.encoder.vocabulary + _count_virtual_ids(self.lineage_frame, self.encoder.vocabulary)

    def frame_prompt(self, ids: Sequence[int]) -> tuple[int, ...]:
        """A tokenized prompt with soft prompts and templates inside of the tokenizer's special tokens."""
        frame, prompt = self.soft_prompt_frame, tuple(ids)
        prefix, suffix = self.special_frame.prefix_ids, self.special_frame.suffix_ids
        begin = len(prefix) if prompt[: len(prefix)] == prefix else 0
        end = len(prompt) - (len(suffix) if suffix and prompt[-len(suffix) :] == suffix else 0)
        return (
            *frame.outer_ids,
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
        configs = (self.config, self.config.get_text_config())
        named = (*(getattr(config, "pad_token_id", None) for config in configs), self.tokenizer.pad_token_id)
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
    def unknown_id(self) -> int | None:
        """The token of text that the vocabulary lacks."""
        return find_unknown_id(self.tokenizer, self.encoder)

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
    def ends_sentence_V(self) -> np.ndarray:
        """Whether each id ends a sentence or a line, of shape (V,)."""
        size = min(len(self.tokenizer), self.encoder.vocabulary)
        texts = self.tokenizer.batch_decode([[token] for token in range(size)], clean_up_tokenization_spaces=False)
        ends_V = np.zeros(self.encoder.vocabulary, bool)
        ends_V[:size] = [text.rstrip(" \"'”’)」").endswith(_SENTENCE_ENDS) for text in texts]
        return ends_V

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

    @cached_property
    def decoder_start(self) -> int:
        """The first id of a decoder's input. Raises `ModelError` for a configuration without one."""
        configs = (self._generation_config, self.config)
        # mBART's labels end with a language code, with which its decoder begins where no configuration says otherwise.
        if len(self.target_frame.suffix_ids) > 1 and all(c.decoder_start_token_id is None for c in configs):
            return self.target_frame.suffix_ids[-1]
        return decoder_start_token(*configs)

    @property
    def decoder_prefix(self) -> tuple[int, ...]:
        """The ids of a decoder before the first token of an answer; none for other models."""
        return (self.decoder_start, *self.target_frame.prefix_ids) if self.task.is_encoder_decoder else ()

    def encode_prompt(self, text: str, *, soft_prompts: bool = True) -> tuple[int, ...]:
        """The ids of a prompt with the tokenizer's special tokens; an empty one is these alone, or a BOS or EOS."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        framed = self.special_frame.wrap_once(ids) or (self.empty_prompt,)
        return self.frame_prompt(framed) if soft_prompts else framed

    @property
    def empty_prompt(self) -> int:
        """The token of an empty prompt where the tokenizer adds none: its BOS or EOS."""
        bos = self.tokenizer.bos_token_id
        return int(bos) if isinstance(bos, int) else self.encoder.eos

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


def make_encoder(tokenizer: PreTrainedTokenizerBase, vocabulary: int, eos: str | None = None) -> Encoder:
    """The tokenizer as a value: its JSON, the special tokens before a text, the EOS, and the model's vocabulary size.

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
    frame = get_tokenizer_frame(tokenizer)
    if eos is None:
        # A tokenizer may end texts with a token that it has no name for; encoders end them with their separator.
        named = [token for token in (tokenizer.eos_token_id, tokenizer.sep_token_id) if token is not None]
        own = [token for token in named if token in frame.suffix_ids] or frame.suffix_ids[-1:] or named
        eos_id = own[0] if own else None
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
    assert isinstance(eos_id, int)
    return Encoder(backend_json, frame.prefix_ids, eos_id, vocabulary)


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


def find_unknown_id(tokenizer: PreTrainedTokenizerBase, encoder: Encoder) -> int | None:
    """The token of text that the vocabulary lacks; None where it also begins or ends texts, as GPT-2's does."""
    unknown_id = tokenizer.unk_token_id
    return unknown_id if isinstance(unknown_id, int) and unknown_id not in (*encoder.prefix_ids, encoder.eos) else None


def unknown_notes(tokenizer: PreTrainedTokenizerBase, encoder: Encoder, stores: Mapping[str, TokenStore]) -> list[str]:
    """Notes on texts that the vocabulary lacks a part of, from the first documents of each store."""
    notes, unknown_id = [], find_unknown_id(tokenizer, encoder)
    for name, store in stores.items() if unknown_id is not None else ():
        counted = unknown = 0
        for number in range(len(store)):
            ids = store.read(number)
            counted, unknown = counted + len(ids), unknown + int((ids == unknown_id).sum())
            if counted >= _UNKNOWN_PROBE_TOKENS:
                break
        if unknown >= _UNKNOWN_SHARE_TOLD * counted:
            notes.append(
                f"{name}: {100 * unknown / counted:.2g} % of its tokens are {tokenizer.unk_token}, for text that the "
                "vocabulary lacks; training only teaches that such text is there"
            )
    return notes


def get_tokenizer_frame(tokenizer: PreTrainedTokenizerBase, *, target: bool = False) -> Frame:
    """Special tokens that a tokenizer adds around one text, and between two; `target`: around an encoder-decoder's target."""
    text = _probe_text(tokenizer)
    alone, pair = (
        tokenizer(**{f"text{part}{'_target' * target}": text for part in parts}) for parts in (("",), ("", "_pair"))
    )
    is_text = np.array(alone.sequence_ids(0)) == 0
    begin, end = int(is_text.argmax()), len(is_text) - int(is_text[::-1].argmax())
    which = pair.sequence_ids(0)
    split = len(which) - which[::-1].index(0)
    ids = alone["input_ids"]
    return Frame(tuple(ids[:begin]), tuple(pair["input_ids"][split : which.index(1)]), tuple(ids[end:]))


def _probe_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """A text with a token of its own. Raises `ModelError` for a tokenizer that has none."""
    special = set(tokenizer.all_special_tokens)
    vocabulary = (
        tokenizer.convert_tokens_to_string([token]) for token in tokenizer.get_vocab() if token not in special
    )
    for text in chain(("a", "0"), islice(vocabulary, 64)):
        if tokenizer(text, add_special_tokens=False)["input_ids"]:
            return text
    raise ModelError(
        "the tokenizer finds no token in any text", where="model", expected="a tokenizer with a vocabulary"
    )


def _get_lineage_frame(start_model: ModelLocation) -> Frame:
    reference = BaseReference.read_folder(start_model)
    return reference.frame if reference else EMPTY_FRAME


def _count_virtual_ids(frame: Frame, vocabulary: int) -> int:
    """Number of virtual tokens in a frame."""
    return sum(token >= vocabulary for token in frame.all_ids)


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
