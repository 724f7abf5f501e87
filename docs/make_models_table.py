"""Write docs/models.md: what a stage does with every model type of the installed transformers.

Run it as `python -m docs.make_models_table` in the root of the repository. Each model type is built tiny from its configuration,
with random weights, and goes through the verbs that a user calls; the table says what they did.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import postgrad
from postgrad.errors import PostgradError
from postgrad.models.pretrained import save_pretrained
from postgrad.models.task import Task
from tests.model_families import make_tiny_model, model_types, tiny_config
from tests.tiny_models import bert_tokenizer, make_tokenizer, old_text, t5_tokenizer


@dataclass
class Outcome:
    """What the verbs did with a model type; an empty problem is a success."""

    model_type: str
    task: Task
    layout: str = ""
    problems: dict[str, str] = field(default_factory=dict)
    """By column; `build`: transformers itself cannot."""
    tracebacks: list[str] = field(default_factory=list)


def survey(model_type: str, task: Task, folder: Path) -> Outcome:
    """Build a model type tiny, and take it through the verbs."""
    outcome = Outcome(model_type, task)
    try:
        model = make_tiny_model(tiny_config(model_type), task)
        ids = torch.arange(5, 17)[None]
        with torch.no_grad():
            model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))
    except Exception as error:
        outcome.problems["build"] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        return outcome
    write_inputs(model, task, folder)
    steps = {"check": check, "train": train}
    for name, step in steps.items():
        try:
            step(folder, outcome)
        except PostgradError as error:
            outcome.problems[name] = str(error)
            break
        except Exception as error:
            outcome.problems[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            outcome.tracebacks.append(traceback.format_exc())
            break
    return outcome


def write_inputs(model: PreTrainedModel, task: Task, folder: Path) -> None:
    tokenizers = {Task.CAUSAL: make_tokenizer, Task.MASKED: bert_tokenizer, Task.TEXT_TO_TEXT: t5_tokenizer}
    save_pretrained(model, tokenizers[task](), folder / "model", dtype=torch.float32)
    for name, count in (("text", 24), ("held-out", 4)):
        rows = "".join(json.dumps({"text": text[:60]}) + "\n" for text in old_text(count, len(name)))
        (folder / f"{name}.jsonl").write_text(rows)


def stage(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "model": str(folder / "model"),
        "output": str(folder / name),
        "tokens": 4 * 2 * 48,
        "data": {
            "sequence_length": 48,
            "overlap": "off",
            "sources": [{"name": "text", "path": str(folder / "text.jsonl"), "max_passes": 100}],
        },
        "batch": {"global_batch_size": 2, "micro_batch_size": 2},
        "schedule": {"kind": "constant", "peak": 1e-3},
        "evaluation": {"learned": [str(folder / "held-out.jsonl")], "samples": 1, "every": "50%"},
        "compute": {"threads": 1, "dtype": "float32", "compile": False},
        **changes,
    }


def check(folder: Path, outcome: Outcome) -> None:
    checked = postgrad.check_stage(postgrad.load_stage(stage(folder, "full")), cache=folder / "cache")
    outcome.layout = ", ".join(dict.fromkeys(rows.layout for rows in checked.plan.data.rows))


def train(folder: Path, outcome: Outcome) -> None:
    plan = postgrad.plan_stage(stage(folder, "full"), cache=folder / "cache")
    postgrad.finish(postgrad.train(plan, cache=folder / "cache"), postgrad.RunFinished)


def main(task: Task, names: Sequence[str]) -> None:
    for name in names or model_types(task):
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = survey(name, task, Path(folder))
        print(name, found.layout, found.problems or "ok", flush=True)
        for text in found.tracebacks:
            print("   TRACEBACK", *text.splitlines()[-6:], sep="\n      ", flush=True)


if __name__ == "__main__":
    main(Task(sys.argv[1]), sys.argv[2:])
