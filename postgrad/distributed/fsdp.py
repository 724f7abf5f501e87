"""How is a model laid over machines and memory? FSDP2, activation checkpointing and compilation, all torch's own."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from postgrad.models.model import Model
from postgrad.models.pretrained import get_layers


def checkpoint_activations(model: Model) -> None:
    """Recompute each block's activations in the backward pass instead of keeping them."""
    pretrained = model.pretrained
    # The older name is what transformers had before 5.2x, and it warns where both are there.
    enable = getattr(pretrained, "activation_checkpointing_enable", None) or pretrained.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def compile_layers(model: Model) -> None:
    """Compile each block in place: as fast as compiling the whole model, and compiled once for all blocks.

    Beside the blocks, the body's other parts that stand behind them (a final norm) are small and worth it too.
    """
    # Dynamo counts recompilations per code object over the whole process, and several models may share one.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    stack = get_layers(model.pretrained)
    for layer in stack:
        layer.compile(dynamic=False)
    for name, part in model.body.named_children():
        if "norm" in name or name.startswith("ln"):
            part.compile(dynamic=False)


def shard(model: Model, ranks: int, compute: torch.dtype) -> None:
    """Shard weights, gradients and optimizer state over all ranks (FSDP2), fp32 shards and `compute` arithmetic.

    Losses are sums divided once by the global count of trained tokens, so gradients are summed over ranks and never
    averaged: the implicit division of data parallelism is switched off.
    """
    kind = next(model.parameters()).device.type
    mesh = init_device_mesh(kind, (ranks,))
    policy = (
        MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
        if compute != torch.float32
        else MixedPrecisionPolicy()
    )
    modules: list[torch.nn.Module] = [*get_layers(model.pretrained), model]
    for module in modules:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo has no pre-multiplied sum.
            module.set_force_sum_reduction_for_comms(True)


def reshard(model: torch.nn.Module) -> None:
    """Let go of the whole weights that a forward pass has gathered: whoever changes weights now changes the shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def synchronise_gradients(model: torch.nn.Module, enabled: bool) -> None:
    """Whether the next backward pass sums gradients over ranks (only the last micro-batch needs to)."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
