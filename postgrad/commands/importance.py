"""Measure how much each weight of a model matters on files (Fisher information, MAS), and write it for an anchor penalty."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from postgrad.commands.results import Result
from postgrad.commands.score_files import context_length, load_documents, load_model_inputs
from postgrad.config.objectives import AnyObjective
from postgrad.config.quantities import parse_token_count
from postgrad.data.layouts.rows import Row, Rows
from postgrad.data.loading.batch import Batch, collate
from postgrad.data.loading.unpacked_rows import PACKED_LAYOUTS, split_documents
from postgrad.data.problem_type import ProblemType
from postgrad.data.random_streams import derive_key, permute_indices
from postgrad.errors import DataError, ModelError, StageError, suggest_nearest
from postgrad.evaluation.activation_importance import estimate_activation_importance
from postgrad.evaluation.fisher import (
    ImportanceEstimate,
    ImportanceMeasure,
    empirical_fisher_measure,
    estimate_importance,
    fisher_measure,
    mas_measure,
)
from postgrad.hardware import machine
from postgrad.hardware.memory import memory_errors
from postgrad.models.location import ModelLocation, locate_model
from postgrad.models.model import CausalModel, find_model_leak, wrap_model
from postgrad.penalties.importance_file import (
    ImportanceFile,
    ImportanceKind,
    ImportanceMetadata,
    accumulate_importance,
    write_importance,
)
from postgrad.plan.model_inputs import ModelInputs
from postgrad.plan.objective_rows import make_rows
from postgrad.run.losses import make_objectives
from postgrad.storage.atomic import publish_file
from postgrad.storage.cache_folder import cache_folder
from postgrad.tuning.open_model import open_model, start_fingerprint
from postgrad.tuning.targets import block_layers

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_TOKENS_PER_BATCH = {"cpu": 512, "cuda": 2048}
"""More batches give a better estimate for the same tokens; a GPU needs larger ones."""
_MIN_BATCHES = 16
_BATCHED_KINDS: tuple[ImportanceKind, ...] = ("fisher", "activation")
"""The others need the gradient of each sample."""


@dataclass(frozen=True)
class ImportancePart(Result):
    """The importance of all weights of one name, over all blocks."""

    part: str
    weights: int
    """How many numbers."""
    share: float
    """Their fraction of the total importance."""
    relative: float
    """Their mean importance divided by that of all weights."""


@dataclass(frozen=True)
class MeasuredImportance(Result):
    """A file of importance that was written."""

    metadata: ImportanceMetadata
    out: Path
    weights: int
    """How many numbers the file holds."""
    parts: tuple[ImportancePart, ...]
    """The most important first."""
    is_text_exhausted: bool
    """The files held fewer labels than requested."""

    def as_dict(self) -> dict[str, object]:
        """The result as plain data, with the fields of the file's metadata."""
        data = super().as_dict()
        del data["metadata"], data["is_text_exhausted"]
        return {**asdict(self.metadata), **data}


@memory_errors("importance", "a smaller --context")
def measure_importance(
    model: str,
    files: Sequence[str],
    *,
    out: Path | str,
    tokens: str | int = "100k",
    kind: str = "fisher",
    accumulate: Path | str | None = None,
    decay: float = 0.9,
    dtype: str = "float32",
    context: int | None = None,
    document_unit: str = "auto",
    column: str | None = None,
    seed: int = 0,
    force: bool = False,
    base: str | None = None,
    cache: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> MeasuredImportance:
    """Measure the importance of a model's weights on files, and write it to `out` (.safetensors).

    `tokens`: labels to measure. `kind`: `fisher` (labels sampled from the model), `empirical` (the text's own labels;
    biased), `mas`, or `activation` (without gradients, for `sparse_update: {kind: ssu}`). `accumulate`: an older file to which
    this one is added, after multiplication by `decay` (online EWC). `dtype`: of the file, float32 or bfloat16. `progress` is
    called with the labels done and their total.

    Raises `StageError`, `DataError` or `ModelError` for options, files or a model that cannot be used.
    """
    machine.tune_allocator()
    out = Path(out)
    importance_kind: ImportanceKind = _check_choice("--kind", kind, get_args(ImportanceKind))
    _check_choice("--dtype", dtype, tuple(_DTYPES))
    _check_output(out, force)
    if not 0 <= decay <= 1:
        raise StageError(f"a decay of {decay}", where="--decay", expected="0 to 1")
    older = ImportanceFile(Path(accumulate)) if accumulate else None
    if older and older.metadata.kind != kind:
        raise DataError(
            f"the older importance is {older.metadata.kind}, and this one {kind}",
            where=str(accumulate),
            expected="one kind",
        )
    start = locate_model(str(model), Path.cwd(), base)
    target = parse_token_count(str(tokens), "--tokens")
    rows = _load_rows(
        start, list(map(str, files)), importance_kind, context, document_unit, column, cache or cache_folder()
    )
    estimate, unit = _estimate(start, rows, importance_kind, target, older, seed, progress)
    metadata = ImportanceMetadata(
        kind=importance_kind,
        per=unit,
        tokens=estimate.labels,
        model=str(model),
        fingerprint=start_fingerprint(start),
        mean=estimate.mean,
        convergence=estimate.convergence,
    )
    tensors = estimate.tensors
    if older:
        tensors = accumulate_importance(older, tensors, decay)
        count = sum(t.numel() for t in tensors.values())
        metadata = replace(
            metadata,
            mean=sum(float(t.double().sum()) for t in tensors.values()) / count,
            onto={**asdict(older.metadata), "decay": decay},
        )
    publish_file(out, lambda staging: write_importance(staging, tensors, metadata, _DTYPES[dtype]))
    return MeasuredImportance(
        metadata,
        out,
        sum(t.numel() for t in tensors.values()),
        _importance_by_part(tensors, metadata.mean),
        estimate.labels < target,
    )


def _check_output(out: Path, force: bool) -> None:
    if out.is_dir():
        raise StageError(f"{out} is a folder", where="--out", expected="the name of a file (.safetensors)")
    if out.exists() and not force:
        raise StageError(f"{out} already exists", where="--out", hint="name another file, or add --force")
    if not out.parent.is_dir():
        raise StageError(f"there is no folder {out.parent}", where="--out")


def _check_choice(where: str, value: str, choices: tuple[str, ...]) -> Any:
    """`value`, which must be one of `choices`. Raises `StageError` when it is not."""
    if value not in choices:
        raise StageError(
            f"there is no {value!r}", where=where, expected=", ".join(choices), hint=suggest_nearest(value, choices)
        )
    return value


@dataclass(frozen=True)
class _FileRows:
    """The rows of all files, the objective of the first one, and what a classifier decides."""

    sets: tuple[Rows, ...]
    objective: AnyObjective
    problem: ProblemType
    model_inputs: ModelInputs


def _load_rows(
    start: ModelLocation,
    files: list[str],
    kind: ImportanceKind,
    context: int | None,
    document_unit: str,
    column: str | None,
    cache: Path,
) -> _FileRows:
    model_inputs = load_model_inputs(start, context_length(start, context))
    sets: list[Rows] = []
    objectives: list[AnyObjective] = []
    problem = ProblemType.CLASS
    for chosen, file_problem in load_documents(start, files, document_unit, column, model_inputs, cache):
        sets.append(
            make_rows(chosen.objective, chosen.store, model_inputs, problem=file_problem, pack=kind in _BATCHED_KINDS)
        )
        objectives.append(chosen.objective)
        problem = file_problem
    if not any(rows.ledger.trained for rows in sets):
        raise DataError("these files hold nothing to predict", where="FILES", expected="longer text")
    # One loss for all files: the gradient of a label does not depend on the file that it is from.
    return _FileRows(tuple(sets), objectives[0], problem, model_inputs)


def _estimate(
    start: ModelLocation,
    rows: _FileRows,
    kind: ImportanceKind,
    tokens: int,
    previous: ImportanceFile | None,
    seed: int,
    progress: Callable[[int, int], None],
) -> tuple[ImportanceEstimate, str]:
    """The estimate, and the unit of its labels: `token` or `label`."""
    opened = open_model(start)
    if opened.tunings:
        raise ModelError(
            f"{start.name} has a `{opened.tunings[-1].kind}` tuning, and importance is measured on plain weights",
            where="MODEL",
            hint="name its base model, or export it first",
        )
    if previous:
        previous.check_shapes(
            {name: tuple(p.shape) for name, p in opened.model.named_parameters() if p.is_floating_point()}
        )
    device = machine.default_device()
    model = wrap_model(opened.model, opened.task).to(device)
    (loss,) = make_objectives([rows.objective], rows.problem)
    classes = len(opened.model.config.id2label or ()) if rows.problem == ProblemType.MULTI_LABEL else 1
    measures: Mapping[ImportanceKind, ImportanceMeasure] = {
        "fisher": fisher_measure(loss, rows.problem, torch.Generator().manual_seed(seed), scale=classes),
        "empirical": empirical_fisher_measure(loss, scale=classes),
        "mas": mas_measure(),
    }
    batch_tokens = min(_TOKENS_PER_BATCH[device.type], tokens // _MIN_BATCHES) if kind in _BATCHED_KINDS else 1
    batch_size = max(1, batch_tokens // rows.model_inputs.length)
    estimate: ImportanceEstimate | None = None
    is_packed = not isinstance(model, CausalModel) or not find_model_leak(model, rows.model_inputs.length)
    batches = _batches(rows.sets, batch_size, rows.model_inputs.pad_id, seed, packed=is_packed)
    steps = (
        estimate_activation_importance(model, block_layers(model.pretrained), batches, tokens)
        if kind == "activation"
        else estimate_importance(model, batches, measures[kind], tokens)
    )
    for step in steps:
        if isinstance(step, ImportanceEstimate):
            estimate = step
        else:
            progress(min(step, tokens), tokens)
    assert estimate is not None
    return estimate, "label" if opened.task.is_classifier else "token"


def _batches(sets: Sequence[Rows], batch_size: int, pad: int, seed: int, *, packed: bool) -> Iterator[Batch]:
    """The rows of all files, each once, in seeded order; a batch holds rows of one layout.

    Unless they are `packed`, a batch holds the documents of rows.
    """
    offsets = np.cumsum([0, *(len(rows) for rows in sets)])
    order = permute_indices(np.arange(offsets[-1]), int(offsets[-1]), derive_key(seed, 0x1397))
    pending: dict[str, list[Row]] = {}
    for position, number in enumerate(order.tolist()):
        k = int(np.searchsorted(offsets, number, side="right")) - 1
        row = sets[k].get_row(number - int(offsets[k]), position)
        is_whole = packed or sets[k].layout not in PACKED_LAYOUTS
        for each in [row] if is_whole else [document.row for document in split_documents(row)]:
            if not each.label_count:
                continue
            group = pending.setdefault(sets[k].layout, [])
            group.append(each)
            if len(group) == batch_size:
                yield collate(group, [0] * len(group), pad_token_id=pad)
                group.clear()
    for group in pending.values():
        if group:
            yield collate(group, [0] * len(group), pad_token_id=pad)


def _importance_by_part(tensors: dict[str, torch.Tensor], mean: float) -> tuple[ImportancePart, ...]:
    """The importance of weights of the same name in all blocks together, the most important first."""
    sums: dict[str, list[float]] = {}
    for name, tensor in tensors.items():
        part = sums.setdefault(re.sub(r"\.\d+\.", ".*.", name), [0.0, 0.0])
        part[0] += float(tensor.double().sum())
        part[1] += tensor.numel()
    total = sum(part[0] for part in sums.values()) or 1.0
    parts = [
        ImportancePart(name, int(count), whole / total, whole / count / mean if mean else 0.0)
        for name, (whole, count) in sums.items()
    ]
    return tuple(sorted(parts, key=lambda part: -part.share))
