"""Whatever a stage file says, planning it succeeds or ends in an error of ours: valid stages with values exchanged."""

from __future__ import annotations

import copy
import datetime
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from postgrad.config import stage_file
from postgrad.config.stage_file import load_stage, parse_stage
from postgrad.errors import PostgradError
from postgrad.plan.plan import make_plan
from postgrad.storage.read_yaml import read_yaml
from tests.test_foreign_text import is_harmless
from tests.tiny_stages import Workspace, make_workspace

ROOT = Path(__file__).parents[2]
HOSTILE: list[Any] = [
    *(None, True, -1, 0, 1, 7, 1e9, 10**30, -(10**30), 0.5, 1e-300, 1e300, float("nan"), float("inf"),),
    *("", " ", "x", "none", "auto", "\0", "..", "a/b", "~", "*", "[x", "{x", "{1000000000} {x}", "\x1b[31mred", "é" * 300),
    *("5%", "1e400%", "200%", "9" * 4000, "1e9", "3 steps", "0 tokens", [], {}, [[]], [None], {"kind": "x"}, {"kind": None}),
    *(datetime.date(2024, 1, 1), {"x": {"y": [1]}}, [1, "a", None], ["new"], {"new": 1}),
]  # fmt: skip


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("mutated"), tmp_path_factory.getbasetemp() / "cache")


def stages(shelf: Workspace) -> dict[str, dict[str, Any]]:
    """A valid stage of every strategy and of most keys."""
    labelled = {"name": "held", "path": shelf.file("labelled", held_out=True), "kind": "labelled"}
    return {
        "text": shelf.stage("text", max_forgetting="50%", data={"on_exhausted": "repeat", "max_document_tokens": 40}),
        "wsd": shelf.stage(
            "wsd",
            schedule={"kind": "wsd", "peak": 1e-3, "floor": 1e-4, "warmup": "1%", "decay": "20%"},
            tuning={"kind": "lora", "rank": 4, "targets": ["*q_proj"]},
            optimizer={"betas": [0.9, 0.95], "sparse_update": {"kind": "mofo", "share": "10%"}},
            penalties=[{"kind": "anchor", "strength": 0.1}],
        ),
        "chat": shelf.stage(
            "chat",
            sources=[shelf.source("chat", share=0.5), shelf.source("old", share=0.5, role="replay")],
            objectives=[{"kind": "next-token", "train_on": "answers"}, {"kind": "distill", "on": ["old"]}],
            evaluation={"every": "50%", "retained": [], "learned": []},
        ),
        "classes": shelf.stage(
            "classes",
            model="bert",
            sources=[shelf.source("labelled", "labelled", held_out="20%")],
            objectives=[{"kind": "classify", "layers": "last", "pooling": "mean"}],
            tuning={"kind": "head"},
            evaluation={"every": "50%", "learned": [labelled]},
            save={"choose": {"set": "held", "metric": "accuracy", "patience": 2}},
        ),
        "pairs": shelf.stage(
            "pairs",
            model="t5",
            sources=[shelf.source("pair"), shelf.source("old", share="10%", role="replay")],
            data={"mixing": {"kind": "examples", "cap": 50}},
            objectives=[
                {"kind": "text-to-text", "target_length": 20, "on": ["pair"]},
                {"kind": "span-corruption", "on": ["old"]},
            ],
            evaluation={"every": "50%"},
        ),
        "tasks": shelf.stage(
            "tasks",
            tuning={"kind": "prompt", "length": 3},
            evaluation={
                "every": "50%",
                "tasks": [
                    {
                        "name": "two-shot",
                        "path": shelf.file("choices", held_out=True),
                        "shots": 2,
                        "few_shot": {"path": shelf.file("choices")},
                        "items": 5,
                    }
                ],
            },
        ),
    }


def mappings(value: Any, name: str = "stage") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping of a stage with the key that it stands under."""
    if isinstance(value, dict):
        yield name, value
    for key, item in value.items() if isinstance(value, dict) else ((name, item) for item in value):
        if isinstance(item, dict | list):
            yield from mappings(item, str(key))


def example_values() -> list[tuple[str, str, Any]]:
    """Each value of the examples: the key of the mapping that it stands in, its own key, and itself."""
    found = [
        (name, key, value)
        for file in sorted((ROOT / "examples").rglob("*.yaml"))
        if isinstance(raw := read_yaml(file.read_text()), dict) and "data" in raw
        for name, mapping in mappings(raw)
        for key, value in mapping.items()
        if key not in ("data", "sources", "evaluation", "model", "path", "tokens")
    ]
    return [entry for i, entry in enumerate(found) if entry not in found[:i]]


EXAMPLES = example_values()


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a stage with each of its keys."""
    for key, item in list(value.items()) if isinstance(value, dict) else list(enumerate(value)):
        yield value, key
        if isinstance(item, dict | list):
            yield from places(item)


def mutate(raw: dict[str, Any], mutations: list[tuple[int, int, str]]) -> dict[str, Any]:
    """A copy in which values are replaced, removed, exchanged, put under an unknown key, or those of an example."""
    raw = copy.deepcopy(raw)
    for number, other, kind in mutations:
        known = list(places(raw))
        if not known:
            break
        container, key = known[number % len(known)]
        value = copy.deepcopy(HOSTILE[other % len(HOSTILE)])
        match kind:
            case "replace":
                container[key] = value
            case "remove":
                del container[key]
            case "add" if isinstance(container, dict):
                container[f"{key}s"] = value
            case "repeat" if isinstance(container, list):
                container.append(copy.deepcopy(container[key]))
            case "example":
                name, key, value = EXAMPLES[other % len(EXAMPLES)]
                if hosts := [mapping for under, mapping in mappings(raw) if under == name]:
                    hosts[number % len(hosts)][key] = copy.deepcopy(value)
            case _:
                second, there = known[other % len(known)]
                container[key], second[there] = copy.deepcopy(second[there]), copy.deepcopy(container[key])
    return raw


MUTATIONS = st.lists(
    st.tuples(
        st.integers(0, 10**6),
        st.integers(0, 10**6),
        st.sampled_from(["example", "example", "replace", "remove", "add", "repeat", "exchange"]),
    ),
    min_size=1,
    max_size=3,
)
SETTINGS = {"derandomize": True, "deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
KINDS = ["text", "wsd", "chat", "classes", "pairs", "tasks"]


def check_mutated(shelf: Workspace, kind: str, mutations: list[tuple[int, int, str]]) -> str:
    """Plan a mutated stage; `planned`, or the class of the error."""
    raw = mutate(stages(shelf)[kind], mutations)
    try:
        make_plan(parse_stage(raw, "test"), shelf.folder, shelf.cache)
    except PostgradError as error:
        assert is_harmless(str(error)) and len(str(error)) < 10_000
        assert error.exit_code in (1, 2)
        return type(error).__name__
    return "planned"


def run_mutations(shelf: Workspace, examples: int) -> set[str]:
    outcomes: set[str] = set()
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    @settings(max_examples=examples, phases=[Phase.generate], **SETTINGS)
    @given(kind=st.sampled_from(KINDS), mutations=MUTATIONS)
    def check(kind: str, mutations: list[tuple[int, int, str]]) -> None:
        outcomes.add(check_mutated(shelf, kind, mutations))

    check()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before < 10**9
    return outcomes


def test_mutated_stages_are_planned_or_refused(shelf: Workspace) -> None:
    for kind, raw in stages(shelf).items():
        make_plan(parse_stage(raw, kind), shelf.folder, shelf.cache)  # valid before they are mutated
    assert {"planned", "StageError"} <= run_mutations(shelf, 200)


def test_an_error_that_is_not_ours_is_found(shelf: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: what pydantic raises is passed on."""
    monkeypatch.setattr(stage_file, "make_stage_error", lambda error, *_: error)
    with pytest.raises(ValidationError):
        run_mutations(shelf, 20)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_mutated_stages_are_planned_or_refused(shelf: Workspace) -> None:
    run_mutations(shelf, 5000)


def test_mutated_files_are_read_or_refused(shelf: Workspace) -> None:
    """The text of a stage file with characters exchanged."""
    text = yaml.safe_dump(stages(shelf)["wsd"])
    file = shelf.folder / "mutated.yaml"

    @settings(max_examples=200, **SETTINGS)
    @given(
        st.lists(st.tuples(st.integers(0, len(text)), st.text(st.characters(codec="utf-8"), max_size=4)), min_size=1)
    )
    def check(changes: list[tuple[int, str]]) -> None:
        mutated = text
        for place, new in changes:
            mutated = mutated[:place] + new + mutated[place + len(new) // 2 :]
        file.write_text(mutated)
        try:
            load_stage(file)
        except PostgradError as error:
            assert is_harmless(str(error))

    check()
