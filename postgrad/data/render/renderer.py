"""The interface of renderers, which turn examples into text with marks and label values."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from postgrad.data.read.examples import Example
from postgrad.data.read.labels import Labels


class RenderedExample(NamedTuple):
    """An example as text: pieces with the mark of their tokens, and its label as numbers.

    With `is_joint` the pieces are tokenised as one text, and a token gets the greatest mark of its characters; otherwise each
    piece is tokenised alone. With `mark_first_token` only the first token of a piece gets its mark, and the document's EOS
    gets none (by default it gets the last piece's). `omitted`: the parts of the example that the text leaves out.
    """

    pieces: tuple[tuple[str, int], ...]
    values: tuple[float, ...] = ()
    is_joint: bool = True
    mark_first_token: bool = False
    omitted: tuple[str, ...] = ()


class Renderer(Protocol):
    """Turns examples into text, as a value: renderers with equal fingerprints render alike.

    `labels`: those that its marks or values refer to, if any. `width`: number of label values of an example.
    """

    @property
    def fingerprint(self) -> str: ...

    @property
    def labels(self) -> Labels | None: ...

    @property
    def width(self) -> int: ...

    def render(self, example: Example) -> RenderedExample:
        """Raises `DataError` (without a location, which the caller knows) for an example that it cannot render."""
        ...
