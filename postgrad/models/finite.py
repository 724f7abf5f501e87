"""NaN and infinite values in tensors of a file: an error where they are read, not a loss of NaN long afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from postgrad.errors import ModelError, PostgradError


def has_non_finite(tensor: Tensor) -> bool:
    """Whether a tensor has NaN or infinite values.

    One of them makes the sum non-finite, and hardly anything else does: one pass over the memory in almost all cases.
    """
    if not tensor.is_floating_point():
        return False
    values = tensor.float() if tensor.dtype.itemsize < 2 else tensor
    return not bool(values.sum().isfinite()) and not bool(values.isfinite().all())


@torch.no_grad()
def refuse_non_finite(
    tensors: Iterable[tuple[str, Tensor]], owner: str, *, where: str, error: type[PostgradError] = ModelError
) -> None:
    """Raise `error` for the first of the named tensors of `owner` with NaN or infinite values."""
    for name, tensor in tensors:
        if has_non_finite(tensor):
            raise error(
                f"{name} of {owner} has NaN or infinite values",
                where=where,
                expected="finite weights",
                hint="its training diverged, or the file is damaged: take an earlier checkpoint, or download it again",
            )


@contextmanager
def sampling_errors(where: str) -> Iterator[None]:
    """Inside, torch's error for probabilities that are no numbers is a `ModelError`."""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise ModelError(
            "the model's predictions are NaN or infinite",
            where=where,
            expected="finite logits",
            hint="evaluate an earlier checkpoint: its weights may have grown too large",
        ) from error
