"""Errors of transformers' own code as errors of the model: which layer fails, and on what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from postgrad.errors import ModelError, PostgradError, first_line

RELOAD = "load the folder with transformers and call it on a few ids: the error is the same there"
SHORTER = "shorter rows may help (data.sequence_length); otherwise use another architecture"


@contextmanager
def as_model_error(pretrained: PreTrainedModel, what: str, hint: str = RELOAD) -> Iterator[None]:
    """Inside, any error but those of the package and of a device's memory is a `ModelError` that names the innermost layer.

    `what`: the computation, such as "the forward pass".
    """
    try:
        yield
    except (PostgradError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        layer = _innermost_layer(error)
        raise ModelError(
            f"{what} of this model ({pretrained.config.model_type}) fails in transformers{layer and f', in {layer}'}: "
            f"{first_line(error)}",
            where="model",
            expected="a configuration that transformers can compute with",
            hint=hint,
        ) from error


def _innermost_layer(error: BaseException) -> str:
    """The class of the innermost module of transformers that was computing; empty if there is none."""
    found, trace = "", error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and type(owner).__module__.startswith("transformers."):
            found = type(owner).__name__
        trace = trace.tb_next
    return found
