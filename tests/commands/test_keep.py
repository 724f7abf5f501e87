"""keep: pilots of combinations as runs, the stage that is written, what the run then says, and what cannot be chosen."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import postgrad
from postgrad.analysis.lever_choice import Forecast
from postgrad.commands.keep import EQUALITIES, KeepChoice, KeepRequest, plan_keep, run_keep, try_safest
from postgrad.commands.levers import Combination, StageFacts, list_combinations
from postgrad.config.stage_file import load_stage, parse_stage
from postgrad.errors import PostgradError, StageError
from postgrad.lineage.record import read_record
from postgrad.run.events import InfoMessage, RunFinished, RunStarted
from postgrad.run.summary import summary_text
from postgrad.stats import bootstrap
from tests.tiny_stages import LENGTH, Workspace, make_workspace

STEP = 4 * LENGTH


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "DRAWS", 200)
        made = make_workspace(tmp_path_factory.mktemp("keep"), tmp_path_factory.getbasetemp() / "cache")
        evaluation = {**made.text_evaluation, "retained": [], "learned": [made.file("old", held_out=True)]}
        made.run(made.stage("base", sources=[made.source("old")], tokens=20 * STEP, evaluation=evaluation))
        yield made


def written(shelf: Workspace, name: str, steps: int = 160, **changes: Any) -> Path:
    """A stage file of so many steps, by 4 rows, with 25 % replay."""
    raw = shelf.stage(name, model="runs/base", tokens=steps * STEP, **changes)
    raw["data"] |= {"on_exhausted": "repeat"}
    raw["schedule"] = {"kind": "rewarm", "peak": 1e-3, "floor": 1e-4, "warmup": "2 steps"}
    place = shelf.folder / f"{name}.yaml"
    place.write_text(yaml.safe_dump(raw, sort_keys=False))
    return place


def choose(request: KeepRequest, cache: Path) -> tuple[KeepChoice, list[Any]]:
    events = list(run_keep(request, cache, "test"))
    assert isinstance(events[-1], KeepChoice)
    return events[-1], events


def test_a_combination_is_chosen_written_and_compared_with_its_run(shelf: Workspace) -> None:
    place = written(shelf, "whole")
    request = KeepRequest(place, bound=1.0, cost=1.3)
    choice, events = choose(request, shelf.cache)
    said = [event.message for event in events if isinstance(event, InfoMessage)]
    assert any("take at most" in line for line in said)  # the cost, before the first pilot
    assert choice.probability >= 0.9 and choice.pilot_tokens <= 1.35 * choice.stage_tokens
    assert {verdict.lever for verdict in choice.verdicts} >= {
        "replay",
        "distillation",
        "penalty",
        "sparse update",
        "peak",
    }
    # The same command takes the pilots that are there.
    again, repeated = choose(request, shelf.cache)
    assert not any(isinstance(event, RunStarted) for event in repeated)
    assert again.combination == choice.combination and again.retained_losses == choice.retained_losses
    # As much new text as the stage had.
    stage = load_stage(shelf.folder / "whole-kept.yaml")
    assert stage.new_tokens == pytest.approx(0.75 * 160 * STEP, rel=0.06) and stage.tokens is None
    assert stage.max_forgetting == 1.0 and stage.evaluation.expected_losses
    roles = [source.role for source in stage.data.sources]
    shares = dict(zip(roles, stage.resolve_shares(), strict=True))
    assert shares["replay"] == pytest.approx(choice.combination.replay, abs=1e-6)
    # The run says whether it came true.
    (finished,) = [
        event
        for event in postgrad.train(shelf.folder / "whole-kept.yaml", cache=shelf.cache)
        if isinstance(event, RunFinished)
    ]
    told = read_record(finished.run_folder).expected_losses
    assert set(told) == {*choice.retained_losses, *choice.learned_losses}
    assert "expected" in summary_text(finished)
    assert "old-heldout" in (finished.run_folder / "report.html").read_text()


def test_budgets_are_equal_in_new_tokens_or_in_computation(shelf: Workspace) -> None:
    place = written(shelf, "budget")
    some, much = Combination(0.1), Combination(0.4, distillation="replay")
    by_tokens, by_compute = (plan_keep(KeepRequest(place, cost=1.3, equal=equal), shelf.cache) for equal in EQUALITIES)
    assert by_tokens.budget(some) == by_tokens.budget(much)
    assert by_tokens.run_tokens(much) / by_tokens.run_tokens(some) == pytest.approx(0.9 / 0.6, rel=1e-6)
    costs = [by_compute.run_tokens(each) * each.cost for each in (some, much)]
    assert costs[0] == pytest.approx(costs[1], rel=1e-4)


@dataclass
class FewTrials:
    """Trials of which only one combination reached the longest pilots."""

    excesses: dict[str, float]
    records: dict[tuple[str, float], None]

    def forecast(self) -> list[Forecast]:
        return [Forecast(name, {}, {}, float(x <= 0), x) for name, x in self.excesses.items()]

    def run(self, name: str, fraction: float, label: str) -> Generator[Any, None, bool]:
        self.records[name, fraction] = None
        yield InfoMessage(label)
        return False


@pytest.mark.parametrize(
    ("excesses", "is_tried"), [({"last": 0.4, "safest": -0.1}, True), ({"last": -0.1, "safest": -0.4}, False)]
)
def test_a_refusal_is_tried_before_it_is_said(excesses: dict[str, float], is_tried: bool) -> None:
    trials = FewTrials(excesses, {("last", 0.1): None, ("safest", 0.02): None})
    assert bool(list(try_safest(trials, 0.1))) == is_tried  # type: ignore[arg-type]
    assert (("safest", 0.1) in trials.records) == is_tried


def facts(shelf: Workspace, **changes: Any) -> StageFacts:
    stage = parse_stage(shelf.stage("facts", **changes.pop("stage", {})), "facts")
    known: dict[str, Any] = {
        "stage": stage, "strength": "strong", "max_replay": 0.5, "has_old_files": True, "parameters": 1000,
        "has_free_teacher": False, "free_memory": 10**9,
    }  # fmt: skip
    return StageFacts(**{**known, **changes})


@pytest.mark.parametrize(
    ("changes", "lever", "is_used"),
    [
        ({"free_memory": 1000}, "distillation", lambda each: each.distillation != "none"),
        ({"has_old_files": False}, "EWC", lambda each: each.penalty == "ewc"),
        ({"max_replay": 0.0}, "replay", lambda each: each.replay > 0),
        ({"stage": {"penalties": [{"kind": "anchor", "strength": 1}]}}, "penalty", lambda each: each.penalty != "none"),
        (
            {"stage": {"objectives": [{"kind": "next-token"}, {"kind": "distill", "on": ["old"]}]}},
            "distillation",
            lambda each: each.distillation != "none",
        ),
    ],
    ids=["memory", "files", "old-text", "own-penalty", "own-teacher"],
)
def test_a_method_that_the_stage_has_no_room_for_is_not_tried(
    shelf: Workspace, changes: dict[str, Any], lever: str, is_used: Any
) -> None:
    combinations, rejected = list_combinations(facts(shelf, **changes))
    assert lever in {each.lever for each in rejected} and all(each.reason for each in rejected)
    assert not any(is_used(each) for each in combinations)
    assert any(is_used(each) for each in list_combinations(facts(shelf))[0])
    assert len({each.name for each in combinations}) == len(combinations) >= 2


def test_a_bound_that_nothing_reaches_names_the_best(shelf: Workspace) -> None:
    place = written(shelf, "strict", schedule=None)
    raw = yaml.safe_load(place.read_text())
    raw["schedule"]["peak"], raw["schedule"]["floor"] = 1.0, 0.1
    place.write_text(yaml.safe_dump(raw))
    with pytest.raises(StageError, match="no combination keeps the rise") as caught:
        list(run_keep(KeepRequest(place, bound=1e-4, cost=1.3), shelf.cache, "test"))
    assert "the best reachable is" in caught.value.expected and "measured" in caught.value.expected
    assert not (shelf.folder / "strict-kept.yaml").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cost": 0.0}, "a cost of 0%"),
        ({"bound": 1.5}, "a bound of 150%"),
        ({"equal": "steps"}, "equality"),
        ({"prompts": "old.jsonl"}, "there is old text"),
        ({"cost": 0.01}, "too short"),
    ],
)
def test_what_cannot_be_chosen_is_an_error(shelf: Workspace, changes: dict[str, Any], message: str) -> None:
    place = written(shelf, "wrong")
    with pytest.raises(PostgradError, match=message):
        list(run_keep(KeepRequest(place, **changes), shelf.cache, "test"))
