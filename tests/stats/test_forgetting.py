"""Intervals are those of scipy and cover what they should; pairing is worth it; the matrix gives the published numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from scipy.sparse import csr_array

from postgrad.stats import bootstrap, forgetting
from postgrad.stats.bootstrap import percentile_interval, ratio_interval, resample_counts, resample_ratio, resample_sums
from postgrad.stats.forgetting import LossChange, TransferSummary, loss_verdict, paired_change, summarize_scores


def documents(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`(before, after, tokens)`: documents differ far more from one another than a document does between two models."""
    tokens = rng.integers(5, 80, count)
    hard = rng.normal(3.0, 0.6, count)
    before = hard * tokens
    after = before + rng.normal(0.02, 0.05, count) * tokens
    return before, after, tokens


def ratio(nats: np.ndarray, tokens: np.ndarray, axis: int = -1) -> np.ndarray:
    return nats.sum(axis) / tokens.sum(axis)


def test_intervals_are_those_of_scipy() -> None:
    before, after, tokens = documents(np.random.default_rng(0), 60)
    difference = after - before
    ours = np.array([ratio_interval(difference, tokens, seed=s) for s in range(10)])
    theirs = np.array([
        stats.bootstrap(
            (difference, tokens), ratio, paired=True, method="percentile", n_resamples=2000, vectorized=True,
            rng=np.random.default_rng(100 + s),
        ).confidence_interval
        for s in range(10)
    ])  # fmt: skip
    # Ten seeds on each side: the difference of means has this standard error.
    error = np.sqrt((ours.var(0, ddof=1) + theirs.var(0, ddof=1)) / 10)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 4 * error).all()
    # The mutant: a mean of the documents' means weighs a short document like a long one.
    tokens_matter = np.where(tokens > 40, 1.0, -1.0) * tokens
    low, high = ratio_interval(tokens_matter, tokens)
    mean_of_means = (tokens_matter / tokens).mean()
    assert not low <= mean_of_means <= high


def test_the_interval_covers_the_truth_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "DRAWS", 1000)
    covered = {"ours": 0, "narrow": 0}
    trials, count = 500, 100
    truth = 0.02  # the differences do not depend on the length, so the ratio's expectation is their mean
    for trial in range(trials):
        before, after, tokens = documents(np.random.default_rng(1000 + trial), count)
        low, high = ratio_interval(after - before, tokens, seed=trial)
        covered["ours"] += low <= truth <= high
        # The mutant: tokens are taken as independent (a document's tokens rise and fall together).
        share = (after - before) / tokens
        spread = 1.96 * np.sqrt((tokens * share**2).sum() / tokens.sum()) / np.sqrt(tokens.sum())
        covered["narrow"] += abs(ratio(after - before, tokens) - truth) <= spread
    assert 0.92 <= covered["ours"] / trials <= 0.98
    assert covered["narrow"] / trials < 0.92


def test_pairing_sees_what_two_separate_intervals_cannot() -> None:
    before, after, tokens = documents(np.random.default_rng(5), 200)
    change = paired_change(before, after, tokens, total_bytes=int(tokens.sum()) * 4, vocabulary=1000)
    unpaired = stats.bootstrap(
        (before / tokens, after / tokens), lambda a, b, axis: b.mean(axis) - a.mean(axis), method="percentile",
        vectorized=True, rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    assert change.low > 0  # the rise of about 0.02 nats is seen ...
    assert unpaired.low < 0 < unpaired.high  # ... and would drown
    assert (unpaired.high - unpaired.low) > 5 * (change.high - change.low)
    # Miller 2024: the standard error of paired differences; the interval is about 1.96 of it on each side.
    weights = tokens / tokens.mean()
    error = np.std(weights * ((after - before) / tokens - change.difference), ddof=1) / math.sqrt(len(tokens))
    assert (change.high - change.low) / 2 == pytest.approx(1.96 * error, rel=0.1)


def test_the_same_seed_draws_the_same_units() -> None:
    before, after, tokens = documents(np.random.default_rng(6), 50)
    assert ratio_interval(after - before, tokens) == ratio_interval(after - before, tokens)
    assert ratio_interval(after - before, tokens) != ratio_interval(after - before, tokens, seed=1)
    # Shifted by a constant a token, the interval shifts by it exactly: the draws do not depend on the values.
    low, high = ratio_interval(after - before, tokens)
    assert ratio_interval(after - before + 0.5 * tokens, tokens) == pytest.approx((low + 0.5, high + 0.5))


def test_many_units_are_drawn_in_parts_that_do_not_change_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.full(30_000, 10)
    nats = np.random.default_rng(0).normal(20, 5, 30_000)
    monkeypatch.setattr(bootstrap, "DRAWS", 700)  # 666 rows fit at once
    low, high = ratio_interval(nats, tokens)
    half = 1.96 * nats.std(ddof=1) / 10 / math.sqrt(30_000)
    assert (low, high) == pytest.approx((nats.mean() / 10 - half, nats.mean() / 10 + half), abs=half * 0.2)


def test_counts_sums_and_ratios_have_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after, tokens = documents(np.random.default_rng(7), 40)
    counts = np.concatenate(list(resample_counts(40, seed=3)))
    assert counts.shape == (bootstrap.DRAWS, 40) and (counts.sum(1) == 40).all()
    sums = resample_sums(np.stack([before, after, tokens], 1), seed=3)
    assert sums == pytest.approx(counts @ np.stack([before, after, tokens], 1))
    assert resample_sums(csr_array(np.stack([before, after, tokens], 1)), seed=3) == pytest.approx(sums)
    assert resample_ratio(after, tokens, seed=3) == pytest.approx(sums[:, 1] / sums[:, 2])
    # Paired: the same seed; unpaired: another one.
    difference = resample_ratio(after, tokens, seed=3) - resample_ratio(before, tokens, seed=3)
    assert difference == pytest.approx(resample_ratio(after - before, tokens, seed=3))
    unpaired = percentile_interval(resample_ratio(after, tokens, seed=3) - resample_ratio(before, tokens, seed=4))
    assert np.ptp(unpaired) > 5 * np.ptp(percentile_interval(difference))
    assert (next(resample_counts(40, size=7)).sum(1) == 7).all()
    monkeypatch.setattr(bootstrap, "_ENTRIES_AT_ONCE", 40 * 7)  # how draws are parted changes nothing
    assert (np.concatenate(list(resample_counts(40, seed=3))) == counts).all()


def test_a_single_unit_has_no_interval() -> None:
    for units in ([6.0], []):
        assert ratio_interval(np.array(units), np.array(units)) == (None, None)
    change = paired_change(np.array([6.0]), np.array([4.0]), np.array([4]), total_bytes=10, vocabulary=100)
    assert (change.low, change.high, change.count, change.verdict) == (None, None, 1, "no evidence")
    assert change.difference == -0.5 and change.relative_high == change.relative
    assert loss_verdict(-0.5, -0.5, 1.5) == "learnt"  # the mutant: both ends at the value


def test_a_change_is_told_in_every_unit() -> None:
    before, after, tokens = np.array([20.0, 10.0]), np.array([21.0, 11.0]), np.array([6, 4])
    change = paired_change(before, after, tokens, total_bytes=50, vocabulary=64, units="windows")
    assert change.difference == pytest.approx(2 / 10)
    assert change.relative == pytest.approx(0.2 / 3)
    assert change.relative_high == pytest.approx(change.high / 3)
    assert change.share_of_range == pytest.approx(0.2 / (math.log(64) - 3))
    assert change.bits_per_byte_difference == pytest.approx(2 / math.log(2) / 50)
    assert (change.units, change.count) == ("windows", 2)


def test_a_start_loss_of_zero_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def change() -> LossChange:
        return paired_change(np.zeros(3), np.array([0.0, 0.2, 0.1]), np.array([4, 2, 3]), total_bytes=9, vocabulary=9)

    found = change()
    assert found.verdict in ("forgot", "no evidence") and 1e9 < found.relative < math.inf
    monkeypatch.setattr(forgetting, "MIN_LOSS", 0)  # the mutant
    with pytest.raises(ZeroDivisionError):
        change()


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (-0.005, 0.005, "kept"),
        (0.001, 0.009, "kept"),  # surely above zero, and surely less than 1 %
        (-0.02, -0.001, "learnt"),
        (0.001, 0.02, "forgot"),
        (-0.02, 0.02, "no evidence"),
        (-0.001, 0.02, "no evidence"),
        (-0.02, 0.001, "no evidence"),
        (0.0, 0.02, "no evidence"),
        (-0.02, 0.0, "no evidence"),
        (0.0, 0.0, "kept"),
        (-0.01, 0.01, "kept"),  # the ends belong to it
        (0.02, 0.03, "forgot"),
        (-0.03, -0.02, "learnt"),
    ],
)
@pytest.mark.parametrize("loss", [1.0, 4.0])
def test_verdicts(low: float, high: float, wanted: str, loss: float) -> None:
    assert loss_verdict(low * loss, high * loss, loss) == wanted


# A lineage of three stages on three sets, made up so that every term can be added up by hand. Row 0: the start model.
#            A      B      C      (A is learnt in stage 1, B in 2, C in 3)
SCORES = np.array([
    [-5.0, -6.0, -7.0],
    [-2.0, -5.5, -6.8],
    [-2.6, -3.0, -6.0],
    [-2.4, -3.5, -4.0],
])  # fmt: skip


def test_the_four_numbers_by_hand() -> None:
    found = summarize_scores(SCORES, [1, 2, 3])
    assert found.accuracy == pytest.approx((-2.4 - 3.5 - 4.0) / 3)
    # T - 1 = 2 terms: A lost 0.4 since stage 1, B lost 0.5 since stage 2.
    assert found.backward_transfer == pytest.approx((-0.4 - 0.5) / 2)
    assert found.backward_transfer != pytest.approx((-0.4 - 0.5 + 0) / 3)  # what GEM's own code would say
    # B before stage 2: -5.5 against -6 at the start; C before stage 3: -6 against -7.
    assert found.forward_transfer == pytest.approx((0.5 + 1.0) / 2)
    assert found.forgetting == pytest.approx(((-2.0 + 2.4) + (-3.0 + 3.5)) / 2)
    assert found.denominators == {
        "ACC": "3 sets",
        "BWT": "2 sets learnt before the last stage",
        "FWT": "2 sets learnt in stage 2 or later",
        "FM": "2 sets learnt before the last stage",
    }


def test_forgetting_is_measured_from_the_best_model_ever_not_from_the_one_that_learnt() -> None:
    scores = SCORES.copy()
    scores[2, 0] = -1.5  # stage 2 made A better still
    scores[1, 1] = -2.5  # and stage 1 had B better than stage 2, which trained on it
    found = summarize_scores(scores, [1, 2, 3])
    assert found.backward_transfer == pytest.approx((-0.4 - 0.5) / 2)
    assert found.forgetting == pytest.approx(((-1.5 + 2.4) + (-2.5 + 3.5)) / 2)


def test_forgetting_can_be_negative() -> None:
    """Mammoth's maximum runs over the last row too and never is."""
    found = summarize_scores(np.array([[-5.0, -6.0], [-2.0, -5.0], [-1.5, -3.0]]), [1, 2])
    assert found.forgetting == pytest.approx(-0.5)
    assert found.backward_transfer == pytest.approx(0.5)


def test_what_the_start_model_knew_is_held_against_the_start_model() -> None:
    found = summarize_scores(np.array([[-3.0, -6.0], [-3.2, -5.0], [-3.6, -4.0]]), [0, 1])
    assert found.backward_transfer == pytest.approx((-0.6 + 1.0) / 2)
    assert found.forgetting == pytest.approx((0.6 - 1.0) / 2)
    assert found.forward_transfer is None


def test_one_stage_has_no_forward_transfer() -> None:
    assert summarize_scores(np.array([[-3.0, -6.0], [-3.2, -5.0]]), [0, 1]) == TransferSummary(
        accuracy=pytest.approx(-4.1),  # type: ignore[arg-type]
        backward_transfer=pytest.approx(-0.2),  # type: ignore[arg-type]
        forward_transfer=None,
        forgetting=pytest.approx(0.2),  # type: ignore[arg-type]
        denominators={
            "ACC": "2 sets",
            "BWT": "1 set learnt before the last stage",
            "FWT": "0 sets learnt in stage 2 or later",
            "FM": "1 set learnt before the last stage",
        },
    )


def test_unknown_cells_leave_their_terms_out() -> None:
    scores = SCORES.copy()
    scores[1, 0] = np.nan  # A right after it was learnt
    scores[0, 2] = np.nan  # C at the start
    found = summarize_scores(scores, [1, 2, 3])
    assert found.backward_transfer == pytest.approx(-0.5)
    assert found.forward_transfer == pytest.approx(0.5)
    assert found.forgetting == pytest.approx(((-2.6 + 2.4) + 0.5) / 2)  # the best of what is known
    assert (found.denominators["BWT"][0], found.denominators["FWT"][0], found.denominators["FM"][0]) == ("1", "1", "2")


def test_a_set_of_which_nothing_earlier_is_known_is_no_reason_to_warn() -> None:
    scores = SCORES.copy()
    scores[:3, 0] = np.nan
    found = summarize_scores(scores, [1, 2, 3])
    assert found.forgetting == pytest.approx(0.5)
    assert found.denominators["FM"][0] == "1"


def test_nothing_known_is_no_number() -> None:
    found = summarize_scores(np.full((3, 2), np.nan), [0, 1])
    assert found.accuracy is None
    assert found.backward_transfer is None
    assert found.forgetting is None
