"""Is a conversation written as its template says, and are the answers, all of them and nothing else, marked?"""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postgrad.data.read.examples import Example, make_example
from postgrad.data.render.chat import PLAIN_TEMPLATE, ChatRenderer
from postgrad.data.render.renderers import PlainRenderer
from postgrad.errors import DataError, ModelError
from tests.conftest import make_tokenizer

EOS = "<|end|>"
SPECIAL = {"bos_token": "<|begin|>", "eos_token": EOS}

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STRICT = """
{{- bos_token }}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + message.content | trim + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content | trim + eos_token }}
    {%- endif %}
{%- endfor %}"""
TOOLS = """
{%- if tools %}{{ tools | tojson(indent=2) }}{{ '\n' }}{% endif %}
{%- for message in messages %}
    {%- if loop.index0 > 20 %}{% break %}{% endif %}
    {{- '<' + message.role + '>' + message.content }}
    {%- for call in message.tool_calls or [] %}{{ call | tojson }}{% endfor %}
    {{- '</' + message.role + '>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""
GENERATION = """
{%- for message in messages %}
    {{- '<' + message.role + '>' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content + eos_token }}{% endgeneration %}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""
THINKING = """
{%- for message in messages %}
    {{- '<' + message.role + '>' }}
    {%- if message.role == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}
    {{- message.content + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""
TEMPLATES = {"chatml": CHATML, "strict": STRICT, "tools": TOOLS, "generation": GENERATION, "plain": PLAIN_TEMPLATE}


def turns(*contents: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


def chat(messages: list[dict[str, Any]], **more: Any) -> Example:
    return make_example("chat", {"messages": messages, **more}, "f:1")


def trained(renderer: ChatRenderer, example: Example) -> list[str]:
    """The runs of trained text."""
    runs = [("", 0)]
    for text, mark in renderer.render(example).pieces:
        runs = [*runs[:-1], (runs[-1][0] + text, mark)] if runs[-1][1] == mark else [*runs, (text, mark)]
    return [text for text, mark in runs if mark]


def whole(renderer: ChatRenderer, example: Example) -> str:
    return "".join(text for text, _ in renderer.render(example).pieces)


# --- the text -----------------------------------------------------------------------------------------

words = st.text(st.sampled_from("ab \n\"'<&>é日{}%"), min_size=1, max_size=8).filter(lambda text: text.strip())


@settings(max_examples=40)
@given(contents=st.lists(words, min_size=2, max_size=6).filter(lambda each: len(each) % 2 == 0), data=st.data())
def test_the_text_is_what_transformers_makes_of_it(contents: list[str], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(TEMPLATES)))
    tokenizer = make_tokenizer(bos=True)
    renderer = ChatRenderer(TEMPLATES[name], SPECIAL)
    tools = [{"type": "function", "function": {"name": "größer", "parameters": {"z": 1, "a": [2, None]}}}]
    for prompt, messages in ((True, turns(*contents)[:-1]), (False, turns(*contents))):
        if name == "tools":
            messages[-1]["tool_calls"] = [{"arguments": {"b": contents[0], "a": "<é>"}}]
        expected = tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=prompt
        )
        assert renderer.render_text(messages, tools, add_generation_prompt=prompt) == expected


def test_the_plain_template() -> None:
    renderer = ChatRenderer(None, SPECIAL)
    messages = [{"role": "system", "content": "be kind"}, *turns("q", "a", "r", "b")]
    assert renderer.render_text(messages) == (
        "### System:\nbe kind\n\n### User:\nq\n\n### Assistant:\na<|end|>\n\n### User:\nr\n\n### Assistant:\nb<|end|>"
    )
    assert (
        renderer.render_text(messages[:2], add_generation_prompt=True)
        == "### System:\nbe kind\n\n### User:\nq\n\n### Assistant:\n"
    )
    call = chat([*turns("q"), {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}])
    with pytest.raises(DataError, match="the plain template has no words for tool calls"):
        renderer.render(call)
    with pytest.raises(ModelError, match="no EOS token to end an answer with"):
        ChatRenderer(None, {"bos_token": "x"})


def test_the_date_is_not_todays() -> None:
    template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}|{{ m.content }}{% endfor %}"
    assert whole(ChatRenderer(template, SPECIAL), chat(turns("q", "a"))) == "26 Jul 2024|q|a"
    other = ChatRenderer(template, SPECIAL, today=datetime.date(2025, 1, 2))
    assert whole(other, chat(turns("q", "a"))) == "02 Jan 2025|q|a"
    assert other.fingerprint != ChatRenderer(template, SPECIAL).fingerprint


# --- the answers --------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(contents=st.lists(words, min_size=2, max_size=6).filter(lambda each: len(each) % 2 == 0), data=st.data())
def test_the_answers_with_their_ends_are_trained_and_nothing_else(contents: list[str], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["chatml", "strict", "generation", "plain"]))
    last = data.draw(st.booleans())
    renderer = ChatRenderer(TEMPLATES[name], SPECIAL, answers="last" if last else "all")
    example = chat(turns(*contents))
    answers = [content.strip() if name == "strict" else content for content in contents[1::2]]
    expected = [(" " if name == "strict" else "") + answer + EOS for answer in answers]
    assert trained(renderer, example) == (expected[-1:] if last else expected)
    text = renderer.render_text(example.messages)
    assert text.startswith(whole(renderer, example))
    assert not text[len(whole(renderer, example)) :].strip()
    assert whole(renderer, example).endswith(EOS)


@pytest.mark.parametrize("name", ["chatml", "generation", "plain"])
def test_all_answers_or_the_last(name: str) -> None:
    example = chat(turns("q", "a", "r", "b"))
    assert trained(ChatRenderer(TEMPLATES[name], SPECIAL), example) == [f"a{EOS}", f"b{EOS}"]
    assert trained(ChatRenderer(TEMPLATES[name], SPECIAL, answers="last"), example) == [f"b{EOS}"]


def test_without_an_eos_of_its_own_an_answer_ends_as_the_template_says() -> None:
    example = chat(turns("q", "a", "r", "b"))
    assert trained(ChatRenderer(TOOLS, SPECIAL), example) == ["a</assistant>\n", "b</assistant>\n"]
    assert trained(ChatRenderer(TOOLS, {}), example) == ["a</assistant>\n", "b</assistant>\n"]


def test_two_of_a_kind_in_a_row_are_for_the_template_to_judge() -> None:
    messages = [*turns("q", "a"), {"role": "assistant", "content": "b"}]
    assert trained(ChatRenderer(CHATML, SPECIAL), chat(messages)) == [f"a{EOS}", f"b{EOS}"]
    with pytest.raises(DataError, match="fails on the conversation: roles must alternate"):
        ChatRenderer(STRICT, SPECIAL).render(chat(messages))


def test_rows_of_one_answer_are_conversations_of_one_turn() -> None:
    pair = make_example("labelled", {"sentence": "fine", "label": 1}, "f:1")
    renderer = ChatRenderer(CHATML, SPECIAL, turn_renderer=PlainRenderer("Good? {sentence}", label_words={"1": "yes"}))
    assert whole(renderer, pair) == f"<|im_start|>user\nGood? fine{EOS}\n<|im_start|>assistant\nyes{EOS}"
    assert trained(renderer, pair) == [f"yes{EOS}"]
    row = make_example("instruction", {"instruction": "i", "output": "o", "system": "s"}, "f:1")
    assert whole(ChatRenderer(CHATML, SPECIAL), row).startswith(f"<|im_start|>system\ns{EOS}\n<|im_start|>user\ni{EOS}")


def test_a_template_that_hides_where_an_answer_begins_is_refused_with_a_way_out() -> None:
    example = chat(turns("q", "a", "r", "b"))
    with pytest.raises(DataError) as caught:
        ChatRenderer(THINKING, SPECIAL).render(example)
    assert "message 2 is not a prefix of the whole text" in str(caught.value)
    assert "train only the last answer" in caught.value.hint
    assert trained(ChatRenderer(THINKING, SPECIAL, answers="last"), example) == [f"<think></think>b{EOS}"]
    backwards = "{% for m in messages | reverse %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError) as caught:
        ChatRenderer(backwards, SPECIAL, answers="last").render(example)
    assert "generation" in caught.value.hint
    assert "last answer" not in caught.value.hint


def test_a_template_that_leaves_an_answer_out_is_refused() -> None:
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(DataError, match=r"omits the answer \(message 2\)"):
        ChatRenderer(template, SPECIAL).render(chat(turns("q", "a")))


def test_marks_of_the_template_go_around_each_answer() -> None:
    once = "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}x{% endgeneration %}"
    with pytest.raises(DataError, match="marks 1 spans for 2 answers"):
        ChatRenderer(once, SPECIAL).render(chat(turns("q", "a", "r", "b")))
    with pytest.raises(DataError, match=r"U\+FDD0"):
        ChatRenderer(GENERATION, SPECIAL).render(chat(turns("q\ufdd0", "a")))
    assert trained(ChatRenderer(CHATML, SPECIAL), chat(turns("q", "a\ufdd0"))) == [f"a\ufdd0{EOS}"]


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% for %}", "invalid chat template"),
        ("{{ 'a' }", "invalid chat template"),
        ("{% generation %}", "invalid chat template"),
    ],
)
def test_a_broken_template_is_a_model_error(template: str, told: str) -> None:
    with pytest.raises(ModelError, match=told):
        ChatRenderer(template, SPECIAL)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content + 1 }}",
        "{{ nothing.there }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception('no') }}",
    ],
)
def test_a_template_that_fails_or_reaches_out_is_an_error_of_the_row(template: str) -> None:
    with pytest.raises(DataError, match="the chat template fails on the conversation"):
        ChatRenderer(template, SPECIAL).render(chat(turns("q", "a")))


def test_what_changes_the_text_changes_the_fingerprint() -> None:
    renderers = [
        ChatRenderer(None, SPECIAL),
        ChatRenderer(CHATML, SPECIAL),
        ChatRenderer(CHATML, {"eos_token": EOS}),
        ChatRenderer(CHATML, SPECIAL, answers="last"),
        ChatRenderer(CHATML, SPECIAL, turn_renderer=PlainRenderer("{prompt}")),
    ]
    assert len({renderer.fingerprint for renderer in renderers}) == len(renderers)
    assert (
        ChatRenderer(None, SPECIAL).fingerprint
        == ChatRenderer(PLAIN_TEMPLATE, dict(reversed(SPECIAL.items()))).fingerprint
    )
