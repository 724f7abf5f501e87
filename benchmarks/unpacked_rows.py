"""Time per trained token of unpacked rows, against packed ones.

    python benchmarks/unpacked_rows.py --json benchmarks/results/unpacked_rows.json

The same Llama-style model takes the same steps in two arms: documents packed into rows, and each document in a row of its own,
sorted by length and padded. Both arms are the same stage, with the same rows and the same trained tokens; only `data.packing`
differs. Arms take turns, a step each, and the one that begins changes each round; a ratio is of the steps of one round. The
processor's own time is told beside the clock's: other processes do not count in it. The text is the standard library's own
source, parted into functions: documents of 20 to several thousand tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from arms import add_integer_options, provenance, run_rounds, settings, write_results
from rows_overhead import END, StepTime, plan_arm, relative_overhead, start_run, time_step, write_jsonl
from training_speed import SIZES, library_sources, make_llama, train_tokenizer
from transformers import PreTrainedTokenizerFast

from postgrad.distributed.world import World
from postgrad.hardware import machine
from postgrad.models.pretrained import save_pretrained
from postgrad.run.build import choose_execution
from postgrad.run.tuned_model import make_tuned_model

ARMS = ("packed", "unpacked")
_MIN_CHARACTERS = 60


def prepare(home: Path, size: str, length: int) -> None:
    """A model, and documents of mixed lengths."""
    pieces = [piece for text in library_sources() for piece in text.split("\n\n\n") if len(piece) > _MIN_CHARACTERS]
    tokenizer = train_tokenizer(pieces, SIZES[size]["vocabulary"], END)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    save_pretrained(make_llama(size, length), fast, home / "model", dtype=torch.float32)
    write_jsonl(home / "text.jsonl", ({"text": piece} for piece in pieces))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both arms, in turns."""
    world = World(machine.default_device())
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        prepare(home, options.size, options.length)
        plan = plan_arm(home, "text", options.length, options.batch)
        packed = dataclasses.replace(choose_execution(plan, make_tuned_model(plan, world), world), compile=False)
        executions = {"packed": packed, "unpacked": dataclasses.replace(packed, packed=False)}
        runs = {arm: start_run(plan, execution, world) for arm, execution in executions.items()}
        steps = {arm: partial(time_step, *runs[arm]) for arm in ARMS}
        rounds: list[dict[str, StepTime]] = []
        for made in run_rounds(steps, options.rounds, options.warm_up):
            rounds.append(made)
            print(f"round {len(rounds)}: " + ", ".join(f"{a} {made[a].processor:.3f} s" for a in ARMS), flush=True)
        tokens = {arm: run.trained_tokens for arm, (run, _) in runs.items()}
        assert len(set(tokens.values())) == 1, "both arms train the same tokens"
        loaders = {arm: loader for arm, (_, loader) in runs.items()}
        said = provenance()
        return {
            **settings(options),
            "execution": {k: v for k, v in packed.as_dict().items() if k not in ("reasons", "seconds", "packed")},
            **said,
            "machine": {**said["machine"], "device": world.device.type},
            "tokens_per_step": tokens["packed"] / (options.rounds + options.warm_up),
            "micro_batches_per_step": {arm: len(loader.micro_batches(1)) for arm, loader in loaders.items()},
            "padding_share": loaders["unpacked"].measure_padding(64),
            "step_ms": {arm: 1e3 * statistics.median(made[arm].clock for made in rounds) for arm in ARMS},
            "processor_ms": {arm: 1e3 * statistics.median(made[arm].processor for made in rounds) for arm in ARMS},
            "over_packed": relative_overhead([made["unpacked"].clock / made["packed"].clock for made in rounds]),
            "over_packed_processor": relative_overhead(
                [made["unpacked"].processor / made["packed"].processor for made in rounds]
            ),
        }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="5M")
    add_integer_options(parser, length=512, batch=8, rounds=16, warm_up=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    machine.tune_allocator()
    found = measure(options)
    over = found["over_packed_processor"]
    print(
        f"unpacked over packed: processor {over['median']:+.1%} ({over['interval'][0]:+.1%} to {over['interval'][1]:+.1%}), "
        f"clock {found['over_packed']['median']:+.1%}; {found['padding_share']:.1%} padding"
    )
    write_results(options.json, found)


if __name__ == "__main__":
    main()
