"""Keys by their earlier names: an error in a file, and translated in what earlier versions recorded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from postgrad.config.renamed_keys import (
    STAGE_KEYS,
    STAGE_VALUES,
    STUDY_KEYS,
    STUDY_VALUES,
    NewName,
    refuse_earlier_stage_names,
    refuse_earlier_study_names,
    upgrade_source,
    upgrade_stage,
    upgrade_tuning_options,
)
from postgrad.config.stage import Stage
from postgrad.config.stage_file import load_stage, load_tasks, parse_recorded_stage, parse_stage
from postgrad.errors import StageError
from postgrad.studies.study import parse_study

EARLIER: dict[str, Any] = {
    "name": "earlier",
    "model": {"fresh": "llama-1M", "tokenizer": {"vocabulary": 400}},
    "tokens": 1000,
    "data": {
        "when_short": "repeat",
        "shifts": [{"at": "50%", "shares": {"new": 1.0}}],
        "sources": [
            {
                "name": "new",
                "path": "new.jsonl",
                "only": {"task": ["a"]},
                "words": {"0": "no"},
                "stands_for": 7,
                "select": [
                    {"kind": "dsir", "like": {"path": "x.txt", "documents": "lines"}, "keep": 0.5},
                    {"kind": "perplexity", "between": [0.2, 0.8], "tokens": 64},
                ],
            }
        ],
    },
    "batch": {"sequences": 8, "micro": 4},
    "schedule": {"kind": "then", "pieces": [{"shape": "constant", "start": 1e-3}]},
    "optimizer": {"decay_tables": True, "clip": 2.0, "update": {"kind": "momentum"}, "loss_adaptive": {"start": 0.3}},
    "objectives": [
        {"kind": "next-token"},
        {"kind": "distill", "cache": {"kind": "sampled", "draws": 9, "temper": 0.7}},
    ],
    "penalties": [{"kind": "anchor", "strength": 1, "only": ["*norm*"], "storage": "mapped"}],
    "tuning": {
        "kind": "instruction-prompt",
        "start": "text",
        "text": "one",
        "also": ["*norm*"],
        "demonstrations": {"by": "seed", "tokens": 64},
    },
    "evaluation": {
        "retained": [{"name": "old", "path": "old.jsonl", "like": "new"}],
        "during_tokens": 500,
        "realign_steps": 3,
        "tasks": [
            {
                "name": "quiz",
                "path": "quiz.jsonl",
                "shots": 1,
                "shown": {"path": "train.jsonl", "by": "seed"},
                "answered": "choose",
                "by": "byte",
                "most_tokens": 5,
                "during": True,
            }
        ],
    },
    "save": {"choose": {"set": "old", "by": "accuracy", "gain": 0.1, "enough": 0.9, "at_least": "20%", "patience": 3}},
}
FINGERPRINT = "89eef23b9bbdd4713068cbaf95eb487a24c54fe5e66eb4bec6fe640f11e2d582"
"""Of this stage, as the version before the renames had it."""


def cases(keys: Mapping[str, NewName]) -> Iterator[tuple[str, str | None, str]]:
    """Path, kind and new name of each renamed key."""
    for path, name in keys.items():
        for kind, new in {None: name}.items() if isinstance(name, str) else name.items():
            yield path, kind, new


def value_cases(values: Mapping[str, Mapping[str, str]]) -> list[tuple[str, str, str]]:
    return [(path, earlier, new) for path, names in values.items() for earlier, new in names.items()]


def nested(path: str, value: Any, kind: str | None = None) -> dict[str, Any]:
    """Plain data with one key at a path."""
    head, *rest = path.replace("*", "none").split(".")
    if rest:
        return {head: nested(".".join(rest), value, kind)}
    return {head: value} | ({"kind": kind} if kind else {})


@pytest.mark.parametrize(("path", "kind", "new"), list(cases(STAGE_KEYS)))
def test_an_earlier_key_of_a_stage_is_an_error_with_the_new_one(path: str, kind: str | None, new: str) -> None:
    with pytest.raises(StageError) as caught:
        refuse_earlier_stage_names(nested(path, "x", kind), "run.yaml")
    *_, (where, hint) = [(caught.value.where, caught.value.hint)]
    assert path.rpartition(".")[2] in caught.value.problem + hint and f"`{new}`" in caught.value.problem + hint
    assert where.startswith(f"run.yaml: {path.split('.')[0]}")


@pytest.mark.parametrize(("path", "kind", "new"), list(cases(STUDY_KEYS)))
def test_an_earlier_key_of_a_study_is_an_error_with_the_new_one(path: str, kind: str | None, new: str) -> None:
    with pytest.raises(StageError) as caught:
        refuse_earlier_study_names(nested(path, "x", kind), "study.yaml")
    assert f"`{new}`" in caught.value.problem + caught.value.hint


@pytest.mark.parametrize(("path", "earlier", "new"), value_cases(STAGE_VALUES))
def test_an_earlier_value_of_a_stage_is_an_error_with_the_new_one(path: str, earlier: str, new: str) -> None:
    with pytest.raises(StageError, match=f"`{new}`"):
        refuse_earlier_stage_names(nested(path, earlier), "run.yaml")


@pytest.mark.parametrize(("path", "earlier", "new"), value_cases(STUDY_VALUES))
def test_an_earlier_value_of_a_study_is_an_error_with_the_new_one(path: str, earlier: str, new: str) -> None:
    with pytest.raises(StageError, match=f"`{new}`"):
        refuse_earlier_study_names(nested(path, earlier), "study.yaml")


def test_all_earlier_names_of_a_file_are_in_one_error() -> None:
    with pytest.raises(StageError) as caught:
        parse_stage({**EARLIER, "data": {**EARLIER["data"], "shifts": []}}, "run.yaml")
    assert caught.value.where == "run.yaml: model.fresh"
    for part in (
        "write `from_scratch`",
        "evaluation.tasks[0].shown.by to `sampler`",
        "data.sources[0].select[0].like to",
    ):
        assert part in caught.value.hint


@pytest.mark.parametrize(("looks", "said"), [("3 looks", "3 evaluations"), ("1 look", "1 evaluation")])
def test_patience_in_looks_is_an_error(looks: str, said: str) -> None:
    raw = {**upgrade_stage(EARLIER), "save": {"choose": {"set": "old", "patience": looks}}}
    with pytest.raises(StageError, match=f"write `{said}`"):
        parse_stage(raw, "run.yaml")


def test_files_of_stages_tasks_and_studies_are_looked_at(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump(upgrade_stage(EARLIER)))
    with pytest.raises(StageError, match=r"batch\.micro.*\n.*`micro_batch_size`"):
        load_stage(file, ["batch.micro=4"])
    file.write_text("- {name: a, path: x, by: byte}")
    with pytest.raises(StageError, match="`normalization`"):
        load_tasks(file)
    with pytest.raises(StageError, match="`stages`"):
        parse_study({"arms": {"none": {"parts": []}}}, "study.yaml")


def test_a_recorded_stage_is_read_with_its_fingerprint() -> None:
    stage = parse_recorded_stage(EARLIER, "record")
    assert stage.fingerprint() == FINGERPRINT
    assert parse_recorded_stage(stage.model_dump(mode="json"), "record") == stage, "what is new stays as it is"
    choose = stage.save.choose
    assert choose and (choose.metric, choose.min_delta, choose.stop_at, choose.burn_in) == ("accuracy", 0.1, 0.9, "20%")
    assert stage.evaluation.tasks[0].scoring == "multiple-choice" and stage.schedule.kind == "piecewise"


def test_a_recorded_stage_without_renamed_keys_stays_equal() -> None:
    raw = {"name": "a", "data": {"sources": [{"name": "only", "columns": {"only": "by"}}]}, "tuning": {"kind": "full"}}
    assert upgrade_stage(raw) == raw


def test_parts_of_records_are_translated() -> None:
    assert upgrade_tuning_options({"kind": "adapter", "form": "houlsby", "leave_out": [1], "also": [], "scale": 4.0}) == {
        "kind": "adapter", "variant": "houlsby", "skip_layers": [1], "also_train": [], "scale": 4.0,
    }  # fmt: skip
    assert upgrade_tuning_options({"kind": "p-tuning", "start": "random"}) == {"kind": "p-tuning", "init": "random"}
    assert upgrade_source({"path": "x", "only": {}, "documents": "auto", "words": {"only": "x"}}) == {
        "path": "x", "filter": {}, "document_unit": "auto", "label_words": {"only": "x"},
    }  # fmt: skip


def test_every_new_key_is_one_of_a_stage() -> None:
    def keys(node: Any) -> Iterator[str]:
        for key, value in node.items():
            if key == "properties":
                yield from value
            if isinstance(value, dict):
                yield from keys(value)

    known = set(keys(Stage.model_json_schema()))
    assert {new for _, _, new in cases(STAGE_KEYS)} <= known
