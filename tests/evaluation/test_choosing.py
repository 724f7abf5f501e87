"""Log-likelihoods of choices: those of a plain loop over transformers, whatever is shared, padded or split over ranks."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from postgrad.errors import DataError, ModelError
from postgrad.evaluation import branches
from postgrad.evaluation.choosing import Chosen, Item, choose
from postgrad.models.model import Model, model_for
from tests.tuning.families import PAD, REAL, VOCABULARY, build

DECODERS = ["llama", "gpt2", "qwen3", "qwen2", "mistral", "phi3", "gemma2", "gemma3", "olmo2", "gpt-neox", "opt"]
SEQ2SEQ = ["t5", "mt5"]


def view(pretrained: PreTrainedModel) -> Model:
    return model_for(pretrained, "text-to-text" if pretrained.config.is_encoder_decoder else "causal")


def drawn(rng: random.Random, size: int) -> tuple[int, ...]:
    return tuple(rng.randrange(REAL, VOCABULARY) for _ in range(size))


def questions(count: int = 24, *, shown: int = 20, seed: int = 0, own: bool = False) -> list[Item]:
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
        items.append(Item((*before, *question), tuple(choices)))
    items.append(items[2])  # asked twice
    return items


@torch.no_grad()
def by_hand(model: PreTrainedModel, items: Sequence[Item]) -> list[list[tuple[float, bool]]]:
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


def same(found: Chosen, wanted: list[list[tuple[float, bool]]], tolerance: float = 2e-4) -> bool:
    return all(
        np.allclose(log_p, [log_p for log_p, _ in item], rtol=0, atol=tolerance)
        and greedy.tolist() == [greedy for _, greedy in item]
        for log_p, greedy, item in zip(found.log_p, found.greedy, wanted, strict=True)
    )


def chosen(model: Model, items: Sequence[Item], **options: object) -> Chosen:
    return choose(model, items, **{"context": 64, "pad": PAD, "at_once": 512, **options})  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows so short, and groups so cheap, that few items fill several rows behind a trunk."""
    monkeypatch.setattr(branches, "ROOM", 40)
    monkeypatch.setattr(branches, "_MOST", 60)
    monkeypatch.setattr(branches, "_GROUP", 5)


@pytest.mark.parametrize("family", [*DECODERS, *SEQ2SEQ])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_scores_are_those_of_a_plain_loop(family: str, own: bool) -> None:
    pretrained = build(family, "lm")
    items = questions(own=own)
    model = view(pretrained)
    found = chosen(model, items)
    wanted = by_hand(pretrained, items)
    assert same(found, wanted)
    assert found.too_long == ()
    assert [counts.tolist() for counts in found.tokens] == [[len(c) for c in item.choices] for item in items]
    assert found.best().tolist() == [int(np.argmax([log_p for log_p, _ in item])) for item in wanted]


def test_what_does_not_fit_is_named_and_never_cut() -> None:
    pretrained = build("llama", "lm")
    items = questions()
    sizes = [len(item.context) + max(map(len, item.choices)) - 1 for item in items]
    limit = sorted(sizes)[len(sizes) // 2]
    found = chosen(view(pretrained), items, context=limit)
    assert found.too_long == tuple(i for i, size in enumerate(sizes) if size > limit) != ()
    wanted = by_hand(pretrained, items)
    for i, log_p in enumerate(found.log_p):
        assert len(log_p) == (0 if i in found.too_long else len(items[i].choices))
        if i not in found.too_long:
            assert log_p == pytest.approx([each for each, _ in wanted[i]], abs=2e-4)
    assert [i for i, best in enumerate(found.best()) if best < 0] == list(found.too_long)


@pytest.mark.parametrize(
    ("item", "what"),
    [
        (Item((), ((5,),)), "no context"),
        (Item((5,), ()), "no choices"),
        (Item((5,), ((6,), ())), "an empty choice"),
    ],
)
def test_items_that_ask_nothing(item: Item, what: str) -> None:
    with pytest.raises(DataError, match=f"item 1 has {what}"):
        chosen(view(build("llama", "lm")), [Item((5,), ((6,),)), item])


def test_an_encoder_has_no_answers() -> None:
    with pytest.raises(ModelError, match=r"does not write"):
        chosen(model_for(build("bert", "lm"), "masked"), questions())
