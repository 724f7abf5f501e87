"""Drift: how far a model's predictions, layer outputs and weights are from those of the model it was trained from.

Legend: B rows, T positions, P labelled positions, V tokens (or classes), W rows in all, L layers, D width.

A loss can stay the same while predictions change. Four measures of that on the same text, before and after:

    KL(before || after)     sum_v p(v) ln p(v)/q(v), nats per token: on new text it predicts forgetting (arXiv 2509.04259)
    base cross-entropy      -sum_v p(v) ln q(v): forgetting by the model's own earlier predictions, which needs no labels and no
                            old text (Kalajdzievski 2024, arXiv 2401.05605)
    lost, won               labels that were the top prediction before and are not after, and the reverse
    layers                  the relative change of each block's output and weights
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from postgrad.data.layouts.rows import IGNORED
from postgrad.data.loading.batch import Batch, collate
from postgrad.distributed.shards import full_tensor
from postgrad.evaluation.held_out import HeldOutSet
from postgrad.evaluation.length_batches import length_batches
from postgrad.lineage.record import Interval, SetDrift
from postgrad.models.experts import record_load
from postgrad.models.interpolate import block_parameter_names
from postgrad.models.layers import get_embedding_weight, get_layer_stacks
from postgrad.models.model import Model, Output
from postgrad.stats.bootstrap import ratio_interval

_TOKENS_AT_ONCE = 4096
_LOGITS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Drift:
    """Sums over the labelled positions of each row, the document of each row, and the change of each block's output.

    `relative_change_L`: the 2-norm of the difference over that of the output before; `cosine_L`: mean cosine. NaN where the two
    models' outputs are at different positions.
    """

    document_W: np.ndarray
    tokens_W: np.ndarray
    divergence_W: np.ndarray
    cross_entropy_W: np.ndarray
    correct_W: np.ndarray
    lost_W: np.ndarray
    won_W: np.ndarray
    relative_change_L: np.ndarray
    cosine_L: np.ndarray
    expert_loads: tuple[list[list[float]], list[list[float]]] = ([], [])
    """The shares of the tokens of each expert, by layer, before and after."""

    def summary(self, role: str = "") -> SetDrift:
        """The measures with their 95 % intervals over documents."""
        documents = int(self.document_W.max(initial=-1)) + 1
        tokens = np.bincount(self.document_W, self.tokens_W, documents)

        def mean(sums_W: np.ndarray) -> Interval:
            by_document = np.bincount(self.document_W, sums_W, documents)
            low, high = ratio_interval(by_document, tokens)
            return Interval(value=float(by_document.sum() / max(tokens.sum(), 1)), low=low, high=high)

        return SetDrift(
            role=role,
            tokens=int(tokens.sum()),
            documents=documents,
            kl_divergence=mean(self.divergence_W),
            base_cross_entropy=mean(self.cross_entropy_W),
            accuracy_before=mean(self.correct_W),
            correct_to_wrong=mean(self.lost_W),
            wrong_to_correct=mean(self.won_W),
            relative_output_change=[None if np.isnan(v) else float(v) for v in self.relative_change_L],
            output_cosines=[None if np.isnan(v) else float(v) for v in self.cosine_L],
            expert_load_before=self.expert_loads[0],
            expert_load_after=self.expert_loads[1],
        )


class _PositionMeasures(NamedTuple):
    """The measures of each labelled position."""

    divergence_P: Tensor
    cross_entropy_P: Tensor
    correct_P: Tensor
    lost_P: Tensor
    won_P: Tensor


@torch.no_grad()
def compute_drift(before: Model, after: Model, sets: tuple[HeldOutSet, HeldOutSet], *, context: int) -> Drift:
    """Compare two models on a set; `sets` are the same documents, as rows of either model."""
    rows = list(zip(*(list(held_out.iter_rows(context)) for held_out in sets), strict=True))
    document_W = np.array([piece.document for piece, _ in rows], np.int64)
    sums_W = np.zeros((6, len(rows)))
    layers = _BlockOutputs(before.pretrained, after.pretrained)
    lengths = [max(len(p.row.inputs["input_ids"]) for p in pair) for pair in rows]
    training = before.training, after.training
    before.eval(), after.eval()
    with (
        torch.compiler.set_stance("force_eager"),
        layers.record_outputs(),
        record_load(before.pretrained) as load_before,
        record_load(after.pretrained) as load_after,
    ):
        for part in length_batches(lengths, _TOKENS_AT_ONCE):
            batches = [
                collate([rows[i][side].row for i in part], [0] * len(part), pad_token_id=sets[side].pad).to(
                    _device(model)
                )
                for side, model in enumerate((before, after))
            ]
            load_before.mask_N, load_after.mask_N = (_label_mask(batch) for batch in batches)
            outputs = [model(**batch.model_inputs) for model, batch in zip((before, after), batches, strict=True)]
            layers.add(batches)
            measures, row_P = _compare_outputs(outputs, batches)
            for number, values_P in enumerate((torch.ones_like(measures[0]), *measures)):
                sums_W[number, part] = np.bincount(row_P, values_P.double().cpu().numpy(), len(part))
    before.train(training[0]), after.train(training[1])
    relative_L, cosine_L = layers.compute_changes()
    loads = load_before.shares(), load_after.shares()
    return Drift(document_W, *sums_W, relative_change_L=relative_L, cosine_L=cosine_L, expert_loads=loads)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _label_mask(batch: Batch) -> Tensor:
    return batch.labels != IGNORED


def _compare_outputs(outputs: Sequence[Output], batches: Sequence[Batch]) -> tuple[_PositionMeasures, np.ndarray]:
    """The measures at the labelled positions, and the row of each.

    A soft prompt shifts positions; the labels are the same ones in the same order.
    """
    masks = [_label_mask(batch) for batch in batches]
    labels_P = batches[1].labels[masks[1]]
    hidden = [output.hidden[mask] for output, mask in zip(outputs, masks, strict=True)]
    width = hidden[0].shape[-1] if outputs[0].head is None else outputs[0].head.weight_VD.shape[0]
    rows = max(1, _LOGITS_AT_ONCE // width)
    parts = [
        _compare_logits(
            _logits(outputs[0], hidden[0][i : i + rows]), _logits(outputs[1], hidden[1][i : i + rows]), labels
        )
        for i, labels in zip(range(0, len(labels_P), rows), labels_P.split(rows), strict=True)
    ]
    row_P = masks[1].nonzero()[:, 0].cpu().numpy()
    return _PositionMeasures(*(torch.cat(part) for part in zip(*parts, strict=True))), row_P


def _logits(output: Output, hidden_PD: Tensor) -> Tensor:
    return (hidden_PD if output.head is None else output.head.logits(hidden_PD)).float()


def _compare_logits(before_PV: Tensor, after_PV: Tensor, labels_P: Tensor) -> _PositionMeasures:
    """A grown vocabulary is compared over the tokens that both models have."""
    shared = min(before_PV.shape[-1], after_PV.shape[-1])
    p, q = (torch.log_softmax(logits[:, :shared].double(), -1) for logits in (before_PV, after_PV))
    shares = p.exp()
    # 0 ln 0 = 0
    entropy_P = -(shares * p.masked_fill(shares == 0, 0)).sum(-1)
    crossed_P = -(shares * q.masked_fill(shares == 0, 0)).sum(-1)
    was, now = (logits.argmax(-1) == labels_P for logits in (before_PV, after_PV))
    return _PositionMeasures(crossed_P - entropy_P, crossed_P, was, was & ~now, ~was & now)


class _BlockOutputs:
    """Sums of squares and cosines of both models' block outputs, at the same positions."""

    def __init__(self, before: PreTrainedModel, after: PreTrainedModel) -> None:
        self.stacks = [[block for stack in get_layer_stacks(model) for block in stack] for model in (before, after)]
        # Inserted blocks have no counterpart.
        self.count = len(self.stacks[0]) if len(self.stacks[0]) == len(self.stacks[1]) else 0
        self.outputs: list[dict[int, Tensor]] = [{}, {}]
        self.sums_L4 = np.zeros((self.count, 4))

    @contextmanager
    def record_outputs(self) -> Iterator[None]:
        """Inside, block outputs are recorded until they are added."""
        handles = [
            block.register_forward_hook(self._make_hook(side, number))
            for side, blocks in enumerate(self.stacks)
            for number, block in enumerate(blocks[: self.count])
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _make_hook(self, side: int, number: int) -> Any:
        def record(_module: nn.Module, _inputs: object, output: Any) -> None:
            self.outputs[side][number] = output[0] if isinstance(output, tuple) else output

        return record

    def add(self, batches: Sequence[Batch]) -> None:
        """Compare the recorded outputs of a batch at its labels, or at its tokens where the block is not at the labels'
        positions.
        """
        for number in range(self.count):
            states = [
                self._states_at_labels(outputs.get(number), batch)
                for outputs, batch in zip(self.outputs, batches, strict=True)
            ]
            if states[0] is None or states[1] is None or states[0].shape != states[1].shape:
                continue
            was, now = (state.double() for state in states if state is not None)
            cosine = nn.functional.cosine_similarity(was, now, dim=-1)
            self.sums_L4[number] += [
                float((now - was).square().sum()),
                float(was.square().sum()),
                float(cosine.sum()),
                len(cosine),
            ]
        self.outputs = [{}, {}]

    @staticmethod
    def _states_at_labels(output: Tensor | None, batch: Batch) -> Tensor | None:
        """Outputs of shape (P, D) at the labels, or at all tokens (the encoder of an encoder-decoder)."""
        if output is None or output.ndim != 3:
            return None
        for mask in (_label_mask(batch), batch.inputs.get("attention_mask")):
            if mask is not None and mask.shape == output.shape[:2]:
                return output[mask.bool()]
        return None

    def compute_changes(self) -> tuple[np.ndarray, np.ndarray]:
        """`relative_change_L` and `cosine_L`."""
        squares, sizes, cosines, counts = self.sums_L4.T if self.count else np.zeros((4, 0))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.sqrt(squares / sizes), cosines / counts


class WeightDrift(NamedTuple):
    """The 2-norm of a change of weights over that of the weights, how many numbers differ, and of how many."""

    relative_change: float
    changed_count: int
    total_count: int


def weight_drift(before: PreTrainedModel, after: PreTrainedModel) -> dict[str, WeightDrift]:
    """The drift of each block, the embeddings and the rest; `relative_change` is NaN where the weights were all zero.

    Weights that only one of the models has (a tuning's own, a new task layer) are skipped.
    """
    was, now = (dict(model.named_parameters()) for model in (before, after))
    group = {name: f"block {number}" for number, names in enumerate(block_parameter_names(before)) for name in names}
    table = get_embedding_weight(before)
    sums: dict[str, np.ndarray] = {}
    for name, old in was.items():
        new = now.get(name)
        if new is None or new.shape != old.shape:
            continue
        change, size = new.detach().double() - old.detach().double(), old.detach().double()
        total = sums.setdefault(group.get(name, "embeddings" if old is table else "rest"), np.zeros(4))
        sums_here = change.square().sum(), size.square().sum(), (change != 0).sum()
        total += [*(float(full_tensor(each)) for each in sums_here), old.numel()]
    order = ["embeddings", *(f"block {number}" for number in range(len(block_parameter_names(before)))), "rest"]
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = {name: float(np.sqrt(total[0] / total[1])) for name, total in sums.items()}
    return {name: WeightDrift(relative[name], int(sums[name][2]), int(sums[name][3])) for name in order if name in sums}
