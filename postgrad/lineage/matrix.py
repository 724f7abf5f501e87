"""The loss matrix of a lineage: every stage on every held-out set."""

from __future__ import annotations

from postgrad.lineage.growth import GrowthCost
from postgrad.lineage.record import RecordPart


class LineageStage(RecordPart):
    """A row of the loss matrix."""

    name: str
    path: str
    model: str
    """The start model of the stage."""
    created: str | None = None
    tokens: int = 0
    """Trained tokens."""


class LineageSet(RecordPart):
    """A column of the loss matrix."""

    name: str
    learnt_at: int
    """The first stage that trained on the set; 0 when none did."""


class LineageSummary(RecordPart):
    """Transfer over the lineage, of scores that are negative losses."""

    ACC: float | None = None
    BWT: float | None = None
    FWT: float | None = None
    forgetting: float | None = None
    denominators: dict[str, str] = {}


class Lineage(RecordPart):
    """The stages, the held-out sets, and the loss after each stage on each set (row 0: the first start model)."""

    stages: list[LineageStage]
    sets: list[LineageSet]
    R: list[list[float | None]]
    summary: LineageSummary
    growth: GrowthCost | None = None
    """What it cost to grow the vocabulary of the first start model; null where it was not grown."""
