"""Score the models interpolated between a run's start and its end, and write one of them.

A blend trades learning for retention. It costs no training, and does not replace replay, which retains without giving up
learning (Ibrahim et al. 2024, table 6: the best merge 27.6 against 32.5).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from postgrad.commands.results import Result
from postgrad.config.stage_file import parse_recorded_stage
from postgrad.distributed.world import World
from postgrad.errors import StageError
from postgrad.evaluation import before_after
from postgrad.hardware import machine
from postgrad.lineage.record import Record, read_record
from postgrad.models import interpolate
from postgrad.models.location import locate_model
from postgrad.models.model import wrap_model
from postgrad.models.pretrained import load_tokenizer, stored_dtype
from postgrad.models.published_vocabulary import publish_pretrained
from postgrad.plan.plan import Plan, make_plan
from postgrad.stats.forgetting import LossChange
from postgrad.storage.cache_folder import cache_folder
from postgrad.training.checkpoints import Checkpoints
from postgrad.tuning.open_model import LoadedModel, open_model

_BLOCK_WEIGHTS = (0.0, 0.5)
"""Weights of a single block; few, as there are many blocks."""


@dataclass(frozen=True)
class BlendSetChange(Result):
    """The change of a held-out set's loss from the start model."""

    role: str
    """`retained`, `learned` or `test`."""
    change: LossChange

    def as_dict(self) -> dict[str, object]:
        """The change as plain data, with its role."""
        return {"role": self.role, **asdict(self.change)}


@dataclass(frozen=True)
class BlendedModel(Result):
    """A model between the start and the trained one."""

    name: str
    weight: float
    """The weight of the trained model: 0 is the start."""
    block: int | None
    """The only block that is interpolated; None: all weights."""
    changes: Mapping[str, BlendSetChange]
    """Of each held-out set, from the start model."""

    def worst_rise(self) -> float:
        """The largest rise of a retained loss, as a fraction, by the upper end of its interval."""
        return max(item.change.relative_high for item in self._of_role("retained"))

    def mean_change(self, role: str) -> float | None:
        """The mean change over the sets of a role, in nats per token."""
        differences = [item.change.difference for item in self._of_role(role)]
        return sum(differences) / len(differences) if differences else None

    def _of_role(self, role: str) -> list[BlendSetChange]:
        return [item for item in self.changes.values() if item.role == role]

    def as_dict(self) -> dict[str, object]:
        """The point as plain data."""
        changes = {name: item.as_dict() for name, item in self.changes.items()}
        return {"name": self.name, "weight": self.weight, "block": self.block, "changes": changes}


Granularity = Literal["model", "block"]


@dataclass(frozen=True)
class Blend(Result):
    """The models between a run's start and its end, and the one that was chosen."""

    run: Path
    start: str
    granularity: Granularity
    average: int | None
    """How many last checkpoints the end is a mean of; None: the run's model."""
    new: tuple[str, ...]
    """Weights of the trained model that its start does not have."""
    max_forgetting: float | None
    weights: tuple[float, ...]
    points: tuple[BlendedModel, ...]
    chosen: BlendedModel | None
    folder: Path | None = None
    """Where the chosen model was written."""

    def as_dict(self) -> dict[str, object]:
        """The result as plain data; the chosen point by its name."""
        data = super().as_dict()
        del data["weights"], data["max_forgetting"]
        return {
            **data,
            "points": [point.as_dict() for point in self.points],
            "chosen": self.chosen.name if self.chosen else None,
        }


def blend(
    run: Path | str,
    *,
    weights: Sequence[float] = (0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1),
    granularity: str = "model",
    average: int | None = None,
    max_forgetting: float | None = None,
    weight: float | None = None,
    out: Path | str | None = None,
    cache: Path | None = None,
) -> Blend:
    """Score models between a run's start and its end on the run's held-out sets, and write one of them to `out`.

    `weights`: weights of the trained model. `granularity`: `model`, or `block` to also interpolate each block alone.
    `average`: the end is the mean of so many last checkpoints. The chosen point is that of `weight`; without it, the one that
    learnt most among those that rise on no retained set by more than `max_forgetting` (upper end of the interval).

    Raises `StageError` for a run without retained sets or with a tuning that is no weight delta, `ModelError` for models of
    different shapes.
    """
    machine.tune_allocator()
    run, out = Path(run), Path(out) if out else None
    _check_options(weights, granularity, weight, max_forgetting, out)
    record = read_record(run)
    stage = parse_recorded_stage(record.stage, record.name)
    plan = make_plan(stage, Path(record.stage_folder or "."), cache or cache_folder())
    sets = list(plan.evaluation.scored_sets)
    if not any(h.role == "retained" for h in sets):
        raise StageError(
            f"{run} has no retained set, so the forgetting of a blend cannot be measured",
            where="blend",
            hint="name old text under evaluation.retained of its stage, and train it again",
        )
    opened = _load_merged(run, record)
    model = opened.model
    end = _average_checkpoints(run, record, average) if average else interpolate.copy_weights(model)
    start = _start_weights(record, plan, opened)
    blocks = interpolate.block_parameter_names(model)
    new = interpolate.refuse_other_shapes(start, end, (record.model.start_model, str(run)), blocks)
    world = World(machine.default_device())
    view = wrap_model(model, opened.task).to(world.device)
    start, end = ({n: t.to(world.device) for n, t in state.items()} for state in (start, end))

    def interpolate_model(weight: float, block: int | None) -> None:
        interpolate.interpolate_weights(model, start, end, _point_weights(weight, block, start, blocks))

    def score(weight: float, block: int | None) -> before_after.AllScores:
        interpolate_model(weight, block)
        return before_after.score_sets(view, sets, context=plan.model.context_length, world=world)

    before = score(0.0, None)
    points: list[BlendedModel] = []
    for name, point_weight, block in _sweep_points(weights, granularity, len(blocks)):
        after = before if point_weight == 0 and block is None else score(point_weight, block)
        changes = {
            h.name: BlendSetChange(
                h.role, before_after.loss_change(before[h.name], after[h.name], plan.model.vocab_size)
            )
            for h in sets
            if h.name in before and h.name in after
        }
        points.append(BlendedModel(name, point_weight, block, changes))
    chosen = _choose_point(points, weight, max_forgetting)
    if out:
        if chosen is None:
            best = min(points, key=BlendedModel.worst_rise)
            raise StageError(
                f"no point keeps within the bound; the best is {best.name} with {best.worst_rise():+.2%}",
                where="--max-forgetting",
            )
        interpolate_model(chosen.weight, chosen.block)
        _publish_blend(out, model, record)
    return Blend(
        run, record.model.start_model, granularity, average, tuple(new), max_forgetting,  # type: ignore[bad-argument-type]
        tuple(sorted(set(weights))), tuple(points), chosen, out,
    )  # fmt: skip


def parse_weights(text: str) -> list[float]:
    """Weights with commas between them. Raises `StageError`."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise StageError(f"{text!r} is not a list of weights", where="--weights", expected="0,0.5,1") from None


def _check_options(
    weights: Sequence[float], granularity: str, weight: float | None, max_forgetting: float | None, out: Path | None
) -> None:
    outside = [w for w in (*weights, *([weight] if weight is not None else [])) if not 0 <= w <= 1]
    if outside or not weights:
        raise StageError(
            f"{outside[0]} is not a weight between two models" if outside else "there is no weight",
            where="--weights",
            expected="numbers from 0 to 1",
        )
    if granularity not in get_args(Granularity):
        raise StageError(f"there is no granularity {granularity!r}", where="--granularity", expected="model or block")
    if out and out.exists():
        raise StageError(f"{out} already exists", where="--out", hint="name a folder that does not exist")
    if weight is not None and weight not in weights:
        raise StageError(f"{weight} is not among the weights", where="--weight", expected=", ".join(map(str, weights)))
    if out and weight is None and max_forgetting is None:
        raise StageError(
            "no model is chosen to be written", where="--out", hint="add --weight W or --max-forgetting SHARE"
        )


def _load_merged(run: Path, record: Record) -> LoadedModel:
    """A run's final model as plain weights."""
    opened = open_model(locate_model(str(run), Path.cwd()))
    if opened.tunings:
        raise StageError(
            f"`{opened.tunings[-1].kind}` of {run} is no weight delta, so it cannot be interpolated",
            where="blend",
            expected="a run that changed weights: full, blocks, lora, osf ...",
            hint="detach it to have the start model back",
        )
    return opened


def _start_weights(record: Record, plan: Plan, loaded_model: LoadedModel) -> dict[str, Tensor]:
    """The weights of a run's start model."""
    start = open_model(plan.model.start)
    if start.tunings:
        raise StageError(f"{record.model.start_model} has a `{start.tunings[-1].kind}` tuning", where="blend")
    weights = interpolate.copy_weights(start.model)
    # A classifier's backbone has other names only where it has a task layer.
    return {name: tensor for name, tensor in weights.items() if name in dict(loaded_model.model.named_parameters())}


def _average_checkpoints(run: Path, record: Record, count: int) -> dict[str, Tensor]:
    """The mean of the last checkpoints' weights."""
    folders = Checkpoints(run / "checkpoints").list_folders()[-count:]
    if len(folders) < count:
        raise StageError(
            f"{run} has {len(folders)} checkpoints",
            where="--average",
            expected=f"{count} of them",
            hint="save more often and keep all: save: {every: 5%, keep: all}",
        )
    return interpolate.average_weights(
        [interpolate.copy_weights(_load_merged(folder, record).model) for folder in folders]
    )


def _sweep_points(weights: Sequence[float], granularity: str, blocks: int) -> Iterator[tuple[str, float, int | None]]:
    """The name, weight and block of each point."""
    for weight in sorted(set(weights)):
        yield f"{weight:g}", weight, None
    if granularity == "block":
        for block in range(blocks):
            for weight in _BLOCK_WEIGHTS:
                yield f"block {block} at {weight:g}", weight, block


def _point_weights(
    weight: float, block: int | None, start: dict[str, Tensor], blocks: list[list[str]]
) -> dict[str, float] | float:
    return weight if block is None else dict.fromkeys(start, 1.0) | dict.fromkeys(blocks[block], weight)


def _choose_point(points: Sequence[BlendedModel], weight: float | None, bound: float | None) -> BlendedModel | None:
    if weight is not None:
        return next(point for point in points if point.block is None and point.weight == weight)
    if bound is None:
        return None
    within = [point for point in points if point.worst_rise() <= bound]
    return min(within, key=lambda point: point.mean_change("learned") or -point.weight, default=None)


def _publish_blend(out: Path, model: PreTrainedModel, record: Record) -> None:
    start = locate_model(record.model.source or record.model.start_model, Path(record.stage_folder or "."))
    dtype = stored_dtype(start)
    with torch.no_grad():
        publish_pretrained(out, model, load_tokenizer(start), dtype=dtype)
