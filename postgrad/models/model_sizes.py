"""The sizes of a model that its inputs must keep to: tokens of its table, and positions of a row.

A configuration does not have them in one place. Composite models (Gemma 3, Mistral 3) have them in the configuration of their
text part. RoBERTa and its relatives number positions from behind the padding id, so that their table holds fewer positions
than its rows. Some decoders allow more than one length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import AutoModel, PreTrainedConfig

from postgrad.errors import ModelError
from postgrad.models.auto_classes import load_config, make_meta_model
from postgrad.models.location import ModelLocation

_POSITION_KEYS = (
    "max_position_embeddings",
    "max_encoder_position_embeddings",
    "max_decoder_position_embeddings",
    "max_seq_len",
)


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model that its inputs must keep to."""

    vocab_size: int
    """Rows of the input embedding."""
    positions: int | None
    """The longest row, special tokens included; None without a limit."""

    def limit_context(self, tokens: int) -> int:
        """`tokens`, or the positions where they are fewer."""
        return min(tokens, self.positions or tokens)


def load_model_sizes(start: ModelLocation) -> ModelSizes:
    """The sizes of the plain model of a start. Raises `ModelError` for a configuration without them."""
    return get_model_sizes(load_config(start.name_or_path))


def get_model_sizes(config: PreTrainedConfig) -> ModelSizes:
    """The sizes of the model of a configuration. Raises `ModelError` for one without a vocabulary."""
    parts: list[Any] = [config.get_text_config(decoder=True), config.get_text_config(), config]
    vocab_size = next((size for part in parts if (size := getattr(part, "vocab_size", None)) is not None), None)
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise ModelError(
            f"the configuration of this {config.model_type} has the vocabulary size {vocab_size}",
            where="model",
            expected="a language model with a `vocab_size`",
        )
    limits = {size for part in parts for key in _POSITION_KEYS if (size := getattr(part, key, None)) is not None}
    wrong = next((size for size in limits if not isinstance(size, int)), None)
    if wrong is not None:
        raise ModelError(f"the configuration has {wrong!r} positions", where="model", expected="a whole number")
    positions = min((size for size in limits if size > 0), default=None)
    is_rotary = any(getattr(parts[1], key, None) for key in ("rope_parameters", "rope_theta"))
    if positions is None or is_rotary:
        return ModelSizes(vocab_size, positions)
    return ModelSizes(vocab_size, min([positions, *_count_usable_positions(config)]))


def _count_usable_positions(config: PreTrainedConfig) -> Iterator[int]:
    """Rows behind the padding row of each position table that has one: positions are numbered from there."""
    if type(config) not in AutoModel._model_mapping:
        return
    for name, module in make_meta_model(config).named_modules():
        padding, table = getattr(module, "padding_idx", None), getattr(module, "weight", None)
        if "pos" in name and isinstance(padding, int) and isinstance(table, Tensor):
            yield table.shape[0] - padding - 1
