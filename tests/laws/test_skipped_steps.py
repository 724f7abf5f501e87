"""Law: a step whose loss is not finite changes nothing but the step number, is recorded and bounded, and resumes exactly.

A poisoned row makes the loss of its step NaN, wherever and whenever it is read.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from postgrad.data.loading.batch import Batch
from postgrad.errors import NonFiniteError
from postgrad.lineage.metrics import read_metrics
from postgrad.lineage.record import read_record
from postgrad.models.model import Output
from postgrad.objectives import objective
from postgrad.objectives.objective import CombinedLoss, Objective
from postgrad.optim.migu import MiguMask
from postgrad.optim.optimizer import AdamW
from postgrad.run import training_session
from postgrad.run.events import RunEvent, RunFinished, StepCompleted, StepSkipped
from postgrad.run.run import run_stage
from postgrad.run.summary import summary_text
from postgrad.training import step as training_step
from postgrad.training.checkpoint_state import restore_run
from postgrad.training.step import Run, StepReport, StepWithoutUpdate, train_step
from tests.conftest import StageOf
from tests.laws.test_step import EPS, batches, run_of
from tests.run.test_run import events_of, plan_of, trace

STEP_ROWS = 8
NAN = float("nan")


def poison(monkeypatch: pytest.MonkeyPatch, *positions: int) -> None:
    """Make the loss of the rows at these positions of the mixture NaN."""

    def poisoned(objectives: Sequence[Objective], output: Output, batch: Batch) -> CombinedLoss:
        combined = objective.combine_losses(objectives, output, batch)
        bad_B = torch.from_numpy(np.isin(batch.position_B, positions))
        if not bad_B.any():
            return combined
        rows_B = combined.rows_B.masked_fill(bad_B, NAN)
        return CombinedLoss(combined.loss * NAN, combined.sums_J * NAN, rows_B)

    monkeypatch.setattr(training_step, "combine_losses", poisoned)


def batch_at(step: int) -> list[Batch]:
    """The same rows at the positions of a step."""
    positions = np.arange(STEP_ROWS) + (step - 1) * STEP_ROWS
    parts = batches([4, 4])
    return [replace(part, position_B=positions[4 * i : 4 * i + 4]) for i, part in enumerate(parts)]


def state(run: Run) -> dict[str, torch.Tensor]:
    return {w.name: w.master.detach() for w in run.weights.entries} | run.optimizer.moments()


def same(one: Run, other: Run) -> bool:
    a, b = state(one), state(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def three_steps(
    monkeypatch: pytest.MonkeyPatch, bad: tuple[int, ...]
) -> tuple[Run, list[StepReport | StepWithoutUpdate]]:
    poison(monkeypatch, *bad)
    run = run_of()
    return run, [train_step(run, batch_at(step)) for step in (1, 2, 3)]


def first_and_third() -> tuple[Run, int]:
    """The reference: the second step is left out by hand."""
    run = run_of()
    tokens = train_step(run, batch_at(1)).tokens
    run.step = 2
    return run, tokens + train_step(run, batch_at(3)).tokens


def test_a_skipped_step_leaves_weights_and_moments_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    run, reports = three_steps(monkeypatch, (11,))
    reference, tokens = first_and_third()
    assert same(run, reference) and run.trained_tokens == tokens == run.trained_tokens_by_source.sum()
    assert run.optimizer.update_counts() == reference.optimizer.update_counts()
    skipped = reports[1]
    assert isinstance(skipped, StepWithoutUpdate) and skipped.positions == (11,)
    assert [run.step, run.skipped_steps] == [3, 1]


def with_zero_gradients(run: AdamW) -> None:
    """The mutant: an update with zero gradients, which moves moments and decays weights."""
    for master in run.weights.masters:
        master.grad = torch.zeros_like(master)
    run.step(1e-3)


def keeping_gradients(run: AdamW) -> None:
    """The mutant: the gradients that are not finite stay for the next step."""


@pytest.mark.parametrize("mutant", [with_zero_gradients, keeping_gradients])
def test_a_step_that_is_only_half_skipped_would_be_caught(
    mutant: Callable[[AdamW], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AdamW, "skip", mutant)
    run, _ = three_steps(monkeypatch, (11,))
    assert not same(run, first_and_third()[0])


@pytest.mark.parametrize("forgets", [True, False], ids=["law", "mutant"])
def test_a_sparse_update_forgets_the_outputs_of_a_skipped_step(forgets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not forgets:
        monkeypatch.setattr(MiguMask, "discard", lambda self: None)
    poison(monkeypatch, 0)
    run = run_of()
    mask = MiguMask(0.3, run.model, run.weights.entries)
    run.optimizer = AdamW(run.weights, betas=(0.9, 0.95), eps=EPS, weight_decay=0.1, update_mask=mask)
    train_step(run, batch_at(1))
    assert all(not layer.sums_O.any() for layer in mask.layers) == forgets


# -- a whole stage -----------------------------------------------------------------------------------------------------

POISONED = (3 * STEP_ROWS + 2, 3 * STEP_ROWS + 5, 11 * STEP_ROWS)
"""Rows of steps 4 and 12 (of 24)."""


def stopping_after(raw: dict[str, Any], cache: Path, step: int) -> None:
    """Run up to an event of a step, and leave as a kill does: without a checkpoint of it."""
    generator = run_stage(plan_of(raw, cache), command="test", cache=cache)
    for event in generator:
        if isinstance(event, StepCompleted | StepSkipped) and step_of(event) == step:
            generator.close()
            return


def step_of(event: RunEvent) -> int:
    return event.row.step if isinstance(event, StepSkipped) else event.report.step  # type: ignore[union-attr]


@pytest.fixture
def skipping(stage_of: StageOf, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run with two skipped steps."""
    poison(monkeypatch, *POISONED)
    events = events_of(stage_of(output=str(tmp_path / "whole")), cache)
    assert [step_of(event) for event in events if isinstance(event, StepSkipped)] == [4, 12]
    assert isinstance(events[-1], RunFinished)
    (tmp_path / "summary.txt").write_text(summary_text(events[-1]))
    return tmp_path / "whole"


def test_skipped_steps_are_recorded_and_shown(skipping: Path, stage_of: StageOf, cache: Path) -> None:
    record = read_record(skipping)
    loader_rows = plan_of(stage_of(), cache).data.mixture.rows(3)
    first, second = record.totals.skipped_steps
    expected = [(int(loader_rows[0][i]), int(loader_rows[1][i])) for i in (2, 5)]
    names = [source.name for source in record.plan.sources]
    assert [(names.index(row.source), row.row) for row in first.rows] == expected
    assert (first.step, second.step, first.loss, len(second.rows)) == (4, 12, None, 1)
    trained = read_metrics(skipping / "metrics.jsonl").steps
    assert [row.step for row in trained] == [s for s in range(1, record.plan.steps + 1) if s not in (4, 12)]
    assert record.totals.tokens == sum(row.tokens for row in trained) and record.totals.steps == record.plan.steps
    for text in ((skipping / "report.html").read_text(), (skipping.parent / "summary.txt").read_text()):
        assert "2 steps were skipped" in text and first.list_rows() in text


def test_killed_before_and_after_a_skipped_step_it_ends_with_the_same_bits(
    skipping: Path, stage_of: StageOf, cache: Path
) -> None:
    raw = stage_of(output=str(skipping.parent / "parts"), save={"every": "1 steps"})
    for step in (3, 4, 5, 12):
        stopping_after(raw, cache, step)
    events_of(raw, cache)
    assert trace(skipping.parent / "parts") == trace(skipping)
    assert read_record(skipping.parent / "parts").totals.skipped_steps == read_record(skipping).totals.skipped_steps


def test_too_many_skipped_steps_end_the_run_and_a_higher_limit_resumes_it(
    skipping: Path, stage_of: StageOf, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bounded(most: int, name: str = "bounded") -> list[RunEvent]:
        return events_of(stage_of(output=str(skipping.parent / name), optimizer={"max_skipped_steps": most}), cache)

    told = r"step 12.*1 earlier steps were skipped(?s:.)*optimizer\.max_skipped_steps"
    for _ in range(2):  # a resume counts the steps skipped before its checkpoint
        with pytest.raises(NonFiniteError, match=told):
            bounded(1)
    shutil.copytree(skipping.parent / "bounded", skipping.parent / "mutant")
    bounded(2)
    assert trace(skipping.parent / "bounded") == trace(skipping)

    def forgetful(run: Run, folder: Path) -> None:
        restore_run(run, folder)
        run.skipped_steps = 0

    monkeypatch.setattr(training_session, "restore_run", forgetful)
    assert isinstance(bounded(1, "mutant")[-1], RunFinished)


def test_a_stage_of_which_most_is_skipped_ends(stage_of: StageOf, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However short it is: otherwise a model that was not trained would be published."""
    raw = stage_of(tokens=1500)
    steps = plan_of(raw, cache).steps
    assert 4 <= steps <= 20  # the limit of the stage alone would let most of them pass
    poison(monkeypatch, *range(STEP_ROWS, 10_000))  # all but the first step
    with pytest.raises(NonFiniteError, match=rf"step {steps // 2 + 2}:"):
        events_of(raw, cache)
    assert not (Path(raw["output"]) / "model").exists()


PROGRAM = """
import sys
sys.path.insert(0, {root!r})
import pytest
from tests.laws.test_skipped_steps import POISONED, poison
poison(pytest.MonkeyPatch(), *POISONED)
from postgrad.cli.main import main
main()
"""


@pytest.mark.timeout(600)
def test_two_ranks_skip_the_same_step(stage_of: StageOf, cache: Path, tmp_path: Path) -> None:
    """The rows are on one rank each; both skip, and the record names the rows of every rank."""
    program, file = tmp_path / "poisoned.py", tmp_path / "stage.yaml"
    program.write_text(PROGRAM.format(root=str(Path.cwd())))
    batch = {"global_batch_size": STEP_ROWS, "micro_batch_size": 2}
    file.write_text(yaml.safe_dump(stage_of(tokens=3000, batch=batch)))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "0",
        "--standalone",
    ]
    environment = {**os.environ, "POSTGRAD_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(program), "train", str(file)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = read_record(tmp_path / "run").totals.skipped_steps
    assert (first.step, len(first.rows), second.step, len(second.rows)) == (4, 2, 12, 1)
