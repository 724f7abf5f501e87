"""Cost of sparse updates in a training step.

    python benchmarks/update_speed.py --json benchmarks/results/update_speed.json

Every arm makes the same step of the same random Llama: forward, backward, clipping and AdamW, as a stage steps. Arms take
turns, and the order turns around each round. Told are the processor seconds of an arm's step over those of the plain step
of the same round, as the median of all rounds with its lowest and highest, and of the update alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from arms import add_integer_options, format_range, median_and_range, provenance, run_rounds, settings, write_results
from small_llama import make_llama, make_run, random_batch

from postgrad.data.loading.batch import Batch
from postgrad.hardware import machine
from postgrad.models.model import CausalModel
from postgrad.objectives.next_token import TokenLoss
from postgrad.optim.migu import MiguMask
from postgrad.optim.mofo import MofoMask
from postgrad.optim.optimizer import Weights
from postgrad.optim.sparse_update import FullMask, UpdateMask
from postgrad.training.step import Run, train_step
from postgrad.tuning.attach import attach

ARMS: dict[str, tuple[str, Callable[[Run], UpdateMask]]] = {
    "plain": ("full", lambda run: FullMask()),
    "momentum 10 %": ("full", lambda run: MofoMask(0.1, run.weights.masters)),
    "magnitude 30 %": ("full", lambda run: MiguMask(0.3, run.model, run.weights.entries)),
    "lora": ("lora", lambda run: FullMask()),
    "lora, momentum 10 %": ("lora", lambda run: MofoMask(0.1, run.weights.masters)),
    "lora, magnitude 30 %": ("lora", lambda run: MiguMask(0.3, run.model, run.weights.entries)),
}
"""By name: the tuning, and what moves. An arm is held against the plain one of its tuning."""


class Arm:
    """A run whose updates move some numbers."""

    def __init__(self, options: argparse.Namespace, tuning: str, make: Callable[[Run], UpdateMask]) -> None:
        model = CausalModel(make_llama(options)).train()
        weights = Weights(model, attach(model.pretrained, {"kind": tuning}), torch.float32, master_copies=True)
        self.run = make_run(model, weights, [TokenLoss()])
        self.run.optimizer.update_mask = make(self.run)
        self.update = 0.0
        move = self.run.optimizer.step

        def timed(rate: float) -> int | None:
            begin = time.process_time()
            moved = move(rate)
            self.update = time.process_time() - begin
            return moved

        self.run.optimizer.step = timed  # type: ignore[method-assign]

    def step(self, batch: Batch) -> tuple[float, float]:
        """Processor seconds of a step, and of its update."""
        begin = time.process_time()
        train_step(self.run, [batch])
        return time.process_time() - begin, self.update


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every arm's step over the plain one's."""
    batch = random_batch(options)
    made = {name: Arm(options, tuning, make) for name, (tuning, make) in ARMS.items()}
    rounds = list(
        run_rounds({name: partial(arm.step, batch) for name, arm in made.items()}, options.rounds, options.warm)
    )
    rows = []
    for name in made:
        against = "lora" if name.startswith("lora") else "plain"
        row = {
            "arm": name,
            "step_ms": median_and_range(1e3 * each[name][0] for each in rounds),
            "update_ms": median_and_range(1e3 * each[name][1] for each in rounds),
            "ratio": median_and_range(each[name][0] / each[against][0] for each in rounds),
        }
        rows.append(row)
        print(
            f"{name:<21} step {row['step_ms'][0]:>8.1f} ms  update {row['update_ms'][0]:>7.2f} ms"
            f"  ratio {format_range(row['ratio'], '.3f')}",
            flush=True,
        )
    return rows


def main() -> None:
    """Run the comparison, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_integer_options(
        parser, hidden=384, inner=1024, layers=6, vocabulary=4096, rows=8, time=256, rounds=7, warm=2, threads=1
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine.tune_allocator()
    rows = compare(options)
    setting = {
        **settings(options),
        "weights": sum(p.numel() for p in make_llama(options).parameters()),
        "tokens_per_step": options.rows * options.time,
        **provenance(),
    }
    write_results(options.json, {"setting": setting, "arms": rows})


if __name__ == "__main__":
    main()
