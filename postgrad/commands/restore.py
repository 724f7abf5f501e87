"""How does a model get back what it lost, and keep what it has learnt since? On-policy distillation from what it was.

The model writes on from prompts of the old kind, and the earlier model judges every token (`on-policy`); meanwhile it is
held to itself on the new text (`distill` from its start). It is a stage like any other, and this writes it: among all looks
the one is published that is best on the old text, of those where no more than a given part of the new gain is lost; training
ends when enough is won back. So old and new change places: what is to be won back is `learned`, what must not be lost is
`retained`.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postgrad.config import stage as s
from postgrad.config.stage_file import parse_stage
from postgrad.data.read.files import find_files
from postgrad.distributed.world import World
from postgrad.errors import StageError
from postgrad.evaluation import before_after
from postgrad.hardware import machine
from postgrad.lineage.record import PLAN, Record, read_record
from postgrad.models.model import model_for
from postgrad.models.pretrained import Start, locate
from postgrad.plan.plan import Plan, make_plan
from postgrad.plan.sources import source_again
from postgrad.run.run import Finished
from postgrad.tuning.open_model import open_model, start_fingerprint

PROMPT_TOKENS, NEW_TOKENS = 32, 96
_PROMPTS = "prompts"


@dataclass(frozen=True)
class Wish:
    """What is asked for. `until`: the share of the loss that is to be won back; `max_cost`: the share of the gain that may go.

    `kept`: the share of the trained tokens that are new text, on which the model is held to itself.
    """

    run: Path
    teacher: str | None
    prompts: tuple[str, ...]
    retained: tuple[str, ...]
    until: float
    max_cost: float
    steps: int
    kept: float
    rate: float | None
    output: str | None


@dataclass(frozen=True)
class Aim:
    """The set that lost most, what the run and the earlier model lose on it, and what is enough; all in nats per token."""

    set: str
    now: float
    earlier: float
    enough: float
    gains: Mapping[str, tuple[float, float]]
    """Of each set that is to be kept: the earlier model's loss and the run's."""


@dataclass(frozen=True)
class Restoration:
    """The stage as it will be carried out."""

    plan: Plan
    aim: Aim
    wish: Wish


def plan_restoration(wish: Wish, cache: Path) -> Restoration:
    """Work out the stage that wins back what a run has lost. Raises `StageError` when nothing was, or texts are missing."""
    machine.tune_allocator()
    root = Path.cwd()
    _check(wish, root)
    record = read_record(wish.run)
    if not record.get("changes"):
        raise StageError(
            f"{wish.run} has not finished", where="restore", way_out="finish it with the same train command"
        )
    if record["model"]["task"] != "causal":
        raise StageError(
            f"{wish.run} holds no model that writes on, so nothing it says could be judged",
            where="restore",
            expected="a run of a causal language model",
            way_out="train it once more with replay, or `distill` on old text",
        )
    raw = _stage(wish, record, root)
    plan = make_plan(parse_stage(raw, "restore"), root, cache)
    teacher = plan.teachers[0]
    aim = _aim(plan, teacher, wish, cache)
    raw["save"]["choose"] = {"set": aim.set, "enough": aim.enough, **_limit(aim, wish)}
    return Restoration(make_plan(parse_stage(raw, "restore"), root, cache), aim, wish)


def _check(wish: Wish, root: Path) -> None:
    """Raise what is wrong with what is asked for, told at the option that says it."""
    for option, fine, met, expected in (
        ("--until", wish.until > 0, f"{wish.until:.0%} of what was lost is nothing to win back", "more than 0%"),
        ("--keep", wish.kept < 1, f"{wish.kept:.0%} of new text leaves nothing for the prompts", "less than 100%"),
        ("--rate", wish.rate is None or 0 < wish.rate < math.inf, f"{wish.rate} is no rate", "a number above 0"),
    ):
        if not fine:
            raise StageError(met, where=option, expected=expected)
    if wish.teacher is not None:
        locate(wish.teacher, root, where="--teacher")
    for option, paths in (("--prompts", wish.prompts), ("--retained", wish.retained)):
        for path in paths:
            find_files(path, root, option)


def _stage(wish: Wish, record: Record, root: Path) -> dict[str, Any]:
    """The stage as plain data, but for what is chosen by."""
    was, origin = record["stage"], Path(record["root"])
    kept = _new_sources(wish) if wish.kept else []
    prompts = _prompts(wish, root)
    share = 1.0 - (wish.kept if kept else 0.0)
    per_row = share / NEW_TOKENS + (1 - share) / was["data"]["sequence_length"]
    sequences = was["batch"]["sequences"]
    name = wish.output or f"{wish.run.name}-restored"
    lost = [_held_out(path, root) for path in wish.retained] or _sets(was["evaluation"]["retained"], origin)
    if not lost:
        raise StageError(
            f"{wish.run} names no file of old text that it was measured on",
            where="--retained",
            expected="held-out text of the kind that was lost",
        )
    return {
        "name": Path(name).name,
        "model": str(wish.run.resolve()),
        "output": str(root / name if wish.output else wish.run.resolve().parent / name),
        "tokens": max(1, round(wish.steps * sequences / per_row)),
        "seed": was["seed"],
        "data": {
            "sequence_length": max(was["data"]["sequence_length"], PROMPT_TOKENS + NEW_TOKENS + 32),
            "overlap": "off",
            "when_short": "repeat",
            "sources": [{**source, "share": share / len(prompts)} for source in prompts]
            + [{**source, "share": source["share"] * wish.kept} for source in kept],
        },
        "batch": {"sequences": sequences},
        "schedule": {"kind": "constant", "peak": wish.rate or _peak(was["schedule"]), "warmup": "5%"},
        "objectives": [
            {
                "kind": "on-policy",
                "teacher": _teacher(wish, record),
                "prompt_tokens": PROMPT_TOKENS,
                "new_tokens": NEW_TOKENS,
                "on": [source["name"] for source in prompts],
            },
            *([{"kind": "distill", "on": [source["name"] for source in kept]}] if kept else []),
        ],
        "evaluation": {
            "learned": lost,
            "retained": _sets(was["evaluation"]["learned"], origin),
            "every": "5%",
            "max_tokens": was["evaluation"]["max_tokens"],
        },
        "save": {"every": "25%"},
        "compute": was["compute"],
    }


def _prompts(wish: Wish, root: Path) -> list[dict[str, Any]]:
    """What is gone on from: the files that are named, or what the run replayed."""
    if wish.prompts:
        return [
            {"name": _PROMPTS if len(wish.prompts) == 1 else f"{_PROMPTS}-{i + 1}", "path": str(root / path), **_OLD}
            for i, path in enumerate(wish.prompts)
        ]
    replayed = [source_again(leaf) for leaf in _leaves(wish.run, "replay")]
    if not replayed:
        raise StageError(
            f"{wish.run} replayed nothing that its model could go on from",
            where="--prompts",
            expected="text of the old kind, whose beginnings are prompts; it is not trained on",
        )
    return [{**source, **_OLD, "name": f"{_PROMPTS}-{source['name']}"} for source in replayed]


_OLD: dict[str, Any] = {"role": "new", "held_out": 0.0}
"""What is to be won back is what this stage learns."""


def _new_sources(wish: Wish) -> list[dict[str, Any]]:
    """The new text of the run, in the shares that it had."""
    leaves = _leaves(wish.run, "new")
    total = sum(leaf["share"] for leaf in leaves)
    return [{**source_again(leaf), "role": "replay", "share": leaf["share"] / total} for leaf in leaves]


def _leaves(run: Path, role: str) -> list[dict[str, Any]]:
    """Where the texts of a run come from, and which share of its tokens they had."""
    planned = json.loads((run / PLAN).read_text())
    shares = {source["name"]: (source["role"], source["share"]) for source in planned["plan"]["sources"]}
    return [{**leaf, "share": shares[leaf["name"]][1]} for leaf in planned["leaves"] if shares[leaf["name"]][0] == role]


def _sets(items: Sequence[Mapping[str, Any]], origin: Path) -> list[dict[str, Any]]:
    """Held-out files of another stage, wherever this one is."""
    return [{**item, "path": str(origin / item["path"]), "like": None} for item in items]


def _held_out(path: str, root: Path) -> dict[str, Any]:
    item = s.held_out_file(path)
    return {**item, "path": str(root / item["path"])}


def _teacher(wish: Wish, record: Record) -> str:
    """The earlier model: the one that is named, or the one that the run began with."""
    if wish.teacher is not None:
        place = Path.cwd() / wish.teacher
        return str(place) if place.exists() else wish.teacher
    began = record["stage"]["model"]
    if not isinstance(began, str):
        raise StageError(
            f"{wish.run} began with a model made anew, which knew nothing",
            where="--teacher",
            expected="an earlier model that knows what is to be won back",
        )
    place = Path(record["root"]) / began
    return str(place) if place.exists() else began


def _peak(schedule: Mapping[str, Any]) -> float:
    """The highest rate of a schedule."""
    pieces = [rate for piece in schedule.get("pieces", ()) for rate in (piece.get("start"), piece.get("end"))]
    return max(rate for rate in (schedule.get("peak"), schedule.get("start"), *pieces) if rate)


def _aim(plan: Plan, teacher: Start, wish: Wish, cache: Path) -> Aim:
    """What was lost and gained: both models on all of the stage's sets."""
    now, earlier = (_scores(plan, start, cache) for start in (plan.start, teacher))
    lost = {h.name: now[h.name].nats - earlier[h.name].nats for h in plan.held_out if h.role == "learned"}
    name = max(lost, key=lambda set_: lost[set_])
    if lost[name] <= 0:
        raise StageError(
            f"{plan.start.name} has lost nothing that {teacher.name} knew: {now[name].nats:.4f} nats per token on {name}, "
            f"and {earlier[name].nats:.4f}",
            where="restore",
            expected="a run that has forgotten something",
        )
    return Aim(
        name,
        now[name].nats,
        earlier[name].nats,
        now[name].nats - wish.until * lost[name],
        {h.name: (earlier[h.name].nats, now[h.name].nats) for h in plan.held_out if h.role == "retained"},
    )


def _scores(plan: Plan, start: Start, cache: Path) -> before_after.AllScores:
    opened = open_model(start, plan.task, layer=plan.layer)
    world = World(machine.device())
    model = model_for(opened.model, opened.task).to(world.device)
    identity = start_fingerprint(start) or start.name
    return before_after.measure(
        model, plan.held_out_before, context=plan.context, world=world, identity=identity, cache=cache
    )


def _limit(aim: Aim, wish: Wish) -> dict[str, Any]:
    """By how much the loss on a set that is to be kept may rise: a share of its gain, told as a share of its loss."""
    limits = [wish.max_cost * (old - new) / new for old, new in aim.gains.values() if old > new]
    return {"max_forgetting": min(1.0, min(limits))} if limits else {}


def restored_text(restoration: Restoration, outcome: Finished) -> str:
    """What was won back and what it cost."""
    found = restored(restoration, outcome)
    aim, wish = restoration.aim, restoration.wish
    verdict = "" if found["enough"] else f"; {wish.until:.0%} was asked for, and more steps may reach it"
    lines = [
        f"{aim.set}: {found['recovered']:.1%} of what was lost is won back ({aim.now:.4f} -> {found['nats']:.4f} nats per "
        f"token; {aim.earlier:.4f} before){verdict}"
    ]
    for name, cost in found["costs"].items():
        lines.append(f"{name}: {cost:.1%} of what was gained is lost again, {wish.max_cost:.0%} was allowed")
    return "\n".join([*lines, f"next: {shlex.join(['postgrad', 'lineage', str(outcome.place)])}"])


def restored(restoration: Restoration, outcome: Finished) -> dict[str, Any]:
    """The share of the loss that is won back and of each gain that is lost, and whether that is enough."""
    aim, after = restoration.aim, outcome.record["scores"]["after"]
    nats = after[aim.set]["nats"]
    recovered = (aim.now - nats) / (aim.now - aim.earlier)
    costs = {
        name: (after[name]["nats"] - new) / (old - new)
        for name, (old, new) in aim.gains.items()
        if not math.isclose(old, new)
    }
    fine = recovered >= restoration.wish.until - 1e-3 and all(
        c <= restoration.wish.max_cost + 1e-3 for c in costs.values()
    )
    return {"set": aim.set, "nats": nats, "recovered": recovered, "costs": costs, "enough": fine}
