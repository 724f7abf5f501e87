"""Pseudo-perplexity: equal to a plain loop of transformers, one token after the other; only masks go through the head."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from transformers import BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

from postgrad.evaluation import pseudo_perplexity
from postgrad.evaluation.perplexity import Scores
from postgrad.evaluation.pseudo_perplexity import MaskedHeldOutText, MaskedWindow, score_masked_tokens
from postgrad.models.model import HeadedModel, OutputHead
from tests.tiny_stages import make_bert

MASK, CLS, SEP, VOCABULARY = 4, 2, 3, 60


def make_roberta(vocabulary: int) -> RobertaForMaskedLM:
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=70, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return RobertaForMaskedLM(config).eval()


MODELS = {"bert": make_bert, "roberta": make_roberta}


def texts(sizes: list[int], seed: int = 0) -> MaskedHeldOutText:
    """Windows of documents, two of each document of more than ten tokens; the second token of each is never masked."""
    rng = np.random.default_rng(seed)
    windows = []
    for document, size in enumerate(sizes):
        for part in np.array_split(rng.integers(5, VOCABULARY, size), 2 if size > 10 else 1):
            places = np.delete(np.arange(len(part)), 1) + 1
            windows.append(MaskedWindow(document, np.concatenate(([CLS], part, [SEP])).astype(np.int64), places))
    return MaskedHeldOutText("set", "learned", tuple(windows), np.array(sizes) * 4, "f", MASK)


@torch.no_grad()
def by_hand(model: BertForMaskedLM | RobertaForMaskedLM, given: MaskedHeldOutText) -> list[float]:
    """`-log p(token | all others)` of every token, each in a forward pass of its own."""
    out = []
    for window in given.windows:
        for place in window.masked_positions:
            ids = torch.from_numpy(window.ids)[None].clone()
            ids[0, place] = given.mask_id
            log_p = torch.log_softmax(model(input_ids=ids).logits[0, place].double(), -1)
            out.append(-float(log_p[window.ids[place]]))
    return out


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("at_once", [1, 40, 8192])
def test_it_is_a_plain_loop(name: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = MODELS[name](VOCABULARY), texts([3, 8, 24, 2])
    monkeypatch.setattr(pseudo_perplexity, "_TOKENS_AT_ONCE", at_once)
    found = score_masked_tokens(HeadedModel(model), given, context=64)
    wanted = by_hand(model, given)
    assert found.nats_W.sum() == pytest.approx(sum(wanted), rel=1e-5)
    assert found.nats == pytest.approx(np.mean(wanted), rel=1e-5)
    assert found.summary()["perplexity"] == pytest.approx(math.exp(np.mean(wanted)), rel=1e-5)
    borders = np.cumsum([0, *(len(window.masked_positions) for window in given.windows)])
    assert found.nats_W == pytest.approx([sum(wanted[a:b]) for a, b in itertools.pairwise(borders)], rel=1e-4)
    assert found.tokens_W.tolist() == np.diff(borders).tolist() and found.tokens_W.sum() == given.tokens
    assert found.document_W.tolist() == [window.document for window in given.windows]


def test_all_masked_at_once_is_another_number() -> None:
    """The mutant: every token hidden at the same time."""
    model, given = make_bert(VOCABULARY), texts([12, 24])
    found = score_masked_tokens(HeadedModel(model), given, context=64).nats
    nats: list[float] = []
    for window in given.windows:
        ids = torch.from_numpy(window.ids)[None].clone()
        ids[0, window.masked_positions] = MASK
        with torch.no_grad():
            log_p = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
        nats += [-float(log_p[place, window.ids[place]]) for place in window.masked_positions]
    assert np.mean(nats) != pytest.approx(found, rel=1e-5)
    assert np.mean(by_hand(model, given)) == pytest.approx(found, rel=1e-5)


def test_only_masks_go_through_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    plain = OutputHead.logits
    monkeypatch.setattr(OutputHead, "logits", lambda head, hidden: (seen.append(len(hidden)), plain(head, hidden))[1])
    given = texts([24, 8])
    score_masked_tokens(HeadedModel(make_bert(VOCABULARY)), given, context=64)
    assert sum(seen) == given.tokens
    assert len(seen) == len(given.windows)  # a batch is of one window


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_work(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = HeadedModel(make_bert(VOCABULARY)), texts([3, 8, 24, 2])
    monkeypatch.setattr(pseudo_perplexity, "_TOKENS_AT_ONCE", 40)
    alone = score_masked_tokens(model, given, context=64)
    parts: list[list[tuple[int, object]]] = []

    def gather(mine: list[tuple[int, object]]) -> list[tuple[int, object]]:
        parts.append(mine)
        return [part for each in parts for part in each]

    last: Scores | None = None
    for rank in range(ranks):
        try:
            last = score_masked_tokens(model, given, context=64, gather=gather, rank=rank, ranks=ranks)
        except KeyError:
            assert rank < ranks - 1  # the others' parts are not there yet
    assert last is not None and last.nats_W == pytest.approx(alone.nats_W)
    assert len({len(part) for part in parts}) == 1  # as many batches on every rank


def test_a_model_that_was_training_goes_on_training() -> None:
    model = HeadedModel(make_bert(VOCABULARY)).train()
    score_masked_tokens(model, texts([4]), context=64)
    assert model.training
