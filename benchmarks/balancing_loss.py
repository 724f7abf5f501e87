"""Cost of the balancing loss of a mixture of experts in a training step.

    python benchmarks/balancing_loss.py --json benchmarks/results/balancing_loss.json

The same Qwen3-style mixture of experts takes the same steps in two arms: with the balancing loss of its configuration, and
without one. Both arms are the same stage; only `experts.balancing_loss` differs. Arms take turns, a step each, and the one that
begins changes each round; a ratio is of the steps of one round. The processor's own time is told beside the clock's: other
processes do not count in it. The text is the standard library's own source.
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
from rows_overhead import (
    END,
    StepTime,
    library_functions,
    plan_arm,
    relative_overhead,
    start_run,
    time_step,
    write_jsonl,
)
from training_speed import train_tokenizer
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from postgrad.config.experts_config import ExpertsConfig
from postgrad.distributed.world import World
from postgrad.hardware import machine
from postgrad.models.pretrained import save_pretrained
from postgrad.run.build import choose_execution
from postgrad.run.tuned_model import make_tuned_model

BALANCING = {"without": ExpertsConfig(balancing_loss=0), "with": ExpertsConfig(balancing_loss="config")}


def make_mixture(options: argparse.Namespace) -> Qwen3MoeForCausalLM:
    """A random mixture of experts of the options' size."""
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=options.vocabulary,
            hidden_size=options.hidden,
            num_hidden_layers=options.layers,
            num_attention_heads=options.hidden // 64,
            num_key_value_heads=options.hidden // 64,
            head_dim=64,
            moe_intermediate_size=options.inner,
            num_experts=options.experts,
            num_experts_per_tok=options.chosen,
            max_position_embeddings=options.length,
            router_aux_loss_coef=0.001,
            tie_word_embeddings=True,
        )
    )


def prepare(home: Path, options: argparse.Namespace) -> int:
    """A model and its text; returns the number of weights."""
    pieces = library_functions()
    fast = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(pieces, options.vocabulary, END), eos_token=END)
    model = make_mixture(options)
    save_pretrained(model, fast, home / "model", dtype=torch.float32)
    write_jsonl(home / "text.jsonl", ({"text": piece} for piece in pieces))
    return sum(weight.numel() for weight in model.parameters())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both arms, in turns."""
    world = World(machine.default_device())
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        weights = prepare(home, options)
        plan = plan_arm(home, "text", options.length, options.batch)
        plans = {
            arm: dataclasses.replace(plan, stage=plan.stage.model_copy(update={"experts": experts}))
            for arm, experts in BALANCING.items()
        }
        execution = choose_execution(plan, make_tuned_model(plan, world), world)
        execution = dataclasses.replace(execution, compile=False)
        runs = {arm: start_run(each, execution, world) for arm, each in plans.items()}
        assert [runs[arm][0].balancing is not None for arm in ("without", "with")] == [False, True]
        steps = {arm: partial(time_step, *runs[arm]) for arm in BALANCING}
        rounds: list[dict[str, StepTime]] = []
        for made in run_rounds(steps, options.rounds, options.warm_up):
            rounds.append(made)
            print(f"round {len(rounds)}: " + ", ".join(f"{a} {made[a].processor:.3f} s" for a in BALANCING), flush=True)
        said = provenance()
        return {
            **settings(options),
            "weights": weights,
            "execution": {k: v for k, v in execution.as_dict().items() if k not in ("reasons", "seconds")},
            **said,
            "machine": {**said["machine"], "device": world.device.type},
            "step_ms": {arm: 1e3 * statistics.median(made[arm].clock for made in rounds) for arm in BALANCING},
            "processor_ms": {arm: 1e3 * statistics.median(made[arm].processor for made in rounds) for arm in BALANCING},
            "over_without": relative_overhead([made["with"].clock / made["without"].clock for made in rounds]),
            "over_without_processor": relative_overhead(
                [made["with"].processor / made["without"].processor for made in rounds]
            ),
        }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_integer_options(parser, hidden=256, layers=4, inner=256, experts=16, chosen=2, vocabulary=4096)
    add_integer_options(parser, length=512, batch=4, rounds=30, warm_up=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    machine.tune_allocator()
    found = measure(options)
    over = found["over_without_processor"]
    print(
        f"with over without: processor {over['median']:+.1%} ({over['interval'][0]:+.1%} to {over['interval'][1]:+.1%}), "
        f"clock {found['over_without']['median']:+.1%}"
    )
    write_results(options.json, found)


if __name__ == "__main__":
    main()
