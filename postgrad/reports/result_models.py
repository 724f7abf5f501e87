"""The results of commands and studies as their pages read them, parsed from their JSON data."""

from __future__ import annotations

from typing import Any

from postgrad.lineage.record import Difference, MetricValue, RecordPart, TaskRecord


class EstimateInterval(RecordPart):
    """A value with its 95 % interval, and its values by seed."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    by_seed: list[float] = []


class TaskScore(TaskRecord):
    """One model's metrics on a task."""

    scores: dict[str, MetricValue] = {}


# --- shift ----------------------------------------------------------------------------------------------------------------


class Distance(EstimateInterval):
    """A distance between two texts; `same` is that of two samples of the old text."""

    same: float | None = None


class Corpus(RecordPart):
    files: list[str] = []
    bits: EstimateInterval
    """Loss in bits per byte."""
    bytes_per_token: float | None = None
    tokens_per_word: float | None = None
    unknown: float | None = None
    """Share of unknown tokens."""


class ProposedSetting(RecordPart):
    what: str
    value: str
    reason: str
    source: str


class ShiftResult(RecordPart):
    """`postgrad shift --json`."""

    model: str
    strength: str
    old: Corpus
    new: Corpus
    surprise: EstimateInterval
    distances: dict[str, Distance]
    proposals: list[ProposedSetting]


# --- blend ----------------------------------------------------------------------------------------------------------------


class PointChange(Difference):
    role: str = ""


class BlendPoint(RecordPart):
    """A model between the start model and the trained one."""

    name: str
    weight: float
    block: int | None = None
    changes: dict[str, PointChange]


class BlendResult(RecordPart):
    """`postgrad blend --json`."""

    run: str
    start: str
    average: int | None = None
    chosen: str | None = None
    points: list[BlendPoint]


# --- probe ----------------------------------------------------------------------------------------------------------------


class ProbedView(RecordPart):
    """A linear classifier on one layer or several."""

    name: str
    kind: str = ""
    states: list[int] = []
    strength: float | None = None
    dev: float = 0.0
    metrics: dict[str, EstimateInterval] = {}
    against_last: dict[str, EstimateInterval] = {}
    shares: list[float] = []


class ProbeSummary(RecordPart):
    """`postgrad probe --json`."""

    model: str
    kind: str = ""
    problem: str = ""
    labels: list[Any] = []
    stack: str | None = None
    pooling: str | None = None
    items: dict[str, int] = {}
    documents: dict[str, int] = {}
    layers: int
    width: int | None = None
    metric: str
    strengths: list[float] = []
    views: list[ProbedView] = []
    guess: dict[str, EstimateInterval] = {}
    notes: list[str] = []


# --- study ----------------------------------------------------------------------------------------------------------------


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
