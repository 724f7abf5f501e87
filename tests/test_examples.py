"""The examples run as they are: on the texts and models that `examples/make_data.py` makes."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import postgrad
from postgrad.commands import builtin_corpus
from postgrad.storage.read_yaml import read_yaml

SOURCE = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(path.stem for path in SOURCE.glob("*.yaml"))
FULL = {"infinite", "anneal"}
"""The second starts from a step of the first."""
SMALL = [
    "compute.compile=false",
    "compute.threads=1",
    "evaluation.eval_tokens=400",
    "evaluation.max_tokens=400",
    "evaluation.samples=0",
    "evaluation.drift_tokens=0",
]


def load_script(folder: Path) -> ModuleType:
    """`make_data.py`, writing into a folder."""
    spec = importlib.util.spec_from_file_location("make_data", SOURCE / "make_data.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.FOLDER, module.DATA, module.MODELS = folder, folder / "data", folder / "models"  # type: ignore[attr-defined]
    return module


def iter_strings(value: Any) -> Iterator[str]:
    """All strings of a stage."""
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from iter_strings(each)
    elif isinstance(value, str):
        yield value


def commands_before(name: str) -> list[list[str]]:
    """The `before:` commands in the head of an example, as words behind `postgrad train examples/`."""
    found = re.findall(
        r"^# +before: +postgrad train examples/(.*)$", (SOURCE / f"{name}.yaml").read_text(), re.MULTILINE
    )
    return [shlex.split(command) for command in found]


def test_every_text_and_model_of_an_example_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = builtin_corpus.standard_library_files()[::25]
    builtin_corpus.documented_functions.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(builtin_corpus, "standard_library_files", lambda: modules)
        script = load_script(tmp_path)
        script.write_data()
    builtin_corpus.documented_functions.cache_clear()
    texts = {f"data/{path.name}" for path in (tmp_path / "data").iterdir()}
    others = {*re.findall(r'"([\w.-]+\.(?:safetensors|jsonl))"', (SOURCE / "make_data.py").read_text())}
    made = (
        texts | {f"models/{name}" for name in (*script.BASES, "grown")} | others | {f"data/{name}" for name in others}
    )
    for name in EXAMPLES:
        runs = {
            f"runs/{word.removeprefix('name=')}" for words in commands_before(name) for word in words if "=" in word
        }
        runs |= {f"runs/{Path(words[0]).stem}" for words in commands_before(name)}
        paths = {text for text in iter_strings(read_yaml((SOURCE / f"{name}.yaml").read_text())) if "/" in text}
        missing = {path for path in paths if path not in made and not any(path.startswith(run) for run in runs)}
        assert missing <= {f"runs/{name}"}, name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples with their texts and models; these are trained for a few steps."""
    folder = tmp_path_factory.mktemp("examples")
    for path in SOURCE.glob("*.yaml"):
        shutil.copy(path, folder)
    script = load_script(folder)
    script.BASES = {name: (family, "10k", *rest) for name, (family, _, *rest) in script.BASES.items()}
    script.main()
    return folder


def run(folder: Path, words: list[str]) -> None:
    """Train an example for a tenth of its tokens."""
    path = folder / words[0]
    key = "new_tokens" if "\nnew_tokens:" in path.read_text() else "tokens"
    stage = postgrad.load_stage(path, words[1:])
    tokens = int(getattr(stage, key))
    amount = tokens if path.stem in FULL else max(tokens // 10, 100)
    *_, last = postgrad.train(postgrad.plan_stage(path, [*words[1:], *SMALL, f"{key}={amount}"]))
    assert isinstance(last, postgrad.RunFinished)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_planned_and_trains_as_it_is(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for words in commands_before(name):
        run(folder, words)
    assert postgrad.plan_stage(folder / f"{name}.yaml").data.sources
    run(folder, [f"{name}.yaml"])
