"""Prefix language models: who sees whom, in every architecture; what is written on from a prompt that was read both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from postgrad.data.loading.batch import Batch
from postgrad.errors import ModelError
from postgrad.models import model as models
from postgrad.models.cpu_attention import CAUSAL_BLOCKS
from postgrad.models.model import CausalModel, verify_model
from postgrad.models.prefix_lm_attention import (
    PREFIX_LM_KEY,
    attention_window,
    is_prefix_lm,
    mark_prefix_lm,
    model_prefix_mask,
    prefill_prompt,
    prefix_lm_mask,
)
from postgrad.models.pretrained import save_pretrained
from postgrad.objectives.next_token import TokenLoss
from tests.conftest import VOCABULARY, make_llama, make_tokenizer
from tests.models.test_pretrained import ARCHITECTURES, LEAKING, build

LENGTH, SIZE = 12, 5
"""Tokens of a document, and of its prefix."""


def wide(name: str, attention: str | None = None) -> PreTrainedModel:
    """A model whose windows are no shorter than the documents, and in which what is read decides what is said."""
    model = build(name, attention)
    for parameter in model.parameters():
        parameter.data *= 3
    if getattr(model.config, "sliding_window", None):
        model.config.sliding_window = 64
    return model


def inputs_of(ids: Tensor, size: int = SIZE) -> dict[str, Tensor]:
    """Two packed documents whose first tokens are prefixes."""
    positions = torch.arange(LENGTH).repeat(2)[None].expand_as(ids)
    return {"input_ids": ids, "position_ids": positions, "prefix": (positions < size).long()}


def drawn(seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 2 * LENGTH), generator=torch.Generator().manual_seed(seed))


def changed(ids: Tensor, at: int) -> Tensor:
    out = ids.clone()
    out[:, at] = (out[:, at] + 7) % VOCABULARY
    return out


@torch.no_grad()
def differs(model: CausalModel, at: int, size: int = SIZE) -> list[bool]:
    """At which of the first row's places the logits change with the token `at`."""
    ids = drawn()
    one, two = (model(**inputs_of(i, size)).logits() for i in (ids, changed(ids, at)))
    return ((one - two)[0].abs().amax(-1) > 1e-6).tolist()


def test_who_sees_whom_by_hand() -> None:
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0]])
    prefix = torch.tensor([[1, 1, 0, 0, 1, 1, 0]])
    wanted = [
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]
    assert prefix_lm_mask(prefix, positions)[0, 0].int().tolist() == wanted


@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_prefixes_are_read_in_both_directions_and_nothing_else_is(name: str, attention: str | None) -> None:
    model = CausalModel(wide(name, attention))
    verify_model(model, prefix_tokens=2 * LENGTH)
    model.eval()
    first, second = range(LENGTH), range(LENGTH, 2 * LENGTH)
    # A token of the prefix is seen by all of its document, one behind it only by what follows; never by the other document.
    assert differs(model, SIZE - 1) == [at in first for at in range(2 * LENGTH)]
    assert differs(model, SIZE) == [at in first and at >= SIZE for at in range(2 * LENGTH)]
    assert differs(model, LENGTH + SIZE - 1) == [at in second for at in range(2 * LENGTH)]


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_a_prefix_of_one_token_is_plain_reading(name: str) -> None:
    model = CausalModel(wide(name))
    inputs = inputs_of(drawn(), 1)
    with torch.no_grad():
        ours = model(**inputs).logits()
        plain = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"]).logits()
        both = model(**inputs_of(drawn())).logits()
    assert torch.allclose(ours, plain, atol=1e-5)
    assert not torch.allclose(both[:, 0], plain[:, 0], atol=1e-4)


def hand_written(model: PreTrainedModel, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """The summed loss of transformers' own forward pass under a mask that is written out cell by cell."""
    rows, length = labels.shape
    mask = torch.full((rows, 1, length, length), torch.finfo(torch.float32).min)
    document = torch.arange(length) // LENGTH
    for row in range(rows):
        for q in range(length):
            for k in range(length):
                prefix = inputs["prefix"][row]
                if document[q] == document[k] and (k <= q or (prefix[q] and prefix[k])):
                    mask[row, 0, q, k] = 0.0
    logits = model(
        input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], attention_mask=mask, use_cache=False
    ).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


@pytest.mark.parametrize("name", ["LlamaConfig", "GPT2Config", "Qwen3Config", "Gemma2Config"])
def test_loss_and_gradient_are_those_of_a_mask_written_by_hand(name: str) -> None:
    model = CausalModel(wide(name))
    inputs = inputs_of(drawn())
    labels = drawn(1)
    labels[inputs["prefix"].bool() & (inputs["position_ids"] < SIZE - 1)] = -100

    def gradients() -> list[Tensor]:
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return found

    loss, _ = TokenLoss()(model(**inputs), Batch(inputs, labels, np.zeros(2, int), np.zeros(2, int)))
    loss.backward()
    ours = gradients()
    wanted = hand_written(model.pretrained, inputs, labels)
    wanted.backward()
    theirs = gradients()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    size = max(float(g.abs().max()) for g in theirs)
    assert all(torch.allclose(a, b, atol=1e-5 * size) for a, b in zip(ours, theirs, strict=True))
    # The mutant: read causally, it is another loss.
    plain = hand_written(model.pretrained, {**inputs, "prefix": torch.zeros_like(inputs["prefix"])}, labels)
    assert plain.item() != pytest.approx(wanted.item(), rel=1e-5)


# -- what cannot be read so --------------------------------------------------------------------------------------------


def wrong(prefix: Tensor, positions: Tensor, what: str) -> Tensor:
    """Masks that are wrong in a way of their own."""
    right = prefix_lm_mask(prefix, positions)
    everything = torch.ones_like(right)
    same = prefix_lm_mask(torch.ones_like(prefix), positions)
    return {
        "causal": prefix_lm_mask(torch.zeros_like(prefix), positions),
        "no isolation": right | (prefix.bool()[:, None, :, None] & prefix.bool()[:, None, None, :]),
        "the rest too": same,
        "everything": everything,
    }[what]


@pytest.mark.parametrize("what", ["causal", "no isolation", "the rest too", "everything"])
def test_a_mask_that_leaks_or_is_ignored_is_met_by_the_probe(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = CausalModel(make_llama())
    verify_model(model, prefix_tokens=24)
    monkeypatch.setattr(models, "model_prefix_mask", lambda _, prefix, positions: wrong(prefix, positions, what))
    with pytest.raises(ModelError, match="has no bidirectional attention over prefixes"):
        verify_model(model, prefix_tokens=24)


def test_the_attention_that_looks_back_only_is_met_by_the_probe() -> None:
    model = CausalModel(make_llama())
    model.pretrained.set_attn_implementation(CAUSAL_BLOCKS)
    with pytest.raises(ModelError, match="has no bidirectional attention over prefixes"):
        verify_model(model, prefix_tokens=24)


@pytest.mark.parametrize(("name", "changes"), LEAKING.items())
def test_models_without_such_a_mask_are_refused(name: str, changes: dict[str, Any]) -> None:
    """Recurrent models, whose rows are unpacked."""
    torch.manual_seed(0)
    config = getattr(transformers, name)(**changes, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model = CausalModel(AutoModelForCausalLM.from_config(config).eval())
    with pytest.raises(ModelError, match="has no bidirectional attention over prefixes"):
        verify_model(model, packed=False, prefix_tokens=24)


def test_rows_that_reach_beyond_a_window_are_refused() -> None:
    model = CausalModel(build("MistralConfig"))
    assert attention_window(model.pretrained.config) == 8
    verify_model(model, prefix_tokens=8)
    with pytest.raises(ModelError, match="rows have 9 tokens, and the attention window of this model is 8"):
        verify_model(model, prefix_tokens=9)
    assert attention_window(build("Qwen2Config").config) is None  # it has a window that it does not use
    assert attention_window(build("Gemma3TextConfig").config) == 8


# -- writing -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def without_cache(model: PreTrainedModel, ids: Tensor, tokens: int) -> Tensor:
    """Greedy writing in which everything is read anew for each token, the prompt in both directions."""
    prompt = ids.shape[1]
    for _ in range(tokens):
        positions = torch.arange(ids.shape[1])[None]
        mask = model_prefix_mask(model, (positions < prompt).long(), positions)
        logits = model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize(
    "name", ["LlamaConfig", "GPT2Config", "Qwen3Config", "Gemma2Config", "GPTNeoXConfig", "MistralConfig"]
)
def test_with_the_cache_is_without_it(name: str, attention: str | None) -> None:
    model = wide(name, attention)
    model.generation_config.eos_token_id = None
    different = 0
    for seed in range(4):
        ids = torch.randint(1, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(seed))
        options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        options["attention_mask"] = torch.ones_like(ids)
        ours = model.generate(input_ids=ids, past_key_values=prefill_prompt(model, ids), **options)
        assert ours.tolist() == without_cache(model, ids, 8).tolist()
        different += ours.tolist() != model.generate(input_ids=ids, **options).tolist()
    assert different  # the mutant: the prompt read causally


def test_a_prompt_of_one_token_has_nothing_before_its_last() -> None:
    model = make_llama()
    ids = torch.tensor([[5]])
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    ours = model.generate(input_ids=ids, past_key_values=prefill_prompt(model, ids), pad_token_id=0, **options)
    assert ours.tolist() == model.generate(input_ids=ids, pad_token_id=0, **options).tolist()


def test_a_prompt_that_is_longer_than_a_window_is_refused() -> None:
    model = build("MistralConfig")
    prefill_prompt(model, torch.ones(1, 7, dtype=torch.long))
    with pytest.raises(ModelError, match="the text has 8 tokens, and the attention window of this model is 8"):
        prefill_prompt(model, torch.ones(1, 8, dtype=torch.long))


def test_a_configuration_says_it_and_keeps_it(tmp_path: Path) -> None:
    model = make_llama()
    assert not is_prefix_lm(model.config)
    mark_prefix_lm(model.config, True)
    save_pretrained(model, make_tokenizer(), tmp_path / "marked", dtype=torch.float32)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "marked")
    assert is_prefix_lm(back.config)
    mark_prefix_lm(back.config, False)
    save_pretrained(back, make_tokenizer(), tmp_path / "plain", dtype=torch.float32)
    assert PREFIX_LM_KEY not in (tmp_path / "plain" / "config.json").read_text()
