"""Importance: the Fisher information of closed forms and of exact sums over all labels, the others by autograd."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from postgrad.data.layouts.rows import IGNORED
from postgrad.data.loading.batch import Batch
from postgrad.data.problem_type import ProblemType
from postgrad.evaluation import fisher as module
from postgrad.evaluation.fisher import (
    ImportanceEstimate,
    ImportanceMeasure,
    empirical_fisher_measure,
    estimate_importance,
    fisher_measure,
    mas_measure,
    sample_labels,
    squared_norm,
)
from postgrad.models.model import CausalModel, Model, Output, OutputHead
from postgrad.objectives.classification_loss import ClassificationLoss
from postgrad.objectives.next_token import TokenLoss
from tests.conftest import make_llama


class Linear(Model):
    """Features that are handed in, and one layer: as a head over a vocabulary, or as a task layer."""

    def __init__(self, features: int, outputs: int, *, head: bool, seed: int = 0) -> None:
        torch.manual_seed(seed)
        layer: Any = nn.Linear(features, outputs, bias=False)
        super().__init__(layer)
        self.as_head = head

    @property
    def weight(self) -> Tensor:
        return self.pretrained.weight  # type: ignore[return-value]

    def forward(self, **inputs: Tensor) -> Output:
        x = inputs["x"]
        return Output(x, OutputHead(self.weight)) if self.as_head else Output(x @ self.weight.T, None)


def batch_of(inputs: dict[str, Tensor], labels: Tensor) -> Batch:
    counted = (
        (labels != IGNORED).reshape(len(labels), -1).sum(1)
        if not labels.is_floating_point()
        else torch.ones(len(labels))
    )
    return Batch(inputs, labels, np.zeros(len(labels), np.int64), counted.long().numpy())


def found(
    model: Model, batches: Sequence[Batch], measure: ImportanceMeasure, most: int | None = None
) -> ImportanceEstimate:
    *_, last = estimate_importance(model, batches, measure, most or sum(b.label_count for b in batches))
    assert isinstance(last, ImportanceEstimate)
    return last


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear_case(head: bool = True) -> tuple[Linear, Tensor]:
    """A linear-softmax model over five classes, and 40 features of rows."""
    model = Linear(3, 5, head=head)
    return model, torch.randn(8, 5, 3, generator=seeded(1))


def closed_form(weight_CD: Tensor, x_ND: Tensor) -> Tensor:
    """E p (1 - p) x^2: the diagonal Fisher information of softmax(W x)."""
    p_NC = (x_ND @ weight_CD.T).softmax(-1)
    return ((p_NC - p_NC.square()).T @ x_ND.square()) / len(x_ND)


def test_fisher_is_the_closed_form_of_a_linear_softmax() -> None:
    model, x_BTD = linear_case()
    labels = torch.randint(0, 5, x_BTD.shape[:2], generator=seeded(2))
    batches = [batch_of({"x": x_BTD}, labels)] * 2000
    told = found(model, batches, fisher_measure(TokenLoss(), ProblemType.CLASS, seeded()))
    expected = closed_form(model.weight.detach(), x_BTD.flatten(0, 1))
    assert told.labels == 2000 * 40
    torch.testing.assert_close(told.tensors["weight"], expected, rtol=0.15, atol=0.02)
    assert float(told.tensors["weight"].sum() / expected.sum()) == pytest.approx(1.0, abs=0.03)


def test_the_square_of_a_batch_gradient_of_data_labels_would_be_caught() -> None:
    """The mutant: at an optimum it is about zero, whatever the weights matter; ours is not."""
    model, x_BTD = linear_case()
    labels = torch.randint(0, 5, x_BTD.shape[:2], generator=seeded(2))
    batch = batch_of({"x": x_BTD}, labels)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = TokenLoss()(model(x=x_BTD), batch)[0]
        loss.backward()
        return loss

    optimizer.step(closure)
    exact = closed_form(model.weight.detach(), x_BTD.flatten(0, 1))
    wrong = ImportanceMeasure(empirical_fisher_measure(TokenLoss()).objective, squared=True, batched=True)
    assert float(found(model, [batch], wrong).tensors["weight"].sum()) < 1e-6 * float(exact.sum())
    ours = found(model, [batch] * 1000, fisher_measure(TokenLoss(), ProblemType.CLASS, seeded()))
    assert ours.mean == pytest.approx(float(exact.mean()), rel=0.05)


def tiny_lm() -> tuple[CausalModel, Batch]:
    """A language model of six tokens, and two rows of four places, one of them without a label."""
    model = CausalModel(
        make_llama(vocab_size=6, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_key_value_heads=1)
    )
    ids = torch.tensor([[1, 2, 3, 4], [5, 4, 3, 2]])
    labels = torch.tensor([[2, 3, 4, 5], [4, 3, IGNORED, 1]])
    positions = torch.arange(4).expand_as(ids)
    return model, batch_of({"input_ids": ids, "position_ids": positions}, labels)


def exact_fisher(model: CausalModel, batch: Batch) -> dict[str, Tensor]:
    """The sum over places of E_y (d log p(y) / d w)^2, every label of every place by itself."""
    logits = model.pretrained(**batch.inputs, use_cache=False).logits.log_softmax(-1)
    names, weights = zip(*model.pretrained.named_parameters(), strict=True)
    sums = [torch.zeros_like(p) for p in weights]
    for place in (batch.labels != IGNORED).nonzero().tolist():
        for token in range(6):
            said = logits[*place, token]
            for total, gradient in zip(sums, torch.autograd.grad(said, weights, retain_graph=True), strict=True):
                total += said.exp().detach() * gradient.square()
    return dict(zip(names, [s.detach() / batch.label_count for s in sums], strict=True))


def test_fisher_of_a_language_model_is_the_sum_over_all_labels() -> None:
    model, batch = tiny_lm()
    exact = exact_fisher(model, batch)
    told = found(model, [batch] * 800, fisher_measure(TokenLoss(), ProblemType.CLASS, seeded()))
    assert told.tensors.keys() == exact.keys()
    for name, expected in exact.items():
        off = (told.tensors[name] - expected).norm() / expected.norm()
        assert off < 0.2, name
    assert told.mean == pytest.approx(float(torch.cat([e.flatten() for e in exact.values()]).mean()), rel=0.06)


def test_in_the_square_of_a_sum_the_cross_terms_vanish() -> None:
    """Without any draw: every combination of labels of a row, weighed by its probability."""
    model, batch = tiny_lm()
    row = Batch(
        {k: v[:1, :2] for k, v in batch.inputs.items()}, batch.labels[:1, :2], batch.source_B[:1], np.array([2])
    )
    exact = exact_fisher(model, row)
    shares = model.pretrained(**row.inputs, use_cache=False).logits[0].softmax(-1).detach()
    expected = {name: torch.zeros_like(t) for name, t in exact.items()}
    for drawn in itertools.product(range(6), repeat=2):
        labels = torch.tensor([drawn])
        loss = TokenLoss()(model(**row.inputs), Batch(row.inputs, labels, row.source_B, row.label_count_B))[0]
        chance = shares[0, drawn[0]] * shares[1, drawn[1]]
        for (name, _), gradient in zip(
            model.pretrained.named_parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            expected[name] += chance * gradient.square() / 2
    for name in exact:
        torch.testing.assert_close(expected[name], exact[name], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("at_once", [1 << 24, 6], ids=["at once", "place by place"])
def test_labels_are_drawn_as_the_model_says(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", at_once)
    model, batch = tiny_lm()
    with torch.no_grad():
        output = model(**batch.inputs)
        shares = output.logits().softmax(-1)
    counts = torch.zeros(2, 4, 6)
    generator = seeded()
    for _ in range(4000):
        drawn = sample_labels(output, batch.labels, ProblemType.CLASS, generator)
        assert ((drawn == IGNORED) == (batch.labels == IGNORED)).all()
        counts += nn.functional.one_hot(drawn.clamp(min=0), 6) * (drawn != IGNORED)[..., None]
    kept = batch.labels != IGNORED
    assert torch.allclose(counts[kept] / 4000, shares[kept], atol=0.03)


def test_fisher_of_tags_and_classes() -> None:
    for problem, shape in (("class", (40,)), ("tags", (8, 5))):
        model, x_BTD = linear_case(head=False)
        x = x_BTD.reshape(*shape, 3)
        batch = batch_of({"x": x}, torch.zeros(shape, dtype=torch.long))
        loss = ClassificationLoss(problem)  # type: ignore[arg-type]
        told = found(model, [batch] * 2000, fisher_measure(loss, problem, seeded()))
        expected = closed_form(model.weight.detach(), x_BTD.flatten(0, 1))
        torch.testing.assert_close(told.tensors["weight"], expected, rtol=0.15, atol=0.01)


def test_fisher_of_several_classes_is_the_curvature_of_their_mean() -> None:
    model, x_BTD = linear_case(head=False)
    x = x_BTD.flatten(0, 1)
    batch = batch_of({"x": x}, torch.zeros(40, 5))
    told = found(
        model,
        [batch] * 3000,
        fisher_measure(ClassificationLoss(ProblemType.MULTI_LABEL), ProblemType.MULTI_LABEL, seeded(), scale=5),
    )
    p_NC = (x @ model.weight.detach().T).sigmoid()
    curvature = (p_NC * (1 - p_NC)).T @ x.square() / 40 / 5
    torch.testing.assert_close(told.tensors["weight"], curvature, rtol=0.15, atol=0.003)


def test_fisher_of_a_number_is_the_curvature_of_the_squared_error() -> None:
    model = Linear(3, 1, head=False)
    x = torch.randn(40, 3, generator=seeded(1))
    batch = batch_of({"x": x}, torch.zeros(40))
    told = found(
        model, [batch] * 4000, fisher_measure(ClassificationLoss(ProblemType.NUMBER), ProblemType.NUMBER, seeded())
    )
    torch.testing.assert_close(told.tensors["weight"][0], 2 * x.square().mean(0), rtol=0.1, atol=0.0)


# -- sample by sample -------------------------------------------------------------------------------------------------


def samples() -> tuple[CausalModel, list[Batch]]:
    """Rows of one sample each."""
    model, batch = tiny_lm()
    parts = [slice(i, i + 1) for i in range(2)]
    rows = [
        Batch({k: v[i] for k, v in batch.inputs.items()}, batch.labels[i], batch.source_B[i], batch.label_count_B[i])
        for i in parts
    ]
    return model, rows


def gradients(model: CausalModel, worth: Tensor) -> dict[str, Tensor]:
    names, weights = zip(*model.pretrained.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(worth, weights), strict=True))


def test_mas_is_the_size_of_each_samples_gradient() -> None:
    model, rows = samples()
    told = found(model, rows, mas_measure())
    norms = [
        (model.pretrained(**row.inputs, use_cache=False).logits[row.labels != IGNORED]).square().sum() for row in rows
    ]
    each = [gradients(model, norm) for norm in norms]
    for name, tensor in told.tensors.items():
        torch.testing.assert_close(tensor, sum(g[name].abs() for g in each) / 7, rtol=1e-4, atol=1e-7)
    signed = sum(each[0][name] + each[1][name] for name in ["model.layers.0.mlp.up_proj.weight"]) / 7
    assert not torch.allclose(told.tensors["model.layers.0.mlp.up_proj.weight"], signed.abs(), rtol=0.05)  # the mutant


def test_the_norm_in_chunks_is_that_of_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_lm()
    wholes = []
    for at_once in (1 << 24, 12):
        monkeypatch.setattr(module, "_LOGITS_AT_ONCE", at_once)
        norm = squared_norm(model(**batch.inputs), batch)
        wholes.append((norm.detach(), gradients(model, norm)))
    assert wholes[0][0] == pytest.approx(float(wholes[1][0]))
    for name, gradient in wholes[0][1].items():
        torch.testing.assert_close(wholes[1][1][name], gradient, rtol=1e-4, atol=1e-6)


def test_the_empirical_one_squares_each_samples_gradient() -> None:
    model, rows = samples()
    told = found(model, rows, empirical_fisher_measure(TokenLoss()))
    each = [gradients(model, TokenLoss()(model(**row.inputs), row)[0]) for row in rows]
    for name, tensor in told.tensors.items():
        torch.testing.assert_close(tensor, sum(g[name].square() for g in each) / 7, rtol=1e-4, atol=1e-8)


# -- how it goes on ---------------------------------------------------------------------------------------------------


def test_the_halves_agree_more_and_more_and_their_error_is_honest() -> None:
    model, x_BTD = linear_case()
    batch = batch_of({"x": x_BTD}, torch.zeros(8, 5, dtype=torch.long))
    told = found(model, [batch] * 640, fisher_measure(TokenLoss(), ProblemType.CLASS, seeded()))
    assert [row["labels"] for row in told.convergence] == [40 * 640 // 2**i for i in (4, 3, 2, 1, 0)]
    errors = [row["error"] for row in told.convergence]
    assert errors[0] > errors[-1] and told.convergence[-1]["correlation"] > told.convergence[0]["correlation"]
    expected = closed_form(model.weight.detach(), x_BTD.flatten(0, 1))
    true = float((told.tensors["weight"] - expected).norm() / expected.norm())
    assert true / 4 < errors[-1] < 4 * true


def test_it_stops_at_the_labels_that_were_asked_for_and_leaves_the_model_as_it_was() -> None:
    model, batch = tiny_lm()
    model.pretrained.model.norm.requires_grad_(False)
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in model.pretrained.named_parameters()}

    def endless() -> Iterator[Batch]:
        while True:
            yield batch

    steps = list(estimate_importance(model, endless(), fisher_measure(TokenLoss(), ProblemType.CLASS, seeded()), 30))
    assert steps[:-1] == [7, 14, 21, 28, 35]
    assert isinstance(steps[-1], ImportanceEstimate) and steps[-1].labels == 35
    for name, p in model.pretrained.named_parameters():
        assert torch.equal(p, before[name][0]) and p.requires_grad == before[name][1] and p.grad is None
    assert float(steps[-1].tensors["model.norm.weight"].sum()) > 0


def test_the_same_seed_gives_the_same_bits() -> None:
    model, batch = tiny_lm()
    one, two, other = (
        found(model, [batch] * 3, fisher_measure(TokenLoss(), ProblemType.CLASS, seeded(s))) for s in (0, 0, 1)
    )
    name = "model.norm.weight"
    assert torch.equal(one.tensors[name], two.tensors[name])
    assert not torch.equal(one.tensors[name], other.tensors[name])
