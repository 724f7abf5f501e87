"""Which micro-batches belong to step i on this rank? The mixture's rows, cut; the loader's whole state is the step."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from postgrad.data.batch import Batch, collate
from postgrad.data.mixture import Mixture
from postgrad.data.rows import Rows


class Loader:
    """Micro-batches by step number. The block of the mixture is the global batch; rank r takes its r-th slice.

    Rows of different layouts, or weighed by different objectives, never share a micro-batch: a slice is sorted before it is
    cut. As the loss is a sum that is divided once, this makes no difference to the step.
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
    ) -> None:
        """`objectives`: those that weigh each source's rows (left out: the first); `pad`: the id that fills short rows.

        `skip`: how many steps' worth of the mixture were read before this stage.
        """
        if mixture.block % (micro * ranks):
            raise ValueError(f"a global batch of {mixture.block} rows does not part into {ranks} ranks of {micro}")
        self.sources, self.mixture, self.micro = sources, mixture, micro
        self.skip, self.pad = skip, pad
        self.objectives = objectives or [(0,)] * len(sources)
        share = mixture.block // ranks
        self.begin, self.end = rank * share, (rank + 1) * share
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="rows")
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def rows(self, step: int) -> list[tuple[int, int]]:
        """`(source, row)` of the whole global batch of a step (counted from 1), in order, the same on every rank."""
        sources, rows = self.mixture.rows(self.skip + step - 1)
        return list(zip(sources.tolist(), rows.tolist(), strict=True))

    def read(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step, read now."""
        first = (self.skip + step - 1) * self.mixture.block
        mine = [(k, row, first + i) for i, (k, row) in enumerate(self.rows(step))][self.begin : self.end]
        alike: dict[tuple[str, tuple[int, ...]], list[tuple[int, int, int]]] = {}
        for draw in mine:
            alike.setdefault((self.sources[draw[0]].layout, self.objectives[draw[0]]), []).append(draw)
        return [
            collate([self.sources[k].at(row, at) for k, row, at in part], [k for k, _, _ in part], objectives, self.pad)
            for (_, objectives), draws in sorted(alike.items())
            for part in (draws[i : i + self.micro] for i in range(0, len(draws), self.micro))
        ]

    def __call__(self, step: int, *, last: int | None = None) -> list[Batch]:
        """This rank's micro-batches of a step; the next step is read meanwhile (unless `step` is the `last`)."""
        ready = self._ahead
        batches = ready[1].result() if ready and ready[0] == step else self.read(step)
        self._ahead = None if step == last else (step + 1, self._reader.submit(self.read, step + 1))
        return batches
