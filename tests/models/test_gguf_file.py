"""A GGUF file holds the model: transformers reads the same logits from it, llama.cpp computes them and finds the same ids."""

from __future__ import annotations

import builtins
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from postgrad.errors import MissingExtra, ModelError
from postgrad.models import gguf_tensors, gguf_vocabulary
from postgrad.models.families import FAMILIES
from postgrad.models.from_scratch import make_tokenizer
from postgrad.models.gguf_file import read_gguf, require_gguf, write_gguf
from postgrad.models.task import Task
from tests import tokenizer_forms
from tests.tiny_models import new_text, old_text

WORDS, WORDS_OF_ONE_DIGIT = (gguf_vocabulary._WORDS % digits for digits in ("{1,3}", ""))
SIZE = 416
SHAPE = {
    "vocab_size": SIZE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "llama 3, tied, with biases": lambda: LlamaConfig(
        **SHAPE, rope_parameters=LLAMA3, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "wide heads, scaled": lambda: LlamaConfig(**SHAPE, head_dim=32, rope_parameters=LINEAR),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=48),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=32),
    "gpt2": lambda: GPT2Config(vocab_size=SIZE, n_embd=64, n_layer=2, n_head=4, n_positions=256),
}
FIRST = ["llama", "llama 3, tied, with biases", "gpt2"]
TEXTS = [
    "hello world", "  two spaces", "a\n\nb\r\n c\t d", "don't WE'LL I'm", "1234567 89.5%", "naïve café 東京 мир 🙂👍🏽",
    "x=(a+b)**2; // end", "   ", "\n", "tail   ", "ﬁ ½ ²", "e\u0301", "a\u00a0b\u2003c", "'s't", "____ -- ==", "ไทย हिन",
    "a</s>b",
]  # fmt: skip


def byte_level(pre_tokenizer: Any, ignore_merges: bool = False, normalizer: Any = None) -> str:
    """A trained byte-level BPE behind a pre-tokenizer."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*old_text(20), *new_text(20), *TEXTS * 3], trainer)
    return tokenizer.to_str()


def split(regex: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def sentencepiece(complete: bool = True) -> str:
    """A vocabulary as SentencePiece's, where every pair that joins to a token is merged, or one that lacks some merges."""
    trained = Tokenizer.from_str(tokenizer_forms._trained_metaspace("never"))
    vocabulary = trained.get_vocab()
    tokens = sorted((t for t in vocabulary if not t.startswith("<")), key=vocabulary.__getitem__)
    merges = [(t[:c], t[c:]) for t in tokens for c in range(1, len(t)) if t[:c] in vocabulary and t[c:] in vocabulary]
    if not complete:
        merges = [merge for number, merge in enumerate(merges) if number % 5]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer.to_str()


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
TOKENIZERS: dict[str, Callable[[], str]] = {
    "gpt-2": lambda: byte_level(BYTES),
    "smollm": lambda: byte_level(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES])),
    "llama-bpe": lambda: byte_level(split(WORDS), ignore_merges=True),
    "smaug-bpe": lambda: byte_level(split(WORDS)),
    "qwen2": lambda: byte_level(split(WORDS_OF_ONE_DIGIT)),
    "default": sentencepiece,
}
"""By llama.cpp's name of the pre-tokenizer."""


@cache
def make(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer with special tokens of a Llama around a text."""
    tokenizer = Tokenizer.from_str(TOKENIZERS[name]())
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    return make_tokenizer(tokenizer.to_str(), FAMILIES["llama"].special_tokens)


def model_of(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) / 5)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model((torch.arange(40)[None] * 7 + 3) % SIZE).logits[0].float()


def field(path: Path, key: str) -> Any:
    return GGUFReader(path).fields[key].contents()


@pytest.mark.parametrize(
    "name", [*FIRST, *(pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS if n not in FIRST)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_transformers_reads_the_same_logits(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(CONFIGS[name]())
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    assert write_gguf(tmp_path / "a.gguf", model, make("gpt-2"), Task.CAUSAL, dtype) == []
    assert torch.equal(logits(read_gguf(tmp_path / "a.gguf", model, dtype)), logits(model))
    # The mutant: the tensors as transformers has them.
    architecture = gguf_tensors.Architecture("llama", ("silu",), has_rope_factors=True)
    if name == "llama" and dtype == torch.float32:
        monkeypatch.setitem(gguf_tensors.ARCHITECTURES, "llama", architecture)
        write_gguf(tmp_path / "b.gguf", model, make("gpt-2"), Task.CAUSAL, dtype)
        assert not torch.allclose(logits(read_gguf(tmp_path / "b.gguf", model, dtype)), logits(model), atol=1e-2)


def test_what_a_server_needs_is_written(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(TOKENIZERS["gpt-2"](), FAMILIES["llama"].special_tokens)
    tokenizer.chat_template = "{{ messages[0].content }}"
    model = model_of(CONFIGS["mistral"]())
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 7]
    write_gguf(tmp_path / "a.gguf", model, tokenizer, Task.CAUSAL, torch.float16)
    expected = {
        "general.architecture": "llama",
        "llama.context_length": 48,  # the sliding window
        "tokenizer.chat_template": tokenizer.chat_template,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.eot_token_id": 7,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.ggml.pre": "gpt-2",
    }
    assert {key: field(tmp_path / "a.gguf", key) for key in expected} == expected
    assert len(field(tmp_path / "a.gguf", "tokenizer.ggml.tokens")) == SIZE


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_pre_tokenizer_has_llama_cpps_name(name: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", model_of(CONFIGS["llama"]()), make(name), Task.CAUSAL, torch.float32)
    assert field(tmp_path / "a.gguf", "tokenizer.ggml.pre") == name


@pytest.mark.parametrize(
    ("vocabulary", "problem"),
    [
        (lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), "pre-tokenizer"),
        (lambda: byte_level(split(r"\p{L}+|\p{N}+")), "pre-tokenizer"),
        (lambda: byte_level(BYTES, normalizer=normalizers.Lowercase()), "normalizer Lowercase"),
        (lambda: sentencepiece(complete=False), "merges"),
        (tokenizer_forms._trained_unigram, "Unigram"),
    ],
    ids=["prefix space", "regex", "lowercase", "merges", "unigram"],
)
def test_a_tokenizer_without_a_word_is_refused(vocabulary: Callable[[], str], problem: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(vocabulary())
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    wrapped = make_tokenizer(tokenizer.to_str(), FAMILIES["llama"].special_tokens)
    with pytest.raises(ModelError, match=f"no word for .*{problem}") as caught:
        write_gguf(tmp_path / "a.gguf", model_of(CONFIGS["llama"]()), wrapped, Task.CAUSAL, torch.float32)
    assert caught.value.hint and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (lambda: LlamaConfig(**SHAPE, hidden_act="gelu"), "the activation 'gelu'"),
        (lambda: Qwen2Config(**SHAPE, rope_parameters=LLAMA3), "rope_type: llama3"),
        (lambda: BertConfig(vocab_size=SIZE, hidden_size=32, num_attention_heads=2, num_hidden_layers=1), "'bert'"),
    ],
    ids=["activation", "rope", "architecture"],
)
def test_a_model_that_llama_cpp_computes_otherwise_is_refused(
    config: Callable[[], PreTrainedConfig], problem: str, tmp_path: Path
) -> None:
    model = model_of(config())
    with pytest.raises(ModelError, match=problem) as caught:
        write_gguf(tmp_path / "a.gguf", model, make("gpt-2"), Task.CAUSAL, torch.float32)
    assert "convert_hf_to_gguf.py" in caught.value.hint and not list(tmp_path.iterdir())
    with pytest.raises(ModelError, match="holds a decoder"):
        write_gguf(tmp_path / "a.gguf", model, make("gpt-2"), Task.MASKED, torch.float32)


def test_without_the_package_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return real(name, *rest, **options)

    require_gguf()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r"pip install 'postgrad\[gguf\]'"):
        require_gguf()


def open_llama_cpp(path: Path) -> Any:
    """The model in llama.cpp, with a cache of keys and values in fp32."""
    library = pytest.importorskip("llama_cpp")
    return library.Llama(str(path), n_ctx=256, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_computes_the_same_logits(name: str, tmp_path: Path) -> None:
    model = model_of(CONFIGS[name]())
    write_gguf(tmp_path / "a.gguf", model, make("gpt-2"), Task.CAUSAL, torch.float32)
    opened = open_llama_cpp(tmp_path / "a.gguf")
    opened.eval([(number * 7 + 3) % SIZE for number in range(40)])
    # GPT-2's activation is a table in half precision there.
    torch.testing.assert_close(
        torch.tensor(opened.scores[:40]), logits(model), rtol=0, atol=1e-3 if name == "gpt2" else 1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_finds_the_same_ids(name: str, tmp_path: Path) -> None:
    tokenizer = make(name)
    write_gguf(tmp_path / "a.gguf", model_of(CONFIGS["llama"]()), tokenizer, Task.CAUSAL, torch.float32)
    opened, rng = open_llama_cpp(tmp_path / "a.gguf"), random.Random(0)
    pieces = [*"".join(TEXTS).replace("</s>", ""), *"  \n\n\t'", "</s>", *old_text(5)]
    texts = [*TEXTS, *old_text(20), *("".join(rng.choices(pieces, k=rng.randrange(1, 40))) for _ in range(500))]
    wrong = [t for t in texts if opened.tokenize(t.encode(), add_bos=True, special=True) != tokenizer(t)["input_ids"]]
    assert not wrong, wrong[:5]
