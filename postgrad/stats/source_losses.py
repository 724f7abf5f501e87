"""The change of each source's training loss over a stage, from the lines of metrics.

A source's first and last loss are means over the first and the last tenth of its own trained tokens. These are losses of rows
at the time they were trained on, so they show what was learnt of a source only where its rows do not repeat; and training on
one source changes the losses of the others. Held-out sets have neither problem.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

EDGE_SHARE = 0.1
"""The share of a source's trained tokens in its first, and in its last, loss."""
MIN_TOKENS = 1_000_000
"""The fewest trained tokens of a source with a change per million: the fast first steps of a run do not extrapolate (from
100,000 tokens the change per million can exceed the loss itself)."""


def losses_by_source(steps: Iterable[Mapping[str, tuple[float, int]]]) -> dict[str, dict[str, float]]:
    """Of each source: `first_tenth` and `last_tenth`, losses in nats per trained token; their `change` with its 95 % interval
    (`low`, `high`, where there are two steps in each tenth) and `change_per_million_tokens` (from `MIN_TOKENS`); and
    `share_of_loss`, its share of all nats.

    The mean of a tenth is a ratio of sums over m steps, sum(n) / sum(t); its variance is taken to be
    m / (m - 1) sum((n - mean t)^2) / sum(t)^2 (Cochran 1977, Sampling Techniques, chapter 6, without the correction for
    finite populations), and the interval is 1.96 standard errors of the difference to either side.
    """
    by_source: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for row in steps:
        for name, (nats, tokens) in row.items():
            by_source[name].append((nats, tokens))
    sums = {name: float(np.sum([nats for nats, _ in steps])) for name, steps in by_source.items()}
    total = sum(sums.values())
    return {
        name: {**_loss_change(steps), "share_of_loss": sums[name] / total if total else 0.0}
        for name, steps in by_source.items()
    }


def _loss_change(steps: list[tuple[float, int]]) -> dict[str, float]:
    nats, tokens = (np.array(column, np.float64) for column in zip(*steps, strict=True))
    until = np.cumsum(tokens)
    edge = EDGE_SHARE * until[-1]
    begin, end = until - tokens < edge, until > until[-1] - edge
    (first, first_variance), (last, last_variance) = (
        _mean_and_variance(nats[part], tokens[part]) for part in (begin, end)
    )
    change = last - first
    result = {"first_tenth": first, "last_tenth": last, "change": change}
    if until[-1] >= MIN_TOKENS:
        between = (1 - EDGE_SHARE) * until[-1]  # from the middle of the first tenth to that of the last
        result["change_per_million_tokens"] = 1e6 * change / between
    spread = 1.96 * (first_variance + last_variance) ** 0.5
    return result if np.isnan(spread) else {**result, "low": change - spread, "high": change + spread}


def _mean_and_variance(nats: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """A mean per token and its variance; NaN for a single step."""
    mean, count = float(nats.sum() / tokens.sum()), len(nats)
    if count < 2:
        return mean, float("nan")
    return mean, float(count / (count - 1) * np.square(nats - mean * tokens).sum() / tokens.sum() ** 2)
