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

from postgrad.errors import DataError, StageError, nearest

_MARK = re.compile(r"\{\{|\}\}|\{(?P<braced>[^{}]*)\}|\[\[(?P<quoted>[A-Z_]+)\]\]|\[(?P<special>[A-Z][A-Z_]*)\]|[{}]")
_NAME = re.compile(r"[^\W\d][\w .-]*")


@dataclass(frozen=True)
class Special:
    """A special token, by its name in lower case: "cls", "sep", "mask", "bos", "eos", "pad"."""

    name: str


@dataclass(frozen=True)
class Virtual:
    """So many virtual tokens, from the `first`-th of the template on."""

    first: int
    count: int


@dataclass(frozen=True)
class Field:
    """The tokens of a field of the row."""

    name: str


@dataclass(frozen=True)
class Words:
    """Literal text."""

    text: str


Part = Special | Virtual | Field | Words


class Rendered(NamedTuple):
    """Token ids, and for each the field that it comes from; None for the template's own."""

    ids: list[int]
    field_of: list[str | None]


@dataclass(frozen=True)
class Template:
    """The parts of a template in order."""

    parts: tuple[Part, ...]

    @classmethod
    def parse(cls, text: str) -> Template:
        """Read a template. Raises `StageError` for braces that do not match, and for what stands in them."""
        parts: list[Part] = []
        at = virtual = 0
        for mark in _MARK.finditer(text):
            parts.append(Words(text[at : mark.start()]))
            at = mark.end()
            part = _part(mark, virtual)
            parts.append(part)
            virtual += part.count if isinstance(part, Virtual) else 0
        parts.append(Words(text[at:]))
        return cls(tuple(_parted(_joined(parts))))

    @cached_property
    def places(self) -> tuple[str, ...]:
        """The field at each place for one, in order."""
        return tuple(part.name for part in self.parts if isinstance(part, Field))

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields it reads, each once, in the order of their first places."""
        return tuple(dict.fromkeys(self.places))

    @property
    def virtual(self) -> int:
        """How many virtual tokens it has."""
        return sum(part.count for part in self.parts if isinstance(part, Virtual))

    def around(
        self, special: Mapping[str, int], first_virtual: int, literal: Callable[[str], Sequence[int]]
    ) -> list[list[int]]:
        """Its own tokens: those before the first field, between each two, and after the last.

        `special` are ids by names in lower case ("cls", "mask"), `first_virtual` the id of the first virtual token, `literal`
        turns text into ids. Raises `StageError` for a special token that `special` does not have.
        """
        pieces: list[list[int]] = [[]]
        for part in self.parts:
            match part:
                case Field():
                    pieces.append([])
                case Special(name):
                    pieces[-1].append(_special_id(name, special))
                case Virtual(first, count):
                    pieces[-1] += range(first_virtual + first, first_virtual + first + count)
                case Words(text):
                    pieces[-1] += literal(text)
        return pieces

    def render(
        self,
        fields: Mapping[str, Sequence[int]],
        special: Mapping[str, int],
        first_virtual: int,
        literal: Callable[[str], Sequence[int]],
        limit: int | None = None,
        cut: str | None = None,
        *,
        cut_at: Literal["end", "beginning"] = "end",
    ) -> Rendered:
        """A row's tokens, at most `limit`, for which the field `cut` is shortened at its end or its beginning.

        `fields` are the ids of the row's fields; the rest is as in `around`. The template's own tokens are never shortened.
        Raises `StageError` for a field that is not there and for a template that leaves no room, and `DataError` for a row
        that is too long and cannot be shortened so.
        """
        texts = {name: list(_field_of(name, fields)) for name in self.fields}
        if cut is not None:
            _known(cut, self.fields)
        pieces = self.around(special, first_virtual, literal)
        own = sum(map(len, pieces))
        if limit is not None and own + sum(len(texts[name]) for name in self.places) > limit:
            room = self._room(texts, own, limit, cut)
            texts[room.name] = texts[room.name][: room.size] if cut_at == "end" else texts[room.name][-room.size :]
        ids, field_of = list(pieces[0]), list[str | None]([None] * len(pieces[0]))
        for name, piece in zip(self.places, pieces[1:], strict=True):
            ids += [*texts[name], *piece]
            field_of += [name] * len(texts[name]) + [None] * len(piece)
        return Rendered(ids, field_of)

    def _room(self, texts: Mapping[str, Sequence[int]], own: int, limit: int, cut: str | None) -> _Room:
        """What is left for the field to be shortened, at each of its places."""
        if own >= limit:
            raise StageError(
                f"the template alone has {own} tokens, and a row {limit}",
                where="template",
                expected="room for at least one token of a field",
                way_out="a shorter template, or longer rows",
            )
        length = own + sum(len(texts[name]) for name in self.places)
        if cut is None:
            raise DataError(
                f"the row has {length} tokens, more than {limit}",
                where="template",
                way_out=f"say which field may be cut: {', '.join(self.fields)}",
            )
        others = sum(len(texts[name]) for name in self.places if name != cut)
        size = (limit - own - others) // self.places.count(cut)
        if size < 1:
            raise DataError(
                f"without `{cut}` the row already has {own + others} tokens of {limit}",
                where="template",
                way_out="cut a longer field, or make rows longer",
            )
        return _Room(cut, size)


class _Room(NamedTuple):
    """How many tokens of a field there is room for."""

    name: str
    size: int


def _part(mark: re.Match[str], virtual: int) -> Part:
    """What a mark stands for; `virtual` tokens came before it."""
    whole = mark.group()
    if whole in ("{{", "}}"):
        return Words(whole[0])
    if mark["special"] is not None:
        return Special(mark["special"].lower())
    if mark["quoted"] is not None:
        return Words(f"[{mark['quoted']}]")
    inside = mark["braced"]
    if inside is None:
        raise StageError(
            f"'{whole}' at character {mark.start() + 1} has no partner: {mark.string}",
            where="template",
            expected="{field} or {3}",
            way_out=f"a brace that is text is written twice: {whole}{whole}",
        )
    if inside.isdecimal() and int(inside) > 0:
        return Virtual(virtual, int(inside))
    if not _NAME.fullmatch(inside):
        raise StageError(
            f"{whole} at character {mark.start() + 1} is neither a field nor a number of virtual tokens",
            where="template",
            expected="{field}, or {3} for three virtual tokens (at least one)",
        )
    return Field(inside)


def _joined(parts: Sequence[Part]) -> list[Part]:
    """Words beside words are one text, so that they are tokenised together."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, Words) and isinstance(last, Words):
            joined[-1] = Words(last.text + part.text)
        else:
            joined.append(part)
    return joined


def _parted(parts: Sequence[Part]) -> list[Part]:
    """Without the spaces that only part special and virtual tokens from the rest."""
    own = (Special, Virtual)
    left: list[Part] = []
    for before, part, after in zip([None, *parts[:-1]], parts, [*parts[1:], None], strict=True):
        if isinstance(part, Words):
            text = part.text.lstrip(" ") if isinstance(before, own) else part.text
            part = Words(text.rstrip(" ") if isinstance(after, own) else text)
        if part != Words(""):
            left.append(part)
    return left


def _special_id(name: str, special: Mapping[str, int]) -> int:
    if name not in special:
        raise StageError(
            f"this tokenizer has no special token [{name.upper()}]",
            where="template",
            expected=" ".join(f"[{known.upper()}]" for known in special) or "no special tokens",
            way_out=nearest(name, special) or f"if it is text, write [[{name.upper()}]]",
        )
    return special[name]


def _field_of(name: str, fields: Mapping[str, Sequence[int]]) -> Sequence[int]:
    _known(name, fields)
    return fields[name]


def _known(name: str, fields: Mapping[str, object] | Sequence[str]) -> None:
    if name not in fields:
        raise StageError(
            f"there is no field '{name}'",
            where="template",
            expected=", ".join(fields) or "no fields",
            way_out=nearest(name, fields),
        )
