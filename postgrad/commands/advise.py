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
    LEAST_SHARE,
    LOWEST_PEAK,
    MOST_SHARE,
    SURE,
    Choice,
    Found,
    Laws,
    Pilot,
    Setting,
    choose,
    confirming,
    exploring,
    fit_pilots,
)
from postgrad.config import schedules
from postgrad.config import stage as s
from postgrad.config.quantities import in_steps
from postgrad.config.stage_file import parse_stage, read_stage
from postgrad.errors import StageError
from postgrad.lineage.record import Record, read_record
from postgrad.plan.plan import Plan, make_plan
from postgrad.run.run import MODEL, Event, Finished, Looked, Said, Saved, Stopped, run_stage
from postgrad.run.run_folder import Interrupt
from postgrad.storage.atomic import write_atomically
from postgrad.storage.fingerprint import fingerprint

_SCORED = 100_000
"""Tokens of each held-out set that a pilot is scored on, at most."""
_FLOOR = 2e-4
"""Of a set's loss: a smaller rise is told from none by no pilot."""
_HEAD = "# Written by postgrad advise"


@dataclass(frozen=True)
class Wish:
    """What is asked for. `bound`: the largest rise of the loss on a retained set, as a share of it."""

    stage: Path
    overrides: tuple[str, ...]
    bound: float
    pilots: int
    replay: str | None
    out: Path | None


@dataclass(frozen=True)
class Asked:
    """The stage, what it would do as it is, and the pilots that explore."""

    wish: Wish
    raw: dict[str, Any]
    """As it was written, with the overrides and the replay source."""
    plan: Plan
    shares: Mapping[str, float]
    """Of each source, as the stage is."""
    peak: float
    most: float
    """The largest share that the replay text is enough for."""
    explored: tuple[Pilot, ...]
    cache: Path

    @property
    def stage(self) -> s.Stage:
        """The stage as it is."""
        return self.plan.stage

    @property
    def home(self) -> Path:
        """Where the pilots lie."""
        return self.plan.output.parent / f"{self.plan.output.name}-pilots"

    @property
    def out(self) -> Path:
        """The stage file that is written."""
        given = self.wish.stage
        return self.wish.out or given.with_name(f"{given.stem}-advised.yaml")

    def tokens(self, setting: Setting) -> float:
        """The whole run's tokens: those of the stage, or as many as hold its `new_tokens`."""
        if self.stage.new_tokens is None:
            return float(self.plan.tokens)
        return self.stage.new_tokens / (1 - setting.share)


def plan_advice(wish: Wish, cache: Path) -> Asked:
    """Work out the pilots. Raises `StageError` for a stage of which none can be made."""
    raw = read_stage(wish.stage, list(wish.overrides))
    root = wish.stage.resolve().parent
    stage = parse_stage(raw, str(wish.stage))
    if wish.replay is not None:
        raw = _with_replay(raw, stage, wish.replay, root)
        stage = parse_stage(raw, str(wish.stage))
    _refuse(stage, wish)
    plan = make_plan(stage, root, cache)
    if not any(h.role == "retained" for h in plan.held_out):
        raise StageError(
            "nothing is measured that could be forgotten",
            where="evaluation.retained",
            expected="held-out old text, or a replay source large enough to hold some out",
        )
    if not any(h.role == "learned" for h in plan.held_out):
        raise StageError(
            "nothing is measured that could be learnt",
            where="evaluation.learned",
            expected="held-out new text, or a new source large enough to hold some out",
        )
    peak = _peak(plan)
    step = plan.tokens / plan.steps
    explored = exploring(wish.pilots, peak, plan.tokens, step)
    return Asked(wish, raw, plan, _shares(plan), peak, _most(plan), tuple(explored), cache)


def _with_replay(raw: dict[str, Any], stage: s.Stage, path: str, root: Path) -> dict[str, Any]:
    """The stage with one more source; the new text's shares make room for it."""
    known, sources = stage.data.sources, raw["data"]["sources"]
    names = {source.name for source in known}
    name = next(n for n in ("replay", *(f"replay-{i}" for i in range(2, 99))) if n not in names)
    if all(source.share is not None for source in known):
        sources = [{**given, "share": 0.9 * (src.share or 0.0)} for given, src in zip(sources, known, strict=True)]
    added = {"name": name, "path": os.path.relpath(Path(path).resolve(), root), "role": "replay", "share": 0.1}
    return {**raw, "data": {**raw["data"], "sources": [*sources, added]}}


def _refuse(stage: s.Stage, wish: Wish) -> None:
    """Refuse what no pilot can be made of, or has nothing to vary."""
    roles = {source.role for source in stage.data.sources}
    if "replay" not in roles:
        raise StageError(
            "no source is replayed, so no share of replay can be found",
            where="data.sources",
            expected="a source with role: replay",
            way_out="name old text with --replay FILE; the model can write its own: postgrad synthesize",
        )
    if "new" not in roles:
        raise StageError("no source is new", where="data.sources", expected="a source with role: new")
    if stage.data.shifts:
        raise StageError(
            "the shares change within the stage, so there is no one share to be found",
            where="data.shifts",
            way_out="advise each part as a stage of its own",
        )
    if isinstance(stage.model, s.FreshModel):
        raise StageError("a new model has nothing to forget", where="model", expected="a model that was trained")
    if not wish.bound > 0:
        raise StageError(
            f"a bound of {100 * wish.bound:g}%", where="--max-forgetting", expected="a share above 0, such as 1%"
        )
    out = wish.out or wish.stage.with_name(f"{wish.stage.stem}-advised.yaml")
    if out.resolve().parent != wish.stage.resolve().parent:
        raise StageError(
            f"{out} lies in another folder than {wish.stage}, from where the paths in it count",
            where="--out",
            expected="a file beside the stage",
        )
    if out.exists() and not out.read_text(errors="replace").startswith(_HEAD):
        raise StageError(
            f"{out} is there already, and is not of our writing", where="--out", way_out="name another file"
        )


def _peak(plan: Plan) -> float:
    """The highest rate that the stage names."""
    given = plan.stage.schedule.model_dump(mode="json")
    named = [part.get(key) for part in (given, *given.get("pieces", ())) for key in _RATES]
    return max([rate for rate in named if rate is not None] or [plan.schedule(0)])


def _shares(plan: Plan) -> dict[str, float]:
    """The share of each source in the stage as it is."""
    if plan.stage.data.mixing is None:
        return {src.name: share for src, share in zip(plan.stage.data.sources, plan.stage.shares(), strict=True)}
    found = dict.fromkeys((source.name for source in plan.stage.data.sources), 0.0)
    for leaf, told in zip(plan.leaves, plan.as_record()["sources"], strict=True):
        found[leaf.wanted.source] += told["share"]
    return found


def _most(plan: Plan) -> float:
    """The largest share for which there is enough replay text, each source in its part."""
    if plan.stage.data.when_short == "repeat":
        return MOST_SHARE
    planned = plan.as_record()["sources"]
    replayed = [
        (leaf.wanted.max_passes * told["available"], told["share"])
        for leaf, told in zip(plan.leaves, planned, strict=True)
        if leaf.role == "replay"
    ]
    total = sum(share for _, share in replayed)
    shares = [room / plan.tokens * total / share for room, share in replayed if share]
    return min([MOST_SHARE, *(0.98 * share for share in shares)])


# --- a stage with other settings ------------------------------------------------------------------------


def with_setting(raw: Mapping[str, Any], asked: Asked, setting: Setting, tokens: int | None = None) -> dict[str, Any]:
    """A stage as plain data with another share of replay and another peak; with `tokens`, shortened to so many.

    Sources of one role keep their proportions, and the schedule its shape: every rate is scaled with the peak.
    """
    alike: dict[str, list[str]] = {"new": [], "replay": []}
    for source in asked.stage.data.sources:
        alike[source.role].append(source.name)
    shares = {}
    for names, wanted in ((alike["new"], 1 - setting.share), (alike["replay"], setting.share)):
        total = sum(asked.shares[name] for name in names)
        for name in names:
            shares[name] = round(wanted * (asked.shares[name] / total if total else 1 / len(names)), 12)
    sources = [{**source, "share": shares[source["name"]]} for source in raw["data"]["sources"]]
    data = {key: value for key, value in raw["data"].items() if key != "mixing"}
    out = {
        **raw,
        "data": {**data, "sources": sources},
        "schedule": scaled(asked.plan, setting.peak / asked.peak, whole=tokens is None),
    }
    if tokens is not None:
        out = {**out, "tokens": tokens, "new_tokens": None}
    return out


def scaled(plan: Plan, factor: float, *, whole: bool) -> dict[str, Any]:
    """The stage's schedule with every rate times `factor`; unless it is for the whole run, lengths as parts of it."""
    spec: s.AnySchedule = plan.stage.schedule
    if isinstance(spec, schedules.Anneal) and spec.start is None:
        spec = spec.model_copy(update={"start": plan.schedule(0)})
    given = spec.model_dump(mode="json", exclude_unset=whole) | {"kind": spec.kind}
    if isinstance(spec, schedules.Anneal):
        given["start"] = spec.start

    def changed(item: dict[str, Any]) -> dict[str, Any]:
        out = dict(item)
        for key, value in item.items():
            if key in _RATES and value is not None:
                out[key] = float(f"{value * factor:.3g}")
            elif key in _LENGTHS and value is not None and not whole:
                out[key] = f"{100 * in_steps(value, plan.steps, plan.tokens) / plan.steps:.6g}%"
            elif isinstance(value, list):
                out[key] = [changed(piece) for piece in value]
        return out

    return changed(given)


_RATES = ("peak", "floor", "start", "constant", "end")
_LENGTHS = ("warmup", "cooldown", "constant_until", "decay", "length")


def pilot_stage(asked: Asked, pilot: Pilot) -> s.Stage:
    """A pilot as a stage: no looks but at the end, no samples, and nothing kept but scores."""
    full = asked.stage.model_dump(mode="json")
    evaluation = {
        **full["evaluation"],
        "every": "100%",
        "during_tokens": min(full["evaluation"]["during_tokens"], 2000),
        "max_tokens": min(full["evaluation"]["max_tokens"], _SCORED),
        "pseudo_perplexity": 0,
        "drift_tokens": 0,
        "samples": 0,
        "tasks": [],
        "test": [],
    }
    raw = with_setting(full, asked, pilot.setting, pilot.tokens) | {
        "evaluation": evaluation,
        "max_forgetting": None,
        "save": {"every": "100%", "keep": 1, "dtype": full["save"]["dtype"]},
    }
    key = fingerprint({**raw, "name": "", "output": ""})[:8]
    name = f"{asked.stage.name}-{pilot.setting.share:.3g}-{pilot.setting.peak:.3g}-{key}"
    return parse_stage({**raw, "name": name, "output": str(asked.home / name)}, "a pilot")


# --- the pilots -----------------------------------------------------------------------------------------


def piloted(asked: Asked, command: str) -> Iterator[Event]:
    """Carry out the pilots that are not there yet; the last event is how the last one ended."""
    total = (
        sum(pilot.tokens for pilot in asked.explored) + confirming(asked.explored[0].setting, asked.plan.tokens).tokens
    )
    count = len(asked.explored) + 1
    yield Said(
        f"{count} pilots take {total:,} tokens, {total / asked.plan.tokens:.1%} of the run's {asked.plan.tokens:,}; "
        f"they lie in {asked.home}"
    )
    with Interrupt() as interrupt:
        for number, pilot in enumerate(asked.explored, 1):
            if (yield from _piloted(asked, pilot, f"pilot {number} of {count}", command, interrupt)):
                return
        choice = _proposed(asked)
        if choice.within:
            last, said = confirming(choice.setting, asked.plan.tokens), "which tries what the others propose"
            yield from _piloted(asked, last, f"pilot {count} of {count}, {said}", command, interrupt)


def _piloted(asked: Asked, pilot: Pilot, said: str, command: str, interrupt: Interrupt) -> Generator[Event, None, bool]:
    """Carry out a pilot; True when the user asked to stop, which may have been when there was nothing left to train."""
    plan = make_plan(pilot_stage(asked, pilot), asked.plan.root, asked.cache)
    setting = pilot.setting
    yield Said(f"{said}: {setting.share:.1%} replay, peak {setting.peak:.2e}, {plan.steps:,} steps")
    event: Event | None = None
    for event in run_stage(plan, command=command, cache=asked.cache):
        if isinstance(event, Finished):
            for name in (MODEL, "checkpoints"):  # all that is asked of a pilot is in its record
                shutil.rmtree(plan.output / name, ignore_errors=True)
            yield Said(f"{said}: {_told(event.record)}")
        if not isinstance(event, Saved | Looked):  # a pilot's end is all that counts
            yield event
    if interrupt.asked and not isinstance(event, Stopped):
        yield Stopped(plan.steps, plan.steps)
    return interrupt.asked or isinstance(event, Stopped)


def _told(record: Record) -> str:
    parts = []
    for name, change in record["changes"].items():
        parts.append(f"{name} {record['scores']['after'][name]['nats']:.4f} ({change['relative']:+.1%})")
    return ", ".join(parts)


def _record(asked: Asked, pilot: Pilot) -> Record:
    return read_record(asked.home / pilot_stage(asked, pilot).name)


def _found(asked: Asked, pilot: Pilot) -> Found:
    """How a pilot ended."""
    record = _record(asked, pilot)
    changes, done = record["changes"].items(), record["achieved"]
    least = 0.5 / sum(source["rows"] for source in done["sources"])
    # In few rows there may be none of replay, or of new text: then there was less than one.
    share = sum(source["share"] for source in done["sources"] if source["role"] == "replay")
    share = min(max(share, least), 1 - least)
    return Found(
        Pilot(Setting(share, pilot.setting.peak), done["tokens"]),
        {name: c["difference"] for name, c in changes if c["role"] == "retained"},
        {name: record["scores"]["after"][name]["nats"] for name, c in changes if c["role"] == "learned"},
        pilot in asked.explored,
    )


def _before(asked: Asked) -> dict[str, float]:
    """The start model's loss on each retained set."""
    record = _record(asked, asked.explored[0])
    return {n: record["scores"]["before"][n]["nats"] for n, c in record["changes"].items() if c["role"] == "retained"}


def _fitted(asked: Asked, tried: Sequence[Pilot]) -> Laws:
    floor = _FLOOR * min(_before(asked).values())
    step = asked.plan.tokens / asked.plan.steps
    return fit_pilots([_found(asked, pilot) for pilot in tried], asked.tokens, asked.peak, floor, step)


def _proposed(asked: Asked) -> Choice:
    """What the exploring pilots propose to try at length: as likely to break the bound as to keep it, so the answer is near."""
    return _choice(asked, asked.explored, sure=0.5)


def _choice(asked: Asked, tried: Sequence[Pilot], sure: float = SURE) -> Choice:
    bounds = {name: asked.wish.bound * nats for name, nats in _before(asked).items()}
    return choose(_fitted(asked, tried), bounds, sure=sure, most=asked.most)


# --- the advice -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Advice:
    """The setting, what is expected of it, and what to be wary of."""

    setting: Setting
    old: Mapping[str, Estimate]
    """The loss on each retained set after the run, in nats per token."""
    rises: Mapping[str, Estimate]
    """Its rise, as a share of the loss before."""
    new: Mapping[str, Estimate]
    """The loss on each learned set after the run."""
    even: Setting
    """The setting at which the bound is as likely to be broken as to be kept."""
    warnings: tuple[str, ...]
    pilots: tuple[Found, ...]


def advise(asked: Asked) -> Advice:
    """What the pilots say, once all are finished. Raises `StageError` when no setting keeps within the bound."""
    choice = _proposed(asked)
    if not choice.within:
        raise _beyond(asked, asked.explored, choice)
    tried = (*asked.explored, confirming(choice.setting, asked.plan.tokens))
    first = choice.setting
    choice, laws, before = _choice(asked, tried), _fitted(asked, tried), _before(asked)
    if not choice.within:
        raise _beyond(asked, tried, choice)
    setting = choice.setting
    rises = {name: laws.rise(name, setting) for name in before}
    return Advice(
        setting,
        {n: Estimate(before[n] + e.value, before[n] + e.low, before[n] + e.high) for n, e in rises.items()},
        {n: Estimate(e.value / before[n], e.low / before[n], e.high / before[n]) for n, e in rises.items()},
        {name: laws.loss(name, setting) for name in laws.losses},
        _choice(asked, tried, sure=0.5).setting,
        tuple(_warnings(asked, tried, first, setting)),
        tuple(_found(asked, pilot) for pilot in tried),
    )


def _beyond(asked: Asked, tried: Sequence[Pilot], choice: Choice) -> StageError:
    laws, before, setting = _fitted(asked, tried), _before(asked), choice.setting
    rises = {name: laws.rise(name, setting) for name in before}
    worst = max(rises, key=lambda name: rises[name].high / before[name])
    rise, loss = rises[worst], before[worst]
    sure = laws.rise(worst, setting, sure=SURE).high / loss
    return StageError(
        f"no share of replay up to {asked.most:.0%} and no peak down to {setting.peak:.2e} keeps the rise on {worst} "
        f"within {100 * asked.wish.bound:g}%",
        where="--max-forgetting",
        expected=f"{math.ceil(1000 * sure) / 10:.1f}% or more: the best reachable is a rise of {rise.value / loss:.2%} "
        f"(95 % interval {rise.low / loss:.2%} to {rise.high / loss:.2%})",
        way_out="a larger bound, a lower peak in the stage, or more replay text; the pilots are kept",
    )


def _warnings(asked: Asked, tried: Sequence[Pilot], first: Setting, setting: Setting) -> Iterator[str]:
    """Where the laws are asked about what no pilot has tried."""
    longest, run = max(pilot.tokens for pilot in tried), asked.tokens(setting)
    yield f"the run is {run / longest:.0f} times as long as the longest pilot; the intervals allow for that"
    shares = sorted(pilot.setting.share for pilot in tried)
    if not shares[0] <= setting.share <= shares[-1]:
        yield f"{setting.share:.1%} replay lies outside what was tried ({shares[0]:.1%} to {shares[-1]:.1%})"
    if setting.share <= LEAST_SHARE:
        yield f"less than {LEAST_SHARE:.0%} replay may do; it is never proposed"
    if setting.peak >= 0.99 * asked.peak:
        yield "the peak is the stage's own, the highest that was tried; a higher one may learn more"
    if setting.peak <= 1.01 * LOWEST_PEAK * asked.peak:
        yield f"the peak is the lowest that is proposed, {LOWEST_PEAK:g} times the stage's"
    if setting.share >= 0.99 * asked.most:
        yield f"there is replay text for a share of {asked.most:.0%} only; with more text a higher peak may be possible"
    before = _fitted(asked, tried[:-1])
    end, last = _found(asked, tried[-1]), tried[-1].tokens
    for name, rise in end.rises.items():
        expected = before.rise(name, first, tokens=last)
        if not expected.low <= rise <= expected.high:
            yield (
                f"the longest pilot forgot {rise:.4f} nats on {name}, where the others let {expected.low:.4f} to "
                f"{expected.high:.4f} be expected: the laws hold badly here"
            )


def write_advice(asked: Asked, advice: Advice) -> dict[str, Any]:
    """Write the stage with the advised settings; give everything as plain data, with `text` for people."""
    raw = with_setting(asked.raw, asked, advice.setting) | {
        "name": f"{asked.stage.name}-advised",
        "max_forgetting": asked.wish.bound,
    }
    if asked.stage.output is not None:
        raw["output"] = f"{asked.stage.output}-advised"
    lines = _lines(asked, advice)
    head = "".join(f"# {line}\n" if line else "#\n" for line in lines)
    shown = yaml.safe_dump(raw, sort_keys=False, allow_unicode=True, width=120)
    write_atomically(asked.out, f"{_HEAD} from {asked.wish.stage.name} and {len(advice.pilots)} pilots.\n{head}{shown}")
    command = shlex.join(["postgrad", "train", str(asked.out)])
    return {
        "stage": str(asked.out),
        "share": advice.setting.share,
        "peak": advice.setting.peak,
        "max_forgetting": asked.wish.bound,
        "even": {"share": advice.even.share, "peak": advice.even.peak},
        "old": {name: e.as_dict() for name, e in advice.old.items()},
        "rise": {name: e.as_dict() for name, e in advice.rises.items()},
        "new": {name: e.as_dict() for name, e in advice.new.items()},
        "warnings": list(advice.warnings),
        "tokens": sum(item.pilot.tokens for item in advice.pilots),
        "run_tokens": round(asked.tokens(advice.setting)),
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
        "text": "\n".join(["", *lines, "", f"stage: {asked.out}", f"next: {command}"]),
    }


def _lines(asked: Asked, advice: Advice) -> list[str]:
    """The advice for people."""
    setting, spent = advice.setting, sum(item.pilot.tokens for item in advice.pilots)
    lines = [
        f"replay {setting.share:.1%}, peak {setting.peak:.2e} (the stage had {_had(asked):.1%} and {asked.peak:.2e})",
        f"expected of the whole run of {asked.tokens(setting):,.0f} tokens, with 95 % intervals:",
    ]
    for name, loss in advice.old.items():
        rise = advice.rises[name]
        lines.append(
            f"  {name}: {loss.value:.4f} nats per token ({loss.low:.4f} to {loss.high:.4f}), a rise of {rise.value:.2%} "
            f"({rise.low:.2%} to {rise.high:.2%}); {100 * asked.wish.bound:g}% is allowed"
        )
    for name, loss in advice.new.items():
        lines.append(f"  {name}: {loss.value:.4f} nats per token ({loss.low:.4f} to {loss.high:.4f})")
    lines.append(
        f"{advice.even.share:.1%} replay at a peak of {advice.even.peak:.2e} is as likely to break the bound as to keep it"
    )
    lines += [f"note: {warning}" for warning in advice.warnings]
    lines.append(f"the pilots took {spent:,} tokens, {spent / asked.plan.tokens:.1%} of the run's")
    return lines


def _had(asked: Asked) -> float:
    """The share of replay in the stage as it is."""
    return sum(asked.shares[source.name] for source in asked.stage.data.sources if source.role == "replay")
