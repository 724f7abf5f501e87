"""A shift as the command measures it: the model's own bits, the texts' distances, what is proposed, and the page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from postgrad.analysis.domain_shift import ShiftEstimate
from postgrad.cli import render
from postgrad.cli.main import app
from postgrad.commands.evaluate import evaluate
from postgrad.commands.pages import write_page
from postgrad.commands.shift import MeasuredShift, _bits_per_byte, _difference, measure_shift
from postgrad.errors import DataError, StageError
from postgrad.evaluation.perplexity import Scores
from tests.conftest import new_text, old_text, write_jsonl


def measured(base: Path, cache: Path, old: list[Path], new: list[Path]) -> MeasuredShift:
    return measure_shift(str(base / "base"), list(map(str, old)), list(map(str, new)), cache=cache)


def test_another_kind_of_text_is_a_shift_and_more_of_the_same_is_none(base: Path, cache: Path, tmp_path: Path) -> None:
    old = [write_jsonl(tmp_path / f"old{i}.jsonl", old_text(300, 30 + i)) for i in range(2)]
    new = write_jsonl(tmp_path / "new.jsonl", new_text(300, 40))
    apart = measured(base, cache, old[:1], [new])
    write_page(apart, tmp_path / "shift.html")
    alike = measured(base, cache, old[:1], old[1:])
    assert apart.strength == "strong" and alike.strength == "none"
    assert apart.proposals[0].value == "25%" and alike.proposals[0].value == "1%"
    bits = evaluate(str(base / "base"), [str(new)], cache=cache).sets["new"].bits_per_byte
    assert apart.new.bits.value == pytest.approx(bits)
    surprise = apart.surprise
    assert surprise.value == pytest.approx(bits - apart.old.bits.value)
    assert surprise.low < surprise.value < surprise.high
    assert "strong" in (tmp_path / "shift.html").read_text()
    text = render.shift_text(apart, None)
    assert "to begin with" in text and text.splitlines()[-1].startswith("next: postgrad init")


def test_several_files_are_one_text(base: Path, cache: Path, tmp_path: Path) -> None:
    parts = [write_jsonl(tmp_path / f"part{i}.jsonl", old_text(100, 50 + i)) for i in range(2)]
    whole = write_jsonl(
        tmp_path / "whole.jsonl",
        [text for pair in zip(old_text(100, 50), old_text(100, 51), strict=True) for text in pair],
    )
    new = write_jsonl(tmp_path / "new.jsonl", new_text(300, 40))
    one, two = (measured(base, cache, old, [new]) for old in (parts, [whole]))
    assert one.distances == two.distances
    assert one.old.bits.value == pytest.approx(two.old.bits.value)


def test_the_same_text_and_too_little_text_are_refused(base: Path, cache: Path, tmp_path: Path) -> None:
    old = write_jsonl(tmp_path / "old.jsonl", old_text(300, 30))
    few = write_jsonl(tmp_path / "few.jsonl", old_text(3, 60))
    with pytest.raises(DataError, match="are in both the old and the new text"):
        measured(base, cache, [old], [old])
    with pytest.raises(DataError, match=r"--new.*too few to measure"):
        measured(base, cache, [old], [few])
    words = ["shift", "--model", str(base / "base"), "--old", str(old), "--new", str(few), "--report", str(tmp_path)]
    error = CliRunner().invoke(app, words).exception  # before anything is measured
    assert isinstance(error, StageError) and "is a folder" in str(error) and error.where == "--report"


def test_bits_are_those_of_all_bytes_and_a_difference_is_as_unsure_as_both() -> None:
    one = Scores(np.array([0, 0, 1]), np.array([2.0, 4.0, 6.0]) * np.log(2), np.array([1, 1, 1]), np.array([2, 4]))
    other = Scores(np.array([0]), np.array([8.0]) * np.log(2), np.array([1]), np.array([4]))
    assert _bits_per_byte([one, other]).value == pytest.approx(20 / 10)
    with pytest.raises(DataError, match="no text to score"):
        _bits_per_byte([])
    found = _difference(ShiftEstimate(2.0, 1.7, 2.4), ShiftEstimate(5.0, 4.6, 5.3))
    # Below by the new text's low side (.4) and the old one's high side (.4), above by .3 and .3.
    assert (found.value, found.low, found.high) == (3.0, pytest.approx(3 - 0.32**0.5), pytest.approx(3 + 0.18**0.5))
