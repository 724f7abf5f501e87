"""Text files as documents: one per file, per line or per paragraph, or passages of about 4,000 characters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

from postgrad.data.read.text_lines import Line, read_lines
from postgrad.errors import DataError

SPLIT_MODES = ("auto", "file", "passages", "paragraphs", "lines")
"""`auto`: a small file is one document, a larger one is split into passages."""

SINGLE_FILE_BYTES = 256 * 2**10
"""Size up to which `auto` makes a text file one document."""
PASSAGE_CHARACTERS = 4_000
"""Characters up to which a passage is filled."""
PARAGRAPH_CAP = 16_000
"""Characters above which a paragraph (rather a list) may be split between its lines."""
FILE_CAP = 256 * 2**20
"""Characters above which a text file cannot be one document."""


def split_text_file(file: Path, split_mode: str, on_read: Callable[[int], None]) -> Iterator[Line]:
    """The documents of a text file, each with the number of its first line."""
    lines = read_lines(file, on_read)
    if split_mode == "auto":
        head, size = [], 0
        for line in lines:
            head.append(line)
            size += len(line.text.encode())
            if size > SINGLE_FILE_BYTES:
                break
        split_mode = "passages" if size > SINGLE_FILE_BYTES else "file"
        lines = chain(head, lines)
    match split_mode:
        case "file":
            return _split_file(lines, str(file))
        case "passages":
            return _split_passages(lines)
        case "paragraphs":
            return _split_paragraphs(lines, str(file))
    return _split_lines(lines)


def _split_file(lines: Iterator[Line], name: str) -> Iterator[Line]:
    parts, size = [], 0
    for line in lines:
        parts.append(line.text)
        size += len(line.text)
        if size > FILE_CAP:
            raise DataError(
                f"a document of more than {FILE_CAP:,} characters",
                where=f"{name}:{line.number}",
                expected="smaller documents",
                hint="document_unit: passages, paragraphs or lines",
            )
    yield Line(1, "".join(parts))


def _split_lines(lines: Iterator[Line]) -> Iterator[Line]:
    for number, text in lines:
        text = text.rstrip("\r\n")
        if text and not text.isspace():
            yield Line(number, text)


def _split_paragraphs(lines: Iterator[Line], name: str) -> Iterator[Line]:
    paragraph: list[Line] = []
    size = 0
    for line in lines:
        if not line.text.isspace():
            paragraph.append(line)
            size += len(line.text)
            if size > FILE_CAP:
                raise DataError(
                    f"a paragraph of more than {FILE_CAP:,} characters",
                    where=f"{name}:{paragraph[0].number}",
                    expected="blank lines between paragraphs",
                    hint="document_unit: passages or lines",
                )
        elif paragraph:
            yield _join_lines(paragraph)
            paragraph, size = [], 0
    if paragraph:
        yield _join_lines(paragraph)


def _join_lines(lines: list[Line]) -> Line:
    return Line(lines[0].number, "".join(line.text for line in lines).rstrip("\r\n"))


def _split_passages(lines: Iterator[Line]) -> Iterator[Line]:
    """Passages filled with units up to `PASSAGE_CHARACTERS`; text between two units of a passage is kept verbatim."""
    passage: list[Line] = []
    size = 0
    for unit in _units(lines):
        length = sum(len(line.text) for line in unit)
        is_blank = unit[0].text.isspace()
        # Blank lines may overfill a passage (they are stripped at its end), but not without a limit.
        is_full = size + length > PASSAGE_CHARACTERS and (not is_blank or size > 2 * PASSAGE_CHARACTERS)
        if passage and is_full:
            yield _join_lines(_strip_blank_lines(passage))
            passage, size = [], 0
        if passage or not is_blank:
            passage += unit
            size += length
    if _strip_blank_lines(passage):
        yield _join_lines(passage)


def _strip_blank_lines(lines: list[Line]) -> list[Line]:
    """Remove blank lines at the end, in place."""
    while lines and lines[-1].text.isspace():
        lines.pop()
    return lines


def _units(lines: Iterator[Line]) -> Iterator[list[Line]]:
    """What passages do not split: paragraphs, or single lines where a text has no (or overlong) paragraphs."""
    paragraph: list[Line] = []
    size, has_blank_lines = 0, False
    for line in lines:
        if line.text.isspace():
            has_blank_lines = True
            if paragraph:
                yield paragraph
            yield [line]
            paragraph, size = [], 0
            continue
        paragraph.append(line)
        size += len(line.text)
        if size > PARAGRAPH_CAP:
            yield from ([line] for line in paragraph)
            paragraph, size = [], 0
    if paragraph and has_blank_lines:
        yield paragraph
    else:
        yield from ([line] for line in paragraph)
