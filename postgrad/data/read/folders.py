"""The data files of a folder as `datasets.load_dataset` takes them: data cards, splits by name, saved data sets.

A folder with a data card (the YAML at the head of README.md) that names its files is read by it. Other folders have splits by
the names of their folders and files (`train`, `test`, `validation`, `dev` ...), or none. A folder of text files alone has
splits only where each file is of one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from postgrad.errors import DataError, suggest_nearest
from postgrad.storage.read_json import MAX_BYTES
from postgrad.storage.read_yaml import read_yaml
from postgrad.storage.regular_file import open_regular_file, read_regular_file

_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*")
_CARD = "README.md"
_CARD_BYTES, _CARD_NODES = 2**20, 200_000
"""Limits of a card, which may list every label of hundreds of configurations."""
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files of a data set that are no data."""


@dataclass(frozen=True)
class FileListing:
    """The files of a source, and the others of its folder by the reason why they are passed over."""

    files: tuple[Path, ...]
    split: str = ""
    passed_over: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def choose_files(
    folder: Path,
    data_files: Sequence[Path],
    others: Sequence[Path],
    text_suffixes: Sequence[str],
    splits: Sequence[str],
    where: str,
) -> FileListing:
    """The files of a split of a folder: the first of `splits` that it has, or its only one.

    `data_files` are those of a known kind. Raises `DataError` for a folder with other splits only, or whose card is broken.
    """
    names = {file.relative_to(folder).as_posix(): file for file in sorted(data_files, key=lambda file: file.parts)}
    reasons: dict[str, str] = {file.relative_to(folder).as_posix(): "no known kind" for file in others}
    configs = _read_card(folder / _CARD)
    is_manual = all(name.lower().endswith(".md") for name in names) and configs is None
    reasons |= {name: "a data card" for name in names if name.rpartition("/")[2] == _CARD and not is_manual}
    reasons |= {name: "metadata" for name in names if name.rpartition("/")[2] in _METADATA}
    for state in [*folder.rglob("state.json")] if "state.json" in {name.rpartition("/")[2] for name in names} else []:
        reasons |= _unused_by_state(state, folder, names)
    rest = [name for name in names if name not in reasons]
    is_text = all(
        re.search(rf"({'|'.join(map(re.escape, text_suffixes))})(\.gz|\.zst)?$", name.lower()) for name in rest
    )
    listed = _card_splits(folder, configs or [], rest, where)
    by_split = listed if listed is not None else _find_splits(rest, lenient=is_text)
    if not by_split and "train" in splits:
        return FileListing(tuple(names[name] for name in rest), "", _group(reasons))
    by_split = by_split or {"train": rest}
    split = _choose_split(by_split, splits, folder, where)
    for name in rest:
        own = [each for each, members in by_split.items() if name in members]
        if split not in own:
            reasons[name] = f"split {own[0]}" if own else "of no split"
    return FileListing(tuple(names[name] for name in rest if name in by_split[split]), split, _group(reasons))


def _choose_split(by_split: Mapping[str, Sequence[str]], splits: Sequence[str], folder: Path, where: str) -> str:
    for split in splits:
        if split in by_split:
            return split
    if len(by_split) == 1 and "train" in splits:
        return next(iter(by_split))
    raise DataError(
        f"the folder {folder.name} has the splits {', '.join(by_split)}, and no {' or '.join(splits)}",
        where=where,
        expected="`split`: one of them, or a path of files",
        hint=suggest_nearest(splits[0], by_split),
    )


def _group(reasons: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    grouped: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        grouped.setdefault(reason, []).append(name)
    return {reason: tuple(sorted(names)) for reason, names in grouped.items()}


def _unused_by_state(state: Path, folder: Path, names: Mapping[str, Path]) -> dict[str, str]:
    """The Arrow files beside the `state.json` of a saved data set that are none of it, such as caches of its transforms."""
    try:
        used = {entry["filename"] for entry in json.loads(read_regular_file(state, MAX_BYTES))["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    beside = [name for name, file in names.items() if file.parent == state.parent and file.suffix == ".arrow"]
    return {name: "not of the saved data set" for name in beside if names[name].name not in used}


# --- splits by name ------------------------------------------------------------------------------------------------------


def _find_splits(names: Sequence[str], *, lenient: bool) -> dict[str, list[str]]:
    """The files of each split by their names; empty where there are no splits. `lenient`: files of no split are no mistake."""
    shards: dict[str, list[str]] = {}
    for name in names:
        if match := _SHARD.fullmatch(name):
            shards.setdefault(match[1], []).append(name)
    if shards:
        return shards
    for find in (_folder_splits, _file_splits):
        by_split: dict[str, list[str]] = {}
        for name in names:
            for split in find(name):
                by_split.setdefault(split, []).append(name)
        if by_split:
            is_complete = "train" in by_split and sum(map(len, by_split.values())) == len(names)
            return by_split if is_complete or not lenient else {}
    return {}


def _folder_splits(name: str) -> Iterator[str]:
    folders = name.split("/")[:-1]
    for split, words in _SPLIT_WORDS.items():
        if any(re.search(rf"(^|[-._ 0-9]){word}($|[-._ 0-9])", folder) for folder in folders for word in words):
            yield split


def _file_splits(name: str) -> Iterator[str]:
    file = name.rpartition("/")[2]
    for split, words in _SPLIT_WORDS.items():
        if any(re.search(rf"(^|[-._ 0-9]){word}[-._ 0-9]", file) for word in words):
            yield split


# --- data cards ---------------------------------------------------------------------------------------------------------


def _read_card(card: Path) -> list[Any] | None:
    """The `configs` of a data card; None where there is no YAML at its head, or it is of something else."""
    if not card.is_file():
        return None
    try:
        with open_regular_file(card) as file:
            text = file.read(_CARD_BYTES).decode("utf-8", "replace")
    except OSError:
        return None
    match = re.match(r"---[ \t]*\r?\n(.*?\n)---[ \t]*(\r?\n|$)", text, re.DOTALL)
    if match is None:
        return None
    try:
        values = read_yaml(match[1], _CARD_NODES)
    except (yaml.YAMLError, ValueError):
        return None
    configs = values.get("configs") if isinstance(values, dict) else None
    return configs if isinstance(configs, list) else []


def _card_splits(folder: Path, configs: list[Any], names: Sequence[str], where: str) -> dict[str, list[str]] | None:
    """The files of each split by the card's default configuration; None where the card names none.

    Raises `DataError` for several configurations without a default one, and for files that are not there.
    """
    configs = [config for config in configs if isinstance(config, dict) and {"data_files", "data_dir"} & config.keys()]
    if not configs:
        return None
    defaults = [config for config in configs if config.get("default") is True or config.get("config_name") == "default"]
    config = (defaults or configs)[0]
    if not defaults and len(configs) > 1:
        listed = ", ".join(str(config.get("config_name")) for config in configs)
        raise DataError(
            f"the data card of {folder.name} has the configurations {listed}, and no default one",
            where=where,
            expected="files of one of them",
            hint="name a folder or a pattern below it as `path`, or `hub: " + str(folder) + "` with `subset`",
        )
    base = str(config.get("data_dir") or "").strip("/")
    prefix = f"{base}/" if base and base != "." else ""
    inside = [name for name in names if name.startswith(prefix)]
    if "data_files" not in config:
        return _find_splits(inside, lenient=False) or {"train": inside}
    by_split: dict[str, list[str]] = {}
    for split, pattern in _patterns(config["data_files"]):
        found = [name for name in inside if matches_pattern(name.removeprefix(prefix), pattern)]
        if not found:
            raise DataError(
                f"the data card of {folder.name} names {pattern}, and no file matches it",
                where=where,
                expected="all files of the data set",
            )
        by_split.setdefault(split, []).extend(name for name in found if name not in by_split.get(split, ()))
    return by_split


def _patterns(value: Any) -> Iterator[tuple[str, str]]:
    """Split and pattern of each entry of `data_files`: a pattern, a list, or objects with `split` and `path`."""
    for entry in value if isinstance(value, list) else [value]:
        split, paths = (
            (str(entry.get("split", "train")), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        )
        for path in paths if isinstance(paths, list) else [paths]:
            yield split, str(path).removeprefix("./")


def matches_pattern(name: str, pattern: str) -> bool:
    """Whether a path matches a pattern, in which `**` stands for any folders and `*` for a part of one name."""

    def match(parts: list[str], patterns: list[str]) -> bool:
        if not patterns:
            return not parts
        if patterns[0] == "**":
            return any(match(parts[skipped:], patterns[1:] or ["*"]) for skipped in range(len(parts)))
        return bool(parts) and fnmatchcase(parts[0], patterns[0]) and match(parts[1:], patterns[1:])

    return match(name.split("/"), pattern.split("/"))
