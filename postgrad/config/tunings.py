"""Tunings of a stage: a closed union. Each names the class that implements it, which takes the keys as keyword arguments."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from postgrad.config.quantities import (
    ConfigModel,
    Count,
    Length,
    Method,
    Positive,
    Share,
    Width,
    get_kinds,
    length_in_steps,
)
from postgrad.data.render.prompt_template import Template
from postgrad.errors import StageError

Dropout = Annotated[float, Field(ge=0, lt=1)]
Slots = Literal["all"] | list[Literal["encoder", "decoder", "cross"]]


class TuningConfig(Method):
    """What all tunings have."""

    def options(self, steps: int, tokens: int) -> dict[str, Any]:
        """The keyword arguments of the implementation for a stage of so many steps and tokens; None keeps its default."""
        return self.model_dump(mode="json", exclude_none=True)


class FullTuning(TuningConfig):
    """All weights are trained."""

    implementation: ClassVar[str] = "postgrad.tuning.weight_subsets:FullFinetuning"
    kind: Literal["full"]
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor of the learning rate from each block to the one below; 1: the same rate for all."""


class PartialTuning(TuningConfig):
    """What all tunings but `full` have."""

    also_train: list[str] = []
    """Names of further weights or modules of the model to train, with the wildcards `*` and `?`; a new task layer always is."""


class HeadTuning(PartialTuning):
    """Only the task layer (or the language-model head) is trained; the backbone is frozen."""

    implementation: ClassVar[str] = "postgrad.tuning.weight_subsets:HeadFinetuning"
    kind: Literal["head"]
    untie: bool = False
    """Give a language model with tied embeddings a head of its own."""


class BlocksTuning(PartialTuning):
    """Some blocks are trained, all at once or from the top down (gradual unfreezing)."""

    implementation: ClassVar[str] = "postgrad.tuning.weight_subsets:BlockFinetuning"
    kind: Literal["blocks"]
    last: Positive | None = None
    """Number of last blocks to train ..."""
    all_but_first: Count | None = None
    """... or number of first blocks to freeze ..."""
    targets: list[str] = []
    """... or names of modules to train, with the wildcards `*` and `?`."""
    head: bool = True
    """Train the task layer, and the norm before it, too."""
    embeddings: bool = False
    """Train the embeddings, and everything else before the blocks, too."""
    unfreeze_every: Length | None = None
    """Start with the task layer (a language model: its topmost block) and unfreeze one more block after each such length.
    Default: all at once."""

    @model_validator(mode="after")
    def _check_one_choice(self) -> BlocksTuning:
        if sum([self.last is not None, self.all_but_first is not None, bool(self.targets)]) != 1:
            raise ValueError("`blocks` has exactly one of `last`, `all_but_first` and `targets`")
        return self

    def options(self, steps: int, tokens: int) -> dict[str, Any]:
        options = super().options(steps, tokens)
        if self.unfreeze_every is not None:
            options["unfreeze_every"] = max(1, round(length_in_steps(self.unfreeze_every, steps, tokens)))
        return options


class BiasTuning(PartialTuning):
    """Only the biases are trained (BitFit)."""

    implementation: ClassVar[str] = "postgrad.tuning.weight_subsets:BitFit"
    kind: Literal["bias"]
    targets: list[str] = ["*"]
    """Names of the biases, with the wildcards `*` and `?`, such as `*query*`."""


class NormTuning(PartialTuning):
    """Only the norms are trained."""

    implementation: ClassVar[str] = "postgrad.tuning.weight_subsets:NormFinetuning"
    kind: Literal["norm"]


class AdapterTuning(PartialTuning):
    """Bottleneck adapters in every block."""

    implementation: ClassVar[str] = "postgrad.tuning.adapter:Adapter"
    kind: Literal["adapter"]
    variant: Literal["houlsby", "pfeiffer", "parallel"] = "pfeiffer"
    """houlsby: after attention and feed-forward; pfeiffer: after the feed-forward; parallel: parallel to the feed-forward."""
    reduction: Annotated[float, Field(gt=0)] = 16
    """Width of the model over that of the bottleneck ..."""
    size: Width | None = None
    """... or the width of the bottleneck itself."""
    activation: str | None = None
    """Activation of the bottleneck, by its name in transformers. Default: as published, swish for houlsby, else relu."""
    scale: Annotated[float, Field(gt=0)] | None = None
    """Factor of the adapter's output. Default: 4 for parallel, else 1."""
    dropout: Dropout = 0.0
    """Dropout on the bottleneck during training."""
    train_norms: bool | None = None
    """Train the norms too. Default: for houlsby only."""
    skip_layers: list[int] = []
    """Numbers of blocks (from 0) without an adapter."""


class PrefixTuning(PartialTuning):
    """Prefix tuning: trained keys and values in every layer, parameterised by an MLP during training."""

    implementation: ClassVar[str] = "postgrad.tuning.prefix:Prefix"
    kind: Literal["prefix"]
    length: Width = 10
    """Number of keys, and of values, in each layer."""
    hidden: Width = 512
    """Width of the MLP."""
    deep: bool = False
    """Two hidden layers in the MLP instead of one."""
    dropout: Dropout = 0.0
    """Dropout on the keys and values during training."""
    slots: Slots = "all"
    """Which attention of an encoder-decoder: all, or some of the encoder's, the decoder's and cross-attention."""
    init_text: str | None = None
    """A text whose keys and values in the start model initialise the prefix. Default: random."""


class PTuningV2(PartialTuning):
    """P-tuning v2: trained keys and values in every layer, without an MLP."""

    implementation: ClassVar[str] = "postgrad.tuning.prefix:Prefix"
    kind: Literal["p-tuning-v2"]
    length: Width = 20
    """Number of keys, and of values, in each layer."""
    dropout: Dropout = 0.1
    """Dropout on the keys and values during training."""
    slots: Slots = "all"
    """Which attention of an encoder-decoder: all, or some of the encoder's, the decoder's and cross-attention."""
    init_text: str | None = None
    """A text whose keys and values in the start model initialise the prefix. Default: random."""


class PromptTuningConfig(PartialTuning):
    """Prompt tuning: trained vectors before the input."""

    implementation: ClassVar[str] = "postgrad.tuning.prompt:PromptTuning"
    kind: Literal["prompt"]
    length: Width = 20
    """Number of vectors."""
    init: Literal["random", "vocabulary", "text", "labels"] = "vocabulary"
    """Initial values: random, or the embeddings of frequent tokens, of a text, or of class labels."""
    init_text: str | None = None
    """The text whose embeddings are the initial values, for `init: text`."""
    init_labels: list[str] | None = None
    """The class labels whose embeddings are the initial values, for `init: labels`."""
    init_scale: Annotated[float, Field(gt=0)] | None = None
    """Range of the uniform distribution for `init: random`, from minus this to this. Default: 0.5."""


class PTuning(PartialTuning):
    """P-tuning: trained vectors anywhere in the input, computed by a small encoder during training."""

    implementation: ClassVar[str] = "postgrad.tuning.prompt:PromptTuning"
    kind: Literal["p-tuning"]
    template: str = "{20} {x}"
    """The input: `{3}` are three vectors, `{x}` is the text, `[MASK]` a special token; other words are literal."""
    encoder: Literal["lstm", "mlp"] = "lstm"
    """The network that computes the vectors."""
    hidden: Width | None = None
    """Width of the encoder. Default: as published."""
    backbone: Literal["frozen", "trained"] = "frozen"
    """`trained`: train all weights of the model too."""

    @field_validator("template")
    @classmethod
    def _check_template(cls, value: str) -> str:
        try:
            Template.parse(value)
        except StageError as error:
            raise ValueError(
                ", ".join([error.problem, *([f"expected: {error.expected}"] * bool(error.expected))])
            ) from None
        return value

    def options(self, steps: int, tokens: int) -> dict[str, Any]:
        options = super().options(steps, tokens)
        options.pop("template")  # the template is applied to the rows
        return {**options, "length": Template.parse(self.template).virtual_token_count}


class DemonstrationsConfig(ConfigModel):
    """Training rows placed before each question."""

    count: Positive = 2
    """Number of demonstrations."""
    sampler: Literal["bm25", "embedding", "random"] = "bm25"
    """Nearest by words (bm25), nearest by the model's mean input embeddings, or random by the stage's seed."""
    max_tokens: Positive = 512
    """Limit of the tokens of all demonstrations; the least similar are dropped first."""


class InstructionPromptTuning(PartialTuning):
    """Instruction prompt tuning: trained vectors before retrieved demonstrations."""

    implementation: ClassVar[str] = "postgrad.tuning.prompt:PromptTuning"
    kind: Literal["instruction-prompt"]
    length: Width = 100
    """Number of vectors."""
    init: Literal["random", "vocabulary", "text"] = "random"
    """Initial values: random, or the embeddings of frequent tokens or of a text."""
    init_text: str | None = None
    """The text whose embeddings are the initial values, for `init: text`."""
    init_scale: Annotated[float, Field(gt=0)] | None = None
    """Range of the uniform distribution for `init: random`, from minus this to this. Default: 0.5."""
    demonstrations: DemonstrationsConfig = DemonstrationsConfig()
    """Demonstrations before each question."""

    def options(self, steps: int, tokens: int) -> dict[str, Any]:
        options = super().options(steps, tokens)
        options.pop("demonstrations")  # which are part of the rows
        return options


class LoraTuning(PartialTuning):
    """LoRA and its variants, through peft: low-rank updates of the weight matrices."""

    implementation: ClassVar[str] = "postgrad.tuning.lora:LoraAdapter"
    kind: Literal["lora"]
    variant: Literal["lora", "rslora", "dora", "pissa"] = "lora"
    """rslora: another scale, see `alpha`; dora: with a trained magnitude of each row; pissa: initialised from the largest
    singular directions."""
    rank: Width = 16
    """Rows of A and columns of B in the update B A of each matrix."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Scale of the update: alpha / rank (rsLoRA: alpha / sqrt(rank)). Default: twice the rank (pissa: the rank)."""
    dropout: Dropout = 0.0
    """Dropout on the input of A during training."""
    targets: Literal["all-linear", "attention", "feed-forward", "experts"] | list[str] = "all-linear"
    """Which matrices of the blocks, or names with the wildcards `*` and `?`. `experts`: the weights of fused experts, which are
    no layers and part of no other group; each expert gets an update of its own."""
    exclude: list[str] = []
    """Names of matrices to leave out of `targets`, with the same wildcards."""
    quantization: Literal["nf4", "int8"] | None = None
    """Store the base in 4 or 8 bits (QLoRA); needs the package bitsandbytes."""
    orthogonal: Annotated[float, Field(gt=0)] | None = None
    """O-LoRA: strength of the penalty that keeps the new directions orthogonal to those of the lineage's earlier LoRA
    stages. Default: no such penalty."""

    def options(self, steps: int, tokens: int) -> dict[str, Any]:
        options = super().options(steps, tokens)
        options.pop("orthogonal", None)  # a penalty
        return options


class OsfTuning(PartialTuning):
    """OSF, through peft: only the directions of small singular values are trained."""

    implementation: ClassVar[str] = "postgrad.tuning.osf:OrthogonalSubspace"
    kind: Literal["osf"]
    effective_rank: Annotated[Share, Field(gt=0, lt=1)] = 0.5
    """Frozen share of the singular directions of each matrix."""
    targets: Literal["all-linear", "attention", "feed-forward"] | list[str] = "all-linear"
    """Which matrices of the blocks, or names with the wildcards `*` and `?`."""


class ExpandTuning(PartialTuning):
    """Block expansion (LLaMA-Pro): inserts identity-initialised blocks between the existing ones and trains only these."""

    implementation: ClassVar[str] = "postgrad.tuning.block_expansion:BlockExpansion"
    kind: Literal["expand"]
    blocks: Annotated[Positive, Field(le=100)] = 1
    """New blocks at each position."""
    every: Positive | None = None
    """Insert after every this many blocks ..."""
    positions: list[int] | None = None
    """... or after the blocks of these numbers (from 0). Default of both: after every fourth, if that divides their number."""


AnyTuning = Annotated[
    FullTuning
    | HeadTuning
    | BlocksTuning
    | BiasTuning
    | NormTuning
    | AdapterTuning
    | PrefixTuning
    | PTuningV2
    | PromptTuningConfig
    | PTuning
    | InstructionPromptTuning
    | LoraTuning
    | OsfTuning
    | ExpandTuning,
    Field(discriminator="kind"),
]


def find_tuning(kind: object) -> type[TuningConfig] | None:
    """The tuning of this kind; None for an unknown one."""
    return next((tuning for tuning in _defined_tunings(TuningConfig) if kind in get_kinds(tuning)), None)


def known_tunings() -> list[str]:
    """The kinds of all tunings."""
    return [kind for tuning in _defined_tunings(TuningConfig) for kind in get_kinds(tuning)]


def _defined_tunings(base: type[TuningConfig]) -> list[type[TuningConfig]]:
    return [
        tuning
        for part in base.__subclasses__()
        for tuning in (part, *_defined_tunings(part))
        if "kind" in tuning.model_fields
    ]
