"""Isolation of packed documents: whether the documents of a row see each other in a model, and which layer is the cause.

Legend: B rows, T tokens of a row, K tokens of a document.

Nothing is assumed of an architecture. Two rows differ in their first document alone; whatever differs behind it has leaked. The
second document must also have the states that it has in a row of its own. A leak may be small (a short convolution reaches
over a few tokens) or show only in long rows (attention to compressed blocks), so the bound is that of rounding, and the rows
of a stage are tested at their own length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from postgrad.errors import ModelError
from postgrad.models.layers import get_embedding_weight

ForwardFunction = Callable[..., Tensor]
"""The last hidden states (B, T, D) for `input_ids` and, in packed rows, `position_ids`."""
UNSUPPORTED = (AttributeError, TypeError, ValueError, RuntimeError, LookupError)
"""What an architecture of transformers raises that does not take an argument or a cache; also for want of memory."""
SHORT_DOCUMENT = 24
"""Tokens of a document in the test of every model."""
_ROUNDING = 2e-6
"""Relative difference between equal computations on rows of one batch."""
_RECURRENT_PARTS = ("A_log", "slope_rate")
"""Decay rates of the states of recurrent layers, by their names in transformers."""
_UNAWARE = "which takes no notice of position ids that restart"
_ROUNDING_ALONE = 1e-4
"""Relative difference between computations on rows of different shapes."""


@dataclass(frozen=True)
class Leak:
    """A layer that carries information from one document of a row to the next, and by what."""

    layer: str
    """Its class."""
    cause: str

    def describe(self) -> str:
        """The leak as a sentence."""
        return f"packed documents attend to each other in {self.layer}: {self.cause}"

    def as_error(self, pretrained: PreTrainedModel) -> ModelError:
        """The error of packed rows in a model that leaks."""
        return ModelError(
            f"{self.describe()} ({pretrained.config.model_type})",
            where="data.packing",
            expected="a model whose layers keep the documents of a row apart",
            hint="leave data.packing out, or set it to false: then each document is a row of its own",
        )


@torch.no_grad()
def find_leak(pretrained: PreTrainedModel, forward: ForwardFunction, row_length: int) -> Leak | None:
    """The leak between the documents of a packed row, in short rows and in those of `row_length`; None without one."""
    was_training = pretrained.training
    pretrained.eval()
    try:
        lengths = sorted({min(SHORT_DOCUMENT, row_length // 2), row_length // 2} - {0})
        return next((leak for length in lengths if (leak := _find_leak(pretrained, forward, length))), None)
    finally:
        pretrained.train(was_training)


def document_arguments(lengths: Sequence[int], device: torch.device) -> dict[str, Tensor | int]:
    """Where documents of these lengths begin in one row, as kernels of recurrent layers and of attention take it.

    `seq_idx`: the number of the document of each token; `cu_seq_lens_*`: the ends of all documents; `max_length_*`. Nothing is
    read from a device.
    """
    length_N = np.array(lengths, np.int32)
    numbers_T = np.repeat(np.arange(len(length_N), dtype=np.int32), length_N)
    ends_N = torch.from_numpy(np.cumsum(length_N, dtype=np.int32)).to(device, non_blocking=True)
    ends_N = nn.functional.pad(ends_N, (1, 0))
    longest = int(length_N.max())
    return {
        "seq_idx": torch.from_numpy(numbers_T)[None].to(device, non_blocking=True),
        "cu_seq_lens_q": ends_N,
        "cu_seq_lens_k": ends_N,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _find_leak(pretrained: PreTrainedModel, forward: ForwardFunction, length: int) -> Leak | None:
    ids_BT = random_ids(pretrained, (1, 2 * length)).repeat(2, 1)
    ids_BT[1, :length] = ids_BT[1, length:].flip(0)
    positions_BT = torch.arange(length, device=ids_BT.device).repeat(2, 2)
    try:
        hidden_BTD = forward(input_ids=ids_BT, position_ids=positions_BT)
    except TypeError as error:
        if "position_ids" not in str(error):
            raise
        return Leak(type(pretrained).__name__, "a model that takes no position ids")
    second_BKD = hidden_BTD[:, length:].float()
    scale = max(second_BKD.abs().max().item(), torch.finfo(torch.float32).tiny)
    if _difference(second_BKD[0], second_BKD[1]) > _ROUNDING * scale:
        with _first_leaking_layer(pretrained, length) as found:
            forward(input_ids=ids_BT, position_ids=positions_BT)
        name = found[0] if found else ""
        return Leak(type(pretrained.get_submodule(name)).__name__, _describe_cause(pretrained, name))
    alone_BKD = forward(input_ids=ids_BT[:1, length:], position_ids=positions_BT[:1, length:]).float()
    if _difference(second_BKD[:1], alone_BKD) > _ROUNDING_ALONE * scale:
        return Leak(type(pretrained.base_model).__name__, f"a model {_UNAWARE}")
    return None


@torch.no_grad()
def verify_right_padding(pretrained: PreTrainedModel, forward: ForwardFunction, length: int) -> None:
    """Verify in rows of `length` that padding after a text changes nothing in it. Raises `ModelError`."""
    size = max(1, length - 5)
    ids_BT = random_ids(pretrained, (2, length))
    alone_BTD, together_BTD = forward(input_ids=ids_BT[1:, :size]).float(), forward(input_ids=ids_BT).float()
    if _difference(together_BTD[1:, :size], alone_BTD) > _ROUNDING_ALONE * alone_BTD.abs().max().item():
        raise ModelError(
            f"what follows a text changes its states in this architecture ({pretrained.config.model_type})",
            where="model",
            expected="a causal language model",
        )


def random_ids(pretrained: PreTrainedModel, shape: tuple[int, int]) -> Tensor:
    """Ids of a fixed seed on the device of a model."""
    weight = get_embedding_weight(pretrained)
    return torch.randint(0, weight.shape[0], shape, generator=torch.Generator().manual_seed(0)).to(weight.device)


def _difference(one: Tensor, two: Tensor) -> float:
    return (one - two).abs().max().item()


@contextmanager
def _first_leaking_layer(pretrained: PreTrainedModel, length: int) -> Iterator[list[str]]:
    """Inside, lists the layers whose outputs for the second document differ between two rows, and whose inputs do not.

    Of a layer and those inside of it the inner one comes first. A part of transformers is named, not one of torch inside it.
    """
    found: list[str] = []

    def differs(value: Any) -> bool:
        return any(_second_document_differs(tensor, length) for tensor in _iter_tensors(value))

    def record(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
            if differs(output) and not differs((args, kwargs)):
                found.append(_named_layer(pretrained, name))

        return hook

    handles = [
        module.register_forward_hook(record(name), with_kwargs=True)
        for name, module in pretrained.named_modules()
        if name
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _iter_tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _iter_tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _iter_tensors(each)


def _second_document_differs(tensor: Tensor, length: int) -> bool:
    """Whether a tensor of two rows differs between them at the second document; of another shape it does not."""
    axis = next((i for i, size in enumerate(tensor.shape) if i and size == 2 * length), None)
    if axis is None or len(tensor) != 2 or not tensor.numel() or not tensor.is_floating_point():
        return False
    one, two = tensor.narrow(axis, length, length).float()
    return _difference(one, two) > _ROUNDING * max(one.abs().max().item(), torch.finfo(torch.float32).tiny)


def _named_layer(pretrained: PreTrainedModel, name: str) -> str:
    """The name of the innermost part around a layer whose class is not torch's own."""
    while type(pretrained.get_submodule(name)).__module__.startswith("torch.") and "." in name:
        name = name.rpartition(".")[0]
    return name


def _describe_cause(pretrained: PreTrainedModel, name: str) -> str:
    """By what a layer leaks, from its parts."""
    layer = pretrained.get_submodule(name)
    kind = type(layer).__name__
    if hasattr(layer, "compressor"):
        return "attention to compressed blocks of tokens"
    if hasattr(layer, "sinks"):
        return f"attention with sinks, {_UNAWARE}"
    if any(hasattr(layer, name) for name in _RECURRENT_PARTS) or getattr(pretrained, "_is_stateful", False):
        return "a recurrent layer, which carries its state on"
    if any(isinstance(part, nn.Conv1d) for part in layer.modules()):
        return "a convolution over tokens"
    if getattr(pretrained.config, "alibi", False) or pretrained.config.model_type in ("bloom", "mpt"):
        return f"attention with ALiBi, {_UNAWARE}"
    return f"attention, {_UNAWARE}" if "Attention" in kind else "its output depends on the documents before"
