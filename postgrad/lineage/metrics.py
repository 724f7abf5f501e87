"""The rows of `metrics.jsonl`: one per step, skipped or not, and one per evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from postgrad.lineage.previous_format import upgrade_row
from postgrad.lineage.record import RecordPart, SkippedStep

METRICS = "metrics.jsonl"


class StepRow(RecordPart):
    """One optimizer step."""

    kind: Literal["step"] = "step"
    step: int
    tokens: int = 0
    """Trained tokens of this step."""
    trained_tokens: int
    """Trained tokens so far."""
    loss: float
    losses_by_objective: dict[str, float] = {}
    penalties: dict[str, float] = {}
    """Penalty terms, nats per token; `loss` does not include them."""
    loss_sums_by_source: dict[str, tuple[float, int]] = {}
    """Summed loss (nats) and trained tokens."""
    learning_rate: float
    grad_norm: float | None = None
    """Before clipping."""
    loss_grad_norm: float | None = None
    """Without the penalties."""
    updated_weights: int | None = None
    """Weights that a sparse update changed."""
    seconds: float = 0.0


class SkippedStepRow(SkippedStep):
    """One step without an update."""

    kind: Literal["skipped"] = "skipped"
    trained_tokens: int
    """Trained tokens so far."""
    seconds: float = 0.0


class SetRow(RecordPart):
    """A held-out set at an evaluation; `low` to `high` is the 95 % interval of `change`."""

    role: str = ""
    nats: float
    change: float
    """Since the start of the stage."""
    low: float
    high: float


class TaskRow(RecordPart):
    """A task's first metric."""

    metric: str
    value: float


class SelectionRow(RecordPart):
    """What the checkpoint selection made of an evaluation."""

    set: str = ""
    metric: str = ""
    value: float
    relative_high: float | None = None
    """Largest relative rise of a retained set's loss, upper end."""
    best_step: int | None = None


class EvaluationRow(RecordPart):
    """One evaluation during training."""

    kind: Literal["evaluation"] = "evaluation"
    step: int
    trained_tokens: int
    sets: dict[str, SetRow] = {}
    tasks: dict[str, TaskRow] = {}
    checkpoint_selection: SelectionRow | None = None


MetricsRow = StepRow | SkippedStepRow | EvaluationRow
_ROW_KINDS: dict[str, type[MetricsRow]] = {"evaluation": EvaluationRow, "skipped": SkippedStepRow}


def parse_row(raw: dict[str, Any]) -> MetricsRow:
    """A row from JSON data of this format or the previous one."""
    row = upgrade_row(raw)
    return _ROW_KINDS.get(str(row.get("kind")), StepRow).model_validate(row)


def read_metrics(path: Path) -> Iterator[MetricsRow]:
    """The rows of a metrics file, up to the first line that is not whole: a kill cuts off the last one."""
    if not path.exists():
        return
    with path.open() as file:
        for line in file:
            try:
                row = parse_row(json.loads(line))
            except (ValueError, ValidationError):
                return
            yield row


def read_steps(path: Path) -> list[StepRow]:
    """The rows of the steps."""
    return [row for row in read_metrics(path) if isinstance(row, StepRow)]


def read_skipped_steps(path: Path) -> list[SkippedStep]:
    """The steps without an update."""
    rows = [row for row in read_metrics(path) if isinstance(row, SkippedStepRow)]
    return [SkippedStep.model_validate(row.model_dump()) for row in rows]


def read_evaluations(path: Path) -> list[EvaluationRow]:
    """The rows of the evaluations."""
    return [row for row in read_metrics(path) if isinstance(row, EvaluationRow)]
