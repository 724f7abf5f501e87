"""Scoring of a token tree by a decoder, sharing the KV cache of the tree's common prefix.

Legend: B rows, T tokens of the longest row, P tokens of the trunk, H key heads, C head width, A answers (scored tokens).

The common prefix (the *trunk*) is prefilled once, with batch size one. Each batch of rows then attends to the trunk's keys and
values, expanded over the batch without a copy, followed by its own. Rows bring their own 4-D mask: a token sees the trunk and
the path of the tree that leads to it, nothing else; and their own position ids: a token has the position of its sequence, not
of the row.

That needs an architecture with position ids, a custom mask and a cache of plain keys and values. Recurrent layers, ALiBi or
flash attention have not all of these; there every sequence is a row of its own. Which way works is tested on the longest
sequence: the tree must give the log-probabilities of the plain forward pass.
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
"""Tokens of the second sequence in the tree of that test."""
_BOOLEAN_MASK_ATTENTION = ("sdpa", "prefix")
"""Attention implementations with boolean masks; all others get additive ones."""


class TokenScores(NamedTuple):
    """Arrays of shape (A,): the number of an answer, its `log p` in nats, and whether it is the argmax."""

    slot: np.ndarray
    log_p: np.ndarray
    greedy: np.ndarray


class _TrunkCacheLayer(DynamicLayer):
    """A layer's read-only keys and values of a trunk, (1, H, P, C), shared by all rows of all batches."""

    def __init__(self, keys: Tensor | None, values: Tensor | None) -> None:
        super().__init__()
        if keys is None or values is None:
            raise TypeError("a layer without its own keys")
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_options: Any) -> tuple[Tensor, Tensor]:
        """The trunk's keys and values before the rows' own, (B, H, P + T, C); nothing is stored."""
        assert self.keys is not None
        assert self.values is not None
        rows = len(key_states)
        key, value = (old.expand(rows, -1, -1, -1) for old in (self.keys, self.values))
        return torch.cat([key, key_states], 2), torch.cat([value, value_states], 2)


class DecoderScorer:
    """A decoder and its batches: trees on shared trunks where that works and saves tokens, else single sequences."""

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
        if self.uses_trees:  # the trunk of the test is prefilled already, so its batches come first
            self.batches = sorted(shared, key=lambda batch: batch.trunk is not self.probed_trunk)
        else:
            self.batches = build_single_batches(branches, batch_tokens)
        self.tokens_read = count_tokens(self.batches)

    def _trees_agree(self, branch: Branch, shared: Sequence[TreeBatch]) -> bool:
        """Whether a sequence has the same scores in a tree as in a plain row. The longest one tests every attention window."""
        trunk = next(batch.trunk for batch in shared if any(branch.slot in row.slot_A for row in batch.rows))
        ids = branch.ids[: len(trunk) or branch.context_length // 2]
        # A second sequence before it in the row shows whether the mask or the position ids are ignored.
        other = Branch(np.append(ids, branch.ids[len(ids) :][:_PROBE_TOKENS][::-1]), len(ids) + 1, (), 0)
        try:
            self.trunk = self._prefill_trunk(ids)
            tree = self._score_trees(TreeBatch(ids, (build_tree([other, branch], len(ids)),)), self.trunk).log_p
            (single,) = build_single_batches([branch], len(branch.ids))
            plain = self._score_rows(single).log_p
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError):
            return False
        if len(trunk):
            self.probed_trunk = trunk
        dtype = next(self.model.parameters()).dtype
        error = np.abs(tree - plain)
        return bool((error <= torch.finfo(dtype).eps ** 0.5 * np.maximum(1, np.abs(plain))).all())

    def __len__(self) -> int:
        return len(self.batches)

    def prepare(self, batch_numbers: Sequence[int], own_number: int) -> None:
        """Prefill the trunk of the batch `own_number`.

        A rank without a trunk runs a forward pass over one token when other ranks prefill, as sharded models need.
        """
        if all(self.batches[number].trunk is self.probed_trunk for number in batch_numbers):
            return
        self.trunk, self.probed_trunk = None, None
        if any(len(self.batches[number].trunk) for number in batch_numbers):
            trunk = self.batches[own_number].trunk
            cache = self._prefill_trunk(trunk if len(trunk) else np.array([self.pad]))
            self.trunk = cache if len(trunk) else None

    def shares_trunk(self, a: int, b: int) -> bool:
        """Whether two batches have the same trunk."""
        return self.batches[a].trunk is self.batches[b].trunk

    def score_batch(self, number: int) -> TokenScores:
        """The answers of a batch, whose trunk has been prefilled."""
        batch = self.batches[number]
        return self._score_trees(batch, self.trunk) if self.uses_trees else self._score_rows(batch)

    def _prefill_trunk(self, trunk: np.ndarray) -> Cache | None:
        """Keys and values of a trunk (P,); None for an empty one."""
        if not len(trunk):
            return None
        ids = torch.from_numpy(trunk)[None].to(self._device)
        cache = DynamicCache()  # without a configuration it keeps all keys, also of sliding-window layers
        positions = torch.arange(len(trunk), device=ids.device)[None]
        self.model(input_ids=ids, position_ids=positions, past_key_values=cache)
        layers = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
        if len(layers) < len(cache.layers):
            raise TypeError("a cache of more than keys and values")
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
        """A plain causal forward pass; padding is on the right, where causal attention does not look."""
        ids_BT = torch.from_numpy(pad_rows(batch.rows, batch.width, 0, self.pad)[0]).to(self._device)
        output = self.model(input_ids=ids_BT)
        return score_rows(output.hidden, output.head, batch.rows)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def score_rows(hidden_BTD: Tensor, head: OutputHead | None, rows: Sequence[TreeRow]) -> TokenScores:
    """`log p` of each row's answers, given hidden states; logits are computed only at their sources, and in chunks."""
    width, device = hidden_BTD.shape[1], hidden_BTD.device
    source_A = np.concatenate([row.source_A + i * width for i, row in enumerate(rows)])
    target_A = torch.from_numpy(np.concatenate([row.target_A for row in rows])).to(device)
    positions, of_A = np.unique(source_A, return_inverse=True)
    hidden_ND = hidden_BTD.flatten(0, 1)[torch.from_numpy(positions).to(device)]
    logits = head.logits if head else torch.nn.Identity()
    step = max(1, _LOGITS_AT_ONCE // (head.weight_VD.shape[0] if head else hidden_ND.shape[-1]))
    log_p_A, greedy_A = np.empty(len(of_A)), np.empty(len(of_A), bool)
    for begin in range(0, len(positions), step):
        logits_NV = logits(hidden_ND[begin : begin + step]).float()
        chunk = np.flatnonzero((of_A >= begin) & (of_A < begin + step))
        rows_M = torch.from_numpy(of_A[chunk] - begin).to(device)
        target_M = target_A[torch.from_numpy(chunk).to(device)]
        log_p = logits_NV[rows_M, target_M] - logits_NV.logsumexp(-1)[rows_M]
        log_p_A[chunk] = log_p.double().cpu().numpy()
        greedy_A[chunk] = (logits_NV.argmax(-1)[rows_M] == target_M).cpu().numpy()
    return TokenScores(np.concatenate([row.slot_A for row in rows]), log_p_A, greedy_A)


def pad_rows(
    rows: Sequence[TreeRow], width: int, trunk_length: int, pad: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, positions and ends of rows, of shape (B, T). A padding token is visible to itself alone."""
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
    """The mask (B, 1, T, P + T), or one for each type of layer where some have a sliding window.

    Token q of a row sees the trunk, and token k of the row when k <= q < end[k] (`token_tree`). Tokens of a prefix that is read
    bidirectionally all see each other. A window counts positions of the sequence, so it is applied to depths, not to row
    indices.
    """
    config: Any = model.pretrained.config.get_text_config()
    index_T = torch.arange(depth_BT.shape[1], device=depth_BT.device)
    visible_BTT = (index_T[:, None] >= index_T) & (index_T[:, None] < end_BT[:, None, :])
    in_prefix_BT = index_T < prefix_B[:, None]
    visible_BTT |= in_prefix_BT[:, :, None] & in_prefix_BT[:, None, :]
    visible_BTK = torch.nn.functional.pad(visible_BTT, (trunk_length, 0), value=True)
    window = getattr(config, "sliding_window", None)
    if not window or depth_BT.max() < window:
        return _attention_mask(model, visible_BTK)
    if in_prefix_BT.any():
        raise ModelError(
            f"a question has {int(depth_BT.max()) + 1:,} tokens, and the attention window of this model is {window:,}",
            where="model",
            expected="questions within the window: beyond it attention over the prefix is not bidirectional",
        )
    trunk_depth = torch.arange(trunk_length, device=depth_BT.device).expand(len(depth_BT), -1)
    far_BTK = depth_BT[:, :, None] - torch.cat([trunk_depth, depth_BT], 1)[:, None] >= window
    masks = {
        "full_attention": _attention_mask(model, visible_BTK),
        "sliding_attention": _attention_mask(model, visible_BTK & ~far_BTK),
    }
    layer_types = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    return masks if len(layer_types) > 1 else masks[layer_types.pop()]


def _attention_mask(model: CausalModel, visible_BTK: Tensor) -> Tensor:
    if model.pretrained.config._attn_implementation in _BOOLEAN_MASK_ATTENTION:
        return visible_BTK[:, None]
    dtype = next(model.parameters()).dtype
    added = torch.zeros(visible_BTK.shape, dtype=dtype, device=visible_BTK.device)
    return added.masked_fill(~visible_BTK, torch.finfo(dtype).min)[:, None]
