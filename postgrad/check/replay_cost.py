"""Cost of on-policy replay: the time in which the model answers prompts, and how many answers pass the filter."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from postgrad.config.objectives import OnPolicyReplayObjective
from postgrad.data.loading.batch import collate
from postgrad.hardware.execution import Execution
from postgrad.models.model import CausalModel
from postgrad.plan.plan import Plan
from postgrad.run.build import make_sampler
from postgrad.run.tuned_model import TunedModel


@dataclass(frozen=True)
class ReplayCost:
    """The cost of an objective as plain data, and as a line of text."""

    record: dict[str, Any]
    line: str


def check_replay(plan: Plan, subject: TunedModel, execution: Execution) -> list[ReplayCost]:
    """Let the start model answer a batch of prompts for each objective of on-policy replay."""
    specs = {i: o for i, o in enumerate(plan.objectives) if isinstance(o, OnPolicyReplayObjective)}
    return [_replay_cost(plan, subject, execution, number, spec) for number, spec in specs.items()]


def _replay_cost(
    plan: Plan, subject: TunedModel, execution: Execution, number: int, spec: OnPolicyReplayObjective
) -> ReplayCost:
    assert isinstance(subject.model, CausalModel)
    source = next(k for k, numbers in enumerate(plan.data.objective_indices) if number in numbers)
    rows = plan.data.rows[source]
    size = min(len(rows), plan.stage.batch.global_batch_size)
    batch = collate([rows.get_row(i, i) for i in range(size)], [source] * size)
    sampler = make_sampler(plan, subject.model, spec)
    begin = time.perf_counter()
    with torch.no_grad():
        sampled = sampler(replace(batch, position_B=np.arange(size)))
    seconds = time.perf_counter() - begin
    share_of_step = seconds / size * plan.data.row_counts()[source] / max(execution.seconds, 1e-9)
    accepted = float((sampled.label_count_B > 0).mean())
    name = plan.data.sources[source].name
    line = (
        f"on-policy-replay: the model gives {spec.samples} answers to each prompt of {name}, which takes about "
        f"{share_of_step:.0%} of a step; the start model's answers to {accepted:.0%} of {size:,} prompts have a {spec.score} "
        f"of {spec.min_score:g}"
    )
    return ReplayCost({"source": name, "share_of_step": share_of_step, "accepted_share": accepted}, line)
