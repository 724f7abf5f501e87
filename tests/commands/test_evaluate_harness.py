"""Tasks of lm-eval on runs: a run with a soft prompt is asked with it, and bad use is told."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from postgrad.cli.render import harness_text
from postgrad.commands.evaluate_harness import HarnessEvaluation, evaluate_harness
from postgrad.errors import ModelError, StageError
from postgrad.evaluation import lm_eval_harness
from tests.tiny_stages import Workspace, make_workspace


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("shelf"), tmp_path_factory.getbasetemp() / "cache")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """The ids of all prompts that a model is asked."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    prompts: list[tuple[int, ...]] = []
    choose = lm_eval_harness.score_choices

    def seen(model: Any, items: Any, **options: Any) -> Any:
        prompts.extend(item.context for item in items)
        return choose(model, items, **options)

    monkeypatch.setattr(lm_eval_harness, "score_choices", seen)
    yield prompts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A task over a local file."""
    rng = random.Random(0)
    made = [{"text": f"one and {rng.choice(['two', 'six'])}", "label": rng.randrange(2)} for _ in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "hub")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": ["words", "sums"],
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "sums.yaml").write_text(json.dumps(task))
    return tmp_path


def evaluated(model: object, folder: Path | None, tasks: str = "sums", **options: Any) -> HarnessEvaluation:
    return evaluate_harness(str(model), tasks, include=folder, **options)


@pytest.mark.parametrize(("model", "kind"), [("llama", "instruction"), ("t5", "pair")])
def test_a_run_with_a_soft_prompt_is_asked_with_it(
    shelf: Workspace, folder: Path, asked: list[tuple[int, ...]], model: str, kind: str
) -> None:
    stage = shelf.stage(
        f"prompt-{model}",
        {"kind": "prompt", "length": 4},
        model=model,
        sources=[shelf.source(kind)],
        **({"objectives": [{"kind": "text-to-text"}]} if model == "t5" else {}),
        evaluation={"every": "50%", "eval_tokens": 100, "samples": 0, "learned": [shelf.file(kind, held_out=True)]},
    )
    shelf.run(stage)
    run = Path(stage["output"])
    plain = evaluated(shelf.folder / model, folder)
    bare = list(asked)
    asked.clear()
    found = evaluated(run, folder)
    vocabulary = min(token for prompt in asked for token in prompt if token > max(map(max, bare)))
    virtual = tuple(range(vocabulary, vocabulary + 4))
    assert [prompt[:4] for prompt in asked] == [virtual] * len(asked)
    assert [prompt[4:] for prompt in asked] == bare
    (result,) = found.results
    assert (result.task, result.metric, result.items) == ("sums", "acc", 12)
    assert f"{result.value:.4f}" in harness_text(found)
    assert plain.requests == found.requests == 24
    json.dumps(found.as_dict(), allow_nan=False)


def test_bad_use(shelf: Workspace, folder: Path) -> None:
    with pytest.raises(ModelError, match=r"generates no text"):
        evaluated(shelf.folder / "bert", folder)
    with pytest.raises(StageError, match=r"no task is named"):
        evaluated(shelf.folder / "llama", folder, " , ")
    with pytest.raises(StageError, match=r"--harness-include: there is no folder"):
        evaluated(shelf.folder / "llama", folder / "nowhere")
    with pytest.raises(ModelError, match=r"a context of 100000 does not fit"):
        evaluated(shelf.folder / "llama", folder, context=100_000)
