"""Do the rows of a report equal the record, in all three ways they are written?"""

import copy
import csv
import io
import re
from html.parser import HTMLParser

import pytest

from postgrad.reports.html import notation, tables


def exact(html: str) -> list[float]:
    return [float(v) for v in re.findall(r'<data value="([^"]+)">', html)]


def read_csv(table: tables.Table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(table.csv())))


def test_scores_equal_the_record_exactly(record: dict) -> None:
    rows = {r["set"]: r for r in read_csv(tables.score_table(record))}
    for name, change in record["changes"].items():
        before, after = (record["scores"][k][name] for k in ("before", "after"))
        row = rows[name]
        assert float(row["nats per token before"]) == before["nats"]
        assert float(row["nats per token after"]) == after["nats"]
        assert float(row["nats per token difference"]) == change["difference"]
        assert float(row["nats per token low"]) == change["low"]
        assert float(row["nats per token high"]) == change["high"]
        assert float(row["nats per token relative"]) == change["relative"]
        assert float(row["perplexity after"]) == after["perplexity"]
        assert float(row["bits per byte before"]) == before["bits_per_byte"]
        assert float(row["bits per byte difference"]) == change["bits_per_byte_difference"]
        assert float(row["share of range"]) == change["share_of_range"]
        assert float(row["units"]) == change["count"]


def test_html_and_text_hold_the_same_numbers(record: dict) -> None:
    table = tables.score_table(record)
    found = exact(table.html())
    for name, change in record["changes"].items():
        assert change["difference"] in found
        assert record["scores"]["before"][name]["nats"] in found
    assert "\u22120.331" in table.text()
    assert "2.310" in table.text()
    assert list(rows_of(table)) == ["general", "code", "papers"]  # retention first


def rows_of(table: tables.Table) -> list[str]:
    return [row[0].text for row in table.rows]


def test_text_lines_up_and_wraps(record: dict) -> None:
    table = tables.score_table(record, brief=True)
    assert all(notation.display_width(line) <= 100 for line in table.text().split("\n")[:-1])
    narrow = tables.comparison_table([record, record], None).text(width=60)
    body = [line for line in narrow.split("\n") if line and not line.startswith("Losses")]
    assert max(map(notation.display_width, body)) <= 60
    assert narrow.count("medicine") >= 4  # the first column is repeated in every block
    wide = copy.deepcopy(record)
    wide["changes"] = {"\u6f22\u5b57": record["changes"]["general"], "g": record["changes"]["papers"]}
    lines = tables.score_table(wide, brief=True).text().split("\n")
    assert notation.display_width(lines[4]) == notation.display_width(lines[5])


def test_terminal_gets_no_escape_sequences(record: dict) -> None:
    harmless = tables.score_table({"changes": {"x": record["changes"]["general"]}}).text()
    evil = {"evil\x1b[31m\nrow\r\x07\x9b2J": record["changes"]["general"]}
    text = tables.score_table({"changes": evil}).text()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    assert len(text.split("\n")) == len(harmless.split("\n"))


@pytest.mark.parametrize("lead", ["=", "+", "-", "@", "\t", "\r"])
def test_csv_starts_no_formula(record: dict, lead: str) -> None:
    record["changes"] = {f"{lead}cmd|' /C calc'!A0": record["changes"]["general"]}
    name = next(iter(read_csv(tables.score_table(record))))["set"]
    assert name[0] not in "=+-@\t\r"


def test_removed_is_one_minus_the_ratio() -> None:
    assert tables.removed_share(0.01, 0.1) == pytest.approx(0.9)
    assert tables.removed_share(-0.01, 0.1) == pytest.approx(1.1)
    assert tables.removed_share(0.2, 0.1) == pytest.approx(-1.0)
    assert tables.removed_share(0.1, 0.1) == 0.0
    for baseline in (0.0, -0.1, None, float("nan")):
        assert tables.removed_share(0.05, baseline) is None


def test_arms_table_measures_against_the_baseline(arms: list[dict]) -> None:
    rows = {r["arm"]: r for r in read_csv(tables.comparison_table(arms, "no replay"))}
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
    assert "removed" not in tables.comparison_table(arms, None).csv()
    assert "not among the arms" in tables.comparison_table(arms, "nobody").text()


def test_arms_with_one_name_are_told_apart(record: dict) -> None:
    assert tables.arm_names([record, record, {}]) == ["medicine", "medicine (2)", "arm 3"]


def test_ledger_adds_up_or_says_so(record: dict) -> None:
    table = tables.ledger_table(record)
    rows = {r["source"]: r for r in read_csv(table)}
    group = "tokens from the files"
    for name, entry in record["ledger"].items():
        for key in ("read", "held_out", "dropped", "truncated", "placed"):
            assert int(rows[name][f"{group} {key.replace('_', ' ')}"]) == entry[key]
        assert int(rows[name][f"{group} unaccounted"]) == 0
    total = sum(entry["trained"] for entry in record["ledger"].values())
    assert int(rows["all sources"]["in the training rows trained"]) == total
    assert "accounted for" in table.text()
    record["ledger"]["papers"]["dropped"] -= 17
    broken = tables.ledger_table(record)
    assert int(next(iter(read_csv(broken)))[f"{group} unaccounted"]) == 17
    assert "do not add up: papers" in broken.text()


def test_mixture_and_lineage_equal_their_records(record: dict, tree: dict) -> None:
    row = next(iter(read_csv(tables.mixture_table(record))))
    assert float(row["share planned"]) == 0.9
    assert float(row["share achieved"]) == 0.8999356
    assert int(row["trained tokens achieved"]) == 17_998_712
    table = tables.lineage_table(tree)
    assert [v for v in exact(table.html()) if 1 < v < 3] == [v for line in tree["R"] for v in line if v is not None]
    tree["stages"].pop(0)
    assert rows_of(tables.lineage_table(tree))[0] == "start"
    assert "T-1 = 3" in tables.lineage_summary_table(tree).text()


def test_verdict_without_a_word_comes_from_the_interval() -> None:
    cases = [
        ("learned", -0.2, -0.1, "learnt"),
        ("learned", -0.2, 0.1, "no evidence"),
        ("retained", 0.1, 0.2, "forgot"),
        ("retained", -0.1, 0.2, "no evidence"),
        ("retained", -0.2, -0.1, "kept"),
    ]
    for role, low, high, told in cases:
        assert tables.verdict({"role": role, "low": low, "high": high}) == told
    assert tables.verdict({"role": "learned", "low": -1, "high": -0.5, "verdict": "kept"}) == "kept"
    assert tables.verdict({"verdict": "<b>", "difference": 1}) == ""


JUNK = [None, 3, "x", [], [1], {}, {"a": None}, [[None]], True, float("nan"), 10**400]


@pytest.mark.parametrize("junk", JUNK, ids=lambda j: str(j)[:12])
def test_any_key_may_be_missing_or_wrong(record: dict, tree: dict, junk: object) -> None:
    for key in (*record, None):
        broken = copy.deepcopy(record)
        if key is not None:
            broken[key] = junk
        for build in (tables.score_table, tables.ledger_table, tables.mixture_table):
            written(build(broken))
        written(tables.comparison_table([broken, record], "medicine"))
    for key in tree:
        written(tables.lineage_table({**tree, key: junk}))
        written(tables.lineage_summary_table({**tree, key: junk}))
    for build in (tables.score_table, tables.ledger_table, tables.mixture_table, tables.lineage_table):
        written(build({}))


def written(table: tables.Table) -> None:
    assert table.text(80)
    assert table.csv()
    HTMLParser().feed(table.html())


def test_notation_is_for_readers() -> None:
    assert notation.format_signed(-0.0001) == "0.000"
    assert notation.format_signed(0.01) == "+0.010"
    assert notation.format_fixed(-1234.5, 1) == "\u22121,234.5"
    assert notation.format_percent(0.9, 1) == "90.0 %"
    assert [notation.format_compact(v) for v in (0, 999, 1500, 20_000_000, 134_515_008, 999_950)] == \
        ["0", "999", "1.5k", "20M", "135M", "1M"]  # fmt: skip
    assert [notation.format_duration(v) for v in (4.21, 200, 9918.4, -1, None)] == \
        ["4.2 s", "3 min 20 s", "2 h 45 min", "\u2013", "\u2013"]  # fmt: skip
    assert notation.as_number(True) is None
    assert notation.as_number("1") is None
    assert notation.escape_html("a\x00\ud800\u202eb<") == "a\u2400\ufffd\ufffdb&lt;"


@pytest.mark.parametrize(
    "secret",
    ["hf_" + "a1B2" * 8, "sk-" + "Z9" * 20, "ghp_" + "q" * 36, "AKIA" + "A1" * 8, "glpat-" + "x" * 20],
)
def test_secrets_are_masked(secret: str) -> None:
    assert secret not in notation.mask_secrets(f"HF_TOKEN={secret} postgrad train x --key {secret}")
    assert notation.mask_secrets(f"a {secret} b") == "a [secret] b"
    assert "hunter22" not in notation.mask_secrets("https://me:hunter22@host/x password=hunter22")
    assert notation.mask_secrets("runs/base 9f2c61a0d7b84e55") == "runs/base 9f2c61a0d7b84e55"
