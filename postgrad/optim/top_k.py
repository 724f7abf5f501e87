"""Which are the largest of a weight's numbers, when its rows may lie on several ranks?

Of a tensor on one CPU the smallest number that belongs to them is found by partial sorting. Elsewhere it is found digit by
digit: a float that is not negative grows with its bits read as an integer, so counts of the leading bits, added up over all
ranks, say where the smallest lies, and the next bits are counted there. That takes three small sums over the ranks,
whatever the size of the weights, and is exact.

Legend: M tensors, O those of them with too many equal numbers, H values of a digit, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from postgrad.distributed.shards import sum_over_ranks

DIGITS = ((20, 11), (10, 10), (0, 10))
"""Of the 31 bits beside the sign: where a digit begins, and how many bits it has."""


def share_count(share: float, size: int) -> int:
    """How many of `size` numbers a share is: the nearest whole number, and at least one."""
    return max(1, round(share * size))


def top_k_masks(magnitudes: Sequence[Tensor], counts: Sequence[int], like: Sequence[Tensor]) -> list[Tensor]:
    """Where the `counts` largest numbers of each tensor are, as masks of this rank's rows; of equal ones the first.

    `sizes`: this rank's rows of tensors that are laid out as those of `like`, fp32, none below zero.
    """
    if not magnitudes:
        return []
    whole_here = magnitudes[0].device.type == "cpu" and not isinstance(like[0], DTensor)
    wanted_M = torch.tensor(counts, device=magnitudes[0].device)
    edge_M = (
        _threshold_by_sorting(magnitudes, counts) if whole_here else _threshold_by_digits(magnitudes, wanted_M, like[0])
    )
    return _masks_above(edge_M, magnitudes, wanted_M, like[0])


def _threshold_by_sorting(magnitudes: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """The smallest of the `counts` largest numbers of each tensor."""
    return torch.stack(
        [
            torch.from_numpy(np.partition(size.flatten().numpy(), size.numel() - count)[size.numel() - count, None])[0]
            for size, count in zip(magnitudes, counts, strict=True)
        ]
    )


def _threshold_by_digits(magnitudes: Sequence[Tensor], counts_M: Tensor, like: Tensor) -> Tensor:
    """The same, over all ranks that `like` is split over."""
    bits = [size.flatten().view(torch.int32) for size in magnitudes]
    known_M = torch.zeros_like(counts_M)
    left_M = counts_M.clone()
    for begin, width in DIGITS:
        above, values = begin + width, 1 << width
        counted = [
            torch.bincount((b[(b >> above) == (known >> above)] >> begin) & (values - 1), minlength=values)
            for b, known in zip(bits, known_M, strict=True)
        ]
        from_top_MH = sum_over_ranks(torch.stack(counted), like).flip(1).cumsum(1)
        place_M = (from_top_MH < left_M[:, None]).sum(1)
        before_M = from_top_MH.gather(1, (place_M - 1).clamp(min=0)[:, None])[:, 0]
        left_M -= torch.where(place_M > 0, before_M, 0)
        known_M |= (values - 1 - place_M) << begin
    return known_M.to(torch.int32).view(torch.float32)


def _masks_above(threshold_M: Tensor, magnitudes: Sequence[Tensor], counts_M: Tensor, like: Tensor) -> list[Tensor]:
    """All that reach an edge, but for those on it that are too many, the last ones in the order of the ranks."""
    reaching = [size >= edge for size, edge in zip(magnitudes, threshold_M, strict=True)]
    total_M = sum_over_ranks(torch.stack([mask.count_nonzero() for mask in reaching]), like)
    over = (total_M - counts_M).nonzero().flatten().tolist()
    if over:
        on = [magnitudes[m] == threshold_M[m] for m in over]
        ranks, here = (
            (like.device_mesh.size(), like.device_mesh.get_local_rank()) if isinstance(like, DTensor) else (1, 0)
        )
        on_OR = torch.zeros(len(over), ranks, dtype=torch.int64, device=threshold_M.device)
        on_OR[:, here] = torch.stack([mask.count_nonzero() for mask in on])
        on_OR = sum_over_ranks(on_OR, like)
        kept_O = on_OR.sum(1) - (total_M - counts_M)[over] - on_OR[:, :here].sum(1)
        for m, level, kept in zip(over, on, kept_O, strict=True):
            reaching[m] &= ~level | (level.flatten().cumsum(0).view_as(level) <= kept)
    return reaching
