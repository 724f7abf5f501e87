"""Every template runs as it is written: on what is made here, and on the user's own text and model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from postgrad.cli.render import template_text
from postgrad.commands import builtin_corpus
from postgrad.commands.init_templates import TEMPLATE_KINDS, TemplateRequest, WrittenTemplate, write_template
from postgrad.config.stage_file import load_stage
from postgrad.errors import DataError, StageError
from postgrad.lineage.record import read_record
from postgrad.plan.plan import make_plan
from postgrad.run.events import RunFinished
from postgrad.run.run import run_stage
from tests.test_docs import parse

TINY = [
    "tokens=2000",
    "data.sequence_length=64",
    "batch.global_batch_size=8",
    "batch.micro_batch_size=8",
    "compute.threads=1",
    "compute.dtype=float32",
    "evaluation.every=100%",
    "evaluation.eval_tokens=200",
    "evaluation.max_tokens=400",
    "evaluation.samples=0",
    "evaluation.drift_tokens=0",
]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tool's own material, of each file the first lines."""
    folder = tmp_path_factory.mktemp("made")
    builtin_corpus.write_texts(folder)
    for name in builtin_corpus.ROW_GENERATORS:
        builtin_corpus.write_rows(folder, name)
    for file in folder.glob("*.jsonl"):
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:80]))
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(kind: str, made: Path, here: Path, **given: str | None) -> WrittenTemplate:
    asked = {"data": None, "model": None, "replay": None, **given}
    shutil.copytree(made, here / "try-data")
    found = write_template(Path("try.yaml"), kind, TemplateRequest("try", **asked), force=False)  # type: ignore[arg-type]
    for command in found.commands:
        parse(command.removeprefix("postgrad"))
    return found


def trained(file: str, here: Path, cache: Path, *overrides: str) -> RunFinished:
    stage = load_stage(here / file, [*TINY, *overrides])
    *_, last = run_stage(make_plan(stage, here, cache), command="t", cache=cache)
    assert isinstance(last, RunFinished)
    return last


@pytest.mark.parametrize("kind", TEMPLATE_KINDS)
def test_a_template_runs_as_it_is_written(kind: str, made: Path, here: Path, cache: Path) -> None:
    found = written(kind, made, here)
    assert found.files[-1] == Path("try.yaml")
    if TEMPLATE_KINDS[kind].base:
        assert Path("try-base.yaml") in found.files
        trained("try-base.yaml", here, cache, "model.tokenizer.vocab_size=400", "data.sources.0.max_passes=100")
    fresh = ["model.tokenizer.vocab_size=400"] if kind == "from-scratch" else []
    passes = ["data.sources.0.max_passes=1000"]
    last = trained("try.yaml", here, cache, *fresh, *passes)
    assert last.record.status == "finished" and read_record(here / "runs" / "try").changes


@pytest.mark.parametrize("kind", TEMPLATE_KINDS)
def test_every_line_has_room_and_comments_say_the_commands(kind: str, made: Path, here: Path) -> None:
    written(kind, made, here)
    text = (here / "try.yaml").read_text()
    assert "postgrad train try.yaml" in text and "$" not in text
    assert len(text.splitlines()) <= 40
    assert all(len(line) <= 160 for line in text.splitlines())


def test_the_users_own_text_and_model_are_gone_on_with(base: Path, here: Path, made: Path, cache: Path) -> None:
    found = written(
        "continue",
        made,
        here,
        data=str(base / "new.jsonl"),
        model=str(base / "base"),
        replay=str(base / "old.jsonl"),
    )
    assert found.files == (Path("try.yaml"),)
    stage = load_stage(here / "try.yaml")
    assert stage.schedule.peak == 1e-3  # type: ignore[union-attr] # a very small model
    assert [source.share for source in stage.data.sources] == [0.75, 0.25]  # sums and assignments: a strong shift
    assert "a strong shift" in (here / "try.yaml").read_text()
    assert trained("try.yaml", here, cache).record.changes.keys() == {"new", "replay"}


def test_rows_of_the_user_are_classified(here: Path, made: Path, cache: Path) -> None:
    rows = [{"text": f"{word} {n}", "label": word} for n in range(40) for word in ("one", "two")]
    (here / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = written("classify", made, here, data="mine.jsonl")
    assert found.files == (Path("try-base.yaml"), Path("try.yaml"))
    trained("try-base.yaml", here, cache, "model.tokenizer.vocab_size=400", "data.sources.0.max_passes=100")
    record = trained("try.yaml", here, cache, "data.sources.0.max_passes=1000").record
    assert record.scores.after["rows"].metrics["accuracy"].value >= 0


def test_the_shift_of_our_own_texts_is_told_when_they_are_only_just_made(here: Path) -> None:
    said: list[str] = []
    first, again = (
        write_template(
            Path("try.yaml"), "continue", TemplateRequest("try", None, None, None), force=True, notify=said.append
        )
        and (here / "try.yaml").read_text()
        for _ in range(2)
    )
    assert first == again and "a weak shift" in first
    assert said == ["reading this Python's own documentation and library ..."]  # it is there the second time


@pytest.mark.parametrize("kind", ["few-shot", "probe"])
def test_one_file_of_the_users_is_parted(kind: str, here: Path, made: Path, cache: Path) -> None:
    rows = [{"text": f"{word} {n}", "label": word} for n in range(40) for word in ("one", "two")]
    (here / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows[:7]]))
    found = written(kind, made, here, data="mine.jsonl")
    assert (
        "split mine.jsonl: 64 training rows in try-data/rows.train.jsonl, 16 test rows in try-data/rows.test.jsonl"
        in found.notes
    )
    parts = [(here / "try-data" / f"rows.{part}.jsonl").read_text().splitlines() for part in ("train", "test")]
    assert not {*parts[0]} & {*parts[1]}
    assert sorted(json.loads(line)["text"] for part in parts for line in part) == sorted(row["text"] for row in rows)
    trained("try-base.yaml", here, cache, "model.tokenizer.vocab_size=400", "data.sources.0.max_passes=100")
    record = trained("try.yaml", here, cache, "data.sources.0.max_passes=1000").record
    if kind == "few-shot":
        assert {task.name: task.items for task in record.tasks} == {"zero-shot": 16, "two-shot": 16}
        return
    assert record.scores.after["final"].documents == 16
    probed = next(command for command in found.commands if " probe " in command)
    assert "try-data/rows.train.jsonl try-data/rows.test.jsonl" in probed


def test_rows_to_test_are_named_or_refused(here: Path, made: Path) -> None:
    (here / "mine.jsonl").write_text('{"text": "a", "label": "b"}\n' * 100)
    found = written("few-shot", made, here, data="mine.jsonl", test="its test.jsonl")
    assert not any("split" in note for note in found.notes)
    (zero, two) = yaml.safe_load((here / "try-tasks.yaml").read_text())
    assert zero["path"] == two["path"] == "its test.jsonl" and two["few_shot"]["path"] == "mine.jsonl"
    write_template(Path("c.yaml"), "classify", TemplateRequest("c", "mine.jsonl", "bert", None, "t.jsonl"), force=False)
    assert [entry.path for entry in load_stage(here / "c.yaml").evaluation.test] == ["t.jsonl"]  # type: ignore[union-attr]
    with pytest.raises(StageError, match="mlm has no test rows"):
        write_template(Path("b.yaml"), "mlm", TemplateRequest("b", "mine.txt", None, None, "t.jsonl"), force=False)
    with pytest.raises(StageError, match="--test needs training rows"):
        write_template(Path("b.yaml"), "probe", TemplateRequest("b", None, None, None, "t.jsonl"), force=False)
    with pytest.raises(DataError, match="1 distinct rows"):  # copies are one row
        write_template(Path("b.yaml"), "probe", TemplateRequest("b", "mine.jsonl", None, None), force=False)
    assert not (here / "b.yaml").exists() and not (here / "b-data").exists()


def test_nothing_is_made_that_no_file_names(here: Path) -> None:
    said = write_template(Path("try.yaml"), "classify", TemplateRequest("try", "mine.jsonl", "bert", None), force=False)
    assert not (here / "try-data").exists() and not said.notes
    said = write_template(
        Path("mixed.yaml"), "mixed", TemplateRequest("mixed", "mine.txt", "gpt", "old.txt"), force=False
    )
    assert {path.name.split(".")[0] for path in (here / "mixed-data").glob("*.jsonl")} >= {"instructions"}
    assert template_text(said).startswith("generated mixed-data/ ")


def test_what_is_unknown_or_there_is_said(made: Path, here: Path) -> None:
    with pytest.raises(StageError, match="did you mean 'classify'"):
        write_template(Path("try.yaml"), "clasify", TemplateRequest("try", None, None, None), force=False)
    written("mlm", made, here)
    with pytest.raises(StageError, match="already exists"):
        write_template(Path("try.yaml"), "mlm", TemplateRequest("try", None, None, None), force=False)
    write_template(Path("try.yaml"), "mlm", TemplateRequest("try", None, None, None), force=True)
    with pytest.raises(StageError, match="cannot name a run folder"):
        write_template(Path("a b.yaml"), "mlm", TemplateRequest("a b", None, None, None), force=False)
