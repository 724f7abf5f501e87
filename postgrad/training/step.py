"""One move of the weights: read, weigh, divide once, pull, check, clip, move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from postgrad.data.loading.batch import Batch
from postgrad.distributed.fsdp import synchronise_gradients
from postgrad.distributed.world import World
from postgrad.errors import NonFiniteError
from postgrad.models.model import Model
from postgrad.objectives.objective import Objective, combine_losses
from postgrad.optim.loss_adaptive_lr import ConstantLRScale, LRScale
from postgrad.optim.lr_schedules import Schedule
from postgrad.optim.optimizer import AdamW, Weights
from postgrad.penalties.penalty import Penalty


@dataclass
class Run:
    """Everything a step needs, put together by the stage."""

    model: Model
    weights: Weights
    optimizer: AdamW
    objectives: Sequence[Objective]
    penalties: Sequence[Penalty]
    schedule: Schedule
    world: World
    sources: Sequence[str]
    max_grad_norm: float
    seed: int
    lr_scale: LRScale = field(default_factory=ConstantLRScale)
    """What the schedule's rate is multiplied by at a step of a given loss."""
    step: int = 0
    trained_tokens: int = 0
    rate: float = 0.0
    """The learning rate of the last step."""
    trained_tokens_by_source: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


@dataclass(frozen=True)
class StepReport:
    """What a step did: mean losses per trained token in nats, the rate, the gradient's norm before clipping.

    `push`: the norm of the losses' gradient alone, where penalties pull against it. `moved`: how many numbers the update moved,
    where it is not simply all.
    """

    step: int
    tokens: int
    trained_tokens: int
    loss: float
    losses: dict[str, float]
    penalties: dict[str, float]
    losses_by_source: dict[str, tuple[float, int]]
    rate: float
    gradient_norm: float
    loss_gradient_norm: float | None = None
    num_updated: int | None = None


StepFunction = Callable[[Run, Sequence[Batch]], StepReport]
"""One move of the weights by the micro-batches of a step."""


def train_step(run: Run, micro_batches: Sequence[Batch]) -> StepReport:
    """Weigh the tokens of one global batch and move the weights once.

    Every objective is a sum over tokens, divided by one count: the trained tokens of the whole global batch. So it makes
    no difference how the batch is cut into micro-batches or spread over ranks. Raises `NonFiniteError`, on all ranks
    together and before any weight has moved, when the loss or the gradient is not finite.
    """
    step = run.step + 1
    run.weights.tuning.on_step_begin(step)
    # Drawn anew each step from (seed, step, rank): nothing random is ever saved or restored.
    torch.manual_seed(_derive_seed(run.seed, step, run.world.rank))
    counts = torch.zeros(len(run.sources), dtype=torch.int64)
    for batch in micro_batches:
        counts += torch.bincount(
            torch.from_numpy(batch.source_B), torch.from_numpy(batch.label_count_B), len(run.sources)
        ).long()
    counts = run.world.all_reduce(counts.to(run.world.device)).cpu()
    counted = int(counts.sum())

    sums = torch.zeros(len(run.objectives), dtype=torch.float64, device=run.world.device)
    by_source = torch.zeros(len(run.sources), dtype=torch.float64, device=run.world.device)
    for index, batch in enumerate(micro_batches):
        batch = batch.to(run.world.device)
        synchronise_gradients(run.model, index == len(micro_batches) - 1)
        with run.optimizer.update_mask.observe(batch):
            output = run.model(**batch.inputs)
        weighed = combine_losses([run.objectives[i] for i in batch.objectives], output, batch)
        weighed.loss.div(counted).backward()
        run.weights.accumulate_gradients()
        sums[list(batch.objectives)] += weighed.sums_J
        by_source.index_add_(0, torch.from_numpy(batch.source_B).to(weighed.rows_B.device), weighed.rows_B)

    run.world.all_reduce(sums)
    run.world.all_reduce(by_source)
    push = float(run.weights.gradient_norm()) if run.penalties else None
    pulls = {penalty.name: float(penalty()) for penalty in run.penalties}
    norm = run.weights.gradient_norm()
    loss, gradient_norm = float(sums.sum()) / counted, float(norm)
    if run.world.any_rank(not (np.isfinite(loss) and np.isfinite(gradient_norm))):
        run.weights.zero_gradients()
        raise NonFiniteError(
            f"the loss is {loss} and the gradient's norm {gradient_norm} at step {step}; no weight was moved",
            where="training",
            hint="lower schedule.peak, or look at the rows of this step; the same command resumes from the last checkpoint",
        )
    if gradient_norm > run.max_grad_norm:
        run.weights.scale_gradients(run.max_grad_norm / gradient_norm)
    rate = run.schedule(step) * run.lr_scale(loss)
    moved = run.optimizer.step(rate)

    run.step, run.rate = step, rate
    run.trained_tokens += counted
    run.trained_tokens_by_source += counts.numpy()
    return StepReport(
        step=step,
        tokens=counted,
        trained_tokens=run.trained_tokens,
        loss=loss,
        losses={o.name: float(s) / counted for o, s in zip(run.objectives, sums, strict=True)},
        penalties=pulls,
        losses_by_source={
            name: (float(by_source[k]), int(counts[k])) for k, name in enumerate(run.sources) if counts[k]
        },
        rate=rate,
        gradient_norm=gradient_norm,
        loss_gradient_norm=push,
        num_updated=moved,
    )


def _derive_seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)
