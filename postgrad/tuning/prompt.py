"""Soft prompts: trained vectors in the places of virtual tokens.

Legend: B rows, T time, P vectors of the prompt, V rows of the input embedding, D its width.

Prompt tuning (Lester et al. 2021, arXiv 2104.08691), P-tuning v1 (Liu et al. 2021, arXiv 2103.10385) and the soft part of
instruction prompt tuning (Singhal et al. 2022, arXiv 2212.13138) are one method with different defaults. A virtual token is
an id from V on, used in `input_ids` like any other; the input embedding returns a trained vector for it. So a prompt may
appear anywhere in a template, and masks, positions, labels, padding, caches and beam search need no special case.

Two things in transformers index tables of V columns by id and so cannot handle virtual ids: repetition penalties in
`generate`, which work on a merged model, and per-layer embeddings (Gemma 3n), whose models are not supported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from postgrad.errors import TuningError
from postgrad.models.layers import get_embedding_weight
from postgrad.models.model_sizes import get_model_sizes
from postgrad.models.sublayers import eval_mode, make_probe_inputs
from postgrad.models.tied_weights import output_is_tied, separate_output
from postgrad.tuning.extra_trainable import ExtraTrainable, base_parameter_name, named_parameters
from postgrad.tuning.module_tuning import ModuleTuning, SwitchableModule
from postgrad.tuning.peft_prompts import prompt_config, read_prompt
from postgrad.tuning.prompt_encoder import ENCODERS
from postgrad.tuning.prompt_init import PromptInit, initial_vectors_PD
from postgrad.tuning.tuning import PeftFolder, TuningExport, check_choice, load_or_detach, unfreeze
from postgrad.tuning.untie_embeddings import untie_output


class PromptDefaults(NamedTuple):
    """The settings of a publication."""

    length: int
    init: str
    encoder: str


DEFAULTS = {
    # Section 3.2: beyond 20 vectors the gain is marginal.
    "prompt": PromptDefaults(20, "random", "none"),
    # The LAMA code: templates of 3 + 3 + 3, nn.Embedding's own initialisation, an LSTM.
    "p-tuning": PromptDefaults(9, "normal", "lstm"),
    # 100 vectors from U(-0.5, 0.5), shared by all data sets.
    "instruction-prompt": PromptDefaults(100, "random", "none"),
}


class SoftPrompt(SwitchableModule):
    """The trained vectors, registered in the model, and the two hooks that insert them into an embedding's output."""

    def __init__(self, vectors_PD: Tensor, encoder: nn.Module, first_id: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors_PD)
        self.encoder = encoder
        self.first_id = first_id
        self.virtual_indices: Tensor | None = None

    @property
    def stop_id(self) -> int:
        """The first id after the prompt's."""
        return self.first_id + len(self.vectors)

    def forward(self) -> Tensor:
        """The embeddings of the virtual tokens, of shape (P, D)."""
        out = self.encoder(self.vectors)
        assert isinstance(out, Tensor)
        return out

    def mask_virtual_ids(self, _embedding: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Remember the virtual ids' positions, and pass id 0 to the embedding instead."""
        ids = args[0]
        is_virtual = (ids >= self.first_id) & (ids < self.stop_id)
        if not self.enabled:
            if is_virtual.any():
                raise TuningError(
                    f"the input has a virtual id (from {self.first_id} on) while its prompt is disabled",
                    where="tuning",
                    expected="ids of the vocabulary: the base has no embedding for others",
                    hint="remove the template's virtual ids from the base's input",
                )
            return None
        self.virtual_indices = torch.where(is_virtual, ids - self.first_id, -1)
        return (ids.masked_fill(is_virtual, 0), *args[1:])

    def insert_vectors(self, _embedding: nn.Module, _args: object, embedded: Tensor) -> Tensor:
        """Put the vectors into the virtual ids' places, in the dtype of the embedding's output."""
        indices, self.virtual_indices = self.virtual_indices, None
        if indices is None:
            return embedded
        vectors = self().to(embedded.dtype)
        return torch.where((indices >= 0)[..., None], nn.functional.embedding(indices.clamp(min=0), vectors), embedded)


class PromptTuning(ModuleTuning):
    """`length` trained vectors with ids from `first_id` on; the base is frozen, unless `backbone` is "trained".

    `init`: "random" U(-scale, scale), "normal" N(0, scale^2), "vocabulary", "text" or "labels"; with an encoder these are
    its inputs. `encoder`: "none", "lstm" or "mlp", `hidden` its width. `backbone="trained"` trains the base too, as
    P-tuning's SuperGLUE code does; the tuning is then not additive. `also_train`: patterns of base parameters to train;
    `disable` and `detach` restore those of the body. None selects the kind's published value.

    Raises `TuningError` for a prompt as long as the model's context, and for invalid options.
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
        check_choice(kind, DEFAULTS, "kind")
        defaults = DEFAULTS[kind]
        encoder = defaults.encoder if encoder is None else encoder
        check_choice(encoder, ENCODERS, "encoder")
        check_choice(backbone, ("frozen", "trained"), "backbone")
        self.kind = kind
        self.backbone = backbone
        self.also_train = list(also_train)
        self.num_virtual_tokens = defaults.length if length is None else length
        _check_length(model, self.num_virtual_tokens)
        self.additive = backbone == "frozen"
        method = defaults.init if init is None else init
        prompt_init = PromptInit(method, self.num_virtual_tokens, init_scale, init_text, init_labels, seed, tokenizer)
        initial_PD = initial_vectors_PD(model, prompt_init)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would reseed GPUs too
            encoder_module = ENCODERS[encoder](initial_PD.shape[1], hidden)

        self.extra_trainable = ExtraTrainable(model, also_train if self.additive else ())
        self._base_names = (
            self.extra_trainable.names if self.additive else [base_parameter_name(n) for n in unfreeze(model, ["*"])]
        )
        used = [m.stop_id for m in model.modules() if isinstance(m, SoftPrompt)]
        self.first_id = max([len(get_embedding_weight(model)), *used])
        self.soft_prompt = SoftPrompt(initial_PD, encoder_module, self.first_id).to(initial_PD.device)
        self._add_module(model, "prompt", self.soft_prompt)
        for embedding in _input_embeddings(model):
            self._hooks.append(embedding.register_forward_pre_hook(self.soft_prompt.mask_virtual_ids))
            self._hooks.append(embedding.register_forward_hook(self.soft_prompt.insert_vectors))

    @property
    def virtual_token_ids(self) -> list[int]:
        """The prompt's virtual ids in order."""
        return list(range(self.first_id, self.first_id + self.num_virtual_tokens))

    def tensors(self) -> dict[str, nn.Parameter]:
        """The vectors (the encoder's inputs, where there is one), the encoder, and the trained weights of the base."""
        return {**dict(self.soft_prompt.named_parameters()), **self._base_parameters()}

    def _base_parameters(self) -> dict[str, nn.Parameter]:
        parameters = named_parameters(self.model) if self._base_names else {}
        return {name: parameters[name] for name in self._base_names}

    def merge(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Append the vectors to the vocabulary: a plain model in which the virtual ids are ordinary ones.

        `tokenizer` gets `<|prompt-0|>`, `<|prompt-1|>`, ... as special tokens with those ids. Logits of the old vocabulary
        do not change. The new ids must never be generated: `generation_config.suppress_tokens` prevents it. The output layer
        gets rows of its own (a tied one is untied): each new token has the logit of the old token that is least likely, or
        -10000 where there is a bias. So whoever scores with the merged model should drop these last columns from the
        softmax, or accept that they take a little of the probability.

        Raises `TuningError` when the table's rows, or the tokenizer's tokens, do not end where the prompt's ids start.
        """
        rows = len(get_embedding_weight(self.model))
        if self.first_id != rows:
            raise TuningError(
                f"the prompt's ids start at {self.first_id}, but the vocabulary has {rows} rows",
                where="tuning",
                hint="merge prompts in the order in which they were attached",
            )
        scale = _embedding_scale(self.model)
        if tokenizer is not None:
            _add_tokens(tokenizer, self.first_id, self.num_virtual_tokens)
        with torch.no_grad():
            vectors_PD = self.soft_prompt() / scale
        self._remove_modules()
        _append_vocabulary(self.model, vectors_PD)

    def export(self) -> TuningExport:
        """The final vectors, without the encoder that computes them."""
        options = {
            "kind": self.kind,
            "length": self.num_virtual_tokens,
            "init": "random",
            "encoder": "none",
            "backbone": self.backbone,
            "also_train": self.also_train,
        }
        trained = {name: parameter.detach() for name, parameter in self._base_parameters().items()}
        with torch.no_grad():
            return TuningExport(options, {"vectors": self.soft_prompt().detach(), **trained})

    def peft(self) -> PeftFolder | None:
        """PEFT's PROMPT_TUNING, for plain prompt tuning of a language model with a frozen base.

        PEFT always puts the vectors first (before padding and BOS too), so it is the same prompt only for a template that
        begins with all of it. A classifier's first token would move: None.
        """
        task = _peft_task(self.model)
        if self.kind != "prompt" or self._base_names or task is None:
            return None
        width = get_embedding_weight(self.model).shape[1]
        config = prompt_config(self.model, "PROMPT_TUNING", task, self.num_virtual_tokens, width)
        return PeftFolder(
            config | {"prompt_tuning_init": "RANDOM"}, {"prompt_embeddings": self.export().state["vectors"]}
        )


def from_peft(model: PreTrainedModel, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> PromptTuning:
    """A prompt with the same effect as a PEFT folder of prompt tuning or P-tuning, whose vectors PEFT puts first.

    `config` is its adapter_config.json, `state` its adapter_model.safetensors. PEFT saves P-tuning's final vectors only, so
    there is no encoder to continue with. Layers saved with them (a task layer) are loaded and trained.

    Raises `TuningError` for another method's folder, and for one that does not fit the model.
    """
    kinds = {"PROMPT_TUNING": "prompt", "P_TUNING": "p-tuning"}
    peft_type, vectors, extra = read_prompt(config, state, list(kinds))
    prompt = PromptTuning(
        model, kind=kinds[peft_type], length=len(vectors), init="random", encoder="none", also_train=list(extra)
    )
    load_or_detach(prompt, {"vectors": vectors, **extra})
    return prompt


def _check_length(model: PreTrainedModel, length: int) -> None:
    """Raise `TuningError` if the model has no room for the prompt; relative positions have no limit (T5)."""
    context = get_model_sizes(model.config).positions
    if length < 1 or (context is not None and length >= context):
        raise TuningError(
            f"a prompt of {length} vectors",
            where="tuning.length",
            expected="at least 1" if context is None else f"1 to {context - 1}: the model has {context} positions",
        )


def _input_embeddings(model: PreTrainedModel) -> list[nn.Module]:
    """The input embedding, and all that share its table: T5's encoder and decoder each have a module of their own."""
    outer = model.get_input_embeddings()
    assert isinstance(outer, nn.Module)
    table, inner = get_embedding_weight(model), set(outer.modules())
    others = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is table and m not in inner]
    return [outer, *others]


def _embedding_scale(model: PreTrainedModel) -> float:
    """The input embedding's scale of its rows. Raises `TuningError` if it does more than that."""
    embedding, table = model.get_input_embeddings(), get_embedding_weight(model)
    scale = float(getattr(embedding, "embed_scale", 1.0))
    with torch.no_grad():
        output = embedding(torch.tensor([[0]], device=table.device))[0, 0]
    expected = table[0].float() * scale
    if not isinstance(embedding, nn.Embedding) or not torch.allclose(output.float(), expected, rtol=1e-2):
        raise TuningError(
            f"the input embedding of {type(model).__name__} is more than a table of rows",
            where="tuning",
            hint="merge or detach what else changes the input embedding first",
        )
    return scale


def _append_vocabulary(model: PreTrainedModel, rows_PD: Tensor) -> None:
    """Append rows to the input embedding, with output logits that keep them from being generated."""
    old, unlikely = len(get_embedding_weight(model)), 0
    has_bias = any(bias is not None for bias in _logits_biases(model))
    if not has_bias:
        unlikely = _least_likely_token(model)
        if output_is_tied(model):
            untie_output(model)
    with torch.random.fork_rng(devices=[]), separate_output(model):  # the new rows are drawn, then overwritten
        model.resize_token_embeddings(old + len(rows_PD), mean_resizing=False)
    table, head = get_embedding_weight(model), model.get_output_embeddings()
    with torch.no_grad():
        table[old:] = rows_PD
        if head is not None and head.weight is not table:
            head.weight[old:] = head.weight[unlikely]
        for bias in _logits_biases(model):
            if bias is not None:
                bias[..., old:] = -1e4
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.suppress_tokens = [*(generation.suppress_tokens or []), *range(old, old + len(rows_PD))]


def _logits_biases(model: PreTrainedModel) -> tuple[Tensor | None, Tensor | None]:
    """The bias of the output layer, and that of BART's logits."""
    return getattr(model.get_output_embeddings(), "bias", None), getattr(model, "final_logits_bias", None)


@torch.no_grad()
def _least_likely_token(model: PreTrainedModel) -> int:
    """The token whose largest probability is the smallest, on a probe."""
    if model.get_output_embeddings() is None:
        return 0
    with eval_mode(model):
        logits_BTV = model(**make_probe_inputs(model)).logits
    return int(logits_BTV.float().log_softmax(-1).flatten(0, 1).amax(0).argmin())


def _add_tokens(tokenizer: PreTrainedTokenizerBase, first: int, count: int) -> None:
    """Add special tokens `<|prompt-0|>`, ... with ids from `first` on; rows of the table without a token get reserved ones.

    Raises `TuningError`, before anything changes, when a token already has one of the ids.
    """
    vocabulary = tokenizer.get_vocab()
    next_id = 1 + max(vocabulary.values())
    if next_id > first:
        raise TuningError(
            f"the tokenizer has tokens up to {next_id - 1}, but the model rows up to {first - 1}",
            where="model",
            expected="a row for every token",
        )
    reserved = _unused_tokens("reserved", first - next_id, vocabulary)
    prompt = _unused_tokens("prompt", count, vocabulary)
    tokenizer.add_special_tokens({"additional_special_tokens": [*reserved, *prompt]})


def _unused_tokens(stem: str, count: int, vocabulary: Mapping[str, int]) -> list[str]:
    """`count` tokens `<|stem-0|>`, ... that are not in the vocabulary."""
    start = next(i for i in range(len(vocabulary) + 1) if f"<|{stem}-{i}|>" not in vocabulary)
    return [f"<|{stem}-{i}|>" for i in range(start, start + count)]


def _peft_task(model: PreTrainedModel) -> str | None:
    """PEFT's task type; None where its prompts differ from ours."""
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        return "SEQ_2_SEQ_LM" if name.endswith("ForConditionalGeneration") else None
    return "CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else None
