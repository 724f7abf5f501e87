"""Distillation as a stage: every task, every way to the teacher, beside everything else, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from postgrad.data.batch import collate
from postgrad.data.rows import IGNORED, Row
from postgrad.errors import StageError
from postgrad.evaluation import metrics
from postgrad.models.pretrained import save_pretrained
from postgrad.objectives.teacher import Online, without
from postgrad.planning.execution import Execution
from postgrad.stages.build import build, make_loader, make_subject
from postgrad.stages.objectives import Weighing
from postgrad.stages.parsing import parse_stage
from postgrad.stages.teaching import weight_of
from postgrad.training.step import Run, StepReport, train_step
from postgrad.training.world import World
from tests.conftest import make_llama, make_tokenizer
from tests.stages.models import QUICK, Shelf, carried_out_in_parts, make_shelf, t5_tokenizer, trace

CPU = World(torch.device("cpu"))
NEXT, DISTILL = {"kind": "next-token"}, {"kind": "distill"}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_DRAWS", 4)
        made = make_shelf(tmp_path_factory.mktemp("taught"), tmp_path_factory.getbasetemp() / "cache")
        for name in ("llama", "bert", "t5"):
            shutil.copytree(made.home / name, made.home / f"{name}-copy")
        save_pretrained(make_llama(7), make_tokenizer(), made.home / "other", dtype=torch.float32)
        yield made


class Seen:
    """A penalty that pulls at nothing and remembers the gradient of the losses."""

    name = "seen"

    def __init__(self, run: Run) -> None:
        self.run, self.gradient = run, torch.zeros(())

    def __call__(self) -> Tensor:
        found = [torch.zeros_like(m) if m.grad is None else m.grad for m in self.run.weights.masters]
        self.gradient = torch.cat([g.flatten() for g in found]).clone()
        return torch.zeros(())


def stepped(
    shelf: Shelf, raw: dict[str, Any], count: int, micro: int = 2
) -> tuple[list[StepReport], list[Tensor], Run]:
    """Reports and loss gradients of the first steps of a stage."""
    plan = shelf.plan(raw)
    subject = make_subject(plan, CPU)
    execution = Execution("float32", False, subject.attention or "sdpa", 1, micro, False, 0.0)
    run = build(plan, subject, execution, CPU)
    seen = Seen(run)
    run.penalties = [*run.penalties, seen]
    loader, reports, gradients = make_loader(plan, execution, CPU), [], []
    run.model.train()
    for step in range(1, count + 1):
        reports.append(train_step(run, loader.read(step)))
        gradients.append(seen.gradient)
    return reports, gradients, run


# -- the teacher is the start ----------------------------------------------------------------------------------------------


def decided(shelf: Shelf, name: str, kind: str | None = None) -> str:
    """A classifier to start from."""
    raw = shelf.stage(
        f"decides-{name}",
        model="bert",
        sources=[shelf.source(name, kind)],
        objectives=[{"kind": "classify"}],
        tokens=12,
        evaluation={**QUICK, "learned": [shelf.file(name, held_out=True)]},
    )
    return str(shelf.run(raw).place)


TASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "causal answers": {"rows": "instruction"},
    "masked": {"model": "bert"},
    "cloze": {"model": "bert", "rows": "labelled", "words": True},
    "span-corruption": {"model": "t5"},
    "text-to-text": {"model": "t5", "rows": "pair"},
    "class": {"rows": "labelled", "kind": "labelled", "decides": True},
    "multi": {"rows": "multi", "kind": "labelled", "decides": True},
    "number": {"rows": "numbered", "kind": "labelled", "decides": True},
    "tags": {"rows": "tagged", "decides": True},
}


def pure(shelf: Shelf, name: str, **changes: Any) -> dict[str, Any]:
    """A stage that is only taught."""
    task = dict(TASKS[name])
    rows, kind = task.pop("rows", "new"), task.pop("kind", None)
    if task.pop("words", False):
        kind = "labelled"
        changes = {"tuning": {"kind": "p-tuning", "template": "{x} [V*2] [MASK]", "backbone": "trained"}} | changes
    words = {"words": "yes", "sums": "no"} if kind and not task.get("decides") else {}
    model = decided(shelf, rows, kind) if task.pop("decides", False) else task.pop("model", "llama")
    return shelf.stage(
        f"taught-{name}".replace(" ", "-"),
        model=model,
        sources=[shelf.source(rows, kind, **({"words": words} if words else {}))],
        objectives=[DISTILL],
        tokens=100,
        evaluation={**QUICK, "learned": [shelf.file(rows, held_out=True)]},
        **changes,
    )


@pytest.mark.parametrize("name", [n for n in TASKS if n != "cloze"])
def test_a_model_learns_nothing_from_itself_and_something_from_its_past(shelf: Shelf, name: str) -> None:
    raw = pure(shelf, name)
    reports, gradients, run = stepped(shelf, raw, 1)
    assert reports[0].losses["distill"] == pytest.approx(0, abs=1e-6) and list(reports[0].losses) == ["distill"]
    assert gradients[0].abs().max() < 1e-7
    with torch.no_grad():
        for master in run.weights.masters:
            master += 0.05 * torch.randn(master.shape, generator=torch.Generator().manual_seed(0))
    again = train_step(
        run, make_loader(shelf.plan(raw), Execution("float32", False, "sdpa", 1, 2, False, 0), CPU).read(2)
    )
    assert again.losses["distill"] > 1e-4


@pytest.mark.parametrize("name", ["causal", "masked", "text-to-text", "class", "tags"])
@pytest.mark.parametrize(
    "tuning", [{"kind": "lora", "rank": 4}, {"kind": "prompt", "length": 3}], ids=lambda t: t["kind"]
)
def test_switched_off_and_a_second_model_teach_the_same(shelf: Shelf, name: str, tuning: dict[str, Any]) -> None:
    """Also behind a soft prompt, whose places the teacher does not read."""
    own = {"kind": {"causal": "next-token", "class": "classify", "tags": "classify"}.get(name, name)}
    raw = pure(shelf, name, tuning=tuning) | {"objectives": [own, DISTILL]}
    copy = shelf.home / "copies" / name
    if not copy.exists():
        model = Path(raw["model"])
        shutil.copytree(model / "model" if (model / "model").exists() else model, copy)
    other = {**raw, "objectives": [own, {**DISTILL, "teacher": str(copy)}]}
    (one, gradients, run), (two, others, second) = (stepped(shelf, r, 3) for r in (raw, other))
    assert teacher_of(run) is run.model and teacher_of(second) is not second.model
    told, theirs = ([r.losses["distill"] for r in reports] for reports in (one, two))
    assert told == pytest.approx(theirs, rel=1e-4, abs=1e-7) and told[2] > 1e-6
    assert torch.allclose(gradients[2], others[2], atol=1e-6)


def teacher_of(run: Run) -> Any:
    """The model that answers for the second objective's teacher."""
    return run.objectives[1].teacher.model  # type: ignore[attr-defined]


def test_a_task_layer_that_moves_is_not_switched_off_so_the_teacher_is_a_second_model(shelf: Shelf) -> None:
    tuning = {"kind": "lora", "rank": 2, "also": ["classifier"]}
    raw = pure(shelf, "class", tuning=tuning) | {"objectives": [{"kind": "classify"}, DISTILL]}
    reports, _, run = stepped(shelf, raw, 2)
    assert teacher_of(run) is not run.model and reports[0].losses["distill"] == pytest.approx(0, abs=1e-6)
    assert reports[1].losses["distill"] > 1e-6


# -- beside everything else --------------------------------------------------------------------------------------------------


def test_next_token_and_distillation_with_lora_are_the_sum_written_by_hand(shelf: Shelf) -> None:
    raw = shelf.stage(
        "by-hand",
        {"kind": "lora", "rank": 4},
        objectives=[NEXT, {**DISTILL, "weight": 0.5, "on": ["old"], "temperature": 2.0, "teacher": "other"}],
    )
    reports, gradients, _ = stepped(shelf, raw, 2)
    for micro in (1, 4):  # micro-batches do not matter
        others = stepped(shelf, raw, 2, micro)
        assert [r.loss for r in others[0]] == pytest.approx([r.loss for r in reports], rel=1e-5)
        assert torch.allclose(others[1][1], gradients[1], atol=1e-6)

    plan = shelf.plan(raw)
    subject = make_subject(plan, CPU)
    execution = Execution("float32", False, "sdpa", 1, 4, False, 0.0)
    run = build(plan, subject, execution, CPU)
    train_step(run, make_loader(plan, execution, CPU).read(1))
    batches = make_loader(plan, execution, CPU).read(2)
    teacher = AutoModelForCausalLM.from_pretrained(shelf.home / "other")
    total = torch.zeros(())
    parts = {"next-token": 0.0, "distill": 0.0}
    for batch in batches:
        logits = run.model.pretrained(**batch.inputs, use_cache=False).logits.flatten(0, 1)
        labels = batch.labels.flatten()
        entropy = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        total, parts["next-token"] = total + entropy, parts["next-token"] + entropy.item()
        if batch.source_B[0] == plan.sources.index("old"):
            with torch.no_grad():
                told = teacher(**batch.inputs, use_cache=False).logits.flatten(0, 1)
            log_p, log_q = (z[labels != IGNORED].div(2).log_softmax(-1) for z in (told, logits))
            apart = 0.5 * 4 * (log_p.exp() * (log_p - log_q)).sum()
            total, parts["distill"] = total + apart, parts["distill"] + apart.item()
    counted = sum(b.counted for b in batches)
    assert parts["distill"] > 0
    assert reports[1].losses == pytest.approx({k: v / counted for k, v in parts.items()}, rel=1e-5)
    wanted = torch.autograd.grad(total / counted, [w.compute for w in run.weights.all])
    assert torch.allclose(gradients[1], torch.cat([g.flatten() for g in wanted]), atol=1e-6)


def test_a_source_may_be_taught_alone(shelf: Shelf) -> None:
    raw = shelf.stage("alone", objectives=[{**NEXT, "on": ["new"]}, {**DISTILL, "teacher": "other", "on": ["old"]}])
    plan = shelf.plan(raw)
    assert plan.weighed == ((0,), (1,)) and plan.rows[1].layout == "packed"
    reports, _, _ = stepped(shelf, raw, 1)
    assert all(value > 0 for value in reports[0].losses.values())
    everywhere = shelf.plan(shelf.stage("everywhere", objectives=[NEXT, DISTILL]))
    assert everywhere.weighed == ((0, 1), (0, 1))
    with pytest.raises(StageError, match="no objective is taken on 'old'"):
        shelf.plan(shelf.stage("nobody", objectives=[{**NEXT, "on": ["new"]}, {**DISTILL, "on": ["new"]}]))


@pytest.mark.parametrize("tuning", [None, {"kind": "lora", "rank": 4}], ids=["full", "lora"])
def test_a_stage_that_is_taught_resumes_bit_for_bit(shelf: Shelf, tuning: dict[str, Any] | None) -> None:
    weight = {"start": 1.0, "end": 0.1, "shape": "cosine"}
    objectives = [NEXT, {**DISTILL, "weight": weight, "on": ["old"], "direction": "reverse"}]
    names = [f"{'lora' if tuning else 'full'}-{part}" for part in ("whole", "parts")]
    whole, parts = (shelf.stage(name, tuning, objectives=objectives) for name in names)
    one, two = shelf.run(whole), carried_out_in_parts(shelf, parts)
    assert trace(one.place) == trace(two.place)


def test_weights_follow_the_step() -> None:
    weight = weight_of(Weighing(start=1.0, end=0.2, over="50%"), 9, 900)
    assert [round(weight(step), 6) for step in (1, 2, 3, 5, 9)] == [1.0, 0.771429, 0.542857, 0.2, 0.2]
    cosine = weight_of(Weighing(start=1.0, end=0.0, shape="cosine", over="5 steps"), 9, 900)
    assert [round(cosine(step), 6) for step in (1, 3, 5, 6)] == [1.0, 0.5, 0.0, 0.0]
    assert weight_of(0.3, 9, 900)(7) == 0.3


# -- what a teacher does not read ---------------------------------------------------------------------------------------------


def test_places_of_vectors_are_left_out_and_positions_count_anew() -> None:
    """Two pieces in a row, vectors (from 50 on) before each and before an answer; written out by hand."""
    ids = np.array([1, 50, 51, 7, 8, 52, 9, 1, 50, 51, 5, 6, 0, 0])
    positions = np.array([0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 0, 1])
    labels = np.array([-100, -100, 7, 8, -100, 9, 3, -100, -100, 5, 6, 4, -100, -100])
    bare = np.array([50, 51, 7, 8, 9, 2, 2, 2, 2, 2, 2, 2, 2, 2])
    row = Row({"input_ids": ids, "position_ids": positions}, labels, 7)
    other = Row({"input_ids": bare, "position_ids": np.arange(14)}, np.where(np.arange(14) == 1, 7, -100), 1)
    inputs, place = without(collate([row, other], [0, 0]), 50)
    assert inputs["input_ids"].tolist() == [[1, 7, 8, 9, 1, 5, 6, 0, 0, 0, 0, 0], bare[2:].tolist()]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 0, 1, 2], list(range(12))]
    assert place is not None
    asked = labels != -100
    # The first word behind a prompt is said from the BOS, the answer's first token from the question's last.
    assert place[0].numpy()[asked].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert place[1, 1] == -1  # nothing stands before the prompt


def test_a_place_in_another_piece_would_be_caught() -> None:
    """Without a BOS the first word of the second piece has no place; a count over the row would give the piece before."""
    ids = np.array([7, 8, 50, 51, 5, 6])
    row = Row({"input_ids": ids, "position_ids": np.array([0, 1, 0, 1, 2, 3])}, np.array([8, -100, -100, 5, 6, 4]), 4)
    _, place = without(collate([row], [0]), 50)
    assert place is not None and place[0].tolist() == [0, 1, -1, -1, 2, 3]
    mutant = (torch.from_numpy(ids) < 50).cumsum(0) - 1
    assert mutant[3] == 1


class _Mode(torch.nn.Module):
    """Says in which mode it is asked."""

    def forward(self, **_: Tensor) -> Tensor:
        return torch.tensor([float(self.training), float(torch.is_grad_enabled())])


def test_a_teacher_is_asked_in_eval_mode_and_the_model_goes_on_as_it_was() -> None:
    model = _Mode().train()
    batch = collate([Row({"input_ids": np.array([1, 2])}, np.array([2, -100]), 1)], [0])
    answer = Online(model)(batch)  # type: ignore[arg-type]
    assert answer.output.tolist() == [0.0, 0.0] and model.training  # type: ignore[attr-defined]


# -- what is refused ----------------------------------------------------------------------------------------------------------


def test_a_teacher_of_other_tokens_is_refused_by_name(shelf: Shelf) -> None:
    save_pretrained(make_llama(1, vocab_size=300), make_tokenizer(300), shelf.home / "fewer", dtype=torch.float32)
    with pytest.raises(StageError, match=r"llama.*fewer do not read the same tokens: 320 tokens on 320 .* 300 on 300"):
        shelf.plan(shelf.stage("fewer", objectives=[NEXT, {**DISTILL, "teacher": "fewer"}]))
    swapped = t5_tokenizer()
    save_pretrained(make_llama(1, vocab_size=len(swapped)), swapped, shelf.home / "swapped", dtype=torch.float32)
    with pytest.raises(StageError, match="id 0 is"):
        shelf.plan(shelf.stage("swapped", objectives=[NEXT, {**DISTILL, "teacher": "swapped"}]))


def test_a_classifier_of_other_labels_is_no_teacher(shelf: Shelf) -> None:
    raw = pure(shelf, "class")
    raw["objectives"] = [{"kind": "classify"}, {**DISTILL, "teacher": decided(shelf, "paired")}]
    with pytest.raises(StageError, match="no layer for this task and these labels"):
        stepped(shelf, raw, 1)
    for tuning in ({"kind": "full"}, {"kind": "lora", "rank": 2}):  # nor is a model without any
        fresh = raw | {
            "model": str(shelf.home / "bert"),
            "objectives": [{"kind": "classify"}, DISTILL],
            "tuning": tuning,
        }
        with pytest.raises(StageError, match="no layer for this task and these labels"):
            stepped(shelf, fresh, 1)


def test_a_teacher_behind_a_prompt_of_its_own_is_refused(shelf: Shelf) -> None:
    prompted = shelf.run(shelf.stage("prompted", {"kind": "prompt", "length": 2})).place
    raw = shelf.stage("by-prompted", objectives=[NEXT, {**DISTILL, "teacher": str(prompted)}])
    with pytest.raises(StageError, match="a soft prompt of its own"):
        stepped(shelf, raw, 1)
    # As the start it is no trouble: what its lineage set before the texts stays.
    again = shelf.stage("on-prompted", {"kind": "prompt", "length": 2}, objectives=[DISTILL])
    again["model"] = str(prompted)
    reports, _, _ = stepped(shelf, again, 1)
    assert np.isfinite(reports[0].loss)


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ({"weight": {"start": 1.0}}, r"weight.end: the key is missing"),
        (
            {"weight": {"start": 1.0, "end": 0.1, "form": "linear"}},
            r"(?s)weight.form: there is no key 'form'.*one of start, end, shape, over",
        ),
        ({"weight": -1}, r"weight: input should be greater than 0, not -1"),
        ({"temperature": 0}, "temperature"),
        ({"on": ["odl"]}, "old"),
    ],
)
def test_descriptions_that_cannot_be_are_refused(shelf: Shelf, objective: dict[str, Any], said: str) -> None:
    with pytest.raises(StageError, match=said):
        parse_stage(shelf.stage("wrong", objectives=[NEXT, {**DISTILL, **objective}]), "test")


def test_a_stage_whose_teacher_has_changed_is_not_resumed(shelf: Shelf) -> None:
    place = shelf.home / "changing"
    shutil.copytree(shelf.home / "other", place)
    raw = shelf.stage("changed", objectives=[NEXT, {**DISTILL, "teacher": "changing"}])
    first = shelf.plan(raw).fingerprints()
    save_pretrained(make_llama(9), make_tokenizer(), place, dtype=torch.float32)
    assert shelf.plan(raw).fingerprints() != first
    assert "teachers" not in shelf.plan(shelf.stage("plain")).fingerprints()
