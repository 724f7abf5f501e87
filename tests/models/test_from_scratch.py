"""A new model has the weights that were asked for, guesses uniformly at first, and is a function of its seed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
)

from postgrad.data.read.files import RawSource
from postgrad.data.tokens.train_vocabulary import VocabularySource, train_vocabulary
from postgrad.errors import ModelError
from postgrad.models.families import FAMILIES, count_weights, parse_model_name, solve_config
from postgrad.models.from_scratch import init_model, make_tokenizer, select_special_tokens, set_dropout, set_token_ids
from postgrad.models.layers import count_parameters
from postgrad.models.pretrained import save_pretrained
from tests.conftest import old_text, write_jsonl

VOCABULARY = 1000


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("size", "weights"), [("1M", 1e6), ("3.5m", 3.5e6), ("40M", 40e6)])
def test_the_weights_are_those_that_were_asked_for(family: str, size: str, weights: float) -> None:
    config = solve_config(f"{family}-{size}", vocabulary=VOCABULARY, positions=512)
    assert count_weights(config) == pytest.approx(weights, rel=0.015)
    assert config.vocab_size == VOCABULARY


def test_the_weights_of_a_llama_are_those_of_the_formula() -> None:
    """With d the width, i the inner width and L blocks: V d + L (4 d^2 + 3 d i + 2 d) + d; head and embedding are one."""
    c: Any = solve_config("llama-2M", vocabulary=VOCABULARY, positions=512)
    d, i, blocks = c.hidden_size, c.intermediate_size, c.num_hidden_layers
    by_hand = VOCABULARY * d + blocks * (4 * d * d + 3 * d * i + 2 * d) + d
    assert count_weights(c) == by_hand == count_parameters(init_model(c, 0))


def test_names_that_mean_nothing() -> None:
    assert parse_model_name("GPT2-1.5B")[1] == 1_500_000_000
    for name, said in (
        ("llama", "not a family and size"), ("llama-15", "not a family and size"), ("lama-15M", "did you mean 'llama'"),
        ("mamba-15M", "model.config"),
    ):  # fmt: skip
        with pytest.raises(ModelError, match=said):
            parse_model_name(name)
    with pytest.raises(ModelError, match=r"a block of width 32 and its embeddings have \d"):
        solve_config("bert-100k", vocabulary=8000, positions=512)


def loss_of(model: PreTrainedModel, vocabulary: int) -> float:
    """The mean loss of random labels after random tokens."""
    torch.manual_seed(1)
    ids, labels = torch.randint(3, vocabulary, (2, 8, 48))
    with torch.no_grad():
        if not model.config.is_encoder_decoder:
            logits = model(input_ids=ids).logits
        else:
            logits = model(input_ids=ids, decoder_input_ids=ids.flip(0)).logits
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


@pytest.mark.parametrize("name", ["llama-1M", "gpt2-1M", "qwen3-1M", "bert-1M", "t5-1M", "llama-10M", "t5-10M"])
def test_at_first_every_token_is_as_likely(name: str) -> None:
    model = init_model(solve_config(name, vocabulary=VOCABULARY, positions=512), 0)
    assert loss_of(model, VOCABULARY) == pytest.approx(math.log(VOCABULARY), abs=0.1)


def test_t5_s_own_factor_would_be_caught() -> None:
    """The mutant: with a factor of 1 the decoder says its own input again, and is much worse than a uniform guess."""
    config: Any = solve_config("t5-1M", vocabulary=VOCABULARY, positions=512)
    config.initializer_factor = 1.0
    model = init_model(config, 0)
    ids = torch.randint(3, VOCABULARY, (4, 32))
    with torch.no_grad():
        logits = model(input_ids=ids, decoder_input_ids=ids).logits
    labels = ids.roll(-1, 1)
    assert torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()) > math.log(VOCABULARY) + 1


DEEP = 24


def deep(family: str) -> PreTrainedConfig:
    if family == "gpt2":
        return GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=DEEP, n_head=2, n_positions=64,
                          bos_token_id=None, eos_token_id=None)  # fmt: skip
    if family == "t5":
        return T5Config(vocab_size=VOCABULARY, d_model=64, d_ff=128, num_layers=DEEP, num_heads=2, d_kv=32,
                        initializer_factor=1 / 8, decoder_start_token_id=0)  # fmt: skip
    return LlamaConfig(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=DEEP,
                       num_attention_heads=2, tie_word_embeddings=True)  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_deep_models_neither_explode_nor_starve(family: str) -> None:
    """The loss begins at ln V, and the first block's gradient is of the size of the last one's."""
    model = init_model(deep(family), 0).train()
    assert loss_of(model, VOCABULARY) == pytest.approx(math.log(VOCABULARY), abs=0.1)
    ids = torch.randint(3, VOCABULARY, (4, 32))
    model(input_ids=ids, labels=ids.roll(-1, 1)).loss.backward()
    by_block: dict[int, float] = {}
    for name, p in model.named_parameters():
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        if numbers and p.grad is not None and "encoder" not in name:
            by_block[numbers[0]] = by_block.get(numbers[0], 0.0) + float(p.grad.norm()) ** 2
    assert len(by_block) == (DEEP if family != "t5" else model.config.num_decoder_layers)
    assert max(by_block.values()) < 100**2 * min(by_block.values()), by_block


def test_weights_are_a_function_of_the_seed_and_nobody_else_s_numbers_are_touched() -> None:
    config = solve_config("llama-1M", vocabulary=VOCABULARY, positions=512)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = init_model(config, 1), init_model(config, 1), init_model(config, 2)
    assert torch.equal(before, torch.get_rng_state())
    for a, b in zip(one.parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert all(p.dtype == torch.float32 for p in one.parameters())


AROUND = {
    "llama": ("<s> x", "<s> x <s> y"),
    "gpt2": ("x", "x y"),
    "qwen3": ("x", "x y"),
    "bert": ("[CLS] x [SEP]", "[CLS] x [SEP] y [SEP]"),
    "t5": ("x </s>", "x </s> y </s>"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizers_have_the_special_tokens_of_their_family(family: str, tmp_path: Path) -> None:
    marks = FAMILIES[family].special_tokens
    path = write_jsonl(tmp_path / "a.jsonl", old_text(60))
    written = train_vocabulary(
        [VocabularySource(RawSource("a", str(path), where="a"), lambda _: 0.0)],
        lambda _: [1.0],
        shares_key=None,
        size=VOCABULARY, special_tokens=marks.tokens, held_out_sources=[], cache=tmp_path,
    )  # fmt: skip
    tokenizer = make_tokenizer(written, marks)
    config = solve_config(f"{family}-1M", vocabulary=len(tokenizer), positions=128)
    set_token_ids(config, tokenizer)
    save_pretrained(init_model(config, 0), tokenizer, tmp_path / "model", dtype=torch.float32)
    read: Any = AutoTokenizer.from_pretrained(tmp_path / "model")
    single, pair = AROUND[family]
    assert read.convert_ids_to_tokens(read("x")["input_ids"]) == single.split()
    assert read.convert_ids_to_tokens(read("x", "y")["input_ids"]) == pair.split()
    for name, token in marks.named_tokens:
        assert getattr(read, f"{name}_token") == token
        assert name == "unk" or getattr(config, f"{name}_token_id") == read.convert_tokens_to_ids(token)
    assert config.eos_token_id is not None
    text = "three and four.  \n\tfive"
    assert read.decode(read(text, add_special_tokens=False)["input_ids"]) == text
    if family == "t5":
        assert read.convert_tokens_to_ids("<extra_id_99>") == 102 and config.decoder_start_token_id == read.pad_token_id
        assert "<extra_id_7>" in read.all_special_tokens
    if family == "bert":
        assert read("x", "y")["token_type_ids"] == [0, 0, 0, 1, 1]


def test_other_architectures_have_the_special_tokens_of_a_family_of_their_task() -> None:
    from transformers import ElectraConfig, GPTNeoXConfig, MT5Config

    assert select_special_tokens(GPTNeoXConfig(), None) is FAMILIES["llama"].special_tokens
    assert select_special_tokens(ElectraConfig(), None) is FAMILIES["bert"].special_tokens
    assert select_special_tokens(MT5Config(), None) is FAMILIES["t5"].special_tokens
    assert select_special_tokens(GPT2Config(), None) is FAMILIES["gpt2"].special_tokens


def test_dropout_is_set_wherever_a_configuration_has_it() -> None:
    for family, name in (("gpt2", "resid_pdrop"), ("bert", "hidden_dropout_prob"), ("t5", "dropout_rate")):
        config = solve_config(f"{family}-1M", vocabulary=VOCABULARY, positions=128)
        assert getattr(config, name) == 0.1
        set_dropout(config, 0.3)
        assert getattr(config, name) == 0.3
        dropouts = [m.p for m in init_model(config, 0).modules() if isinstance(m, torch.nn.Dropout)]
        assert dropouts and set(dropouts) == {0.3}
    with pytest.raises(ModelError, match="a mamba has no dropout"):
        set_dropout(MambaConfig(), 0.1)
