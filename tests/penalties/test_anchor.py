"""The anchor: its gradient is autograd's of the written loss, whatever moves a weight and however its reference is stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from postgrad.penalties import anchor as anchors
from postgrad.penalties.anchor import Anchor, AnchoredDecay, AnchoredDelta, AnchoredWeight
from postgrad.penalties.penalty import Penalty
from postgrad.tuning.attach import attach
from postgrad.tuning.lora import LoraAdapter
from tests.conftest import make_llama

SHAPES = ((7, 5), (12,), (3, 4, 2), (1,), (40, 9))


def tensors(seed: int, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def weights(*, importance: bool = True) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    """Masters, references and importance."""
    masters = [t.requires_grad_() for t in tensors(0)]
    given = [t.square() for t in tensors(2)] if importance else [None] * len(SHAPES)
    return masters, [m.detach() + 0.1 * t for m, t in zip(masters, tensors(1), strict=True)], given


def held(masters: list[Tensor], references: list[Tensor], importance: Sequence[Tensor | None]) -> list[AnchoredWeight]:
    return [AnchoredWeight(m, r, i) for m, r, i in zip(masters, references, importance, strict=True)]


def written(
    masters: Sequence[Tensor], references: Sequence[Tensor], importance: Sequence[Tensor | None], strength: float
) -> Tensor:
    """The term as a loss."""
    parts = [
        ((m - r.double()).square() * (1.0 if i is None else i.double())).sum()
        for m, r, i in zip(masters, references, importance, strict=True)
    ]
    return 0.5 * strength * sum(parts)


def autograd(
    masters: Sequence[Tensor], references: Sequence[Tensor], importance: Sequence[Tensor | None], strength: float
) -> tuple[Tensor, list[Tensor]]:
    """Value and gradients of the written loss, in double precision."""
    exact = [m.detach().double().requires_grad_() for m in masters]
    loss = written(exact, references, importance, strength)
    return loss.detach(), list(torch.autograd.grad(loss, exact))


@pytest.fixture(params=[1 << 17, 16], ids=["whole", "in small stretches"])
def stretches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(anchors._GROUP, "cpu", request.param)


@pytest.mark.usefixtures("stretches")
@pytest.mark.parametrize("importance", [False, True], ids=["l2-sp", "weighed"])
@pytest.mark.parametrize("strength", [0.5, 30.0])
def test_value_and_gradient_are_those_of_the_written_loss(importance: bool, strength: float) -> None:
    masters, references, given = weights(importance=importance)
    value, expected = autograd(masters, references, given, strength)
    penalty: Penalty = Anchor(held(masters, references, given), strength=strength)
    told = penalty()
    assert told.shape == () and not told.requires_grad
    torch.testing.assert_close(told, value.float())
    for master, gradient in zip(masters, expected, strict=True):
        torch.testing.assert_close(master.grad, gradient.float())


@pytest.mark.usefixtures("stretches")
def test_importance_may_be_had_by_some_weights_only() -> None:
    masters, references, given = weights()
    given = [i if k % 2 else None for k, i in enumerate(given)]
    value, expected = autograd(masters, references, given, 2.0)
    torch.testing.assert_close(Anchor(held(masters, references, given), strength=2.0)(), value.float())
    for master, gradient in zip(masters, expected, strict=True):
        torch.testing.assert_close(master.grad, gradient.float())


def test_a_gradient_without_the_importance_or_the_strength_would_be_caught() -> None:
    masters, references, given = weights()
    _, expected = autograd(masters, references, given, 3.0)
    for wrong in (
        Anchor(held(masters, references, [None] * len(SHAPES)), strength=3.0),
        Anchor(held(masters, references, given), strength=1.5),
        Anchor(held(masters, [2 * r for r in references], given), strength=3.0),
    ):
        for master in masters:
            master.grad = None
        wrong()
        assert not torch.allclose(masters[0].grad, expected[0].float(), rtol=1e-2)


def test_is_added_to_the_gradient_that_is_there() -> None:
    masters, references, given = weights()
    there = tensors(3)
    for master, gradient in zip(masters, there, strict=True):
        master.grad = gradient.clone()
    _, expected = autograd(masters, references, given, 0.5)
    Anchor(held(masters, references, given), strength=0.5)()
    for master, gradient, more in zip(masters, there, expected, strict=True):
        torch.testing.assert_close(master.grad, gradient + more.float())


def test_zero_strength_leaves_the_gradient_as_it_was_to_the_bit() -> None:
    masters, references, given = weights()
    there = tensors(3)
    for master, gradient in zip(masters, there, strict=True):
        master.grad = gradient.clone()
    assert Anchor(held(masters, references, given), strength=0.0)() == 0.0
    assert all(torch.equal(m.grad, g) for m, g in zip(masters, there, strict=True))


def test_neither_weights_nor_reference_nor_importance_are_moved_by_pulling() -> None:
    masters, references, given = weights()
    everything = [*masters, *references, *(i for i in given if i is not None)]
    before = [t.detach().clone() for t in everything]
    Anchor(held(masters, references, given), strength=0.5)()
    assert all(torch.equal(t, b) for t, b in zip(everything, before, strict=True))


def test_what_is_divided_by_is_divided_by() -> None:
    masters, references, given = weights()
    value, expected = autograd(masters, references, given, 0.25)
    torch.testing.assert_close(Anchor(held(masters, references, given), strength=1.0, divisor=4.0)(), value.float())
    torch.testing.assert_close(masters[0].grad, expected[0].float())


def test_a_weight_that_is_held_fast_has_no_gradient_afterwards() -> None:
    """Under gradual unfreezing its moments begin when it thaws, not when a pull of zero is added."""
    masters, references, given = weights()
    frozen = masters[1].detach().clone()
    parts = held(masters, references, given)
    parts[1] = AnchoredWeight(masters[1], references[1], given[1], parameter=frozen)
    value, _ = autograd(masters, references, given, 1.0)
    torch.testing.assert_close(Anchor(parts, strength=1.0)(), value.float())
    assert masters[1].grad is None and masters[0].grad is not None
    frozen.requires_grad_()
    Anchor(parts, strength=1.0)()
    assert masters[1].grad is not None


def test_bf16_storage_is_right_within_its_rounding() -> None:
    masters, references, given = weights()
    short = [r.bfloat16() for r in references], [i.bfloat16() for i in given if i is not None]
    value, expected = autograd(masters, *short, 2.0)  # of what is stored, it is exact
    torch.testing.assert_close(Anchor(held(masters, *short), strength=2.0)(), value.float())
    for master, gradient in zip(masters, expected, strict=True):
        torch.testing.assert_close(master.grad, gradient.float())
    rounded, _ = autograd(masters, references, short[1], 2.0)
    exact, _ = autograd(masters, references, given, 2.0)
    assert rounded == pytest.approx(exact, rel=2**-8)  # half a unit in the last of bf16's eight digits


def test_weights_that_do_not_lie_row_by_row_are_held_too() -> None:
    master = torch.randn(6, 4).T.requires_grad_()
    reference = torch.randn(4, 6)
    value, (expected,) = autograd([master], [reference], [None], 1.0)
    torch.testing.assert_close(Anchor([AnchoredWeight(master, reference)], strength=1.0)(), value.float())
    torch.testing.assert_close(master.grad, expected.float())


@pytest.mark.usefixtures("stretches")
def test_the_norm_of_the_pull_is_that_of_its_gradient() -> None:
    masters, references, given = weights()
    _, expected = autograd(masters, references, given, 1.0)
    norm = torch.cat([g.flatten() for g in expected]).norm()
    penalty = Anchor(held(masters, references, given), strength=7.0)
    torch.testing.assert_close(penalty.pull_norm(), norm)
    assert all(m.grad is None for m in masters)
    torch.testing.assert_close(AnchoredDecay(penalty.weights, strength=7.0, divisor=2.0).pull_norm(), norm / 2)


# -- decoupled --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("stretches")
@pytest.mark.parametrize("importance", [False, True], ids=["alike", "weighed"])
def test_a_decoupled_pull_is_rate_times_strength_times_importance_times_drift(importance: bool) -> None:
    masters, references, given = weights(importance=importance)
    parts = held(masters, references, given)
    parts[0] = AnchoredWeight(masters[0], references[0], given[0], rate_factor=0.5)
    before = [m.detach().clone() for m in masters]
    decay = AnchoredDecay(parts, strength=3.0)
    value, _ = autograd(masters, references, given, 3.0)
    torch.testing.assert_close(decay(), value.float())
    assert all(m.grad is None for m in masters)
    decay.decay(1e-2)
    for k, (master, start, reference, i) in enumerate(zip(masters, before, references, given, strict=True)):
        share = 1e-2 * (0.5 if k == 0 else 1.0) * 3.0 * (1.0 if i is None else i)
        torch.testing.assert_close(master.detach(), start - share * (start - reference))


def test_a_decoupled_pull_ends_at_the_reference() -> None:
    masters, references, given = weights()
    AnchoredDecay(held(masters, references, given), strength=1e9).decay(1.0)
    AnchoredDecay(held(masters, references, [None] * len(SHAPES)), strength=1e9).decay(1.0)
    for master, reference in zip(masters, references, strict=True):
        torch.testing.assert_close(master.detach(), reference, atol=1e-6, rtol=1e-6)


def test_a_decoupled_pull_of_zero_moves_nothing() -> None:
    masters, references, given = weights()
    before = [m.detach().clone() for m in masters]
    AnchoredDecay(held(masters, references, given), strength=0.0).decay(1.0)
    assert all(torch.equal(m, b) for m, b in zip(masters, before, strict=True))


# -- weights that a tuning changes ------------------------------------------------------------------------------------


def effective(tuning: LoraAdapter, name: str) -> Tensor:
    """A layer's weight with the update in it, by PEFT's own merging."""
    layer = tuning.model.get_submodule(name)
    base = layer.get_base_layer()
    before = base.weight.data.clone()
    layer.merge(adapter_names=tuning._adapter_names)
    merged = base.weight.data.clone()
    for adapter in tuning._adapter_names:
        layer.merged_adapters.remove(adapter)
    base.weight.data = before
    return merged - before


def tuned(form: str, make: Callable[[], PreTrainedModel]) -> LoraAdapter:
    model = make()
    tuning = attach(model, {"kind": "lora", "variant": form, "rank": 3})
    assert isinstance(tuning, LoraAdapter)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return tuning


def gpt2() -> PreTrainedModel:
    """Its linear layers are transposed."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16)).eval()


FORMS = ("lora", "rslora", "dora", "pissa")


def rebuilt(form: str, tuning: LoraAdapter, name: str, values: Sequence[Tensor]) -> Tensor:
    """The layer's change, written down anew from the papers, in double precision."""
    layer = tuning.model.get_submodule(name)
    scale = layer.scaling[tuning.adapter_name]
    a, b = values[:2]
    update = scale * b @ a
    transposed = isinstance(layer.get_base_layer(), nn.Linear) is False
    weight = layer.get_base_layer().weight.detach().double()
    weight = weight.T if transposed else weight
    if form == "dora":
        summed = weight + update
        update = values[2][:, None] * summed / summed.norm(dim=1, keepdim=True) - weight
    if form == "pissa":
        a0, b0 = (tuning._initial_factors[f"{name}.start_{part}.weight"].double() for part in "AB")
        update = update - scale * b0 @ a0
    return update.T if transposed else update


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", [make_llama, gpt2], ids=["linear", "transposed"])
def test_a_change_is_what_merging_adds(form: str, make: Callable[[], PreTrainedModel]) -> None:
    tuning = tuned(form, make)
    for name, moved in tuning.weight_deltas().items():
        layer = name.removesuffix(".base_layer.weight")
        delta = moved.weight_delta.delta([p.detach() for p in moved.parameters])
        assert tuple(delta.shape) == moved.shape
        torch.testing.assert_close(delta, effective(tuning, layer), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", [make_llama, gpt2], ids=["linear", "transposed"])
@pytest.mark.parametrize("importance", [False, True], ids=["l2-sp", "weighed"])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["start", "another reference"])
def test_the_chain_rule_is_that_of_autograd(
    form: str, make: Callable[[], PreTrainedModel], importance: bool, elsewhere: bool
) -> None:
    tuning = tuned(form, make)
    generator = torch.Generator().manual_seed(9)
    changed, exact, loss = [], [], torch.zeros((), dtype=torch.float64)
    for name, moved in tuning.weight_deltas().items():
        given = torch.rand(moved.shape, generator=generator) if importance else None
        offset = 0.01 * torch.randn(moved.shape, generator=generator) if elsewhere else None
        changed.append(AnchoredDelta(moved.weight_delta, moved.parameters, given, offset))
        values = [p.detach().double().requires_grad_() for p in moved.parameters]
        delta = rebuilt(form, tuning, name.removesuffix(".base_layer.weight"), values)
        delta = delta if offset is None else delta + offset
        loss = loss + 0.5 * 4.0 * (delta.square() * (1.0 if given is None else given)).sum()
        exact += zip(moved.parameters, values, strict=True)
    gradients = torch.autograd.grad(loss, [value for _, value in exact])
    told = Anchor([], changed, strength=12.0, divisor=3.0)()
    torch.testing.assert_close(told, loss.detach().float(), rtol=1e-4, atol=1e-6)
    for (parameter, _), gradient in zip(exact, gradients, strict=True):
        size = float(gradient.abs().max())
        torch.testing.assert_close(parameter.grad, gradient.float(), rtol=1e-3, atol=2e-5 * size)


@pytest.mark.parametrize("form", FORMS)
def test_an_untrained_tuning_costs_nothing(form: str) -> None:
    tuning = attach(make_llama(), {"kind": "lora", "variant": form, "rank": 3})
    changed = [AnchoredDelta(m.weight_delta, m.parameters) for m in tuning.weight_deltas().values()]
    assert float(Anchor([], changed, strength=1.0)()) < 1e-10


def test_a_subspace_is_pulled_by_its_effective_change() -> None:
    """The layer's own forward is the reference: with the identity as its input it gives the effective weight."""
    tuning = attach(make_llama(), {"kind": "osf"})
    generator = torch.Generator().manual_seed(5)
    for parameter in tuning.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    changed, loss = [], torch.zeros(())
    for name, moved in tuning.weight_deltas().items():
        layer = tuning.model.get_submodule(name.removesuffix(".base_layer.weight"))
        given = torch.rand(moved.shape, generator=generator)
        delta = layer(torch.eye(moved.shape[1])).T - layer.get_base_layer().weight
        torch.testing.assert_close(
            moved.weight_delta.delta([p.detach() for p in moved.parameters]), delta.detach(), atol=1e-5, rtol=1e-4
        )
        loss = loss + 0.5 * 4.0 * (delta.square() * given).sum()
        changed.append(AnchoredDelta(moved.weight_delta, moved.parameters, given))
    parameters = [p for m in tuning.weight_deltas().values() for p in m.parameters]
    gradients = torch.autograd.grad(loss, parameters)
    torch.testing.assert_close(Anchor([], changed, strength=4.0)(), loss.detach(), rtol=1e-4, atol=1e-6)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=3e-5 * float(gradient.abs().max()))


def test_a_pull_on_the_factors_themselves_would_be_caught() -> None:
    """The mutant: L2-SP of A and B as if they were weights of their own. B is zero at the start, A is not."""
    tuning = tuned("lora", make_llama)
    changed = [AnchoredDelta(m.weight_delta, m.parameters) for m in tuning.weight_deltas().values()]
    Anchor([], changed, strength=1.0)()
    first = tuning.weight_deltas()[next(iter(tuning.weight_deltas()))].parameters[1]
    assert not torch.allclose(first.grad, first.detach(), rtol=0.1)


# -- split over ranks -------------------------------------------------------------------------------------------------


@pytest.fixture
def mesh() -> Iterator[dist.DeviceMesh]:
    """One rank that works as in a group of many."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_split_masters_give_the_same(mesh: dist.DeviceMesh) -> None:
    plain, references, given = weights()
    split = [distribute_tensor(m.detach(), mesh, [Shard(0)]).requires_grad_() for m in plain]
    told = Anchor(held(split, references, given), strength=0.5)()
    assert torch.equal(told, Anchor(held(plain, references, given), strength=0.5)())
    for s, p in zip(split, plain, strict=True):
        assert isinstance(s.grad, DTensor)
        assert torch.equal(s.grad.full_tensor(), p.grad)
