"""A page separates recovered from remaining forgetting."""

from __future__ import annotations

from postgrad.reports.sections.relearning_section import relearning_section, relearning_table
from tests.reports.conftest import as_record, draw_run, make_record
from tests.reports.test_page import said


def test_what_came_back_and_what_is_left_are_told() -> None:
    record = make_record()
    table = relearning_table(as_record(record))
    assert table is not None
    assert [row[0].text for row in table.rows] == ["general", "code"]
    assert table.rows[0][5].text.replace("\u2009", " ").startswith("80") and "76" in table.rows[0][5].text
    assert table.rows[1][5].text == "no significant forgetting"
    shown = said(draw_run(record, []))
    assert "Forgetting recovered by a few steps" in shown and "for 20 steps on 640" in shown
    record.pop("relearning")
    assert relearning_section(as_record(record)) == "" and "recovered by a few steps" not in said(draw_run(record, []))
