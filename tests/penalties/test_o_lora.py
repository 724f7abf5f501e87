"""O-LoRA's term: its gradient is autograd's, it is added once, and it does what it is for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from postgrad.errors import TuningError
from postgrad.penalties.o_lora import OrthogonalityPenalty
from postgrad.penalties.penalty import Penalty


def layers(seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """New and earlier A's of three layers, of different ranks and widths."""
    generator = torch.Generator().manual_seed(seed)
    new = [torch.randn(r, i, generator=generator).requires_grad_() for r, i in ((4, 7), (4, 12), (2, 7))]
    earlier = [torch.randn(e, n.shape[1], generator=generator) for e, n in zip((4, 8, 3), new, strict=True)]
    return new, earlier


def written(new: list[Tensor], earlier: list[Tensor], strength: float) -> Tensor:
    """The term as a loss."""
    return strength * sum((e @ n.T).abs().sum() for n, e in zip(new, earlier, strict=True))


@pytest.mark.parametrize("strength", [0.5, 3.0])
def test_value_and_gradient_are_those_of_the_written_loss(strength: float) -> None:
    new, earlier = layers()
    loss = written(new, earlier, strength)
    expected = torch.autograd.grad(loss, new)
    penalty: Penalty = OrthogonalityPenalty(new, earlier, strength)
    value = penalty()
    assert value.shape == () and not value.requires_grad
    torch.testing.assert_close(value, loss.detach())
    for n, gradient in zip(new, expected, strict=True):
        torch.testing.assert_close(n.grad, gradient)


def test_is_added_to_the_gradient_that_is_there() -> None:
    new, earlier = layers()
    there = [torch.randn_like(n) for n in new]
    for n, g in zip(new, there, strict=True):
        n.grad = g.clone()
    expected = torch.autograd.grad(written(new, earlier, 0.5), new)
    OrthogonalityPenalty(new, earlier, 0.5)()
    for n, g, more in zip(new, there, expected, strict=True):
        torch.testing.assert_close(n.grad, g + more)


def test_zero_strength_leaves_the_gradient_as_it_was_to_the_bit() -> None:
    new, earlier = layers()
    there = [torch.randn_like(n) for n in new]
    for n, g in zip(new, there, strict=True):
        n.grad = g.clone()
    assert OrthogonalityPenalty(new, earlier, 0.0)() == 0.0
    assert all(torch.equal(n.grad, g) for n, g in zip(new, there, strict=True))


def test_neither_the_earlier_directions_nor_the_new_ones_are_moved_by_pulling() -> None:
    new, earlier = layers()
    before = [t.detach().clone() for t in (*new, *earlier)]
    OrthogonalityPenalty(new, earlier, 0.5)()
    assert all(torch.equal(t, b) for t, b in zip((*new, *earlier), before, strict=True))
    assert all(e.grad is None for e in earlier)


def test_orthogonal_rows_cost_nothing() -> None:
    eye = torch.eye(6)
    new = [eye[:2].clone().requires_grad_()]
    assert OrthogonalityPenalty(new, [eye[2:]], 1.0)() == 0.0
    assert OrthogonalityPenalty(new, [eye], 1.0)() == 2.0


def test_following_it_makes_the_rows_orthogonal() -> None:
    new, earlier = layers()
    penalty = OrthogonalityPenalty(new, earlier, 1.0)
    optimizer = torch.optim.SGD(new, lr=1.0)
    start = penalty()
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 400)
        optimizer.zero_grad()
        penalty()
        optimizer.step()
    assert penalty() < 0.05 * start


def test_what_does_not_belong_together_is_refused() -> None:
    new, earlier = layers()
    with pytest.raises(TuningError, match="3 layers of the new adapter and 2 of earlier"):
        OrthogonalityPenalty(new, earlier[:2], 0.5)
    with pytest.raises(TuningError, match="0 layers of the new"):
        OrthogonalityPenalty([], [], 0.5)
    with pytest.raises(TuningError, match="equal numbers of columns"):
        OrthogonalityPenalty(new[:1], earlier[1:2], 0.5)


@pytest.fixture
def mesh() -> Iterator[dist.DeviceMesh]:
    """One rank that works as in a group of many."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_split_masters_give_the_same(mesh: dist.DeviceMesh) -> None:
    plain, earlier = layers()
    split = [distribute_tensor(n.detach(), mesh, [Shard(0)]).requires_grad_() for n in plain]
    assert torch.equal(OrthogonalityPenalty(split, earlier, 0.5)(), OrthogonalityPenalty(plain, earlier, 0.5)())
    for s, p in zip(split, plain, strict=True):
        assert isinstance(s.grad, DTensor)
        assert torch.equal(s.grad.full_tensor(), p.grad)
