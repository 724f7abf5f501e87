"""Anchor penalties of a stage: match trained weights by name with their reference and importance, and check all three."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from postgrad.config.penalties import AnchorPenalty
from postgrad.config.quantities import load_function
from postgrad.distributed.shards import full_tensor, local_shard, local_shard_like, to_dtensor
from postgrad.errors import DataError, ModelError, StageError, suggest_nearest
from postgrad.lineage.record import PenaltyRecord
from postgrad.models.location import ModelLocation, locate_model
from postgrad.models.pretrained import detect_task
from postgrad.models.unread_weights import load_unread
from postgrad.optim.optimizer import Weight, Weights
from postgrad.penalties.anchor import Anchor, AnchoredDecay, AnchoredDelta, AnchoredWeight
from postgrad.penalties.importance_file import ImportanceFile, locate_importance_file
from postgrad.penalties.penalty import StagePenalty
from postgrad.plan.plan import Plan
from postgrad.storage.atomic import sha256
from postgrad.storage.fingerprint import holds_moments
from postgrad.tuning.extra_trainable import base_parameter_name
from postgrad.tuning.open_model import open_model, start_fingerprint
from postgrad.tuning.weight_delta import TuningDelta

if TYPE_CHECKING:
    from postgrad.run.build import PenaltyContext

START = "start"


def anchor_name(specs: Collection[AnchorPenalty], number: int) -> str:
    """An anchor's name in the metrics: its kind, and of several also its number."""
    return "anchor" if len(specs) == 1 else f"anchor {number + 1}"


def make_anchor(spec: AnchorPenalty, context: PenaltyContext) -> Anchor | AnchoredDecay:
    """The anchor of a stage; its strength is NaN where it is still to be found (`auto`).

    Raises `StageError` for an anchor without weights, `DataError` for importance of another model, `ModelError` for a reference
    of other shapes.
    """
    number, plan, tuned_model, weights = context
    base_names, new_names = tuned_model.base_names, tuned_model.loaded_model.new_weights
    builder = _AnchorBuilder(spec, number, plan, weights)
    is_target = _WeightFilter(spec.targets, f"{builder.where}.targets", sorted(base_names.values()))
    for weight in weights.entries:
        name = base_names.get(weight.name)
        if name is None or not is_target(name):
            continue
        if name in new_names:
            builder.skipped.append(f"{name} (new)")
        else:
            builder.add_weight(weight, name)
    for current, delta in tuned_model.tuning.weight_deltas().items():
        if is_target(base_names[current]):
            builder.add_delta(current, base_names[current], delta)
    is_target.check()
    return builder.build(plan.stage.tuning.kind, anchor_name(plan.stage.penalties, number))


def penalty_fingerprints(plan: Plan) -> list[dict[str, str | None]]:
    """Content hashes of each penalty's files, which must not change before a resume."""
    return [
        load_function(spec.fingerprint_function)(spec, number, plan) if spec.fingerprint_function else {}
        for number, spec in enumerate(plan.stage.penalties)
    ]


def anchor_fingerprints(spec: AnchorPenalty, number: int, plan: Plan) -> dict[str, str | None]:
    """Content hashes of an anchor's reference and importance."""
    return {
        "reference": None if spec.reference == START else start_fingerprint(_locate_reference(spec, number, plan)),
        "importance": sha256(locate_importance_file(spec.importance, plan.root, f"penalties[{number}].importance"))
        if spec.importance
        else None,
    }


def _locate_reference(spec: AnchorPenalty, number: int, plan: Plan) -> ModelLocation:
    return locate_model(spec.reference, plan.root, where=f"penalties[{number}].reference")


@dataclass(frozen=True)
class _Reference:
    """The reference of an anchor: the start values (`state` is None), or another model's weights."""

    start: ModelLocation
    fingerprint: str | None
    state: Mapping[str, Tensor] | None
    files: Mapping[str, Tensor]
    """Tensors of the model's own files, memory-mapped; empty unless `storage` is mmap."""

    @classmethod
    def load(cls, spec: AnchorPenalty, number: int, plan: Plan, *, is_sharded: bool) -> _Reference:
        """`is_sharded`: read weights when they are asked for, where that is possible."""
        start = plan.model.start if spec.reference == START else _locate_reference(spec, number, plan)
        files = dict(_mapped_tensors(start)) if spec.storage == "mmap" else {}
        if spec.reference == START:
            return cls(start, start_fingerprint(start), None, files)
        if is_sharded and start.base is None and (unread := load_unread(start, detect_task(start))):
            return cls(start, start_fingerprint(start), unread.tensors(), files)
        opened = open_model(start)
        if opened.tunings:
            raise ModelError(
                f"{start.name} has a `{opened.tunings[-1].kind}` tuning, which is not part of its weights",
                where=f"penalties[{number}].reference",
                expected="a plain model, or a tuning that merges into its base",
            )
        names = opened.model.named_parameters(remove_duplicate=False)
        state = {base_parameter_name(name): parameter.detach() for name, parameter in names}
        return cls(start, start_fingerprint(start), state, files)

    def mapped_weight(self, name: str, current: Tensor) -> Tensor | None:
        """The memory-mapped tensor of a weight, if it equals `current` (or this rank's rows of it)."""
        backbone = name.partition(".")[2]  # files of a bare backbone lack this prefix
        stored = next((self.files[key] for key in (name, backbone) if key in self.files), None)
        if stored is None or stored.shape != current.shape:
            return None
        shard = local_shard(current)
        return stored if torch.equal(local_shard_like(stored, current).to(shard), shard) else None


def _mapped_tensors(start: ModelLocation) -> Iterator[tuple[str, Tensor]]:
    """The memory-mapped tensors of a plain model folder; none for a model from the Hub or a tuning's folder."""
    for path in sorted(start.folder.glob("*.safetensors")) if start.folder and start.base is None else ():
        if not holds_moments(path.name):
            file = safe_open(path, "pt")
            yield from ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 (not a mapping)


class _WeightFilter:
    """Matches weight names with patterns, and records which patterns matched."""

    def __init__(self, patterns: list[str], where: str, names: list[str]) -> None:
        self.patterns, self.where, self.names = patterns, where, names
        self.matched: set[str] = set()

    def __call__(self, name: str) -> bool:
        matched = [p for p in self.patterns if fnmatchcase(name, p) or fnmatchcase(name, f"{p}.*")]
        self.matched.update(matched)
        return not self.patterns or bool(matched)

    def check(self) -> None:
        """Raise `StageError` for a pattern without a match."""
        for pattern in self.patterns:
            if pattern not in self.matched:
                raise StageError(
                    f"'{pattern}' matches no trained weight of the start model",
                    where=self.where,
                    expected=f"names such as {', '.join(self.names[:3])}",
                    hint=suggest_nearest(pattern, self.names),
                )


class _AnchorBuilder:
    """Collects the weights of an anchor and its metadata."""

    def __init__(self, spec: AnchorPenalty, number: int, plan: Plan, weights: Weights) -> None:
        self.spec, self.where, self.weights = spec, f"penalties[{number}]", weights
        self.vocabulary = plan.model.vocab_size
        is_sharded = any(isinstance(master, DTensor) for master in weights.masters)
        self.reference = _Reference.load(spec, number, plan, is_sharded=is_sharded)
        self.importance = (
            ImportanceFile(locate_importance_file(spec.importance, plan.root, f"{self.where}.importance"))
            if spec.importance
            else None
        )
        self._check_importance()
        self.masters = {id(w.parameter): w.master for w in weights.entries}
        self.anchored: list[AnchoredWeight] = []
        self.weight_deltas: list[AnchoredDelta] = []
        self.numbers = 0
        self.importance_sum = 0.0
        self.bytes = {"reference": 0, "importance": 0, "mmap": 0}
        self.skipped: list[str] = []
        self.copied_names: list[str] = []

    def add_weight(self, weight: Weight, name: str) -> None:
        """Anchor a trained weight."""
        master, shape = weight.master, tuple(weight.master.shape)
        if not self._is_available(name, shape):
            return
        importance = self.importance[name] if self.importance else None
        state = self.reference.state
        target = None if state is None else state[name]
        if target is not None and target.shape != shape:
            target, importance = self._pad_reference(name, target, importance, master)
        reference = self._mapped_rows(name, master.detach() if target is None else target, master)
        if reference is None:
            rows = local_shard(master) if target is None else local_shard_like(target, master)
            reference = self._copy_rows(rows, "reference", local_shard(master).device)
        importance_rows = None if importance is None else self._stored_importance(importance, master)
        self.anchored.append(AnchoredWeight(master, reference, importance_rows, weight.parameter, weight.rate_factor))
        self._count_numbers(shape, importance)

    def add_delta(self, current: str, name: str, delta: TuningDelta) -> None:
        """Anchor a weight that the tuning's tensors change."""
        if not self._is_available(name, delta.shape):
            return
        weight = self.weights.model.get_parameter(current)
        stored = self.importance[name] if self.importance else None
        importance = None if stored is None else to_dtensor(self._stored_importance(stored, weight), weight)
        masters = [self.masters[id(parameter)] for parameter in delta.parameters]
        self.weight_deltas.append(
            AnchoredDelta(delta.weight_delta, masters, importance, self._reference_offset(name, weight, delta.shape))
        )
        self._count_numbers(delta.shape, stored)

    def build(self, kind: str, name: str) -> Anchor | AnchoredDecay:
        """The anchor. Raises `StageError` when no weight is anchored."""
        spec = self.spec
        if not self.anchored and not self.weight_deltas:
            self._raise_empty(kind)
        if spec.decoupled and self.weight_deltas:
            raise StageError(
                f"a decoupled anchor changes weights directly, and `{kind}` trains tensors that change them",
                where=f"{self.where}.decoupled",
                hint="remove `decoupled`: the penalty then acts through the gradients",
            )
        mean = self.importance_sum / self.numbers
        if self.importance and not mean > 0:
            raise DataError("all anchored weights have importance 0", where=str(self.importance.path))
        strength = math.nan if spec.strength == "auto" else spec.strength
        divisor = mean if spec.normalize else 1.0
        anchor: Anchor | AnchoredDecay = (
            AnchoredDecay(self.anchored, strength=strength, divisor=divisor, name=name)
            if spec.decoupled
            else Anchor(self.anchored, self.weight_deltas, strength=strength, divisor=divisor, name=name)
        )
        metadata = self.importance.metadata if self.importance else None
        anchor.metadata = {
            "name": name,
            "weights": self.numbers,
            "tensors": len(self.anchored) + len(self.weight_deltas),
            "reference": {"model": self.reference.start.name, "fingerprint": self.reference.fingerprint},
            "importance": metadata
            and {"kind": metadata.kind, "unit": metadata.per, "tokens": metadata.tokens, "mean": mean},
            "bytes": self.bytes,
            "skipped": self.skipped,
            "notes": self._notes(),
        }
        return anchor

    # -- checks

    def _check_importance(self) -> None:
        """Raise `DataError` for importance measured on another model than the reference."""
        if self.importance is None:
            return
        start = self.reference.start
        self.importance.check_model(start.name, self.reference.fingerprint, f"{self.where}.importance")

    def _is_available(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether reference and importance have this weight; noted if not. Raises for a weight of another shape."""
        state, model = self.reference.state, self.reference.start.name
        if state is not None and name not in state:
            self.skipped.append(f"{name} (not in {model})")
            return False
        expected = shape if state is None else tuple(state[name].shape)
        has_new_rows = shape[0] == self.vocabulary and expected[0] < shape[0] and expected[1:] == shape[1:]
        if expected != shape and not has_new_rows:
            raise ModelError(
                f"{name} has shape {shape} in this run and {expected} in {model}",
                where=f"{self.where}.reference",
                expected="a model of the same shapes",
                hint="anchor only the weights that both models have, with `targets`",
            )
        if self.importance is None:
            return True
        if name not in self.importance.names:
            self.skipped.append(f"{name} (no importance)")
            return False
        if self.importance.shape(name) != expected:
            raise DataError(
                f"the importance of {name} has shape {self.importance.shape(name)}, and the weight {expected} in {model}",
                where=f"{self.where}.importance",
                expected="importance of the reference model",
            )
        return True

    def _pad_reference(
        self, name: str, reference: Tensor, importance: Tensor | None, master: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A reference without rows for new tokens, extended by the current rows with importance 0; and its importance."""
        current = full_tensor(master.detach()).to("cpu", torch.float32)
        rows = len(reference)
        self.skipped.append(f"{len(current) - rows:,} rows of {name} (not in {self.reference.start.name})")
        padded = torch.zeros_like(current)
        padded[:rows] = 1.0 if importance is None else importance.float()
        return torch.cat([reference.to("cpu", torch.float32), current[rows:]]), padded

    def _raise_empty(self, kind: str) -> None:
        if self.skipped:
            raise StageError(
                f"no weight can be anchored: {', '.join(self.skipped[:3])}",
                where=self.where,
                expected="a reference (and an importance) with trained weights",
            )
        raise StageError(
            f"`{kind}` changes no weight of the start model, so there is nothing to anchor",
            where=self.where,
            expected="a tuning that changes the base weights: full, blocks, bias, norm, lora, osf",
            hint="remove the penalty; distillation from the start model, or replay, preserve the outputs instead",
        )

    # -- storage

    def _mapped_rows(self, name: str, current: Tensor, master: Tensor) -> Tensor | None:
        """This rank's memory-mapped rows of a reference; None when `storage` is another, or the files have other values."""
        if self.spec.storage != "mmap":
            return None
        stored = self.reference.mapped_weight(name, current)
        if stored is None:
            self.copied_names.append(name)
            return None
        rows = local_shard_like(stored, master)
        self.bytes["mmap"] += rows.nbytes
        return rows

    def _notes(self) -> list[str]:
        if not self.copied_names:
            return []
        return [
            f"{len(self.copied_names):,} weights ({self.copied_names[0]}, ...) differ from the files of "
            f"{self.reference.start.name} and are copied instead of mapped"
        ]

    def _stored_importance(self, importance: Tensor, like: Tensor) -> Tensor:
        """This rank's rows of an importance."""
        rows = local_shard_like(importance, like)
        if self.spec.storage == "mmap" and importance.device.type == "cpu":
            self.bytes["mmap"] += rows.nbytes
            return rows
        return self._copy_rows(rows, "importance", local_shard(like).device)

    def _reference_offset(self, name: str, weight: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        """The base weight minus the reference, without the tuning's delta."""
        if self.reference.state is None:
            return None
        if tuple(weight.shape) != shape:
            raise StageError(
                f"{name} is quantized, so its distance from {self.reference.start.name} is unknown",
                where=f"{self.where}.reference",
                expected=START,
            )
        current = local_shard(weight.detach()).float()
        offset = current - local_shard_like(self.reference.state[name], weight).to(current)
        return to_dtensor(self._copy_rows(offset, "reference", current.device), weight)

    def _copy_rows(self, rows: Tensor, key: str, device: torch.device) -> Tensor:
        """A copy in the dtype of `storage`; by default bf16 where it is exact."""
        copy = rows.detach().to(device, copy=True)
        bf16 = copy.to(torch.bfloat16)
        match self.spec.storage:
            case "float32":
                copy = copy.float()
            case "bfloat16":
                copy = bf16
            case _:
                copy = bf16 if torch.equal(bf16.to(copy.dtype), copy) else copy
        self.bytes[key] += copy.nbytes
        return copy

    def _count_numbers(self, shape: tuple[int, ...], importance: Tensor | None) -> None:
        self.numbers += math.prod(shape)
        self.importance_sum += math.prod(shape) if importance is None else float(importance.double().sum())


def describe_penalty(penalty: StagePenalty) -> PenaltyRecord:
    """A penalty in the record."""
    return PenaltyRecord.model_validate({**penalty.metadata, "strength": penalty.strength})
