"""The probe for isolation: small leaks, leaks of long rows only, and the layer that is the cause."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from transformers import BioGptConfig, BioGptForCausalLM

from postgrad.data.layouts.rows import Row
from postgrad.data.loading.batch import collate
from postgrad.errors import ModelError
from postgrad.models import isolation
from postgrad.models.cpu_attention import is_supported
from postgrad.models.isolation import Leak, find_leak
from postgrad.models.model import CausalModel, find_model_leak, verify_model
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


class _CarryingLayer(nn.Module):
    """A layer of a Llama; behind it each token also gets the token before, of its document if it is told the borders."""

    def __init__(self, layer: nn.Module, argument: str) -> None:
        super().__init__()
        self.layer, self.argument = layer, argument

    def forward(self, hidden_BTD: Tensor, seq_idx: Tensor | None = None, **options: Any) -> Tensor:
        before_BTD = nn.functional.pad(hidden_BTD, (0, 0, 1, 0))[:, :-1]
        if self.argument == "seq_idx" and seq_idx is not None:
            is_start_BT = nn.functional.pad(seq_idx.diff(dim=1), (1, 0), value=1) != 0
            before_BTD = before_BTD.masked_fill(is_start_BT[..., None], 0)
        if self.argument == "cu_seq_lens_q" and "cu_seq_lens_q" in options:
            before_BTD = before_BTD.index_fill(1, options["cu_seq_lens_q"][:-1].long(), 0)
        if self.argument == "refused" and seq_idx is not None:
            raise ValueError("no kernel keeps packed sequences apart")
        return self.layer(hidden_BTD, **options) + before_BTD


@pytest.mark.parametrize("argument", ["seq_idx", "cu_seq_lens_q"])
def test_recurrent_layers_that_keep_to_borders_are_packed(argument: str) -> None:
    """The states of packed rows are those of each document alone."""
    llama = make_llama()
    llama.model.layers[1] = _CarryingLayer(llama.model.layers[1], argument)  # type: ignore[assignment]
    model = CausalModel(llama)
    assert find_model_leak(model, 48) is None and model.passes_documents
    ids_BT = torch.arange(1, 37).view(2, 18)
    positions_BT = torch.cat([torch.arange(5), torch.arange(13), torch.arange(11), torch.arange(7)]).view(2, 18)
    with torch.no_grad():
        packed_TD = model(input_ids=ids_BT, position_ids=positions_BT).hidden.flatten(0, 1)
        alone = [model(input_ids=ids_T[None]).hidden[0] for ids_T in ids_BT.flatten().split([5, 13, 11, 7])]
    assert torch.allclose(packed_TD, torch.cat(alone), atol=1e-5)
    model.passes_documents = False
    with torch.no_grad():
        leaking_TD = model(input_ids=ids_BT, position_ids=positions_BT).hidden.flatten(0, 1)
    assert not torch.allclose(leaking_TD, torch.cat(alone), atol=1e-3), "the mutant: borders that are not passed"


def _fake(module: nn.Module, mode: FakeTensorMode) -> None:
    """Replace a module's tensors by ones without values."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    fake = mode.from_tensor(tensor.detach())
                    tensors[name] = nn.Parameter(fake) if isinstance(tensor, nn.Parameter) else fake


def test_borders_of_documents_are_known_without_reading_a_device() -> None:
    """A step of packed rows on tensors that have no values: a read of one, which a device waits for, is an error."""
    position_T = np.concatenate([np.arange(5), np.arange(9)])
    rows = [Row({"input_ids": np.arange(14), "position_ids": position_T}, np.arange(14), 14)] * 2
    batch = collate(rows, [0, 0])
    assert batch.document_lengths == (5, 9, 5, 9)
    llama = make_llama()
    for i, argument in enumerate(["seq_idx", "cu_seq_lens_q"]):
        llama.model.layers[i] = _CarryingLayer(llama.model.layers[i], argument)  # type: ignore[assignment]
    model = CausalModel(llama)
    model.passes_documents = True
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _fake(model, mode)
    with mode:
        fake = replace(batch, inputs={name: mode.from_tensor(t) for name, t in batch.inputs.items()})
        model(**fake.model_inputs).logits().sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        with pytest.raises(DynamicOutputShapeException):  # the mutant: borders from the position ids of the device
            model(**fake.inputs)


@pytest.mark.parametrize("argument", ["ignored", "refused"])
def test_recurrent_layers_that_ignore_or_refuse_borders_leak(argument: str) -> None:
    llama = make_llama()
    llama.model.layers[1] = _CarryingLayer(llama.model.layers[1], argument)  # type: ignore[assignment]
    model = CausalModel(llama)
    leak = find_model_leak(model, 48)
    assert leak is not None and leak.layer == "_CarryingLayer" and not model.passes_documents


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


def test_attention_with_dropout_of_any_name_is_left_to_transformers() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    for rate in (0.0, 0.1):
        config = BioGptConfig(vocab_size=320, attention_probs_dropout_prob=rate, **sizes)
        assert is_supported(BioGptForCausalLM(config).eval()) == (rate == 0.0)
