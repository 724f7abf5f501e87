"""The labels of a source: the classes, numbers or tags that its rows have, and their indices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from postgrad.data.problem_type import ProblemType
from postgrad.data.read.examples import Example, Label
from postgrad.errors import DataError, suggest_nearest

MAX_LABELS = 2**16 - 2
"""A mark has two bytes, and 0 is no tag."""


@dataclass(frozen=True)
class Labels:
    """What the labels of labelled or tagged rows can be.

    `problem` is `class` (one of `names`), `multi` (any of them), `number` (then there are no names) or `tags`.
    The place of a name among `names` is the class's index.
    """

    problem: ProblemType
    names: tuple[str | int, ...] = ()

    @property
    def width(self) -> int:
        """How many numbers say what an example's label is; none for tags, which are marks on the words."""
        if self.problem == ProblemType.TAGS:
            return 0
        return len(self.names) if self.problem == ProblemType.MULTI_LABEL else 1

    def index(self, name: Label) -> int:
        """The index of a name. Raises `DataError` for one that is not known."""
        found = self._indices.get(name)
        if found is None or isinstance(name, float):
            raise DataError(
                f"the label {name!r} is none of the {len(self.names):,} known ones",
                expected=", ".join(map(str, self.names[:12])) + (" ..." if len(self.names) > 12 else ""),
                hint=suggest_nearest(str(name), map(str, self.names)),
            )
        return found

    def values(self, example: Example) -> tuple[float, ...]:
        """The label of a labelled example as `width` numbers: its index, a 1 for each class it has, or the number."""
        if self.problem == ProblemType.MULTI_LABEL:
            if "labels" not in example.fields:
                raise DataError("a single label", expected="`labels`, a list")
            met = {self.index(name) for name in example.fields["labels"]}
            return tuple(float(index in met) for index in range(len(self.names)))
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
    """The labels that examples (each with its place) have: names sorted, whole numbers in their order.

    A single label that is anywhere a number with a point makes all of them numbers. Raises `DataError` with the place
    of the first label that is of another sort than those before it.
    """
    problem, sort, numbers = "", "", False
    names: set[Label] = set()
    for example, place in examples:
        here, given = _example_labels(example)
        if here != (problem := problem or here):
            raise _mixed_labels_error(f"`{here}`", f"`{problem}`", place)
        for name in given:
            its = "text" if isinstance(name, str) else "a number"
            if its != (sort := sort or its):
                raise _mixed_labels_error(f"{name!r}, {its}", sort, place)
            numbers |= isinstance(name, float)
            if not numbers:
                names.add(name)
        if len(names) > MAX_LABELS and not numbers:
            raise DataError(
                f"more than {MAX_LABELS:,} different labels",
                where=place,
                expected="classes",
                hint="write a label that is a quantity with a point: 3.0",
            )
    if not sort:
        raise DataError("no row has a label", where=where, expected="rows with labels or tags")
    return Labels(ProblemType.NUMBER) if numbers else Labels(problem, tuple(sorted(names)))  # type: ignore[type-var]


def merge_labels(label_sets: Iterable[Labels]) -> Labels:
    """The labels of several sources together. Raises `DataError` when they are of different sorts."""
    problems, names = set(), set()
    for labels in label_sets:
        problems.add(labels.problem)
        names.update(labels.names)
    sorts = {type(name) for name in names}
    if problems == {ProblemType.CLASS, ProblemType.NUMBER} and sorts == {int}:
        return Labels(ProblemType.NUMBER)
    if len(problems) > 1 or len(sorts) > 1:
        raise _mixed_labels_error(
            " and ".join(f"`{problem}`" for problem in sorted(problems)), "labels of other sources"
        )
    return Labels(problems.pop(), tuple(sorted(names)))


def _example_labels(example: Example) -> tuple[ProblemType, Sequence[Label]]:
    """What sort of labels an example has, and which."""
    if example.kind == "tagged":
        return ProblemType.TAGS, example.fields["tags"]
    if "labels" in example.fields:
        return ProblemType.MULTI_LABEL, example.fields["labels"]
    return ProblemType.CLASS, (example.fields["label"],)


def _mixed_labels_error(label: str, earlier: str, location: str = "") -> DataError:
    return DataError(
        f"a label that is {label} after labels that are {earlier}", where=location, expected="labels of one sort"
    )
