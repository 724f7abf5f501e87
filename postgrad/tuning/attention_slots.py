"""The attention modules of a model that can read a prefix, discovered in one forward pass over a few tokens.

Legend: B batch, H key heads, T time, N prefix length, C head width, S all numbers of one position (2 H C, summed over the
attention modules of a role).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from postgrad.errors import TuningError, first_line
from postgrad.models.layers import get_embedding_weight
from postgrad.models.sublayers import eval_mode
from postgrad.tuning.prefix_attention import AttentionCall, make_inputs, record_attention, sample_token_ids

ROLES = ("encoder", "decoder", "cross")
ALTERNATIVES_HINT = "prompt tuning and LoRA work on this model"
_SOURCE_LENGTH, _TARGET_LENGTH = 7, 5
"""Lengths in the probe pass; their difference identifies cross-attention."""


class AttentionSlot(NamedTuple):
    """An attention module that can read a prefix: `heads` key heads, with keys and values of these widths."""

    name: str
    module: nn.Module
    role: str
    heads: int
    key_width: int
    value_width: int

    @property
    def sizes(self) -> tuple[int, int]:
        """How many numbers the keys, and the values, of one position have over all heads."""
        return self.heads * self.key_width, self.heads * self.value_width


def probe_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Inputs of the probe pass."""
    return make_inputs(model, sample_token_ids(model, 1, _SOURCE_LENGTH), sample_token_ids(model, 1, _TARGET_LENGTH))


def discover_slots(model: PreTrainedModel) -> list[AttentionSlot]:
    """The model's attention modules in call order. Raises `TuningError` if a prefix could not be inserted."""
    inputs, name = probe_inputs(model), type(model).__name__
    try:
        with eval_mode(model), torch.no_grad():
            expected = model.base_model(**inputs)[0].float()
            output, calls = record_attention(model, inputs)
    except (ValueError, TypeError, RuntimeError) as error:
        raise TuningError(
            f"{name} cannot use `sdpa` attention: {first_line(error)}", where="tuning", hint=ALTERNATIVES_HINT
        ) from error
    if not calls:
        raise TuningError(
            f"no attention of {name} uses transformers' attention interface",
            where="tuning",
            expected="an architecture that does (T5 from transformers 5.16.1 on)",
            hint=ALTERNATIVES_HINT,
        )
    tolerance = _tolerance(model) * max(1.0, expected.abs().max().item())
    if (output.float() - expected).abs().max().item() > tolerance:
        raise TuningError(
            f"attention of {name} is more than `sdpa` computes (sinks, soft-capped scores)",
            where="tuning",
            hint=ALTERNATIVES_HINT,
        )
    names = {id(module): path for path, module in model.named_modules()}
    last_calls = {id(call.module): call for call in calls}
    return [_make_slot(names[key], call, "decoder_input_ids" in inputs) for key, call in last_calls.items()]


def _make_slot(name: str, call: AttentionCall, has_two_stacks: bool) -> AttentionSlot:
    keys = call.key.shape[2]
    if not has_two_stacks:
        role = "decoder" if call.causal else "encoder"
    elif keys != call.queries:
        role = "cross"
    else:
        role = "encoder" if keys == _SOURCE_LENGTH else "decoder"
    return AttentionSlot(name, call.module, role, call.key.shape[1], call.key.shape[3], call.value.shape[3])


def select_roles(slots: Sequence[str] | Literal["all"], available: set[str]) -> list[str]:
    """The roles that get a prefix. Raises `TuningError` for one that the model does not have."""
    requested = available if slots == "all" else set(slots)
    if not requested or not requested <= available:
        raise TuningError(
            f"this model has no attention '{min(requested - available)}'" if requested else "slots is empty",
            where="tuning.slots",
            expected=f"all, or some of {', '.join(role for role in ROLES if role in available)}",
        )
    return [role for role in ROLES if role in requested]


def outer_stack(model: PreTrainedModel, name: str) -> nn.Module:
    """The module that holds the outermost list of blocks around a module; the body if there is none."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return model.get_submodule(".".join(parts[: end - 1]))
    return model.base_model


def has_sliding_window(model: PreTrainedModel) -> bool:
    """Whether some layers see only the last tokens of the cache."""
    config = model.config.get_text_config()
    return any(getattr(config, key, None) is not None for key in ("sliding_window", "attention_chunk_size"))


def position_rotations(model: PreTrainedModel, slots: Sequence[AttentionSlot], offset: int) -> list[Tensor] | None:
    """For each slot the rotation (C, C) of a key whose token moves by `offset` positions.

    Measured, not looked up. In rows of a single token, attention returns that token's value whatever its key is, so the
    hidden states do not depend on the position and a key changes by its rotary rotation alone. None where the change is no
    rotation (learned positions), or the model takes no positions.
    """
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        return None
    # More rows than dimensions, so that the rotation is determined.
    ids_B1 = sample_token_ids(model, 2 * max(slot.key_width for slot in slots), 1)
    keys: list[dict[int, Tensor]] = []
    with eval_mode(model):
        for position in (0, offset):
            _, calls = record_attention(model, {"input_ids": ids_B1, "position_ids": torch.full_like(ids_B1, position)})
            keys.append({id(call.module): call.key.squeeze(2).flatten(0, 1).double() for call in calls})
    rotations = []
    for slot in slots:
        before, after = (by_module[id(slot.module)] for by_module in keys)
        # The nearest orthogonal matrix in the Frobenius norm (orthogonal Procrustes, Schönemann 1966).
        left, sizes, right = torch.linalg.svd(before.T @ after)
        rotation_CC = left @ right
        is_unique = sizes[-1] >= 1e-9 * sizes[0]
        if not is_unique or (before @ rotation_CC - after).norm() > _tolerance(model) * after.norm():
            return None
        rotations.append(rotation_CC)
    return rotations


def rotate_keys(flat_NS: Tensor, slots: Sequence[AttentionSlot], rotations: Sequence[Tensor]) -> Tensor:
    """Multiply each slot's keys by its matrix; values are unchanged."""
    pieces = list(flat_NS.split([size for slot in slots for size in slot.sizes], 1))
    for i, (slot, rotation_CC) in enumerate(zip(slots, rotations, strict=True)):
        heads_NHC = pieces[2 * i].unflatten(1, (slot.heads, slot.key_width)).double()
        pieces[2 * i] = (heads_NHC @ rotation_CC).flatten(1).to(flat_NS.dtype)
    return torch.cat(pieces, 1)


def _tolerance(model: PreTrainedModel) -> float:
    return torch.finfo(get_embedding_weight(model).dtype).eps ** 0.5
