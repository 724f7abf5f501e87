"""Stochastic rounding to bfloat16 and to float8 (e4m3), with random bits that are a pure function of a key and an index.

A number between two neighbours of the narrow format becomes the upper one with the probability of its distance from the lower
one, so the mean of many roundings is the number itself, and updates far below half a unit in the last place are kept on average
(Gupta et al. 2015, arXiv 1502.02551). Rounding to the nearest loses them.

The random bits of an entry depend on the key and on its place in the whole tensor, so ranks that hold parts of the tensor round
as one process does, and a resumed run rounds as an uninterrupted one.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BFLOAT16_DROPPED, _FLOAT8_DROPPED = 16, 20
"""Bits of an fp32 mantissa that the formats lack."""
_FLOAT8_SMALLEST_NORMAL = 2.0**-6
"""Smaller float8 values have the spacing of this one."""
FLOAT8_MAX = 448.0
_INDEX_BITS = 30


def random_bits(key: int, first: int, like: Tensor) -> Tensor:
    """32 random bits for each entry of `like`, the first of which has this index in the whole tensor.

    The mixing function is that of https://github.com/skeeto/hash-prospector (`lowbias32`).
    """
    first %= 1 << _INDEX_BITS
    bits = torch.arange(first, first + like.numel(), dtype=torch.int32, device=like.device)
    bits.mul_(_as_int32(0x9E3779B1)).add_(_as_int32(key))  # int32 wraps
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits.bitwise_xor_((bits >> shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(_as_int32(factor))
    return bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF)).view(like.shape)


def _as_int32(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


def _round_mantissa(value: Tensor, dropped: int, random: Tensor) -> Tensor:
    """fp32 values whose last `dropped` bits are zero."""
    lowest = (1 << dropped) - 1
    return (value.view(torch.int32) + (random & lowest)).bitwise_and_(~lowest).view(torch.float32)


def to_bfloat16(value: Tensor, key: int, first: int) -> Tensor:
    """fp32 values in bfloat16; see `random_bits` for `key` and `first`."""
    return _round_mantissa(value.contiguous(), _BFLOAT16_DROPPED, random_bits(key, first, value)).bfloat16()


def to_float8(value: Tensor, key: int, first: int) -> Tensor:
    """fp32 values of at most 448 in float8 (e4m3)."""
    # Raised by the smallest normal value, a smaller one has the spacing that float8 has there.
    lift = torch.where(value.abs() < _FLOAT8_SMALLEST_NORMAL, _FLOAT8_SMALLEST_NORMAL, 0.0).copysign_(value)
    rounded = _round_mantissa(value + lift, _FLOAT8_DROPPED, random_bits(key, first, value)).sub_(lift)
    return rounded.clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn)
