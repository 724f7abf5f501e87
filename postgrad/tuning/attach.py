"""Attaching a tuning to a model by its options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from postgrad.config.quantities import load_function
from postgrad.config.tunings import find_tuning, known_tunings
from postgrad.errors import TuningError, suggest_nearest
from postgrad.tuning.tuning import Tuning

_MAX_SIZE = 1 << 16


def attach(
    model: PreTrainedModel,
    options: Mapping[str, Any],
    *,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Tuning:
    """Attach the tuning of the given `kind`, built with the other options as keyword arguments.

    `seed` initialises new tensors, unless the options have one of their own. Raises `TuningError` for an unknown kind or
    option, naming the nearest.
    """
    keywords = dict(options)
    kind = keywords.pop("kind", None)
    tuning_class = _get_tuning_class(kind)
    parameters = set(inspect.signature(tuning_class).parameters)
    known = parameters - {"model", "tokenizer", "kind"}
    for name in keywords:
        if name not in known:
            raise TuningError(
                f"`{kind}` has no option '{name}'",
                where=f"tuning.{name}",
                expected=", ".join(sorted(known - {"seed"})) or "no options",
                hint=suggest_nearest(name, known),
            )
        _check_size(name, keywords[name])
    arguments = {"seed": seed, **keywords, "tokenizer": tokenizer, "kind": kind}
    return tuning_class(model, **{name: value for name, value in arguments.items() if name in parameters})


def _check_size(name: str, value: Any) -> None:
    """Raise `TuningError` for an option that would make a tensor of absurd size: a rank, width, length or count."""
    values = value.values() if isinstance(value, Mapping) else [value]
    if name != "seed" and any(isinstance(number, int) and abs(number) > _MAX_SIZE for number in values):
        raise TuningError(f"`{name}` is {value}", where=f"tuning.{name}", expected=f"at most {_MAX_SIZE:,}")


def _get_tuning_class(kind: object) -> Callable[..., Tuning]:
    """The class of a kind; only its own module is imported. Raises `TuningError` for an unknown kind."""
    tuning = find_tuning(kind)
    if tuning is None:
        kinds = known_tunings()
        raise TuningError(
            "`kind` is missing" if kind is None else f"unknown kind '{kind}'",
            where="tuning.kind",
            expected=", ".join(kinds),
            hint=suggest_nearest(str(kind), kinds),
        )
    return load_function(tuning.implementation)
