"""Encoders that compute a soft prompt's vectors during training.

Legend: P vectors of the prompt, D their width, H width of the encoder, X width of a layer's input.

In P-tuning (Liu et al. 2021, arXiv 2103.10385, section 3.2) a small network computes the vectors, so that they depend on one
another; only its output is kept after training.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from postgrad.errors import TuningError


class LSTMEncoder(nn.Module):
    """P-tuning's encoder: a bidirectional LSTM of two layers, then Linear(2H, D), ReLU, Linear(D, D).

    H = D // 2 (the default) is the LAMA code's, H = D the SuperGLUE code's. Built from cells because the kernels of `nn.LSTM`
    differ in the last bits with and without gradients, need their weights at fixed addresses, and cannot be compiled.
    """

    def __init__(self, width: int, hidden: int | None) -> None:
        super().__init__()
        inner = width // 2 if hidden is None else hidden
        self.forward_cells = nn.ModuleList([nn.LSTMCell(width, inner), nn.LSTMCell(2 * inner, inner)])
        self.backward_cells = nn.ModuleList([nn.LSTMCell(width, inner), nn.LSTMCell(2 * inner, inner)])
        self.mlp = nn.Sequential(nn.Linear(2 * inner, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, inputs_PD: Tensor) -> Tensor:
        """Vectors of shape (P, D)."""
        hidden_PX = inputs_PD
        for forward, backward in zip(self.forward_cells, self.backward_cells, strict=True):
            hidden_PX = torch.cat([_run_cell(forward, hidden_PX), _run_cell(backward, hidden_PX.flip(0)).flip(0)], -1)
        return self.mlp(hidden_PX)


def _run_cell(cell: nn.Module, inputs_PX: Tensor) -> Tensor:
    """Outputs of one direction of one layer, of shape (P, H)."""
    outputs, state = [], None
    for input_1X in inputs_PX.split(1):
        state = cell(input_1X, state)
        outputs.append(state[0])
    return torch.cat(outputs)


def _make_mlp(width: int, hidden: int | None) -> nn.Module:
    """The MLP of P-tuning's SuperGLUE code: Linear(D, H), ReLU, Linear(H, D), H = D by default."""
    inner = width if hidden is None else hidden
    return nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width))


def _make_identity(_width: int, hidden: int | None) -> nn.Module:
    """No encoder. Raises `TuningError` for a width, which would have no effect."""
    if hidden is not None:
        raise TuningError(
            "`hidden` has no effect on a prompt without an encoder",
            where="tuning.hidden",
            expected="encoder: lstm or mlp",
            hint="remove `hidden`, or choose an encoder",
        )
    return nn.Identity()


ENCODERS: dict[str, Callable[[int, int | None], nn.Module]] = {
    "none": _make_identity,
    "lstm": LSTMEncoder,
    "mlp": _make_mlp,
}
