"""How did the training loss of each source move? From the lines of metrics, for sources that are mixed in one stage.

A source's loss at its beginning and at its end are means over the first and the last tenth of its own trained tokens. They are
of rows as they were met, so they say what was learnt of a source only where its rows do not repeat; and what is learnt from
one source moves the others too. Of held-out text nothing of that is so: that is what `evaluation` is for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

EDGE_SHARE = 0.1
"""The share of a source's trained tokens that its first loss, and its last, is the mean of."""
MIN_TOKENS = 1_000_000
"""Of how many trained tokens of a source its change is told per million: what fewer bring is of the first, fast steps of a
run, and so often as much again would not come (of 100,000 tokens it can be more than the loss itself)."""


def losses_by_source(steps: Iterable[Mapping[str, tuple[float, int]]]) -> dict[str, dict[str, float]]:
    """For each source: `first` and `last` loss in nats per trained token, their `change` with its 95 % interval (`low`, `high`,
    where there are two steps in each tenth), `per_million`, the change per million of its trained tokens (of `LEAST` or more),
    and `share`, the part of all nats that it makes up.

    The mean of a tenth is a ratio of sums over m steps, sum(n) / sum(t); its variance is taken to be
    m / (m - 1) sum((n - mean t)^2) / sum(t)^2 (Cochran 1977, Sampling Techniques, chapter 6, without the correction for
    finite populations), and the interval is 1.96 standard errors of the difference to either side.
    """
    met: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for row in steps:
        for name, (nats, tokens) in row.items():
            met[name].append((nats, tokens))
    sums = {name: float(np.sum([nats for nats, _ in steps])) for name, steps in met.items()}
    whole = sum(sums.values())
    return {
        name: {**_loss_change(steps), "share_of_loss": sums[name] / whole if whole else 0.0}
        for name, steps in met.items()
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
    found = {"first_tenth": first, "last_tenth": last, "change": change}
    if until[-1] >= MIN_TOKENS:
        between = (1 - EDGE_SHARE) * until[-1]  # from the middle of the first tenth to that of the last
        found["change_per_million_tokens"] = 1e6 * change / between
    spread = 1.96 * (first_variance + last_variance) ** 0.5
    return found if np.isnan(spread) else {**found, "low": change - spread, "high": change + spread}


def _mean_and_variance(nats: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """A mean per token and its variance, which is not known of a single step."""
    mean, count = float(nats.sum() / tokens.sum()), len(nats)
    if count < 2:
        return mean, float("nan")
    return mean, float(count / (count - 1) * np.square(nats - mean * tokens).sum() / tokens.sum() ** 2)
