"""What a source's `select` keeps: the documents that it says, once and for all, told with what was left out."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from postgrad.check.plan_text import plan_lines
from postgrad.commands.score_files import load_file_sets, score_model
from postgrad.config.stage_file import parse_stage
from postgrad.data.tokens.store import digest
from postgrad.errors import DataError, ModelError, StageError
from postgrad.evaluation import perplexity
from postgrad.lineage.saved_plan import read_plan
from postgrad.models.location import locate_model
from postgrad.models.pretrained import save_pretrained
from postgrad.plan import filter_documents, perplexity_filter
from postgrad.plan.plan import Plan, make_plan
from postgrad.run.events import RunFinished
from postgrad.run.run import run_stage
from tests import tiny_stages
from tests.conftest import StageOf, make_llama, make_tokenizer, new_text, old_text, write_jsonl

PlanOf = Callable[[dict[str, Any]], Plan]
OLD, NEW = old_text(60, 3), new_text(90, 4)


@pytest.fixture
def plan_of(tmp_path: Path) -> PlanOf:
    return lambda raw: make_plan(parse_stage(raw, "test"), tmp_path, tmp_path / "cache")


@pytest.fixture
def mixed(tmp_path: Path) -> list[str]:
    """Documents of both sorts in one file, `mixed.jsonl`, and texts of the old sort in `like.jsonl`."""
    documents = [*OLD, *NEW]
    random.Random(0).shuffle(documents)
    write_jsonl(tmp_path / "mixed.jsonl", documents)
    write_jsonl(tmp_path / "like.jsonl", old_text(60, 9))
    return documents


def selected(stage_of: StageOf, *ways: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A stage on `mixed.jsonl` with these ways to select."""
    source = {"name": "mixed", "path": "mixed.jsonl", "max_passes": 100, "select": list(ways), **changes}
    return stage_of(data={"sequence_length": 32, "sources": [source]})


def kept(plan: Plan, documents: list[str]) -> list[str]:
    """The documents that are read, by what the store says of them."""
    by_digest = {digest(text.encode()): text for text in documents}
    return [by_digest[int(mark)] for mark in plan.data.sources[0].store.documents["digest"]]


DSIR = {"kind": "dsir", "target": "like.jsonl", "keep": "40%"}


def test_importance_resampling_keeps_what_is_like(stage_of: StageOf, plan_of: PlanOf, mixed: list[str]) -> None:
    plan = plan_of(selected(stage_of, DSIR))
    found = kept(plan, mixed)
    assert len(found) == 60
    assert sum(text in OLD for text in found) >= 57  # of the shortest little can be said
    places = [mixed.index(text) for text in found]
    assert places == sorted(places)
    (step,) = plan.as_record().sources[0].selection
    assert step.before.documents == 150 and step.after.documents == 60
    assert step.after.tokens == plan.data.sources[0].store.tokens == plan.data.rows[0].ledger.read
    assert {row.text for row in step.dropped} & {" ".join(text.split())[:200] for text in NEW}
    assert all(row.value > 0 for row in step.kept) and all(row.value < 0 for row in step.dropped)
    assert sum(step.score_histogram.kept) == 60 and sum(step.score_histogram.dropped) == 90
    text = "\n".join(plan_lines(plan))
    assert "60 of 150 documents are kept (40.0%)" in text and "note: mixed: 60 of 150 documents and " in text


def test_the_seed_decides_the_noise(stage_of: StageOf, plan_of: PlanOf, mixed: list[str]) -> None:
    few = {**DSIR, "keep": "20%"}
    first = kept(plan_of(selected(stage_of, few)), mixed)
    again = kept(plan_of(selected(stage_of, {**few, "seed": 0})), mixed)
    other = kept(plan_of(selected(stage_of, {**few, "seed": 1})), mixed)
    assert first == again and first != other


def test_planted_copies_are_left_out_and_shown(stage_of: StageOf, plan_of: PlanOf, tmp_path: Path) -> None:
    rng = random.Random(1)
    own = [" ".join(rng.choices(tiny_stages.WORDS, k=60)) for _ in range(30)]
    near = [f"{own[n].rsplit(' ', 2)[0]} yes no" for n in (4, 9, 20)]
    write_jsonl(tmp_path / "mixed.jsonl", [*own, *near, own[7]])
    plan = plan_of(selected(stage_of, {"kind": "duplicates"}))
    assert kept(plan, [*own, *near]) == own
    step = plan.data.sources[0].selection[0].model_dump()
    assert {row["text"] for row in step["dropped"]} <= {text[:200] for text in (*near, own[7])}
    assert len(step["dropped"]) == 3
    assert all(row["duplicate_of"] in {text[:200] for text in own} for row in step["dropped"])
    assert "copy of: " in "\n".join(plan_lines(plan))


@pytest.mark.parametrize("bos", [False, True])
def test_bits_per_byte_are_those_of_evaluation(
    stage_of: StageOf, plan_of: PlanOf, mixed: list[str], tmp_path: Path, base: Path, bos: bool
) -> None:
    judge = base / "base"
    if bos:  # another tokenizer than the one that the text is stored with
        judge = tmp_path / "other"
        save_pretrained(make_llama(5), make_tokenizer(300, bos=True), judge, dtype=torch.float32)
    way = {"kind": "perplexity", "quantiles": ["20%", "70%"], **({"model": str(judge)} if bos else {})}
    plan = plan_of(selected(stage_of, way))
    start = locate_model(str(judge), tmp_path)
    (text,) = load_file_sets(
        start, [str(tmp_path / "mixed.jsonl")], "auto", None, 128, tmp_path / "cache"
    ).sets  # in windows of the model's positions
    scores = score_model(start, [text], 128, tmp_path / "cache")[text.name]
    nats = np.bincount(scores.document_W, scores.nats_W, len(text))
    bits = dict(zip(text.digests.tolist(), nats / np.log(2) / scores.bytes_N, strict=True))
    own = np.array([bits[digest(document.encode())] for document in mixed])
    low, high = np.quantile(own, [0.2, 0.7])
    assert kept(plan, mixed) == [d for d, b in zip(mixed, own, strict=True) if low <= b <= high]
    step = plan.data.sources[0].selection[0].model_dump()
    assert step["score_bounds"] == pytest.approx([low, high], rel=1e-5)
    for row in step["kept"] + step["dropped"]:
        near = [b for d, b in zip(mixed, own, strict=True) if " ".join(d.split())[:200] == row["text"]]
        assert row["value"] == pytest.approx(near[0], rel=1e-5)


def test_only_the_beginning_is_judged_when_asked(
    stage_of: StageOf, plan_of: PlanOf, mixed: list[str], base: Path, tmp_path: Path
) -> None:
    plan = plan_of(selected(stage_of, {"kind": "perplexity", "max_tokens": 8, "quantiles": [0, 1]}))
    tokenizer, model = make_tokenizer(), make_llama()
    step = plan.data.sources[0].selection[0].model_dump()
    for row in step["kept"]:
        document = next(d for d in mixed if " ".join(d.split())[:200] == row["text"])
        ids = torch.tensor(tokenizer(document)["input_ids"][:8])[None]
        nats = model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        size = len(tokenizer.decode(ids[0]).encode())
        assert row["value"] == pytest.approx(nats / np.log(2) / size, rel=1e-4)


def test_what_cannot_be_judged_is_counted(stage_of: StageOf, plan_of: PlanOf, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "mixed.jsonl", [*"abcdefghijkl", *OLD])
    plan = plan_of(selected(stage_of, {"kind": "perplexity", "quantiles": [0, 1]}))
    step = plan.data.sources[0].selection[0].model_dump()
    assert step["unscored"] == 12 and step["after"]["documents"] == len(OLD)
    assert "; 12 too short to be scored are dropped" in "\n".join(plan_lines(plan))
    whole = plan_of(selected(stage_of, {"kind": "duplicates"}))
    assert whole.data.sources[0].selection[0].unscored == 0
    write_jsonl(tmp_path / "mixed.jsonl", [*"abcdefghijkl", *OLD[:3]])
    with pytest.raises(DataError, match="only 3 of 15 documents are long enough for a score"):
        plan_of(selected(stage_of, {"kind": "perplexity"}))


def test_a_judgement_goes_on_where_it_was_stopped(
    stage_of: StageOf, plan_of: PlanOf, mixed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexity_filter, "_SCORING_BATCH_TOKENS", 400)
    raw = selected(stage_of, {"kind": "perplexity", "quantiles": ["10%", "90%"]})
    whole = make_plan(parse_stage(raw, "t"), tmp_path, tmp_path / "whole")
    asked: list[int] = []

    def stopping(model: Any, held_out: Any, **more: Any) -> Any:
        if len(asked) == 3:
            asked.append(0)
            raise KeyboardInterrupt
        asked.append(len(held_out))
        return perplexity.score_held_out(model, held_out, **more)

    monkeypatch.setattr(perplexity_filter, "score_held_out", stopping)
    with pytest.raises(KeyboardInterrupt):
        plan_of(raw)
    assert list((tmp_path / "cache" / "selection").glob("*.part.npz"))
    plan = plan_of(raw)
    assert sum(asked) == len(mixed)  # none was judged twice
    assert kept(plan, mixed) == kept(whole, mixed)
    assert plan.data.sources[0].selection == whole.data.sources[0].selection
    assert not list((tmp_path / "cache" / "selection").glob("*.part.npz"))


def test_a_selection_is_found_once(
    stage_of: StageOf, plan_of: PlanOf, mixed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = [{"kind": "duplicates"}, DSIR, {"kind": "perplexity"}]
    plan = plan_of(selected(stage_of, *ways))
    assert [step["kind"] for step in (item.model_dump() for item in plan.data.sources[0].selection)] == [
        "duplicates",
        "dsir",
        "perplexity",
    ]
    counts = [step["before"]["documents"] for step in (item.model_dump() for item in plan.data.sources[0].selection)]
    assert counts[0] == 150 and counts[1] == plan.data.sources[0].selection[0].after.documents > counts[2]
    did: list[str] = []
    apply = filter_documents._DocumentFilter.apply
    monkeypatch.setattr(
        filter_documents._DocumentFilter,
        "apply",
        lambda self, *rest: did.append(self.method.kind) or apply(self, *rest),
    )
    again = plan_of(selected(stage_of, *ways))
    assert not did and again.data.sources[0].store.fingerprint == plan.data.sources[0].store.fingerprint
    plan_of(selected(stage_of, *ways[:2], {"kind": "perplexity", "quantiles": ["5%", "95%"]}))
    assert did == ["perplexity"]  # what stands before it is known
    write_jsonl(tmp_path / "like.jsonl", old_text(70, 10))
    changed = plan_of(selected(stage_of, *ways[:2]))
    assert did == ["perplexity", "dsir"]
    assert changed.data.sources[0].store.fingerprint != plan.data.sources[0].store.fingerprint


def test_what_is_dropped_is_neither_held_out_nor_overlaps(
    stage_of: StageOf, plan_of: PlanOf, mixed: list[str], tmp_path: Path
) -> None:
    raw = selected(stage_of, DSIR, held_out="20%")
    raw["evaluation"] = {"retained": [{"name": "new", "path": str(write_jsonl(tmp_path / "new.jsonl", NEW[:20]))}]}
    plan = plan_of(raw)
    read = set(kept(plan, mixed))
    assert plan.data.overlaps["new"].duplicates == sum(text in read for text in NEW[:20]) < 5
    (own,) = [h for h in plan.evaluation.sets if h.name == "mixed"]
    assert 3 < len(own) < 25 and set(own.digests.tolist()) <= {digest(text.encode()) for text in read}
    everything = plan_of({**raw, "data": {**raw["data"], "sources": [{**raw["data"]["sources"][0], "select": []}]}})
    assert everything.data.overlaps["new"].duplicates == 20


def test_a_later_stage_replays_what_was_selected(
    stage_of: StageOf, plan_of: PlanOf, mixed: list[str], tmp_path: Path, base: Path
) -> None:
    ways = [DSIR, {"kind": "perplexity", "quantiles": ["10%", "60%"]}]
    first = plan_of({**selected(stage_of, *ways), "seed": 3, "tokens": 1000})
    *_, last = run_stage(first, command="t", cache=tmp_path / "cache")
    assert isinstance(last, RunFinished)
    (source,) = last.record.plan.sources
    assert source.selection == list(first.data.sources[0].selection)
    replay = {"name": "replay", "seen_so_far": True, "share": 0.5, "max_passes": 100}
    new = {"name": "new", "path": str(base / "new.jsonl"), "share": 0.5}
    raw = stage_of(model=str(last.run_folder), output=str(tmp_path / "two"), tokens=1000)
    later = plan_of({**raw, "data": {"sequence_length": 32, "sources": [new, replay]}})
    (leaf,) = [leaf for leaf in later.data.sources if leaf.role == "replay"]
    assert leaf.store.documents["digest"].tolist() == first.data.sources[0].store.documents["digest"].tolist()
    assert leaf.store.fingerprint == first.data.sources[0].store.fingerprint
    origin = read_plan(last.run_folder).resolved_sources[0].origin
    assert origin["select"][0]["seed"] == 3 and origin["select"][1]["model"] == str(base / "base")
    # A mutant: by the model and seed of the later stage, other documents would be replayed.
    other = plan_of({**selected(stage_of, *ways), "seed": 0, "model": str(last.run_folder)})
    assert kept(other, mixed) != kept(first, mixed)


def test_rows_with_parts_are_selected_by_their_words(stage_of: StageOf, plan_of: PlanOf, tmp_path: Path) -> None:
    labelled = tiny_stages.classification_examples(40)
    rows = [*labelled, *labelled[:5]]
    tiny_stages.write_rows(tmp_path / "mixed.jsonl", rows)
    raw = selected(stage_of, {"kind": "duplicates", "threshold": 1.0}, kind="labelled")
    raw["evaluation"] = {}
    plan = plan_of(raw)
    distinct = len({(row["text"], str(row["label"])) for row in labelled})
    assert len(plan.data.sources[0].store) <= distinct < 45
    store = plan.data.sources[0].store
    assert store.marks(0) is not None and len(store.documents) == len(store)
    chats = tiny_stages.chat_examples(30)
    tiny_stages.write_rows(tmp_path / "mixed.jsonl", [*chats, *chats[:7]])
    plan = plan_of(selected(stage_of, {"kind": "duplicates"}, {"kind": "perplexity"}))
    assert plan.data.sources[0].selection[0].after.documents <= 30
    assert plan.data.rows[0].ledger.trained


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ({**DSIR, "keep": "0%"}, "keep"),
        ({**DSIR, "target": []}, "at least 1 item"),
        ({**DSIR, "target": "gone.jsonl"}, "gone.jsonl"),
        ({**DSIR, "target": "short.jsonl"}, "too few for target text"),
        ({**DSIR, "keep": "0.1%"}, "is less than one"),
        ({"kind": "perplexity", "quantiles": ["90%", "10%"]}, "from a smaller to a larger share"),
        ({"kind": "perplexity", "model": "nobody/here/there"}, "nobody"),
        ({"kind": "perplexity", "max_tokens": 1}, "tokens"),
        ({"kind": "perplexity", "quantiles": [0.5, 0.5001]}, r"none of the 150 documents .* 50 % and 50\.01 %"),
        ({"kind": "duplicates", "threshold": 0.1}, "threshold"),
        ({"kind": "best"}, "best"),
    ],
)
def test_bad_ways_are_refused(
    stage_of: StageOf, plan_of: PlanOf, mixed: list[str], tmp_path: Path, way: dict[str, Any], said: str
) -> None:
    write_jsonl(tmp_path / "short.jsonl", ["few words"])
    with pytest.raises((StageError, DataError, ModelError), match=said) as found:
        plan_of(selected(stage_of, way))
    assert "select" in (found.value.where or "")


def test_an_encoder_and_a_new_model_judge_nothing(
    stage_of: StageOf, plan_of: PlanOf, mixed: list[str], tmp_path: Path
) -> None:
    tokenizer = tiny_stages.bert_tokenizer()
    tiny_stages.save_model(tiny_stages.make_bert(len(tokenizer)), tokenizer, tmp_path / "bert")
    raw = selected(stage_of, {"kind": "perplexity", "model": "bert"})
    with pytest.raises(StageError, match="is not a decoder"):
        plan_of(raw)
    raw = selected(stage_of, {"kind": "perplexity"})
    raw["model"] = {"from_scratch": "llama-1M", "tokenizer": {"vocab_size": 300}}
    with pytest.raises(StageError, match="perplexity filtering is meaningless"):
        plan_of(raw)


def test_a_replay_of_everything_takes_no_selection(stage_of: StageOf) -> None:
    source = {"name": "replay", "seen_so_far": True, "select": [{"kind": "duplicates"}]}
    with pytest.raises(StageError, match="takes `select` from the earlier stages"):
        parse_stage(stage_of(data={"sources": [source]}), "t")
