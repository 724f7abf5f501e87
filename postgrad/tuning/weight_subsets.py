"""Which of the base's own weights move, and which stay?

Every kind here trains weights that the base has, in place, and adds none: all of them (`Full`), the task layer (`Head`),
some blocks (`Blocks`), the biases (`Bias`) or the normalisations (`Norm`). What they leave is a plain model; once its
weights have moved there is no base to switch back to.

Constructors take `seed` and `tokenizer` because every kind is made the same way; nothing here draws or tokenizes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from postgrad.errors import TuningError, suggest_nearest
from postgrad.tuning.parameter_location import (
    block_distances,
    get_parameter,
    head_parameters,
    locate_parameter,
    parameter_distances,
    task_layer_parameters,
)
from postgrad.tuning.tuning import Tuning, TuningExport, copy_state, freeze, trainable_parameters, unfreeze
from postgrad.tuning.untie_embeddings import UntieResult, tied_to, untie_output


class WeightSubset(Tuning):
    """Some of the base's own weights move, the others stay."""

    additive = False
    has_exact_merge = True
    is_merged_on_export = True

    def __init__(
        self,
        model: PreTrainedModel,
        parameter_names: Iterable[str],
        *,
        also_train: Sequence[str] = (),
        layer_decay: float = 1.0,
        options: Mapping[str, Any],
    ) -> None:
        """Let the parameters named in `moving`, those that patterns of `also_train` match, and no others move.

        Raises `TuningError` when a pattern matches nothing, or nothing is left to move.
        """
        super().__init__(model)
        self.options = {"kind": self.kind, **options}
        self.rate_factors = _decay_factors(model, layer_decay)
        self._initial_requires_grad = [
            (locate_parameter(model, name), p.requires_grad) for name, p in model.named_parameters()
        ]
        chosen = {*parameter_names, *unfreeze(model, also_train)}
        freeze(model)
        for name, parameter in model.named_parameters():
            if name in chosen:
                _require_floating_point(name, parameter).requires_grad_(True)
        self.locations = {name: locate_parameter(model, name) for name in trainable_parameters(model)}

    def state(self) -> dict[str, Tensor]:
        """Every weight that moves, by its name in the model."""
        return {name: get_parameter(place).detach() for name, place in self.locations.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave. Raises `TuningError` when names or shapes are not mine."""
        copy_state(self.state(), state, self.kind)

    def detach(self) -> None:
        """Let every weight be as trainable as it was before; their values are the model's now."""
        for place, moved in self._initial_requires_grad:
            get_parameter(place).requires_grad_(moved)

    def merge(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Detach: the weights are plain ones already."""
        self.detach()

    def export(self) -> TuningExport:
        """The weights that move, and how they were chosen."""
        return TuningExport(self.options, self.state())

    def rate_factor(self, name: str) -> float:
        """`layer_decay` to the power of the distance from the top, as `distances` counts it."""
        return self.rate_factors.get(name, 1.0)


class FullFinetuning(WeightSubset):
    """Fine-tuning of all weights.

    With `layer_decay` below 1 the rate falls from the top down: 1 at the head, `layer_decay` at the top block,
    `layer_decay ** (L + 1)` at the embeddings of a stack of L blocks (layer-wise rate decay: ELECTRA, arXiv 2003.10555,
    appendix B; BEiT, arXiv 2106.08254; the exponent is L + 1 - layer, the embeddings being layer 0 and the head L + 1).
    """

    kind = "full"
    is_full = True

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        layer_decay: float = 1.0,
        seed: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        everything = [name for name, _ in model.named_parameters()]
        super().__init__(model, everything, layer_decay=layer_decay, options={"layer_decay": layer_decay})
        if self.rate_factors:
            self.notes += _tied_notes(model, "its rate is that of the embeddings, the lowest")


class HeadFinetuning(WeightSubset):
    """Lightweight tuning: the backbone is frozen, the task layer moves.

    The task layer is what stands on the backbone: a classifier, or a language model's output embedding with whatever it has
    before it (the transform of a masked one). `heads` names it by patterns instead. A tied output embedding is refused, as
    all of the input embedding would move with it, unless `untie` makes it a weight of its own first.
    """

    kind = "head"

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        untie: bool = False,
        heads: Sequence[str] = (),
        also_train: Sequence[str] = (),
        seed: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Raises `TuningError` when there is no task layer, or it is a tied output embedding and `untie` is not asked for."""
        untied = untie_output(model) if untie else UntieResult([], set())
        found = [] if heads else [name for name in _task_layer_names(model) if name not in untied.unused_parameters]
        options = {"untie": untie, "heads": list(heads), "also_train": list(also_train)}
        super().__init__(model, found, also_train=[*heads, *also_train], options=options)
        self.notes += untied.notes


class BlockFinetuning(WeightSubset):
    """Some blocks move, the others stay.

    Which ones is said by exactly one of `last` (that many from the top of each stack), `all_but_first` (all but that many at
    the bottom of each stack) and `targets` (patterns such as `decoder.block.3` or `*layers.1?`). `head` adds what stands
    behind the blocks (final norm, pooler, task layer; not a tied output embedding), `embeddings` what stands before them.

    With `unfreeze_every` steps they thaw from the top, one more every so many steps: first a task's own layer alone, then
    block by block (in an encoder-decoder one of each stack at a time), at last the embeddings (gradual unfreezing, ULMFiT,
    arXiv 1801.06146, section 3.3). A language model's head is no newcomer and thaws with the top block. `layer_decay` is as
    in `Full`; ULMFiT's own is 1 / 2.6 (section 3.2).
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
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Raises `TuningError` when the blocks are said in no way, in two ways, or are not there."""
        if unfreeze_every is not None and unfreeze_every < 1:
            raise TuningError(
                f"unfreeze_every is {unfreeze_every}", where="tuning.unfreeze_every", expected="at least 1 step"
            )
        blocks = block_distances(model)
        chosen = _select_blocks(blocks, last, all_but_first, targets)
        # 0 is what stands behind the blocks; of what is left, all that is in no block stands before them.
        moving = {
            name: distance
            for name, distance in parameter_distances(model).items()
            if (_is_inside(name, chosen) if _is_inside(name, blocks) else head if distance == 0 else embeddings)
        }
        super().__init__(
            model,
            moving,
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
        first = (
            0
            if any(name in self.locations for name in task_layer_parameters(model))
            else min(chosen.values(), default=0)
        )
        place = {name: max(first, moving.get(name, 0)) for name in self.locations}
        order = sorted(set(place.values()))
        self._unfreeze_order = {name: order.index(distance) for name, distance in place.items()}
        if head and not embeddings:
            self.notes += _tied_notes(model, "it stays frozen with the embeddings")

    def on_step_begin(self, step: int) -> None:
        """Thaw what is due at this step (counted from 1), freeze what is not."""
        if self.unfreeze_every is not None:
            for name, place in self.locations.items():
                get_parameter(place).requires_grad_(step > self._unfreeze_order[name] * self.unfreeze_every)


class BitFit(WeightSubset):
    """BitFit: only biases move, and a task's own layer (Ben Zaken et al. 2021, arXiv 2106.10199).

    `targets` are patterns that limit which: the paper's smaller variant moves those of the queries and of the feed-forward
    layers' first half only (section 3). `also_train` names other parameters that move with them.
    """

    kind = "bias"

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        targets: Sequence[str] = ("*",),
        also_train: Sequence[str] = (),
        seed: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Raises `TuningError` for a backbone without such biases, as most recent decoders are."""
        task, behind = task_layer_parameters(model), head_parameters(model)
        biases = [name for name, _ in model.named_parameters() if name.endswith("bias")]
        found = [name for name in biases if any(fnmatchcase(name, pattern) for pattern in targets)]
        if all(name in behind for name in found):
            raise TuningError(
                f"the backbone of {type(model).__name__} has no biases"
                + ("" if list(targets) == ["*"] else f" that match {list(targets)}"),
                where="tuning",
                expected="a backbone with biases, such as BERT, RoBERTa, GPT-2, OPT or Qwen2",
                hint="norm moves about as few weights; head, blocks, full and lora work on every model",
            )
        super().__init__(
            model,
            [*found, *task],
            also_train=also_train,
            options={"targets": list(targets), "also_train": list(also_train)},
        )


class NormFinetuning(WeightSubset):
    """Only normalisation layers move, and a task's own layer.

    Tuning gains and shifts alone is near full fine-tuning on many tasks (Qi et al. 2022, arXiv 2211.08682; for a reader of
    other modalities Lu et al. 2021, arXiv 2103.05247). `also_train` names other parameters that move with them.
    """

    kind = "norm"
    norm_classes: ClassVar[tuple[type[nn.Module], ...]] = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        also_train: Sequence[str] = (),
        seed: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Raises `TuningError` for a model whose normalisations have no weights."""
        found = [
            f"{name}.{leaf}"
            for name, module in model.named_modules()
            if isinstance(module, self.norm_classes) or re.search("Norm(?![a-z])", type(module).__name__)
            for leaf, _ in module.named_parameters(recurse=False)
        ]
        if not found:
            raise TuningError(
                f"{type(model).__name__} has no normalisation with weights",
                where="tuning",
                expected="LayerNorm or RMSNorm layers with gains",
                hint="head, blocks, full and lora work on every model",
            )
        super().__init__(
            model,
            [*found, *task_layer_parameters(model)],
            also_train=also_train,
            options={"also_train": list(also_train)},
        )


def _require_floating_point(name: str, parameter: nn.Parameter) -> nn.Parameter:
    if not parameter.is_floating_point():
        raise TuningError(
            f"{name} is held in {str(parameter.dtype).removeprefix('torch.')}, which no gradient can move",
            where="tuning",
            expected="a model in full precision",
            hint="lora trains beside quantised weights",
        )
    return parameter


def _decay_factors(model: PreTrainedModel, layer_decay: float) -> dict[str, float]:
    """The rate factor of every parameter; none where nothing decays. Raises `TuningError` outside of (0, 1]."""
    if not 0 < layer_decay <= 1:
        raise TuningError(
            f"layer_decay is {layer_decay}", where="tuning.layer_decay", expected="more than 0 and at most 1"
        )
    return (
        {}
        if layer_decay == 1
        else {name: layer_decay**distance for name, distance in parameter_distances(model).items()}
    )


def _task_layer_names(model: PreTrainedModel) -> list[str]:
    """What stands on the backbone. Raises `TuningError` when nothing does, or some of it is tied to the backbone."""
    names = head_parameters(model)
    if not names:
        raise TuningError(
            f"{type(model).__name__} has no task layer", where="tuning", expected="a model with a head for its task"
        )
    for name in names:
        table = tied_to(model, name)
        if table is not None and table not in names:
            raise TuningError(
                f"{name} is tied to {table}, so that all of the input embedding would move with it",
                where="tuning",
                hint="untie: true makes it a weight of its own; or tune with blocks, norm or lora",
            )
    return names


def _tied_notes(model: PreTrainedModel, consequence: str) -> list[str]:
    """A sentence about a language model's tied output embedding, where there is one."""
    tied = [(name, tied_to(model, name)) for name in head_parameters(model)]
    pairs = [(name, table) for name, table in tied if table is not None and table not in head_parameters(model)]
    return [f"{name} is tied to {table}: {consequence}" for name, table in pairs]


def _select_blocks(
    blocks: Mapping[str, int], last: int | None, all_but_first: int | None, names: Sequence[str]
) -> dict[str, int]:
    """The blocks that move, with their distances from the top. Raises `TuningError` when they are not said in one way."""
    if [last is not None, all_but_first is not None, bool(names)].count(True) != 1:
        raise TuningError(
            "which blocks move is not said in one way",
            where="tuning",
            expected="exactly one of last, all_but_first and names",
        )
    if names:
        return _named_blocks(blocks, names)
    depth = max(blocks.values())
    if last is not None:
        if not 1 <= last <= depth:
            raise TuningError(f"last is {last}", where="tuning.last", expected=f"1 to {depth}, as many as there are")
        return {name: distance for name, distance in blocks.items() if distance <= last}
    assert all_but_first is not None
    if not 0 <= all_but_first <= depth:  # all but all of them: what stands around the blocks moves alone
        raise TuningError(f"all_but_first is {all_but_first}", where="tuning.all_but_first", expected=f"0 to {depth}")
    return {name: d for name, d in blocks.items() if int(name.rpartition(".")[2]) >= all_but_first}


def _named_blocks(blocks: Mapping[str, int], patterns: Sequence[str]) -> dict[str, int]:
    """The blocks whose names, or ends of names, match a pattern. Raises `TuningError` when one matches none."""
    chosen: dict[str, int] = {}
    for pattern in patterns:
        met = {n: d for n, d in blocks.items() if fnmatchcase(n, pattern) or fnmatchcase(n, f"*.{pattern}")}
        if not met:
            raise TuningError(
                f"'{pattern}' matches no block",
                where="tuning.targets",
                expected=f"names such as {', '.join(list(blocks)[-2:])}",
                hint=suggest_nearest(pattern, blocks),
            )
        chosen.update(met)
    return {name: d for name, d in blocks.items() if name in chosen}


def _is_inside(name: str, modules: Iterable[str]) -> bool:
    """Whether a parameter is in one of these modules."""
    return any(name.startswith(f"{module}.") for module in modules)
