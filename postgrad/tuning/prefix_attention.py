"""Attention with keys and values that have no position: a prefix is concatenated before a layer's own, at every call.

Legend: B batch, H key heads, T time (queries), K keys, N prefix length, C head width.

Models of transformers look their attention function up by name. The function registered under `PREFIX_IMPLEMENTATION`
concatenates the keys and values of a module's `LayerPrefix`es with the module's own, then calls transformers' `sdpa`. The
key-value cache never contains them and no position moves, so padding, packed documents, cached decoding and sliding windows
work unchanged:

    a mask        gets N columns in front that every query sees
    a bias        of relative positions (T5) gets N zeros in front
    no mask       stays none. Without causality nothing is needed. Causal `sdpa` masks by the triangle of a square matrix,
                  which N more keys shift; N empty queries in front make it square again, and their outputs are dropped

Masks are built as for `sdpa`, so transformers itself keeps packed documents apart.
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
from postgrad.models.layers import get_embedding_weight

PREFIX_IMPLEMENTATION = "prefix"
RECORDING_IMPLEMENTATION = "prefix_recording"
LAYER_PREFIXES = "layer_prefixes"
"""The attribute of an attention module that lists its `LayerPrefix`es."""


class PrefixProvider(Protocol):
    """The trained prefix that computes keys and values."""

    enabled: bool
    dropout: nn.Dropout

    def recompute(self, layer_prefix: LayerPrefix) -> tuple[Tensor, Tensor]:
        """One module's keys and values of shape (H, N, C), with a graph of their own."""
        ...


class LayerPrefix:
    """The keys and values, of shape (H, N, C), of one prefix for one attention module.

    They are computed for all modules at once when a forward pass begins, and cached until the next one: a layer whose
    activations are recomputed in the backward pass reads them again and must get the same tensors. Dropout is applied here,
    after the cache, because a recomputed layer draws the same random numbers again.
    """

    def __init__(self, provider: PrefixProvider, heads: int, sizes: tuple[int, int]) -> None:
        """`sizes`: how many numbers the keys, and the values, of one position have over all heads."""
        self.provider, self.heads, self.sizes = provider, heads, sizes
        self.cache: tuple[Tensor, Tensor] | None = None

    def keys_and_values(self, key_BHKC: Tensor, value_BHKC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of shape (B, H, N, C), in the batch size, dtype and device of the module's own."""
        key, value = self.provider.recompute(self) if self.cache is None else self.cache
        if key.requires_grad and not torch.is_grad_enabled():
            # Reentrant checkpointing: each layer has a backward pass of its own, which frees the graph of what it read. The
            # recomputation therefore needs a fresh graph, not the cached one.
            self.cache = None
        return self._expand_rows(key, key_BHKC), self._expand_rows(value, value_BHKC)

    def _expand_rows(self, prefix_HNC: Tensor, like_BHKC: Tensor) -> Tensor:
        # Expanded before dropout: each row has its own mask, as in the published code.
        return self.provider.dropout(prefix_HNC.to(like_BHKC).expand(like_BHKC.shape[0], -1, -1, -1))

    def __getstate__(self) -> dict[str, Any]:
        # A copied model starts without a cache.
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

    Raises `TuningError` under continuous batching, whose cache would contain the prefix.
    """
    prefixes: list[LayerPrefix] = [p for p in getattr(module, LAYER_PREFIXES, ()) if p.provider.enabled]
    if prefixes and kwargs.get("cache") is not None:
        raise TuningError("continuous batching would cache the prefix", where="tuning", hint="use `generate`")
    if not prefixes:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, is_causal=is_causal, position_bias=position_bias, **kwargs
        )
    queries, keys = query.shape[2], key.shape[2]
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    causal = causal and queries > 1 and attention_mask is None
    pairs = [prefix.keys_and_values(key, value) for prefix in prefixes]
    key, value = torch.cat([*(k for k, _ in pairs), key], 2), torch.cat([*(v for _, v in pairs), value], 2)
    length = key.shape[2] - keys  # N, summed over the prefixes
    if position_bias is not None:
        position_bias = pad(position_bias, (length, 0))
    if attention_mask is not None:
        # Visible to every query: True in a boolean mask, 0 in an additive one.
        attention_mask = pad(attention_mask, (length, 0), value=attention_mask.dtype == torch.bool)
    elif causal and position_bias is not None:
        # The bias has one row per query, so no empty queries can be added: an explicit mask takes their place.
        visible = torch.ones(queries, length + keys, dtype=torch.bool, device=query.device).tril(length)
        attention_mask = visible[None, None]
    elif causal:
        # `sdpa` itself cuts off the keys of a static cache that have no tokens yet.
        query = pad(query, (0, 0, length, 0))
    out, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, is_causal=causal, position_bias=position_bias, **kwargs
    )
    return out[:, -queries:], None


class AttentionCall(NamedTuple):
    """One attention call in a forward pass: keys and values of shape (B, H, K, C), and the number of queries."""

    module: nn.Module
    queries: int
    key: Tensor
    value: Tensor
    causal: bool


_RECORDED_CALLS: list[AttentionCall] = []


def _recording_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    for option in ("softcap", "s_aux"):  # soft-capped scores, sinks: some versions of `sdpa` ignore them silently
        if kwargs.get(option) is not None:
            raise ValueError(f"it does not support `{option}`")
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
"""The attention implementation of each configuration in a model."""


def get_implementations(model: PreTrainedModel) -> AttentionImplementations:
    """Of every part of the model: T5's stacks and the parts of composite models have configurations of their own."""
    configs: list[object] = [getattr(module, "config", None) for module in model.modules()]
    unique = {id(config): config for config in configs if isinstance(config, PreTrainedConfig)}
    return [(config, config._attn_implementation) for config in unique.values()]


def set_implementations(implementations: AttentionImplementations) -> None:
    """Set each part's implementation."""
    for config, implementation in implementations:
        # Setting a composite configuration also sets its parts, whose entries come later in the list.
        config._attn_implementation = implementation


def uniform_implementations(model: PreTrainedModel, implementation: str) -> AttentionImplementations:
    """The same implementation for every part."""
    return [(config, implementation) for config, _ in get_implementations(model)]


@contextmanager
def use_implementations(model: PreTrainedModel, implementations: AttentionImplementations) -> Iterator[None]:
    """Context in which the model uses these implementations."""
    before = get_implementations(model)
    set_implementations(implementations)
    try:
        yield
    finally:
        set_implementations(before)


def record_attention(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[AttentionCall]]:
    """The first output of the model's body, and its attention calls in order."""
    _RECORDED_CALLS.clear()
    try:
        with use_implementations(model, uniform_implementations(model, RECORDING_IMPLEMENTATION)), torch.no_grad():
            output = model.base_model(**inputs)[0]
        return output, list(_RECORDED_CALLS)
    finally:
        _RECORDED_CALLS.clear()


def sample_token_ids(model: PreTrainedModel, rows: int, length: int) -> Tensor:
    """Random ids (B, T), the same ones every time."""
    table = get_embedding_weight(model)
    # From the upper half: special ids come first in most vocabularies, and some models derive positions from padding ids.
    ids_BT = torch.randint(len(table) // 2, len(table), (rows, length), generator=torch.Generator().manual_seed(0))
    return ids_BT.to(table.device)


def make_inputs(model: PreTrainedModel, source_BT: Tensor, target_BT: Tensor) -> dict[str, Tensor]:
    """Arguments of the model's body; the target only for an encoder-decoder."""
    has_decoder = "decoder_input_ids" in inspect.signature(model.base_model.forward).parameters
    return {"input_ids": source_BT, **({"decoder_input_ids": target_BT} if has_decoder else {})}
