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

from postgrad.config.quantities import in_steps
from postgrad.data.loading.loader import Loader
from postgrad.distributed.fsdp import reshard
from postgrad.distributed.world import World
from postgrad.errors import PostgradError
from postgrad.evaluation import before_after
from postgrad.evaluation.continuations import Prompt, continuations, prompts, text_of
from postgrad.evaluation.held_out import AnyHeldOut
from postgrad.evaluation.pseudo_perplexity import score_one_by_one
from postgrad.hardware import machine
from postgrad.hardware.execution import Execution
from postgrad.lineage.record import PLAN, RECORD, STAGE, Record, read_record, write_record
from postgrad.models.model import Model, model_for, probe
from postgrad.models.pretrained import locate
from postgrad.plan.checkpoint_selection import Chooser, look_at
from postgrad.plan.plan import Plan
from postgrad.plan.sources import leaves_of
from postgrad.reports.pages import run_page
from postgrad.run import task_scores
from postgrad.run.anchors import about_penalty, penalty_prints
from postgrad.run.build import (
    Counts,
    Subject,
    build,
    choose_execution,
    make_loader,
    make_optimizer,
    make_step,
    make_subject,
)
from postgrad.run.cached_teacher import ask, asked_once, told_by_leaf
from postgrad.run.measure_drift import drift_of
from postgrad.run.penalty_strength import anchors_of, find_strengths, open_strengths, settle, strength_lines, too_strong
from postgrad.run.publish_model import publish_trained, sitting
from postgrad.run.relearning import left_alone, realigned
from postgrad.run.relearning import said as realign_lines
from postgrad.run.run_folder import Interrupt, alone, claim
from postgrad.run.update_summary import about_update
from postgrad.run.write_record import METRICS, achieved, describe, now, seen_after, stage_text
from postgrad.storage.atomic import sweep, verify, write_atomically
from postgrad.storage.fingerprint import fingerprint, model_fingerprint
from postgrad.training.checkpoint import Checkpoints
from postgrad.training.checkpoint_files import Keeping, restore, write_state
from postgrad.training.loop import steps
from postgrad.training.metrics_log import Metrics, Pace, read_metrics
from postgrad.training.step import Run, StepReport
from postgrad.tuning.open_model import open_model, start_fingerprint

MODEL = "model"
REPORT = "report.html"


@dataclass(frozen=True)
class Began:
    """The run is built; training goes on from `step`."""

    plan: Plan
    execution: Execution
    step: int
    counts: Counts


@dataclass(frozen=True)
class Stepped:
    """A step was made."""

    report: StepReport
    seconds: float
    tokens_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class Looked:
    """The held-out sets were scored; `row` is the line of metrics."""

    row: dict[str, Any]


@dataclass(frozen=True)
class Saved:
    """A checkpoint was published."""

    step: int
    place: Path


@dataclass(frozen=True)
class Doing:
    """Something other than training takes a while; `measuring`: held-out text is scored."""

    what: str
    measuring: bool = False


@dataclass(frozen=True)
class Said:
    """Something that was found out, for whoever reads along."""

    what: str


@dataclass(frozen=True)
class Warned:
    """Something the user should know."""

    what: str


@dataclass(frozen=True)
class Stopped:
    """The user asked to stop; the run was saved at `step`."""

    step: int
    steps: int


@dataclass(frozen=True)
class Finished:
    """The run is complete (`already`: it was before)."""

    record: Record
    place: Path
    already: bool = False


Event = Began | Stepped | Looked | Saved | Doing | Said | Warned | Stopped | Finished


def run_stage(plan: Plan, *, command: str, cache: Path) -> Iterator[Event]:
    """Carry out a stage. Raises the error of whatever fails; what was trained up to the last checkpoint is kept."""
    machine.tune_allocator()
    with World.joined(machine.device()) as world, alone(plan.output, world), Interrupt() as interrupt:
        # A generator of its own, so that nothing of the run outlives the process group.
        yield from _carried_out(plan, world, interrupt, command=command, cache=cache)


def _carried_out(plan: Plan, world: World, interrupt: Interrupt, *, command: str, cache: Path) -> Iterator[Event]:
    """Build or resume, train, publish, measure, record."""
    home = plan.output
    world.wait()
    finished = home / RECORD
    identity = start_fingerprint(plan.start) or plan.start.name
    fingerprints = {**plan.fingerprints(), "start_model": identity}
    if plan.stage.penalties:
        fingerprints["penalties"] = penalty_prints(plan)
    kept = claim(home, plan, fingerprints)
    if finished.exists() and read_record(home)["status"] != "stopped":
        yield Finished(read_record(home), home, already=True)
        return

    yield Doing("loading the model")
    subject = make_subject(plan, world)
    model = subject.model
    counts, notes = subject.counts(), (*subject.opened.notes, *subject.tuning.notes)
    for note in subject.opened.notes:
        yield Warned(note)
    execution = _execution(plan, subject, kept, world)
    _prepare(plan, model, execution)
    if world.main:
        document = {
            "stage": plan.stage.model_dump(mode="json"),
            "start": plan.start.name,
            "fingerprints": fingerprints,
            "execution": execution.as_dict(),
            "plan": plan.as_record(),
            "seen_before": plan.seen,
            "leaves": leaves_of(plan.leaves, plan.start, plan.stage.seed),
            "strengths": (kept or {}).get("strengths", {}),
            "id": (kept or {}).get("id") or uuid.uuid4().hex,
            "created": (kept or {}).get("created") or now(),
        }
        write_atomically(home / STAGE, stage_text(plan.stage))
        write_atomically(home / PLAN, json.dumps(document, indent=1))
        sweep(home)
    world.wait()
    kept = json.loads((home / PLAN).read_text())

    # Before: on the exact start model, once, in fp32, as it is without the stage's tuning.
    yield Doing("scoring the start model", measuring=True)
    before_file, samples_file = home / "scores" / "before.npz", home / "scores" / "samples-before.json"
    pseudo_file = home / "scores" / "pseudo-before.npz"
    tasks_file = home / "scores" / "tasks-before.json"
    # A sharded model cannot write by itself (generation is one rank's business): no samples then.
    each = 0 if world.sharded else plan.stage.evaluation.samples
    wanted = [p for h in plan.looked_at for p in prompts(h, each)]
    told = json.loads(samples_file.read_text()) if samples_file.exists() else []
    begun = before_file.exists() and len(told) == len(wanted) and (not plan.pseudo or pseudo_file.exists())
    begun &= not plan.tasks or tasks_file.exists()
    if world.any(not begun):  # one rank may write before another looks
        del subject, model  # there may be room for one model only
        before, pseudo_before, told, answers = _begin(plan, wanted, identity, cache, world)
        if world.main:
            before_after.write_scores(before_file, before)
            if plan.pseudo:
                before_after.write_scores(pseudo_file, pseudo_before)
            write_atomically(samples_file, json.dumps(told))
            if answers:
                task_scores.write_answers(tasks_file, answers)
        yield Doing("making ready to train")
        subject = make_subject(plan, world)
        model = subject.model
        _prepare(plan, model, execution)
    world.wait()
    before = before_after.read_scores(before_file)
    pseudo_before = before_after.read_scores(pseudo_file) if plan.pseudo else {}
    answers_before = task_scores.read_answers(tasks_file)
    if interrupt.wanted(world):
        yield Stopped(0, plan.steps)
        return

    if world.any(any(asked.told.missing() for asked in asked_once(plan))):
        del subject, model
        for what in ask(plan, execution, world):
            yield Doing(what)
            if interrupt.wanted(world):
                yield Stopped(0, plan.steps)
                return
        subject = make_subject(plan, world)
        model = subject.model
        _prepare(plan, model, execution)

    run = build(plan, subject, execution, world)
    loader = make_loader(plan, execution, world, told=told_by_leaf(plan))
    for note in task_scores.one_process_only(plan.tasks) if world.sharded else ():
        yield Warned(note)
    if open_strengths(run):
        yield from _settled(plan, run, loader, kept)
    keep = None if plan.stage.save.keep == "all" else plan.stage.save.keep
    checkpoints = Checkpoints(home / "checkpoints", keep, besides=int(plan.choice is not None))
    trouble: list[str] = []
    newest = checkpoints.newest(trouble.append)
    for message in trouble:
        yield Warned(message)
    if newest:
        restore(run, newest)
    elif world.main:
        checkpoints.require_room(16 * counts.trainable)
    metrics = Metrics(home / METRICS)
    if world.main:
        metrics.rewind(run.step if newest else -1)
    yield Began(plan, execution, run.step, counts)

    at = checkpoints.place(0)
    keeping = Keeping(fingerprints["stage"], subject.options, sitting(plan, at))
    about = [about_penalty(penalty) for penalty in anchors_of(run)]
    update = about_update(plan, run.optimizer.moving)
    chooser = _chooser(plan, home, world)
    stop = yield from _train(plan, run, loader, checkpoints, metrics, interrupt, keeping, chooser)
    if stop:
        _record_stop(home, plan, kept, fingerprints, execution, counts, run, command, world, about, update)
        yield Stopped(run.step, plan.steps)
        return

    last = run.step
    done = achieved(home, plan, run.trained, [int(n) for n in run.trained_by_source], last)
    if chooser:
        yield from _take_best(chooser, run, checkpoints)
    yield Doing("publishing the model")
    if not (home / MODEL).exists():
        state = run.weights.whole_state() if subject.tuning.whole else run.weights.state()
        if world.main:
            publish_trained(home / MODEL, plan, subject, state)
        del state
    world.wait()
    # After: on what was published, read back with plain transformers, unless it is spread over several machines.
    yield Doing("scoring the trained model", measuring=True)
    by_source = [int(n) for n in run.trained_by_source]
    del run, subject
    if not world.sharded:
        del model
        verify(home / MODEL)
        opened = open_model(locate(str(home / MODEL), home))
        model = model_for(opened.model, opened.task).to(world.device)
    after = before_after.measure(model, plan.held_out, context=plan.context, world=world)
    pseudo = before_after.measure(model, plan.pseudo, score_one_by_one, context=plan.context, world=world)
    answers = _answers_after(plan, home, model, world)
    samples = _samples(plan, model.pretrained, wanted, told) if world.main else []
    moved = None
    if plan.stage.evaluation.drift_tokens and not world.sharded:
        yield Doing("holding the trained model beside the start model", measuring=True)
        moved = drift_of(plan, model, world)
    won_back = None
    for note in left_alone(plan) if not world.sharded else ():
        yield Warned(note)
    if plan.stage.evaluation.realign_steps and not world.sharded:
        yield Doing("re-aligning copies on old text")
        try:
            won_back = realigned(plan, home / MODEL, (before, after), execution, world, cache)
        except PostgradError as error:  # the stage itself is done
            yield Warned(f"the copies could not be re-aligned: {error}")
        for line in realign_lines(won_back) if won_back else ():
            yield Said(line)
    tests = [h for h in plan.held_out_before if h.role == "test"]
    if tests:
        del model  # there may be room for one model only
        yield Doing("scoring the start model on the test sets", measuring=True)
        own, start = _with_layer(plan, identity), _start_model(plan, world)
        before |= before_after.measure(start, tests, context=plan.context, world=world, identity=own, cache=cache)
    yield Doing("writing the record" if world.main else "the first rank writes the record")
    if not world.main:
        return
    before_after.write_scores(home / "scores" / "after.npz", after)
    if pseudo:
        before_after.write_scores(home / "scores" / "pseudo-after.npz", pseudo)
    if answers:
        task_scores.write_answers(home / "scores" / "tasks-after.json", answers)
    if tests:
        before_after.write_scores(home / "scores" / "test-before.npz", {h.name: before[h.name] for h in tests})
    found = before_after.outcome(plan.held_out, before, after, plan.vocabulary)
    gate = before_after.gate(found["changes"], before, plan.stage.max_forgetting)
    record = describe(home, plan, kept, fingerprints, execution, counts, command, notes)
    record |= {
        "status": "finished" if gate is None or gate["passed"] else "gate-failed",
        "finished": now(),
        "penalties": about,
        "update": update,
        "achieved": done,
        "chosen": chooser.described(last) if chooser else None,
        "seen": seen_after(plan, by_source),
        **found,
        "drift": moved,
        "realign": won_back,
        "pseudo_perplexity": before_after.outcome(plan.pseudo, pseudo_before, pseudo, plan.vocabulary)
        if pseudo
        else None,
        "gate": gate,
        "tasks": task_scores.table_of(plan.tasks, answers_before, answers),
        "clusters": task_scores.clusters_of(plan.tasks, answers_before, answers, plan.clusters_seen),
        "samples": samples,
    }
    record["fingerprints"]["model"] = model_fingerprint(home / MODEL)
    write_record(home, record)
    write_atomically(home / REPORT, run_page.run_page(record, read_metrics(home / METRICS)))
    yield Finished(read_record(home), home)


def _settled(plan: Plan, run: Run, loader: Loader, kept: dict[str, Any]) -> Iterator[Event]:
    """Give every penalty its strength: the one that is kept of this run, or one that is found now and kept."""
    if not kept["strengths"]:
        yield Doing("finding how strong the penalties are to be")
        rates = [plan.schedule(step) for step in range(1, plan.steps + 1)]
        kept["strengths"] = find_strengths(run, loader, rates, make_optimizer(plan, run.weights, run.optimizer.moving))
        if run.world.main:
            write_atomically(plan.output / PLAN, json.dumps(kept, indent=1))
        run.world.wait()
        for line in strength_lines(kept["strengths"]):
            yield Said(line)
    settle(run, kept["strengths"])


def _train(
    plan: Plan,
    run: Run,
    loader: Loader,
    checkpoints: Checkpoints,
    metrics: Metrics,
    interrupt: Interrupt,
    keeping: Keeping,
    chooser: Chooser | None,
) -> Iterator[Event]:
    """The loop with its observers; its value is True when the user stopped it."""
    world, pace = run.world, Pace()
    looks = look_steps(plan.stage.evaluation.every, plan.steps, plan.tokens)
    saves = save_steps(plan.stage.save.every, plan.steps, plan.tokens)
    quick = [plan.first_look(h) for h in plan.looked_at]

    def look(sets: Sequence[AnyHeldOut]) -> before_after.AllScores:
        with run.weights.full_precision():
            found = before_after.measure(run.model, sets, context=plan.context, world=world)
            reshard(run.model)
            return found

    # A sharded model cannot write by itself: its tasks are asked before and after.
    asked = [task for task in plan.tasks if task.task.during and not world.sharded]

    def at_tasks(row: dict[str, Any], answers: task_scores.AllAnswers | None = None) -> dict[str, Any]:
        if not asked:
            return row
        with run.weights.full_precision():
            now = task_scores.ask(run.model, asked, plan.reading, world=world) if answers is None else answers
        return {**row, "tasks": task_scores.look_of(asked, now)}

    def save() -> Saved:
        metrics.sync()
        best = chooser.standing.best if chooser else None
        stays = best.step if best else None
        if world.sharded:  # gathering is everyone's business, writing is the first rank's
            return _save_together(checkpoints, run, plan, keeping, stays)
        place = checkpoints.save(run.step, lambda f: write_state(f, run, plan.tokenizer, keeping), stays)
        return Saved(run.step, place)

    # The same documents, cut the same way, on the start model: what changes during training are held against.
    start_file = plan.output / "scores" / "start.npz"
    if world.any(not start_file.exists()):  # only ever reached at step 0
        tuning = run.weights.tuning
        with tuning.off() if tuning.additive else nullcontext():
            start = look([plan.first_look(h) for h in plan.looked_at_before])
        if world.main:
            before_after.write_scores(start_file, start)
    world.wait()
    start = before_after.read_scores(start_file)
    if run.step == 0 and world.main:
        row = before_after.evaluation_row(0, 0, quick, start, start, plan.vocabulary)
        metrics.write(at_tasks(row, task_scores.read_answers(plan.output / "scores" / "tasks-before.json")))
    saved_at, told = run.step, False
    ended = chooser is not None and chooser.standing.stop
    for report in steps(run, loader, run.step if ended else plan.steps, make_step(plan, run)):
        seconds = pace.step(report.tokens)
        if world.main:
            metrics.write(
                {
                    "kind": "step",
                    "step": report.step,
                    "tokens": report.tokens,
                    "trained": report.trained,
                    "loss": report.loss,
                    "losses": report.losses,
                    "penalties": report.penalties,
                    "by_source": report.by_source,
                    "rate": report.rate,
                    "grad_norm": report.gradient_norm,
                    **({} if report.push is None else {"push": report.push}),
                    **({} if report.moved is None else {"moved": report.moved}),
                    "seconds": round(seconds, 4),
                }
            )
        if not told and (warning := too_strong(report)):
            told = True
            yield Warned(warning)
        yield Stepped(report, seconds, pace.rate, pace.left((plan.steps - report.step) * report.tokens))
        better = False
        if report.step in looks:
            scores = look(quick)
            row = before_after.evaluation_row(report.step, report.trained, quick, start, scores, plan.vocabulary)
            if chooser:
                row["choice"] = chooser.add(look_at(chooser.rule, row, scores, start))
                better, ended = row["choice"]["best"] == report.step, chooser.standing.stop
            row = at_tasks(row)
            if world.main:
                metrics.write(row)
            yield Looked(row)
            run.model.train()
        stop = interrupt.wanted(world) and report.step < plan.steps
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


def _save_together(checkpoints: Checkpoints, run: Run, plan: Plan, keeping: Keeping, stays: int | None) -> Saved:
    if run.world.main:
        place = checkpoints.save(run.step, lambda f: write_state(f, run, plan.tokenizer, keeping), stays)
    else:
        with tempfile.TemporaryDirectory() as nothing:
            write_state(Path(nothing), run, plan.tokenizer, keeping)
        place = checkpoints.place(run.step)
    run.world.wait()
    return Saved(run.step, place)


def _chooser(plan: Plan, home: Path, world: World) -> Chooser | None:
    """What chooses the step that is published, with the looks that there were before."""
    if plan.choice is None:
        return None
    rows = [row for row in read_metrics(home / METRICS) if row["kind"] == "evaluation"] if world.main else []
    return Chooser(plan.choice, world.gathered(rows)[0])  # type: ignore[arg-type]


def _take_best(chooser: Chooser, run: Run, checkpoints: Checkpoints) -> Iterator[Event]:
    """Put the run where the chosen step left it. Raises `CheckpointError` when that checkpoint is gone or not whole."""
    found = chooser.standing
    assert found.best is not None  # the last step is always looked at
    if found.stop:
        yield Doing(f"training ends at step {run.step:,}: {found.since} looks without a gain on {chooser.rule.set}")
    if found.best.step == run.step:
        return
    yield Doing(f"taking the best checkpoint, of step {found.best.step:,}")
    place = checkpoints.place(found.best.step)
    verify(place)
    restore(run, place)


def look_steps(every: str, steps: int, tokens: int) -> set[int]:
    """When the held-out sets are scored: evenly, at the end, and densely in the first 2 %, where a dip is expected."""
    stride = max(1, round(in_steps(every, steps, tokens)))
    early = {max(1, round(share * steps)) for share in (0.0025, 0.005, 0.01, 0.015, 0.02)}
    return {*early, *range(stride, steps + 1, stride), steps}


def save_steps(every: str, steps: int, tokens: int) -> set[int]:
    """When checkpoints are written: evenly, and at the end."""
    stride = max(1, round(in_steps(every, steps, tokens)))
    return {*range(stride, steps + 1, stride), steps}


def _begin(
    plan: Plan, wanted: list[Prompt], identity: str, cache: Path, world: World
) -> tuple[before_after.AllScores, before_after.AllScores, list[str], task_scores.AllAnswers]:
    """The start model's scores, those of text that is masked token by token, what it writes and what it answers."""
    identity, model = _with_layer(plan, identity), _start_model(plan, world)
    scores = before_after.measure(
        model, plan.looked_at_before, context=plan.context, world=world, identity=identity, cache=cache
    )
    told = (
        continuations(model.pretrained, plan.tokenizer, wanted, plan.reading.without.before, plan.reading.encoder.bos)
        if world.main
        else []
    )
    one_by_one = before_after.measure(
        model,
        plan.pseudo_before,
        score_one_by_one,
        context=plan.context,
        world=world,
        identity=identity,
        cache=cache,
    )
    answers = task_scores.ask(model, plan.tasks_before, plan.reading, world=world, identity=identity, cache=cache)
    return scores, one_by_one, told, answers


def _answers_after(plan: Plan, home: Path, model: Model, world: World) -> task_scores.AllAnswers:
    """What the published model answers; where it is spread over several machines, each reads the whole of it back."""
    if plan.tasks and world.sharded:
        world.wait()
        verify(home / MODEL)
        opened = open_model(locate(str(home / MODEL), home))
        model = model_for(opened.model, opened.task).to(world.device)
    return task_scores.ask(model, plan.tasks, plan.reading, world=world)


def _start_model(plan: Plan, world: World) -> Model:
    """The exact start model, in fp32, without the stage's tuning."""
    opened = open_model(plan.start, plan.task, layer=plan.layer)
    return model_for(opened.model, plan.task).to(world.device)


def _with_layer(plan: Plan, identity: str) -> str:
    """The start model's fingerprint with that of its task layer: a new one is drawn by the stage's seed."""
    return fingerprint([identity, dataclasses.asdict(plan.layer)]) if plan.layer else identity


def _prepare(plan: Plan, model: Model, execution: Execution) -> None:
    """Let the model compute attention as chosen, and check that it is one that can be trained here."""
    if model.pretrained.config._attn_implementation != execution.attention:
        model.pretrained.set_attn_implementation(execution.attention)
    probe(model, prefixes=plan.prefixes)


def _execution(plan: Plan, subject: Subject, kept: dict[str, Any] | None, world: World) -> Execution:
    """How to compute: chosen once and kept, so that a resumed run has the same bits."""
    if kept:
        execution = Execution(**kept["execution"])
        mine = plan.mixture.block // world.size
        # With another number of ranks the rows part differently; the result does not depend on it.
        micro = max(m for m in range(1, min(execution.micro, mine) + 1) if mine % m == 0)
        return dataclasses.replace(execution, micro=micro)
    chosen = choose_execution(plan, subject, world)
    return world.gathered(chosen)[0]  # type: ignore[return-value]


def _samples(plan: Plan, model: PreTrainedModel, wanted: list[Prompt], before: list[str]) -> list[dict[str, str]]:
    after = continuations(model, plan.tokenizer, wanted, plan.reading.before, plan.reading.encoder.bos)
    return [
        {
            "set": p.set,
            "prompt": text_of(plan.tokenizer, p.ids),
            "reference": text_of(plan.tokenizer, p.reference),
            "before": b,
            "after": a,
        }
        for p, b, a in zip(wanted, before, after, strict=True)
    ]


def _record_stop(
    home: Path,
    plan: Plan,
    kept: dict[str, Any],
    fingerprints: dict[str, Any],
    execution: Execution,
    counts: Counts,
    run: Run,
    command: str,
    world: World,
    penalties: list[dict[str, Any]],
    update: dict[str, Any] | None,
) -> None:
    """Leave a record of a run that was stopped, so that it can be reported on."""
    if not world.main:
        return
    by_source = [int(n) for n in run.trained_by_source]
    record = describe(home, plan, kept, fingerprints, execution, counts, command)
    before = before_after.read_scores(home / "scores" / "before.npz")
    record |= {
        "status": "stopped",
        "finished": now(),
        "penalties": penalties,
        "update": update,
        "achieved": achieved(home, plan, run.trained, by_source, run.step),
        "seen": seen_after(plan, by_source),
        "scores": {"before": {n: v.summary() for n, v in before.items()}, "after": {}},
        "changes": {},
        "gate": None,
        "tasks": task_scores.table_of(plan.tasks, task_scores.read_answers(home / "scores" / "tasks-before.json"), {}),
        "samples": [],
    }
    write_record(home, record)
    write_atomically(home / REPORT, run_page.run_page(record, read_metrics(home / METRICS)))
