"""Phase 6: measure the published model, and compare it with the start model."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from postgrad.distributed.fsdp import gather_root
from postgrad.errors import PostgradError
from postgrad.evaluation import before_after
from postgrad.evaluation.before_after import AllScores
from postgrad.evaluation.continuations import decode_ids, generate_continuations
from postgrad.evaluation.pseudo_perplexity import score_masked_tokens
from postgrad.lineage.record import DriftRecord, Relearning, Sample
from postgrad.models.model import Model
from postgrad.plan.plan import Plan
from postgrad.run import task_scores
from postgrad.run.baseline import Baseline
from postgrad.run.context import RunContext
from postgrad.run.events import InfoMessage, Phase, PhaseStarted, WarningMessage
from postgrad.run.measure_drift import measure_drift
from postgrad.run.relearning import measure_relearning, relearning_lines, relearning_notes
from postgrad.run.run_folder import MODEL
from postgrad.run.task_scores import AllAnswers


@dataclass(frozen=True)
class Measurements:
    """What the trained model scores, writes and answers. None: not measured."""

    scores: AllScores
    pseudo_scores: AllScores
    test_scores_before: AllScores
    """The start model's scores on the test sets, which are scored only once training has ended."""
    answers: AllAnswers
    ability_answers: AllAnswers
    samples: list[Sample]
    drift: DriftRecord | None
    relearning: Relearning | None


def measure(context: RunContext, baseline: Baseline) -> Phase[Measurements]:
    """Measure the published model as plain transformers reads it; ranks that share a sharded one measure that.

    The collective calls are scores, pseudo-perplexity, tasks, abilities, and test sets, in this order on every rank.
    """
    plan, world = context.plan, context.world
    yield PhaseStarted("scoring the trained model", is_evaluation=True)
    if world.is_distributed:
        model = context.load_tuned_model().model
    else:
        context.release_tuned_model()
        model = context.load_published_model()
    length, pseudo_sets = plan.model.context_length, plan.evaluation.pseudo_perplexity_sets
    scores = before_after.score_sets(model, plan.evaluation.sets, context=length, world=world)
    pseudo_scores = before_after.score_sets(model, pseudo_sets, score_masked_tokens, context=length, world=world)
    answers, ability_answers = _answer_tasks(context, model)
    with gather_root(model):
        samples = _make_samples(plan, model.pretrained, baseline)
    drift = None
    if plan.stage.evaluation.drift_tokens:
        yield PhaseStarted("measuring the drift from the start model", is_evaluation=True)
        drift = measure_drift(plan, model, world)
    del model  # relearning and test sets load others, and there may be room for one
    context.release_tuned_model()
    relearning = None if world.is_distributed else (yield from _measure_relearning(context, baseline.scores, scores))
    test_scores = yield from _score_start_on_tests(context)
    return Measurements(scores, pseudo_scores, test_scores, answers, ability_answers, samples, drift, relearning)


def _answer_tasks(context: RunContext, model: Model) -> tuple[AllAnswers, AllAnswers]:
    """The published model's answers to tasks and to probes of abilities.

    A sharded model cannot generate, so then each rank loads the published one whole.
    """
    plan, world = context.plan, context.world
    both = plan.evaluation.tasks, plan.evaluation.abilities
    if any(both) and world.is_distributed:
        world.barrier()
        model = context.load_published_model()
    tasks, abilities = (task_scores.answer_tasks(model, each, plan.model.inputs, world=world) for each in both)
    return tasks, abilities


def _make_samples(plan: Plan, model: PreTrainedModel, baseline: Baseline) -> list[Sample]:
    """Continuations before and after, with their prompts and the text that really follows."""
    tokenizer, inputs = plan.model.tokenizer, plan.model.inputs
    after = generate_continuations(model, tokenizer, baseline.prompts, inputs.text_prefix)
    return [
        Sample(
            set=prompt.set_name,
            prompt=decode_ids(tokenizer, prompt.ids),
            reference=decode_ids(tokenizer, prompt.reference),
            before=text_before,
            after=text_after,
        )
        for prompt, text_before, text_after in zip(baseline.prompts, baseline.continuations, after, strict=True)
    ]


def _measure_relearning(context: RunContext, before: AllScores, after: AllScores) -> Phase[Relearning | None]:
    """The relearning test, if the stage asks for it; when it fails, the trained model is still recorded."""
    plan = context.plan
    for note in relearning_notes(plan):
        yield WarningMessage(note)
    if not plan.stage.evaluation.relearning_steps:
        return None
    yield PhaseStarted("fine-tuning copies on old text (relearning test)")
    try:
        result = measure_relearning(
            plan, context.folder / MODEL, (before, after), context.execution, context.world, context.cache
        )
    except PostgradError as error:
        yield WarningMessage(f"the relearning test failed: {error}")
        return None
    for line in relearning_lines(result) if result else ():
        yield InfoMessage(line)
    return result


def _score_start_on_tests(context: RunContext) -> Phase[AllScores]:
    """The start model's scores on the test sets."""
    tests = [held_out for held_out in context.plan.evaluation.sets_before if held_out.role == "test"]
    if not tests:
        return {}
    yield PhaseStarted("scoring the start model on the test sets", is_evaluation=True)
    return before_after.score_sets(
        context.load_start_model(),
        tests,
        context=context.plan.model.context_length,
        world=context.world,
        identity=context.score_identity,
        cache=context.cache,
    )
