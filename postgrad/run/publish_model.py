"""Phase 5: publish the trained model, as a plain Hugging Face folder or as a tuning's folder on its base model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from postgrad.distributed.fsdp import reshard
from postgrad.distributed.shard_files import publish_on_ranks, split_files, write_files
from postgrad.models.prefix_lm_attention import mark_prefix_lm
from postgrad.models.pretrained import cast_tensor, published_tensors, save_chat_template, save_config, stored_dtype
from postgrad.models.published_vocabulary import publish_pretrained, verify_tokenizer
from postgrad.models.tied_weights import untied_state
from postgrad.run.context import RunContext
from postgrad.run.events import Phase, PhaseStarted
from postgrad.run.run_folder import MODEL
from postgrad.run.training_session import TrainingSession
from postgrad.run.tuned_model import TunedModel, make_tuned_model
from postgrad.storage.atomic import publish_folder, remove_folder
from postgrad.training.checkpoint_state import restore_run
from postgrad.tuning.adapter_folder import save_tuning
from postgrad.tuning.attach import attach
from postgrad.tuning.open_model import open_model


def publish(context: RunContext, session: TrainingSession) -> Phase[list[int]]:
    """Publish the model of the selected step, else of the last; returns its trained tokens of each source."""
    yield from _restore_selected(session)
    yield PhaseStarted("publishing the model")
    tuned_model, weights, world = context.load_tuned_model(), session.run.weights, context.world
    folder = context.folder / MODEL
    # A model is there of a process that was killed before it wrote the record; it may have been damaged since.
    world.from_first(lambda: remove_folder(folder) if folder.exists() else None)
    if world.size > 1 and tuned_model.tuning.is_plain:
        _publish_shards(context, tuned_model, folder)
        return session.tokens_by_source
    # Collective: gathers the shards of all ranks.
    state = weights.full_state() if tuned_model.tuning.is_full else weights.state()
    if world.is_main:
        _publish_state(context, tuned_model, state)
    world.barrier()
    return session.tokens_by_source


def _restore_selected(session: TrainingSession) -> Phase[None]:
    """Restore the selected step. Raises `CheckpointError` when its checkpoint is missing or damaged."""
    selector, run = session.selector, session.run
    if selector is None:
        return
    state = selector.state
    assert state.best is not None  # the last step is always evaluated
    if state.should_stop:
        yield PhaseStarted(
            f"training ends at step {run.step:,}: {state.candidates_since_gain} evaluations without improvement on "
            f"{selector.rule.set}"
        )
    if state.best.step == run.step:
        return
    yield PhaseStarted(f"restoring the best checkpoint, step {state.best.step:,}")
    folder = session.checkpoints.step_folder(state.best.step)
    session.checkpoints.check(folder)
    restore_run(run, folder)


def _publish_shards(context: RunContext, tuned_model: TunedModel, folder: Path) -> None:
    """Publish a model of plain weights that the ranks hold in shards, each rank one file of it."""
    pretrained, tokenizer, world = tuned_model.model.pretrained, context.plan.model.tokenizer, context.world
    dtype = _publish_dtype(context)
    reshard(tuned_model.model)
    state = untied_state(pretrained)

    def convert(name: str, tensor: Tensor) -> Mapping[str, Tensor]:
        if is_fused:
            return {name: cast_tensor(tensor, dtype)}
        return published_tensors(pretrained, {name: tensor}, dtype)

    # A few families publish several weights as one. Transformers reads their files under its own names, too.
    names = [out for name, t in state.items() for out in published_tensors(pretrained, {name: t.to("meta")}, dtype)]
    is_fused = len(set(names)) < len(names)

    def write(staged: Path) -> Collection[str]:
        written = write_files(staged, split_files("model", state, world), world, convert)
        if world.is_main:
            written.write_index(staged, "model")
            save_config(pretrained, tokenizer, staged, dtype=dtype)
            verify_tokenizer(tokenizer, staged, folder)
        return written.own

    publish_on_ranks(folder, write, world)


def _publish_dtype(context: RunContext) -> torch.dtype:
    plan = context.plan
    return stored_dtype(plan.model.start) if plan.stage.save.dtype == "auto" else getattr(torch, plan.stage.save.dtype)


def _publish_state(context: RunContext, tuned_model: TunedModel, state: dict[str, Tensor]) -> None:
    """Publish an fp32 `state`: all weights of a fully tuned model, else the tuning's own tensors.

    The tuning is attached to a freshly loaded start model in fp32, so the result does not depend on the training's dtype.
    """
    plan, folder, dtype = context.plan, context.folder / MODEL, _publish_dtype(context)
    tokenizer = plan.model.tokenizer
    if tuned_model.tuning.is_full:
        pretrained = tuned_model.model.pretrained
        publish_pretrained(folder, pretrained, tokenizer, dtype=dtype, state=state)
        return
    if context.world.mesh and tuned_model.tuning.exports_alone:
        tuning = make_tuned_model(plan, context.world).tuning  # without reading the start model, where that is possible
    else:
        opened = open_model(plan.model.start, plan.model.task, layer=plan.model.task_layer)
        mark_prefix_lm(opened.model.config, bool(plan.prefix_length))
        tuning = attach(opened.model, tuned_model.options, tokenizer=tokenizer)
    tuning.load(state)
    if tuning.is_merged_on_export:
        tuning.merge()
        publish_pretrained(folder, tuning.model, tokenizer, dtype=dtype)
        return
    base = context.base_reference(folder)

    def write(staged: Path) -> None:
        save_tuning(tuning, staged, base, for_peft=plan.model.inputs.peft_reads_alike)
        save_chat_template(tokenizer, staged)

    publish_folder(folder, write)
