"""Penalties as a part of stages: what they hold, what they refuse, that they resume, and how a strength is found."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from postgrad.check.check import check_stage
from postgrad.cli.render import importance_text
from postgrad.commands.importance import MeasuredImportance, measure_importance
from postgrad.config.penalties import AnchorPenalty
from postgrad.data.loading.batch import Batch
from postgrad.errors import DataError, ModelError, PostgradError, ResumeError, StageError
from postgrad.hardware.execution import Execution
from postgrad.lineage.metrics import StepRow, read_metrics
from postgrad.lineage.record import read_record
from postgrad.lineage.saved_plan import read_plan
from postgrad.models.location import locate_model
from postgrad.models.pretrained import load_pretrained, save_pretrained
from postgrad.penalties.anchor import Anchor
from postgrad.penalties.importance_file import ImportanceFile, ImportanceMetadata, write_importance
from postgrad.run.build import make_loader, make_optimizer
from postgrad.run.events import InfoMessage, WarningMessage
from postgrad.run.penalty_strength import find_strengths, get_stage_penalties
from postgrad.training.step import Run
from postgrad.tuning.open_model import get_task, start_fingerprint
from tests.conftest import make_llama, make_tokenizer
from tests.tiny_stages import LENGTH, QUICK_EVALUATION, Workspace, make_workspace, run_interrupted, run_trace, train_for

ANCHOR = {"kind": "anchor", "strength": 0.5}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("shelf"), tmp_path_factory.getbasetemp() / "cache")


def importance(shelf: Workspace, name: str = "importance", model: str = "llama", **changes: Any) -> str:
    """A file of importance drawn at random."""
    start = locate_model(str(shelf.folder / model), shelf.folder)
    generator = torch.Generator().manual_seed(3)
    made = {n: torch.rand(p.shape, generator=generator) for n, p in load_pretrained(start).model.named_parameters()}
    about = ImportanceMetadata("fisher", "token", 100, model, start_fingerprint(start), 0.5)
    for key, value in changes.items():
        if value is None:
            del made[key]
        else:
            made[key] = value
    path = shelf.folder / f"{name}.safetensors"
    write_importance(path, made, about, torch.float32)
    return str(path)


def told(home: Path) -> list[StepRow]:
    return [row for row in read_metrics(home / "metrics.jsonl") if isinstance(row, StepRow)]


def anchor_of(run: Run) -> Anchor:
    (found,) = get_stage_penalties(run)
    assert isinstance(found, Anchor)
    return found


# -- what it does -----------------------------------------------------------------------------------------------------


def test_no_penalty_and_one_of_strength_zero_are_the_same_to_the_bit(shelf: Workspace) -> None:
    plain = shelf.run(shelf.stage("plain"))
    zero = shelf.run(shelf.stage("zero", penalties=[{**ANCHOR, "strength": 0}]))
    model = "model/model.safetensors"
    assert (plain.run_folder / model).read_bytes() == (zero.run_folder / model).read_bytes()
    held, free = told(zero.run_folder), told(plain.run_folder)
    assert held and all(row.penalties == {"anchor": 0.0} for row in held)
    assert all(row.loss_grad_norm is not None and row.loss_grad_norm == row.grad_norm for row in held)
    assert free and all("loss_grad_norm" not in row.model_fields_set for row in free)
    assert all(row.loss_grad_norm is None for row in free)


def test_an_anchor_holds_the_weights_and_says_its_value(shelf: Workspace) -> None:
    drifts = []
    for strength in (0.0, 1.0, 100.0):
        raw = shelf.stage(f"held-{strength}", penalties=[{**ANCHOR, "strength": strength}])
        before, after, run = train_for(shelf, raw, 6)
        drifts.append(sum(float((after[n] - before[n]).square().sum()) for n in before))
        by_hand = 0.5 * strength * drifts[-1]
        assert float(anchor_of(run)()) == pytest.approx(by_hand, rel=1e-5)
    assert drifts[0] > drifts[1] > drifts[2] > 0


def test_every_key_changes_what_is_trained(shelf: Workspace) -> None:
    elsewhere = shelf.folder / "elsewhere"
    save_pretrained(make_llama(7), make_tokenizer(), elsewhere, dtype=torch.float32)
    weighed = {**ANCHOR, "importance": importance(shelf)}
    other = {
        "strength": (ANCHOR, 2.0),
        "importance": (ANCHOR, weighed["importance"]),
        "normalize": (weighed, True),
        "reference": (ANCHOR, str(elsewhere)),
        "decoupled": (ANCHOR, True),
        "targets": (ANCHOR, ["model.layers"]),
        "storage": (ANCHOR, "bfloat16"),
    }
    assert other.keys() == AnchorPenalty.model_fields.keys() - {"kind"}

    def after(penalty: dict[str, Any]) -> Tensor:
        now = train_for(shelf, shelf.stage("keys", penalties=[penalty]), 3)[1]
        return torch.cat([t.flatten() for t in now.values()])

    plain, again, by_weight = after(ANCHOR), after(ANCHOR), after(weighed)
    assert torch.equal(plain, again)  # so that a difference is the key's
    for key, (penalty, value) in other.items():
        without = plain if penalty is ANCHOR else by_weight
        assert not torch.equal(after({**penalty, key: value}), without), key


def by_torch(model: PreTrainedModel) -> torch.optim.AdamW:
    """What moves the weights, without any part of ours."""
    table = model.get_input_embeddings().weight
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2 and p is not table], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2 or p is table], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)


def mean_loss(model: PreTrainedModel, batches: Iterable[Batch]) -> Tensor:
    """That of the next token, over a step's micro-batches."""
    loss, count = torch.zeros(()), 0
    for batch in batches:
        logits = model(**batch.inputs, use_cache=False).logits
        loss = loss + torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100, reduction="sum"
        )
        count += batch.label_count
    return loss / count


def test_a_step_is_that_of_the_sum_of_loss_and_term(shelf: Workspace) -> None:
    """The whole composition, held against torch alone: next token, replay and an anchor with importance."""
    file = importance(shelf)
    raw = shelf.stage("sum", penalties=[{**ANCHOR, "importance": file, "reference": str(shelf.folder / "llama")}])
    _, after, _ = train_for(shelf, raw, 3)
    _, _, run = train_for(shelf, {**raw, "penalties": []}, 0)

    given = load_file(file)
    model = run.model.pretrained
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    plan = shelf.plan(raw)
    loader = make_loader(plan, Execution("float32", False, "sdpa", 1, 4, False, 0.0), run.world)
    optimizer = by_torch(model)
    for step in (1, 2, 3):
        loss = mean_loss(model, loader.read_batches(step))
        term = sum((given[n] * (p - start[n]).square()).sum() for n, p in model.named_parameters())
        optimizer.zero_grad()
        (loss + 0.5 * 0.5 * term).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(after[name], p.detach(), atol=5e-5, rtol=1e-4)


def test_it_pulls_beside_replay_distillation_and_low_rank_updates(shelf: Workspace) -> None:
    objectives = [{"kind": "next-token"}, {"kind": "distill", "teacher": "start", "weight": 0.5, "on": ["old"]}]
    changes: dict[str, Any] = {"objectives": objectives, "tuning": {"kind": "lora", "rank": 2}}
    finals = []
    for strength in (0.0, 50.0):
        place = shelf.run(
            shelf.stage(f"all-{strength}", penalties=[{**ANCHOR, "strength": strength}], **changes)
        ).run_folder
        rows = told(place)
        assert all(row.losses_by_objective.keys() == {"next-token", "distill"} for row in rows)
        finals.append((rows[-1].losses_by_objective["distill"], rows[-1].penalties["anchor"]))
    assert finals[1][0] < finals[0][0] and finals[1][1] > finals[0][1] == 0.0


TUNED = [
    {"kind": "full"},
    {"kind": "blocks", "last": 1},
    {"kind": "blocks", "last": 2, "unfreeze_every": "2 steps"},
    {"kind": "norm"},
    {"kind": "head", "untie": True},
    {"kind": "lora", "rank": 2},
    {"kind": "lora", "rank": 2, "variant": "dora"},
    {"kind": "lora", "rank": 2, "variant": "pissa"},
    {"kind": "lora", "rank": 2, "also_train": ["model.norm.weight"]},
    {"kind": "osf"},
    {"kind": "adapter", "variant": "houlsby", "size": 4},
    {"kind": "expand", "positions": [0], "also_train": ["model.norm.weight"]},
    {"kind": "p-tuning", "template": "{2} {x}", "encoder": "mlp", "hidden": 8, "backbone": "trained"},
]


def name_of(tuning: dict[str, Any]) -> str:
    words = "-".join(str(v) for v in tuning.values() if isinstance(v, str)) + (
        "-also" if "also_train" in tuning else ""
    )
    return re.sub(r"[^\w-]+", "-", words)


@pytest.mark.parametrize("tuning", TUNED, ids=name_of)
def test_under_every_tuning_the_value_is_that_of_what_leaves(shelf: Workspace, tuning: dict[str, Any]) -> None:
    """The effective weights, as merging or saving gives them, less those of the start model."""
    raw = shelf.stage(f"effect-{name_of(tuning)}", tuning, penalties=[ANCHOR])
    _, _, run = train_for(shelf, raw, 4)
    anchor = anchor_of(run)
    value = float(anchor())
    start = dict(
        load_pretrained(locate_model(str(shelf.folder / "llama"), shelf.folder)).model.named_parameters(
            remove_duplicate=False
        )
    )
    if tuning["kind"] in ("lora", "osf"):
        run.weights.tuning.merge()
    now = {n.replace(".base_layer.", "."): p.detach() for n, p in run.model.pretrained.named_parameters()}
    if tuning["kind"] == "expand":
        now = {n: p for n, p in now.items() if n == "model.norm.weight"}
    changed = {n: p - start[n].detach() for n, p in now.items() if n in start and p.shape == start[n].shape}
    by_hand = 0.25 * sum(float(d.double().square().sum()) for d in changed.values())
    assert by_hand > 0
    assert value == pytest.approx(by_hand, rel=2e-3)


@pytest.mark.parametrize("storage", ["auto", "float32", "bfloat16", "mmap"])
def test_how_it_is_stored_makes_no_difference_beyond_rounding(shelf: Workspace, storage: str) -> None:
    file = importance(shelf)
    raw = shelf.stage(f"stored-{storage}", penalties=[{**ANCHOR, "importance": file, "storage": storage}])
    before, _, run = train_for(shelf, raw, 3)
    anchor = anchor_of(run)
    numbers = sum(p.numel() for p in run.model.pretrained.parameters())
    size = {"auto": 4, "float32": 4, "bfloat16": 2, "mmap": 0}[storage]
    held = anchor.metadata["bytes"]
    ones = sum(p.numel() for n, p in run.model.pretrained.named_parameters() if "norm" in n)  # exact in bf16
    spared = 2 * ones if storage == "auto" else 0
    assert held == {
        "reference": size * numbers - spared,
        "importance": size * numbers,
        "mmap": (4 + 4) * numbers * (size == 0),
    }
    exact = train_for(shelf, {**raw, "penalties": [{**ANCHOR, "importance": file}]}, 3)[1]
    mine = {n: p.detach() for n, p in run.model.pretrained.named_parameters()}
    off, far = (sum(float((mine[n] - other[n]).abs().sum()) for n in mine) for other in (exact, before))
    assert off == 0 if storage != "bfloat16" else 0 < off < 0.1 * far


def test_auto_stores_in_bf16_what_is_exact_there(shelf: Workspace, tmp_path: Path) -> None:
    model = make_llama().bfloat16()
    save_pretrained(model, make_tokenizer(), tmp_path / "short", dtype=torch.bfloat16)
    raw = shelf.stage("short", penalties=[ANCHOR], model=str(tmp_path / "short"))
    _, _, run = train_for(shelf, raw, 0)
    assert anchor_of(run).metadata["bytes"]["reference"] == 2 * sum(p.numel() for p in model.parameters())  # type: ignore[index]
    assert float(anchor_of(run)()) == 0.0


def test_only_some_weights_are_held_when_they_are_named(shelf: Workspace) -> None:
    raw = shelf.stage("only", penalties=[{**ANCHOR, "strength": 1e6, "targets": ["*embed_tokens*", "model.layers.0"]}])
    before, after, _ = train_for(shelf, raw, 2)
    moved = {n: float((after[n] - before[n]).abs().max()) for n in before}
    assert moved["model.layers.1.mlp.up_proj.weight"] > 1e-2
    names = anchor_of(train_for(shelf, raw, 0)[2]).metadata
    assert names["tensors"] == 1 + 9


def test_normalised_importance_has_mean_one(shelf: Workspace) -> None:
    file = importance(shelf)
    values = []
    for normalise in (False, True):
        raw = shelf.stage("mean", penalties=[{**ANCHOR, "importance": file, "normalize": normalise}])
        _, _, run = train_for(shelf, raw, 0)
        for master in run.weights.masters:
            master.detach().add_(0.1)
        values.append(float(anchor_of(run)()))
        mean = anchor_of(run).metadata["importance"]["mean"]  # type: ignore[index]
    numbers = sum(m.numel() for m in run.weights.masters)
    assert values[1] == pytest.approx(0.25 * numbers * 0.01, rel=1e-4)
    assert values[0] == pytest.approx(mean * values[1], rel=1e-4)


def test_another_reference_is_pulled_to(shelf: Workspace) -> None:
    one = shelf.run(shelf.stage("first"))
    for tuning in (None, {"kind": "lora", "rank": 2}):
        raw = shelf.stage("second", tuning, penalties=[{**ANCHOR, "reference": str(one.run_folder)}])
        _, _, run = train_for(shelf, raw, 0)
        target = load_pretrained(locate_model(str(one.run_folder), shelf.folder)).model
        start = load_pretrained(locate_model(str(shelf.folder / "llama"), shelf.folder)).model
        there, here = dict(target.named_parameters()), dict(start.named_parameters())
        names = [n for n in here if tuning is None or ("_proj" in n)]
        by_hand = 0.25 * sum(float((here[n] - there[n]).detach().double().square().sum()) for n in names)
        assert float(anchor_of(run)()) == pytest.approx(by_hand, rel=1e-4)


def test_a_new_task_layer_is_left_out_and_said(shelf: Workspace) -> None:
    raw = shelf.stage(
        "task",
        model="bert",
        sources=[shelf.source("labelled", "labelled")],
        objectives=[{"kind": "classify"}],
        penalties=[ANCHOR],
        evaluation={},
    )
    _, _, run = train_for(shelf, raw, 2)
    skipped = anchor_of(run).metadata["skipped"]
    assert any(str(name).startswith("classifier.weight") for name in skipped)  # type: ignore[attr-defined]


# -- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tuning",
    [
        {"kind": "expand", "positions": [0]},
        {"kind": "adapter", "size": 4},
        {"kind": "prefix", "length": 3, "hidden": 8},
        {"kind": "prompt", "length": 3},
    ],
    ids=name_of,
)
def test_what_changes_no_weight_of_the_base_cannot_be_anchored(shelf: Workspace, tuning: dict[str, Any]) -> None:
    with pytest.raises(StageError, match=r"penalties\[0\][\s\S]*changes no weight[\s\S]*distillation"):
        train_for(shelf, shelf.stage("nothing", tuning, penalties=[ANCHOR]), 0)


def test_importance_of_another_model_is_refused_with_both_fingerprints(shelf: Workspace) -> None:
    one = shelf.run(shelf.stage("first"))
    raw = shelf.stage("wrong", penalties=[{**ANCHOR, "importance": importance(shelf)}], model=str(one.run_folder))
    with pytest.raises(DataError) as caught:
        train_for(shelf, raw, 0)
    for start in (shelf.folder / "llama", one.run_folder):
        assert str(start_fingerprint(locate_model(str(start), shelf.folder))) in str(caught.value)
    raw["penalties"][0]["reference"] = str(shelf.folder / "llama")  # the hint that it names
    train_for(shelf, raw, 0)


def test_importance_of_another_shape_is_refused_with_both_shapes(shelf: Workspace) -> None:
    file = importance(shelf, "bent", **{"model.norm.weight": torch.ones(7)})
    with pytest.raises(DataError, match=r"model\.norm\.weight has shape \(7,\), and the weight \(32,\)"):
        train_for(shelf, shelf.stage("bent", penalties=[{**ANCHOR, "importance": file}]), 0)


def test_a_weight_without_importance_is_left_out_and_said(shelf: Workspace) -> None:
    file = importance(shelf, "less", **{"model.norm.weight": None})
    _, _, run = train_for(shelf, shelf.stage("less", penalties=[{**ANCHOR, "importance": file}]), 0)
    assert anchor_of(run).metadata["skipped"] == ["model.norm.weight (no importance)"]


def test_a_reference_of_another_shape_is_refused(shelf: Workspace, tmp_path: Path) -> None:
    save_pretrained(make_llama(intermediate_size=48), make_tokenizer(), tmp_path / "wide", dtype=torch.float32)
    raw = shelf.stage("wide", penalties=[{**ANCHOR, "reference": str(tmp_path / "wide")}])
    with pytest.raises(ModelError, match=r"\(64, 32\) in this run and \(48, 32\)"):
        train_for(shelf, raw, 0)


def test_rows_that_the_reference_lacks_are_held_to_nothing(shelf: Workspace, tmp_path: Path) -> None:
    small = make_llama()
    tokenizer = make_tokenizer()
    save_pretrained(small, tokenizer, tmp_path / "small", dtype=torch.float32)
    longer = make_llama()
    longer.resize_token_embeddings(328, mean_resizing=False)
    save_pretrained(longer, tokenizer, tmp_path / "longer", dtype=torch.float32)
    raw = shelf.stage("rows", penalties=[{**ANCHOR, "reference": str(tmp_path / "small")}])
    _, _, run = train_for(shelf, {**raw, "model": str(tmp_path / "longer")}, 0)
    anchor = anchor_of(run)
    assert anchor.metadata["skipped"] == [
        "8 rows of model.embed_tokens.weight (not in " + str(tmp_path / "small") + ")"
    ]
    for master in run.weights.masters:
        master.detach().add_(0.1)
    numbers = sum(p.numel() for p in small.parameters())
    assert float(anchor()) == pytest.approx(0.25 * numbers * 0.01, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"targets": ["*embedd_tokens*"]}, r"penalties\[0\]\.targets[\s\S]*matches no trained weight"),
        ({"importance": "nowhere.safetensors"}, r"penalties\[0\]\.importance[\s\S]*postgrad importance MODEL"),
        ({"reference": "nowhere"}, r"penalties\[0\]\.reference: there is no folder nowhere"),
        ({"reference": ""}, r"penalties\[0\]\.reference: the name of the model is empty"),
        ({"strength": 1e308}, r"penalties\[0\]\.strength: input should be less than or equal to 10+, not 1e\+308"),
        ({"strength": "automatic"}, r"penalties\[0\]\.strength: input should be 'auto', not 'automatic'"),
        ({"strength": "-1"}, r"penalties\[0\]\.strength: input should be greater than or equal to 0, not '-1'"),
    ],
)
def test_mistakes_are_named(shelf: Workspace, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PostgradError, match=said):
        train_for(shelf, shelf.stage("mistaken", penalties=[{**ANCHOR, **changes}]), 0)


def test_a_decoupled_pull_of_low_rank_updates_is_refused(shelf: Workspace) -> None:
    raw = shelf.stage("apart", {"kind": "lora", "rank": 2}, penalties=[{**ANCHOR, "decoupled": True}])
    with pytest.raises(StageError, match="trains tensors that change them"):
        train_for(shelf, raw, 0)


def test_what_is_no_importance_is_refused(shelf: Workspace) -> None:
    file = str(shelf.folder / "llama" / "model.safetensors")
    with pytest.raises(DataError, match="no valid importance metadata"):
        train_for(shelf, shelf.stage("none", penalties=[{**ANCHOR, "importance": file}]), 0)
    (shelf.folder / "broken.safetensors").write_bytes(b"no tensors")
    with pytest.raises(DataError, match="the importance file is unreadable"):
        train_for(
            shelf,
            shelf.stage("none", penalties=[{**ANCHOR, "importance": str(shelf.folder / "broken.safetensors")}]),
            0,
        )


# -- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"penalties": [ANCHOR]},
        {"penalties": [{**ANCHOR, "decoupled": True, "strength": 5.0}]},
        {"penalties": [{**ANCHOR, "strength": "auto"}], "tuning": {"kind": "lora", "rank": 2}},
        {"penalties": [{**ANCHOR, "strength": "auto"}, {**ANCHOR, "storage": "mmap"}]},
    ],
    ids=["l2-sp", "decoupled", "auto-lora", "two"],
)
def test_killed_and_stopped_it_ends_with_the_same_bits(shelf: Workspace, changes: dict[str, Any]) -> None:
    whole = shelf.run(shelf.stage("whole", **changes, output=str(shelf.folder / "runs" / f"whole-{len(str(changes))}")))
    parts = run_interrupted(
        shelf, shelf.stage("whole", **changes, output=str(shelf.folder / "runs" / f"parts-{len(str(changes))}"))
    )
    assert run_trace(parts.run_folder) == run_trace(whole.run_folder)
    assert parts.record.penalties == whole.record.penalties


def test_importance_that_has_changed_is_refused_on_resume(shelf: Workspace) -> None:
    file = importance(shelf, "changing")
    raw = shelf.stage("changing", penalties=[{**ANCHOR, "importance": file}])
    place = shelf.run(raw).run_folder
    (place / "record.json").unlink()
    importance(shelf, "changing", **{"model.norm.weight": torch.ones(32)})
    with pytest.raises(ResumeError, match="penalties"):
        shelf.run(raw)


# -- strengths --------------------------------------------------------------------------------------------------------


def test_a_strength_is_found_once_and_kept(shelf: Workspace) -> None:
    raw = shelf.stage("auto", penalties=[{**ANCHOR, "strength": "auto"}])
    events = shelf.run_events(raw)
    (said,) = [e.message for e in events if isinstance(e, InfoMessage)]
    kept = read_plan(shelf.folder / "runs" / "auto").penalty_strengths["anchor"]
    assert f"{kept['strength']:.3g}" in said and kept["strength"] > 0
    assert kept["strength"] == pytest.approx(kept["gradient_norm"] / kept["unit_penalty_norm"], rel=5e-3)
    record = read_record(shelf.folder / "runs" / "auto")
    assert record.penalties[0].strength == kept["strength"]
    number = shelf.run(shelf.stage("number", penalties=[{**ANCHOR, "strength": kept["strength"]}]))
    model = "model/model.safetensors"
    assert (number.run_folder / model).read_bytes() == (shelf.folder / "runs" / "auto" / model).read_bytes()


def test_a_strength_is_that_of_a_probe_written_by_hand(shelf: Workspace) -> None:
    """8 steps at the peak are tried, and all rates come to 4 times as much: weights that wander get sqrt(4) times as far."""
    file, auto = importance(shelf), {**ANCHOR, "strength": "auto"}
    weighed, apart = {**auto, "importance": file}, {**auto, "decoupled": True}
    raw = shelf.stage("probe", tokens=44 * 4 * LENGTH, penalties=[auto, weighed, apart])
    for source in raw["data"]["sources"]:
        source["max_passes"] = 100
    plan, rates = shelf.plan(raw), [1e-2] * 20 + [5e-3] * 24
    _, _, run = train_for(shelf, raw, 0)
    loader = make_loader(plan, Execution("float32", False, "sdpa", 1, 4, False, 0.0), run.world)
    names = [penalty.name for penalty in get_stage_penalties(run)]
    found = find_strengths(run, loader, rates, make_optimizer(plan, run.weights, run.optimizer.update_mask))

    model = run.model.pretrained
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    summed = {n: torch.zeros_like(p) for n, p in start.items()}
    optimizer = by_torch(model)
    for step in range(1, 9):
        optimizer.zero_grad()
        mean_loss(model, loader.read_batches(step)).backward()
        for name, p in model.named_parameters():
            summed[name] += p.grad
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    there = {n: p.detach() - start[n] for n, p in model.named_parameters()}
    given = load_file(file)
    norms = [
        float(torch.cat([t.flatten() for t in each]).norm())
        for each in (summed.values(), there.values(), [given[n] * d for n, d in there.items()])
    ]
    push, way, weighed_way = norms[0] / 8, norms[1], norms[2]
    # The decoupled one is held against the mean step over the rate, so the way itself cancels.
    wanted = [push / (2 * way), push / (2 * weighed_way), 1 / (8 * 1e-2 * 2)]
    assert [found[name]["strength"] for name in names] == pytest.approx(wanted, rel=6e-3)  # of three digits


def test_finding_a_strength_leaves_no_trace(shelf: Workspace) -> None:
    raw = shelf.stage("trace", penalties=[{**ANCHOR, "strength": "auto"}])
    plan = shelf.plan(raw)
    before, _, run = train_for(shelf, raw, 0)
    loader = make_loader(plan, Execution("float32", False, "sdpa", 1, 2, False, 0.0), run.world)
    rates = [plan.schedule(step) for step in range(1, plan.steps + 1)]
    found = [
        find_strengths(run, loader, rates, make_optimizer(plan, run.weights, run.optimizer.update_mask))
        for _ in range(2)
    ]
    assert found[0] == found[1]
    assert all(torch.equal(p, before[n]) for n, p in run.model.pretrained.named_parameters())
    assert all(p.grad is None for p in run.model.pretrained.parameters())
    assert run.step == 0 and run.optimizer.update_counts() == {} and not run.trained_tokens_by_source.any()


def test_a_strength_that_drowns_the_loss_is_said_once(shelf: Workspace) -> None:
    def warnings(strength: float) -> list[str]:
        raw = shelf.stage(f"drowned-{strength}", penalties=[{**ANCHOR, "strength": strength}])
        return [e.message for e in shelf.run_events(raw) if isinstance(e, WarningMessage)]

    (said,) = warnings(1e5)
    assert "x that of the losses" in said
    assert warnings(1e-3) == []


def drift(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    return sum(float((after[n] - before[n]).square().sum()) for n in before)


def test_a_decoupled_pull_holds_too(shelf: Workspace) -> None:
    drifts = [
        drift(*train_for(shelf, shelf.stage("apart", penalties=[{**ANCHOR, "strength": s, "decoupled": True}]), 6)[:2])
        for s in (0.0, 10.0, 100.0)
    ]
    free = drift(*train_for(shelf, shelf.stage("apart"), 6)[:2])
    assert drifts[0] == free > drifts[1] > drifts[2]


# -- beforehand -------------------------------------------------------------------------------------------------------


def test_check_says_what_is_held_and_what_it_costs(shelf: Workspace) -> None:
    file = importance(shelf)
    penalties = [{**ANCHOR, "importance": file}, {"kind": "anchor", "strength": "auto", "storage": "mmap"}]
    found = check_stage(shelf.plan(shelf.stage("checked", penalties=penalties)), cache=shelf.cache)
    numbers = found["parameters"]
    first, second = found["penalties"]
    assert first["weights"] == second["weights"] == numbers
    assert first["bytes"]["importance"] == 4 * numbers and second["bytes"]["mmap"] == 4 * numbers
    assert first["seconds"] > 0 and (first["share"] is None or first["share"] > 0)
    assert " ms per step" in found["text"]
    assert "penalty anchor 1: " in found["text"] and "importance: fisher of 100 tokens, mean 0.5" in found["text"]
    assert "strength auto, from" in found["text"] and "memory-mapped from files" in found["text"]


def test_check_says_that_low_rank_updates_need_no_copies(shelf: Workspace) -> None:
    found = check_stage(
        shelf.plan(shelf.stage("free", {"kind": "lora", "rank": 2}, penalties=[ANCHOR])), cache=shelf.cache
    )
    assert "no copies" in found["text"]
    assert found["penalties"][0]["bytes"] == {"reference": 0, "importance": 0, "mmap": 0}


def test_what_cannot_be_mapped_is_copied_and_said(shelf: Workspace) -> None:
    first = shelf.run(shelf.stage("lora-first", {"kind": "lora", "rank": 2})).run_folder
    raw = shelf.stage("on-lora", penalties=[{**ANCHOR, "storage": "mmap"}], model=str(first))
    about = anchor_of(train_for(shelf, raw, 0)[2]).metadata
    (note,) = about["notes"]  # type: ignore[misc]
    assert "copied instead of mapped" in str(note) and about["bytes"]["mmap"] == 0  # type: ignore[index]


def test_check_tells_what_is_wrong(shelf: Workspace) -> None:
    file = importance(shelf, "bent", **{"model.norm.weight": torch.ones(7)})
    with pytest.raises(DataError, match=r"model\.norm\.weight has shape \(7,\)"):
        check_stage(shelf.plan(shelf.stage("bent", penalties=[{**ANCHOR, "importance": file}])), cache=shelf.cache)


# -- importance, measured ---------------------------------------------------------------------------------------------


def measure(shelf: Workspace, model: str, file: str, out: str, **changes: Any) -> MeasuredImportance:
    options: dict[str, Any] = {
        "out": shelf.folder / out, "tokens": "200", "context": 48, "force": True,
    }  # fmt: skip
    said: list[tuple[int, int]] = []
    found = measure_importance(
        model,
        [file],
        **{**options, **changes},
        cache=shelf.cache,
        progress=lambda done, total: said.append((done, total)),
    )
    assert said and said[-1][0] <= said[-1][1]
    return found


def test_importance_is_not_written_over_a_folder(shelf: Workspace) -> None:
    with pytest.raises(StageError, match="is a folder") as caught:
        measure(shelf, str(shelf.folder / "llama"), shelf.file("old"), "llama")
    assert caught.value.where == "--out" and (shelf.folder / "llama" / "config.json").exists()


@pytest.mark.parametrize("kind", ["fisher", "empirical", "mas"])
@pytest.mark.parametrize(
    ("model", "file"), [("llama", "old"), ("llama", "instruction"), ("bert", "old"), ("t5", "old"), ("t5", "pair")]
)
def test_importance_is_measured_and_read_by_an_anchor(shelf: Workspace, model: str, file: str, kind: str) -> None:
    out = f"{model}-{file}-{kind}.safetensors"
    found = measure(shelf, str(shelf.folder / model), shelf.file(file), out, kind=kind)
    made = ImportanceFile(shelf.folder / out)
    start = locate_model(str(shelf.folder / model), shelf.folder)
    weights = dict(load_pretrained(start, get_task(start)).model.named_parameters())
    assert {n: made.shape(n) for n in made.names} == {n: tuple(p.shape) for n, p in weights.items()}
    assert (
        made.metadata.fingerprint == start_fingerprint(start)
        and made.metadata.kind == kind
        and made.metadata.per == "token"
    )
    assert made.metadata.tokens >= 200 and made.metadata.mean > 0 and made.metadata.convergence
    assert all((made[n] >= 0).all() for n in made.names)
    told = sum(float(made[n].double().sum()) for n in made.names) / sum(p.numel() for p in weights.values())
    assert told == pytest.approx(made.metadata.mean) == pytest.approx(found.metadata.mean)
    if model == "llama" and file == "old":
        raw = shelf.stage(f"by-{kind}", penalties=[{**ANCHOR, "importance": str(shelf.folder / out)}])
        assert anchor_of(train_for(shelf, raw, 0)[2]).metadata["skipped"] == []


@pytest.mark.parametrize("rows", ["labelled", "multi", "numbered", "tagged"])
def test_importance_of_a_classifier(shelf: Workspace, rows: str) -> None:
    raw = shelf.stage(
        f"classifier-{rows}",
        model="bert",
        sources=[shelf.source(rows, "tagged" if rows == "tagged" else "labelled")],
        objectives=[{"kind": "classify"}],
        tokens=20,
        evaluation=QUICK_EVALUATION
        | {"learned": [{"name": "x", "path": shelf.file(rows, held_out=True), "same_format_as": rows}]},
    )
    place = shelf.run(raw).run_folder
    for kind in ("fisher", "empirical", "mas"):
        found = measure(shelf, str(place), shelf.file(rows), f"{rows}-{kind}.safetensors", kind=kind, tokens="30")
        assert found.metadata.per == "label" and found.metadata.mean > 0
        assert any(part.part == "classifier.weight" and part.share > 0 for part in found.parts)


def test_older_importance_decays(shelf: Workspace) -> None:
    llama = str(shelf.folder / "llama")
    measure(shelf, llama, shelf.file("old"), "one.safetensors")
    measure(shelf, llama, shelf.file("new"), "two.safetensors")
    found = measure(
        shelf, llama, shelf.file("new"), "both.safetensors", accumulate=shelf.folder / "one.safetensors", decay=0.5,
        dtype="bfloat16",
    )  # fmt: skip
    one, two, both = (ImportanceFile(shelf.folder / f"{name}.safetensors") for name in ("one", "two", "both"))
    for name in one.names:
        torch.testing.assert_close(both[name], (0.5 * one[name] + two[name]).bfloat16())
    assert (
        both.metadata.onto is not None and both.metadata.onto["model"] == llama and both.metadata.onto["decay"] == 0.5
    )
    assert "added to 0.5 x the importance measured on" in importance_text(found)


def test_older_importance_of_other_weights_is_refused(shelf: Workspace) -> None:
    llama = str(shelf.folder / "llama")
    older = importance(shelf, "older", **{"model.norm.weight": torch.ones(7)})
    with pytest.raises(DataError, match=r"model\.norm\.weight has shape \(7,\), this model's weight \(32,\)"):
        measure(shelf, llama, shelf.file("old"), "no.safetensors", accumulate=Path(older))
    measure(shelf, str(shelf.folder / "bert"), shelf.file("old"), "bert.safetensors")
    with pytest.raises(DataError, match=r"lacks|has bert"):
        measure(shelf, llama, shelf.file("old"), "no.safetensors", accumulate=shelf.folder / "bert.safetensors")
    with pytest.raises(DataError, match="is fisher, and this one mas"):
        measure(shelf, llama, shelf.file("old"), "no.safetensors", accumulate=Path(importance(shelf)), kind="mas")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "fischer"}, "did you mean 'fisher'"),
        ({"dtype": "float16"}, "float32, bfloat16"),
        ({"decay": 2.0}, "0 to 1"),
        ({"tokens": "many"}, "a number of tokens"),
        ({"tokens": "0"}, "a number of tokens"),
        ({"out": "nowhere/x.safetensors"}, "no folder"),
        ({"document_unit": "page"}, "passages"),
    ],
    ids=lambda x: "" if isinstance(x, str) else next(iter(x)),
)
def test_what_cannot_be_measured_is_told(shelf: Workspace, changes: dict[str, Any], said: str) -> None:
    with pytest.raises((StageError, DataError), match=said):
        measure(shelf, str(shelf.folder / "llama"), shelf.file("old"), **{"out": "no.safetensors", **changes})


def test_a_file_is_not_overwritten_without_a_word(shelf: Workspace) -> None:
    file = importance(shelf)
    with pytest.raises(StageError, match="--force"):
        measure(shelf, str(shelf.folder / "llama"), shelf.file("old"), Path(file).name, force=False)


def test_importance_of_a_model_in_which_an_adapter_stands_is_refused(shelf: Workspace) -> None:
    place = shelf.run(shelf.stage("standing", {"kind": "adapter", "size": 4})).run_folder
    with pytest.raises(ModelError, match="importance is measured on plain weights"):
        measure(shelf, str(place), shelf.file("old"), "no.safetensors")
