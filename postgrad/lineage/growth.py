"""What growing a vocabulary cost on old text, in the grown model's folder: a lineage that starts there begins behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from postgrad.lineage.record import RecordPart
from postgrad.storage.checked_files import read_cached_json, write_checked_json

GROWTH = "growth.json"


class GrowthCost(RecordPart):
    """The loss of old text before and after a vocabulary has grown, in bits per byte."""

    model: str
    """The model before."""
    before: float
    after: float

    @property
    def relative(self) -> float:
        """The rise as a share of the loss before."""
        return self.after / self.before - 1 if self.before > 0 else 0.0

    def sentence(self) -> str:
        """What it cost, in words."""
        bits = f"{self.before:.3f} to {self.after:.3f} bits per byte ({self.relative:+.1%})"
        return f"growing the vocabulary of {self.model} moved old text from {bits} before any training"


def write_growth(folder: Path, cost: GrowthCost) -> None:
    """Write the cost beside a grown model."""
    write_checked_json(folder / GROWTH, cost.as_json(), without_secrets=True)


def read_growth(folder: Path) -> GrowthCost | None:
    """The cost that a folder keeps; None for a model that was not grown, or of which it was not measured."""
    document = read_cached_json(folder / GROWTH, dict[str, Any])
    try:
        return GrowthCost.model_validate(document) if document else None
    except ValidationError:
        return None
