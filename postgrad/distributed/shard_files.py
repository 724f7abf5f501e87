"""Files that the ranks write together: each rank gets the tensors of its own file, one after another, and writes them.

The files are those of Hugging Face: whole tensors, divided among `<stem>-00001-of-0000N.safetensors` with an index. So any
number of ranks, or one process, or plain transformers reads what any number of ranks has written; no rank ever holds more than
one tensor beyond its shards. `torch.distributed.checkpoint` writes files that only torch reads, and pickles its index.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from postgrad.distributed.shards import shard_axis
from postgrad.distributed.world import InputFile, World
from postgrad.models.weight_files import SafetensorsWriter
from postgrad.storage.atomic import (
    Manifest,
    check_sha256,
    check_size,
    disk_errors,
    make_entry,
    make_manifest,
    make_staging,
    publish_folder,
    publish_staging,
    read_manifest,
    sha256,
    sync,
)

Convert = Callable[[str, Tensor], Mapping[str, Tensor]]
"""What a tensor is in the file: its names there, and its numbers."""


def _as_it_is(name: str, tensor: Tensor) -> Mapping[str, Tensor]:
    return {name: tensor}


@dataclass(frozen=True)
class OutputFile:
    """A file with the tensors that one rank writes there."""

    name: str
    owner: int
    tensors: Mapping[str, Tensor]


def split_files(stem: str, tensors: Mapping[str, Tensor], world: World) -> list[OutputFile]:
    """A file for each rank, of about the same size; fewer for few tensors."""
    total = sum(map(_bytes, tensors.values()))
    parts: list[dict[str, Tensor]] = [{} for _ in range(world.size)]
    done = 0
    for name, tensor in tensors.items():
        middle = done + _bytes(tensor) / 2
        parts[min(world.size - 1, int(middle * world.size / max(1, total)))][name] = tensor
        done += _bytes(tensor)
    used = [(rank, part) for rank, part in enumerate(parts) if part]
    if len(used) < 2:
        return [OutputFile(f"{stem}.safetensors", rank, part) for rank, part in used]
    count = len(used)
    return [
        OutputFile(f"{stem}-{number:05d}-of-{count:05d}.safetensors", rank, part)
        for number, (rank, part) in enumerate(used, 1)
    ]


@dataclass
class WrittenFiles:
    """What the ranks have written: the file of each tensor, by its name there, and their bytes; the files of this rank."""

    weight_map: dict[str, str]
    total_size: int
    own: list[str]

    def write_index(self, folder: Path, stem: str) -> None:
        """Write Hugging Face's index of several files; a single one is read without."""
        if len(set(self.weight_map.values())) < 2:
            return
        index = {"metadata": {"total_size": self.total_size}, "weight_map": self.weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def write_files(folder: Path, files: Sequence[OutputFile], world: World, convert: Convert = _as_it_is) -> WrittenFiles:
    """Write the files of this rank into `folder`. Collective.

    `convert`: what a whole tensor is in the file; it is called with tensors without values (`meta`) first.
    """
    written = WrittenFiles({}, 0, [])
    with ExitStack() as stack:
        writers: dict[str, SafetensorsWriter] = {}
        for file in files:
            shapes = [convert(name, _without_values(tensor)) for name, tensor in file.tensors.items()]
            like = {name: tensor for part in shapes for name, tensor in part.items()}
            written.weight_map |= dict.fromkeys(like, file.name)
            written.total_size += sum(tensor.nbytes for tensor in like.values())
            if file.owner == world.rank:
                writers[file.name] = stack.enter_context(SafetensorsWriter(folder / file.name, like))
        written.own.extend(writers)
        # A tensor of each file in turn: the owners write at the same time.
        for names in zip_longest(*(file.tensors for file in files)):
            for file, name in zip(files, names, strict=True):
                whole = None if name is None else _gather(file.tensors[name], file.owner, world)
                for out, value in convert(name, whole).items() if whole is not None else ():
                    writers[file.name].write(out, value)
    return written


def _bytes(tensor: Tensor) -> int:
    """Of the whole tensor."""
    return tensor.numel() * tensor.element_size()


def _without_values(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _gather(tensor: Tensor, owner: int, world: World) -> Tensor | None:
    """The whole tensor on its owner, None on others. Collective among the ranks that share a replica with the owner."""
    if not isinstance(tensor, DTensor):
        return tensor if owner == world.rank else None
    axis = shard_axis(tensor)
    group, rows = tensor.device_mesh.get_group(axis), tensor.to_local()
    if tensor.element_size() == 1:
        rows = rows.view(torch.uint8)  # gloo has no float8
    ranks = dist.get_process_group_ranks(group)
    if owner not in ranks:
        return None
    size = -(-tensor.shape[0] // len(ranks))
    padded = rows if len(rows) == size else torch.cat([rows, rows.new_zeros(size - len(rows), *rows.shape[1:])])
    whole = padded.new_empty(size * len(ranks), *rows.shape[1:]) if owner == world.rank else None
    dist.gather(padded.contiguous(), None if whole is None else list(whole.chunk(len(ranks))), dst=owner, group=group)
    return None if whole is None else whole[: tensor.shape[0]].view(tensor.dtype)


def publish_on_ranks(target: Path, write: Callable[[Path], Collection[str]], world: World) -> None:
    """`storage.atomic.publish_folder` with a `write` that is called on every rank, and returns the files that this one wrote.

    Collective. The first rank also answers for files that no rank names. It renames the folder once
    all have written, synced and hashed theirs; then each verifies its own.
    """
    if world.size == 1:
        publish_folder(target, write)
        return
    staging = world.from_first(lambda: _make_staging(target))
    try:
        with disk_errors(target):
            own: Manifest = {}
            for name in write(staging):
                sync(staging / name)
                own[name] = make_entry(staging / name)
        parts: list[Manifest] = world.all_gather(own)  # type: ignore[assignment]
        world.from_first(lambda: _publish(staging, target, parts))
    except BaseException:
        if world.is_main:
            shutil.rmtree(staging, ignore_errors=True)
        raise

    def verify_own() -> dict[str, InputFile]:
        others = {name for rank, part in enumerate(parts) if rank != world.rank for name in part}
        listed = own if world.rank else {n: e for n, e in read_manifest(target).items() if n not in others}
        for name, entry in listed.items():
            check_size(target / name, entry)
            check_sha256(target / name, sha256(target / name), entry)
        return {}

    world.require_same(verify_own)


def _make_staging(target: Path) -> Path:
    with disk_errors(target):
        return make_staging(target)


def _publish(staging: Path, target: Path, parts: Sequence[Manifest]) -> None:
    with disk_errors(target):
        known = {name: entry for part in parts for name, entry in part.items()}
        publish_staging(staging, target, make_manifest(staging, known))
