"""Cached teacher predictions: a few ids for each label (sampled or top-k), in a memory-mapped folder.

    teacher_cache.json  description that identifies the rows (store, layout, order), the teacher and the cache options
    part-00000/         published when complete, so that a killed process resumes after the last part:
      digests.npy           of every row's ids and labels, as the teacher read them
      label_offsets.npy     where each row's labels start, and where the last one's end
      id_offsets.npy        where each row's ids start, likewise
      counts.npy            number of ids of each label
      ids.npy
      weights.npy           their sample counts (samples of the plain distribution), or weights
      rest_or_entropy.npy   of each label: probability of all other ids (top-k), or entropy of the distribution (samples)

A row that differs from what the teacher read is refused. Legend: R rows of a part, N labels, E ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from postgrad.data.layouts.rows import Row
from postgrad.data.tokens.store import token_dtype
from postgrad.errors import DataError
from postgrad.storage.atomic import publish_folder, remove_folder
from postgrad.storage.checked_files import read_cached_json, write_checked_json
from postgrad.storage.fingerprint import differences, fingerprint
from postgrad.storage.verification import is_intact

DESCRIPTION = "teacher_cache.json"
_FORMAT = 2
_LABELS_PER_PART = 1 << 18
_REBUILD_HINT = "delete this folder; the predictions are computed again"


class SparseDistribution(NamedTuple):
    """Predictions for the labels of a row: `ids_E` with `weights_E`, of which each label has `counts_N`."""

    ids_E: np.ndarray
    weights_E: np.ndarray
    counts_N: np.ndarray
    rest_or_entropy_N: np.ndarray


class TeacherCache:
    """The cached predictions for some rows. `keys` are the rows (by number or by position), in ascending order."""

    def __init__(self, folder: Path, description: Mapping[str, Any], keys: np.ndarray, labels_per_row: float) -> None:
        """Raises `DataError` when the folder holds predictions for other rows or options; a broken description is ignored."""
        self.folder, self.keys = folder, keys
        self.description: dict[str, Any] = json.loads(json.dumps({**description, "keys": fingerprint(keys.tolist())}))
        self.rows_per_part = max(1, round(_LABELS_PER_PART / max(labels_per_row, 1.0)))
        stored = read_cached_json(folder / DESCRIPTION, dict[str, Any], folder.name)
        if stored not in (None, self.description):
            raise DataError(
                f"the teacher predictions have the key {fingerprint(stored)}, and these rows have "
                f"{fingerprint(self.description)}: {'; '.join(differences(stored, self.description)[:3])}",
                where=str(folder),
                expected="predictions of this teacher for these rows",
                hint=_REBUILD_HINT,
            )

    @classmethod
    def open_in(
        cls, parent: Path, description: Mapping[str, Any], keys: np.ndarray, labels_per_row: float
    ) -> TeacherCache:
        """The cache in a folder under `parent` whose name is a hash of the description and the keys."""
        return cls(parent / fingerprint([_FORMAT, description, keys.tolist()]), description, keys, labels_per_row)

    @property
    def part_count(self) -> int:
        """Parts of a complete cache."""
        return -(-len(self.keys) // self.rows_per_part)

    def missing_parts(self) -> list[int]:
        """The parts that are not published yet, or damaged."""
        return [i for i in range(self.part_count) if not is_intact(self._part_folder(i), self.folder.parents[1])]

    def part_keys(self, part: int) -> np.ndarray:
        """The keys of a part's rows."""
        return self.keys[part * self.rows_per_part : (part + 1) * self.rows_per_part]

    def write_part(
        self, part: int, distributions: Sequence[SparseDistribution], digests: Sequence[int], *, vocabulary: int
    ) -> None:
        """Publish the predictions for a part's rows."""
        if read_cached_json(self.folder / DESCRIPTION, dict[str, Any], self.folder.name) is None:
            write_checked_json(self.folder / DESCRIPTION, self.description, self.folder.name)
        counts_N = np.concatenate([each.counts_N for each in distributions])
        arrays = {
            "digests": np.array(digests, np.uint64),
            "label_offsets": np.cumsum([0, *(len(each.counts_N) for each in distributions)]),
            "id_offsets": np.cumsum([0, *(len(each.ids_E) for each in distributions)]),
            "counts": counts_N.astype(np.uint8 if counts_N.max(initial=0) < 256 else np.uint32),
            "ids": np.concatenate([each.ids_E for each in distributions]).astype(token_dtype(vocabulary)),
            "weights": np.concatenate([each.weights_E for each in distributions]),
            "rest_or_entropy": np.concatenate([each.rest_or_entropy_N for each in distributions]).astype(np.float16),
        }

        def save(folder: Path) -> None:
            for name, array in arrays.items():
                np.save(folder / f"{name}.npy", array, allow_pickle=False)

        if self._part_folder(part).exists():  # damaged
            remove_folder(self._part_folder(part))
        publish_folder(self._part_folder(part), save)
        self._load_part.cache_clear()

    def lookup(self, key: int, row: Row) -> SparseDistribution:
        """The predictions for a row. Raises `DataError` for an unknown key, and for a row that has changed."""
        entry = int(np.searchsorted(self.keys, key))
        if entry == len(self.keys) or self.keys[entry] != key:
            raise DataError(f"no teacher prediction for row {key:,}", where=str(self.folder))
        part, local = divmod(entry, self.rows_per_part)
        arrays = self._load_part(part)
        digest = row_digest(row)
        if digest != int(arrays["digests"][local]):
            raise DataError(
                f"row {key:,} has the digest {digest:016x}, and the teacher read {int(arrays['digests'][local]):016x}",
                where=str(self.folder),
                expected="the rows that the teacher read",
                hint=_REBUILD_HINT,
            )
        labels = slice(*arrays["label_offsets"][local : local + 2].tolist())
        ids = slice(*arrays["id_offsets"][local : local + 2].tolist())
        weights_E = arrays["weights"][ids].astype(np.float32)
        if arrays["weights"].dtype == np.uint8:
            weights_E /= self._options.get("samples", self._options.get("draws"))
        return SparseDistribution(
            arrays["ids"][ids].astype(np.int64),
            weights_E,
            arrays["counts"][labels].astype(np.int64),
            arrays["rest_or_entropy"][labels].astype(np.float32),
        )

    @property
    def _options(self) -> dict[str, Any]:
        return self.description["asked"]

    @property
    def has_rest_mass(self) -> bool:
        """Whether `rest_or_entropy_N` is the probability of all other ids."""
        return "k" in self._options

    @cached_property
    def _load_part(self) -> Any:
        @lru_cache(maxsize=64)
        def load(part: int) -> dict[str, np.ndarray]:
            folder = self._part_folder(part)
            try:
                return {path.stem: np.load(path, mmap_mode="r", allow_pickle=False) for path in folder.glob("*.npy")}
            except (OSError, ValueError) as error:
                raise DataError(
                    f"cannot read teacher predictions: {error}", where=str(folder), hint=_REBUILD_HINT
                ) from error

        return load

    def _part_folder(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}"

    def size_bytes(self) -> int:
        """Size of the published parts on disk."""
        return sum(path.stat().st_size for path in self.folder.glob("part-*/*.npy"))


def row_digest(row: Row) -> int:
    """An 8-byte hash of a row's inputs, labels and contexts."""
    hasher = hashlib.blake2b(digest_size=8)
    for name in sorted(row.inputs):
        hasher.update(name.encode())
        hasher.update(np.ascontiguousarray(row.inputs[name]).tobytes())
    hasher.update(np.ascontiguousarray(row.labels).tobytes())
    for context in row.contexts:
        hasher.update(np.array([context.position, *context.ids], np.int64).tobytes())
    return int.from_bytes(hasher.digest(), "little")
