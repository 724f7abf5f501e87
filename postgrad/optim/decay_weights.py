"""Weights of the checkpoints of a constant-rate phase whose sum is the model of a decayed rate: an anneal without its steps.

With checkpoints p_0 ... p_k, p_i = p_(i-1) - u_i (u_i: all updates between two of them, at the constant rate), the weighted sum
is p_0 less the updates, each scaled by the weights from its checkpoint on (WSM, Tian et al. 2025, arXiv 2507.17634):

    sum of c_j p_j = p_0 - sum of d_i u_i,   d_i = c_i + ... + c_k

so a decay d_1 >= ... >= d_k >= 0 of the rate is c_0 = 1 - d_1, c_j = d_j - d_(j+1), c_k = d_k. A linear decay is the plain
mean. The updates are those of the constant rate: a real decay would have made others from where it leads.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from postgrad.optim.lr_schedules import SHAPES


def decay_weights(steps: Sequence[int], shape: str = "linear", floor: float = 0.0) -> list[float]:
    """The weight of the checkpoint of each of `steps`, in order, which stand for a decay from the first to the last of them.

    At equal distances, checkpoint i of N stands at i/N of the decay; the rate between two of them is that at the later one, as
    a fraction of the constant rate. `floor`: the last such fraction, above zero for `exponential` and `inverse-linear`.
    """
    count, first, last = len(steps), steps[0], steps[-1]
    if count == 1:
        return [1.0]
    decay, span = SHAPES[shape](1.0, floor), (last - first) * count / (count - 1)
    rates = [1.0, *(decay((step - first) / span) for step in steps[1:]), 0.0]
    return [rate - following for rate, following in pairwise(rates)]
