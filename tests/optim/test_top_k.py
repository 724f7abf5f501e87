"""The largest numbers of a tensor: exactly as many as asked for, the same however they are found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from postgrad.optim import top_k as l
from postgrad.optim.top_k import share_count, top_k_masks


def drawn(seed: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(size, generator=generator) * torch.randn(size, generator=generator).exp()).abs()


CASES = {
    "plain": drawn(0, 1000),
    "matrix": drawn(1, 1200).reshape(30, 40),
    "ties": torch.randint(0, 4, (500,), generator=torch.Generator().manual_seed(2)).float(),
    "zeros": torch.cat([torch.zeros(90), drawn(3, 10)]),
    "all equal": torch.full((64,), 2.5),
    "tiny and huge": torch.tensor([1e-45, 3.4e38, 0.0, 1e-30, 1.0, 1.0000001]),
    "one": torch.tensor([3.0]),
}


def by_hand(size: Tensor, count: int) -> Tensor:
    """The first `count` of a stable sort, largest first."""
    mask = torch.zeros(size.numel(), dtype=torch.bool)
    mask[size.flatten().argsort(descending=True, stable=True)[:count]] = True
    return mask.view_as(size)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 1.0])
def test_they_are_the_first_of_a_stable_sort(name: str, share: float) -> None:
    size = CASES[name]
    count = share_count(share, size.numel())
    (mask,) = top_k_masks([size], [count], [size])
    assert int(mask.sum()) == count
    assert torch.equal(mask, by_hand(size, count))


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 1.0])
def test_digits_find_the_edge_that_sorting_finds(share: float) -> None:
    sizes = list(CASES.values())
    counts = [share_count(share, size.numel()) for size in sizes]
    edges = l._threshold_by_digits(sizes, torch.tensor(counts), sizes[0])
    assert torch.equal(edges, l._threshold_by_sorting(sizes, counts))
    for size, count, edge in zip(sizes, counts, edges, strict=True):
        assert edge == size.flatten().sort(descending=True).values[count - 1]


def test_digits_that_lack_bits_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(l, "DIGITS", l.DIGITS[:2])
    sizes = [drawn(0, 1000)]
    assert not torch.equal(
        l._threshold_by_digits(sizes, torch.tensor([100]), sizes[0]), l._threshold_by_sorting(sizes, [100])
    )


def test_a_share_is_at_least_one_number() -> None:
    assert [share_count(share, 10) for share in (0.01, 0.1, 0.25, 0.35, 1.0)] == [1, 1, 2, 4, 10]
    assert top_k_masks([], [], []) == []
