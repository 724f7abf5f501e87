"""Write docs/stage.md and the JSON Schemas of stages, studies and records from their types.

Run it as `python docs/make_stage_reference.py`.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from postgrad.config import quantities, stage_file
from postgrad.config import stage as s
from postgrad.config.editor_schema import STAGE_SCHEMA
from postgrad.lineage.record import record_schema
from postgrad.studies import study

HEAD = """\
# The stage file, key by key

A stage file is YAML. Every key below is read; an unknown key is an error that names the nearest one. Paths are relative
to the stage file's folder. Any key can be set on the command line: `postgrad train run.yaml tokens=5M
data.sources.replay.share=5%` (items of a list by their `name` or number).

How values are written:

| word in the tables | written as |
|---|---|
| tokens | a number of tokens: `500000`, `500k`, `20M`, `1.5B` |
| share | `5%` or `0.05` |
| length | `1%` of the stage's steps, `200 steps` (or `200`), or `2M tokens` |
| rate | a learning rate above zero, such as `2.0e-5` |

This page is generated from the types in `postgrad/config/` by `docs/make_stage_reference.py`. The same as a JSON Schema is
`postgrad/config/stage.schema.json`; `init` puts a copy beside a stage (`.postgrad/`) and names it in the first line,
for editors with a YAML language server.
"""

NOTES = {
    "TargetTextFile": "A path alone, without a mapping, is also accepted.",
    "HeldOutFile": "A path alone, without a mapping, is also accepted; its file name then gives the `name`.",
    "FreshModel": "A name alone, without a mapping, is an existing model.",
    "AbilitiesConfig": "Without a mapping: `all`, a name, or a list of names.",
    "NewTokenizer": "A name alone, without a mapping, is an existing tokenizer.",
}
NOTES |= {
    f"{kind}Config": "The name alone, without a mapping, is also accepted: `track: [tensorboard, wandb]`."
    for kind in ("TensorBoard", "Wandb", "Mlflow", "Trackio")
}
WORDS = {"TokenCount": "tokens", "TokenCountOrZero": "tokens", "Share": "share", "Length": "length", "Rate": "rate"}

Model = type[quantities.ConfigModel]


def stage_reference() -> str:
    """The page, as text."""
    schema = json.loads(stage_file.json_schema())
    parts = {"Stage": schema, **schema["$defs"]}
    return HEAD + "".join(_section(model, title, parts[model.__name__]) for model, title in _titles().items())


def mapping_paths() -> dict[Model, list[str]]:
    """The mappings of a stage in the order of its keys, and the key paths of each; `[]` marks the items of a list."""
    paths: dict[Model, list[str]] = {}

    def visit(model: Model, path: str) -> None:
        paths.setdefault(model, []).append(path)
        if len(paths[model]) == 1:
            for key, field in model.model_fields.items():
                for part, suffix in dict.fromkeys(_models_in(field.annotation)):
                    visit(part, f"{path}.{key}{suffix}".removeprefix("."))

    visit(s.Stage, "")
    return paths


def _models_in(annotation: Any) -> Iterator[tuple[Model, str]]:
    """The mappings that a type allows, each with `[]` where the type is a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, quantities.ConfigModel):
        yield annotation, ""
        return
    suffix = "[]" if get_origin(annotation) is list else ""
    for part in get_args(annotation):
        for model, inner in _models_in(part):
            yield model, suffix + inner


def _titles() -> dict[Model, str]:
    """A title for each mapping: its paths, and its kinds where a path has mappings of several."""
    paths = mapping_paths()
    titles = {}
    for model, own in paths.items():
        kind = model.model_fields.get("kind")
        alone = list(paths.values()).count(own) == 1
        kinds = get_args(kind.annotation) if kind and (kind.is_required() or not alone) else ()
        title = ", ".join(f"`{path}`" for path in dict.fromkeys(own)) if own != [""] else "The stage"
        titles[model] = title + (": " + ", ".join(f"`{each}`" for each in kinds) if kinds else "")
    return titles


def _section(model: Model, title: str, part: dict[str, Any]) -> str:
    about = [part.get("description", ""), NOTES.get(model.__name__, "")]
    lines = [f"\n## {title}\n", *(f"{text}\n" for text in about if text)]
    lines += ["| key | value | default | meaning |", "|---|---|---|---|"]
    declared, docstrings = _declared(model), _docstrings(model)
    own = model.__annotations__
    for key, node in sorted(part["properties"].items(), key=lambda item: item[0] not in own):
        default = "required" if key in part.get("required", []) else _default(node)
        value = _word(declared[key]) or _value(node)
        if key not in docstrings and key != "kind":
            raise ValueError(f"{model.__name__}.{key} has no docstring")
        meaning = " ".join(docstrings.get(key, "").split()).replace("<", "&lt;").replace("|", "\\|")
        lines.append("| " + " | ".join((f"`{key}`", value, default, meaning)) + " |")
    return "\n".join(lines) + "\n"


def _bases(part: Model) -> list[Model]:
    """A part and what it inherits keys from, those that are inherited first."""
    return [
        base
        for base in reversed(part.__mro__)
        if issubclass(base, quantities.ConfigModel) and base is not quantities.ConfigModel
    ]


def _declared(part: Model) -> dict[str, str]:
    """The types of a part's keys as they are written in the source."""
    return {key: str(value) for base in _bases(part) for key, value in base.__annotations__.items()}


def _docstrings(part: Model) -> dict[str, str]:
    """The text under each key in the source (a type's own description hides it in the schema)."""
    out: dict[str, str] = {}
    for base in _bases(part):
        body = ast.parse(inspect.getsource(base)).body[0].body  # type: ignore[attr-defined]
        for here, following in itertools.pairwise(body):
            if isinstance(here, ast.AnnAssign) and isinstance(following, ast.Expr):
                out[ast.unparse(here.target)] = ast.literal_eval(following.value)
    return out


def _word(declared: str) -> str:
    for name, word in WORDS.items():
        if declared.split(" | ")[0] == name:
            return word
    return f"names to {WORDS['Share']}s" if declared == "dict[str, Share]" else ""


def _value(node: dict[str, Any]) -> str:
    for key in ("anyOf", "oneOf"):
        if key in node:
            words = [_value(option) for option in node[key] if option.get("type") != "null"]
            return "one of the kinds below" if "discriminator" in node else " or ".join(words)
    if "$ref" in node:
        return "a mapping, below"
    if "enum" in node or "const" in node:
        return ", ".join(f"`{word}`" for word in node.get("enum", [node.get("const")]))
    if node["type"] == "array":
        if "prefixItems" in node:
            return "two numbers"
        return "a list, below" if "$ref" in json.dumps(node.get("items", {})) else "a list"
    kinds = {"string": "text", "integer": "a whole number", "number": "a number", "boolean": "`true` or `false`"}
    kinds["object"] = "a mapping"
    return kinds[node["type"]]


def _default(node: dict[str, Any]) -> str:
    if "default" not in node or node["default"] is None:
        return "none"
    if "$ref" in node:
        return "as below"
    default = node["default"]
    if isinstance(default, dict) and "kind" in default:
        return f"`{default['kind']}`"
    text = json.dumps(default) if not isinstance(default, str) else default
    return f"`{text}`"


if __name__ == "__main__":
    here = Path(__file__).parent
    (here / "stage.md").write_text(stage_reference())
    STAGE_SCHEMA.write_text(stage_file.json_schema() + "\n")
    (here / "record.schema.json").write_text(record_schema() + "\n")
    (here / "study.schema.json").write_text(study.study_schema() + "\n")
