"""Nothing of a conversation is dropped in silence: each key is rendered, obeyed, or counted by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from postgrad.data.read import columnar_files
from postgrad.data.read.documents import read_documents, read_examples, read_labels
from postgrad.data.read.examples import Example, SkippedRow, make_example
from postgrad.data.read.files import RawSource
from postgrad.data.render import chat as chat_module
from postgrad.data.render.chat import PLAIN_TEMPLATE, ChatRenderer
from postgrad.data.render.renderers import PlainRenderer, TagRenderer
from postgrad.errors import DataError

SPECIAL = {"bos_token": "<s>", "eos_token": "<|end|>"}
TURN = "{{ '<' + m.role + '>' + CONTENT }}CALLS{{ '<|end|>\n' }}"


def template(content: str, *, call: str = "", head: str = "", turn: str = TURN) -> str:
    """A template of turns, with `content` and, for each `call`."""
    calls = f"{{% for c in m.tool_calls or [] %}}{call}{{% endfor %}}" if call else ""
    body = turn.replace("CONTENT", content).replace("CALLS", calls)
    return (
        f"{head}{{% for m in messages %}}{body}{{% endfor %}}{{% if add_generation_prompt %}}<assistant>{{% endif %}}"
    )


PLAIN = template("m.content")
PARTS = "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
ITEMS = "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}"
TEMPLATES = {
    "plain": PLAIN,
    "thinking": template("('[' + m.thinking + ']' if m.thinking else '') + m.content"),
    "reasoning_content": template("('[' + m.reasoning_content + ']' if m.reasoning_content else '') + m.content"),
    "tools as JSON": template("m.content", call="{{ c.function | tojson }}", head="{{ tools | tojson }}\n"),
    "arguments as JSON": template("m.content", call="{{ c.function.arguments | tojson }}"),
    "arguments item by item": template("m.content", call=ITEMS),
    "arguments as text or objects": template(
        "m.content", call="{% set a = c.function.arguments %}{{ a if a is string else a | tojson }}"
    ),
    "parts": template("", turn=f"<{{{{ m.role }}}}>{PARTS}<|end|>\n"),
    "developer": template(
        "m.content", turn="{{ raise_exception('no system') if m.role == 'system' }}" + TURN + "{# developer #}"
    ),
}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def calls(arguments: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "rain", "arguments": arguments}}]


TOOLS = [{"type": "function", "function": {"name": "rain", "parameters": {"type": "object"}}}]
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "system": {"messages": [{"role": "system", "content": "Be brief."}, user("2 + 2?"), assistant("4.")]},
    "developer": {"messages": [{"role": "developer", "content": "Be brief."}, user("2 + 2?"), assistant("4.")]},
    "turns": {"messages": [user("2 + 2?"), assistant("4."), user("So?"), assistant('It is "4".')]},
    "reasoning": {"messages": [user("2 + 2?"), assistant("4.", reasoning="Count on.")]},
    "calls": {"messages": [user("Rain?"), assistant("", tool_calls=calls({"city": "Oslo"})),
                           {"role": "tool", "content": "yes"}, assistant("It rains.")], "tools": TOOLS},
}  # fmt: skip


def chat(row: dict[str, Any]) -> Example:
    return make_example("chat", row, "f:1")


def marked(renderer: ChatRenderer, row: dict[str, Any]) -> str:
    """The text of a row, with its trained parts in brackets."""
    pieces = renderer.render(chat(row)).pieces
    return "".join(f"«{text}»" if mark else text for text, mark in pieces).replace("»«", "")


# --- what transformers renders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_is_rendered_as_transformers_renders_it(name: str, conversation: str) -> None:
    row, text = CONVERSATIONS[conversation], TEMPLATES[name]
    messages = row["messages"]
    if name == "parts":  # the form that such a template is written for
        messages = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    try:
        (expected,), _ = render_jinja_template([messages], tools=row.get("tools"), chat_template=text, **SPECIAL)
    except Exception:
        with pytest.raises(DataError, match="fails"):
            ChatRenderer(text, SPECIAL).render(chat(row))
        return
    if conversation == "developer" and name != "developer":
        expected = expected.replace("<developer>", "<system>")
    assert marked(ChatRenderer(text, SPECIAL), row).replace("«", "").replace("»", "") == expected.rstrip()


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("name", ["thinking", "reasoning_content"])
def test_reasoning_is_rendered_under_either_name(name: str, key: str) -> None:
    row = {"messages": [user("2 + 2?"), assistant("4.", **{key: "Count on."})]}
    assert marked(ChatRenderer(TEMPLATES[name], SPECIAL), row).endswith("«[Count on.]4.<|end|>»")
    assert not ChatRenderer(TEMPLATES[name], SPECIAL).render(chat(row)).omitted
    assert ChatRenderer(PLAIN, SPECIAL).render(chat(row)).omitted == ("the reasoning of a message",)
    assert "Count on." in chat(row).text  # rows of other reasoning are no copies


# --- named templates ---------------------------------------------------------------------------------------------------------


def test_rows_with_tools_take_the_template_for_them() -> None:
    renderer = ChatRenderer({"default": PLAIN, "tool_use": TEMPLATES["tools as JSON"], "rag": "{{ 1 }}"}, SPECIAL)
    assert marked(renderer, CONVERSATIONS["calls"]).startswith('[{"type": "function"')
    assert marked(renderer, CONVERSATIONS["system"]).startswith("<system>")
    assert renderer.fingerprint != ChatRenderer({"default": PLAIN}, SPECIAL).fingerprint
    only = ChatRenderer({"tool_use": TEMPLATES["tools as JSON"], "rag": PLAIN}, SPECIAL)
    assert marked(only, CONVERSATIONS["calls"])
    with pytest.raises(DataError, match=r"several chat templates \(tool_use, rag\) and no default one"):
        only.render(chat(CONVERSATIONS["system"]))
    with pytest.raises(DataError, match="no default one"):
        ChatRenderer({"rag": PLAIN}, SPECIAL).render(chat(CONVERSATIONS["calls"]))


# --- tool calls ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name.startswith(("tools", "arguments"))])
def test_arguments_as_text_are_rendered_as_objects_are(name: str) -> None:
    texts = [
        marked(
            ChatRenderer(TEMPLATES[name], SPECIAL),
            {"messages": [user("Rain?"), assistant("", tool_calls=calls(arguments))]},
        )
        for arguments in ({"city": "Oslo"}, '{"city": "Oslo"}')
    ]
    assert texts[0] == texts[1] and "Oslo" in texts[0] and "\\" not in texts[0]


def test_arguments_would_be_encoded_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: the form of the row is always taken."""
    monkeypatch.setattr(chat_module, "_is_whole", lambda *_: True)
    with pytest.raises(AssertionError):
        test_arguments_as_text_are_rendered_as_objects_are("arguments as JSON")


@pytest.mark.parametrize(
    "message",
    [
        {"from": "function_call", "value": '{"name": "rain", "arguments": {"city": "Oslo"}}'},
        {"from": "function_call", "value": '[{"name": "rain", "arguments": {"city": "Oslo"}}]'},
        {"role": "assistant", "content": None, "function_call": {"name": "rain", "arguments": '{"city": "Oslo"}'}},
        {"role": "assistant", "tool_calls": '[{"name": "rain", "arguments": {"city": "Oslo"}}]'},
        assistant("", tool_calls=calls({"city": "Oslo"})),
    ],
)
def test_a_call_is_a_call_in_each_of_its_forms(message: dict[str, Any]) -> None:
    row = {"conversations": [{"from": "human", "value": "Rain?"}, message]}
    renderer = ChatRenderer(TEMPLATES["arguments as JSON"], SPECIAL)
    written = {"messages": [user("Rain?"), assistant("", tool_calls=calls({"city": "Oslo"}))]}
    assert marked(renderer, row) == marked(renderer, written)


def test_a_call_that_is_none_has_a_place() -> None:
    for value in ("rain in Oslo", '"rain"'):
        with pytest.raises(DataError, match="`conversations` 2") as caught:
            chat({"conversations": [{"from": "human", "value": "?"}, {"from": "function_call", "value": value}]})
        assert caught.value.where == "f:1"


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_nulls_that_arrow_filled_in_are_not_rendered(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"messages": [user("Rain?"), assistant("", tool_calls=calls(arguments))],
         "tools": [{"function": {"name": "rain", "parameters": {"properties": properties}}}]}
        for arguments, properties in (
            ({"city": "Oslo"}, {"city": {"type": "string"}}),
            ({"a": 1, "b": {"c": 2}}, {"a": {"enum": [1]}}),
        )
    ]  # fmt: skip
    table = pa.Table.from_pylist(rows)
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        import pyarrow.parquet as pq

        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    renderer = ChatRenderer(TEMPLATES["tools as JSON"], SPECIAL)

    def texts(name: str) -> list[str]:
        source = RawSource("s", str(tmp_path / name))
        return ["".join(text for text, _ in renderer.render(example).pieces) for example, _ in read_examples(source)]

    assert texts(path.name) == texts("rows.jsonl")
    monkeypatch.setattr(columnar_files, "drop_filled_nulls", lambda value: value)  # the mutant
    assert "null" in "".join(texts(path.name))


# --- what is trained ----------------------------------------------------------------------------------------------------------

GENERATION = template("", turn="<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
                      "{% else %}{{ m.content }}{% endif %}END")  # fmt: skip


@pytest.mark.parametrize("name", ["prefixes", "generation"])
@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}])
def test_messages_that_are_not_to_be_trained_are_context(name: str, mark: dict[str, Any]) -> None:
    renderer = ChatRenderer(PLAIN if name == "prefixes" else GENERATION.replace("END", "<|end|>\n"), SPECIAL)
    row = {
        "messages": [
            user("a"),
            assistant("b", **mark),
            user("c"),
            assistant("d", weight=1),
            user("e"),
            assistant("f", **mark),
        ]
    }
    assert marked(renderer, row) == "<user>a<|end|>\n<assistant>b<|end|>\n<user>c<|end|>\n<assistant>«d<|end|>»"
    with pytest.raises(SkippedRow, match="no answer that is to be trained"):
        chat({"messages": [user("a"), assistant("b", **mark)]})
    with pytest.raises(DataError, match="expected: 0 or 1"):
        chat({"messages": [user("a"), assistant("b", weight=0.5)]})


@pytest.mark.parametrize(
    ("end", "after"),
    [("<|im_end|>\n", "<|im_end|>"), ("</s>", "</s>"), ("\n", ""), ("[END]{% if loop.last %}<|eot|>{% endif %}", "[END]"),
     ("<|e|>{{ '<|more|>' if not loop.last else '<|stop|>' }}", "<|e|>")],
)  # fmt: skip
def test_each_answer_is_trained_with_the_end_of_its_turn(end: str, after: str) -> None:
    row = {"messages": [user("one?"), assistant("first"), user("two?"), assistant("second")]}
    text = marked(ChatRenderer(GENERATION.replace("END", end), SPECIAL), row)
    assert text.count("«") == 2 and f"«first{after}»" in text and f"«second{after}»" in text


def test_ends_outside_of_the_marks_would_not_be_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: nothing follows an answer."""
    monkeypatch.setattr(chat_module, "takewhile", lambda *_: ())
    with pytest.raises(AssertionError):
        test_each_answer_is_trained_with_the_end_of_its_turn("<|im_end|>\n", "<|im_end|>")


def test_prompts_and_completions_of_messages_are_conversations(tmp_path: Path) -> None:
    rows = [
        {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")], "tools": TOOLS},
        {"prompt": [user("e")], "completion": [assistant("f"), user("g"), assistant("h")]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = (example for example, _ in read_examples(RawSource("s", str(tmp_path / "rows.jsonl"))))
    assert first.kind == "chat" and first.fields["context"] == (1,) and first.fields["tools"] == TOOLS
    renderer = ChatRenderer(PLAIN, SPECIAL)
    texts = ["".join(text for text, mark in renderer.render(each).pieces if mark) for each in (first, second)]
    assert texts == ["d<|end|>", "f<|end|>h<|end|>"]


# --- what is counted ----------------------------------------------------------------------------------------------------------


def test_what_a_template_leaves_out_is_named() -> None:
    blind = ChatRenderer(template("(m.content if m.role != 'system' else '')"), SPECIAL)
    assert blind.render(chat(CONVERSATIONS["system"])).omitted == ("the content of a message of the system",)
    told = ChatRenderer(PLAIN, SPECIAL).render(chat(CONVERSATIONS["calls"])).omitted
    assert told == ("`tool_calls` of a message", "`tools`")
    named = (
        ChatRenderer(PLAIN, SPECIAL).render(chat({"messages": [{**user("a"), "mood": "gay"}, assistant("b")]})).omitted
    )
    assert named == ("`mood` of a message",)
    whole = ChatRenderer(TEMPLATES["tools as JSON"], SPECIAL).render(chat(CONVERSATIONS["calls"])).omitted
    assert (
        not whole and not ChatRenderer(None, SPECIAL).render(chat(CONVERSATIONS["system"])).omitted and PLAIN_TEMPLATE
    )


def test_columns_that_nothing_reads_are_named_with_each_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "id": 1}\n{"text": "b"}\n{"text": "c", "id": 2, "url": "u"}\n')
    (tmp_path / "b.csv").write_text(",text,stars\n0,a,5\n")
    assert [d.unused for d in read_documents(RawSource("s", str(tmp_path / "a.jsonl")))] == [("id",), (), ("id", "url")]
    assert [d.unused for d in read_documents(RawSource("s", str(tmp_path / "b.csv")))] == [("(no name)", "stars")]


# --- labels that are none -----------------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: list[dict[str, Any]]) -> RawSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RawSource("s", str(path))


def test_a_label_of_minus_one_is_none_unless_it_has_a_word(tmp_path: Path) -> None:
    rows = [{"premise": "a", "hypothesis": "b", "label": label} for label in (0, 1, -1, 2, -1)]
    source = write_rows(tmp_path / "a.jsonl", rows)
    assert read_labels(source).names == (0, 1, 2)
    assert [d.skip_reason for d in read_documents(source)] == ["", "", "no label (-1)", "", "no label (-1)"]
    named = RawSource("s", source.path, no_label=None)
    assert read_labels(named).names == (-1, 0, 1, 2)
    (tmp_path / "b.csv").write_text("sentence,label\na,1\nb,-1\nc,0\n")
    assert read_labels(RawSource("s", str(tmp_path / "b.csv"))).names == (0, 1)
    numbers = write_rows(tmp_path / "c.jsonl", [{"sentence": "a", "label": label} for label in (0.5, -1.0)])
    assert not any(d.skip_reason for d in read_documents(numbers))


def test_a_tag_of_minus_a_hundred_is_none(tmp_path: Path) -> None:
    source = write_rows(
        tmp_path / "a.jsonl",
        [{"tokens": ["the", "cat", "sat"], "ner_tags": [-100, 3, 0]}, {"tokens": ["so"], "ner_tags": [-100]}],
    )
    labels = read_labels(source)
    assert labels.names == (0, 3)
    documents = list(read_documents(source))
    assert documents[1].skip_reason == "no tag"
    assert documents[0].example is not None
    rendered = TagRenderer(labels).render(documents[0].example)
    assert [mark for text, mark in rendered.pieces if text.strip()] == [0, 2, 1]
    assert rendered.omitted == ("words without a tag (-100)",)
    with pytest.raises(DataError, match=r"1 words without a tag \(-100\)"):
        PlainRenderer().render(documents[0].example)
