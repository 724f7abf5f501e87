"""Evaluate a model on generated probes of abilities, outside of any stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from postgrad.commands.evaluate_tasks import answer_prompted_tasks, summarize_tasks
from postgrad.commands.results import Result
from postgrad.commands.score_files import DEFAULT_CONTEXT, load_model_inputs
from postgrad.config.abilities import AbilitiesConfig
from postgrad.config.stage_file import parse_abilities
from postgrad.hardware import machine
from postgrad.models.location import ModelLocation, locate_model
from postgrad.plan.ability_tasks import form_note, has_chat_form, make_ability_tasks
from postgrad.plan.prompted_task import PromptedTask, add_soft_prompts
from postgrad.reports.notebook import tables_html
from postgrad.reports.result_models import TaskScore
from postgrad.reports.sections.ability_section import ability_score_table
from postgrad.run.ability_scores import mean_score
from postgrad.run.task_scores import AllAnswers
from postgrad.storage.cache_folder import cache_folder


@dataclass(frozen=True)
class AbilityEvaluation(Result):
    """A model's scores on generated probes, from 0 to 1."""

    model: str
    mean: float
    """Mean over the abilities of the first metric of each."""
    abilities: tuple[TaskScore, ...]
    notes: tuple[str, ...]

    def _repr_html_(self) -> str:
        return tables_html(ability_score_table(self.abilities, self.mean, f"Abilities of {self.model}"))


def evaluate_abilities(
    model: str,
    abilities: str | Sequence[str] = "all",
    *,
    items: int = 100,
    shots: int | None = None,
    seed: int = 0,
    max_new_tokens: int | None = None,
    base: str | None = None,
    cache: Path | None = None,
) -> AbilityEvaluation:
    """Score a model on generated probes of abilities, each with its 95 % interval.

    `abilities`: `all`, a name, or several. `items`: probes of each. `shots`: demonstrations before each; default: none in a
    chat template, 4 in plain text. `seed`: of the probes. `max_new_tokens`: of an answer; default: by ability.

    Raises `StageError` for an unknown ability, `ModelError` for a model that does not generate text.
    """
    machine.tune_allocator()
    config = ability_config(abilities, items=items, shots=shots, seed=seed, max_new_tokens=max_new_tokens)
    start = locate_model(str(model), Path.cwd(), base)
    tasks, answers, notes = answer_probes(start, config, cache or cache_folder())
    return AbilityEvaluation(str(model), mean_score(tasks, answers), summarize_tasks(tasks, answers), notes)


def ability_config(abilities: str | Sequence[str], **options: int | None) -> AbilitiesConfig:
    """The probes as a stage would name them. Raises `StageError`."""
    names = [] if abilities == "all" else [abilities] if isinstance(abilities, str) else list(abilities)
    return parse_abilities({"only": names, **options})


def answer_probes(
    start: ModelLocation, config: AbilitiesConfig, cache: Path
) -> tuple[list[PromptedTask], AllAnswers, tuple[str, ...]]:
    """The probes as prompts for the model of a start, its answers, and notes."""
    model_inputs = load_model_inputs(start, DEFAULT_CONTEXT)
    is_chat = has_chat_form(model_inputs)
    tasks = [add_soft_prompts(task, model_inputs) for task in make_ability_tasks(config, model_inputs, is_chat)]
    notes = (form_note(config, is_chat), *(note for task in tasks for note in task.notes))
    return tasks, answer_prompted_tasks(start, tasks, model_inputs, cache), notes
