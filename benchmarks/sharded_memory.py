"""Peak memory of every rank while a stage loads, steps, saves and publishes, on one process and on several.

    python benchmarks/sharded_memory.py --json benchmarks/results/sharded_memory.json

A Llama of random weights in bf16 files trains all weights in fp32 on gloo ranks of this machine. A peak is that of the resident
memory of a rank (mapped files included) between two events of the run, above what the process had before it loaded the model.
The bound is that of one process divided by the shards, times 1.25, plus a constant for what is not divided: the largest group
of weights that a step gathers, its gradients, and the activations of a micro-batch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arms import provenance, settings, write_results

SIZES = {  # hidden, layers, heads, intermediate
    "10M": (256, 8, 4, 768),
    "80M": (768, 10, 12, 2048),
    "250M": (1024, 18, 16, 2816),
}
VOCABULARY, TIME = 8192, 32
MOMENTS = ("load", "step", "checkpoint", "publish")
FACTOR = 1.25


def prepare(home: Path, size: str) -> dict[str, Any]:
    """A model, texts, and a stage of two steps."""
    import torch
    from training_speed import library_sources, train_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from postgrad.models.pretrained import save_pretrained

    hidden, layers, heads, intermediate = SIZES[size]
    texts = [text[:2000] for text in library_sources()[:40]]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(texts, 2048), eos_token="<end>")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=intermediate,
        vocab_size=VOCABULARY,
        max_position_embeddings=TIME,
        tie_word_embeddings=True,
    )
    save_pretrained(LlamaForCausalLM(config), tokenizer, home / "model", dtype=torch.bfloat16)
    for name, part in (("text", texts[8:]), ("held", texts[:8])):
        (home / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return {
        "name": "memory",
        "model": str(home / "model"),
        "tokens": 2 * 4 * (TIME - 1),
        "data": {
            "sequence_length": TIME,
            "sources": [{"name": "text", "path": str(home / "text.jsonl"), "max_passes": 100}],
        },
        "batch": {"global_batch_size": 4, "micro_batch_size": 1},
        "schedule": {"kind": "rewarm", "peak": 1e-4, "floor": 1e-5},
        "evaluation": {
            "learned": [str(home / "held.jsonl")],
            "every": "100%",
            "eval_tokens": 60,
            "max_tokens": 60,
            "samples": 0,
        },
        "save": {"every": "1 steps", "keep": 1},
        "compute": {"threads": 1, "dtype": "float32", "compile": False},
    }


def measure(size: str, ranks: int, parallel: dict[str, int] | None = None) -> list[dict[str, float]]:
    """The peaks of each rank in MB, by moment."""
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        stage = {**prepare(home, size), "output": str(home / "run"), **({"parallel": parallel} if parallel else {})}
        (home / "stage.json").write_text(json.dumps(stage))
        environment = {**os.environ, "POSTGRAD_CACHE": str(home / "cache"), "OMP_NUM_THREADS": "1"}
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        command = [sys.executable, *launch, __file__, "--worker", str(home)]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        return [json.loads((home / f"peaks-{rank}.json").read_text()) for rank in range(ranks)]


def work(home: Path) -> None:
    """One rank: run the stage, and write its peaks."""
    from postgrad.config.stage_file import parse_stage
    from postgrad.plan.plan import make_plan
    from postgrad.run.run import run_stage

    plan = make_plan(parse_stage(json.loads((home / "stage.json").read_text()), "stage"), home, home / "cache")
    peaks: dict[str, float] = {}
    label, start = "", 0.0
    for event_label in _labels(run_stage(plan, command="benchmark", cache=home / "cache")):
        peak = _memory("VmHWM")
        if label:
            peaks[label] = max(peaks.get(label, 0.0), round(peak - start, 1))
        start = start or _memory("VmRSS")
        label = event_label
        Path("/proc/self/clear_refs").write_text("5")
    (home / f"peaks-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(peaks))


def _labels(events: Iterator[Any]) -> Iterator[str]:
    """After each event, the moment that follows it."""
    from postgrad.run.events import CheckpointSaved, PhaseStarted, RunStarted, StepCompleted

    for event in events:
        match event:
            case PhaseStarted(message="loading the model"):
                yield "load"
            case PhaseStarted(message="publishing the model"):
                yield "publish"
            case PhaseStarted():
                yield "scoring"
            case RunStarted() | CheckpointSaved():
                yield "step"
            case StepCompleted():
                yield "checkpoint"


def _memory(key: str) -> float:
    """Of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) / 1024


def find_excess(alone: dict[str, float], rank: dict[str, float], shards: int, moment: str) -> float:
    """What a rank's peak exceeds its share by, in MB."""
    return rank[moment] - FACTOR * alone[moment] / shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="80M")
    parser.add_argument("--ranks", default="2,4", help="numbers of ranks, and 2x2")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker)
        return
    alone = measure(options.size, 1)[0]
    table: dict[str, Any] = {"1": {"peak MB": alone}}
    print("1", alone)
    for mesh in options.ranks.split(","):
        replicate, _, shard = mesh.rpartition("x")
        parallel = {"replicate": int(replicate), "shard": int(shard)} if replicate else None
        peaks = measure(options.size, int(replicate or 1) * int(shard), parallel)
        worst = {m: max(rank[m] for rank in peaks) for m in MOMENTS}
        constant = {m: round(max(find_excess(alone, rank, int(shard), m) for rank in peaks), 1) for m in MOMENTS}
        table[mesh] = {"peak MB": worst, "constant MB": constant}
        print(mesh, table[mesh])
    write_results(options.json, {**provenance(), "settings": settings(options), "meshes": table})


if __name__ == "__main__":
    main()
