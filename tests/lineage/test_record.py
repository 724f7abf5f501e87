"""Records, plans and metrics are typed; files of the previous format read as the present one; damaged ones are errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from postgrad.errors import StageError
from postgrad.lineage.metrics import EvaluationRow, StepRow, read_metrics
from postgrad.lineage.previous_format import PLAN_KEYS, RECORD_KEYS, ROW_KEYS, Renames
from postgrad.lineage.record import FORMAT, Record, read_record, record_schema, write_record
from postgrad.lineage.saved_plan import SavedPlan, read_plan, write_plan
from postgrad.reports.pages.rewrite_report import rewrite_report

EARLIER = Path(__file__).parent / "data" / "format-1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder of the previous format."""
    return Path(shutil.copytree(EARLIER, tmp_path / "run"))


def raw_record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "record.json").read_text())


def paths(data: Any, at: str = "") -> set[str]:
    """Every path of keys, with `*` for the items of lists and the values of mappings."""
    if isinstance(data, list):
        return {path for item in data for path in paths(item, f"{at}.*" if at else "*")}
    if not isinstance(data, dict):
        return set()
    found = set()
    for key, value in data.items():
        for step in (key, "*"):
            path = f"{at}.{step}" if at else step
            found |= {path} | paths(value, path)
    return found


def test_an_earlier_record_has_every_value_under_its_new_name(folder: Path) -> None:
    raw, record = raw_record(folder), read_record(folder)
    assert record.format == FORMAT and record.stage_folder == raw["root"]
    assert record.model.start_model == raw["model"]["start"] and record.model.context_length == 1024
    assert record.model.new_model and record.model.new_model.vocab_size == raw["model"]["fresh"]["vocabulary"]
    assert record.totals.sources[0].trained_tokens == raw["achieved"]["sources"][0]["trained"]
    assert record.totals.sources[0].loss and record.totals.sources[0].loss.first_tenth == 2.4
    assert record.retention_gate and record.retention_gate.worst.relative_high == raw["gate"]["worst"]["high"]
    assert record.changes["general"].relative_difference == raw["changes"]["general"]["relative"]
    assert record.published_checkpoint and record.published_checkpoint.evaluations == raw["chosen"]["looks"]
    assert record.drift and record.drift.changed_weights.count == 90
    assert record.relearning and record.relearning.sets["general"].recovered.value == 0.331
    assert record.sparse_update and record.sparse_update.total_weights == 100
    assert record.penalties[0].bytes["mmap"] == 800 and record.penalties[0].skipped == ["head"]
    assert record.tasks[0].scoring == "multiple-choice" and record.tasks[0].before["accuracy"].values_by_seed == [0.4]
    assert record.task_clusters[0].trained_on and record.contamination["general"].any_overlap == 3
    assert record.plan.sources[0].selection[1].score_histogram
    assert record.consumed["77d1"].tokens == 19_000_000 and record.parents[0].trained_tokens == 400_000


@pytest.mark.parametrize(
    ("name", "renames"), [("record.json", RECORD_KEYS), ("plan.json", PLAN_KEYS)], ids=["record", "plan"]
)
def test_the_data_has_nearly_every_renamed_key(name: str, renames: Renames) -> None:
    """So that a wrong line of the table cannot hide."""
    there = paths(json.loads((EARLIER / name).read_text()))
    missing = {path for path, _ in renames if path not in there}
    classifier = {path for path in missing if ".metrics." in path or path.startswith("pseudo_perplexity")}
    assert missing - classifier <= {"plan.sources.*.selected.*.kept.*.like"}


def test_earlier_metrics_and_plans_are_read(folder: Path) -> None:
    first, step, evaluation = read_metrics(folder / "metrics.jsonl")
    assert isinstance(first, EvaluationRow) and isinstance(step, StepRow) and isinstance(evaluation, EvaluationRow)
    assert step.loss_grad_norm == 0.7 and step.updated_weights == 5 and step.trained_tokens > 0
    assert step.loss_sums_by_source.keys() == {"papers", "replay"} and step.learning_rate is not None
    assert evaluation.checkpoint_selection and evaluation.checkpoint_selection.relative_high == 0.004
    assert {path for path, _ in ROW_KEYS if "." not in path} <= {
        key for line in (folder / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)
    }
    plan = read_plan(folder)
    assert plan.start_model == "./base" and plan.resolved_sources[0].prior_tokens == 5
    assert plan.penalty_strengths["anchor"]["gradient_norm"] == 1.0 and plan.consumed_before["77d1"].name == "papers"


def test_what_is_written_is_read_back_equal(folder: Path) -> None:
    record, plan = read_record(folder), read_plan(folder)
    write_record(folder, record)
    write_plan(folder, plan)
    assert read_record(folder) == record and read_plan(folder) == plan
    assert raw_record(folder)["format"] == FORMAT and not {"achieved", "gate", "root"} & raw_record(folder).keys()


def test_an_earlier_run_has_a_page(folder: Path) -> None:
    assert "Learned" in rewrite_report(folder).read_text()
    (folder / "record.json").unlink()
    (folder / "stage.yaml").write_text("name: medicine\n")
    assert "This run is not finished." in rewrite_report(folder).read_text()


@pytest.mark.parametrize("kind", [Record, SavedPlan])
def test_unknown_fields_are_ignored(folder: Path, kind: type[Record | SavedPlan]) -> None:
    document = read_record(folder) if kind is Record else read_plan(folder)
    assert kind.model_validate({**document.as_json(), "of_tomorrow": [1]}) == document


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": FORMAT + 1}, r"record format 3[\s\S]*hint:\s+a newer postgrad"),
        ({"format": None}, r"record format None[\s\S]*hint:"),
        ({"name": None}, r"name: input should be a valid string[\s\S]*hint:"),
        ({"plan": {"steps": "many"}}, r"plan\.steps: [\s\S]*hint:"),
    ],
)
def test_an_unreadable_record_is_an_error_with_a_hint(folder: Path, change: dict[str, Any], message: str) -> None:
    record = read_record(folder).as_json()
    (folder / "record.json").write_text(json.dumps({**record, **change}))
    with pytest.raises(StageError, match=message):
        read_record(folder)


def test_the_schema_accepts_what_is_written(folder: Path) -> None:
    schema = json.loads(record_schema())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(read_record(folder).as_json(), schema, jsonschema.Draft202012Validator)
    without = {k: v for k, v in read_record(folder).as_json().items() if k != "model"}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(without, schema, jsonschema.Draft202012Validator)
