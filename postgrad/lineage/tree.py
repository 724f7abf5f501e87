"""The stages that led to a model, and the loss matrix of every stage on every held-out set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from postgrad.errors import StageError
from postgrad.lineage.growth import GrowthCost, read_growth
from postgrad.lineage.matrix import Lineage, LineageSet, LineageStage, LineageSummary
from postgrad.lineage.record import RECORD, Parent, Record, SetChange, read_record
from postgrad.stats.forgetting import summarize_scores

Stages = list[tuple[Path, Record]]
"""Run folders with their records, the first stage first."""


def read_lineage(run: Path) -> Stages:
    """The runs from the first stage to `run`, each with its record.

    A parent is found at its recorded path, or relative to the child's folder when both moved. Raises `StageError` when a
    parent is missing or was replaced.
    """
    stages: Stages = []
    folder: Path | None = run.resolve()
    while folder is not None:
        if any(folder == path for path, _ in stages):
            raise StageError("the lineage is a circle", where=str(folder))
        record = read_record(folder)
        stages.append((folder, record))
        folder = _find_parent(folder, record.parents[0]) if record.parents else None
    return stages[::-1]


def _find_parent(child: Path, parent: Parent) -> Path:
    for folder in (Path(parent.path), child / parent.relative):
        if (folder / RECORD).exists():
            record = read_record(folder.resolve())
            if record.id != parent.id:
                raise StageError(
                    f"{folder} is no longer the run that {child.name} started from",
                    where="lineage",
                    expected=f"the run with id {parent.id}, not {record.id}",
                )
            if parent.step is None and parent.fingerprint and parent.fingerprint != record.fingerprints.model:
                raise StageError(
                    f"the model of {folder} is no longer the one that {child.name} started from",
                    where="lineage",
                    expected=f"the fingerprint {parent.fingerprint}, not {record.fingerprints.model}",
                    hint="restore the folder from a backup, or train the stage again from the present model",
                )
            return folder.resolve()
    raise StageError(
        f"the parent of {child.name} is missing", where="lineage", expected=f"a run folder at {parent.path}"
    )


def lineage_matrix(stages: Stages, score_missing: Callable[[int, str], float | None]) -> Lineage:
    """The loss matrix of a lineage (nats per token). `score_missing(row, set key)` scores a cell that no record has."""
    columns, learned_at = _columns(stages)
    keys = list(learned_at)
    losses = _recorded_losses(stages, columns, keys)
    for i, j in zip(*np.nonzero(np.isnan(losses)), strict=True):
        value = score_missing(int(i), keys[int(j)])
        losses[i, j] = np.nan if value is None else value
    summary = summarize_scores(-losses, [learned_at[key] for key in keys])
    denominators = {{"FM": "forgetting"}.get(name, name): text for name, text in summary.denominators.items()}
    return Lineage(
        stages=_stage_rows(stages),
        sets=[
            LineageSet(name=name, learnt_at=learned_at[key])
            for name, key in zip(_column_names(keys), keys, strict=True)
        ],
        R=[[None if np.isnan(x) else float(x) for x in row] for row in losses],
        summary=LineageSummary(
            ACC=summary.accuracy,
            BWT=summary.backward_transfer,
            FWT=summary.forward_transfer,
            forgetting=summary.forgetting,
            denominators=denominators,
        ),
        growth=_first_growth(stages[0][1]),
    )


def _first_growth(record: Record) -> GrowthCost | None:
    """What the growth of the first start model cost."""
    source = record.model.source or record.model.start_model
    return read_growth(Path(record.stage_folder or ".") / source)


def _columns(stages: Stages) -> tuple[dict[str, str], dict[str, int]]:
    """The key of each set by its fingerprint, and the first stage (from 1) that trained on it, or 0.

    A text has one column, under its first name: a replay of it is held out under another name.
    """
    columns: dict[str, str] = {}
    learned_at: dict[str, int] = {}
    for i, (_, record) in enumerate(stages, start=1):
        for name, change in _comparable_changes(record).items():
            key = columns.setdefault(record.set_fingerprint(name), set_key(record, name))
            if not learned_at.setdefault(key, 0) and change.role == "learned":
                learned_at[key] = i
    return columns, learned_at


def _recorded_losses(stages: Stages, columns: dict[str, str], keys: list[str]) -> np.ndarray:
    """The losses in the records; NaN elsewhere. Scores with another context length are not comparable."""
    context_length = stages[-1][1].model.context_length
    losses = np.full((len(stages) + 1, len(keys)), np.nan)
    for i, (_, record) in enumerate(stages, start=1):
        if record.model.context_length != context_length:
            continue
        for name in _comparable_changes(record):
            j = keys.index(columns[record.set_fingerprint(name)])
            for row, scores in ((i - 1, record.scores.before), (i, record.scores.after)):
                losses[row, j] = scores[name].nats if name in scores else np.nan
    return losses


def _stage_rows(stages: Stages) -> list[LineageStage]:
    start = stages[0][1].model.start_model
    rows = [LineageStage(name="start", path=start, model=start)]
    # A stage may start from a checkpoint of its parent: the lineage then leads through that checkpoint.
    children = [record.parents[0] for _, record in stages[1:]]
    branches = [parent if parent.step else None for parent in children] + [None]
    for (path, record), branch in zip(stages, branches, strict=True):
        rows.append(
            LineageStage(
                name=record.name + (f" at step {branch.step}" if branch else ""),
                path=str(path),
                model=record.model.start_model,
                created=record.created,
                tokens=(branch.trained_tokens or 0) if branch else record.published_tokens,
            )
        )
    return rows


def _column_names(keys: list[str]) -> list[str]:
    """The names of the sets, with a part of the fingerprint where several share one."""
    names = [key.split(":", 1)[0] for key in keys]
    return [
        f"{name}-{key.split(':', 1)[1][:6]}" if names.count(name) > 1 else name
        for name, key in zip(names, keys, strict=True)
    ]


def _comparable_changes(record: Record) -> dict[str, SetChange]:
    """The sets that other models may be scored on too: all but test sets, which are scored once."""
    return {name: change for name, change in record.changes.items() if change.role != "test"}


def set_key(record: Record, name: str) -> str:
    """`name:fingerprint` of a held-out set of a run."""
    return f"{name}:{record.set_fingerprint(name)}"
