"""Labels of held-out rows that no training row has, which a classifier cannot learn."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from postgrad.data.problem_type import ProblemType
from postgrad.data.read.documents import read_examples
from postgrad.data.read.examples import Example
from postgrad.data.read.files import RawSource as Files
from postgrad.data.tokens.source_files import read_all_labels
from postgrad.data.tokens.store import TokenStore
from postgrad.errors import DataError, suggest_nearest

LabelName = str | int


def refuse_unseen_labels(
    name: str, files: Files, known_labels: Collection[LabelName], cache: Path, *, from_stage: bool
) -> None:
    """Raise `DataError` with the first row of a held-out file whose label is not among the known ones.

    `from_stage`: the known labels are listed in the stage, not collected from the training rows.
    """
    unseen = set(read_all_labels([files], cache).names) - set(known_labels)
    if not unseen:
        return
    for example, location in read_examples(files):
        label = next((label for label in _get_labels(example) if label in unseen), None)
        if label is None:
            continue
        names = [str(each) for each in known_labels]
        listed = ", ".join(names[:12]) + (" ..." if len(names) > 12 else "")
        raise DataError(
            f"'{name}' has the label {label!r}, which "
            + ("objectives.labels does not list" if from_stage else "no training row has"),
            where=location,
            expected=f"one of {listed}",
            hint=" ".join(
                [
                    suggest_nearest(str(label), names),
                    "to score such rows anyway, list all labels under objectives.labels",
                ]
            ).strip(),
        )


def _get_labels(example: Example) -> Sequence[LabelName]:
    """The class labels of a row."""
    fields = example.fields
    labels = fields.get("tags", fields.get("labels"))
    return labels if labels is not None else (fields["label"],)


def collect_labels(store: TokenStore, documents: np.ndarray) -> set[LabelName]:
    """The names of all labels of some documents."""
    names = store.labels or []
    if store.problem == ProblemType.TAGS:
        marks = (store.marks(document) for document in documents.tolist())
        tags = set[int]().union(*(np.unique(mark_T).tolist() for mark_T in marks if mark_T is not None))
        return {names[tag - 1] for tag in tags if tag}  # 0 is no tag
    if store.values is None or store.problem not in (ProblemType.CLASS, ProblemType.MULTI_LABEL):
        return set()
    values = np.asarray(store.values[documents])
    if store.problem == ProblemType.CLASS:
        return {names[int(index)] for index in np.unique(values)}
    return {names[int(index)] for index in np.flatnonzero(values.any(0))}
