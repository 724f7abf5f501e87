"""The law through a study's shares of replay goes through what was measured, also where nothing was forgotten; the loss by
trained tokens goes on from part to part."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from postgrad.studies import results as found_in
from postgrad.studies.results import REPLAY_LAW, _fit_rise, _loss_curves

SHARES = [0.0, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5]
BASE = 4.8


def measured(noise: float = 0.0) -> list[dict]:
    """Arms of a base that learns from its replay: at half of it, the loss on old text falls below the base's."""
    rise = 1.4 / (1 + 60 * np.array(SHARES)) ** 0.8 - 0.25
    rise += np.random.default_rng(0).normal(0, noise, len(rise))
    assert rise[-1] < 0 < rise[0]
    return [
        {"share": share, "change": {"old": {"value": y}}, "loss": {"old": {"value": BASE + y}}}
        for share, y in zip(SHARES, rise.tolist(), strict=True)
    ]


def off(line: list[list[float]], points: list[dict]) -> float:
    """By how many nats the line misses the worst of the points."""
    at = {round(x, 6): y for x, y, *_ in line}
    return max(abs(at[round(p["share"], 6)] - p["change"]["old"]["value"]) for p in points)


def test_the_law_goes_through_every_share_also_where_the_old_text_gains() -> None:
    points = measured()
    found = _fit_rise(points)
    assert found is not None and found["law"] == REPLAY_LAW.name
    assert off(found["line"], points) < 0.005
    assert found["values"]["F"] - found["values"]["G"] == pytest.approx(1.4 - 0.25, abs=0.005)
    # The mutant: without the gain of going on, no parameters go through a rise below zero.
    held = [[x, *(max(y, 0.0) for y in ys)] for x, *ys in found["line"]]
    assert off(held, points) > 0.05


def test_the_interval_of_a_noisy_law_holds_most_of_what_it_was_made_of() -> None:
    points, true = measured(noise=0.01), measured()
    found = _fit_rise(points)
    assert found is not None
    spans = {round(x, 6): (low, high) for x, _, low, high in found["line"]}
    inside = [
        spans[round(p["share"], 6)][0] <= p["change"]["old"]["value"] <= spans[round(p["share"], 6)][1] for p in true
    ]
    assert sum(inside) >= len(true) - 1
    assert all(high - low < 0.2 for low, high in spans.values())


def test_too_few_shares_are_no_law() -> None:
    assert _fit_rise(measured()[:4]) is None


def test_a_part_begins_where_the_one_before_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds of two parts of 100 and 200 tokens, with a blend between, which trains nothing; by hand."""
    looks = {  # steps of the part and losses; the seeds need another number of steps for the same tokens
        "one-0": [(5, 1.0), (10, 2.0)],
        "two-0": [(10, 3.0), (20, 4.0)],
        "one-1": [(5, 1.2), (10, 2.2)],
        "two-1": [(3, 9.0), (9, 3.2), (18, 4.2)],
    }
    steps = {"blend": SimpleNamespace(kind="blend", slug="blend")}
    for slug, rows in looks.items():
        steps[slug] = SimpleNamespace(kind="train", slug=slug)
        (tmp_path / slug).mkdir()
        told: list[dict[str, Any]] = [
            {
                "kind": "evaluation",
                "step": step,
                "trained_tokens": step,
                "sets": {"old": {"nats": nats, "change": 0.0, "low": 0.0, "high": 0.0}},
            }
            for step, nats in rows
        ]
        told.insert(1, {"kind": "step", "step": 1, "trained_tokens": 1, "loss": 7.0, "learning_rate": 0.1})
        (tmp_path / slug / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    folder = SimpleNamespace(step_path=lambda step: tmp_path / step.slug)
    prepared = SimpleNamespace(graph=SimpleNamespace(steps=steps), folder=folder)
    tokens = {"one": 100, "two": 200}
    monkeypatch.setattr(
        found_in,
        "_read_step_record",
        lambda _, key: SimpleNamespace(id="", status="stopped", plan=SimpleNamespace(tokens=tokens[key.split("-")[0]])),
    )
    curve = _loss_curves(prepared, [["one-0", "blend", "two-0"], ["one-1", "blend", "two-1"]])  # type: ignore[arg-type]
    assert curve["switches"] == [0, 100]
    # The look at a sixth of the second part is one seed's alone.
    assert [x for x, _ in curve["sets"]["old"]] == [50, 100, 200, 300]
    assert [y for _, y in curve["sets"]["old"]] == pytest.approx([1.1, 2.1, 3.1, 4.1])
