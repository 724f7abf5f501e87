"""The published step is the best by a held-out set, training ends when nothing is gained, and test sets are looked at once."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from postgrad.check.plan_text import plan_lines
from postgrad.errors import CheckpointError, DataError, PostgradError, StageError
from postgrad.evaluation import before_after
from postgrad.evaluation.continuations import select_prompts
from postgrad.evaluation.held_out import HeldOutText
from postgrad.lineage.metrics import read_metrics
from postgrad.lineage.record import read_record
from postgrad.lineage.tree import lineage_matrix, read_lineage
from postgrad.plan import checkpoint_selection
from postgrad.plan.checkpoint_selection import CheckpointEvaluation, SelectionRule, compute_selection_state
from postgrad.reports.pages import run_page
from postgrad.reports.sections import published_step
from postgrad.run.events import CheckpointSaved, PhaseStarted, RunEvent, RunFinished, RunStopped, StepCompleted
from postgrad.run.run import run_stage
from postgrad.run.summary import summary_text
from tests.tiny_stages import LENGTH, Workspace, make_workspace, run_interrupted, run_trace, write_rows


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Models, texts and rows, with a cache of their own."""
    return make_workspace(tmp_path_factory.mktemp("shelf"), tmp_path_factory.mktemp("cache"))


# -- the rule, on curves made by hand ----------------------------------------------------------------------------------

RULE = SelectionRule("dev", "loss", None, 0.0, 1)


def looks(values: Sequence[float], rises: Sequence[float] | None = None) -> list[CheckpointEvaluation]:
    """Looks at steps 1, 2, 3 ..."""
    return [CheckpointEvaluation(i, 10 * i, v, rises[i - 1] if rises else None) for i, v in enumerate(values, 1)]


def best_and_end(
    values: Sequence[float], rule: SelectionRule, rises: Sequence[float] | None = None
) -> tuple[int, int | None]:
    """The chosen step, and the step at which training ends, if it does before the values do."""
    series = looks(values, rises)
    end = next((n for n in range(1, len(series) + 1) if compute_selection_state(series[:n], rule).should_stop), None)
    found = compute_selection_state(series[:end], rule).best
    assert found is not None
    return found.step, end


CURVES: list[tuple[list[float], dict[str, Any], tuple[int, int | None]]] = [
    # values, what the rule says, (chosen step, step of the end)
    ([5, 4, 3, 2], {"patience": 1}, (4, None)),
    ([5, 4, 3, 3.1, 3.2], {"patience": 2}, (3, 5)),
    ([5, 4, 3, 3.1, 2.9, 3, 3], {"patience": 2}, (5, 7)),
    ([5, 4, 4, 4], {"patience": 2}, (2, 4)),  # as good is no gain, and the earliest stays
    (
        [5, 4.95, 4.9, 4.85],
        {"patience": 2, "min_delta": 0.2},
        (3, 3),
    ),  # small gains do not hold the end up, but are chosen
    (
        [5, 4.9, 4.7, 4.6],
        {"patience": 2, "min_delta": 0.2},
        (4, None),
    ),  # two together surpass the mark by more than the gain
    ([1, 5, 4, 3, 2], {"first_step": 3}, (5, None)),  # the first two are no candidates
    ([1, 5, 6, 7, 8, 4], {"first_step": 2, "patience": 4}, (6, None)),
    ([0.5, 0.7, 0.6, 0.6], {"metric": "accuracy", "patience": 2}, (2, 4)),  # more is better
    ([0.5, 0.4, 0.6], {"metric": "MSE", "patience": 1}, (2, 3)),
    ([5, math.nan, 4, math.nan], {"patience": 2}, (3, None)),
    ([math.nan, 3], {}, (2, None)),
]


@pytest.mark.parametrize(("values", "said", "wanted"), CURVES)
def test_what_is_chosen_of_a_curve_and_when_it_ends(
    values: list[float], said: dict[str, Any], wanted: tuple[int, int | None]
) -> None:
    assert best_and_end(values, replace(RULE, **said)) == wanted


def test_nothing_ends_inside_the_stability_gap() -> None:
    """After the switch the loss first rises. With the guard that is no end; the mutant without it would stop there."""
    curve = [3.0, 3.2, 3.5, 3.4, 3.2, 2.9, 2.5, 2.2]
    guarded = SelectionRule("dev", "loss", 2, 0.0, 5)
    assert best_and_end(curve, guarded) == (8, None)
    assert best_and_end(curve, replace(guarded, first_step=1)) == (1, 3)


def test_what_forgets_too_much_is_passed_over_and_without_any_other_it_is_what_forgets_least() -> None:
    rule = replace(RULE, max_forgetting=0.02)
    values, rises = [5.0, 4.0, 3.0, 2.0], [0.0, 0.01, 0.02, 0.03]
    assert best_and_end(values, rule, rises)[0] == 3
    assert best_and_end(values, RULE, rises)[0] == 4  # the mutant: without the limit
    all_over = [0.09, 0.05, 0.05, 0.06]
    series = looks(values, all_over)
    found = compute_selection_state(series, rule)
    assert found.best == series[2] and not rule.is_within_limit(
        series[2]
    )  # of two that forgot as little the better one
    # One that is within is better than any that is not, however good.
    assert best_and_end([5.0, 1.0], rule, [0.02, 0.021])[0] == 1


@settings(max_examples=200)
@given(
    st.lists(st.floats(-5, 5), min_size=1, max_size=30),
    st.integers(1, 10),
    st.integers(1, 5) | st.none(),
    st.floats(0, 1),
    st.sampled_from(["loss", "accuracy"]),
)
def test_laws_of_the_rule(values: list[float], first: int, patience: int | None, gain: float, by: str) -> None:
    rule, series = SelectionRule("dev", by, patience, gain, first), looks(values)
    candidates = series[first - 1 :]
    found = compute_selection_state(series, rule)
    assert found.candidates == len(candidates)
    if candidates:
        assert found.best is not None
        pick = min if by == "loss" else max
        assert found.best.value == pick(look.value for look in candidates)
        assert found.best.step == min(look.step for look in candidates if look.value == found.best.value)
    else:
        assert found.best is None and not found.should_stop
    # The end is where the last `patience` candidates brought no gain over the best before them, and never before.
    assert not any(
        compute_selection_state(series[:n], rule).should_stop for n in range(first + (patience or 99) - 1 + 1)
    )
    losses = [look.value if by == "loss" else -look.value for look in candidates]
    if patience and found.should_stop and gain == 0:
        cut = len(losses) - found.candidates_since_gain
        assert min(losses[cut:]) >= min(losses[:cut]) and found.candidates_since_gain >= patience


def test_candidates_begin_behind_the_warm_up_the_gap_and_what_was_asked_for(shelf: Workspace) -> None:
    def first(at_least: str, warmup: str, tokens: int = 300 * 4 * LENGTH) -> int:
        schedule = {"kind": "cosine", "peak": 1e-3, "floor": 1e-5, "warmup": warmup}
        raw = shelf.stage("rule", save={"choose": {"set": "new-heldout", "burn_in": at_least}}, schedule=schedule,
                          tokens=tokens)  # fmt: skip
        plan = shelf.plan(raw)
        assert plan.evaluation.selection_rule is not None
        assert any(f"from step {plan.evaluation.selection_rule.first_step:,} on" in line for line in plan_lines(plan))
        return plan.evaluation.selection_rule.first_step

    steps = shelf.plan(shelf.stage("rule", tokens=300 * 4 * LENGTH)).steps
    assert first("0%", "0%") == math.ceil(0.02 * steps)
    assert first("0%", "50 steps") == 50
    assert first("90 steps", "50 steps") == 90
    assert first("30 steps", "50 steps") == 50


# -- whole runs --------------------------------------------------------------------------------------------------------


def chosen(
    shelf: Workspace, name: str, choice: dict[str, Any], tuning: dict[str, Any] | None = None, **changes: Any
) -> Any:
    """A stage that learns a little text by heart, so that its held-out loss falls and then rises."""
    (shelf.folder / "little.jsonl").write_text(
        "".join(Path(shelf.file("new")).read_text().splitlines(keepends=True)[:2])
    )
    raw = shelf.stage(
        name,
        tuning,
        sources=[{"name": "little", "path": str(shelf.folder / "little.jsonl"), "max_passes": 10**6}],
        tokens=24 * 4 * LENGTH,
        schedule={"kind": "constant", "peak": 3e-2, "warmup": "2 steps"},
        evaluation={**shelf.text_evaluation, "every": "2 steps", "eval_tokens": 100},
        **changes,
    )
    return {**raw, "save": {"every": "8 steps", "keep": 1, **raw["save"], "choose": {"set": "new-heldout", **choice}}}


def values_of(home: Path) -> dict[int, float]:
    """The value that decides, by step."""
    found = read_metrics(home / "metrics.jsonl")
    return {
        row.step: row.checkpoint_selection.value
        for row in found
        if row.kind == "evaluation" and row.checkpoint_selection is not None
    }


def same_weights(one: Path, other: Path) -> bool:
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_published_model_is_the_best_checkpoint_and_training_ends_without_gains(shelf: Workspace) -> None:
    raw = chosen(shelf, "best", {"patience": "2 evaluations"})
    outcome = shelf.run(raw)
    record, home = outcome.record, Path(raw["output"])
    found, values = record.published_checkpoint, values_of(home)
    assert found.step == min((s for s in values if s >= found.first_step), key=lambda s: (values[s], s))
    later = [s for s in values if s > found.step]
    assert found.stopped_early and len(later) == 2 and found.last_step == max(values) < record.plan.steps
    steps = [row.step for row in read_metrics(home / "metrics.jsonl") if row.kind == "step"]
    assert steps == list(range(1, found.last_step + 1))
    assert record.totals.steps == found.last_step
    # The best stays beside the newest, and is what was published.
    kept = [p.name for p in sorted((home / "checkpoints").iterdir())]
    assert kept == [f"step-{found.step:08d}", f"step-{found.last_step:08d}"]
    assert same_weights(home / "model", home / "checkpoints" / kept[0])
    assert not same_weights(home / "model", home / "checkpoints" / kept[1])
    # Its score is that of the look, which saw all of the set and not only `during_tokens`.
    after = record.scores.after["new-heldout"]
    assert after.nats == pytest.approx(found.value, rel=1e-5) and after.documents == 12
    # What was consumed is what the published model has seen; the cost is of all steps.
    assert sum(entry.tokens for entry in record.consumed.values()) == found.trained_tokens
    assert record.totals.tokens > found.trained_tokens
    said = summary_text(outcome)
    assert f"Published: step {found.step} of {found.last_step}, the best of" in said
    assert (
        f"Training ended at step {found.last_step} of {record.plan.steps}: 2 evaluations without improvement." in said
    )
    shown = run_page.run_page(record, read_metrics(home / "metrics.jsonl"))
    assert "Published checkpoint" in shown and ">published<" in shown
    stages = read_lineage(home)
    assert lineage_matrix(stages, lambda *_: 1.0).stages[1].tokens == found.trained_tokens


def test_without_a_choice_the_last_step_is_published_and_nothing_is_said(shelf: Workspace) -> None:
    raw = shelf.stage("last")
    outcome = shelf.run(raw)
    assert outcome.record.published_checkpoint is None and "Published" not in summary_text(outcome)
    assert not values_of(Path(raw["output"]))
    assert "Published checkpoint" not in (Path(raw["output"]) / "report.html").read_text()


TUNINGS = [
    {"kind": "full"},
    {"kind": "lora", "rank": 4},
    {"kind": "blocks", "last": 1},
    {"kind": "prompt", "length": 2},
]


@pytest.mark.parametrize("tuning", TUNINGS, ids=lambda tuning: tuning["kind"])
def test_killed_and_resumed_the_same_step_is_published_with_the_same_bits(
    tuning: dict[str, Any], shelf: Workspace
) -> None:
    kind, choice = tuning["kind"], {"patience": 2}
    whole = chosen(shelf, f"whole-{kind}", choice, tuning)
    record = shelf.run(whole).record
    parts = chosen(shelf, f"parts-{kind}", choice, tuning)
    again = run_interrupted(shelf, parts).record
    assert run_trace(Path(parts["output"])) == run_trace(Path(whole["output"]))
    assert again.published_checkpoint == record.published_checkpoint
    assert again.consumed == record.consumed


def finished_again(shelf: Workspace, raw: dict[str, Any]) -> tuple[list[RunEvent], RunFinished]:
    events = shelf.run_events(raw)
    assert isinstance(events[-1], RunFinished)
    return events, events[-1]


def test_killed_after_the_end_it_trains_no_further(shelf: Workspace) -> None:
    """Between the last step and the record the run may be killed anywhere; the looks say that training is over."""
    raw = chosen(shelf, "ended", {"patience": 2})
    home = Path(raw["output"])
    wanted = shelf.run(raw).record.published_checkpoint
    bits = run_trace(home)
    for gone in (("record.json",), ("record.json", "model"), ("record.json", "model", "scores/after.npz")):
        for name in gone:
            shutil.rmtree(home / name) if (home / name).is_dir() else (home / name).unlink()
        events, last = finished_again(shelf, raw)
        assert not any(isinstance(event, StepCompleted) for event in events)
        assert last.record.published_checkpoint == wanted and run_trace(home) == bits
    # The mutant: looks that are forgotten do not end the training again.
    for name in ("record.json", "model"):
        shutil.rmtree(home / name) if (home / name).is_dir() else (home / name).unlink()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            checkpoint_selection.CheckpointSelector,
            "state",
            property(lambda self: compute_selection_state(self.evaluations[:1], self.rule)),
        )
        assert any(
            isinstance(event, StepCompleted) for event in run_stage(shelf.plan(raw), command="t", cache=shelf.cache)
        )


def test_a_best_checkpoint_that_was_damaged_is_told(shelf: Workspace) -> None:
    raw = chosen(shelf, "damaged", {"patience": 2})
    home = Path(raw["output"])
    found = shelf.run(raw).record.published_checkpoint
    for name in ("record.json", "model"):
        shutil.rmtree(home / name) if (home / name).is_dir() else (home / name).unlink()
    (home / "checkpoints" / f"step-{found.step:08d}" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"step-{found.step:08d}"):
        shelf.run_events(raw)


def test_a_stop_by_hand_is_none_by_the_rule(shelf: Workspace) -> None:
    raw = chosen(shelf, "by-hand", {})
    last: RunEvent | None = None
    for event in run_stage(shelf.plan(raw), command="test", cache=shelf.cache):
        last = event
        if isinstance(event, StepCompleted) and event.report.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
    assert isinstance(last, RunStopped) and last.step == 5
    record = shelf.run(raw).record
    assert not record.published_checkpoint.stopped_early and record.published_checkpoint.last_step == record.plan.steps


def test_what_was_forgotten_limits_the_choice(shelf: Workspace) -> None:
    free = shelf.run(chosen(shelf, "free", {})).record.published_checkpoint
    raw = chosen(shelf, "bound", {"max_forgetting": "0.1%"})
    outcome = shelf.run(raw)
    bound = outcome.record.published_checkpoint
    rises = {
        row.step: row.checkpoint_selection.relative_high
        for row in read_metrics(Path(raw["output"]) / "metrics.jsonl")
        if row.kind == "evaluation" and row.checkpoint_selection is not None
    }
    values = values_of(Path(raw["output"]))
    candidates = [step for step in values if step >= bound.first_step]
    within = [step for step in candidates if rises[step] <= 0.001]
    wanted = min(within, key=lambda s: values[s]) if within else min(candidates, key=lambda s: (rises[s], values[s]))
    assert bound.step == wanted and bound.within_max_forgetting == bool(within)
    assert free.relative_high is None
    # The rise is of the whole retained set against the exact start model, at the upper end of its interval.
    before = before_after.read_scores(Path(raw["output"]) / "scores" / "start.npz")["old-heldout"]
    assert len(before.bytes_N) == 12
    said = summary_text(outcome)
    assert ("No evaluation kept" in said) == (not within)


def test_a_metric_decides_where_more_is_better(shelf: Workspace) -> None:
    raw = shelf.stage(
        "classes",
        model="bert",
        sources=[shelf.source("labelled", "labelled")],
        objectives=[{"kind": "classify"}],
        tokens=160,
        schedule={"kind": "constant", "peak": 2e-3},
        evaluation={"learned": [shelf.file("labelled", held_out=True)], "every": "5 steps", "samples": 0},
        save={"every": "50%", "choose": {"set": "labelled-heldout", "metric": "macro F1", "patience": 4}},
    )
    record = shelf.run(raw).record
    found, values = record.published_checkpoint, values_of(Path(raw["output"]))
    candidates = {step: value for step, value in values.items() if step >= found.first_step}
    assert found.value == max(candidates.values()) > 0.6
    assert found.step == min(s for s, v in candidates.items() if v == found.value)
    after = record.scores.after["labelled-heldout"].metrics["macro F1"]
    assert after.value == pytest.approx(found.value)
    assert "by macro F1 on labelled-heldout" in published_step.selected_step_sentences(record)[0]


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"set": "new-heldou"}, r"save\.choose\.set: unknown held-out set[\s\S]*did you mean 'new-heldout'"),
        ({"set": "secret"}, r"save\.choose\.set: 'secret' is a test set"),
        (
            {"set": "new-heldout", "metric": "accuracy"},
            r"save\.choose\.metric: 'new-heldout' has no metric 'accuracy'[\s\S]*loss",
        ),
        ({"set": "new-heldout", "burn_in": "900 steps"}, r"save\.choose\.burn_in: no step before"),
        (
            {"set": "new-heldout", "max_forgetting": "1%"},
            r"save\.choose\.max_forgetting: a limit on forgetting needs a retained set",
        ),
    ],
)
def test_a_choice_that_cannot_be_made_is_told(choice: dict[str, Any], said: str, shelf: Workspace) -> None:
    secret = {"name": "secret", "path": shelf.file("old", held_out=True)}
    evaluation = {"learned": [shelf.file("new", held_out=True)], "test": [secret]}
    with pytest.raises(StageError, match=said):
        shelf.plan(
            shelf.stage("refused", sources=[shelf.source("new")], evaluation=evaluation, save={"choose": choice})
        )


# -- test sets ---------------------------------------------------------------------------------------------------------


def with_test(shelf: Workspace, name: str, **changes: Any) -> dict[str, Any]:
    """A stage with a test set beside the two others."""
    return shelf.stage(
        name,
        evaluation={**shelf.text_evaluation, "samples": 1, "test": [{"name": "secret", "path": shelf.file("secret")}]},
        **changes,
    )


@pytest.fixture(scope="module")
def secret(shelf: Workspace) -> Workspace:
    """A file of texts that is nowhere else."""
    write_rows(
        shelf.folder / "secret.jsonl", [{"text": f"x{i} = y{i} * {i}; and one and two. " * 6} for i in range(30)]
    )
    return shelf


def test_a_test_set_is_looked_at_once_after_training(secret: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spy on whatever scores: the test set is read twice, by the published and by the start model, at the very end."""
    seen: list[tuple[str, str]] = []
    happened: list[str] = []
    pieces = HeldOutText.iter_rows

    def spied(self: HeldOutText, context: int) -> Any:
        seen.append((self.name, happened[-1] if happened else ""))
        return pieces(self, context)

    monkeypatch.setattr(HeldOutText, "iter_rows", spied)
    raw = with_test(secret, "once")
    last: RunEvent | None = None
    for event in run_stage(secret.plan(raw), command="test", cache=secret.cache):
        happened.append(event.message if isinstance(event, PhaseStarted) else type(event).__name__)
        last = event
    assert isinstance(last, RunFinished)
    assert [when for name, when in seen if name == "secret"] == [
        "scoring the trained model",
        "scoring the start model on the test sets",
    ]
    assert sum(name == "new-heldout" for name, _ in seen) > 3
    record, home = last.record, Path(raw["output"])
    assert record.changes["secret"].role == "test"
    assert record.scores.before["secret"].documents == record.scores.after["secret"].documents == 30
    assert all("secret" not in row.sets for row in read_metrics(home / "metrics.jsonl") if row.kind == "evaluation")
    assert select_prompts(secret.plan(raw).evaluation.sets[-1], 1)  # it could be continued, and is not
    assert "secret" not in {sample.set for sample in record.samples}
    assert "secret" not in before_after.read_scores(home / "scores" / "before.npz")
    text = summary_text(last)
    assert "secret (test)" in text and "test set is scored once" in text
    shown = (home / "report.html").read_text()
    assert "test (scored once)" in shown and "a test set, scored once" in shown
    # What a lineage scores other models on are the other sets.
    assert "secret" not in [found.name for found in lineage_matrix(read_lineage(home), lambda *_: 1.0).sets]


def test_the_gate_is_not_about_test_sets(secret: Workspace) -> None:
    raw = with_test(secret, "gate", max_forgetting="100%")
    assert secret.run(raw).record.retention_gate.worst.set == "old-heldout"
    only = {**raw, "name": "only", "output": str(secret.folder / "runs" / "only"), "max_forgetting": "2%"}
    only["evaluation"] = {"learned": [secret.file("new", held_out=True)], "test": raw["evaluation"]["test"]}
    only["data"] = {**raw["data"], "sources": [secret.source("new")]}
    with pytest.raises(StageError, match="retention gate needs a retained set"):
        secret.plan(only)


def test_a_run_killed_before_its_test_ends_with_the_same_scores(secret: Workspace) -> None:
    whole, parts = with_test(secret, "test-whole"), with_test(secret, "test-parts")
    wanted = secret.run(whole).record
    for event in run_stage(secret.plan(parts), command="test", cache=secret.cache):
        if isinstance(event, PhaseStarted) and "test sets" in event.message:
            break
    found = secret.run(parts).record
    assert found.scores == wanted.scores and found.changes == wanted.changes


def test_copies_of_test_rows_are_neither_trained_on_nor_chosen_by(secret: Workspace, tmp_path: Path) -> None:
    own = [json.loads(line) for line in Path(secret.file("secret")).read_text().splitlines()]
    new = [json.loads(line) for line in Path(secret.file("new")).read_text().splitlines()]
    dev = [json.loads(line) for line in Path(secret.file("new", held_out=True)).read_text().splitlines()]
    train = write_rows(tmp_path / "train.jsonl", [*new, *own[:7]])
    mixed = write_rows(tmp_path / "dev.jsonl", [*dev, *own[:3]])
    raw = secret.stage("copies", sources=[{"name": "train", "path": str(train), "max_passes": 100}])
    raw["evaluation"] = {"learned": [str(mixed)], "test": [{"name": "secret", "path": secret.file("secret")}]}
    raw["data"]["overlap"] = "report"
    plan = secret.plan(raw)
    without = {**raw, "evaluation": {"learned": [secret.file("new", held_out=True)]}}
    assert plan.data.rows[0].ledger.dropped > 0 and secret.plan(without).data.rows[0].ledger.dropped == 0
    assert any("dev: 3 copies of test documents are removed" in note for note in plan.notes)
    assert [len(h) for h in plan.evaluation.sets] == [12, 30]
    assert plan.data.overlaps["secret"].duplicates == 7
    raw["evaluation"]["learned"] = [{"name": "all", "path": secret.file("secret")}]
    with pytest.raises(DataError, match=r"evaluation\.learned: every document of 'all' is also in a test set"):
        secret.plan(raw)


# -- labels that no training row has -----------------------------------------------------------------------------------


def classified(shelf: Workspace, train: Path, test: Path, **objective: Any) -> dict[str, Any]:
    raw = shelf.stage("labels", model="bert", objectives=[{"kind": "classify", **objective}])
    raw["data"]["sources"] = [{"name": "train", "path": str(train), "kind": "labelled", "max_passes": 1000}]
    raw["evaluation"] = {"test": [str(test)], "learned": [], "samples": 0}
    return raw


def made(words: Sequence[str], label: str) -> list[dict[str, Any]]:
    return [{"text": f"{word} and {word}", "label": label} for word in words]


def test_a_label_that_only_test_rows_have_is_told_with_its_place(shelf: Workspace, tmp_path: Path) -> None:
    numbers = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    train = write_rows(
        tmp_path / "train.jsonl", [*made(numbers, "low") * 3, *made([f"{n} plus" for n in numbers], "high") * 3]
    )
    test = write_rows(
        tmp_path / "test.jsonl", [*made(["yes yes"], "low"), *made(["no no"], "hihg"), *made(["no"], "other")]
    )
    said = r"test\.jsonl:2: 'test' has the label 'hihg'[\s\S]*did you mean 'high'[\s\S]*objectives\.labels"
    with pytest.raises(DataError, match=said):
        shelf.plan(classified(shelf, train, test))
    with pytest.raises(
        DataError, match=r"test\.jsonl:3: 'test' has the label 'other', which objectives\.labels does not"
    ):
        shelf.plan(classified(shelf, train, test, labels=["low", "high", "hihg"]))
    assert (
        shelf.plan(classified(shelf, train, test, labels=["low", "high", "hihg", "other"])).model.task_layer is not None
    )


def test_one_label_alone_cannot_be_trained(shelf: Workspace, tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", made(["one", "two", "three"], "low"))
    test = write_rows(tmp_path / "test.jsonl", made(["four", "five"], "low"))
    for listed in ({}, {"labels": ["low"]}):
        with pytest.raises(StageError, match=r"all rows have the label 'low'[\s\S]*objectives\.labels"):
            shelf.plan(classified(shelf, train, test, **listed))
    assert shelf.plan(classified(shelf, train, test, labels=["low", "high"])).model.task_layer is not None
    empty = write_rows(tmp_path / "none.jsonl", [{"text": "a b", "label": -1}] * 5)
    with pytest.raises(PostgradError):
        shelf.plan(classified(shelf, empty, test))


def test_a_label_of_which_every_row_is_a_copy_of_a_test_row_is_told(shelf: Workspace, tmp_path: Path) -> None:
    numbers = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    rare = made(["yes no yes", "no yes no"], "rare")
    train = write_rows(tmp_path / "train.jsonl", [*made(numbers, "low"), *rare])
    test = write_rows(tmp_path / "test.jsonl", [*made(["yes yes"], "low"), *rare])
    with pytest.raises(PostgradError, match=r"test\.jsonl:2: 'test' has the label 'rare', which no training row has"):
        shelf.plan(classified(shelf, train, test))
    assert shelf.plan(classified(shelf, train, test, labels=["low", "rare"])).model.task_layer is not None


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_choose_what_one_chooses(secret: Workspace, tmp_path: Path) -> None:
    alone = chosen(secret, "ranks-one", {"patience": 3, "max_forgetting": "100%"})
    alone["evaluation"]["test"] = [{"name": "secret", "path": secret.file("secret")}]
    one = secret.run(alone).record
    two = {**alone, "output": str(secret.folder / "runs" / "ranks-two")}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(two))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--standalone", "-m", "postgrad", "train", str(tmp_path / "two.yaml")]
    environment = {**os.environ, "POSTGRAD_CACHE": str(secret.cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = read_record(Path(two["output"]))
    assert (
        found.published_checkpoint.step == one.published_checkpoint.step
        and found.published_checkpoint.last_step == one.published_checkpoint.last_step
    )
    assert found.published_checkpoint.value == pytest.approx(one.published_checkpoint.value, rel=1e-4)
    for side in ("before", "after"):
        assert getattr(found.scores, side)["secret"].nats == pytest.approx(
            getattr(one.scores, side)["secret"].nats, rel=1e-4
        )
    best = Path(two["output"]) / "checkpoints" / f"step-{found.published_checkpoint.step:08d}"
    assert same_weights(Path(two["output"]) / "model", best)


def test_checkpoints_of_a_choice_are_whole_when_they_are_saved(shelf: Workspace) -> None:
    raw = chosen(shelf, "saved", {})
    best: list[int] = []
    for event in run_stage(shelf.plan(raw), command="test", cache=shelf.cache):
        if isinstance(event, CheckpointSaved):
            there = sorted(int(p.name.split("-")[1]) for p in (Path(raw["output"]) / "checkpoints").iterdir())
            values = {s: v for s, v in values_of(Path(raw["output"])).items() if s >= 2}
            best.append(min(values, key=lambda s: (values[s], s)))
            assert best[-1] in there and event.step in there and len(there) <= 2
    assert len(set(best)) > 1
