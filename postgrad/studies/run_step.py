"""Run one step of a study (training, generated text, importance, blend) as a stream of progress events.

Outputs are stored under the step's key, so they are found again when an arm is renamed. An interrupted step resumes; a
finished one is not repeated.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from typing_extensions import TypedDict

from postgrad.commands import importance, synthesize
from postgrad.config.quantities import parse_token_count
from postgrad.config.stage_file import parse_recorded_stage, parse_stage
from postgrad.distributed.world import World
from postgrad.errors import ModelError, StageError
from postgrad.evaluation import before_after
from postgrad.hardware import machine
from postgrad.lineage.metrics import EvaluationRow
from postgrad.lineage.record import RECORD, read_record
from postgrad.models import interpolate
from postgrad.models.location import locate_model
from postgrad.models.model import wrap_model
from postgrad.models.pretrained import load_tokenizer, stored_dtype
from postgrad.models.published_vocabulary import publish_pretrained
from postgrad.plan.plan import make_plan
from postgrad.run import events as r
from postgrad.run.run import run_stage
from postgrad.run.run_folder import MODEL
from postgrad.storage.checked_files import read_checked_json, write_checked_json
from postgrad.storage.read_json import Value
from postgrad.studies.step_graph import Step, StepGraph, StepKind, resolve_step_references
from postgrad.tuning.open_model import open_model

MACHINE_FILE = "machine.json"
NOTES_FOLDER = "notes"
_SUFFIXES: Mapping[StepKind, str] = {"train": "", "blend": "", "write": ".jsonl", "measure": ".safetensors"}

Phase = Literal["training", "evaluation", "making", "other"]


@dataclass(frozen=True)
class StepProgress:
    """Progress of a step: `done` of `total` training steps, tokens or labels."""

    key: str
    activity: str
    done: int
    total: int
    last_evaluation: EvaluationRow | None = None
    """Metrics of the run's latest evaluation."""


@dataclass(frozen=True)
class StepStopped:
    """The user interrupted the step; it resumes from here."""

    key: str


@dataclass(frozen=True)
class StepWarning:
    """A warning from a run."""

    key: str
    message: str


StepEvent = StepProgress | StepStopped | StepWarning


@dataclass(frozen=True)
class StudyFolder:
    """Folders of a study: outputs, runs, the root of relative paths, and the cache."""

    path: Path
    runs_folder: Path
    root: Path
    cache: Path

    def step_path(self, step: Step) -> Path:
        """Output path of a step, also when it was created under another slug."""
        within = self.runs_folder / ("runs" if step.kind in ("train", "blend") else "made")
        ending = _SUFFIXES[step.kind]
        there = sorted(within.glob(f"*-{step.key}{ending}"))
        return there[0] if there else within / f"{step.slug}-{step.key}{ending}"

    def is_finished(self, step: Step) -> bool:
        """Whether a step is complete."""
        place = self.step_path(step)
        match step.kind:
            case "train":
                return (place / RECORD).exists() and read_record(place).status != "stopped"
            case "blend":
                return (place / "scores" / "after.npz").exists()
            case _:
                return place.exists()

    def read_note(self, step: Step) -> StepNote:
        """Cost of a step."""
        return read_study_json(self.runs_folder / NOTES_FOLDER / f"{step.key}.json", StepNote)

    @property
    def machine(self) -> StudyMachine:
        """Compute settings shared by all runs of the study, chosen once so that arms do not differ in them."""
        return read_study_json(self.runs_folder / MACHINE_FILE, StudyMachine)

    def resolve_stage(self, graph: StepGraph, step: Step) -> dict[str, Any]:
        """The stage of a step as plain data, with all step references resolved."""
        whole = resolve_step_references(step.spec, lambda key: str(self.step_path(graph.steps[key])))
        compute = {**self.machine.get("compute", {}), **(whole.get("compute") or {})}
        return {**whole, "output": str(self.step_path(step)), **({"compute": compute} if compute else {})}


class StepNote(TypedDict, total=False):
    """The recorded cost of a step."""

    seconds: dict[str, float]
    """By phase."""
    peak_memory: int
    """Of the accelerator, in bytes."""


class StudyMachine(TypedDict, total=False):
    """Compute settings shared by all runs of a study, with the reasons."""

    compute: dict[str, Any]
    reasons: dict[str, str]


def read_study_json(path: Path, kind: type[Value]) -> Value:
    """A JSON document of a study's folder; empty where there is none. Raises `StageError` for a broken file."""
    if not path.exists():
        return kind()
    return read_checked_json(path, kind, error=StageError, hint="remove this file; it is created again")


@dataclass
class PhaseTimer:
    """Accumulates seconds by phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    def time_events(self, events: Iterator[r.RunEvent]) -> Iterator[r.RunEvent]:
        """Pass through the events of a run, timing each by the kind of work it reports."""
        doing: Phase | None = None
        while True:
            begin = time.perf_counter()
            event = next(events, None)
            phase = doing
            if phase is None:
                phase = {r.StepCompleted: "training", r.EvaluationCompleted: "evaluation"}.get(type(event), "other")  # type: ignore[arg-type]
            self.add(phase, time.perf_counter() - begin)
            if event is None:
                return
            doing = ("evaluation" if event.is_evaluation else "other") if isinstance(event, r.PhaseStarted) else None
            yield event

    def add(self, phase: str, seconds: float) -> None:
        """Add seconds to a phase."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds


def run_step(graph: StepGraph, step: Step, folder: StudyFolder, command: str) -> Iterator[StepEvent]:
    """Run a step. Raises the error of whatever fails; partial output is kept where a step can resume."""
    clock, begin = PhaseTimer(), time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        match step.kind:
            case "train":
                yield from _run_training(graph, step, folder, command, clock)
            case "write":
                yield from _generate_text(graph, step, folder)
            case "measure":
                yield from _measure_importance(graph, step, folder)
            case "blend":
                yield from _blend_models(graph, step, folder, clock)
    finally:
        rest = time.perf_counter() - begin - sum(clock.seconds.values())
        clock.add("other" if step.kind == "train" else "making", rest)
        _update_note(folder, step, clock)


def _update_note(folder: StudyFolder, step: Step, timer: PhaseTimer) -> None:
    """Add to the recorded cost of a step, which may span several resumes."""
    known = folder.read_note(step)
    seconds = PhaseTimer(known.get("seconds", {}))
    for phase, value in timer.seconds.items():
        seconds.add(phase, value)
    note: StepNote = {"seconds": seconds.seconds}
    if torch.cuda.is_available():
        note["peak_memory"] = max(known.get("peak_memory", 0), torch.cuda.max_memory_allocated())
    write_checked_json(folder.runs_folder / NOTES_FOLDER / f"{step.key}.json", note)


def _run_training(
    graph: StepGraph, step: Step, folder: StudyFolder, command: str, timer: PhaseTimer
) -> Iterator[StepEvent]:
    plan = make_plan(parse_stage(folder.resolve_stage(graph, step), step.slug), folder.root, folder.cache)
    done, row = 0, None
    events = run_stage(plan, command=command, cache=folder.cache)
    for event in timer.time_events(events):
        match event:
            case r.RunStarted():
                yield StepProgress(step.key, "training", event.step, plan.steps, row)
            case r.StepCompleted():
                done = event.report.step
                yield StepProgress(step.key, "training", done, plan.steps, row)
            case r.EvaluationCompleted():
                row = event.row
                yield StepProgress(step.key, "training", done, plan.steps, row)
            case r.PhaseStarted():
                yield StepProgress(step.key, event.message, done, plan.steps, row)
            case r.WarningMessage():
                yield StepWarning(step.key, event.message)
            case r.RunStopped():
                yield StepStopped(step.key)


def _generate_text(graph: StepGraph, step: Step, folder: StudyFolder) -> Iterator[StepEvent]:
    """Generate replay text with the base; resumes after the last complete batch."""
    what, out = _resolve_spec(graph, step, folder), folder.step_path(step)
    out.parent.mkdir(parents=True, exist_ok=True)
    wish = synthesize.SynthesisRequest(what["tokens"], what["longest"])
    for event in synthesize.synthesize(_model_path(what["model"], folder), out, wish):
        if isinstance(event, synthesize.SynthesisProgress):
            yield StepProgress(step.key, "writing", event.tokens, event.target_tokens)


def _measure_importance(graph: StepGraph, step: Step, folder: StudyFolder) -> Iterator[StepEvent]:
    """Measure the importance of each weight on old text."""
    what, out = _resolve_spec(graph, step, folder), folder.step_path(step)
    out.parent.mkdir(parents=True, exist_ok=True)
    tokens = parse_token_count(str(what["tokens"]), "importance.tokens")
    yield StepProgress(step.key, "measuring", 0, tokens)
    importance.measure_importance(
        _model_path(what["model"], folder),
        [str(folder.root / what["path"])],
        out=out,
        tokens=str(what["tokens"]),
        kind=what["kind"],
        cache=folder.cache,
    )
    yield StepProgress(step.key, "measuring", tokens, tokens)


def _blend_models(graph: StepGraph, step: Step, folder: StudyFolder, timer: PhaseTimer) -> Iterator[StepEvent]:
    """Interpolate between the base and an arm's model, and score it on the arm's held-out sets."""
    what, home = _resolve_spec(graph, step, folder), folder.step_path(step)
    run = Path(what["run"])
    yield StepProgress(step.key, "blending", 0, 1)
    machine.tune_allocator()
    begun = locate_model(_model_path(what["start"], folder), folder.root)
    start, end = open_model(begun), open_model(locate_model(str(run), folder.root))
    if end.tunings:
        raise ModelError(
            f"`{end.tunings[-1].kind}` of {run.name} does not change base weights, so there is nothing to interpolate"
        )
    between = interpolate.copy_weights(start.model), interpolate.copy_weights(end.model)
    interpolate.refuse_other_shapes(
        *between,
        (begun.name, run.name),
        interpolate.block_parameter_names(end.model),
        has_task_layer=end.task.is_classifier,
    )
    interpolate.interpolate_weights(end.model, *between, what["weight"])
    if not (home / MODEL).exists():
        dtype, tokenizer = stored_dtype(begun), load_tokenizer(begun)
        publish_pretrained(home / MODEL, end.model, tokenizer, dtype=dtype)
    record = read_record(run)
    plan = make_plan(parse_recorded_stage(record.stage, run.name), folder.root, folder.cache)
    world = World(machine.default_device())
    model = wrap_model(end.model, end.task).to(world.device)
    begin = time.perf_counter()
    scores = before_after.score_sets(model, plan.evaluation.sets, context=plan.model.context_length, world=world)
    timer.add("evaluation", time.perf_counter() - begin)
    before_after.write_scores(home / "scores" / "after.npz", scores)
    yield StepProgress(step.key, "blending", 1, 1)


def _resolve_spec(graph: StepGraph, step: Step, folder: StudyFolder) -> dict[str, Any]:
    return resolve_step_references(step.spec, lambda key: str(folder.step_path(graph.steps[key])))


def _model_path(name: str, folder: StudyFolder) -> str:
    """Path of a model, or its name on the Hub."""
    place = folder.root / name
    return str(place) if place.exists() else name
