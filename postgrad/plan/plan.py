"""What will a stage do? Everything that follows from the stage, the texts and the tokenizer, before a weight is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, PreTrainedTokenizerBase

from postgrad.config import stage as s
from postgrad.config.mixing import told
from postgrad.config.objectives import AnyObjective, PrefixLMObjective
from postgrad.data.layouts.rows import Rows, keep
from postgrad.data.loading.mixture import Mixture
from postgrad.data.read.examples import RUNNING, Labels
from postgrad.data.render.chat import plain_template
from postgrad.errors import DataError, StageError
from postgrad.evaluation.held_out import AnyHeldOut
from postgrad.evaluation.pseudo_perplexity import OneByOne
from postgrad.models.pretrained import Start, Task, TaskLayer, load_tokenizer
from postgrad.models.task_head import Representation
from postgrad.objectives.classification_loss import Problem
from postgrad.optim import lr_schedules
from postgrad.plan.checkpoint_selection import Rule, make_rule
from postgrad.plan.data_order import make_order
from postgrad.plan.filter_documents import selected
from postgrad.plan.held_out_sets import Chosen, as_read, check_labels, held_out_sets, listed_files, one_by_one, overlaps
from postgrad.plan.lr_schedule import make_schedule
from postgrad.plan.model_inputs import Reading, make_encoder, make_reading
from postgrad.plan.objective_rows import (
    left_out,
    lost,
    made_with,
    make_rows,
    objectives_for,
    plainly_chats,
    refuse_unused,
    task_for,
)
from postgrad.plan.sources import Leaf, Progress, demonstrating, labels_for, make_leaves, seen_by, wanted_sources
from postgrad.plan.start_model import made_note, start_of
from postgrad.plan.task_layer import form_for
from postgrad.plan.task_prompts import Asked, framed, make_asked
from postgrad.plan.teachers import name_of, teachers_for


@dataclass(frozen=True)
class Plan:
    """What a stage will do."""

    stage: s.Stage
    root: Path
    output: Path
    start: Start
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    context: int
    leaves: tuple[Leaf, ...]
    rows: tuple[Rows, ...]
    task: Task
    objectives: tuple[AnyObjective, ...]
    weighed: tuple[tuple[int, ...], ...]
    """The numbers of the objectives that weigh each leaf's rows."""
    teachers: dict[int, Start]
    """Whom an objective is taught by, by the objective's number."""
    problem: Problem
    """What a classifier decides."""
    layer: TaskLayer | None
    reading: Reading
    mixture: Mixture
    asked: tuple[float, ...]
    """What share of the trained tokens each leaf was to have."""
    steps: int
    tokens: int
    schedule: lr_schedules.Schedule
    held_out: tuple[AnyHeldOut, ...]
    """As the model reads them under the stage's tuning."""
    held_out_before: tuple[AnyHeldOut, ...]
    """The same documents as the start model reads them."""
    pseudo: tuple[OneByOne, ...]
    """Of masked language models: held-out text of which every token is masked in turn."""
    pseudo_before: tuple[OneByOne, ...]
    """The same texts as the start model reads them."""
    tasks: tuple[Asked, ...]
    """What the model is asked under the stage's tuning."""
    tasks_before: tuple[Asked, ...]
    """The same, as the start model is asked."""
    choice: Rule | None
    """By what the published step is chosen; None: the last one is published."""
    seen: dict[str, dict[str, Any]]
    overlap: dict[str, dict[str, Any]]
    notes: tuple[str, ...]
    cache: Path
    """Where what can be made again is kept."""

    @property
    def start_named(self) -> str:
        """The start model, as another stage with the same root would name it."""
        return self.stage.model if isinstance(self.stage.model, str) else str(self.start.folder)

    @property
    def sources(self) -> list[str]:
        """Names of the leaves, in the order of the mixture."""
        return [leaf.name for leaf in self.leaves]

    @property
    def prefixes(self) -> int:
        """How long rows are whose beginnings are read in both directions; 0 when there are none."""
        return self.context if any(isinstance(leaf.wanted.objective, PrefixLMObjective) for leaf in self.leaves) else 0

    @property
    def looked_at(self) -> tuple[AnyHeldOut, ...]:
        """The sets that are scored before and during training: all but the test sets."""
        return tuple(h for h in self.held_out if h.role != "test")

    @property
    def looked_at_before(self) -> tuple[AnyHeldOut, ...]:
        """The same as the start model reads them."""
        return tuple(h for h in self.held_out_before if h.role != "test")

    def first_look(self, held_out: AnyHeldOut) -> AnyHeldOut:
        """What of a set is scored during training: the first tokens of it, or all of it where it decides."""
        whole = self.choice is not None and self.choice.watched(held_out)
        return held_out if whole else held_out.first(self.stage.evaluation.during_tokens)

    def trained_per_row(self) -> list[float]:
        """Mean trained tokens in a row of each source."""
        return [r.ledger.trained / len(r) for r in self.rows]

    def counts(self) -> tuple[int, ...]:
        """Rows of each source that the stage reads."""
        first = self.stage.data.skip_steps * self.mixture.block
        before, after = self.mixture.counts(first), self.mixture.counts(first + self.steps * self.mixture.block)
        return tuple(b - a for a, b in zip(before, after, strict=True))

    def as_record(self) -> dict[str, Any]:
        """The plan as plain data: what is shown, and what a resumed run is held against."""
        counts, per_row = self.counts(), self.trained_per_row()
        trained = [round(c * t) for c, t in zip(counts, per_row, strict=True)]
        return {
            "steps": self.steps,
            "rows": self.steps * self.mixture.block,
            "sequence_length": self.stage.data.sequence_length,
            "tokens": sum(trained),
            "sources": [
                {
                    "name": leaf.name,
                    "role": leaf.role,
                    "asked": asked,
                    "share": t / max(sum(trained), 1),
                    "rows": c,
                    "trained": t,
                    "passes": c / len(r),
                    "available": r.ledger.trained,
                    "documents": len(leaf.store),
                    "kind": leaf.store.kind,
                    "made_by": leaf.made_by,
                    **({"selected": list(leaf.selection)} if leaf.selection else {}),
                }
                for leaf, asked, c, t, r in zip(self.leaves, self.asked, counts, trained, self.rows, strict=True)
            ],
        }

    def fingerprints(self) -> dict[str, Any]:
        """Of everything that goes into the run besides the start model."""
        return {
            "stage": self.stage.fingerprint(),
            "data": {leaf.name: leaf.store.fingerprint for leaf in self.leaves},
            "sets": {h.name: h.fingerprint for h in self.held_out},
            **({"tasks": {t.name: t.fingerprint for t in self.tasks}} if self.tasks else {}),
            # Left out where there are none: a run from before there were teachers can still be resumed.
            **({"teachers": [name_of(t) for t in self.teachers.values()]} if self.teachers else {}),
        }

    @property
    def clusters_seen(self) -> set[str]:
        """The sorts of tasks that this stage or an earlier one trains on."""
        earlier = (entry["origin"].get("cluster") for entry in self.seen.values())
        return {c for c in (*earlier, *(leaf.wanted.cluster for leaf in self.leaves)) if c is not None}


def make_plan(stage: s.Stage, root: Path, cache: Path, progress: Progress | None = None) -> Plan:
    """Read and tokenise the texts (or find them in the cache) and work out the stage.

    Paths in the stage are relative to `root`, the stage file's folder. Raises the error of whatever is impossible.
    """
    start = start_of(stage, root, cache, progress)
    tokenizer = load_tokenizer(start)
    config = AutoConfig.from_pretrained(start.source)
    vocabulary = int(config.vocab_size)
    encoder = make_encoder(tokenizer, vocabulary, stage.data.eos)
    limit = getattr(config, "max_position_embeddings", None)
    length = stage.data.sequence_length
    if limit and length > limit:
        raise StageError(
            f"rows of {length:,} tokens do not fit the model, which has {limit:,} positions",
            where="data.sequence_length",
            expected=f"at most {limit:,}",
        )
    if stage.max_forgetting is not None and not _has_retained(stage):
        raise _no_gate()
    objectives = objectives_for(stage.objectives, start)
    seen = seen_by(start)
    notes: list[str] = [made_note(start, stage)] if start.made else []
    task = task_for(objectives, start)
    wanted = wanted_sources(stage, objectives, made_with(start), root, seen)
    refuse_unused(objectives, [item.weighed for item in wanted])
    labels = labels_for(wanted, cache)
    if labels and labels.problem == "tags" and task == "classify":
        task = "tag"
    form = form_for([item.objective for item in wanted], start, task)
    reading = make_reading(task, start, tokenizer, encoder, length=length, seed=stage.seed, tuning=stage.tuning)
    problem: Problem = labels.problem if labels else "class"  # type: ignore[assignment]
    demonstrated = demonstrating(stage, wanted, reading)
    listed = listed_files(stage, root, wanted, objectives, labels, demonstrated, reading, cache)
    leaves = make_leaves(stage, wanted, labels, demonstrated, reading, cache, progress)
    if any(plainly_chats(leaf.renderer) for leaf in leaves):  # the model leaves with what it was trained with
        tokenizer.chat_template = plain_template(encoder.bos is not None)
    chosen, tables = held_out_sets(stage, leaves, listed, seen, reading, cache, progress, notes)
    if stage.max_forgetting is not None and not any(h.role == "retained" for h in chosen):
        raise _no_gate()  # a replay source so small that nothing of it fell into the held-out share
    most, spare = stage.evaluation.max_tokens, len(reading.before) - len(reading.without.before)
    held_out = [as_read(c, reading, most, notes, problem=problem) for c in chosen]
    before = [as_read(c, reading.without, most, [], spare=spare, problem=problem) for c in chosen]
    tasks = [make_asked(task, reading, root, f"evaluation.tasks[{i}]") for i, task in enumerate(stage.evaluation.tasks)]
    notes += [note for asked in tasks for note in asked.notes]
    kept_out = [t["digest"] for t in tables] + [asked.tested_N for asked in tasks]
    excluded = np.unique(np.concatenate(kept_out)) if kept_out else None
    check_labels(chosen, leaves, excluded, cache, notes)
    rows = tuple(
        make_rows(
            leaf.wanted.objective,
            leaf.store,
            reading,
            held_out=leaf.held_out,
            excluded=excluded,
            most=stage.data.max_document_tokens,
            problem=problem,
            words=leaf.wanted.wording.words,
        )
        for leaf in leaves
    )
    for leaf, packed in zip(leaves, rows, strict=True):
        if not packed.ledger.trained:
            raise DataError(
                f"nothing of '{leaf.name}' is left to train on: {packed.ledger.read:,} tokens read, "
                f"{packed.ledger.held_out:,} held out, {packed.ledger.dropped:,} dropped",
                where=leaf.files.where,
                expected="documents of at least two tokens that are not in a held-out set",
            )
        if packed.ledger.dropped:
            notes.append(
                f"{leaf.name}: {packed.ledger.dropped:,} tokens are dropped "
                "(copies of held-out documents, or documents of one token)"
            )
        if leaf.selection:
            notes.append(f"{leaf.name}: {selected(leaf.selection)}")
        if leaf.made_by:
            notes.append(f"{leaf.name}: self-made text, written by {leaf.made_by}; not what that model was trained on")
        notes += [f"{leaf.name}: {said}" for said in (*left_out(leaf.store.skipped), *lost(packed))]
    if reading.added.after and task == "causal" and all(leaf.store.kind in RUNNING for leaf in leaves):
        raise StageError(
            "vectors behind running text would never be trained: nothing that a decoder predicts stands behind them",
            where="tuning.template",
            expected="vectors before {x}, or rows with answers",
        )
    shares = _shares(stage, leaves, excluded, notes)
    order = make_order(stage, leaves, rows, shares, notes, start)
    steps, tokens = order.steps, order.tokens
    schedule = make_schedule(stage.schedule, steps, tokens, start)
    looked_at = [c for c in chosen if c.role != "test"]
    choice = make_rule(stage.save.choose, held_out, steps, tokens, schedule)
    return Plan(
        stage=stage,
        root=root,
        output=(root / (stage.output or f"runs/{stage.name}")).resolve(),
        start=start,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        context=length,
        leaves=tuple(leaves),
        rows=rows,
        task=task,
        objectives=objectives,
        teachers=teachers_for(objectives, start, task, tokenizer, vocabulary, root),
        weighed=tuple(leaf.wanted.weighed for leaf in leaves),
        problem=problem,
        layer=_task_layer(labels, reading.pad, stage.seed, form) if task in ("classify", "tag") else None,
        reading=reading,
        mixture=order.mixture,
        asked=order.asked,
        steps=steps,
        tokens=tokens,
        schedule=schedule,
        held_out=tuple(held_out),
        held_out_before=tuple(before),
        pseudo=_pseudo(stage, task, looked_at, reading),
        pseudo_before=_pseudo(stage, task, looked_at, reading.without),
        tasks=tuple(framed(asked, reading) for asked in tasks),
        tasks_before=tuple(framed(asked, reading.without) for asked in tasks),
        choice=choice,
        seen=seen,
        overlap=overlaps(stage, root, leaves, held_out, cache, notes),
        notes=tuple(notes),
        cache=cache,
    )


def _shares(stage: s.Stage, leaves: Sequence[Leaf], excluded: np.ndarray | None, notes: list[str]) -> tuple[float, ...]:
    """The share of each source; where `data.mixing` parts what is left, by the documents that may be trained on."""
    if stage.data.mixing is None:
        return stage.shares()
    examples = {source.name: 0 for source in stage.data.sources}
    for leaf in leaves:
        examples[leaf.wanted.source] += len(keep(leaf.store, held_out=leaf.held_out, excluded=excluded).documents)
    shares = stage.shares(examples)
    left_out = [source.name for source in stage.data.sources if source.share is None]
    notes.append(told(stage.data.mixing, dict(zip(examples, shares, strict=True)), examples, left_out))
    return shares


def _pseudo(stage: s.Stage, task: Task, chosen: Sequence[Chosen], reading: Reading) -> tuple[OneByOne, ...]:
    """Every set of running text, to be masked token by token. Raises `StageError` for a model that fills in no masks."""
    limit = stage.evaluation.pseudo_perplexity
    if limit and task != "masked":
        raise StageError(
            f"pseudo-perplexity is of masked language models, and {reading.start.name} is none",
            where="evaluation.pseudo_perplexity",
            expected="0, or an encoder under the objective masked",
        )
    return tuple(one_by_one(c, reading, limit) for c in chosen if c.store.kind in RUNNING) if limit else ()


_PROBLEMS = {
    "class": "single_label_classification",
    "multi": "multi_label_classification",
    "number": "regression",
    "tags": "single_label_classification",
}


def _task_layer(labels: Labels | None, pad: int, seed: int, form: Representation | None) -> TaskLayer | None:
    """The task layer of a classifier; a number is what its only output says."""
    if labels is None:
        return None
    names = tuple(str(name) for name in labels.names) or ("number",)
    return TaskLayer(names, _PROBLEMS[labels.problem], pad, seed, form)  # type: ignore[arg-type]


def _has_retained(stage: s.Stage) -> bool:
    """Whether a retained set can be had: named, or held out of a replay source."""
    return bool(stage.evaluation.retained) or any(
        # What the origins of a replay of everything hold out is known later.
        source.seen_so_far or (source.role == "replay" and source.held_out != 0)
        for source in stage.data.sources
    )


def _no_gate() -> StageError:
    return StageError(
        "there is no retained set to hold the gate against",
        where="max_forgetting",
        way_out="name old text under evaluation.retained, or give a source with role: replay a `held_out` share",
    )
