"""How AdamW's moments are held between updates: in fp32, in bfloat16, or in float8 with a scale for each block.

Float8 (e4m3, 3 bits of mantissa) covers 5 decades, and a block's scale places them: the largest magnitude of the block becomes
448. The second moment is held as its square root, which doubles the decades that it covers. Both formats are rounded
stochastically: with a decay rate of .999 the second moment moves by a thousandth at each step, which rounding to the nearest
loses.

Blocks lie along the last dimension, so the rows of a sharded tensor have their own scales, whatever the number of ranks.
Vectors, and matrices of short rows, stay in fp32: they are few. Blockwise scales are those of 8-bit Adam (Dettmers et al. 2022,
arXiv 2110.02861).
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from postgrad.distributed.shards import local_shard, local_shard_like
from postgrad.optim.stochastic_rounding import FLOAT8_MAX, to_bfloat16, to_float8

MomentDtype = Literal["float32", "bfloat16", "float8"]
_SCALE = "_scale"
_MIN_BLOCK, _MAX_BLOCK = 32, 256
_SQUARED = "exp_avg_sq"


class MomentFormat(Protocol):
    """Reads and writes one moment of one weight, in fp32, in a state that holds it in another form."""

    def empty(self, name: str, like: Tensor) -> dict[str, Tensor]:
        """Zeros: the tensors of a moment of a weight, sharded as the weight."""
        ...

    def read(self, state: Mapping[str, Tensor], name: str, rows: slice) -> Tensor:
        """Some of this rank's rows."""
        ...

    def write(self, state: Mapping[str, Tensor], name: str, rows: slice, value: Tensor, key: int, first: int) -> None:
        """Replace these rows; `key`, `first`: of the random bits, see `stochastic_rounding.random_bits`."""
        ...


class _Float32:
    def empty(self, name: str, like: Tensor) -> dict[str, Tensor]:
        return {name: torch.zeros_like(like, dtype=torch.float32).detach()}

    def read(self, state: Mapping[str, Tensor], name: str, rows: slice) -> Tensor:
        return local_shard(state[name])[rows]

    def write(self, state: Mapping[str, Tensor], name: str, rows: slice, value: Tensor, key: int, first: int) -> None:
        """The optimizer has changed the rows in place."""


class _BFloat16:
    def empty(self, name: str, like: Tensor) -> dict[str, Tensor]:
        return {name: torch.zeros_like(like, dtype=torch.bfloat16).detach()}

    def read(self, state: Mapping[str, Tensor], name: str, rows: slice) -> Tensor:
        return local_shard(state[name])[rows].float()

    def write(self, state: Mapping[str, Tensor], name: str, rows: slice, value: Tensor, key: int, first: int) -> None:
        local_shard(state[name])[rows] = to_bfloat16(value, key, first)


class _Float8:
    def empty(self, name: str, like: Tensor) -> dict[str, Tensor]:
        blocks = like.shape[-1] // block_size(like.shape[-1])
        scale = torch.zeros(*local_shard(like).shape[:-1], blocks, device=like.device)
        if isinstance(like, DTensor):
            shape = torch.Size([*like.shape[:-1], blocks])
            stride = torch.empty(shape, device="meta").stride()
            scale = DTensor.from_local(scale, like.device_mesh, like.placements, shape=shape, stride=stride)
        codes = torch.zeros_like(like, dtype=torch.float8_e4m3fn).detach()
        return {name: codes, name + _SCALE: scale}

    def read(self, state: Mapping[str, Tensor], name: str, rows: slice) -> Tensor:
        return _decode(local_shard(state[name])[rows], local_shard(state[name + _SCALE])[rows], name)

    def write(self, state: Mapping[str, Tensor], name: str, rows: slice, value: Tensor, key: int, first: int) -> None:
        scales = local_shard(state[name + _SCALE])[rows]
        blocks = (value.sqrt() if name == _SQUARED else value).unflatten(-1, (scales.shape[-1], -1))
        scales.copy_(blocks.abs().amax(-1) / FLOAT8_MAX)
        # Of a block of zeros the scale is zero.
        scaled = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        codes = to_float8(scaled.flatten(-2), key, first)
        local_shard(state[name])[rows] = codes


def _decode(codes: Tensor, scales: Tensor, name: str) -> Tensor:
    value = (codes.float().unflatten(-1, (scales.shape[-1], -1)) * scales[..., None]).flatten(-2)
    return value.square_() if name == _SQUARED else value


def block_size(row: int) -> int:
    """Entries that share a scale: the largest divisor of a row's length from 32 to 256, else the whole row."""
    return next((size for size in range(min(_MAX_BLOCK, row), _MIN_BLOCK - 1, -1) if row % size == 0), row)


_FLOAT32 = _Float32()
_FORMATS: Mapping[MomentDtype, MomentFormat] = {"float32": _FLOAT32, "bfloat16": _BFloat16(), "float8": _Float8()}


def choose_format(dtype: MomentDtype, weight: Tensor) -> MomentFormat:
    """The format of a weight's moments: fp32 for vectors and short rows."""
    return _FORMATS[dtype] if weight.ndim >= 2 and weight.shape[-1] >= _MIN_BLOCK else _FLOAT32


def restore_moment(
    stored: Mapping[str, Tensor], prefix: str, name: str, state: MutableMapping[str, Tensor], format: MomentFormat
) -> bool:
    """Copy a stored moment into a state, from whatever format it was stored in; False if there is none.

    `prefix`: of its name among the stored ones. In the same format the bits are copied.
    """
    if prefix + name not in stored:
        return False
    codes, scale = stored[prefix + name], stored.get(prefix + name + _SCALE)
    out = state[name]
    if codes.dtype == out.dtype and (scale is None) == (name + _SCALE not in state):
        local_shard(out).copy_(local_shard_like(codes, out))
        if scale is not None:
            local_shard(state[name + _SCALE]).copy_(local_shard_like(scale, state[name + _SCALE]))
        return True
    rows = local_shard_like(codes, out)
    value = rows.float() if scale is None else _decode(rows, local_shard_like(scale, out), name)
    everything = slice(None)
    if format is _FLOAT32:
        local_shard(out).copy_(value)
    else:
        format.write(state, name, everything, value.to(local_shard(out).device), 0, 0)
    return True
