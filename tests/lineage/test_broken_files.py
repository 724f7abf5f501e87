"""Any change to a file of a run is read as before, or is an error of ours that names the file."""

from __future__ import annotations

import copy
import json
import math
import random
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from postgrad.commands.compare import compare_runs
from postgrad.commands.lineage import trace_lineage
from postgrad.commands.list_runs import list_runs
from postgrad.commands.pages import write_page
from postgrad.commands.restore import RestoreRequest, _restore_stage
from postgrad.errors import DataError, PostgradError, StageError
from postgrad.evaluation import before_after
from postgrad.evaluation.before_after import read_scores, write_scores
from postgrad.evaluation.generation_metrics import TaskPredictions
from postgrad.evaluation.perplexity import Scores
from postgrad.lineage.metrics import EvaluationRow, StepRow, format_row, read_metrics
from postgrad.lineage.record import PLAN, read_record
from postgrad.lineage.saved_plan import read_plan, write_plan
from postgrad.models.location import ModelLocation
from postgrad.plan.seen_sources import get_seen_sources, make_replay_source
from postgrad.reports.pages.model_card import model_card
from postgrad.reports.pages.rewrite_report import rewrite_report
from postgrad.run import task_scores
from postgrad.run.task_scores import read_answers, write_answers
from postgrad.storage import array_files
from postgrad.storage.checked_files import CHECKSUM
from postgrad.tracking.points import result_point
from postgrad.tracking.tracker import TrackedRun, describe_run
from postgrad.training.metrics_log import MetricsLog
from tests.tiny_lineage import LineageRuns

ODD: list[Any] = [None, True, -1, 0, 1e308, float("nan"), "", "x", "../..", "\0", [], {}, [None], {"a": 1}, "9" * 400]


def sized(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))


# --- JSON documents, edited by hand ---


def mutated(document: Any, rng: random.Random) -> Any:
    """A document with one value, at a random depth, removed, replaced, or copied from elsewhere."""
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


@pytest.fixture(scope="module")
def folder(runs: LineageRuns, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(runs.replay, tmp_path_factory.mktemp("broken") / "run"))


def readers(folder: Path, runs: LineageRuns) -> dict[str, list[Callable[[], object]]]:
    """By file, all that reads it and loads no model."""
    request = RestoreRequest(folder, prompts=("x",), retained=("y",))
    location = ModelLocation("run", folder / "model", folder)
    return {
        "record.json": [
            lambda: rewrite_report(folder),
            lambda: write_page(compare_runs([folder, runs.naive]), folder / "page.html"),
            lambda: trace_lineage(folder, cache=runs.cache),
            lambda: model_card(read_record(folder)),
            lambda: list_runs(folder).table().html(),
            lambda: result_point(read_record(folder)),
            lambda: get_seen_sources(location),
            lambda: _restore_stage(request, read_record(folder), folder),
        ],
        "plan.json": [
            lambda: _restore_stage(request, read_record(folder), folder),
            lambda: [make_replay_source(s.name, s.origin) for s in read_plan(folder).resolved_sources],
            lambda: _unfinished_report(folder),
            lambda: _check_tracked(describe_run(folder, read_plan(folder))),
        ],
    }


def _check_tracked(run: TrackedRun) -> None:
    """Trackers write files with these names into a folder of the user's."""
    assert Path("x", f"{run.display_name}.{run.id}").parent == Path("x") and math.isfinite(run.created)


def _unfinished_report(folder: Path) -> Path:
    """The page of a run without a record."""
    record = (folder / "record.json").rename(folder / "record")
    try:
        return rewrite_report(folder)
    finally:
        record.rename(folder / "record.json")


def try_mutation(runs: LineageRuns, folder: Path, file: str, seed: int) -> None:
    """Replace a file by a mutant without its checksum, as an editor would leave it, and read it in one way."""
    content = (folder / file).read_text()
    rng = random.Random(seed)
    document = json.loads(content)
    document.pop(CHECKSUM)
    for _ in range(rng.randint(1, 3)):
        document = mutated(document, rng)
    (folder / file).write_text(json.dumps(document))
    try:
        rng.choice(readers(folder, runs)[file])()
    except PostgradError as error:
        assert error.problem and (error.where or error.hint)
    finally:
        (folder / file).write_text(content)


@sized(40)
@given(seed=st.integers(0, 10**9), file=st.sampled_from(["record.json", "plan.json"]))
def test_an_edited_record_or_plan_is_read_or_refused(runs: LineageRuns, folder: Path, seed: int, file: str) -> None:
    try_mutation(runs, folder, file, seed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@sized(5000)
@given(seed=st.integers(0, 10**9), file=st.sampled_from(["record.json", "plan.json"]))
def test_every_edited_record_or_plan_is_read_or_refused(runs: LineageRuns, folder: Path, seed: int, file: str) -> None:
    try_mutation(runs, folder, file, seed)


def test_an_edited_file_is_told_how_to_be_accepted(folder: Path) -> None:
    path = folder / "record.json"
    content = path.read_text()
    try:
        path.write_text(content.replace('"name": "replay"', '"name": "mine"'))
        with pytest.raises(
            StageError, match=r"record\.json: the content does not match[\s\S]*remove its key `checksum`"
        ):
            read_record(folder)
        raw = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in raw.items() if key != CHECKSUM}))
        assert read_record(folder).name == "mine"
    finally:
        path.write_text(content)


# --- scores and answers ---

SCORES = {
    "old": Scores(np.array([0, 0, 1]), np.array([1.5, 2.0, 0.5]), np.array([3, 4, 1]), np.array([20, 7])),
    "a/b": Scores(np.array([0]), np.array([1.0]), np.array([2]), np.array([9])),
}
ANSWERS = {"task": TaskPredictions((("a", "b"), ("a", "c")), (("a",), ("b", "c")))}


def same(found: dict[str, Scores], wanted: dict[str, Scores]) -> bool:
    return found.keys() == wanted.keys() and all(
        np.array_equal(getattr(found[name], key), getattr(wanted[name], key))
        for name in wanted
        for key in ("document_W", "nats_W", "tokens_W", "bytes_N")
    )


def try_bytes(folder: Path, name: str, seed: int, count: int) -> None:
    """Damage a file of scores or of answers in a few places; it is refused, or reads as it was written."""
    path = folder / name
    is_scores = path.suffix == ".npz"
    write_scores(path, SCORES, "run-1") if is_scores else write_answers(path, ANSWERS, "run-1")
    rng, content = random.Random(seed), bytearray(path.read_bytes())
    for _ in range(count):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content[: rng.choice([len(content)] * 5 + [rng.randrange(len(content))])])
    try:
        if is_scores:
            assert same(read_scores(path, "run-1"), SCORES)
        else:
            assert read_answers(path, "run-1") == ANSWERS
    except DataError as error:
        assert error.where == str(path) and error.hint


@sized(150)
@given(seed=st.integers(0, 10**9), count=st.integers(1, 3), name=st.sampled_from(["s.npz", "t.json"]))
def test_damaged_scores_are_refused_or_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, seed: int, count: int, name: str
) -> None:
    try_bytes(tmp_path_factory.getbasetemp(), name, seed, count)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@sized(5000)
@given(seed=st.integers(0, 10**9), count=st.integers(1, 3), name=st.sampled_from(["s.npz", "t.json"]))
def test_all_damaged_scores_are_refused_or_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, seed: int, count: int, name: str
) -> None:
    try_bytes(tmp_path_factory.getbasetemp(), name, seed, count)


def test_an_array_with_a_changed_header_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant, `np.load`, reads as many values as the header says, and never comes to the crc32 behind the rest."""
    path, count = tmp_path / "s.npz", 1000
    zeros = np.zeros(count, np.int64)
    write_scores(path, {"old": Scores(zeros, zeros + 1.0, zeros + 2, np.array([9]))})
    path.write_bytes(path.read_bytes().replace(b"'shape': (1000,), ", b"'shape': (100,),  "))
    with pytest.raises(DataError, match="damaged"):
        read_scores(path)

    def unpack(data: bytes) -> dict[str, np.ndarray]:
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored)

    monkeypatch.setattr(array_files, "_unpack_arrays", unpack)
    assert len(read_scores(path)["old"].nats_W) == 100


def test_an_archive_that_has_lost_entries_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed length in the list of entries hides those behind it. The mutant reads the rest as all there is."""
    path = tmp_path / "s.npz"
    write_scores(path, SCORES, "run-1")
    content = path.read_bytes()
    places = [match.start() for match in re.finditer(rb"PK\x01\x02|PK\x05\x06", content)]
    for first, last in ((0, 1), (1, 3), (len(places) - 2, len(places) - 1)):  # the last one is the owner
        size_place = places[-1] + 12 - (places[last] - places[first])
        changed = bytearray(content[: places[first]] + content[places[last] :])
        changed[size_place : size_place + 4] = struct.pack("<I", size_place - 12 - places[0])
        path.write_bytes(changed)
        with pytest.raises(DataError, match="missing from the list of entries"):
            read_scores(path)
    with monkeypatch.context() as patch:
        patch.setattr(array_files, "_refuse_gaps", lambda data, entries: None)
        assert read_scores(path).keys() == SCORES.keys()  # without the owner


def test_scores_of_another_run_are_refused(tmp_path: Path) -> None:
    write_scores(tmp_path / "s.npz", SCORES, "run-1")
    write_answers(tmp_path / "t.json", ANSWERS, "run-1")
    assert same(read_scores(tmp_path / "s.npz", "run-1"), SCORES) and same(read_scores(tmp_path / "s.npz"), SCORES)
    for read in (read_scores, read_answers):
        with pytest.raises(DataError, match="another run"):
            read(tmp_path / ("s.npz" if read is read_scores else "t.json"), "run-2")


def test_scores_and_answers_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    each = SCORES["old"]
    keys = ("document_W", "nats_W", "tokens_W", "bytes_N")
    np.savez(tmp_path / "s.npz", **{f"old/{key}": getattr(each, key) for key in keys})
    assert same(read_scores(tmp_path / "s.npz", "run-1"), {"old": each})
    stored = {name: {"said": a.predictions_KI, "references": a.references_I} for name, a in ANSWERS.items()}
    (tmp_path / "t.json").write_text(json.dumps(stored))
    assert read_answers(tmp_path / "t.json", "run-1") == ANSWERS


@pytest.mark.parametrize("module", [before_after, task_scores])
def test_broken_scores_of_the_cache_are_absent(tmp_path: Path, module: Any) -> None:
    path = tmp_path / "file"
    read = before_after._read_cached_scores if module is before_after else task_scores._read_cached_answers
    assert read(path, "key") is None
    path.write_bytes(b"\0" * 50)
    assert read(path, "key") is None
    write_scores(path, SCORES, "other") if module is before_after else write_answers(path, ANSWERS, "other")
    assert read(path, "key") is None and read(path, "other") is not None


# --- metrics ---

ROWS = [
    EvaluationRow(step=0, trained_tokens=0),
    *(StepRow(step=n, trained_tokens=8 * n, loss=5.0 / n, learning_rate=0.1) for n in range(1, 7)),
]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(format_row(row, "run-1") for row in ROWS))
    return path


def test_a_damaged_line_is_named_and_the_rest_is_read(log: Path) -> None:
    whole = log.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert read_metrics(log, "run-1", len(ROWS)).rows == ROWS and not read_metrics(log).damage
    rng = random.Random(0)
    for number, line in enumerate(lines):
        for bit in rng.sample(range(8 * (len(line) - 1)), 30):
            changed = bytearray(line)
            changed[bit // 8] ^= 1 << bit % 8
            log.write_bytes(b"".join([*lines[:number], bytes(changed), *lines[number + 1 :]]))
            found = read_metrics(log, "run-1")
            rest = [*ROWS[:number], *ROWS[number + 1 :]]
            if found.rows != ROWS:
                assert [row for row in found.rows if row != ROWS[number]] == rest
                assert found.damage and f"{log}:{number + 1}" in found.damage[0]


def test_missing_lines_and_those_of_another_run_are_told(log: Path) -> None:
    assert len(read_metrics(log, "run-2").damage) == len(ROWS)
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-2]))
    assert read_metrics(log, "run-1", len(ROWS)).damage == [f"{log} has 5 lines, and the run wrote 7"]
    log.unlink()
    assert read_metrics(log, "run-1", len(ROWS)).damage == [f"{log} has 0 lines, and the run wrote 7"]


def test_the_unfinished_last_line_of_a_killed_run_is_no_damage(log: Path) -> None:
    log.write_bytes(log.read_bytes()[:-20])
    assert read_metrics(log, "run-1").rows == ROWS[:-1] and not read_metrics(log, "run-1").damage


def test_a_resumed_run_keeps_the_damaged_lines_before_its_checkpoint(log: Path) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:2], b"rubbish\n", *lines[3:6], b"more\n"]))
    MetricsLog(log, "run-1").rewind(4)
    assert log.read_bytes() == b"".join([*lines[:2], b"rubbish\n", *lines[3:5]])


def test_new_text_without_a_share_is_refused(folder: Path) -> None:
    content = (folder / PLAN).read_text()
    plan = read_plan(folder)
    for source in plan.plan.sources:
        source.share = 0.0
    try:
        write_plan(folder, plan)
        with pytest.raises(StageError, match="has a share of 0"):
            _restore_stage(RestoreRequest(folder, prompts=("x",), retained=("y",)), read_record(folder), folder)
    finally:
        (folder / PLAN).write_text(content)
