"""Token weights and distillation without labels as parts of a stage: with each other and a tuning, resumed, and refused."""

from __future__ import annotations

from typing import Any

import pytest

from postgrad.errors import StageError
from postgrad.lineage.metrics import StepRow, read_metrics
from postgrad.lineage.record import read_record
from tests.tiny_stages import Workspace, make_workspace, run_interrupted, run_trace

ENTROPY = {"kind": "next-token", "token_weights": {"kind": "entropy", "top_k": 5}}
TMKL = {"kind": "distill", "vocabulary": "without-labels", "weight": 0.5}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("weights"), tmp_path_factory.getbasetemp() / "cache")


def step_rows(workspace: Workspace, raw: dict[str, Any]) -> list[StepRow]:
    run_folder = workspace.run(raw).run_folder
    return [row for row in read_metrics(run_folder / "metrics.jsonl") if isinstance(row, StepRow)]


def test_they_compose_and_resume_to_the_same_bits(workspace: Workspace) -> None:
    options: dict[str, Any] = {"tuning": {"kind": "lora", "rank": 2}, "objectives": [ENTROPY, TMKL]}
    whole = workspace.run(workspace.stage("whole", **options))
    parts = run_interrupted(workspace, workspace.stage("parts", **options))
    assert run_trace(parts.run_folder) == run_trace(whole.run_folder)
    first = step_rows(workspace, workspace.stage("whole", **options))[0].losses_by_objective
    assert first["distill"] == pytest.approx(0.0, abs=1e-6)  # the model is its teacher
    plain = workspace.stage("plain", tuning=options["tuning"])
    unweighted = step_rows(workspace, plain)[0].losses_by_objective["next-token"]
    assert 0 < first["next-token"] < unweighted
    scored = [read_record(workspace.run(raw).run_folder).scores for raw in (plain, workspace.stage("whole", **options))]
    assert scored[0].before == scored[1].before  # held-out losses have no weights


def test_an_exponent_of_0_is_the_plain_loss(workspace: Workspace) -> None:
    weights = {"kind": "probability", "exponent": 0}
    ours = step_rows(workspace, workspace.stage("zero", objectives=[{"kind": "next-token", "token_weights": weights}]))
    plain = step_rows(workspace, workspace.stage("none"))
    assert [row.loss for row in ours] == pytest.approx([row.loss for row in plain], rel=1e-5)


def test_a_cache_and_a_classifier_are_refused(workspace: Workspace) -> None:
    with pytest.raises(StageError, match="requires `cache: none`"):
        workspace.plan(workspace.stage("cached", objectives=[ENTROPY, {**TMKL, "cache": "sampled"}]))
    classify = [{"kind": "classify"}, {**TMKL, "weight": 1}]
    sources = [workspace.source("labelled", "labelled")]
    raw = workspace.stage("classes", model="bert", sources=sources, objectives=classify, evaluation={"samples": 0})
    with pytest.raises(StageError, match="predicts classes"):
        workspace.plan(raw)
