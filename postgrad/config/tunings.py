"""Which ways of tuning can a stage name? A closed union; `postgrad/tuning/` has a module for each."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from postgrad.config.quantities import ConfigModel, Length, Positive, Share

Dropout = Annotated[float, Field(ge=0, lt=1)]
Slots = Literal["all"] | list[Literal["encoder", "decoder", "cross"]]


class FullTuning(ConfigModel):
    """Every weight moves."""

    kind: Literal["full"]
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The learning rate of each block is that of the block above it times this; 1: all alike."""


class PartialTuning(ConfigModel):
    """What every kind below has: weights of the model that move besides (a new task layer always does)."""

    also_train: list[str] = []
    """Names of weights or modules of the model that move besides (`*` and `?` stand for any letters)."""


class HeadTuning(PartialTuning):
    """Lightweight tuning: the backbone is held fast, only the task layer moves."""

    kind: Literal["head"]
    untie: bool = False
    """Give a language model whose head is its input embedding a head of its own."""


class BlocksTuning(PartialTuning):
    """Only some blocks move, all at once or one after the other from the top (gradual unfreezing)."""

    kind: Literal["blocks"]
    last: Positive | None = None
    """Only the last so many blocks ..."""
    all_but_first: Annotated[int, Field(ge=0)] | None = None
    """... or all but the first so many ..."""
    targets: list[str] = []
    """... or the modules of these names (`*` and `?` stand for any letters)."""
    head: bool = True
    """The task layer, and the norm before it, move too."""
    embeddings: bool = False
    """What stands before the blocks moves too."""
    unfreeze_every: Length | None = None
    """Begin with the task layer (a language model: with its topmost block), and add the block below after each such length."""

    @model_validator(mode="after")
    def _check_one_choice(self) -> BlocksTuning:
        if sum([self.last is not None, self.all_but_first is not None, bool(self.targets)]) != 1:
            raise ValueError("`blocks` has exactly one of `last`, `all_but_first` and `targets`")
        return self


class BiasTuning(PartialTuning):
    """Only the biases move (BitFit)."""

    kind: Literal["bias"]
    targets: list[str] = ["*"]
    """Only those of these names (`*` and `?` stand for any letters), such as `*query*`."""


class NormTuning(PartialTuning):
    """Only the norms move."""

    kind: Literal["norm"]


class AdapterTuning(PartialTuning):
    """Bottleneck adapters in every block."""

    kind: Literal["adapter"]
    variant: Literal["houlsby", "pfeiffer", "parallel"] = "pfeiffer"
    """houlsby: behind attention and feed-forward; pfeiffer: behind the feed-forward; parallel: beside it."""
    reduction: Annotated[float, Field(gt=0)] = 16
    """The bottleneck is the model's width divided by this ..."""
    size: Positive | None = None
    """... or so wide."""
    activation: str | None = None
    """The nonlinearity in the bottleneck, as transformers calls it; left out: as published, swish for houlsby, else relu."""
    scale: Annotated[float, Field(gt=0)] | None = None
    """What an adapter's output is multiplied by; left out: 4 for parallel, else 1."""
    dropout: Dropout = 0.0
    """On the bottleneck, while it is trained."""
    train_norms: bool | None = None
    """The norms move too; left out: for houlsby they do."""
    skip_layers: list[int] = []
    """Numbers of blocks (from 0) without an adapter."""


class PrefixTuning(PartialTuning):
    """Vectors before the keys and values of every layer, re-parameterised by an MLP while they are trained."""

    kind: Literal["prefix"]
    length: Positive = 10
    """How many keys, and values, for each layer."""
    hidden: Positive = 512
    """Width of the MLP."""
    deep: bool = False
    """Two hidden layers instead of one."""
    dropout: Dropout = 0.0
    """On the keys and values, while they are trained."""
    slots: Slots = "all"
    """Of an encoder-decoder: only the attention of the encoder, of the decoder, or across."""
    init_text: str | None = None
    """A text whose keys and values the prefix begins with."""


class PTuningV2(PartialTuning):
    """Vectors before the keys and values of every layer, trained as they are (P-tuning v2)."""

    kind: Literal["p-tuning-v2"]
    length: Positive = 20
    """How many keys, and values, for each layer."""
    dropout: Dropout = 0.1
    """On the keys and values, while they are trained."""
    slots: Slots = "all"
    """Of an encoder-decoder: only the attention of the encoder, of the decoder, or across."""
    init_text: str | None = None
    """A text whose keys and values the prefix begins with."""


class PromptTuningConfig(PartialTuning):
    """Vectors in front of the input (prompt tuning)."""

    kind: Literal["prompt"]
    length: Positive = 20
    """How many vectors."""
    init: Literal["random", "vocabulary", "text", "labels"] = "vocabulary"
    """What they begin as: random numbers, or the embeddings of frequent tokens, of a text, or of class labels."""
    init_text: str | None = None
    """The text whose embeddings they begin as, for `init: text`."""
    init_labels: list[str] | None = None
    """The class labels whose embeddings they begin as, for `init: labels`."""
    init_scale: Annotated[float, Field(gt=0)] | None = None
    """With `init: random` vectors are drawn between minus this and this; left out: 0.5."""


class PTuning(PartialTuning):
    """Vectors anywhere in the input, written by a small encoder while they are trained (P-tuning)."""

    kind: Literal["p-tuning"]
    template: str = "{20} {x}"
    """`{3}` stands for three vectors, `{x}` for the text, `[MASK]` for a special token, other words for themselves."""
    encoder: Literal["lstm", "mlp"] = "lstm"
    """The network that writes them."""
    hidden: Positive | None = None
    """Width of the encoder; left out: as in the publication."""
    backbone: Literal["frozen", "trained"] = "frozen"
    """`trained`: every weight of the model moves too."""


class DemonstrationsConfig(ConfigModel):
    """Examples that are set before a question, taken from the training rows."""

    count: Positive = 2
    """How many."""
    sampler: Literal["bm25", "embedding", "random"] = "bm25"
    """The most alike by words, the most alike by the model's mean input embeddings, or drawn by the stage's seed."""
    max_tokens: Positive = 512
    """At most so many tokens of demonstrations; the least alike are left out first."""


class InstructionPromptTuning(PartialTuning):
    """Instruction prompt tuning: retrieved demonstrations as a hard prompt, and vectors before it."""

    kind: Literal["instruction-prompt"]
    length: Positive = 100
    """How many vectors."""
    init: Literal["random", "vocabulary", "text"] = "random"
    """What they begin as: random numbers, or the embeddings of frequent tokens or of a text."""
    init_text: str | None = None
    """The text whose embeddings they begin as, for `init: text`."""
    init_scale: Annotated[float, Field(gt=0)] | None = None
    """With `init: random` vectors are drawn between minus this and this; left out: 0.5."""
    demonstrations: DemonstrationsConfig = DemonstrationsConfig()
    """Examples that are set before each question."""


class LoraTuning(PartialTuning):
    """Low-rank updates of the weight matrices: LoRA and its kin, through peft."""

    kind: Literal["lora"]
    variant: Literal["lora", "rslora", "dora", "pissa"] = "lora"
    """rslora: scaled otherwise, see `alpha`; dora: with a trained size for each row; pissa: begun at the largest singular
    directions."""
    rank: Positive = 16
    """Rows of A and columns of B, for an update B A of each matrix."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """The update is scaled by alpha / rank (rsLoRA: by alpha / sqrt(rank)); left out: twice the rank (pissa: the rank)."""
    dropout: Dropout = 0.0
    """On what A reads, while it is trained."""
    targets: Literal["all-linear", "attention", "feed-forward"] | list[str] = "all-linear"
    """Which matrices of the blocks; or names (`*` and `?` stand for any letters)."""
    exclude: list[str] = []
    """Matrices that `targets` would take and that stay plain; named likewise."""
    quantization: Literal["nf4", "int8"] | None = None
    """Hold the base in four or eight bits (QLoRA); needs the package bitsandbytes."""
    orthogonal: Annotated[float, Field(gt=0)] | None = None
    """O-LoRA: how strongly the new directions are kept orthogonal to those of the lineage's earlier LoRA stages."""


class OsfTuning(PartialTuning):
    """Orthogonal subspace fine-tuning: only the directions of small singular values move, through peft."""

    kind: Literal["osf"]
    effective_rank: Annotated[Share, Field(gt=0, lt=1)] = 0.5
    """Share of each matrix's singular directions that is held fast."""
    targets: Literal["all-linear", "attention", "feed-forward"] | list[str] = "all-linear"
    """Which matrices of the blocks; or names (`*` and `?` stand for any letters)."""


class ExpandTuning(PartialTuning):
    """Block expansion: new blocks that begin as nothing stand between the old ones, and only they move (LLaMA-Pro)."""

    kind: Literal["expand"]
    blocks: Positive = 1
    """New blocks in each place."""
    every: Positive | None = None
    """A place behind every so many blocks ..."""
    positions: list[int] | None = None
    """... or behind the blocks of these numbers (from 0); both left out: behind every fourth, if that divides their number."""


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


def get_tuning_options(spec: AnyTuning) -> dict[str, Any]:
    """The keyword arguments of a kind, as plain data; what was left out keeps the kind's own default."""
    return spec.model_dump(mode="json", exclude_none=True)
