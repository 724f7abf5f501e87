"""What does a model answer to its tasks, how good is it, and how did it change? Asked before, after, and at looks in between.

Legend: K prompt seeds, I items, C choices.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from postgrad.distributed.world import World
from postgrad.evaluation.choices.loglikelihood import ChoiceItem, score_choices
from postgrad.evaluation.choices.normalization import calibrate_scores, normalize_scores
from postgrad.evaluation.generate_answers import generate_answers
from postgrad.evaluation.generation_metrics import TaskPredictions, joint_change, metric_change, metric_summary
from postgrad.lineage.metrics import TaskRow
from postgrad.lineage.record import ClusterResult, Difference, MetricValue, Record, TaskExample, TaskResult
from postgrad.models.model import Model
from postgrad.plan.model_inputs import ModelInputs
from postgrad.plan.task_prompts import PromptedTask, TaskPrompt
from postgrad.storage.atomic import write_atomically
from postgrad.storage.fingerprint import fingerprint

AllAnswers = dict[str, TaskPredictions]
_EXAMPLES_SHOWN = 3
"""Questions of each task that a record shows with their answers."""


def answer_tasks(
    model: Model,
    tasks: Sequence[PromptedTask],
    model_inputs: ModelInputs,
    *,
    world: World,
    identity: str | None = None,
    cache: Path | None = None,
) -> AllAnswers:
    """A model's answers to tasks, by name. Each rank, which has the model to itself, answers a part of the items.

    With the model's `identity` (a fingerprint) answers are kept in, and taken from, the cache.
    """
    out: AllAnswers = {}
    for asked in tasks:
        place = None
        if identity and cache and world.size == 1:
            place = cache / "answers" / f"{fingerprint([identity, asked.fingerprint])}.json"
            if place.exists():
                out[asked.name] = next(iter(read_answers(place).values()))  # the name is the caller's
                continue
        answer = _select_choices if asked.is_multiple_choice else _generate_answers
        said_KI = answer(model, asked, model_inputs, world)
        out[asked.name] = TaskPredictions(said_KI, asked.references_I)
        if place and world.is_main:
            write_answers(place, {asked.name: out[asked.name]})
    return out


def _generate_answers(
    model: Model, prompted_task: PromptedTask, model_inputs: ModelInputs, world: World
) -> tuple[tuple[str, ...], ...]:
    """What is written to each prompt."""
    prompts = [prompt.item.context for prompts in prompted_task.prompts_KI for prompt in prompts]
    mine = prompts[world.rank :: world.size]
    ends = [model_inputs.encoder.eos]
    written = generate_answers(
        model.pretrained, model_inputs.tokenizer, mine, prompted_task.stopping, eos_ids=ends, pad=model_inputs.pad_id
    )
    return _group_by_seed(_gather_items([text.strip() for text in written], len(prompts), world), len(prompted_task))


def _select_choices(
    model: Model, prompted_task: PromptedTask, model_inputs: ModelInputs, world: World
) -> tuple[tuple[str, ...], ...]:
    """The name of the choice that each prompt is answered with."""
    prompts = [prompt for prompts in prompted_task.prompts_KI for prompt in prompts]
    # Questions without content are the same for all items where the demonstrations and the choices are.
    items = list(dict.fromkeys(item for prompt in prompts for item in (prompt.item, *prompt.calibration_items)))
    mine = items[world.rank :: world.size]
    found = score_choices(model, mine, context=prompted_task.context_length, pad=model_inputs.pad_id) if mine else None
    log_p = _gather_items(list(found.log_likelihoods) if found else [], len(items), world)
    of_item: dict[ChoiceItem, np.ndarray] = dict(zip(items, log_p, strict=True))
    said = []
    for number, prompt in enumerate(prompts):
        i = number % len(prompted_task)
        said.append(
            prompted_task.choice_names_I[i][
                int(choice_scores(prompted_task, prompt, prompted_task.choice_texts_I[i], of_item).argmax())
            ]
        )
    return _group_by_seed(said, len(prompted_task))


def choice_scores(
    prompted_task: PromptedTask, prompt: TaskPrompt, texts: Sequence[str], log_p: Mapping[ChoiceItem, np.ndarray]
) -> np.ndarray:
    """What the choices of a prompt are compared by, of shape (C,)."""
    by, calibrate = prompted_task.task.by, prompted_task.task.calibrate
    tokens_C = np.array([len(choice) for choice in prompt.item.choices])
    alone_C = log_p[prompt.calibration_items[0]] if by == "answer-only" else None

    def of(item: ChoiceItem) -> np.ndarray:
        return normalize_scores(log_p[item], by, texts=texts, tokens_C=tokens_C, unconditional_C=alone_C)

    own_C = of(prompt.item)
    return calibrate_scores(own_C, np.stack([of(item) for item in prompt.calibration_items])) if calibrate else own_C


def _gather_items(local_items: list[Any], count: int, world: World) -> list[Any]:
    """What all ranks found, in the order of the items, of which each has every `world.size`-th."""
    out: list[Any] = [None] * count
    for rank, part in enumerate(world.all_gather(local_items)):
        out[rank :: world.size] = part  # type: ignore[call-overload]
    return out


def _group_by_seed(answers: Sequence[str], items: int) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(answers[begin : begin + items]) for begin in range(0, len(answers), items))


# --- on the disk -----------------------------------------------------------------------------------------


def write_answers(path: Path, answers: Mapping[str, TaskPredictions]) -> None:
    """What was said to every item of every task, and what may be said, as JSON."""
    found = {name: {"said": each.predictions_KI, "references": each.references_I} for name, each in answers.items()}
    write_atomically(path, json.dumps(found, ensure_ascii=False, indent=1))


def read_answers(path: Path) -> AllAnswers:
    """What `write_answers` wrote; nothing where there is no such file."""
    if not path.exists():
        return {}
    return {
        name: TaskPredictions(tuple(map(tuple, each["said"])), tuple(map(tuple, each["references"])))
        for name, each in json.loads(path.read_text()).items()
    }


# --- in the record ---------------------------------------------------------------------------------------


def describe_task(prompted_task: PromptedTask) -> TaskResult:
    """A task without its scores."""
    task = prompted_task.task
    return TaskResult(
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


def task_rows(tasks: Sequence[PromptedTask], before: AllAnswers, after: AllAnswers) -> list[TaskResult]:
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
        pairs = [(a.metrics[0], before[a.name], after[a.name]) for a in members]
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
    first = read_answers(runs[0] / "scores" / "tasks-after.json")
    tasks = {task.name: task for task in records[0].tasks}
    for run, record, arm in zip(runs[1:], records[1:], names[1:], strict=True):
        other = read_answers(run / "scores" / "tasks-after.json")
        for task in record.tasks:
            name, metric = task.name, task.metrics[0]
            is_alike = name in tasks and _prompting(tasks[name]) == _prompting(task)
            if is_alike and name in first and name in other:
                change = metric_change(metric, first[name], other[name])  # type: ignore[arg-type]
                out.append({"task": name, "metric": metric, "arm": arm, "against": names[0], **change})
    return out


def _prompting(task: TaskResult) -> tuple[object, ...]:
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
    """What is asked for that several processes leave out: a sharded model cannot write by itself."""
    during = [asked.name for asked in tasks if asked.task.during]
    if not during:
        return []
    return [f"{', '.join(during)}: asked during training by one process; several ask only before and after it"]
