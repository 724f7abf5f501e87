"""What do updates of fewer numbers cost a training step?

    PYTHONPATH=. python benchmarks/update_speed.py --json benchmarks/results/update_speed.json

Every arm makes the same step of the same random Llama: forward, backward, clipping and AdamW, as a stage steps. Arms take
turns, and the order turns around each round. Told are the processor seconds of an arm's step over those of the plain step
of the same round, as the median of all rounds with its lowest and highest, and of the update alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from postgrad import schedules
from postgrad.data.batch import Batch
from postgrad.models import machine
from postgrad.models.model import CausalModel
from postgrad.objectives.tokens import Tokens
from postgrad.training.moving import Everything, Moving
from postgrad.training.optimizer import AdamW, Weights
from postgrad.training.step import Run, train_step
from postgrad.training.top_momentum import TopMomentum
from postgrad.training.top_output import TopOutput
from postgrad.training.world import World
from postgrad.tuning.attach import attach

ARMS: dict[str, tuple[str, Callable[[Run], Moving]]] = {
    "plain": ("full", lambda run: Everything()),
    "momentum 10 %": ("full", lambda run: TopMomentum(0.1, run.weights.masters)),
    "magnitude 30 %": ("full", lambda run: TopOutput(0.3, run.model, run.weights.all)),
    "lora": ("lora", lambda run: Everything()),
    "lora, momentum 10 %": ("lora", lambda run: TopMomentum(0.1, run.weights.masters)),
    "lora, magnitude 30 %": ("lora", lambda run: TopOutput(0.3, run.model, run.weights.all)),
}
"""By name: the tuning, and what moves. An arm is held against the plain one of its tuning."""


class Arm:
    """A run whose updates move some numbers."""

    def __init__(self, options: argparse.Namespace, tuning: str, make: Callable[[Run], Moving]) -> None:
        torch.manual_seed(0)
        model = CausalModel(LlamaForCausalLM(config(options))).train()
        weights = Weights(model, attach(model.pretrained, {"kind": tuning}), torch.float32, split=True)
        self.run = Run(
            model=model,
            weights=weights,
            optimizer=AdamW(weights, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1),
            objectives=[Tokens()],
            penalties=[],
            schedule=schedules.then((schedules.constant(1e-4), 1)),
            world=World(torch.device("cpu")),
            sources=["text"],
            clip=1.0,
            seed=0,
            trained_by_source=np.zeros(1, np.int64),
        )
        self.run.optimizer.moving = make(self.run)
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


def config(options: argparse.Namespace) -> LlamaConfig:
    """The same Llama for every arm."""
    return LlamaConfig(
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 64,
        intermediate_size=options.inner,
        vocab_size=options.vocabulary,
        max_position_embeddings=options.time,
        tie_word_embeddings=True,
    )


def middle(values: list[float]) -> list[float]:
    """Median, lowest and highest."""
    return [statistics.median(values), min(values), max(values)]


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every arm's step over the plain one's."""
    ids = torch.randint(0, options.vocabulary, (options.rows, options.time), generator=torch.Generator().manual_seed(0))
    labels = torch.cat([ids[:, 1:], ids.new_full((len(ids), 1), -100)], 1)
    batch = Batch(
        {"input_ids": ids, "position_ids": torch.arange(options.time).expand_as(ids)},
        labels,
        np.zeros(len(ids), np.int64),
        (labels != -100).sum(1).numpy(),
    )
    made = {name: Arm(options, tuning, make) for name, (tuning, make) in ARMS.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
    for turn in range(options.rounds + options.warm):
        for name in list(made) if turn % 2 else reversed(made):
            times[name].append(made[name].step(batch))
    rows = []
    for name in made:
        against = "lora" if name.startswith("lora") else "plain"
        kept, plain = (times[n][options.warm :] for n in (name, against))
        row = {
            "arm": name,
            "step_ms": [1e3 * v for v in middle([step for step, _ in kept])],
            "update_ms": [1e3 * v for v in middle([update for _, update in kept])],
            "ratio": middle([one / other for (one, _), (other, _) in zip(kept, plain, strict=True)]),
        }
        rows.append(row)
        ratio = row["ratio"]
        print(
            f"{name:<21} step {row['step_ms'][0]:>8.1f} ms  update {row['update_ms'][0]:>7.2f} ms"
            f"  ratio {ratio[0]:.3f} [{ratio[1]:.3f}..{ratio[2]:.3f}]",
            flush=True,
        )
    return rows


def arguments() -> argparse.Namespace:
    """What is asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--inner", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--time", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warm", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Compare, and write what was found."""
    options = arguments()
    torch.set_num_threads(options.threads)
    machine.tune_allocator()
    load = os.getloadavg()[0]
    rows = compare(options)
    if options.json:
        asked = {k: v for k, v in vars(options).items() if k != "json"}
        numbers = sum(p.numel() for p in LlamaForCausalLM(config(options)).parameters())
        setting = {
            "repeat": "python benchmarks/update_speed.py "
            + " ".join(f"--{k.replace('_', '-')} {v}" for k, v in asked.items()),
            **asked,
            "weights": numbers,
            "tokens_per_step": options.rows * options.time,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "machine": {"cpu": machine.processor(), "cores": machine.cores()},
            "load_average": load,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"setting": setting, "arms": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
