"""The results of a study, parsed from `study.json`, and a model's score on a task."""

from __future__ import annotations

from typing import Any

from postgrad.lineage.record import MetricValue, RecordPart, TaskRecord


class EstimateInterval(RecordPart):
    """A value with its 95 % interval, and its values by seed."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    by_seed: list[float] = []


class TaskScore(TaskRecord):
    """One model's metrics on a task."""

    scores: dict[str, MetricValue] = {}


class StudySet(RecordPart):
    name: str
    role: str = ""
    documents: int = 0
    tokens: int | None = None


class StudyCurve(RecordPart):
    switches: list[float] = []
    """Trained tokens at which each stage starts."""
    sets: dict[str, list[tuple[float, float]]] = {}


class StudyBase(RecordPart):
    """The base model of the arms."""

    name: str | None = None
    loss: dict[str, EstimateInterval] = {}
    tokens: float | None = None
    seconds: float | None = None
    curve: StudyCurve | None = None


class SeedSpread(RecordPart):
    deviation: float | None = None


class StudyArm(RecordPart):
    """One arm, mean over its seeds. Losses by `old`, `new`, `average` and held-out set."""

    name: str
    status: str = ""
    from_scratch: bool = False
    loss: dict[str, EstimateInterval] = {}
    change: dict[str, EstimateInterval] = {}
    removed: EstimateInterval | None = None
    """Share of the baseline's forgetting that the arm removed."""
    gap: dict[str, EstimateInterval] = {}
    """Difference from the union arm."""
    by_seed: dict[str, dict[str, float]] = {}
    spread: dict[str, SeedSpread] = {}
    dominated_by: list[str] | None = None
    seeds_there: list[int] = []
    gate_failed: list[int] = []
    skipped_steps: int = 0
    """Optimizer steps without an update, of all seeds: their loss or gradient was not finite."""
    tokens: float | None = None
    tokens_in_all: float | None = None
    seconds: float | None = None
    peak_memory: float | None = None
    curve: StudyCurve | None = None


class ArmPair(RecordPart):
    """The paired difference of two arms."""

    arm: str
    than: str
    old: EstimateInterval | None = None
    new: EstimateInterval | None = None
    average: EstimateInterval | None = None


class ClaimResult(EstimateInterval):
    say: str = ""
    on: str = ""
    bound: float | None = None
    verdict: str = ""
    why: str | None = None


class FittedLaw(RecordPart):
    source: str = ""
    line: list[tuple[float, float, float, float]] = []


class ReplayPoint(RecordPart):
    share: float = 0.0
    loss: dict[str, EstimateInterval] = {}
    change: dict[str, EstimateInterval] = {}


class ReplayCurve(RecordPart):
    points: list[ReplayPoint] = []
    laws: dict[str, FittedLaw | None] = {}


class StudyMachine(RecordPart):
    cpu: str | None = None
    cores: int | None = None
    device: str | None = None
    parameters: int | None = None
    versions: dict[str, str] = {}
    execution: dict[str, Any] = {}


class StudyTime(RecordPart):
    runs: int | None = None
    runs_requested: int | None = None
    training: float | None = None
    evaluation: float | None = None
    outside: float | None = None


class StudyResults(RecordPart):
    """`study.json`."""

    name: str = ""
    seeds: list[int] = []
    summary: list[str] = []
    against: str | None = None
    """The arm without protection."""
    union: str | None = None
    """The arm trained on all text at once."""
    base: StudyBase = StudyBase()
    sets: list[StudySet] = []
    arms: list[StudyArm] = []
    pairs: list[ArmPair] = []
    claims: list[ClaimResult] = []
    replay: ReplayCurve | None = None
    machine: StudyMachine | None = None
    time: StudyTime = StudyTime()
    study_yaml: str | None = None

    def arm(self, name: str | None) -> StudyArm | None:
        """The arm of this name."""
        return next((arm for arm in self.arms if arm.name == name), None)
