"""How often a classifier is right: the numbers are scikit-learn's and scipy's, the intervals those of resampled documents."""

from __future__ import annotations

import time
import warnings
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from seqeval import metrics as seqeval
from sklearn import metrics

from postgrad.data.problem_type import ProblemType
from postgrad.evaluation import before_after
from postgrad.evaluation.before_after import loss_changes
from postgrad.evaluation.classification_metrics import (
    compare_metrics,
    compute_metrics,
    is_span_tagging,
    metric_values,
    span_counts,
)
from postgrad.evaluation.perplexity import Scores
from postgrad.lineage.record import SetChange, SetScore
from postgrad.reports.sections.held_out_tables import class_score_tables
from postgrad.stats import bootstrap


def drawn(problem: ProblemType, count: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is said and meant, of which document: mostly right; tags and several classes have many items a document."""
    rng = np.random.default_rng(seed)
    if problem == "number":
        meant = rng.normal(size=count)
        return meant + 0.5 * rng.normal(size=count), meant, np.arange(count)
    classes = 2 if problem == "multi" else 3
    meant = rng.integers(classes, size=count)
    said = np.where(rng.random(count) < 0.7, meant, rng.integers(classes, size=count))
    items = {"class": np.arange(count), "multi": np.arange(count) // 3, "tags": np.sort(rng.integers(12, size=count))}
    return said, meant, items[problem]


def by_hand(problem: ProblemType, said: np.ndarray, meant: np.ndarray) -> dict[str, float]:
    """From the definitions; scipy for correlations."""
    if problem == "number":
        return {
            "MSE": float(((said - meant) ** 2).mean()),
            "Pearson": float(stats.pearsonr(said, meant).statistic),
            "Spearman": float(stats.spearmanr(said, meant).statistic),
        }
    one = {}
    for label in set(said.tolist()) | set(meant.tolist()):
        hit = int(((said == label) & (meant == label)).sum())
        one[label] = 2 * hit / ((said == label).sum() + (meant == label).sum())
    found = {"accuracy": float((said == meant).mean())}
    # The correlation of the two indicator matrices (Gorodkin 2004).
    a, b = (np.eye(3)[labels] - np.eye(3)[labels].mean(0) for labels in (said, meant))
    found["MCC"] = float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))
    return found | ({"F1": one[1]} if problem == "multi" else {"macro F1": float(np.mean(list(one.values())))})


@pytest.mark.parametrize("problem", ProblemType)
@pytest.mark.parametrize("seed", range(3))
def test_values_are_those_of_the_definitions(problem: ProblemType, seed: int) -> None:
    said, meant, item = drawn(problem, seed=seed)
    found = compute_metrics(problem, said, meant, item)
    wanted = by_hand(problem, said, meant)
    assert {name: m["value"] for name, m in found.items()} == pytest.approx(wanted)
    # The mutants: something else is said, or the two are taken for one another where that matters.
    other = compute_metrics(problem, np.roll(said, 1), meant, item)
    assert all(other[name]["value"] != pytest.approx(wanted[name]) for name in wanted)


@pytest.mark.parametrize("problem", ProblemType)
def test_values_are_those_of_scikit_learn(problem: ProblemType) -> None:
    said, meant, item = drawn(problem)
    theirs = {
        "accuracy": lambda: metrics.accuracy_score(meant, said),
        "macro F1": lambda: metrics.f1_score(meant, said, average="macro"),
        "MCC": lambda: metrics.matthews_corrcoef(meant, said),
        "F1": lambda: metrics.f1_score(meant, said),
        "MSE": lambda: metrics.mean_squared_error(meant, said),
        "Pearson": lambda: stats.pearsonr(meant, said).statistic,
        "Spearman": lambda: stats.spearmanr(meant, said).statistic,
    }
    for name, found in compute_metrics(problem, said, meant, item).items():
        assert found["value"] == pytest.approx(float(theirs[name]()))


@pytest.mark.parametrize("problem", ProblemType)
def test_intervals_hold_their_value_and_are_the_same_each_time(problem: ProblemType) -> None:
    said, meant, item = drawn(problem)
    found = compute_metrics(problem, said, meant, item)
    for m in found.values():
        assert m["low"] < m["value"] < m["high"]
    again = compute_metrics(ProblemType.NUMBER if problem == "number" else ProblemType.TAGS, said, meant, item)
    assert all(found[name] == m for name, m in again.items() if name in found)
    more = {}
    for repeat in (1, 16):
        parts = [drawn(problem, seed=s) for s in range(repeat)]
        items = np.concatenate([part[2] + 1000 * s for s, part in enumerate(parts)])
        more[repeat] = compute_metrics(problem, *(np.concatenate([p[i] for p in parts]) for i in (0, 1)), items)
    for name in found:  # sixteen times the documents: a quarter of the width
        widths = [more[repeat][name]["high"] - more[repeat][name]["low"] for repeat in (1, 16)]
        assert 2 < widths[0] / widths[1] < 8


def test_documents_are_drawn_and_not_their_items() -> None:
    """A document's items are right or wrong together: as many documents, not as many items, decide how sure one is."""
    rng = np.random.default_rng(0)
    right = rng.random(40) < 0.6
    together = np.repeat(right, 25).astype(int)
    meant, item = np.ones(1000, int), np.repeat(np.arange(40), 25)
    wide = compute_metrics(ProblemType.TAGS, together, meant, item)["accuracy"]
    narrow = compute_metrics(ProblemType.TAGS, together, meant, np.arange(1000))["accuracy"]
    alone = compute_metrics(ProblemType.TAGS, right.astype(int), np.ones(40, int), np.arange(40))["accuracy"]
    assert wide == pytest.approx(alone)
    assert (wide["high"] - wide["low"]) / (narrow["high"] - narrow["low"]) == pytest.approx(5, rel=0.2)  # sqrt(25)


@given(st.integers(1, 30), st.sampled_from(list(ProblemType)), st.integers(0, 99))
@settings(max_examples=25)
def test_any_items_have_finite_metrics(count: int, problem: ProblemType, seed: int) -> None:
    """One class alone, one example alone, a draw without a class: a number, and never a warning."""
    said, meant, item = drawn(problem, count, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "DRAWS", 4)
        for answers in ((said, meant), (meant, meant), (np.zeros_like(said), np.zeros_like(meant))):
            for m in compute_metrics(problem, *answers, item).values():
                low, high = m["low"], m["high"]
                assert np.isfinite(m["value"])
                assert low is high is None if len(set(item.tolist())) < 2 else low is not None and low <= high


@pytest.mark.parametrize("problem", list(ProblemType))
def test_scores_of_a_classifier_tell_its_metrics(problem: ProblemType) -> None:
    said, meant, item = drawn(problem)
    rows = len(set(item.tolist()))
    scores = Scores(np.arange(rows), np.ones(rows), np.ones(rows, int), np.full(rows, 9), said, meant, item, problem)
    assert scores.summary()["metrics"] == compute_metrics(problem, said, meant, item)
    assert "metrics" not in Scores(np.arange(rows), np.ones(rows), np.ones(rows, int), np.full(rows, 9)).summary()


# -- against what drawing documents means, one draw after the other --------------------------------------------------------


@pytest.mark.parametrize("problem", ProblemType)
def test_intervals_are_those_of_documents_that_are_drawn_and_measured_anew(
    problem: ProblemType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "DRAWS", 20)
    said, meant, item = drawn(problem)
    of = [np.flatnonzero(item == document) for document in np.unique(item)]
    draws = np.random.default_rng(0).integers(len(of), size=(20, len(of)))
    values: dict[str, list[float]] = {}
    for draw in draws:
        items = np.concatenate([of[i] for i in draw])
        for name, value in by_hand(problem, said[items], meant[items]).items():
            values.setdefault(name, []).append(value)
    for name, found in compute_metrics(problem, said, meant, item).items():
        assert [found["low"], found["high"]] == pytest.approx(list(np.percentile(values[name], [2.5, 97.5])))


# -- spans -----------------------------------------------------------------------------------------------------------------

SCHEMES = {
    "BIO": ("O", "B-a", "I-a", "B-b", "I-b"),
    "IOB2": ("B-gene", "I-gene", "O"),
    "IOBES": ("O", "B-a", "I-a", "E-a", "S-a", "B-b", "I-b", "E-b", "S-b"),
}


def tag_sequences(names: tuple[str, ...], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tags that follow no grammar at all, said and meant, of documents of one to twelve words."""
    rng = np.random.default_rng(seed)
    item = np.repeat(np.arange(30), rng.integers(1, 13, size=30))
    meant = rng.integers(len(names), size=len(item))
    return np.where(rng.random(len(item)) < 0.8, meant, rng.integers(len(names), size=len(item))), meant, item


def as_lists(tags: np.ndarray, item: np.ndarray, names: tuple[str, ...]) -> list[list[str]]:
    return [[names[tag] for tag in tags[item == document]] for document in np.unique(item)]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("seed", range(5))
def test_spans_are_scored_as_seqeval_scores_them(scheme: str, seed: int) -> None:
    names = SCHEMES[scheme]
    said, meant, item = tag_sequences(names, seed)
    found = compute_metrics(ProblemType.TAGS, said, meant, item, names)
    lists = [as_lists(tags, item, names) for tags in (meant, said)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert found["span F1"]["value"] == pytest.approx(seqeval.f1_score(*lists))
        assert found["span precision"]["value"] == pytest.approx(seqeval.precision_score(*lists))
        assert found["span recall"]["value"] == pytest.approx(seqeval.recall_score(*lists))
        # The mutant: the words of all documents as one, so that spans run on from one to the next.
        one = [[[tag for words in tags for tag in words]] for tags in lists]
        assert seqeval.f1_score(*one) != pytest.approx(found["span F1"]["value"])


def test_the_interval_of_spans_is_that_of_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "DRAWS", 30)
    names = SCHEMES["BIO"]
    said, meant, item = tag_sequences(names, 0)
    lists = [as_lists(tags, item, names) for tags in (meant, said)]
    draws = np.random.default_rng(0).integers(30, size=(30, 30))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = [seqeval.f1_score(*([tags[i] for i in draw] for tags in lists)) for draw in draws]
    found = compute_metrics(ProblemType.TAGS, said, meant, item, names)["span F1"]
    assert [found["low"], found["high"]] == pytest.approx(list(np.percentile(values, [2.5, 97.5])))


def test_spans_are_counted_by_document_whatever_the_order_of_documents() -> None:
    names = ("O", "B-a", "I-a")
    meant = np.array([1, 2, 0, 1, 0, 1])
    said = np.array([1, 2, 0, 0, 1, 1])
    document = np.array([1, 1, 1, 1, 0, 0])
    assert span_counts(said, meant, document, names).tolist() == [[1, 2, 1], [1, 1, 2]]


def test_only_tags_that_mark_spans_have_spans() -> None:
    assert all(is_span_tagging(names) for names in SCHEMES.values())
    for names in (("NOUN", "VERB"), ("O",), ("O", "B-a", "X-a"), ("B", "I", "O"), ()):
        assert not is_span_tagging(names)
        if names:
            assert "span F1" not in compute_metrics(
                ProblemType.TAGS, np.zeros(3, int), np.zeros(3, int), np.arange(3), names
            )


def test_many_documents_are_measured_in_seconds() -> None:
    """Counts of documents, and not all of it for each draw."""
    names = SCHEMES["BIO"]
    rng = np.random.default_rng(0)
    meant, item = rng.integers(5, size=60_000), np.repeat(np.arange(3000), 20)
    said = np.where(rng.random(60_000) < 0.9, meant, 0)
    begun = time.perf_counter()
    found = compute_metrics(ProblemType.TAGS, said, meant, item, names)
    assert found["span F1"]["low"] < found["span F1"]["value"] < found["span F1"]["high"]
    assert time.perf_counter() - begun < 5


def test_a_comparison_draws_the_same_documents_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a document is worth to both cancels: one that is always right against one that errs on the same documents."""
    monkeypatch.setattr(bootstrap, "DRAWS", 100)
    said, meant, item = drawn(ProblemType.CLASS, 200)
    same = compare_metrics(ProblemType.CLASS, said, said, meant, item)
    assert all(value == 0 for found in same.values() for value in found.values())
    better = np.where(np.arange(200) < 20, meant, said)
    found = compare_metrics(ProblemType.CLASS, said, better, meant, item)["accuracy"]
    values = [compute_metrics(ProblemType.CLASS, s, meant, item)["accuracy"] for s in (said, better)]
    assert found["value"] == pytest.approx(values[1]["value"] - values[0]["value"])
    assert found["high"] - found["low"] < 0.7 * (values[0]["high"] - values[0]["low"])
    assert (
        metric_values(ProblemType.CLASS, said, meant, item)["MCC"]
        == compute_metrics(ProblemType.CLASS, said, meant, item)["MCC"]["value"]
    )


# --- verdicts, and class by class -------------------------------------------------------------------------------------


def classifier_scores(said: np.ndarray, meant: np.ndarray, problem: ProblemType, names: tuple[str, ...]) -> Scores:
    """Scores whose loss is lower the more is right."""
    nats, rows = np.where(said == meant, 0.1, 2.0).astype(float), np.arange(len(meant))
    ones, labels = np.ones(len(meant), int), np.array(names)
    return Scores(rows, nats, ones, ones, said, meant, rows, problem, labels)


NAMES = {ProblemType.CLASS: ("no", "yes"), ProblemType.TAGS: ("odd", "even"), ProblemType.MULTI_LABEL: ("any",)}


def change_of(problem: ProblemType, before: np.ndarray, after: np.ndarray, meant: np.ndarray) -> SetChange:
    names = NAMES.get(problem, ())
    sides = [classifier_scores(said, meant, problem, names) for said in (before, after)]
    (change,) = loss_changes([NamedSet("set")], {"set": sides[0]}, {"set": sides[1]}, 100).values()
    return change


class NamedSet(NamedTuple):
    name: str
    role: str = "learned"
    identity: tuple[str, ...] = ()


@pytest.mark.parametrize("problem", ProblemType)
def test_the_same_answer_to_everything_is_not_learnt(problem: ProblemType, monkeypatch: pytest.MonkeyPatch) -> None:
    meant = (np.random.default_rng(0).random(100) < 0.8).astype(float if problem == ProblemType.NUMBER else int)
    constant = np.full_like(meant, 0.8 if problem == ProblemType.NUMBER else 1)
    wrong = np.zeros_like(meant)
    dull, bright = change_of(problem, wrong, constant, meant), change_of(problem, wrong, meant, meant)
    assert dull.high is not None and (dull.high < -0.5 or problem == ProblemType.NUMBER)
    assert dull.verdict == "kept" and dull.metric_change is not None
    assert [dull.metric_change.difference, dull.metric_change.low] == pytest.approx([0, 0], abs=1e-9)
    assert bright.verdict == "learnt" and change_of(problem, meant, constant, meant).verdict == "forgot"
    # The mutants: the verdict of the loss, and that of a metric that rewards what is frequent.
    nothing = (None, None)
    if problem != ProblemType.NUMBER:
        with monkeypatch.context() as patched:
            patched.setattr(before_after, "chance_corrected_change", lambda *_: nothing)
            assert change_of(problem, wrong, constant, meant).verdict == "learnt"
        monkeypatch.setattr(before_after, "chance_corrected_metric", lambda *_: "accuracy")
        assert change_of(problem, wrong, constant, meant).verdict == "learnt"


@pytest.mark.parametrize("problem", [ProblemType.CLASS, ProblemType.TAGS, ProblemType.MULTI_LABEL])
def test_classes_are_those_of_scikit_learn(problem: ProblemType) -> None:
    rng, names = np.random.default_rng(3), ("a", "b", "c", "never")
    if problem == ProblemType.MULTI_LABEL:
        meant, said = (rng.random((2, 50, 4)) < [0.5, 0.2, 0.7, 0]).astype(int)
    else:
        meant, said = rng.integers(0, 3, (2, 50))
        said[:5] = 3
    wanted = metrics.precision_recall_fscore_support(meant, said, labels=range(4), zero_division=0)
    scores = classifier_scores(said.ravel(), meant.ravel(), problem, names)
    summary = scores.summary()
    found = [[each[key] for each in summary["classes"]] for key in ("precision", "recall", "f1", "support")]
    assert np.array(found) == pytest.approx(np.array(wanted))
    assert np.array(found) != pytest.approx(np.array(wanted)[[1, 0, 2, 3]])  # the mutant: the two are swapped
    if problem != ProblemType.MULTI_LABEL:
        matrix = metrics.confusion_matrix(meant, said, labels=range(4))
        assert summary["confusion"] == matrix.tolist() != matrix.T.tolist()
        one, *_, last = class_score_tables("set", SetScore.model_validate(summary), None, 20)
        assert all(name in one.text() and name in last.html() for name in names)
        assert len(class_score_tables("set", SetScore.model_validate(summary), None, 2)) == 1  # no part of a matrix


def test_a_prediction_without_a_name_has_a_class() -> None:
    summary = classifier_scores(np.array([0, 4]), np.array([0, 1]), ProblemType.CLASS, ("a", "b")).summary()
    assert [each["name"] for each in summary["classes"]] == ["a", "b", "class 2", "class 3", "class 4"]


@pytest.mark.parametrize("problem", ProblemType)
def test_one_document_has_no_interval(problem: ProblemType) -> None:
    """Also where it has many items: they rise and fall together."""
    said, meant, _ = drawn(problem)
    found = compute_metrics(problem, said, meant, np.zeros(len(said), int))
    assert found and all(metric["low"] is metric["high"] is None for metric in found.values())
    change = compare_metrics(problem, said, meant, meant, np.zeros(len(said), int))
    assert all(metric["low"] is None for metric in change.values())
