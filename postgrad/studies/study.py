"""What is a study? Stages from one base, side by side: what they have in common and how each arm differs, as frozen data.

An arm is a patch on the common stage, with a few words of its own (`replay: 5%`, `start: scratch`, `parts`, `blend`). Which
runs follow from it is worked out in `arms`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationError, model_validator

from postgrad.errors import nearest
from postgrad.stages.amounts import Amount, Part, Positive, Share
from postgrad.stages.parsing import override, read_mapping, readable
from postgrad.stages.stage import AnyHeldOut, Source, Stage, held_out_file

OWN = ("name", "model", "base", "output", "seed")
"""Keys of a stage that a study decides."""

Patch = dict[str, Any]


class Pretraining(Part):
    """The base is trained by the study itself on the old text."""

    pretrain: Patch
    """A patch on the common stage: at least `model` (such as `{fresh: llama-1M}`) and `tokens`."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the base: the same one for all seeds of the arms."""

    @model_validator(mode="after")
    def _whole(self) -> Pretraining:
        known = [*Stage.model_fields]
        for key in self.pretrain:
            if key not in known or key in ("name", "output", "seed"):
                raise ValueError(f"base.pretrain: there is no key {key!r} here; {nearest(key, known)}")
        for key in ("model", "tokens"):
            if key not in self.pretrain:
                raise ValueError(f"base.pretrain: the key `{key}` is missing")
        return self


def _form(value: Any) -> str:
    return "by parts" if isinstance(value, dict | Part) else "by name"


AnyBase = Annotated[Annotated[str, Tag("by name")] | Annotated[Pretraining, Tag("by parts")], Discriminator(_form)]


def _text(value: Any) -> Any:
    """A text is a source of a stage, whose share and role follow from the arms; a path alone gets a name of its own."""
    if isinstance(value, str):
        return held_out_file(value)
    if isinstance(value, dict):
        for key in ("share", "role", "seen_so_far"):
            if key in value:
                raise ValueError(f"`{key}` follows from the arms")
        if "name" not in value and isinstance(value.get("path"), str):
            return {"name": held_out_file(value["path"])["name"], **value}
    return value


AnyText = Annotated[Source, BeforeValidator(_text, json_schema_input_type=str | Source)]


def _several(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


class SelfMade(Part):
    """Text that the base writes itself, once, for all arms with `replay_from: self-made`."""

    tokens: Amount | None = None
    """Left out: as many as the arm needs that replays most."""
    longest: Positive = 256
    """Tokens of a document."""


class Measured(Part):
    """What each weight of the base matters to the old text: measured once, for all anchors with `importance: measured`."""

    tokens: Amount = 50_000
    """Labels that are looked at."""
    kind: Literal["fisher", "empirical", "mas"] = "fisher"
    """As in `postgrad importance`."""


class Blended(Part):
    """What lies between the base and another arm's model."""

    of: str
    """The arm."""
    weight: Annotated[Share, Field(gt=0, lt=1)]
    """Of the trained model. Given, not chosen: chosen by the sets that are reported it would look better than it is."""


class Claim(Part):
    """Something that is thought to be so, and is held against the intervals that were measured."""

    say: str
    """In words."""
    arm: str
    """The arm that it is about, or `base`."""
    than: str | None = None
    """What it is compared with, an arm or `base`: the loss of `arm` less that of `than` is `at_most` so much."""
    on: Literal["old", "new", "average"] = "average"
    """On which loss."""
    at_most: float = 0.0
    """Nats per token."""
    removes: Annotated[Share, Field(gt=0)] | None = None
    """... or at least this share of the forgetting of the arm `against` is removed."""

    @model_validator(mode="after")
    def _one(self) -> Claim:
        if (self.than is None) == (self.removes is None):
            raise ValueError(f"the claim {self.say!r} has exactly one of `than` and `removes`")
        return self


class Arm(Part):
    """One way to go on from the base. Keys of a stage stand beside these, and are a patch on the common one."""

    replay: Annotated[Share, Field(lt=1)] = 0.0
    """The share of the trained tokens that is old text; in later parts: of everything seen so far."""
    replay_from: Literal["old", "self-made"] = "old"
    """Old text, or what the base wrote itself (`self_made`)."""
    start: str = "base"
    """`base`, `scratch` (new random weights, trained as the base was), or the name of another arm."""
    reads: Literal["new", "old", "union"] = "new"
    """The new texts one after the other; or the old one; or all at once, in the shares of their budgets."""
    parts: list[Patch] = []
    """With several new texts: a patch for each, on top of the arm's own."""
    blend: Blended | None = None
    """No training: what lies between the base and another arm's model."""
    seeds: list[Annotated[int, Field(ge=0)]] | None = None
    """Left out: those of the study."""
    patch: Patch = {}
    """The keys of a stage that the arm says; they are written beside the arm's own."""

    @model_validator(mode="before")
    @classmethod
    def _apart(cls, value: Any) -> Any:
        if value is None:
            return {}
        if not isinstance(value, Mapping) or "patch" in value:
            return value
        own = {key: item for key, item in value.items() if key in cls.model_fields}
        return {**own, "patch": {key: item for key, item in value.items() if key not in own}}

    @model_validator(mode="after")
    def _known(self) -> Arm:
        known = [
            *(name for name in Arm.model_fields if name != "patch"),
            *(n for n in Stage.model_fields if n not in OWN),
        ]
        for patch in (self.patch, *self.parts):
            for key in patch:
                if key in OWN:
                    raise ValueError(f"`{key}` follows from the study")
                if key not in known or (patch is not self.patch and key not in Stage.model_fields):
                    raise ValueError(f"there is no key {key!r}; {nearest(key, known) or 'one of ' + ', '.join(known)}")
            if {"retained", "learned"} & set(patch.get("evaluation") or {}):
                raise ValueError(
                    "what is measured is the same for all arms: `retained` and `learned` stand in the study"
                )
        if self.blend and (self.patch or self.parts or self.replay or self.start != "base" or self.reads != "new"):
            raise ValueError("a blend trains nothing, so nothing else can be said of it")
        if self.replay and self.reads != "new":
            raise ValueError(f"`replay` goes with the new text, and this arm reads `{self.reads}`")
        if self.replay and "data" in self.patch and "sources" in self.patch["data"]:
            raise ValueError("an arm that names its own `data.sources` says there what is replayed")
        if self.parts and self.reads != "new":
            raise ValueError(f"`parts` are those of the new texts, and this arm reads `{self.reads}`")
        if self.replay_from == "self-made" and (not self.replay or self.start == "scratch"):
            raise ValueError("`replay_from: self-made` needs `replay`, and a base that can write")
        return self


class Study(Part):
    """Many stages from one base."""

    name: Annotated[str, Field(pattern=r"^[\w.\-]+$")]
    """Names the study and, without `output`, its folder."""
    output: str | None = None
    """The study's folder; left out: studies/<name>."""
    runs: str | None = None
    """The folder that its runs lie in; left out: the study's own. Studies that name the same one share what coincides."""
    base: AnyBase
    """A model (a folder, a run or a Hub name), or `pretrain`: how the study trains one itself."""
    old: AnyText | None = None
    """Text of the kind that the base knows; what is replayed, and what a base of the study's own is trained on."""
    new: Annotated[list[AnyText], BeforeValidator(_several), Field(min_length=1)]
    """Text to learn; several are learnt one after the other."""
    retained: Annotated[list[AnyHeldOut], BeforeValidator(_several)] = []
    """Held-out text of the old kind."""
    learned: Annotated[list[AnyHeldOut], BeforeValidator(_several)] = []
    """Held-out text of the new kinds."""
    stage: Patch
    """What the arms have in common: a stage without name, model, seed and held-out files. Its sources follow from the arms.
    `tokens` is the budget of each new text."""
    arms: Annotated[dict[str, Arm], Field(min_length=1)]
    """By name, in the order in which they are shown."""
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], BeforeValidator(_several), Field(min_length=1)] = [0]
    """Each arm is carried out once with each."""
    against: str | None = None
    """The arm without protection, whose forgetting the others are held against; left out: `none`, if there is one."""
    union: str | None = None
    """The arm that saw all text at once; left out: `union`, if there is one."""
    self_made: SelfMade = SelfMade()
    """For `replay_from: self-made`."""
    importance: Measured = Measured()
    """For anchors with `importance: measured`."""
    claims: list[Claim] = []
    """What is thought to come out."""

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        if not self.retained:
            raise ValueError(
                "no retained set: what is forgotten could not be told (`retained`: held-out text of the old kind)"
            )
        if not self.learned:
            raise ValueError(
                "no learned set: what is learnt could not be told (`learned`: held-out text of the new kind)"
            )
        for what, names in (
            ("held-out sets", [h.name for h in (*self.retained, *self.learned)]),
            ("texts", [t.name for t in ([self.old] if self.old else []) + self.new]),
        ):
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise ValueError(f"two {what} are called {twice!r}; give them a `name`")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed is named twice")
        if self.old is None:
            wants = [n for n, a in self.arms.items() if (a.replay and a.replay_from == "old") or a.reads != "new"]
            if isinstance(self.base, Pretraining) or wants:
                raise ValueError(f"`old` is missing: {'the base' if not wants else f'the arm {wants[0]!r}'} reads it")
        for key in self.stage:
            if key in OWN or key not in Stage.model_fields:
                known = [name for name in Stage.model_fields if name not in OWN]
                why = "follows from the study" if key in OWN else nearest(key, known) or "one of " + ", ".join(known)
                raise ValueError(f"stage: `{key}` cannot be said here; {why}")
        for name, arm in self.arms.items():
            if arm.parts and len(arm.parts) != len(self.new):
                raise ValueError(
                    f"the arm {name!r} has {len(arm.parts)} `parts`, and there are {len(self.new)} new texts"
                )
        for where, said in self._named():
            if said not in self.arms:
                raise ValueError(f"{where} names an arm {said!r} that is not there; {nearest(said, self.arms)}")
        for name in self.arms:
            self.before(name)
        return self

    def _named(self) -> list[tuple[str, str]]:
        """Where an arm is named, and which."""
        found = [(key, said) for key, said in (("against", self.against), ("union", self.union)) if said is not None]
        for name, arm in self.arms.items():
            if arm.start not in ("base", "scratch"):
                found.append((f"arms.{name}.start", arm.start))
            if arm.blend:
                found.append((f"arms.{name}.blend.of", arm.blend.of))
        for claim in self.claims:
            known = (claim.arm, claim.than)
            found += [(f"the claim {claim.say!r}", arm) for arm in known if arm not in (None, "base")]
        return found

    def before(self, name: str) -> list[str]:
        """The arms that an arm goes on from, the first one first. Raises `ValueError` for arms that wait for each other."""
        found = [name]
        while True:
            arm = self.arms[found[-1]]
            earlier = arm.blend.of if arm.blend else arm.start
            if earlier in ("base", "scratch"):
                return found[:0:-1]
            if earlier in found:
                raise ValueError(f"the arms {earlier!r} and {found[-1]!r} wait for each other")
            found.append(earlier)

    @property
    def reference(self) -> str | None:
        """The arm whose forgetting the others are held against."""
        return self.against or ("none" if "none" in self.arms else None)

    @property
    def joint(self) -> str | None:
        """The arm that saw all text at once."""
        return self.union or ("union" if "union" in self.arms else None)

    def seeds_of(self, name: str) -> list[int]:
        """The seeds of an arm."""
        arm = self.arms[name]
        return self.seeds if arm.seeds is None else arm.seeds


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study file and apply `key.sub=value` overrides.

    Raises `StageError` with `file: key.path`, what was met and what was expected.
    """
    raw = read_mapping(path, "the study file", "a study is a mapping of keys to values")
    for said in overrides:
        override(raw, said)
    return parse_study(raw, str(path))


def parse_study(raw: dict[str, Any], where: str) -> Study:
    """A study from plain data; `where` names its origin in errors."""
    try:
        return Study.model_validate(raw)
    except ValidationError as error:
        raise readable(error, where, raw, Study) from error


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


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """A patch on plain data: mappings are merged, all else is replaced; a mapping of another `kind` replaces the whole."""
    out = dict(below)
    for key, value in above.items():
        under = out.get(key)
        both = isinstance(under, Mapping) and isinstance(value, Mapping)
        if both and value.get("kind", under.get("kind")) == under.get("kind"):  # type: ignore[union-attr]
            out[key] = merged(under, value)  # type: ignore[arg-type]
        else:
            out[key] = value
    return out
