"""What did a teacher say of rows before the training? A few ids for each label, in a folder that is read as it is needed.

    told.json      what decides it: the rows (their store, layout and order), the teacher, and how it was asked
    part-00000/    published when it is whole, so that a killed process goes on behind the last part:
      digests.npy    of every row's ids and labels, as they were when the teacher read them
      labels.npy     where each row's labels begin, and where the last one's end
      firsts.npy     where each row's ids begin, likewise
      counts.npy     how many ids each label has
      ids.npy        they
      weights.npy    their counts (when drawn as they are) or weights
      said.npy       of each label the mass of all other ids, or the entropy of the teacher's distribution

A row that is not what the teacher read is refused. Legend: R rows of a part, N labels, E ids.
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
from postgrad.storage.atomic import publish_folder, write_atomically
from postgrad.storage.fingerprint import differences, fingerprint

DESCRIPTION = "told.json"
_LABELS_PER_PART = 1 << 18


class SparseDistribution(NamedTuple):
    """What was said of the labels of a row: `ids_E` with `weights_E`, `counts_N` of them for each label, and `said_N`."""

    ids_E: np.ndarray
    weights_E: np.ndarray
    counts_N: np.ndarray
    rest_or_entropy_N: np.ndarray


class TeacherCache:
    """A folder of what a teacher said of some rows; `keys` are those rows, by number or by position, in ascending order."""

    def __init__(self, folder: Path, description: Mapping[str, Any], keys: np.ndarray, labels_per_row: float) -> None:
        """Raises `DataError`, naming both, when the folder holds what was said of other rows or otherwise."""
        self.folder, self.keys = folder, keys
        self.description: dict[str, Any] = json.loads(json.dumps({**description, "keys": fingerprint(keys.tolist())}))
        self.rows_per_part = max(1, round(_LABELS_PER_PART / max(labels_per_row, 1.0)))
        if (folder / DESCRIPTION).exists():
            found = json.loads((folder / DESCRIPTION).read_text())
            if found != self.description:
                raise DataError(
                    f"what a teacher said there has the key {fingerprint(found)}, and these rows have "
                    f"{fingerprint(self.description)}: {'; '.join(differences(found, self.description)[:3])}",
                    where=str(folder),
                    expected="what was said of these very rows, by this teacher",
                    hint="delete this folder; the teacher is asked again",
                )

    @classmethod
    def open_in(
        cls, parent: Path, description: Mapping[str, Any], keys: np.ndarray, labels_per_row: float
    ) -> TeacherCache:
        """The folder under `parent` that is named by all that decides it."""
        name = fingerprint([description, keys.tolist()])
        return cls(parent / name, description, keys, labels_per_row)

    @property
    def part_count(self) -> int:
        """How many parts there are when all is told."""
        return -(-len(self.keys) // self.rows_per_part)

    def missing_parts(self) -> list[int]:
        """The parts that are not there yet."""
        return [i for i in range(self.part_count) if not self._part_folder(i).exists()]

    def part_keys(self, part: int) -> np.ndarray:
        """The rows of a part."""
        return self.keys[part * self.rows_per_part : (part + 1) * self.rows_per_part]

    def write_part(
        self, part: int, distributions: Sequence[SparseDistribution], digests: Sequence[int], *, vocabulary: int
    ) -> None:
        """Publish what was said of a part's rows."""
        if not (self.folder / DESCRIPTION).exists():
            write_atomically(self.folder / DESCRIPTION, json.dumps(self.description, indent=1))
        counts_N = np.concatenate([word.counts_N for word in distributions])
        arrays = {
            "digests": np.array(digests, np.uint64),
            "labels": np.cumsum([0, *(len(word.counts_N) for word in distributions)]),
            "firsts": np.cumsum([0, *(len(word.ids_E) for word in distributions)]),
            "counts": counts_N.astype(np.uint8 if counts_N.max(initial=0) < 256 else np.uint32),
            "ids": np.concatenate([word.ids_E for word in distributions]).astype(token_dtype(vocabulary)),
            "weights": np.concatenate([word.weights_E for word in distributions]),
            "said": np.concatenate([word.rest_or_entropy_N for word in distributions]).astype(np.float16),
        }

        def save(staged: Path) -> None:
            for name, array in arrays.items():
                np.save(staged / f"{name}.npy", array, allow_pickle=False)

        publish_folder(self._part_folder(part), save)
        self._load_part.cache_clear()

    def lookup(self, key: int, row: Row) -> SparseDistribution:
        """What was said of a row. Raises `DataError` when it was never asked about, or when it is another row now."""
        entry = int(np.searchsorted(self.keys, key))
        if entry == len(self.keys) or self.keys[entry] != key:
            raise DataError(f"the teacher was never asked about row {key:,}", where=str(self.folder))
        part, local = divmod(entry, self.rows_per_part)
        arrays = self._load_part(part)
        digest = row_digest(row)
        if digest != int(arrays["digests"][local]):
            raise DataError(
                f"row {key:,} is {digest:016x} now, and the teacher read {int(arrays['digests'][local]):016x}",
                where=str(self.folder),
                expected="the rows that the teacher was asked about",
                hint="delete this folder; the teacher is asked again",
            )
        labels, ids = (slice(*arrays[name][local : local + 2].tolist()) for name in ("labels", "firsts"))
        weights_E = arrays["weights"][ids].astype(np.float32)
        if "draws" in self.description["asked"] and arrays["weights"].dtype == np.uint8:
            weights_E /= self.description["asked"]["draws"]
        return SparseDistribution(
            arrays["ids"][ids].astype(np.int64),
            weights_E,
            arrays["counts"][labels].astype(np.int64),
            arrays["said"][labels].astype(np.float32),
        )

    @property
    def has_rest_mass(self) -> bool:
        """Whether `said_N` is the mass of all other ids, and not an entropy."""
        return "k" in self.description["asked"]

    @cached_property
    def _load_part(self) -> Any:
        @lru_cache(maxsize=64)
        def opened(part: int) -> dict[str, np.ndarray]:
            place = self._part_folder(part)
            try:
                return {path.stem: np.load(path, mmap_mode="r", allow_pickle=False) for path in place.glob("*.npy")}
            except (OSError, ValueError) as error:
                raise DataError(
                    f"what a teacher said cannot be read: {error}",
                    where=str(place),
                    hint="delete this folder; the teacher is asked again",
                ) from error

        return opened

    def _part_folder(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}"

    def size_bytes(self) -> int:
        """What the finished parts take on the disk."""
        return sum(path.stat().st_size for path in self.folder.glob("part-*/*.npy"))


def row_digest(row: Row) -> int:
    """Eight bytes that stand for all that a row is: what is read, and what is asked."""
    hashed = hashlib.blake2b(digest_size=8)
    for name in sorted(row.inputs):
        hashed.update(name.encode())
        hashed.update(np.ascontiguousarray(row.inputs[name]).tobytes())
    hashed.update(np.ascontiguousarray(row.labels).tobytes())
    return int.from_bytes(hashed.digest(), "little")
