"""Plan a study: its runs, their tokens, errors in any arm, and a timed estimate.

Every stage is planned on its real texts with a placeholder for models that are not trained yet: the untrained base. An arm
that cannot finish its budget is reported before anything is trained. For each kind of run a few micro-batches and some
held-out text are timed on this machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from postgrad.check.replay_cost import check_replay
from postgrad.check.teacher_cost import check_teachers
from postgrad.config.stage import Stage
from postgrad.config.stage_file import parse_stage
from postgrad.distributed.world import World
from postgrad.errors import PostgradError, StageError
from postgrad.evaluation import before_after
from postgrad.hardware import machine
from postgrad.plan.plan import Plan, make_plan
from postgrad.plan.start_model import resolve_start_model
from postgrad.reports.html.notation import format_compact, format_duration
from postgrad.reports.html.table import Cell, Column, Number, Table, count_cell, text_cell
from postgrad.run.build import choose_execution
from postgrad.run.milestones import evaluation_steps
from postgrad.run.tuned_model import make_tuned_model
from postgrad.storage.checked_files import write_checked_json
from postgrad.storage.fingerprint import fingerprint
from postgrad.studies.run_step import MACHINE_FILE
from postgrad.studies.run_study import PreparedStudy
from postgrad.studies.step_graph import Step, resolve_step_references

_TIMED_SCORE_TOKENS = 10_000
_PASSES_PER_TOKEN = {"write": 60.0, "measure": 3.0}
"""Cost per token relative to a trained token: text is generated one token at a time."""
_RUN_OVERHEAD = 1.0
"""Seconds of overhead per run: loading, publishing, its page."""


@dataclass(frozen=True)
class RunTiming:
    """Seconds per trained token, per scored token, and for planning a kind of run."""

    trained_token: float
    scored_token: float
    planning: float


@dataclass
class StudyForecast:
    """Estimated seconds by step, notes and errors by arm."""

    seconds: dict[str, float] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    errors: dict[str, dict[str, None]] = field(default_factory=dict)
    """The arms in which each error occurs."""


def forecast_study(
    prepared: PreparedStudy, report_progress: Callable[[str], None] = lambda text: None
) -> StudyForecast:
    """Plan every unfinished run, and time one of each kind.

    Raises a `StageError` that names every arm that cannot run.
    """
    machine.tune_allocator()
    found, paces = StudyForecast(), dict[str, RunTiming]()
    planned: dict[str, Plan | PostgradError] = {}
    took = 0.0
    world = World(machine.default_device())
    untrained = cache(lambda: _untrained_base(prepared))
    left = [key for key in prepared.remaining_steps if prepared.graph.steps[key].kind == "train"]
    for number, key in enumerate(left, 1):
        step = prepared.graph.steps[key]
        arms = ["the base"] if key == prepared.graph.base_step else prepared.graph.dependent_arms(key)
        try:
            stand_in = _placeholder_stage(prepared, step, untrained)
        except PostgradError as error:  # a base that cannot be trained: reported for its own step
            found.errors.setdefault(str(error), {})["the base"] = None
            continue
        alike = fingerprint(stand_in.model_dump(mode="json", exclude={"name": True, "output": True, "seed": True}))
        if alike not in planned:
            report_progress(f"planning {step.slug} ({number} of {len(left)} runs)")
            begin = time.perf_counter()
            try:
                planned[alike] = make_plan(stand_in, prepared.folder.root, prepared.folder.cache)
            except PostgradError as error:
                planned[alike] = error
            took = time.perf_counter() - begin
        plan = planned[alike]
        for arm in arms:
            if isinstance(plan, PostgradError):
                found.errors.setdefault(str(plan), {})[arm] = None
            else:
                _add_notes(found, arm, plan)
        if isinstance(plan, PostgradError):
            continue
        sort = _timing_key(plan)
        if sort not in paces:
            report_progress(f"timing {step.slug}")
            paces[sort] = _time_run(prepared, plan, world, took)
        found.seconds[key] = _run_seconds(plan, paces[sort])
    if found.errors:
        listed = "\n".join(f"  {', '.join(arms)}: {error}" for error, arms in found.errors.items())
        named = {arm for arms in found.errors.values() for arm in arms}
        what = f"{len(named)} arm{'s' * (len(named) > 1)}" if "the base" not in named else "the base"
        raise StageError(
            f"{what} cannot run; nothing was trained\n{listed}",
            where=str(prepared.file),
            hint="fix or remove these arms",
        )
    if paces:
        first = next(iter(paces.values()))
        for key in prepared.remaining_steps:
            step = prepared.graph.steps[key]
            if step.kind in _PASSES_PER_TOKEN:
                found.seconds[key] = _PASSES_PER_TOKEN[step.kind] * first.trained_token * float(step.spec["tokens"])
            elif step.kind == "blend":
                found.seconds[key] = _RUN_OVERHEAD
    return found


def _add_notes(forecast: StudyForecast, arm: str, plan: Plan) -> None:
    """Collect a plan's notes (contamination, passes) by arm."""
    for note in (
        plan.notes[1:] if plan.model.start.scratch_recipe else plan.notes
    ):  # the first note describes the placeholder model
        known = forecast.notes.setdefault(note, [])
        if arm not in known:
            known.append(arm)


def _placeholder_stage(prepared: PreparedStudy, step: Step, get_untrained_base: Callable[[], str]) -> Stage:
    """The stage of a step with placeholders for models and texts that do not exist yet."""
    work, folder = prepared.graph, prepared.folder
    stage = folder.resolve_stage(work, step)
    if isinstance(stage["model"], str) and not (folder.root / stage["model"]).exists() and work.base_step is not None:
        stage["model"] = get_untrained_base()
    elif isinstance(stage["model"], str) and stage["model"].startswith(str(folder.runs_folder)):
        there = (folder.root / stage["model"] / "model").exists()
        stage["model"] = (
            stage["model"] if there else prepared.study.base if work.base_step is None else get_untrained_base()
        )
    elif isinstance(stage["model"], dict) and str(stage["model"].get("config", "")).startswith(str(folder.runs_folder)):
        named = stage["model"]["config"] if Path(stage["model"]["config"]).exists() else get_untrained_base()
        stage["model"] = {"config": named, "tokenizer": named}
    old = prepared.study.old.model_dump(mode="json", exclude_defaults=True) if prepared.study.old else None
    sources = []
    for source in stage["data"]["sources"]:
        missing = source.get("seen_so_far") or str(source.get("path", "")).startswith(str(folder.runs_folder))
        if missing and not Path(str(source.get("path", ""))).is_file():
            stand_in = old or prepared.study.new[0].model_dump(mode="json", exclude_defaults=True)
            kept = {key: source[key] for key in ("name", "share", "role") if key in source}
            source = {**stand_in, **kept, "max_passes": 1e9}
        sources.append(source)
    penalties = [
        p for p in stage.get("penalties", []) if not str(p.get("importance") or "").startswith(str(folder.runs_folder))
    ]
    moments = {key: value for key, value in (stage.get("optimizer") or {}).items() if key != "moments"}
    whole = {**stage, "data": {**stage["data"], "sources": sources}, "penalties": penalties, "optimizer": moments}
    return parse_stage(whole, step.slug)


def _untrained_base(prepared: PreparedStudy) -> str:
    """Folder of the untrained base, created in the cache when missing."""
    assert prepared.graph.base_step is not None
    base = prepared.graph.steps[prepared.graph.base_step]
    place = prepared.folder.step_path(base) / "model"
    if place.exists():
        return str(place)
    stage = parse_stage(resolve_step_references(base.spec, lambda key: f"@{key}"), base.slug)
    start = resolve_start_model(stage, prepared.folder.root, prepared.folder.cache)
    assert start.folder is not None  # a new model always has a folder
    return str(start.folder)


def _timing_key(plan: Plan) -> str:
    """Key of runs that share their time per token."""
    stage = plan.stage
    return fingerprint(
        [
            stage.data.sequence_length,
            stage.batch.model_dump(mode="json"),
            [o.kind for o in plan.objectives],
            stage.tuning.model_dump(mode="json"),
            stage.compute.model_dump(mode="json"),
        ]
    )


def _time_run(prepared: PreparedStudy, plan: Plan, world: World, planning_seconds: float) -> RunTiming:
    """Time one kind of run; the first one's dtype and threads become those of the whole study."""
    subject = make_tuned_model(plan, world)
    execution = choose_execution(plan, subject, world)
    place = prepared.folder.runs_folder / MACHINE_FILE
    if not place.exists():
        kept = {"dtype": execution.dtype, "threads": execution.threads}
        prepared.folder.runs_folder.mkdir(parents=True, exist_ok=True)
        write_checked_json(place, {"compute": kept, "reasons": execution.reasons})
    costs = check_teachers(plan, subject, execution, world)
    more = sum(cost.record.get("share_of_step", 0.0) + cost.record.get("writing_share_of_step", 0.0) for cost in costs)
    more += sum(cost.record["share_of_step"] for cost in check_replay(plan, subject, execution))
    more += plan.sharp_steps / plan.steps
    held = plan.evaluation.scored_sets[0].take_tokens(_TIMED_SCORE_TOKENS)
    begin = time.perf_counter()
    with subject.tuning.disable() if subject.tuning.additive else nullcontext():
        scores = before_after.score_sets(subject.model, [held], context=plan.model.context_length, world=world)
    scored = max(int(scores[held.name].tokens_W.sum()), 1)
    score = (time.perf_counter() - begin) / scored
    return RunTiming(execution.seconds * (1 + more) / max(plan.tokens, 1), score, planning_seconds)


def _run_seconds(plan: Plan, timing: RunTiming) -> float:
    """Estimated seconds of a run: training, evaluations, final scores and overhead."""
    evaluation = plan.stage.evaluation
    looks = len(evaluation_steps(evaluation.every, plan.steps, plan.tokens)) + 1
    tokens = [held.tokens for held in plan.evaluation.sets]
    looked = sum(min(evaluation.eval_tokens, count) for count in tokens)
    after = sum(min(evaluation.max_tokens, count) for count in tokens)
    return (
        plan.tokens * timing.trained_token
        + (looks * looked + after) * timing.scored_token
        + timing.planning
        + _RUN_OVERHEAD
    )


# -- report ------------------------------------------------------------------------------------------------------------


def forecast_record(prepared: PreparedStudy, forecast: StudyForecast) -> dict[str, Any]:
    """The forecast as plain data."""
    work = prepared.graph
    left = set(prepared.remaining_steps)
    arms = []
    for name in prepared.study.arms:
        chains = work.arm_chains(name)
        own = list(dict.fromkeys(key for chain in chains for key in chain.steps if work.steps[key].kind == "train"))
        arms.append(
            {
                "name": name,
                "seeds": [chain.seed for chain in chains],
                "runs": len(own),
                "tokens": sum(work.steps[key].tokens for key in own),
                "left": sum(key in left for key in own),
                "seconds": sum(forecast.seconds.get(key, 0.0) for key in own),
            }
        )
    runs = work.training_steps
    return {
        "name": prepared.study.name,
        "folder": str(prepared.folder.path),
        "arms": arms,
        "runs": len(runs),
        "shared": work.unshared_run_count - len(runs),
        "left": sum(key in left for key in runs),
        "tokens": sum(work.steps[key].tokens for key in runs),
        "seconds": sum(forecast.seconds.values()),
        "base": {"tokens": work.steps[work.base_step].tokens} if work.base_step else {"name": prepared.study.base},
        "notes": [{"note": note, "arms": arms} for note, arms in forecast.notes.items()],
        "machine": prepared.folder.machine.get("compute", {}),
    }


def count_devices() -> int:
    """Number of steps that run at once on this machine."""
    return max(1, torch.cuda.device_count())


def forecast_text(prepared: PreparedStudy, record: Mapping[str, Any], device_count: int) -> str:
    """The forecast as text: arms, shared runs, tokens and time."""
    rows = [
        (
            text_cell(arm["name"]),
            text_cell(", ".join(map(str, arm["seeds"]))),
            count_cell(arm["runs"]),
            Cell((Number(format_compact(arm["tokens"]), arm["tokens"]),)),
            Cell((Number(format_duration(arm["seconds"]) if arm["left"] else "done", arm["seconds"]),)),
        )
        for arm in record["arms"]
    ]
    columns = (
        Column("arm", is_text=True), Column("seeds", is_text=True), Column("runs"), Column("tokens"), Column("time")
    )  # fmt: skip
    table = Table(f"{prepared.study.name}: {len(rows)} arms", columns, tuple(rows)).text()
    base = record["base"]
    began = (
        f"the base is pretrained on {format_compact(base['tokens'])} tokens of old text, once"
        if "tokens" in base
        else f"the base is {base['name']}"
    )
    each = record["seconds"] / device_count
    beside = f" on {device_count} devices" if device_count > 1 else ""
    how = record["machine"]
    lines = [
        table,
        f"{began}; {record['runs']} runs of {format_compact(record['tokens'])} tokens in all, "
        f"{record['shared']} shared between arms; "
        f"{record['left']} unfinished",
        f"time: about {format_duration(each)}{beside}, from timed micro-batches and scored text"
        + (f"; all runs in {how['dtype']} with {how['threads']} thread{'s' * (how['threads'] > 1)}" if how else "")
        if record["left"]
        else "nothing is left to train",
    ]
    for item in record["notes"]:
        arms = item["arms"]
        of = "all arms" if len(arms) == len(record["arms"]) else ", ".join(arms)
        lines.append(f"note ({of}): {item['note']}")
    return "\n".join(lines)
