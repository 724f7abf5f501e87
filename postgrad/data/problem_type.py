"""The problem type of a classifier: what its labels are, and what transformers calls it."""

from __future__ import annotations

from enum import StrEnum


class ProblemType(StrEnum):
    """One class of several, any subset of them, a number, or a tag for each word. Written by its value in records."""

    CLASS = "class"
    MULTI_LABEL = "multi"
    NUMBER = "number"
    TAGS = "tags"

    @property
    def has_distribution(self) -> bool:
        """Whether the logits of a label are a distribution over classes (softmax)."""
        return self in (ProblemType.CLASS, ProblemType.TAGS)

    @property
    def transformers_name(self) -> str:
        """`problem_type` of a transformers configuration."""
        return _TRANSFORMERS_NAMES[self]

    @classmethod
    def from_transformers(cls, problem_type: str | None, classes: int) -> ProblemType:
        """The problem of a text classifier, from its configuration; a single class without a problem type is a number."""
        names = {name: problem for problem, name in reversed(_TRANSFORMERS_NAMES.items())}
        return names[problem_type] if problem_type else cls.NUMBER if classes == 1 else cls.CLASS


_TRANSFORMERS_NAMES = {
    ProblemType.CLASS: "single_label_classification",
    ProblemType.MULTI_LABEL: "multi_label_classification",
    ProblemType.NUMBER: "regression",
    ProblemType.TAGS: "single_label_classification",
}
