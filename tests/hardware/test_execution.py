"""What is left to `auto` follows from the machine's speeds; what is asked for is done, or refused with its key."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from postgrad.errors import StageError
from postgrad.hardware import execution, machine
from postgrad.hardware.execution import Execution, ExecutionRequest, get_model_dimensions, select_execution
from postgrad.hardware.memory import ModelDimensions, estimate_memory, format_bytes
from postgrad.models.cpu_attention import CAUSAL_BLOCKS
from postgrad.models.model import CausalModel
from postgrad.optim.optimizer import AdamW, Weights
from postgrad.tuning.weight_subsets import FullFinetuning
from tests.conftest import make_llama

CPU = torch.device("cpu")
FREE = 8 << 30

Choose = Callable[..., Execution]


def example(rows: int) -> dict[str, torch.Tensor]:
    """What a model is called with for so many rows."""
    return {"input_ids": torch.zeros(rows, 32, dtype=torch.long), "position_ids": torch.arange(32).expand(rows, -1)}


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Choose:
    """Choose on a made-up machine."""

    def make(
        *,
        bf16: float = 1.0,
        cores: int = 4,
        gain: float = 3.0,
        seconds: float = 0.001,
        free: int | None = FREE,
        ranks: int = 1,
        model: Any = None,
        **wishes: Any,
    ) -> Execution:
        def speed(dtype: torch.dtype, shape: tuple[int, int, int], on: torch.device) -> float:
            many = gain if torch.get_num_threads() > 1 else 1.0
            return 1e9 * many * (bf16 if dtype == torch.bfloat16 else 1.0)

        monkeypatch.setattr(machine, "matmul_speed", speed)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr(machine, "core_count", lambda: cores)
        monkeypatch.setattr(machine, "available_memory", lambda: free)
        monkeypatch.setattr(execution, "_micro_batch_seconds", lambda *_: seconds)
        asked = {
            "dtype": "auto", "compile": "auto", "attention": "auto", "activation_checkpointing": False, "threads": None,
            "micro": None, "sequences": 32, "length": 64, "steps": 1000, **wishes,
        }  # fmt: skip
        before = torch.get_num_threads()
        try:
            return select_execution(ExecutionRequest(**asked), CausalModel(model or make_llama()), example, CPU, ranks)
        finally:
            torch.set_num_threads(before)

    return make


def test_bf16_is_chosen_where_it_is_faster(chosen: Choose) -> None:
    assert chosen(bf16=4.0).dtype == "bfloat16"
    assert chosen(bf16=4.0).compute == torch.bfloat16
    assert chosen(bf16=0.2).dtype == "float32"
    assert chosen(bf16=1.05).dtype == "float32"  # rounding would buy nothing
    assert "4.0 x" in chosen(bf16=4.0).reasons["dtype"]
    assert chosen(bf16=4.0, dtype="float32").compute == torch.float32
    assert chosen(bf16=0.2, dtype="bfloat16").dtype == "bfloat16"


def test_threads_are_those_that_help(chosen: Choose) -> None:
    assert chosen(cores=4, gain=3.0).threads == 4
    assert chosen(cores=4, gain=1.02).threads == 1
    assert chosen(cores=4, gain=0.3).threads == 1
    assert chosen(cores=1).threads == 1
    assert chosen(cores=4, gain=3.0, ranks=2).threads == 2
    assert chosen(cores=4, gain=3.0, ranks=8).threads == 1
    assert chosen(cores=4, gain=0.3, threads=2).threads == 2


def threads_by(monkeypatch: pytest.MonkeyPatch, gains: list[float], rounds: int = 5) -> int:
    """The threads chosen of 4 cores when the rounds of a probe give these gains, over and over."""
    speeds = itertools.cycle([speed for gain in gains for speed in (1.0, gain)])
    monkeypatch.setattr(machine, "matmul_speed", lambda *_: next(speeds))
    monkeypatch.setattr(machine, "core_count", lambda: 4)
    monkeypatch.setattr(machine, "_ROUNDS", rounds)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        return execution.choose_threads(None, (64, 64, 64), CPU, 1)[0]
    finally:
        torch.set_num_threads(before)


NOISY = [
    ([0.3, 2.8, 2.9, 2.8, 2.7], 4),  # a process that came and went
    ([0.3, 0.3, 2.8, 0.3, 0.2], 1),  # one that stays
    ([1.0, 1.05, 1.3, 1.02, 1.04], 4),  # within noise: the default
    ([1.0, 1.05, 1.03, 1.02, 1.04], 1),
]


@pytest.mark.parametrize(("gains", "threads"), NOISY)
def test_one_noisy_round_does_not_decide(gains: list[float], threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert threads_by(monkeypatch, gains) == threads


def test_a_single_round_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    assert any(threads_by(monkeypatch, gains, rounds=1) != threads for gains, threads in NOISY)


def test_rounds_end_early_when_they_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_MAX_PROBE_SECONDS", 0.0)
    assert machine.compare_speeds(lambda: 2.0, lambda: 1.0) == [2.0]


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "2,4"}, 2),
        ({"OMP_NUM_THREADS": "many"}, None),
        ({"OMP_NUM_THREADS": "0"}, None),
        (
            {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2"},
            None,
        ),  # torchrun's own default
        ({"OMP_NUM_THREADS": "3", "TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2"}, 3),
    ],
)
def test_the_threads_of_the_environment_are_obeyed(
    environment: dict[str, str], threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(machine, "matmul_speed", lambda *_: 1.0)
    monkeypatch.setattr(machine, "core_count", lambda: 7)
    chosen, reason = execution.choose_threads(None, (64, 64, 64), CPU, 1)
    assert chosen == (threads or 1) and ("OMP_NUM_THREADS" in reason) == (threads is not None)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert execution.choose_threads(5, (64, 64, 64), CPU, 1)[0] == 5
    with pytest.raises(StageError, match=r"compute\.threads: 9 threads[\s\S]*at most 8"):
        execution.choose_threads(9, (64, 64, 64), CPU, 1)


def test_long_runs_are_compiled_and_short_ones_are_not(chosen: Choose) -> None:
    short, long = chosen(seconds=0.001), chosen(seconds=1.0)
    assert not short.compile
    assert long.compile
    rows = 32 // long.micro
    assert long.seconds == pytest.approx(1.0 * rows * 1000, abs=0.1)  # a micro-batch, of a step, of the stage
    assert f"{long.seconds:,.0f} s" in long.reasons["compile"]
    assert not chosen(seconds=1.0, compile=False).compile
    assert chosen(seconds=0.001, compile=True).compile
    assert chosen(seconds=0.001, compile=True).reasons.keys() & {"compile"} == set()


def test_attention_is_as_asked_or_what_was_found_to_be_right(chosen: Choose) -> None:
    assert chosen().attention == CAUSAL_BLOCKS
    assert chosen(length=4096, model=make_llama(max_position_embeddings=8192)).attention == "sdpa"
    for asked in ("eager", "sdpa"):
        assert chosen(attention=asked).attention == asked
    assert chosen(model=make_llama(attention_dropout=0.1)).attention == "sdpa"  # which the blocks do not know


@pytest.mark.parametrize(
    ("sequences", "length", "ranks"), [(32, 64, 1), (30, 64, 1), (7, 64, 1), (12, 512, 4), (1, 16, 1), (24, 1024, 2)]
)
def test_micro_batches_part_a_ranks_rows_evenly(chosen: Choose, sequences: int, length: int, ranks: int) -> None:
    model = make_llama(max_position_embeddings=2048)
    found = chosen(sequences=sequences, length=length, ranks=ranks, model=model)
    mine = sequences // ranks
    assert mine % found.micro == 0
    assert found.micro * length <= 2048 or found.micro == 1
    larger = [m for m in range(found.micro + 1, mine + 1) if mine % m == 0 and m * length <= 2048]
    assert larger == []  # as many as there is room for


def test_little_memory_means_few_rows_at_once(chosen: Choose) -> None:
    model = make_llama(hidden_size=256, intermediate_size=1024)
    shape = get_model_dimensions(CausalModel(model))
    roomy = chosen(model=model, length=128, sequences=16, free=None)
    assert roomy.micro == 16
    asked = {"length": 128, "bf16": False, "checkpointing": False, "sdpa": True}
    four = estimate_memory(shape, rows=4, **asked).total  # type: ignore[arg-type]
    assert chosen(model=model, length=128, sequences=16, free=int(four / 0.6) + 1).micro == 4
    assert chosen(model=model, length=128, sequences=16, free=1).micro == 1


@pytest.mark.parametrize(
    ("wishes", "where", "expected"),
    [
        ({"sequences": 8, "micro": 3}, r"batch\.micro_batch_size", "a divisor of 8"),
        ({"sequences": 8, "micro": 16}, r"batch\.micro_batch_size", "a divisor of 8"),
        ({"sequences": 8, "micro": 8, "ranks": 2}, r"batch\.micro_batch_size", "a divisor of 4"),
        ({"sequences": 7, "ranks": 2}, r"batch\.global_batch_size", "a multiple of 2"),
        ({"sequences": 1, "ranks": 2}, r"batch\.global_batch_size", "a multiple of 2"),
    ],
)
def test_rows_that_do_not_part_evenly(chosen: Choose, wishes: dict[str, Any], where: str, expected: str) -> None:
    with pytest.raises(StageError, match=rf"{where}: [\s\S]*expected: {expected}"):
        chosen(**wishes)


def test_the_probe_leaves_the_model_as_it_was() -> None:
    """The real one, on a real model: no gradient, the same weights, the same mode."""
    model = make_llama()
    before = [p.detach().clone() for p in model.parameters()]
    wishes = ExecutionRequest("auto", "auto", "auto", False, 1, None, 4, 32, 1000)
    found = select_execution(wishes, CausalModel(model), example, CPU)
    assert 0 < found.seconds < 600
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not model.training
    assert Execution(**found.as_dict()) == found  # what a resumed run reads back


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_takes_as_many_bytes_as_its_tensors(dtype: torch.dtype) -> None:
    model = CausalModel(make_llama(hidden_size=64, intermediate_size=512))
    weights = Weights(model, FullFinetuning(model.pretrained), dtype, master_copies=True)
    optimizer = AdamW(weights, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for p in {*weights.masters, *model.parameters()}:
        p.grad = torch.zeros_like(p)
    optimizer.step(1e-4)
    shape = get_model_dimensions(model)
    planned = estimate_memory(shape, rows=1, length=8, bf16=dtype == torch.bfloat16, checkpointing=False, sdpa=True)
    parts = {id(p): p for p in [*weights.masters, *model.parameters()]}
    held = sum(p.numel() * p.element_size() for p in parts.values())
    assert held <= planned.weights < 1.1 * held  # an embedding table stays in fp32, which the plan need not know
    moments = sum(m.numel() * m.element_size() for m in optimizer.moments().values() if m.numel() > 1)
    assert planned.moments == pytest.approx(moments, rel=0.01)


def saved_bytes(model: CausalModel, rows: int, length: int) -> int:
    """Bytes that the forward pass keeps for the backward pass, weights left out."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    positions = torch.arange(length).expand(rows, -1)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model(input_ids=torch.zeros(rows, length, dtype=torch.long), position_ids=positions).hidden
    assert hidden.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(("layers", "rows"), [(4, 2), (8, 1), (4, 8)])
def test_activations_are_about_what_a_forward_pass_keeps(layers: int, rows: int) -> None:
    model = CausalModel(make_llama(
        hidden_size=128, intermediate_size=352, num_hidden_layers=layers, num_key_value_heads=4, attn_implementation="sdpa",
    ))  # fmt: skip
    shape = get_model_dimensions(model)

    def planned(rows: int) -> int:
        return estimate_memory(shape, rows=rows, length=64, bf16=False, checkpointing=False, sdpa=True).activations

    per_row = planned(rows + 1) - planned(rows)  # what is left is the loss's own room
    assert 0.5 < per_row * rows / saved_bytes(model, rows, 64) < 2


def test_estimates_grow_and_shrink_with_what_they_should() -> None:
    shape = ModelDimensions(
        parameters=10**6, trainable=10**6, layers=8, width=256, inner=1024, heads=8, vocabulary=1000
    )

    def total(**changes: Any) -> int:
        asked = {"rows": 4, "length": 256, "bf16": False, "checkpointing": False, "sdpa": True, **changes}
        return estimate_memory(shape, **asked).activations

    assert total(rows=8) > total()
    assert total(length=512) > total()
    assert total(checkpointing=True) < total()
    assert total(sdpa=False) > total()
    assert total(bf16=True) < total()
    halves = estimate_memory(shape, rows=4, length=256, bf16=True, checkpointing=False, sdpa=True, ranks=2)
    whole = estimate_memory(shape, rows=4, length=256, bf16=True, checkpointing=False, sdpa=True)
    assert (2 * halves.weights, 2 * halves.moments) == (whole.weights, whole.moments)
    assert whole.total == whole.weights + whole.gradients + whole.moments + whole.activations
    # AdamW with fp32 masters in bf16: 16 bytes a weight, and the copies.
    assert (whole.weights, whole.gradients, whole.moments) == (6 * 10**6, 6 * 10**6, 8 * 10**6)


def test_shapes_are_read_whatever_the_keys_are_called() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt = CausalModel(GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=3, n_head=4, vocab_size=77)))
    n = sum(p.numel() for p in gpt.parameters())
    assert get_model_dimensions(gpt) == ModelDimensions(
        parameters=n, trainable=n, layers=3, width=48, inner=192, heads=4, vocabulary=77, tables=77 * 48
    )
    llama = CausalModel(make_llama())
    llama.body.requires_grad_(False)
    n = sum(p.numel() for p in llama.parameters())
    assert get_model_dimensions(llama) == ModelDimensions(
        parameters=n, trainable=0, layers=2, width=32, inner=64, heads=4, vocabulary=320, tables=10240
    )


def test_weights_that_are_held_fast_need_neither_gradients_nor_moments() -> None:
    shape = ModelDimensions(
        parameters=10**6, trainable=10**4, layers=8, width=256, inner=1024, heads=8, vocabulary=1000
    )
    asked = {"rows": 4, "length": 256, "checkpointing": False, "sdpa": True}
    low, high = (estimate_memory(shape, bf16=bf16, **asked) for bf16 in (True, False))  # type: ignore[arg-type]
    assert low.weights == 6 * 10**4 + 2 * (10**6 - 10**4) < high.weights == 4 * 10**6
    assert (low.gradients, low.moments) == (6 * 10**4, 8 * 10**4)


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 B"), (7, "7 B"), (999, "999 B"), (1000, "1.0 kB"), (12_345, "12 kB"), (1.4e9, "1.4 GB"), (5e15, "5000 TB")],
)
def test_bytes_for_people(count: float, said: str) -> None:
    assert format_bytes(count) == said
