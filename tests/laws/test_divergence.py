"""Laws of distillation: each divergence and its gradient against a plain definition in fp64, and what a cache may leave out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from postgrad.data.loading.batch import TeacherTargets
from postgrad.models.model import OutputHead
from postgrad.objectives import kl_divergence as module
from postgrad.objectives.chunked_head_loss import WeightedLoss, linear_loss
from postgrad.objectives.next_token import CrossEntropy

N, D, E, V = 23, 8, 11, 37
HEADS: list[dict[str, Any]] = [
    {},
    {"bias": True},
    {"scale": 0.4},
    {"softcap": 2.5},
    {"bias": True, "scale": 1.6, "softcap": 4.0},
]


def linear_divergence(
    student: Tensor,
    head: OutputHead,
    teacher: Tensor,
    teacher_head: OutputHead,
    *,
    direction: Any = "forward",
    temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The summed divergence, and each token's part of it."""
    rule = module.Divergence(teacher, teacher_head, direction, temperature)
    loss, losses_1N = linear_loss(student, head, [WeightedLoss(rule)], chunk)
    return loss, losses_1N[0]


def linear_sparse_divergence(
    student: Tensor, head: OutputHead, teacher: TeacherTargets, *, temperature: float = 1.0, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """The same from a cached teacher."""
    rule = module.SparseDivergence(teacher, temperature)
    loss, losses_1N = linear_loss(student, head, [WeightedLoss(rule)], chunk)
    return loss, losses_1N[0]


def head_of(
    width: int, draw: torch.Generator, *, bias: bool = False, scale: float = 1.0, softcap: float | None = None
) -> OutputHead:
    weight = torch.randn(V, width, generator=draw, dtype=torch.float64).requires_grad_()
    return OutputHead(
        weight, torch.randn(V, generator=draw, dtype=torch.float64).requires_grad_() if bias else None, scale, softcap
    )


def case(seed: int = 0, **form: Any) -> tuple[Tensor, OutputHead, Tensor, OutputHead]:
    """A student, and a teacher of another width and another head."""
    draw = torch.Generator().manual_seed(seed)
    student = torch.randn(N, D, generator=draw, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(N, E, generator=draw, dtype=torch.float64)
    return student, head_of(D, draw, **form), teacher, head_of(E, draw, **form)


def plain(q_NV: Tensor, p_NV: Tensor, direction: str, temperature: float) -> Tensor:
    """T^2 KL at temperature T, written as it is defined."""
    log_q, log_p = (z.div(temperature).log_softmax(-1) for z in (q_NV, p_NV))
    if direction == "reverse":
        log_q, log_p = log_p, log_q
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum()


def plain_without_labels(q_NV: Tensor, p_NV: Tensor, labels_N: Tensor, direction: str, temperature: float) -> Tensor:
    """The divergence over the tokens that are not the label, one token after another."""
    others = [[i for i in range(V) if i != label] for label in labels_N.tolist()]
    parts = [plain(q[keep], p[keep], direction, temperature) for q, p, keep in zip(q_NV, p_NV, others, strict=True)]
    return torch.stack(parts).sum()


def gradients(loss: Tensor, hidden: Tensor, head: OutputHead) -> list[Tensor]:
    inputs = [t for t in (hidden, head.weight_VD, head.bias_V) if t is not None]
    return list(torch.autograd.grad(loss / 7, inputs))


@pytest.mark.parametrize("form", HEADS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_divergences_and_gradients_are_those_of_the_definition(direction: Any, temperature: float, form: dict) -> None:
    student, head, teacher, teacher_head = case(**form)
    loss, losses_N = linear_divergence(
        student, head, teacher, teacher_head, direction=direction, temperature=temperature, chunk=5
    )
    exact = plain(head.logits(student), teacher_head.logits(teacher).detach(), direction, temperature)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-12)
    assert losses_N.sum().item() == pytest.approx(exact.item(), rel=1e-12) and not losses_N.requires_grad
    for ours, theirs in zip(gradients(loss, student, head), gradients(exact, student, head), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", HEADS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("mutant", [None, "shifted label", "whole vocabulary"])
def test_a_divergence_without_labels_ignores_their_probability(
    mutant: str | None, direction: Any, temperature: float, form: dict
) -> None:
    student, head, teacher, teacher_head = case(**form)
    labels_N = torch.randint(V, (N,), generator=torch.Generator().manual_seed(3))
    excluded_N = {None: labels_N, "shifted label": (labels_N + 1) % V, "whole vocabulary": None}[mutant]
    rule = module.Divergence(teacher, teacher_head, direction, temperature, excluded_N=excluded_N)
    loss, _ = linear_loss(student, head, [WeightedLoss(rule, 1.5), WeightedLoss(CrossEntropy(labels_N))], chunk=5)
    logits, teacher_logits = head.logits(student), teacher_head.logits(teacher).detach()
    exact = 1.5 * plain_without_labels(logits, teacher_logits, labels_N, direction, temperature)
    exact = exact + torch.nn.functional.cross_entropy(logits, labels_N, reduction="sum")
    pairs = zip(gradients(loss, student, head), gradients(exact, student, head), strict=True)
    is_equal = loss.item() == pytest.approx(exact.item(), rel=1e-12) and all(
        torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12) for ours, theirs in pairs
    )
    assert is_equal == (mutant is None)


@pytest.mark.parametrize("mutant", ["directions swapped", "no T^2"])
def test_a_wrong_divergence_would_be_caught(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if mutant == "directions swapped":
        monkeypatch.setitem(module._DIVERGENCES, "forward", module._reverse_divergence)
    else:

        class NoSquare(module.Divergence):
            def compute_block(self, *args: Any) -> Tensor:
                return super().compute_block(*args) / self.temperature**2

        monkeypatch.setattr(module, "Divergence", NoSquare)
    with pytest.raises(AssertionError):
        test_divergences_and_gradients_are_those_of_the_definition("forward", 2.5, {})


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_teacher_that_is_the_student_teaches_nothing(direction: Any, dtype: torch.dtype) -> None:
    student, head, _, _ = case(bias=True, softcap=3.0)
    student = student.detach().to(dtype).requires_grad_()
    head = OutputHead(head.weight_VD.detach().to(dtype).requires_grad_(), head.bias_V, head.scale, head.softcap)
    loss, _ = linear_divergence(student, head, student.detach(), head, direction=direction, temperature=1.7)
    assert abs(loss.item()) < N * 1e-5
    for gradient in gradients(loss, student, head):
        assert not gradient.any()  # exactly: p - q, or q times log(q / p), is 0 wherever p = q


def whole(p_NV: Tensor) -> TeacherTargets:
    """A teacher who tells every id."""
    ids = torch.arange(V).repeat(len(p_NV))
    return TeacherTargets(
        ids, p_NV.flatten(), np.arange(1, len(p_NV) + 1) * V, torch.zeros(len(p_NV), dtype=p_NV.dtype), None
    )


def top(p_NV: Tensor, k: int) -> TeacherTargets:
    weights, ids = p_NV.topk(k)
    return TeacherTargets(ids.flatten(), weights.flatten(), np.arange(1, len(p_NV) + 1) * k, 1 - weights.sum(1), None)


def drawn(p_NV: Tensor, draws: int, temper: float, seed: int) -> TeacherTargets:
    """Ids drawn with numpy alone from p^temper, weighted back."""
    rng = np.random.default_rng(seed)
    p = p_NV.numpy()
    t = p**temper / (p**temper).sum(1, keepdims=True)
    counts = np.stack([rng.multinomial(draws, row) for row in t])
    rows, ids = counts.nonzero()
    weights = counts[rows, ids] / draws * p[rows, ids] / t[rows, ids]
    entropy = -(p * np.log(p)).sum(1)
    ends = np.cumsum((counts > 0).sum(1))
    return TeacherTargets(torch.from_numpy(ids), torch.from_numpy(weights), ends, None, torch.from_numpy(entropy))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("form", HEADS[::4], ids=str)
def test_all_ids_told_are_the_teacher_himself(form: dict[str, Any], temperature: float) -> None:
    student, head, teacher, teacher_head = case(**form)
    p = teacher_head.logits(teacher).div(temperature).softmax(-1).detach()
    loss, losses_N = linear_sparse_divergence(student, head, whole(p), temperature=temperature, chunk=5)
    exact, each_N = linear_divergence(student, head, teacher, teacher_head, temperature=temperature)
    assert torch.allclose(losses_N, each_N, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(gradients(loss, student, head), gradients(exact, student, head), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_tail_bucket_has_the_gradient_of_its_formula_and_of_finite_differences(temperature: float) -> None:
    """q - p on K; q (1 - p' / q') elsewhere."""
    logits = torch.randn(N, V, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    p = torch.randn(N, V, generator=torch.Generator().manual_seed(4), dtype=torch.float64).mul(2).softmax(-1)
    told, identity = top(p, 4), OutputHead(torch.eye(V, dtype=torch.float64))
    loss, _ = linear_sparse_divergence(logits, identity, told, temperature=temperature)
    (ours,) = torch.autograd.grad(loss, logits)
    q = (logits.detach() / temperature).softmax(-1)
    inside = torch.zeros(N, V, dtype=torch.bool).scatter_(1, told.ids_E.view(N, 4), True)
    rest_q = q.masked_fill(inside, 0).sum(1, keepdim=True)
    assert told.rest_mass_N is not None
    formula = torch.where(inside, q - p, q * (1 - told.rest_mass_N[:, None] / rest_q))
    assert torch.allclose(ours, temperature * formula, rtol=1e-9, atol=1e-13)
    step = 1e-5
    for place in ((0, int(told.ids_E[0])), (5, 11), (9, int(told.ids_E[37])), (22, 36)):
        moved = [logits.detach().clone() for _ in range(2)]
        moved[0][place] += step
        moved[1][place] -= step
        up, down = (linear_sparse_divergence(z, identity, told, temperature=temperature)[0].item() for z in moved)
        assert (up - down) / (2 * step) == pytest.approx(ours[place].item(), abs=1e-8)


def test_top_k_is_a_lower_bound_and_is_zero_for_a_student_with_the_same_masses() -> None:
    student, head, teacher, teacher_head = case()
    p = teacher_head.logits(teacher).softmax(-1).detach()
    exact, _ = linear_divergence(student, head, teacher, teacher_head)
    bounds = [linear_sparse_divergence(student, head, top(p, k))[0].item() for k in (1, 4, 16, V)]
    assert bounds == sorted(bounds) and bounds[-1] == pytest.approx(exact.item(), rel=1e-10)
    identity = OutputHead(torch.eye(V, dtype=torch.float64))
    assert linear_sparse_divergence(p.log(), identity, top(p, 5))[0].item() == pytest.approx(0, abs=1e-12)


def sampled_error(temper: float, weighted: Callable[[TeacherTargets], TeacherTargets]) -> tuple[float, float]:
    """How far the mean of many draws' gradients and losses is from the whole teacher's, in standard errors."""
    student, head, teacher, teacher_head = case()
    p = teacher_head.logits(teacher).softmax(-1).detach()
    exact, _ = linear_divergence(student, head, teacher, teacher_head)
    (wanted,) = torch.autograd.grad(exact, student)
    found, losses = [], []
    for seed in range(300):
        loss, _ = linear_sparse_divergence(student, head, weighted(drawn(p, 20, temper, seed)))
        found.append(torch.autograd.grad(loss, student)[0])
        losses.append(loss.item())
    stacked = torch.stack(found)
    z = (stacked.mean(0) - wanted) / (stacked.std(0) / len(found) ** 0.5)
    spread = float(np.std(losses)) / len(losses) ** 0.5
    return z.square().mean().sqrt().item(), abs(float(np.mean(losses)) - exact.item()) / spread


@pytest.mark.parametrize("temper", [1.0, 0.8])
def test_drawn_ids_are_without_bias(temper: float) -> None:
    gradient, loss = sampled_error(temper, lambda told: told)
    assert gradient < 1.3 and loss < 3.5


def test_biased_draws_would_be_caught() -> None:
    """The mutants: ids of a tempered proposal taken at their counts, and top-k renormalised."""

    def unweighted(told: TeacherTargets) -> TeacherTargets:
        counts = torch.from_numpy(np.diff(np.concatenate(([0], told.ends_N))))
        return told._replace(weights_E=torch.repeat_interleave(1.0 / counts.double(), counts))

    gradient, _ = sampled_error(0.8, unweighted)
    assert gradient > 3
    student, head, teacher, teacher_head = case()
    p = teacher_head.logits(teacher).softmax(-1).detach()
    told = top(p, 4)
    assert told.rest_mass_N is not None
    mass = (1 - told.rest_mass_N).repeat_interleave(4)
    renormalised = told._replace(weights_E=told.weights_E / mass, rest_mass_N=torch.zeros(N, dtype=torch.float64))
    wanted = torch.autograd.grad(linear_sparse_divergence(student, head, told)[0], student)[0]
    biased = torch.autograd.grad(linear_sparse_divergence(student, head, renormalised)[0], student)[0]
    assert (biased - wanted).norm() > 0.2 * wanted.norm()


def test_no_logits_are_held_beyond_a_chunk() -> None:
    """Of a head so wide that all logits of either side would be 80 MB, no tensor of nearly that size is made."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel() * tensor.element_size())
            return out

    weight = torch.zeros(20_000, 4)
    hidden = torch.randn(1000, 4, requires_grad=True)
    with Watch():
        loss, _ = linear_divergence(hidden, OutputHead(weight), torch.randn(1000, 4), OutputHead(weight), chunk=50)
        loss.backward()
    assert largest <= 50 * 20_000 * 4


def together(weights: list[float], *, temperature: float, form: dict[str, Any]) -> tuple[Tensor, list[Tensor], Tensor]:
    """Cross-entropy, both divergences and both sorts of cache in one pass; what half of them says is partly missing."""
    student, head, teacher, teacher_head = case(**form)
    p = teacher_head.logits(teacher).div(temperature).softmax(-1).detach()
    labels, has = torch.arange(N) % V, torch.arange(N) % 3 > 0
    few = drawn(p, 20, 1.0, 0)
    counts = np.diff(few.ends_N, prepend=0)
    kept = torch.from_numpy(np.repeat(has.numpy(), counts))
    gappy = few._replace(
        ids_E=few.ids_E[kept], weights_E=few.weights_E[kept], ends_N=np.cumsum(np.where(has.numpy(), counts, 0))
    )
    rules = [
        CrossEntropy(labels),
        module.Divergence(teacher, teacher_head, "forward", temperature),
        module.Divergence(teacher, teacher_head, "reverse", temperature, has),
        module.SparseDivergence(top(p, 4), temperature),
        module.SparseDivergence(gappy, temperature),
    ]
    weighted = [WeightedLoss(rule, weight) for rule, weight in zip(rules, weights, strict=True)]  # type: ignore[arg-type]
    loss, losses_JN = linear_loss(student, head, weighted, 5)
    return losses_JN, gradients(loss, student, head), has


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("form", HEADS[::4], ids=str)
def test_in_one_pass_they_are_the_weighted_sum_of_each_alone(form: dict[str, Any], temperature: float) -> None:
    weights = [0.7, 1.5, 0.2, 2.0, 0.4]
    losses_JN, found, has = together(weights, temperature=temperature, form=form)
    wanted = None
    for j, weight in enumerate(weights):
        alone_JN, alone, _ = together([weight if i == j else 0.0 for i in range(5)], temperature=temperature, form=form)
        assert torch.equal(alone_JN, losses_JN)
        wanted = alone if wanted is None else [a + b for a, b in zip(wanted, alone, strict=True)]
    assert wanted is not None
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)
    # Where nothing is said there is no loss.
    assert not losses_JN[2, ~has].any() and not losses_JN[4, ~has].any() and losses_JN[2, has].all()
