"""The rows of a report equal the record, in all three formats."""

import copy
import csv
import io
import re

import pytest

from postgrad.lineage.matrix import Lineage
from postgrad.reports.html import notation
from postgrad.reports.html.table import Table
from postgrad.reports.sections.comparison_table import arm_names, comparison_table, removed_share
from postgrad.reports.sections.held_out_tables import score_table
from postgrad.reports.sections.lineage_tables import lineage_summary_table, lineage_table
from postgrad.reports.sections.mixture_section import ledger_table, mixture_table
from tests.reports.conftest import as_record


def exact(html: str) -> list[float]:
    return [float(v) for v in re.findall(r'<data value="([^"]+)">', html)]


def read_csv(table: Table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(table.csv())))


def test_scores_equal_the_record_exactly(record: dict) -> None:
    rows = {r["set"]: r for r in read_csv(score_table(as_record(record)))}
    for name, change in record["changes"].items():
        before, after = (record["scores"][k][name] for k in ("before", "after"))
        row = rows[name]
        assert float(row["nats per token before"]) == before["nats"]
        assert float(row["nats per token after"]) == after["nats"]
        assert float(row["nats per token difference"]) == change["difference"]
        assert float(row["nats per token low"]) == change["low"]
        assert float(row["nats per token high"]) == change["high"]
        assert float(row["nats per token relative"]) == change["relative_difference"]
        assert float(row["perplexity after"]) == after["perplexity"]
        assert float(row["bits per byte before"]) == before["bits_per_byte"]
        assert float(row["bits per byte difference"]) == change["bits_per_byte_difference"]
        assert float(row["share of range"]) == change["share_of_range"]
        assert float(row["units"]) == change["unit_count"]


def test_html_and_text_hold_the_same_numbers(record: dict) -> None:
    table = score_table(as_record(record))
    found = exact(table.html())
    for name, change in record["changes"].items():
        assert change["difference"] in found
        assert record["scores"]["before"][name]["nats"] in found
    assert "\u22120.331" in table.text()
    assert "2.310" in table.text()
    assert list(rows_of(table)) == ["general", "code", "papers"]  # retention first


def rows_of(table: Table) -> list[str]:
    return [row[0].text for row in table.rows]


def test_text_lines_up_and_wraps(record: dict) -> None:
    table = score_table(as_record(record), brief=True)
    assert all(notation.display_width(line) <= 100 for line in table.text().split("\n")[:-1])
    narrow = comparison_table([as_record(record)] * 2, None).text(width=60)
    body = [line for line in narrow.split("\n") if line and not line.startswith("Losses")]
    assert max(map(notation.display_width, body)) <= 60
    assert narrow.count("medicine") >= 4  # the first column is repeated in every block
    wide = copy.deepcopy(record)
    wide["changes"] = {"\u6f22\u5b57": record["changes"]["general"], "g": record["changes"]["papers"]}
    lines = score_table(as_record(wide), brief=True).text().split("\n")
    assert notation.display_width(lines[4]) == notation.display_width(lines[5])


def test_terminal_gets_no_escape_sequences(record: dict) -> None:
    harmless = score_table(as_record({**record, "changes": {"x": record["changes"]["general"]}, "scores": {}})).text()
    evil = {"evil\x1b[31m\nrow\r\x07\x9b2J": record["changes"]["general"]}
    text = score_table(as_record({**record, "changes": evil, "scores": {}})).text()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    assert len(text.split("\n")) == len(harmless.split("\n"))


@pytest.mark.parametrize("lead", ["=", "+", "-", "@", "\t", "\r"])
def test_csv_starts_no_formula(record: dict, lead: str) -> None:
    record["changes"] = {f"{lead}cmd|' /C calc'!A0": record["changes"]["general"]}
    name = next(iter(read_csv(score_table(as_record(record)))))["set"]
    assert name[0] not in "=+-@\t\r"


def test_removed_is_one_minus_the_ratio() -> None:
    assert removed_share(0.01, 0.1) == pytest.approx(0.9)
    assert removed_share(-0.01, 0.1) == pytest.approx(1.1)
    assert removed_share(0.2, 0.1) == pytest.approx(-1.0)
    assert removed_share(0.1, 0.1) == 0.0
    for baseline in (0.0, -0.1, None, float("nan")):
        assert removed_share(0.05, baseline) is None


def test_arms_table_measures_against_the_baseline(arms: list[dict]) -> None:
    rows = {r["arm"]: r for r in read_csv(comparison_table(list(map(as_record, arms)), "no replay"))}
    base = arms[0]["changes"]
    for record in arms[1:]:
        for name in ("general", "code"):
            change = record["changes"][name]["difference"]
            row = rows[record["name"]]
            assert float(row[f"{name} (retained) difference"]) == change
            assert float(row[f"{name} (retained) removed"]) == pytest.approx(1 - change / base[name]["difference"])
        mean = (record["changes"]["general"]["difference"] + record["changes"]["code"]["difference"]) / 2
        of_base = (base["general"]["difference"] + base["code"]["difference"]) / 2
        assert float(row["all retained sets mean forgetting"]) == pytest.approx(mean)
        assert float(row["all retained sets removed"]) == pytest.approx(1 - mean / of_base)
    assert "removed" not in comparison_table(list(map(as_record, arms)), None).csv()
    assert "not among the arms" in comparison_table(list(map(as_record, arms)), "nobody").text()


def test_arms_with_one_name_are_told_apart(record: dict) -> None:
    assert arm_names(list(map(as_record, (record, record, {**record, "name": ""})))) == [
        "medicine",
        "medicine (2)",
        "arm 3",
    ]


def test_ledger_adds_up_or_says_so(record: dict) -> None:
    table = ledger_table(as_record(record))
    rows = {r["source"]: r for r in read_csv(table)}
    group = "tokens from the files"
    for name, entry in record["token_ledger"].items():
        for key in ("read", "held_out", "dropped", "truncated", "placed"):
            assert int(rows[name][f"{group} {key.replace('_', ' ')}"]) == entry[key]
        assert int(rows[name][f"{group} unaccounted"]) == 0
    total = sum(entry["trained"] for entry in record["token_ledger"].values())
    assert int(rows["all sources"]["in the training rows trained"]) == total
    assert "accounted for" in table.text()
    record["token_ledger"]["papers"]["dropped"] -= 17
    broken = ledger_table(as_record(record))
    assert int(next(iter(read_csv(broken)))[f"{group} unaccounted"]) == 17
    assert "do not add up: papers" in broken.text()


def test_mixture_and_lineage_equal_their_records(record: dict, tree: dict) -> None:
    row = next(iter(read_csv(mixture_table(as_record(record)))))
    assert float(row["share planned"]) == 0.9
    assert float(row["share achieved"]) == 0.8999356
    assert int(row["trained tokens achieved"]) == 17_998_712
    table = lineage_table(Lineage.model_validate(tree))
    assert [v for v in exact(table.html()) if 1 < v < 3] == [v for line in tree["R"] for v in line if v is not None]
    assert rows_of(table)[0] == "base"
    assert "T-1 = 3" in lineage_summary_table(Lineage.model_validate(tree)).text()


def test_notation_is_for_readers() -> None:
    assert notation.format_signed(-0.0001) == "0.000"
    assert notation.format_signed(0.01) == "+0.010"
    assert notation.format_fixed(-1234.5, 1) == "\u22121,234.5"
    assert notation.format_percent(0.9, 1) == "90.0 %"
    assert [notation.format_compact(v) for v in (0, 999, 1500, 20_000_000, 134_515_008, 999_950)] == \
        ["0", "999", "1.5k", "20M", "135M", "1M"]  # fmt: skip
    assert [notation.format_duration(v) for v in (4.21, 200, 9918.4, -1, None)] == \
        ["4.2 s", "3 min 20 s", "2 h 45 min", "\u2013", "\u2013"]  # fmt: skip
    assert [notation.finite(v) for v in (1, None, float("nan"), float("inf"), 1e301)] == [1, None, None, None, None]
    assert notation.escape_html("a\x00\ud800\u202eb<") == "a\u2400\ufffd\ufffdb&lt;"
