"""MIGU: a sparse update of the rows of each linear layer with the largest outputs on the step's text.

Du et al. 2024 (arXiv 2406.17245): the magnitudes of a layer's outputs differ between tasks, so updating only the rows that
are large on the new text spares those that other texts use. For a layer with outputs h of size O,

    n_o = mean over tokens of |h_o| / sum_o' |h_o'|         the rows o with the largest n_o are updated

over all tokens of the step, of all micro-batches and ranks, without padding. The paper's share is 30 %. A bias follows its
rows. Weights outside linear layers of blocks or tunings are updated densely: norms, the input embedding, the head. The
authors mask gradients, after which momentum and decay still change the other rows; here those rows stay, and the moments
see every gradient.

Legend: B rows, T positions, N = B T, O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from postgrad.data.layouts.rows import IGNORED
from postgrad.data.loading.batch import Batch
from postgrad.distributed.fsdp import reshard
from postgrad.distributed.shards import local_shard_like, sum_over_ranks
from postgrad.models.model import Model
from postgrad.models.sublayers import eval_mode, make_probe_inputs
from postgrad.optim.optimizer import Weight
from postgrad.optim.sparse_update import OptimizerStates, SparseMask
from postgrad.optim.top_k import share_count, top_k_masks
from postgrad.tuning.targets import is_transposed, linear_layers

_EPS = 1e-30
"""Avoids 0 / 0 for outputs that are all zero."""
_DECODER_LENGTH = 3
"""Decoder tokens of the probe that finds the decoder's layers: fewer than the encoder's."""


@dataclass
class _TrackedLayer:
    """A linear layer with a trainable weight, its masters, and the normalized output magnitudes since the last update."""

    output_module: nn.Module
    """The module whose outputs belong to the rows: for a LoRA B, the layer that contains it."""
    weight: Tensor
    bias: Tensor | None
    transposed: bool
    sums_O: Tensor
    is_decoder_side: bool = False
    """Whether it runs over decoder positions, in an encoder-decoder."""

    @property
    def masters(self) -> list[Tensor]:
        """The weight and, if trained, the bias."""
        return [m for m in (self.weight, self.bias) if m is not None]


class MiguMask(SparseMask):
    """Updates the `share` of each linear layer's rows with the largest outputs."""

    def __init__(self, share: float, model: Model, weights: Sequence[Weight]) -> None:
        """Registers forward hooks on the layers of `model`; construct it before the blocks are compiled."""
        self.layers = _track_layers(model, weights)
        super().__init__([m for layer in self.layers for m in layer.masters], [w.master for w in weights])
        self.share = share
        self._token_masks: tuple[Tensor, Tensor] | None = None
        if model.pretrained.config.is_encoder_decoder:
            _find_decoder_layers(model, self.layers)
        for layer in self.layers:
            layer.output_module.register_forward_hook(self._make_hook(layer))

    @property
    def num_updated(self) -> int:
        rows = [(layer, share_count(self.share, len(layer.sums_O))) for layer in self.layers]
        sparse = sum(count * (m.numel() // len(layer.sums_O)) for layer, count in rows for m in layer.masters)
        return sparse + sum(m.numel() for m in self.dense_masters)

    @contextmanager
    def observe(self, batch: Batch) -> Iterator[None]:
        self._token_masks = _compute_token_masks(batch)
        try:
            yield
        finally:
            self._token_masks = None  # activation checkpointing runs the hooks again in the backward pass

    def masks(self, masters: Sequence[Tensor], states: OptimizerStates) -> list[Tensor]:
        if not masters:
            return []
        sums = sum_over_ranks(torch.cat([layer.sums_O for layer in self.layers]), self.layers[0].weight)
        magnitudes = list(sums.split([len(layer.sums_O) for layer in self.layers]))
        top = top_k_masks(magnitudes, [share_count(self.share, len(m)) for m in magnitudes], magnitudes)
        masks: dict[int, Tensor] = {}
        for layer, magnitude_O, top_O in zip(self.layers, magnitudes, top, strict=True):
            rows_O = top_O & (magnitude_O > 0)  # an expert without tokens has no outputs
            for master in layer.masters:
                mask = rows_O if master.ndim == 1 or layer.transposed else rows_O[:, None]
                masks[id(master)] = local_shard_like(mask.expand(master.shape), master)
            layer.sums_O.zero_()
        return [masks[id(master)] for master in masters]

    def discard(self) -> None:
        super().discard()
        for layer in self.layers:
            layer.sums_O.zero_()

    def _make_hook(self, layer: _TrackedLayer) -> Callable[[nn.Module, object, Tensor], None]:
        def accumulate(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            if self._token_masks is not None:
                magnitudes = output.detach().abs().float()
                tokens = _align_token_mask(self._token_masks[layer.is_decoder_side], magnitudes)
                scale_N = (tokens / magnitudes.sum(-1).clamp(min=_EPS)).flatten()
                layer.sums_O.add_(scale_N @ magnitudes.flatten(0, -2))

        return accumulate


def _track_layers(model: Model, weights: Sequence[Weight]) -> list[_TrackedLayer]:
    """The linear layers of the blocks, and of LoRA adapters in them, with trainable weights."""
    masters = {id(w.parameter): w.master for w in weights}
    out = []
    for layer in linear_layers(model.pretrained):
        for name, part in layer.module.named_modules() if layer.is_targetable else ():
            weight = masters.get(id(getattr(part, "weight", None)))
            if weight is None or not isinstance(part, nn.Linear | Conv1D):
                continue
            transposed = is_transposed(part)
            output_module = part if name.startswith("lora_A.") else layer.module
            rows_O = torch.zeros(weight.shape[1 if transposed else 0], device=weight.device)
            out.append(_TrackedLayer(output_module, weight, masters.get(id(part.bias)), transposed, rows_O))
    return out


def _find_decoder_layers(model: Model, layers: Sequence[_TrackedLayer]) -> None:
    """Mark the layers that run over decoder positions, by a probe: some of the decoder's own layers run over the encoder's."""
    tokens = make_probe_inputs(model.pretrained)
    tokens["decoder_input_ids"] = tokens["decoder_input_ids"][:, :_DECODER_LENGTH]
    lengths: dict[nn.Module, int] = {}

    def record(module: nn.Module, _inputs: object, output: Tensor) -> None:
        lengths[module] = output.shape[-2]

    handles = [layer.output_module.register_forward_hook(record) for layer in layers]
    with eval_mode(model), torch.no_grad():
        model(**tokens)
    reshard(model)
    for handle in handles:
        handle.remove()
    for layer in layers:
        layer.is_decoder_side = lengths.get(layer.output_module) == _DECODER_LENGTH


def _compute_token_masks(batch: Batch) -> tuple[Tensor, Tensor]:
    """Positions with tokens of trained rows, of shape (B, T): of the model's inputs, and of a decoder's.

    Without an attention mask, padding is what follows a row's last label.
    """
    trained_B1 = torch.from_numpy(batch.label_count_B > 0).to(batch.labels.device)[:, None]
    mask_BT = batch.inputs.get("attention_mask")
    if batch.labels.ndim < 2 or batch.labels.is_floating_point():
        assert mask_BT is not None
        return mask_BT.bool() & trained_B1, mask_BT.bool() & trained_B1
    before_padding_BT = (batch.labels != IGNORED).flip(1).cummax(1).values.flip(1)
    return before_padding_BT if mask_BT is None else mask_BT.bool() & trained_B1, before_padding_BT


def _align_token_mask(tokens_BT: Tensor, outputs: Tensor) -> Tensor:
    """The mask of a layer's outputs. Virtual tokens, in front of a row, count; of outputs of unknown shape all count."""
    leading = outputs.shape[:-1]
    if leading.numel() == tokens_BT.numel():
        return tokens_BT.reshape(leading)
    if len(leading) == 2 and leading[0] == len(tokens_BT) and leading[1] > tokens_BT.shape[1]:
        return nn.functional.pad(tokens_BT, (leading[1] - tokens_BT.shape[1], 0), value=True)
    return tokens_BT.new_ones(leading)
