"""Law: a secret in a path, a URL or the command is in no file of a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from postgrad.config import stage as stage_config
from postgrad.foreign_text import mask_secrets
from postgrad.lineage import metrics
from postgrad.lineage.metrics import EvaluationRow, SetRow, format_row, parse_row, read_metrics
from postgrad.lineage.record import read_record
from postgrad.run.run import run_stage
from postgrad.storage import checked_files
from postgrad.storage.checked_files import find_damage
from tests.conftest import StageOf
from tests.run.test_run import plan_of

SECRET = "f3a9c2e1b7d6"


def leaks(run: Path) -> set[str]:
    return {path.name for path in run.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()}


@pytest.fixture
def train(stage_of: StageOf, base: Path, cache: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A run whose texts have a signed URL as their names."""

    def make(name: str) -> Path:
        sources, paths = [], dict[str, list[str]]()
        for role, text in (("retained", "old-heldout"), ("learned", "new-heldout"), ("train", "new")):
            path = tmp_path / f"{text}.jsonl?sig={SECRET}&part=1.jsonl"
            shutil.copy(base / f"{text}.jsonl", path)
            paths[role] = [str(path)]
        sources = [{"name": "new", "path": paths.pop("train")[0]}]
        evaluation = {**stage_of()["evaluation"], **paths}
        data = {"sequence_length": 32, "sources": sources}
        raw = stage_of(output=str(tmp_path / name), tokens=2000, evaluation=evaluation, data=data)
        command = f"postgrad train https://me:{SECRET}@host/stage.yaml"
        list(run_stage(plan_of(raw, cache), command=command, cache=cache))
        return tmp_path / name

    return make


def test_a_secret_is_in_no_file_of_a_run(train: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run = train("run")
    assert leaks(run) == set()
    assert read_record(run).status == "finished" and read_metrics(run / "metrics.jsonl").damage == []
    # Mutants: names that held-out sets take from their paths, and documents, as they are.
    monkeypatch.setattr(stage_config, "mask_secrets", lambda text: text)
    assert {"metrics.jsonl", "before.npz", "after.npz", "start.npz", "report.html"} <= leaks(train("names"))
    monkeypatch.setattr(checked_files, "mask_secrets", lambda text: text)
    assert {"plan.json", "record.json"} <= leaks(train("documents"))


def test_lines_of_metrics_have_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = {f"https://me:{SECRET}@host/x": SetRow(nats=1.0, change=0.1, low=0.0, high=0.2)}
    row = EvaluationRow(step=3, trained_tokens=9, sets=sets)
    line = json.loads(format_row(row, "run"))
    assert SECRET not in json.dumps(line) and not find_damage(line, "run")
    assert parse_row(line).step == 3 and mask_secrets(json.dumps(line)) == json.dumps(line)
    monkeypatch.setattr(metrics, "mask_secrets", lambda text: text)  # the mutant
    assert SECRET in format_row(row, "run")
