"""Decoding token by token gives what whole sequences give, with a cache or without."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel, PreTrainedModel

from postgrad.data.random_streams import RandomStreams
from postgrad.evaluation import generate_documents as generation
from postgrad.models import sampling
from postgrad.models.decoding import DecodingWay, find_decoding_way, takes_left_padding
from postgrad.models.model import CausalModel
from postgrad.models.sampling import sample_continuations
from tests.conftest import VOCABULARY, make_llama
from tests.tiny_models import make_unpacked

NEW = 6


def make_gpt() -> PreTrainedModel:
    """A decoder without a cache of the usual name."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return OpenAIGPTLMHeadModel(OpenAIGPTConfig(**sizes)).eval()


MODELS = {
    "llama": make_llama,
    "gpt": make_gpt,
    **{name: lambda name=name: make_unpacked(name) for name in ("mamba2", "falcon_h1", "gpt_oss", "opt")},
}


def sharp(model: PreTrainedModel) -> CausalModel:
    """A model whose samples depend on the states: random weights alone give nearly equal chances."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8.0)
    return CausalModel(model).eval()


def reference(model: CausalModel, prompt: Sequence[int], uniforms: np.ndarray) -> list[int]:
    """Samples by whole forward passes."""
    ids = list(prompt)
    with torch.no_grad():
        for uniform in uniforms:
            shares_V = model(input_ids=torch.tensor([ids])).logits()[0, -1].double().softmax(-1).cumsum(-1)
            ids.append(int(torch.searchsorted(shares_V, torch.tensor(uniform) * shares_V[-1], right=True)))
    return ids[len(prompt) :]


def documents_are_those_of_whole_sequences(model: CausalModel) -> bool:
    prompts = [np.array([5, 9, 40]), np.array([7]), np.array([8, 3, 77])]
    found = generation.generate_documents(model, prompts, range(3), seed=1, max_new_tokens=NEW, stop_ids=[])
    wanted = [
        reference(model, prompt.tolist(), RandomStreams(1).generator(i, 0).random(NEW))
        for i, prompt in enumerate(prompts)
    ]
    return [document.ids.tolist() for document in found] == wanted


@pytest.mark.parametrize("name", MODELS)
def test_generated_documents_are_those_of_whole_sequences(name: str) -> None:
    assert documents_are_those_of_whole_sequences(sharp(MODELS[name]()))


@pytest.mark.parametrize("name", MODELS)
def test_samples_are_those_of_whole_sequences(name: str) -> None:
    model, uniforms = sharp(MODELS[name]()), np.random.default_rng(0).random((2, NEW))
    prompts = [[5, 9, 40], [8, 3, 77]]
    found, size_B = sample_continuations(model, torch.tensor(prompts), uniforms, temperature=1.0, eos=VOCABULARY)
    assert size_B.tolist() == [NEW, NEW]
    assert found.tolist() == [reference(model, *pair) for pair in zip(prompts, uniforms, strict=True)]


def test_a_model_without_a_cache_reads_whole_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: the usual cache for every model."""
    model = sharp(make_gpt())
    assert find_decoding_way(model) is DecodingWay.WHOLE and not takes_left_padding(model)
    for module in (generation, sampling):
        monkeypatch.setattr(module, "find_decoding_way", lambda *_, **__: DecodingWay.CACHE)
    assert not documents_are_those_of_whole_sequences(model)


def test_the_usual_cache_is_taken_where_it_works() -> None:
    model = CausalModel(make_llama())
    assert find_decoding_way(model) is DecodingWay.CACHE and takes_left_padding(model)
