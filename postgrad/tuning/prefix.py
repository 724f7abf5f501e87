"""What if every layer could read a few more keys and values, learnt for the task? Prefix-tuning and P-tuning v2.

Legend: B batch, H key heads, T time, N prefix length, C head width, D model width, M width of the MLP, S all numbers of
one position (2 H C, summed over the attention modules of a role).

Two publications, one mechanism; they differ in values:

    prefix        a table (N, D) goes through an MLP, D to M, tanh, M to S. Encoder, decoder and cross-attention have a
                  table and an MLP each. Li & Liang 2021 (arXiv 2101.00190, section 4.3) and their code.
    p-tuning-v2   the table (N, S) itself, with dropout. Liu et al. 2021 (arXiv 2110.07602, section 3.2) and their code.

How attention comes to read them is said in `prefix_attention`. Which modules attend, and in what shapes, is seen in one
forward pass over a few tokens, so there is no table of class names.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from postgrad.errors import TuningError, suggest_nearest
from postgrad.models.pretrained import get_embedding_weight
from postgrad.models.sublayers import eval_mode
from postgrad.tuning.extra_trainable import ExtraTrainable
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
    sample_token_ids,
    set_implementations,
    uniform_implementations,
    use_implementations,
)
from postgrad.tuning.tuning import PeftFolder, Tuning, TuningExport, copy_state

ROLES = ("encoder", "decoder", "cross")
ALTERNATIVES_HINT = "prompt tuning, LoRA and adapters work on this model"
_SOURCE_LENGTH, _TARGET_LENGTH = 7, 5
"""Lengths of the forward pass that is watched; they tell cross-attention from the others."""


class _PrefixDefaults(NamedTuple):
    """What a publication's code takes when it is told nothing."""

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
        """Become these keys and values."""
        self.table.copy_(target_NS)


class PrefixMLP(nn.Module):
    """A table (N, D) and an MLP that makes (N, S) of it, drawn as the published code's (torch's own ways).

    Its layers are plain parameters, so that nothing which looks for linear layers of the model takes them for such.
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
        """What the last layer reads, (N, M)."""
        hidden = self.table
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            hidden = torch.tanh(nn.functional.linear(hidden, weight, bias))
        return hidden

    @torch.no_grad()
    def initialize(self, target_NS: Tensor) -> None:
        """Make these keys and values, by the least change of the last layer that comes nearest to them.

        The published code takes 500 steps of Adam down the same squared error; with N up to M this reaches zero.
        """
        missing_NS = (target_NS - self()).double()
        change_MS = torch.linalg.pinv(self._hidden().double()) @ missing_NS
        self.weights[-1] += change_MS.T.to(self.weights[-1])


class PrefixEncoder(nn.Module):
    """All that one prefix learns, by role, and the shares of the attention modules, which it fills."""

    def __init__(
        self,
        parts: Mapping[str, PrefixTable | PrefixMLP],
        dropout: float,
        original_implementations: AttentionImplementations,
    ) -> None:
        """`original`: how the model attended before its first prefix came."""
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.dropout = nn.Dropout(dropout)
        self.original_implementations = original_implementations
        self.enabled = True
        self.layer_prefixes: dict[str, list[LayerPrefix]] = {role: [] for role in parts}
        self.roles: dict[nn.Module, set[str]] = {}

    def all_layer_prefixes(self) -> list[LayerPrefix]:
        """Those of every role."""
        return [share for shares in self.layer_prefixes.values() for share in shares]

    def precompute(self, stack: nn.Module, _inputs: object) -> None:
        """Before a stack of blocks runs: compute what its attention modules read, once for all of them.

        Raises `TuningError` when the model attends in a way that would leave the prefix out.
        """
        if not self.enabled:
            return
        now = getattr(getattr(stack, "config", None), "_attn_implementation", PREFIX_IMPLEMENTATION)
        if now not in (PREFIX_IMPLEMENTATION, RECORDING_IMPLEMENTATION):
            raise TuningError(
                f"the model attends by `{now}`, so its prefix would be left out",
                where="tuning",
                hint=f'model.set_attn_implementation("{PREFIX_IMPLEMENTATION}"), or `off()`',
            )
        for role in self.roles[stack]:
            for share, both in zip(self.layer_prefixes[role], self.keys_and_values(role), strict=True):
                share.cache = both

    def keys_and_values(self, role: str) -> list[tuple[Tensor, Tensor]]:
        """For each share of a role, keys and values of shape (H, N, C)."""
        shares = self.layer_prefixes[role]
        pieces = self.parts[role]().split([size for share in shares for size in share.sizes], -1)
        folded = [piece.unflatten(-1, (shares[i // 2].heads, -1)).transpose(0, 1) for i, piece in enumerate(pieces)]
        return list(zip(folded[::2], folded[1::2], strict=True))

    def recompute(self, layer_prefix: LayerPrefix) -> tuple[Tensor, Tensor]:
        """One share's keys and values of shape (H, N, C), with a graph of their own."""
        role = next(role for role, shares in self.layer_prefixes.items() if layer_prefix in shares)
        return self.keys_and_values(role)[self.layer_prefixes[role].index(layer_prefix)]


class _AttentionSlot(NamedTuple):
    """An attention module that can read a prefix: `heads` key heads, `key` and `value` numbers wide."""

    name: str
    module: nn.Module
    role: str
    heads: int
    key: int
    value: int

    @property
    def sizes(self) -> tuple[int, int]:
        """How many numbers all heads' keys and values of one position have."""
        return self.heads * self.key, self.heads * self.value


class Prefix(Tuning):
    """`length` more keys and values for every attention module, trained; the base's own weights stay as they are.

    `hidden`: the MLP's width M; None: no MLP; "auto": as the kind was published (512 for prefix, None for p-tuning-v2).
    `deep`: an MLP of two hidden layers. `dropout` acts on the keys and values in training; "auto": 0, or 0.1 for
    p-tuning-v2. `slots`: "all", or some of "encoder", "decoder" and "cross". `init_text`: a text whose keys and values in the
    base are the first ones; it is repeated or cut to `length` tokens (Li & Liang 2021, section 7.4). `also_train`: patterns of
    the base's parameters that move besides; `off` and `detach` give those of its body their old values.

    Attention is computed by `sdpa`, whatever computed it before; `set_attn_implementation` must not be called with
    another while this is attached. A second prefix adds its own keys and values to the first one's.

    Raises `TuningError` for a model that is not on transformers' attention interface (T5 is from 5.16.1 on), one that
    `sdpa` does not compute (soft-capped scores, sinks), one where the prefix changes nothing, and for options that
    cannot be.
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
        published = _get_defaults(kind)
        self.kind, self.length, self.also = kind, length, list(also_train)
        self.hidden = published.hidden if hidden == "auto" else hidden
        self.dropout = published.dropout if dropout == "auto" else dropout
        self.deep = deep
        _check_options(self)
        found = _discover_slots(model)
        self.roles = _select_roles(slots, {slot.role for slot in found})
        self.slots = [slot for slot in found if slot.role in self.roles]
        first_NS = {} if init_text is None else self._text_key_values(init_text, tokenizer)

        earlier = [m for m in model.modules() if isinstance(m, PrefixEncoder)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            parts = {role: self._make_part(role) for role in self.roles}
        self.encoder = PrefixEncoder(
            parts, self.dropout, earlier[0].original_implementations if earlier else get_implementations(model)
        )
        self.encoder.to(get_embedding_weight(model).device).train(model.training)
        for role, target_NS in first_NS.items():
            parts[role].initialize(target_NS)

        self._extra_trainable = ExtraTrainable(model, also_train)
        self._hooks: list[RemovableHandle] = []
        names = ("prefix", *(f"prefix_{i + 2}" for i in range(len(earlier))))
        self._module_name = next(name for name in names if not hasattr(model, name))
        model.add_module(self._module_name, self.encoder)
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
        """What is learnt for a role."""
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
                "there is no tokenizer to read the text with" if tokenizer is None else f"{text!r} has no tokens",
                where="tuning.start",
                expected="words that the first keys and values come from, or no start at all",
            )
        repeated = (ids * math.ceil(self.length / len(ids)))[: self.length]
        words_1N = torch.tensor([repeated], device=get_embedding_weight(self.model).device)
        with eval_mode(self.model):
            _, calls = record_attention(self.model, make_inputs(self.model, words_1N, words_1N))
        met = {id(call.module): call for call in reversed(calls)}  # the first, where blocks share weights
        by_role = {role: [met[id(s.module)] for s in self.slots if s.role == role] for role in self.roles}
        return {role: torch.cat([_flatten_key_values(call) for call in of], 1) for role, of in by_role.items()}

    def _attach_layer_prefixes(self) -> None:
        """Give every attention module its share, and have the shares filled when its stack begins."""
        for slot in self.slots:
            share = LayerPrefix(self.encoder, slot.heads, slot.sizes)
            self.encoder.layer_prefixes[slot.role].append(share)
            setattr(slot.module, LAYER_PREFIXES, [*getattr(slot.module, LAYER_PREFIXES, ()), share])
            self.encoder.roles.setdefault(_outer_stack(self.model, slot.name), set()).add(slot.role)
        self._hooks = [stack.register_forward_pre_hook(self.encoder.precompute) for stack in self.encoder.roles]
        set_implementations(uniform_implementations(self.model, PREFIX_IMPLEMENTATION))

    def _check_effect(self) -> None:
        """Raise `TuningError` unless the prefix changes what the body answers, and learns in every module."""
        model, shares = self.model, self.encoder.all_layer_prefixes()
        inputs = make_inputs(
            model, sample_token_ids(model, 1, _SOURCE_LENGTH), sample_token_ids(model, 1, _TARGET_LENGTH)
        )
        with eval_mode(model):
            with torch.enable_grad():
                answer = model.base_model(**inputs)[0].float()
                # Not the plain sum: behind a norm that is a constant.
                along = torch.linspace(-1, 1, answer.numel(), device=answer.device).sin().view_as(answer)
                read = [tensor for share in shares for tensor in share.cache or ()]
                reached = answer.requires_grad and len(read) == 2 * len(shares)
                gradients = torch.autograd.grad((answer * along).sum(), read, allow_unused=True) if reached else ()
            with torch.no_grad(), self.disable():
                base = model.base_model(**inputs)[0].float()
        deaf = any(gradient is None or not bool(gradient.any()) for gradient in gradients)
        if not reached or deaf or torch.equal(answer, base):
            raise TuningError(
                f"the prefix does not reach the answers of {type(model).__name__}",
                where="tuning",
                expected="attention modules whose keys and values all matter to the last hidden states",
                hint=ALTERNATIVES_HINT,
            )

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Inside, the model attends as it did before, without my keys and values; another prefix stays."""
        others = any(m.enabled for m in self.model.modules() if isinstance(m, PrefixEncoder) and m is not self.encoder)
        was, self.encoder.enabled = self.encoder.enabled, False
        try:
            with (
                self._extra_trainable.use_initial_values(),
                nullcontext() if others else use_implementations(self.model, self.encoder.original_implementations),
            ):
                yield
        finally:
            self.encoder.enabled = was

    def _trained_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.encoder.named_parameters()) | self._extra_trainable.tensors()

    def state(self) -> dict[str, Tensor]:
        """What is learnt for each role, its MLP included, and the base's weights that move."""
        return {name: p.detach() for name, p in self._trained_parameters().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave. Raises `TuningError` for another state, so also for vectors without their MLP."""
        copy_state(self._trained_parameters(), state, self.kind)

    def detach(self) -> None:
        """Take keys, values and hooks out; the model attends, and its body's weights are and may move, as it was found."""
        self._extra_trainable.restore_values()
        for hook in self._hooks:
            hook.remove()
        for slot in self.slots:
            left = [share for share in getattr(slot.module, LAYER_PREFIXES, ()) if share.provider is not self.encoder]
            if left:
                setattr(slot.module, LAYER_PREFIXES, left)
            elif hasattr(slot.module, LAYER_PREFIXES):
                delattr(slot.module, LAYER_PREFIXES)
        delattr(self.model, self._module_name)
        self._extra_trainable.restore_requires_grad()
        if not any(isinstance(m, PrefixEncoder) for m in self.model.modules()):
            set_implementations(self.encoder.original_implementations)

    def merge(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Raises `TuningError`: there are no plain weights of the same effect."""
        raise TuningError(
            "a prefix is no weight: every token reads it as more keys and values, which no matrix of the model can add",
            where="tuning",
            expected="a tuning that is linear in the weights, such as LoRA, to merge",
            hint="publish the prefix as a folder and attach it where the model is used",
        )

    def export(self) -> TuningExport:
        """The keys and values themselves, computed once, without the MLP that made them."""
        options = {
            "kind": self.kind,
            "length": self.length,
            "hidden": None,
            "dropout": self.dropout,
            "slots": list(self.roles),
            "also_train": self.also,
        }
        with torch.no_grad():
            flat = {f"parts.{role}.table": part().clone() for role, part in self.encoder.parts.items()}
        return TuningExport(options, flat | {name: p.detach() for name, p in self._extra_trainable.tensors().items()})

    def peft(self) -> PeftFolder | None:
        """PEFT's PREFIX_TUNING, for causal decoders with rotary (or no) positions and no sliding window; else None.

        PEFT puts the prefix into the cache, which moves every token N positions on. Rotary scores depend on distances
        alone, so keys that are moved on by N too have the same effect there. For learnt positions there is no such prefix
        (it would be equal only if positions were moved back by N), and a sliding window would leave it behind.
        """
        config, shape = self.model.config.get_text_config(), self.slots[0]
        alike = all(slot[3:] == shape[3:] for slot in self.slots) and shape.key == shape.value
        causal = self.roles == ["decoder"] and self.model.get_output_embeddings() is not None
        whole = alike and len(self.slots) == config.num_hidden_layers
        if not causal or not whole or _has_sliding_window(self.model) or self._extra_trainable.names:
            return None
        with self.disable():
            turns = _position_rotations(self.model, self.slots, self.length)
        if turns is None:
            return None
        description = {
            "peft_type": "PREFIX_TUNING",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.model.config.name_or_path or None,
            "inference_mode": True,
            "num_virtual_tokens": self.length,
            "token_dim": shape.sizes[0],
            "num_transformer_submodules": 1,
            "num_attention_heads": shape.heads,
            "num_layers": len(self.slots),
            "encoder_hidden_size": shape.sizes[0],
            "prefix_projection": False,
        }
        flat_NS = self.export().state["parts.decoder.table"]
        return PeftFolder(description, {"prompt_embeddings": _rotate_keys(flat_NS, self.slots, turns)})


def from_peft(model: PreTrainedModel, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Prefix:
    """A prefix of the same effect as a PEFT folder of prefix-tuning, for decoders.

    `config` is its adapter_config.json, `state` its adapter_model.safetensors. PEFT saves final keys and values only, so
    there is no MLP to go on with. Layers that it saved besides (a task layer) come along and move. Where positions are
    rotary, keys are moved back by the N positions that PEFT moves every token on. Where they are learnt, the effect is the
    same only for `position_ids` that are moved on by N, which a note says.

    Raises `TuningError` for another kind of folder, and for one that does not fit the model.
    """
    given = str(getattr(config.get("peft_type"), "value", config.get("peft_type")))
    flat_NS = state.get("prompt_embeddings")
    if given != "PREFIX_TUNING" or flat_NS is None:
        raise TuningError(
            f"this PEFT folder holds {given} and {'no' if flat_NS is None else 'its'} `prompt_embeddings`",
            where="tuning.peft_type",
            expected="PREFIX_TUNING with `prompt_embeddings`",
        )
    beside = {name.removeprefix("base_model."): t for name, t in state.items() if name != "prompt_embeddings"}
    kind = "prefix" if config.get("prefix_projection") else "p-tuning-v2"
    prefix = Prefix(model, kind=kind, length=len(flat_NS), hidden=None, dropout=0.0, also_train=list(beside))
    try:
        if prefix.roles != ["decoder"]:
            raise TuningError(
                f"a PEFT prefix for {type(model).__name__}",
                where="tuning",
                expected="a decoder: elsewhere PEFT moves what positions and the first token mean",
            )
        prefix.load({"parts.decoder.table": flat_NS, **beside})
    except TuningError:
        prefix.detach()
        raise
    with prefix.disable():
        turns = _position_rotations(model, prefix.slots, prefix.length)
    if _has_sliding_window(model):
        prefix.notes.append("with PEFT the sliding window leaves the prefix behind, here it stays in sight")
    if turns is None:
        prefix.notes.append(f"learnt for positions from {prefix.length} on: give `position_ids` moved on by as many")
    else:
        back = _rotate_keys(flat_NS, prefix.slots, [turn_CC.T for turn_CC in turns])
        prefix.load({"parts.decoder.table": back, **beside})
    return prefix


def _get_defaults(kind: str) -> _PrefixDefaults:
    if kind not in DEFAULTS:
        known = " or ".join(DEFAULTS)
        raise TuningError(
            f"'{kind}' is no prefix", where="tuning.kind", expected=known, hint=suggest_nearest(kind, DEFAULTS)
        )
    return DEFAULTS[kind]


def _check_options(prefix: Prefix) -> None:
    """Raise `TuningError` for an option that makes no prefix."""
    ranges = {
        "length": (prefix.length >= 1, "1 or more"),
        "hidden": (prefix.hidden is None or prefix.hidden >= 1, "1 or more, or null for no MLP"),
        "deep": (not prefix.deep or prefix.hidden is not None, "an MLP to be deep: `hidden`"),
        "dropout": (0 <= prefix.dropout < 1, "a share from 0 to below 1"),
    }
    for key, (right, expected) in ranges.items():
        if not right:
            raise TuningError(f"{getattr(prefix, key)!r} cannot be used", where=f"tuning.{key}", expected=expected)


def _select_roles(slots: Sequence[str] | Literal["all"], available: set[str]) -> list[str]:
    """The roles that get a prefix. Raises `TuningError` for one that the model has not."""
    wanted = available if slots == "all" else set(slots)
    if not wanted or not wanted <= available:
        raise TuningError(
            f"no attention of this model is '{min(wanted - available)}'" if wanted else "no attention is named",
            where="tuning.slots",
            expected=f"all, or some of {', '.join(role for role in ROLES if role in available)}",
        )
    return [role for role in ROLES if role in wanted]


def _discover_slots(model: PreTrainedModel) -> list[_AttentionSlot]:
    """The model's attention modules, in the order they are called. Raises `TuningError` when a prefix could not get in."""
    inputs, name = (
        make_inputs(model, sample_token_ids(model, 1, _SOURCE_LENGTH), sample_token_ids(model, 1, _TARGET_LENGTH)),
        type(model).__name__,
    )
    try:
        with eval_mode(model), torch.no_grad():
            usual = model.base_model(**inputs)[0].float()
            answer, calls = record_attention(model, inputs)
    except (ValueError, TypeError, RuntimeError) as error:
        why = (str(error).splitlines() or [""])[0]
        raise TuningError(f"{name} cannot attend by `sdpa`: {why}", where="tuning", hint=ALTERNATIVES_HINT) from error
    if not calls:
        raise TuningError(
            f"no attention of {name} goes through transformers' attention interface",
            where="tuning",
            expected="an architecture that does (T5 from transformers 5.16.1 on)",
            hint=ALTERNATIVES_HINT,
        )
    tolerance = torch.finfo(get_embedding_weight(model).dtype).eps ** 0.5 * max(1.0, usual.abs().max().item())
    if (answer.float() - usual).abs().max().item() > tolerance:
        what = f"attention of {name} is more than `sdpa` computes (sinks, soft-capped scores)"
        raise TuningError(what, where="tuning", hint=ALTERNATIVES_HINT)
    names = {id(module): path for path, module in model.named_modules()}
    once = {id(call.module): call for call in calls}
    return [_make_slot(names[key], call, has_two_stacks="decoder_input_ids" in inputs) for key, call in once.items()]


def _make_slot(name: str, call: AttentionCall, *, has_two_stacks: bool) -> _AttentionSlot:
    """What a call says of its module; with `two` stacks, lengths tell them apart."""
    keys = call.key.shape[2]
    alone = "decoder" if call.causal else "encoder"
    behind = "cross" if keys != call.queries else "encoder" if keys == _SOURCE_LENGTH else "decoder"
    return _AttentionSlot(
        name,
        call.module,
        behind if has_two_stacks else alone,
        call.key.shape[1],
        call.key.shape[3],
        call.value.shape[3],
    )


def _outer_stack(model: PreTrainedModel, name: str) -> nn.Module:
    """What holds the outermost list of blocks that a module stands in; the body when it stands in none."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return model.get_submodule(".".join(parts[: end - 1]))
    return model.base_model


def _flatten_key_values(call: AttentionCall) -> Tensor:
    """The keys and values that one row met, (T, numbers of this module)."""
    return torch.cat([part[0].transpose(0, 1).flatten(1) for part in (call.key, call.value)], 1)


def _has_sliding_window(model: PreTrainedModel) -> bool:
    """Whether some layers see only the last tokens of the cache."""
    config = model.config.get_text_config()
    return any(getattr(config, key, None) is not None for key in ("sliding_window", "attention_chunk_size"))


def _position_rotations(model: PreTrainedModel, slots: Sequence[_AttentionSlot], offset: int) -> list[Tensor] | None:
    """For each slot the rotation (C, C) that a key undergoes when its token moves on by some positions.

    Measured, not looked up: single tokens attend to themselves alone, so moving one changes its keys by the rotation and
    nothing else. None where it changes them in another way (learnt positions), or positions cannot be given.
    """
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        return None
    tolerance = torch.finfo(get_embedding_weight(model).dtype).eps ** 0.5
    ids_B1 = sample_token_ids(model, 2 * max(slot.key for slot in slots), 1)
    met: list[dict[int, Tensor]] = []
    with eval_mode(model):
        for position in (0, offset):
            _, calls = record_attention(model, {"input_ids": ids_B1, "position_ids": torch.full_like(ids_B1, position)})
            met.append({id(call.module): call.key.squeeze(2).flatten(0, 1).double() for call in calls})
    turns = []
    for slot in slots:
        here, there = (keys[id(slot.module)] for keys in met)
        # The orthogonal matrix that comes nearest (Schönemann 1966).
        left, sizes, right = torch.linalg.svd(here.T @ there)
        turn_CC = left @ right
        if sizes[-1] < 1e-9 * sizes[0] or (here @ turn_CC - there).norm() > tolerance * there.norm():
            return None
        turns.append(turn_CC)
    return turns


def _rotate_keys(flat_NS: Tensor, slots: Sequence[_AttentionSlot], rotations: Sequence[Tensor]) -> Tensor:
    """Keys multiplied by a matrix for each slot, values as they are."""
    pieces = list(flat_NS.split([size for slot in slots for size in slot.sizes], 1))
    for i, (slot, turn_CC) in enumerate(zip(slots, rotations, strict=True)):
        heads_NHC = pieces[2 * i].unflatten(1, (slot.heads, slot.key)).double()
        pieces[2 * i] = (heads_NHC @ turn_CC).flatten(1).to(flat_NS.dtype)
    return torch.cat(pieces, 1)
