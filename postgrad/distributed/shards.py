"""Local shards of tensors, and sums over shards or ranks. On tensors that are no DTensors all of this does nothing.

Under FSDP2 every master is split by rows over the ranks, or over those of each replica. Element-wise work (a penalty, a mask)
runs on the local rows; only sums are collective.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard


def local_shard(tensor: Tensor) -> Tensor:
    """The rows of this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The rows of an unsharded tensor that this rank would hold if it were sharded as `like`: a view, without communication."""
    if not isinstance(like, DTensor):
        return tensor
    shard = tensor
    for axis, placement in enumerate(like.placements):
        if isinstance(placement, Shard):
            ranks, rank = like.device_mesh.size(axis), like.device_mesh.get_local_rank(axis)
            # With fewer rows than ranks the last ranks hold none.
            chunks = shard.chunk(ranks, placement.dim)
            shard = chunks[rank] if rank < len(chunks) else shard.narrow(placement.dim, 0, 0)
    return shard


def first_row(tensor: Tensor) -> int:
    """The number of this rank's first row in the whole tensor."""
    if not isinstance(tensor, DTensor):
        return 0
    axis = shard_axis(tensor)
    rows_per_rank = -(-tensor.shape[0] // tensor.device_mesh.size(axis))
    return min(tensor.shape[0], tensor.device_mesh.get_local_rank(axis) * rows_per_rank)


def to_dtensor(shard: Tensor, like: Tensor) -> Tensor:
    """A local shard as a DTensor of the shape and placement of `like`."""
    if not isinstance(like, DTensor):
        return shard
    return DTensor.from_local(shard, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def full_tensor(tensor: Tensor) -> Tensor:
    """The unsharded tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_axis(tensor: DTensor) -> int:
    """The dimension of its mesh that a tensor is sharded over; the others, if any, hold replicas."""
    return next(axis for axis, placement in enumerate(tensor.placements) if isinstance(placement, Shard))


def sum_over_shards(value: Tensor, like: Tensor) -> Tensor:
    """The sum of what each rank has computed of its rows of `like`; replicas of the rows count once."""
    if not isinstance(like, DTensor):
        return value
    placements = [Partial() if isinstance(placement, Shard) else Replicate() for placement in like.placements]
    return DTensor.from_local(value, like.device_mesh, placements).full_tensor()


def sum_over_ranks(value: Tensor, like: Tensor) -> Tensor:
    """The sum of what each rank has computed of its own rows of the data; `like`: a weight."""
    if not isinstance(like, DTensor):
        return value
    return DTensor.from_local(value, like.device_mesh, [Partial()] * like.device_mesh.ndim).full_tensor()


def local_gradient(master: Tensor) -> Tensor:
    """This rank's rows of a master's gradient, to add to; created as zeros when there is none yet."""
    if master.grad is None:
        master.grad = torch.zeros_like(master)
    return local_shard(master.grad)
