"""Alternating rounds of benchmark arms, and the provenance that every results file records.

Imports only the standard library: arms that measure memory are processes that import this module too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # what is measured is the project that this folder lies in

T = TypeVar("T")
LOAD = os.getloadavg()[0]
"""Load of the machine when the script began."""


def run_rounds(arms: Mapping[str, Callable[[], T]], rounds: int, warm: int = 0) -> Iterator[dict[str, T]]:
    """Results of each arm, round by round; the order reverses each round, and the first `warm` rounds are dropped."""
    for number in range(warm + rounds):
        answers = {name: arms[name]() for name in (arms if number % 2 else reversed(list(arms)))}
        if number >= warm:
            yield {name: answers[name] for name in arms}


def median_and_range(values: Iterable[float]) -> list[float]:
    """Median, lowest and highest."""
    known = list(values)
    return [statistics.median(known), min(known), max(known)]


def format_range(values: list[float], form: str) -> str:
    """The same as text."""
    return f"{values[0]:{form}} [{values[1]:{form}}..{values[2]:{form}}]"


def add_integer_options(parser: argparse.ArgumentParser, **defaults: int) -> None:
    """Options that are whole numbers."""
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)


def strip_folders(word: str) -> str:
    """An option's value, or NAME=FILE, without the folders of whoever ran it."""
    before, equal, path = word.rpartition("=")
    here = Path(path)
    return before + equal + here.name if here.is_absolute() or ".." in here.parts else word


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """All options, given or default, for a results file."""

    def short(value: Any) -> Any:
        if isinstance(value, list):
            return [short(each) for each in value]
        return strip_folders(str(value)) if isinstance(value, str | Path) else value

    return {key: short(value) for key, value in vars(options).items() if value is not None and key != "json"}


def provenance(*packages: str) -> dict[str, Any]:
    """The command as it was given, the machine, the day, the versions (torch, transformers, and of `packages`), the load."""
    from importlib.metadata import version

    from postgrad.hardware import machine

    script = Path("benchmarks", *(["gpu"] if Path(sys.argv[0]).parent.name == "gpu" else []), Path(sys.argv[0]).name)
    return {
        "repeat": " ".join(["python", str(script), *map(shlex.quote, map(strip_folders, sys.argv[1:]))]),
        "machine": {"cpu": machine.processor_name(), "cores": machine.core_count(), "system": platform.system()},
        "measured": date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "transformers", *packages)},
        "load_average": LOAD,
    }


def write_results(path: Path | None, results: Mapping[str, Any]) -> None:
    """Write the results to the file, if there is one."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
