"""Forgetting: paired loss changes with intervals, and the transfer matrix of a lineage (ACC, BWT, FWT, FM).

Losses are nats per token; *scores* are losses with their sign turned, so that higher is better. Numpy only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from postgrad.stats.bootstrap import ratio_interval

Verdict = Literal["learnt", "kept", "forgot", "no evidence"]

KEPT_MARGIN = 0.01
"""A loss is *kept* when the whole interval of its relative change lies within this share."""

MIN_LOSS = 1e-12
"""A smaller loss counts as this one in a relative change: a rise from zero is large, and no error."""

MIN_DOCUMENTS = 20
"""With fewer documents than this, the bootstrap resamples windows of text."""


@dataclass(frozen=True)
class LossChange:
    """How a set's loss changed between two models, on the same units of text."""

    difference: float
    """After minus before, nats per token; above zero is forgetting."""
    low: float | None
    """None of a single unit, which has no interval; so is `high`."""
    high: float | None
    relative: float
    """The difference as a share of the loss before."""
    relative_high: float
    """The upper end as a share of the loss before; without an interval, `relative`."""
    share_of_range: float | None
    """The difference as a share of the range from the loss before to that of a uniform guess, ln V; None for a model
    that was worse than such a guess, which has no such range."""
    bits_per_byte_difference: float
    units: Literal["documents", "windows"]
    count: int
    verdict: Verdict


def paired_change(
    before: np.ndarray,
    after: np.ndarray,
    tokens: np.ndarray,
    *,
    total_bytes: int,
    vocabulary: int,
    units: Literal["documents", "windows"] = "documents",
    seed: int = 0,
) -> LossChange:
    """Compare summed nats per unit (`before`, `after`) on the same units of `tokens` scored tokens each.

    The interval is a paired bootstrap over units (Miller 2024, arXiv 2411.00640): the difficulty of a document cancels, so
    small changes show.
    """
    total = float(tokens.sum())
    loss_before = float(before.sum()) / total
    difference = float(after.sum() - before.sum()) / total
    low, high = ratio_interval(after - before, tokens, seed)
    return LossChange(
        difference=difference,
        low=low,
        high=high,
        relative=difference / max(loss_before, MIN_LOSS),
        relative_high=(difference if high is None else high) / max(loss_before, MIN_LOSS),
        share_of_range=difference / spare if (spare := math.log(vocabulary) - loss_before) > 0 else None,
        bits_per_byte_difference=difference * total / (math.log(2) * max(total_bytes, 1)),
        units=units,
        count=len(tokens),
        verdict=loss_verdict(low, high, loss_before),
    )


def loss_verdict(low: float | None, high: float | None, loss_before: float) -> Verdict:
    """The verdict that an interval of a loss change supports."""
    if low is None or high is None:
        return "no evidence"
    return score_verdict(-high, -low, loss_before)


def score_verdict(low: float | None, high: float | None, scale: float) -> Verdict:
    """The verdict that an interval of the change of a score supports; higher is better. `scale`: what 1 % is of."""
    if low is None or high is None:
        return "no evidence"
    if -KEPT_MARGIN * scale <= low and high <= KEPT_MARGIN * scale:
        return "kept"
    return "learnt" if low > 0 else "forgot" if high < 0 else "no evidence"


@dataclass(frozen=True)
class TransferSummary:
    """The usual four numbers of a matrix of scores, with the denominators that were used."""

    accuracy: float | None
    backward_transfer: float | None
    forward_transfer: float | None
    forgetting: float | None
    denominators: dict[str, str]


def summarize_scores(scores: np.ndarray, learnt_at: list[int]) -> TransferSummary:
    """Summarise `scores[i, j]`: stage i (0: the start model) on set j, higher is better.

    `learnt_at[j]` is the stage that trained on the text of set j (0: the start model already knew it). With T the last
    stage (Lopez-Paz & Ranzato 2017, arXiv 1706.08840; Chaudhry et al. 2018, arXiv 1801.10112):

        ACC = mean_j R[T, j]
        BWT = mean over sets learnt before T of  R[T, j] - R[learnt_at[j], j]
        FWT = mean over sets learnt after the start of  R[learnt_at[j] - 1, j] - R[0, j], without the first stage
              (nothing was learnt before it that could have helped)
        FM  = mean over sets learnt before T of  max_{l < T} R[l, j] - R[T, j]

    Codes differ in what they divide by (GEM's own divides BWT by T, counting a zero), so the counts are returned.
    Terms with unknown cells (NaN) are dropped.
    """
    last = len(scores) - 1
    old = [j for j, stage in enumerate(learnt_at) if stage < last]
    ahead = [j for j, stage in enumerate(learnt_at) if stage >= 2]
    backward = _drop_nan([scores[last, j] - scores[learnt_at[j], j] for j in old])
    forward = _drop_nan([scores[learnt_at[j] - 1, j] - scores[0, j] for j in ahead])
    # fmax ignores NaN, and is NaN only when all cells are.
    best = _drop_nan([np.fmax.reduce(scores[:last, j]) - scores[last, j] for j in old])
    final = _drop_nan(list(scores[last]))

    def mean(values: list[float]) -> float | None:
        return float(np.mean(values)) if values else None

    return TransferSummary(
        accuracy=mean(final),
        backward_transfer=mean(backward),
        forward_transfer=mean(forward),
        forgetting=mean(best),
        denominators={
            "ACC": f"{_format_set_count(final)}",
            "BWT": f"{_format_set_count(backward)} learnt before the last stage",
            "FWT": f"{_format_set_count(forward)} learnt in stage 2 or later",
            "FM": f"{_format_set_count(best)} learnt before the last stage",
        },
    )


def _format_set_count(values: list[float]) -> str:
    return f"{len(values)} set{'s' * (len(values) != 1)}"


def _drop_nan(values: list[float]) -> list[float]:
    return [float(v) for v in values if not np.isnan(v)]
