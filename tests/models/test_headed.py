"""A bias behind the output embedding, as BART and its kin have it, belongs to the head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PreTrainedModel,
)

from postgrad.data.layouts.rows import IGNORED, Row
from postgrad.data.loading.batch import collate
from postgrad.errors import ModelError
from postgrad.models import model as m
from postgrad.models.location import locate_model
from postgrad.models.model import HeadedModel, verify_model
from postgrad.models.pretrained import load_pretrained
from postgrad.models.task import Task
from postgrad.objectives.next_token import TokenLoss
from tests.tiny_stages import make_workspace, save_model, t5_tokenizer

SIZES = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": None,
}
FAMILIES = {
    "bart": (BartForConditionalGeneration, BartConfig),
    "mbart": (MBartForConditionalGeneration, MBartConfig),
    "pegasus": (PegasusForConditionalGeneration, PegasusConfig),
    "marian": (MarianMTModel, MarianConfig),
}


def made(family: str, **changes: object) -> PreTrainedModel:
    """A small model whose bias is not zero."""
    kind, config = FAMILIES[family]
    torch.manual_seed(0)
    model = kind(config(**{**SIZES, **changes})).eval()
    model.final_logits_bias.copy_(torch.randn_like(model.final_logits_bias))
    return model


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids.flip(1)[:, :5]}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_models_own(family: str) -> None:
    model = made(family)
    verify_model(HeadedModel(model))
    with torch.no_grad():
        ours, plain = HeadedModel(model)(**batch()).logits(), model(**batch()).logits
    assert torch.allclose(ours, plain, atol=1e-5)
    assert model.final_logits_bias.shape == (1, 96) and "final_logits_bias" in model.state_dict()


def test_a_head_without_it_would_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("bart")
    bare = HeadedModel.head
    monkeypatch.setattr(HeadedModel, "head", lambda self: m.OutputHead(bare(self).weight_VD))
    with pytest.raises(ModelError, match=r"architecture \(bart\) are not its output embedding"):
        verify_model(HeadedModel(model))


def test_loss_and_gradients_are_those_of_transformers() -> None:
    rows = [
        Row({name: tensor[i].numpy() for name, tensor in batch().items()}, batch()["input_ids"][i, :5].numpy(), 5)
        for i in range(2)
    ]
    given = collate(rows, [0, 0])
    models = made("bart"), made("bart")
    loss, _ = TokenLoss()(HeadedModel(models[0])(**given.inputs), given)
    wanted = models[1](**given.inputs).logits
    reference = torch.nn.functional.cross_entropy(
        wanted.flatten(0, 1), given.labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    loss.backward(), reference.backward()
    assert float(loss.detach()) == pytest.approx(float(reference.detach()), rel=1e-5)
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        assert torch.allclose(one.grad, two.grad, atol=1e-5)  # type: ignore[arg-type]


def test_bf16_stays_bf16() -> None:
    """The bias is a buffer, which is not held in less than fp32."""
    model = made("bart")
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    assert HeadedModel(model)(**batch()).hidden.dtype == torch.bfloat16


def test_a_stage_trains_it_and_keeps_the_bias(tmp_path: Path) -> None:
    shelf = make_workspace(tmp_path, tmp_path / "cache")
    tokenizer = t5_tokenizer()
    model = made("bart", vocab_size=len(tokenizer))
    save_model(model, tokenizer, shelf.folder / "bart")
    raw = shelf.stage("bart", model="bart", sources=[shelf.source("pair")], objectives=[{"kind": "text-to-text"}])
    done = shelf.run(raw)
    after = load_pretrained(locate_model(str(done.run_folder), shelf.folder), Task.TEXT_TO_TEXT).model
    assert torch.equal(after.final_logits_bias, model.final_logits_bias)  # type: ignore[arg-type]
    assert not torch.equal(after.model.shared.weight, model.model.shared.weight)  # type: ignore[union-attr]
