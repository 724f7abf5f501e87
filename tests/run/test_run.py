"""A whole stage: what it leaves behind, stopping and resuming, the gate, and refusals that lose nothing."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from postgrad.config.stage_file import parse_stage
from postgrad.errors import BusyError, DiskError, NonFiniteError, ResumeError
from postgrad.evaluation import before_after
from postgrad.lineage.metrics import read_metrics
from postgrad.lineage.record import read_record
from postgrad.plan.plan import Plan, make_plan
from postgrad.run.events import (
    CheckpointSaved,
    EvaluationCompleted,
    RunEvent,
    RunFinished,
    RunStarted,
    RunStopped,
    StepCompleted,
)
from postgrad.run.milestones import evaluation_steps
from postgrad.run.run import run_stage
from postgrad.storage.atomic import verify
from tests.conftest import StageOf


def plan_of(raw: dict[str, Any], cache: Path) -> Plan:
    return make_plan(parse_stage(raw, "test"), Path.cwd(), cache)


def events_of(raw: dict[str, Any], cache: Path) -> list[RunEvent]:
    return list(run_stage(plan_of(raw, cache), command="test", cache=cache))


def test_a_run_leaves_everything_that_was_promised(stage_of: StageOf, cache: Path, tmp_path: Path) -> None:
    events = events_of(stage_of(), cache)
    finished = events[-1]
    assert isinstance(finished, RunFinished) and not finished.already_complete
    home = tmp_path / "run"
    for name in ("stage.yaml", "plan.json", "metrics.jsonl", "record.json", "report.html", "model", "scores"):
        assert (home / name).exists(), name
    record = read_record(home)
    assert record.status == "finished"
    verify(home / "model")
    steps = [row for row in read_metrics(home / "metrics.jsonl") if row.kind == "step"]
    assert [row.step for row in steps] == list(range(1, record.plan.steps + 1))
    # What was trained is what the metrics and the sources say, and close to what was planned.
    assert sum(row.tokens for row in steps) == record.totals.tokens
    assert sum(s.trained_tokens for s in record.totals.sources) == record.totals.tokens
    for source, planned in zip(record.totals.sources, (0.75, 0.25), strict=True):
        assert source.share == pytest.approx(planned, abs=0.02)
    for row in steps:
        assert sum(nats for nats, _ in row.loss_sums_by_source.values()) == pytest.approx(
            row.loss * row.tokens, rel=1e-5
        )
        assert sum(tokens for _, tokens in row.loss_sums_by_source.values()) == row.tokens
    for book in record.token_ledger.values():
        assert book.read == book.held_out + book.dropped + book.truncated + book.placed
    assert record.changes["new-heldout"].verdict == "learnt"
    assert {s.set for s in record.samples} == {"old-heldout", "new-heldout"}


def test_the_published_model_is_the_trained_one(stage_of: StageOf, cache: Path, tmp_path: Path) -> None:
    events_of(stage_of(), cache)
    home = tmp_path / "run"
    model = AutoModelForCausalLM.from_pretrained(home / "model")
    checkpoint = AutoModelForCausalLM.from_pretrained(sorted((home / "checkpoints").iterdir())[-1])
    for (name, a), (_, b) in zip(model.named_parameters(), checkpoint.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert AutoTokenizer.from_pretrained(home / "model")("one")["input_ids"]
    start = AutoModelForCausalLM.from_pretrained(read_record(home).model.source)
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True)]
    assert all(moved)


def trace(home: Path) -> list[str]:
    """Everything that must be the same bit for bit: losses as hex, evaluations, and the weights."""
    rows = []
    for row in read_metrics(home / "metrics.jsonl"):
        data = row.model_dump(exclude={"seconds"})
        rows.append(json.dumps({k: v.hex() if isinstance(v, float) else v for k, v in data.items()}))
    return [*rows, json.loads((home / "model" / "manifest.json").read_text())["model.safetensors"]["sha256"]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stopped_and_resumed_equals_never_stopped(stage_of: StageOf, cache: Path, tmp_path: Path, dtype: str) -> None:
    compute = {"threads": 1, "dtype": dtype, "compile": False}
    events_of(stage_of(output=str(tmp_path / "whole"), compute=compute), cache)
    raw = stage_of(output=str(tmp_path / "parts"), compute=compute)
    stops = 0
    while True:
        generator = run_stage(plan_of(raw, cache), command="test", cache=cache)
        last: RunEvent | None = None
        made = 0
        for event in generator:
            last = event
            if isinstance(event, StepCompleted):
                made += 1
                if made == 3:
                    os.kill(os.getpid(), signal.SIGTERM)
        if isinstance(last, RunFinished):
            break
        assert isinstance(last, RunStopped)
        assert read_record(tmp_path / "parts").status == "stopped"
        stops += 1
    assert stops > 3
    assert trace(tmp_path / "parts") == trace(tmp_path / "whole")


def test_a_finished_run_is_not_run_again(stage_of: StageOf, cache: Path) -> None:
    events_of(stage_of(), cache)
    again = events_of(stage_of(), cache)
    assert len(again) == 1 and isinstance(again[0], RunFinished) and again[0].already_complete


def test_a_changed_stage_is_refused_with_its_differences(stage_of: StageOf, cache: Path) -> None:
    events_of(stage_of(), cache)
    with pytest.raises(ResumeError, match=r"schedule\.peak: 0\.01 -> 0\.02"):
        events_of(stage_of(schedule={"kind": "rewarm", "peak": 2e-2, "floor": 1e-3, "warmup": "2 steps"}), cache)


def test_changed_text_is_refused(stage_of: StageOf, cache: Path, tmp_path: Path, base: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text((base / "new.jsonl").read_text())
    data = {"sequence_length": 32, "sources": [{"name": "new", "path": str(text)}]}
    events_of(stage_of(data=data), cache)
    with text.open("a") as file:
        file.write('{"text": "one more line of text"}\n')
    with pytest.raises(ResumeError, match=r"data\.new"):
        events_of(stage_of(data=data), cache)


def test_saving_more_often_is_no_other_run(stage_of: StageOf, cache: Path) -> None:
    events_of(stage_of(), cache)
    assert isinstance(events_of(stage_of(save={"every": "2 steps"}), cache)[-1], RunFinished)


def test_a_folder_that_is_no_run_is_left_alone(stage_of: StageOf, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(ResumeError, match="nor a run folder"):
        events_of(stage_of(), cache)
    assert (tmp_path / "run" / "thesis.txt").read_text() == "mine"


def test_two_processes_do_not_share_a_run(stage_of: StageOf, cache: Path) -> None:
    first = run_stage(plan_of(stage_of(), cache), command="test", cache=cache)
    next(e for e in first if isinstance(e, RunStarted))
    with pytest.raises(BusyError, match=str(os.getpid())):
        events_of(stage_of(), cache)
    first.close()


def test_the_gate_fails_when_the_old_is_forgotten(stage_of: StageOf, cache: Path, tmp_path: Path) -> None:
    learn_old = stage_of(
        output=str(tmp_path / "first"),
        data={
            "sequence_length": 32,
            "sources": [{"name": "old", "path": str(stage_of()["data"]["sources"][1]["path"])}],
        },
        tokens=12000,
    )
    events_of(learn_old, cache)
    naive = stage_of(
        model=str(tmp_path / "first"),
        max_forgetting="2%",
        data={"sequence_length": 32, "sources": [{"name": "new", "path": stage_of()["data"]["sources"][0]["path"]}]},
    )
    finished = events_of(naive, cache)[-1]
    assert isinstance(finished, RunFinished)
    assert finished.record.status == "gate-failed" and not finished.record.retention_gate.passed
    assert finished.record.changes["old-heldout"].verdict == "forgot"
    assert (tmp_path / "run" / "model" / "config.json").exists()  # everything is kept
    assert finished.record.parents[0].id == read_record(tmp_path / "first").id


def test_a_loss_that_is_not_finite_stops_before_the_update(
    stage_of: StageOf, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = stage_of(optimizer={"max_skipped_steps": 0})
    generator = run_stage(plan_of(raw, cache), command="test", cache=cache)
    for event in generator:
        if isinstance(event, CheckpointSaved):
            break
    from postgrad.objectives.next_token import TokenLoss

    monkeypatch.setattr(TokenLoss, "loss_weight", lambda self, step: float("nan"))
    with pytest.raises(NonFiniteError, match="the weights are unchanged"):
        list(generator)
    monkeypatch.undo()
    assert isinstance(events_of(raw, cache)[-1], RunFinished)
    events_of(stage_of(output=str(tmp_path / "whole")), cache)
    assert trace(tmp_path / "run") == trace(tmp_path / "whole")


def test_held_out_sets_are_looked_at_densely_at_the_start() -> None:
    looks = evaluation_steps("10%", 10_000, 10**9)
    assert {25, 50, 100, 150, 200, 1000, 2000, 10_000} <= looks
    assert evaluation_steps("50%", 2, 100) == {1, 2}


def test_before_and_after_are_of_the_same_documents(stage_of: StageOf, cache: Path, tmp_path: Path) -> None:
    events = events_of(stage_of(), cache)
    assert any(isinstance(e, EvaluationCompleted) for e in events)
    scores = tmp_path / "run" / "scores"
    before, after = before_after.read_scores(scores / "before.npz"), before_after.read_scores(scores / "after.npz")
    for name in before:
        assert np.array_equal(before[name].tokens_W, after[name].tokens_W)
        assert np.array_equal(before[name].bytes_N, after[name].bytes_N)


def losses_of(home: Path) -> list[float]:
    return [row.loss for row in read_metrics(home / "metrics.jsonl") if row.kind == "step"]


def test_recomputed_activations_make_no_difference(stage_of: StageOf, cache: Path, tmp_path: Path) -> None:
    compute = {"threads": 1, "dtype": "float32", "compile": False}
    events_of(stage_of(output=str(tmp_path / "kept"), compute=compute), cache)
    events_of(stage_of(output=str(tmp_path / "again"), compute={**compute, "activation_checkpointing": True}), cache)
    assert losses_of(tmp_path / "again") == pytest.approx(losses_of(tmp_path / "kept"), rel=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("default")  # dynamo looks at tensors in ways that torch itself warns of
def test_a_compiled_bf16_run_resumes_to_the_same_bits(stage_of: StageOf, cache: Path, tmp_path: Path) -> None:
    compute = {"threads": 1, "dtype": "bfloat16", "compile": True}
    events_of(stage_of(output=str(tmp_path / "whole"), compute=compute), cache)
    raw = stage_of(output=str(tmp_path / "parts"), compute=compute)
    for event in run_stage(plan_of(raw, cache), command="test", cache=cache):
        if isinstance(event, StepCompleted) and event.report.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
    assert isinstance(events_of(raw, cache)[-1], RunFinished)
    assert trace(tmp_path / "parts") == trace(tmp_path / "whole")
    # The mutant: the same run not compiled is another run, so the comparison can fail.
    events_of(stage_of(output=str(tmp_path / "plain"), compute={**compute, "compile": False}), cache)
    assert trace(tmp_path / "plain") != trace(tmp_path / "whole")


def test_an_output_that_cannot_be_made_is_told(stage_of: StageOf, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DiskError, match="file/run"):
        events_of(stage_of(output=str(tmp_path / "file" / "run")), cache)
    assert (tmp_path / "file").read_text() == "in the way"
