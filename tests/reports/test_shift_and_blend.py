"""Can the pages of a measured shift and of a sweep be read by everyone? One scrolling region to a table, each with a name."""

from __future__ import annotations

import re
from typing import Any

import pytest

from postgrad.reports.pages.blend_page import blend_page
from postgrad.reports.pages.shift_page import shift_page
from postgrad.reports.result_models import BlendResult, ShiftResult
from tests.reports.test_page import said, walked


def text(bits: float, name: str) -> dict[str, Any]:
    return {
        "files": [name],
        "bits": {"value": bits, "low": bits - 0.01, "high": bits + 0.01},
        "bytes_per_token": 3.9,
        "tokens_per_word": 1.4,
        "unknown": 0.001,
    }


def shift(surprise: float = 0.8, strength: str = "strong") -> ShiftResult:
    raw = {
        "model": "base",
        "strength": strength,
        "old": text(1.1, "old.jsonl"),
        "new": text(1.1 + surprise, "new.jsonl"),
        "surprise": {"value": surprise, "low": surprise - 0.02, "high": surprise + 0.02},
        "distances": {"byte trigrams": {"value": 0.5, "low": 0.49, "high": 0.51, "same": 0.004}},
        "proposals": [{"what": "replay share", "value": "25%", "reason": "it is far", "source": "a paper"}],
    }
    return ShiftResult.model_validate(raw)


def blend() -> BlendResult:
    def changes(weight: float) -> dict[str, Any]:
        ends = {"stories": ("retained", 0.4), "papers": ("learned", -0.9)}
        return {
            name: {"role": role, "difference": weight * end, "low": weight * end - 0.01, "high": weight * end + 0.01}
            for name, (role, end) in ends.items()
        }

    points = [{"name": f"{w:g}", "weight": w, "block": None, "changes": changes(w)} for w in (0.0, 0.5, 1.0)]
    raw = {"run": "runs/a", "start": "base", "average": None, "chosen": "0.5", "points": points}
    return BlendResult.model_validate(raw)


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
