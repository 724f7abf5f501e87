"""The memory that a check prints is that of the run, from its first tensor to its record."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from postgrad.check import check, memory_probe
from postgrad.hardware import machine
from postgrad.models.pretrained import save_pretrained
from postgrad.penalties.penalty import Penalty
from postgrad.plan.plan import Plan
from postgrad.run.build import build_run, make_step
from postgrad.training.step import Run, StepFunction
from tests.conftest import StageOf, make_llama, make_tokenizer
from tests.run.test_run import events_of, plan_of

CPU = torch.device("cpu")


def in_new_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns in a process that holds nothing else: a forked one would hold what earlier tests have left."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def checked(stage: dict[str, Any], cache: Path, from_shapes: bool = False) -> dict[str, Any]:
    """The memory that a check says."""
    if from_shapes:  # the mutant
        check.measure_memory = lambda plan, execution, world, estimate, process: estimate
    return check.check_stage(plan_of(stage, cache), cache=cache)["memory"]


def trained(stage: dict[str, Any], cache: Path) -> int | None:
    """The peak of the run."""
    machine.tune_allocator()
    machine.process_memory(CPU)  # resets the peak
    events_of(stage, cache)
    return machine.peak_memory(CPU)


@pytest.fixture(params=[pytest.param("full", marks=pytest.mark.slow), "lora"])
def stage(request: pytest.FixtureRequest, stage_of: StageOf, tmp_path: Path) -> dict[str, Any]:
    """A stage whose activations and scores take more than the libraries' noise."""
    model = make_llama(hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_key_value_heads=4)
    save_pretrained(model, make_tokenizer(), tmp_path / "model", dtype=torch.float32)
    data = {**stage_of()["data"], "sequence_length": 128}
    return stage_of(
        model=str(tmp_path / "model"), data=data, tokens=4000, tuning={"kind": request.param},
        batch={"global_batch_size": 16, "micro_batch_size": 8},
    )  # fmt: skip


@pytest.mark.timeout(900)
def test_the_peak_of_a_run_is_foretold(stage: dict[str, Any], cache: Path) -> None:
    plan_of(stage, cache)  # texts are tokenised once
    memory, real = in_new_process(checked, stage, cache), in_new_process(trained, stage, cache)
    assert memory["is_measured"] and memory["total"] == pytest.approx(real, rel=0.1), (memory, real)
    # The mutant: the shapes alone.
    assert in_new_process(checked, stage, cache, True)["total"] < 0.7 * real


def test_what_does_not_fit_is_not_tried(stage_of: StageOf, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_probe, "_train_part", lambda *_: pytest.fail("tried"))
    monkeypatch.setattr(machine, "available_memory", lambda: 1 << 20)
    found = check.check_stage(plan_of(stage_of(), cache), cache=cache)
    assert not found["memory"]["is_measured"] and "at the peak, estimated (" in found["text"]
    assert found["memory"]["total"] > found["memory"]["process"] > 1 << 20


def test_a_system_that_tells_no_peak_has_an_estimate(
    stage_of: StageOf, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_status_bytes", lambda key: None)
    assert not check.check_stage(plan_of(stage_of(), cache), cache=cache)["memory"]["is_measured"]


def test_penalties_are_in_memory_while_a_step_is_measured(
    stage_of: StageOf, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference of an anchor is as large as the model."""
    made, steps = list[weakref.ref[Penalty]](), list[StepFunction]()

    def build(*words: Any) -> Run:
        run = build_run(*words)
        made.extend(weakref.ref(penalty) for penalty in run.penalties)
        return run

    def step(plan: Plan, run: Run) -> StepFunction:
        assert made and all(penalty() is not None for penalty in made)
        steps.append(make_step(plan, run))
        return steps[-1]

    monkeypatch.setattr(memory_probe, "build_run", build)
    monkeypatch.setattr(memory_probe, "make_step", step)
    raw = stage_of(penalties=[{"kind": "anchor", "strength": 0.1}])
    assert check.check_stage(plan_of(raw, cache), cache=cache)["memory"]["is_measured"] and steps


def test_a_check_leaves_nothing_behind(stage_of: StageOf, cache: Path, tmp_path: Path) -> None:
    """The probe takes a step: not on the model that anything else sees, and without files."""
    found = check.check_stage(plan_of(stage_of(), cache), cache=cache)
    assert found["memory"]["is_measured"] and not (tmp_path / "run").exists()
