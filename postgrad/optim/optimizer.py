"""Which numbers does the optimizer move? fp32 master weights, their gradients, and AdamW's moments.

In fp32, and under FSDP2 (whose shards are fp32 already), the masters are the model's own parameters. For bf16 compute in
one process the model holds bf16 copies: gradients are gathered into the masters' fp32 `.grad` after every micro-batch,
and the masters are written back after every update. Small updates would be lost in bf16 weights (a step of 1e-5 is below
half a unit in the last place of most of them); in the masters they are not.

The tables (input embedding and output head) stay fp32 and are their own masters: a table's gradient is a sum over every
place a token occurs, and summed in bf16 the frequent tokens stop moving.

Weights that a tuning holds fast need no master: they are held in the compute dtype alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from postgrad.models.model import Model
from postgrad.models.pretrained import get_embedding_weight
from postgrad.optim.sparse_update import FullMask, UpdateMask
from postgrad.penalties.penalty import DecoupledPenalty
from postgrad.tuning.tuning import Tuning

Moments = dict[str, Tensor]


@dataclass(frozen=True)
class Weight:
    """One trainable tensor: what the model computes with, and the fp32 master that the optimizer moves."""

    name: str
    parameter: nn.Parameter
    master: Tensor
    rate_factor: float = 1.0
    is_embedding: bool = False
    """Whether it is the input embedding or the output head."""

    @property
    def has_master_copy(self) -> bool:
        """Whether master and compute weight are two tensors."""
        return self.master is not self.parameter


class Weights:
    """The trainable weights of a model, in a fixed order."""

    def __init__(self, model: Model, tuning: Tuning, compute_dtype: torch.dtype, *, master_copies: bool) -> None:
        """`split`: compute in copies of dtype `compute`; otherwise the parameters themselves are the masters."""
        self.model, self.tuning = model.pretrained, tuning
        self.master_copies = master_copies and compute_dtype != torch.float32
        self.compute_dtype = compute_dtype
        self.entries: list[Weight] = []
        head = model.head()
        tables = {id(get_embedding_weight(self.model)), id(head.weight_VD) if head else 0}
        self.has_frozen = False
        for name, parameter in self.model.named_parameters():  # tied weights come once
            if not parameter.requires_grad:
                self.has_frozen = True
                if self.master_copies and parameter.is_floating_point():
                    parameter.data = parameter.data.to(compute_dtype)
                continue
            master: Tensor = parameter
            table = id(parameter) in tables
            if self.master_copies and not table:
                master = parameter.detach().clone().requires_grad_()
                parameter.data = parameter.data.to(compute_dtype)
            self.entries.append(Weight(name, parameter, master, tuning.rate_factor(name), table))
        self._pairs = [(w.parameter, w.master) for w in self.entries if w.has_master_copy]
        if self.master_copies:
            self.model.get_input_embeddings().register_forward_hook(self._to_compute_dtype)

    def _to_compute_dtype(self, _module: nn.Module, _inputs: object, embedded_BTD: Tensor) -> Tensor:
        """What the fp32 table gives, in the dtype of the blocks."""
        return embedded_BTD.to(self.compute_dtype) if self.master_copies else embedded_BTD

    @property
    def masters(self) -> list[Tensor]:
        """The fp32 tensors the optimizer moves."""
        return [w.master for w in self.entries]

    def numel(self) -> int:
        """Trainable numbers, over all ranks."""
        return sum(w.master.numel() for w in self.entries)

    def accumulate_gradients(self) -> None:
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

    def zero_gradients(self) -> None:
        """Forget all gradients."""
        for w in self.entries:
            w.master.grad = w.parameter.grad = None

    def gradient_norm(self) -> Tensor:
        """The 2-norm of the whole gradient, over all shards; a scalar on the device."""
        norm = torch.nn.utils.get_total_norm([_grad(m) for m in self.masters if m.grad is not None])
        return full_tensor(norm)

    def scale_gradients(self, factor: float) -> None:
        """Multiply every gradient (clipping)."""
        torch._foreach_mul_([_local_shard(_grad(m)) for m in self.masters if m.grad is not None], factor)

    @torch.no_grad()
    def write_back(self) -> None:
        """Give the model the masters' new values."""
        if self._pairs:
            torch._foreach_copy_([c for c, _ in self._pairs], [m for _, m in self._pairs])

    @contextmanager
    def _use_masters(self) -> Iterator[None]:
        """Inside, the model holds the masters themselves; no memory is taken for it."""
        saved = [c.data for c, _ in self._pairs]
        for compute, master in self._pairs:
            compute.data = master.detach()
        try:
            yield
        finally:
            for (compute, _), data in zip(self._pairs, saved, strict=True):
                compute.data = data

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Inside, the model computes in fp32; where weights are held fast in the compute dtype, it computes as always."""
        if self.has_frozen:
            yield
            return
        split, self.master_copies = self.master_copies, False
        try:
            with self._use_masters():
                yield
        finally:
            self.master_copies = split

    def full_state(self) -> dict[str, Tensor]:
        """The model's state dict in fp32, whole on every rank, for a model of which nothing is held fast."""
        with self._use_masters():
            return {name: full_tensor(t) for name, t in self.model.state_dict().items()}

    def state(self) -> dict[str, Tensor]:
        """What the tuning keeps of itself, in fp32 and whole on every rank; to be saved."""
        with self._use_masters():
            return {name: full_tensor(t) for name, t in self.tuning.state().items()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take back whole tensors that `state` gave (each rank takes its part)."""
        with self._use_masters():
            own = self.tuning.state()
            self.tuning.load({name: _distribute_like(t, own.get(name)) for name, t in state.items()})
        self.write_back()


def _grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def _local_shard(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """All shards of a tensor put together (on every rank), detached."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


class AdamW:
    """Torch's fused AdamW over the masters, with a rate that is handed in at each step.

    Matrices decay; vectors (norms, biases) do not, as pulling a norm's gain to zero is no prior anyone holds, and neither do
    the tables, whose rare rows would only shrink (`decay_tables` lets them).
    """

    def __init__(
        self,
        weights: Weights,
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        decay_tables: bool = False,
        decoupled_penalties: Sequence[DecoupledPenalty] = (),
        update_mask: UpdateMask | None = None,
    ) -> None:
        """`decays`: what else pulls in the step itself, beside `weight_decay`. `moving`: which numbers an update moves; left
        out: all."""
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for w in weights.entries:
            shrinks = w.master.ndim >= 2 and (decay_tables or not w.is_embedding)
            groups.setdefault((weight_decay if shrinks else 0.0, w.rate_factor), []).append(w.master)
        self.weights, self.decoupled_penalties = weights, decoupled_penalties
        self.update_mask = update_mask or FullMask()
        self.inner = torch.optim.AdamW(
            [
                {"params": masters, "weight_decay": decay, "rate_factor": factor}
                for (decay, factor), masters in groups.items()
            ],
            lr=0.0,
            betas=betas,
            eps=eps,
            fused=True,
        )

    def step(self, rate: float) -> int | None:
        """Move the weights by one update at this learning rate, and forget the gradients.

        Returns how many numbers were moved, over all ranks, where it is not simply all.
        """
        self.update_mask.before_update()
        for decay in self.decoupled_penalties:
            decay.decay(rate)
        for group in self.inner.param_groups:
            group["lr"] = rate * group["rate_factor"]
        self.inner.step()
        moved = self.update_mask.after_update(self.inner.state)
        self.weights.write_back()
        self.weights.zero_gradients()
        return moved

    def moments(self) -> Moments:
        """`<name>.exp_avg` and `<name>.exp_avg_sq`, whole on every rank; empty before the first update."""
        out: Moments = {}
        for w in self.weights.entries:
            for key, value in self.inner.state.get(w.master, {}).items():
                if key != "step":
                    out[f"{w.name}.{key}"] = full_tensor(value)
        return out

    def update_counts(self) -> dict[str, int]:
        """Updates of each weight since its moments were last reset; Adam's bias correction counts from there.

        They differ where weights were unfrozen one after the other.
        """
        return {
            w.name: int(self.inner.state[w.master]["step"])
            for w in self.weights.entries
            if w.master in self.inner.state
        }

    def restore(
        self, moments: Moments, update_counts: dict[str, int], *, keep: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    ) -> None:
        """Take over moments (those of `keep`, the others start at zero) and their counts of updates."""
        for w in self.weights.entries:
            if w.name not in update_counts:
                continue
            state: dict[str, Tensor] = {"step": torch.tensor(float(update_counts[w.name]))}
            if w.master.is_cuda:  # the fused kernel wants its counter beside the weights
                state["step"] = state["step"].to(w.master.device)
            for key in ("exp_avg", "exp_avg_sq"):
                value = torch.zeros_like(w.master)
                if key in keep:
                    _local_shard(value).copy_(_local_shard_like(moments[f"{w.name}.{key}"], w.master))
                state[key] = value.detach()
            self.inner.state[w.master] = state


def _local_shard_like(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, laid out as `like`."""
    laid = _distribute_like(value, like)
    return laid.to_local() if isinstance(laid, DTensor) else laid


def _distribute_like(value: Tensor, like: Tensor | None) -> Tensor:
    """A whole tensor, sharded as `like` is."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def load_full_state(weights: Weights, state: dict[str, Tensor]) -> None:
    """Put whole fp32 tensors, by the model's own names, into the masters (each rank takes its part)."""
    with torch.no_grad():
        for w in weights.entries:
            _local_shard(w.master.detach()).copy_(_local_shard_like(state[w.name], w.master))
    weights.write_back()
