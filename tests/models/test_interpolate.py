"""Is what lies between two models what the formula says, exact at both ends, and gone afterwards?"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator

import pytest
import torch

from postgrad.errors import ModelError
from postgrad.models import interpolate
from tests.conftest import make_llama


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(12)[None]).logits


def test_both_ends_are_exact_and_the_middle_is_the_mean() -> None:
    one, other = make_llama(0), make_llama(1)
    start, end = interpolate.copy_weights(one), interpolate.copy_weights(other)
    for weight, expected in ((0.0, start), (1.0, end)):
        interpolate.interpolate_weights(one, start, end, weight)
        assert all(torch.equal(p, expected[name]) for name, p in one.named_parameters())
    assert torch.equal(logits(one), logits(other))
    interpolate.interpolate_weights(one, start, end, 0.25)
    for name, p in one.named_parameters():
        torch.testing.assert_close(p, 0.75 * start[name] + 0.25 * end[name])


def test_a_weight_for_each_block_moves_that_block_alone() -> None:
    model, start, end = make_llama(0), interpolate.copy_weights(make_llama(0)), interpolate.copy_weights(make_llama(1))
    blocks = interpolate.block_parameter_names(model)
    assert len(blocks) == 2 and not set(blocks[0]) & set(blocks[1])
    weights = dict.fromkeys(start, 1.0) | dict.fromkeys(blocks[0], 0.0)
    interpolate.interpolate_weights(model, start, end, weights)
    for name, p in model.named_parameters():
        assert torch.equal(p, start[name] if name in blocks[0] else end[name])


def test_what_the_start_does_not_have_stays_the_ends() -> None:
    model, end = make_llama(0), interpolate.copy_weights(make_llama(1))
    start = {name: t for name, t in interpolate.copy_weights(make_llama(2)).items() if "norm" not in name}
    new = interpolate.refuse_other_shapes(start, end, ("a", "b"), has_task_layer=True)
    assert new == sorted(name for name in end if "norm" in name)
    with pytest.raises(ModelError, match=r"norm.weight is missing in a and \(32,\) in b"):
        interpolate.refuse_other_shapes(start, end, ("a", "b"))
    interpolate.interpolate_weights(model, start, end, 0.0)
    assert all(torch.equal(p, end[name] if "norm" in name else start[name]) for name, p in model.named_parameters())


def test_models_of_other_shapes_are_refused_by_name() -> None:
    small, large = interpolate.copy_weights(make_llama(0)), interpolate.copy_weights(make_llama(0, hidden_size=64))
    with pytest.raises(ModelError, match=r"\(320, 32\) in base and \(320, 64\) in run"):
        interpolate.refuse_other_shapes(
            {"x": small["model.embed_tokens.weight"]}, {"x": large["model.embed_tokens.weight"]}, ("base", "run")
        )


def test_the_mean_of_states_is_that_of_their_numbers() -> None:
    states = [{"w": torch.full((2,), value, dtype=torch.float32)} for value in (1e8, 1.0, -1e8)]
    assert torch.equal(
        interpolate.average_weights(iter(states), [1 / 3] * 3)["w"], torch.full((2,), 1 / 3)
    )  # in float32 the one would be lost


def most_in_memory(average: Callable[[Iterator[dict[str, torch.Tensor]], list[float]], object]) -> int:
    """How many of five states exist at most at one time."""
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def states() -> Iterator[dict[str, torch.Tensor]]:
        nonlocal most
        for value in range(5):
            tensor = torch.full((3,), float(value))
            alive.append(weakref.ref(tensor))
            most = max(most, sum(each() is not None for each in alive))
            yield {"w": tensor}
            del tensor

    average(states(), [0.2] * 5)
    return most


def test_states_are_averaged_one_after_another() -> None:
    assert most_in_memory(interpolate.average_weights) == 1
    assert most_in_memory(lambda states, weights: interpolate.average_weights(list(states), weights)) == 5
