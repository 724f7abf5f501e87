"""What can a row be besides running text?

A conversation, an instruction, a prompt and its completion, a pair of texts, a text with its label, words with their
tags, a question about a text, or one with choices. Each becomes an `Example`: its kind and its fields, checked. What
kind a row has follows from its columns (`LAYOUTS`). A row that is broken is an error with its place; a row that is whole
and yet teaches nothing (an empty answer, no label) is `Skipped` for a reason that can be counted.

How an example becomes text is not decided here: that is a `Renderer`, a value that is passed to whoever tokenises.
"""

from __future__ import annotations

import json
import math
import re
import string
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import Any, NamedTuple

from postgrad.errors import DataError, suggest_nearest

# --- what the columns say -----------------------------------------------------------------------------


class ColumnLayout(NamedTuple):
    """Columns by which rows of a kind are known: all of `required`, and what may stand beside them."""

    kind: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def roles(self) -> tuple[str, ...]:
        return self.required + self.optional


TEXT_PAIR_COLUMNS = (
    ("text_a", "text_b"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
)
"""Names under which the two texts of a labelled pair come."""

SUMMARY_COLUMNS = (("document", "summary"), ("article", "highlights"), ("dialogue", "summary"), ("text", "summary"))
"""Names under which a text and its summary come."""

COLUMN_LAYOUTS = (
    ColumnLayout("text", ("text",)),
    ColumnLayout("input_ids", ("input_ids",)),
    ColumnLayout("chat", ("messages",), ("system", "tools")),
    ColumnLayout("chat", ("conversations",), ("system", "tools")),
    ColumnLayout("instruction", ("instruction", "output"), ("input", "system", "history", "references")),
    ColumnLayout("completion", ("prompt", "completion"), ("references",)),
    ColumnLayout("pair", ("source", "target"), ("references",)),
    *(ColumnLayout("pair", names, ("references",)) for names in SUMMARY_COLUMNS),
    ColumnLayout("pair", ("translation",)),
    ColumnLayout("choices", ("question", "choices", "answer")),
    ColumnLayout("choices", ("question", "choices", "answerKey")),
    *(ColumnLayout("question", ("question", "context", answers)) for answers in ("answers", "answer")),
    *(ColumnLayout("tagged", ("tokens", tags)) for tags in ("tags", "ner_tags", "labels")),
    *(
        ColumnLayout("labelled", (*texts, label))
        for texts in (*TEXT_PAIR_COLUMNS, ("text",), ("sentence",))
        for label in ("label", "labels")
    ),
)
"""The first that fits decides. So rows with `text` and `label` are running text, unless the label is asked for."""

KINDS = tuple(dict.fromkeys(layout.kind for layout in COLUMN_LAYOUTS))
RUNNING_TEXT_KINDS = ("text", "input_ids")
"""The kinds that are no examples."""
COLUMN_ROLES = tuple(dict.fromkeys(chain.from_iterable(layout.roles for layout in COLUMN_LAYOUTS)))
"""What a column can be."""


@dataclass(frozen=True)
class Columns:
    """The kind of some rows, the column of each role, and the columns that every row must have."""

    kind: str
    by_role: Mapping[str, str]
    required: tuple[str, ...]


def detect_columns(names: Collection[str], renames: Mapping[str, str], kind: str = "auto") -> Columns | None:
    """The kind that rows with columns `names` have, `renamed` (role to column) being given; None if it is none."""
    for layout in COLUMN_LAYOUTS:
        if kind not in ("auto", layout.kind) or not renames.keys() <= set(layout.roles):
            continue
        by_role = {role: renames.get(role, role) for role in layout.roles}
        if all(has_column(names, by_role[role]) for role in {*layout.required, *renames}):
            return Columns(layout.kind, by_role, tuple(by_role[role] for role in layout.required))
    return None


def has_column(names: Collection[str], column: str) -> bool:
    """Whether rows with columns `names` have one; `translation.en` is what the object in `translation` has under `en`."""
    return column in names or ("." in column and column.partition(".")[0] in names)


def get_column(values: Mapping[str, Any], column: str, location: str) -> Any:
    """What a row has in a column, or inside of one; None where there is nothing.

    Raises `DataError` with `place` when there is no such thing inside of a column.
    """
    head, dot, rest = column.partition(".")
    if column in values or not dot:
        return values.get(column)
    inner = values.get(head)
    if inner is None:
        return None
    if not isinstance(inner, Mapping):
        raise DataError(f"`{head}` is {describe_value(inner)}", where=location, expected=f"an object that has `{rest}`")
    if not has_column(inner.keys(), rest):
        names = list(map(str, inner))
        raise DataError(
            f"there is no `{rest}` in `{head}`",
            where=location,
            expected=" or ".join(f"`{name}`" for name in names[:12]) or "an object that is not empty",
            hint=suggest_nearest(rest, names),
        )
    return get_column(inner, rest, location)


# --- examples -----------------------------------------------------------------------------------------

Label = str | int | float


@dataclass(frozen=True)
class Example:
    """A row that has parts. `fields` holds by kind (all strings, if nothing else is said):

    - chat: `messages`, each a mapping with `role`, `content` and whatever else a template reads; `tools`, a list
    - instruction: `instruction`, `input`, `output`, and the `messages` of the same conversation
    - completion: `prompt`, `completion`
    - pair: `source`, `target`, and the same under the names that the row has for them
    - question: `question`, `context`, `answer`
    - labelled: one or two texts under their own names, and `label`, or `labels`, a tuple
    - tagged: `tokens` and `tags`, tuples of one length
    - choices: `question`, `choices`, a tuple, and `answer`, an index

    Instructions, completions, pairs and questions may have `references`, a tuple: other answers that are as good. They are
    not trained.
    `text` is all its words without its labels: by it copies are recognised and the held-out part is drawn.
    """

    kind: str
    fields: Mapping[str, Any]
    text: str

    @property
    def messages(self) -> tuple[Mapping[str, Any], ...]:
        """The conversation of a chat or an instruction."""
        return self.fields["messages"]

    @property
    def texts(self) -> dict[str, str]:
        """The one or two texts of a labelled row, by name."""
        return {name: value for name, value in self.fields.items() if name not in ("label", "labels")}


class SkippedRow(Exception):
    """A whole row that teaches nothing; its argument is the reason under which it is counted."""


def make_example(kind: str, values: Mapping[str, Any], location: str) -> Example:
    """The example that a row of `kind` is; `values` are by role.

    Raises `DataError` with `place` for what cannot be, and `Skipped` for a row from which nothing can be learnt.
    """
    fields, texts = _PARSERS[kind](values, location)
    text = "\n".join(texts)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the row holds half a surrogate pair ({error.object[error.start]!a})",
            where=location,
            expected="text that can be written as UTF-8",
        ) from None
    return Example(kind, MappingProxyType(fields), text)


_ParsedFields = tuple[dict[str, Any], list[str]]


def _completion(values: Mapping[str, Any], location: str) -> _ParsedFields:
    prompt, completion = (_string(values, role, location) for role in ("prompt", "completion"))
    _require_text(completion, "empty answer")
    return {"prompt": prompt, "completion": completion, **_references(values, location)}, [prompt, completion]


def _references(values: Mapping[str, Any], location: str) -> dict[str, tuple[str, ...]]:
    """Other answers that are as good, given as a text or as a list of texts; nothing when there are none."""
    given = values.get("references")
    texts = [given] if isinstance(given, str) else _list(given or [], "references", location)
    for text in texts:
        if not isinstance(text, str):
            raise DataError(f"`references` holds {describe_value(text)}", where=location, expected="texts")
    kept = tuple(text for text in texts if text.strip())
    return {"references": kept} if kept else {}


def _pair(values: Mapping[str, Any], location: str) -> _ParsedFields:
    if "translation" in values:
        values = _translation(values["translation"], location)
    texts = {role: _string(values, role, location) for role in values if role != "references"}
    source, target = texts.values()
    _require_text(source, "empty source")
    _require_text(target, "empty answer")
    return {"source": source, "target": target, **texts, **_references(values, location)}, [source, target]


def _translation(value: Any, location: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or len(value) != 2:
        raise DataError(
            f"`translation` is {describe_value(value)}"
            + (f" with {len(value)} languages" if isinstance(value, Mapping) else ""),
            where=location,
            expected='a text in two languages, {"en": ..., "de": ...}, the source first',
            hint="name them with columns: {source: translation.en, target: translation.de}",
        )
    return value


def _labelled(values: Mapping[str, Any], location: str) -> _ParsedFields:
    fields: dict[str, Any] = {}
    for role in values:
        if role not in ("label", "labels"):
            fields[role] = _string(values, role, location)
            _require_text(fields[role], "empty text")
    texts = list(fields.values())
    if "labels" in values:
        labels = values["labels"]
        if labels is None:
            raise SkippedRow("no label")
        fields["labels"] = tuple(_name(item, "labels", location) for item in _list(labels, "labels", location))
    else:
        fields["label"] = _label(values["label"], location)
    return fields, texts


def _tagged(values: Mapping[str, Any], location: str) -> _ParsedFields:
    role = next(role for role in values if role != "tokens")
    words = [_word(item, location) for item in _list(values["tokens"] or [], "tokens", location)]
    tags = [_name(item, role, location) for item in _list(values[role] or [], role, location)]
    if len(words) != len(tags):
        raise DataError(
            f"{len(words):,} words in `tokens` and {len(tags):,} tags in `{role}`",
            where=location,
            expected="one tag for each word",
        )
    if not any(word.strip() for word in words):
        raise SkippedRow("no words")
    return {"tokens": tuple(words), "tags": tuple(tags)}, [" ".join(words)]


# --- conversations ------------------------------------------------------------------------------------

_CHAT_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}


def _chat(values: Mapping[str, Any], location: str) -> _ParsedFields:
    column = "messages" if "messages" in values else "conversations"
    given = _list(values[column] or [], column, location)
    messages = [_message(item, f"`{column}` {number}", location) for number, item in enumerate(given, 1)]
    system = _string(values, "system", location)
    if system.strip() and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": system})
    # What stands behind the last answer can teach nothing: no answer follows from it.
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise SkippedRow("no answer")
    if next(message["role"] for message in messages if message["role"] != "system") == "assistant":
        raise SkippedRow("an answer before any question")
    for message in messages:
        if message["role"] == "assistant" and not message.get("tool_calls"):
            _require_text(message["content"], "empty answer")
    fields: dict[str, Any] = {"messages": tuple(messages)}
    if tools := _tools(values.get("tools"), location):
        fields["tools"] = tools
    return fields, [_message_text(message) for message in messages]


def _message(value: Any, name: str, location: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(f"{name} is {describe_value(value)}", where=location, expected='{"role": ..., "content": ...}')
    given = {key: item for key, item in value.items() if item is not None}  # Parquet fills in what is not there
    role = given.pop("role", given.pop("from", None))
    content = given.pop("content", given.pop("value", ""))
    if not isinstance(role, str):
        raise DataError(f"{name} has no role", where=location, expected='{"role": ..., "content": ...}')
    if role not in _CHAT_ROLES:
        raise DataError(
            f"{name} has the role '{role[:40]}'",
            where=location,
            expected="system, user, assistant or tool; in ShareGPT's words system, human, gpt or observation",
            hint=suggest_nearest(role, _CHAT_ROLES),
        )
    if isinstance(content, list):
        content = "".join(_content_text(part, name, location) for part in content)
    if not isinstance(content, str):
        raise DataError(f"{name} has {describe_value(content)} for its content", where=location, expected="text")
    return {"role": _CHAT_ROLES[role], "content": content, **given}


def _content_text(part: Any, name: str, location: str) -> str:
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise DataError(
        f"{name} has content that is not text", where=location, expected='parts {"type": "text", "text": ...}'
    )


def _tools(value: Any, location: str) -> list[Any]:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise DataError("`tools` is no JSON", where=location, expected="a list of tools, or JSON of one") from None
    if not value:
        return []
    return _list(value, "tools", location)


def _message_text(message: Mapping[str, Any]) -> str:
    calls = message.get("tool_calls")
    return message["content"] + (json.dumps(calls, sort_keys=True, default=str) if calls else "")


def _instruction(values: Mapping[str, Any], location: str) -> _ParsedFields:
    instruction, given, output, system = (
        _string(values, role, location) for role in ("instruction", "input", "output", "system")
    )
    question = "\n\n".join(part for part in (instruction, given) if part.strip())
    _require_text(question, "empty instruction")
    _require_text(output, "empty answer")
    turns = [
        (_string(turn, 0, location), _string(turn, 1, location)) for turn in _history(values.get("history"), location)
    ]
    messages = [{"role": "system", "content": system}] if system.strip() else []
    for asked, answered in (*turns, (question, output)):
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    fields = {
        "instruction": instruction,
        "input": given,
        "output": output,
        "messages": tuple(messages),
        **_references(values, location),
    }
    return fields, [message["content"] for message in messages]


def _history(value: Any, location: str) -> list[dict[int, Any]]:
    turns = _list(value or [], "history", location)
    for turn in turns:
        if not isinstance(turn, list) or len(turn) != 2:
            raise DataError(
                f"`history` holds {describe_value(turn)}", where=location, expected="pairs of a question and an answer"
            )
    return [dict(enumerate(turn)) for turn in turns]


# --- questions ------------------------------------------------------------------------------------------


def _question(values: Mapping[str, Any], location: str) -> _ParsedFields:
    question, context = (_string(values, role, location) for role in ("question", "context"))
    _require_text(question, "empty question")
    role = "answers" if "answers" in values else "answer"
    found = _answers(values[role], role, location)
    if not found:
        raise SkippedRow("no answer")
    answers = tuple(dict.fromkeys(answer for answer in found if answer.strip()))
    if not answers:
        raise SkippedRow("empty answer")
    answer, *others = answers
    fields = {"question": question, "context": context, "answer": answer}
    return fields | ({"references": tuple(others)} if others else {}), [question, context, answer]


def _answers(value: Any, role: str, location: str) -> list[str]:
    """All answers that are right, given as a text, a list, or SQuAD's `{"text": [...], "answer_start": [...]}`."""
    if isinstance(value, Mapping):
        value, role = value.get("text"), f"{role}.text"
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    out: list[str] = []
    for item in _list(value, role, location):
        text = item.get("text") if isinstance(item, Mapping) else item
        if not isinstance(text, str):
            raise DataError(f"`{role}` holds {describe_value(text)}", where=location, expected="texts")
        out.append(text)
    return out


# --- questions with choices ---------------------------------------------------------------------------


def _choices(values: Mapping[str, Any], location: str) -> _ParsedFields:
    question = _string(values, "question", location)
    _require_text(question, "empty question")
    texts, names = _options(values["choices"], location)
    if not 2 <= len(texts) <= len(string.ascii_uppercase):
        raise DataError(f"{len(texts)} choices", where=location, expected=f"2 to {len(string.ascii_uppercase)}")
    role = "answer" if "answer" in values else "answerKey"
    answer = _answer(values[role], texts, names, location)
    return {"question": question, "choices": tuple(texts), "answer": answer}, [question, *texts]


def _options(value: Any, location: str) -> tuple[list[str], list[str]]:
    """The texts of the choices, and the names that the row gives them, if it gives any."""
    if isinstance(value, Mapping):
        texts, names = _list(value.get("text"), "choices.text", location), value.get("label")
    else:
        texts, names = _list(value, "choices", location), None
        if texts and all(isinstance(item, Mapping) for item in texts):
            names = [item.get("label") for item in texts]
            texts = [item.get("text") for item in texts]
    for text in texts:
        if not isinstance(text, str):
            raise DataError(f"`choices` holds {describe_value(text)}", where=location, expected="texts")
    if names is not None and (not isinstance(names, list) or len(names) != len(texts)):
        raise DataError("`choices` has other than one label for each text", where=location, expected="as many labels")
    return texts, [str(name) for name in names or []]


def _answer(value: Any, texts: list[str], names: list[str], location: str) -> int:
    """The index that an answer means, given as an index, a label, a letter or the text itself."""
    if value is None or value in ("", -1):
        raise SkippedRow("no answer")
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise DataError(
            f"the answer is {describe_value(value)}",
            where=location,
            expected="an index, a letter or one of the choices",
        )
    found: list[int]
    if isinstance(value, int):
        found = [value] if 0 <= value < len(texts) else []
    elif value in names:
        found = [names.index(value)]
    else:
        letters = string.ascii_uppercase[: len(texts)]
        found = [texts.index(value)] if value in texts else []
        found += [letters.index(value)] if len(value) == 1 and value in letters else []
        found += [int(value)] if re.fullmatch(r"\d{1,2}", value) and int(value) < len(texts) else []
    if len(set(found)) != 1:
        met = f"the answer {str(value)[:40]!r} is {'none' if not found else 'more than one'} of the choices"
        raise DataError(met, where=location, expected="an index from 0, a letter from A, or the text of one choice")
    return found[0]


# --- single values ------------------------------------------------------------------------------------


def describe_value(value: Any) -> str:
    """What a value is, in words."""
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return f"the number {value!r}"[:40]
        case str():
            return "text"
        case list():
            return "a list"
        case Mapping():
            return "an object"
    return f"a {type(value).__name__}"


def _string(values: Mapping[Any, Any], role: str | int, location: str) -> str:
    value = values.get(role)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"`{role}` is {describe_value(value)}", where=location, expected="text")
    return value


def _list(value: Any, role: str, location: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"`{role}` is {describe_value(value)}", where=location, expected="a list")
    return value


def _require_text(text: str, reason: str) -> None:
    if not text or text.isspace():
        raise SkippedRow(reason)


def _word(value: Any, location: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"`tokens` holds {describe_value(value)}", where=location, expected="a list of words")
    return value


def _name(value: Any, role: str, location: str) -> str | int:
    """A label that is a name: of a tag, or of one of several classes."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(
            f"`{role}` holds {describe_value(value)}", where=location, expected="a list of names or whole numbers"
        )
    return value


def _label(value: Any, location: str) -> Label:
    if value is None or value == "":
        raise SkippedRow("no label")
    if isinstance(value, bool):
        return int(value)
    if not isinstance(value, str | int | float):
        raise DataError(f"`label` is {describe_value(value)}", where=location, expected="a name or a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"`label` is {describe_value(value)}", where=location, expected="a number that is one")
    return value


_PARSERS: Mapping[str, Callable[[Mapping[str, Any], str], _ParsedFields]] = MappingProxyType(
    {
        "chat": _chat,
        "instruction": _instruction,
        "completion": _completion,
        "pair": _pair,
        "labelled": _labelled,
        "tagged": _tagged,
        "question": _question,
        "choices": _choices,
    }
)
