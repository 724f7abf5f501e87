"""Advice: pilots of a stage as runs, the stage that is written from them, and what cannot be advised."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from postgrad.analysis.pilot_runs import Setting
from postgrad.cli.main import app
from postgrad.commands.advise import (
    Advice,
    AdvicePlan,
    AdviceRequest,
    apply_setting,
    pilot_stage,
    plan_advice,
    run_advice,
    run_pilots,
)
from postgrad.commands.pilot_stages import MAX_WARMUP_SHARE, pilots_folder, scale_schedule
from postgrad.config.stage_file import load_stage
from postgrad.errors import StageError
from postgrad.plan.plan import make_plan
from postgrad.run.events import InfoMessage, PhaseStarted, RunFinished, RunStarted, RunStopped
from postgrad.stats import bootstrap
from tests.tiny_stages import LENGTH, Workspace, make_workspace

STEP = 4 * LENGTH


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A model that has learnt the old text, and is to learn the new."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "DRAWS", 200)
        made = make_workspace(tmp_path_factory.mktemp("advise"), tmp_path_factory.getbasetemp() / "cache")
        evaluation = {**made.text_evaluation, "retained": [], "learned": [made.file("old", held_out=True)]}
        made.run(made.stage("base", sources=[made.source("old")], tokens=20 * STEP, evaluation=evaluation))
        yield made


def written(shelf: Workspace, name: str, **changes: Any) -> Path:
    """A stage file of 600 steps, by 4 rows."""
    raw = shelf.stage(name, model="runs/base", tokens=600 * STEP, **changes)
    raw["data"] |= {"on_exhausted": "repeat"}
    raw["schedule"] = changes.get("schedule", {"kind": "rewarm", "peak": 1e-2, "floor": 1e-3, "warmup": "30 steps"})
    place = shelf.folder / f"{name}.yaml"
    place.write_text(yaml.safe_dump(raw, sort_keys=False))
    return place


def wish(stage: Path, **changes: Any) -> AdviceRequest:
    return AdviceRequest(**{"stage": stage, "bound": 0.9, "pilot_count": 4, **changes})


def carried_out(asked: AdvicePlan) -> tuple[Advice, int]:
    """What is written, and how many pilots were run for it."""
    events = list(run_advice(asked, "test"))
    assert isinstance(events[-1], Advice)
    return events[-1], sum(isinstance(event, RunStarted) for event in events)


def test_a_stage_is_advised_and_the_same_command_goes_on(shelf: Workspace) -> None:
    place = written(shelf, "whole")
    asked = plan_advice(wish(place), shelf.cache)
    # Stopped after its first pilot.
    for event in run_pilots(asked, "test"):
        if isinstance(event, RunFinished):
            break
    found, runs = carried_out(asked)
    assert runs == 3  # the first is taken as it is
    stage = load_stage(shelf.folder / "whole-advised.yaml")
    assert stage.name == "whole-advised" and stage.output == str(shelf.folder / "runs" / "whole") + "-advised"
    assert stage.max_forgetting == 0.9 and stage.tokens == 600 * STEP
    assert stage.resolve_shares() == pytest.approx((1 - found.setting.share, found.setting.share))
    assert stage.schedule.peak == pytest.approx(found.setting.peak, rel=1e-2)  # type: ignore[union-attr]
    assert stage.schedule.floor == pytest.approx(found.setting.peak / 10, rel=1e-2)  # type: ignore[union-attr]
    assert stage.schedule.warmup == "30 steps"  # type: ignore[union-attr]
    assert make_plan(stage, shelf.folder, shelf.cache).steps == pytest.approx(asked.plan.steps, rel=0.02)
    # What is said of it: the cost, an interval around every loss, a bound that the upper end of most runs keeps.
    assert found.pilot_tokens < 0.1 * found.run_tokens
    for told in (
        *found.retained_losses.values(), *found.retained_rises.values(), *found.learned_losses.values(),
    ):  # fmt: skip
        assert told.low <= told.value <= told.high
    assert found.retained_rises["old-heldout"].value < 0.9
    even, setting = found.break_even, found.setting
    assert even.share / even.peak <= setting.share / setting.peak  # what is surer costs more
    assert any("times as long as the longest pilot" in warning for warning in found.warnings)
    assert [item.pilot.tokens for item in found.pilots][-1] == max(item.pilot.tokens for item in found.pilots)
    # Nothing is left of the pilots but what they showed.
    left = [p.name for p in pilots_folder(asked.plan).rglob("*.safetensors")]
    assert not left and len(list(pilots_folder(asked.plan).glob("*/record.json"))) == 4
    # Another bound takes what is there, and at most one new pilot; the old file was ours and is written anew.
    again, runs = carried_out(plan_advice(wish(place, bound=1.0), shelf.cache))
    assert runs <= 1 and again.setting.share <= found.setting.share + 0.002
    assert again.pilots[:3] == found.pilots[:3]


def test_a_wish_to_stop_is_heard_when_nothing_is_left_to_train(shelf: Workspace) -> None:
    asked = plan_advice(wish(written(shelf, "stopped")), shelf.cache)
    events = []
    for event in run_pilots(asked, "test"):
        events.append(event)
        if isinstance(event, PhaseStarted) and "trained model" in event.message:
            os.kill(os.getpid(), signal.SIGTERM)
    # The pilot that was going on is finished, and no other is begun.
    assert isinstance(events[-1], RunStopped) and sum(isinstance(event, RunFinished) for event in events) == 1
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert carried_out(asked)[1] == 3


def test_a_pilot_is_the_stage_in_small(shelf: Workspace) -> None:
    place = written(shelf, "small", penalties=[{"kind": "anchor", "strength": 1e-3}])
    asked = plan_advice(wish(place), shelf.cache)
    pilot = asked.exploring_pilots[2]
    stage = pilot_stage(asked, pilot)
    plan = make_plan(stage, shelf.folder, shelf.cache)
    assert plan.tokens == pytest.approx(pilot.tokens, rel=0.1)
    assert plan.as_record().sources[1].share == pytest.approx(pilot.setting.share, abs=0.05)
    # Every rate is scaled.
    spec = stage.schedule.model_dump()
    assert spec["peak"] == pilot.setting.peak == 0.4e-2 and spec["floor"] == pytest.approx(0.4e-3)
    assert stage.penalties == asked.stage.penalties and stage.seed == asked.stage.seed
    # What is measured is the whole sets, as before and after the run.
    assert {h.name for h in plan.evaluation.sets} == {h.name for h in asked.plan.evaluation.sets}
    assert asked.exploring_pilots[0] != pilot and pilot_stage(asked, asked.exploring_pilots[0]).name != stage.name


def test_the_warm_up_of_a_pilot_is_one(shelf: Workspace) -> None:
    """It has the steps of the stage's as far as they tame Adam, most of the pilot remains, never fewer than its fraction."""
    asked = plan_advice(wish(written(shelf, "warm")), shelf.cache)  # 30 steps of about 600
    lengths = {steps: number(scale_schedule(asked.plan, 1.0, steps)["warmup"]) * steps for steps in (9, 20, 200, 590)}
    assert lengths == pytest.approx({9: 9 * MAX_WARMUP_SHARE, 20: 5, 200: 20, 590: 30}, rel=0.02)
    mutant = {steps: steps * 30 / asked.plan.steps for steps in lengths}  # as it was: no warm-up in a short pilot
    assert mutant[9] < mutant[20] < 1
    none = written(shelf, "warm", schedule={"kind": "constant", "peak": 1e-2, "warmup": 0})
    assert number(scale_schedule(plan_advice(wish(none), shelf.cache).plan, 1.0, 20)["warmup"]) == 0


def number(value: float | str, steps: int = 0) -> float:
    """A rate, or a length as a part of so many steps."""
    if isinstance(value, str):
        return float(value[:-1]) / 100 if value.endswith("%") else float(value.removesuffix(" steps")) / steps
    return value


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        (
            {"kind": "infinite", "peak": 1e-2, "constant": 5e-3, "floor": 1e-3},
            {"peak": 5e-3, "constant": 2.5e-3, "floor": 5e-4, "warmup": "1%", "constant_until": "85%"},
        ),
        (
            {"kind": "wsd", "peak": 1e-2, "floor": 1e-3, "decay": "60 steps"},
            {"peak": 5e-3, "floor": 5e-4, "decay": "60 steps"},
        ),
        ({"kind": "from-floor", "start": 1e-2, "floor": 0}, {"start": 5e-3, "floor": 0.0}),
        ({"kind": "anneal", "start": 1e-2, "floor": 1e-3}, {"start": 5e-3, "floor": 5e-4}),
        ({"kind": "constant", "peak": 1e-2, "warmup": 0}, {"peak": 5e-3, "warmup": "0%"}),
    ],
)
def test_every_schedule_keeps_its_shape(shelf: Workspace, schedule: dict[str, Any], rates: dict[str, Any]) -> None:
    asked = plan_advice(wish(written(shelf, "shapes", schedule=schedule)), shelf.cache)
    found = scale_schedule(asked.plan, 0.5, asked.plan.steps)
    assert {key: number(found[key]) for key in rates} == pytest.approx(
        {key: number(value, asked.plan.steps) for key, value in rates.items()}, rel=1e-4
    )
    # In the stage that is written, lengths stay as they were, and what was left out stays out.
    assert scale_schedule(asked.plan, 0.5).keys() == schedule.keys()
    pieces = {"kind": "piecewise", "pieces": [{"shape": "linear", "start": 0.0, "end": 1e-2, "length": "60 steps"}]}
    pieces["pieces"].append({"shape": "constant", "start": 1e-2})  # type: ignore[attr-defined]
    asked = plan_advice(wish(written(shelf, "shapes", schedule=pieces)), shelf.cache)
    first, second = scale_schedule(asked.plan, 0.5, asked.plan.steps)["pieces"]
    assert (first["end"], second["start"]) == (5e-3, 5e-3)
    assert number(first["length"]) == pytest.approx(number("60 steps", asked.plan.steps), rel=1e-4)


def test_shares_are_parted_by_role_and_keep_their_proportions(shelf: Workspace) -> None:
    sources = [
        shelf.source("new", share=0.6),
        {**shelf.source("new", share=0.2), "name": "more"},
        shelf.source("old", share=0.15, role="replay"),
        {**shelf.source("old", share=0.05, role="replay"), "name": "older"},
    ]
    asked = plan_advice(wish(written(shelf, "four", sources=sources)), shelf.cache)
    made = apply_setting(asked.raw, asked, Setting(0.4, 1e-2))
    assert [source["share"] for source in made["data"]["sources"]] == pytest.approx([0.45, 0.15, 0.3, 0.1])
    # With `new_tokens` the budget grows with the replay.
    new = written(shelf, "additive", new_tokens=500 * STEP)
    raw = yaml.safe_load(new.read_text())
    del raw["tokens"]
    new.write_text(yaml.safe_dump(raw))
    asked = plan_advice(wish(new), shelf.cache)
    assert asked.run_tokens(Setting(0.5, 1e-2)) == 1000 * STEP
    assert apply_setting(asked.raw, asked, Setting(0.5, 1e-2))["new_tokens"] == 500 * STEP
    assert make_plan(pilot_stage(asked, asked.exploring_pilots[0]), shelf.folder, shelf.cache).steps < 30


def test_replay_can_be_named_on_the_command_line(shelf: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    place = written(shelf, "alone", sources=[shelf.source("new")])
    with pytest.raises(StageError, match="no source is replayed"):
        plan_advice(wish(place), shelf.cache)
    asked = plan_advice(wish(place, replay=shelf.file("old")), shelf.cache)
    assert asked.stage.resolve_shares() == pytest.approx((0.9, 0.1)) and asked.stage.data.sources[1].role == "replay"
    # Written into the stage as seen from its folder, wherever the command was given.
    assert asked.raw["data"]["sources"][1]["path"] == "old.jsonl"
    with pytest.raises(StageError, match="a share such as 5%"):
        plan_advice(wish(place, overrides=("data.sources.new.share=much",), replay=shelf.file("old")), shelf.cache)
    given = written(shelf, "alone", sources=[shelf.source("new", share="100%")])
    asked = plan_advice(wish(given, replay=shelf.file("old")), shelf.cache)
    assert asked.stage.resolve_shares() == pytest.approx((0.9, 0.1))


def test_replay_text_that_is_short_limits_the_share(shelf: Workspace) -> None:
    sources = [shelf.source("new", share=0.9), shelf.source("old", share=0.1, role="replay", max_passes=1)]
    place = written(shelf, "short", sources=sources)
    plenty = plan_advice(wish(place), shelf.cache)
    assert plenty.max_share == 0.75
    raw = yaml.safe_load(place.read_text())
    raw["data"]["on_exhausted"] = "renormalise"
    place.write_text(yaml.safe_dump(raw))
    asked = plan_advice(wish(place), shelf.cache)
    available = asked.plan.as_record().sources[1].available_tokens
    assert asked.max_share == pytest.approx(0.98 * available / asked.plan.tokens, rel=0.01)


def test_a_bound_that_no_pilot_can_satisfy_says_the_best_reachable(shelf: Workspace) -> None:
    place = written(shelf, "whole")  # whose pilots are there
    result = CliRunner().invoke(
        app,
        ["advise", str(place), "--max-forgetting", "0.001%", "--pilots", "4"],
        env={"POSTGRAD_CACHE": str(shelf.cache)},
    )
    error = result.exception
    assert isinstance(error, StageError) and "keeps the rise on old-heldout within 0.001%" in str(error)
    reachable = float(str(error).split("expected: ")[1].split("%")[0])
    assert reachable > 0.001 and "best reachable is a rise of" in str(error)


def test_what_cannot_be_advised_is_refused(shelf: Workspace) -> None:
    shifts = [{"at": "50%", "shares": {"new": 0.5, "old": 0.5}}]
    with pytest.raises(StageError, match="the shares change within the stage"):
        plan_advice(wish(written(shelf, "bad", data={"curriculum": shifts})), shelf.cache)
    with pytest.raises(StageError, match="no retained set is measured"):
        evaluation = {**shelf.text_evaluation, "retained": []}
        sources = [shelf.source("new", share=0.75), shelf.source("old", share=0.25, role="replay", held_out=0)]
        plan_advice(wish(written(shelf, "bad", sources=sources, evaluation=evaluation)), shelf.cache)
    with pytest.raises(StageError, match="12 pilots, which may take"):
        plan_advice(wish(written(shelf, "bad"), pilot_count=12), shelf.cache)
    with pytest.raises(StageError, match="a bound of 0"):
        plan_advice(wish(written(shelf, "bad"), bound=0.0), shelf.cache)
    theirs = shelf.folder / "theirs.yaml"
    theirs.write_text("name: theirs\n")
    with pytest.raises(StageError, match="not written by advise"):
        plan_advice(wish(written(shelf, "bad"), out=theirs), shelf.cache)
    with pytest.raises(StageError, match="is in another folder"):
        plan_advice(wish(written(shelf, "bad"), out=shelf.folder / "runs" / "out.yaml"), shelf.cache)
    fresh = yaml.safe_load(written(shelf, "bad").read_text()) | {"model": {"from_scratch": "llama-1M"}}
    (shelf.folder / "bad.yaml").write_text(yaml.safe_dump(fresh))
    with pytest.raises(StageError, match="nothing to forget"):
        plan_advice(wish(shelf.folder / "bad.yaml"), shelf.cache)


def test_on_the_command_line(shelf: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRAD_CACHE", str(shelf.cache))
    place = str(written(shelf, "whole"))
    result = CliRunner().invoke(app, ["advise", place, "--max-forgetting", "100%", "--pilots", "4", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["next"].startswith("postgrad train") and Path(found["stage_file"]).read_text().startswith(
        "# Written by"
    )
    assert "4 pilots take" in result.stderr and "of the run's" in result.stderr
    result = CliRunner().invoke(app, ["advise", place, "--max-forgetting", "much"])
    assert isinstance(result.exception, StageError) and "--max-forgetting" in str(result.exception)


def test_the_cost_is_told_before_anything_is_run(shelf: Workspace) -> None:
    asked = plan_advice(wish(written(shelf, "told")), shelf.cache)
    first = next(iter(run_pilots(asked, "test")))
    assert (
        isinstance(first, InfoMessage)
        and "9.5% of the run's" in first.message
        and not pilots_folder(asked.plan).exists()
    )
