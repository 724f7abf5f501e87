"""Stages with unpacked rows: the key, what `check` says, errors, and the numbers of a model that could be packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from postgrad.check.check import check_stage
from postgrad.commands.importance import measure_importance
from postgrad.config.stage_file import parse_stage
from postgrad.errors import ModelError, StageError, TuningError
from postgrad.models.pretrained import save_pretrained
from postgrad.run.events import CheckpointSaved, RunFinished
from postgrad.run.run import run_stage
from tests.conftest import StageOf, make_tokenizer
from tests.run.test_run import events_of, plan_of
from tests.tiny_models import make_unpacked
from tests.tiny_stages import LENGTH, Workspace, make_workspace


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


# --- with every method ------------------------------------------------------------------------------------------------

METHODS: dict[str, dict[str, Any]] = {
    "L2-SP": {"penalties": [{"kind": "anchor", "strength": 1.0}]},
    "EWC": {"penalties": [{"kind": "anchor", "strength": 1.0, "importance": "importance.safetensors"}]},
    "distillation": {"objectives": [{"kind": "next-token"}, {"kind": "distill", "on": ["old"]}]},
    "cached distillation": {
        "objectives": [{"kind": "next-token"}, {"kind": "distill", "on": ["old"], "cache": {"kind": "top-k", "k": 8}}]
    },
    **{
        tuning["kind"]: {"tuning": tuning}
        for tuning in (
            {"kind": "prefix", "length": 3},
            {"kind": "p-tuning-v2", "length": 3},
            {"kind": "adapter", "reduction": 4},
            {"kind": "prompt", "length": 3, "init": "vocabulary"},
            {"kind": "lora", "rank": 2, "targets": "all-linear"},
            {"kind": "osf", "effective_rank": 0.5},
            {"kind": "expand", "blocks": 1, "every": 2},
        )
    },
}
REFUSED = {
    ("mamba2", "prefix"): "no attention of Mamba2ForCausalLM",
    ("mamba2", "p-tuning-v2"): "no attention of Mamba2ForCausalLM",
    ("mamba2", "adapter"): r"no feed_forward sub-layer in backbone\.layers\.0",
    ("gpt_oss", "prefix"): "GptOssForCausalLM cannot use `sdpa` attention",
    ("gpt_oss", "p-tuning-v2"): "GptOssForCausalLM cannot use `sdpa` attention",
}
QUICK = {("mamba2", "cached distillation"), ("gpt_oss", "prefix"), ("mamba2", "adapter")}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = make_workspace(tmp_path_factory.mktemp("shelf"), tmp_path_factory.getbasetemp() / "cache")
    for family in ("mamba2", "gpt_oss", "qwen3_next"):
        save_pretrained(make_unpacked(family), make_tokenizer(), workspace.folder / family, dtype=torch.float32)
    return workspace


@pytest.mark.parametrize(
    ("family", "method"),
    [
        (family, method) if (family, method) in QUICK else pytest.param(family, method, marks=pytest.mark.slow)
        for family in ("mamba2", "gpt_oss", "qwen3_next")
        for method in METHODS
    ],
)
def test_every_method_resumes_to_the_same_bits_on_unpacked_rows_or_is_refused(
    family: str, method: str, shelf: Workspace
) -> None:
    if method == "EWC":
        importance = shelf.folder / "importance.safetensors"
        measure_importance(
            str(shelf.folder / family), [shelf.file("old")], out=importance, tokens=600, context=48, force=True
        )
    evaluation = {"learned": [shelf.file("new", held_out=True)], "samples": 0, "every": "100%", "drift_tokens": 0}

    def stage(name: str) -> dict[str, Any]:
        changes = {"model": family, "tokens": 3 * 4 * LENGTH, "evaluation": evaluation, "save": {"every": "1 step"}}
        return shelf.stage(f"{family}-{method.replace(' ', '-')}-{name}", **changes, **METHODS[method])

    if said := REFUSED.get((family, method)):
        with pytest.raises(TuningError, match=said) as caught:
            shelf.run(stage("whole"))
        assert caught.value.where == "tuning" and "LoRA" in caught.value.hint
        return
    assert not shelf.run(stage("whole")).record.execution.packed
    events = run_stage(shelf.plan(stage("parts")), command="test", cache=shelf.cache)
    next(event for event in events if isinstance(event, CheckpointSaved))
    events.close()  # type: ignore[attr-defined]
    shelf.run(stage("parts"))
    whole, parts = (shelf.folder / "runs" / stage(name)["name"] for name in ("whole", "parts"))
    files = [path.name for path in (whole / "model").glob("*.safetensors")]
    assert files and all(
        (whole / "model" / file).read_bytes() == (parts / "model" / file).read_bytes() for file in files
    )
