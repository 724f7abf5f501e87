"""How is one step of a study made? Whatever it is, as a stream of how far it is, with its time by what it was spent on.

What is made lies under the study's folder by its key, so it is found again whatever the arm is called by then. A step that
was stopped goes on where it was; one that is there is not made again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from postgrad.commands import importance, synthesize
from postgrad.config.quantities import amount_of
from postgrad.config.stage_file import parse_stage
from postgrad.distributed.world import World
from postgrad.errors import ModelError, StageError
from postgrad.evaluation import before_after
from postgrad.hardware import machine
from postgrad.lineage.record import RECORD, read_record
from postgrad.models import interpolate
from postgrad.models.model import model_for
from postgrad.models.pretrained import load_tokenizer, locate, save_pretrained, stored_dtype
from postgrad.plan.plan import make_plan
from postgrad.run import run as r
from postgrad.storage.atomic import publish, write_atomically
from postgrad.studies.step_graph import Kind, Step, Work, resolved
from postgrad.tuning.open_model import open_model

MACHINE = "machine.json"
NOTES = "notes"
_ENDINGS: Mapping[Kind, str] = {"train": "", "blend": "", "write": ".jsonl", "measure": ".safetensors"}

Phase = Literal["training", "evaluation", "making", "other"]


@dataclass(frozen=True)
class Moved:
    """How far a step is: `done` of `total` steps, tokens or labels."""

    key: str
    what: str
    done: int
    total: int
    row: dict[str, Any] | None = None
    """The last look of a run."""


@dataclass(frozen=True)
class Halted:
    """The user stopped the step; it goes on from here."""

    key: str


@dataclass(frozen=True)
class Warned:
    """Something that the user should know of a run."""

    key: str
    what: str


StepEvent = Moved | Halted | Warned


@dataclass(frozen=True)
class Folder:
    """Where a study lives: its own folder, that of its runs, the one that paths in its file are relative to, and the cache."""

    home: Path
    shelf: Path
    root: Path
    cache: Path

    def place(self, step: Step) -> Path:
        """Where a step is made, or was under another name."""
        within = self.shelf / ("runs" if step.kind in ("train", "blend") else "made")
        ending = _ENDINGS[step.kind]
        there = sorted(within.glob(f"*-{step.key}{ending}"))
        return there[0] if there else within / f"{step.slug}-{step.key}{ending}"

    def made(self, step: Step) -> bool:
        """Whether a step is complete."""
        place = self.place(step)
        match step.kind:
            case "train":
                return (place / RECORD).exists() and read_record(place)["status"] != "stopped"
            case "blend":
                return (place / "scores" / "after.npz").exists()
            case _:
                return place.exists()

    def note(self, step: Step) -> dict[str, Any]:
        """What is known of how a step was made: its seconds by phase, and the most memory it took on an accelerator."""
        return kept(self.shelf / NOTES / f"{step.key}.json")

    @property
    def machine(self) -> dict[str, Any]:
        """How all runs of the study do their arithmetic: chosen once, so that no two arms differ in it."""
        return kept(self.shelf / MACHINE)

    def stage(self, work: Work, step: Step) -> dict[str, Any]:
        """The stage of a step with all places filled in, as plain data."""
        whole = resolved(step.what, lambda key: str(self.place(work.steps[key])))
        compute = {**self.machine.get("compute", {}), **(whole.get("compute") or {})}
        return {**whole, "output": str(self.place(step)), **({"compute": compute} if compute else {})}


def kept(place: Path) -> dict[str, Any]:
    """What a study keeps in a file of its own; empty where there is none. Raises `StageError` for a broken one."""
    if not place.exists():
        return {}
    try:
        found = json.loads(place.read_text())
    except ValueError as error:
        raise _broken(place, f"not JSON: {error}") from error
    if not isinstance(found, dict):
        raise _broken(place, "not a JSON object")
    return found


def _broken(place: Path, met: str) -> StageError:
    return StageError(met, where=str(place), way_out="remove this file; what it remembers is found out anew")


@dataclass
class Clock:
    """Seconds by what they were spent on."""

    seconds: dict[str, float] = field(default_factory=dict)

    def timed(self, events: Iterator[r.Event]) -> Iterator[r.Event]:
        """The events of a run; each one's time is that of what it reports, and the time after `Doing` of what it said."""
        doing: Phase | None = None
        while True:
            begin = time.perf_counter()
            event = next(events, None)
            phase = doing
            if phase is None:
                phase = {r.Stepped: "training", r.Looked: "evaluation"}.get(type(event), "other")  # type: ignore[arg-type]
            self.add(phase, time.perf_counter() - begin)
            if event is None:
                return
            doing = ("evaluation" if event.measuring else "other") if isinstance(event, r.Doing) else None
            yield event

    def add(self, phase: str, seconds: float) -> None:
        """Count seconds."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds


def carry_out(work: Work, step: Step, folder: Folder, command: str) -> Iterator[StepEvent]:
    """Make a step. Raises the error of whatever fails; what was made up to then is kept where a step can go on."""
    clock, begin = Clock(), time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        match step.kind:
            case "train":
                yield from _train(work, step, folder, command, clock)
            case "write":
                yield from _write(work, step, folder)
            case "measure":
                yield from _measure(work, step, folder)
            case "blend":
                yield from _blend(work, step, folder, clock)
    finally:
        rest = time.perf_counter() - begin - sum(clock.seconds.values())
        clock.add("other" if step.kind == "train" else "making", rest)
        _keep_note(folder, step, clock)


def _keep_note(folder: Folder, step: Step, clock: Clock) -> None:
    """Add to what is known of a step: it may have been made in several goes."""
    known = folder.note(step)
    seconds = Clock(known.get("seconds", {}))
    for phase, value in clock.seconds.items():
        seconds.add(phase, value)
    note: dict[str, Any] = {"seconds": seconds.seconds}
    if torch.cuda.is_available():
        note["peak_memory"] = max(known.get("peak_memory", 0), torch.cuda.max_memory_allocated())
    write_atomically(folder.shelf / NOTES / f"{step.key}.json", json.dumps(note))


def _train(work: Work, step: Step, folder: Folder, command: str, clock: Clock) -> Iterator[StepEvent]:
    plan = make_plan(parse_stage(folder.stage(work, step), step.slug), folder.root, folder.cache)
    done, row = 0, None
    events = r.run_stage(plan, command=command, cache=folder.cache)
    for event in clock.timed(events):
        match event:
            case r.Began():
                yield Moved(step.key, "training", event.step, plan.steps, row)
            case r.Stepped():
                done = event.report.step
                yield Moved(step.key, "training", done, plan.steps, row)
            case r.Looked():
                row = event.row
                yield Moved(step.key, "training", done, plan.steps, row)
            case r.Doing():
                yield Moved(step.key, event.what, done, plan.steps, row)
            case r.Warned():
                yield Warned(step.key, event.what)
            case r.Stopped():
                yield Halted(step.key)


def _write(work: Work, step: Step, folder: Folder) -> Iterator[StepEvent]:
    """The base's own text; it goes on behind the last whole batch."""
    what, out = _resolved(work, step, folder), folder.place(step)
    out.parent.mkdir(parents=True, exist_ok=True)
    wish = synthesize.Wish(what["tokens"], what["longest"])
    for written in synthesize.synthesize(_model(what["model"], folder), out, wish):
        yield Moved(step.key, "writing", written.tokens, written.wanted)


def _measure(work: Work, step: Step, folder: Folder) -> Iterator[StepEvent]:
    """What each weight matters, on old text."""
    what, out = _resolved(work, step, folder), folder.place(step)
    out.parent.mkdir(parents=True, exist_ok=True)
    tokens = amount_of(str(what["tokens"]), "importance.tokens")
    yield Moved(step.key, "measuring", 0, tokens)
    importance.measure_importance(
        _model(what["model"], folder),
        [str(folder.root / what["path"])],
        out=out,
        tokens=str(what["tokens"]),
        kind=what["kind"],
        onto=None,
        decay=0.9,
        dtype="float32",
        context=None,
        documents="auto",
        column=None,
        seed=0,
        force=False,
        base=None,
        cache=folder.cache,
        progress=lambda done, total: None,
    )
    yield Moved(step.key, "measuring", tokens, tokens)


def _blend(work: Work, step: Step, folder: Folder, clock: Clock) -> Iterator[StepEvent]:
    """The model between the base and an arm's, scored on what the arm was scored on."""
    what, home = _resolved(work, step, folder), folder.place(step)
    run = Path(what["run"])
    yield Moved(step.key, "blending", 0, 1)
    machine.tune_allocator()
    begun = locate(_model(what["start"], folder), folder.root)
    start, end = open_model(begun), open_model(locate(str(run), folder.root))
    if end.tunings:
        raise ModelError(f"`{end.tunings[-1].kind}` of {run.name} is no change of weights, so nothing lies between")
    between = interpolate.weights_of(start.model), interpolate.weights_of(end.model)
    interpolate.refuse_other_shapes(*between, (begun.name, run.name), interpolate.blocks_of(end.model))
    interpolate.put_between(end.model, *between, what["weight"])
    if not (home / r.MODEL).exists():
        dtype, tokenizer = stored_dtype(begun), load_tokenizer(begun)
        publish(home / r.MODEL, lambda staged: save_pretrained(end.model, tokenizer, staged, dtype=dtype))
    record = read_record(run)
    plan = make_plan(parse_stage(record["stage"], run.name), folder.root, folder.cache)
    world = World(machine.device())
    model = model_for(end.model, end.task).to(world.device)
    begin = time.perf_counter()
    scores = before_after.measure(model, plan.held_out, context=plan.context, world=world)
    clock.add("evaluation", time.perf_counter() - begin)
    before_after.write_scores(home / "scores" / "after.npz", scores)
    yield Moved(step.key, "blending", 1, 1)


def _resolved(work: Work, step: Step, folder: Folder) -> dict[str, Any]:
    return resolved(step.what, lambda key: str(folder.place(work.steps[key])))


def _model(name: str, folder: Folder) -> str:
    """A model's place, or its name on the Hub."""
    place = folder.root / name
    return str(place) if place.exists() else name
