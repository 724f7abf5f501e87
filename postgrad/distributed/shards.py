"""Which part of a tensor is on this rank, and what do all parts together give?

Under FSDP2 every master is split by rows over the ranks. A penalty that treats each number by itself works on the rows that a
rank has and only ever meets the others for its value.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Shard


def local_shard(tensor: Tensor) -> Tensor:
    """The rows that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The rows of a whole tensor that belong to this rank's rows of `like`: a view, and no other rank is asked."""
    if not isinstance(like, DTensor):
        return tensor
    part = tensor
    for axis, placement in enumerate(like.placements):
        if isinstance(placement, Shard):
            ranks, here = like.device_mesh.size(axis), like.device_mesh.get_local_rank(axis)
            cut = part.chunk(ranks, placement.dim)
            part = cut[here] if here < len(cut) else part.narrow(placement.dim, 0, 0)
    return part


def to_dtensor(part: Tensor, like: Tensor) -> Tensor:
    """This rank's rows as what they are: a part of a tensor of the shape of `like`, which `whole` puts together."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def full_tensor(tensor: Tensor) -> Tensor:
    """All rows, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sum_over_ranks(value: Tensor, like: Tensor) -> Tensor:
    """The sum over the ranks that `like` is split over."""
    if not isinstance(like, DTensor):
        return value
    return DTensor.from_local(value, like.device_mesh, [Partial()] * like.device_mesh.ndim).full_tensor()


def local_gradient(master: Tensor) -> Tensor:
    """This rank's rows of a master's gradient, to be added to; zeros become it where there is none yet."""
    if master.grad is None:
        master.grad = torch.zeros_like(master)
    return local_shard(master.grad)
