"""Decoding of a decoder token by token, with a cache where that gives the states of whole sequences.

Architectures differ: some have no cache under the usual name, some count positions by the attention mask, some keep states that
a cache of keys and values does not hold. So the ways are tried on random ids, and the first is taken that agrees with a plain
forward pass: a cache, a cache with an attention mask, or whole sequences again for each token.

Legend: B rows, K tokens of a sequence so far, T new ones of them, D model width.
"""

from __future__ import annotations

from enum import Enum
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from postgrad.models.isolation import UNSUPPORTED, random_ids
from postgrad.models.model import CausalModel

_PROMPT, _NEW, _PADDING = 6, 3, 2
"""Tokens of the test."""


class DecodingWay(Enum):
    """How a model reads a sequence token by token; only the first two take prompts with padding on the left."""

    CACHE = "cache"
    CACHE_AND_MASK = "cache and mask"
    WHOLE = "whole sequences"


class Decoder:
    """The last hidden states of sequences that grow, all of one length or padded on the left where the model supports it."""

    def __init__(self, model: CausalModel, way: DecodingWay) -> None:
        self.model, self.way = model, way
        self.cache: Cache | None = None if way is DecodingWay.WHOLE else DynamicCache(config=model.pretrained.config)
        self.ids_BK: Tensor | None = None

    def __call__(self, ids_BT: Tensor, mask_BK: Tensor | None = None) -> Tensor:
        """The states (B, D) after new tokens; `mask_BK`: 0 where all of the sequence so far is padding."""
        self.ids_BK = ids_BT if self.ids_BK is None else torch.cat([self.ids_BK, ids_BT], 1)
        if self.cache is None:
            return self.model.run(input_ids=self.ids_BK, use_cache=False).hidden[:, -1]
        inputs: dict[str, Tensor] = {}
        if mask_BK is None and self.way is DecodingWay.CACHE_AND_MASK:
            mask_BK = torch.ones_like(self.ids_BK)
        if mask_BK is not None:
            positions_BK = (mask_BK.cumsum(1) - 1).clamp(min=0)
            inputs = {"attention_mask": mask_BK, "position_ids": positions_BK[:, -ids_BT.shape[1] :]}
        return self.model.run(input_ids=ids_BT, past_key_values=self.cache, use_cache=True, **inputs).hidden[:, -1]

    def select(self, rows: Tensor) -> None:
        """Go on with some of the rows only."""
        assert self.ids_BK is not None
        self.ids_BK = self.ids_BK[rows]
        if self.cache is not None:
            self.cache.batch_select_indices(rows)


_WAYS: WeakKeyDictionary[nn.Module, dict[bool, DecodingWay]] = WeakKeyDictionary()


def find_decoding_way(model: CausalModel, *, padded: bool = False) -> DecodingWay:
    """The first way that gives the states of plain forward passes, tried once for a model; `padded`: with padding on the left.

    Whole sequences cannot be padded.
    """
    ways = _WAYS.setdefault(model, {})
    if padded not in ways:
        tried = (DecodingWay.CACHE, DecodingWay.CACHE_AND_MASK)
        ways[padded] = next((way for way in tried if _agrees(model, way, padded=padded)), DecodingWay.WHOLE)
    return ways[padded]


def takes_left_padding(model: CausalModel) -> bool:
    """Whether prompts of unequal lengths can be read together, with masked padding on the left."""
    return find_decoding_way(model, padded=True) is not DecodingWay.WHOLE


@torch.no_grad()
def _agrees(model: CausalModel, way: DecodingWay, *, padded: bool) -> bool:
    """Whether a way gives the states of plain forward passes for two rows, of which the first ends early."""
    ids_BK = random_ids(model.pretrained, (2, _PROMPT + _NEW))
    kind = ids_BK.device.type
    is_mixed = torch.is_autocast_enabled(kind)
    tolerance = torch.finfo(torch.get_autocast_dtype(kind) if is_mixed else model.pretrained.dtype).eps ** 0.5
    mask_BK = torch.ones_like(ids_BK)
    size = _PROMPT - _PADDING if padded else _PROMPT
    if padded:  # the first row has a shorter prompt
        mask_BK[0, :_PADDING] = 0
    try:
        decoder = Decoder(model, way)
        given = [ids_BK[:, :_PROMPT], *ids_BK[:, _PROMPT:].split(1, 1)]
        for step, ids_BT in enumerate(given):
            end = _PROMPT + step
            if step == 2:
                decoder.select(torch.tensor([1], device=ids_BK.device))
            kept = slice(0, 2) if step < 2 else slice(1, 2)
            states_BD = decoder(ids_BT[kept], mask_BK[kept, :end] if padded else None)
            rows = [ids_BK[1:, :end]] if step >= 2 else [ids_BK[:1, _PROMPT - size : end], ids_BK[1:, :end]]
            plain_BD = torch.cat([model(input_ids=row).hidden[:, -1] for row in rows])
            if (states_BD - plain_BD).abs().max() > tolerance * plain_BD.abs().max():
                return False
    except torch.OutOfMemoryError:
        raise
    except UNSUPPORTED:
        return False
    return True
