"""How is the importance of a model's weights measured on files, and written for an anchor to read?"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from postgrad.commands.evaluate import context_length, load_documents, load_model_inputs
from postgrad.config.objectives import AnyObjective
from postgrad.config.quantities import parse_token_count
from postgrad.data.layouts.rows import Row, Rows
from postgrad.data.loading.batch import Batch, collate
from postgrad.data.problem_type import ProblemType
from postgrad.data.random_streams import derive_key, permute_indices
from postgrad.errors import DataError, ModelError, StageError, suggest_nearest
from postgrad.evaluation.fisher import (
    ImportanceEstimate,
    ImportanceMeasure,
    empirical_fisher_measure,
    estimate_importance,
    fisher_measure,
    mas_measure,
)
from postgrad.hardware import machine
from postgrad.models.model import wrap_model
from postgrad.models.pretrained import ModelLocation, locate_model
from postgrad.penalties.importance_file import (
    KIND_DESCRIPTIONS,
    ImportanceFile,
    ImportanceKind,
    ImportanceMetadata,
    accumulate_importance,
    write_importance,
)
from postgrad.plan.objective_rows import make_rows
from postgrad.run.losses import make_objectives
from postgrad.storage.atomic import disk_error
from postgrad.tuning.open_model import open_model, start_fingerprint

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_TOKENS_PER_BATCH = {"cpu": 512, "cuda": 2048}
"""Of a batch: the more batches, the better the estimate for the same tokens; a GPU wants more at once."""
_MIN_BATCHES = 16
_PARTS_SHOWN = 6


def measure_importance(
    model: str,
    files: list[str],
    *,
    out: Path,
    tokens: str,
    kind: str,
    accumulate: Path | None,
    decay: float,
    dtype: str,
    context: int | None,
    documents: str,
    column: str | None,
    seed: int,
    force: bool,
    base: str | None,
    cache: Path,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Measure the importance of a model's weights on files, and write it. Raises what is wrong with any of them."""
    machine.tune_allocator()
    wanted: ImportanceKind = _check_choice("--kind", kind, get_args(ImportanceKind))
    _check_choice("--dtype", dtype, tuple(_DTYPES))
    if not 0 <= decay <= 1:
        raise StageError(f"a decay of {decay}", where="--decay", expected="0 to 1")
    if out.is_dir():
        raise StageError(f"{out} is a folder", where="--out", expected="the name of a file (.safetensors)")
    if out.exists() and not force:
        raise StageError(f"{out} is there already", where="--out", hint="name another file, or add --force")
    if not out.parent.is_dir():
        raise StageError(f"there is no folder {out.parent}", where="--out")
    older = ImportanceFile(accumulate) if accumulate else None
    if older and older.metadata.kind != kind:
        raise DataError(
            f"the older importance is {older.metadata.kind}, and this one {kind}",
            where=str(accumulate),
            expected="one kind",
        )
    start = locate_model(model, Path.cwd(), base)
    found, per, short = _measure_files(
        start,
        files,
        wanted,
        parse_token_count(tokens, "--tokens"),
        older,
        context,
        documents,
        column,
        seed,
        cache,
        progress,
    )
    about = ImportanceMetadata(
        kind=wanted,
        per=per,
        tokens=found.labels,
        model=model,
        fingerprint=start_fingerprint(start),
        mean=found.mean,
        convergence=found.convergence,
    )
    tensors = found.tensors
    if older:
        tensors = accumulate_importance(older, tensors, decay)
        numbers = sum(t.numel() for t in tensors.values())
        about = ImportanceMetadata(
            **{
                **asdict(about),
                "mean": sum(float(t.double().sum()) for t in tensors.values()) / numbers,
                "onto": {**asdict(older.metadata), "decay": decay},
            }
        )
    staging = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        write_importance(staging, tensors, about, _DTYPES[dtype])
        os.replace(staging, out)
    except OSError as error:
        staging.unlink(missing_ok=True)
        raise disk_error(error, out) from error
    parts = _importance_by_part(tensors, about.mean)
    return {
        "text": "\n".join(_lines(about, out, parts, short)),
        **asdict(about),
        "out": str(out),
        "weights": sum(t.numel() for t in tensors.values()),
        "parts": parts,
    }


def _check_choice(where: str, value: str, choices: tuple[str, ...]) -> Any:
    """`word`, which is one of `words`. Raises `StageError` when it is not."""
    if value not in choices:
        raise StageError(
            f"there is no {value!r}", where=where, expected=", ".join(choices), hint=suggest_nearest(value, choices)
        )
    return value


def _measure_files(
    start: ModelLocation,
    files: list[str],
    kind: ImportanceKind,
    tokens: int,
    previous: ImportanceFile | None,
    context: int | None,
    documents: str,
    column: str | None,
    seed: int,
    cache: Path,
    progress: Callable[[int, int], None],
) -> tuple[ImportanceEstimate, str, bool]:
    """What was found, what it is counted in, and whether the text was too short."""
    reading = load_model_inputs(start, context_length(start, context))
    together = kind == "fisher"
    sets: list[Rows] = []
    specs: list[AnyObjective] = []
    problem: ProblemType = ProblemType.CLASS
    for chosen, decided in load_documents(start, files, documents, column, reading, cache):
        sets.append(make_rows(chosen.objective, chosen.store, reading, problem=decided, pack=together))
        specs.append(chosen.objective)
        problem = decided
    if not any(rows.ledger.trained for rows in sets):
        raise DataError("there is nothing to predict in these files", where="FILES", expected="text of some length")
    opened = open_model(start)
    if opened.tunings:
        raise ModelError(
            f"in {start.name} stands `{opened.tunings[-1].kind}`, and importance is of plain weights",
            where="MODEL",
            hint="name the model that it sits on, or export it first",
        )
    if previous:
        previous.check_shapes(
            {name: tuple(p.shape) for name, p in opened.model.named_parameters() if p.is_floating_point()}
        )
    device = machine.default_device()
    model = wrap_model(opened.model, opened.task).to(device)
    # All files are weighed alike: what a model says of a label does not depend on the file that the label is of.
    (loss,) = make_objectives(specs[:1], problem)
    classes = len(opened.model.config.id2label or ()) if problem == ProblemType.MULTI_LABEL else 1
    measures: dict[ImportanceKind, ImportanceMeasure] = {
        "fisher": fisher_measure(loss, problem, torch.Generator().manual_seed(seed), scale=classes),
        "empirical": empirical_fisher_measure(loss, scale=classes),
        "mas": mas_measure(),
    }
    most = min(_TOKENS_PER_BATCH[device.type], tokens // _MIN_BATCHES) if together else 1
    at_once = max(1, most // reading.length)
    result: ImportanceEstimate | None = None
    for step in estimate_importance(model, _batches(sets, at_once, reading.pad_id, seed), measures[kind], tokens):
        if isinstance(step, ImportanceEstimate):
            result = step
        else:
            progress(min(step, tokens), tokens)
    assert result is not None
    per = "label" if opened.task.is_classifier else "token"
    return result, per, result.labels < tokens


def _batches(sets: list[Rows], batch_size: int, pad: int, seed: int) -> Iterator[Batch]:
    """The rows of all files, each once, in an order that the seed decides; rows of one layout together."""
    first = np.cumsum([0, *(len(rows) for rows in sets)])
    order = permute_indices(np.arange(first[-1]), int(first[-1]), derive_key(seed, 0x1397))
    waiting: dict[str, list[Row]] = {}
    for position, number in enumerate(order.tolist()):
        k = int(np.searchsorted(first, number, side="right")) - 1
        row = sets[k].get_row(number - int(first[k]), position)
        if not row.label_count:
            continue
        group = waiting.setdefault(sets[k].layout, [])
        group.append(row)
        if len(group) == batch_size:
            yield collate(group, [0] * len(group), pad_token_id=pad)
            group.clear()
    for group in waiting.values():
        if group:
            yield collate(group, [0] * len(group), pad_token_id=pad)


def _importance_by_part(tensors: dict[str, torch.Tensor], mean: float) -> list[dict[str, Any]]:
    """Which parts of the model matter: weights of the same name in all blocks together, those that matter most first."""
    sums: dict[str, list[float]] = {}
    for name, tensor in tensors.items():
        part = sums.setdefault(re.sub(r"\.\d+\.", ".*.", name), [0.0, 0.0])
        part[0] += float(tensor.double().sum())
        part[1] += tensor.numel()
    total = sum(part[0] for part in sums.values()) or 1.0
    rows = [
        {"part": name, "weights": int(count), "share": whole / total, "relative": whole / count / mean if mean else 0.0}
        for name, (whole, count) in sums.items()
    ]
    return sorted(rows, key=lambda row: -row["share"])


def _lines(metadata: ImportanceMetadata, out: Path, parts: list[dict[str, Any]], is_short: bool) -> list[str]:
    lines = [
        f"{metadata.model}: {KIND_DESCRIPTIONS[metadata.kind]}",
        f"a mean over {metadata.tokens:,} {metadata.per}s" + (" (all that the files have)" if is_short else ""),
        "",
        *_convergence_lines(metadata),
        "",
        f"  {'weights':<44} {'numbers':>10} {'share':>7} {'mean / overall mean':>20}",
        *(
            f"  {row['part']:<44} {row['weights']:>10,} {row['share']:>7.1%} {row['relative']:>20.3g}"
            for row in parts[:_PARTS_SHOWN]
        ),
        "",
        f"mean importance {metadata.mean:.4g} per {metadata.per}",
    ]
    if metadata.onto:
        lines.append(f"added onto {metadata.onto['decay']:g} x what was measured on {metadata.onto['model']}")
    stage = f"penalties: [{{kind: anchor, strength: auto, importance: {out}}}]"
    return [*lines, f"written: {out}", f"next, in a stage that starts from {metadata.model}: {stage}"]


def _convergence_lines(metadata: ImportanceMetadata) -> list[str]:
    if not metadata.convergence:
        return ["one batch alone: nothing tells how far it is off (more --tokens, or a smaller --context)"]
    return [
        f"  {'labels':>10}  {'two halves correlate':>20}  {'their mean is off by':>20}",
        *(
            f"  {int(row['labels']):>10,}  {row['correlation']:>20.3f}  {row['error']:>20.1%}"
            for row in metadata.convergence
        ),
    ]
