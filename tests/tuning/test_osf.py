"""Does orthogonal subspace fine-tuning keep the directions that it promises to keep, and every promise of a tuning?

Legend: O outputs and I inputs of a layer, H directions kept, L directions trained.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from peft import OSFConfig, inject_adapter_in_model
from peft.tuners.osf.layer import OSFLayer
from torch import Tensor
from transformers import PreTrainedModel

from postgrad.errors import TuningError
from postgrad.tuning.attach import attach
from postgrad.tuning.lora import LoraAdapter
from postgrad.tuning.osf import FACTORS, OrthogonalSubspace
from postgrad.tuning.targets import resolve_targets
from postgrad.tuning.tuning import Tuning, trainable_parameters
from tests.tuning import checks
from tests.tuning.families import Task, batch, build_model, logits, loss

# The matrix of promises tries every family and task.
CELLS: list[tuple[str, Task]] = [("llama", "lm"), ("bert", "tags"), ("t5", "classify")]
HEADS = {"bert": ["classifier"], "t5": ["classification_head"]}

every_cell = pytest.mark.parametrize(("family", "task"), CELLS)


def attaching(family: str, task: Task, **options: Any) -> functools.partial[OrthogonalSubspace]:
    return functools.partial(OrthogonalSubspace, **{"also_train": [] if task == "lm" else HEADS[family], **options})


def from_options(model: PreTrainedModel, options: Mapping[str, Any]) -> Tuning:
    return attach(model, options)


def halves(weight_OI: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """The kept directions of a weight, (O, H) and (H, I)."""
    u, _, v = torch.linalg.svd(weight_OI, full_matrices=False)
    return u[:, :kept], v[:kept]


# -- the promises of every tuning


@every_cell
def test_trains_only_what_it_should(family: str, task: Task) -> None:
    base = [] if task == "lm" else [f"{head}*" for head in HEADS[family]]
    checks.trains_only_declared(attaching(family, task), family, task, base=base)


@every_cell
def test_starts_equal_to_base(family: str, task: Task) -> None:
    checks.starts_equal_to_base(attaching(family, task), family, task, tolerance=checks.TOLERANCE)


@every_cell
def test_a_batch_is_answered_as_its_rows_are_alone(family: str, task: Task) -> None:
    checks.batch_equals_single_row(attaching(family, task), family, task)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generates_with_a_cache_as_without(family: str) -> None:
    checks.cache_equals_no_cache(attaching(family, "lm"), family)


@pytest.mark.parametrize(("family", "task"), [cell for cell in CELLS if cell[0] != "t5"])
def test_recomputed_gradients_are_the_same(family: str, task: Task) -> None:
    checks.checkpointed_gradients_equal(attaching(family, task), family, task)


@every_cell
def test_saves_and_loads_bit_for_bit(family: str, task: Task) -> None:
    checks.save_load_bit_identical(attaching(family, task), family, task)


@every_cell
def test_resumes_bit_for_bit(family: str, task: Task) -> None:
    checks.resume_exact(attaching(family, task), family, task)


@every_cell
def test_what_is_published_answers_the_same(family: str, task: Task) -> None:
    checks.published_equal(attaching(family, task), from_options, family, task)


@every_cell
def test_merges_into_a_plain_model(family: str, task: Task) -> None:
    checks.merge_exact(attaching(family, task), family, task)


@every_cell
def test_switched_off_it_is_the_base_to_the_bit(family: str, task: Task) -> None:
    checks.off_equals_base(attaching(family, task), family, task)


@every_cell
def test_detached_it_leaves_nothing(family: str, task: Task) -> None:
    checks.detach_restores(attaching(family, task), family, task)


def test_it_leaves_as_a_plain_model() -> None:
    assert OrthogonalSubspace.is_merged_on_export and OrthogonalSubspace.has_exact_merge


# -- what it is


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_gradient_steps_leave_the_kept_directions(share: float) -> None:
    """The update has nothing along a kept direction, on either side; a plain gradient step has."""
    model, plain = build_model("llama", "lm"), build_model("llama", "lm")
    tuning = OrthogonalSubspace(model, effective_rank=share)
    checks.train(model, tuning, "llama", "lm", steps=4)
    tuning.merge()
    loss(plain, batch("llama", "lm")).backward()
    for name in resolve_targets(plain, "all-linear"):
        weight_OI = plain.get_submodule(name).weight
        update_OI = (model.get_submodule(name).weight - weight_OI).detach()
        u_OH, v_HI = halves(weight_OI.detach(), int(share * min(weight_OI.shape)))
        size = update_OI.norm()
        assert size > 1e-4
        assert (u_OH.T @ update_OI).norm() < 1e-4 * size and (update_OI @ v_HI.T).norm() < 1e-4 * size
        assert (u_OH.T @ weight_OI.grad).norm() > 0.2 * weight_OI.grad.norm()


def test_a_step_of_adam_leaves_them_nearly() -> None:
    model, plain = build_model("llama", "lm"), build_model("llama", "lm")
    tuning = OrthogonalSubspace(model)
    adam = torch.optim.AdamW(trainable_parameters(model).values(), lr=5e-3)
    checks.train(model, tuning, "llama", "lm", steps=10, optimizer=adam)
    tuning.merge()
    shares = []
    for name in resolve_targets(plain, "all-linear"):
        weight_OI = plain.get_submodule(name).weight.detach()
        update_OI = (model.get_submodule(name).weight - weight_OI).detach()
        u_OH, v_HI = halves(weight_OI, min(weight_OI.shape) // 2)
        shares.append(
            [(u_OH.T @ update_OI @ v_HI.T).norm() / update_OI.norm(), (u_OH.T @ update_OI).norm() / update_OI.norm()]
        )
    both, left = torch.tensor(shares).mean(0)
    assert both < 0.02 and left < 0.25  # of a random update they would be 0.5 and 0.7


@pytest.mark.parametrize(("family", "task"), [("llama", "lm"), ("bert", "tags"), ("t5", "lm")])
def test_answers_and_gradients_are_peft_s(family: str, task: Task) -> None:
    model, theirs = build_model(family, task), build_model(family, task)
    tuning = OrthogonalSubspace(model)
    inject_adapter_in_model(OSFConfig(effective_rank=0.5, target_modules=resolve_targets(theirs, "all-linear")), theirs)
    inputs = batch(family, task)
    for trial in range(2):
        assert torch.equal(logits(model, inputs), logits(theirs, inputs))
        loss(model, inputs).backward()
        loss(theirs, inputs).backward()
        for name, layer in ((n, m) for n, m in theirs.named_modules() if isinstance(m, OSFLayer)):
            own = tuning._layers[name].tensors()
            for factor in FACTORS:
                other = layer.osf_svd_params["default"][factor]
                size = max(1.0, other.grad.abs().max().item())
                assert (own[factor].grad - other.grad).abs().max() <= 1e-5 * size
                other.data -= 0.1 * other.grad
                own[factor].data.copy_(other.data)
                own[factor].grad = other.grad = None
        assert trial or not torch.equal(logits(theirs, inputs), logits(build_model(family, task), inputs))


def test_weights_held_in_bf16_learn_in_the_same_directions_and_start_at_the_base() -> None:
    """PEFT's projection, a hook on parameters that meets tensors of two dtypes, fails here."""
    model, base, inputs = build_model("llama", "lm"), build_model("llama", "lm"), batch("llama", "lm")
    tuning = OrthogonalSubspace(model)
    full = logits(base, inputs)
    for parameter in (*model.parameters(), *base.parameters()):
        parameter.data = parameter.data.bfloat16()
    expected = logits(base, inputs).float()
    rounding = (expected - full).abs().max()
    assert (
        logits(model, inputs).float() - expected
    ).abs().max() < 0.1 * rounding  # the start is rounded as what is trained
    with tuning.disable():
        assert torch.equal(logits(model, inputs).float(), expected)
    loss(model, inputs).backward()
    shares = []
    for name, layer in tuning._layers.items():
        u_OL = layer.tensors()["U_low"]
        assert u_OL.grad is not None and u_OL.grad.dtype == torch.bfloat16
        weight_OI = build_model("llama", "lm").get_submodule(name).weight.detach()
        u_OH, _ = halves(weight_OI, min(weight_OI.shape) // 2)
        shares.append((u_OH.T @ u_OL.grad.float()).norm() / u_OL.grad.float().norm())
    assert torch.stack(shares).mean() < 1.3e-3  # a rounding to bf16 alone; 0.7 without a projection
    assert all(t.dtype == torch.float32 for name, t in tuning.state().items() if ".start." in name or "high" in name)


def test_the_next_task_decomposes_anew() -> None:
    model = build_model("llama", "lm")
    first = OrthogonalSubspace(model)
    checks.train(model, first, "llama", "lm", steps=3)
    first.merge()
    answer = logits(model, batch("llama", "lm"))
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    second = OrthogonalSubspace(model, effective_rank=0.75)
    checks.train(model, second, "llama", "lm", steps=3, first=20)
    assert not torch.equal(logits(model, batch("llama", "lm")), answer)
    with second.disable():
        assert torch.equal(logits(model, batch("llama", "lm")), answer)
    second.merge()
    name = "model.layers.1.self_attn.q_proj"
    update_OI = model.get_submodule(name).weight.detach() - after[f"{name}.weight"]
    u_OH, _ = halves(after[f"{name}.weight"], 24)
    assert (u_OH.T @ update_OI).norm() < 1e-4 * update_OI.norm()


def test_a_number_of_directions_and_what_moves_besides() -> None:
    model = build_model("llama", "lm")
    before = model.model.norm.weight.detach().clone()
    tuning = OrthogonalSubspace(model, effective_rank=30, targets=["q_proj"], also_train=["model.norm.*"])
    assert {layer.tensors()["S_low"].shape[0] for layer in tuning._layers.values()} == {2}
    checks.train(model, tuning, "llama", "lm", steps=2)
    moved = tuning.state()["model.norm.weight"].clone()
    assert not torch.equal(moved, before)
    with tuning.disable():
        assert torch.equal(model.model.norm.weight, before)
    assert torch.equal(model.model.norm.weight, moved)
    tuning.detach()
    assert torch.equal(model.model.norm.weight, before)


# -- what is refused


def test_gpt2_s_layers_are_refused_where_peft_trains_nothing() -> None:
    theirs = inject_adapter_in_model(OSFConfig(target_modules=["c_attn"]), build_model("gpt2", "lm"))
    assert not any(p.requires_grad for p in theirs.parameters())
    with pytest.raises(TuningError, match=r"(?s)c_attn is a Conv1D.*GPT-2.*lora"):
        OrthogonalSubspace(build_model("gpt2", "lm"))


def test_layers_with_adapters_are_refused() -> None:
    model = build_model("llama", "lm")
    LoraAdapter(model, rank=2, targets=["q_proj"])
    with pytest.raises(TuningError, match="merge the adapter first"):
        OrthogonalSubspace(model)
    OrthogonalSubspace(model, targets=["v_proj"])
    with pytest.raises(TuningError, match="merge the adapter first"):
        OrthogonalSubspace(model, targets=["v_proj"])


@pytest.mark.parametrize("effective_rank", [0, 0.0, 1.0, 1.5, 32, 0.01, -1])
def test_a_side_without_directions_is_refused(effective_rank: float) -> None:
    with pytest.raises(TuningError, match=r"(?s)effective_rank is .*a fraction above 0 and below 1"):
        OrthogonalSubspace(build_model("llama", "lm"), effective_rank=effective_rank)


def test_bf16_and_numbers_that_are_not_finite_are_not_merged() -> None:
    model = build_model("llama", "lm").bfloat16()
    tuning = OrthogonalSubspace(model)
    assert {tensor.dtype for tensor in tuning.state().values()} == {torch.float32}
    with pytest.raises(TuningError, match=r"is torch.bfloat16"):
        tuning.merge()
    model.float()
    tuning.state()["model.layers.0.mlp.up_proj.S_low"][0] = torch.inf
    with pytest.raises(TuningError, match="S_low contains NaN or infinite values"):
        tuning.merge()
