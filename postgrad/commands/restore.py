"""How does a model get back what it lost, and keep what it has learnt since? On-policy distillation from what it was.

The model writes on from prompts of the old kind, and the earlier model judges every token (`on-policy`); meanwhile it is
held to itself on the new text (`distill` from its start). It is a stage like any other, and this writes it: among all looks
the one is published that is best on the old text, of those where no more than a given part of the new gain is lost; training
ends when enough is won back. So old and new change places: what is to be won back is `learned`, what must not be lost is
`retained`.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postgrad.config import stage as s
from postgrad.config.renamed_keys import upgrade_stage
from postgrad.config.stage_file import parse_stage
from postgrad.data.read.files import find_files
from postgrad.distributed.world import World
from postgrad.errors import StageError
from postgrad.evaluation import before_after
from postgrad.hardware import machine
from postgrad.lineage.record import Record, read_record
from postgrad.lineage.saved_plan import read_plan
from postgrad.models.model import wrap_model
from postgrad.models.pretrained import ModelLocation, locate_model
from postgrad.plan.plan import Plan, make_plan
from postgrad.plan.sources import make_replay_source
from postgrad.run.events import RunFinished
from postgrad.tuning.open_model import open_model, start_fingerprint

PROMPT_TOKENS, NEW_TOKENS = 32, 96
_PROMPT_SOURCE_NAME = "prompts"


@dataclass(frozen=True)
class RestoreRequest:
    """What is asked for. `until`: the share of the loss that is to be won back; `max_cost`: the share of the gain that may go.

    `kept`: the share of the trained tokens that are new text, on which the model is held to itself.
    """

    run: Path
    teacher: str | None
    prompts: tuple[str, ...]
    retained: tuple[str, ...]
    min_recovered: float
    max_regression: float
    steps: int
    self_distill_share: float
    learning_rate: float | None
    output: str | None


@dataclass(frozen=True)
class RestoreTarget:
    """The set that lost most, what the run and the earlier model lose on it, and what is enough; all in nats per token."""

    set_name: str
    run_loss: float
    teacher_loss: float
    target_loss: float
    gains: Mapping[str, tuple[float, float]]
    """Of each set that is to be kept: the earlier model's loss and the run's."""


@dataclass(frozen=True)
class Restoration:
    """The stage as it will be carried out."""

    plan: Plan
    target: RestoreTarget
    request: RestoreRequest


def plan_restoration(request: RestoreRequest, cache: Path) -> Restoration:
    """Work out the stage that wins back what a run has lost. Raises `StageError` when nothing was, or texts are missing."""
    machine.tune_allocator()
    root = Path.cwd()
    _check_request(request, root)
    record = read_record(request.run)
    if not record.changes:
        raise StageError(
            f"{request.run} has not finished", where="restore", hint="finish it with the same train command"
        )
    if record.model.task != "causal":
        raise StageError(
            f"{request.run} holds no model that writes on, so nothing it says could be judged",
            where="restore",
            expected="a run of a causal language model",
            hint="train it once more with replay, or `distill` on old text",
        )
    raw = _restore_stage(request, record, root)
    plan = make_plan(parse_stage(raw, "restore"), root, cache)
    teacher = plan.teachers[0]
    aim = _measure_target(plan, teacher, request, cache)
    raw["save"]["choose"] = {"set": aim.set_name, "stop_at": aim.target_loss, **_forgetting_limit(aim, request)}
    return Restoration(make_plan(parse_stage(raw, "restore"), root, cache), aim, request)


def _check_request(request: RestoreRequest, root: Path) -> None:
    """Raise what is wrong with what is asked for, told at the option that says it."""
    for option, fine, met, expected in (
        (
            "--until",
            request.min_recovered > 0,
            f"{request.min_recovered:.0%} of what was lost is nothing to win back",
            "more than 0%",
        ),
        (
            "--keep",
            request.self_distill_share < 1,
            f"{request.self_distill_share:.0%} of new text leaves nothing for the prompts",
            "less than 100%",
        ),
        (
            "--rate",
            request.learning_rate is None or 0 < request.learning_rate < math.inf,
            f"{request.learning_rate} is no rate",
            "a number above 0",
        ),
    ):
        if not fine:
            raise StageError(met, where=option, expected=expected)
    if request.teacher is not None:
        locate_model(request.teacher, root, where="--teacher")
    for option, paths in (("--prompts", request.prompts), ("--retained", request.retained)):
        for path in paths:
            find_files(path, root, option)


def _restore_stage(request: RestoreRequest, record: Record, root: Path) -> dict[str, Any]:
    """The stage as plain data, but for what is chosen by."""
    was, origin = upgrade_stage(record.stage), Path(record.stage_folder)
    kept = _new_sources(request) if request.self_distill_share else []
    prompts = _prompt_sources(request, root)
    share = 1.0 - (request.self_distill_share if kept else 0.0)
    per_row = share / NEW_TOKENS + (1 - share) / was["data"]["sequence_length"]
    sequences = was["batch"]["global_batch_size"]
    name = request.output or f"{request.run.name}-restored"
    lost = [_held_out_file(path, root) for path in request.retained] or _absolute_sets(
        was["evaluation"]["retained"], origin
    )
    if not lost:
        raise StageError(
            f"{request.run} names no file of old text that it was measured on",
            where="--retained",
            expected="held-out text of the kind that was lost",
        )
    return {
        "name": Path(name).name,
        "model": str(request.run.resolve()),
        "output": str(root / name if request.output else request.run.resolve().parent / name),
        "tokens": max(1, round(request.steps * sequences / per_row)),
        "seed": was["seed"],
        "data": {
            "sequence_length": max(was["data"]["sequence_length"], PROMPT_TOKENS + NEW_TOKENS + 32),
            "overlap": "off",
            "on_exhausted": "repeat",
            "sources": [{**source, "share": share / len(prompts)} for source in prompts]
            + [{**source, "share": source["share"] * request.self_distill_share} for source in kept],
        },
        "batch": {"global_batch_size": sequences},
        "schedule": {"kind": "constant", "peak": request.learning_rate or _peak_rate(was["schedule"]), "warmup": "5%"},
        "objectives": [
            {
                "kind": "on-policy",
                "teacher": _teacher_name(request, record),
                "prompt_tokens": PROMPT_TOKENS,
                "max_new_tokens": NEW_TOKENS,
                "on": [source["name"] for source in prompts],
            },
            *([{"kind": "distill", "on": [source["name"] for source in kept]}] if kept else []),
        ],
        "evaluation": {
            "learned": lost,
            "retained": _absolute_sets(was["evaluation"]["learned"], origin),
            "every": "5%",
            "max_tokens": was["evaluation"]["max_tokens"],
        },
        "save": {"every": "25%"},
        "compute": was["compute"],
    }


def _prompt_sources(request: RestoreRequest, root: Path) -> list[dict[str, Any]]:
    """What is gone on from: the files that are named, or what the run replayed."""
    if request.prompts:
        return [
            {
                "name": _PROMPT_SOURCE_NAME if len(request.prompts) == 1 else f"{_PROMPT_SOURCE_NAME}-{i + 1}",
                "path": str(root / path),
                **_PROMPT_SOURCE_DEFAULTS,
            }
            for i, path in enumerate(request.prompts)
        ]
    replayed = [source for source, _ in _trained_sources(request.run, "replay")]
    if not replayed:
        raise StageError(
            f"{request.run} replayed nothing that its model could go on from",
            where="--prompts",
            expected="text of the old kind, whose beginnings are prompts; it is not trained on",
        )
    return [
        {**source, **_PROMPT_SOURCE_DEFAULTS, "name": f"{_PROMPT_SOURCE_NAME}-{source['name']}"} for source in replayed
    ]


_PROMPT_SOURCE_DEFAULTS: dict[str, Any] = {"role": "new", "held_out": 0.0}
"""What is to be won back is what this stage learns."""


def _new_sources(request: RestoreRequest) -> list[dict[str, Any]]:
    """The new text of the run, in its shares."""
    sources = _trained_sources(request.run, "new")
    total = sum(share for _, share in sources)
    return [{**source, "role": "replay", "share": share / total} for source, share in sources]


def _trained_sources(run: Path, role: str) -> list[tuple[dict[str, Any], float]]:
    """The sources of one role of a run, as a stage file has them, with their shares of its tokens."""
    saved = read_plan(run)
    planned = {source.name: source for source in saved.plan.sources}
    return [
        (make_replay_source(source.name, source.origin), planned[source.name].share)
        for source in saved.resolved_sources
        if planned[source.name].role == role
    ]


def _absolute_sets(items: Sequence[Mapping[str, Any]], origin: Path) -> list[dict[str, Any]]:
    """Held-out files of another stage, wherever this one is."""
    return [{**item, "path": str(origin / item["path"]), "same_format_as": None} for item in items]


def _held_out_file(path: str, root: Path) -> dict[str, Any]:
    item = s.expand_held_out_file(path)
    return {**item, "path": str(root / item["path"])}


def _teacher_name(request: RestoreRequest, record: Record) -> str:
    """The earlier model: the one that is named, or the one that the run began with."""
    if request.teacher is not None:
        place = Path.cwd() / request.teacher
        return str(place) if place.exists() else request.teacher
    began = record.stage["model"]
    if not isinstance(began, str):
        raise StageError(
            f"{request.run} began with a model made anew, which knew nothing",
            where="--teacher",
            expected="an earlier model that knows what is to be won back",
        )
    place = Path(record.stage_folder) / began
    return str(place) if place.exists() else began


def _peak_rate(schedule: Mapping[str, Any]) -> float:
    """The highest rate of a schedule."""
    pieces = [rate for piece in schedule.get("pieces", ()) for rate in (piece.get("start"), piece.get("end"))]
    return max(rate for rate in (schedule.get("peak"), schedule.get("start"), *pieces) if rate)


def _measure_target(plan: Plan, teacher: ModelLocation, request: RestoreRequest, cache: Path) -> RestoreTarget:
    """What was lost and gained: both models on all of the stage's sets."""
    now, earlier = (_score_model(plan, start, cache) for start in (plan.model.start, teacher))
    lost = {h.name: now[h.name].nats - earlier[h.name].nats for h in plan.evaluation.sets if h.role == "learned"}
    name = max(lost, key=lambda set_: lost[set_])
    if lost[name] <= 0:
        raise StageError(
            f"{plan.model.start.name} has lost nothing that {teacher.name} knew: {now[name].nats:.4f} nats per token on {name}, "
            f"and {earlier[name].nats:.4f}",
            where="restore",
            expected="a run that has forgotten something",
        )
    return RestoreTarget(
        name,
        now[name].nats,
        earlier[name].nats,
        now[name].nats - request.min_recovered * lost[name],
        {h.name: (earlier[h.name].nats, now[h.name].nats) for h in plan.evaluation.sets if h.role == "retained"},
    )


def _score_model(plan: Plan, start: ModelLocation, cache: Path) -> before_after.AllScores:
    opened = open_model(start, plan.model.task, layer=plan.model.task_layer)
    world = World(machine.default_device())
    model = wrap_model(opened.model, opened.task).to(world.device)
    identity = start_fingerprint(start) or start.name
    return before_after.score_sets(
        model,
        plan.evaluation.sets_before,
        context=plan.model.context_length,
        world=world,
        identity=identity,
        cache=cache,
    )


def _forgetting_limit(target: RestoreTarget, request: RestoreRequest) -> dict[str, Any]:
    """By how much the loss on a set that is to be kept may rise: a share of its gain, told as a share of its loss."""
    limits = [request.max_regression * (old - new) / new for old, new in target.gains.values() if old > new]
    return {"max_forgetting": min(1.0, min(limits))} if limits else {}


def restoration_text(restoration: Restoration, outcome: RunFinished) -> str:
    """What was won back and what it cost."""
    found = measure_restoration(restoration, outcome)
    aim, wish = restoration.target, restoration.request
    verdict = "" if found["enough"] else f"; {wish.min_recovered:.0%} was asked for, and more steps may reach it"
    lines = [
        f"{aim.set_name}: {found['recovered']:.1%} of what was lost is won back ({aim.run_loss:.4f} -> {found['nats']:.4f} nats per "
        f"token; {aim.teacher_loss:.4f} before){verdict}"
    ]
    for name, cost in found["costs"].items():
        lines.append(f"{name}: {cost:.1%} of what was gained is lost again, {wish.max_regression:.0%} was allowed")
    return "\n".join([*lines, f"next: {shlex.join(['postgrad', 'lineage', str(outcome.run_folder)])}"])


def measure_restoration(restoration: Restoration, outcome: RunFinished) -> dict[str, Any]:
    """The share of the loss that is won back and of each gain that is lost, and whether that is enough."""
    aim, after = restoration.target, outcome.record.scores.after
    nats = after[aim.set_name].nats
    recovered = (aim.run_loss - nats) / (aim.run_loss - aim.teacher_loss)
    costs = {
        name: (after[name].nats - new) / (old - new)
        for name, (old, new) in aim.gains.items()
        if not math.isclose(old, new)
    }
    fine = recovered >= restoration.request.min_recovered - 1e-3 and all(
        c <= restoration.request.max_regression + 1e-3 for c in costs.values()
    )
    return {"set": aim.set_name, "nats": nats, "recovered": recovered, "costs": costs, "enough": fine}
