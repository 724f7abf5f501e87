"""Which rows does an objective ask for, and which does it serve? An objective and a kind of rows have one layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, NamedTuple, get_args

import numpy as np

from postgrad.config.objectives import (
    AnyObjective,
    ClassifyObjective,
    DistillObjective,
    MaskedObjective,
    NextTokenObjective,
    OnPolicyObjective,
    PrefixLMObjective,
    RowsObjective,
    SpanCorruptionObjective,
    TeacherObjective,
    TextToTextObjective,
)
from postgrad.config.quantities import get_kinds, load_function
from postgrad.data.layouts.classification import ClozeRows, LabelledRows, TaggedRows
from postgrad.data.layouts.generation_prompts import PromptRows
from postgrad.data.layouts.masked_lm import MaskedRows
from postgrad.data.layouts.packed_examples import PackedExampleRows
from postgrad.data.layouts.packed_text import PackedRows
from postgrad.data.layouts.prefix_lm import PrefixRows
from postgrad.data.layouts.rows import RowOptions, Rows
from postgrad.data.layouts.seq2seq import Seq2SeqRows
from postgrad.data.layouts.span_corruption import SpanCorruptionRows
from postgrad.data.layouts.windows import TooLongPolicy
from postgrad.data.problem_type import ProblemType
from postgrad.data.read.examples import RUNNING_TEXT_KINDS
from postgrad.data.read.labels import Labels
from postgrad.data.render.chat import ChatRenderer, custom_template
from postgrad.data.render.demonstrations import Demonstrations
from postgrad.data.render.renderer import Renderer
from postgrad.data.render.renderers import ClassRenderer, PlainRenderer, TagRenderer
from postgrad.data.tokens.store import TokenStore
from postgrad.data.tokens.subset import Subset
from postgrad.errors import StageError
from postgrad.models.pretrained import ModelLocation
from postgrad.models.task import Task
from postgrad.plan.model_inputs import ModelInputs
from postgrad.tuning.open_model import get_task, starts_as_prefix_lm

_TASK_OBJECTIVES: dict[Task, tuple[RowsObjective, ...]] = {
    Task.CAUSAL: (NextTokenObjective(kind="next-token"),),
    Task.MASKED: (MaskedObjective(kind="masked"),),
    Task.TEXT_TO_TEXT: (SpanCorruptionObjective(kind="span-corruption"), TextToTextObjective(kind="text-to-text")),
    Task.CLASSIFY: (ClassifyObjective(kind="classify"),),
    Task.TAG: (ClassifyObjective(kind="classify", problem="tags"),),
}
"""The objectives that a model of a task was trained with; the first that supports a kind of rows also makes those of a
teacher's source."""
SUPPORTED_ROW_KINDS: Mapping[str, tuple[str, ...]] = {
    kind: objective.row_kinds for objective in get_args(RowsObjective) for kind in get_kinds(objective)
}
"""The kinds of rows that each objective supports."""


def resolve_objectives(
    objectives: Sequence[AnyObjective] | None, start_model: ModelLocation
) -> tuple[AnyObjective, ...]:
    """The objectives of a stage: those it names, or the one that the start model was made with."""
    return tuple(objectives) if objectives else get_start_objectives(start_model)[:1]


def get_start_objectives(start_model: ModelLocation) -> tuple[RowsObjective, ...]:
    """The objective that a start model was made with, and what else it may be."""
    return (
        (PrefixLMObjective(kind="prefix-lm"),)
        if starts_as_prefix_lm(start_model)
        else _TASK_OBJECTIVES[get_task(start_model)]
    )


def resolve_task(objectives: Sequence[AnyObjective], start_model: ModelLocation) -> Task:
    """The task that all objectives together ask for. Raises `StageError` when they, or the model, do not go together."""
    tasks = {o.task: o for o in objectives if not isinstance(o, DistillObjective)}
    own = get_task(start_model)
    if not tasks:  # a teacher answers whatever the model answers
        return own
    if len(tasks) > 1:
        kinds = " and ".join(o.kind for o in tasks.values())
        raise StageError(
            f"{kinds} need different models: {' and '.join(t.architecture for t in tasks)}",
            where="objectives",
            expected="objectives that one model can serve",
            hint="write the labelled rows as text (text-to-text, or next-token on examples)",
        )
    (task,) = tasks
    if task == Task.CLASSIFY:
        tags = any(isinstance(o, ClassifyObjective) and o.problem == ProblemType.TAGS for o in objectives)
        return Task.TAG if tags else Task.CLASSIFY
    if own != task and not (task == Task.MASKED and own.is_classifier):
        raise StageError(
            f"{tasks[task].kind} needs {task.architecture}, and {start_model.name} is {own.architecture}",
            where="objectives",
            expected=f"an objective for {own.architecture}, such as {_TASK_OBJECTIVES[own][0].kind}",
        )
    return task


class SourceObjectives(NamedTuple):
    """The objective that a source's rows are made for, and the numbers of all that weigh them."""

    row_objective: RowsObjective
    objective_indices: tuple[int, ...]


def match_objectives(
    name: str, kind: str, objectives: Sequence[AnyObjective], start_objectives: Sequence[RowsObjective], where: str
) -> SourceObjectives:
    """What a source's rows are made for: the objective that names it, or the first that serves its kind of rows.

    Distillation is taken on rows that are made for another objective. Beside one, rows that no other objective asks for are
    made for the first of the start model's `own` that serves them.
    """
    makers = [(i, o) for i, o in enumerate(objectives) if not isinstance(o, DistillObjective)]
    named = [(i, o) for i, o in makers if name in o.on]
    said = named or [(i, o) for i, o in makers if not o.on]
    if not said and any(isinstance(o, TeacherObjective) for o in objectives):
        said = [(-1, o) for o in start_objectives]
    serving = [(i, o) for i, o in said if kind in o.row_kinds]
    if not serving:
        raise StageError(
            f"'{name}' has rows of kind {kind}, which "
            + (f"{said[0][1].kind} cannot be taken on" if said else "no objective names"),
            where=where,
            expected=f"an objective that serves them: {', '.join(_supporting_objectives(kind))}",
        )
    if len(named) > 1:
        raise StageError(
            f"two objectives name '{name}': {' and '.join(o.kind for _, o in named)}",
            where="objectives",
            expected="one for each source",
        )
    number, made_for = serving[0]
    written = isinstance(made_for, OnPolicyObjective)
    distilled = [(i, o) for i, o in enumerate(objectives) if isinstance(o, DistillObjective)]
    # What the model writes itself is judged by its own teacher, unless another is named for it too.
    teachers = [i for i, o in distilled if name in o.on or (not o.on and not written)]
    if written and any(o.cache != "none" for i, o in distilled if i in teachers):
        raise StageError(
            f"no teacher can be asked beforehand about '{name}', which is written while the model trains",
            where="objectives",
            expected="cache: none",
        )
    return SourceObjectives(made_for, (*((number,) if number >= 0 else ()), *teachers))


def _supporting_objectives(kind: str) -> list[str]:
    """The objectives that support a kind of rows."""
    return [name for name, kinds in SUPPORTED_ROW_KINDS.items() if kind in kinds]


def refuse_unused_objectives(objectives: Sequence[AnyObjective], objective_indices: Sequence[Sequence[int]]) -> None:
    """Raise `StageError` for an objective that is taken on no source. `weighed`: the objectives' numbers by source."""
    taken = {number for numbers in objective_indices for number in numbers}
    for number, spec in enumerate(objectives):
        if number not in taken:
            raise StageError(
                f"{spec.kind} is taken on no source, as another objective has them all",
                where=f"objectives[{number}]",
                expected="sources whose rows it serves and no other objective names",
                hint="name its sources: `on: [NAME]`, or leave it out",
            )


def get_evaluation_objective(objective: RowsObjective, start_objectives: Sequence[RowsObjective]) -> RowsObjective:
    """What held-out rows are scored as: a model that writes itself is measured by how it reads what others wrote."""
    return start_objectives[0] if isinstance(objective, OnPolicyObjective) else objective


@dataclass(frozen=True)
class RowTemplate:
    """How a source's rows are put into words, as the stage says it."""

    prompt: str | None = None
    answer: str | None = None
    words: Mapping[str, str] = field(default_factory=dict)


DemonstrationWrapper = Callable[[Renderer, str], Renderer]
"""Makes a renderer of rows of a kind one that sets demonstrations before each example."""


def make_renderer(
    objective: RowsObjective,
    kind: str,
    model_inputs: ModelInputs,
    template: RowTemplate,
    labels: Labels | None,
    add_demonstrations: DemonstrationWrapper | None = None,
) -> Renderer | None:
    """What puts rows of a kind into words for an objective; None for running text.

    Raises `StageError` for demonstrations before rows that are not answered in words.
    """
    if kind in RUNNING_TEXT_KINDS:
        return None
    renderer = _make_base_renderer(objective, kind, model_inputs, template, labels)
    if add_demonstrations is None:
        return renderer
    if isinstance(objective, ClassifyObjective | MaskedObjective):
        raise StageError(
            f"demonstrations show answers in words, and {objective.kind} has none",
            where="tuning.demonstrations",
            expected="an objective whose answers are written: next-token or text-to-text",
        )
    return add_demonstrations(renderer, kind)


def _make_base_renderer(
    objective: RowsObjective, kind: str, model_inputs: ModelInputs, template: RowTemplate, labels: Labels | None
) -> Renderer:
    if isinstance(objective, ClassifyObjective | MaskedObjective):
        assert labels is not None
        if kind == "tagged":
            return TagRenderer(labels)
        between = bool(model_inputs.tokenizer_frame.separator_ids)
        return ClassRenderer(labels, separator="" if between else "\n", is_joint=not between)
    answers = objective.answers if isinstance(objective, NextTokenObjective) else "last"
    return make_text_renderer(kind, model_inputs, template, answers)


def make_text_renderer(
    kind: str, model_inputs: ModelInputs, row_template: RowTemplate, answers: Literal["all", "last"]
) -> PlainRenderer | ChatRenderer:
    """What puts rows into words for a model that answers in words: a template, or conversations in the chat template."""
    plain = PlainRenderer(
        prompt=row_template.prompt,
        answer=row_template.answer,
        label_words=row_template.words,
        is_separate=model_inputs.task.is_encoder_decoder,
    )
    tokenizer = model_inputs.tokenizer
    template = custom_template(tokenizer.chat_template)
    turns = kind == "instruction" or (kind == "completion" and template)
    if row_template.prompt is None and (kind == "chat" or (turns and model_inputs.task == Task.CAUSAL)):
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        return ChatRenderer(template, special, answers, plain)
    return plain


def uses_plain_chat_template(renderer: Renderer | None) -> bool:
    """Whether rows are put into words by the plain chat template."""
    if isinstance(renderer, Demonstrations):
        return uses_plain_chat_template(renderer.renderer)
    return isinstance(renderer, ChatRenderer) and renderer.template is None


def make_rows(
    objective: RowsObjective,
    store: TokenStore | Subset,
    model_inputs: ModelInputs,
    *,
    held_out: float = 0.0,
    excluded: np.ndarray | None = None,
    max_document_tokens: int | None = None,
    problem: ProblemType = ProblemType.CLASS,
    pack: bool = True,
    words: Mapping[str, str] = MappingProxyType({}),
) -> Rows:
    """The rows of a store for an objective, as a model reads them. `together=False`: no two documents in a row.

    `words` say the labels of rows that are answered at the mask of a template.
    """
    options = RowOptions(
        model_inputs.length, model_inputs.frame, model_inputs.lead, held_out, excluded, max_document_tokens
    )
    request = RowsRequest(store, model_inputs, options, problem, pack, words)
    return load_function(objective.rows_function)(objective, request)


class RowsRequest(NamedTuple):
    """What rows are made from: documents, the model's inputs, and options of all layouts.

    `problem` is the problem of a classifier, `words` the label words of a cloze; `pack`: several documents may share a row.
    """

    store: TokenStore | Subset
    inputs: ModelInputs
    options: RowOptions
    problem: ProblemType
    pack: bool
    words: Mapping[str, str]

    @property
    def is_running_text(self) -> bool:
        """Whether the documents have no marks of prompts and answers."""
        return self.store.marks(0) is None


def make_next_token_rows(objective: NextTokenObjective, request: RowsRequest) -> Rows:
    """Packed text, or packed examples."""
    options = request.options
    if request.is_running_text and not request.inputs.has_soft_prompt and request.pack:
        return PackedRows(request.store, options)
    if request.is_running_text:
        options = _without_separator(options)
    return PackedExampleRows(
        request.store, options, train_on=objective.train_on, too_long=objective.too_long, pack=request.pack
    )


def make_prefix_rows(objective: PrefixLMObjective, request: RowsRequest) -> Rows:
    """A prefix and its continuation."""
    options = _without_separator(request.options) if request.is_running_text else request.options
    return PrefixRows(request.store, options, seed=request.inputs.seed, too_long=objective.too_long, pack=request.pack)


def make_masked_rows(objective: MaskedObjective, request: RowsRequest) -> Rows:
    """Masked text, or a cloze template for labelled rows."""
    inputs = request.inputs
    if not request.is_running_text:
        label_ids = verbalisers(request.store, inputs, request.words)
        return ClozeRows(request.store, request.options, mask_id=inputs.mask_id, verbalisers=label_ids)
    return MaskedRows(
        request.store,
        request.options,
        mask_id=inputs.mask_id,
        vocabulary=inputs.encoder.vocabulary,
        special_ids=inputs.special_ids,
        seed=inputs.seed,
        mask_rate=objective.share,
        continues_V=inputs.continues_V if objective.whole_words else None,
    )


def make_span_corruption_rows(objective: SpanCorruptionObjective, request: RowsRequest) -> Rows:
    """Text with sentinels for removed spans, and the spans as targets."""
    inputs = request.inputs
    return SpanCorruptionRows(
        request.store,
        _without_eos(request.options, inputs.encoder.eos),
        sentinels=inputs.sentinels,
        eos=inputs.encoder.eos,
        decoder_start=inputs.decoder_start,
        seed=inputs.seed,
        density=objective.density,
        mean_span=objective.mean_span,
    )


def make_seq2seq_rows(objective: TextToTextObjective, request: RowsRequest) -> Rows:
    """Source and target."""
    inputs = request.inputs
    return Seq2SeqRows(
        request.store,
        _without_eos(request.options, inputs.encoder.eos),
        target_length=objective.target_length,
        eos=inputs.encoder.eos,
        decoder_start=inputs.decoder_start,
        seed=inputs.seed,
        too_long=_resolve_too_long(objective, request.store.kind),
    )


def make_prompt_rows(objective: OnPolicyObjective, request: RowsRequest) -> Rows:
    """Prompts for the model to continue."""
    return PromptRows(
        request.store,
        request.options,
        prompt_tokens=objective.prompt_tokens,
        new_tokens=objective.max_new_tokens,
        eos=request.inputs.encoder.eos,
    )


def make_classification_rows(objective: ClassifyObjective, request: RowsRequest) -> Rows:
    """A text and its label, or words and their tags."""
    if request.problem == ProblemType.TAGS:
        return TaggedRows(request.store, request.options)
    return LabelledRows(
        request.store, request.options, kind=request.problem, token_types=request.inputs.has_token_types
    )


def _resolve_too_long(objective: TextToTextObjective, kind: str) -> TooLongPolicy:
    """In a conversation the question stands at the end."""
    if objective.too_long == "auto":
        return "cut-context" if kind in ("chat", "instruction") else "cut-end"
    return objective.too_long


def describe_skipped(skipped: Mapping[str, int]) -> list[str]:
    """Rows that were left out, by the reason."""
    return [f"{count:,} rows are left out ({reason})" for reason, count in skipped.items() if count]


def describe_dropped(rows: Rows) -> list[str]:
    """What rows have lost of the documents that they were made of: left out whole, or in part."""
    cut: Mapping[str, int] = getattr(rows, "truncations", {})
    return describe_skipped(getattr(rows, "skipped", {})) + [
        f"{count:,} rows are too long; {what} is cut" for what, count in cut.items() if count
    ]


def verbalisers(store: TokenStore | Subset, model_inputs: ModelInputs, words: Mapping[str, str]) -> list[int]:
    """A token for each label: what a masked language model is to say at the mask.

    Raises `StageError` for a label without a word, and for a word of several tokens.
    """
    out: list[int] = []
    for label in store.labels or ():
        word = words.get(str(label), str(label))
        ids = model_inputs.tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == model_inputs.tokenizer.unk_token_id:
            raise StageError(
                f"the word '{word}' for the label '{label}' is not one token of this tokenizer",
                where="data.sources.label_words",
                expected="a word of one token for each label",
            )
        out.append(int(ids[0]))
    return out


def _without_separator(options: RowOptions) -> RowOptions:
    """Options for running text, which has no answer for a separator to precede."""
    return dataclasses.replace(options, frame=dataclasses.replace(options.frame, separator_ids=()))


def _without_eos(options: RowOptions, eos: int) -> RowOptions:
    """Options for rows that append an EOS of their own to the text."""
    suffix_ids = options.frame.suffix_ids
    suffix_ids = suffix_ids[:-1] if suffix_ids[-1:] == (eos,) else suffix_ids
    return dataclasses.replace(options, frame=dataclasses.replace(options.frame, suffix_ids=suffix_ids))
