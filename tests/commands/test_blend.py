"""Blending a run: its ends are its own scores, the chosen model is a plain folder with the scores that were shown."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from postgrad.cli.main import app
from postgrad.cli.render import blend_text
from postgrad.commands.blend import Blend, BlendSetChange, blend
from postgrad.commands.export import export_model
from postgrad.commands.pages import write_page
from postgrad.commands.weighted_models import parse_weights
from postgrad.config.stage_file import parse_stage
from postgrad.errors import ModelError, StageError
from postgrad.lineage.record import read_record
from postgrad.plan.plan import make_plan
from postgrad.run.run import run_stage
from tests.conftest import StageOf
from tests.tiny_lineage import LineageRuns


def blended(run: Path, cache: Path, **options: Any) -> Blend:
    return blend(run, **{"weights": [0.0, 0.5, 1.0], **options}, cache=cache)


def by_name(found: Blend) -> dict[str, Mapping[str, BlendSetChange]]:
    return {point.name: point.changes for point in found.points}


@pytest.fixture
def plain(runs: LineageRuns) -> Path:
    """A run that starts from another run's model."""
    return runs.naive


def trained(stage: dict[str, Any], cache: Path) -> Path:
    for _ in run_stage(make_plan(parse_stage(stage, "t"), Path.cwd(), cache), command="t", cache=cache):
        pass
    return Path(stage["output"])


def test_the_ends_are_what_the_run_measured(plain: Path, cache: Path, tmp_path: Path) -> None:
    found = blended(plain, cache)
    write_page(found, tmp_path / "page.html")
    points, recorded = by_name(found), read_record(plain).changes
    for name, change in recorded.items():
        assert points["0"][name].change.difference == 0
        assert points["1"][name].change.difference == pytest.approx(change.difference, abs=1e-5)
        assert points["1"][name].change.low == pytest.approx(change.low, abs=1e-5)
        assert points["0.5"][name].change.difference != pytest.approx(change.difference, abs=1e-4)
    assert "no replacement for replay" in blend_text(found, None)
    assert "Gain against forgetting" in (tmp_path / "page.html").read_text()


def test_the_chosen_model_is_the_plain_mean_of_both(
    runs: LineageRuns, plain: Path, cache: Path, tmp_path: Path
) -> None:
    out = tmp_path / "half"
    found = blended(plain, cache, weight=0.5, out=out)
    assert found.chosen is not None and found.chosen.name == "0.5"
    half, start, end = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (out, runs.first / "model", plain / "model")
    )
    for name, tensor in half.items():
        torch.testing.assert_close(tensor, (start[name] + end[name]) / 2)


def test_a_bound_chooses_what_learnt_most_within_it(plain: Path, cache: Path) -> None:
    found = blended(plain, cache)
    worst = {
        point.name: max(c.change.relative_high for c in point.changes.values() if c.role == "retained")
        for point in found.points
    }
    assert worst["0"] == 0
    order = sorted(worst, key=worst.__getitem__)
    for bound, expected in ((worst[order[-1]] + 1e-9, None), (0.0, {"0"})):
        point = blended(plain, cache, max_forgetting=bound).chosen
        assert point is not None
        chosen = point.name
        within = {name for name, rise in worst.items() if rise <= bound}
        assert chosen in (expected or within)
        learned = {
            p.name: sum(c.change.difference for c in p.changes.values() if c.role == "learned") for p in found.points
        }
        assert chosen == min(within, key=learned.__getitem__)


def test_blocks_are_put_back_one_at_a_time(plain: Path, cache: Path) -> None:
    points = by_name(blended(plain, cache, granularity="block", weights=[1.0]))
    assert set(points) == {"1", "block 0 at 0", "block 0 at 0.5", "block 1 at 0", "block 1 at 0.5"}
    assert points["block 0 at 0"] != points["block 1 at 0"] != points["1"]


def test_the_mean_of_checkpoints_can_be_the_end(plain: Path, cache: Path, tmp_path: Path) -> None:
    blended(plain, cache, average=2, weight=1.0, out=tmp_path / "mean")
    last = sorted((plain / "checkpoints").glob("step-*"))[-2:]
    states = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in last]
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "mean").state_dict()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (states[0][name] + states[1][name]) / 2)
    with pytest.raises(StageError, match="has 2 checkpoints"):
        blended(plain, cache, average=9)


def test_half_a_lora_is_the_adapter_scaled_by_a_half(
    stage_of: StageOf, base: Path, cache: Path, tmp_path: Path
) -> None:
    run = trained(stage_of(tuning={"kind": "lora", "rank": 2}), cache)
    blended(run, cache, weight=0.5, out=tmp_path / "half")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half").state_dict()
    start = AutoModelForCausalLM.from_pretrained(base / "base").state_dict()
    moved = [name for name in half if not torch.equal(half[name], start[name])]
    assert moved and all("proj" in name for name in moved)
    export_model(str(run), tmp_path / "whole", "auto")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").state_dict()
    for name in moved:
        torch.testing.assert_close(half[name], (start[name] + whole[name]) / 2)


def test_blocks_that_were_put_in_between_are_not_taken_for_others(stage_of: StageOf, cache: Path) -> None:
    """Every weight of the start has a namesake of its shape there, in another block."""
    run = trained(stage_of(tuning={"kind": "expand", "positions": [0]}), cache)
    with pytest.raises(ModelError, match=r"their blocks do not correspond"):
        blended(run, cache)


def test_what_is_said_to_come_next_writes_a_model(plain: Path, cache: Path, tmp_path: Path) -> None:
    for i, asked in enumerate(({}, {"max_forgetting": 1.0, "granularity": "block"}, {"weights": [0.25], "average": 2})):
        found = blended(plain, cache, **asked)
        words = shlex.split(blend_text(found, None).rsplit("next: postgrad ", 1)[1])
        words[-1] = str(tmp_path / str(i))
        result = CliRunner().invoke(app, words, env={"POSTGRAD_CACHE": str(cache)}, catch_exceptions=False)
        assert result.exit_code == 0 and f"wrote {words[-1]}" in result.output


@pytest.mark.parametrize("words", [["--average", "0"], ["--max-forgetting", ""]])
def test_options_that_say_nothing_are_not_passed_over(plain: Path, words: list[str]) -> None:
    result = CliRunner().invoke(app, ["blend", str(plain), *words])
    assert result.exit_code and words[0] in str(result.exception) + result.output


def test_what_cannot_be_blended_or_asked_is_said(
    runs: LineageRuns, plain: Path, stage_of: StageOf, cache: Path, tmp_path: Path
) -> None:
    run = trained(stage_of(tuning={"kind": "prompt", "length": 2}), cache)
    with pytest.raises(StageError, match="is no weight delta"):
        blended(run, cache)
    with pytest.raises(StageError, match="no retained set"):
        blended(runs.first, cache)
    for options, says in (
        ({"weights": [0.5, 1.5]}, "is not a weight between"),
        ({"granularity": "layer"}, "no granularity"),
        ({"weight": 0.3}, "not among the weights"),
        ({"out": tmp_path / "x"}, "no model is chosen"),
        ({"out": tmp_path, "weight": 0.5}, "already exists"),
        ({"out": tmp_path / "x", "max_forgetting": -0.5}, "no point keeps within"),
    ):
        with pytest.raises(StageError, match=says):
            blended(plain, cache, **options)
    with pytest.raises(StageError, match="not a list of weights"):
        parse_weights("0;1")
