"""Which tokens stand around the fields of a row? A template, such as `[CLS] {3} {x} {3} [MASK] {3}`.

    {x}         the tokens of the row's field `x`
    {3}         three virtual tokens of a soft prompt, numbered on through the template
    [MASK]      a special token by its name in the tokenizer: CLS, SEP, MASK, BOS, EOS, PAD
    other text  itself, in tokens
    {{ and }}   braces;  [[MASK]] is the text "[MASK]"

Spaces beside special and virtual tokens only part them from the rest. All other spaces are text, as are line breaks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from postgrad.errors import DataError, StageError, suggest_nearest

_PLACEHOLDER = re.compile(
    r"\{\{|\}\}|\{(?P<braced>[^{}]*)\}|\[\[(?P<quoted>[A-Z_]+)\]\]|\[(?P<special>[A-Z][A-Z_]*)\]|[{}]"
)
_NAME = re.compile(r"[^\W\d][\w .-]*")


@dataclass(frozen=True)
class SpecialToken:
    """A special token, by its name in lower case: "cls", "sep", "mask", "bos", "eos", "pad"."""

    name: str


@dataclass(frozen=True)
class VirtualTokens:
    """So many virtual tokens, from the `first`-th of the template on."""

    first: int
    count: int


@dataclass(frozen=True)
class TemplateField:
    """The tokens of a field of the row."""

    name: str


@dataclass(frozen=True)
class LiteralText:
    """Literal text."""

    text: str


TemplatePart = SpecialToken | VirtualTokens | TemplateField | LiteralText


class RenderedTemplate(NamedTuple):
    """Token ids, and for each the field that it comes from; None for the template's own."""

    ids: list[int]
    field_names: list[str | None]


@dataclass(frozen=True)
class Template:
    """The parts of a template in order."""

    parts: tuple[TemplatePart, ...]

    @classmethod
    def parse(cls, text: str) -> Template:
        """Read a template. Raises `StageError` for braces that do not match, and for what stands in them."""
        parts: list[TemplatePart] = []
        at = virtual = 0
        for mark in _PLACEHOLDER.finditer(text):
            parts.append(LiteralText(text[at : mark.start()]))
            at = mark.end()
            part = _parse_placeholder(mark, virtual)
            parts.append(part)
            virtual += part.count if isinstance(part, VirtualTokens) else 0
        parts.append(LiteralText(text[at:]))
        return cls(tuple(_strip_separators(_merge_literals(parts))))

    @cached_property
    def placeholders(self) -> tuple[str, ...]:
        """The field at each place for one, in order."""
        return tuple(part.name for part in self.parts if isinstance(part, TemplateField))

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields it reads, each once, in the order of their first places."""
        return tuple(dict.fromkeys(self.placeholders))

    @property
    def virtual_token_count(self) -> int:
        """How many virtual tokens it has."""
        return sum(part.count for part in self.parts if isinstance(part, VirtualTokens))

    def segments(
        self, special_ids: Mapping[str, int], first_virtual: int, tokenize: Callable[[str], Sequence[int]]
    ) -> list[list[int]]:
        """Its own tokens: those before the first field, between each two, and after the last.

        `special` are ids by names in lower case ("cls", "mask"), `first_virtual` the id of the first virtual token, `literal`
        turns text into ids. Raises `StageError` for a special token that `special` does not have.
        """
        pieces: list[list[int]] = [[]]
        for part in self.parts:
            match part:
                case TemplateField():
                    pieces.append([])
                case SpecialToken(name):
                    pieces[-1].append(_special_id(name, special_ids))
                case VirtualTokens(first, count):
                    pieces[-1] += range(first_virtual + first, first_virtual + first + count)
                case LiteralText(text):
                    pieces[-1] += tokenize(text)
        return pieces

    def render(
        self,
        fields: Mapping[str, Sequence[int]],
        special_ids: Mapping[str, int],
        first_virtual: int,
        tokenize: Callable[[str], Sequence[int]],
        max_tokens: int | None = None,
        cut_field: str | None = None,
        *,
        cut_side: Literal["end", "beginning"] = "end",
    ) -> RenderedTemplate:
        """A row's tokens, at most `limit`, for which the field `cut` is shortened at its end or its beginning.

        `fields` are the ids of the row's fields; the rest is as in `around`. The template's own tokens are never shortened.
        Raises `StageError` for a field that is not there and for a template that leaves no room, and `DataError` for a row
        that is too long and cannot be shortened so.
        """
        texts = {name: list(_get_field(name, fields)) for name in self.fields}
        if cut_field is not None:
            _require_field(cut_field, self.fields)
        pieces = self.segments(special_ids, first_virtual, tokenize)
        own = sum(map(len, pieces))
        if max_tokens is not None and own + sum(len(texts[name]) for name in self.placeholders) > max_tokens:
            room = self._field_budget(texts, own, max_tokens, cut_field)
            texts[room.name] = texts[room.name][: room.size] if cut_side == "end" else texts[room.name][-room.size :]
        ids, field_of = list(pieces[0]), list[str | None]([None] * len(pieces[0]))
        for name, piece in zip(self.placeholders, pieces[1:], strict=True):
            ids += [*texts[name], *piece]
            field_of += [name] * len(texts[name]) + [None] * len(piece)
        return RenderedTemplate(ids, field_of)

    def _field_budget(
        self, texts: Mapping[str, Sequence[int]], template_tokens: int, max_tokens: int, cut_field: str | None
    ) -> _FieldBudget:
        """What is left for the field to be shortened, at each of its places."""
        if template_tokens >= max_tokens:
            raise StageError(
                f"the template alone has {template_tokens} tokens, and a row {max_tokens}",
                where="template",
                expected="room for at least one token of a field",
                hint="a shorter template, or longer rows",
            )
        length = template_tokens + sum(len(texts[name]) for name in self.placeholders)
        if cut_field is None:
            raise DataError(
                f"the row has {length} tokens, more than {max_tokens}",
                where="template",
                hint=f"say which field may be cut: {', '.join(self.fields)}",
            )
        others = sum(len(texts[name]) for name in self.placeholders if name != cut_field)
        size = (max_tokens - template_tokens - others) // self.placeholders.count(cut_field)
        if size < 1:
            raise DataError(
                f"without `{cut_field}` the row already has {template_tokens + others} tokens of {max_tokens}",
                where="template",
                hint="cut a longer field, or make rows longer",
            )
        return _FieldBudget(cut_field, size)


class _FieldBudget(NamedTuple):
    """How many tokens of a field there is room for."""

    name: str
    size: int


def _parse_placeholder(mark: re.Match[str], virtual: int) -> TemplatePart:
    """What a mark stands for; `virtual` tokens came before it."""
    whole = mark.group()
    if whole in ("{{", "}}"):
        return LiteralText(whole[0])
    if mark["special"] is not None:
        return SpecialToken(mark["special"].lower())
    if mark["quoted"] is not None:
        return LiteralText(f"[{mark['quoted']}]")
    inside = mark["braced"]
    if inside is None:
        raise StageError(
            f"'{whole}' at character {mark.start() + 1} has no partner: {mark.string}",
            where="template",
            expected="{field} or {3}",
            hint=f"a brace that is text is written twice: {whole}{whole}",
        )
    if inside.isdecimal() and int(inside) > 0:
        return VirtualTokens(virtual, int(inside))
    if not _NAME.fullmatch(inside):
        raise StageError(
            f"{whole} at character {mark.start() + 1} is neither a field nor a number of virtual tokens",
            where="template",
            expected="{field}, or {3} for three virtual tokens (at least one)",
        )
    return TemplateField(inside)


def _merge_literals(parts: Sequence[TemplatePart]) -> list[TemplatePart]:
    """Words beside words are one text, so that they are tokenised together."""
    joined: list[TemplatePart] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, LiteralText) and isinstance(last, LiteralText):
            joined[-1] = LiteralText(last.text + part.text)
        else:
            joined.append(part)
    return joined


def _strip_separators(parts: Sequence[TemplatePart]) -> list[TemplatePart]:
    """Without the spaces that only part special and virtual tokens from the rest."""
    own = (SpecialToken, VirtualTokens)
    left: list[TemplatePart] = []
    for before, part, after in zip([None, *parts[:-1]], parts, [*parts[1:], None], strict=True):
        if isinstance(part, LiteralText):
            text = part.text.lstrip(" ") if isinstance(before, own) else part.text
            part = LiteralText(text.rstrip(" ") if isinstance(after, own) else text)
        if part != LiteralText(""):
            left.append(part)
    return left


def _special_id(name: str, special_ids: Mapping[str, int]) -> int:
    if name not in special_ids:
        raise StageError(
            f"this tokenizer has no special token [{name.upper()}]",
            where="template",
            expected=" ".join(f"[{known.upper()}]" for known in special_ids) or "no special tokens",
            hint=suggest_nearest(name, special_ids) or f"if it is text, write [[{name.upper()}]]",
        )
    return special_ids[name]


def _get_field(name: str, fields: Mapping[str, Sequence[int]]) -> Sequence[int]:
    _require_field(name, fields)
    return fields[name]


def _require_field(name: str, fields: Mapping[str, object] | Sequence[str]) -> None:
    if name not in fields:
        raise StageError(
            f"there is no field '{name}'",
            where="template",
            expected=", ".join(fields) or "no fields",
            hint=suggest_nearest(name, fields),
        )
