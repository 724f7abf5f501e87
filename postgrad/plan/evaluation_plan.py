"""What a stage scores before, during and after training: held-out sets, tasks, abilities, and the checkpoint to publish."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from postgrad.config import stage as s
from postgrad.data.read.row_kinds import RUNNING_TEXT_KINDS
from postgrad.errors import StageError, require_choice
from postgrad.evaluation.held_out import HeldOutSet
from postgrad.evaluation.pseudo_perplexity import MaskedHeldOutText
from postgrad.models.task import Task
from postgrad.optim import lr_schedules
from postgrad.plan.checkpoint_selection import SelectionRule, make_selection_rule
from postgrad.plan.data_plan import DataPlan
from postgrad.plan.held_out_documents import HeldOutDocuments
from postgrad.plan.held_out_sets import make_held_out_set, make_masked_held_out_text
from postgrad.plan.model_inputs import ModelInputs
from postgrad.plan.model_plan import ModelPlan
from postgrad.plan.prompted_task import PromptedTask, add_soft_prompts


@dataclass(frozen=True)
class EvaluationPlan:
    """What is scored before, during and after training."""

    sets: tuple[HeldOutSet, ...]
    """Held-out sets as the model reads them under the stage's tuning."""
    sets_before: tuple[HeldOutSet, ...]
    """The same documents as the start model reads them."""
    pseudo_perplexity_sets: tuple[MaskedHeldOutText, ...]
    """For masked language models: held-out text with every token masked in turn."""
    pseudo_perplexity_sets_before: tuple[MaskedHeldOutText, ...]
    """The same texts as the start model reads them."""
    tasks: tuple[PromptedTask, ...]
    """Tasks in prompts, under the stage's tuning."""
    tasks_before: tuple[PromptedTask, ...]
    """The same, as the start model reads them."""
    abilities: tuple[PromptedTask, ...]
    """Generated probes, under the stage's tuning."""
    abilities_before: tuple[PromptedTask, ...]
    """The same, as the start model reads them."""
    selection_rule: SelectionRule | None
    """Selects the checkpoint that is published; None: the last one."""
    eval_tokens: int
    """Tokens of each set that are scored during training."""

    @property
    def scored_sets(self) -> tuple[HeldOutSet, ...]:
        """The sets that are scored before and during training: all but the test sets."""
        return tuple(h for h in self.sets if h.role != "test")

    @property
    def scored_sets_before(self) -> tuple[HeldOutSet, ...]:
        """The same as the start model reads them."""
        return tuple(h for h in self.sets_before if h.role != "test")

    def subset(self, held_out: HeldOutSet) -> HeldOutSet:
        """The part of a set that is scored during training: its first tokens, or all of it where it selects checkpoints."""
        is_watched = self.selection_rule is not None and self.selection_rule.is_watched(held_out)
        return held_out if is_watched else held_out.take_tokens(self.eval_tokens)


def plan_evaluation(
    stage: s.Stage,
    model: ModelPlan,
    data: DataPlan,
    held_out_documents: Sequence[HeldOutDocuments],
    tasks: Sequence[PromptedTask],
    abilities: Sequence[PromptedTask],
    schedule: lr_schedules.Schedule,
    notes: list[str],
) -> EvaluationPlan:
    """The evaluation plan of a stage; each set and task is read twice, with and without the stage's tuning."""
    inputs, inputs_before = model.inputs, model.inputs.without_tuning
    limit = stage.evaluation.max_tokens
    for name in stage.evaluation.expected_losses:
        known = [each.name for each in held_out_documents]
        require_choice("held-out set", name, known, where="evaluation.expected_losses")
    # The start model leaves the positions of the tuning's vectors free, so both score the same windows.
    reserved = len(inputs.virtual_tokens) - len(inputs_before.virtual_tokens)
    sets = [make_held_out_set(h, inputs, limit, notes, problem=model.problem) for h in held_out_documents]
    sets_before = [
        make_held_out_set(h, inputs_before, limit, [], reserved_positions=reserved, problem=model.problem)
        for h in held_out_documents
    ]
    scored = [h for h in held_out_documents if h.role != "test"]
    return EvaluationPlan(
        sets=tuple(sets),
        sets_before=tuple(sets_before),
        pseudo_perplexity_sets=_make_pseudo_perplexity_sets(stage, model, scored, inputs),
        pseudo_perplexity_sets_before=_make_pseudo_perplexity_sets(stage, model, scored, inputs_before),
        tasks=tuple(add_soft_prompts(task, inputs) for task in tasks),
        tasks_before=tuple(add_soft_prompts(task, inputs_before) for task in tasks),
        abilities=tuple(add_soft_prompts(task, inputs) for task in abilities),
        abilities_before=tuple(add_soft_prompts(task, inputs_before) for task in abilities),
        selection_rule=make_selection_rule(stage.save.choose, sets, data.steps, data.tokens, schedule),
        eval_tokens=stage.evaluation.eval_tokens,
    )


def _make_pseudo_perplexity_sets(
    stage: s.Stage, model: ModelPlan, held_out_documents: Sequence[HeldOutDocuments], model_inputs: ModelInputs
) -> tuple[MaskedHeldOutText, ...]:
    """The sets of running text, masked token by token. Raises `StageError` unless the model is a masked one."""
    limit = stage.evaluation.pseudo_perplexity
    if not limit:
        return ()
    if model.task != Task.MASKED:
        raise StageError(
            f"pseudo-perplexity needs a masked language model, and {model.start.name} is not one",
            where="evaluation.pseudo_perplexity",
            expected="0, or an encoder under the objective masked",
        )
    running = (h for h in held_out_documents if h.store.kind in RUNNING_TEXT_KINDS)
    return tuple(make_masked_held_out_text(h, model_inputs, limit) for h in running)
