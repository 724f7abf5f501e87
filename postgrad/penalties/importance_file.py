"""How does the importance of weights lie in a file, and is it that of these weights?

A safetensors file with one tensor a weight, by the names that weights have in the plain model, and in its metadata what the
numbers are: kind, convention, tokens, the model they were measured on, and how far two halves of the text agree.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from postgrad.errors import DataError

FORMAT = 1
METADATA_KEY = "importance"
ImportanceKind = Literal["fisher", "empirical", "mas"]
KIND_DESCRIPTIONS: dict[ImportanceKind, str] = {
    "fisher": "the diagonal Fisher information, labels drawn from the model",
    "empirical": "squared gradients of the text's own labels, sample by sample: biased, small where the text is known",
    "mas": "the size of the gradient of the squared norm of the logits, sample by sample",
}


@dataclass(frozen=True)
class ImportanceMetadata:
    """What a file of importance says of itself."""

    kind: ImportanceKind
    per: str
    """What the sums are divided by: `token` (each trained token), or `label` (of a classifier)."""
    tokens: int
    """How many of them were looked at."""
    model: str
    fingerprint: str | None
    """Of the model that it was measured on; None for a model that is known by a name alone."""
    mean: float
    """Over all weights."""
    convergence: list[dict[str, float]] = field(default_factory=list)
    onto: dict[str, Any] | None = None
    """Of a decayed sum (online EWC): what the older importance said of itself, and `decay`."""


class ImportanceFile:
    """A file of importance; its tensors are mapped, not read."""

    def __init__(self, path: Path) -> None:
        """Raises `DataError` when it cannot be read, or holds something else."""
        self.path = path
        try:
            self._file = safe_open(path, "pt")
            metadata = self._file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"the importance cannot be read: {error}",
                where=str(path),
                expected="a file that `postgrad importance` wrote",
            ) from error
        self.metadata = _parse_metadata(metadata.get(METADATA_KEY), path)
        self.names = frozenset(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight's importance."""
        return tuple(self._file.get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        """The importance of a weight, as it is stored."""
        return self._file.get_tensor(name)

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise `DataError` when it is not of exactly these weights; both shapes are named."""
        missing, unknown = sorted(shapes.keys() - self.names), sorted(self.names - shapes.keys())
        if missing or unknown:
            what = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which this model has not"
            raise DataError(f"the importance {what}", where=str(self.path), expected="importance of the same weights")
        for name, shape in shapes.items():
            if self.shape(name) != shape:
                raise DataError(
                    f"the importance of {name} has the shape {self.shape(name)}, and this model's weight {shape}",
                    where=str(self.path),
                    expected="importance of the same weights",
                )


def _parse_metadata(text: str | None, path: Path) -> ImportanceMetadata:
    try:
        found = json.loads(text or "")
        if found.pop("format") != FORMAT:
            raise ValueError("another format")
        return ImportanceMetadata(**found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            "the file does not say what importance it holds",
            where=str(path),
            expected="a file that `postgrad importance` of this version wrote",
        ) from error


def write_importance(
    path: Path, tensors: Mapping[str, Tensor], metadata: ImportanceMetadata, dtype: torch.dtype
) -> None:
    """Write importance in `dtype`. Raises `OSError`."""
    kept = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    save_file(kept, path, metadata={METADATA_KEY: json.dumps({"format": FORMAT, **asdict(metadata)}, sort_keys=True)})


def accumulate_importance(old: ImportanceFile, new: Mapping[str, Tensor], decay: float) -> dict[str, Tensor]:
    """`decay * old + new`, weight by weight: online EWC (Schwarz et al. 2018, arXiv 1805.06370, section 4).

    Raises `DataError` when the two are not of the same weights.
    """
    old.check_shapes({name: tuple(tensor.shape) for name, tensor in new.items()})
    return {name: decay * old[name].to(tensor.device, torch.float32) + tensor for name, tensor in new.items()}
