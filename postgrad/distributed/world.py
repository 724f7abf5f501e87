"""The process group of a run, and its collective calls. With one process all of them are no-ops."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This process in its process group (started by `torchrun`), or a single process."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @classmethod
    @contextmanager
    def init_process_group(cls, device: torch.device, timeout: timedelta = timedelta(minutes=10)) -> Iterator[World]:
        """Join the process group that the environment of `torchrun` names; without one, run as a single process."""
        if "RANK" not in os.environ:
            yield cls(device)
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
        try:
            yield cls(device, dist.get_rank(), dist.get_world_size())
        finally:
            gc.collect()  # sharded modules in reference cycles would keep the group alive
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        """Whether a process group exists, even of one rank."""
        return dist.is_initialized()

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def all_reduce_count(self, value: int) -> int:
        """Sum of an integer over ranks."""
        return value if self.size == 1 else int(self.all_reduce(torch.tensor(value, device=self.device)))

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is true on any rank; the same result on every rank."""
        return flag if self.size == 1 else bool(self.all_reduce_count(int(flag)))

    def all_gather(self, value: object) -> list[object]:
        """`value` of every rank, on every rank."""
        if self.size == 1:
            return [value]
        out: list[object] = [None] * self.size
        dist.all_gather_object(out, value)
        return out

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.size > 1:
            dist.barrier()
