"""How does an example become text, and what of it is trained?

Three ways besides the chat template: by a prompt and an answer written out (`PlainRenderer`, for models that answer in
text), as the input of a classifier (`ClassRenderer`), as the input of a tagger (`TagRenderer`).
"""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from decimal import ROUND_HALF_EVEN, Decimal, InvalidOperation
from functools import cached_property
from types import MappingProxyType
from typing import Any

from postgrad.data.read.examples import Example
from postgrad.data.read.labels import Labels
from postgrad.data.render.renderer import RenderedExample
from postgrad.errors import DataError, StageError, suggest_nearest

ANSWER, CONTEXT = 1, 0
"""Marks of what a language model is trained on, and of what it only reads."""

_DEFAULT_TEMPLATES = MappingProxyType(
    {
        "instruction": ("{question}", "\n\n", "{output}"),
        "completion": ("{prompt}", "", "{completion}"),
        "pair": ("{source}", "\n", "{target}"),
        "labelled": ("{lines}\nlabel:", " ", "{label}"),
        "tagged": ("{tokens}", "\n", "{tags}"),
        "question": ("question: {question}\ncontext: {context}\nanswer:", " ", "{answer}"),
        "choices": ("{question}\n{choices}\nAnswer:", " ", "{answer}"),
    }
)
"""By kind, what is used where no template is given: prompt, what stands between in running text, answer."""


@dataclass(frozen=True)
class PlainRenderer:
    """A prompt and an answer, each a template: `{field}` is a field of the row, `{{` and `}}` are braces.

    `{label:round 0.2}` is a number rounded to the nearest multiple of 0.2 (a half to the even one), as T5 writes
    similarities (Raffel et al. 2020, section 2.4). What is left out goes by the kind of the row. The fields are the row's own
    (`prompt`, `premise`, `label` ...) and:

    - labelled: `lines`, one `name: text` for each text; `label`, through `words` where that names it (`{"0": "no"}`)
    - choices: `choices`, a line `A. ...` for each; `answer`, the text of the right one; `letter`, its letter
    - instruction: `question`, the instruction and, if there is one, the input
    - tagged: `tokens` and `tags`, joined by spaces

    For a decoder (`separate=False`) both are one running text, with `between` between them. For a model that reads the
    prompt and writes the answer apart (`separate=True`) each is tokenised by itself, and nothing stands between.
    """

    prompt: str | None = None
    answer: str | None = None
    separator: str | None = None
    is_separate: bool = False
    label_words: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    labels: Labels | None = field(default=None, init=False)
    width: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        for template in (self.prompt, self.answer):
            _parse_template(template or "")

    @cached_property
    def fingerprint(self) -> str:
        return _hash("plain", [self.prompt, self.answer, self.separator, self.is_separate, dict(self.label_words)])

    def render(self, example: Example) -> RenderedExample:
        """The prompt as context and the answer as what is trained."""
        prompt, between, answer = self.render_turn(example)
        if self.is_separate:
            return RenderedExample(((prompt, CONTEXT), (answer, ANSWER)), is_joint=False)
        return RenderedExample(((prompt + between, CONTEXT), (answer, ANSWER)))

    def render_turn(self, example: Example) -> tuple[str, str, str]:
        """Prompt, what stands between, and answer. Raises `DataError` for a field that the row has not."""
        if example.kind not in _DEFAULT_TEMPLATES or len(example.fields.get("messages", ())) > 2:
            raise DataError(
                "a conversation of several turns",
                expected="rows of one prompt and one answer",
                hint="render conversations with a chat template",
            )
        prompt, between, answer = self.templates(example.kind)
        fields = _template_fields(example, self.label_words)
        return _fill_template(prompt, fields), between, _fill_template(answer, fields)

    def templates(self, kind: str) -> tuple[str, str, str]:
        """Prompt, what stands between in running text, and answer of rows of a kind, with their fields."""
        given = (self.prompt, self.separator, self.answer)
        own = _DEFAULT_TEMPLATES[kind]
        return tuple(theirs if theirs is not None else usual for theirs, usual in zip(given, own, strict=True))  # type: ignore[return-value]


@dataclass(frozen=True)
class ClassRenderer:
    """The texts of a labelled row for a model with a head: mark 0 for the first, 1 for the second, and its label.

    Between two texts stands `separator`, which counts with the first: `[SEP]` or `</s></s>` for an encoder that was
    trained on pairs so, and then with `joint=False`, as such models tokenise each text by itself.
    """

    labels: Labels
    separator: str = "\n"
    is_joint: bool = True

    @property
    def width(self) -> int:
        return self.labels.width

    @cached_property
    def fingerprint(self) -> str:
        return _hash("class", [asdict(self.labels), self.separator, self.is_joint])

    def render(self, example: Example) -> RenderedExample:
        """The text or texts, and the label as numbers. Raises `DataError` for a label that is not among `labels`."""
        if example.kind != "labelled":
            raise _wrong_kind_error(example, "labelled")
        first, *second = example.texts.values()
        pieces = [(first, 0), *((text, mark) for other in second for text, mark in ((self.separator, 0), (other, 1)))]
        return RenderedExample(tuple(pieces), self.labels.values(example), self.is_joint)


@dataclass(frozen=True)
class TagRenderer:
    """The words of a tagged row, `joiner` between them: the first token of each is marked with its tag's index + 1.

    A word of which no token begins (it is normalised away, or shares the token of the word before) has no mark.
    """

    labels: Labels
    joiner: str = " "
    width: int = field(default=0, init=False)

    @cached_property
    def fingerprint(self) -> str:
        return _hash("tags", [asdict(self.labels), self.joiner])

    def render(self, example: Example) -> RenderedExample:
        """The words in a row. Raises `DataError` for a tag that is not among `labels`."""
        if example.kind != "tagged":
            raise _wrong_kind_error(example, "tagged")
        pieces: list[tuple[str, int]] = []
        for word, tag in zip(example.fields["tokens"], example.fields["tags"], strict=True):
            pieces += [(self.joiner, 0), (word, self.labels.index(tag) + 1)]
        return RenderedExample(tuple(pieces[1:]), mark_first_token=True)


def _wrong_kind_error(example: Example, expected: str) -> DataError:
    return DataError(f"a row of kind `{example.kind}`", expected=f"rows of kind `{expected}`")


def _hash(kind: str, parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps([kind, *parts], sort_keys=True).encode()).hexdigest()


# --- templates ----------------------------------------------------------------------------------------


def _template_fields(example: Example, label_words: Mapping[str, str]) -> dict[str, str]:
    """The fields of an example as text, by the names that templates use."""
    fields = example.fields
    match example.kind:
        case "labelled":
            labels = fields["labels"] if "labels" in fields else (fields["label"],)
            said = ", ".join(_label_text(label, label_words) for label in labels)
            lines = "\n".join(f"{name}: {text}" for name, text in example.texts.items())
            return {**example.texts, "lines": lines, "label": said}
        case "choices":
            letters = string.ascii_uppercase
            lines = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, fields["choices"], strict=False))
            index = fields["answer"]
            return {
                "question": fields["question"],
                "choices": lines,
                "answer": fields["choices"][index],
                "letter": letters[index],
            }
        case "tagged":
            tags = (_label_text(tag, label_words) for tag in fields["tags"])
            return {"tokens": " ".join(fields["tokens"]), "tags": " ".join(tags)}
        case "instruction":
            own = {name: fields[name] for name in ("instruction", "input", "output")}
            return {**own, "question": fields["messages"][-2]["content"]}
    return {name: value for name, value in fields.items() if isinstance(value, str)}


def _label_text(label: str | int | float, label_words: Mapping[str, str]) -> str:
    name = str(label)
    if not label_words:
        return name
    if name not in label_words:
        raise DataError(
            f"no word is given for the label '{name[:60]}'",
            expected=f"a label among {', '.join(list(label_words)[:12])}",
            hint=suggest_nearest(name, label_words),
        )
    return label_words[name]


_TOKEN = re.compile(r"(\{\{|\}\}|\{[^{}]*\}|[{}])")


@dataclass(frozen=True)
class _FieldSlot:
    """A field of the row, and to which multiple of what its number is rounded, if it is."""

    name: str
    step: Decimal | None = None

    def fill(self, fields: Mapping[str, str]) -> str:
        if self.name not in fields:
            raise DataError(
                f"the template asks for {{{self.name}}}, which the row has not",
                expected=" ".join(f"{{{name}}}" for name in fields),
                hint=suggest_nearest(self.name, fields),
            )
        text = fields[self.name]
        return text if self.step is None else _round_number(text, self.step, self.name)


def _round_number(text: str, step: Decimal, name: str) -> str:
    try:
        number = Decimal(text)
        if not number.is_finite():
            raise InvalidOperation
        multiple = (number / step).to_integral_value(ROUND_HALF_EVEN) * step
    except InvalidOperation:
        raise DataError(
            f"{{{name}}} is to be rounded, and is {text[:40]!r}", expected="a number", hint="leave out `round`"
        ) from None
    return str(abs(multiple) if multiple.is_zero() else multiple)


def _parse_template(template: str) -> list[str | _FieldSlot]:
    """The parts of a template. Raises `StageError` for a brace that stands alone, and for an unknown way to write a field."""
    parts: list[str | _FieldSlot] = []
    for part in _TOKEN.split(template):
        if part in ("{", "}"):
            raise StageError(
                f"a lone '{part}' in the template {template[:60]!r}",
                expected="fields as {name}, and braces doubled where they are meant: {{ and }}",
            )
        if part in ("{{", "}}"):
            parts.append(part[0])
        elif part.startswith("{"):
            parts.append(_parse_field(part, template))
        elif part:
            parts.append(part)
    return parts


def _parse_field(part: str, template: str) -> _FieldSlot:
    name, colon, how = part[1:-1].partition(":")
    if not colon:
        return _FieldSlot(name)
    step = re.fullmatch(r" *round +(\d*\.?\d+) *", how)
    if step is None or not Decimal(step[1]):
        raise StageError(
            f"{part} in the template {template[:60]!r} asks for something that there is not",
            expected="{name}, or {name:round 0.2}",
        )
    return _FieldSlot(name, Decimal(step[1]))


def _fill_template(template: str, fields: Mapping[str, str]) -> str:
    return "".join(part.fill(fields) if isinstance(part, _FieldSlot) else part for part in _parse_template(template))
