"""Collect the records of several runs of one stage in one file, against which tests compare the tables of the docs.

    python benchmarks/runs.py RUN... --json benchmarks/results/distillation.json

The stage is that of the first run, with every key; of each run what differs from it, the change of the loss on each set against
the run's start with its interval over documents, the seed, what it took, and what it won back, where it did. A path is its
folder and name alone. To repeat a run, write `stage` into a file, put `differs` in place, and name it to `postgrad train`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arms import write_results

from postgrad.lineage.record import Record, SetChange, read_record

_ABSENT = object()


def differences(one: Any, two: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The keys of `two` whose values are others than in `one`, dotted."""
    if not isinstance(one, dict) or not isinstance(two, dict) or one.get("kind") != two.get("kind"):
        if one != two:
            yield key, None if two is _ABSENT else two
        return
    for name in dict.fromkeys([*one, *two]):
        yield from differences(one.get(name, _ABSENT), two.get(name, _ABSENT), f"{key}.{name}".lstrip("."))


def summarise_run(record: Record, first: Record) -> dict[str, Any]:
    """The results of one run."""
    totals, selected = record.totals, record.published_checkpoint
    stage, base = ({k: v for k, v in r.stage.items() if k not in ("name", "seed")} for r in (record, first))
    return {
        "run": record.name,
        "seed": record.stage["seed"],
        "differs": dict(differences(base, stage)),
        "steps": totals.steps,
        "steps_planned": record.plan.steps,
        "tokens": totals.tokens,
        "seconds_of_training": round(totals.seconds, 1),
        "execution": {key: getattr(record.execution, key) for key in ("dtype", "threads", "attention")},
        "finished": record.finished,
        **({"strengths": [p.strength for p in record.penalties]} if record.penalties else {}),
        **({"chosen_step": selected.step} if selected else {}),
        "changes": {name: _summarize_change(change) for name, change in record.changes.items()},
        "nats": {
            when: {name: score.nats for name, score in getattr(record.scores, when).items()}
            for when in ("before", "after")
        },
    }


def _summarize_change(change: SetChange) -> dict[str, Any]:
    interval = {"difference": change.difference, "low": change.low, "high": change.high}
    return {"role": change.role, **interval, "count": change.unit_count, "units": change.units}


def strip_folders(value: Any) -> Any:
    """The same without the folders of whoever ran it."""
    if isinstance(value, dict):
        return {key: strip_folders(each) for key, each in value.items()}
    if isinstance(value, list):
        return [strip_folders(each) for each in value]
    return re.sub(r"/(?:[\w.-]+/)*([\w.-]+/[\w.-]+)", r"\1", value) if isinstance(value, str) else value


def main() -> None:
    """Read the records and write what they say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--what", required=True, help="One sentence on what the runs are.")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    records = [read_record(run) for run in options.runs]
    if any(record.status != "finished" for record in records):
        raise SystemExit("a run has not finished")
    first = records[0]
    found = {
        "what": options.what,
        "repeat": "postgrad train STAGE.yaml, of `stage` with a run's `differs` and `seed`; "
        "python benchmarks/runs.py RUN... --json JSON",
        "machine": first.machine,
        "versions": first.versions,
        "seeds": sorted({record.stage["seed"] for record in records}),
        "model": {"parameters": first.model.parameters, "vocabulary": first.model.vocab_size},
        "stage": first.stage,
        "runs": [summarise_run(record, first) for record in records],
    }
    write_results(options.json, strip_folders(found))


if __name__ == "__main__":
    main()
