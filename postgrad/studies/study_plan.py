"""What will a study do, and how long will it take? Its runs and their tokens, what is wrong with them, and a timed estimate.

Every stage is planned on its real texts with a model that stands in for the one that is not trained yet: the base before its
first step. So an arm that cannot finish its budget is told before anything is trained. For each sort of run some micro-batches
and some held-out text are timed on this machine.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from postgrad.check.teacher_cost import check_teaching
from postgrad.config.stage import Stage
from postgrad.config.stage_file import parse_stage
from postgrad.distributed.world import World
from postgrad.errors import PostgradError, StageError
from postgrad.evaluation import before_after
from postgrad.hardware import machine
from postgrad.plan.plan import Plan, make_plan
from postgrad.plan.start_model import start_of
from postgrad.reports.html.notation import compact, duration
from postgrad.reports.html.tables import Cell, Column, Number, Table, whole, words
from postgrad.run.build import choose_execution, make_subject
from postgrad.run.run import look_steps
from postgrad.storage.atomic import write_atomically
from postgrad.storage.fingerprint import fingerprint
from postgrad.studies.run_step import MACHINE
from postgrad.studies.run_study import Prepared
from postgrad.studies.step_graph import Step, resolved

_SCORED = 10_000
_MAKING = {"write": 60.0, "measure": 3.0}
"""Passes over a token that making takes, in the time of a trained one: text is written one token at a time."""
_AROUND = 1.0
"""Seconds around a run: loading, publishing, its page."""


@dataclass(frozen=True)
class Pace:
    """Seconds of a sort of run: of a trained token, of a scored one, and of planning."""

    train: float
    score: float
    plan: float


@dataclass
class Outlook:
    """What was found: seconds by step, notes by arm, and what cannot be."""

    seconds: dict[str, float] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    trouble: dict[str, dict[str, None]] = field(default_factory=dict)
    """The arms that each error was met in."""


def look_ahead(prepared: Prepared, say: Callable[[str], None] = lambda text: None) -> Outlook:
    """Plan every run that is not there, and time one of each sort.

    Raises `StageError` that names every arm which cannot be carried out.
    """
    machine.tune_allocator()
    found, paces = Outlook(), dict[str, Pace]()
    planned: dict[str, Plan | PostgradError] = {}
    took = 0.0
    world = World(machine.device())
    untrained = cache(lambda: _untrained(prepared))
    left = [key for key in prepared.left if prepared.work.steps[key].kind == "train"]
    for number, key in enumerate(left, 1):
        step = prepared.work.steps[key]
        arms = ["the base"] if key == prepared.work.base else prepared.work.arms_of(key)
        try:
            stand_in = _stand_in(prepared, step, untrained)
        except PostgradError as error:  # a base that cannot be made, which its own step is told for
            found.trouble.setdefault(str(error), {})["the base"] = None
            continue
        alike = fingerprint(stand_in.model_dump(mode="json", exclude={"name": True, "output": True, "seed": True}))
        if alike not in planned:
            say(f"planning {step.slug} ({number} of {len(left)} runs)")
            begin = time.perf_counter()
            try:
                planned[alike] = make_plan(stand_in, prepared.folder.root, prepared.folder.cache)
            except PostgradError as error:
                planned[alike] = error
            took = time.perf_counter() - begin
        plan = planned[alike]
        for arm in arms:
            if isinstance(plan, PostgradError):
                found.trouble.setdefault(str(plan), {})[arm] = None
            else:
                _notes(found, arm, plan)
        if isinstance(plan, PostgradError):
            continue
        sort = _sort(plan)
        if sort not in paces:
            say(f"timing {step.slug}")
            paces[sort] = _timed(prepared, plan, world, took)
        found.seconds[key] = _seconds(plan, paces[sort])
    if found.trouble:
        told = "\n".join(f"  {', '.join(arms)}: {error}" for error, arms in found.trouble.items())
        named = {arm for arms in found.trouble.values() for arm in arms}
        what = f"{len(named)} arm{'s' * (len(named) > 1)}" if "the base" not in named else "the base"
        raise StageError(
            f"{what} cannot be carried out; nothing was trained\n{told}",
            where=str(prepared.file),
            way_out="mend or leave out what is named",
        )
    if paces:
        first = next(iter(paces.values()))
        for key in prepared.left:
            step = prepared.work.steps[key]
            if step.kind in _MAKING:
                found.seconds[key] = _MAKING[step.kind] * first.train * float(step.what["tokens"])
            elif step.kind == "blend":
                found.seconds[key] = _AROUND
    return found


def _notes(found: Outlook, arm: str, plan: Plan) -> None:
    """What of a plan's notes matters for a study: overlap with what is held out, and passes."""
    for note in plan.notes[1:] if plan.start.made else plan.notes:  # the first one tells of the model that stands in
        known = found.notes.setdefault(note, [])
        if arm not in known:
            known.append(arm)


def _stand_in(prepared: Prepared, step: Step, untrained: Callable[[], str]) -> Stage:
    """The stage of a step on models and texts that are there already."""
    work, folder = prepared.work, prepared.folder
    stage = folder.stage(work, step)
    if isinstance(stage["model"], str) and not (folder.root / stage["model"]).exists() and work.base is not None:
        stage["model"] = untrained()
    elif isinstance(stage["model"], str) and stage["model"].startswith(str(folder.shelf)):
        there = (folder.root / stage["model"] / "model").exists()
        stage["model"] = stage["model"] if there else prepared.study.base if work.base is None else untrained()
    elif isinstance(stage["model"], dict) and str(stage["model"].get("config", "")).startswith(str(folder.shelf)):
        named = stage["model"]["config"] if Path(stage["model"]["config"]).exists() else untrained()
        stage["model"] = {"config": named, "tokenizer": named}
    old = prepared.study.old.model_dump(mode="json", exclude_defaults=True) if prepared.study.old else None
    sources = []
    for source in stage["data"]["sources"]:
        missing = source.get("seen_so_far") or str(source.get("path", "")).startswith(str(folder.shelf))
        if missing and not Path(str(source.get("path", ""))).is_file():
            stands = old or prepared.study.new[0].model_dump(mode="json", exclude_defaults=True)
            kept = {key: source[key] for key in ("name", "share", "role") if key in source}
            source = {**stands, **kept, "max_passes": 1e9}
        sources.append(source)
    penalties = [
        p for p in stage.get("penalties", []) if not str(p.get("importance") or "").startswith(str(folder.shelf))
    ]
    moments = {key: value for key, value in (stage.get("optimizer") or {}).items() if key != "moments"}
    whole = {**stage, "data": {**stage["data"], "sources": sources}, "penalties": penalties, "optimizer": moments}
    return parse_stage(whole, step.slug)


def _untrained(prepared: Prepared) -> str:
    """The folder of the base before its first step, which is made in the cache when it is not there."""
    assert prepared.work.base is not None
    base = prepared.work.steps[prepared.work.base]
    place = prepared.folder.place(base) / "model"
    if place.exists():
        return str(place)
    stage = parse_stage(resolved(base.what, lambda key: f"@{key}"), base.slug)
    start = start_of(stage, prepared.folder.root, prepared.folder.cache)
    assert start.folder is not None  # a new model always lies somewhere
    return str(start.folder)


def _sort(plan: Plan) -> str:
    """Runs of one sort take the same time for a token."""
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


def _timed(prepared: Prepared, plan: Plan, world: World, planning: float) -> Pace:
    """Time a sort of run; the first one's dtype and threads are those of all runs of the study."""
    subject = make_subject(plan, world)
    execution = choose_execution(plan, subject, world)
    place = prepared.folder.shelf / MACHINE
    if not place.exists():
        kept = {"dtype": execution.dtype, "threads": execution.threads}
        prepared.folder.shelf.mkdir(parents=True, exist_ok=True)
        write_atomically(place, json.dumps({"compute": kept, "reasons": execution.reasons}, indent=1))
    costs = check_teaching(plan, subject, execution, world)
    more = sum(cost.record.get("share_of_step", 0.0) + cost.record.get("writing_share_of_step", 0.0) for cost in costs)
    held = plan.looked_at[0].first(_SCORED)
    begin = time.perf_counter()
    with subject.tuning.off() if subject.tuning.additive else nullcontext():
        scores = before_after.measure(subject.model, [held], context=plan.context, world=world)
    scored = max(int(scores[held.name].tokens_W.sum()), 1)
    score = (time.perf_counter() - begin) / scored
    return Pace(execution.seconds * (1 + more) / max(plan.tokens, 1), score, planning)


def _seconds(plan: Plan, pace: Pace) -> float:
    """What a run will take: its training, its looks, its scores after, and what is around it."""
    evaluation = plan.stage.evaluation
    looks = len(look_steps(evaluation.every, plan.steps, plan.tokens)) + 1
    tokens = [held.tokens for held in plan.held_out]
    looked = sum(min(evaluation.during_tokens, count) for count in tokens)
    after = sum(min(evaluation.max_tokens, count) for count in tokens)
    return plan.tokens * pace.train + (looks * looked + after) * pace.score + pace.plan + _AROUND


# -- told --------------------------------------------------------------------------------------------------------------


def outlook_record(prepared: Prepared, outlook: Outlook) -> dict[str, Any]:
    """The plan as plain data."""
    work = prepared.work
    left = set(prepared.left)
    arms = []
    for name in prepared.study.arms:
        chains = work.of_arm(name)
        own = list(dict.fromkeys(key for chain in chains for key in chain.steps if work.steps[key].kind == "train"))
        arms.append(
            {
                "name": name,
                "seeds": [chain.seed for chain in chains],
                "runs": len(own),
                "tokens": sum(work.steps[key].tokens for key in own),
                "left": sum(key in left for key in own),
                "seconds": sum(outlook.seconds.get(key, 0.0) for key in own),
            }
        )
    runs = work.trained
    return {
        "name": prepared.study.name,
        "folder": str(prepared.folder.home),
        "arms": arms,
        "runs": len(runs),
        "shared": work.asked - len(runs),
        "left": sum(key in left for key in runs),
        "tokens": sum(work.steps[key].tokens for key in runs),
        "seconds": sum(outlook.seconds.values()),
        "base": {"tokens": work.steps[work.base].tokens} if work.base else {"name": prepared.study.base},
        "notes": [{"note": note, "arms": arms} for note, arms in outlook.notes.items()],
        "machine": prepared.folder.machine.get("compute", {}),
    }


def devices() -> int:
    """How many steps are made at once here."""
    return max(1, torch.cuda.device_count())


def outlook_text(prepared: Prepared, record: Mapping[str, Any], at_once: int) -> str:
    """The plan for people: arms, runs that are shared, tokens and time."""
    rows = [
        (
            words(arm["name"]),
            words(", ".join(map(str, arm["seeds"]))),
            whole(arm["runs"]),
            Cell((Number(compact(arm["tokens"]), arm["tokens"]),)),
            Cell((Number(duration(arm["seconds"]) if arm["left"] else "there", arm["seconds"]),)),
        )
        for arm in record["arms"]
    ]
    columns = (
        Column("arm", words=True), Column("seeds", words=True), Column("runs"), Column("tokens"), Column("time")
    )  # fmt: skip
    table = Table(f"{prepared.study.name}: {len(rows)} arms", columns, tuple(rows)).text()
    base = record["base"]
    began = (
        f"the base is pretrained on {compact(base['tokens'])} tokens of old text, once"
        if "tokens" in base
        else f"the base is {base['name']}"
    )
    each = record["seconds"] / at_once
    beside = f" on {at_once} devices" if at_once > 1 else ""
    how = record["machine"]
    lines = [
        table,
        f"{began}; {record['runs']} runs of {compact(record['tokens'])} tokens in all, {record['shared']} shared between arms; "
        f"{record['left']} are not there yet",
        f"time: about {duration(each)}{beside}, from timed micro-batches and scored text"
        + (f"; all runs in {how['dtype']} with {how['threads']} thread{'s' * (how['threads'] > 1)}" if how else "")
        if record["left"]
        else "nothing is left to train",
    ]
    for item in record["notes"]:
        arms = item["arms"]
        of = "all arms" if len(arms) == len(record["arms"]) else ", ".join(arms)
        lines.append(f"note ({of}): {item['note']}")
    return "\n".join(lines)
