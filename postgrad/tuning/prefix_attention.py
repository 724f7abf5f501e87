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
from postgrad.models.pretrained import table_of

NAME = "prefix"
WATCHED = "prefix_watched"
SHARES = "prefix_shares"
"""The attribute of an attention module that lists its shares."""


class Source(Protocol):
    """Where shares come from."""

    on: bool
    dropout: nn.Dropout

    def alone(self, share: Share) -> tuple[Tensor, Tensor]:
        """One share's keys and values of shape (H, N, C), with a graph of their own."""
        ...


class Share:
    """What one prefix gives to one attention module: keys and values of shape (H, N, C).

    They are computed for all modules at once when a forward pass begins, and kept until the next one: a layer whose
    activations are recomputed in the backward pass asks again, and must meet what it met. Dropout acts here and not there
    because a recomputed layer draws the same numbers again.
    """

    def __init__(self, source: Source, heads: int, sizes: tuple[int, int]) -> None:
        """`sizes`: how many numbers all heads' keys and values of one position have."""
        self.source, self.heads, self.sizes = source, heads, sizes
        self.kept: tuple[Tensor, Tensor] | None = None

    def read(self, key_BHKC: Tensor, value_BHKC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of shape (B, H, N, C), with the batch, dtype and device of the module's own."""
        key, value = self.source.alone(self) if self.kept is None else self.kept
        if key.requires_grad and not torch.is_grad_enabled():
            # Reentrant checkpointing: a layer's backward pass is one of its own, and frees the graph that it goes through.
            self.kept = None
        return self._rows(key, key_BHKC), self._rows(value, value_BHKC)

    def _rows(self, mine_HNC: Tensor, like_BHKC: Tensor) -> Tensor:
        # Each row of a batch loses numbers of its own, as in the published code, which repeats the prefix first.
        return self.source.dropout(mine_HNC.to(like_BHKC).expand(like_BHKC.shape[0], -1, -1, -1))

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a model begins its own forward passes.
        return {**self.__dict__, "kept": None}


def prefixed(
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
    shares: list[Share] = [share for share in getattr(module, SHARES, ()) if share.source.on]
    if shares and kwargs.get("cache") is not None:
        raise TuningError("continuous batching would cache the prefix", where="tuning", way_out="use `generate`")
    if not shares:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, is_causal=is_causal, position_bias=position_bias, **kwargs
        )
    queries, keys = query.shape[2], key.shape[2]
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    causal = causal and queries > 1 and attention_mask is None
    mine = [share.read(key, value) for share in shares]
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


class Met(NamedTuple):
    """One call of attention in a forward pass: keys and values of shape (B, H, K, C), and how many queries."""

    module: nn.Module
    queries: int
    key: Tensor
    value: Tensor
    causal: bool


_MET: list[Met] = []


def _watched(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    for more in ("softcap", "s_aux"):  # soft-capped scores, sinks: some versions of `sdpa` pass over them in silence
        if kwargs.get(more) is not None:
            raise ValueError(f"it does not know `{more}`")
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    _MET.append(Met(module, query.shape[2], key, value, bool(causal)))
    return prefixed(module, query, key, value, attention_mask, **kwargs)


for _name, _function in ((NAME, prefixed), (WATCHED, _watched)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, sdpa_mask)


Implementations = list[tuple[PreTrainedConfig, str | None]]
"""By what each of a model's configurations makes its modules attend."""


def implementations_of(model: PreTrainedModel) -> Implementations:
    """How every part of the model attends: T5's stacks and composite models' parts have configurations of their own."""
    configs: list[object] = [getattr(module, "config", None) for module in model.modules()]
    found = {id(config): config for config in configs if isinstance(config, PreTrainedConfig)}
    return [(config, config._attn_implementation) for config in found.values()]


def attend_by(implementations: Implementations) -> None:
    """Make every part of a model attend in its way."""
    for config, implementation in implementations:
        # A whole hands its own down to its parts, whose entries come after it.
        config._attn_implementation = implementation


def all_by(model: PreTrainedModel, implementation: str) -> Implementations:
    """The same implementation for every part."""
    return [(config, implementation) for config, _ in implementations_of(model)]


@contextmanager
def attending(model: PreTrainedModel, implementations: Implementations) -> Iterator[None]:
    """Inside, the model attends so; afterwards as it did before."""
    before = implementations_of(model)
    attend_by(implementations)
    try:
        yield
    finally:
        attend_by(before)


def watch(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[Met]]:
    """The first output of the model's body, and its calls of attention in order."""
    _MET.clear()
    try:
        with attending(model, all_by(model, WATCHED)), torch.no_grad():
            output = model.base_model(**inputs)[0]
        return output, list(_MET)
    finally:
        _MET.clear()


def few_ids(model: PreTrainedModel, rows: int, length: int) -> Tensor:
    """Ids (B, T) of some words, the same ones every time."""
    table = table_of(model)
    # Special ids stand first in most vocabularies, and some models count positions by padding.
    drawn = torch.randint(len(table) // 2, len(table), (rows, length), generator=torch.Generator().manual_seed(0))
    return drawn.to(table.device)


def arguments(model: PreTrainedModel, source_BT: Tensor, target_BT: Tensor) -> dict[str, Tensor]:
    """What the model's body is called with; the second ids only where a decoder stands behind an encoder."""
    decoder = "decoder_input_ids" in inspect.signature(model.base_model.forward).parameters
    return {"input_ids": source_BT, **({"decoder_input_ids": target_BT} if decoder else {})}
