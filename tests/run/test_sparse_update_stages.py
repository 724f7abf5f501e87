"""Updates of fewer numbers and rates that follow the loss as a part of stages: resumed, beside everything, told and refused."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from postgrad.check.check import check_stage
from postgrad.config import sparse_updates
from postgrad.config.quantities import ConfigModel
from postgrad.config.sparse_updates import LossAdaptive, MagnitudeUpdate, MomentumUpdate, SourceShieldedUpdate
from postgrad.errors import StageError
from postgrad.lineage.metrics import StepRow, read_metrics
from postgrad.lineage.record import read_record
from postgrad.lineage.saved_plan import read_plan
from postgrad.models.location import locate_model
from postgrad.models.pretrained import load_pretrained
from postgrad.optim.sparse_update import SparseMask
from postgrad.optim.top_k import top_k_masks
from postgrad.run.run import run_stage
from postgrad.run.summary import summary_text
from postgrad.training.checkpoint_state import read_progress
from postgrad.training.checkpoints import Checkpoints
from tests.tiny_stages import Workspace, make_workspace, run_interrupted, run_trace, train_for

MOMENTUM = {"sparse_update": {"kind": "mofo", "share": "10%"}}
MAGNITUDE = {"sparse_update": {"kind": "migu", "share": "30%"}}
FINCH = {"loss_adaptive": {"initial_share": "50%"}}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("shelf"), tmp_path_factory.getbasetemp() / "cache")


def told(home: Path) -> list[StepRow]:
    return [row for row in read_metrics(home / "metrics.jsonl") if isinstance(row, StepRow)]


WHOLE: dict[str, dict[str, Any]] = {
    "momentum": {"sparse_update": {"kind": "mofo", "share": 1}},
    "magnitude": {"sparse_update": {"kind": "migu", "share": 1}},
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_share_of_all_is_no_change_to_the_bit(shelf: Workspace, kind: str) -> None:
    plain = shelf.run(shelf.stage("plain"))
    whole = shelf.run(shelf.stage(f"whole-{kind}", optimizer=WHOLE[kind]))
    model = "model/model.safetensors"
    assert (plain.run_folder / model).read_bytes() == (whole.run_folder / model).read_bytes()
    assert (
        all(row.updated_weights is None for row in told(plain.run_folder))
        and read_record(plain.run_folder).sparse_update is None
    )
    assert all(
        row.updated_weights == read_record(whole.run_folder).sparse_update.total_weights
        for row in told(whole.run_folder)
    )


@pytest.mark.parametrize("optimizer", [MOMENTUM, MAGNITUDE, {**MOMENTUM, **FINCH}], ids=["momentum", "rows", "paced"])
def test_killed_and_stopped_it_ends_with_the_same_bits(shelf: Workspace, optimizer: dict[str, Any]) -> None:
    name = "-".join(["parts", *optimizer, optimizer["sparse_update"]["kind"]])
    whole = shelf.run(shelf.stage(f"{name}-whole", optimizer=optimizer))
    parts = run_interrupted(shelf, shelf.stage(name, optimizer=optimizer))
    assert run_trace(parts.run_folder) == run_trace(whole.run_folder)


def test_a_rate_that_forgot_its_losses_would_be_caught(shelf: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = shelf.run(shelf.stage("kept", optimizer=FINCH))
    monkeypatch.setattr("postgrad.optim.loss_adaptive_lr.LossAdaptiveLRScale.load", lambda self, state: None)
    parts = run_interrupted(shelf, shelf.stage("forgot", optimizer=FINCH))
    assert run_trace(parts.run_folder) != run_trace(whole.run_folder)


def test_the_rate_follows_the_loss(shelf: Workspace) -> None:
    place = shelf.run(
        shelf.stage("paced", optimizer={"loss_adaptive": {"initial_share": "40%", "smoothing": 0.5}})
    ).run_folder
    mean = first = told(place)[0].loss
    for row in told(place):
        mean = 0.5 * mean + 0.5 * row.loss
        assert row.learning_rate == pytest.approx(1e-2 * min(1.0, 0.4 * (first / mean) ** 0.5), rel=1e-6)
    assert told(place)[0].learning_rate == pytest.approx(4e-3)
    newest = Checkpoints(place / "checkpoints", warn=print).find_newest()
    assert newest and read_progress(newest).rate == told(place)[-1].learning_rate


TUNED: list[dict[str, Any]] = [
    {"kind": "full", "layer_decay": 0.7},
    {"kind": "blocks", "last": 2, "unfreeze_every": "2 steps"},
    {"kind": "lora", "rank": 3},
    {"kind": "lora", "rank": 2, "variant": "dora"},
    {"kind": "lora", "rank": 2, "variant": "pissa", "also_train": ["model.layers.0.mlp.up_proj.weight"]},
    {"kind": "osf"},
    {"kind": "adapter", "variant": "houlsby", "size": 4},
    {"kind": "expand", "positions": [0]},
    {"kind": "prefix", "length": 2, "hidden": 8},
    {"kind": "prompt", "length": 2, "also_train": ["model.layers.0.mlp.up_proj.weight"]},
]


def name_of(tuning: dict[str, Any]) -> str:
    return tuning.get("variant", tuning["kind"])


@pytest.mark.parametrize("tuning", TUNED, ids=name_of)
def test_the_largest_momentum_of_every_tuning(shelf: Workspace, tuning: dict[str, Any]) -> None:
    before, after, run = train_for(shelf, shelf.stage("any", tuning, optimizer=MOMENTUM), 1)
    moving = run.optimizer.update_mask
    assert isinstance(moving, SparseMask)
    chosen = {w.name: w.master for w in run.weights.entries if any(w.master is m for m in moving.sparse_masters)}
    assert chosen
    for name, master in chosen.items():
        assert int((after[name] != before[name]).sum()) <= max(1, round(0.1 * master.numel()))
    assert any((after[name] != before[name]).any() for name in chosen)


@pytest.mark.parametrize("tuning", TUNED, ids=name_of)
def test_the_largest_rows_of_every_tuning_that_has_rows(shelf: Workspace, tuning: dict[str, Any]) -> None:
    raw = shelf.stage("any", tuning, optimizer=MAGNITUDE)
    if name_of(tuning) in ("dora", "osf", "houlsby", "prefix"):
        said = "include the base weights" if name_of(tuning) == "dora" else "trains no linear layer"
        with pytest.raises(StageError, match=said) as error:
            train_for(shelf, raw, 1)
        assert error.value.where == "optimizer.sparse_update"
        return
    before, after, run = train_for(shelf, raw, 1)
    moving = run.optimizer.update_mask
    assert isinstance(moving, SparseMask)
    for w in run.weights.entries:
        rows = (after[w.name] != before[w.name]).flatten(1).any(1) if w.master.ndim > 1 else None
        if rows is not None and any(w.master is m for m in moving.sparse_masters):
            assert int(rows.sum()) <= max(1, round(0.3 * len(rows)))


MODELS = {
    "bert": ("bert", {"objectives": [{"kind": "masked"}]}),
    "t5": ("t5", {"objectives": [{"kind": "span-corruption"}]}),
}


@pytest.mark.parametrize("optimizer", [MOMENTUM, MAGNITUDE], ids=["momentum", "magnitude"])
@pytest.mark.parametrize("name", MODELS)
def test_it_works_on_other_models(shelf: Workspace, name: str, optimizer: dict[str, Any]) -> None:
    model, changes = MODELS[name]
    place = shelf.run(
        shelf.stage(f"{name}-{optimizer['sparse_update']['kind']}", model=model, optimizer=optimizer, **changes)
    ).run_folder
    rows, about = told(place), read_record(place).sparse_update
    assert all(row.updated_weights == about.updated_weights < about.total_weights for row in rows)
    assert rows[-1].loss < rows[0].loss


OTHER: list[tuple[type[ConfigModel], str, dict[str, Any]]] = [
    (MomentumUpdate, "sparse_update", {"share": 0.2}),
    (MagnitudeUpdate, "sparse_update", {"share": 0.6}),
    (LossAdaptive, "loss_adaptive", {"initial_share": 0.3, "smoothing": 0.2}),
]


@pytest.mark.parametrize(("kind", "place", "other"), OTHER, ids=[kind.__name__ for kind, *_ in OTHER])
def test_every_key_changes_what_is_trained(
    shelf: Workspace, kind: type[ConfigModel], place: str, other: dict[str, Any]
) -> None:
    word = {"kind": get_args(kind.model_fields["kind"].annotation)[0]} if "kind" in kind.model_fields else {}
    assert other.keys() == kind.model_fields.keys() - {"kind"}

    def after(changes: dict[str, Any]) -> torch.Tensor:
        now = train_for(shelf, shelf.stage("keys", optimizer={place: {**word, **changes}}), 3)[1]
        return torch.cat([t.flatten() for t in now.values()])

    plain, again = after({}), after({})
    assert torch.equal(plain, again)  # so that a difference is the key's
    for key, value in other.items():
        assert not torch.equal(after({key: value}), plain), key


def test_every_kind_of_update_is_among_them() -> None:
    assert {SourceShieldedUpdate, *(kind for kind, *_ in OTHER)} == {  # SSU needs a file: tests/laws/test_ssu.py
        v
        for v in vars(sparse_updates).values()
        if inspect.isclass(v) and v.__module__ == sparse_updates.__name__ and not v.__subclasses__()
    }


def test_beside_penalties_and_distillation(shelf: Workspace) -> None:
    """A decoupled pull is the optimizer's own step: what does not move is not pulled either."""
    objectives = [{"kind": "next-token"}, {"kind": "distill", "teacher": "start", "weight": 0.5, "on": ["old"]}]
    for decoupled in (False, True):
        anchor = {"kind": "anchor", "strength": 5.0, "decoupled": decoupled}
        raw = shelf.stage("beside", optimizer=MOMENTUM, penalties=[anchor], objectives=objectives)
        before, after, run = train_for(shelf, raw, 1)
        for w in run.weights.entries:
            moved = int((after[w.name] != before[w.name]).sum())
            assert moved <= (w.master.numel() if w.master.ndim < 2 else max(1, round(0.1 * w.master.numel())))


def test_a_teacher_in_the_same_model_is_not_heard(shelf: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its adapter off the model is the teacher: what it reads as one says nothing about rows."""
    found: list[list[torch.Tensor]] = []
    monkeypatch.setattr(
        "postgrad.optim.migu.top_k_masks",
        lambda sizes, counts, like: found.append([s.clone() for s in sizes]) or top_k_masks(sizes, counts, like),
    )
    for weight in (0.0, 0.5):
        teach = {"kind": "distill", "teacher": "start", "weight": weight}
        raw = shelf.stage("taught", {"kind": "lora", "rank": 2}, optimizer=MAGNITUDE)
        train_for(shelf, {**raw, "objectives": [{"kind": "next-token"}, *([teach] if weight else [])]}, 1)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_a_strength_that_is_found_finds_it_with_the_same_updates(shelf: Workspace) -> None:
    raw = shelf.stage("auto", optimizer={**MAGNITUDE, **FINCH}, penalties=[{"kind": "anchor", "strength": "auto"}])
    place = shelf.run(raw).run_folder
    assert read_plan(place).penalty_strengths["anchor"]["strength"] > 0
    assert told(place)[0].learning_rate == pytest.approx(5e-3)  # the steps that look for it do not count


def test_check_says_what_moves(shelf: Workspace) -> None:
    found = check_stage(shelf.plan(shelf.stage("told", optimizer={**MOMENTUM, **FINCH})), cache=shelf.cache)
    sizes = [(p.ndim, p.numel()) for p in shelf_weights(shelf)]
    matrices = [n for dims, n in sizes if dims >= 2]
    vectors = sum(n for dims, n in sizes if dims < 2)
    moved = sum(max(1, round(0.1 * n)) for n in matrices) + vectors
    update = found["sparse_update"]
    assert (update["updated_weights"], update["total_weights"]) == (moved, sum(matrices) + vectors)
    assert update["bytes"] == 4 * sum(matrices)
    assert f"update: mofo, 10 % of the entries of each matrix with the largest momentum: {moved:,} of" in found["text"]
    assert "times min(1, 0.5 sqrt(first loss / mean loss))" in found["text"]
    plain = check_stage(shelf.plan(shelf.stage("told")), cache=shelf.cache)
    assert plain["sparse_update"] is None and "update:" not in plain["text"] and "sqrt" not in plain["text"]


def test_the_end_says_what_moved(shelf: Workspace) -> None:
    done = shelf.run(shelf.stage("said", optimizer=MOMENTUM))
    plain = shelf.run(shelf.stage("plain"))
    models = [
        load_pretrained(locate_model(str(place), shelf.folder)).model
        for place in (shelf.folder / "llama", done.run_folder)
    ]
    start, end = (dict(model.named_parameters()) for model in models)
    differ = sum(int((end[name] != old).sum()) for name, old in start.items())
    about = read_record(done.run_folder).sparse_update
    line = f"{differ:,} of {about.total_weights:,} weights differ from the start model's"
    each = f"each update changed {about.updated_weights:,} of {about.total_weights:,}"
    assert about.updated_weights < differ < about.total_weights
    for text in (summary_text(done), (done.run_folder / "report.html").read_text()):
        assert line in text.replace("&#x27;", "'") and each in text
    assert (
        "weights differ" not in summary_text(plain)
        and "weights differ" in (plain.run_folder / "report.html").read_text()
    )


def test_the_page_draws_the_rate_that_was_taken(shelf: Workspace) -> None:
    paced, plain = (shelf.run(shelf.stage(n, optimizer=o)) for n, o in (("drawn", FINCH), ("plain", {})))
    assert "The learning rate adapts to the loss" in (paced.run_folder / "report.html").read_text()
    assert "The learning rate adapts to the loss" not in (plain.run_folder / "report.html").read_text()


def shelf_weights(shelf: Workspace) -> list[torch.Tensor]:
    before, _, _ = train_for(shelf, shelf.stage("none"), 0)
    return list(before.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # dynamo looks at torch in ways that torch itself warns of
def test_compiled_blocks_move_the_same_rows(shelf: Workspace) -> None:
    compute = {"threads": 1, "dtype": "float32"}
    runs = []
    for compiled in (False, True):
        raw = shelf.stage(f"compiled-{compiled}", optimizer=MAGNITUDE, compute={**compute, "compile": compiled})
        list(run_stage(shelf.plan(raw), command="test", cache=shelf.cache))
        runs.append(told(Path(raw["output"])))
    for one, two in zip(*runs, strict=True):
        assert two.loss == pytest.approx(one.loss, rel=1e-4)
        assert two.updated_weights == one.updated_weights


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        ({"sparse_update": {"kind": "mofo", "share": 0}}, "optimizer.sparse_update"),
        ({"sparse_update": {"kind": "mofo", "share": "120%"}}, "optimizer.sparse_update"),
        ({"sparse_update": {"kind": "moment"}}, "optimizer.sparse_update"),
        ({"sparse_update": {"kind": "mofo", "shares": 1}}, "shares"),
        ({"loss_adaptive": {"initial_share": 0}}, "optimizer.loss_adaptive.initial_share"),
        ({"loss_adaptive": {"smoothing": 1}}, "optimizer.loss_adaptive.smoothing"),
    ],
)
def test_what_cannot_be_is_refused(shelf: Workspace, optimizer: dict[str, Any], said: str) -> None:
    with pytest.raises(StageError) as error:
        shelf.plan(shelf.stage("wrong", optimizer=optimizer))
    assert said in str(error.value)
