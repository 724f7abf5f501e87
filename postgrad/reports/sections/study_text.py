"""What do a study's numbers say in words? A summary made from them alone, which tells what they do not show, too."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from postgrad.reports.html.notation import (
    as_list,
    as_mapping,
    as_number,
    format_compact,
    format_fixed,
    format_percent,
    format_signed,
    plain_text,
)

_Entry = Mapping[str, object]


def interval_text(entry: _Entry, decimals: int = 3) -> str:
    """`+0.120 (+0.110 to +0.130)`."""
    ends = f"{format_signed(entry.get('low'), decimals)} to {format_signed(entry.get('high'), decimals)}"
    return f"{format_signed(entry.get('value'), decimals)} ({ends})"


def percent_interval_text(entry: _Entry) -> str:
    """`78 % (71 % to 83 %)`."""
    return f"{format_percent(entry.get('value'), 0)} ({format_percent(entry.get('low'), 0)} to {format_percent(entry.get('high'), 0)})"


def join_names(names: Sequence[str]) -> str:
    """Names behind one another; where one has a comma of its own, semicolons keep them apart."""
    return ("; " if any("," in name for name in names) else ", ").join(names)


def is_shown(entry: _Entry) -> bool:
    """Whether a difference is shown: its interval leaves out zero, and all seeds agree on its sign."""
    low, high = as_number(entry.get("low")), as_number(entry.get("high"))
    seeds = [as_number(s) or 0.0 for s in as_list(entry.get("by_seed"))]
    if low is None or high is None or low <= 0 <= high:
        return False
    return all(s > 0 for s in seeds) if low > 0 else all(s < 0 for s in seeds)


def study_summary(results: _Entry) -> list[str]:
    """Sentences about a study: what was forgotten, what helped, what it cost, and what is not shown."""
    arms = [as_mapping(a) for a in as_list(results.get("arms"))]
    done = [a for a in arms if as_mapping(a.get("change")) and a.get("status") == "finished"]
    lines = []
    missing = [plain_text(a["name"], 60) for a in arms if a.get("status") != "finished"]
    if missing:
        lines.append(f"Not finished, and so not in any sentence below: {join_names(missing)}.")
    if not done:
        return [*lines, "No arm can be held against the base yet."]
    reference = next((a for a in done if a["name"] == results.get("against")), None)
    if reference is not None:
        lines += _baseline_sentences(reference)
    lines += _protection_sentences(done, reference, results)
    lines += _union_sentences(done, results)
    lines += _frontier_sentences(done)
    lines += _gate_sentences(done)
    return [*lines, *_uncertainty_sentences(done, results)]


def _arm_change(arm: _Entry, what: str) -> _Entry:
    return as_mapping(as_mapping(arm.get("change")).get(what))


def _change_value(arm: _Entry, what: str) -> float:
    return as_number(_arm_change(arm, what).get("value")) or 0.0


def _pair_difference(results: _Entry, arm: object, other: object) -> Mapping[str, object]:
    """The difference of two arms, whichever way round it is kept."""
    for entry in map(as_mapping, as_list(results.get("pairs"))):
        if (entry.get("arm"), entry.get("than")) == (arm, other):
            return entry
        if (entry.get("arm"), entry.get("than")) == (other, arm):
            return {what: _negate(as_mapping(entry.get(what))) for what in ("old", "new", "average")}
    return {}


def _negate(entry: _Entry) -> dict[str, object]:
    value, low, high = (as_number(entry.get(key)) or 0.0 for key in ("value", "low", "high"))
    return {
        "value": -value,
        "low": -high,
        "high": -low,
        "by_seed": [-(as_number(s) or 0.0) for s in as_list(entry.get("by_seed"))],
    }


def _baseline_sentences(arm: _Entry) -> list[str]:
    old, new = _arm_change(arm, "old"), _arm_change(arm, "new")
    name = plain_text(arm["name"], 60)
    low, high = (as_number(old.get(end)) or 0.0 for end in ("low", "high"))
    forgot = "forgets" if low > 0 else "does not forget" if high < 0 else "is not shown to forget"
    return [
        f"Without protection ({name}) the model {forgot}: the loss on old text changes by {interval_text(old)} nats per token, "
        f"that on new text by {interval_text(new)}."
    ]


def _protection_sentences(finished_arms: Sequence[_Entry], baseline: _Entry | None, results: _Entry) -> list[str]:
    """Who kept most, and what that cost on the new text."""
    if baseline is None:
        return []
    others = [
        a for a in finished_arms if a is not baseline and not a.get("from_scratch") and as_mapping(a.get("removed"))
    ]
    if not others:
        return []
    best, *less = sorted(others, key=lambda a: -(as_number(as_mapping(a["removed"]).get("value")) or 0.0))
    share = as_mapping(best["removed"])
    if (as_number(share.get("low")) or 0.0) <= 0:
        return ["No other arm is shown to have removed any of it."]
    said = f"{plain_text(best['name'], 60)} removed the largest share of it: {percent_interval_text(share)}"
    cost = as_mapping(_pair_difference(results, best["name"], baseline["name"]).get("new"))
    if cost:
        said += f", at {interval_text(cost)} nats per token on the new text"
        said += "" if is_shown(cost) else ", which is not shown to differ from nothing"
    alike = [a for a in less if not is_shown(as_mapping(_pair_difference(results, best["name"], a["name"]).get("old")))]
    names = join_names([plain_text(a["name"], 60) for a in alike])
    return [f"{said}.", *([f"Not shown to have removed less than that: {names}."] if alike else [])]


def _union_sentences(finished_arms: Sequence[_Entry], results: _Entry) -> list[str]:
    union = next((a for a in finished_arms if a["name"] == results.get("union")), None)
    others = [a for a in finished_arms if as_mapping(a.get("gap")) and not a.get("from_scratch")]
    if union is None or not others:
        return []
    best = min(others, key=lambda a: as_number(as_mapping(as_mapping(a["gap"]).get("average")).get("value")) or 0.0)
    gap = as_mapping(as_mapping(best["gap"]).get("average"))
    cost = f"{format_compact(union.get('tokens'))} tokens from scratch" if union.get("from_scratch") else "all text"
    return [
        f"Against all text at once ({plain_text(union['name'], 60)}, {cost}) the best on average is {plain_text(best['name'], 60)}, "
        f"{format_compact(best.get('tokens'))} tokens on top of the base: {interval_text(gap)} nats per token"
        f"{'' if is_shown(gap) else ', which is not shown to differ from nothing'}."
    ]


def _frontier_sentences(finished_arms: Sequence[_Entry]) -> list[str]:
    front = _frontier_arms(finished_arms)
    named = ", ".join(
        f"{plain_text(a['name'], 60)} ({format_signed(_change_value(a, 'old'))} old, {format_signed(_change_value(a, 'new'))} new)"
        for a in sorted(front, key=lambda a: _change_value(a, "old"))
    )
    return (
        [f"Of the ways to go on from the base, no other is better on both old and new text than: {named}."]
        if front
        else []
    )


def _frontier_arms(finished_arms: Sequence[_Entry]) -> list[_Entry]:
    return [a for a in finished_arms if "dominated_by" in a and not as_list(a["dominated_by"])]


def _gate_sentences(finished_arms: Sequence[_Entry]) -> list[str]:
    """Which arms forgot more than their `max_forgetting`."""
    failed = {plain_text(arm["name"], 60): as_list(arm.get("gate_failed")) for arm in finished_arms}
    told = [
        f"{name} (seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))})" for name, seeds in failed.items() if seeds
    ]
    return [f"The retention gate (max_forgetting) failed: {join_names(told)}."] if told else []


def _seed_sentences(finished_arms: Sequence[_Entry]) -> list[str]:
    """What so few seeds do not tell, by how many each arm has."""
    many = {plain_text(a["name"], 60): len(as_list(a.get("seeds_there"))) for a in finished_arms}
    once = [name for name, count in many.items() if count == 1]
    if len(once) == len(many):
        return ["Not shown: how far another seed would lie from these numbers (each arm was carried out once)."]
    lines = []
    if once:
        lines.append(
            f"Not shown: how far another seed would lie from these, which were carried out once: {join_names(once)}."
        )
    if 2 in many.values():
        lines.append("Two seeds tell little of how far a third one would lie from these numbers.")
    return lines


def _uncertainty_sentences(finished_arms: Sequence[_Entry], results: _Entry) -> list[str]:
    """Which differences the data do not carry."""
    lines = _seed_sentences(finished_arms)
    front = sorted(_frontier_arms(finished_arms), key=lambda a: _change_value(a, "old"))
    open_ = []
    for first, second in itertools.pairwise(front):
        pair = _pair_difference(results, second["name"], first["name"])
        lacking = [what for what in ("old", "new") if pair and not is_shown(as_mapping(pair.get(what)))]
        if lacking:
            open_.append(
                f"{plain_text(first['name'], 60)} and {plain_text(second['name'], 60)} on {' and '.join(lacking)} text"
            )
    if open_:
        lines.append(f"Not shown to differ (an interval holds zero, or the seeds disagree): {'; '.join(open_)}.")
    loose = [
        plain_text(a["name"], 60)
        for a in finished_arms
        for entry in [_arm_change(a, "old")]
        if (as_number(entry.get("low")) or 0.0) <= 0 <= (as_number(entry.get("high")) or 0.0)
    ]
    if loose:
        lines.append(f"Not shown: whether these forgot anything at all: {join_names(loose)}.")
    dominated = [plain_text(a["name"], 60) for a in finished_arms if as_list(a.get("dominated_by"))]
    if dominated:
        lines.append(
            f"Dominated by the values, which does not say that the difference is shown: {join_names(dominated)}."
        )
    sets = [as_mapping(s) for s in as_list(results.get("sets"))]
    few = [
        f"{plain_text(s['name'], 40)} ({format_fixed(s.get('documents'), 0)})"
        for s in sets
        if 0 < (as_number(s.get("documents")) or 0) < 20
    ]
    if few:
        lines.append(f"So few documents that windows of text were drawn instead: {join_names(few)}.")
    return lines
