"""Reading stage files, and errors with the path of the key."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from postgrad.config.abilities import AbilitiesConfig
from postgrad.config.renamed_keys import refuse_earlier_stage_names, upgrade_stage
from postgrad.config.stage import EvaluationConfig, Stage
from postgrad.config.tasks import TaskConfig
from postgrad.errors import PostgradError, StageError, suggest_nearest, suggest_path
from postgrad.storage.read_yaml import MAX_BYTES, MAX_DEPTH, read_yaml
from postgrad.storage.regular_file import read_regular_file


def load_stage(path: Path, overrides: list[str] | None = None) -> Stage:
    """Read a stage file and apply `key.sub=value` overrides.

    Raises `StageError` with `file: key.path`, what was met and what was expected.
    """
    return parse_stage(read_stage(path, overrides), str(path))


def read_stage(path: Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """A stage file as plain data, with `key.sub=value` overrides applied, before its keys are looked at."""
    raw = read_mapping(path, "the stage file", "a stage is a mapping of keys to values")
    for override in overrides or []:
        apply_override(raw, override)
    return raw


def parse_stage(raw: dict[str, Any], where: str) -> Stage:
    """A stage from plain data; `where` names its origin in errors."""
    refuse_earlier_stage_names(raw, where)
    try:
        return Stage.model_validate(raw)
    except ValidationError as error:
        raise make_stage_error(error, where, raw) from error


def parse_recorded_stage(raw: Mapping[str, Any], where: str) -> Stage:
    """A stage that a run of any version recorded; `where` names its origin in errors."""
    return parse_stage(upgrade_stage(raw), where)


def load_tasks(path: Path, shots: int | None = None) -> list[TaskConfig]:
    """A list of tasks, each written as under `evaluation.tasks` of a stage; `shots` replaces the number of all of them.

    Raises `StageError` with `file: key.path`, what was met and what was expected.
    """
    raw = _read_yaml_file(path, "the file of tasks")
    if not isinstance(raw, list) or not raw:
        raise StageError("a file of tasks is a list", where=str(path), expected="- {name: ..., path: ...}")
    if shots is not None:
        raw = [{**item, "shots": shots} if isinstance(item, dict) else item for item in raw]
    refuse_earlier_stage_names({"evaluation": {"tasks": raw}}, str(path))
    try:
        return EvaluationConfig.model_validate({"tasks": raw}).tasks
    except ValidationError as error:
        raise make_stage_error(error, str(path), {"tasks": raw}, EvaluationConfig) from error


def parse_abilities(raw: dict[str, Any]) -> AbilitiesConfig:
    """Probes of abilities, given as under `evaluation.abilities` of a stage. Raises `StageError`."""
    try:
        return AbilitiesConfig.model_validate(raw)
    except ValidationError as error:
        raise make_stage_error(error, "abilities", raw, AbilitiesConfig) from error


def read_mapping(path: Path, description: str, expected: str) -> dict[str, Any]:
    """Read a mapping from a YAML file; `expected` describes it in errors. Raises `StageError`."""
    raw = _read_yaml_file(path, description)
    if not isinstance(raw, dict):
        raise StageError(expected, where=str(path))
    return raw


def _read_yaml_file(path: Path, description: str) -> Any:
    """A YAML file as plain data."""
    try:
        text = read_regular_file(path, MAX_BYTES).decode()
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise StageError(f"{description} is not UTF-8", where=str(path)) from error
        reason = error.strerror if isinstance(error, OSError) else error  # a ValueError: a path with a NUL
        hint = suggest_path(path) if isinstance(error, FileNotFoundError) else ""
        raise StageError(f"{description} cannot be read ({reason})", where=str(path), hint=hint) from error
    return _parse_yaml(text, str(path))


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return read_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}" if mark else where
        raise StageError(f"not YAML: {getattr(error, 'problem', None) or error}", where=place) from error
    except ValueError as error:  # what looks like a date and is none
        raise StageError(f"not YAML: {error}", where=where) from error


def dump_stage(raw: Mapping[str, Any]) -> str:
    """A resolved stage as YAML."""
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True, width=100)


def json_schema() -> str:
    """The JSON Schema of a stage file, for editors."""
    return json.dumps(Stage.model_json_schema(), indent=2)


def apply_override(raw: dict[str, Any], text: str) -> None:
    """Set what `key.sub=value` says in plain data. Raises `StageError` for a key that leads nowhere."""
    key, found, value = text.partition("=")
    if not found or not key:
        raise StageError(f"cannot read the override {text!r}", expected="key.sub=value")
    here: Any = raw
    *path, last = key.split(".")
    if len(path) >= MAX_DEPTH:
        raise StageError(f"the override has {len(path) + 1:,} levels", where=key[:40], expected=f"at most {MAX_DEPTH}")
    for name in path:
        here = _find_item(here, name, key) if isinstance(here, list) else here.setdefault(name, {})
        if not isinstance(here, (dict, list)):
            raise StageError(f"{name} holds a value, so nothing can be set under it", where=key)
    try:
        parsed = read_yaml(value)
    except (yaml.YAMLError, ValueError):  # such as a glob, whose star is an alias to YAML
        parsed = value
    if isinstance(here, list):
        here[here.index(_find_item(here, last, key))] = parsed
    else:
        here[last] = parsed


def _find_item(items: list[Any], name: str, key: str) -> Any:
    """An item of a list by its number or by its `name`."""
    for item in items:
        if isinstance(item, dict) and item.get("name") == name:
            return item
    if name.isdigit() and int(name) < len(items):
        return items[int(name)]
    names = [item["name"] for item in items if isinstance(item, dict) and "name" in item]
    raise StageError(
        f"there is no item {name!r}", where=key, expected=f"0 to {len(items) - 1}, or one of {', '.join(names)}"
    )


def make_stage_error(
    error: ValidationError, where: str, raw: dict[str, Any], root: type[BaseModel] = Stage
) -> PostgradError:
    """Pydantic's first error, with the key's path and a hint; further errors are counted."""
    findings = error.errors()
    first = findings[0]
    path = _key_path(first["loc"], raw, missing=first["type"] == "missing")
    met, expected, way_out = first["msg"], "", ""
    if first["type"] == "extra_forbidden":
        known = _find_known_keys(first["loc"], root)
        met = f"there is no key {first['loc'][-1]!r}"
        way_out = suggest_nearest(str(first["loc"][-1]), known)
        expected = "one of " + ", ".join(known)
    elif first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        kinds = re.findall(r"'([\w-]+)'", first["ctx"].get("expected_tags", "")) or _find_known_kinds(
            first["loc"], root
        )
        given = first["ctx"].get("tag")
        met = f"there is no kind {given!r}" if given else "the `kind` is missing"
        expected = f"one of {', '.join(kinds)}" if kinds else ""
        way_out = suggest_nearest(str(given), kinds) if given else ""
    elif first["type"] == "missing":
        met = "the key is missing"
    elif first["type"] == "string_pattern_mismatch":
        met = f"{first['input']!r} cannot be a name"
        expected = "letters, digits, '.', '_' and '-'"
    elif first["type"] == "value_error":
        met = str(first["ctx"]["error"])
    elif first["type"] in ("list_type", "tuple_type"):
        met = f"a list is expected, not {first['input']!r}"
    elif first["type"] in ("model_type", "model_attributes_type", "dict_type"):
        met = f"keys with values are expected, not {first['input']!r}"
        kinds = _find_known_kinds(first["loc"], root)
        expected = f"a `kind`, one of {', '.join(kinds)}" if kinds else ""
        way_out = f"write {{kind: {first['input']}}}, with its other keys" if first["input"] in kinds else ""
    else:
        met = f"{met[0].lower()}{met[1:]}, not {first['input']!r}"
    more = f"(and {len(findings) - 1} more)" if len(findings) > 1 else ""
    return StageError(
        f"{met} {more}".strip(), where=f"{where}: {path}" if path else where, expected=expected, hint=way_out
    )


def _key_path(location: tuple[int | str, ...], raw: Any, *, missing: bool) -> str:
    """`key.path[0]` of a finding as the user wrote it: pydantic puts the names of union members in between."""
    path = ""
    here = raw
    for i, part in enumerate(location):
        if (isinstance(here, dict) and part in here) or (isinstance(here, list) and isinstance(part, int)):
            here = here[part] if isinstance(here, dict) or part < len(here) else None
        elif not (missing and i == len(location) - 1):
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".")


def _find_known_keys(location: tuple[int | str, ...], root: type[BaseModel]) -> list[str]:
    """The known keys of the mapping in which an unknown one was met."""
    schema = root.model_json_schema()
    return list(_resolve_references(schema, _find_schema_node(location[:-1], schema)).get("properties", {}))


def _find_known_kinds(location: tuple[int | str, ...], root: type[BaseModel]) -> list[str]:
    """The kinds that a mapping without one may be of."""
    schema = root.model_json_schema()
    node = _find_schema_node(location, schema)
    members = [{"$ref": place} for place in node.get("discriminator", {}).get("mapping", {}).values()]
    kinds = [
        kind for member in members or _union_members(node) for kind in _kind_values(_resolve_references(schema, member))
    ]
    return list(dict.fromkeys(kinds))


def _find_schema_node(location: tuple[int | str, ...], schema: dict[str, Any]) -> dict[str, Any]:
    """The annotation of a key path in the schema."""
    node: dict[str, Any] = schema
    for part in location:
        members = [
            option for option in _union_members(node) if part in _kind_values(_resolve_references(schema, option))
        ]
        here = _resolve_references(schema, node)
        if members:
            node = members[0]
        elif isinstance(part, int):
            node = here.get("items", {})
        elif "discriminator" in here:
            node = {"$ref": here["discriminator"]["mapping"].get(part, "")}
        else:  # the name of a union's member leads nowhere
            node = here.get("properties", {}).get(part, node if "properties" in here else {})
    return node


def _resolve_references(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in node or any("$ref" in option for option in _union_members(node)):
        reference = node.get("$ref") or next(o["$ref"] for o in _union_members(node) if "$ref" in o)
        name = reference.rsplit("/", 1)[-1]
        if name not in schema["$defs"]:
            return {}
        node = schema["$defs"][name]
    return node


def _union_members(node: dict[str, Any]) -> list[dict[str, Any]]:
    """The members of a union without a `kind` discriminator."""
    return [] if "discriminator" in node else node.get("anyOf", node.get("oneOf", []))


def _kind_values(node: dict[str, Any]) -> list[str]:
    """What the `kind` of a mapping may be."""
    kind = node.get("properties", {}).get("kind", {})
    return kind.get("enum", [kind["const"]] if "const" in kind else [])
