"""Which micro-batches belong to step i on this rank? The mixture's rows, cut; the loader's whole state is the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from postgrad.data.layouts.rows import Row, Rows, silenced
from postgrad.data.loading.batch import Batch, Few, collate, few_of
from postgrad.data.loading.mixture import Mixture
from postgrad.data.loading.teacher_cache import Told


class Draw(NamedTuple):
    """A row of a source, and the position of the mixture at which it is read."""

    source: int
    row: int
    position: int


class MicroBatch(NamedTuple):
    """A micro-batch before its rows are read: what is drawn, the objectives that weigh it, and whether it counts nothing."""

    draws: Sequence[Draw]
    objectives: tuple[int, ...]
    silent: bool = False


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
        micro: int,
        objectives: Sequence[tuple[int, ...]] | None = None,
        pad: int = 0,
        rank: int = 0,
        ranks: int = 1,
        skip: int = 0,
        told: Sequence[Mapping[str, Told]] = (),
    ) -> None:
        """`objectives`: those that weigh each source's rows (left out: the first); `pad`: the id that fills short rows.

        `skip`: how many steps' worth of the mixture were read before this stage. `told`: of each source, what teachers said of
        its rows, by the name of the objective.
        """
        if mixture.block % (micro * ranks):
            raise ValueError(f"a global batch of {mixture.block} rows does not part into {ranks} ranks of {micro}")
        self.sources, self.mixture, self.micro = sources, mixture, micro
        self.rank, self.ranks = rank, ranks
        self.skip, self.pad = skip, pad
        self.told = told or [{}] * len(sources)
        self.objectives = objectives or [(0,)] * len(sources)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="rows")
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def rows(self, step: int) -> list[tuple[int, int]]:
        """`(source, row)` of the whole global batch of a step (counted from 1), in order, the same on every rank."""
        sources, rows = self.mixture.rows(self.skip + step - 1)
        return list(zip(sources.tolist(), rows.tolist(), strict=True))

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """What this rank's micro-batches of a step are made of."""
        first = (self.skip + step - 1) * self.mixture.block
        alike: dict[tuple[str, tuple[int, ...]], list[Draw]] = {}
        for i, (source, row) in enumerate(self.rows(step)):
            sort = self.sources[source].layout, self.objectives[source]
            alike.setdefault(sort, []).append(Draw(source, row, first + i))
        return [part for (_, objectives), draws in sorted(alike.items()) for part in self._parts(draws, objectives)]

    def _parts(self, draws: list[Draw], objectives: tuple[int, ...]) -> list[MicroBatch]:
        begin, end = (rank * len(draws) // self.ranks for rank in (self.rank, self.rank + 1))
        parts = [MicroBatch(draws[i : min(i + self.micro, end)], objectives) for i in range(begin, end, self.micro)]
        most = -(-len(draws) // self.ranks)
        missing = -(-most // self.micro) - len(parts)
        return [*parts, *[MicroBatch(draws[:1], objectives, silent=True)] * missing]

    def read(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step, read now."""
        return [replace(self._batch(part), step=step) for part in self.micro_batches(step)]

    def _batch(self, part: MicroBatch) -> Batch:
        rows = [self.sources[draw.source].at(draw.row, draw.position) for draw in part.draws]
        told = {} if part.silent else self._told(part.draws, rows)
        rows = [silenced(row) for row in rows] if part.silent else rows
        batch = collate(rows, [draw.source for draw in part.draws], part.objectives, self.pad)
        told = told or {name: few_of([]) for name in self.told[part.draws[0].source]}
        return replace(batch, told=told, position_B=np.array([draw.position for draw in part.draws], np.int64))

    def _told(self, draws: Sequence[Draw], rows: Sequence[Row]) -> dict[str, Few]:
        """What was said of these rows; their sources are taken on by the same objectives."""
        out: dict[str, Few] = {}
        for name in self.told[draws[0].source]:
            words = []
            for draw, row in zip(draws, rows, strict=True):
                drawn = self.sources[draw.source].drawn
                words.append(self.told[draw.source][name].at(draw.position if drawn else draw.row, row))
            out[name] = few_of(words, rest=self.told[draws[0].source][name].rest_is_said)
        return out

    def __call__(self, step: int, *, last: int | None = None) -> list[Batch]:
        """This rank's micro-batches of a step; the next step is read meanwhile (unless `step` is the `last`)."""
        ready = self._ahead
        batches = ready[1].result() if ready and ready[0] == step else self.read(step)
        self._ahead = None if step == last else (step + 1, self._reader.submit(self.read, step + 1))
        return batches
