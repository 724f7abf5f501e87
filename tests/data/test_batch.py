"""A batch holds its rows as they are; what fills them up counts nothing and is where it can do no harm."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from postgrad.data.layouts.rows import IGNORED, Row
from postgrad.data.loading.batch import _MULTIPLE, Batch, collate

PAD = 77


def row(length: int, labels: int | None = None, start: int = 1) -> Row:
    """A row of a text and an answer of other lengths."""
    size = length if labels is None else labels
    inputs = {
        "input_ids": np.arange(start, start + length),
        "attention_mask": np.ones(length, np.int64),
        "decoder_input_ids": np.arange(start, start + size),
    }
    return Row(inputs, np.arange(start + 100, start + 100 + size), size)


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=5))
def test_every_row_stands_in_its_batch(sizes: list[tuple[int, int]]) -> None:
    rows = [row(*size, start=10 * i + 1) for i, size in enumerate(sizes)]
    batch = collate(rows, list(range(len(rows))), (1, 2), pad_token_id=PAD)
    for i, one in enumerate(rows):
        for name, array in one.inputs.items():
            found = batch.inputs[name][i].tolist()
            fill = PAD if name == "input_ids" else 0
            assert found[: len(array)] == array.tolist()
            assert set(found[len(array) :]) <= {fill}
        labels = batch.labels[i].tolist()
        assert labels[: len(one.labels)] == one.labels.tolist()
        assert set(labels[len(one.labels) :]) <= {IGNORED}
    assert batch.label_count == sum(size for _, size in sizes) == int((batch.labels != IGNORED).sum())
    assert batch.label_count_B.tolist() == [size for _, size in sizes]
    assert batch.source_B.tolist() == list(range(len(rows))) and batch.objectives == (1, 2)


@settings(max_examples=50)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=5))
def test_few_shapes_occur(lengths: list[int]) -> None:
    """Equal rows stay as they are; others are filled up to the next multiple, and no further."""
    batch = collate([row(length) for length in lengths], [0] * len(lengths))
    width = batch.inputs["input_ids"].shape[1]
    if len(set(lengths)) == 1:
        assert width == lengths[0]
    else:
        assert width % _MULTIPLE == 0 and max(lengths) <= width < max(lengths) + _MULTIPLE


@pytest.mark.parametrize(
    ("labels", "dtype"),
    [
        ([np.array(1, np.int64), np.array(0, np.int64)], torch.int64),
        ([np.array([1, 0, 1], np.float32), np.array([0, 0, 1], np.float32)], torch.float32),
        ([np.array(0.5, np.float32), np.array(2.0, np.float32)], torch.float32),
    ],
)
def test_labels_of_whole_examples_are_not_filled_up(labels: list[np.ndarray], dtype: torch.dtype) -> None:
    """A class, several classes, a number: rows of other lengths have labels of one shape."""
    rows = [Row(row(length).inputs, label, 1) for length, label in zip((3, 9), labels, strict=True)]
    batch = collate(rows, [0, 0])
    assert batch.labels.dtype == dtype
    assert batch.labels.tolist() == [label.tolist() for label in labels]


def test_dtypes_stay() -> None:
    batch = collate([row(3), row(5)], [0, 0])
    assert {tensor.dtype for tensor in batch.inputs.values()} == {torch.int64}


def test_a_batch_that_is_there_already_is_not_copied() -> None:
    batch = collate([row(3)], [0])
    assert batch.to(torch.device("cpu")) is batch
    moved = batch.to(torch.device("meta"))
    assert isinstance(moved, Batch) and moved.labels.device.type == "meta"
    assert {tensor.device.type for tensor in moved.inputs.values()} == {"meta"}
    # What is counted stays where it is, so that counting waits for no device.
    assert moved.label_count == batch.label_count and moved.source_B is batch.source_B
    assert moved.objectives == batch.objectives
