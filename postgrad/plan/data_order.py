"""Which rows are read, in which order, over how many steps? Budgets, shares, curricula, and what runs short."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from postgrad.config import stage as s
from postgrad.config.quantities import length_in_steps
from postgrad.data.layouts.rows import Rows
from postgrad.data.loading.mixture import Mixture, Segment, row_rates
from postgrad.errors import DataError, StageError
from postgrad.models.location import ModelLocation
from postgrad.optim import lr_schedules
from postgrad.plan.lr_schedule import make_schedule
from postgrad.plan.sources import ResolvedSource


class DataOrder(NamedTuple):
    """What is read, and for how long."""

    steps: int
    mixture: Mixture
    tokens: int
    """The budget in trained tokens, to whole rows."""
    target_shares: tuple[float, ...]
    """What share of the trained tokens each leaf was to have: the mean of the stage's phases, before rows are whole."""


def _compute_phases(
    stage: s.Stage,
    sources: Sequence[ResolvedSource],
    source_shares: Sequence[float],
    per_row: Sequence[float],
    tokens: int,
    start_model: ModelLocation,
) -> list[tuple[float, tuple[float, ...]]]:
    """`(point, shares)`: from which part of the stage on which shares of the leaves hold; `given`: at first, by source."""

    def leaf_shares(by_source: dict[str, float]) -> tuple[float, ...]:
        """Shares of sources as shares of leaves (a replay of everything keeps its inner proportions)."""
        return tuple(leaf.spec.fraction * by_source.get(leaf.spec.source, 0.0) for leaf in sources)

    plain = {source.name: share for source, share in zip(stage.data.sources, source_shares, strict=True)}
    phases = [(0.0, leaf_shares(plain))]
    rough = max(1, round(tokens / (stage.batch.global_batch_size * float(np.mean(per_row)))))
    for shift in stage.data.curriculum:
        if shift.at is not None:
            point = length_in_steps(shift.at, rough, tokens) / rough
        else:
            assert shift.at_rate is not None
            curve = make_schedule(stage.schedule, rough, tokens, start_model)
            point = lr_schedules.first_step_at_or_below(curve, shift.at_rate, rough) / rough
        if not phases[-1][0] < point < 1:
            raise StageError(
                f"a change of shares lies at {point:.1%} of the stage",
                where="data.curriculum",
                expected="points in ascending order, inside the stage",
            )
        phases.append((point, leaf_shares(shift.shares)))
    return phases


def _compute_budget(
    stage: s.Stage,
    sources: Sequence[ResolvedSource],
    source_shares: Sequence[float],
    per_row: Sequence[float],
    start_model: ModelLocation,
) -> int:
    """The stage's trained tokens: as given, or as many as hold the `new_tokens` that are asked for."""
    if stage.tokens is not None:
        return stage.tokens
    assert stage.new_tokens is not None
    tokens = float(stage.new_tokens)
    for _ in range(20):  # points that are given in tokens move with the budget; this settles in a few rounds
        phases = _compute_phases(stage, sources, source_shares, per_row, round(tokens), start_model)
        until = [*(point for point, _ in phases[1:]), 1.0]
        share_of_new = sum(
            (end - point) * sum(share for share, leaf in zip(shares, sources, strict=True) if leaf.role == "new")
            for (point, shares), end in zip(phases, until, strict=True)
        )
        if share_of_new <= 0:
            raise StageError("the new sources have no share", where="new_tokens")
        tokens = stage.new_tokens / share_of_new
    return round(tokens)


def make_data_order(
    stage: s.Stage,
    sources: Sequence[ResolvedSource],
    rows: Sequence[Rows],
    source_shares: Sequence[float],
    notes: list[str],
    start_model: ModelLocation,
) -> DataOrder:
    """What is read for the shares `given` of the stage's sources."""
    block = stage.batch.global_batch_size
    per_row = [r.ledger.trained / len(r) for r in rows]
    sizes = [len(r) for r in rows]
    tokens = _compute_budget(stage, sources, source_shares, per_row, start_model)
    phases = _compute_phases(stage, sources, source_shares, per_row, tokens, start_model)
    first = stage.data.skip_steps
    segments: list[Segment] = []
    begin = 0
    asked_L = np.zeros(len(sources))
    for (point, shares), until in zip(phases, [*(p for p, _ in phases[1:]), 1.0], strict=True):
        asked_L += (until - point) * np.array(shares)
        rates = row_rates(shares, per_row)
        trained = sum(rate * each for rate, each in zip(rates, per_row, strict=True))
        segments.append(Segment((first + begin) * block if segments else 0, rates))
        begin += max(1, round((until - point) * tokens / (block * trained)))
    steps = begin

    caps = [int(leaf.spec.max_passes * size) for leaf, size in zip(sources, sizes, strict=True)]
    short = _find_exhausted_source(Mixture(stage.seed, sizes, segments, block), caps, first, steps)
    if short is not None and stage.data.on_exhausted != "repeat":
        leaf = sources[short]
        asked = Mixture(stage.seed, sizes, segments, block).counts((first + steps) * block)[short] / sizes[short]
        met = (
            f"'{leaf.name}' would be read {asked:.1f} times; its max_passes is {leaf.spec.max_passes:g} "
            f"({rows[short].ledger.trained:,} trained tokens a pass)"
        )
        if stage.data.on_exhausted == "refuse":
            raise DataError(
                met,
                where=leaf.files.where,
                hint="give more text, a smaller share or budget, a higher max_passes, or set data.on_exhausted",
            )
        steps, segments = _apply_on_exhausted(stage, sources, sizes, segments, caps, block, first, steps)
        notes.append(f"{met}; data.on_exhausted: {stage.data.on_exhausted}")
    mixture = Mixture(stage.seed, sizes, segments, block)
    if not steps:
        raise DataError(
            "nothing is left to read", where="data", hint="raise max_passes, or set data.on_exhausted: repeat"
        )
    before, after = mixture.counts(first * block), mixture.counts((first + steps) * block)
    tokens = round(sum((b - a) * each for a, b, each in zip(before, after, per_row, strict=True)))
    return DataOrder(steps, mixture, tokens, tuple(asked_L.tolist()))


def _find_exhausted_source(mixture: Mixture, caps: Sequence[int], first: int, steps: int) -> int | None:
    counts = mixture.counts((first + steps) * mixture.block_size)
    over = [k for k, (count, cap) in enumerate(zip(counts, caps, strict=True)) if count > cap]
    return max(over, key=lambda k: counts[k] / max(caps[k], 1)) if over else None


def _apply_on_exhausted(
    stage: s.Stage,
    sources: Sequence[ResolvedSource],
    sizes: Sequence[int],
    segments: list[Segment],
    caps: Sequence[int],
    block: int,
    first: int,
    steps: int,
) -> tuple[int, list[Segment]]:
    """End the stage, or hand a spent source's share to the others, at the last step at which no cap is passed."""
    while True:
        mixture = Mixture(stage.seed, sizes, segments, block)

        def fits(step: int, mixture: Mixture = mixture) -> bool:
            return all(c <= cap for c, cap in zip(mixture.counts((first + step) * block), caps, strict=True))

        if fits(steps):
            return steps, segments
        low, high = 0, steps
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        if stage.data.on_exhausted == "stop" or not fits(0):  # what is skipped has already used a source up
            return low, segments
        begin = (first + low) * block
        spent = {k for k, (c, cap) in enumerate(zip(mixture.counts(begin + block), caps, strict=True)) if c > cap}

        def without(segment: Segment, at: int, spent: set[int] = spent) -> Segment:
            rates = tuple(0.0 if k in spent else rate for k, rate in enumerate(segment.rates))
            if not sum(rates):
                raise DataError(
                    "every source is spent before the stage ends",
                    where="data",
                    hint="raise max_passes, lower the budget, or set data.on_exhausted: stop",
                )
            return Segment(at, tuple(rate / sum(rates) for rate in rates))

        before = [x for x in segments if x.start < begin]
        current = [x for x in segments if x.start <= begin][-1]
        later = [without(x, x.start) for x in segments if x.start > begin]
        segments = [*before, without(current, begin), *later]
