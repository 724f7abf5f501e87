"""Weight deltas: what a tuning adds to a weight of the base, and the chain rule to the tuning's own tensors.

Each class describes the change of one weight W as functions of the values of trained tensors: the term added to W, and the map
from a gradient with respect to W to gradients with respect to them.

Legend: O outputs, I inputs, R rank of an update, L trained directions, E experts; W is (O, I), or (I, O) where it is stored
transposed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class WeightDelta(ABC):
    """The change of a weight, as functions of the trained tensors' values."""

    @abstractmethod
    def delta(self, values: Sequence[Tensor]) -> Tensor:
        """The term added to the weight, of its shape."""

    @abstractmethod
    def backward(self, values: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
        """The gradient of each tensor, from that of the weight (of the weight's shape)."""

    def squared_norm(self, values: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """`sum delta^2`, and the gradient of half of it for each tensor."""
        delta = self.delta(values)
        return delta.square().sum(), self.backward(values, delta)


@dataclass(frozen=True)
class TuningDelta:
    """A weight delta, its parameters, and the weight's shape (a quantised weight has another one in memory)."""

    weight_delta: WeightDelta
    parameters: tuple[nn.Parameter, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class LowRankDelta(WeightDelta):
    """`s (B A - B0 A0)`: LoRA, and PiSSA, which subtracts its initial factors. Values: A (R, I), B (O, R)."""

    scale: float
    transposed: bool = False
    start: tuple[Tensor, Tensor] | None = None
    """A0 and B0."""

    def delta(self, values: Sequence[Tensor]) -> Tensor:
        """The update, of the weight's shape."""
        left_OK, right_KI = self._factors(values)
        return _transpose_if(self.scale * left_OK @ right_KI, self.transposed)

    def backward(self, values: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
        """`s B^T G` and `s G A^T`."""
        a_RI, b_OR = values
        gradient_OI = _transpose_if(gradient, self.transposed)
        return [self.scale * b_OR.T @ gradient_OI, self.scale * gradient_OI @ a_RI.T]

    def squared_norm(self, values: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Without a matrix of O x I: `|L M|^2 = sum (L^T L) * (M M^T)`, on matrices of the rank's size."""
        a_RI, b_OR = values
        left_OK, right_KI = self._factors(values)
        inner_KK, outer_KK = left_OK.T @ left_OK, right_KI @ right_KI.T
        scale = self.scale**2
        gradient_A_RI = scale * (b_OR.T @ left_OK) @ right_KI
        gradient_B_OR = scale * left_OK @ (right_KI @ a_RI.T)
        return scale * (inner_KK * outer_KK).sum(), [gradient_A_RI, gradient_B_OR]

    def _factors(self, values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """L (O, K) and M (K, I) with `delta = s L M`."""
        a_RI, b_OR = values
        if self.start is None:
            return b_OR, a_RI
        # B A - B0 A0 = (B - B0) A + B0 (A - A0): a sum of small terms, without the cancellation of two large ones.
        a0_RI, b0_OR = (t.to(a_RI.device) for t in self.start)
        return torch.cat([b_OR - b0_OR, b0_OR], 1), torch.cat([a_RI, a_RI - a0_RI])


@dataclass(frozen=True)
class ExpertsDelta(WeightDelta):
    """`s B A` for each of E experts: LoRA on a tensor with a matrix of every expert. Values: A (E R, I), B (O, R E)."""

    scale: float
    experts: int
    transposed: bool = False

    def delta(self, values: Sequence[Tensor]) -> Tensor:
        """The update (E, O, I), or (E, I, O)."""
        a_ERI, b_EOR = self._by_expert(values)
        return self._swap_if_transposed(self.scale * b_EOR @ a_ERI)

    def backward(self, values: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
        """`s B^T G` and `s G A^T` of each expert."""
        a_ERI, b_EOR = self._by_expert(values)
        gradient_EOI = self._swap_if_transposed(gradient)
        of_a_ERI, of_b_EOR = self.scale * b_EOR.mT @ gradient_EOI, self.scale * gradient_EOI @ a_ERI.mT
        return [of_a_ERI.flatten(0, 1), of_b_EOR.permute(1, 2, 0).flatten(1)]

    def _by_expert(self, values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        a, b = values
        return a.unflatten(0, (self.experts, -1)), b.unflatten(1, (-1, self.experts)).permute(2, 0, 1)

    def _swap_if_transposed(self, stack: Tensor) -> Tensor:
        return stack.mT if self.transposed else stack


@dataclass(frozen=True)
class RescaledDelta(WeightDelta):
    """`m V / |V| - W` with `V = W + s B A`, the norm taken over each row: DoRA. Values: A (R, I), B (O, R), m (O).

    DoRA's forward pass treats the norm |V| as a constant in the backward pass (section 4.3 of the paper). A penalty on the
    weight has no such approximation: `backward` is the exact gradient, through the norm too.
    """

    scale: float
    weight: Callable[[], Tensor]
    """The full weight W, as stored."""
    transposed: bool = False

    def delta(self, values: Sequence[Tensor]) -> Tensor:
        """The change, of the weight's shape: `(m / |V| - 1) W + m / |V| s B A`, a sum of small terms."""
        a_RI, b_OR, m_O = values
        weight_OI, update_OI, norm_O1 = self._parts(a_RI, b_OR)
        growth_O1 = (m_O[:, None] - norm_O1) / norm_O1  # m / |V| - 1
        return _transpose_if(growth_O1 * weight_OI + (growth_O1 + 1) * update_OI, self.transposed)

    def backward(self, values: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
        """`dV = m / |V| (G - U <G, U>)` row by row with U = V / |V|, then as for LoRA; `dm = <G, U>`.

        Scaling a row of V changes nothing, so the part of G along the row's direction U is projected out.
        """
        a_RI, b_OR, m_O = values
        weight_OI, update_OI, norm_O1 = self._parts(a_RI, b_OR)
        direction_OI = (weight_OI + update_OI) / norm_O1
        gradient_OI = _transpose_if(gradient, self.transposed)
        along_O1 = (gradient_OI * direction_OI).sum(1, keepdim=True)
        across_OI = m_O[:, None] / norm_O1 * (gradient_OI - direction_OI * along_O1)
        return [self.scale * b_OR.T @ across_OI, self.scale * across_OI @ a_RI.T, along_O1[:, 0]]

    def _parts(self, a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """W, s B A, and |W + s B A|."""
        weight_OI = _transpose_if(self.weight().to(a_RI.dtype), self.transposed)
        update_OI = self.scale * b_OR @ a_RI
        return weight_OI, update_OI, torch.linalg.vector_norm(weight_OI + update_OI, dim=1, keepdim=True)


@dataclass(frozen=True)
class SubspaceDelta(WeightDelta):
    """`U S V - U0 S0 V0`: orthogonal subspace fine-tuning. Values: U (O, L), S (L), V (L, I).

    Gradients of U and V are projected as those of the loss are (see `osf`).
    """

    start: tuple[Tensor, Tensor, Tensor]
    """U0, S0 and V0."""
    project: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
    """The projections of gradients of U (O, L), and of V (L, I)."""

    def delta(self, values: Sequence[Tensor]) -> Tensor:
        """The update (O, I): `(U S - U0 S0) V + U0 S0 (V - V0)`, a sum of small terms."""
        u_OL, s_L, v_LI = values
        u0_OL, s0_L, v0_LI = (t.to(u_OL) for t in self.start)
        return (u_OL * s_L - u0_OL * s0_L) @ v_LI + (u0_OL * s0_L) @ (v_LI - v0_LI)

    def backward(self, values: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
        """`G V^T S`, `diag(U^T G V^T)` and `S U^T G`, the first and last projected."""
        u_OL, s_L, v_LI = values
        gradient_OL, gradient_LI = gradient @ v_LI.T, u_OL.T @ gradient
        along_L = (u_OL * gradient_OL).sum(0)
        return [self.project[0](gradient_OL * s_L), along_L, self.project[1](s_L[:, None] * gradient_LI)]


def _transpose_if(matrix: Tensor, transposed: bool) -> Tensor:
    """Convert between the weight's layout and (O, I)."""
    return matrix.T if transposed else matrix
