"""Files of weight importance: one safetensors tensor per weight, by its name in the plain model.

The metadata has the kind, the divisor, the number of tokens, the model it was measured on, and how well two halves of the
text agree.
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
from postgrad.models.finite import refuse_non_finite
from postgrad.storage.regular_file import open_regular_file

FORMAT = 1
METADATA_KEY = "importance"
ImportanceKind = Literal["fisher", "empirical", "mas", "activation"]
KIND_DESCRIPTIONS: dict[ImportanceKind, str] = {
    "fisher": "the diagonal Fisher information, labels drawn from the model",
    "empirical": "squared gradients of the text's own labels, sample by sample: biased, small where the text is known",
    "mas": "the size of the gradient of the squared norm of the logits, sample by sample",
    "activation": "the size of each weight times that of its input, of the linear layers in the blocks; no backward pass",
}


@dataclass(frozen=True)
class ImportanceMetadata:
    """Metadata of an importance file."""

    kind: ImportanceKind
    per: str
    """Divisor of the sums: `token` (each trained token), or `label` (of a classifier)."""
    tokens: int
    """Number of tokens or labels measured."""
    model: str
    fingerprint: str | None
    """Fingerprint of the model it was measured on; None for a model from the Hub."""
    mean: float
    """Mean over all weight entries."""
    convergence: list[dict[str, float]] = field(default_factory=list)
    onto: dict[str, Any] | None = None
    """Of a decayed sum (online EWC): metadata of the older importance, and `decay`."""


def locate_importance_file(name: str, root: Path, where: str) -> Path:
    """The path of an importance file that the key `where` names, relative to `root`. Raises `DataError` without the file."""
    path = (root / Path(name).expanduser()).resolve()
    if not path.exists():
        raise DataError(
            f"there is no file {name} in {root.resolve()}",
            where=where,
            hint=f"measure it first: postgrad importance MODEL FILES... --out {name}",
        )
    return path


class ImportanceFile:
    """An importance file; its tensors are memory-mapped."""

    def __init__(self, path: Path) -> None:
        """Raises `DataError` when the file is unreadable, or no importance file."""
        self.path = path
        try:
            open_regular_file(path).close()
            self._file = safe_open(path, "pt")
            metadata = self._file.metadata() or {}
        except (OSError, SafetensorError) as error:
            reason = error.strerror if isinstance(error, OSError) else None
            raise DataError(
                f"the importance file is unreadable: {reason or error}",
                where=str(path),
                expected="a file written by `postgrad importance`",
            ) from error
        self.metadata = _parse_metadata(metadata.get(METADATA_KEY), path)
        self.names = frozenset(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight's importance."""
        return tuple(self._file.get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        """The importance of a weight, in the dtype of the file. Raises `DataError` for values that are none."""
        tensor = self._file.get_tensor(name)
        refuse_non_finite([(name, tensor)], "the importance", where=str(self.path), error=DataError)
        if tensor.numel() and float(tensor.min()) < 0:
            raise DataError(
                f"{name} has negative importance",
                where=str(self.path),
                expected="importance of zero or more",
                hint="measure it again: postgrad importance MODEL FILES... --out FILE",
            )
        return tensor

    def check_model(self, reference: str, fingerprint: str | None, where: str) -> None:
        """Raise `DataError` for importance that was measured on another model than `reference`, of this fingerprint."""
        # A model from the Hub has a name but no fingerprint.
        measured_on, wanted = self.metadata.fingerprint or self.metadata.model, fingerprint or reference
        if measured_on != wanted:
            raise DataError(
                f"the importance was measured on {self.metadata.model} (fingerprint {measured_on}), and the reference is "
                f"{reference} (fingerprint {wanted})",
                where=where,
                expected="importance of the reference model",
                hint="measure it on the reference, or set `reference` to the model it was measured on",
            )

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise `DataError` when names or shapes differ from these weights."""
        missing, unknown = sorted(shapes.keys() - self.names), sorted(self.names - shapes.keys())
        if missing or unknown:
            difference = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which this model does not have"
            raise DataError(
                f"the importance {difference}", where=str(self.path), expected="importance of the same weights"
            )
        for name, shape in shapes.items():
            if self.shape(name) != shape:
                raise DataError(
                    f"the importance of {name} has shape {self.shape(name)}, this model's weight {shape}",
                    where=str(self.path),
                    expected="importance of the same weights",
                )


def _parse_metadata(text: str | None, path: Path) -> ImportanceMetadata:
    try:
        metadata = json.loads(text or "")
        if metadata.pop("format") != FORMAT:
            raise ValueError("another format")
        return ImportanceMetadata(**metadata)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            "the file has no valid importance metadata",
            where=str(path),
            expected="a file written by `postgrad importance` of this version",
        ) from error


def write_importance(
    path: Path, tensors: Mapping[str, Tensor], metadata: ImportanceMetadata, dtype: torch.dtype
) -> None:
    """Write importance in `dtype`. Raises `OSError`."""
    stored = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    save_file(stored, path, metadata={METADATA_KEY: json.dumps({"format": FORMAT, **asdict(metadata)}, sort_keys=True)})


def accumulate_importance(old: ImportanceFile, new: Mapping[str, Tensor], decay: float) -> dict[str, Tensor]:
    """`decay * old + new`, weight by weight: online EWC (Schwarz et al. 2018, arXiv 1805.06370, section 4).

    Raises `DataError` when their weights differ.
    """
    old.check_shapes({name: tuple(tensor.shape) for name, tensor in new.items()})
    return {name: decay * old[name].to(tensor.device, torch.float32) + tensor for name, tensor in new.items()}
