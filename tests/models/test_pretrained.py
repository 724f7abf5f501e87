"""Models: packed documents stay apart, leaking architectures are refused, what leaves is plain Hugging Face."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from postgrad.errors import ModelError
from postgrad.models.cpu_attention import CAUSAL_BLOCKS, causal_blocks, is_supported
from postgrad.models.location import ModelLocation, locate_model
from postgrad.models.model import CausalModel, verify_model
from postgrad.models.pretrained import load_model, load_pretrained, load_tokenizer, save_pretrained
from postgrad.models.task import Task
from tests.conftest import VOCABULARY, make_llama, make_tokenizer
from tests.tiny_models import bert_tokenizer, make_bert

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaConfig": SMALL,
    "Qwen2Config": SMALL,
    "Qwen3Config": {**SMALL, "head_dim": 8},
    "MistralConfig": {**SMALL, "sliding_window": 8},
    "Gemma2Config": {**SMALL, "head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 3.0},
    "Gemma3TextConfig": {**SMALL, "head_dim": 8, "sliding_window": 8},
    "GraniteConfig": {**SMALL, "logits_scaling": 4.0},
    "CohereConfig": {**SMALL, "logit_scale": 0.25},
    "GPTNeoXConfig": {k: v for k, v in SMALL.items() if k != "num_key_value_heads"},
    "GPT2Config": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
}


def build(name: str, attention: str | None = None) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, name)(**ARCHITECTURES[name], bos_token_id=0, eos_token_id=0, pad_token_id=None)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_documents_stay_apart_and_the_head_is_understood(name: str, attention: str | None) -> None:
    verify_model(CausalModel(build(name, attention)))


LEAKING: dict[str, dict[str, Any]] = {
    "MambaConfig": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2},
    "Mamba2Config": {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 8,
        "n_groups": 1,
    },
    # OPT makes its mask without looking at positions.
    "OPTConfig": {
        "vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 128, "word_embed_proj_dim": 32,
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "changes"), LEAKING.items())
def test_models_that_leak_are_refused(name: str, changes: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, name)(**changes, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ModelError, match="packed documents attend to each other"):
        verify_model(CausalModel(model))


def test_positions_that_do_not_restart_would_leak() -> None:
    """The mutant: one run of positions over both documents."""
    model = CausalModel(make_llama())
    ids = torch.randint(0, VOCABULARY, (1, 40))
    other = ids.clone()
    other[:, :20] = torch.randint(0, VOCABULARY, (1, 20))
    apart, together = torch.arange(20).repeat(2)[None], torch.arange(40)[None]
    with torch.no_grad():

        def change(positions: torch.Tensor) -> torch.Tensor:
            one, two = (model(input_ids=i, position_ids=positions).logits() for i in (ids, other))
            return (one - two)[:, 20:].abs().max()

        kept, leaked = change(apart), change(together)
    assert kept == 0 < 1e-3 < leaked


def test_a_head_that_is_not_understood_is_refused() -> None:
    model = CausalModel(make_llama())
    model.scale = 0.5
    with pytest.raises(ModelError, match="not its output embedding"):
        verify_model(model)


@pytest.mark.parametrize("length", [1, 7, 128, 129, 300])
def test_causal_blocks_equal_plain_attention_with_gradients(length: int) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 4, length, 8, requires_grad=True)
    key, value = (torch.randn(2, 2, length, 8, requires_grad=True) for _ in range(2))
    document = torch.sort(torch.randint(0, 3, (2, length)), dim=1).values
    visible = (document[:, :, None] == document[:, None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(2, 1, length, length).masked_fill(~visible[:, None], torch.finfo(torch.float32).min)
    out, _ = causal_blocks(torch.nn.Identity(), query, key, value, mask, 0.3)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), attn_mask=mask, scale=0.3
    ).transpose(1, 2)
    upstream = torch.randn_like(out)
    ours = torch.autograd.grad(out, (query, key, value), upstream)
    theirs = torch.autograd.grad(wanted, (query, key, value), upstream)
    assert torch.allclose(out, wanted, atol=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_causal_blocks_say_where_they_do_not_belong() -> None:
    assert is_supported(make_llama())
    assert not is_supported(build("Gemma2Config"))  # its scores are soft-capped
    assert not is_supported(build("GPT2Config"))  # it drops attention weights
    assert make_llama().config._attn_implementation != CAUSAL_BLOCKS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_what_leaves_is_read_back_with_the_same_logits(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    model = make_llama(tie_word_embeddings=tied)
    save_pretrained(model, make_tokenizer(), tmp_path / "out", dtype=dtype)
    save_pretrained(model, make_tokenizer(), tmp_path / "exact", dtype=torch.float32)
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "exact", dtype=dtype)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    ids = torch.randint(0, VOCABULARY, (2, 16))
    with torch.no_grad():
        assert torch.equal(back(ids).logits, wanted(ids).logits)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert "auto_map" not in config
    weights = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    assert (
        abs((tmp_path / "out" / "model.safetensors").stat().st_size - weights) < 8192
    )  # tied weights are written once


def test_foreign_code_is_refused(tmp_path: Path) -> None:
    save_pretrained(make_llama(), make_tokenizer(), tmp_path / "m", dtype=torch.float32)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Mine"}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    (tmp_path / "m" / "modeling.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match="auto_map"):
        load_model(ModelLocation("m", tmp_path / "m"))


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_pretrained(make_llama(), make_tokenizer(), tmp_path / "m", dtype=torch.float32)
    weights = load_file(tmp_path / "m" / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks 1 weights") as caught:
        load_model(ModelLocation("m", tmp_path / "m"))
    assert not caught.value.hint


def test_an_encoder_without_its_head_can_be_classified_with(tmp_path: Path) -> None:
    tokenizer = bert_tokenizer()
    save_pretrained(make_bert(len(tokenizer)).bert, tokenizer, tmp_path / "m", dtype=torch.float32)
    with pytest.raises(ModelError, match=r"lacks \d+ weights") as caught:
        load_pretrained(ModelLocation("m", tmp_path / "m"), Task.MASKED)
    assert "objectives: [{kind: classify}]" in caught.value.hint


def test_places_that_hold_no_model_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no folder"):
        locate_model("./nothing", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"without a config\.json"):
        locate_model("empty", tmp_path)
    assert locate_model("owner/name", tmp_path).folder is None
    save_pretrained(make_llama(), make_tokenizer(), tmp_path / "m", dtype=torch.float32)
    (tmp_path / "m" / "tokenizer.json").unlink()
    (tmp_path / "m" / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(ModelLocation("m", tmp_path / "m"))
