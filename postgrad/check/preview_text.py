"""How do the rows that a model sees look on a terminal, and in a file without colours?

On a terminal a token's colour says what becomes of it. Elsewhere marks do, such as «trained»: they are the first pair of signs
that no shown text has itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from rich.console import Console
from rich.text import Text

from postgrad.check.preview_rows import PreviewRow, PreviewSource, RowSegment, State, Token
from postgrad.reports.html.notation import multiline_text

STATE_STYLES: dict[State, str] = {"trained": "bold green", "context": "", "padding": "dim"}
INPUT_STYLE = "yellow"
"""What is read where something else is to be said."""

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
    texts = [f"{token.text}{token.said}" for source in sources for row in source.rows for token in _tokens(row)]
    unmet = (marks for marks in _MARKS if not any(mark in text for text in texts for mark in marks))
    return next(unmet, _MARKS[-1])


def _tokens(row: PreviewRow) -> Iterator[Token]:
    return (token for strand in row.segments for token in strand.tokens)


def _legend(sources: Sequence[PreviewSource], marks: Marks) -> Text:
    """What the colours or marks mean, as far as they occur."""
    layouts = {source.layout for source in sources}
    parts = [_mark_text("trained", marks), Text(" is predicted, the rest is read")]
    if "masked" in layouts:
        parts += [
            Text("; "),
            Text("[MASK]", INPUT_STYLE),
            _mark_text("word", marks),
            Text(": what is read, and what was there"),
        ]
    if "tagged" in layouts:
        parts += [Text("; a "), _mark_text("tag", marks), Text(" stands below its word")]
    if "prefix" in layouts:
        parts += [Text(", as a prefix in both directions")]
    if layouts & {"packed", "prefix"}:
        parts += [Text("; "), Text("1│ 2│", "dim"), Text(" documents that do not see each other")]
    return Text.assemble(*parts, "; ", ("[pad×8]", STATE_STYLES["padding"]), " fills a row up; ↵ is a line break")


def _source_heading(source: PreviewSource) -> Text:
    rows = len(source.rows)
    said = f"the first {rows:,} of {source.available:,} rows" if rows else "none of its rows is read in this stage"
    return Text.assemble((source.name, "bold"), f" ({source.objective}): {said}")


def _row_heading(row: PreviewRow) -> str:
    counts = [f"{row.count(state):,} {state}" for state in STATE_STYLES if row.count(state)]
    if row.row_label is not None:
        counts.insert(0, "1 label trained")
    return f"step {row.step:,}, row {row.row + 1:,}: {', '.join(counts)}"


def _row_lines(layout: str, row: PreviewRow, marks: Marks, console: Console) -> Iterator[Text]:
    """A row behind its gutter."""
    names = [*(strand.name for strand in row.segments), *(["label"] if row.row_label is not None else [])]
    gutter = max(map(len, names))
    width = max(20, console.width - gutter - _INDENT - 2)

    def behind(name: str, body: Iterable[Text]) -> Iterator[Text]:
        for i, line in enumerate(body):
            yield Text.assemble((f"{name if not i else '':>{gutter + _INDENT}}│ ", "dim"), line)

    for strand in row.segments:
        if layout == "tagged":
            yield from behind(strand.name, _tagged_lines(strand, marks, width))
        else:
            yield from behind(strand.name, _running_text(strand, marks).wrap(console, width, overflow="fold"))
    if row.row_label is not None:
        yield from behind("label", [_mark_text(_as_single_line(row.row_label), marks)])


def _running_text(segment: RowSegment, marks: Marks) -> Text:
    """Tokens as running text; tokens alike that follow one another stand in one pair of marks."""
    out = Text()
    for (state, alike), group in groupby(segment.tokens, key=lambda token: (token.state, token.said is None)):
        tokens = list(group)
        if state == "padding":
            out.append(f"[pad×{len(tokens):,}]", STATE_STYLES["padding"])
        elif not alike:
            for token in tokens:
                out.append(_show_line_breaks(token.text), INPUT_STYLE)
                out.append_text(_mark_text(_show_line_breaks(token.said or ""), marks))
        elif state == "trained":
            out.append_text(_mark_text(_show_line_breaks("".join(token.text for token in tokens)), marks))
        else:
            out.append(_show_line_breaks("".join(token.text for token in tokens)), STATE_STYLES[state])
    return out


def _tagged_lines(segment: RowSegment, marks: Marks, width: int) -> Iterator[Text]:
    """Tokens above, their tags below, in as many double lines as they take."""
    tokens = [token for token in segment.tokens if token.state != "padding"]
    texts = [_as_single_line(token.text) for token in tokens]
    above, below, used = Text(), Text(), 0
    for token, text, following in zip(tokens, texts, [*texts[1:], ""], strict=True):
        tag = Text(" " * (len(text) - len(text.lstrip(" "))))
        if token.said is not None:
            tag.append_text(_mark_text(_as_single_line(token.said), marks))
            tag.append("" if following.startswith(" ") else " ")
        word = Text(text, INPUT_STYLE if token.said else STATE_STYLES[token.state])
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
    """A text with its line breaks told and kept; what a terminal would obey is made visible."""
    return multiline_text(text, 0).replace("\t", "⇥").replace("\n", "↵\n")


def _as_single_line(text: str) -> str:
    return multiline_text(text, 0).replace("\t", "⇥").replace("\n", "↵")
