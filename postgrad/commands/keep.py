"""Choose the combination of methods for a stage that learns most while the loss on old text stays within a bound.

old text (or the model's own) -> combinations worth a pilot -> rounds of pilots -> forecast of the run -> choice -> stage file

`advise` chooses replay share and peak alone, by laws. Here combinations differ in kind, so they are compared at equal length
(`analysis/lever_choice.py`). Pilots are runs: the same command resumes, and another bound reuses the finished ones.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from postgrad.analysis.law_fitting import Estimate
from postgrad.analysis.lever_choice import (
    Forecast,
    PilotRounds,
    Trial,
    forecast,
    plan_rounds,
    promote,
    rank,
    refine_share,
)
from postgrad.analysis.pilot_runs import CONFIDENCE, MAX_SHARE
from postgrad.analysis.shift_advice import ShiftStrength
from postgrad.commands.check import check_stage
from postgrad.commands.importance import measure_importance
from postgrad.commands.levers import LEVERS, Combination, RejectedLever, StageFacts, add_methods, list_combinations
from postgrad.commands.pilot_stages import (
    PilotRunner,
    add_replay_source,
    check_measured_sets,
    check_output_file,
    check_pilots_possible,
    expected_losses,
    make_pilot_stage,
    max_replay_tokens,
    pilots_folder,
    replay_share,
    scale_schedule,
    set_replay_share,
    source_shares,
)
from postgrad.commands.results import Result
from postgrad.commands.shift import measure_shift
from postgrad.commands.synthesize import SynthesisRequest, synthesize
from postgrad.config import stage as s
from postgrad.config.stage_file import parse_stage, read_stage
from postgrad.errors import DataError, InterruptError, PostgradError, StageError, require_choice
from postgrad.hardware import machine
from postgrad.hardware.memory import format_bytes
from postgrad.lineage.record import Record, read_record
from postgrad.models.auto_classes import load_config
from postgrad.models.families import count_weights
from postgrad.models.location import locate_model
from postgrad.models.task import Task
from postgrad.plan.plan import Plan, make_plan
from postgrad.reports.html.notation import format_duration
from postgrad.run.events import InfoMessage, RunEvent
from postgrad.run.run_folder import Interrupt
from postgrad.stats.forgetting import MIN_LOSS
from postgrad.storage.atomic import write_atomically
from postgrad.storage.cache_folder import cache_folder
from postgrad.storage.fingerprint import fingerprint
from postgrad.tuning.open_model import get_task, start_fingerprint

EQUALITIES = ("new-tokens", "compute")
DEFAULT_COST = 0.25
"""The trained tokens of all pilots, as a share of the run's."""
_FILE_HEADER = "# Written by postgrad keep"
_GENERATED_SHARE = 0.25
"""The replay share that generated text suffices for, ..."""
_GENERATED_PASSES = 4
"""... when it is read so often."""
_PROMPT_TOKENS = 16
_IMPORTANCE_TOKENS = 100_000
_TRAINING_BYTES = 18
"""Bytes of memory for each trained weight: fp32 masters, gradients, two moments, and the copy in bf16."""


@dataclass(frozen=True)
class KeepRequest:
    """The options of a choice."""

    stage: Path
    overrides: tuple[str, ...] = ()
    bound: float = 0.01
    """The largest relative rise of the loss on a retained set."""
    cost: float = DEFAULT_COST
    equal: str = "new-tokens"
    """What is the same for all combinations: the tokens of new text, so that replay comes on top, or the computation."""
    replay: str | None = None
    """Old text to replay, for a stage without a replay source."""
    prompts: str | None = None
    """Old prompts, which the model continues to generate its own replay."""
    out: Path | None = None
    """The stage file to write. Default: STAGE-kept.yaml."""

    @property
    def output(self) -> Path:
        """The stage file to write."""
        return self.out or self.stage.with_name(f"{self.stage.stem}-kept.yaml")


# --- the plan -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeepPlan:
    """The stage as it is, and the combinations that are tried."""

    request: KeepRequest
    raw: Mapping[str, Any]
    """The stage file with the overrides and the replay source applied."""
    plan: Plan
    shares: Mapping[str, float]
    """The share of each source in the stage."""
    combinations: tuple[Combination, ...]
    rejected: tuple[RejectedLever, ...]
    rounds: PilotRounds
    notes: tuple[str, ...]
    """What was found of the old text and the shift."""

    @property
    def step(self) -> float:
        """Trained tokens of a step."""
        return self.plan.tokens / self.plan.steps

    @property
    def new_tokens(self) -> int:
        """Tokens of new text in the stage as it is."""
        return _new_tokens(self.plan, self.shares)

    @property
    def run_steps(self) -> float:
        """Steps of new text of the whole run."""
        return self.new_tokens / self.step

    def budget(self, combination: Combination, fraction: float = 1.0) -> dict[str, int | None]:
        """The keys of a stage for its budget with a combination, or a fraction of it."""
        tokens = _run_tokens(self.plan, self.shares, self.request.equal, combination)
        if self.request.equal == "compute":
            return {"tokens": round(fraction * tokens), "new_tokens": None}
        return {"tokens": None, "new_tokens": round(fraction * self.new_tokens)}

    def run_tokens(self, combination: Combination) -> int:
        """Trained tokens of the whole run with a combination."""
        return round(_run_tokens(self.plan, self.shares, self.request.equal, combination))


def _new_tokens(plan: Plan, shares: Mapping[str, float]) -> int:
    stage = plan.stage
    if stage.new_tokens is not None:
        return stage.new_tokens
    return round((stage.tokens or plan.tokens) * (1 - replay_share(stage, shares)))


def _run_tokens(plan: Plan, shares: Mapping[str, float], equal: str, combination: Combination) -> float:
    if equal == "compute":
        return (plan.stage.tokens or plan.tokens) / combination.cost
    return _new_tokens(plan, shares) / (1 - combination.replay)


def read_request(request: KeepRequest) -> tuple[dict[str, Any], s.Stage]:
    """The stage of a request as plain data and typed, with the replay that it names. Raises `StageError` for what cannot be."""
    raw = read_stage(request.stage, list(request.overrides))
    stage = parse_stage(raw, str(request.stage))
    if request.replay is not None:
        raw = add_replay_source(raw, stage, request.replay, request.stage.resolve().parent)
        stage = parse_stage(raw, str(request.stage))
    check_pilots_possible(stage, request.bound)
    check_output_file(request.output, request.stage, _FILE_HEADER)
    if not request.cost > 0:
        raise StageError(f"a cost of {100 * request.cost:g}%", where="--cost", expected="a share above 0, such as 25%")
    require_choice("equality", request.equal, EQUALITIES, where="--equal")
    if request.prompts is not None and _has_replay(stage):
        raise StageError(
            "there is old text, so none is generated from prompts", where="--prompts", expected="a stage without replay"
        )
    return raw, stage


def _has_replay(stage: s.Stage) -> bool:
    return any(source.role == "replay" for source in stage.data.sources)


def _generated_file(request: KeepRequest) -> Path:
    return request.stage.with_name(f"{request.stage.stem}-own-text.jsonl")


def generate_replay(request: KeepRequest, stage: s.Stage) -> Iterator[RunEvent]:
    """Let the start model generate old text, for a stage that has none."""
    new_tokens = stage.new_tokens or stage.tokens or 0
    tokens = max(2_000, round(new_tokens * _GENERATED_SHARE / (1 - _GENERATED_SHARE) / _GENERATED_PASSES))
    out = _generated_file(request)
    origin = f"continues the prompts of {request.prompts}" if request.prompts else "generates its own"
    yield InfoMessage(
        f"there is no old text, so the model {origin}: {tokens:,} tokens into {out}, before anything is trained. It is not the "
        "text that the model was trained on, and what is retained is measured on it where no retained set is named"
    )
    request_options = SynthesisRequest(
        tokens,
        max_document_tokens=min(512, stage.data.sequence_length),
        prompt_tokens=_PROMPT_TOKENS if request.prompts else 0,
    )
    model = locate_model(str(stage.model), request.stage.resolve().parent, stage.base)
    name = str(model.folder or model.name)
    for _ in synthesize(name, out, request_options, [request.prompts] if request.prompts else [], base=stage.base):
        pass


def can_generate(request: KeepRequest, stage: s.Stage) -> bool:
    """Whether the start model of a stage is a decoder."""
    return get_task(locate_model(str(stage.model), request.stage.resolve().parent, stage.base)) == Task.CAUSAL


def plan_keep(request: KeepRequest, cache: Path, *, is_generated: bool = False) -> KeepPlan:
    """Plan the pilots. Raises `StageError` for a stage without sets to measure, or too short for pilots."""
    if is_generated:
        request = replace(request, replay=str(_generated_file(request)), prompts=None)
    raw, stage = read_request(request)
    root = request.stage.resolve().parent
    plan = make_plan(stage, root, cache)
    check_measured_sets(plan)
    shares = source_shares(plan)
    old, new = (_source_files(stage, root, role) for role in ("replay", "new"))
    strength, shift_note = _measure_strength(plan, old, new)
    start = plan.model.start
    parameters = count_weights(load_config(start.name_or_path))
    has_free_teacher = bool(getattr(stage.tuning.load(), "additive", True))
    free = machine.available_memory()
    new_tokens, room = _new_tokens(plan, shares), max_replay_tokens(plan) if _has_replay(stage) else 0.0
    facts = StageFacts(
        stage,
        strength,
        min(MAX_SHARE, room / (new_tokens + room) if math.isfinite(room) else 1.0),
        bool(old),
        parameters,
        has_free_teacher,
        None if free is None else free - (4 if has_free_teacher else _TRAINING_BYTES) * parameters,
    )
    combinations, rejected = list_combinations(facts)
    step = plan.tokens / plan.steps
    run_tokens = [_run_tokens(plan, shares, request.equal, each) for each in combinations]
    rounds = plan_rounds(run_tokens, request.cost * plan.tokens, new_tokens / step)
    origin = "generated by the model itself" if is_generated else "in the stage's replay" if room else "none"
    notes = (f"old text: {origin}", shift_note)
    tried = tuple(combinations[: rounds.counts[0]])
    return KeepPlan(request, raw, plan, shares, tried, tuple(rejected), rounds, notes)


def _source_files(stage: s.Stage, root: Path, role: str) -> list[str]:
    """The files of the sources of a role; none if one of them is something else."""
    sources = [source for source in stage.data.sources if source.role == role]
    if not all(source.path for source in sources):
        return []
    return [str(root / Path(source.path or "").expanduser()) for source in sources]


def _measure_strength(plan: Plan, old: Sequence[str], new: Sequence[str]) -> tuple[ShiftStrength | None, str]:
    """The strength of the shift, and a sentence about it."""
    if not old or not new or plan.model.task != Task.CAUSAL:
        return None, "shift: not measured, which needs files of old and new text and a decoder; taken for a strong one"
    start = plan.model.start
    try:
        found = measure_shift(str(start.folder or start.name), old, new, base=plan.stage.base, cache=plan.cache)
    except DataError as error:
        return None, f"shift: not measured ({error.problem}); taken for a strong one"
    trigrams = found.distances["byte trigrams"]
    return found.strength, (
        f"shift: {found.strength}; byte trigrams differ by {trigrams.value:.2f} bits ({trigrams.same or 0.0:.2f} within the "
        f"old text), and the new text costs {found.surprise.value:+.2f} bits per byte"
    )


# --- stages ---------------------------------------------------------------------------------------------------


def make_combined_stage(
    keep_plan: KeepPlan,
    combination: Combination,
    importance: Mapping[str, str],
    *,
    raw: Mapping[str, Any] | None = None,
    fraction: float = 1.0,
) -> dict[str, Any]:
    """The plain data of the stage with a combination; a `fraction` of the run has a schedule of that length."""
    plan = keep_plan.plan
    steps = None if fraction == 1 else fraction * keep_plan.run_tokens(combination) / keep_plan.step
    out = add_methods(raw or keep_plan.raw, plan.objectives, combination, importance)
    budget = keep_plan.budget(combination, fraction)
    out = {key: value for key, value in out.items() if key not in budget}
    out |= {key: value for key, value in budget.items() if value is not None}
    if _has_replay(plan.stage):
        out["data"] = set_replay_share((raw or keep_plan.raw)["data"], plan.stage, keep_plan.shares, combination.replay)
    return {**out, "schedule": scale_schedule(plan, combination.peak, steps)}


def pilot_of(keep_plan: KeepPlan, combination: Combination, fraction: float, importance: Mapping[str, str]) -> s.Stage:
    """A pilot of a combination as a stage."""
    full = keep_plan.plan.stage.model_dump(mode="json", exclude={"track"})
    raw = make_combined_stage(keep_plan, combination, importance, raw=full, fraction=fraction)
    return make_pilot_stage(keep_plan.plan, raw, combination.label)


def _importance_files(keep_plan: KeepPlan) -> dict[str, Path]:
    """The file of each kind of importance that the combinations need."""
    plan = keep_plan.plan
    kinds = {each.importance_kind for each in keep_plan.combinations} - {None}
    files = _source_files(plan.stage, plan.root, "replay")
    start = start_fingerprint(plan.model.start) or plan.model.start.name
    key = fingerprint([start, [source.store.fingerprint for source in plan.data.sources], files])[:8]
    return {str(kind): pilots_folder(plan) / f"importance-{kind}-{key}.safetensors" for kind in kinds}


def _measure_importance(keep_plan: KeepPlan) -> Iterator[RunEvent]:
    plan = keep_plan.plan
    for kind, file in sorted(_importance_files(keep_plan).items()):
        if file.exists():
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        yield InfoMessage(f"measuring the importance of the weights ({kind}) on the old text")
        start = plan.model.start
        measure_importance(
            str(start.folder or start.name),
            _source_files(plan.stage, plan.root, "replay"),
            out=file,
            tokens=_IMPORTANCE_TOKENS,
            kind=kind,
            context=plan.model.context_length,
            base=plan.stage.base,
            cache=plan.cache,
        )


# --- the pilots -------------------------------------------------------------------------------------------------


@dataclass
class _Trials:
    """What the pilots have shown so far."""

    keep_plan: KeepPlan
    runner: PilotRunner
    importance: Mapping[str, str]
    combinations: dict[str, Combination]
    records: dict[tuple[str, float], Record] = field(default_factory=dict)
    """By combination and fraction of the run."""
    failures: dict[str, str] = field(default_factory=dict)
    """Combinations that the stage does not allow, and why."""
    tokens: int = 0

    def run(self, name: str, fraction: float, label: str) -> Generator[RunEvent, None, bool]:
        """Run a pilot; True when the user requested a stop."""
        combination = self.combinations[name]
        try:
            stage = pilot_of(self.keep_plan, combination, fraction, self.importance)
            is_stopped = yield from self.runner.run(stage, label, name)
        except InterruptError:
            raise
        except PostgradError as error:
            if not _is_of_a_method(combination):
                raise
            self.failures[name] = error.problem
            yield InfoMessage(f"{label}: {name} does not work on this stage: {error.problem}")
            return False
        if not is_stopped:
            record = read_record(pilots_folder(self.keep_plan.plan) / stage.name)
            self.records[name, fraction] = record
            self.tokens += record.totals.tokens
        return is_stopped

    def bounds(self) -> dict[str, float]:
        """The largest rise of each retained set, in nats per token."""
        bound, record = self.keep_plan.request.bound, next(iter(self.records.values()))
        before = record.scores.before
        return {name: bound * max(before[name].nats, MIN_LOSS) for name in record.changes_with_role("retained")}

    def trials(self) -> list[Trial]:
        """All measurements, for the forecast."""
        steps = self.keep_plan.run_steps
        return [_make_trial(name, fraction * steps, record) for (name, fraction), record in self.records.items()]

    def forecast(self) -> list[Forecast]:
        """What the whole run is expected to be with each combination."""
        return forecast(self.trials(), self.keep_plan.run_steps, self.bounds())


def _is_of_a_method(combination: Combination) -> bool:
    """Whether more than replay and peak differ from the stage: then an error may be of the method, not of the stage."""
    return (combination.distillation, combination.penalty, combination.is_sparse) != ("none", "none", False)


def _make_trial(name: str, steps: float, record: Record) -> Trial:
    rises, losses = {}, {}
    for each, change in record.changes.items():
        value = change.difference or 0.0
        if change.role == "retained":
            low, high = (value if end is None else end for end in (change.low, change.high))
            rises[each] = Estimate(value, low, high)
        elif change.role == "learned":
            losses[each] = record.scores.after[each].nats
    return Trial(name, steps, rises, losses)


def _run_rounds(trials: _Trials) -> Generator[RunEvent, None, bool]:
    """Run all rounds; True when the user requested a stop."""
    keep_plan = trials.keep_plan
    names, rounds = list(trials.combinations), keep_plan.rounds
    for number, (count, fraction) in enumerate(zip(rounds.counts, rounds.fractions, strict=True), 1):
        is_last = number == len(rounds.counts)
        if number > 1:
            forecasts = trials.forecast()
            refined = _refine(trials, forecasts) if is_last and count > 1 else None
            names = promote(forecasts, min(count, len(forecasts)) - bool(refined))
            if refined:
                trials.combinations[refined.name] = refined
                names.append(refined.name)
        for i, name in enumerate(names, 1):
            label = f"round {number} of {len(rounds.counts)}, pilot {i} of {len(names)}"
            if (yield from trials.run(name, fraction, label)):
                return True
        if not trials.records:
            raise StageError(
                f"no combination works on this stage: {next(iter(trials.failures.values()))}", where="postgrad keep"
            )
    return (yield from try_safest(trials, rounds.fractions[-1]))


def try_safest(trials: _Trials, longest: float) -> Generator[RunEvent, None, bool]:
    """Before a bound is called impossible, run what comes closest to it in the longest pilot; True after a request to stop."""
    forecasts = trials.forecast()
    finalists = [each for each in forecasts if (each.name, longest) in trials.records]
    safest = min(forecasts, key=lambda each: each.excess)
    if safest in finalists or rank(finalists)[0].probability >= CONFIDENCE:
        return False
    yield InfoMessage(f"no pilot of the last round keeps the bound, so one more tries {safest.name}")
    return (yield from trials.run(safest.name, longest, "one more pilot"))


def _refine(trials: _Trials, forecasts: Sequence[Forecast]) -> Combination | None:
    """The best combination with a replay share between one that keeps the bound and one that does not."""
    by_name = {each.name: each for each in forecasts}
    for under in rank(forecasts):
        high = trials.combinations[under.name]
        lower = [
            (low.replay, by_name[name].excess)
            for name, low in trials.combinations.items()
            if name in by_name
            and 0 < low.replay < high.replay
            and replace(low, replay=high.replay, reason=high.reason) == high
        ]
        for share, excess in sorted(lower, reverse=True)[:1]:
            found = refine_share((share, high.replay), (excess, under.excess))
            if found:
                reason = f"between {share:.0%} and {high.replay:.0%}, where the pilots put the bound"
                return replace(high, replay=found, reason=reason)
    return None


# --- the result -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LeverVerdict:
    """Whether a method was chosen, and why."""

    lever: str
    is_chosen: bool
    reason: str


@dataclass(frozen=True)
class KeepPilot:
    """A pilot: its combination, its length as a fraction of the run, and what it measured."""

    name: str
    fraction: float
    tokens: int
    rises: Mapping[str, float]
    """Of each retained loss, as a fraction of it."""
    losses: Mapping[str, float]
    """On each learned set, in nats per token."""


@dataclass(frozen=True)
class KeepChoice(Result):
    """The chosen combination, and what is expected of the whole run with 95 % intervals."""

    stage: Path
    """The stage file that holds it."""
    combination: Combination
    verdicts: tuple[LeverVerdict, ...]
    """A sentence about each method."""
    retained_losses: Mapping[str, Estimate]
    """The loss on each retained set after the run, in nats per token."""
    retained_rises: Mapping[str, Estimate]
    """Its rise, as a fraction of the loss before."""
    learned_losses: Mapping[str, Estimate]
    """The loss on each learned set after the run, in nats per token."""
    probability: float
    """That the run passes the retention gate."""
    max_forgetting: float
    equal: str
    pilots: tuple[KeepPilot, ...]
    pilot_tokens: int
    stage_tokens: int
    """Tokens of the stage as it was."""
    run_tokens: int
    """Tokens of the run."""
    seconds: float
    """Estimated time of the training, as `check` tells it."""
    memory_bytes: int
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """The choice as plain data."""
        data = super().as_dict()
        estimates = {
            key: {name: each.as_dict() for name, each in getattr(self, key).items()}
            for key in ("retained_losses", "retained_rises", "learned_losses")
        }
        return {**data, **estimates, "combination": {"name": self.combination.name, **self.combination.settings()}}


def keep(
    stage: Path | str,
    *,
    overrides: Sequence[str] = (),
    max_forgetting: float = 0.01,
    cost: float = DEFAULT_COST,
    equal: str = "new-tokens",
    replay: str | None = None,
    prompts: str | None = None,
    out: Path | str | None = None,
    cache: Path | None = None,
) -> Iterator[RunEvent | KeepChoice]:
    """Choose the methods for a stage file by short pilots, as an iterator of their events, and write the stage.

    The last item is the choice. `max_forgetting`: the largest relative rise of the loss on a retained set. `cost`: tokens
    of all pilots, as a share of the run's. `equal`: `new-tokens` (replay comes on top) or `compute`. `replay`: old text, for a
    stage without a replay source; `prompts`: prompts that the model continues instead. `out`: the stage file. Default:
    STAGE-kept.yaml. The same call resumes.
    """
    output = Path(out) if out else None
    request = KeepRequest(Path(stage), tuple(overrides), max_forgetting, cost, equal, replay, prompts, output)
    yield from run_keep(request, cache or cache_folder(), f"postgrad keep {stage}")


def run_keep(request: KeepRequest, cache: Path, command: str) -> Iterator[RunEvent | KeepChoice]:
    """Generate old text where there is none, run the pilots, and write the stage; `command` is recorded as what resumes."""
    _, stage = read_request(request)
    is_generated = not _has_replay(stage) and can_generate(request, stage)
    if is_generated:
        yield from generate_replay(request, stage)
    keep_plan = plan_keep(request, cache, is_generated=is_generated)
    yield from (InfoMessage(line) for line in _plan_lines(keep_plan))
    yield from _measure_importance(keep_plan)
    root = keep_plan.plan.root
    importance = {kind: os.path.relpath(file, root) for kind, file in _importance_files(keep_plan).items()}
    with Interrupt() as interrupt:
        runner = PilotRunner(keep_plan.plan, command, interrupt)
        trials = _Trials(keep_plan, runner, importance, {each.name: each for each in keep_plan.combinations})
        if (yield from _run_rounds(trials)):
            return
    yield InfoMessage("checking what the chosen stage costs")
    yield write_choice(trials)


def _plan_lines(keep_plan: KeepPlan) -> Iterator[str]:
    """What will be tried and what not, and the cost, before anything is trained."""
    rounds, plan = keep_plan.rounds, keep_plan.plan
    yield from keep_plan.notes
    for each in keep_plan.combinations:
        yield f"to be tried: {each.name}: {each.reason}"
    for rejected in keep_plan.rejected:
        yield f"not tried: {rejected.lever}: {rejected.reason}"
    lengths = ", ".join(
        f"{count} of {fraction:.1%}" for count, fraction in zip(rounds.counts, rounds.fractions, strict=True)
    )
    yield (
        f"pilots in {len(rounds.counts)} rounds, {lengths} of the run each, take at most {rounds.max_tokens:,} tokens, "
        f"{rounds.max_tokens / plan.tokens:.1%} of the run's {plan.tokens:,}; their folder is {pilots_folder(plan)}"
    )


def write_choice(trials: _Trials) -> KeepChoice:
    """Choose among the combinations of the last round and write the stage. Raises `StageError` when none keeps the bound."""
    keep_plan, request = trials.keep_plan, trials.keep_plan.request
    longest = max(fraction for _, fraction in trials.records)
    finalists = [each for each in trials.forecast() if (each.name, longest) in trials.records]
    best = rank(finalists)[0]
    if best.probability < CONFIDENCE:
        raise _unreachable_bound(trials, best)
    combination = trials.combinations[best.name]
    before = next(iter(trials.records.values())).scores.before
    retained = {
        n: Estimate(before[n].nats + e.value, before[n].nats + e.low, before[n].nats + e.high)
        for n, e in best.rises.items()
    }
    raw = _write_stage_data(trials, combination, {**retained, **best.losses})
    plan = make_plan(parse_stage(raw, str(request.output)), keep_plan.plan.root, keep_plan.plan.cache)
    cost = check_stage(plan, cache=keep_plan.plan.cache)
    choice = KeepChoice(
        request.output,
        combination,
        tuple(_make_verdicts(trials, combination, longest)),
        retained,
        {
            n: Estimate(*(end / max(before[n].nats, MIN_LOSS) for end in (e.value, e.low, e.high)))
            for n, e in best.rises.items()
        },
        best.losses,
        best.probability,
        request.bound,
        request.equal,
        tuple(_pilot_results(trials)),
        trials.tokens,
        keep_plan.plan.tokens,
        plan.tokens,
        cost.seconds,
        cost.memory_bytes,
        (*keep_plan.notes, *_choice_notes(trials, longest)),
    )
    write_atomically(request.output, _stage_text(choice, raw, request.stage.name))
    return choice


def _write_stage_data(trials: _Trials, combination: Combination, losses: Mapping[str, Estimate]) -> dict[str, Any]:
    """The chosen stage as plain data, with its importance file beside it."""
    keep_plan = trials.keep_plan
    stage, request = keep_plan.plan.stage, keep_plan.request
    kind = combination.importance_kind
    names: dict[str, str] = {}
    if kind is not None:
        target = request.output.with_name(f"{request.output.stem}-{kind}.safetensors")
        shutil.copyfile(_importance_files(keep_plan)[kind], target)
        names[kind] = target.name
    raw = make_combined_stage(keep_plan, combination, names)
    raw |= {
        "name": f"{stage.name}-kept",
        "evaluation": {**raw.get("evaluation", {}), "expected_losses": expected_losses(losses)},
        "max_forgetting": request.bound,
    }
    if stage.output is not None:
        raw["output"] = f"{stage.output}-kept"
    return raw


def _pilot_results(trials: _Trials) -> Iterator[KeepPilot]:
    for (name, fraction), record in trials.records.items():
        rises = {
            each: change.relative_difference or 0.0 for each, change in record.changes_with_role("retained").items()
        }
        losses = {each: record.scores.after[each].nats for each in record.changes_with_role("learned")}
        yield KeepPilot(name, fraction, record.totals.tokens, rises, losses)


def _choice_notes(trials: _Trials, longest: float) -> Iterator[str]:
    if longest < 1:
        yield f"the run is {1 / longest:.0f} times as long as the longest pilot; the intervals include that extrapolation"
    yield from (f"{name} does not work on this stage: {reason}" for name, reason in trials.failures.items())


def _unreachable_bound(trials: _Trials, best: Forecast) -> StageError:
    request = trials.keep_plan.request
    combination, fraction = trials.combinations[best.name], max(f for name, f in trials.records if name == best.name)
    record = trials.records[best.name, fraction]
    before, bounds = record.scores.before, trials.bounds()
    worst = max(best.rises, key=lambda name: best.rises[name].high / bounds[name])
    rise, loss = best.rises[worst], before[worst].nats
    helps = ["a bound that the interval allows", "a lower peak in the stage"]
    if combination.replay < MAX_SHARE:
        helps.append("more old text for a larger replay share" if combination.replay else "old text (--replay)")
    measured = record.changes[worst].relative_difference or 0.0
    return StageError(
        f"no combination keeps the rise on {worst} within {100 * request.bound:g}% with {CONFIDENCE:.0%} probability",
        where="--max-forgetting",
        expected=f"the best reachable is {rise.value / loss:.2%} (95 % interval {rise.low / loss:.2%} to "
        f"{rise.high / loss:.2%}), with {best.name}; its longest pilot, {fraction:.1%} of the run, measured {measured:+.2%}",
        hint=f"{', '.join(helps)}, or more of the run in pilots (--cost), which narrows the interval; the pilots are reused",
    )


# --- in words ---------------------------------------------------------------------------------------------------


def _make_verdicts(trials: _Trials, chosen: Combination, longest: float) -> Iterator[LeverVerdict]:
    """A sentence for each method: what the pilots measured with it and without it."""
    none = Combination()
    rejected = {each.lever: each.reason for each in trials.keep_plan.rejected}
    for attribute, lever in LEVERS.items():
        value = getattr(chosen, attribute)
        is_chosen = value != getattr(none, attribute)
        others = [
            each
            for each in trials.combinations.values()
            if getattr(each, attribute) != value and each.name not in trials.failures
        ]
        if not is_chosen and lever in rejected:
            yield LeverVerdict(lever, False, rejected[lever])
        elif not others:
            yield LeverVerdict(
                lever, is_chosen, "every pilot had it" if is_chosen else "no pilot of it fitted the cost"
            )
        else:
            near = min(others, key=lambda each: (_distance(each, chosen), -_longest_fraction(trials, each)))
            fraction = min(_longest_fraction(trials, near), longest)
            texts = [f"{each.name} {_measured_text(trials, each, fraction)}" for each in (chosen, near)]
            if (chosen.name, fraction) not in trials.records:  # a refined share has one pilot, as long as the longest
                texts[0] = f"{chosen.name} {_measured_text(trials, chosen, longest)} in {longest:.1%}"
            yield LeverVerdict(lever, is_chosen, f"in pilots of {fraction:.1%} of the run, {'; '.join(texts)}")
    tuning = trials.keep_plan.plan.stage.tuning.kind
    yield LeverVerdict("tuning", True, f"{tuning}, as the stage has it")
    yield LeverVerdict(
        "blend", False, "it needs no training, and is chosen on the finished run, if that misses the bound"
    )


def _distance(one: Combination, other: Combination) -> int:
    """In how many methods two combinations differ."""
    return sum(getattr(one, name) != getattr(other, name) for name in LEVERS)


def _longest_fraction(trials: _Trials, combination: Combination) -> float:
    return max((fraction for name, fraction in trials.records if name == combination.name), default=0.0)


def _measured_text(trials: _Trials, combination: Combination, fraction: float) -> str:
    record = trials.records.get((combination.name, fraction))
    if record is None:
        return "was not tried at this length"
    old = [
        f"{name} {change.relative_difference or 0.0:+.1%}"
        for name, change in record.changes_with_role("retained").items()
    ]
    new = [f"{name} {record.scores.after[name].nats:.3f}" for name in record.changes_with_role("learned")]
    return ", ".join([*old, *new])


def choice_lines(choice: KeepChoice) -> list[str]:
    """The choice in words, as the stage file has it too."""
    lines = [f"chosen: {choice.combination.name}"]
    for verdict in choice.verdicts:
        lines.append(f"  {verdict.lever}: {'chosen' if verdict.is_chosen else 'not chosen'}; {verdict.reason}")
    lines.append(f"expected of the whole run of {choice.run_tokens:,} tokens, with 95 % intervals:")
    for name, loss in choice.retained_losses.items():
        rise = choice.retained_rises[name]
        lines.append(
            f"  {name}: {loss.value:.4f} nats per token ({loss.low:.4f} to {loss.high:.4f}), a rise of {rise.value:.2%} "
            f"({rise.low:.2%} to {rise.high:.2%}); the bound is {100 * choice.max_forgetting:g}%"
        )
    for name, loss in choice.learned_losses.items():
        lines.append(f"  {name}: {loss.value:.4f} nats per token ({loss.low:.4f} to {loss.high:.4f})")
    equal = "as many new tokens" if choice.equal == "new-tokens" else "as much computation"
    lines += [
        f"the gate is passed with a probability of {choice.probability:.0%}",
        f"cost: about {format_duration(choice.seconds)} of training and {format_bytes(choice.memory_bytes)} of memory, with "
        f"{equal} as the stage had",
        *(f"note: {note}" for note in choice.notes),
        f"the pilots took {choice.pilot_tokens:,} tokens, {choice.pilot_tokens / choice.stage_tokens:.1%} of the run's",
    ]
    return lines


_KEY_COMMENTS = {
    "tokens": "trained tokens, replay included: as much computation as the stage had",
    "new_tokens": "tokens of new text, as many as the stage had; replay comes on top",
    "data": "the shares of the sources are the chosen ones",
    "schedule": "the peak is the chosen one",
    "objectives": "distill: what the start model predicts on these sources is kept",
    "penalties": "anchor: the weights are pulled to the start model's",
    "optimizer": "ssu: the columns that matter most for old text keep their values",
    "evaluation": "expected_losses: compared with the measured ones when the run ends",
    "max_forgetting": "the retention gate: the run ends with exit code 4 when the rise is larger (upper end of its interval)",
}


def _stage_text(choice: KeepChoice, raw: Mapping[str, Any], origin: str) -> str:
    """The stage file: the choice as its head, and a comment before each key that was set."""
    head = "".join(f"# {line}\n" if line else "#\n" for line in choice_lines(choice))
    body = []
    for key, value in raw.items():
        comment = _KEY_COMMENTS.get(key)
        if comment and (key != "optimizer" or choice.combination.is_sparse):
            body.append(f"# {comment}\n")
        body.append(yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=120))
    return f"{_FILE_HEADER} from {origin} and {len(choice.pilots)} pilots.\n{head}{''.join(body)}"
