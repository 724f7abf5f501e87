"""What is a study? Stages from one base, side by side: what they have in common and how each arm differs, as frozen data.

An arm is a patch on the common stage, with a few words of its own (`replay: 5%`, `start: scratch`, `stages`, `blend`). Which
runs follow from it is worked out in `arms`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationError, model_validator

from postgrad.config.quantities import ConfigModel, Positive, Share, TokenCount
from postgrad.config.renamed_keys import refuse_earlier_study_names
from postgrad.config.stage import AnyHeldOutFile, Source, Stage, expand_held_out_file
from postgrad.config.stage_file import apply_override, make_stage_error, read_mapping
from postgrad.errors import suggest_nearest_or_all

_RESERVED_STARTS = ("base", "scratch")
"""What an arm can start from beside another arm."""

DERIVED_STAGE_KEYS = ("name", "model", "base", "output", "seed")
"""Keys of a stage that a study decides."""

Patch = dict[str, Any]
Seed = Annotated[int, Field(ge=0, strict=True)]


class Pretraining(ConfigModel):
    """The base is trained by the study itself on the old text."""

    pretrain: Patch
    """A patch on the common stage: at least `model` (such as `{from_scratch: llama-1M}`) and `tokens`."""
    seed: Seed = 0
    """Of the base: the same one for all seeds of the arms."""

    @model_validator(mode="after")
    def _check_pretrain(self) -> Pretraining:
        _check_patch(self.pretrain, "pretrain", extra_keys=["model"], allow_sources=False)
        for key in ("model", "tokens"):
            if key not in self.pretrain:
                raise ValueError(f"pretrain: the key `{key}` is missing")
        return self


def _check_patch(patch: Patch, key_path: str, *, extra_keys: Sequence[str] = (), allow_sources: bool = True) -> None:
    """Raise `ValueError` for what a patch cannot say: keys that no stage has, and what follows from the study.

    `place` is told before what was met; `besides`: keys that are known here beside those of a stage; `own_text`: whether
    sources may be named.
    """
    before = f"{key_path}: " if key_path else ""
    known = [*extra_keys, *(name for name in Stage.model_fields if name not in DERIVED_STAGE_KEYS)]
    for key in patch:
        if key in DERIVED_STAGE_KEYS and key not in extra_keys:
            raise ValueError(f"{before}`{key}` follows from the study")
        if key not in known:
            raise ValueError(f"{before}there is no key {key!r}; {suggest_nearest_or_all(key, known)}")
    data, evaluation = ({} if patch.get(key) is None else patch[key] for key in ("data", "evaluation"))
    for key, value, sort, what in (
        ("data", data, Mapping, "a mapping of keys to values"),
        ("evaluation", evaluation, Mapping, "a mapping of keys to values"),
        ("penalties", patch.get("penalties") or [], list, "a list"),
    ):
        if not isinstance(value, sort):
            raise ValueError(f"{before}{key}: {what} is expected, not {value!r}")
    if data.get("sources") and not allow_sources:
        raise ValueError(f"{before}`data.sources` follow from the texts of the study and from the arms")
    if not isinstance(data.get("sources") or [], list):
        raise ValueError(f"{before}data.sources: a list is expected, not {data['sources']!r}")
    if {"retained", "learned"} & set(evaluation):
        raise ValueError(
            f"{before}what is measured is the same for all arms: `retained` and `learned` stand in the study"
        )


def _base_tag(value: Any) -> str:
    return "by parts" if isinstance(value, dict | ConfigModel) else "by name"


AnyBase = Annotated[Annotated[str, Tag("by name")] | Annotated[Pretraining, Tag("by parts")], Discriminator(_base_tag)]


def _parse_text_source(value: Any) -> Any:
    """A text is a source of a stage, whose share and role follow from the arms; a path alone gets a name of its own."""
    if isinstance(value, str):
        return expand_held_out_file(value)
    if isinstance(value, dict):
        for key in ("share", "role", "seen_so_far"):
            if key in value:
                raise ValueError(f"`{key}` follows from the arms")
        if "name" not in value and isinstance(value.get("path"), str):
            return {"name": expand_held_out_file(value["path"])["name"], **value}
    return value


AnyText = Annotated[Source, BeforeValidator(_parse_text_source, json_schema_input_type=str | Source)]


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _check_unique_seeds(seeds: Sequence[int]) -> None:
    if len(set(seeds)) < len(seeds):
        raise ValueError("seeds: a seed is named twice")


class GeneratedReplayConfig(ConfigModel):
    """Text that the base writes itself, once, for all arms with `replay_from: generated`."""

    tokens: TokenCount | None = None
    """Left out: as many as the arm needs that replays most."""
    max_tokens: Positive = 256
    """Tokens of a document."""


class ImportanceConfig(ConfigModel):
    """What each weight of the base matters to the old text: measured once, for all anchors with `importance: measured`."""

    tokens: TokenCount = 50_000
    """Labels that are looked at."""
    kind: Literal["fisher", "empirical", "mas"] = "fisher"
    """As in `postgrad importance`."""


class BlendConfig(ConfigModel):
    """What lies between the base and another arm's model."""

    arm: str
    """The arm."""
    weight: Annotated[Share, Field(gt=0, lt=1)]
    """Of the trained model. Given, not chosen: chosen by the sets that are reported it would look better than it is."""


class Claim(ConfigModel):
    """Something that is thought to be so, and is held against the intervals that were measured."""

    statement: str
    """In words."""
    arm: str
    """The arm that it is about, or `base`."""
    compared_with: str | None = None
    """The arm (or `base`) to compare with: loss of `arm` - loss of `compared_with` <= `max_difference`."""
    loss: Literal["old", "new", "average"] = "average"
    """On which loss."""
    max_difference: float = 0.0
    """Nats per token."""
    min_removed: Annotated[Share, Field(gt=0)] | None = None
    """... or at least this share of the forgetting of the arm `baseline` is removed."""

    @model_validator(mode="after")
    def _check_claim(self) -> Claim:
        if (self.compared_with is None) == (self.min_removed is None):
            raise ValueError(f"the claim {self.statement!r} has exactly one of `compared_with` and `min_removed`")
        unread = sorted({"loss", "max_difference"} & self.model_fields_set)
        if self.min_removed is not None and unread:
            raise ValueError(
                f"`{unread[0]}` goes with `compared_with`; forgetting is removed on old text, by at least `min_removed`"
            )
        if self.arm == self.compared_with:
            raise ValueError(f"the arm {self.arm!r} is compared with itself")
        return self


class Arm(ConfigModel):
    """One way to go on from the base. Keys of a stage stand beside these, and are a patch on the common one."""

    replay: Annotated[Share, Field(lt=1)] = 0.0
    """The share of the trained tokens that is old text; in later parts: of everything seen so far."""
    replay_from: Literal["old", "generated"] = "old"
    """Old text, or what the base wrote itself (`generated_replay`)."""
    start: str = "base"
    """`base`, `scratch` (new random weights, trained as the base was), or the name of another arm."""
    reads: Literal["new", "old", "union"] = "new"
    """The new texts one after the other; or the old one; or all at once, in the shares of their budgets."""
    stages: list[Patch] = []
    """With several new texts: a patch for each, on top of the arm's own."""
    blend: BlendConfig | None = None
    """No training: what lies between the base and another arm's model."""
    seeds: Annotated[list[Seed], BeforeValidator(_as_list), Field(min_length=1)] | None = None
    """Left out: those of the study."""
    patch: Patch = {}
    """The keys of a stage that the arm says; they are written beside the arm's own."""

    @model_validator(mode="before")
    @classmethod
    def _split_patch(cls, value: Any) -> Any:
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            return value
        own = {key: item for key, item in value.items() if key in cls.own_keys()}
        return {**own, "patch": {key: item for key, item in value.items() if key not in own}}

    @classmethod
    def own_keys(cls) -> list[str]:
        """What an arm can say beside the keys of a stage."""
        return [name for name in cls.model_fields if name != "patch"]

    @model_validator(mode="after")
    def _check_arm(self) -> Arm:
        _check_patch(self.patch, "", extra_keys=self.own_keys())
        for number, patch in enumerate(self.stages):
            _check_patch(patch, f"stages[{number}]")
        if self.seeds is not None:
            _check_unique_seeds(self.seeds)
        if self.blend and (self.patch or self.stages or self.replay or self.start != "base" or self.reads != "new"):
            raise ValueError("a blend trains nothing, so nothing else can be said of it")
        for key, said in (("replay", self.replay), ("stages", self.stages), ("data.sources", self._has_own_sources)):
            if said and self.reads != "new":
                raise ValueError(f"`{key}` goes with the new text, and this arm reads `{self.reads}`")
        if self.replay and self._has_own_sources:
            raise ValueError("an arm that names its own `data.sources` says there what is replayed")
        if self.replay_from == "generated" and (not self.replay or self.start == "scratch"):
            raise ValueError("`replay_from: generated` needs `replay`, and a base that can write")
        return self

    @property
    def _has_own_sources(self) -> bool:
        return any((patch.get("data") or {}).get("sources") for patch in (self.patch, *self.stages))


class Study(ConfigModel):
    """Many stages from one base."""

    name: Annotated[str, Field(pattern=r"^[\w.\-]*\w[\w.\-]*$")]
    """Names the study and, without `output`, its folder."""
    output: str | None = None
    """The study's folder; left out: studies/<name>."""
    runs: str | None = None
    """The folder that its runs lie in; left out: the study's own. Studies that name the same one share what coincides."""
    base: AnyBase
    """A model (a folder, a run or a Hub name), or `pretrain`: how the study trains one itself."""
    old: AnyText | None = None
    """Text of the kind that the base knows; what is replayed, and what a base of the study's own is trained on."""
    new: Annotated[list[AnyText], BeforeValidator(_as_list), Field(min_length=1)]
    """Text to learn; several are learnt one after the other."""
    retained: Annotated[list[AnyHeldOutFile], BeforeValidator(_as_list)] = []
    """Held-out text of the old kind."""
    learned: Annotated[list[AnyHeldOutFile], BeforeValidator(_as_list)] = []
    """Held-out text of the new kinds."""
    stage: Patch
    """What the arms have in common: a stage without name, model, seed and held-out files. Its sources follow from the arms.
    `tokens` is the budget of each new text."""
    arms: Annotated[dict[str, Arm], Field(min_length=1)]
    """By name, in the order in which they are shown."""
    seeds: Annotated[list[Seed], BeforeValidator(_as_list), Field(min_length=1)] = [0]
    """Each arm is carried out once with each."""
    baseline: str | None = None
    """The arm without protection, whose forgetting the others are held against; left out: `none`, if there is one."""
    union: str | None = None
    """The arm that saw all text at once; left out: `union`, if there is one."""
    generated_replay: GeneratedReplayConfig = GeneratedReplayConfig()
    """For `replay_from: generated`."""
    importance: ImportanceConfig = ImportanceConfig()
    """For anchors with `importance: measured`."""
    claims: list[Claim] = []
    """What is thought to come out."""

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        _check_patch(self.stage, "stage", allow_sources=False)
        _check_unique_seeds(self.seeds)
        self._check_texts()
        self._check_arms()
        self._check_claims()
        return self

    def _check_texts(self) -> None:
        for key, sets, lost in (("retained", self.retained, "forgotten"), ("learned", self.learned, "learnt")):
            if not sets:
                kind = "old kind" if key == "retained" else "new kinds"
                raise ValueError(
                    f"no {key} set: what is {lost} could not be told (`{key}`: held-out text of the {kind})"
                )
        for what, names in (
            ("held-out sets", [h.name for h in (*self.retained, *self.learned)]),
            ("texts", [t.name for t in ([self.old] if self.old else []) + self.new]),
        ):
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise ValueError(f"two {what} are called {twice!r}; give them a `name`")
        if self.old is None:
            wants = [n for n, a in self.arms.items() if (a.replay and a.replay_from == "old") or a.reads != "new"]
            if isinstance(self.base, Pretraining) or wants:
                raise ValueError(f"`old` is missing: {'the base' if not wants else f'the arm {wants[0]!r}'} reads it")

    def _check_arms(self) -> None:
        for name, arm in self.arms.items():
            if name in _RESERVED_STARTS or not name.strip():
                raise ValueError(f"arms: an arm cannot be called {name!r}, which says something else or nothing")
            if arm.stages and len(arm.stages) != len(self.new):
                raise ValueError(
                    f"the arm {name!r} has {len(arm.stages)} `stages`, and there are {len(self.new)} new texts"
                )
        for where, said, besides in self._arm_references():
            known = (*besides, *self.arms)
            if said not in known:
                raise ValueError(
                    f"{where} names an arm {said!r} that is not there; {suggest_nearest_or_all(said, known)}"
                )
        for name, arm in self.arms.items():
            self.predecessors(name)
            if arm.blend and self.arms[arm.blend.arm].blend:
                raise ValueError(
                    f"arms.{name}.blend.arm: {arm.blend.arm!r} is a blend itself; a blend of a blend is "
                    f"a blend of the same arm with another weight"
                )

    def _check_claims(self) -> None:
        for claim in self.claims:
            if claim.min_removed is None:
                continue
            if self.baseline_name is None:
                raise ValueError(f"the claim {claim.statement!r}: `baseline` does not say whose forgetting is removed")
            if claim.arm in ("base", self.baseline_name):
                raise ValueError(
                    f"the claim {claim.statement!r}: {claim.arm!r} removes nothing: the others are measured by it"
                )

    def _arm_references(self) -> list[tuple[str, str, tuple[str, ...]]]:
        """Where an arm is named, which, and what may stand there beside the arms."""
        found: list[tuple[str, str, tuple[str, ...]]] = []
        for key, said in (("baseline", self.baseline), ("union", self.union)):
            if said is not None:
                found.append((key, said, ()))
        for name, arm in self.arms.items():
            found.append((f"arms.{name}.start", arm.start, _RESERVED_STARTS))
            if arm.blend:
                found.append((f"arms.{name}.blend.arm", arm.blend.arm, ()))
        for claim in self.claims:
            named = [claim.arm] if claim.compared_with is None else [claim.arm, claim.compared_with]
            found += [(f"the claim {claim.statement!r}", said, ("base",)) for said in named]
        return found

    def predecessors(self, name: str) -> list[str]:
        """The arms that an arm goes on from, the first one first. Raises `ValueError` for arms that wait for each other."""
        found = [name]
        while True:
            arm = self.arms[found[-1]]
            earlier = arm.blend.arm if arm.blend else arm.start
            if earlier in _RESERVED_STARTS:
                return found[:0:-1]
            if earlier in found:
                raise ValueError(f"the arms {earlier!r} and {found[-1]!r} wait for each other")
            found.append(earlier)

    def is_from_scratch(self, name: str) -> bool:
        """Whether an arm goes back to new random weights, by itself or by the arms that it goes on from."""
        return self.arms[[*self.predecessors(name), name][0]].start == "scratch"

    @property
    def baseline_name(self) -> str | None:
        """The arm whose forgetting the others are held against."""
        return self.baseline or ("none" if "none" in self.arms else None)

    @property
    def union_name(self) -> str | None:
        """The arm that saw all text at once."""
        return self.union or ("union" if "union" in self.arms else None)

    def arm_seeds(self, name: str) -> list[int]:
        """The seeds of an arm."""
        arm = self.arms[name]
        return self.seeds if arm.seeds is None else arm.seeds


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study file and apply `key.sub=value` overrides.

    Raises `StageError` with `file: key.path`, what was met and what was expected.
    """
    raw = read_mapping(path, "the study file", "a study is a mapping of keys to values")
    for said in overrides:
        apply_override(raw, said)
    return parse_study(raw, str(path))


def parse_study(raw: dict[str, Any], where: str) -> Study:
    """A study from plain data; `where` names its origin in errors."""
    refuse_earlier_study_names(raw, where)
    try:
        return Study.model_validate(raw)
    except ValidationError as error:
        raise make_stage_error(error, where, raw, Study) from error


def study_schema() -> str:
    """The JSON Schema of a study file, for editors. What an arm says of its stage is a patch, and may be any part of one."""
    schema = Study.model_json_schema()
    arm, source = schema["$defs"]["Arm"], schema["$defs"]["Source"]
    del arm["properties"]["patch"]
    arm["additionalProperties"] = True
    source["required"].remove("name")  # which follows from the path
    for key in ("new", "retained", "learned", "seeds"):
        listed = schema["properties"][key]
        told = {word: listed.pop(word) for word in ("description", "title", "default") if word in listed}
        schema["properties"][key] = {"anyOf": [listed, listed["items"]], **told}
    arms = schema["properties"]["arms"]
    arms["additionalProperties"] = {"anyOf": [arms["additionalProperties"], {"type": "null"}]}
    return json.dumps(schema, indent=2)


def merge_patch(base: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """A patch on plain data: mappings are merged, all else is replaced; a mapping of another `kind` replaces the whole."""
    out = dict(base)
    for key, value in patch.items():
        under = out.get(key)
        both = isinstance(under, Mapping) and isinstance(value, Mapping)
        if both and value.get("kind", under.get("kind")) == under.get("kind"):  # type: ignore[union-attr]
            out[key] = merge_patch(under, value)  # type: ignore[arg-type]
        else:
            out[key] = value
    return out
