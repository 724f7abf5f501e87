"""The rows of `metrics.jsonl`: one per step, skipped or not, and one per evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from postgrad.errors import PostgradError, StageError
from postgrad.foreign_text import mask_secrets
from postgrad.lineage.previous_format import upgrade_row
from postgrad.lineage.record import Record, RecordPart, SkippedStep
from postgrad.storage.checked_files import add_checksum, find_damage
from postgrad.storage.read_json import parse_json
from postgrad.storage.regular_file import open_regular_file

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
    balancing_loss: float | None = None
    """Of a mixture of experts, times its coefficient; `loss` does not include it."""
    updated_weights: int | None = None
    """Weights that a sparse update changed."""
    positions: int | None = None
    """Positions of the first rank's unpacked rows."""
    padding: int | None = None
    sampled_prompts: int | None = None
    """Of on-policy replay: the prompts that the model answered ..."""
    accepted_answers: int | None = None
    """... and those with an answer that is trained on."""
    """Those of them that only fill a row."""
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
    low: float | None = None
    high: float | None = None


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


@dataclass(frozen=True)
class Metrics:
    """The rows of a metrics file, and what is wrong with the file."""

    rows: list[MetricsRow]
    damage: list[str]
    """A sentence for each damaged line, which has no row, and one for missing lines."""

    def __iter__(self) -> Iterator[MetricsRow]:
        return iter(self.rows)

    @property
    def steps(self) -> list[StepRow]:
        """The rows of the steps."""
        return [row for row in self.rows if isinstance(row, StepRow)]

    @property
    def skipped_steps(self) -> list[SkippedStep]:
        """The steps without an update."""
        return [SkippedStep.model_validate(row.model_dump()) for row in self.rows if isinstance(row, SkippedStepRow)]

    @property
    def evaluations(self) -> list[EvaluationRow]:
        """The rows of the evaluations."""
        return [row for row in self.rows if isinstance(row, EvaluationRow)]


def read_metrics(path: Path, run_id: str = "", line_count: int | None = None) -> Metrics:
    """The rows of a metrics file. A damaged line, or one of another run than `run_id`, is left out and named.

    `line_count`: how many lines a finished run wrote. A killed process may leave an unfinished last line, which is no damage.
    """
    rows: list[MetricsRow] = []
    damage: list[str] = []
    for line in scan_metrics(path, run_id):
        if line.row is None:
            damage.append(line.damage)
        else:
            rows.append(line.row)
    found = len(rows) + len(damage)
    if line_count is not None and found != line_count:
        damage.append(f"{path} has {found:,} lines, and the run wrote {line_count:,}")
    return Metrics(rows, damage)


def read_run_metrics(run_folder: Path, record: Record) -> Metrics:
    """The metrics of a run with a record."""
    is_finished = record.status in ("finished", "gate-failed")
    return read_metrics(run_folder / METRICS, record.id, record.totals.metrics_lines if is_finished else None)


@dataclass(frozen=True)
class MetricsLine:
    """A line of a metrics file: its row, or None and what is wrong."""

    text: bytes
    row: MetricsRow | None
    damage: str = ""


def scan_metrics(path: Path, run_id: str = "", offset: int = 0) -> Iterator[MetricsLine]:
    """The lines of a metrics file from a byte on, damaged ones too, without an unfinished last one."""
    if not path.exists():
        return
    try:
        with open_regular_file(path) as file:
            file.seek(offset)
            for number, text in enumerate(file, 1):
                try:
                    yield MetricsLine(text, _parse_line(text, run_id))
                except (PostgradError, ValidationError) as error:
                    problem = error.problem if isinstance(error, PostgradError) else "it is not a row of metrics"
                    if text.endswith(b"\n"):
                        yield MetricsLine(text, None, f"{path}:{number} is left out: {problem}")
    except OSError as error:
        raise StageError(error.strerror or str(error), where=str(path)) from error


def _parse_line(text: bytes, run_id: str) -> MetricsRow:
    raw: dict[str, Any] = parse_json(text, dict[str, Any], where="")
    if problem := find_damage(raw, run_id):
        raise StageError(problem)
    return parse_row(raw)


def format_row(row: MetricsRow, run_id: str) -> str:
    """A line of the metrics file, with a checksum and without secrets."""
    return json.dumps(add_checksum(json.loads(mask_secrets(json.dumps(row.as_json()))), run_id)) + "\n"
