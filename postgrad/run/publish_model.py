"""Phase 5: publish the trained model, as a plain Hugging Face folder or as a tuning's folder on its base model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from postgrad.models.prefix_lm_attention import mark_prefix_lm
from postgrad.models.pretrained import save_chat_template, stored_dtype
from postgrad.models.published_vocabulary import publish_pretrained
from postgrad.run.context import RunContext
from postgrad.run.events import Phase, PhaseStarted
from postgrad.run.run_folder import MODEL
from postgrad.run.training_session import TrainingSession
from postgrad.run.tuned_model import TunedModel
from postgrad.storage.atomic import publish_folder, remove_folder
from postgrad.training.checkpoint_state import restore_run
from postgrad.tuning.adapter_folder import save_tuning
from postgrad.tuning.attach import attach
from postgrad.tuning.open_model import open_model


def publish(context: RunContext, session: TrainingSession) -> Phase[list[int]]:
    """Publish the model of the selected step, else of the last; returns its trained tokens of each source."""
    yield from _restore_selected(session)
    yield PhaseStarted("publishing the model")
    tuned_model, weights = context.load_tuned_model(), session.run.weights
    # Collective: gathers the shards of all ranks.
    state = weights.full_state() if tuned_model.tuning.is_full else weights.state()
    if context.world.is_main:
        # A model is there of a process that was killed before it wrote the record; it may have been damaged since.
        if (context.folder / MODEL).exists():
            remove_folder(context.folder / MODEL)
        _publish_state(context, tuned_model, state)
    context.world.barrier()
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


def _publish_state(context: RunContext, tuned_model: TunedModel, state: dict[str, Tensor]) -> None:
    """Publish an fp32 `state`: all weights of a fully tuned model, else the tuning's own tensors.

    The tuning is attached to a freshly loaded start model in fp32, so the result does not depend on the training's dtype.
    """
    plan, folder = context.plan, context.folder / MODEL
    dtype = stored_dtype(plan.model.start) if plan.stage.save.dtype == "auto" else getattr(torch, plan.stage.save.dtype)
    tokenizer = plan.model.tokenizer
    if tuned_model.tuning.is_full:
        pretrained = tuned_model.model.pretrained
        publish_pretrained(folder, pretrained, tokenizer, dtype=dtype, state=state)
        return
    opened = open_model(plan.model.start, plan.model.task, layer=plan.model.task_layer)
    mark_prefix_lm(opened.model.config, bool(plan.prefix_length))
    tuning = attach(opened.model, tuned_model.options, tokenizer=tokenizer)
    tuning.load(state)
    if tuning.is_merged_on_export:
        tuning.merge()
        publish_pretrained(folder, opened.model, tokenizer, dtype=dtype)
        return
    base = context.base_reference(folder)

    def write(staged: Path) -> None:
        save_tuning(tuning, staged, base, for_peft=plan.model.inputs.peft_reads_alike)
        save_chat_template(tokenizer, staged)

    publish_folder(folder, write)
