"""Distillation as a stage: every task, every way to the teacher, beside everything else, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from postgrad.check.check import check_stage
from postgrad.config.objectives import WeightSchedule
from postgrad.config.stage_file import parse_stage
from postgrad.data.layouts.rows import IGNORED, Row
from postgrad.data.loading import teacher_cache as told_module
from postgrad.data.loading.batch import collate
from postgrad.distributed.world import World
from postgrad.errors import DataError, ModelError, StageError
from postgrad.hardware.execution import Execution
from postgrad.lineage.metrics import read_metrics
from postgrad.models.pretrained import save_pretrained
from postgrad.objectives.teacher import OnlineTeacher, drop_virtual_tokens
from postgrad.run import cached_teacher
from postgrad.run.build import build_run, make_loader
from postgrad.run.cached_teacher import caches_by_source, fill_teacher_caches, find_cache_jobs
from postgrad.run.online_teacher import make_weight_schedule
from postgrad.run.tuned_model import make_tuned_model
from postgrad.stats import bootstrap
from postgrad.training.step import Run, StepReport, train_step
from tests.conftest import make_llama, make_tokenizer
from tests.tiny_stages import QUICK_EVALUATION, Workspace, make_workspace, run_interrupted, run_trace, t5_tokenizer

CPU = World(torch.device("cpu"))
NEXT, DISTILL = {"kind": "next-token"}, {"kind": "distill"}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "DRAWS", 200)
        made = make_workspace(tmp_path_factory.mktemp("taught"), tmp_path_factory.getbasetemp() / "cache")
        for name in ("llama", "bert", "t5"):
            shutil.copytree(made.folder / name, made.folder / f"{name}-copy")
        save_pretrained(make_llama(7), make_tokenizer(), made.folder / "other", dtype=torch.float32)
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
    shelf: Workspace, raw: dict[str, Any], count: int, micro: int = 2
) -> tuple[list[StepReport], list[Tensor], Run]:
    """Reports and loss gradients of the first steps of a stage."""
    plan = shelf.plan(raw)
    subject = make_tuned_model(plan, CPU)
    execution = Execution("float32", False, subject.attention or "sdpa", 1, micro, False, 0.0)
    run = build_run(plan, subject, execution, CPU)
    seen = Seen(run)
    run.penalties = [*run.penalties, seen]
    loader, reports, gradients = make_loader(plan, execution, CPU), [], []
    run.model.train()
    for step in range(1, count + 1):
        reports.append(train_step(run, loader.read_batches(step)))
        gradients.append(seen.gradient)
    return reports, gradients, run


# -- the teacher is the start ----------------------------------------------------------------------------------------------


def decided(shelf: Workspace, name: str, kind: str | None = None) -> str:
    """A classifier to start from."""
    raw = shelf.stage(
        f"decides-{name}",
        model="bert",
        sources=[shelf.source(name, kind)],
        objectives=[{"kind": "classify"}],
        tokens=12,
        evaluation={**QUICK_EVALUATION, "learned": [shelf.file(name, held_out=True)]},
    )
    return str(shelf.run(raw).run_folder)


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


def pure(shelf: Workspace, name: str, **changes: Any) -> dict[str, Any]:
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
        sources=[shelf.source(rows, kind, **({"label_words": words} if words else {}))],
        objectives=[DISTILL],
        tokens=100,
        evaluation={**QUICK_EVALUATION, "learned": [shelf.file(rows, held_out=True)]},
        **changes,
    )


@pytest.mark.parametrize("name", [n for n in TASKS if n != "cloze"])
def test_a_model_learns_nothing_from_itself_and_something_from_its_past(shelf: Workspace, name: str) -> None:
    raw = pure(shelf, name)
    reports, gradients, run = stepped(shelf, raw, 1)
    assert reports[0].losses["distill"] == pytest.approx(0, abs=1e-6) and list(reports[0].losses) == ["distill"]
    assert gradients[0].abs().max() < 1e-7
    with torch.no_grad():
        for master in run.weights.masters:
            master += 0.05 * torch.randn(master.shape, generator=torch.Generator().manual_seed(0))
    again = train_step(
        run, make_loader(shelf.plan(raw), Execution("float32", False, "sdpa", 1, 2, False, 0), CPU).read_batches(2)
    )
    assert again.losses["distill"] > 1e-4


@pytest.mark.parametrize("name", ["causal", "masked", "text-to-text", "class", "tags"])
@pytest.mark.parametrize(
    "tuning", [{"kind": "lora", "rank": 4}, {"kind": "prompt", "length": 3}], ids=lambda t: t["kind"]
)
def test_switched_off_and_a_second_model_teach_the_same(shelf: Workspace, name: str, tuning: dict[str, Any]) -> None:
    """Also behind a soft prompt, whose places the teacher does not read."""
    own = {"kind": {"causal": "next-token", "class": "classify", "tags": "classify"}.get(name, name)}
    raw = pure(shelf, name, tuning=tuning) | {"objectives": [own, DISTILL]}
    copy = shelf.folder / "copies" / name
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


def test_a_task_layer_that_moves_is_not_switched_off_so_the_teacher_is_a_second_model(shelf: Workspace) -> None:
    tuning = {"kind": "lora", "rank": 2, "also_train": ["classifier"]}
    raw = pure(shelf, "class", tuning=tuning) | {"objectives": [{"kind": "classify"}, DISTILL]}
    reports, _, run = stepped(shelf, raw, 2)
    assert teacher_of(run) is not run.model and reports[0].losses["distill"] == pytest.approx(0, abs=1e-6)
    assert reports[1].losses["distill"] > 1e-6


# -- beside everything else --------------------------------------------------------------------------------------------------


def test_next_token_and_distillation_with_lora_are_the_sum_written_by_hand(shelf: Workspace) -> None:
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
    subject = make_tuned_model(plan, CPU)
    execution = Execution("float32", False, "sdpa", 1, 4, False, 0.0)
    run = build_run(plan, subject, execution, CPU)
    train_step(run, make_loader(plan, execution, CPU).read_batches(1))
    batches = make_loader(plan, execution, CPU).read_batches(2)
    teacher = AutoModelForCausalLM.from_pretrained(shelf.folder / "other")
    total = torch.zeros(())
    parts = {"next-token": 0.0, "distill": 0.0}
    for batch in batches:
        logits = run.model.pretrained(**batch.inputs, use_cache=False).logits.flatten(0, 1)
        labels = batch.labels.flatten()
        entropy = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        total, parts["next-token"] = total + entropy, parts["next-token"] + entropy.item()
        if batch.source_B[0] == plan.data.source_names.index("old"):
            with torch.no_grad():
                told = teacher(**batch.inputs, use_cache=False).logits.flatten(0, 1)
            log_p, log_q = (z[labels != IGNORED].div(2).log_softmax(-1) for z in (told, logits))
            apart = 0.5 * 4 * (log_p.exp() * (log_p - log_q)).sum()
            total, parts["distill"] = total + apart, parts["distill"] + apart.item()
    counted = sum(b.label_count for b in batches)
    assert parts["distill"] > 0
    assert reports[1].losses == pytest.approx({k: v / counted for k, v in parts.items()}, rel=1e-5)
    wanted = torch.autograd.grad(total / counted, [w.parameter for w in run.weights.entries])
    assert torch.allclose(gradients[1], torch.cat([g.flatten() for g in wanted]), atol=1e-6)


def test_a_source_may_be_taught_alone(shelf: Workspace) -> None:
    raw = shelf.stage("alone", objectives=[{**NEXT, "on": ["new"]}, {**DISTILL, "teacher": "other", "on": ["old"]}])
    plan = shelf.plan(raw)
    assert plan.data.objective_indices == ((0,), (1,)) and plan.data.rows[1].layout == "packed"
    reports, _, _ = stepped(shelf, raw, 1)
    assert all(value > 0 for value in reports[0].losses.values())
    everywhere = shelf.plan(shelf.stage("everywhere", objectives=[NEXT, DISTILL]))
    assert everywhere.data.objective_indices == ((0, 1), (0, 1))
    with pytest.raises(StageError, match="no objective trains on 'old'"):
        shelf.plan(shelf.stage("nobody", objectives=[{**NEXT, "on": ["new"]}, {**DISTILL, "on": ["new"]}]))


@pytest.mark.parametrize("tuning", [None, {"kind": "lora", "rank": 4}], ids=["full", "lora"])
def test_a_stage_that_is_taught_resumes_bit_for_bit(shelf: Workspace, tuning: dict[str, Any] | None) -> None:
    weight = {"start": 1.0, "end": 0.1, "shape": "cosine"}
    objectives = [NEXT, {**DISTILL, "weight": weight, "on": ["old"], "direction": "reverse"}]
    names = [f"{'lora' if tuning else 'full'}-{part}" for part in ("whole", "parts")]
    whole, parts = (shelf.stage(name, tuning, objectives=objectives) for name in names)
    one, two = shelf.run(whole), run_interrupted(shelf, parts)
    assert run_trace(one.run_folder) == run_trace(two.run_folder)


def test_weights_follow_the_step() -> None:
    weight = make_weight_schedule(WeightSchedule(start=1.0, end=0.2, over="50%"), 9, 900)
    assert [round(weight(step), 6) for step in (1, 2, 3, 5, 9)] == [1.0, 0.771429, 0.542857, 0.2, 0.2]
    cosine = make_weight_schedule(WeightSchedule(start=1.0, end=0.0, shape="cosine", over="5 steps"), 9, 900)
    assert [round(cosine(step), 6) for step in (1, 3, 5, 6)] == [1.0, 0.5, 0.0, 0.0]
    assert make_weight_schedule(0.3, 9, 900)(7) == 0.3


# -- what a teacher does not read ---------------------------------------------------------------------------------------------


def test_places_of_vectors_are_left_out_and_positions_count_anew() -> None:
    """Two pieces in a row, vectors (from 50 on) before each and before an answer; written out by hand."""
    ids = np.array([1, 50, 51, 7, 8, 52, 9, 1, 50, 51, 5, 6, 0, 0])
    positions = np.array([0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 0, 1])
    labels = np.array([-100, -100, 7, 8, -100, 9, 3, -100, -100, 5, 6, 4, -100, -100])
    bare = np.array([50, 51, 7, 8, 9, 2, 2, 2, 2, 2, 2, 2, 2, 2])
    row = Row({"input_ids": ids, "position_ids": positions}, labels, 7)
    other = Row({"input_ids": bare, "position_ids": np.arange(14)}, np.where(np.arange(14) == 1, 7, -100), 1)
    inputs, place = drop_virtual_tokens(collate([row, other], [0, 0]), 50)
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
    _, place = drop_virtual_tokens(collate([row], [0]), 50)
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
    answer = OnlineTeacher(model)(batch)  # type: ignore[arg-type]
    assert answer.output.tolist() == [0.0, 0.0] and model.training  # type: ignore[attr-defined]


# -- what is refused ----------------------------------------------------------------------------------------------------------


def test_a_teacher_of_other_tokens_is_refused_by_name(shelf: Workspace) -> None:
    save_pretrained(make_llama(1, vocab_size=300), make_tokenizer(300), shelf.folder / "fewer", dtype=torch.float32)
    with pytest.raises(
        StageError, match=r"llama and its teacher fewer have different vocabularies: 320 tokens on 320 .* 300 on 300"
    ):
        shelf.plan(shelf.stage("fewer", objectives=[NEXT, {**DISTILL, "teacher": "fewer"}]))
    swapped = t5_tokenizer()
    save_pretrained(make_llama(1, vocab_size=len(swapped)), swapped, shelf.folder / "swapped", dtype=torch.float32)
    with pytest.raises(StageError, match="id 0 is"):
        shelf.plan(shelf.stage("swapped", objectives=[NEXT, {**DISTILL, "teacher": "swapped"}]))
    for name, said in (("nowhere", "there is no folder nowhere"), ("", "the name of the model is empty")):
        with pytest.raises(ModelError, match=said) as caught:
            shelf.plan(shelf.stage("lost", objectives=[NEXT, {**DISTILL, "teacher": name}]))
        assert caught.value.where == "objectives[1].teacher"


@pytest.mark.parametrize("second", [{"kind": "on-policy", "prompt_tokens": 8, "max_new_tokens": 8}, NEXT])
def test_an_objective_that_is_taken_on_nothing_is_refused(shelf: Workspace, second: dict[str, Any]) -> None:
    with pytest.raises(StageError, match="trains on no source") as caught:
        shelf.plan(shelf.stage("unused", objectives=[NEXT, second]))
    assert caught.value.where == "objectives[1]"


def test_a_classifier_of_other_labels_is_no_teacher(shelf: Workspace) -> None:
    raw = pure(shelf, "class")
    raw["objectives"] = [{"kind": "classify"}, {**DISTILL, "teacher": decided(shelf, "paired")}]
    with pytest.raises(StageError, match="no task layer for the labels"):
        stepped(shelf, raw, 1)
    for tuning in ({"kind": "full"}, {"kind": "lora", "rank": 2}):  # nor is a model without any
        fresh = raw | {
            "model": str(shelf.folder / "bert"),
            "objectives": [{"kind": "classify"}, DISTILL],
            "tuning": tuning,
        }
        with pytest.raises(StageError, match="no task layer for the labels"):
            stepped(shelf, fresh, 1)


def test_a_teacher_behind_a_prompt_of_its_own_is_refused(shelf: Workspace) -> None:
    prompted = shelf.run(shelf.stage("prompted", {"kind": "prompt", "length": 2})).run_folder
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
        ({"cache": "sampled", "direction": "reverse"}, "reverse"),
        ({"cache": {"kind": "top-k", "samples": 5}}, r"(?s)cache.samples.*one of kind, k"),
        ({"cache": "topk"}, r"there is no kind 'topk'"),
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
def test_descriptions_that_cannot_be_are_refused(shelf: Workspace, objective: dict[str, Any], said: str) -> None:
    with pytest.raises(StageError, match=said):
        parse_stage(shelf.stage("wrong", objectives=[NEXT, {**DISTILL, **objective}]), "test")


def test_a_stage_whose_teacher_has_changed_is_not_resumed(shelf: Workspace) -> None:
    place = shelf.folder / "changing"
    shutil.copytree(shelf.folder / "other", place)
    raw = shelf.stage("changed", objectives=[NEXT, {**DISTILL, "teacher": "changing"}])
    first = shelf.plan(raw).fingerprints()
    save_pretrained(make_llama(9), make_tokenizer(), place, dtype=torch.float32)
    assert shelf.plan(raw).fingerprints() != first
    assert "teachers" not in shelf.plan(shelf.stage("plain")).fingerprints()


# -- asked once --------------------------------------------------------------------------------------------------------------


def cached(shelf: Workspace, name: str, cache: Any, **changes: Any) -> dict[str, Any]:
    objectives = [{**NEXT, "on": ["new"]}, {**DISTILL, "teacher": "other", "on": ["old"], "cache": cache}]
    return shelf.stage(name, **{"objectives": objectives, **changes})


def asked(shelf: Workspace, raw: dict[str, Any], place: Path, micro: int = 2) -> tuple[Any, list[str]]:
    """A plan whose cache is a folder of its own, its teacher asked; and what was said meanwhile."""
    plan = dataclasses.replace(shelf.plan(raw), cache=place)
    return plan, list(fill_teacher_caches(plan, Execution("float32", False, "sdpa", 1, micro, False, 0.0), CPU))


def gradient_of(plan: Any, step: int = 2) -> tuple[StepReport, Tensor]:
    """The first gradient of a stage that looks up what was told, on the rows of a step."""
    subject = make_tuned_model(plan, CPU)
    execution = Execution("float32", False, "sdpa", 1, 2, False, 0.0)
    run = build_run(plan, subject, execution, CPU)
    seen = Seen(run)
    run.penalties = [seen]
    report = train_step(
        run, make_loader(plan, execution, CPU, teacher_caches=caches_by_source(plan)).read_batches(step)
    )
    return report, seen.gradient


CACHED = {
    "causal": {},
    "masked": {"model": "bert"},
    "span-corruption": {"model": "t5"},
    "text-to-text": {"model": "t5", "rows": "pair"},
}


@pytest.mark.parametrize("name", CACHED)
def test_all_ids_kept_is_asking_at_every_step(shelf: Workspace, name: str, tmp_path: Path) -> None:
    """Online is the limit of top-k, up to the half precision in which probabilities are kept."""
    task = dict(CACHED[name])
    rows, model = task.pop("rows", "new"), task.get("model", "llama")
    teacher = shelf.folder / f"{model}-moved"
    if not teacher.exists():
        moved = AutoModel[model].from_pretrained(shelf.folder / model)
        for p in moved.parameters():
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        shutil.copytree(shelf.folder / model, teacher)
        moved.save_pretrained(teacher)
    raw = shelf.stage(
        f"all-{name}",
        model=model,
        sources=[shelf.source(rows)],
        tokens=100,
        evaluation={**QUICK_EVALUATION, "learned": [shelf.file(rows, held_out=True)]},
    )
    one = {**DISTILL, "teacher": str(teacher), "temperature": 1.5}
    plain = shelf.plan({**raw, "objectives": [one]})
    plan, _ = asked(shelf, {**raw, "objectives": [{**one, "cache": {"kind": "top-k", "k": 10_000}}]}, tmp_path)
    (online, wanted), (told, found) = gradient_of(plain, 1), gradient_of(plan, 1)
    assert told.loss == pytest.approx(online.loss, rel=2e-3) and online.loss > 1e-3
    assert (found - wanted).norm() < 2e-3 * wanted.norm()
    few, _ = asked(shelf, {**raw, "objectives": [{**one, "cache": {"kind": "top-k", "k": 3}}]}, tmp_path)
    assert gradient_of(few, 1)[0].loss < online.loss


AutoModel = {"llama": AutoModelForCausalLM, "bert": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM}


@pytest.mark.parametrize("temper", [1.0, 0.8])
def test_what_is_drawn_is_in_the_mean_what_the_teacher_says(shelf: Workspace, tmp_path: Path, temper: float) -> None:
    """Over many seeds of the draws alone; a teacher's own draws, not those of the test above."""
    raw = cached(shelf, "drawn", "none")
    (_, wanted), found = gradient_of(shelf.plan(raw)), []
    cache = {"kind": "sampled", "samples": 20, "sampling_power": temper}
    for seed in range(12):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cached_teacher, "derive_key", lambda *_, seed=seed: 1000 + seed)
            plan, _ = asked(shelf, cached(shelf, "drawn", cache), tmp_path / f"{temper}-{seed}")
        found.append(gradient_of(plan)[1])
    stacked = torch.stack(found)
    error = (stacked.mean(0) - wanted).norm()
    assert error < 1.6 * stacked.std(0).norm() / len(found) ** 0.5  # its expected size is 1
    assert stacked.std(0).norm() > 0


def test_a_run_that_was_killed_while_asking_goes_on_behind_the_last_part(
    shelf: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(told_module, "_LABELS_PER_PART", 2 * 40)
    raw = cached(shelf, "parts", "sampled")
    plan = dataclasses.replace(shelf.plan(raw), cache=tmp_path)
    execution = Execution("float32", False, "sdpa", 1, 2, False, 0.0)
    for i, _ in enumerate(fill_teacher_caches(plan, execution, CPU)):
        if i == 2:
            break  # killed: two parts are whole
    (told,) = [item.teacher_cache for item in find_cache_jobs(plan)]
    assert len(told.missing_parts()) == told.part_count - 2 and told.part_count >= 3
    said = list(fill_teacher_caches(plan, execution, CPU))
    assert [line.split("part ")[1].split()[0] for line in said] == [str(i + 1) for i in range(2, told.part_count)]
    whole, _ = asked(shelf, raw, tmp_path / "whole")
    files = {p.relative_to(told.folder): p.read_bytes() for p in told.folder.rglob("*.npy")}
    (other,) = [item.teacher_cache for item in find_cache_jobs(whole)]
    assert files == {p.relative_to(other.folder): p.read_bytes() for p in other.folder.rglob("*.npy")}
    # Nothing is asked twice, and another budget, teacher or way of asking is another folder.
    assert list(fill_teacher_caches(plan, execution, CPU)) == []
    for change in ({"tokens": 500}, {"seed": 3}, {"objectives": cached(shelf, "x", "top-k")["objectives"]}):
        changed = dataclasses.replace(shelf.plan({**raw, **change}), cache=tmp_path)
        assert find_cache_jobs(changed)[0].teacher_cache.folder != told.folder


def test_what_was_said_of_other_rows_is_refused_and_both_are_named(shelf: Workspace, tmp_path: Path) -> None:
    plan, _ = asked(shelf, cached(shelf, "rows", "sampled"), tmp_path)
    (item,) = find_cache_jobs(plan)
    told, rows = item.teacher_cache, plan.data.rows[item.source_number]
    key = int(told.keys[0])
    assert len(told.lookup(key, rows.get_row(key, 0)).counts_N) == rows.get_row(key, 0).label_count
    row = rows.get_row(key, 0)
    other = row._replace(labels=row.labels[::-1].copy())
    for wrong in (other, rows.get_row(int(told.keys[1]), 0)):
        with pytest.raises(DataError, match=r"has the digest [0-9a-f]{16}, and the teacher read [0-9a-f]{16}"):
            told.lookup(key, wrong)
    with pytest.raises(DataError, match="no teacher prediction for row 999"):
        told.lookup(999, row)
    description = json.loads((told.folder / "teacher_cache.json").read_text())
    description.pop("checksum")
    (told.folder / "teacher_cache.json").write_text(json.dumps({**description, "temperature": 3.0}))
    with pytest.raises(DataError, match=r"have the key \w+, and these rows have \w+: temperature"):
        find_cache_jobs(plan)


def test_damaged_predictions_are_asked_for_again(
    shelf: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = cached(shelf, "damaged", "sampled")
    plan, _ = asked(shelf, raw, tmp_path)
    (told,) = [item.teacher_cache for item in find_cache_jobs(plan)]
    files = sorted(path for path in told.folder.rglob("*") if path.is_file())
    before = {path: path.read_bytes() for path in files}
    assert len(files) == 9
    for path in files:
        content = bytearray(before[path])
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        _, said = asked(shelf, raw, tmp_path)
        assert len(said) == (path.name != "teacher_cache.json")
        if path.parent != told.folder:
            assert {path: path.read_bytes() for path in files} == before
        path.write_bytes(before[path])
    # The mutant looks for the folder alone, and trains on what is in it.
    monkeypatch.setattr(told_module, "is_intact", lambda folder, cache: folder.exists())
    (told.folder / "part-00000" / "ids.npy").write_bytes(b"")
    assert told.missing_parts() == []


@pytest.mark.parametrize("cache", ["sampled", "top-k"])
def test_a_stage_that_looks_up_its_teacher_resumes_bit_for_bit(shelf: Workspace, cache: str) -> None:
    whole, parts = (cached(shelf, f"{cache}-{part}", cache) for part in ("whole", "parts"))
    one, two = shelf.run(whole), run_interrupted(shelf, parts)
    assert run_trace(one.run_folder) == run_trace(two.run_folder)
    steps = [row for row in read_metrics(one.run_folder / "metrics.jsonl") if row.kind == "step"]
    assert steps[0].losses_by_objective["distill"] > 0


def test_a_first_word_behind_a_prompt_that_the_teacher_lacks_is_left_out_of_a_cache_too(
    shelf: Workspace, tmp_path: Path
) -> None:
    tuning = {"kind": "prompt", "length": 3}
    raw = shelf.stage("lacking", tuning, objectives=[{**DISTILL, "teacher": "other"}])
    plan, _ = asked(
        shelf, {**raw, "objectives": [{**DISTILL, "teacher": "other", "cache": {"kind": "top-k", "k": 999}}]}, tmp_path
    )
    (online, wanted), (told, found) = gradient_of(shelf.plan(raw)), gradient_of(plan)
    assert told.loss == pytest.approx(online.loss, rel=2e-3)
    assert (found - wanted).norm() < 2e-3 * wanted.norm()


def test_a_classifier_is_not_asked_beforehand(shelf: Workspace) -> None:
    raw = pure(shelf, "class") | {"objectives": [{**DISTILL, "cache": "sampled"}]}
    with pytest.raises(StageError, match="classifier"):
        shelf.plan(raw)


# -- what is said beforehand ---------------------------------------------------------------------------------------------------


def test_check_says_what_each_teacher_costs(shelf: Workspace) -> None:
    def told(**changes: Any) -> dict[str, Any]:
        plan = shelf.plan(shelf.stage("cost", **changes))
        return check_stage(plan, cache=shelf.cache)

    at_once = told(objectives=[NEXT, {**DISTILL, "on": ["old"]}], tuning={"kind": "lora", "rank": 2})
    (record,) = at_once["teachers"]
    assert not record["second_model"] and at_once["memory"]["teachers"] == 0 and 0 < record["share_of_step"] < 2
    assert "`lora` disabled, no second copy" in at_once["text"]
    twice = told(objectives=[NEXT, {**DISTILL, "on": ["old"]}, {**DISTILL, "on": ["new"]}])
    size = 4 * sum(p.numel() for p in make_llama().parameters())
    assert [r["bytes"] for r in twice["teachers"]] == [size, 0] and twice["memory"]["teachers"] == size  # one model
    plan = shelf.plan(shelf.stage("cost", objectives=[NEXT, {**DISTILL, "cache": "sampled"}]))
    kept = told(objectives=[NEXT, {**DISTILL, "cache": "sampled"}])
    assert [r["source"] for r in kept["teachers"]] == ["new", "old"] and not kept["teachers"][0]["is_filled"]
    for _ in fill_teacher_caches(plan, Execution("float32", False, "sdpa", 1, 2, False, 0.0), CPU):
        pass
    told_again = told(objectives=[NEXT, {**DISTILL, "cache": "sampled"}])
    for record, item in zip(told_again["teachers"], find_cache_jobs(plan), strict=True):
        assert record["is_filled"] and record["seconds"] == 0
        on_disk = item.teacher_cache.size_bytes()
        assert record["labels"] * record["bytes_per_label"] == pytest.approx(on_disk, rel=0.25)
