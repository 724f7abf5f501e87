"""A tokenizer as a value: its JSON, the ids around a document, and the vocabulary size."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

from tokenizers import Tokenizer

from postgrad.errors import ModelError


@dataclass(frozen=True)
class Encoder:
    """A tokenizer: the text of its `tokenizer.json`, the ids around a document, and the size of the vocabulary.

    `prefix_ids` are all special tokens that the tokenizer adds before a text, such as a BOS. `vocabulary` is the number of
    rows of the model's embedding: every id is below it. Raises `ModelError` for an id that is not, and for text that is not
    a tokenizer.
    """

    tokenizer: str
    prefix_ids: tuple[int, ...]
    eos: int
    vocabulary: int

    def __post_init__(self) -> None:
        for name, token in (*(("prefix", token) for token in self.prefix_ids), ("eos", self.eos)):
            if not 0 <= token < self.vocabulary:
                raise ModelError(
                    f"the {name} id is {token:,}",
                    where="model",
                    expected=f"an id below the vocabulary size, {self.vocabulary:,}",
                )

    @property
    def stored_prefix(self) -> int | list[int] | None:
        """The prefix as existing stores have it: a BOS as a number, none as null."""
        return self.prefix_ids[0] if len(self.prefix_ids) == 1 else list(self.prefix_ids) or None

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of all that decides the ids (not truncation and padding, which are never used)."""
        try:
            parts = json.loads(self.tokenizer)
            parts.pop("truncation", None)
            parts.pop("padding", None)
        except (ValueError, AttributeError) as error:
            raise _invalid_tokenizer_error(error) from None
        # Not sorted: the vocabulary is long, and all writers keep its order.
        written = json.dumps([parts, self.stored_prefix, self.eos, self.vocabulary])
        return hashlib.sha256(written.encode()).hexdigest()

    def load(self) -> Tokenizer:
        """The tokenizer, without truncation and padding."""
        try:
            tokenizer = Tokenizer.from_str(self.tokenizer)
        except Exception as error:  # the package raises bare Exception
            raise _invalid_tokenizer_error(error) from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer


def _invalid_tokenizer_error(error: Exception) -> ModelError:
    return ModelError(f"not a tokenizer ({error})", where="model", expected="the contents of a tokenizer.json")
