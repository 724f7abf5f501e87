"""MoFO: a sparse update of the share of each matrix with the largest momentum.

Chen et al. 2024 (arXiv 2407.20999): Adam's moments m and v cover all entries; of each block of the weights only the share
with the largest |m| is updated,

    w -= rate * mask * m^ / (sqrt(v^) + eps)        mask: |m| is among the largest of the block

A block is one weight tensor, and norms and biases are updated densely, as in the authors' code. They recommend 5 to 20 %.
There weight decay acts on all entries; here only on those that are updated.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from postgrad.distributed.shards import local_shard
from postgrad.optim.sparse_update import OptimizerStates, SparseMask
from postgrad.optim.top_k import share_count, top_k_masks


class MofoMask(SparseMask):
    """Updates the `share` of each matrix with the largest |m|, over all ranks."""

    def __init__(self, share: float, masters: Sequence[Tensor]) -> None:
        super().__init__([master for master in masters if master.ndim >= 2], masters)
        self.share = share

    @property
    def num_updated(self) -> int:
        return sum(share_count(self.share, m.numel()) for m in self.sparse_masters) + sum(
            m.numel() for m in self.dense_masters
        )

    def masks(self, masters: Sequence[Tensor], states: OptimizerStates) -> list[Tensor]:
        magnitudes = [local_shard(states[master]["exp_avg"]).abs() for master in masters]
        return top_k_masks(magnitudes, [share_count(self.share, master.numel()) for master in masters], masters)
