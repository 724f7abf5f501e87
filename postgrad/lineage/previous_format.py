"""Conversion of a run's files from format 1 (record.json, plan.json and metrics.jsonl) to format 2.

Each table pairs the path of an old key with its new name; `*` is every item of a list or value of a mapping. The keys of a
recorded stage and of the origin of a source are those of a stage file, which `config.renamed_keys` converts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

PREVIOUS_FORMAT = 1

Renames = Sequence[tuple[str, str]]

_PLAN: Renames = (
    ("plan.sources.*.asked", "requested_share"),
    ("plan.sources.*.trained", "trained_tokens"),
    ("plan.sources.*.available", "available_tokens"),
    ("plan.sources.*.made_by", "generated_by"),
    ("plan.sources.*.selected", "selection"),
    ("plan.sources.*.selected.*.how", "description"),
    ("plan.sources.*.selected.*.edges", "score_bounds"),
    ("plan.sources.*.selected.*.unjudged", "unscored"),
    ("plan.sources.*.selected.*.values", "score_histogram"),
    ("plan.sources.*.selected.*.values.edges", "bin_edges"),
    ("plan.sources.*.selected.*.dropped.*.like", "duplicate_of"),
    ("plan.sources.*.selected.*.kept.*.like", "duplicate_of"),
)
_CHANGES: Renames = (
    ("changes.*.relative", "relative_difference"),
    ("changes.*.count", "unit_count"),
)
_METRICS = tuple(
    (f"{scores}.{side}.*.metrics.*.{old}", new)
    for scores in ("scores", "pseudo_perplexity.scores")
    for side in ("before", "after")
    for old, new in (("seeds", "values_by_seed"), ("spread", "std"))
)
RECORD_KEYS: Renames = (
    ("root", "stage_folder"),
    ("model.start", "start_model"),
    ("model.vocabulary", "vocab_size"),
    ("model.context", "context_length"),
    ("model.fresh", "new_model"),
    ("model.fresh.asked", "requested"),
    ("model.fresh.vocabulary", "vocab_size"),
    ("parents.*.tokens", "trained_tokens"),
    ("ledger", "token_ledger"),
    ("overlap", "contamination"),
    ("overlap.*.any", "any_overlap"),
    ("overlap.*.half", "half_overlap"),
    ("achieved", "totals"),
    ("achieved.sources.*.trained", "trained_tokens"),
    ("achieved.sources.*.loss.first", "first_tenth"),
    ("achieved.sources.*.loss.last", "last_tenth"),
    ("achieved.sources.*.loss.per_million", "change_per_million_tokens"),
    ("achieved.sources.*.loss.share", "share_of_loss"),
    ("chosen", "published_checkpoint"),
    ("chosen.by", "metric"),
    ("chosen.gain", "min_delta"),
    ("chosen.enough", "stop_at"),
    ("chosen.first", "first_step"),
    ("chosen.trained", "trained_tokens"),
    ("chosen.rise", "relative_high"),
    ("chosen.last", "last_step"),
    ("chosen.looks", "evaluations"),
    ("chosen.since", "evaluations_since_best"),
    ("chosen.stopped", "stopped_early"),
    ("chosen.within", "within_max_forgetting"),
    ("seen", "consumed"),
    *_CHANGES,
    *((f"pseudo_perplexity.{old}", new) for old, new in _CHANGES),
    *_METRICS,
    ("gate", "retention_gate"),
    ("gate.level", "loss_rise_limit"),
    ("gate.worst.rise", "relative_difference"),
    ("gate.worst.high", "relative_high"),
    ("drift.weights", "relative_weight_change"),
    ("drift.changed", "changed_weights"),
    ("drift.changed.numbers", "count"),
    ("drift.changed.of", "total"),
    ("drift.sets.*.divergence", "kl_divergence"),
    ("drift.sets.*.right_before", "accuracy_before"),
    ("drift.sets.*.lost", "correct_to_wrong"),
    ("drift.sets.*.won", "wrong_to_correct"),
    ("drift.sets.*.outputs", "relative_output_change"),
    ("drift.sets.*.cosines", "output_cosines"),
    ("realign", "relearning"),
    ("realign.rate", "learning_rate"),
    ("realign.sets.*.forgot", "forgotten"),
    ("realign.sets.*.left", "remaining"),
    ("realign.sets.*.won", "recovered"),
    ("realign.sets.*.start_learnt", "start_model_change"),
    ("realign.sets.*.share", "recovered_share"),
    ("update", "sparse_update"),
    ("update.moved", "updated_weights"),
    ("update.of", "total_weights"),
    ("update.whole", "always_updated_weights"),
    ("penalties.*.left_out", "skipped"),
    ("penalties.*.importance.per", "unit"),
    ("penalties.*.bytes.mapped", "mmap"),
    ("tasks.*.cluster", "task_cluster"),
    ("tasks.*.answered", "scoring"),
    ("tasks.*.shortened", "truncated_prompts"),
    *(
        (f"tasks.*.{side}.*.{old}", new)
        for side in ("before", "after")
        for old, new in (("seeds", "values_by_seed"), ("spread", "std"))
    ),
    ("clusters", "task_clusters"),
    ("clusters.*.cluster", "task_cluster"),
    ("clusters.*.seen", "trained_on"),
    *_PLAN,
)
PLAN_KEYS: Renames = (
    ("start", "start_model"),
    ("seen_before", "consumed_before"),
    ("leaves", "resolved_sources"),
    ("leaves.*.stands_for", "prior_tokens"),
    ("strengths", "penalty_strengths"),
    ("strengths.*.push", "gradient_norm"),
    ("strengths.*.pull", "unit_penalty_norm"),
    ("strengths.*.spread", "distance_scale"),
    *_PLAN,
)
ROW_KEYS: Renames = (
    ("trained", "trained_tokens"),
    ("rate", "learning_rate"),
    ("losses", "losses_by_objective"),
    ("by_source", "loss_sums_by_source"),
    ("push", "loss_grad_norm"),
    ("moved", "updated_weights"),
    ("choice", "checkpoint_selection"),
    ("choice.by", "metric"),
    ("choice.rise", "relative_high"),
    ("choice.best", "best_step"),
)

_SCORING = {"choose": "multiple-choice", "write": "generate"}


def upgrade_record(raw: dict[str, Any]) -> dict[str, Any]:
    """A record of format 1 in the keys of format 2."""
    record = rename_keys(raw, RECORD_KEYS)
    for task in record.get("tasks") or ():
        task["scoring"] = _SCORING.get(task.get("scoring"), task.get("scoring"))
    # Format 1 wrote null where an optional list or mapping was not measured.
    return {key: value for key, value in record.items() if value is not None}


def upgrade_plan(raw: dict[str, Any]) -> dict[str, Any]:
    """A plan.json of format 1 in the keys of format 2."""
    return rename_keys(raw, PLAN_KEYS)


def upgrade_row(raw: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl of format 1 in the keys of format 2; a line of format 2 stays as it is."""
    return rename_keys(raw, ROW_KEYS) if "trained" in raw else raw


def rename_keys(raw: dict[str, Any], renames: Renames) -> dict[str, Any]:
    """A copy with renamed keys: the deepest first, so that every path is in old names."""
    data = copy.deepcopy(raw)
    for path, new in sorted(renames, key=lambda pair: -pair[0].count(".")):
        *parents, old = path.split(".")
        for parent in _values_at(data, parents):
            if isinstance(parent, dict) and old in parent:
                parent[new] = parent.pop(old)
    return data


def _values_at(data: Any, path: Sequence[str]) -> list[Any]:
    """Everything that a path leads to."""
    found = [data]
    for key in path:
        if key == "*":
            found = [
                value
                for item in found
                for value in (item if isinstance(item, list) else item.values() if isinstance(item, dict) else ())
            ]
        else:
            found = [item[key] for item in found if isinstance(item, dict) and key in item]
    return found
