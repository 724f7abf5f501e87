"""The models of a blend: their start, what each of them is, and whether they belong together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from postgrad.config.stage_file import parse_recorded_stage
from postgrad.errors import CheckpointError, ModelError, PostgradError, StageError
from postgrad.evaluation.held_out import HeldOutSet
from postgrad.lineage.record import RECORD, Record, read_record
from postgrad.lineage.tree import read_lineage
from postgrad.models import interpolate
from postgrad.models.location import ModelLocation, locate_model
from postgrad.models.pretrained import load_tokenizer, stored_dtype
from postgrad.optim.decay_weights import decay_weights
from postgrad.plan.plan import Plan, make_plan
from postgrad.training.checkpoint_state import read_progress
from postgrad.training.checkpoints import Checkpoints
from postgrad.tuning.open_model import LoadedModel, open_model, start_fingerprint

Weights = dict[str, Tensor]

_MIN_COSINE = 0.5
"""Between a start and a model trained from it; that of two trainings from random weights is near zero."""


@dataclass(frozen=True)
class BlendSet:
    """A held-out set of one of the runs, with what its scoring needs."""

    held_out: HeldOutSet
    name: str
    context: int
    vocabulary: int


@dataclass(frozen=True)
class BlendModels:
    """Models of one shape and vocabulary, as plain weights, and the start of all of them."""

    loaded: LoadedModel
    """The run's model, whose parameters every blend is written to."""
    names: tuple[str, ...]
    """The run, then the models that are merged with it."""
    start_location: ModelLocation
    start: Weights
    weights: tuple[Weights, ...]
    new: tuple[str, ...]
    """Weights of the run's task layer, which its start does not have."""
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    notes: tuple[str, ...]


def plan_run(run: Path, cache: Path) -> tuple[Record, Plan]:
    """The record of a run, and the plan that its held-out sets come from."""
    record = read_record(run)
    stage = parse_recorded_stage(record.stage, record.name)
    return record, make_plan(stage, Path(record.stage_folder or "."), cache)


def load_blend_models(
    names: Sequence[str], record: Record, plan: Plan, start: str | None, is_forced: bool
) -> BlendModels:
    """Load a run, the models that are merged with it, and their start.

    Raises `ModelError` for models of other shapes or vocabularies and, unless `is_forced`, for a start that one of them was
    not trained from; `StageError` for a tuning that is no weight delta.
    """
    locations = [locate_model(name, Path.cwd(), where="blend") for name in names]
    begun = locate_model(start, Path.cwd(), where="--start") if start else plan.model.start
    if not is_forced:
        for location in locations:
            _refuse_other_lineage(location, begun)
    opened = _load_merged(locations[0])
    start_weights = interpolate.copy_weights(_load_merged(begun).model)
    weights, notes = [interpolate.copy_weights(opened.model)], []
    blocks = interpolate.block_parameter_names(opened.model)
    is_classifier = opened.task.is_classifier
    pair = begun.name, names[0]
    new = interpolate.refuse_other_shapes(start_weights, weights[0], pair, blocks, has_task_layer=is_classifier)
    generation: list[GenerationConfig | None] = [opened.model.generation_config]
    for location in locations[1:]:
        other = _load_merged(location)
        weights.append(interpolate.copy_weights(other.model))
        generation.append(other.model.generation_config)
        interpolate.refuse_other_shapes(weights[0], weights[-1], (names[0], location.name), blocks)
        if _recorded_run(location) is None:
            notes.append(f"nothing records what {location.name} was trained from; it is taken for {begun.name}")
            if not is_forced:
                _refuse_unrelated(start_weights, weights[-1], (begun.name, location.name))
    if new and len(weights) > 1:
        raise ModelError(
            f"{begun.name} has no {new[0]}, so what {names[0]} and {names[1]} learnt there cannot be added",
            where="--merge-with",
            expected="models whose start has all of their weights",
        )
    tokenizer, source = _choose_tokenizer([*locations, begun])
    settings = generation[source] if source < len(generation) else None
    if settings is not None:
        opened.model.generation_config = settings
    return BlendModels(
        opened, tuple(names), begun, {name: t for name, t in start_weights.items() if name in weights[0]},
        tuple(weights), tuple(new), tokenizer, stored_dtype(begun), tuple(notes),
    )  # fmt: skip


def _load_merged(location: ModelLocation) -> LoadedModel:
    """A model as plain weights, its adapters merged."""
    opened = open_model(location)
    if opened.tunings:
        raise StageError(
            f"`{opened.tunings[-1].kind}` of {location.name} is no weight delta, so it cannot be interpolated",
            where="blend",
            expected="a run that changed weights: full, blocks, lora, osf ...",
            hint="detach it to have the start model back",
        )
    return opened


def _recorded_run(location: ModelLocation) -> Path | None:
    """The run that published a model or saved a checkpoint, if it has a record."""
    return location.run if location.run and (location.run / RECORD).exists() else None


def _refuse_other_lineage(location: ModelLocation, start: ModelLocation) -> None:
    """Raise `ModelError` for a model of a run whose lineage does not lead through `start`."""
    run = _recorded_run(location)
    if run is None:
        return
    wanted = start_fingerprint(start) or start.name
    record = read_record(run)
    if record.fingerprints.start_model in (None, wanted):
        return
    stages = read_lineage(run) if record.parents else []
    if wanted not in {ancestor.fingerprints.start_model for _, ancestor in stages}:
        begins = " <- ".join(each.model.start_model for _, each in reversed(stages)) or record.model.start_model
        raise ModelError(
            f"{location.name} was not trained from {start.name}, but from {begins} (their fingerprints differ)",
            where="blend",
            expected="one start for all models",
            hint="name the common ancestor with --start, or add --force to subtract it anyway",
        )


def _refuse_unrelated(start: Mapping[str, Tensor], model: Mapping[str, Tensor], names: tuple[str, str]) -> None:
    """Raise `ModelError` for weights without a resemblance to those of the start."""
    dot = one = other = 0.0
    for name, tensor in start.items():
        if name in model and tensor.ndim > 1:  # norms are near one in every model
            first, second = tensor.double().flatten(), model[name].double().flatten()
            dot, one, other = dot + float(first @ second), one + float(first @ first), other + float(second @ second)
    cosine = dot / (one * other) ** 0.5 if one and other else 0.0
    if cosine < _MIN_COSINE:
        raise ModelError(
            f"the weights of {names[1]} are not near those of {names[0]} (cosine {cosine:.2f}): it has another start",
            where="blend",
            expected=f"one start for all models, and a cosine of at least {_MIN_COSINE}",
            hint="name its start with --start, or add --force to subtract it anyway",
        )


def _choose_tokenizer(locations: Sequence[ModelLocation]) -> tuple[PreTrainedTokenizerBase, int]:
    """The largest of the models' tokenizers with the first chat template, and the index of the model that has it.

    Raises `ModelError` where an id has another token in another model.
    """
    tokenizers = [load_tokenizer(location) for location in locations]
    by_id = [{number: token for token, number in each.get_vocab().items()} for each in tokenizers]
    for tokens, location in zip(by_id[1:], locations[1:], strict=True):
        for number in sorted(tokens.keys() & by_id[0].keys()):
            if tokens[number] != by_id[0][number]:
                raise ModelError(
                    f"token {number} is {by_id[0][number]!r} in {locations[0].name} and {tokens[number]!r} in {location.name}",
                    where="blend",
                    expected="models of one vocabulary",
                )
    source = next((i for i, each in enumerate(tokenizers) if each.chat_template), 0)
    chosen = max(tokenizers, key=len)
    chosen.chat_template = tokenizers[source].chat_template
    return chosen, source


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a run."""

    folder: Path
    step: int


def select_checkpoints(run: Path, record: Record, count: int, decay: str, until: int | None) -> list[Checkpoint]:
    """A run's last `count` checkpoints, up to step `until`.

    Raises `StageError` where there are too few, or where another decay than `linear` is asked for and the rate between them was
    not constant.
    """
    folders = Checkpoints(run / "checkpoints").list_folders()
    found = [folder for folder in folders if until is None or int(folder.name.removeprefix("step-")) <= until][-count:]
    if len(found) < count:
        raise StageError(
            f"{run} has {len(found)} checkpoints" + (f" up to step {until}" if until is not None else ""),
            where="--average",
            expected=f"{count} of them",
            hint="save more often and keep all: save: {every: 5%, keep: all}",
        )
    progress = [read_progress(folder) for folder in found]
    for folder, each in zip(found, progress, strict=True):
        if each.run not in (None, record.id):
            raise CheckpointError(
                "this checkpoint is of another run", where=str(folder), expected=f"one of {record.id}"
            )
    rates = [each.rate for each in progress[1:]]
    if decay != "linear" and rates and max(rates) - min(rates) > 1e-6 * max(rates):
        raise StageError(
            f"the learning rate of the last {count} checkpoints is not constant: {max(rates):.3g} to {min(rates):.3g}",
            where="--decay",
            expected="checkpoints of a constant phase",
            hint="end before its decay with --until STEP, or take fewer checkpoints",
        )
    return [Checkpoint(folder, each.step) for folder, each in zip(found, progress, strict=True)]


def average_checkpoints(checkpoints: Sequence[Checkpoint], decay: str, floor: float) -> Weights:
    """The weighted sum of checkpoints that stands for a decay of the rate; they are read one after another."""

    def states() -> Iterator[Weights]:
        for checkpoint in checkpoints:
            model = _load_merged(locate_model(str(checkpoint.folder), Path.cwd())).model
            yield {name: p.detach() for name, p in model.named_parameters()}
            del model

    return interpolate.average_weights(states(), decay_weights([each.step for each in checkpoints], decay, floor))


def collect_sets(runs: Sequence[str], plan: Plan, cache: Path) -> tuple[list[BlendSet], list[str]]:
    """The held-out sets of the runs, each text once, and notes on runs whose sets are not there; the first has `plan`.

    Raises `StageError` when none of them is retained.
    """
    sets = [_blend_set(plan, each, each.name) for each in plan.evaluation.scored_sets]
    notes: list[str] = []
    for name in runs[1:]:
        run = _recorded_run(locate_model(name, Path.cwd(), where="blend"))
        if run is None:
            continue
        try:
            other = plan_run(run, cache)[1]
        except PostgradError as error:
            notes.append(f"the held-out sets of {name} are not scored: {error.problem}")
            continue
        for each in other.evaluation.scored_sets:
            if all(each.fingerprint != known.held_out.fingerprint for known in sets):
                taken = {known.name for known in sets}
                sets.append(_blend_set(other, each, f"{run.name}/{each.name}" if each.name in taken else each.name))
    if not any(each.held_out.role == "retained" for each in sets):
        raise StageError(
            f"{runs[0]} has no retained set, so the forgetting of a blend cannot be measured",
            where="blend",
            hint="name old text under evaluation.retained of its stage, and train it again",
        )
    return sets, notes


def _blend_set(plan: Plan, held_out: HeldOutSet, name: str) -> BlendSet:
    return BlendSet(held_out, name, plan.model.context_length, plan.model.vocab_size)
