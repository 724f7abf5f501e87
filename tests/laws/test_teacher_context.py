"""Laws of a teacher that reads more: the divergence of the same labels by hand, exact without a context, what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from postgrad.check.check import check_stage
from postgrad.data.layouts.rows import IGNORED, Row
from postgrad.data.loading.unpacked_rows import split_documents
from postgrad.distributed.world import World
from postgrad.errors import PostgradError
from postgrad.hardware.execution import Execution
from postgrad.models.pretrained import save_pretrained
from postgrad.objectives import teacher as module
from postgrad.plan.plan import Plan
from postgrad.run.build import build_run, make_loader, make_step
from postgrad.run.cached_teacher import caches_by_source, fill_teacher_caches
from postgrad.run.tuned_model import make_tuned_model
from tests.conftest import make_llama, make_tokenizer
from tests.tiny_models import old_text
from tests.tiny_stages import (
    Workspace,
    bos_tokenizer,
    completion_examples,
    make_workspace,
    run_interrupted,
    run_trace,
    train_for,
    write_rows,
)

CPU = World(torch.device("cpu"))
BEGINNING = {"kind": "beginning", "tokens": 20, "share": 0.6}
FACT = {"kind": "field", "field": "fact", "template": "a fact: {text}\n"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    made = make_workspace(tmp_path_factory.mktemp("contexts"), tmp_path_factory.getbasetemp() / "cache")
    save_pretrained(make_llama(7), make_tokenizer(), made.folder / "other", dtype=torch.float32)
    for seed, name in ((0, "llama-bos"), (7, "other-bos")):
        save_pretrained(make_llama(seed), bos_tokenizer(), made.folder / name, dtype=torch.float32)
    facts = [text[:30] for text in old_text(60, 5)]
    rows = completion_examples(60, 1)
    write_rows(made.folder / "facts.jsonl", [row | {"fact": fact} for row, fact in zip(rows, facts, strict=True)])
    write_rows(made.folder / "no-facts.jsonl", [row | {"fact": "  " if i % 2 else None} for i, row in enumerate(rows)])
    return made


def stage_of(workspace: Workspace, name: str, rows: str, context: dict[str, Any] | None, **changes: Any) -> Any:
    """A stage that only distils; `changes` of the objective are in `objective`."""
    objective = {"kind": "distill", "teacher": "other", **changes.pop("objective", {})}
    objective |= {"context": context} if context else {}
    return workspace.stage(name, **{"sources": [workspace.source(rows)], "objectives": [objective], **changes})


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "beginning": ("new", BEGINNING, {}),
    "beginning after a BOS": ("new", BEGINNING, {"model": "llama-bos", "objective": {"teacher": "other-bos"}}),
    "field": ("facts", FACT, {}),
    "on-policy": (
        "facts",
        FACT,
        {"objective": {"kind": "on-policy", "max_new_tokens": 7}, "data": {"sequence_length": 100}},
    ),
    "soft prompt": (
        "facts",
        FACT,
        {"tuning": {"kind": "prompt", "length": 3}, "objective": {"teacher": "start"}, "data": {"sequence_length": 60}},
    ),
}


def first_step(plan: Plan, workspace: Workspace, *, packed: bool = True) -> tuple[float, list[Any], Any]:
    """The loss of the first step, its micro-batches, and the model that takes it."""
    execution = Execution("float32", False, "sdpa", 1, 2, False, 0.0, packed=packed)
    list(fill_teacher_caches(plan, execution, CPU))
    run = build_run(plan, make_tuned_model(plan, CPU), execution, CPU)
    loader, seen = make_loader(plan, execution, CPU, teacher_caches=caches_by_source(plan)), []
    original = run.objectives[0].logit_loss  # type: ignore[attr-defined]
    object.__setattr__(run.objectives[0], "logit_loss", lambda batch, at: (seen.append(batch), original(batch, at))[1])
    run.model.train()
    student = make_tuned_model(plan, CPU).model.pretrained.eval()
    report = make_step(plan, run)(run, loader.read_batches(1))
    return report.loss, seen, student


def by_hand(batches: list[Any], student: Any, teacher: Any, reverse: bool) -> float:
    """The mean divergence over labels; each one's prefix goes through the models alone."""
    losses: list[Tensor] = []
    for batch in batches:
        for i, contexts in enumerate(batch.contexts):
            row = Row({name: t[i].numpy() for name, t in batch.inputs.items()}, batch.labels[i].numpy(), 0, contexts)
            for document in split_documents(row) if "position_ids" in row.inputs else [(row, 0)]:
                ids, labels = document[0].inputs["input_ids"].tolist(), document[0].labels
                (context,) = document[0].contexts
                for at in np.flatnonzero(labels != IGNORED).tolist():
                    seen = [*ids[: min(context.position, at + 1)], *context.ids, *ids[context.position : at + 1]]
                    seen = [token for token in seen if token < teacher.config.vocab_size]
                    with torch.no_grad():
                        log_q = student(torch.tensor([ids[: at + 1]])).logits[0, -1].double().log_softmax(-1)
                        log_p = teacher(torch.tensor([seen])).logits[0, -1].double().log_softmax(-1)
                    if reverse:
                        log_p, log_q = log_q, log_p
                    losses.append((log_p.exp() * (log_p - log_q)).sum())
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize(
    ("case", "variant"),
    [(case, "") for case in CASES]
    + [("beginning", "cached"), ("beginning after a BOS", "unpacked")]
    + [(case, "shifted") for case in ("beginning", "field")]
    + [("beginning after a BOS", "label after the context")],
)
def test_the_divergence_is_that_of_each_label_by_hand(
    case: str, variant: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, context, changes = CASES[case]
    mutant = variant in ("shifted", "label after the context")
    if variant == "shifted":
        insert = module.insert_contexts

        def shifted(batch: Any) -> tuple[Any, Tensor]:
            inserted, index_BT = insert(batch)
            return inserted, (index_BT - 1).clamp(min=0)

        monkeypatch.setattr(module, "insert_contexts", shifted)
    if variant == "label after the context":
        monkeypatch.setattr(module.RowContext, "first_label", property(lambda self: self.position))
    if variant == "cached":  # of a whole vocabulary, and in fp16
        changes = {"objective": {"cache": {"kind": "top-k", "k": 320}}}
    raw = stage_of(workspace, f"{case}-{variant}".replace(" ", "-"), rows, context, **changes)
    raw["batch"] = {"global_batch_size": 2, "micro_batch_size": 2}
    plan = workspace.plan(raw)
    loss, batches, student = first_step(plan, workspace, packed=variant != "unpacked")
    name = plan.objectives[0].teacher  # type: ignore[union-attr]
    teacher = AutoModelForCausalLM.from_pretrained(workspace.folder / ("llama" if name == "start" else name))
    expected = by_hand(batches, student, teacher.eval(), reverse=case == "on-policy")
    assert (loss == pytest.approx(expected, rel=2e-3 if variant == "cached" else 1e-4, abs=3e-7)) == (not mutant)


def test_a_context_and_its_text_are_the_document(workspace: Workspace) -> None:
    """Nothing is read twice or lost, and a context ends with a sentence where it can."""
    plan = workspace.plan(stage_of(workspace, "parts", "old", BEGINNING | {"tokens": 12}))
    rows, store = plan.data.rows[0], plan.data.sources[0].store
    decode, ends = plan.model.tokenizer.decode, 0
    seen = set()
    for i in range(len(rows)):
        for document in split_documents(rows.get_row(i, i)):
            (context,) = document.row.contexts
            ends += decode(context.ids).endswith(".")
            seen.add((*context.ids.tolist(), *document.row.inputs["input_ids"].tolist()))
    texts = [tuple(store.read(d).tolist()) for d in range(len(store))]
    assert seen <= {text[:end] for text in texts for end in range(len(text))} and ends > len(seen) / 2
    ledger = rows.ledger
    assert ledger.read == ledger.held_out + ledger.dropped + ledger.truncated + ledger.placed


@pytest.mark.parametrize("rows", ["no-facts", "facts"])
def test_an_empty_context_changes_no_bit(rows: str, workspace: Workspace) -> None:
    plain, read = (
        train_for(workspace, stage_of(workspace, f"{rows}-{bool(context)}", rows, context), 2)[1]
        for context in (None, FACT)
    )
    assert all(torch.equal(plain[name], read[name]) for name in plain) == (rows == "no-facts")


def test_killed_and_stopped_it_ends_with_the_same_bits(workspace: Workspace) -> None:
    objectives = [
        {"kind": "on-policy", "teacher": "other", "max_new_tokens": 5, "context": FACT, "on": ["facts"]},
        {"kind": "distill", "context": BEGINNING, "cache": "sampled", "on": ["new"]},
    ]
    sources = [workspace.source("facts", share=0.3), workspace.source("new", share=0.7)]
    options = {"objectives": objectives, "sources": sources}
    whole = workspace.run(workspace.stage("whole", **options))
    parts = run_interrupted(workspace, workspace.stage("parts-of-it", **options))
    assert run_trace(parts.run_folder) == run_trace(whole.run_folder)


def test_held_out_rows_are_scored_without_the_context(workspace: Workspace) -> None:
    raw = stage_of(workspace, "scored", "facts", FACT, evaluation={"samples": 0})
    raw["data"]["sources"][0]["held_out"] = 0.2
    (held_out,) = workspace.plan(raw).evaluation.sets
    raw["objectives"][0].pop("context")
    (plain,) = workspace.plan(raw | {"name": "plainly"}).evaluation.sets
    assert all(
        np.array_equal(a.inputs["input_ids"], b.inputs["input_ids"])
        for a, b in zip(held_out.rows, plain.rows, strict=True)  # type: ignore[union-attr]
    )


def test_check_tells_what_a_context_adds(workspace: Workspace) -> None:
    plan = workspace.plan(stage_of(workspace, "told", "facts", FACT))
    found = check_stage(plan, cache=workspace.cache)
    (teacher,) = found["teachers"]
    assert 0.1 < teacher["context_share"] < 2 and any("contexts add " in line for line in found["text"].splitlines())


NEXT = {"kind": "next-token"}


@pytest.mark.parametrize(
    ("rows", "context", "changes", "message"),
    [
        ("new", FACT, {}, "without fields"),
        ("facts", BEGINNING, {}, "without a beginning to set apart"),
        ("facts", FACT | {"field": "fakt"}, {}, "no column `fakt`"),
        ("facts", FACT | {"template": "nothing"}, {}, "needs `{text}`"),
        ("new", BEGINNING | {"tokens": 100}, {}, "a context of 100 tokens and a row of 48"),
        ("facts", FACT | {"template": "a very long one " * 40 + "{text}"}, {}, "no tokens to train on"),
        ("new", BEGINNING, {"model": "t5", "objective": {"teacher": "start"}}, "no place for a teacher's context"),
        (
            "new",
            BEGINNING,
            {"objectives": [{"kind": "distill", "context": BEGINNING | {"tokens": n}} for n in (4, 5)]},
            "read different contexts",
        ),
    ],
)
def test_what_does_not_fit_is_an_error(
    workspace: Workspace, rows: str, context: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(PostgradError, match=message):
        workspace.plan(stage_of(workspace, "refused", rows, context, **changes))


def test_rows_whose_context_does_not_fit_are_counted(workspace: Workspace, tmp_path: Path) -> None:
    rows = completion_examples(20, 1)
    write_rows(tmp_path / "some.jsonl", [row | {"fact": "one and two. " * 60 * (i < 3)} for i, row in enumerate(rows)])
    source = {"name": "some", "path": str(tmp_path / "some.jsonl"), "max_passes": 100, "held_out": 0}
    plan = workspace.plan(stage_of(workspace, "counted", "facts", FACT, sources=[source]))
    assert any("3 rows are skipped (context longer than the teacher's window)" in note for note in plan.notes)
