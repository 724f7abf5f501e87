"""Pseudo-perplexity in a stage and from the command line: before and after, beside the masked loss, of encoders alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from postgrad.cli.render import evaluation_text
from postgrad.commands.evaluate import TextEvaluation, evaluate
from postgrad.errors import StageError
from postgrad.plan.plan import Plan
from postgrad.run.run_folder import REPORT
from postgrad.run.summary import summary_text
from tests.tiny_stages import LENGTH, Workspace, make_workspace, run_interrupted, run_trace


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("shelf"), tmp_path_factory.getbasetemp() / "cache")


def stage_of(
    shelf: Workspace, name: str, tokens: int = 60, tuning: dict[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    evaluation = {**shelf.text_evaluation, "pseudo_perplexity": tokens}
    return shelf.stage(name, tuning, model="bert", tokens=200, evaluation=evaluation, **changes)


def by_hand(folder: Path, plan: Plan, name: str) -> tuple[float, int]:
    """The mean over every token of the first texts of a set, by plain transformers and its tokenizer's own frame."""
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    given = next(texts for texts in plan.evaluation.pseudo_perplexity_sets if texts.name == name)
    held_out = next(c for c in plan.evaluation.sets if c.name == name)
    nats: list[float] = []
    for window in given.windows:
        ids = window.ids.tolist()
        assert ids == tokenizer(tokenizer.decode(ids[1:-1]))["input_ids"]
        for place in range(1, len(ids) - 1):
            if ids[place] in tokenizer.all_special_ids:
                continue
            masked = torch.tensor([[*ids[:place], tokenizer.mask_token_id, *ids[place + 1 :]]])
            with torch.no_grad():
                log_p = torch.log_softmax(model(input_ids=masked).logits[0, place].double(), -1)
            nats.append(-float(log_p[ids[place]]))
    assert len(given) <= len(held_out)
    return float(np.mean(nats)), len(nats)


def test_it_is_measured_before_and_after_on_the_same_texts(shelf: Workspace) -> None:
    raw = stage_of(shelf, "pseudo")
    done, plan = shelf.run(raw), shelf.plan(raw)
    told = done.record.pseudo_perplexity
    for side, folder in (("before", shelf.folder / "bert"), ("after", done.run_folder / "model")):
        for name, scores in getattr(told.scores, side).items():
            nats, tokens = by_hand(folder, plan, name)
            assert scores.tokens == tokens >= 60
            assert scores.nats == pytest.approx(nats, rel=1e-5)
            assert scores.perplexity == pytest.approx(math.exp(nats), rel=1e-4)
            assert scores.low < nats < scores.high
    assert {name: change.role for name, change in told.changes.items()} == {
        "old-heldout": "retained",
        "new-heldout": "learned",
    }
    for name, change in told.changes.items():
        before, after = (getattr(told.scores, side)[name].nats for side in ("before", "after"))
        assert change.difference == pytest.approx(after - before)
    # Beside the masked loss, in the end text and on the page; the gate and the curves know nothing of it.
    assert told.scores.after.keys() == done.record.scores.after.keys()
    text, page = summary_text(done), (done.run_folder / REPORT).read_text()
    for place in (text, page):
        assert "Pseudo-perplexity before and after" in place
    assert f"{told.scores.after['new-heldout'].nats:.3f}" in text


def test_a_killed_run_keeps_its_before(shelf: Workspace) -> None:
    whole = shelf.run(stage_of(shelf, "whole"))
    parts = run_interrupted(shelf, stage_of(shelf, "parts"))
    assert run_trace(parts.run_folder) == run_trace(whole.run_folder)
    assert parts.record.pseudo_perplexity == whole.record.pseudo_perplexity


def test_the_start_model_reads_without_the_vectors_of_the_stage(shelf: Workspace) -> None:
    plan = shelf.plan(stage_of(shelf, "prompt", tuning={"kind": "prompt", "length": 3}))
    for now, before in zip(
        plan.evaluation.pseudo_perplexity_sets, plan.evaluation.pseudo_perplexity_sets_before, strict=True
    ):
        for one, other in zip(now.windows, before.windows, strict=True):
            assert len(one.ids) == len(other.ids) + 3
            assert one.ids[one.masked_positions].tolist() == other.ids[other.masked_positions].tolist()


def test_it_is_off_unless_asked_for(shelf: Workspace) -> None:
    done = shelf.run(stage_of(shelf, "off", 0))
    assert done.record.pseudo_perplexity is None
    assert "given all the others" not in summary_text(done) + (done.run_folder / REPORT).read_text()
    assert not list((done.run_folder / "scores").glob("pseudo*"))


@pytest.mark.parametrize("tokens", [1, 40, 100, 100_000])
def test_whole_windows_are_taken_up_to_the_one_that_reaches_it(shelf: Workspace, tokens: int) -> None:
    plan = shelf.plan(stage_of(shelf, f"up-to-{tokens}", tokens, data={"sequence_length": 16}))
    for texts, held_out in zip(plan.evaluation.pseudo_perplexity_sets, plan.evaluation.sets, strict=True):
        counts = [len(window.masked_positions) for window in texts.windows]
        assert sum(counts[:-1]) < tokens
        assert sum(counts) >= tokens or len(texts) == len(held_out)
        assert all(len(window.ids) <= 16 for window in texts.windows)
        if len(texts) == len(held_out) and sum(counts) < tokens:  # all of it: every byte counts
            assert texts.bytes.tolist() == held_out.bytes.tolist()
        assert 0 < texts.bytes.sum() <= held_out.bytes.sum()


def test_the_command_scores_an_encoder(shelf: Workspace) -> None:
    files = [shelf.file("old", held_out=True), shelf.file("new", held_out=True)]

    def asked(pseudo: int, model: str = "bert") -> TextEvaluation:
        return evaluate(str(shelf.folder / model), files, context=LENGTH, cache=shelf.cache, pseudo=pseudo)

    found = asked(60)
    told = shelf.run(stage_of(shelf, "pseudo")).record.pseudo_perplexity.scores.before
    assert {
        name: score.pseudo_perplexity.nats for name, score in found.sets.items() if score.pseudo_perplexity
    } == pytest.approx({name: row.nats for name, row in told.items()})
    assert evaluation_text(found).count("masked one at a time") == 2
    assert all(score.pseudo_perplexity is None for score in asked(0).sets.values())
    with pytest.raises(StageError, match="is not a masked language model"):
        asked(60, "llama")
    with pytest.raises(StageError, match="cannot mask -1 tokens"):
        asked(-1)


def test_a_decoder_is_not_asked(shelf: Workspace) -> None:
    raw = shelf.stage("llama", evaluation={**shelf.text_evaluation, "pseudo_perplexity": "2k"})
    with pytest.raises(StageError, match="pseudo-perplexity needs a masked language model") as met:
        shelf.plan(raw)
    assert met.value.where == "evaluation.pseudo_perplexity"
