"""Are the distances between texts what their definitions say, zero where nothing differs, and apart where something does?"""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from sklearn.metrics import roc_auc_score

from postgrad.analysis import domain_shift, shift_advice
from postgrad.analysis.domain_shift import Passages
from postgrad.errors import DataError


def prose(words: list[str], count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choice(words) for _ in range(150)) + "." for _ in range(count)]


FRUIT = ["apple", "pear", "plum", "fig", "lime", "date", "grape", "peach"]
TOOLS = ["hammer", "saw", "nail", "drill", "bolt", "wrench", "pliers", "screw"]
HALF = [*FRUIT[:4], *TOOLS[:4]]


def counts(words: list[str], seed: int, count: int = 60) -> np.ndarray:
    return domain_shift.ngram_counts(domain_shift.make_passages(prose(words, count, seed), "text"))


def test_passages_hold_every_word_once_and_stay_the_text_they_are() -> None:
    documents = ["One two, three. " * 40, "Four" * 3, "five six " * 900]
    found = domain_shift.make_passages(documents, "text")
    assert all(len(words) == domain_shift.PASSAGE_WORDS for words in found.words)
    flat = [word for words in found.words for word in words]
    assert flat[:4] == ["One", "two", ",", "three"]
    assert " ".join(flat).count("FourFourFour") == 1
    for text, words in zip(found.texts, found.words, strict=True):
        assert text.split() and text.replace(" ", "").replace("\n", "") == "".join(words)
    assert found.document_P.tolist() == sorted(found.document_P.tolist())


def test_too_little_text_says_how_much_is_needed() -> None:
    with pytest.raises(DataError, match=r"(?s)200 words are too few.*2,000 words"):
        domain_shift.make_passages(["word " * 200], "--new")


def test_one_and_the_same_text_is_refused() -> None:
    documents = prose(FRUIT, 30, 0)
    with pytest.raises(DataError, match="are in both the old and the new text"):
        domain_shift.refuse_same(documents, documents[:20])
    domain_shift.refuse_same(documents, prose(FRUIT, 30, 1))


def test_the_divergence_is_that_of_scipy_in_bits() -> None:
    old, new = counts(FRUIT, 0), counts(HALF, 1)
    found = domain_shift.js_divergence(old, new)
    size = min(len(old), len(new))
    rng = np.random.default_rng(0)
    picked = old[rng.permutation(len(old))[:size]].sum(0), new[rng.permutation(len(new))[:size]].sum(0)
    assert found.value == pytest.approx(float(jensenshannon(*picked, base=2)) ** 2, rel=1e-6)
    assert found.low < found.value < found.high
    assert found.same is not None and found.same < found.low


def test_nothing_in_common_is_one_bit_and_the_same_text_lies_in_its_band() -> None:
    apart = domain_shift.js_divergence(np.eye(40, 400, dtype=np.float32), np.eye(40, 400, 200, dtype=np.float32))
    assert apart.value == pytest.approx(1.0)
    fruit = counts(FRUIT, 0, 200)
    alike = domain_shift.js_divergence(fruit, counts(FRUIT, 5, 200))
    assert alike.same is not None and alike.value < 1.5 * alike.same


def test_the_log_ratio_is_the_divergence_of_known_unigrams() -> None:
    """Two urns of eight n-grams each, known shares: the mean log-ratio is their Kullback-Leibler divergence."""
    rng = np.random.default_rng(0)
    one, other = np.array([0.3, 0.3, 0.2, 0.1, 0.05, 0.03, 0.01, 0.01]), np.full(8, 1 / 8)
    new, old = (rng.multinomial(400, shares, 300).astype(np.float32) for shares in (one, other))
    found = domain_shift.log_ratio(old, new)
    expected = float((one * np.log(one / other)).sum())
    assert found.low < found.value < found.high
    assert found.value == pytest.approx(expected, abs=0.01)
    assert found.same is not None and abs(found.same) < 0.01
    swapped = float((other * np.log(other / one)).sum())  # the mutant: the other direction
    assert abs(found.value - swapped) > 0.1


def test_passages_of_one_text_are_not_told_apart_and_those_of_two_are() -> None:
    fruit = counts(FRUIT, 0, 120)
    alike = domain_shift.classifier_auc(fruit, counts(FRUIT, 9, 120))
    assert alike.same is not None
    assert alike.low < alike.same and alike.value < 0.62
    assert domain_shift.classifier_auc(fruit, counts(HALF, 9, 120)).low > 0.95


def test_told_apart_is_an_area_under_the_curve() -> None:
    """One feature that says half of it: the AUC of the feature itself."""
    rng = np.random.default_rng(0)
    old, new = (rng.poisson(rate, (400, 1)).astype(np.float32) for rate in (4.0, 6.0))
    found = domain_shift.classifier_auc(old, new)
    plain = roc_auc_score(np.repeat([0, 1], 400), np.concatenate([old, new])[:, 0])
    assert found.value == pytest.approx(plain, abs=0.02)


def test_bytes_see_what_words_see_and_case_too() -> None:
    lower = domain_shift.make_passages(prose(FRUIT, 60, 0), "a")
    upper = domain_shift.make_passages([text.title() for text in prose(FRUIT, 60, 1)], "b")
    found = domain_shift.js_divergence(domain_shift.byte_counts(lower), domain_shift.byte_counts(upper))
    assert found.same is not None and found.value > 10 * found.same
    one = domain_shift.byte_counts(Passages(["abcd"], [["abcd"]], np.zeros(1)))
    assert one.sum() == 2


def test_fertility_counts_tokens_words_bytes_and_the_unknown() -> None:
    def encode(texts: list[str]) -> list[list[int]]:
        return [[0 if letter == "?" else 1 for letter in text] for text in texts]

    found = domain_shift.fertility(["ab cd", "é??"], encode, [0])
    assert found.tokens_per_word == pytest.approx(8 / 3)
    assert found.bytes_per_token == pytest.approx(9 / 8)
    assert found.unknown == pytest.approx(2 / 8)


@pytest.mark.parametrize(
    ("distance", "same", "strength", "share"),
    [(0.01, 0.005, "none", "1%"), (0.2, 0.01, "weak", "5%"), (0.52, 0.01, "strong", "25%"), (0.36, 0.1, "weak", "5%")],
)
def test_strength_and_replay_follow_the_excess(distance: float, same: float, strength: str, share: str) -> None:
    found = shift_advice.shift_strength(distance, same)
    assert found == strength
    proposed = shift_advice.make_proposals(found, tokens=10**9, old_bytes_per_token=4, new_bytes_per_token=4, unknown=0)
    by_name = {proposal.what: proposal for proposal in proposed}
    assert by_name["replay share"].value == share
    assert all(proposal.reason and proposal.source for proposal in proposed)
    assert by_name["vocabulary"].value == "keep it"


@pytest.mark.parametrize(
    ("tokens", "new", "unknown", "says"),
    [(10**10, 4.0, 0.05, "grow it"), (10**10, 1.5, 0.0, "grow it, new"), (10**6, 1.5, 0.0, "keep it, or grow")],
)
def test_the_vocabulary_grows_where_text_is_cut_fine_or_lost(
    tokens: int, new: float, unknown: float, says: str
) -> None:
    found = shift_advice.make_proposals(
        "weak", tokens=tokens, old_bytes_per_token=4, new_bytes_per_token=new, unknown=unknown
    )
    assert found[-1].value.startswith(says)


def test_few_tokens_ask_for_a_low_rate() -> None:
    few, many, unknown = (
        shift_advice.make_proposals(
            "strong", tokens=n, old_bytes_per_token=4, new_bytes_per_token=4, unknown=0, parameters=parameters
        )
        for n, parameters in ((10**6, 7 * 10**9), (10**10, 7 * 10**9), (10**6, None))
    )
    assert few[1].value == "2.0e-05"
    assert many[1].value == "the peak of pre-training"
    assert unknown[1].value == "unknown" and "not known" in unknown[1].reason


@pytest.mark.parametrize(
    ("parameters", "rate"),
    [(260_000, 1e-3), (400_000, 1e-3), (10**7, 2e-4), (110_000_000, 6e-5), (10**9, 2e-5), (70 * 10**9, 2e-5)],
)
def test_the_rate_follows_the_size(parameters: int, rate: float) -> None:
    assert shift_advice.usual_peak_rate(parameters) == pytest.approx(rate)
    proposed = shift_advice.make_proposals(
        "weak", tokens=10**6, old_bytes_per_token=4, new_bytes_per_token=4, unknown=0, parameters=parameters
    )
    assert float(proposed[1].value) == pytest.approx(rate) and f"{parameters:,}" in proposed[1].reason


@pytest.mark.parametrize(
    ("excess", "ratio", "wanted"),
    [
        (0.2, 4.33 / 0.9, "strong"),  # letters alike, and a text that the model knows nothing of
        (0.2, 1.3, "weak"),
        (0.5, 1.0, "strong"),
        (0.01, 1.05, "none"),
        (0.01, 1.2, "weak"),
        (0.01, 0.5, "none"),  # a text that is easier
        (0.2, None, "weak"),
    ],
)
def test_the_loss_of_the_model_counts(excess: float, ratio: float | None, wanted: str) -> None:
    assert shift_advice.shift_strength(excess + 0.1, 0.1, ratio) == wanted
    by_text_alone = shift_advice.shift_strength(excess + 0.1, 0.1)
    order = ("none", "weak", "strong")
    assert order.index(by_text_alone) <= order.index(wanted)
