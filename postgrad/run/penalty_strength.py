"""How strong is a penalty whose strength is `auto`, and is a strength far too large?

`auto` is found once, before the first step, on a copy of the run that is thrown away: a few steps at the peak rate without any
penalty, on the rows that the stage reads first. They say how hard the text pushes, g (the norm of the mean of their gradients),
and where it pushes the weights, d. Weights that are pushed by noise as well wander like a random walk, so at the end of the
stage they are expected at about

    D = d sqrt(sum of the stage's rates / sum of the probe's rates)

The strength is the one at which the pull at D is as large as the push: |strength * importance * D| = RATIO * g. Weaker, and the
weights go where they would have gone; much stronger, and they stay where they are. A decoupled pull is held against the mean
step instead of the gradient, both over the rate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from postgrad.data.loading.loader import Loader
from postgrad.distributed.shards import local_shard, sum_over_ranks
from postgrad.errors import StageError
from postgrad.optim import lr_schedules
from postgrad.optim.loss_adaptive_lr import ConstantLRScale
from postgrad.optim.optimizer import AdamW
from postgrad.penalties.anchor import Anchor, AnchoredDecay, pull_norm
from postgrad.training.step import Run, StepReport, train_step

PROBE_STEPS = 8
PULL_RATIO = 1.0
"""How large the pull is beside the push, where the weights would end without it."""
WARNING_STEPS = 100
WARNING_RATIO = 10.0
"""A gradient so many times that of the losses, in the first steps, is the penalties' alone."""

PenaltyStrengths = dict[str, dict[str, float]]


def get_anchors(run: Run) -> list[Anchor | AnchoredDecay]:
    """The anchors of a run."""
    return [penalty for penalty in run.penalties if isinstance(penalty, Anchor | AnchoredDecay)]


def anchors_without_strength(run: Run) -> list[Anchor | AnchoredDecay]:
    """The penalties whose strength is yet to be found."""
    return [penalty for penalty in get_anchors(run) if math.isnan(penalty.strength)]


def set_strengths(run: Run, strengths: Mapping[str, Mapping[str, float]]) -> None:
    """Give penalties the strengths that were found for them."""
    for penalty in anchors_without_strength(run):
        penalty.strength = strengths[penalty.name]["strength"]


def find_strengths(run: Run, loader: Loader, rates: Sequence[float], optimizer: AdamW) -> PenaltyStrengths:
    """The strengths of the penalties that have none, and how they came about; the run is as it was afterwards.

    `rates`: those of all steps of the stage; `optimizer`: a fresh one over the run's weights. Raises `StageError` when a
    few steps do not move the weights that a penalty holds.
    """
    masters = run.weights.masters
    before = [local_shard(master.detach()).clone() for master in masters]
    listening = _GradientRecorder(masters)
    steps, peak = min(PROBE_STEPS, len(rates)), max(rates)
    probe = dataclasses.replace(
        run,
        optimizer=optimizer,
        penalties=[listening],
        schedule=lr_schedules.chain((lr_schedules.constant(peak), steps)),
        lr_scale=ConstantLRScale(),
        step=0,
        trained_tokens=0,
        trained_tokens_by_source=np.zeros_like(run.trained_tokens_by_source),
    )
    run.model.train()
    for step in range(1, steps + 1):
        train_step(probe, loader.read_batches(step))
    push = _norm(listening.sums, masters) / steps
    moved = _norm([local_shard(m.detach()) - b for m, b in zip(masters, before, strict=True)], masters)
    spread = math.sqrt(sum(rates) / (peak * steps))
    found: PenaltyStrengths = {}
    for penalty in anchors_without_strength(run):
        pull = float(pull_norm(penalty)) * spread
        if not pull > 0:
            raise StageError(
                f"no strength can be found for `{penalty.name}`: {steps} steps moved nothing that it holds",
                where="penalties",
                hint="give a number as its `strength`",
            )
        against = moved / (peak * steps) if isinstance(penalty, AnchoredDecay) else push
        found[penalty.name] = {
            "strength": _rounded(PULL_RATIO * against / pull),
            "gradient_norm": against,
            "unit_penalty_norm": pull,
            "ratio": PULL_RATIO,
            "steps": steps,
            "distance_scale": spread,
        }
    for master, start in zip(masters, before, strict=True):
        local_shard(master.detach()).copy_(start)
    run.weights.write_back()
    run.weights.zero_gradients()
    return found


class _GradientRecorder:
    """Pulls nothing, and adds up the gradients that a step has."""

    name = "listening"

    def __init__(self, masters: Sequence[Tensor]) -> None:
        self.masters = masters
        self.sums = [torch.zeros_like(local_shard(master.detach())) for master in masters]

    def __call__(self) -> Tensor:
        for master, total in zip(self.masters, self.sums, strict=True):
            if master.grad is not None:
                total += local_shard(master.grad)
        return torch.zeros(())


def _norm(parts: Sequence[Tensor], masters: Sequence[Tensor]) -> float:
    square = torch.stack([part.double().square().sum() for part in parts]).sum()
    return float(sum_over_ranks(square, masters[0]).sqrt())


def _rounded(value: float) -> float:
    """Three digits: more would say more than a few steps know, and ranks might differ in them."""
    return float(f"{value:.3g}")


def strength_lines(strengths: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How the strengths were found, in words."""
    return [
        f"{name}: strength {how['strength']:.3g}, found by {how['steps']:.0f} steps: at a strength of 1 it would pull with "
        f"{how['unit_penalty_norm']:.3g} where the text would take the weights, and the text pushes with {how['gradient_norm']:.3g}"
        for name, how in strengths.items()
    ]


def penalty_warning(report: StepReport) -> str | None:
    """What is to be said of a step in which penalties drown the losses; nothing after the first steps."""
    if (
        report.step > WARNING_STEPS
        or not report.loss_gradient_norm
        or report.gradient_norm < WARNING_RATIO * report.loss_gradient_norm
    ):
        return None
    ratio = report.gradient_norm / report.loss_gradient_norm
    return (
        f"step {report.step}: the penalties' gradient is {ratio:,.0f} x the loss's, so they hold the weights where they are; "
        f"a strength {ratio:,.0f} times smaller would let them learn"
    )
