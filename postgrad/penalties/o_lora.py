"""O-LoRA: a penalty that keeps a new LoRA adapter orthogonal to earlier ones.

Wang et al. 2023 (arXiv 2310.14152), section 3: the rows of an adapter's A span the inputs that it responds to. Each task
trains a new adapter while the earlier ones are frozen, and the loss has the term

    strength * sum over layers of sum_ij |A_earlier A_new^T|_ij

(the paper has the square; the authors' code, which gave their results, has the absolute value, as here).

Legend: E rows of the earlier adapters' A, R rank of the new one, I inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from postgrad.distributed.shards import local_gradient, local_shard, sum_over_shards
from postgrad.errors import TuningError


class OrthogonalityPenalty:
    """Penalizes the overlap of each new A with the rows of the earlier A at the same layer."""

    def __init__(
        self,
        new_directions: Sequence[Tensor],
        earlier_directions: Sequence[Tensor],
        strength: float,
        *,
        name: str = "orthogonal",
    ) -> None:
        """`new_directions`: masters of the trained A's, each (R, I), possibly sharded by rows; `earlier_directions`: for each
        the rows (E, I) to stay orthogonal to. Raises `TuningError` when they do not match."""
        self.name = name
        self.strength = strength
        self.new_directions = list(new_directions)
        if not new_directions or len(new_directions) != len(earlier_directions):
            raise TuningError(
                f"{len(new_directions)} layers of the new adapter and {len(earlier_directions)} of earlier ones",
                where="tuning.orthogonal",
                expected="one earlier A for each new A, at least one",
            )
        for a_new_RI, a_earlier_EI in zip(new_directions, earlier_directions, strict=True):
            if a_earlier_EI.ndim != 2 or a_earlier_EI.shape[1] != a_new_RI.shape[1]:
                raise TuningError(
                    f"an earlier A has shape {tuple(a_earlier_EI.shape)}, the new one {tuple(a_new_RI.shape)}",
                    where="tuning.orthogonal",
                    expected="equal numbers of columns: adapters of the same layer of the same base",
                )
        self.earlier_directions = [
            e.detach().to(n.device, torch.float32) for n, e in zip(new_directions, earlier_directions, strict=True)
        ]

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """`strength * sum |A_earlier A_new^T|`; adds `strength * sign(A_earlier A_new^T)^T A_earlier` to each `.grad`."""
        total = torch.zeros((), device=self.new_directions[0].device)
        for a_new_RI, a_earlier_EI in zip(self.new_directions, self.earlier_directions, strict=True):
            # The gradient of a row of A_new depends on that row alone, so each rank works on its own rows.
            overlap_ER = a_earlier_EI @ local_shard(a_new_RI).T
            local_gradient(a_new_RI).add_(overlap_ER.sign().T @ a_earlier_EI, alpha=self.strength)
            total += sum_over_shards(overlap_ER.abs().sum(), a_new_RI)
        return self.strength * total
