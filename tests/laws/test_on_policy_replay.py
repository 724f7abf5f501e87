"""Laws of on-policy replay: what is trained on by hand, the filter and its counts, exact resume, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from postgrad.check.check import check_stage
from postgrad.config.objectives import OnPolicyReplayObjective
from postgrad.data.layouts.rows import IGNORED
from postgrad.data.random_streams import RandomStreams, derive_key
from postgrad.distributed.world import World
from postgrad.errors import PostgradError
from postgrad.hardware.execution import Execution
from postgrad.lineage.metrics import read_metrics
from postgrad.lineage.record import read_record
from postgrad.models import decoding
from postgrad.models.decoding import DecodingWay
from postgrad.plan.plan import Plan
from postgrad.run.build import build_run, make_loader, make_sampler, make_step
from postgrad.run.run import run_stage
from postgrad.run.tuned_model import make_tuned_model
from postgrad.training.on_policy import AnswerFilter, OnPolicySampler
from postgrad.training.step import Run
from tests.tiny_stages import Workspace, make_workspace, run_interrupted, run_trace

CPU = World(torch.device("cpu"))
REPLAY: dict[str, Any] = {"kind": "on-policy-replay", "max_new_tokens": 6, "samples": 3, "on": ["completion"]}
NEXT = {"kind": "next-token", "on": ["new"]}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    return make_workspace(tmp_path_factory.mktemp("replay"), tmp_path_factory.getbasetemp() / "cache")


def stage_of(workspace: Workspace, name: str, objective: dict[str, Any], **changes: Any) -> dict[str, Any]:
    sources = [workspace.source("new", share=0.5), workspace.source("completion", share=0.5, role="replay")]
    return workspace.stage(name, **{"sources": sources, "objectives": [NEXT, REPLAY | objective], **changes})


def built(plan: Plan) -> tuple[Run, Any]:
    execution = Execution("float32", False, "sdpa", 1, 4, False, 0.0)
    run = build_run(plan, make_tuned_model(plan, CPU), execution, CPU)
    run.model.train()
    return run, make_loader(plan, execution, CPU)


def digit_score(answer: list[int], reference: list[int]) -> float:
    """A score that any answer may have; a reference is there."""
    assert reference
    return sum(answer) % 10 / 10


def by_hand(run: Run, plan: Plan, batch: Any) -> list[list[int]]:
    """The answer to each prompt: each is sampled alone without a cache, then the best is taken; nothing below .8."""
    draws, eos, out = RandomStreams(derive_key(plan.stage.seed, 0x0F11)), plan.model.inputs.encoder.eos, []
    for i in range(len(batch.labels)):
        asked = (batch.labels[i] != IGNORED).numpy()
        answers = []
        for sample in range(3):
            ids = batch.inputs["input_ids"][i, : asked.argmax() + 1].tolist()
            start = len(ids)
            for u in draws.generator(int(batch.position_B[i]), sample).random(int(asked.sum())):
                with torch.no_grad():
                    logits = run.model.pretrained(torch.tensor([ids]), use_cache=False).logits[0, -1].double()
                sums = logits.softmax(-1).cumsum(-1)
                ids.append(min(int((sums <= u * sums[-1]).sum()), len(sums) - 1))
                if ids[-1] == eos:
                    break
            answers.append(ids[start:])
        scores = [sum(token for token in answer if token != eos) % 10 for answer in answers]
        best = int(np.argmax(scores))
        out.append(answers[best] if scores[best] >= 8 else [])
    return out


@pytest.mark.parametrize("variant", ["", "one length at a time", "no filter", "the first answer"])
def test_the_best_answer_of_the_newest_model_is_trained_on(
    variant: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = workspace.plan(stage_of(workspace, "sampled", {}))
    run, loader = built(plan)
    with torch.no_grad():  # so that answers end early now and then
        run.model.pretrained.lm_head.weight[plan.model.inputs.encoder.eos] *= 9  # type: ignore[union-attr]
    batch = next(b for b in loader.read_batches(1) if 1 in b.objectives)
    batch = replace(batch, inputs={k: torch.cat([t, t]) for k, t in batch.inputs.items()})
    batch = replace(batch, labels=torch.cat([batch.labels] * 2), label_count_B=np.tile(batch.label_count_B, 2))
    batch = replace(batch, position_B=np.arange(len(batch.labels)))
    if variant == "one length at a time":
        monkeypatch.setattr(decoding, "find_decoding_way", lambda model, padded=False: DecodingWay.WHOLE)
    if variant == "the first answer":
        monkeypatch.setattr(AnswerFilter, "choose", lambda self, answers, reference: 0)
    threshold = 0.0 if variant == "no filter" else 0.8
    sampler = replace(
        make_sampler(plan, run.model, plan.objectives[1]),  # type: ignore[arg-type]
        filter=AnswerFilter(digit_score, 3, threshold),
    )
    sampled = sampler(batch)
    ours = [labels[labels != IGNORED].tolist() for labels in sampled.labels]
    expected = by_hand(run, plan, batch)
    assert (ours == expected) == (variant in ("", "one length at a time"))
    assert [len(answer) for answer in ours] == sampled.label_count_B.tolist()
    assert [] in expected and len({len(answer) for answer in expected}) > 1


def test_rejected_prompts_change_nothing_and_are_counted(workspace: Workspace) -> None:
    """A step whose answers are all rejected is that of the other sources alone."""
    plan = workspace.plan(stage_of(workspace, "rejected", {"min_score": 1.0, "score": "exact"}))
    (run, loader), (alone, _) = built(plan), built(plan)
    batches = next(b for b in map(loader.read_batches, range(1, 9)) if len(b) > 1)
    report = make_step(plan, run)(run, batches)
    others = [b for b in batches if 1 not in b.objectives]
    assert make_step(plan, alone)(alone, others).loss == report.loss
    prompts = sum(len(b.labels) for b in batches if 1 in b.objectives)
    assert (report.sampled_prompts, report.accepted_answers) == (prompts, 0)  # type: ignore[union-attr]
    assert report.tokens == sum(b.label_count for b in others)


def test_a_step_without_any_token_is_skipped_up_to_a_bound(workspace: Workspace) -> None:
    only = {"sources": [workspace.source("completion")], "objectives": [REPLAY | {"min_score": 1.0, "score": "exact"}]}
    events: list[Any] = []
    plan = workspace.plan(workspace.stage("nothing", optimizer={"max_skipped_steps": 2}, **only))
    with pytest.raises(
        PostgradError, match=r"rejects all answers to the 4 prompts of this step.*after 2 skipped steps"
    ):
        events.extend(run_stage(plan, command="test", cache=workspace.cache))
    rows = read_metrics(workspace.folder / "runs" / "nothing" / "metrics.jsonl").rows
    assert [row.step for row in rows if row.kind == "skipped"] == [1, 2]


def test_killed_and_stopped_it_ends_with_the_same_bits_and_counts(workspace: Workspace) -> None:
    changes = {"min_score": 0.1, "score": "variety"}
    whole = workspace.run(stage_of(workspace, "whole", changes))
    parts = run_interrupted(workspace, stage_of(workspace, "parts", changes))
    assert run_trace(parts.run_folder) == run_trace(whole.run_folder)
    totals = read_record(whole.run_folder).totals
    steps = read_metrics(whole.run_folder / "metrics.jsonl").steps
    assert totals.sampled_prompts == sum(row.sampled_prompts or 0 for row in steps) > 0
    assert 0 < (totals.accepted_answers or 0) <= totals.sampled_prompts
    source = next(s for s in totals.sources if s.name == "completion")
    assert source.trained_tokens == sum(row.loss_sums_by_source.get("completion", (0, 0))[1] for row in steps)


@pytest.mark.parametrize(
    ("score", "answer", "reference", "expected"),
    [("f1", " words", " words", 1.0), ("f1", " sums", " words", 0.0), ("variety", "", "", 0.0)],
)
def test_scores_are_those_of_words(
    workspace: Workspace, score: str, answer: str, reference: str, expected: float
) -> None:
    plan = workspace.plan(stage_of(workspace, "scored", {}))
    sampler = make_sampler(plan, None, OnPolicyReplayObjective(kind="on-policy-replay", score=score))  # type: ignore[arg-type]
    assert isinstance(sampler, OnPolicySampler) and sampler.filter is not None
    ids = [plan.model.tokenizer(text)["input_ids"] for text in (answer, reference)]
    assert sampler.filter.score(*ids) == expected


def test_check_tells_the_cost_and_how_many_answers_pass(workspace: Workspace) -> None:
    found = check_stage(workspace.plan(stage_of(workspace, "cost", {"score": "variety"})), cache=workspace.cache)
    (cost,) = found["on_policy_replay"]
    assert cost["share_of_step"] > 0 and cost["accepted_share"] == 1.0
    assert "on-policy-replay: the model gives 3 answers to each prompt of completion" in found["text"]


def test_running_text_has_no_answer_to_compare_with(workspace: Workspace) -> None:
    raw = stage_of(workspace, "refused", {"on": ["old"]})
    raw["data"]["sources"][1] = workspace.source("old", share=0.5, role="replay")
    with pytest.raises(PostgradError, match="without an answer to compare with"):
        workspace.plan(raw)
    raw["objectives"][1]["score"] = "variety"
    workspace.plan(raw)
