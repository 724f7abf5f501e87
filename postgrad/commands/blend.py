"""What lies between a run's start model and what it became? Each point scored on what was to be kept and what was to be learnt.

A blend gives back some of what was forgotten for some of what was learnt. It costs no training, and does not replace replay,
which keeps the one without giving up the other (Ibrahim et al. 2024, table 6: the best merge 27.6 against 32.5).
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel

from postgrad.config.stage_file import parse_recorded_stage
from postgrad.distributed.world import World
from postgrad.errors import StageError
from postgrad.evaluation import before_after
from postgrad.evaluation.held_out import HeldOutSet
from postgrad.hardware import machine
from postgrad.lineage.record import Record, read_record
from postgrad.models import interpolate
from postgrad.models.model import wrap_model
from postgrad.models.pretrained import load_tokenizer, locate_model, save_pretrained, stored_dtype
from postgrad.plan.plan import Plan, make_plan
from postgrad.reports.html import document
from postgrad.reports.pages import blend_page
from postgrad.reports.results import BlendResult
from postgrad.storage.atomic import publish_folder
from postgrad.training.checkpoint import Checkpoints
from postgrad.tuning.open_model import LoadedModel, open_model

_BLOCK_WEIGHTS = (0.0, 0.5)
"""Of a single block, as there are many."""


@dataclass(frozen=True)
class _BlendPoint:
    """One model between the two."""

    name: str
    weight: float
    block: int | None
    """The only block that is not the trained one's; None: all weights alike."""


def blend_run(
    run: Path,
    *,
    sweep: Sequence[float],
    granularity: str,
    average: int | None,
    max_forgetting: float | None,
    choose: float | None,
    out: Path | None,
    report: Path | None,
    cache: Path,
) -> dict[str, Any]:
    """Score models between a run's start and its end, on the run's own held-out sets, and publish one of them.

    `sweep`: weights of the trained model. `by`: `whole`, or `block` for each block by itself. `average`: the end is the mean of
    so many last checkpoints. The one that leaves (`out`) is that of weight `choose`; without it the one that learnt most and
    rose on no retained set by more than `max_forgetting`, by the upper end of the interval.

    Raises `StageError` for a run without retained sets or of a tuning that is no change of weights, `ModelError` for models of
    other shapes.
    """
    machine.tune_allocator()
    _check_options(sweep, granularity, choose, max_forgetting, out)
    record = read_record(run)
    stage = parse_recorded_stage(yaml.safe_load(record.stage_yaml), record.name)
    plan = make_plan(stage, Path(record.stage_folder), cache)
    sets = list(plan.evaluation.scored_sets)
    if not any(h.role == "retained" for h in sets):
        raise StageError(
            f"{run} has no retained set, so what a blend gives back could not be seen",
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

    def scored(point: _BlendPoint) -> before_after.AllScores:
        interpolate.interpolate_weights(model, start, end, _point_weights(point, start, blocks))
        return before_after.score_sets(view, sets, context=record.model.context_length, world=world)

    before = scored(_BlendPoint("start", 0.0, None))
    points: list[dict[str, Any]] = []
    for point in _sweep_points(sweep, granularity, len(blocks)):
        now = before if point.weight == 0 and point.block is None else scored(point)
        losses = before_after.loss_changes(sets, before, now, plan.model.vocab_size)
        changes = {name: change.as_json() for name, change in losses.items()}
        points.append({**asdict(point), "changes": changes})
    chosen = _choose_point(points, choose, max_forgetting)
    found = {
        "run": str(run),
        "start": record.model.start_model,
        "by": granularity,
        "average": average,
        "new": new,
        "points": points,
        "chosen": chosen["name"] if chosen else None,
    }
    lines = _lines(found, sets, max_forgetting)
    following = ["eval", str(out)] if out else _next_command(run, sweep, granularity, average, max_forgetting)
    if out:
        if chosen is None:
            raise StageError(
                "no point of the sweep keeps within the bound; the best is "
                + min(points, key=_worst_rise)["name"]
                + f" with {_worst_rise(min(points, key=_worst_rise)):+.2%}",
                where="--max-forgetting",
            )
        point = _BlendPoint(chosen["name"], chosen["weight"], chosen["block"])
        interpolate.interpolate_weights(model, start, end, _point_weights(point, start, blocks))
        _publish_blend(out, model, record)
        found["folder"] = str(out)
        lines.append(f"wrote {out}: {chosen['name']}")
    if report:
        document.write_page(report, blend_page.blend_page(BlendResult.model_validate(found)))
        lines.append(f"report: {report}")
    lines.append(f"next: {shlex.join(['postgrad', *following])}")
    return {"text": "\n".join(lines), **found}


def parse_weights(text: str) -> list[float]:
    """Weights as they are given on the command line, by commas. Raises `StageError`."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise StageError(f"{text!r} is no list of weights", where="--sweep", expected="0,0.5,1") from None


def _next_command(
    run: Path, sweep: Sequence[float], granularity: str, average: int | None, max_forgetting: float | None
) -> list[str]:
    """The command that writes a model of this sweep: the one that keeps within the bound, or the one in the middle."""
    by_words = ["--by", granularity] if max_forgetting is not None and granularity != "whole" else []
    mean = ["--average", str(average)] if average else []
    weights = sorted(set(sweep))
    chosen = (
        ["--max-forgetting", f"{max_forgetting:g}"]
        if max_forgetting is not None
        else ["--choose", f"{weights[len(weights) // 2]:g}"]
    )
    listed = ["--sweep", ",".join(f"{weight:g}" for weight in weights)]
    return ["blend", str(run), *listed, *by_words, *mean, *chosen, "--out", f"{run}-blend"]


def _check_options(
    sweep: Sequence[float], granularity: str, choose: float | None, max_forgetting: float | None, out: Path | None
) -> None:
    strange = [w for w in (*sweep, *([choose] if choose is not None else [])) if not 0 <= w <= 1]
    if strange or not sweep:
        raise StageError(
            f"{strange[0] if strange else 'nothing'} is no weight between two models",
            where="--sweep",
            expected="numbers from 0 to 1",
        )
    if granularity not in ("whole", "block"):
        raise StageError(f"there is no blend by {granularity!r}", where="--by", expected="whole or block")
    if out and out.exists():
        raise StageError(f"{out} is there already", where="--out", hint="name a folder that does not exist")
    if choose is not None and choose not in sweep:
        raise StageError(f"{choose} is not in the sweep", where="--choose", expected=", ".join(map(str, sweep)))
    if out and choose is None and max_forgetting is None:
        raise StageError(
            "which of the models is to be written?", where="--out", hint="give --choose W or --max-forgetting SHARE"
        )


def _load_merged(run: Path, record: Record) -> LoadedModel:
    """A run's final model as plain weights."""
    opened = open_model(locate_model(str(run), Path.cwd()))
    if opened.tunings:
        raise StageError(
            f"`{opened.tunings[-1].kind}` of {run} is no change of weights, so nothing lies between",
            where="blend",
            expected="a run that moved weights: full, blocks, lora, osf ...",
            hint="switch it off to have the start model back",
        )
    return opened


def _start_weights(record: Record, plan: Plan, loaded_model: LoadedModel) -> dict[str, Tensor]:
    """The weights of a run's start model, as the stage found it."""
    start = open_model(plan.model.start)
    if start.tunings:
        raise StageError(f"`{start.tunings[-1].kind}` stands in {record.model.start_model}", where="blend")
    found = interpolate.copy_weights(start.model)
    # A classifier's backbone has other names only where its task layer stands beside it.
    return {name: tensor for name, tensor in found.items() if name in dict(loaded_model.model.named_parameters())}


def _average_checkpoints(run: Path, record: Record, count: int) -> dict[str, Tensor]:
    """The mean of the last checkpoints' weights."""
    places = Checkpoints(run / "checkpoints", None).list_folders()[-count:]
    if len(places) < count:
        raise StageError(
            f"{run} has {len(places)} checkpoints",
            where="--average",
            expected=f"{count} of them",
            hint="save more often and keep all: save: {every: 5%, keep: all}",
        )
    return interpolate.average_weights(
        [interpolate.copy_weights(_load_merged(place, record).model) for place in places]
    )


def _sweep_points(sweep: Sequence[float], granularity: str, blocks: int) -> Iterator[_BlendPoint]:
    for weight in sorted(set(sweep)):
        yield _BlendPoint(f"{weight:g}", weight, None)
    if granularity == "block":
        for block in range(blocks):
            for weight in _BLOCK_WEIGHTS:
                yield _BlendPoint(f"block {block} at {weight:g}", weight, block)


def _point_weights(point: _BlendPoint, start: dict[str, Tensor], blocks: list[list[str]]) -> dict[str, float] | float:
    if point.block is None:
        return point.weight
    return dict.fromkeys(start, 1.0) | dict.fromkeys(blocks[point.block], point.weight)


def _changes_of_role(point: dict[str, Any], role: str) -> list[dict[str, Any]]:
    return [change for change in point["changes"].values() if change["role"] == role]


def _worst_rise(point: dict[str, Any]) -> float:
    """The largest rise on a retained set, as a share, by the upper end of its interval."""
    return max(change["relative_high"] for change in _changes_of_role(point, "retained"))


def mean_change(point: dict[str, Any], role: str) -> float | None:
    """The mean change over the sets of a role, in nats per token."""
    found = [change["difference"] for change in _changes_of_role(point, role)]
    return sum(found) / len(found) if found else None


def _choose_point(points: list[dict[str, Any]], choose: float | None, bound: float | None) -> dict[str, Any] | None:
    whole = [point for point in points if point["block"] is None]
    if choose is not None:
        return next(point for point in whole if point["weight"] == choose)
    if bound is None:
        return None
    within = [point for point in points if _worst_rise(point) <= bound]
    return min(within, key=lambda p: mean_change(p, "learned") or -p["weight"], default=None)


def _lines(result: dict[str, Any], sets: Sequence[HeldOutSet], bound: float | None) -> list[str]:
    names = [h.name for h in sets]
    role = {h.name: h.role for h in sets}
    end = f"the mean of its last {result['average']} checkpoints" if result["average"] else result["run"]
    lines = [
        f"between {result['start']} (0) and {end} (1); change in nats/token against the start, 95 % interval",
        "  " + f"{'weight':<16}" + "".join(f"{name + ' (' + role[name] + ')':>32}" for name in names),
    ]
    for point in result["points"]:
        cells = [point["changes"][name] for name in names]
        shown = [f"{c['difference']:+.4f} ({c['low']:+.4f} to {c['high']:+.4f})" for c in cells]
        lines.append(f"  {point['name']:<16}" + "".join(f"{cell:>32}" for cell in shown))
    if result["chosen"]:
        why = f", the most learnt within {bound:.2%} of forgetting" if bound is not None else ""
        lines.append(f"chosen: {result['chosen']}{why}")
    lines.append("a blend gives up learning for retention; it is no replacement for replay")
    return lines


def _publish_blend(out: Path, model: PreTrainedModel, record: Record) -> None:
    start = locate_model(record.model.source, Path(record.stage_folder))
    dtype = stored_dtype(start)
    with torch.no_grad():
        publish_folder(out, lambda staged: save_pretrained(model, load_tokenizer(start), staged, dtype=dtype))
