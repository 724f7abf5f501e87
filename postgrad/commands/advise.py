"""How much replay and which peak does a stage need? Short pilots of it, laws fitted to them, and the stage written anew.

explore a few settings -> fit -> try what they propose at length -> fit again -> write the stage

Every pilot is the stage itself in small, as a run in a folder of its own: the same command goes on where it was stopped, and
another bound takes the pilots that are there. What is fitted and how is in `planning/pilots.py`.
"""

from __future__ import annotations

import math
import os
import shlex
import shutil
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from postgrad.analysis.law_fitting import Estimate
from postgrad.analysis.pilot_runs import (
    CONFIDENCE,
    MAX_SHARE,
    MIN_PEAK,
    MIN_SHARE,
    Laws,
    Pilot,
    PilotResult,
    Setting,
    SettingChoice,
    choose_setting,
    fit_pilots,
    make_confirming_pilot,
    make_exploratory_pilots,
)
from postgrad.config import schedules
from postgrad.config import stage as s
from postgrad.config.quantities import length_in_steps
from postgrad.config.renamed_keys import with_fingerprint_names
from postgrad.config.stage_file import parse_stage, read_stage
from postgrad.errors import StageError
from postgrad.lineage.record import Record, read_record
from postgrad.plan.plan import Plan, make_plan
from postgrad.run.events import CheckpointSaved, EvaluationCompleted, InfoMessage, RunEvent, RunFinished, RunStopped
from postgrad.run.run import run_stage
from postgrad.run.run_folder import MODEL, Interrupt
from postgrad.storage.atomic import write_atomically
from postgrad.storage.fingerprint import fingerprint

_MAX_SCORED_TOKENS = 100_000
"""Tokens of each held-out set that a pilot is scored on, at most."""
_MIN_RISE = 2e-4
"""Of a set's loss: a smaller rise is told from none by no pilot."""
_FILE_HEADER = "# Written by postgrad advise"


@dataclass(frozen=True)
class AdviceRequest:
    """What is asked for. `bound`: the largest rise of the loss on a retained set, as a share of it."""

    stage: Path
    overrides: tuple[str, ...]
    bound: float
    pilot_count: int
    replay: str | None
    out: Path | None


@dataclass(frozen=True)
class AdvicePlan:
    """The stage, what it would do as it is, and the pilots that explore."""

    request: AdviceRequest
    raw: dict[str, Any]
    """As it was written, with the overrides and the replay source."""
    plan: Plan
    shares: Mapping[str, float]
    """Of each source, as the stage is."""
    peak: float
    max_share: float
    """The largest share that the replay text is enough for."""
    exploring_pilots: tuple[Pilot, ...]
    cache: Path

    @property
    def stage(self) -> s.Stage:
        """The stage as it is."""
        return self.plan.stage

    @property
    def pilots_folder(self) -> Path:
        """Where the pilots lie."""
        return self.plan.output.parent / f"{self.plan.output.name}-pilots"

    @property
    def out(self) -> Path:
        """The stage file that is written."""
        given = self.request.stage
        return self.request.out or given.with_name(f"{given.stem}-advised.yaml")

    def run_tokens(self, setting: Setting) -> float:
        """The whole run's tokens: those of the stage, or as many as hold its `new_tokens`."""
        if self.stage.new_tokens is None:
            return float(self.plan.tokens)
        return self.stage.new_tokens / (1 - setting.share)


def plan_advice(request: AdviceRequest, cache: Path) -> AdvicePlan:
    """Work out the pilots. Raises `StageError` for a stage of which none can be made."""
    raw = read_stage(request.stage, list(request.overrides))
    root = request.stage.resolve().parent
    stage = parse_stage(raw, str(request.stage))
    if request.replay is not None:
        raw = _add_replay_source(raw, stage, request.replay, root)
        stage = parse_stage(raw, str(request.stage))
    _check_stage(stage, request)
    plan = make_plan(stage, root, cache)
    if not any(h.role == "retained" for h in plan.evaluation.sets):
        raise StageError(
            "nothing is measured that could be forgotten",
            where="evaluation.retained",
            expected="held-out old text, or a replay source large enough to hold some out",
        )
    if not any(h.role == "learned" for h in plan.evaluation.sets):
        raise StageError(
            "nothing is measured that could be learnt",
            where="evaluation.learned",
            expected="held-out new text, or a new source large enough to hold some out",
        )
    peak = _peak_rate(plan)
    step = plan.tokens / plan.steps
    explored = make_exploratory_pilots(request.pilot_count, peak, plan.tokens, step)
    return AdvicePlan(request, raw, plan, _source_shares(plan), peak, _max_replay_share(plan), tuple(explored), cache)


def _add_replay_source(raw: dict[str, Any], stage: s.Stage, path: str, root: Path) -> dict[str, Any]:
    """The stage with one more source; the new text's shares make room for it."""
    known, sources = stage.data.sources, raw["data"]["sources"]
    names = {source.name for source in known}
    name = next(n for n in ("replay", *(f"replay-{i}" for i in range(2, 99))) if n not in names)
    if all(source.share is not None for source in known):
        sources = [{**given, "share": 0.9 * (src.share or 0.0)} for given, src in zip(sources, known, strict=True)]
    added = {"name": name, "path": os.path.relpath(Path(path).resolve(), root), "role": "replay", "share": 0.1}
    return {**raw, "data": {**raw["data"], "sources": [*sources, added]}}


def _check_stage(stage: s.Stage, request: AdviceRequest) -> None:
    """Refuse what no pilot can be made of, or has nothing to vary."""
    roles = {source.role for source in stage.data.sources}
    if "replay" not in roles:
        raise StageError(
            "no source is replayed, so no share of replay can be found",
            where="data.sources",
            expected="a source with role: replay",
            hint="name old text with --replay FILE; the model can write its own: postgrad synthesize",
        )
    if "new" not in roles:
        raise StageError("no source is new", where="data.sources", expected="a source with role: new")
    if stage.data.curriculum:
        raise StageError(
            "the shares change within the stage, so there is no one share to be found",
            where="data.curriculum",
            hint="advise each part as a stage of its own",
        )
    if isinstance(stage.model, s.FreshModel):
        raise StageError("a new model has nothing to forget", where="model", expected="a model that was trained")
    if not request.bound > 0:
        raise StageError(
            f"a bound of {100 * request.bound:g}%", where="--max-forgetting", expected="a share above 0, such as 1%"
        )
    out = request.out or request.stage.with_name(f"{request.stage.stem}-advised.yaml")
    if out.resolve().parent != request.stage.resolve().parent:
        raise StageError(
            f"{out} lies in another folder than {request.stage}, from where the paths in it count",
            where="--out",
            expected="a file beside the stage",
        )
    if out.exists() and not out.read_text(errors="replace").startswith(_FILE_HEADER):
        raise StageError(f"{out} is there already, and is not of our writing", where="--out", hint="name another file")


def _peak_rate(plan: Plan) -> float:
    """The highest rate that the stage names."""
    given = plan.stage.schedule.model_dump(mode="json")
    named = [part.get(key) for part in (given, *given.get("pieces", ())) for key in _RATE_KEYS]
    return max([rate for rate in named if rate is not None] or [plan.schedule(0)])


def _source_shares(plan: Plan) -> dict[str, float]:
    """The share of each source in the stage as it is."""
    if plan.stage.data.mixing is None:
        return {
            src.name: share for src, share in zip(plan.stage.data.sources, plan.stage.resolve_shares(), strict=True)
        }
    found = dict.fromkeys((source.name for source in plan.stage.data.sources), 0.0)
    for leaf, told in zip(plan.data.sources, plan.as_record().sources, strict=True):
        found[leaf.spec.source] += told.share
    return found


def _max_replay_share(plan: Plan) -> float:
    """The largest share for which there is enough replay text, each source in its part."""
    if plan.stage.data.on_exhausted == "repeat":
        return MAX_SHARE
    planned = plan.as_record().sources
    replayed = [
        (leaf.spec.max_passes * told.available_tokens, told.share)
        for leaf, told in zip(plan.data.sources, planned, strict=True)
        if leaf.role == "replay"
    ]
    total = sum(share for _, share in replayed)
    shares = [room / plan.tokens * total / share for room, share in replayed if share]
    return min([MAX_SHARE, *(0.98 * share for share in shares)])


# --- a stage with other settings ------------------------------------------------------------------------


def apply_setting(
    raw: Mapping[str, Any], advice_plan: AdvicePlan, setting: Setting, tokens: int | None = None
) -> dict[str, Any]:
    """A stage as plain data with another share of replay and another peak; with `tokens`, shortened to so many.

    Sources of one role keep their proportions, and the schedule its shape: every rate is scaled with the peak.
    """
    alike: dict[str, list[str]] = {"new": [], "replay": []}
    for source in advice_plan.stage.data.sources:
        alike[source.role].append(source.name)
    shares = {}
    for names, wanted in ((alike["new"], 1 - setting.share), (alike["replay"], setting.share)):
        total = sum(advice_plan.shares[name] for name in names)
        for name in names:
            shares[name] = round(wanted * (advice_plan.shares[name] / total if total else 1 / len(names)), 12)
    sources = [{**source, "share": shares[source["name"]]} for source in raw["data"]["sources"]]
    data = {key: value for key, value in raw["data"].items() if key != "mixing"}
    out = {
        **raw,
        "data": {**data, "sources": sources},
        "schedule": scale_schedule(advice_plan.plan, setting.peak / advice_plan.peak, full_run=tokens is None),
    }
    if tokens is not None:
        out = {**out, "tokens": tokens, "new_tokens": None}
    return out


def scale_schedule(plan: Plan, factor: float, *, full_run: bool) -> dict[str, Any]:
    """The stage's schedule with every rate times `factor`; unless it is for the whole run, lengths as parts of it."""
    spec: s.AnySchedule = plan.stage.schedule
    if isinstance(spec, schedules.AnnealSchedule) and spec.start is None:
        spec = spec.model_copy(update={"start": plan.schedule(0)})
    given = spec.model_dump(mode="json", exclude_unset=full_run) | {"kind": spec.kind}
    if isinstance(spec, schedules.AnnealSchedule):
        given["start"] = spec.start

    def changed(item: dict[str, Any]) -> dict[str, Any]:
        out = dict(item)
        for key, value in item.items():
            if key in _RATE_KEYS and value is not None:
                out[key] = float(f"{value * factor:.3g}")
            elif key in _LENGTH_KEYS and value is not None and not full_run:
                out[key] = f"{100 * length_in_steps(value, plan.steps, plan.tokens) / plan.steps:.6g}%"
            elif isinstance(value, list):
                out[key] = [changed(piece) for piece in value]
        return out

    return changed(given)


_RATE_KEYS = ("peak", "floor", "start", "constant", "end")
_LENGTH_KEYS = ("warmup", "cooldown", "constant_until", "decay", "length")


def pilot_stage(advice_plan: AdvicePlan, pilot: Pilot) -> s.Stage:
    """A pilot as a stage: no looks but at the end, no samples, and nothing kept but scores."""
    full = advice_plan.stage.model_dump(mode="json")
    evaluation = {
        **full["evaluation"],
        "every": "100%",
        "eval_tokens": min(full["evaluation"]["eval_tokens"], 2000),
        "max_tokens": min(full["evaluation"]["max_tokens"], _MAX_SCORED_TOKENS),
        "pseudo_perplexity": 0,
        "drift_tokens": 0,
        "samples": 0,
        "tasks": [],
        "test": [],
    }
    raw = apply_setting(full, advice_plan, pilot.setting, pilot.tokens) | {
        "evaluation": evaluation,
        "max_forgetting": None,
        "save": {"every": "100%", "keep": 1, "dtype": full["save"]["dtype"]},
    }
    key = fingerprint(with_fingerprint_names({**raw, "name": "", "output": ""}))[:8]
    name = f"{advice_plan.stage.name}-{pilot.setting.share:.3g}-{pilot.setting.peak:.3g}-{key}"
    return parse_stage({**raw, "name": name, "output": str(advice_plan.pilots_folder / name)}, "a pilot")


# --- the pilots -----------------------------------------------------------------------------------------


def run_pilots(advice_plan: AdvicePlan, command: str) -> Iterator[RunEvent]:
    """Carry out the pilots that are not there yet; the last event is how the last one ended."""
    total = (
        sum(pilot.tokens for pilot in advice_plan.exploring_pilots)
        + make_confirming_pilot(advice_plan.exploring_pilots[0].setting, advice_plan.plan.tokens).tokens
    )
    count = len(advice_plan.exploring_pilots) + 1
    yield InfoMessage(
        f"{count} pilots take {total:,} tokens, {total / advice_plan.plan.tokens:.1%} of the run's {advice_plan.plan.tokens:,}; "
        f"they lie in {advice_plan.pilots_folder}"
    )
    with Interrupt() as interrupt:
        for number, pilot in enumerate(advice_plan.exploring_pilots, 1):
            if (yield from _run_pilot(advice_plan, pilot, f"pilot {number} of {count}", command, interrupt)):
                return
        choice = _propose_setting(advice_plan)
        if choice.is_within_bounds:
            last, said = (
                make_confirming_pilot(choice.setting, advice_plan.plan.tokens),
                "which tries what the others propose",
            )
            yield from _run_pilot(advice_plan, last, f"pilot {count} of {count}, {said}", command, interrupt)


def _run_pilot(
    advice_plan: AdvicePlan, pilot: Pilot, label: str, command: str, interrupt: Interrupt
) -> Generator[RunEvent, None, bool]:
    """Carry out a pilot; True when the user asked to stop, which may have been when there was nothing left to train."""
    plan = make_plan(pilot_stage(advice_plan, pilot), advice_plan.plan.root, advice_plan.cache)
    setting = pilot.setting
    yield InfoMessage(f"{label}: {setting.share:.1%} replay, peak {setting.peak:.2e}, {plan.steps:,} steps")
    event: RunEvent | None = None
    for event in run_stage(plan, command=command, cache=advice_plan.cache):
        if isinstance(event, RunFinished):
            for name in (MODEL, "checkpoints"):  # all that is asked of a pilot is in its record
                shutil.rmtree(plan.output / name, ignore_errors=True)
            yield InfoMessage(f"{label}: {_scores_text(event.record)}")
        if not isinstance(event, CheckpointSaved | EvaluationCompleted):  # a pilot's end is all that counts
            yield event
    if interrupt.requested and not isinstance(event, RunStopped):
        yield RunStopped(plan.steps, plan.steps)
    return interrupt.requested or isinstance(event, RunStopped)


def _scores_text(record: Record) -> str:
    parts = []
    for name, change in record.changes.items():
        parts.append(f"{name} {record.scores.after[name].nats:.4f} ({change.relative_difference:+.1%})")
    return ", ".join(parts)


def _read_pilot_record(advice_plan: AdvicePlan, pilot: Pilot) -> Record:
    return read_record(advice_plan.pilots_folder / pilot_stage(advice_plan, pilot).name)


def _pilot_result(advice_plan: AdvicePlan, pilot: Pilot) -> PilotResult:
    """How a pilot ended."""
    record = _read_pilot_record(advice_plan, pilot)
    changes, totals = record.changes.items(), record.totals
    least = 0.5 / sum(source.rows for source in totals.sources)
    # In few rows there may be none of replay, or of new text: then there was less than one.
    share = sum(source.share for source in totals.sources if source.role == "replay")
    share = min(max(share, least), 1 - least)
    return PilotResult(
        Pilot(Setting(share, pilot.setting.peak), totals.tokens),
        {name: c.difference or 0.0 for name, c in changes if c.role == "retained"},
        {name: record.scores.after[name].nats for name, c in changes if c.role == "learned"},
        pilot in advice_plan.exploring_pilots,
    )


def _start_losses(advice_plan: AdvicePlan) -> dict[str, float]:
    """The start model's loss on each retained set."""
    record = _read_pilot_record(advice_plan, advice_plan.exploring_pilots[0])
    return {name: record.scores.before[name].nats for name in record.changes_with_role("retained")}


def _fit_laws(advice_plan: AdvicePlan, pilots: Sequence[Pilot]) -> Laws:
    floor = _MIN_RISE * min(_start_losses(advice_plan).values())
    step = advice_plan.plan.tokens / advice_plan.plan.steps
    return fit_pilots(
        [_pilot_result(advice_plan, pilot) for pilot in pilots], advice_plan.run_tokens, advice_plan.peak, floor, step
    )


def _propose_setting(advice_plan: AdvicePlan) -> SettingChoice:
    """What the exploring pilots propose to try at length: as likely to break the bound as to keep it, so the answer is near."""
    return _choose_setting(advice_plan, advice_plan.exploring_pilots, confidence=0.5)


def _choose_setting(advice_plan: AdvicePlan, pilots: Sequence[Pilot], confidence: float = CONFIDENCE) -> SettingChoice:
    bounds = {name: advice_plan.request.bound * nats for name, nats in _start_losses(advice_plan).items()}
    return choose_setting(
        _fit_laws(advice_plan, pilots), bounds, confidence=confidence, max_share=advice_plan.max_share
    )


# --- the advice -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Advice:
    """The setting, what is expected of it, and what to be wary of."""

    setting: Setting
    retained_losses: Mapping[str, Estimate]
    """The loss on each retained set after the run, in nats per token."""
    retained_rises: Mapping[str, Estimate]
    """Its rise, as a share of the loss before."""
    learned_losses: Mapping[str, Estimate]
    """The loss on each learned set after the run."""
    break_even: Setting
    """The setting at which the bound is as likely to be broken as to be kept."""
    warnings: tuple[str, ...]
    pilots: tuple[PilotResult, ...]


def advise(advice_plan: AdvicePlan) -> Advice:
    """What the pilots say, once all are finished. Raises `StageError` when no setting keeps within the bound."""
    choice = _propose_setting(advice_plan)
    if not choice.is_within_bounds:
        raise _unreachable_bound(advice_plan, advice_plan.exploring_pilots, choice)
    tried = (*advice_plan.exploring_pilots, make_confirming_pilot(choice.setting, advice_plan.plan.tokens))
    first = choice.setting
    choice, laws, before = (
        _choose_setting(advice_plan, tried),
        _fit_laws(advice_plan, tried),
        _start_losses(advice_plan),
    )
    if not choice.is_within_bounds:
        raise _unreachable_bound(advice_plan, tried, choice)
    setting = choice.setting
    rises = {name: laws.rise(name, setting) for name in before}
    return Advice(
        setting,
        {n: Estimate(before[n] + e.value, before[n] + e.low, before[n] + e.high) for n, e in rises.items()},
        {n: Estimate(e.value / before[n], e.low / before[n], e.high / before[n]) for n, e in rises.items()},
        {name: laws.loss(name, setting) for name in laws.losses},
        _choose_setting(advice_plan, tried, confidence=0.5).setting,
        tuple(_warnings(advice_plan, tried, first, setting)),
        tuple(_pilot_result(advice_plan, pilot) for pilot in tried),
    )


def _unreachable_bound(advice_plan: AdvicePlan, pilots: Sequence[Pilot], choice: SettingChoice) -> StageError:
    laws, before, setting = _fit_laws(advice_plan, pilots), _start_losses(advice_plan), choice.setting
    rises = {name: laws.rise(name, setting) for name in before}
    worst = max(rises, key=lambda name: rises[name].high / before[name])
    rise, loss = rises[worst], before[worst]
    sure = laws.rise(worst, setting, confidence=CONFIDENCE).high / loss
    return StageError(
        f"no share of replay up to {advice_plan.max_share:.0%} and no peak down to {setting.peak:.2e} keeps the rise on {worst} "
        f"within {100 * advice_plan.request.bound:g}%",
        where="--max-forgetting",
        expected=f"{math.ceil(1000 * sure) / 10:.1f}% or more: the best reachable is a rise of {rise.value / loss:.2%} "
        f"(95 % interval {rise.low / loss:.2%} to {rise.high / loss:.2%})",
        hint="a larger bound, a lower peak in the stage, or more replay text; the pilots are kept",
    )


def _warnings(
    advice_plan: AdvicePlan, pilots: Sequence[Pilot], proposed_setting: Setting, setting: Setting
) -> Iterator[str]:
    """Where the laws are asked about what no pilot has tried."""
    longest, run = max(pilot.tokens for pilot in pilots), advice_plan.run_tokens(setting)
    yield f"the run is {run / longest:.0f} times as long as the longest pilot; the intervals allow for that"
    shares = sorted(pilot.setting.share for pilot in pilots)
    if not shares[0] <= setting.share <= shares[-1]:
        yield f"{setting.share:.1%} replay lies outside what was tried ({shares[0]:.1%} to {shares[-1]:.1%})"
    if setting.share <= MIN_SHARE:
        yield f"less than {MIN_SHARE:.0%} replay may do; it is never proposed"
    if setting.peak >= 0.99 * advice_plan.peak:
        yield "the peak is the stage's own, the highest that was tried; a higher one may learn more"
    if setting.peak <= 1.01 * MIN_PEAK * advice_plan.peak:
        yield f"the peak is the lowest that is proposed, {MIN_PEAK:g} times the stage's"
    if setting.share >= 0.99 * advice_plan.max_share:
        yield f"there is replay text for a share of {advice_plan.max_share:.0%} only; with more text a higher peak may be possible"
    before = _fit_laws(advice_plan, pilots[:-1])
    end, last = _pilot_result(advice_plan, pilots[-1]), pilots[-1].tokens
    for name, rise in end.rises.items():
        expected = before.rise(name, proposed_setting, tokens=last)
        if not expected.low <= rise <= expected.high:
            yield (
                f"the longest pilot forgot {rise:.4f} nats on {name}, where the others let {expected.low:.4f} to "
                f"{expected.high:.4f} be expected: the laws hold badly here"
            )


def write_advice(advice_plan: AdvicePlan, advice: Advice) -> dict[str, Any]:
    """Write the stage with the advised settings; give everything as plain data, with `text` for people."""
    raw = apply_setting(advice_plan.raw, advice_plan, advice.setting) | {
        "name": f"{advice_plan.stage.name}-advised",
        "max_forgetting": advice_plan.request.bound,
    }
    if advice_plan.stage.output is not None:
        raw["output"] = f"{advice_plan.stage.output}-advised"
    lines = _advice_lines(advice_plan, advice)
    head = "".join(f"# {line}\n" if line else "#\n" for line in lines)
    shown = yaml.safe_dump(raw, sort_keys=False, allow_unicode=True, width=120)
    write_atomically(
        advice_plan.out,
        f"{_FILE_HEADER} from {advice_plan.request.stage.name} and {len(advice.pilots)} pilots.\n{head}{shown}",
    )
    command = shlex.join(["postgrad", "train", str(advice_plan.out)])
    return {
        "stage": str(advice_plan.out),
        "share": advice.setting.share,
        "peak": advice.setting.peak,
        "max_forgetting": advice_plan.request.bound,
        "even": {"share": advice.break_even.share, "peak": advice.break_even.peak},
        "old": {name: e.as_dict() for name, e in advice.retained_losses.items()},
        "rise": {name: e.as_dict() for name, e in advice.retained_rises.items()},
        "new": {name: e.as_dict() for name, e in advice.learned_losses.items()},
        "warnings": list(advice.warnings),
        "tokens": sum(item.pilot.tokens for item in advice.pilots),
        "run_tokens": round(advice_plan.run_tokens(advice.setting)),
        "pilots": [
            {
                "share": item.pilot.setting.share,
                "peak": item.pilot.setting.peak,
                "tokens": item.pilot.tokens,
                "rises": dict(item.rises),
                "losses": dict(item.losses),
            }
            for item in advice.pilots
        ],
        "next": command,
        "text": "\n".join(["", *lines, "", f"stage: {advice_plan.out}", f"next: {command}"]),
    }


def _advice_lines(advice_plan: AdvicePlan, advice: Advice) -> list[str]:
    """The advice for people."""
    setting, spent = advice.setting, sum(item.pilot.tokens for item in advice.pilots)
    lines = [
        f"replay {setting.share:.1%}, peak {setting.peak:.2e} (the stage had {_current_replay_share(advice_plan):.1%} and {advice_plan.peak:.2e})",
        f"expected of the whole run of {advice_plan.run_tokens(setting):,.0f} tokens, with 95 % intervals:",
    ]
    for name, loss in advice.retained_losses.items():
        rise = advice.retained_rises[name]
        lines.append(
            f"  {name}: {loss.value:.4f} nats per token ({loss.low:.4f} to {loss.high:.4f}), a rise of {rise.value:.2%} "
            f"({rise.low:.2%} to {rise.high:.2%}); {100 * advice_plan.request.bound:g}% is allowed"
        )
    for name, loss in advice.learned_losses.items():
        lines.append(f"  {name}: {loss.value:.4f} nats per token ({loss.low:.4f} to {loss.high:.4f})")
    lines.append(
        f"{advice.break_even.share:.1%} replay at a peak of {advice.break_even.peak:.2e} is as likely to break the bound as to keep it"
    )
    lines += [f"note: {warning}" for warning in advice.warnings]
    lines.append(f"the pilots took {spent:,} tokens, {spent / advice_plan.plan.tokens:.1%} of the run's")
    return lines


def _current_replay_share(advice_plan: AdvicePlan) -> float:
    """The share of replay in the stage as it is."""
    return sum(advice_plan.shares[source.name] for source in advice_plan.stage.data.sources if source.role == "replay")
