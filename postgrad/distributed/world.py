"""The process group of a run, and its collective calls. With one process all of them are no-ops."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from postgrad.distributed.peers import Peers
from postgrad.distributed.store_namespace import open_namespace
from postgrad.errors import DistributedError, PostgradError, StageError

Result = TypeVar("Result")


class InputFile(NamedTuple):
    """What a rank has read: where, and the fingerprint of its content."""

    path: str
    fingerprint: str


def ranks_of_environment() -> int:
    """The number of processes that `torchrun` has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


class MeshShape(NamedTuple):
    """The ranks as `replicate` replicas of the model, each in `shard` shards; None: as many as there are."""

    replicate: int = 1
    shard: int | None = None

    def make(self, device: torch.device, ranks: int) -> DeviceMesh:
        """The mesh of all ranks; collective. Raises `StageError`, the same on every rank, for another number of ranks."""
        self.check(ranks)
        if self.replicate == 1:
            return init_device_mesh(device.type, (ranks,), mesh_dim_names=("shard",))
        sizes = (self.replicate, ranks // self.replicate)
        return init_device_mesh(device.type, sizes, mesh_dim_names=("replicate", "shard"))

    def check(self, ranks: int) -> None:
        """Raise `StageError` unless the mesh has as many ranks."""
        if self.replicate * (self.shard or max(1, ranks // self.replicate)) == ranks:
            return
        wanted = self.replicate * (self.shard or 1)
        error = StageError(
            f"replicate: {self.replicate}"
            + (f" and shard: {self.shard}" if self.shard else "")
            + f" do not divide {ranks} {'processes' if ranks > 1 else 'process'}",
            where="parallel",
            expected="replicate x shard processes",
            hint=f"start {wanted} processes (torchrun --nproc-per-node {wanted} ...), or change `parallel`",
        )
        error.reported_by = 0
        raise error


_ONE_REPLICA = MeshShape()


@dataclass(frozen=True)
class World:
    """This process in its process group (started by `torchrun`), or a single process."""

    device: torch.device
    rank: int = 0
    size: int = 1
    peers: Peers | None = None
    mesh: DeviceMesh | None = None
    """The ranks over which the model is sharded; None without a process group."""

    @classmethod
    @contextmanager
    def init_process_group(
        cls,
        device: torch.device,
        timeout: timedelta = timedelta(minutes=10),
        mesh_shape: MeshShape = _ONE_REPLICA,
    ) -> Iterator[World]:
        """Join the process group that the environment of `torchrun` names; without one, run as a single process.

        `timeout`: how long a collective call waits for the other ranks. Inside, an error of one rank ends all of them, with a
        `DistributedError` on those that did not cause it. Raises `StageError` for a mesh of another number of ranks.
        """
        if "RANK" not in os.environ:
            mesh_shape.check(1)
            yield cls(device)
            return
        mesh_shape.check(ranks_of_environment())
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        shared_store, rank, size = next(iter(dist.rendezvous("env://", timeout=timeout)))
        store = open_namespace(shared_store, rank, size, timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        try:
            mesh = mesh_shape.make(device, size)
            if size == 1:
                yield cls(device, mesh=mesh)
                return
            with Peers(store, rank, size) as peers:
                try:
                    yield cls(device, rank, size, peers, mesh)
                except BaseException as error:
                    cause = peers.explain(error)
                    if cause is error:
                        raise
                    raise cause from error
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

    def from_first(self, work: Callable[[], Result]) -> Result:
        """The result of `work` on the first rank, told to all ranks, as is its error. Collective."""
        if self.size == 1:
            return work()
        outcome: list[tuple[Result | None, PostgradError | None] | None] = [None]
        if self.is_main:
            try:
                outcome[0] = work(), None
            except PostgradError as error:
                outcome[0] = None, error
        dist.broadcast_object_list(outcome, src=0)
        assert outcome[0] is not None
        result, error = outcome[0]
        if error is not None:
            error.reported_by = 0
            raise error
        return result  # type: ignore[return-value]

    def require_same(self, work: Callable[[], Mapping[str, InputFile]]) -> None:
        """Raise on all ranks when `work` fails on one of them or returns other fingerprints there. Collective."""
        if self.size == 1:
            work()
            return
        files, error = dict[str, InputFile](), None
        try:
            files = dict(work())
        except PostgradError as own_error:
            error = own_error
        ranks: list[tuple[dict[str, InputFile], PostgradError | None]] = self.all_gather((files, error))  # type: ignore[assignment]
        for rank, (_, rank_error) in enumerate(ranks):
            if rank_error is not None:
                told = error or DistributedError(
                    f"rank {rank}: {rank_error.problem}", where=rank_error.where, hint=rank_error.hint
                )
                told.reported_by = rank
                raise told
        for rank, (files, _) in enumerate(ranks):
            for name, file in files.items():
                if file.fingerprint != ranks[0][0][name].fingerprint:
                    raise _difference(rank, name, file, ranks[0][0][name])

    def note(self, activity: str) -> None:
        """Tell the other ranks what this one does, for their errors."""
        if self.peers:
            self.peers.activity = activity

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.size > 1:
            dist.barrier()


def _difference(rank: int, name: str, file: InputFile, first: InputFile) -> DistributedError:
    error = DistributedError(
        f"{name}: rank {rank} reads {file.fingerprint[:12]}, and rank 0 reads {first.fingerprint[:12]}",
        where=file.path or name,
        expected="the same files and the same cache on all processes",
        hint="put the files, `output` and POSTGRAD_CACHE on a file system that all processes share",
    )
    error.reported_by = 0
    return error
