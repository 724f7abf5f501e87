"""Phase 1: take the run folder for this stage, load the model, and fix in plan.json what a resumed run must repeat."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from postgrad.config.stage_file import dump_stage
from postgrad.distributed.world import InputFile, World
from postgrad.hardware.execution import Execution
from postgrad.lineage.record import PLAN, RECORD, STAGE, ExecutionSummary, Record, read_record
from postgrad.lineage.saved_plan import SavedPlan, read_plan, write_plan
from postgrad.models.model import CausalModel
from postgrad.optim.lr_schedules import sample_schedule
from postgrad.plan.plan import Plan
from postgrad.plan.seen_sources import make_source_records
from postgrad.reports.pages.model_card import write_model_card
from postgrad.reports.pages.rewrite_report import rewrite_report
from postgrad.run.anchors import penalty_fingerprints
from postgrad.run.build import choose_execution, micro_batch_size
from postgrad.run.context import RunContext, prepare_model
from postgrad.run.events import Phase, PhaseStarted, RunFinished, WarningMessage
from postgrad.run.run_folder import MODEL, REPORT, Interrupt, claim_run_folder
from postgrad.run.tuned_model import TunedModel, make_tuned_model
from postgrad.run.update_masks import update_fingerprints
from postgrad.run.write_record import utc_timestamp
from postgrad.storage.atomic import remove_staging, write_without_secrets
from postgrad.storage.fingerprint import file_fingerprint, fingerprint
from postgrad.tuning.open_model import start_fingerprint


def claim_run(plan: Plan, world: World, interrupt: Interrupt, *, command: str, cache: Path) -> Phase[RunContext | None]:
    """Claim the run folder and load the model; None when the run is already complete."""
    start_identity = start_fingerprint(plan.model.start) or plan.model.start.name
    fingerprints = {**plan.fingerprints(), "start_model": start_identity}
    if plan.stage.penalties:
        fingerprints["penalties"] = penalty_fingerprints(plan)
    if files := update_fingerprints(plan):
        fingerprints["sparse_update"] = files
    world.require_same(lambda: _input_files(plan, fingerprints))
    saved_plan = world.from_first(lambda: claim_run_folder(plan.output, plan, fingerprints))
    if saved_plan:  # a stage that differs in harmless keys is still the same run
        fingerprints["stage"] = saved_plan.fingerprints["stage"]
    finished = world.from_first(lambda: _read_finished(plan.output))
    if finished:
        yield RunFinished(finished, plan.output, already_complete=True)
        return None

    yield PhaseStarted("loading the model")
    tuned_model = make_tuned_model(plan, world)
    for note in tuned_model.loaded_model.notes:
        yield WarningMessage(note)
    tuned_model.shard(world)  # in fp32, in which the model is probed
    execution = _resolve_execution(plan, tuned_model, saved_plan, world)
    prepare_model(plan, tuned_model.model, execution)
    is_probe = world.mesh is not None and execution.compute != torch.float32
    if world.is_main:
        write_without_secrets(plan.output / STAGE, dump_stage(plan.stage.model_dump(mode="json")))
        write_plan(plan.output, _make_saved_plan(plan, fingerprints, execution, saved_plan))
        remove_staging(plan.output)
    world.barrier()
    world.require_same(lambda: {PLAN: InputFile(str(plan.output / PLAN), file_fingerprint(plan.output / PLAN))})
    return RunContext(
        plan,
        world,
        interrupt,
        command,
        cache,
        start_identity,
        fingerprints,
        world.from_first(lambda: read_plan(plan.output)),
        execution,
        tuned_model.counts(),
        isinstance(tuned_model.model, CausalModel) and tuned_model.model.passes_documents,
        (*tuned_model.loaded_model.notes, *tuned_model.tuning.notes),
        None if is_probe else tuned_model,
    )


def _input_files(plan: Plan, fingerprints: Mapping[str, Any]) -> dict[str, InputFile]:
    """The fingerprints of all that a rank has read, by key."""
    sources = {f"data.{source.name}": source.spec.files.path for source in plan.data.sources}
    sets = {f"sets.{item.name}": item.path for _, item in plan.stage.evaluation.held_out_files()}
    paths = {"start_model": str(plan.model.start.folder or plan.model.start.name), **sources, **sets}
    flat = {
        f"{key}.{name}" if name else key: part
        for key, value in {**fingerprints, "plan": plan.as_record().as_json()}.items()
        for name, part in (value.items() if key in ("data", "sets", "tasks", "abilities") else [("", value)])
    }
    return {key: InputFile(paths.get(key) or "", fingerprint(value)) for key, value in flat.items()}


def _read_finished(run_folder: Path) -> Record | None:
    """The record of a run that is complete, whose missing page or model card is written again; None for any other."""
    if not (run_folder / RECORD).exists():
        return None
    record = read_record(run_folder)
    if record.status == "stopped":
        return None
    if not (run_folder / REPORT).exists():
        rewrite_report(run_folder)
    write_model_card(run_folder / MODEL, run_folder, record)
    return record


def _resolve_execution(plan: Plan, tuned_model: TunedModel, saved_plan: SavedPlan | None, world: World) -> Execution:
    """How to compute: measured once and saved, since a resumed run must give the same bits; what saves memory may change."""
    if saved_plan is None:
        # Ranks may time differently; all take the first rank's choice.
        return world.all_gather(choose_execution(plan, tuned_model, world))[0]  # type: ignore[return-value]
    execution = Execution(**saved_plan.execution.as_json())
    # With another number of ranks a rank has other rows. The micro-batch size does not change the result.
    rows_per_rank = plan.data.mixture.block_size // world.size
    largest = min(micro_batch_size(plan, world) or execution.micro, rows_per_rank)
    asked = plan.stage.compute.activation_checkpointing
    return dataclasses.replace(
        execution,
        micro=max(m for m in range(1, largest + 1) if rows_per_rank % m == 0),
        activation_checkpointing=execution.activation_checkpointing if asked == "auto" else bool(asked),
    )


def _make_saved_plan(
    plan: Plan, fingerprints: dict[str, Any], execution: Execution, earlier: SavedPlan | None
) -> SavedPlan:
    """The plan to save; a resumed run keeps its id, its date and the strengths of its penalties."""
    return SavedPlan(
        id=earlier.id if earlier else uuid.uuid4().hex,
        created=earlier.created if earlier else utc_timestamp(),
        stage=plan.stage.model_dump(mode="json"),
        start_model=plan.model.start.name,
        fingerprints=fingerprints,
        execution=ExecutionSummary.model_validate(execution.as_dict()),
        plan=plan.as_record(),
        consumed_before=plan.data.seen_sources,
        resolved_sources=make_source_records(plan.data.sources, plan.model.start, plan.stage.seed),
        schedule_curve=sample_schedule(plan.schedule, plan.steps),
        penalty_strengths=earlier.penalty_strengths if earlier else {},
    )
