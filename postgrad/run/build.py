"""Building a run from a plan: objectives, penalties, optimizer, execution, loader."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from postgrad.config.objectives import GeneratingObjective, OnPolicyObjective
from postgrad.config.tunings import LoraTuning
from postgrad.data.filter.near_duplicates import repetition_share
from postgrad.data.layouts.rows import Row, Rows
from postgrad.data.loading.batch import collate
from postgrad.data.loading.loader import Loader
from postgrad.data.loading.teacher_cache import TeacherCache
from postgrad.data.loading.unpacked_rows import PACKED_LAYOUTS
from postgrad.distributed import fsdp
from postgrad.distributed.world import InputFile, World
from postgrad.errors import ResumeError, StageError
from postgrad.evaluation.continuations import decode_ids
from postgrad.evaluation.generation_metrics import exact_match, token_f1
from postgrad.hardware.execution import Execution, ExecutionRequest, select_execution
from postgrad.hardware.memory import StateDtypes
from postgrad.lineage.tree import read_lineage
from postgrad.models.location import TUNING_FILE, ModelLocation
from postgrad.models.model import CausalModel
from postgrad.models.sampling import count_token_ids
from postgrad.optim.loss_adaptive_lr import ConstantLRScale, LossAdaptiveLRScale
from postgrad.optim.optimizer import AdamW, Muon, Optimizer, Weights
from postgrad.optim.sparse_update import UpdateMask
from postgrad.penalties.o_lora import OrthogonalityPenalty
from postgrad.penalties.penalty import DecoupledPenalty, Penalty
from postgrad.plan.plan import Plan
from postgrad.run.losses import make_objectives
from postgrad.run.online_teacher import make_online_teachers
from postgrad.run.tuned_model import TunedModel
from postgrad.run.update_masks import make_update_mask
from postgrad.storage.fingerprint import file_fingerprint
from postgrad.training.checkpoint_state import STATE, has_moments, read_moments, read_progress
from postgrad.training.checkpoints import Checkpoints
from postgrad.training.on_policy import AnswerFilter, OnPolicySampler, make_on_policy_step
from postgrad.training.sharpness_aware import SharpnessAwareGradients
from postgrad.training.step import Run, StepFunction, train_step
from postgrad.training.step_in_backward import train_step_releasing
from postgrad.tuning.adapter_folder import read_export
from postgrad.tuning.tuning import TuningExport


class PenaltyContext(NamedTuple):
    """What a penalty is made from: its number in the stage, the plan, the tuned model and the trained weights."""

    number: int
    plan: Plan
    tuned_model: TunedModel
    weights: Weights


def make_penalties(plan: Plan, tuned_model: TunedModel, weights: Weights) -> list[Penalty]:
    """The penalties of the stage's tuning and those that the stage names."""
    stage_penalties = [
        spec.load()(spec, PenaltyContext(number, plan, tuned_model, weights))
        for number, spec in enumerate(plan.stage.penalties)
    ]
    return [*_make_o_lora_penalty(plan, tuned_model, weights), *stage_penalties]


def _make_o_lora_penalty(plan: Plan, tuned_model: TunedModel, weights: Weights) -> list[Penalty]:
    """O-LoRA's penalty, with `tuning.orthogonal`."""
    spec = plan.stage.tuning
    if not isinstance(spec, LoraTuning) or spec.orthogonal is None:
        return []
    from postgrad.tuning.lora import LoraAdapter, earlier_directions

    assert isinstance(tuned_model.tuning, LoraAdapter)
    earlier = earlier_directions(earlier_lora_adapters(plan.model.start))
    new = {name: parameter for name, parameter in tuned_model.tuning.directions().items() if name in earlier}
    if not new:
        raise StageError(
            f"no earlier stage of {plan.model.start.name} has LoRA adapters on the layers that this one tunes",
            where="tuning.orthogonal",
            expected="a start model whose lineage has a `lora` stage with the same targets",
        )
    masters = {id(w.parameter): w.master for w in weights.entries}
    return [
        OrthogonalityPenalty([masters[id(p)] for p in new.values()], [earlier[name] for name in new], spec.orthogonal)
    ]


def earlier_lora_adapters(start: ModelLocation) -> list[TuningExport]:
    """The LoRA adapters that the lineage of a start model has trained, whether merged or not."""
    folders = [run / "model" for run, _ in (read_lineage(start.run) if start.run else [])]
    location: ModelLocation | None = start
    while location is not None:
        folders += [location.folder] if location.folder else []
        location = location.base
    exports = {folder.resolve(): read_export(folder) for folder in folders if (folder / TUNING_FILE).exists()}
    return [export for export in exports.values() if export.options["kind"] == "lora"]


def longest_row(plan: Plan) -> Row:
    """The longest row of a sample of all sources."""
    return max((row for rows in plan.data.rows for row in _sample_rows(rows)), key=_row_length)


def state_dtypes(plan: Plan) -> StateDtypes:
    """How the stage's optimizer holds its state."""
    spec = plan.stage.optimizer
    return StateDtypes(spec.moment_dtype, spec.master_dtype, spec.release_gradients)


def micro_batch_size(plan: Plan, world: World) -> int | None:
    """The rows of a micro-batch that the stage fixes; None: any number.

    Raises `StageError` where gradients are released and a rank would have several micro-batches in a step.
    """
    rows = plan.stage.batch.micro_batch_size
    if not plan.stage.optimizer.release_gradients:
        return rows
    rank_rows = plan.data.mixture.block_size // world.size
    if rows not in (None, rank_rows):
        raise StageError(
            f"the {rank_rows} rows of a step make several micro-batches of {rows}, whose gradients are added before the update",
            where="batch.micro_batch_size",
            expected=f"{rank_rows}, or none, with optimizer.release_gradients",
            hint="activation_checkpointing: true makes room for more rows; or lower batch.global_batch_size",
        )
    return rank_rows


def choose_execution(plan: Plan, tuned_model: TunedModel, world: World) -> Execution:
    """Choose how this machine computes the stage."""
    compute, batch = plan.stage.compute, plan.stage.batch
    longest = longest_row(plan)

    def make_inputs(rows: int) -> dict[str, Tensor]:
        return collate([longest] * rows, [0] * rows, pad_token_id=plan.model.inputs.pad_id).inputs

    request = ExecutionRequest(
        dtype=compute.dtype,
        compile=compute.compile,
        attention=tuned_model.attention or compute.attention,
        activation_checkpointing=compute.activation_checkpointing,
        threads=compute.threads,
        micro=micro_batch_size(plan, world),
        sequences=batch.global_batch_size,
        length=_row_length(longest),
        steps=plan.steps,
        is_fixed_length=all(rows.layout in PACKED_LAYOUTS for rows in plan.data.rows),
        is_causal=not plan.prefix_length,
        packing=plan.stage.data.packing,
        state=state_dtypes(plan),
    )
    return select_execution(
        request,
        tuned_model.model,
        make_inputs,
        world.device,
        world.size,
        lambda s: max(map(float, world.all_gather(s))),  # type: ignore[arg-type]
    )


_MAX_ROWS_SAMPLED = 256
"""Rows of a source examined for the longest one."""


def _sample_rows(rows: Rows) -> Iterator[Row]:
    """Rows spread evenly over a source; one row of a layout with fixed length."""
    count = 1 if rows.layout in PACKED_LAYOUTS else min(len(rows), _MAX_ROWS_SAMPLED)
    return (rows.get_row(i * len(rows) // count, i) for i in range(count))


def _row_length(row: Row) -> int:
    return len(row.inputs["input_ids"])


def build_run(plan: Plan, tuned_model: TunedModel, execution: Execution, world: World) -> Run:
    """The run of a stage at step 0, whose model is sharded already where there is a process group. Compiles it in place.

    The order matters: the hooks of MIGU must be in place before compilation.
    """
    torch.set_num_threads(execution.threads)
    stage, model = plan.stage, tuned_model.model
    teachers = make_online_teachers(plan, model, tuned_model.tuning, tuned_model.base_names, execution, world)
    if execution.activation_checkpointing:
        fsdp.checkpoint_activations(model)
    if world.is_distributed and stage.optimizer.kind == "muon":
        raise StageError(
            "Muon needs whole matrices, and several processes hold parts of them",
            where="optimizer.kind",
            expected="adamw, or one process, without torchrun",
        )
    if world.is_distributed and stage.optimizer.master_dtype:
        raise StageError(
            "several processes hold their parts of the weights in fp32",
            where="optimizer.master_dtype",
            expected="one process, without torchrun",
            hint="leave it out: the parts of several processes are smaller",
        )
    fsdp.reshard(model)  # masters are the shards
    weights = Weights(
        model,
        tuned_model.tuning,
        execution.compute,
        master_copies=not world.is_distributed,
        master_dtype=torch.bfloat16 if stage.optimizer.master_dtype else torch.float32,
    )
    update_mask = make_update_mask(plan, tuned_model, weights)
    if execution.compile:
        fsdp.compile_layers(model)
    penalties = make_penalties(plan, tuned_model, weights)
    spec = stage.optimizer
    optimizer = make_optimizer(plan, weights, update_mask, [p for p in penalties if isinstance(p, DecoupledPenalty)])
    if spec.moments != "reset" and not tuned_model.tuning.is_full:
        raise StageError(
            f"`{stage.tuning.kind}` trains new weights, for which {plan.model.start.name} has no moments",
            where="optimizer.moments",
            expected="reset, or tuning: {kind: full}",
        )
    if spec.moments != "reset":
        checkpoint = world.from_first(lambda: _find_moments(plan.model.start))
        world.require_same(lambda: {"moments": InputFile(str(checkpoint), file_fingerprint(checkpoint / STATE))})
        keep = None if spec.moments == "keep" else ("exp_avg_sq",)
        optimizer.restore(read_moments(checkpoint), read_progress(checkpoint).updates, keep=keep)
        if not optimizer.update_counts():
            raise ResumeError(
                f"the moments of {plan.model.start.name} belong to other weights",
                where="optimizer.moments",
                expected="a start model whose stage trained all weights",
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
        balancing=tuned_model.balancing,
        schedule=plan.schedule,
        world=world,
        sources=plan.data.source_names,
        max_grad_norm=math.inf if spec.max_grad_norm is None else spec.max_grad_norm,
        # A stage of which most is skipped has not been trained, however short it is.
        max_skipped_steps=min(spec.max_skipped_steps, plan.steps // 2),
        seed=stage.seed,
        lr_scale=LossAdaptiveLRScale(spec.loss_adaptive.initial_share, spec.loss_adaptive.smoothing)
        if spec.loss_adaptive
        else ConstantLRScale(),
        trained_tokens_by_source=np.zeros(len(plan.data.source_names), np.int64),
    )


def make_optimizer(
    plan: Plan, weights: Weights, update_mask: UpdateMask, decays: Sequence[DecoupledPenalty] = ()
) -> Optimizer:
    """The stage's optimizer, without moments."""
    spec = plan.stage.optimizer
    make = (
        partial(AdamW, moment_dtype=spec.moment_dtype or "float32", seed=plan.stage.seed)
        if spec.kind == "adamw"
        else partial(Muon, momentum=spec.momentum)
    )
    return make(
        weights,
        betas=spec.betas,
        eps=spec.eps,
        weight_decay=spec.weight_decay,
        decay_tables=spec.decay_embeddings,
        decoupled_penalties=decays,
        update_mask=update_mask,
    )


def make_step(plan: Plan, run: Run) -> StepFunction:
    """The step function: plain, releasing its gradients, sharpness-aware, or on-policy.

    Raises `StageError` for on-policy with a sharded model, and for sharpness-aware steps in bf16.
    """
    step: StepFunction = train_step_releasing if plan.stage.optimizer.release_gradients else train_step
    spec = plan.stage.optimizer.sharpness_aware
    if spec is not None and plan.sharpness_start is not None:
        if run.weights.compute_dtype != torch.float32:
            raise StageError(
                f"a step uphill of {spec.radius:g} is lost in the rounding of {str(run.weights.compute_dtype)[6:]} weights",
                where="optimizer.sharpness_aware",
                expected="compute: {dtype: float32}",
            )
        step = partial(train_step, compute=SharpnessAwareGradients(spec.radius, plan.sharpness_start))
    specs = {i: o for i, o in enumerate(plan.objectives) if isinstance(o, GeneratingObjective)}
    if not specs:
        return step
    if run.world.is_distributed:
        raise StageError(
            "a sharded model cannot generate",
            where="objectives",
            expected="one process, without torchrun, for `on-policy` and `on-policy-replay`",
        )
    model = run.model
    assert isinstance(model, CausalModel)
    return make_on_policy_step({i: make_sampler(plan, model, spec) for i, spec in specs.items()}, step)


def make_sampler(plan: Plan, model: CausalModel, spec: GeneratingObjective) -> OnPolicySampler:
    """The sampler of an objective on text of the model's own, with the filter of on-policy replay."""
    eos, token_ids = plan.model.inputs.encoder.eos, count_token_ids(plan.model.tokenizer)
    sampler = OnPolicySampler(model, spec.temperature, eos, plan.stage.seed, token_ids)
    if isinstance(spec, OnPolicyObjective):
        return sampler
    score = {"f1": token_f1, "exact": exact_match}.get(spec.score)
    tokenizer = plan.model.tokenizer

    def score_ids(answer: list[int], reference: list[int]) -> float:
        if score is None:
            return 1.0 - repetition_share(answer) if answer else 0.0
        return score(decode_ids(tokenizer, np.array(answer)), decode_ids(tokenizer, np.array(reference)))

    return replace(sampler, filter=AnswerFilter(score_ids, spec.samples, spec.min_score))


def make_loader(
    plan: Plan, execution: Execution, world: World, *, teacher_caches: Sequence[Mapping[str, TeacherCache]] = ()
) -> Loader:
    """The loader of this rank; `teacher_caches`: of each source, by objective name."""
    return Loader(
        plan.data.rows,
        plan.data.mixture,
        micro_batch_size=execution.micro,
        objectives=plan.data.objective_indices,
        pad_token_id=plan.model.inputs.pad_id,
        packed=execution.packed,
        rank=world.rank,
        world_size=world.size,
        skip_steps=plan.stage.data.skip_steps,
        teacher_caches=teacher_caches,
    )


def _find_moments(start: ModelLocation) -> Path:
    """The checkpoint with the start model's moments."""
    if start.folder and has_moments(start.folder):
        return start.folder
    if start.run:
        newest = Checkpoints(start.run / "checkpoints").find_newest()
        if newest:
            return newest
    raise ResumeError(
        f"{start.name} has no optimizer moments",
        where="optimizer.moments",
        expected="a start model that is a run folder or a checkpoint",
        hint="set optimizer.moments: reset",
    )
