"""Every template runs as it is written: on what is made here, and on the user's own text and model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from postgrad.cli.main import app
from postgrad.cli.render import template_text
from postgrad.commands import builtin_corpus
from postgrad.commands.init import write_stage
from postgrad.commands.init_templates import TEMPLATE_KINDS, TemplateRequest, WrittenTemplate, write_template
from postgrad.config.stage_file import load_stage
from postgrad.data.read.documents import detect_kind
from postgrad.data.read.files import RawSource
from postgrad.errors import DataError, PostgradError, StageError
from postgrad.lineage.record import read_record
from postgrad.plan.plan import make_plan
from postgrad.run.events import RunFinished
from postgrad.run.run import run_stage
from tests.conftest import make_llama, old_text
from tests.test_docs import parse
from tests.tiny_stages import write_rows

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
    schema, _, text = (here / "try.yaml").read_text().partition("\n")
    assert schema.startswith("# yaml-language-server: $schema=.postgrad/")
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
    assert stage.resolve_shares() == (0.75, 0.25)  # sums and assignments: a strong shift
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
    for name in ("its test.jsonl", "t.jsonl"):
        (here / name).write_text((here / "mine.jsonl").read_text())
    (here / "mine.txt").write_text("a text")
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


def test_nothing_is_made_that_no_file_names(here: Path, made: Path) -> None:
    shutil.copytree(made, here / "chats-data")
    write_rows(here / "mine.jsonl", CHATS)
    for name in ("mine.txt", "old.txt"):
        (here / name).write_text("a text")
    write_rows(here / "labelled.jsonl", LABELLED)
    said = write_template(
        Path("try.yaml"), "classify", TemplateRequest("try", "labelled.jsonl", "bert", None), force=False
    )
    assert not (here / "try-data").exists() and not said.notes
    said = write_template(
        Path("chats.yaml"), "instruct", TemplateRequest("chats", "mine.jsonl", "gpt", None), force=False
    )
    assert template_text(said).startswith("generated chats-data/ ")


LABELLED = [{"text": f"{word} {n}", "label": word} for n in range(8) for word in ("one", "two")]
CHATS = [{"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": str(n)}]} for n in range(9)]
ROWS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": f"a text {n}"} for n in range(9)],
    "chat": CHATS,
    "instruction": [{"instruction": f"say {n}", "output": str(n)} for n in range(9)],
    "labelled": LABELLED,
    "tagged": [{"tokens": ["a", "lamp"], "ner_tags": ["O", "THING"]}] * 3,
    "choices": [{"question": f"{n}?", "choices": {"A": "yes", "B": "no"}, "answer": "B"} for n in range(9)],
}
FITTING = {
    "text": {"continue", "mlm", "from-scratch"},
    "chat": {"instruct", "text2text", "few-shot"},
    "instruction": {"instruct", "text2text", "few-shot"},
    "labelled": {"continue", "mlm", "from-scratch", "instruct", "text2text", "few-shot", "classify", "probe"},
    "tagged": {"instruct", "text2text", "few-shot", "classify", "probe"},
    "choices": {"instruct", "text2text", "few-shot"},
}
"""The templates that take rows of each kind; texts with a label are also read as running text."""


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("template", [name for name in TEMPLATE_KINDS if name != "mixed"])
def test_a_template_reads_rows_of_its_kinds_and_names_another_for_the_rest(
    template: str, rows: str, here: Path
) -> None:
    for name, kind in (("mine.jsonl", rows), ("old.jsonl", "text"), ("test.jsonl", rows)):
        write_rows(here / name, ROWS[kind])
    test = "test.jsonl" if template in ("probe", "few-shot") else None
    request = TemplateRequest("try", "mine.jsonl", "gpt", "old.jsonl", test)
    if template in FITTING[rows]:
        write_template(Path("try.yaml"), template, request)
        stage = load_stage(here / "try.yaml")
        source = stage.evaluation.tasks[0] if template == "few-shot" else stage.data.sources[0]
        found = detect_kind(RawSource(source.name, source.path, kind=source.kind, root=here, where="source"))
        assert found == ("text" if template in ("continue", "mlm", "from-scratch") else rows)
        return
    with pytest.raises(StageError, match=f"mine.jsonl has rows of `{rows}`") as caught:
        write_template(Path("try.yaml"), template, request)
    assert not (here / "try.yaml").exists()
    command = caught.value.hint.removeprefix("postgrad")
    parse(command)
    (named,) = {*re.findall(r"--template (\S+)", command)}
    assert named in FITTING[rows]


def test_rows_with_answers_are_refused_without_a_template(here: Path, base: Path) -> None:
    write_rows(here / "mine.jsonl", CHATS)
    with pytest.raises(StageError, match=r"mine\.jsonl has rows of `chat`") as caught:
        write_stage("try.yaml", data="mine.jsonl", model=str(base / "base"))
    assert "--template instruct" in caught.value.hint
    parse(caught.value.hint.removeprefix("postgrad"))


def initialise(*words: str) -> None:
    """Run `postgrad init` as the command line does."""
    typer.main.get_command(app).main(["init", *words], standalone_mode=False)


@pytest.mark.parametrize(
    "words",
    [
        "--data text.jsonl --chat chat.jsonl",
        "--data text.jsonl --data chat.jsonl",
        "--data chat.jsonl --data text.jsonl",
        "--template mixed --chat chat.jsonl --data text.jsonl",
    ],
)
def test_text_chats_and_old_text_make_one_stage(words: str, here: Path) -> None:
    for name in ("text", "chat"):
        write_rows(here / f"{name}.jsonl", ROWS[name])
    write_rows(here / "old.jsonl", ROWS["text"])
    initialise("try", *words.split(), "--replay", "old.jsonl", "--model", "gpt")
    stage = load_stage(here / "try.yaml")
    assert [source.path for source in stage.data.sources] == ["text.jsonl", "chat.jsonl", "old.jsonl"]
    assert stage.resolve_shares() == (0.7, 0.2, 0.1) and not (here / "try-data").exists()
    initialise("new", *words.split(), "--model", "gpt")  # without old text
    assert load_stage(here / "new.yaml").resolve_shares() == (0.8, 0.2) and not (here / "new-data").exists()
    assert "Without old text the model forgets" in (here / "new.yaml").read_text()


def test_the_size_of_a_mixed_stage_follows_text_and_model(base: Path, here: Path, cache: Path) -> None:
    write_rows(here / "chat.jsonl", [{"prompt": f"say {n}", "completion": text} for n, text in enumerate(old_text(60))])
    new, old, model = (str(base / name) for name in ("new.jsonl", "old.jsonl", "base"))
    initialise("try", "--data", new, "--chat", "chat.jsonl", "--replay", old, "--model", model)
    initialise("alone", "--data", new, "--replay", old, "--model", model)
    stage, alone = (load_stage(here / name) for name in ("try.yaml", "alone.yaml"))
    assert stage.schedule.peak == alone.schedule.peak == 1e-3  # type: ignore[union-attr] # a very small model
    assert stage.data.sequence_length == alone.data.sequence_length == make_llama().config.max_position_embeddings
    assert stage.tokens == pytest.approx(alone.tokens * 0.9 / 0.7, rel=0.06)  # type: ignore[operator]
    plan = make_plan(stage, here, cache)
    assert [source.name for source in plan.data.sources] == ["text", "instructions", "replay"]


@pytest.mark.parametrize(
    ("words", "where", "hint"),
    [
        ("--data text.jsonl --chat text.jsonl", "--chat: text.jsonl has rows of `text`", ""),
        ("--data chat.jsonl --chat chat.jsonl", "--data: chat.jsonl has rows of `chat`", ""),
        ("--data chat.jsonl --chat text.jsonl", "--data: chat.jsonl has", "--data text.jsonl --chat chat.jsonl"),
        ("--data text.jsonl --data text.jsonl", "--data: text.jsonl has rows of `text`, and text.jsonl of `text`", ""),
        ("--template mlm --data text.jsonl --replay chat.jsonl", "--replay: chat.jsonl has", ""),
        ("--data text.jsonl --data text.jsonl --chat chat.jsonl", "--data: 3 texts", ""),
        ("--template continue --data text.jsonl --chat chat.jsonl", "--chat: continue trains on one file", ""),
        ("--template mixed --data text.jsonl", "--data is given alone", "--chat ROWS"),
        ("--template mixed --chat chat.jsonl", "--chat is given alone", "--data TEXT"),
        ("--data text.jsonl --chat none.jsonl", "none.jsonl", ""),
    ],
)
def test_rows_of_the_wrong_kind_are_named_with_their_option(words: str, where: str, hint: str, here: Path) -> None:
    for name in ("text", "chat"):
        write_rows(here / f"{name}.jsonl", ROWS[name])
    with pytest.raises(PostgradError) as caught:
        initialise("try", *words.split(), "--model", "gpt")
    assert where in str(caught.value) and hint in caught.value.hint
    assert not (here / "try.yaml").exists()


def test_chats_alone_are_instructions(here: Path) -> None:
    write_rows(here / "chat.jsonl", ROWS["chat"])
    initialise("try", "--chat", "chat.jsonl", "--model", "gpt")
    assert load_stage(here / "try.yaml").data.sources[0].path == "chat.jsonl"


@pytest.mark.parametrize("template", ["continue", "instruct", "mixed", "mlm"])
def test_the_share_of_replay_can_be_overridden(template: str, here: Path) -> None:
    for name in ("text", "chat"):
        write_rows(here / f"{name}.jsonl", ROWS[name])
    data, answers = {"instruct": ("chat.jsonl", None), "mixed": ("text.jsonl", "chat.jsonl")}.get(
        template, ("text.jsonl", None)
    )
    request = TemplateRequest("try", data, "gpt", "text.jsonl", chat=answers)
    write_template(Path("try.yaml"), template, request)
    stage = load_stage(here / "try.yaml", ["data.sources.replay.share=5%"])
    assert stage.resolve_shares()[-1] == 0.05 and sum(stage.resolve_shares()) == pytest.approx(1)


def test_what_is_unknown_or_there_is_said(made: Path, here: Path) -> None:
    with pytest.raises(StageError, match="did you mean 'classify'"):
        write_template(Path("try.yaml"), "clasify", TemplateRequest("try", None, None, None), force=False)
    written("mlm", made, here)
    with pytest.raises(StageError, match="already exists"):
        write_template(Path("try.yaml"), "mlm", TemplateRequest("try", None, None, None), force=False)
    write_template(Path("try.yaml"), "mlm", TemplateRequest("try", None, None, None), force=True)
    with pytest.raises(StageError, match="cannot name a run folder"):
        write_template(Path("a b.yaml"), "mlm", TemplateRequest("a b", None, None, None), force=False)
