"""AdamW with moments and weights in fewer bits, against torch's own AdamW."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from postgrad.hardware.memory import ModelDimensions, StateDtypes, estimate_memory
from postgrad.optim import low_precision_adamw, moment_formats
from postgrad.optim.low_precision_adamw import LowPrecisionAdamW
from postgrad.optim.moment_formats import MomentDtype, block_size

BETAS = (0.9, 0.999)
SHAPE = (96, 256)


def make_adamw(
    weights: list[Tensor], moment_dtype: MomentDtype, rate: float = 1e-3, decay: float = 0.1
) -> LowPrecisionAdamW:
    groups: list[dict[str, Any]] = [{"params": weights, "lr": rate, "weight_decay": decay}]
    return LowPrecisionAdamW(groups, betas=BETAS, eps=1e-8, moment_dtype=moment_dtype, seed=0)


def gradients(step: int) -> Tensor:
    """Of magnitudes that differ by row and column over four decades."""
    generator = torch.Generator().manual_seed(step)
    scale = torch.logspace(-4, -1, SHAPE[0])[:, None] * torch.logspace(-1, 0, SHAPE[1])
    return torch.randn(SHAPE, generator=generator) * scale


def train(optimizer: torch.optim.Optimizer, weight: Tensor, steps: int) -> None:
    for step in range(steps):
        weight.grad = gradients(step).to(weight.dtype)
        optimizer.step()


def test_in_fp32_it_is_torchs_own_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_precision_adamw, "ROWS_BYTES", {"cpu": 4 * 256 * 7})  # parts of 7 rows
    ours, theirs = nn.Parameter(torch.ones(SHAPE)), nn.Parameter(torch.ones(SHAPE))
    train(make_adamw([ours], "float32"), ours, 20)
    train(torch.optim.AdamW([theirs], lr=1e-3, betas=BETAS, weight_decay=0.1, fused=True), theirs, 20)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("mutant", [None, "nearest"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
def test_moments_of_fewer_bits_follow_those_of_fp32(
    dtype: MomentDtype, mutant: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the gradient's scale changes, a second moment that is rounded to the nearest stays behind."""
    if mutant:
        monkeypatch.setattr(moment_formats, "to_bfloat16", lambda value, key, first: value.bfloat16())
        monkeypatch.setattr(moment_formats, "to_float8", lambda value, key, first: value.to(torch.float8_e4m3fn))
    weights = [nn.Parameter(torch.zeros(SHAPE)) for _ in range(2)]
    ours = make_adamw([weights[0]], dtype, decay=0.0)
    theirs = torch.optim.AdamW([weights[1]], lr=1e-3, betas=BETAS, weight_decay=0.0, fused=True)
    scale = torch.ones(SHAPE)
    scale[:, 0] = 10  # the largest of its block is always exact
    for step in range(400):
        for weight, optimizer in zip(weights, (ours, theirs), strict=True):
            weight.grad = scale * (1.0 if step < 50 else 1.3)
            optimizer.step()
    format = moment_formats.choose_format(dtype, weights[0])
    second = format.read(ours.state[weights[0]], "exp_avg_sq", slice(None))[:, 1:].mean()
    exact = theirs.state[weights[1]]["exp_avg_sq"][:, 1:].mean()
    assert (abs(second / exact - 1) < 0.02) == (mutant is None)


def test_weights_stay_near_those_of_fp32() -> None:
    weights = {dtype: nn.Parameter(torch.zeros(SHAPE)) for dtype in ("float32", "bfloat16", "float8")}
    for dtype, weight in weights.items():
        train(make_adamw([weight], dtype, decay=0.0), weight, 100)  # type: ignore[arg-type]
    exact = weights.pop("float32")
    errors = {
        dtype: float((weight - exact).detach().norm() / exact.detach().norm()) for dtype, weight in weights.items()
    }
    assert errors["bfloat16"] < 0.01
    assert errors["float8"] < 0.15


@pytest.mark.parametrize("mutant", [None, "nearest"])
def test_weights_in_bf16_keep_updates_below_their_precision(
    mutant: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 updates of 1e-5 each, on weights of 1 whose neighbours are 4e-3 and 8e-3 away."""
    if mutant:
        monkeypatch.setattr(low_precision_adamw, "to_bfloat16", lambda value, key, first: value.bfloat16())
    weight = nn.Parameter(torch.ones(SHAPE, dtype=torch.bfloat16))
    optimizer = make_adamw([weight], "float32", rate=1e-5, decay=0.0)
    for _ in range(200):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    moved = 1 - float(weight.detach().float().mean())
    assert (abs(moved / 2e-3 - 1) < 0.1) == (mutant is None)


@pytest.mark.parametrize(("dtype", "bytes_"), [("bfloat16", 4.0), ("float8", 2 + 8 / 256)])
def test_the_state_takes_what_is_said(dtype: Any, bytes_: float) -> None:
    weight = nn.Parameter(torch.zeros(SHAPE))
    state = make_adamw([weight], dtype).empty_state(weight)
    held = sum(t.nbytes for name, t in state.items() if name != "step")
    assert held == bytes_ * weight.numel()
    shape = ModelDimensions(weight.numel(), weight.numel(), 1, 256, 256, 4, 10)
    settings: dict[str, Any] = {"rows": 1, "length": 8, "bf16": True, "checkpointing": False, "sdpa": True}
    said = estimate_memory(shape, **settings, state=StateDtypes(dtype, None)).moments
    assert abs(said / held - 1) < 0.02


def test_vectors_and_short_rows_have_moments_in_fp32() -> None:
    for shape in ((256,), (256, 16), ()):
        weight = nn.Parameter(torch.ones(shape))
        optimizer = make_adamw([weight], "float8")
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert {t.dtype for name, t in optimizer.state[weight].items() if name != "step"} == {torch.float32}
        assert bool((weight < 1).all())


def test_blocks_divide_the_row() -> None:
    assert [block_size(row) for row in (32, 256, 688, 4096, 11008, 577)] == [32, 256, 172, 256, 256, 577]
