"""Accelerators by name: what their makers state of one, for plans made elsewhere."""

from __future__ import annotations

from typing import NamedTuple


class Accelerator(NamedTuple):
    """One device: memory and dense bf16 operations, and what it sends to others, in each direction."""

    memory: int
    """Bytes."""
    flops: float
    """bf16 operations a second, of dense matrix products."""
    link: float
    """Bytes a second to the other devices of its node."""
    network: float
    """Bytes a second to another node: one 400 Gb/s (A100: 200 Gb/s) adapter for each device."""


ACCELERATORS = {
    "a100": Accelerator(80 * 10**9, 312e12, 300e9, 25e9),
    "h100": Accelerator(80 * 10**9, 989e12, 450e9, 50e9),
    "h200": Accelerator(141 * 10**9, 989e12, 450e9, 50e9),
    "b200": Accelerator(180 * 10**9, 2250e12, 900e9, 50e9),
}
"""SXM forms, from the data sheets of NVIDIA."""
DEVICES_PER_NODE = 8
