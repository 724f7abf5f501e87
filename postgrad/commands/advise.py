"""Advise a replay share and a peak learning rate for a stage, from short pilot runs and laws fitted to them.

explore a few settings -> fit -> confirm the proposal with a longer pilot -> fit again -> write the stage

Every pilot is a shortened copy of the stage, run in its own folder: the same command resumes after a stop, and another bound
reuses the finished pilots. The laws are in `analysis/pilot_runs.py`.
"""

from __future__ import annotations

import math
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
from postgrad.commands.pilot_stages import (
    PilotRunner,
    add_replay_source,
    check_measured_sets,
    check_output_file,
    check_pilots_possible,
    expected_losses,
    find_peak_rate,
    make_pilot_stage,
    max_replay_tokens,
    pilots_folder,
    replay_share,
    scale_schedule,
    set_replay_share,
    source_shares,
)
from postgrad.commands.results import Result
from postgrad.config import stage as s
from postgrad.config.stage_file import parse_stage, read_stage
from postgrad.errors import StageError
from postgrad.lineage.record import Record, read_record
from postgrad.plan.plan import Plan, make_plan
from postgrad.run.events import InfoMessage, RunEvent, RunStopped
from postgrad.run.run_folder import Interrupt
from postgrad.stats.forgetting import MIN_LOSS
from postgrad.storage.atomic import write_atomically
from postgrad.storage.cache_folder import cache_folder

_MIN_RISE = 2e-4
"""Relative rise of a set's loss below which no pilot can tell it from zero."""
_FILE_HEADER = "# Written by postgrad advise"


@dataclass(frozen=True)
class AdviceRequest:
    """The options of an advice."""

    stage: Path
    overrides: tuple[str, ...] = ()
    bound: float = 0.01
    """The largest relative rise of the loss on a retained set."""
    pilot_count: int = 5
    replay: str | None = None
    """Old text to replay, for a stage without a replay source."""
    out: Path | None = None
    """The stage file to write. Default: STAGE-advised.yaml."""


@dataclass(frozen=True)
class AdvicePlan:
    """The stage as it is, and the pilots that explore other settings."""

    request: AdviceRequest
    raw: dict[str, Any]
    """The stage file with the overrides and the replay source applied."""
    plan: Plan
    shares: Mapping[str, float]
    """The share of each source in the stage."""
    peak: float
    max_share: float
    """The largest replay share that the replay text suffices for."""
    exploring_pilots: tuple[Pilot, ...]

    @property
    def stage(self) -> s.Stage:
        """The stage without advised settings."""
        return self.plan.stage

    @property
    def out(self) -> Path:
        """The stage file to write."""
        stage = self.request.stage
        return self.request.out or stage.with_name(f"{stage.stem}-advised.yaml")

    def run_tokens(self, setting: Setting) -> float:
        """Tokens of the whole run: those of the stage, or as many as contain its `new_tokens`."""
        if self.stage.new_tokens is None:
            return float(self.plan.tokens)
        return self.stage.new_tokens / (1 - setting.share)


def plan_advice(request: AdviceRequest, cache: Path) -> AdvicePlan:
    """Plan the pilots. Raises `StageError` for a stage without a setting to vary, or without sets to measure."""
    raw = read_stage(request.stage, list(request.overrides))
    root = request.stage.resolve().parent
    stage = parse_stage(raw, str(request.stage))
    if request.replay is not None:
        raw = add_replay_source(raw, stage, request.replay, root)
        stage = parse_stage(raw, str(request.stage))
    _check_stage(stage, request)
    plan = make_plan(stage, root, cache)
    check_measured_sets(plan)
    peak, max_share = find_peak_rate(plan), min(MAX_SHARE, max_replay_tokens(plan) / plan.tokens)
    step = plan.tokens / plan.steps
    explored = make_exploratory_pilots(request.pilot_count, peak, plan.tokens, step)
    return AdvicePlan(request, raw, plan, source_shares(plan), peak, max_share, tuple(explored))


def _check_stage(stage: s.Stage, request: AdviceRequest) -> None:
    """Refuse a stage without replay, new text or an advisable share, and options that cannot be used."""
    if "replay" not in {source.role for source in stage.data.sources}:
        raise StageError(
            "no source is replayed, so there is no replay share to vary",
            where="data.sources",
            expected="a source with role: replay",
            hint="name old text with --replay FILE, or generate some: postgrad synthesize",
        )
    check_pilots_possible(stage, request.bound)
    check_output_file(
        request.out or request.stage.with_name(f"{request.stage.stem}-advised.yaml"), request.stage, _FILE_HEADER
    )


# --- a stage with other settings ------------------------------------------------------------------------


def apply_setting(
    raw: Mapping[str, Any], advice_plan: AdvicePlan, setting: Setting, tokens: int | None = None
) -> dict[str, Any]:
    """A stage as plain data with another replay share and peak; with `tokens`, shortened to so many.

    Sources of one role keep their proportions, and every rate of the schedule is scaled with the peak.
    """
    plan = advice_plan.plan
    steps = None if tokens is None else tokens / plan.tokens * plan.steps
    out = {
        **raw,
        "data": set_replay_share(raw["data"], plan.stage, advice_plan.shares, setting.share),
        "schedule": scale_schedule(plan, setting.peak / advice_plan.peak, steps),
    }
    if tokens is not None:
        out = {**out, "tokens": tokens, "new_tokens": None}
    return out


def pilot_stage(advice_plan: AdvicePlan, pilot: Pilot) -> s.Stage:
    """A pilot as a stage: evaluated only at its end, without samples and tasks."""
    full = advice_plan.stage.model_dump(mode="json", exclude={"track"})
    raw = apply_setting(full, advice_plan, pilot.setting, pilot.tokens)
    return make_pilot_stage(advice_plan.plan, raw, f"{pilot.setting.share:.3g}-{pilot.setting.peak:.3g}")


# --- the pilots -----------------------------------------------------------------------------------------


def run_pilots(advice_plan: AdvicePlan, command: str) -> Iterator[RunEvent]:
    """Run the pilots that are not finished; the last event is that of the last pilot."""
    total = (
        sum(pilot.tokens for pilot in advice_plan.exploring_pilots)
        + make_confirming_pilot(advice_plan.exploring_pilots[0].setting, advice_plan.plan.tokens).tokens
    )
    count = len(advice_plan.exploring_pilots) + 1
    yield InfoMessage(
        f"{count} pilots take {total:,} tokens, {total / advice_plan.plan.tokens:.1%} of the run's "
        f"{advice_plan.plan.tokens:,}; their folder is {pilots_folder(advice_plan.plan)}"
    )
    with Interrupt() as interrupt:
        runner = PilotRunner(advice_plan.plan, command, interrupt)
        for number, pilot in enumerate(advice_plan.exploring_pilots, 1):
            if (yield from _run_pilot(runner, advice_plan, pilot, f"pilot {number} of {count}")):
                return
        choice = _propose_setting(advice_plan)
        last = make_confirming_pilot(choice.setting, advice_plan.plan.tokens)
        purpose = "confirms the proposal" if choice.is_within_bounds else "tries the setting that retains most"
        yield from _run_pilot(runner, advice_plan, last, f"pilot {count} of {count}, which {purpose}")


def _run_pilot(
    runner: PilotRunner, advice_plan: AdvicePlan, pilot: Pilot, label: str
) -> Generator[RunEvent, None, bool]:
    setting = pilot.setting
    settings = f"{setting.share:.1%} replay, peak {setting.peak:.2e}"
    return (yield from runner.run(pilot_stage(advice_plan, pilot), label, settings))


def _read_pilot_record(advice_plan: AdvicePlan, pilot: Pilot) -> Record:
    return read_record(pilots_folder(advice_plan.plan) / pilot_stage(advice_plan, pilot).name)


def _pilot_result(advice_plan: AdvicePlan, pilot: Pilot) -> PilotResult:
    """The outcome of a pilot."""
    record = _read_pilot_record(advice_plan, pilot)
    changes, totals = record.changes.items(), record.totals
    assert totals is not None
    min_share = 0.5 / sum(source.rows for source in totals.sources)
    # A short pilot may have no row of replay, or of new text: it counts as half a row.
    share = sum(source.share for source in totals.sources if source.role == "replay")
    share = min(max(share, min_share), 1 - min_share)
    return PilotResult(
        Pilot(Setting(share, pilot.setting.peak), totals.tokens),
        {name: c.difference or 0.0 for name, c in changes if c.role == "retained"},
        {name: record.scores.after[name].nats for name, c in changes if c.role == "learned"},
        pilot in advice_plan.exploring_pilots,
    )


def _start_losses(advice_plan: AdvicePlan) -> dict[str, float]:
    """The start model's loss on each retained set."""
    record = _read_pilot_record(advice_plan, advice_plan.exploring_pilots[0])
    return {name: max(record.scores.before[name].nats, MIN_LOSS) for name in record.changes_with_role("retained")}


def _fit_laws(advice_plan: AdvicePlan, pilots: Sequence[Pilot]) -> Laws:
    floor = _MIN_RISE * min(_start_losses(advice_plan).values())
    step = advice_plan.plan.tokens / advice_plan.plan.steps
    return fit_pilots(
        [_pilot_result(advice_plan, pilot) for pilot in pilots], advice_plan.run_tokens, advice_plan.peak, floor, step
    )


def _propose_setting(advice_plan: AdvicePlan) -> SettingChoice:
    """The setting that the exploring pilots propose: as likely to break the bound as to keep it, so close to the answer."""
    return _choose_setting(advice_plan, advice_plan.exploring_pilots, confidence=0.5)


def _choose_setting(advice_plan: AdvicePlan, pilots: Sequence[Pilot], confidence: float = CONFIDENCE) -> SettingChoice:
    bounds = {name: advice_plan.request.bound * nats for name, nats in _start_losses(advice_plan).items()}
    return choose_setting(
        _fit_laws(advice_plan, pilots), bounds, confidence=confidence, max_share=advice_plan.max_share
    )


# --- the advice -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Advice(Result):
    """The advised setting, and the losses expected of the whole run with their 95 % intervals."""

    stage: Path
    """The stage file that holds the setting."""
    setting: Setting
    """The advised replay share and peak learning rate."""
    retained_losses: Mapping[str, Estimate]
    """The loss on each retained set after the run, in nats per token."""
    retained_rises: Mapping[str, Estimate]
    """Its rise, as a fraction of the loss before."""
    learned_losses: Mapping[str, Estimate]
    """The loss on each learned set after the run, in nats per token."""
    break_even: Setting
    """The setting that breaks the bound with probability one half."""
    warnings: tuple[str, ...]
    pilots: tuple[PilotResult, ...]
    max_forgetting: float
    """The bound on the relative rise of a retained loss."""
    current: Setting
    """The replay share and peak of the stage as it was."""
    stage_tokens: int
    """Tokens of the stage as it was."""
    run_tokens: int
    """Tokens of the advised run."""

    @property
    def pilot_tokens(self) -> int:
        """Tokens of all pilots."""
        return sum(item.pilot.tokens for item in self.pilots)

    def as_dict(self) -> dict[str, object]:
        """The advice as plain data."""
        return {
            "stage_file": str(self.stage),
            "replay_share": self.setting.share,
            "peak": self.setting.peak,
            "max_forgetting": self.max_forgetting,
            "break_even": {"replay_share": self.break_even.share, "peak": self.break_even.peak},
            "retained_losses": {name: e.as_dict() for name, e in self.retained_losses.items()},
            "retained_rises": {name: e.as_dict() for name, e in self.retained_rises.items()},
            "learned_losses": {name: e.as_dict() for name, e in self.learned_losses.items()},
            "warnings": list(self.warnings),
            "pilot_tokens": self.pilot_tokens,
            "run_tokens": self.run_tokens,
            "pilots": [
                {
                    "replay_share": item.pilot.setting.share,
                    "peak": item.pilot.setting.peak,
                    "tokens": item.pilot.tokens,
                    "rises": dict(item.rises),
                    "losses": dict(item.losses),
                }
                for item in self.pilots
            ],
        }


def fit_advice(advice_plan: AdvicePlan) -> Advice:
    """The advice of the finished pilots. Raises `StageError` when no setting keeps within the bound."""
    choice = _propose_setting(advice_plan)
    pilots = (*advice_plan.exploring_pilots, make_confirming_pilot(choice.setting, advice_plan.plan.tokens))
    first = choice.setting
    choice, laws, before = (
        _choose_setting(advice_plan, pilots),
        _fit_laws(advice_plan, pilots),
        _start_losses(advice_plan),
    )
    if not choice.is_within_bounds:
        raise _unreachable_bound(advice_plan, pilots, choice)
    setting = choice.setting
    rises = {name: laws.rise(name, setting) for name in before}
    return Advice(
        advice_plan.out,
        setting,
        {n: Estimate(before[n] + e.value, before[n] + e.low, before[n] + e.high) for n, e in rises.items()},
        {n: Estimate(e.value / before[n], e.low / before[n], e.high / before[n]) for n, e in rises.items()},
        {name: laws.loss(name, setting) for name in laws.losses},
        _choose_setting(advice_plan, pilots, confidence=0.5).setting,
        tuple(_warnings(advice_plan, pilots, first, setting)),
        tuple(_pilot_result(advice_plan, pilot) for pilot in pilots),
        advice_plan.request.bound,
        Setting(replay_share(advice_plan.stage, advice_plan.shares), advice_plan.peak),
        advice_plan.plan.tokens,
        round(advice_plan.run_tokens(setting)),
    )


def _unreachable_bound(advice_plan: AdvicePlan, pilots: Sequence[Pilot], choice: SettingChoice) -> StageError:
    laws, before, setting = _fit_laws(advice_plan, pilots), _start_losses(advice_plan), choice.setting
    rises = {name: laws.rise(name, setting) for name in before}
    worst = max(rises, key=lambda name: rises[name].high / before[name])
    rise, loss = rises[worst], before[worst]
    sure = laws.rise(worst, setting, confidence=CONFIDENCE).high / loss
    tried, step = pilots[-1], advice_plan.plan.tokens / advice_plan.plan.steps
    measured = _pilot_result(advice_plan, tried).rises[worst] / loss
    return StageError(
        f"no replay share up to {advice_plan.max_share:.0%} and no peak down to {setting.peak:.2e} keeps the rise on {worst} "
        f"within {100 * advice_plan.request.bound:g}%, as far as the pilots show: the longest, {tried.tokens / step:.0f} steps "
        f"with {tried.setting.share:.0%} replay and a peak of {tried.setting.peak:.2e}, rose by {measured:.2%}",
        where="--max-forgetting",
        expected=f"{math.ceil(1000 * sure) / 10:.1f}% or more: the best reachable is a rise of {rise.value / loss:.2%} "
        f"(95 % interval {rise.low / loss:.2%} to {rise.high / loss:.2%})",
        hint="raise the bound, lower the peak in the stage, or add replay text; the pilots are reused; "
        "`postgrad keep` also tries distillation and penalties",
    )


def _warnings(
    advice_plan: AdvicePlan, pilots: Sequence[Pilot], proposed_setting: Setting, setting: Setting
) -> Iterator[str]:
    """Where the laws extrapolate beyond the pilots."""
    longest, run = max(pilot.tokens for pilot in pilots), advice_plan.run_tokens(setting)
    yield f"the run is {run / longest:.0f} times as long as the longest pilot; the intervals include that extrapolation"
    shares = sorted(pilot.setting.share for pilot in pilots)
    if not shares[0] <= setting.share <= shares[-1]:
        yield f"{setting.share:.1%} replay lies outside the pilots' range ({shares[0]:.1%} to {shares[-1]:.1%})"
    if setting.share <= MIN_SHARE:
        yield f"less than {MIN_SHARE:.0%} replay, which is never proposed, may suffice"
    if setting.peak >= 0.99 * advice_plan.peak:
        yield "the peak is the stage's own, the highest of the pilots; a higher one may learn more"
    if setting.peak <= 1.01 * MIN_PEAK * advice_plan.peak:
        yield f"the peak is the lowest that is proposed, {MIN_PEAK:g} times the stage's"
    if setting.share >= 0.99 * advice_plan.max_share:
        yield f"the replay text suffices for a share of {advice_plan.max_share:.0%}; more text may allow a higher peak"
    before = _fit_laws(advice_plan, pilots[:-1])
    end, last = _pilot_result(advice_plan, pilots[-1]), pilots[-1].tokens
    for name, rise in end.rises.items():
        expected = before.rise(name, proposed_setting, tokens=last)
        if not expected.low <= rise <= expected.high:
            yield (
                f"the longest pilot forgot {rise:.4f} nats on {name}, where the others predict {expected.low:.4f} to "
                f"{expected.high:.4f}: the laws fit badly here"
            )


def write_advice(advice_plan: AdvicePlan, advice: Advice) -> None:
    """Write the stage file with the advised settings, and the advice as its head."""
    raw = apply_setting(advice_plan.raw, advice_plan, advice.setting) | {
        "name": f"{advice_plan.stage.name}-advised",
        "max_forgetting": advice_plan.request.bound,
        "evaluation": {
            **advice_plan.raw.get("evaluation", {}),
            "expected_losses": expected_losses({**advice.retained_losses, **advice.learned_losses}),
        },
    }
    if advice_plan.stage.output is not None:
        raw["output"] = f"{advice_plan.stage.output}-advised"
    head = "".join(f"# {line}\n" if line else "#\n" for line in advice_lines(advice))
    body = yaml.safe_dump(raw, sort_keys=False, allow_unicode=True, width=120)
    title = f"{_FILE_HEADER} from {advice_plan.request.stage.name} and {len(advice.pilots)} pilots."
    write_atomically(advice.stage, f"{title}\n{head}{body}")


def advice_lines(advice: Advice) -> list[str]:
    """The advice in words, as the stage file has it too."""
    setting, current = advice.setting, advice.current
    lines = [
        f"replay {setting.share:.1%}, peak {setting.peak:.2e} (the stage had {current.share:.1%} and {current.peak:.2e})",
        f"expected of the whole run of {advice.run_tokens:,} tokens, with 95 % intervals:",
    ]
    for name, loss in advice.retained_losses.items():
        rise = advice.retained_rises[name]
        lines.append(
            f"  {name}: {loss.value:.4f} nats per token ({loss.low:.4f} to {loss.high:.4f}), a rise of {rise.value:.2%} "
            f"({rise.low:.2%} to {rise.high:.2%}); the bound is {100 * advice.max_forgetting:g}%"
        )
    for name, loss in advice.learned_losses.items():
        lines.append(f"  {name}: {loss.value:.4f} nats per token ({loss.low:.4f} to {loss.high:.4f})")
    even = advice.break_even
    lines.append(f"{even.share:.1%} replay at a peak of {even.peak:.2e} breaks the bound with probability one half")
    lines += [f"note: {warning}" for warning in advice.warnings]
    share = advice.pilot_tokens / advice.stage_tokens
    return [*lines, f"the pilots took {advice.pilot_tokens:,} tokens, {share:.1%} of the run's"]


def advise(
    stage: Path | str,
    *,
    overrides: Sequence[str] = (),
    max_forgetting: float = 0.01,
    pilots: int = 5,
    replay: str | None = None,
    out: Path | str | None = None,
    cache: Path | None = None,
) -> Iterator[RunEvent | Advice]:
    """Run the pilots of a stage file, as an iterator of their events, and write the advised stage; the last item is the advice.

    `max_forgetting`: the largest relative rise of the loss on a retained set. `pilots`: short runs, 4 to 12. `replay`: old
    text, for a stage without a replay source. `out`: the stage file. Default: STAGE-advised.yaml. The same call resumes.
    """
    request = AdviceRequest(Path(stage), tuple(overrides), max_forgetting, pilots, replay, Path(out) if out else None)
    yield from run_advice(plan_advice(request, cache or cache_folder()), f"postgrad advise {stage}")


def run_advice(advice_plan: AdvicePlan, command: str) -> Iterator[RunEvent | Advice]:
    """Run the planned pilots and write the advised stage; `command` is recorded as what resumes them."""
    event: RunEvent | None = None
    for event in run_pilots(advice_plan, command):
        yield event
    if not isinstance(event, RunStopped):
        advice = fit_advice(advice_plan)
        write_advice(advice_plan, advice)
        yield advice
