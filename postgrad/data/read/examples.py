"""Examples: rows with parts (a conversation, a prompt and its completion, a text with its label), parsed and checked.

A malformed row is a `DataError` with its location. A well-formed row without anything to learn (an empty answer, no label)
is a `SkippedRow`, counted by reason. Renderers (`data.render`) turn examples into text.
"""

from __future__ import annotations

import json
import math
import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from postgrad.data.read.columns import describe_value
from postgrad.data.read.row_kinds import RowKind
from postgrad.errors import DataError, suggest_nearest

Label = str | int | float

NO_LABEL = -1
"""The label of rows without one in published test sets."""
NO_TAG = -100
"""The tag of words without one, as torch's losses ignore it."""


@dataclass(frozen=True)
class Example:
    """A row with parts. `fields` by kind (strings unless noted):

    - chat: `messages`, each a mapping with `role`, `content` and any other key that a template reads; `tools`, a list;
      `context`, the indices of answers that are not trained
    - instruction: `instruction`, `input`, `output`, and the `messages` of the same conversation
    - completion: `prompt`, `completion`
    - pair: `source`, `target`, and the same under the row's own names
    - question: `question`, `context`, `answer`
    - labelled: one or two texts under their own names, and `label`, or `labels`, a tuple
    - tagged: `tokens` and `tags`, tuples of equal length; a tag of -100 is none
    - choices: `question`, `choices`, a tuple, and `answer`, an index

    Instructions, completions, pairs and questions may have `references`, a tuple of equally valid answers that are not
    trained. `text` is all text without the labels; duplicates and the held-out split go by it. `teacher_context`: text that
    only a teacher reads.
    """

    kind: RowKind
    fields: Mapping[str, Any]
    text: str
    teacher_context: str = ""

    @property
    def messages(self) -> tuple[Mapping[str, Any], ...]:
        """The conversation of a chat or an instruction."""
        return self.fields["messages"]

    @property
    def texts(self) -> dict[str, str]:
        """The one or two texts of a labelled row, by name."""
        return {name: value for name, value in self.fields.items() if name not in self.kind.label_fields}


class SkippedRow(Exception):
    """A well-formed row without anything to learn; its argument is the reason."""


def make_example(kind: str, values: Mapping[str, Any], location: str, *, no_label: int | None = NO_LABEL) -> Example:
    """Parse a row of `kind`; `values` are by role. `no_label`: the whole number that means that there is no label.

    Raises `DataError` for a malformed row, and `SkippedRow` for one without anything to learn.
    """
    kind = RowKind(kind)
    if (
        kind == RowKind.LABELLED
        and no_label is not None
        and type(values.get("label")) is int
        and values["label"] == no_label
    ):
        raise SkippedRow(f"no label ({no_label})")
    fields, texts = _PARSERS[kind](values, location)
    text = "\n".join(texts)
    check_encodable(text, "the row holds", location)
    return Example(kind, MappingProxyType(fields), text)


def check_encodable(text: str, subject: str, location: str) -> None:
    """Raise `DataError` for text with an unpaired surrogate, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{subject} half a surrogate pair ({error.object[error.start]!a}) at character {error.start + 1}",
            where=location,
            expected="text that can be encoded as UTF-8",
        ) from None


_ParsedFields = tuple[dict[str, Any], list[str]]
"""The fields of an example, and the texts that its `text` joins."""


def _parse_completion(values: Mapping[str, Any], location: str) -> _ParsedFields:
    prompt, completion = (_string(values, role, location) for role in ("prompt", "completion"))
    _require_text(completion, "empty answer")
    return {"prompt": prompt, "completion": completion, **_references(values, location)}, [prompt, completion]


def _references(values: Mapping[str, Any], location: str) -> dict[str, tuple[str, ...]]:
    """The field `references`, from a text or a list of texts; nothing when there are none."""
    value = values.get("references")
    texts = [value] if isinstance(value, str) else _strings(value or [], "references", location)
    references = tuple(text for text in texts if text.strip())
    return {"references": references} if references else {}


def _parse_pair(values: Mapping[str, Any], location: str) -> _ParsedFields:
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


def _parse_labelled(values: Mapping[str, Any], location: str) -> _ParsedFields:
    fields: dict[str, Any] = {}
    for role in values:
        if role not in RowKind.LABELLED.label_fields:
            fields[role] = _string(values, role, location)
            _require_text(fields[role], "empty text")
    texts = list(fields.values())
    if "labels" in values:
        labels = values["labels"]
        if labels is None:
            raise SkippedRow("no label")
        fields["labels"] = tuple(_class_name(item, "labels", location) for item in _list(labels, "labels", location))
    else:
        fields["label"] = _label(values["label"], location)
    return fields, texts


def _parse_tagged(values: Mapping[str, Any], location: str) -> _ParsedFields:
    role = next(role for role in values if role != "tokens")
    words = _strings(values["tokens"] or [], "tokens", location)
    tags = [_class_name(item, role, location) for item in _list(values[role] or [], role, location)]
    if len(words) != len(tags):
        raise DataError(
            f"{len(words):,} words in `tokens` and {len(tags):,} tags in `{role}`",
            where=location,
            expected="one tag for each word",
        )
    if not any(word.strip() for word in words):
        raise SkippedRow("no words")
    if all(tag == NO_TAG for tag in tags):
        raise SkippedRow("no tag")
    return {"tokens": tuple(words), "tags": tuple(tags)}, [" ".join(words)]


# --- conversations ------------------------------------------------------------------------------------

_CALL_ROLES = ("function_call", "tool_call")
_CHAT_ROLES = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", *_CALL_ROLES), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response"), "tool"),
}
SYSTEM_ROLES = ("system", "developer")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Names of a message's reasoning; the first one that a message has is its reasoning, as in transformers."""
_TRAIN_KEYS = ("weight", "train", "training")
"""Keys of a message that say whether it is trained."""


def _parse_chat(values: Mapping[str, Any], location: str) -> _ParsedFields:
    columns = (
        ("prompt", "completion") if "prompt" in values else ("messages" if "messages" in values else "conversations",)
    )
    messages: list[dict[str, Any]] = []
    is_trained: list[bool] = []
    for column in columns:
        for number, item in enumerate(_list(values[column] or [], column, location), 1):
            message = _message(item, f"`{column}` {number}", location)
            marks = [_is_trained(message.pop(key), key, location) for key in _TRAIN_KEYS if key in message]
            is_trained.append(message["role"] == "assistant" and column != "prompt" and all(marks))
            messages.append(message)
    system = _string(values, "system", location)
    if system.strip() and not (messages and messages[0]["role"] in SYSTEM_ROLES):
        messages.insert(0, {"role": "system", "content": system})
        is_trained.insert(0, False)
    has_answer = any(message["role"] == "assistant" for message in messages)
    # Messages after the last answer train nothing.
    while messages and not is_trained[len(messages) - 1]:
        messages.pop()
    if not messages:
        raise SkippedRow("no answer that is to be trained" if has_answer else "no answer")
    if next(message["role"] for message in messages if message["role"] not in SYSTEM_ROLES) == "assistant":
        raise SkippedRow("an answer before any question")
    for message, is_answer in zip(messages, is_trained, strict=False):
        if is_answer and not message.get("tool_calls"):
            _require_text(message["content"], "empty answer")
    fields: dict[str, Any] = {"messages": tuple(messages)}
    context = tuple(i for i, m in enumerate(messages) if m["role"] == "assistant" and not is_trained[i])
    if context:
        fields["context"] = context
    if tools := _tools(values.get("tools"), location):
        fields["tools"] = tools
    return fields, [_message_text(message) for message in messages]


def _is_trained(value: Any, key: str, location: str) -> bool:
    if value not in (0, 1):  # true and false are 1 and 0
        raise DataError(f"a message has {describe_value(value)} for its `{key}`", where=location, expected="0 or 1")
    return bool(value)


def _message(value: Any, name: str, location: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(f"{name} is {describe_value(value)}", where=location, expected='{"role": ..., "content": ...}')
    keys = {key: item for key, item in value.items() if item is not None}  # Parquet fills missing keys with null
    role = keys.pop("role", keys.pop("from", None))
    content = keys.pop("content", keys.pop("value", ""))
    if not isinstance(role, str):
        raise DataError(f"{name} has no role", where=location, expected='{"role": ..., "content": ...}')
    if role not in _CHAT_ROLES:
        raise DataError(
            f"{name} has the role '{role[:40]}'",
            where=location,
            expected="system, user, assistant or tool (ShareGPT: system, human, gpt or observation)",
            hint=suggest_nearest(role, _CHAT_ROLES),
        )
    if isinstance(content, list):
        content = "".join(_content_text(part, name, location) for part in content)
    if not isinstance(content, str):
        raise DataError(f"{name} has {describe_value(content)} for its content", where=location, expected="text")
    if role in _CALL_ROLES:
        keys, content = {**keys, "tool_calls": content}, ""
    elif "function_call" in keys and "tool_calls" not in keys:
        keys["tool_calls"] = keys.pop("function_call")
    if "tool_calls" in keys:
        keys["tool_calls"] = _tool_calls(keys["tool_calls"], name, location)
    return {"role": _CHAT_ROLES[role], "content": content, **keys}


def _tool_calls(value: Any, name: str, location: str) -> list[Any]:
    """Tool calls as a list of `{"type": "function", "function": {...}}`, also from JSON text and from the calls alone."""
    if isinstance(value, str):
        value = _parse_json(value, f"the call of {name}", location)
    items = [value] if isinstance(value, Mapping) else value
    if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
        raise DataError(
            f"{name} has {describe_value(value)} for its tool calls",
            where=location,
            expected='{"name": ..., "arguments": {...}}, or a list of such calls',
        )
    return [
        {"type": "function", "function": item} if "name" in item and "function" not in item else item for item in items
    ]


def _content_text(part: Any, name: str, location: str) -> str:
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise DataError(
        f"{name} has content that is not text", where=location, expected='parts {"type": "text", "text": ...}'
    )


def _tools(value: Any, location: str) -> list[Any]:
    if isinstance(value, str) and value.strip():
        value = _parse_json(value, "`tools`", location)
    tools = _list(value, "tools", location) if value else []
    return [_parse_json(tool, "`tools`", location) if isinstance(tool, str) else tool for tool in tools]


def _parse_json(text: str, name: str, location: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(f"{name} is not valid JSON", where=location, expected="JSON, as a value or as text") from None


def _message_text(message: Mapping[str, Any]) -> str:
    calls = message.get("tool_calls")
    reasoning = next((message[key] for key in REASONING_KEYS if isinstance(message.get(key), str)), "")
    return reasoning + message["content"] + (json.dumps(calls, sort_keys=True, default=str) if calls else "")


def _parse_instruction(values: Mapping[str, Any], location: str) -> _ParsedFields:
    instruction, input_, output, system = (
        _string(values, role, location) for role in ("instruction", "input", "output", "system")
    )
    question = "\n\n".join(part for part in (instruction, input_) if part.strip())
    _require_text(question, "empty instruction")
    _require_text(output, "empty answer")
    messages = [{"role": "system", "content": system}] if system.strip() else []
    for user, assistant in (*_history(values.get("history"), location), (question, output)):
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    fields = {"instruction": instruction, "input": input_, "output": output, "messages": tuple(messages)}
    return fields | _references(values, location), [message["content"] for message in messages]


def _history(value: Any, location: str) -> list[tuple[str, str]]:
    turns: list[tuple[str, str]] = []
    for turn in _list(value or [], "history", location):
        if not isinstance(turn, list) or len(turn) != 2:
            raise DataError(
                f"`history` holds {describe_value(turn)}", where=location, expected="pairs of a question and an answer"
            )
        question, answer = (_string({"history": item}, "history", location) for item in turn)
        turns.append((question, answer))
    return turns


# --- questions ------------------------------------------------------------------------------------------


def _parse_question(values: Mapping[str, Any], location: str) -> _ParsedFields:
    question, context = (_string(values, role, location) for role in ("question", "context"))
    _require_text(question, "empty question")
    role = "answers" if "answers" in values else "answer"
    texts = _answers(values[role], role, location)
    if not texts:
        raise SkippedRow("no answer")
    answers = tuple(dict.fromkeys(text for text in texts if text.strip()))
    if not answers:
        raise SkippedRow("empty answer")
    answer, *others = answers
    fields = {"question": question, "context": context, "answer": answer}
    return fields | ({"references": tuple(others)} if others else {}), [question, context, answer]


def _answers(value: Any, role: str, location: str) -> list[str]:
    """All correct answers, from a text, a list, or SQuAD's `{"text": [...], "answer_start": [...]}`."""
    if isinstance(value, Mapping):
        value, role = value.get("text"), f"{role}.text"
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    items = _list(value, role, location)
    return _strings([item.get("text") if isinstance(item, Mapping) else item for item in items], role, location)


def _parse_choices(values: Mapping[str, Any], location: str) -> _ParsedFields:
    question = _string(values, "question", location)
    _require_text(question, "empty question")
    texts, names = _options(values["choices"], location)
    if not 2 <= len(texts) <= len(string.ascii_uppercase):
        raise DataError(f"{len(texts)} choices", where=location, expected=f"2 to {len(string.ascii_uppercase)}")
    role = "answer" if "answer" in values else "answerKey"
    answer = _answer_index(values[role], texts, names, location)
    return {"question": question, "choices": tuple(texts), "answer": answer}, [question, *texts]


def _options(value: Any, location: str) -> tuple[list[str], list[str]]:
    """The texts of the choices, and the row's own names for them, if it has any."""
    if isinstance(value, Mapping) and "text" not in value:  # {A: ..., B: ...}
        texts, names = list(value.values()), list(map(str, value))
    elif isinstance(value, Mapping):
        texts, names = _list(value.get("text"), "choices.text", location), value.get("label")
    else:
        texts, names = _list(value, "choices", location), None
        if texts and all(isinstance(item, Mapping) for item in texts):
            names = [item.get("label") for item in texts]
            texts = [item.get("text") for item in texts]
    texts = _strings(texts, "choices", location)
    if names is not None and (not isinstance(names, list) or len(names) != len(texts)):
        raise DataError("`choices` has not one label for each text", where=location, expected="one label for each text")
    return texts, [str(name) for name in names or []]


def _answer_index(value: Any, texts: list[str], names: list[str], location: str) -> int:
    """The index of the answer, from an index, a label, a letter or the text itself."""
    if value is None or value in ("", -1):
        raise SkippedRow("no answer")
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise DataError(
            f"the answer is {describe_value(value)}",
            where=location,
            expected="an index, a letter or one of the choices",
        )
    if isinstance(value, int):
        indices = [value] if 0 <= value < len(texts) else []
    elif value in names:
        indices = [names.index(value)]
    else:
        letters = string.ascii_uppercase[: len(texts)]
        indices = [texts.index(value)] if value in texts else []
        indices += [letters.index(value)] if len(value) == 1 and value in letters else []
        indices += [int(value)] if re.fullmatch(r"\d{1,2}", value) and int(value) < len(texts) else []
    if len(set(indices)) != 1:
        raise DataError(
            f"the answer {str(value)[:40]!r} is {'more than one' if indices else 'none'} of the choices",
            where=location,
            expected="an index from 0, a letter from A, or the text of one choice",
        )
    return indices[0]


# --- single values ------------------------------------------------------------------------------------


def _string(values: Mapping[str, Any], role: str, location: str) -> str:
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


def _strings(value: Any, role: str, location: str) -> list[str]:
    for item in _list(value, role, location):
        if not isinstance(item, str):
            raise DataError(f"`{role}` holds {describe_value(item)}", where=location, expected="a list of texts")
    return value


def _require_text(text: str, reason: str) -> None:
    if not text or text.isspace():
        raise SkippedRow(reason)


def _class_name(value: Any, role: str, location: str) -> str | int:
    """The name of a tag or of one of several classes."""
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
        raise DataError(f"`label` is {describe_value(value)}", where=location, expected="a finite number")
    return value


_PARSERS: Mapping[RowKind, Callable[[Mapping[str, Any], str], _ParsedFields]] = {
    RowKind.CHAT: _parse_chat,
    RowKind.INSTRUCTION: _parse_instruction,
    RowKind.COMPLETION: _parse_completion,
    RowKind.PAIR: _parse_pair,
    RowKind.LABELLED: _parse_labelled,
    RowKind.TAGGED: _parse_tagged,
    RowKind.QUESTION: _parse_question,
    RowKind.CHOICES: _parse_choices,
}
