"""Pages are whole, offline, inert and honest, whatever texts a record holds."""

import base64
import copy
import csv
import hashlib
import io
import math
import os
import re
import stat
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest

from postgrad.errors import DiskError, StageError
from postgrad.lineage.matrix import Lineage
from postgrad.lineage.metrics import EvaluationRow, StepRow
from postgrad.lineage.record import Record
from postgrad.reports.html import document
from postgrad.reports.sections.held_out_tables import score_table
from postgrad.reports.sections.stage_differences import stage_differences_table
from tests.reports.conftest import as_record, draw_comparison, draw_lineage, draw_run, make_metrics, make_record

VOID = {"meta", "br", "link", "img", "input", "hr"}
TAGS = set(
    """
    html head meta title style body a header p h1 h2 h3 h4 b bdi ul ol li nav main section div table
    caption thead tbody tr th td small data details summary figure figcaption svg text rect line path
    circle article dl dt dd pre code span br footer
    """.split()  # noqa: SIM905
)
ATTRIBUTES = set(
    """
    lang charset http-equiv content name class href aria-label aria-labelledby aria-hidden id role
    tabindex scope colspan value data-label download title dir viewbox x y x1 x2 y1 y2 cx cy r d width height text-anchor
    """.split()  # noqa: SIM905
)


class Walk(HTMLParser):
    """Every element and attribute of a page must be one that the report itself writes."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.hrefs: list[str] = []
        self.text: list[str] = []
        self.style = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS, tag
        for name, value in attrs:
            assert name in ATTRIBUTES, (tag, name)
            assert not name.startswith("on")
            if name == "href":
                assert (value or "").startswith(
                    ("#", "data:image/svg+xml;charset=utf-8,", "data:text/csv;charset=utf-8,")
                )
                if (value or "").startswith("#"):
                    self.hrefs.append((value or "")[1:])
                else:
                    assert "download" in dict(attrs)  # saved, never opened
            if name == "id":
                self.ids.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open[-1] == tag, (self.open[-3:], tag)
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.text.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError("a page has no comments")


def walked(html: str) -> Walk:
    walk = Walk()
    walk.feed(html)
    walk.close()
    assert walk.open == []
    assert len(walk.ids) == len(set(walk.ids))
    assert set(walk.hrefs) <= set(walk.ids)
    assert "url(" not in walk.style
    assert "@import" not in walk.style
    html.encode("utf-8")
    return walk


def said(html: str) -> str:
    return " ".join("".join(walked(html).text).split())


PAYLOADS = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "</title><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><img src=x onerror=alert(1)>',
    "'><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "' onmouseover='alert(1)",
    "<svg onload=alert(1)>",
    "</svg><script>alert(1)</script>",
    "</text><a href='javascript:alert(1)'>x</a>",
    "javascript:alert(1)",
    "<a href=javascript:alert(1)>x</a>",
    "<iframe src=//evil.example></iframe>",
    "<base href=//evil.example>",
    "<meta http-equiv=refresh content='0;url=//evil.example'>",
    "<link rel=stylesheet href=//evil.example>",
    "<style>*{background:url(//evil.example)}</style>",
    "<form action=//evil.example><button>x</button></form>",
    "<object data=//evil.example>",
    "<embed src=//evil.example>",
    "<math><mtext></mtext></math>",
    "<!--",
    "-->",
    "]]><script>alert(1)</script>",
    "<![CDATA[<script>alert(1)</script>]]>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&#60;script&#62;",
    "</pre><script>alert(1)</script>",
    "\u003cscript\u003ealert(1)",
    "<scr\x00ipt>alert(1)</scr\x00ipt>",
    "{{7*7}}${7*7}",
    "<details open ontoggle=alert(1)>",
    "\ud800<b>\udfff",
    "\u202e<b>gpj.exe",
    "<plaintext>",
    "`<x`",
]


def poisoned(value: object, payload: str, keep: tuple[str, ...] = ()) -> object:
    """The same structure with the payload in every text and every name."""
    if isinstance(value, dict):
        fixed = set(RECORD_KEYS)
        return {
            (k if k in fixed else f"{k}{payload}"): (v if k in keep else poisoned(v, payload, keep))
            for k, v in value.items()
        }
    if isinstance(value, list):
        return [poisoned(v, payload, keep) for v in value]
    return f"{value}{payload}" if isinstance(value, str) else value


def _field_names(kind: type) -> set[str]:
    """The keys of a document and all of its parts."""
    return {
        name for part in kind.model_json_schema().get("$defs", {}).values() for name in part.get("properties", {})
    } | set(kind.model_fields)


RECORD_KEYS = _field_names(Record) | _field_names(StepRow) | _field_names(EvaluationRow) | _field_names(Lineage)


@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_no_text_of_the_data_becomes_markup(record: dict, metrics: list[dict], tree: dict, payload: str) -> None:
    # So that the poisoned names still reach the figures; and ids and times in which such text is refused on reading.
    keep = ("role", "kind", "status", "verdict", "id", "created", "finished")
    few = [poisoned(m, payload, keep) for m in metrics[::150] + [m for m in metrics if m["kind"] == "evaluation"]]
    record["contamination"]["general"]["duplicates"] = 2
    bad = poisoned(record, payload, keep)
    bad["stage"]["name"] = record["stage"]["name"]  # a path is refused
    for html in (
        draw_run(bad, few),
        draw_comparison([bad, bad], [few, few], payload, f"medicine{payload}"),
        draw_lineage(poisoned(tree, payload)),
    ):
        walk = walked(html)
        assert not re.search(r"<script|<img|<iframe|<base|<form|<object|<embed", html, re.IGNORECASE)
        inert = "".join(c for c in payload if c.isalnum())[:6]
        assert inert in "".join(c for c in "".join(walk.text) if c.isalnum())  # shown, not swallowed


def test_a_missing_escape_would_be_seen(record: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: without escaping, the walk above must fail."""
    monkeypatch.setattr(document, "escape_html", lambda text, limit=0: str(text))
    record["name"] = "<script>alert(1)</script>"
    with pytest.raises(AssertionError):
        walked(draw_run(record, []))


def test_policy_allows_the_style_sheet_and_nothing_else(record: dict, metrics: list[dict]) -> None:
    html = draw_run(record, metrics)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', html)
    assert policy
    assert html.index("Content-Security-Policy") < html.index("<title>") < html.index("<style>")
    digest = base64.b64encode(hashlib.sha256(walked(html).style.encode()).digest()).decode()
    assert policy[1] == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert " style=" not in html
    assert "http://" not in html
    assert "https://" not in html


def test_run_page_says_the_result_in_words(record: dict, metrics: list[dict]) -> None:
    text = said(draw_run(record, metrics))
    assert (
        "Learned papers: 2.310 \u2192 1.979 nats per token (\u22120.331, 95 % interval"
        " \u22120.350 to \u22120.312)." in text
    )
    assert "Kept general: 2.442 \u2192 2.452 nats per token (+0.010" in text
    assert "The retention gate passed." in text
    assert "postgrad train medicine.yaml" in text
    assert "bf16 products are 5.1 x as fast here" in text
    assert record["fingerprints"]["tokenizer"] in text
    assert "warmup: 1%" in text


def test_every_number_of_the_table_is_the_records(record: dict, metrics: list[dict]) -> None:
    found = {float(v) for v in re.findall(r'<data value="([^"]+)">', draw_run(record, metrics))}
    for name, change in record["changes"].items():
        for key in (
            "difference",
            "low",
            "high",
            "bits_per_byte_difference",
            "share_of_range",
            "relative_difference",
            "unit_count",
        ):
            assert change[key] in found, (name, key)
        for when in ("before", "after"):
            for key in ("nats", "perplexity", "bits_per_byte"):
                assert record["scores"][when][name][key] in found
    for entry in record["token_ledger"].values():
        assert set(entry.values()) <= found


def test_figures_have_labels_tables_and_two_widths(record: dict, metrics: list[dict]) -> None:
    html = draw_run(record, metrics)
    svgs = re.findall(r"<svg [^>]*>", html)
    assert len(svgs) >= 18
    assert all('role="img"' in s and 'aria-label="' in s for s in svgs)
    widths = [re.search(r'viewBox="0 0 (\d+)', s)[1] for s in svgs]
    assert set(widths) == {"560", "358"}
    assert "The numbers" in html
    assert html.count("<table") == html.count("<caption>")
    scrolls = re.findall(r'<div class="scroll"[^>]*>', html)
    assert scrolls
    assert all('tabindex="0" role="region" aria-label="' in s for s in scrolls)
    assert '<html lang="en">' in html
    levels = [int(n) for n in re.findall(r"<h(\d)", html)]
    assert levels[0] == 1
    assert levels.count(1) == 1


def test_early_part_has_its_own_panel_only_with_points_there(record: dict, metrics: list[dict]) -> None:
    assert "Retained sets, the first 2 %" in said(draw_run(record, metrics))
    late = [m for m in metrics if m["kind"] == "step" or not 0 < m["step"] < 30]
    assert "Retained sets, the first 2 %" not in said(draw_run(record, late))


def test_a_stopped_run_says_so(record: dict, metrics: list[dict]) -> None:
    record["status"] = "stopped"
    del record["scores"]["after"], record["changes"], record["retention_gate"], record["finished"]
    text = said(draw_run(record, [m for m in metrics if m["step"] <= 500]))
    assert "This run was stopped after step 500 of 1,221." in text
    assert "There are no scores after training" in text
    assert "Learned papers" not in text
    assert re.search(r"At the last evaluation, after 7\.\d+M trained tokens, in nats per token: general \+0", text)
    assert "There are no scores" in said(draw_run(record, []))


def test_a_failed_gate_says_so(record: dict, metrics: list[dict]) -> None:
    record["status"] = "gate-failed"
    record["retention_gate"] = {
        "max_forgetting": 0.02,
        "worst": {"set": "general", "relative_difference": 0.052, "relative_high": 0.061},
        "passed": False,
    }
    text = said(draw_run(record, metrics))
    assert (
        "The retention gate failed. The loss on the worst retained set, general, changed by 5.2 % (upper end 6.1 %);"
        " 2.0 % was allowed." in text
    )
    del record["retention_gate"]
    assert "The retention gate failed." in said(draw_run(record, []))


def test_overlap_and_bad_losses_are_told(record: dict, metrics: list[dict]) -> None:
    record["contamination"]["general"] |= {"duplicates": 9, "half_overlap": 12}
    rows = copy.deepcopy(metrics)
    rows[100]["loss"] = math.nan
    text = said(draw_run(record, rows))
    assert "9 of 812 documents are duplicates" in text
    assert "1 training losses" in text or "1 training loss is" in text


def test_only_what_is_drawn_again_is_said_to_be(record: dict, metrics: list[dict]) -> None:
    assert "have a panel of their own" in said(draw_run(record, metrics))
    steps = [row for row in metrics if row["kind"] == "step"]
    looks = [row for row in metrics if row["kind"] == "evaluation"]
    assert "have a panel of their own" not in said(draw_run(record, [*steps, *looks[:1], *looks[-2:]]))


def test_a_few_documents_that_share_passages_are_no_alarm(record: dict) -> None:
    for half, warned in ((8, False), (9, True)):  # of 812
        record["contamination"]["general"] |= {"duplicates": 0, "half_overlap": half}
        assert ("The training data contains held-out text" in said(draw_run(record, []))) is warned


def test_of_a_classifier_the_decisions_come_first(record: dict) -> None:
    """No perplexity and no bits per byte, which labels do not have."""
    name = next(iter(record["changes"]))
    for side, value in (("before", 0.25), ("after", 0.75)):
        record["scores"][side][name]["metrics"] = {
            "accuracy": {"value": value, "low": value - 0.05, "high": value + 0.05}
        }
    assert "nats per token" in said(draw_run(record, [])) and "bits per byte" in score_table(as_record(record)).text()
    record["model"]["task"] = "classify"
    text = said(draw_run(record, []))
    assert "accuracy 0.250 \u2192 0.750 (95 % interval 0.700 to 0.800), loss" in text
    assert "0.250 \u2192 0.750 accuracy" in text and "nats per label" in text
    for table in (score_table(as_record(record)).text(), score_table(as_record(record), brief=True).text()):
        assert "nats per label" in table and "bits per byte" not in table and "perplexity" not in table


@pytest.mark.parametrize("key", ["plan", "model", "scores", "changes", "samples", "totals", "name"])
def test_a_damaged_record_is_an_error_that_names_the_field(record: dict, key: str) -> None:
    with pytest.raises(StageError, match=rf"{key}[\s\S]*hint:"):
        draw_run({**record, key: [[3]]}, [])


def test_each_optional_key_may_be_left_out(record: dict, metrics: list[dict]) -> None:
    for key, field in Record.model_fields.items():
        if not field.is_required() and key in record and key != "format":
            walked(draw_run({k: v for k, v in record.items() if k != key}, metrics[:20]))
    assert "This run is not finished." in said(draw_run({**record, "status": "running"}, []))
    walked(draw_comparison([], [], "", None))


def test_a_hundred_thousand_rows_stay_small(record: dict) -> None:
    rows = []
    for i in range(100_000):
        loss = 2.3 + math.sin(i * 0.7) * 0.1
        rows.append(
            {
                "kind": "step",
                "step": i + 1,
                "trained_tokens": (i + 1) * 4096,
                "loss": loss,
                "learning_rate": 1e-5,
                "grad_norm": 1.0 + loss % 0.1,
                "loss_sums_by_source": {s: [loss * 9.0, 9] for s in "abcdef"},
            }
        )
        if i % 50 == 0:
            sets = {
                f"set {k}": {
                    "role": "retained" if k % 2 else "learned",
                    "nats": 2.0 + k,
                    "change": 0.01 * k,
                    "low": 0.01 * k - 0.1,
                    "high": 0.01 * k + 0.1,
                }
                for k in range(8)
            }
            rows.append({"kind": "evaluation", "step": i, "trained_tokens": i * 4096, "sets": sets})
    record["schedule_curve"] = [[i, 1e-5] for i in range(100_000)]
    record["samples"] = [{"prompt": "p" * 50_000, "before": "b" * 50_000, "after": "\u6f22" * 50_000}] * 40
    record["stage_yaml"] = "x" * 1_000_000
    assert len(draw_run(record, iter(rows)).encode()) <= 1_400_000  # half of it are the figures as files


def test_comparison_ranks_marks_and_overlays(arms: list[dict], metrics: list[dict]) -> None:
    html = draw_comparison(arms, [metrics] * len(arms), "Five ways", "no replay")
    text = said(html)
    assert "Five ways" in text
    assert "replay 10 % + distill forgot least: +0.002 nats per token on retained text." in text
    assert "98 % less forgetting than no replay" in text
    assert "no replay learned most" in text
    assert html.count(">switch<") >= 2 * 3
    for arm in arms:
        assert arm["name"] in text
        assert html.count(arm["samples"][0]["after"].strip()[:20]) >= len(arms)


def test_comparison_survives_uneven_arms(arms: list[dict], metrics: list[dict]) -> None:
    del arms[1]["scores"]["after"], arms[1]["changes"]
    arms[1]["status"] = "stopped"
    text = said(draw_comparison(arms, [metrics], "t", "missing"))
    assert "Not finished: replay 5 %" in text
    assert "not among the arms" in text
    walked(draw_comparison(arms[:1], [metrics], "t", arms[0]["name"]))


def test_lineage_page_shows_the_matrix_and_its_denominators(tree: dict) -> None:
    html = draw_lineage(tree)
    found = [float(v) for v in re.findall(r'<td class="h[^"]*"><data value="([^"]+)">', html)]
    assert found == [v for line in tree["R"] for v in line if v is not None]
    assert len(re.findall(r'<td class="h h. own">', html)) == 2
    assert "T-1 = 3" in said(html)
    assert "Forgetting over the chain: +0.037" in said(html)


def test_secrets_do_not_leave(record: dict) -> None:
    secret = "hf_" + "Ab1" * 12
    record["command"] = f"HF_TOKEN={secret} postgrad train s.yaml"
    record["stage_yaml"] = f"model: https://me:{secret}@hub.example/x"
    record["model"]["start_model"] = f"https://me:{secret}@hub.example/x"
    record["parents"][0]["path"] = f"s3://key:{secret}@bucket"
    record["machine"]["env"] = {"HF_TOKEN": secret}
    assert secret not in draw_run(record, [])
    assert secret not in draw_comparison([record], [[]], "t", None)


def test_write_publishes_whole_pages_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "new" / "report.html"
    assert document.write_page(target, "one \u2713") == target
    assert target.read_text(encoding="utf-8") == "one \u2713"
    assert stat.S_IMODE(target.stat().st_mode) & stat.S_IRUSR
    before = os.replace

    def broken(*_: object) -> None:
        raise OSError(28, "the disk is full on device")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(DiskError, match="the disk is full"):
        document.write_page(target, "two")
    monkeypatch.setattr(os, "replace", before)
    assert target.read_text(encoding="utf-8") == "one \u2713"
    assert list(target.parent.iterdir()) == [target]
    document.write_page(target, "three")
    assert target.read_text(encoding="utf-8") == "three"
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError):
        document.write_page(tmp_path / "file" / "report.html", "x")


def test_reports_need_neither_torch_nor_numpy() -> None:
    pages = "run_page, comparison_page, lineage_page"
    heavy = "{'torch', 'transformers', 'numpy'}"
    code = f"import sys; from postgrad.reports.pages import {pages}; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_penalties_have_a_curve_of_their_own(record: dict, metrics: list[dict]) -> None:
    plain_page = draw_run(record, metrics)
    pulled = [
        {**row, "penalties": {"anchor": 0.01 * row["step"]}} if row.get("kind") == "step" else row for row in metrics
    ]
    assert "Penalties" not in plain_page
    found = draw_run(record, pulled)
    assert "Penalties" in found and "anchor" in found
    named = {**record, "penalties": [{"name": "<anchor>", "strength": 16.7, "skipped": []}]}
    assert "Penalty: &lt;anchor&gt;" in draw_run(named, pulled)


def test_a_dip_that_heals_is_drawn_and_said() -> None:
    record = make_record()
    shown = draw_run(record, make_metrics(record))
    words = said(shown)
    assert "Stability gap of general: after the switch its loss rose by" in words
    assert ">gap<" in shown
    steady = [row for row in make_metrics(record) if row["kind"] == "evaluation"]
    for i, row in enumerate(steady):  # a mutant: the same rise, and it stays
        for entry in row["sets"].values():
            entry |= {"change": 0.01 * i, "low": 0.01 * i - 0.001, "high": 0.01 * i + 0.001}
    shown = draw_run(record, steady)
    assert "Stability gap" not in said(shown) and ">gap<" not in shown


def test_figures_can_be_saved_with_their_numbers(record: dict, metrics: list[dict]) -> None:
    page = draw_run(record, iter(metrics))
    files = {
        name: unquote(data.split(",", 1)[1])
        for name, data in re.findall(r'download="([^"]+)"[^>]*href="([^"]+)"', page)
    }
    assert len(files) > 6 and all(name.endswith((".svg", ".csv")) for name in files)
    loss = list(csv.reader(io.StringIO(unescape(files["training-loss.csv"]))))
    assert loss[0] == ["series", "trained tokens", "nats per token", "low", "high"]
    losses = {f"{row['trained_tokens']:.6g}": row["loss"] for row in metrics if row["kind"] == "step"}
    steps = [(float(x), float(y)) for name, x, y, *_ in loss[1:] if name == "each step"]
    assert len(steps) > 300 and all(y == pytest.approx(losses[f"{x:.6g}"], rel=1e-5) for x, y in steps)
    root = ElementTree.fromstring(unescape(files["training-loss.svg"]))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "var(--c0)" in (root[0].text or "") and "dark" not in (root[0].text or "")


def test_a_comparison_tells_in_which_keys_the_stages_differ(arms: list[dict], metrics: list[dict]) -> None:
    first, second = copy.deepcopy(arms[:2])
    first["stage"] = {"name": "a", "seed": 0, "data": {"mixture": [{"name": "old", "share": 0.1}, {"name": "new"}]}}
    second["stage"] = {"name": "b", "seed": 0, "data": {"mixture": [{"name": "new"}, {"name": "old", "share": 0.2}]}}
    second["stage"]["schedule"] = {"kind": "wsd", "warmup": None}
    table = stage_differences_table([as_record(first), as_record(second)], ["a", "b"])
    assert [tuple(cell.text for cell in row) for row in table.rows] == [
        ("data.mixture.old.share", "0.1", "0.2"),
        ("schedule.kind", "\u2013", "wsd"),
    ]
    assert "What differs" in said(draw_comparison([first, second], [metrics, metrics], "t", None))
    first["stage"]["data"]["mixture"] = [{"name": "new", "split": "train", "share": None}]
    second["stage"]["data"]["mixture"] = [
        {"name": "new", "split": "train", "share": 0.9},
        {"name": "old", "split": "train", "share": 0.1, "select": []},
    ]
    del second["stage"]["schedule"]
    table = stage_differences_table([as_record(first), as_record(second)], ["a", "b"])
    assert [tuple(cell.text for cell in row) for row in table.rows] == [
        ("data.mixture.new.share", "\u2013", "0.9"),
        ("data.mixture.old", "\u2013", "share 0.1"),
    ]
    first["stage"] = {"objectives": [{"kind": "distill", "weight": 1}, {"kind": "distill", "weight": 2}]}
    second["stage"] = {"objectives": [{"kind": "distill", "weight": 3}, {"kind": "distill", "weight": 2}]}
    table = stage_differences_table([as_record(first), as_record(second)], ["a", "b"])
    assert [row[0].text for row in table.rows] == ["objectives.distill.weight"]
    second["stage"] = first["stage"]
    assert "What differs" not in said(draw_comparison([first, second], [metrics, metrics], "t", None))
