"""Exact top-k masks of tensors whose rows may be sharded over ranks.

The k-th largest value is the threshold. For a tensor on one CPU partial sorting gives it. Otherwise a radix select does: a
non-negative float is ordered as its bits read as an integer, so histograms of the leading bits, summed over all ranks, show
in which bin the threshold lies, and the next bits are counted within that bin. Three small all-reduces, whatever the size of
the weights.

Legend: M tensors, O those with more values equal to the threshold than fit, H values of a digit, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from postgrad.distributed.shards import shard_axis, sum_over_shards

DIGITS = ((20, 11), (10, 10), (0, 10))
"""The 31 bits without the sign, as digits: (lowest bit, number of bits)."""


def share_count(share: float, size: int) -> int:
    """`share` of `size` entries, rounded, at least one."""
    return max(1, round(share * size))


def top_k_masks(magnitudes: Sequence[Tensor], counts: Sequence[int], like: Sequence[Tensor]) -> list[Tensor]:
    """Masks of the `counts` largest values of each tensor, over all ranks; of equal values the first ones.

    `magnitudes`: this rank's rows, fp32 and non-negative, of tensors sharded as those of `like`.
    """
    if not magnitudes:
        return []
    is_local = magnitudes[0].device.type == "cpu" and not isinstance(like[0], DTensor)
    counts_M = torch.tensor(counts, device=magnitudes[0].device)
    threshold_M = (
        _threshold_by_sorting(magnitudes, counts) if is_local else _threshold_by_digits(magnitudes, counts_M, like[0])
    )
    return _masks_above(threshold_M, magnitudes, counts_M, like[0])


def _threshold_by_sorting(magnitudes: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """The smallest of the `counts` largest values of each tensor."""
    return torch.stack(
        [
            torch.from_numpy(np.partition(m.flatten().numpy(), m.numel() - count)[m.numel() - count, None])[0]
            for m, count in zip(magnitudes, counts, strict=True)
        ]
    )


def _threshold_by_digits(magnitudes: Sequence[Tensor], counts_M: Tensor, like: Tensor) -> Tensor:
    """The same by radix select, over all ranks that `like` is sharded over."""
    bits = [m.flatten().view(torch.int32) for m in magnitudes]
    prefix_M = torch.zeros_like(counts_M)  # bits of the threshold that are known so far
    remaining_M = counts_M.clone()  # rank of the threshold among the values with this prefix, counted from the top
    for begin, width in DIGITS:
        above, values = begin + width, 1 << width
        histograms = [
            torch.bincount((b[(b >> above) == (prefix >> above)] >> begin) & (values - 1), minlength=values)
            for b, prefix in zip(bits, prefix_M, strict=True)
        ]
        from_top_MH = sum_over_shards(torch.stack(histograms), like).flip(1).cumsum(1)
        bin_M = (from_top_MH < remaining_M[:, None]).sum(1)  # bins from the top that lie above the threshold's
        larger_M = from_top_MH.gather(1, (bin_M - 1).clamp(min=0)[:, None])[:, 0]
        remaining_M -= torch.where(bin_M > 0, larger_M, 0)
        prefix_M |= (values - 1 - bin_M) << begin
    return prefix_M.to(torch.int32).view(torch.float32)


def _masks_above(threshold_M: Tensor, magnitudes: Sequence[Tensor], counts_M: Tensor, like: Tensor) -> list[Tensor]:
    """Values at or above the threshold, without the surplus of those equal to it: the last ones in rank order."""
    masks = [m >= threshold for m, threshold in zip(magnitudes, threshold_M, strict=True)]
    total_M = sum_over_shards(torch.stack([mask.count_nonzero() for mask in masks]), like)
    surplus = (total_M - counts_M).nonzero().flatten().tolist()
    if surplus:
        ties = [magnitudes[m] == threshold_M[m] for m in surplus]
        ranks, rank = 1, 0
        if isinstance(like, DTensor):
            axis = shard_axis(like)
            ranks, rank = like.device_mesh.size(axis), like.device_mesh.get_local_rank(axis)
        ties_OR = torch.zeros(len(surplus), ranks, dtype=torch.int64, device=threshold_M.device)
        ties_OR[:, rank] = torch.stack([tie.count_nonzero() for tie in ties])
        ties_OR = sum_over_shards(ties_OR, like)
        # Ties that fit, less those of earlier ranks: how many this rank may select.
        quota_O = ties_OR.sum(1) - (total_M - counts_M)[surplus] - ties_OR[:, :rank].sum(1)
        for m, tie, quota in zip(surplus, ties, quota_O, strict=True):
            masks[m] &= ~tie | (tie.flatten().cumsum(0).view_as(tie) <= quota)
    return masks
