"""Fine-tuning of the base's own weights: all, the task layer, some blocks, the biases, or the norms.

Every kind here trains existing weights in place and adds none. The result is a plain model; once its weights have changed,
there is no base to disable them to.

Constructors take a `seed` because every kind is built by the same call; nothing here is random.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from postgrad.errors import TuningError, suggest_nearest
from postgrad.models.tied_weights import unsaved_names
from postgrad.tuning.parameter_location import (
    SavedRequiresGrad,
    block_distances,
    get_parameter,
    head_parameters,
    is_inside,
    locate_parameter,
    parameter_distances,
    task_layer_parameters,
)
from postgrad.tuning.tuning import Tuning, check_ranges, freeze, trainable_parameters, unfreeze
from postgrad.tuning.untie_embeddings import UntieResult, tied_to, untie_output


class WeightSubset(Tuning):
    """A selection of the base's weights is trained."""

    additive = False
    has_exact_merge = True
    is_merged_on_export = is_plain = True

    def __init__(
        self,
        model: PreTrainedModel,
        parameter_names: Iterable[str],
        *,
        also_train: Sequence[str] = (),
        layer_decay: float = 1.0,
        options: Mapping[str, Any],
    ) -> None:
        """Train `parameter_names`, the parameters that patterns of `also_train` match, and no others.

        Raises `TuningError` if a pattern matches nothing, or nothing is trainable.
        """
        super().__init__(model)
        self.options = options
        self.rate_factors = _decay_factors(model, layer_decay)
        self._requires_grad = SavedRequiresGrad(model)
        selected = {*parameter_names, *unfreeze(model, also_train)} - unsaved_names(model)
        freeze(model)
        for name, parameter in model.named_parameters():
            if name in selected:
                _check_floating_point(name, parameter)
                parameter.requires_grad_(True)
        self.locations = {name: locate_parameter(model, name) for name in trainable_parameters(model)}

    def tensors(self) -> dict[str, nn.Parameter]:
        """Every trained weight, by its name in the model."""
        return {name: get_parameter(location) for name, location in self.locations.items()}

    def freeze_weights(self, names: Iterable[str]) -> None:
        """Leave weights out of the selection. Raises `TuningError` when nothing is left."""
        super().freeze_weights(names)
        self.locations = {name: locate_parameter(self.model, name) for name in trainable_parameters(self.model)}

    def detach(self) -> None:
        """Restore `requires_grad`; the weights keep their trained values."""
        self._requires_grad.restore()

    def merge(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Detach: the weights are plain ones already."""
        self.detach()

    def rate_factor(self, name: str) -> float:
        """`layer_decay` to the power of the distance from the top (see `parameter_distances`)."""
        return self.rate_factors.get(name, 1.0)


class FullFinetuning(WeightSubset):
    """Fine-tuning of all weights.

    With `layer_decay` below 1 the learning rate falls from the top down: factor 1 at the head, `layer_decay` at the top
    block, `layer_decay ** (L + 1)` at the embeddings of a stack of L blocks (layer-wise decay: ELECTRA, arXiv 2003.10555,
    appendix B; BEiT, arXiv 2106.08254; the exponent is L + 1 - layer, with the embeddings as layer 0, the head as L + 1).
    """

    kind = "full"
    is_full = True

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        layer_decay: float = 1.0,
        seed: int = 0,
    ) -> None:
        names = [name for name, _ in model.named_parameters()]
        super().__init__(model, names, layer_decay=layer_decay, options={"layer_decay": layer_decay})
        if self.rate_factors:
            self.notes += _tied_notes(model, "its rate is that of the embeddings, the lowest")


class HeadFinetuning(WeightSubset):
    """Only the task layer is trained; the backbone is frozen.

    The task layer is a classifier, or a language model's output embedding with the layers before it (a masked language
    model's transform). A tied output embedding is an error, as all of the input
    embedding would be trained with it, unless `untie` makes it a weight of its own first.
    """

    kind = "head"

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        untie: bool = False,
        also_train: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        """Raises `TuningError` if there is no task layer, or it is a tied output embedding and `untie` is False."""
        untied = untie_output(model) if untie else UntieResult([], set())
        names = [name for name in _task_layer_names(model) if name not in untied.unused_parameters]
        options = {"untie": untie, "also_train": list(also_train)}
        super().__init__(model, names, also_train=also_train, options=options)
        self.notes += untied.notes


class BlockFinetuning(WeightSubset):
    """Some blocks are trained, the others are frozen.

    Exactly one of `last` (that many from the top of each stack), `all_but_first` (all but that many at the bottom of each
    stack) and `targets` (patterns such as `decoder.block.3` or `*layers.1?`) selects the blocks. `head` adds the modules after
    them (final norm, pooler, task layer; not a tied output embedding), `embeddings` those before them.

    With `unfreeze_every` N, one group is unfrozen every N steps from the top down: first a task's own layer alone, then
    block by block (in an encoder-decoder one of each stack at a time), the embeddings last (gradual unfreezing, ULMFiT,
    arXiv 1801.06146, section 3.3). A language model's head is pretrained, and is unfrozen with the top block. `layer_decay`
    is as in `FullFinetuning`; ULMFiT's own is 1 / 2.6 (section 3.2).
    """

    kind = "blocks"

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        last: int | None = None,
        all_but_first: int | None = None,
        targets: Sequence[str] = (),
        head: bool = True,
        embeddings: bool = False,
        unfreeze_every: int | None = None,
        layer_decay: float = 1.0,
        also_train: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        """Raises `TuningError` unless exactly one option selects blocks, and for blocks that do not exist."""
        is_step = unfreeze_every is None or unfreeze_every >= 1
        check_ranges({"unfreeze_every": unfreeze_every}, {"unfreeze_every": (is_step, "at least 1 step")})
        blocks = block_distances(model)
        selected = _select_blocks(blocks, last, all_but_first, targets)
        distances = {
            name: distance
            for name, distance in parameter_distances(model).items()
            # Outside of the blocks, a distance of 0 is after them, any other before them.
            if (is_inside(name, selected) if is_inside(name, blocks) else head if distance == 0 else embeddings)
        }
        super().__init__(
            model,
            distances,
            also_train=also_train,
            layer_decay=layer_decay,
            options={
                "last": last,
                "all_but_first": all_but_first,
                "targets": list(targets),
                "head": head,
                "embeddings": embeddings,
                "unfreeze_every": unfreeze_every,
                "layer_decay": layer_decay,
                "also_train": list(also_train),
            },
        )
        self.unfreeze_every = unfreeze_every
        # A new task layer is unfrozen alone; without one, what is above the selected blocks joins the topmost of them.
        has_task_layer = any(name in self.locations for name in task_layer_parameters(model))
        first = 0 if has_task_layer else min(selected.values(), default=0)
        group_distances = {name: max(first, distances.get(name, 0)) for name in self.locations}
        order = sorted(set(group_distances.values()))
        self._unfreeze_order = {name: order.index(distance) for name, distance in group_distances.items()}
        if head and not embeddings:
            self.notes += _tied_notes(model, "it stays frozen with the embeddings")

    def on_step_begin(self, step: int) -> None:
        """Unfreeze the groups due at this step (from 1), and freeze the others."""
        if self.unfreeze_every is not None:
            for name, parameter in self.tensors().items():
                parameter.requires_grad_(step > self._unfreeze_order[name] * self.unfreeze_every)


class BitFit(WeightSubset):
    """BitFit: only biases and a task's own layer are trained (Ben Zaken et al. 2021, arXiv 2106.10199).

    `targets` are patterns that restrict the biases: the paper's smaller variant trains those of the queries and of the first
    feed-forward projections only (section 3). `also_train`: patterns of further parameters.
    """

    kind = "bias"

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        targets: Sequence[str] = ("*",),
        also_train: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        """Raises `TuningError` for a backbone without matching biases; most recent decoders have none."""
        head = head_parameters(model)
        biases = [name for name, _ in model.named_parameters() if name.endswith("bias")]
        selected = [name for name in biases if any(fnmatchcase(name, pattern) for pattern in targets)]
        if all(name in head for name in selected):
            raise TuningError(
                f"the backbone of {type(model).__name__} has no biases"
                + ("" if list(targets) == ["*"] else f" that match {list(targets)}"),
                where="tuning",
                expected="a backbone with biases, such as BERT, RoBERTa, GPT-2, OPT or Qwen2",
                hint="norm trains about as few weights; head, blocks, full and lora work on every model",
            )
        selected += task_layer_parameters(model)
        super().__init__(
            model, selected, also_train=also_train, options={"targets": list(targets), "also_train": list(also_train)}
        )


class NormFinetuning(WeightSubset):
    """Only normalisation layers and a task's own layer are trained.

    Gains and shifts alone come near full fine-tuning on many tasks (Qi et al. 2022, arXiv 2211.08682; for transfer to other
    modalities Lu et al. 2021, arXiv 2103.05247). `also_train`: patterns of further parameters.
    """

    kind = "norm"
    norm_classes: ClassVar[tuple[type[nn.Module], ...]] = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        also_train: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        """Raises `TuningError` for a model whose normalisation layers have no weights."""
        selected = [
            f"{name}.{local}"
            for name, module in model.named_modules()
            if isinstance(module, self.norm_classes) or re.search("Norm(?![a-z])", type(module).__name__)
            for local, _ in module.named_parameters(recurse=False)
        ]
        if not selected:
            raise TuningError(
                f"{type(model).__name__} has no normalisation layers with weights",
                where="tuning",
                expected="LayerNorm or RMSNorm layers with gains",
                hint="head, blocks, full and lora work on every model",
            )
        super().__init__(
            model,
            [*selected, *task_layer_parameters(model)],
            also_train=also_train,
            options={"also_train": list(also_train)},
        )


def _check_floating_point(name: str, parameter: nn.Parameter) -> None:
    if not parameter.is_floating_point():
        raise TuningError(
            f"{name} is {str(parameter.dtype).removeprefix('torch.')}, which cannot be trained",
            where="tuning",
            expected="a model in full precision",
            hint="lora trains adapters on quantised weights",
        )


def _decay_factors(model: PreTrainedModel, layer_decay: float) -> dict[str, float]:
    """The rate factor of every parameter; empty without decay. Raises `TuningError` outside of (0, 1]."""
    in_range = 0 < layer_decay <= 1
    check_ranges({"layer_decay": layer_decay}, {"layer_decay": (in_range, "more than 0 and at most 1")})
    distances = {} if layer_decay == 1 else parameter_distances(model)
    return {name: layer_decay**distance for name, distance in distances.items()}


def _task_layer_names(model: PreTrainedModel) -> list[str]:
    """The parameters on top of the backbone. Raises `TuningError` if there are none, or some are tied to the backbone."""
    names = head_parameters(model)
    if not names:
        raise TuningError(
            f"{type(model).__name__} has no task layer", where="tuning", expected="a model with a head for its task"
        )
    if tied := _tied_heads(model):
        name, table = tied[0]
        raise TuningError(
            f"{name} is tied to {table}: all of the input embedding would be trained with it",
            where="tuning",
            hint="untie: true makes it a weight of its own; or use blocks, norm or lora",
        )
    return names


def _tied_heads(model: PreTrainedModel) -> list[tuple[str, str]]:
    """Parameters on top of the backbone, each with the weight of the backbone that it is tied to."""
    names = head_parameters(model)
    tied = [(name, tied_to(model, name)) for name in names]
    return [(name, table) for name, table in tied if table is not None and table not in names]


def _tied_notes(model: PreTrainedModel, consequence: str) -> list[str]:
    """A note about a language model's tied output embedding, if there is one."""
    return [f"{name} is tied to {table}: {consequence}" for name, table in _tied_heads(model)]


def _select_blocks(
    blocks: Mapping[str, int], last: int | None, all_but_first: int | None, targets: Sequence[str]
) -> dict[str, int]:
    """The trained blocks with their distances from the top. Raises `TuningError` unless exactly one option is set."""
    if [last is not None, all_but_first is not None, bool(targets)].count(True) != 1:
        raise TuningError(
            "the blocks to train are not uniquely specified",
            where="tuning",
            expected="exactly one of last, all_but_first and targets",
        )
    if targets:
        return _named_blocks(blocks, targets)
    depth = max(blocks.values())
    if last is not None:
        check_ranges({"last": last}, {"last": (1 <= last <= depth, f"1 to {depth}, the number of blocks")})
        return {name: distance for name, distance in blocks.items() if distance <= last}
    assert all_but_first is not None
    # With all of them excluded, only what is around the blocks is trained.
    check_ranges({"all_but_first": all_but_first}, {"all_but_first": (0 <= all_but_first <= depth, f"0 to {depth}")})
    return {name: d for name, d in blocks.items() if int(name.rpartition(".")[2]) >= all_but_first}


def _named_blocks(blocks: Mapping[str, int], patterns: Sequence[str]) -> dict[str, int]:
    """The blocks whose names, or ends of names, match a pattern. Raises `TuningError` if one matches none."""
    selected: set[str] = set()
    for pattern in patterns:
        matches = {n for n in blocks if fnmatchcase(n, pattern) or fnmatchcase(n, f"*.{pattern}")}
        if not matches:
            raise TuningError(
                f"'{pattern}' matches no block",
                where="tuning.targets",
                expected=f"names such as {', '.join(list(blocks)[-2:])}",
                hint=suggest_nearest(pattern, blocks),
            )
        selected |= matches
    return {name: distance for name, distance in blocks.items() if name in selected}
