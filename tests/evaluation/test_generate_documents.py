"""Are tokens drawn with the model's own probabilities, and is a document the same however it is drawn?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from postgrad.data.random_streams import RandomStreams
from postgrad.evaluation.generate_documents import GeneratedDocument, generate_documents, sample_tokens
from postgrad.models.model import CausalModel
from tests.conftest import VOCABULARY, make_llama


@pytest.fixture
def model() -> CausalModel:
    return CausalModel(make_llama(0))


def alone(
    model: CausalModel, beginning: list[int], number: int, most: int, stop: set[int], temperature: float
) -> GeneratedDocument:
    """One document, without a cache: each token from a forward over all before it."""
    uniforms, ids = RandomStreams(3).generator(number, 0).random(most), list(beginning)
    for step in range(most):
        with torch.no_grad():
            logits = model.pretrained(input_ids=torch.tensor([ids])).logits[0, -1].double() / temperature
        cumulated = torch.softmax(logits, -1).cumsum(-1)
        token = int((cumulated <= uniforms[step] * cumulated[-1]).sum())
        if token in stop:
            return GeneratedDocument(np.array(ids[len(beginning) :]), True)
        ids.append(token)
    return GeneratedDocument(np.array(ids[len(beginning) :]), False)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_documents_are_those_that_plain_forwards_draw(model: CausalModel, temperature: float) -> None:
    stop = set(range(0, VOCABULARY, 12))  # so that rows end at different steps
    beginnings = np.array([[1, 2, 3], [4, 5, 6], [1, 2, 3], [7, 8, 9]])
    found = generate_documents(
        model, beginnings, range(10, 14), seed=3, max_new_tokens=20, stop_ids=stop, temperature=temperature
    )
    assert len({len(document.ids) for document in found}) > 1
    assert any(document.ended for document in found)
    for beginning, number, document in zip(beginnings.tolist(), range(10, 14), found, strict=True):
        expected = alone(model, beginning, number, 20, stop, temperature)
        assert document.ended == expected.ended
        assert document.ids.tolist() == expected.ids.tolist()


def test_beginnings_of_several_lengths_make_no_difference(model: CausalModel) -> None:
    stop = set(range(0, VOCABULARY, 12))
    beginnings = [np.array(ids) for ids in ([1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11], [8])]
    found = generate_documents(model, beginnings, range(20, 24), seed=3, max_new_tokens=20, stop_ids=stop)
    for beginning, number, document in zip(beginnings, range(20, 24), found, strict=True):
        expected = alone(model, beginning.tolist(), number, 20, stop, 1.0)
        assert document.ids.tolist() == expected.ids.tolist() and document.ended == expected.ended
    # Mutants: filling that is read, and one that moves the positions.
    filled = [np.array([0] * (7 - len(ids)) + ids.tolist()) for ids in beginnings]
    read = generate_documents(model, filled, range(20, 24), seed=3, max_new_tokens=20, stop_ids=stop)
    assert [d.ids.tolist() for d in read[1:]] != [d.ids.tolist() for d in found[1:]]
    other = generate_documents(model, beginnings, range(20, 24), seed=3, max_new_tokens=20, stop_ids=stop, stream=1)
    assert [d.ids.tolist() for d in other] != [d.ids.tolist() for d in found]


def test_a_document_is_a_function_of_its_number_alone(model: CausalModel) -> None:
    together = generate_documents(model, np.ones((6, 2), np.int64), range(6), seed=1, max_new_tokens=12, stop_ids={0})
    apart = [
        generate_documents(model, np.ones((1, 2), np.int64), [n], seed=1, max_new_tokens=12, stop_ids={0})[0]
        for n in range(6)
    ]
    assert [d.ids.tolist() for d in together] == [d.ids.tolist() for d in apart]
    assert len({tuple(d.ids.tolist()) for d in together}) == 6
    other = generate_documents(model, np.ones((6, 2), np.int64), range(6), seed=2, max_new_tokens=12, stop_ids={0})
    assert [d.ids.tolist() for d in together] != [d.ids.tolist() for d in other]


def test_tokens_have_the_models_probabilities() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, float("-inf")])
    uniforms = torch.from_numpy(np.random.default_rng(0).random(20_000))
    found = torch.bincount(sample_tokens(logits.expand(20_000, -1), uniforms, 1.0), minlength=5).numpy()
    expected = torch.softmax(logits[:4].double(), -1).numpy() * 20_000
    assert found[4] == 0
    assert chisquare(found[:4], expected).pvalue > 0.01
    greedier = torch.bincount(sample_tokens(logits.expand(20_000, -1), uniforms, 0.5), minlength=5).numpy()
    # The mutant: a temperature that is not read.
    assert chisquare(greedier[:4], expected).pvalue < 1e-6


def test_top_p_cuts_off_what_is_unlikely_and_nothing_else() -> None:
    logits = torch.log(torch.tensor([0.1, 0.5, 0.15, 0.25]))
    uniforms = torch.from_numpy(np.random.default_rng(0).random(20_000))
    found = torch.bincount(sample_tokens(logits.expand(20_000, -1), uniforms, 1.0, 0.75), minlength=4).numpy() / 20_000
    assert found[[0, 2]].tolist() == [0, 0]
    assert found[1] == pytest.approx(2 / 3, abs=0.02) and found[3] == pytest.approx(1 / 3, abs=0.02)


def test_a_number_at_either_end_draws_what_has_probability() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]]).expand(2, -1)
    assert sample_tokens(logits, torch.tensor([0.0, 1.0 - 1e-16], dtype=torch.float64), 1.0).tolist() == [1, 2]
