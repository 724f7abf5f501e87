"""The step graph of a study: each arm with each seed as a chain of steps; steps that several chains need are shared.

A step's key is a fingerprint of its stage, its predecessors and the contents of its texts. Other steps refer to its output
as `@KEY`, which `resolve_step_references` turns into a path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from postgrad.config.quantities import TokenCount
from postgrad.config.renamed_keys import with_fingerprint_names
from postgrad.config.stage import HeldOutFile, Source
from postgrad.config.stage_file import parse_stage
from postgrad.errors import DataError, StageError
from postgrad.storage.fingerprint import fingerprint
from postgrad.studies.study import Arm, Pretraining, Study, merge_patch

KEY_LENGTH = 12
"""Length of a step's key."""

_STEP_REFERENCE = re.compile(rf"@([0-9a-f]{{{KEY_LENGTH}}})(/.*)?")

_STAGE_DEFAULTS: dict[str, Any] = {
    # Studies do not use these, and they take time; `stage` can enable each.
    "evaluation": {"samples": 0, "drift_tokens": 0},
    "save": {"keep": 1},
}

StepKind = Literal["train", "write", "measure", "blend"]


@dataclass(frozen=True)
class Step:
    """A unit of work: a trained model, generated replay, importance, or a blend."""

    key: str
    kind: StepKind
    slug: str
    spec: dict[str, Any]
    """The stage of a `train` step; the arguments of other steps."""
    depends_on: tuple[str, ...]
    """Keys of the steps that must finish first."""
    tokens: int = 0
    """Trained tokens."""


@dataclass(frozen=True)
class Chain:
    """One arm with one seed: its steps, the last of which produces the arm's model."""

    arm: str
    seed: int
    steps: tuple[str, ...]

    @property
    def last_step(self) -> str:
        """The step that produces the arm's model."""
        return self.steps[-1]


@dataclass
class StepGraph:
    """All steps by key in a topological order, and the chains of the arms."""

    study: Study
    steps: dict[str, Step] = field(default_factory=dict)
    chains: list[Chain] = field(default_factory=list)
    base_step: str | None = None
    """The step that trains the base; None for an existing model."""

    def add(self, step: Step) -> str:
        """Add a step unless it exists; returns its key."""
        self.steps.setdefault(step.key, step)
        return step.key

    def arm_chains(self, name: str) -> list[Chain]:
        """An arm's chains, by seed."""
        return [chain for chain in self.chains if chain.arm == name]

    @property
    def training_steps(self) -> list[str]:
        """Keys of the steps that train."""
        return [key for key, step in self.steps.items() if step.kind == "train"]

    @property
    def unshared_run_count(self) -> int:
        """Number of runs without sharing, the base included."""
        own = sum(self.steps[key].kind == "train" for chain in self.chains for key in chain.steps)
        return own + (len(self.chains) if self.base_step is not None else 0)

    def required_steps(self, key: str) -> set[str]:
        """A step and everything that it depends on."""
        found = {key}
        for before in self.steps[key].depends_on:
            found |= self.required_steps(before)
        return found

    def dependent_arms(self, key: str) -> list[str]:
        """The arms that need a step."""
        return list(dict.fromkeys(chain.arm for chain in self.chains if key in self.required_steps(chain.last_step)))


def build_step_graph(study: Study, fingerprint_text: Callable[[Mapping[str, Any]], object], where: str) -> StepGraph:
    """Build the step graph of a study. `fingerprint_text` identifies a text (a source as plain data) by its contents.

    Raises `StageError` for an arm that is not a valid stage, and for two identical arms.
    """
    made = _GraphBuilder(study, fingerprint_text, where)
    for name in sorted(study.arms, key=lambda n: len(study.predecessors(n))):
        for seed in study.arm_seeds(name):
            made.add_arm(name, seed)
    order = list(study.arms)
    made.graph.chains.sort(key=lambda chain: order.index(chain.arm))
    _check_duplicate_arms(made.graph, where)
    return made.graph


def resolve_step_references(value: Any, get_path: Callable[[str], str]) -> Any:
    """Plain data with every `@KEY` replaced by the path of that step's output."""
    if isinstance(value, Mapping):
        return {key: resolve_step_references(item, get_path) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [resolve_step_references(item, get_path) for item in value]
    if isinstance(value, str) and (found := _STEP_REFERENCE.fullmatch(value)):
        return get_path(found[1]) + (found[2] or "")
    return value


def is_step_output(path: object) -> bool:
    """Whether a path refers to the output of a step."""
    return isinstance(path, str) and _STEP_REFERENCE.fullmatch(path) is not None


def parse_token_count(value: Any, where: str) -> int:
    """Parse a number of tokens as in a stage. Raises `StageError`."""
    try:
        return TypeAdapter(TokenCount).validate_python(value)
    except ValidationError as error:
        raise StageError(f"{value!r} is no number of tokens", where=where, expected="such as 500k or 20M") from error


class _GraphBuilder:
    """Builds the graph; identical steps have the same key and are added once."""

    def __init__(self, study: Study, fingerprint_text: Callable[[Mapping[str, Any]], object], where: str) -> None:
        self.study, self.fingerprint_text, self.where = study, fingerprint_text, where
        self.graph = StepGraph(study)
        self.common_stage = merge_patch(_STAGE_DEFAULTS, study.stage)
        self.held_out_sets = {
            role: [item.model_dump(mode="json", exclude_defaults=True) for item in items]
            for role, items in (("retained", study.retained), ("learned", study.learned))
        }
        self.text_key_paths = _text_key_paths({"old": [study.old] if study.old else [], "new": study.new})
        self.held_out_key_paths = _text_key_paths({"retained": study.retained, "learned": study.learned})
        self.has_pretraining = isinstance(study.base, Pretraining)
        if isinstance(study.base, Pretraining):
            self.graph.base_step = self._add_pretraining(study.base)

    # -- arms -------------------------------------------------------------------------------------

    @property
    def base_model(self) -> str:
        """The base as the `model` of a stage."""
        if self.graph.base_step is not None:
            return f"@{self.graph.base_step}"
        assert isinstance(self.study.base, str)
        return self.study.base

    @property
    def _base_dependencies(self) -> list[str]:
        return [self.graph.base_step] if self.graph.base_step is not None else []

    def _old_source(self) -> dict[str, Any]:
        assert self.study.old is not None  # the study's own check
        return self.study.old.model_dump(mode="json", exclude_defaults=True)

    def _fingerprint(self, text: Mapping[str, Any], key_path: str) -> object:
        """Fingerprint of a text. Raises `DataError` with the key path of one that cannot be read."""
        try:
            return self.fingerprint_text(text)
        except DataError as error:
            raise DataError(
                error.problem, where=f"{self.where}: {key_path}", expected=error.expected, hint=error.hint
            ) from error

    def add_arm(self, name: str, seed: int) -> None:
        """Add an arm with a seed."""
        arm = self.study.arms[name]
        if arm.blend:
            self._add_blend(name, arm, seed)
            return
        scratch = arm.start == "scratch"
        earlier: tuple[str, ...] = ()
        if arm.start not in ("base", "scratch"):
            earlier = self._arm_steps(arm.start, seed)
        model: Any = (
            self._model_reference(earlier[-1]) if earlier else self._fresh_model() if scratch else self.base_model
        )
        after = [earlier[-1]] if earlier else self._base_dependencies
        stages = self._arm_stages(name, arm, scratch)
        steps = list(earlier)
        for number, stage in enumerate(stages):
            ending = f"-{self.study.new[number].name}" if len(stages) > 1 else ""
            needs, stage = self._with_dependencies(stage, after)
            place = f"arms.{name}" + (f" (part {number + 1})" if len(stages) > 1 else "")
            key = self._add_training(
                f"{name}{ending}-s{seed}", {**stage, "model": model}, needs, seed=seed, where=place
            )
            steps.append(key)
            model, after = f"@{key}", [key]
        self.graph.chains.append(Chain(name, seed, tuple(steps)))

    def _arm_steps(self, arm: str, seed: int) -> tuple[str, ...]:
        """The steps of another arm with this seed, or with its first one."""
        chains = {chain.seed: chain for chain in self.graph.arm_chains(arm)}
        return chains.get(seed, next(iter(chains.values()))).steps

    def _model_reference(self, key: str) -> str:
        """The output of a step as the `model` of a stage: a run, or the folder of a blend."""
        return f"@{key}/model" if self.graph.steps[key].kind == "blend" else f"@{key}"

    def _fresh_model(self) -> dict[str, Any]:
        """A model with the base's configuration and tokenizer, and random weights."""
        named = f"{self.base_model}/model" if self.has_pretraining else self.base_model
        return {"config": named, "tokenizer": named}

    def _arm_stages(self, name: str, arm: Arm, scratch: bool) -> list[dict[str, Any]]:
        """The stages of an arm in order, without model and name."""
        below = self.common_stage
        if scratch and isinstance(self.study.base, Pretraining):  # trained as the base was
            pretrain = {k: v for k, v in self.study.base.pretrain.items() if k not in ("model", "tokens", "new_tokens")}
            below = merge_patch(below, pretrain)
        whole = merge_patch(below, arm.patch)
        if arm.reads == "new":
            patches = arm.stages or [{}] * len(self.study.new)
            return [
                self._with_sources(merge_patch(whole, patch), self._new_sources(text, arm, number, scratch))
                for number, (text, patch) in enumerate(zip(self.study.new, patches, strict=True))
            ]
        if arm.reads == "old":
            return [self._with_sources(whole, [self._old_source()])]
        budgets = self._token_budgets(name)
        if "tokens" not in arm.patch:
            whole = {**whole, "tokens": sum(budgets) if scratch else sum(budgets[1:])}
        texts = [self._old_source(), *(text.model_dump(mode="json", exclude_defaults=True) for text in self.study.new)]
        total = sum(budgets)
        shares = [{**text, "share": budget / total} for text, budget in zip(texts, budgets, strict=True)]
        return [self._with_sources(whole, shares)]

    def _token_budgets(self, name: str) -> list[int]:
        """Tokens of the old text and of each new one, which set the shares of a union. Raises `StageError`."""
        place = f"{self.where}: arms.{name}"
        if not isinstance(self.study.base, Pretraining):
            old = self.study.old.prior_tokens if self.study.old else None
            if old is None:
                raise StageError(
                    "how much old text the base has read is not known, so a union with it has no shares",
                    where=place,
                    hint="say it: old: {path: ..., prior_tokens: 10B}; or name `data.sources` in the arm, without `reads`",
                )
        else:
            old = parse_token_count(self.study.base.pretrain["tokens"], f"{self.where}: base.pretrain.tokens")
        if "tokens" not in self.common_stage:
            raise StageError(
                "`tokens` is missing", where=f"{self.where}: stage", expected="the budget of each new text"
            )
        each = parse_token_count(self.common_stage["tokens"], f"{self.where}: stage.tokens")
        return [old, *([each] * len(self.study.new))]

    def _new_sources(self, text: Source, arm: Arm, number: int, scratch: bool) -> list[dict[str, Any]]:
        """The sources of a stage on new text: the text itself, and replay."""
        new = text.model_dump(mode="json", exclude_defaults=True)
        if not arm.replay:
            return [new]
        share = arm.replay
        if arm.replay_from == "generated":
            replay: dict[str, Any] = {"name": "self-made", "path": f"@{self._add_generated_text()}"}
        elif number and (self.has_pretraining or (self.study.old and self.study.old.prior_tokens)):
            replay = {"name": "seen", "seen_so_far": True}
        else:
            replay = self._old_source()
        return [{**new, "share": 1 - share}, {**replay, "share": share, "role": "replay"}]

    def _with_sources(self, stage: dict[str, Any], sources: list[dict[str, Any]]) -> dict[str, Any]:
        data = stage.get("data") or {}
        return {**stage, "data": {**data, "sources": data.get("sources") or sources}}

    # -- auxiliary steps ---------------------------------------------------------------------------------------

    def _add_generated_text(self) -> str:
        """Add the step that generates replay with the base."""
        wish = self.study.generated_replay
        tokens = wish.tokens
        if tokens is None:
            shares = [arm.replay for arm in self.study.arms.values() if arm.replay_from == "generated"]
            budget = parse_token_count(self.common_stage.get("tokens"), f"{self.where}: stage.tokens")
            tokens = round(max(shares) * budget * len(self.study.new))
        what = {"model": self.base_model, "tokens": tokens, "longest": wish.max_tokens}
        return self._add_auxiliary_step("write", "self-made", what)

    def _add_importance(self) -> str:
        """Add the step that measures the importance of the base's weights."""
        if self.study.old is None or self.study.old.path is None:
            raise StageError(
                "importance is measured on a file of old text", where=f"{self.where}: old", expected="a `path`"
            )
        wish = self.study.importance
        what = {"model": self.base_model, "path": self.study.old.path, "tokens": wish.tokens, "kind": wish.kind}
        return self._add_auxiliary_step(
            "measure", f"importance-{wish.kind}", what, [self._fingerprint(self._old_source(), "old")]
        )

    def _with_dependencies(self, stage: dict[str, Any], depends_on: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
        """The stage with references to auxiliary steps, and the steps that it depends on."""
        needs = list(depends_on)
        penalties = []
        for penalty in stage.get("penalties") or []:
            if isinstance(penalty, Mapping) and penalty.get("importance") == "measured":
                needs.append(self._add_importance())
                penalty = {**penalty, "importance": f"@{needs[-1]}"}
            penalties.append(penalty)
        for source in stage["data"]["sources"]:
            if isinstance(source, Mapping) and is_step_output(source.get("path")):
                needs.append(str(source["path"])[1:])
        return needs, {**stage, "penalties": penalties} if penalties else stage

    def _add_auxiliary_step(
        self, kind: StepKind, slug: str, spec: dict[str, Any], fingerprints: Sequence[object] = ()
    ) -> str:
        key = fingerprint([kind, spec, list(fingerprints)])[:KEY_LENGTH]
        return self.graph.add(Step(key, kind, slug, spec, tuple(self._base_dependencies)))

    def _add_blend(self, name: str, arm: Arm, seed: int) -> None:
        assert arm.blend is not None
        steps = self._arm_steps(arm.blend.arm, seed)
        what = {"start": self.base_model, "run": f"@{steps[-1]}", "weight": arm.blend.weight}
        key = fingerprint(["blend", what])[:KEY_LENGTH]
        after = (*self._base_dependencies, steps[-1])
        self.graph.add(Step(key, "blend", _slug(f"{name}-s{seed}"), what, after))
        self.graph.chains.append(Chain(name, seed, (*steps, key)))

    def _add_pretraining(self, base: Pretraining) -> str:
        """The base's stage. It is scored on old text alone, so that studies with other new texts can share it."""
        below = {
            key: value for key, value in self.common_stage.items() if key not in ("tokens", "new_tokens", "penalties")
        }
        stage = merge_patch(below, base.pretrain)
        stage = {**stage, "data": {**(stage.get("data") or {}), "sources": [self._old_source()]}}
        sets = {
            "learned": self.held_out_sets["retained"]
        }  # which is what it learns, so nothing more of its text is held out
        return self._add_training("base", stage, [], seed=base.seed, where="base.pretrain", sets=sets)

    def _add_training(
        self,
        slug: str,
        stage: dict[str, Any],
        depends_on: Sequence[str],
        *,
        seed: int,
        where: str,
        sets: Mapping[str, list[dict[str, Any]]] | None = None,
    ) -> str:
        """Add a training step; its stage is parsed once, to validate it."""
        sets = sets or self.held_out_sets
        judged = [
            self._fingerprint(item, self.held_out_key_paths[item["name"]]) for items in sets.values() for item in items
        ]
        evaluation = {**(stage.get("evaluation") or {}), **sets}
        whole = {**stage, "seed": seed, "evaluation": evaluation}
        place = f"{self.where}: {where}"
        named = {"name": _slug(slug), **whole}
        parsed = parse_stage(resolve_step_references(named, lambda key: f"@{key}"), place)
        sources = [
            self._fingerprint(
                source.model_dump(mode="json", exclude_defaults=True),
                self.text_key_paths.get(source.name, f"{where}: data.sources[{number}]"),
            )
            for number, source in enumerate(parsed.data.sources)
        ]
        # The parsed stage decides: `900k` equals 900000, and defaults do not count, so keys that a later version adds
        # leave existing runs valid.
        identity = parsed.model_dump(
            mode="json",
            exclude_defaults=True,
            exclude={"name": True, "output": True, "save": {"every", "keep"}, "track": True},
        )
        key = fingerprint(["train", with_fingerprint_names(identity), sources, judged])[:KEY_LENGTH]
        tokens = parsed.tokens or parsed.new_tokens or 0
        return self.graph.add(Step(key, "train", _slug(slug), named, tuple(dict.fromkeys(depends_on)), tokens))


def _text_key_paths(texts: Mapping[str, Sequence[Source | HeldOutFile]]) -> dict[str, str]:
    """The key path of each text in the study file, by name."""
    return {
        item.name: key if len(items) == 1 else f"{key}[{number}]"
        for key, items in texts.items()
        for number, item in enumerate(items)
    }


def _slug(text: str) -> str:
    """A name that is valid as a folder name."""
    return re.sub(r"[^\w.\-]+", "-", text.replace("%", "pc")).strip("-.") or "arm"


def _check_duplicate_arms(graph: StepGraph, where: str) -> None:
    """Raise `StageError` for two arms that are the same run."""
    owners: dict[str, str] = {}
    for chain in graph.chains:
        other = owners.setdefault(chain.last_step, chain.arm)
        if other != chain.arm:
            raise StageError(
                f"the arms {other!r} and {chain.arm!r} are the same",
                where=f"{where}: arms.{chain.arm}",
                expected="arms that differ",
                hint="leave one of them out",
            )
