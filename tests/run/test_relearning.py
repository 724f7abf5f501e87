"""Steps on old text tell what is lost from what is out of reach: on copies, on documents that they have not read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from postgrad.check.check import check_stage
from postgrad.config.stage_file import parse_stage
from postgrad.data.tokens.held_out_split import held_out_mask
from postgrad.evaluation.before_after import read_scores
from postgrad.evaluation.perplexity import Scores
from postgrad.lineage.record import Interval, SetRelearning
from postgrad.plan.plan import Plan, make_plan
from postgrad.run import relearning
from postgrad.run.events import InfoMessage, RunFinished
from postgrad.run.run import run_stage
from postgrad.storage.atomic import MANIFEST
from tests.conftest import StageOf, old_text, write_jsonl

Carried = Callable[..., tuple[RunFinished, list[Any]]]


@pytest.fixture
def carried_out(stage_of: StageOf, tmp_path: Path) -> Carried:
    """A stage on new text alone, from a model that has learnt the old text, which is measured on that."""

    def carry(**changes: Any) -> tuple[RunFinished, list[Any]]:
        raw = stage_of(**changes)
        events = list(
            run_stage(
                make_plan(parse_stage(raw, "t"), tmp_path, tmp_path / "cache"), command="t", cache=tmp_path / "cache"
            )
        )
        assert isinstance(events[-1], RunFinished)
        return events[-1], events

    return carry


@pytest.fixture
def knowing(carried_out: Carried, base: Path, tmp_path: Path) -> str:
    """A run that has learnt the old text."""
    data = {"sequence_length": 32, "sources": [{"name": "old", "path": str(base / "old.jsonl"), "max_passes": 100}]}
    evaluation = {"learned": [str(base / "old-heldout.jsonl")], "samples": 0, "drift_tokens": 0}
    last, _ = carried_out(data=data, evaluation=evaluation, output=str(tmp_path / "one"), tokens=12_000)
    return str(last.run_folder)


def forgetful(base: Path, model: str, **changes: Any) -> dict[str, Any]:
    evaluation = {
        "retained": [str(base / "old-heldout.jsonl")], "learned": [str(base / "new-heldout.jsonl")],
        "samples": 0, "drift_tokens": 0, "relearning_steps": 12, **changes.pop("evaluation", {}),
    }  # fmt: skip
    data = {"sequence_length": 32, "sources": [{"name": "new", "path": str(base / "new.jsonl"), "max_passes": 100}]}
    return {"model": model, "data": data, "evaluation": evaluation, "tokens": 8000, **changes}


def test_what_comes_back_is_told_from_what_is_lost(carried_out: Carried, knowing: str, base: Path) -> None:
    last, events = carried_out(**forgetful(base, knowing))
    found = last.record.relearning
    (entry,) = found.sets.values()
    assert found.steps == 12 and found.learning_rate == pytest.approx(1e-2)
    assert entry.forgotten.low > 0
    for loss in (entry.forgotten, entry.recovered, entry.remaining, entry.start_model_change):
        assert loss.low <= loss.value <= loss.high
    assert entry.recovered.value == pytest.approx(entry.forgotten.value - entry.remaining.value)
    assert entry.recovered_share.value == pytest.approx(entry.recovered.value / entry.forgotten.value)
    assert (
        entry.recovered.low > 0 and entry.recovered_share.value > 0.3
    )  # one text was over the other, and can be dug out
    (line,) = [
        event.message
        for event in events
        if isinstance(event, InfoMessage) and "recovered in 12 steps on old text" in event.message
    ]
    assert line.startswith("old-heldout: ")
    assert "Forgetting recovered by a few steps" in (last.run_folder / "report.html").read_text()
    # Only the half that the steps have not read counts, and what was forgotten is that of the scores on it.
    held_out = next(h for h in plan_at(last).evaluation.sets if h.role == "retained")
    unread = held_out_mask(held_out.digests, 0.5)
    assert entry.documents == int(unread.sum()) and 0 < entry.documents < len(held_out)
    before, after = (
        read_scores(last.run_folder / "scores" / f"{when}.npz")["old-heldout"] for when in ("before", "after")
    )
    nats = [np.bincount(s.document_W, s.nats_W, len(held_out))[unread].sum() for s in (before, after)]
    tokens = np.bincount(before.document_W, before.tokens_W, len(held_out))[unread].sum()
    assert entry.forgotten.value == pytest.approx((nats[1] - nats[0]) / tokens, rel=1e-6)


def plan_at(last: RunFinished) -> Plan:
    raw = last.record.stage
    return make_plan(parse_stage(raw, "t"), Path(last.record.stage_folder), last.run_folder.parent / "cache")


def test_copies_are_trained_and_the_published_model_is_not(
    carried_out: Carried, knowing: str, base: Path, tmp_path: Path
) -> None:
    one, _ = carried_out(**forgetful(base, knowing, output=str(tmp_path / "with")))
    other, _ = carried_out(
        **forgetful(base, knowing, output=str(tmp_path / "without"), evaluation={"relearning_steps": 0})
    )
    assert other.record.relearning is None
    manifests = [json.loads((run.run_folder / "model" / MANIFEST).read_text()) for run in (one, other)]
    assert manifests[0]["model.safetensors"] == manifests[1]["model.safetensors"]
    assert one.record.scores == other.record.scores


@pytest.mark.parametrize("tuning", [{"kind": "lora", "rank": 4}, {"kind": "prompt", "length": 3}])
def test_a_tuning_is_realigned_by_its_like(
    carried_out: Carried, knowing: str, base: Path, tuning: dict[str, Any]
) -> None:
    last, _ = carried_out(**forgetful(base, knowing, tuning=tuning))
    (entry,) = last.record.relearning.sets.values()
    assert entry.documents > 5 and np.isfinite(entry.remaining.value)


def test_a_replay_source_gives_its_other_documents(carried_out: Carried, knowing: str, base: Path) -> None:
    sources = [
        {"name": "new", "path": str(base / "new.jsonl"), "share": 0.9, "max_passes": 100},
        {
            "name": "old",
            "path": str(base / "old.jsonl"),
            "share": 0.1,
            "role": "replay",
            "max_passes": 100,
            "held_out": 0.3,
        },
    ]
    raw = forgetful(base, knowing, evaluation={"retained": [], "relearning_steps": 4})
    raw["data"]["sources"] = sources
    last, _ = carried_out(**raw)
    (name,) = last.record.relearning.sets
    held_out = next(h for h in plan_at(last).evaluation.sets if h.name == "old")
    assert name == "old" and last.record.relearning.sets[name].documents == len(held_out)


def test_nothing_is_tried_without_old_text_or_an_old_model(stage_of: StageOf, tmp_path: Path) -> None:
    raw = stage_of()
    raw["evaluation"] |= {"retained": [], "relearning_steps": 5}
    raw["data"]["sources"] = [{**raw["data"]["sources"][0], "share": 1.0}]
    plan = make_plan(parse_stage(raw, "t"), tmp_path, tmp_path / "cache")
    assert relearning._relearning_sources(plan) == []
    assert relearning.relearning_notes(plan) == [
        "no relearning test: there is no retained set (evaluation.relearning_steps)"
    ]
    raw["model"] = {"from_scratch": "llama-1M", "tokenizer": {"vocab_size": 300}}
    plan = make_plan(parse_stage(raw, "t"), tmp_path, tmp_path / "cache")
    (note,) = relearning.relearning_notes(plan)
    assert "the start model is new" in note


def test_a_set_that_is_too_small_is_named(stage_of: StageOf, base: Path, tmp_path: Path) -> None:
    few = write_jsonl(tmp_path / "few.jsonl", old_text(9, 5))
    enough = write_jsonl(tmp_path / "enough.jsonl", old_text(10, 6))
    raw = stage_of()
    raw["evaluation"] |= {"retained": [str(few), str(enough)], "relearning_steps": 5}
    plan = make_plan(parse_stage(raw, "t"), tmp_path, tmp_path / "cache")
    (note,) = relearning.relearning_notes(plan)
    assert note.startswith("few: no relearning test: 9 documents are too few")
    assert f"note: {note}" in check_stage(plan, cache=tmp_path / "cache")["text"]
    raw["evaluation"]["relearning_steps"] = 0
    assert relearning.relearning_notes(make_plan(parse_stage(raw, "t"), tmp_path, tmp_path / "cache")) == []


def test_the_share_is_none_where_nothing_is_forgotten() -> None:
    loss = Interval(value=-0.01, low=-0.03, high=0.01)
    entry = SetRelearning(
        documents=20, tokens=900, forgotten=loss, remaining=loss, recovered=loss, start_model_change=loss
    )
    assert "no significant forgetting" in relearning._relearning_line(entry, 5)


def test_documents_are_paired_by_their_content() -> None:
    scores = Scores(np.array([0, 0, 1, 2]), np.array([1.0, 2.0, 5.0, 7.0]), np.array([3, 3, 4, 0]), np.array([9, 9, 9]))
    assert relearning._scores_by_document(np.array([11, 12, 13], np.uint64), scores) == {11: (3.0, 6), 12: (5.0, 4)}


def test_the_arithmetic_is_that_of_four_models_on_the_same_documents() -> None:
    """Nats per token, 8 + d tokens in document d: start 1, trained 2 (or 2.2), their copies .9 and 1.2."""
    sizes = 8 + np.arange(42)
    wobble = np.where(np.arange(42) % 2, 0.1, -0.1)  # by document, so that there is something to be unsure of

    def scores(each: np.ndarray, which: list[int], cut: int | None = None) -> Scores:
        tokens = np.array([sizes[d] - (d == cut) for d in which])
        return Scores(np.arange(len(which)), each[which] * tokens, tokens, tokens * 4)

    everything, half = list(range(42)), [d for d in range(42) if d != 7]
    digests = np.arange(42, dtype=np.uint64) + 100
    plan: Any = SimpleNamespace(evaluation=SimpleNamespace(sets=[SimpleNamespace(name="old", digests=digests)]))
    one = np.ones(42)
    before, after = scores(one, everything), scores(2 * one + wobble, everything)
    floor, back = scores(0.9 * one, half, cut=3), scores(1.2 * one + wobble / 2, half)
    found = relearning._compare_copies(
        plan, "old", ({"old": before}, {"old": after}), (digests[half], floor), (digests[half], back)
    )
    assert found is not None and found.documents == 40  # not 7, which two have not scored, nor 3, which one has cut
    common = np.array([d for d in everything if d not in (3, 7)])
    total = sizes[common].sum()
    shift = float((wobble[common] * sizes[common]).sum() / total)
    expected = {
        "forgotten": 1 + shift,
        "remaining": 0.3 + shift / 2,
        "recovered": 0.7 + shift / 2,
        "start_model_change": -0.1,
    }
    assert found.tokens == total
    for key, value in expected.items():
        loss = getattr(found, key)
        assert loss.value == pytest.approx(value), key
        assert loss.low <= loss.value + 1e-9 and loss.high >= loss.value - 1e-9
    assert found.recovered_share is not None
    assert found.recovered_share.value == pytest.approx(expected["recovered"] / expected["forgotten"])
    assert found.recovered_share.low < found.recovered_share.value < found.recovered_share.high
    # The interval over documents: half a width of 1.96 standard errors, by the law of large numbers.
    spread = float(np.sqrt((((wobble[common] - shift) * sizes[common]) ** 2).sum()) / total)
    assert (found.forgotten.high - found.forgotten.low) / 2 == pytest.approx(1.96 * spread, rel=0.15)
    nothing = scores(one - 0.5, everything)
    found = relearning._compare_copies(
        plan, "old", ({"old": before}, {"old": nothing}), (digests[half], floor), (digests[half], back)
    )
    assert found is not None and found.recovered_share is None  # nothing was forgotten
