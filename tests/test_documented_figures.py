"""Are the figures of a page those of the file that it names? Rows of tables are made anew from the results, and looked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Found = dict[str, Any]


def read(name: str) -> Found:
    return json.loads((RESULTS / f"{name}.json").read_text())


def number(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def interval(found: Found, digits: int, of: str = "value") -> str:
    return f"{number(found[of], digits)} ({number(found['low'], digits)} to {number(found['high'], digits)})"


def spread(values: list[float], digits: int = 3) -> str:
    mean = sum(values) / len(values)
    return f"{number(mean, digits)} ({number(min(values), digits)} to {number(max(values), digits)})"


def of_levers(found: Found, digits: Iterable[str]) -> list[str]:
    """The rows of a study of levers; `digits` names the columns that stand behind the changes."""
    rows = []
    for arm in found["arms"]:
        name = arm["name"] if arm["dominated_by"] else f"**{arm['name']}**"
        if arm["name"] == "none":
            name, removed = ("none" if arm["dominated_by"] else "**none**"), "–"
        else:
            share = arm["removed"]
            removed = f"{share['value']:.0%} ({100 * share['low']:.0f} to {100 * share['high']:.0f})".replace("%", " %")
        cells = [name, interval(arm["change"]["old"], 3), removed, interval(arm["change"]["new"], 3)]
        for column in digits:
            cells.append(
                f"{found['seconds_apart'][arm['name']]:.0f} s"
                if column == "time"
                else f"{arm['spread'][column]['deviation']:.3f}"
            )
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def changes(run: Found, old: str, new: str, digits: int = 2) -> str:
    return f"{interval(run['changes'][old], digits, 'difference')} | {interval(run['changes'][new], digits, 'difference')} |"


def by_name(found: Found) -> dict[str, Found]:
    return {run["run"]: run for run in found["runs"]}


def levers() -> list[str]:
    return (
        of_levers(read("levers"), ["old", "new", "time"])
        + of_levers(read("levers_python"), [])
        + of_levers(read("levers_2026"), [])
    )


def of_fewer() -> list[str]:
    found = by_name(read("fewer_weights"))
    named = {
        "none": "nothing, peak 1e-3",
        "rate-7e-4": "peak 7e-4",
        "rate-5e-4": "peak 5e-4",
        "rate-3e-4": "peak 3e-4",
        "rate-1.5e-4": "peak 1.5e-4",
        "mofo-0.3": "`mofo`, 30 %",
        "mofo-0.1": "`mofo`, 10 %",
        "mofo-0.05": "`mofo`, 5 %",
        "migu-0.5": "`migu`, 50 %",
        "migu-0.3": "`migu`, 30 %",
        "migu-0.1": "`migu`, 10 %",
        "finch-0.7": "`loss_adaptive`, start 70 %",
        "finch-0.5": "`loss_adaptive`, start 50 %",
        "finch-0.25": "`loss_adaptive`, start 25 %",
        "blocks": "`blocks`, all but the first two",
    }
    rows = []
    for arm, said in named.items():
        there = [found[f"{arm}-{seed}"] for seed in range(3) if f"{arm}-{seed}" in found]
        other = ", ".join(number(run["changes"]["stories"]["difference"], 2) for run in there[1:])
        more = [lost - lowered for run in there if (lowered := by_a_lower_peak(found, run)) is not None
                for lost in [run["changes"]["stories"]["difference"]]]  # fmt: skip
        last = "" if arm == "none" or arm.startswith("rate") else ", ".join(number(each, 2) for each in more)
        row = f"| {said} | {changes(there[0], 'stories', 'german-dev')} {other} | {last} |"
        rows.append(row.replace("|  |", "| |").replace("|  |", "| |"))
    return rows


def by_a_lower_peak(found: dict[str, Found], run: Found) -> float | None:
    """What is forgotten on the line between the two nearest peaks of the seed that learn as much; None beyond them."""
    peaks = [found.get(f"{peak}-{run['seed']}") for peak in ("none", *(f"rate-{r}e-4" for r in ("7", "5", "3", "1.5")))]
    points = sorted(tuple(p["changes"][s]["difference"] for s in ("german-dev", "stories")) for p in peaks if p)
    learnt = run["changes"]["german-dev"]["difference"]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= learnt <= x1:
            return y0 + (y1 - y0) * (learnt - x0) / (x1 - x0)
    return None


def of_updates() -> list[str]:
    rows = []
    arms = {arm["arm"]: arm for arm in read("update_speed")["arms"]}
    for kind, word in (("momentum 10 %", "mofo"), ("magnitude 30 %", "migu")):
        for tuning in ("", "lora, "):
            arm, plain = arms[f"{tuning}{kind}"], arms["lora" if tuning else "plain"]
            middle, low, high = arm["ratio"]
            said = f"`{word}`, {kind.split(' ', 1)[1]}" + (", on `lora`" if tuning else "")
            plain_ms, ms = (round(each["update_ms"][0]) for each in (plain, arm))
            rows.append(f"| {said} | {middle:.3f} ({low:.3f} to {high:.3f}) | {plain_ms} ms | {ms} ms |")
    return rows


def of_distillation() -> list[str]:
    runs = read("distillation")["runs"]
    named = {
        "naive": "nothing",
        "lwf": "`distill` on the new text (learning without forgetting)",
        "replay": "10 % replay",
        "kd-alone": "10 % replay, `distill` alone on it",
        "replay-kd": "10 % replay, and `distill` on it, weight 4",
        "replay-lwf": "10 % replay, and `distill` on everything",
    }
    means, rows = {}, []
    for arm, said in named.items():
        there = [run for run in runs if run["run"].removesuffix(f"-{run['seed']}") == arm]
        assert [run["seed"] for run in there] == [0, 1, 2]
        old, new = ([run["changes"][name]["difference"] for run in there] for name in ("stories", "gsd"))
        means[arm] = sum(old) / 3
        removed = "–" if arm == "naive" else f"{100 - 100 * means[arm] / means['naive']:.0f} %"
        rows.append(f"| {said} | {spread(old)} | {spread(new)} | {removed} |")
        for name, values in (("stories", old), ("gsd", new)):  # as the page says of the range
            assert all(
                max(values) - min(values) < run["changes"][name]["high"] - run["changes"][name]["low"] for run in there
            )
    return rows


def of_restoring() -> list[str]:
    trained, restored = read("distillation")["runs"], read("restore")["runs"]
    rows = []
    for run in restored:
        seed = run["seed"]
        naive = next(r["nats"] for r in trained if r["seed"] == seed and r["run"].startswith("naive"))
        old, new = (
            [naive["before"][name], naive["after"][name], run["nats"]["after"][name]] for name in ("stories", "gsd")
        )
        won, lost = (old[1] - old[2]) / (old[1] - old[0]), (new[2] - new[1]) / (new[0] - new[1])
        nats = ", ".join(f"{each:.3f}" for each in old)
        ended = f"{run['steps']} of {run['steps_planned']}"
        rows.append(f"| {seed} | {nats} | {won:.1%} | {lost:.1%} | {ended} |".replace("% |", " % |"))
    return rows


def of_teachers() -> list[str]:
    arms = {arm["arm"]: arm for arm in read("distillation_speed")["rows"]}
    named = {
        "teacher": "a second model of the same size, asked at every step",
        "lora off": "LoRA switched off, beside a LoRA step",
        "sampled": "asked once, `sampled`",
        "top-k": "asked once, `top-k` of 64",
    }
    rows = []
    for name, said in named.items():
        middle, low, high = arms[name]["ratio"]
        size = arms[name]["bytes_per_label"]
        kept = f"{size:.0f} bytes" if size else "–"
        rows.append(f"| {said} | {middle:.2f} × ({low:.2f} to {high:.2f}) | {kept} |")
    return rows


def of_penalties() -> list[str]:
    found = by_name(read("penalties"))
    return [changes(run, "stories", "german-dev") for run in found.values()]


def of_probes(name: str, digits: int = 3) -> list[str]:
    rows = []
    found = read(name)["table"]
    best = max(row["value"] for row in found)
    for row in found:
        value = f"{row['value']:.{digits}f}"
        value = f"**{value}**" if row["value"] == best else value
        cells = f"{value} | {row['low']:.3f} to {row['high']:.3f} |"
        if against := row.get("against_last"):
            low, high = number(against["low"], 3), number(against["high"], 3)
            cells += f" {number(against['value'], 3)} | {low} to {high} |"
        rows.append(f"| {row['reads']} | {cells}")
    return rows


def of_paper() -> list[str]:
    """Rows of the paper's protocol at laptop size, as far as they are numbers of one study."""

    def arms(name: str) -> Found:
        path = ROOT / "examples" / "paper" / "results" / f"paper-{name}.json"
        return {arm["name"]: arm for arm in json.loads(path.read_text())["arms"]}

    def removed(arm: Found) -> str:
        if "removed" not in arm:
            return ""
        share, low, high = (f"{100 * arm['removed'][key]:.0f}".replace("-", "−") for key in ("value", "low", "high"))
        return f"{share} % ({low} to {high})"

    def row(said: str, arm: Found, *more: str) -> str:
        old, new = (interval(arm["change"][of], 3) for of in ("old", "new"))
        return f"| {said} | {' | '.join([old, *more[:1], new, *more[1:]])} |".replace("|  |", "| |")

    named = {
        "half the peak": "re-warmed to half the peak",
        "none": "re-warmed to the peak, re-decayed (none)",
        "twice the peak": "re-warmed to twice the peak",
        "new from scratch": "new only, from scratch",
        "union": "union from scratch, 1.8 M tokens",
    }
    strong, large = arms("strong"), arms("large")
    rows = [row(named.get(n, n), arm, removed(arm)) for n, arm in strong.items() if not n.startswith("warm-up")]
    gap = {name: interval(arm["gap"]["average"], 3) for name, arm in large.items() if arm.get("gap")}
    rows += [row(name, arm, removed(arm), gap[name]) for name, arm in large.items() if name in gap]
    for name, said in (("parts", "no shift between them"), ("shifts", "a shift at each part")):
        for kind in ("repeated cosine", "infinite"):
            arm = arms(name)[f"{kind}, replay 5 %"]
            old, new, gap_ = (
                interval(each, 3) for each in (arm["change"]["old"], arm["change"]["new"], arm["gap"]["average"])
            )
            rows.append(f"| {said}: {kind}, 5 % replay | {old} | {new} | {gap_} |")
    return rows


def of_advice() -> list[str]:
    """What advice foretold, and what came."""

    def share(found: Found) -> str:
        return f"{found['value']:.1%} ({found['low']:.1%} to {found['high']:.1%})"

    named = {"products": "product reviews", "lower": "stories in lower case", "quiz": "quiz questions"}
    rows = []
    for case in [*read("advice")["cases"], *read("advice_low")["cases"]]:
        was, new, peak = case["measured"], case["new"]["new"], f"{case['peak']:.0e}".replace("e-0", "e-")
        cells = [named.get(case["corpus"], case["corpus"]), f"{case['bound']:.0%}", peak, f"{case['share']:.1%}"]
        cells += [
            share(case["rise"]["old"]),
            f"{was['rise']:.1%}",
            f"{case['old']['old']['value']:.3f} / {was['old']:.3f}",
        ]
        cells.append(f"{new['value']:.2f} ({new['low']:.2f} to {new['high']:.2f}) / {was['new']:.2f}")
        cells.append(f"{case['less']['rise']:.1%}")
        rows.append(f"| {' | '.join(cells)} |")
    return rows


PAGES: dict[str, tuple[str, Callable[[], list[str]]]] = {
    "levers": ("levers", levers),
    "fewer weights": ("fewer-weights", of_fewer),
    "updates' cost": ("fewer-weights", of_updates),
    "distillation": ("distillation", of_distillation),
    "restoring": ("distillation", of_restoring),
    "teachers' cost": ("distillation", of_teachers),
    "penalties": ("penalties", of_penalties),
    "advice": ("advice", of_advice),
    "paper": ("../examples/paper/README", of_paper),
    "probes": ("representations", lambda: of_probes("probe")),
    "frozen layers": ("representations", lambda: of_probes("frozen_layers")),
}


@pytest.mark.parametrize("name", PAGES)
def test_every_row_is_that_of_the_results(name: str) -> None:
    page, rows = PAGES[name]
    text = (ROOT / "docs" / f"{page}.md").read_text()
    missing = [row for row in rows() if row not in text]
    assert rows() and not missing


def test_a_figure_that_is_another_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    found = read("levers")
    found["arms"][3]["change"]["old"]["value"] += 0.001
    monkeypatch.setattr(
        f"{__name__}.read",
        lambda name: found if name == "levers" else json.loads((RESULTS / f"{name}.json").read_text()),
    )
    with pytest.raises(AssertionError):
        test_every_row_is_that_of_the_results("levers")


HELD = [
    "distillation",
    "distillation_speed",
    "few_shot",
    "fewer_weights",
    "frozen_layers",
    "layer_probe",
    "levers",
    "levers_2026",
    "levers_python",
]
HELD += ["penalties", "penalty_speed", "probe", "restore", "tuning_speed", "update_speed"]


@pytest.mark.parametrize("name", HELD)
def test_results_say_their_command_and_machine_and_how_often(name: str) -> None:
    found = read(name)
    said = found | found.get("setting", {}) | found.get("settings", {}) | found.get("options", {})
    assert said["repeat"].startswith(("python benchmarks/", "postgrad "))
    assert said["machine"]["cpu"] and said["machine"]["cores"]
    assert any(said.get(key) for key in ("seeds", "rounds", "repeats"))
