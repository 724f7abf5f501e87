"""Accuracy by prompt length, selected on one part of the data and reported on another.

    python benchmarks/prompt_length.py --model MODEL --data labelled.jsonl --json benchmarks/results/prompt_length.json

The rows (`text`, `label`) are parted into train, dev and test by a hash of their text, so that a text has one place
whatever else is in the file. Each length with each rate and seed is a stage of its own. The length and the rate are
chosen by accuracy on dev, the loss breaking ties; then the chosen run is scored on test, once, and nothing else ever is.
(The published search keeps the best value on dev as its result, which is too good by as much as was searched.)

The grid is the published one of P-tuning v2: lengths 4 to 128, rates 5e-3, 7e-3, 1e-2.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from arms import median_and_range, provenance, settings, write_results
from tunings import Result, make_stage, run_in_subprocess

LENGTHS = (4, 8, 16, 32, 64, 128)
RATES = (5e-3, 7e-3, 1e-2)
PARTS = {"train": 0.6, "dev": 0.2, "test": 0.2}


def partition_name(text: str) -> str:
    """The part that a text belongs to, by its content alone."""
    draw = int.from_bytes(hashlib.sha256(text.strip().encode()).digest()[:8], "big") / 2**64
    for name, share in PARTS.items():
        draw -= share
        if draw < 0:
            return name
    return name


def write_partitions(data: Path, folder: Path) -> dict[str, list[dict[str, str]]]:
    """Write train.jsonl, dev.jsonl and test.jsonl into the folder; the rows of each."""
    rows: dict[str, list[dict[str, str]]] = {name: [] for name in PARTS}
    for line in data.read_text().splitlines():
        row = json.loads(line)
        rows[partition_name(row["text"])].append(row)
    for name, each in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    return rows


def tuning_config(kind: str, length: int) -> dict[str, Any]:
    """A tuning of this length."""
    return {"kind": kind, "length": length}


def dev_scores(run: Result) -> Result:
    """A run's scores on dev."""
    return run["learned"]["after"]


def choose_best_run(runs: list[Result]) -> Result:
    """The run that is right most often on dev; among equals the one with the lower loss."""
    return min(runs, key=lambda run: (-dev_scores(run)["metrics"]["accuracy"]["value"], dev_scores(run)["nats"]))


def results_by_length(runs: list[Result]) -> list[Result]:
    """For each length its best rate on dev: accuracy (median over seeds, with the interval of its rows) and loss."""
    rows = []
    for length in sorted({run["length"] for run in runs}):
        own = [run for run in runs if run["length"] == length]

        def accuracy(rate: float, own: list[Result] = own) -> float:
            return statistics.median(
                dev_scores(run)["metrics"]["accuracy"]["value"] for run in own if run["rate"] == rate
            )

        rates = sorted({run["rate"] for run in own})
        best = max(rates, key=accuracy)
        chosen = [dev_scores(run) for run in own if run["rate"] == best]
        rows.append(
            {
                "length": length,
                "rate": best,
                "accuracy_by_rate": {f"{rate:g}": accuracy(rate) for rate in rates},
                "accuracy": {
                    key: statistics.median(said["metrics"]["accuracy"][key] for said in chosen)
                    for key in ("value", "low", "high")
                },
                "seeds": median_and_range(said["metrics"]["accuracy"]["value"] for said in chosen),
                "loss": median_and_range(said["nats"] for said in chosen),
            }
        )
    return rows


def table(rows: list[Result]) -> str:
    """The curve as a Markdown table."""
    lines = ["| length | rate | accuracy on dev (95 %) | seeds | loss on dev |", "|---|---|---|---|---|"]
    for row in rows:
        said, seeds = row["accuracy"], row["seeds"]
        lines.append(
            f"| {row['length']} | {row['rate']:g} | {said['value']:.1%} [{said['low']:.1%}..{said['high']:.1%}] "
            f"| {seeds[1]:.1%}..{seeds[2]:.1%} | {row['loss'][0]:.3f} |"
        )
    return "\n".join(lines)


def figure(rows: list[Result]) -> str:
    """The curve with its band as a picture by itself."""
    from postgrad.reports.html.charts import Series, line_chart

    points = [(float(row["length"]), row["accuracy"]["value"]) for row in rows]
    band = [(float(row["length"]), row["accuracy"]["low"], row["accuracy"]["high"]) for row in rows]
    drawn = line_chart(
        [Series("dev", points, band, has_markers=True)], title="Length against accuracy", x_label="length",
        y_label="accuracy", x_scale="log", x_ticks=[(float(row["length"]), str(row["length"])) for row in rows],
    )  # fmt: skip
    return drawn.standalone_svg()


def parse_arguments() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", help="what model and data are called in the result")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--kind", choices=("p-tuning-v2", "prompt"), default="p-tuning-v2")
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--tokens", type=int, default=20_000, help="rows that a run trains on, repeats counted")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128, help="positions of a row, without the prompt")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Search, choose, and report."""
    options = parse_arguments()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = write_partitions(options.data, folder)
        sizes = {key: len(rows) for key, rows in parts.items()}
        common, most = Counter(row["label"] for row in parts["test"]).most_common(1)[0]

        def asked(length: int, rate: float, seed: int, on: str) -> Result:
            label = f"{length}-{rate:g}-{seed}"
            given = argparse.Namespace(
                **{k: v for k, v in vars(options).items() if k not in ("rates", "lengths")},
                task="classify",
                train=folder / "train.jsonl",
                valid=folder / f"{on}.jsonl",
                retained=None,
                every="50%",
                look_tokens=500,
                options={options.kind: tuning_config(options.kind, length)},
            )
            described = make_stage(given, options.kind, rate, seed, folder / label)
            return {"id": f"{label}-{on}", "root": name, "cache": str(folder / "cache"), "stage": described}

        def run(length: int, rate: float, seed: int) -> Result:
            found = run_in_subprocess([asked(length, rate, seed, "dev") | {"what": "stage"}], folder)[0]
            if "error" in found:
                raise SystemExit(f"length {length}, rate {rate:g}: {found['error']}")
            said = dev_scores(found)["metrics"]["accuracy"]["value"]
            print(f"{said:.1%} on dev ({time.monotonic() - began:.0f} s)", flush=True)
            return {"length": length, "rate": rate, "seed": seed, **found}

        grid = [(n, r, s) for s in options.seeds for r in options.rates for n in options.lengths]
        with ThreadPoolExecutor(options.jobs) as pool:
            runs = list(pool.map(lambda given: run(*given), grid))
        best = choose_best_run(runs)
        chosen = (best["length"], best["rate"], best["seed"])
        test = run_in_subprocess([asked(*chosen, "test") | {"what": "score"}], folder)[0]
        rows = results_by_length(runs)
    text = table(rows)
    said = test["metrics"]["accuracy"]
    text += (
        f"\n\nChosen on dev: length {best['length']}, rate {best['rate']:g}. On test, looked at once: "
        f"{said['value']:.1%} [{said['low']:.1%}..{said['high']:.1%}] of {sizes['test']:,} rows "
        f"(always {common!r}: {most / sizes['test']:.1%})."
    )
    print(text)
    if options.json:
        names = ("length", "rate", "seed", "steps", "seconds")
        found = {
            "setting": {**settings(options), **provenance("peft"), "rows": sizes},
            "kind": options.kind,
            "curve": rows,
            "chosen": {"length": best["length"], "rate": best["rate"], "seed": best["seed"]},
            "test": test,
            "test_commonest": {"label": common, "right": most / sizes["test"]},
            "runs": [{**{k: r[k] for k in names}, "dev": dev_scores(r)} for r in runs],
        }
        write_results(options.json, found)
        options.json.with_suffix(".md").write_text(text + "\n")
        options.json.with_suffix(".svg").write_text(figure(rows))


if __name__ == "__main__":
    main()
