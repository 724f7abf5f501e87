"""Fingerprints: the sha256 of contents, never of names or dates."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from postgrad.storage.atomic import Manifest, sha256

MODEL_FILES = ("config.json", "task_layer.json", "tuning.json", "adapter_config.json", "*.safetensors")


def fingerprint(value: Any) -> str:
    """The sha256 of plain data (JSON with sorted keys)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_fingerprint(path: Path) -> str:
    """The sha256 of a file, or that there is none."""
    return sha256(path) if path.is_file() else "no file"


def model_fingerprint(folder: Path) -> str:
    """The fingerprint of a model folder's configuration and weights."""
    return fingerprint([[name, sha256(folder / name)] for name in _model_files(p.name for p in folder.iterdir())])


def manifest_fingerprint(manifest: Manifest) -> str:
    """The same fingerprint from a folder's manifest, without reading the files."""
    return fingerprint([[name, manifest[name]["sha256"]] for name in _model_files(manifest)])


def holds_moments(name: str) -> bool:
    """Whether a file of a checkpoint holds moments of the optimizer: all of them, or those of one of several processes."""
    return name == "optimizer.safetensors" or fnmatchcase(name, "optimizer-*-of-*.safetensors")


def _model_files(names: Iterable[str]) -> list[str]:
    """The names of a model's configuration and weights, sorted."""
    known = (name for name in names if any(fnmatchcase(name, pattern) for pattern in MODEL_FILES) and "/" not in name)
    return sorted(name for name in known if not holds_moments(name))


def differences(before: Any, after: Any, path: str = "") -> list[str]:
    """`key.path: before -> after` for each value that differs between two pieces of plain data."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted(before.keys() | after.keys())
        return [
            line
            for key in keys
            for line in differences(before.get(key), after.get(key), f"{path}.{key}" if path else str(key))
        ]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [
            line
            for i, (a, b) in enumerate(zip(before, after, strict=True))
            for line in differences(a, b, f"{path}[{i}]")
        ]
    return [] if before == after else [f"{path}: {before!r} -> {after!r}"]
