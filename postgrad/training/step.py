"""One optimizer step: forward, sum the losses, divide once, backward, penalties, check, clip, update.

Divisors: every objective is a *sum* over tokens. It is divided by one number, the trained tokens of the whole global batch,
which the ranks add up before the first forward pass. FSDP sums gradients over ranks and never averages (see
`distributed.fsdp.shard`), so the division by the number of ranks that data parallelism implies does not occur, and the result
does not depend on how rows are split into micro-batches or ranks.

Collective calls, in the same order on every rank: token counts; gradients, with every micro-batch (kept until the last they
would be those of the whole model); loss sums, sums by source; gradient norm (with penalties) and the penalties' own sums;
gradient norm; the verdict on finiteness; the update mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from postgrad.data.loading.batch import Batch
from postgrad.distributed.world import World
from postgrad.errors import TuningError
from postgrad.models.model import Model
from postgrad.objectives.balancing import BalancingLoss
from postgrad.objectives.objective import Objective, combine_losses
from postgrad.optim.loss_adaptive_lr import ConstantLRScale, LRScale
from postgrad.optim.lr_schedules import Schedule
from postgrad.optim.optimizer import Optimizer, Weights
from postgrad.penalties.penalty import Penalty


@dataclass
class Run:
    """State and parts of a training."""

    model: Model
    weights: Weights
    optimizer: Optimizer
    objectives: Sequence[Objective]
    penalties: Sequence[Penalty]
    schedule: Schedule
    world: World
    sources: Sequence[str]
    max_grad_norm: float
    seed: int
    balancing: BalancingLoss | None = None
    """Of the routers of a mixture of experts."""
    lr_scale: LRScale = field(default_factory=ConstantLRScale)
    """Factor on the scheduled learning rate, given the step's loss."""
    max_skipped_steps: int = 0
    """Steps that `training.loop` may skip, because their loss or gradient is not finite."""
    step: int = 0
    skipped_steps: int = 0
    trained_tokens: int = 0
    rate: float = 0.0
    """The learning rate of the last step."""
    trained_tokens_by_source: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


@dataclass(frozen=True)
class StepReport:
    """Results of a step. Losses are means in nats per trained token; `gradient_norm` is that before clipping.

    `tokens`: trained tokens of this step; `trained_tokens`: of all steps. `losses_by_source`: sum in nats and token count of
    each source. `loss_gradient_norm`: without the penalties' gradient, if there are penalties. `num_updated`: weights that a
    sparse update changed. `balancing_loss`: of experts, times its coefficient; not part of `loss`. `positions`, `padding`: of
    this rank's unpacked rows, and those of them that only fill a row. `sampled_prompts`, `accepted_answers`: of on-policy
    replay.
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
    balancing_loss: float | None = None
    positions: int | None = None
    padding: int | None = None
    sampled_prompts: int | None = None
    accepted_answers: int | None = None


@dataclass(frozen=True)
class StepWithoutUpdate:
    """A step whose loss or gradient norm was not finite: weights, moments and counts of trained tokens are unchanged.

    `tokens`: labels of its rows. `positions`: mixture positions of the rows whose own loss was not finite, on any rank.
    """

    step: int
    tokens: int
    trained_tokens: int
    loss: float
    gradient_norm: float
    positions: tuple[int, ...]


StepFunction = Callable[[Run, Sequence[Batch]], StepReport | StepWithoutUpdate]
"""Takes one step with the micro-batches of a global batch."""


class LossSums(NamedTuple):
    """Losses of a global batch, in nats, summed over its tokens on this rank.

    `all_sums`: of each objective, and last the balancing loss of experts, which is no objective. `by_source`: of each source.
    `row_losses`: of the rows of each micro-batch.
    """

    all_sums: Tensor
    by_source: Tensor
    row_losses: list[Tensor]

    def reduce(self, world: World) -> LossSums:
        """Sum over ranks, in place. Collective."""
        world.all_reduce(self.all_sums)
        world.all_reduce(self.by_source)
        return self

    def mean(self, token_count: int) -> float:
        """The loss of all objectives, in nats per trained token."""
        return float(self.all_sums[:-1].sum()) / token_count


GradientFunction = Callable[[Run, Sequence[Batch], int], LossSums]
"""Leaves the gradient of a global batch of so many trained tokens in the masters, and returns the losses."""


def _backward(loss: Tensor, _: LossSums) -> None:
    loss.backward()


def compute_gradients(
    run: Run,
    micro_batches: Sequence[Batch],
    token_count: int,
    backward: Callable[[Tensor, LossSums], None] = _backward,
) -> LossSums:
    """The gradient at the weights, with the same random numbers whenever it is computed for a step.

    `backward` is called with the loss of each micro-batch, and with the sums up to it.
    """
    # Seeded per (seed, step, rank): no random state is saved or restored.
    torch.manual_seed(_derive_seed(run.seed, run.step + 1, run.world.rank))
    # The last sum is the balancing loss of experts, which is no objective.
    all_sums = torch.zeros(len(run.objectives) + 1, dtype=torch.float64, device=run.world.device)
    sums, balancing = all_sums[:-1], all_sums[-1]
    by_source = torch.zeros(len(run.sources), dtype=torch.float64, device=run.world.device)
    losses = LossSums(all_sums, by_source, [])
    for batch in micro_batches:
        batch = batch.to(run.world.device)
        with run.optimizer.update_mask.observe(batch):
            output = run.model(**batch.model_inputs)
        combined = combine_losses([run.objectives[i] for i in batch.objectives], output, batch)
        term = run.balancing(output, batch) if run.balancing else torch.zeros_like(combined.loss)
        loss_and_term = combined.loss + term
        if not loss_and_term.requires_grad:
            raise TuningError(
                f"no gradient reaches the weights that `{run.weights.tuning.kind}` trains in this architecture",
                where="tuning.kind",
                expected="full, or a tuning that this model's backward pass supports",
            )
        balancing += term.detach()
        sums[list(batch.objectives)] += combined.sums_J
        by_source.index_add_(0, torch.from_numpy(batch.source_B).to(combined.rows_B.device), combined.rows_B)
        losses.row_losses.append(combined.rows_B)
        backward(loss_and_term.div(token_count), losses)
        run.weights.accumulate_gradients()
    return losses


def train_step(
    run: Run, micro_batches: Sequence[Batch], compute: GradientFunction = compute_gradients
) -> StepReport | StepWithoutUpdate:
    """Train on one global batch.

    When the loss or the gradient norm is not finite on any rank, all ranks leave their weights as they are.
    """
    counts = begin_step(run, micro_batches)
    losses = compute(run, micro_batches, int(counts.sum())).reduce(run.world)
    loss_gradient_norm = float(run.weights.gradient_norm()) if run.penalties else None
    penalties = {penalty.name: float(penalty()) for penalty in run.penalties}
    loss, gradient_norm = losses.mean(int(counts.sum())), float(run.weights.gradient_norm())
    if run.world.any_rank(not (np.isfinite(loss) and np.isfinite(gradient_norm))):
        return skip_step(run, micro_batches, counts, losses, gradient_norm)
    if gradient_norm > run.max_grad_norm:
        run.weights.scale_gradients(run.max_grad_norm / gradient_norm)
    rate = run.schedule(run.step + 1) * run.lr_scale(loss)
    num_updated = run.optimizer.step(rate)
    report = end_step(run, micro_batches, counts, losses, rate, gradient_norm)
    return replace(report, penalties=penalties, loss_gradient_norm=loss_gradient_norm, num_updated=num_updated)


def begin_step(run: Run, micro_batches: Sequence[Batch]) -> Tensor:
    """Begin the next step; trained tokens of each source in its global batch. Collective."""
    run.weights.tuning.on_step_begin(run.step + 1)
    return _count_tokens(run, micro_batches)


def skip_step(
    run: Run, micro_batches: Sequence[Batch], counts: Tensor, losses: LossSums, gradient_norm: float
) -> StepWithoutUpdate:
    """Count a step that changes no weight, and name its rows whose loss is not finite. Collective."""
    positions = _positions_not_finite(run.world, zip(micro_batches, losses.row_losses, strict=True))
    run.optimizer.skip()
    run.step, run.skipped_steps = run.step + 1, run.skipped_steps + 1
    token_count = int(counts.sum())
    return StepWithoutUpdate(
        run.step, token_count, run.trained_tokens, losses.mean(token_count), gradient_norm, positions
    )


def end_step(
    run: Run, micro_batches: Sequence[Batch], counts: Tensor, losses: LossSums, rate: float, gradient_norm: float
) -> StepReport:
    """Count a step that has updated the weights at `rate`, and report it; `losses`: of all ranks."""
    token_count = int(counts.sum())
    run.step, run.rate = run.step + 1, rate
    run.trained_tokens += token_count
    run.trained_tokens_by_source += counts.numpy()
    sums, balancing = losses.all_sums[:-1], losses.all_sums[-1]
    return StepReport(
        step=run.step,
        tokens=token_count,
        trained_tokens=run.trained_tokens,
        loss=losses.mean(token_count),
        losses={o.name: float(s) / token_count for o, s in zip(run.objectives, sums, strict=True)},
        penalties={},
        losses_by_source={
            name: (float(losses.by_source[k]), int(counts[k])) for k, name in enumerate(run.sources) if counts[k]
        },
        rate=rate,
        gradient_norm=gradient_norm,
        balancing_loss=float(balancing) / token_count if run.balancing else None,
        **_count_padding(micro_batches),
    )


def _count_padding(micro_batches: Sequence[Batch]) -> dict[str, int]:
    """Positions and padding of unpacked rows; empty without any."""
    unpacked = [(batch.labels.numel(), batch.padding) for batch in micro_batches if batch.padding is not None]
    return {"positions": sum(n for n, _ in unpacked), "padding": sum(p for _, p in unpacked)} if unpacked else {}


def _count_tokens(run: Run, micro_batches: Sequence[Batch]) -> torch.Tensor:
    """Trained tokens of each source in the global batch. Collective."""
    counts = torch.zeros(len(run.sources), dtype=torch.int64)
    for batch in micro_batches:
        sources, labels = torch.from_numpy(batch.source_B), torch.from_numpy(batch.label_count_B)
        counts += torch.bincount(sources, labels, len(run.sources)).long()
    return run.world.all_reduce(counts.to(run.world.device)).cpu()


def _positions_not_finite(world: World, losses: Iterable[tuple[Batch, Tensor]]) -> tuple[int, ...]:
    """Mixture positions of the rows whose loss is not finite, of all ranks. Collective."""
    own = [
        batch.position_B[~rows_B.isfinite().cpu().numpy() & (batch.label_count_B > 0)].tolist()
        for batch, rows_B in losses
    ]
    gathered: Any = world.all_gather([position for positions in own for position in positions])
    return tuple(sorted({position for positions in gathered for position in positions}))


def _derive_seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)
