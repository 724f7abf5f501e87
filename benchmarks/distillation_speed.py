"""Cost of distillation in a training step, with an online teacher and with cached predictions.

    python benchmarks/distillation_speed.py --json benchmarks/results/distillation_speed.json

Every arm trains the same random Llama on the same batch, as a stage steps: forward, backward, clip, AdamW. `plain` has
next-token prediction alone, the others distillation on every row besides: from a second model, from the ids that it drew
beforehand, or from its likeliest ids. `context teacher`: the second model also reads `--context` more tokens of each row.
`sharp plain`: a sharpness-aware step. `lora` arms train an adapter; their teacher is the model with the adapter switched off.
Arms take turns, and the one that begins changes each round; a ratio is of two steps of one round. Seconds are those that the
process was computing, so that others on the machine do not count. Given are the median and the range over the rounds. What is
looked up is read by another thread while the model steps in a stage; here its time is added in full (`lookup_ms`).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import add_integer_options, format_range, median_and_range, provenance, run_rounds, settings, write_results
from small_llama import make_llama, make_run

from postgrad.data.layouts.rows import Row, RowContext
from postgrad.data.loading.batch import Batch, collate, collate_teacher_targets
from postgrad.data.loading.teacher_cache import SparseDistribution, TeacherCache, row_digest
from postgrad.distributed import fsdp
from postgrad.hardware import machine
from postgrad.models.model import CausalModel
from postgrad.objectives.chunked_head_loss import compute_logits, compute_products
from postgrad.objectives.distillation import CachedDistillationLoss, DistillationLoss
from postgrad.objectives.next_token import TokenLoss
from postgrad.objectives.objective import Objective
from postgrad.objectives.teacher import OnlineTeacher
from postgrad.optim.optimizer import Weights
from postgrad.run.cached_teacher import sample_distribution, top_k_distribution
from postgrad.training.sharpness_aware import SharpnessAwareGradients
from postgrad.training.step import compute_gradients, train_step
from postgrad.tuning.attach import attach

DRAWS, K = 50, 64
_ARMS = ["plain", "teacher", "context teacher", "sampled", "top-k", "sharp plain", "lora plain", "lora off"]


def make_teacher(options: argparse.Namespace) -> CausalModel:
    """Another Llama, about as sure of the next token as a small model is: a random one would draw every id once."""
    teacher = CausalModel(make_llama(options, seed=1, extra_positions=options.context))
    with torch.no_grad():
        teacher.pretrained.model.norm.weight *= 9
    return teacher


def random_rows(options: argparse.Namespace) -> list[Row]:
    """Rows of random ids, each one document."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, options.vocabulary, (options.rows, options.time + 1))
    contexts = rng.integers(0, options.vocabulary, (options.rows, options.context))
    positions = np.arange(options.time)
    return [
        Row(
            {"input_ids": row[:-1], "position_ids": positions},
            row[1:],
            options.time,
            (RowContext(context, 0, 0, options.time),),
        )
        for row, context in zip(ids, contexts, strict=True)
    ]


@torch.no_grad()
def teacher_distributions(teacher: CausalModel, rows: list[Row], kind: str) -> list[SparseDistribution]:
    """A teacher's distributions for some rows, as a stage caches them."""
    output = teacher(**collate(rows, [0] * len(rows)).inputs)
    assert output.head is not None
    distributions = []
    for i, hidden_ND in enumerate(output.hidden):
        product_NV = hidden_ND.new_empty(len(hidden_ND), len(output.head.weight_VD))
        compute_products(hidden_ND, output.head, product_NV)
        logits_NV = torch.empty_like(product_NV, dtype=torch.float32)
        compute_logits(product_NV, output.head, logits_NV)
        uniform_NS = np.random.default_rng(i).random((len(hidden_ND), DRAWS))
        distributions.append(
            sample_distribution(logits_NV, uniform_NS, 1.0) if kind == "sampled" else top_k_distribution(logits_NV, K)
        )
    return distributions


class Arm:
    """A model, its optimizer and its objectives."""

    def __init__(self, options: argparse.Namespace, name: str, batch: Batch, tuning: dict[str, Any]) -> None:
        student = CausalModel(make_llama(options))
        attached = attach(student.pretrained, tuning)
        dtype = getattr(torch, options.dtype)
        weights = Weights(student, attached, dtype, master_copies=True)
        objectives: list[Objective] = [TokenLoss()]
        how = name.split()[-1]
        if how == "teacher":
            teacher = make_teacher(options).requires_grad_(False)
            for parameter in teacher.parameters():
                parameter.data = parameter.data.to(dtype)
            if options.compile:
                fsdp.compile_layers(teacher)
            teaches = OnlineTeacher(teacher, reads_contexts=name.startswith("context"))
            objectives.append(DistillationLoss(teaches, lambda step: 1.0))
        elif how == "off":
            objectives.append(DistillationLoss(OnlineTeacher(student, attached.disable), lambda step: 1.0))
        elif how != "plain":
            objectives.append(CachedDistillationLoss(lambda step: 1.0))
        if options.compile:
            fsdp.compile_layers(student)
        self.batch = replace(batch, objectives=tuple(range(len(objectives))))
        self.run = make_run(student.train(), weights, objectives)
        is_sharp = name.startswith("sharp")
        self.compute = SharpnessAwareGradients(0.05, 1) if is_sharp else compute_gradients

    def step(self) -> float:
        """Seconds of a step."""
        begin = time.process_time()
        train_step(self.run, [self.batch], self.compute)
        return time.process_time() - begin


def measure_arms(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Each arm's step beside the plain one of its tuning."""
    rows = random_rows(options)
    batch = collate(rows, [0] * len(rows))
    teacher = make_teacher(options)
    arms: dict[str, Arm] = {}
    lookup: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.arms:
            told: dict[str, Any] = {}
            kind = name.split()[-1]
            if kind in ("sampled", "top-k"):
                asked = {"kind": kind, **({"samples": DRAWS} if kind == "sampled" else {"k": K})}
                store = TeacherCache(Path(folder) / kind, {"asked": asked}, np.arange(len(rows)), options.time)
                for part in store.missing_parts():
                    keys = store.part_keys(part)
                    words = teacher_distributions(teacher, [rows[k] for k in keys], kind)
                    store.write_part(part, words, [row_digest(rows[k]) for k in keys], vocabulary=options.vocabulary)
                begin = time.process_time()
                few = collate_teacher_targets(
                    [store.lookup(i, row) for i, row in enumerate(rows)], has_rest_mass=store.has_rest_mass
                )
                lookup[name] = time.process_time() - begin, store.size_bytes() / (len(rows) * options.time)
                told = {"distill": few}
            tuning = {"kind": "lora", "rank": 16} if name.startswith("lora") else {"kind": "full"}
            arms[name] = Arm(options, name, replace(batch, teacher_targets=told), tuning)
        rounds = list(run_rounds({name: arm.step for name, arm in arms.items()}, options.rounds, options.warm))
    out = []
    for name in arms:
        base = "lora plain" if name.startswith("lora") else "plain"
        extra, size = lookup.get(name, (0.0, 0.0))
        row = {
            "arm": name,
            "ms": median_and_range(1e3 * (each[name] + extra) for each in rounds),
            "ratio": median_and_range((each[name] + extra) / each[base] for each in rounds),
            "lookup_ms": 1e3 * extra,
            "bytes_per_label": size,
        }
        out.append(row)
        print(
            f"{name:<14} {row['ms'][0]:>8.1f} ms  x {format_range(row['ratio'], '.3f')}"
            f"  lookup {row['lookup_ms']:.1f} ms, {size:.0f} bytes a label",
            flush=True,
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="*", default=_ARMS)
    add_integer_options(
        parser,
        hidden=256,
        layers=6,
        inner=704,
        vocabulary=8192,
        time=512,
        context=52,
        rows=4,
        rounds=7,
        warm=2,
        threads=1,
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine.tune_allocator()
    rows = measure_arms(options)
    what = __doc__.split("\n")[0]
    write_results(options.json, {**provenance(), "what": what, "settings": settings(options), "rows": rows})


if __name__ == "__main__":
    main()
