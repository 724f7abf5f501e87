"""Rank correlation between the shift from old to new text and the forgetting of a model trained on the new text.

    python benchmarks/shift_ranking.py --model MODEL --old old.jsonl --retained old-heldout.jsonl \
        --json benchmarks/results/shift_ranking.json german.jsonl code.jsonl abstracts.jsonl ...

For each new text: `postgrad shift` measures how far it is, and `postgrad train` goes on with it without replay, once for each
seed, always with the same number of tokens and the same rates. Then the rank correlation (Spearman) of each measure with
what was forgotten, and how often the order of the texts would come out as well if measures and texts were paired at random.
Everything is kept in the folder of `--work`, and what is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arms import provenance, settings, write_results

Result = dict[str, Any]
MEASURES = ("byte trigrams", "tokens", "n-gram log-ratio", "told apart", "bits per byte")


def make_stage(args: argparse.Namespace, text: Path, seed: int) -> Result:
    """Training without replay, as plain data."""
    return {
        "name": f"{text.stem}-{seed}",
        "model": args.model,
        "output": str(args.work / f"{text.stem}-{seed}"),
        "tokens": args.tokens,
        "seed": seed,
        "data": {
            "sequence_length": 256,
            "sources": [{"name": "new", "path": str(text.resolve()), "held_out": "5%", "max_passes": 20}],
        },
        "batch": {"global_batch_size": 8, "micro_batch_size": 8},
        "schedule": {"kind": "rewarm", "peak": args.peak, "floor": args.peak / 10, "warmup": "5%"},
        "evaluation": {
            "every": "50%",
            "max_tokens": 40_000,
            "eval_tokens": 1000,
            "samples": 0,
            "drift_tokens": 0,
            "retained": [{"name": "old", "path": str(args.retained.resolve())}],
        },
        "compute": {"dtype": "float32", "compile": False, "threads": 1},
    }


def run_postgrad(*words: str) -> Result:
    """What a command prints as JSON. Raises `SystemExit` with its own words when it fails."""
    done = subprocess.run([sys.executable, "-m", "postgrad", *words, "--json"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"postgrad {' '.join(words)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout[done.stdout.index("{") :])


def measure_forgetting(args: argparse.Namespace, text: Path, seed: int) -> Result:
    """The change of the loss on the old text (nats per token), after training on the new one."""
    described = make_stage(args, text, seed)
    file = args.work / f"{described['name']}.yaml"
    file.write_text(json.dumps(described))  # JSON is YAML
    record = Path(described["output"]) / "record.json"
    found = json.loads(record.read_text()) if record.exists() else run_postgrad("train", str(file))
    change = found["changes"]["old"]
    return {"seed": seed, **{key: change[key] for key in ("difference", "low", "high")}}


def measure_shift(args: argparse.Namespace, text: Path) -> Result:
    """The measures of `postgrad shift` for the new text."""
    kept = args.work / f"{text.stem}.shift.json"
    if not kept.exists():
        found = run_postgrad("shift", "--model", args.model, "--old", str(args.old), "--new", str(text))
        kept.write_text(json.dumps(found))
    found = json.loads(kept.read_text())
    return {
        **{name: found["distances"][name]["value"] for name in MEASURES[:-1]},
        "bits per byte": found["surprise"]["value"],
        "strength": found["strength"],
    }


def rank_correlation(rows: Sequence[Result], measure: str) -> Result:
    """Spearman's correlation of a measure with the mean forgetting; `p` by permutations."""
    from scipy.stats import permutation_test, spearmanr

    shifts = [row["shift"][measure] for row in rows]
    losses = [row["mean"] for row in rows]
    by_chance = permutation_test(
        (shifts,),
        lambda order: spearmanr(order, losses).statistic,
        permutation_type="pairings",
        alternative="greater",
        n_resamples=9999,
        rng=0,
    )
    of_seeds = [
        float(spearmanr(shifts, [row["runs"][i]["difference"] for row in rows]).statistic)
        for i in range(len(rows[0]["runs"]))
    ]
    return {"spearman": float(by_chance.statistic), "p": float(by_chance.pvalue), "of_seeds": of_seeds}


def table(rows: Sequence[Result], agreement: Result) -> str:
    """Texts by what was forgotten, then how well each measure has their order."""
    lines = ["| new text | byte trigrams | forgotten, nats per token | over seeds |", "|---|---:|---:|---:|"]
    for row in rows:
        each = [run["difference"] for run in row["runs"]]
        lines.append(
            f"| {row['text']} | {row['shift']['byte trigrams']:.2f} | {row['mean']:+.2f} | "
            f"{min(each):+.2f} to {max(each):+.2f} |"
        )
    lines += ["", "| measure | rank correlation | by single seeds | p |", "|---|---:|---:|---:|"]
    for name, found in agreement.items():
        single = f"{min(found['of_seeds']):.2f} to {max(found['of_seeds']):.2f}"
        lines.append(f"| {name} | {found['spearman']:.2f} | {single} | {found['p']:.4f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, train, compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", type=Path, help="new texts, one file each")
    parser.add_argument("--model", required=True)
    parser.add_argument("--old", required=True, type=Path, help="text that the model knows")
    parser.add_argument("--retained", required=True, type=Path, help="held-out text that it knows")
    parser.add_argument("--tokens", type=int, default=150_000)
    parser.add_argument("--peak", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("shift-ranking"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)

    rows: list[Result] = []
    for text in args.texts:
        runs = [measure_forgetting(args, text, seed) for seed in range(args.seeds)]
        mean = statistics.fmean(run["difference"] for run in runs)
        rows.append({"text": text.stem, "shift": measure_shift(args, text), "runs": runs, "mean": mean})
        print(f"{text.stem}: {mean:+.3f} {rows[-1]['shift']}", file=sys.stderr, flush=True)
    rows.sort(key=lambda row: row["mean"])
    agreement = {measure: rank_correlation(rows, measure) for measure in MEASURES}
    print(table(rows, agreement))
    what = (__doc__ or "").splitlines()[0]
    asked = settings(args)
    write_results(args.json, {**provenance(), "what": what, "settings": asked, "rows": rows, "agreement": agreement})


if __name__ == "__main__":
    main()
