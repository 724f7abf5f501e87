"""How is a teacher asked once, beforehand, about all rows that a stage will read? Part by part, so that it can be stopped.

What is kept of its distribution p (softened by the temperature) at each label is one of two, as `linear_divergence` takes it:
ids drawn from p^temper with their counts, weighted back, and the entropy of p; or the k likeliest ids and the mass of the rest.

Legend: N labels, V vocabulary, S draws, K ids kept.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from postgrad.config.objectives import DistillObjective, SampledCache, TopKCache, get_objective_names
from postgrad.data.layouts.rows import IGNORED, Row
from postgrad.data.loading.batch import collate
from postgrad.data.loading.teacher_cache import SparseDistribution, TeacherCache, row_digest
from postgrad.data.random_streams import RandomStreams, derive_key
from postgrad.distributed.world import World
from postgrad.hardware.execution import Execution
from postgrad.objectives.linear_loss import compute_logits, compute_products
from postgrad.objectives.teacher import OnlineTeacher
from postgrad.plan.plan import Plan
from postgrad.plan.teachers import get_teacher_identity
from postgrad.run.online_teacher import load_teacher
from postgrad.storage.fingerprint import fingerprint

_LOGITS_AT_ONCE = 1 << 22
_FORMAT = 1


@dataclass(frozen=True)
class CacheJob:
    """One source about whose rows a teacher is asked once."""

    objective_number: int
    """Of the objective."""
    source_number: int
    teacher_cache: TeacherCache
    spec: DistillObjective

    def row_key(self, row: int, position: int, is_random: bool) -> int:
        """By what a row is found: its number, or the position that decides what is drawn in it."""
        return position if is_random else row


def find_cache_jobs(plan: Plan) -> list[CacheJob]:
    """Every source of every objective with a cache."""
    out: list[CacheJob] = []
    for number, teacher in plan.teachers.items():
        spec = plan.objectives[number]
        if not isinstance(spec, DistillObjective) or spec.cache == "none":
            continue
        for k, weighed in enumerate(plan.objective_indices):
            if number in weighed:
                keys, rows = _row_keys(plan, k), plan.data.rows[k]
                description = {
                    "format": _FORMAT,
                    "teacher": get_teacher_identity(teacher),
                    "asked": spec.cache.model_dump(),
                    "temperature": spec.temperature,
                    "seed": plan.stage.seed,
                    "rows": _rows_fingerprint(plan, k),
                }
                told = TeacherCache.open_in(
                    plan.cache / "told", description, keys, rows.ledger.trained / max(len(rows), 1)
                )
                out.append(CacheJob(number, k, told, spec))
    return out


def _row_keys(plan: Plan, k: int) -> np.ndarray:
    """The rows of a source that the stage will read, each once: by number, or by position where something is drawn in them."""
    block, first = plan.data.mixture.block_size, plan.stage.data.skip_steps
    found: list[np.ndarray] = []
    for step in range(first, first + plan.steps):
        sources, rows = plan.data.mixture.rows(step)
        mine = np.flatnonzero(sources == k)
        found.append(step * block + mine if plan.data.rows[k].is_random else rows[mine])
    return np.unique(np.concatenate(found))


def _rows_fingerprint(plan: Plan, k: int) -> str:
    """Of all that decides a source's rows."""
    leaf, rows = plan.data.sources[k], plan.data.rows[k]
    return fingerprint(
        [
            leaf.store.fingerprint,
            rows.layout,
            len(rows),
            dataclasses.asdict(rows.ledger),
            plan.model.context_length,
            leaf.spec.objective.model_dump(mode="json"),
            dataclasses.asdict(plan.model.inputs.frame),
            leaf.held_out,
            plan.stage.data.max_document_tokens,
            # What is drawn in a row depends on its number, its position and the seed.
            [plan.stage.seed, plan.data.mixture.block_size] if rows.is_random else None,
        ]
    )


def caches_by_source(plan: Plan) -> list[dict[str, TeacherCache]]:
    """What the loader looks up: for each source, by the name of the objective."""
    names, out = get_objective_names(plan.objectives), [dict[str, TeacherCache]() for _ in plan.data.sources]
    for asked in find_cache_jobs(plan):
        out[asked.source_number][names[asked.objective_number]] = asked.teacher_cache
    return out


def fill_teacher_caches(plan: Plan, execution: Execution, world: World) -> Iterator[str]:
    """Ask the teachers about all rows that are not told of yet; yields what it is at. What is there already is kept."""
    teachers: dict[str, OnlineTeacher] = {}
    for asked in find_cache_jobs(plan):
        missing = world.all_gather(asked.teacher_cache.missing_parts())[0]
        assert isinstance(missing, list)
        start = plan.teachers[asked.objective_number]
        for part in missing:
            yield f"asking {start.name} about {plan.data.sources[asked.source_number].name}, part {part + 1} of {asked.teacher_cache.part_count}"
            if get_teacher_identity(start) not in teachers:
                teachers[get_teacher_identity(start)] = load_teacher(
                    plan, start, asked.objective_number, execution, world
                )
            teacher = teachers[get_teacher_identity(start)]
            keys = asked.teacher_cache.part_keys(part)
            rows = [_get_row(plan, asked.source_number, int(key)) for key in keys]
            words = _query_on_all_ranks(plan, asked, teacher, rows, keys, execution.micro, world)
            if world.is_main:
                asked.teacher_cache.write_part(
                    part, words, [row_digest(row) for row in rows], vocabulary=plan.model.vocab_size
                )
            world.barrier()


def _get_row(plan: Plan, k: int, key: int) -> Row:
    """A row by its key."""
    rows = plan.data.rows[k]
    if rows.is_random:
        return rows.get_row(plan.data.mixture.locate(key)[1], key)
    return rows.get_row(key, 0)


def _query_on_all_ranks(
    plan: Plan, job: CacheJob, teacher: OnlineTeacher, rows: Sequence[Row], keys: np.ndarray, micro: int, world: World
) -> list[SparseDistribution]:
    """Every rank asks about some batches, all equally many, for a sharded teacher is gathered by all ranks together."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].inputs["input_ids"]))
    batches = [order[i : i + micro] for i in range(0, len(order), micro)]
    while len(batches) % world.size:
        batches.append(batches[-1])
    mine: dict[int, SparseDistribution] = {}
    for batch in batches[world.rank :: world.size]:
        words = query_teacher(plan, job, teacher, [rows[i] for i in batch], [int(keys[i]) for i in batch], world.device)
        mine.update(zip(batch, words, strict=True))
    told: dict[int, SparseDistribution] = {}
    for theirs in world.all_gather(mine):
        assert isinstance(theirs, dict)
        told.update(theirs)
    return [told[i] for i in range(len(rows))]


@torch.no_grad()
def query_teacher(
    plan: Plan, job: CacheJob, teacher: OnlineTeacher, rows: Sequence[Row], keys: Sequence[int], device: torch.device
) -> list[SparseDistribution]:
    """What a teacher says of some rows."""
    batch = collate(rows, [job.source_number] * len(rows), pad_token_id=plan.model.inputs.pad_id).to(device)
    answer = teacher(batch)
    head = answer.output.head
    assert head is not None, "only a language model is asked beforehand"
    draws = RandomStreams(derive_key(plan.stage.seed, 0x7E11))
    out: list[SparseDistribution] = []
    for i, (row, key) in enumerate(zip(rows, keys, strict=True)):
        place_N = torch.from_numpy(np.flatnonzero(row.labels != IGNORED)).to(device)
        if answer.positions_BT is not None:
            place_N = answer.positions_BT[i, place_N]
        uniform_NS = None
        if isinstance(job.spec.cache, SampledCache):
            uniform_NS = draws.generator(key, 0).random((len(place_N), job.spec.cache.draws))
        hidden_ND = answer.output.hidden[i][place_N.clamp(min=0)]
        said: list[SparseDistribution] = []
        size = max(1, _LOGITS_AT_ONCE // len(head.weight_VD))
        for begin in range(0, len(hidden_ND), size):
            part = hidden_ND[begin : begin + size]
            product_NV = part.new_empty(len(part), len(head.weight_VD))
            compute_products(part, head, product_NV)
            logits_NV = torch.empty_like(product_NV, dtype=torch.float32)
            compute_logits(product_NV, head, logits_NV)
            logits_NV /= job.spec.temperature
            if uniform_NS is None:
                assert isinstance(job.spec.cache, TopKCache)
                said.append(top_k_distribution(logits_NV, job.spec.cache.k))
            else:
                assert isinstance(job.spec.cache, SampledCache)
                said.append(sample_distribution(logits_NV, uniform_NS[begin : begin + size], job.spec.cache.temper))
        out.append(_join_parts(said, (place_N < 0).cpu().numpy()))
    return out


def _join_parts(parts: Sequence[SparseDistribution], missing_N: np.ndarray) -> SparseDistribution:
    """The words of a row as one; a label that the teacher has no place for has no ids."""
    if not parts:
        return SparseDistribution(
            np.empty(0, np.int64), np.empty(0, np.uint8), np.empty(0, np.int64), np.empty(0, np.float32)
        )
    word = SparseDistribution(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    if not missing_N.any():
        return word
    kept_E = ~np.repeat(missing_N, word.counts_N)
    return SparseDistribution(
        word.ids_E[kept_E], word.weights_E[kept_E], np.where(missing_N, 0, word.counts_N), word.rest_or_entropy_N
    )


def top_k_distribution(logits_NV: Tensor, k: int) -> SparseDistribution:
    """The k likeliest ids with their probabilities, and the mass of all others, summed over them."""
    shares_NV = logits_NV.softmax(-1)
    weights_NK, ids_NK = shares_NV.topk(min(k, shares_NV.shape[1]))
    rest_N = shares_NV.scatter_(1, ids_NK, 0.0).sum(-1)
    counts_N = np.full(len(ids_NK), ids_NK.shape[1], np.int64)
    # As halves: what is lost of a probability is less than a two-thousandth of it.
    weights = weights_NK.flatten().to(torch.float16).cpu().numpy()
    return SparseDistribution(ids_NK.flatten().cpu().numpy(), weights, counts_N, rest_N.cpu().numpy())


def sample_distribution(logits_NV: Tensor, uniform_NS: np.ndarray, sampling_power: float) -> SparseDistribution:
    """Ids drawn from softmax(logits)^temper by uniform numbers, and the entropy of softmax(logits).

    A count is kept when ids are drawn as they are; else count / draws times p / p^temper, which is without bias.
    """
    log_p_NV = logits_NV.log_softmax(-1)
    entropy_N = -(log_p_NV.exp() * log_p_NV).sum(-1)
    log_t_NV = log_p_NV if sampling_power == 1.0 else (log_p_NV * sampling_power).log_softmax(-1)
    # In double precision: a sum of many small shares, in which a rare id must not get lost.
    sums_NV = log_t_NV.double().exp().cumsum(-1)
    at_NS = torch.from_numpy(uniform_NS).to(sums_NV.device) * sums_NV[:, -1:]
    ids_NS = torch.searchsorted(sums_NV, at_NS, right=True).clamp(max=sums_NV.shape[1] - 1).sort(-1).values
    new_NS = torch.ones_like(ids_NS, dtype=torch.bool)
    new_NS[:, 1:] = ids_NS[:, 1:] != ids_NS[:, :-1]
    first_E = new_NS.flatten().nonzero().flatten()
    counts_E = torch.diff(first_E, append=first_E.new_tensor([new_NS.numel()]))
    ids_E, counts_N = ids_NS.flatten()[first_E], new_NS.sum(-1)
    weights: np.ndarray = counts_E.to(torch.uint8).cpu().numpy()
    if sampling_power != 1.0:
        row_E = torch.repeat_interleave(counts_N)
        back_E = (log_p_NV[row_E, ids_E] - log_t_NV[row_E, ids_E]).exp()
        weights = (counts_E / uniform_NS.shape[1] * back_E).float().cpu().numpy()
    return SparseDistribution(ids_E.cpu().numpy(), weights, counts_N.cpu().numpy(), entropy_N.cpu().numpy())


@dataclass(frozen=True)
class CacheCost:
    """What asking once costs: labels in all, bytes for each, seconds in all; `there`: it has been done."""

    labels: int
    bytes_per_label: float
    seconds: float
    is_filled: bool

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)


def estimate_cache_cost(plan: Plan, job: CacheJob, teacher: OnlineTeacher, micro: int) -> CacheCost:
    """Estimated from one batch of the rows themselves."""
    keys = job.teacher_cache.keys[:: max(1, len(job.teacher_cache.keys) // micro)][:micro]
    rows = [_get_row(plan, job.source_number, int(key)) for key in keys]
    begin = time.perf_counter()
    device = next(teacher.model.parameters()).device
    words = query_teacher(plan, job, teacher, rows, [int(key) for key in keys], device)
    seconds = time.perf_counter() - begin
    labels = sum(len(word.counts_N) for word in words)
    id_bytes = 2 if plan.model.vocab_size <= 1 << 16 else 4
    size = sum(len(word.ids_E) * (id_bytes + word.weights_E.itemsize) + len(word.counts_N) * 3 for word in words)
    each = plan.data.rows[job.source_number].ledger.trained / max(len(plan.data.rows[job.source_number]), 1)
    total = round(each * len(job.teacher_cache.keys))
    there = not job.teacher_cache.missing_parts()
    return CacheCost(total, size / max(labels, 1), 0.0 if there else seconds / max(labels, 1) * total, there)
