"""Block expansion: new blocks that are the identity at first (LLaMA-Pro, Wu et al. 2024, arXiv 2401.02415, section 3.2).

Copies of blocks are inserted between the existing ones. A copy whose writes to the residual stream are zero is the identity,
so the model starts as exactly the base; only the copies are trained. The result is a plain model of the same architecture
with a larger depth in its configuration.

No architecture is known by name. Where the configuration stores depth, and what a block stores about its position (its cache
index, its kind of attention), is read off two empty models that transformers builds from the configuration before and after.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from postgrad.errors import TuningError
from postgrad.models.sublayers import eval_mode, make_probe_inputs
from postgrad.tuning.extra_trainable import ExtraTrainable
from postgrad.tuning.parameter_location import (
    ParameterLocation,
    SavedRequiresGrad,
    get_parameter,
    is_inside,
    locate_parameter,
    named_stacks,
    task_layer_parameters,
)
from postgrad.tuning.residual_writers import ModuleCall, find_writers, zero_output
from postgrad.tuning.tuning import Tuning, unfreeze

PLAIN_TYPES = (int, float, bool, str, type(None))
OTHER_POSITIONS_HINT = "other positions, or adapter or lora"


class BlockSlot(NamedTuple):
    """A position in an expanded stack: the existing block there, or the one that the new block copies."""

    source_block: int
    is_new: bool


class BlockExpansion(Tuning):
    """New blocks between the existing ones, which are frozen.

    Copies of the last `blocks` blocks are inserted after every `every` blocks of a stack (default: 4, or the next divisor of
    the depth), or after the blocks `positions` (from 0), in every stack. A task's own layer is trained too, and what patterns
    of `also_train` match.
    """

    kind = "expand"
    has_exact_merge = True
    is_merged_on_export = is_plain = True

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        blocks: int = 1,
        every: int | None = None,
        positions: Sequence[int] | None = None,
        also_train: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        """Raises `TuningError` if no copy can be the identity, or transformers could not load the resulting model."""
        super().__init__(model)
        self.options = {
            "blocks": blocks,
            "every": every,
            "positions": None if positions is None else list(positions),
            "also_train": list(also_train),
        }
        plans = {
            name: plan_slots(len(stack), blocks=blocks, every=every, positions=positions)
            for name, stack in named_stacks(model).items()
        }
        self._requires_grad = SavedRequiresGrad(model)
        self._disable_depth = 0
        expected = _backbone_output(model)
        self._swaps, after = _build_swaps(model, plans)
        _swap_all(self._swaps)
        try:
            _check_loadable(model, after)
            if not torch.equal(_backbone_output(model), expected):
                raise _unsupported_error(model, "its output changes with identity blocks in it")
            new_blocks = [f"{name}.{i}" for name, slots in plans.items() for i, slot in enumerate(slots) if slot.is_new]
            self._extra_trainable = ExtraTrainable(model, also_train)
            names = unfreeze(model, [*new_blocks, *task_layer_parameters(model), *self._extra_trainable.names])
        except TuningError:
            _swap_all(self._swaps)
            raise
        self.locations: dict[str, ParameterLocation] = {name: locate_parameter(model, name) for name in names}

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Context without the new blocks, in which weights of the body that `also_train` matches have their old values.

        Raises `TuningError` after `merge` or `detach`.
        """
        if not self._swaps:
            raise TuningError("the new blocks were merged or detached, and cannot be disabled", where="tuning")
        self._disable_depth += 1
        try:
            with self._remove_new_blocks() if self._disable_depth == 1 else nullcontext():
                yield
        finally:
            self._disable_depth -= 1

    @contextmanager
    def _remove_new_blocks(self) -> Iterator[None]:
        # Outside of the swap: `ExtraTrainable` has the names of the expanded model.
        with self._extra_trainable.use_initial_values():
            _swap_all(self._swaps)
            try:
                yield
            finally:
                _swap_all(self._swaps)

    def tensors(self) -> dict[str, nn.Parameter]:
        """The trained weights (the new blocks' and others), by their names in the expanded model."""
        return {name: get_parameter(location) for name, location in self.locations.items()}

    def detach(self) -> None:
        """Remove the new blocks; the others get their old values and `requires_grad` back."""
        self._extra_trainable.restore_values()
        _swap_all(self._swaps)
        self._release()

    def merge(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Keep the new blocks, which are plain ones."""
        self._release()

    def _release(self) -> None:
        self._swaps = []
        self._requires_grad.restore()


def plan_slots(depth: int, *, blocks: int, every: int | None, positions: Sequence[int] | None) -> list[BlockSlot]:
    """The blocks of an expanded stack from the bottom up. Raises `TuningError` for positions that do not exist."""
    if every is not None and positions is not None:
        raise TuningError("both every and positions are set", where="tuning", expected="one of them, or neither")
    if positions is None:
        step = every if every is not None else next(n for n in range(min(4, depth), depth + 1) if depth % n == 0)
        if step < 1 or depth % step:
            raise TuningError(
                f"{depth} blocks cannot be divided into groups of {step}",
                where="tuning.every",
                expected=f"one of {', '.join(str(n) for n in range(1, depth + 1) if depth % n == 0)}",
                hint="or set positions",
            )
        positions = range(step - 1, depth, step)
    if not positions or len(set(positions)) < len(positions) or not 0 <= min(positions) <= max(positions) < depth:
        raise TuningError(
            f"positions are {list(positions)}",
            where="tuning.positions",
            expected=f"distinct indices of blocks, 0 to {depth - 1}",
        )
    if not 1 <= blocks <= min(positions) + 1:
        raise TuningError(
            f"blocks is {blocks}",
            where="tuning.blocks",
            expected=f"1 to {min(positions) + 1}, the number of blocks up to the first position",
        )
    slots: list[BlockSlot] = []
    for i in range(depth):
        slots.append(BlockSlot(i, is_new=False))
        if i in positions:
            slots += [BlockSlot(source, is_new=True) for source in range(i + 1 - blocks, i + 1)]
    return slots


class AttributeSwap:
    """An attribute with one value when the new blocks are inserted and another when they are not."""

    def __init__(self, owner: object, name: str, value: object) -> None:
        self.owner, self.name, self.value = owner, name, value

    def swap(self) -> None:
        """Exchange the two values."""
        current = getattr(self.owner, self.name)
        setattr(self.owner, self.name, self.value)
        self.value = current


def _swap_all(swaps: Sequence[AttributeSwap]) -> None:
    for swap in swaps:
        swap.swap()


def _build_swaps(
    model: PreTrainedModel, plans: Mapping[str, list[BlockSlot]]
) -> tuple[list[AttributeSwap], PreTrainedModel]:
    """The swaps that insert the new blocks (nothing changes yet), and an empty model of the resulting structure."""
    before = _empty_model(model, model.config)
    if different := before.state_dict().keys() ^ model.state_dict().keys():
        raise TuningError(
            f"{type(model).__name__} differs from its configuration ({min(different)})",
            where="tuning",
            expected="a plain model",
            hint="put expand before other tunings, or merge them first",
        )
    after = _empty_model(model, _deepen_config(model, plans))
    writers = find_writers(
        model, {f"{name}.{slot.source_block}" for name, slots in plans.items() for slot in slots if slot.is_new}
    )
    swaps = _config_swaps(model, before, after, plans)
    swaps += _difference_swaps(model, _attribute_differences(before, after, plans))
    before_stacks, after_stacks = named_stacks(before), named_stacks(after)
    for name, slots in plans.items():
        stack = model.get_submodule(name)
        assert isinstance(stack, nn.ModuleList)
        expanded: dict[str, nn.Module] = {}
        for i, slot in enumerate(slots):
            block, empty_block = stack[slot.source_block], after_stacks[name][i]
            differences = list(_attribute_differences(before_stacks[name][slot.source_block], empty_block))
            if slot.is_new:
                block = _copy_as_identity(model, block, empty_block, writers[f"{name}.{slot.source_block}"])
            else:
                _check_same_kind(f"{name}.{slot.source_block}", differences, slot.source_block, i)
            expanded[str(i)] = block
            swaps += _difference_swaps(block, differences)
        swaps.append(AttributeSwap(stack, "_modules", expanded))
    return swaps, after


def _empty_model(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """The model that transformers builds from a configuration, without weights."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(config))


def _deepen_config(model: PreTrainedModel, plans: Mapping[str, list[BlockSlot]]) -> PreTrainedConfig:
    """A configuration with the new depths. Raises `TuningError` if it does not store depth as a number."""
    config = model.config
    depths = {name: len(stack) for name, stack in named_stacks(model).items()}
    for name, slots in plans.items():
        target = {**depths, name: len(slots)}
        for trial in _deeper_configs(config, depths[name], slots):
            if {n: len(stack) for n, stack in named_stacks(_empty_model(model, trial)).items()} == target:
                config, depths = trial, target
                break
        else:
            raise _unsupported_error(model, f"no number in its configuration sets the depth of {name}")
    return config


def _deeper_configs(config: PreTrainedConfig, depth: int, slots: Sequence[BlockSlot]) -> Iterator[PreTrainedConfig]:
    """Candidates: each number that may be the depth raised in turn, with per-layer lists lengthened."""
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
    """The changed values of every configuration in the model (an encoder and a decoder have their own)."""
    swaps: dict[int, list[AttributeSwap]] = {}
    for name, module in model.named_modules():
        if is_inside(name, stacks):  # blocks share the configuration of the module around them
            continue
        own, old, new = (_get_config(m) for m in (module, before.get_submodule(name), after.get_submodule(name)))
        if own is not None and old is not None and new is not None and id(own) not in swaps:
            values = old.to_dict()
            swaps[id(own)] = [AttributeSwap(own, key, v) for key, v in new.to_dict().items() if values.get(key) != v]
    return [swap for config_swaps in swaps.values() for swap in config_swaps]


def _get_config(module: nn.Module) -> PreTrainedConfig | None:
    config = getattr(module, "config", None)
    return config if isinstance(config, PreTrainedConfig) else None


class AttributeDifference(NamedTuple):
    """A plain attribute of a module (its name within a block) that differs between two positions in a stack."""

    module: str
    name: str
    before: object
    after: object


def _difference_swaps(module: nn.Module, differences: Iterable[AttributeDifference]) -> list[AttributeSwap]:
    return [AttributeSwap(module.get_submodule(d.module), d.name, d.after) for d in differences]


def _attribute_differences(
    before: nn.Module, after: nn.Module, excluded: Iterable[str] = ()
) -> Iterator[AttributeDifference]:
    """Plain attributes with other values after, outside of the `excluded` modules.

    Raises `TuningError` for a module of another class.
    """
    modules_before = dict(before.named_modules())
    for path, module in after.named_modules():
        if is_inside(path, excluded):
            continue
        module_before = modules_before.get(path, module)
        if type(module_before) is not type(module):
            raise TuningError(
                f"in its new position {path} is a {type(module).__name__}, not a {type(module_before).__name__}",
                where="tuning",
                expected="copies of the same structure as the block in their new position",
                hint=OTHER_POSITIONS_HINT,
            )
        old_values = vars(module_before)
        for name, value in vars(module).items():
            if isinstance(value, PLAIN_TYPES) and old_values.get(name) != value:
                yield AttributeDifference(path, name, old_values.get(name), value)


def _check_same_kind(block: str, differences: Sequence[AttributeDifference], source: int, position: int) -> None:
    """Raise `TuningError` if anything but its index changes in a block of the base."""
    for d in differences:
        if (d.before, d.after) != (source, position):
            raise TuningError(
                f"at index {position}, {block} becomes another kind of block ({d.name} {d.after} instead of {d.before})",
                where="tuning",
                expected="an architecture with a per-layer list of block kinds, or with one kind only",
                hint=OTHER_POSITIONS_HINT,
            )


def _check_loadable(model: PreTrainedModel, after: PreTrainedModel) -> None:
    """Raise `TuningError` unless the model has exactly the weights of its new configuration."""
    own, expected = ({name: t.shape for name, t in m.state_dict().items()} for m in (model, after))
    if different := [name for name in own.keys() | expected.keys() if own.get(name) != expected.get(name)]:
        raise TuningError(
            f"in a model of this depth {min(different)} differs from the copied block",
            where="tuning",
            expected="copies of the same structure as the block in their new position",
            hint=OTHER_POSITIONS_HINT,
        )


def _copy_as_identity(
    model: PreTrainedModel, old: nn.Module, like: nn.Module, writers: Sequence[ModuleCall] | None
) -> nn.Module:
    """A copy of a block that returns its input, with only the modules that a block in its new position has."""
    shared_configs = {id(c): c for module in model.modules() if (c := _get_config(module)) is not None}
    block = copy.deepcopy(old, shared_configs)
    names = {name for name, _ in like.named_modules()}
    for name in [name for name, _ in block.named_modules() if name not in names]:
        path, _, local = name.rpartition(".")
        if path in names:  # T5's first block has the position bias of the whole stack
            delattr(block.get_submodule(path), local)
    if writers is None:
        raise _unsupported_error(model, "its blocks do more than add to their input, so no copy can be the identity")
    for call in writers:
        if not zero_output(block, call):
            raise _unsupported_error(model, f"no weight of {call.module} zeroes its output and still gets a gradient")
    return block.requires_grad_(True)


def _backbone_output(model: PreTrainedModel) -> Tensor:
    """The backbone's output for a few tokens, of shape (B, T, D or V)."""
    with torch.no_grad(), eval_mode(model):
        output = model.base_model(**make_probe_inputs(model))[0]
    assert isinstance(output, Tensor)
    return output


def _unsupported_error(model: PreTrainedModel, reason: str) -> TuningError:
    return TuningError(
        f"{type(model).__name__} cannot be expanded: {reason}",
        where="tuning",
        expected="blocks that add to their input, as in Llama, Qwen, GPT-2, GPT-NeoX and T5",
        hint="adapter and lora work on every model",
    )
