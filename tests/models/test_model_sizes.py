"""Sizes of models are asked of the configuration, and hold on the model: tokens, positions, ties, special ids."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import PreTrainedModel

from postgrad.errors import ModelError
from postgrad.models import grow_embeddings as grow_module
from postgrad.models import model_sizes, pretrained, tied_weights
from postgrad.models.auto_classes import load_config, make_model
from postgrad.models.grow_embeddings import grow_embeddings
from postgrad.models.location import ModelLocation
from postgrad.models.model import CausalModel, verify_model
from postgrad.models.model_sizes import get_model_sizes
from postgrad.models.pretrained import load_model, load_pretrained, save_pretrained
from postgrad.models.task import Task
from postgrad.models.tied_weights import output_is_tied
from postgrad.plan.model_inputs import make_encoder, make_model_inputs
from postgrad.tuning.open_model import open_model
from tests.conftest import VOCABULARY, make_llama, make_tokenizer
from tests.model_families import make_tiny_model, tiny_config

ENCODER = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 24, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
DECODER = {**ENCODER, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
SEQ2SEQ = {
    "vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, tuple[dict[str, Any], int | None]] = {
    "Roberta": (ENCODER, 22),
    "XLMRoberta": (ENCODER, 22),
    "MPNet": (ENCODER, 22),
    "Camembert": ({**ENCODER, "pad_token_id": 3}, 20),
    "Data2VecText": (ENCODER, 22),
    "IBert": (ENCODER, 22),
    "Bert": (ENCODER, 24),
    "Electra": (ENCODER, 24),
    "DebertaV2": (ENCODER, 24),
    "GPT2": ({"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24}, 24),
    "Bart": ({**SEQ2SEQ, "max_position_embeddings": 24}, 24),
    "LED": ({**SEQ2SEQ, "max_encoder_position_embeddings": 32, "max_decoder_position_embeddings": 24,
             "attention_window": 8}, 24),
    "T5": ({"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}, None),
    "Llama": (DECODER, 24),
}  # fmt: skip


def build(family: str, options: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**options)
    return make_model(transformers.AutoModel, config).eval()


def run(model: PreTrainedModel, length: int) -> None:
    ids = torch.full((1, length), 5)
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), **decoder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_all_positions_fits_and_no_longer_one(family: str) -> None:
    options, positions = FAMILIES[family]
    model = build(family, options)
    sizes = get_model_sizes(model.config)
    assert (sizes.vocab_size, sizes.positions) == (VOCABULARY, positions)
    run(model, positions or 100)
    if positions and family != "Llama":  # rotary positions have no end
        with pytest.raises((IndexError, RuntimeError)):
            run(model, positions + 1)


def test_without_the_padding_rows_a_full_row_of_roberta_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: positions as the configuration names them."""
    monkeypatch.setattr(model_sizes, "_count_usable_positions", lambda config: [])
    model = build("Roberta", ENCODER)
    with pytest.raises((IndexError, RuntimeError)):
        run(model, get_model_sizes(model.config).positions or 0)


@pytest.mark.parametrize("change", [{"max_position_embeddings": "many"}, {"vocab_size": None}, {"vocab_size": 0}])
def test_a_configuration_without_sizes_is_an_error(change: dict[str, Any]) -> None:
    config = transformers.LlamaConfig(**DECODER)
    for name, value in change.items():
        config.__dict__[name] = value
    with pytest.raises(ModelError):
        get_model_sizes(config)


VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 14,
          "patch_size": 7}  # fmt: skip


def composites() -> dict[str, transformers.PreTrainedConfig]:
    gemma = transformers.Gemma3TextConfig(**{**DECODER, "sliding_window": 8})
    return {
        "Gemma3": transformers.Gemma3Config(text_config=gemma.to_dict(), vision_config=VISION, mm_tokens_per_image=4),
        "Mistral3": transformers.Mistral3Config(
            text_config=transformers.MistralConfig(**DECODER).to_dict(),
            vision_config={"model_type": "pixtral", **VISION},
        ),
    }


@pytest.mark.parametrize("family", ["Gemma3", "Mistral3"])
def test_a_composite_model_is_a_decoder_with_the_sizes_of_its_text_part(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = composites()[family]
    model = make_model(transformers.AutoModelForImageTextToText, config)
    save_pretrained(model, make_tokenizer(), tmp_path / "m", dtype=torch.float32)
    opened = open_model(ModelLocation("m", tmp_path / "m"))
    assert opened.task == Task.CAUSAL
    sizes = get_model_sizes(opened.model.config)
    assert (sizes.vocab_size, sizes.positions) == (VOCABULARY, 24)
    verify_model(CausalModel(opened.model), row_length=24)


# --- ties -------------------------------------------------------------------------------------------------------------


def save_with_two_tables(folder: Path) -> torch.Tensor:
    """A folder whose configuration ties the head, and whose file has one of its own; returns that head."""
    save_pretrained(make_llama(tie_word_embeddings=False), make_tokenizer(), folder, dtype=torch.float32)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    return load_file(folder / "model.safetensors")["lm_head.weight"]


def test_a_head_of_its_own_is_kept_where_the_configuration_says_tied(tmp_path: Path) -> None:
    head = save_with_two_tables(tmp_path / "m")
    model = load_model(ModelLocation("m", tmp_path / "m"))
    grow_embeddings(model, {VOCABULARY: [1, 2]})
    assert torch.equal(model.get_output_embeddings().weight[:VOCABULARY], head)
    save_pretrained(model, make_tokenizer(), tmp_path / "grown", dtype=torch.float32)
    assert json.loads((tmp_path / "grown" / "config.json").read_text())["tie_word_embeddings"] is False
    again = load_model(ModelLocation("grown", tmp_path / "grown"))
    assert torch.equal(again.get_output_embeddings().weight[:VOCABULARY], head)


def test_without_the_correction_the_head_would_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: growing notices."""
    save_with_two_tables(tmp_path / "m")
    monkeypatch.setattr(pretrained, "record_separate_output", lambda model: None)
    monkeypatch.setattr(grow_module, "separate_output", lambda model: nullcontext())
    with pytest.raises(ModelError, match="would replace its output embedding"):
        grow_embeddings(load_model(ModelLocation("m", tmp_path / "m")), {VOCABULARY: [1, 2]})


def test_tied_models_stay_tied(tmp_path: Path) -> None:
    save_pretrained(make_llama(), make_tokenizer(), tmp_path / "m", dtype=torch.float32)
    model = load_model(ModelLocation("m", tmp_path / "m"))
    assert model.config.tie_word_embeddings
    grow_embeddings(model, {VOCABULARY: [1, 2]})
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def reload_tied_to_the_decoder(folder: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A T5Gemma, whose input embedding is the encoder's and whose output embedding the decoder's, and its reload."""
    model = make_tiny_model(tiny_config("t5gemma"), Task.TEXT_TO_TEXT)
    save_pretrained(model, make_tokenizer(), folder, dtype=torch.float32)
    return model, load_pretrained(ModelLocation("m", folder), Task.TEXT_TO_TEXT).model


def test_an_output_tied_to_the_decoder_stays_tied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, loaded = reload_tied_to_the_decoder(tmp_path / "m")
    assert not output_is_tied(loaded) and loaded.config.tie_word_embeddings
    assert loaded.all_tied_weights_keys == model.all_tied_weights_keys
    save_pretrained(loaded, make_tokenizer(), tmp_path / "again", dtype=torch.float32)
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("m", "again"))
    assert first.keys() == again.keys()
    # The mutant: an output that is not the input embedding counts as one of its own.
    monkeypatch.setattr(tied_weights, "_output_is_separate", lambda model: not output_is_tied(model))
    model, loaded = reload_tied_to_the_decoder(tmp_path / "mutant")
    assert loaded.all_tied_weights_keys != model.all_tied_weights_keys


# --- special ids --------------------------------------------------------------------------------------------------


def test_a_padding_token_behind_the_table(tmp_path: Path) -> None:
    """Added to the tokenizer alone, as many recipes do: the EOS pads, and the text `<pad>` is text."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == VOCABULARY
    save_pretrained(make_llama(), tokenizer, tmp_path / "m", dtype=torch.float32)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "pad_token_id": VOCABULARY}))
    start = ModelLocation("m", tmp_path / "m")
    assert load_config(str(tmp_path / "m")).pad_token_id is None
    load_model(start)
    encoder = make_encoder(tokenizer, VOCABULARY)
    assert max(encoder.load().encode("one <pad> two").ids) < VOCABULARY
    inputs = make_model_inputs(Task.CAUSAL, start, tokenizer, encoder, length=16, seed=0)
    assert inputs.pad_id == encoder.eos


def test_other_tokens_behind_the_table_are_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ModelError, match=r"321 tokens and the model 320 embeddings"):
        make_encoder(tokenizer, VOCABULARY)


@pytest.mark.parametrize(
    ("family", "cause"),
    [("OPT", "OPTAttention: attention, which takes no notice"), ("Mamba", "MambaMixer: a recurrent layer")],
)
def test_the_true_cause_of_a_leak_is_named(family: str, cause: str) -> None:
    options = {
        "OPT": {"vocab_size": VOCABULARY, "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1,
                "num_attention_heads": 2, "max_position_embeddings": 128, "word_embed_proj_dim": 16},
        "Mamba": {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1},
    }  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**options[family])
    model = make_model(transformers.AutoModelForCausalLM, config).eval()
    with pytest.raises(ModelError, match=cause):
        verify_model(CausalModel(model))
