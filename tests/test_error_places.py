"""Every literal place that an error names exists: a key of a stage or study file, an option, an argument or a command."""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import postgrad
from postgrad.cli.main import app
from postgrad.config.stage_file import json_schema
from postgrad.studies.study import study_schema

PACKAGE = Path(postgrad.__file__).parent


def literal_places(source: str) -> Iterator[tuple[int, str]]:
    """The literal values of `where=` in a module, with their lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                value = keyword.value
                if keyword.arg == "where" and isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield node.lineno, value.value


def has_path(schema: dict[str, Any], path: list[str]) -> bool:
    """Whether a key path exists in a JSON Schema; lists are stepped over."""
    definitions = schema.get("$defs", {})

    def follow(node: Any, keys: list[str]) -> bool:
        if not isinstance(node, dict):
            return False
        if "$ref" in node:
            return follow(definitions[node["$ref"].rpartition("/")[2]], keys)
        if any(follow(option, keys) for kind in ("anyOf", "oneOf", "allOf") for option in node.get(kind, ())):
            return True
        if "items" in node and follow(node["items"], keys):
            return True
        if not keys:
            return True
        return follow(node["properties"][keys[0]], keys[1:]) if keys[0] in node.get("properties", {}) else False

    return follow(schema, path)


def command_line_words() -> set[str]:
    """Names of commands, their options, and their arguments in capitals."""
    words: set[str] = set()
    commands: list[Any] = [typer.main.get_command(app)]
    while commands:
        command = commands.pop()
        words.add(command.name or "")
        for parameter in command.params:
            words |= set(parameter.opts) | set(parameter.secondary_opts) | {str(parameter.name).upper()}
        commands += getattr(command, "commands", {}).values()
    return words


@functools.cache
def schemas() -> tuple[dict[str, Any], ...]:
    """Of a stage file and of a study file."""
    return json.loads(json_schema()), json.loads(study_schema())


def exists(place: str, words: set[str]) -> bool:
    path = re.sub(r"\[\w*\]", "", place).split(".")
    return (
        not place
        or all(word in words for word in place.split())
        or place in postgrad.__all__
        or place in ("study init", "predict", "adapter_model.safetensors")  # a mode, a method, a file of PEFT's
        or any(has_path(schema, path) for schema in schemas())
    )


def test_every_literal_place_exists() -> None:
    words = command_line_words()
    missing = [
        f"{file.relative_to(PACKAGE)}:{line}: {place}"
        for file in sorted(PACKAGE.rglob("*.py"))
        for line, place in literal_places(file.read_text())
        if not exists(place, words)
    ]
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize(
    ("place", "known"),
    [
        ("data.sources", True),
        ("tuning.template", True),
        ("--max-forgetting", True),
        ("compare", True),
        ("data.template", False),
        ("tuning.merge", False),
        ("penalties.orthogonal", False),
        ("--how", False),
    ],
)
def test_places_that_do_not_exist_are_found(place: str, known: bool) -> None:
    assert exists(place, command_line_words()) is known
