"""Compare the predictions of `postgrad advise` with the advised runs, and with runs that replay less.

    python benchmarks/advice.py --model MODEL --retained old.valid.jsonl --replay old.train.jsonl \
        --new abstracts=abstracts.jsonl --new novels=novels.jsonl --bounds 15%,30% --work FOLDER \
        --json benchmarks/results/advice.json

For each new text and bound the benchmark writes a stage, runs `postgrad advise` on it, and trains the advised stage in full.
It compares predicted and measured losses on old and new text, and the measured rise with the bound. With --less it also trains
the stage with the replay share divided by 1.5: if that run breaks the bound, the advised share is at most 1.5 times the
smallest one that a grid of full runs at this peak would have found. The work folder keeps all files; the same command resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from arms import provenance

from postgrad.analysis.law_fitting import Estimate
from postgrad.commands.advise import AdviceRequest, fit_advice, plan_advice, run_pilots, write_advice
from postgrad.config.quantities import parse_share
from postgrad.config.stage_file import parse_stage, read_stage
from postgrad.errors import StageError
from postgrad.lineage.record import Record
from postgrad.plan.plan import make_plan
from postgrad.run.events import RunFinished, RunStopped
from postgrad.run.run import run_stage

Result = dict[str, Any]
REPLAY_REDUCTION = 1.5


def make_stage(options: argparse.Namespace, name: str, path: str) -> Result:
    """The stage before advice: 10 % replay, re-warmed to the highest allowed peak."""
    return {
        "name": name,
        "model": str(Path(options.model).resolve()),
        "tokens": options.tokens,
        "data": {
            "sequence_length": options.length,
            "overlap": "off",
            "sources": [
                {"name": "new", "path": str(Path(path).resolve()), "share": 0.9, "held_out": 0.06, "max_passes": 100},
                {"name": "replay", "path": str(Path(options.replay).resolve()), "share": 0.1, "role": "replay",
                 "held_out": 0, "max_passes": 100},
            ],
        },
        "batch": {"global_batch_size": options.sequences},
        "schedule": {"kind": "rewarm", "peak": options.peak, "floor": options.peak / 10, "warmup": "5%"},
        "evaluation": {
            "retained": [{"name": "old", "path": str(Path(options.retained).resolve())}],
            "every": "100%", "max_tokens": options.scored, "eval_tokens": 2000, "samples": 0, "drift_tokens": 0,
        },
        "save": {"every": "100%", "keep": 1},
        "compute": {"threads": 1, "compile": False, "dtype": "float32"},
    }  # fmt: skip


def run_to_end(stage: Result, root: Path, cache: Path) -> Record:
    """Run a stage, or resume it, and return its record."""
    plan = make_plan(parse_stage(stage, stage["name"]), root, cache)
    *_, last = run_stage(plan, command="benchmarks/advice.py", cache=cache)
    if not isinstance(last, RunFinished):
        raise SystemExit(3)
    return last.record


def run_identity(root: Path, corpus: str, share: float, peak: float) -> Result:
    """The name and the output folder of a run."""
    name = f"{corpus}-{share:.4g}-{peak:.3g}"
    return {"name": name, "output": str(root / "runs" / name)}


def run_case(options: argparse.Namespace, corpus: str, path: str, bound: str, cache: Path) -> Result:
    """One text and bound: the advice, the advised run, and the run with less replay."""
    root = Path(options.work)
    stage_file = root / f"{corpus}.yaml"
    stage_file.write_text(yaml.safe_dump(make_stage(options, corpus, path), sort_keys=False))
    out = root / f"{corpus}-{bound.strip('%')}-advised.yaml"
    request = AdviceRequest(stage_file, (), parse_share(bound, "--bounds"), options.pilots, None, out)
    advice_plan = plan_advice(request, cache)
    begin = time.monotonic()
    *_, last = run_pilots(advice_plan, "benchmarks/advice.py")
    if isinstance(last, RunStopped):
        raise SystemExit(3)
    row: Result = {"corpus": corpus, "bound": request.bound, "pilots_seconds": round(time.monotonic() - begin, 1)}
    try:
        advice = fit_advice(advice_plan)
    except StageError as error:
        return {**row, "impossible": str(error)}
    write_advice(advice_plan, advice)
    setting = advice.setting
    row |= {
        "share": setting.share,
        "peak": setting.peak,
        "tokens": advice.pilot_tokens,
        "run_tokens": advice.run_tokens,
        "old": _intervals(advice.retained_losses),
        "rise": _intervals(advice.retained_rises),
        "new": _intervals(advice.learned_losses),
        "pilots": advice.as_dict()["pilots"],
    }
    stage = read_stage(out) | {"max_forgetting": None}
    record = run_to_end(stage | run_identity(root, corpus, setting.share, setting.peak), root, cache)
    assert record.totals is not None
    row["measured"] = {
        "old": record.scores.after["old"].nats,
        "new": record.scores.after["new"].nats,
        "rise": record.changes["old"].relative_difference,
        "rise_high": record.changes["old"].relative_high,
        "seconds": round(record.totals.seconds, 1),
    }
    if options.less:
        sources = [dict(source) for source in stage["data"]["sources"]]
        sources[1]["share"] = round(setting.share / REPLAY_REDUCTION, 6)
        sources[0]["share"] = 1 - sources[1]["share"]
        name = f"{out.stem}-less"
        less = {
            **stage,
            "name": name,
            "output": str(root / "runs" / name),
            "data": {**stage["data"], "sources": sources},
        }
        rise = run_to_end(less, root, cache).changes["old"].relative_difference
        row["less"] = {"share": sources[1]["share"], "rise": rise}
    return row


def _intervals(estimates: Mapping[str, Estimate]) -> Result:
    return {name: estimate.as_dict() for name, estimate in estimates.items()}


def summary(rows: list[Result]) -> Result:
    """How often the bound was kept, and how far predictions and measurements lie apart."""
    finished = [row for row in rows if "measured" in row]

    def prediction(row: Result, kind: str) -> Result:
        return row["old"]["old"] if kind == "old" else row["new"]["new"]

    def relative_error(row: Result, kind: str) -> float:
        return prediction(row, kind)["value"] / row["measured"][kind] - 1

    def is_inside(row: Result, kind: str) -> bool:
        return prediction(row, kind)["low"] <= row["measured"][kind] <= prediction(row, kind)["high"]

    less = [row for row in finished if "less" in row]
    return {
        "cases": len(rows),
        "impossible": len(rows) - len(finished),
        "kept": sum(row["measured"]["rise"] <= row["bound"] for row in finished),
        "of": len(finished),
        "within_1_percent_new": sum(abs(relative_error(row, "new")) <= 0.01 for row in finished),
        "within_1_percent_old": sum(abs(relative_error(row, "old")) <= 0.01 for row in finished),
        "inside_interval_new": sum(is_inside(row, "new") for row in finished),
        "inside_interval_old": sum(is_inside(row, "old") for row in finished),
        "mean_off_new": sum(abs(relative_error(row, "new")) for row in finished) / max(1, len(finished)),
        "mean_off_old": sum(abs(relative_error(row, "old")) for row in finished) / max(1, len(finished)),
        "at_most_1.5_times": sum(row["less"]["rise"] > row["bound"] or row["share"] <= 0.01 for row in less),
        "at_most_1.5_times_of": len(less),
    }


def table(rows: list[Result]) -> str:
    """The cases as a text table."""
    lines = [
        "corpus       bound  replay  peak      old pred. measured  rise pred. measured new pred. measured  less breaks"
    ]
    for row in rows:
        if "measured" not in row:
            lines.append(f"{row['corpus']:<12} {row['bound']:>5.0%}  no setting keeps it")
            continue
        old, rise, new = (row[key][name]["value"] for key, name in (("old", "old"), ("rise", "old"), ("new", "new")))
        measured = row["measured"]
        less = f"{row['less']['rise'] > row['bound']}" if "less" in row else ""
        lines.append(
            f"{row['corpus']:<12} {row['bound']:>5.0%}  {row['share']:>6.1%}  {row['peak']:.2e}  "
            f"{old:>8.4f}  {measured['old']:>8.4f}  "
            f"{rise:>9.1%}  {measured['rise']:>8.1%}  {new:>8.4f}  {measured['new']:>8.4f}  {less}"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the cases, print the table, and write the JSON after each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--retained", required=True)
    parser.add_argument("--replay", required=True)
    parser.add_argument("--new", action="append", required=True, help="NAME=FILE; may be repeated")
    parser.add_argument("--bounds", default="15%,30%")
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--scored", type=int, default=10_000)
    parser.add_argument("--peak", type=float, default=1e-3)
    parser.add_argument("--pilots", type=int, default=5)
    parser.add_argument("--less", action="store_true", help="also run each with the share divided by 1.5")
    parser.add_argument("--work", required=True)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    Path(options.work).mkdir(parents=True, exist_ok=True)
    cache = Path(os.environ.get("POSTGRAD_CACHE", Path(options.work) / "cache"))
    rows: list[Result] = []
    for bound in options.bounds.split(","):
        for item in options.new:
            corpus, path = item.split("=", 1)
            rows.append(run_case(options, corpus, path, bound, cache))
            print(table(rows[-1:]).split("\n")[-1], flush=True)
            if options.json:
                header = {
                    **provenance(),
                    "model": Path(options.model).name,
                    **{
                        key: getattr(options, key)
                        for key in ("tokens", "length", "sequences", "peak", "pilots", "scored")
                    },
                }
                options.json.write_text(
                    json.dumps({**header, "summary": summary(rows), "cases": rows}, indent=1) + "\n"
                )
    print("\n" + table(rows) + "\n" + json.dumps(summary(rows), indent=1))


if __name__ == "__main__":
    main()
