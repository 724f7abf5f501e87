"""A chart: its picture, and the numbers in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from postgrad.reports.html.charts.style import STYLE

_FILE_STYLE = (
    re.sub(r"@media.*?\}\}", "", STYLE, flags=re.DOTALL).replace("\n", "")
    + ".ground{fill:var(--ground)}svg.fig{font-family:sans-serif}"
)


@dataclass(frozen=True)
class Chart:
    """An SVG element for a page, and the numbers that it shows as rows under a header."""

    svg: str
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str | float | None]] = ()

    def standalone_svg(self) -> str:
        """The picture as a file of its own, in the light colours on their ground."""
        begin, rest = self.svg.split(">", 1)
        begin = begin.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
        ground = '<rect width="100%" height="100%" class="ground"/>'
        return f"{begin}><style>{_FILE_STYLE}</style>{ground}{rest}\n"
