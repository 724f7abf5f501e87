"""The files of a source, hashed by content; caches are keyed by these hashes.

A memo of hashes by path, size and time saves reading unchanged files again.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from postgrad.data.read.documents import READING, read_labels
from postgrad.data.read.files import HubDataset, RawSource
from postgrad.data.read.labels import Labels, merge_labels
from postgrad.data.tokens.store import FORMAT
from postgrad.errors import DataError, DiskError, MissingExtra
from postgrad.storage.atomic import sha256
from postgrad.storage.checked_files import read_cached_json, write_checked_json

_CLOCK_GRAIN_NS = 2e9
"""A file this young may change again without a new modification time, so its hash is not memoised."""


@dataclass(frozen=True)
class SourceFiles:
    """The current files of a source (path, size, time), and a hash of their contents."""

    fingerprint: str
    size: int
    files: tuple[tuple[Path, int, int], ...] = ()
    where: str = ""

    @classmethod
    def from_source(cls, source: RawSource, cache: Path) -> SourceFiles:
        """Hash the files of a source. Raises `DataError` when one cannot be read."""
        if source.path is not None:
            files: Sequence[Path] = source.list_files().files
        else:
            assert source.hub is not None
            hub, folder = source.hub, source.root / source.hub.name
            if not folder.is_dir():
                return cls(hash_json([hub.name, hub.subset, hub.split, _hub_revision(hub, source.where)]), 0)
            files = sorted(file for file in folder.rglob("*") if file.is_file())
        memo_file = cache / "hashes.json"
        memo = read_cached_json(memo_file, dict[str, tuple[int, int, str]]) or {}
        stats: list[tuple[Path, int, int]] = []
        hashes: list[list[str]] = []
        new_keys: list[str] = []
        try:
            for file in files:
                stat = file.stat()
                key, state = str(file.absolute()), (stat.st_size, stat.st_mtime_ns)
                if memo.get(key, (0, 0))[:2] != state:
                    memo[key] = (*state, sha256(file))
                    new_keys.append(key)
                stats.append((file, stat.st_size, stat.st_mtime_ns))
                hashes.append([*file.suffixes[-2:], memo[key][2]])
                if time.time_ns() - stat.st_mtime_ns < _CLOCK_GRAIN_NS:
                    del memo[key]
        except OSError as error:
            raise DataError(
                f"cannot read {error.filename}: {error.strerror}", where=source.where, expected="a readable file"
            ) from None
        if any(key in memo for key in new_keys):
            _write_memo(memo_file, memo)
        parts = hashes if source.hub is None else [source.hub.subset, source.hub.split, hashes]
        return cls(hash_json(parts), sum(size for _, size, _ in stats), tuple(stats), source.where)

    def check_unchanged(self) -> None:
        """Raise `DataError` when a file has changed since it was hashed."""
        for file, size, time_ns in self.files:
            try:
                stat = file.stat()
            except OSError:
                stat = None
            if stat is None or (stat.st_size, stat.st_mtime_ns) != (size, time_ns):
                raise DataError(
                    f"{file} changed while it was being read",
                    where=self.where,
                    expected="a file that does not change",
                )


def source_fingerprint(source: RawSource, cache: Path) -> str:
    """A hash of the current contents of a source's files. Raises `DataError` when one cannot be read."""
    return SourceFiles.from_source(source, cache).fingerprint


def read_all_labels(sources: Sequence[RawSource], cache: Path) -> Labels:
    """The labels of labelled or tagged sources together, cached by the contents of their files.

    Raises `DataError` as `read_labels` does, and when the sources have labels of different types.
    """
    return merge_labels(_cached_labels(source, cache) for source in sources)


def _cached_labels(source: RawSource, cache: Path) -> Labels:
    fingerprint, columns = source_fingerprint(source, cache), dict(source.columns)
    key = [FORMAT, READING, fingerprint, columns, source.kind, sorted_filter(source), source.no_label]
    memo_file = cache / "labels" / f"{hash_json(key)}.json"
    if labels := read_cached_json(memo_file, Labels, hash_json(key)):
        return labels
    labels = read_labels(source)
    _write_memo(memo_file, asdict(labels), hash_json(key))
    return labels


def sorted_filter(source: RawSource) -> dict[str, list[str]]:
    """The row filter of a source in a canonical order."""
    return {column: sorted(values) for column, values in source.row_filter.items()}


def hash_json(value: Any) -> str:
    """sha256 of a value as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _write_memo(file: Path, memo: Mapping[str, Any], key: str = "") -> None:
    with suppress(DiskError):  # it can be computed again
        write_checked_json(file, memo, key)


def _hub_revision(hub: HubDataset, where: str) -> str:
    """The current commit of a Hub data set, so that a changed data set has another fingerprint."""
    if hub.revision and re.fullmatch(r"[0-9a-f]{40}", hub.revision):
        return hub.revision
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise MissingExtra(
            "reading from the Hub needs the package datasets", where=where, hint="pip install datasets"
        ) from None
    try:
        return str(HfApi().dataset_info(hub.name, revision=hub.revision).sha)
    except Exception as error:  # of its HTTP client
        raise DataError(
            f"cannot get the revision of {hub.name} from the Hub ({type(error).__name__})",
            where=where,
            expected="an existing data set, and a connection",
            hint="name a folder, or set `revision` to a commit of 40 digits",
        ) from None
