"""Too little memory ends in an error that names keys that help, and the run resumes with them."""

# ruff: noqa: F811 (a fixture that is imported is named again where it is used)

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from postgrad.config.stage_file import json_schema
from postgrad.errors import OutOfMemoryError
from postgrad.evaluation import before_after
from postgrad.hardware import memory
from postgrad.hardware.memory import is_out_of_memory, memory_errors
from postgrad.models.output_head import _PRODUCTS
from postgrad.run import measure
from postgrad.run import run as run_module
from postgrad.run.events import RunFinished
from postgrad.training import step as training_step
from tests.cli.test_main import Command, postgrad  # noqa: F401 (fixtures)
from tests.conftest import StageOf
from tests.run.test_run import events_of, losses_of
from tests.test_error_places import has_path


def raised(work: Callable[[], object]) -> Exception:
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        work()
    return caught.value


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB")
REAL = [
    lambda: torch.empty(1 << 60, dtype=torch.uint8),  # torch's allocator on a CPU
    lambda: np.zeros(1 << 60, np.uint8),
    lambda: bytearray(1 << 62),
]


@pytest.mark.parametrize("work", REAL)
def test_what_allocators_raise_is_recognised(work: Callable[[], object]) -> None:
    assert is_out_of_memory(raised(work))
    with pytest.raises(OutOfMemoryError, match=r"here: out of memory.*\n  hint: +less"), memory_errors("here", "less"):
        work()


def test_other_errors_are_left_alone() -> None:
    assert is_out_of_memory(CUDA)
    with pytest.raises(RuntimeError, match="mat1 and mat2"), memory_errors("here", "less"):
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    with pytest.raises(OutOfMemoryError, match=r"an allocation of 2\.00 GiB"), memory_errors("here", "less"):
        raise CUDA


PHASES = [
    (before_after, "score_sets", "scoring the start model", ["evaluation.drift_tokens: 0", "data.sequence_length"]),
    (run_module, "_cache_teachers", "caching predictions of the teacher", ["batch.micro_batch_size: 2"]),
    (training_step, "combine_losses", "training", [
        "batch.micro_batch_size: 2", "compute.activation_checkpointing: true", "data.sequence_length",
        "compute.dtype: bfloat16", "tuning: {kind: lora}",
    ]),
    (measure, "measure_drift", "scoring the trained model", ["evaluation.drift_tokens: 0", "data.sequence_length"]),
]  # fmt: skip


@pytest.mark.parametrize(("module", "name", "place", "keys"), PHASES, ids=[phase[2] for phase in PHASES])
def test_each_phase_names_the_keys_that_help(
    module: object,
    name: str,
    place: str,
    keys: list[str],
    stage_of: StageOf,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise CUDA

    evaluation = {**stage_of()["evaluation"], "every": "50%"}
    raw = stage_of(tokens=1000, evaluation=evaluation)
    with monkeypatch.context() as patched:
        patched.setattr(module, name, fails)
        with pytest.raises(OutOfMemoryError) as caught:
            events_of(raw, cache)
    assert caught.value.where == place and caught.value.exit_code == 1
    schema = json.loads(json_schema())
    for key in keys:
        assert key in caught.value.hint
    for path in re.findall(r"\b[a-z]\w*(?:\.[a-z]\w*)+", caught.value.hint):
        assert has_path(schema, path.split(".")), path
    with monkeypatch.context() as patched:  # the mutant
        patched.setattr(module, name, fails)
        patched.setattr(memory, "is_out_of_memory", lambda error: False)
        with pytest.raises(torch.OutOfMemoryError):
            events_of(raw, cache)


def test_a_run_goes_on_with_less_memory(
    stage_of: StageOf, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keys that the hint names for the same run may really change, and change the rounding only."""
    events_of(stage_of(output=str(tmp_path / "whole"), tokens=2000), cache)
    combine, calls = training_step.combine_losses, 0

    def fails_later(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls > 12:
            raise CUDA
        return combine(*arguments)  # type: ignore[arg-type]

    parts = {"output": str(tmp_path / "parts"), "tokens": 2000, "save": {"every": "2 steps"}}
    with monkeypatch.context() as patched:
        patched.setattr(training_step, "combine_losses", fails_later)
        with pytest.raises(OutOfMemoryError):
            events_of(stage_of(**parts), cache)
    less = {
        "batch": {"global_batch_size": 8, "micro_batch_size": 1},
        "compute": {**stage_of()["compute"], "activation_checkpointing": True},
        "evaluation": {**stage_of()["evaluation"], "drift_tokens": 0},
    }
    assert isinstance(events_of(stage_of(**parts, **less), cache)[-1], RunFinished)
    execution = json.loads((tmp_path / "parts" / "plan.json").read_text())["execution"]
    assert execution["micro"] == 1 and execution["activation_checkpointing"]
    assert losses_of(tmp_path / "parts") == pytest.approx(losses_of(tmp_path / "whole"), rel=1e-5)
    assert isinstance(events_of(stage_of(**parts), cache)[-1], RunFinished)  # the first stage is still that of this run


HEAD_PROBE = (1, len(_PRODUCTS))


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["eval", "MODEL", "TEXT"], "--context"),
        (["importance", "MODEL", "TEXT", "--out", "i.safetensors", "--tokens", "100", "--context", "32"], "--context"),
        (["generate", "MODEL", "--prompt", "one"], "--max-new-tokens"),
        (["synthesize", "MODEL", "--out", "r.jsonl", "--max-tokens", "40"], "--batch-size 16"),
        (["shift", "--model", "MODEL", "--old", "TEXT", "--new", "OTHER"], "a smaller model or batch"),
    ],
)
def test_each_command_names_the_option_that_helps(
    words: list[str], option: str, postgrad: Command, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = torch.nn.Embedding.forward

    def fails(self: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        if ids.shape == HEAD_PROBE:  # which every model is opened with
            return forward(self, ids)
        raise CUDA

    monkeypatch.setattr(torch.nn.Embedding, "forward", fails)
    places = {"MODEL": str(base / "base"), "TEXT": str(base / "old.jsonl"), "OTHER": str(base / "new.jsonl")}
    done = postgrad(*(places.get(word, word) for word in words))
    assert done.code == 1 and re.search(rf"out of memory[\s\S]*hint: .*{option}", done.err), done.err
