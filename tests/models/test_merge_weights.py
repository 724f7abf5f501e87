"""Is each merge what its paper writes, by hand on few numbers, and a law on many?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from postgrad.models import merge_weights as merging
from postgrad.models.merge_weights import MergeMethod, MergeRecipe, merge_weights


def state(seed: int, size: int = 400) -> dict[str, Tensor]:
    return {"w": torch.randn(size, generator=torch.Generator().manual_seed(seed))}


START, ONE, TWO = state(0), state(1), state(2)


def merged(method: MergeMethod, *weights: float, **options: float) -> Tensor:
    models = [ONE, TWO, state(3)][: len(weights)]
    return merge_weights(START, models, MergeRecipe(method, weights, **options))["w"]  # type: ignore[bad-argument-type]


def by_hand(function: Callable[..., Tensor], vectors: list[list[float]], weights: tuple[float, ...]) -> list[float]:
    return function([torch.tensor(v, dtype=torch.float64) for v in vectors], weights).tolist()


def test_a_linear_merge_is_exact_at_its_ends_and_adds_what_each_learnt() -> None:
    assert torch.equal(merged("linear", 1.0), ONE["w"]) and torch.equal(merged("linear", 0.0, 0.0), START["w"])
    assert torch.equal(merged("linear", 0.0, 1.0), TWO["w"])
    expected = START["w"] + 0.5 * (ONE["w"] - START["w"]) - 2 * (TWO["w"] - START["w"])
    torch.testing.assert_close(merged("linear", 0.5, -2.0), expected)


def test_a_chat_vector_on_a_start_that_learnt_nothing_is_the_chat_model() -> None:
    found = merge_weights(START, [START, TWO], MergeRecipe("linear", (1.0, 1.0)))["w"]
    torch.testing.assert_close(found, TWO["w"])


def test_ties_keeps_the_largest_elects_a_sign_and_takes_the_mean_of_those_that_have_it() -> None:
    assert merging.keep_largest(torch.tensor([3.0, -4.0, 1.0, 2.0]), 0.5).tolist() == [3.0, -4.0, 0.0, 0.0]
    vectors = [[3.0, -4.0, 0.0, 1.0], [1.0, 2.0, -2.0, -1.5], [-1.0, 3.0, 0.0, 0.0]]
    # sums 3, 1, -2, -0.5: of the first two, of the last two, of the second, of the second
    assert by_hand(merging.elect_and_mean, vectors, (1.0, 1.0, 1.0)) == [2.0, 2.5, -2.0, -1.5]
    assert by_hand(merging.elect_and_mean, vectors, (0.5, 0.5, 0.5)) == [1.0, 1.25, -1.0, -0.75]
    assert by_hand(merging.elect_and_mean, vectors, (1.0, 0.0, 0.0)) == vectors[0]


def agreed_signs(method: MergeMethod) -> float:
    """The share of weights that move against the sign of the sum of all task vectors."""
    moved, total = merged(method, 1.0, 1.0, density=1.0) - START["w"], ONE["w"] + TWO["w"] - 2 * START["w"]
    return (moved.sign() != total.sign()).float().mean().item()


def test_what_ties_adds_has_the_elected_sign_and_no_interference(monkeypatch: pytest.MonkeyPatch) -> None:
    assert agreed_signs("ties") == 0
    size = (merged("ties", 1.0, 1.0, density=1.0) - START["w"]).abs().mean()
    assert size > 1.1 * (merged("linear", 0.5, 0.5) - START["w"]).abs().mean()  # opposite signs do not cancel
    monkeypatch.setattr(merging, "elect_and_mean", lambda vectors, weights: vectors[0])
    assert agreed_signs("ties") > 0.1


def bias(draws: int = 200) -> float:
    """How far the mean of many dare merges is from the task vector, in standard errors of a weight."""
    found = torch.stack([merged("dare_linear", 1.0, density=0.25, seed=seed) for seed in range(draws)])
    return ((found.mean(0) - ONE["w"]).square().mean().sqrt() / (found.std(0).mean() / draws**0.5)).item()


def test_dare_keeps_its_share_and_the_mean_and_is_the_same_for_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = merged("dare_linear", 1.0, density=0.25, seed=7)
    kept = found != START["w"]
    assert 0.18 < kept.float().mean() < 0.32
    torch.testing.assert_close((found - START["w"])[kept], 4 * (ONE["w"] - START["w"])[kept], rtol=1e-4, atol=1e-4)
    assert torch.equal(found, merged("dare_linear", 1.0, density=0.25, seed=7))
    assert not torch.equal(found, merged("dare_linear", 1.0, density=0.25, seed=8))
    assert torch.equal(merged("dare_linear", 1.0, density=1.0), merged("linear", 1.0))
    beside_another = merged("dare_linear", 1.0, 0.0, density=0.25, seed=7)
    assert torch.equal(found, beside_another)  # what is dropped of a model depends on no other
    assert bias() < 1.5
    plain = merging.drop_at_random
    monkeypatch.setattr(merging, "drop_at_random", lambda vector, density, draw: density * plain(vector, density, draw))
    assert bias() > 5


def test_model_stock_is_the_ratio_of_the_paper() -> None:
    one, two = torch.tensor([1.0, 0.0]).double(), torch.tensor([1.0, 1.0]).double()
    cosine = 0.5**0.5
    assert merging.model_stock_ratio([one, two]) == pytest.approx(2 * cosine / (1 + cosine))
    assert merging.model_stock_ratio([one, one, one]) == 1 and merging.model_stock_ratio([one, -one]) == 0
    assert merging.model_stock_ratio([one, torch.zeros(2).double()]) == 0
    same = merge_weights(START, [ONE, ONE], MergeRecipe("model_stock", (1.0, 1.0)))["w"]
    torch.testing.assert_close(same, ONE["w"])


def foot(ratio: Callable[[list[Tensor]], float]) -> float:
    """The error of a law: from models around a centre at one distance, the merge is the point nearest to the centre."""
    draw = torch.Generator().manual_seed(0)
    centre, size = torch.randn(40_000, generator=draw).double(), 40_000
    vectors = [centre + torch.randn(size, generator=draw).double() for _ in range(3)]
    mean = torch.stack(vectors).mean(0)
    best = (mean @ centre / (mean @ mean)).item()
    return abs(ratio(vectors) - best)


def test_model_stock_is_the_point_of_the_segment_that_is_nearest_to_the_centre() -> None:
    assert foot(merging.model_stock_ratio) < 0.02
    assert foot(lambda vectors: 1.0) > 0.1  # the plain mean


def test_slerp_keeps_the_norm_between_two_of_one_norm_and_is_a_line_where_they_align() -> None:
    first, second = (state(seed)["w"].double() for seed in (1, 2))
    first, second = first / first.norm(), second / second.norm()
    for share in (0.0, 0.25, 0.5, 1.0):
        found = merging.slerp(first, second, share)
        assert found.norm().item() == pytest.approx(1)
        angle = torch.arccos(first @ second)
        assert torch.arccos((found @ first).clamp(-1, 1)).item() == pytest.approx(share * angle.item(), abs=1e-6)
    assert torch.lerp(first, second, 0.5).norm() < 0.9  # the line goes through the sphere
    torch.testing.assert_close(merging.slerp(first, 3 * first, 0.5), 2 * first)
    torch.testing.assert_close(
        merged("slerp", 1.0, 3.0), merging.slerp(ONE["w"].double(), TWO["w"].double(), 0.75).float()
    )
