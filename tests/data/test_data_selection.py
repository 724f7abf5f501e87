"""Are the documents kept those that the formulas keep? Weights by hand, resampling by its law, bands by quantiles."""

from __future__ import annotations

import random
import re
import zlib
from collections import Counter
from itertools import pairwise
from math import log

import numpy as np
import pytest

from postgrad.data.filter.data_selection import (
    MIN_WORDS,
    find_near_duplicates,
    importance_weights,
    resample,
    select_band,
    share_to_count,
    target_counts,
)
from postgrad.data.filter.ngrams import FEATURE_COUNT, hash_ngrams
from postgrad.data.words import split_words_and_signs
from postgrad.errors import DataError

LAWYERS = ["Court", "appeal", "statute", "judge", "the", "of", "and", "plaintiff", "verdict", "."]
COOKS = ["butter", "oven", "flour", "stir", "the", "of", "and", "sugar", "bowl", "."]


def texts(words: list[str], count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(words, k=rng.randint(5, 60))) for _ in range(count)]


LIKE, LAW, FOOD = texts(LAWYERS, 60, 0), texts(LAWYERS, 30, 1), texts(COOKS, 90, 2)


def grams(text: str, *, pairs: bool = True) -> list[int]:
    """The buckets of a text, written out: every word, every two words with a space between them."""
    words = re.findall(r"\w+|[^\w\s]+", text.lower())
    both = [f"{a} {b}" for a, b in pairwise(words)] if pairs else []
    return [zlib.crc32(gram.encode()) % 10_000 for gram in [*words, *both]]


def plainly(raw: list[str], target: list[str], *, pairs: bool = True) -> list[float]:
    """Equations 2 and 3 of Xie et al. (2023), one gram at a time: sum over the grams of log p - log q, counts plus one."""
    p = Counter(g for text in target for g in grams(text, pairs=pairs))
    q = Counter(g for text in raw for g in grams(text, pairs=pairs))
    totals = sum(p.values()) + 10_000, sum(q.values()) + 10_000
    return [
        sum(log((p[g] + 1) / totals[0]) - log((q[g] + 1) / totals[1]) for g in grams(text, pairs=pairs)) for text in raw
    ]


def test_buckets_are_those_of_words_and_pairs() -> None:
    text = "Über 3 cats -- they're out, they're in ...\nnew line"
    assert sorted(hash_ngrams(split_words_and_signs(text)).tolist()) == sorted(grams(text))
    assert hash_ngrams([]).size == 0 and FEATURE_COUNT == 10_000


def test_weights_are_the_formula() -> None:
    raw = [*LAW, *FOOD, "", "!"]
    found = importance_weights(raw, target_counts(LIKE, "like"))
    assert found.log_weights_N == pytest.approx(plainly(raw, LIKE), rel=1e-9)
    assert found.ngram_count_N.tolist() == [len(grams(text)) for text in raw]
    assert found.log_weights_N[-2] == 0.0  # nothing says nothing
    sizes = [max(1, len(grams(text))) for text in raw]
    assert found.nats_per_ngram_N == pytest.approx(np.array(plainly(raw, LIKE)) / sizes, rel=1e-9)
    # Mutants: without pairs of words, or with the roles of the two texts changed, it is another number.
    assert found.log_weights_N != pytest.approx(plainly(raw, LIKE, pairs=False), rel=1e-3)
    assert found.log_weights_N != pytest.approx(plainly(raw, FOOD), rel=1e-3)


def test_what_is_like_the_target_is_kept_in_its_order() -> None:
    order = list(range(120))
    random.Random(3).shuffle(order)
    raw = [[*LAW, *FOOD][i] for i in order]
    weights = importance_weights(raw, target_counts(LIKE, "like"))
    kept = resample(weights.log_weights_N, 30, seed=0)
    assert kept.tolist() == sorted(kept.tolist()) and len(set(kept.tolist())) == 30
    right = sum(order[i] < 30 for i in kept) / 30
    assert right >= 0.9
    assert resample(weights.log_weights_N, 30, seed=0).tolist() == kept.tolist()


def test_one_document_is_drawn_in_proportion_to_its_weight() -> None:
    shares = np.array([0.5, 0.3, 0.15, 0.05])
    logs = np.log(shares) + 7.0
    drawn = Counter(int(resample(logs, 1, seed)[0]) for seed in range(4000))
    found = np.array([drawn[i] for i in range(4)]) / 4000
    error = np.sqrt(shares * (1 - shares) / 4000)
    assert np.all(np.abs(found - shares) < 4 * error)
    # A mutant without noise always takes the likeliest.
    assert not np.all(np.abs(np.array([1.0, 0, 0, 0]) - shares) < 4 * error)


def test_the_second_is_drawn_from_what_is_left() -> None:
    """Without replacement (Plackett-Luce): P(first is 0, second is 1) = p0 p1 / (1 - p0), and so on."""
    shares = np.array([0.6, 0.3, 0.1])
    pairs = Counter(tuple(resample(np.log(shares), 2, seed).tolist()) for seed in range(4000))
    both = {
        (a, b): shares[a] * shares[b] / (1 - shares[a]) + shares[b] * shares[a] / (1 - shares[b])
        for a, b in ((0, 1), (0, 2), (1, 2))
    }
    assert sum(both.values()) == pytest.approx(1)
    for pair, share in both.items():
        assert abs(pairs[pair] / 4000 - share) < 4 * np.sqrt(share * (1 - share) / 4000)


def test_too_few_words_and_shares_of_nothing_are_refused() -> None:
    with pytest.raises(DataError, match="too few") as found:
        target_counts(["a few words"], "select.like")
    assert found.value.where == "select.like" and f"{MIN_WORDS:,}" in str(found.value)
    assert share_to_count(0.25, 100, "keep") == 25
    assert share_to_count(0.29, 100, "keep") == 29  # .29 * 100 is a little less
    with pytest.raises(DataError, match="is less than one"):
        share_to_count(0.001, 100, "keep")
    with pytest.raises(DataError, match="too few"):
        share_to_count(0.5, 9, "keep")


def test_copies_name_the_first_of_their_sort() -> None:
    rng = random.Random(0)
    words = [f"w{i}" for i in range(3000)]
    own = [rng.choices(words, k=150) for _ in range(20)]
    near = [*own[3][:-4], "changed", "words", "at", "end"]
    given = [*own[:10], near, *own[10:], own[15]]
    found = find_near_duplicates((" ".join(text) for text in given), 0.8).tolist()
    assert found == [-1] * 10 + [3] + [-1] * 10 + [16]
    assert find_near_duplicates((" ".join(text) for text in given), 1.0).tolist()[10] == -1  # near is not the same


def test_a_band_is_that_of_the_quantiles() -> None:
    rng = np.random.default_rng(0)
    values = rng.permutation(np.arange(1000.0))
    band = select_band(values, 0.1, 0.9, "between")
    assert sorted(values[band.indices]) == list(np.arange(100.0, 900.0))
    assert (band.low, band.high) == (pytest.approx(99.9), pytest.approx(899.1))
    assert band.indices.tolist() == sorted(band.indices.tolist())
    assert len(select_band(values, 0.0, 1.0, "between").indices) == 1000
    unknown = values.copy()
    unknown[:5] = np.nan
    assert not set(range(5)) & set(select_band(unknown, 0.0, 1.0, "between").indices.tolist())
    with pytest.raises(DataError, match="too few"):
        select_band(values[:9], 0.1, 0.9, "between")
