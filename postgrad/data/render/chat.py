"""Rendering of conversations with a chat template, and location of the answers in the text.

The tokenizer's own template is used (Jinja, as in `transformers`), so that training matches inference. The answers are
located in one of two ways:

- by the template's `{% generation %}` tags around them, and the end of the turn that follows each;
- by prefixes: the text up to an answer, with `add_generation_prompt`, must be a prefix of the text with the answer.

Templates expect messages in different forms: arguments of tool calls as objects or as text, contents as text or as parts. The
first form is taken whose text has all contents, and arguments that are not encoded twice. What the text then lacks is counted.

Base models have no template. `PLAIN_TEMPLATE` needs no new tokens and ends each answer with the EOS. A model trained with it
is saved with it (`plain_template`), so that inference matches training.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from typing import Any, Literal

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from postgrad.data.read.examples import REASONING_KEYS, Example
from postgrad.data.read.labels import Labels
from postgrad.data.render.renderer import RenderedExample
from postgrad.data.render.renderers import ANSWER, CONTEXT, PlainRenderer
from postgrad.data.render.template_limits import MAX_TEMPLATE, LimitedEnvironment
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


ChatTemplates = str | Mapping[str, str]
"""A chat template, or several by name: `default`, `tool_use` for rows with tools, and others."""


def custom_template(chat_template: ChatTemplates | None) -> ChatTemplates | None:
    """A tokenizer's own chat template or templates; None for the plain template, or for none."""
    is_plain = isinstance(chat_template, str) and chat_template.endswith(PLAIN_TEMPLATE)
    return None if is_plain or chat_template == {} else chat_template


_ANSWER_BEGIN, _ANSWER_END = "\ufdd0", "\ufdd1"
"""Noncharacters that mark the start and end of a `{% generation %}` block."""

_NAME = re.compile(r"\w+")
_TOKEN = re.compile(r"<[^<>\s]*>|\[[^\[\]\s]*\]|\s+|[^\s<\[]+|.", re.DOTALL)
"""Special tokens as templates write them, white space, and the text between them."""
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\b")

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ChatRenderer:
    """Renders conversations with a chat template; rows of one prompt and one answer become conversations of one turn.

    `special_tokens`: by their names in templates (`bos_token`, `eos_token`). `answers="last"` trains only the last answer of
    each conversation, which works with more templates. `today`: the date that templates see, fixed for reproducibility.
    `template`: one, several by name, or None for the plain one. Raises `ModelError` for an invalid template.
    """

    template: ChatTemplates | None
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
        _ = self._compiled_templates

    @cached_property
    def fingerprint(self) -> str:
        today = self.today.isoformat()
        template = dict(self.template) if isinstance(self.template, Mapping) else self.template or PLAIN_TEMPLATE
        parts = [template, dict(self.special_tokens), self.answers, self.turn_renderer.fingerprint, today]
        return hashlib.sha256(json.dumps(["chat", *parts], sort_keys=True).encode()).hexdigest()

    @cached_property
    def _compiled_templates(self) -> dict[str, jinja2.Template]:
        templates = self.template if isinstance(self.template, Mapping) else [self.template or PLAIN_TEMPLATE]
        texts = templates.values() if isinstance(templates, Mapping) else templates
        return {text: compile_template(text, self.today) for text in texts}

    def _choose_template(self, tools: Sequence[Any] | None) -> str:
        """The template for a row, as transformers chooses it. Raises `DataError` when there is none."""
        if not isinstance(self.template, Mapping):
            return self.template or PLAIN_TEMPLATE
        name = "tool_use" if tools and "tool_use" in self.template else "default"
        if name not in self.template:
            raise DataError(
                f"the tokenizer has several chat templates ({', '.join(self.template)}) and no default one for a row "
                f"{'with' if tools else 'without'} tools",
                expected="a chat template named `default`" + ("" if tools else ", or rows with tools"),
            )
        return self.template[name]

    def render(self, example: Example) -> RenderedExample:
        """The conversation with its answers marked. Raises `DataError` when they cannot be located."""
        if "messages" in example.fields:
            messages: Messages = example.messages
        else:
            prompt, _, answer = self.turn_renderer.render_turn(example)
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        tools = example.fields.get("tools")
        template = self._choose_template(tools)
        messages, full_text = self._choose_form(self._adapt_messages(messages, template), tools)
        context = example.fields.get("context", ())
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        trained = [i for i in answers if i not in context]
        trained = trained if self.answers == "all" else trained[-1:]
        if _has_generation_tags(template):
            if _ANSWER_BEGIN in example.text or _ANSWER_END in example.text:
                raise DataError("the noncharacters U+FDD0 or U+FDD1", expected="text without them")
            pieces = _pieces_from_tags(full_text, [i in trained for i in answers])
        else:
            pieces = self._pieces_from_prefixes(messages, tools, trained, full_text)
        omitted = _omitted_parts(messages, tools, template, full_text)
        return RenderedExample(tuple(self._trim_after_eos(pieces)), omitted=tuple(omitted))

    def render_text(
        self, messages: Messages, tools: Sequence[Any] | None = None, *, add_generation_prompt: bool = False
    ) -> str:
        """The rendered conversation, with `add_generation_prompt` up to the start of the next answer."""
        messages = self._adapt_messages(messages, self._choose_template(tools))
        messages, _ = self._choose_form(messages, tools)
        return _remove_tags(self._apply_template(messages, tools, add_generation_prompt=add_generation_prompt))

    def _adapt_messages(self, messages: Messages, template: str) -> Messages:
        """Reasoning under each of its names, as transformers fills them, and developers as the system if they are unknown."""
        has_developer = "developer" in template
        adapted: list[Mapping[str, Any]] = []
        for message in messages:
            reasoning = next((message[key] for key in REASONING_KEYS if message.get(key) is not None), None)
            if reasoning is not None:
                message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
            if message["role"] == "developer" and not has_developer:
                message = {**message, "role": "system"}
            adapted.append(message)
        return adapted

    def _choose_form(self, messages: Messages, tools: Sequence[Any] | None) -> tuple[Messages, str]:
        """The messages in a form that the template renders whole, or else as they are, and their text."""
        own: str | DataError | None = None
        for form in (messages, _decode_arguments(messages), _split_contents(messages)):
            if form is None:
                continue
            try:
                text: str | DataError = self._apply_template(form, tools)
            except DataError as error:
                text = error
            if isinstance(text, str) and _is_whole(messages, form, _remove_tags(text)):
                return form, text
            own = text if own is None else own
        if not isinstance(own, str):
            assert own is not None
            raise own
        return messages, own

    def _apply_template(
        self, messages: Messages, tools: Sequence[Any] | None, *, add_generation_prompt: bool = False
    ) -> str:
        try:
            template = self._compiled_templates[self._choose_template(tools)]
            assert isinstance(template.environment, LimitedEnvironment)
            template.environment.start()
            return template.render(
                messages=[dict(message) for message in messages],
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except DataError:
            raise
        except Exception as error:  # a template can raise anything
            raise DataError(
                f"the chat template fails on the conversation: {str(error) or type(error).__name__}",
                expected="a conversation that the template supports",
                hint="change the row, or use another template",
            ) from None

    def _pieces_from_prefixes(
        self, messages: Messages, tools: Sequence[Any] | None, trained: Sequence[int], full_text: str
    ) -> list[tuple[str, int]]:
        """Pieces of the text, split at the lengths of the renderings before and after each answer."""
        pieces: list[tuple[str, int]] = []
        end = 0
        for number in trained:
            before = self._apply_template(messages[:number], tools, add_generation_prompt=True)
            after = full_text if number + 1 == len(messages) else self._apply_template(messages[: number + 1], tools)
            if not (after.startswith(before) and full_text.startswith(after) and len(before) >= end):
                raise self._hidden_answer_error(before if not after.startswith(before) else after, full_text, number)
            if not after[len(before) :].strip():
                raise DataError(
                    f"the chat template omits the answer (message {number + 1})",
                    expected="a template that writes every answer",
                )
            pieces += [(full_text[end : len(before)], CONTEXT), (full_text[len(before) : len(after)], ANSWER)]
            end = len(after)
        return [*pieces, (full_text[end:], CONTEXT)]

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


def _has_generation_tags(template: str) -> bool:
    """Whether a template marks the answers itself."""
    return _GENERATION_TAG.search(template) is not None


def _remove_tags(text: str) -> str:
    return text.replace(_ANSWER_BEGIN, "").replace(_ANSWER_END, "")


def _pieces_from_tags(full_text: str, is_trained: Sequence[bool]) -> list[tuple[str, int]]:
    """Pieces of the text, split at the template's own marks; `is_trained`: for each answer.

    An answer has the end of its turn, also if the marks do not reach around it: what follows all answers alike, without
    white space at its end.
    """
    first, *rest = full_text.split(_ANSWER_BEGIN)
    if len(rest) != len(is_trained):
        raise DataError(
            f"the chat template marks {len(rest)} spans for {len(is_trained)} answers",
            expected="{% generation %} around each answer and nothing else",
        )
    parts = [(span, after) for span, _, after in (part.partition(_ANSWER_END) for part in rest)]
    following = zip(*(_TOKEN.findall(after) for _, after in parts), strict=False)
    end = "".join(tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, following)).rstrip()
    pieces = [(first, CONTEXT)]
    for (span, after), trained in zip(parts, is_trained, strict=True):
        pieces += [(span + end, ANSWER if trained else CONTEXT), (after[len(end) :], CONTEXT)]
    return pieces


# --- forms of messages --------------------------------------------------------------------------------


def _functions(messages: Messages) -> Iterator[Mapping[str, Any]]:
    """The functions of all tool calls."""
    for message in messages:
        for call in message.get("tool_calls") or []:
            function = call.get("function", call) if isinstance(call, Mapping) else {}
            if isinstance(function, Mapping):
                yield function


def _decode_arguments(messages: Messages) -> Messages | None:
    """The messages with arguments of tool calls as objects; None if they are already."""

    def decode(call: Any) -> Any:
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        arguments = function.get("arguments") if isinstance(function, Mapping) else None
        try:
            value = json.loads(arguments) if isinstance(arguments, str) else None
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            return call
        function = {**function, "arguments": value}
        return {**call, "function": function} if "function" in call else function

    decoded = [
        {**message, "tool_calls": list(map(decode, message["tool_calls"]))} if message.get("tool_calls") else message
        for message in messages
    ]
    return None if decoded == list(messages) else decoded


def _split_contents(messages: Messages) -> Messages:
    """The messages with their contents as lists of parts."""
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def _is_whole(messages: Messages, form: Messages, text: str) -> bool:
    """Whether a text has some content of the messages, is no printed list of parts, and encodes no arguments twice."""
    contents = [message["content"].strip() for message in messages if message["content"].strip()]
    arguments = [function.get("arguments") for function in _functions(form)]
    is_twice = any(isinstance(each, str) and json.dumps(each, ensure_ascii=False) in text for each in arguments)
    is_printed = form is not messages and ("'type': 'text'" in text or '"type": "text"' in text)
    return not is_twice and not is_printed and (not contents or any(content in text for content in contents))


def _omitted_parts(messages: Messages, tools: Sequence[Any] | None, template: str, text: str) -> Iterator[str]:
    """What the rendered text leaves out: contents, and keys that the template does not name."""
    text = _remove_tags(text)
    words = set(_NAME.findall(template))
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            content = content[0]["text"]
        if content.strip() not in text and json.dumps(content, ensure_ascii=False)[1:-1] not in text:
            yield f"the content of a message of the {message['role']}"
        for key in message.keys() - {"role", "content"} - words:
            if key not in REASONING_KEYS:
                yield f"`{key}` of a message"
        if not words.intersection(REASONING_KEYS) and any(map(message.get, REASONING_KEYS)):
            yield "the reasoning of a message"
    if tools and "tools" not in words:
        yield "`tools`"


def apply_chat_template(
    chat_template: ChatTemplates, special_tokens: Mapping[str, Any], messages: Messages, *, add_generation_prompt: bool
) -> str:
    """A conversation as `transformers` renders it today, within the limits of `template_limits`.

    Raises `ModelError` for a template that fails.
    """
    special = {name: token for name, token in special_tokens.items() if isinstance(token, str)}
    renderer = ChatRenderer(chat_template, special, today=datetime.date.today())
    try:
        return renderer.render_text(messages, add_generation_prompt=add_generation_prompt)
    except DataError as error:
        raise ModelError(error.problem, where="MODEL", expected="a template that renders a question") from None


@functools.lru_cache(maxsize=8)
def compile_template(template: str, today: datetime.date) -> jinja2.Template:
    """Compile a chat template as `transformers` does: sandboxed, with trimmed blocks and the usual functions."""
    where = "tokenizer, chat template"
    if len(template) > MAX_TEMPLATE:
        raise ModelError(
            f"a chat template of {len(template):,} characters", where=where, expected=f"at most {MAX_TEMPLATE:,}"
        )
    environment = LimitedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationExtension, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = environment.limit(_to_json)
    functions = {"raise_exception": _raise_exception, "strftime_now": today.strftime}
    try:
        return environment.from_string(template, globals=functions)
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(
            f"invalid chat template: {error.message}",
            where=f"{where}, line {error.lineno}",
            expected="a Jinja template",
        ) from None
    except Exception as error:  # of Python's own compiler, for one that is nested too deeply
        raise ModelError(
            f"invalid chat template: {str(error)[:200] or type(error).__name__}",
            where=where,
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
