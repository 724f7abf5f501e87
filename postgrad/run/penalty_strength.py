"""Penalty strengths: `strength: auto`, and a warning when a strength is far too large.

`auto` is resolved once, before the first step, by a few probe steps at the peak learning rate without penalties, on the first
rows of the stage; the weights are restored afterwards. They measure the gradient of the losses, g (the norm of its mean over
the probe), and the displacement of the weights, d. With noisy gradients weights move like a random walk, so their displacement
at the end of the stage is estimated as

    D = d sqrt(sum of the stage's rates / sum of the probe's rates)

At the chosen strength, the penalty's gradient at D equals that of the losses: |strength * importance * D| = PULL_RATIO * g. A
weaker penalty hardly changes the result; a much stronger one prevents learning. A decoupled penalty is compared with the mean
step instead of the gradient, both divided by the learning rate.
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
from postgrad.distributed.shards import local_shard, sum_over_shards
from postgrad.errors import StageError
from postgrad.optim import lr_schedules
from postgrad.optim.loss_adaptive_lr import ConstantLRScale
from postgrad.optim.optimizer import Optimizer
from postgrad.penalties.penalty import DecoupledPenalty, StagePenalty
from postgrad.training.loop import train_steps
from postgrad.training.step import Run, StepReport

PROBE_STEPS = 8
PULL_RATIO = 1.0
"""The penalty's gradient relative to that of the losses, at the expected end of the stage."""
WARNING_STEPS = 100
WARNING_RATIO = 10.0
"""Total gradient relative to that of the losses, in the first steps, above which the penalties prevent learning."""

PenaltyStrengths = dict[str, dict[str, float]]


def get_stage_penalties(run: Run) -> list[StagePenalty]:
    """The penalties that the stage names."""
    return [penalty for penalty in run.penalties if isinstance(penalty, StagePenalty)]


def penalties_without_strength(run: Run) -> list[StagePenalty]:
    """The penalties with `strength: auto` that have no value yet."""
    return [penalty for penalty in get_stage_penalties(run) if math.isnan(penalty.strength)]


def set_strengths(run: Run, strengths: Mapping[str, Mapping[str, float]]) -> None:
    """Set the strengths found for `strength: auto`."""
    for penalty in penalties_without_strength(run):
        penalty.strength = strengths[penalty.name]["strength"]


def find_strengths(run: Run, loader: Loader, rates: Sequence[float], optimizer: Optimizer) -> PenaltyStrengths:
    """Strengths for the anchors without one, with the measurements behind them; the run is unchanged afterwards.

    `rates`: the learning rates of all steps; `optimizer`: a fresh one over the run's weights. Raises `StageError` when the
    probe does not change an anchor's weights.
    """
    masters = run.weights.masters
    before = [local_shard(master.detach()).clone() for master in masters]
    recorder = _GradientRecorder(masters)
    steps, peak = min(PROBE_STEPS, len(rates)), max(rates)
    probe = dataclasses.replace(
        run,
        optimizer=optimizer,
        penalties=[recorder],
        schedule=lr_schedules.chain((lr_schedules.constant(peak), steps)),
        lr_scale=ConstantLRScale(),
        step=0,
        skipped_steps=0,
        trained_tokens=0,
        trained_tokens_by_source=np.zeros_like(run.trained_tokens_by_source),
    )
    for _ in train_steps(probe, loader, steps):
        pass
    push = _norm(recorder.sums, masters) / steps
    displacement = _norm([local_shard(m.detach()) - b for m, b in zip(masters, before, strict=True)], masters)
    spread = math.sqrt(sum(rates) / (peak * steps))
    strengths: PenaltyStrengths = {}
    for penalty in penalties_without_strength(run):
        pull = float(penalty.pull_norm()) * spread
        if not pull > 0:
            raise StageError(
                f"`{penalty.name}` needs a strength: {steps} probe steps changed none of its weights",
                where="penalties",
                hint="set `strength` to a number",
            )
        reference = displacement / (peak * steps) if isinstance(penalty, DecoupledPenalty) else push
        strengths[penalty.name] = {
            "strength": _rounded(PULL_RATIO * reference / pull),
            "gradient_norm": reference,
            "unit_penalty_norm": pull,
            "ratio": PULL_RATIO,
            "steps": steps,
            "distance_scale": spread,
        }
    for master, start in zip(masters, before, strict=True):
        local_shard(master.detach()).copy_(start)
    run.weights.write_back()
    run.weights.zero_gradients()
    return strengths


class _GradientRecorder:
    """A penalty without effect that sums the gradients of the losses."""

    name = "recorder"

    def __init__(self, masters: Sequence[Tensor]) -> None:
        self.masters = masters
        self.sums = [torch.zeros_like(local_shard(master.detach())) for master in masters]

    def __call__(self) -> Tensor:
        for master, total in zip(self.masters, self.sums, strict=True):
            if master.grad is not None:  # a skipped step may have a gradient that is not finite
                total += local_shard(master.grad).nan_to_num(0.0, 0.0, 0.0)
        return torch.zeros(())


def _norm(parts: Sequence[Tensor], masters: Sequence[Tensor]) -> float:
    square = torch.stack([part.double().square().sum() for part in parts]).sum()
    return float(sum_over_shards(square, masters[0]).sqrt())


def _rounded(value: float) -> float:
    """Three digits: the probe is no more accurate, and in further digits ranks might differ."""
    return float(f"{value:.3g}")


def strength_lines(strengths: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The strengths and their measurements, as text."""
    return [
        f"{name}: strength {entry['strength']:.3g}, from {entry['steps']:.0f} probe steps: at the expected end of the stage "
        f"the penalty's gradient at strength 1 is {entry['unit_penalty_norm']:.3g}, that of the losses "
        f"{entry['gradient_norm']:.3g}"
        for name, entry in strengths.items()
    ]


def penalty_warning(report: StepReport) -> str | None:
    """A warning for one of the first steps in which the penalties dominate the losses."""
    if (
        report.step > WARNING_STEPS
        or not report.loss_gradient_norm
        or report.gradient_norm < WARNING_RATIO * report.loss_gradient_norm
    ):
        return None
    ratio = report.gradient_norm / report.loss_gradient_norm
    return (
        f"step {report.step}: the penalties' gradient is {ratio:,.0f} x that of the losses, which prevents learning; "
        f"try a strength {ratio:,.0f} times smaller"
    )
