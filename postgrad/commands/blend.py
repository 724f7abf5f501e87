"""Score the models between a run's start and its end, or a merge of several models, and write one of them.

A blend trades learning for retention. It costs no training, and does not replace replay, which retains without giving up
learning (Ibrahim et al. 2024, table 6: the best merge 27.6 against 32.5).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from postgrad.commands.blend_models import (
    BlendModels,
    BlendSet,
    Checkpoint,
    Weights,
    average_checkpoints,
    collect_sets,
    load_blend_models,
    plan_run,
    select_checkpoints,
)
from postgrad.commands.results import Result
from postgrad.commands.weighted_models import MAX_WEIGHT, parse_weighted_model
from postgrad.distributed.world import World
from postgrad.errors import StageError, suggest_nearest
from postgrad.evaluation import before_after
from postgrad.hardware import machine
from postgrad.lineage.record import Record
from postgrad.models import interpolate
from postgrad.models.merge_weights import PRUNING_METHODS, MergeMethod, MergeRecipe, merge_weights
from postgrad.models.model import Model, wrap_model
from postgrad.models.published_vocabulary import publish_pretrained
from postgrad.optim.lr_schedules import SHAPES
from postgrad.stats.forgetting import LossChange
from postgrad.storage.cache_folder import cache_folder

_BLOCK_WEIGHTS = (0.0, 0.5)
"""Weights of a single block; few, as there are many blocks."""
DEFAULT_WEIGHTS = (0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
DEFAULT_DENSITY = 0.2
"""TIES keeps 20 % (Yadav et al. 2023, section 5)."""


@dataclass(frozen=True)
class MergeOptions:
    """The models that are merged with a run, and how."""

    models: tuple[str, ...] = ()
    """Models of the same start, `MODEL`, `MODEL=WEIGHT` or `MODEL=WEIGHT,WEIGHT`; each combination of weights is one end."""
    methods: tuple[str, ...] = ("linear",)
    """`linear` (task arithmetic, chat vector), `ties`, `dare_linear`, `dare_ties`, `model_stock`, `slerp`: one end each."""
    density: float = DEFAULT_DENSITY
    """The fraction of the values that ties and dare keep."""
    seed: int = 0
    """Of the values that dare drops."""
    start: str | None = None
    """The start of all models. Default: that of the run."""
    is_forced: bool = False
    """Subtract a start that a model was not trained from."""
    block_weights: tuple[float, ...] = ()
    """Factors of the weight of each block, first to last; fewer are interpolated. Other weights have factor 1."""


@dataclass(frozen=True)
class AverageOptions:
    """Checkpoints of the run whose weighted mean stands for an anneal."""

    counts: tuple[int, ...]
    """How many checkpoints: one end each."""
    decays: tuple[str, ...] = ("linear",)
    """Shapes of the decay that the mean stands for, those of a schedule: one end each. `linear` is the plain mean."""
    floor: float = 0.0
    """Where the decay ends, as a fraction of the constant rate."""
    until: int | None = None
    """The step of the last checkpoint. Default: the last one."""


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
class BlendEnd(Result):
    """What a sweep leads to at weight 1: a trained model, a mean of its checkpoints, a merge."""

    name: str
    method: MergeMethod
    model_weights: tuple[float, ...]
    """Of the run, and of each model that is merged with it."""
    average: int | None = None
    """How many checkpoints of the run are averaged; None: the run's model."""
    decay: str = ""
    """The decay that their mean stands for."""


@dataclass(frozen=True)
class BlendedModel(Result):
    """A model between the start and an end."""

    name: str
    weight: float
    """The weight of the end: 0 is the start."""
    block: int | None
    """The only block that is interpolated; None: all weights."""
    changes: Mapping[str, BlendSetChange]
    """Of each held-out set, from the start model."""
    end: int = 0
    """The index of its end."""

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
        return {"name": self.name, "end": self.end, "weight": self.weight, "block": self.block, "changes": changes}


Granularity = Literal["model", "block"]


@dataclass(frozen=True)
class Blend(Result):
    """The models between a start and one or more ends, and the one that was chosen."""

    run: str
    start: str
    granularity: Granularity
    new: tuple[str, ...]
    """Weights of the trained model that its start does not have."""
    max_forgetting: float | None
    weights: tuple[float, ...]
    ends: tuple[BlendEnd, ...]
    points: tuple[BlendedModel, ...]
    chosen: BlendedModel | None
    merge: MergeOptions = field(default_factory=MergeOptions)
    average: AverageOptions | None = None
    notes: tuple[str, ...] = ()
    folder: Path | None = None
    """Where the chosen model was written."""

    def describe_end(self) -> str:
        """What the sweep leads to, in words."""
        counts = self.average.counts if self.average else ()
        run = f"the mean of its last {' or '.join(map(str, counts))} checkpoints" if counts else self.run
        models, methods = self.merge.models, " or ".join(self.merge.methods)
        return f"{run} merged with {', '.join(models)} by {methods}" if models else run

    def as_dict(self) -> dict[str, object]:
        """The result as plain data; the chosen point by its name."""
        data = super().as_dict()
        del data["weights"], data["max_forgetting"]
        return {
            **data,
            "points": [point.as_dict() for point in self.points],
            "chosen": self.chosen.name if self.chosen else None,
        }


_Average = tuple[int | None, str]
"""How many checkpoints are averaged, and for which decay; None: the run's model."""


def blend(
    run: Path | str,
    *,
    weights: Sequence[float] = DEFAULT_WEIGHTS,
    granularity: str = "model",
    merge: MergeOptions | None = None,
    average: AverageOptions | int | None = None,
    max_forgetting: float | None = None,
    weight: float | None = None,
    out: Path | str | None = None,
    cache: Path | None = None,
) -> Blend:
    """Score models between a run's start and its end on the runs' held-out sets, and write one of them to `out`.

    `run`: a run, or `RUN=WEIGHT` in a merge. `weights`: weights of the end. `granularity`: `model`, or `block` to also
    interpolate each block alone. `average`: the end is a mean of checkpoints, of the last N for a number. The chosen point is
    that of `weight`; without it, the one that learnt most among those that rise on no retained set by more than
    `max_forgetting` (upper end of the interval).

    Raises `StageError` for a run without retained sets or with a tuning that is no weight delta, `ModelError` for models of
    different shapes, vocabularies or lineages.
    """
    machine.tune_allocator()
    out, cache, merge = Path(out) if out else None, cache or cache_folder(), merge or MergeOptions()
    average = AverageOptions((average,)) if isinstance(average, int) else average
    _check_sweep(weights, granularity, weight, max_forgetting, out, is_merge=bool(merge.models))
    names, grid = _parse_models((str(run), *merge.models))
    ends = _list_ends(names, grid, merge, average)
    if weight is not None and len(ends) > 1:
        raise StageError(
            f"{len(ends)} merges have the weight {weight:g}: {', '.join(end.name for end in ends)}",
            where="--weight",
            hint="name one method and one weight of each model, or choose by --max-forgetting",
        )
    record, plan = plan_run(Path(names[0]), cache)
    sets, notes = collect_sets(names, plan, cache)
    checkpoints = _select_checkpoints(Path(names[0]), record, ends, average)
    models = load_blend_models(names, record, plan, merge.start, merge.is_forced)
    sweep = _Sweep(models, sets, merge, checkpoints, average.floor if average else 0.0)
    points = list(sweep.points(ends, sorted({float(w) for w in weights}), granularity == "block"))
    chosen = _choose_point(points, weight, max_forgetting)
    if out:
        if chosen is None:
            best = min(points, key=BlendedModel.worst_rise)
            raise StageError(
                f"no point keeps within the bound; the best is {best.name} with {best.worst_rise():+.2%}",
                where="--max-forgetting",
            )
        sweep.move_to(ends[chosen.end], chosen.weight, chosen.block)
        with torch.no_grad():
            publish_pretrained(out, models.loaded.model, models.tokenizer, dtype=models.dtype)
    return Blend(
        names[0], models.start_location.name, granularity, models.new, max_forgetting,  # type: ignore[bad-argument-type]
        tuple(sorted(set(weights))), ends, tuple(points), chosen, merge, average, (*models.notes, *notes), out,
    )  # fmt: skip


class _Sweep:
    """The model that is moved between the start and each end, and scored. One end is in memory at a time."""

    def __init__(
        self,
        models: BlendModels,
        sets: Sequence[BlendSet],
        merge: MergeOptions,
        checkpoints: Mapping[_Average, Sequence[Checkpoint]],
        floor: float,
    ) -> None:
        self.world = World(machine.default_device())
        self.models, self.sets, self.merge, self.checkpoints, self.floor = models, sets, merge, checkpoints, floor
        self.model = models.loaded.model
        self.view: Model = wrap_model(self.model, models.loaded.task).to(self.world.device)
        self.start = self._on_device(models.start)
        self.blocks = interpolate.block_parameter_names(self.model)
        self._end: tuple[BlendEnd, Weights] | None = None
        self._first: tuple[_Average, Weights] = ((None, ""), models.weights[0])

    def points(self, ends: Sequence[BlendEnd], weights: Sequence[float], by_block: bool) -> Iterator[BlendedModel]:
        """The start and every point of every end, scored."""
        self.move_to(ends[0], 0.0, None)
        before = self._score()
        for number, end in enumerate(ends):
            for name, weight, block in _sweep_points(weights, len(self.blocks) if by_block else 0):
                if weight == 0 and block is None:
                    if number == 0:
                        yield BlendedModel(name, weight, block, self._changes(before, before), number)
                    continue
                self.move_to(end, weight, block)
                label = f"{end.name} at {name}" if len(ends) > 1 else name
                yield BlendedModel(label, weight, block, self._changes(before, self._score()), number)

    def move_to(self, end: BlendEnd, weight: float, block: int | None) -> None:
        """Set the model to a point."""
        if self._end is None or self._end[0] != end:
            self._end = None  # the earlier end is freed before this one is made
            self._end = end, self._on_device(self._make_end(end))
        factors = dict.fromkeys(self.start, weight if block is None else 1.0)
        for number, names in enumerate(self.blocks):
            factor = _block_factor(self.merge.block_weights, number, len(self.blocks))
            own = weight if block in (None, number) else 1.0
            factors |= dict.fromkeys(names, own * factor)
        on_sphere = end.method == "slerp" and len(end.model_weights) == 1
        interpolate.interpolate_weights(self.model, self.start, self._end[1], factors, on_sphere=on_sphere)

    def _make_end(self, end: BlendEnd) -> Weights:
        average = end.average, end.decay
        if self._first[0] != average:
            self._first = average, average_checkpoints(self.checkpoints[average], end.decay, self.floor)
        parts = [self._first[1], *self.models.weights[1:]]
        if len(parts) == 1 and end.method in ("linear", "slerp") and end.model_weights == (1.0,):
            return parts[0]
        recipe = MergeRecipe(end.method, end.model_weights, self.merge.density, self.merge.seed)
        return merge_weights(self.models.start, parts, recipe)

    def _on_device(self, weights: Mapping[str, Tensor]) -> Weights:
        return {name: tensor.to(self.world.device) for name, tensor in weights.items()}

    def _score(self) -> before_after.AllScores:
        scores: before_after.AllScores = {}
        for each in self.sets:
            found = before_after.score_sets(self.view, [each.held_out], context=each.context, world=self.world)
            scores[each.name] = found[each.held_out.name]
        return scores

    def _changes(self, before: before_after.AllScores, after: before_after.AllScores) -> dict[str, BlendSetChange]:
        return {
            each.name: BlendSetChange(
                each.held_out.role, before_after.loss_change(before[each.name], after[each.name], each.vocabulary)
            )
            for each in self.sets
        }


def _parse_models(models: Sequence[str]) -> tuple[list[str], list[tuple[float, ...]]]:
    """The names of the models, and every combination of their weights."""
    parsed = [parse_weighted_model(text, "blend" if i == 0 else "--merge-with") for i, text in enumerate(models)]
    names = [name for name, _ in parsed]
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled:
        raise StageError(f"{doubled} is named twice", where="--merge-with", expected="each model once")
    return names, list(itertools.product(*(weights for _, weights in parsed)))


def _list_ends(
    names: Sequence[str], grid: Sequence[tuple[float, ...]], merge: MergeOptions, average: AverageOptions | None
) -> tuple[BlendEnd, ...]:
    """The ends of the sweep: every average, under every method, at every combination of weights."""
    for method in merge.methods:
        _check_method(method, grid, merge.density)
    averages = _list_averages(average)
    ends: list[BlendEnd] = []
    for (count, decay), method, weights in itertools.product(averages, merge.methods, grid):
        words = [f"average {count}"] if len({count for count, _ in averages}) > 1 else []
        words += [decay] if len({decay for _, decay in averages}) > 1 else []
        words += [method] if len(merge.methods) > 1 else []
        if len(grid) > 1:
            words += [f"{Path(name).name}={weight:g}" for name, weight in zip(names, weights, strict=True)]
        ends.append(BlendEnd(" ".join(words) or str(names[0]), method, weights, count, decay))  # type: ignore[bad-argument-type]
    return tuple(ends)


def _list_averages(average: AverageOptions | None) -> list[tuple[int | None, str]]:
    if average is None:
        return [(None, "")]
    unknown = next((shape for shape in average.decays if shape not in SHAPES), None)
    if unknown is not None:
        raise StageError(
            f"there is no decay {unknown!r}",
            where="--decay",
            expected=", ".join(SHAPES),
            hint=suggest_nearest(unknown, list(SHAPES)),
        )
    needs_floor = next((shape for shape in average.decays if shape in ("exponential", "inverse-linear")), None)
    if not 0 <= average.floor < 1 or (needs_floor and average.floor == 0):
        raise StageError(
            f"a decay to {average.floor:g} of the rate" + (f" cannot be {needs_floor}" if needs_floor else ""),
            where="--floor",
            expected="a fraction below 1, above 0 for exponential and inverse-linear",
        )
    if not average.counts or min(average.counts) < 1:
        raise StageError("a mean of no checkpoint", where="--average", expected="numbers from 1 on")
    # a single checkpoint stands for no decay
    return [(count, decay) for count in average.counts for decay in average.decays[: 1 if count == 1 else None]]


def _select_checkpoints(
    run: Path, record: Record, ends: Sequence[BlendEnd], average: AverageOptions | None
) -> dict[_Average, Sequence[Checkpoint]]:
    """The checkpoints of every mean, all of them found before anything is scored."""
    until = average.until if average else None
    return {
        (end.average, end.decay): select_checkpoints(run, record, end.average, end.decay, until)
        for end in ends
        if end.average is not None
    }


def _check_method(method: str, grid: Sequence[tuple[float, ...]], density: float) -> None:
    """Raise `StageError` for a method that does not exist, or does not fit the number of models and their weights."""
    known, count = get_args(MergeMethod), len(grid[0])
    if method not in known:
        raise StageError(
            f"there is no method {method!r}", where="--method", expected=", ".join(known),
            hint=suggest_nearest(method, known),
        )  # fmt: skip
    if method in PRUNING_METHODS and not 0 < density <= 1:
        raise StageError(f"{method} cannot keep {density:g} of the values", where="--density", expected="1% to 100%")
    if (method == "model_stock" and count < 2) or (method == "slerp" and count > 2):
        raise StageError(
            f"{method} of {count} models",
            where="--method",
            expected="two models or more" if method == "model_stock" else "one model and its start, or two models",
        )
    weighted = any(weight != 1 for weights in grid for weight in weights)
    if weighted and (method == "model_stock" or (method == "slerp" and count == 1)):
        raise StageError(f"{method} has no weights of models", where="--merge-with", expected="models without =WEIGHT")
    if method == "slerp" and any(min(weights) < 0 or sum(weights) == 0 for weights in grid):
        raise StageError("slerp between two models has no negative weights", where="--merge-with", expected="0 to 1")


def _check_sweep(
    weights: Sequence[float],
    granularity: str,
    weight: float | None,
    max_forgetting: float | None,
    out: Path | None,
    *,
    is_merge: bool,
) -> None:
    most = MAX_WEIGHT if is_merge else 1
    outside = [w for w in (*weights, *([weight] if weight is not None else [])) if not 0 <= w <= most]
    if outside or not weights:
        raise StageError(
            f"{outside[0]} is not a weight between two models" if outside else "there is no weight",
            where="--weights",
            expected="numbers from 0 on" if is_merge else "numbers from 0 to 1",
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


def _sweep_points(weights: Sequence[float], blocks: int) -> Iterator[tuple[str, float, int | None]]:
    """The name, weight and block of each point."""
    for weight in weights:
        yield f"{weight:g}", weight, None
    for block in range(blocks):
        for weight in _BLOCK_WEIGHTS:
            yield f"block {block} at {weight:g}", weight, block


def _block_factor(factors: Sequence[float], block: int, blocks: int) -> float:
    """The factor of a block: `factors` spread evenly from the first block to the last, and interpolated."""
    if not factors:
        return 1.0
    place = block / max(1, blocks - 1) * (len(factors) - 1)
    below = min(int(place), max(0, len(factors) - 2))
    above = min(below + 1, len(factors) - 1)
    return factors[below] + (place - below) * (factors[above] - factors[below])


def _choose_point(points: Sequence[BlendedModel], weight: float | None, bound: float | None) -> BlendedModel | None:
    if weight is not None:
        return next(point for point in points if point.block is None and point.weight == weight)
    if bound is None:
        return None
    within = [point for point in points if point.worst_rise() <= bound]
    return min(within, key=lambda point: point.mean_change("learned") or -point.weight, default=None)
