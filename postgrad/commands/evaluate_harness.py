"""Evaluate a model, run or checkpoint on tasks of lm-eval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from postgrad.commands.results import Result
from postgrad.commands.score_files import DEFAULT_CONTEXT, context_length, load_model_inputs
from postgrad.errors import ModelError, StageError
from postgrad.evaluation.lm_eval_harness import TaskResult, run_harness
from postgrad.hardware import machine
from postgrad.models.location import locate_model
from postgrad.models.model import wrap_model
from postgrad.models.pretrained import load_tokenizer
from postgrad.tuning.open_model import get_task, open_model


@dataclass(frozen=True)
class HarnessEvaluation(Result):
    """A model's results on tasks of lm-eval."""

    model: str
    lm_eval: str
    """The version of lm-eval."""
    requests: int
    """Log-likelihoods and texts that the tasks requested."""
    truncated_prompts: int
    """Prompts longer than the context, which lm-eval truncates on the left."""
    results: tuple[TaskResult, ...]


def evaluate_harness(
    model: str,
    tasks: str | Sequence[str],
    *,
    include: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    context: int | None = None,
    base: str | None = None,
) -> HarnessEvaluation:
    """Run tasks of lm-eval, named in a list or with commas between them.

    `include`: a folder of further task files. `shots`: demonstrations, instead of each task's own number. `limit`: items of
    each task, at most. Raises `StageError`, `ModelError`, and what `run_harness` raises.
    """
    machine.tune_allocator()
    names = [name.strip() for name in (tasks.split(",") if isinstance(tasks, str) else tasks) if name.strip()]
    if not names:
        raise StageError("no task is named", where="--harness", expected="names with commas between them")
    if include is not None and not include.is_dir():
        raise StageError(
            f"there is no folder {include}", where="--harness-include", expected="a folder of task files (YAML)"
        )
    start = locate_model(str(model), Path.cwd(), base)
    if not get_task(start).generates:
        raise ModelError(
            f"{model} generates no text, so lm-eval cannot evaluate it",
            where="--harness",
            expected="a decoder or an encoder-decoder",
        )
    if context is not None:
        context_length(start, context)
    model_inputs = load_model_inputs(start, DEFAULT_CONTEXT)
    opened = open_model(start)
    outcome = run_harness(
        wrap_model(opened.model, opened.task).to(machine.default_device()),
        load_tokenizer(start.full_model),
        names,
        pad=model_inputs.pad_id,
        context=context,
        frame_prompt=model_inputs.frame_prompt if model_inputs.has_soft_prompt else tuple,
        folder=include,
        shots=shots,
        limit=limit,
    )
    return HarnessEvaluation(str(model), outcome.version, outcome.requests, outcome.truncated_prompts, outcome.results)
