"""Files of a checkpoint: fp32 weights, AdamW moments, and a few integers. Everything else is a function of the step."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from postgrad.models.pretrained import save_chat_template, save_pretrained
from postgrad.optim.optimizer import load_full_state
from postgrad.training.step import Run
from postgrad.tuning.adapter_folder import write_tuning

STATE = "state.json"
MOMENTS = "optimizer.safetensors"


@dataclass(frozen=True)
class TrainingProgress:
    """Progress of a run. Data order, learning rate and random numbers are functions of `step`. Tokens are trained tokens."""

    step: int
    trained: int
    trained_by_source: dict[str, int]
    updates: dict[str, int]
    """Updates of each weight since its moments were reset."""
    rate: float
    """Learning rate of this step; an anneal that branches here starts from it."""
    stage: str
    """Fingerprint of the stage."""
    pacing: dict[str, float] = field(default_factory=dict)
    """State of a loss-adaptive learning rate."""
    skipped_steps: int = 0
    """Steps so far whose loss or gradient was not finite."""


@dataclass(frozen=True)
class CheckpointMetadata:
    """Metadata of a checkpoint: the stage's fingerprint, the tuning's options, and the reference to its base model."""

    stage: str
    options: dict[str, Any]
    base: dict[str, Any]


def write_checkpoint(folder: Path, run: Run, tokenizer: PreTrainedTokenizerBase, metadata: CheckpointMetadata) -> None:
    """Write a checkpoint: a plain Hugging Face folder (fp32 weights) or a tuning's folder, the moments, and `state.json`.

    Collective: all ranks gather the shards, the first one writes.
    """
    is_full = run.weights.tuning.is_full
    state = run.weights.full_state() if is_full else run.weights.state()
    moments = run.optimizer.moments()
    if not run.world.is_main:
        return
    if is_full:
        save_pretrained(run.model.pretrained, tokenizer, folder, dtype=torch.float32, state=state)
    else:
        write_tuning(folder, metadata.options, state, metadata.base)
        save_chat_template(tokenizer, folder)
    save_file({name: t.contiguous() for name, t in moments.items()}, folder / MOMENTS)
    by_source = dict(zip(run.sources, (int(n) for n in run.trained_tokens_by_source), strict=True))
    progress = TrainingProgress(
        run.step,
        run.trained_tokens,
        by_source,
        run.optimizer.update_counts(),
        run.rate,
        metadata.stage,
        run.lr_scale.state(),
        run.skipped_steps,
    )
    (folder / STATE).write_text(json.dumps(asdict(progress), indent=1))


def read_progress(folder: Path) -> TrainingProgress:
    """The progress stored in a checkpoint."""
    return TrainingProgress(**json.loads((folder / STATE).read_text()))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """A checkpoint's fp32 weights by name, unsharded."""
    out: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name != MOMENTS:
            out.update(load_file(path))
    return out


def read_moments(folder: Path) -> dict[str, Tensor]:
    """A checkpoint's moments by name."""
    return load_file(folder / MOMENTS)


def restore_run(run: Run, folder: Path) -> None:
    """Restore a run from a checkpoint."""
    progress = read_progress(folder)
    if run.weights.tuning.is_full:
        load_full_state(run.weights, read_weights(folder))
    else:
        run.weights.load(read_weights(folder))
    run.optimizer.restore(read_moments(folder), progress.updates)
    run.lr_scale.load(progress.pacing)
    run.step, run.trained_tokens, run.rate = progress.step, progress.trained, progress.rate
    run.skipped_steps = progress.skipped_steps
    for k, name in enumerate(run.sources):
        run.trained_tokens_by_source[k] = progress.trained_by_source[name]
