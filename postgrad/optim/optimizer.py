"""Master weights, their gradients, and the optimizers: AdamW, and Muon with AdamW for what is no matrix.

In fp32, and under FSDP2 (whose shards are fp32), the masters are the model's own parameters. For bf16 computation in one
process the model holds bf16 copies: gradients are added to the masters' fp32 `.grad` after every micro-batch, and the masters
are copied back after every update. bf16 weights would lose small updates: a step of 1e-5 is below half a unit in the last
place of most of them, unless it is rounded stochastically (`optim.low_precision_adamw`): then the copies can be the masters.

The input embedding and the output head stay fp32 and are their own masters: their gradients are sums over all positions of a
token, and in bf16 sums the frequent tokens stop moving. Frozen weights have no master and are held in the compute dtype.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from postgrad.distributed.shards import full_tensor, local_shard, local_shard_like, to_dtensor
from postgrad.errors import CheckpointError, ResumeError
from postgrad.models.layers import get_embedding_weight
from postgrad.models.model import Model
from postgrad.optim.low_precision_adamw import LowPrecisionAdamW
from postgrad.optim.moment_formats import MomentDtype, choose_format, restore_moment
from postgrad.optim.sparse_update import FullMask, UpdateMask
from postgrad.penalties.penalty import DecoupledPenalty
from postgrad.tuning.parameter_location import task_layer_parameters
from postgrad.tuning.tuning import Tuning

Moments = Mapping[str, Tensor]
_MOMENTUM = 0.95
"""Muon's default."""


@dataclass(frozen=True)
class Weight:
    """A trainable tensor: the parameter that the model computes with, and the fp32 master that the optimizer updates."""

    name: str
    parameter: nn.Parameter
    master: Tensor
    rate_factor: float = 1.0
    is_embedding: bool = False
    """Whether it is the input embedding or the output head."""

    @property
    def has_master_copy(self) -> bool:
        """Whether master and parameter are two tensors."""
        return self.master is not self.parameter


class Weights:
    """The trainable weights of a model, in a fixed order."""

    def __init__(
        self,
        model: Model,
        tuning: Tuning,
        compute_dtype: torch.dtype,
        *,
        master_copies: bool,
        master_dtype: torch.dtype = torch.float32,
    ) -> None:
        """`master_copies`: compute in copies of `compute_dtype`; otherwise the parameters themselves are the masters.

        `master_dtype`: if that of the computation, there are no copies: the optimizer updates what the model computes with.
        """
        self.model, self.tuning = model.pretrained, tuning
        self.master_copies = master_copies and compute_dtype != torch.float32
        self.compute_dtype, self.master_dtype = compute_dtype, master_dtype
        self.entries: list[Weight] = []
        head = model.head()
        embedding_ids = {id(get_embedding_weight(self.model)), id(head.weight_VD) if head else 0}
        self.has_frozen = False
        for name, parameter in self.model.named_parameters():  # tied weights come once
            if not parameter.requires_grad:
                self.has_frozen = True
                if self.master_copies and parameter.is_floating_point():
                    parameter.data = parameter.data.to(compute_dtype)
                continue
            master: Tensor = parameter
            is_embedding = id(parameter) in embedding_ids
            if self.master_copies and not is_embedding:
                if master_dtype != compute_dtype:
                    master = parameter.detach().clone().requires_grad_()
                parameter.data = parameter.data.to(compute_dtype)
            self.entries.append(Weight(name, parameter, master, tuning.rate_factor(name), is_embedding))
        self._pairs = [(w.parameter, w.master) for w in self.entries if w.has_master_copy]
        if self.master_copies:
            self.model.get_input_embeddings().register_forward_hook(self._to_compute_dtype)

    def _to_compute_dtype(self, _module: nn.Module, _inputs: object, embedded_BTD: Tensor) -> Tensor:
        """Cast the fp32 embeddings to the dtype of the blocks."""
        return embedded_BTD.to(self.compute_dtype) if self.master_copies else embedded_BTD

    @property
    def masters(self) -> list[Tensor]:
        """The fp32 tensors that the optimizer updates."""
        return [w.master for w in self.entries]

    def accumulate_gradients(self) -> None:
        """Add this micro-batch's gradients to the masters' fp32 gradients, and free them."""
        if not self._pairs:
            return
        first = [(c, m) for c, m in self._pairs if c.grad is not None and m.grad is None]
        further = [(c, m) for c, m in self._pairs if c.grad is not None and m.grad is not None]
        for compute, master in first:
            master.grad = _grad(compute).float()
        if further:
            torch._foreach_add_([_grad(m) for _, m in further], [_grad(c).float() for c, _ in further])
        for compute, _ in self._pairs:
            compute.grad = None

    def take_gradient(self, weight: Weight) -> None:
        """Move the gradient of a weight's copy to its master."""
        if weight.has_master_copy:
            weight.master.grad = _grad(weight.parameter).float()
            weight.parameter.grad = None

    def zero_gradients(self) -> None:
        """Drop all gradients."""
        for w in self.entries:
            w.master.grad = w.parameter.grad = None

    def gradient_norm(self) -> Tensor:
        """The 2-norm of the whole gradient, over all shards; a scalar on the device."""
        # The norm of a bf16 tensor would itself be rounded to 3 digits.
        grads = [_grad(m) for m in self.masters if m.grad is not None]
        if self.master_dtype != torch.float32:
            return torch.linalg.vector_norm(
                torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads])
            )
        return full_tensor(torch.nn.utils.get_total_norm(grads))

    def scale_gradients(self, factor: float) -> None:
        """Multiply all gradients (for clipping)."""
        torch._foreach_mul_([local_shard(_grad(m)) for m in self.masters if m.grad is not None], factor)

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy the masters into the model's copies."""
        if self._pairs:
            torch._foreach_copy_([c for c, _ in self._pairs], [m for _, m in self._pairs])

    @contextmanager
    def _use_masters(self) -> Iterator[None]:
        """Inside, the model holds the masters themselves, without a copy."""
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
        """Inside, the model computes in fp32, except with weights that exist in the compute dtype only."""
        if self.has_frozen or self.master_dtype != torch.float32:
            yield
            return
        master_copies, self.master_copies = self.master_copies, False
        try:
            with self._use_masters():
                yield
        finally:
            self.master_copies = master_copies

    def full_state(self) -> dict[str, Tensor]:
        """The fp32 state dict of a model without frozen weights, unsharded on every rank. Collective."""
        with self._use_masters():
            return {name: full_tensor(t).detach() for name, t in self.model.state_dict().items()}

    def state(self) -> dict[str, Tensor]:
        """The tuning's state in fp32, unsharded on every rank. Collective."""
        with self._use_masters():
            return {name: full_tensor(t).detach() for name, t in self.tuning.state().items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore an unsharded `state`; each rank takes its rows."""
        with self._use_masters():
            own = self.tuning.state()
            self.tuning.load({name: _shard_like(t, own.get(name)) for name, t in state.items()})
        self.write_back()


def _grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def _shard_like(tensor: Tensor, like: Tensor | None) -> Tensor:
    """An unsharded tensor, sharded as `like`."""
    return tensor if like is None else to_dtensor(local_shard_like(tensor, like).to(like.device), like)


class Optimizer:
    """Torch's optimizers over the masters, each trained weight in one of them, with a learning rate given at each step.

    Weight decay acts on matrices; not on vectors (norms, biases), nor on input embedding and output head, whose rows for rare
    tokens would only shrink (`decay_tables` includes them).
    """

    def __init__(
        self,
        weights: Weights,
        inner: Sequence[torch.optim.Optimizer],
        *,
        decoupled_penalties: Sequence[DecoupledPenalty] = (),
        update_mask: UpdateMask | None = None,
    ) -> None:
        """`decoupled_penalties` act within the step, as weight decay does. `update_mask`: default dense updates."""
        self.weights, self.decoupled_penalties = weights, decoupled_penalties
        self.update_mask = update_mask or FullMask()
        self.inner = tuple(inner)
        self._owners = {id(m): o for o in self.inner for group in o.param_groups for m in group["params"]}

    def step(self, rate: float) -> int | None:
        """Update the weights at this learning rate, and drop the gradients.

        Returns the number of entries that a sparse update changed, over all ranks; None for a dense one.
        """
        self.update_mask.before_update()
        for penalty in self.decoupled_penalties:
            penalty.decay(rate)
        for optimizer in self.inner:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["rate_factor"]
            optimizer.step()
        num_updated = self.update_mask.after_update(ChainMap(*(optimizer.state for optimizer in self.inner)))
        self.weights.write_back()
        self.weights.zero_gradients()
        return num_updated

    @torch.no_grad()
    def step_weight(self, weight: Weight, rate: float) -> None:
        """Update one weight at this learning rate, and drop its gradient; without penalties and masks."""
        optimizer = self._owners[id(weight.master)]
        groups = optimizer.param_groups
        own = next(group for group in groups if any(master is weight.master for master in group["params"]))
        optimizer.param_groups = [{**own, "params": [weight.master], "lr": rate * own["rate_factor"]}]
        try:
            optimizer.step()
        finally:
            optimizer.param_groups = groups
        if weight.has_master_copy:
            weight.parameter.copy_(weight.master)
        weight.master.grad = weight.parameter.grad = None

    def skip(self) -> None:
        """Drop the gradients of a step without an update."""
        self.update_mask.discard()
        self.weights.zero_gradients()

    def moments(self) -> Moments:
        """Moments by `<name>.<moment>`, unsharded on every rank; empty before the first update. Collective."""
        return {name: full_tensor(value) for name, value in self.sharded_moments().items()}

    def sharded_moments(self) -> Moments:
        """Moments by `<name>.<moment>`, sharded as the masters; empty before the first update."""
        return {
            f"{w.name}.{key}": value.detach()
            for w in self.weights.entries
            for key, value in self._owners[id(w.master)].state.get(w.master, {}).items()
            if key != "step"
        }

    def update_counts(self) -> dict[str, int]:
        """Updates of each weight since its moments were reset, for Adam's bias correction; 0 for a weight that has none.

        They differ between weights with gradual unfreezing.
        """
        states = ((w.name, self._owners[id(w.master)].state.get(w.master)) for w in self.weights.entries)
        return {name: int(state.get("step", 0)) for name, state in states if state}

    def restore(self, moments: Moments, update_counts: dict[str, int], *, keep: Collection[str] | None = None) -> None:
        """Restore moments (those in `keep`, the others start at zero; None: all) and update counts.

        Raises `ResumeError` for moments of another optimizer.
        """
        for w in self.weights.entries:
            if w.name not in update_counts:
                continue
            optimizer = self._owners[id(w.master)]
            names = MOMENT_NAMES[type(optimizer)]
            dtype = optimizer.moment_dtype if isinstance(optimizer, LowPrecisionAdamW) else "float32"
            format = choose_format(dtype, w.master)
            state: dict[str, Any] = {}
            if isinstance(optimizer, LowPrecisionAdamW):
                state["step"] = update_counts[w.name]
            elif isinstance(optimizer, torch.optim.AdamW):
                state["step"] = torch.tensor(float(update_counts[w.name]))
                if w.master.is_cuda:  # the fused kernel needs its counter on the same device
                    state["step"] = state["step"].to(w.master.device)
            for name in names:
                state |= format.empty(name, w.master)
                if keep is not None and name not in keep:
                    continue
                if not restore_moment(moments, f"{w.name}.", name, state, format):
                    raise ResumeError(
                        f"the checkpoint has no {w.name}.{name}: another optimizer wrote it",
                        where="optimizer.moments",
                        expected="moments of the same optimizer",
                        hint="set optimizer.moments: reset",
                    )
            optimizer.state[w.master] = state


MOMENT_NAMES: Mapping[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    LowPrecisionAdamW: ("exp_avg", "exp_avg_sq"),
    torch.optim.Muon: ("momentum_buffer",),
}
"""The moments of each optimizer."""


class AdamW(Optimizer):
    """Torch's fused AdamW over all masters; with moments or weights of fewer bits, `LowPrecisionAdamW`."""

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
        moment_dtype: MomentDtype = "float32",
        seed: int = 0,
    ) -> None:
        """`seed`: of stochastic rounding."""
        groups = _group_weights(weights.entries, weight_decay, decay_tables)
        inner: torch.optim.Optimizer
        if moment_dtype == "float32" and weights.master_dtype == torch.float32:
            inner = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)
        else:
            inner = LowPrecisionAdamW(groups, betas=betas, eps=eps, moment_dtype=moment_dtype, seed=seed)
        super().__init__(weights, [inner], decoupled_penalties=decoupled_penalties, update_mask=update_mask)


class Muon(Optimizer):
    """Torch's Muon over the matrices of the blocks and of adapters; AdamW over embeddings, heads, vectors and other tensors.

    An update is the orthogonalised momentum (Jordan et al. 2024), times 0.2 sqrt(max(rows, columns)), which gives it the size
    of AdamW's, so rates and weight decay are those of AdamW (Liu et al. 2025, arXiv 2502.16982).
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
        momentum: float | None = None,
    ) -> None:
        """`momentum`: of Muon, default 0.95; the other options are AdamW's, and the weight decay that of both."""
        heads = set(task_layer_parameters(weights.model))
        matrices = [w for w in weights.entries if w.master.ndim == 2 and not w.is_embedding and w.name not in heads]
        ids = set(map(id, matrices))
        others = [w for w in weights.entries if id(w) not in ids]
        inner: list[torch.optim.Optimizer] = []
        if matrices:
            groups = _group_weights(matrices, weight_decay, decay_tables)
            inner.append(
                torch.optim.Muon(
                    groups, lr=0.0, momentum=_MOMENTUM if momentum is None else momentum, adjust_lr_fn="match_rms_adamw"
                )
            )
        if others:
            groups = _group_weights(others, weight_decay, decay_tables)
            inner.append(torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True))
        super().__init__(weights, inner, decoupled_penalties=decoupled_penalties, update_mask=update_mask)


def _group_weights(entries: Sequence[Weight], weight_decay: float, decay_tables: bool) -> list[dict[str, Any]]:
    """The masters in groups of one weight decay and one factor of the rate."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for w in entries:
        has_decay = w.master.ndim >= 2 and (decay_tables or not w.is_embedding)
        groups.setdefault((weight_decay if has_decay else 0.0, w.rate_factor), []).append(w.master)
    return [
        {"params": masters, "weight_decay": decay, "rate_factor": factor} for (decay, factor), masters in groups.items()
    ]


def load_full_state(weights: Weights, state: Mapping[str, Tensor]) -> None:
    """Copy an unsharded fp32 state dict into the masters; each rank takes its rows.

    A tied weight has any of its names in the state. Buffers that are in it are copied, too.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in weights.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    with torch.no_grad():
        for w in weights.entries:
            stored = next((state[name] for name in (w.name, *names[id(w.parameter)]) if name in state), None)
            if stored is None:
                raise CheckpointError(
                    "the checkpoint lacks this weight", where=w.name, expected="every weight of the model"
                )
            local_shard(w.master.detach()).copy_(local_shard_like(stored, w.master))
        for name, buffer in weights.model.named_buffers():  # such as ranges of activations, which training moves
            if name in state:
                buffer.copy_(state[name])
    weights.write_back()
