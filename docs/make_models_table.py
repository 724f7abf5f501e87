"""Write docs/models.md: what a stage does with every model type of the installed transformers.

Run it as `python -m docs.make_models_table` in the root of the repository. Each model type is built tiny from its
configuration, with random weights, and goes through what a user does with it; the table says what became of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

import postgrad
from postgrad.data.loading.batch import Batch
from postgrad.distributed.world import World
from postgrad.errors import PostgradError, first_line
from postgrad.hardware.execution import Execution
from postgrad.models.model import CausalModel, find_model_leak, verify_model
from postgrad.models.pretrained import _CLASSES, save_pretrained
from postgrad.models.task import Task
from postgrad.run.build import build_run, make_loader
from postgrad.run.tuned_model import make_tuned_model
from postgrad.training.step import StepReport, train_step
from tests.model_families import make_tiny_model, model_types, tiny_config_of_task
from tests.tiny_models import bert_tokenizer, make_tokenizer, old_text, t5_tokenizer

LENGTH = 48
COLUMNS = {
    "check": "layout",
    "loss": "loss",
    "resume": "resume",
    "lora": "LoRA",
    "reload": "reload",
}
"""What is tried, in this order, and the heading of its column."""


@dataclass
class Outcome:
    """What became of a model type: the layout of its rows, what worked, and the first sentence of what did not."""

    model_type: str
    task: Task
    layout: str = ""
    cause: str = ""
    """Why documents are not packed."""
    passed: list[str] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    """By what was tried; `build`: transformers itself cannot."""
    tracebacks: list[str] = field(default_factory=list)

    @property
    def status(self) -> str:
        """One word for the table."""
        if "build" in self.problems:
            return "not built"
        return self.layout if "loss" in self.passed else "refused"

    @property
    def reason(self) -> str:
        """The first problem."""
        return next(iter(self.problems.values()), "")


def survey(model_type: str, task: Task, folder: Path, steps: Sequence[str] = tuple(COLUMNS)) -> Outcome:
    """Build a model type tiny, and take it through what a user does with it; `steps`: what of it."""
    outcome = Outcome(model_type, task)
    try:
        model = make_tiny_model(tiny_config_of_task(model_type, task), task)
        ids = torch.arange(5, 17)[None]
        with torch.no_grad():
            model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))
    except Exception as error:
        outcome.problems["build"] = f"{type(error).__name__}: {first_line(error)}"
        return outcome
    write_inputs(model, task, folder)
    functions = {"check": check, "loss": compare_loss, "resume": resume, "lora": train_lora, "reload": reload}
    for name in steps:
        try:
            functions[name](folder, outcome)
            outcome.passed.append(name)
        except PostgradError as error:
            outcome.problems[name] = error.problem
        except AssertionError as error:
            outcome.problems[name] = str(error)
        except Exception as error:
            outcome.problems[name] = f"{type(error).__name__}: {first_line(error)}"
            outcome.tracebacks.append(traceback.format_exc())
        if name == "check" and outcome.problems:
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
        "tokens": 4 * 2 * LENGTH,
        "data": {
            "sequence_length": LENGTH,
            "overlap": "off",
            "sources": [{"name": "text", "path": str(folder / "text.jsonl"), "max_passes": 100}],
        },
        "batch": {"global_batch_size": 2, "micro_batch_size": 2},
        "schedule": {"kind": "constant", "peak": 1e-3},
        "save": {"every": "2 steps"},
        "evaluation": {"learned": [str(folder / "held-out.jsonl")], "samples": 0, "every": "100%", "drift_tokens": 0},
        "compute": {"threads": 1, "dtype": "float32", "compile": False},
        **changes,
    }


def make_plan(folder: Path, name: str, **changes: Any) -> postgrad.Plan:
    return postgrad.plan_stage(stage(folder, name, **changes), cache=folder / "cache")


def check(folder: Path, outcome: Outcome) -> None:
    """The layout that `check` and `train` choose, or their refusal; without their timing of micro-batches."""
    plan = make_plan(folder, "full")
    layout = ", ".join(dict.fromkeys(rows.layout for rows in plan.data.rows))
    model = make_tuned_model(plan, World(torch.device("cpu"))).model
    leak = None
    if isinstance(model, CausalModel):
        leak = find_model_leak(model, LENGTH)
        layout = "unpacked" if leak else "packed"
        outcome.cause = leak.describe() if leak else ""
    verify_model(model, packed=leak is None, row_length=LENGTH)
    outcome.layout = layout


def compare_loss(folder: Path, outcome: Outcome) -> None:
    """The loss of the first step is that of the model's own forward pass, document by document: so none sees another."""
    plan, world = make_plan(folder, "loss"), World(torch.device("cpu"))
    packed = outcome.layout == "packed"
    execution = Execution("float32", False, "sdpa", 1, 2, False, 0.0, packed=packed)
    tuned = make_tuned_model(plan, world, attention=None)
    run = build_run(plan, tuned, execution, world)
    loader = make_loader(plan, execution, world)
    batches = loader(1, last=1)
    run.model.eval()
    with torch.no_grad():
        own = sum(own_loss(tuned.model.pretrained, batch) for batch in batches) / sum(b.label_count for b in batches)
    run.model.train()
    report = train_step(run, batches)
    assert abs(report.loss - own) < 1e-4 * max(1.0, own), (
        f"the loss is {report.loss:.5f}, and the model's own {own:.5f}"
    )


def own_loss(pretrained: PreTrainedModel, batch: Batch) -> float:
    """The summed loss of a batch from the model's own logits, each document of it alone."""
    total = 0.0
    for row in range(len(batch.labels)):
        inputs = {name: tensor[row : row + 1] for name, tensor in batch.inputs.items()}
        labels = batch.labels[row]
        positions = inputs.pop("position_ids", None)
        cuts = [0, len(labels)] if positions is None else document_borders(positions[0])
        for begin, end in itertools.pairwise(cuts):
            part = {name: tensor[:, begin:end] for name, tensor in inputs.items()} if positions is not None else inputs
            logits = pretrained(**part).logits[0].double()
            total += float(torch.nn.functional.cross_entropy(logits, labels[begin:end], reduction="sum"))
    return total


def document_borders(positions: torch.Tensor) -> list[int]:
    starts = [i for i in range(len(positions)) if i == 0 or positions[i] != positions[i - 1] + 1]
    return [*starts, len(positions)]


def resume(folder: Path, outcome: Outcome) -> None:
    """A run that is interrupted behind a checkpoint ends with the weights of one that is not."""
    cache = folder / "cache"
    postgrad.finish(postgrad.train(make_plan(folder, "whole"), cache=cache), postgrad.RunFinished)
    events = postgrad.train(make_plan(folder, "parts"), cache=cache)
    for event in events:
        if isinstance(event, postgrad.CheckpointSaved):
            break
    events.close()  # type: ignore[attr-defined]
    postgrad.finish(postgrad.train(make_plan(folder, "parts"), cache=cache), postgrad.RunFinished)
    whole, parts = (weights(folder / name / "model") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[n], parts[n]) for n in whole), "other weights"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def train_lora(folder: Path, outcome: Outcome) -> None:
    """One step of a LoRA adapter."""
    plan, world = make_plan(folder, "lora", tuning={"kind": "lora", "rank": 2}), World(torch.device("cpu"))
    execution = Execution("float32", False, "sdpa", 1, 2, False, 0.0, packed=outcome.layout == "packed")
    run = build_run(plan, make_tuned_model(plan, world), execution, world)
    report = train_step(run, make_loader(plan, execution, world)(1, last=1))
    assert isinstance(report, StepReport) and report.gradient_norm > 0, "no gradient"


def reload(folder: Path, outcome: Outcome) -> None:
    """Plain transformers reads the published model, and finds every weight."""
    auto = _CLASSES[outcome.task]
    _, found = auto.from_pretrained(folder / "whole" / "model", output_loading_info=True)
    missing = [*found["missing_keys"], *found["unexpected_keys"]]
    assert not missing, f"{missing[0]} is missing or unexpected"


def main(outcomes: Path, tasks: Sequence[Task], names: Sequence[str], steps: Sequence[str]) -> None:
    """Survey model types, and add what was found to a file of outcomes."""
    for task in tasks:
        for name in names or model_types(task):
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = survey(name, task, Path(folder), steps)
            print(name, found.status, found.passed, found.problems, flush=True)
            for text in found.tracebacks:
                print("   TRACEBACK", *text.splitlines()[-6:], sep="\n      ", flush=True)
            with outcomes.open("a") as file:
                file.write(json.dumps(asdict(found)) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("outcomes", type=Path)
    parser.add_argument("--task", type=Task, action="append")
    parser.add_argument("--names", nargs="*", default=[])
    parser.add_argument("--steps", nargs="*", default=list(COLUMNS))
    words = parser.parse_args()
    main(words.outcomes, words.task or [Task.CAUSAL, Task.MASKED, Task.TEXT_TO_TEXT], words.names, words.steps)
