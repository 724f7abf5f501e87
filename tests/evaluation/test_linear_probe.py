"""Linear classifiers side by side: each is the one that scikit-learn would have found alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression, Ridge

from postgrad.data.problem_type import ProblemType
from postgrad.evaluation.linear_probe import (
    ProbeData,
    View,
    _Classifiers,
    _train_classifiers,
    main_metric,
    make_views,
    metric_inputs,
    train_probes,
)

STATES, WIDTH = 4, 6


def made(count: int, problem: str, seed: int, *, knows: int = 2) -> ProbeData:
    """Items whose labels are a noisy function of what one state says; the others are noise, of very different sizes."""
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(STATES, count, WIDTH)) * np.array([1, 10, 0.1, 3])[:, None, None] + 1
    seen = (states[knows] - 1) / [1, 10, 0.1, 3][knows]
    matrix = np.random.default_rng(99).normal(size=(WIDTH, 3)) * 2
    logits = seen @ matrix + 0.5 * rng.normal(size=(count, 3))
    meant: Any = {
        "class": lambda: logits.argmax(1),
        "tags": lambda: logits.argmax(1),
        "multi": lambda: (logits > 0).astype(np.float32),
        "number": lambda: (200 + 5 * logits[:, 0]).astype(np.float32),
    }[problem]()
    document = np.arange(count) if problem != "tags" else np.arange(count) // 5
    return ProbeData(states.astype(np.float32), meant, document)


def parts(problem: str) -> tuple[ProbeData, ProbeData, ProbeData]:
    return made(600, problem, 0), made(150, problem, 1), made(200, problem, 2)


@pytest.mark.parametrize("problem", ["class", "tags", "multi", "number"])
def test_the_state_that_knows_is_found(problem: str) -> None:
    outputs = 1 if problem == "number" else 3
    found = {p.view.name: p for p in train_probes(*parts(problem), problem, outputs, steps=300)}
    assert list(found) == [
        "embeddings",
        "layer 1",
        "layer 2",
        "layer 3",
        "sum of last 3",
        "concat of last 3",
        "mix of all",
    ]
    right = {}
    for name, one in found.items():
        said, meant, _ = metric_inputs(one, parts(problem)[2])
        right[name] = -((said - meant) ** 2).mean() if problem == "number" else (said == meant).mean()
    assert max(right, key=right.__getitem__) in ("layer 2", "concat of last 3", "mix of all")
    alone = {name: value for name, value in right.items() if name[0] in "el"}
    assert max(alone, key=alone.__getitem__) == "layer 2"
    assert right["layer 2"] - max(v for n, v in alone.items() if n != "layer 2") > (5 if problem == "number" else 0.1)
    shares = found["mix of all"].share_S
    assert sum(shares) == pytest.approx(1) and max(shares) == shares[2]


@pytest.mark.parametrize("strength", [1e-3, 1e-1])
def test_classifiers_are_those_of_scikit_learn(strength: float) -> None:
    """The mean loss and `strength / 2 |W|^2` is scikit-learn's objective at `C = 1 / (strength * items)`."""
    train, _, test = parts("class")
    views = make_views(STATES)
    ours = _train_classifiers(views, train, "class", 3, [strength], 1500, 3e-2, 0, lambda done, total: None)
    with torch.no_grad():
        said = torch.softmax(ours(torch.from_numpy(test.states_SID)), -1)[:, :, 0].numpy()
    theirs = LogisticRegression(C=1 / (strength * len(train)), max_iter=2000)

    def scaled(items: ProbeData, read: list[int], how: str) -> np.ndarray:
        here, base = items.states_SID[read], train.states_SID[read]
        if how == "sum":
            here, base = here.sum(0)[None], base.sum(0)[None]
        here = (here - base.mean(1, keepdims=True)) / base.std(1, keepdims=True)
        return np.concatenate(list(here), -1)

    for i, view in enumerate(views):
        if view.kind != "mix":
            theirs.fit(scaled(train, list(view.states), view.kind), train.labels)
            wanted = theirs.predict_proba(scaled(test, list(view.states), view.kind))
            assert np.abs(said[i] - wanted).mean() < 0.01, view.name
    assert np.abs(said[0] - said[2]).mean() > 0.1  # which is no wonder if all views say the same


def test_numbers_are_those_of_ridge_regression() -> None:
    train, dev, test = parts("number")
    view = View("layer 2", "state", (2,))
    (found,) = train_probes(train, dev, test, ProblemType.NUMBER, 1, views=[view], strengths=[1e-2], steps=1500)
    mean, size = train.states_SID[2].mean(0), train.states_SID[2].std(0)
    ridge = Ridge(alpha=1e-2 * len(train)).fit((train.states_SID[2] - mean) / size, train.labels)
    np.testing.assert_allclose(found.predictions, ridge.predict((test.states_SID[2] - mean) / size), atol=0.2)


def test_a_classifier_is_the_same_in_company_and_alone() -> None:
    """All are trained in a few tensors, and none touches another."""
    train, dev, test = parts("class")
    together = {p.view.name: p for p in train_probes(train, dev, test, ProblemType.CLASS, 3, steps=200)}
    for view in make_views(STATES):
        (alone,) = train_probes(train, dev, test, ProblemType.CLASS, 3, views=[view], steps=200)
        assert alone.strength == together[view.name].strength
        assert (alone.predictions == together[view.name].predictions).mean() > 0.99


def test_the_strength_is_chosen_on_dev_and_the_test_is_not_looked_at() -> None:
    train, dev, test = parts("class")
    turned = ProbeData(test.states_SID, (test.labels + 1) % 3, test.document_I)
    first, second = (train_probes(train, dev, t, ProblemType.CLASS, 3, steps=100) for t in (test, turned))
    assert [(p.strength, p.dev_score, p.predictions.tolist()) for p in first] == [
        (p.strength, p.dev_score, p.predictions.tolist()) for p in second
    ]


def test_the_strength_that_dev_likes_best_holds() -> None:
    train, _, test = parts("class")
    view = View("layer 1", "state", (1,))  # which knows nothing: a weak penalty learns by heart
    rng = np.random.default_rng(0)
    noise = ProbeData(train.states_SID[:, :30], rng.integers(3, size=30), np.arange(30))
    (heart,) = train_probes(noise, noise, test, ProblemType.CLASS, 3, views=[view], strengths=[1e-6, 10.0], steps=300)
    (fair,) = train_probes(noise, train, test, ProblemType.CLASS, 3, views=[view], strengths=[10.0, 10.1], steps=100)
    assert heart.strength == 1e-6 and heart.dev_score > 0.5
    assert fair.strength == 10.1  # the stronger of two that do equally well


def test_the_same_seed_gives_the_same_answers() -> None:
    train, dev, test = parts("tags")
    one, two = (train_probes(train, dev, test, ProblemType.TAGS, 3, steps=50) for _ in range(2))
    assert all(np.array_equal(a.predictions, b.predictions) for a, b in zip(one, two, strict=True))


def test_a_feature_that_never_varies_says_nothing() -> None:
    train, dev, test = parts("class")
    for items in (train, dev, test):
        items.states_SID[:, :, 0] = 7.0
    for one in train_probes(train, dev, test, ProblemType.CLASS, 3, steps=20):
        assert np.isfinite(one.dev_score)


def test_views_of_shallow_models() -> None:
    assert [v.name for v in make_views(2)] == ["embeddings", "layer 1", "mix of all"]
    assert [v.states for v in make_views(7)][-3:] == [(3, 4, 5, 6), (3, 4, 5, 6), tuple(range(7))]


def test_what_is_chosen_by() -> None:
    assert main_metric(ProblemType.TAGS, ("O", "B-x")) == ("span F1", 1)
    assert main_metric(ProblemType.TAGS, ("NOUN", "VERB")) == ("accuracy", 1)
    assert [main_metric(p, ()) for p in (ProblemType.CLASS, ProblemType.MULTI_LABEL, ProblemType.NUMBER)] == [
        ("accuracy", 1),
        ("F1", 1),
        ("MSE", -1),
    ]


def test_an_untrained_mix_reads_all_states_alike() -> None:
    train = made(20, "class", 0)
    (view,) = [v for v in make_views(STATES) if v.kind == "mix"]
    classifiers = _Classifiers([view], train, 3, [0.1, 0.2], number=False)
    assert classifiers.shares(view, 0) == pytest.approx(tuple(softmax(np.zeros(STATES))))
