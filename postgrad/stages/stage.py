"""What is a stage? One answer to each of the six questions, as frozen data read from a YAML file.

The closed unions of schedules and objectives are written here as types, so an editor can list them, the published JSON
Schema has them, and an unknown key is an error that names the nearest one.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from postgrad.errors import PostgradError, StageError, nearest
from postgrad.lineage.fingerprint import fingerprint

_UNITS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


_NUMBER = r"\d[\d_,]*(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?"


def _number(value: Any) -> Any:
    """YAML reads yes and no as truth values, which Python counts as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError(f"a number is expected, not {str(value).lower()}")
    return value


def _amount(value: Any) -> Any:
    if isinstance(value, str):
        match = re.fullmatch(rf"\s*({_NUMBER})\s*([kmbgt]?)\s*(?:tokens?)?\s*", value, re.IGNORECASE)
        if not match:
            raise ValueError(f"a number of tokens such as 500k, 20M or 1.5B is expected, not {value!r}")
        value = float(match[1].replace("_", "").replace(",", "")) * _UNITS[match[2].lower()]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"a number of tokens such as 500k, 20M or 1.5B is expected, not {value}")
        return round(value)
    return _number(value)


def _share(value: Any) -> Any:
    if isinstance(value, str):
        match = re.fullmatch(rf"\s*({_NUMBER})\s*(%?)\s*", value, re.IGNORECASE)
        if not match:
            raise ValueError(f"a share such as 5% or 0.05 is expected, not {value!r}")
        return float(match[1].replace("_", "").replace(",", "")) / (100 if match[2] else 1)
    return _number(value)


def _length(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return f"{value} steps"
    if isinstance(value, str) and re.fullmatch(
        rf"\s*(?:{_NUMBER})\s*(%|steps?|[kmbgt]?\s*tokens?|)\s*", value, re.IGNORECASE
    ):
        return f"{value.strip()} steps" if re.fullmatch(r"[\d_]+", value.strip()) else value.strip()
    raise ValueError(f"a length such as 1%, 200 steps or 2M tokens is expected, not {value!r}")


# In a file each of these may also be text; the schema says so, as editors hold files against it.
Amount = Annotated[
    int,
    Field(gt=0, description="tokens: 500k, 20M, 1.5B"),
    BeforeValidator(_amount, json_schema_input_type=int | float | str),
]
Share = Annotated[
    float,
    Field(ge=0, le=1, description="5% or 0.05"),
    BeforeValidator(_share, json_schema_input_type=float | str),
]
Length = Annotated[
    str,
    Field(description="1%, 200 steps or 2M tokens"),
    BeforeValidator(_length, json_schema_input_type=int | str),
]
Rate = Annotated[float, Field(gt=0, description="a learning rate"), BeforeValidator(_number)]
Positive = Annotated[int, Field(gt=0), BeforeValidator(_number)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def in_steps(length: str, steps: int, tokens: int) -> float:
    """A length in steps, for a stage of so many steps and tokens."""
    match = re.fullmatch(rf"({_NUMBER})\s*(.*)", length, re.IGNORECASE)
    assert match, length
    unit = match[2].lower().strip()
    number = float(match[1].replace("_", "").replace(",", ""))
    if unit == "%":
        return number / 100 * steps
    if unit.endswith(("token", "tokens")):
        return number * _UNITS[unit.split("token")[0].strip()] / tokens * steps
    return number


class Part(BaseModel):
    """A frozen piece of a stage; every key is known."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Source(Part):
    """Text to read: files (`path`), a Hub data set (`hub`), or everything the start model has seen (`seen_so_far`)."""

    name: Annotated[str, Field(pattern=r"^[\w.\-]+$")]
    path: str | None = None
    """A file, a folder or a glob; .txt .md .jsonl .json .csv .parquet, each also .gz and .zst."""
    hub: str | None = None
    """A data set on the Hugging Face Hub, `owner/name`."""
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    seen_so_far: bool = False
    """Replay the token-weighted mixture of everything earlier stages consumed, replays included."""
    share: Share | None = None
    """Share of the stage's trained tokens; one source may leave it out and takes what remains."""
    role: Literal["new", "replay"] = "new"
    columns: dict[str, str] = {}
    """Which column is which, e.g. `{text: abstract}`."""
    documents: Literal["auto", "file", "passages", "paragraphs", "lines"] = "auto"
    """What a document is in a text file; auto: the file, or passages of about 4,000 characters in a large one."""
    held_out: Share | None = None
    """Share of documents (by content hash) kept for evaluation; left out: enough for about 200 documents when
    `evaluation` names no file of that role (learned; retained for replay), else none."""
    max_passes: Annotated[float, Field(gt=0)] = 4.0
    """How often the source may be read in this stage; see `data.when_short`."""
    stands_for: Amount | None = None
    """Tokens of this distribution that the start model consumed before its first recorded stage; counts as seen."""

    @model_validator(mode="after")
    def _one_origin(self) -> Source:
        if sum([self.path is not None, self.hub is not None, self.seen_so_far]) != 1:
            raise ValueError("a source has exactly one of `path`, `hub` and `seen_so_far`")
        if self.seen_so_far:
            fixed = sorted(
                {"columns", "documents", "held_out", "stands_for", "subset", "split"} & self.model_fields_set
            )
            if fixed:
                raise ValueError(f"a replay of everything seen takes `{fixed[0]}` from the earlier stages")
        return self


class Shift(Part):
    """From a point of the stage on, these shares hold."""

    at: Length | None = None
    """1%, 200 steps or 2M tokens."""
    at_rate: Share | None = None
    """... or when the learning rate has fallen to this share of its peak."""
    shares: dict[str, Share]

    @model_validator(mode="after")
    def _one_point(self) -> Shift:
        if (self.at is None) == (self.at_rate is None):
            raise ValueError("a change of shares has exactly one of `at` and `at_rate`")
        return self


class Data(Part):
    """What is read."""

    sources: Annotated[list[Source], Field(min_length=1)]
    sequence_length: Annotated[int, Field(ge=2)] = 1024
    """Positions in a row."""
    shifts: list[Shift] = []
    """A curriculum: shares that change over the stage."""
    when_short: Literal["refuse", "repeat", "stop", "renormalise"] = "refuse"
    """When a source would be read more than its `max_passes`: refuse before training, repeat it all the same, stop the
    stage there, or give its share to the others from there on."""
    skip_steps: Annotated[int, Field(ge=0)] = 0
    """Begin reading where this step of the same sources and seed would; an anneal branched from step N skips N."""
    max_document_tokens: Annotated[int, Field(ge=2)] | None = None
    """Longer documents are cut there; what is cut is counted."""
    eos: str | None = None
    """The token that ends a document; left out: the tokenizer's own."""
    overlap: Literal["report", "refuse", "off"] = "report"
    """Look for 13-grams of held-out documents in the training text."""
    workers: Positive | None = None
    """Processes or threads that tokenise; left out: one a core."""

    @model_validator(mode="after")
    def _names(self) -> Data:
        names = [source.name for source in self.sources]
        doubled = {name for name in names if names.count(name) > 1}
        if doubled:
            raise ValueError(f"two sources are called {sorted(doubled)[0]!r}")
        for shift in self.shifts:
            for name in shift.shares:
                if name not in names:
                    raise ValueError(f"`shifts` names a source {name!r} that is not there; {nearest(name, names)}")
        return self


class Batch(Part):
    """How many rows make a step."""

    sequences: Positive = 32
    """Rows in a global batch."""
    micro: Positive | None = None
    """Rows a device holds at once; left out: as many as fit and help. Makes no difference to the result."""


class Optimizer(Part):
    """AdamW. Matrices decay, vectors do not."""

    kind: Literal["adamw"] = "adamw"
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip: Annotated[float, Field(gt=0)] = 1.0
    moments: Literal["reset", "keep", "keep-second"] = "reset"
    """At the stage's start: from zero, or the start checkpoint's (both moments, or only the second)."""


def _falling(**rates: float) -> None:
    """Refuse rates that do not fall in the order they are given: a swapped pair is a mistake, not a wish."""
    for (above, high), (below, low) in itertools.pairwise(rates.items()):
        if low > high:
            raise ValueError(f"`{below}` ({low:g}) lies above `{above}` ({high:g})")


class Constant(Part):
    """Warm-up, then one rate."""

    kind: Literal["constant"]
    peak: Rate
    warmup: Length = "0%"


class Decay(Part):
    """Warm-up to `peak`, then a decay to `floor` over the rest: re-warming and re-decaying when a model is continued."""

    kind: Literal["rewarm", "cosine", "linear", "inverse-sqrt", "exponential", "1-sqrt"]
    """`rewarm` and `cosine` are the same curve."""
    peak: Rate
    floor: Annotated[float, Field(ge=0)]
    warmup: Length = "1%"
    start: Annotated[float, Field(ge=0)] = 0.0
    """The rate the warm-up starts from."""

    @model_validator(mode="after")
    def _falls(self) -> Decay:
        _falling(peak=self.peak, floor=self.floor)
        return self


class FromFloor(Part):
    """No warm-up: start at the pre-training's final rate and decay on (Parmar et al. 2024)."""

    kind: Literal["from-floor"]
    start: Rate
    floor: Annotated[float, Field(ge=0)]
    shape: Literal["cosine", "linear", "exponential", "1-sqrt", "inverse-sqrt"] = "cosine"

    @model_validator(mode="after")
    def _falls(self) -> FromFloor:
        _falling(start=self.start, floor=self.floor)
        return self


class Infinite(Part):
    """Warm-up, cooldown, constant, anneal: no budget has to be fixed beforehand (Ibrahim et al. 2024)."""

    kind: Literal["infinite"]
    peak: Rate
    constant: Rate
    """The rate of the constant phase."""
    floor: Rate
    warmup: Length = "1%"
    cooldown: Length = "60%"
    """Length of the cooldown, from the end of the warm-up."""
    constant_until: Length = "85%"
    """Where the constant phase ends and the anneal begins, from the stage's first step; 100%: no anneal."""
    cooldown_shape: Literal["cosine", "inverse-sqrt"] = "cosine"
    timescale: Annotated[float, Field(gt=0)] = 10.0
    """How bent the inverse-sqrt cooldown is."""

    @model_validator(mode="after")
    def _falls(self) -> Infinite:
        _falling(peak=self.peak, constant=self.constant, floor=self.floor)
        return self


class Wsd(Part):
    """Warm-up, stable, decay at the end (Hu et al. 2024)."""

    kind: Literal["wsd"]
    peak: Rate
    floor: Rate
    warmup: Length = "1%"
    decay: Length = "10%"
    shape: Literal["1-sqrt", "linear", "cosine", "exponential", "inverse-linear"] = "1-sqrt"

    @model_validator(mode="after")
    def _falls(self) -> Wsd:
        _falling(peak=self.peak, floor=self.floor)
        return self


class Anneal(Part):
    """Only the decay: branched from a checkpoint of a constant phase, starting at the rate that held there."""

    kind: Literal["anneal"]
    floor: Rate
    start: Rate | None = None
    """Left out: the rate at the checkpoint the stage starts from."""
    shape: Literal["exponential", "1-sqrt", "linear", "cosine", "inverse-linear"] = "exponential"


class Piece(Part):
    """One piece of a schedule put together by hand."""

    shape: Literal["constant", "linear", "cosine", "inverse-sqrt", "exponential", "1-sqrt", "inverse-linear"]
    start: Annotated[float, Field(ge=0)]
    end: Annotated[float, Field(ge=0)] | None = None
    length: Length | None = None
    """The last piece may leave it out and takes the rest."""


class Then(Part):
    """Pieces one after the other."""

    kind: Literal["then"]
    pieces: Annotated[list[Piece], Field(min_length=1)]

    @model_validator(mode="after")
    def _ends(self) -> Then:
        for piece in self.pieces:
            if (piece.shape != "constant") == (piece.end is None):
                raise ValueError("a constant piece has no `end`; every other piece has one")
        if any(piece.length is None for piece in self.pieces[:-1]):
            raise ValueError("only the last piece may leave out its `length`")
        return self


AnySchedule = Annotated[Constant | Decay | FromFloor | Infinite | Wsd | Anneal | Then, Field(discriminator="kind")]


class NextTokenObjective(Part):
    """Next-token prediction."""

    kind: Literal["next-token"]
    weight: Annotated[float, Field(gt=0)] = 1.0


AnyObjective = NextTokenObjective


class HeldOutFile(Part):
    """Text to be scored."""

    name: Annotated[str, Field(pattern=r"^[\w.\-]+$")]
    path: str
    columns: dict[str, str] = {}
    documents: Literal["auto", "file", "passages", "paragraphs", "lines"] = "auto"


def held_out_file(value: Any) -> Any:
    if isinstance(value, str):
        stem = re.sub(r"(\.(txt|md|jsonl|json|csv|parquet|gz|zst))+$", "", Path(value).name)
        return {"name": re.sub(r"[^\w.\-]+", "-", stem) or "held-out", "path": value}
    return value


AnyHeldOut = Annotated[HeldOutFile, BeforeValidator(held_out_file, json_schema_input_type=str | HeldOutFile)]


class Evaluation(Part):
    """What is measured: on the same documents before and after, and at chosen steps in between."""

    retained: list[AnyHeldOut] = []
    """Text the model must not forget."""
    learned: list[AnyHeldOut] = []
    """Text of the new kind."""
    every: Length = "10%"
    """How often during training; denser in the first 2 %, where the stability gap is."""
    during_tokens: Amount = 20_000
    """Tokens of each set that are scored during training; before and after, all are."""
    max_tokens: Amount = 1_000_000
    """Tokens of each set that are scored before and after (documents in the order of their content hash)."""
    samples: Annotated[int, Field(ge=0)] = 2
    """Texts of each set that are continued before and after, for the report."""

    @model_validator(mode="after")
    def _names(self) -> Evaluation:
        names = [item.name for item in (*self.retained, *self.learned)]
        doubled = {name for name in names if names.count(name) > 1}
        if doubled:
            raise ValueError(f"two held-out files are called {sorted(doubled)[0]!r}; give them a `name`")
        return self


class Save(Part):
    """When checkpoints are written, and which stay."""

    every: Length = "20%"
    keep: Positive | Literal["all"] = 2
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the final model; auto: as the start model is stored."""


class Compute(Part):
    """How the arithmetic is done. `auto` is decided by a probe of this machine, said in the plan, and kept on resume."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: Literal["auto"] | bool = "auto"
    attention: Literal["auto", "eager", "sdpa", "causal_blocks"] = "auto"
    activation_checkpointing: bool = False
    threads: Positive | None = None


class Stage(Part):
    """One stage of a lineage."""

    name: Annotated[str, Field(pattern=r"^[\w.\-]+$")]
    model: str
    """A folder, a Hub name, an earlier stage's run folder or one of its checkpoints."""
    output: str | None = None
    """The run folder; left out: runs/<name>."""
    tokens: Amount | None = None
    """The budget in trained tokens, replay included (compute-equivalent)."""
    new_tokens: Amount | None = None
    """... or the budget in tokens of the new sources; replay comes on top."""
    seed: Annotated[int, Field(ge=0)] = 0
    data: Data
    batch: Batch = Batch()
    schedule: AnySchedule
    optimizer: Optimizer = Optimizer()
    objectives: Annotated[list[AnyObjective], Field(min_length=1)] = [NextTokenObjective(kind="next-token")]
    evaluation: Evaluation = Evaluation()
    max_forgetting: Share | None = None
    """The retention gate: the largest allowed rise of loss on a retained set, upper end of its interval."""
    save: Save = Save()
    compute: Compute = Compute()

    @model_validator(mode="after")
    def _consistent(self) -> Stage:
        if (self.tokens is None) == (self.new_tokens is None):
            raise ValueError("a stage has exactly one of `tokens` (replay included) and `new_tokens` (replay on top)")
        shares = [s.share for s in self.data.sources]
        given = sum(s for s in shares if s is not None)
        if shares.count(None) > 1:
            raise ValueError("data.sources: at most one source may leave out its `share`")
        if None in shares:
            if given >= 1:
                raise ValueError(
                    f"data.sources: the shares add up to {given:.4g} and leave nothing for the source without one"
                )
        elif abs(given - 1) > 1e-6:
            raise ValueError(f"data.sources: the shares add up to {given:.4g}, not to 1")
        for shift in self.data.shifts:
            total = sum(shift.shares.values())
            if abs(total - 1) > 1e-6:
                raise ValueError(f"data.shifts: the shares of a change add up to {total:.4g}, not to 1")
        if self.new_tokens is not None and all(s.role == "replay" for s in self.data.sources):
            raise ValueError("`new_tokens` needs a source with role: new")
        return self

    def shares(self) -> tuple[float, ...]:
        """The share of each source, the one that was left out filled in."""
        given = [s.share for s in self.data.sources]
        rest = 1 - sum(s for s in given if s is not None)
        return tuple(rest if s is None else s for s in given)

    def fingerprint(self) -> str:
        """Of everything that decides the result: not of when checkpoints are written, nor of where."""
        return fingerprint(self.model_dump(mode="json", exclude={"save": {"every", "keep"}, "output": True}))


class _Strict(yaml.SafeLoader):
    """YAML without surprises: a key that is there twice is an error, where YAML would let the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is there twice", key_node.start_mark
                )
            seen.append(key)
        return super().construct_mapping(node, deep)


def load_stage(path: Path, overrides: list[str] | None = None) -> Stage:
    """Read a stage file and apply `key.sub=value` overrides.

    Raises `StageError` with `file: key.path`, what was met and what was expected.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise StageError(f"the stage file cannot be read ({error.strerror})", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise StageError("the stage file is not UTF-8", where=str(path)) from error
    try:
        raw = yaml.load(text, _Strict)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise StageError(f"not YAML: {getattr(error, 'problem', error)}", where=where) from error
    except ValueError as error:  # what looks like a date and is none
        raise StageError(f"not YAML: {error}", where=str(path)) from error
    if not isinstance(raw, dict):
        raise StageError("a stage is a mapping of keys to values", where=str(path))
    for override in overrides or []:
        _override(raw, override)
    return parse_stage(raw, str(path))


def parse_stage(raw: dict[str, Any], where: str) -> Stage:
    """A stage from plain data; `where` names its origin in errors."""
    try:
        return Stage.model_validate(raw)
    except ValidationError as error:
        raise _readable(error, where, raw) from error


def json_schema() -> str:
    """The JSON Schema of a stage file, for editors."""
    return json.dumps(Stage.model_json_schema(), indent=2)


def _override(raw: dict[str, Any], text: str) -> None:
    key, found, value = text.partition("=")
    if not found or not key:
        raise StageError(f"cannot read the override {text!r}", expected="key.sub=value")
    here: Any = raw
    *path, last = key.split(".")
    for name in path:
        here = _item(here, name, key) if isinstance(here, list) else here.setdefault(name, {})
        if not isinstance(here, (dict, list)):
            raise StageError(f"{name} holds a value, so nothing can be set under it", where=key)
    try:
        parsed = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):  # such as a glob, whose star is an alias to YAML
        parsed = value
    if isinstance(here, list):
        here[here.index(_item(here, last, key))] = parsed
    else:
        here[last] = parsed


def _item(items: list[Any], name: str, key: str) -> Any:
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


def _readable(error: ValidationError, where: str, raw: dict[str, Any]) -> PostgradError:
    """Pydantic's first finding, told with the key's path and the way out (the others are counted)."""
    findings = error.errors()
    first = findings[0]
    path = _path(first["loc"], raw, missing=first["type"] == "missing")
    met, expected, way_out = first["msg"], "", ""
    if first["type"] == "extra_forbidden":
        known = _keys_at(first["loc"])
        met = f"there is no key {first['loc'][-1]!r}"
        way_out = nearest(str(first["loc"][-1]), known)
        expected = "one of " + ", ".join(known)
    elif first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        kinds = re.findall(r"'([\w-]+)'", first["ctx"].get("expected_tags", ""))
        given = first["ctx"].get("tag")
        met = f"there is no kind {given!r}" if given else "the `kind` is missing"
        expected = "one of " + ", ".join(
            kinds or ["constant", "rewarm", "infinite", "wsd", "from-floor", "anneal", "then"]
        )
        way_out = nearest(str(given), kinds) if given else ""
    elif first["type"] == "missing":
        met = "the key is missing"
    elif first["type"] == "string_pattern_mismatch":
        met = f"{first['input']!r} cannot be a name"
        expected = "letters, digits, '.', '_' and '-'"
    elif first["type"] == "value_error":
        met = str(first["ctx"]["error"])
    else:
        met = f"{met[0].lower()}{met[1:]}, not {first['input']!r}"
    more = f"(and {len(findings) - 1} more)" if len(findings) > 1 else ""
    return StageError(
        f"{met} {more}".strip(), where=f"{where}: {path}" if path else where, expected=expected, way_out=way_out
    )


def _path(location: tuple[int | str, ...], raw: Any, *, missing: bool) -> str:
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


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    """The known keys of the mapping in which an unknown one was met."""
    schema = Stage.model_json_schema()
    node: dict[str, Any] = schema
    for part in location[:-1]:
        node = _resolved(schema, node)
        if isinstance(part, int):
            node = node.get("items", {})
        elif "discriminator" in node:
            node = {"$ref": node["discriminator"]["mapping"].get(part, "")}
        else:
            node = node.get("properties", {}).get(part, {})
    return list(_resolved(schema, node).get("properties", {}))


def _resolved(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in node or ("anyOf" in node and any("$ref" in option for option in node["anyOf"])):
        reference = node.get("$ref") or next(o["$ref"] for o in node["anyOf"] if "$ref" in o)
        name = reference.rsplit("/", 1)[-1]
        if name not in schema["$defs"]:
            return {}
        node = schema["$defs"][name]
    return node
