"""Move only what speaks up: of each linear layer, the rows whose outputs on the step's text are the largest (MIGU).

Du et al. 2024 (arXiv 2406.17245): outputs of a layer have another profile for other tasks, so updates that keep to the rows
which are large on a text leave those alone that other texts need. Of a layer with the outputs h of O numbers,

    n_o = mean over tokens of |h_o| / sum_o' |h_o'|         the rows o of the largest n_o move

over all tokens of the step, whatever its micro-batches and ranks; padding does not count. The paper's share is 30 %. Biases
go with their rows. What is not a linear layer of a block or a tuning moves whole: norms, the input embedding, the head.
The authors mask gradients, after which momentum and decay still move the rows; here such rows stay, and the moments see
every gradient.

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
"""Outputs that are all zero say nothing."""
_DECODER_LENGTH = 3
"""Tokens that the decoder is given when it is looked which layers read them: fewer than the encoder's."""


@dataclass
class _TrackedLayer:
    """A linear layer whose weight moves, its masters, and how large its outputs were since the last update."""

    output_module: nn.Module
    """The module whose outputs are those of the rows: for a low-rank B, the layer that it is a part of."""
    weight: Tensor
    bias: Tensor | None
    transposed: bool
    sums_O: Tensor
    is_decoder_side: bool = False
    """Whether it reads what a decoder is given, in a model that has an encoder too."""

    @property
    def masters(self) -> list[Tensor]:
        """Those that it has."""
        return [m for m in (self.weight, self.bias) if m is not None]


class MiguMask(SparseMask):
    """Of each linear layer of the blocks moves `share` of its rows, those of the largest outputs."""

    def __init__(self, share: float, model: Model, weights: Sequence[Weight]) -> None:
        """Listens to the layers of `model` from now on; to be made before its blocks are compiled."""
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
        moved = sum(top * (m.numel() // len(layer.sums_O)) for layer, top in rows for m in layer.masters)
        return moved + sum(m.numel() for m in self.dense_masters)

    @contextmanager
    def observe(self, batch: Batch) -> Iterator[None]:
        self._token_masks = _compute_token_masks(batch)
        try:
            yield
        finally:
            self._token_masks = None  # the backward pass may compute outputs again, and they were heard already

    def masks(self, masters: Sequence[Tensor], states: OptimizerStates) -> list[Tensor]:
        if not masters:
            return []
        sums = sum_over_ranks(torch.cat([layer.sums_O for layer in self.layers]), self.layers[0].weight)
        sizes = list(sums.split([len(layer.sums_O) for layer in self.layers]))
        top = top_k_masks(sizes, [share_count(self.share, len(size)) for size in sizes], sizes)
        masks: dict[int, Tensor] = {}
        for layer, size, top_O in zip(self.layers, sizes, top, strict=True):
            rows_O = top_O & (size > 0)  # an expert that nothing was sent to has said nothing
            for master in layer.masters:
                along = rows_O if master.ndim == 1 or layer.transposed else rows_O[:, None]
                masks[id(master)] = local_shard_like(along.expand(master.shape), master)
            layer.sums_O.zero_()
        return [masks[id(master)] for master in masters]

    def _make_hook(self, layer: _TrackedLayer) -> Callable[[nn.Module, object, Tensor], None]:
        def hear(_module: nn.Module, _given: object, output: Tensor) -> None:
            if self._token_masks is not None:
                sizes = output.detach().abs().float()
                tokens = _align_token_mask(self._token_masks[layer.is_decoder_side], sizes)
                each_N = (tokens / sizes.sum(-1).clamp(min=_EPS)).flatten()
                layer.sums_O.add_(each_N @ sizes.flatten(0, -2))

        return hear


def _track_layers(model: Model, weights: Sequence[Weight]) -> list[_TrackedLayer]:
    """The linear layers of the blocks, and the parts of low-rank ones, whose weights move."""
    masters = {id(w.parameter): w.master for w in weights}
    out = []
    for found in linear_layers(model.pretrained):
        for name, part in found.module.named_modules() if found.is_targetable else ():
            weight = masters.get(id(getattr(part, "weight", None)))
            if weight is None or not isinstance(part, nn.Linear | Conv1D):
                continue
            transposed = is_transposed(part)
            heard = part if name.startswith("lora_A.") else found.module
            rows_O = torch.zeros(weight.shape[1 if transposed else 0], device=weight.device)
            out.append(_TrackedLayer(heard, weight, masters.get(id(part.bias)), transposed, rows_O))
    return out


def _find_decoder_layers(model: Model, layers: Sequence[_TrackedLayer]) -> None:
    """Look which layers of an encoder-decoder have as many positions as the decoder: some of its own read the encoder."""
    tokens = make_probe_inputs(model.pretrained)
    tokens["decoder_input_ids"] = tokens["decoder_input_ids"][:, :_DECODER_LENGTH]
    lengths: dict[nn.Module, int] = {}

    def see(module: nn.Module, _given: object, output: Tensor) -> None:
        lengths[module] = output.shape[-2]

    handles = [layer.output_module.register_forward_hook(see) for layer in layers]
    with eval_mode(model), torch.no_grad():
        model(**tokens)
    reshard(model)
    for handle in handles:
        handle.remove()
    for layer in layers:
        layer.is_decoder_side = lengths.get(layer.output_module) == _DECODER_LENGTH


def _compute_token_masks(batch: Batch) -> tuple[Tensor, Tensor]:
    """Which positions hold tokens of rows that are trained, of shape (B, T): those that are read, and a decoder's own.

    Where no mask tells padding, it is what stands behind a row's last label.
    """
    trained_B1 = torch.from_numpy(batch.label_count_B > 0).to(batch.labels.device)[:, None]
    mask_BT = batch.inputs.get("attention_mask")
    if batch.labels.ndim < 2 or batch.labels.is_floating_point():
        assert mask_BT is not None
        return mask_BT.bool() & trained_B1, mask_BT.bool() & trained_B1
    behind_BT = (batch.labels != IGNORED).flip(1).cummax(1).values.flip(1)
    return behind_BT if mask_BT is None else mask_BT.bool() & trained_B1, behind_BT


def _align_token_mask(tokens_BT: Tensor, sizes: Tensor) -> Tensor:
    """Which of a layer's outputs count. Virtual tokens stand before a row's; of outputs of no known place all count."""
    leading = sizes.shape[:-1]
    if leading.numel() == tokens_BT.numel():
        return tokens_BT.reshape(leading)
    if len(leading) == 2 and leading[0] == len(tokens_BT) and leading[1] > tokens_BT.shape[1]:
        return nn.functional.pad(tokens_BT, (leading[1] - tokens_BT.shape[1], 0), value=True)
    return tokens_BT.new_ones(leading)
