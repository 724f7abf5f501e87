"""Phase 3: cached teacher predictions, computed before training for all rows of the stage, in parts, so that it can resume.

The teacher's distribution p (with temperature) at each label is stored sparsely, in one of two ways that `linear_divergence`
takes: ids sampled from p^power with their importance weights, and the entropy of p; or the k most likely ids with their
probabilities, and the mass of the rest.

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
from postgrad.config.renamed_keys import with_fingerprint_names
from postgrad.data.layouts.rows import IGNORED, Row
from postgrad.data.loading.batch import collate
from postgrad.data.loading.teacher_cache import SparseDistribution, TeacherCache, row_digest
from postgrad.data.random_streams import RandomStreams, derive_key
from postgrad.distributed.world import World
from postgrad.hardware.execution import Execution
from postgrad.objectives.chunked_head_loss import compute_logits, compute_products
from postgrad.objectives.teacher import OnlineTeacher
from postgrad.plan.plan import Plan
from postgrad.plan.teachers import get_teacher_identity
from postgrad.run.online_teacher import load_teacher
from postgrad.storage.fingerprint import fingerprint

_LOGITS_AT_ONCE = 1 << 22
_FORMAT = 1


@dataclass(frozen=True)
class CacheJob:
    """A source whose rows a teacher predicts once."""

    objective_number: int
    source_number: int
    teacher_cache: TeacherCache
    spec: DistillObjective


def find_cache_jobs(plan: Plan) -> list[CacheJob]:
    """The sources of all objectives with a cache."""
    out: list[CacheJob] = []
    for number, teacher in plan.teachers.items():
        spec = plan.objectives[number]
        if not isinstance(spec, DistillObjective) or spec.cache == "none":
            continue
        for k, numbers in enumerate(plan.data.objective_indices):
            if number in numbers:
                keys, rows = _row_keys(plan, k), plan.data.rows[k]
                description = {
                    "format": _FORMAT,
                    "teacher": get_teacher_identity(teacher),
                    "asked": with_fingerprint_names(spec.cache.model_dump(), "objectives.cache"),
                    "temperature": spec.temperature,
                    "seed": plan.stage.seed,
                    "rows": _rows_fingerprint(plan, k),
                }
                if (context := plan.data.sources[k].spec.context) is not None:
                    description |= {"context": context.model_dump(), "reads_context": spec.context is not None}
                labels_per_row = rows.ledger.trained / max(len(rows), 1)
                cache = TeacherCache.open_in(plan.cache / "teacher-predictions", description, keys, labels_per_row)
                out.append(CacheJob(number, k, cache, spec))
    return out


def _row_keys(plan: Plan, k: int) -> np.ndarray:
    """Keys of the rows that the stage reads of a source: row numbers, or mixture positions where rows are random."""
    block, first = plan.data.mixture.block_size, plan.stage.data.skip_steps
    keys: list[np.ndarray] = []
    for step in range(first, first + plan.steps):
        sources, rows = plan.data.mixture.rows(step)
        offsets = np.flatnonzero(sources == k)
        keys.append(step * block + offsets if plan.data.rows[k].is_random else rows[offsets])
    return np.unique(np.concatenate(keys))


def _rows_fingerprint(plan: Plan, k: int) -> str:
    """The fingerprint of everything that determines a source's rows."""
    source, rows = plan.data.sources[k], plan.data.rows[k]
    return fingerprint(
        [
            source.store.fingerprint,
            rows.layout,
            len(rows),
            dataclasses.asdict(rows.ledger),
            plan.model.context_length,
            source.spec.objective.model_dump(mode="json"),
            dataclasses.asdict(plan.model.inputs.frame),
            source.held_out,
            plan.stage.data.max_document_tokens,
            # Random rows also depend on their mixture position and the seed.
            [plan.stage.seed, plan.data.mixture.block_size] if rows.is_random else None,
        ]
    )


def caches_by_source(plan: Plan) -> list[dict[str, TeacherCache]]:
    """The caches for the loader: for each source, by objective name."""
    names, out = get_objective_names(plan.objectives), [dict[str, TeacherCache]() for _ in plan.data.sources]
    for job in find_cache_jobs(plan):
        out[job.source_number][names[job.objective_number]] = job.teacher_cache
    return out


def fill_teacher_caches(plan: Plan, execution: Execution, world: World) -> Iterator[str]:
    """Query the teachers for all missing parts; yields a progress message per part."""
    teachers: dict[str, OnlineTeacher] = {}
    for job in find_cache_jobs(plan):
        cache, source = job.teacher_cache, plan.data.sources[job.source_number]
        # All ranks query the parts that the first rank misses: the querying is collective.
        missing = world.all_gather(cache.missing_parts())[0]
        assert isinstance(missing, list)
        start = plan.teachers[job.objective_number]
        identity = get_teacher_identity(start)
        for part in missing:
            yield f"querying {start.name} on {source.name}, part {part + 1} of {cache.part_count}"
            if identity not in teachers:
                teachers[identity] = load_teacher(plan, start, job.objective_number, execution, world)
            keys = cache.part_keys(part)
            rows = [_get_row(plan, job.source_number, int(key)) for key in keys]
            predictions = _query_on_all_ranks(plan, job, teachers[identity], rows, keys, execution.micro, world)
            if world.is_main:
                digests = [row_digest(row) for row in rows]
                cache.write_part(part, predictions, digests, vocabulary=plan.model.vocab_size)
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
    """Query a teacher for some batches on each rank, equally many on all: a sharded teacher's forward pass is collective."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].inputs["input_ids"]))
    batches = [order[i : i + micro] for i in range(0, len(order), micro)]
    while len(batches) % world.size:
        batches.append(batches[-1])
    local: dict[int, SparseDistribution] = {}
    for batch in batches[world.rank :: world.size]:
        batch_rows, batch_keys = [rows[i] for i in batch], [int(keys[i]) for i in batch]
        predictions = query_teacher(plan, job, teacher, batch_rows, batch_keys, world.device)
        local.update(zip(batch, predictions, strict=True))
    gathered: dict[int, SparseDistribution] = {}
    for part in world.all_gather(local):
        assert isinstance(part, dict)
        gathered.update(part)
    return [gathered[i] for i in range(len(rows))]


@torch.no_grad()
def query_teacher(
    plan: Plan, job: CacheJob, teacher: OnlineTeacher, rows: Sequence[Row], keys: Sequence[int], device: torch.device
) -> list[SparseDistribution]:
    """A teacher's predictions for some rows."""
    teacher = dataclasses.replace(teacher, reads_contexts=job.spec.context is not None)
    batch = collate(rows, [job.source_number] * len(rows), pad_token_id=plan.model.inputs.pad_id).to(device)
    answer = teacher(batch)
    head = answer.output.head
    assert head is not None, "only language models have cached predictions"
    draws = RandomStreams(derive_key(plan.stage.seed, 0x7E11))
    out: list[SparseDistribution] = []
    for i, (row, key) in enumerate(zip(rows, keys, strict=True)):
        position_N = torch.from_numpy(np.flatnonzero(row.labels != IGNORED)).to(device)
        if answer.positions_BT is not None:
            position_N = answer.positions_BT[i, position_N]
        uniform_NS = None
        if isinstance(job.spec.cache, SampledCache):
            uniform_NS = draws.generator(key, 0).random((len(position_N), job.spec.cache.samples))
        hidden_ND = answer.output.hidden[i][position_N.clamp(min=0)]
        parts: list[SparseDistribution] = []
        size = max(1, _LOGITS_AT_ONCE // len(head.weight_VD))
        for begin in range(0, len(hidden_ND), size):
            chunk_ND = hidden_ND[begin : begin + size]
            product_NV = chunk_ND.new_empty(len(chunk_ND), len(head.weight_VD))
            compute_products(chunk_ND, head, product_NV)
            logits_NV = torch.empty_like(product_NV, dtype=torch.float32)
            compute_logits(product_NV, head, logits_NV)
            logits_NV /= job.spec.temperature
            if uniform_NS is None:
                assert isinstance(job.spec.cache, TopKCache)
                parts.append(top_k_distribution(logits_NV, job.spec.cache.k))
            else:
                assert isinstance(job.spec.cache, SampledCache)
                parts.append(
                    sample_distribution(logits_NV, uniform_NS[begin : begin + size], job.spec.cache.sampling_power)
                )
        out.append(_join_parts(parts, (position_N < 0).cpu().numpy()))
    return out


def _join_parts(parts: Sequence[SparseDistribution], missing_N: np.ndarray) -> SparseDistribution:
    """Join the chunks of a row; a label without a position in the teacher's input gets no ids."""
    if not parts:
        return SparseDistribution(
            np.empty(0, np.int64), np.empty(0, np.uint8), np.empty(0, np.int64), np.empty(0, np.float32)
        )
    joined = SparseDistribution(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    if not missing_N.any():
        return joined
    mask_E = ~np.repeat(missing_N, joined.counts_N)
    counts_N = np.where(missing_N, 0, joined.counts_N)
    return SparseDistribution(joined.ids_E[mask_E], joined.weights_E[mask_E], counts_N, joined.rest_or_entropy_N)


def top_k_distribution(logits_NV: Tensor, k: int) -> SparseDistribution:
    """The k most likely ids with their probabilities, and the mass of all others, summed over them."""
    shares_NV = logits_NV.softmax(-1)
    weights_NK, ids_NK = shares_NV.topk(min(k, shares_NV.shape[1]))
    rest_N = shares_NV.scatter_(1, ids_NK, 0.0).sum(-1)
    counts_N = np.full(len(ids_NK), ids_NK.shape[1], np.int64)
    # fp16 rounds a probability by less than a two-thousandth.
    weights = weights_NK.flatten().to(torch.float16).cpu().numpy()
    return SparseDistribution(ids_NK.flatten().cpu().numpy(), weights, counts_N, rest_N.cpu().numpy())


def sample_distribution(logits_NV: Tensor, uniform_NS: np.ndarray, sampling_power: float) -> SparseDistribution:
    """Ids sampled from softmax(logits)^power by uniform numbers, and the entropy of softmax(logits).

    The weight of an id is its count at power 1; else count / samples * p / q with q ~ p^power, which is unbiased.
    """
    log_p_NV = logits_NV.log_softmax(-1)
    entropy_N = -(log_p_NV.exp() * log_p_NV).sum(-1)
    log_t_NV = log_p_NV if sampling_power == 1.0 else (log_p_NV * sampling_power).log_softmax(-1)
    # Inverse transform sampling; in double precision, as rare ids would vanish in a sum over the vocabulary.
    sums_NV = log_t_NV.double().exp().cumsum(-1)
    target_NS = torch.from_numpy(uniform_NS).to(sums_NV.device) * sums_NV[:, -1:]
    ids_NS = torch.searchsorted(sums_NV, target_NS, right=True).clamp(max=sums_NV.shape[1] - 1).sort(-1).values
    is_first_NS = torch.ones_like(ids_NS, dtype=torch.bool)
    is_first_NS[:, 1:] = ids_NS[:, 1:] != ids_NS[:, :-1]
    first_E = is_first_NS.flatten().nonzero().flatten()
    counts_E = torch.diff(first_E, append=first_E.new_tensor([is_first_NS.numel()]))
    ids_E, counts_N = ids_NS.flatten()[first_E], is_first_NS.sum(-1)
    weights: np.ndarray = counts_E.to(torch.uint8).cpu().numpy()
    if sampling_power != 1.0:
        row_E = torch.repeat_interleave(counts_N)
        ratio_E = (log_p_NV[row_E, ids_E] - log_t_NV[row_E, ids_E]).exp()
        weights = (counts_E / uniform_NS.shape[1] * ratio_E).float().cpu().numpy()
    return SparseDistribution(ids_E.cpu().numpy(), weights, counts_N.cpu().numpy(), entropy_N.cpu().numpy())


@dataclass(frozen=True)
class CacheCost:
    """Cost of a cache: labels, bytes per label, total seconds. `is_filled`: nothing is left to query."""

    labels: int
    bytes_per_label: float
    seconds: float
    is_filled: bool

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)


def estimate_cache_cost(plan: Plan, job: CacheJob, teacher: OnlineTeacher, micro: int) -> CacheCost:
    """Estimate the cost from one batch of the rows."""
    keys = job.teacher_cache.keys[:: max(1, len(job.teacher_cache.keys) // micro)][:micro]
    rows = [_get_row(plan, job.source_number, int(key)) for key in keys]
    begin = time.perf_counter()
    device = next(teacher.model.parameters()).device
    predictions = query_teacher(plan, job, teacher, rows, [int(key) for key in keys], device)
    seconds = time.perf_counter() - begin
    labels = sum(len(p.counts_N) for p in predictions)
    id_bytes = 2 if plan.model.vocab_size <= 1 << 16 else 4
    size = sum(len(p.ids_E) * (id_bytes + p.weights_E.itemsize) + len(p.counts_N) * 3 for p in predictions)
    source_rows = plan.data.rows[job.source_number]
    total = round(source_rows.ledger.trained / max(len(source_rows), 1) * len(job.teacher_cache.keys))
    is_filled = not job.teacher_cache.missing_parts()
    return CacheCost(total, size / max(labels, 1), 0.0 if is_filled else seconds / max(labels, 1) * total, is_filled)
