"""The classes of a stage's classifier: the labels of all its labelled sources."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from postgrad.config.objectives import ClassifyObjective, MaskedObjective
from postgrad.data.problem_type import ProblemType
from postgrad.data.read.labels import Labels
from postgrad.data.tokens.source_files import read_all_labels
from postgrad.errors import StageError
from postgrad.plan.sources import SourceSpec


def resolve_labels(source_specs: Sequence[SourceSpec], cache: Path) -> Labels | None:
    """The labels that a stage's classifier or cloze predicts; None without one.

    Raises `StageError` for sources with different problem types, `DataError` for labels of mixed types.
    """
    labels_by_source: dict[str, Labels] = {}
    objective = None
    for spec in source_specs:
        cloze = isinstance(spec.objective, MaskedObjective) and spec.kind == "labelled"
        if isinstance(spec.objective, ClassifyObjective):
            objective = spec.objective
        elif cloze:
            objective = ClassifyObjective(kind="classify")
        else:
            continue
        labels_by_source[spec.name] = read_all_labels([spec.files], cache)
    if objective is None:
        return None
    problems = {labels.problem: name for name, labels in labels_by_source.items()}
    if len(problems) > 1:
        (one, first), (two, second), *_ = problems.items()
        raise StageError(
            f"'{first}' has labels of type {one} and '{second}' of type {two}",
            where="data.sources",
            expected="one type of labels for a classifier",
        )
    (problem,) = problems
    problem = problem if objective.problem == "auto" else ProblemType(objective.problem)
    if problem == ProblemType.NUMBER:
        return Labels(ProblemType.NUMBER)
    names = set().union(*(labels.names for labels in labels_by_source.values()))
    if problem != ProblemType.MULTI_LABEL and len({*map(str, names), *(objective.labels or ())}) < 2:
        raise StageError(
            f"all rows have the label {next(iter(names))!r}" if names else "no row has a label",
            where="data.sources",
            expected="rows of at least two labels",
            hint="list all labels under objectives.labels if others follow in later stages",
        )
    if objective.labels is None:
        texts = sorted(name for name in names if isinstance(name, str))
        return Labels(problem, (*sorted(name for name in names if not isinstance(name, str)), *texts))
    by_text = {str(name): name for name in names}
    unlisted = sorted(by_text.keys() - set(objective.labels))
    if unlisted:
        raise StageError(
            f"the rows have the label '{unlisted[0]}', which is not listed",
            where="objectives.labels",
            expected=f"all of {', '.join(sorted(by_text))}",
        )
    return Labels(problem, tuple(by_text.get(name, name) for name in objective.labels))
