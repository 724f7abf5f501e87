"""Write docs/stage.md and docs/stage.schema.json from the types of a stage: `python docs/make_stage_reference.py`."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
from pathlib import Path
from typing import Any

from postgrad.config import (
    document_filters,
    mixing,
    objectives,
    penalties,
    quantities,
    row_format,
    schedules,
    sparse_updates,
    stage_file,
    tasks,
    tunings,
)
from postgrad.config import stage as s
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

This page is made from the types in `postgrad/stages/` by `docs/make_stage_reference.py`; `docs/stage.schema.json` is the
same as a JSON Schema.
"""

PARTS = (
    ("Stage", "The stage"),
    ("FreshModel", "`model`"),
    ("NewTokenizer", "`model.tokenizer`"),
    ("Data", "`data`"),
    ("Source", "`data.sources[]`"),
    ("DsirSelection", "`data.sources[].select[]`: `dsir`"),
    ("LikeFile", "`data.sources[].select[].like[]`"),
    ("PerplexitySelection", "`data.sources[].select[]`: `perplexity`"),
    ("DuplicatesSelection", "`data.sources[].select[]`: `duplicates`"),
    ("Shift", "`data.shifts[]`"),
    ("ByExamples", "`data.mixing`: `examples`"),
    ("ByTemperature", "`data.mixing`: `temperature`"),
    ("Equal", "`data.mixing`: `equal`"),
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
    ("MomentumUpdate", "`optimizer.update`: `momentum`"),
    ("MagnitudeUpdate", "`optimizer.update`: `magnitude`"),
    ("LossAdaptive", "`optimizer.loss_adaptive`"),
    ("NextTokenObjective", "`objectives[]`: `next-token`"),
    ("PrefixLMObjective", "`objectives[]`: `prefix-lm`"),
    ("MaskedObjective", "`objectives[]`: `masked`"),
    ("SpanCorruptionObjective", "`objectives[]`: `span-corruption`"),
    ("TextToTextObjective", "`objectives[]`: `text-to-text`"),
    ("ClassifyObjective", "`objectives[]`: `classify`"),
    ("AnchorPenalty", "`penalties[]`: `anchor`"),
    ("JoinedLayers", "`objectives[].layers` of `classify`"),
    ("DecidingHead", "`objectives[].head` of `classify`"),
    ("DistillObjective", "`objectives[]`: `distill`"),
    ("OnPolicyObjective", "`objectives[]`: `on-policy`"),
    ("Weighing", "`objectives[].weight`"),
    ("SampledCache", "`objectives[].cache`: `sampled`"),
    ("TopKCache", "`objectives[].cache`: `top-k`"),
    ("FullTuning", "`tuning`: `full`"),
    ("HeadTuning", "`tuning`: `head`"),
    ("BlocksTuning", "`tuning`: `blocks`"),
    ("BiasTuning", "`tuning`: `bias`"),
    ("NormTuning", "`tuning`: `norm`"),
    ("LoraTuning", "`tuning`: `lora`"),
    ("OsfTuning", "`tuning`: `osf`"),
    ("AdapterTuning", "`tuning`: `adapter`"),
    ("PrefixTuning", "`tuning`: `prefix`"),
    ("PTuningV2", "`tuning`: `p-tuning-v2`"),
    ("PromptTuning", "`tuning`: `prompt`"),
    ("PTuning", "`tuning`: `p-tuning`"),
    ("InstructionPrompt", "`tuning`: `instruction-prompt`"),
    ("Demonstrations", "`tuning.demonstrations`"),
    ("ExpandTuning", "`tuning`: `expand`"),
    ("Evaluation", "`evaluation`"),
    ("HeldOutFile", "`evaluation.retained[]`, `evaluation.learned[]`, `evaluation.test[]`"),
    ("Task", "`evaluation.tasks[]`"),
    ("Shown", "`evaluation.tasks[].shown`"),
    ("Save", "`save`"),
    ("Choose", "`save.choose`"),
    ("Compute", "`compute`"),
)
NOTES = {
    "LikeFile": "A path alone, without a mapping, is also accepted.",
    "HeldOutFile": "A path alone, without a mapping, is also accepted; its file name then gives the `name`.",
    "FreshModel": "A name alone, without a mapping, is a model that is there.",
    "NewTokenizer": "A name alone, without a mapping, is a tokenizer that is there.",
}
WORDS = {"Amount": "tokens", "AmountOrNone": "tokens", "Share": "share", "Length": "length", "Rate": "rate"}


def stage_reference() -> str:
    """The page, as text."""
    schema = json.loads(stage_file.json_schema())
    parts = {"Stage": schema, **schema["$defs"]}
    missing = parts.keys() - {name for name, _ in PARTS}
    if missing:
        raise ValueError(f"parts of a stage that the reference does not list: {sorted(missing)}")
    return HEAD + "".join(_section(name, title, parts[name]) for name, title in PARTS)


def _section(name: str, title: str, part: dict[str, Any]) -> str:
    about = [part.get("description", ""), NOTES.get(name, "")]
    lines = [f"\n## {title}\n", *(f"{text}\n" for text in about if text)]
    lines += ["| key | value | default | meaning |", "|---|---|---|---|"]
    declared, said = _declared(_type(name)), _docstrings(_type(name))
    own = _type(name).__annotations__
    for key, node in sorted(part["properties"].items(), key=lambda item: item[0] not in own):
        default = "required" if key in part.get("required", []) else _default(node)
        value = _word(declared[key]) or _value(node)
        if key not in said and key != "kind":
            raise ValueError(f"{name}.{key} has no docstring that says what it means")
        meaning = " ".join(said.get(key, "").split()).replace("<", "&lt;").replace("|", "\\|")
        lines.append("| " + " | ".join((f"`{key}`", value, default, meaning)) + " |")
    return "\n".join(lines) + "\n"


def _type(name: str) -> type:
    """The type of a part, wherever it is written."""
    return next(
        vars(home)[name]
        for home in (
            s,
            schedules,
            objectives,
            penalties,
            tunings,
            mixing,
            document_filters,
            tasks,
            sparse_updates,
            row_format,
        )
        if name in vars(home)
    )


def _bases(part: type) -> list[type]:
    """A part and what it inherits keys from, those that are inherited first."""
    return [
        base
        for base in reversed(part.__mro__)
        if issubclass(base, quantities.ConfigModel) and base is not quantities.ConfigModel
    ]


def _declared(part: type) -> dict[str, str]:
    """The types of a part's keys as they are written in the source."""
    return {key: str(value) for base in _bases(part) for key, value in base.__annotations__.items()}


def _docstrings(part: type) -> dict[str, str]:
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
    (here / "stage.schema.json").write_text(stage_file.json_schema() + "\n")
    (here / "study.schema.json").write_text(study.study_schema() + "\n")
