"""Low-rank adapters, W x + s B A x: LoRA and its variants.

    lora    Hu et al. 2021 (arXiv 2106.09685): A random, B zero, s = alpha / rank
    rslora  Kalajdzievski 2023 (arXiv 2312.03732): s = alpha / sqrt(rank), which keeps the update's size over ranks
    dora    Liu et al. 2024 (arXiv 2402.09353): the sum's rows are rescaled to a trained magnitude
    pissa   Meng et al. 2024 (arXiv 2404.02948): A and B start as W's largest singular directions, and W as the rest

The layers are PEFT's. PiSSA is implemented as W x + s B A x - s B0 A0 x with the initial factors frozen: the same function
and the same gradients, but W is untouched, so the base can be restored to the bit, a resume is exact, and the published
adapter is a plain LoRA of twice the rank on the original base. (PEFT's own form changes W, and rounds it to do so.)

Not offered: OLoRA, CorDA and LoRA-GA. They start from a changed W as PiSSA does; OLoRA fails on GPT-2's transposed layers,
and the other two need gradients or activations of calibration data before an adapter can be attached.

A second instance on the same model stacks on the first, which is frozen and stays in effect; disabling the second gives the
model with the first. O-LoRA (Wang et al. 2023, arXiv 2310.14152) trains a sequence of tasks this way; its penalty reads
`directions`.

Legend: R rank, I inputs and O outputs of a layer; A is (R, I) and B (O, R).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar, get_args

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from postgrad.distributed.shards import full_tensor, local_shard, local_shard_like
from postgrad.errors import TuningError
from postgrad.tuning.expert_weights import (
    add_expert_adapter,
    current_name,
    expert_weights,
    find_wrapper,
    is_expert_weight,
    remove_wrapper,
)
from postgrad.tuning.extra_trainable import ExtraTrainable
from postgrad.tuning.parameter_location import replace_module
from postgrad.tuning.peft_lora import check_tables, read_lora, write_lora
from postgrad.tuning.quantization import Precision, is_quantized, make_quantizer
from postgrad.tuning.targets import EXPERTS, base_layer, is_transposed, resolve_targets, short_names
from postgrad.tuning.tuning import (
    PeftFolder,
    Tuning,
    TuningExport,
    check_choice,
    check_mergeable,
    check_ranges,
    trainable_parameters,
)
from postgrad.tuning.weight_delta import ExpertsDelta, LowRankDelta, RescaledDelta, TuningDelta

LoraVariant = Literal["lora", "rslora", "dora", "pissa"]
T = TypeVar("T")
_A_SUFFIX = ".lora_A.weight"
Layer = Any  # a `LoraLayer` of PEFT's, which is also an `nn.Module`


class LoraAdapter(Tuning):
    """A low-rank adapter at every targeted linear layer."""

    kind = "lora"
    has_exact_merge = exports_alone = True

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        targets: str | Sequence[str] = "all-linear",
        exclude: Sequence[str] = (),
        variant: LoraVariant = "lora",
        also_train: Sequence[str] = (),
        quantization: Precision | None = None,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        b_rate: float = 1.0,
        seed: int = 0,
    ) -> None:
        """Add adapters to the layers that match `targets` but not `exclude` (see `resolve_targets`).

        `alpha`: default twice the rank (the rank for pissa, as published). `rank_pattern`, `alpha_pattern`: other values for
        the layers whose names match a pattern. `also_train`: patterns of base parameters to train. `quantization`: store the
        blocks' weights in 4 bits ("nf4") or 8 ("int8"), as in QLoRA (Dettmers et al. 2023, arXiv 2305.14314). `b_rate`:
        the ratio of B's learning rate to A's (LoRA+, Hayou et al. 2024, arXiv 2402.12354).

        Raises `TuningError` if a pattern matches nothing or an option is invalid, `MissingExtra` for `quantization` without the
        package bitsandbytes.
        """
        super().__init__(model)
        check_choice(variant, get_args(LoraVariant), "variant")
        values = {"rank": rank, "dropout": dropout}
        check_ranges(values, {"rank": (rank >= 1, "1 or more"), "dropout": (0 <= dropout < 1, "0 to below 1")})
        self.variant = variant
        self.rank, self.alpha = rank, (rank if variant == "pissa" else 2 * rank) if alpha is None else alpha
        self.quantization = quantization
        self.has_exact_merge = quantization is None
        self.b_rate = b_rate
        experts = expert_weights(model)
        names = resolve_targets(model, targets, exclude, experts)
        _check_experts([name for name in names if name in experts], variant, dropout)
        ranks = _values_by_pattern(names, rank_pattern or {}, rank, "rank_pattern")
        alphas = _values_by_pattern(names, alpha_pattern or {}, self.alpha, "alpha_pattern")
        _check_layers(model, ranks, variant, quantization)
        self._freeze_base(also_train)
        self.adapter_name = _unused_adapter_name(model)
        self._layers: dict[str, Layer] = {}
        # fp32 copies: training may hold frozen parameters in less, but pissa's initial factors are subtracted.
        self._initial_factors: dict[str, Tensor] = {}
        settings: dict[str, Any] = {
            "lora_dropout": dropout,
            "use_rslora": variant == "rslora",
            "use_dora": variant == "dora",
            "init_lora_weights": "pissa" if variant == "pissa" else True,
        }
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            for name in names:
                self._layers[name] = self._attach_layer(name, ranks[name], alphas[name], settings)
        for parameter in self.extra_trainable.tensors().values():
            parameter.requires_grad_(True)
        trainable_parameters(model)

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Context in which the model computes as before attaching, bit for bit; a new task layer keeps its trained weights."""
        active = {name: layer.active_adapters for name, layer in self._layers.items()}
        try:
            for name, layer in self._layers.items():
                _activate_adapters(layer, [adapter for adapter in active[name] if adapter not in self._adapter_names])
            with self.extra_trainable.use_initial_values():
                yield
        finally:
            for name, layer in self._layers.items():
                _activate_adapters(layer, active[name])

    def tensors(self) -> dict[str, Tensor]:
        """`<layer>.lora_A.weight`, `<layer>.lora_B.weight` (of experts: `<tensor>.lora_A.experts` and `lora_B.experts`);
        `<layer>.lora_magnitude_vector` (dora); `<layer>.start_A.weight` and `start_B` (pissa); and the trained weights of the
        base by name."""
        tensors: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            ending = EXPERTS if isinstance(layer, ParamWrapper) else "weight"
            tensors[f"{name}.lora_A.{ending}"] = _adapter_weight(layer.lora_A, self.adapter_name)
            tensors[f"{name}.lora_B.{ending}"] = _adapter_weight(layer.lora_B, self.adapter_name)
            if self.variant == "dora":
                tensors[f"{name}.lora_magnitude_vector"] = _adapter_weight(
                    layer.lora_magnitude_vector, self.adapter_name
                )
        return tensors | self._initial_factors | self.extra_trainable.tensors()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy a `state` in. Raises `TuningError`, before anything changes, when names or shapes differ."""
        super().load(state)
        if self._initial_factors:
            for name, layer in self._layers.items():
                self._set_initial_factors(name, layer)

    def detach(self) -> None:
        """Remove the adapters, and restore weights of the base's body; a quantised base stays quantised."""
        self.extra_trainable.restore_values()
        self._remove_layers()

    def merge(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Add s B A to the plain weights, in fp32, and detach.

        Raises `TuningError`, before anything changes, for weights that are quantised or below fp32, for values that are not
        finite, and for an adapter on top of an unmerged dora, whose magnitudes belong to the unmerged weights.
        """
        self._check_merge()
        for layer in self._layers.values():
            layer.merge(adapter_names=self._adapter_names)
            for adapter in self._adapter_names:
                layer.merged_adapters.remove(adapter)
        self._remove_layers()

    def export(self) -> TuningExport:
        """The adapter without dropout and seed; pissa as a plain LoRA of twice the rank, [A; A0] and [B, -B0]."""
        double = 2 if self.variant == "pissa" else 1
        rank_alpha = {
            name: (layer.r[self.adapter_name], layer.lora_alpha[self.adapter_name])
            for name, layer in self._layers.items()
        }
        options: dict[str, Any] = {
            "kind": self.kind,
            "variant": "lora" if self.variant == "pissa" else self.variant,
            "rank": double * self.rank,
            "alpha": double * self.alpha,
            "targets": short_names(self.model, self._layers),
        }
        patterns = {
            "rank_pattern": {name: double * r for name, (r, _) in rank_alpha.items() if r != self.rank},
            "alpha_pattern": {name: double * alpha for name, (_, alpha) in rank_alpha.items() if alpha != self.alpha},
        }
        options |= {key: pattern for key, pattern in patterns.items() if pattern}
        options |= {"also_train": self.extra_trainable.names} if self.extra_trainable.names else {}
        options |= {"quantization": self.quantization} if self.quantization else {}
        return TuningExport(options, _to_plain_lora(self.state()))

    def peft(self) -> PeftFolder | None:
        """The same in PEFT's format, with task heads as `modules_to_save`; None if it cannot store a trained base weight (one
        of a targeted layer, or a tied one), or if PEFT would map the layers' names to others (some experts)."""
        return write_lora(self.model, self.export(), list(self._layers))

    def rate_factor(self, name: str) -> float:
        """`b_rate` for B."""
        return self.b_rate if name.endswith(f".lora_B.{self.adapter_name}.weight") else 1.0

    def directions(self) -> dict[str, nn.Parameter]:
        """The trained A's (R, I) by layer name; their rows span the input directions that the adapter reads (O-LoRA).

        Not those of experts, which read other directions each.
        """
        return {
            name: _adapter_weight(layer.lora_A, self.adapter_name)
            for name, layer in self._layers.items()
            if not isinstance(layer, ParamWrapper)
        }

    def weight_deltas(self) -> dict[str, TuningDelta]:
        """For every layer, the delta of its weight from A and B (dora: and the magnitudes)."""
        return {
            current_name(self.model, name) if isinstance(layer, ParamWrapper) else f"{name}.base_layer.weight": (
                self._weight_delta(name, layer)
            )
            for name, layer in self._layers.items()
        }

    def _weight_delta(self, name: str, layer: Layer) -> TuningDelta:
        base, scale = base_layer(layer), float(layer.scaling[self.adapter_name])
        a_RI, b_OR = _adapter_weight(layer.lora_A, self.adapter_name), _adapter_weight(layer.lora_B, self.adapter_name)
        if isinstance(layer, ParamWrapper):
            weight = layer.get_param()
            delta = ExpertsDelta(scale, len(weight), transposed=not layer._did_swap_in_out_features)
            return TuningDelta(delta, (a_RI, b_OR), tuple(weight.shape))
        transposed = is_transposed(base)
        shape = (a_RI.shape[1], b_OR.shape[0]) if transposed else (b_OR.shape[0], a_RI.shape[1])
        if self.variant == "dora":
            magnitude_O = _adapter_weight(layer.lora_magnitude_vector, self.adapter_name)
            delta = RescaledDelta(scale, lambda: _full_weight(base), transposed)
            return TuningDelta(delta, (a_RI, b_OR, magnitude_O), shape)
        start = self._layer_initial_factors(name) if self._initial_factors else None
        return TuningDelta(LowRankDelta(scale, transposed, start), (a_RI, b_OR), shape)

    @property
    def _adapter_names(self) -> list[str]:
        """Names of the adapters in PEFT's layers: pissa has a second one, with the initial factors."""
        return [self.adapter_name, f"{self.adapter_name}_start"] if self.variant == "pissa" else [self.adapter_name]

    def _freeze_base(self, also_train: Sequence[str]) -> None:
        """Freeze, and perhaps quantise, the base. Nothing changes if either is impossible."""
        quantize = None if self.quantization is None else make_quantizer(self.model, self.quantization)
        self.extra_trainable = ExtraTrainable(self.model, also_train)
        if quantize is not None:
            quantize()
            self.notes.append(f"the blocks' linear layers are quantised to {self.quantization}")
        if any(type(module).__name__.endswith("Experts") for module in self.model.modules()):
            self.notes.append(
                "the experts' weights are fused tensors, not linear layers, and get adapters only with "
                "targets: [all-linear, experts]"
            )

    def _attach_layer(self, name: str, rank: int, alpha: Any, settings: Mapping[str, Any]) -> Layer:
        """Add the adapter to one layer; frozen ones on it stay active."""
        if is_expert_weight(self.model, name):
            return self._attach_to_experts(name, LoraConfig(r=rank, lora_alpha=alpha, **settings))
        target = self.model.get_submodule(name)
        config = LoraConfig(r=rank, lora_alpha=alpha, fan_in_fan_out=is_transposed(target), **settings)
        earlier = list(target.active_adapters) if isinstance(target, LoraLayer) else []
        weight = base_layer(target).weight
        original = weight.data
        layer = _add_adapter(target, self.adapter_name, config)
        weight.data = original  # PEFT's pissa initialisation subtracts s B0 A0 from W
        if self.variant == "pissa":
            for part, module in (("A", layer.lora_A), ("B", layer.lora_B)):
                factor = _adapter_weight(module, self.adapter_name).detach().clone()
                self._initial_factors[f"{name}.start_{part}.weight"] = factor
            plain = replace(config, init_lora_weights=False, lora_dropout=0.0)
            layer.update_layer(self._adapter_names[1], config.r, lora_alpha=config.lora_alpha, config=plain)
            layer.scaling[self._adapter_names[1]] = -layer.scaling[self.adapter_name]
            self._set_initial_factors(name, layer)
        for adapter in self._adapter_names:
            for module in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
                if adapter in module:
                    module[adapter].float()
        layer.train(target.training)
        replace_module(self.model, name, layer)
        _activate_adapters(layer, [*earlier, *self._adapter_names])
        layer.requires_grad_(False)
        layer.set_requires_grad(self.adapter_name, True)
        return layer

    def _attach_to_experts(self, name: str, config: LoraConfig) -> Layer:
        """Add the adapter to a tensor of fused experts; frozen ones on it stay active."""
        existing = find_wrapper(self.model, name)
        earlier = list(existing.active_adapters) if existing else []
        layer: Layer = add_expert_adapter(self.model, name, self.adapter_name, config)
        for part in (layer.lora_A, layer.lora_B):
            part.requires_grad_(False)
            part[self.adapter_name].float().requires_grad_(True)
        layer.train(base_layer(layer).training)
        _activate_adapters(layer, [*earlier, self.adapter_name])
        return layer

    def _layer_initial_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A0 and B0 of a layer (pissa)."""
        return self._initial_factors[f"{name}.start_A.weight"], self._initial_factors[f"{name}.start_B.weight"]

    def _set_initial_factors(self, name: str, layer: Layer) -> None:
        """Copy A0 and B0 into the second adapter, which subtracts them."""
        for module, factor in zip((layer.lora_A, layer.lora_B), self._layer_initial_factors(name), strict=True):
            weight = _adapter_weight(module, self._adapter_names[1]).detach()
            local_shard(weight).copy_(local_shard_like(factor, weight))

    def _remove_layers(self) -> None:
        """Remove the adapters from the layers, and restore `requires_grad` if no other adapter is stacked on them."""
        is_top = all(layer.active_adapters[-1] in self._adapter_names for layer in self._layers.values())
        for name, layer in self._layers.items():
            _activate_adapters(
                layer, [adapter for adapter in layer.active_adapters if adapter not in self._adapter_names]
            )
            for adapter in self._adapter_names:
                layer.delete_adapter(adapter)
            if not layer.lora_A and isinstance(layer, ParamWrapper):
                remove_wrapper(self.model, name, layer)
            elif not layer.lora_A:
                replace_module(self.model, name, layer.base_layer)
        self._layers = {}
        if is_top:  # an adapter stacked on this one needs the base frozen
            self.extra_trainable.restore_requires_grad()

    def _check_merge(self) -> None:
        for name, layer in self._layers.items():
            if is_quantized(base_layer(layer)):
                raise TuningError(
                    f"{name} is quantised, and merging would round the update away",
                    where="tuning",
                    hint="attach the published adapter to the full-precision base without `quantization`, and merge there",
                )
            if any(a not in self._adapter_names and a in layer.lora_variant for a in layer.active_adapters):
                raise TuningError(
                    f"{name} has an earlier dora adapter, whose magnitudes belong to the unmerged weights",
                    where="tuning",
                    hint="merge the earlier adapter first",
                )
        weights = {
            name: layer.get_param() if isinstance(layer, ParamWrapper) else base_layer(layer).weight
            for name, layer in self._layers.items()
        }
        check_mergeable(weights, self.tensors())


def from_peft(model: PreTrainedModel, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> LoraAdapter:
    """Attach a LoRA folder of PEFT's: the contents of its `adapter_config.json` and `adapter_model.safetensors`.

    Raises `TuningError` for what is not supported: other methods of PEFT, adapters on embeddings or single tensors, and
    adapters saved without the changes to their base (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ).
    """
    check_tables(model, state)
    export = read_lora(model, config, state)
    tuning = LoraAdapter(model, **export.options)
    tuning.load(export.state)
    return tuning


def scalings(part: TuningExport) -> dict[str, float]:
    """The scaling s of a published adapter by layer name."""
    a_RI = {n.removesuffix(_A_SUFFIX): tensor for n, tensor in part.state.items() if n.endswith(_A_SUFFIX)}
    alphas = _values_by_pattern(
        list(a_RI), part.options.get("alpha_pattern", {}), part.options["alpha"], "alpha_pattern"
    )
    power = 0.5 if part.options["variant"] == "rslora" else 1.0
    return {name: alphas[name] / tensor.shape[0] ** power for name, tensor in a_RI.items()}


def earlier_directions(parts: Sequence[TuningExport]) -> dict[str, Tensor]:
    """The rows of all these adapters' A's by layer name, to which O-LoRA keeps the next adapter orthogonal."""
    rows: dict[str, list[Tensor]] = {}
    for part in parts:
        for name, tensor in part.state.items():
            if name.endswith(_A_SUFFIX):
                rows.setdefault(name.removesuffix(_A_SUFFIX), []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in rows.items()}


def _check_layers(
    model: PreTrainedModel, ranks: Mapping[str, int], variant: LoraVariant, quantization: Precision | None
) -> None:
    """Raise `TuningError` for layers that a variant does not support."""
    for name, rank in ranks.items():
        if is_expert_weight(model, name):
            continue
        target = model.get_submodule(name)
        if variant == "dora" and isinstance(target, BaseTunerLayer):
            raise TuningError(
                f"{name} has an earlier adapter, which dora's magnitudes would ignore",
                where="tuning.variant",
                hint="merge the earlier adapter first, or use another variant",
            )
        if variant == "dora" and (
            quantization == "int8" or getattr(base_layer(target).weight, "dtype", None) == torch.int8
        ):
            raise TuningError(
                f"dora reads the weights at every step, but int8 loses the scales of {name} when it is read",
                where="tuning.quantization",
                hint="use nf4, or another variant",
            )
        if variant == "pissa" and (quantization or is_quantized(base_layer(target))):
            raise TuningError(
                f"pissa starts from the singular directions of full weights, but {name} is quantised",
                where="tuning.quantization",
                hint="remove `quantization`, or use another variant",
            )
        smallest = min(base_layer(target).weight.shape)
        if variant == "pissa" and rank > smallest:
            raise TuningError(
                f"the rank is {rank}, but {name} has {smallest} singular directions",
                where="tuning.rank",
                expected=f"{smallest} or less",
            )


def _check_experts(names: Sequence[str], variant: LoraVariant, dropout: float) -> None:
    """Raise `TuningError` for an option that PEFT does not have for tensors."""
    if not names or (variant in ("lora", "rslora") and not dropout):
        return
    option = "dropout" if dropout else "variant"
    raise TuningError(
        f"{names[0]} holds the weights of fused experts, for which PEFT has no {'dropout' if dropout else variant}",
        where=f"tuning.{option}",
        expected="dropout: 0" if dropout else "lora or rslora",
        hint="leave experts out of `targets`, or the option",
    )


def _values_by_pattern(names: Sequence[str], patterns: Mapping[str, T], default: T, option: str) -> dict[str, T]:
    """Each layer's value: that of the first pattern that matches its name, or the end of it."""

    def matches(name: str, pattern: str) -> bool:
        return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")

    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            raise TuningError(
                f"'{pattern}' matches none of the targeted layers",
                where=f"tuning.{option}",
                expected=f"names such as {', '.join(names[:3])}",
            )
    return {name: next((v for p, v in patterns.items() if matches(name, p)), default) for name in names}


def _add_adapter(target: nn.Module, adapter: str, config: LoraConfig) -> Layer:
    """Add an adapter to one layer.

    PEFT's own injection leaves its configuration on the model, and on mixtures of experts matches other layers than the
    named ones (it truncates patterns to the end of the name, and mistakes dense layers for experts).
    """
    if isinstance(target, LoraLayer):
        target.update_layer(adapter, config.r, lora_alpha=config.lora_alpha, config=config)
        return target
    flags = {"loaded_in_4bit": True, "loaded_in_8bit": True}  # each checks the layer's class before it acts
    return LoraModel._create_new_module(config, adapter, target, r=config.r, lora_alpha=config.lora_alpha, **flags)


def _activate_adapters(layer: Layer, adapters: Sequence[str]) -> None:
    # `set_adapter` would also change `requires_grad`.
    layer._active_adapter = list(adapters)


def _adapter_weight(part: nn.ModuleDict, adapter: str) -> nn.Parameter:
    weight = part[adapter].weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _full_weight(base: Any) -> Tensor:
    """A layer's full weight, dequantised and unsharded."""
    weight = dequantize_module_weight(base).detach() if is_quantized(base) else base.weight.detach()
    return full_tensor(weight)


def _unused_adapter_name(model: nn.Module) -> str:
    """An adapter name that no layer has."""
    used = {adapter for m in model.modules() if isinstance(m, LoraLayer) for adapter in m.lora_A}
    return next(name for i in itertools.count(1) if (name := "low_rank" if i == 1 else f"low_rank_{i}") not in used)


def _to_plain_lora(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fold the initial factors into A and B: s (B A - B0 A0) = s [B, -B0] [A; A0]."""
    plain = {name: tensor for name, tensor in state.items() if ".start_" not in name}
    for name, tensor in state.items():
        if name.endswith(".start_A.weight"):
            trained = name.replace(".start_A.", ".lora_A.")
            plain[trained] = torch.cat([state[trained], tensor])
        if name.endswith(".start_B.weight"):
            trained = name.replace(".start_B.", ".lora_B.")
            plain[trained] = torch.cat([state[trained], -tensor], 1)
    return plain
