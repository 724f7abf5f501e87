"""What a run has forgotten is won back: the stage that does it, its aim, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from postgrad.cli.main import app
from postgrad.cli.render import restored_text
from postgrad.commands import restore
from postgrad.commands.restore import (
    RestoreRequest,
    RestoreTarget,
    measure_restoration,
    plan_restoration,
)
from postgrad.errors import PostgradError, StageError
from postgrad.lineage.record import ScoresRecord, SetScore, read_record
from postgrad.plan.checkpoint_selection import CheckpointEvaluation, SelectionRule, compute_selection_state
from postgrad.run.events import RunFinished
from postgrad.run.run import run_stage
from postgrad.stats import bootstrap
from tests.tiny_stages import Workspace, make_workspace

LENGTH = 192
"""Room for a prompt, what is written behind it, and a little more."""


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """Two runs: one learns the old text, the next one the new text alone, and forgets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "DRAWS", 200)
        made = make_workspace(tmp_path_factory.mktemp("restore"), tmp_path_factory.getbasetemp() / "cache")
        config = made.folder / "llama" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 256}))
        evaluation = {**made.text_evaluation, "retained": [], "learned": [made.file("old", held_out=True)]}
        one = made.stage("one", sources=[made.source("old")], tokens=6000, evaluation=evaluation)
        made.run(one)
        naive = made.stage("naive", model="runs/one", sources=[made.source("new", held_out=0.1)], tokens=6000)
        naive["evaluation"] = {**made.text_evaluation, "learned": [made.file("new", held_out=True)]}
        made.run(naive)
        yield made


def wish(shelf: Workspace, **changes: Any) -> RestoreRequest:
    given = {
        "run": shelf.folder / "runs" / "naive",
        "prompts": (shelf.file("old"),),
        "min_recovered": 0.05,
        "max_cost": 1.0,
        "steps": 8,
    }
    return RestoreRequest(**{**given, **changes})


def run_with_replay(shelf: Workspace, name: str, held_out: float) -> Path:
    """A run that replayed old text and named no held-out file, as `init` writes it."""
    sources = [
        shelf.source("new", share=0.95, held_out=held_out),
        shelf.source("old", share=0.05, role="replay", held_out=held_out),
    ]
    evaluation = {"samples": 0} if held_out else {"samples": 0, "learned": [shelf.file("new", held_out=True)]}
    stage = shelf.stage(name, model="runs/one", sources=sources, tokens=6000, evaluation=evaluation)
    return shelf.run(stage).run_folder


def kept_whole(shelf: Workspace) -> Path:
    return run_with_replay(shelf, "whole", 0.0)


def test_what_the_run_held_out_of_its_replay_is_recovered(shelf: Workspace) -> None:
    run = run_with_replay(shelf, "split", 0.1)
    found = plan_restoration(wish(shelf, run=run, prompts=()), shelf.cache)
    trained = shelf.plan(read_record(run).stage)
    held_out = {h.name: {d.tobytes() for d in h.documents} for h in trained.evaluation.sets}
    (old,) = (h for h in found.plan.evaluation.sets if h.role == "learned")
    assert found.target.set_name == old.name == "prompts-old"
    assert {d.tobytes() for d in old.documents} == held_out["old"]


def test_a_model_of_few_positions_writes_less(shelf: Workspace) -> None:
    run = run_with_replay(shelf, "short", 0.1)
    record = read_record(run)
    model = record.model.model_copy(update={"context_length": 100})
    raw = restore._restore_stage(wish(shelf, run=run), record.model_copy(update={"model": model}), shelf.folder)
    assert raw["data"]["sequence_length"] == 100
    assert (raw["objectives"][0]["prompt_tokens"], raw["objectives"][0]["max_new_tokens"]) == (20, 60)


def test_without_sets_a_part_of_the_prompts_is_held_out(shelf: Workspace) -> None:
    found = plan_restoration(wish(shelf, run=kept_whole(shelf)), shelf.cache)
    assert found.target.set_name == "prompts" and found.plan.data.sources[0].held_out > 0


def test_the_stage_that_is_written(shelf: Workspace) -> None:
    found = plan_restoration(wish(shelf), shelf.cache)
    stage, aim = found.plan.stage, found.target
    record = read_record(shelf.folder / "runs" / "naive")
    assert [o.kind for o in stage.objectives] == ["on-policy", "distill"]
    assert found.plan.data.objective_indices == ((0,), (1,)) and [leaf.name for leaf in found.plan.data.sources] == [
        "prompts",
        "new",
    ]
    assert stage.resolve_shares() == (0.5, 0.5) and stage.schedule.peak == pytest.approx(2e-3)  # type: ignore[union-attr]
    # What was held out of the new text is still.
    assert [leaf.held_out for leaf in found.plan.data.sources] == [0.0, 0.1]
    assert found.plan.teachers[0].folder == shelf.folder / "runs" / "one" / "model"
    assert {h.name: h.role for h in found.plan.evaluation.sets} == {
        "old-heldout": "learned",
        "new-heldout": "retained",
        "new": "retained",
    }
    scores = record.scores
    assert aim.set_name == "old-heldout"
    assert aim.run_loss == pytest.approx(scores.after["old-heldout"].nats, rel=1e-5)
    assert aim.teacher_loss == pytest.approx(scores.before["old-heldout"].nats, rel=1e-5)
    assert aim.target_loss == pytest.approx(aim.run_loss - 0.05 * (aim.run_loss - aim.teacher_loss))
    choose = stage.save.choose
    assert choose is not None and choose.stop_at == aim.target_loss
    old, new = aim.gains["new-heldout"]
    assert choose.max_forgetting == pytest.approx(min(1.0, (old - new) / new), rel=1e-6)
    alone = plan_restoration(wish(shelf, self_distill_share=0.0), shelf.cache).plan
    assert [leaf.name for leaf in alone.data.sources] == ["prompts"] and len(alone.objectives) == 1
    assert alone.steps == pytest.approx(8, abs=1)


def test_it_wins_back_and_says_what_it_cost(shelf: Workspace) -> None:
    asked = plan_restoration(wish(shelf, steps=30), shelf.cache)
    events = list(run_stage(asked.plan, command="test", cache=shelf.cache))
    done = events[-1]
    assert isinstance(done, RunFinished)
    found = measure_restoration(asked, done)
    after = done.record.scores.after["old-heldout"].nats
    assert found.recovered == pytest.approx(
        (asked.target.run_loss - after) / (asked.target.run_loss - asked.target.teacher_loss)
    )
    assert found.enough and found.recovered >= 0.05
    assert done.record.published_checkpoint.stopped_early and done.record.totals.steps < asked.plan.steps
    assert "of the forgetting is recovered" in restored_text(found)
    # A second time it is there already.
    again = list(
        run_stage(plan_restoration(wish(shelf, steps=30), shelf.cache).plan, command="test", cache=shelf.cache)
    )
    assert isinstance(again[-1], RunFinished) and again[-1].already_complete


def test_what_cannot_be_restored_is_refused(shelf: Workspace, tmp_path: Path) -> None:
    one = shelf.folder / "runs" / "one"
    with pytest.raises(StageError, match="has forgotten nothing"):
        plan_restoration(wish(shelf, teacher=str(shelf.folder / "runs" / "naive")), shelf.cache)
    with pytest.raises(StageError, match="replayed no text"):
        plan_restoration(wish(shelf, prompts=()), shelf.cache)
    with pytest.raises(StageError, match=r"held out no old text[\s\S]*--retained"):
        plan_restoration(wish(shelf, run=kept_whole(shelf), prompts=()), shelf.cache)
    with pytest.raises(StageError, match="is not a run folder"):
        plan_restoration(wish(shelf, run=tmp_path), shelf.cache)
    with pytest.raises(StageError, match=r"is not a run folder[\s\S]*did you mean 'naive'"):
        plan_restoration(wish(shelf, run=one.with_name("naiv")), shelf.cache)
    for changes, option, said in (
        ({"min_recovered": 0.0}, "--min-recovered", "is no target"),
        ({"self_distill_share": 1.0}, "--self-distill-share", "no tokens for the prompts"),
        ({"learning_rate": -1.0}, "--learning-rate", "not a learning rate"),
        ({"learning_rate": float("nan")}, "--learning-rate", "not a learning rate"),
        ({"teacher": "nowhere"}, "--teacher", "there is no folder"),
        ({"prompts": ("none.jsonl",)}, "--prompts", "no file matches"),
        ({"retained": ("none.jsonl",)}, "--retained", "no file matches"),
    ):
        with pytest.raises(PostgradError, match=said) as caught:
            plan_restoration(wish(shelf, **changes), shelf.cache)
        assert caught.value.where == option
    masked = shelf.run(shelf.stage("masked", model="bert", objectives=[{"kind": "masked"}])).run_folder
    with pytest.raises(StageError, match="is not a causal language model"):
        plan_restoration(wish(shelf, run=masked), shelf.cache)
    for option in ("--min-recovered", "--max-cost", "--self-distill-share"):
        result = CliRunner().invoke(app, ["restore", str(one), option, "much"])
        error = result.exception
        assert isinstance(error, StageError) and error.where == option and "'much'" in str(error)


@pytest.mark.parametrize(
    ("old", "new", "recovered", "cost", "enough"),
    [
        (2.5, 2.2, 0.5, 0.1, True),
        (2.6, 2.2, 0.4, 0.1, False),
        (2.5, 2.3, 0.5, 0.15, False),
        (1.9, 1.8, 1.1, -0.1, True),
    ],
    ids=["just so", "too little won back", "too dear", "more than all of both"],
)
def test_it_is_enough_when_enough_is_won_back_at_no_more_than_was_allowed(
    old: float, new: float, recovered: float, cost: float, enough: bool
) -> None:
    """A run lost 1 nat of the old text (2 to 3) and gained 2 of the new (4 to 2); half for a tenth was asked for."""
    asked = SimpleNamespace(
        target=RestoreTarget(
            "old", run_loss=3.0, teacher_loss=2.0, target_loss=2.5, gains={"new": (4.0, 2.0), "even": (3.0, 3.0)}
        ),
        request=SimpleNamespace(min_recovered=0.5, max_cost=0.1),
    )
    after = {"old": SetScore(nats=old), "new": SetScore(nats=new), "even": SetScore(nats=3.1)}
    done = SimpleNamespace(record=SimpleNamespace(scores=ScoresRecord(after=after)), run_folder=Path("run"))
    found = measure_restoration(asked, done)  # type: ignore[arg-type]
    assert found.recovered == pytest.approx(recovered) and found.costs == {"new": pytest.approx(cost)}
    assert found.enough is enough
    assert ("the target was 50%" in restored_text(found)) is not enough


def test_enough_ends_a_choice_where_no_more_is_forgotten_than_is_allowed() -> None:
    rule = SelectionRule("old", "loss", None, 0.0, 2, max_forgetting=0.1, stop_at=1.5)
    looks = [
        CheckpointEvaluation(1, 10, 1.0, 0.0),
        CheckpointEvaluation(2, 20, 1.2, 0.4),
        CheckpointEvaluation(3, 30, 1.6, 0.05),
        CheckpointEvaluation(4, 40, 1.5, 0.1),
    ]
    assert [compute_selection_state(looks[:i], rule).should_stop for i in range(1, 5)] == [False, False, False, True]
    best = compute_selection_state(looks, rule).best
    assert best is not None and best.step == 4
    more = SelectionRule("old", "accuracy", None, 0.0, 1, stop_at=0.8)
    assert [
        compute_selection_state([CheckpointEvaluation(1, 10, value)], more).should_stop for value in (0.7, 0.8)
    ] == [False, True]
