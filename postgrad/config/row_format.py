"""How does a stage say what rows are and how they are put into words? The same keys for sources, held-out files and tasks."""

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
    """What rows are, and which of them are meant."""

    kind: RowKind = "auto"
    """What the rows are; auto: what their columns say. Rows with `text` and `label` are text unless `labelled` is said."""
    columns: dict[str, str] = {}
    """Which column is which, e.g. `{text: abstract}`, or what is inside of one: `{source: translation.en}`."""
    filter: dict[str, FilterValues] = {}
    """Only rows that have one of these values in each of these columns: `{task: [boolq, copa]}`."""
    document_unit: DocumentSplit = "auto"
    """What a document is in a text file; auto: the file, or passages of about 4,000 characters in a large one."""


class TemplatedRowFormat(RowFormat):
    """What rows are, and how they are put into words."""

    prompt: str | None = None
    """What a row with parts is read as: `{field}` stands for a field of it. Left out: by its kind."""
    answer: str | None = None
    """What is answered, likewise."""
    label_words: dict[str, str] = {}
    """How labels are said: `{"0": negative, "1": positive}`."""
