"""Laws of unpacked rows: each document is trained as if alone, on the same tokens and in the same order as in packed rows.

Models: recurrent (mamba2), hybrid (falcon_h1), with attention sinks (gpt_oss), without a mask that follows positions (OPT).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from postgrad.data.layouts.packed_examples import PackedExampleRows
from postgrad.data.layouts.packed_text import PackedRows
from postgrad.data.layouts.rows import IGNORED, Row, Rows
from postgrad.data.loading import loader as loading
from postgrad.data.loading import unpacked_rows
from postgrad.data.loading.batch import Batch, collate
from postgrad.data.loading.loader import Loader
from postgrad.data.loading.mixture import Mixture, Segment, row_rates
from postgrad.data.loading.teacher_cache import SparseDistribution, TeacherCache, row_digest
from postgrad.data.loading.unpacked_rows import Document, group_by_length, padded_length, split_documents
from postgrad.distributed.world import World
from postgrad.models.model import CausalModel
from postgrad.models.pretrained import save_pretrained
from postgrad.models.task import Task
from postgrad.objectives.next_token import TokenLoss
from postgrad.objectives.teacher import OnlineTeacher
from postgrad.optim import lr_schedules
from postgrad.optim.optimizer import AdamW, Weights
from postgrad.run.events import RunFinished, StepCompleted
from postgrad.run.run import run_stage
from postgrad.training.step import Run, train_step
from postgrad.tuning.weight_subsets import FullFinetuning
from tests.conftest import VOCABULARY, StageOf, make_tokenizer
from tests.data.memory import InMemoryStore, lay_out
from tests.model_families import make_tiny_model, tiny_config
from tests.run.test_run import events_of, plan_of, trace
from tests.tiny_models import make_unpacked

LENGTH, BLOCK = 32, 8
KEEPING = ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "mixtral"))]
"""Packed by themselves: with soft caps, and with experts."""
FAMILIES = ["mamba2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("falcon_h1", "gpt_oss", "opt"))]


def make_text(count: int = 60, seed: int = 0) -> PackedRows:
    rng = np.random.default_rng(seed)
    documents = [[*rng.integers(2, VOCABULARY, rng.choice([1, 3, 9, 45])).tolist(), 0] for _ in range(count)]
    return lay_out(PackedRows, InMemoryStore(documents), LENGTH)


def make_examples(count: int = 60, seed: int = 1) -> PackedExampleRows:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 9, (count, 2))
    documents = [[*rng.integers(2, VOCABULARY, int(a + b)).tolist(), 0] for a, b in sizes]
    marks = [[0] * int(a) + [1] * (int(b) + 1) for a, b in sizes]
    return lay_out(PackedExampleRows, InMemoryStore(documents, marks), LENGTH)


def make_loader(micro: int = 2, rank: int = 0, ranks: int = 1, *, packed: bool = False, **options: object) -> Loader:
    sources: list[Rows] = [make_text(), make_examples()]
    rates = row_rates((0.6, 0.4), [rows.ledger.trained / len(rows) for rows in sources])
    mixture = Mixture(3, [len(rows) for rows in sources], [Segment(0, rates)], BLOCK)
    return Loader(
        sources,
        mixture,
        micro_batch_size=micro,
        packed=packed,
        rank=rank,
        world_size=ranks,
        **options,  # type: ignore[arg-type]
    )


# --- what is read -----------------------------------------------------------------------------------------------------------


def labelled_tokens(batches: Sequence[Batch]) -> list[tuple[int, int, int, int]]:
    """(mixture position, source, input id, label) of each label, sorted."""
    out = []
    for batch in batches:
        ids_BT = batch.inputs["input_ids"]
        for row, column in (batch.labels != IGNORED).nonzero().tolist():
            out.append(
                (
                    int(batch.position_B[row]),
                    int(batch.source_B[row]),
                    int(ids_BT[row, column]),
                    int(batch.labels[row, column]),
                )
            )
    return sorted(out)


def reads_the_same(micro: int, ranks: int) -> bool:
    """The law: the labels of a step, their inputs, positions and sources are those of packed rows, on any number of ranks."""
    for step in (1, 2, 5):
        packed = make_loader(packed=True).read_batches(step)
        by_rank = [make_loader(micro, rank, ranks).read_batches(step) for rank in range(ranks)]
        unpacked = [batch for batches in by_rank for batch in batches]
        if len({len(batches) for batches in by_rank}) > 1 or labelled_tokens(packed) != labelled_tokens(unpacked):
            return False
        if sum(batch.label_count for batch in unpacked) != sum(batch.label_count for batch in packed):
            return False
    return True


@settings(max_examples=4)
@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4]))
def test_ledger_and_shares_are_those_of_packed_rows(micro: int, ranks: int) -> None:
    assert reads_the_same(min(micro, BLOCK // ranks), ranks)


def _without_last(row: Row) -> list[Document]:
    return split_documents(row)[:-1] or split_documents(row)


def _without_first_label(row: Row) -> list[Document]:
    whole = split_documents(row)
    return [each._replace(row=Row(each.row.inputs, each.row.labels, each.row.label_count - 1)) for each in whole]


@pytest.mark.parametrize("mutant", [_without_last, _without_first_label])
def test_lost_documents_and_labels_are_caught(
    mutant: Callable[[Row], list[Document]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "split_documents", mutant)
    assert not reads_the_same(2, 1)


def test_ranks_of_unequal_documents_make_equally_many_batches() -> None:
    plans = [make_loader(1, rank, 4).micro_batches(step) for rank in range(4) for step in (1, 2, 3)]
    assert any(plan.is_padding for each in plans for plan in each), "no rank has fewer documents: the test has no power"


# --- padding ----------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 128), max_size=60), st.integers(1, 6))
def test_groups_hold_every_document_once_within_the_budget(lengths: list[int], rows: int) -> None:
    groups = group_by_length(lengths, 128, rows * 128)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len(group) * padded_length(max(lengths[i] for i in group), 128) <= rows * 128 for group in groups)
    ordered = [lengths[i] for group in groups for i in group]
    assert ordered == sorted(ordered)


@pytest.mark.parametrize("length", [128, 1024, 5000])
def test_there_are_few_lengths(length: int) -> None:
    lengths = {padded_length(size, length) for size in range(1, length + 1)}
    assert len(lengths) <= 64 and max(lengths) == length
    assert all(padded_length(size, length) >= size for size in range(1, length + 1))


def _padding_share(seed: int, group: Callable[[Sequence[int], int, int], list[list[int]]]) -> float:
    """Padding of log-normal lengths (median 240 tokens) in a global batch of 32 rows of 1,024 tokens, two in a micro-batch."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.lognormal(5.5, 1.0, 75), 1024).astype(int).tolist()
    groups = group(lengths, 1024, 2048)
    positions = sum(len(each) * padded_length(max(lengths[i] for i in each), 1024) for each in groups)
    return 1 - sum(lengths) / positions


def _in_order(lengths: Sequence[int], row_length: int, max_positions: int) -> list[list[int]]:
    """The mutant: documents that are not sorted."""
    count = max_positions // row_length * 3
    return [list(range(i, min(i + count, len(lengths)))) for i in range(0, len(lengths), count)]


def test_batches_are_few_where_their_padding_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of similar lengths share a batch. The mutant: the smallest cost of a batch alone."""
    lengths = [112, 128] * 4
    assert len(group_by_length(lengths, 128, 1024)) == 1
    monkeypatch.setattr(unpacked_rows, "_BATCH_COSTS", unpacked_rows._BATCH_COSTS[-1:])
    assert len(group_by_length(lengths, 128, 1024)) > 1


def test_padding_of_mixed_lengths_is_under_a_tenth() -> None:
    assert max(_padding_share(seed, group_by_length) for seed in range(20)) < 0.1
    assert min(_padding_share(seed, _in_order) for seed in range(20)) > 0.3


# --- what is learned --------------------------------------------------------------------------------------------------------


def row_losses(model: CausalModel, batches: Sequence[Batch]) -> dict[tuple[int, ...], float]:
    """The summed loss of each row by its ids."""
    out: dict[tuple[int, ...], float] = {}
    with torch.no_grad():
        for batch in batches:
            logits_BTV = model(**batch.inputs).logits()
            losses_BT = torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), batch.labels, reduction="none")
            for row, losses_T in enumerate(losses_BT):
                size = int((batch.labels[row] != IGNORED).nonzero().max()) + 1
                out[tuple(batch.inputs["input_ids"][row, :size].tolist())] = float(losses_T.sum())
    return out


def isolated(model: CausalModel, loader: Loader) -> bool:
    """The law: the summed loss of each mixture row is that of its documents alone."""
    alone: dict[int, float] = {}
    found: dict[int, float] = {}
    for i, (source, row) in enumerate(loader.rows(1)):
        rows = [document.row for document in split_documents(loader.sources[source].get_row(row, i))]
        alone[i] = sum(sum(row_losses(model, [collate([each], [0])]).values()) for each in rows)
    loss = TokenLoss()
    with torch.no_grad():
        for batch in loader.read_batches(1):
            _, rows_B = loss(model(**batch.inputs), batch)
            for position, value in zip(batch.position_B.tolist(), rows_B.tolist(), strict=True):
                found[position] = found.get(position, 0.0) + value
    return found == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_document_is_trained_as_if_alone(family: str) -> None:
    model = CausalModel(make_unpacked(family))
    with torch.no_grad():
        for weight in model.parameters():  # so that a short convolution's leak is no rounding
            weight.mul_(4 if weight.ndim > 1 else 1)
    assert isolated(model, make_loader())
    assert not isolated(model, make_loader(packed=True)), "the mutant: rows that stay packed"


def make_run(model: CausalModel) -> Run:
    weights = Weights(model, FullFinetuning(model.pretrained), torch.float32, master_copies=True)
    return Run(
        model=model,
        weights=weights,
        # A large epsilon, so that rounding of a small gradient is not blown up to a whole step.
        optimizer=AdamW(weights, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.1),
        objectives=[TokenLoss()],
        penalties=[],
        schedule=lr_schedules.chain((lr_schedules.constant(1e-3), 10)),
        world=World(torch.device("cpu")),
        sources=["a", "b"],
        max_grad_norm=1e9,
        seed=0,
        trained_tokens_by_source=np.zeros(2, np.int64),
    )


def train(model: CausalModel, loader: Loader, steps: int = 2) -> tuple[list[float], Tensor]:
    run = make_run(model)
    losses = [train_step(run, loader.read_batches(step)).loss for step in range(1, steps + 1)]
    return losses, torch.cat([master.detach().flatten() for master in run.weights.masters])


def equal(one: tuple[list[float], Tensor], two: tuple[list[float], Tensor]) -> bool:
    return one[0] == pytest.approx(two[0], rel=1e-5) and torch.allclose(one[1], two[1], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_micro_batches_do_not_matter(family: str) -> None:
    whole, single = (train(CausalModel(make_unpacked(family)), make_loader(micro)) for micro in (8, 1))
    assert equal(whole, single)
    packed = train(CausalModel(make_unpacked(family)), make_loader(packed=True))
    assert not equal(whole, packed), "the mutant: rows that stay packed"


@pytest.mark.parametrize("family", KEEPING)
def test_a_model_that_keeps_documents_apart_learns_the_same_packed_and_unpacked(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> CausalModel:
        return CausalModel(make_tiny_model(tiny_config(family), Task.CAUSAL))

    assert isolated(make(), make_loader(packed=True)) and isolated(make(), make_loader())
    packed = train(make(), make_loader(packed=True))
    assert all(equal(packed, train(make(), make_loader(micro))) for micro in (2, 1))
    monkeypatch.setattr(loading, "split_documents", _without_last)
    assert not equal(packed, train(make(), make_loader())), "the mutant: a document that is lost"


# --- teachers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_teacher_that_leaks_reads_packed_rows_one_document_at_a_time(family: str, is_sharded: bool) -> None:
    model = CausalModel(make_unpacked(family))
    rows = [make_text().get_row(i, i) for i in range(4)]
    batch = collate(rows, [0] * 4)

    def predicts_alone(teacher: OnlineTeacher) -> bool:
        logits_BTV = teacher(batch).output.logits()
        for row, logits_TV in zip(rows, logits_BTV, strict=True):
            kept_TV = logits_TV[torch.from_numpy(row.labels != IGNORED)]
            alone = [document.row for document in split_documents(row)]
            with torch.no_grad():
                parts = [
                    model(input_ids=torch.from_numpy(each.inputs["input_ids"])[None]).logits()[0] for each in alone
                ]
            wanted = torch.cat(
                [part[torch.from_numpy(each.labels != IGNORED)] for part, each in zip(parts, alone, strict=True)]
            )
            if not torch.allclose(kept_TV, wanted, atol=1e-4):
                return False
        return True

    assert predicts_alone(OnlineTeacher(model, packed=False, is_sharded=is_sharded))
    assert not predicts_alone(OnlineTeacher(model)), "the mutant: a teacher of packed rows"


def _with_first_labels(row: Row) -> list[Document]:
    return [document._replace(first_label=0) for document in split_documents(row)]


def test_cached_predictions_follow_their_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each label's cached id is the label itself."""
    rows = make_text()
    cache = TeacherCache(tmp_path / "a" / "b", {"asked": {"samples": 1}}, np.arange(len(rows)), 10.0)
    for part in range(cache.part_count):
        read = [rows.get_row(int(key), 0) for key in cache.part_keys(part)]
        labels = [row.labels[row.labels != IGNORED] for row in read]
        predictions = [
            SparseDistribution(ids, np.ones(len(ids), np.float16), np.ones(len(ids), np.int64), np.zeros(len(ids)))
            for ids in labels
        ]
        cache.write_part(part, predictions, [row_digest(row) for row in read], vocabulary=VOCABULARY)
    mixture = Mixture(3, [len(rows)], [Segment(0, (1.0,))], BLOCK)
    loader = Loader([rows], mixture, micro_batch_size=2, packed=False, teacher_caches=[{"distill": cache}])

    def follows() -> bool:
        return all(
            batch.teacher_targets["distill"].ids_E.tolist() == batch.labels[batch.labels != IGNORED].tolist()
            for batch in loader.read_batches(1)
        )

    assert follows()
    monkeypatch.setattr(loading, "split_documents", _with_first_labels)
    assert not follows(), "the mutant: the predictions of a row's first document for each"


# --- a stage ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_stopped_and_resumed_equals_never_stopped(family: str, stage_of: StageOf, cache: Path, tmp_path: Path) -> None:
    save_pretrained(make_unpacked(family), make_tokenizer(), tmp_path / "m", dtype=torch.float32)
    changes = {"model": str(tmp_path / "m"), "tokens": 1000, "compute": {"threads": 1, "dtype": "float32"}}
    events_of(stage_of(output=str(tmp_path / "whole"), **changes), cache)
    raw = stage_of(output=str(tmp_path / "parts"), **changes)
    for event in run_stage(plan_of(raw, cache), command="test", cache=cache):
        if isinstance(event, StepCompleted) and event.report.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
    finished = events_of(raw, cache)[-1]
    assert isinstance(finished, RunFinished)
    assert trace(tmp_path / "parts") == trace(tmp_path / "whole")
    record = finished.record
    assert not record.execution.packed and "each document is a row of its own" in record.execution.reasons["packing"]
    assert record.totals.padding_share is not None and 0 < record.totals.padding_share < 0.5
    assert trace(tmp_path / "parts")[:-2] != trace(tmp_path / "whole")[1:-1], "steps differ, so the comparison can fail"


@pytest.mark.slow
def test_groups_that_depend_on_earlier_calls_are_caught(
    stage_of: StageOf, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant of resuming: batches that are no function of the position."""
    calls: list[int] = []

    def group(lengths: Sequence[int], row_length: int, max_positions: int) -> list[list[int]]:
        calls.append(len(lengths))
        return (
            [[i] for i in range(len(lengths))]
            if len(calls) % 2
            else group_by_length(lengths, row_length, max_positions)
        )

    monkeypatch.setattr(loading, "group_by_length", group)
    with pytest.raises(AssertionError, match='"kind": "step"'):
        test_stopped_and_resumed_equals_never_stopped("mamba2", stage_of, cache, tmp_path)
