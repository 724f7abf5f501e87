"""Phase 1: take the run folder for this stage, load the model, and fix in plan.json what a resumed run must repeat."""

from __future__ import annotations

import dataclasses
import json
import uuid
from pathlib import Path
from typing import Any

from postgrad.distributed.world import World
from postgrad.hardware.execution import Execution
from postgrad.lineage.record import PLAN, RECORD, STAGE, read_record
from postgrad.plan.plan import Plan
from postgrad.plan.sources import make_source_records
from postgrad.run.anchors import penalty_fingerprints
from postgrad.run.build import TunedModel, choose_execution, make_tuned_model
from postgrad.run.context import RunContext, prepare_model
from postgrad.run.events import Phase, PhaseStarted, RunFinished, WarningMessage
from postgrad.run.run_folder import Interrupt, claim_run_folder
from postgrad.run.write_record import dump_stage, utc_timestamp
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
    if (plan.output / RECORD).exists() and read_record(plan.output)["status"] != "stopped":
        yield RunFinished(read_record(plan.output), plan.output, already_complete=True)
        return None

    yield PhaseStarted("loading the model")
    tuned_model = make_tuned_model(plan, world)
    for note in tuned_model.loaded_model.notes:
        yield WarningMessage(note)
    execution = _resolve_execution(plan, tuned_model, saved_plan, world)
    prepare_model(plan, tuned_model.model, execution)
    if world.is_main:
        write_atomically(plan.output / STAGE, dump_stage(plan.stage))
        document = _plan_document(plan, fingerprints, execution, saved_plan or {})
        write_atomically(plan.output / PLAN, json.dumps(document, indent=1))
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
        json.loads((plan.output / PLAN).read_text()),
        execution,
        tuned_model.counts(),
        (*tuned_model.loaded_model.notes, *tuned_model.tuning.notes),
        tuned_model,
    )


def _resolve_execution(
    plan: Plan, tuned_model: TunedModel, saved_plan: dict[str, Any] | None, world: World
) -> Execution:
    """How to compute: measured once and saved, since a resumed run must give the same bits."""
    if saved_plan is None:
        # Ranks may time differently; all take the first rank's choice.
        return world.all_gather(choose_execution(plan, tuned_model, world))[0]  # type: ignore[return-value]
    execution = Execution(**saved_plan["execution"])
    # With another number of ranks a rank has other rows. The micro-batch size does not change the result.
    rows_per_rank = plan.data.mixture.block_size // world.size
    micro = max(m for m in range(1, min(execution.micro, rows_per_rank) + 1) if rows_per_rank % m == 0)
    return dataclasses.replace(execution, micro=micro)


def _plan_document(
    plan: Plan, fingerprints: dict[str, Any], execution: Execution, saved_plan: dict[str, Any]
) -> dict[str, Any]:
    """The content of plan.json; a resumed run keeps its id, its date and the strengths of its penalties."""
    return {
        "stage": plan.stage.model_dump(mode="json"),
        "start": plan.model.start.name,
        "fingerprints": fingerprints,
        "execution": execution.as_dict(),
        "plan": plan.as_record(),
        "seen_before": plan.data.seen_sources,
        "leaves": make_source_records(plan.data.sources, plan.model.start, plan.stage.seed),
        "strengths": saved_plan.get("strengths", {}),
        "id": saved_plan.get("id") or uuid.uuid4().hex,
        "created": saved_plan.get("created") or utc_timestamp(),
    }
