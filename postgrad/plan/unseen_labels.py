"""Which labels are asked for that no training row has? A classifier cannot learn them, so they are told before training."""

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
    """Raise `DataError` with the first row of a held-out file that has a label of none of the `known` ones.

    `listed`: the known ones are those that the stage lists, and not those of the training rows.
    """
    unseen = set(read_all_labels([files], cache).names) - set(known_labels)
    if not unseen:
        return
    for example, place in read_examples(files):
        label = next((label for label in _get_labels(example) if label in unseen), None)
        if label is None:
            continue
        names = [str(each) for each in known_labels]
        shown = ", ".join(names[:12]) + (" ..." if len(names) > 12 else "")
        raise DataError(
            f"'{name}' has the label {label!r}, which "
            + ("objectives.labels does not list" if from_stage else "no row that is trained on has"),
            where=place,
            expected=f"one of {shown}",
            hint=" ".join(
                [
                    suggest_nearest(str(label), names),
                    "to score such rows all the same, list every label under objectives.labels",
                ]
            ).strip(),
        )


def _get_labels(example: Example) -> Sequence[LabelName]:
    """The labels of a row that are names."""
    fields = example.fields
    several = fields.get("tags", fields.get("labels"))
    return several if several is not None else (fields["label"],)


def collect_labels(store: TokenStore, documents: np.ndarray) -> set[LabelName]:
    """The names of the labels that some documents of a store have."""
    names = store.labels or []
    if store.problem == ProblemType.TAGS:
        marks = [np.unique(found) for d in documents.tolist() if (found := store.marks(d)) is not None]
        met = np.unique(np.concatenate(marks)) if marks else np.empty(0, np.int64)
        return {names[int(mark) - 1] for mark in met if mark}
    if store.values is None or store.problem not in (ProblemType.CLASS, ProblemType.MULTI_LABEL):
        return set()
    values = np.asarray(store.values[documents])
    if store.problem == ProblemType.CLASS:
        return {names[int(index)] for index in np.unique(values)}
    return {names[int(index)] for index in np.flatnonzero(values.any(0))}
