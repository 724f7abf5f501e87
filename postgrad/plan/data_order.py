"""The data order of a stage: budget, shares, curriculum, and sources that are exhausted.

Legend: L sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    """The mixture of a stage, and its length."""

    steps: int
    mixture: Mixture
    tokens: int
    """The budget in trained tokens, to whole rows."""
    target_shares: tuple[float, ...]
    """The share of trained tokens of each source: the mean over the phases of a curriculum, before rounding to rows."""


_Phases = list[tuple[float, tuple[float, ...]]]
"""For each phase its beginning, as a fraction of the stage, and the shares of the sources."""


def make_data_order(
    stage: s.Stage,
    sources: Sequence[ResolvedSource],
    rows: Sequence[Rows],
    source_shares: Sequence[float],
    notes: list[str],
    start_model: ModelLocation,
) -> DataOrder:
    """The data order for these shares of the stage's sources. Raises `DataError` for sources that are exhausted."""
    block, first_step = stage.batch.global_batch_size, stage.data.skip_steps
    tokens_per_row = [r.ledger.trained / len(r) for r in rows]
    tokens = _compute_budget(stage, sources, source_shares, tokens_per_row, start_model)
    phases = _compute_phases(stage, sources, source_shares, tokens_per_row, tokens, start_model)
    segments: list[Segment] = []
    steps = 0
    target_L = np.zeros(len(sources))
    for (begin, shares), end in zip(phases, _phase_ends(phases), strict=True):
        target_L += (end - begin) * np.array(shares)
        rates = row_rates(shares, tokens_per_row)
        mean_tokens = sum(rate * each for rate, each in zip(rates, tokens_per_row, strict=True))
        segments.append(Segment((first_step + steps) * block if segments else 0, rates))
        steps += max(1, round((end - begin) * tokens / (block * mean_tokens)))

    sizes = [len(r) for r in rows]
    caps = [int(source.spec.max_passes * size) for source, size in zip(sources, sizes, strict=True)]
    limits = _RowLimits(stage.seed, sizes, caps, block, first_step)
    exhausted = limits.find_exhausted_source(segments, steps)
    if exhausted is not None and stage.data.on_exhausted != "repeat":
        source = sources[exhausted]
        passes = limits.count_rows(segments, steps)[exhausted] / sizes[exhausted]
        problem = (
            f"'{source.name}' would be read {passes:.1f} times; its max_passes is {source.spec.max_passes:g} "
            f"({rows[exhausted].ledger.trained:,} trained tokens per pass)"
        )
        if stage.data.on_exhausted == "refuse":
            raise DataError(
                problem,
                where=source.files.where,
                hint="give more text, a smaller share or budget, a higher max_passes, or set data.on_exhausted",
            )
        steps, segments = limits.shorten(segments, steps, redistribute=stage.data.on_exhausted != "stop")
        notes.append(f"{problem}; data.on_exhausted: {stage.data.on_exhausted}")
    if not steps:
        raise DataError("no rows to read", where="data", hint="raise max_passes, or set data.on_exhausted: repeat")
    mixture = limits.mixture(segments)
    before, after = mixture.counts(first_step * block), limits.count_rows(segments, steps)
    tokens = round(sum((b - a) * each for a, b, each in zip(before, after, tokens_per_row, strict=True)))
    return DataOrder(steps, mixture, tokens, tuple(target_L.tolist()))


def _compute_phases(
    stage: s.Stage,
    sources: Sequence[ResolvedSource],
    source_shares: Sequence[float],
    tokens_per_row: Sequence[float],
    tokens: int,
    start_model: ModelLocation,
) -> _Phases:
    """The phases of a curriculum; `source_shares`, of the stage's sources, hold in the first one."""

    def resolve(shares: dict[str, float]) -> tuple[float, ...]:
        """Shares of the resolved sources: a replay of everything seen keeps its inner proportions."""
        return tuple(source.spec.fraction * shares.get(source.spec.source, 0.0) for source in sources)

    named = {source.name: share for source, share in zip(stage.data.sources, source_shares, strict=True)}
    phases = [(0.0, resolve(named))]
    steps = max(1, round(tokens / (stage.batch.global_batch_size * float(np.mean(tokens_per_row)))))  # an estimate
    for shift in stage.data.curriculum:
        if shift.at is not None:
            begin = length_in_steps(shift.at, steps, tokens) / steps
        else:
            assert shift.at_rate is not None
            schedule = make_schedule(stage.schedule, steps, tokens, start_model)
            begin = lr_schedules.first_step_at_or_below(schedule, shift.at_rate, steps) / steps
        if not phases[-1][0] < begin < 1:
            raise StageError(
                f"a change of shares is at {begin:.1%} of the stage",
                where="data.curriculum",
                expected="changes in ascending order, inside the stage",
            )
        phases.append((begin, resolve(shift.shares)))
    return phases


def _phase_ends(phases: _Phases) -> list[float]:
    return [*(begin for begin, _ in phases[1:]), 1.0]


def _compute_budget(
    stage: s.Stage,
    sources: Sequence[ResolvedSource],
    source_shares: Sequence[float],
    tokens_per_row: Sequence[float],
    start_model: ModelLocation,
) -> int:
    """The stage's trained tokens: `tokens`, or as many as contain `new_tokens` of new sources."""
    if stage.tokens is not None:
        return stage.tokens
    assert stage.new_tokens is not None
    tokens = float(stage.new_tokens)
    for _ in range(20):  # phases that begin at a token count move with the budget; this converges in a few rounds
        phases = _compute_phases(stage, sources, source_shares, tokens_per_row, round(tokens), start_model)
        new_share = sum(
            (end - begin) * sum(share for share, source in zip(shares, sources, strict=True) if source.role == "new")
            for (begin, shares), end in zip(phases, _phase_ends(phases), strict=True)
        )
        if new_share <= 0:
            raise StageError("the new sources have a share of 0", where="new_tokens")
        tokens = stage.new_tokens / new_share
    return round(tokens)


@dataclass(frozen=True)
class _RowLimits:
    """The largest number of rows of each source (`max_passes`), counted over the whole mixture, with skipped steps."""

    seed: int
    sizes: Sequence[int]
    caps: Sequence[int]
    block: int
    first_step: int

    def mixture(self, segments: Sequence[Segment]) -> Mixture:
        return Mixture(self.seed, self.sizes, segments, self.block)

    def count_rows(self, segments: Sequence[Segment], steps: int) -> tuple[int, ...]:
        return tuple(self.mixture(segments).counts((self.first_step + steps) * self.block))

    def find_exhausted_source(self, segments: Sequence[Segment], steps: int) -> int | None:
        """The source that exceeds its limit by the largest factor."""
        counts = self.count_rows(segments, steps)
        exceeding = [k for k, (count, cap) in enumerate(zip(counts, self.caps, strict=True)) if count > cap]
        return max(exceeding, key=lambda k: counts[k] / max(self.caps[k], 1)) if exceeding else None

    def shorten(self, segments: list[Segment], steps: int, *, redistribute: bool) -> tuple[int, list[Segment]]:
        """Stop at the last step within all limits, or redistribute the share of an exhausted source from there on."""
        while self.find_exhausted_source(segments, steps) is not None:
            low, high = 0, steps
            while high - low > 1:
                middle = (low + high) // 2
                fits = self.find_exhausted_source(segments, middle) is None
                low, high = (middle, high) if fits else (low, middle)
            # The skipped steps may already have exhausted a source.
            if not redistribute or self.find_exhausted_source(segments, 0) is not None:
                return low, segments
            begin = (self.first_step + low) * self.block
            counts = self.mixture(segments).counts(begin + self.block)
            exhausted = {k for k, (count, cap) in enumerate(zip(counts, self.caps, strict=True)) if count > cap}
            current = [segment for segment in segments if segment.start <= begin][-1]
            segments = [
                *(segment for segment in segments if segment.start < begin),
                _without_sources(current, begin, exhausted),
                *(_without_sources(segment, segment.start, exhausted) for segment in segments if segment.start > begin),
            ]
        return steps, segments


def _without_sources(segment: Segment, start: int, exhausted: set[int]) -> Segment:
    """The segment from `start` on, with the rates of exhausted sources redistributed in proportion."""
    rates = tuple(0.0 if k in exhausted else rate for k, rate in enumerate(segment.rates))
    if not sum(rates):
        raise DataError(
            "all sources are exhausted before the stage ends",
            where="data",
            hint="raise max_passes, lower the budget, or set data.on_exhausted: stop",
        )
    return Segment(start, tuple(rate / sum(rates) for rate in rates))
