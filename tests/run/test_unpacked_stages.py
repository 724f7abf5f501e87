"""Stages with unpacked rows: the key, what `check` says, errors, and the numbers of a model that could be packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from postgrad.check.check import check_stage
from postgrad.config.stage_file import parse_stage
from postgrad.errors import ModelError, StageError
from postgrad.models.pretrained import save_pretrained
from postgrad.run.events import RunFinished
from tests.conftest import StageOf, make_tokenizer
from tests.run.test_run import events_of, plan_of
from tests.tiny_models import make_unpacked


def with_packing(raw: dict[str, Any], packing: object) -> dict[str, Any]:
    return {**raw, "data": {**raw["data"], "packing": packing}}


@pytest.fixture
def gpt_oss(tmp_path: Path) -> str:
    save_pretrained(make_unpacked("gpt_oss"), make_tokenizer(), tmp_path / "m", dtype=torch.float32)
    return str(tmp_path / "m")


def test_the_key_leaves_earlier_fingerprints_alone(stage_of: StageOf) -> None:
    plain, unset, off = (
        parse_stage(raw, "test")
        for raw in (stage_of(), with_packing(stage_of(), None), with_packing(stage_of(), False))
    )
    assert plain.fingerprint() == unset.fingerprint() != off.fingerprint()
    assert "packing" not in plain.model_dump()["data"] and off.model_dump()["data"]["packing"] is False
    with pytest.raises(StageError, match=r"data\.packing"):
        parse_stage(with_packing(stage_of(), "maybe"), "test")


def test_check_says_why_rows_are_unpacked_and_how_much_is_padding(stage_of: StageOf, cache: Path, gpt_oss: str) -> None:
    found = check_stage(plan_of(stage_of(model=gpt_oss), cache), cache=cache, show=2)
    assert "each document is a row of its own, since packed documents attend to each other in GptOss" in found["text"]
    assert f"padding: {found['padding_share']:.1%} of the positions" in found["text"]
    assert "verified" not in found["text"] and found["execution"]["packed"] is False
    for source in found["shown"]:
        assert source.layout == "unpacked" and len(source.rows) == 2
        for row in source.rows:
            assert row.segments[0].tokens and {segment.name for segment in row.segments} <= {"1", "pad"}


def test_packing_that_is_forced_on_a_model_that_leaks_is_refused(stage_of: StageOf, cache: Path, gpt_oss: str) -> None:
    raw = with_packing(stage_of(model=gpt_oss), True)
    with pytest.raises(ModelError, match="GptOssAttention: attention with sinks") as caught:
        check_stage(plan_of(raw, cache), cache=cache)
    assert caught.value.where == "data.packing" and "data.packing" in caught.value.hint


def test_a_model_that_can_be_packed_has_the_same_plan_and_losses_unpacked(
    stage_of: StageOf, cache: Path, tmp_path: Path
) -> None:
    totals = []
    for packing in (True, False):
        raw = with_packing(stage_of(tokens=1500, output=str(tmp_path / str(packing))), packing)
        finished = events_of(raw, cache)[-1]
        assert isinstance(finished, RunFinished)
        record = finished.record
        assert record.plan == plan_of(raw, cache).as_record()
        assert (record.totals.padding_share is None) == packing == record.execution.packed
        totals.append(record.totals)
    packed, unpacked = totals
    for one, two in zip(packed.sources, unpacked.sources, strict=True):
        assert (one.trained_tokens, one.rows) == (two.trained_tokens, two.rows)
