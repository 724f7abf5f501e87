"""Do arms take turns fairly, and does every benchmark say how its results were made?"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(FOLDER))

import arms  # noqa: E402

SCRIPTS = [path.name for path in FOLDER.glob("*.py") if '"--json"' in path.read_text() and path.name != "runs.py"]


Made = Callable[[dict[str, Callable[[], None]], int, int], Iterable[object]]


def held(made: Made) -> None:
    """Three arms are each asked once a round, and the order of a round is that before it turned around."""
    asked: list[str] = []
    list(made({name: partial(asked.append, name) for name in "abc"}, 3, 1))
    rounds = [asked[i : i + 3] for i in range(0, len(asked), 3)]
    assert len(rounds) == 4 and all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert all(before == after[::-1] for before, after in pairwise(rounds))


def test_every_round_asks_every_arm_and_the_order_turns_around() -> None:
    held(arms.run_rounds)

    def always_the_same(each: dict[str, Callable[[], None]], rounds: int, warm: int) -> Iterable[object]:
        return ([ask() for ask in each.values()] for _ in range(rounds + warm))

    with pytest.raises(AssertionError):
        held(always_the_same)


def test_warm_rounds_are_asked_and_not_told() -> None:
    seconds = iter([100.0, 2.0, 3.0, 4.0])
    told = list(arms.run_rounds({"arm": lambda: next(seconds)}, rounds=3, warm=1))
    assert told == [{"arm": 2.0}, {"arm": 3.0}, {"arm": 4.0}]
    assert arms.median_and_range(each["arm"] for each in told) == [3.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("/home/me/models/small", "small"),
        ("code=/home/me/code.jsonl", "code=code.jsonl"),
        ("--json=/home/me/found.json", "--json=found.json"),
        ("sentence-transformers/all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"),
        ("../../me/data.jsonl", "data.jsonl"),
        ("15%,30%", "15%,30%"),
        ("lora=0.001,0.003", "lora=0.001,0.003"),
    ],
)
def test_a_word_of_a_command_loses_folders_and_nothing_else(word: str, said: str) -> None:
    assert arms.strip_folders(word) == said


def test_the_command_is_the_one_that_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/home/me/speed.py", "--new", "a=/b/c d.jsonl", "--rounds", "0", "--compile"])
    said = arms.provenance("numpy")
    assert said["repeat"] == "python benchmarks/speed.py --new 'a=c d.jsonl' --rounds 0 --compile"
    assert said["machine"]["cpu"] and said["machine"]["cores"] and {"torch", "numpy"} <= set(said["versions"])


def test_nothing_heavy_is_there_before_an_arm_begins() -> None:
    code = "import sys, arms; print(*{'torch', 'numpy', 'transformers', 'postgrad'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_file_of_results_says_how_it_was_made(script: str) -> None:
    assert "provenance(" in (FOLDER / script).read_text()
