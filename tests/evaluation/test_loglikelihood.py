"""Log-likelihoods of choices: those of a plain loop over transformers, whatever is shared, padded or split over ranks."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    T5ForConditionalGeneration,
)

from postgrad.errors import DataError, ModelError
from postgrad.evaluation.choices import decoder, loglikelihood, token_tree
from postgrad.evaluation.choices.decoder import DecoderScorer
from postgrad.evaluation.choices.encoder_decoder import EncoderDecoderScorer
from postgrad.evaluation.choices.loglikelihood import ChoiceItem, ChoiceScores, score_choices
from postgrad.evaluation.choices.token_tree import (
    Branch,
    TreeRow,
    build_shared_batches,
    build_single_batches,
    count_single_tokens,
    count_tokens,
)
from postgrad.models.model import Model, wrap_model
from postgrad.models.prefix_lm_attention import mark_prefix_lm
from postgrad.models.task import Task
from postgrad.tuning.attach import attach
from tests.tuning.checks import tokenizer as words
from tests.tuning.families import PAD, REAL, VOCABULARY, build_model, first_virtual

DECODERS = ["llama", "gpt2", "qwen3", "qwen2", "mistral", "phi3", "gemma2", "gemma3", "olmo2", "gpt-neox", "opt"]
SEQ2SEQ = ["t5", "mt5", "bart"]


def view(pretrained: PreTrainedModel) -> Model:
    return wrap_model(pretrained, Task.TEXT_TO_TEXT if pretrained.config.is_encoder_decoder else Task.CAUSAL)


def drawn(rng: random.Random, size: int) -> tuple[int, ...]:
    return tuple(rng.randrange(REAL, VOCABULARY) for _ in range(size))


def questions(count: int = 24, *, shown: int = 20, seed: int = 0, own: bool = False) -> list[ChoiceItem]:
    """Items behind the same demonstrations (or ones of their own), with choices of one token, of several, alike and not."""
    rng = random.Random(seed)
    demonstrations, words = drawn(rng, shown), [drawn(rng, 1) for _ in range(4)]
    items = []
    for i in range(count):
        before = drawn(rng, shown) if own else demonstrations
        question = drawn(rng, rng.randint(1, 9))
        stem = drawn(rng, 2)
        several = [(*stem, *drawn(rng, rng.randint(1, 3))) for _ in range(3)]
        choices = [words, [*several, several[0], stem], [drawn(rng, 5), words[0]]][i % 3]
        items.append(ChoiceItem((*before, *question), tuple(choices)))
    items.append(items[2])  # asked twice
    return items


@torch.no_grad()
def by_hand(model: PreTrainedModel, items: Sequence[ChoiceItem]) -> list[list[tuple[float, bool]]]:
    """`log p` and whether it is the greedy continuation, of one choice after the other, with transformers alone."""
    out = []
    for item in items:
        found = []
        for choice in item.choices:
            wanted = torch.tensor(choice)
            if model.config.is_encoder_decoder:
                target = torch.tensor([[model.config.decoder_start_token_id, *choice[:-1]]])
                logits = model(input_ids=torch.tensor([item.context]), decoder_input_ids=target, use_cache=False).logits
            else:
                logits = model(input_ids=torch.tensor([[*item.context, *choice]]), use_cache=False).logits
                logits = logits[:, len(item.context) - 1 : -1]
            log_p = torch.log_softmax(logits[0].double(), -1)
            each = log_p.gather(1, wanted[:, None])
            found.append((float(each.sum()), bool((log_p.argmax(-1) == wanted).all())))
        out.append(found)
    return out


def same(found: ChoiceScores, wanted: list[list[tuple[float, bool]]], tolerance: float = 2e-4) -> bool:
    return all(
        np.allclose(log_p, [log_p for log_p, _ in item], rtol=0, atol=tolerance)
        and greedy.tolist() == [greedy for _, greedy in item]
        for log_p, greedy, item in zip(found.log_likelihoods, found.greedy, wanted, strict=True)
    )


def chosen(model: Model, items: Sequence[ChoiceItem], **options: object) -> ChoiceScores:
    return score_choices(model, items, **{"context": 64, "pad": PAD, "batch_tokens": 512, **options})  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows so short, and groups so cheap, that few items fill several rows behind a trunk."""
    monkeypatch.setattr(token_tree, "ROW_TOKENS", 40)
    monkeypatch.setattr(token_tree, "_MAX_ROW_TOKENS", 60)
    monkeypatch.setattr(token_tree, "_GROUP_COST", 5)


def branches_of(items: Sequence[ChoiceItem]) -> list[Branch]:
    slots = iter(range(0, 10_000, 10))
    return [
        Branch(np.array([*item.context, *choice[:-1]]), len(item.context), choice, next(slots))
        for item in items
        for choice in item.choices
    ]


@pytest.mark.parametrize("family", [*DECODERS, *SEQ2SEQ])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_scores_are_those_of_a_plain_loop(family: str, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrained = build_model(family, "lm")
    items = questions(own=own)
    model, wanted = view(pretrained), by_hand(pretrained, items)
    found = chosen(model, items)
    assert same(found, wanted)
    assert found.too_long == ()
    assert [counts.tolist() for counts in found.tokens] == [[len(c) for c in item.choices] for item in items]
    assert found.best_choices().tolist() == [int(np.argmax([log_p for log_p, _ in item])) for item in wanted]
    # Where sharing is switched off, the same is found with more.
    monkeypatch.setattr(DecoderScorer, "_trees_agree", lambda *_: False)
    monkeypatch.setattr(EncoderDecoderScorer, "_sharing_agrees", lambda *_: False)
    plain = chosen(model, items)
    assert same(plain, wanted)
    assert plain.tokens_read > (1.4 if own or family in SEQ2SEQ else 4) * found.tokens_read


def test_answers_of_one_token_cost_nothing_more() -> None:
    pretrained, rng = build_model("llama", "lm"), random.Random(0)
    before = drawn(rng, 30)
    items = [
        ChoiceItem((*before, *drawn(rng, 3)), tuple((t,) for t in range(REAL, REAL + count))) for count in (2, 9) * 10
    ]
    found = chosen(view(pretrained), items)
    assert same(found, by_hand(pretrained, items))
    assert found.tokens_read <= 30 + 20 * 3


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "t5"])
@pytest.mark.parametrize(
    "options",
    [
        {"kind": "lora", "rank": 2},
        {"kind": "prompt", "length": 3, "init": "normal"},
        {"kind": "prefix", "length": 3, "hidden": 16},
        {"kind": "adapter", "variant": "houlsby", "size": 4},
    ],
    ids=lambda options: options["kind"],
)
def test_tunings_in_the_model_are_read_along(family: str, options: dict[str, Any]) -> None:
    pretrained = build_model(family, "lm")
    untuned = chosen(view(pretrained), items := questions())
    tuning = attach(pretrained, options, tokenizer=words())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in pretrained.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    if options["kind"] == "prompt":
        virtual = range(first_virtual(pretrained), first_virtual(pretrained) + 3)
        items = [ChoiceItem((*virtual, *item.context), item.choices) for item in items]
    found, wanted = chosen(view(pretrained), items), by_hand(pretrained, items)
    assert same(found, wanted)
    assert not same(untuned, wanted, 1e-2)
    assert found.tokens_read < 0.5 * sum(len(i.context) + len(c) - 1 for i in items for c in i.choices)
    del tuning


# -- what must not matter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "t5"])
def test_who_is_read_together_does_not_matter(family: str) -> None:
    """GPT-2 counts positions, Gemma 2 has a window, T5's encoder is filled up: whatever stands in a batch, answers stay."""
    model, items = view(build_model(family, "lm")), [*questions(9), *questions(9, shown=3, seed=1, own=True)]
    found = chosen(model, items)
    order = list(range(len(items)))
    random.Random(0).shuffle(order)
    for options in ({"batch_tokens": 1}, {"batch_tokens": 100_000}, {"pad": REAL}):
        mixed = chosen(model, [items[i] for i in order], **options)
        for place, i in enumerate(order):
            assert mixed.log_likelihoods[place] == pytest.approx(found.log_likelihoods[i], abs=5e-5)
            assert mixed.greedy[place].tolist() == found.greedy[i].tolist()
    alone = [chosen(model, [item]) for item in items]
    for one, log_p in zip(alone, found.log_likelihoods, strict=True):
        assert one.log_likelihoods[0] == pytest.approx(log_p, abs=5e-5)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_rows_filled_up_on_the_left_say_the_same(family: str) -> None:
    """As a batch for generation is made: padding in front, masked, and positions that begin behind it."""
    pretrained, items = build_model(family, "lm"), questions(6)
    found = chosen(view(pretrained), items)
    rows = [(*item.context, *choice) for item in items for choice in item.choices]
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + list(row) for row in rows])
    seen = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    places = (seen.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        log_p = torch.log_softmax(pretrained(input_ids=ids, attention_mask=seen, position_ids=places).logits, -1)
    each = log_p[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    sizes = [len(choice) for item in items for choice in item.choices]
    sums = [float(row[-size:].double().sum()) for row, size in zip(each, sizes, strict=True)]
    assert np.concatenate(found.log_likelihoods) == pytest.approx(sums, abs=2e-4)


def test_a_model_is_left_as_it_was() -> None:
    """Dropout acts on neither side, and whether the model trains is as before, also behind an error."""
    pretrained = build_model("llama", "lm")
    pretrained.config.attention_dropout = 0.5
    for layer in pretrained.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model, items = view(pretrained), questions(6)
    model.train()
    found = chosen(model, items)
    assert model.training
    assert same(found, by_hand(pretrained.eval(), items))
    model.train()
    with pytest.raises(IndexError):
        chosen(model, [*items, ChoiceItem((VOCABULARY + 5,), ((1,),))])
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_sixteen_bits() -> None:
    """The same numbers as the loop of plain transformers in bf16, but for the order of sums; what is added up is exact."""
    pretrained, items = build_model("llama", "lm").to(torch.bfloat16), questions()
    found, wanted = chosen(view(pretrained), items), by_hand(pretrained, items)
    assert found.tokens_read < 400
    off = [
        abs(a - b) / n
        for log_p, item, counts in zip(found.log_likelihoods, wanted, found.tokens, strict=True)
        for a, (b, _), n in zip(log_p, item, counts, strict=True)
    ]
    assert max(off) < 0.15
    assert np.mean(off) < 0.02


# -- models that cannot read trees ------------------------------------------------------------------------------------


def bloom() -> PreTrainedModel:
    """Its attention leans on how far apart tokens stand in a row (ALiBi), and it is told no positions."""
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)).eval()


def mamba() -> PreTrainedModel:
    """Its past is a state."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)
    return MambaForCausalLM(config).eval()


@pytest.mark.parametrize("make", [bloom, mamba])
def test_a_model_without_such_a_past_reads_every_sequence(make: Callable[[], PreTrainedModel]) -> None:
    pretrained, items = make(), questions()
    with torch.no_grad():
        for parameter in pretrained.parameters():
            if parameter.ndim == 2:
                parameter *= 20
    found = chosen(view(pretrained), items)
    assert found.tokens_read == count_single_tokens(branches_of(items))
    assert same(found, by_hand(pretrained, items), 5e-4)


def everything(model: object, depth_BT: Tensor, end_BT: Tensor, trunk: int, prefix_B: Tensor) -> Tensor:
    width = depth_BT.shape[1]
    seen = torch.ones(width, width, dtype=torch.bool).tril()
    return torch.nn.functional.pad(seen, (trunk, 0), value=True).expand(len(depth_BT), 1, -1, -1)


def no_places(rows: Sequence[TreeRow], width: int, trunk: int, pad: int) -> Any:
    ids, _, end = FILLED(rows, width, trunk, pad)
    return ids, np.tile(np.arange(trunk, trunk + width).clip(max=60), (len(rows), 1)), end


FILLED = decoder.pad_rows


@pytest.mark.parametrize(("part", "wrong"), [("_attention_masks", everything), ("pad_rows", no_places)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_reads_trees_wrongly_is_found_out(
    part: str, wrong: object, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask or places that are passed over: the trial sees it, and every sequence is read by itself."""
    pretrained, items = build_model(family, "lm"), questions()
    wanted = by_hand(pretrained, items)
    monkeypatch.setattr(decoder, part, wrong)
    found = chosen(view(pretrained), items)
    assert found.tokens_read == count_single_tokens(branches_of(items))
    assert same(found, wanted)
    # The mutant without the trial.
    monkeypatch.setattr(DecoderScorer, "_trees_agree", lambda *_: True)
    assert not same(chosen(view(pretrained), items), wanted, 1e-2)


def test_an_encoder_decoder_whose_past_is_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pretrained, items = build_model("t5", "lm"), questions()
    wanted = by_hand(pretrained, items)
    right = EncoderDecoderScorer._score_shared

    def shifted(self: EncoderDecoderScorer, some: Any) -> Any:
        found = right(self, some)
        return found._replace(log_p=found.log_p + 0.01 * (found.log_p < -3))

    monkeypatch.setattr(EncoderDecoderScorer, "_score_shared", shifted)
    assert same(chosen(view(pretrained), items), wanted)
    monkeypatch.setattr(EncoderDecoderScorer, "_sharing_agrees", lambda *_: True)
    assert not same(chosen(view(pretrained), items), wanted)


# -- prefix language models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_prefix_language_model_reads_questions_in_both_directions(family: str) -> None:
    pretrained, items = build_model(family, "lm"), questions()
    model = view(pretrained)
    causal = chosen(model, items)
    mark_prefix_lm(pretrained.config, True)
    found = chosen(model, items)
    for i, item in enumerate(items):
        for c, choice in enumerate(item.choices):
            ids = torch.tensor([[*item.context, *choice]])
            places = torch.arange(ids.shape[1])[None]
            with torch.no_grad():
                logits = model(input_ids=ids, position_ids=places, prefix=(places < len(item.context)).long()).logits()
            each = torch.log_softmax(logits[0, len(item.context) - 1 : -1].double(), -1).gather(
                1, torch.tensor(choice)[:, None]
            )
            assert found.log_likelihoods[i][c] == pytest.approx(float(each.sum()), abs=2e-4)
    assert found.tokens_read <= sum(len(item.context) for item in items) + 12 * len(items)
    assert (
        max(np.abs(a - b).max() for a, b in zip(found.log_likelihoods, causal.log_likelihoods, strict=True)) > 0.1
    )  # the mutant: causally


def test_a_question_beyond_the_window_of_a_prefix_language_model() -> None:
    pretrained = build_model("mistral", "lm")
    mark_prefix_lm(pretrained.config, True)
    with pytest.raises(ModelError, match=r"attention window of this model is 6[\s\S]*within the window"):
        chosen(view(pretrained), questions())


# -- ranks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_find_together_what_one_finds_and_call_the_model_equally_often(
    family: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_tree, "_GROUP_COST", 30)  # some items have a trunk and some have none
    model = view(build_model(family, "lm"))
    items = [*questions(12), *questions(18, seed=1), *questions(6, shown=2, seed=2, own=True)]
    whole = chosen(model, items, batch_tokens=64)
    if family == "llama":
        trunks = [batch.trunk for batch in build_shared_batches(branches_of(items), 64)]
        assert len({trunk.tobytes() for trunk in trunks}) > 2
        assert min(map(len, trunks)) == 0
    calls: list[int] = []
    parts: list[loglikelihood.BatchScores] = []

    def run(rank: int) -> ChoiceScores:
        made = 0

        def count(*_: object) -> None:
            nonlocal made
            made += 1

        def share(mine: list[loglikelihood.BatchScores]) -> list[loglikelihood.BatchScores]:
            parts.extend(mine)
            return list(parts)

        hook = model.register_forward_pre_hook(count)
        found = chosen(model, items, batch_tokens=64, gather=share, rank=rank, ranks=ranks)
        hook.remove()
        calls.append(made)
        return found

    found = [run(rank) for rank in range(ranks)]
    assert len(set(calls)) == 1
    for a, b in zip(found[-1].log_likelihoods, whole.log_likelihoods, strict=True):
        assert a == pytest.approx(b, abs=5e-5)
    assert all((a == b).all() for a, b in zip(found[-1].greedy, whole.greedy, strict=True))
    assert {one.tokens_read for one in found} == {whole.tokens_read}
    # A rank alone has not found everything.
    assert any(not np.allclose(a, b) for a, b in zip(found[0].log_likelihoods, whole.log_likelihoods, strict=True))


# -- trees ------------------------------------------------------------------------------------------------------------

ids = st.integers(1, 4)  # few, so that much is alike
asked = st.tuples(
    st.lists(ids, min_size=1, max_size=14), st.lists(st.lists(ids, min_size=1, max_size=5), min_size=1, max_size=5)
)


def sequences(batch: token_tree.TreeBatch, row: TreeRow) -> dict[int, tuple[tuple[int, ...], int]]:
    """By number of what is asked: what the token that it is asked behind sees, in order, and what is wanted."""
    out = {}
    for number, wanted, slot in zip(row.source_A.tolist(), row.target_A.tolist(), row.slot_A.tolist(), strict=True):
        seen = [j for j in range(number + 1) if number < row.end[j]]
        assert row.depth[seen].tolist() == list(range(len(batch.trunk), len(batch.trunk) + len(seen)))
        assert slot not in out
        out[slot] = ((*batch.trunk.tolist(), *row.ids[seen].tolist()), wanted)
    return out


@settings(max_examples=80)
@given(st.lists(asked, min_size=1, max_size=25), st.integers(0, 12), st.integers(1, 80))
def test_every_answer_is_asked_behind_its_own_sequence(made: list[Any], shown: int, most: int) -> None:
    before = list(np.random.default_rng(0).integers(1, 5, shown))
    items = [ChoiceItem((*before, *context), tuple(tuple(c) for c in choices)) for context, choices in made]
    given_branches = branches_of(items)
    wanted = {
        branch.slot + i: (tuple(branch.ids[: branch.context_length + i].tolist()), token)
        for branch in given_branches
        for i, token in enumerate(branch.targets)
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("ROW_TOKENS", 20), ("_MAX_ROW_TOKENS", 40), ("_GROUP_COST", 4)):
            patch.setattr(token_tree, name, value)
        for plan in (build_shared_batches, build_single_batches):
            batches = plan(given_branches, most)
            found: dict[int, Any] = {}
            for batch in batches:
                for row in batch.rows:
                    assert len(row.ids) <= 40 or len(row.source_A) == 1 or plan is build_single_batches
                    new = sequences(batch, row)
                    assert not new.keys() & found.keys()
                    found |= new
                assert len(batch.rows) == 1 or batch.width * len(batch.rows) <= most
            assert found == wanted
        shared, single = build_shared_batches(given_branches, most), build_single_batches(given_branches, most)
        assert count_tokens(single) == count_single_tokens(given_branches)
        assert count_tokens(shared) <= count_tokens(single)


def test_what_is_shared_is_read_once() -> None:
    """Instructions for all, demonstrations for each of three subjects: as many trunks, and little else is read."""
    rng = random.Random(0)
    instructions = drawn(rng, 10)
    items, distinct = [], 0
    for _ in range(3):
        demonstrations = drawn(rng, 30)
        for _ in range(40):
            item = ChoiceItem((*instructions, *demonstrations, *drawn(rng, 5)), tuple(drawn(rng, 3) for _ in range(4)))
            items.append(item)
            distinct += 5 + 4 * 2
    batches = build_shared_batches(branches_of(items), 512)
    assert sorted({len(batch.trunk) for batch in batches}) == [40]
    assert len({id(batch.trunk) for batch in batches}) == 3
    assert distinct + 3 * 40 - 30 <= count_tokens(batches) <= distinct + 3 * 40
    assert count_single_tokens(branches_of(items)) > 6 * count_tokens(batches)


# -- bad items --------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_named_and_never_cut() -> None:
    pretrained = build_model("llama", "lm")
    items = questions()
    sizes = [len(item.context) + max(map(len, item.choices)) - 1 for item in items]
    limit = sorted(sizes)[len(sizes) // 2]
    found = chosen(view(pretrained), items, context=limit)
    assert found.too_long == tuple(i for i, size in enumerate(sizes) if size > limit) != ()
    wanted = by_hand(pretrained, items)
    for i, log_p in enumerate(found.log_likelihoods):
        assert len(log_p) == (0 if i in found.too_long else len(items[i].choices))
        if i not in found.too_long:
            assert log_p == pytest.approx([each for each, _ in wanted[i]], abs=2e-4)
    assert [i for i, best in enumerate(found.best_choices()) if best < 0] == list(found.too_long)


@pytest.mark.parametrize(
    ("item", "what"),
    [
        (ChoiceItem((), ((5,),)), "no context"),
        (ChoiceItem((5,), ()), "no choices"),
        (ChoiceItem((5,), ((6,), ())), "an empty choice"),
    ],
)
def test_items_that_ask_nothing(item: ChoiceItem, what: str) -> None:
    with pytest.raises(DataError, match=f"item 1 has {what}"):
        chosen(view(build_model("llama", "lm")), [ChoiceItem((5,), ((6,),)), item])


class Bent(T5ForConditionalGeneration):
    """Something stands behind its output embedding that is not known of."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.ones(VOCABULARY)
        return output


def test_an_encoder_decoder_whose_head_is_not_plain() -> None:
    with pytest.raises(ModelError, match=r"architecture \(t5\) are not its output embedding"):
        chosen(view(Bent(build_model("t5", "lm").config).eval()), questions())


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_nothing_that_fits_is_nothing_scored(family: str) -> None:
    model = view(build_model(family, "lm"))
    assert chosen(model, []) == ChoiceScores((), (), (), (), 0)
    found = chosen(model, questions()[:2], context=3)
    assert (found.too_long, found.tokens_read) == ((0, 1), 0)
    assert [len(log_p) for log_p in found.log_likelihoods] == [0, 0]
    assert found.best_choices().tolist() == [-1, -1]


def test_an_encoder_has_no_answers() -> None:
    with pytest.raises(ModelError, match=r"is not a generative model"):
        chosen(wrap_model(build_model("bert", "lm"), Task.MASKED), questions())
