"""Which micro-batches belong to step i on this rank? The mixture's rows, cut; the loader's whole state is the step."""

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
    """A row of a source, and the position of the mixture at which it is read."""

    source: int
    row: int
    position: int


class MicroBatchPlan(NamedTuple):
    """A micro-batch before its rows are read: what is drawn, the objectives that weigh it, and whether it counts nothing."""

    mixture_rows: Sequence[MixtureRow]
    objectives: tuple[int, ...]
    is_padding: bool = False


class Loader:
    """Micro-batches by step number. The block of the mixture is the global batch; every rank takes an even part of it.

    Rows of different layouts, or weighed by different objectives, never share a micro-batch: a global batch is sorted before
    it is cut. As the loss is a sum that is divided once, this makes no difference to the step. All ranks make equally many
    micro-batches of each sort, for sharded weights are gathered by all ranks together: where a rank has a row less than
    another and so would lack one, it computes a row of which nothing counts.
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
        """`objectives`: those that weigh each source's rows (left out: the first); `pad`: the id that fills short rows.

        `skip`: how many steps' worth of the mixture were read before this stage. `told`: of each source, what teachers said of
        its rows, by the name of the objective.
        """
        if mixture.block_size % (micro_batch_size * world_size):
            raise ValueError(
                f"a global batch of {mixture.block_size} rows does not part into {world_size} ranks of {micro_batch_size}"
            )
        self.sources, self.mixture, self.micro_batch_size = sources, mixture, micro_batch_size
        self.rank, self.world_size = rank, world_size
        self.skip_steps, self.pad_token_id = skip_steps, pad_token_id
        self.teacher_caches = teacher_caches or [{}] * len(sources)
        self.objectives = objectives or [(0,)] * len(sources)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="rows")
        self._prefetched: tuple[int, Future[list[Batch]]] | None = None

    def rows(self, step: int) -> list[tuple[int, int]]:
        """`(source, row)` of the whole global batch of a step (counted from 1), in order, the same on every rank."""
        sources, rows = self.mixture.rows(self.skip_steps + step - 1)
        return list(zip(sources.tolist(), rows.tolist(), strict=True))

    def micro_batches(self, step: int) -> list[MicroBatchPlan]:
        """What this rank's micro-batches of a step are made of."""
        first = (self.skip_steps + step - 1) * self.mixture.block_size
        alike: dict[tuple[str, tuple[int, ...]], list[MixtureRow]] = {}
        for i, (source, row) in enumerate(self.rows(step)):
            sort = self.sources[source].layout, self.objectives[source]
            alike.setdefault(sort, []).append(MixtureRow(source, row, first + i))
        return [
            part
            for (_, objectives), draws in sorted(alike.items())
            for part in self._split_mixture_rows(draws, objectives)
        ]

    def _split_mixture_rows(self, mixture_rows: list[MixtureRow], objectives: tuple[int, ...]) -> list[MicroBatchPlan]:
        begin, end = (rank * len(mixture_rows) // self.world_size for rank in (self.rank, self.rank + 1))
        parts = [
            MicroBatchPlan(mixture_rows[i : min(i + self.micro_batch_size, end)], objectives)
            for i in range(begin, end, self.micro_batch_size)
        ]
        most = -(-len(mixture_rows) // self.world_size)
        missing = -(-most // self.micro_batch_size) - len(parts)
        return [*parts, *[MicroBatchPlan(mixture_rows[:1], objectives, is_padding=True)] * missing]

    def read_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step, read now."""
        return [replace(self._read_batch(part), step=step) for part in self.micro_batches(step)]

    def _read_batch(self, plan: MicroBatchPlan) -> Batch:
        rows = [self.sources[draw.source].get_row(draw.row, draw.position) for draw in plan.mixture_rows]
        told = {} if plan.is_padding else self._teacher_targets(plan.mixture_rows, rows)
        rows = [ignore_labels(row) for row in rows] if plan.is_padding else rows
        batch = collate(rows, [draw.source for draw in plan.mixture_rows], plan.objectives, self.pad_token_id)
        told = told or {name: collate_teacher_targets([]) for name in self.teacher_caches[plan.mixture_rows[0].source]}
        return replace(
            batch, teacher_targets=told, position_B=np.array([draw.position for draw in plan.mixture_rows], np.int64)
        )

    def _teacher_targets(self, mixture_rows: Sequence[MixtureRow], rows: Sequence[Row]) -> dict[str, TeacherTargets]:
        """What was said of these rows; their sources are taken on by the same objectives."""
        out: dict[str, TeacherTargets] = {}
        for name in self.teacher_caches[mixture_rows[0].source]:
            words = []
            for draw, row in zip(mixture_rows, rows, strict=True):
                drawn = self.sources[draw.source].is_random
                words.append(self.teacher_caches[draw.source][name].lookup(draw.position if drawn else draw.row, row))
            out[name] = collate_teacher_targets(
                words, has_rest_mass=self.teacher_caches[mixture_rows[0].source][name].has_rest_mass
            )
        return out

    def __call__(self, step: int, *, last: int | None = None) -> list[Batch]:
        """This rank's micro-batches of a step; the next step is read meanwhile (unless `step` is the `last`)."""
        ready = self._prefetched
        batches = ready[1].result() if ready and ready[0] == step else self.read_batches(step)
        self._prefetched = None if step == last else (step + 1, self._executor.submit(self.read_batches, step + 1))
        return batches
