"""Which rows does an objective ask for, and which does it serve? An objective and a kind of rows have one layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

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
    TaughtObjective,
    TextToTextObjective,
)
from postgrad.data.layouts.classification import ClozeRows, LabelledRows, TaggedRows
from postgrad.data.layouts.generation_prompts import PromptRows
from postgrad.data.layouts.masked_lm import MaskedRows
from postgrad.data.layouts.packed_examples import WholeRows
from postgrad.data.layouts.packed_text import PackedRows
from postgrad.data.layouts.prefix_lm import PrefixRows
from postgrad.data.layouts.rows import Rows
from postgrad.data.layouts.seq2seq import PairRows
from postgrad.data.layouts.span_corruption import SpanRows
from postgrad.data.layouts.windows import TooLong
from postgrad.data.read.examples import RUNNING, Labels, Renderer
from postgrad.data.render.chat import ChatRenderer, own_template
from postgrad.data.render.demonstrations import Demonstrations
from postgrad.data.render.renderers import ClassRenderer, PlainRenderer, TagRenderer
from postgrad.data.tokens.store import TokenStore
from postgrad.data.tokens.subset import Part
from postgrad.errors import StageError
from postgrad.models.pretrained import Start, Task
from postgrad.objectives.classification_loss import Problem
from postgrad.plan.model_inputs import Reading
from postgrad.tuning.open_model import prefixes_at, task_at

_ANSWERED = ("chat", "instruction", "completion", "pair", "labelled", "tagged", "question", "choices")
SERVES: dict[str, tuple[str, ...]] = {
    "next-token": (*RUNNING, *_ANSWERED),
    "prefix-lm": (*RUNNING, *_ANSWERED),
    "masked": (*RUNNING, "labelled"),
    "span-corruption": RUNNING,
    "text-to-text": (*RUNNING, *_ANSWERED),
    "classify": ("labelled", "tagged"),
    "on-policy": (*RUNNING, *_ANSWERED),
}
"""The kinds of rows that an objective can be taken on."""

_TASKS: dict[str, Task] = {
    "next-token": "causal",
    "prefix-lm": "causal",
    "masked": "masked",
    "span-corruption": "text-to-text",
    "text-to-text": "text-to-text",
    "classify": "classify",
    "on-policy": "causal",
}
_OF_TASK: dict[Task, tuple[RowsObjective, ...]] = {
    "causal": (NextTokenObjective(kind="next-token"),),
    "masked": (MaskedObjective(kind="masked"),),
    "text-to-text": (SpanCorruptionObjective(kind="span-corruption"), TextToTextObjective(kind="text-to-text")),
    "classify": (ClassifyObjective(kind="classify"),),
    "tag": (ClassifyObjective(kind="classify", problem="tags"),),
}
"""What a model of a task was made with; the first that serves a kind of rows also makes the rows of a teacher's source."""
_WHO = {
    "causal": "a decoder",
    "masked": "an encoder",
    "text-to-text": "an encoder-decoder",
    "classify": "a classifier",
    "tag": "a token classifier",
}


def objectives_for(given: Sequence[AnyObjective] | None, start: Start) -> tuple[AnyObjective, ...]:
    """The objectives of a stage: those it names, or the one that the start model was made with."""
    return tuple(given) if given else made_with(start)[:1]


def made_with(start: Start) -> tuple[RowsObjective, ...]:
    """The objective that a start model was made with, and what else it may be."""
    return (PrefixLMObjective(kind="prefix-lm"),) if prefixes_at(start) else _OF_TASK[task_at(start)]


def task_for(objectives: Sequence[AnyObjective], start: Start) -> Task:
    """The task that all objectives together ask for. Raises `StageError` when they, or the model, do not go together."""
    tasks = {_TASKS[o.kind]: o for o in objectives if not isinstance(o, DistillObjective)}
    own = task_at(start)
    if not tasks:  # a teacher answers whatever the model answers
        return own
    if len(tasks) > 1:
        kinds = " and ".join(o.kind for o in tasks.values())
        raise StageError(
            f"{kinds} need different models: {' and '.join(_WHO[t] for t in tasks)}",
            where="objectives",
            expected="objectives that one model can serve",
            way_out="write the labelled rows as text (text-to-text, or next-token on examples)",
        )
    (task,) = tasks
    if task == "classify":
        tags = any(isinstance(o, ClassifyObjective) and o.problem == "tags" for o in objectives)
        return "tag" if tags else "classify"
    if own != task and not (task == "masked" and own in ("classify", "tag")):
        raise StageError(
            f"{tasks[task].kind} needs {_WHO[task]}, and {start.name} is {_WHO[own]}",
            where="objectives",
            expected=f"an objective for {_WHO[own]}, such as {_OF_TASK[own][0].kind}",
        )
    return task


class Weighed(NamedTuple):
    """The objective that a source's rows are made for, and the numbers of all that weigh them."""

    made_for: RowsObjective
    numbers: tuple[int, ...]


def objective_for(
    name: str, kind: str, objectives: Sequence[AnyObjective], own: Sequence[RowsObjective], where: str
) -> Weighed:
    """What a source's rows are made for: the objective that names it, or the first that serves its kind of rows.

    Distillation is taken on rows that are made for another objective. Beside one, rows that no other objective asks for are
    made for the first of the start model's `own` that serves them.
    """
    makers = [(i, o) for i, o in enumerate(objectives) if not isinstance(o, DistillObjective)]
    named = [(i, o) for i, o in makers if name in o.on]
    said = named or [(i, o) for i, o in makers if not o.on]
    if not said and any(isinstance(o, TaughtObjective) for o in objectives):
        said = [(-1, o) for o in own]
    serving = [(i, o) for i, o in said if kind in SERVES[o.kind]]
    if not serving:
        raise StageError(
            f"'{name}' has rows of kind {kind}, which "
            + (f"{said[0][1].kind} cannot be taken on" if said else "no objective names"),
            where=where,
            expected=f"an objective that serves them: {', '.join(k for k, kinds in SERVES.items() if kind in kinds)}",
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
    return Weighed(made_for, (*((number,) if number >= 0 else ()), *teachers))


def refuse_unused(objectives: Sequence[AnyObjective], weighed: Sequence[Sequence[int]]) -> None:
    """Raise `StageError` for an objective that is taken on no source. `weighed`: the objectives' numbers by source."""
    taken = {number for numbers in weighed for number in numbers}
    for number, spec in enumerate(objectives):
        if number not in taken:
            raise StageError(
                f"{spec.kind} is taken on no source, as another objective has them all",
                where=f"objectives[{number}]",
                expected="sources whose rows it serves and no other objective names",
                way_out="name its sources: `on: [NAME]`, or leave it out",
            )


def scored_as(objective: RowsObjective, own: Sequence[RowsObjective]) -> RowsObjective:
    """What held-out rows are scored as: a model that writes itself is measured by how it reads what others wrote."""
    return own[0] if isinstance(objective, OnPolicyObjective) else objective


@dataclass(frozen=True)
class Wording:
    """How a source's rows are put into words, as the stage says it."""

    prompt: str | None = None
    answer: str | None = None
    words: Mapping[str, str] = field(default_factory=dict)


Demonstrated = Callable[[Renderer, str], Renderer]
"""Makes a renderer of rows of a kind one that sets demonstrations before each example."""


def renderer_for(
    objective: RowsObjective,
    kind: str,
    reading: Reading,
    wording: Wording,
    labels: Labels | None,
    demonstrated: Demonstrated | None = None,
) -> Renderer | None:
    """What puts rows of a kind into words for an objective; None for running text.

    Raises `StageError` for demonstrations before rows that are not answered in words.
    """
    if kind in RUNNING:
        return None
    renderer = _renderer(objective, kind, reading, wording, labels)
    if demonstrated is None:
        return renderer
    if isinstance(objective, ClassifyObjective | MaskedObjective):
        raise StageError(
            f"demonstrations show answers in words, and {objective.kind} has none",
            where="tuning.demonstrations",
            expected="an objective whose answers are written: next-token or text-to-text",
        )
    return demonstrated(renderer, kind)


def _renderer(
    objective: RowsObjective, kind: str, reading: Reading, wording: Wording, labels: Labels | None
) -> Renderer:
    if isinstance(objective, ClassifyObjective | MaskedObjective):
        assert labels is not None
        if kind == "tagged":
            return TagRenderer(labels)
        between = bool(reading.own.between)
        return ClassRenderer(labels, separator="" if between else "\n", joint=not between)
    answers = objective.answers if isinstance(objective, NextTokenObjective) else "last"
    return writer_for(kind, reading, wording, answers)


def writer_for(
    kind: str, reading: Reading, wording: Wording, answers: Literal["all", "last"]
) -> PlainRenderer | ChatRenderer:
    """What puts rows into words for a model that answers in words: a template, or conversations in the chat template."""
    plain = PlainRenderer(
        prompt=wording.prompt,
        answer=wording.answer,
        words=wording.words,
        separate=reading.task == "text-to-text",
    )
    tokenizer = reading.tokenizer
    template = own_template(tokenizer.chat_template)
    turns = kind == "instruction" or (kind == "completion" and template)
    if wording.prompt is None and (kind == "chat" or (turns and reading.task == "causal")):
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        return ChatRenderer(template, special, answers, plain)
    return plain


def plainly_chats(renderer: Renderer | None) -> bool:
    """Whether rows are put into words by the plain chat template."""
    if isinstance(renderer, Demonstrations):
        return plainly_chats(renderer.inner)
    return isinstance(renderer, ChatRenderer) and renderer.template is None


def make_rows(
    objective: RowsObjective,
    store: TokenStore | Part,
    reading: Reading,
    *,
    held_out: float = 0.0,
    excluded: np.ndarray | None = None,
    most: int | None = None,
    problem: Problem = "class",
    together: bool = True,
    words: Mapping[str, str] = MappingProxyType({}),
) -> Rows:
    """The rows of a store for an objective, as a model reads them. `together=False`: no two documents in a row.

    `words` say the labels of rows that are answered at the mask of a template.
    """
    common: dict[str, Any] = {"held_out": held_out, "excluded": excluded, "max_document_tokens": most}
    framed: dict[str, Any] = {**common, "frame": reading.frame, "lead": reading.lead}
    match objective:
        case NextTokenObjective():
            running = store.marks(0) is None
            if running and not reading.prompted and together:
                return PackedRows(store, reading.length, **common)
            if running:  # there is no answer before which anything could stand
                framed["frame"] = dataclasses.replace(reading.frame, between=())
            return WholeRows(
                store,
                reading.length,
                train_on=objective.train_on,
                too_long=objective.too_long,
                together=together,
                **framed,
            )
        case PrefixLMObjective():
            if store.marks(0) is None:
                framed["frame"] = dataclasses.replace(reading.frame, between=())
            return PrefixRows(
                store, reading.length, seed=reading.seed, too_long=objective.too_long, together=together, **framed
            )
        case MaskedObjective() if store.marks(0) is not None:
            return ClozeRows(
                store, reading.length, mask_id=reading.mask, verbalisers=verbalisers(store, reading, words), **framed
            )
        case MaskedObjective():
            return MaskedRows(
                store,
                reading.length,
                mask_id=reading.mask,
                vocabulary=reading.encoder.vocabulary,
                special_ids=reading.special,
                seed=reading.seed,
                share=objective.share,
                continues_V=reading.continues_V if objective.whole_words else None,
                **framed,
            )
        case SpanCorruptionObjective():
            return SpanRows(
                store,
                reading.length,
                sentinels=reading.sentinels,
                eos=reading.encoder.eos,
                decoder_start=reading.decoder_start,
                seed=reading.seed,
                density=objective.density,
                mean_span=objective.mean_span,
                **{**framed, "frame": _without_eos(reading)},
            )
        case TextToTextObjective():
            return PairRows(
                store,
                reading.length,
                objective.target_length,
                eos=reading.encoder.eos,
                decoder_start=reading.decoder_start,
                seed=reading.seed,
                too_long=_too_long(objective, store.kind),
                **{**framed, "frame": _without_eos(reading)},
            )
        case OnPolicyObjective():
            return PromptRows(
                store,
                reading.length,
                prompt=objective.prompt_tokens,
                new=objective.new_tokens,
                eos=reading.encoder.eos,
                **framed,
            )
        case ClassifyObjective():
            if problem == "tags":
                return TaggedRows(store, reading.length, **framed)
            return LabelledRows(store, reading.length, kind=problem, types=reading.types, **framed)


def _too_long(objective: TextToTextObjective, kind: str) -> TooLong:
    """In a conversation the question stands at the end."""
    if objective.too_long == "auto":
        return "cut-context" if kind in ("chat", "instruction") else "cut-end"
    return objective.too_long


def left_out(skipped: Mapping[str, int]) -> list[str]:
    """Rows that were left out, by the reason."""
    return [f"{count:,} rows are left out ({reason})" for reason, count in skipped.items() if count]


def lost(rows: Rows) -> list[str]:
    """What rows have lost of the documents that they were made of: left out whole, or in part."""
    cut: Mapping[str, int] = getattr(rows, "cut", {})
    return left_out(getattr(rows, "skipped", {})) + [
        f"{count:,} rows are too long; {what} is cut" for what, count in cut.items() if count
    ]


def verbalisers(store: TokenStore | Part, reading: Reading, words: Mapping[str, str]) -> list[int]:
    """A token for each label: what a masked language model is to say at the mask.

    Raises `StageError` for a label without a word, and for a word of several tokens.
    """
    out: list[int] = []
    for label in store.labels or ():
        word = words.get(str(label), str(label))
        ids = reading.tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == reading.tokenizer.unk_token_id:
            raise StageError(
                f"the word '{word}' for the label '{label}' is not one token of this tokenizer",
                where="data.sources.words",
                expected="a word of one token for each label",
            )
        out.append(int(ids[0]))
    return out


def _without_eos(reading: Reading) -> Any:
    """The frame of rows that set their own EOS behind the text."""
    after = reading.frame.after
    return dataclasses.replace(reading.frame, after=after[:-1] if after[-1:] == (reading.encoder.eos,) else after)
