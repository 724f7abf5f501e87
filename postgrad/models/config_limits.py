"""Limits of the numbers in a model's configuration, checked in its JSON before anything is built or allocated.

Transformers makes lists as long as the number of layers, dictionaries as long as the number of labels, and modules of any size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from postgrad.errors import ModelError

_UNCHECKED = re.compile(r"token|theta|base|model_max_length|param|_id$|seed|temperature|rate")
_COUNTED = re.compile(r"(layers|heads|vocab_size|hidden_size)$")
_LIMITS: tuple[tuple[re.Pattern[str], int], ...] = (
    (re.compile(r"layer|block|depth|stage"), 1024),
    (re.compile(r"label|class|choice"), 1 << 20),
    (re.compile(r""), 1 << 26),  # sizes: the largest are vocabularies (0.3 M) and positions (10 M)
)

_WEIGHTS_PER_BYTE = 8
"""Weights that a byte of a file may hold, at most: those of one bit."""
_FREE_WEIGHTS = 1 << 24
"""Weights that a file may lack: a task layer, and tables that are computed."""


def check_config_numbers(raw: Mapping[str, Any], name: str, where: str) -> None:
    """Raise `ModelError` for a configuration with a size below zero or far beyond that of any model."""
    for key, value in _iter_numbers(raw):
        leaf = key.rpartition(".")[2]
        if _UNCHECKED.search(leaf):
            continue
        limit = next(limit for pattern, limit in _LIMITS if pattern.search(leaf))
        if abs(value) > limit or (value < 0 and _COUNTED.search(leaf)):
            raise ModelError(
                f"the configuration of {name} has {key}: {value:,}",
                where=where,
                expected=f"0 to {limit:,}",
                hint=f"correct `{leaf}` in its config.json",
            )


def check_weight_file(
    folder: Path, layers: int | None, count_weights: Callable[[], int], name: str, where: str = "model"
) -> None:
    """Raise `ModelError` for a configuration of a far larger model than the weights in its folder.

    `layers`: blocks of the configuration. `count_weights` counts its weights, without allocating them.
    """
    files = list(folder.glob("model*.safetensors"))
    try:
        tensors = sum(len(_tensor_names(file)) for file in files)
    except (OSError, SafetensorError):
        return  # loading them says what is wrong
    stored = sum(file.stat().st_size for file in files)
    if not files:
        return
    hint = "restore the config.json that belongs to the weights"
    if layers is not None and layers > max(tensors, 1):
        raise ModelError(
            f"the configuration of {name} has {layers:,} layers, and its weights are {tensors:,} tensors",
            where=where,
            hint=hint,
        )
    weights = count_weights()
    if weights > _WEIGHTS_PER_BYTE * stored + _FREE_WEIGHTS:
        raise ModelError(
            f"the configuration of {name} has {weights:,} weights, and its files {stored:,} bytes",
            where=where,
            hint=hint,
        )


def _tensor_names(file: Path) -> list[str]:
    with safe_open(file, "pt") as tensors:
        return list(tensors.keys())


def _iter_numbers(value: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, int | float]]:
    """The numbers of a configuration and of those inside it, with their keys."""
    for key, item in value.items():
        here = f"{path}.{key}" if path else str(key)
        if isinstance(item, Mapping):
            yield from _iter_numbers(item, here)
        elif isinstance(item, int | float) and not isinstance(item, bool):
            yield here, item
