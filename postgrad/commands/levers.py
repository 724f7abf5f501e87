"""Combinations of methods against forgetting: which are worth a pilot on a stage, and the stage with one of them.

The list follows the measured table of docs/levers.md (benchmarks/results/levers*.json).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from postgrad.analysis.shift_advice import ShiftStrength
from postgrad.config import stage as s
from postgrad.config.objectives import AnyObjective, DistillObjective
from postgrad.hardware.memory import format_bytes

Distillation = Literal["none", "replay", "both", "new"]
Penalty = Literal["none", "l2-sp", "ewc"]
TEACHER_WEIGHT, LABEL_FREE_WEIGHT = 4.0, 0.3
"""Weights of the distillation on replay, and of that on new text without labels, in the table."""
TEACHER_COST = 0.39
"""What a teacher adds to the time of a step on its rows (docs/distillation.md)."""
LEVERS = {
    "replay": "replay",
    "distillation": "distillation",
    "penalty": "penalty",
    "is_sparse": "sparse update",
    "peak": "peak",
}
"""The fields of a combination and what they are called."""


@dataclass(frozen=True)
class Combination:
    """A combination of methods, on top of what the stage has."""

    replay: float = 0.0
    """Share of the trained tokens that are replayed."""
    distillation: Distillation = "none"
    """From the start model: on the replay; on `both`, the new text without its labels (TMKL); or on the new text alone."""
    penalty: Penalty = "none"
    is_sparse: bool = False
    """Source-shielded updates."""
    peak: float = 1.0
    """The peak rate, in the stage's."""
    reason: str = ""
    """Why it is worth a pilot."""

    @property
    def name(self) -> str:
        """What it consists of."""
        parts = [f"{100 * self.replay:.3g} % replay"] if self.replay else []
        teachers = {"none": [], "replay": ["KD"], "both": ["KD", "TMKL"], "new": ["LwF"]}
        parts += teachers[self.distillation]
        parts += [self.penalty.upper()] if self.penalty != "none" else []
        parts += ["SSU"] if self.is_sparse else []
        parts += [f"{self.peak:g} x peak"] if self.peak != 1 else []
        return " + ".join(parts) or "no protection"

    @property
    def label(self) -> str:
        """The name as a part of a file name."""
        return "-".join("".join(c if c.isalnum() or c == "." else " " for c in self.name.lower()).split())

    @property
    def importance_kind(self) -> str | None:
        """The kind of importance that has to be measured for it."""
        return "activation" if self.is_sparse else "fisher" if self.penalty == "ewc" else None

    @property
    def cost(self) -> float:
        """The time of a trained token, in that of one without a teacher."""
        shares = {"none": 0.0, "replay": self.replay, "both": 1.0, "new": 1.0}
        return 1 + TEACHER_COST * shares[self.distillation]

    def settings(self) -> dict[str, object]:
        """Its settings as plain data, without the reason."""
        return {name: getattr(self, name) for name in LEVERS}


@dataclass(frozen=True)
class RejectedLever:
    """A method that is not tried on a stage, and why."""

    lever: str
    reason: str


@dataclass(frozen=True)
class StageFacts:
    """What decides which methods can be tried on a stage."""

    stage: s.Stage
    strength: ShiftStrength | None
    """Of the shift; None where it was not measured."""
    max_replay: float
    """The largest replay share that the old text suffices for; 0 without old text."""
    has_old_files: bool
    """Old text is in files, on which importance can be measured."""
    parameters: int
    """Weights of the model."""
    has_free_teacher: bool
    """The start model is the trained one without its tuning, so a teacher needs no memory."""
    free_memory: int | None
    """Bytes that are free beyond what the training itself takes."""


def list_combinations(facts: StageFacts) -> tuple[list[Combination], list[RejectedLever]]:
    """The combinations that are worth a pilot, the most promising first, and the methods that are not tried."""
    rejected = list(_reject_levers(facts))
    names = {each.lever for each in rejected}
    proposed = list(_propose_with_replay(facts) if facts.max_replay else _propose_without_replay())
    out: dict[Combination, None] = {}
    for each in proposed:
        uses = {
            "distillation": each.distillation != "none",
            "penalty": each.penalty != "none",
            "EWC": each.penalty == "ewc",
            "sparse update": each.is_sparse,
        }
        if not any(uses[name] for name in names if name in uses):
            out.setdefault(each)
    return _without_repetitions(list(out)), rejected


def _without_repetitions(combinations: Sequence[Combination]) -> list[Combination]:
    """The first of those that differ in nothing but their reason."""
    known: dict[Combination, Combination] = {}
    for each in combinations:
        known.setdefault(replace(each, reason=""), each)
    return list(known.values())


def _propose_with_replay(facts: StageFacts) -> Iterator[Combination]:
    low, high = {"none": (0.01, 0.05), "weak": (0.05, 0.25), "strong": (0.05, 0.25)}[facts.strength or "strong"]
    low, high = (round(min(share, facts.max_replay), 4) for share in (low, high))
    some, more, most = Combination(low), Combination(high), Combination(round(min(2 * high, facts.max_replay), 4))
    yield replace(
        more, distillation="replay", reason="the strongest of the table: 98 % of the forgetting of a strong shift"
    )
    yield replace(
        some, distillation="replay", reason="83 % for a fifth of the replay: distillation makes replay worth more"
    )
    yield replace(more, reason="replay alone costs no second model, and 25 % removed 92 %")
    yield replace(
        some, distillation="both", reason="90 % with 5 % replay: the new text is distilled too, without its labels"
    )
    yield replace(some, distillation="replay", penalty="ewc", reason="94 % with 5 % replay: a penalty adds to both")
    yield replace(some, reason="the cheapest: two thirds of the forgetting of a strong shift")
    yield Combination(reason="what is forgotten and learnt without protection, in case that is within the bound")
    yield replace(more, distillation="replay", peak=0.5, reason="a lower peak moves the weights less")
    yield replace(most, distillation="replay", reason="for bounds that less replay does not keep")
    yield replace(some, distillation="replay", penalty="l2-sp", reason="a penalty without measured importance")
    yield replace(
        some, distillation="replay", is_sparse=True, reason="half of the columns keep their values, at no cost per step"
    )


def _propose_without_replay() -> Iterator[Combination]:
    yield Combination(distillation="new", reason="without old text, distillation on the new text retained most: 81 %")
    yield Combination(distillation="new", penalty="l2-sp", reason="a penalty needs no old text either, and adds to it")
    yield Combination(penalty="l2-sp", reason="no second model; 42 % of the forgetting of a strong shift")
    yield Combination(reason="what is forgotten and learnt without protection, in case that is within the bound")
    yield Combination(distillation="new", peak=0.5, reason="a lower peak moves the weights less")
    yield Combination(peak=0.25, reason="the lowest peak, without any second model or copy")


def _reject_levers(facts: StageFacts) -> Iterator[RejectedLever]:
    stage, free = facts.stage, facts.free_memory
    if not facts.max_replay:
        yield RejectedLever("replay", "there is no old text, and the model is no decoder that could generate some")
    if any(isinstance(each, DistillObjective) for each in stage.objectives):
        yield RejectedLever("distillation", "the stage distils already; every combination keeps that")
    elif not facts.has_free_teacher and free is not None and 4 * facts.parameters > free:
        needed = format_bytes(4 * facts.parameters)
        yield RejectedLever("distillation", f"a second model takes {needed}, and {format_bytes(max(free, 0))} are free")
    if stage.penalties:
        yield RejectedLever("penalty", "the stage has a penalty already; every combination keeps that")
    elif free is not None and 4 * facts.parameters > free:
        needed = format_bytes(4 * facts.parameters)
        yield RejectedLever(
            "penalty", f"a copy of the weights takes {needed}, and {format_bytes(max(free, 0))} are free"
        )
    elif not facts.has_old_files:
        yield RejectedLever("EWC", "importance is measured on files of old text, and the stage names none")
    if stage.optimizer.sparse_update is not None:
        yield RejectedLever("sparse update", "the stage has one already; every combination keeps it")
    elif not facts.has_old_files:
        yield RejectedLever("sparse update", "importance is measured on files of old text, and the stage names none")


# --- a stage with a combination ----------------------------------------------------------------------------


def add_methods(
    raw: Mapping[str, Any], objectives: Sequence[AnyObjective], combination: Combination, files: Mapping[str, str]
) -> dict[str, Any]:
    """The plain data of a stage with the distillation, penalty and sparse update of a combination.

    `objectives`: of the stage, those that it leaves out filled in. `files`: importance by kind, as the stage names it.
    """
    out = dict(raw)
    replayed, new = (
        [src["name"] for src in raw["data"]["sources"] if src.get("role", "new") == role] for role in ("replay", "new")
    )
    teachers: list[dict[str, Any]] = []
    if combination.distillation in ("replay", "both"):
        teachers.append({"kind": "distill", "on": replayed, "weight": TEACHER_WEIGHT})
    if combination.distillation == "both":
        teachers.append({"kind": "distill", "on": new, "weight": LABEL_FREE_WEIGHT, "vocabulary": "without-labels"})
    if combination.distillation == "new":
        teachers.append({"kind": "distill", "on": new})
    if teachers:
        own = raw.get("objectives") or [
            each.model_dump(mode="json", exclude_defaults=True) | {"kind": each.kind} for each in objectives
        ]
        out["objectives"] = [*own, *teachers]
    if combination.penalty != "none":
        penalty = {"kind": "anchor", "strength": "auto"}
        if combination.penalty == "ewc":
            penalty["importance"] = files["fisher"]
        out["penalties"] = [*raw.get("penalties", ()), penalty]
    if combination.is_sparse:
        update = {"kind": "ssu", "importance": files["activation"]}
        out["optimizer"] = {**raw.get("optimizer", {}), "sparse_update": update}
    return out
