"""Restore what a run has forgotten by on-policy distillation from the earlier model.

The model continues prompts of the old kind and the earlier model scores every token (`on-policy`); in the same stage it
distils itself on the new text (`distill` from its start). Of all evaluations the one is published that is best on the old text
while no more than a given part of the new gain is lost; training ends when enough is recovered. Roles are swapped: the old sets
are `learned`, the new ones `retained`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postgrad.commands.results import Result
from postgrad.config import stage as s
from postgrad.config.stage_file import parse_recorded_stage, parse_stage
from postgrad.data.read.files import list_files
from postgrad.distributed.world import World
from postgrad.errors import StageError
from postgrad.evaluation import before_after
from postgrad.hardware import machine
from postgrad.lineage.record import PLAN, Record, read_record
from postgrad.lineage.saved_plan import read_plan
from postgrad.models.location import ModelLocation, locate_model
from postgrad.models.model import wrap_model
from postgrad.models.task import Task
from postgrad.plan.plan import Plan, make_plan
from postgrad.plan.seen_sources import make_replay_source
from postgrad.run.events import RunEvent, RunFinished
from postgrad.run.run import run_stage
from postgrad.stats.forgetting import MIN_LOSS
from postgrad.storage.cache_folder import cache_folder
from postgrad.tuning.open_model import open_model, start_fingerprint

PROMPT_TOKENS, NEW_TOKENS = 32, 96
RATE_SHARE = 0.2
"""The rate as a share of the run's peak: at all of it as much is recovered, for more than twice the loss of new text."""
_PROMPT_SOURCE_NAME = "prompts"


@dataclass(frozen=True)
class RestoreRequest:
    """The options of a restoration."""

    run: Path
    teacher: str | None = None
    """The earlier model. Default: the run's start model."""
    prompts: tuple[str, ...] = ()
    """Old text used as prompts. Default: the text that the run replayed."""
    retained: tuple[str, ...] = ()
    """Held-out old text. Default: the run's own retained sets."""
    min_recovered: float = 0.9
    """The fraction of the forgetting to recover."""
    max_cost: float = 0.05
    """The fraction of the gain on new text that may be lost."""
    steps: int = 200
    """At most so many steps."""
    self_distill_share: float = 0.5
    """The fraction of the trained tokens that distil the model itself on new text."""
    learning_rate: float | None = None
    """Default: a fifth of the peak rate of the run, which gives up less of what was learnt."""
    output: str | None = None
    """The new run's folder. Default: RUN-restored."""


@dataclass(frozen=True)
class RestoreTarget:
    """The set that was forgotten most, and the loss to reach on it; all losses in nats per token."""

    set_name: str
    run_loss: float
    teacher_loss: float
    target_loss: float
    gains: Mapping[str, tuple[float, float]]
    """Of each set of new text: the earlier model's loss and the run's."""


@dataclass(frozen=True)
class Restoration:
    """The stage that restores a run."""

    plan: Plan
    target: RestoreTarget
    request: RestoreRequest


def plan_restoration(request: RestoreRequest, cache: Path) -> Restoration:
    """Plan the stage that restores a run. Raises `StageError` when nothing was forgotten, or texts are missing."""
    machine.tune_allocator()
    root = Path.cwd()
    _check_request(request, root)
    record = read_record(request.run)
    if not record.changes:
        raise StageError(
            f"{request.run} has not finished", where="restore", hint="finish it with the same train command"
        )
    if record.model.task != Task.CAUSAL:
        raise StageError(
            f"{request.run} is not a causal language model, so there are no continuations to score",
            where="restore",
            expected="a run of a causal language model",
            hint="train it again with replay, or `distill` on old text",
        )
    raw = _restore_stage(request, record, root)
    plan = make_plan(parse_stage(raw, "restore"), root, cache)
    teacher = plan.teachers[0]
    target = _measure_target(plan, teacher, request, cache)
    raw["save"]["choose"] = {
        "set": target.set_name,
        "stop_at": target.target_loss,
        **_forgetting_limit(target, request),
    }
    return Restoration(make_plan(parse_stage(raw, "restore"), root, cache), target, request)


def _check_request(request: RestoreRequest, root: Path) -> None:
    """Raise the error of an option that cannot be used."""
    for option, is_valid, problem, expected in (
        (
            "--min-recovered",
            request.min_recovered > 0,
            f"{request.min_recovered:.0%} recovered is no target",
            "more than 0%",
        ),
        (
            "--self-distill-share",
            request.self_distill_share < 1,
            f"{request.self_distill_share:.0%} of new text leaves no tokens for the prompts",
            "less than 100%",
        ),
        (
            "--learning-rate",
            request.learning_rate is None or 0 < request.learning_rate < math.inf,
            f"{request.learning_rate} is not a learning rate",
            "a number above 0",
        ),
    ):
        if not is_valid:
            raise StageError(problem, where=option, expected=expected)
    if request.teacher is not None:
        locate_model(request.teacher, root, where="--teacher")
    for option, paths in (("--prompts", request.prompts), ("--retained", request.retained)):
        for path in paths:
            list_files(path, root, option)


def _restore_stage(request: RestoreRequest, record: Record, root: Path) -> dict[str, Any]:
    """The stage as plain data, without its checkpoint selection."""
    stage = parse_recorded_stage(record.stage, record.name).model_dump(mode="json")
    origin = Path(record.stage_folder or ".")
    new_sources = _new_sources(request) if request.self_distill_share else []
    old_sets = [_held_out_file(path, root) for path in request.retained] or _absolute_sets(
        stage["evaluation"]["retained"], origin
    )
    prompts = _prompt_sources(request, root, has_sets=bool(old_sets))
    share = 1.0 - (request.self_distill_share if new_sources else 0.0)
    prompt_tokens, new_tokens, length = _row_lengths(stage["data"]["sequence_length"], record.model.context_length)
    per_row = share / new_tokens + (1 - share) / stage["data"]["sequence_length"]
    sequences = stage["batch"]["global_batch_size"]
    name = request.output or f"{request.run.name}-restored"
    return {
        "name": Path(name).name,
        "model": str(request.run.resolve()),
        "output": str(root / name if request.output else request.run.resolve().parent / name),
        "tokens": max(1, round(request.steps * sequences / per_row)),
        "seed": stage["seed"],
        "data": {
            "sequence_length": length,
            "overlap": "off",
            "on_exhausted": "repeat",
            "sources": [{**source, "share": share / len(prompts)} for source in prompts]
            + [{**source, "share": source["share"] * request.self_distill_share} for source in new_sources],
        },
        "batch": {"global_batch_size": sequences},
        "schedule": {
            "kind": "constant",
            "peak": request.learning_rate or RATE_SHARE * _peak_rate(stage["schedule"]),
            "warmup": "5%",
        },
        "objectives": [
            {
                "kind": "on-policy",
                "teacher": _teacher_name(request, record),
                "prompt_tokens": prompt_tokens,
                "max_new_tokens": new_tokens,
                "on": [source["name"] for source in prompts],
            },
            *([{"kind": "distill", "on": [source["name"] for source in new_sources]}] if new_sources else []),
        ],
        "evaluation": {
            "learned": old_sets,
            "retained": _absolute_sets(stage["evaluation"]["learned"], origin),
            "every": "5%",
            "max_tokens": stage["evaluation"]["max_tokens"],
        },
        "save": {"every": "25%"},
        "compute": stage["compute"],
    }


def _row_lengths(sequence_length: int, context_length: int) -> tuple[int, int, int]:
    """Tokens of a prompt, of its continuation and of a row: fewer for a model of few positions."""
    wanted = PROMPT_TOKENS + NEW_TOKENS + 32
    room = min(wanted, context_length or wanted)
    return PROMPT_TOKENS * room // wanted, NEW_TOKENS * room // wanted, max(sequence_length, room)


def _prompt_sources(request: RestoreRequest, root: Path, *, has_sets: bool) -> list[dict[str, Any]]:
    """The prompts: the given files, or the text that the run replayed.

    Without sets of old text, a part of the prompts is held out for the evaluation: of replayed text what the run held out.
    """
    if request.prompts:
        return [
            {
                "name": _PROMPT_SOURCE_NAME if len(request.prompts) == 1 else f"{_PROMPT_SOURCE_NAME}-{i + 1}",
                "path": str(root / path),
                "role": "new",  # the old text has the role that this stage learns
                **({"held_out": 0.0} if has_sets else {}),
            }
            for i, path in enumerate(request.prompts)
        ]
    replayed = [source for source, _ in _trained_sources(request.run, "replay")]
    if not replayed:
        raise StageError(
            f"{request.run} replayed no text to use as prompts",
            where="--prompts",
            expected="text of the old kind; its first tokens are prompts and are not trained on",
        )
    held_out = {source["name"]: 0.0 if has_sets else source.get("held_out", 0.0) for source in replayed}
    if not has_sets and not any(held_out.values()):
        raise StageError(
            f"{request.run} held out no old text, so nothing tells what was forgotten",
            where="--retained",
            expected="held-out text of the kind that was forgotten",
            hint=f"postgrad restore {request.run} --retained OLD-TEXT, or --prompts OLD-TEXT, of which a part is held out",
        )
    return [
        {
            **source,
            "role": "new",
            "held_out": held_out[source["name"]],
            "name": f"{_PROMPT_SOURCE_NAME}-{source['name']}",
        }
        for source in replayed
    ]


def _new_sources(request: RestoreRequest) -> list[dict[str, Any]]:
    """The new text of the run, in the shares that it had."""
    sources = _trained_sources(request.run, "new")
    total = sum(share for _, share in sources)
    if sources and not total > 0:
        raise StageError(
            f"the new text of {request.run} has a share of {total:g}",
            where=str(request.run / PLAN),
            expected="shares above 0",
            hint="restore the file from a backup, or leave the new text out: --self-distill-share 0",
        )
    return [{**source, "role": "replay", "share": share / total} for source, share in sources]


def _trained_sources(run: Path, role: str) -> list[tuple[dict[str, Any], float]]:
    """The sources of one role of a run, as a stage file has them, with their shares of its tokens."""
    saved = read_plan(run)
    planned = {source.name: source for source in saved.plan.sources}
    return [
        (make_replay_source(source.name, source.origin), planned[source.name].share)
        for source in saved.resolved_sources
        if source.name in planned and planned[source.name].role == role
    ]


def _absolute_sets(items: Sequence[Mapping[str, Any]], origin: Path) -> list[dict[str, Any]]:
    """Held-out files of another stage, with absolute paths."""
    return [{**item, "path": str(origin / item["path"]), "same_format_as": None} for item in items]


def _held_out_file(path: str, root: Path) -> dict[str, Any]:
    item = s.expand_held_out_file(path)
    return {**item, "path": str(root / item["path"])}


def _teacher_name(request: RestoreRequest, record: Record) -> str:
    """The earlier model: the given one, or the run's start model."""
    if request.teacher is not None:
        path = Path.cwd() / request.teacher
        return str(path) if path.exists() else request.teacher
    start = parse_recorded_stage(record.stage, record.name).model
    if not isinstance(start, str):
        raise StageError(
            f"{request.run} started from a randomly initialised model, which is no teacher",
            where="--teacher",
            expected="an earlier model that was trained on the old text",
        )
    path = Path(record.stage_folder or ".") / start
    return str(path) if path.exists() else start


def _peak_rate(schedule: Mapping[str, Any]) -> float:
    """The highest rate of a schedule."""
    pieces = [rate for piece in schedule.get("pieces", ()) for rate in (piece.get("start"), piece.get("end"))]
    return max(rate for rate in (schedule.get("peak"), schedule.get("start"), *pieces) if rate)


def _measure_target(plan: Plan, teacher: ModelLocation, request: RestoreRequest, cache: Path) -> RestoreTarget:
    """Score both models on all of the stage's sets."""
    now, earlier = (_score_model(plan, model, cache) for model in (plan.model.start, teacher))
    losses = {h.name: now[h.name].nats - earlier[h.name].nats for h in plan.evaluation.sets if h.role == "learned"}
    name = max(losses, key=lambda set_: losses[set_])
    if losses[name] <= 0:
        raise StageError(
            f"{plan.model.start.name} has forgotten nothing: {now[name].nats:.4f} nats per token on {name}, "
            f"and {teacher.name} {earlier[name].nats:.4f}",
            where="restore",
            expected="a run that has forgotten something",
        )
    return RestoreTarget(
        name,
        now[name].nats,
        earlier[name].nats,
        now[name].nats - request.min_recovered * losses[name],
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
    """The bound on the rise of the new sets: a fraction of their gain, as a fraction of their loss."""
    limits = [request.max_cost * (old - new) / max(new, MIN_LOSS) for old, new in target.gains.values() if old > new]
    return {"max_forgetting": min(1.0, min(limits))} if limits else {}


@dataclass(frozen=True)
class RestoredRun(Result):
    """What a restoration recovered, and what it cost."""

    target: RestoreTarget
    nats: float
    """The restored loss on the set that was forgotten most, in nats per token."""
    recovered: float
    """The fraction of the forgetting that was recovered."""
    costs: Mapping[str, float]
    """Of each new set: the fraction of the gain that was lost."""
    enough: bool
    """Whether the targets of the request were reached."""
    request: RestoreRequest
    outcome: RunFinished

    def as_dict(self) -> dict[str, object]:
        """The new run's record, with `restored`."""
        restored = {
            "set": self.target.set_name,
            "nats": self.nats,
            "recovered": self.recovered,
            "costs": dict(self.costs),
            "enough": self.enough,
        }
        return {**self.outcome.record.as_json(), "restored": restored}


def restore(
    run: Path | str,
    *,
    teacher: str | None = None,
    prompts: Sequence[str] = (),
    retained: Sequence[str] = (),
    min_recovered: float = 0.9,
    max_cost: float = 0.05,
    steps: int = 200,
    self_distill_share: float = 0.5,
    learning_rate: float | None = None,
    output: str | None = None,
    cache: Path | None = None,
) -> Iterator[RunEvent | RestoredRun]:
    """Recover what a run has forgotten, as an iterator of its events; the last item is the result.

    The arguments are those of `RestoreRequest`. The same call resumes an interrupted restoration.
    """
    cache = cache or cache_folder()
    request = RestoreRequest(
        Path(run), teacher, tuple(prompts), tuple(retained), min_recovered, max_cost, steps, self_distill_share,
        learning_rate, output,
    )  # fmt: skip
    yield from run_restoration(plan_restoration(request, cache), "postgrad restore", cache)


def run_restoration(restoration: Restoration, command: str, cache: Path) -> Iterator[RunEvent | RestoredRun]:
    """Run a planned restoration; `command` is recorded as what resumes it."""
    for event in run_stage(restoration.plan, command=command, cache=cache):
        yield event
        if isinstance(event, RunFinished):
            yield measure_restoration(restoration, event)


def measure_restoration(restoration: Restoration, outcome: RunFinished) -> RestoredRun:
    """The fraction of the forgetting that was recovered, and of each gain that was lost."""
    target, request, after = restoration.target, restoration.request, outcome.record.scores.after
    nats = after[target.set_name].nats
    recovered = (target.run_loss - nats) / (target.run_loss - target.teacher_loss)
    costs = {
        name: (after[name].nats - new) / (old - new)
        for name, (old, new) in target.gains.items()
        if not math.isclose(old, new)
    }
    enough = recovered >= request.min_recovered - 1e-3 and all(
        cost <= request.max_cost + 1e-3 for cost in costs.values()
    )
    return RestoredRun(target, nats, recovered, costs, enough, request, outcome)
