"""Law: the chunked head loss is the plain cross-entropy of all logits, in value and in every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from postgrad.models.model import OutputHead
from postgrad.objectives.chunked_head_loss import WeightedLoss, linear_loss
from postgrad.objectives.next_token import CrossEntropy

TOKENS, WIDTH, VOCABULARY = 37, 12, 50
FORMS: list[dict[str, Any]] = [
    {},
    {"bias": True},
    {"logit_scale": 0.37},
    {"softcap": 2.5},
    {"bias": True, "logit_scale": 1.7, "softcap": 4.0},
]
Loss = Callable[..., Tensor]


def case(dtype: torch.dtype, *, bias: bool = False, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Hidden states, weight, labels (every third ignored, unevenly over the chunks) and perhaps a bias."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, WIDTH, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=draw)
    labels[::3] = -100
    labels[:9] = -100
    offset = torch.randn(VOCABULARY, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    return hidden, weight, labels, offset


def by_token(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias_V: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The chunked loss and each token's part of it; ignored tokens are dropped before the head."""
    head = OutputHead(weight, bias_V, logit_scale, softcap)
    trained = (labels != -100).nonzero().flatten()
    rule = CrossEntropy(labels[trained])
    loss, losses_1N = linear_loss(hidden.index_select(0, trained), head, [WeightedLoss(rule)], chunk)
    return loss, losses_1N.new_zeros(len(labels)).index_copy(0, trained, losses_1N[0])


def linear_cross_entropy(*args: Any, **options: Any) -> Tensor:
    return by_token(*args, **options)[0]


def plain(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias_V: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The definition: all logits at once."""
    logits = F.linear(hidden, weight, bias_V) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")


def compare(
    loss: Loss,
    *,
    chunk: int | None,
    form: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    rounding: float = 1e-6,
) -> None:
    """Value and gradients of `loss` against the definition in fp64, both divided by a count, as in a step."""
    form, count = dict(form), 19
    with_bias = form.pop("bias", False)
    hidden, weight, labels, bias = case(dtype, bias=with_bias)
    inputs = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    value = loss(hidden, weight, labels, bias_V=bias, chunk=chunk, **form)
    gradients = torch.autograd.grad(value / count, inputs)
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact_bias = exact_inputs[2] if with_bias else None
    exact = plain(exact_inputs[0], exact_inputs[1], labels, bias_V=exact_bias, **form)
    exact_gradients = torch.autograd.grad(exact / count, exact_inputs)
    assert value.dtype == dtype
    assert abs(value.item() - exact.item()) <= rounding * abs(exact.item())
    for ours, theirs in zip(gradients, exact_gradients, strict=True):
        assert (ours.double() - theirs).norm() <= rounding * theirs.norm()


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("chunk", [1, 5, 16, 37, 1000, None])
def test_equals_cross_entropy_of_all_logits(form: dict[str, Any], chunk: int | None) -> None:
    compare(linear_cross_entropy, chunk=chunk, form=form)
    compare(linear_cross_entropy, chunk=chunk, form=form, dtype=torch.float64, rounding=1e-13)


def mean_of_chunk_means(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    chunk = options.pop("chunk") or len(hidden)
    pieces = list(zip(hidden.split(chunk), labels.split(chunk), strict=True))
    pieces = [(h, y) for h, y in pieces if (y != -100).any()]
    means = [linear_cross_entropy(h, weight, y, **options) / (y != -100).sum() for h, y in pieces]
    return torch.stack(means).mean() * (labels != -100).sum()


def ignored_labels_counted(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return linear_cross_entropy(hidden, weight, labels.clamp(min=0), **options)


def weight_gradient_of_the_last_chunk(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    chunk = options.pop("chunk") or len(hidden)
    pieces = list(zip(hidden.split(chunk), labels.split(chunk), strict=True))
    heads = [weight.detach()] * (len(pieces) - 1) + [weight]
    return sum(
        (linear_cross_entropy(h, w, y, **options) for (h, y), w in zip(pieces, heads, strict=True)),
        start=torch.zeros(()),
    )


def scale_after_the_cap(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    scale, cap = options.pop("logit_scale", 1.0), options.pop("softcap", None)
    return linear_cross_entropy(
        hidden, weight, labels, logit_scale=scale, softcap=None if cap is None else cap * scale, **options
    )


@pytest.mark.parametrize(
    "mutant",
    [mean_of_chunk_means, ignored_labels_counted, weight_gradient_of_the_last_chunk, scale_after_the_cap],
    ids=lambda mutant: mutant.__name__,
)
def test_the_law_catches(mutant: Loss) -> None:
    with pytest.raises(AssertionError):
        compare(mutant, chunk=16, form=FORMS[-1])


def test_all_labels_ignored_is_zero_with_zero_gradients() -> None:
    hidden, weight, labels, _ = case(torch.float32)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[200.0], [-200.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    labels = torch.tensor([1, 1])
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert loss.item() == pytest.approx(400.0)
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(weight.grad).all()


def test_bf16_hidden_and_fp32_weight_stay_within_bf16_rounding() -> None:
    hidden, weight, labels, _ = case(torch.float32)
    low = hidden.detach().bfloat16().requires_grad_()
    exact = torch.autograd.grad(plain(low.float(), weight.bfloat16().float(), labels) / 19, (low, weight))
    loss = linear_cross_entropy(low, weight, labels, chunk=16)
    ours = torch.autograd.grad(loss / 19, (low, weight))
    assert [gradient.dtype for gradient in ours] == [torch.bfloat16, torch.float32]
    assert loss.item() == pytest.approx(plain(low.float(), weight, labels).item(), rel=2**-8)
    for gradient, reference in zip(ours, exact, strict=True):
        assert (gradient.float() - reference.float()).norm() <= 2**-7 * reference.float().norm()


def test_the_divisor_is_not_rounded_to_bf16() -> None:
    """0.7515 in bf16 is 0.75: every gradient off by 0.2 % in one direction, which is a bias and not noise."""
    hidden, weight, labels, _ = case(torch.bfloat16)
    for tensor in (hidden, weight):
        (once,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), tensor)
        (scaled,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels) * 0.7515, tensor)
        ratio = scaled.double().abs().sum() / once.double().abs().sum()
        assert ratio.item() == pytest.approx(0.7515, abs=5e-4)


def test_parts_of_the_tokens_add_up_and_have_no_gradient() -> None:
    hidden, weight, labels, _ = case(torch.float32)
    loss, losses = by_token(hidden, weight, labels, chunk=16)
    logits = F.linear(hidden, weight)
    expected = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-6, atol=1e-6)
    assert losses.sum().item() == pytest.approx(loss.item(), rel=1e-6)
    assert loss.requires_grad
    assert not losses.requires_grad


def test_one_chunk_of_logits_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor is ever as large as all logits; the mutant is the definition itself."""
    hidden, weight, labels, _ = case(torch.float32)
    labels = labels.clamp(min=0)

    def largest(loss: Loss) -> int:
        sizes: list[int] = []

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                out = func(*args, **(kwargs or {}))
                sizes.extend(
                    t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor)
                )
                return out

        with Watch():
            loss(hidden, weight, labels, chunk=16)
        return max(sizes)

    assert largest(linear_cross_entropy) <= 16 * VOCABULARY
    assert largest(plain) == TOKENS * VOCABULARY


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own
def test_works_inside_a_compiled_caller() -> None:
    hidden, weight, labels, _ = case(torch.float32)

    @torch.compile(backend="eager")
    def objective(hidden: Tensor) -> Tensor:
        return linear_cross_entropy(hidden * 2, weight, labels) / 3

    compiled = objective(hidden)
    eager = linear_cross_entropy(hidden * 2, weight, labels) / 3
    assert torch.equal(compiled, eager)
    assert torch.equal(*(torch.autograd.grad(loss, hidden)[0] for loss in (compiled, eager)))


def test_under_autocast_the_products_are_low_precision_and_the_loss_is_not() -> None:
    hidden, weight, labels, _ = case(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == linear_cross_entropy(hidden.bfloat16(), weight, labels).item()
    assert [g.dtype for g in torch.autograd.grad(loss, (hidden, weight))] == [torch.float32, torch.float32]


def test_without_gradients_only_the_loss_is_computed() -> None:
    hidden, weight, labels, _ = case(torch.float32)
    with torch.no_grad():
        silent = linear_cross_entropy(hidden, weight, labels)
    assert not silent.requires_grad
    assert silent.item() == linear_cross_entropy(hidden, weight, labels).item()


def test_a_second_backward_says_what_to_do() -> None:
    hidden, weight, labels, _ = case(torch.float32)
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call the loss again"):
        loss.backward()


def test_a_label_beyond_the_vocabulary_is_an_error() -> None:
    hidden, weight, labels, _ = case(torch.float32)
    with pytest.raises((IndexError, RuntimeError)):
        linear_cross_entropy(hidden, weight, labels.where(labels == -100, VOCABULARY))
