"""Time to read the rows of a training step, relative to the step.

    python benchmarks/reading.py --json benchmarks/results/reading.json

Packs and mixes the demo's texts as a stage would, times the reading of whole global batches on one thread, and sets the
median beside the time a step of a small model takes here. The loader reads ahead in a thread, so this is an upper bound
of what a step can wait.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from arms import add_integer_options, provenance, settings, write_results

from postgrad.cli.demo import demo_stage_text, write_random_model
from postgrad.commands.builtin_corpus import write_texts
from postgrad.config.stage_file import load_stage
from postgrad.distributed.world import World
from postgrad.hardware import machine
from postgrad.plan.plan import make_plan
from postgrad.run.build import build_run, choose_execution, make_loader
from postgrad.run.tuned_model import make_tuned_model
from postgrad.training.step import train_step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_integer_options(parser, batches=200, steps=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    machine.tune_allocator()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_texts(folder / "data")
        write_random_model(folder / "random", folder / "data" / "old.jsonl")
        (folder / "replay.yaml").write_text(demo_stage_text("replay").replace("runs/base", "random"))
        plan = make_plan(load_stage(folder / "replay.yaml"), folder, folder / "cache")
        world = World(torch.device("cpu"))
        subject = make_tuned_model(plan, world)
        execution = choose_execution(plan, subject, world)
        run = build_run(plan, subject, execution, world)
        loader = make_loader(plan, execution, world)
        reads, steps = [], []
        for step in range(1, options.batches + 1):
            begin = time.perf_counter()
            batches = loader.read_batches(step)
            reads.append(time.perf_counter() - begin)
            if step <= options.steps:
                begin = time.perf_counter()
                train_step(run, batches)
                steps.append(time.perf_counter() - begin)
        read, trained = statistics.median(reads), statistics.median(steps[3:])
        found = {
            **provenance(),
            **settings(options),
            "rows": plan.data.mixture.block_size,
            "row_tokens": plan.model.context_length,
            "parameters": sum(master.numel() for master in run.weights.masters),
            "read_ms": 1e3 * read,
            "read_ms_range": [1e3 * min(reads), 1e3 * max(reads)],
            "step_ms": 1e3 * trained,
            "share_of_step": read / trained,
            "tokens_per_second_read": plan.data.mixture.block_size * plan.model.context_length / read,
        }
    print(
        f"{found['rows']} rows of {found['row_tokens']} tokens are read in {found['read_ms']:.2f} ms; a step of a model of "
        f"{found['parameters']:,} weights takes {found['step_ms']:.0f} ms: {found['share_of_step']:.2%}"
    )
    write_results(options.json, found)


if __name__ == "__main__":
    main()
