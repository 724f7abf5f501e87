"""Every objective, tuning, penalty, teacher, sparse update and optimizer: a stage of six small steps on this device.

    python benchmarks/gpu/smoke.py --json smoke.json

Each stage is run to its end, published model and scores included, and its losses are compared with those of the same stage on
the CPU (`--no-cpu` leaves that out), both in fp32. Exits with 1 when a stage fails or differs by more than 1e-3.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arms import write_results

MAX_DIFFERENCE = 1e-3
"""Relative, of a step's loss."""


def stages(shelf: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and stage, one of each kind."""
    lora = {"kind": "lora", "rank": 4}
    prompt = {"kind": "prompt", "length": 3}
    importance = str(shelf.folder / "importance.safetensors")
    teacher = str(shelf.folder / "llama")

    def objective(kind: str, **keys: Any) -> dict[str, Any]:
        return {"objectives": [{"kind": kind, **keys}]}

    def rows(name: str, kind: str | None = None) -> dict[str, Any]:
        return {"sources": [shelf.source(name, kind)], "evaluation": shelf_evaluation(name)}

    def shelf_evaluation(name: str) -> dict[str, Any]:
        return {"every": "50%", "eval_tokens": 10_000, "samples": 0, "learned": [shelf.file(name, held_out=True)]}

    changes: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
        "next-token": (None, {}),
        "bfloat16": (None, {"compute": {"dtype": "bfloat16", "compile": False}}),
        "compiled": (None, {"compute": {"dtype": "bfloat16", "compile": True}}),
        "prefix-lm": (None, objective("prefix-lm")),
        "masked": (None, {"model": "bert", **objective("masked")}),
        "span-corruption": (None, {"model": "t5", **objective("span-corruption")}),
        "text-to-text": (None, {"model": "t5", **rows("pair"), **objective("text-to-text")}),
        "classify": (None, {"model": "bert", **rows("labelled", "labelled"), **objective("classify")}),
        "instruction": (None, rows("instruction")),
        "chat": (lora, rows("chat")),
        "entropy-weights": (None, objective("next-token", token_weights={"kind": "entropy"})),
        "probability-weights": (None, objective("next-token", token_weights={"kind": "probability"})),
        "distill-online": (None, {"objectives": [{"kind": "next-token"}, {"kind": "distill", "teacher": teacher}]}),
        "distill-cached": (
            None,
            {"objectives": [{"kind": "next-token"}, {"kind": "distill", "cache": {"kind": "top-k", "k": 8}}]},
        ),
        "on-policy": (None, objective("on-policy", prompt_tokens=16, max_new_tokens=16)),
        "anchor": (None, {"penalties": [{"kind": "anchor", "strength": 0.1}]}),
        "ewc": (None, {"penalties": [{"kind": "anchor", "strength": 0.1, "importance": importance}]}),
        "unpacked": (None, {"data": {"packing": False}}),
        "muon": (None, {"optimizer": {"kind": "muon"}}),
        "mofo": (None, {"optimizer": {"sparse_update": {"kind": "mofo"}}}),
        "migu": (None, {"optimizer": {"sparse_update": {"kind": "migu"}}}),
        "checkpointing": (None, {"compute": {"dtype": "float32", "compile": False, "activation_checkpointing": True}}),
        "head": ({"kind": "head", "untie": True}, {}),
        "blocks": ({"kind": "blocks", "last": 1}, {}),
        "norm": ({"kind": "norm"}, {}),
        "lora": (lora, {}),
        "dora": ({**lora, "variant": "dora"}, {}),
        "osf": ({"kind": "osf"}, {}),
        "expand": ({"kind": "expand", "positions": [0]}, {}),
        "adapter": ({"kind": "adapter", "size": 4}, {}),
        "prefix": ({"kind": "prefix", "length": 3, "hidden": 8}, {}),
        "p-tuning-v2": ({"kind": "p-tuning-v2", "length": 3}, {}),
        "prompt": (prompt, {}),
        "p-tuning": ({"kind": "p-tuning", "template": "{2} plus {1} {x}", "encoder": "lstm", "hidden": 8}, {}),
    }
    for name, (tuning, keys) in changes.items():
        compute = {"threads": 1, "dtype": "float32", "compile": False, **keys.get("compute", {})}
        yield name, shelf.stage(name, tuning, **{**keys, "compute": compute})


def run_here(folder: Path, limit: float) -> dict[str, dict[str, Any]]:
    """Run every stage on this process's device."""
    from postgrad.commands.importance import measure_importance
    from postgrad.hardware import machine
    from postgrad.lineage.metrics import read_metrics
    from tests.tiny_stages import make_workspace

    begin = time.monotonic()
    shelf = make_workspace(folder, folder / "cache")
    measured = folder / "importance.safetensors"
    measure_importance(str(folder / "llama"), [shelf.file("old")], out=measured, tokens=2_000, context=48)
    results: dict[str, dict[str, Any]] = {}
    for name, raw in stages(shelf):
        if time.monotonic() - begin > limit:
            results[name] = {"error": "not run: the time was up"}
            continue
        started = time.monotonic()
        try:
            finished = shelf.run(raw)
            losses = [row.loss for row in read_metrics(finished.run_folder / "metrics.jsonl").steps]
            results[name] = {"losses": losses, "seconds": round(time.monotonic() - started, 1)}
        except Exception as error:
            traceback.print_exc()
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        print(f"{name}: {results[name]}", flush=True)
    results["device"] = {"name": machine.processor_name(), "type": machine.default_device().type}
    return results


def compare(here: dict[str, dict[str, Any]], cpu: dict[str, dict[str, Any]]) -> list[str]:
    """The stages that failed, or whose losses differ from those of the CPU; adds the differences to `here`."""
    bad = []
    for name, result in here.items():
        if "error" in result:
            bad.append(f"{name}: {result['error']}")
        elif "losses" in result and (reference := cpu.get(name, {}).get("losses")):
            pairs = zip(result["losses"], reference, strict=True)
            result["difference"] = max(abs(a - b) / max(abs(b), 1e-6) for a, b in pairs)
            is_exact = name not in ("bfloat16", "compiled", "on-policy")  # other roundings, other draws
            if is_exact and result["difference"] > MAX_DIFFERENCE:
                bad.append(f"{name}: losses differ by {result['difference']:.1e}")
    return bad


def main() -> None:
    """Run the stages on the device and on the CPU, side by side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=130.0, help="No stage begins after so many seconds.")
    parser.add_argument("--no-cpu", action="store_true", help="Do not run the stages on the CPU too.")
    parser.add_argument("--losses", type=Path, help="Only run, and write the losses here.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.losses:
            options.losses.write_text(json.dumps(run_here(Path(folder, "work"), options.seconds)))
            return
        reference = Path(folder, "cpu.json")
        command = [sys.executable, __file__, "--losses", str(reference), "--seconds", str(options.seconds)]
        hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        other = None if options.no_cpu else subprocess.Popen(command, env=hidden, stdout=subprocess.DEVNULL)
        results = run_here(Path(folder, "work"), options.seconds)
        cpu = json.loads(reference.read_text()) if other and other.wait() == 0 else {}
    bad = compare(results, cpu)
    write_results(options.json, {"what": "losses of six steps of each kind of stage", "stages": results, "bad": bad})
    print("\n".join(bad) or f"{len(results) - 1} stages: all finished")
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
