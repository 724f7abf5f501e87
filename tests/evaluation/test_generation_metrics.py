"""Metrics of answers: the reference implementations' numbers, hand cases, and intervals that are those of resampled items."""

from __future__ import annotations

import random

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats
from sklearn import metrics as sklearn

from postgrad.evaluation import generation_metrics
from postgrad.evaluation.generation_metrics import (
    METRICS,
    MetricName,
    TaskPredictions,
    final_number,
    joint_change,
    metric_change,
    metric_summary,
    metric_verdict,
    normalize_answer,
    numeric_match,
    token_f1,
)


def once(said: list[str], references: list[list[str]]) -> TaskPredictions:
    return TaskPredictions((tuple(said),), tuple(map(tuple, references)))


def value(name: MetricName, said: list[str], references: list[list[str]]) -> float:
    return metric_summary(name, once(said, references))["value"]


# -- one answer -----------------------------------------------------------------------------------------------------------


def test_squads_normalisation() -> None:
    assert normalize_answer(" The  Cat's, an (old) one. ") == "cats old one"
    assert value("exact-match", ["the cat!"], [["A Cat"]]) == 1
    assert value("exact-match", ["the cats"], [["A Cat"]]) == 0


def test_f1_by_hand() -> None:
    # Of 3 words said and 4 meant, 2 are common: 2 * 2 / 7.
    assert token_f1("red big dog", "a big red old cat") == pytest.approx(4 / 7)
    assert token_f1("dog dog", "dog") == pytest.approx(2 / 3)
    assert token_f1("", "a") == 1 and token_f1("", "dog") == 0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("it is 3 or 4.", 4), ("she has $1,234.50", 1234.5), ("2 + 3\n#### 5 apples of 7", 5), ("none", None),
        ("-7", -7), ("#### 70,000", 70000), ("so 3.", 3), ("1e3", 1000), ("####", None), (".5", 0.5),
    ],
)  # fmt: skip
def test_the_number_that_ends_an_answer(text: str, number: float | None) -> None:
    assert final_number(text) == number


def test_numbers_match_by_value() -> None:
    assert numeric_match("so it is 1,000.0", "he has 3 ...\n#### 1000") == 1
    assert numeric_match("so it is 1,001", "#### 1000") == 0
    assert numeric_match("no idea", "also none") == 0


def test_of_several_references_the_best_counts() -> None:
    assert value("F1", ["big dog"], [["cat", "a big dog", "dog"]]) == 1
    assert value("exact-match", ["dog", "cow"], [["cat", "dog"], ["ox", "bull"]]) == 0.5
    assert value("ROUGE-L", ["big dog"], [["cat", "big dog"]]) == 1


# -- reference implementations -----------------------------------------------------------------------------------------

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "rain",
    "fell",
    "and",
    "dogs",
    "ran",
    "far",
    "away",
    "from",
    "home",
    ".",
]


def texts(count: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(3, 12))) for _ in range(count)]


@pytest.mark.parametrize("name", ["BLEU", "chrF"])
def test_corpus_metrics_are_sacrebleus(name: MetricName) -> None:
    said, first, second = texts(40, 0), texts(40, 1), texts(40, 2)
    references = [[a, b] if i % 3 else [a] for i, (a, b) in enumerate(zip(first, second, strict=True))]
    streams = [first, [those[1] if len(those) > 1 else None for those in references]]
    theirs = (sacrebleu.corpus_bleu if name == "BLEU" else sacrebleu.corpus_chrf)(said, streams)  # type: ignore[arg-type]
    assert value(name, said, references) == pytest.approx(theirs.score, abs=1e-9)
    # It is of the whole corpus: the mean of sentences is another number.
    alone = [value(name, [a], [b]) for a, b in zip(said, references, strict=True)]
    assert abs(float(np.mean(alone)) - theirs.score) > 0.1


@pytest.mark.parametrize(("name", "theirs"), [("ROUGE-1", "rouge1"), ("ROUGE-2", "rouge2"), ("ROUGE-L", "rougeL")])
def test_rouge_is_rouge_scores(name: MetricName, theirs: str) -> None:
    said, meant = texts(20, 3), texts(20, 4)
    scorer = RougeScorer([theirs], use_stemmer=True)
    expected = np.mean([scorer.score(b, a)[theirs].fmeasure for a, b in zip(said, meant, strict=True)])
    assert value(name, said, [[b] for b in meant]) == pytest.approx(expected)
    # Two words of four, of which one pair in a row: by hand.
    assert value("ROUGE-1", ["big red dog"], [["big red cat"]]) == pytest.approx(2 / 3)
    assert value("ROUGE-2", ["big red dog"], [["big red cat"]]) == pytest.approx(1 / 2)


def test_labels_as_scikit_learn_counts_them() -> None:
    generator = random.Random(0)
    meant = generator.choices(["a", "b", "c"], k=60)
    said = [label if generator.random() < 0.6 else generator.choice("abcd") for label in meant]
    references = [[label] for label in meant]
    assert value("accuracy", said, references) == pytest.approx(sklearn.accuracy_score(meant, said))
    assert value("macro-F1", said, references) == pytest.approx(
        sklearn.f1_score(meant, said, average="macro", zero_division=0)
    )
    assert value("MCC", said, references) == pytest.approx(sklearn.matthews_corrcoef(meant, said))
    assert value("MCC", ["a"] * 60, references) == 0


def test_correlations_as_scipy_has_them() -> None:
    generator = np.random.default_rng(0)
    meant = generator.integers(0, 25, 50) / 5 + 1e6
    said = np.round(meant + generator.normal(size=50), 1)
    pair = [f"{x}" for x in said], [[f"{x:.1f}"] for x in meant]
    assert value("Pearson", *pair) == pytest.approx(stats.pearsonr(said, meant)[0], rel=1e-6)
    assert value("Spearman", *pair) == pytest.approx(stats.spearmanr(said, meant)[0])
    assert value("Pearson", ["3.0"] * 50, pair[1]) == 0
    # What is no number counts as -1, as in T5's evaluation.
    assert value("Pearson", ["none", "2", "3"], [["0.5"], ["2"], ["3"]]) == pytest.approx(
        stats.pearsonr([-1, 2, 3], [0.5, 2, 3])[0]
    )


# -- intervals ------------------------------------------------------------------------------------------------------------


def test_an_interval_is_of_resampled_items() -> None:
    said = ["yes"] * 60 + ["no"] * 40
    found = metric_summary("accuracy", once(said, [["yes"]] * 100))
    # The binomial's standard error is 0.049: about 0.6 - 0.096 to 0.6 + 0.096.
    assert found["value"] == pytest.approx(0.6)
    assert found["low"] == pytest.approx(0.504, abs=0.02) and found["high"] == pytest.approx(0.696, abs=0.02)
    assert metric_summary("accuracy", once(said[:1], [["yes"]])) == {
        "value": 1.0, "low": None, "high": None, "seeds": [1.0], "spread": None,
    }  # fmt: skip


def test_a_change_is_paired() -> None:
    """Answers of chance level of which one more is right: the same items cancel."""
    generator = random.Random(0)
    before = generator.choices(["yes", "no"], k=200)
    worse = [i for i, answer in enumerate(before) if answer == "no"][:20]
    after = ["yes" if i in worse else answer for i, answer in enumerate(before)]
    references = [["yes"]] * 200
    found = metric_change("accuracy", once(before, references), once(after, references))
    assert found["difference"] == pytest.approx(0.1)
    assert 0.05 < found["low"] < 0.1 < found["high"] < 0.15 and found["verdict"] == "learnt"
    same = metric_change("accuracy", once(before, references), once(before, references))
    assert (same["difference"], same["low"], same["high"], same["verdict"]) == (0, 0, 0, "kept")
    back = metric_change("accuracy", once(after, references), once(before, references))
    assert back["verdict"] == "forgot" and back["low"] == pytest.approx(-found["high"])


def test_unpaired_draws_would_be_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: each side is drawn by itself, so that the interval of no change is no point."""
    seeds = iter(range(10**6))
    paired = generation_metrics._resampled_means
    monkeypatch.setattr(
        generation_metrics, "_resampled_means", lambda metric, p, seed=0: paired(metric, p, next(seeds))
    )
    answers = once(["yes", "no"] * 50, [["yes"]] * 100)
    found = metric_change("accuracy", answers, answers)
    assert found["low"] < 0 < found["high"]


def test_seeds_are_averaged_and_their_spread_is_told() -> None:
    said = (("yes", "no", "yes", "yes"), ("yes", "no", "no", "no"))
    found = metric_summary("accuracy", TaskPredictions(said, (("yes",),) * 4))
    assert found["seeds"] == [0.75, 0.25] and found["value"] == 0.5
    assert found["spread"] == pytest.approx(np.std([0.75, 0.25], ddof=1))
    # Items are resampled, not answers: both seeds of an item are drawn together.
    alike = metric_summary("accuracy", TaskPredictions((said[0], said[0]), (("yes",),) * 4))
    alone = metric_summary("accuracy", TaskPredictions((said[0],), (("yes",),) * 4))
    assert (alike["low"], alike["high"], alike["spread"]) == (alone["low"], alone["high"], 0)


def test_several_tasks_are_one_mean_and_a_narrower_interval() -> None:
    generator = random.Random(1)
    tasks = []
    for _ in range(4):
        before = once(generator.choices(["yes", "no"], k=50), [["yes"]] * 50)
        after = once(generator.choices(["yes", "no"], k=50), [["yes"]] * 50)
        tasks.append(("accuracy", before, after))
    found = joint_change(tasks)  # type: ignore[arg-type]
    alone = [metric_change(*task) for task in tasks]  # type: ignore[arg-type]
    assert found["difference"] == pytest.approx(np.mean([a["difference"] for a in alone]))
    assert found["high"] - found["low"] < 0.7 * min(a["high"] - a["low"] for a in alone)


def test_a_verdict_is_on_the_metrics_own_scale() -> None:
    assert metric_verdict("accuracy", -0.02, 0.02) == "no evidence" and metric_verdict("BLEU", -0.02, 0.02) == "kept"
    assert metric_verdict("BLEU", 0.5, 3) == "learnt" and metric_verdict("chrF", -3, -2) == "forgot"


@pytest.mark.parametrize("name", [n for n in METRICS if n not in ("1-Brier", "1-ECE", "correct")])
def test_every_metric_is_right_about_right_answers(name: MetricName) -> None:
    answers = ["1.5 red dogs ran far", "2.5 big cats sat down", "3.5 old cows ran off", "4.5 new birds sat up"]
    found = metric_summary(name, once(answers, [[a] for a in answers]))
    scale = METRICS[name].scale
    assert found["value"] == pytest.approx(scale)
    worse = metric_summary(name, once([*answers[1:], answers[0]], [[a] for a in answers]))
    assert worse["value"] < 0.9 * scale
    assert worse["low"] <= worse["value"] + 1e-9 and worse["value"] <= worse["high"] + 1e-9
