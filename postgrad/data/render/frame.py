"""Frames: the ids around the texts of a row (special tokens, virtual tokens of soft prompts, words), never labels.

A row is `prefix text suffix` or `prefix first separator second suffix`. BERT's own frame is `Frame((CLS,), (SEP,), (SEP,))`;
a soft prompt of three vectors before a text is `Frame((V, V + 1, V + 2))` for a vocabulary of size V. Everything that puts ids
around a text, or removes them, does so with these functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from postgrad.data.render.prompt_template import Template
from postgrad.errors import StageError


def count_repeated(ids: Sequence[int] | np.ndarray, prefix: Sequence[int]) -> int:
    """How many ids at the start of a text repeat a prefix: any number of times, or its last ids alone.

    A chat template may write the BOS itself, and the prefix is added to every text once.
    """
    start, size = 0, len(prefix)
    while size and tuple(ids[start : start + size]) == tuple(prefix):
        start += size
    return start or next((n for n in range(size - 1, 0, -1) if tuple(ids[:n]) == tuple(prefix[-n:])), 0)


@dataclass(frozen=True)
class TextPrefix:
    """The ids before a text: soft prompts outside of the tokenizer's special tokens (as in PEFT), these, and soft prompts."""

    outer_ids: tuple[int, ...] = ()
    special_ids: tuple[int, ...] = ()
    inner_ids: tuple[int, ...] = ()

    @property
    def virtual_tokens(self) -> tuple[int, ...]:
        """Ids of all soft prompts."""
        return (*self.outer_ids, *self.inner_ids)

    def insert(self, ids: np.ndarray) -> np.ndarray:
        """Add the soft prompts to a text that begins with the special tokens, or to a later window of it."""
        lead = len(self.special_ids)
        lead = lead if tuple(ids[:lead].tolist()) == self.special_ids else 0
        parts = (self.outer_ids, ids[:lead], self.inner_ids, ids[lead:])
        return np.concatenate([np.asarray(part, np.int64) for part in parts])


@dataclass(frozen=True)
class Frame:
    """Ids around the one or two texts of a row. `outer_ids` precede everything, the tokenizer's special tokens included."""

    prefix_ids: tuple[int, ...] = ()
    separator_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()
    outer_ids: tuple[int, ...] = ()

    @classmethod
    def from_template(
        cls,
        template: Template,
        special_ids: Mapping[str, int],
        first_virtual: int,
        tokenize: Callable[[str], Sequence[int]],
    ) -> Frame:
        """The ids around the one or two fields of a template; arguments as for `Template.segments`.

        Raises `StageError` for any other number of fields, and as `Template.segments` does.
        """
        if len(template.placeholders) not in (1, 2) or len(template.fields) != len(template.placeholders):
            raise StageError(
                f"the template has {' '.join(f'{{{name}}}' for name in template.placeholders) or 'no fields'}",
                where="tuning.template",
                expected="one field, or two different ones",
            )
        prefix, *separator, suffix = (tuple(part) for part in template.segments(special_ids, first_virtual, tokenize))
        return cls(prefix, separator[0] if separator else (), suffix)

    def inside(self, special: Frame) -> Frame:
        """This frame inside of the special tokens that a tokenizer adds."""
        return Frame(
            (*self.outer_ids, *special.prefix_ids, *self.prefix_ids),
            (*self.separator_ids, *special.separator_ids),
            (*self.suffix_ids, *special.suffix_ids),
        )

    def size(self, text_count: int) -> int:
        """Number of ids around one or two texts."""
        return len(self.all_ids) - (len(self.separator_ids) if text_count == 1 else 0)

    @property
    def all_ids(self) -> tuple[int, ...]:
        return (*self.outer_ids, *self.prefix_ids, *self.separator_ids, *self.suffix_ids)

    def wrap_once(self, ids: Sequence[int]) -> tuple[int, ...]:
        """A text in its frame. What the text itself brings of it at its ends is not added a second time."""
        start = count_repeated(ids, self.prefix_ids)
        stop = len(ids) - count_repeated(tuple(ids)[::-1], self.suffix_ids[::-1])
        return (*self.outer_ids, *self.prefix_ids, *ids[start : max(start, stop)], *self.suffix_ids)

    @cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Prefix, separator and suffix as arrays of int64."""
        parts = ((*self.outer_ids, *self.prefix_ids), self.separator_ids, self.suffix_ids)
        prefix, separator, suffix = (np.array(part, np.int64) for part in parts)
        return prefix, separator, suffix

    def wrap(self, first: np.ndarray, second: np.ndarray | None = None) -> np.ndarray:
        """The ids of a row, of shape (T,)."""
        prefix, separator, suffix = self.arrays
        texts = (first,) if second is None else (first, separator, second)
        return np.concatenate((prefix, *texts, suffix))


EMPTY_FRAME = Frame()
NO_PREFIX = TextPrefix()
