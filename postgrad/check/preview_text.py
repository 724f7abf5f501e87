"""Preview rows on a terminal, in colours, or as plain text, with marks such as «trained».

The marks are the first pair that does not occur in the shown text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from rich.console import Console
from rich.text import Text

from postgrad.check.preview_rows import PreviewRow, PreviewSource, RowSegment, State, Token
from postgrad.foreign_text import multiline_text

STATE_STYLES: dict[State, str] = {"trained": "bold green", "context": "", "padding": "dim"}
INPUT_STYLE = "yellow"
"""Style of an input token with another target."""

Marks = tuple[str, str]
_MARKS: tuple[Marks, ...] = (("«", "»"), ("⟪", "⟫"), ("{{", "}}"), ("«««", "»»»"))
_INDENT = 4


def print_rows(sources: Sequence[PreviewSource], console: Console) -> None:
    """Print rows with a legend: in colours where the console has them, else with marks."""
    coloured = console.is_terminal and not console.no_color and console.color_system is not None
    marks = ("", "") if coloured else _choose_marks(sources)
    console.print(_legend(sources, marks))
    for source in sources:
        console.print()
        console.print(_source_heading(source))
        for row in source.rows:
            console.print(Text(f"  {_row_heading(row)}", "bold"))
            for line in _row_lines(source.layout, row, marks, console):
                console.print(line, no_wrap=True, crop=False, overflow="ignore")


def _choose_marks(sources: Iterable[PreviewSource]) -> Marks:
    texts = [f"{token.text}{token.target}" for source in sources for row in source.rows for token in _tokens(row)]
    unused = (marks for marks in _MARKS if not any(mark in text for text in texts for mark in marks))
    return next(unused, _MARKS[-1])


def _tokens(row: PreviewRow) -> Iterator[Token]:
    return (token for segment in row.segments for token in segment.tokens)


def _legend(sources: Sequence[PreviewSource], marks: Marks) -> Text:
    """Explanation of the colours or marks that occur."""
    layouts = {source.layout for source in sources}
    parts = [_mark_text("trained", marks), Text(" tokens are predicted, all others are context")]
    if "masked" in layouts:
        parts += [
            Text("; "),
            Text("[MASK]", INPUT_STYLE),
            _mark_text("word", marks),
            Text(": the input, and the original"),
        ]
    if "tagged" in layouts:
        parts += [Text("; a "), _mark_text("tag", marks), Text(" is below its word")]
    if "prefix" in layouts:
        parts += [Text(", with bidirectional attention in prefixes")]
    if layouts & {"packed", "prefix"}:
        parts += [Text("; "), Text("1│ 2│", "dim"), Text(" documents, without attention to each other")]
    return Text.assemble(*parts, "; ", ("[pad×8]", STATE_STYLES["padding"]), " is padding; ↵ is a line break")


def _source_heading(source: PreviewSource) -> Text:
    rows = len(source.rows)
    shown = f"the first {rows:,} of {source.available:,} rows" if rows else "this stage reads none of its rows"
    return Text.assemble((source.name, "bold"), f" ({source.objective}): {shown}")


def _row_heading(row: PreviewRow) -> str:
    counts = [f"{row.count(state):,} {state}" for state in STATE_STYLES if row.count(state)]
    if row.row_label is not None:
        counts.insert(0, "1 label trained")
    return f"step {row.step:,}, row {row.row + 1:,}: {', '.join(counts)}"


def _row_lines(layout: str, row: PreviewRow, marks: Marks, console: Console) -> Iterator[Text]:
    """A row, with the names of its segments in a gutter."""
    names = [*(segment.name for segment in row.segments), *(["label"] if row.row_label is not None else [])]
    gutter = max(map(len, names))
    width = max(20, console.width - gutter - _INDENT - 2)

    def with_gutter(name: str, body: Iterable[Text]) -> Iterator[Text]:
        for i, line in enumerate(body):
            yield Text.assemble((f"{name if not i else '':>{gutter + _INDENT}}│ ", "dim"), line)

    for segment in row.segments:
        if layout == "tagged":
            yield from with_gutter(segment.name, _tagged_lines(segment, marks, width))
        else:
            yield from with_gutter(segment.name, _running_text(segment, marks).wrap(console, width, overflow="fold"))
    if row.row_label is not None:
        yield from with_gutter("label", [_mark_text(_as_single_line(row.row_label), marks)])


def _running_text(segment: RowSegment, marks: Marks) -> Text:
    """Tokens as running text; adjacent trained tokens share one pair of marks."""
    line = Text()
    for (state, is_input), group in groupby(segment.tokens, key=lambda token: (token.state, token.target is None)):
        tokens = list(group)
        if state == "padding":
            line.append(f"[pad×{len(tokens):,}]", STATE_STYLES["padding"])
        elif not is_input:
            for token in tokens:
                line.append(_show_line_breaks(token.text), INPUT_STYLE)
                line.append_text(_mark_text(_show_line_breaks(token.target or ""), marks))
        elif state == "trained":
            line.append_text(_mark_text(_show_line_breaks("".join(token.text for token in tokens)), marks))
        else:
            line.append(_show_line_breaks("".join(token.text for token in tokens)), STATE_STYLES[state])
    return line


def _tagged_lines(segment: RowSegment, marks: Marks, width: int) -> Iterator[Text]:
    """Tokens with their tags below, in as many double lines as they need."""
    tokens = [token for token in segment.tokens if token.state != "padding"]
    texts = [_as_single_line(token.text) for token in tokens]
    above, below, used = Text(), Text(), 0
    for token, text, following in zip(tokens, texts, [*texts[1:], ""], strict=True):
        tag = Text(" " * (len(text) - len(text.lstrip(" "))))
        if token.target is not None:
            tag.append_text(_mark_text(_as_single_line(token.target), marks))
            tag.append("" if following.startswith(" ") else " ")
        word = Text(text, INPUT_STYLE if token.target else STATE_STYLES[token.state])
        cells = max(word.cell_len, tag.cell_len)
        if used and used + cells > width:
            yield from (above, below)
            above, below, used = Text(), Text(), 0
        for line, cell in ((above, word), (below, tag)):
            line.append_text(cell)
            line.append(" " * (cells - cell.cell_len))
        used += cells
    if len(tokens) < len(segment.tokens):
        above.append(f" [pad×{len(segment.tokens) - len(tokens):,}]", STATE_STYLES["padding"])
    yield from (above, below)


def _mark_text(text: str, marks: Marks) -> Text:
    return Text(f"{marks[0]}{text}{marks[1]}", STATE_STYLES["trained"])


def _show_line_breaks(text: str) -> str:
    """The text with visible line breaks, tabs and control characters."""
    return multiline_text(text, 0).replace("\t", "⇥").replace("\n", "↵\n")


def _as_single_line(text: str) -> str:
    return multiline_text(text, 0).replace("\t", "⇥").replace("\n", "↵")
