"""How do the parts of a stage come together into a run that can step?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from postgrad.config.objectives import (
    OnPolicyObjective,
)
from postgrad.config.tunings import FullTuning, LoraTuning
from postgrad.data.layouts.packed_text import PackedRows
from postgrad.data.layouts.prefix_lm import PrefixRows
from postgrad.data.layouts.rows import Row, Rows
from postgrad.data.loading.batch import collate
from postgrad.data.loading.loader import Loader
from postgrad.data.loading.teacher_cache import TeacherCache
from postgrad.distributed import fsdp
from postgrad.distributed.world import World
from postgrad.errors import ResumeError, StageError, TuningError
from postgrad.hardware.execution import Execution, ExecutionRequest, select_execution
from postgrad.lineage.tree import read_lineage
from postgrad.models.model import CausalModel, Model, wrap_model
from postgrad.models.prefix_lm_attention import mark_prefix_lm
from postgrad.models.pretrained import TUNING_FILE, ModelLocation
from postgrad.optim.loss_adaptive_lr import ConstantLRScale, LossAdaptiveLRScale
from postgrad.optim.optimizer import AdamW, Weights
from postgrad.optim.sparse_update import UpdateMask
from postgrad.penalties.o_lora import OrthogonalityPenalty
from postgrad.penalties.penalty import DecoupledPenalty, Penalty
from postgrad.plan.plan import Plan
from postgrad.run.losses import make_objectives
from postgrad.run.online_teacher import make_online_teachers
from postgrad.run.update_masks import make_update_mask
from postgrad.training.checkpoint import Checkpoints
from postgrad.training.checkpoint_files import read_moments, read_progress
from postgrad.training.on_policy import OnPolicySampler, make_on_policy_step
from postgrad.training.step import Run, StepFunction, train_step
from postgrad.tuning.attach import attach
from postgrad.tuning.extra_trainable import base_parameter_name
from postgrad.tuning.folder import read_export
from postgrad.tuning.open_model import LoadedModel, open_model
from postgrad.tuning.tuning import Tuning, TuningExport


class ParameterCounts(NamedTuple):
    """Weights of a model, tied ones counted once, and how many of them move."""

    parameters: int
    trainable: int


class PenaltyContext(NamedTuple):
    """What a penalty is made from: its number in the stage, the plan, the tuned model and the trained weights."""

    number: int
    plan: Plan
    tuned_model: TunedModel
    weights: Weights


@dataclass(frozen=True)
class TunedModel:
    """What is trained: a model, what its lineage left on it, and the stage's tuning."""

    model: Model
    loaded_model: LoadedModel
    tuning: Tuning
    options: dict[str, Any]
    """Those that the tuning was made with."""
    base_names: dict[str, str]
    """Of each parameter of the start model, by the name that it has under the tuning: the name that it had before."""

    @property
    def attention(self) -> str | None:
        """The attention implementation that a tuning in the model needs, if one does."""
        return next((t.attention for t in (self.tuning, *self.loaded_model.tunings) if t.attention), None)

    def counts(self) -> ParameterCounts:
        """Weights in the model, and those that move."""
        sizes = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        return ParameterCounts(sum(n for n, _ in sizes), sum(n for n, moves in sizes if moves))


def make_tuned_model(plan: Plan, world: World, *, attention: str | None = None) -> TunedModel:
    """The start model with the stage's tuning in it, on this rank's device."""
    opened = open_model(plan.model.start, plan.model.task, layer=plan.model.task_layer, attention=attention)
    spec = plan.stage.tuning
    options = tuning_options(plan, opened)
    mark_prefix_lm(opened.model.config, bool(plan.prefix_length))
    names = _named_parameters(opened.model)
    tuning = attach(opened.model, options, seed=plan.stage.seed, tokenizer=plan.model.tokenizer)
    base_names = _match_base_names(opened.model, names)
    if opened.tunings and (tuning.is_full or tuning.is_merged_on_export):
        raise TuningError(
            f"`{spec.kind}` leaves a plain model, and in {plan.model.start.name} stands `{opened.tunings[-1].kind}`, which cannot "
            "become part of one",
            where="tuning.kind",
            expected="a kind that adds something of its own, such as lora, adapter or prompt",
        )
    if plan.model.start.scratch_recipe and not (tuning.is_full or tuning.is_merged_on_export):
        raise TuningError(
            f"`{spec.kind}` leaves a small folder that sits on its start model, and a new model lies only in the cache",
            where="tuning.kind",
            expected="full, or another kind that leaves a whole model",
            hint=f"train the new model whole first; `{spec.kind}` can go on from that run",
        )
    model = wrap_model(opened.model, opened.task).to(world.device)
    return TunedModel(model, opened, tuning, {**options, "seed": plan.stage.seed}, base_names)


def _named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by all of their names."""
    return dict(model.named_parameters(remove_duplicate=False))


def _match_base_names(model: nn.Module, before: dict[str, nn.Parameter]) -> dict[str, str]:
    """Which parameters of a model are those of `before`: its names for them, and theirs.

    A parameter is known by itself and not by its name: new blocks push the old ones on. A copy that unties two names has
    no other origin than its name.
    """
    known = {id(parameter): name for name, parameter in reversed(list(before.items()))}
    copies = before.keys() - known.values()
    return {
        name: known.get(id(parameter), base_parameter_name(name))
        for name, parameter in model.named_parameters()
        if id(parameter) in known or base_parameter_name(name) in copies
    }


def tuning_options(plan: Plan, loaded_model: LoadedModel) -> dict[str, Any]:
    """The keyword arguments of the stage's tuning: lengths in steps, and new task layers are trained too."""
    spec = plan.stage.tuning
    options = spec.options(plan.steps, plan.tokens)
    if loaded_model.new_weights and not isinstance(spec, FullTuning):
        options["also_train"] = [*options.get("also_train", ()), *loaded_model.new_weights]
    return options


def make_penalties(plan: Plan, tuned_model: TunedModel, weights: Weights) -> list[Penalty]:
    """The penalties of the stage's tuning and those that the stage names."""
    stage_penalties = [
        spec.load()(spec, PenaltyContext(number, plan, tuned_model, weights))
        for number, spec in enumerate(plan.stage.penalties)
    ]
    return [*_make_o_lora_penalty(plan, tuned_model, weights), *stage_penalties]


def _make_o_lora_penalty(plan: Plan, tuned_model: TunedModel, weights: Weights) -> list[Penalty]:
    """O-LoRA's penalty, where the tuning asks for it."""
    spec = plan.stage.tuning
    if not isinstance(spec, LoraTuning) or spec.orthogonal is None:
        return []
    from postgrad.tuning.lora import LoraAdapter, earlier_directions

    assert isinstance(tuned_model.tuning, LoraAdapter)
    earlier = earlier_directions(earlier_lora_adapters(plan.model.start))
    new = {name: parameter for name, parameter in tuned_model.tuning.directions().items() if name in earlier}
    if not new:
        raise StageError(
            f"no earlier stage of {plan.model.start.name} has low-rank adapters on the layers that this one tunes",
            where="tuning.orthogonal",
            expected="a start model whose lineage has a `lora` stage with the same targets",
        )
    masters = {id(w.parameter): w.master for w in weights.entries}
    return [
        OrthogonalityPenalty([masters[id(p)] for p in new.values()], [earlier[name] for name in new], spec.orthogonal)
    ]


def earlier_lora_adapters(start: ModelLocation) -> list[TuningExport]:
    """The low-rank adapters that the lineage of a start has trained, whether they were merged since or not."""
    folders = [run / "model" for run, _ in (read_lineage(start.run) if start.run else [])]
    here: ModelLocation | None = start
    while here is not None:
        folders += [here.folder] if here.folder else []
        here = here.base
    found = {folder.resolve(): read_export(folder) for folder in folders if (folder / TUNING_FILE).exists()}
    return [part for part in found.values() if part.options["kind"] == "lora"]


def choose_execution(plan: Plan, tuned_model: TunedModel, world: World) -> Execution:
    """How this machine will compute the stage."""
    compute, batch = plan.stage.compute, plan.stage.batch
    longest = max((row for rows in plan.data.rows for row in _sample_rows(rows)), key=_row_length)

    def example(rows: int) -> dict[str, Tensor]:
        return collate([longest] * rows, [0] * rows, pad_token_id=plan.model.inputs.pad_id).inputs

    wishes = ExecutionRequest(
        dtype=compute.dtype,
        compile=compute.compile,
        attention=tuned_model.attention or compute.attention,
        activation_checkpointing=compute.activation_checkpointing,
        threads=compute.threads,
        micro=batch.micro_batch_size,
        sequences=batch.global_batch_size,
        length=_row_length(longest),
        steps=plan.steps,
        is_fixed_length=all(rows.layout in _FIXED_LENGTH_LAYOUTS for rows in plan.data.rows),
        is_causal=not plan.prefix_length,
    )
    return select_execution(wishes, tuned_model.model, example, world.device, world.size)


_FIXED_LENGTH_LAYOUTS = (PackedRows.layout, PrefixRows.layout)
"""Layouts in which every row is as long as the next."""
_MAX_ROWS_SAMPLED = 256
"""Rows of a source that are looked at to see how long its rows are."""


def _sample_rows(rows: Rows) -> Iterator[Row]:
    """Rows spread over a source; where all are of one length, one of them."""
    count = 1 if rows.layout in _FIXED_LENGTH_LAYOUTS else min(len(rows), _MAX_ROWS_SAMPLED)
    return (rows.get_row(i * len(rows) // count, i) for i in range(count))


def _row_length(row: Row) -> int:
    return len(row.inputs["input_ids"])


def build_run(plan: Plan, tuned_model: TunedModel, execution: Execution, world: World) -> Run:
    """The run of a stage at its step 0: model laid out, masters and optimizer made. The model is changed in place."""
    torch.set_num_threads(execution.threads)
    stage, model = plan.stage, tuned_model.model
    teachers = make_online_teachers(plan, model, tuned_model.tuning, tuned_model.base_names, execution, world)
    if execution.activation_checkpointing:
        fsdp.checkpoint_activations(model)
    if world.is_distributed:
        fsdp.shard(model, world.size, execution.compute)
    weights = Weights(model, tuned_model.tuning, execution.compute, master_copies=not world.is_distributed)
    moving = make_update_mask(plan, tuned_model, weights)
    if execution.compile:
        fsdp.compile_layers(model)
    penalties = make_penalties(plan, tuned_model, weights)
    spec = stage.optimizer
    optimizer = make_optimizer(plan, weights, moving, [p for p in penalties if isinstance(p, DecoupledPenalty)])
    if spec.moments != "reset" and not tuned_model.tuning.is_full:
        raise StageError(
            f"`{stage.tuning.kind}` begins with weights of its own, for which {plan.model.start.name} has no moments",
            where="optimizer.moments",
            expected="reset, or tuning: {kind: full}",
        )
    if spec.moments != "reset":
        checkpoint = _find_moments(plan.model.start)
        keep = ("exp_avg", "exp_avg_sq") if spec.moments == "keep" else ("exp_avg_sq",)
        optimizer.restore(read_moments(checkpoint), read_progress(checkpoint).updates, keep=keep)
        if not optimizer.update_counts():
            raise ResumeError(
                f"the moments of {plan.model.start.name} are those of other weights",
                where="optimizer.moments",
                expected="a start model whose stage moved all of its weights",
                hint="set optimizer.moments: reset",
            )
    return Run(
        model=model,
        weights=weights,
        optimizer=optimizer,
        objectives=make_objectives(
            plan.objectives,
            plan.model.problem,
            plan.model.task,
            teachers=teachers,
            steps=plan.steps,
            tokens=plan.tokens,
        ),
        penalties=penalties,
        schedule=plan.schedule,
        world=world,
        sources=plan.data.source_names,
        max_grad_norm=spec.max_grad_norm,
        seed=stage.seed,
        lr_scale=LossAdaptiveLRScale(spec.loss_adaptive.initial_share, spec.loss_adaptive.smoothing)
        if spec.loss_adaptive
        else ConstantLRScale(),
        trained_tokens_by_source=np.zeros(len(plan.data.source_names), np.int64),
    )


def make_optimizer(
    plan: Plan, weights: Weights, update_mask: UpdateMask, decays: Sequence[DecoupledPenalty] = ()
) -> AdamW:
    """The stage's optimizer, without moments yet."""
    spec = plan.stage.optimizer
    return AdamW(
        weights,
        betas=spec.betas,
        eps=spec.eps,
        weight_decay=spec.weight_decay,
        decay_tables=spec.decay_embeddings,
        decoupled_penalties=decays,
        update_mask=update_mask,
    )


def make_step(plan: Plan, run: Run) -> StepFunction:
    """How a step is made: plainly, or on what the model writes itself. Raises `StageError` where it cannot write."""
    asked = {i: o for i, o in enumerate(plan.objectives) if isinstance(o, OnPolicyObjective)}
    if not asked:
        return train_step
    if run.world.is_distributed:
        raise StageError(
            "a model that is sharded over processes cannot write by itself",
            where="objectives",
            expected="one process for `on-policy`, without torchrun",
        )
    assert isinstance(run.model, CausalModel)
    seed, eos = plan.stage.seed, plan.model.inputs.encoder.eos
    return make_on_policy_step(
        {i: OnPolicySampler(run.model, spec.temperature, eos, seed) for i, spec in asked.items()}
    )


def make_loader(
    plan: Plan, execution: Execution, world: World, *, teacher_caches: Sequence[Mapping[str, TeacherCache]] = ()
) -> Loader:
    """The micro-batches of this rank; `told`: of each source, what teachers said of its rows."""
    return Loader(
        plan.data.rows,
        plan.data.mixture,
        micro_batch_size=execution.micro,
        objectives=plan.objective_indices,
        pad_token_id=plan.model.inputs.pad_id,
        rank=world.rank,
        world_size=world.size,
        skip_steps=plan.stage.data.skip_steps,
        teacher_caches=teacher_caches,
    )


def _find_moments(start: ModelLocation) -> Path:
    """The checkpoint that holds the start model's moments."""
    if start.folder and (start.folder / "optimizer.safetensors").exists():
        return start.folder
    if start.run:
        newest = Checkpoints(start.run / "checkpoints", None).find_newest(lambda _: None)
        if newest:
            return newest
    raise ResumeError(
        f"{start.name} has no optimizer moments to keep",
        where="optimizer.moments",
        expected="a start model that is a run folder or a checkpoint",
        hint="set optimizer.moments: reset",
    )
