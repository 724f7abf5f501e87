"""What does a run write down about itself? What went in, who its parents are, what it consumed, where it ran."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from postgrad.config import stage as s
from postgrad.hardware import machine
from postgrad.hardware.execution import Execution
from postgrad.lineage.record import PLAN, Record, with_stage
from postgrad.optim import lr_schedules
from postgrad.plan.plan import Plan
from postgrad.plan.sources import consumed, leaves_of
from postgrad.run.build import Counts
from postgrad.stats.source_losses import losses_by_source
from postgrad.storage.fingerprint import model_fingerprint
from postgrad.training.checkpoint_files import read_progress
from postgrad.training.metrics_log import read_metrics
from postgrad.version import __version__

METRICS = "metrics.jsonl"


def describe(
    home: Path,
    plan: Plan,
    kept: dict[str, Any],
    fingerprints: dict[str, Any],
    execution: Execution,
    counts: Counts,
    command: str,
    notes: Sequence[str] = (),
) -> Record:
    return {
        "id": kept["id"],
        "name": plan.stage.name,
        "created": kept["created"],
        "command": command,
        "stage_yaml": stage_text(plan.stage),
        "stage": plan.stage.model_dump(mode="json"),
        "root": str(plan.root),
        "model": {
            "start": plan.start.name,
            "source": plan.start.source,
            "parameters": counts.parameters,
            "trainable": counts.trainable,
            "task": plan.task,
            "vocabulary": plan.vocabulary,
            "context": plan.context,
            **({"fresh": plan.start.made} if plan.start.made else {}),
        },
        "fingerprints": dict(fingerprints),
        "parents": parents_of(home, plan),
        "versions": {
            "postgrad": __version__,
            **{name: metadata.version(name) for name in ("torch", "transformers", "tokenizers", "numpy")},
            "python": platform.python_version(),
        },
        "machine": {
            "cpu": machine.processor(),
            "cores": machine.cores(),
            "device": machine.device().type,
            "system": platform.system(),
        },
        "execution": execution.as_dict(),
        "plan": plan.as_record(),
        "ledger": {leaf.name: r.ledger.as_dict() for leaf, r in zip(plan.leaves, plan.rows, strict=True)},
        "notes": [*plan.notes, *notes],
        "overlap": plan.overlap,
        "schedule_curve": lr_schedules.sampled(plan.schedule, plan.steps),
        "held_out": [
            {"name": h.name, "role": h.role, "documents": len(h), "fingerprint": h.fingerprint} for h in plan.held_out
        ],
    }


def parents_of(home: Path, plan: Plan) -> list[dict[str, Any]]:
    run = plan.start.run
    if run is None or not (run / PLAN).exists():
        return []
    parent = json.loads((run / PLAN).read_text())
    folder = plan.start.folder
    progress = read_progress(folder) if folder and (folder / "state.json").exists() else None
    return [
        {
            "path": str(run),
            "relative": os.path.relpath(run, home),
            "name": run.name,
            "id": parent["id"],
            # Set when the stage branched from a checkpoint instead of the parent's final model.
            "step": progress.step if progress else None,
            "tokens": progress.trained if progress else None,
            "fingerprint": model_fingerprint(plan.start.folder) if plan.start.folder else "",
        }
    ]


def achieved(home: Path, plan: Plan, trained: int, by_source: list[int], step: int) -> dict[str, Any]:
    block, first = plan.mixture.block, plan.stage.data.skip_steps
    rows = [
        b - a
        for a, b in zip(plan.mixture.counts(first * block), plan.mixture.counts((first + step) * block), strict=True)
    ]
    steps = [row for row in read_metrics(home / METRICS) if row["kind"] == "step"]
    seconds = sum(row["seconds"] for row in steps)
    losses = losses_by_source(steps)
    return {
        "steps": step,
        "tokens": trained,
        "seconds": seconds,
        "tokens_per_second": trained / max(seconds, 1e-9),
        "sources": [
            {
                "name": leaf.name,
                "role": leaf.role,
                "share": n / max(trained, 1),
                "trained": n,
                "rows": r,
                "passes": r / len(packed),
                **({"loss": losses[leaf.name]} if leaf.name in losses else {}),
            }
            for leaf, n, r, packed in zip(plan.leaves, by_source, rows, plan.rows, strict=True)
        ],
    }


def seen_after(plan: Plan, by_source: list[int]) -> dict[str, dict[str, Any]]:
    return with_stage(
        plan.seen,
        consumed(leaves_of(plan.leaves, plan.start, plan.stage.seed), dict(zip(plan.sources, by_source, strict=True))),
    )


def stage_text(stage: s.Stage) -> str:
    return yaml.safe_dump(stage.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
