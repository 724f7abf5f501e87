"""The table of docs/models.md says what the product does. When this fails: docs/make_models_table.py, make_models_page.py."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import pytest
import transformers

from docs.make_models_page import PAGE, status
from docs.make_models_table import COLUMNS, survey
from postgrad.models.task import Task
from tests.model_families import model_types

SPREAD = [
    "llama",
    "gemma2",
    "gemma3_text",
    "gemma3n_text",
    "cohere2",
    "granite",
    "minicpm3",
    "mistral",
    "deepseek_v3",
    "llama4_text",
    "stablelm",
    "olmo2",
    "phi3",
    "gptj",
    "gpt_neox",
    "falcon",
    "bloom",
    "mpt",
    "opt",
    "gpt_oss",
    "mixtral",
    "qwen3_moe",
    "mamba2",
    "jamba",
    "qwen3_next",
    "granitemoehybrid",
    "lfm2",
    "roberta",
    "deepseek_v4",
    "inkling_text",
    "reformer",
]
OTHERS = [("t5gemma", Task.TEXT_TO_TEXT), ("marian", Task.TEXT_TO_TEXT), ("ibert", Task.MASKED)]
QUICK = ["gemma3n_text", "gpt_oss", "roberta"]


def table_cells(model_type: str, task: Task) -> list[str]:
    """The columns of the page after the first."""
    title = {Task.CAUSAL: "Decoders", Task.MASKED: "Encoders", Task.TEXT_TO_TEXT: "Encoder-decoders"}[task]
    section = PAGE.read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    found = re.search(rf"^\| `{re.escape(model_type)}` \| (.+) \|$", section, re.MULTILINE)
    return found[1].split(" | ") if found else []


def check(model_type: str, task: Task, folder: Path, steps: list[str]) -> None:
    outcome = survey(model_type, task, folder, steps)
    assert not outcome.tracebacks
    layout, *marks = table_cells(model_type, task)
    assert status(asdict(outcome)) == layout, outcome.problems
    said = dict(zip(("loss", "resume", "lora", "reload"), marks, strict=False))
    assert {name for name in steps if said.get(name) == "no"} == outcome.problems.keys(), outcome.problems


@pytest.mark.parametrize("model_type", QUICK)
def test_the_page_is_that_of_the_product(model_type: str, tmp_path: Path) -> None:
    check(model_type, Task.CAUSAL, tmp_path, ["check", "loss"])


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "task"), [*((name, Task.CAUSAL) for name in SPREAD), *OTHERS])
def test_a_spread_of_families_goes_all_the_way(model_type: str, task: Task, tmp_path: Path) -> None:
    check(model_type, task, tmp_path, list(COLUMNS))


@pytest.mark.slow
@pytest.mark.parametrize("task", [Task.CAUSAL, Task.MASKED, Task.TEXT_TO_TEXT])
def test_every_model_type_of_this_version_is_in_the_table(task: Task) -> None:
    if f"transformers {transformers.__version__}" in PAGE.read_text():
        assert all(table_cells(model_type, task) for model_type in model_types(task))
