"""What does an anchor of a stage hold to what? Weights, their reference and their importance, found by name and checked."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from postgrad.config.penalties import AnchorPenalty
from postgrad.distributed.shards import full_tensor, local_shard, local_shard_like, to_dtensor
from postgrad.errors import DataError, ModelError, StageError, suggest_nearest
from postgrad.lineage.record import Penalty
from postgrad.models.pretrained import ModelLocation, locate_model
from postgrad.optim.optimizer import Weight, Weights
from postgrad.penalties.anchor import Anchor, AnchoredDecay, AnchoredDelta, AnchoredWeight
from postgrad.penalties.importance_file import ImportanceFile
from postgrad.plan.plan import Plan
from postgrad.storage.atomic import sha256
from postgrad.tuning.extra_trainable import base_parameter_name
from postgrad.tuning.open_model import open_model, start_fingerprint
from postgrad.tuning.tuning import Tuning
from postgrad.tuning.weight_delta import TuningDelta

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
    new_names: Collection[str],
) -> Anchor | AnchoredDecay:
    """The anchor that the stage's penalty of this number describes; one whose strength is yet to be found has none (nan).

    `base_names`: of each parameter of the base by its name in the model now, the name that it has in the start model; `new`:
    those names that the start model's files lack. Raises `StageError` when there is nothing to hold, `DataError` for importance
    of another model, `ModelError` for a reference that does not fit.
    """
    spec = plan.stage.penalties[number]
    making = _AnchorBuilder(spec, number, plan, weights)
    chosen = _WeightFilter(spec.only, f"{making.where}.only", sorted(base_names.values()))
    for weight in weights.entries:
        name = base_names.get(weight.name)
        if name is None or not chosen(name):
            continue
        if name in new_names:
            making.skipped.append(f"{name} (new)")
        else:
            making.add_weight(weight, name)
    for current, moved in tuning.weight_deltas().items():
        if chosen(base_names[current]):
            making.add_delta(current, base_names[current], moved)
    chosen.check()
    return making.build(plan.stage.tuning.kind, anchor_name(plan.stage.penalties, number))


def penalty_fingerprints(plan: Plan) -> list[dict[str, str | None]]:
    """What each penalty reads beside the start model, by its contents: a resumed run is held against it."""
    return [
        {
            "reference": None if spec.reference == START else start_fingerprint(_locate_reference(spec, number, plan)),
            "importance": sha256(_importance_path(spec.importance, number, plan.root)) if spec.importance else None,
        }
        for number, spec in enumerate(plan.stage.penalties)
    ]


def _locate_reference(spec: AnchorPenalty, number: int, plan: Plan) -> ModelLocation:
    return locate_model(spec.reference, plan.root, where=f"penalties[{number}].reference")


@dataclass(frozen=True)
class _Reference:
    """What weights are held to: the values that they start from (`state` is None), or those of another model."""

    start: ModelLocation
    fingerprint: str | None
    state: Mapping[str, Tensor] | None
    files: Mapping[str, Tensor]
    """What the model's own files hold, mapped; nothing unless that is asked for."""

    @classmethod
    def load(cls, spec: AnchorPenalty, number: int, plan: Plan) -> _Reference:
        start = plan.model.start if spec.reference == START else _locate_reference(spec, number, plan)
        files = dict(_mapped_tensors(start)) if spec.storage == "mmap" else {}
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
        state = {base_parameter_name(name): parameter.detach() for name, parameter in names}
        return cls(start, start_fingerprint(start), state, files)

    def mapped_weight(self, name: str, current: Tensor) -> Tensor | None:
        """A weight as it lies in the model's files, when its numbers are those of `now` (or those rows that a rank has)."""
        backbone = name.partition(".")[2]  # files of a bare backbone leave its name out
        found = next((self.files[key] for key in (name, backbone) if key in self.files), None)
        if found is None or found.shape != current.shape:
            return None
        mine = local_shard(current)
        return found if torch.equal(local_shard_like(found, current).to(mine), mine) else None


def _mapped_tensors(start: ModelLocation) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a plain model folder's own files, mapped; nothing of a Hub name or of a tuning's folder."""
    for path in sorted(start.folder.glob("*.safetensors")) if start.folder and start.base is None else ():
        if path.name != "optimizer.safetensors":
            file = safe_open(path, "pt")
            yield from ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 (it is no mapping)


class _WeightFilter:
    """Whether patterns name a weight; remembers which of them ever did."""

    def __init__(self, patterns: list[str], where: str, names: list[str]) -> None:
        self.patterns, self.where, self.names = patterns, where, names
        self.matched: set[str] = set()

    def __call__(self, name: str) -> bool:
        met = [p for p in self.patterns if fnmatchcase(name, p) or fnmatchcase(name, f"{p}.*")]
        self.matched.update(met)
        return not self.patterns or bool(met)

    def check(self) -> None:
        """Raise `StageError` for a pattern that named no weight that moves."""
        for pattern in self.patterns:
            if pattern not in self.matched:
                raise StageError(
                    f"'{pattern}' names no weight of the start model that moves",
                    where=self.where,
                    expected=f"names such as {', '.join(self.names[:3])}",
                    hint=suggest_nearest(pattern, self.names),
                )


class _AnchorBuilder:
    """An anchor while its parts are put together, and what is to be said of it."""

    def __init__(self, spec: AnchorPenalty, number: int, plan: Plan, weights: Weights) -> None:
        self.spec, self.where, self.weights = spec, f"penalties[{number}]", weights
        self.vocabulary = plan.model.vocab_size
        self.reference = _Reference.load(spec, number, plan)
        self.importance = (
            ImportanceFile(_importance_path(spec.importance, number, plan.root)) if spec.importance else None
        )
        self._check_importance()
        self.masters = {id(w.parameter): w.master for w in weights.entries}
        self.held_weights: list[AnchoredWeight] = []
        self.weight_deltas: list[AnchoredDelta] = []
        self.numbers = 0
        self.importance_sum = 0.0
        self.bytes = {"reference": 0, "importance": 0, "mmap": 0}
        self.skipped: list[str] = []
        self.copied_names: list[str] = []

    def add_weight(self, weight: Weight, name: str) -> None:
        """Hold a weight that moves as it is."""
        master, shape = weight.master, tuple(weight.master.shape)
        if not self._is_available(name, shape):
            return
        given = self.importance[name] if self.importance else None
        state = self.reference.state
        there = None if state is None else state[name]
        if there is not None and there.shape != shape:
            there, given = self._pad_reference(name, there, given, master)
        mapped = self._mapped_rows(name, master.detach() if there is None else there, master)
        part = local_shard(master) if there is None else local_shard_like(there, master)
        reference = self._copy_rows(part, "reference", local_shard(master).device) if mapped is None else mapped
        importance = None if given is None else self._stored_importance(given, master)
        self.held_weights.append(AnchoredWeight(master, reference, importance, weight.parameter, weight.rate_factor))
        self._count_numbers(shape, given)

    def add_delta(self, current: str, name: str, delta: TuningDelta) -> None:
        """Hold a weight that tensors of the tuning change."""
        if not self._is_available(name, delta.shape):
            return
        weight = self.weights.model.get_parameter(current)
        given = self.importance[name] if self.importance else None
        importance = None if given is None else to_dtensor(self._stored_importance(given, weight), weight)
        masters = [self.masters[id(parameter)] for parameter in delta.parameters]
        self.weight_deltas.append(
            AnchoredDelta(delta.weight_delta, masters, importance, self._reference_offset(name, weight, delta.shape))
        )
        self._count_numbers(delta.shape, given)

    def build(self, kind: str, name: str) -> Anchor | AnchoredDecay:
        """The anchor. Raises `StageError` when it holds nothing."""
        spec = self.spec
        if not self.held_weights and not self.weight_deltas:
            self._raise_empty(kind)
        if spec.decoupled and self.weight_deltas:
            raise StageError(
                f"a decoupled pull moves weights themselves, and `{kind}` moves tensors that change them",
                where=f"{self.where}.decoupled",
                hint="leave `decoupled` out: the pull then goes through the gradients",
            )
        mean = self.importance_sum / self.numbers
        if self.importance and not mean > 0:
            raise DataError("all weights that are held have importance 0", where=str(self.importance.path))
        strength = math.nan if spec.strength == "auto" else spec.strength
        over = mean if spec.normalise else 1.0
        made: Anchor | AnchoredDecay = (
            AnchoredDecay(self.held_weights, strength=strength, divisor=over, name=name)
            if spec.decoupled
            else Anchor(self.held_weights, self.weight_deltas, strength=strength, divisor=over, name=name)
        )
        about = self.importance.metadata if self.importance else None
        made.metadata = {
            "name": name,
            "weights": self.numbers,
            "tensors": len(self.held_weights) + len(self.weight_deltas),
            "reference": {"model": self.reference.start.name, "fingerprint": self.reference.fingerprint},
            "importance": about and {"kind": about.kind, "unit": about.per, "tokens": about.tokens, "mean": mean},
            "bytes": self.bytes,
            "skipped": self.skipped,
            "notes": self._notes(),
        }
        return made

    # -- what belongs together

    def _check_importance(self) -> None:
        """Raise `DataError` for importance that was measured on another model than the reference."""
        if self.importance is None:
            return
        about, reference = self.importance.metadata, self.reference
        # A model of the Hub is known by its name alone.
        measured_on, held_to = about.fingerprint or about.model, reference.fingerprint or reference.start.name
        if measured_on != held_to:
            raise DataError(
                f"the importance was measured on {about.model}, whose fingerprint is {measured_on}, and the weights are "
                f"held to {reference.start.name}, whose fingerprint is {held_to}",
                where=f"{self.where}.importance",
                expected="importance of the model that the weights are held to",
                hint="measure it on that model, or name the model that it was measured on as `reference`",
            )

    def _is_available(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether reference and importance have a weight; said when not. Raises when they have it in another shape."""
        state, model = self.reference.state, self.reference.start.name
        if state is not None and name not in state:
            self.skipped.append(f"{name} (not in {model})")
            return False
        there = shape if state is None else tuple(state[name].shape)
        longer = shape[0] == self.vocabulary and there[0] < shape[0] and there[1:] == shape[1:]
        if there != shape and not longer:
            raise ModelError(
                f"{name} has the shape {shape} here and {there} in {model}",
                where=f"{self.where}.reference",
                expected="a model of the same shape",
                hint="`only` names the weights that both have",
            )
        if self.importance is None:
            return True
        if name not in self.importance.names:
            self.skipped.append(f"{name} (no importance)")
            return False
        if self.importance.shape(name) != there:
            raise DataError(
                f"the importance of {name} has the shape {self.importance.shape(name)}, and the weight {there} in {model}",
                where=f"{self.where}.importance",
                expected="importance of the model that the weights are held to",
            )
        return True

    def _pad_reference(
        self, name: str, reference: Tensor, importance: Tensor | None, master: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A reference that lacks rows at the end, with rows that are held to nothing; and its importance."""
        now = full_tensor(master.detach()).to("cpu", torch.float32)
        rows = len(reference)
        self.skipped.append(f"{len(now) - rows:,} rows of {name} (not in {self.reference.start.name})")
        weighed = torch.zeros_like(now)
        weighed[:rows] = 1.0 if importance is None else importance.float()
        return torch.cat([reference.to("cpu", torch.float32), now[rows:]]), weighed

    def _raise_empty(self, kind: str) -> None:
        if self.skipped:
            raise StageError(
                f"nothing is left to hold: {', '.join(self.skipped[:3])}",
                where=self.where,
                expected="a reference (and an importance) that has weights that move",
            )
        raise StageError(
            f"`{kind}` changes no weight of the start model, so there is nothing to hold",
            where=self.where,
            expected="a tuning that moves the base's own weights, or changes them: full, blocks, bias, norm, lora, osf",
            hint="leave the penalty out; distillation from the start model, or replay, hold what a model says",
        )

    # -- what is kept, and where

    def _mapped_rows(self, name: str, current: Tensor, master: Tensor) -> Tensor | None:
        """This rank's rows of a reference in the model's own files; None when they are not wanted, or not there."""
        if self.spec.storage != "mmap":
            return None
        found = self.reference.mapped_weight(name, current)
        if found is None:
            self.copied_names.append(name)
            return None
        part = local_shard_like(found, master)
        self.bytes["mmap"] += part.nbytes
        return part

    def _notes(self) -> list[str]:
        if not self.copied_names:
            return []
        return [
            f"{len(self.copied_names):,} weights ({self.copied_names[0]}, ...) do not lie in files of {self.reference.start.name} as they "
            "are, and are copied"
        ]

    def _stored_importance(self, importance: Tensor, like: Tensor) -> Tensor:
        """This rank's rows of an importance."""
        part = local_shard_like(importance, like)
        if self.spec.storage == "mmap" and importance.device.type == "cpu":
            self.bytes["mmap"] += part.nbytes
            return part
        return self._copy_rows(part, "importance", local_shard(like).device)

    def _reference_offset(self, name: str, weight: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        """How far a weight is from the reference before the tuning changes it."""
        if self.reference.state is None:
            return None
        if tuple(weight.shape) != shape:
            raise StageError(
                f"{name} is quantised, so how far it is from {self.reference.start.name} is not known",
                where=f"{self.where}.reference",
                expected=START,
            )
        now = local_shard(weight.detach()).float()
        offset = now - local_shard_like(self.reference.state[name], weight).to(now)
        return to_dtensor(self._copy_rows(offset, "reference", now.device), weight)

    def _copy_rows(self, part: Tensor, key: str, device: torch.device) -> Tensor:
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
        self.bytes[key] += kept.nbytes
        return kept

    def _count_numbers(self, shape: tuple[int, ...], importance: Tensor | None) -> None:
        self.numbers += math.prod(shape)
        self.importance_sum += math.prod(shape) if importance is None else float(importance.double().sum())


def _importance_path(name: str, number: int, root: Path) -> Path:
    path = (root / Path(name).expanduser()).resolve()
    if not path.is_file():
        raise DataError(
            f"there is no file {name}",
            where=f"penalties[{number}].importance",
            hint=f"make it first: postgrad importance MODEL FILES... --out {name}",
        )
    return path


def describe_penalty(anchor: Anchor | AnchoredDecay) -> Penalty:
    """What is recorded of an anchor."""
    return Penalty.model_validate({**anchor.metadata, "strength": anchor.strength})
