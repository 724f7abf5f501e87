"""Frames: what stands around one text or two, in which order."""

import numpy as np
import pytest

from postgrad.data.render.frame import EMPTY_FRAME, Frame
from postgrad.data.render.prompt_template import Template
from postgrad.errors import StageError

BERT = Frame((101,), (102,), (103, 104))
A, B = np.array([7, 8, 9], np.uint16), np.array([10], np.uint32)


def test_around_one_text_and_two() -> None:
    assert BERT.wrap(A).tolist() == [101, 7, 8, 9, 103, 104]
    assert BERT.wrap(A, B).tolist() == [101, 7, 8, 9, 102, 10, 103, 104]
    assert EMPTY_FRAME.wrap(A).tolist() == [7, 8, 9]


def test_size_is_what_a_frame_adds() -> None:
    for frame in (EMPTY_FRAME, BERT, Frame(separator_ids=(1, 2, 3))):
        assert frame.size(1) == len(frame.wrap(A)) - len(A)
        assert frame.size(2) == len(frame.wrap(A, B)) - len(A) - len(B)


def test_ids_beyond_a_store_of_two_bytes_are_kept() -> None:
    ids = Frame((70_000,)).wrap(A)
    assert ids.dtype == np.int64 and ids[0] == 70_000


def of(text: str) -> Frame:
    special = {"cls": 101, "sep": 102, "mask": 103}
    return Frame.from_template(Template.parse(text), special, 1000, lambda words: [ord(letter) for letter in words])


def test_a_template_becomes_a_frame() -> None:
    assert of("[CLS] {3} {x} {2} [MASK] {1} [SEP]") == Frame((101, 1000, 1001, 1002), (), (1003, 1004, 103, 1005, 102))
    assert of("[CLS] {a} [SEP] {b}?") == Frame((101,), (102,), (63,))


@pytest.mark.parametrize("text", ["[CLS] [SEP]", "{a} {b} {c}", "{a} {a}"])
def test_a_template_of_other_than_one_or_two_fields_is_refused(text: str) -> None:
    with pytest.raises(StageError, match="two different ones"):
        of(text)
