"""How is a large matrix moved by a small one? W x + s B A x, with A and B of a low rank (the LoRA family).

    lora    Hu et al. 2021 (arXiv 2106.09685): A random, B zero, s = alpha / rank
    rslora  Kalajdzievski 2023 (arXiv 2312.03732): s = alpha / sqrt(rank), which keeps the update's size over ranks
    dora    Liu et al. 2024 (arXiv 2402.09353): the sum's rows are rescaled to a trained magnitude
    pissa   Meng et al. 2024 (arXiv 2404.02948): A and B start as W's largest singular directions, and W as the rest

The layers are PEFT's. PiSSA is written here as W x + s B A x - s B0 A0 x with the start kept and frozen: the same function
and the same gradients, but W stays as it was, so that the base can be had back to the bit, a resume is exact, and what is
published is a plain LoRA of twice the rank on the untouched base. (PEFT's own form changes W, and rounds it to do so.)

Not offered: OLoRA, CorDA and LoRA-GA. They start from a changed W as PiSSA does; OLoRA fails on GPT-2's transposed layers,
and the other two need gradients or activations of calibration data before there is anything to attach.

A second instance on a model that carries a first stands on it: the first is frozen and stays in effect. Its `off` is the
model with the first one. That is how tasks follow one another in O-LoRA (Wang et al. 2023, arXiv 2310.14152), whose penalty
`directions` is for.

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
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from postgrad.errors import TuningError, suggest_nearest
from postgrad.tuning.extra_trainable import ExtraTrainable
from postgrad.tuning.peft_lora import read_lora, write_lora
from postgrad.tuning.quantization import Precision, is_quantized, make_quantizer
from postgrad.tuning.targets import is_transposed, resolve_targets, short_names
from postgrad.tuning.tuning import PeftFolder, Tuning, TuningExport, copy_state, trainable_parameters
from postgrad.tuning.weight_delta import LowRankDelta, RescaledDelta, TuningDelta

LoraVariant = Literal["lora", "rslora", "dora", "pissa"]
T = TypeVar("T")
_A_SUFFIX = ".lora_A.weight"
Layer = Any  # a `LoraLayer` of PEFT's, which is also an `nn.Module`


class LoraAdapter(Tuning):
    """A low-rank adapter at every targeted linear layer."""

    kind = "lora"
    has_exact_merge = True

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        kind: str = "lora",
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
        svd_iterations: int | None = None,
        b_rate: float = 1.0,
        seed: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Put adapters on the layers that `targets` (see `targets.resolve`) name and `exclude` does not.

        `alpha`: twice the rank when left out (the rank for pissa, as published). `rank_pattern`, `alpha_pattern`: other values
        for the layers whose names match a pattern. `also_train`: patterns of base parameters that move too. `quantization`: hold the
        blocks' weights in 4 bits ("nf4") or 8 ("int8"), as in QLoRA (Dettmers et al. 2023, arXiv 2305.14314).
        `svd_iterations`: find pissa's singular directions by that many subspace iterations, not exactly. `b_rate`: how many
        times A's learning rate B's is (LoRA+, Hayou et al. 2024, arXiv 2402.12354).

        Raises `TuningError` when a pattern matches nothing or an option does not fit, `MissingExtra` for `quantization` without
        the package bitsandbytes.
        """
        super().__init__(model)
        _check_options(rank, dropout, variant)
        self.variant = variant
        self.rank, self.alpha = rank, (rank if variant == "pissa" else 2 * rank) if alpha is None else alpha
        self.quantization = quantization
        self.has_exact_merge = quantization is None
        self.b_rate = b_rate
        names = resolve_targets(model, targets, exclude)
        ranks = _values_by_pattern(names, rank_pattern or {}, rank, "rank_pattern")
        alphas = _values_by_pattern(names, alpha_pattern or {}, self.alpha, "alpha_pattern")
        _check_layers(model, ranks, variant, quantization)
        hold = None if quantization is None else make_quantizer(model, quantization)
        self.extra_trainable = ExtraTrainable(model, also_train)
        if hold is not None:
            hold()
            self.notes.append(f"the blocks' linear layers are held in {quantization}")
        if any(type(module).__name__.endswith("Experts") for module in model.modules()):
            self.notes.append("the weights of experts are one tensor each, not linear layers, and stay as they are")

        self.adapter_name = _unused_adapter_name(model)
        self._layers: dict[str, Layer] = {}
        # Training may hold what is frozen in less than fp32; pissa's start is subtracted, so it is kept in full.
        self._initial_factors: dict[str, Tensor] = {}
        singular: Any = "pissa" if svd_iterations is None else f"pissa_niter_{svd_iterations}"
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            for name in names:
                config = LoraConfig(
                    r=ranks[name],
                    lora_alpha=alphas[name],  # type: ignore[bad-argument-type]  # PEFT divides it, whatever it is
                    lora_dropout=dropout,
                    use_rslora=variant == "rslora",
                    use_dora=variant == "dora",
                    init_lora_weights=singular if variant == "pissa" else True,
                    fan_in_fan_out=is_transposed(model.get_submodule(name)),
                )
                self._layers[name] = self._attach_layer(name, config)
        for parameter in self.extra_trainable.tensors().values():
            parameter.requires_grad_(True)
        trainable_parameters(model)

    # -- what every tuning answers

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Inside, the model answers as it did before this was attached, bit for bit; a task's new layer stays as it is."""
        active = {name: layer.active_adapters for name, layer in self._layers.items()}
        try:
            for name, layer in self._layers.items():
                _activate_adapters(layer, [adapter for adapter in active[name] if adapter not in self._adapter_names])
            with self.extra_trainable.use_initial_values():
                yield
        finally:
            for name, layer in self._layers.items():
                _activate_adapters(layer, active[name])

    def state(self) -> dict[str, Tensor]:
        """`<layer>.lora_A.weight`, `<layer>.lora_B.weight`; `<layer>.lora_magnitude_vector` (dora); `<layer>.start_A.weight`
        and `start_B` (pissa); and what moves besides, by its own name."""
        return {name: tensor.detach() for name, tensor in self._tensors().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave. Raises `TuningError` when names or shapes are not mine."""
        copy_state(self._tensors(), state, self.kind)
        for name, layer in self._layers.items() if self._initial_factors else ():
            _set_initial_factors(
                layer,
                self._adapter_names[1],
                self._initial_factors[f"{name}.start_A.weight"],
                self._initial_factors[f"{name}.start_B.weight"],
            )

    def detach(self) -> None:
        """Take the adapters out, and give what moved besides its old values; a quantised base stays quantised."""
        self.extra_trainable.restore_values()
        self._remove_layers()

    def merge(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Add s B A to the plain weights, in fp32, and detach.

        Raises `TuningError`, before anything changes, for weights that are quantised or held in less than fp32 (the update
        would be rounded away: it is often smaller than half a unit in their last place), for numbers that are not finite,
        and for an adapter on top of an unmerged dora, whose magnitudes belong to the weights as they are.
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
        own = {
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
            "rank_pattern": {name: double * r for name, (r, _) in own.items() if r != self.rank},
            "alpha_pattern": {name: double * alpha for name, (_, alpha) in own.items() if alpha != self.alpha},
        }
        options |= {key: pattern for key, pattern in patterns.items() if pattern}
        options |= {"also_train": self.extra_trainable.names} if self.extra_trainable.names else {}
        options |= {"quantization": self.quantization} if self.quantization else {}
        return TuningExport(options, _to_plain_lora(self.state()))

    def peft(self) -> PeftFolder | None:
        """The same in PEFT's format, task heads as its `modules_to_save`; None when a weight that moves besides has no place
        in it (one of a targeted layer, or one that is tied), or PEFT would read the layers' names as others' (some experts)."""
        return write_lora(self.model, self.export(), list(self._layers))

    def rate_factor(self, name: str) -> float:
        """`b_rate` for my B's."""
        return self.b_rate if name.endswith(f".lora_B.{self.adapter_name}.weight") else 1.0

    # -- what O-LoRA needs

    def directions(self) -> dict[str, nn.Parameter]:
        """My A's (R, I), which training moves, by the name of their layer: the inputs that I react to."""
        return {name: _adapter_weight(layer.lora_A, self.adapter_name) for name, layer in self._layers.items()}

    def weight_deltas(self) -> dict[str, TuningDelta]:
        """Of every layer, what A and B (dora: and the magnitudes) make of its weight."""
        return {f"{name}.base_layer.weight": self._weight_delta(name, layer) for name, layer in self._layers.items()}

    def _weight_delta(self, name: str, layer: Layer) -> TuningDelta:
        base, scale = _base_layer(layer), float(layer.scaling[self.adapter_name])
        transposed = is_transposed(base)
        a_RI, b_OR = _adapter_weight(layer.lora_A, self.adapter_name), _adapter_weight(layer.lora_B, self.adapter_name)
        shape = (a_RI.shape[1], b_OR.shape[0]) if transposed else (b_OR.shape[0], a_RI.shape[1])
        if self.variant == "dora":
            held = RescaledDelta(scale, lambda: _full_weight(base), transposed)
            return TuningDelta(
                held, (a_RI, b_OR, _adapter_weight(layer.lora_magnitude_vector, self.adapter_name)), shape
            )
        start = (
            tuple(self._initial_factors[f"{name}.start_{part}.weight"] for part in "AB")
            if self._initial_factors
            else None
        )
        return TuningDelta(LowRankDelta(scale, transposed, start), (a_RI, b_OR), shape)  # type: ignore[bad-argument-type]

    # -- how it is made

    @property
    def _adapter_names(self) -> list[str]:
        """My adapters' names in PEFT's layers: pissa has its start beside it."""
        return [self.adapter_name, f"{self.adapter_name}_start"] if self.variant == "pissa" else [self.adapter_name]

    def _attach_layer(self, name: str, config: LoraConfig) -> Layer:
        """Put my adapter on one layer: frozen ones that are there stay in effect."""
        target = self.model.get_submodule(name)
        before = list(target.active_adapters) if isinstance(target, LoraLayer) else []
        weight = _base_layer(target).weight
        original = weight.data
        layer = _add_adapter(target, self.adapter_name, config)
        weight.data = original  # pissa's start takes its part out of W
        if self.variant == "pissa":
            start_A_RI, start_B_OR = (
                part[self.adapter_name].weight.detach().clone() for part in (layer.lora_A, layer.lora_B)
            )
            self._initial_factors |= {f"{name}.start_A.weight": start_A_RI, f"{name}.start_B.weight": start_B_OR}
            plain = replace(config, init_lora_weights=False, lora_dropout=0.0)
            layer.update_layer(self._adapter_names[1], config.r, lora_alpha=config.lora_alpha, config=plain)
            layer.scaling[self._adapter_names[1]] = -layer.scaling[self.adapter_name]
            _set_initial_factors(layer, self._adapter_names[1], start_A_RI, start_B_OR)
        for adapter in self._adapter_names:
            for module in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
                if adapter in module:
                    module[adapter].float()
        layer.train(target.training)
        _replace_module(self.model, name, layer)
        _activate_adapters(layer, [*before, *self._adapter_names])
        layer.requires_grad_(False)
        layer.set_requires_grad(self.adapter_name, True)
        return layer

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors of `state`, which training and `load` change."""
        found: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            found[f"{name}.lora_A.weight"] = _adapter_weight(layer.lora_A, self.adapter_name)
            found[f"{name}.lora_B.weight"] = _adapter_weight(layer.lora_B, self.adapter_name)
            if self.variant == "dora":
                found[f"{name}.lora_magnitude_vector"] = _adapter_weight(layer.lora_magnitude_vector, self.adapter_name)
        return found | self._initial_factors | self.extra_trainable.tensors()

    def _remove_layers(self) -> None:
        """Take the adapters out of the layers, and let move what moved before they came."""
        on_top = all(layer.active_adapters[-1] in self._adapter_names for layer in self._layers.values())
        for name, layer in self._layers.items():
            _activate_adapters(
                layer, [adapter for adapter in layer.active_adapters if adapter not in self._adapter_names]
            )
            for adapter in self._adapter_names:
                layer.delete_adapter(adapter)
            if not layer.lora_A:
                _replace_module(self.model, name, layer.base_layer)
        self._layers = {}
        if on_top:  # what stands on me wants the base frozen, as it found it
            self.extra_trainable.restore_requires_grad()

    def _check_merge(self) -> None:
        for name, layer in self._layers.items():
            weight = _base_layer(layer).weight
            if is_quantized(_base_layer(layer)):
                raise TuningError(
                    f"{name} is quantised, and merging would round the update away",
                    where="tuning.merge",
                    hint="attach the published adapter to the full-precision base without `quantization`, and merge there",
                )
            if weight.dtype != torch.float32:
                raise TuningError(
                    f"{name} is held in {weight.dtype}, where small updates are rounded away",
                    where="tuning.merge",
                    expected="weights in torch.float32",
                    hint="load the base in float32 (or call model.float()), merge, and cast the sum",
                )
            below = [a for a in layer.active_adapters if a not in self._adapter_names and a in layer.lora_variant]
            if below:
                raise TuningError(
                    f"{name} carries an earlier dora adapter, whose magnitudes belong to the weights as they are",
                    where="tuning.merge",
                    hint="merge the earlier adapter first",
                )
        for name, tensor in self._tensors().items():
            if not tensor.isfinite().all():
                raise TuningError(f"{name} holds numbers that are not finite", where="tuning.merge")


def from_peft(model: PreTrainedModel, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> LoraAdapter:
    """Attach a LoRA folder of PEFT's: the contents of its `adapter_config.json` and `adapter_model.safetensors`.

    Raises `TuningError` for what has no place here: other methods of PEFT, adapters on embeddings or single tensors, and
    adapters that were saved without their base's changes (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ).
    """
    published = read_lora(config, state)
    tuning = LoraAdapter(model, **published.options)
    tuning.load(published.state)
    return tuning


def scalings(part: TuningExport) -> dict[str, float]:
    """s of a published adapter, by the name of its layer."""
    a_RI = {n.removesuffix(_A_SUFFIX): tensor for n, tensor in part.state.items() if n.endswith(_A_SUFFIX)}
    alphas = _values_by_pattern(
        list(a_RI), part.options.get("alpha_pattern", {}), part.options["alpha"], "alpha_pattern"
    )
    power = 0.5 if part.options["variant"] == "rslora" else 1.0
    return {name: alphas[name] / tensor.shape[0] ** power for name, tensor in a_RI.items()}


def earlier_directions(parts: Sequence[TuningExport]) -> dict[str, Tensor]:
    """All rows of these adapters' A's, by the name of their layer: what O-LoRA's next adapter is to be orthogonal to."""
    rows: dict[str, list[Tensor]] = {}
    for part in parts:
        for name, tensor in part.state.items():
            if name.endswith(_A_SUFFIX):
                rows.setdefault(name.removesuffix(_A_SUFFIX), []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in rows.items()}


# -- what is refused


def _check_options(rank: int, dropout: float, form: str) -> None:
    if form not in get_args(LoraVariant):
        raise TuningError(
            f"there is no variant '{form}' of low-rank adapters",
            where="tuning.variant",
            expected=", ".join(get_args(LoraVariant)),
            hint=suggest_nearest(form, get_args(LoraVariant)),
        )
    if rank < 1:
        raise TuningError(f"a rank of {rank}", where="tuning.rank", expected="1 or more")
    if not 0.0 <= dropout < 1.0:
        raise TuningError(f"a dropout of {dropout}", where="tuning.dropout", expected="at least 0 and below 1")


def _check_layers(
    model: PreTrainedModel, ranks: Mapping[str, int], form: LoraVariant, quantise: Precision | None
) -> None:
    """Raise `TuningError` for layers that a form cannot stand on."""
    for name, rank in ranks.items():
        target = model.get_submodule(name)
        if form == "dora" and isinstance(target, BaseTunerLayer):
            raise TuningError(
                f"{name} carries an earlier adapter, and dora's magnitudes would be those of the weights without it",
                where="tuning.variant",
                hint="merge the earlier adapter first, or take another form",
            )
        if form == "dora" and (quantise == "int8" or getattr(_base_layer(target).weight, "dtype", None) == torch.int8):
            raise TuningError(
                f"dora reads the weights at every step, and {name} in int8 loses its scales when it is read",
                where="tuning.quantization",
                hint="take nf4, or another form",
            )
        if form == "pissa" and (quantise or is_quantized(_base_layer(target))):
            raise TuningError(
                f"pissa starts from the singular directions of full weights, and {name} is quantised",
                where="tuning.quantization",
                hint="leave `quantization` out, or take another form",
            )
        smallest = min(_base_layer(target).weight.shape)
        if form == "pissa" and rank > smallest:
            raise TuningError(
                f"{name} has {smallest} singular directions, and the rank is {rank}",
                where="tuning.rank",
                expected=f"{smallest} or less",
            )


def _values_by_pattern(names: Sequence[str], patterns: Mapping[str, T], default: T, option: str) -> dict[str, T]:
    """The value of each layer: that of the first pattern which its name, or the end of its name, matches."""

    def fits(name: str, pattern: str) -> bool:
        return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")

    for pattern in patterns:
        if not any(fits(name, pattern) for name in names):
            raise TuningError(
                f"'{pattern}' matches none of the targeted layers",
                where=f"tuning.{option}",
                expected=f"names such as {', '.join(names[:3])}",
            )
    return {name: next((v for p, v in patterns.items() if fits(name, p)), default) for name in names}


# -- PEFT's layers


def _add_adapter(target: nn.Module, adapter: str, config: LoraConfig) -> Layer:
    """One layer with one more adapter.

    Layer by layer, not by PEFT's injection: that leaves its configuration on the model, and on mixtures of experts takes
    others than the named layers (a pattern is cut to the end of its name, and a dense layer is taken for an expert).
    """
    if isinstance(target, LoraLayer):
        target.update_layer(adapter, config.r, lora_alpha=config.lora_alpha, config=config)
        return target
    kinds = {"loaded_in_4bit": True, "loaded_in_8bit": True}  # each looks at the layer's class before it acts
    return LoraModel._create_new_module(config, adapter, target, r=config.r, lora_alpha=config.lora_alpha, **kinds)


def _set_initial_factors(layer: Layer, adapter: str, start_A_RI: Tensor, start_B_OR: Tensor) -> None:
    """Give the adapter that takes a start away its values."""
    _adapter_weight(layer.lora_A, adapter).data.copy_(start_A_RI)
    _adapter_weight(layer.lora_B, adapter).data.copy_(start_B_OR)


def _activate_adapters(layer: Layer, adapters: Sequence[str]) -> None:
    # `set_adapter` would also decide what is trained.
    layer._active_adapter = list(adapters)


def _adapter_weight(part: nn.ModuleDict, adapter: str) -> nn.Parameter:
    weight = part[adapter].weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _base_layer(module: nn.Module) -> Any:
    """A layer without the adapters around it."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _full_weight(base: Any) -> Tensor:
    """A layer's weight as it is held, whole and not quantised."""
    weight = dequantize_module_weight(base).detach() if is_quantized(base) else base.weight.detach()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


# -- names


def _unused_adapter_name(model: nn.Module) -> str:
    """An adapter's name that no layer has yet."""
    taken = {adapter for m in model.modules() if isinstance(m, LoraLayer) for adapter in m.lora_A}
    return next(name for i in itertools.count(1) if (name := "low_rank" if i == 1 else f"low_rank_{i}") not in taken)


def _replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _to_plain_lora(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state in which no start has to be taken away: s (B A - B0 A0) = s [B, -B0] [A; A0]."""
    found = {name: tensor for name, tensor in state.items() if ".start_" not in name}
    for name, tensor in state.items():
        if name.endswith(".start_A.weight"):
            trained = name.replace(".start_A.", ".lora_A.")
            found[trained] = torch.cat([state[trained], tensor])
        if name.endswith(".start_B.weight"):
            trained = name.replace(".start_B.", ".lora_B.")
            found[trained] = torch.cat([state[trained], -tensor], 1)
    return found
