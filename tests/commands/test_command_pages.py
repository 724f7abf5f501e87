"""Can the pages of a measured shift and of a sweep be read by everyone? One scrolling region to a table, each with a name."""

from __future__ import annotations

import re

import pytest

from postgrad.analysis.domain_shift import Fertility, ShiftEstimate
from postgrad.analysis.shift_advice import Proposal, ShiftStrength
from postgrad.commands.blend import Blend, BlendedModel, BlendEnd, BlendSetChange
from postgrad.commands.blend_page import blend_page
from postgrad.commands.shift import CorpusSummary, MeasuredShift
from postgrad.commands.shift_page import shift_page
from postgrad.stats.forgetting import LossChange
from tests.reports.test_page import said, walked


def text(bits: float, name: str) -> CorpusSummary:
    return CorpusSummary((name,), 40, Fertility(1.4, 3.9, 0.001), ShiftEstimate(bits, bits - 0.01, bits + 0.01))


def shift(surprise: float = 0.8, strength: ShiftStrength = "strong") -> MeasuredShift:
    return MeasuredShift(
        "base",
        text(1.1, "old.jsonl"),
        text(1.1 + surprise, "new.jsonl"),
        ShiftEstimate(surprise, surprise - 0.02, surprise + 0.02),
        {"byte trigrams": ShiftEstimate(0.5, 0.49, 0.51, 0.004)},
        strength,
        (Proposal("replay share", "25%", "it is far", "a paper"),),
    )


def blend() -> Blend:
    def change(role: str, difference: float) -> BlendSetChange:
        low, high = difference - 0.01, difference + 0.01
        return BlendSetChange(role, LossChange(difference, low, high, 0.1, 0.1, None, 0.1, "documents", 40, "kept"))

    weights = (0.0, 0.5, 1.0)
    points = [
        BlendedModel(f"{w:g}", w, None, {"stories": change("retained", 0.4 * w), "papers": change("learned", -0.9 * w)})
        for w in weights
    ]
    ends = (BlendEnd("run/a", "linear", (1.0,)),)
    return Blend("run/a", "base", "model", (), None, weights, ends, tuple(points), points[1])


@pytest.mark.parametrize("html", [shift_page(shift()), blend_page(blend())], ids=["shift", "blend"])
def test_a_table_lies_in_one_region_with_a_name(html: str) -> None:
    walked(html)
    regions = re.findall(r'<div class="scroll"([^>]*)>', html)
    assert len(regions) == html.count("<table") > 0
    assert all(re.search(r'tabindex="0" role="region" aria-label="[^"]+"', region) for region in regions)
    assert "<caption></caption>" not in html and '<th scope="col"></th>' not in html


def test_the_numbers_of_a_shift_and_of_a_sweep_are_told() -> None:
    found = said(shift_page(shift()))
    assert (
        "The model needs 0.800 bits more per byte of the new text than of the old (new minus old +0.780 to +0.820)"
        in found
    )
    assert "0.500 (0.490 to 0.510)" in found and "+0.5" not in found  # a divergence has no sign
    assert "The model needs 0.300 bits fewer per byte" in said(shift_page(shift(-0.3, "weak")))
    assert all(words in found for words in ("replay share", "25%", "it is far", "1.900"))
    found = said(blend_page(blend()))
    assert "+0.4000" in found and "Selected: 0.5" in found
