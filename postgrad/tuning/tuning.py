"""Which weights move? A tuning reshapes a model before training: it freezes, it adds, and it can be taken out again.

Every kind keeps to one protocol, so that whatever trains, scores, saves or generates needs to know none of them:

    attach   the constructor: `Kind(model, ...)` changes the model in place and sets `requires_grad` everywhere
    off      inside, the model answers as its base did (so a base can be its own teacher)
    state    my tensors alone, all that an exact resume needs; `load` takes them back
    detach   take everything of mine out
    merge    become part of the plain weights, where the mathematics allows it

Modules that a tuning adds are registered inside the Hugging Face model, so its `named_parameters()` are all there is to
train, and an optimizer, a checkpoint or FSDP finds them without being told.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from postgrad.errors import TuningError
from postgrad.tuning.weight_delta import TuningDelta


class TuningExport(NamedTuple):
    """A tuning as it leaves training: what it takes to make one of the same effect, and no more.

    `options` are the constructor's keyword arguments (plain data, with `kind`), `state` its tensors.
    """

    options: dict[str, Any]
    state: dict[str, Tensor]


class PeftFolder(NamedTuple):
    """What `adapter_config.json` and `adapter_model.safetensors` hold in PEFT's format."""

    config: dict[str, Any]
    state: dict[str, Tensor]


class Tuning(ABC):
    """What every kind answers; a kind overrides what is not so for it.

    `additive`: the base's own weights stay as they are, so that I can be switched off, and kept as a small folder.
    `virtual`: how many ids from the end of the vocabulary on stand for vectors of mine (they may be used in `input_ids`).
    `attention`: the attention implementation that I need, when I need one.
    `whole`: every weight moves, so that what is kept of me is a whole model.
    `folds`: merging me leaves a model that takes the same inputs and gives the same answers.
    `leaves_model`: what leaves training is a plain model, with me merged into it.
    `notes`: what attaching changed that its options do not say, in sentences for the reader of a plan.
    """

    kind: str
    additive: bool = True
    num_virtual_tokens: int = 0
    attention: str | None = None
    is_full: bool = False
    has_exact_merge: bool = False
    is_merged_on_export: bool = False

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.notes: list[str] = []

    def disable(self) -> AbstractContextManager[None]:
        """Inside, the model answers as the base does. Raises `TuningError` when the base's own weights have moved."""
        raise TuningError(
            f"`{self.kind}` moves the base's own weights, so there is nothing to switch off",
            where="tuning",
            hint="load the start model as a second model",
        )

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """My tensors by name, all that an exact resume needs."""

    @abstractmethod
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave. Raises `TuningError` when names or shapes are not mine."""

    @abstractmethod
    def detach(self) -> None:
        """Take everything of mine out of the model."""

    def merge(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Become part of the model's plain weights, and detach. Raises `TuningError` when that cannot be.

        Only ever into a full-precision base. `tokenizer` gets the new tokens of kinds that add any.
        """
        raise TuningError(f"`{self.kind}` cannot be merged into plain weights", where="tuning")

    @abstractmethod
    def export(self) -> TuningExport:
        """A tuning of the same effect without what only training needs."""

    def peft(self) -> PeftFolder | None:
        """The same in PEFT's format; None for a kind that PEFT cannot load."""
        return None

    def weight_deltas(self) -> dict[str, TuningDelta]:
        """The weights of the base that tensors of mine change, by the names that they have in the model now."""
        return {}

    def rate_factor(self, name: str) -> float:
        """What the learning rate of a parameter is multiplied by."""
        return 1.0

    def on_step_begin(self, step: int) -> None:  # noqa: B027 (most kinds have nothing to do)
        """Told before every step (counted from 1): a schedule of unfreezing acts here, as a pure function of the step."""


def freeze(model: nn.Module) -> None:
    """Nothing moves any more."""
    model.requires_grad_(False)


def unfreeze(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Let the parameters that `patterns` name move besides; their names, in the model's order.

    A pattern (shell style, as in fnmatch) names parameters, or modules with all that is in them. Raises `TuningError`,
    before anything changes, when one matches nothing, or only the second name of a tied weight.
    """
    named = dict(model.named_parameters())
    first = {id(p): name for name, p in named.items()}
    every = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    chosen: set[str] = set()
    for pattern in patterns:
        met = {n: every[n] for n in every if fnmatchcase(n, pattern) or fnmatchcase(n, f"{pattern}.*")}
        if not met:
            raise TuningError(
                f"'{pattern}' matches no parameter of {type(model).__name__}",
                where="tuning",
                expected=f"names such as {', '.join(_nearest_names(pattern, every))}",
            )
        for name, owner in met.items():
            if owner not in met:
                raise TuningError(
                    f"'{pattern}' names {name}, which is tied: it is the same weight as {owner}",
                    where="tuning",
                    hint=f"name {owner} if all of it is to move, or untie the two first",
                )
        chosen.update(met)
    moving = [name for name in named if name in chosen]
    for name in moving:
        named[name].requires_grad_(True)
    return moving


def _nearest_names(pattern: str, names: Iterable[str]) -> list[str]:
    """Up to three names of parameters or modules that `pattern` may have meant."""
    parts = [name.split(".") for name in names]
    known = list(dict.fromkeys(".".join(p[:end]) for p in parts for end in range(1, len(p) + 1)))
    return difflib.get_close_matches(pattern.strip("*."), known, n=3, cutoff=0.5) or known[-3:]


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that move, by name. Raises `TuningError` when there are none."""
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise TuningError("nothing is left to train", where="tuning", expected="at least one trainable weight")
    return found


def copy_state(target: Mapping[str, Tensor], state: Mapping[str, Tensor], kind: str) -> None:
    """Copy `given` into `own`, in place. Raises `TuningError`, before anything is copied, when names or shapes differ."""
    missing, unknown = sorted(target.keys() - state.keys()), sorted(state.keys() - target.keys())
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which is not mine"
        raise TuningError(
            f"this state of `{kind}` {what}", where="tuning", expected="the state of the same kind and options"
        )
    for name, tensor in target.items():
        if tensor.shape != state[name].shape:
            raise TuningError(
                f"{name} has the shape {tuple(state[name].shape)}",
                where="tuning",
                expected=f"{tuple(tensor.shape)}, as in this model",
            )
    for name, tensor in target.items():
        tensor.detach().copy_(state[name])
