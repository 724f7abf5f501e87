"""Model families for training from scratch: `llama-15M` as a configuration whose shape has that number of weights.

All weights of the language model count: embeddings and head too, tied ones once. Among the shapes with that number of weights
the one is chosen whose width is closest to 48 times its depth and whose inner width is closest to the family's usual multiple
of the width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from tokenizers import Tokenizer
from transformers import (
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
    T5Config,
)

from postgrad.errors import ModelError, suggest_nearest
from postgrad.models.layers import count_parameters
from postgrad.models.pretrained import detect_config_task, make_random_model

_ASPECT = 48
"""Width by depth: small published models have 43 (stories15M) to 85 (pythia-70m)."""
_WIDTHS = (*range(32, 256, 32), *range(256, 1024, 64), *range(1024, 4097, 128))
_MAX_DEPTH = 64
_INNER_STEP = 8
_WHERE = "model.from_scratch"


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a tokenizer by role, and the templates of one text and of two."""

    named_tokens: tuple[tuple[str, str], ...]
    """(name, token): `("eos", "</s>")`."""
    single: str = "$A"
    pair: str = "$A $B"
    extra: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")

    @property
    def tokens(self) -> tuple[str, ...]:
        """All of them, each once."""
        return tuple(dict.fromkeys((*(token for _, token in self.named_tokens), *self.extra)))

    def ids(self, tokenizer: Tokenizer) -> dict[str, int | None]:
        """`bos_token_id` and so on, as a configuration has them."""
        return {f"{name}_token_id": tokenizer.token_to_id(token) for name, token in self.named_tokens}


@dataclass(frozen=True)
class ModelShape:
    """Width, blocks (of an encoder-decoder: of each stack) and inner width, with vocabulary size and positions."""

    width: int
    depth: int
    inner: int
    vocabulary: int
    positions: int

    @property
    def heads(self) -> int:
        """Heads of 64, and of 32 in narrow models."""
        return self.width // head_size(self.width)


def head_size(width: int) -> int:
    """The width of a head."""
    return 64 if width >= 512 else 32


def _llama(shape: ModelShape) -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=True,
    )


def _qwen3(shape: ModelShape) -> PreTrainedConfig:
    return Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads // 2 if shape.heads % 2 == 0 else shape.heads,
        head_dim=head_size(shape.width),
        max_position_embeddings=shape.positions,
        tie_word_embeddings=True,
    )


def _gpt2(shape: ModelShape) -> PreTrainedConfig:
    return GPT2Config(
        vocab_size=shape.vocabulary,
        n_embd=shape.width,
        n_inner=shape.inner,
        n_layer=shape.depth,
        n_head=shape.heads,
        n_positions=shape.positions,
        bos_token_id=None,  # those of the published vocabulary, else
        eos_token_id=None,
    )


def _bert(shape: ModelShape) -> PreTrainedConfig:
    return BertConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.positions,
    )


def _t5(shape: ModelShape) -> PreTrainedConfig:
    config = T5Config(
        vocab_size=shape.vocabulary,
        d_model=shape.width,
        d_ff=shape.inner,
        num_layers=shape.depth,
        num_decoder_layers=shape.depth,
        num_heads=shape.heads,
        d_kv=head_size(shape.width),
        # T5's own factor of 1 is made for Adafactor, whose steps are relative to the weights. Under tied embeddings it gives
        # the decoder's own input token a logit of sqrt(width) at the start; with this one it is 1.
        initializer_factor=1 / math.sqrt(shape.width),
    )
    config.tie_word_embeddings = True
    config.decoder_start_token_id = 0
    return config


@dataclass(frozen=True)
class Family:
    """How a family's configuration is made from a shape, its usual inner width by width, and its special tokens."""

    config: Callable[[ModelShape], PreTrainedConfig]
    inner: float
    special_tokens: SpecialTokens


FAMILIES: dict[str, Family] = {
    "llama": Family(
        _llama,
        8 / 3,
        SpecialTokens((("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>")), "<s> $A", "<s> $A <s> $B"),
    ),
    "gpt2": Family(_gpt2, 4.0, SpecialTokens((("bos", "<|endoftext|>"), ("eos", "<|endoftext|>"), ("pad", "<|pad|>")))),
    "qwen3": Family(
        _qwen3,
        3.0,
        SpecialTokens((("eos", "<|endoftext|>"), ("pad", "<|pad|>")), extra=("<|im_start|>", "<|im_end|>")),
    ),
    "bert": Family(
        _bert,
        4.0,
        SpecialTokens(
            (("pad", "[PAD]"), ("unk", "[UNK]"), ("cls", "[CLS]"), ("sep", "[SEP]"), ("mask", "[MASK]")),
            "[CLS] $A [SEP]",
            "[CLS] $A [SEP] $B:1 [SEP]:1",
            inputs=("input_ids", "token_type_ids", "attention_mask"),
        ),
    ),
    "t5": Family(
        _t5,
        4.0,
        SpecialTokens(
            (("pad", "<pad>"), ("eos", "</s>"), ("unk", "<unk>")),
            "$A </s>",
            "$A </s> $B </s>",
            extra=tuple(f"<extra_id_{i}>" for i in range(100)),
        ),
    ),
}


def parse_model_name(name: str) -> tuple[Family, int]:
    """The family and number of weights of `llama-15M`. Raises `ModelError` for an unknown family or an invalid size."""
    match = re.fullmatch(r"([a-z]\w*)-(\d+(?:\.\d+)?)([kmb])", name.strip(), re.IGNORECASE)
    if not match:
        raise ModelError(
            f"{name!r} is not a family and size",
            where=_WHERE,
            expected=f"a family ({', '.join(FAMILIES)}) and a number of weights, such as llama-15M",
        )
    family = FAMILIES.get(match[1].lower())
    if family is None:
        raise ModelError(
            f"unknown family {match[1]!r}",
            where=_WHERE,
            expected=" | ".join(FAMILIES),
            hint=f"{suggest_nearest(match[1], FAMILIES)} (model.config takes the configuration of any other)".strip(),
        )
    return family, round(float(match[2]) * {"k": 1e3, "m": 1e6, "b": 1e9}[match[3].lower()])


def solve_config(name: str, *, vocabulary: int, positions: int) -> PreTrainedConfig:
    """The configuration of `family-size` for a vocabulary. Raises `ModelError` when no shape has so few weights."""
    family, weights = parse_model_name(name)
    best: tuple[float, ModelShape] | None = None
    narrowest = 0
    for width in _WIDTHS:
        inner = _round_inner(family.inner * width)
        at = partial(_count_shape_weights, family, width=width, vocabulary=vocabulary, positions=positions)
        one, two, wider = at(depth=1, inner=inner), at(depth=2, inner=inner), at(depth=2, inner=2 * inner)
        # The count is linear in the depth, and in the inner width for a depth.
        outside, block, each = 2 * one - two, two - one, (wider - two) / (2 * inner)
        narrowest = narrowest or one
        if outside + block / 2 > weights:
            break
        for depth in range(1, _MAX_DEPTH + 1):
            fitted = _round_inner(inner + (weights - outside - depth * block) / (depth * each))
            if not 0.7 <= fitted / inner <= 1.4:
                continue
            cost = abs(math.log(width / depth / _ASPECT)) + 2 * abs(math.log(fitted / inner))
            if best is None or cost < best[0]:
                best = cost, ModelShape(width, depth, fitted, vocabulary, positions)
    if best is None:
        raise ModelError(
            f"{name} cannot be made with a vocabulary of {vocabulary:,}: a block of width 32 and its embeddings "
            f"have {narrowest:,} weights",
            where=_WHERE,
            expected=f"more weights than that, and at most those of {_MAX_DEPTH} blocks of width {_WIDTHS[-1]:,}",
            hint="ask for more weights, or give model.tokenizer a smaller `vocabulary`",
        )
    return family.config(best[1])


def _round_inner(inner: float) -> int:
    return max(_INNER_STEP, round(inner / _INNER_STEP) * _INNER_STEP)


def _count_shape_weights(family: Family, *, width: int, depth: int, inner: int, vocabulary: int, positions: int) -> int:
    return count_weights(family.config(ModelShape(width, depth, inner, vocabulary, positions)))


def count_weights(config: PreTrainedConfig) -> int:
    """The weights of a configuration's model, tied ones counted once, without allocating them."""
    with torch.device("meta"):
        return count_parameters(make_random_model(config, detect_config_task(config)))
