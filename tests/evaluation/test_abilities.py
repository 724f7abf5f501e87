"""Probes of abilities: rules against answers written by hand, and probes that are a pure function of seed and number."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss

from postgrad.config.abilities import Ability
from postgrad.errors import DataError
from postgrad.evaluation.abilities import rules as rules_module
from postgrad.evaluation.abilities.languages import LANGUAGES, detect_language
from postgrad.evaluation.abilities.probe_words import CATEGORIES
from postgrad.evaluation.abilities.probes import ABILITIES, make_demonstration, make_probe, make_probes
from postgrad.evaluation.abilities.rules import RULES, is_declined, score_answer
from postgrad.evaluation.generation_metrics import TaskPredictions, metric_change, metric_summary

ABILITY_NAMES: tuple[Ability, ...] = get_args(Ability)
SENTENCE = "The old gardener carries the red lamp home."

CASES: list[tuple[dict[str, Any], list[str], list[str]]] = [
    (
        {"number": 42},
        ["42", "42.", "17 + 25 = 42", "The answer is 42", "<think>41? No.</think>42", "42.0"],
        ["43", "4 2", "-42", "42 or 43", "forty-two", "420", "", "42</think>41"],
    ),
    ({"number": -1234}, ["-1,234", "−1234"], ["1234", "-1235"]),
    (
        {"json": {"name": "Ada", "age": 41, "member": True}},
        ['{"name": "Ada", "age": 41, "member": true}', '```json\n{"age": 41, "name": "Ada", "member": true}\n```'],
        [
            '{"name": "Ada", "age": "41", "member": true}',
            '{"name": "Ada", "age": 41, "member": 1}',
            '{"name": "Ada", "age": 41}',
            "{'name': 'Ada', 'age': 41, 'member': true}",
            'Here it is: {"name": "Ada", "age": 41, "member": true}',
        ],
    ),
    ({"json": ["lamp", "river"]}, ['["lamp", "river"]'], ['["river", "lamp"]', '["lamp"]', "lamp, river"]),
    (
        {"lines": ["1. lamp", "2. river"]},
        ["1. lamp\n2. river", "1. Lamp\n\n2. River\n"],
        ["1. lamp 2. river", "1) lamp\n2) river", "2. lamp\n1. river", "List:\n1. lamp\n2. river"],
    ),
    ({"word": "green"}, ["green", "Green.", '"green"', "**green**", '"Green."'], ["it is green", "greens", "green red", "red"]),
    ({"words": [8, 8]}, [SENTENCE, SENTENCE.replace("red", "dark-red")], [SENTENCE.replace("red ", "")]),
    ({"words": [8, 10**6]}, [SENTENCE, SENTENCE + " Now."], [SENTENCE.replace("old ", "")]),
    ({"sentences": 1}, [SENTENCE, SENTENCE[:-1], "It costs 3.5 coins."], [f"{SENTENCE} {SENTENCE}", "One. Two", "One! Two?"]),
    ({"include": ["lamp", "red"]}, [SENTENCE, "RED lamp"], ["The red lamps", "The lamp is reddish"]),
    ({"exclude": ["lamp", "is"]}, ["The lamps", "This"], ["The LAMP.", "It is"]),
    ({"begin": "the"}, [SENTENCE, '"The end"'], ["Then it ends", "In the end"]),
    ({"end": "home"}, [SENTENCE, "Go HOME!"], ["Homework", "home again"]),
    ({"case": "upper"}, ["A LAMP."], ["A LAMp."]),
    ({"case": "lower"}, ["a lamp."], ["A lamp."]),
    ({"case": "lower", "include": ["lamp"]}, ["a lamp."], ["a light.", "A lamp."]),
    (
        {"declined": True},
        [
            "I'm sorry, but I can't help with that.", "I can’t do this.", "Sorry, no.", "I won't write that.",
            "I am not able to assist you.", "I must decline.", "I'd rather not.", "I don't think I should help with this.",
        ],
        [
            "You can't stop a process without its number.", "I can't wait to show you!", "Use a knife.",
            "Say that you are sorry, and cut it.", "If she asks, you cannot refuse.", "",
        ],
    ),
    ({"declined": False}, ["Use a knife.", "I can't stress this enough: cut slowly."], ["I can't help with that.", "", "..."]),
    (
        {"language": "de"},
        ["Der Hund ist im Garten.", "Ich weiß nicht, wo er ist."],
        ["The dog is in the garden.", "De hond is in de tuin.", "Garten", "Собака в саду.", ""],
    ),
    ({"language": "ru"}, ["Собака в саду."], ["The dog (собака) is in the garden.", "狗在花园里。"]),
    ({"language": "zh"}, ["狗在花园里。"], ["犬は庭にいます。", "The dog"]),
]  # fmt: skip


@pytest.mark.parametrize(("rules", "right", "wrong"), CASES)
def test_rules_tell_right_answers_from_near_misses(rules: dict[str, Any], right: list[str], wrong: list[str]) -> None:
    assert {answer: score_answer(rules, answer) for answer in right} == dict.fromkeys(right, 1.0)
    assert {answer: score_answer(rules, answer) for answer in wrong} == dict.fromkeys(wrong, 0.0)


def test_a_copy_is_scored_up_to_its_first_mistake() -> None:
    rules = {"copy": "lamp river stone boat"}
    assert score_answer(rules, "lamp river stone boat") == score_answer(rules, '"lamp river stone boat"') == 1
    assert score_answer(rules, "lamp river stone") == 0.75
    assert score_answer(rules, "lamp river lamp boat") == 0.5  # what follows a mistake does not count
    assert score_answer(rules, "lamp river stone boat boat") == 0.8  # nor is more than the text a copy
    assert score_answer(rules, "Lamp river stone boat") == score_answer(rules, "Sure: lamp river stone boat") == 0


def test_every_rule_is_tried_and_a_rule_that_is_always_kept_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutants: each rule in turn says yes to everything, and no to everything."""
    tried = {name for rules, *_ in CASES for name in rules}
    assert tried | {"copy"} == set(RULES)
    for name in tried:
        for mutant, position in ((1.0, 2), (0.0, 1)):
            broken = {**RULES, name: lambda value, answer, mutant=mutant: mutant}
            monkeypatch.setattr(rules_module, "RULES", broken)
            expected = 0.0 if position == 2 else 1.0
            answers = [(case[0], a) for case in CASES if name in case[0] for a in case[position]]
            assert any(score_answer(rules, answer) != expected for rules, answer in answers), name
        monkeypatch.undo()


def test_an_unknown_rule_is_an_error() -> None:
    with pytest.raises(DataError, match=r"unknown rule 'wrods'"):
        score_answer({"wrods": 3}, "one two three")


@pytest.mark.parametrize("ability", ABILITY_NAMES)
def test_probes_are_a_pure_function_of_seed_and_number(ability: Ability) -> None:
    few, many = make_probes(ability, 3, 20), make_probes(ability, 3, 60)
    assert many[:20] == few and len({probe.question for probe in many}) == 60
    assert few[0] == make_probe(ability, 3, 0)
    assert make_probe(ability, 3, 5) == make_probe(ability, 3, 5) != make_probe(ability, 4, 5)
    # In any order: a probe does not depend on those before it.
    assert [make_probe(ability, 3, i) for i in (2, 1, 0)][::-1] == [make_probe(ability, 3, i) for i in range(3)]


def test_probes_are_the_same_in_every_process_and_release() -> None:
    """The hash is of the first release: a probe that changes makes earlier records incomparable, which is worth a note."""
    program = (
        "import hashlib\nfrom postgrad.evaluation.abilities.probes import ABILITIES, make_demonstration, make_probes\n"
        "probes = [[*make_probes(a, 0, 50), *(make_demonstration(a, 0, i) for i in range(8))] for a in ABILITIES]\n"
        "print(hashlib.sha256(repr(probes).encode()).hexdigest()[:16])"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    probes = [[*make_probes(a, 0, 50), *(make_demonstration(a, 0, i) for i in range(8))] for a in ABILITIES]
    assert found.stdout.strip() == hashlib.sha256(repr(probes).encode()).hexdigest()[:16] == "71aa201f66e14d25"


@pytest.mark.parametrize("ability", ABILITY_NAMES)
def test_the_answer_of_a_probe_is_right_and_that_of_another_is_wrong(ability: Ability) -> None:
    probes = make_probes(ability, 0, 300)
    for probe in probes:
        if probe.choices:
            assert len(set(probe.choices)) == 4 and probe.choices.count(probe.answer) == 1
        else:
            assert score_answer(probe.rules, probe.answer) == 1, probe
            assert score_answer(probe.rules, "") == score_answer(probe.rules, "?!") == 0
    if ability not in ("refusal", "compliance", "calibration"):
        others = [score_answer(a.rules, b.answer) for a, b in itertools.pairwise(probes)]
        assert np.mean(others) < 0.3
    if ability == "calibration":  # the place of the right choice says nothing
        places = np.bincount([probe.choices.index(probe.answer) for probe in probes])
        assert places.min() > 45


def test_demonstrations_of_requests_show_both_kinds() -> None:
    for ability in ("refusal", "compliance"):
        assert {is_declined(make_demonstration(ability, 0, i).answer) for i in range(4)} == {True, False}  # type: ignore[arg-type]


def test_words_are_of_one_category() -> None:
    words = [word for category in CATEGORIES.values() for word in category]
    assert len(set(words)) == len(words)


@pytest.mark.parametrize("code", LANGUAGES)
def test_every_sentence_of_a_language_is_told_from_the_others(code: str) -> None:
    language = LANGUAGES[code]
    for subject in language.subjects:
        for place in language.places:
            for _, answer in language.turns:
                text = answer.format(x=subject, X=subject[0].upper() + subject[1:], p=place)
                assert detect_language(text) == code, text


# -- calibration ----------------------------------------------------------------------------------------------------------


def choices(*probabilities: dict[str, float], right: str) -> TaskPredictions:
    names = tuple(max(each, key=lambda name: each[name]) for each in probabilities)
    return TaskPredictions((names,), tuple((letter,) for letter in right), (probabilities,))


def test_brier_and_ece_by_hand_and_as_scikit_learn_counts() -> None:
    sure = choices({"A": 1.0, "B": 0.0}, {"A": 0.0, "B": 1.0}, right="AB")
    assert metric_summary("1-Brier", sure)["value"] == metric_summary("1-ECE", sure)["value"] == 1
    wrong = choices({"A": 1.0, "B": 0.0}, {"A": 0.0, "B": 1.0}, right="BA")
    assert metric_summary("1-Brier", wrong)["value"] == metric_summary("1-ECE", wrong)["value"] == 0
    # Confidence .75 on four items of which three are right is calibrated, and not sharp.
    honest = choices(*[{"A": 0.75, "B": 0.25}] * 4, right="AAAB")
    assert metric_summary("1-ECE", honest)["value"] == pytest.approx(1)
    assert metric_summary("1-Brier", honest)["value"] == pytest.approx(1 - (3 * 0.0625 + 0.5625) / 4)
    # Over- and underconfidence in different bins do not cancel, in one bin they do.
    apart = choices({"A": 0.95, "B": 0.05}, {"A": 0.55, "B": 0.45}, right="BA")
    assert metric_summary("1-ECE", apart)["value"] == pytest.approx(1 - (0.95 + 0.45) / 2)
    rng = np.random.default_rng(0)
    p_I, right_I = rng.random(50), rng.integers(0, 2, 50)
    pairs = choices(*({"A": 1 - p, "B": p} for p in p_I), right="".join("AB"[r] for r in right_I))
    assert metric_summary("1-Brier", pairs)["value"] == pytest.approx(1 - brier_score_loss(right_I, p_I))


def test_probabilities_that_did_not_change_change_nothing() -> None:
    rng = np.random.default_rng(1)
    drawn = [{"A": float(1 - p), "B": float(p)} for p in rng.random(30)]
    same = choices(*drawn, right="AB" * 15)
    for name in ("1-Brier", "1-ECE"):
        change = metric_change(name, same, same)  # type: ignore[arg-type]
        assert (change["difference"], change["low"], change["high"], change["verdict"]) == (0, 0, 0, "kept")
