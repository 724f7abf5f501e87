"""Does advice hold? What pilots predict against what the whole run measures, and whether less replay would have done.

    python benchmarks/advice.py --model MODEL --retained old.valid.jsonl --replay old.train.jsonl \
        --new abstracts=abstracts.jsonl --new novels=novels.jsonl --bounds 15%,30% --work FOLDER \
        --json benchmarks/results/advice.json

For each new text and bound a stage is written, advised (`postgrad advise`), and the advised stage carried out in full. What is
held against one another: the loss that was predicted on old and new text and the one that the run ends with; the bound and the
rise. Then, with --less, the same stage is carried out with the share divided by 1.5: where that breaks the bound, the advised
share was at most 1.5 times the smallest that a full grid of runs at this peak would have found. Everything is kept in the
folder: the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import yaml
from arms import provenance

from postgrad.commands.advise import AdviceRequest, advise, plan_advice, run_pilots, write_advice
from postgrad.config.quantities import parse_share
from postgrad.config.stage_file import parse_stage, read_stage
from postgrad.errors import StageError
from postgrad.plan.plan import make_plan
from postgrad.run.run import RunFinished, RunStopped, run_stage

Result = dict[str, Any]
REPLAY_REDUCTION = 1.5


def make_stage(options: argparse.Namespace, name: str, path: str) -> Result:
    """The stage that is advised: 10 % replay, re-warmed to the highest peak that may be."""
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


def run_to_end(stage: Result, root: Path, cache: Path) -> Result:
    """The record of a run."""
    plan = make_plan(parse_stage(stage, stage["name"]), root, cache)
    *_, last = run_stage(plan, command="benchmarks/advice.py", cache=cache)
    if not isinstance(last, RunFinished):
        raise SystemExit(3)
    return last.record


def run_identity(root: Path, corpus: str, share: float, peak: float) -> Result:
    """The name and the folder of a run, by what it is of."""
    name = f"{corpus}-{share:.4g}-{peak:.3g}"
    return {"name": name, "output": str(root / "runs" / name)}


def run_case(options: argparse.Namespace, corpus: str, path: str, bound: str, cache: Path) -> Result:
    """One text and bound: the advice, the run, and the run with less replay."""
    root = Path(options.work)
    place = root / f"{corpus}.yaml"
    place.write_text(yaml.safe_dump(make_stage(options, corpus, path), sort_keys=False))
    out = root / f"{corpus}-{bound.strip('%')}-advised.yaml"
    wish = AdviceRequest(place, (), parse_share(bound, "--bounds"), options.pilots, None, out)
    asked = plan_advice(wish, cache)
    begun = time.monotonic()
    *_, last = run_pilots(asked, "benchmarks/advice.py")
    if isinstance(last, RunStopped):
        raise SystemExit(3)
    row: Result = {"corpus": corpus, "bound": wish.bound, "pilots_seconds": round(time.monotonic() - begun, 1)}
    try:
        found = write_advice(asked, advise(asked))
    except StageError as error:
        return {**row, "impossible": str(error)}
    row |= {key: found[key] for key in ("share", "peak", "tokens", "run_tokens", "old", "rise", "new", "pilots")}
    stage = read_stage(out) | {"max_forgetting": None}
    ran = run_to_end(stage | run_identity(root, corpus, found["share"], found["peak"]), root, cache)
    row["measured"] = {
        "old": ran["scores"]["after"]["old"]["nats"],
        "new": ran["scores"]["after"]["new"]["nats"],
        "rise": ran["changes"]["old"]["relative"],
        "rise_high": ran["changes"]["old"]["relative_high"],
        "seconds": round(ran["achieved"]["seconds"], 1),
    }
    if options.less:
        sources = [dict(source) for source in stage["data"]["sources"]]
        sources[1]["share"] = round(found["share"] / REPLAY_REDUCTION, 6)
        sources[0]["share"] = 1 - sources[1]["share"]
        name = f"{out.stem}-less"
        less = {
            **stage,
            "name": name,
            "output": str(root / "runs" / name),
            "data": {**stage["data"], "sources": sources},
        }
        row["less"] = {
            "share": sources[1]["share"],
            "rise": run_to_end(less, root, cache)["changes"]["old"]["relative"],
        }
    return row


def summary(rows: list[Result]) -> Result:
    """How often what was promised was kept."""
    ran = [row for row in rows if "measured" in row]

    def off(row: Result, kind: str) -> float:
        told = row["old"]["old"] if kind == "old" else row["new"]["new"]
        return told["value"] / row["measured"][kind] - 1

    def inside(row: Result, kind: str) -> bool:
        told = row["old"]["old"] if kind == "old" else row["new"]["new"]
        return told["low"] <= row["measured"][kind] <= told["high"]

    less = [row for row in ran if "less" in row]
    return {
        "cases": len(rows),
        "impossible": len(rows) - len(ran),
        "kept": sum(row["measured"]["rise"] <= row["bound"] for row in ran),
        "of": len(ran),
        "within_1_percent_new": sum(abs(off(row, "new")) <= 0.01 for row in ran),
        "within_1_percent_old": sum(abs(off(row, "old")) <= 0.01 for row in ran),
        "inside_interval_new": sum(inside(row, "new") for row in ran),
        "inside_interval_old": sum(inside(row, "old") for row in ran),
        "mean_off_new": sum(abs(off(row, "new")) for row in ran) / max(1, len(ran)),
        "mean_off_old": sum(abs(off(row, "old")) for row in ran) / max(1, len(ran)),
        "at_most_1.5_times": sum(row["less"]["rise"] > row["bound"] or row["share"] <= 0.01 for row in less),
        "at_most_1.5_times_of": len(less),
    }


def table(rows: list[Result]) -> str:
    """The cases, for people."""
    lines = [
        "corpus       bound  replay  peak      old told  measured  rise told  measured  new told  measured  less breaks"
    ]
    for row in rows:
        if "measured" not in row:
            lines.append(f"{row['corpus']:<12} {row['bound']:>5.0%}  no setting keeps within it")
            continue
        old, rise, new = (row[key][name]["value"] for key, name in (("old", "old"), ("rise", "old"), ("new", "new")))
        was = row["measured"]
        less = f"{row['less']['rise'] > row['bound']}" if "less" in row else ""
        lines.append(
            f"{row['corpus']:<12} {row['bound']:>5.0%}  {row['share']:>6.1%}  {row['peak']:.2e}  "
            f"{old:>8.4f}  {was['old']:>8.4f}  "
            f"{rise:>9.1%}  {was['rise']:>8.1%}  {new:>8.4f}  {was['new']:>8.4f}  {less}"
        )
    return "\n".join(lines)


def main() -> None:
    """Carry out the cases, print the table, write the JSON after each."""
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
    given = parser.parse_args()
    Path(given.work).mkdir(parents=True, exist_ok=True)
    cache = Path(os.environ.get("POSTGRAD_CACHE", Path(given.work) / "cache"))
    rows: list[Result] = []
    for bound in given.bounds.split(","):
        for item in given.new:
            corpus, path = item.split("=", 1)
            rows.append(run_case(given, corpus, path, bound, cache))
            print(table(rows[-1:]).split("\n")[-1], flush=True)
            if given.json:
                about = {
                    **provenance(),
                    "model": Path(given.model).name,
                    **{
                        key: getattr(given, key)
                        for key in ("tokens", "length", "sequences", "peak", "pilots", "scored")
                    },
                }
                given.json.write_text(json.dumps({**about, "summary": summary(rows), "cases": rows}, indent=1) + "\n")
    print("\n" + table(rows) + "\n" + json.dumps(summary(rows), indent=1))


if __name__ == "__main__":
    main()
