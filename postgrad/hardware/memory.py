"""Memory of a training step, estimated from shapes.

Legend: N weights, M of them trainable, B rows at once, T positions, D width, L layers, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelDimensions:
    """The sizes of a model that determine its memory."""

    parameters: int
    trainable: int
    layers: int
    width: int
    inner: int
    heads: int
    vocabulary: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by purpose."""

    weights: int
    gradients: int
    moments: int
    activations: int
    teachers: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + self.activations + self.teachers


def estimate_memory(
    shape: ModelDimensions, *, rows: int, length: int, bf16: bool, checkpointing: bool, sdpa: bool, ranks: int = 1
) -> MemoryEstimate:
    """Bytes on one device during a step, with state sharded over `ranks`.

    Activations follow Korthikanti et al. 2022 (arXiv 2205.05198, equation 2), with the actual width of the MLP: about
    `B T (10 D + 3 I)` numbers a layer, plus attention scores `B h T^2`, which SDPA does not store.
    """
    item = 2 if bf16 else 4
    trainable = shape.trainable // ranks
    frozen = (shape.parameters - shape.trainable) // ranks
    per_layer = rows * length * (10 * shape.width + 3 * shape.inner) * item
    if not sdpa:
        per_layer += rows * shape.heads * length * length * (2 * item)
    # With activation checkpointing: the inputs of all layers, and the activations of the one being recomputed.
    activations = (
        rows * length * shape.width * item * shape.layers + per_layer if checkpointing else per_layer * shape.layers
    )
    return MemoryEstimate(
        weights=(4 + (2 if bf16 else 0)) * trainable + item * frozen,
        gradients=(4 + (2 if bf16 else 0)) * trainable,
        moments=8 * trainable,
        activations=activations + (1 << 25) * 6,  # a chunk of logits in the loss
    )


def format_bytes(count: float) -> str:
    """Human-readable bytes: 512 MB, 1.4 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
