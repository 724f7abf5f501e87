"""What does a decoder say after each token of a tree, read behind a trunk that is read once?

Legend: B rows, T tokens of the longest row, P tokens of the trunk, H key heads, C head width, A answers asked for.

Rows bring their own mask: a token sees the trunk, its own path and nothing else, and stands at the place that it has in its
sequences. That asks of an architecture that it takes such a mask and such places, and that its past is keys and values; one
that does not (recurrent layers, ALiBi, flash attention) reads every sequence in a row of its own. Which it is, is tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from postgrad.errors import ModelError
from postgrad.evaluation.choices.token_tree import (
    Branch,
    TreeBatch,
    TreeRow,
    build_prefix_lm_batches,
    build_shared_batches,
    build_single_batches,
    build_tree,
    count_single_tokens,
    count_tokens,
)
from postgrad.models.model import CausalModel, OutputHead
from postgrad.models.prefix_lm_attention import is_prefix_lm

_LOGITS_AT_ONCE = 1 << 25
_PROBE_TOKENS = 16
"""Tokens that stand beside the sequence by which it is tried whether trees work."""
_BOOLEAN_MASK_ATTENTION = ("sdpa", "prefix")
"""Ways to attend that take a mask of true and false; any other gets numbers to be added."""


class TokenScores(NamedTuple):
    """What was asked for, as arrays of shape (A,): number, `log p` in nats, and whether no token was likelier."""

    slot: np.ndarray
    log_p: np.ndarray
    greedy: np.ndarray


class _TrunkCacheLayer(DynamicLayer):
    """A layer's keys and values of a trunk (1, H, P, C), which every batch stands behind and none adds to."""

    def __init__(self, keys: Tensor | None, values: Tensor | None) -> None:
        super().__init__()
        if keys is None or values is None:
            raise TypeError("a layer without keys of its own")
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_options: Any) -> tuple[Tensor, Tensor]:
        """The trunk's before the rows' own, (B, H, P + T, C)."""
        assert self.keys is not None
        assert self.values is not None
        rows = len(key_states)
        key, value = (old.expand(rows, -1, -1, -1) for old in (self.keys, self.values))
        return torch.cat([key, key_states], 2), torch.cat([value, value_states], 2)


class DecoderScorer:
    """A decoder and the batches that it reads: trees behind trunks, where that works and pays."""

    def __init__(self, model: CausalModel, branches: Sequence[Branch], pad: int, batch_tokens: int) -> None:
        self.model, self.pad = model, pad
        self.trunk: Cache | None = None
        self.probed_trunk: np.ndarray | None = None
        if is_prefix_lm(model.pretrained.config):
            self.uses_trees, self.batches = True, build_prefix_lm_batches(branches, batch_tokens)
            self.tokens_read = count_tokens(self.batches)
            return
        shared = build_shared_batches(branches, batch_tokens)
        longest = max(branches, key=lambda branch: len(branch.ids), default=None)
        self.uses_trees = (
            longest is not None
            and count_tokens(shared) + len(longest.ids) < count_single_tokens(branches)
            and self._trees_agree(longest, shared)
        )
        if self.uses_trees:  # the trunk that was read for the trial comes first
            self.batches = sorted(shared, key=lambda batch: batch.trunk is not self.probed_trunk)
        else:
            self.batches = build_single_batches(branches, batch_tokens)
        self.tokens_read = count_tokens(self.batches)

    def _trees_agree(self, branch: Branch, shared: Sequence[TreeBatch]) -> bool:
        """Whether a sequence says the same in a tree as by itself; the longest one meets every window there is."""
        trunk = next(batch.trunk for batch in shared if any(branch.slot in row.slot_A for row in batch.rows))
        ids = branch.ids[: len(trunk) or branch.context_length // 2]
        # What stands before it in its row would show where a mask or places are passed over.
        other = Branch(np.append(ids, branch.ids[len(ids) :][:_PROBE_TOKENS][::-1]), len(ids) + 1, (), 0)
        try:
            self.trunk = self._prefill_trunk(ids)
            tree = self._score_trees(TreeBatch(ids, (build_tree([other, branch], len(ids)),)), self.trunk).log_p
            (alone,) = build_single_batches([branch], len(branch.ids))
            plain = self._score_rows(alone).log_p
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError):
            return False
        if len(trunk):
            self.probed_trunk = trunk
        dtype = next(self.model.parameters()).dtype
        off = np.abs(tree - plain)
        return bool((off <= torch.finfo(dtype).eps ** 0.5 * np.maximum(1, np.abs(plain))).all())

    def __len__(self) -> int:
        return len(self.batches)

    def prepare(self, batch_numbers: Sequence[int], own_number: int) -> None:
        """Read the trunk that batch `mine` stands behind; a rank whose batch has none, beside some that have, reads a token."""
        if all(self.batches[number].trunk is self.probed_trunk for number in batch_numbers):
            return
        self.trunk, self.probed_trunk = None, None
        if any(len(self.batches[number].trunk) for number in batch_numbers):
            trunk = self.batches[own_number].trunk
            read = self._prefill_trunk(trunk if len(trunk) else np.array([self.pad]))
            self.trunk = read if len(trunk) else None

    def shares_trunk(self, a: int, b: int) -> bool:
        """Whether two batches stand behind the same trunk."""
        return self.batches[a].trunk is self.batches[b].trunk

    def score_batch(self, number: int) -> TokenScores:
        """The answers of a batch, whose trunk has been read."""
        batch = self.batches[number]
        return self._score_trees(batch, self.trunk) if self.uses_trees else self._score_rows(batch)

    def _prefill_trunk(self, trunk: np.ndarray) -> Cache | None:
        """Keys and values of a trunk (P,); None where there is no trunk."""
        if not len(trunk):
            return None
        ids = torch.from_numpy(trunk)[None].to(self._device)
        cache = DynamicCache()  # without a configuration: all keys, whatever window a layer has
        places = torch.arange(len(trunk), device=ids.device)[None]
        self.model(input_ids=ids, position_ids=places, past_key_values=cache)
        layers = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
        if len(layers) < len(cache.layers):
            raise TypeError("a past that is more than keys and values")
        return Cache(layers=[_TrunkCacheLayer(layer.keys, layer.values) for layer in layers])

    def _score_trees(self, batch: TreeBatch, trunk: Cache | None) -> TokenScores:
        arrays = pad_rows(batch.rows, batch.width, len(batch.trunk), self.pad)
        ids_BT, depth_BT, end_BT = (torch.from_numpy(array).to(self._device) for array in arrays)
        past = {} if trunk is None else {"past_key_values": trunk}
        prefix_B = torch.tensor([row.prefix_length for row in batch.rows], device=self._device)
        masks = _attention_masks(self.model, depth_BT, end_BT, len(batch.trunk), prefix_B)
        output = self.model(input_ids=ids_BT, position_ids=depth_BT, attention_mask=masks, **past)
        return score_rows(output.hidden, output.head, batch.rows)

    def _score_rows(self, batch: TreeBatch) -> TokenScores:
        """As any causal model reads: what fills a row up stands on the right, where nothing looks."""
        ids_BT = torch.from_numpy(pad_rows(batch.rows, batch.width, 0, self.pad)[0]).to(self._device)
        output = self.model(input_ids=ids_BT)
        return score_rows(output.hidden, output.head, batch.rows)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def score_rows(hidden_BTD: Tensor, head: OutputHead | None, rows: Sequence[TreeRow]) -> TokenScores:
    """`log p` of what each row wants, given hidden states; logits are made only where something is asked, and in parts."""
    width, device = hidden_BTD.shape[1], hidden_BTD.device
    asked_A = np.concatenate([row.source_A + i * width for i, row in enumerate(rows)])
    wanted_A = torch.from_numpy(np.concatenate([row.target_A for row in rows])).to(device)
    places, of_A = np.unique(asked_A, return_inverse=True)
    hidden_ND = hidden_BTD.flatten(0, 1)[torch.from_numpy(places).to(device)]
    make = head.logits if head else torch.nn.Identity()
    step = max(1, _LOGITS_AT_ONCE // (head.weight_VD.shape[0] if head else hidden_ND.shape[-1]))
    log_p_A, greedy_A = np.empty(len(of_A)), np.empty(len(of_A), bool)
    for begin in range(0, len(places), step):
        logits_NV = make(hidden_ND[begin : begin + step]).float()
        mine = np.flatnonzero((of_A >= begin) & (of_A < begin + step))
        rows_M = torch.from_numpy(of_A[mine] - begin).to(device)
        wanted_M = wanted_A[torch.from_numpy(mine).to(device)]
        log_p = logits_NV[rows_M, wanted_M] - logits_NV.logsumexp(-1)[rows_M]
        log_p_A[mine] = log_p.double().cpu().numpy()
        greedy_A[mine] = (logits_NV.argmax(-1)[rows_M] == wanted_M).cpu().numpy()
    return TokenScores(np.concatenate([row.slot_A for row in rows]), log_p_A, greedy_A)


def pad_rows(
    rows: Sequence[TreeRow], width: int, trunk_length: int, pad: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, places and ends of rows, of shape (B, T). What fills a row up is seen by nothing but itself."""
    ids = np.full((len(rows), width), pad, np.int64)
    depth = np.full((len(rows), width), trunk_length, np.int64)
    end = np.tile(np.arange(1, width + 1), (len(rows), 1))
    for i, row in enumerate(rows):
        size = len(row.ids)
        ids[i, :size], depth[i, :size], end[i, :size] = row.ids, row.depth, row.end
    return ids, depth, end


def _attention_masks(
    model: CausalModel, depth_BT: Tensor, end_BT: Tensor, trunk_length: int, prefix_B: Tensor
) -> Tensor | dict[str, Tensor]:
    """What each token sees, (B, 1, T, P + T): one mask, or one for each sort of layer where some see a window alone."""
    config: Any = model.pretrained.config.get_text_config()
    numbers_T = torch.arange(depth_BT.shape[1], device=depth_BT.device)
    before_BTT = (numbers_T[:, None] >= numbers_T) & (numbers_T[:, None] < end_BT[:, None, :])
    of_prefix_BT = numbers_T < prefix_B[:, None]
    before_BTT |= of_prefix_BT[:, :, None] & of_prefix_BT[:, None, :]
    seen_BTK = torch.nn.functional.pad(before_BTT, (trunk_length, 0), value=True)
    window = getattr(config, "sliding_window", None)
    if not window or depth_BT.max() < window:
        return _attention_mask(model, seen_BTK)
    if of_prefix_BT.any():
        raise ModelError(
            f"a question with {int(depth_BT.max()) + 1:,} tokens, and layers of this model see {window:,}",
            where="model",
            expected="questions inside the window: beyond it a prefix cannot be read in both directions",
        )
    places = torch.arange(trunk_length, device=depth_BT.device).expand(len(depth_BT), -1)
    far_BTK = depth_BT[:, :, None] - torch.cat([places, depth_BT], 1)[:, None] >= window
    masks = {
        "full_attention": _attention_mask(model, seen_BTK),
        "sliding_attention": _attention_mask(model, seen_BTK & ~far_BTK),
    }
    sorts = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    return masks if len(sorts) > 1 else masks[sorts.pop()]


def _attention_mask(model: CausalModel, visible_BTK: Tensor) -> Tensor:
    attends = model.pretrained.config._attn_implementation
    if attends in _BOOLEAN_MASK_ATTENTION:
        return visible_BTK[:, None]
    dtype = next(model.parameters()).dtype
    added = torch.zeros(visible_BTK.shape, dtype=dtype, device=visible_BTK.device)
    return added.masked_fill(~visible_BTK, torch.finfo(dtype).min)[:, None]
