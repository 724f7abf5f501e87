"""A Jinja environment for templates of unknown origin: sandboxed, and bounded in time and in the size of what it makes.

The sandbox keeps a template from Python's internals. A few lines of it may still loop for years or double a text until the
memory is full, so each block asks for the time, and each operation that can make a value of any size for its size.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEMPLATE = 1 << 20
"""Characters of a template."""
MAX_SIZE = 1 << 24
"""Characters of a text, and entries of a value, that a template may make."""
MAX_SECONDS = 10.0
_ENTRY = 16
"""Characters that an entry of a list or mapping counts as."""
_WIDE_FORMAT = re.compile(r"[\d*]{6,}|\*")


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox whose templates end in `jinja2.TemplateError` when they take too long or make too much."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=self._finalize, **options)
        self.deadline = float("inf")
        self.filters = {name: self.limit(function) for name, function in self.filters.items()}

    def limit(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose arguments are of bounded size; `replace` and `join` make at most the product."""

        @functools.wraps(function)
        def limited(*args: Any, **options: Any) -> Any:
            _check_arguments(function.__name__.removeprefix("do_"), args, options)
            result = function(*args, **options)
            _check_size([result] if isinstance(result, str) else [])
            return result

        return limited

    def start(self) -> None:
        """Begin the time of one rendering."""
        self.deadline = time.monotonic() + MAX_SECONDS

    def check_time(self) -> None:
        """Raise `jinja2.TemplateError` after the time of one rendering. Compiled templates call it in each block."""
        if time.monotonic() > self.deadline:
            raise jinja2.TemplateError(f"it takes more than {MAX_SECONDS:g} s")

    def concat(self, pieces: Iterable[str]) -> str:
        """Join the pieces of an output, up to the size limit."""
        kept: list[str] = []
        size = 0
        for piece in pieces:
            size += len(piece)
            if size > MAX_SIZE:
                raise _size_error()
            kept.append(piece)
        return "".join(kept)

    def join_values(self, values: Iterable[Any]) -> str:
        """The operator `~`."""
        return self.concat(str(self._finalize(value)) for value in values)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """An arithmetic operation whose result is of bounded size."""
        if operator == "%" and isinstance(left, str):
            if _WIDE_FORMAT.search(left):
                raise _size_error()
            _check_size([left, right])
        elif operator == "**" and isinstance(right, int | float) and abs(right) > 1000:
            raise _size_error()
        elif operator in ("*", "**"):
            sizes = [len(side) for side in (left, right) if isinstance(side, str | list | tuple)]
            numbers = [side for side in (left, right) if isinstance(side, int)]
            if sizes and numbers and sizes[0] * numbers[0] > MAX_SIZE // _ENTRY:
                raise _size_error()
            if any(number.bit_length() > 4096 for number in numbers):
                raise _size_error()
        elif isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            unit = 1 if isinstance(left, str) else _ENTRY
            if (len(left) + len(right)) * unit > MAX_SIZE:
                raise _size_error()
        return super().call_binop(context, operator, left, right)

    def call(self, context: jinja2.runtime.Context, function: Any, /, *args: Any, **options: Any) -> Any:
        """A call from a template, with arguments of bounded size."""
        # The sandbox wraps `str.format`.
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        text = (owner,) if isinstance(owner, str) else ()
        _check_arguments(getattr(function, "__name__", ""), (*text, *args), options)
        return super().call(context, function, *args, **options)

    def _finalize(self, value: Any) -> Any:
        """A value that is written out: the text of a container may be far larger than the container."""
        if isinstance(value, list | tuple | Mapping):
            _check_size([value])
        return value


class _LimitedCode(CodeGenerator):
    """Code that asks for the time in each block, and joins texts within the size limit."""

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        self.writeline("environment.check_time()")
        super().blockvisit(nodes, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.join_values((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


LimitedEnvironment.code_generator_class = _LimitedCode


def _check_arguments(name: str, args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Raise `jinja2.TemplateError` for arguments of which a function may make a value that is too large."""
    size = _check_size([*args, *options.values()])
    texts = [argument for argument in (*args, *options.values()) if isinstance(argument, str)]
    if name == "replace" and len(texts) >= 3 and len(texts[0]) * len(texts[2]) > MAX_SIZE and size > MAX_SIZE // 64:
        raise _size_error()
    if name == "replace" and len(texts) >= 3 and (texts[0].count(texts[1]) * len(texts[2])) > MAX_SIZE:
        raise _size_error()
    if name == "join" and len(texts) >= 1 and size * max(map(len, texts)) > MAX_SIZE * _ENTRY:
        raise _size_error()
    if name in ("format", "format_map") and any(_WIDE_FORMAT.search(text) for text in texts[:1]):
        raise _size_error()


def _check_size(values: list[Any]) -> int:
    """Characters and entries of values, those inside them included. Raises `jinja2.TemplateError` for too many."""
    total, waiting = 0, list(values)
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            total += len(value)
        elif isinstance(value, Mapping):
            total += _ENTRY
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            total += _ENTRY
            waiting += value
        else:
            total += abs(value) if isinstance(value, int) else _ENTRY
        if total > MAX_SIZE:
            raise _size_error()
    return total


def _size_error() -> jinja2.TemplateError:
    return jinja2.TemplateError(f"it makes a value of more than {MAX_SIZE:,} characters")
