"""Does a page tell forgetting that a few steps win back from what is lost?"""

from __future__ import annotations

from postgrad.reports.pages import run_page
from postgrad.reports.sections import relearning_table
from tests.reports.conftest import make_record
from tests.reports.test_page import said


def test_what_came_back_and_what_is_left_are_told() -> None:
    record = make_record()
    table = relearning_table.relearning_table(record)
    assert table is not None
    assert [row[0].text for row in table.rows] == ["general", "code"]
    assert table.rows[0][5].text.replace("\u2009", " ").startswith("80") and "76" in table.rows[0][5].text
    assert table.rows[1][5].text == "nothing forgotten for certain"
    shown = said(run_page.run_page(record, []))
    assert "What a few steps on old text bring back" in shown and "What 20 steps on 640" in shown
    record.pop("realign")
    assert relearning_table.relearning_section(record) == "" and "bring back" not in said(run_page.run_page(record, []))
