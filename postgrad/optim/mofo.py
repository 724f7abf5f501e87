"""Move only the numbers that are pushed hardest: of each matrix, the share with the largest momentum (MoFO).

Chen et al. 2024 (arXiv 2407.20999): Adam's moments m and v are those of all numbers; of each part of the weights only the
share with the largest |m| moves,

    w -= rate * mask * m^ / (sqrt(v^) + eps)        mask: |m| is among the largest of the part

A part is a weight, as in the authors' own code, where norms and biases move whole as well. They recommend 5 to 20 %. There
weight decay moves all numbers; here it moves those that move.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from postgrad.distributed.shards import local_shard
from postgrad.optim.sparse_update import OptimizerStates, SparseMask
from postgrad.optim.top_k import share_count, top_k_masks


class MofoMask(SparseMask):
    """Of each matrix moves `share`, the numbers of the largest |m|, whichever rank they lie on."""

    def __init__(self, share: float, masters: Sequence[Tensor]) -> None:
        super().__init__([master for master in masters if master.ndim >= 2], masters)
        self.share = share

    @property
    def num_updated(self) -> int:
        return sum(share_count(self.share, m.numel()) for m in self.sparse_masters) + sum(
            m.numel() for m in self.dense_masters
        )

    def masks(self, masters: Sequence[Tensor], states: OptimizerStates) -> list[Tensor]:
        sizes = [local_shard(states[master]["exp_avg"]).abs() for master in masters]
        return top_k_masks(sizes, [share_count(self.share, master.numel()) for master in masters], masters)
