"""What a fixed set of small runs computes is what it computed when it was captured, to the bit."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from tests.regression import runs
from tests.regression.runs import RUNS, Shelf, capture, differences, not_comparable, read_expected, renamed


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, Any]]:
    """What was captured, run by run."""
    return read_expected()[1]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    """A folder for all runs; skips where bits are not those of the machine that was captured on."""
    if why := not_comparable(read_expected()[0]):
        pytest.skip(f"bits are those of one machine and of its versions ({why})")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Shelf(tmp_path_factory.mktemp("regression"))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_computes_what_it_did(name: str, shelf: Shelf, expected: dict[str, dict[str, Any]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        apart = differences(expected[name], capture(name, shelf))
    assert not apart, "\n".join([f"{name} differs from what was captured:", *apart])


# -- the comparison itself ---------------------------------------------------------------------------------------------


def nudged(value: str) -> str:
    """The next number of a hex float."""
    return (float.fromhex(value) * (1 + 2**-52)).hex()


def test_every_run_was_captured(expected: dict[str, dict[str, Any]]) -> None:
    assert list(expected) == list(RUNS) and len(RUNS) >= 24


def test_a_run_in_parts_is_the_run_in_one(expected: dict[str, dict[str, Any]]) -> None:
    assert differences(expected["mofo-loss-adaptive"], expected["stopped"]) == []


def test_a_change_anywhere_is_met(expected: dict[str, dict[str, Any]]) -> None:
    run = expected["full"]
    assert differences(run, copy.deepcopy(run)) == []

    mutant = copy.deepcopy(run)
    for step in mutant["steps"][2:]:
        step["loss"] = nudged(step["loss"])
    (told,) = differences(run, mutant)
    assert told.startswith("step 3 is the first that differs: loss: ")

    mutant = copy.deepcopy(run)
    mutant["steps"].pop()
    assert differences(run, mutant) == [f"{len(run['steps'])} steps were expected, {len(run['steps']) - 1} found"]

    mutant = copy.deepcopy(run)
    mutant["weights"]["named"] = mutant["weights"]["named"][::-1]
    (told,) = differences(run, mutant)
    assert told.startswith("weights.named: ")

    mutant = copy.deepcopy(run)
    scores = mutant["scores"]["after"]["old-held"]
    scores["nats"] = nudged(scores["nats"])
    del mutant["trained"]["old"]
    mutant["more"] = 1
    assert [told.partition(":")[0] for told in differences(run, mutant)] == [
        "trained.old is missing",
        "scores.after.old-held.nats",
        "more is new",
    ]


def test_every_number_of_every_run_counts(expected: dict[str, dict[str, Any]]) -> None:
    """Mutants of all captured numbers, one run at a time."""
    for name, run in expected.items():
        mutant = _mutated(run)
        whole, loose = differences(run, mutant), differences(run, mutant, loose=True)
        fields = [key for key in run if key != "intervals"]
        assert len(loose) >= len(fields) and len(whole) >= len(loose), name
        assert bool(run["intervals"]) == any(told.startswith("intervals.") for told in whole), name
        assert not any(told.startswith("intervals.") for told in loose), name


def _mutated(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: own if key == "step" else _mutated(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_mutated(own) for own in value]
    if isinstance(value, bool) or value is None:
        return "another"
    return value + 1 if isinstance(value, int) else f"{value}0"


def test_a_step_of_a_run_within_a_run_is_named(expected: dict[str, dict[str, Any]]) -> None:
    run = expected["lora-orthogonal"]
    mutant = copy.deepcopy(run)
    mutant["two"]["steps"][0]["gradient norm"] = nudged(mutant["two"]["steps"][0]["gradient norm"])
    (told,) = differences(run, mutant)
    assert told.startswith("two: step 1 is the first that differs: gradient norm: ")


def test_intervals_may_be_left_out(expected: dict[str, dict[str, Any]]) -> None:
    run = expected["full"]
    mutant = copy.deepcopy(run)
    low = mutant["intervals"]["changes"]["old-held"]
    low["low"] = nudged(low["low"])
    assert len(differences(run, mutant)) == 1 and differences(run, mutant, loose=True) == []


def test_another_machine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    head = {"commit": "none", **runs.machine()}
    assert not_comparable(head) is None
    assert not_comparable({**head, "torch": "0.1"}) == f"torch: 0.1 then, {head['torch']} now"


def test_words_are_renamed_there_and_back() -> None:
    stage = {
        "data": {"when_short": "renormalise", "sources": [{"name": "a", "words": {"x": "y"}}, {"name": "b"}]},
        "batch": {"sequences": 4, "micro": 2},
    }
    moves = [
        ("data.sources.*.words", "data.sources.*.label_words"),
        ("batch.sequences", "batch_size"),
        ("data.when_short", "data.on_shortage"),
    ]
    values = [("data.when_short", {"renormalise": "rescale"})]
    now = renamed(stage, moves, values)
    assert now == {
        "data": {"on_shortage": "rescale", "sources": [{"name": "a", "label_words": {"x": "y"}}, {"name": "b"}]},
        "batch": {"micro": 2},
        "batch_size": 4,
    }
    assert renamed(now, moves, back=True)["batch"] == stage["batch"]
    assert renamed(now, moves, back=True)["data"]["sources"] == stage["data"]["sources"]
