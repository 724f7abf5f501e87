"""A plan adds up: budgets, shares, passes, what is held out and what was seen, all before a weight is touched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from postgrad.check.plan_text import plan_lines
from postgrad.config.stage_file import parse_stage
from postgrad.data.layouts.rows import IGNORED
from postgrad.errors import DataError, ModelError, StageError
from postgrad.lineage.record import read_record, write_record
from postgrad.models.pretrained import save_pretrained
from postgrad.plan.plan import Plan, make_plan
from postgrad.run.events import RunFinished
from postgrad.run.run import run_stage
from tests.conftest import StageOf, make_llama, make_tokenizer, new_text, old_text, write_jsonl

ROW = 32
"""Tokens in a row of `stage_of`."""


@pytest.fixture
def plan_of(cache: Path) -> Callable[[dict[str, Any]], Plan]:
    def make(raw: dict[str, Any]) -> Plan:
        return make_plan(parse_stage(raw, "test"), Path.cwd(), cache)

    return make


PlanOf = Callable[[dict[str, Any]], Plan]


def data_of(raw: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**raw["data"], **changes}


def sources_of(raw: dict[str, Any], *changes: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**source, **change} for source, change in zip(raw["data"]["sources"], changes, strict=True)]


def trained(plan: Plan, first: int, last: int) -> np.ndarray:
    """Trained tokens of each source in steps first..last - 1, counted in the rows themselves."""
    out = np.zeros(len(plan.data.sources), np.int64)
    for step in range(first, last):
        sources, rows = plan.data.mixture.rows(step)
        for source, row in zip(sources, rows, strict=True):
            out[source] += int((plan.data.rows[source].get_row(int(row), 0).labels != IGNORED).sum())
    return out


# -- budgets ----------------------------------------------------------------------------------------------------------


def test_tokens_is_the_total_and_new_tokens_leaves_replay_out(stage_of: StageOf, plan_of: PlanOf) -> None:
    total = plan_of(stage_of(tokens=6000))
    read = trained(total, 0, total.steps)
    step = 8 * ROW
    assert read.sum() == pytest.approx(6000, abs=step)
    assert read / read.sum() == pytest.approx([0.75, 0.25], abs=0.02)
    raw = stage_of(new_tokens=6000)
    raw.pop("tokens")
    on_top = plan_of(raw)
    read = trained(on_top, 0, on_top.steps)
    assert read[0] == pytest.approx(6000, abs=step)
    assert read.sum() == pytest.approx(8000, abs=step)  # 6000 / 0.75
    assert on_top.steps > total.steps
    # What the plan promises is what the rows hold.
    for plan, count in ((total, trained(total, 0, total.steps)), (on_top, read)):
        record = plan.as_record()
        assert plan.tokens == pytest.approx(count.sum(), rel=0.02)
        assert [s.trained_tokens for s in record.sources] == pytest.approx(count.tolist(), rel=0.05)
        assert record.tokens == sum(s.trained_tokens for s in record.sources)


def test_new_tokens_hold_over_a_curriculum(stage_of: StageOf, plan_of: PlanOf) -> None:
    raw = stage_of(new_tokens=6000)
    raw.pop("tokens")
    shifts = [{"at": "50%", "shares": {"new": 0.25, "old": 0.75}}]
    plan = plan_of({**raw, "data": data_of(raw, curriculum=shifts, on_exhausted="repeat")})
    read = trained(plan, 0, plan.steps)
    assert read[0] == pytest.approx(6000, abs=2 * 8 * ROW)
    assert read.sum() == pytest.approx(12000, abs=2 * 8 * ROW)  # half new on the whole, not three quarters
    assert [s.requested_share for s in plan.as_record().sources] == [0.5, 0.5]


def test_a_share_that_is_left_out_is_the_rest(stage_of: StageOf, plan_of: PlanOf) -> None:
    raw = stage_of()
    raw["data"]["sources"][0].pop("share")
    assert plan_of(raw).as_record() == plan_of(stage_of()).as_record()


def test_shares_are_in_trained_tokens_not_in_rows(stage_of: StageOf, plan_of: PlanOf, tmp_path: Path) -> None:
    """Short documents leave fewer trained tokens in a row, so they get more rows."""
    short = write_jsonl(tmp_path / "short.jsonl", [f"x{i}" for i in range(3000)])
    raw = stage_of(tokens=8000)
    plan = plan_of(
        {**raw, "data": data_of(raw, sources=sources_of(raw, {"path": str(short), "share": 0.5}, {"share": 0.5}))}
    )
    read = trained(plan, 0, plan.steps)
    assert read / read.sum() == pytest.approx([0.5, 0.5], abs=0.02)
    rows = plan.data.row_counts()
    assert rows[0] > 1.1 * rows[1]  # the mutant, equal rows, would give another share of tokens
    equal = np.array(plan.data.trained_tokens_per_row())
    assert equal[0] / equal.sum() < 0.47


# -- curricula --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [{"at": "50%"}, {"at": "3000 tokens"}])
def test_a_change_of_shares_holds_from_its_point_on(stage_of: StageOf, plan_of: PlanOf, at: dict[str, Any]) -> None:
    raw = stage_of()
    plan = plan_of({**raw, "data": data_of(raw, curriculum=[{**at, "shares": {"new": 0.2, "old": 0.8}}])})
    border = plan.data.mixture.segments[1].start // plan.data.mixture.block_size
    before, after = trained(plan, 0, border), trained(plan, border, plan.steps)
    assert before.sum() == pytest.approx(3000, abs=8 * ROW)
    assert before / before.sum() == pytest.approx([0.75, 0.25], abs=0.03)
    assert after / after.sum() == pytest.approx([0.2, 0.8], abs=0.03)
    assert before.sum() + after.sum() == pytest.approx(6000, abs=2 * 8 * ROW)


def test_a_change_can_wait_for_the_rate(stage_of: StageOf, plan_of: PlanOf) -> None:
    """Linear from 1 to 0 over 80 steps: one fifth is reached at 80 % of the way."""
    raw = stage_of(tokens=20000, schedule={"kind": "linear", "peak": 1.0, "floor": 0.0, "warmup": 0})
    raw["data"]["sources"][0]["max_passes"] = 99
    plan = plan_of(
        {
            **raw,
            "data": data_of(
                raw, curriculum=[{"at_rate": 0.2, "shares": {"new": 0.0, "old": 1.0}}], on_exhausted="repeat"
            ),
        }
    )
    border = plan.data.mixture.segments[1].start // plan.data.mixture.block_size
    assert border == pytest.approx(0.8 * plan.steps, abs=2)
    assert plan.schedule(border) == pytest.approx(0.2, abs=0.03)
    assert trained(plan, border, plan.steps)[0] == 0


def test_a_source_may_come_in_later_and_another_go(stage_of: StageOf, plan_of: PlanOf) -> None:
    raw = stage_of()
    sources = sources_of(raw, {"share": 1.0}, {"share": 0.0})
    plan = plan_of({**raw, "data": data_of(raw, sources=sources, curriculum=[{"at": "50%", "shares": {"old": 1.0}}])})
    border = plan.data.mixture.segments[1].start // plan.data.mixture.block_size
    assert trained(plan, 0, border)[1] == 0 < trained(plan, 0, border)[0]
    assert trained(plan, border, plan.steps)[0] == 0 < trained(plan, border, plan.steps)[1]


@pytest.mark.parametrize("points", [["60%", "40%"], ["40%", "40%"], ["0%"], ["100%"], ["150%"]])
def test_points_that_are_not_in_order_inside_the_stage(stage_of: StageOf, plan_of: PlanOf, points: list[str]) -> None:
    raw = stage_of()
    shifts = [{"at": at, "shares": {"new": 1.0}} for at in points]
    with pytest.raises(StageError, match=r"data\.curriculum: a change of shares is at"):
        plan_of({**raw, "data": data_of(raw, curriculum=shifts)})


# -- too little text --------------------------------------------------------------------------------------------------


def short_stage(stage_of: StageOf, tmp_path: Path, policy: str, **more: Any) -> dict[str, Any]:
    """The new source has about 1,000 tokens and shall give 9,000 of 12,000."""
    little = write_jsonl(tmp_path / "little.jsonl", new_text(20, seed=7))
    raw = stage_of(tokens=12000)
    return {
        **raw,
        "data": data_of(raw, sources=sources_of(raw, {"path": str(little)}, {}), on_exhausted=policy, **more),
    }


def passes(plan: Plan) -> list[float]:
    return [s.passes for s in plan.as_record().sources]


def test_short_text_is_refused_with_its_numbers(stage_of: StageOf, plan_of: PlanOf, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"data\.sources\[0\]: 'new' would be read [\d.]+ times; its max_passes is 4 "
    ) as caught:
        plan_of(short_stage(stage_of, tmp_path, "refuse"))
    assert "set data.on_exhausted" in str(caught.value)
    asked = float(str(caught.value).split("read ")[1].split(" times")[0])
    assert asked == pytest.approx(passes(plan_of(short_stage(stage_of, tmp_path, "repeat")))[0], abs=0.06)


def test_short_text_can_be_repeated_all_the_same(stage_of: StageOf, plan_of: PlanOf, tmp_path: Path) -> None:
    plan = plan_of(short_stage(stage_of, tmp_path, "repeat"))
    assert passes(plan)[0] > 5
    read = trained(plan, 0, plan.steps)
    assert read / read.sum() == pytest.approx([0.75, 0.25], abs=0.03)
    assert plan.tokens == pytest.approx(12000, abs=8 * ROW)


def test_short_text_can_stop_the_stage(stage_of: StageOf, plan_of: PlanOf, tmp_path: Path) -> None:
    plan = plan_of(short_stage(stage_of, tmp_path, "stop"))
    block = plan.data.mixture.block_size
    caps = [4 * len(r) for r in plan.data.rows]
    assert all(c <= cap for c, cap in zip(plan.data.mixture.counts(plan.steps * block), caps, strict=True))
    assert plan.data.mixture.counts((plan.steps + 1) * block)[0] > caps[0]  # not a step earlier than needed
    read = trained(plan, 0, plan.steps)
    assert read / read.sum() == pytest.approx([0.75, 0.25], abs=0.03)
    assert any("on_exhausted: stop" in note for note in plan.notes)
    assert plan.schedule(plan.steps) == pytest.approx(1e-3)  # the schedule ends where the stage does


def test_short_text_can_hand_its_share_to_the_others(stage_of: StageOf, plan_of: PlanOf, tmp_path: Path) -> None:
    plan = plan_of(short_stage(stage_of, tmp_path, "renormalise"))
    assert plan.tokens == pytest.approx(12000, abs=2 * 8 * ROW)  # the budget stands
    assert passes(plan)[0] <= 4
    assert passes(plan)[0] > 3.5
    read = trained(plan, 0, plan.steps)
    shares = [s.share for s in plan.as_record().sources]
    assert shares == pytest.approx((read / read.sum()).tolist(), abs=0.01)
    assert shares[0] < 0.5  # what was asked for is not what is achieved, and the plan says so
    assert [s.requested_share for s in plan.as_record().sources] == [0.75, 0.25]
    border = plan.data.mixture.segments[1].start // plan.data.mixture.block_size
    first = trained(plan, 0, border)
    assert first / first.sum() == pytest.approx([0.75, 0.25], abs=0.03)
    assert trained(plan, border, plan.steps)[0] == 0


def test_when_everything_is_spent_it_says_so(stage_of: StageOf, plan_of: PlanOf, tmp_path: Path) -> None:
    raw = {**short_stage(stage_of, tmp_path, "renormalise"), "tokens": 10**6}
    with pytest.raises(DataError, match=r"all sources are exhausted[\s\S]*on_exhausted: stop"):
        plan_of(raw)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("policy", ["stop", "renormalise"])
def test_a_source_that_was_used_up_by_what_is_skipped(
    stage_of: StageOf, plan_of: PlanOf, tmp_path: Path, policy: str
) -> None:
    with pytest.raises(DataError, match="no rows to read"):
        plan_of(short_stage(stage_of, tmp_path, policy, skip_steps=500))


def test_steps_that_are_skipped_are_those_of_the_stage_it_branches_from(stage_of: StageOf, plan_of: PlanOf) -> None:
    raw = stage_of()
    whole, branch = plan_of(raw), plan_of({**raw, "tokens": 2000, "data": data_of(raw, skip_steps=5)})
    from postgrad.data.loading.loader import Loader

    a, b = (
        Loader(whole.data.rows, whole.data.mixture, micro_batch_size=8),
        Loader(branch.data.rows, branch.data.mixture, micro_batch_size=8, skip_steps=5),
    )
    for step in range(1, branch.steps + 1):
        assert torch.equal(b.read_batches(step)[0].inputs["input_ids"], a.read_batches(step + 5)[0].inputs["input_ids"])
    assert not torch.equal(b.read_batches(1)[0].inputs["input_ids"], a.read_batches(1)[0].inputs["input_ids"])
    assert branch.as_record().sources[0].rows == sum(
        int((whole.data.mixture.rows(step)[0] == 0).sum()) for step in range(5, 5 + branch.steps)
    )


# -- what was seen ----------------------------------------------------------------------------------------------------


def test_replay_of_everything_has_the_published_weights(
    stage_of: StageOf, plan_of: PlanOf, cache: Path, tmp_path: Path
) -> None:
    """Ibrahim et al. 2024: 5 % of replay after 300 B of one corpus and 100 B stages of 95 % new text each."""
    raw = stage_of(output=str(tmp_path / "one"), tokens=1000)
    assert isinstance(list(run_stage(plan_of(raw), command="t", cache=cache))[-1], RunFinished)
    record = read_record(tmp_path / "one")
    by_name = {entry.name: key for key, entry in record.consumed.items()}
    assert set(by_name) == {"new", "old"}
    # What was counted is what was trained, not what was planned.
    assert {e.name: e.tokens for e in record.consumed.values()} == {
        s.name: s.trained_tokens for s in record.totals.sources
    }
    third = write_jsonl(tmp_path / "third.jsonl", [f"word {w} of {w * 7}" for w in range(400)])
    following = stage_of(
        model=str(tmp_path / "one"), tokens=2000, data={"sequence_length": ROW, "on_exhausted": "repeat", "sources": [
            {"name": "third", "path": str(third)},
            {"name": "replay", "seen_so_far": True, "share": 0.05},
        ]}
    )  # fmt: skip

    def weights(**seen: int) -> dict[str, float]:
        for name, tokens in seen.items():
            record.consumed[by_name[name]].tokens = tokens
        write_record(tmp_path / "one", record)
        plan = plan_of(following)
        assert all(leaf.role == "replay" for leaf in plan.data.sources if leaf.spec.source == "replay")
        shares = dict(zip([x.name for x in plan.stage.data.sources], plan.stage.resolve_shares(), strict=True))
        return {leaf.name: leaf.spec.fraction * shares[leaf.spec.source] for leaf in plan.data.sources}

    billion = 10**9
    found = weights(old=300 * billion + 5 * billion, new=95 * billion)
    assert found == pytest.approx({"third": 0.95, "replay/old": 0.038125, "replay/new": 0.011875}, rel=1e-9)
    # The mutant: replay of the last stage only, or of what was new in each, gives other weights.
    assert found["replay/old"] != pytest.approx(0.05 * 300 / 400, rel=1e-3)


def test_a_second_stage_replays_what_the_first_one_read(
    stage_of: StageOf, plan_of: PlanOf, cache: Path, tmp_path: Path
) -> None:
    raw = stage_of(output=str(tmp_path / "one"), tokens=1500)
    raw["data"]["sources"][1]["prior_tokens"] = 10_000  # the start model's own training text
    list(run_stage(plan_of(raw), command="t", cache=cache))
    one = read_record(tmp_path / "one")
    first = {e.name: e.tokens for e in one.consumed.values()}
    counted = {s.name: s.trained_tokens for s in one.totals.sources}
    assert first == {"new": counted["new"], "old": counted["old"] + 10_000}
    third = write_jsonl(tmp_path / "third.jsonl", [f"word {w} of {w * 7}" for w in range(400)])
    second = stage_of(
        model=str(tmp_path / "one"), output=str(tmp_path / "two"), tokens=3000,
        data={"sequence_length": ROW, "sources": [
            {"name": "third", "path": str(third), "share": 0.6}, {"name": "seen", "seen_so_far": True, "share": 0.4},
        ]},
    )  # fmt: skip
    plan = plan_of(second)
    total = sum(first.values())
    read = trained(plan, 0, plan.steps)
    wanted = [0.6, *(0.4 * first[leaf.name.split("/")[1]] / total for leaf in plan.data.sources[1:])]
    assert read / read.sum() == pytest.approx(wanted, abs=0.03)
    list(run_stage(plan, command="t", cache=cache))
    two = read_record(tmp_path / "two")
    seen = {e.name: e.tokens for e in two.consumed.values()}
    counted = {s.name.split("/")[-1]: s.trained_tokens for s in two.totals.sources}
    assert seen == {name: first.get(name, 0) + counted[name] for name in ("third", "new", "old")}
    assert [p.id for p in two.parents] == [one.id]


def test_nothing_seen_is_nothing_to_replay(stage_of: StageOf, plan_of: PlanOf) -> None:
    raw = stage_of()
    sources = [raw["data"]["sources"][0], {"name": "seen", "seen_so_far": True, "share": 0.25}]
    with pytest.raises(StageError, match=r"data\.sources\[1\]\.seen_so_far: no record of what[\s\S]*as `path`"):
        plan_of({**raw, "data": data_of(raw, sources=sources)})


# -- what is held out -------------------------------------------------------------------------------------------------


def without_files(raw: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**raw, "evaluation": {"every": "50%", **more}}


def texts(path: str | Path) -> list[str]:
    return [json.loads(line)["text"] for line in Path(path).read_text().splitlines()]


def trained_text(plan: Plan, leaf: int) -> str:
    """Everything of a source that any row can hold."""
    tokenizer = AutoTokenizer.from_pretrained(plan.model.start.name_or_path)
    rows = plan.data.rows[leaf]
    return "\n".join(
        tokenizer.decode(rows.store.read(int(document)), skip_special_tokens=True) for document in rows.document_ids
    )


def test_without_files_a_part_of_each_source_is_held_out(stage_of: StageOf, plan_of: PlanOf) -> None:
    raw = stage_of()
    plan = plan_of(without_files(raw))
    assert {(h.name, h.role) for h in plan.evaluation.sets} == {("new", "learned"), ("old", "retained")}
    tokenizer = AutoTokenizer.from_pretrained(plan.model.start.name_or_path)
    for leaf, held in enumerate(plan.evaluation.sets):
        assert plan.data.sources[leaf].held_out == 0.1  # 150 documents: 200 of them would be more than a tenth
        assert 3 <= len(held.documents) <= 30
        written = {tokenizer.decode(ids) for ids in held.documents}
        source = texts(raw["data"]["sources"][leaf]["path"])
        assert written <= set(source)
        lines = set(trained_text(plan, leaf).split("\n")) if leaf else None
        rest = trained_text(plan, leaf)
        for text in written:
            assert text not in (lines if lines is not None else rest)
        assert plan.data.rows[leaf].ledger.held_out > 0
    # With files named, nothing of the sources is kept back unless it is asked for.
    assert [leaf.held_out for leaf in plan_of(raw).data.sources] == [0.0, 0.0]
    raw["data"]["sources"][0]["held_out"] = "20%"
    assert [h.name for h in plan_of(raw).evaluation.sets] == ["old-heldout", "new-heldout", "new"]


def test_the_auto_share_is_enough_for_about_200_documents(stage_of: StageOf, plan_of: PlanOf, tmp_path: Path) -> None:
    large = write_jsonl(tmp_path / "large.jsonl", [f"line {i} of the text" for i in range(8000)])
    plan = plan_of(
        without_files(stage_of(data={"sequence_length": ROW, "sources": [{"name": "new", "path": str(large)}]}))
    )
    assert plan.data.sources[0].held_out == pytest.approx(200 / 8000)
    assert len(plan.evaluation.sets[0].documents) == pytest.approx(200, abs=60)


def test_the_split_is_of_contents_not_of_places(stage_of: StageOf, plan_of: PlanOf, tmp_path: Path) -> None:
    """Another order, another file, copies: the same texts are held out."""
    raw = without_files(stage_of())
    first = plan_of(raw)
    source = texts(raw["data"]["sources"][0]["path"])
    shuffled = write_jsonl(tmp_path / "shuffled.jsonl", [*source[75:], *source[:75], *source[:20]])
    again = plan_of({**raw, "data": data_of(raw, sources=sources_of(raw, {"path": str(shuffled)}, {}))})
    one, two = ({d.tobytes() for d in plan.evaluation.sets[0].documents} for plan in (first, again))
    assert one == two
    # The mutant: a split by place would hold out other texts.
    by_place = {source[i] for i in range(0, 150, 10)}
    tokenizer = AutoTokenizer.from_pretrained(first.model.start.name_or_path)
    assert {tokenizer.decode(d) for d in first.evaluation.sets[0].documents} != by_place


def test_copies_of_held_out_text_are_not_trained_on_and_are_counted(
    stage_of: StageOf, plan_of: PlanOf, tmp_path: Path, base: Path
) -> None:
    held = texts(base / "new-heldout.jsonl")
    leaky = write_jsonl(tmp_path / "leaky.jsonl", [*texts(base / "new.jsonl"), *held[:7]])
    raw = stage_of()
    plan = plan_of({**raw, "data": data_of(raw, sources=sources_of(raw, {"path": str(leaky)}, {}))})
    tokenizer = AutoTokenizer.from_pretrained(plan.model.start.name_or_path)
    copies = sum(len(tokenizer(text)["input_ids"]) + 1 for text in held[:7])
    assert plan.data.rows[0].ledger.dropped == copies
    assert any(f"new: {copies:,} tokens are dropped" in note for note in plan.notes)
    for text in held[:7]:
        assert text not in trained_text(plan, 0)
    assert plan.data.overlaps["new-heldout"].duplicates == 7
    assert any("7 exact copies" in line for line in plan_lines(plan))
    # The mutant: without the exclusion they are there.
    clean = plan_of(stage_of())
    assert clean.data.rows[0].ledger.dropped == 0 == clean.data.overlaps["new-heldout"].duplicates


def test_near_copies_are_reported_or_refused(stage_of: StageOf, plan_of: PlanOf, tmp_path: Path) -> None:
    words = [" ".join(f"w{(i * 37 + k * k) % 911}" for k in range(60)) for i in range(40)]
    held = write_jsonl(tmp_path / "held.jsonl", words[:10])
    text = write_jsonl(tmp_path / "text.jsonl", [*words[10:], "before it " + words[0] + " and after"])
    raw = stage_of(evaluation={"learned": [str(held)], "every": "50%"})
    raw["data"] = {"sequence_length": ROW, "sources": [{"name": "new", "path": str(text)}]}
    plan = plan_of(raw)
    assert plan.data.overlaps["held"].half_overlap == 1
    assert plan.data.overlaps["held"].duplicates == 0
    assert any("1 of 10 held-out documents share at least half" in note for note in plan.notes)
    with pytest.raises(DataError, match=r"evaluation\.learned: held: 1 of 10[\s\S]*overlap: report"):
        plan_of({**raw, "data": {**raw["data"], "overlap": "refuse"}})
    assert plan_of({**raw, "data": {**raw["data"], "overlap": "off"}}).data.overlaps == {}


def test_a_gate_needs_something_retained(stage_of: StageOf, plan_of: PlanOf, base: Path) -> None:
    learned = {"learned": [str(base / "new-heldout.jsonl")], "every": "50%"}
    only_new = {"sequence_length": ROW, "sources": [{"name": "new", "path": str(base / "new.jsonl")}]}
    with pytest.raises(StageError, match=r"max_forgetting: the retention gate needs a retained set[\s\S]*role: replay"):
        plan_of(stage_of(max_forgetting="2%", evaluation=learned, data=only_new))
    plan = plan_of(stage_of(evaluation=learned, data=only_new))
    assert any("no retained set" in note for note in plan.notes)
    plan_of(without_files(stage_of(max_forgetting="2%")))  # the held-out part of the replay is one


@pytest.mark.parametrize("held_out", [None, 0])
def test_a_gate_beside_files_that_are_only_learned(
    stage_of: StageOf, plan_of: PlanOf, base: Path, held_out: float | None
) -> None:
    """A named learned set keeps the replay source's automatic split; without it the retention gate needs a retained set."""
    raw = stage_of(max_forgetting="2%", evaluation={"learned": [str(base / "new-heldout.jsonl")], "every": "50%"})
    if held_out is None:
        assert {h.name: h.role for h in plan_of(raw).evaluation.sets} == {"new-heldout": "learned", "old": "retained"}
        return
    raw["data"]["sources"][1]["held_out"] = held_out
    with pytest.raises(StageError, match="max_forgetting: the retention gate needs a retained set"):
        plan_of(raw)


def test_a_gate_on_a_share_that_caught_no_document(stage_of: StageOf, plan_of: PlanOf) -> None:
    raw = stage_of(max_forgetting="2%")
    raw["evaluation"].pop("retained")
    raw["data"]["sources"][1]["held_out"] = 1e-9
    with pytest.raises(StageError, match="max_forgetting: the retention gate needs a retained set"):
        plan_of(raw)


def test_nothing_held_out_is_refused(stage_of: StageOf, plan_of: PlanOf) -> None:
    raw = without_files(stage_of())
    raw["data"]["sources"] = sources_of(raw, {"held_out": 0}, {"held_out": 0})
    with pytest.raises(StageError, match=r"no held-out text[\s\S]*evaluation\.retained"):
        plan_of(raw)


def test_a_set_is_scored_up_to_its_tokens(stage_of: StageOf, plan_of: PlanOf, base: Path) -> None:
    raw = stage_of()
    whole = plan_of(raw)
    cut = plan_of({**raw, "evaluation": {**raw["evaluation"], "max_tokens": 100}})
    for a, b in zip(whole.evaluation.sets, cut.evaluation.sets, strict=True):
        assert sum(len(d) for d in b.documents) <= 100 < sum(len(d) for d in a.documents)
        assert np.array_equal(b.documents[0], a.documents[0])
        assert a.fingerprint != b.fingerprint
    assert any("documents are scored (evaluation.max_tokens: 100)" in note for note in cut.notes)


def test_names_of_sets_do_not_collide(stage_of: StageOf, plan_of: PlanOf, base: Path) -> None:
    raw = stage_of(evaluation={"learned": [{"name": "new", "path": str(base / "new-heldout.jsonl")}], "every": "50%"})
    raw["data"]["sources"][0]["held_out"] = "10%"
    with pytest.raises(StageError, match="both called 'new'"):
        plan_of(raw)


# -- what does not fit ------------------------------------------------------------------------------------------------


def test_rows_longer_than_the_model(stage_of: StageOf, plan_of: PlanOf) -> None:
    raw = stage_of()
    with pytest.raises(StageError, match=r"data\.sequence_length: rows of 129 tokens do not fit[\s\S]*at most 128"):
        plan_of({**raw, "data": data_of(raw, sequence_length=129)})
    assert plan_of({**raw, "data": data_of(raw, sequence_length=128)}).model.context_length == 128


def test_a_tokenizer_of_another_model(stage_of: StageOf, plan_of: PlanOf, tmp_path: Path) -> None:
    save_pretrained(make_llama(vocab_size=300), make_tokenizer(), tmp_path / "odd", dtype=torch.float32)
    with pytest.raises(
        ModelError, match=r"the tokenizer has 320 tokens and the model 300 embeddings[\s\S]*own tokenizer"
    ):
        plan_of(stage_of(model=str(tmp_path / "odd")))
    save_pretrained(make_llama(vocab_size=384), make_tokenizer(), tmp_path / "padded", dtype=torch.float32)
    assert plan_of(stage_of(model=str(tmp_path / "padded"))).model.vocab_size == 384  # padded embeddings are usual


def test_a_model_without_a_tokenizer(stage_of: StageOf, plan_of: PlanOf, tmp_path: Path, base: Path) -> None:
    shutil.copytree(base / "base", tmp_path / "bare")
    for file in (tmp_path / "bare").glob("*token*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"no tokenizer could be loaded|no fast tokenizer"):
        plan_of(stage_of(model=str(tmp_path / "bare")))


def test_documents_end_with_the_token_that_is_asked_for(stage_of: StageOf, plan_of: PlanOf, tmp_path: Path) -> None:
    save_pretrained(make_llama(), make_tokenizer(bos=True), tmp_path / "bos", dtype=torch.float32)
    raw = stage_of(model=str(tmp_path / "bos"))
    plain = plan_of(raw)
    other = plan_of({**raw, "data": data_of(raw, eos="<|begin|>")})
    assert plain.data.rows[0].store.read(0)[-1] == plain.model.tokenizer.eos_token_id == 0
    assert other.data.rows[0].store.read(0)[-1] == 1
    # Held-out text has no EOS whichever it is.
    for plan in (plain, other):
        assert all(d[-1] not in (0, 1) for h in plan.evaluation.sets for d in h.documents)
    with pytest.raises(StageError, match=r"data\.eos: '<stop>' is not a token"):
        plan_of({**raw, "data": data_of(raw, eos="<stop>")})
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    save_pretrained(make_llama(), tokenizer, tmp_path / "endless", dtype=torch.float32)
    with pytest.raises(ModelError, match=r"data\.eos: the tokenizer has no end-of-text token[\s\S]*<\|endoftext\|>"):
        plan_of(stage_of(model=str(tmp_path / "endless")))


def test_long_documents_are_cut_and_counted(stage_of: StageOf, plan_of: PlanOf) -> None:
    raw = stage_of()
    plan = plan_of({**raw, "data": data_of(raw, max_document_tokens=20)})
    for rows in plan.data.rows:
        sizes = np.asarray(rows.store.documents["tokens"]).astype(int)
        assert rows.ledger.truncated == int(np.maximum(sizes - 20, 0).sum())
        assert rows.ledger.placed == int(np.minimum(sizes, 20).sum())


def test_a_source_of_which_nothing_is_left(stage_of: StageOf, plan_of: PlanOf, tmp_path: Path, base: Path) -> None:
    copies = write_jsonl(tmp_path / "copies.jsonl", texts(base / "new-heldout.jsonl"))
    raw = stage_of()
    with pytest.raises(DataError, match=r"'new' has no tokens to train on: [\d,]+ tokens read"):
        plan_of({**raw, "data": data_of(raw, sources=sources_of(raw, {"path": str(copies)}, {}))})


def test_paths_are_relative_to_the_stage_file(stage_of: StageOf, cache: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "texts" / "new.jsonl", new_text(60))
    write_jsonl(tmp_path / "texts" / "old.jsonl", old_text(60))
    raw = without_files(stage_of(output="runs/x", tokens=1000))
    raw["data"]["sources"] = sources_of(raw, {"path": "texts/new.jsonl"}, {"path": "texts/old.jsonl"})
    plan = make_plan(parse_stage(raw, "test"), tmp_path, cache)
    assert plan.output == (tmp_path / "runs" / "x").resolve()
    with pytest.raises(DataError, match=r"texts/new\.jsonl"):
        make_plan(parse_stage(raw, "test"), tmp_path / "texts", cache)


def test_a_plan_reads_as_a_table_and_a_curve(stage_of: StageOf, plan_of: PlanOf) -> None:
    plan = plan_of(stage_of())
    lines = plan_lines(plan)
    record = plan.as_record()
    assert lines[1] == f"{record.tokens:,} trained tokens in {plan.steps:,} steps of 8 rows x 32 tokens"
    for source in record.sources:
        row = next(line for line in lines if line.split()[:1] == [source.name])
        assert f"{source.trained_tokens:,}" in row
        assert f"{source.share:.2%}" in row
    assert any(line.strip().startswith("step 1: 5.00e-03") for line in lines)  # half of the two warm-up steps
    assert any(f"step {plan.steps:,}: 1.00e-03" in line for line in lines)
