"""How does a model learn without leaving what its largest singular directions hold? (Orthogonal subspace fine-tuning)

Nayak et al. 2025 (arXiv 2504.07097): W = U S V is cut in two. The directions of the largest singular values, which carry what
was learnt before, stay; those of the smallest are trained, all of them and in full rank, and their gradients are projected
off the directions that stay. What leaves is a plain model. For the next task the weights are decomposed anew, usually with a
larger share kept.

The layers are PEFT's: W itself stays, and what is added to it is U S V of the trained directions less the same at the start. So
the base can be had back to the bit, and an untrained model differs from it by rounding only. Two things are done otherwise
than there. The projection is a step of the backward pass and not a hook on the parameter, so it also holds where parameters
are sharded, or held in a lower precision; and what is subtracted is rounded as what is trained is, so that both
cancel. The projection is the gradient's, as in the paper: a step of Adam divides it number by number, and so leaves the
trained subspace a little (in a small model an eighth of an update's norm came to lie along kept directions on one side of W,
and under a hundredth on both; with plain gradient steps nothing did).

Legend: O outputs and I inputs of a layer, H directions kept, L directions trained; W is (O, I).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import OSFConfig
from peft.tuners.osf.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from postgrad.errors import TuningError
from postgrad.tuning.extra_trainable import ExtraTrainable
from postgrad.tuning.quantization import is_quantized
from postgrad.tuning.targets import is_transposed, resolve_targets, short_names
from postgrad.tuning.tuning import PeftFolder, Tuning, TuningExport, copy_state, trainable_parameters
from postgrad.tuning.weight_delta import SubspaceDelta, TuningDelta

ADAPTER = "osf"
FACTORS = ("U_low", "S_low", "V_low")


class OrthogonalSubspace(Tuning):
    """Trains the directions of the smallest singular values of every targeted linear layer."""

    kind = "osf"
    has_exact_merge = True
    is_merged_on_export = True

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        kind: str = "osf",
        effective_rank: float = 0.5,
        targets: str | Sequence[str] = "all-linear",
        exclude: Sequence[str] = (),
        also_train: Sequence[str] = (),
        seed: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """`effective_rank`: the directions kept, as a share of a layer's (below 1) or their number. `targets`, `exclude`: see
        `targets.resolve`. `also_train`: patterns of base parameters that move besides.

        Raises `TuningError` when a pattern matches nothing, for a share that leaves nothing to train or nothing to keep, and
        for layers that are transposed (GPT-2's), quantised, or carry adapters.
        """
        super().__init__(model)
        self.effective_rank = effective_rank
        names = resolve_targets(model, targets, exclude)
        kept = {name: _num_frozen_directions(name, model.get_submodule(name), effective_rank) for name in names}
        self.extra_trainable = ExtraTrainable(model, also_train)
        self._layers: dict[str, _OSFLinear] = {}
        for name in names:
            plain = model.get_submodule(name)
            layer = _OSFLinear(plain, ADAPTER, OSFConfig(effective_rank=kept[name]), effective_rank=kept[name])
            layer.train(plain.training)
            for tensors in layer.children():
                if tensors is not plain:
                    tensors.float()
            _replace_module(model, name, layer)
            self._layers[name] = layer
        trainable_parameters(model)

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Inside, the model answers as its base, bit for bit; a task's new layer stays as it is."""
        try:
            self._set_disabled(True)
            with self.extra_trainable.use_initial_values():
                yield
        finally:
            self._set_disabled(False)

    def state(self) -> dict[str, Tensor]:
        """`<layer>.U_low` (O, L), `S_low` (L) and `V_low` (L, I), trained; `<layer>.start.*`, the same at the start; and
        `<layer>.U_high` or `V_high` where that does not follow from them; and what moves besides."""
        return {name: tensor.detach() for name, tensor in self._tensors().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave. Raises `TuningError` when names or shapes are not mine."""
        copy_state(self._tensors(), state, self.kind)

    def detach(self) -> None:
        """Put the plain layers back, and give what moved besides its old values."""
        self.extra_trainable.restore_values()
        self._remove_layers()

    def merge(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Add what was learnt to the plain weights, in fp32, and detach.

        Raises `TuningError`, before anything changes, for weights held in less than fp32 and for numbers that are not finite.
        """
        for name, layer in self._layers.items():
            if layer.weight.dtype != torch.float32:
                raise TuningError(
                    f"{name} is held in {layer.weight.dtype}, where small updates are rounded away",
                    where="tuning.merge",
                    expected="weights in torch.float32",
                    hint="load the base in float32 (or call model.float()), merge, and cast the sum",
                )
        for name, tensor in self._tensors().items():
            if not tensor.isfinite().all():
                raise TuningError(f"{name} holds numbers that are not finite", where="tuning.merge")
        with torch.no_grad():
            for layer in self._layers.values():
                layer.weight.add_(layer.get_delta_weight(ADAPTER))
        self._remove_layers()

    def export(self) -> TuningExport:
        """The same: every direction is needed to be put on the base. (What leaves a stage is the merged model.)"""
        options: dict[str, Any] = {
            "kind": self.kind,
            "effective_rank": self.effective_rank,
            "targets": short_names(self.model, self._layers),
            "also_train": self.extra_trainable.names,
        }
        return TuningExport(options, self.state())

    def peft(self) -> PeftFolder | None:
        """The same in PEFT's format; None when weights of the base move besides."""
        if self.extra_trainable.names:
            return None
        config = OSFConfig(
            effective_rank=self.effective_rank,
            target_modules=short_names(self.model, self._layers),
            inference_mode=True,
            base_model_name_or_path=self.model.name_or_path or None,
        ).to_dict()
        state = {
            f"base_model.model.{name}.osf_svd_params.{factor}": layer.tensors()[factor].detach()
            for name, layer in self._layers.items()
            for factor in FACTORS
        }
        return PeftFolder(config | {"peft_type": "OSF"}, state)

    def weight_deltas(self) -> dict[str, TuningDelta]:
        """Of every layer, what the trained directions make of its weight."""
        return {f"{name}.base_layer.weight": layer.weight_delta() for name, layer in self._layers.items()}

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors of `state`, which training and `load` change."""
        found = {
            f"{name}.{own}": tensor for name, layer in self._layers.items() for own, tensor in layer.tensors().items()
        }
        return found | self.extra_trainable.tensors()

    def _set_disabled(self, disabled: bool) -> None:
        for layer in self._layers.values():
            layer._disable_adapters = disabled  # `enable_adapters` would also decide what is trained

    def _remove_layers(self) -> None:
        for name, layer in self._layers.items():
            _replace_module(self.model, name, layer.base_layer)
        self._layers = {}
        self.extra_trainable.restore_requires_grad()


class _OSFLinear(Linear):
    """PEFT's layer, with a projection that holds wherever the gradient comes from."""

    def _attach_hooks(self, adapter_name: str) -> None:
        """None: `forward` does what they are for."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """W x + (U S V - U0 S0 V0) x, of shape (..., O), in the dtype of what comes in."""
        plain = self.base_layer(x, *args, **kwargs)
        if self._disable_adapters:
            return plain
        own = self.tensors()
        u_OL, s_L, v_LI = (own[factor] for factor in FACTORS)
        u0_OL, s0_L, v0_LI = (own[f"start.{factor}"] for factor in FACTORS)
        u_OL = _attach_projection(u_OL, own.get("U_high"), u0_OL)
        v_LI = _attach_projection(v_LI.T, own["V_high"].T if "V_high" in own else None, v0_LI.T).T
        u0_OL, s0_L, v0_LI = (start.to(u_OL.dtype) for start in (u0_OL, s0_L, v0_LI))
        out_OM = torch.cat([u_OL * s_L, -(u0_OL * s0_L)], 1).to(x.dtype)
        in_MI = torch.cat([v_LI, v0_LI]).to(x.dtype)
        return plain + nn.functional.linear(nn.functional.linear(x, in_MI), out_OM)

    def weight_delta(self) -> TuningDelta:
        """What the trained directions make of the weight; gradients of theirs are projected as `forward` projects them."""
        own = self.tensors()
        u0_OL, s0_L, v0_LI = (own[f"start.{factor}"] for factor in FACTORS)

        def side(high: Tensor | None, low: Tensor) -> Callable[[Tensor], Tensor]:
            basis = low if high is None else high
            return lambda gradient: project_gradient(gradient, basis, complement=high is not None)

        left = side(own.get("U_high"), u0_OL)
        right = side(own["V_high"].T if "V_high" in own else None, v0_LI.T)
        change = SubspaceDelta((u0_OL, s0_L, v0_LI), (left, lambda gradient_LI: right(gradient_LI.T).T))
        trained: Any = self.osf_svd_params[ADAPTER]
        return TuningDelta(change, tuple(trained[factor] for factor in FACTORS), (u0_OL.shape[0], v0_LI.shape[1]))

    def tensors(self) -> dict[str, Tensor]:
        """What is trained, what it started from, and the directions kept, where the start does not say them."""
        trained: Any = self.osf_svd_params[ADAPTER]
        found = {factor: trained[factor] for factor in FACTORS}
        found |= {f"start.{factor}": getattr(self, f"_osf_{factor}_init")[ADAPTER] for factor in FACTORS}
        for name, part in (("U_high", self._osf_U_high), ("V_high", self._osf_V_high)):
            if ADAPTER in part:
                found[name] = part[ADAPTER]
        return found


def _attach_projection(factor: Tensor, high: Tensor | None, low: Tensor) -> Tensor:
    """`factor`, whose gradient is projected off the span of `high`: for a square basis, onto that of `low`."""
    projected = _GradientProjection.apply(factor, low if high is None else high, high is not None)
    assert isinstance(projected, Tensor)
    return projected


class _GradientProjection(torch.autograd.Function):
    """The same tensor, with a gradient that is projected onto the span of an orthonormal basis, or off it."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, basis: Tensor, complement: bool) -> Tensor:
        ctx.save_for_backward(basis)
        ctx.off = complement
        return factor.view_as(factor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[bad-override]  # torch's is (*Any)
        (basis,) = ctx.saved_tensors
        return project_gradient(gradient, basis, complement=ctx.off), None, None


def project_gradient(gradient: Tensor, basis: Tensor, *, complement: bool) -> Tensor:
    """A gradient projected onto the span of an orthonormal basis, or off it."""
    exact = gradient.to(basis.dtype)
    within = basis @ (basis.T @ exact)
    return (exact - within if complement else within).to(gradient.dtype)


def _num_frozen_directions(name: str, layer: nn.Module, effective_rank: float) -> int:
    """The directions that a layer keeps. Raises `TuningError` when it cannot be decomposed, or one side would be empty."""
    if isinstance(layer, BaseTunerLayer):
        raise TuningError(
            f"{name} carries an adapter, whose part would not be decomposed",
            where="tuning.targets",
            hint="merge the adapter first",
        )
    if is_transposed(layer) or is_quantized(layer):
        raise TuningError(
            f"{name} is a {type(layer).__name__}, which is not decomposed",
            where="tuning.targets",
            expected="plain linear layers in full precision (GPT-2 has none)",
            hint="take another kind, such as lora",
        )
    assert isinstance(layer.weight, Tensor)
    directions = min(layer.weight.shape)
    kept = int(effective_rank * directions) if isinstance(effective_rank, float) else effective_rank
    if not 0 < kept < directions or (isinstance(effective_rank, float) and effective_rank >= 1):
        raise TuningError(
            f"{name} has {directions} directions, of which {effective_rank} are to be kept",
            where="tuning.effective_rank",
            expected=f"a share above 0 and below 1, or a number from 1 to {directions - 1}, so that some stay and some learn",
        )
    return kept


def _replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
