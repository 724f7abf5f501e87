"""How does a model get new blocks that change nothing at first?

Block expansion (LLaMA-Pro, Wu et al. 2024, arXiv 2401.02415, section 3.2): copies of blocks stand between the old ones. A
copy whose writes to the residual stream are zero is the identity, so the model starts as exactly the base; only the copies
are trained. The result is a plain model of the same architecture with a larger depth in its configuration.

No architecture is known by name. How depth is written down, and what a block knows of its place (the index that the cache
goes by, its kind of attention), is read off two empty models that transformers builds from the configuration before and
after.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from postgrad.errors import TuningError
from postgrad.models.sublayers import eval_mode, make_probe_inputs
from postgrad.tuning.extra_trainable import ExtraTrainable
from postgrad.tuning.parameter_location import (
    ParameterLocation,
    get_parameter,
    locate_parameter,
    named_stacks,
    task_layer_parameters,
)
from postgrad.tuning.residual_writers import ModuleCall, find_writers, zero_output
from postgrad.tuning.tuning import Tuning, TuningExport, copy_state, unfreeze

PLAIN_TYPES = (int, float, bool, str, type(None))


class BlockSlot(NamedTuple):
    """A place in a grown stack: the old block that stands there, or that the new one there is a copy of."""

    source_block: int
    is_new: bool


class BlockExpansion(Tuning):
    """New blocks between the old ones, which stay as they are.

    Behind every `every` blocks of a stack (left out: 4, or the next number that divides the depth), or behind the blocks of
    the numbers `positions` (from 0), stand copies of the `blocks` blocks before that place. Every stack grows, unless
    `stacks` names some by patterns (`*decoder*`). A task's own layer moves too, and what patterns of `also_train` match.
    """

    kind = "expand"
    has_exact_merge = True
    is_merged_on_export = True

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        blocks: int = 1,
        every: int | None = None,
        positions: Sequence[int] | None = None,
        stacks: Sequence[str] = (),
        also_train: Sequence[str] = (),
        seed: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Raises `TuningError` when a copy cannot be silent in this architecture, or its folder could not be loaded plainly."""
        super().__init__(model)
        self.options = {
            "kind": self.kind,
            "blocks": blocks,
            "every": every,
            "positions": None if positions is None else list(positions),
            "stacks": list(stacks),
            "also_train": list(also_train),
        }
        plans = {
            name: plan_slots(len(stack), blocks=blocks, every=every, positions=positions)
            for name, stack in named_stacks(model).items()
            if not stacks or any(fnmatchcase(name, pattern) for pattern in stacks)
        }
        if not plans:
            raise TuningError(
                f"no stack of blocks matches {list(stacks)}",
                where="tuning.stacks",
                expected=f"patterns for {', '.join(named_stacks(model))}",
            )
        self._initial_requires_grad = [
            (locate_parameter(model, name), p.requires_grad) for name, p in model.named_parameters()
        ]
        self._disable_depth = 0
        base = _backbone_output(model)
        self._swaps, after = _build_swaps(model, plans)
        _swap_all(self._swaps)
        try:
            _check_loadable(model, after)
            if not torch.equal(_backbone_output(model), base):
                raise _unsupported_error(model, "it answers differently with silent blocks in it")
            fresh = [f"{name}.{i}" for name, slots in plans.items() for i, slot in enumerate(slots) if slot.is_new]
            self._extra_trainable = ExtraTrainable(model, also_train)
            moving = unfreeze(model, [*fresh, *task_layer_parameters(model), *self._extra_trainable.names])
        except TuningError:
            _swap_all(self._swaps)
            raise
        self.locations: dict[str, ParameterLocation] = {name: locate_parameter(model, name) for name in moving}

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Inside, the new blocks are not there, and what `also_train` moved of the base's body is back.

        Raises `TuningError` when they are part of the model by now.
        """
        if not self._swaps:
            raise TuningError("the new blocks were merged or taken out, and cannot be switched off", where="tuning")
        self._disable_depth += 1
        try:
            with self._remove_new_blocks() if self._disable_depth == 1 else nullcontext():
                yield
        finally:
            self._disable_depth -= 1

    @contextmanager
    def _remove_new_blocks(self) -> Iterator[None]:
        # Names of weights are those of the grown model, so values are exchanged while it is there.
        with self._extra_trainable.use_initial_values():
            _swap_all(self._swaps)
            try:
                yield
            finally:
                _swap_all(self._swaps)

    def state(self) -> dict[str, Tensor]:
        """The new blocks' weights (and those that move besides), by their names in the grown model."""
        return {name: get_parameter(place).detach() for name, place in self.locations.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave. Raises `TuningError` when names or shapes are not mine."""
        copy_state(self.state(), state, self.kind)

    def detach(self) -> None:
        """Take the new blocks out; the others have their old values, and are as trainable as they were before."""
        self._extra_trainable.restore_values()
        _swap_all(self._swaps)
        self._release()

    def merge(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Leave the new blocks in: they are plain ones."""
        self._release()

    def _release(self) -> None:
        self._swaps = []
        for place, moved in self._initial_requires_grad:
            get_parameter(place).requires_grad_(moved)

    def export(self) -> TuningExport:
        """The new blocks, and where they stand."""
        return TuningExport(self.options, self.state())


def plan_slots(depth: int, *, blocks: int, every: int | None, positions: Sequence[int] | None) -> list[BlockSlot]:
    """The blocks of a grown stack from the bottom up. Raises `TuningError` for places that there are not."""
    if every is not None and positions is not None:
        raise TuningError("both every and positions are given", where="tuning", expected="one of them, or neither")
    if positions is None:
        step = every if every is not None else next(n for n in range(min(4, depth), depth + 1) if depth % n == 0)
        if step < 1 or depth % step:
            raise TuningError(
                f"{depth} blocks cannot be parted into groups of {step}",
                where="tuning.every",
                expected=f"one of {', '.join(str(n) for n in range(1, depth + 1) if depth % n == 0)}",
                hint="or name the places with positions",
            )
        positions = range(step - 1, depth, step)
    if not positions or len(set(positions)) < len(positions) or not 0 <= min(positions) <= max(positions) < depth:
        raise TuningError(
            f"positions are {list(positions)}",
            where="tuning.positions",
            expected=f"numbers of blocks, 0 to {depth - 1}",
        )
    if not 1 <= blocks <= min(positions) + 1:
        raise TuningError(
            f"blocks is {blocks}",
            where="tuning.blocks",
            expected=f"1 to {min(positions) + 1}, as many as stand before the first place",
        )
    slots: list[BlockSlot] = []
    for i in range(depth):
        slots.append(BlockSlot(i, is_new=False))
        if i in positions:
            slots += [BlockSlot(source, is_new=True) for source in range(i + 1 - blocks, i + 1)]
    return slots


class AttributeSwap:
    """An attribute that has one value with the new blocks and another without them."""

    def __init__(self, owner: object, name: str, value: object) -> None:
        self.owner, self.name, self.value = owner, name, value

    def swap(self) -> None:
        """Give the attribute its other value."""
        now = getattr(self.owner, self.name)
        setattr(self.owner, self.name, self.value)
        self.value = now


def _swap_all(swaps: Sequence[AttributeSwap]) -> None:
    for change in swaps:
        change.swap()


def _build_swaps(
    model: PreTrainedModel, plans: Mapping[str, list[BlockSlot]]
) -> tuple[list[AttributeSwap], PreTrainedModel]:
    """All that has to change for the new blocks to be there (nothing does yet), and what the model has to look like then."""
    before = _empty_model(model, model.config)
    if odd := before.state_dict().keys() ^ model.state_dict().keys():
        raise TuningError(
            f"{type(model).__name__} is not what its configuration makes ({min(odd)})",
            where="tuning",
            expected="a plain model",
            hint="put expand before other tunings, or merge them first",
        )
    after = _empty_model(model, _deepen_config(model, plans))
    writers = find_writers(
        model, {f"{name}.{slot.source_block}" for name, slots in plans.items() for slot in slots if slot.is_new}
    )
    changes = _config_swaps(model, before, after, plans)
    changes += [
        AttributeSwap(model.get_submodule(d.module), d.name, d.after)
        for d in _attribute_differences(before, after, plans)
    ]
    for name, slots in plans.items():
        stack, was, becomes = (m.get_submodule(name) for m in (model, before, after))
        assert (
            isinstance(stack, nn.ModuleList) and isinstance(was, nn.ModuleList) and isinstance(becomes, nn.ModuleList)
        )
        grown: dict[str, nn.Module] = {}
        for i, slot in enumerate(slots):
            old, differences = (
                stack[slot.source_block],
                list(_attribute_differences(was[slot.source_block], becomes[i])),
            )
            if slot.is_new:
                grown[str(i)] = _copy_as_identity(model, old, becomes[i], writers[f"{name}.{slot.source_block}"])
            else:
                grown[str(i)] = old
                _check_same_kind(f"{name}.{slot.source_block}", differences, slot.source_block, i)
            changes += [AttributeSwap(grown[str(i)].get_submodule(d.module), d.name, d.after) for d in differences]
        changes.append(AttributeSwap(stack, "_modules", grown))
    return changes, after


def _empty_model(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """What transformers makes of a configuration, without weights."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(config))


def _deepen_config(model: PreTrainedModel, plans: Mapping[str, list[BlockSlot]]) -> PreTrainedConfig:
    """A configuration that makes stacks of the new depths. Raises `TuningError` when depth is not written down as a number."""
    config = model.config
    depths = {name: len(stack) for name, stack in named_stacks(model).items()}
    for name, slots in plans.items():
        wanted = {**depths, name: len(slots)}
        for trial in _deeper_configs(config, depths[name], slots):
            if {n: len(stack) for n, stack in named_stacks(_empty_model(model, trial)).items()} == wanted:
                config, depths = trial, wanted
                break
        else:
            raise _unsupported_error(model, f"its configuration has no number that says how deep {name} is")
    return config


def _deeper_configs(config: PreTrainedConfig, depth: int, slots: Sequence[BlockSlot]) -> Iterator[PreTrainedConfig]:
    """The configuration with one number of layers after the other raised, and with longer lists of a value per layer."""
    values = {key: value for key, value in config.to_dict().items() if "layer" in key}
    lists = {key: v for key, v in values.items() if isinstance(v, list) and len(v) == depth}
    for number in (key for key, value in values.items() if type(value) is int and value == depth):
        trial = copy.deepcopy(config)
        for key, value in lists.items():
            setattr(trial, key, [value[slot.source_block] for slot in slots])
        setattr(trial, number, len(slots))
        yield trial


def _config_swaps(
    model: PreTrainedModel, before: PreTrainedModel, after: PreTrainedModel, stacks: Iterable[str]
) -> list[AttributeSwap]:
    """What every configuration in the model (an encoder and a decoder have their own) has to say instead."""
    changes: dict[int, list[AttributeSwap]] = {}
    for name, module in model.named_modules():
        if _is_inside(name, stacks):  # blocks share the configuration of what is around them
            continue
        own, old, new = (_get_config(m) for m in (module, before.get_submodule(name), after.get_submodule(name)))
        if own is not None and old is not None and new is not None and id(own) not in changes:
            said = old.to_dict()
            changes[id(own)] = [AttributeSwap(own, key, v) for key, v in new.to_dict().items() if said.get(key) != v]
    return [change for several in changes.values() for change in several]


def _is_inside(name: str, stacks: Iterable[str]) -> bool:
    return any(name.startswith(f"{stack}.") for stack in stacks)


def _get_config(module: nn.Module) -> PreTrainedConfig | None:
    config = getattr(module, "config", None)
    return config if isinstance(config, PreTrainedConfig) else None


class AttributeDifference(NamedTuple):
    """A plain attribute of a module (named within a block) that two places in a stack do not have in common."""

    module: str
    name: str
    before: object
    after: object


def _attribute_differences(
    before: nn.Module, after: nn.Module, leave_out: Iterable[str] = ()
) -> Iterator[AttributeDifference]:
    """What a module of one place has other values of in another; raises `TuningError` when it is of another class there.

    Modules inside of those named by `leave_out` are not looked at.
    """
    old = dict(before.named_modules())
    for path, module in after.named_modules():
        if _is_inside(path, leave_out):
            continue
        was = old.get(path, module)
        if type(was) is not type(module):
            raise TuningError(
                f"in its new place {path} would be a {type(module).__name__}, and not a {type(was).__name__}",
                where="tuning",
                expected="copies of blocks that are made as the one in their new place would be",
                hint="other positions, or adapter or lora",
            )
        for name, value in vars(module).items():
            if isinstance(value, PLAIN_TYPES) and vars(was).get(name) != value:
                yield AttributeDifference(path, name, vars(was).get(name), value)


def _check_same_kind(block: str, differences: Sequence[AttributeDifference], source: int, position: int) -> None:
    """A block of the base may learn its new number and nothing else; raises `TuningError` when it would work otherwise."""
    for found in differences:
        if (found.before, found.after) != (source, position):
            raise TuningError(
                f"as number {position}, {block} would be of another kind ({found.name} {found.after} for {found.before})",
                where="tuning",
                expected="an architecture whose kinds of blocks are listed one by one, or are all the same",
                hint="other positions, or adapter or lora",
            )


def _check_loadable(model: PreTrainedModel, after: PreTrainedModel) -> None:
    """Raises `TuningError` unless the model has exactly the weights that its new configuration makes."""
    mine = {name: t.shape for name, t in model.state_dict().items()}
    theirs = {name: t.shape for name, t in after.state_dict().items()}
    if odd := [name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)]:
        raise TuningError(
            f"in a model of this depth {min(odd)} is not as in the copied block",
            where="tuning",
            expected="copies of blocks that are made as the one in their new place would be",
            hint="other positions, or adapter or lora",
        )


def _copy_as_identity(
    model: PreTrainedModel, old: nn.Module, like: nn.Module, writers: Sequence[ModuleCall] | None
) -> nn.Module:
    """A copy of a block that gives back what it is given, with only the modules that a block in its new place has."""
    shared = {id(c): c for module in model.modules() if (c := _get_config(module)) is not None}
    block = copy.deepcopy(old, shared)
    wanted = {name for name, _ in like.named_modules()}
    for name in [name for name, _ in block.named_modules() if name not in wanted]:
        path, _, leaf = name.rpartition(".")
        if path in wanted:  # the first position bias of T5 is the whole stack's
            delattr(block.get_submodule(path), leaf)
    if writers is None:
        raise _unsupported_error(model, "its blocks do not just add to what they are given, so no copy can be silent")
    for call in writers:
        if not zero_output(block, call):
            raise _unsupported_error(model, f"no weight of {call.module} silences it and learns again")
    return block.requires_grad_(True)


def _backbone_output(model: PreTrainedModel) -> Tensor:
    """What the backbone gives for a few tokens, of shape (B, T, D or V)."""
    with torch.no_grad(), eval_mode(model):
        answer = model.base_model(**make_probe_inputs(model))[0]
    assert isinstance(answer, Tensor)
    return answer


def _unsupported_error(model: PreTrainedModel, reason: str) -> TuningError:
    return TuningError(
        f"{type(model).__name__} cannot be expanded: {reason}",
        where="tuning",
        expected="blocks that add to what they are given, as in Llama, Qwen, GPT-2, GPT-NeoX and T5",
        hint="adapter and lora work on every model",
    )
