"""Row kinds, columns and templates: the keys that sources, held-out files and tasks share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from postgrad.config.quantities import ConfigModel

RowKind = Literal[
    "auto",
    "text",
    "input_ids",
    "chat",
    "instruction",
    "completion",
    "pair",
    "labelled",
    "tagged",
    "question",
    "choices",
]
DocumentSplit = Literal["auto", "file", "passages", "paragraphs", "lines"]


def _as_text_list(value: Any) -> Any:
    """One value is a list of one; what YAML reads as a number or truth value is compared as text."""
    listed = value if isinstance(value, list) else [value]
    return [item if isinstance(item, str) else str(item) for item in listed]


FilterValues = Annotated[list[str], BeforeValidator(_as_text_list, json_schema_input_type=str | list[str])]


class RowFormat(ConfigModel):
    """What rows are, and which of them to use."""

    kind: RowKind = "auto"
    """Kind of the rows; auto: by their columns. Rows with `text` and `label` are text unless `labelled` is set."""
    columns: dict[str, str] = {}
    """Names of the columns, such as `{text: abstract}`, or a path inside of one: `{source: translation.en}`."""
    filter: dict[str, FilterValues] = {}
    """Use only rows with one of these values in each of these columns: `{task: [boolq, copa]}`."""
    document_unit: DocumentSplit = "auto"
    """Documents of a text file; auto: the whole file, or passages of about 4,000 characters in a large one."""


class TemplatedRowFormat(RowFormat):
    """What rows are, and how they are rendered as text."""

    prompt: str | None = None
    """Template of the prompt, with `{field}` for a field of the row. Default: by the kind."""
    answer: str | None = None
    """Template of the answer, likewise."""
    label_words: dict[str, str] = {}
    """Words for labels: `{"0": negative, "1": positive}`. Default: the labels themselves."""
