"""A spread of chat templates by conversations: what transformers renders is rendered equal, or refused with its cause."""

from __future__ import annotations

import datetime
from collections import Counter
from typing import Any

import pytest

from postgrad.data.read.examples import Example, make_example
from postgrad.data.render import chat
from postgrad.data.render.chat import ChatRenderer
from postgrad.errors import DataError
from tests.conftest import make_tokenizer

EOS = "<|end|>"
SPECIAL = {"bos_token": "<|begin|>", "eos_token": EOS}


def today() -> datetime.date:
    """What transformers takes as the date; asked for each time, since a run of the tests may pass midnight."""
    return datetime.datetime.now(tz=datetime.timezone.utc).astimezone().date()  # noqa: UP017


_TURN = "{{ '<' ~ m.role ~ '>' ~ m.content ~ eos_token ~ '\n' }}"
_PROMPT = "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"

TEMPLATES = {
    "default system": """
{%- if messages[0]['role'] != 'system' %}{{ '<system>be brief' + eos_token + '\n' }}{% endif %}
{%- for m in messages %}
{{- '<' + m['role'] + '>' + m['content'] + eos_token + '\n' }}
{%- endfor %}"""
    + _PROMPT,
    "date": "{% set ns = namespace(first=true) %}{% for m in messages %}"
    "{% if ns.first %}{{ bos_token ~ 'Today is ' ~ strftime_now('%d %b %Y') ~ '\n' }}{% set ns.first = false %}{% endif %}"
    + _TURN
    + "{% endfor %}"
    + _PROMPT,
    "strict roles": """
{{- bos_token }}
{%- set rest = messages %}
{%- set system = '' %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim + '\n\n' %}
    {%- set rest = messages[1:] %}
{%- endif %}
{%- for m in rest %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('turns must alternate between user and assistant') }}
    {%- endif %}
    {%- if m.role == 'user' %}
        {{- '[Q] ' + (system if loop.first else '') + m.content.strip() + ' [/Q]' }}
    {%- else %}
        {{- ' ' + m.content.strip() + eos_token }}
    {%- endif %}
{%- endfor %}""",
    "reasoning": """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {{- '<' + m.role + '>' }}
    {%- if m.role == 'assistant' %}
        {%- set thought = m.reasoning_content if m.reasoning_content is string else '' %}
        {%- if loop.index0 > ns.last and thought %}{{ '<think>\n' + thought.strip('\n') + '\n</think>\n' }}{% endif %}
    {%- endif %}
    {{- m.content.split('</think>')[-1].lstrip('\n') + eos_token + '\n' }}
{%- endfor %}"""
    + _PROMPT,
    "generation": """
{%- for m in messages %}
    {{- '<' + m.role + '>' }}
    {%- if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}
    {%- else %}{{ m.content + eos_token }}{% endif %}
    {{- '\n' }}
{%- endfor %}"""
    + _PROMPT,
    "tools": """
{%- if tools %}{{ '# Tools\n' }}{% for tool in tools %}{{ tool | tojson(indent=4) + '\n' }}{% endfor %}{% endif %}
{%- for m in messages %}
    {%- if m.role == 'tool' %}{{ '<user>[result] ' + m.content + eos_token + '\n' }}
    {%- else %}
        {{- '<' + m.role + '>' + m.content }}
        {%- for call in m.tool_calls or [] %}
            {{- '\n{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson + '}' }}
        {%- endfor %}
        {{- eos_token + '\n' }}
    {%- endif %}
{%- endfor %}"""
    + _PROMPT,
    "arguments by key": """
{%- for m in messages %}
    {{- '<' + m.role + '>' + m.content }}
    {%- if m.tool_calls is defined and m.tool_calls %}
        {%- for call in m.tool_calls %}
            {{- '<call ' + call.function.name + '>' }}
            {%- for key, value in call.function.arguments | items %}
                {{- '<' + key + '>' + (value if value is string else value | tojson) + '</' + key + '>' }}
            {%- endfor %}
        {%- endfor %}
    {%- endif %}
    {{- eos_token }}
{%- endfor %}"""
    + _PROMPT,
    "macro": """
{%- macro turn(role, text) %}{{ '(' ~ role | capitalize ~ ') ' ~ text | trim ~ eos_token }}{% endmacro %}
{%- for m in messages %}{{ turn(m.role, m.content) }}{{ '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '(Assistant) ' }}{% endif %}""",
    "loop controls": """
{%- for m in messages %}
    {%- if m.role == 'tool' %}{% continue %}{% endif %}
    {%- if loop.index > 12 %}{% break %}{% endif %}
    {{- '<' + m.role + '>' + m.content + eos_token }}
{%- endfor %}"""
    + _PROMPT,
    "filters": """
{%- set systems = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | list %}
{%- if systems %}{{ systems | join('; ') | replace('\n', ' ') ~ '\n' }}{% endif %}
{%- for m in messages | rejectattr('role', 'equalto', 'system') %}
    {{- {'user': 'U', 'assistant': 'A', 'tool': 'T'}.get(m.role, '?') ~ ': ' ~ m.content ~ eos_token ~ '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'A: ' }}{% endif %}""",
    "parts": """
{%- for m in messages %}
    {{- '<' + m.role + '>' }}
    {%- if m.content is string %}{{ m.content }}
    {%- else %}{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}{% endif %}
    {{- eos_token }}
{%- endfor %}"""
    + _PROMPT,
    "empty thought": """
{%- for m in messages %}
    {{- '<' + m.role + '>' }}
    {%- if m.role == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}
    {{- m.content + eos_token }}
{%- endfor %}"""
    + _PROMPT,
}

_TOOL = {"type": "function", "function": {"name": "größe", "parameters": {"type": "object", "properties": {"n": {}}}}}
_CALL = {"type": "function", "function": {"name": "größe", "arguments": {"n": 3, "unit": "<cm> & 'é'"}}}


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [said("user", "how far?"), said("assistant", "three miles")]},
    "system and turns": {
        "messages": [
            said("system", " be kind\n"), said("user", "hello "), said("assistant", "  good day"),
            said("user", "and now?"), said("assistant", "rest\n"),
        ]
    },
    "tools": {
        "tools": [_TOOL],
        "messages": [
            said("user", "how long?"), said("assistant", "let me see", tool_calls=[_CALL]), said("tool", "[3]"),
            said("assistant", "three"),
        ],
    },
    "reasoning": {
        "messages": [
            said("user", "two and two?"), said("assistant", "four", reasoning_content="count\ntwice"),
            said("user", "sure?"), said("assistant", "yes", reasoning_content="again"),
        ]
    },
    "odd text": {
        "messages": [
            said("user", "{{ 1 }} {% x %} <b>&amp;</b> 漢字 \u00e9"), said("user", "'\"\\n"),
            said("assistant", "{}\n\n- a\n- b"),
        ]
    },
}  # fmt: skip


def by_transformers(template: str, example: Example) -> str | None:
    """The text of transformers; None where the template refuses the conversation."""
    try:
        return make_tokenizer(bos=True).apply_chat_template(
            example.messages, tools=example.fields.get("tools"), chat_template=template, tokenize=False
        )  # type: ignore[return-value]
    except Exception:  # whatever a template raises
        return None


def compare(name: str, conversation: str) -> str:
    """`equal`, the cause of a refusal, or `different`."""
    example = make_example("chat", CONVERSATIONS[conversation], "f:1")
    renderer = ChatRenderer(TEMPLATES[name], SPECIAL, today=today())
    expected = by_transformers(TEMPLATES[name], example)
    try:
        text = renderer.render_text(example.messages, example.fields.get("tools"))
        pieces = "".join(piece for piece, _ in renderer.render(example).pieces)
    except DataError as error:
        assert error.expected
        return error.problem
    is_equal = expected is not None and text == expected and expected.startswith(pieces)
    return "equal" if is_equal and not expected[len(pieces) :].strip() else "different"


def test_every_template_renders_every_conversation_as_transformers_does() -> None:
    found = {(name, key): compare(name, key) for name in TEMPLATES for key in CONVERSATIONS}
    assert "different" not in found.values(), [pair for pair, how in found.items() if how == "different"]
    refused = {pair: how for pair, how in found.items() if how != "equal"}
    causes = Counter(pair[0] for pair in refused)
    # The template's own word, and answers that only the last turn shows, as in "hides" of any multi-turn row.
    assert causes == {"strict roles": 2, "empty thought": 3, "reasoning": 1}, refused
    assert all("turns must alternate" in refused["strict roles", key] for key in ("odd text", "tools"))
    assert "is not a prefix" in refused["empty thought", "system and turns"]


@pytest.mark.parametrize("name", ["date", "tools", "reasoning"])
def test_a_wrong_rendering_would_be_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutants: another day, keys in another order, and reasoning that is dropped."""
    if name == "date":
        monkeypatch.setitem(globals(), "today", lambda: datetime.date(2000, 1, 1))
    elif name == "tools":
        monkeypatch.setattr(chat, "_to_json", lambda value, **_: repr(value))
        chat.compile_template.cache_clear()
    else:
        monkeypatch.setattr(
            ChatRenderer,
            "_adapt_messages",
            lambda _, messages, __: [{key: m[key] for key in ("role", "content")} for m in messages],
        )
    found = {compare(name, key) for key in CONVERSATIONS}
    chat.compile_template.cache_clear()
    assert "different" in found
