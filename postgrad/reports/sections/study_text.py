"""What do a study's numbers say in words? A summary made from them alone, which tells what they do not show, too."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from postgrad.reports.html.notation import compact, fixed, mapping, number, percent, plain, rows, signed

_Entry = Mapping[str, object]


def interval(entry: _Entry, decimals: int = 3) -> str:
    """`+0.120 (+0.110 to +0.130)`."""
    ends = f"{signed(entry.get('low'), decimals)} to {signed(entry.get('high'), decimals)}"
    return f"{signed(entry.get('value'), decimals)} ({ends})"


def interval_percent(entry: _Entry) -> str:
    """`78 % (71 % to 83 %)`."""
    return f"{percent(entry.get('value'), 0)} ({percent(entry.get('low'), 0)} to {percent(entry.get('high'), 0)})"


def listed(names: Sequence[str]) -> str:
    """Names behind one another; where one has a comma of its own, semicolons keep them apart."""
    return ("; " if any("," in name for name in names) else ", ").join(names)


def shown(entry: _Entry) -> bool:
    """Whether a difference is shown: its interval leaves out zero, and all seeds agree on its sign."""
    low, high = number(entry.get("low")), number(entry.get("high"))
    seeds = [number(s) or 0.0 for s in rows(entry.get("by_seed"))]
    if low is None or high is None or low <= 0 <= high:
        return False
    return all(s > 0 for s in seeds) if low > 0 else all(s < 0 for s in seeds)


def summary(found: _Entry) -> list[str]:
    """Sentences about a study: what was forgotten, what helped, what it cost, and what is not shown."""
    arms = [mapping(a) for a in rows(found.get("arms"))]
    done = [a for a in arms if mapping(a.get("change")) and a.get("status") == "finished"]
    lines = []
    missing = [plain(a["name"], 60) for a in arms if a.get("status") != "finished"]
    if missing:
        lines.append(f"Not finished, and so not in any sentence below: {listed(missing)}.")
    if not done:
        return [*lines, "No arm can be held against the base yet."]
    reference = next((a for a in done if a["name"] == found.get("against")), None)
    if reference is not None:
        lines += _of_reference(reference)
    lines += _of_protection(done, reference, found)
    lines += _of_union(done, found)
    lines += _of_frontier(done)
    lines += _of_gates(done)
    return [*lines, *_not_shown(done, found)]


def _change(arm: _Entry, what: str) -> _Entry:
    return mapping(mapping(arm.get("change")).get(what))


def _value(arm: _Entry, what: str) -> float:
    return number(_change(arm, what).get("value")) or 0.0


def _pair(found: _Entry, arm: object, than: object) -> Mapping[str, object]:
    """The difference of two arms, whichever way round it is kept."""
    for entry in map(mapping, rows(found.get("pairs"))):
        if (entry.get("arm"), entry.get("than")) == (arm, than):
            return entry
        if (entry.get("arm"), entry.get("than")) == (than, arm):
            return {what: _turned(mapping(entry.get(what))) for what in ("old", "new", "average")}
    return {}


def _turned(entry: _Entry) -> dict[str, object]:
    value, low, high = (number(entry.get(key)) or 0.0 for key in ("value", "low", "high"))
    return {
        "value": -value,
        "low": -high,
        "high": -low,
        "by_seed": [-(number(s) or 0.0) for s in rows(entry.get("by_seed"))],
    }


def _of_reference(arm: _Entry) -> list[str]:
    old, new = _change(arm, "old"), _change(arm, "new")
    name = plain(arm["name"], 60)
    low, high = (number(old.get(end)) or 0.0 for end in ("low", "high"))
    forgot = "forgets" if low > 0 else "does not forget" if high < 0 else "is not shown to forget"
    return [
        f"Without protection ({name}) the model {forgot}: the loss on old text changes by {interval(old)} nats per token, "
        f"that on new text by {interval(new)}."
    ]


def _of_protection(done: Sequence[_Entry], reference: _Entry | None, found: _Entry) -> list[str]:
    """Who kept most, and what that cost on the new text."""
    if reference is None:
        return []
    others = [a for a in done if a is not reference and not a.get("from_scratch") and mapping(a.get("removed"))]
    if not others:
        return []
    best, *less = sorted(others, key=lambda a: -(number(mapping(a["removed"]).get("value")) or 0.0))
    share = mapping(best["removed"])
    if (number(share.get("low")) or 0.0) <= 0:
        return ["No other arm is shown to have removed any of it."]
    said = f"{plain(best['name'], 60)} removed the largest share of it: {interval_percent(share)}"
    cost = mapping(_pair(found, best["name"], reference["name"]).get("new"))
    if cost:
        said += f", at {interval(cost)} nats per token on the new text"
        said += "" if shown(cost) else ", which is not shown to differ from nothing"
    alike = [a for a in less if not shown(mapping(_pair(found, best["name"], a["name"]).get("old")))]
    names = listed([plain(a["name"], 60) for a in alike])
    return [f"{said}.", *([f"Not shown to have removed less than that: {names}."] if alike else [])]


def _of_union(done: Sequence[_Entry], found: _Entry) -> list[str]:
    union = next((a for a in done if a["name"] == found.get("union")), None)
    others = [a for a in done if mapping(a.get("gap")) and not a.get("from_scratch")]
    if union is None or not others:
        return []
    best = min(others, key=lambda a: number(mapping(mapping(a["gap"]).get("average")).get("value")) or 0.0)
    gap = mapping(mapping(best["gap"]).get("average"))
    cost = f"{compact(union.get('tokens'))} tokens from scratch" if union.get("from_scratch") else "all text"
    return [
        f"Against all text at once ({plain(union['name'], 60)}, {cost}) the best on average is {plain(best['name'], 60)}, "
        f"{compact(best.get('tokens'))} tokens on top of the base: {interval(gap)} nats per token"
        f"{'' if shown(gap) else ', which is not shown to differ from nothing'}."
    ]


def _of_frontier(done: Sequence[_Entry]) -> list[str]:
    front = _front(done)
    named = ", ".join(
        f"{plain(a['name'], 60)} ({signed(_value(a, 'old'))} old, {signed(_value(a, 'new'))} new)"
        for a in sorted(front, key=lambda a: _value(a, "old"))
    )
    return (
        [f"Of the ways to go on from the base, no other is better on both old and new text than: {named}."]
        if front
        else []
    )


def _front(done: Sequence[_Entry]) -> list[_Entry]:
    return [a for a in done if "dominated_by" in a and not rows(a["dominated_by"])]


def _of_gates(done: Sequence[_Entry]) -> list[str]:
    """Which arms forgot more than their `max_forgetting`."""
    failed = {plain(arm["name"], 60): rows(arm.get("gate_failed")) for arm in done}
    told = [
        f"{name} (seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))})" for name, seeds in failed.items() if seeds
    ]
    return [f"The retention gate (max_forgetting) failed: {listed(told)}."] if told else []


def _of_seeds(done: Sequence[_Entry]) -> list[str]:
    """What so few seeds do not tell, by how many each arm has."""
    many = {plain(a["name"], 60): len(rows(a.get("seeds_there"))) for a in done}
    once = [name for name, count in many.items() if count == 1]
    if len(once) == len(many):
        return ["Not shown: how far another seed would lie from these numbers (each arm was carried out once)."]
    lines = []
    if once:
        lines.append(
            f"Not shown: how far another seed would lie from these, which were carried out once: {listed(once)}."
        )
    if 2 in many.values():
        lines.append("Two seeds tell little of how far a third one would lie from these numbers.")
    return lines


def _not_shown(done: Sequence[_Entry], found: _Entry) -> list[str]:
    """Which differences the data do not carry."""
    lines = _of_seeds(done)
    front = sorted(_front(done), key=lambda a: _value(a, "old"))
    open_ = []
    for first, second in itertools.pairwise(front):
        pair = _pair(found, second["name"], first["name"])
        lacking = [what for what in ("old", "new") if pair and not shown(mapping(pair.get(what)))]
        if lacking:
            open_.append(f"{plain(first['name'], 60)} and {plain(second['name'], 60)} on {' and '.join(lacking)} text")
    if open_:
        lines.append(f"Not shown to differ (an interval holds zero, or the seeds disagree): {'; '.join(open_)}.")
    loose = [
        plain(a["name"], 60)
        for a in done
        for entry in [_change(a, "old")]
        if (number(entry.get("low")) or 0.0) <= 0 <= (number(entry.get("high")) or 0.0)
    ]
    if loose:
        lines.append(f"Not shown: whether these forgot anything at all: {listed(loose)}.")
    dominated = [plain(a["name"], 60) for a in done if rows(a.get("dominated_by"))]
    if dominated:
        lines.append(f"Dominated by the values, which does not say that the difference is shown: {listed(dominated)}.")
    sets = [mapping(s) for s in rows(found.get("sets"))]
    few = [
        f"{plain(s['name'], 40)} ({fixed(s.get('documents'), 0)})"
        for s in sets
        if 0 < (number(s.get("documents")) or 0) < 20
    ]
    if few:
        lines.append(f"So few documents that windows of text were drawn instead: {listed(few)}.")
    return lines
