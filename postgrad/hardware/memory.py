"""How much memory does a training step take? An estimate from shapes, for the plan.

Legend: N weights, M of them trainable, B rows at once, T positions, D width, L layers, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelDimensions:
    """What the estimates need to know of a model."""

    parameters: int
    trainable: int
    layers: int
    width: int
    inner: int
    heads: int
    vocabulary: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by what they are for."""

    weights: int
    gradients: int
    moments: int
    activations: int
    teachers: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.moments + self.activations + self.teachers


def estimate_memory(
    shape: ModelDimensions, *, rows: int, length: int, bf16: bool, checkpointing: bool, sdpa: bool, ranks: int = 1
) -> MemoryEstimate:
    """Bytes a device holds during a step, state sharded over `ranks`.

    Activations follow Korthikanti et al. 2022 (arXiv 2205.05198, equation 2), with the feed-forward's real width: about
    `B T (10 D + 3 I)` numbers a layer beside attention scores `B h T^2`, which SDPA does not keep.
    """
    item = 2 if bf16 else 4
    moving = shape.trainable // ranks
    frozen = (shape.parameters - shape.trainable) // ranks
    per_layer = rows * length * (10 * shape.width + 3 * shape.inner) * item
    if not sdpa:
        per_layer += rows * shape.heads * length * length * (2 * item)
    kept = rows * length * shape.width * item * shape.layers + per_layer if checkpointing else per_layer * shape.layers
    return MemoryEstimate(
        weights=(4 + (2 if bf16 else 0)) * moving + item * frozen,
        gradients=(4 + (2 if bf16 else 0)) * moving,
        moments=8 * moving,
        activations=kept + (1 << 25) * 6,  # the loss works on chunks of logits of about this size
    )


def format_bytes(count: float) -> str:
    """Bytes for people: 512 MB, 1.4 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
