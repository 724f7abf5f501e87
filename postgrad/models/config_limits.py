"""Limits of the numbers in a model's configuration, checked in its JSON before anything is built or allocated.

Transformers makes lists as long as the number of layers, dictionaries as long as the number of labels, and modules of any size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from postgrad.errors import ModelError

_UNCHECKED = re.compile(r"token|theta|base|model_max_length|param|_id$|seed|temperature|rate")
_LIMITS: tuple[tuple[re.Pattern[str], int], ...] = (
    (re.compile(r"layer|block|depth|stage"), 1024),
    (re.compile(r"label|class|choice"), 1 << 20),
    (re.compile(r""), 1 << 26),  # sizes: the largest are vocabularies (0.3 M) and positions (10 M)
)


def check_config_numbers(raw: Mapping[str, Any], name: str, where: str) -> None:
    """Raise `ModelError` for a configuration with a size far beyond that of any model."""
    for key, value in _iter_numbers(raw):
        leaf = key.rpartition(".")[2]
        if _UNCHECKED.search(leaf):
            continue
        limit = next(limit for pattern, limit in _LIMITS if pattern.search(leaf))
        if abs(value) > limit:
            raise ModelError(
                f"the configuration of {name} has {key}: {value:,}" if isinstance(value, int) else f"{key}: {value}",
                where=where,
                expected=f"at most {limit:,}",
                hint=f"correct `{leaf}` in its config.json",
            )


def _iter_numbers(value: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, int | float]]:
    """The numbers of a configuration and of those inside it, with their keys."""
    for key, item in value.items():
        here = f"{path}.{key}" if path else str(key)
        if isinstance(item, Mapping):
            yield from _iter_numbers(item, here)
        elif isinstance(item, int | float) and not isinstance(item, bool):
            yield here, item
