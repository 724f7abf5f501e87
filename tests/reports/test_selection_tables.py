"""Does a page tell which documents were read, by what, and show what was left out?"""

from __future__ import annotations

from postgrad.reports.sections import selection_section
from tests.reports.conftest import as_record, draw_run, make_record
from tests.reports.test_page import said


def test_the_page_tells_what_was_kept_and_what_was_not() -> None:
    record = make_record()
    table = selection_section.selection_table(as_record(record))
    assert table is not None
    assert [row[1].text for row in table.rows] == ["duplicates", "dsir"]
    assert [row[5].text for row in table.rows] == ["93.3%", "50.0%"]
    assert table.rows[1][6].text == "66.7%"  # of the tokens: what is kept is longer
    shown = said(draw_run(record, []))
    for words in (
        "Document filters",
        "Once upon a time.",
        "dropped (-1.104 nats/n-gram)",
        "A trial of two drugs, again.",
    ):
        assert words.replace("-", "\u2212") in shown.replace("-", "\u2212"), words
    assert shown.count("log importance weight") == 1  # near copies have no values to draw


def test_a_histogram_becomes_steps() -> None:
    assert selection_section._histogram_points([-1.0, 0.0, 1.0], [3, 5]) == [
        (-1.0, 3.0),
        (0.0, 3.0),
        (0.0, 5.0),
        (1.0, 5.0),
    ]


def test_a_run_that_read_everything_has_no_such_section() -> None:
    record = make_record()
    record["plan"]["sources"][0].pop("selection")
    assert selection_section.selection_section(as_record(record)) == "" and "Document filters" not in said(
        draw_run(record, [])
    )
