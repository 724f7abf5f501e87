"""A study makes every run once, goes on where it was stopped, and tells numbers that are those of its runs."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from postgrad.cli.main import app
from postgrad.cli.study_progress import StudyProgress, progress_table
from postgrad.commands import builtin_corpus
from postgrad.errors import DataError, StageError
from postgrad.evaluation import before_after
from postgrad.lineage.metrics import EvaluationRow, SetRow
from postgrad.lineage.record import Record, SkippedStep, read_record
from postgrad.reports.result_models import StudyResults
from postgrad.reports.sections.study_table import claims_table, study_arms_table, study_csv
from postgrad.reports.sections.study_text import join_names, study_summary
from postgrad.stats.bootstrap import resample_ratio
from postgrad.storage.read_yaml import read_yaml
from postgrad.studies import results as found_in
from postgrad.studies import step_graph as study_arms
from postgrad.studies import study_plan as study_plan
from postgrad.studies import study_templates
from postgrad.studies.outputs import outputs_text, write_outputs
from postgrad.studies.results import (
    BootstrapEstimate,
    Losses,
    claim_verdict,
    compute_results,
    mean_estimate,
    removed_share,
)
from postgrad.studies.results import _ArmLosses as Measured
from postgrad.studies.run_step import StepProgress, run_step
from postgrad.studies.run_study import (
    PreparedStudy,
    StepFailed,
    StepFinished,
    StepStarted,
    StudyFinished,
    _StepQueue,
    load_times,
    prepare_study,
    run_study,
    total_step_seconds,
)
from postgrad.studies.step_graph import StepGraph, build_step_graph
from postgrad.studies.study import Arm, load_study, merge_patch, parse_study, study_schema
from postgrad.studies.study_plan import RunTiming, forecast_record, forecast_study
from tests.conftest import StageOf, new_text, write_jsonl


def raw(home: Path, **changes: Any) -> dict[str, Any]:
    """A small study as plain data."""
    given: dict[str, Any] = {
        "name": "tiny",
        "base": str(home / "base"),
        "old": {"path": str(home / "old.jsonl"), "prior_tokens": 2000, "max_passes": 20},
        "new": {"path": str(home / "new.jsonl"), "max_passes": 20},
        "retained": {"name": "old-held", "path": str(home / "old-heldout.jsonl")},
        "learned": {"name": "new-held", "path": str(home / "new-heldout.jsonl")},
        "stage": {
            "tokens": 2000,
            "data": {"sequence_length": 32, "overlap": "off"},
            "batch": {"global_batch_size": 8, "micro_batch_size": 8},
            "schedule": {"kind": "rewarm", "peak": 1e-2, "floor": 1e-3, "warmup": "1 steps"},
            "evaluation": {"every": "50%", "eval_tokens": 500},
            "save": {"every": "3 steps"},
            "compute": {"threads": 1, "dtype": "float32", "compile": False},
        },
        "arms": {"none": {}, "replay": {"replay": "25%"}, "half": {"blend": {"arm": "none", "weight": 0.5}}},
    }
    return {**given, **changes}


def written(folder: Path, study: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return folder / "study.yaml"


def carried_out(prepared: PreparedStudy, **how: Any) -> tuple[list[Any], StudyFinished]:
    """A study from where it is to its end: what was made, and how it ended."""
    events = list(run_study(prepared, command="postgrad study study.yaml", **how))
    ended = events[-1]
    assert isinstance(ended, StudyFinished)
    return events, ended


def begun(events: list[Any], prepared: PreparedStudy) -> list[str]:
    """What was made now, by name."""
    return [prepared.graph.steps[event.key].slug for event in events if isinstance(event, StepStarted)]


PRETRAINED = {"pretrain": {"model": {"from_scratch": "llama-60k", "tokenizer": {"vocab_size": 320}}, "tokens": 3000}}


@pytest.fixture(scope="module")
def done(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PreparedStudy]:
    """A study of several sorts of arms that was carried out, with a base of its own and two seeds."""
    folder = tmp_path_factory.mktemp("study")
    arms = {
        "none": {},
        "replay": {"replay": "25%"},
        "union": {"start": "scratch", "reads": "union", "seeds": [0]},
        "half": {"blend": {"arm": "none", "weight": 0.25}},
    }
    claims = [
        {"statement": "replay helps", "arm": "replay", "compared_with": "none", "loss": "old"},
        {"statement": "replay hurts", "arm": "none", "compared_with": "replay", "loss": "old", "max_difference": -5},
        {"statement": "most of it", "arm": "replay", "min_removed": "1e-9"},
        {"statement": "it learnt", "arm": "none", "compared_with": "base", "loss": "new"},
    ]
    file = written(folder, raw(base, base=PRETRAINED, arms=arms, seeds=[0, 1], claims=claims))
    prepared = prepare_study(file, tmp_path_factory.getbasetemp() / "cache")
    _, ended = carried_out(prepared)
    assert not ended.failures and not ended.is_stopped
    yield prepared


# -- the file ----------------------------------------------------------------------------------------------------------


def changed(study: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    out = json.loads(json.dumps(study))
    here = out
    *keys, last = path.split("/")
    for key in keys:
        here = here[key]
    if value is None:
        del here[last]
    else:
        here[last] = value
    return out


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("arms/none", {"replai": "5%"}, "did you mean 'replay'"),
        ("arms/none", {"schedule": {"peek": 1e-3}}, "arms.none: schedule"),
        ("arms/none", {"seed": 3}, "`seed` follows from the study"),
        ("arms/none", {"replay": "5%", "reads": "union"}, "goes with the new text"),
        ("arms/none", {"evaluation": {"retained": []}}, "the same for all arms"),
        ("arms/none", {"stages": [{}, {}]}, "has 2 `stages`, and there are 1 new texts"),
        ("arms/half", {"blend": {"arm": "nine", "weight": 0.5}}, "did you mean 'none'"),
        ("arms/half", {"blend": {"arm": "none", "weight": 0.5}, "replay": "5%"}, "a blend trains nothing"),
        ("arms/half", {"start": "half"}, "wait for each other"),
        ("arms/half", {"replay": 0}, "the arms 'none' and 'half' are the same"),
        ("arms/half", {"replay": "5%", "replay_from": "generated", "start": "scratch"}, "a base that can write"),
        ("retained", None, "no retained set"),
        ("learned", None, "no learned set"),
        ("old", None, "`old` is missing: the arm 'replay' reads it"),
        ("baseline", "nobody", "names an arm 'nobody' that is not there"),
        ("stage", {"name": "x"}, "stage: `name` follows from the study"),
        ("stage/tokenz", 5, "did you mean 'tokens'"),
        ("new", [{"path": "a.txt"}, {"path": "b/a.txt"}], "two texts are called 'a'"),
        ("new", {"path": "a.txt", "share": "5%"}, "`share` follows from the arms"),
        ("base", {"pretrain": {"tokens": 5}}, "the key `model` is missing"),
        ("seeds", [1, 1], "a seed is named twice"),
        ("claims", [{"statement": "x", "arm": "none"}], "exactly one of `compared_with` and `min_removed`"),
        ("nmae", "x", "there is no key 'nmae'"),
        ("name", "..", "'..' cannot be a name"),
        ("arms/none", {"objectives": [{"kind": "next-token"}, {"kind": "distill", "on": ["old"]}]}, "known: new"),
        ("arms/none", {"start": "far"}, "known: base, scratch, none, replay, half"),
        ("arms/none", {"patch": {"tokens": 5}}, "there is no key 'patch'"),
        ("arms/none", {"seeds": []}, "arms.none.seeds"),
        ("arms/none", {"seeds": [0, 0]}, "a seed is named twice"),
        ("arms/none", {"data": 5}, "arms.none: data: a mapping of keys to values is expected, not 5"),
        ("arms/none", {"data": {"sources": 5}}, "data.sources: a list is expected, not 5"),
        ("arms/none", {"evaluation": 5}, "evaluation: a mapping of keys to values is expected, not 5"),
        ("arms/none", {"penalties": 5}, "penalties: a list is expected, not 5"),
        ("arms/none", {"reads": "old", "data": {"sources": [{"path": "x"}]}}, "`data.sources` goes with the new text"),
        ("arms/none", {"replay": "5%", "stages": [{"data": {"sources": [{}]}}]}, "says there what is replayed"),
        ("arms/none", {"stages": [{"replay": "5%"}]}, "stages[0]: there is no key 'replay'"),
        ("arms/base", {"replay": "5%"}, "cannot be called 'base'"),
        ("arms/ ", {"replay": "5%"}, "cannot be called ' '"),
        ("arms/again", {"blend": {"arm": "half", "weight": 0.5}}, "'half' is a blend itself"),
        ("stage/evaluation", {"retained": ["x.jsonl"]}, "stage: what is measured is the same for all arms"),
        ("stage/data/sources", [{"name": "x", "path": "x.jsonl"}], "stage: `data.sources` follow from the texts"),
        ("stage/data", [], "stage: data: a mapping of keys to values is expected, not []"),
        ("base", {"pretrain": {"model": "x", "tokens": 5, "data": {"sources": [{}]}}}, "follow from the texts"),
        ("base", {"pretrain": {"model": "x", "tokens": 5, "seed": 1}}, "`seed` follows from the study"),
        ("seeds", True, "a valid integer, not True"),
        ("claims", [{"statement": "x", "arm": "none", "compared_with": "none"}], "is compared with itself"),
        (
            "claims",
            [{"statement": "x", "arm": "replay", "min_removed": "5%", "loss": "new"}],
            "`loss` goes with `compared_with`",
        ),
        (
            "claims",
            [{"statement": "x", "arm": "replay", "min_removed": "5%", "max_difference": 1}],
            "`max_difference` goes with `compared_with`",
        ),
        ("claims", [{"statement": "x", "arm": "none", "min_removed": "5%"}], "'none' removes nothing"),
        (
            "claims",
            [{"statement": "x", "arm": "nine", "compared_with": "base"}],
            "names an arm 'nine' that is not there",
        ),
    ],
)
def test_mistakes_are_named(base: Path, path: str, value: Any, told: str) -> None:
    study = changed(raw(base), path, value)
    with pytest.raises(StageError) as error:
        build_step_graph(parse_study(study, "study.yaml"), lambda text: text.get("path"), "study.yaml")
    assert told in str(error.value) and str(error.value).startswith("study.yaml")


def test_a_claim_about_the_share_removed_needs_an_arm_without_protection(base: Path) -> None:
    claims = [{"statement": "x", "arm": "replay", "min_removed": "5%"}]
    arms = {"plain": {}, "replay": {"replay": "5%"}}
    with pytest.raises(StageError, match="does not say whose forgetting is removed"):
        parse_study(raw(base, arms=arms, claims=claims), "s")
    assert parse_study(raw(base, arms=arms, claims=claims, baseline="plain"), "s").baseline_name == "plain"


def test_a_patch_is_merged_where_the_kind_is_the_same() -> None:
    below = {
        "schedule": {"kind": "rewarm", "peak": 1.0, "floor": 0.1},
        "batch": {"global_batch_size": 8},
        "list": [1, 2],
    }
    assert merge_patch(below, {"schedule": {"peak": 2.0}})["schedule"] == {"kind": "rewarm", "peak": 2.0, "floor": 0.1}
    assert merge_patch(below, {"schedule": {"kind": "constant", "peak": 2.0}})["schedule"] == {
        "kind": "constant",
        "peak": 2.0,
    }
    assert merge_patch(below, {"list": [3]}) == {**below, "list": [3]}
    assert below["schedule"]["peak"] == 1.0


def worked(home: Path, **changes: Any) -> StepGraph:
    return build_step_graph(parse_study(raw(home, **changes), "s"), lambda text: text.get("path"), "s")


def test_what_several_arms_need_is_there_once(base: Path) -> None:
    arms = {
        "none": {},
        "replay": {"replay": "25%"},
        "self": {"replay": "25%", "replay_from": "generated"},
        "self-less": {"replay": "10%", "replay_from": "generated"},
        "ewc": {"penalties": [{"kind": "anchor", "strength": 1.0, "importance": "measured"}]},
        "ewc-more": {"penalties": [{"kind": "anchor", "strength": 2.0, "importance": "measured"}]},
        "then": {"start": "none", "schedule": {"peak": 1e-3}},
        "half": {"blend": {"arm": "none", "weight": 0.5}},
        "union": {"start": "scratch", "reads": "union", "seeds": [0]},
    }
    work = worked(base, base=PRETRAINED, arms=arms, seeds=[0, 1, 2])
    kinds = [step.kind for step in work.steps.values()]
    # The base, six arms of three seeds and one of one; `then` goes on from `none`, `half` trains nothing.
    assert kinds.count("train") == 1 + 7 * 3 + 1
    assert kinds.count("write") == 1 and kinds.count("measure") == 1 and kinds.count("blend") == 3
    order = list(work.steps)
    assert all(order.index(need) < order.index(key) for key, step in work.steps.items() for need in step.depends_on)
    chains = work.arm_chains("then")
    assert [chain.steps[0] for chain in chains] == [chain.last_step for chain in work.arm_chains("none")]
    # As many tokens as the arm needs that replays most.
    (text,) = [step for step in work.steps.values() if step.kind == "write"]
    assert text.spec["tokens"] == 500


def test_a_broken_fingerprint_would_share_nothing(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant of sharing: a fingerprint that is never the same twice makes the base and the text anew for each."""
    numbers = iter(range(1000))
    arms = {"none": {}, "then": {"start": "none", "tokens": 3000}, "half": {"blend": {"arm": "none", "weight": 0.5}}}
    whole = worked(base, base=PRETRAINED, arms=arms, seeds=[0, 1])
    assert len(whole.training_steps) == 1 + 2 + 2 and whole.unshared_run_count == 6 + 2 + 4 + 2
    arms |= {f"self {share}": {"replay": share, "replay_from": "generated"} for share in ("5%", "10%")}
    assert sum(s.kind == "write" for s in worked(base, arms=arms).steps.values()) == 1
    monkeypatch.setattr(study_arms, "fingerprint", lambda value: f"{next(numbers):064x}"[::-1])
    assert sum(s.kind == "write" for s in worked(base, arms=arms).steps.values()) == 2


def test_a_step_is_known_by_what_decides_it(base: Path) -> None:
    def last(**changes: Any) -> dict[str, str]:
        work = worked(base, **changes)
        return {chain.arm: chain.last_step for chain in work.chains}

    one = last()
    arms = raw(base)["arms"]
    assert last(name="other", output="elsewhere") == one
    assert (
        last(arms={"renamed": arms["none"], **{k: v for k, v in arms.items() if k == "replay"}})["renamed"]
        == one["none"]
    )
    assert last(stage={**raw(base)["stage"], "tokens": "2k"}) == one
    assert last(stage={**raw(base)["stage"], "save": {"every": "50%"}}) == one
    assert last(stage={**raw(base)["stage"], "tokens": 2001})["none"] != one["none"]
    assert last(seeds=[1])["none"] != one["none"]
    changed_text = build_step_graph(parse_study(raw(base), "s"), lambda text: [text.get("path"), "changed"], "s")
    assert {chain.last_step for chain in changed_text.chains}.isdisjoint(one.values())


def test_parts_are_learnt_one_after_the_other(base: Path) -> None:
    new = [{"name": n, "path": str(base / "new.jsonl")} for n in ("one", "two", "three")]
    arms = {
        "cosine": {"replay": "5%"},
        "infinite": {
            "stages": [
                {
                    "schedule": {
                        "kind": "infinite",
                        "peak": 1e-2,
                        "constant": 5e-3,
                        "floor": 1e-3,
                        "constant_until": "100%",
                    }
                },
                {"schedule": {"kind": "constant", "peak": 5e-3}},
                {"schedule": {"kind": "wsd", "peak": 5e-3, "floor": 1e-3, "decay": "40%", "warmup": "0%"}},
            ]
        },
    }
    work = worked(base, new=new, base=PRETRAINED, arms=arms, baseline="infinite")
    for name in arms:
        (chain,) = work.arm_chains(name)
        assert len(chain.steps) == 3
        stages = [work.steps[key].spec for key in chain.steps]
        assert [stage["model"] for stage in stages] == [f"@{key}" for key in (work.base_step, *chain.steps[:2])]
    kinds = [work.steps[key].spec["schedule"]["kind"] for key in work.arm_chains("infinite")[0].steps]
    assert kinds == ["infinite", "constant", "wsd"]
    # After the first part it is everything seen so far that is replayed.
    replayed = [work.steps[key].spec["data"]["sources"][1] for key in work.arm_chains("cosine")[0].steps]
    assert replayed[0]["path"].endswith("old.jsonl") and [r.get("seen_so_far") for r in replayed[1:]] == [True, True]


def test_what_a_later_part_replays_of_a_given_base(base: Path) -> None:
    new = [{"name": n, "path": str(base / "new.jsonl")} for n in ("one", "two")]

    def replayed(**old: Any) -> dict[str, Any]:
        given = {"name": "old", "path": str(base / "old.jsonl"), **old}
        work = worked(base, new=new, old=given, arms={"replay": {"replay": "5%"}})
        return work.steps[work.arm_chains("replay")[0].last_step].spec["data"]["sources"][1]

    # Everything seen so far, token by token, needs to know how much old text that is.
    assert replayed(prior_tokens="10k") == {"name": "seen", "seen_so_far": True, "share": 0.05, "role": "replay"}
    assert replayed()["name"] == "old"


def test_an_arm_goes_on_from_a_blend(base: Path) -> None:
    arms = {"none": {}, "half": {"blend": {"arm": "none", "weight": 0.5}}, "then": {"start": "half", "tokens": 3000}}
    work = worked(base, arms=arms)
    (half,), (then,) = work.arm_chains("half"), work.arm_chains("then")
    assert (
        work.steps[then.last_step].spec["model"] == f"@{half.last_step}/model"
    )  # the folder that a blend leaves is no run
    assert work.steps[then.last_step].depends_on == (half.last_step,)


@pytest.mark.parametrize(
    ("path", "place"),
    [("old", "old"), ("new", "new"), ("retained", "retained"), ("learned", "learned")],
)
def test_a_text_that_is_not_there_is_told_by_its_key(base: Path, tmp_path: Path, path: str, place: str) -> None:
    study = changed(raw(base), path, {"name": "x", "path": "@nowhere.jsonl"})  # also where it begins as a step's would
    with pytest.raises(DataError, match=rf"study.yaml: {place}: no file matches @nowhere.jsonl"):
        prepare_study(written(tmp_path, study), tmp_path / "cache")


def test_a_union_is_mixed_by_the_budgets_and_trained_as_the_base_was(base: Path) -> None:
    pretrain = {"pretrain": {**PRETRAINED["pretrain"], "schedule": {"kind": "cosine", "peak": 3e-3, "floor": 3e-4}}}
    work = worked(base, base=pretrain, arms={"none": {}, "union": {"start": "scratch", "reads": "union"}})
    (chain,) = work.arm_chains("union")
    stage = work.steps[chain.last_step].spec
    assert stage["tokens"] == 5000 and [s["share"] for s in stage["data"]["sources"]] == [0.6, 0.4]
    assert stage["schedule"]["peak"] == 3e-3 and stage["model"]["config"] == f"@{work.base_step}/model"


# -- carried out -------------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_runs(done: PreparedStudy) -> None:
    found = compute_results(done, {})
    arms = {arm["name"]: arm for arm in found["arms"]}
    for name in ("none", "replay"):
        records = [
            read_record(done.folder.step_path(done.graph.steps[c.last_step])) for c in done.graph.arm_chains(name)
        ]
        for set_, on in (("old-held", "old"), ("new-held", "new")):
            losses = [r.scores.after[set_].nats for r in records]
            changes = [r.changes[set_].difference for r in records]
            assert arms[name]["loss"][on]["value"] == pytest.approx(np.mean(losses), rel=1e-9)
            assert arms[name]["change"][on]["value"] == pytest.approx(np.mean(changes), abs=1e-9)
            assert list(arms[name]["by_seed"].values())[1][on] == pytest.approx(losses[1], rel=1e-9)
        assert arms[name]["tokens"] == np.mean([r.totals.tokens for r in records])
    # The reference of everything is the base, as the runs began with it.
    record = read_record(done.folder.step_path(done.graph.steps[done.graph.arm_chains("none")[0].last_step]))
    for set_ in ("old-held", "new-held"):
        assert found["base"]["loss"][set_]["value"] == pytest.approx(record.scores.before[set_].nats, rel=1e-9)
    # The base reads all of the old text: nothing of it is held out but the files that are named.
    pretrained = read_record(done.folder.step_path(done.graph.steps[done.graph.base_step or ""]))
    assert set(pretrained.changes) == {"old-held"} and not pretrained.token_ledger["old"].held_out
    base, none, replay, union = (
        {"loss": found["base"]["loss"]},
        *(arms[name] for name in ("none", "replay", "union")),
    )
    lost = none["loss"]["old"]["value"] - base["loss"]["old"]["value"]
    if replay["removed"]:
        kept = replay["loss"]["old"]["value"] - base["loss"]["old"]["value"]
        assert replay["removed"]["value"] == pytest.approx(1 - kept / lost)
    average = np.mean([replay["loss"][on]["value"] for on in ("old", "new")])
    whole = np.mean([union["loss"][on]["value"] for on in ("old", "new")])
    assert replay["loss"]["average"]["value"] == pytest.approx(average)
    assert replay["gap"]["average"]["value"] == pytest.approx(average - whole)
    assert found["time"]["runs"] == 6 and found["time"]["runs_requested"] == 5 + 2 + 7


def test_the_interval_of_one_seed_is_the_record_s(base: Path, tmp_path: Path, cache: Path) -> None:
    file = written(tmp_path, raw(base, arms={"none": {}}))
    prepared = prepare_study(file, cache)
    carried_out(prepared)
    (arm,) = compute_results(prepared, {})["arms"]
    record = read_record(prepared.folder.step_path(prepared.graph.steps[prepared.graph.chains[0].last_step]))
    change = record.changes["old-held"]
    assert [arm["change"]["old"][k] for k in ("value", "low", "high")] == pytest.approx(
        [change.difference, change.low, change.high], abs=1e-9
    )
    # The mutant: with other documents drawn for each model it would be another interval.
    scores = prepared.folder.step_path(prepared.graph.steps[prepared.graph.chains[0].last_step]) / "scores"
    before, after = (before_after.read_scores(scores / f"{n}.npz")["old-held"].per_unit() for n in ("before", "after"))
    unpaired = np.quantile(resample_ratio(*after, seed=1) - resample_ratio(*before, seed=0), [0.025, 0.975])
    assert [change.low, change.high] != pytest.approx(unpaired.tolist(), abs=1e-4)


def test_the_base_s_losses_are_the_base_s(done: PreparedStudy) -> None:
    """Also where the first arm is a blend of one that began with random weights, whose run begins with other losses."""
    study = yaml.safe_load(done.file.read_text())
    mixed = {"blend": {"arm": "union", "weight": 0.5}}
    arms = {"mixed": mixed, "on": {"start": "union", "seeds": [0]}, **study["arms"]}
    file = written(done.file.parent / "mixed", {**study, "arms": arms, "runs": str(done.folder.path)})
    prepared = prepare_study(file, done.folder.cache)
    for key in prepared.remaining_steps:
        if prepared.graph.steps[key].kind == "blend":
            list(run_step(prepared.graph, prepared.graph.steps[key], prepared.folder, "x"))
    found, before = compute_results(prepared, {}), compute_results(done, {})
    assert found["base"]["loss"] == before["base"]["loss"]
    told = {arm["name"]: arm for arm in found["arms"]}
    assert [name for name, arm in told.items() if arm["from_scratch"]] == ["mixed", "on", "union"]
    # What goes back to random weights is no way to go on from the base, and has its tokens from elsewhere.
    assert "dominated_by" in told["none"] and not any("dominated_by" in told[name] for name in ("mixed", "union"))
    tokens = {name: arm.get("tokens_in_all") for name, arm in told.items()}
    assert tokens["union"] == told["union"]["tokens"]
    assert tokens["mixed"] == told["union"]["tokens"] + found["base"]["tokens"]
    assert tokens["none"] == told["none"]["tokens"] + found["base"]["tokens"]


def test_a_blend_lies_between(done: PreparedStudy) -> None:
    from postgrad.models.interpolate import copy_weights
    from postgrad.models.location import locate_model
    from postgrad.tuning.open_model import open_model

    (chain, _) = done.graph.arm_chains("half")
    places = [
        done.folder.step_path(done.graph.steps[key])
        for key in (done.graph.base_step or "", chain.steps[0], chain.last_step)
    ]
    places[-1] = places[-1] / "model"
    start, end, between = (copy_weights(open_model(locate_model(str(p), p.parent)).model) for p in places)
    assert all(np.allclose(between[n], 0.75 * start[n] + 0.25 * end[n], atol=1e-6) for n in start)
    assert not all(np.allclose(between[n], end[n], atol=1e-6) for n in start)


def test_finished_runs_are_taken_as_they_are(done: PreparedStudy) -> None:
    again = prepare_study(done.file, done.folder.cache)
    assert not again.remaining_steps
    events, _ = carried_out(again)
    assert begun(events, again) == [] and all(e.is_cached for e in events if isinstance(e, StepFinished))
    # An arm more makes its own runs alone.
    study = yaml.safe_load(done.file.read_text())
    study["arms"]["more"] = {"replay": "50%", "seeds": [0]}
    more = written(done.file.parent / "besides", {**study, "runs": str(done.folder.path), "output": "here"})
    wider = prepare_study(more, done.folder.cache)
    assert [wider.graph.steps[key].slug for key in wider.remaining_steps] == ["more-s0"]


@pytest.mark.parametrize("name", ["times.json", "machine.json", "notes/{key}.json"])
@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_file_of_its_own_is_told(done: PreparedStudy, tmp_path: Path, name: str, text: str) -> None:
    home = tmp_path / "home"
    shutil.copytree(done.folder.path, home, ignore=shutil.ignore_patterns("runs"))
    broken = home / name.format(key=done.graph.base_step)
    broken.write_text(text)
    study = yaml.safe_load(done.file.read_text())
    file = written(tmp_path, {**study, "output": str(home)})
    with pytest.raises(StageError, match="remove this file") as error:
        prepared = prepare_study(file, done.folder.cache)
        prepared.folder.machine, total_step_seconds(prepared), load_times(prepared.folder)
    assert str(broken) in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_the_cached_hashes_of_texts_are_made_again(done: PreparedStudy, tmp_path: Path, text: str) -> None:
    home = tmp_path / "home"
    shutil.copytree(done.folder.path, home, ignore=shutil.ignore_patterns("runs"))
    (home / "texts.json").write_text(text)
    study = yaml.safe_load(done.file.read_text())
    prepared = prepare_study(written(tmp_path, {**study, "output": str(home)}), done.folder.cache)
    assert list(prepared.graph.steps) == list(done.graph.steps)


@pytest.mark.parametrize("harm", [Path.unlink, lambda place: place.write_bytes(b"PK")])
def test_scores_that_are_gone_are_told_with_the_way_out(done: PreparedStudy, harm: Any) -> None:
    place = done.folder.step_path(done.graph.steps[done.graph.arm_chains("replay")[0].last_step])
    scores = place / "scores" / "after.npz"
    whole = scores.read_bytes()
    harm(scores)
    try:
        with pytest.raises(DataError, match=f"remove the folder {re.escape(str(place))}"):
            compute_results(done, {})
    finally:
        scores.write_bytes(whole)


def test_what_is_left_behind_reads_back(done: PreparedStudy) -> None:
    found = write_outputs(done, {})
    home = done.folder.path
    kept = json.loads((home / "study.json").read_text())
    assert kept["arms"] == json.loads(json.dumps(found["arms"]))
    page = (home / "report.html").read_text()
    assert "<script" not in page and "http://" not in page and "https://" not in page
    lines = (home / "study.csv").read_text().splitlines()
    mean = next(line.split(",") for line in lines if line.startswith("replay,mean,old"))
    assert float(mean[3]) == next(a for a in found["arms"] if a["name"] == "replay")["loss"]["old"]["value"]
    assert found["claims"][1]["verdict"] == "does not hold"
    learnt = next(arm for arm in found["arms"] if arm["name"] == "none")["change"]["new"]
    assert [found["claims"][3][key] for key in ("value", "low", "high")] == [
        learnt[key] for key in ("value", "low", "high")
    ]
    assert any("Two seeds say little" in line for line in found["summary"])


def test_stopped_and_gone_on_with_it_ends_with_the_same_numbers(base: Path, tmp_path: Path, cache: Path) -> None:
    arms = {"none": {}, "replay": {"replay": "25%"}}
    straight = prepare_study(written(tmp_path / "straight", raw(base, arms=arms)), cache)
    carried_out(straight)
    broken = prepare_study(written(tmp_path / "broken", raw(base, arms=arms)), cache)
    # By turns asked to stop, which saves, and dropped where it stands, which loses what is behind the last checkpoint.
    ways = [True, False, True, False]
    while broken.remaining_steps:
        asked = ways.pop() if ways else None
        events = run_study(broken, command="x")
        for event in events:
            if isinstance(event, StepProgress) and event.activity == "training" and event.done == 4 + len(ways) % 2:
                if asked is False:
                    break
                if asked:
                    asked = None
                    os.kill(os.getpid(), signal.SIGINT)
        events.close()  # type: ignore[attr-defined]
        part = compute_results(broken, {})
        if broken.remaining_steps:  # what is not complete is in no sentence
            assert {a["status"] for a in part["arms"]} - {"finished"} and part["summary"][0].startswith("Not finished")
    assert not ways
    one, two = (compute_results(p, {}) for p in (straight, broken))
    for a, b in zip(one["arms"], two["arms"], strict=True):
        assert a["loss"] == b["loss"] and a["change"] == b["change"]


def test_an_arm_that_fails_leaves_the_others(base: Path, tmp_path: Path, cache: Path) -> None:
    arms = {
        "none": {},
        "wild": {"schedule": {"peak": 1e38, "floor": 1e37}, "optimizer": {"max_grad_norm": 1e38}},
        "half-wild": {"blend": {"arm": "wild", "weight": 0.5}},
        "replay": {"replay": "25%"},
    }
    prepared = prepare_study(written(tmp_path, raw(base, arms=arms)), cache)
    events, ended = carried_out(prepared)
    failed = [prepared.graph.steps[e.key].slug for e in events if isinstance(e, StepFailed)]
    assert failed == ["wild-s0"] and len(ended.failures) == 2
    found = write_outputs(prepared, ended.failures)
    assert {a["name"]: a["status"] for a in found["arms"]} == {
        "none": "finished",
        "wild": "failed",
        "half-wild": "failed",
        "replay": "finished",
    }
    assert found["summary"][0].startswith("Not finished and not in any sentence below: wild, half-wild")


def test_two_processes_make_the_same(base: Path, tmp_path: Path, cache: Path) -> None:
    arms = {"none": {}, "replay": {"replay": "25%"}}
    one = prepare_study(written(tmp_path / "one", raw(base, arms=arms)), cache)
    carried_out(one)
    two = prepare_study(written(tmp_path / "two", raw(base, arms=arms)), cache)
    events, ended = carried_out(two, workers=2)
    assert not ended.failures and {e.device for e in events if isinstance(e, StepStarted)} == {"0", "1"}
    assert [a["loss"] for a in compute_results(one, {})["arms"]] == [
        a["loss"] for a in compute_results(two, {})["arms"]
    ]


# -- beforehand --------------------------------------------------------------------------------------------------------


def test_an_arm_that_cannot_finish_is_told_before_anything_is_trained(base: Path, tmp_path: Path, cache: Path) -> None:
    study = raw(base, base=PRETRAINED, arms={"none": {}, "long": {"tokens": 900_000}, "longer": {"tokens": 990_000}})
    prepared = prepare_study(written(tmp_path, study), cache)
    with pytest.raises(StageError) as error:
        forecast_study(prepared)
    assert "2 arms cannot run" in str(error.value) and "max_passes is 20" in str(error.value)
    assert not (prepared.folder.path / "runs").exists()
    # What is wrong with the base is not told of the arms that need it.
    for pretrain, said in (
        ({"tokens": 900_000}, "max_passes is 20"),
        ({"model": {"from_scratch": "llama-60x"}}, "llama-60x"),
    ):
        broken = {"pretrain": {**PRETRAINED["pretrain"], **pretrain}}
        with pytest.raises(StageError) as error:
            forecast_study(prepare_study(written(tmp_path / "base", raw(base, base=broken)), cache))
        assert "the base cannot run" in str(error.value) and said in str(error.value)
        assert "  the base: " in str(error.value) and "none" not in str(error.value)
    ok = prepare_study(written(tmp_path, raw(base, base=PRETRAINED, arms={"none": {}})), cache)
    outlook = forecast_study(ok)
    record = forecast_record(ok, outlook)
    assert record["runs"] == 2 and record["tokens"] == 5000 and record["seconds"] > 0


def test_what_is_made_besides_takes_its_time_too(base: Path, tmp_path: Path, cache: Path, monkeypatch: Any) -> None:
    """At 0.01 s for a trained token: text is written at 60 times that, importance measured at 3 times."""
    monkeypatch.setattr(study_plan, "_time_run", lambda *_: RunTiming(0.01, 0.0, 0.5))
    arms = {
        "none": {},
        "self": {"replay": "25%", "replay_from": "generated"},
        "ewc": {"penalties": [{"kind": "anchor", "strength": 1.0, "importance": "measured"}]},
        "half": {"blend": {"arm": "none", "weight": 0.5}},
    }
    prepared = prepare_study(written(tmp_path, raw(base, arms=arms, importance={"tokens": 700})), cache)
    outlook = forecast_study(prepared)
    (tokens,) = [step.spec["tokens"] for step in prepared.graph.steps.values() if step.kind == "write"]
    assert tokens == 500  # a quarter of 2000
    # A run: 2000 tokens within a row, half a second of planning, and one around it.
    wanted = {"train": 21.5, "write": 300.0, "measure": 21.0, "blend": 1.0}
    found = [(prepared.graph.steps[key].kind, seconds) for key, seconds in outlook.seconds.items()]
    assert {kind for kind, _ in found} == wanted.keys()
    assert all(seconds == pytest.approx(wanted[kind], abs=0.2 * (kind == "train")) for kind, seconds in found)


def test_held_out_text_that_is_trained_on_is_told(base: Path, tmp_path: Path, cache: Path) -> None:
    texts = new_text(40, 3)
    held = write_jsonl(tmp_path / "held.jsonl", [text + "\nz;" for text in texts if text.count("\n") > 5])
    trained = write_jsonl(tmp_path / "trained.jsonl", texts)
    study = raw(base, new={"path": str(trained), "max_passes": 50}, learned=str(held), arms={"none": {}})
    study["stage"]["data"]["overlap"] = "report"
    outlook = forecast_study(prepare_study(written(tmp_path, study), cache))
    assert any("share at least half of their 13-grams" in note for note in outlook.notes)


# -- what follows from numbers -----------------------------------------------------------------------------------------


def estimate(value: float, spread: float, seed: int = 0) -> BootstrapEstimate:
    return BootstrapEstimate(value, value + spread * np.random.default_rng(seed).standard_normal(2000))


def test_the_share_removed_is_that_of_the_paper() -> None:
    # Ibrahim et al. 2024, weak shift, 405M: 2.17 before, 2.44 without replay, 2.26 with 1 %, 2.23 with 5 %.
    base, none = estimate(2.17, 0.0), estimate(2.44, 0.0)
    assert round(removed_share(estimate(2.26, 0.0), none, base).value, 2) == 0.67  # type: ignore[union-attr]
    assert round(removed_share(estimate(2.23, 0.0), none, base).value, 2) == 0.78  # type: ignore[union-attr]
    assert (
        removed_share(estimate(2.23, 0.0), estimate(2.18, 0.05), base) is None
    )  # no forgetting is shown, so no share of it


@pytest.mark.parametrize(
    ("low", "high", "seeds", "said"),
    [
        (-0.2, -0.1, [-0.15, -0.1], "holds"),
        (-0.2, -0.1, [-0.15, 0.1], "not shown"),
        (0.1, 0.2, [0.15], "does not hold"),
        (0.1, 0.2, [0.15, -0.1], "not shown"),
        (-0.1, 0.1, [0.0], "not shown"),
    ],
)
def test_a_claim_holds_by_its_interval_and_by_every_seed(
    low: float, high: float, seeds: list[float], said: str
) -> None:
    entry = {"value": (low + high) / 2, "low": low, "high": high, "by_seed": seeds}
    assert claim_verdict(entry, 0.0) == said
    turned = {"value": -entry["value"], "low": -high, "high": -low, "by_seed": [-s for s in seeds]}  # type: ignore[operator]
    assert claim_verdict(turned, 0.0, at_least=True) == said


def test_what_is_seen_while_it_goes_on(done: PreparedStudy) -> None:
    work = done.graph
    (first, second), (union,) = work.arm_chains("none"), work.arm_chains("union")
    standing = StudyProgress(work, {first.last_step: 10.0, second.last_step: 10.0, union.last_step: 40.0})
    standing.update(StepFinished(work.base_step or "", 0.0, is_cached=True))
    assert standing.fraction_done("none") == 0 and standing.state("none") == "waiting" and standing.seconds_left() == 60
    standing.update(StepStarted(first.last_step, ""))
    sets = {
        "old-held": SetRow(role="retained", nats=3.25, change=0.25, low=0.2, high=0.3),
        "new-held": SetRow(role="learned", nats=2.0, change=-1.0, low=-1.1, high=-0.9),
    }
    row = EvaluationRow(step=5, trained_tokens=1000, sets=sets)
    standing.update(StepProgress(first.last_step, "training", 5, 10, row))
    assert (
        standing.fraction_done("none") == 0.25
        and standing.state("none") == "training"
        and standing.seconds_left() == 55
    )
    assert standing.mean_change("none", "retained") == 0.25 and standing.mean_change("union", "retained") is None
    # What a run really took corrects what is expected of the others.
    standing.start_times[first.last_step] -= 20.0
    standing.update(StepFinished(first.last_step, 20.0))
    assert standing.fraction_done("none") == 0.5 and standing.state("none") == "1 done"
    assert standing.seconds_left() == pytest.approx(100, rel=0.01)
    standing.update(StepFailed(union.last_step, "no"))
    assert standing.state("union") == "failed"
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(progress_table(standing))
    line = next(line for line in console.export_text().splitlines() if " none " in line)
    assert "50%" in line and "1 done" in line and "+0.250" in line


def told(*arms: dict[str, Any], pairs: list[dict[str, Any]] = [], **besides: Any) -> list[str]:  # noqa: B006
    """The summary of arms, each on the frontier with two seeds unless it says something else."""
    whole = [{"status": "finished", "seeds_there": [0, 1], "dominated_by": [], **arm} for arm in arms]
    raw = {"arms": whole, "against": "none", "union": "union", "pairs": pairs, **besides}
    return study_summary(StudyResults.model_validate(raw))


def between(low: float, high: float, **besides: Any) -> dict[str, Any]:
    return {"value": (low + high) / 2, "low": low, "high": high, **besides}


def changes(old: dict[str, Any], new: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"old": old, "new": new or between(-1.1, -0.9)}


@pytest.mark.parametrize(
    ("old", "said"),
    [
        (between(0.1, 0.2), "(none) the model forgets:"),
        (between(-0.1, 0.2), "(none) the model is not shown to forget:"),
        (between(-0.2, -0.1), "(none) the model does not forget:"),
    ],
)
def test_what_is_said_of_forgetting(old: dict[str, Any], said: str) -> None:
    assert said in told({"name": "none", "change": changes(old)})[0]


def test_what_is_said_of_protection() -> None:
    none = {"name": "none", "change": changes(between(0.5, 0.6))}
    most = {"name": "most", "change": changes(between(0.1, 0.2)), "removed": between(0.7, 0.8)}
    near = {"name": "near", "change": changes(between(0.1, 0.3)), "removed": between(0.6, 0.8)}
    anew = {"name": "anew", "change": changes(between(0.0, 0.1)), "removed": between(0.9, 1.0), "from_scratch": True}
    costs = {
        "arm": "most",
        "than": "none",
        "old": between(-0.5, -0.4),
        "new": between(0.01, 0.03, by_seed=[0.01, 0.02]),
    }
    apart = {"arm": "near", "than": "most", "old": between(0.01, 0.1, by_seed=[0.1, 0.01]), "new": between(0.0, 0.1)}
    lines = told(none, near, most, anew, pairs=[costs, apart])
    assert "most removed the largest share of it: 75 % (70 % to 80 %), at +0.020 (+0.010 to +0.030) nats" in lines[1]
    assert "not shown" not in lines[1] and not any("removed less" in line for line in lines)
    # The difference is shown neither where the seeds disagree nor where the interval holds zero.
    apart["old"]["by_seed"] = [0.1, -0.01]
    costs["new"] = between(-0.01, 0.03, by_seed=[0.01, 0.02])
    lines = told(none, near, most, anew, pairs=[costs, apart])
    assert lines[1].endswith("which is not shown to differ from zero.")
    assert lines[2] == "Not shown to have removed less than that: near."
    # Nor is a share of forgetting removed that may be none.
    poor = {"name": "poor", "change": changes(between(0.4, 0.6)), "removed": between(-0.1, 0.2)}
    assert told(none, poor)[1] == "No other arm is shown to have removed any of it."


def test_what_is_said_of_all_text_at_once() -> None:
    gaps = {"none": between(0.2, 0.3), "best": between(0.1, 0.2), "anew": between(-0.5, -0.4)}
    arms = [
        {"name": name, "change": changes(between(0.1, 0.2)), "gap": {"average": gap}, "tokens": 2000.0}
        for name, gap in gaps.items()
    ]
    arms[-1]["from_scratch"] = True  # it stands on no base, and so is none of those that are compared
    union = {"name": "union", "change": changes(between(0.0, 0.1)), "tokens": 5000.0, "from_scratch": True}
    (line,) = [line for line in told(*arms, union) if line.startswith("Against all text")]
    assert (
        "(union, 5k tokens from scratch) the best on average is best, 2k tokens on top" in line and "shown" not in line
    )
    arms[1]["gap"]["average"] = between(-0.1, 0.2)
    assert "not shown to differ from zero" in next(line for line in told(*arms, union) if "Against all" in line)


def test_what_few_seeds_do_not_tell() -> None:
    arms = [{"name": name, "change": changes(between(0.1, 0.2))} for name in ("none", "other")]

    def lines(*seeds: list[int]) -> list[str]:
        whole = told(*({**arm, "seeds_there": own} for arm, own in zip(arms, seeds, strict=True)), seeds=[0, 1, 2])
        return [line for line in whole if "seed" in line and "disagree" not in line]

    assert "each arm was run once" in lines([0], [0])[0]
    assert lines([0, 1, 2], [0, 1, 2]) == []
    assert lines([0, 1, 2], [0])[0].endswith("that were run once: other.")
    assert lines([0, 1], [0, 1, 2]) == ["Two seeds say little about the spread over seeds."]


def losses(old: Sequence[float], new: float, spread: float = 0.0) -> Losses:
    """A model's losses on old sets and a new one, the same draws wherever the spread is the same."""
    sets = {f"old-{i}": estimate(value, spread, seed=i) for i, value in enumerate(old)}
    roles = {**dict.fromkeys(sets, "retained"), "new": "learned"}
    return Losses({**sets, "new": estimate(new, spread, seed=9)}, roles)


def measured_as(name: str, by_seed: dict[int, Losses]) -> Measured:
    drawn_ = list(by_seed.values())
    sets = {key: mean_estimate([item.sets[key] for item in drawn_]) for key in drawn_[0].sets}
    return Measured(name, Arm(), [], Losses(sets, drawn_[0].roles), by_seed)


def test_the_average_weighs_old_and_new_alike() -> None:
    """Not the mean over all sets, which would weigh the side with more of them higher."""
    given = losses([1.0, 2.0], 3.5)
    assert [given.get_loss(what).value for what in ("old", "new", "average")] == [1.5, 3.5, 2.5]


def test_pairs_are_the_second_less_the_first_seed_by_seed() -> None:
    arms = {
        "one": measured_as("one", {0: losses([2.0], 3.0, 0.1), 1: losses([2.2], 3.0, 0.1)}),
        "two": measured_as("two", {1: losses([2.5], 2.0, 0.1), 0: losses([2.1], 2.5, 0.1)}),
    }
    (pair,) = found_in._pairwise_differences(arms)
    assert (pair["arm"], pair["than"]) == ("two", "one")
    assert pair["old"]["by_seed"] == pytest.approx([0.1, 0.3]) and pair["new"]["by_seed"] == pytest.approx([-0.5, -1.0])
    # The same draws of documents on both sides leave nothing of the spread over documents.
    assert [pair["old"][key] for key in ("value", "low", "high")] == pytest.approx([0.2] * 3)


def test_seeds_are_told_by_the_deviation_of_one() -> None:
    assert found_in._seed_spread([1.0, 3.0])["deviation"] == pytest.approx(2**0.5)
    assert found_in._seed_spread([1.0]) == {"low": 1.0, "high": 1.0, "deviation": None, "seeds": 1}


def test_an_arm_is_dominated_by_one_that_is_no_worse_on_both() -> None:
    points = {"a": (0.1, -1.0), "b": (0.2, -0.9), "c": (0.3, -2.0), "d": (0.1, -1.0), "anew": (0.0, -3.0)}
    arms: list[dict[str, Any]] = [
        {"name": name, "change": {"old": {"value": old}, "new": {"value": new}}, "from_scratch": name == "anew"}
        for name, (old, new) in points.items()
    ]
    found_in._mark_dominated(arms)
    assert [arm.get("dominated_by") for arm in arms] == [[], ["a", "d"], [], [], None]


def test_a_share_removed_is_claimed_with_every_seed(base: Path) -> None:
    claims = [{"statement": "x", "arm": "replay", "min_removed": "50%"}]
    study = parse_study(raw(base, claims=claims), "s")
    start = losses([2.0], 3.0)
    arms = {
        "none": measured_as("none", {0: losses([3.0], 1.0), 1: losses([3.0], 1.0)}),
        "replay": measured_as("replay", {0: losses([2.2], 1.0), 1: losses([2.4], 1.0)}),
    }
    found = found_in._evaluate_claim(study.claims[0], study, arms, start)
    assert found["by_seed"] == pytest.approx([0.8, 0.6]) and found["value"] == pytest.approx(0.7)
    assert found["verdict"] == "holds"
    arms["replay"] = measured_as("replay", {0: losses([2.05], 1.0), 1: losses([2.6], 1.0)})
    assert found_in._evaluate_claim(study.claims[0], study, arms, start)["verdict"] == "not shown"
    arms["none"] = measured_as("none", {0: losses([1.9], 1.0)})
    assert "none is not shown to forget" in found_in._evaluate_claim(study.claims[0], study, arms, start)["why"]


def test_what_is_told_by_the_share_of_replay_differs_in_nothing_else(base: Path) -> None:
    shares = [0.0, 0.05, 0.1, 0.25, 0.5]
    said: dict[str, Any] = {f"r{share}": {"replay": share} for share in shares[1:]}
    said |= {"none": {}, "slow": {"replay": "5%", "schedule": {"peak": 1e-3}}}
    study = parse_study(raw(base, arms=said), "s")
    arms = [
        {"name": name, "replay": arm.replay, "change": {"old": {"value": 0.5 / (1 + 20 * arm.replay)}},
         "loss": {"old": {"value": 3.0 + 0.5 / (1 + 20 * arm.replay)}, "new": {"value": 2.0 + 0.1 * arm.replay}}}
        for name, arm in study.arms.items()
    ]  # fmt: skip
    found = found_in._replay_results(study, arms)
    assert [point["share"] for point in found["points"]] == shares and "slow" not in str(found["points"])
    for what, known in (("old", lambda x: 0.5 / (1 + 20 * x)), ("new", lambda x: 2.0 + 0.1 * x)):
        line = found["laws"][what]["line"]
        assert [point[0] for point in line] == sorted(point[0] for point in line) and line[-1][0] == 0.5
        assert [point[1] for point in line] == pytest.approx([known(point[0]) for point in line], abs=0.02)


def test_the_rows_say_which_way_is_good() -> None:
    up, down = between(0.1, 0.2), between(-0.2, -0.1)
    arm = {"name": "a", "status": "finished", "loss": {"old": up, "new": up}, "change": {"old": up, "new": down},
           "removed": between(0.4, 0.6)}  # fmt: skip
    claims = [{"say": "c", "on": "removed", "bound": 0.3}]
    found = StudyResults.model_validate({"name": "x", "arms": [arm], "seeds": [0], "claims": claims})
    row = study_arms_table(found).rows[1]
    assert [row[2].tone, row[5].tone] == ["bad", "good"]
    claims = claims_table(found)
    assert claims is not None and "≥ 30 %" in claims.text()
    old, new = (line.split(",") for line in study_csv(found).splitlines()[-2:])
    assert [float(x) for x in old[9:12]] == [0.5, 0.4, 0.6] and new[9:12] == ["", "", ""]


def test_what_needs_what_failed_is_left_out_to_the_end(base: Path) -> None:
    arms = {"none": {}, "then": {"start": "none", "tokens": 3000}, "last": {"start": "then", "tokens": 4000}}
    work = worked(base, base={**PRETRAINED, "seed": 3}, arms=arms)
    assert work.base_step is not None and work.steps[work.base_step].spec["seed"] == 3
    state = _StepQueue(work)
    state.mark_failed(work.arm_chains("none")[0].last_step, "it broke")
    assert len(state.failures) == 3 and "needs then-s0" in state.failures[work.arm_chains("last")[0].last_step]


def test_a_stage_s_own_arithmetic_is_kept(base: Path, tmp_path: Path) -> None:
    prepared = prepare_study(written(tmp_path, raw(base)), tmp_path / "cache")
    prepared.folder.runs_folder.mkdir(parents=True)
    (prepared.folder.runs_folder / "machine.json").write_text(
        json.dumps({"compute": {"threads": 2, "dtype": "bfloat16"}})
    )
    step = prepared.graph.steps[prepared.graph.training_steps[0]]
    assert prepared.folder.resolve_stage(prepared.graph, step)["compute"]["threads"] == 1
    bare = replace(step, spec={key: value for key, value in step.spec.items() if key != "compute"})
    assert prepared.folder.resolve_stage(prepared.graph, bare)["compute"] == {"threads": 2, "dtype": "bfloat16"}


# -- what is written for users ----------------------------------------------------------------------------------------


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("template", "size", "shipped"),
    [("levers", "laptop", None), ("paper", "laptop", "examples/paper"), ("paper", "gpu", "benchmarks/paper_gpu")],
)
def test_templates_are_studies_and_those_that_are_shipped(
    template: str, size: str, shipped: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made: list[Path] = []
    monkeypatch.setattr(study_templates, "write_corpus", made.append)
    found = study_templates.write_study_template(Path("paper.yaml"), template, size, force=False)
    assert made == ([Path("paper-data")] if size == "laptop" else [])
    assert found["files"][0] == ("paper.yaml" if template == "levers" else "paper-strong.yaml")
    bases = set()
    for name in found["files"]:
        work = build_step_graph(load_study(Path(name)), lambda text: text.get("path"), name)
        bases.add(work.base_step)
        texts = {
            s["path"]
            for step in work.steps.values()
            for s in step.spec.get("data", {}).get("sources", [])
            if "path" in s
        }
        if size == "laptop":
            kinds = {
                f"paper-data/{kind}.jsonl"
                for kind in ("old", "comments", "code", "code-1", "code-2", "code-3", "listing")
            }
            assert {text for text in texts if not text.startswith("@")} <= kinds
        if shipped:
            assert (ROOT / shipped / name).read_text() == Path(name).read_text(), f"{name}: study init wrote another"
    # What the studies of the paper have in common is made once: all but the larger model go on from one base.
    assert len(bases) == (2 if template == "paper" else 1)
    with pytest.raises(StageError, match="exists already"):
        study_templates.write_study_template(Path("paper.yaml"), template, size, force=False)
    with pytest.raises(StageError, match="did you mean 'paper'"):
        study_templates.write_study_template(Path("x.yaml"), "papr", size, force=False)


def test_the_schema_knows_what_is_a_study() -> None:
    schema = json.loads(study_schema())
    assert (ROOT / "docs" / "study.schema.json").read_text() == study_schema() + "\n", (
        "run docs/make_stage_reference.py"
    )
    for file in sorted((ROOT / "examples" / "paper").glob("*.yaml")):
        jsonschema.validate(read_yaml(file.read_text()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**read_yaml(file.read_text()), "armz": {}}, schema)


def test_what_the_page_shows_is_a_study() -> None:
    text = (ROOT / "docs" / "study.md").read_text()
    blocks = [read_yaml(body) for body in re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)]
    whole = next(block for block in blocks if "arms" in block)
    claims = next(block for block in blocks if block.keys() == {"claims"})
    build_step_graph(parse_study({**whole, **claims}, "docs/study.md"), lambda text: text.get("path"), "docs/study.md")


def test_kinds_of_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = [
        p
        for p in builtin_corpus.standard_library_files()
        if p.name in ("argparse.py", "ast.py", "bisect.py", "calendar.py")
    ]
    monkeypatch.setattr(builtin_corpus, "standard_library_files", lambda: modules)
    builtin_corpus.write_corpus(tmp_path)
    texts = {
        p.stem: [json.loads(line)["text"] for line in p.read_text().split("\n")[:-1]] for p in tmp_path.glob("*.jsonl")
    }
    assert set(texts) == {
        *("old", "comments", "code", "listing", "code-1", "code-2", "code-3"),
        *("old-heldout", "comments-heldout", "code-heldout", "listing-heldout"),
    }
    assert sorted(texts["code-1"] + texts["code-2"] + texts["code-3"]) == sorted(texts["code"])
    assert any("RETURN" in text for text in texts["listing"]) and not any("0x" in text for text in texts["listing"])
    assert any("def " in text for text in texts["code"]) and not any("def " in text for text in texts["comments"])
    # Whole modules are held out of every kind.
    assert any("argparse" in text or "Namespace" in text for text in texts["code-heldout"])
    assert not any("class ArgumentParser" in text for text in texts["code"])


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [".", "..", "...", "sub/x"])
def test_a_new_study_has_a_plain_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (["study", "init", name, "--template", "paper", "--size", "gpu"], ["init", name, "--template", "mlm"]):
        refused = CliRunner().invoke(app, words)
        assert isinstance(refused.exception, StageError) and "cannot name a run folder" in str(refused.exception)
    assert not [*tmp_path.iterdir()]
    # Who says the file's whole name means the file.
    CliRunner().invoke(app, ["study", "init", "mine.yaml", "--template", "paper", "--size", "gpu"])
    assert (tmp_path / "mine-strong.yaml").exists()


def test_a_new_study_writes_over_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine-data").mkdir()
    (tmp_path / "mine-data" / "old.jsonl").write_text("the user's")
    with pytest.raises(StageError, match="mine-data exists already"):
        study_templates.write_study_template(Path("mine.yaml"), "levers", "laptop", force=False)
    assert [p.name for p in tmp_path.iterdir()] == ["mine-data"]
    assert (tmp_path / "mine-data" / "old.jsonl").read_text() == "the user's"


def test_several_files_are_read_before_the_first_is_carried_out(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTGRAD_CACHE", str(tmp_path / "cache"))
    file = written(tmp_path, raw(base))
    for name, study, said in (
        ("bad.yaml", raw(base, name="other", baseline="nobody"), "names an arm 'nobody'"),
        ("same.yaml", raw(base, seeds=[1]), "study.yaml has the same output folder"),
    ):
        (tmp_path / name).write_text(yaml.safe_dump(study))
        refused = CliRunner().invoke(app, ["study", str(file), str(tmp_path / name)])
        assert isinstance(refused.exception, StageError) and said in str(refused.exception)
        assert not (tmp_path / "studies").exists()
    refused = CliRunner().invoke(app, ["study", "seeds=[0]"])
    assert isinstance(refused.exception, StageError) and "no study is named" in str(refused.exception)


def test_two_files_do_not_share_a_folder(base: Path, tmp_path: Path, cache: Path) -> None:
    one = prepare_study(written(tmp_path, raw(base)), cache)
    next(iter(run_study(one, command="x")))
    other = tmp_path / "other.yaml"
    other.write_text(one.file.read_text())
    with pytest.raises(StageError, match=r"study\.yaml has the same output folder"):
        next(iter(run_study(prepare_study(other, cache), command="x")))
    one.file.unlink()  # then it has another name now, and goes on
    assert isinstance(next(iter(run_study(prepare_study(other, cache), command="x"))), StepStarted)


def test_the_command(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage_of: StageOf) -> None:
    file = written(tmp_path, raw(base, arms={"none": {}, "replay": {"replay": "25%"}}))
    monkeypatch.setenv("POSTGRAD_CACHE", str(tmp_path / "cache"))
    planned = CliRunner().invoke(app, ["study", str(file), "--dry-run"])
    assert planned.exit_code == 0, planned.output
    assert "2 runs of 4k tokens in all" in planned.stdout and "time: about" in planned.stdout
    # Where nobody watches there are few lines of how far planning is.
    assert planned.stderr.splitlines() == ["planning none-s0 (1 of 2 runs) ..."]
    assert not (tmp_path / "studies" / "tiny" / "runs").exists()
    ran = CliRunner().invoke(app, ["study", str(file)])
    assert ran.exit_code == 0, ran.output
    assert "Without protection (none)" in ran.stdout and "report.html" in ran.stdout.splitlines()[-1]
    # Anything can be said besides: a wider study takes the runs that are there.
    wider = CliRunner().invoke(app, ["study", str(file), "arms.more.replay=50%", "--dry-run", "--json"])
    assert json.loads(wider.stdout)["runs"] == 3 and json.loads(wider.stdout)["left"] == 1
    again = CliRunner().invoke(app, ["study", str(file), "--json"])
    assert [arm["status"] for arm in json.loads(again.stdout)["arms"]] == ["finished", "finished"]
    assert load_study(file).name == "tiny"


def test_a_gate_that_failed_is_told(base: Path, tmp_path: Path, cache: Path) -> None:
    stage = raw(base)["stage"] | {"max_forgetting": 1e-6}
    wild = {"schedule": {"peak": 1.0, "floor": 1.0}}  # breaks even the little that the base knows
    arms = {"none": wild, "calm": {}, "half": {"blend": {"arm": "none", "weight": 0.5}}}
    prepared = prepare_study(written(tmp_path, raw(base, stage=stage, arms=arms)), cache)
    _, ended = carried_out(prepared)
    assert not ended.failures
    found = write_outputs(prepared, ended.failures)
    assert {arm["name"]: arm["gate_failed"] for arm in found["arms"]} == {"none": [0], "calm": [], "half": []}
    assert [line for line in found["summary"] if "gate" in line] == ["The retention gate failed: none (seed 0)."]


def test_skipped_steps_of_an_arm_are_told(done: PreparedStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    """An arm that skipped steps has trained on fewer tokens than those that it is compared with."""
    assert "skipped" not in outputs_text(done, compute_results(done, {}), "x", stopped=False)
    hit = {found_in._read_step_record(done, c.last_step).id for c in done.graph.arm_chains("replay")}

    def read(prepared: PreparedStudy, key: str) -> Record:
        record = real(prepared, key)
        if record.id in hit:
            record.totals.skipped_steps = [SkippedStep(step=2, tokens=256)] * 2
        return record

    real = found_in._read_step_record
    monkeypatch.setattr(found_in, "_read_step_record", read)
    found = compute_results(done, {})
    assert {arm["name"]: arm["skipped_steps"] for arm in found["arms"]} == {
        "none": 0,
        "replay": 4,
        "union": 0,
        "half": 0,
    }
    text = outputs_text(done, found, "x", stopped=False)
    assert "Steps were skipped, since their loss was not finite: replay (4)." in text
    table = study_arms_table(StudyResults.model_validate(found))
    assert table.columns[-1].title == "skipped steps" and [row[-1].text for row in table.rows][2] == "4"
    rows = list(csv.DictReader(io.StringIO(study_csv(StudyResults.model_validate(found)))))
    assert {row["arm"]: row["skipped_steps"] for row in rows if row["seed"] == "mean"}["replay"] == "4"
    assert all(None not in row and None not in row.values() for row in rows)  # as many cells as columns


def test_names_with_commas_of_their_own_are_kept_apart() -> None:
    assert join_names(["none", "replay"]) == "none, replay"
    assert join_names(["infinite", "infinite, replay 5 %"]) == "infinite; infinite, replay 5 %"
    arm = {"status": "finished", "seeds_there": [0, 1, 2], "dominated_by": ["x"]}
    arm["change"] = {"old": between(0.1, 0.2), "new": between(0, 1)}
    arms = [{**arm, "name": name} for name in ("cosine", "cosine, replay 5 %")]
    said = " ".join(study_summary(StudyResults.model_validate({"name": "x", "arms": arms, "seeds": [0, 1, 2]})))
    assert "is significant: cosine; cosine, replay 5 %." in said
