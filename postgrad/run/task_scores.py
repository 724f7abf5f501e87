"""Task evaluation of a run: answers before, during and after training, their metrics and changes.

Legend: K prompt seeds, I items, C choices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypeVar

import numpy as np
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from postgrad.distributed.world import World
from postgrad.errors import DataError
from postgrad.evaluation.choices.loglikelihood import ChoiceItem, score_choices
from postgrad.evaluation.choices.normalization import calibrate_scores, normalize_scores
from postgrad.evaluation.generate_answers import generate_answers
from postgrad.evaluation.generation_metrics import (
    TaskPredictions,
    count_without_words,
    joint_change,
    metric_change,
    metric_summary,
    tokenizer_names,
)
from postgrad.lineage.metrics import TaskRow
from postgrad.lineage.record import ClusterResult, Difference, MetricValue, Record, TaskExample, TaskRecord
from postgrad.models.model import Model
from postgrad.plan.model_inputs import ModelInputs
from postgrad.plan.prompted_task import PromptedTask, TaskPrompt
from postgrad.storage.checked_files import read_checked_json, write_checked_json
from postgrad.storage.fingerprint import fingerprint

AllAnswers = dict[str, TaskPredictions]
Each = TypeVar("Each")
_ANSWERS = "answers"
_MAX_ANSWER_BYTES = 2**30
_EXAMPLES_SHOWN = 3
"""Items of each task that a record shows with their answers."""


def answer_tasks(
    model: Model,
    tasks: Sequence[PromptedTask],
    model_inputs: ModelInputs,
    *,
    world: World,
    identity: str | None = None,
    cache: Path | None = None,
) -> AllAnswers:
    """A model's answers to tasks, by name. Each rank has an unsharded model and answers every `world.size`-th item.

    With the model's `identity` (a fingerprint) the answers are cached.
    """
    out: AllAnswers = {}
    for task in tasks:
        path, key = None, ""
        if identity and cache and world.size == 1:
            key = fingerprint([identity, task.fingerprint])
            path = cache / "answers" / f"{key}.json"
            if found := _read_cached_answers(path, key):
                out[task.name] = found
                continue
        answer = _select_choices if task.is_multiple_choice else _generate_answers
        out[task.name] = answer(model, task, model_inputs, world)
        if path:
            write_answers(path, {task.name: out[task.name]}, key)
    return out


def _generate_answers(
    model: Model, prompted_task: PromptedTask, model_inputs: ModelInputs, world: World
) -> TaskPredictions:
    """The text generated for each prompt."""
    prompts = [prompt.item.context for prompts in prompted_task.prompts_KI for prompt in prompts]
    texts = generate_answers(
        model.pretrained,
        model_inputs.tokenizer,
        prompts[world.rank :: world.size],
        prompted_task.stopping,
        eos_ids=[model_inputs.encoder.eos],
        pad=model_inputs.pad_id,
        decoder_prefix=model_inputs.decoder_prefix,
    )
    answers = _gather_items([text.strip() for text in texts], len(prompts), world)
    return TaskPredictions(_group_by_seed(answers, len(prompted_task)), prompted_task.references_I)


def _select_choices(
    model: Model, prompted_task: PromptedTask, model_inputs: ModelInputs, world: World
) -> TaskPredictions:
    """The name of the choice with the highest score for each prompt, and the probabilities where a metric reads them."""
    prompts = [prompt for prompts in prompted_task.prompts_KI for prompt in prompts]
    # Items repeat: calibration questions are equal wherever demonstrations and choices are.
    items = list(dict.fromkeys(item for prompt in prompts for item in (prompt.item, *prompt.calibration_items)))
    local = items[world.rank :: world.size]
    options = {"context": prompted_task.context_length, "decoder_prefix": model_inputs.decoder_prefix}
    scored = score_choices(model, local, pad=model_inputs.pad_id, **options) if local else None
    gathered = _gather_items(list(scored.log_likelihoods) if scored else [], len(items), world)
    log_p: dict[ChoiceItem, np.ndarray] = dict(zip(items, gathered, strict=True))
    answers: list[str] = []
    probabilities: list[dict[str, float]] = []
    for number, prompt in enumerate(prompts):
        i = number % len(prompted_task)
        scores_C = choice_scores(prompted_task, prompt, prompted_task.choice_texts_I[i], log_p)
        names = prompted_task.choice_names_I[i]
        answers.append(names[int(scores_C.argmax())])
        if prompted_task.needs_probabilities:
            p_C = np.exp(scores_C - np.logaddexp.reduce(scores_C))
            probabilities.append(dict(zip(names, p_C.tolist(), strict=True)))
    count = len(prompted_task)
    return TaskPredictions(
        _group_by_seed(answers, count), prompted_task.references_I, _group_by_seed(probabilities, count)
    )


def choice_scores(
    prompted_task: PromptedTask, prompt: TaskPrompt, texts: Sequence[str], log_p: Mapping[ChoiceItem, np.ndarray]
) -> np.ndarray:
    """The normalized, optionally calibrated scores of a prompt's choices, of shape (C,)."""
    by, calibrate = prompted_task.task.normalization, prompted_task.task.calibrate
    tokens_C = np.array([len(choice) for choice in prompt.item.choices])
    unconditional_C = log_p[prompt.calibration_items[0]] if by == "answer-only" else None

    def normalized(item: ChoiceItem) -> np.ndarray:
        return normalize_scores(log_p[item], by, texts=texts, tokens_C=tokens_C, unconditional_C=unconditional_C)

    scores_C = normalized(prompt.item)
    if not calibrate:
        return scores_C
    return calibrate_scores(scores_C, np.stack([normalized(item) for item in prompt.calibration_items]))


def _gather_items(local_items: list[Any], count: int, world: World) -> list[Any]:
    """Merge the items of all ranks, of which each has every `world.size`-th. Collective."""
    out: list[Any] = [None] * count
    for rank, part in enumerate(world.all_gather(local_items)):
        out[rank :: world.size] = part  # type: ignore[call-overload]
    return out


def _group_by_seed(answers: Sequence[Each], items: int) -> tuple[tuple[Each, ...], ...]:
    return tuple(tuple(answers[begin : begin + items]) for begin in range(0, len(answers), items))


# --- files -----------------------------------------------------------------------------------------


_StoredAnswers = TypedDict(  # noqa: UP013 (the files of earlier versions name a key that no definition would have)
    "_StoredAnswers",
    {
        "said": list[list[str]],
        "references": list[list[str]],
        "probabilities": NotRequired[list[list[dict[str, float]]]],
    },
)
"""A task in a file of answers."""


def write_answers(path: Path, answers: Mapping[str, TaskPredictions], owner: str = "") -> None:
    """Write all answers with their references, as JSON; `owner`: the run's id."""
    content = {
        name: {
            "said": each.predictions_KI,
            "references": each.references_I,
            **({"probabilities": each.probabilities_KI} if each.probabilities_KI else {}),
        }
        for name, each in answers.items()
    }
    write_checked_json(path, {_ANSWERS: content}, owner)


def read_answers(path: Path, owner: str = "") -> AllAnswers:
    """Read a file of `write_answers`; empty without one. Raises `DataError` for one that is damaged, or another run's."""
    if not path.exists():
        return {}
    hint = "remove it and, if it is there, record.json; the same `postgrad train` command answers again"
    raw: dict[str, Any] = read_checked_json(
        path, dict[str, Any], owner, error=DataError, hint=hint, max_bytes=_MAX_ANSWER_BYTES
    )
    try:
        # Files of earlier versions have no key around the tasks.
        stored = TypeAdapter(dict[str, _StoredAnswers]).validate_python(raw.get(_ANSWERS, raw))
        return {name: _parse_answers(each) for name, each in stored.items()}
    except (ValidationError, KeyError, ValueError) as error:
        problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise DataError(f"these are no answers ({problem})", where=str(path), hint=hint) from None


def _parse_answers(stored: _StoredAnswers) -> TaskPredictions:
    """Raises `ValueError` for anything else than answers and their references."""
    predictions_KI, references_I = stored["said"], stored["references"]
    probabilities_KI = stored.get("probabilities", [])
    if any(len(of_seed_I) != len(references_I) for of_seed_I in (*predictions_KI, *probabilities_KI)):
        raise ValueError("an answer without a reference")
    return TaskPredictions(
        tuple(map(tuple, predictions_KI)), tuple(map(tuple, references_I)), tuple(map(tuple, probabilities_KI))
    )


def _read_cached_answers(path: Path, key: str) -> TaskPredictions | None:
    """The answers in a file of the cache, under the name of whichever task was answered first; None when there are none."""
    try:
        return next(iter(read_answers(path, key).values()), None)
    except DataError:
        return None


# --- record ---------------------------------------------------------------------------------------


def describe_task(prompted_task: PromptedTask) -> TaskRecord:
    """A task without its scores."""
    task, references_I = prompted_task.task, prompted_task.references_I
    return TaskRecord(
        name=task.name,
        role=task.role,
        task_cluster=task.cluster,
        kind=prompted_task.kind,
        scoring="multiple-choice" if prompted_task.is_multiple_choice else "generate",
        shots=task.shots,
        seeds=len(prompted_task.prompts_KI),
        items=len(prompted_task),
        skipped=dict(prompted_task.skipped),
        truncated_prompts=prompted_task.num_shortened_prompts,
        metrics=list(prompted_task.metrics),
        tokenizers={name: names for name in prompted_task.metrics if (names := tokenizer_names(name, references_I))},
        without_words={
            name: count for name in prompted_task.metrics if (count := count_without_words(name, references_I))
        },
        fingerprint=prompted_task.rows_fingerprint,
        prompt=prompted_task.prompts_KI[0][0].text,
    )


def summarize_metrics(prompted_task: PromptedTask, answers: TaskPredictions) -> dict[str, MetricValue]:
    """Each metric's value, interval and spread over prompt seeds."""
    return {name: _metric_value(metric_summary(name, answers)) for name in prompted_task.metrics}


def _metric_value(summary: dict[str, Any]) -> MetricValue:
    return MetricValue(
        value=summary["value"],
        low=summary["low"],
        high=summary["high"],
        values_by_seed=summary["seeds"],
        std=summary["spread"],
    )


def task_rows(tasks: Sequence[PromptedTask], before: AllAnswers, after: AllAnswers) -> list[TaskRecord]:
    """Every task with its metrics before and after and their changes; `after` lacks the tasks of a stopped run."""
    results = []
    for task in tasks:
        was, now = before[task.name], after.get(task.name)
        result = describe_task(task)
        result.before = summarize_metrics(task, was)
        result.examples = [
            TaskExample(
                question=prompt.question,
                reference=was.references_I[i][0],
                before=was.predictions_KI[0][i],
                after=None if now is None else now.predictions_KI[0][i],
            )
            for i, prompt in enumerate(task.prompts_KI[0][:_EXAMPLES_SHOWN])
        ]
        if now is not None:
            result.after = summarize_metrics(task, now)
            result.changes = {name: Difference(**metric_change(name, was, now)) for name in task.metrics}
        results.append(result)
    return results


def cluster_rows(
    tasks: Sequence[PromptedTask], before: AllAnswers, after: AllAnswers, trained_clusters: set[str]
) -> list[ClusterResult]:
    """Every cluster of tasks with the mean of its tasks' first metric before and after; those not trained on first."""
    groups: dict[tuple[str, str], list[PromptedTask]] = {}
    for task in tasks:
        if task.task.cluster is not None and task.name in after:
            groups.setdefault((task.task.cluster, task.metrics[0]), []).append(task)
    results = []
    for (cluster, metric), members in groups.items():
        pairs = [(member.metrics[0], before[member.name], after[member.name]) for member in members]
        was, now = (
            float(np.mean([metric_summary(name, pair[side])["value"] for name, *pair in pairs])) for side in (0, 1)
        )
        results.append(
            ClusterResult(
                task_cluster=cluster,
                trained_on=cluster in trained_clusters,
                tasks=[task.name for task in members],
                metric=metric,
                before=was,
                after=now,
                **joint_change(pairs),
            )
        )
    return sorted(results, key=lambda result: (result.trained_on, result.task_cluster))


def paired_task_changes(runs: Sequence[Path], records: Sequence[Record], names: Sequence[str]) -> list[dict[str, Any]]:
    """Paired differences between each later run's answers and the first one's, on tasks with the same prompts."""
    out: list[dict[str, Any]] = []
    first = _read_answers_after(runs[0], records[0])
    tasks = {task.name: task for task in records[0].tasks}
    for run, record, arm in zip(runs[1:], records[1:], names[1:], strict=True):
        other = _read_answers_after(run, record)
        for task in record.tasks:
            name, metric = task.name, task.metrics[0]
            is_alike = name in tasks and _prompting(tasks[name]) == _prompting(task)
            if is_alike and name in first and name in other:
                change = metric_change(metric, first[name], other[name])  # type: ignore[arg-type]
                out.append({"task": name, "metric": metric, "arm": arm, "against": names[0], **change})
    return out


def _read_answers_after(run: Path, record: Record) -> AllAnswers:
    """The answers of a run's model. Raises `DataError` when the record has metrics of them and the file is missing."""
    path = run / "scores" / "tasks-after.json"
    answers = read_answers(path, record.id)
    if missing := [task.name for task in record.tasks if task.after and task.name not in answers]:
        raise DataError(
            f"the answers to {missing[0]} are missing", where=str(path), expected="the answers to all tasks"
        )
    return answers


def _prompting(task: TaskRecord) -> tuple[object, ...]:
    """What must agree for two runs' answers to be paired."""
    return task.fingerprint, task.shots, task.seeds, task.scoring, task.metrics


def task_headlines(tasks: Sequence[PromptedTask], answers: AllAnswers) -> dict[str, TaskRow]:
    """The first metric of every task, for a line of metrics."""
    return {
        task.name: TaskRow(metric=task.metrics[0], value=metric_summary(task.metrics[0], answers[task.name])["value"])
        for task in tasks
        if task.name in answers
    }


def sharding_notes(tasks: Sequence[PromptedTask]) -> list[str]:
    """Evaluations that several processes omit: a sharded model cannot generate."""
    during = [task.name for task in tasks if task.task.during_training]
    if not during:
        return []
    return [f"{', '.join(during)}: evaluated only before and after training, as a sharded model cannot generate"]
