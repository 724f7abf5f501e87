"""AdamW whose moments, or whose weights, are held in fewer bits than fp32 between updates.

Each update reads some rows of a weight and its moments in fp32, takes torch's own AdamW step, and rounds the result
stochastically. So a weight of 16 bits keeps updates that are far below its precision, on average.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.adamw import adamw

from postgrad.distributed.shards import first_row, local_shard
from postgrad.optim.moment_formats import MomentDtype, choose_format
from postgrad.optim.stochastic_rounding import to_bfloat16

ROWS_BYTES = {"cpu": 2**20, "cuda": 2**27}
"""fp32 rows that are in work at once: what a core's cache holds, and what keeps a GPU busy."""
_MOMENTS = ("exp_avg", "exp_avg_sq")


class LowPrecisionAdamW(torch.optim.Optimizer):
    """AdamW with `moment_dtype` moments; weights in bfloat16 are rounded stochastically."""

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float,
        moment_dtype: MomentDtype,
        seed: int,
    ) -> None:
        """`seed`: of the stochastic rounding, with the number of the weight and its count of updates."""
        super().__init__(list(groups), {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.moment_dtype, self.seed = moment_dtype, seed
        self.rows_bytes: int | None = None
        """fp32 rows that are in work at once. Default: `ROWS_BYTES` of the device."""
        self._numbers = {id(p): n for n, p in enumerate(p for group in self.param_groups for p in group["params"])}

    def empty_state(self, weight: Tensor) -> dict[str, Any]:
        """The state of a weight before its first update; `step` is on the host, so that no update waits for a device."""
        moments = choose_format(self.moment_dtype, weight)
        return {"step": 0} | {k: tensor for name in _MOMENTS for k, tensor in moments.empty(name, weight).items()}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the weights that have a gradient."""
        assert closure is None, "the gradient is computed before"
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)

    def _update(self, weight: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        assert weight.grad is not None
        if not state:
            state |= self.empty_state(weight)
        shard, gradient, moments = (
            local_shard(weight),
            local_shard(weight.grad),
            choose_format(self.moment_dtype, weight),
        )
        keys = self._rounding_keys(weight, state["step"] + 1)
        row_size = weight.numel() // weight.shape[0] if weight.ndim else 1
        for begin, rows in _parts(shard, row_size, self.rows_bytes):
            first = (first_row(weight) + begin) * row_size
            value, first_moment, second_moment = shard[rows].float(), *(moments.read(state, n, rows) for n in _MOMENTS)
            adamw(
                [value],
                [gradient[rows].float()],
                [first_moment],
                [second_moment],
                [],
                [torch.tensor(float(state["step"]), device=shard.device)],  # torch's function counts it up
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            for name, moment, key in zip(_MOMENTS, (first_moment, second_moment), keys, strict=False):
                moments.write(state, name, rows, moment, key, first)
            if shard.dtype == torch.bfloat16:
                shard[rows] = to_bfloat16(value, keys[-1], first)
        state["step"] += 1

    def _rounding_keys(self, weight: Tensor, update: int) -> list[int]:
        """Keys of the random bits of the two moments and of the weight, of this update."""
        sequence = np.random.SeedSequence([self.seed, self._numbers[id(weight)], update])
        return [int(key) for key in sequence.generate_state(len(_MOMENTS) + 1, np.uint32)]


def _parts(shard: Tensor, row_size: int, rows_bytes: int | None) -> Iterator[tuple[int, Any]]:
    """Slices of rows that are in work at once, with their first row; all of a scalar."""
    if not shard.ndim:
        yield 0, ...
        return
    rows_bytes = rows_bytes or ROWS_BYTES["cuda" if shard.is_cuda else "cpu"]
    size = max(1, rows_bytes // (4 * row_size))
    for begin in range(0, len(shard), size):
        yield begin, slice(begin, begin + size)
