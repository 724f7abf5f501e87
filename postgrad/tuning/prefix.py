"""Prefix-tuning and P-tuning v2: trained keys and values that every attention layer reads before its own.

Legend: H key heads, N prefix length, C head width, D model width, M width of the MLP, S all numbers of one position (2 H C,
summed over the attention modules of a role).

Two publications, one mechanism with different defaults:

    prefix        a table (N, D) goes through an MLP, D to M, tanh, M to S. Encoder, decoder and cross-attention have a
                  table and an MLP each. Li & Liang 2021 (arXiv 2101.00190, section 4.3) and their code.
    p-tuning-v2   the table (N, S) itself, with dropout. Liu et al. 2021 (arXiv 2110.07602, section 3.2) and their code.

`prefix_attention` inserts the keys and values; `attention_slots` discovers the modules that read them, so there is no table
of class names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from postgrad.errors import TuningError
from postgrad.models.pretrained import get_embedding_weight
from postgrad.models.sublayers import eval_mode
from postgrad.tuning.attention_slots import (
    ALTERNATIVES_HINT,
    discover_slots,
    has_sliding_window,
    outer_stack,
    position_rotations,
    probe_inputs,
    rotate_keys,
    select_roles,
)
from postgrad.tuning.extra_trainable import ExtraTrainable
from postgrad.tuning.module_tuning import ModuleTuning, SwitchableModule
from postgrad.tuning.peft_prompts import prompt_config, read_prompt
from postgrad.tuning.prefix_attention import (
    LAYER_PREFIXES,
    PREFIX_IMPLEMENTATION,
    RECORDING_IMPLEMENTATION,
    AttentionCall,
    AttentionImplementations,
    LayerPrefix,
    get_implementations,
    make_inputs,
    record_attention,
    set_implementations,
    uniform_implementations,
    use_implementations,
)
from postgrad.tuning.tuning import PeftFolder, TuningExport, check_choice, check_ranges, load_or_detach


class _PrefixDefaults(NamedTuple):
    """The defaults of a publication's code."""

    hidden: int | None
    dropout: float


DEFAULTS: Mapping[str, _PrefixDefaults] = {
    "prefix": _PrefixDefaults(512, 0.0),
    "p-tuning-v2": _PrefixDefaults(None, 0.1),
}


class PrefixTable(nn.Module):
    """The keys and values themselves, (N, S)."""

    def __init__(self, length: int, out: int, spread: float) -> None:
        """Drawn from N(0, spread^2)."""
        super().__init__()
        self.table = nn.Parameter(torch.randn(length, out) * spread)

    def forward(self) -> Tensor:
        """All keys and values, (N, S)."""
        return self.table

    @torch.no_grad()
    def initialize(self, target_NS: Tensor) -> None:
        """Start from these keys and values."""
        self.table.copy_(target_NS)


class PrefixMLP(nn.Module):
    """A table (N, D) and an MLP that maps it to (N, S), initialised as in the published code (torch's defaults).

    Its layers are plain parameters, so searches for the model's linear layers do not match them.
    """

    def __init__(self, length: int, widths: Sequence[int]) -> None:
        """`widths`: D, M (twice for the deep one), S."""
        super().__init__()
        self.table = nn.Parameter(torch.randn(length, widths[0]))
        bounds = [(a, b, a**-0.5) for a, b in pairwise(widths)]
        self.weights = nn.ParameterList([torch.empty(b, a).uniform_(-bound, bound) for a, b, bound in bounds])
        self.biases = nn.ParameterList([torch.empty(b).uniform_(-bound, bound) for _, b, bound in bounds])

    def forward(self) -> Tensor:
        """All keys and values, (N, S)."""
        return nn.functional.linear(self._hidden(), self.weights[-1], self.biases[-1])

    def _hidden(self) -> Tensor:
        """The input of the last layer, (N, M)."""
        hidden = self.table
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            hidden = torch.tanh(nn.functional.linear(hidden, weight, bias))
        return hidden

    @torch.no_grad()
    def initialize(self, target_NS: Tensor) -> None:
        """Approximate these keys and values by the smallest change of the last layer (least squares).

        The published code takes 500 steps of Adam down the same squared error; with N up to M this reaches zero.
        """
        missing_NS = (target_NS - self()).double()
        change_MS = torch.linalg.pinv(self._hidden().double()) @ missing_NS
        self.weights[-1] += change_MS.T.to(self.weights[-1])


class PrefixEncoder(SwitchableModule):
    """The trained parts of one prefix by role, and the `LayerPrefix` of each attention module, which it fills."""

    def __init__(
        self,
        parts: Mapping[str, PrefixTable | PrefixMLP],
        dropout: float,
        original_implementations: AttentionImplementations,
    ) -> None:
        """`original_implementations`: the model's attention before its first prefix."""
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.dropout = nn.Dropout(dropout)
        self.original_implementations = original_implementations
        self.layer_prefixes: dict[str, list[LayerPrefix]] = {role: [] for role in parts}
        self.roles: dict[nn.Module, set[str]] = {}

    def precompute(self, stack: nn.Module, _inputs: object) -> None:
        """Before a stack of blocks runs, compute the keys and values of all its attention modules at once.

        Raises `TuningError` if the current attention implementation would ignore the prefix.
        """
        if not self.enabled:
            return
        now = getattr(getattr(stack, "config", None), "_attn_implementation", PREFIX_IMPLEMENTATION)
        if now not in (PREFIX_IMPLEMENTATION, RECORDING_IMPLEMENTATION):
            raise TuningError(
                f"the model's attention implementation is `{now}`, which ignores the prefix",
                where="tuning",
                hint=f'model.set_attn_implementation("{PREFIX_IMPLEMENTATION}"), or `disable()`',
            )
        for role in self.roles[stack]:
            for layer, keys_values in zip(self.layer_prefixes[role], self.keys_and_values(role), strict=True):
                layer.cache = keys_values

    def keys_and_values(self, role: str) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of shape (H, N, C) for each attention module of a role."""
        layers = self.layer_prefixes[role]
        pieces = self.parts[role]().split([size for layer in layers for size in layer.sizes], -1)
        folded = [piece.unflatten(-1, (layers[i // 2].heads, -1)).transpose(0, 1) for i, piece in enumerate(pieces)]
        return list(zip(folded[::2], folded[1::2], strict=True))

    def recompute(self, layer_prefix: LayerPrefix) -> tuple[Tensor, Tensor]:
        """One module's keys and values of shape (H, N, C), with a graph of their own."""
        role = next(role for role, layers in self.layer_prefixes.items() if layer_prefix in layers)
        return self.keys_and_values(role)[self.layer_prefixes[role].index(layer_prefix)]


class Prefix(ModuleTuning):
    """`length` trained keys and values for every attention module; the base's own weights do not change.

    `hidden`: the MLP's width M; None: no MLP; "auto": as published (512 for prefix, None for p-tuning-v2). `deep`: an MLP
    of two hidden layers. `dropout` acts on the keys and values in training; "auto": 0, or 0.1 for p-tuning-v2. `slots`:
    "all", or some of "encoder", "decoder" and "cross". `init_text`: a text whose keys and values in the base are the initial
    ones, repeated or cut to `length` tokens (Li & Liang 2021, section 7.4). `also_train`: patterns of base parameters to train;
    `disable` and `detach` restore those of the body.

    Attention runs through `sdpa`; `set_attn_implementation` must not select another while this is attached. A second prefix
    adds its keys and values to the first one's.

    Raises `TuningError` for a model without transformers' attention interface (T5 has it from 5.16.1 on), for attention
    beyond `sdpa` (soft-capped scores, sinks), if the prefix has no effect, and for invalid options.
    """

    attention = PREFIX_IMPLEMENTATION

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        kind: str = "prefix",
        length: int = 10,
        hidden: int | Literal["auto"] | None = "auto",
        deep: bool = False,
        dropout: float | Literal["auto"] = "auto",
        slots: Sequence[str] | Literal["all"] = "all",
        init_text: str | None = None,
        also_train: Sequence[str] = (),
        seed: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__(model)
        check_choice(kind, DEFAULTS, "kind")
        self.kind, self.length, self.also = kind, length, list(also_train)
        self.hidden = DEFAULTS[kind].hidden if hidden == "auto" else hidden
        self.dropout = DEFAULTS[kind].dropout if dropout == "auto" else dropout
        self.deep = deep
        _check_options(self)
        available = discover_slots(model)
        self.roles = select_roles(slots, {slot.role for slot in available})
        self.slots = [slot for slot in available if slot.role in self.roles]
        initial_NS = {} if init_text is None else self._text_key_values(init_text, tokenizer)

        earlier = next((m for m in model.modules() if isinstance(m, PrefixEncoder)), None)
        original = get_implementations(model) if earlier is None else earlier.original_implementations
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            parts = {role: self._make_part(role) for role in self.roles}
        self.encoder = PrefixEncoder(parts, self.dropout, original)
        self.encoder.to(get_embedding_weight(model).device).train(model.training)
        for role, target_NS in initial_NS.items():
            parts[role].initialize(target_NS)

        self.extra_trainable = ExtraTrainable(model, also_train)
        self._add_module(model, "prefix", self.encoder)
        try:
            self._attach_layer_prefixes()
            self._check_effect()
        except Exception:
            self.detach()
            raise
        self.notes.append(
            f"a prefix of {length} keys and values in {len(self.slots)} attention modules ({', '.join(self.roles)}), "
            "computed by `sdpa`"
        )

    def _make_part(self, role: str) -> PrefixTable | PrefixMLP:
        config = self.model.config.get_text_config()
        out = sum(sum(slot.sizes) for slot in self.slots if slot.role == role)
        if self.hidden is None:
            return PrefixTable(self.length, out, float(getattr(config, "initializer_range", 0.02)))
        return PrefixMLP(self.length, [config.hidden_size, *[self.hidden] * (1 + self.deep), out])

    def _text_key_values(self, text: str, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Tensor]:
        """By role, the keys and values (N, S) of a text's tokens."""
        ids = [] if tokenizer is None else tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise TuningError(
                "a text needs the model's tokenizer" if tokenizer is None else f"{text!r} has no tokens",
                where="tuning.init_text",
                expected="a text for the initial keys and values, or none",
            )
        repeated = (ids * math.ceil(self.length / len(ids)))[: self.length]
        ids_1N = torch.tensor([repeated], device=get_embedding_weight(self.model).device)
        with eval_mode(self.model):
            _, calls = record_attention(self.model, make_inputs(self.model, ids_1N, ids_1N))
        first_calls = {id(call.module): call for call in reversed(calls)}  # blocks may share weights
        return {
            role: torch.cat([_flatten_key_values(first_calls[id(s.module)]) for s in self.slots if s.role == role], 1)
            for role in self.roles
        }

    def _attach_layer_prefixes(self) -> None:
        """Give every attention module its `LayerPrefix`, filled when its stack begins."""
        for slot in self.slots:
            layer = LayerPrefix(self.encoder, slot.heads, slot.sizes)
            self.encoder.layer_prefixes[slot.role].append(layer)
            setattr(slot.module, LAYER_PREFIXES, [*getattr(slot.module, LAYER_PREFIXES, ()), layer])
            self.encoder.roles.setdefault(outer_stack(self.model, slot.name), set()).add(slot.role)
        self._hooks = [stack.register_forward_pre_hook(self.encoder.precompute) for stack in self.encoder.roles]
        set_implementations(uniform_implementations(self.model, PREFIX_IMPLEMENTATION))

    def _check_effect(self) -> None:
        """Raise `TuningError` unless the prefix changes the body's output and gets a gradient in every module."""
        model, inputs = self.model, probe_inputs(self.model)
        layers = [layer for role_layers in self.encoder.layer_prefixes.values() for layer in role_layers]
        with eval_mode(model):
            with torch.enable_grad():
                output = model.base_model(**inputs)[0].float()
                # A projection, not the plain sum: after a norm the sum is a constant.
                direction = torch.linspace(-1, 1, output.numel(), device=output.device).sin().view_as(output)
                caches = [tensor for layer in layers for tensor in layer.cache or ()]
                reached = output.requires_grad and len(caches) == 2 * len(layers)
                gradients = (
                    torch.autograd.grad((output * direction).sum(), caches, allow_unused=True) if reached else ()
                )
            with torch.no_grad(), self.disable():
                base = model.base_model(**inputs)[0].float()
        untrained = any(gradient is None or not bool(gradient.any()) for gradient in gradients)
        if not reached or untrained or torch.equal(output, base):
            raise TuningError(
                f"the prefix does not reach the output of {type(model).__name__}",
                where="tuning",
                expected="attention modules whose keys and values all affect the last hidden states",
                hint=ALTERNATIVES_HINT,
            )

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Context in which the model attends as before, without these keys and values; another prefix stays."""
        others = any(m.enabled for m in self.model.modules() if isinstance(m, PrefixEncoder) and m is not self.encoder)
        original = self.encoder.original_implementations
        with super().disable(), nullcontext() if others else use_implementations(self.model, original):
            yield

    def tensors(self) -> dict[str, nn.Parameter]:
        """The parameters of each role, its MLP included, and the trained weights of the base."""
        return dict(self.encoder.named_parameters()) | self.extra_trainable.tensors()

    def detach(self) -> None:
        """Remove keys, values and hooks; the model's attention, and its body's weights, are as before."""
        for slot in self.slots:
            others = [layer for layer in getattr(slot.module, LAYER_PREFIXES, ()) if layer.provider is not self.encoder]
            if others:
                setattr(slot.module, LAYER_PREFIXES, others)
            elif hasattr(slot.module, LAYER_PREFIXES):
                delattr(slot.module, LAYER_PREFIXES)
        super().detach()
        if not any(isinstance(m, PrefixEncoder) for m in self.model.modules()):
            set_implementations(self.encoder.original_implementations)

    def merge(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Raises `TuningError`: no plain weights have the same effect."""
        raise TuningError(
            "a prefix adds keys and values for every token, which no weight of the model can do",
            where="tuning",
            expected="a tuning that is linear in the weights, such as LoRA, to merge",
            hint="publish the prefix as a folder and attach it where the model is used",
        )

    def export(self) -> TuningExport:
        """The final keys and values, without the MLP that computes them."""
        options = {
            "kind": self.kind,
            "length": self.length,
            "hidden": None,
            "dropout": self.dropout,
            "slots": list(self.roles),
            "also_train": self.also,
        }
        with torch.no_grad():
            tables = {f"parts.{role}.table": part().clone() for role, part in self.encoder.parts.items()}
        return TuningExport(options, tables | {name: p.detach() for name, p in self.extra_trainable.tensors().items()})

    def peft(self) -> PeftFolder | None:
        """PEFT's PREFIX_TUNING, for causal decoders with rotary (or no) positions and no sliding window; else None.

        PEFT puts the prefix into the cache, which moves every token N positions on. Rotary scores depend on distances alone,
        so keys rotated by N positions too have the same effect there. With learned positions the effect would be equal only
        if positions were moved back by N, and a sliding window would drop the prefix.
        """
        config, first = self.model.config.get_text_config(), self.slots[0]
        uniform = all(slot[3:] == first[3:] for slot in self.slots) and first.key_width == first.value_width
        causal = self.roles == ["decoder"] and self.model.get_output_embeddings() is not None
        complete = uniform and len(self.slots) == config.num_hidden_layers
        if not causal or not complete or has_sliding_window(self.model) or self.extra_trainable.names:
            return None
        with self.disable():
            rotations = position_rotations(self.model, self.slots, self.length)
        if rotations is None:
            return None
        width = first.sizes[0]
        description = prompt_config(self.model, "PREFIX_TUNING", "CAUSAL_LM", self.length, width) | {
            "num_attention_heads": first.heads,
            "num_layers": len(self.slots),
            "encoder_hidden_size": width,
            "prefix_projection": False,
        }
        flat_NS = self.export().state["parts.decoder.table"]
        return PeftFolder(description, {"prompt_embeddings": rotate_keys(flat_NS, self.slots, rotations)})


def from_peft(model: PreTrainedModel, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Prefix:
    """A prefix with the same effect as a PEFT folder of prefix-tuning, for decoders.

    `config` is its adapter_config.json, `state` its adapter_model.safetensors. PEFT saves final keys and values only, so
    there is no MLP to continue with. Layers saved with them (a task layer) are loaded and trained. With rotary positions,
    keys are rotated back by the N positions that PEFT moves every token. With learned ones, the effect is the same only for
    `position_ids` shifted by N, which a note tells.

    Raises `TuningError` for another method's folder, and for one that does not fit the model.
    """
    _, flat_NS, extra = read_prompt(config, state, ["PREFIX_TUNING"])
    kind = "prefix" if config.get("prefix_projection") else "p-tuning-v2"
    prefix = Prefix(model, kind=kind, length=len(flat_NS), hidden=None, dropout=0.0, also_train=list(extra))
    if prefix.roles != ["decoder"]:
        prefix.detach()
        raise TuningError(
            f"a PEFT prefix for {type(model).__name__}",
            where="tuning",
            expected="a decoder: elsewhere PEFT changes positions and the first token",
        )
    load_or_detach(prefix, {"parts.decoder.table": flat_NS, **extra})
    with prefix.disable():
        rotations = position_rotations(model, prefix.slots, prefix.length)
    if has_sliding_window(model):
        prefix.notes.append("in PEFT the sliding window drops the prefix; here it stays visible")
    if rotations is None:
        prefix.notes.append(f"trained with positions from {prefix.length} on: shift `position_ids` by as many")
    else:
        unrotated_NS = rotate_keys(flat_NS, prefix.slots, [rotation_CC.T for rotation_CC in rotations])
        prefix.load({"parts.decoder.table": unrotated_NS, **extra})
    return prefix


def _check_options(prefix: Prefix) -> None:
    ranges = {
        "length": (prefix.length >= 1, "1 or more"),
        "hidden": (prefix.hidden is None or prefix.hidden >= 1, "1 or more, or null for no MLP"),
        "deep": (not prefix.deep or prefix.hidden is not None, "false without an MLP (`hidden` is null)"),
        "dropout": (0 <= prefix.dropout < 1, "a fraction from 0 to below 1"),
    }
    check_ranges(vars(prefix), ranges)


def _flatten_key_values(call: AttentionCall) -> Tensor:
    """The keys and values of one row, (T, numbers of this module)."""
    return torch.cat([part[0].transpose(0, 1).flatten(1) for part in (call.key, call.value)], 1)
