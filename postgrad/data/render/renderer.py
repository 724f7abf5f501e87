"""The interface of renderers, which turn examples into text with marks and label values."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from postgrad.data.read.examples import Example
from postgrad.data.read.labels import Labels


class RenderedExample(NamedTuple):
    """An example as text: pieces with the mark that their tokens get, and the numbers that say its label.

    Where `joint`, the pieces are one running text, tokenised as a whole, and a token gets the greatest mark of its
    characters; otherwise each piece is tokenised by itself. With `words` only the first token of a piece gets its mark
    (and the one that ends the document gets none, where it otherwise gets the last piece's).
    """

    pieces: tuple[tuple[str, int], ...]
    values: tuple[float, ...] = ()
    is_joint: bool = True
    mark_first_token: bool = False


class Renderer(Protocol):
    """How examples become text, as a value: equal fingerprints render alike.

    `labels` are those that its marks or values speak of, if they do; `width` is the number of values of an example.
    """

    @property
    def fingerprint(self) -> str: ...

    @property
    def labels(self) -> Labels | None: ...

    @property
    def width(self) -> int: ...

    def render(self, example: Example) -> RenderedExample:
        """Raises `DataError` (without a place, which whoever calls knows) for an example it cannot render."""
        ...
