"""Attaching a tuning to a model by its options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from postgrad.config.renamed_keys import upgrade_tuning_options
from postgrad.errors import TuningError, suggest_nearest
from postgrad.tuning.tuning import Tuning

KINDS = (
    "full",
    "head",
    "blocks",
    "bias",
    "norm",
    "adapter",
    "prefix",
    "p-tuning-v2",
    "prompt",
    "p-tuning",
    "instruction-prompt",
    "lora",
    "osf",
    "expand",
)


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
    keywords = upgrade_tuning_options(options)
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
    arguments = {"seed": seed, **keywords, "tokenizer": tokenizer, "kind": kind}
    return tuning_class(model, **{name: value for name, value in arguments.items() if name in parameters})


def _get_tuning_class(kind: object) -> Callable[..., Tuning]:
    """The class of a kind; only its own module is imported. Raises `TuningError` for an unknown kind."""
    match kind:
        case "full":
            from postgrad.tuning.weight_subsets import FullFinetuning

            return FullFinetuning
        case "head":
            from postgrad.tuning.weight_subsets import HeadFinetuning

            return HeadFinetuning
        case "blocks":
            from postgrad.tuning.weight_subsets import BlockFinetuning

            return BlockFinetuning
        case "bias":
            from postgrad.tuning.weight_subsets import BitFit

            return BitFit
        case "norm":
            from postgrad.tuning.weight_subsets import NormFinetuning

            return NormFinetuning
        case "adapter":
            from postgrad.tuning.adapter import Adapter

            return Adapter
        case "prefix" | "p-tuning-v2":
            from postgrad.tuning.prefix import Prefix

            return Prefix
        case "prompt" | "p-tuning" | "instruction-prompt":
            from postgrad.tuning.prompt import PromptTuning

            return PromptTuning
        case "lora":
            from postgrad.tuning.lora import LoraAdapter

            return LoraAdapter
        case "osf":
            from postgrad.tuning.osf import OrthogonalSubspace

            return OrthogonalSubspace
        case "expand":
            from postgrad.tuning.block_expansion import BlockExpansion

            return BlockExpansion
    raise TuningError(
        "`kind` is missing" if kind is None else f"unknown kind '{kind}'",
        where="tuning.kind",
        expected=", ".join(KINDS),
        hint=suggest_nearest(str(kind), KINDS),
    )
