"""What does a run leave behind? `record.json`: what went in, who its parents are, what it cost and what came out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from postgrad.errors import StageError
from postgrad.storage.atomic import write_atomically

RECORD = "record.json"
STAGE = "stage.yaml"
PLAN = "plan.json"
FORMAT = 1

Record = dict[str, Any]


def write_record(run: Path, record: Record) -> None:
    """Replace a run's record as a whole."""
    write_atomically(run / RECORD, json.dumps({"format": FORMAT, **record}, indent=1) + "\n")


def read_record(run: Path) -> Record:
    """A run's record. Raises `StageError` when `run` is no run folder."""
    try:
        record = json.loads((run / RECORD).read_text())
    except FileNotFoundError:
        known = sorted(p.parent for p in run.parent.glob(f"*/{RECORD}"))[:5]
        raise StageError(
            f"{run} is not a run folder (it has no {RECORD})",
            expected="the output folder of `postgrad train`" + (f", such as {known[0]}" if known else ""),
        ) from None
    except ValueError as error:
        raise StageError(f"not JSON: {error}", where=str(run / RECORD)) from error
    if record.get("format") != FORMAT:
        raise StageError(f"record format {record.get('format')!r}", where=str(run / RECORD), expected=str(FORMAT))
    return record


def get_seen_data(record: Record) -> dict[str, dict[str, Any]]:
    """What the model at the end of a run has consumed: data fingerprint -> {name, tokens, origin}; replays included."""
    return record.get("seen", {})


def add_stage(seen: dict[str, dict[str, Any]], consumed: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The ledger of everything seen, one stage later. `consumed`: fingerprint, name, tokens and origin of each source."""
    out = {key: dict(value) for key, value in seen.items()}
    for item in consumed:
        entry = out.setdefault(item["fingerprint"], {"name": item["name"], "tokens": 0, "origin": item["origin"]})
        entry["tokens"] += item["tokens"]
    return out
