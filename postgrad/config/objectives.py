"""Objectives of a stage: a closed union. Each names the functions that make its rows and its loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from postgrad.config.quantities import (
    ConfigModel,
    Count,
    Length,
    Method,
    Positive,
    Share,
    Width,
    omit_unset,
    reject_bool,
)
from postgrad.data.read.row_kinds import RUNNING_TEXT_KINDS
from postgrad.models.task import Task

ANSWER_KINDS = ("chat", "instruction", "completion", "pair", "labelled", "tagged", "question", "choices")
"""Kinds of rows with answers."""
Weight = Annotated[float, Field(gt=0), BeforeValidator(reject_bool)]


class ObjectiveConfig(Method):
    """What all objectives have."""

    implementation: ClassVar[str] = "postgrad.run.losses:make_token_loss"
    weight: Weight = 1.0
    """Factor of the loss."""
    on: list[str] = []
    """Names of the sources that it trains on. Default: all that no other objective (except distillation) names."""


class RowObjectiveConfig(ObjectiveConfig):
    """What the objectives have that define the rows of their sources; the others train on rows made for one of these."""

    task: ClassVar[Task]
    """The task of the models that it trains."""
    row_kinds: ClassVar[tuple[str, ...]] = (*RUNNING_TEXT_KINDS, *ANSWER_KINDS)
    """The kinds of rows that it supports."""
    rows_function: ClassVar[str]
    """`module:function` that makes the rows."""


class EntropyTokenWeights(Method):
    """Weigh each token by the entropy of the model's prediction (EAFT, Diao et al. 2026): confident ones change little."""

    implementation: ClassVar[str] = "postgrad.objectives.token_weights:EntropyWeights"
    kind: Literal["entropy"]
    top_k: Annotated[int, Field(ge=2), BeforeValidator(reject_bool)] = 20
    """Number of the likeliest tokens whose entropy counts."""
    exponent: Annotated[float, Field(ge=0), BeforeValidator(reject_bool)] = 1.0
    """Power of the normalised entropy; 0: all tokens count the same."""


class ProbabilityTokenWeights(Method):
    """Weigh each token by the model's probability of its label (DFT, Wu et al. 2025): unlikely labels change little."""

    implementation: ClassVar[str] = "postgrad.objectives.token_weights:ProbabilityWeights"
    kind: Literal["probability"]
    exponent: Annotated[float, Field(ge=0), BeforeValidator(reject_bool)] = 1.0
    """Power of the probability; 0: all tokens count the same."""


AnyTokenWeights = Annotated[EntropyTokenWeights | ProbabilityTokenWeights, Field(discriminator="kind")]


class TokenObjectiveConfig(RowObjectiveConfig):
    """What the objectives have whose loss is the cross-entropy of tokens."""

    token_weights: Annotated[AnyTokenWeights | None, omit_unset] = None
    """Factors of single tokens' losses, from the model's own predictions. Default: every token counts the same."""


class NextTokenObjective(TokenObjectiveConfig):
    """Next-token prediction on running text or on the answers of examples."""

    task: ClassVar[Task] = Task.CAUSAL
    rows_function: ClassVar[str] = "postgrad.plan.objective_rows:make_next_token_rows"
    kind: Literal["next-token"]
    train_on: Literal["answers", "all"] = "answers"
    """Of rows with answers (chats, instructions, completions): train on the answers only, or on every token."""
    answers: Literal["all", "last"] = "all"
    """Of a conversation: train on every answer or on the last one only, which works with more chat templates."""
    too_long: Literal["cut-context", "cut-end", "drop"] = "cut-context"
    """How to fit an example longer than a row: cut its context, cut its end, or drop it; the losses are counted."""


class PrefixLMObjective(TokenObjectiveConfig):
    """Prefix language modelling (Raffel et al. 2020): a decoder with bidirectional attention over a prefix predicts the rest.

    The prefix is the prompt of an example, whose last answer is predicted; of running text it ends at a random position.
    """

    task: ClassVar[Task] = Task.CAUSAL
    rows_function: ClassVar[str] = "postgrad.plan.objective_rows:make_prefix_rows"
    kind: Literal["prefix-lm"]
    too_long: Literal["cut-context", "cut-end", "drop"] = "cut-context"
    """How to fit an example longer than a row: cut its context, cut its end, or drop it; the losses are counted."""


class MaskedObjective(TokenObjectiveConfig):
    """Masked language modelling for encoders (Devlin et al. 2019): of the selected tokens 80 % are masked, 10 % replaced."""

    task: ClassVar[Task] = Task.MASKED
    row_kinds: ClassVar[tuple[str, ...]] = (*RUNNING_TEXT_KINDS, "labelled")
    rows_function: ClassVar[str] = "postgrad.plan.objective_rows:make_masked_rows"
    kind: Literal["masked"]
    share: Annotated[Share, Field(gt=0, lt=1)] = 0.15
    """Share of a row's tokens to select."""
    whole_words: bool = False
    """Select whole words instead of single tokens."""


class SpanCorruptionObjective(TokenObjectiveConfig):
    """Span corruption for encoder-decoders (Raffel et al. 2020): the decoder predicts spans removed from the input."""

    task: ClassVar[Task] = Task.TEXT_TO_TEXT
    row_kinds: ClassVar[tuple[str, ...]] = RUNNING_TEXT_KINDS
    rows_function: ClassVar[str] = "postgrad.plan.objective_rows:make_span_corruption_rows"
    kind: Literal["span-corruption"]
    density: Annotated[Share, Field(gt=0, lt=1)] = 0.15
    """Share of a row's tokens to remove from the input."""
    mean_span: Annotated[float, Field(ge=1), BeforeValidator(reject_bool)] = 3.0
    """Mean length of a span, in tokens."""


class TextToTextObjective(TokenObjectiveConfig):
    """Text to text for encoder-decoders: the encoder reads the source, the decoder predicts the target."""

    task: ClassVar[Task] = Task.TEXT_TO_TEXT
    rows_function: ClassVar[str] = "postgrad.plan.objective_rows:make_seq2seq_rows"
    kind: Literal["text-to-text"]
    target_length: Positive = 128
    """Length of the decoder's rows, in tokens."""
    too_long: Literal["auto", "cut-context", "cut-end", "drop"] = "auto"
    """How to fit an example whose source is longer than a row: cut its start, cut its end, or drop it. auto: cut the start
    of conversations and the end of everything else, as T5 does; the losses are counted."""


LayerSelection = Positive | Annotated[list[int], Field(min_length=1)]


class JoinedLayers(ConfigModel):
    """Several layers combined, in exactly one of three ways. Each takes a number of last layers, or a list of layers."""

    sum: LayerSelection | None = None
    """Sum ..."""
    concat: LayerSelection | None = None
    """... or concatenation ..."""
    mix: LayerSelection | None = None
    """... or mean with learned weights (ELMo, Peters et al. 2018)."""

    @model_validator(mode="after")
    def _check_one_join(self) -> JoinedLayers:
        if [self.sum, self.concat, self.mix].count(None) != 2:
            raise ValueError("layers are combined in exactly one way: `sum`, `concat` or `mix`")
        return self


class ClassifierHeadConfig(ConfigModel):
    """The classifier on top of the pooled hidden states."""

    kind: Literal["auto", "linear", "mlp", "bilstm"] = "auto"
    """auto: the one that transformers has for the backbone, if all else is as there, else linear; mlp: tanh layers and a linear
    one."""
    width: Width | None = None
    """Width of the tanh layers, or of each direction of the BiLSTM. Default: that of their input; 768 for the BiLSTM."""
    depth: Annotated[Positive, Field(le=100)] | None = None
    """Number of tanh or BiLSTM layers. Default: one; two for the BiLSTM, as in BERT's feature-based experiments."""
    dropout: Annotated[float, Field(ge=0, lt=1), BeforeValidator(reject_bool)] | None = None
    """Dropout between its layers. Default: that of the backbone, or 10%."""

    @model_validator(mode="after")
    def _check_sizes(self) -> ClassifierHeadConfig:
        sizes = {"width": self.width, "depth": self.depth}
        given = [name for name, value in sizes.items() if value is not None and self.kind in ("auto", "linear")]
        given += ["dropout"] if self.kind == "auto" and self.dropout is not None else []
        if given:
            raise ValueError(f"a head of the kind `{self.kind}` has no `{given[0]}`; set `kind: mlp` or `bilstm`")
        return self


def _layers_tag(value: Any) -> str:
    """The sort of a layer selection, so that an error is about that sort alone."""
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


class ClassifyObjective(RowObjectiveConfig):
    """A task layer on the backbone: single-label or multi-label classification, regression, or token classification.

    With all defaults it is the one that transformers has for the backbone. Layer 0 is the output of the embeddings, 1 that of
    the first block; negative numbers count from the top.
    """

    task: ClassVar[Task] = Task.CLASSIFY
    row_kinds: ClassVar[tuple[str, ...]] = ("labelled", "tagged")
    rows_function: ClassVar[str] = "postgrad.plan.objective_rows:make_classification_rows"
    implementation: ClassVar[str] = "postgrad.run.losses:make_classification_loss"
    kind: Literal["classify"]
    labels: list[str] | None = None
    """The classes. Default: those of the training rows."""
    problem: Literal["auto", "class", "multi", "number", "tags"] = "auto"
    """auto: from the rows: tags for words, multi for lists of labels, number for fractions, else class."""
    layers: AnyLayers = "auto"
    """Input of the task layer: a layer, a list to concatenate, or another combination; mix: of all layers. auto: the last
    layer, or that of the start model's own task layer."""
    pooling: Literal["auto", "first", "mean", "max", "last"] = "auto"
    """Pooling over the tokens of a text (none for tags). auto: that of the backbone's own classifier, else by architecture:
    first for an encoder, last for a decoder, mean for the encoder of an encoder-decoder."""
    stack: Literal["auto", "encoder", "decoder"] = "auto"
    """Which half of an encoder-decoder to use. auto: the encoder; if all else is auto, as in transformers' own classifier."""
    head: Annotated[
        ClassifierHeadConfig,
        BeforeValidator(
            _expand_head, json_schema_input_type=Literal["auto", "linear", "mlp", "bilstm"] | ClassifierHeadConfig
        ),
    ] = ClassifierHeadConfig()
    """The classifier: `linear`, `mlp` or `bilstm`, or a mapping with its sizes."""


class WeightSchedule(ConfigModel):
    """A weight that changes over the stage, as a pure function of the step."""

    start: Annotated[float, Field(ge=0), BeforeValidator(reject_bool)]
    """Weight at the first step."""
    end: Annotated[float, Field(ge=0), BeforeValidator(reject_bool)]
    """Weight from the end of `over` on."""
    shape: Literal["linear", "cosine"] = "linear"
    """Shape of the change."""
    over: Length = "100%"
    """Length of the change."""


class SampledCache(ConfigModel):
    """Ids sampled from the teacher's distribution, with their counts: unbiased (Anshumann et al. 2025)."""

    kind: Literal["sampled"] = "sampled"
    samples: Annotated[int, Field(ge=1, le=255)] = 50
    """Samples for each label, with replacement; 50 give about a dozen different ids."""
    sampling_power: Annotated[float, Field(gt=0), BeforeValidator(reject_bool)] = 1.0
    """Sample from the distribution to this power, with importance weights; below 1 rare ids are sampled more often."""


class TopKCache(ConfigModel):
    """The most likely ids, and the mass of all others in one bucket: a lower bound of the divergence."""

    kind: Literal["top-k"] = "top-k"
    k: Positive = 64
    """Number of ids."""


def _expand_cache(value: Any) -> Any:
    if isinstance(value, str) and value != "none":
        return {"kind": value}
    return {"kind": "sampled", **value} if isinstance(value, dict) else value


def _union_tag(value: Any) -> str:
    """Tag of a plain value or a mapping, so that errors concern that alternative alone."""
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


class BeginningTeacherContext(ConfigModel):
    """The beginning of each document: the teacher reads it before the rest, and the model trains on the rest alone (DiSC)."""

    kind: Literal["beginning"]
    tokens: Positive = 128
    """Largest number of tokens of a context; it ends with a sentence, where there is an end."""
    share: Annotated[Share, Field(gt=0, lt=1)] = 0.5
    """Largest share of a document's text, which matters for short documents."""


class FieldTeacherContext(ConfigModel):
    """A field of each row, such as a fact or a demonstration: the teacher reads it before the row's prompt (SDFT)."""

    kind: Literal["field"]
    field: str
    """Name of the column with text; an empty one is no context."""
    template: str = "{text}\n\n"
    """What the teacher reads before the prompt; `{text}` is the field."""

    @model_validator(mode="after")
    def _check_template(self) -> FieldTeacherContext:
        if "{text}" not in self.template:
            raise ValueError(f"`template` needs `{{text}}`, where the field `{self.field}` stands")
        return self


AnyTeacherContext = Annotated[BeginningTeacherContext | FieldTeacherContext, Field(discriminator="kind")]


class DistillObjective(ObjectiveConfig):
    """Distillation from a teacher: from the start model on new text (learning without forgetting), or on replayed text."""

    implementation: ClassVar[str] = "postgrad.run.losses:make_distillation_loss"
    kind: Literal["distill"]
    teacher: str = "start"
    """`start` (the start model), or a folder, a Hub name, a run folder or a checkpoint with the same tokenizer."""
    weight: AnyWeight = 1.0  # type: ignore[assignment]
    """Factor of the loss: a number, or a mapping for one that changes over the stage."""
    on: list[str] = []
    """Names of the sources to distil on, in addition to their own objective. Default: all. A source without another objective
    has this one alone."""
    direction: Literal["forward", "reverse"] = "forward"
    """forward: KL(teacher || model), which covers all of the teacher's distribution; reverse: KL(model || teacher)."""
    temperature: Annotated[float, Field(gt=0), BeforeValidator(reject_bool)] = 1.0
    """Softmax temperature of both distributions; the divergence is multiplied by its square."""
    cache: AnyCache = "none"
    """none: run the teacher at every step; otherwise once before the training, over all rows of the stage."""
    vocabulary: Annotated[Literal["without-labels"] | None, omit_unset] = None
    """without-labels: remove each token's label from both distributions, so that distillation does not resist what is learnt
    (TMKL, Xu et al. 2026). Default: the whole vocabulary."""
    context: Annotated[AnyTeacherContext | None, omit_unset] = None
    """What the teacher reads and the model does not. Default: both read the same."""

    @model_validator(mode="after")
    def _check_cache(self) -> DistillObjective:
        for key, value in {"direction": "reverse", "vocabulary": "without-labels"}.items():
            if self.cache != "none" and getattr(self, key) == value:
                raise ValueError(f"`{key}: {value}` needs the teacher's whole distribution: it requires `cache: none`")
        return self


class OnPolicyObjective(RowObjectiveConfig):
    """On-policy distillation: KL(model || teacher) on continuations that the model samples itself (Thinking Machines 2025).

    Both models read the sampled continuation of a prompt; the rest of the text is not trained on. It recovers abilities of an
    earlier model without undoing what was learned since. Requires a single process: a sharded model cannot generate.
    """

    task: ClassVar[Task] = Task.CAUSAL
    rows_function: ClassVar[str] = "postgrad.plan.objective_rows:make_prompt_rows"
    implementation: ClassVar[str] = "postgrad.run.losses:make_on_policy_loss"
    kind: Literal["on-policy"]
    teacher: str = "start"
    """As for `distill`: `start`, or an earlier model with the same tokenizer."""
    weight: AnyWeight = 1.0  # type: ignore[assignment]
    """Factor of the loss: a number, or a mapping for one that changes over the stage."""
    prompt_tokens: Count = 32
    """Length of the prompts taken from running text; 0: none. The prompt of an example is everything before its answer."""
    max_new_tokens: Positive = 96
    """Largest number of tokens to generate. Prompt and continuation must fit into `data.sequence_length`."""
    temperature: Annotated[float, Field(gt=0), BeforeValidator(reject_bool)] = 1.0
    """Sampling temperature; the divergence is computed at 1."""
    context: Annotated[AnyTeacherContext | None, omit_unset] = None
    """What the teacher reads before the prompt and the model does not. Default: both read the same."""


class OnPolicyReplayObjective(RowObjectiveConfig):
    """On-policy replay (Chen et al. 2026): next tokens of answers that the model itself samples to old prompts, at every step.

    Of each prompt's answers the one with the best score is trained on, if the score is high enough; there is no teacher.
    Requires a single process: a sharded model cannot generate.
    """

    task: ClassVar[Task] = Task.CAUSAL
    rows_function: ClassVar[str] = "postgrad.plan.objective_rows:make_prompt_rows"
    kind: Literal["on-policy-replay"]
    prompt_tokens: Count = 32
    """Length of the prompts taken from running text; 0: none. The prompt of an example is everything before its answer."""
    max_new_tokens: Positive = 96
    """Largest number of tokens of an answer. Prompt and answer must fit into `data.sequence_length`."""
    temperature: Annotated[float, Field(gt=0), BeforeValidator(reject_bool)] = 1.0
    """Sampling temperature."""
    samples: Annotated[Positive, Field(le=64)] = 4
    """Answers to each prompt, of which one is trained on at most."""
    score: Literal["f1", "exact", "variety"] = "f1"
    """f1, exact: overlap of words with the row's own answer, or equality, as in question answering (Rajpurkar et al. 2016);
    variety: the share of an answer that repeats no earlier run of eight tokens of it, for running text."""
    min_score: Share = 0.5
    """Answers with a lower score are rejected."""


GeneratingObjective = OnPolicyObjective | OnPolicyReplayObjective
"""Objectives on text that the model samples at every step."""
TeacherObjective = DistillObjective | OnPolicyObjective
"""Objectives with a teacher."""

RowsObjective = (
    NextTokenObjective
    | PrefixLMObjective
    | MaskedObjective
    | SpanCorruptionObjective
    | TextToTextObjective
    | ClassifyObjective
    | GeneratingObjective
)
"""Objectives that define the rows of their sources."""

AnyObjective = Annotated[RowsObjective | DistillObjective, Field(discriminator="kind")]


def get_objective_names(specs: Sequence[AnyObjective]) -> list[str]:
    """The name of each objective: its kind, and among several of a kind also the sources that it names."""
    kinds = [spec.kind for spec in specs]
    plain = [spec.kind if kinds.count(spec.kind) == 1 else " ".join([spec.kind, *spec.on]) for spec in specs]
    return [f"{name} {plain[:i].count(name) + 1}" if plain[:i].count(name) else name for i, name in enumerate(plain)]
