"""Peak memory of a run by `postgrad check`, relative to that of the run, for the settings that change it.

    python benchmarks/memory_probe.py --json benchmarks/results/memory_probe.json

Trains a small Llama for one step on the built-in texts, then for each setting alternates two arms, each a
process of its own: the check of a stage of two steps, and the run of that stage, from its first tensor to its record.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from arms import add_integer_options, format_range, median_and_range, provenance, run_rounds, settings, write_results

_DOCUMENTS = 400
"""Of each text: enough for a few steps."""
_DISTILL = {"kind": "distill", "on": ["old"]}
SETTINGS: dict[str, dict[str, Any]] = {
    "full fp32": {},
    "activation checkpointing": {"compute": {"activation_checkpointing": True}},
    "micro-batches of 1": {"batch": {"micro_batch_size": 1}},
    "LoRA": {"tuning": {"kind": "lora"}},
    "Muon": {"optimizer": {"kind": "muon"}},
    "distilled": {"objectives": [{"kind": "next-token"}, _DISTILL]},
    "distilled, cached": {
        "objectives": [{"kind": "next-token"}, {**_DISTILL, "cache": {"kind": "top-k", "k": 32}}],
    },
    "EWC": {"penalties": [{"kind": "anchor", "strength": 1.0, "importance": "importance.safetensors"}]},
    "L2-SP, auto strength": {"penalties": [{"kind": "anchor", "strength": "auto"}]},
    "unpacked": {"data": {"packing": False}},
    "without drift": {"evaluation": {"drift_tokens": 0}},
    "full bf16": {"compute": {"dtype": "bfloat16"}},
    "LoRA bf16": {"tuning": {"kind": "lora"}, "compute": {"dtype": "bfloat16"}},
}


def make_stage(home: Path, name: str, rows: int, length: int) -> dict[str, Any]:
    """The stage of a setting."""
    stage: dict[str, Any] = {
        "name": name.replace(" ", "-").replace(",", ""),
        "model": str(home / "start"),
        "output": str(home / "run"),
        "tokens": 2 * 2 * rows * length - length,
        "data": {
            "sequence_length": length,
            "sources": [
                {"name": "new", "path": str(home / "new.jsonl"), "share": "75%"},
                {"name": "old", "path": str(home / "old.jsonl"), "share": "25%", "role": "replay"},
            ],
        },
        "batch": {"global_batch_size": 2 * rows, "micro_batch_size": rows},
        "schedule": {"kind": "constant", "peak": 1e-4, "warmup": 0},
        "evaluation": {
            "learned": [str(home / "new-heldout.jsonl")],
            "every": "100%",
            "max_tokens": 8500,
            "samples": 0,
            "drift_tokens": 4200,
        },
        "compute": {"threads": 1, "dtype": "float32", "compile": False},
    }
    for key, value in SETTINGS.get(name, {}).items():
        stage[key] = {**stage[key], **value} if key in stage else value
    return stage


def in_new_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns in a process that holds nothing else."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def prepare(home: Path, options: argparse.Namespace) -> None:
    """The texts, a start model of one step, and the importance of its weights."""
    from postgrad.commands.builtin_corpus import write_texts
    from postgrad.commands.importance import measure_importance
    from postgrad.commands.train import plan_stage
    from postgrad.run.run import run_stage

    write_texts(home)
    for text in ("old", "new"):
        lines = (home / f"{text}.jsonl").read_text().splitlines(keepends=True)
        (home / f"{text}.jsonl").write_text("".join(lines[:_DOCUMENTS]))
    raw = make_stage(home, "start", options.rows, options.length)
    raw["model"] = {"from_scratch": options.model, "tokenizer": {"vocab_size": 8000}}
    raw["evaluation"] |= {"max_tokens": 200, "drift_tokens": 0}
    plan = plan_stage(raw, folder=home, cache=home / "cache")
    list(run_stage(plan, command="benchmark", cache=home / "cache"))
    shutil.copytree(home / "run" / "model", home / "start")
    shutil.rmtree(home / "run")
    measure_importance(str(home / "start"), [str(home / "old.jsonl")], out=home / "importance.safetensors", tokens=2000)


def foretell(raw: dict[str, Any], home: Path) -> dict[str, Any]:
    """The memory that a check says."""
    from postgrad.commands.check import check_stage
    from postgrad.commands.train import plan_stage

    return check_stage(plan_stage(raw, folder=home, cache=home / "cache"), cache=home / "cache").record["memory"]


def train(raw: dict[str, Any], home: Path) -> dict[str, Any]:
    """The peak of the run, and that before each of its phases, in bytes."""
    from postgrad.commands.train import plan_stage
    from postgrad.hardware import machine
    from postgrad.run.events import PhaseStarted
    from postgrad.run.run import run_stage

    shutil.rmtree(home / "run", ignore_errors=True)
    shutil.rmtree(home / "cache" / "scores", ignore_errors=True)  # the start model is scored again
    plan = plan_stage(raw, folder=home, cache=home / "cache")
    machine.tune_allocator()
    device = machine.default_device()
    machine.process_memory(device)  # resets the peak
    phases = [
        [event.message, machine.peak_memory(device)]
        for event in run_stage(plan, command="benchmark", cache=home / "cache")
        if isinstance(event, PhaseStarted)
    ]
    return {"total": machine.peak_memory(device), "phases": phases}


def measure(home: Path, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One setting: what was said, what the run took, and their ratio."""
    raw = make_stage(home, name, options.rows, options.length)
    if any("importance" in penalty for penalty in raw.get("penalties", ())):
        raw["penalties"] = [{**raw["penalties"][0], "importance": str(home / "importance.safetensors")}]
    arms = {"check": partial(in_new_process, foretell, raw, home), "run": partial(in_new_process, train, raw, home)}
    rounds = list(run_rounds(arms, options.rounds))
    found = {
        "check_bytes": median_and_range(each["check"]["total"] for each in rounds),
        "run_bytes": median_and_range(each["run"]["total"] for each in rounds),
        "ratio": median_and_range(each["check"]["total"] / each["run"]["total"] for each in rounds),
        "is_measured": all(each["check"]["is_measured"] for each in rounds),
        "phases": rounds[-1]["run"]["phases"],
    }
    print(
        f"{name:26} check {found['check_bytes'][0] / 1e9:.2f} GB, run {found['run_bytes'][0] / 1e9:.2f} GB, "
        f"ratio {format_range(found['ratio'], '.3f')}{'' if found['is_measured'] else ' (from shapes)'}",
        flush=True,
    )
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_integer_options(parser, rounds=2, rows=8, length=256)
    parser.add_argument("--model", default="llama-15M", help="Architecture and size of the model.")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        in_new_process(prepare, home, options)
        found = {name: measure(home, name, options) for name in options.settings}
    write_results(options.json, {**provenance(), **settings(options), "found": found})


if __name__ == "__main__":
    main()
