"""A run that is stopped on the device, goes on on the CPU, and ends on the device, against one that was never stopped.

    python benchmarks/gpu/resume.py --json resume.json

Exits with 1 when the weights differ by more than 1e-3 of their norm: the devices round otherwise, and nothing else may differ.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from arms import provenance, write_results

MAX_DIFFERENCE = 1e-3
STEPS = 6


def go_on(folder: Path, name: str, last_step: int) -> None:
    """Run or resume the stage here, and stop behind a step's checkpoint."""
    from postgrad.run.events import CheckpointSaved
    from postgrad.run.run import run_stage
    from tests.tiny_stages import Workspace, make_workspace

    cache = folder / "cache"
    shelf = Workspace(folder, cache) if (folder / "llama").exists() else make_workspace(folder, cache)
    for event in run_stage(shelf.plan(shelf.stage(name)), command="", cache=cache):
        if isinstance(event, CheckpointSaved) and event.step >= last_step < STEPS:
            return


def relative_difference(one: Path, two: Path) -> float:
    """Norm of the difference of two models' weights, over the norm of the first."""
    from safetensors.torch import load_file

    first, second = (load_file(path / "model" / "model.safetensors") for path in (one, two))
    squares = sum(float((first[name] - second[name]).double().square().sum()) for name in first)
    return (squares / sum(float(tensor.double().square().sum()) for tensor in first.values())) ** 0.5


def main() -> None:
    """Alternate the devices, each part in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs=3, metavar=("FOLDER", "RUN", "STEP"), help="Run one part here.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.part:
        go_on(Path(options.part[0]), options.part[1], int(options.part[2]))
        return
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}

    def run(folder: str, name: str, step: int, environment: dict[str, str] | None = None) -> None:
        command: list[Any] = [sys.executable, __file__, "--part", folder, name, step]
        subprocess.run(list(map(str, command)), env=environment, check=True, stdout=sys.stderr)

    with tempfile.TemporaryDirectory() as folder:
        run(folder, "whole", STEPS)
        run(folder, "parts", 2)
        run(folder, "parts", 4, hidden)
        run(folder, "parts", STEPS)
        difference = relative_difference(Path(folder, "runs/whole"), Path(folder, "runs/parts"))
    result = {"steps": STEPS, "stopped_at": [2, 4], "relative_difference": difference, **provenance()}
    write_results(options.json, result)
    print(json.dumps(result))
    raise SystemExit(difference > MAX_DIFFERENCE)


if __name__ == "__main__":
    main()
