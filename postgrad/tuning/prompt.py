"""Which vectors stand among the words? Soft prompts: trained vectors at the places of virtual tokens.

Legend: B rows, T time, P vectors of the prompt, V rows of the input embedding, D its width, H width of an encoder.

Prompt tuning (Lester et al. 2021, arXiv 2104.08691), P-tuning v1 (Liu et al. 2021, arXiv 2103.10385) and the soft part
of instruction prompt tuning (Singhal et al. 2022, arXiv 2212.13138) are one thing with different values. A virtual token
is an id from V on, written into `input_ids` like any other, and the input embedding answers it with a vector of mine.
So a prompt may stand anywhere in a template, and masks, positions, labels, padding, caches and beams need to know nothing.

Two things of transformers look ids up in tables of V columns and so cannot meet virtual ones: penalties on repetition in
`generate`, which work on a merged model, and per-layer embeddings (Gemma 3n), whose models are not for prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from postgrad.errors import TuningError, suggest_nearest
from postgrad.models.pretrained import get_embedding_weight
from postgrad.tuning.extra_trainable import ExtraTrainable, base_parameter_name, named_parameters
from postgrad.tuning.prompt_encoder import ENCODERS
from postgrad.tuning.prompt_init import PromptInit, initial_vectors_PD
from postgrad.tuning.tuning import PeftFolder, Tuning, TuningExport, copy_state, unfreeze


class PromptDefaults(NamedTuple):
    """What a publication used."""

    length: int
    start: str
    encoder: str


DEFAULTS = {
    # Section 3.2: beyond 20 vectors the gain is marginal.
    "prompt": PromptDefaults(20, "random", "none"),
    # The LAMA code: templates of 3 + 3 + 3, nn.Embedding's own start, an LSTM.
    "p-tuning": PromptDefaults(9, "normal", "lstm"),
    # 100 vectors from U(-0.5, 0.5), shared by all data sets.
    "instruction-prompt": PromptDefaults(100, "random", "none"),
}


class SoftPrompt(nn.Module):
    """The trained part, registered in the model, and the two hooks by which an embedding answers virtual ids with it."""

    def __init__(self, vectors_PD: Tensor, encoder: nn.Module, first_id: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors_PD)
        self.encoder = encoder
        self.first_id = first_id
        self.enabled = True
        self.virtual_indices: Tensor | None = None

    @property
    def stop_id(self) -> int:
        """The id after my last."""
        return self.first_id + len(self.vectors)

    def forward(self) -> Tensor:
        """What the virtual tokens stand for, of shape (P, D)."""
        out = self.encoder(self.vectors)
        assert isinstance(out, Tensor)
        return out

    def mask_virtual_ids(self, _embedding: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Remember which ids are mine, and give the embedding one that it has in their place."""
        ids = args[0]
        mine = (ids >= self.first_id) & (ids < self.stop_id)
        if not self.enabled:
            if mine.any():
                raise TuningError(
                    f"a virtual id (from {self.first_id} on) was read while its prompt is switched off",
                    where="tuning",
                    expected="ids of the vocabulary: without its prompt, the base has no meaning for others",
                    hint="leave the template's virtual ids out of what the base reads",
                )
            return None
        self.virtual_indices = torch.where(mine, ids - self.first_id, -1)
        return (ids.masked_fill(mine, 0), *args[1:])

    def insert_vectors(self, _embedding: nn.Module, _args: object, embedded: Tensor) -> Tensor:
        """Put my vectors at my ids' places, in the dtype of the embedding's answer."""
        asked, self.virtual_indices = self.virtual_indices, None
        if asked is None:
            return embedded
        vectors = self().to(embedded.dtype)
        return torch.where((asked >= 0)[..., None], nn.functional.embedding(asked.clamp(min=0), vectors), embedded)


class PromptTuning(Tuning):
    """`length` trained vectors behind ids from `first` on; the base stays as it is, unless `backbone` is "trained".

    `init`: "random" U(-scale, scale), "normal" N(0, scale^2), "vocabulary", "text" or "labels"; with an encoder these
    are what it reads. `encoder`: "none", "lstm" or "mlp", `hidden` its width. `backbone="trained"` moves the base too, as
    P-tuning's SuperGLUE code does; the tuning is then not additive. `also_train`: patterns of the base's parameters that move
    besides; `off` and `detach` give those of its body their old values. What is left out is as the kind's publication has it.

    Raises `TuningError` for a prompt that leaves the model's context no room for words, and for options that cannot be.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        kind: str = "prompt",
        length: int | None = None,
        init: str | None = None,
        init_text: str | None = None,
        init_labels: Sequence[str] | None = None,
        init_scale: float | None = None,
        encoder: str | None = None,
        hidden: int | None = None,
        backbone: str = "frozen",
        also_train: Sequence[str] = (),
        seed: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__(model)
        usual = DEFAULTS[_check_choice(kind, DEFAULTS, "kind")]
        chosen = _check_choice(usual.encoder if encoder is None else encoder, ENCODERS, "encoder")
        _check_choice(backbone, ("frozen", "trained"), "backbone")
        self.kind = kind
        self.backbone = backbone
        self.also = list(also_train)
        self.num_virtual_tokens = _check_length(model, usual.length if length is None else length)
        self.additive = backbone == "frozen"
        how = usual.start if init is None else init
        first_values = initial_vectors_PD(
            model, PromptInit(how, self.num_virtual_tokens, init_scale, init_text, init_labels, seed, tokenizer)
        )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would reseed GPUs too
            written_by = ENCODERS[chosen](first_values.shape[1], hidden)

        self._extra_trainable = ExtraTrainable(model, also_train if self.additive else ())
        self._base_names = (
            self._extra_trainable.names
            if self.additive
            else [base_parameter_name(name) for name in unfreeze(model, ["*"])]
        )
        taken = [m.stop_id for m in model.modules() if isinstance(m, SoftPrompt)]
        self.first_id = max([len(get_embedding_weight(model)), *taken])
        self.soft_prompt = SoftPrompt(first_values, written_by, self.first_id).to(first_values.device)
        self._module_name = _unused_module_name(model, "prompt")
        model.add_module(self._module_name, self.soft_prompt)
        self._hooks: list[RemovableHandle] = []
        for embedding in _input_embeddings(model):
            self._hooks.append(embedding.register_forward_pre_hook(self.soft_prompt.mask_virtual_ids))
            self._hooks.append(embedding.register_forward_hook(self.soft_prompt.insert_vectors))

    @property
    def virtual_token_ids(self) -> list[int]:
        """My virtual ids in order."""
        return list(range(self.first_id, self.first_id + self.num_virtual_tokens))

    def disable(self) -> AbstractContextManager[None]:
        """Inside, the embedding is the base's own; a virtual id raises `TuningError`, since the base knows none."""
        return self._disable_prompt() if self.additive else super().disable()

    @contextmanager
    def _disable_prompt(self) -> Iterator[None]:
        was, self.soft_prompt.enabled = self.soft_prompt.enabled, False
        try:
            with self._extra_trainable.use_initial_values():
                yield
        finally:
            self.soft_prompt.enabled = was

    def state(self) -> dict[str, Tensor]:
        """The vectors (what the encoder reads, where there is one), the encoder, and the base's weights that move."""
        return {name: p.detach() for name, p in self._trained_parameters().items()}

    def _trained_parameters(self) -> dict[str, nn.Parameter]:
        return {**dict(self.soft_prompt.named_parameters()), **self._base_parameters()}

    def _base_parameters(self) -> dict[str, nn.Parameter]:
        parameters = named_parameters(self.model) if self._base_names else {}
        return {name: parameters[name] for name in self._base_names}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave. Raises `TuningError` for another state, so also for vectors without their encoder."""
        copy_state(self._trained_parameters(), state, self.kind)

    def detach(self) -> None:
        """Take the vectors and hooks out; what moved besides has its old values, and is as trainable as it was."""
        self._extra_trainable.restore_values()
        self._remove_module()

    def _remove_module(self) -> None:
        for hook in self._hooks:
            hook.remove()
        delattr(self.model, self._module_name)
        self._extra_trainable.restore_requires_grad()

    def merge(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Append the vectors to the vocabulary: a plain model to which my virtual ids are ordinary ones.

        `tokenizer` gets `<|prompt-0|>`, `<|prompt-1|>`, ... as special tokens with those ids. Logits of the old vocabulary
        stay as they are. The new ids must never be said. An output layer of its own answers them with 0 (and, where it has
        a bias, -10000); a tied one answers with their likeness to the hidden state. In both cases
        `generation_config.suppress_tokens` keeps `generate` from saying them. Whoever scores with the merged model should
        leave these last columns out of the softmax, or accept that they take a little of the probability.

        Raises `TuningError` when rows of the table, or tokens of the tokenizer, are not where my ids are.
        """
        rows = len(get_embedding_weight(self.model))
        if self.first_id != rows:
            raise TuningError(
                f"the prompt's ids begin at {self.first_id}, and the next row of the vocabulary is {rows}",
                where="tuning",
                hint="merge the prompts in the order in which they were attached",
            )
        scale = _embedding_scale(self.model)
        if tokenizer is not None:
            _add_tokens(tokenizer, self.first_id, self.num_virtual_tokens)
        with torch.no_grad():
            vectors_PD = self.soft_prompt() / scale
        self._remove_module()
        _append_vocabulary(self.model, vectors_PD)

    def export(self) -> TuningExport:
        """The vectors as the model sees them, computed once, without the encoder that wrote them."""
        options = {
            "kind": self.kind,
            "length": self.num_virtual_tokens,
            "init": "random",
            "encoder": "none",
            "backbone": self.backbone,
            "also_train": self.also,
        }
        moving = {name: parameter.detach() for name, parameter in self._base_parameters().items()}
        with torch.no_grad():
            return TuningExport(options, {"vectors": self.soft_prompt().detach(), **moving})

    def peft(self) -> PeftFolder | None:
        """PEFT's PROMPT_TUNING, for plain prompt tuning of a language model of which nothing else moved.

        PEFT always puts the vectors before everything (left of padding and of a BOS too), so it is the same prompt only
        for a template that begins with all of it. A classifier would find its first token moved, and gets none.
        """
        task = _peft_task(self.model)
        if self.kind != "prompt" or self._base_names or task is None:
            return None
        config = {
            "peft_type": "PROMPT_TUNING",
            "task_type": task,
            "base_model_name_or_path": self.model.config.name_or_path or None,
            "inference_mode": True,
            "num_virtual_tokens": self.num_virtual_tokens,
            "token_dim": get_embedding_weight(self.model).shape[1],
            # PEFT's default of 2 for T5 makes a second half that nothing reads.
            "num_transformer_submodules": 1,
            "prompt_tuning_init": "RANDOM",
        }
        return PeftFolder(config, {"prompt_embeddings": self.export().state["vectors"]})


def from_peft(model: PreTrainedModel, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> PromptTuning:
    """A prompt of the same effect as a PEFT folder of prompt tuning or P-tuning, whose vectors PEFT puts first.

    `config` is its adapter_config.json, `state` its adapter_model.safetensors. PEFT saves P-tuning's final vectors only, so
    there is no encoder to go on with. Layers that it saved besides (a task layer) come along and move.

    Raises `TuningError` for another kind of folder, and for one that does not fit the model.
    """
    kinds = {"PROMPT_TUNING": "prompt", "P_TUNING": "p-tuning"}
    given = str(getattr(config.get("peft_type"), "value", config.get("peft_type")))
    kind = kinds[_check_choice(given, kinds, "peft_type")]
    vectors, length = state.get("prompt_embeddings"), config.get("num_virtual_tokens")
    if vectors is None or not isinstance(length, int) or len(vectors) < length:
        raise TuningError(
            f"this PEFT folder has {'no' if vectors is None else len(vectors)} vectors for {length} virtual tokens",
            where="tuning",
            expected="`prompt_embeddings` with one row a virtual token",
        )
    beside = {name.removeprefix("base_model."): t for name, t in state.items() if name != "prompt_embeddings"}
    prompt = PromptTuning(model, kind=kind, length=length, init="random", encoder="none", also_train=list(beside))
    try:
        # For an encoder-decoder PEFT also saves a second half that it never reads.
        prompt.load({"vectors": vectors[:length], **beside})
    except TuningError:
        prompt.detach()
        raise
    return prompt


def _check_choice(value: str, known: Mapping[str, object] | Sequence[str], option: str) -> str:
    """`value`, which is known. Raises `TuningError` for one that is not, with the nearest."""
    if value not in known:
        raise TuningError(
            f"'{value}' is no {option} of a prompt",
            where=f"tuning.{option}",
            expected=f"one of {', '.join(known)}",
            hint=suggest_nearest(value, known),
        )
    return value


def _check_length(model: PreTrainedModel, length: int) -> int:
    """`length`, for which the model has room. Raises `TuningError` otherwise; relative positions have no limit (T5)."""
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if length < 1 or (room is not None and length >= room):
        raise TuningError(
            f"a prompt of {length} vectors",
            where="tuning.length",
            expected="at least 1" if room is None else f"1 to {room - 1}: the model reads {room} positions in all",
        )
    return length


def _unused_module_name(model: nn.Module, name: str) -> str:
    """`name`, or the first of `name_2`, `name_3`, ... that the model has not."""
    number, free = 1, name
    while hasattr(model, free):
        number += 1
        free = f"{name}_{number}"
    return free


def _input_embeddings(model: PreTrainedModel) -> list[nn.Module]:
    """The input embedding, and all that share its table: T5's encoder and decoder each have a module of their own."""
    outer = model.get_input_embeddings()
    assert isinstance(outer, nn.Module)
    table, within = get_embedding_weight(model), set(outer.modules())
    others = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is table and m not in within]
    return [outer, *others]


def _embedding_scale(model: PreTrainedModel) -> float:
    """What the input embedding multiplies its rows by. Raises `TuningError` when it does more than that."""
    embedding, table = model.get_input_embeddings(), get_embedding_weight(model)
    scale = float(getattr(embedding, "embed_scale", 1.0))
    with torch.no_grad():
        seen = embedding(torch.tensor([[0]], device=table.device))[0, 0]
    if not isinstance(embedding, nn.Embedding) or not torch.allclose(seen.float(), table[0].float() * scale, rtol=1e-2):
        raise TuningError(
            f"the input embedding of {type(model).__name__} is more than a table of rows",
            where="tuning",
            hint="merge or detach what else changes the input embedding first",
        )
    return scale


def _append_vocabulary(model: PreTrainedModel, rows_PD: Tensor) -> None:
    """More rows for the vocabulary, which an output layer of its own does not say."""
    old = len(get_embedding_weight(model))
    with torch.random.fork_rng(devices=[]):  # the new rows are drawn, then overwritten
        model.resize_token_embeddings(old + len(rows_PD), mean_resizing=False)
    table, head = get_embedding_weight(model), model.get_output_embeddings()
    with torch.no_grad():
        table[old:] = rows_PD
        if head is not None and head.weight is not table:
            head.weight[old:] = 0.0
        if getattr(head, "bias", None) is not None:
            head.bias[old:] = -1e4
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.suppress_tokens = [*(generation.suppress_tokens or []), *range(old, old + len(rows_PD))]


def _add_tokens(tokenizer: PreTrainedTokenizerBase, first: int, count: int) -> None:
    """Special tokens `<|prompt-0|>`, ... with ids from `first` on; rows of the table that no token had get reserved ones.

    Raises `TuningError`, before anything changes, when a token already has one of the ids.
    """
    taken = tokenizer.get_vocab()
    next_id = 1 + max(taken.values())
    if next_id > first:
        raise TuningError(
            f"the tokenizer has tokens up to {next_id - 1}, and the model rows up to {first - 1}",
            where="tokenizer",
            expected="a row for every token",
        )
    reserved = _unused_tokens("reserved", first - next_id, taken)
    tokenizer.add_special_tokens({"additional_special_tokens": [*reserved, *_unused_tokens("prompt", count, taken)]})


def _unused_tokens(word: str, count: int, taken: Mapping[str, int]) -> list[str]:
    """`count` tokens `<|word-0|>`, ... of which none is taken."""
    start = next(i for i in range(len(taken) + 1) if f"<|{word}-{i}|>" not in taken)
    return [f"<|{word}-{i}|>" for i in range(start, start + count)]


def _peft_task(model: PreTrainedModel) -> str | None:
    """PEFT's name for what the model does; None where its prompts are not ours."""
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        return "SEQ_2_SEQ_LM" if name.endswith("ForConditionalGeneration") else None
    return "CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else None
