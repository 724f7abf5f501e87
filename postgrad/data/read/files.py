"""Files of a source: their formats, their paths, and the description of a source.

A source is a file, a folder, a glob pattern or a Hub data set.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from postgrad.data.read.folders import FileListing, choose_files, matches_pattern
from postgrad.errors import DataError, format_names, suggest_path
from postgrad.storage.regular_file import describe_special_file

FILE_SUFFIXES = (".txt", ".md", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
COMPRESSIONS = (".gz", ".zst")
TEXT_SUFFIXES = (".txt", ".md")


@dataclass(frozen=True)
class HubDataset:
    """A data set of the Hugging Face Hub (or a folder that `datasets.load_dataset` can read)."""

    name: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None


class ContextColumn(NamedTuple):
    """A column with what only a teacher reads, and the template around its `{text}`."""

    column: str
    template: str


@dataclass(frozen=True)
class RawSource:
    """One source of a mixture: where its rows are, and how they become documents.

    Either `path` (relative to `root`) or `hub` is set. `columns` maps roles to columns (`{"text": "abstract"}`). `documents`:
    how a text file is split (`auto`, `file`, `passages`, `paragraphs`, `lines`). `where`: the key path in errors, such as
    `data.sources[0]`. `kind`: the kind of rows; `auto` detects it from the columns. `row_filter`: of each column, the values
    (as text) that a row must have one of. `no_label`: the whole number that means that a labelled row has no label.
    `splits`: of a folder with several splits, which is read: the first that it has. `context`: of rows with a context for a
    teacher.
    """

    name: str
    path: str | None = None
    hub: HubDataset | None = None
    columns: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    documents: str = "auto"
    root: Path = Path()
    where: str = "data.sources"
    kind: str = "auto"
    row_filter: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    no_label: int | None = -1
    splits: tuple[str, ...] = ("train",)
    context: ContextColumn | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.hub is None):
            problem = "neither a path nor a Hub data set" if self.path is None else "both a path and a Hub data set"
            raise DataError(
                f"source '{self.name}' has {problem}",
                where=self.where,
                expected="exactly one of `path` and `hub`",
            )

    def list_files(self) -> FileListing:
        """The files of the source. Raises `DataError` as `list_files` does."""
        assert self.path is not None
        return list_files(self.path, self.root, self.where, self.splits)


class RawRow(NamedTuple):
    """One row of a file: its values by column, and its line or row number, counted from 1."""

    values: Mapping[str, Any]
    file: str
    number: int

    @property
    def location(self) -> str:
        """`file:number`."""
        return f"{self.file}:{self.number}"


def file_suffix(file: Path) -> str:
    """The suffix that decides the format of `file`, without compression; empty for an unknown one."""
    name = file.name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    suffix = Path(name).suffix
    return suffix if suffix in FILE_SUFFIXES else ""


def list_files(path: str, root: Path, where: str, splits: Sequence[str] = ("train",)) -> FileListing:
    """The sorted files of `path` (a file, a folder or a glob pattern, `**` included), relative to `root`.

    Folders are searched recursively for known suffixes, without hidden files, and one of their splits is taken
    (`data.read.folders`). Raises `DataError` when nothing matches.
    """
    if not path or "\0" in path:
        raise DataError(f"{path!r} is not a path", where=where, expected="a file, a folder or a pattern")
    target = root / Path(path).expanduser()
    try:
        if target.is_dir():
            candidates = _walk_files(target)
        elif target.exists():
            candidates = [target]
        else:
            candidates = [file for file in _match_pattern(Path(path).expanduser(), root) if not file.is_dir()]
        files = {file for file in candidates if file_suffix(file) and file.is_file()}
    except OSError as error:
        raise DataError(f"cannot read {path}: {error_reason(error)}", where=where) from None
    for file in sorted(candidates):
        if (kind := describe_special_file(file)) and (file_suffix(file) or len(candidates) == 1):
            raise DataError(f"{file} is {kind}", where=where, expected="regular files")
    if files and target.is_dir():
        listing = choose_files(target, sorted(files), sorted({*candidates} - files), TEXT_SUFFIXES, splits, where)
        if listing.files:
            return listing
    elif files:
        return FileListing(tuple(sorted(files, key=lambda file: file.parts)))
    if candidates:
        raise DataError(
            f"{path} has no file of a known kind (only {format_names(file.name for file in sorted(candidates))})",
            where=where,
            expected=f"{' '.join(FILE_SUFFIXES)}, each also with {' or '.join(COMPRESSIONS)}",
        )
    if target.is_dir():
        raise DataError(f"the folder {path} has no files", where=where, expected=f"files: {' '.join(FILE_SUFFIXES)}")
    raise DataError(
        f"no file matches {path}" + ("" if Path(path).expanduser().is_absolute() else f" in {root.resolve()}"),
        where=where,
        expected="a file, a folder or a pattern",
        hint=suggest_path(target),
    )


def matches_path(file: Path, path: str, root: Path) -> bool:
    """Whether `list_files` would find `file`, an absolute path, if it existed."""
    try:
        target = (root / Path(path).expanduser()).resolve()
        is_folder = target.is_dir()
    except (OSError, RuntimeError):  # too long a name, a loop of links: `list_files` refuses it
        return False
    if is_folder:
        return file.is_relative_to(target) and not any(p.startswith(".") for p in file.relative_to(target).parts)
    return matches_pattern(str(file), str(target))


def _match_pattern(pattern: Path, root: Path) -> list[Path]:
    """The paths that match a glob pattern; the characters of `root` are literal.

    `**` follows no links to folders: two links that lead back would make the search endless.
    """
    depth = pattern.parts.index("**") if "**" in pattern.parts else len(pattern.parts)
    before, behind = pattern.parts[:depth], pattern.parts[depth:]
    heads = [Path(name) for name in glob.glob(str(Path(glob.escape(str(root)), *before)))]
    if not behind:
        return heads
    return [
        file
        for folder in heads
        for file in _walk_files(folder)
        if matches_pattern(str(file.relative_to(folder)), "/".join(behind))
    ]


def _walk_files(folder: Path) -> list[Path]:
    files: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        files += [Path(parent, name) for name in names if not name.startswith((".", "__"))]
    return files


def error_reason(error: BaseException) -> str:
    """The system's message for an `OSError`, else the error's own."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
