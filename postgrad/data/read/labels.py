"""The labels of a source: classes, numbers or tags, and their indices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from postgrad.data.problem_type import ProblemType
from postgrad.data.read.examples import NO_TAG, Example, Label
from postgrad.data.read.row_kinds import RowKind
from postgrad.errors import DataError, suggest_nearest

MAX_LABELS = 2**16 - 2
"""A mark has two bytes, and 0 means no tag."""


@dataclass(frozen=True)
class Labels:
    """The possible labels of labelled or tagged rows.

    `problem` is `class` (one of `names`), `multi` (any of them), `number` (without names) or `tags`. The index of a name is
    the index of its class.
    """

    problem: ProblemType
    names: tuple[str | int, ...] = ()

    @property
    def width(self) -> int:
        """How many numbers encode an example's label; none for tags, which are marks on the words."""
        if self.problem == ProblemType.TAGS:
            return 0
        return len(self.names) if self.problem == ProblemType.MULTI_LABEL else 1

    def index(self, name: Label) -> int:
        """The index of a name. Raises `DataError` for an unknown one."""
        index = self._indices.get(name)
        if index is None or isinstance(name, float):
            raise DataError(
                f"the label {name!r} is none of the {len(self.names):,} known ones",
                expected=", ".join(map(str, self.names[:12])) + (" ..." if len(self.names) > 12 else ""),
                hint=suggest_nearest(str(name), map(str, self.names)),
            )
        return index

    def values(self, example: Example) -> tuple[float, ...]:
        """The label of a labelled example as `width` numbers: its index, a 1 for each of its classes, or the number."""
        if self.problem == ProblemType.MULTI_LABEL:
            if "labels" not in example.fields:
                raise DataError("a single label", expected="`labels`, a list")
            indices = {self.index(name) for name in example.fields["labels"]}
            return tuple(float(index in indices) for index in range(len(self.names)))
        if "label" not in example.fields:
            raise DataError("a list of labels", expected="`label`, a single one")
        label = example.fields["label"]
        if self.problem == ProblemType.CLASS:
            return (float(self.index(label)),)
        if isinstance(label, str):
            raise DataError(f"the label {label!r} is text", expected="a number")
        return (float(label),)

    @cached_property
    def _indices(self) -> dict[Label, int]:
        return {name: index for index, name in enumerate(self.names)}


def collect_labels(examples: Iterable[tuple[Example, str]], where: str = "") -> Labels:
    """The labels of examples (each with its location): names sorted, whole numbers in numeric order.

    A single label with a decimal point makes all of them numbers. Raises `DataError` with the location of the first label
    whose type differs from those before.
    """
    problem: ProblemType | None = None
    type_name, is_number = "", False
    names: set[Label] = set()
    for example, location in examples:
        own_problem, own_names = _example_labels(example)
        if own_problem != (problem := problem or own_problem):
            raise _mixed_labels_error(f"`{own_problem}`", f"`{problem}`", location)
        for name in own_names:
            own_type = "text" if isinstance(name, str) else "a number"
            if own_type != (type_name := type_name or own_type):
                raise _mixed_labels_error(f"{name!r}, {own_type}", type_name, location)
            is_number |= isinstance(name, float)
            if not is_number:
                names.add(name)
        if len(names) > MAX_LABELS and not is_number:
            raise DataError(
                f"more than {MAX_LABELS:,} different labels",
                where=location,
                expected="classes",
                hint="write labels that are quantities with a decimal point: 3.0",
            )
    if problem is None or not type_name:
        raise DataError("no row has a label", where=where, expected="rows with labels or tags")
    return Labels(ProblemType.NUMBER) if is_number else Labels(problem, tuple(sorted(names)))  # type: ignore[type-var]


def merge_labels(label_sets: Iterable[Labels]) -> Labels:
    """The labels of several sources together. Raises `DataError` when they are of different types."""
    problems, names = set(), set()
    for labels in label_sets:
        problems.add(labels.problem)
        names.update(labels.names)
    types = {type(name) for name in names}
    if problems == {ProblemType.CLASS, ProblemType.NUMBER} and types == {int}:
        return Labels(ProblemType.NUMBER)
    if len(problems) > 1 or len(types) > 1:
        described = " and ".join(f"`{problem}`" for problem in sorted(problems))
        raise _mixed_labels_error(described, "labels of other sources")
    return Labels(problems.pop(), tuple(sorted(names)))


def _example_labels(example: Example) -> tuple[ProblemType, Sequence[Label]]:
    """The problem type of an example, and its labels."""
    if example.kind == RowKind.TAGGED:
        return ProblemType.TAGS, [tag for tag in example.fields["tags"] if tag != NO_TAG]
    if "labels" in example.fields:
        return ProblemType.MULTI_LABEL, example.fields["labels"]
    return ProblemType.CLASS, (example.fields["label"],)


def _mixed_labels_error(label: str, earlier: str, location: str = "") -> DataError:
    return DataError(
        f"a label that is {label} after labels that are {earlier}", where=location, expected="labels of one type"
    )
