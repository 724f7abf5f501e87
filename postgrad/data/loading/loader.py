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
from postgrad.data.loading.teacher_cache import TeacherCache


class MixtureRow(NamedTuple):
    """A row of a source, and its position in the mixture."""

    source: int
    row: int
    position: int


class MicroBatchPlan(NamedTuple):
    """A micro-batch before its rows are read. Rows of a padding micro-batch have no labels."""

    mixture_rows: Sequence[MixtureRow]
    objectives: tuple[int, ...]
    is_padding: bool = False


class Loader:
    """Micro-batches by step number. A block of the mixture is a global batch; every rank takes an equal part of it.

    Rows of different layouts or objectives never share a micro-batch: a global batch is grouped before it is split. The loss
    is a sum that is divided once, so this does not change the step. All ranks make equally many micro-batches of each group,
    because ranks gather sharded weights together: a rank with fewer rows adds a padding micro-batch without labels.
    """

    def __init__(
        self,
        sources: Sequence[Rows],
        mixture: Mixture,
        *,
        micro_batch_size: int,
        objectives: Sequence[tuple[int, ...]] | None = None,
        pad_token_id: int = 0,
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
        self.skip_steps, self.pad_token_id = skip_steps, pad_token_id
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
            for (_, objectives), mixture_rows in sorted(groups.items())
            for micro_batch in self._split_mixture_rows(mixture_rows, objectives)
        ]

    def _split_mixture_rows(self, mixture_rows: list[MixtureRow], objectives: tuple[int, ...]) -> list[MicroBatchPlan]:
        begin, end = (rank * len(mixture_rows) // self.world_size for rank in (self.rank, self.rank + 1))
        micro_batches = [
            MicroBatchPlan(mixture_rows[i : min(i + self.micro_batch_size, end)], objectives)
            for i in range(begin, end, self.micro_batch_size)
        ]
        max_rows = -(-len(mixture_rows) // self.world_size)
        missing = -(-max_rows // self.micro_batch_size) - len(micro_batches)
        return [*micro_batches, *[MicroBatchPlan(mixture_rows[:1], objectives, is_padding=True)] * missing]

    def read_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step, read synchronously."""
        return [replace(self._read_batch(plan), step=step) for plan in self.micro_batches(step)]

    def _read_batch(self, plan: MicroBatchPlan) -> Batch:
        rows = [self.sources[each.source].get_row(each.row, each.position) for each in plan.mixture_rows]
        targets = {} if plan.is_padding else self._teacher_targets(plan.mixture_rows, rows)
        rows = [ignore_labels(row) for row in rows] if plan.is_padding else rows
        batch = collate(rows, [each.source for each in plan.mixture_rows], plan.objectives, self.pad_token_id)
        if not targets:
            names = self.teacher_caches[plan.mixture_rows[0].source]
            targets = {name: collate_teacher_targets([]) for name in names}
        positions = np.array([each.position for each in plan.mixture_rows], np.int64)
        return replace(batch, teacher_targets=targets, position_B=positions)

    def _teacher_targets(self, mixture_rows: Sequence[MixtureRow], rows: Sequence[Row]) -> dict[str, TeacherTargets]:
        """Cached predictions for these rows, by objective; all rows of a micro-batch have the same objectives."""
        out: dict[str, TeacherTargets] = {}
        for name, first_cache in self.teacher_caches[mixture_rows[0].source].items():
            distributions = []
            for each, row in zip(mixture_rows, rows, strict=True):
                key = each.position if self.sources[each.source].is_random else each.row
                distributions.append(self.teacher_caches[each.source][name].lookup(key, row))
            out[name] = collate_teacher_targets(distributions, has_rest_mass=first_cache.has_rest_mass)
        return out

    def __call__(self, step: int, *, last: int | None = None) -> list[Batch]:
        """This rank's micro-batches of a step; a thread prefetches the next step (unless `step` is the `last`)."""
        prefetched = self._prefetched
        is_ready = prefetched is not None and prefetched[0] == step
        batches = prefetched[1].result() if prefetched and is_ready else self.read_batches(step)
        self._prefetched = None if step == last else (step + 1, self._executor.submit(self.read_batches, step + 1))
        return batches
