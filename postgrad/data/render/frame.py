"""Frames: the ids around the texts of a row (special tokens, virtual tokens of soft prompts, words), never labels.

A row is `prefix text suffix` or `prefix first separator second suffix`. BERT's own frame is `Frame((CLS,), (SEP,), (SEP,))`;
a soft prompt of three vectors before a text is `Frame((V, V + 1, V + 2))` for a vocabulary of size V.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from postgrad.data.render.prompt_template import Template
from postgrad.errors import StageError


@dataclass(frozen=True)
class Frame:
    """Ids around the one or two texts of a row."""

    prefix_ids: tuple[int, ...] = ()
    separator_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()

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

    def size(self, text_count: int) -> int:
        """Number of ids around one or two texts."""
        return len(self.prefix_ids) + len(self.suffix_ids) + (len(self.separator_ids) if text_count == 2 else 0)

    @property
    def all_ids(self) -> tuple[int, ...]:
        return (*self.prefix_ids, *self.separator_ids, *self.suffix_ids)

    @cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Prefix, separator and suffix as arrays of int64."""
        parts = (self.prefix_ids, self.separator_ids, self.suffix_ids)
        prefix, separator, suffix = (np.array(part, np.int64) for part in parts)
        return prefix, separator, suffix

    def wrap(self, first: np.ndarray, second: np.ndarray | None = None) -> np.ndarray:
        """The ids of a row, of shape (T,)."""
        prefix, separator, suffix = self.arrays
        texts = (first,) if second is None else (first, separator, second)
        return np.concatenate((prefix, *texts, suffix))


EMPTY_FRAME = Frame()
