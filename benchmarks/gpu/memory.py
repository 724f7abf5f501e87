"""The peak memory that `postgrad check` foretells, and what the run takes: full, LoRA and distillation at 124 M weights.

python benchmarks/gpu/memory.py --json memory.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from arms import provenance, settings, write_results
from speed import SIZES, save_start_model

KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"tuning": {"kind": "lora", "rank": 16}},
    "distill": {"objectives": [{"kind": "next-token"}, {"kind": "distill"}]},
    "anchor": {"penalties": [{"kind": "anchor", "strength": 0.1}]},
}


def measure(stage: dict[str, Any], folder: Path, what: str) -> dict[str, Any]:
    """The foretold or the measured peak bytes of a stage, in this process."""
    from postgrad.check.check import check_stage
    from postgrad.config.stage_file import parse_stage
    from postgrad.hardware import machine
    from postgrad.plan.plan import make_plan
    from postgrad.run.run import run_stage

    plan = make_plan(parse_stage(stage, "memory"), folder, folder / "cache")
    if what == "check":
        memory = check_stage(plan, cache=folder / "cache")["memory"]
        return {"foretold": memory["total"], "is_measured": memory["is_measured"]}
    for _ in run_stage(plan, command="", cache=folder / "cache"):
        pass
    return {"measured": machine.peak_memory(machine.default_device())}


def measure_apart(stage: Path) -> dict[str, Any]:
    """Both, each in a process of its own."""
    result: dict[str, Any] = {}
    for what in ("check", "run"):
        command = [sys.executable, __file__, "--stage", str(stage), "--what", what]
        run = subprocess.run(command, capture_output=True, text=True)
        result |= json.loads(run.stdout.splitlines()[-1]) if run.returncode == 0 else {"error": run.stderr[-2000:]}
    if measured := result.get("measured"):
        result["ratio"] = result.get("foretold", 0) / measured
    return result


def main() -> None:
    """Check and run each kind of stage in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="124M")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--stage", type=Path, help="Measure the stage in this JSON file here.")
    parser.add_argument("--what", choices=("check", "run"), default="run")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.stage:
        print("\n" + json.dumps(measure(json.loads(options.stage.read_text()), options.stage.parent, options.what)))
        return
    from training_speed import library_sources

    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, rows = Path(name), SIZES[options.size]["rows"]
        save_start_model(options.size, options.length, folder / "model")
        (folder / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in library_sources()[:300]))
        for kind, changes in KINDS.items():
            stage = {
                "name": kind,
                "model": str(folder / "model"),
                "output": str(folder / kind),
                "tokens": 4 * rows * options.length,
                "data": {
                    "sequence_length": options.length,
                    "sources": [{"name": "code", "path": str(folder / "texts.jsonl")}],
                },
                "batch": {"global_batch_size": rows},
                "schedule": {"kind": "constant", "peak": 1e-4, "warmup": 0},
                "evaluation": {"every": "100%", "eval_tokens": 1000, "samples": 0},
                "compute": {"compile": False},
                **changes,
            }
            (folder / f"{kind}.json").write_text(json.dumps(stage))
            results[kind] = measure_apart(folder / f"{kind}.json")
            print(kind, results[kind], flush=True)
    write_results(options.json, {"settings": settings(options), **provenance(), "results": results})
    raise SystemExit(any("error" in result for result in results.values()))


if __name__ == "__main__":
    main()
