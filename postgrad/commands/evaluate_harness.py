"""How does a model, run or checkpoint stand on tasks of lm-eval, told as a table?"""

from __future__ import annotations

import shlex
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

from postgrad.commands.evaluate import context_length, load_model_inputs
from postgrad.errors import ModelError, StageError
from postgrad.evaluation.lm_eval_harness import HarnessResults, run_harness
from postgrad.hardware import machine
from postgrad.models.location import locate_model
from postgrad.models.model import wrap_model
from postgrad.models.pretrained import load_tokenizer
from postgrad.tuning.open_model import get_task, open_model

_DEFAULT_CONTEXT = 1024


def evaluate_harness(
    model: str,
    tasks: str,
    *,
    folder: Path | None,
    shots: int | None,
    limit: int | None,
    context: int | None,
    base: str | None = None,
) -> dict[str, Any]:
    """Run tasks of lm-eval, whose names stand between commas. Raises as `run_harness`, and `ModelError`."""
    machine.tune_allocator()
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise StageError("no task is named", where="--harness", expected="names with commas between them")
    if folder is not None and not folder.is_dir():
        raise StageError(
            f"there is no folder {folder}", where="--harness-tasks", expected="a folder of task files (YAML)"
        )
    start = locate_model(model, Path.cwd(), base)
    if not get_task(start).generates:
        raise ModelError(
            f"{model} does not write, so lm-eval has nothing to ask it",
            where="--harness",
            expected="a decoder or an encoder-decoder",
        )
    if context is not None:
        context_length(start, context)
    reading = load_model_inputs(start, _DEFAULT_CONTEXT)
    opened = open_model(start)
    found = run_harness(
        wrap_model(opened.model, opened.task).to(machine.default_device()),
        load_tokenizer(start.full_model),
        names,
        pad=reading.pad_id,
        context=context,
        frame_prompt=reading.frame_prompt if reading.has_soft_prompt else tuple,
        folder=folder,
        shots=shots,
        limit=limit,
    )
    lines = [f"{model}, asked tasks of lm-eval {found.version}", *_table(found)]
    if found.truncated_prompts:
        lines.append(
            f"{found.truncated_prompts:,} of {found.requests:,} prompts were longer than the context and cut on the left (lm-eval)"
        )
    lines.append(f"next: {shlex.join(['postgrad', 'generate', model])}")
    results = [
        {**asdict(result), "value": result.value if isfinite(result.value) else None} for result in found.results
    ]
    harness = {"lm_eval": found.version, "requests": found.requests, "cut": found.truncated_prompts, "results": results}
    return {"text": "\n".join(lines), "model": model, "harness": harness}


def _table(harness_result: HarnessResults) -> list[str]:
    """A line for each metric of each task."""
    width = max([4, *(len(result.task) for result in harness_result.results)])
    lines = [f"  {'task':<{width}} {'shots':>5} {'items':>7}  {'metric':<28} {'value':>8} {'stderr':>8}"]
    for result in harness_result.results:
        shots, items = ("" if number is None else f"{number:,}" for number in (result.shots, result.items))
        stderr = "" if result.stderr is None else f"{result.stderr:.4f}"
        lines.append(
            f"  {result.task:<{width}} {shots:>5} {items:>7}  {result.metric:<28} {result.value:>8.4f} {stderr:>8}".rstrip()
        )
    return lines
