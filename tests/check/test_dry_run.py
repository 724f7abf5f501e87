"""A dry run tells what a step holds, sends and computes on devices that are not here, from a configuration alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from postgrad.check import dry_run
from postgrad.check.dry_run import DryRun, walk_step
from postgrad.errors import StageError
from postgrad.models.model import CausalModel
from tests.conftest import StageOf, make_llama, make_tokenizer
from tests.run.test_run import plan_of
from tests.tiny_models import VOCABULARY

ROWS, LENGTH = 8, 32
REST = "gathered weights, gradients, activations and buffers"


@pytest.fixture
def walk(stage_of: StageOf, cache: Path, tmp_path: Path) -> Any:
    """Walks a stage whose start model has no weights."""
    model = make_llama(num_hidden_layers=4)
    model.config.save_pretrained(tmp_path / "config-only")
    make_tokenizer().save_pretrained(tmp_path / "config-only")

    def walk(ranks: int, device: str = "h100", **changes: Any) -> DryRun:
        stage = stage_of(
            model=str(tmp_path / "config-only"), batch={"global_batch_size": ROWS}, compute={"dtype": "float32"}
        )
        return walk_step(plan_of({**stage, **changes}, cache), ranks, device)

    return walk


def count_weights() -> int:
    return sum(p.numel() for p in make_llama(num_hidden_layers=4).parameters())


@pytest.mark.parametrize("ranks", [1, 4])
def test_each_rank_holds_its_part_of_the_state(walk: Any, ranks: int) -> None:
    found, count = walk(ranks), count_weights()
    assert found.memory["weights"] == 4 * count / ranks
    assert found.memory["optimizer states"] == 8 * count / ranks
    assert found.memory[REST] >= 4 * count / ranks  # gradients
    assert found.rows * found.micro_batches * ranks == ROWS
    assert bool(found.collectives) == (ranks > 1)


def test_every_block_is_gathered_twice_and_its_gradients_are_reduced_once(walk: Any) -> None:
    """The root, with the embedding, stays gathered between forward and backward pass."""
    found, count = walk(2), count_weights()
    calls = {kind: each.calls for kind, each in found.collectives.items() if kind != "all-reduce"}
    assert calls == {"all-gather": 2 * 4 + 1, "reduce-scatter": 4 + 1}
    assert found.collectives["reduce-scatter"].bytes == 4 * count


def test_operations_are_those_of_torchs_counter_on_a_real_step(walk: Any) -> None:
    model = CausalModel(make_llama(num_hidden_layers=4)).train()
    ids = torch.randint(5, 300, (ROWS, LENGTH))
    cpu = "_scaled_dot_product_flash_attention_for_cpu"  # for which torch's counter has no formula
    names = {cpu: sdpa_flop, f"{cpu}_backward": sdpa_backward_flop}
    formulas = {getattr(torch.ops.aten, name): partial(formula) for name, formula in names.items()}
    for formula in formulas.values():
        formula._get_raw = True  # takes tensors
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        output = model(input_ids=ids, position_ids=torch.arange(LENGTH).expand_as(ids))
        output.hidden.sum().backward()
    labels = ROWS * (LENGTH - 1)
    assert output.head is not None
    # The head: logits, and a product each for the gradients of hidden states and table.
    products = counter.get_total_flops() + 3 * 2 * labels * output.head.weight_VD.numel()
    assert walk(1).flops == pytest.approx(products, rel=0.01)


@pytest.mark.parametrize("mutant", [None, "everything-counts"])
def test_recomputed_activations_are_not_held(walk: Any, mutant: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if mutant:
        monkeypatch.setattr(dry_run.StorageWeakRef, "expired", lambda self: False)
        monkeypatch.setattr(torch.UntypedStorage, "_new_with_weak_ptr", lambda address: torch.UntypedStorage(2**12))
    plain, less = (walk(1, compute={"dtype": "float32", "activation_checkpointing": on}) for on in (False, True))
    assert (less.memory[REST] < 0.8 * plain.memory[REST]) == (mutant is None)
    assert less.flops > 1.2 * plain.flops


def test_lora_has_the_moments_of_few_weights(walk: Any) -> None:
    full = walk(2)
    lora = walk(2, tuning={"kind": "lora", "rank": 2})
    assert lora.memory["optimizer states"] < 0.3 * full.memory["optimizer states"]


def test_a_step_that_does_not_fit_names_what_helps(walk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    small = dry_run.ACCELERATORS["h100"]._replace(memory=1000)
    monkeypatch.setitem(dry_run.ACCELERATORS, "h100", small)
    found = walk(2)
    assert not found.fits
    assert "compute.activation_checkpointing" in "\n".join(found.lines())


def make_mixture() -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            moe_intermediate_size=16,
            num_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=LENGTH,
        )
    )


@pytest.mark.parametrize("mutant", [None, "groups-are-free"])
def test_a_mixture_of_experts_computes_with_those_of_each_token(
    walk: Any, mutant: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many operations as torch counts in a real step, expert by expert; the state is that of all experts."""
    if mutant:
        monkeypatch.delitem(dry_run._FLOPS, torch.ops.aten._grouped_mm)
    pretrained = make_mixture()
    pretrained.config.save_pretrained(tmp_path / "mixture")
    make_tokenizer().save_pretrained(tmp_path / "mixture")
    pretrained.set_attn_implementation("eager")
    pretrained.set_experts_implementation("eager")
    model = CausalModel(pretrained).train()
    ids = torch.randint(5, 300, (ROWS, LENGTH))
    with FlopCounterMode(display=False) as counter:
        output = model(input_ids=ids, position_ids=torch.arange(LENGTH).expand_as(ids))
        output.hidden.sum().backward()
    assert output.head is not None
    products = counter.get_total_flops() + 3 * 2 * ROWS * (LENGTH - 1) * output.head.weight_VD.numel()
    stage: dict[str, Any] = {"model": str(tmp_path / "mixture"), "compute": {"dtype": "bfloat16"}}
    found, count = walk(1, **stage), sum(p.numel() for p in pretrained.parameters())
    assert found.memory["optimizer states"] == 8 * count
    recomputed_scores = (
        2 * 2 * ROWS * LENGTH**2 * pretrained.config.hidden_size
    )  # by the walk's attention, in its backward
    assert (found.flops == products + recomputed_scores) == (mutant is None)
    if mutant is None:
        assert walk(4, **stage).memory["optimizer states"] == 2 * count
        with pytest.raises(StageError, match=r"compute\.dtype: a dry run walks mixtures of experts in bf16"):
            walk(1, model=stage["model"])


@pytest.mark.parametrize(
    ("ranks", "device", "changes", "message"),
    [
        (2, "z80", {}, "z80"),
        (3, "h100", {}, "3 ranks"),
        (4, "h100", {"parallel": {"replicate": 3}}, "replicate: 3"),
        (2, "h100", {"tuning": {"kind": "lora", "rank": 2, "variant": "pissa"}}, "computes from the weights"),
    ],
)
def test_what_cannot_be_walked_is_an_error(
    walk: Any, ranks: int, device: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(StageError, match=message):
        walk(ranks, device, **changes)
    assert not torch.distributed.is_initialized()
