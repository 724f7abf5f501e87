"""A step that updates each weight inside the backward pass, and never holds the gradient of the whole model.

The loss of all ranks is known before the backward pass, so a step whose loss is not finite changes no weight. A gradient that
is not finite, of a finite loss, is known after some weights have moved: it ends the run, whose last checkpoint is whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from postgrad.data.loading.batch import Batch
from postgrad.distributed.fsdp import reshard
from postgrad.errors import NonFiniteError, StageError
from postgrad.optim.gradient_release import release_gradients
from postgrad.training.step import (
    LossSums,
    Run,
    StepReport,
    StepWithoutUpdate,
    begin_step,
    compute_gradients,
    end_step,
    skip_step,
)


def train_step_releasing(run: Run, micro_batches: Sequence[Batch]) -> StepReport | StepWithoutUpdate:
    """Train on one global batch, which is one micro-batch of each rank.

    Raises `StageError` for several micro-batches, and `NonFiniteError` for a gradient that is not finite.
    """
    if run.world.any_rank(len(micro_batches) != 1):
        raise StageError(
            f"the {sum(len(batch.position_B) for batch in micro_batches)} rows of a step are of several sorts or lengths "
            f"and make {len(micro_batches)} micro-batches, whose gradients are added before the update",
            where="optimizer.release_gradients",
            expected="one micro-batch for each process and step",
            hint="leave it out, or pack documents into rows of one length",
        )
    counts = begin_step(run, micro_batches)
    rate, gradient_norm = 0.0, math.nan

    def backward(loss: Tensor, sums: LossSums) -> None:
        nonlocal rate, gradient_norm
        mean = sums.reduce(run.world).mean(int(counts.sum()))
        if run.world.any_rank(not math.isfinite(mean)):
            return
        rate = run.schedule(run.step + 1) * run.lr_scale(mean)
        with release_gradients(run.optimizer, rate) as released:
            loss.backward()
        gradient_norm = float(released.norm())

    losses = compute_gradients(run, micro_batches, int(counts.sum()), backward)
    if run.world.any_rank(not math.isfinite(losses.mean(int(counts.sum())))):
        reshard(run.model)  # what the forward pass has gathered
        return skip_step(run, micro_batches, counts, losses, math.nan)
    if run.world.any_rank(not math.isfinite(gradient_norm)):
        raise NonFiniteError(
            f"gradient norm {gradient_norm}, found after weights were updated in the backward pass",
            where=f"step {run.step + 1}",
            expected="finite gradients",
            hint="repeat the command: it resumes from the last checkpoint; if it fails again, lower schedule.peak or leave out "
            "optimizer.release_gradients in a stage with another `output`",
        )
    return end_step(run, micro_batches, counts, losses, rate, gradient_norm)
