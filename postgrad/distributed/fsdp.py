"""Sharding (FSDP2), activation checkpointing and compilation of a model, all torch's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from postgrad.models.layers import get_layers
from postgrad.models.model import Model
from postgrad.models.sublayers import eval_mode, make_probe_inputs
from postgrad.models.unread_weights import UnreadWeights


def checkpoint_activations(model: Model) -> None:
    """Recompute each block's activations in the backward pass."""
    pretrained = model.pretrained
    # transformers renamed the method; the old name warns where both exist.
    enable = getattr(pretrained, "activation_checkpointing_enable", None) or pretrained.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def compile_layers(model: Model) -> None:
    """Compile each block in place: as fast as the whole model, and all blocks share one compilation. The final norm, too."""
    # Dynamo counts recompilations per code object over the whole process, and several models may share one.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for layer in get_layers(model.pretrained):
        layer.compile(dynamic=False)
    for name, part in model.body.named_children():
        if "norm" in name or name.startswith("ln"):
            part.compile(dynamic=False)


def shard(
    model: Model,
    mesh: DeviceMesh,
    compute: torch.dtype,
    unread: UnreadWeights | None = None,
    stored: torch.dtype = torch.float32,
) -> None:
    """Shard weights, gradients and optimizer state over the ranks of a mesh (FSDP2), with computation in `compute`.

    With a mesh of two dimensions the ranks of the first hold replicas (hybrid sharding). `unread`: weights that this rank reads
    its rows of, block by block, in the dtype `stored`; then no rank ever has the whole model.
    """
    policy = (
        MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
        if compute != torch.float32
        else MixedPrecisionPolicy()
    )
    modules: list[torch.nn.Module] = [*get_layers(model.pretrained), model]
    axis = mesh.ndim - 1
    for module in modules:
        if unread:
            unread.read(module, mesh.get_local_rank(axis), mesh.size(axis), stored)
        fully_shard(module, mesh=mesh, mp_policy=policy)
    # FSDP divides gradients by the number of ranks, which is right for a mean loss per rank. Ours is a sum over tokens, divided
    # once by the token count of the global batch, so gradients are summed. Gloo has no pre-multiplied sum: force a plain one.
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    _run_once(model)


def _run_once(model: Model) -> None:
    """Run a forward pass of the root, which the first one of all must be; afterwards its own weights are gathered."""
    with eval_mode(model), torch.no_grad():
        model(**make_probe_inputs(model.pretrained))


@contextmanager
def gather_root(model: Model) -> Iterator[None]:
    """Inside, parts of a sharded model can be called, as generation does, the same ones in the same order on every rank."""
    if isinstance(model, FSDPModule):
        _run_once(model)
    yield
    reshard(model)


def reshard(model: torch.nn.Module) -> None:
    """Free the weights that a forward pass has gathered, so that a change of the shards takes effect."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
