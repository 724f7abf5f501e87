"""Phase 2: score the exact start model, in fp32 and without the stage's tuning, once per run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from typing_extensions import TypedDict

from postgrad.distributed.fsdp import gather_root
from postgrad.errors import DataError
from postgrad.evaluation import before_after
from postgrad.evaluation.before_after import AllScores
from postgrad.evaluation.continuations import ContinuationPrompt, generate_continuations, select_prompts
from postgrad.evaluation.pseudo_perplexity import score_masked_tokens
from postgrad.run import task_scores
from postgrad.run.context import RunContext
from postgrad.run.events import Phase, PhaseStarted
from postgrad.run.task_scores import AllAnswers
from postgrad.storage.checked_files import read_checked_json, write_checked_json
from postgrad.storage.read_json import MAX_BYTES, read_file, read_json

_SCORES, _PSEUDO_SCORES = "before.npz", "pseudo-before.npz"
_CONTINUATIONS, ANSWERS_BEFORE = "samples-before.json", "tasks-before.json"
_ABILITIES_BEFORE = "abilities-before.json"


@dataclass(frozen=True)
class Baseline:
    """What the start model scores, writes and answers."""

    scores: AllScores
    pseudo_scores: AllScores
    """Of sets scored by pseudo-perplexity, one masked token at a time."""
    prompts: list[ContinuationPrompt]
    continuations: list[str]
    answers: AllAnswers
    ability_answers: AllAnswers


def score_baseline(context: RunContext) -> Phase[Baseline]:
    """The baseline of a run: from its files, or measured now."""
    yield PhaseStarted("scoring the start model", is_evaluation=True)
    evaluation = context.plan.evaluation
    count = context.plan.stage.evaluation.samples
    prompts = [prompt for held_out in evaluation.scored_sets for prompt in select_prompts(held_out, count)]
    if not context.world.from_first(lambda: _is_complete(context, len(prompts))):
        context.release_tuned_model()
        _measure_baseline(context, prompts)
        yield PhaseStarted("preparing to train")
    return context.world.from_first(lambda: _read_baseline(context, prompts))


def _read_baseline(context: RunContext, prompts: list[ContinuationPrompt]) -> Baseline:
    has_pseudo_scores = bool(context.plan.evaluation.pseudo_perplexity_sets)
    return Baseline(
        context.read_scores(_SCORES),
        context.read_scores(_PSEUDO_SCORES) if has_pseudo_scores else {},
        prompts,
        _read_continuations(context),
        task_scores.read_answers(context.score_path(ANSWERS_BEFORE), context.saved_plan.id),
        task_scores.read_answers(context.score_path(_ABILITIES_BEFORE), context.saved_plan.id),
    )


def _is_complete(context: RunContext, sample_count: int) -> bool:
    """Whether the run folder has a baseline of all that the stage evaluates; its sample count may have changed since."""
    evaluation = context.plan.evaluation
    return (
        context.score_path(_SCORES).exists()
        and len(_read_continuations(context)) == sample_count
        and (not evaluation.pseudo_perplexity_sets or context.score_path(_PSEUDO_SCORES).exists())
        and (not evaluation.tasks or context.score_path(ANSWERS_BEFORE).exists())
        and (not evaluation.abilities or context.score_path(_ABILITIES_BEFORE).exists())
    )


class _Continuations(TypedDict):
    """The file of continuations."""

    continuations: list[str]


def _read_continuations(context: RunContext) -> list[str]:
    path = context.score_path(_CONTINUATIONS)
    if not path.exists():
        return []
    hint = "remove it; the same `postgrad train` command generates the continuations again"
    if read_file(path, MAX_BYTES, error=DataError, hint=hint)[:1] == b"[":  # an earlier version wrote the list alone
        return read_json(path, list[str], error=DataError, hint=hint)
    return read_checked_json(path, _Continuations, context.saved_plan.id, error=DataError, hint=hint)["continuations"]


def _measure_baseline(context: RunContext, prompts: list[ContinuationPrompt]) -> None:
    """Score the start model and write the files of the baseline."""
    plan, world = context.plan, context.world
    model = context.load_start_model()
    identity, cache = context.score_identity, context.cache
    score_sets = partial(
        before_after.score_sets,
        model,
        context=plan.model.context_length,
        world=world,
        identity=identity,
        cache=cache,
    )
    scores = score_sets(plan.evaluation.scored_sets_before)
    with gather_root(model):
        prefix = plan.model.inputs.without_tuning.text_prefix
        continuations = generate_continuations(model.pretrained, plan.model.tokenizer, prompts, prefix)
    pseudo_scores = score_sets(plan.evaluation.pseudo_perplexity_sets_before, score_masked_tokens)
    if (
        plan.evaluation.tasks_before or plan.evaluation.abilities_before
    ) and world.mesh:  # a sharded model cannot generate
        del model, score_sets
        model = context.load_start_model(is_whole=True)
    answers, ability_answers = (
        task_scores.answer_tasks(model, tasks, plan.model.inputs, world=world, identity=identity, cache=cache)
        for tasks in (plan.evaluation.tasks_before, plan.evaluation.abilities_before)
    )
    if not world.is_main:
        return
    context.write_scores(_SCORES, scores)
    if plan.evaluation.pseudo_perplexity_sets:
        context.write_scores(_PSEUDO_SCORES, pseudo_scores)
    write_checked_json(context.score_path(_CONTINUATIONS), {"continuations": continuations}, context.saved_plan.id)
    for name, each in ((ANSWERS_BEFORE, answers), (_ABILITIES_BEFORE, ability_answers)):
        if each:
            task_scores.write_answers(context.score_path(name), each, context.saved_plan.id)
