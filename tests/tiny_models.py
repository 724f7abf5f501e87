"""Texts, tokenizers and tiny models, made from seeds without the package: of the tests and of the regression's runs."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 320
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
WORDS = [*NUMBERS, "and", "yes", "no", "plus"]


def old_text(count: int, seed: int = 0) -> list[str]:
    """Documents of one kind: short sentences about numbers."""
    rng = random.Random(seed)
    return [
        " ".join(f"{rng.choice(NUMBERS)} and {rng.choice(NUMBERS)}." for _ in range(rng.randint(3, 12)))
        for _ in range(count)
    ]


def new_text(count: int, seed: int = 1) -> list[str]:
    """Documents of another kind: assignments."""
    rng = random.Random(seed)

    def line() -> str:
        return f"x{rng.randint(0, 9)} = y{rng.randint(0, 9)} * {rng.randint(0, 99)};"

    return ["\n".join(line() for _ in range(rng.randint(2, 9))) for _ in range(count)]


def make_bpe(special: list[str], vocabulary: int = 320) -> Tokenizer:
    """A byte-level BPE tokenizer trained on the tests' own texts, with its special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(old_text(50) + new_text(50), trainer)
    return tokenizer


def make_tokenizer(vocabulary: int = VOCABULARY, *, bos: bool = False) -> PreTrainedTokenizerFast:
    """A decoder's tokenizer, trained on the tests' own texts."""
    special = ["<|end|>", "<|begin|>"] if bos else ["<|end|>"]
    tokenizer = make_bpe(special, vocabulary)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|begin|>" if bos else None
    )


def t5_tokenizer(sentinels: int = 20) -> PreTrainedTokenizerFast:
    """A tokenizer that ends a text with `</s>` and has sentinels; `x </s>`, `x </s> y </s>`."""
    tokenizer = make_bpe(["<pad>", "</s>", *(f"<extra_id_{i}>" for i in range(sentinels))])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def bert_tokenizer(words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer with a vocabulary written by hand, with whole `words`; `[CLS] x [SEP]`, `[CLS] x [SEP] y [SEP]`."""
    letters = [c for c in string.printable if not c.isspace()]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters), *words]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def make_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A two-layer Llama with random weights."""
    torch.manual_seed(seed)
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        **changes,
    }
    return LlamaForCausalLM(LlamaConfig(**config)).eval()


def make_bert(vocabulary: int, seed: int = 0, dropout: float = 0.0) -> BertForMaskedLM:
    """A two-layer BERT with random weights; `dropout` is that of its hidden states."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=0.0,
    )
    return BertForMaskedLM(config).eval()


def make_t5(vocabulary: int, seed: int = 0) -> T5ForConditionalGeneration:
    """A T5 of two and two layers with random weights, without dropout."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=vocabulary,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5ForConditionalGeneration(config).eval()


_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_GATED: dict[str, Any] = {**_DECODER, "intermediate_size": 48, "num_key_value_heads": 2}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
UNPACKED_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba2": (
        "Mamba2Config",
        {
            **{key: _DECODER[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")},
            "num_heads": 8,
            "head_dim": 8,
            "state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
    ),
    "falcon_h1": (
        "FalconH1Config",
        {
            **_GATED,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 8,
        },
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        {**_GATED, **_LINEAR, **_EXPERTS, "head_dim": 8, "num_experts": 4, "shared_expert_intermediate_size": 16},
    ),
    "lfm2": ("Lfm2Config", {**_GATED, "layer_types": ["conv", "full_attention"]}),
    "gpt_oss": (
        "GptOssConfig",
        {**_GATED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
    "opt": ("OPTConfig", {**_DECODER, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
}
"""Families whose packed documents see each other, with tiny configurations: recurrent, hybrid, convolutional; with attention
sinks; without a mask or with biases that follow position ids."""


def make_unpacked(family: str, **changes: Any) -> PreTrainedModel:
    """A two-layer model of a family of `UNPACKED_FAMILIES`, with random weights."""
    torch.manual_seed(0)
    name, options = UNPACKED_FAMILIES[family]
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    return AutoModelForCausalLM.from_config(getattr(transformers, name)(**{**options, **ids, **changes})).eval()
