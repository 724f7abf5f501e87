"""Renderers without a chat template: prompt and answer as text, and the inputs of classifiers and taggers."""

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

from postgrad.data.read.examples import NO_TAG, Example
from postgrad.data.read.labels import Labels
from postgrad.data.read.row_kinds import RowKind
from postgrad.data.render.renderer import RenderedExample
from postgrad.errors import DataError, StageError, suggest_nearest

ANSWER, CONTEXT = 1, 0
"""Marks of trained tokens, and of tokens that are only inputs."""
TEACHER_CONTEXT = 2
"""Mark of tokens before a text that only a teacher reads."""

_NO_TAG_TEXT = f"words without a tag ({NO_TAG})"

_DEFAULT_TEMPLATES = MappingProxyType(
    {
        RowKind.INSTRUCTION: ("{question}", "\n\n", "{output}"),
        RowKind.COMPLETION: ("{prompt}", "", "{completion}"),
        RowKind.PAIR: ("{source}", "\n", "{target}"),
        RowKind.LABELLED: ("{lines}\nlabel:", " ", "{label}"),
        RowKind.TAGGED: ("{tokens}", "\n", "{tags}"),
        RowKind.QUESTION: ("question: {question}\ncontext: {context}\nanswer:", " ", "{answer}"),
        RowKind.CHOICES: ("{question}\n{choices}\nAnswer:", " ", "{answer}"),
    }
)
"""Default templates by kind: prompt, separator (in a joint text), answer."""


@dataclass(frozen=True)
class PlainRenderer:
    """Renders a prompt and an answer, each from a template: `{field}` is a field of the row, `{{` and `}}` are braces.

    `{label:round 0.2}` is a number rounded to the nearest multiple of 0.2 (half to even), as T5 writes similarities (Raffel
    et al. 2020, section 2.4). Defaults depend on the kind of the row. The fields are the row's own (`prompt`, `premise`,
    `label` ...) and:

    - labelled: `lines`, one `name: text` for each text; `label`, mapped by `label_words` if set (`{"0": "no"}`)
    - choices: `choices`, a line `A. ...` for each; `answer`, the text of the correct one; `letter`, its letter
    - instruction: `question`, the instruction and the input, if any
    - tagged: `tokens` and `tags`, joined by spaces

    For a decoder (`is_separate=False`) both are one text with `separator` between them. For an encoder-decoder
    (`is_separate=True`) each is tokenised alone, without a separator.
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
        """The prompt as context, and the answer to train on."""
        prompt, separator, answer = self.render_turn(example)
        if self.is_separate:
            return RenderedExample(((prompt, CONTEXT), (answer, ANSWER)), is_joint=False)
        return RenderedExample(((prompt + separator, CONTEXT), (answer, ANSWER)))

    def render_turn(self, example: Example) -> tuple[str, str, str]:
        """Prompt, separator and answer. Raises `DataError` for a field that the row does not have."""
        if example.kind not in _DEFAULT_TEMPLATES or len(example.fields.get("messages", ())) > 2:
            raise DataError(
                "a conversation of several turns",
                expected="rows of one prompt and one answer",
                hint="render conversations with a chat template",
            )
        prompt, separator, answer = self.templates(example.kind)
        fields = _template_fields(example, self.label_words)
        return _fill_template(prompt, fields), separator, _fill_template(answer, fields)

    def templates(self, kind: str) -> tuple[str, str, str]:
        """Templates of prompt, separator and answer for rows of a kind."""
        prompt, separator, answer = _DEFAULT_TEMPLATES[RowKind(kind)]
        return (
            prompt if self.prompt is None else self.prompt,
            separator if self.separator is None else self.separator,
            answer if self.answer is None else self.answer,
        )


@dataclass(frozen=True)
class ClassRenderer:
    """Renders the texts of a labelled row for a model with a head: mark 0 for the first, 1 for the second, and the label.

    `separator` belongs to the first text: `[SEP]` or `</s></s>` for an encoder pretrained on such pairs, then with
    `is_joint=False`, as these models tokenise each text alone.
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
        """The one or two texts, and the label as numbers. Raises `DataError` for an unknown label."""
        _require_kind(example, RowKind.LABELLED)
        first, *second = example.texts.values()
        pieces = [(first, 0), *((text, mark) for other in second for text, mark in ((self.separator, 0), (other, 1)))]
        return RenderedExample(tuple(pieces), self.labels.values(example), self.is_joint)


@dataclass(frozen=True)
class TagRenderer:
    """Renders the words of a tagged row, joined by `joiner`: the first token of each is marked with its tag's index + 1.

    A word without a token of its own (removed by normalisation, or merged with the word before) has no mark, nor has one
    without a tag.
    """

    labels: Labels
    joiner: str = " "
    width: int = field(default=0, init=False)

    @cached_property
    def fingerprint(self) -> str:
        return _hash("tags", [asdict(self.labels), self.joiner])

    def render(self, example: Example) -> RenderedExample:
        """The words and their tags. Raises `DataError` for an unknown tag."""
        _require_kind(example, RowKind.TAGGED)
        pieces: list[tuple[str, int]] = []
        tags = example.fields["tags"]
        for word, tag in zip(example.fields["tokens"], tags, strict=True):
            pieces += [(self.joiner, 0), (word, 0 if tag == NO_TAG else self.labels.index(tag) + 1)]
        return RenderedExample(tuple(pieces[1:]), mark_first_token=True, omitted=(_NO_TAG_TEXT,) * tags.count(NO_TAG))


def _require_kind(example: Example, kind: RowKind) -> None:
    if example.kind != kind:
        raise DataError(f"a row of kind `{example.kind}`", expected=f"rows of kind `{kind}`")


def _hash(kind: str, parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps([kind, *parts], sort_keys=True).encode()).hexdigest()


# --- templates ----------------------------------------------------------------------------------------


def _template_fields(example: Example, label_words: Mapping[str, str]) -> dict[str, str]:
    """The fields of an example as text, by their names in templates."""
    fields = example.fields
    match example.kind:
        case RowKind.LABELLED:
            labels = fields["labels"] if "labels" in fields else (fields["label"],)
            label_text = ", ".join(_label_text(label, label_words) for label in labels)
            lines = "\n".join(f"{name}: {text}" for name, text in example.texts.items())
            return {**example.texts, "lines": lines, "label": label_text}
        case RowKind.CHOICES:
            letters = string.ascii_uppercase
            lines = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, fields["choices"], strict=False))
            index = fields["answer"]
            return {
                "question": fields["question"],
                "choices": lines,
                "answer": fields["choices"][index],
                "letter": letters[index],
            }
        case RowKind.TAGGED:
            if NO_TAG in fields["tags"]:
                raise DataError(
                    f"{fields['tags'].count(NO_TAG)} {_NO_TAG_TEXT}",
                    expected="a tag for each word, to write the tags as text",
                    hint="objectives: [{kind: classify, problem: tags}] leaves such words out",
                )
            tags = (_label_text(tag, label_words) for tag in fields["tags"])
            return {"tokens": " ".join(fields["tokens"]), "tags": " ".join(tags)}
        case RowKind.INSTRUCTION:
            own = {name: fields[name] for name in ("instruction", "input", "output")}
            return {**own, "question": fields["messages"][-2]["content"]}
    return {name: value for name, value in fields.items() if isinstance(value, str)}


def _label_text(label: str | int | float, label_words: Mapping[str, str]) -> str:
    name = str(label)
    if not label_words:
        return name
    if name not in label_words:
        raise DataError(
            f"no word for the label '{name[:60]}'",
            expected=f"a label among {', '.join(list(label_words)[:12])}",
            hint=suggest_nearest(name, label_words),
        )
    return label_words[name]


_TOKEN = re.compile(r"(\{\{|\}\}|\{[^{}]*\}|[{}])")


@dataclass(frozen=True)
class _FieldSlot:
    """A field of the row; `step`: what its number is rounded to a multiple of, if set."""

    name: str
    step: Decimal | None = None

    def fill(self, fields: Mapping[str, str]) -> str:
        if self.name not in fields:
            raise DataError(
                f"the template uses {{{self.name}}}, which the row does not have",
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
        raise DataError(f"cannot round {{{name}}}: {text[:40]!r}", expected="a number", hint="remove `round`") from None
    return str(abs(multiple) if multiple.is_zero() else multiple)


def _parse_template(template: str) -> list[str | _FieldSlot]:
    """The parts of a template. Raises `StageError` for an unpaired brace, and for an invalid field."""
    parts: list[str | _FieldSlot] = []
    for part in _TOKEN.split(template):
        if part in ("{", "}"):
            raise StageError(
                f"a lone '{part}' in the template {template[:60]!r}",
                expected="fields as {name}, and literal braces doubled: {{ and }}",
            )
        if part in ("{{", "}}"):
            parts.append(part[0])
        elif part.startswith("{"):
            parts.append(_parse_field(part, template))
        elif part:
            parts.append(part)
    return parts


def _parse_field(part: str, template: str) -> _FieldSlot:
    name, colon, format_ = part[1:-1].partition(":")
    if not colon:
        return _FieldSlot(name)
    step = re.fullmatch(r" *round +(\d*\.?\d+) *", format_)
    if step is None or not Decimal(step[1]):
        raise StageError(
            f"{part} in the template {template[:60]!r} is not valid",
            expected="{name}, or {name:round 0.2}",
        )
    return _FieldSlot(name, Decimal(step[1]))


def _fill_template(template: str, fields: Mapping[str, str]) -> str:
    return "".join(part.fill(fields) if isinstance(part, _FieldSlot) else part for part in _parse_template(template))
