"""The protocol of a tuning: which weights of a model are trained, and how what was added is removed again.

Every kind implements one protocol, so training, evaluation, saving and generation never name a method:

    Kind(model, ...)   changes the model in place and sets `requires_grad` everywhere
    disable            context in which the model computes as its base did (a base can be its own teacher)
    state, load        the tuning's tensors alone, all that an exact resume needs
    detach             removes everything that the tuning added
    merge              folds the tuning into the plain weights, where the mathematics allows it

Added modules are registered inside the Hugging Face model, so its `named_parameters()` are all there is to train, and
optimizers, checkpoints and FSDP find them without special cases.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from postgrad.errors import TuningError, suggest_nearest
from postgrad.tuning.weight_delta import TuningDelta


class TuningExport(NamedTuple):
    """A tuning as published: enough to build one with the same effect, without training-only parts.

    `options` are the constructor's keyword arguments (plain data, with `kind`), `state` its tensors.
    """

    options: dict[str, Any]
    state: dict[str, Tensor]


class PeftFolder(NamedTuple):
    """Contents of `adapter_config.json` and `adapter_model.safetensors` in PEFT's format."""

    config: dict[str, Any]
    state: dict[str, Tensor]


class Tuning(ABC):
    """What every kind implements; class attributes are overridden where they differ.

    `additive`: the base's own weights do not change, so the tuning can be disabled and saved as a small folder.
    `num_virtual_tokens`: ids appended to the vocabulary that stand for trained vectors (allowed in `input_ids`).
    `attention`: the attention implementation the tuning requires.
    `is_full`: every weight is trained, so checkpoints hold a whole model.
    `has_exact_merge`: merging yields a model with the same inputs and outputs.
    `is_merged_on_export`: a plain model is published, with the tuning merged into it.
    `exports_alone`: what is published follows from the tuning's own tensors, without the weights of the base.
    `is_plain`: the model holds plain weights alone, so that merging changes none.
    `options`: the constructor's keyword arguments for a tuning of the same effect, as plain data.
    `notes`: effects of attaching that the options do not show, as sentences for the plan.
    `unmergeable_reason`: why no plain weights have the tuning's effect, for kinds that cannot be merged.
    """

    kind: str
    additive: bool = True
    num_virtual_tokens: int = 0
    attention: str | None = None
    is_full: bool = False
    has_exact_merge: bool = False
    is_merged_on_export: bool = False
    exports_alone: bool = False
    is_plain: bool = False
    unmergeable_reason: str | None = None
    options: Mapping[str, Any] = {}

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.notes: list[str] = []

    def disable(self) -> AbstractContextManager[None]:
        """Context in which the model computes as its base. Raises `TuningError` if the base's own weights are trained."""
        raise TuningError(
            f"`{self.kind}` trains the base's own weights, so it cannot be disabled",
            where="tuning",
            hint="load the start model as a second model",
        )

    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """The live tensors by name that training and `load` change: all that an exact resume needs."""

    def state(self) -> dict[str, Tensor]:
        """`tensors` without gradients."""
        return {name: tensor.detach() for name, tensor in self.tensors().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy a `state` in. Raises `TuningError`, before anything changes, when names or shapes differ."""
        copy_state(self.tensors(), state, self.kind)

    @abstractmethod
    def detach(self) -> None:
        """Remove everything that the tuning added to the model."""

    def merge(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Fold the tuning into the model's plain weights, and detach. Raises `TuningError` where that is impossible.

        Full-precision bases only. `tokenizer` receives the new tokens of kinds that add any.
        """
        raise TuningError(
            self.unmergeable_reason or f"`{self.kind}` cannot be merged into plain weights",
            where="tuning",
            expected="a tuning that is linear in the weights, such as LoRA, to merge",
            hint="publish the tuning as a folder, and attach it where the model is used",
        )

    def export(self) -> TuningExport:
        """A tuning of the same effect without what only training needs."""
        return TuningExport({"kind": self.kind, **self.options}, self.state())

    def peft(self) -> PeftFolder | None:
        """The same in PEFT's format; None if PEFT cannot load it."""
        return None

    def weight_deltas(self) -> dict[str, TuningDelta]:
        """How the tuning's tensors change weights of the base, by the weights' current names in the model."""
        return {}

    def rate_factor(self, name: str) -> float:
        """The learning-rate multiplier of a parameter."""
        return 1.0

    def freeze_weights(self, names: Iterable[str]) -> None:
        """Stop training weights of the base that the tuning trains, if it does."""
        for name in names:
            self.model.get_parameter(name).requires_grad_(False)

    def on_step_begin(self, step: int) -> None:  # noqa: B027 (most kinds have nothing to do)
        """Called before every step (from 1); gradual unfreezing acts here, as a pure function of the step."""


def freeze(model: nn.Module) -> None:
    """Set `requires_grad` to False everywhere."""
    model.requires_grad_(False)


def unfreeze(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Make the parameters that `patterns` match trainable, and return their names in the model's order.

    A pattern (shell style, as in fnmatch) matches parameters, or modules with everything in them. Raises `TuningError`,
    before anything changes, if one matches nothing, or only the second name of a tied weight.
    """
    parameters = dict(model.named_parameters())
    first_names = {id(p): name for name, p in parameters.items()}
    owners = {name: first_names[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    selected: set[str] = set()
    for pattern in patterns:
        matches = {n: owners[n] for n in owners if fnmatchcase(n, pattern) or fnmatchcase(n, f"{pattern}.*")}
        if not matches:
            raise TuningError(
                f"'{pattern}' matches no parameter of {type(model).__name__}",
                where="tuning",
                expected=f"names such as {', '.join(_nearest_names(pattern, owners))}",
            )
        for name, owner in matches.items():
            if owner not in matches:
                raise TuningError(
                    f"'{pattern}' matches {name}, which is tied: it is the same weight as {owner}",
                    where="tuning",
                    hint=f"name {owner} to train all of it, or untie the two first",
                )
        selected.update(matches)
    names = [name for name in parameters if name in selected]
    for name in names:
        parameters[name].requires_grad_(True)
    return names


def _nearest_names(pattern: str, names: Iterable[str]) -> list[str]:
    """Up to three parameters or modules with names close to `pattern`."""
    parts = [name.split(".") for name in names]
    known = list(dict.fromkeys(".".join(p[:end]) for p in parts for end in range(1, len(p) + 1)))
    return difflib.get_close_matches(pattern.strip("*."), known, n=3, cutoff=0.5) or known[-3:]


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name. Raises `TuningError` if there are none."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise TuningError("no weight is trainable", where="tuning", expected="at least one trainable weight")
    return parameters


def copy_state(target: Mapping[str, Tensor], state: Mapping[str, Tensor], kind: str) -> None:
    """Copy `state` into `target`, in place. Raises `TuningError`, before anything changes, if names or shapes differ."""
    missing, unknown = sorted(target.keys() - state.keys()), sorted(state.keys() - target.keys())
    if missing or unknown:
        raise TuningError(
            f"the state {f'lacks {missing[0]}' if missing else f'has the unknown tensor {unknown[0]}'}",
            where="tuning",
            expected=f"a state of `{kind}` with the same options",
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


def load_or_detach(tuning: Tuning, state: Mapping[str, Tensor]) -> None:
    """Load `state`; if it does not fit, detach the tuning and raise `TuningError`."""
    try:
        tuning.load(state)
    except TuningError:
        tuning.detach()
        raise


def check_mergeable(weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Raise `TuningError` unless `weights` are fp32 and all `tensors` finite.

    An update is often smaller than half a unit in the last place of a bf16 weight: merging would round it away.
    """
    for name, weight in weights.items():
        if weight.dtype != torch.float32:
            raise TuningError(
                f"{name} is {weight.dtype}, in which merging would round small updates away",
                where="tuning",
                expected="weights in torch.float32",
                hint="load the base in float32 (or call model.float()), merge, then cast",
            )
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise TuningError(f"{name} contains NaN or infinite values", where="tuning")


def check_choice(value: str, choices: Mapping[str, object] | Sequence[str], option: str) -> None:
    """Raise `TuningError` for an unknown value of an option, naming the nearest."""
    if value not in choices:
        raise TuningError(
            f"unknown {option} '{value}'",
            where=f"tuning.{option}",
            expected=f"one of {', '.join(choices)}",
            hint=suggest_nearest(value, choices),
        )


def check_ranges(values: Mapping[str, Any], ranges: Mapping[str, tuple[bool, str]]) -> None:
    """Raise `TuningError` for the first option out of range; `ranges` gives (is valid, allowed values) by option."""
    for option, (is_valid, expected) in ranges.items():
        if not is_valid:
            raise TuningError(f"{option} is {values[option]!r}", where=f"tuning.{option}", expected=expected)
