"""How does a model get new blocks that change nothing at first?

Block expansion (LLaMA-Pro, Wu et al. 2024, arXiv 2401.02415, section 3.2): copies of blocks stand between the old ones. A
copy whose writes to the residual stream are zero is the identity, so the model starts as exactly the base; only the copies
are trained. The result is a plain model of the same architecture with a larger depth in its configuration.

No architecture is known by name. What writes to the stream is read off the graph of one small forward pass: a block's
output has to be a sum of its input and of what some modules gave, and those modules are silenced. How depth is written
down, and what a block knows of its place (the index that the cache goes by, its kind of attention), is read off two empty
models that transformers builds from the configuration before and after.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from postgrad.errors import TuningError
from postgrad.models.sublayers import evaluating, few_tokens
from postgrad.tuning.anatomy import Place, at, named_stacks, place_of, task_layers
from postgrad.tuning.tuning import Published, Tuning, freeze, take, unfreeze

PLAIN = (int, float, bool, str, type(None))
PASSING = (
    "View",
    "UnsafeView",
    "ReshapeAlias",
    "Alias",
    "Clone",
    "ToCopy",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Mul",
    "Div",
)
"""Operations of autograd's graph that give nothing when they are given nothing."""


class Slot(NamedTuple):
    """A place in a grown stack: the old block that stands there, or that the new one there is a copy of."""

    source: int
    new: bool


class Call(NamedTuple):
    """A module's call during the small forward pass; `name` is within its block."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Expand(Tuning):
    """New blocks between the old ones, which stay as they are.

    Behind every `every` blocks of a stack (left out: 4, or the next number that divides the depth), or behind the blocks of
    the numbers `positions` (from 0), stand copies of the `blocks` blocks before that place. Every stack grows, unless
    `stacks` names some by patterns (`*decoder*`). A task's own layer moves too, and what patterns of `also` match.
    """

    kind = "expand"
    folds = True
    leaves_model = True

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        blocks: int = 1,
        every: int | None = None,
        positions: Sequence[int] | None = None,
        stacks: Sequence[str] = (),
        also: Sequence[str] = (),
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
            "also": list(also),
        }
        plans = {
            name: plan(len(stack), blocks=blocks, every=every, positions=positions)
            for name, stack in named_stacks(model).items()
            if not stacks or any(fnmatchcase(name, pattern) for pattern in stacks)
        }
        if not plans:
            raise TuningError(
                f"no stack of blocks matches {list(stacks)}",
                where="tuning.stacks",
                expected=f"patterns for {', '.join(named_stacks(model))}",
            )
        self._before = [(place_of(model, name), p.requires_grad) for name, p in model.named_parameters()]
        self._off = 0
        base = _answer(model)
        self._changes, after = _growth(model, plans)
        _swap(self._changes)
        try:
            _as_loaded(model, after)
            if not torch.equal(_answer(model), base):
                raise _refusal(model, "it answers differently with silent blocks in it")
            fresh = [f"{name}.{i}" for name, slots in plans.items() for i, slot in enumerate(slots) if slot.new]
            moving = unfreeze(model, [*fresh, *task_layers(model), *also])
        except TuningError:
            _swap(self._changes)
            raise
        freeze(model)
        self.own: dict[str, Place] = {name: place_of(model, name) for name in moving}
        for place in self.own.values():
            at(place).requires_grad_(True)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the new blocks are not there. What `also` moved of the base's weights stays moved."""
        if not self._off:
            _swap(self._changes)
        self._off += 1
        try:
            yield
        finally:
            self._off -= 1
            if not self._off:
                _swap(self._changes)

    def state(self) -> dict[str, Tensor]:
        """The new blocks' weights (and those that move besides), by their names in the grown model."""
        return {name: at(place).detach() for name, place in self.own.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave. Raises `TuningError` when names or shapes are not mine."""
        take(self.state(), state, self.kind)

    def detach(self) -> None:
        """Take the new blocks out, and let the others be as trainable as they were before."""
        _swap(self._changes)
        self._release()

    def merge(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Leave the new blocks in: they are plain ones."""
        self._release()

    def _release(self) -> None:
        self._changes = []
        for place, moved in self._before:
            at(place).requires_grad_(moved)

    def published(self) -> Published:
        """The new blocks, and where they stand."""
        return Published(self.options, self.state())


def plan(depth: int, *, blocks: int, every: int | None, positions: Sequence[int] | None) -> list[Slot]:
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
                way_out="or name the places with positions",
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
    slots: list[Slot] = []
    for i in range(depth):
        slots.append(Slot(i, new=False))
        if i in positions:
            slots += [Slot(source, new=True) for source in range(i + 1 - blocks, i + 1)]
    return slots


class Change:
    """An attribute that has one value with the new blocks and another without them."""

    def __init__(self, owner: object, name: str, value: object) -> None:
        self.owner, self.name, self.value = owner, name, value

    def swap(self) -> None:
        """Give the attribute its other value."""
        now = getattr(self.owner, self.name)
        setattr(self.owner, self.name, self.value)
        self.value = now


def _swap(changes: Sequence[Change]) -> None:
    for change in changes:
        change.swap()


def _growth(model: PreTrainedModel, plans: Mapping[str, list[Slot]]) -> tuple[list[Change], PreTrainedModel]:
    """All that has to change for the new blocks to be there (nothing does yet), and what the model has to look like then."""
    before = _empty(model, model.config)
    if odd := before.state_dict().keys() ^ model.state_dict().keys():
        raise TuningError(
            f"{type(model).__name__} is not what its configuration makes ({min(odd)})",
            where="tuning",
            expected="a plain model",
            way_out="put expand before other tunings, or merge them first",
        )
    after = _empty(model, _grown_config(model, plans))
    writers = _writers(model, {name: {slot.source for slot in slots if slot.new} for name, slots in plans.items()})
    changes = _config_changes(model, before, after, plans)
    changes += [Change(model.get_submodule(d.module), d.name, d.after) for d in _differences(before, after, plans)]
    for name, slots in plans.items():
        stack, was, becomes = (m.get_submodule(name) for m in (model, before, after))
        assert (
            isinstance(stack, nn.ModuleList) and isinstance(was, nn.ModuleList) and isinstance(becomes, nn.ModuleList)
        )
        grown: dict[str, nn.Module] = {}
        for i, slot in enumerate(slots):
            old, differences = stack[slot.source], list(_differences(was[slot.source], becomes[i]))
            if slot.new:
                grown[str(i)] = _silent_copy(model, old, becomes[i], writers[name][slot.source])
            else:
                grown[str(i)] = old
                _same_kind(f"{name}.{slot.source}", differences, slot.source, i)
            changes += [Change(grown[str(i)].get_submodule(d.module), d.name, d.after) for d in differences]
        changes.append(Change(stack, "_modules", grown))
    return changes, after


def _empty(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """What transformers makes of a configuration, without weights."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return type(model)(copy.deepcopy(config))


def _grown_config(model: PreTrainedModel, plans: Mapping[str, list[Slot]]) -> PreTrainedConfig:
    """A configuration that makes stacks of the new depths. Raises `TuningError` when depth is not written down as a number."""
    config = model.config
    depths = {name: len(stack) for name, stack in named_stacks(model).items()}
    for name, slots in plans.items():
        wanted = {**depths, name: len(slots)}
        for trial in _deeper(config, depths[name], slots):
            if {n: len(stack) for n, stack in named_stacks(_empty(model, trial)).items()} == wanted:
                config, depths = trial, wanted
                break
        else:
            raise _refusal(model, f"its configuration has no number that says how deep {name} is")
    return config


def _deeper(config: PreTrainedConfig, depth: int, slots: Sequence[Slot]) -> Iterator[PreTrainedConfig]:
    """The configuration with one number of layers after the other raised, and with longer lists of a value per layer."""
    values = {key: value for key, value in config.to_dict().items() if "layer" in key}
    lists = {key: v for key, v in values.items() if isinstance(v, list) and len(v) == depth}
    for number in (key for key, value in values.items() if type(value) is int and value == depth):
        trial = copy.deepcopy(config)
        for key, value in lists.items():
            setattr(trial, key, [value[slot.source] for slot in slots])
        setattr(trial, number, len(slots))
        yield trial


def _config_changes(
    model: PreTrainedModel, before: PreTrainedModel, after: PreTrainedModel, stacks: Iterable[str]
) -> list[Change]:
    """What every configuration in the model (an encoder and a decoder have their own) has to say instead."""
    changes: dict[int, list[Change]] = {}
    for name, module in model.named_modules():
        if _inside(name, stacks):  # blocks share the configuration of what is around them
            continue
        own, old, new = (_config_of(m) for m in (module, before.get_submodule(name), after.get_submodule(name)))
        if own is not None and old is not None and new is not None and id(own) not in changes:
            said = old.to_dict()
            changes[id(own)] = [Change(own, key, v) for key, v in new.to_dict().items() if said.get(key) != v]
    return [change for several in changes.values() for change in several]


def _inside(name: str, stacks: Iterable[str]) -> bool:
    return any(name.startswith(f"{stack}.") for stack in stacks)


def _config_of(module: nn.Module) -> PreTrainedConfig | None:
    config = getattr(module, "config", None)
    return config if isinstance(config, PreTrainedConfig) else None


class Difference(NamedTuple):
    """A plain attribute of a module (named within a block) that two places in a stack do not have in common."""

    module: str
    name: str
    before: object
    after: object


def _differences(before: nn.Module, after: nn.Module, leave_out: Iterable[str] = ()) -> Iterator[Difference]:
    """What a module of one place has other values of in another; raises `TuningError` when it is of another class there.

    Modules inside of those named by `leave_out` are not looked at.
    """
    old = dict(before.named_modules())
    for path, module in after.named_modules():
        if _inside(path, leave_out):
            continue
        was = old.get(path, module)
        if type(was) is not type(module):
            raise TuningError(
                f"in its new place {path} would be a {type(module).__name__}, and not a {type(was).__name__}",
                where="tuning",
                expected="copies of blocks that are made as the one in their new place would be",
                way_out="other positions, or adapter or lora",
            )
        for name, value in vars(module).items():
            if isinstance(value, PLAIN) and vars(was).get(name) != value:
                yield Difference(path, name, vars(was).get(name), value)


def _same_kind(block: str, differences: Sequence[Difference], source: int, place: int) -> None:
    """A block of the base may learn its new number and nothing else; raises `TuningError` when it would work otherwise."""
    for found in differences:
        if (found.before, found.after) != (source, place):
            raise TuningError(
                f"as number {place}, {block} would be of another kind ({found.name} {found.after} for {found.before})",
                where="tuning",
                expected="an architecture whose kinds of blocks are listed one by one, or are all the same",
                way_out="other positions, or adapter or lora",
            )


def _as_loaded(model: PreTrainedModel, after: PreTrainedModel) -> None:
    """Raises `TuningError` unless the model has exactly the weights that its new configuration makes."""
    mine = {name: t.shape for name, t in model.state_dict().items()}
    theirs = {name: t.shape for name, t in after.state_dict().items()}
    if odd := [name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)]:
        raise TuningError(
            f"in a model of this depth {min(odd)} is not as in the copied block",
            where="tuning",
            expected="copies of blocks that are made as the one in their new place would be",
            way_out="other positions, or adapter or lora",
        )


def _silent_copy(model: PreTrainedModel, old: nn.Module, like: nn.Module, writers: Sequence[Call]) -> nn.Module:
    """A copy of a block that gives back what it is given, with only the modules that a block in its new place has."""
    shared = {id(c): c for module in model.modules() if (c := _config_of(module)) is not None}
    block = copy.deepcopy(old, shared)
    wanted = {name for name, _ in like.named_modules()}
    for name in [name for name, _ in block.named_modules() if name not in wanted]:
        path, _, leaf = name.rpartition(".")
        if path in wanted:  # the first position bias of T5 is the whole stack's
            delattr(block.get_submodule(path), leaf)
    for call in writers:
        if not _silence(block.get_submodule(call.name), call):
            raise _refusal(model, f"no weight of {call.name} silences it and learns again")
    return block.requires_grad_(True)


def _silence(module: nn.Module, call: Call) -> bool:
    """Set one weight of a module (and the bias beside it) so that it gives zero, and that weight still gets a gradient.

    Zero does so for a matrix or a gain; minus one for a gain that is counted from one.
    """
    for name, weight in module.named_parameters(recurse=False):
        bias = getattr(module, "bias" if name == "weight" else f"{name}_bias", None)
        several = [weight] if bias is None or bias is weight else [weight, bias]
        kept = [p.detach().clone() for p in several]
        for value in (0.0, -1.0):
            with torch.no_grad():
                weight.fill_(value)
                for p in several[1:]:
                    p.zero_()
            with torch.enable_grad():
                out = module(*call.args, **call.kwargs)
                (slope,) = torch.autograd.grad(
                    out, weight.requires_grad_(True), torch.ones_like(out), allow_unused=True
                )
            if not out.any() and slope is not None and slope.any():
                return True
        with torch.no_grad():
            for p, value in zip(several, kept, strict=True):
                p.copy_(value)
    return False


def _writers(model: PreTrainedModel, sources: Mapping[str, set[int]]) -> dict[str, dict[int, list[Call]]]:
    """The modules of these blocks whose outputs are added to the residual stream.

    Raises `TuningError` when a block does not just add to what it is given (as where a norm stands behind the addition).
    """
    with ExitStack() as hooks, torch.enable_grad(), evaluating(model):
        watches = {
            name: {i: _Watch(model.get_submodule(f"{name}.{i}"), hooks) for i in numbers}
            for name, numbers in sources.items()
        }
        model.base_model(**few_tokens(model))
    found: dict[str, dict[int, list[Call]]] = {}
    for name, several in watches.items():
        found[name] = {}
        for i, watch in several.items():
            terms = watch.terms(watch.end)
            if terms is None or terms.count(None) != 1:
                raise _refusal(model, "its blocks do not just add to what they are given, so no copy can be silent")
            found[name][i] = [call for call in terms if call is not None]
    return found


class _Watch:
    """What autograd's graph of one block's pass says: where the stream comes in, what modules made, where it goes out."""

    def __init__(self, block: nn.Module, hooks: ExitStack) -> None:
        self.start: Any = None
        self.end: Any = None
        self.made: dict[Any, Call] = {}
        names = {id(module): name for name, module in block.named_modules()}

        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            hidden_BTD = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            stream_BTD = hidden_BTD.detach().requires_grad_().clone()
            self.start = stream_BTD.grad_fn
            if "hidden_states" in kwargs:
                return args, {**kwargs, "hidden_states": stream_BTD}
            return (stream_BTD, *args[1:]), kwargs

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
            if isinstance(output, Tensor) and output.grad_fn is not None:
                given = tuple(_cut(a) for a in args), {key: _cut(a) for key, a in kwargs.items()}
                self.made.setdefault(output.grad_fn, Call(names[id(module)], *given))

        def leave(_module: nn.Module, _args: object, output: Any) -> None:
            self.end = (output if isinstance(output, Tensor) else output[0]).grad_fn

        handles = [block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)]
        for module in block.modules():
            if next(module.parameters(recurse=False), None) is not None:
                handles.append(module.register_forward_hook(note, with_kwargs=True))
        for handle in handles:
            hooks.callback(handle.remove)

    def terms(self, node: Any) -> list[Call | None] | None:
        """The sum that a node is, None in it for the stream itself; None when it is no such sum."""
        if node is self.start:
            return [None]
        if node in self.made:
            return [self.made[node]]
        operation = node.name()
        if not operation.startswith(("Add", *PASSING)):
            return None
        inputs = [self.terms(before) for before, _ in node.next_functions if before is not None]
        known = [terms for terms in inputs if terms is not None]
        if operation.startswith("Add"):
            return [term for terms in known for term in terms] if len(known) == len(inputs) else None
        # A product is nothing as soon as one of its factors is.
        return known[0] if known else None


def _cut(value: object) -> object:
    return value.detach() if isinstance(value, Tensor) else value


def _answer(model: PreTrainedModel) -> Tensor:
    """What the backbone gives for a few tokens, of shape (B, T, D or V)."""
    with torch.no_grad(), evaluating(model):
        answer = model.base_model(**few_tokens(model))[0]
    assert isinstance(answer, Tensor)
    return answer


def _refusal(model: PreTrainedModel, why: str) -> TuningError:
    return TuningError(
        f"{type(model).__name__} cannot be expanded: {why}",
        where="tuning",
        expected="blocks that add to what they are given, as in Llama, Qwen, GPT-2, GPT-NeoX and T5",
        way_out="adapter and lora work on every model",
    )
