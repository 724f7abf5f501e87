"""What does an anchor of a stage hold to what? Weights, their reference and their importance, found by name and checked."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from postgrad.config.penalties import AnchorPenalty
from postgrad.distributed.shards import joinable, own, own_part, whole
from postgrad.errors import DataError, ModelError, StageError, nearest
from postgrad.models.pretrained import Start, locate
from postgrad.optim.optimizer import Weight, Weights
from postgrad.penalties.anchor import Anchor, AnchoredDecay, Changed, Held
from postgrad.penalties.importance_file import ImportanceFile
from postgrad.plan.plan import Plan
from postgrad.storage.atomic import sha256
from postgrad.tuning.extra_trainable import bare
from postgrad.tuning.open_model import open_model, start_fingerprint
from postgrad.tuning.tuning import Tuning
from postgrad.tuning.weight_delta import Moved

START = "start"


def anchor_name(specs: Collection[AnchorPenalty], number: int) -> str:
    """What an anchor is called in the metrics: by its kind, and one of several also by its number."""
    return "anchor" if len(specs) == 1 else f"anchor {number + 1}"


def make_anchor(
    number: int,
    plan: Plan,
    tuning: Tuning,
    weights: Weights,
    base_names: Mapping[str, str],
    new: Collection[str],
) -> Anchor | AnchoredDecay:
    """The anchor that the stage's penalty of this number describes; one whose strength is yet to be found has none (nan).

    `base_names`: of each parameter of the base by its name in the model now, the name that it has in the start model; `new`:
    those names that the start model's files lack. Raises `StageError` when there is nothing to hold, `DataError` for importance
    of another model, `ModelError` for a reference that does not fit.
    """
    spec = plan.stage.penalties[number]
    making = _Making(spec, number, plan, weights)
    chosen = _Chosen(spec.only, f"{making.where}.only", sorted(base_names.values()))
    for weight in weights.all:
        name = base_names.get(weight.name)
        if name is None or not chosen(name):
            continue
        if name in new:
            making.left_out.append(f"{name} (new)")
        else:
            making.hold(weight, name)
    for current, moved in tuning.changes().items():
        if chosen(base_names[current]):
            making.follow(current, base_names[current], moved)
    chosen.check()
    return making.made(plan.stage.tuning.kind, anchor_name(plan.stage.penalties, number))


def penalty_prints(plan: Plan) -> list[dict[str, str | None]]:
    """What each penalty reads beside the start model, by its contents: a resumed run is held against it."""
    return [
        {
            "reference": None if spec.reference == START else start_fingerprint(_located(spec, number, plan)),
            "importance": sha256(_path(spec.importance, number, plan.root)) if spec.importance else None,
        }
        for number, spec in enumerate(plan.stage.penalties)
    ]


def _located(spec: AnchorPenalty, number: int, plan: Plan) -> Start:
    return locate(spec.reference, plan.root, where=f"penalties[{number}].reference")


@dataclass(frozen=True)
class _Reference:
    """What weights are held to: the values that they start from (`state` is None), or those of another model."""

    start: Start
    fingerprint: str | None
    state: Mapping[str, Tensor] | None
    files: Mapping[str, Tensor]
    """What the model's own files hold, mapped; nothing unless that is asked for."""

    @classmethod
    def of(cls, spec: AnchorPenalty, number: int, plan: Plan) -> _Reference:
        start = plan.start if spec.reference == START else _located(spec, number, plan)
        files = dict(_mapped(start)) if spec.storage == "mapped" else {}
        if spec.reference == START:
            return cls(start, start_fingerprint(start), None, files)
        opened = open_model(start)
        if opened.tunings:
            raise ModelError(
                f"in {start.name} stands `{opened.tunings[-1].kind}`, which is no part of its weights",
                where=f"penalties[{number}].reference",
                expected="a plain model, or a tuning that becomes part of its base",
            )
        names = opened.model.named_parameters(remove_duplicate=False)
        state = {bare(name): parameter.detach() for name, parameter in names}
        return cls(start, start_fingerprint(start), state, files)

    def mapped(self, name: str, now: Tensor) -> Tensor | None:
        """A weight as it lies in the model's files, when its numbers are those of `now` (or those rows that a rank has)."""
        backbone = name.partition(".")[2]  # files of a bare backbone leave its name out
        found = next((self.files[key] for key in (name, backbone) if key in self.files), None)
        if found is None or found.shape != now.shape:
            return None
        mine = own(now)
        return found if torch.equal(own_part(found, now).to(mine), mine) else None


def _mapped(start: Start) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a plain model folder's own files, mapped; nothing of a Hub name or of a tuning's folder."""
    for path in sorted(start.folder.glob("*.safetensors")) if start.folder and start.base is None else ():
        if path.name != "optimizer.safetensors":
            file = safe_open(path, "pt")
            yield from ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 (it is no mapping)


class _Chosen:
    """Whether patterns name a weight; remembers which of them ever did."""

    def __init__(self, patterns: list[str], where: str, names: list[str]) -> None:
        self.patterns, self.where, self.names = patterns, where, names
        self.met: set[str] = set()

    def __call__(self, name: str) -> bool:
        met = [p for p in self.patterns if fnmatchcase(name, p) or fnmatchcase(name, f"{p}.*")]
        self.met.update(met)
        return not self.patterns or bool(met)

    def check(self) -> None:
        """Raise `StageError` for a pattern that named no weight that moves."""
        for pattern in self.patterns:
            if pattern not in self.met:
                raise StageError(
                    f"'{pattern}' names no weight of the start model that moves",
                    where=self.where,
                    expected=f"names such as {', '.join(self.names[:3])}",
                    way_out=nearest(pattern, self.names),
                )


class _Making:
    """An anchor while its parts are put together, and what is to be said of it."""

    def __init__(self, spec: AnchorPenalty, number: int, plan: Plan, weights: Weights) -> None:
        self.spec, self.where, self.weights = spec, f"penalties[{number}]", weights
        self.vocabulary = plan.vocabulary
        self.reference = _Reference.of(spec, number, plan)
        self.importance = ImportanceFile(_path(spec.importance, number, plan.root)) if spec.importance else None
        self._belongs()
        self.masters = {id(w.compute): w.master for w in weights.all}
        self.held: list[Held] = []
        self.changed: list[Changed] = []
        self.numbers = 0
        self.weighed = 0.0
        self.bytes = {"reference": 0, "importance": 0, "mapped": 0}
        self.left_out: list[str] = []
        self.copied: list[str] = []

    def hold(self, weight: Weight, name: str) -> None:
        """Hold a weight that moves as it is."""
        master, shape = weight.master, tuple(weight.master.shape)
        if not self._has(name, shape):
            return
        given = self.importance[name] if self.importance else None
        state = self.reference.state
        there = None if state is None else state[name]
        if there is not None and there.shape != shape:
            there, given = self._lengthened(name, there, given, master)
        mapped = self._mapped(name, master.detach() if there is None else there, master)
        part = own(master) if there is None else own_part(there, master)
        reference = self._stored(part, "reference", own(master).device) if mapped is None else mapped
        importance = None if given is None else self._importance(given, master)
        self.held.append(Held(master, reference, importance, weight.compute, weight.rate_factor))
        self._count(shape, given)

    def follow(self, current: str, name: str, moved: Moved) -> None:
        """Hold a weight that tensors of the tuning change."""
        if not self._has(name, moved.shape):
            return
        weight = self.weights.model.get_parameter(current)
        given = self.importance[name] if self.importance else None
        importance = None if given is None else joinable(self._importance(given, weight), weight)
        masters = [self.masters[id(parameter)] for parameter in moved.parameters]
        self.changed.append(Changed(moved.change, masters, importance, self._offset(name, weight, moved.shape)))
        self._count(moved.shape, given)

    def made(self, kind: str, name: str) -> Anchor | AnchoredDecay:
        """The anchor. Raises `StageError` when it holds nothing."""
        spec = self.spec
        if not self.held and not self.changed:
            self._nothing(kind)
        if spec.decoupled and self.changed:
            raise StageError(
                f"a decoupled pull moves weights themselves, and `{kind}` moves tensors that change them",
                where=f"{self.where}.decoupled",
                way_out="leave `decoupled` out: the pull then goes through the gradients",
            )
        mean = self.weighed / self.numbers
        if self.importance and not mean > 0:
            raise DataError("all weights that are held have importance 0", where=str(self.importance.path))
        strength = math.nan if spec.strength == "auto" else spec.strength
        over = mean if spec.normalise else 1.0
        made: Anchor | AnchoredDecay = (
            AnchoredDecay(self.held, strength=strength, over=over, name=name)
            if spec.decoupled
            else Anchor(self.held, self.changed, strength=strength, over=over, name=name)
        )
        about = self.importance.about if self.importance else None
        made.about = {
            "name": name,
            "weights": self.numbers,
            "tensors": len(self.held) + len(self.changed),
            "reference": {"model": self.reference.start.name, "fingerprint": self.reference.fingerprint},
            "importance": about and {"kind": about.kind, "per": about.per, "tokens": about.tokens, "mean": mean},
            "bytes": self.bytes,
            "left_out": self.left_out,
            "notes": self._notes(),
        }
        return made

    # -- what belongs together

    def _belongs(self) -> None:
        """Raise `DataError` for importance that was measured on another model than the reference."""
        if self.importance is None:
            return
        about, reference = self.importance.about, self.reference
        # A model of the Hub is known by its name alone.
        measured_on, held_to = about.fingerprint or about.model, reference.fingerprint or reference.start.name
        if measured_on != held_to:
            raise DataError(
                f"the importance was measured on {about.model}, whose fingerprint is {measured_on}, and the weights are "
                f"held to {reference.start.name}, whose fingerprint is {held_to}",
                where=f"{self.where}.importance",
                expected="importance of the model that the weights are held to",
                way_out="measure it on that model, or name the model that it was measured on as `reference`",
            )

    def _has(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether reference and importance have a weight; said when not. Raises when they have it in another shape."""
        state, model = self.reference.state, self.reference.start.name
        if state is not None and name not in state:
            self.left_out.append(f"{name} (not in {model})")
            return False
        there = shape if state is None else tuple(state[name].shape)
        longer = shape[0] == self.vocabulary and there[0] < shape[0] and there[1:] == shape[1:]
        if there != shape and not longer:
            raise ModelError(
                f"{name} has the shape {shape} here and {there} in {model}",
                where=f"{self.where}.reference",
                expected="a model of the same shape",
                way_out="`only` names the weights that both have",
            )
        if self.importance is None:
            return True
        if name not in self.importance.names:
            self.left_out.append(f"{name} (no importance)")
            return False
        if self.importance.shape(name) != there:
            raise DataError(
                f"the importance of {name} has the shape {self.importance.shape(name)}, and the weight {there} in {model}",
                where=f"{self.where}.importance",
                expected="importance of the model that the weights are held to",
            )
        return True

    def _lengthened(self, name: str, there: Tensor, given: Tensor | None, master: Tensor) -> tuple[Tensor, Tensor]:
        """A reference that lacks rows at the end, with rows that are held to nothing; and its importance."""
        now = whole(master.detach()).to("cpu", torch.float32)
        rows = len(there)
        self.left_out.append(f"{len(now) - rows:,} rows of {name} (not in {self.reference.start.name})")
        weighed = torch.zeros_like(now)
        weighed[:rows] = 1.0 if given is None else given.float()
        return torch.cat([there.to("cpu", torch.float32), now[rows:]]), weighed

    def _nothing(self, kind: str) -> None:
        if self.left_out:
            raise StageError(
                f"nothing is left to hold: {', '.join(self.left_out[:3])}",
                where=self.where,
                expected="a reference (and an importance) that has weights that move",
            )
        raise StageError(
            f"`{kind}` changes no weight of the start model, so there is nothing to hold",
            where=self.where,
            expected="a tuning that moves the base's own weights, or changes them: full, blocks, bias, norm, lora, osf",
            way_out="leave the penalty out; distillation from the start model, or replay, hold what a model says",
        )

    # -- what is kept, and where

    def _mapped(self, name: str, now: Tensor, master: Tensor) -> Tensor | None:
        """This rank's rows of a reference in the model's own files; None when they are not wanted, or not there."""
        if self.spec.storage != "mapped":
            return None
        found = self.reference.mapped(name, now)
        if found is None:
            self.copied.append(name)
            return None
        part = own_part(found, master)
        self.bytes["mapped"] += part.nbytes
        return part

    def _notes(self) -> list[str]:
        if not self.copied:
            return []
        return [
            f"{len(self.copied):,} weights ({self.copied[0]}, ...) do not lie in files of {self.reference.start.name} as they "
            "are, and are copied"
        ]

    def _importance(self, given: Tensor, like: Tensor) -> Tensor:
        """This rank's rows of an importance."""
        part = own_part(given, like)
        if self.spec.storage == "mapped" and given.device.type == "cpu":
            self.bytes["mapped"] += part.nbytes
            return part
        return self._stored(part, "importance", own(like).device)

    def _offset(self, name: str, weight: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        """How far a weight is from the reference before the tuning changes it."""
        if self.reference.state is None:
            return None
        if tuple(weight.shape) != shape:
            raise StageError(
                f"{name} is quantised, so how far it is from {self.reference.start.name} is not known",
                where=f"{self.where}.reference",
                expected=START,
            )
        now = own(weight.detach()).float()
        offset = now - own_part(self.reference.state[name], weight).to(now)
        return joinable(self._stored(offset, "reference", now.device), weight)

    def _stored(self, part: Tensor, what: str, device: torch.device) -> Tensor:
        """A copy of a tensor as the stage asks for it."""
        kept = part.detach().to(device, copy=True)
        short = kept.to(torch.bfloat16)
        match self.spec.storage:
            case "float32":
                kept = kept.float()
            case "bfloat16":
                kept = short
            case _:
                kept = short if torch.equal(short.to(kept.dtype), kept) else kept
        self.bytes[what] += kept.nbytes
        return kept

    def _count(self, shape: tuple[int, ...], given: Tensor | None) -> None:
        self.numbers += math.prod(shape)
        self.weighed += math.prod(shape) if given is None else float(given.double().sum())


def _path(name: str, number: int, root: Path) -> Path:
    path = (root / Path(name).expanduser()).resolve()
    if not path.is_file():
        raise DataError(
            f"there is no file {name}",
            where=f"penalties[{number}].importance",
            way_out=f"make it first: postgrad importance MODEL FILES... --out {name}",
        )
    return path


def about_penalty(made: Anchor | AnchoredDecay) -> dict[str, Any]:
    """What is recorded of an anchor."""
    return {**made.about, "strength": made.strength}
