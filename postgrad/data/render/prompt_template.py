"""Prompt templates: the tokens around the fields of a row, such as `[CLS] {3} {x} {3} [MASK] {3}`.

    {x}         the tokens of the row's field `x`
    {3}         three virtual tokens of a soft prompt, numbered through the template
    [MASK]      a special token of the tokenizer: CLS, SEP, MASK, BOS, EOS, PAD
    other text  literal text, tokenised
    {{ and }}   braces;  [[MASK]] is the text "[MASK]"

Spaces next to special and virtual tokens are separators. All other spaces and line breaks are text.
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
MAX_VIRTUAL_TOKENS = 2**16
_NAME = re.compile(r"[^\W\d][\w .-]*")


@dataclass(frozen=True)
class SpecialToken:
    """A special token, by its name in lower case: "cls", "sep", "mask", "bos", "eos", "pad"."""

    name: str


@dataclass(frozen=True)
class VirtualTokens:
    """`count` virtual tokens, starting with the template's `first`-th."""

    first: int
    count: int


@dataclass(frozen=True)
class TemplateField:
    """The tokens of a field of the row."""

    name: str


@dataclass(frozen=True)
class LiteralText:
    text: str


TemplatePart = SpecialToken | VirtualTokens | TemplateField | LiteralText


class RenderedTemplate(NamedTuple):
    """Token ids, and the field of each; None for the template's own tokens."""

    ids: list[int]
    field_names: list[str | None]


@dataclass(frozen=True)
class Template:
    """The parts of a template in order."""

    parts: tuple[TemplatePart, ...]

    @classmethod
    def parse(cls, text: str) -> Template:
        """Parse a template. Raises `StageError` for unpaired braces, and for invalid contents."""
        parts: list[TemplatePart] = []
        end = virtual_count = 0
        for match in _PLACEHOLDER.finditer(text):
            parts.append(LiteralText(text[end : match.start()]))
            end = match.end()
            part = _parse_placeholder(match, virtual_count)
            parts.append(part)
            virtual_count += part.count if isinstance(part, VirtualTokens) else 0
            if virtual_count > MAX_VIRTUAL_TOKENS:
                raise StageError(
                    "the template has too many virtual tokens",
                    where="tuning.template",
                    expected=f"at most {MAX_VIRTUAL_TOKENS:,}",
                )
        parts.append(LiteralText(text[end:]))
        return cls(tuple(_strip_separators(_merge_literals(parts))))

    @cached_property
    def placeholders(self) -> tuple[str, ...]:
        """The names of all field placeholders, in order."""
        return tuple(part.name for part in self.parts if isinstance(part, TemplateField))

    @property
    def fields(self) -> tuple[str, ...]:
        """The distinct fields, in order of first occurrence."""
        return tuple(dict.fromkeys(self.placeholders))

    @property
    def virtual_token_count(self) -> int:
        """Number of virtual tokens."""
        return sum(part.count for part in self.parts if isinstance(part, VirtualTokens))

    def segments(
        self, special_ids: Mapping[str, int], first_virtual: int, tokenize: Callable[[str], Sequence[int]]
    ) -> list[list[int]]:
        """The template's own tokens: those before the first field, between fields, and after the last.

        `special_ids`: by lower-case name ("cls", "mask"). `first_virtual`: the id of the first virtual token. Raises
        `StageError` for a special token that the tokenizer does not have.
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
        """A row's tokens, at most `max_tokens`; the field `cut_field` is truncated at its end or its beginning to fit.

        `fields`: token ids by field; other arguments as for `segments`. The template's own tokens are never truncated. Raises
        `StageError` for an unknown field and for a template that leaves no room, and `DataError` for a row that does not fit.
        """
        texts = {name: list(_get_field(name, fields)) for name in self.fields}
        if cut_field is not None:
            _require_field(cut_field, self.fields)
        pieces = self.segments(special_ids, first_virtual, tokenize)
        template_tokens = sum(map(len, pieces))
        if (
            max_tokens is not None
            and template_tokens + sum(len(texts[name]) for name in self.placeholders) > max_tokens
        ):
            room = self._field_budget(texts, template_tokens, max_tokens, cut_field)
            texts[room.name] = texts[room.name][: room.size] if cut_side == "end" else texts[room.name][-room.size :]
        ids, field_of = list(pieces[0]), list[str | None]([None] * len(pieces[0]))
        for name, piece in zip(self.placeholders, pieces[1:], strict=True):
            ids += [*texts[name], *piece]
            field_of += [name] * len(texts[name]) + [None] * len(piece)
        return RenderedTemplate(ids, field_of)

    def _field_budget(
        self, texts: Mapping[str, Sequence[int]], template_tokens: int, max_tokens: int, cut_field: str | None
    ) -> _FieldBudget:
        """The tokens that fit at each occurrence of the field to truncate."""
        if template_tokens >= max_tokens:
            raise StageError(
                f"the template alone has {template_tokens} tokens, and rows have {max_tokens}",
                where="tuning.template",
                expected="room for at least one token of a field",
                hint="a shorter template, or longer rows",
            )
        length = template_tokens + sum(len(texts[name]) for name in self.placeholders)
        if cut_field is None:
            raise DataError(
                f"the row has {length} tokens, more than {max_tokens}",
                where="tuning.template",
                hint=f"name the field that may be cut: {', '.join(self.fields)}",
            )
        others = sum(len(texts[name]) for name in self.placeholders if name != cut_field)
        size = (max_tokens - template_tokens - others) // self.placeholders.count(cut_field)
        if size < 1:
            raise DataError(
                f"without `{cut_field}` the row already has {template_tokens + others} tokens of {max_tokens}",
                where="tuning.template",
                hint="cut a longer field, or use longer rows",
            )
        return _FieldBudget(cut_field, size)


class _FieldBudget(NamedTuple):
    """Tokens of a field that fit."""

    name: str
    size: int


def _parse_placeholder(match: re.Match[str], virtual_count: int) -> TemplatePart:
    """The part for a placeholder that `virtual_count` virtual tokens precede."""
    token = match.group()
    if token in ("{{", "}}"):
        return LiteralText(token[0])
    if match["special"] is not None:
        return SpecialToken(match["special"].lower())
    if match["quoted"] is not None:
        return LiteralText(f"[{match['quoted']}]")
    inside = match["braced"]
    if inside is None:
        raise StageError(
            f"unpaired '{token}' at character {match.start() + 1}: {match.string}",
            where="tuning.template",
            expected="{field} or {3}",
            hint=f"double a literal brace: {token}{token}",
        )
    if inside.isdecimal() and (count := int(inside[:20])) > 0:  # of a longer number, as large as any
        return VirtualTokens(virtual_count, count)
    if not _NAME.fullmatch(inside):
        raise StageError(
            f"{token} at character {match.start() + 1} is neither a field nor a number of virtual tokens",
            where="tuning.template",
            expected="{field}, or {3} for three virtual tokens (at least one)",
        )
    return TemplateField(inside)


def _merge_literals(parts: Sequence[TemplatePart]) -> list[TemplatePart]:
    """Join adjacent literals, so that they are tokenised together."""
    joined: list[TemplatePart] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, LiteralText) and isinstance(last, LiteralText):
            joined[-1] = LiteralText(last.text + part.text)
        else:
            joined.append(part)
    return joined


def _strip_separators(parts: Sequence[TemplatePart]) -> list[TemplatePart]:
    """Remove the spaces next to special and virtual tokens."""
    token_types = (SpecialToken, VirtualTokens)
    stripped: list[TemplatePart] = []
    for before, part, after in zip([None, *parts[:-1]], parts, [*parts[1:], None], strict=True):
        if isinstance(part, LiteralText):
            text = part.text.lstrip(" ") if isinstance(before, token_types) else part.text
            part = LiteralText(text.rstrip(" ") if isinstance(after, token_types) else text)
        if part != LiteralText(""):
            stripped.append(part)
    return stripped


def _special_id(name: str, special_ids: Mapping[str, int]) -> int:
    if name not in special_ids:
        raise StageError(
            f"this tokenizer has no special token [{name.upper()}]",
            where="tuning.template",
            expected=" ".join(f"[{known.upper()}]" for known in special_ids) or "no special tokens",
            hint=suggest_nearest(name, special_ids) or f"for literal text, write [[{name.upper()}]]",
        )
    return special_ids[name]


def _get_field(name: str, fields: Mapping[str, Sequence[int]]) -> Sequence[int]:
    _require_field(name, fields)
    return fields[name]


def _require_field(name: str, fields: Mapping[str, object] | Sequence[str]) -> None:
    if name not in fields:
        raise StageError(
            f"there is no field '{name}'",
            where="tuning.template",
            expected=", ".join(fields) or "no fields",
            hint=suggest_nearest(name, fields),
        )
