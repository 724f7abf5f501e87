"""Phase 1: take the run folder for this stage, load the model, and fix in plan.json what a resumed run must repeat."""

from __future__ import annotations

import dataclasses
import uuid
from pathlib import Path
from typing import Any

from postgrad.config.stage_file import dump_stage
from postgrad.distributed.world import World
from postgrad.hardware.execution import Execution
from postgrad.lineage.record import RECORD, STAGE, ExecutionSummary, read_record
from postgrad.lineage.saved_plan import SavedPlan, read_plan, write_plan
from postgrad.plan.plan import Plan
from postgrad.plan.seen_sources import make_source_records
from postgrad.run.anchors import penalty_fingerprints
from postgrad.run.build import choose_execution
from postgrad.run.context import RunContext, prepare_model
from postgrad.run.events import Phase, PhaseStarted, RunFinished, WarningMessage
from postgrad.run.run_folder import Interrupt, claim_run_folder
from postgrad.run.tuned_model import TunedModel, make_tuned_model
from postgrad.run.write_record import utc_timestamp
from postgrad.storage.atomic import remove_staging, write_atomically
from postgrad.tuning.open_model import start_fingerprint


def claim_run(plan: Plan, world: World, interrupt: Interrupt, *, command: str, cache: Path) -> Phase[RunContext | None]:
    """Claim the run folder and load the model; None when the run is already complete."""
    world.barrier()
    start_identity = start_fingerprint(plan.model.start) or plan.model.start.name
    fingerprints = {**plan.fingerprints(), "start_model": start_identity}
    if plan.stage.penalties:
        fingerprints["penalties"] = penalty_fingerprints(plan)
    saved_plan = claim_run_folder(plan.output, plan, fingerprints)
    if (plan.output / RECORD).exists() and read_record(plan.output).status != "stopped":
        yield RunFinished(read_record(plan.output), plan.output, already_complete=True)
        return None

    yield PhaseStarted("loading the model")
    tuned_model = make_tuned_model(plan, world)
    for note in tuned_model.loaded_model.notes:
        yield WarningMessage(note)
    execution = _resolve_execution(plan, tuned_model, saved_plan, world)
    prepare_model(plan, tuned_model.model, execution)
    if world.is_main:
        write_atomically(plan.output / STAGE, dump_stage(plan.stage.model_dump(mode="json")))
        write_plan(plan.output, _make_saved_plan(plan, fingerprints, execution, saved_plan))
        remove_staging(plan.output)
    world.barrier()
    return RunContext(
        plan,
        world,
        interrupt,
        command,
        cache,
        start_identity,
        fingerprints,
        read_plan(plan.output),
        execution,
        tuned_model.counts(),
        (*tuned_model.loaded_model.notes, *tuned_model.tuning.notes),
        tuned_model,
    )


def _resolve_execution(plan: Plan, tuned_model: TunedModel, saved_plan: SavedPlan | None, world: World) -> Execution:
    """How to compute: measured once and saved, since a resumed run must give the same bits."""
    if saved_plan is None:
        # Ranks may time differently; all take the first rank's choice.
        return world.all_gather(choose_execution(plan, tuned_model, world))[0]  # type: ignore[return-value]
    execution = Execution(**saved_plan.execution.as_json())
    # With another number of ranks a rank has other rows. The micro-batch size does not change the result.
    rows_per_rank = plan.data.mixture.block_size // world.size
    micro = max(m for m in range(1, min(execution.micro, rows_per_rank) + 1) if rows_per_rank % m == 0)
    return dataclasses.replace(execution, micro=micro)


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
        penalty_strengths=earlier.penalty_strengths if earlier else {},
    )
