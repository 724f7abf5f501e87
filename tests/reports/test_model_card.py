"""The model card says what the record says, as the Hub reads it, whatever names the record holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from postgrad.commands.export import export_model
from postgrad.lineage.record import NewModel, Record, read_record
from postgrad.reports.html import notation
from postgrad.reports.html.notation import escape_markdown
from postgrad.reports.pages.model_card import CARD, CardOptions, card_options, model_card, write_model_card
from tests.tiny_lineage import LineageRuns

HOSTILE = (
    "x`*_<img src=x onerror=alert(1)>[a](javascript:alert(1))|\n---\nlicense: mit\n# h @all https://e.org \x1b[31m"
)


def load(text: str, folder: Path) -> ModelCard:
    path = folder / "card.md"
    path.write_text(text)
    return ModelCard.load(path)


def test_the_published_model_has_a_card_that_the_hub_reads(runs: LineageRuns) -> None:
    record, card = read_record(runs.replay), ModelCard.load(runs.replay / "model" / CARD)
    assert card.data.library_name == "transformers" and "postgrad" in card.data.tags
    results = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results or ()}
    change = record.changes["old-heldout"]
    assert results["old-heldout (retained)", "change of the loss, after minus before"] == pytest.approx(
        change.difference, abs=1e-6
    )
    assert results["new-heldout (learned)", "loss"] == pytest.approx(record.scores.after["new-heldout"].nats, abs=1e-6)
    assert "| old | replay |" in card.text and "1. base\n2. one," in card.text and "license" not in card.data.to_dict()
    assert yaml.safe_load(re.search(r"```yaml\n(.*?)```", card.text, re.DOTALL)[1])["name"] == "replay"  # type: ignore[index]


def test_an_export_gets_the_card_of_its_run_and_never_that_of_the_start_model(
    runs: LineageRuns, base: Path, tmp_path: Path
) -> None:
    assert export_model(str(runs.replay), tmp_path / "out", license_name="mit").has_card
    assert ModelCard.load(tmp_path / "out" / CARD).data.license == "mit"
    assert not export_model(str(base / "base"), tmp_path / "plain").has_card
    assert not (tmp_path / "plain" / CARD).exists()
    (tmp_path / "plain" / CARD).write_text("mine")
    assert not write_model_card(tmp_path / "plain", runs.replay, read_record(runs.replay))
    assert (tmp_path / "plain" / CARD).read_text() == "mine"


def test_base_model_and_data_sets_are_named_where_the_hub_has_them(runs: LineageRuns, tmp_path: Path) -> None:
    record = read_record(runs.first)
    key = next(iter(record.consumed))
    record.consumed[key].origin = {"hub": "owner/text"}
    record.model.start_model = record.model.source = "owner/base"
    card = load(model_card(record), tmp_path)
    assert card.data.base_model == "owner/base" and card.data.datasets == ["owner/text"]
    record.model.source = "/home/me/owner/base"  # a folder of that name
    assert load(model_card(record), tmp_path).data.base_model is None
    record.model.new_model = NewModel()
    assert "A new model with random weights" in model_card(record)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert card_options(tmp_path, None) == CardOptions("peft", None)


@pytest.fixture
def hostile(runs: LineageRuns) -> Record:
    record = read_record(runs.replay)
    record.name = record.model.start_model = record.model.source = HOSTILE
    for names in (record.changes, record.scores.before, record.scores.after):
        names[HOSTILE] = names.pop("old-heldout")
    record.totals.sources[0].name = HOSTILE
    record.stage["schedule"] = {"kind": HOSTILE}
    record.stage_yaml = "```\n<script>alert(1)</script>\nhf_" + "a" * 30
    return record


def harms(text: str) -> bool:
    """Whether a name could end the front matter, or show as a tag, a link or another table cell."""
    front, _, body = text.removeprefix("---\n").partition("\n---\n")
    known = {"license", "library_name", "pipeline_tag", "tags", "model-index", "base_model", "datasets"}
    prose = re.sub(r"`{3,}yaml\n.*?\n`{3,}\n", "", body, flags=re.DOTALL)
    return (
        not set(yaml.safe_load(front)) <= known - {"license"}
        or bool(re.search(r"(?<!\\)[<\[@]|\x1b|(?<!\\)://", prose))
        or len({line.count("|") - line.count("\\|") for line in prose.splitlines() if line.startswith("| ")}) > 3
    )


def test_hostile_names_stay_text(hostile: Record, tmp_path: Path) -> None:
    text = model_card(hostile)
    assert not harms(text) and "hf_aaaa" not in text
    assert load(text, tmp_path).data.license is None


def test_without_the_escape_they_would_not(hostile: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    import postgrad.reports.pages.model_card as module

    monkeypatch.setattr(module, "escape_markdown", lambda value, limit=0: str(value))
    assert harms(model_card(hostile))
    assert notation.escape_markdown("a|b") == escape_markdown("a|b") == "a\\|b"
