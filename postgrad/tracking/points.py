"""The points of a run that trackers show, from its metrics and its record."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from postgrad.lineage.metrics import METRICS, EvaluationRow, MetricsRow, SkippedStepRow, StepRow, scan_metrics
from postgrad.lineage.record import Difference, Interval, MetricValue, Record, SetScore


@dataclass(frozen=True)
class Point:
    """The values of one step or one evaluation."""

    index: int
    """Its place in the order of all points of the run: the same on each reading, whatever was killed and resumed."""
    step: int
    seconds: float
    """Unix time; the metrics hold durations, so times of evaluations and saves are not in it."""
    values: Mapping[str, float]


@dataclass
class MetricsTail:
    """Reads the points of a growing `metrics.jsonl`, from the last line that was read."""

    run_folder: Path
    run_id: str
    created: float
    """Unix time at which the run began."""
    _offset: int = 0
    _inode: int = 0
    _seconds: float = field(default=0.0)

    def read(self) -> Iterator[Point]:
        """The points since the last call; a file that was replaced (by a resumed run) is read from its beginning."""
        path = self.run_folder / METRICS
        if not path.exists():
            return
        status = path.stat()
        if status.st_ino != self._inode or status.st_size < self._offset:
            self._offset, self._inode, self._seconds = 0, status.st_ino, 0.0
        for line in scan_metrics(path, self.run_id, self._offset):
            if not line.text.endswith(b"\n"):  # still being written
                return
            self._offset += len(line.text)
            if line.row is not None:  # a damaged line is named by the record
                self._seconds += getattr(line.row, "seconds", 0.0)
                yield _make_point(line.row, self.created + self._seconds)


def unix_time(timestamp: str) -> float:
    """Of an ISO time of a record."""
    return dt.datetime.fromisoformat(timestamp).timestamp()


def result_point(record: Record) -> Point:
    """The results of a finished run: changes with intervals, the gate, drift, shares, tasks."""
    values = {"results/trained_tokens": float(record.published_tokens), "results/seconds": record.totals.seconds}
    values |= {f"results/share/{source.name}": source.share for source in record.totals.sources}
    for when, scores in (("before", record.scores.before), ("after", record.scores.after)):
        for name, score in scores.items():
            values |= _score_values(f"results/{name}/{when}", score)
    for name, change in record.changes.items():
        values |= _interval_values(f"results/{name}/change", change)
        if change.relative_difference is not None:
            values[f"results/{name}/relative_change"] = change.relative_difference
    if gate := record.retention_gate:
        values |= {
            "results/gate/passed": float(gate.passed),
            "results/gate/relative_high": gate.worst.relative_high,
            "results/gate/max_forgetting": gate.max_forgetting,
        }
    if drift := record.drift:
        for name, moved in drift.sets.items():
            values |= _interval_values(f"results/{name}/kl_divergence", moved.kl_divergence)
        values |= {f"results/weight_change/{part}": change for part, change in drift.relative_weight_change.items()}
    if abilities := record.abilities:
        values |= _interval_values("results/abilities/change", abilities.change) if abilities.change else {}
        if gate := abilities.gate:
            values |= {
                "results/abilities/gate/passed": float(gate.passed),
                "results/abilities/gate/max_drop": gate.max_drop,
            }
    for task in (*record.tasks, *(record.abilities.tasks if record.abilities else ())):
        for when, metrics in (("before", task.before), ("after", task.after)):
            for metric, value in metrics.items():
                values |= _interval_values(f"results/{task.name}/{metric}/{when}", value)
        for metric, change in task.changes.items():
            values |= _interval_values(f"results/{task.name}/{metric}/change", change)
    steps = record.totals.steps
    end = unix_time(record.finished or record.created)
    return Point(2 * steps + 2, steps, end, _clean_values(values))


def _make_point(row: MetricsRow, seconds: float) -> Point:
    match row:
        case EvaluationRow():
            return Point(2 * row.step + 1, row.step, seconds, _clean_values(_evaluation_values(row)))
        case SkippedStepRow():
            return Point(2 * row.step, row.step, seconds, {"train/skipped": 1.0})
        case StepRow():
            return Point(2 * row.step, row.step, seconds, _clean_values(_step_values(row)))


def _step_values(row: StepRow) -> dict[str, float | None]:
    values: dict[str, float | None] = {
        "train/loss": row.loss,
        "train/learning_rate": row.learning_rate,
        "train/grad_norm": row.grad_norm,
        "train/trained_tokens": float(row.trained_tokens),
        "train/tokens_per_second": row.tokens / row.seconds if row.seconds else None,
    }
    if len(row.losses_by_objective) > 1:
        values |= {f"train/loss/{name}": loss for name, loss in row.losses_by_objective.items()}
    values |= {f"train/penalty/{name}": value for name, value in row.penalties.items()}
    for name, (loss_sum, tokens) in row.loss_sums_by_source.items():
        values[f"train/loss/{name}"] = loss_sum / tokens if tokens else None
        values[f"train/share/{name}"] = tokens / row.tokens if row.tokens else None
    return values


def _evaluation_values(row: EvaluationRow) -> dict[str, float | None]:
    values: dict[str, float | None] = {}
    for name, held_out in row.sets.items():
        values |= {
            f"held_out/{name}/nats": held_out.nats,
            f"held_out/{name}/change": held_out.change,
            f"held_out/{name}/change_low": held_out.low,
            f"held_out/{name}/change_high": held_out.high,
        }
    values |= {f"tasks/{name}/{task.metric}": task.value for name, task in row.tasks.items()}
    if choice := row.checkpoint_selection:
        values["checkpoint/value"] = choice.value
    return values


def _interval_values(name: str, interval: Interval | Difference | MetricValue) -> dict[str, float | None]:
    value = interval.difference if isinstance(interval, Difference) else interval.value
    return {name: value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _score_values(name: str, score: SetScore) -> dict[str, float | None]:
    values = {name: score.nats, f"{name}_low": score.low, f"{name}_high": score.high}
    values[f"{name}_bits_per_byte"] = score.bits_per_byte
    for metric, value in score.metrics.items():
        values |= _interval_values(f"{name}_{metric}", value)
    return values


def _clean_values(values: Mapping[str, float | None]) -> dict[str, float]:
    """The known values, under names that every tracker allows."""
    return {re.sub(r"[^\w.\-/ ]", "_", name): value for name, value in values.items() if value is not None}
