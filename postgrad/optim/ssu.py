"""SSU, source-shielded updates: the columns of each linear layer that matter most for old text keep their values.

Yamaguchi et al. 2025 (arXiv 2512.04844): with the importance I_ij of the weights of a layer on a few hundred old rows,

    S_j = sum_i I_ij        the half of the columns (inputs) j with the largest S_j is frozen for the whole training

Weights without importance are updated densely: embeddings, head, norms and biases, as in the paper. There the gradient is
masked; here the entries also keep their value under weight decay and momentum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from postgrad.distributed.shards import local_shard_like
from postgrad.optim.sparse_update import OptimizerStates, SparseMask
from postgrad.optim.top_k import share_count


class SsuMask(SparseMask):
    """Updates the `share` of each matrix's columns with the least importance; the same ones at every step."""

    def __init__(self, share: float, columns: Sequence[tuple[Tensor, Tensor, int]], masters: Sequence[Tensor]) -> None:
        """`columns`: a master, the importance of each of its columns, and the dimension that they lie along."""
        super().__init__([master for master, _, _ in columns], masters)
        self._num_updated = sum(master.numel() for master in self.dense_masters)
        self._masks: dict[int, Tensor] = {}
        for master, importance, dim in columns:
            count = share_count(share, len(importance))
            is_updated = torch.zeros(len(importance), dtype=torch.bool)
            # Stable: of equally important columns the first ones are updated, on every rank.
            is_updated[importance.cpu().argsort(stable=True)[:count]] = True
            shape = [1] * master.ndim
            shape[dim] = -1
            mask = is_updated.to(master.device).view(shape).expand(master.shape)
            self._masks[id(master)] = local_shard_like(mask, master)
            self._num_updated += count * (master.numel() // len(importance))

    @property
    def num_updated(self) -> int:
        return self._num_updated

    def masks(self, masters: Sequence[Tensor], states: OptimizerStates) -> list[Tensor]:
        return [self._masks[id(master)] for master in masters]
