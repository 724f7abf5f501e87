"""How do the parts of a stage come together into a run that can step?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from postgrad.data.loader import Loader
from postgrad.errors import ResumeError
from postgrad.models import sharding
from postgrad.models.model import CausalModel
from postgrad.models.pretrained import Start
from postgrad.objectives.objective import Objective
from postgrad.objectives.tokens import Tokens
from postgrad.planning.execution import Execution, Wishes, choose
from postgrad.stages import stage as s
from postgrad.stages.plan import Plan
from postgrad.training.checkpoint import Checkpoints
from postgrad.training.optimizer import AdamW, Weights
from postgrad.training.state import read_moments, read_progress
from postgrad.training.step import Run
from postgrad.training.world import World


def make_objective(spec: s.AnyObjective) -> Objective:
    """An objective from its description."""
    match spec:
        case s.NextTokenObjective():
            return Tokens(spec.kind, spec.weight)


def choose_execution(plan: Plan, model: PreTrainedModel, world: World) -> Execution:
    """How this machine will compute the stage."""
    compute, batch = plan.stage.compute, plan.stage.batch
    wishes = Wishes(
        dtype=compute.dtype,
        compile=compute.compile,
        attention=compute.attention,
        activation_checkpointing=compute.activation_checkpointing,
        threads=compute.threads,
        micro=batch.micro,
        sequences=batch.sequences,
        length=plan.context,
        steps=plan.steps,
    )
    return choose(wishes, model, world.device, world.size)


def build(plan: Plan, model: CausalModel, execution: Execution, world: World) -> Run:
    """The run of a stage at its step 0: model laid out, masters and optimizer made. The model is changed in place."""
    torch.set_num_threads(execution.threads)
    stage = plan.stage
    if execution.activation_checkpointing:
        sharding.checkpoint_activations(model)
    if world.sharded:
        sharding.shard(model, world.size, execution.compute)
    weights = Weights(model, execution.compute, split=not world.sharded)
    if execution.compile:
        sharding.compile_layers(model)
    spec = stage.optimizer
    optimizer = AdamW(weights, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay)
    if spec.moments != "reset":
        checkpoint = _moments_of(plan.start)
        keep = ("exp_avg", "exp_avg_sq") if spec.moments == "keep" else ("exp_avg_sq",)
        optimizer.restore(read_moments(checkpoint), read_progress(checkpoint).updates, keep=keep)
    return Run(
        model=model,
        weights=weights,
        optimizer=optimizer,
        objectives=[make_objective(o) for o in stage.objectives],
        schedule=plan.schedule,
        world=world,
        sources=plan.sources,
        clip=spec.clip,
        seed=stage.seed,
        trained_by_source=np.zeros(len(plan.sources), np.int64),
    )


def make_loader(plan: Plan, execution: Execution, world: World) -> Loader:
    """The micro-batches of this rank."""
    return Loader(
        plan.rows,
        plan.mixture,
        micro=execution.micro,
        rank=world.rank,
        ranks=world.size,
        skip=plan.stage.data.skip_steps,
    )


def _moments_of(start: Start) -> Path:
    """The checkpoint that holds the start model's moments."""
    if start.folder and (start.folder / "optimizer.safetensors").exists():
        return start.folder
    if start.run:
        newest = Checkpoints(start.run / "checkpoints", None).newest(lambda _: None)
        if newest:
            return newest
    raise ResumeError(
        f"{start.name} has no optimizer moments to keep",
        where="optimizer.moments",
        expected="a start model that is a run folder or a checkpoint",
        way_out="set optimizer.moments: reset",
    )
