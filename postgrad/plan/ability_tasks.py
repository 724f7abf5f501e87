"""Generated probes as prompts: in the chat template of a model that has one, else as plain text after demonstrations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import get_args

from postgrad.config.abilities import AbilitiesConfig, Ability
from postgrad.config.tasks import FewShotConfig, TaskConfig, TaskMetric
from postgrad.data.read.examples import Example, make_example
from postgrad.data.read.row_kinds import RowKind
from postgrad.data.tokens.store import digest
from postgrad.evaluation.abilities.probes import ABILITIES, Probe, make_demonstration, make_probes
from postgrad.models.task import Task
from postgrad.plan.model_inputs import ModelInputs
from postgrad.plan.prompted_task import PromptedTask
from postgrad.plan.row_renderers import make_row_template, make_text_renderer
from postgrad.plan.task_prompts import make_prompt_format, prompt_rows, refuse_encoder

ABILITIES_KEY = "evaluation.abilities"
"""The key path that errors name."""
_GENERATED = "(generated)"
_PLAIN_PROMPT, _PLAIN_ANSWER = "Question: {prompt}\nAnswer:", " {completion}"
_CHOICES_PROMPT = "Question: {question}\nAnswer:"
_DEFAULT_PLAIN_SHOTS = 4
_CHOICE_METRICS: tuple[TaskMetric, ...] = ("1-Brier", "accuracy", "1-ECE")


def has_chat_form(model_inputs: ModelInputs) -> bool:
    """Whether probes are turns of the model's chat template."""
    return model_inputs.task == Task.CAUSAL and bool(model_inputs.tokenizer.chat_template)


def make_ability_tasks(config: AbilitiesConfig, model_inputs: ModelInputs, is_chat: bool) -> list[PromptedTask]:
    """The probes of each ability as a task, without soft prompts, but with room for them.

    `is_chat`: as turns of the chat template. Choices are compared in plain text, whatever the model. Raises `ModelError` for a
    model that does not generate text, `DataError` for a context that no probe fits.
    """
    refuse_encoder(model_inputs, ABILITIES_KEY)
    return [_make_task(ability, config, model_inputs, is_chat) for ability in config.only or get_args(Ability)]


def form_note(config: AbilitiesConfig, is_chat: bool) -> str:
    """How probes are put to the model."""
    if is_chat:
        return "abilities: probes are turns of the chat template"
    shots = _DEFAULT_PLAIN_SHOTS if config.shots is None else config.shots
    after = f"after {shots} demonstration{'s' * (shots != 1)}" if shots else "without demonstrations"
    return f"abilities: the tokenizer has no chat template, so probes are plain text {after}"


def _make_task(ability: Ability, config: AbilitiesConfig, model_inputs: ModelInputs, is_chat: bool) -> PromptedTask:
    probes = make_probes(ability, config.seed, config.items)
    is_turn = is_chat and not probes[0].choices
    shots = (0 if is_turn else _DEFAULT_PLAIN_SHOTS) if config.shots is None else config.shots
    shown = _make_demonstrations(ability, config.seed, shots, {probe.question for probe in probes})
    kind = RowKind.CHOICES if probes[0].choices else RowKind.INSTRUCTION if is_turn else RowKind.COMPLETION
    task = TaskConfig(
        name=ability,
        path=_GENERATED,
        prompt={RowKind.CHOICES: _CHOICES_PROMPT, RowKind.COMPLETION: _PLAIN_PROMPT}.get(kind),
        answer=_PLAIN_ANSWER if kind == RowKind.COMPLETION and model_inputs.task == Task.CAUSAL else None,
        shots=shots,
        few_shot=FewShotConfig(path=_GENERATED) if shots else None,
        items=len(probes),
        max_new_tokens=config.max_new_tokens or ABILITIES[ability].max_new_tokens or 1,
        metrics=[*_CHOICE_METRICS] if kind == RowKind.CHOICES else [],
    )
    renderer = make_text_renderer(kind, model_inputs, make_row_template(task.model_dump()), "last")
    notes = []
    if len(probes) < config.items:
        notes.append(f"{ability}: there are no more than {len(probes):,} different probes")
    prompted = prompt_rows(
        task,
        kind,
        [(_make_example(probe, kind), f"{ability} {i}") for i, probe in enumerate(probes)],
        [(_make_example(probe, kind), f"{ability} demonstration {i}") for i, probe in enumerate(shown)],
        renderer,
        make_prompt_format(renderer, model_inputs),
        model_inputs,
        ABILITIES_KEY,
        notes,
    )
    return prompted if kind == RowKind.CHOICES else _score_by_rules(prompted, probes)


def _make_demonstrations(ability: Ability, seed: int, shots: int, questions: set[str]) -> list[Probe]:
    """So many probes with answers whose questions are not among `questions`."""
    shown: dict[str, Probe] = {}
    for index in count():
        if len(shown) == shots:
            break
        probe = make_demonstration(ability, seed, index)
        if probe.question not in questions:
            shown[probe.question] = probe
    return list(shown.values())


def _score_by_rules(prompted: PromptedTask, probes: Sequence[Probe]) -> PromptedTask:
    """The task with the rules of each probe as its last reference, after the right answer."""
    rules = {
        digest(_make_example(probe, RowKind.COMPLETION).text.encode()): json.dumps(probe.rules, ensure_ascii=False)
        for probe in probes
    }
    references_I = tuple(
        (answers[0], rules[mark]) for answers, mark in zip(prompted.references_I, prompted.digests_I, strict=True)
    )
    return replace(prompted, metrics=("correct",), references_I=references_I)


def _make_example(probe: Probe, kind: RowKind) -> Example:
    """A probe as a row; its text, which pairs two models' answers, is the same for each kind of row with a written answer."""
    if kind == RowKind.CHOICES:
        answer = probe.choices.index(probe.answer)
        values = {"question": probe.question, "choices": list(probe.choices), "answer": answer}
    elif kind == RowKind.INSTRUCTION:
        values = {"instruction": probe.question, "output": probe.answer}
    else:
        values = {"prompt": probe.question, "completion": probe.answer}
    return make_example(kind, values, probe.question)
