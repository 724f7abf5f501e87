"""A task as prompts: the ids that a model reads for each item, its choices and its references.

Legend: K prompt seeds, I items, N test rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from postgrad.config.tasks import TaskConfig
from postgrad.evaluation.choices.loglikelihood import ChoiceItem
from postgrad.evaluation.generate_answers import StoppingRule
from postgrad.evaluation.generation_metrics import METRICS, MetricName
from postgrad.plan.model_inputs import ModelInputs
from postgrad.storage.fingerprint import fingerprint


class TaskPrompt(NamedTuple):
    """The prompt of an item under one prompt seed."""

    text: str
    question: str
    """The text without the demonstrations."""
    num_demonstrations: int
    """Demonstrations that fit."""
    item: ChoiceItem
    """The ids of the prompt and of each choice; without choices the answer is generated."""
    calibration_items: tuple[ChoiceItem, ...] = ()
    """The same choices after an answer cue alone, or after content-free questions."""


@dataclass(frozen=True)
class PromptedTask:
    """A task as prompts."""

    task: TaskConfig
    kind: str
    is_multiple_choice: bool
    """Whether choices are scored; otherwise answers are generated."""
    metrics: tuple[MetricName, ...]
    """The first one is the headline."""
    prompts_KI: tuple[tuple[TaskPrompt, ...], ...]
    choice_names_I: tuple[tuple[str, ...], ...]
    """The names of each item's choices."""
    choice_texts_I: tuple[tuple[str, ...], ...]
    """The texts of each item's choices."""
    references_I: tuple[tuple[str, ...], ...]
    """The name of the right choice, or the reference answers."""
    digests_I: tuple[int, ...]
    """Content hash of each item."""
    test_digests_N: np.ndarray
    """Content hash of each test row, whether it is an item or not."""
    stopping: StoppingRule
    context_length: int
    """Positions for a prompt and its answer."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Number of test rows that are no items, by reason."""
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the task."""
        return self.task.name

    def __len__(self) -> int:
        return len(self.references_I)

    @property
    def needs_probabilities(self) -> bool:
        """Whether a metric reads the probabilities of the choices."""
        return any(METRICS[name].of_probabilities for name in self.metrics)

    @property
    def num_shortened_prompts(self) -> int:
        """Prompts with fewer demonstrations than shots."""
        return sum(prompt.num_demonstrations < self.task.shots for prompts in self.prompts_KI for prompt in prompts)

    @property
    def fingerprint(self) -> str:
        """Of all that decides the answers except the model: the ids, and how choices are compared."""
        prompts = [
            [
                [_item_as_list(prompt.item), [_item_as_list(item) for item in prompt.calibration_items]]
                for prompt in prompts_I
            ]
            for prompts_I in self.prompts_KI
        ]
        method = [
            self.task.normalization,
            self.task.calibrate,
            self.stopping.max_new_tokens,
            list(self.stopping.stop_strings),
            *(["probabilities"] if self.needs_probabilities else []),
        ]
        texts = [
            [list(names) for names in part] for part in (self.choice_names_I, self.choice_texts_I, self.references_I)
        ]
        return fingerprint([prompts, method, texts])

    @property
    def rows_fingerprint(self) -> str:
        """Of the rows and their references; it pairs models with different tokenizers."""
        return fingerprint([[str(mark) for mark in self.digests_I], [list(those) for those in self.references_I]])


def _item_as_list(item: ChoiceItem) -> list[Any]:
    return [list(item.context), [list(choice) for choice in item.choices]]


def add_soft_prompts(task: PromptedTask, model_inputs: ModelInputs) -> PromptedTask:
    """The task with the model's soft prompts around each prompt."""
    if not model_inputs.has_soft_prompt:
        return task

    def framed(item: ChoiceItem) -> ChoiceItem:
        return ChoiceItem(model_inputs.frame_prompt(item.context), item.choices)

    prompts_KI = tuple(
        tuple(
            p._replace(item=framed(p.item), calibration_items=tuple(map(framed, p.calibration_items))) for p in prompts
        )
        for prompts in task.prompts_KI
    )
    return replace(task, prompts_KI=prompts_KI)
