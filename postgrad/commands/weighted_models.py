"""Models with weights, as options name them: `MODEL`, `MODEL=0.5`, `MODEL=0,0.5,1`."""

from __future__ import annotations

from pathlib import Path

from postgrad.errors import StageError

MAX_WEIGHT = 1e6


def parse_weights(text: str, where: str = "--weights") -> list[float]:
    """Weights with commas between them. Raises `StageError` for anything else, NaN and sums that would overflow included."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(abs(weight) <= MAX_WEIGHT for weight in found):
        raise StageError(f"{text!r} is not a list of weights", where=where, expected="0,0.5,1")
    return found


def parse_weighted_model(text: str, where: str) -> tuple[str, list[float]]:
    """The name and the weights of a model; one without weights has weight 1. Raises `StageError`."""
    name, separator, weights = text.rpartition("=")
    if not separator or Path(text).exists():
        return text, [1.0]
    return name, parse_weights(weights, where)
