"""Streaming JSON: the elements of one array, or objects one after another, with at most one of them in memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path

from postgrad.data.read.files import RawRow
from postgrad.data.read.text_lines import BrokenStream, ReadCallback, not_utf8_error, read_blocks, refuse_utf16
from postgrad.errors import DataError

VALUE_CAP = 64 * 2**20
"""Characters in one value of a `.json` file (a window of twice as many is in memory during the search for its end)."""


def make_record(value: object, file: str, number: int) -> RawRow:
    """A record from a JSON value. Raises `DataError` for a value that is no object."""
    if not isinstance(value, dict):
        names = ((list, "a list"), (str, "a string"), (type(None), "null"), (bool, "true or false"))
        name = next((name for kind, name in names if isinstance(value, kind)), "a number")
        expected = 'an object, {"text": ...}'
        raise DataError(f"{name} instead of a record", where=f"{file}:{number}", expected=expected)
    return RawRow(value, file, number)


def json_error_message(error: Exception) -> str:
    """The message for a JSON parser's exception: broken syntax, excessive nesting, or a number that is too long."""
    if isinstance(error, RecursionError):
        return "the JSON is nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON: {error.msg}"
    return "a number of thousands of digits"


class _TextWindow:
    """A window over the decoded text of a file; `offset` is the current position in it, `line` the line of its start."""

    def __init__(self, file: Path, on_read: ReadCallback) -> None:
        self.file, self.window, self.offset, self.line, self.is_exhausted = file, "", 0, 1, False
        self._blocks = read_blocks(file, on_read)
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._is_first_block = True

    def read_more(self) -> None:
        """Drop the text before `offset`, and read until the window has at least doubled."""
        self.line += self.window.count("\n", 0, self.offset)
        parts, self.offset = [self.window[self.offset :]], 0
        size = start_size = len(parts[0])
        try:
            while size <= 2 * start_size and not self.is_exhausted:
                block = next(self._blocks, b"")
                if self._is_first_block:
                    refuse_utf16(block, self.file)
                    self._is_first_block = False
                self.is_exhausted = not block
                parts.append(self._decoder.decode(block, final=self.is_exhausted))
                size += len(parts[-1])
        except BrokenStream as error:
            line = self.line + sum(part.count("\n") for part in parts)
            raise DataError(str(error), where=f"{self.file}:{line}", expected="a complete, readable file") from None
        except UnicodeDecodeError as error:
            valid = error.object[: error.start]
            line = self.line + sum(part.count("\n") for part in parts) + valid.count(b"\n")
            column = error.start - valid.rfind(b"\n")
            raise not_utf8_error(self.file, line, error.object[error.start], column) from None
        self.window = "".join(parts)

    def peek(self) -> str:
        """The next character that is not white space, or an empty string at the end of the file."""
        while True:
            self.offset = _SPACE.match(self.window, self.offset).end()  # type: ignore[union-attr]
            if self.offset < len(self.window) or self.is_exhausted:
                return self.window[self.offset : self.offset + 1]
            self.read_more()

    def json_error(self, problem: str, offset: int | None = None) -> DataError:
        line = self.line + self.window.count("\n", 0, self.offset if offset is None else offset)
        return DataError(
            problem, where=f"{self.file}:{line}", expected="an array of JSON objects, or one object a line"
        )


_SPACE = re.compile(r"[ \t\n\r]*")


def read_json(file: Path, on_read: ReadCallback) -> Iterator[RawRow]:
    """The elements of one array, or objects one after another."""
    text, parse, name, number = _TextWindow(file, on_read), json.JSONDecoder().raw_decode, str(file), 0
    in_array = text.peek() == "["
    if in_array:
        text.offset += 1
        if text.peek() == "]":
            text.offset += 1
            in_array = False
    while following := text.peek():
        if in_array and number and following == "]":
            text.offset += 1
            in_array = False
            continue
        if in_array and number:
            if following != ",":
                raise text.json_error("broken JSON: Expecting ',' delimiter")
            text.offset += 1
            text.peek()
        number += 1
        while True:
            try:
                value, end = parse(text.window, text.offset)
            except json.JSONDecodeError as error:
                # A value that continues beyond the window fails at the window's end, or as an unterminated string.
                is_cut = error.msg.startswith("Unterminated") or error.pos >= len(text.window) - 16
                if text.is_exhausted or not is_cut:
                    raise text.json_error(json_error_message(error), error.pos) from None
            except (ValueError, RecursionError) as error:
                raise text.json_error(json_error_message(error)) from None
            else:
                # A number at the end of the window may continue beyond it.
                if end < len(text.window) or text.is_exhausted:
                    break
            if len(text.window) - text.offset > VALUE_CAP:
                raise text.json_error(f"a JSON value of more than {VALUE_CAP:,} characters")
            text.read_more()
        record = make_record(value, name, number)
        text.offset = end
        del value  # the record is the only reference to it
        yield record
    if in_array:
        raise text.json_error("broken JSON: the array has no end")
