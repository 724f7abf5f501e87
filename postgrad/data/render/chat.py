"""Rendering of conversations with a chat template, and location of the answers in the text.

The tokenizer's own template is used (Jinja, as in `transformers`), so that training matches inference. The answers are
located in one of two ways:

- by the template's `{% generation %}` tags around them;
- by prefixes: the text up to an answer, with `add_generation_prompt`, must be a prefix of the text with the answer.

Base models have no template. `PLAIN_TEMPLATE` needs no new tokens and ends each answer with the EOS. A model trained with it
is saved with it (`plain_template`), so that inference matches training.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from postgrad.data.read.examples import Example
from postgrad.data.read.labels import Labels
from postgrad.data.render.renderer import RenderedExample
from postgrad.data.render.renderers import ANSWER, CONTEXT, PlainRenderer
from postgrad.errors import DataError, ModelError

PLAIN_TEMPLATE = """\
{%- set names = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"} %}
{%- for message in messages %}
    {%- if "tool_calls" in message %}{{ raise_exception("the plain template has no words for tool calls") }}{% endif %}
    {{- "### " + names[message["role"]] + ":\\n" + message["content"] }}
    {{- eos_token if message["role"] == "assistant" }}{{ "" if loop.last else "\\n\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "\\n\\n### Assistant:\\n" }}{% endif %}"""
"""`### User:`, such a line for each role, and the EOS after each answer."""


def plain_template(prefix: str) -> str:
    """The plain template to save with a tokenizer, after the special tokens that the tokenizer adds before a text."""
    return (f"{{{{- {json.dumps(prefix, ensure_ascii=False)} }}}}" if prefix else "") + PLAIN_TEMPLATE


def custom_template(chat_template: str | Mapping[str, str] | None) -> str | None:
    """A tokenizer's own chat template (the default one of several); None for the plain template, or for none."""
    template = chat_template.get("default") if isinstance(chat_template, Mapping) else chat_template
    return None if template and template.endswith(PLAIN_TEMPLATE) else template


_ANSWER_BEGIN, _ANSWER_END = "\ufdd0", "\ufdd1"
"""Noncharacters that mark the start and end of a `{% generation %}` block."""

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\b")

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ChatRenderer:
    """Renders conversations with a chat template; rows of one prompt and one answer become conversations of one turn.

    `special_tokens`: by their names in templates (`bos_token`, `eos_token`). `answers="last"` trains only the last answer of
    each conversation, which works with more templates. `today`: the date that templates see, fixed for reproducibility.
    Raises `ModelError` for an invalid template.
    """

    template: str | None
    special_tokens: Mapping[str, str]
    answers: Literal["all", "last"] = "all"
    turn_renderer: PlainRenderer = field(default_factory=PlainRenderer)
    today: datetime.date = datetime.date(2024, 7, 26)
    labels: Labels | None = field(default=None, init=False)
    width: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.template is None and not self.special_tokens.get("eos_token"):
            raise ModelError(
                "there is no chat template, and no EOS token to end an answer with",
                where="model",
                expected="`eos_token` among the special tokens",
            )
        _ = self._compiled_template

    @cached_property
    def fingerprint(self) -> str:
        template, today = self.template or PLAIN_TEMPLATE, self.today.isoformat()
        parts = [template, dict(self.special_tokens), self.answers, self.turn_renderer.fingerprint, today]
        return hashlib.sha256(json.dumps(["chat", *parts], sort_keys=True).encode()).hexdigest()

    @cached_property
    def _compiled_template(self) -> jinja2.Template:
        return compile_template(self.template or PLAIN_TEMPLATE, self.today)

    @property
    def _has_generation_tags(self) -> bool:
        """Whether the template marks the answers itself."""
        return _GENERATION_TAG.search(self.template or "") is not None

    def render(self, example: Example) -> RenderedExample:
        """The conversation with its answers marked. Raises `DataError` when they cannot be located."""
        if "messages" in example.fields:
            messages: Messages = example.messages
        else:
            prompt, _, answer = self.turn_renderer.render_turn(example)
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        tools = example.fields.get("tools")
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if self._has_generation_tags:
            if _ANSWER_BEGIN in example.text or _ANSWER_END in example.text:
                raise DataError("the noncharacters U+FDD0 or U+FDD1", expected="text without them")
            pieces = self._pieces_from_tags(self._apply_template(messages, tools), len(answers))
        else:
            pieces = self._pieces_from_prefixes(messages, tools, answers if self.answers == "all" else answers[-1:])
        return RenderedExample(tuple(self._trim_after_eos(pieces)))

    def render_text(
        self, messages: Messages, tools: Sequence[Any] | None = None, *, add_generation_prompt: bool = False
    ) -> str:
        """The rendered conversation, with `add_generation_prompt` up to the start of the next answer."""
        text = self._apply_template(messages, tools, add_generation_prompt=add_generation_prompt)
        return text.replace(_ANSWER_BEGIN, "").replace(_ANSWER_END, "") if self._has_generation_tags else text

    def _apply_template(
        self, messages: Messages, tools: Sequence[Any] | None, *, add_generation_prompt: bool = False
    ) -> str:
        try:
            return self._compiled_template.render(
                messages=[dict(message) for message in messages],
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except Exception as error:  # a template can raise anything
            raise DataError(
                f"the chat template fails on the conversation: {str(error) or type(error).__name__}",
                expected="a conversation that the template supports",
                hint="change the row, or use another template",
            ) from None

    def _pieces_from_tags(self, full_text: str, answer_count: int) -> list[tuple[str, int]]:
        """Pieces of the text, split at the template's own marks."""
        first, *rest = full_text.split(_ANSWER_BEGIN)
        if len(rest) != answer_count:
            raise DataError(
                f"the chat template marks {len(rest)} spans for {answer_count} answers",
                expected="{% generation %} around each answer and nothing else",
            )
        pieces = [(first, CONTEXT)]
        for number, part in enumerate(rest, 1):
            span, _, after = part.partition(_ANSWER_END)
            is_trained = self.answers == "all" or number == answer_count
            pieces += [(span, ANSWER if is_trained else CONTEXT), (after, CONTEXT)]
        return pieces

    def _pieces_from_prefixes(
        self, messages: Messages, tools: Sequence[Any] | None, trained_messages: Sequence[int]
    ) -> list[tuple[str, int]]:
        """Pieces of the text, split at the lengths of the renderings before and after each answer."""
        full_text = self.render_text(messages, tools)
        pieces: list[tuple[str, int]] = []
        end = 0
        for number in trained_messages:
            before = self.render_text(messages[:number], tools, add_generation_prompt=True)
            after = full_text if number + 1 == len(messages) else self.render_text(messages[: number + 1], tools)
            if not (after.startswith(before) and full_text.startswith(after) and len(before) >= end):
                raise self._hidden_answer_error(before if not after.startswith(before) else after, full_text, number)
            if not after[len(before) :].strip():
                raise DataError(
                    f"the chat template omits the answer (message {number + 1})",
                    expected="a template that writes every answer",
                )
            pieces += [(full_text[end : len(before)], CONTEXT), (full_text[len(before) : len(after)], ANSWER)]
            end = len(after)
        return pieces

    def _hidden_answer_error(self, part: str, full_text: str, number: int) -> DataError:
        pairs = enumerate(zip(part, full_text, strict=False))
        offset = next((i for i, (one, other) in pairs if one != other), min(len(part), len(full_text)))
        hint = "a template with {% generation %} around its answers, or the plain one"
        if self.answers == "all":
            hint = f"train only the last answer of each conversation, or use {hint}"
        return DataError(
            f"with this chat template the text up to message {number + 1} is not a prefix of the whole text: "
            f"{part[max(0, offset - 20) : offset + 20]!r} against {full_text[max(0, offset - 20) : offset + 20]!r}",
            expected="a template that only appends to the text as the conversation grows",
            hint=hint,
        )

    def _trim_after_eos(self, pieces: list[tuple[str, int]]) -> list[tuple[str, int]]:
        """Do not train white space after an answer's EOS, and remove it at the end, where the EOS ends the document."""
        eos = self.special_tokens.get("eos_token")
        if not eos:
            return [(text, mark) for text, mark in pieces if text]
        out: list[tuple[str, int]] = []
        for text, mark in pieces:
            answer, separator, tail = text.rpartition(eos)
            out += [(answer + separator, mark), (tail, CONTEXT)] if separator and not tail.strip() else [(text, mark)]
        out = [(text, mark) for text, mark in out if text]
        if "".join(text for text, _ in out).rstrip().endswith(eos):
            while not out[-1][0].strip():
                out.pop()
        return out


def compile_template(template: str, today: datetime.date) -> jinja2.Template:
    """Compile a chat template as `transformers` does: sandboxed, with trimmed blocks and the usual functions."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationExtension, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    functions = {"raise_exception": _raise_exception, "strftime_now": today.strftime}
    try:
        return environment.from_string(template, globals=functions)
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(
            f"invalid chat template: {error.message}",
            where=f"tokenizer, chat template, line {error.lineno}",
            expected="a Jinja template",
        ) from None


class _GenerationExtension(Extension):
    """`{% generation %}` ... `{% endgeneration %}`: blocks that the model generates."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (
            nodes.Output([nodes.TemplateData(sign)]).set_lineno(line) for sign in (_ANSWER_BEGIN, _ANSWER_END)
        )
        return [begin, *body, end]


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without escapes; jinja2's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
