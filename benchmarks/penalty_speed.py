"""Cost of an anchor in a training step, by its tensors and their storage.

    python benchmarks/penalty_speed.py --json benchmarks/results/penalty_speed.json

Every arm makes the same step of the same random Llama: forward, backward, the pull, clipping and AdamW, as a stage steps. Arms
take turns, and the order turns around each round. Told are the processor seconds of the pull over those of the rest of the same
step (so other work on the machine hits both, or neither), and the bytes that are held beside the weights. The share falls as
more tokens go into a step: the pull is once a step, whatever the batch.

As a loss: the term written as a Python loop in the loss and left to autograd, as it is often found.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from arms import add_integer_options, format_range, median_and_range, provenance, run_rounds, settings, write_results
from safetensors import safe_open
from safetensors.torch import save_file
from small_llama import make_llama, make_run, random_batch
from torch import Tensor

from postgrad.data.loading.batch import Batch
from postgrad.hardware import machine
from postgrad.models.model import CausalModel
from postgrad.objectives.next_token import TokenLoss
from postgrad.optim.optimizer import Weights
from postgrad.penalties.anchor import Anchor, AnchoredDecay, AnchoredDelta, AnchoredWeight
from postgrad.training.step import Run, train_step
from postgrad.tuning.attach import attach


class TimedPenalty:
    """A penalty, and the processor seconds of its last pull."""

    def __init__(self, pull: Callable[[], Tensor], name: str = "anchor") -> None:
        self.pull, self.name, self.seconds = pull, name, 0.0

    def __call__(self) -> Tensor:
        begin = time.process_time()
        value = self.pull()
        float(value)
        self.seconds = time.process_time() - begin
        return value


class LossPenalty:
    """The term as a loss of its own, differentiated by autograd."""

    def __init__(self, masters: list[Tensor], references: list[Tensor], importance: list[Tensor]) -> None:
        self.parts = list(zip(masters, references, importance, strict=True))

    def __call__(self) -> Tensor:
        loss = torch.zeros(())
        for master, reference, given in self.parts:
            loss = loss + (given * (master - reference).square()).sum()
        (0.5 * loss).backward()
        return loss.detach()


class Arm:
    """A run under one penalty."""

    def __init__(self, options: argparse.Namespace, tuning: str, make: Callable[[Run], Any] | None) -> None:
        model = CausalModel(make_llama(options)).train()
        attached = attach(model.pretrained, {"kind": tuning})
        weights = Weights(model, attached, torch.float32, master_copies=True)
        self.run = make_run(model, weights, [TokenLoss()])
        self.penalty = None
        self.bytes = 0
        if make:
            anchor = make(self.run)
            self.bytes = anchor_bytes(anchor)
            if isinstance(anchor, AnchoredDecay):
                self.penalty = TimedPenalty(lambda: self.value_and_decay(anchor))
            else:
                self.penalty = TimedPenalty(anchor)
            self.run.penalties = [self.penalty]

    def value_and_decay(self, anchor: AnchoredDecay) -> Tensor:
        """The value and the move together: what a step has of it."""
        value = anchor()
        anchor.decay(1e-4)
        return value

    def step(self, batch: Batch) -> tuple[float, float]:
        """Processor seconds of the step without the pull, and of the pull."""
        begin = time.process_time()
        train_step(self.run, [batch])
        whole = time.process_time() - begin
        pull = self.penalty.seconds if self.penalty else 0.0
        return whole - pull, pull


def anchor_bytes(anchor: Any) -> int:
    """Bytes held beside the weights, mapped files not counted."""
    if isinstance(anchor, LossPenalty):
        return sum(r.nbytes + i.nbytes for _, r, i in anchor.parts)
    tensors = [t for w in anchor.weights for t in (w.reference, w.importance) if t is not None]
    tensors += [d.importance for d in getattr(anchor, "deltas", []) if d.importance is not None]
    return sum(t.nbytes for t in tensors if not getattr(t, "mapped", False))


def penalty_arms(folder: Path) -> dict[str, tuple[str, Callable[[Run], Any] | None]]:
    """By name: the tuning, and what makes the penalty."""

    def copies(run: Run, dtype: torch.dtype) -> list[Tensor]:
        return [m.detach().to(dtype, copy=True) for m in run.weights.masters]

    def given(run: Run, dtype: torch.dtype) -> list[Tensor]:
        return [torch.rand_like(m.detach()).to(dtype) for m in run.weights.masters]

    def held(run: Run, dtype: torch.dtype, *, weighed: bool) -> list[AnchoredWeight]:
        importance = given(run, dtype) if weighed else [None] * len(run.weights.masters)
        return [
            AnchoredWeight(m, r, i) for m, r, i in zip(run.weights.masters, copies(run, dtype), importance, strict=True)
        ]

    def mapped(run: Run) -> Anchor:
        path = folder / "model.safetensors"
        save_file({w.name: w.master.detach().clone() for w in run.weights.entries}, path)
        file = safe_open(path, "pt")
        parts = []
        for w in run.weights.entries:
            reference = file.get_tensor(w.name)
            reference.mapped = True  # type: ignore[attr-defined]
            parts.append(AnchoredWeight(w.master, reference))
        return Anchor(parts, strength=1.0)

    def low_rank(run: Run, *, weighed: bool) -> Anchor:
        changes = run.weights.tuning.weight_deltas().values()
        importance = [torch.rand(m.shape) if weighed else None for m in changes]
        parts = [AnchoredDelta(m.weight_delta, m.parameters, i) for m, i in zip(changes, importance, strict=True)]
        return Anchor([], parts, strength=1.0)

    fp32, bf16 = torch.float32, torch.bfloat16
    return {
        "none": ("full", None),
        "l2-sp": ("full", lambda r: Anchor(held(r, fp32, weighed=False), strength=1.0)),
        "l2-sp bf16": ("full", lambda r: Anchor(held(r, bf16, weighed=False), strength=1.0)),
        "l2-sp mapped": ("full", mapped),
        "ewc": ("full", lambda r: Anchor(held(r, fp32, weighed=True), strength=1.0)),
        "ewc bf16": ("full", lambda r: Anchor(held(r, bf16, weighed=True), strength=1.0)),
        "ewc decoupled": ("full", lambda r: AnchoredDecay(held(r, fp32, weighed=True), strength=1.0)),
        "ewc as a loss": ("full", lambda r: LossPenalty(r.weights.masters, copies(r, fp32), given(r, fp32))),
        "lora": ("lora", None),
        "lora, l2-sp": ("lora", lambda r: low_rank(r, weighed=False)),
        "lora, ewc": ("lora", lambda r: low_rank(r, weighed=True)),
    }


def compare(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Every arm's share of a step."""
    batch = random_batch(options)
    made = {name: Arm(options, tuning, make) for name, (tuning, make) in penalty_arms(folder).items()}
    rounds = list(
        run_rounds({name: partial(arm.step, batch) for name, arm in made.items()}, options.rounds, options.warm)
    )
    rows = []
    for name, arm in made.items():
        row = {
            "arm": name,
            "step_ms": median_and_range(1e3 * each[name][0] for each in rounds),
            "pull_ms": median_and_range(1e3 * each[name][1] for each in rounds),
            "share": median_and_range(each[name][1] / each[name][0] for each in rounds),
            "held_mb": arm.bytes / 1e6,
        }
        rows.append(row)
        print(
            f"{name:<15} step {row['step_ms'][0]:>8.1f} ms  pull {row['pull_ms'][0]:>7.2f} ms"
            f"  share {format_range(row['share'], '.2%')}  held {row['held_mb']:.1f} MB",
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
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(options, Path(folder))
    setting = {
        **settings(options),
        "weights": sum(p.numel() for p in make_llama(options).parameters()),
        "tokens_per_step": options.rows * options.time,
        **provenance(),
    }
    write_results(options.json, {"setting": setting, "arms": rows})


if __name__ == "__main__":
    main()
