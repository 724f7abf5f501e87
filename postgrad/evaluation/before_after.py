"""Scores of held-out sets before and after a stage, and the changes of their losses."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from postgrad.distributed.world import World
from postgrad.evaluation.held_out import HeldOutSet
from postgrad.evaluation.perplexity import Scores, score_held_out
from postgrad.models.model import Model
from postgrad.stats.forgetting import LossChange, paired_change
from postgrad.storage.atomic import write_atomically
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
        path = None
        if identity and cache and world.size == 1:  # several ranks might see different states of the cache
            key = fingerprint([identity, *held_out.identity, context])
            path = cache / "scores" / f"{key}.npz"
            if path.exists():
                out[held_out.name] = next(iter(read_scores(path).values()))  # cached under the name of another set
                continue

        def gather(parts: list[tuple[int, np.ndarray]]) -> list[tuple[int, np.ndarray]]:
            return [part for rank in world.all_gather(parts) for part in rank]  # type: ignore[attr-defined]

        out[held_out.name] = scorer(model, held_out, context=context, gather=gather, rank=world.rank, ranks=world.size)
        if path and world.is_main:
            write_scores(path, {held_out.name: out[held_out.name]})
    return out


def write_scores(path: Path, scores: Mapping[str, Scores]) -> None:
    """Every document's nats, tokens and bytes, by set, as one .npz file."""
    buffer = io.BytesIO()
    arrays = {f"{name}/{key}": value for name, s in scores.items() for key, value in asdict(s).items()}
    np.savez(buffer, allow_pickle=False, **arrays)
    write_atomically(path, buffer.getvalue())


def read_scores(path: Path) -> AllScores:
    """What `write_scores` wrote."""
    with np.load(path, allow_pickle=False) as stored:
        names = sorted({key.rsplit("/", 1)[0] for key in stored.files})
        # What an older version did not write yet has its default.
        kept = {name: [f.name for f in fields(Scores) if f"{name}/{f.name}" in stored.files] for name in names}
        return {
            name: Scores(**{key: _decode_value(stored[f"{name}/{key}"]) for key in keys}) for name, keys in kept.items()
        }


def _decode_value(stored: np.ndarray) -> Any:
    """An array, or the text that was written as one."""
    return str(stored) if stored.dtype.kind == "U" and stored.ndim == 0 else stored


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


def loss_changes(
    sets: Sequence[ScoredSet], before: AllScores, after: AllScores, vocabulary: int
) -> dict[str, dict[str, Any]]:
    """The change of every set with its role, as plain data."""
    return {
        h.name: {"role": h.role, **asdict(loss_change(before[h.name], after[h.name], vocabulary))}
        for h in sets
        if h.name in before and h.name in after
    }


def summarize_before_after(
    sets: Sequence[ScoredSet], before: AllScores, after: AllScores, vocabulary: int
) -> dict[str, Any]:
    """The scores before and after and the changes, as a record has them."""
    return {
        "scores": {
            "before": {name: scores.summary() for name, scores in before.items()},
            "after": {name: scores.summary() for name, scores in after.items()},
        },
        "changes": loss_changes(sets, before, after, vocabulary),
    }


def evaluation_row(
    step: int, trained: int, sets: Sequence[HeldOutSet], before: AllScores, current: AllScores, vocabulary: int
) -> dict[str, Any]:
    """A line of metrics: every set's loss now and its change since the start."""
    changes = loss_changes(sets, before, current, vocabulary)
    return {
        "kind": "evaluation",
        "step": step,
        "trained": trained,
        "sets": {
            name: {
                "role": c["role"],
                "nats": current[name].nats,
                "change": c["difference"],
                "low": c["low"],
                "high": c["high"],
            }
            for name, c in changes.items()
        },
    }
