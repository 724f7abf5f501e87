"""The probe for isolation: small leaks, leaks of long rows only, and the layer that is the cause."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from postgrad.errors import ModelError
from postgrad.models import isolation
from postgrad.models.isolation import Leak, find_leak
from postgrad.models.model import CausalModel, verify_model
from tests.conftest import make_llama
from tests.tiny_models import make_unpacked

CAUSES = {
    "mamba2": ("Mamba2Mixer", "a recurrent layer"),
    "falcon_h1": ("FalconH1Mixer", "a recurrent layer"),
    "qwen3_next": ("Qwen3NextGatedDeltaNet", "a recurrent layer"),
    "lfm2": ("Lfm2ShortConv", "a convolution"),
    "gpt_oss": ("GptOssAttention", "attention with sinks"),
    "opt": ("OPTAttention", "attention, which takes no notice"),
    "bloom": ("BloomAttention", "attention with ALiBi"),
}


def leak_of(model: CausalModel, row_length: int = 48) -> Leak | None:
    return find_leak(model.pretrained, model.compute_hidden, row_length)


@pytest.mark.parametrize("family", CAUSES)
def test_the_layer_that_leaks_is_named(family: str) -> None:
    model = CausalModel(make_unpacked(family))
    leak = leak_of(model)
    assert leak is not None and leak.layer == CAUSES[family][0] and leak.cause.startswith(CAUSES[family][1])
    with pytest.raises(ModelError, match=leak.layer) as caught:
        verify_model(model)
    assert caught.value.where == "data.packing" and "data.packing" in caught.value.hint
    verify_model(model, packed=False)


def test_a_convolution_that_changes_few_logits_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: a bound on logits, which a short convolution of small weights keeps to."""
    model = CausalModel(make_unpacked("lfm2"))
    assert leak_of(model)
    monkeypatch.setattr(isolation, "_ROUNDING", 1e-3)
    monkeypatch.setattr(isolation, "_ROUNDING_ALONE", 1e-3)
    assert leak_of(model) is None


class _FarLayer(nn.Module):
    """A layer of a Llama; behind it each token also gets what stands `distance` tokens before."""

    def __init__(self, layer: nn.Module, distance: int) -> None:
        super().__init__()
        self.layer, self.distance = layer, distance

    def forward(self, hidden_BTD: Tensor, **options: Any) -> Tensor:
        out_BTD = self.layer(hidden_BTD, **options)
        out_BTD[:, self.distance :] += hidden_BTD[:, : -self.distance]
        return out_BTD


def test_a_leak_of_long_rows_is_found_at_the_length_of_the_rows() -> None:
    """The mutant: the look at short rows alone."""
    model = make_llama()
    model.model.layers[1] = _FarLayer(model.model.layers[1], 60)  # type: ignore[assignment]
    assert leak_of(CausalModel(model), 48) is None
    leak = leak_of(CausalModel(model), 128)
    assert leak is not None and leak.layer == "_FarLayer"


class _Bidirectional(nn.Module):
    """A layer whose tokens also get the mean of the row."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_BTD: Tensor, **options: Any) -> Tensor:
        return self.layer(hidden_BTD, **options) + hidden_BTD.mean(1, keepdim=True)


def test_padding_that_changes_a_text_is_refused() -> None:
    model = make_llama()
    verify_model(CausalModel(model), packed=False)
    model.model.layers[0] = _Bidirectional(model.model.layers[0])  # type: ignore[assignment]
    with pytest.raises(ModelError, match="what follows a text changes its states"):
        verify_model(CausalModel(model), packed=False)


def test_the_probe_leaves_the_model_as_it_was() -> None:
    model = CausalModel(make_unpacked("opt")).train()
    assert leak_of(model) and model.pretrained.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()
