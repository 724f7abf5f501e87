"""Files of a checkpoint: fp32 weights, AdamW moments, and a few integers. Everything else is a function of the step."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from postgrad.distributed.fsdp import reshard
from postgrad.distributed.shard_files import OutputFile, split_files, write_files
from postgrad.errors import CheckpointError
from postgrad.models.pretrained import save_chat_template, save_config, save_pretrained
from postgrad.models.tied_weights import untied_state
from postgrad.models.weight_files import StoredTensors
from postgrad.optim.optimizer import load_full_state
from postgrad.storage.atomic import read_manifest
from postgrad.storage.fingerprint import holds_moments
from postgrad.storage.read_json import MAX_BYTES
from postgrad.storage.regular_file import read_regular_file
from postgrad.training.step import Run
from postgrad.tuning.adapter_folder import TENSORS, write_description, write_tuning

STATE = "state.json"
_MOMENTS = "optimizer"
_SMALL_FILES_BYTES = 32 * 2**20
"""At most what the tokenizer of a large vocabulary takes, with the configuration and `state.json`."""


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
    run: str | None = None
    """Id of the run; None in checkpoints of earlier versions, as are the next two."""
    seed: int | None = None
    tuning: str | None = None
    """Kind of the tuning."""


_PROGRESS = TypeAdapter(TrainingProgress)


@dataclass(frozen=True)
class CheckpointOwner:
    """The run that writes checkpoints, as each of them records it."""

    stage: str
    """Fingerprint of the stage."""
    run: str
    seed: int
    tuning: str

    def differences(self, progress: TrainingProgress) -> list[str]:
        """What a checkpoint records of another run; empty for one of this run."""
        recorded = ((name, getattr(progress, name), value) for name, value in asdict(self).items())
        changes = [f"{name} {old}, not {value}" for name, old, value in recorded if old not in (None, value)]
        return changes[::-1]  # the fingerprint last: the others say why it differs


@dataclass(frozen=True)
class CheckpointMetadata:
    """Metadata of a checkpoint: its run, the tuning's options, and the reference to its base model."""

    owner: CheckpointOwner
    options: dict[str, Any]
    base: dict[str, Any]


def write_checkpoint(
    folder: Path, run: Run, tokenizer: PreTrainedTokenizerBase, metadata: CheckpointMetadata
) -> Collection[str]:
    """Write a checkpoint: a plain Hugging Face folder (fp32 weights) or a tuning's folder, the moments, and `state.json`.

    Collective: each rank writes its part of the weights and moments, and the first one the rest. Returns the files of weights
    and moments that this rank has written.
    """
    own = (
        _write_tensors(folder, run, tokenizer, metadata) if run.world.size == 1 else _write_parts(folder, run, metadata)
    )
    if not run.world.is_main:
        return own
    if run.world.size > 1 and run.weights.tuning.is_full:
        save_config(run.model.pretrained, tokenizer, folder, dtype=torch.float32)
    if not run.weights.tuning.is_full:
        save_chat_template(tokenizer, folder)
    by_source = dict(zip(run.sources, (int(n) for n in run.trained_tokens_by_source), strict=True))
    progress = TrainingProgress(
        run.step,
        run.trained_tokens,
        by_source,
        run.optimizer.update_counts(),
        run.rate,
        pacing=run.lr_scale.state(),
        skipped_steps=run.skipped_steps,
        **asdict(metadata.owner),
    )
    (folder / STATE).write_text(json.dumps(asdict(progress), indent=1))
    return own


def _write_tensors(
    folder: Path, run: Run, tokenizer: PreTrainedTokenizerBase, metadata: CheckpointMetadata
) -> Collection[str]:
    """Write the weights and moments of a single process."""
    if run.weights.tuning.is_full:
        model, state = run.model.pretrained, run.weights.full_state()
        save_pretrained(model, tokenizer, folder, dtype=torch.float32, state=state, original_names=False)
    else:
        write_tuning(folder, metadata.options, run.weights.state(), metadata.base)
    save_file({name: t.contiguous() for name, t in run.optimizer.moments().items()}, folder / f"{_MOMENTS}.safetensors")
    return ()


def _write_parts(folder: Path, run: Run, metadata: CheckpointMetadata) -> Collection[str]:
    """Write this rank's part of the weights and moments; the tensors of a tuning are in one file, of the first rank."""
    reshard(run.model)
    if run.weights.tuning.is_full:
        weights = write_files(folder, split_files("model", untied_state(run.model.pretrained), run.world), run.world)
        if run.world.is_main:
            weights.write_index(folder, "model")
    else:
        state = run.weights.tuning.state()
        weights = write_files(folder, [OutputFile(TENSORS, 0, state)], run.world)
        if run.world.is_main:
            write_description(folder, metadata.options, state, metadata.base)
    moments = write_files(folder, split_files(_MOMENTS, run.optimizer.sharded_moments(), run.world), run.world)
    return [*weights.own, *moments.own]


def checkpoint_bytes(run: Run) -> int:
    """Size of a checkpoint: fp32 weights and two moments, 2 % for names and headers, and the tokenizer and configuration."""
    tuning, model = run.weights.tuning, run.model.pretrained
    weights = sum(t.numel() for t in (model.parameters() if tuning.is_full else tuning.state().values()))
    moments = 2 * sum(w.master.numel() for w in run.weights.entries)
    return round(1.02 * 4 * (weights + moments)) + (_SMALL_FILES_BYTES if tuning.is_full else 0)


def read_progress(folder: Path) -> TrainingProgress:
    """The progress stored in a checkpoint. Raises `CheckpointError` when it cannot be read."""
    try:
        return _PROGRESS.validate_json(read_regular_file(folder / STATE, MAX_BYTES))
    except (OSError, ValidationError) as error:
        raise CheckpointError(
            f"{STATE} is missing or unreadable", where=str(folder), expected="a checkpoint that a run has saved"
        ) from error


def read_weights(folder: Path, names: Iterable[str]) -> Mapping[str, Tensor]:
    """A checkpoint's fp32 weights by name, from those of its files that are weights; of one, only what is used is read."""
    files = (name for name in sorted(names) if name.endswith(".safetensors") and not holds_moments(name))
    return StoredTensors(folder / name for name in files)


def has_moments(folder: Path) -> bool:
    """Whether a folder holds moments."""
    return any(holds_moments(path.name) for path in folder.iterdir())


def read_moments(folder: Path) -> Mapping[str, Tensor]:
    """A checkpoint's moments by name; of one, only what is used is read."""
    return StoredTensors(path for path in sorted(folder.iterdir()) if holds_moments(path.name))


def restore_run(run: Run, folder: Path) -> None:
    """Restore a run from a verified checkpoint of it: from the files that its manifest lists."""
    weights = read_weights(folder, read_manifest(folder))
    progress = read_progress(folder)
    if run.weights.tuning.is_full:
        load_full_state(run.weights, weights)
    else:
        run.weights.load(weights)
    run.optimizer.restore(read_moments(folder), progress.updates)
    run.lr_scale.load(progress.pacing)
    run.step, run.trained_tokens, run.rate = progress.step, progress.trained, progress.rate
    run.skipped_steps = progress.skipped_steps
    for k, name in enumerate(run.sources):
        run.trained_tokens_by_source[k] = progress.trained_by_source[name]
