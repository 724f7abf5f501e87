"""The paper's protocol at 40 M weights, as far as a minute goes: a base, then the shift without and with 5 % replay.

    python benchmarks/gpu/paper.py --json paper.json

The base learns the Python library's documentation from random weights, then continues on its source code: re-warming and
re-decaying, without replay and with 5 % at the same number of tokens (Ibrahim et al. 2024, arXiv 2403.08763).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from arms import provenance, settings, write_results


def main() -> None:
    """Train the three stages and report losses and forgetting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=12_000_000, help="Of the base, and of each continued stage.")
    parser.add_argument("--model", default="llama-40M", help="Family and size.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from postgrad.commands.builtin_corpus import write_corpus
    from postgrad.config.stage_file import parse_stage
    from postgrad.lineage.record import read_record
    from postgrad.plan.plan import make_plan
    from postgrad.run.run import run_stage

    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder)
        old = {"name": "old", "path": str(folder / "old.jsonl"), "max_passes": 1000}
        new = {"name": "new", "path": str(folder / "new.jsonl"), "max_passes": 1000}
        sets = {"retained": [str(folder / "old-heldout.jsonl")], "learned": [str(folder / "new-heldout.jsonl")]}
        start = {"from_scratch": options.model, "tokenizer": {"vocab_size": 16_384}}
        arms: dict[str, tuple[Any, list[dict[str, Any]], dict[str, Any]]] = {
            "base": (start, [old], {"learned": sets["retained"]}),
            "naive": (str(folder / "base"), [new], sets),
            "replay 5 %": (
                str(folder / "base"),
                [{**new, "share": 0.95}, {**old, "share": 0.05, "role": "replay"}],
                sets,
            ),
        }
        for arm, (model, sources, evaluation) in arms.items():
            output = folder / arm.split()[0]
            stage = {
                "name": output.name,
                "model": model,
                "output": str(output),
                "tokens": options.tokens,
                "data": {"sequence_length": 512, "sources": sources},
                "batch": {"global_batch_size": 64},
                "schedule": {"kind": "rewarm", "peak": 1e-3, "floor": 1e-4, "warmup": "2%"},
                "evaluation": {**evaluation, "every": "50%", "samples": 0},
            }
            for _ in run_stage(
                make_plan(parse_stage(stage, arm), folder, folder / "cache"), command="", cache=folder / "cache"
            ):
                pass
            record = read_record(output)
            results[arm] = {
                "tokens_per_second": record.totals.tokens_per_second,
                "changes": {name: change.as_json() for name, change in record.changes.items()},
            }
            print(arm, results[arm], flush=True)
            write_results(options.json, {"settings": settings(options), **provenance(), "results": results})


if __name__ == "__main__":
    main()
