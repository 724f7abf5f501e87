"""Chat templates end: in their text, or in an error, within bounded time and memory."""

from __future__ import annotations

import datetime

import pytest

from postgrad.data.render import template_limits
from postgrad.data.render.chat import ChatRenderer, apply_chat_template, compile_template
from postgrad.data.render.template_limits import LimitedEnvironment
from postgrad.errors import DataError, ModelError, PostgradError

MESSAGES = [{"role": "user", "content": "one and two."}]
TODAY = datetime.date(2024, 7, 26)

ENDLESS = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "macros that call themselves twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}"
    "{% endmacro %}{{ m(60) }}",
    "a recursive loop": "{% for a in [[]] recursive %}{{ loop([[], []]) }}{{ loop([[], []]) }}{% endfor %}",
    "a text times a number": "{% set n = 10 ** 12 %}{{ 'a' * n }}",
    "a constant": "{{ 'a' * 1000000000000 }}",
    "a list times a number": "{% set x = [1] * 10000000000 %}",
    "a power": "{{ 9 ** 999999999 }}",
    "powers of powers": "{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "doubling by +": "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling by ~": "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling by blocks": "{% set ns = namespace(x='aa') %}{% for i in range(99) %}"
    "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "doubling by lists": "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "lists as JSON": "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% endfor %}{{ ns.x | tojson }}",
    "lists joined": "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% endfor %}{{ ns.x ~ 'a' }}",
    "a wide text": "{{ 'a'.ljust(10000000000) }}",
    "a filter that centres": "{{ 'a' | center(10000000000) }}",
    "a wide format": "{{ '%1000000000d' % 1 }}",
    "a wide format, another way": "{{ '{:>1000000000}'.format(1) }}",
    "a wide format by a filter": "{{ '%1000000000d' | format(1) }}",
    "a width from outside": "{{ '%*d' % (1000000000, 1) }}",
    "a replacement": "{% set x = 'a' * 100000 %}{{ x.replace('a', x) }}",
    "a filter that replaces": "{% set x = 'a' * 100000 %}{{ x | replace('a', x) }}",
    "a long separator": "{% set x = 'a' * 100000 %}{{ x | join(x) }}",
    "an indent of JSON": "{{ [1] | tojson(indent=10000000000) }}",
    "an output without end": "{% for a in range(99999) %}{{ 'a' * 10000 }}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_end_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.05)
    monkeypatch.setattr(template_limits, "MAX_SIZE", 1 << 20)
    with pytest.raises(PostgradError):
        apply_chat_template(ENDLESS[name], {}, MESSAGES, add_generation_prompt=True)


def test_without_the_limits_a_small_template_fills_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutants, with a doubling that stops at a harmless size."""
    monkeypatch.setattr(template_limits, "MAX_SIZE", 1 << 10)
    for name in ("doubling by +", "doubling by ~", "doubling by blocks"):
        template = ENDLESS[name].replace("range(99)", "range(14)") + "{{ ns.x | length }}"
        with pytest.raises(ModelError, match="more than 1,024 characters"):
            apply_chat_template(template, {}, MESSAGES, add_generation_prompt=True)
        with monkeypatch.context() as without:
            without.setattr(template_limits, "MAX_SIZE", 1 << 60)
            compile_template.cache_clear()
            assert apply_chat_template(template, {}, MESSAGES, add_generation_prompt=True).strip() == str(2**15)


@pytest.mark.parametrize(
    "template",
    ["{% if x %}" * 3000 + "{% endif %}" * 3000, "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% for %}", "a" * 2_000_000],
)  # fmt: skip
def test_a_template_that_cannot_be_compiled_is_an_error(template: str) -> None:
    with pytest.raises(ModelError):
        ChatRenderer(template, {})


def test_the_limits_change_no_rendering() -> None:
    """The same text as of jinja2's own sandbox, in the constructs that templates use."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    templates = [
        "{% for m in messages %}{{ m.role ~ ': ' ~ m['content'] | trim + '\n' }}{% endfor %}",
        "{% macro say(m) %}<{{ m.content.replace('one', 'two') }}>{% endmacro %}"
        "{% for m in messages %}{{ say(m) }}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages if m.role == 'user' %}{% set ns.n = ns.n + 1 %}"
        "{% endfor %}{{ ns.n }}",
        "{% set x %}{{ messages[0].content }}"
        "{% endset %}{{ x | upper }}{{ '%s and %d' % ('a', 3) }}{{ [1, 2] + [3] }}{{ 2 ** 5 }}",
        "{{ messages | map(attribute='role') | join(', ') }}{{ messages | length }}{{ undefined_name }}{{ none ~ 1.5 }}",
        "{{ '{} {}'.format('a', 'b') }}{{ 'a,b'.split(',') }}{{ {'a': [1, {'b': 2}]} }}{{ '-' * 20 }}",
    ]  # fmt: skip
    for template in templates:
        plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)
        assert compile_template(template, TODAY).render(messages=MESSAGES) == plain.render(messages=MESSAGES)
    assert isinstance(compile_template("a", TODAY).environment, LimitedEnvironment)


def test_a_row_with_an_endless_template_is_an_error_of_the_row() -> None:
    renderer = ChatRenderer(ENDLESS["a power"], {})
    with pytest.raises(DataError, match="the chat template fails"):
        renderer.render_text(MESSAGES)
