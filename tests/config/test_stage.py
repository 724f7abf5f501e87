"""A stage file means what it says: every key is read, every mistake is named with its key and the hint."""

from __future__ import annotations

import ast
import copy
import inspect
import json
import re
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
import yaml
from pydantic import BaseModel

import postgrad
from postgrad.config import mixing, objectives, penalties, schedules, sparse_updates, tunings
from postgrad.config import stage as s
from postgrad.config.quantities import ConfigModel, length_in_steps
from postgrad.config.schedules import DecaySchedule
from postgrad.config.stage import Stage
from postgrad.config.stage_file import json_schema, load_stage, load_tasks, parse_stage
from postgrad.config.tunings import find_tuning, known_tunings
from postgrad.errors import StageError
from postgrad.models.location import ModelLocation
from postgrad.plan.lr_schedule import make_schedule
from postgrad.plan.plan import make_plan
from postgrad.storage.read_yaml import read_yaml
from postgrad.studies.study import load_study
from postgrad.tuning.attach import _get_tuning_class
from tests.conftest import StageOf

GOOD: dict[str, Any] = {
    "name": "medicine",
    "model": "./base",
    "tokens": "20M",
    "data": {
        "sources": [
            {"name": "papers", "path": "data/*.jsonl", "share": 0.9},
            {"name": "replay", "path": "old.parquet", "share": "10%", "role": "replay"},
        ]
    },
    "schedule": {"kind": "rewarm", "peak": 2e-5, "floor": 2e-6},
    "evaluation": {"retained": ["old-heldout.jsonl"]},
}
GONE = object()


def changed(changes: dict[str, Any], raw: dict[str, Any] = GOOD) -> dict[str, Any]:
    """A copy with the values at `key.path` replaced, or removed."""
    raw = copy.deepcopy(raw)
    for key, value in changes.items():
        here: Any = raw
        *path, last = key.split(".")
        for name in path:
            here = here[int(name)] if name.isdigit() else here.setdefault(name, {})
        if value is GONE:
            del here[last]
        elif isinstance(here, list):
            here[int(last)] = value
        else:
            here[last] = value
    return raw


def stage(**changes: Any) -> Stage:
    return parse_stage(changed({key.replace("__", "."): value for key, value in changes.items()}), "test.yaml")


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "tokens"),
    [
        ("20M", 20_000_000), ("500k", 500_000), ("1.5B", 1_500_000_000), ("0.5m", 500_000), ("3g", 3 * 10**9),
        ("1T", 10**12), ("1_000_000", 10**6), ("1,000,000", 10**6), ("2e6", 2_000_000), ("2.5e+6", 2_500_000),
        (" 20 M ", 20_000_000), ("20M tokens", 20_000_000), ("7 tokens", 7), ("1 token", 1), (300, 300), (2e6, 2_000_000),
    ],
)  # fmt: skip
def test_amounts(written: object, tokens: int) -> None:
    assert stage(tokens=written).tokens == tokens


@pytest.mark.parametrize(
    ("written", "share"),
    [("90%", 0.9), ("90 %", 0.9), ("0.9", 0.9), ("9e-1", 0.9), (0.9, 0.9), (".9", 0.9), ("90.0%", 0.9)],
)
def test_shares(written: object, share: float) -> None:
    assert stage(data__sources__0__share=written).resolve_shares() == pytest.approx((share, 0.1))


@pytest.mark.parametrize(
    ("written", "steps"),
    [
        ("1%", 10), ("1 %", 10), ("0.5%", 5), (200, 200), ("200", 200), ("200 steps", 200), ("1 step", 1), ("1_000", 1000),
        ("2M tokens", 200), ("2Mtokens", 200), ("500k tokens", 50), ("1e6 tokens", 100), ("0%", 0), (0, 0), ("100%", 1000),
    ],
)  # fmt: skip
def test_lengths(written: object, steps: float) -> None:
    found = stage(schedule__warmup=written).schedule
    assert isinstance(found, DecaySchedule)
    assert length_in_steps(found.warmup, 1000, 10_000_000) == pytest.approx(steps)


def test_a_rate_without_a_dot_is_text_to_yaml_and_a_number_here(tmp_path: Path) -> None:
    assert yaml.safe_load("peak: 2e-5") == {"peak": "2e-5"}  # YAML 1.1 wants 2.0e-5
    file = tmp_path / "stage.yaml"
    file.write_text(yaml.safe_dump(GOOD).replace("peak: 2.0e-05", "peak: 2e-5"))
    assert "peak: 2e-5" in file.read_text()
    assert load_stage(file).schedule.peak == 2e-5  # type: ignore[union-attr]


def test_defaults_are_those_of_the_reference() -> None:
    found = stage()
    assert (found.data.sequence_length, found.batch.global_batch_size, found.batch.micro_batch_size, found.seed) == (
        1024,
        32,
        None,
        0,
    )
    assert (found.optimizer.betas, found.optimizer.eps, found.optimizer.weight_decay) == ((0.9, 0.95), 1e-8, 0.1)
    assert (found.optimizer.max_grad_norm, found.optimizer.moments) == (1.0, "reset")
    assert (found.data.on_exhausted, found.data.overlap, found.data.sources[0].max_passes) == ("refuse", "report", 4.0)
    assert (found.objectives, found.tuning.kind) == ([], "full")
    assert (found.save.keep, found.save.dtype, found.max_forgetting) == (2, "auto", None)
    assert found.evaluation.retained[0] == s.HeldOutFile(name="old-heldout", path="old-heldout.jsonl")


def test_one_share_may_be_left_out() -> None:
    assert stage(data__sources__0__share=GONE).resolve_shares() == pytest.approx((0.9, 0.1))
    alone = stage(data={"sources": [{"name": "all", "path": "x"}]})
    assert alone.resolve_shares() == (1.0,)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a/b/held-out.jsonl.gz", "held-out"),
        ("x.tar.txt", "x.tar"),
        ("my text.md", "my-text"),
        ("*.txt", "held-out"),
        ("dir", "dir"),
    ],
)
def test_held_out_files_are_named_after_their_path(path: str, name: str) -> None:
    assert stage(evaluation__retained=[path]).evaluation.retained[0] == s.HeldOutFile(name=name, path=path)


# -- overrides --------------------------------------------------------------------------------------------------------


def overridden(tmp_path: Path, *overrides: str) -> Stage:
    file = tmp_path / "stage.yaml"
    file.write_text(yaml.safe_dump(GOOD))
    return load_stage(file, list(overrides))


def test_any_key_can_be_overridden(tmp_path: Path) -> None:
    found = overridden(
        tmp_path, "tokens=5M", "data.sources.replay.share=5%", "data.sources.0.share=95%", "save.every=200",
        "schedule.peak=1e-4",
        "evaluation.retained.0=other.txt", "compute.compile=false",
        "optimizer.betas=[0.9, 0.99]", "data.sources.papers.columns={text: abstract}", "output=a=b",
    )  # fmt: skip
    assert found.tokens == 5_000_000
    assert found.resolve_shares() == (0.95, 0.05)
    assert (found.save.every, found.compute.compile, found.output) == ("200 steps", False, "a=b")
    assert found.schedule.peak == 1e-4  # type: ignore[union-attr]
    assert found.evaluation.retained[0].path == "other.txt"
    assert found.optimizer.betas == (0.9, 0.99)
    assert found.data.sources[0].columns == {"text": "abstract"}


def test_on_is_a_key_and_no_truth_value(tmp_path: Path) -> None:
    assert yaml.safe_load("{on: [x]}") == {True: ["x"]}  # YAML 1.1
    file = tmp_path / "stage.yaml"
    written = yaml.safe_dump({**GOOD, "objectives": []}).replace(
        "objectives: []", "objectives:\n- {kind: next-token, on: [papers]}"
    )
    file.write_text(written)
    assert load_stage(file).objectives[0].on == ["papers"]
    assert overridden(tmp_path, "objectives=[{kind: next-token, on: [replay]}]").objectives[0].on == ["replay"]
    assert overridden(tmp_path, "compute.compile=on").compute.compile is True  # a value is what it was


def test_a_glob_in_an_override_is_text(tmp_path: Path) -> None:
    assert overridden(tmp_path, "data.sources.papers.path=*.jsonl").data.sources[0].path == "*.jsonl"
    assert overridden(tmp_path, "data.sources.papers.path=[a.txt").data.sources[0].path == "[a.txt"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("tokens", r"cannot read the override 'tokens'[\s\S]*key\.sub=value"),
        ("=5", "cannot read the override '=5'"),
        ("tokens.x=5", r"tokens\.x: tokens holds a value"),
        (
            "data.sources.2.share=5%",
            r"data\.sources\.2\.share: there is no item '2'[\s\S]*0 to 1, or one of papers, replay",
        ),
        ("data.sources.paper.share=5%", r"there is no item 'paper'[\s\S]*papers, replay"),
        ("data.sequence_lenght=5", r"data\.sequence_lenght: there is no key[\s\S]*did you mean 'sequence_length'"),
        ("optimizer.betas=[0.9", r"optimizer\.betas: .*a list is expected"),
    ],
)
def test_overrides_that_mean_nothing(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(StageError, match=said):
        overridden(tmp_path, override)


# -- mistakes ---------------------------------------------------------------------------------------------------------

THEN = {
    "kind": "piecewise",
    "pieces": [{"shape": "linear", "start": 0, "end": 1, "length": "5%"}, {"shape": "constant", "start": 1}],
}
INFINITE = {"kind": "infinite", "peak": 3e-4, "constant": 1.65e-4, "floor": 3e-5}
ONLY_REPLAY = {"sources": [{"name": "old", "path": "x", "role": "replay"}]}

MISTAKES: list[tuple[dict[str, Any], str, str]] = [
    # what is changed, the key's path, a word of what is said or of the hint
    ({"tokenz": "5M"}, "tokenz", "did you mean 'tokens'?"),
    ({"data.sequence_lenght": 512}, "data.sequence_lenght", "did you mean 'sequence_length'?"),
    ({"data.sources.0.pth": "x"}, "data.sources[0].pth", "did you mean 'path'?"),
    ({"evaluation.lerned": []}, "evaluation.lerned", "did you mean 'learned'?"),
    (
        {"evaluation.retained": [{"name": "a", "path": "b", "colums": {}}]},
        "evaluation.retained[0].colums",
        "'columns'?",
    ),
    ({"schedule.peek": 1e-3}, "schedule.peek", "did you mean 'peak'?"),
    ({"schedule": {**INFINITE, "constnt": 1e-4}}, "schedule.constnt", "did you mean 'constant'?"),
    (
        {"schedule": {**THEN, "pieces": [{"shape": "constant", "start": 1, "lenght": 5}]}},
        "schedule.pieces[0].lenght",
        "'length'?",
    ),
    ({"objectives": [{"kind": "next-token", "wieght": 2}]}, "objectives[0].wieght", "did you mean 'weight'?"),
    ({"compute.treads": 2}, "compute.treads", "did you mean 'threads'?"),
    ({"schedule.kind": "rewram"}, "schedule", "did you mean 'rewarm'?"),
    ({"schedule.kind": GONE}, "schedule", "one of rewarm, cosine, "),
    ({"objectives": [{"weight": 1}]}, "objectives[0]", "one of classify, distill, masked"),
    ({"tuning": {"rank": 4}}, "tuning", "one of adapter, bias, blocks"),
    ({"data.sources.0.select": [{"keep": 0.5}]}, "data.sources[0].select[0]", "one of dsir, duplicates, perplexity"),
    ({"data.sources.0.select": ["duplicates"]}, "data.sources[0].select[0]", "write {kind: duplicates}"),
    ({"data.sources.0.select": "dsir"}, "data.sources[0].select", "a list is expected, not 'dsir'"),
    ({"schedule": "rewarm"}, "schedule", "write {kind: rewarm}"),
    ({"optimizer.eps": True}, "optimizer.eps", "a number is expected, not true"),
    ({"optimizer.loss_adaptive": {"smoothing": False}}, "optimizer.loss_adaptive.smoothing", "a number is expected"),
    (
        {"objectives": [{"kind": "distill", "temperature": True}]},
        "objectives[0].temperature",
        "a number is expected, not true",
    ),
    ({"penalties": [{"kind": "anchor", "strength": True}]}, "penalties[0].strength", "a number is expected, not true"),
    ({"schedule": 3}, "schedule", "keys with values are expected, not 3"),
    ({"schedule": GONE}, "schedule", "the key is missing"),
    ({"schedule.peak": GONE}, "schedule.peak", "the key is missing"),
    ({"schedule": {"kind": "infinite", "peak": 3e-4, "floor": 3e-5}}, "schedule.constant", "the key is missing"),
    ({"schedule": {**INFINITE, "constant": -1}}, "schedule.constant", "greater than 0, not -1"),
    ({"schedule.peak": -1e-3}, "schedule.peak", "greater than 0"),
    ({"schedule.peak": 0}, "schedule.peak", "greater than 0"),
    ({"schedule.peak": float("inf")}, "schedule.peak", "finite"),
    ({"schedule.peak": float("nan")}, "schedule.peak", "nan"),
    ({"schedule.peak": "high"}, "schedule.peak", "'high'"),
    ({"schedule.floor": -1}, "schedule.floor", "greater than or equal to 0"),
    ({"schedule.warmup": -5}, "schedule.warmup", "such as 1%, 200 steps or 2M tokens"),
    ({"schedule.warmup": "-5%"}, "schedule.warmup", "such as 1%, 200 steps or 2M tokens"),
    ({"schedule.warmup": 0.01}, "schedule.warmup", "such as 1%, 200 steps or 2M tokens"),
    ({"schedule.warmup": "1.2.3%"}, "schedule.warmup", "such as 1%, 200 steps or 2M tokens"),
    ({"schedule.warmup": ","}, "schedule.warmup", "such as 1%, 200 steps or 2M tokens"),
    ({"schedule.warmup": "2M"}, "schedule.warmup", "not '2M'"),  # of what?
    ({"schedule.warmup": True}, "schedule.warmup", "not True"),
    ({"schedule": {"kind": "piecewise", "pieces": []}}, "schedule.pieces", "at least 1 item"),
    ({"schedule": {"kind": "piecewise", "pieces": [{"shape": "linear", "start": 0}]}}, "schedule", "has no `end`"),
    ({"schedule": {**THEN, "pieces": [*THEN["pieces"][::-1]]}}, "schedule", "only the last piece"),  # type: ignore[misc]
    ({"tokens": GONE}, "", "exactly one of `tokens`"),
    ({"new_tokens": "5M"}, "", "exactly one of `tokens`"),
    ({"tokens": "many"}, "tokens", "such as 500k, 20M or 1.5B"),
    ({"tokens": "-5M"}, "tokens", "such as 500k, 20M or 1.5B"),
    ({"tokens": "1.2.3M"}, "tokens", "such as 500k, 20M or 1.5B"),
    ({"tokens": "5X"}, "tokens", "not '5X'"),
    ({"tokens": 0}, "tokens", "greater than 0"),
    ({"tokens": -5}, "tokens", "greater than 0"),
    ({"tokens": True}, "tokens", "a number is expected, not true"),
    ({"tokens": float("inf")}, "tokens", "such as 500k, 20M or 1.5B"),
    ({"tokens": "1e400"}, "tokens", "such as 500k, 20M or 1.5B"),
    ({"tokens": GONE, "new_tokens": "5M", "data": ONLY_REPLAY}, "", "role: new"),
    ({"data.sources.0.share": 0.5}, "", "add up to 0.6"),
    ({"data.sources.0.share": "105%"}, "data.sources[0].share", "less than or equal to 1"),
    ({"data.sources.0.share": -0.1}, "data.sources[0].share", "greater than or equal to 0"),
    ({"data.sources.0.share": "lots"}, "data.sources[0].share", "such as 5% or 0.05"),
    ({"data.sources.0.share": True}, "data.sources[0].share", "a number is expected"),
    ({"data.sources.0.share": GONE, "data.sources.1.share": GONE}, "", "at most one source"),
    ({"data.sources.0.share": GONE, "data.sources.1.share": 1}, "", "leave nothing"),
    ({"data.sources.0.hub": "owner/name"}, "data.sources[0]", "exactly one of `path`, `hub` and `seen_so_far`"),
    ({"data.sources.0.path": GONE}, "data.sources[0]", "exactly one of `path`, `hub` and `seen_so_far`"),
    ({"data.sources.0.name": "my papers"}, "data.sources[0].name", "letters, digits"),
    ({"data.sources.1.name": "papers"}, "data", "two sources have the name 'papers'"),
    ({"data.sources.0.role": "old"}, "data.sources[0].role", "'new' or 'replay'"),
    ({"data.sources.0.max_passes": 0}, "data.sources[0].max_passes", "greater than 0"),
    ({"data.sources.0.held_out": 2}, "data.sources[0].held_out", "less than or equal to 1"),
    ({"data.sources.0.columns": {"text": 3}}, "data.sources[0].columns.text", "valid string"),
    ({"data.sources": []}, "data.sources", "at least 1 item"),
    ({"data": None}, "data", "not None"),
    ({"data.sequence_length": 1}, "data.sequence_length", "greater than or equal to 2"),
    ({"data.skip_steps": -1}, "data.skip_steps", "greater than or equal to 0"),
    ({"data.on_exhausted": "wait"}, "data.on_exhausted", "'refuse', 'repeat', 'stop' or 'renormalise'"),
    ({"data.curriculum": [{"at": "50%", "shares": {"paper": 1.0}}]}, "data", "did you mean 'papers'?"),
    ({"data.curriculum": [{"at": "50%", "shares": {"papers": 0.5}}]}, "", "add up to 0.5"),
    ({"data.curriculum": [{"shares": {"papers": 1.0}}]}, "data.curriculum[0]", "exactly one of `at` and `at_rate`"),
    (
        {"data.curriculum": [{"at": "5%", "at_rate": 0.2, "shares": {"papers": 1.0}}]},
        "data.curriculum[0]",
        "exactly one of",
    ),
    ({"batch.global_batch_size": 0}, "batch.global_batch_size", "greater than 0"),
    ({"batch.global_batch_size": 2.5}, "batch.global_batch_size", "integer"),
    ({"batch.micro_batch_size": True}, "batch.micro_batch_size", "a number is expected"),
    ({"optimizer.betas": [0.9, 1.5]}, "optimizer.betas[1]", "less than 1"),
    ({"optimizer.betas": [0.9]}, "optimizer.betas[1]", "missing"),
    ({"optimizer.eps": -1}, "optimizer.eps", "greater than 0"),
    ({"optimizer.max_grad_norm": 0}, "optimizer.max_grad_norm", "greater than 0"),
    ({"optimizer.moments": "some"}, "optimizer.moments", "'keep-second'"),
    ({"objectives": [{"kind": "nexttoken"}]}, "objectives[0]", "did you mean 'next-token'?"),
    ({"objectives": [{"kind": "next-token", "on": ["paper"]}]}, "", "did you mean 'papers'?"),
    ({"tuning": {"kind": "lorra"}}, "tuning", "did you mean 'lora'?"),
    ({"tuning": {"kind": "lora", "rnak": 8}}, "tuning.rnak", "did you mean 'rank'?"),
    ({"tuning": {"kind": "blocks"}}, "tuning", "exactly one of `last`, `all_but_first` and `targets`"),
    ({"evaluation.retained": ["a/x.txt", "b/x.txt"]}, "evaluation", "give them a `name`"),
    ({"evaluation.retained": "x.txt"}, "evaluation.retained", "a list is expected"),
    ({"evaluation.retained": [{"path": "y"}]}, "evaluation.retained[0].name", "missing"),
    ({"max_forgetting": "-2%"}, "max_forgetting", "such as 5% or 0.05"),
    ({"save.keep": 0}, "save.keep", "greater than 0"),
    ({"save.dtype": "fp32"}, "save.dtype", "'float32'"),
    ({"save.choose": {"set": "dev", "patince": 3}}, "save.choose.patince", "did you mean 'patience'?"),
    ({"save.choose": {"set": "dev", "patience": "3 steps"}}, "save.choose.patience", "such as `3 evaluations`"),
    ({"save.choose": {"set": "dev", "patience": 0}}, "save.choose.patience", "greater than 0"),
    ({"save.choose": {"set": "dev", "min_delta": -1}}, "save.choose.min_delta", "greater than or equal to 0"),
    ({"save.choose": {"metric": "accuracy"}}, "save.choose.set", "missing"),
    ({"evaluation.test": ["x/old-heldout.jsonl"]}, "evaluation", "give them a `name`"),
    ({"compute.dtype": "float16"}, "compute.dtype", "'bfloat16'"),
    ({"compute.compile": "maybe"}, "compute.compile", "'maybe'"),
    ({"seed": -1}, "seed", "greater than or equal to 0"),
    ({"name": "a b"}, "name", "'a b' cannot be a name"),
    ({"name": 2024}, "name", "valid string"),
    ({"model": GONE}, "model", "missing"),
    ({"model": 5}, "model", "valid string"),
    ({"model": {"from_scratch": "llama-1M", "tokeniser": 1}}, "model.tokeniser", "did you mean 'tokenizer'?"),
    (
        {"model": {"from_scratch": "llama-1M", "tokenizer": {"vocab": 1}}},
        "model.tokenizer.vocab",
        "did you mean 'vocab_size'?",
    ),
    (
        {"model": {"from_scratch": "llama-1M", "tokenizer": {"vocab_size": 9}}},
        "model.tokenizer.vocab_size",
        "equal to 300",
    ),
    ({"model": {"from_scratch": "llama-1M", "config": "x"}}, "model", "exactly one of `from_scratch`"),
    ({"model": {"tokenizer": "x"}}, "model", "exactly one of `from_scratch`"),
    ({"model": {"from_scratch": "llama-1M", "dropout": 1}}, "model.dropout", "less than 1"),
    ({"model": {"from_scratch": "llama-1M"}, "base": "x"}, "", "a new model sits on nothing"),
]


@pytest.mark.parametrize(("changes", "path", "hint"), MISTAKES, ids=lambda x: x if isinstance(x, str) else "")
def test_a_mistake_is_told_with_its_key_and_the_way_out(changes: dict[str, Any], path: str, hint: str) -> None:
    with pytest.raises(StageError) as caught:
        parse_stage(changed(changes), "test.yaml")
    assert str(caught.value).startswith(f"test.yaml: {path}: " if path else "test.yaml: ")
    assert hint in str(caught.value)
    assert "constrained" not in str(caught.value)  # pydantic's own words for where it was


def test_several_mistakes_are_counted() -> None:
    with pytest.raises(StageError, match=r"\(and 2 more\)"):
        stage(seed=-1, tokenz=1, batch__global_batch_size=0)


def test_without_a_mistake_nothing_is_said() -> None:
    stage()
    for schedule in (THEN, INFINITE):
        stage(schedule=schedule)


@pytest.mark.parametrize(
    ("schedule", "where", "hint"),
    [
        ({**INFINITE, "cooldown": "90%"}, "schedule.constant_until", "warm-up + cooldown <= constant_until"),
        ({**INFINITE, "constant_until": "120%"}, "schedule.constant_until", "<= 100%"),
        ({**INFINITE, "warmup": "50%"}, "schedule.constant_until", "step 110"),
        ({"kind": "exponential", "peak": 1e-3, "floor": 0}, "schedule.floor", "never reaches 0"),
        ({"kind": "from-floor", "start": 1e-3, "floor": 0, "shape": "exponential"}, "schedule.floor", "above zero"),
        (
            {"kind": "piecewise", "pieces": [{"shape": "inverse-linear", "start": 1, "end": 0}]},
            "schedule.floor",
            "never reaches 0",
        ),
        ({"kind": "rewarm", "peak": 1e-3, "floor": 0, "warmup": "150%"}, "schedule.warmup", "100 steps"),
        ({"kind": "constant", "peak": 1e-3, "warmup": "101 steps"}, "schedule.warmup", "100 steps"),
        (
            {"kind": "wsd", "peak": 1e-3, "floor": 1e-5, "warmup": "60%", "decay": "50%"},
            "schedule.warmup",
            "decay (50 steps)",
        ),
        ({**THEN, "pieces": [{**THEN["pieces"][0], "length": "101 steps"}]}, "schedule.pieces", "100 steps"),  # type: ignore[index]
        ({"kind": "anneal", "floor": 1e-5}, "schedule.start", "set `model` to a checkpoint"),
    ],
)
def test_a_schedule_that_does_not_fit_its_stage(schedule: dict[str, Any], where: str, hint: str) -> None:
    with pytest.raises(StageError) as caught:
        make_schedule(stage(schedule=schedule).schedule, 100, 10_000, ModelLocation("base", None))
    assert str(caught.value).startswith(where)
    assert hint in str(caught.value)


def test_schedules_are_those_of_the_published_tables() -> None:
    """Ibrahim et al. 2024: cooldown to 1.65e-4 over 60 %, constant until 85 %, exponential anneal to 3e-5."""
    curve = make_schedule(
        stage(schedule={**INFINITE, "warmup": "0%"}).schedule, 1000, 10**6, ModelLocation("base", None)
    )
    assert curve(300) == pytest.approx(2.325e-4)
    assert curve(600) == curve(850) == pytest.approx(1.65e-4)
    assert curve(925) == pytest.approx(7.036e-5, rel=1e-3)
    assert curve(1000) == pytest.approx(3e-5)
    bent = make_schedule(
        stage(schedule={**INFINITE, "warmup": "0%", "cooldown_shape": "inverse-sqrt"}).schedule,
        1000,
        10**6,
        ModelLocation("base", None),
    )
    assert [bent(x) for x in (0, 60, 150, 300, 600)] == pytest.approx(
        [3e-4, 2.434e-4, 2.1e-4, 1.856e-4, 1.65e-4], rel=1e-3
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: x\ndata: [1,\nmodel: y\n", r"stage\.yaml:4: not YAML: expected"),
        ("name: x\n\tmodel: y\n", r"stage\.yaml:2: not YAML"),
        ("a: *b\n", r"stage\.yaml:1: not YAML: found undefined alias"),
        ("name: 2024-13-45\n", r"stage\.yaml: not YAML: month must be in 1\.\.12"),
        ("- a\n- b\n", "a stage is a mapping"),
        ("", "a stage is a mapping"),
        ("\x00", r"stage\.yaml: not YAML"),
    ],
)
def test_broken_files_are_named_with_their_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "stage.yaml"
    file.write_text(text)
    with pytest.raises(StageError, match=said):
        load_stage(file)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"nowhere\.yaml: the stage file cannot be read \(No such file"):
        load_stage(tmp_path / "nowhere.yaml")
    (tmp_path / "medicine.yaml").write_text("name: x")
    for read in (load_stage, load_tasks, load_study):
        with pytest.raises(StageError) as caught:
            read(tmp_path / "medicin.yaml")
        assert caught.value.hint == "did you mean 'medicine.yaml'?"
    with pytest.raises(StageError, match="Is a directory"):
        load_stage(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("name: caf\xe9".encode("latin-1"))
    with pytest.raises(StageError, match="not UTF-8"):
        load_stage(tmp_path / "latin.yaml")


def test_missing_text_is_named_with_its_key(base: Path, tmp_path: Path) -> None:
    from postgrad.errors import DataError

    raw = changed({"model": str(base / "base"), "data.sources.0.path": "nowhere/*.jsonl", "data.sequence_length": 64})
    with pytest.raises(DataError, match=r"data\.sources\[0\][\s\S]*nowhere"):
        make_plan(parse_stage(raw, "test.yaml"), tmp_path, tmp_path / "cache")


# -- the schema -------------------------------------------------------------------------------------------------------


def written_by_hand() -> list[dict[str, Any]]:
    """The stages above and every example, as YAML gives them."""
    examples = sorted((Path(postgrad.__file__).parents[1] / "examples").glob("*.yaml"))
    return [
        GOOD,
        *(changed({"schedule": schedule}) for schedule in (THEN, INFINITE)),
        changed({"model": {"from_scratch": "llama-15M", "tokenizer": {"vocab_size": 4000}, "dropout": "10%"}}),
        changed({"model": {"config": "config.json", "tokenizer": "gpt2"}}),
        changed({"save.keep": "all", "schedule.warmup": 200, "tokens": 5, "data.sources.0.held_out": "1%"}),
        *(read_yaml(file.read_text()) for file in examples),
    ]


def test_the_schema_accepts_what_the_tool_accepts() -> None:
    schema = json.loads(json_schema())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for raw in written_by_hand():
        parse_stage(raw, "test.yaml")
        validator.validate(raw)


def test_the_schema_refuses_what_the_tool_refuses() -> None:
    validator = jsonschema.Draft202012Validator(json.loads(json_schema()))
    refused = [not validator.is_valid(changed(changes)) for changes, _, _ in MISTAKES]
    for (changes, _, hint), found in zip(MISTAKES, refused, strict=True):
        if "did you mean" in hint and "papers" not in hint:
            assert found, changes
    assert sum(refused) > len(refused) / 2


# -- every key is read ------------------------------------------------------------------------------------------------


def parts(model: type[BaseModel]) -> list[type[BaseModel]]:
    """A model and all models its fields are made of."""
    homes = (s, schedules, objectives, penalties, tunings, mixing, sparse_updates)
    known = {v for home in homes for v in vars(home).values() if inspect.isclass(v) and issubclass(v, ConfigModel)}
    found = [model]
    for here in found:  # grows while it is walked
        words = {w for field in here.model_fields.values() for w in re.findall(r"\w+", str(field.annotation))}
        found += [m for m in known if m.__name__ in words and m not in found]
    return found


def read_names() -> set[str]:
    """Attributes and quoted keys that the code reads, outside the declarations of the stage itself."""
    names: set[str] = set()
    for file in Path(postgrad.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
            elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                names.add(str(node.slice.value))
    return names


def test_every_key_of_a_stage_is_read_somewhere() -> None:
    models = parts(Stage)
    known = {"Stage", "Source", "CurriculumPhase", "InfiniteSchedule", "SchedulePiece", "HeldOutFile", "ComputeConfig"}
    assert known <= {m.__name__ for m in models}
    names = read_names()
    unread = [f"{m.__name__}.{f}" for m in models for f in m.model_fields if f not in names and f != "kind"]
    # A tuning's other keys are handed to its kind as they are, which the next test looks at.
    assert [name for name in unread if name.split(".")[0] not in vars(tunings)] == []
    assert "constant_iters_percent" not in names  # the mutant: a key that nobody reads is not found


def test_every_key_of_a_tuning_is_an_option_of_its_kind() -> None:
    elsewhere = {"kind", "template", "demonstrations", "orthogonal"}
    kinds = [m for m in parts(Stage) if m.__name__ in vars(tunings) and "kind" in m.model_fields]
    # Other tests define tunings of their own, which stay known in this process.
    known = [tuning for kind in known_tunings() if (tuning := find_tuning(kind)) is not None]
    shipped = [tuning for tuning in known if tuning.__module__.startswith("postgrad.")]
    assert len(kinds) == len(shipped) and set(kinds) == set(shipped)
    for model in kinds:
        (kind,) = get_args(model.model_fields["kind"].annotation)
        options = inspect.signature(_get_tuning_class(kind)).parameters
        assert set(model.model_fields) - elsewhere - set(options) == set(), kind
    names = read_names()
    assert elsewhere <= names


# -- the fingerprint --------------------------------------------------------------------------------------------------

OTHER: dict[str, Any] = {
    "name": "x", "model": "x", "tokens": "21M", "seed": 1, "max_forgetting": "5%", "data.sequence_length": 512,
    "data.on_exhausted": "stop", "data.skip_steps": 3, "data.max_document_tokens": 9, "data.eos": "<e>", "data.overlap": "off",
    "data.packing": False,
    "data.workers": 3, "data.curriculum": [{"at": "50%", "shares": {"papers": 1.0}}], "data.sources.0.path": "x",
    "data.sources.0.max_passes": 5, "data.sources.0.held_out": "1%", "data.sources.0.prior_tokens": 5,
    "data.sources.0.select": [{"kind": "duplicates"}],
    "data.sources.0.document_unit": "lines", "data.sources.0.columns": {"text": "x"}, "data.sources.0.name": "x",
    "data.sources.1.role": "new", "batch.global_batch_size": 16, "batch.micro_batch_size": 2,
    "schedule.peak": 1, "schedule.floor": 0,
    "schedule.warmup": "2%", "schedule.start": 1e-7, "schedule.kind": "linear", "optimizer.betas": [0.9, 0.99],
    "optimizer.eps": 1e-6, "optimizer.weight_decay": 0, "optimizer.max_grad_norm": 2, "optimizer.moments": "keep",
    "optimizer.sparse_update": {"kind": "mofo"}, "optimizer.loss_adaptive": {"initial_share": 0.3},
    "optimizer.sharpness_aware": {"radius": 0.1}, "optimizer.moment_dtype": "float8",
    "optimizer.decay_embeddings": True, "penalties": [{"kind": "anchor", "strength": 1}], "tuning": {"kind": "norm"},
    "objectives": [{"kind": "next-token", "weight": 2}], "evaluation.retained": [], "evaluation.learned": ["x"],
    "evaluation.test": ["x"], "save.choose": {"set": "x"},
    "evaluation.every": "20%", "evaluation.eval_tokens": 5, "evaluation.max_tokens": 5, "evaluation.samples": 0,
    "evaluation.relearning_steps": 5,
    "evaluation.pseudo_perplexity": "2k",
    "evaluation.drift_tokens": 500,
    "evaluation.tasks": [{"name": "quiz", "path": "quiz.jsonl"}],
    "evaluation.abilities": "all",
    "save.dtype": "float32", "compute.dtype": "float32", "compute.compile": True, "compute.attention": "eager",
    "compute.activation_checkpointing": True, "compute.threads": 1,
}  # fmt: skip
SAME: dict[str, Any] = {
    "output": "elsewhere",
    "save.every": "3%",
    "evaluation.expected_losses": {"papers-heldout": {"value": 2.0, "low": 1.0, "high": 3.0}},
    "save.keep": "all",
    "optimizer.max_skipped_steps": 3,
    "compute.collective_timeout_seconds": 20,
    "parallel": {"replicate": 2},
}


def test_a_fingerprint_is_of_everything_but_where_and_how_often() -> None:
    plain = stage().fingerprint()
    assert {parse_stage(changed({k: v}), "t").fingerprint() for k, v in SAME.items()} == {plain}
    prints = [plain, *(parse_stage(changed({k: v}), "t").fingerprint() for k, v in OTHER.items())]
    rest = {"data.sources.0.share": GONE}  # which is what a mixing is for
    prints += [
        parse_stage(changed({**rest, **more}), "t").fingerprint() for more in ({}, {"data.mixing": {"kind": "equal"}})
    ]
    muon = [{"optimizer.kind": "muon"}, {"optimizer.kind": "muon", "optimizer.momentum": 0.9}]
    prints += [parse_stage(changed(each), "t").fingerprint() for each in muon]
    low_precision = {"compute.dtype": "bfloat16", "optimizer.master_dtype": "bfloat16"}
    prints += [parse_stage(changed(low_precision), "t").fingerprint()]
    released = {"optimizer.release_gradients": True, "optimizer.max_grad_norm": None}
    prints += [parse_stage(changed(released), "t").fingerprint()]
    bound = {"evaluation.abilities": "all", "max_ability_drop": "3%"}
    prints += [parse_stage(changed(bound), "t").fingerprint()]
    assert len(set(prints)) == len(prints)
    # Every top-level key and every key of a plain part is in one of the lists above.
    listed = {key.split(".0.")[0] if ".0." not in key else key for key in (*OTHER, *SAME)}
    for part in ("data", "batch", "optimizer", "evaluation", "save", "compute"):
        model = type(getattr(stage(), part))
        missing = {f"{part}.{f}" for f in model.model_fields} - listed - {"data.sources", "data.mixing"}
        assert missing - {key for each in (*muon, low_precision, released) for key in each} == set()


def test_the_way_a_number_is_written_is_no_other_stage() -> None:
    assert stage(tokens=20_000_000, data__sources__1__share=0.1).fingerprint() == stage().fingerprint()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\nname: b\n", r":2: not YAML: the key 'name' is a duplicate"),
        ("data:\n  sources: []\n  sources: []\n", r":3: not YAML: the key 'sources' is a duplicate"),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    """YAML itself would let the last one win."""
    file = tmp_path / "stage.yaml"
    file.write_text(text)
    with pytest.raises(StageError, match=expected):
        load_stage(file)


@pytest.mark.parametrize(
    "schedule",
    [
        {"kind": "rewarm", "peak": 1e-5, "floor": 1e-4},
        {"kind": "from-floor", "start": 1e-5, "floor": 1e-4},
        {"kind": "wsd", "peak": 1e-5, "floor": 1e-4},
        {"kind": "infinite", "peak": 1e-4, "constant": 2e-4, "floor": 1e-5},
        {"kind": "infinite", "peak": 1e-4, "constant": 5e-5, "floor": 6e-5},
    ],
)
def test_rates_that_would_rise_are_refused(stage_of: StageOf, schedule: dict[str, Any]) -> None:
    with pytest.raises(StageError, match=r"schedule.*is above"):
        parse_stage(stage_of(schedule=schedule), "stage.yaml")


@pytest.mark.parametrize("setting", [{"columns": {"text": "body"}}, {"document_unit": "lines"}, {"held_out": 0.1}])
def test_a_replay_of_everything_has_no_settings_of_its_own(stage_of: StageOf, setting: dict[str, Any]) -> None:
    raw = stage_of()
    raw["data"]["sources"][1] = {"name": "seen", "seen_so_far": True, "share": 0.25, **setting}
    with pytest.raises(StageError, match=f"takes `{next(iter(setting))}` from the earlier stages"):
        parse_stage(raw, "stage.yaml")


def test_on_and_off_are_words(tmp_path: Path) -> None:
    """As in YAML 1.2; plain YAML makes truth values of them, and the key `on` would be one."""
    file = tmp_path / "a.yaml"
    file.write_text(
        "name: a\nmodel: b\ntokens: 1000\nschedule: {kind: constant, peak: 1.0e-3}\n"
        "data: {overlap: off, sources: [{name: n, path: x.txt}]}\nobjectives: [{kind: next-token, on: [n]}]\n"
    )
    stage = load_stage(file)
    assert stage.data.overlap == "off" and stage.objectives[0].on == ["n"]
    assert load_stage(file, ["data.overlap=report"]).data.overlap == "report"
    assert load_stage(file, ["data.overlap=off", "compute.compile=true"]).compute.compile is True
    assert yaml.safe_load("on: off") == {True: False}  # the mutant


@pytest.mark.parametrize(
    ("written", "patience"), [("3 evaluations", 3), ("1 evaluation", 1), (4, 4), ("none", None), (None, None)]
)
def test_patience_is_a_number_of_evaluations(written: object, patience: int | None) -> None:
    found = stage(save__choose={"set": "dev", "patience": written}).save.choose
    assert found is not None and found.patience == patience
