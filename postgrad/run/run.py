"""A stage, carried out: the one place where all parts meet.

build or resume -> for each step: write it, look when due, save when due -> publish the model, measure, record

`run_stage` is a generator of events. Whoever iterates it shows them; nothing is called back. Killed anywhere and started
again with the same command it goes on from the newest whole checkpoint and ends with the same bits.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from postgrad.config.quantities import length_in_steps
from postgrad.data.loading.loader import Loader
from postgrad.distributed.fsdp import reshard
from postgrad.distributed.world import World
from postgrad.errors import PostgradError
from postgrad.evaluation import before_after
from postgrad.evaluation.continuations import ContinuationPrompt, decode_ids, generate_continuations, select_prompts
from postgrad.evaluation.held_out import HeldOutSet
from postgrad.evaluation.pseudo_perplexity import score_masked_tokens
from postgrad.evaluation.retention_gate import retention_gate
from postgrad.hardware import machine
from postgrad.hardware.execution import Execution
from postgrad.lineage.record import PLAN, RECORD, STAGE, Record, read_record, write_record
from postgrad.models.model import Model, verify_model, wrap_model
from postgrad.models.pretrained import locate_model
from postgrad.plan.checkpoint_selection import CheckpointSelector, summarize_evaluation
from postgrad.plan.plan import Plan
from postgrad.plan.sources import make_source_records
from postgrad.reports.pages import run_page
from postgrad.run import task_scores
from postgrad.run.anchors import describe_penalty, penalty_fingerprints
from postgrad.run.build import (
    ParameterCounts,
    TunedModel,
    build_run,
    choose_execution,
    make_loader,
    make_optimizer,
    make_step,
    make_tuned_model,
)
from postgrad.run.cached_teacher import caches_by_source, fill_teacher_caches, find_cache_jobs
from postgrad.run.measure_drift import measure_drift
from postgrad.run.penalty_strength import (
    anchors_without_strength,
    find_strengths,
    get_anchors,
    penalty_warning,
    set_strengths,
    strength_lines,
)
from postgrad.run.publish_model import base_reference, publish_trained_model
from postgrad.run.relearning import measure_relearning, relearning_notes
from postgrad.run.relearning import relearning_lines as realign_lines
from postgrad.run.run_folder import Interrupt, claim_run_folder, lock_run_folder
from postgrad.run.update_summary import describe_update
from postgrad.run.write_record import (
    METRICS,
    dump_stage,
    make_record,
    summarize_training,
    update_seen_sources,
    utc_timestamp,
)
from postgrad.storage.atomic import remove_staging, verify, write_atomically
from postgrad.storage.fingerprint import fingerprint, model_fingerprint
from postgrad.training.checkpoint import Checkpoints
from postgrad.training.checkpoint_files import CheckpointMetadata, restore_run, write_checkpoint
from postgrad.training.loop import train_steps
from postgrad.training.metrics_log import MetricsLog, Throughput, read_metrics
from postgrad.training.step import Run, StepReport
from postgrad.tuning.open_model import open_model, start_fingerprint

MODEL = "model"
REPORT = "report.html"


@dataclass(frozen=True)
class RunStarted:
    """The run is built; training goes on from `step`."""

    plan: Plan
    execution: Execution
    step: int
    counts: ParameterCounts


@dataclass(frozen=True)
class StepCompleted:
    """A step was made."""

    report: StepReport
    seconds: float
    tokens_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class EvaluationCompleted:
    """The held-out sets were scored; `row` is the line of metrics."""

    row: dict[str, Any]


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint was published."""

    step: int
    folder: Path


@dataclass(frozen=True)
class PhaseStarted:
    """Something other than training takes a while; `measuring`: held-out text is scored."""

    message: str
    is_evaluation: bool = False


@dataclass(frozen=True)
class InfoMessage:
    """Something that was found out, for whoever reads along."""

    message: str


@dataclass(frozen=True)
class WarningMessage:
    """Something the user should know."""

    message: str


@dataclass(frozen=True)
class RunStopped:
    """The user asked to stop; the run was saved at `step`."""

    step: int
    steps: int


@dataclass(frozen=True)
class RunFinished:
    """The run is complete (`already`: it was before)."""

    record: Record
    run_folder: Path
    already_complete: bool = False


RunEvent = (
    RunStarted
    | StepCompleted
    | EvaluationCompleted
    | CheckpointSaved
    | PhaseStarted
    | InfoMessage
    | WarningMessage
    | RunStopped
    | RunFinished
)


def run_stage(plan: Plan, *, command: str, cache: Path) -> Iterator[RunEvent]:
    """Carry out a stage. Raises the error of whatever fails; what was trained up to the last checkpoint is kept."""
    machine.tune_allocator()
    with (
        World.init_process_group(machine.default_device()) as world,
        lock_run_folder(plan.output, world),
        Interrupt() as interrupt,
    ):
        # A generator of its own, so that nothing of the run outlives the process group.
        yield from _execute_stage(plan, world, interrupt, command=command, cache=cache)


def _execute_stage(plan: Plan, world: World, interrupt: Interrupt, *, command: str, cache: Path) -> Iterator[RunEvent]:
    """Build or resume, train, publish, measure, record."""
    home = plan.output
    world.barrier()
    finished = home / RECORD
    identity = start_fingerprint(plan.model.start) or plan.model.start.name
    fingerprints = {**plan.fingerprints(), "start_model": identity}
    if plan.stage.penalties:
        fingerprints["penalties"] = penalty_fingerprints(plan)
    kept = claim_run_folder(home, plan, fingerprints)
    if finished.exists() and read_record(home)["status"] != "stopped":
        yield RunFinished(read_record(home), home, already_complete=True)
        return

    yield PhaseStarted("loading the model")
    subject = make_tuned_model(plan, world)
    model = subject.model
    counts, notes = subject.counts(), (*subject.loaded_model.notes, *subject.tuning.notes)
    for note in subject.loaded_model.notes:
        yield WarningMessage(note)
    execution = _resolve_execution(plan, subject, kept, world)
    _prepare_model(plan, model, execution)
    if world.is_main:
        document = {
            "stage": plan.stage.model_dump(mode="json"),
            "start": plan.model.start.name,
            "fingerprints": fingerprints,
            "execution": execution.as_dict(),
            "plan": plan.as_record(),
            "seen_before": plan.data.seen_sources,
            "leaves": make_source_records(plan.data.sources, plan.model.start, plan.stage.seed),
            "strengths": (kept or {}).get("strengths", {}),
            "id": (kept or {}).get("id") or uuid.uuid4().hex,
            "created": (kept or {}).get("created") or utc_timestamp(),
        }
        write_atomically(home / STAGE, dump_stage(plan.stage))
        write_atomically(home / PLAN, json.dumps(document, indent=1))
        remove_staging(home)
    world.barrier()
    kept = json.loads((home / PLAN).read_text())

    # Before: on the exact start model, once, in fp32, as it is without the stage's tuning.
    yield PhaseStarted("scoring the start model", is_evaluation=True)
    before_file, samples_file = home / "scores" / "before.npz", home / "scores" / "samples-before.json"
    pseudo_file = home / "scores" / "pseudo-before.npz"
    tasks_file = home / "scores" / "tasks-before.json"
    # A sharded model cannot write by itself (generation is one rank's business): no samples then.
    each = 0 if world.is_distributed else plan.stage.evaluation.samples
    wanted = [p for h in plan.evaluation.scored_sets for p in select_prompts(h, each)]
    told = json.loads(samples_file.read_text()) if samples_file.exists() else []
    begun = (
        before_file.exists()
        and len(told) == len(wanted)
        and (not plan.evaluation.pseudo_perplexity_sets or pseudo_file.exists())
    )
    begun &= not plan.evaluation.tasks or tasks_file.exists()
    if world.any_rank(not begun):  # one rank may write before another looks
        del subject, model  # there may be room for one model only
        before, pseudo_before, told, answers = _evaluate_start_model(plan, wanted, identity, cache, world)
        if world.is_main:
            before_after.write_scores(before_file, before)
            if plan.evaluation.pseudo_perplexity_sets:
                before_after.write_scores(pseudo_file, pseudo_before)
            write_atomically(samples_file, json.dumps(told))
            if answers:
                task_scores.write_answers(tasks_file, answers)
        yield PhaseStarted("making ready to train")
        subject = make_tuned_model(plan, world)
        model = subject.model
        _prepare_model(plan, model, execution)
    world.barrier()
    before = before_after.read_scores(before_file)
    pseudo_before = before_after.read_scores(pseudo_file) if plan.evaluation.pseudo_perplexity_sets else {}
    answers_before = task_scores.read_answers(tasks_file)
    if interrupt.requested_on_any_rank(world):
        yield RunStopped(0, plan.steps)
        return

    if world.any_rank(any(asked.teacher_cache.missing_parts() for asked in find_cache_jobs(plan))):
        del subject, model
        for what in fill_teacher_caches(plan, execution, world):
            yield PhaseStarted(what)
            if interrupt.requested_on_any_rank(world):
                yield RunStopped(0, plan.steps)
                return
        subject = make_tuned_model(plan, world)
        model = subject.model
        _prepare_model(plan, model, execution)

    run = build_run(plan, subject, execution, world)
    loader = make_loader(plan, execution, world, teacher_caches=caches_by_source(plan))
    for note in task_scores.sharding_notes(plan.evaluation.tasks) if world.is_distributed else ():
        yield WarningMessage(note)
    if anchors_without_strength(run):
        yield from _apply_strengths(plan, run, loader, kept)
    keep = None if plan.stage.save.keep == "all" else plan.stage.save.keep
    checkpoints = Checkpoints(home / "checkpoints", keep, max_pinned=int(plan.evaluation.selection_rule is not None))
    trouble: list[str] = []
    newest = checkpoints.find_newest(trouble.append)
    for message in trouble:
        yield WarningMessage(message)
    if newest:
        restore_run(run, newest)
    elif world.is_main:
        checkpoints.require_room(16 * counts.trainable)
    metrics = MetricsLog(home / METRICS)
    if world.is_main:
        metrics.rewind(run.step if newest else -1)
    yield RunStarted(plan, execution, run.step, counts)

    at = checkpoints.step_folder(0)
    keeping = CheckpointMetadata(fingerprints["stage"], subject.options, base_reference(plan, at))
    about = [describe_penalty(penalty) for penalty in get_anchors(run)]
    update = describe_update(plan, run.optimizer.update_mask)
    chooser = _make_selector(plan, home, world)
    stop = yield from _train(plan, run, loader, checkpoints, metrics, interrupt, keeping, chooser)
    if stop:
        _write_stop_record(home, plan, kept, fingerprints, execution, counts, run, command, world, about, update)
        yield RunStopped(run.step, plan.steps)
        return

    last = run.step
    done = summarize_training(home, plan, run.trained_tokens, [int(n) for n in run.trained_tokens_by_source], last)
    if chooser:
        yield from _restore_best(chooser, run, checkpoints)
    yield PhaseStarted("publishing the model")
    if not (home / MODEL).exists():
        state = run.weights.full_state() if subject.tuning.is_full else run.weights.state()
        if world.is_main:
            publish_trained_model(home / MODEL, plan, subject, state)
        del state
    world.barrier()
    # After: on what was published, read back with plain transformers, unless it is spread over several machines.
    yield PhaseStarted("scoring the trained model", is_evaluation=True)
    by_source = [int(n) for n in run.trained_tokens_by_source]
    del run, subject
    if not world.is_distributed:
        del model
        verify(home / MODEL)
        opened = open_model(locate_model(str(home / MODEL), home))
        model = wrap_model(opened.model, opened.task).to(world.device)
    after = before_after.score_sets(model, plan.evaluation.sets, context=plan.model.context_length, world=world)
    pseudo = before_after.score_sets(
        model,
        plan.evaluation.pseudo_perplexity_sets,
        score_masked_tokens,
        context=plan.model.context_length,
        world=world,
    )
    answers = _answer_tasks_after(plan, home, model, world)
    samples = _make_samples(plan, model.pretrained, wanted, told) if world.is_main else []
    moved = None
    if plan.stage.evaluation.drift_tokens and not world.is_distributed:
        yield PhaseStarted("holding the trained model beside the start model", is_evaluation=True)
        moved = measure_drift(plan, model, world)
    won_back = None
    for note in relearning_notes(plan) if not world.is_distributed else ():
        yield WarningMessage(note)
    if plan.stage.evaluation.realign_steps and not world.is_distributed:
        yield PhaseStarted("re-aligning copies on old text")
        try:
            won_back = measure_relearning(plan, home / MODEL, (before, after), execution, world, cache)
        except PostgradError as error:  # the stage itself is done
            yield WarningMessage(f"the copies could not be re-aligned: {error}")
        for line in realign_lines(won_back) if won_back else ():
            yield InfoMessage(line)
    tests = [h for h in plan.evaluation.sets_before if h.role == "test"]
    if tests:
        del model  # there may be room for one model only
        yield PhaseStarted("scoring the start model on the test sets", is_evaluation=True)
        own, start = _start_identity(plan, identity), _load_start_model(plan, world)
        before |= before_after.score_sets(
            start, tests, context=plan.model.context_length, world=world, identity=own, cache=cache
        )
    yield PhaseStarted("writing the record" if world.is_main else "the first rank writes the record")
    if not world.is_main:
        return
    before_after.write_scores(home / "scores" / "after.npz", after)
    if pseudo:
        before_after.write_scores(home / "scores" / "pseudo-after.npz", pseudo)
    if answers:
        task_scores.write_answers(home / "scores" / "tasks-after.json", answers)
    if tests:
        before_after.write_scores(home / "scores" / "test-before.npz", {h.name: before[h.name] for h in tests})
    found = before_after.summarize_before_after(plan.evaluation.sets, before, after, plan.model.vocab_size)
    gate = retention_gate(found["changes"], before, plan.stage.max_forgetting)
    record = make_record(home, plan, kept, fingerprints, execution, counts, command, notes)
    record |= {
        "status": "finished" if gate is None or gate["passed"] else "gate-failed",
        "finished": utc_timestamp(),
        "penalties": about,
        "update": update,
        "achieved": done,
        "chosen": chooser.as_record(last) if chooser else None,
        "seen": update_seen_sources(plan, by_source),
        **found,
        "drift": moved,
        "realign": won_back,
        "pseudo_perplexity": before_after.summarize_before_after(
            plan.evaluation.pseudo_perplexity_sets, pseudo_before, pseudo, plan.model.vocab_size
        )
        if pseudo
        else None,
        "gate": gate,
        "tasks": task_scores.task_rows(plan.evaluation.tasks, answers_before, answers),
        "clusters": task_scores.cluster_rows(plan.evaluation.tasks, answers_before, answers, plan.seen_clusters),
        "samples": samples,
    }
    record["fingerprints"]["model"] = model_fingerprint(home / MODEL)
    write_record(home, record)
    write_atomically(home / REPORT, run_page.run_page(record, read_metrics(home / METRICS)))
    yield RunFinished(read_record(home), home)


def _apply_strengths(plan: Plan, run: Run, loader: Loader, saved_plan: dict[str, Any]) -> Iterator[RunEvent]:
    """Give every penalty its strength: the one that is kept of this run, or one that is found now and kept."""
    if not saved_plan["strengths"]:
        yield PhaseStarted("finding how strong the penalties are to be")
        rates = [plan.schedule(step) for step in range(1, plan.steps + 1)]
        saved_plan["strengths"] = find_strengths(
            run, loader, rates, make_optimizer(plan, run.weights, run.optimizer.update_mask)
        )
        if run.world.is_main:
            write_atomically(plan.output / PLAN, json.dumps(saved_plan, indent=1))
        run.world.barrier()
        for line in strength_lines(saved_plan["strengths"]):
            yield InfoMessage(line)
    set_strengths(run, saved_plan["strengths"])


def _train(
    plan: Plan,
    run: Run,
    loader: Loader,
    checkpoints: Checkpoints,
    metrics: MetricsLog,
    interrupt: Interrupt,
    checkpoint_metadata: CheckpointMetadata,
    selector: CheckpointSelector | None,
) -> Iterator[RunEvent]:
    """The loop with its observers; its value is True when the user stopped it."""
    world, pace = run.world, Throughput()
    looks = evaluation_steps(plan.stage.evaluation.every, plan.steps, plan.tokens)
    saves = checkpoint_steps(plan.stage.save.every, plan.steps, plan.tokens)
    quick = [plan.evaluation.subset(h) for h in plan.evaluation.scored_sets]

    def look(sets: Sequence[HeldOutSet]) -> before_after.AllScores:
        with run.weights.full_precision():
            found = before_after.score_sets(run.model, sets, context=plan.model.context_length, world=world)
            reshard(run.model)
            return found

    # A sharded model cannot write by itself: its tasks are asked before and after.
    asked = [task for task in plan.evaluation.tasks if task.task.during and not world.is_distributed]

    def at_tasks(row: dict[str, Any], answers: task_scores.AllAnswers | None = None) -> dict[str, Any]:
        if not asked:
            return row
        with run.weights.full_precision():
            now = (
                task_scores.answer_tasks(run.model, asked, plan.model.inputs, world=world)
                if answers is None
                else answers
            )
        return {**row, "tasks": task_scores.task_headlines(asked, now)}

    def save() -> CheckpointSaved:
        metrics.sync()
        best = selector.state.best if selector else None
        stays = best.step if best else None
        if world.is_distributed:  # gathering is everyone's business, writing is the first rank's
            return _save_sharded(checkpoints, run, plan, checkpoint_metadata, stays)
        place = checkpoints.save(
            run.step, lambda f: write_checkpoint(f, run, plan.model.tokenizer, checkpoint_metadata), stays
        )
        return CheckpointSaved(run.step, place)

    # The same documents, cut the same way, on the start model: what changes during training are held against.
    start_file = plan.output / "scores" / "start.npz"
    if world.any_rank(not start_file.exists()):  # only ever reached at step 0
        tuning = run.weights.tuning
        with tuning.disable() if tuning.additive else nullcontext():
            start = look([plan.evaluation.subset(h) for h in plan.evaluation.scored_sets_before])
        if world.is_main:
            before_after.write_scores(start_file, start)
    world.barrier()
    start = before_after.read_scores(start_file)
    if run.step == 0 and world.is_main:
        row = before_after.evaluation_row(0, 0, quick, start, start, plan.model.vocab_size)
        metrics.write(at_tasks(row, task_scores.read_answers(plan.output / "scores" / "tasks-before.json")))
    saved_at, told = run.step, False
    ended = selector is not None and selector.state.should_stop
    for report in train_steps(run, loader, run.step if ended else plan.steps, make_step(plan, run)):
        seconds = pace.step(report.tokens)
        if world.is_main:
            metrics.write(
                {
                    "kind": "step",
                    "step": report.step,
                    "tokens": report.tokens,
                    "trained": report.trained_tokens,
                    "loss": report.loss,
                    "losses": report.losses,
                    "penalties": report.penalties,
                    "by_source": report.losses_by_source,
                    "rate": report.rate,
                    "grad_norm": report.gradient_norm,
                    **({} if report.loss_gradient_norm is None else {"push": report.loss_gradient_norm}),
                    **({} if report.num_updated is None else {"moved": report.num_updated}),
                    "seconds": round(seconds, 4),
                }
            )
        if not told and (warning := penalty_warning(report)):
            told = True
            yield WarningMessage(warning)
        yield StepCompleted(
            report, seconds, pace.tokens_per_second, pace.remaining_seconds((plan.steps - report.step) * report.tokens)
        )
        better = False
        if report.step in looks:
            scores = look(quick)
            row = before_after.evaluation_row(
                report.step, report.trained_tokens, quick, start, scores, plan.model.vocab_size
            )
            if selector:
                row["choice"] = selector.add(summarize_evaluation(selector.rule, row, scores, start))
                better, ended = row["choice"]["best"] == report.step, selector.state.should_stop
            row = at_tasks(row)
            if world.is_main:
                metrics.write(row)
            yield EvaluationCompleted(row)
            run.model.train()
        stop = interrupt.requested_on_any_rank(world) and report.step < plan.steps
        if report.step in saves or stop or better:
            yield save()
            saved_at = report.step
        if stop and not ended:
            return True
        if ended:
            break
        pace.pause()
    if saved_at < run.step:
        yield save()
    return False


def _save_sharded(
    checkpoints: Checkpoints, run: Run, plan: Plan, checkpoint_metadata: CheckpointMetadata, protected_step: int | None
) -> CheckpointSaved:
    if run.world.is_main:
        place = checkpoints.save(
            run.step, lambda f: write_checkpoint(f, run, plan.model.tokenizer, checkpoint_metadata), protected_step
        )
    else:
        with tempfile.TemporaryDirectory() as nothing:
            write_checkpoint(Path(nothing), run, plan.model.tokenizer, checkpoint_metadata)
        place = checkpoints.step_folder(run.step)
    run.world.barrier()
    return CheckpointSaved(run.step, place)


def _make_selector(plan: Plan, run_folder: Path, world: World) -> CheckpointSelector | None:
    """What chooses the step that is published, with the looks that there were before."""
    if plan.evaluation.selection_rule is None:
        return None
    rows = [row for row in read_metrics(run_folder / METRICS) if row["kind"] == "evaluation"] if world.is_main else []
    return CheckpointSelector(plan.evaluation.selection_rule, world.all_gather(rows)[0])  # type: ignore[arg-type]


def _restore_best(selector: CheckpointSelector, run: Run, checkpoints: Checkpoints) -> Iterator[RunEvent]:
    """Put the run where the chosen step left it. Raises `CheckpointError` when that checkpoint is gone or not whole."""
    found = selector.state
    assert found.best is not None  # the last step is always looked at
    if found.should_stop:
        yield PhaseStarted(
            f"training ends at step {run.step:,}: {found.candidates_since_gain} looks without a gain on {selector.rule.set}"
        )
    if found.best.step == run.step:
        return
    yield PhaseStarted(f"taking the best checkpoint, of step {found.best.step:,}")
    place = checkpoints.step_folder(found.best.step)
    verify(place)
    restore_run(run, place)


def evaluation_steps(every: str, steps: int, tokens: int) -> set[int]:
    """When the held-out sets are scored: evenly, at the end, and densely in the first 2 %, where a dip is expected."""
    stride = max(1, round(length_in_steps(every, steps, tokens)))
    early = {max(1, round(share * steps)) for share in (0.0025, 0.005, 0.01, 0.015, 0.02)}
    return {*early, *range(stride, steps + 1, stride), steps}


def checkpoint_steps(every: str, steps: int, tokens: int) -> set[int]:
    """When checkpoints are written: evenly, and at the end."""
    stride = max(1, round(length_in_steps(every, steps, tokens)))
    return {*range(stride, steps + 1, stride), steps}


def _evaluate_start_model(
    plan: Plan, sample_prompts: list[ContinuationPrompt], identity: str, cache: Path, world: World
) -> tuple[before_after.AllScores, before_after.AllScores, list[str], task_scores.AllAnswers]:
    """The start model's scores, those of text that is masked token by token, what it writes and what it answers."""
    identity, model = _start_identity(plan, identity), _load_start_model(plan, world)
    scores = before_after.score_sets(
        model,
        plan.evaluation.scored_sets_before,
        context=plan.model.context_length,
        world=world,
        identity=identity,
        cache=cache,
    )
    told = (
        generate_continuations(
            model.pretrained,
            plan.model.tokenizer,
            sample_prompts,
            plan.model.inputs.without_tuning.virtual_tokens,
            plan.model.inputs.encoder.bos,
        )
        if world.is_main
        else []
    )
    one_by_one = before_after.score_sets(
        model,
        plan.evaluation.pseudo_perplexity_sets_before,
        score_masked_tokens,
        context=plan.model.context_length,
        world=world,
        identity=identity,
        cache=cache,
    )
    answers = task_scores.answer_tasks(
        model, plan.evaluation.tasks_before, plan.model.inputs, world=world, identity=identity, cache=cache
    )
    return scores, one_by_one, told, answers


def _answer_tasks_after(plan: Plan, run_folder: Path, model: Model, world: World) -> task_scores.AllAnswers:
    """What the published model answers; where it is spread over several machines, each reads the whole of it back."""
    if plan.evaluation.tasks and world.is_distributed:
        world.barrier()
        verify(run_folder / MODEL)
        opened = open_model(locate_model(str(run_folder / MODEL), run_folder))
        model = wrap_model(opened.model, opened.task).to(world.device)
    return task_scores.answer_tasks(model, plan.evaluation.tasks, plan.model.inputs, world=world)


def _load_start_model(plan: Plan, world: World) -> Model:
    """The exact start model, in fp32, without the stage's tuning."""
    opened = open_model(plan.model.start, plan.model.task, layer=plan.model.task_layer)
    return wrap_model(opened.model, plan.model.task).to(world.device)


def _start_identity(plan: Plan, identity: str) -> str:
    """The start model's fingerprint with that of its task layer: a new one is drawn by the stage's seed."""
    return fingerprint([identity, dataclasses.asdict(plan.model.task_layer)]) if plan.model.task_layer else identity


def _prepare_model(plan: Plan, model: Model, execution: Execution) -> None:
    """Let the model compute attention as chosen, and check that it is one that can be trained here."""
    if model.pretrained.config._attn_implementation != execution.attention:
        model.pretrained.set_attn_implementation(execution.attention)
    verify_model(model, prefix_tokens=plan.prefix_length)


def _resolve_execution(
    plan: Plan, tuned_model: TunedModel, saved_plan: dict[str, Any] | None, world: World
) -> Execution:
    """How to compute: chosen once and kept, so that a resumed run has the same bits."""
    if saved_plan:
        execution = Execution(**saved_plan["execution"])
        mine = plan.data.mixture.block_size // world.size
        # With another number of ranks the rows part differently; the result does not depend on it.
        micro = max(m for m in range(1, min(execution.micro, mine) + 1) if mine % m == 0)
        return dataclasses.replace(execution, micro=micro)
    chosen = choose_execution(plan, tuned_model, world)
    return world.all_gather(chosen)[0]  # type: ignore[return-value]


def _make_samples(
    plan: Plan, model: PreTrainedModel, sample_prompts: list[ContinuationPrompt], before: list[str]
) -> list[dict[str, str]]:
    after = generate_continuations(
        model, plan.model.tokenizer, sample_prompts, plan.model.inputs.virtual_tokens, plan.model.inputs.encoder.bos
    )
    return [
        {
            "set": p.set_name,
            "prompt": decode_ids(plan.model.tokenizer, p.ids),
            "reference": decode_ids(plan.model.tokenizer, p.reference),
            "before": b,
            "after": a,
        }
        for p, b, a in zip(sample_prompts, before, after, strict=True)
    ]


def _write_stop_record(
    run_folder: Path,
    plan: Plan,
    saved_plan: dict[str, Any],
    fingerprints: dict[str, Any],
    execution: Execution,
    counts: ParameterCounts,
    run: Run,
    command: str,
    world: World,
    penalties: list[dict[str, Any]],
    update: dict[str, Any] | None,
) -> None:
    """Leave a record of a run that was stopped, so that it can be reported on."""
    if not world.is_main:
        return
    by_source = [int(n) for n in run.trained_tokens_by_source]
    record = make_record(run_folder, plan, saved_plan, fingerprints, execution, counts, command)
    before = before_after.read_scores(run_folder / "scores" / "before.npz")
    record |= {
        "status": "stopped",
        "finished": utc_timestamp(),
        "penalties": penalties,
        "update": update,
        "achieved": summarize_training(run_folder, plan, run.trained_tokens, by_source, run.step),
        "seen": update_seen_sources(plan, by_source),
        "scores": {"before": {n: v.summary() for n, v in before.items()}, "after": {}},
        "changes": {},
        "gate": None,
        "tasks": task_scores.task_rows(
            plan.evaluation.tasks, task_scores.read_answers(run_folder / "scores" / "tasks-before.json"), {}
        ),
        "samples": [],
    }
    write_record(run_folder, record)
    write_atomically(run_folder / REPORT, run_page.run_page(record, read_metrics(run_folder / METRICS)))
