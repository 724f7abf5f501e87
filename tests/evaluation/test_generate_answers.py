"""What is written does not depend on who shares the batch, and ends where it should."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from postgrad.evaluation import generate_answers as generation
from postgrad.evaluation.generate_answers import StoppingRule, generate_answers
from postgrad.models.cpu_attention import CAUSAL_BLOCKS
from postgrad.models.prefix_lm_attention import mark_prefix_lm, model_prefix_mask
from postgrad.tuning.prefix import Prefix
from postgrad.tuning.prompt import PromptTuning
from tests.conftest import make_llama, make_tokenizer, old_text
from tests.tiny_stages import make_t5, t5_tokenizer


def talkative(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """The model with weights so large that it says different things."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.4)
    return model.eval()


def make_gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


FAMILIES = {
    "llama": lambda: (make_llama(tie_word_embeddings=False), make_tokenizer()),
    "gpt2": lambda: (make_gpt2(), make_tokenizer()),
    "t5": lambda: (make_t5(len(t5_tokenizer())), t5_tokenizer()),
}
FAMILIES["causal_blocks"] = lambda: (
    make_llama(tie_word_embeddings=False, attn_implementation=CAUSAL_BLOCKS),
    make_tokenizer(),
)
"""As a model attends while it is trained on a CPU."""
TUNINGS = {
    "none": None,
    "prompt": lambda model: PromptTuning(model, length=3, seed=1),
    "prefix": lambda model: Prefix(model, length=3, hidden=8, seed=1),
}


@contextmanager
def made(family: str, tuning: str) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerFast, list[list[int]]]]:
    """A model, its tokenizer, and prompts of several lengths, behind the places of a soft prompt where there is one."""
    model, tokenizer = FAMILIES[family]()
    talkative(model)
    attach = TUNINGS[tuning]
    put = attach(model) if attach else None
    before = put.virtual_token_ids if isinstance(put, PromptTuning) else []
    texts = [text[: 5 + 7 * i] for i, text in enumerate(old_text(7, 3))]
    yield model.eval(), tokenizer, [[*before, *tokenizer(text)["input_ids"]] for text in texts]


@torch.no_grad()
def by_hand(model: PreTrainedModel, prompt: list[int], most: int, ends: list[int]) -> list[int]:
    """Greedy tokens without cache, batch or padding."""
    apart = model.config.is_encoder_decoder
    ids = [model.config.decoder_start_token_id] if apart else list(prompt)
    begun = len(ids)
    for _ in range(most):
        inputs = (
            {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([ids])}
            if apart
            else {"input_ids": torch.tensor([ids])}
        )
        ids.append(int(model(**inputs).logits[0, -1].argmax()))
        if ids[-1] in ends:
            ids.pop()
            break
    return ids[begun:]


@pytest.mark.parametrize("tuning", list(TUNINGS))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_together_as_one_by_one(family: str, tuning: str) -> None:
    with made(family, tuning) as (model, tokenizer, prompts):
        eos = tokenizer.eos_token_id
        expected = [tokenizer.decode(by_hand(model, prompt, 12, [eos]), skip_special_tokens=True) for prompt in prompts]
        found = generate_answers(
            model, tokenizer, prompts, StoppingRule(12), eos_ids=[eos], pad=tokenizer.pad_token_id or 0
        )
        assert found == expected
        assert len(set(found)) > 3, "a model that always says the same would not show a wrong order"


@torch.no_grad()
def test_a_prefix_language_model_reads_its_prompts_in_both_directions() -> None:
    with made("llama", "none") as (model, tokenizer, prompts):
        prompts += [prompt[::-1] for prompt in prompts]
        causal = generate_answers(model, tokenizer, prompts, StoppingRule(8), eos_ids=[0], pad=0)
        mark_prefix_lm(model.config, True)
        expected = []
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(8):
                of_prefix = torch.tensor([[1] * len(prompt) + [0] * (len(ids) - len(prompt))])
                places = torch.arange(len(ids))[None]
                seen = model_prefix_mask(model, of_prefix, places)
                logits = model(input_ids=torch.tensor([ids]), position_ids=places, attention_mask=seen).logits
                ids.append(int(logits[0, -1].argmax()))
                if ids[-1] == 0:
                    ids.pop()
                    break
            expected.append(tokenizer.decode(ids[len(prompt) :]))
        found = generate_answers(model, tokenizer, prompts, StoppingRule(8), eos_ids=[0], pad=0)
        assert found == expected != causal


def test_padding_on_the_wrong_side_would_be_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: a decoder's prompts filled up on the right, so that it goes on behind the padding."""
    plain = generation._pad_prompts
    monkeypatch.setattr(generation, "_pad_prompts", lambda prompts, pad, left: plain(prompts, pad, left=False))
    with made("llama", "none") as (model, tokenizer, prompts):
        expected = [tokenizer.decode(by_hand(model, prompt, 12, [0])) for prompt in prompts]
        assert generate_answers(model, tokenizer, prompts, StoppingRule(12), eos_ids=[0], pad=0) != expected


def test_an_answer_ends_at_a_stop_whatever_it_stands_in() -> None:
    with made("llama", "none") as (model, tokenizer, prompts):
        whole = generate_answers(model, tokenizer, prompts, StoppingRule(12), eos_ids=[0], pad=0)
        for text in whole:
            for stop in (text[2:3], text[3:6], text[-2:]):
                if stop.strip():
                    expected = [each[: at if (at := each.find(stop)) >= 0 else len(each)] for each in whole]
                    assert (
                        generate_answers(model, tokenizer, prompts, StoppingRule(12, (stop,)), eos_ids=[0], pad=0)
                        == expected
                    )
        # Of two stops the first one that is met.
        a, b = whole[0][2], whole[0][4]
        cut = generate_answers(model, tokenizer, prompts, StoppingRule(12, (b, a)), eos_ids=[0], pad=0)[0]
        assert cut == whole[0][: min(whole[0].find(a), whole[0].find(b))]


def test_a_token_that_ends_an_answer_and_the_most_tokens() -> None:
    with made("llama", "none") as (model, tokenizer, prompts):
        ids = [by_hand(model, prompt, 12, [0]) for prompt in prompts]
        end = ids[0][4]
        expected = [tokenizer.decode(row[: row.index(end)] if end in row else row) for row in ids]
        assert generate_answers(model, tokenizer, prompts, StoppingRule(12), eos_ids=[end, 0], pad=0) == expected
        assert generate_answers(model, tokenizer, prompts, StoppingRule(3), eos_ids=[0], pad=0) == [
            tokenizer.decode(r[:3]) for r in ids
        ]
        # What the model's own folder names ends an answer too.
        model.generation_config.eos_token_id = [end, 0]
        assert generate_answers(model, tokenizer, prompts, StoppingRule(12), eos_ids=[], pad=0) == expected


def test_a_folder_that_asks_for_draws_or_penalties_is_not_heard() -> None:
    with made("llama", "none") as (model, tokenizer, prompts):
        plain = generate_answers(model, tokenizer, prompts, StoppingRule(12), eos_ids=[0], pad=0)
        model.generation_config.update(repetition_penalty=3.0, no_repeat_ngram_size=1, do_sample=True, num_beams=2)
        assert generate_answers(model, tokenizer, prompts, StoppingRule(12), eos_ids=[0], pad=0) == plain


def test_many_prompts_are_several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    with made("llama", "none") as (model, tokenizer, prompts):
        plain = generate_answers(model, tokenizer, prompts, StoppingRule(6), eos_ids=[0], pad=0)
        monkeypatch.setattr(generation, "_PROMPTS_AT_ONCE", 2)
        assert generate_answers(model, tokenizer, prompts, StoppingRule(6), eos_ids=[0], pad=0) == plain
        monkeypatch.setattr(generation, "_TOKENS_AT_ONCE", 1)
        assert generate_answers(model, tokenizer, prompts, StoppingRule(6), eos_ids=[0], pad=0) == plain
        assert generate_answers(model, tokenizer, [], StoppingRule(6), eos_ids=[0], pad=0) == []
        model.train()
        generate_answers(model, tokenizer, prompts[:1], StoppingRule(1), eos_ids=[0], pad=0)
        assert model.training
