"""Which objectives can a stage name? A closed union; `build.py` makes the losses, `layouts.py` the rows they are taken on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from postgrad.config.quantities import ConfigModel, Length, Positive, Share, reject_bool

Weight = Annotated[float, Field(gt=0), BeforeValidator(reject_bool)]


class ObjectiveConfig(ConfigModel):
    """What a token, or a label, of some sources is worth."""

    weight: Weight = 1.0
    """Factor of the loss."""
    on: list[str] = []
    """Names of the sources it is taken on; left out: all that no other objective (but distillation) names."""


class NextTokenObjective(ObjectiveConfig):
    """Next-token prediction, on running text or on the answers of examples."""

    kind: Literal["next-token"]
    train_on: Literal["answers", "all"] = "answers"
    """Of rows that have answers (chats, instructions, completions): only those, or every token. Text is trained whole."""
    answers: Literal["all", "last"] = "all"
    """Of a conversation: every answer, or the last one alone, which asks less of a chat template."""
    too_long: Literal["cut-context", "cut-end", "drop"] = "cut-context"
    """What becomes of an example longer than a row; what is cut or dropped is counted."""


class PrefixLMObjective(ObjectiveConfig):
    """Prefix language modelling (Raffel et al. 2020): a decoder reads a prefix in both directions, and is asked for the rest.

    Of examples the prompt is the prefix and the last answer is asked for; running text is cut at a place that is drawn.
    """

    kind: Literal["prefix-lm"]
    too_long: Literal["cut-context", "cut-end", "drop"] = "cut-context"
    """What becomes of an example longer than a row; what is cut or dropped is counted."""


class MaskedObjective(ObjectiveConfig):
    """Masked language modelling for encoders (Devlin et al. 2019): of the chosen tokens 80 % are masked, 10 % replaced."""

    kind: Literal["masked"]
    share: Annotated[Share, Field(gt=0, lt=1)] = 0.15
    """Share of a row's tokens that are chosen."""
    whole_words: bool = False
    """Choose whole words, not pieces of them."""


class SpanCorruptionObjective(ObjectiveConfig):
    """Span corruption for encoder-decoders (Raffel et al. 2020): spans leave the input and are written by the decoder."""

    kind: Literal["span-corruption"]
    density: Annotated[Share, Field(gt=0, lt=1)] = 0.15
    """Share of a row's tokens that leave the input."""
    mean_span: Annotated[float, Field(ge=1), BeforeValidator(reject_bool)] = 3.0
    """Mean length of a span."""


class TextToTextObjective(ObjectiveConfig):
    """Every task as text to text: the source is read, the target written by the decoder of an encoder-decoder."""

    kind: Literal["text-to-text"]
    target_length: Positive = 128
    """Positions of the decoder."""
    too_long: Literal["auto", "cut-context", "cut-end", "drop"] = "auto"
    """What becomes of an example whose source is longer than a row: cut at its beginning, at its end, or left out. auto:
    conversations lose their beginning, everything else its end, as with T5; what is cut or dropped is counted."""


LayerSelection = Positive | Annotated[list[int], Field(min_length=1)]


class JoinedLayers(ConfigModel):
    """Several layers as one: exactly one of the three, each the last so many layers, or a list of them."""

    sum: LayerSelection | None = None
    """Added up ..."""
    concat: LayerSelection | None = None
    """... or side by side ..."""
    mix: LayerSelection | None = None
    """... or as a mean whose weights are learnt (ELMo, Peters et al. 2018)."""

    @model_validator(mode="after")
    def _check_one_join(self) -> JoinedLayers:
        if [self.sum, self.concat, self.mix].count(None) != 2:
            raise ValueError("layers are joined in exactly one way: `sum`, `concat` or `mix`")
        return self


class ClassifierHeadConfig(ConfigModel):
    """What decides on what is read."""

    kind: Literal["auto", "linear", "mlp", "bilstm"] = "auto"
    """auto: the backbone's own where everything else is as it has it, else linear; mlp: tanh layers and a linear one."""
    width: Positive | None = None
    """Of the tanh layers (left out: as wide as what they read), or of each direction of the BiLSTM (768)."""
    depth: Positive | None = None
    """How many tanh layers (left out: one), or layers of the BiLSTM (two, as in BERT's feature-based runs)."""
    dropout: Annotated[float, Field(ge=0, lt=1), BeforeValidator(reject_bool)] | None = None
    """Between its layers; left out: the backbone's own, or 10%."""

    @model_validator(mode="after")
    def _check_sizes(self) -> ClassifierHeadConfig:
        sizes = {"width": self.width, "depth": self.depth}
        given = [name for name, value in sizes.items() if value is not None and self.kind in ("auto", "linear")]
        given += ["dropout"] if self.kind == "auto" and self.dropout is not None else []
        if given:
            raise ValueError(f"a head of the kind `{self.kind}` has no `{given[0]}`; say its `kind`")
        return self


def _layers_tag(value: Any) -> str:
    """Of which sort a choice of layers is: so that a mistake in it is told as one of its sort."""
    sorts = {str: "word", list: "list", dict: "joined", JoinedLayers: "joined"}
    return sorts.get(type(value), "number")


LayerKeyword = Literal["auto", "last", "embeddings", "mix"]
AnyLayers = Annotated[
    Annotated[LayerKeyword, Tag("word")]
    | Annotated[int, Tag("number")]
    | Annotated[list[int], Field(min_length=1), Tag("list")]
    | Annotated[JoinedLayers, Tag("joined")],
    Discriminator(_layers_tag),
]


def _expand_head(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


class ClassifyObjective(ObjectiveConfig):
    """A task layer on the backbone: classes, several classes at once, a number, or tags of words.

    Left alone, it is the one that transformers has for the backbone. Layer 0 is what the embeddings give, 1 what the
    first block gives; negative numbers count from the top.
    """

    kind: Literal["classify"]
    labels: list[str] | None = None
    """The classes; left out: those that occur in the training rows."""
    problem: Literal["auto", "class", "multi", "number", "tags"] = "auto"
    """auto: by the rows: tags for words, multi for lists of labels, a number for fractions, else one class."""
    layers: AnyLayers = "auto"
    """What is read: a layer, several side by side, or joined otherwise; mix: of all. auto: the last, or what the start
    model's own task layer reads."""
    pooling: Literal["auto", "first", "mean", "max", "last"] = "auto"
    """How the real tokens of a text become one vector (tags have none). auto: as the backbone's own classifier has it, else
    by its kind: an encoder's first, a decoder's last, the mean of an encoder-decoder's encoder."""
    stack: Literal["auto", "encoder", "decoder"] = "auto"
    """Which half of an encoder-decoder is read. auto: the encoder, but where all is auto as transformers' own classifier."""
    head: Annotated[
        ClassifierHeadConfig,
        BeforeValidator(
            _expand_head, json_schema_input_type=Literal["auto", "linear", "mlp", "bilstm"] | ClassifierHeadConfig
        ),
    ] = ClassifierHeadConfig()
    """What decides: `linear`, `mlp` or `bilstm`, or a mapping with its sizes."""


class WeightSchedule(ConfigModel):
    """A weight that changes over the stage: a pure function of the step."""

    start: Annotated[float, Field(ge=0), BeforeValidator(reject_bool)]
    """At the stage's first step."""
    end: Annotated[float, Field(ge=0), BeforeValidator(reject_bool)]
    """From the end of `over` on."""
    shape: Literal["linear", "cosine"] = "linear"
    """How it gets there."""
    over: Length = "100%"
    """How long it takes."""


class SampledCache(ConfigModel):
    """Ids drawn from the teacher's distribution, with their counts: without bias (Anshumann et al. 2025)."""

    kind: Literal["sampled"] = "sampled"
    samples: Annotated[int, Field(ge=1, le=255)] = 50
    """Draws for each label, with replacement; about a dozen different ids of 50."""
    sampling_power: Annotated[float, Field(gt=0), BeforeValidator(reject_bool)] = 1.0
    """Ids are drawn from the distribution to this power and weighted back: below 1 rare ids are met more often."""


class TopKCache(ConfigModel):
    """The likeliest ids, and the mass of all others in one bucket: a lower bound of the divergence."""

    kind: Literal["top-k"] = "top-k"
    k: Positive = 64
    """How many ids."""


def _expand_cache(value: Any) -> Any:
    if isinstance(value, str) and value != "none":
        return {"kind": value}
    return {"kind": "sampled", **value} if isinstance(value, dict) else value


def _union_tag(value: Any) -> str:
    """Which member of a union of plain values and mappings is meant, so that an error is told of that one alone."""
    return "mapping" if isinstance(value, dict | ConfigModel) else "plain"


AnyCache = Annotated[
    Annotated[Literal["none"], Tag("plain")]
    | Annotated[Annotated[SampledCache | TopKCache, Field(discriminator="kind")], Tag("mapping")],
    Discriminator(_union_tag),
    BeforeValidator(
        _expand_cache, json_schema_input_type=Literal["none", "sampled", "top-k"] | SampledCache | TopKCache
    ),
]
AnyWeight = Annotated[
    Annotated[Weight, Tag("plain")] | Annotated[WeightSchedule, Tag("mapping")], Discriminator(_union_tag)
]


class DistillObjective(ObjectiveConfig):
    """Answer as a teacher does: from the start model on new text (learning without forgetting), or on replayed text."""

    kind: Literal["distill"]
    teacher: str = "start"
    """`start`, or a folder, a Hub name, an earlier stage's run folder or one of its checkpoints; it has the same tokenizer."""
    weight: AnyWeight = 1.0  # type: ignore[assignment]
    """Factor of the loss: a number, or how it changes over the stage."""
    on: list[str] = []
    """Names of the sources it is taken on, beside their own objective; left out: every source. A source that no other
    objective is taken on has this one alone."""
    direction: Literal["forward", "reverse"] = "forward"
    """forward: KL(teacher || model), which covers all that the teacher says; reverse: KL(model || teacher)."""
    temperature: Annotated[float, Field(gt=0), BeforeValidator(reject_bool)] = 1.0
    """Both distributions are softened by it; the divergence is multiplied by its square."""
    cache: AnyCache = "none"
    """none: the teacher is asked at every step; else once, over the rows that the stage will read."""

    @model_validator(mode="after")
    def _check_cache(self) -> DistillObjective:
        if self.cache != "none" and self.direction == "reverse":
            raise ValueError("`direction: reverse` needs all of the teacher's distribution, so it takes `cache: none`")
        return self


class OnPolicyObjective(ObjectiveConfig):
    """The model writes itself, and a teacher judges every token of it: KL(model || teacher) (Thinking Machines 2025).

    What it wrote of a prompt is read by both; nothing is learnt from how a text goes on later. It brings back what an earlier
    model knew without bringing it away from what it has learnt since. One process trains; a sharded model cannot write.
    """

    kind: Literal["on-policy"]
    teacher: str = "start"
    """As of `distill`: `start`, or an earlier model with the same tokenizer."""
    weight: AnyWeight = 1.0  # type: ignore[assignment]
    """Factor of the loss: a number, or how it changes over the stage."""
    prompt_tokens: Annotated[int, Field(ge=0)] = 32
    """Tokens of running text that are a prompt; 0: it begins from nothing. Of an example all before the answer is one."""
    max_new_tokens: Positive = 96
    """Tokens that are written, if the text does not end before. `data.sequence_length` has room for both."""
    temperature: Annotated[float, Field(gt=0), BeforeValidator(reject_bool)] = 1.0
    """Of the writing; both models are compared at 1."""


TeacherObjective = DistillObjective | OnPolicyObjective
"""Those that have a teacher."""

RowsObjective = (
    NextTokenObjective
    | PrefixLMObjective
    | MaskedObjective
    | SpanCorruptionObjective
    | TextToTextObjective
    | ClassifyObjective
    | OnPolicyObjective
)
"""Those that say how rows are made; the others are taken on rows that are made for one of these."""

AnyObjective = Annotated[RowsObjective | DistillObjective, Field(discriminator="kind")]


def get_objective_names(specs: Sequence[AnyObjective]) -> list[str]:
    """What each objective is called: its kind, and one of several of a kind also by the sources that it names."""
    kinds = [spec.kind for spec in specs]
    plain = [spec.kind if kinds.count(spec.kind) == 1 else " ".join([spec.kind, *spec.on]) for spec in specs]
    return [f"{name} {plain[:i].count(name) + 1}" if plain[:i].count(name) else name for i, name in enumerate(plain)]
