"""Memory of a training step, estimated from shapes.

Legend: N weights, M of them trainable, B rows at once, T positions, D width, L layers, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from postgrad.errors import OutOfMemoryError

_ALLOCATOR_ERRORS = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Parts of the messages of torch's allocators, which raise a plain `RuntimeError` on a CPU."""


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
    tables: int = 0
    """Weights of the input embedding and the output head."""


@dataclass(frozen=True)
class StateDtypes:
    """How the optimizer holds moments and trained weights (None: in fp32), and whether it holds the whole gradient."""

    moments: Literal["bfloat16", "float8"] | None = None
    masters: Literal["bfloat16"] | None = None
    releases_gradients: bool = False
    """Whether a gradient is dropped in the backward pass, when its weight is updated."""


_FP32_STATE = StateDtypes()
_MOMENT_BYTES = {None: 8.0, "bfloat16": 4.0, "float8": 2 + 2 * 4 / 128}
"""Of both moments of a weight; float8 has an fp32 scale for at most 256 of them."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by purpose."""

    weights: int
    gradients: int
    moments: int
    activations: int
    teachers: int = 0
    process: int = 0
    """Python and its libraries, before a model is loaded."""
    is_measured: bool = False
    """Whether the peak was measured; otherwise it follows from shapes."""

    @property
    def total(self) -> int:
        return self.process + self.weights + self.gradients + self.moments + self.activations + self.teachers


def estimate_memory(
    shape: ModelDimensions,
    *,
    rows: int,
    length: int,
    bf16: bool,
    checkpointing: bool,
    sdpa: bool,
    ranks: int = 1,
    state: StateDtypes = _FP32_STATE,
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
    # Input embedding and head are trained in fp32.
    in_bf16 = trainable - min(trainable, shape.tables // ranks) if state.masters else 0
    trained = (4 + (2 if bf16 else 0)) * (trainable - in_bf16) + 2 * in_bf16
    gradients = trained
    if state.releases_gradients:  # those of a block or of the embeddings are complete at once
        largest = max(shape.tables, (shape.trainable - shape.tables) // max(1, shape.layers)) // ranks
        gradients = min(trained, (4 + (2 if bf16 else 0)) * largest)
    return MemoryEstimate(
        weights=trained + item * frozen,
        gradients=gradients,
        moments=round(_MOMENT_BYTES[state.moments] * trainable),
        activations=activations + (1 << 25) * 6,  # a chunk of logits in the loss
    )


@contextmanager
def memory_errors(where: str, hint: str) -> Iterator[None]:
    """Inside, Python's and torch's errors for want of memory become an `OutOfMemoryError` with `hint`: what takes less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        request = re.search(r"allocate (\d[\d.]* ?\w+)", str(error))
        raise OutOfMemoryError(
            f"out of memory{f' (an allocation of {request[1]})' if request else ''}", where=where, hint=hint
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is for want of memory, of the machine or the accelerator."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(part in str(error) for part in _ALLOCATOR_ERRORS)
    )


def format_bytes(count: float) -> str:
    """Human-readable bytes: 512 MB, 1.4 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
