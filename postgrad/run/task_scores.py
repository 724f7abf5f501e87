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
from postgrad.evaluation.choices.loglikelihood import Item, choose
from postgrad.evaluation.choices.normalization import calibrated, comparable
from postgrad.evaluation.generate_answers import write
from postgrad.evaluation.generation_metrics import Answers, change, joint_change, summary
from postgrad.models.model import Model
from postgrad.plan.model_inputs import Reading
from postgrad.plan.task_prompts import Asked, Prompt
from postgrad.storage.atomic import write_atomically
from postgrad.storage.fingerprint import fingerprint

AllAnswers = dict[str, Answers]
_EXAMPLES = 3
"""Questions of each task that a record shows with their answers."""


def ask(
    model: Model,
    tasks: Sequence[Asked],
    reading: Reading,
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
        answer = _choices if asked.chosen else _texts
        said_KI = answer(model, asked, reading, world)
        out[asked.name] = Answers(said_KI, asked.references_I)
        if place and world.main:
            write_answers(place, {asked.name: out[asked.name]})
    return out


def _texts(model: Model, asked: Asked, reading: Reading, world: World) -> tuple[tuple[str, ...], ...]:
    """What is written to each prompt."""
    prompts = [prompt.item.context for prompts in asked.prompts_KI for prompt in prompts]
    mine = prompts[world.rank :: world.size]
    ends = [reading.encoder.eos]
    written = write(model.pretrained, reading.tokenizer, mine, asked.until, ends=ends, pad=reading.pad)
    return _by_seed(_together([text.strip() for text in written], len(prompts), world), len(asked))


def _choices(model: Model, asked: Asked, reading: Reading, world: World) -> tuple[tuple[str, ...], ...]:
    """The name of the choice that each prompt is answered with."""
    prompts = [prompt for prompts in asked.prompts_KI for prompt in prompts]
    # Questions without content are the same for all items where the demonstrations and the choices are.
    items = list(dict.fromkeys(item for prompt in prompts for item in (prompt.item, *prompt.against)))
    mine = items[world.rank :: world.size]
    found = choose(model, mine, context=asked.room, pad=reading.pad) if mine else None
    log_p = _together(list(found.log_p) if found else [], len(items), world)
    of_item: dict[Item, np.ndarray] = dict(zip(items, log_p, strict=True))
    said = []
    for number, prompt in enumerate(prompts):
        i = number % len(asked)
        said.append(asked.options_I[i][int(scores(asked, prompt, asked.texts_I[i], of_item).argmax())])
    return _by_seed(said, len(asked))


def scores(asked: Asked, prompt: Prompt, texts: Sequence[str], log_p: Mapping[Item, np.ndarray]) -> np.ndarray:
    """What the choices of a prompt are compared by, of shape (C,)."""
    by, calibrate = asked.task.by, asked.task.calibrate
    tokens_C = np.array([len(choice) for choice in prompt.item.choices])
    alone_C = log_p[prompt.against[0]] if by == "answer-only" else None

    def of(item: Item) -> np.ndarray:
        return comparable(log_p[item], by, texts=texts, tokens_C=tokens_C, alone_C=alone_C)

    own_C = of(prompt.item)
    return calibrated(own_C, np.stack([of(item) for item in prompt.against])) if calibrate else own_C


def _together(mine: list[Any], count: int, world: World) -> list[Any]:
    """What all ranks found, in the order of the items, of which each has every `world.size`-th."""
    out: list[Any] = [None] * count
    for rank, part in enumerate(world.gathered(mine)):
        out[rank :: world.size] = part  # type: ignore[call-overload]
    return out


def _by_seed(said: Sequence[str], items: int) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(said[begin : begin + items]) for begin in range(0, len(said), items))


# --- on the disk -----------------------------------------------------------------------------------------


def write_answers(path: Path, answers: Mapping[str, Answers]) -> None:
    """What was said to every item of every task, and what may be said, as JSON."""
    found = {name: {"said": each.said_KI, "references": each.references_I} for name, each in answers.items()}
    write_atomically(path, json.dumps(found, ensure_ascii=False, indent=1))


def read_answers(path: Path) -> AllAnswers:
    """What `write_answers` wrote; nothing where there is no such file."""
    if not path.exists():
        return {}
    return {
        name: Answers(tuple(map(tuple, each["said"])), tuple(map(tuple, each["references"])))
        for name, each in json.loads(path.read_text()).items()
    }


# --- in the record ---------------------------------------------------------------------------------------


def described(asked: Asked) -> dict[str, Any]:
    """What was asked, as plain data."""
    task = asked.task
    return {
        "name": task.name,
        "role": task.role,
        "cluster": task.cluster,
        "kind": asked.kind,
        "answered": "choose" if asked.chosen else "write",
        "shots": task.shots,
        "seeds": len(asked.prompts_KI),
        "items": len(asked),
        "skipped": dict(asked.skipped),
        "shortened": asked.shortened,
        "metrics": list(asked.metrics),
        "fingerprint": asked.same_rows,
        "prompt": asked.prompts_KI[0][0].text,
    }


def summarised(asked: Asked, answers: Answers) -> dict[str, dict[str, Any]]:
    """Each metric's value, interval and spread."""
    return {name: summary(name, answers) for name in asked.metrics}


def table_of(tasks: Sequence[Asked], before: AllAnswers, after: AllAnswers) -> list[dict[str, Any]]:
    """Every task with its metrics before and after and their changes; after may lack tasks of a run that was stopped."""
    out = []
    for asked in tasks:
        was, now = before[asked.name], after.get(asked.name)
        entry = {**described(asked), "before": summarised(asked, was), "after": {}, "changes": {}}
        entry["examples"] = [
            {
                "question": prompt.question,
                "reference": was.references_I[i][0],
                "before": was.said_KI[0][i],
                "after": None if now is None else now.said_KI[0][i],
            }
            for i, prompt in enumerate(asked.prompts_KI[0][:_EXAMPLES])
        ]
        if now is not None:
            entry["after"] = summarised(asked, now)
            entry["changes"] = {name: change(name, was, now) for name in asked.metrics}
        out.append(entry)
    return out


def clusters_of(tasks: Sequence[Asked], before: AllAnswers, after: AllAnswers, seen: set[str]) -> list[dict[str, Any]]:
    """Every cluster of tasks with the mean of its tasks' first metric before and after; seen ones were trained on."""
    groups: dict[tuple[str, str], list[Asked]] = {}
    for asked in tasks:
        if asked.task.cluster is not None and asked.name in after:
            groups.setdefault((asked.task.cluster, asked.metrics[0]), []).append(asked)
    out = []
    for (cluster, metric), members in groups.items():
        pairs = [(a.metrics[0], before[a.name], after[a.name]) for a in members]
        was, now = (float(np.mean([summary(name, pair[side])["value"] for name, *pair in pairs])) for side in (0, 1))
        out.append(
            {
                "cluster": cluster,
                "seen": cluster in seen,
                "tasks": [asked.name for asked in members],
                "metric": metric,
                "before": was,
                "after": now,
                **joint_change(pairs),
            }
        )
    return sorted(out, key=lambda entry: (entry["seen"], entry["cluster"]))


def between(runs: Sequence[Path], records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Paired differences between each later run's answers and the first one's, of the tasks that both asked alike."""
    out: list[dict[str, Any]] = []
    first = read_answers(runs[0] / "scores" / "tasks-after.json")
    asked = {entry["name"]: entry for entry in records[0].get("tasks", ())}
    for run, record, arm in zip(runs[1:], records[1:], names[1:], strict=True):
        other = read_answers(run / "scores" / "tasks-after.json")
        for entry in record.get("tasks", ()):
            name, metric = entry["name"], entry["metrics"][0]
            one = asked.get(name, {})
            alike = all(one.get(key) == entry[key] for key in ("fingerprint", "shots", "seeds", "answered", "metrics"))
            if alike and name in first and name in other:
                found = change(metric, first[name], other[name])
                out.append({"task": name, "metric": metric, "arm": arm, "against": names[0], **found})
    return out


def look_of(tasks: Sequence[Asked], answers: AllAnswers) -> dict[str, dict[str, Any]]:
    """The headline of every task now, for a line of metrics."""
    return {
        asked.name: {"metric": asked.metrics[0], "value": summary(asked.metrics[0], answers[asked.name])["value"]}
        for asked in tasks
        if asked.name in answers
    }


def one_process_only(tasks: Sequence[Asked]) -> list[str]:
    """What is asked for that several processes leave out: a sharded model cannot write by itself."""
    during = [asked.name for asked in tasks if asked.task.during]
    if not during:
        return []
    return [f"{', '.join(during)}: asked during training by one process; several ask only before and after it"]
