"""Kinds of rows: running text, conversations, labelled texts and so on, and what each kind has."""

from __future__ import annotations

from enum import StrEnum


class RowKind(StrEnum):
    """What the rows of a source are; the value is the kind's name in a stage file."""

    TEXT = "text"
    INPUT_IDS = "input_ids"
    CHAT = "chat"
    INSTRUCTION = "instruction"
    COMPLETION = "completion"
    PAIR = "pair"
    CHOICES = "choices"
    QUESTION = "question"
    TAGGED = "tagged"
    LABELLED = "labelled"

    @property
    def is_running_text(self) -> bool:
        """Whether rows are plain documents, without parts such as a prompt and an answer."""
        return self in (RowKind.TEXT, RowKind.INPUT_IDS)

    @property
    def has_labels(self) -> bool:
        """Whether rows carry labels or tags for a task head."""
        return self in (RowKind.LABELLED, RowKind.TAGGED)

    @property
    def label_fields(self) -> tuple[str, ...]:
        """Fields that hold the answer as a value from a fixed set, not as free text."""
        return {RowKind.LABELLED: ("label", "labels"), RowKind.CHOICES: ("answer",)}.get(self, ())


KINDS = tuple(kind.value for kind in RowKind)
RUNNING_TEXT_KINDS = tuple(kind.value for kind in RowKind if kind.is_running_text)
