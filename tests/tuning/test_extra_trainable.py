"""Do weights that move extra a tuning's own come and go with it, wherever they are held?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from postgrad.errors import TuningError
from postgrad.tuning.extra_trainable import ExtraTrainable
from postgrad.tuning.lora import LoraAdapter
from tests.tuning.families import batch, build_model, logits


def moved(model: PreTrainedModel, extra: ExtraTrainable) -> dict[str, torch.Tensor]:
    """The values that the parameters were given."""
    for parameter in extra.tensors().values():
        parameter.data.mul_(1.5).add_(0.1)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_only_what_is_named_moves_and_goes_back() -> None:
    model = build_model("llama", "lm")
    model.model.norm.requires_grad_(False)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    extra = ExtraTrainable(model, ["*norm*"])
    assert extra.names == [name for name in before if "norm" in name]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(extra.names)
    after = moved(model, extra)
    with extra.use_initial_values():
        assert all(torch.equal(p, before[name][0]) for name, p in model.named_parameters())
    assert all(torch.equal(p, after[name]) for name, p in model.named_parameters())
    with pytest.raises(InterruptedError), extra.use_initial_values():
        raise InterruptedError
    assert all(torch.equal(p, after[name]) for name, p in model.named_parameters())
    extra.restore_values()
    extra.restore_requires_grad()
    assert all(torch.equal(p, before[name][0]) for name, p in model.named_parameters())
    assert all(p.requires_grad == before[name][1] for name, p in model.named_parameters())


def test_a_task_layer_has_no_value_to_go_back_to() -> None:
    model = build_model("bert", "classify")
    extra = ExtraTrainable(model, ["classifier", "bert.pooler"])
    after, base = moved(model, extra), build_model("bert", "classify")
    extra.restore_values()
    for name, parameter in model.named_parameters():
        expected = after[name] if name.startswith("classifier") else base.get_parameter(name)
        assert torch.equal(parameter, expected)


def test_a_language_model_s_head_has_one() -> None:
    model = build_model("llama", "lm")
    extra = ExtraTrainable(model, ["lm_head"])
    moved(model, extra)
    extra.restore_values()
    assert torch.equal(model.lm_head.weight, build_model("llama", "lm").lm_head.weight)


def test_a_name_that_matches_nothing_is_refused_before_anything_changes() -> None:
    model = build_model("llama", "lm")
    with pytest.raises(TuningError, match="'nothing' matches no parameter"):
        ExtraTrainable(model, ["*norm*", "nothing"])
    assert all(p.requires_grad for p in model.parameters())


def test_weights_held_in_bf16_come_and_go() -> None:
    model = build_model("llama", "lm")
    extra = ExtraTrainable(model, ["model.norm"])
    model.model.norm.weight.data = model.model.norm.weight.data.bfloat16()
    after = moved(model, extra)["model.norm.weight"]
    with extra.use_initial_values():
        assert torch.equal(model.model.norm.weight, build_model("llama", "lm").model.norm.weight.bfloat16())
    assert torch.equal(model.model.norm.weight, after)


def sharded(rank: int, ranks: int, meeting: str) -> None:
    """On one of `ranks`: weights that move extra come and go between forward passes of a sharded model."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    model, inputs = build_model("llama", "lm"), batch("llama", "lm")
    base = logits(model, inputs)
    tuning = LoraAdapter(model, rank=2, also_train=["model.norm"])
    mesh = init_device_mesh("cpu", (ranks,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model.model.norm.weight, DTensor)
    moved(model, tuning.extra_trainable)
    answer = logits(model, inputs)
    assert not torch.equal(answer, base)
    for gathered in (True, False):
        if not gathered:
            model.reshard()
        with tuning.disable():
            assert torch.equal(logits(model, inputs), base)
        model.reshard()
        assert torch.equal(logits(model, inputs), answer)
    dist.destroy_process_group()


def test_sharded_weights_come_and_go(tmp_path: Path) -> None:
    sharded(0, 1, str(tmp_path / "meeting"))


@pytest.mark.slow
def test_weights_sharded_over_two_ranks_come_and_go(tmp_path: Path) -> None:
    """After a forward pass FSDP still holds the outermost weights gathered, and what is given to those is lost."""
    multiprocessing.spawn(sharded, (2, str(tmp_path / "meeting")), nprocs=2)
