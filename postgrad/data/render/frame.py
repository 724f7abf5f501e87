"""What stands around the texts of a row? Special tokens, virtual tokens of a prompt, words: ids that are never labels.

A row has one text or two: `before first after`, or `before first between second after`. A BERT model's own frame is
`Frame((CLS,), (SEP,), (SEP,))`; a soft prompt of three vectors before a text is `Frame((V, V + 1, V + 2))`, V being the
size of the vocabulary.
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
        """What a template of one field or two sets around them; the arguments are those of `Template.around`.

        Raises `StageError` for any other number of fields, and as `Template.around` does.
        """
        if len(template.placeholders) not in (1, 2) or len(template.fields) != len(template.placeholders):
            raise StageError(
                f"a template with {' '.join(f'{{{name}}}' for name in template.placeholders) or 'no fields'}",
                where="template",
                expected="one field, or two different ones",
            )
        before, *between, after = (tuple(part) for part in template.segments(special_ids, first_virtual, tokenize))
        return cls(before, between[0] if between else (), after)

    def size(self, text_count: int) -> int:
        """Ids around so many texts (one or two)."""
        return len(self.prefix_ids) + len(self.suffix_ids) + (len(self.separator_ids) if text_count == 2 else 0)

    @property
    def all_ids(self) -> tuple[int, ...]:
        """All ids around the texts."""
        return (*self.prefix_ids, *self.separator_ids, *self.suffix_ids)

    @cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`before`, `between`, `after` as arrays of int64."""
        before, between, after = (
            np.array(part, np.int64) for part in (self.prefix_ids, self.separator_ids, self.suffix_ids)
        )
        return before, between, after

    def wrap(self, first: np.ndarray, second: np.ndarray | None = None) -> np.ndarray:
        """All ids of a row, of shape (T,)."""
        before, between, after = self.arrays
        middle = (first,) if second is None else (first, between, second)
        return np.concatenate((before, *middle, after))


EMPTY_FRAME = Frame()
"""Nothing around the text."""
