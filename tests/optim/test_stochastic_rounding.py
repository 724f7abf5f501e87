"""Stochastic rounding is right on average, picks neighbours only, and does not depend on how a tensor is divided."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from postgrad.optim import stochastic_rounding
from postgrad.optim.stochastic_rounding import to_bfloat16, to_float8

Round = Callable[[Tensor, int, int], Tensor]


def all_values(dtype: torch.dtype) -> Tensor:
    """The finite values of a format, sorted."""
    bits = torch.arange(256, dtype=torch.uint8) if dtype == torch.float8_e4m3fn else torch.arange(-(2**15), 2**15)
    codes = bits.view(dtype) if dtype == torch.float8_e4m3fn else bits.to(torch.int16).view(dtype)
    values = codes.float()
    return values[values.isfinite()].unique()


def some_values() -> Tensor:
    """From the smallest values of float8 to its largest, of both signs, and zero."""
    magnitudes = torch.logspace(-3.5, 2.6, 200)
    return torch.cat([magnitudes, -magnitudes, torch.zeros(1)])


FORMATS = [
    pytest.param(to_bfloat16, torch.bfloat16, id="bf16"),
    pytest.param(to_float8, torch.float8_e4m3fn, id="float8"),
]


@pytest.mark.parametrize(("round_", "dtype"), FORMATS)
def test_a_value_becomes_one_of_its_neighbours_and_their_mean_is_the_value(round_: Round, dtype: torch.dtype) -> None:
    values, known, count = some_values(), all_values(dtype), 2000
    index = torch.searchsorted(known, values)
    upper, lower = known[index], known[(index - 1).clamp(min=0)]
    rounded = torch.stack([round_(values, key * 7919, 0).float() for key in range(count)])
    assert bool(((rounded == upper) | (rounded == lower)).all())
    deviation = (upper - lower) / (2 * count**0.5)  # of a mean of coins, at most
    assert bool(((rounded.mean(0) - values).abs() <= 5 * deviation).all())
    nearest = values.to(dtype).float()  # which rounding to the nearest fails
    assert not bool(((nearest - values).abs() <= 5 * deviation).all())


@pytest.mark.parametrize(("round_", "dtype"), FORMATS)
def test_values_of_the_format_stay(round_: Round, dtype: torch.dtype) -> None:
    known = all_values(dtype)
    known = known[known.abs() <= 448]
    assert torch.equal(round_(known, 3, 0).float(), known)


@pytest.mark.parametrize("mutant", [None, "no-index"])
def test_parts_round_as_the_whole(mutant: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if mutant:
        bits = stochastic_rounding.random_bits
        monkeypatch.setattr(stochastic_rounding, "random_bits", lambda key, first, like: bits(key, 0, like))
    values = torch.randn(64, 32)
    parts = torch.cat([to_bfloat16(values[:40], 5, 0), to_bfloat16(values[40:], 5, 40 * 32)])
    assert torch.equal(parts, to_bfloat16(values, 5, 0)) == (mutant is None)
    assert not torch.equal(to_bfloat16(values, 6, 0), to_bfloat16(values, 5, 0))
