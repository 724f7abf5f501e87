"""How do the parts of a stage come together into a run that can step?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from postgrad.config.objectives import AnyObjective, ClassifyObjective, DistillObjective, OnPolicyObjective, names_of
from postgrad.config.quantities import in_steps
from postgrad.config.sparse_updates import MagnitudeUpdate, MomentumUpdate
from postgrad.config.tunings import BlocksTuning, FullTuning, LoraTuning, PTuning, options_of
from postgrad.data.layouts.packed_text import PackedRows
from postgrad.data.layouts.prefix_lm import PrefixRows
from postgrad.data.layouts.rows import Row, Rows
from postgrad.data.loading.batch import collate
from postgrad.data.loading.loader import Loader
from postgrad.data.loading.teacher_cache import Told
from postgrad.distributed import fsdp
from postgrad.distributed.world import World
from postgrad.errors import ResumeError, StageError, TuningError
from postgrad.hardware.execution import Execution, Wishes, choose
from postgrad.lineage.tree import chain
from postgrad.models.model import CausalModel, Model, model_for
from postgrad.models.prefix_lm_attention import mark
from postgrad.models.pretrained import TUNING, Start, Task
from postgrad.objectives.classification_loss import Decisions, Problem
from postgrad.objectives.distillation import Distill, DistillDecisions, DistillTold
from postgrad.objectives.next_token import Tokens
from postgrad.objectives.objective import Objective
from postgrad.objectives.teacher import Teacher
from postgrad.optim.loss_adaptive_lr import LossPaced, Steady
from postgrad.optim.migu import TopOutput
from postgrad.optim.mofo import TopMomentum
from postgrad.optim.optimizer import AdamW, Weights
from postgrad.optim.sparse_update import Everything, Moving
from postgrad.penalties.anchor import AnchoredDecay
from postgrad.penalties.o_lora import Orthogonal
from postgrad.penalties.penalty import Decay, Penalty
from postgrad.plan.model_inputs import virtual
from postgrad.plan.plan import Plan
from postgrad.run.anchors import make_anchor
from postgrad.run.online_teacher import online_teachers, weight_of
from postgrad.training.checkpoint import Checkpoints
from postgrad.training.checkpoint_files import read_moments, read_progress
from postgrad.training.on_policy import Writer, writing_step
from postgrad.training.step import Run, Step, train_step
from postgrad.tuning.attach import attach, read_published
from postgrad.tuning.extra_trainable import bare
from postgrad.tuning.open_model import Opened, open_model
from postgrad.tuning.tuning import Published, Tuning


def make_objectives(
    specs: Sequence[AnyObjective],
    problem: Problem,
    task: Task = "causal",
    *,
    teachers: Mapping[int, Teacher] = MappingProxyType({}),
    steps: int = 1,
    tokens: int = 1,
) -> list[Objective]:
    """Objectives from their descriptions; `problem` is what a classifier of this stage decides.

    `task`: of the model. `teachers`: those that are asked at every step, by the number of their objective. `steps` and
    `tokens`: of the stage, for weights that change over it.
    """

    def objective(number: int, spec: AnyObjective, name: str) -> Objective:
        match spec:
            case ClassifyObjective():
                return Decisions(problem, name, spec.weight)
            case DistillObjective():
                weight = weight_of(spec.weight, steps, tokens)
                if number not in teachers:
                    return DistillTold(weight, spec.temperature, name)
                how = weight, spec.direction, spec.temperature, name
                if task in ("classify", "tag"):
                    return DistillDecisions(problem, teachers[number], *how)
                return Distill(teachers[number], *how)
            case OnPolicyObjective():
                return Distill(teachers[number], weight_of(spec.weight, steps, tokens), "reverse", 1.0, name)
            case _:
                return Tokens(name, spec.weight)

    return [objective(i, spec, name) for i, (spec, name) in enumerate(zip(specs, names_of(specs), strict=True))]


class Counts(NamedTuple):
    """Weights of a model, tied ones counted once, and how many of them move."""

    parameters: int
    trainable: int


@dataclass(frozen=True)
class Subject:
    """What is trained: a model, what its lineage left on it, and the stage's tuning."""

    model: Model
    opened: Opened
    tuning: Tuning
    options: dict[str, Any]
    """Those that the tuning was made with."""
    base_names: dict[str, str]
    """Of each parameter of the start model, by the name that it has under the tuning: the name that it had before."""

    @property
    def attention(self) -> str | None:
        """The attention implementation that a tuning in the model needs, if one does."""
        return next((t.attention for t in (self.tuning, *self.opened.tunings) if t.attention), None)

    def counts(self) -> Counts:
        """Weights in the model, and those that move."""
        sizes = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        return Counts(sum(n for n, _ in sizes), sum(n for n, moves in sizes if moves))


def make_subject(plan: Plan, world: World, *, attention: str | None = None) -> Subject:
    """The start model with the stage's tuning in it, on this rank's device."""
    opened = open_model(plan.start, plan.task, layer=plan.layer, attention=attention)
    spec = plan.stage.tuning
    options = tuning_options(plan, opened)
    mark(opened.model.config, bool(plan.prefixes))
    names = _names(opened.model)
    tuning = attach(opened.model, options, seed=plan.stage.seed, tokenizer=plan.tokenizer)
    base_names = _still(opened.model, names)
    if opened.tunings and (tuning.whole or tuning.leaves_model):
        raise TuningError(
            f"`{spec.kind}` leaves a plain model, and in {plan.start.name} stands `{opened.tunings[-1].kind}`, which cannot "
            "become part of one",
            where="tuning.kind",
            expected="a kind that adds something of its own, such as lora, adapter or prompt",
        )
    if plan.start.made and not (tuning.whole or tuning.leaves_model):
        raise TuningError(
            f"`{spec.kind}` leaves a small folder that sits on its start model, and a new model lies only in the cache",
            where="tuning.kind",
            expected="full, or another kind that leaves a whole model",
            way_out=f"train the new model whole first; `{spec.kind}` can go on from that run",
        )
    model = model_for(opened.model, opened.task).to(world.device)
    return Subject(model, opened, tuning, {**options, "seed": plan.stage.seed}, base_names)


def _names(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by all of their names."""
    return dict(model.named_parameters(remove_duplicate=False))


def _still(model: nn.Module, before: dict[str, nn.Parameter]) -> dict[str, str]:
    """Which parameters of a model are those of `before`: its names for them, and theirs.

    A parameter is known by itself and not by its name: new blocks push the old ones on. A copy that unties two names has
    no other origin than its name.
    """
    known = {id(parameter): name for name, parameter in reversed(list(before.items()))}
    copies = before.keys() - known.values()
    return {
        name: known.get(id(parameter), bare(name))
        for name, parameter in model.named_parameters()
        if id(parameter) in known or bare(name) in copies
    }


def tuning_options(plan: Plan, opened: Opened) -> dict[str, Any]:
    """The keyword arguments of the stage's tuning: lengths in steps, and a new task layer moves besides."""
    spec = plan.stage.tuning
    options = options_of(spec)
    for key in ("template", "demonstrations", "orthogonal"):  # read by whoever makes the rows, or the penalties
        options.pop(key, None)
    if isinstance(spec, PTuning):
        options["length"] = virtual(spec)
    if isinstance(spec, BlocksTuning) and spec.unfreeze_every is not None:
        options["unfreeze_every"] = max(1, round(in_steps(spec.unfreeze_every, plan.steps, plan.tokens)))
    if opened.new and not isinstance(spec, FullTuning):
        options["also"] = [*options.get("also", ()), *opened.new]
    return options


def make_penalties(plan: Plan, subject: Subject, weights: Weights) -> list[Penalty]:
    """What pulls the weights back."""
    named = [
        make_anchor(number, plan, subject.tuning, weights, subject.base_names, subject.opened.new)
        for number in range(len(plan.stage.penalties))
    ]
    return [*_orthogonal(plan, subject, weights), *named]


def _orthogonal(plan: Plan, subject: Subject, weights: Weights) -> list[Penalty]:
    """O-LoRA's penalty, where the tuning asks for it."""
    spec = plan.stage.tuning
    if not isinstance(spec, LoraTuning) or spec.orthogonal is None:
        return []
    from postgrad.tuning.lora import LowRank, earlier_directions

    assert isinstance(subject.tuning, LowRank)
    earlier = earlier_directions(low_rank_before(plan.start))
    new = {name: parameter for name, parameter in subject.tuning.directions().items() if name in earlier}
    if not new:
        raise StageError(
            f"no earlier stage of {plan.start.name} has low-rank adapters on the layers that this one tunes",
            where="tuning.orthogonal",
            expected="a start model whose lineage has a `lora` stage with the same targets",
        )
    masters = {id(w.compute): w.master for w in weights.all}
    return [Orthogonal([masters[id(p)] for p in new.values()], [earlier[name] for name in new], spec.orthogonal)]


def low_rank_before(start: Start) -> list[Published]:
    """The low-rank adapters that the lineage of a start has trained, whether they were merged since or not."""
    folders = [run / "model" for run, _ in (chain(start.run) if start.run else [])]
    here: Start | None = start
    while here is not None:
        folders += [here.folder] if here.folder else []
        here = here.base
    found = {folder.resolve(): read_published(folder) for folder in folders if (folder / TUNING).exists()}
    return [part for part in found.values() if part.options["kind"] == "lora"]


def choose_execution(plan: Plan, subject: Subject, world: World) -> Execution:
    """How this machine will compute the stage."""
    compute, batch = plan.stage.compute, plan.stage.batch
    longest = max((row for rows in plan.rows for row in _some(rows)), key=_length)

    def example(rows: int) -> dict[str, Tensor]:
        return collate([longest] * rows, [0] * rows, pad=plan.reading.pad).inputs

    wishes = Wishes(
        dtype=compute.dtype,
        compile=compute.compile,
        attention=subject.attention or compute.attention,
        activation_checkpointing=compute.activation_checkpointing,
        threads=compute.threads,
        micro=batch.micro,
        sequences=batch.sequences,
        length=_length(longest),
        steps=plan.steps,
        one_length=all(rows.layout in _FILLED for rows in plan.rows),
        causal=not plan.prefixes,
    )
    return choose(wishes, subject.model, example, world.device, world.size)


_FILLED = (PackedRows.layout, PrefixRows.layout)
"""Layouts in which every row is as long as the next."""
_LOOKED_AT = 256
"""Rows of a source that are looked at to see how long its rows are."""


def _some(rows: Rows) -> Iterator[Row]:
    """Rows spread over a source; where all are of one length, one of them."""
    count = 1 if rows.layout in _FILLED else min(len(rows), _LOOKED_AT)
    return (rows.at(i * len(rows) // count, i) for i in range(count))


def _length(row: Row) -> int:
    return len(row.inputs["input_ids"])


def build(plan: Plan, subject: Subject, execution: Execution, world: World) -> Run:
    """The run of a stage at its step 0: model laid out, masters and optimizer made. The model is changed in place."""
    torch.set_num_threads(execution.threads)
    stage, model = plan.stage, subject.model
    teachers = online_teachers(plan, model, subject.tuning, subject.base_names, execution, world)
    if execution.activation_checkpointing:
        fsdp.checkpoint_activations(model)
    if world.sharded:
        fsdp.shard(model, world.size, execution.compute)
    weights = Weights(model, subject.tuning, execution.compute, split=not world.sharded)
    moving = make_moving(plan, subject, weights)
    if execution.compile:
        fsdp.compile_layers(model)
    penalties = make_penalties(plan, subject, weights)
    spec = stage.optimizer
    optimizer = make_optimizer(plan, weights, moving, [p for p in penalties if isinstance(p, AnchoredDecay)])
    if spec.moments != "reset" and not subject.tuning.whole:
        raise StageError(
            f"`{stage.tuning.kind}` begins with weights of its own, for which {plan.start.name} has no moments",
            where="optimizer.moments",
            expected="reset, or tuning: {kind: full}",
        )
    if spec.moments != "reset":
        checkpoint = _moments_of(plan.start)
        keep = ("exp_avg", "exp_avg_sq") if spec.moments == "keep" else ("exp_avg_sq",)
        optimizer.restore(read_moments(checkpoint), read_progress(checkpoint).updates, keep=keep)
        if not optimizer.updates():
            raise ResumeError(
                f"the moments of {plan.start.name} are those of other weights",
                where="optimizer.moments",
                expected="a start model whose stage moved all of its weights",
                way_out="set optimizer.moments: reset",
            )
    return Run(
        model=model,
        weights=weights,
        optimizer=optimizer,
        objectives=make_objectives(
            plan.objectives, plan.problem, plan.task, teachers=teachers, steps=plan.steps, tokens=plan.tokens
        ),
        penalties=penalties,
        schedule=plan.schedule,
        world=world,
        sources=plan.sources,
        clip=spec.clip,
        seed=stage.seed,
        pacing=LossPaced(spec.loss_adaptive.start, spec.loss_adaptive.smoothing) if spec.loss_adaptive else Steady(),
        trained_by_source=np.zeros(len(plan.sources), np.int64),
    )


def make_moving(plan: Plan, subject: Subject, weights: Weights) -> Moving:
    """Which numbers an update moves. Raises `StageError` where that cannot be told."""
    match plan.stage.optimizer.update:
        case None:
            return Everything()
        case MomentumUpdate(share=share):
            return TopMomentum(share, weights.masters)
        case MagnitudeUpdate(share=share):
            if isinstance(plan.stage.tuning, LoraTuning) and plan.stage.tuning.form == "dora":
                raise StageError(
                    "the parts of dora also read what is no text, so their outputs do not say what the text needs",
                    where="optimizer.update",
                    expected="another form of `lora`, or kind: momentum",
                )
            moving = TopOutput(share, subject.model, weights.all)
            if not moving.layers:
                raise StageError(
                    f"`{plan.stage.tuning.kind}` moves no linear layer of the model's blocks",
                    where="optimizer.update",
                    expected="a tuning that moves some, such as full, blocks or lora; or kind: momentum",
                )
            return moving


def make_optimizer(plan: Plan, weights: Weights, moving: Moving, decays: Sequence[Decay] = ()) -> AdamW:
    """The stage's optimizer, without moments yet."""
    spec = plan.stage.optimizer
    return AdamW(
        weights,
        betas=spec.betas,
        eps=spec.eps,
        weight_decay=spec.weight_decay,
        decay_tables=spec.decay_tables,
        decays=decays,
        moving=moving,
    )


def make_step(plan: Plan, run: Run) -> Step:
    """How a step is made: plainly, or on what the model writes itself. Raises `StageError` where it cannot write."""
    asked = {i: o for i, o in enumerate(plan.objectives) if isinstance(o, OnPolicyObjective)}
    if not asked:
        return train_step
    if run.world.sharded:
        raise StageError(
            "a model that is sharded over processes cannot write by itself",
            where="objectives",
            expected="one process for `on-policy`, without torchrun",
        )
    assert isinstance(run.model, CausalModel)
    seed, eos = plan.stage.seed, plan.reading.encoder.eos
    return writing_step({i: Writer(run.model, spec.temperature, eos, seed) for i, spec in asked.items()})


def make_loader(plan: Plan, execution: Execution, world: World, *, told: Sequence[Mapping[str, Told]] = ()) -> Loader:
    """The micro-batches of this rank; `told`: of each source, what teachers said of its rows."""
    return Loader(
        plan.rows,
        plan.mixture,
        micro=execution.micro,
        objectives=plan.weighed,
        pad=plan.reading.pad,
        rank=world.rank,
        ranks=world.size,
        skip=plan.stage.data.skip_steps,
        told=told,
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
