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


class Lstm(nn.Module):
    """P-tuning's encoder: a bidirectional LSTM of two layers, then Linear(2H, D), ReLU, Linear(D, D).

    With H = D // 2 it is the one of the LAMA code (the default), with H = D the one of the SuperGLUE code. `nn.LSTM` only
    holds the weights: its kernels differ in the last bits with and without gradients, want their weights to stay where
    they are in memory, and cannot be compiled.
    """

    def __init__(self, width: int, hidden: int | None) -> None:
        super().__init__()
        inner = width // 2 if hidden is None else hidden
        self.lstm = nn.LSTM(width, inner, num_layers=2, bidirectional=True)
        self.mlp = nn.Sequential(nn.Linear(2 * inner, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, inputs_PD: Tensor) -> Tensor:
        """Vectors of shape (P, D)."""
        hidden = inputs_PD
        for layer in range(2):
            ahead = self._read(hidden, f"l{layer}")
            back = self._read(hidden.flip(0), f"l{layer}_reverse").flip(0)
            hidden = torch.cat([ahead, back], -1)
        return self.mlp(hidden)

    def _read(self, inputs_PX: Tensor, which: str) -> Tensor:
        """One direction of one layer, of shape (P, H); gates in PyTorch's order: input, forget, cell, output."""
        of_input, of_state, bias, more = (
            getattr(self.lstm, f"{name}_{which}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        gates_P4H = nn.functional.linear(inputs_PX, of_input, bias + more)
        state = cell = gates_P4H.new_zeros(of_state.shape[1])
        states = []
        for gates_4H in gates_P4H:
            let_in, keep, new, let_out = nn.functional.linear(state, of_state, gates_4H).chunk(4)
            cell = keep.sigmoid() * cell + let_in.sigmoid() * new.tanh()
            state = let_out.sigmoid() * cell.tanh()
            states.append(state)
        return torch.stack(states)


def _mlp(width: int, hidden: int | None) -> nn.Module:
    """The MLP of P-tuning's SuperGLUE code: Linear(D, H), ReLU, Linear(H, D), with H = D unless told."""
    inner = width if hidden is None else hidden
    return nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width))


def _none(_width: int, hidden: int | None) -> nn.Module:
    """The vectors as they are. Raises `TuningError` for a width that nothing would read."""
    if hidden is not None:
        raise TuningError(
            "`hidden` is given, and a prompt without an encoder does not read it",
            where="tuning.hidden",
            expected="encoder: lstm or mlp",
            way_out="leave `hidden` out, or choose an encoder",
        )
    return nn.Identity()


ENCODERS: dict[str, Callable[[int, int | None], nn.Module]] = {"none": _none, "lstm": Lstm, "mlp": _mlp}
