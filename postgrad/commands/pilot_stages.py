"""Pilots of a stage: shortened copies of it with other settings, run in their own folders and kept as records."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postgrad.analysis.law_fitting import Estimate
from postgrad.config import schedules
from postgrad.config import stage as s
from postgrad.config.quantities import length_in_steps
from postgrad.config.renamed_keys import with_fingerprint_names
from postgrad.config.stage_file import parse_stage
from postgrad.errors import StageError
from postgrad.lineage.record import Record
from postgrad.optim.lr_schedules import shortest_warmup
from postgrad.plan.plan import Plan, make_plan
from postgrad.run.events import CheckpointSaved, EvaluationCompleted, InfoMessage, RunEvent, RunFinished, RunStopped
from postgrad.run.run import run_stage
from postgrad.run.run_folder import MODEL, Interrupt
from postgrad.storage.fingerprint import fingerprint
from postgrad.storage.read_json import MAX_BYTES, read_file

_MAX_SCORED_TOKENS = 100_000
"""Tokens of each held-out set that a pilot is scored on, at most."""
MAX_WARMUP_SHARE = 1 / 3
"""The largest share of a pilot that its warm-up takes, unless the stage's own is larger: the rest is what is measured."""
_RATE_KEYS = ("peak", "floor", "start", "constant", "end")
_LENGTH_KEYS = ("warmup", "cooldown", "constant_until", "decay", "length")


# --- the stage ------------------------------------------------------------------------------------------


def add_replay_source(raw: dict[str, Any], stage: s.Stage, path: str, root: Path) -> dict[str, Any]:
    """The stage with one more source, for which all other shares are scaled down."""
    known, sources = stage.data.sources, raw["data"]["sources"]
    names = {source.name for source in known}
    name = next(n for n in ("replay", *(f"replay-{i}" for i in range(2, 99))) if n not in names)
    if all(source.share is not None for source in known):
        sources = [
            {**raw_source, "share": 0.9 * (src.share or 0.0)} for raw_source, src in zip(sources, known, strict=True)
        ]
    added = {"name": name, "path": os.path.relpath(Path(path).resolve(), root), "role": "replay", "share": 0.1}
    return {**raw, "data": {**raw["data"], "sources": [*sources, added]}}


def check_pilots_possible(stage: s.Stage, bound: float) -> None:
    """Refuse a stage without new text or a single set of shares, a model without a past, and a bound that no gate has."""
    if "new" not in {source.role for source in stage.data.sources}:
        raise StageError("no source is new", where="data.sources", expected="a source with role: new")
    if stage.data.curriculum:
        raise StageError(
            "the shares change within the stage, so there is no single share to vary",
            where="data.curriculum",
            hint="choose for each phase as a stage of its own",
        )
    if isinstance(stage.model, s.FreshModel):
        raise StageError(
            "a randomly initialised model has nothing to forget", where="model", expected="a pretrained model"
        )
    if not 0 < bound <= 1:  # as the gate of a stage
        raise StageError(
            f"a bound of {100 * bound:g}%",
            where="--max-forgetting",
            expected="a share above 0 and at most 100%, such as 1%",
        )


def check_output_file(out: Path, stage: Path, header: str) -> None:
    """Refuse a stage file in another folder than the stage's, and one that was not written with this `header`."""
    if out.resolve().parent != stage.resolve().parent:
        raise StageError(
            f"{out} is in another folder than {stage}, and its paths are relative to that",
            where="--out",
            expected="a file in the folder of the stage",
        )
    if out.exists() and not read_file(out, MAX_BYTES, error=StageError).startswith(header.encode()):
        verb = header.rpartition(" ")[2]
        raise StageError(
            f"{out} already exists, and was not written by {verb}", where="--out", hint="name another file"
        )


def check_measured_sets(plan: Plan) -> None:
    """Refuse a plan that measures no old text, or no new text."""
    roles = {each.role for each in plan.evaluation.sets}
    if "retained" not in roles:
        raise StageError(
            "no retained set is measured",
            where="evaluation.retained",
            expected="held-out old text, or a replay source large enough to hold some out",
        )
    if "learned" not in roles:
        raise StageError(
            "no learned set is measured",
            where="evaluation.learned",
            expected="held-out new text, or a new source large enough to hold some out",
        )


def find_peak_rate(plan: Plan) -> float:
    """The highest learning rate in the stage."""
    schedule = plan.stage.schedule.model_dump(mode="json")
    rates = [part.get(key) for part in (schedule, *schedule.get("pieces", ())) for key in _RATE_KEYS]
    return max([rate for rate in rates if rate is not None] or [plan.schedule(0)])


def source_shares(plan: Plan) -> dict[str, float]:
    """The share of each source in the stage."""
    if plan.stage.data.mixing is None:
        return {
            src.name: share for src, share in zip(plan.stage.data.sources, plan.stage.resolve_shares(), strict=True)
        }
    shares = dict.fromkeys((source.name for source in plan.stage.data.sources), 0.0)
    for source, planned in zip(plan.data.sources, plan.as_record().sources, strict=True):
        shares[source.spec.source] += planned.share
    return shares


def replay_share(stage: s.Stage, shares: Mapping[str, float]) -> float:
    """The share of all replay sources together."""
    return sum(shares[source.name] for source in stage.data.sources if source.role == "replay")


def max_replay_tokens(plan: Plan) -> float:
    """Tokens of replay, in the proportions of the stage, for which every replay source has enough text."""
    if plan.stage.data.on_exhausted == "repeat":
        return float("inf")
    replayed = [
        (source.spec.max_passes * (entry.available_tokens or 0), entry.share)
        for source, entry in zip(plan.data.sources, plan.as_record().sources, strict=True)
        if source.role == "replay"
    ]
    total = sum(share for _, share in replayed)
    return min([float("inf"), *(0.98 * room * total / share for room, share in replayed if share)])


# --- a stage with other settings ------------------------------------------------------------------------


def set_replay_share(
    data: Mapping[str, Any], stage: s.Stage, shares: Mapping[str, float], replay: float
) -> dict[str, Any]:
    """The `data` of a stage with another replay share. Sources of one role keep their proportions."""
    by_role: dict[str, list[str]] = {"new": [], "replay": []}
    for source in stage.data.sources:
        by_role[source.role].append(source.name)
    new_shares = {}
    for names, role_share in ((by_role["new"], 1 - replay), (by_role["replay"], replay)):
        total = sum(shares[name] for name in names)
        for name in names:
            new_shares[name] = round(role_share * (shares[name] / total if total else 1 / len(names)), 12)
    sources = [{**source, "share": new_shares[source["name"]]} for source in data["sources"]]
    return {**{key: value for key, value in data.items() if key != "mixing"}, "sources": sources}


def scale_schedule(plan: Plan, factor: float, steps: float | None = None) -> dict[str, Any]:
    """The stage's schedule with every rate times `factor`; with `steps`, that of a pilot of so many.

    A pilot's warm-up has the steps of the stage's as far as it needs them, since a fraction of a few steps is none, and the
    pilot would measure the too large first steps of Adam. All other lengths are the same fractions.
    """
    spec: s.AnySchedule = plan.stage.schedule
    if isinstance(spec, schedules.AnnealSchedule) and spec.start is None:
        spec = spec.model_copy(update={"start": plan.schedule(0)})
    schedule = spec.model_dump(mode="json", exclude_unset=steps is None) | {"kind": spec.kind}
    if isinstance(spec, schedules.AnnealSchedule):
        schedule["start"] = spec.start

    def share(key: str, length: str) -> float:
        whole = length_in_steps(length, plan.steps, plan.tokens) / plan.steps
        if steps is None or key != "warmup":
            return whole
        needed = shortest_warmup(math.ceil(steps), plan.stage.optimizer.betas[1])
        return max(whole, min(whole * plan.steps / steps, needed / steps, MAX_WARMUP_SHARE))

    def scale(item: dict[str, Any]) -> dict[str, Any]:
        out = dict(item)
        for key, value in item.items():
            if key in _RATE_KEYS and value is not None:
                out[key] = float(f"{value * factor:.3g}")
            elif key in _LENGTH_KEYS and value is not None and steps is not None:
                out[key] = f"{100 * share(key, value):.6g}%"
            elif isinstance(value, list):
                out[key] = [scale(piece) for piece in value]
        return out

    return _fit_phases(scale(schedule))


def _fit_phases(schedule: dict[str, Any]) -> dict[str, Any]:
    """A schedule whose longer warm-up leaves less to its cooldown, or to its constant phase."""
    if schedule["kind"] == "infinite" and all(str(schedule.get(key, "")).endswith("%") for key in _LENGTH_KEYS[:3]):
        warmup, cooldown, until = (float(schedule[key][:-1]) for key in _LENGTH_KEYS[:3])
        return schedule | {"cooldown": f"{max(0.0, min(cooldown, until - warmup)):.6g}%"}
    return schedule


def make_pilot_stage(plan: Plan, raw: Mapping[str, Any], label: str) -> s.Stage:
    """A pilot as a stage: `raw`, the plain data of a whole stage, evaluated only at its end, without samples, tasks and
    probes."""
    evaluation = {
        **{key: value for key, value in raw["evaluation"].items() if key not in ("expected_losses", "abilities")},
        "every": "100%",
        "eval_tokens": min(plan.stage.evaluation.eval_tokens, 2000),
        "max_tokens": min(plan.stage.evaluation.max_tokens, _MAX_SCORED_TOKENS),
        "pseudo_perplexity": 0,
        "drift_tokens": 0,
        "relearning_steps": 0,
        "samples": 0,
        "tasks": [],
        "test": [],
    }
    pilot = {key: value for key, value in raw.items() if key not in ("track", "max_ability_drop")} | {
        "evaluation": evaluation,
        "max_forgetting": None,
        "save": {"every": "100%", "keep": 1, "dtype": plan.stage.save.dtype},
    }
    key = fingerprint(with_fingerprint_names({**pilot, "name": "", "output": ""}))[:8]
    name = f"{plan.stage.name[:60]}-{label}-{key}"
    return parse_stage({**pilot, "name": name, "output": str(pilots_folder(plan) / name)}, "a pilot")


def pilots_folder(plan: Plan) -> Path:
    """The folder of a stage's pilots."""
    return plan.output.parent / f"{plan.output.name}-pilots"


def expected_losses(losses: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    """`evaluation.expected_losses` of a stage, as plain data."""
    return {name: {key: round(end, 5) for key, end in each.as_dict().items()} for name, each in losses.items()}


# --- running --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PilotRunner:
    """Runs the pilots of a stage one after another; a finished one is only read."""

    plan: Plan
    """Of the whole stage."""
    command: str
    """Recorded as what resumes a pilot."""
    interrupt: Interrupt

    def run(self, stage: s.Stage, label: str, settings: str) -> Generator[RunEvent, None, bool]:
        """Run a pilot; True when the user requested a stop, which may come after its last step."""
        plan = make_plan(stage, self.plan.root, self.plan.cache)
        yield InfoMessage(f"{label}: {settings}, {plan.steps:,} steps")
        event: RunEvent | None = None
        for event in run_stage(plan, command=self.command, cache=self.plan.cache):
            if isinstance(event, RunFinished):
                for name in (MODEL, "checkpoints"):  # a pilot is needed only for its record
                    shutil.rmtree(plan.output / name, ignore_errors=True)
                yield InfoMessage(f"{label}: {_scores_text(event.record)}")
            if not isinstance(event, CheckpointSaved | EvaluationCompleted):  # only the end of a pilot matters
                yield event
        if self.interrupt.requested and not isinstance(event, RunStopped):
            yield RunStopped(plan.steps, plan.steps)
        return self.interrupt.requested or isinstance(event, RunStopped)


def _scores_text(record: Record) -> str:
    parts = []
    for name, change in record.changes.items():
        parts.append(f"{name} {record.scores.after[name].nats:.4f} ({change.relative_difference:+.1%})")
    return ", ".join(parts)
