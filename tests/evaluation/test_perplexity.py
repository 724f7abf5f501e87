"""Scores are those of plain transformers, each token counts once, and neither batches nor padding matter."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from postgrad.evaluation import perplexity
from postgrad.evaluation.held_out import HeldOutText, _Window, windows
from postgrad.evaluation.perplexity import Scores, score_held_out
from postgrad.lineage.record import SetScore
from postgrad.models.model import CausalModel
from postgrad.stats.forgetting import MIN_DOCUMENTS
from tests.conftest import VOCABULARY, make_llama

CONTEXT = 32


def documents(count: int, longest: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, VOCABULARY, rng.integers(2, longest + 1)).astype(np.int64) for _ in range(count)]


def set_of(texts: Sequence[np.ndarray], name: str = "text") -> HeldOutText:
    return HeldOutText(name, "learned", tuple(texts), np.array([3 * len(t) for t in texts], np.int64), "f")


def make_gemma() -> Gemma2ForCausalLM:
    torch.manual_seed(1)
    model = Gemma2ForCausalLM(Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, sliding_window=128,
        final_logit_softcapping=0.5, attn_implementation="eager", pad_token_id=None, bos_token_id=1, eos_token_id=0,
    )).eval()  # fmt: skip
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)  # so that the cap bends the logits
    return model


@torch.no_grad()
def plain_log_probabilities(model: PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    """`log p` of each token but the first, from one call of plain transformers on one sequence, in float64."""
    logits = model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0].double()
    return torch.log_softmax(logits, -1)[:-1].gather(1, torch.from_numpy(ids)[1:, None])[:, 0].numpy()


def plain_nats(model: PreTrainedModel, ids: np.ndarray, context: int) -> float:
    """A document's nats by hand: a token that does not fit the first context is scored with the last half before it."""
    if len(ids) < 2:
        return 0.0
    total = -plain_log_probabilities(model, ids[:context]).sum()
    done = min(len(ids), context)
    while done < len(ids):
        stop = min(done + context // 2, len(ids))
        log_p = plain_log_probabilities(model, ids[stop - context : stop])
        total -= log_p[len(log_p) - (stop - done) :].sum()
        done = stop
    return float(total)


def nats_by_document(scores: Scores) -> np.ndarray:
    return np.bincount(scores.document_W, scores.nats_W, len(scores.bytes_N))


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("make", [make_llama, make_gemma])
def test_nats_are_those_of_plain_transformers_document_by_document(make: object, bos: bool) -> None:
    model = make()  # type: ignore[operator]
    texts = documents(25, CONTEXT - 1)
    if bos:
        texts = [np.concatenate([[1], t]) for t in texts]
    wanted = np.array([-plain_log_probabilities(model, t).sum() for t in texts])
    found = score_held_out(CausalModel(model), set_of(texts), context=CONTEXT)
    assert nats_by_document(found) == pytest.approx(wanted, rel=1e-5)
    # With a BOS all of the text is scored; without one, all but its first token.
    assert found.tokens_W.sum() == sum(len(t) - 1 for t in texts)
    # The mutant: the first token scored after nothing, or the EOS scored as well, would not pass.
    with_eos = np.array([-plain_log_probabilities(model, np.append(t, 0)).sum() for t in texts])
    assert not np.allclose(nats_by_document(found), with_eos, rtol=1e-3)


def test_a_head_without_its_soft_cap_would_be_caught() -> None:
    model = make_gemma()
    texts = documents(25, CONTEXT)
    wanted = sum(-plain_log_probabilities(model, t).sum() for t in texts)
    without = CausalModel(model)
    without.head_function = without.head_function._replace(softcap=None)
    assert score_held_out(CausalModel(model), set_of(texts), context=CONTEXT).nats_W.sum() == pytest.approx(
        wanted, rel=1e-5
    )
    assert abs(score_held_out(without, set_of(texts), context=CONTEXT).nats_W.sum() - wanted) > 0.01 * wanted


@pytest.mark.parametrize("context", [2, 3, 16, 33])
def test_long_documents_are_those_of_a_hand_written_loop(context: int) -> None:
    model = make_llama(max_position_embeddings=64)
    texts = documents(6, 150, seed=2)
    found = score_held_out(CausalModel(model), set_of(texts), context=context)
    wanted = [plain_nats(model, t, context) for t in texts]
    assert nats_by_document(found) == pytest.approx(wanted, rel=1e-5)
    assert found.tokens_W.sum() == sum(len(t) - 1 for t in texts)
    # The mutant: windows that do not overlap give their first tokens no context.
    chopped = [sum(plain_nats(model, t[i : i + context], context) for i in range(0, len(t), context)) for t in texts]
    assert not np.allclose(nats_by_document(found), chopped, rtol=1e-4)


def counts(cut: Iterator[_Window], length: int) -> np.ndarray:
    """How often each token of a document is scored; a window's first token never can be."""
    seen = np.zeros(length, int)
    for w in cut:
        assert 0 <= w.begin < w.scored_from < w.end <= length
        seen[w.scored_from : w.end] += 1
    return seen


def once(length: int) -> list[int]:
    return [0, *[1] * (length - 1)][:length]


@settings(max_examples=300)
@given(st.integers(0, 400), st.integers(2, 100))
def test_every_token_but_the_first_is_scored_once(length: int, context: int) -> None:
    cut = list(itertools.islice(windows(length, context), 2 * length + 2))
    assert counts(iter(cut), length).tolist() == once(length)
    assert all(w.end - w.begin <= context for w in cut)
    # What a token is scored with: everything before it, or at least half a context.
    assert all(w.begin == 0 or w.scored_from - w.begin >= context // 2 for w in cut)


def test_windows_that_score_their_overlap_twice_would_be_caught() -> None:
    def sliding(length: int, context: int) -> Iterator[_Window]:
        for begin in range(0, length, context // 2):
            yield _Window(0, begin, min(begin + context, length), begin + 1)

    assert counts(sliding(100, 16), 100).tolist() != once(100)


def test_neither_batch_size_nor_padding_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    model, held_out = CausalModel(make_llama()), set_of(documents(40, 90, seed=3))
    found = []
    for at_once, logits in ((1, 1), (100, 1 << 25), (8192, VOCABULARY * 7), (10**9, 1 << 25)):
        monkeypatch.setattr(perplexity, "_TOKENS_AT_ONCE", at_once)
        monkeypatch.setattr(perplexity, "_LOGITS_AT_ONCE", logits)
        found.append(score_held_out(model, held_out, context=CONTEXT))
    for other in found[1:]:
        assert other.nats_W == pytest.approx(found[0].nats_W, rel=1e-5)
        assert np.array_equal(other.tokens_W, found[0].tokens_W)
    # The mutant: padding on the left, where every real token looks at it.
    ids = held_out.documents[0][:CONTEXT]
    padded = np.concatenate([np.zeros(8, np.int64), ids])
    left = -plain_log_probabilities(model.pretrained, padded)[8:].sum()
    assert abs(left + plain_log_probabilities(model.pretrained, ids).sum()) > 1e-3


def test_parts_of_several_ranks_are_the_whole() -> None:
    model, held_out = CausalModel(make_llama()), set_of(documents(30, 60, seed=4))
    alone = score_held_out(model, held_out, context=CONTEXT)
    patched = pytest.MonkeyPatch()
    patched.setattr(perplexity, "_TOKENS_AT_ONCE", 200)
    parts: list[list[tuple[int, np.ndarray]]] = []

    def kept(mine: list[tuple[int, np.ndarray]]) -> list[tuple[int, np.ndarray]]:
        parts.append(mine)
        return [part for rank in parts for part in rank]

    for rank in range(3):
        together = score_held_out(model, held_out, context=CONTEXT, gather=kept, rank=rank, ranks=3)
    patched.undo()
    assert together.nats_W == pytest.approx(alone.nats_W, rel=1e-5)
    assert len({len(mine) for mine in parts}) == 1  # a sharded model needs every rank at every batch


def test_the_model_stays_in_the_mode_it_was_in() -> None:
    model = CausalModel(make_llama(attention_dropout=0.5))
    held_out = set_of(documents(3, 20))
    calm = score_held_out(model, held_out, context=CONTEXT)
    model.train()
    assert np.array_equal(score_held_out(model, held_out, context=CONTEXT).nats_W, calm.nats_W)
    assert model.training


def hand_made(nats: list[list[float]], tokens: list[list[int]], sizes: list[int]) -> Scores:
    return Scores(
        document_W=np.repeat(np.arange(len(nats)), [len(n) for n in nats]),
        nats_W=np.array([x for n in nats for x in n]),
        tokens_W=np.array([x for n in tokens for x in n]),
        bytes_N=np.array(sizes),
    )


def test_perplexity_and_bits_per_byte_are_what_their_definitions_say() -> None:
    scores = hand_made([[6.0, 2.0], [4.0]], [[3, 1], [2]], [20, 12])
    summary = scores.summary()
    assert summary["nats"] == pytest.approx(12 / 6)  # of tokens, not the mean of the documents' means (2.0 and 2.0)
    assert summary["perplexity"] == pytest.approx(math.e**2)
    assert summary["bits_per_byte"] == pytest.approx(12 / math.log(2) / 32)
    assert (summary["tokens"], summary["bytes"], summary["documents"]) == (6, 32, 2)
    uneven = hand_made([[9.0], [1.0]], [[3], [1]], [1, 1])
    assert uneven.nats == pytest.approx(2.5)
    assert uneven.nats != pytest.approx((9 / 3 + 1 / 1) / 2)


def test_a_uniform_guess_has_the_bits_of_the_alphabet() -> None:
    """A model that knows nothing, on a text of one byte a token: log2 V bits a byte."""
    model = make_llama()
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()  # tied: all logits are 0
    texts = [np.arange(1, 30)] * 25
    held_out = HeldOutText("bytes", "learned", tuple(texts), np.array([len(t) - 1 for t in texts]), "f")
    summary = score_held_out(CausalModel(model), held_out, context=CONTEXT).summary()
    assert summary["bits_per_byte"] == pytest.approx(math.log2(VOCABULARY), rel=1e-6)
    assert summary["perplexity"] == pytest.approx(VOCABULARY, rel=1e-5)
    assert summary["low"] == pytest.approx(summary["high"])


def test_few_documents_are_resampled_by_windows() -> None:
    few = hand_made([[6.0, 2.0]] * (MIN_DOCUMENTS - 1), [[3, 1]] * (MIN_DOCUMENTS - 1), [9] * (MIN_DOCUMENTS - 1))
    many = hand_made([[6.0, 2.0]] * MIN_DOCUMENTS, [[3, 1]] * MIN_DOCUMENTS, [9] * MIN_DOCUMENTS)
    assert (few.units, many.units) == ("windows", "documents")
    assert few.per_unit()[0].tolist() == [6.0, 2.0] * (MIN_DOCUMENTS - 1)
    assert many.per_unit()[0].tolist() == [8.0] * MIN_DOCUMENTS
    assert many.per_unit()[1].tolist() == [4] * MIN_DOCUMENTS


def test_tiny_documents_among_others_keep_their_places() -> None:
    model = make_llama()
    texts = [np.array([5, 6]), np.array([7]), *documents(20, 70, seed=5), np.array([9, 9, 9]), np.zeros(0, np.int64)]
    found = score_held_out(CausalModel(model), set_of(texts), context=CONTEXT)
    assert nats_by_document(found) == pytest.approx([plain_nats(model, t, CONTEXT) for t in texts], rel=1e-5)
    assert np.bincount(found.document_W, found.tokens_W, len(texts)).tolist() == [max(len(t) - 1, 0) for t in texts]


def test_a_set_of_one_tiny_document_has_a_value_and_no_spread() -> None:
    summary = score_held_out(CausalModel(make_llama()), set_of([np.array([3, 4])]), context=CONTEXT).summary()
    assert summary["nats"] > 0 and summary["low"] is summary["high"] is None
    assert summary["tokens"] == 1


def test_the_first_documents_hold_about_so_many_tokens() -> None:
    texts = [np.arange(10), np.arange(100, 120), np.arange(5)]
    held_out = HeldOutText("x", "learned", tuple(texts), np.array([40, 60, 7]), "f")
    lengths = {n: [len(d) for d in held_out.take_tokens(n).documents] for n in (4, 10, 15, 30, 33, 35, 10**6)}
    assert lengths == {
        4: [4],
        10: [10],
        15: [10, 5],
        30: [10, 20],
        33: [10, 20, 3],
        35: [10, 20, 5],
        10**6: [10, 20, 5],
    }
    cut = held_out.take_tokens(15)
    assert cut.documents[1].tolist() == [100, 101, 102, 103, 104]
    assert cut.bytes.tolist() == [40, 15]  # a quarter of the second document's 60
    assert held_out.bytes.tolist() == [40, 60, 7]
    assert (cut.name, cut.role, cut.fingerprint) == ("x", "learned", "f")


@settings(max_examples=200)
@given(st.lists(st.integers(2, 50), min_size=1, max_size=8), st.integers(1, 300))
def test_the_first_documents_never_hold_more_than_was_asked_for(sizes: list[int], tokens: int) -> None:
    held_out = set_of([np.arange(n) for n in sizes])
    first = held_out.take_tokens(tokens)
    total = sum(len(d) for d in first.documents)
    assert 2 <= total <= max(tokens, 2)  # a document of one token has nothing to score
    assert total >= min(tokens, sum(sizes)) - 1
    assert all(len(d) >= 2 for d in first.documents)
    assert len(first.bytes) == len(first.documents)


def test_unknown_tokens_are_scored_apart() -> None:
    """The two figures make up the one that counts all; the sets without unknown tokens are scored as ever."""
    model, rng, unknown = CausalModel(make_llama()), np.random.default_rng(0), 7
    texts = [rng.integers(2, 12, size) for size in (40, 9, 70)]
    whole = set_of(texts)
    every, apart = (
        score_held_out(model, held_out, context=CONTEXT) for held_out in (whole, replace(whole, unknown_id=unknown))
    )
    summary = apart.summary()["unknown"]
    count = sum(int((text[1:] == unknown).sum()) for text in texts)
    assert summary["tokens"] == count == every.tokens_W.sum() - apart.tokens_W.sum() > 0
    assert summary["nats"] * count + apart.nats_W.sum() == pytest.approx(every.nats_W.sum())
    assert apart.nats != pytest.approx(every.nats)  # the mutant: they are counted with the others
    assert "unknown" not in every.summary()
    absent = score_held_out(model, replace(whole, unknown_id=VOCABULARY - 1), context=CONTEXT)
    assert absent.nats == every.nats and absent.unknown_tokens == 0
    assert whole.identity != replace(whole, unknown_id=unknown).identity
    read_back = Scores.from_arrays({name: np.asarray(value) for name, value in asdict(apart).items()})
    assert read_back.summary() == apart.summary()
    record = SetScore.model_validate(apart.summary())
    assert record.unknown is not None and record.unknown.share == pytest.approx(count / every.tokens_W.sum())
