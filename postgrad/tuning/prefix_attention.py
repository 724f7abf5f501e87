"""How does attention read keys and values that stand at no position? They are put before a layer's own, at every call.

Legend: B batch, H key heads, T time (queries), K keys, N prefix length, C head width.

Models of transformers look their attention function up by name, and the function under `NAME` puts before a module's keys
and values those of the `Share`s that the module carries, then calls transformers' own `sdpa`. The key-value cache never
sees them and no position moves, so padding, packed documents, cached decoding and sliding windows stay what they are:

    a mask        gets N columns in front that every query sees
    a bias        of relative positions (T5) gets N zeros in front
    no mask       stays none: where all keys are seen nothing is needed, and where attention is causal N empty queries
                  are put before the others, which makes the triangle that `is_causal` means the right one

The masks are those of `sdpa`, so transformers itself keeps packed documents apart.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from postgrad.errors import TuningError
from postgrad.models.pretrained import get_embedding_weight

PREFIX_IMPLEMENTATION = "prefix"
RECORDING_IMPLEMENTATION = "prefix_watched"
LAYER_PREFIXES = "prefix_shares"
"""The attribute of an attention module that lists its shares."""


class PrefixProvider(Protocol):
    """Where shares come from."""

    enabled: bool
    dropout: nn.Dropout

    def recompute(self, layer_prefix: LayerPrefix) -> tuple[Tensor, Tensor]:
        """One share's keys and values of shape (H, N, C), with a graph of their own."""
        ...


class LayerPrefix:
    """What one prefix gives to one attention module: keys and values of shape (H, N, C).

    They are computed for all modules at once when a forward pass begins, and kept until the next one: a layer whose
    activations are recomputed in the backward pass asks again, and must meet what it met. Dropout acts here and not there
    because a recomputed layer draws the same numbers again.
    """

    def __init__(self, provider: PrefixProvider, heads: int, sizes: tuple[int, int]) -> None:
        """`sizes`: how many numbers all heads' keys and values of one position have."""
        self.provider, self.heads, self.sizes = provider, heads, sizes
        self.cache: tuple[Tensor, Tensor] | None = None

    def keys_and_values(self, key_BHKC: Tensor, value_BHKC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of shape (B, H, N, C), with the batch, dtype and device of the module's own."""
        key, value = self.provider.recompute(self) if self.cache is None else self.cache
        if key.requires_grad and not torch.is_grad_enabled():
            # Reentrant checkpointing: a layer's backward pass is one of its own, and frees the graph that it goes through.
            self.cache = None
        return self._expand_rows(key, key_BHKC), self._expand_rows(value, value_BHKC)

    def _expand_rows(self, prefix_HNC: Tensor, like_BHKC: Tensor) -> Tensor:
        # Each row of a batch loses numbers of its own, as in the published code, which repeats the prefix first.
        return self.provider.dropout(prefix_HNC.to(like_BHKC).expand(like_BHKC.shape[0], -1, -1, -1))

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a model begins its own forward passes.
        return {**self.__dict__, "cache": None}


def prefix_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention output of shape (B, T, heads, C), as transformers' attention functions give it, prefixes included.

    Raises `TuningError` under continuous batching, whose cache would take the prefix in.
    """
    shares: list[LayerPrefix] = [share for share in getattr(module, LAYER_PREFIXES, ()) if share.provider.enabled]
    if shares and kwargs.get("cache") is not None:
        raise TuningError("continuous batching would cache the prefix", where="tuning", hint="use `generate`")
    if not shares:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, is_causal=is_causal, position_bias=position_bias, **kwargs
        )
    queries, keys = query.shape[2], key.shape[2]
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    causal = causal and queries > 1 and attention_mask is None
    mine = [share.keys_and_values(key, value) for share in shares]
    key, value = torch.cat([*(k for k, _ in mine), key], 2), torch.cat([*(v for _, v in mine), value], 2)
    more = key.shape[2] - keys
    if position_bias is not None:
        position_bias = pad(position_bias, (more, 0))
    if attention_mask is not None:
        attention_mask = pad(attention_mask, (more, 0), value=attention_mask.dtype == torch.bool)
    elif causal and position_bias is not None:
        seen = torch.ones(queries, more + keys, dtype=torch.bool, device=query.device).tril(more)
        attention_mask = seen[None, None]
    elif causal:
        # `sdpa` itself cuts off the keys that a static cache has no tokens for yet.
        query = pad(query, (0, 0, more, 0))
    out, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, is_causal=causal, position_bias=position_bias, **kwargs
    )
    return out[:, -queries:], None


class AttentionCall(NamedTuple):
    """One call of attention in a forward pass: keys and values of shape (B, H, K, C), and how many queries."""

    module: nn.Module
    queries: int
    key: Tensor
    value: Tensor
    causal: bool


_RECORDED_CALLS: list[AttentionCall] = []


def _recording_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    for more in ("softcap", "s_aux"):  # soft-capped scores, sinks: some versions of `sdpa` pass over them in silence
        if kwargs.get(more) is not None:
            raise ValueError(f"it does not know `{more}`")
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    _RECORDED_CALLS.append(AttentionCall(module, query.shape[2], key, value, bool(causal)))
    return prefix_attention_forward(module, query, key, value, attention_mask, **kwargs)


for _name, _function in (
    (PREFIX_IMPLEMENTATION, prefix_attention_forward),
    (RECORDING_IMPLEMENTATION, _recording_forward),
):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, sdpa_mask)


AttentionImplementations = list[tuple[PreTrainedConfig, str | None]]
"""By what each of a model's configurations makes its modules attend."""


def get_implementations(model: PreTrainedModel) -> AttentionImplementations:
    """How every part of the model attends: T5's stacks and composite models' parts have configurations of their own."""
    configs: list[object] = [getattr(module, "config", None) for module in model.modules()]
    found = {id(config): config for config in configs if isinstance(config, PreTrainedConfig)}
    return [(config, config._attn_implementation) for config in found.values()]


def set_implementations(implementations: AttentionImplementations) -> None:
    """Make every part of a model attend in its way."""
    for config, implementation in implementations:
        # A whole hands its own down to its parts, whose entries come after it.
        config._attn_implementation = implementation


def uniform_implementations(model: PreTrainedModel, implementation: str) -> AttentionImplementations:
    """The same implementation for every part."""
    return [(config, implementation) for config, _ in get_implementations(model)]


@contextmanager
def use_implementations(model: PreTrainedModel, implementations: AttentionImplementations) -> Iterator[None]:
    """Inside, the model attends so; afterwards as it did before."""
    before = get_implementations(model)
    set_implementations(implementations)
    try:
        yield
    finally:
        set_implementations(before)


def record_attention(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[AttentionCall]]:
    """The first output of the model's body, and its calls of attention in order."""
    _RECORDED_CALLS.clear()
    try:
        with use_implementations(model, uniform_implementations(model, RECORDING_IMPLEMENTATION)), torch.no_grad():
            output = model.base_model(**inputs)[0]
        return output, list(_RECORDED_CALLS)
    finally:
        _RECORDED_CALLS.clear()


def sample_token_ids(model: PreTrainedModel, rows: int, length: int) -> Tensor:
    """Ids (B, T) of some words, the same ones every time."""
    table = get_embedding_weight(model)
    # Special ids stand first in most vocabularies, and some models count positions by padding.
    drawn = torch.randint(len(table) // 2, len(table), (rows, length), generator=torch.Generator().manual_seed(0))
    return drawn.to(table.device)


def make_inputs(model: PreTrainedModel, source_BT: Tensor, target_BT: Tensor) -> dict[str, Tensor]:
    """What the model's body is called with; the second ids only where a decoder stands behind an encoder."""
    decoder = "decoder_input_ids" in inspect.signature(model.base_model.forward).parameters
    return {"input_ids": source_BT, **({"decoder_input_ids": target_BT} if decoder else {})}
