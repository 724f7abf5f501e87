"""Any change to a file of a run is read as before, or is an error of ours that names the file."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from postgrad.commands.compare import compare_runs
from postgrad.commands.lineage import trace_lineage
from postgrad.commands.pages import write_page
from postgrad.errors import PostgradError
from postgrad.lineage.saved_plan import read_plan
from postgrad.models.location import ModelLocation
from postgrad.plan.seen_sources import get_seen_sources
from postgrad.reports.pages.rewrite_report import rewrite_report
from postgrad.storage.checked_files import CHECKSUM
from tests.tiny_lineage import LineageRuns

ODD: list[Any] = [None, True, -1, 0, 1e308, float("nan"), "", "x", "../..", "\0", [], {}, [None], {"a": 1}, "9" * 400]
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
SLOW = settings(max_examples=2500, deadline=None, suppress_health_check=list(HealthCheck))


def mutated(document: Any, rng: random.Random) -> Any:
    """A document with one value, at a random depth, removed, replaced, or moved."""
    document = copy.deepcopy(document)
    here = document
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        if not keys:
            return document
        key = rng.choice(keys)
        if isinstance(here[key], (dict, list)) and here[key] and rng.random() < 0.75:
            here = here[key]
            continue
        match rng.randrange(3):
            case 0:
                del here[key]
            case 1:
                here[key] = rng.choice(ODD)
            case 2:
                here[key] = copy.deepcopy(here[rng.choice(keys)])
        return document


def uses(run: Path, runs: LineageRuns, other: Path) -> dict[str, Callable[[], object]]:
    """Every reader of a run's files that loads no model."""
    return {
        "report": lambda: rewrite_report(run),
        "compare": lambda: write_page(compare_runs([run, other]), run / "page.html"),
        "lineage": lambda: trace_lineage(run, cache=runs.cache),
        "plan": lambda: read_plan(run),
        "seen": lambda: get_seen_sources(ModelLocation("run", run / "model", run)),
    }


def try_mutation(runs: LineageRuns, folder: Path, file: str, seed: int) -> None:
    """Replace a file by a mutant without its checksum, as a user's editor would leave it, and read it in all ways."""
    content = (folder / file).read_text()
    document = json.loads(content)
    document.pop(CHECKSUM)
    rng = random.Random(seed)
    for _ in range(rng.randint(1, 3)):
        document = mutated(document, rng)
    (folder / file).write_text(json.dumps(document))
    try:
        for use in uses(folder, runs, runs.naive).values():
            try:
                use()
            except PostgradError as error:
                assert error.problem
    finally:
        (folder / file).write_text(content)


@pytest.fixture(scope="module")
def folder(runs: LineageRuns, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(runs.replay, tmp_path_factory.mktemp("broken") / "run"))


@QUICK
@given(seed=st.integers(0, 10**9), file=st.sampled_from(["record.json", "plan.json"]))
def test_edited_records_and_plans(runs: LineageRuns, folder: Path, seed: int, file: str) -> None:
    try_mutation(runs, folder, file, seed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@SLOW
@given(seed=st.integers(0, 10**9), file=st.sampled_from(["record.json", "plan.json"]))
def test_many_edited_records_and_plans(runs: LineageRuns, folder: Path, seed: int, file: str) -> None:
    try_mutation(runs, folder, file, seed)
