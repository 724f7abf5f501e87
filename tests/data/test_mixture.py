"""The mixture: exact shares, no row twice in a pass, any position at once, seen-so-far weights of the paper."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postgrad.data.loading.mixture import Apportionment, Mixture, Segment, row_rates
from postgrad.data.loading.replay_weights import seen_weights
from postgrad.data.random_streams import derive_key, permute_indices

rates = st.lists(st.floats(0.001, 1), min_size=1, max_size=6)


@given(rates, st.integers(0, 10**9))
def test_counts_add_up_never_fall_and_stay_near_the_share(raw: list[float], n: int) -> None:
    part = Apportionment(raw)
    here, next_ = part.counts(n), part.counts(n + 1)
    assert sum(here) == n and sum(next_) == n + 1
    assert all(b - a in (0, 1) for a, b in zip(here, next_, strict=True))
    for count, weight in zip(here, part.weights, strict=True):
        assert abs(count - n * weight / part.total) < 1 + len(raw) / 2


@given(st.integers(1, 5000), st.integers(0, 2**63))
def test_permutation_is_one(size: int, key: int) -> None:
    out = permute_indices(np.arange(size), size, key)
    assert sorted(out.tolist()) == list(range(size))


def test_permutations_differ_by_key() -> None:
    a, b = (permute_indices(np.arange(1000), 1000, derive_key(0, 0, epoch)) for epoch in (0, 1))
    assert (a == b).mean() < 0.02
    assert abs(np.corrcoef(np.arange(1000), a)[0, 1]) < 0.15


def mixture(shares: tuple[float, ...] = (0.95, 0.05), sizes: tuple[int, ...] = (700, 90), block: int = 64) -> Mixture:
    return Mixture(7, sizes, [Segment(0, shares)], block)


def test_two_sources_are_within_one_row_at_every_prefix() -> None:
    m = mixture()
    for n in range(2000):
        assert abs(m.counts(n)[1] - 0.05 * n) <= 1


def exact_in_every_block(draw_source, shares: tuple[float, ...], block: int, blocks: int) -> bool:
    """The law: in every block each source has its share to within one row."""
    for b in range(blocks):
        drawn = np.array([draw_source(b * block + i) for i in range(block)])
        if any(abs((drawn == k).sum() - share * block) > 1 for k, share in enumerate(shares)):
            return False
    return True


def test_shares_are_exact_in_every_block_and_random_draws_are_not() -> None:
    shares = (0.75, 0.2, 0.05)
    m = mixture(shares, (500, 400, 300))
    assert exact_in_every_block(lambda p: m.locate(p)[0], shares, 64, 50)
    rng = np.random.default_rng(0)  # the mutant: independent draws
    assert not exact_in_every_block(lambda p: rng.choice(3, p=shares), shares, 64, 50)


def test_no_row_twice_in_a_pass_and_every_row_once() -> None:
    m = mixture((0.6, 0.4), (150, 101), 10)
    seen: dict[int, list[int]] = {0: [], 1: []}
    for position in range(1000):
        source, row = m.locate(position)
        seen[source].append(row)
    for k, size in enumerate(m.sizes):
        for begin in range(0, len(seen[k]) - size, size):
            assert sorted(seen[k][begin : begin + size]) == list(range(size))
    assert seen[0][:150] != seen[0][150:300]


def test_order_depends_on_the_seed_and_on_nothing_else() -> None:
    a, b, other = mixture(), mixture(), Mixture(8, (700, 90), [Segment(0, (0.95, 0.05))], 64)
    positions = [999, 3, 64, 63, 5000, 3]
    assert [a.locate(p) for p in positions] == [b.locate(p) for p in reversed(positions)][::-1]
    assert [a.locate(p) for p in range(64)] != [other.locate(p) for p in range(64)]


def test_a_billion_rows_are_addressed_at_once() -> None:
    m = Mixture(1, (900_000_000, 60_000_000, 7), [Segment(0, (0.9, 0.0999, 0.0001))], 256)
    begin = time.perf_counter()
    places = [0, 999_999_999, *(int(x) for x in np.random.default_rng(0).integers(0, 10**9, 50))]
    drawn = [m.locate(p) for p in places]
    assert (time.perf_counter() - begin) / len(places) < 0.05
    assert all(0 <= row < m.sizes[source] for source, row in drawn)


def test_segments_change_the_shares_and_go_on_where_each_source_was() -> None:
    m = Mixture(3, (1000, 1000), [Segment(0, (1.0, 0.0)), Segment(640, (0.5, 0.5)), Segment(1280, (0.0, 1.0))], 64)
    drawn = [m.locate(p) for p in range(1600)]
    assert {s for s, _ in drawn[:640]} == {0} and {s for s, _ in drawn[1280:]} == {1}
    assert sum(s == 1 for s, _ in drawn[640:1280]) == 320
    first = [row for s, row in drawn if s == 0]
    assert len(first) == 960 == len(set(first))
    assert m.counts(1600) == (960, 640) and m.passes(1600) == (0.96, 0.64)


def test_shares_are_meant_in_trained_tokens() -> None:
    a, b = row_rates((0.9, 0.1), (500.0, 250.0))
    assert a * 500 / (a * 500 + b * 250) == pytest.approx(0.9)


def test_replay_of_everything_seen_has_the_papers_own_weights() -> None:
    seen = {"pile": 300.0}
    two = seen_weights(seen, 0.05)
    assert two == {"pile": pytest.approx(0.05)}
    seen = {"pile": 300 + 100 * two["pile"], "sp1": 95.0}
    three = seen_weights(seen, 0.05)
    assert three == {"pile": pytest.approx(0.038125), "sp1": pytest.approx(0.011875)}
    seen = {"pile": seen["pile"] + 100 * three["pile"], "sp1": 95 + 100 * three["sp1"], "sp2": 95.0}
    four = seen_weights(seen, 0.05)
    assert four == {
        "pile": pytest.approx(0.03088125),
        "sp1": pytest.approx(0.00961875),
        "sp2": pytest.approx(0.0095),
    }
