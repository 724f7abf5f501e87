"""Compare what each kind of tuning learns and forgets, and its cost, on one task from one model.

    python benchmarks/tunings.py --task classify --model MODEL --train train.jsonl --valid valid.jsonl \
        --json benchmarks/results/tunings_classify.json
    python benchmarks/tunings.py --task answers --model MODEL --train train.jsonl --valid valid.jsonl \
        --retained old.jsonl --json benchmarks/results/tunings_answers.json

Rows of the task are `text` and `label`, or for `answers` also `prompt` and `completion` (or any rows a stage reads).
Each kind, at each of its rates, with each seed, is a stage of its own; what is tokenised is shared. Each kind has a process
of its own, which first makes a few steps and nothing else, for memory and seconds.

How kinds are compared: at a fixed number of steps the one with the highest effective rate has learnt most and forgotten
most, whatever it is. So every kind has a sweep of rates, and forgetting is read off where kinds have the same loss on
the new task: between two looks during training, linearly, at the first crossing. The rate is constant after a warm-up
when there is a retained set, so that no point of a curve depends on the budget; else it falls linearly to zero.

The best rate is the one with the lowest loss on the valid set, which is therefore a little too good, for every kind
alike (all have equally many rates). `matched` gives the retained change at that rate; `least` the lowest among rates. A kind
is dominated when another has learnt at least as much and forgotten at most as much, by the values alone. The retained set
is read with the tuning on; an additive kind can also be switched off, and then nothing is forgotten.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from arms import median_and_range, provenance, run_rounds, settings, write_results

Result = dict[str, Any]

KINDS: dict[str, Result] = {
    "full": {"kind": "full"},
    "head": {"kind": "head"},
    "blocks": {"kind": "blocks", "last": 1},
    "bias": {"kind": "bias"},
    "norm": {"kind": "norm"},
    "adapter-houlsby": {"kind": "adapter", "variant": "houlsby"},
    "adapter-pfeiffer": {"kind": "adapter", "variant": "pfeiffer"},
    "adapter-parallel": {"kind": "adapter", "variant": "parallel"},
    "prefix": {"kind": "prefix", "length": 10, "hidden": 128},
    "p-tuning-v2": {"kind": "p-tuning-v2", "length": 20},
    "prompt": {"kind": "prompt", "length": 20},
    "p-tuning": {"kind": "p-tuning", "template": "{20} {x}"},
    "instruction-prompt": {"kind": "instruction-prompt", "length": 20, "demonstrations": {"max_tokens": 96}},
    "lora": {"kind": "lora", "rank": 8},
    "rslora": {"kind": "lora", "rank": 8, "variant": "rslora"},
    "dora": {"kind": "lora", "rank": 8, "variant": "dora"},
    "pissa": {"kind": "lora", "rank": 8, "variant": "pissa"},
    "osf": {"kind": "osf"},
    "expand": {"kind": "expand"},
}
# The middle one first, so that a run that is cut short has it for every kind.
RATES: dict[str, tuple[float, ...]] = {
    "full": (3e-4, 1e-3, 1e-4),
    "head": (1e-2, 3e-2, 3e-3),
    "blocks": (3e-4, 1e-3, 1e-4),
    "bias": (3e-3, 1e-2, 1e-3),
    "norm": (3e-3, 1e-2, 1e-3),
    "adapter-houlsby": (1e-3, 3e-3, 3e-4),
    "adapter-pfeiffer": (1e-3, 3e-3, 3e-4),
    "adapter-parallel": (1e-3, 3e-3, 3e-4),
    "prefix": (1e-3, 3e-3, 3e-4),
    "p-tuning-v2": (1e-2, 3e-2, 3e-3),
    "prompt": (3e-2, 1e-1, 1e-2),
    "p-tuning": (3e-3, 1e-2, 1e-3),
    "instruction-prompt": (3e-2, 1e-1, 1e-2),
    "lora": (1e-3, 3e-3, 3e-4),
    "rslora": (1e-3, 3e-3, 3e-4),
    "dora": (1e-3, 3e-3, 3e-4),
    "pissa": (3e-4, 1e-3, 1e-4),
    "osf": (3e-4, 1e-3, 1e-4),
    "expand": (1e-3, 3e-3, 3e-4),
}
SHARES = {"all": 1.0, "three quarters": 0.75, "half": 0.5}
"""New-task losses that so many of the kinds reach are where forgetting is compared."""
COST_STEPS, FORWARDS, FORWARD_TOKENS = 7, 5, 600


# --- in a process of its own -------------------------------------------------------------------------------------


def process_megabytes(key: str) -> float | None:
    """A number of this process in megabytes, such as VmHWM (the most it ever held) or VmRSS; None where there is no /proc."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{key}:")), None)


def measure_cost(work: Result) -> Result:
    """A few steps of a stage and nothing else: what moves, seconds of a step and a forward, memory."""
    import torch

    from postgrad.distributed.world import World
    from postgrad.hardware import machine
    from postgrad.run.build import build_run, choose_execution, make_loader
    from postgrad.run.tuned_model import make_tuned_model
    from postgrad.training.step import train_step

    machine.tune_allocator()
    plan = plan_work(work)
    world = World(torch.device("cpu"))
    libraries = process_megabytes("VmRSS")
    subject = make_tuned_model(plan, world)
    counts = subject.counts()
    execution = choose_execution(plan, subject, world)
    run = build_run(plan, subject, execution, world)
    loader = make_loader(plan, execution, world)
    run.model.train()
    seconds = []
    for step in range(1, COST_STEPS + 1):
        batches = loader.read_batches(step)
        begin = time.perf_counter()
        train_step(run, batches)
        seconds.append(time.perf_counter() - begin)
    peak = process_megabytes("VmHWM")
    return {
        "parameters": counts.parameters,
        "trainable": counts.trainable,
        "step_seconds": statistics.median(seconds[2:]),
        "step_seconds_range": [min(seconds[2:]), max(seconds[2:])],
        "peak_mb": None if peak is None or libraries is None else peak - libraries,
        "dtype": execution.dtype,
        **forward_ratio(plan),
    }


def run_to_end(work: Result) -> Result:
    """A whole stage: scores before and after, the looks in between, what is kept of it, and the cost of an answer."""
    from postgrad.lineage.metrics import read_metrics
    from postgrad.run.events import RunFinished
    from postgrad.run.run import run_stage

    plan = plan_work(work)
    begin = time.perf_counter()
    last = None
    for event in run_stage(plan, command="benchmarks/tunings.py", cache=Path(work["cache"])):
        last = event
    assert isinstance(last, RunFinished), last
    record, home = last.record, plan.output
    metrics = read_metrics(home / "metrics.jsonl")
    rows = metrics.evaluations
    looks = [{"step": row.step, **row.as_json()["sets"]} for row in rows]
    scores, changes = record.scores, record.changes
    return {
        "steps": plan.steps,
        "learned": {
            "before": scores.before["valid"].as_json(),
            "after": scores.after["valid"].as_json(),
            "change": changes["valid"].as_json(),
        },
        "retained": changes["retained"].as_json() if "retained" in changes else None,
        "looks": looks,
        "seconds": sum(row.seconds for row in metrics.steps),
        "wall_seconds": time.perf_counter() - begin,
        "kept_bytes": saved_bytes(home / "model"),
        **exact_matches(plan, home),
    }


def score_published(work: Result) -> Result:
    """The published model of a finished stage on the valid set that the stage names now."""
    import torch

    from postgrad.distributed.world import World
    from postgrad.evaluation import before_after
    from postgrad.models.location import locate_model
    from postgrad.models.model import wrap_model
    from postgrad.tuning.open_model import open_model

    plan = plan_work(work)
    opened = open_model(locate_model(str(plan.output / "model"), plan.root))
    model = wrap_model(opened.model, opened.task)
    world = World(torch.device("cpu"))
    scores = before_after.score_sets(model, plan.evaluation.sets, context=plan.model.context_length, world=world)
    return scores["valid"].summary()


def plan_work(work: Result) -> Any:
    """The plan of a stage."""
    from postgrad.config.stage_file import parse_stage
    from postgrad.plan.plan import make_plan

    return make_plan(parse_stage(work["stage"], work["stage"]["name"]), Path(work["root"]), Path(work["cache"]))


def saved_bytes(folder: Path) -> int:
    """What has to be kept beside the start model: the tuning's own tensors, or a whole model."""
    own = folder / "tuning.safetensors"
    return sum(f.stat().st_size for f in ([own] if own.exists() else folder.glob("*.safetensors")))


def forward_ratio(plan: Any) -> Result:
    """How much longer an answer takes than the start model's, in turns; a kind that can be merged is."""
    import torch

    from postgrad.distributed.world import World
    from postgrad.evaluation.perplexity import score_held_out
    from postgrad.models.model import wrap_model
    from postgrad.run.tuned_model import make_tuned_model
    from postgrad.tuning.open_model import open_model

    subject = make_tuned_model(plan, World(torch.device("cpu")))
    if subject.tuning.has_exact_merge:
        subject.tuning.merge()
    base = open_model(plan.model.start, plan.model.task, layer=plan.model.task_layer)
    sides = [
        (subject.model, plan.evaluation.sets),
        (wrap_model(base.model, base.task), plan.evaluation.sets_before),
    ]

    def seconds(side: int) -> float:
        model, sets = sides[side]
        rows = next(h for h in sets if h.name == "valid").take_tokens(FORWARD_TOKENS)
        begin = time.perf_counter()
        score_held_out(model, rows, context=plan.model.context_length)
        return time.perf_counter() - begin

    arms = {"tuned": partial(seconds, 0), "start": partial(seconds, 1)}
    found = median_and_range(each["tuned"] / each["start"] for each in run_rounds(arms, FORWARDS, warm=1))
    return {"forward": found[0], "forward_range": found[1:]}


def exact_matches(plan: Any, home: Path) -> Result:
    """How many answers the start model and the published one give to the letter."""
    from postgrad.models.location import locate_model
    from postgrad.models.model import wrap_model
    from postgrad.models.task import Task
    from postgrad.tuning.open_model import open_model

    if plan.model.task != Task.CAUSAL:
        return {}
    loaded = [open_model(locate_model(str(home / "model"), home)), open_model(plan.model.start)]
    both_sets = (plan.evaluation.sets, plan.evaluation.sets_before)
    after, before = (
        exact_match(wrap_model(o.model, o.task), next(h for h in sets if h.name == "valid"), plan.model.context_length)
        for o, sets in zip(loaded, both_sets, strict=True)
    )
    return {"right": after, "right_before": before}


def exact_match(model: Any, rows: Any, context: int) -> Result:
    """The share of answers that greedy decoding gives to the letter, with a 95 % interval from resampled rows.

    Greedy decoding writes the reference exactly when each of its tokens is the likeliest one after those before it.
    """
    import torch

    from postgrad.data.layouts.rows import IGNORED
    from postgrad.data.loading.batch import collate

    right = []
    scored_rows = list(rows.iter_rows(context))
    model.eval()
    with torch.no_grad():
        for begin in range(0, len(scored_rows), 32):
            part = [scored.row for scored in scored_rows[begin : begin + 32]]
            batch = collate(part, [0] * len(part), pad_token_id=rows.pad)
            predicted = model(**batch.inputs).logits().argmax(-1)
            right += ((predicted == batch.labels) | (batch.labels == IGNORED)).all(1).tolist()
    draws = np.random.default_rng(0).choice(np.asarray(right, float), (1000, len(right))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"value": float(np.mean(right)), "low": float(low), "high": float(high)}


def run_in_subprocess(works: Sequence[Result], folder: Path, until: float = float("inf")) -> list[Result]:
    """What `cost`, `carried_out` or `scored` (a work's `what`) found, one after the other, or the error that there was.

    No work is begun after `until` (seconds since the epoch), nor any of a kind whose first failed: they answer `None`.
    """
    asked, answer = folder / f"{works[0]['id']}.json", folder / f"{works[0]['id']}.answer.json"
    asked.write_text(json.dumps({"works": list(works), "until": until if until < float("inf") else None}))
    command = [sys.executable, __file__, "--works", str(asked), str(answer)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode == 0:
        return json.loads(answer.read_text())
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return [{"error": lines[-1] if lines else f"exit {done.returncode}"}] + [{"left_out": True}] * (len(works) - 1)


def load_or_run(works: Sequence[Result], folder: Path, until: float, results_folder: Path | None) -> list[Result]:
    """The same, or what an earlier call left in the folder `keep`; only what is complete is left there."""
    place = results_folder / f"{works[0]['kind']}.json" if results_folder else None
    if place and place.exists():
        return json.loads(place.read_text())
    found = run_in_subprocess(works, folder, until)
    if place and ("error" in found[0] or not any("left_out" in each for each in found)):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(found))
    return found


def subprocess_main(request_file: Path, answer_file: Path) -> None:
    """Do the works."""
    from postgrad.errors import PostgradError

    given = json.loads(request_file.read_text())
    found: list[Result] = []
    for work in given["works"]:
        if (given["until"] and time.time() > given["until"]) or (found and "error" in found[0]):
            found.append({"left_out": True})
            continue
        begin = time.perf_counter()
        try:
            found.append({"cost": measure_cost, "stage": run_to_end, "score": score_published}[work["what"]](work))
        except PostgradError as error:
            found.append({"error": " ".join(str(error).split())})
        print(f"{work['id']}: {found[-1].get('error', 'done')} ({time.perf_counter() - begin:.0f} s)", flush=True)
    answer_file.write_text(json.dumps(found))


# --- stages ------------------------------------------------------------------------------------------------------


def make_stage(options: argparse.Namespace, kind: str, rate: float, seed: int, output: Path) -> Result:
    """The stage of a kind at a rate."""
    tuning = {**KINDS[kind], **options.options.get(kind, {})}
    if kind == "head" and options.task == "answers":
        tuning.setdefault("untie", True)
    labelled = "label" in json.loads(options.train.open().readline())
    source = {"name": "task", "path": str(options.train.resolve()), "max_passes": 1e6}
    held_out: dict[str, list[Result]] = {
        "learned": [{"name": "valid", "path": str(options.valid.resolve()), "same_format_as": "task"}]
    }
    if options.retained:
        held_out["retained"] = [{"name": "retained", "path": str(options.retained.resolve())}]
    falls = {"kind": "linear", "floor": 0} if options.retained is None else {"kind": "constant"}
    return {
        "name": f"{kind}-{rate:g}-{seed}",
        "model": str(options.model.resolve()),
        "output": str(output),
        "tokens": options.tokens,
        "seed": seed,
        "data": {
            # Rows have the same room for text whatever a kind sets before it.
            "sequence_length": options.length + virtual_positions(tuning),
            "sources": [source | ({"kind": "labelled"} if labelled else {})],
            "overlap": "off",
        },
        "batch": {"global_batch_size": options.batch},
        "schedule": {**falls, "peak": rate, "warmup": "5%"},
        "optimizer": {"weight_decay": 0.0},
        **({"objectives": [{"kind": "classify"}]} if options.task == "classify" else {}),
        "tuning": tuning,
        "evaluation": {**held_out, "every": options.every, "eval_tokens": options.look_tokens, "samples": 0},
        "save": {"every": "100%"},
        "compute": {"threads": options.threads, "dtype": options.dtype, "compile": False},
    }


def virtual_positions(tuning: Result) -> int:
    """Positions that a kind takes: vectors, and demonstrations."""
    from postgrad.data.render.prompt_template import Template

    taken = {
        "prompt": lambda: tuning["length"],
        "p-tuning": lambda: Template.parse(tuning["template"]).virtual_token_count,
        "instruction-prompt": lambda: tuning["length"] + tuning["demonstrations"]["tokens"],
    }
    return taken.get(tuning["kind"], lambda: 0)()


# --- the comparison ----------------------------------------------------------------------------------------------


def evaluation_curve(run: Result) -> list[tuple[float, tuple[float, float, float]]]:
    """The looks of a run: the loss on the new task, and the change of the retained one with its interval."""
    return [
        (look["valid"]["nats"], tuple(look["retained"][k] for k in ("change", "low", "high")))  # type: ignore[misc]
        for look in run["looks"]
    ]


def retained_change_at_loss(run: Result, loss: float) -> tuple[float, ...] | None:
    """The retained change (and its interval) where a run first has this loss on the new task; None if it never has."""
    points = evaluation_curve(run)
    for (above, before), (below, after) in itertools.pairwise(points):
        if above > loss >= below:
            part = (above - loss) / (above - below)
            return tuple(a + part * (b - a) for a, b in zip(before, after, strict=True))
    return None


def lowest_loss(run: Result) -> float:
    """The lowest loss on the new task that a run has had at a look."""
    return min(look["valid"]["nats"] for look in run["looks"])


def final_loss(run: Result) -> float:
    """The loss on the new task at the end."""
    return run["learned"]["after"]["nats"]


def best_rates(runs: Sequence[Result]) -> dict[str, float]:
    """Of each kind the rate with the lowest final loss on the new task (median over seeds)."""
    out = {}
    for kind in dict.fromkeys(run["kind"] for run in runs):
        rates = dict.fromkeys(run["rate"] for run in runs if run["kind"] == kind)
        out[kind] = min(
            rates, key=lambda r: statistics.median(final_loss(x) for x in runs if (x["kind"], x["rate"]) == (kind, r))
        )
    return out


def targets(runs: Sequence[Result], best: dict[str, float]) -> dict[str, float]:
    """New-task losses that all, three quarters and half of the kinds have reached at their best rates."""
    reached = sorted(
        statistics.median(lowest_loss(run) for run in runs if (run["kind"], run["rate"]) == (kind, rate))
        for kind, rate in best.items()
    )
    return {name: reached[max(0, round(share * len(reached)) - 1)] for name, share in SHARES.items()}


def summarise(runs: Sequence[Result], costs: dict[str, Result], task: str) -> tuple[list[Result], dict[str, float]]:
    """A row for each kind at its best rate, by its loss on the new task; and the losses at which forgetting was compared."""
    good = [run for run in runs if "error" not in run]
    best = best_rates(good)
    with_retained = [run for run in good if run["retained"]]
    wanted = targets(good, best) if with_retained else {}
    rows = []
    for kind, rate in best.items():
        own = [run for run in good if run["kind"] == kind]
        chosen = [run for run in own if run["rate"] == rate]
        accuracy = [answer_accuracy(run, task) for run in chosen]
        row: Result = {
            "kind": kind,
            "rate": rate,
            "rates": sorted({run["rate"] for run in own}),
            "seeds": len(chosen),
            "loss": median_and_range(map(final_loss, chosen)),
            "loss_by_rate": {
                f"{r:g}": median_and_range(final_loss(x) for x in own if x["rate"] == r)
                for r in sorted({x["rate"] for x in own})
            },
            "right": {key: statistics.median(a[key] for a in accuracy) for key in ("value", "low", "high")},
            "kept_bytes": chosen[0]["kept_bytes"],
            "seconds": statistics.median(run["seconds"] for run in chosen),
            **costs.get(kind, {}),
        }
        if with_retained:
            row["gain"] = statistics.median(-run["learned"]["change"]["difference"] for run in chosen)
            row["forgetting"] = {
                key: statistics.median(run["retained"][key] for run in chosen) for key in ("difference", "low", "high")
            }
            row["matched"] = {name: matched_forgetting(chosen, own, loss) for name, loss in wanted.items()}
        rows.append(row)
    for row in rows if with_retained else ():
        row["dominated_by"] = [other["kind"] for other in rows if dominates(other, row)]
    return sorted(rows, key=lambda row: row["loss"][0]), wanted


def matched_forgetting(chosen: Sequence[Result], own: Sequence[Result], loss: float) -> Result | None:
    """The retained change at this new-task loss: at the best rate over its seeds, and the least of all rates; None if never."""
    here = [found for run in chosen if (found := retained_change_at_loss(run, loss))]
    by_rate: dict[float, list[float]] = {}
    for run in own:
        found = retained_change_at_loss(run, loss)
        if found:
            by_rate.setdefault(run["rate"], []).append(found[0])
    if len(here) < len(chosen):  # one seed did not get there
        return None
    least = min(by_rate, key=lambda rate: statistics.median(by_rate[rate]))
    return {
        "change": median_and_range(h[0] for h in here),
        "interval": [statistics.median(h[i] for h in here) for i in (1, 2)],
        "least": statistics.median(by_rate[least]),
        "least_rate": least,
    }


def dominates(one_row: Result, other: Result) -> bool:
    """Whether a kind has learnt at least as much and forgotten at most as much as another, and one of them truly."""
    gains, lost = (one_row["gain"], other["gain"]), [r["forgetting"]["difference"] for r in (one_row, other)]
    return gains[0] >= gains[1] and lost[0] <= lost[1] and (gains[0] > gains[1] or lost[0] < lost[1])


def answer_accuracy(run: Result, task: str) -> Result:
    """How often a run is right at its end: the classifier's accuracy, or answers to the letter."""
    return run["learned"]["after"]["metrics"]["accuracy"] if task == "classify" else run["right"]


def untrained_accuracy(runs: Sequence[Result], options: argparse.Namespace) -> Result:
    """Without any training: the commonest class, or the start model prompted with the same questions."""
    if options.task == "classify":
        known = Counter(json.loads(line)["label"] for line in options.valid.open())
        label, count = known.most_common(1)[0]
        return {"what": f"always {label!r}", "right": count / known.total()}
    run = next(run for run in runs if "error" not in run)
    return {"what": "prompted", "loss": run["learned"]["before"]["nats"], "right": run["right_before"]}


# --- what is shown -----------------------------------------------------------------------------------------------


def table(rows: Sequence[Result], start: Result, loss_targets: dict[str, float]) -> str:
    """The rows as a Markdown table, the base first."""
    forgets = any("forgetting" in row for row in rows)
    heads = ["kind", "rate", "new-task loss (seeds)", "right (95 %)"]
    if forgets:
        heads += ["retained change (95 %)", *(f"at loss {loss:.3f}" for loss in loss_targets.values())]
    heads += ["weights", "kept", "s/step", "peak MB", "forward"] + (["frontier"] if forgets else [])
    value = start["right"] if isinstance(start["right"], float) else start["right"]["value"]
    loss = f"{start['loss']:.3f}" if "loss" in start else ""
    lines = [["*base*", start["what"], loss, f"{value:.1%}", *[""] * (len(heads) - 4)]]
    for row in rows:
        accuracy = row["right"]
        line = [
            row["kind"],
            f"{row['rate']:g}",
            f"{row['loss'][0]:.3f} [{row['loss'][1]:.3f}..{row['loss'][2]:.3f}]",
            f"{accuracy['value']:.1%} [{accuracy['low']:.1%}..{accuracy['high']:.1%}]",
        ]
        if forgets:
            lost = row["forgetting"]
            line.append(f"{lost['difference']:+.3f} [{lost['low']:+.3f}..{lost['high']:+.3f}]")
            line += [forgetting_cell(row["matched"][name]) for name in loss_targets]
        line += [
            f"{row['trainable']:,}" if "trainable" in row else "",
            f"{row['kept_bytes'] / 1e6:.2f} MB",
            f"{row['step_seconds']:.3f}" if "step_seconds" in row else "",
            f"{row['peak_mb']:.0f}" if row.get("peak_mb") else "",
            f"{row['forward']:.2f}x" if "forward" in row else "",
        ]
        if forgets:
            line.append("on it" if not row["dominated_by"] else f"dominated by {row['dominated_by'][0]}")
        lines.append(line)
    widths = [max(len(line[i]) for line in [heads, *lines]) for i in range(len(heads))]
    ruled = [heads, ["-" * width for width in widths], *lines]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in ruled)


def settings_text(options: argparse.Namespace) -> str:
    """What the numbers were taken with."""
    return (
        f"{options.tokens:,} trained tokens a run, seeds {', '.join(map(str, options.seeds))}, {options.dtype}; "
        f"{options.jobs} processes at once on {os.cpu_count()} cores with a load of {os.getloadavg()[0]:.1f}, so seconds, "
        "memory and forward times are rough."
    )


def forgetting_cell(forgetting: Result | None) -> str:
    """A cell: the retained change at the best rate with the range of its seeds, and the least over rates."""
    if forgetting is None:
        return "-"
    change = forgetting["change"]
    spread = f" [{change[1]:+.3f}..{change[2]:+.3f}]" if change[1] != change[2] else ""
    return f"{change[0]:+.3f}{spread}, least {forgetting['least']:+.3f}"


def trade_off_svg(rows: Sequence[Result]) -> str:
    """Gain against forgetting, a spot a kind, as a picture by itself."""
    from postgrad.reports.html.charts import ScatterPoint, scatter

    spots = [
        ScatterPoint(row["kind"], row["forgetting"]["difference"], row["gain"],
             x_interval=(row["forgetting"]["low"], row["forgetting"]["high"]))
        for row in rows
    ]  # fmt: skip
    drawn = scatter(
        spots, title="Gain against forgetting", x_label="retained loss, change (nats per token)",
        y_label="new-task loss, fall (nats per token)", width=760, height=460, best_corner_text="learns more, forgets less",
    )  # fmt: skip
    return drawn.standalone_svg()


def parse_rates(text: str) -> tuple[str, tuple[float, ...]]:
    """`kind=rate,rate`."""
    kind, _, rates = text.partition("=")
    if kind not in KINDS or not rates:
        raise argparse.ArgumentTypeError(f"{text!r}: kind=rate,rate is expected, with one of {', '.join(KINDS)}")
    return kind, tuple(float(rate) for rate in rates.split(","))


def parse_arguments() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=("classify", "answers"), default="classify")
    parser.add_argument("--name", help="what model and data are called in the result")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--valid", type=Path, required=True)
    parser.add_argument("--retained", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rates", nargs="+", type=parse_rates, default=[], help="kind=rate,rate in place of its own")
    parser.add_argument("--most-rates", type=int, default=3, help="only the first so many of each kind's rates")
    parser.add_argument("--options", type=json.loads, default={}, help='JSON: {"lora": {"rank": 4}}')
    parser.add_argument("--tokens", type=int, default=6000, help="trained tokens of a run; of a classifier: rows")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--every", default="10%", help="between looks during training")
    parser.add_argument("--look-tokens", type=int, default=20_000)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="processes at once; more than one disturbs the seconds")
    parser.add_argument("--minutes", type=float, help="begin no run later than this")
    parser.add_argument(
        "--keep", type=Path, help="a folder for what is done, kind by kind; what is there is not done again"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.rates = dict(options.rates)
    return options


def main() -> None:
    """Measure and print."""
    options = parse_arguments()
    until = time.time() + 60 * options.minutes if options.minutes else float("inf")
    sweep = {kind: options.rates.get(kind, RATES[kind][: options.most_rates]) for kind in options.kinds}
    runs: list[Result] = []
    costs: dict[str, Result] = {}
    failed: dict[str, str] = {}
    skipped: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def works(kind: str) -> list[Result]:
            wanted = [(rate, seed) for seed in options.seeds for rate in sweep[kind]]
            out = []
            for what, (rate, seed) in [("cost", wanted[0]), *(("stage", each) for each in wanted)]:
                label = f"{kind}-{rate:g}-{seed}-{what}"
                described = make_stage(options, kind, rate, seed, folder / label)
                asked = {"what": what, "id": label, "root": name, "cache": str(folder / "cache")}
                out.append(asked | {"kind": kind, "rate": rate, "seed": seed, "stage": described})
            return out

        by_kind = [works(kind) for kind in sweep]
        with ThreadPoolExecutor(options.jobs) as pool:
            answers = list(pool.map(lambda each: load_or_run(each, folder, until, options.keep), by_kind))
        for asked, answered in zip(by_kind, answers, strict=True):
            for work, found in zip(asked, answered, strict=True):
                if "left_out" in found:
                    skipped += [work["id"]] if work["kind"] not in failed else []
                elif work["what"] == "stage":
                    runs.append({key: work[key] for key in ("kind", "rate", "seed")} | found)
                elif "error" in found:
                    failed[work["kind"]] = found["error"]
                else:
                    costs[work["kind"]] = found
    rows, losses = summarise(runs, costs, options.task)
    start = untrained_accuracy(runs, options)
    text = f"{options.name or options.model.name}. {settings_text(options)}\n\n{table(rows, start, losses)}"
    print(text)
    for kind, error in failed.items():
        print(f"{kind}: {error}")
    if options.json:
        found = {
            "setting": {**settings(options), **provenance("peft")},
            "kinds": {kind: {**KINDS[kind], **options.options.get(kind, {})} for kind in options.kinds},
            "base": start,
            "compared_at": losses,
            "rows": rows,
            "not_applicable": failed,
            "left_out": skipped,
            "runs": [compact_run(run) for run in runs],
        }
        write_results(options.json, found)
        options.json.with_suffix(".md").write_text(text + "\n")
        if losses:
            options.json.with_suffix(".svg").write_text(trade_off_svg(rows))


def compact_run(run: Result) -> Result:
    """A run without what is said elsewhere."""
    if "error" in run:
        return run
    names = ("kind", "rate", "seed", "steps", "seconds", "wall_seconds", "kept_bytes")
    kept = {name: run[name] for name in names} | {k: run[k] for k in ("right", "right_before") if k in run}
    looks = [
        [look["step"], *(round(look[s]["nats"], 5) for s in ("valid", "retained") if s in look)]
        for look in run["looks"]
    ]
    return {**kept, "learned": run["learned"], "retained": run["retained"], "looks_step_new_retained": looks}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--works"]:
        subprocess_main(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
