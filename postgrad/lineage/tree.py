"""Which stages led to a model, and what did each of them do to every held-out set?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from postgrad.errors import StageError
from postgrad.lineage.record import Record, read_record
from postgrad.stats.forgetting import summarize_scores

ScoreRun = Callable[[Path, str], float | None]


def read_lineage(run: Path) -> list[tuple[Path, Record]]:
    """The runs from the first stage to `run`, each with its record.

    A parent is looked up where the record says, relative to the child's own folder when it has moved along. Raises
    `StageError` when a parent is gone or is no longer what it was.
    """
    out: list[tuple[Path, Record]] = []
    here: Path | None = run.resolve()
    while here is not None:
        if any(here == path for path, _ in out):
            raise StageError("the lineage goes in a circle", where=str(here))
        record = read_record(here)
        out.append((here, record))
        parents = record.get("parents", [])
        here = _find_parent(here, parents[0]) if parents else None
    return out[::-1]


def _find_parent(child: Path, parent: dict[str, Any]) -> Path:
    for place in (Path(parent["path"]), child / parent["relative"]):
        if (place / "record.json").exists():
            found = read_record(place.resolve())
            if found.get("id") != parent["id"]:
                raise StageError(
                    f"{place} is no longer the run that {child.name} started from",
                    where="lineage",
                    expected=f"the run with id {parent['id']}, met {found.get('id')}",
                )
            return place.resolve()
    raise StageError(
        f"the parent of {child.name} is gone", where="lineage", expected=f"a run folder at {parent['path']}"
    )


def lineage_matrix(
    stages: list[tuple[Path, Record]], score_missing: Callable[[int, str], float | None]
) -> dict[str, Any]:
    """The matrix of a lineage: losses (nats per token) of each model on each set, and its summary.

    Row 0 is the model the first stage started from. A cell that no record holds is asked of `missing(row, set)`.
    """
    # A stage that went on from a checkpoint of its parent: the lineage leads through that checkpoint.
    following = [(record.get("parents") or [{}])[0] for _, record in stages[1:]]
    branches = [parent if parent.get("step") else None for parent in following] + [None]
    # The same text is one column under the name it first had: a replay of it is held out under a name of its own.
    columns: dict[str, str] = {}
    learnt_at: dict[str, int] = {}
    for i, (_, record) in enumerate(stages, start=1):
        for name, change in _comparable_changes(record).items():
            key = columns.setdefault(record["fingerprints"]["sets"][name], set_key(record, name))
            # The first stage that trained on it; 0: the start model knew it, or no stage ever did.
            if not learnt_at.setdefault(key, 0) and change["role"] == "learned":
                learnt_at[key] = i
    names = list(learnt_at)
    context = stages[-1][1]["model"].get("context")
    losses = np.full((len(stages) + 1, len(names)), np.nan)
    for i, (_, record) in enumerate(stages, start=1):
        for name in _comparable_changes(record):
            if record["model"].get("context") != context:  # scored with another context: not one column
                continue
            j = names.index(columns[record["fingerprints"]["sets"][name]])
            losses[i - 1, j] = record["scores"]["before"][name]["nats"]
            losses[i, j] = record["scores"]["after"][name]["nats"]
    for i, j in zip(*np.nonzero(np.isnan(losses)), strict=True):
        value = score_missing(int(i), names[int(j)])
        losses[i, j] = np.nan if value is None else value
    summary = summarize_scores(-losses, [learnt_at[n] for n in names])
    titles = [n.split(":", 1)[0] for n in names]
    doubled = {t for t in titles if titles.count(t) > 1}
    return {
        "stages": [
            {
                "name": "start",
                "path": stages[0][1]["model"]["start"],
                "model": stages[0][1]["model"]["start"],
                "tokens": 0,
            },
            *(
                {
                    "name": record["name"] + (f" at step {branch['step']}" if branch else ""),
                    "path": str(path),
                    "model": record["model"]["start"],
                    "created": record["created"],
                    "tokens": branch["tokens"] if branch else _trained_tokens(record),
                }
                for (path, record), branch in zip(stages, branches, strict=True)
            ),
        ],
        "sets": [
            {"name": f"{t}-{n.split(':', 1)[1][:6]}" if t in doubled else t, "learnt_at": learnt_at[n]}
            for t, n in zip(titles, names, strict=True)
        ],
        "R": [[None if np.isnan(x) else float(x) for x in row] for row in losses],
        "summary": {
            "ACC": summary.accuracy,
            "BWT": summary.backward_transfer,
            "FWT": summary.forward_transfer,
            "forgetting": summary.forgetting,
            # The other names are those of the field; this one is what the table calls it.
            "denominators": {{"FM": "forgetting"}.get(name, name): said for name, said in summary.denominators.items()},
        },
    }


def _comparable_changes(record: Record) -> dict[str, Any]:
    """The sets of a run that other models may be scored on too: all but its test sets, which are looked at once."""
    return {name: change for name, change in record.get("changes", {}).items() if change["role"] != "test"}


def _trained_tokens(record: Record) -> int:
    """The trained tokens of the model that a run published: up to the step that was chosen, or all."""
    chosen = record.get("chosen")
    return chosen["trained"] if chosen else record["achieved"]["tokens"]


def set_key(record: Record, name: str) -> str:
    """`name:fingerprint` of a held-out set of a run."""
    return f"{name}:{record['fingerprints']['sets'][name]}"
