"""Paths of a stage: relative to its file, never looked up on the Hub when mistyped, regular files, and never the run's own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from postgrad.commands.train import plan_stage
from postgrad.config.stage_file import parse_stage
from postgrad.errors import DataError, ModelError, PostgradError, StageError
from postgrad.models.location import locate_model
from postgrad.penalties.importance_file import ImportanceFile
from postgrad.plan.plan import make_plan
from tests.conftest import StageOf


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Models `runs/medicine` and `base`, and a file."""
    for name in ("runs/medicine", "base"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "old.jsonl").write_text('{"text": "words"}\n')
    return tmp_path


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("runs/medicin", "did you mean 'medicine'?"),
        ("runs/x", "runs has medicine"),
        ("run/medicine", "did you mean 'runs'?"),
        ("./bas", "did you mean 'base'?"),
        ("bas", "did you mean 'base'?"),
        ("runs/medicine/checkpoints/step-1", "runs/medicine has config.json"),
        ("~/no-such-folder-here", ""),
        ("/no-such-folder/x", ""),
        ("../x", ""),
        ("a b/c", ""),
        ("owner/name\n", ""),
        ("owner/näme", ""),
    ],
)
def test_a_mistyped_folder_is_no_hub_name(folder: Path, name: str, hint: str) -> None:
    with pytest.raises(ModelError, match="there is no folder") as caught:
        locate_model(name, folder)
    assert hint in caught.value.hint
    if not name.startswith(("/", "~")):
        assert str(folder) in caught.value.problem  # where it was looked for


@pytest.mark.parametrize("name", ["owner/name", "HuggingFaceTB/SmolLM2-135M", "some-one/x.y_z-1"])
def test_a_hub_name_is_one(folder: Path, name: str) -> None:
    found = locate_model(name, folder)
    assert found.folder is None and found.name_or_path == name


@pytest.mark.parametrize(
    ("model", "where"),
    [
        ({"config": "runs/nowhere"}, "model.config"),
        ({"from_scratch": "llama-1M", "tokenizer": "runs/nowhere"}, "model.tokenizer"),
        ("runs/nowhere", "model"),
    ],
)
def test_every_model_of_a_stage_is_located_alike(folder: Path, stage_of: StageOf, model: Any, where: str) -> None:
    with pytest.raises(ModelError, match="there is no folder runs/nowhere in") as caught:
        make_plan(parse_stage(stage_of(model=model), "test"), folder, folder / "cache")
    assert caught.value.where == where


def test_paths_are_relative_to_the_stage_file(folder: Path, base: Path, stage_of: StageOf, cache: Path) -> None:
    """Whatever the working directory is: texts, held-out texts, the model and the run folder."""
    import yaml

    shutil.copytree(base, folder / "there", dirs_exist_ok=True)
    raw = stage_of(model="base", evaluation={"retained": ["old-heldout.jsonl"]})
    del raw["output"]
    for source in raw["data"]["sources"]:
        source["path"] = Path(source["path"]).name
    (folder / "there" / "stage.yaml").write_text(yaml.safe_dump(raw))
    plan = plan_stage(folder / "there" / "stage.yaml", cache=cache)
    assert plan.output == folder / "there" / "runs" / "tiny"
    with pytest.raises(DataError, match=f"no file matches gone.jsonl in {folder / 'there'}"):
        plan_stage(folder / "there" / "stage.yaml", ["data.sources.new.path=gone.jsonl"], cache=cache)


def test_pipes_in_model_folders_and_importance_files_are_refused(folder: Path) -> None:
    os.mkfifo(folder / "base" / "model.safetensors")
    with pytest.raises(ModelError, match="is a named pipe"):
        locate_model("base", folder)
    with pytest.raises(DataError, match="a named pipe, not a regular file"):
        ImportanceFile(folder / "base" / "model.safetensors")


@pytest.mark.parametrize(
    ("path", "output", "refused"),
    [
        (".", "runs/x", True),
        ("", "data/run", False),
        ("data", "data/run", True),
        ("data", "data", True),
        ("data/../data/", "data/run", True),
        ("data/**/*.jsonl", "data/deep/run", True),
        ("data/*/*.json", "data/run", True),
        ("data/*.jsonl", "data/run", False),
        ("data/**/*.txt", "data/run", False),
        ("data", "database", False),
        ("data", "data/.run", False),
        ("data", "runs/x", False),
    ],
)
@pytest.mark.parametrize("role", ["source", "held-out"])
def test_a_run_does_not_write_into_its_data(
    folder: Path, base: Path, stage_of: StageOf, cache: Path, path: str, output: str, refused: bool, role: str
) -> None:
    (folder / "data" / "sub").mkdir(parents=True)
    for name in ("data/a.jsonl", "data/a.txt", "data/sub/b.json"):
        shutil.copy(base / "new.jsonl", folder / name)
    raw = stage_of(output=output)
    if role == "source":
        raw["data"]["sources"][0]["path"] = path or str(base / "new.jsonl")
    else:
        raw["evaluation"]["learned"] = [{"name": "held", "path": path or str(base / "new-heldout.jsonl")}]
    call: Callable[[], object] = lambda: make_plan(parse_stage(raw, "test"), folder, cache)  # noqa: E731
    if refused:
        with pytest.raises(StageError, match="is inside of the data"):
            call()
        return
    try:
        call()
    except PostgradError as error:  # mixed kinds of files, or held-out text that is trained on
        assert "is inside of the data" not in str(error)
