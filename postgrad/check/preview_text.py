"""How do the rows that a model sees look on a terminal, and in a file without colours?

On a terminal a token's colour says what becomes of it. Elsewhere marks do, such as «trained»: they are the first pair of signs
that no shown text has itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from rich.console import Console
from rich.text import Text

from postgrad.check.preview_rows import ShownRow, ShownSource, State, Strand, Token
from postgrad.reports.html.notation import passage

STYLES: dict[State, str] = {"trained": "bold green", "context": "", "padding": "dim"}
READ = "yellow"
"""What is read where something else is to be said."""

Marks = tuple[str, str]
_MARKS: tuple[Marks, ...] = (("«", "»"), ("⟪", "⟫"), ("{{", "}}"), ("«««", "»»»"))
_INDENT = 4


def print_rows(sources: Sequence[ShownSource], console: Console) -> None:
    """Print rows with a legend: in colours where the console has them, else with marks."""
    coloured = console.is_terminal and not console.no_color and console.color_system is not None
    marks = ("", "") if coloured else _marks_for(sources)
    console.print(_legend(sources, marks))
    for source in sources:
        console.print()
        console.print(_head(source))
        for row in source.rows:
            console.print(Text(f"  {_counts(row)}", "bold"))
            for line in _lines(source.layout, row, marks, console):
                console.print(line, no_wrap=True, crop=False, overflow="ignore")


def _marks_for(sources: Iterable[ShownSource]) -> Marks:
    texts = [f"{token.text}{token.said}" for source in sources for row in source.rows for token in _tokens(row)]
    unmet = (marks for marks in _MARKS if not any(mark in text for text in texts for mark in marks))
    return next(unmet, _MARKS[-1])


def _tokens(row: ShownRow) -> Iterator[Token]:
    return (token for strand in row.strands for token in strand.tokens)


def _legend(sources: Sequence[ShownSource], marks: Marks) -> Text:
    """What the colours or marks mean, as far as they occur."""
    layouts = {source.layout for source in sources}
    parts = [_marked("trained", marks), Text(" is predicted, the rest is read")]
    if "masked" in layouts:
        parts += [Text("; "), Text("[MASK]", READ), _marked("word", marks), Text(": what is read, and what was there")]
    if "tagged" in layouts:
        parts += [Text("; a "), _marked("tag", marks), Text(" stands below its word")]
    if "prefix" in layouts:
        parts += [Text(", as a prefix in both directions")]
    if layouts & {"packed", "prefix"}:
        parts += [Text("; "), Text("1│ 2│", "dim"), Text(" documents that do not see each other")]
    return Text.assemble(*parts, "; ", ("[pad×8]", STYLES["padding"]), " fills a row up; ↵ is a line break")


def _head(source: ShownSource) -> Text:
    rows = len(source.rows)
    said = f"the first {rows:,} of {source.available:,} rows" if rows else "none of its rows is read in this stage"
    return Text.assemble((source.name, "bold"), f" ({source.objective}): {said}")


def _counts(row: ShownRow) -> str:
    counts = [f"{row.count(state):,} {state}" for state in STYLES if row.count(state)]
    if row.decision is not None:
        counts.insert(0, "1 label trained")
    return f"step {row.step:,}, row {row.row + 1:,}: {', '.join(counts)}"


def _lines(layout: str, row: ShownRow, marks: Marks, console: Console) -> Iterator[Text]:
    """A row behind its gutter."""
    names = [*(strand.name for strand in row.strands), *(["label"] if row.decision is not None else [])]
    gutter = max(map(len, names))
    width = max(20, console.width - gutter - _INDENT - 2)

    def behind(name: str, body: Iterable[Text]) -> Iterator[Text]:
        for i, line in enumerate(body):
            yield Text.assemble((f"{name if not i else '':>{gutter + _INDENT}}│ ", "dim"), line)

    for strand in row.strands:
        if layout == "tagged":
            yield from behind(strand.name, _with_tags(strand, marks, width))
        else:
            yield from behind(strand.name, _running(strand, marks).wrap(console, width, overflow="fold"))
    if row.decision is not None:
        yield from behind("label", [_marked(_line(row.decision), marks)])


def _running(strand: Strand, marks: Marks) -> Text:
    """Tokens as running text; tokens alike that follow one another stand in one pair of marks."""
    out = Text()
    for (state, alike), group in groupby(strand.tokens, key=lambda token: (token.state, token.said is None)):
        tokens = list(group)
        if state == "padding":
            out.append(f"[pad×{len(tokens):,}]", STYLES["padding"])
        elif not alike:
            for token in tokens:
                out.append(_lined(token.text), READ)
                out.append_text(_marked(_lined(token.said or ""), marks))
        elif state == "trained":
            out.append_text(_marked(_lined("".join(token.text for token in tokens)), marks))
        else:
            out.append(_lined("".join(token.text for token in tokens)), STYLES[state])
    return out


def _with_tags(strand: Strand, marks: Marks, width: int) -> Iterator[Text]:
    """Tokens above, their tags below, in as many double lines as they take."""
    tokens = [token for token in strand.tokens if token.state != "padding"]
    texts = [_line(token.text) for token in tokens]
    above, below, used = Text(), Text(), 0
    for token, text, following in zip(tokens, texts, [*texts[1:], ""], strict=True):
        tag = Text(" " * (len(text) - len(text.lstrip(" "))))
        if token.said is not None:
            tag.append_text(_marked(_line(token.said), marks))
            tag.append("" if following.startswith(" ") else " ")
        word = Text(text, READ if token.said else STYLES[token.state])
        cells = max(word.cell_len, tag.cell_len)
        if used and used + cells > width:
            yield from (above, below)
            above, below, used = Text(), Text(), 0
        for line, cell in ((above, word), (below, tag)):
            line.append_text(cell)
            line.append(" " * (cells - cell.cell_len))
        used += cells
    if len(tokens) < len(strand.tokens):
        above.append(f" [pad×{len(strand.tokens) - len(tokens):,}]", STYLES["padding"])
    yield from (above, below)


def _marked(text: str, marks: Marks) -> Text:
    return Text(f"{marks[0]}{text}{marks[1]}", STYLES["trained"])


def _lined(text: str) -> str:
    """A text with its line breaks told and kept; what a terminal would obey is made visible."""
    return passage(text, 0).replace("\t", "⇥").replace("\n", "↵\n")


def _line(text: str) -> str:
    return passage(text, 0).replace("\t", "⇥").replace("\n", "↵")
