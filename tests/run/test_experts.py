"""Mixtures of experts: the balancing loss is transformers' own and has its own place; routers are trained or frozen."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from postgrad.config.experts_config import ExpertsConfig
from postgrad.data.layouts.rows import IGNORED
from postgrad.data.loading.batch import Batch
from postgrad.distributed.world import World
from postgrad.errors import StageError
from postgrad.evaluation.drift import compute_drift
from postgrad.evaluation.held_out import HeldOutText
from postgrad.hardware.execution import Execution
from postgrad.lineage.record import ChangedWeights, DriftRecord, Record
from postgrad.models.experts import balancing_loss, find_balancing, record_load, router_parameters
from postgrad.models.model import CausalModel
from postgrad.models.task import Task
from postgrad.objectives.balancing import BalancingLoss
from postgrad.reports.sections.drift_section import expert_load_table
from postgrad.run.build import build_run, make_loader
from postgrad.run.routers import choose_balancing
from postgrad.run.tuned_model import make_tuned_model
from postgrad.training.loop import train_steps
from postgrad.training.step import StepReport
from tests.model_families import make_tiny_model, tiny_config
from tests.tiny_models import make_llama, make_tokenizer
from tests.tiny_stages import Workspace, make_workspace, save_model, train_for

FAMILIES = ["mixtral", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "qwen3_next", "deepseek_v4"]


def make(family: str = "mixtral", **changes: Any) -> PreTrainedModel:
    return make_tiny_model(tiny_config(family, **changes), Task.CAUSAL)


def batch_of(sizes: list[int], length: int) -> Batch:
    """Rows of random ids, of which the first `sizes` have labels."""
    ids = torch.randint(5, 300, (len(sizes), length), generator=torch.Generator().manual_seed(1))
    labels = ids.roll(-1, 1)
    for row, size in zip(labels, sizes, strict=True):
        row[size:] = IGNORED
    return Batch({"input_ids": ids}, labels, np.zeros(len(sizes), np.int64), np.array(sizes, np.int64))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_balancing_loss_is_that_of_transformers_without_padding(family: str) -> None:
    pretrained = make(family)
    found = find_balancing(pretrained)
    assert found
    assert not found.is_requested
    model = CausalModel(pretrained)
    model.records_routers = True
    batch = batch_of([12, 5], 12)
    mask = torch.arange(12)[None] < torch.tensor([12, 5])[:, None]
    logits = pretrained(**batch.inputs, output_router_logits=True).router_logits
    theirs = sys.modules[type(pretrained).__module__].load_balancing_loss_func
    wanted = theirs(logits, logits[0].shape[-1], found.top_k, mask.long())
    value = BalancingLoss(0.5, found.top_k)(model(**batch.inputs), batch)
    assert float(value) == pytest.approx(0.5 * 17 * float(wanted), rel=1e-5)
    # The mutants: padding counted, or another number of experts.
    assert float(balancing_loss(logits, found.top_k)) != pytest.approx(float(wanted), rel=1e-3)
    assert float(balancing_loss(logits, 1, mask)) != pytest.approx(float(wanted), rel=1e-3)


def test_models_without_a_balancing_loss_have_none() -> None:
    for pretrained in (make("deepseek_v3"), make_llama()):
        assert find_balancing(pretrained) is None
        assert choose_balancing(None, CausalModel(pretrained)) == (None, ())
        with pytest.raises(StageError, match="no balancing loss"):
            choose_balancing(ExpertsConfig(balancing_loss=0.1), CausalModel(pretrained))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    made = make_workspace(tmp_path_factory.mktemp("experts"), tmp_path_factory.mktemp("cache"))
    for name, on in (("plain", False), ("balanced", True)):
        save_model(make(output_router_logits=on, router_aux_loss_coef=0.5), make_tokenizer(), made.folder / name)
    return made


def steps_of(workspace: Workspace, name: str, **changes: Any) -> list[StepReport]:
    """The reports of two steps of a stage."""
    plan, world = workspace.plan(workspace.stage(name, **changes)), World(torch.device("cpu"))
    execution = Execution("float32", False, "sdpa", 1, 2, False, 0.0)
    run = build_run(plan, make_tuned_model(plan, world), execution, world)
    return [
        report for report in train_steps(run, make_loader(plan, execution, world), 2) if isinstance(report, StepReport)
    ]


def test_a_stage_adds_it_to_the_gradient_and_to_no_other_loss(workspace: Workspace) -> None:
    plain = steps_of(workspace, "plain-run", model="plain")
    balanced = steps_of(workspace, "balanced-run", model="balanced")
    forced = steps_of(workspace, "forced-run", model="plain", experts={"balancing_loss": "config"})
    off = steps_of(workspace, "off-run", model="balanced", experts={"balancing_loss": 0})
    assert plain[0].balancing_loss is None
    assert plain[0].loss == balanced[0].loss
    assert plain[0].losses == balanced[0].losses
    assert plain[0].gradient_norm != pytest.approx(balanced[0].gradient_norm, rel=1e-3)
    # Two experts of four for each token: 2 when balanced, and no less but for correlations.
    assert balanced[0].balancing_loss is not None
    assert balanced[0].balancing_loss > 0.5
    assert [row.balancing_loss for row in forced] == [row.balancing_loss for row in balanced]
    assert [row.loss for row in off] == [row.loss for row in plain]


def test_check_says_whether_it_is_added(workspace: Workspace) -> None:
    model = CausalModel(make(router_aux_loss_coef=0.5))
    assert (
        "router_aux_loss_coef: 0.5 is used with experts.balancing_loss: config"
        in choose_balancing(None, model).notes[0]
    )
    asked = choose_balancing(ExpertsConfig(balancing_loss="config"), model)
    assert asked.loss == BalancingLoss(0.5, 2)
    assert "coefficient of 0.5" in asked.notes[0]


@pytest.mark.parametrize(
    ("tuning", "router", "moves"),
    [
        ({"kind": "full"}, "frozen", False),
        ({"kind": "full"}, None, True),
        ({"kind": "lora", "rank": 2}, "trained", True),
        ({"kind": "lora", "rank": 2}, None, False),
    ],
)
def test_routers_are_trained_or_frozen(
    workspace: Workspace, tuning: dict[str, Any], router: str | None, moves: bool
) -> None:
    experts = {"experts": {"router": router}} if router else {}
    raw = workspace.stage(f"router-{tuning['kind']}-{router}", tuning, model="plain", **experts)
    before, after, run = train_for(workspace, raw, 1)
    routers = router_parameters(run.model.pretrained)
    assert len(routers) == 2
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert (set(routers) <= changed) if moves else not changed & set(routers)
    assert changed - set(routers)


def test_the_grouped_path_equals_the_loop() -> None:
    """With gradients: transformers' default computes all experts of a layer in one product."""
    results = []
    for implementation in ("eager", "grouped_mm"):
        model = make("qwen3_moe")
        model.set_experts_implementation(implementation)
        loss = model(**{key: torch.arange(5, 45)[None] for key in ("input_ids", "labels")}).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 10
    for loop, grouped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, loop, rtol=1e-4, atol=1e-5)


def test_the_load_counts_each_token_once_for_each_of_its_experts() -> None:
    pretrained = make("gpt_oss")
    ids = torch.arange(5, 45)[None]
    with record_load(pretrained) as load, torch.no_grad():
        load.mask_N = torch.arange(40) < 30
        logits = pretrained(input_ids=ids, output_router_logits=True).router_logits
    assert len(load.counts) == 2
    for layer, counts in zip(logits, load.counts.values(), strict=True):
        wanted = torch.bincount(layer.topk(2, -1).indices[:30].flatten(), minlength=4)
        assert counts.tolist() == wanted.tolist()
    assert [sum(shares) for shares in load.shares()] == pytest.approx([1.0, 1.0])


def test_the_load_of_the_experts_is_part_of_the_drift() -> None:
    before, after = make(), make()
    with torch.no_grad():
        for name in router_parameters(after)[:1]:
            after.get_parameter(name).neg_()
    texts = tuple(np.random.default_rng(0).integers(5, 300, 20).astype(np.int64) for _ in range(4))
    held_out = HeldOutText("text", "learned", texts, np.array([60] * 4, np.int64), "f")
    drift = compute_drift(CausalModel(before), CausalModel(after), (held_out, held_out), context=32).summary("learned")
    assert [len(layer) for layer in drift.expert_load_before] == [4, 4]
    assert [sum(layer) for layer in drift.expert_load_after] == pytest.approx([1, 1], abs=1e-4)
    assert drift.expert_load_before[0] != drift.expert_load_after[0]
    record = Record.model_construct(
        drift=DriftRecord(sets={"text": drift}, changed_weights=ChangedWeights(count=1, total=2))
    )
    table = expert_load_table(record)
    assert table
    assert "largest share" in table.html()
    same = compute_drift(CausalModel(before), CausalModel(before), (held_out, held_out), context=32).summary()
    assert same.expert_load_before == same.expert_load_after
