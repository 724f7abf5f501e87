"""The loader: this rank's micro-batches of a step, computed from the mixture; its whole state is the step number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from postgrad.data.layouts.rows import Row, Rows, ignore_labels
from postgrad.data.loading.batch import Batch, TeacherTargets, collate, collate_teacher_targets
from postgrad.data.loading.mixture import Mixture
from postgrad.data.loading.teacher_cache import SparseDistribution, TeacherCache
from postgrad.data.loading.unpacked_rows import (
    PACKED_LAYOUTS,
    Document,
    drop_positions,
    group_by_length,
    padded_length,
    split_documents,
)

_MAX_STEPS_MEASURED = 64


class MixtureRow(NamedTuple):
    """A row of a source, and its position in the mixture; `document`: of an unpacked row only this document."""

    source: int
    row: int
    position: int
    document: Document | None = None

    @property
    def first_label(self) -> int:
        """Labels of the row before this document."""
        return self.document.first_label if self.document else 0


class MicroBatchPlan(NamedTuple):
    """A micro-batch before its rows are read. Rows of a padding micro-batch have no labels.

    `length`: positions to which rows are padded. Default: those of the longest.
    """

    mixture_rows: Sequence[MixtureRow]
    objectives: tuple[int, ...]
    is_padding: bool = False
    length: int | None = None


class Loader:
    """Micro-batches by step number. A block of the mixture is a global batch; every rank takes an equal part of it.

    Rows of different layouts or objectives never share a micro-batch: a global batch is grouped before it is split. The loss
    is a sum that is divided once, so this does not change the step. All ranks make equally many micro-batches of each group,
    because ranks gather sharded weights together: a rank with fewer rows adds a padding micro-batch without labels.

    Unless rows are `packed`, the documents of a rank's packed rows are rows of their own, sorted by length; a micro-batch has
    as many of them as fill `micro_batch_size` packed rows.
    """

    def __init__(
        self,
        sources: Sequence[Rows],
        mixture: Mixture,
        *,
        micro_batch_size: int,
        objectives: Sequence[tuple[int, ...]] | None = None,
        pad_token_id: int = 0,
        packed: bool = True,
        rank: int = 0,
        world_size: int = 1,
        skip_steps: int = 0,
        teacher_caches: Sequence[Mapping[str, TeacherCache]] = (),
    ) -> None:
        """`objectives`: indices of those that apply to each source's rows (default: the first).

        `skip_steps`: steps of the mixture that precede this stage. `teacher_caches`: of each source, by name of the objective.
        """
        if mixture.block_size % (micro_batch_size * world_size):
            raise ValueError(
                f"a global batch of {mixture.block_size} rows does not divide into {world_size} ranks of {micro_batch_size}"
            )
        self.sources, self.mixture, self.micro_batch_size = sources, mixture, micro_batch_size
        self.rank, self.world_size = rank, world_size
        self.skip_steps, self.pad_token_id, self.packed = skip_steps, pad_token_id, packed
        self.teacher_caches = teacher_caches or [{}] * len(sources)
        self.objectives = objectives or [(0,)] * len(sources)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="rows")
        self._prefetched: tuple[int, Future[list[Batch]]] | None = None

    def rows(self, step: int) -> list[tuple[int, int]]:
        """`(source, row)` of the global batch of a step (counted from 1), in order, the same on every rank."""
        sources, rows = self.mixture.rows(self.skip_steps + step - 1)
        return list(zip(sources.tolist(), rows.tolist(), strict=True))

    def first_position(self, step: int) -> int:
        """Mixture position of the first row of a step."""
        return (self.skip_steps + step - 1) * self.mixture.block_size

    def micro_batches(self, step: int) -> list[MicroBatchPlan]:
        """This rank's micro-batches of a step, before they are read."""
        first = self.first_position(step)
        groups: dict[tuple[str, tuple[int, ...]], list[MixtureRow]] = {}
        for i, (source, row) in enumerate(self.rows(step)):
            key = self.sources[source].layout, self.objectives[source]
            groups.setdefault(key, []).append(MixtureRow(source, row, first + i))
        return [
            micro_batch
            for (layout, objectives), mixture_rows in sorted(groups.items())
            for micro_batch in (
                self._split_mixture_rows(mixture_rows, objectives)
                if self.packed or layout not in PACKED_LAYOUTS
                else self._split_into_documents(mixture_rows, objectives)
            )
        ]

    def _rank_bounds(self, count: int, rank: int) -> tuple[int, int]:
        """The rows of a rank among `count`."""
        return rank * count // self.world_size, (rank + 1) * count // self.world_size

    def _split_mixture_rows(self, mixture_rows: list[MixtureRow], objectives: tuple[int, ...]) -> list[MicroBatchPlan]:
        begin, end = self._rank_bounds(len(mixture_rows), self.rank)
        micro_batches = [
            MicroBatchPlan(mixture_rows[i : min(i + self.micro_batch_size, end)], objectives)
            for i in range(begin, end, self.micro_batch_size)
        ]
        max_rows = -(-len(mixture_rows) // self.world_size)
        missing = -(-max_rows // self.micro_batch_size) - len(micro_batches)
        return [*micro_batches, *[MicroBatchPlan(mixture_rows[:1], objectives, is_padding=True)] * missing]

    def _split_into_documents(
        self, mixture_rows: list[MixtureRow], objectives: tuple[int, ...]
    ) -> list[MicroBatchPlan]:
        """The documents of this rank's rows in micro-batches, as many as every other rank has."""
        by_rank: list[list[MicroBatchPlan]] = []
        for rank in range(self.world_size):
            begin, end = self._rank_bounds(len(mixture_rows), rank)
            by_rank.append(self._group_documents(mixture_rows[begin:end], objectives))
        own = by_rank[self.rank]
        missing = max(map(len, by_rank)) - len(own)
        if missing:
            shortest = next(plans[0] for plans in by_rank if plans)
            filler = MicroBatchPlan(shortest.mixture_rows[:1], objectives, is_padding=True, length=shortest.length)
            own = [*own, *[filler] * missing]
        return own

    def _group_documents(self, mixture_rows: list[MixtureRow], objectives: tuple[int, ...]) -> list[MicroBatchPlan]:
        rows = [self._read_row(each) for each in mixture_rows]
        row_length = max((len(row.labels) for row in rows), default=0)
        documents = [
            each._replace(document=document)
            for each, row in zip(mixture_rows, rows, strict=True)
            for document in split_documents(row)
        ]
        lengths = [len(self._read_row(each).labels) for each in documents]
        return [
            MicroBatchPlan(
                [documents[i] for i in group], objectives, length=padded_length(lengths[group[-1]], row_length)
            )
            for group in group_by_length(lengths, row_length, self.micro_batch_size * row_length)
        ]

    def _read_row(self, each: MixtureRow) -> Row:
        """A row of a source, or a document of it."""
        if each.document is not None:
            return each.document.row
        return self.sources[each.source].get_row(each.row, each.position)

    def measure_padding(self, steps: int) -> float:
        """The share of padding among the positions of unpacked rows, on up to 64 of the first `steps` steps; 0 if packed."""
        if self.packed:
            return 0.0
        sample = range(1, steps + 1, max(1, steps // _MAX_STEPS_MEASURED))
        plans = [plan for step in sample for plan in self.micro_batches(step) if plan.length and not plan.is_padding]
        positions = sum(len(plan.mixture_rows) * (plan.length or 0) for plan in plans)
        filled = sum(len(self._read_row(each).labels) for plan in plans for each in plan.mixture_rows)
        return 1 - filled / positions if positions else 0.0

    def read_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step, read synchronously."""
        return [replace(self._read_batch(plan), step=step) for plan in self.micro_batches(step)]

    def _read_batch(self, plan: MicroBatchPlan) -> Batch:
        rows = [self._read_row(each) for each in plan.mixture_rows]
        targets = {} if plan.is_padding else self._teacher_targets(plan.mixture_rows, rows)
        rows = [ignore_labels(row) for row in rows] if plan.is_padding else rows
        if not self.packed and plan.length is None:  # rows of one document, whose position ids are the default ones
            rows = [row._replace(inputs=drop_positions(row.inputs)) for row in rows]
        sources = [each.source for each in plan.mixture_rows]
        batch = collate(rows, sources, plan.objectives, self.pad_token_id, length=plan.length)
        if not targets:
            names = self.teacher_caches[plan.mixture_rows[0].source]
            targets = {name: collate_teacher_targets([]) for name in names}
        positions = np.array([each.position for each in plan.mixture_rows], np.int64)
        padding = batch.labels.numel() - sum(len(row.labels) for row in rows) if plan.length else None
        return replace(batch, teacher_targets=targets, position_B=positions, padding=padding)

    def _teacher_targets(self, mixture_rows: Sequence[MixtureRow], rows: Sequence[Row]) -> dict[str, TeacherTargets]:
        """Cached predictions for these rows, by objective; all rows of a micro-batch have the same objectives."""
        out: dict[str, TeacherTargets] = {}
        for name, first_cache in self.teacher_caches[mixture_rows[0].source].items():
            distributions = []
            for each, row in zip(mixture_rows, rows, strict=True):
                key = each.position if self.sources[each.source].is_random else each.row
                whole = row if each.document is None else self._read_row(each._replace(document=None))
                distribution = self.teacher_caches[each.source][name].lookup(key, whole)
                distributions.append(_select_labels(distribution, each.document))
            out[name] = collate_teacher_targets(distributions, has_rest_mass=first_cache.has_rest_mass)
        return out

    def __call__(self, step: int, *, last: int | None = None) -> list[Batch]:
        """This rank's micro-batches of a step; a thread prefetches the next step (unless `step` is the `last`)."""
        prefetched = self._prefetched
        is_ready = prefetched is not None and prefetched[0] == step
        batches = prefetched[1].result() if prefetched and is_ready else self.read_batches(step)
        self._prefetched = None if step == last else (step + 1, self._executor.submit(self.read_batches, step + 1))
        return batches


def _select_labels(distribution: SparseDistribution, document: Document | None) -> SparseDistribution:
    """The predictions for the labels of a document among those of its packed row."""
    if document is None:
        return distribution
    first, last = document.first_label, document.first_label + document.row.label_count
    ends_N = np.concatenate(([0], np.cumsum(distribution.counts_N)))
    ids = slice(ends_N[first], ends_N[last])
    return SparseDistribution(
        distribution.ids_E[ids],
        distribution.weights_E[ids],
        distribution.counts_N[first:last],
        distribution.rest_or_entropy_N[first:last],
    )
