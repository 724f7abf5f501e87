"""A lineage of two tiny runs, and an arm beside the second, made once for all tests that only read them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from postgrad.config.stage_file import parse_stage
from postgrad.plan.plan import make_plan
from postgrad.run.events import RunFinished
from postgrad.run.run import run_stage


@dataclass(frozen=True)
class LineageRuns:
    """`one` learns the old text; `two` (naive) and `replay` go on from it with the new text."""

    folder: Path
    cache: Path
    first: Path
    naive: Path
    replay: Path


def tiny_stage(base: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": output.name,
        "model": str(base / "base"),
        "output": str(output),
        "tokens": 3000,
        "schedule": {"kind": "rewarm", "peak": 1e-2, "floor": 1e-3, "warmup": "2 steps"},
        "batch": {"global_batch_size": 8, "micro_batch_size": 4},
        "evaluation": {
            "retained": [str(base / "old-heldout.jsonl")],
            "learned": [str(base / "new-heldout.jsonl")],
            "every": "50%",
            "eval_tokens": 200,
            "samples": 1,
        },
        "compute": {"threads": 1, "dtype": "float32", "compile": False},
        **changes,
    }


@pytest.fixture(scope="session")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> LineageRuns:
    home = tmp_path_factory.mktemp("runs")
    cache = tmp_path_factory.getbasetemp() / "cache"
    old = {"name": "old", "path": str(base / "old.jsonl")}
    new = {"name": "new", "path": str(base / "new.jsonl")}
    both = [{**new, "share": 0.5}, {**old, "share": 0.5, "role": "replay"}]
    found = LineageRuns(home, cache, home / "one", home / "two", home / "replay")
    sets = tiny_stage(base, home)["evaluation"]
    learn_old = {**sets, "retained": [], "learned": sets["retained"]}
    for place, start, sources, evaluation in (
        (found.first, base / "base", [old], learn_old),
        (found.naive, found.first, [new], sets),
        (found.replay, found.first, both, sets),
    ):
        raw = tiny_stage(
            base, place, model=str(start), data={"sequence_length": 32, "sources": sources}, evaluation=evaluation
        )
        events = list(run_stage(make_plan(parse_stage(raw, "t"), home, cache), command="t", cache=cache))
        assert isinstance(events[-1], RunFinished)
    return found
