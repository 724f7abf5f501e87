"""Results of a study: losses of every arm with paired bootstrap intervals over documents, and the spread over seeds.

All numbers are computed from the runs' document-level scores. All arms share the same bootstrap draws, so every derived
quantity (a difference, a share of forgetting removed, a gap to the union) is paired. An arm's loss is the mean over its
seeds; the spread over seeds is reported separately and is part of no interval.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from postgrad.analysis.law_fitting import Law, Parameter, fit_law
from postgrad.analysis.scaling_laws import MIXTURE_LAW
from postgrad.errors import DataError
from postgrad.evaluation import before_after
from postgrad.evaluation.perplexity import Scores
from postgrad.lineage.metrics import EvaluationRow, read_run_metrics
from postgrad.lineage.record import RECORD, Record, read_record
from postgrad.reports.result_models import StudyResults
from postgrad.reports.sections.study_text import study_summary
from postgrad.stats.bootstrap import percentile_interval, resample_ratio
from postgrad.studies.run_study import PreparedStudy, load_times
from postgrad.studies.step_graph import Chain
from postgrad.studies.study import Arm, Claim, Study

FORMAT = 1
LOSS_KINDS = ("old", "new", "average")
_MIN_SHARES = 5
_ARM_MISSING = "an arm is missing"


@dataclass(frozen=True)
class BootstrapEstimate:
    """A value with its bootstrap draws."""

    value: float
    draws_S: np.ndarray

    def __sub__(self, other: BootstrapEstimate) -> BootstrapEstimate:
        return BootstrapEstimate(self.value - other.value, self.draws_S - other.draws_S)

    def as_dict(self, sign: float = 1.0) -> dict[str, float | None]:
        """The value with its 95 % interval."""
        low, high = percentile_interval(sign * self.draws_S)
        return {"value": sign * self.value, "low": low, "high": high}


def mean_estimate(items: Sequence[BootstrapEstimate]) -> BootstrapEstimate:
    """The mean of several estimates."""
    return BootstrapEstimate(
        float(np.mean([item.value for item in items])), np.mean(np.stack([item.draws_S for item in items]), axis=0)
    )


def removed_share(
    arm: BootstrapEstimate, baseline: BootstrapEstimate, base: BootstrapEstimate
) -> BootstrapEstimate | None:
    """The share of the baseline's forgetting that an arm removes, `1 - (arm - base) / (baseline - base)`.

    None where the baseline's forgetting is not significant: its interval includes zero.
    """
    lost = baseline - base
    if (percentile_interval(lost.draws_S)[0] or 0.0) <= 0:
        return None
    return BootstrapEstimate(1 - (arm.value - base.value) / lost.value, 1 - (arm.draws_S - base.draws_S) / lost.draws_S)


@dataclass(frozen=True)
class Losses:
    """The losses of one model, or the mean of several, by held-out set and by kind (`old`, `new`, `average`)."""

    sets: Mapping[str, BootstrapEstimate]
    roles: Mapping[str, str]

    def get_loss(self, key: str) -> BootstrapEstimate:
        """The loss on a set, or the mean over the sets of a kind."""
        if key in self.sets and key not in LOSS_KINDS:
            return self.sets[key]
        if key == "average":
            return mean_estimate([self.get_loss("old"), self.get_loss("new")])
        role = {"old": "retained", "new": "learned"}[key]
        return mean_estimate([drawn for name, drawn in self.sets.items() if self.roles[name] == role])


@dataclass
class _LossReader:
    """Turns scores into losses; all models share the bootstrap draws of a set."""

    roles: Mapping[str, str]
    sizes: dict[str, dict[str, int]] = field(default_factory=dict)

    def mean_losses(self, models: Sequence[before_after.AllScores]) -> Losses:
        """Mean losses of several models on the same documents."""
        return Losses(
            {name: self._estimate(i, name, [m[name] for m in models]) for i, name in enumerate(self.roles)}, self.roles
        )

    def _estimate(self, number: int, name: str, scores: Sequence[Scores]) -> BootstrapEstimate:
        units = [s.per_unit() for s in scores]
        tokens = units[0][1]
        for _, others in units[1:]:
            if not np.array_equal(tokens, others):
                raise DataError(f"two models were scored on different tokens of '{name}'", where="study")
        nats = np.mean(np.stack([nats for nats, _ in units]), axis=0)
        self.sizes[name] = {"documents": len(scores[0].bytes_N), "units": len(tokens), "tokens": int(tokens.sum())}
        return BootstrapEstimate(float(nats.sum() / tokens.sum()), resample_ratio(nats, tokens, seed=number))


@dataclass(frozen=True)
class _ArmLosses:
    """An arm with at least one finished seed."""

    name: str
    arm: Arm
    chains: list[Chain]
    mean: Losses
    by_seed: dict[int, Losses]


def compute_results(prepared: PreparedStudy, failed: Mapping[str, str]) -> dict[str, Any]:
    """All results of a study as plain data; unfinished arms are marked as such."""
    study = prepared.study
    roles = {h.name: "retained" for h in study.retained} | {h.name: "learned" for h in study.learned}
    reader = _LossReader(roles)
    there = {name: [c for c in prepared.graph.arm_chains(name) if _is_finished(prepared, c)] for name in study.arms}
    measured: dict[str, _ArmLosses] = {}
    for name, chains in there.items():
        if chains:
            scores = {c.seed: _read_scores(prepared, c.last_step) for c in chains}
            by_seed = {seed: reader.mean_losses([found]) for seed, found in scores.items()}
            mean = reader.mean_losses(list(scores.values()))
            measured[name] = _ArmLosses(name, study.arms[name], chains, mean, by_seed)
    base = _read_base_scores(prepared)
    start = reader.mean_losses([base]) if base is not None else None
    arms = [_arm_results(prepared, name, measured, start, failed) for name in study.arms]
    _mark_dominated(arms)
    found: dict[str, Any] = {
        "format": FORMAT,
        "name": study.name,
        "against": study.baseline_name,
        "union": study.union_name,
        "seeds": study.seeds,
        "sets": [{"name": name, "role": role, **reader.sizes.get(name, {})} for name, role in roles.items()],
        "base": _base_results(prepared, start),
        "arms": arms,
        "pairs": _pairwise_differences(measured),
        "claims": [_evaluate_claim(claim, study, _with_base(measured, start), start) for claim in study.claims],
        "replay": _replay_results(study, arms),
        "time": _time_totals(prepared),
        "machine": _machine_description(prepared),
        "failed": {prepared.graph.steps[key].slug: error for key, error in failed.items()},
    }
    return {**found, "summary": study_summary(StudyResults.model_validate(found))}


def _is_finished(prepared: PreparedStudy, chain: Chain) -> bool:
    return prepared.folder.is_finished(prepared.graph.steps[chain.last_step])


def _scores_path(prepared: PreparedStudy, key: str, side: str = "after") -> Path:
    return prepared.folder.step_path(prepared.graph.steps[key]) / "scores" / f"{side}.npz"


def _read_base_scores(prepared: PreparedStudy) -> before_after.AllScores | None:
    """Scores of the base: as the start model of a run, or as trained by the study."""
    base = prepared.graph.base_step
    for chain in prepared.graph.chains:
        first = prepared.graph.steps[chain.steps[0]]
        is_on_base = first.kind == "train" and not prepared.study.is_from_scratch(chain.arm)
        if is_on_base and _scores_path(prepared, first.key, "before").exists():
            return _read_scores(prepared, first.key, "before")
    if base is not None and _scores_path(prepared, base).exists():
        return _read_scores(prepared, base)
    return None


def _read_scores(prepared: PreparedStudy, key: str, side: str = "after") -> before_after.AllScores:
    """Scores of a step. Raises `DataError` where they are missing or broken."""
    path = _scores_path(prepared, key, side)
    is_run = (path.parents[1] / RECORD).exists()
    try:
        return before_after.read_scores(path, _read_step_record(prepared, key).id if is_run else "")
    except DataError as error:
        raise DataError(error.problem, where=error.where, hint=_repeat_hint(path.parents[1])) from error


def _loss_values(losses: Losses) -> dict[str, dict[str, float | None]]:
    return {what: losses.get_loss(what).as_dict() for what in (*LOSS_KINDS, *losses.sets)}


def _base_results(prepared: PreparedStudy, start: Losses | None) -> dict[str, Any]:
    key = prepared.graph.base_step
    step = prepared.graph.steps[key] if key else None
    named = prepared.study.base if isinstance(prepared.study.base, str) else "pretrained by the study"
    found: dict[str, Any] = {
        "name": named,
        "loss": _loss_values(start) if start else {},
        "tokens": None,
        "seconds": None,
    }
    if step is not None and prepared.folder.is_finished(step):
        found |= {**_total_cost(prepared, [step.key]), "curve": _loss_curves(prepared, [[step.key]])}
    return found


def _arm_results(
    prepared: PreparedStudy,
    name: str,
    arm_losses: Mapping[str, _ArmLosses],
    start: Losses | None,
    failed: Mapping[str, str],
) -> dict[str, Any]:
    """One arm as plain data."""
    study = prepared.study
    arm, chains = study.arms[name], prepared.graph.arm_chains(name)
    trouble = [failed[key] for chain in chains for key in chain.steps if key in failed]
    out: dict[str, Any] = {
        "name": name,
        "replay": arm.replay,
        "start": arm.start,
        "from_scratch": study.is_from_scratch(name),
        "reads": arm.reads,
        "seeds": [chain.seed for chain in chains],
        "status": _arm_status(bool(trouble), len(arm_losses[name].chains) if name in arm_losses else 0, len(chains)),
        **({"error": trouble[0]} if trouble else {}),
    }
    if name not in arm_losses:
        return out
    own = arm_losses[name]
    out["seeds_there"] = sorted(own.by_seed)
    out["loss"] = _loss_values(own.mean)
    out["by_seed"] = {
        str(seed): {what: losses.get_loss(what).value for what in (*LOSS_KINDS, *losses.sets)}
        for seed, losses in own.by_seed.items()
    }
    out["spread"] = {
        what: _seed_spread([losses.get_loss(what).value for losses in own.by_seed.values()]) for what in LOSS_KINDS
    }
    if start is not None:
        out["change"] = {
            what: (own.mean.get_loss(what) - start.get_loss(what)).as_dict() for what in (*LOSS_KINDS, *own.mean.sets)
        }
        reference = arm_losses.get(study.baseline_name or "")
        if reference is not None and reference is not own:
            share = removed_share(own.mean.get_loss("old"), reference.mean.get_loss("old"), start.get_loss("old"))
            out["removed"] = share.as_dict() if share else None
    union = arm_losses.get(study.union_name or "")
    if union is not None and union is not own:
        out["gap"] = {what: (own.mean.get_loss(what) - union.mean.get_loss(what)).as_dict() for what in LOSS_KINDS}
    costs = [_total_cost(prepared, chain.steps) for chain in own.chains]
    out |= {key: _mean([cost[key] for cost in costs]) for key in ("tokens", "seconds", "peak_memory")}
    out["skipped_steps"] = round(sum(cost["skipped_steps"] or 0 for cost in costs))
    given = not out["from_scratch"] or arm.blend is not None  # a blend has the base in it, whatever its arm began with
    base = _total_cost(prepared, [prepared.graph.base_step])["tokens"] if prepared.graph.base_step and given else 0
    known = prepared.graph.base_step is not None or not given
    out["tokens_in_all"] = (out["tokens"] or 0) + (base or 0) if known else None
    out["runs"] = [
        {"seed": chain.seed, "places": [str(_relative_step_path(prepared, key)) for key in chain.steps], **cost}
        for chain, cost in zip(own.chains, costs, strict=True)
    ]
    broken = [chain.seed for chain in own.chains if any(_has_failed_gate(prepared, key) for key in chain.steps)]
    out["gate_failed"] = [] if arm.blend else broken
    out["curve"] = {} if arm.blend else _loss_curves(prepared, [list(chain.steps) for chain in own.chains])
    return out


def _arm_status(failed: bool, finished: int, chains: int) -> str:
    if failed:
        return "failed"
    return "finished" if finished == chains else "in part" if finished else "not finished"


def _relative_step_path(prepared: PreparedStudy, key: str) -> Path:
    return Path(os.path.relpath(prepared.folder.step_path(prepared.graph.steps[key]), prepared.folder.path))


def _seed_spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """Spread over seeds: lowest, highest, and the sample standard deviation (n - 1)."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"low": min(values), "high": max(values), "deviation": deviation, "seeds": len(values)}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _total_cost(prepared: PreparedStudy, keys: Sequence[str]) -> dict[str, float | None]:
    """Cost of steps: trained tokens, optimizer steps without an update, seconds of training and preparation, peak accelerator
    memory in bytes.
    """
    tokens, skipped, seconds, peaks = 0.0, 0, 0.0, []
    for key in keys:
        step = prepared.graph.steps[key]
        note = prepared.folder.read_note(step)
        seconds += sum(note.get("seconds", {}).get(phase, 0.0) for phase in ("training", "making"))
        peaks += [note["peak_memory"]] if note.get("peak_memory") else []
        if step.kind == "train":
            record = _read_step_record(prepared, key)
            tokens += record.totals.tokens
            skipped += len(record.totals.skipped_steps)
    return {"tokens": tokens, "skipped_steps": skipped, "seconds": seconds, "peak_memory": max(peaks, default=None)}


def _has_failed_gate(prepared: PreparedStudy, key: str) -> bool:
    """Whether a run failed its retention gate."""
    return prepared.graph.steps[key].kind == "train" and _read_step_record(prepared, key).status == "gate-failed"


def _read_step_record(prepared: PreparedStudy, key: str) -> Record:
    return read_record(prepared.folder.step_path(prepared.graph.steps[key]))


def _loss_curves(prepared: PreparedStudy, chains: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Loss on each set by trained tokens, averaged over seeds at common evaluations; and where each stage starts."""
    curves: list[dict[str, dict[float, float]]] = []
    switches: list[float] = []
    for steps in chains:
        own: dict[str, dict[float, float]] = {}
        before = 0.0
        switches = []
        for key in steps:
            step = prepared.graph.steps[key]
            if step.kind != "train":
                continue
            switches.append(before)
            record = _read_step_record(prepared, key)
            rows = _read_evaluations(prepared.folder.step_path(step), record)
            # Seeds differ by a few tokens per step, so evaluations are aligned by the fraction of the stage.
            whole = record.plan.tokens
            last = rows[-1].step if rows else 1
            for row in rows:
                at = round(before + whole * row.step / max(last, 1))
                for name, found in row.sets.items():
                    own.setdefault(name, {})[at] = found.nats
            before += whole
        curves.append(own)
    out: dict[str, list[list[float]]] = {}
    for name in curves[0] if curves else ():
        at = [x for x in curves[0][name] if all(x in c.get(name, {}) for c in curves)]
        out[name] = [[x, float(np.mean([c[name][x] for c in curves]))] for x in at]
    return {"sets": out, "switches": switches}


def _read_evaluations(run_folder: Path, record: Record) -> list[EvaluationRow]:
    """The evaluations of a run. Raises `DataError` where its metrics are damaged."""
    metrics = read_run_metrics(run_folder, record)
    if metrics.damage:
        raise DataError(metrics.damage[0], where=str(run_folder), hint=_repeat_hint(run_folder))
    return metrics.evaluations


def _repeat_hint(run_folder: Path) -> str:
    return f"remove the folder {run_folder}; the same command repeats this run"


def _mark_dominated(arms: Sequence[dict[str, Any]]) -> None:
    """Mark each arm with those that dominate it: no more forgetting and no less gain, by point estimates."""
    points = {
        arm["name"]: (arm["change"]["old"]["value"], arm["change"]["new"]["value"])
        for arm in arms
        if "change" in arm and not arm["from_scratch"]
    }
    for arm in arms:
        own = points.get(arm["name"])
        if own is not None:
            arm["dominated_by"] = [name for name, p in points.items() if p != own and p[0] <= own[0] and p[1] <= own[1]]


def _pairwise_differences(arm_losses: Mapping[str, _ArmLosses]) -> list[dict[str, Any]]:
    """Difference of every pair of arms on old, new and average loss, with its interval and by seed."""
    names = list(arm_losses)
    out = []
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            entry: dict[str, Any] = {"arm": second, "than": first}
            for what in LOSS_KINDS:
                entry[what] = _difference(arm_losses[second], arm_losses[first], what)
            out.append(entry)
    return out


def _with_base(arm_losses: Mapping[str, _ArmLosses], start: Losses | None) -> dict[str, _ArmLosses]:
    """The arms plus the base, which is the same for every seed."""
    if start is None:
        return dict(arm_losses)
    seeds = {seed: start for arm in arm_losses.values() for seed in arm.by_seed}
    return {"base": _ArmLosses("base", Arm(), [], start, seeds), **arm_losses}


def _difference(arm: _ArmLosses, other: _ArmLosses, key: str) -> dict[str, Any]:
    both = sorted(arm.by_seed.keys() & other.by_seed.keys())
    by_seed = [arm.by_seed[s].get_loss(key).value - other.by_seed[s].get_loss(key).value for s in both]
    return {**(arm.mean.get_loss(key) - other.mean.get_loss(key)).as_dict(), "by_seed": by_seed}


def _evaluate_claim(
    claim: Claim, study: Study, arm_losses: Mapping[str, _ArmLosses], start: Losses | None
) -> dict[str, Any]:
    """Test a claim: by its interval over documents, and with every seed."""
    out: dict[str, Any] = {"say": claim.statement, "arm": claim.arm, "than": claim.compared_with, "on": claim.loss}
    arm = arm_losses.get(claim.arm)
    reference = arm_losses.get(study.baseline_name or "")
    if claim.min_removed is not None:
        out |= {"on": "removed", "bound": claim.min_removed}
        found = None
        if arm and reference and start:
            found = removed_share(arm.mean.get_loss("old"), reference.mean.get_loss("old"), start.get_loss("old"))
        if found is None or not (arm and reference and start):
            why = _ARM_MISSING if not (arm and reference and start) else f"{reference.name} is not shown to forget"
            return {**out, "verdict": "not shown", "why": why}
        zero = start.get_loss("old").value
        both = sorted(arm.by_seed.keys() & reference.by_seed.keys())
        by_seed = [
            1 - (arm.by_seed[s].get_loss("old").value - zero) / lost
            for s in both
            if (lost := reference.by_seed[s].get_loss("old").value - zero) > 0
        ]
        entry = {**found.as_dict(), "by_seed": by_seed}
        return {**out, **entry, "verdict": claim_verdict(entry, claim.min_removed, at_least=True)}
    than = arm_losses.get(claim.compared_with or "")
    out["bound"] = claim.max_difference
    if arm is None or than is None:
        return {**out, "verdict": "not shown", "why": _ARM_MISSING}
    entry = _difference(arm, than, claim.loss)
    return {**out, **entry, "verdict": claim_verdict(entry, claim.max_difference)}


def claim_verdict(entry: Mapping[str, Any], bound: float, *, at_least: bool = False) -> str:
    """Verdict on value <= bound (>= with `at_least`): the interval and every seed must lie on one side."""
    low, high, seeds = entry["low"], entry["high"], entry["by_seed"]
    if low is None:  # a single document
        return "not shown"
    if at_least:
        low, high, seeds, bound = -high, -low, [-s for s in seeds], -bound
    if high <= bound and all(s <= bound for s in seeds):
        return "holds"
    if low > bound and all(s > bound for s in seeds):
        return "does not hold"
    return "not shown"


# -- by the share of replay --------------------------------------------------------------------------------------------

REPLAY_LAW = Law(
    "forgetting by the share of replay",
    (
        Parameter("F", (0.01, 0.1, 1.0), 0.0),
        Parameter("B", (1.0, 10.0, 100.0, 1000.0), 0.0, 1e6),
        Parameter("a", (0.2, 0.5, 1.0), 0.0, 5.0),
        Parameter("G", (0.0, 0.1, 0.5), 0.0),
    ),
    ("start", "share"),
    lambda start, share, F, B, a, G: start + F / (1.0 + B * share) ** a - G,
    "Bethune et al. 2025, arXiv 2502.06042, at one size and budget: rise of the loss = F / (1 + B p)^a - G",
)
"""Loss on old text as a function of the replayed share p, relative to the start model.

G is the gain from training further on old text: an undertrained base learns from its replay, so the rise may be negative.
Fitting the loss itself gives every arm the same weight and includes arms without forgetting.
"""


def _replay_results(study: Study, arms: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Arms that differ from the baseline in their replay share alone, and the laws fitted to them."""
    reference = study.arms.get(study.baseline_name or "")
    if reference is None:
        return {}
    alike = reference.model_copy(update={"replay": 0.0})
    points = [
        {"arm": a["name"], "share": a["replay"], "change": a["change"], "loss": a["loss"]}
        for a in arms
        if "change" in a and study.arms[a["name"]].model_copy(update={"replay": 0.0, "seeds": alike.seeds}) == alike
    ]
    points.sort(key=lambda p: p["share"])
    if len(points) < 2:
        return {}
    return {"points": points, "laws": {"old": _fit_rise(points), "new": _fit_loss(points)}}


def _fit_rise(points: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    start = points[0]["loss"]["old"]["value"] - points[0]["change"]["old"]["value"]
    shares = [p["share"] for p in points]
    found = _fit_law(REPLAY_LAW, "share", shares, [p["loss"]["old"]["value"] for p in points], shares, start=start)
    if found:
        found["line"] = [[x, *(loss - start for loss in losses)] for x, *losses in found["line"]]
    return found


def _fit_loss(points: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Law for the loss on new text by its own share, expressed by the share of replay."""
    known = [(1 - p["share"], p["loss"]["new"]["value"]) for p in points]
    found = _fit_law(
        MIXTURE_LAW, "ratio", [x for x, _ in known], [y for _, y in known], [1 - p["share"] for p in points]
    )
    if found:
        found["line"] = sorted([1 - x, *rest] for x, *rest in found["line"])
    return found


def _fit_law(
    law: Law, variable: str, xs: list[float], ys: list[float], span: list[float], **constant: float
) -> dict[str, Any] | None:
    """A law fitted to measured points, as a curve with its interval; None with too few points."""
    if len(xs) < _MIN_SHARES:
        return None
    try:
        found = fit_law(
            law, {variable: np.array(xs), **{name: np.array(value) for name, value in constant.items()}}, ys
        )
    except DataError:
        return None
    at = np.unique(np.concatenate([np.linspace(min(span), max(span), 41), span]))
    line = []
    for x in at.tolist():
        estimated = found.predict(**{variable: x}, **constant)
        line.append([x, estimated.value, estimated.low, estimated.high])
    return {"law": law.name, "source": law.source, "values": found.values, "spread": found.spread, "line": line}


# -- time and machine --------------------------------------------------------------------------------------------------


def _time_totals(prepared: PreparedStudy) -> dict[str, Any]:
    """Time of the study by phase. `outside`: the share spent on neither training, evaluation nor preparation."""
    phases = {"training": 0.0, "evaluation": 0.0, "making": 0.0, "other": 0.0}
    for step in prepared.graph.steps.values():
        for phase, seconds in prepared.folder.read_note(step).get("seconds", {}).items():
            phases[phase] += seconds
    whole = load_times(prepared.folder)
    return {
        **phases,
        "wall": whole["wall"],
        "outside": max(0.0, 1 - whole["inside"] / whole["devices"]) if whole["devices"] else None,
        "runs": len(prepared.graph.training_steps),
        "runs_requested": prepared.graph.unshared_run_count,
    }


def _machine_description(prepared: PreparedStudy) -> dict[str, Any]:
    for key, step in prepared.graph.steps.items():
        if step.kind == "train" and prepared.folder.is_finished(step):
            record = _read_step_record(prepared, key)
            execution = record.execution
            return {
                **record.machine,
                "versions": record.versions,
                "parameters": record.model.parameters,
                "execution": {"dtype": execution.dtype, "attention": execution.attention, "threads": execution.threads},
            }
    return {}
