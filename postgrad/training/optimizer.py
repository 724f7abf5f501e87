"""Which numbers does the optimizer move? fp32 master weights, their gradients, and AdamW's moments.

In fp32, and under FSDP2 (whose shards are fp32 already), the masters are the model's own parameters. For bf16 compute in
one process the model holds bf16 copies: gradients are gathered into the masters' fp32 `.grad` after every micro-batch,
and the masters are written back after every update. Small updates would be lost in bf16 weights (a step of 1e-5 is below
half a unit in the last place of most of them); in the masters they are not.

The tables (input embedding and output head) stay fp32 and are their own masters: a table's gradient is a sum over every
place a token occurs, and summed in bf16 the frequent tokens stop moving.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from postgrad.models.model import CausalModel
from postgrad.models.pretrained import table_of

Moments = dict[str, Tensor]


@dataclass(frozen=True)
class Weight:
    """One trainable tensor: what the model computes with, and the fp32 master that the optimizer moves."""

    name: str
    compute: nn.Parameter
    master: Tensor

    @property
    def split(self) -> bool:
        """Whether master and compute weight are two tensors."""
        return self.master is not self.compute


class Weights:
    """The trainable weights of a model, in a fixed order."""

    def __init__(self, model: CausalModel, compute: torch.dtype, *, split: bool) -> None:
        """`split`: compute in copies of dtype `compute`; otherwise the parameters themselves are the masters."""
        self.model = model.pretrained
        self.split = split and compute != torch.float32
        self.compute_dtype = compute
        self.all: list[Weight] = []
        tables = {id(table_of(self.model)), id(model.head().weight_VD)}
        for name, parameter in self.model.named_parameters():  # tied weights come once
            if not parameter.requires_grad:
                continue
            master: Tensor = parameter
            if self.split and id(parameter) not in tables:
                master = parameter.detach().clone().requires_grad_()
                parameter.data = parameter.data.to(compute)
            self.all.append(Weight(name, parameter, master))
        self._pairs = [(w.compute, w.master) for w in self.all if w.split]
        if self.split:
            self.model.get_input_embeddings().register_forward_hook(self._to_compute)

    def _to_compute(self, _module: nn.Module, _inputs: object, embedded_BTD: Tensor) -> Tensor:
        """What the fp32 table gives, in the dtype of the blocks."""
        return embedded_BTD.to(self.compute_dtype) if self.split else embedded_BTD

    @property
    def masters(self) -> list[Tensor]:
        """The fp32 tensors the optimizer moves."""
        return [w.master for w in self.all]

    def numel(self) -> int:
        """Trainable numbers, over all ranks."""
        return sum(w.master.numel() for w in self.all)

    def collect(self) -> None:
        """Add this micro-batch's gradients to the masters' fp32 gradients, and free them."""
        if not self._pairs:
            return
        fresh = [(c, m) for c, m in self._pairs if c.grad is not None and m.grad is None]
        more = [(c, m) for c, m in self._pairs if c.grad is not None and m.grad is not None]
        for compute, master in fresh:
            master.grad = _grad(compute).float()
        if more:
            torch._foreach_add_([_grad(m) for _, m in more], [_grad(c).float() for c, _ in more])
        for compute, _ in self._pairs:
            compute.grad = None

    def clear(self) -> None:
        """Forget all gradients."""
        for w in self.all:
            w.master.grad = w.compute.grad = None

    def gradient_norm(self) -> Tensor:
        """The 2-norm of the whole gradient, over all shards; a scalar on the device."""
        norm = torch.nn.utils.get_total_norm([_grad(m) for m in self.masters if m.grad is not None])
        return whole(norm)

    def scale_gradients(self, factor: float) -> None:
        """Multiply every gradient (clipping)."""
        torch._foreach_mul_([_local(_grad(m)) for m in self.masters if m.grad is not None], factor)

    @torch.no_grad()
    def write_back(self) -> None:
        """Give the model the masters' new values."""
        if self._pairs:
            torch._foreach_copy_([c for c, _ in self._pairs], [m for _, m in self._pairs])

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Inside, the model computes in fp32 with the masters themselves; no memory is taken for it."""
        saved = [c.data for c, _ in self._pairs]
        split, self.split = self.split, False
        for compute, master in self._pairs:
            compute.data = master.detach()
        try:
            yield
        finally:
            self.split = split
            for (compute, _), data in zip(self._pairs, saved, strict=True):
                compute.data = data

    def whole_state(self) -> dict[str, Tensor]:
        """The model's state dict in fp32, whole on every rank; to be saved."""
        with self.full_precision():
            return {name: whole(t) for name, t in self.model.state_dict().items()}


def _grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All shards of a tensor put together (on every rank), detached."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


class AdamW:
    """Torch's fused AdamW over the masters, with a rate that is handed in at each step.

    Matrices decay, vectors (norms, biases) do not: pulling a norm's gain to zero is no prior anyone holds.
    """

    def __init__(self, weights: Weights, *, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        matrices = [w.master for w in weights.all if w.master.ndim >= 2]
        vectors = [w.master for w in weights.all if w.master.ndim < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.weights = weights
        self.inner = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, eps=eps, fused=True)

    def step(self, rate: float) -> None:
        """Move the weights by one update at this learning rate, and forget the gradients."""
        for group in self.inner.param_groups:
            group["lr"] = rate
        self.inner.step()
        self.weights.write_back()
        self.weights.clear()

    def moments(self) -> Moments:
        """`<name>.exp_avg` and `<name>.exp_avg_sq`, whole on every rank; empty before the first update."""
        out: Moments = {}
        for w in self.weights.all:
            for key, value in self.inner.state.get(w.master, {}).items():
                if key != "step":
                    out[f"{w.name}.{key}"] = whole(value)
        return out

    def updates(self) -> int:
        """Updates since the moments were last reset; Adam's bias correction counts from there."""
        return max((int(state["step"]) for state in self.inner.state.values()), default=0)

    def restore(self, moments: Moments, updates: int, *, keep: tuple[str, ...] = ("exp_avg", "exp_avg_sq")) -> None:
        """Take over moments (those of `keep`, the others start at zero) and their count of updates."""
        for w in self.weights.all:
            if f"{w.name}.exp_avg" not in moments:
                continue
            state: dict[str, Tensor] = {"step": torch.tensor(float(updates))}
            if w.master.is_cuda:  # the fused kernel wants its counter beside the weights
                state["step"] = state["step"].to(w.master.device)
            for key in ("exp_avg", "exp_avg_sq"):
                value = torch.zeros_like(w.master)
                if key in keep:
                    _local(value).copy_(_shard_like(moments[f"{w.name}.{key}"], w.master))
                state[key] = value.detach()
            self.inner.state[w.master] = state


def _shard_like(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, laid out as `like`."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements).to_local()


def load_whole(weights: Weights, state: dict[str, Tensor]) -> None:
    """Put whole fp32 tensors, by the model's own names, into the masters (each rank takes its part)."""
    with torch.no_grad():
        for w in weights.all:
            _local(w.master.detach()).copy_(_shard_like(state[w.name], w.master))
    weights.write_back()
