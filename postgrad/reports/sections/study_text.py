"""A study's numbers in sentences, including what they do not show."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from postgrad.foreign_text import plain_text
from postgrad.reports.html.notation import format_compact, format_fixed, format_interval, format_percent, format_signed
from postgrad.reports.result_models import EstimateInterval, StudyArm, StudyResults
from postgrad.stats.forgetting import MIN_DOCUMENTS

_NO_ESTIMATE = EstimateInterval()


def interval_text(entry: EstimateInterval, decimals: int = 3) -> str:
    """`+0.120 (+0.110 to +0.130)`."""
    ends = format_interval(entry.low, entry.high, lambda end: format_signed(end, decimals))
    return f"{format_signed(entry.value, decimals)} ({ends})"


def percent_interval_text(entry: EstimateInterval) -> str:
    """`78 % (71 % to 83 %)`."""
    ends = format_interval(entry.low, entry.high, lambda end: format_percent(end, 0))
    return f"{format_percent(entry.value, 0)} ({ends})"


def join_names(names: Sequence[str]) -> str:
    """Names with commas between them, or semicolons where a name has a comma."""
    return ("; " if any("," in name for name in names) else ", ").join(names)


def is_significant(entry: EstimateInterval) -> bool:
    """Whether the interval excludes zero and all seeds agree on the sign."""
    if entry.low is None or entry.high is None or entry.low <= 0 <= entry.high:
        return False
    return all(s > 0 for s in entry.by_seed) if entry.low > 0 else all(s < 0 for s in entry.by_seed)


def study_summary(study: StudyResults) -> list[str]:
    """Sentences about a study: forgetting, protection, cost, and what is not shown."""
    finished = [arm for arm in study.arms if arm.change and arm.status == "finished"]
    lines = []
    missing = [_name(arm) for arm in study.arms if arm.status != "finished"]
    if missing:
        lines.append(f"Not finished and not in any sentence below: {join_names(missing)}.")
    if not finished:
        return [*lines, "No arm can be compared with the base yet."]
    baseline = next((arm for arm in finished if arm.name == study.against), None)
    if baseline is not None:
        lines += [_baseline_sentence(baseline), *_protection_sentences(finished, baseline, study)]
    lines += _union_sentences(finished, study)
    lines += _frontier_sentences(finished)
    lines += _gate_sentences(finished)
    lines += _skipped_sentences(finished)
    return [*lines, *_uncertainty_sentences(finished, study)]


def _name(arm: StudyArm) -> str:
    return plain_text(arm.name, 60)


def _change_value(arm: StudyArm, kind: str) -> float:
    return arm.change.get(kind, _NO_ESTIMATE).value or 0.0


def _pair_differences(study: StudyResults, arm: str, other: str) -> dict[str, EstimateInterval]:
    """The difference of two arms on old and new text and on average, whichever is the first of the stored pair."""
    for pair in study.pairs:
        estimates = {"old": pair.old, "new": pair.new, "average": pair.average}
        known = {kind: estimate for kind, estimate in estimates.items() if estimate}
        if (pair.arm, pair.than) == (arm, other):
            return known
        if (pair.arm, pair.than) == (other, arm):
            return {kind: _negate(estimate) for kind, estimate in known.items()}
    return {}


def _negate(entry: EstimateInterval) -> EstimateInterval:
    return EstimateInterval(
        value=-(entry.value or 0.0),
        low=None if entry.high is None else -entry.high,
        high=None if entry.low is None else -entry.low,
        by_seed=[-s for s in entry.by_seed],
    )


def _baseline_sentence(arm: StudyArm) -> str:
    old, new = arm.change.get("old", _NO_ESTIMATE), arm.change.get("new", _NO_ESTIMATE)
    forgets = (
        "forgets" if (old.low or 0.0) > 0 else "does not forget" if (old.high or 0.0) < 0 else "is not shown to forget"
    )
    return (
        f"Without protection ({_name(arm)}) the model {forgets}: the loss on old text changes by {interval_text(old)} nats per"
        f" token, that on new text by {interval_text(new)}."
    )


def _protection_sentences(finished: Sequence[StudyArm], baseline: StudyArm, study: StudyResults) -> list[str]:
    """The arm that removed most forgetting, and its cost on the new text."""
    others = [(arm, arm.removed) for arm in finished if arm is not baseline and not arm.from_scratch and arm.removed]
    if not others:
        return []
    (best, share), *rest = sorted(others, key=lambda pair: -(pair[1].value or 0.0))
    if (share.low or 0.0) <= 0:
        return ["No other arm is shown to have removed any of it."]
    sentence = f"{_name(best)} removed the largest share of it: {percent_interval_text(share)}"
    cost = _pair_differences(study, best.name, baseline.name).get("new")
    if cost:
        sentence += f", at {interval_text(cost)} nats per token on the new text"
        sentence += "" if is_significant(cost) else ", which is not shown to differ from zero"
    alike = [
        _name(arm)
        for arm, _ in rest
        if not is_significant(_pair_differences(study, best.name, arm.name).get("old", _NO_ESTIMATE))
    ]
    return [f"{sentence}.", *([f"Not shown to have removed less than that: {join_names(alike)}."] if alike else [])]


def _union_sentences(finished: Sequence[StudyArm], study: StudyResults) -> list[str]:
    union = next((arm for arm in finished if arm.name == study.union), None)
    others = [arm for arm in finished if arm.gap and not arm.from_scratch]
    if union is None or not others:
        return []
    best = min(others, key=lambda arm: arm.gap.get("average", _NO_ESTIMATE).value or 0.0)
    gap = best.gap.get("average", _NO_ESTIMATE)
    cost = f"{format_compact(union.tokens)} tokens from scratch" if union.from_scratch else "all text"
    return [
        f"Against all text at once ({_name(union)}, {cost}) the best on average is {_name(best)}, "
        f"{format_compact(best.tokens)} tokens on top of the base: {interval_text(gap)} nats per token"
        f"{'' if is_significant(gap) else ', which is not shown to differ from zero'}."
    ]


def _frontier_sentences(finished: Sequence[StudyArm]) -> list[str]:
    arms = ", ".join(
        f"{_name(arm)} ({format_signed(_change_value(arm, 'old'))} old, {format_signed(_change_value(arm, 'new'))} new)"
        for arm in _frontier_arms(finished)
    )
    return (
        [f"Of the arms that continue from the base, no other is better on both old and new text than: {arms}."]
        if arms
        else []
    )


def _frontier_arms(finished: Sequence[StudyArm]) -> list[StudyArm]:
    """The arms that no other dominates, by their forgetting."""
    arms = [arm for arm in finished if arm.dominated_by is not None and not arm.dominated_by]
    return sorted(arms, key=lambda arm: _change_value(arm, "old"))


def _gate_sentences(finished: Sequence[StudyArm]) -> list[str]:
    """The arms that forgot more than their `max_forgetting`."""
    failed = [
        f"{_name(arm)} (seed{'s' * (len(arm.gate_failed) > 1)} {', '.join(map(str, arm.gate_failed))})"
        for arm in finished
        if arm.gate_failed
    ]
    return [f"The retention gate failed: {join_names(failed)}."] if failed else []


def _skipped_sentences(finished: Sequence[StudyArm]) -> list[str]:
    """The arms that trained on fewer tokens than the others, since the loss of some steps was not finite."""
    skipped = [f"{_name(arm)} ({arm.skipped_steps})" for arm in finished if arm.skipped_steps]
    return [f"Steps were skipped, since their loss was not finite: {join_names(skipped)}."] if skipped else []


def _seed_sentences(finished: Sequence[StudyArm]) -> list[str]:
    """What so few seeds do not show."""
    counts = {_name(arm): len(arm.seeds_there) for arm in finished}
    single = [name for name, count in counts.items() if count == 1]
    if len(single) == len(counts):
        return ["Not shown: the spread over seeds (each arm was run once)."]
    lines = []
    if single:
        lines.append(f"Not shown: the spread over seeds of arms that were run once: {join_names(single)}.")
    if 2 in counts.values():
        lines.append("Two seeds say little about the spread over seeds.")
    return lines


def _uncertainty_sentences(finished: Sequence[StudyArm], study: StudyResults) -> list[str]:
    """Differences that the data do not show."""
    lines = _seed_sentences(finished)
    unclear = []
    for first, second in itertools.pairwise(_frontier_arms(finished)):
        pair = _pair_differences(study, second.name, first.name)
        kinds = [kind for kind in ("old", "new") if pair and not is_significant(pair.get(kind, _NO_ESTIMATE))]
        if kinds:
            unclear.append(f"{_name(first)} and {_name(second)} on {' and '.join(kinds)} text")
    if unclear:
        lines.append(f"Not shown to differ (an interval contains zero, or the seeds disagree): {'; '.join(unclear)}.")
    changes = [(arm, arm.change.get("old", _NO_ESTIMATE)) for arm in finished]
    unclear = [_name(arm) for arm, old in changes if (old.low or 0.0) <= 0 <= (old.high or 0.0)]
    if unclear:
        lines.append(f"Not shown to have forgotten anything: {join_names(unclear)}.")
    dominated = [_name(arm) for arm in finished if arm.dominated_by]
    if dominated:
        lines.append(
            f"Dominated by their values, whether or not the difference is significant: {join_names(dominated)}."
        )
    few = [
        f"{plain_text(s.name, 40)} ({format_fixed(s.documents, 0)})"
        for s in study.sets
        if 0 < s.documents < MIN_DOCUMENTS
    ]
    if few:
        lines.append(f"With so few documents, windows of text are resampled instead: {join_names(few)}.")
    return lines
