"""The training loss of each source: by hand, its interval against resampling, and in a run and its reports."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from postgrad.lineage.metrics import read_metrics
from postgrad.reports.sections import curves
from postgrad.reports.sections.mixture_section import source_losses_table
from postgrad.run.summary import summary_text
from postgrad.stats.source_losses import losses_by_source
from tests.reports.conftest import as_record, draw_run, make_record
from tests.run.test_task_stages import mixed
from tests.tiny_stages import QUICK_EVALUATION, Workspace, make_workspace


def test_first_and_last_by_hand() -> None:
    """Twenty steps of 100k tokens: a tenth is two steps, 4 and 2 nats per token at the beginning, 1 and 2 at the end."""
    nats = [400e3, 200e3, *[150e3] * 16, 100e3, 200e3]
    steps = [{"a": (n, 100_000), **({"b": (50e3, 50_000)} if i % 2 else {})} for i, n in enumerate(nats)]
    found = losses_by_source(steps)
    a = found["a"]
    assert (a["first_tenth"], a["last_tenth"], a["change"]) == (3.0, 1.5, -1.5)
    # In 10,000s: (2 / 1) (10^2 + 10^2) / 20^2 = 1 and (2 / 1) (5^2 + 5^2) / 20^2 = 1/4.
    assert a["high"] - a["change"] == pytest.approx(1.96 * 1.25**0.5)
    assert a["change"] - a["low"] == pytest.approx(1.96 * 1.25**0.5)
    assert a["change_per_million_tokens"] == pytest.approx(-1.5 / 1.8)
    assert a["share_of_loss"] == pytest.approx(sum(nats) / (sum(nats) + 500e3))
    assert found["b"] == {
        "first_tenth": 1.0,
        "last_tenth": 1.0,
        "change": 0.0,
        "share_of_loss": pytest.approx(50 / 380),
    }  # 500k tokens do not say what a million would do


def test_tokens_weigh_not_steps() -> None:
    """The mutant: a mean of the steps' means would be 2.5 at the beginning."""
    steps = [{"a": (n, t)} for n, t in [(4.0, 1), (9.0, 9), *[(80.0, 80)], (20.0, 10)]]
    assert losses_by_source(steps)["a"]["first_tenth"] == pytest.approx(1.3)


def test_the_interval_is_that_of_resampled_steps() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 60, 4000)
    nats = tokens * rng.normal(2.0, 0.5, 4000)
    found = losses_by_source({"a": (float(n), int(t))} for n, t in zip(nats, tokens, strict=True))["a"]
    until, edge = tokens.cumsum(), tokens.sum() / 10

    def drawn(part: np.ndarray) -> np.ndarray:
        chosen = rng.choice(np.flatnonzero(part), (2000, int(part.sum())))
        return nats[chosen].sum(1) / tokens[chosen].sum(1)

    change = drawn(until > until[-1] - edge) - drawn(until - tokens < edge)
    low, high = np.quantile(change, [0.025, 0.975])
    assert found["high"] - found["low"] == pytest.approx(high - low, rel=0.1)


def test_no_source_is_no_loss() -> None:
    assert losses_by_source([]) == {} and losses_by_source([{}]) == {}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("shelf"), tmp_path_factory.getbasetemp() / "cache")


def test_a_mixed_stage_tells_each_source(shelf: Workspace) -> None:
    done = shelf.run(mixed(shelf, "llama", objectives=[]))
    steps = read_metrics(done.run_folder / "metrics.jsonl").steps
    wanted = losses_by_source(row.loss_sums_by_source for row in steps)
    sources = {source.name: source for source in done.record.totals.sources}
    losses = {name: source.loss.as_json() for name, source in sources.items() if source.loss}
    assert losses == json.loads(json.dumps(wanted))
    assert wanted["a"]["first_tenth"] == pytest.approx(
        steps[0].loss_sums_by_source["a"][0] / steps[0].loss_sums_by_source["a"][1], rel=0.5
    )
    assert wanted["a"]["change"] < 0 and wanted["old"]["change"] < 0
    text = summary_text(done)
    assert "Sources of the mixture" in text
    for name in sources:
        (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ") and "%" in line]
        assert f"{wanted[name]['first_tenth']:.3f}" in line and f"{sources[name].share:.1%}"[:-1] in line
    html = (done.run_folder / "report.html").read_text()
    assert "Sources of the mixture" in html and f'<data value="{wanted["old"]["last_tenth"]!r}">' in html
    # A single source has nothing to be held against.
    alone = shelf.run(
        shelf.stage(
            "alone",
            sources=[shelf.source("new")],
            evaluation={**QUICK_EVALUATION, "learned": [shelf.file("new", held_out=True)]},
        )
    )
    assert alone.record.totals.sources[0].loss is not None and source_losses_table(alone.record) is None
    assert "Sources of the mixture" not in summary_text(alone)


def many(count: int) -> tuple[dict[str, object], list[dict[str, object]]]:
    names = [f"source-{i}" for i in range(count)]
    losses = {
        "first_tenth": 3.0,
        "last_tenth": 2.0,
        "change": -1.0,
        "change_per_million_tokens": -5.0,
        "share_of_loss": 1 / count,
    }
    planned = [{"name": name, "role": "new", "share": 1 / count} for name in names]
    record = {
        **make_record("many"),
        "plan": {"steps": 8, "tokens": 800, "sources": planned},
        "totals": {"sources": [{**source, "loss": losses} for source in planned]},
        "token_ledger": {name: {"placed": 10} for name in names},
    }
    steps: list[dict[str, object]] = [
        {
            "kind": "step",
            "step": step,
            "trained_tokens": 100 * step,
            "loss": 3 - step / 10,
            "learning_rate": 1e-3,
            "loss_sums_by_source": {name: [(3 - step / 10) * (9 + i), 9 + i] for i, name in enumerate(names)},
        }
        for step in range(1, 9)
    ]
    return record, steps


@pytest.mark.parametrize("count", [2, 7, 9, 12, 15])
def test_the_page_draws_all_sources_or_says_how_many_it_does_not(count: int) -> None:
    record, steps = many(count)
    html = draw_run(record, steps)
    chart = html[html.index("Training loss</figcaption>" if count < 0 else "Training loss<small>") :].split(
        "</figure>"
    )[0]
    wide = chart[: chart.index('<div class="narrow">')]
    drawn = [i for i in range(count) if f"source-{i}<" in wide or f"source-{i} " in wide or f"source-{i}," in wide]
    left = max(0, count - curves.MAX_SERIES)
    assert len(drawn) == count - left and set(range(left, count)) == set(drawn)  # the largest
    assert (f"{left} sources with fewer tokens are in the table only." in chart) == (left > 0)
    assert (f"{left} more sources are in the table only." in html) == (left > 0)
    table = html[html.index("Sources of the mixture") :].split("</table>")[0]
    assert all(f"source-{i}<" in table for i in range(count))


def test_a_record_of_before_is_still_a_page(tmp_path: Path) -> None:
    record, steps = many(3)
    for source in record["totals"]["sources"]:  # type: ignore[index]
        source.pop("loss")
    assert source_losses_table(as_record(record)) is None and "Sources of the mixture" not in draw_run(record, steps)
