"""Relearning test: fine-tune copies for a few steps on old text, to separate lost knowledge from misalignment.

What a few steps recover was not lost: the model was only misaligned with such text (spurious forgetting; Zheng et al. 2025,
arXiv 2501.13453). A copy of the trained model takes these steps. A copy of the start model takes the same steps: its gain is
not recovered but newly learned, and is subtracted.

    forgot    = trained - start
    remaining = fine-tuned copy of trained - fine-tuned copy of start
    recovered = forgot - remaining

all on old documents that none of these steps has read: half of a held-out file is trained on and the other half scored; for a
set split off a replay source, the rest of that source is trained on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from postgrad.config.stage_file import parse_stage
from postgrad.distributed.world import World
from postgrad.evaluation import before_after
from postgrad.evaluation.perplexity import Scores
from postgrad.hardware.execution import Execution
from postgrad.lineage.record import Interval, Relearning, SetRelearning
from postgrad.models.model import wrap_model
from postgrad.optim.lr_schedules import sample_schedule
from postgrad.plan.held_out_files import inherit_row_format
from postgrad.plan.plan import Plan, make_plan
from postgrad.plan.seen_sources import make_replay_source, make_source_origin
from postgrad.plan.sources import ResolvedSource
from postgrad.run.build import build_run, make_loader
from postgrad.run.tuned_model import make_tuned_model
from postgrad.stats.bootstrap import percentile_interval, ratio_interval, resample_ratio
from postgrad.training.loop import train_steps

_MIN_DOCUMENTS = 10
"""Minimum number of documents of a set."""
_HELD_OUT_SHARE = 0.5
_TEACHER_OBJECTIVES = ("distill", "on-policy")
"""Objectives omitted in the test, since they need a teacher."""


def measure_relearning(
    plan: Plan,
    trained: Path,
    scores: tuple[Mapping[str, Scores], Mapping[str, Scores]],
    execution: Execution,
    world: World,
    cache: Path,
) -> Relearning | None:
    """Forgotten, recovered and remaining loss by set; None without retained sets.

    `trained`: folder of the published model. `scores`: of the start model and the trained one, on all sets.
    """
    sources = _relearning_sources(plan)
    if not sources or plan.model.start.scratch_recipe is not None:
        return None
    rate = max(rate for _, rate in sample_schedule(plan.schedule, plan.steps))
    copies: list[_CopyScores] = []
    for model, base in ((plan.start_model_name, plan.stage.base), (str(trained), None)):
        raw = _relearning_stage(plan, model, base, sources, rate)
        copies.append(_train_copy(make_plan(parse_stage(raw, "relearning"), plan.root, cache), plan, execution, world))
    start, copy = copies
    sets: dict[str, SetRelearning] = {}
    for name in start.scores:
        if name in copy.scores:
            pair = (start.digests[name], start.scores[name]), (copy.digests[name], copy.scores[name])
            if comparison := _compare_copies(plan, name, scores, *pair):
                sets[name] = comparison
    steps = plan.stage.evaluation.relearning_steps
    return Relearning(steps=steps, learning_rate=rate, tokens=copy.tokens, sets=sets) if sets else None


def relearning_notes(plan: Plan) -> list[str]:
    """Sets without a relearning test, and why."""
    if not plan.stage.evaluation.relearning_steps:
        return []
    if plan.model.start.scratch_recipe is not None:
        return ["no relearning test: the start model is new and has nothing to forget"]
    sources = {source["name"] for source in _relearning_sources(plan)}
    retained = [held_out for held_out in plan.evaluation.sets if held_out.role == "retained"]
    if not retained:
        return ["no relearning test: there is no retained set (evaluation.relearning_steps)"]
    return [
        f"{held_out.name}: no relearning test: {len(held_out)} documents are too few to train on one half and score the "
        f"other (at least {_MIN_DOCUMENTS})"
        for held_out in retained
        if held_out.name not in sources
    ]


def relearning_lines(result: Relearning) -> list[str]:
    """A line for each set."""
    return [f"{name}: {_relearning_line(entry, result.steps)}" for name, entry in result.sets.items()]


def _relearning_line(entry: SetRelearning, steps: int) -> str:
    forgotten, recovered, remaining, share = entry.forgotten, entry.recovered, entry.remaining, entry.recovered_share
    if share is None:
        return f"no significant forgetting ({forgotten.value:+.3f} nats/token)"
    return (
        f"{recovered.value:+.3f} of {forgotten.value:+.3f} nats/token forgotten recovered in {steps} steps on old text "
        f"({share.value:.0%}, {share.low:.0%} to {share.high:.0%}), {remaining.value:+.3f} remain "
        f"({remaining.low:+.3f} to {remaining.high:+.3f})"
    )


# --- fine-tuning ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _CopyScores:
    """Scores of a fine-tuned copy by set, and the content hashes of the scored documents."""

    scores: dict[str, Scores]
    digests: dict[str, np.ndarray]
    tokens: int


def _train_copy(short_plan: Plan, plan: Plan, execution: Execution, world: World) -> _CopyScores:
    """Fine-tune the model of `short_plan`, and score it on the documents held out from that."""
    tuned_model = make_tuned_model(short_plan, world)
    model = tuned_model.model.pretrained
    if model.config._attn_implementation != execution.attention:
        model.set_attn_implementation(execution.attention)
    execution = dataclasses.replace(execution, compile=False)
    run = build_run(short_plan, tuned_model, execution, world)
    last_step = min(plan.stage.evaluation.relearning_steps, short_plan.steps)
    for _ in train_steps(run, make_loader(short_plan, execution, world), last_step):
        pass
    scores = before_after.score_sets(
        wrap_model(model, short_plan.model.task),
        short_plan.evaluation.sets,
        context=short_plan.model.context_length,
        world=world,
    )
    return _CopyScores(scores, {h.name: h.digests for h in short_plan.evaluation.sets}, run.trained_tokens)


def _relearning_stage(
    plan: Plan, model: str, base: str | None, sources: Sequence[dict[str, Any]], rate: float
) -> dict[str, Any]:
    """The test as a stage of its own: the peak learning rate, the old text only, without teachers and penalties."""
    raw = plan.stage.model_dump(mode="json")
    count, batch = plan.stage.evaluation.relearning_steps, plan.stage.batch.global_batch_size
    kinds: dict[str, dict[str, Any]] = {}
    for objective in raw["objectives"]:
        if objective["kind"] not in _TEACHER_OBJECTIVES:
            kinds.setdefault(objective["kind"], {**objective, "on": [], "weight": 1.0})
    return {
        **{key: raw[key] for key in ("name", "seed", "batch", "tuning", "compute")},
        "model": model,
        "base": base,
        "tokens": 2 * count * batch * plan.model.context_length,  # rows may have few labels; the steps are limited
        "data": {
            **{key: raw["data"][key] for key in ("sequence_length", "max_document_tokens", "eos", "workers")},
            "on_exhausted": "repeat",
            "overlap": "off",
            "sources": [{**source, "share": 1 / len(sources)} for source in sources],
        },
        "schedule": {"kind": "constant", "peak": rate, "warmup": 0},
        "optimizer": {**raw["optimizer"], "moments": "reset"},
        "objectives": list(kinds.values()),
        "evaluation": {"max_tokens": raw["evaluation"]["max_tokens"]},
    }


def _relearning_sources(plan: Plan) -> list[dict[str, Any]]:
    """The source to train on for each retained set, under its name: half of its file, or the rest of its source."""
    sources = {source.name.replace("/", "-"): source for source in plan.data.sources}
    listed = {item.name: item for role, item in plan.stage.evaluation.held_out_files() if role == "retained"}
    by_source = {source.spec.source: source.spec for source in plan.data.sources}
    out: list[dict[str, Any]] = []
    for held_out in plan.evaluation.sets:
        if held_out.role != "retained":
            continue
        if held_out.name in listed:
            if len(held_out) < _MIN_DOCUMENTS:
                continue
            item = inherit_row_format(listed[held_out.name], "retained", by_source)
            spec = {key: value for key, value in item.items() if key not in ("hub", "same_format_as", "name")}
            out.append({**spec, "name": held_out.name, "role": "replay", "held_out": _HELD_OUT_SHARE})
        else:
            out.append({**_remaining_source(sources[held_out.name], plan), "name": held_out.name, "role": "replay"})
    return out


def _remaining_source(source: ResolvedSource, plan: Plan) -> dict[str, Any]:
    origin = make_source_origin(source, plan.model.start, plan.stage.seed)
    return {**make_replay_source(source.name, origin), "held_out": source.held_out}


# --- results ----------------------------------------------------------------------------------

_DocumentScores = tuple[np.ndarray, Scores]
"""Content hashes of documents, and a model's scores on them."""


def _compare_copies(
    plan: Plan,
    name: str,
    scores: tuple[Mapping[str, Scores], Mapping[str, Scores]],
    start: _DocumentScores,
    copy: _DocumentScores,
) -> SetRelearning | None:
    """Forgotten, recovered and remaining loss, on the documents that all four models were scored on; None without any."""
    digests = next(h.digests for h in plan.evaluation.sets if h.name == name)
    sides = [_scores_by_document(digests, scores[0][name]), _scores_by_document(digests, scores[1][name])]
    sides += [_scores_by_document(*start), _scores_by_document(*copy)]
    common = [key for key in sides[2] if all(key in side for side in sides)]
    # A document truncated at the token limit has another length in a smaller set.
    common = [key for key in common if len({side[key][1] for side in sides}) == 1]
    if not common:
        return None
    tokens = np.array([sides[0][key][1] for key in common], np.float64)
    before, after, start_copy, trained_copy = (np.array([side[key][0] for key in common]) for side in sides)
    forgot, left = after - before, trained_copy - start_copy
    forgotten, share = _estimate(forgot, tokens), None
    if forgotten.low is not None and forgotten.low > 0:
        low, high = percentile_interval(resample_ratio(forgot - left, tokens) / resample_ratio(forgot, tokens))
        share = Interval(value=float((forgot - left).sum() / forgot.sum()), low=low, high=high)
    return SetRelearning(
        documents=len(common),
        tokens=int(tokens.sum()),
        forgotten=forgotten,
        remaining=_estimate(left, tokens),
        recovered=_estimate(forgot - left, tokens),
        start_model_change=_estimate(start_copy - before, tokens),
        recovered_share=share,
    )


def _scores_by_document(digests: np.ndarray, scores: Scores) -> dict[int, tuple[float, int]]:
    """Nats and scored tokens of each document, by content hash; of duplicates those of the first."""
    count = len(digests)
    nats = np.bincount(scores.document_W, scores.nats_W, count).tolist()
    tokens = np.bincount(scores.document_W, scores.tokens_W, count).astype(int).tolist()
    out: dict[int, tuple[float, int]] = {}
    for digest, each, size in zip(digests.tolist(), nats, tokens, strict=True):
        if size:
            out.setdefault(digest, (each, size))
    return out


def _estimate(nats: np.ndarray, tokens: np.ndarray) -> Interval:
    """Nats per token with the 95 % interval over documents."""
    low, high = ratio_interval(nats, tokens)
    return Interval(value=float(nats.sum() / tokens.sum()), low=low, high=high)
