"""Scores of held-out sets before and after a stage, and the changes of their losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from postgrad.data.problem_type import ProblemType
from postgrad.distributed.world import World
from postgrad.errors import DataError
from postgrad.evaluation.classification_metrics import chance_corrected_metric, compare_metrics
from postgrad.evaluation.held_out import HeldOutSet
from postgrad.evaluation.perplexity import Scores, score_held_out
from postgrad.lineage.metrics import EvaluationRow, SetRow
from postgrad.lineage.record import BeforeAfter, Difference, SetChange, SetScore
from postgrad.lineage.record import ScoresRecord as RecordScores
from postgrad.models.model import Model
from postgrad.stats.forgetting import LossChange, paired_change, score_verdict
from postgrad.storage.array_files import read_arrays, write_arrays
from postgrad.storage.fingerprint import fingerprint

AllScores = dict[str, Scores]


class ScoredSet(Protocol):
    """A held-out set."""

    @property
    def name(self) -> str: ...

    @property
    def role(self) -> str: ...

    @property
    def identity(self) -> list[Any]: ...


def score_sets(
    model: Model,
    sets: Iterable[ScoredSet],
    scorer: Callable[..., Scores] = score_held_out,
    *,
    context: int,
    world: World,
    identity: str | None = None,
    cache: Path | None = None,
) -> AllScores:
    """Score every set with `scorer`. With the model's `identity` (a fingerprint) scores are cached."""
    out: AllScores = {}
    for held_out in sets:
        path, key = None, ""
        if identity and cache and world.size == 1:  # several ranks might see different states of the cache
            key = fingerprint([identity, *held_out.identity, context])
            path = cache / "scores" / f"{key}.npz"
            if found := _read_cached_scores(path, key):
                out[held_out.name] = found
                continue

        def gather(parts: list[tuple[int, np.ndarray]]) -> list[tuple[int, np.ndarray]]:
            return [part for rank in world.all_gather(parts) for part in rank]  # type: ignore[attr-defined]

        out[held_out.name] = scorer(model, held_out, context=context, gather=gather, rank=world.rank, ranks=world.size)
        if path and world.is_main:
            write_scores(path, {held_out.name: out[held_out.name]}, key)
    return out


def _read_cached_scores(path: Path, key: str) -> Scores | None:
    """The scores in a file of the cache, under the name of whichever set was scored first; None when there are none."""
    try:
        return next(iter(read_scores(path, key).values()), None)
    except DataError:
        return None


def write_scores(path: Path, scores: Mapping[str, Scores], owner: str = "") -> None:
    """Every document's nats, tokens and bytes, by set, as one .npz file; `owner`: the run's id."""
    arrays = {f"{name}/{key}": np.asarray(value) for name, s in scores.items() for key, value in asdict(s).items()}
    write_arrays(path, arrays, owner)


def read_scores(path: Path, owner: str = "") -> AllScores:
    """What `write_scores` wrote. Raises `DataError` for a file that is missing, damaged, or another run's."""
    hint = "remove it and, if it is there, record.json; the same `postgrad train` command scores again"
    arrays = read_arrays(path, owner, error=DataError, hint=hint)
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, array in arrays.items():
        name, _, field = key.rpartition("/")
        found.setdefault(name, {})[field] = array
    try:
        return {name: Scores.from_arrays(found[name]) for name in sorted(found)}
    except (KeyError, ValueError) as error:
        raise DataError(f"these are no scores: {error}", where=str(path), hint=hint) from None


def loss_change(before: Scores, after: Scores, vocabulary: int) -> LossChange:
    """How a set's loss changed; both scores are of the same documents in the same windows."""
    nats_before, tokens = before.per_unit()
    nats_after, _ = after.per_unit()
    return paired_change(
        nats_before,
        nats_after,
        tokens,
        total_bytes=int(before.bytes_N.sum()),
        vocabulary=vocabulary,
        units="documents" if before.units == "documents" else "windows",
    )


def chance_corrected_change(before: Scores, after: Scores) -> tuple[str | None, Difference | None]:
    """A classifier's chance-corrected metric and its change with a verdict; None for anything else.

    The loss falls, and accuracy rises, when a classifier only learns which class is frequent.
    """
    if not len(after.predictions_I) or len(before.predictions_I) != len(after.predictions_I):
        return None, None
    problem, names = ProblemType(after.problem), after.names.tolist()
    metric = chance_corrected_metric(problem, names)
    sides = before.predictions_I, after.predictions_I
    change = compare_metrics(problem, *sides, after.labels_I, after.document_I, names)[metric]
    low, high = change["low"], change["high"]
    return metric, Difference(
        difference=change["value"], low=low, high=high, verdict=score_verdict(low, high, scale=1.0)
    )


def loss_changes(
    sets: Sequence[ScoredSet], before: AllScores, after: AllScores, vocabulary: int
) -> dict[str, SetChange]:
    """The change of every set that both models were scored on."""
    return {
        h.name: _set_change(h.role, before[h.name], after[h.name], vocabulary)
        for h in sets
        if h.name in before and h.name in after
    }


def _set_change(role: str, before: Scores, after: Scores, vocabulary: int) -> SetChange:
    change, (metric, metric_change) = loss_change(before, after, vocabulary), chance_corrected_change(before, after)
    return SetChange(
        role=role,
        difference=change.difference,
        low=change.low,
        high=change.high,
        verdict=metric_change.verdict if metric_change else change.verdict,
        metric=metric,
        metric_change=metric_change,
        relative_difference=change.relative,
        relative_high=change.relative_high,
        share_of_range=change.share_of_range,
        bits_per_byte_difference=change.bits_per_byte_difference,
        units=change.units,
        unit_count=change.count,
    )


def summarize_scores(scores: AllScores) -> dict[str, SetScore]:
    """The scores as a record holds them."""
    return {name: SetScore.model_validate(each.summary()) for name, each in scores.items()}


def summarize_before_after(
    sets: Sequence[ScoredSet], before: AllScores, after: AllScores, vocabulary: int
) -> BeforeAfter:
    """The scores before and after and their changes."""
    return BeforeAfter(
        scores=RecordScores(before=summarize_scores(before), after=summarize_scores(after)),
        changes=loss_changes(sets, before, after, vocabulary),
    )


def evaluation_row(
    step: int, trained_tokens: int, sets: Sequence[HeldOutSet], before: AllScores, current: AllScores, vocabulary: int
) -> EvaluationRow:
    """A line of metrics: every set's loss now and its change since the start."""
    rows = {}
    for h in sets:
        if h.name in before and h.name in current:
            change = loss_change(before[h.name], current[h.name], vocabulary)
            rows[h.name] = SetRow(
                role=h.role, nats=current[h.name].nats, change=change.difference, low=change.low, high=change.high
            )
    return EvaluationRow(step=step, trained_tokens=trained_tokens, sets=rows)
