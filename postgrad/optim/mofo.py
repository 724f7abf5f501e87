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

from postgrad.distributed.shards import own
from postgrad.optim.sparse_update import Fewer, States
from postgrad.optim.top_k import count_of, largest


class TopMomentum(Fewer):
    """Of each matrix moves `share`, the numbers of the largest |m|, whichever rank they lie on."""

    def __init__(self, share: float, masters: Sequence[Tensor]) -> None:
        super().__init__([master for master in masters if master.ndim >= 2], masters)
        self.share = share

    @property
    def count(self) -> int:
        return sum(count_of(self.share, m.numel()) for m in self.chosen) + sum(m.numel() for m in self.others)

    def masks(self, masters: Sequence[Tensor], states: States) -> list[Tensor]:
        sizes = [own(states[master]["exp_avg"]).abs() for master in masters]
        return largest(sizes, [count_of(self.share, master.numel()) for master in masters], masters)
