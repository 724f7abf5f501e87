"""Models with weights, as options name them: `MODEL`, `MODEL=0.5`, `MODEL=0,0.5,1`."""

from __future__ import annotations

import math
from pathlib import Path

from postgrad.errors import StageError


def parse_weights(text: str, where: str = "--weights") -> list[float]:
    """Weights with commas between them. Raises `StageError`."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(map(math.isfinite, found)):
        raise StageError(f"{text!r} is not a list of weights", where=where, expected="0,0.5,1")
    return found


def parse_weighted_model(text: str, where: str) -> tuple[str, list[float]]:
    """The name and the weights of a model; one without weights has weight 1. Raises `StageError`."""
    name, separator, weights = text.rpartition("=")
    if not separator or Path(text).exists():
        return text, [1.0]
    return name, parse_weights(weights, where)
