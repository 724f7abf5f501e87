"""Do two models differ by what the definitions say, nowhere when they are one, and at the same labels however they read?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from postgrad.data.layouts.rows import Row
from postgrad.data.problem_type import ProblemType
from postgrad.data.render.frame import TextPrefix
from postgrad.evaluation.drift import Drift, compute_drift, weight_drift
from postgrad.evaluation.held_out import HeldOutRows, HeldOutText
from postgrad.models.model import CausalModel, HeadedModel, Model
from tests import tiny_stages
from tests.conftest import VOCABULARY, make_llama


def texts(count: int = 6, seed: int = 0) -> HeldOutText:
    rng = np.random.default_rng(seed)
    documents = tuple(rng.integers(1, VOCABULARY, int(size)) for size in rng.integers(5, 60, count))
    return HeldOutText("t", "retained", documents, np.array([len(d) for d in documents]), "x")


def by_hand(before: torch.nn.Module, after: torch.nn.Module, held_out: HeldOutText) -> dict[str, float]:
    """Every token but the first of each text, one forward a text, in float64."""
    sums = dict.fromkeys(("divergence", "crossed", "right", "lost", "won", "tokens"), 0.0)
    for document in held_out.documents:
        ids = torch.from_numpy(document)[None]
        with torch.no_grad():
            p, q = (torch.log_softmax(m(input_ids=ids).logits[0, :-1].double(), -1) for m in (before, after))
        labels = ids[0, 1:]
        was, now = p.argmax(-1) == labels, q.argmax(-1) == labels
        sums["divergence"] += float((p.exp() * (p - q)).sum())
        sums["crossed"] += float(-(p.exp() * q).sum())
        sums["right"] += float(was.sum())
        sums["lost"] += float((was & ~now).sum())
        sums["won"] += float((~was & now).sum())
        sums["tokens"] += len(labels)
    return sums


def totals(found: Drift) -> dict[str, float]:
    names = {
        "divergence": "divergence_W",
        "crossed": "cross_entropy_W",
        "right": "correct_W",
        "lost": "lost_W",
        "won": "won_W",
    }
    return {**{name: getattr(found, field).sum() for name, field in names.items()}, "tokens": found.tokens_W.sum()}


def test_every_measure_is_its_formula() -> None:
    before, after = make_llama(0), make_llama(1)
    held_out = texts()
    # Labels that the first model says, so that some are right.
    documents = []
    for document in held_out.documents:
        with torch.no_grad():
            said = before(input_ids=torch.from_numpy(document)[None]).logits[0].argmax(-1).numpy()
        documents.append(np.where(np.arange(len(document)) % 3 == 1, np.roll(said, 1), document))
    held_out = replace(held_out, documents=tuple(documents))
    found = compute_drift(CausalModel(before), CausalModel(after), (held_out, held_out), context=128)
    expected = by_hand(before, after, held_out)
    assert expected["right"] > 0 and expected["lost"] > 0
    for name, value in totals(found).items():
        assert value == pytest.approx(expected[name], rel=1e-5), name
    # The mutant: the divergence in the other direction.
    assert by_hand(after, before, held_out)["divergence"] != pytest.approx(expected["divergence"], rel=1e-4)
    divergence = found.summary().kl_divergence
    assert divergence.value == pytest.approx(expected["divergence"] / expected["tokens"], rel=1e-5)
    assert divergence.low < divergence.value < divergence.high


def test_a_model_has_not_moved_from_itself() -> None:
    model = CausalModel(make_llama(0))
    model.train()
    found = compute_drift(model, CausalModel(make_llama(0)), (texts(), texts()), context=128)
    assert model.training
    assert abs(found.divergence_W).max() < 1e-9
    assert not found.lost_W.any() and not found.won_W.any()
    assert found.relative_change_L.tolist() == [0, 0] and found.cosine_L == pytest.approx([1, 1])
    # The cross-entropy of a distribution with itself is its entropy, not zero.
    assert found.cross_entropy_W.sum() > 0


def test_layers_are_compared_where_they_stand() -> None:
    before, after = make_llama(0), make_llama(0)
    with torch.no_grad():
        after.model.layers[1].mlp.down_proj.weight.mul_(3.0)
    held_out = texts(2)
    found = compute_drift(CausalModel(before), CausalModel(after), (held_out, held_out), context=128)
    assert found.relative_change_L[0] == 0 and found.relative_change_L[1] > 0.01
    squares, sizes = 0.0, 0.0
    for document in held_out.documents:
        ids = torch.from_numpy(document)[None]
        with torch.no_grad():
            # The last entry is behind the final norm; of the block itself it is what stands before it.
            was, now = (self_outputs(m, ids)[:-1] for m in (before, after))
        squares += float((now - was).double().square().sum())
        sizes += float(was.double().square().sum())
    assert found.relative_change_L[1] == pytest.approx((squares / sizes) ** 0.5, rel=1e-5)
    moved = weight_drift(before, after)
    assert set(moved) == {"embeddings", "block 0", "block 1", "rest"}
    assert moved["block 0"].relative_change == moved["embeddings"].relative_change == moved["rest"].relative_change == 0
    assert {name: found.changed_count for name, found in moved.items() if found.changed_count} == {
        "block 1": before.model.layers[1].mlp.down_proj.weight.numel()
    }
    assert sum(found.total_count for found in moved.values()) == sum(p.numel() for p in before.parameters())
    block = [p.detach().double() for p in before.model.layers[1].parameters()]
    changed = before.model.layers[1].mlp.down_proj.weight.detach().double()
    size = sum(float(p.square().sum()) for p in block)
    assert moved["block 1"].relative_change == pytest.approx(
        (4 * float(changed.square().sum()) / size) ** 0.5, rel=1e-6
    )


def self_outputs(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The output of the second block, of shape (T, D)."""
    kept = {}
    handle = model.model.layers[1].register_forward_hook(  # type: ignore[union-attr]
        lambda _m, _i, output: kept.update(found=output[0] if isinstance(output, tuple) else output)
    )
    model(input_ids=ids)
    handle.remove()
    return kept["found"][0] if kept["found"].ndim == 3 else kept["found"]


def test_the_same_labels_are_compared_behind_a_soft_prompt() -> None:
    """A model that reads other ids before each text says the same of the same tokens only if they are the same tokens."""
    model = CausalModel(make_llama(0))
    plain = texts(3)
    prompted = replace(plain, prefix=TextPrefix(inner_ids=(5, 6, 7)))
    found = compute_drift(model, CausalModel(make_llama(0)), (plain, prompted), context=128)
    assert found.tokens_W.sum() == plain.tokens
    expected = 0.0
    for document in plain.documents:
        ids = torch.from_numpy(document)[None]
        longer = torch.cat([torch.tensor([[5, 6, 7]]), ids], 1)
        with torch.no_grad():
            p = torch.log_softmax(model.pretrained(input_ids=ids).logits[0, :-1].double(), -1)
            q = torch.log_softmax(model.pretrained(input_ids=longer).logits[0, 3:-1].double(), -1)
        expected += float((p.exp() * (p - q)).sum())
    assert found.divergence_W.sum() == pytest.approx(expected, rel=1e-5)


def test_a_vocabulary_that_has_grown_is_compared_over_what_both_have() -> None:
    before, after = make_llama(0), make_llama(0)
    after.resize_token_embeddings(VOCABULARY + 9, mean_resizing=False)
    found = compute_drift(CausalModel(before), CausalModel(after), (texts(2), texts(2)), context=128)
    assert abs(found.divergence_W).max() < 1e-6


def test_encoder_decoders_and_classifiers_are_compared_too() -> None:
    t5, other = tiny_stages.make_t5(320, 0), tiny_stages.make_t5(320, 1)
    rng = np.random.default_rng(0)
    rows = []
    for size in (4, 7, 9):
        ids, labels = rng.integers(1, 300, size), rng.integers(1, 300, 5)
        inputs = {
            "input_ids": ids,
            "attention_mask": np.ones(size, np.int64),
            "decoder_input_ids": np.concatenate([[0], labels[:-1]]),
        }
        rows.append(Row(inputs, labels, 5))
    sizes = np.array([4, 7, 9])
    held_out = HeldOutRows("t", "learned", tuple(rows), np.arange(3), sizes, "x", np.arange(3).astype(np.uint64), sizes)
    found = compute_drift(HeadedModel(t5), HeadedModel(other), (held_out, held_out), context=32)
    assert found.tokens_W.tolist() == [5, 5, 5]
    expected = 0.0
    for row in rows:
        inputs = {name: torch.from_numpy(array)[None] for name, array in row.inputs.items()}
        with torch.no_grad():
            p, q = (torch.log_softmax(m(**inputs).logits[0].double(), -1) for m in (t5, other))
        expected += float((p.exp() * (p - q)).sum())
    assert found.divergence_W.sum() == pytest.approx(expected, rel=1e-4)
    assert not np.isnan(found.relative_change_L).any()


class _Classes(Model):
    """Logits that are given, by the first id of each row."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__(make_llama(0))
        self.given = logits

    def forward(self, **inputs: torch.Tensor):  # type: ignore[no-untyped-def,override]
        from postgrad.models.model import Output

        return Output(self.given[inputs["input_ids"][:, 0]], None)


def test_classes_are_compared_as_shares() -> None:
    before, after = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 2.0], [0.0, 1.0]])
    rows = tuple(Row({"input_ids": np.array([i])}, np.array(label), 1) for i, label in ((0, 0), (1, 1)))
    ones = np.ones(2, np.int64)
    held_out = HeldOutRows(
        "t", "learned", rows, np.arange(2), ones, "x", np.arange(2).astype(np.uint64), ones, ProblemType.CLASS
    )
    found = compute_drift(_Classes(before), _Classes(after), (held_out, held_out), context=8)
    p, q = torch.softmax(before[0].double(), 0), torch.softmax(after[0].double(), 0)
    assert found.divergence_W == pytest.approx([float((p * (p / q).log()).sum()), 0.0])
    assert found.correct_W.tolist() == [1, 1] and found.lost_W.tolist() == [1, 0] and found.won_W.tolist() == [0, 0]
