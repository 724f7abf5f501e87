"""Orthogonal subspace fine-tuning (OSF): train the small singular directions, freeze the large ones.

Nayak et al. 2025 (arXiv 2504.07097): W = U S V is split in two. The directions of the largest singular values, which carry
earlier knowledge, are frozen; those of the smallest are trained in full rank, with gradients projected off the frozen
directions. A plain model is published. For the next task the weights are decomposed anew, usually with a larger share frozen.

The layers are PEFT's: W is unchanged, and the layer adds U S V of the trained directions minus its initial value. So the base
can be restored to the bit, and an untrained model differs from it by rounding only. Two things differ from PEFT. The
projection is a step of the backward pass instead of a hook on the parameter, so it also holds for sharded parameters and in
lower precision; and the initial value is rounded as the trained one is, so that both cancel. As in the paper, the gradient is
projected, not the update: Adam divides it element by element, so a step leaves the trained subspace a little (in a small
model an eighth of an update's norm lay along frozen directions on one side of W, under a hundredth on both; none with SGD).

Legend: O outputs and I inputs of a layer, H frozen directions, L trained directions; W is (O, I).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from postgrad.tuning.parameter_location import replace_module
from postgrad.tuning.quantization import is_quantized
from postgrad.tuning.targets import is_transposed, resolve_targets, short_names
from postgrad.tuning.tuning import Tuning, check_mergeable, trainable_parameters
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
        effective_rank: float = 0.5,
        targets: str | Sequence[str] = "all-linear",
        also_train: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        """`effective_rank`: the frozen directions, as a fraction of a layer's (below 1) or their number. `targets`:
        see `resolve_targets`. `also_train`: patterns of base parameters to train.

        Raises `TuningError` if a pattern matches nothing, for a fraction that leaves nothing to train or to freeze, and for
        layers that are transposed (GPT-2's), quantised, or have adapters.
        """
        super().__init__(model)
        names = resolve_targets(model, targets)
        self.options = {
            "effective_rank": effective_rank,
            "targets": short_names(model, names),
            "also_train": list(also_train),
        }
        frozen = {name: _num_frozen_directions(name, model.get_submodule(name), effective_rank) for name in names}
        self.extra_trainable = ExtraTrainable(model, also_train)
        self._layers: dict[str, _OSFLinear] = {}
        for name in names:
            plain = model.get_submodule(name)
            layer = _OSFLinear(plain, ADAPTER, OSFConfig(effective_rank=frozen[name]), effective_rank=frozen[name])
            layer.train(plain.training)
            for child in layer.children():
                if child is not plain:
                    child.float()
            replace_module(model, name, layer)
            self._layers[name] = layer
        trainable_parameters(model)

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Context in which the model computes as its base, bit for bit; a new task layer keeps its trained weights."""
        try:
            self._set_disabled(True)
            with self.extra_trainable.use_initial_values():
                yield
        finally:
            self._set_disabled(False)

    def tensors(self) -> dict[str, Tensor]:
        """`<layer>.U_low` (O, L), `S_low` (L) and `V_low` (L, I), trained; `<layer>.start.*`, their initial values;
        `<layer>.U_high` or `V_high` where they do not follow from those; and the trained weights of the base by name."""
        own = {
            f"{name}.{part}": tensor for name, layer in self._layers.items() for part, tensor in layer.tensors().items()
        }
        return own | self.extra_trainable.tensors()

    def detach(self) -> None:
        """Put the plain layers back, and restore weights of the base's body."""
        self.extra_trainable.restore_values()
        self._remove_layers()

    def merge(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Add the deltas to the plain weights, in fp32, and detach.

        Raises `TuningError`, before anything changes, for weights below fp32 and for values that are not finite.
        """
        check_mergeable({name: layer.weight for name, layer in self._layers.items()}, self.tensors())
        with torch.no_grad():
            for layer in self._layers.values():
                layer.weight.add_(layer.get_delta_weight(ADAPTER))
        self._remove_layers()

    def weight_deltas(self) -> dict[str, TuningDelta]:
        """For every layer, the delta of its weight from the trained directions."""
        return {f"{name}.base_layer.weight": layer.weight_delta() for name, layer in self._layers.items()}

    def _set_disabled(self, disabled: bool) -> None:
        for layer in self._layers.values():
            layer._disable_adapters = disabled  # `enable_adapters` would also change `requires_grad`

    def _remove_layers(self) -> None:
        for name, layer in self._layers.items():
            replace_module(self.model, name, layer.base_layer)
        self._layers = {}
        self.extra_trainable.restore_requires_grad()


class _OSFLinear(Linear):
    """PEFT's layer, with the projection in its own backward pass."""

    def _attach_hooks(self, adapter_name: str) -> None:
        """No hooks: `forward` projects the gradients."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """W x + (U S V - U0 S0 V0) x, of shape (..., O), in the dtype of `x`."""
        plain = self.base_layer(x, *args, **kwargs)
        if self._disable_adapters:
            return plain
        own = self.tensors()
        u_OL, s_L, v_LI = (own[factor] for factor in FACTORS)
        u0_OL, s0_L, v0_LI = (own[f"start.{factor}"] for factor in FACTORS)
        u_OL = _attach_projection(u_OL, own.get("U_high"), u0_OL)
        v_LI = _attach_projection(v_LI.T, own["V_high"].T if "V_high" in own else None, v0_LI.T).T
        u0_OL, s0_L, v0_LI = (start.to(u_OL.dtype) for start in (u0_OL, s0_L, v0_LI))
        # Both terms in one product of 2 L directions, so that they are rounded alike and cancel at the start.
        out_OM = torch.cat([u_OL * s_L, -(u0_OL * s0_L)], 1).to(x.dtype)
        in_MI = torch.cat([v_LI, v0_LI]).to(x.dtype)
        return plain + nn.functional.linear(nn.functional.linear(x, in_MI), out_OM)

    def weight_delta(self) -> TuningDelta:
        """The delta of the weight; gradients of U and V are projected as in `forward`."""
        own = self.tensors()
        u0_OL, s0_L, v0_LI = (own[f"start.{factor}"] for factor in FACTORS)

        def projection(high: Tensor | None, low: Tensor) -> Callable[[Tensor], Tensor]:
            basis = low if high is None else high
            return lambda gradient: project_gradient(gradient, basis, complement=high is not None)

        left = projection(own.get("U_high"), u0_OL)
        right = projection(own["V_high"].T if "V_high" in own else None, v0_LI.T)
        delta = SubspaceDelta((u0_OL, s0_L, v0_LI), (left, lambda gradient_LI: right(gradient_LI.T).T))
        trained: Any = self.osf_svd_params[ADAPTER]
        return TuningDelta(delta, tuple(trained[factor] for factor in FACTORS), (u0_OL.shape[0], v0_LI.shape[1]))

    def tensors(self) -> dict[str, Tensor]:
        """The trained factors, their initial values, and the frozen directions.

        PEFT omits the frozen directions where the SVD factor is square: there the initial trained ones determine their span.
        """
        trained: Any = self.osf_svd_params[ADAPTER]
        tensors = {factor: trained[factor] for factor in FACTORS}
        tensors |= {f"start.{factor}": getattr(self, f"_osf_{factor}_init")[ADAPTER] for factor in FACTORS}
        for name, part in (("U_high", self._osf_U_high), ("V_high", self._osf_V_high)):
            if ADAPTER in part:
                tensors[name] = part[ADAPTER]
        return tensors


def _attach_projection(factor: Tensor, high: Tensor | None, low: Tensor) -> Tensor:
    """`factor` with its gradient projected off the span of `high`; without `high`, onto that of `low`.

    `high` is missing where the factor is square: there low and high directions together span the whole space, so the
    complement of `high` is the span of `low`.
    """
    projected = _GradientProjection.apply(factor, low if high is None else high, high is not None)
    assert isinstance(projected, Tensor)
    return projected


class _GradientProjection(torch.autograd.Function):
    """The identity, with a gradient projected onto the span of an orthonormal basis, or off it."""

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
    """The part of a gradient in the span of an orthonormal basis, `B B^T G`; with `complement` the rest, `G - B B^T G`."""
    exact = gradient.to(basis.dtype)
    inside = basis @ (basis.T @ exact)
    return (exact - inside if complement else inside).to(gradient.dtype)


def _num_frozen_directions(name: str, layer: nn.Module, effective_rank: float) -> int:
    """How many directions of a layer are frozen. Raises `TuningError` if none, or all, would be, or it cannot be decomposed."""
    if isinstance(layer, BaseTunerLayer):
        raise TuningError(
            f"{name} has an adapter, which would not be decomposed",
            where="tuning.targets",
            hint="merge the adapter first",
        )
    if is_transposed(layer) or is_quantized(layer):
        raise TuningError(
            f"{name} is a {type(layer).__name__}, which cannot be decomposed",
            where="tuning.targets",
            expected="plain linear layers in full precision (GPT-2 has none)",
            hint="use another kind, such as lora",
        )
    assert isinstance(layer.weight, Tensor)
    directions = min(layer.weight.shape)
    frozen = int(effective_rank * directions) if isinstance(effective_rank, float) else effective_rank
    if not 0 < frozen < directions or (isinstance(effective_rank, float) and effective_rank >= 1):
        raise TuningError(
            f"effective_rank is {effective_rank}, but {name} has {directions} directions",
            where="tuning.effective_rank",
            expected=f"a fraction above 0 and below 1, or a number from 1 to {directions - 1}: some are frozen, some trained",
        )
    return frozen
