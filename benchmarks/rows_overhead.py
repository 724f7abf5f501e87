"""Cost of packing and masking in a training step, and the speed of reading rows.

    python benchmarks/rows_overhead.py --json benchmarks/results/rows_overhead.json

The same Llama-style model takes steps on rows of the same number of positions, in three arms:

    dense      one document fills a row, every token is a label
    packed     many short documents in a row, kept apart, every token is a label
    answers    many short examples in a row, kept apart, answers alone are labels

Each arm is a stage's own: token store, rows, mixture, loader with its read-ahead, step. Arms take turns, a step each, and the
one that begins changes each round; a ratio is of the steps of one round, so a slow minute of the machine hits all of them. The
processor's own time is told beside the clock's: other processes do not count in it, and reading that is done ahead does. Beside
it: what a loader reads by itself, on one thread. The text is the standard library's own source, parted into functions; an
example is a function's first line and the rest of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from arms import add_integer_options, provenance, run_rounds, settings, write_results
from training_speed import SIZES, library_sources, make_llama, train_tokenizer
from transformers import PreTrainedTokenizerFast

from postgrad.config.stage_file import parse_stage
from postgrad.data.loading.loader import Loader
from postgrad.distributed.world import World
from postgrad.hardware import machine
from postgrad.hardware.execution import Execution
from postgrad.models.pretrained import save_pretrained
from postgrad.plan.plan import Plan, make_plan
from postgrad.run.build import build_run, choose_execution, make_loader
from postgrad.run.tuned_model import make_tuned_model
from postgrad.training.step import Run, train_step

ARMS = ("dense", "packed", "answers")
END = "<end>"


def library_functions() -> list[str]:
    """Functions and classes of the standard library."""
    pieces = (
        piece for text in library_sources() for part in text.split("\n\n\n") for piece in part.split("\n\n    def ")
    )
    return [piece for piece in pieces if 100 < len(piece) < 2000 and "\n" in piece]


def prepare(home: Path, size: str, length: int) -> None:
    """A model, and rows for each arm."""
    pieces = library_functions()
    tokenizer = train_tokenizer(pieces, SIZES[size]["vocabulary"], END)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    save_pretrained(make_llama(size, length), fast, home / "model", dtype=torch.float32)
    encoded = [encoding.ids for encoding in tokenizer.encode_batch_fast(pieces)]
    stream = np.array(list(itertools.chain.from_iterable(encoded)))
    whole = stream[: len(stream) // (length - 1) * (length - 1)].reshape(-1, length - 1)  # its EOS fills the row
    write_jsonl(home / "dense.jsonl", ({"input_ids": ids} for ids in whole.tolist()))
    write_jsonl(home / "packed.jsonl", ({"text": piece} for piece in pieces))
    parted = (piece.partition("\n") for piece in pieces)
    write_jsonl(home / "answers.jsonl", ({"prompt": first + end, "completion": rest} for first, end, rest in parted))


def write_jsonl(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """A file with a row on each line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def plan_arm(home: Path, arm: str, length: int, batch: int) -> Plan:
    """A stage on the rows of an arm."""
    raw = {
        "name": arm,
        "model": "model",
        "tokens": 10_000_000,
        "data": {
            "sequence_length": length,
            "sources": [{"name": arm, "path": f"{arm}.jsonl", "held_out": 0.01, "max_passes": 1e6}],
        },
        "batch": {"global_batch_size": batch},
        "schedule": {"kind": "constant", "peak": 1e-4, "warmup": 0},
        "evaluation": {"samples": 0},
    }
    return make_plan(parse_stage(raw, arm), home, home / "cache")


def start_run(plan: Plan, execution: Execution, world: World) -> tuple[Run, Loader]:
    """A run at its first step, and its loader."""
    subject = make_tuned_model(plan, world)
    subject.model.pretrained.set_attn_implementation(execution.attention)
    run = build_run(plan, subject, execution, world)
    run.model.train()
    return run, make_loader(plan, execution, world)


class StepTime(NamedTuple):
    """Seconds of a step, reading included (which is done ahead): by the clock, and of the processor."""

    clock: float
    processor: float


def time_step(run: Run, loader: Loader) -> StepTime:
    """Make the next step."""
    clock, processor = time.perf_counter(), time.process_time()
    train_step(run, loader(run.step + 1))
    return StepTime(time.perf_counter() - clock, time.process_time() - processor)


def describe_rows(plan: Plan) -> dict[str, float]:
    """What the rows of an arm are like."""
    ledger, rows = plan.data.rows[0].ledger, len(plan.data.rows[0])
    sample = [plan.data.rows[0].get_row(i, i) for i in np.linspace(0, rows - 1, min(rows, 200)).astype(int).tolist()]
    documents = statistics.mean(int((row.inputs["position_ids"] == 0).sum()) for row in sample)
    positions = rows * plan.model.context_length
    return {
        "documents_per_row": documents,
        "labels_share": ledger.trained / positions,
        "padding_share": ledger.padding / positions,
    }


def measure_reading(plan: Plan, execution: Execution, world: World, steps: int) -> dict[str, float]:
    """What a loader reads by itself, on one thread."""
    loader = make_loader(plan, execution, world)
    times = []
    for step in range(1, steps + 1):
        begin = time.perf_counter()
        loader.read_batches(step)
        times.append(time.perf_counter() - begin)
    rows = plan.data.mixture.block_size
    return {
        "read_ms": 1e3 * statistics.median(times),
        "rows_per_second": rows / statistics.median(times),
        "positions_per_second": rows * plan.model.context_length / statistics.median(times),
    }


def relative_overhead(ratios: Sequence[float]) -> dict[str, Any]:
    """By how much one is above the other: the median of the rounds, its 95 % interval (bootstrap over rounds), quartiles."""
    draws = np.random.default_rng(0).choice(np.array(ratios), (2000, len(ratios)))
    low, high = np.quantile(np.median(draws, 1), [0.025, 0.975])
    quartiles = [float(q) - 1 for q in np.quantile(ratios, [0.25, 0.75])]
    return {"median": statistics.median(ratios) - 1, "interval": [low - 1, high - 1], "quartiles": quartiles}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All arms, in turns."""
    world = World(machine.default_device())
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        prepare(home, options.size, options.length)
        plans = {arm: plan_arm(home, arm, options.length, options.batch) for arm in ARMS}
        execution = choose_execution(plans["dense"], make_tuned_model(plans["dense"], world), world)
        changes = {key: value for key in ("attention", "dtype") if (value := getattr(options, key))}
        execution = dataclasses.replace(execution, compile=options.compile, **changes)
        runs = {arm: start_run(plan, execution, world) for arm, plan in plans.items()}
        steps = {arm: partial(time_step, *runs[arm]) for arm in ARMS}
        rounds: list[dict[str, StepTime]] = []
        for made in run_rounds(steps, options.rounds, options.warm_up):  # the first also compile
            rounds.append(made)
            print(f"round {len(rounds)}: " + ", ".join(f"{a} {made[a].processor:.3f} s" for a in ARMS), flush=True)
        said = provenance()
        found: dict[str, Any] = {
            **settings(options),
            "rows": options.batch,
            "positions": options.length,
            "execution": {k: v for k, v in execution.as_dict().items() if k not in ("reasons", "seconds")},
            **said,
            "machine": {**said["machine"], "device": world.device.type},
            "arms": {},
        }
        for arm in ARMS:
            clock, processor = [made[arm].clock for made in rounds], [made[arm].processor for made in rounds]
            read = measure_reading(plans[arm], execution, world, options.reads)
            found["arms"][arm] = {
                **describe_rows(plans[arm]),
                "step_ms": 1e3 * statistics.median(clock),
                "step_ms_range": [1e3 * min(clock), 1e3 * max(clock)],
                "processor_ms": 1e3 * statistics.median(processor),
                "over_dense": relative_overhead([made[arm].clock / made["dense"].clock for made in rounds]),
                "over_dense_processor": relative_overhead(
                    [made[arm].processor / made["dense"].processor for made in rounds]
                ),
                **read,
                "read_share_of_step": read["read_ms"] / (1e3 * statistics.median(processor)),
            }
    return found


def results_table(found: dict[str, Any]) -> str:
    """The results as a table."""
    lines = [
        "| rows | documents a row | labels | padding | step | over dense: clock | processor | rows read/s | of a step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, x in found["arms"].items():
        overs = ["" if arm == "dense" else _format_overhead(x[key]) for key in ("over_dense", "over_dense_processor")]
        lines.append(
            f"| {arm} | {x['documents_per_row']:.1f} | {x['labels_share']:.0%} | {x['padding_share']:.1%} | "
            f"{x['step_ms']:.0f} ms | {' | '.join(overs)} | {x['rows_per_second']:,.0f} | {x['read_share_of_step']:.2%} |"
        )
    return "\n".join(lines)


def _format_overhead(x: dict[str, Any]) -> str:
    return f"{x['median']:+.1%} ({x['interval'][0]:+.1%} to {x['interval'][1]:+.1%})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="5M")
    add_integer_options(parser, length=512, batch=4, rounds=30, warm_up=3, reads=200)
    parser.add_argument("--attention", help="as transformers calls it; left out: as a stage chooses")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="left out: as a stage chooses")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    machine.tune_allocator()
    found = measure(options)
    print(results_table(found))
    write_results(options.json, found)
    if options.json:
        options.json.with_suffix(".md").write_text(results_table(found) + "\n")


if __name__ == "__main__":
    main()
