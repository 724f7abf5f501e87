"""The data a stage reads: tokenised sources, the rows made of them, their order, and the length of the stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from postgrad.config import stage as s
from postgrad.config.mixing import describe_shares
from postgrad.data.layouts.rows import ContextOptions, Rows
from postgrad.data.loading.mixture import Mixture
from postgrad.data.read.row_kinds import RUNNING_TEXT_KINDS
from postgrad.data.tokens.held_out_split import select_documents
from postgrad.errors import DataError, StageError
from postgrad.lineage.record import ConsumedSource, Contamination
from postgrad.models.task import Task
from postgrad.plan.data_order import make_data_order
from postgrad.plan.model_plan import ModelPlan
from postgrad.plan.objective_rows import (
    describe_dropped,
    describe_omitted,
    describe_passed_over,
    describe_skipped,
    make_rows,
)
from postgrad.plan.selection_summary import describe_selection
from postgrad.plan.sources import ResolvedSource
from postgrad.plan.training_overlap import measure_overlaps


@dataclass(frozen=True)
class DataPlan:
    """The sources of a stage, the rows made of them, and the order in which they are read."""

    sources: tuple[ResolvedSource, ...]
    rows: tuple[Rows, ...]
    mixture: Mixture
    target_shares: tuple[float, ...]
    """The share of trained tokens that each source should have."""
    objective_indices: tuple[tuple[int, ...], ...]
    """For each source, the indices of the objectives that train on its rows."""
    skip_steps: int
    """Steps of the mixture that earlier runs have read."""
    steps: int
    tokens: int
    """Trained tokens of the whole stage."""
    seen_sources: dict[str, ConsumedSource]
    """What the start model's lineage has trained on, by fingerprint."""
    overlaps: dict[str, Contamination]
    """13-gram overlap of each held-out file with the training text."""

    @property
    def source_names(self) -> list[str]:
        """Names of the sources, in the order of the mixture."""
        return [source.name for source in self.sources]

    def trained_tokens_per_row(self) -> list[float]:
        """Mean trained tokens in a row of each source."""
        return [r.ledger.trained / len(r) for r in self.rows]

    def row_counts(self, steps: int | None = None) -> tuple[int, ...]:
        """Rows of each source that the first `steps` steps read; by default, all steps."""
        block = self.mixture.block_size
        before = self.mixture.counts(self.skip_steps * block)
        after = self.mixture.counts((self.skip_steps + (self.steps if steps is None else steps)) * block)
        return tuple(b - a for a, b in zip(before, after, strict=True))

    @property
    def seen_clusters(self) -> set[str]:
        """The task clusters that this stage or an earlier one trains on."""
        earlier = (source.origin.get("cluster") for source in self.seen_sources.values())
        return {c for c in (*earlier, *(source.spec.cluster for source in self.sources)) if c is not None}


def plan_data(
    stage: s.Stage,
    root: Path,
    model: ModelPlan,
    sources: Sequence[ResolvedSource],
    excluded: np.ndarray | None,
    seen_sources: dict[str, ConsumedSource],
    cache: Path,
    notes: list[str],
    contexts: Sequence[ContextOptions | None],
) -> DataPlan:
    """The data plan of a stage; documents whose digests are `excluded` are not trained on. `contexts`: of each source.

    Raises `DataError` for a source without trained tokens or without enough of them.
    """
    rows = tuple(
        make_rows(
            source.spec.objective,
            source.store,
            model.inputs,
            held_out=source.held_out,
            excluded=excluded,
            max_document_tokens=stage.data.max_document_tokens,
            problem=model.problem,
            words=source.spec.template.words,
            context=context,
        )
        for source, context in zip(sources, contexts, strict=True)
    )
    for source, source_rows in zip(sources, rows, strict=True):
        _refuse_empty(source, source_rows)
        notes += _source_notes(source, source_rows, excluded)
    _refuse_untrained_vectors(model, sources)
    shares = _resolve_shares(stage, sources, excluded, notes)
    order = make_data_order(stage, sources, rows, shares, notes, model.start)
    return DataPlan(
        sources=tuple(sources),
        rows=rows,
        mixture=order.mixture,
        target_shares=order.target_shares,
        objective_indices=tuple(source.spec.objective_indices for source in sources),
        skip_steps=stage.data.skip_steps,
        steps=order.steps,
        tokens=order.tokens,
        seen_sources=seen_sources,
        overlaps=measure_overlaps(stage, root, sources, cache, notes),
    )


def _refuse_empty(source: ResolvedSource, rows: Rows) -> None:
    ledger = rows.ledger
    if not ledger.trained:
        raise DataError(
            f"'{source.name}' has no tokens to train on: {ledger.read:,} tokens read, "
            f"{ledger.held_out:,} held out, {ledger.dropped:,} dropped",
            where=source.files.where,
            expected="documents of at least two tokens that are not in a held-out set",
        )


def _source_notes(source: ResolvedSource, rows: Rows, excluded: np.ndarray | None) -> list[str]:
    """Notes about dropped tokens and rows, selected documents and generated text."""
    notes = []
    if rows.ledger.dropped:
        unused = select_documents(source.store, held_out=source.held_out, excluded=excluded).dropped
        rest = rows.ledger.dropped - unused
        notes += [f"{unused:,} tokens are dropped (copies of held-out documents, or one-token documents)"] * (
            unused > 0
        )
        notes += [f"{rest:,} tokens are dropped (of rows that are skipped, see the reasons)"] * (rest > 0)
    if source.selection:
        notes.append(describe_selection(source.selection))
    if source.generated_by:
        notes.append(f"synthetic text generated by {source.generated_by}, not that model's training data")
    store = source.store
    notes += describe_passed_over(source.files)
    notes += [*describe_skipped(store.skipped), *describe_omitted(store.omitted), *describe_dropped(rows)]
    return [f"{source.name}: {note}" for note in notes]


def _refuse_untrained_vectors(model: ModelPlan, sources: Sequence[ResolvedSource]) -> None:
    """Raise `StageError` for soft prompt vectors that get no gradient: a decoder predicts nothing after a document."""
    running = all(source.store.kind in RUNNING_TEXT_KINDS for source in sources)
    if model.inputs.tuning_frame.suffix_ids and model.task == Task.CAUSAL and running:
        raise StageError(
            "vectors after running text get no gradient: a decoder predicts no token after them",
            where="tuning.template",
            expected="vectors before {x}, or rows with answers",
        )


def _resolve_shares(
    stage: s.Stage, sources: Sequence[ResolvedSource], excluded: np.ndarray | None, notes: list[str]
) -> tuple[float, ...]:
    """The share of each source; `data.mixing` divides the rest by the number of trainable documents."""
    if stage.data.mixing is None:
        return stage.resolve_shares()
    examples = {source.name: 0 for source in stage.data.sources}
    for source in sources:
        examples[source.spec.source] += len(
            select_documents(source.store, held_out=source.held_out, excluded=excluded).documents
        )
    shares = stage.resolve_shares(examples)
    mixed = [source.name for source in stage.data.sources if source.share is None]
    notes.append(describe_shares(stage.data.mixing, dict(zip(examples, shares, strict=True)), examples, mixed))
    return shares
