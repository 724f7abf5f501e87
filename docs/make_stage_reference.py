"""Write docs/stage.md and docs/stage.schema.json from the types of a stage: `python docs/make_stage_reference.py`."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
from pathlib import Path
from typing import Any

from postgrad.stages import stage as s

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

This page is made from the types in `postgrad/stages/stage.py` by `docs/make_stage_reference.py`; `docs/stage.schema.json`
is the same as a JSON Schema.
"""

PARTS = (
    ("Stage", "The stage"),
    ("Data", "`data`"),
    ("Source", "`data.sources[]`"),
    ("Shift", "`data.shifts[]`"),
    ("Batch", "`batch`"),
    ("Constant", "`schedule`: `constant`"),
    ("Decay", "`schedule`: `rewarm`, `cosine`, `linear`, `inverse-sqrt`, `exponential`, `1-sqrt`"),
    ("FromFloor", "`schedule`: `from-floor`"),
    ("Infinite", "`schedule`: `infinite`"),
    ("Wsd", "`schedule`: `wsd`"),
    ("Anneal", "`schedule`: `anneal`"),
    ("Then", "`schedule`: `then`"),
    ("Piece", "`schedule.pieces[]`"),
    ("Optimizer", "`optimizer`"),
    ("NextTokenObjective", "`objectives[]`: `next-token`"),
    ("Evaluation", "`evaluation`"),
    ("HeldOutFile", "`evaluation.retained[]`, `evaluation.learned[]`"),
    ("Save", "`save`"),
    ("Compute", "`compute`"),
)
NOTES = {"HeldOutFile": "A path alone, without a mapping, is also accepted; its file name then gives the `name`."}
MEANINGS = {  # of keys that the source leaves to their names
    "Stage.name": "Names the run and, without `output`, its folder.",
    "Stage.seed": "Decides the order of the rows and whatever a model draws (dropout).",
    "Stage.data": "What is read.",
    "Stage.batch": "How many rows make a step.",
    "Stage.schedule": "The learning rate of each step.",
    "Stage.optimizer": "How the weights are moved.",
    "Stage.objectives": "What a token is worth; next-token prediction is the one there is.",
    "Stage.evaluation": "What is scored.",
    "Stage.save": "When checkpoints are written, and which stay.",
    "Stage.compute": "How the arithmetic is done.",
    "Data.sources": "What the rows are read from, and in which shares.",
    "Source.name": "Names the source in the plan, the metrics and the report.",
    "Source.subset": "With `hub`: the subset (configuration) of the data set.",
    "Source.split": "With `hub`: the split.",
    "Source.revision": "With `hub`: a branch, tag or commit.",
    "Source.role": "`replay` is old text: its held-out part is a retained set, and `new_tokens` does not count it.",
    "Shift.shares": "The share of each source from there on; a source that is not named gets none.",
    "Constant.peak": "The rate.",
    "Constant.warmup": "From zero to `peak`.",
    "Decay.peak": "The highest rate.",
    "Decay.floor": "The rate at the stage's last step.",
    "Decay.warmup": "From `start` to `peak`.",
    "FromFloor.start": "The rate of the first steps.",
    "FromFloor.floor": "The rate at the stage's last step.",
    "FromFloor.shape": "Of the decay.",
    "Infinite.peak": "The highest rate.",
    "Infinite.floor": "The rate at the end of the anneal.",
    "Infinite.warmup": "From zero to `peak`.",
    "Infinite.cooldown_shape": "From `peak` to `constant`.",
    "Wsd.peak": "The rate of the stable phase.",
    "Wsd.floor": "The rate at the stage's last step.",
    "Wsd.warmup": "From zero to `peak`.",
    "Wsd.decay": "Length of the decay at the stage's end.",
    "Wsd.shape": "Of the decay.",
    "Anneal.floor": "The rate at the stage's last step.",
    "Anneal.shape": "Of the decay.",
    "Piece.shape": "Of the piece.",
    "Piece.start": "The rate it begins with.",
    "Piece.end": "The rate it ends with; a constant piece has none.",
    "Then.pieces": "In their order.",
    "Optimizer.betas": "Decay of the two moments.",
    "Optimizer.eps": "Added to the root of the second moment.",
    "Optimizer.weight_decay": "Decoupled, times the rate.",
    "Optimizer.clip": "The largest 2-norm of the whole gradient.",
    "NextTokenObjective.weight": "Factor of the loss.",
    "HeldOutFile.name": "Names the set.",
    "HeldOutFile.path": "A file, a folder or a glob.",
    "HeldOutFile.columns": "As of a source.",
    "HeldOutFile.documents": "As of a source.",
    "Save.every": "How often a checkpoint is written; there is always one at the last step.",
    "Save.keep": "How many of the newest checkpoints stay.",
    "Compute.dtype": "Of the forward and backward pass; the master weights are fp32.",
    "Compute.compile": "Compile each block.",
    "Compute.attention": "`causal_blocks` is this package's own, for CPUs.",
    "Compute.activation_checkpointing": "Recompute activations instead of keeping them.",
    "Compute.threads": "Left out: the cores this process may use.",
}
WORDS = {"Amount": "tokens", "Share": "share", "Length": "length", "Rate": "rate"}


def stage_reference() -> str:
    """The page, as text."""
    schema = json.loads(s.json_schema())
    parts = {"Stage": schema, **schema["$defs"]}
    missing = parts.keys() - {name for name, _ in PARTS}
    if missing:
        raise ValueError(f"parts of a stage that the reference does not list: {sorted(missing)}")
    return HEAD + "".join(_section(name, title, parts[name]) for name, title in PARTS)


def _section(name: str, title: str, part: dict[str, Any]) -> str:
    about = [part.get("description", ""), NOTES.get(name, "")]
    lines = [f"\n## {title}\n", *(f"{text}\n" for text in about if text)]
    lines += ["| key | value | default | meaning |", "|---|---|---|---|"]
    declared = _declared(name)
    for key, node in part["properties"].items():
        default = "required" if key in part.get("required", []) else _default(node)
        value = _word(declared.get(key, "")) or _value(node)
        meaning = " ".join((_docstrings(name).get(key) or MEANINGS.get(f"{name}.{key}", "")).split())
        meaning = meaning.replace("<", "&lt;")
        lines.append("| " + " | ".join((f"`{key}`", value, default, meaning)).replace("\n", " ") + " |")
    return "\n".join(lines) + "\n"


def _declared(name: str) -> dict[str, str]:
    """The types of a part as they are written in the source."""
    return {key: str(value) for key, value in getattr(s, name).__annotations__.items()}


def _docstrings(name: str) -> dict[str, str]:
    """The text under each key in the source (a type's own description hides it in the schema)."""
    body = ast.parse(inspect.getsource(getattr(s, name))).body[0].body  # type: ignore[attr-defined]
    out: dict[str, str] = {}
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
    if isinstance(default, list) and default and isinstance(default[0], dict):
        return "one `next-token`"
    text = json.dumps(default) if not isinstance(default, str) else default
    return f"`{text}`"


if __name__ == "__main__":
    here = Path(__file__).parent
    (here / "stage.md").write_text(stage_reference())
    (here / "stage.schema.json").write_text(s.json_schema() + "\n")
