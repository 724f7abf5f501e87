"""What writes a soft prompt's vectors while it trains?

Legend: P vectors of the prompt, D their width, H width of the encoder, X width of what a layer reads.

P-tuning (Liu et al. 2021, arXiv 2103.10385, section 3.2) lets a small network write the vectors, so that they depend on
one another; only what it wrote is kept afterwards.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from postgrad.errors import TuningError


class LSTMEncoder(nn.Module):
    """P-tuning's encoder: a bidirectional LSTM of two layers, then Linear(2H, D), ReLU, Linear(D, D).

    With H = D // 2 (the default) it is the one of the LAMA code, with H = D the one of the SuperGLUE code. It is made of
    cells because the kernels of `nn.LSTM` differ in the last bits with and without gradients, want their weights to stay
    where they are in memory, and cannot be compiled.
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
        for ahead, back in zip(self.forward_cells, self.backward_cells, strict=True):
            hidden_PX = torch.cat([_run_cell(ahead, hidden_PX), _run_cell(back, hidden_PX.flip(0)).flip(0)], -1)
        return self.mlp(hidden_PX)


def _run_cell(cell: nn.Module, inputs_PX: Tensor) -> Tensor:
    """One direction of one layer, of shape (P, H)."""
    states, before = [], None
    for input_1X in inputs_PX.split(1):
        before = cell(input_1X, before)
        states.append(before[0])
    return torch.cat(states)


def _make_mlp(width: int, hidden: int | None) -> nn.Module:
    """The MLP of P-tuning's SuperGLUE code: Linear(D, H), ReLU, Linear(H, D), with H = D unless told."""
    inner = width if hidden is None else hidden
    return nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width))


def _make_identity(_width: int, hidden: int | None) -> nn.Module:
    """The vectors as they are. Raises `TuningError` for a width that nothing would read."""
    if hidden is not None:
        raise TuningError(
            "`hidden` is given, and a prompt without an encoder does not read it",
            where="tuning.hidden",
            expected="encoder: lstm or mlp",
            hint="leave `hidden` out, or choose an encoder",
        )
    return nn.Identity()


ENCODERS: dict[str, Callable[[int, int | None], nn.Module]] = {
    "none": _make_identity,
    "lstm": LSTMEncoder,
    "mlp": _make_mlp,
}
