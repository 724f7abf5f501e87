"""Do the documents say what the code does? Commands parse, stages validate, the reference is the code's own."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from postgrad.cli.main import app
from postgrad.config.stage import Stage
from postgrad.config.stage_file import json_schema, load_stage, parse_stage
from postgrad.errors import StageError
from postgrad.lineage.record import record_schema
from postgrad.storage.read_yaml import read_yaml

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))

COMMAND = re.compile(r"(?:^|\s)postgrad(?= [a-z])(.*)")
"""`postgrad VERB ...` anywhere in a line of a code block: after a prompt, after `next:`, after `torchrun -m`."""
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")

LEAST: dict[str, Any] = {
    "name": "least",
    "model": "base",
    "tokens": 1000,
    "data": {"sources": [{"name": "new", "path": "new.txt"}]},
    "schedule": {"kind": "constant", "peak": 1e-5},
}


def commands_of(text: str) -> list[str]:
    """What stands behind `postgrad` in every command line of a page."""
    blocks = [body for kind, body in FENCE.findall(text) if kind in ("", "sh", "console", "yaml")]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines += [span for span in SPAN.findall(FENCE.sub("", text)) if span.startswith("postgrad ")]
    return [found[1] for line in lines if (found := COMMAND.search(line))]


def parse(command: str) -> None:
    """Let the command line parse its words, and run nothing."""
    words = [w for w in shlex.split(command, comments=True) if w != "..."]
    group: Any = typer.main.get_command(app)
    with group.make_context("postgrad", list(words)) as context:
        name, verb, rest = group.resolve_command(context, words)
        if not {"-h", "--help"} & set(rest):
            verb.make_context(name, rest, parent=context)


def stages_of(text: str) -> list[dict[str, Any]]:
    """The YAML blocks of a page that are a stage, or some of a stage's keys."""
    loaded = [read_yaml(body) for kind, body in FENCE.findall(text) if kind == "yaml"]
    return [raw for raw in loaded if isinstance(raw, dict) and raw.keys() <= Stage.model_fields.keys()]


def completed(raw: dict[str, Any]) -> dict[str, Any]:
    """A piece of a stage with the least that it lacks."""
    whole = LEAST | raw
    whole["data"] = LEAST["data"] | raw.get("data", {})
    if "new_tokens" in raw:
        whole.pop("tokens")
    return whole


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_stage_reference", ROOT / "docs" / "make_stage_reference.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_parse(page: Path) -> None:
    for command in commands_of(page.read_text()):
        try:
            parse(command)
        except Exception as error:
            pytest.fail(f"postgrad{command}: {error!r}")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_yaml_blocks_are_stages(page: Path) -> None:
    for raw in stages_of(page.read_text()):
        parse_stage(completed(raw), page.name)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.name)
def test_examples_are_stages_and_say_their_command(example: Path) -> None:
    load_stage(example)
    head = example.read_text().split("\nname:")[0]
    found = [m[1] for line in head.splitlines() if (m := COMMAND.search(line))]
    assert any(f"examples/{example.name}" in command for command in found)
    for command in found:
        parse(command)


def test_the_reference_is_of_these_types() -> None:
    """When this fails: python docs/make_stage_reference.py"""
    assert (ROOT / "docs" / "stage.md").read_text() == generator().stage_reference()
    assert (ROOT / "docs" / "stage.schema.json").read_text() == json_schema() + "\n"
    assert (ROOT / "docs" / "record.schema.json").read_text() == record_schema() + "\n"


@pytest.mark.parametrize("wrong", ["train", "train a.yaml --fast", "polish a", "generate"])
def test_a_wrong_command_would_be_caught(wrong: str) -> None:
    assert commands_of(f"```console\n$ postgrad {wrong}\n```") == [f" {wrong}"]
    with pytest.raises(Exception, match=r"Missing|No such"):
        parse(f" {wrong}")


def test_a_wrong_stage_would_be_caught() -> None:
    (raw,) = stages_of("```yaml\nbatch: {global_batch: 8}\n```")
    with pytest.raises(StageError, match="global_batch_size"):
        parse_stage(completed(raw), "mutant")
