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
from postgrad.lineage.record import PLAN, Record, add_stage
from postgrad.optim import lr_schedules
from postgrad.plan.plan import Plan
from postgrad.plan.sources import count_consumed_tokens, make_source_records
from postgrad.run.tuned_model import ParameterCounts
from postgrad.stats.source_losses import losses_by_source
from postgrad.storage.fingerprint import model_fingerprint
from postgrad.training.checkpoint_files import read_progress
from postgrad.training.metrics_log import read_metrics
from postgrad.version import __version__

METRICS = "metrics.jsonl"


def make_record(
    run_folder: Path,
    plan: Plan,
    saved_plan: dict[str, Any],
    fingerprints: dict[str, Any],
    execution: Execution,
    counts: ParameterCounts,
    command: str,
    notes: Sequence[str] = (),
) -> Record:
    return {
        "id": saved_plan["id"],
        "name": plan.stage.name,
        "created": saved_plan["created"],
        "command": command,
        "stage_yaml": dump_stage(plan.stage),
        "stage": plan.stage.model_dump(mode="json"),
        "root": str(plan.root),
        "model": {
            "start": plan.model.start.name,
            "source": plan.model.start.name_or_path,
            "parameters": counts.parameters,
            "trainable": counts.trainable,
            "task": plan.model.task,
            "vocabulary": plan.model.vocab_size,
            "context": plan.model.context_length,
            **({"fresh": plan.model.start.scratch_recipe} if plan.model.start.scratch_recipe else {}),
        },
        "fingerprints": dict(fingerprints),
        "parents": find_parents(run_folder, plan),
        "versions": {
            "postgrad": __version__,
            **{name: metadata.version(name) for name in ("torch", "transformers", "tokenizers", "numpy")},
            "python": platform.python_version(),
        },
        "machine": {
            "cpu": machine.processor_name(),
            "cores": machine.core_count(),
            "device": machine.default_device().type,
            "system": platform.system(),
        },
        "execution": execution.as_dict(),
        "plan": plan.as_record(),
        "ledger": {leaf.name: r.ledger.as_dict() for leaf, r in zip(plan.data.sources, plan.data.rows, strict=True)},
        "notes": [*plan.notes, *notes],
        "overlap": plan.data.overlaps,
        "schedule_curve": lr_schedules.sample_schedule(plan.schedule, plan.steps),
        "held_out": [
            {"name": h.name, "role": h.role, "documents": len(h), "fingerprint": h.fingerprint}
            for h in plan.evaluation.sets
        ],
    }


def find_parents(run_folder: Path, plan: Plan) -> list[dict[str, Any]]:
    run = plan.model.start.run
    if run is None or not (run / PLAN).exists():
        return []
    parent = json.loads((run / PLAN).read_text())
    folder = plan.model.start.folder
    progress = read_progress(folder) if folder and (folder / "state.json").exists() else None
    return [
        {
            "path": str(run),
            "relative": os.path.relpath(run, run_folder),
            "name": run.name,
            "id": parent["id"],
            # Set when the stage branched from a checkpoint instead of the parent's final model.
            "step": progress.step if progress else None,
            "tokens": progress.trained if progress else None,
            "fingerprint": model_fingerprint(plan.model.start.folder) if plan.model.start.folder else "",
        }
    ]


def summarize_training(run_folder: Path, plan: Plan, trained: int, by_source: list[int], step: int) -> dict[str, Any]:
    block, first = plan.data.mixture.block_size, plan.stage.data.skip_steps
    rows = [
        b - a
        for a, b in zip(
            plan.data.mixture.counts(first * block), plan.data.mixture.counts((first + step) * block), strict=True
        )
    ]
    steps = [row for row in read_metrics(run_folder / METRICS) if row["kind"] == "step"]
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
            for leaf, n, r, packed in zip(plan.data.sources, by_source, rows, plan.data.rows, strict=True)
        ],
    }


def update_seen_sources(plan: Plan, by_source: list[int]) -> dict[str, dict[str, Any]]:
    return add_stage(
        plan.data.seen_sources,
        count_consumed_tokens(
            make_source_records(plan.data.sources, plan.model.start, plan.stage.seed),
            dict(zip(plan.data.source_names, by_source, strict=True)),
        ),
    )


def dump_stage(stage: s.Stage) -> str:
    return yaml.safe_dump(stage.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def utc_timestamp() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
