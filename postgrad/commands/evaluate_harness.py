"""How does a model, run or checkpoint stand on tasks of lm-eval, told as a table?"""

from __future__ import annotations

import shlex
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

from postgrad.commands.evaluate import context_of, read_by
from postgrad.errors import ModelError, StageError
from postgrad.evaluation.lm_eval_harness import Found, run_harness
from postgrad.hardware import machine
from postgrad.models.model import model_for
from postgrad.models.pretrained import load_tokenizer, locate
from postgrad.tuning.open_model import open_model, task_at

_LENGTH = 1024


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
    start = locate(model, Path.cwd(), base)
    if task_at(start) not in ("causal", "text-to-text"):
        raise ModelError(
            f"{model} does not write, so lm-eval has nothing to ask it",
            where="--harness",
            expected="a decoder or an encoder-decoder",
        )
    if context is not None:
        context_of(start, context)
    reading = read_by(start, _LENGTH)
    opened = open_model(start)
    found = run_harness(
        model_for(opened.model, opened.task).to(machine.device()),
        load_tokenizer(start.plain),
        names,
        pad=reading.pad,
        context=context,
        around=reading.inside if reading.prompted else tuple,
        folder=folder,
        shots=shots,
        limit=limit,
    )
    lines = [f"{model}, asked tasks of lm-eval {found.version}", *_table(found)]
    if found.cut:
        lines.append(
            f"{found.cut:,} of {found.requests:,} prompts were longer than the context and cut on the left (lm-eval)"
        )
    lines.append(f"next: {shlex.join(['postgrad', 'generate', model])}")
    results = [
        {**asdict(result), "value": result.value if isfinite(result.value) else None} for result in found.results
    ]
    harness = {"lm_eval": found.version, "requests": found.requests, "cut": found.cut, "results": results}
    return {"text": "\n".join(lines), "model": model, "harness": harness}


def _table(found: Found) -> list[str]:
    """A line for each metric of each task."""
    width = max([4, *(len(result.task) for result in found.results)])
    lines = [f"  {'task':<{width}} {'shots':>5} {'items':>7}  {'metric':<28} {'value':>8} {'stderr':>8}"]
    for result in found.results:
        shots, items = ("" if number is None else f"{number:,}" for number in (result.shots, result.items))
        stderr = "" if result.stderr is None else f"{result.stderr:.4f}"
        lines.append(
            f"  {result.task:<{width}} {shots:>5} {items:>7}  {result.metric:<28} {result.value:>8.4f} {stderr:>8}".rstrip()
        )
    return lines
