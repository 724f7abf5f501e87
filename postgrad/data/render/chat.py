"""How does a conversation become text, and which of it are the answers?

By the tokenizer's own chat template (Jinja, as `transformers` runs it), so that a model is trained on what it will be
asked with. Where the answers stand is found in either of two ways:

- the template says so, with `{% generation %}` around them;
- by prefixes: the text up to an answer, `add_generation_prompt` included, must be how the text with the answer begins.

Base models have no template. For them there is a plain one (`PLAIN`), which needs no new tokens and ends each answer with the
EOS. A model that was trained with it leaves with it (`plain_template`), so that whoever asks it asks as it was trained.
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
"""`### User:`, a line for each role, and the EOS behind each answer."""


def plain_template(add_bos: bool) -> str:
    """The plain template as a tokenizer carries it; with `bos` it also sets the BOS, as templates are expected to."""
    return "{{- bos_token }}" * add_bos + PLAIN_TEMPLATE


def custom_template(chat_template: str | Mapping[str, str] | None) -> str | None:
    """The chat template that a tokenizer carries (of several the default one); None when it is the plain one, or none."""
    template = chat_template.get("default") if isinstance(chat_template, Mapping) else chat_template
    return None if template in (plain_template(False), plain_template(True)) else template


_ANSWER_BEGIN, _ANSWER_END = "\ufdd0", "\ufdd1"
"""Set around what stands between `{% generation %}` and `{% endgeneration %}`: no characters of any text."""

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\b")

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ChatRenderer:
    """Conversations in a chat template; rows of one prompt and one answer (through `turn`) as conversations of one turn.

    `special` are the tokenizer's special tokens by the names that templates use (`bos_token`, `eos_token`). With
    `answers="last"` only the last answer of each conversation is trained, which asks less of the template. `today` is
    what a template is told when it asks for the date: text that changed with the day could not be made again.
    Raises `ModelError` for a template that is none.
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
                "there is no chat template, and no end-of-text token to end an answer with",
                where="tokenizer",
                expected="`eos_token` among the special tokens",
            )
        _ = self._compiled_template

    @cached_property
    def fingerprint(self) -> str:
        """Of all that decides the text."""
        template, today = self.template or PLAIN_TEMPLATE, self.today.isoformat()
        parts = [template, dict(self.special_tokens), self.answers, self.turn_renderer.fingerprint, today]
        return hashlib.sha256(json.dumps(["chat", *parts], sort_keys=True).encode()).hexdigest()

    @cached_property
    def _compiled_template(self) -> jinja2.Template:
        return compile_template(self.template or PLAIN_TEMPLATE, self.today)

    @property
    def _has_generation_tags(self) -> bool:
        """Whether the template itself says where the answers are."""
        return _GENERATION_TAG.search(self.template or "") is not None

    def render(self, example: Example) -> RenderedExample:
        """The conversation with its answers marked. Raises `DataError` where the template does not let them be found."""
        if "messages" in example.fields:
            messages: Messages = example.messages
        else:
            prompt, _, answer = self.turn_renderer.render_turn(example)
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        tools = example.fields.get("tools")
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if self._has_generation_tags:
            if _ANSWER_BEGIN in example.text or _ANSWER_END in example.text:
                raise DataError("U+FDD0 or U+FDD1, which are no characters", expected="text without them")
            pieces = self._pieces_from_tags(self._apply_template(messages, tools), len(answers))
        else:
            pieces = self._pieces_from_prefixes(messages, tools, answers if self.answers == "all" else answers[-1:])
        return RenderedExample(tuple(self._trim_after_eos(pieces)))

    def render_text(
        self, messages: Messages, tools: Sequence[Any] | None = None, *, add_generation_prompt: bool = False
    ) -> str:
        """The conversation as the template writes it, with `prompt` up to where the next answer begins."""
        written = self._apply_template(messages, tools, add_generation_prompt=add_generation_prompt)
        return written.replace(_ANSWER_BEGIN, "").replace(_ANSWER_END, "") if self._has_generation_tags else written

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
        except Exception as error:  # a template is a program: it may raise anything
            raise DataError(
                f"the chat template refuses the conversation: {str(error) or type(error).__name__}",
                expected="a conversation such as the template was made for",
                hint="change the row, or give another template",
            ) from None

    def _pieces_from_tags(self, full_text: str, answer_count: int) -> list[tuple[str, int]]:
        """Pieces by the borders that the template itself has set."""
        first, *rest = full_text.split(_ANSWER_BEGIN)
        if len(rest) != answer_count:
            raise DataError(
                f"the chat template marks {len(rest)} spans for {answer_count} answers",
                expected="{% generation %} around each answer, and around nothing else",
            )
        pieces = [(first, CONTEXT)]
        for number, part in enumerate(rest, 1):
            span, _, after = part.partition(_ANSWER_END)
            trained = self.answers == "all" or number == answer_count
            pieces += [(span, ANSWER if trained else CONTEXT), (after, CONTEXT)]
        return pieces

    def _pieces_from_prefixes(
        self, messages: Messages, tools: Sequence[Any] | None, trained_messages: Sequence[int]
    ) -> list[tuple[str, int]]:
        """Pieces by the text before each answer and the text that ends with it."""
        whole = self.render_text(messages, tools)
        pieces: list[tuple[str, int]] = []
        at = 0
        for number in trained_messages:
            before = self.render_text(messages[:number], tools, add_generation_prompt=True)
            after = whole if number + 1 == len(messages) else self.render_text(messages[: number + 1], tools)
            if not (after.startswith(before) and whole.startswith(after) and len(before) >= at):
                raise self._hidden_answer_error(before if not after.startswith(before) else after, whole, number)
            if not after[len(before) :].strip():
                raise DataError(
                    f"the chat template leaves out the answer (message {number + 1})",
                    expected="a template that writes every answer",
                )
            pieces += [(whole[at : len(before)], CONTEXT), (whole[len(before) : len(after)], ANSWER)]
            at = len(after)
        return pieces

    def _hidden_answer_error(self, part: str, full_text: str, number: int) -> DataError:
        both = zip(part, full_text, strict=False)
        same = next((at for at, (one, other) in enumerate(both) if one != other), min(len(part), len(full_text)))
        way_out = "a template with {% generation %} around its answers, or the plain one"
        if self.answers == "all":
            way_out = f"train only the last answer of each conversation, or give {way_out}"
        return DataError(
            f"in the chat template the text before or up to message {number + 1} is not how the whole begins: "
            f"{part[max(0, same - 20) : same + 20]!r} against {full_text[max(0, same - 20) : same + 20]!r}",
            expected="a template that only adds to the text as the conversation grows",
            hint=way_out,
        )

    def _trim_after_eos(self, pieces: list[tuple[str, int]]) -> list[tuple[str, int]]:
        """White space behind an answer's EOS is not trained; at the end it goes, for there the EOS ends the document."""
        eos = self.special_tokens.get("eos_token")
        if not eos:
            return [(text, mark) for text, mark in pieces if text]
        out: list[tuple[str, int]] = []
        for text, mark in pieces:
            answer, met, tail = text.rpartition(eos)
            out += [(answer + met, mark), (tail, CONTEXT)] if met and not tail.strip() else [(text, mark)]
        out = [(text, mark) for text, mark in out if text]
        if "".join(text for text, _ in out).rstrip().endswith(eos):
            while not out[-1][0].strip():
                out.pop()
        return out


def compile_template(template: str, today: datetime.date) -> jinja2.Template:
    """A chat template as `transformers` runs it: sandboxed, blocks trimmed, with the functions that templates use."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationExtension, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    functions = {"raise_exception": _raise_exception, "strftime_now": today.strftime}
    try:
        return environment.from_string(template, globals=functions)
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(
            f"the chat template is broken: {error.message}",
            where=f"tokenizer, chat template, line {error.lineno}",
            expected="a Jinja template",
        ) from None


class _GenerationExtension(Extension):
    """`{% generation %}` ... `{% endgeneration %}`: around what the model is to say."""

    tags = {"generation"}  # noqa: RUF012 (what jinja2 declares)

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
    """As JSON with its letters as they are: jinja2's own escapes them for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
