"""Are exactly those linear layers taken that a group or a pattern means, on every architecture?"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    AlbertConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DebertaConfig,
    MambaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
)

from postgrad.errors import TuningError
from postgrad.tuning.adapter import Adapter
from postgrad.tuning.prompt import PromptTuning
from postgrad.tuning.targets import is_transposed, linear_layers, resolve_targets, short_names
from tests.model_families import tiny_config
from tests.tuning.families import ALL_FAMILIES, FAMILIES, Task, build_model

SMALL = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def plain(config: PreTrainedConfig) -> PreTrainedModel:
    """A model without weights: only its modules are looked at."""
    auto = AutoModelForMaskedLM if config.model_type in ("albert", "deberta") else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config)


def leaves(model: PreTrainedModel, names: list[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


@pytest.mark.parametrize(
    ("family", "attention", "feed_forward", "auto"),
    [
        ("llama", "q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj", "q_proj v_proj"),
        ("qwen3", "q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj", "q_proj v_proj"),
        ("gpt2", "attn.c_attn attn.c_proj", "mlp.c_fc mlp.c_proj", "c_attn"),
        ("t5", "q k v o", "wi wo", "q v"),
        ("phi3", "qkv_proj o_proj", "gate_up_proj down_proj", "qkv_proj"),
        ("gpt-neox", "query_key_value attention.dense", "dense_h_to_4h dense_4h_to_h", "query_key_value"),
        ("opt", "q_proj k_proj v_proj out_proj", "fc1 fc2", "q_proj v_proj"),
        ("distilbert", "q_lin k_lin v_lin out_lin", "lin1 lin2", "q_lin v_lin"),
        ("modernbert", "attn.Wqkv attn.Wo", "mlp.Wi mlp.Wo", "Wqkv"),
        ("bart", "q_proj k_proj v_proj out_proj", "fc1 fc2", "q_proj v_proj"),
    ],
)
def test_groups_are_the_layers_of_their_names(family: str, attention: str, feed_forward: str, auto: str) -> None:
    model = build_model(family, "lm")

    def named(endings: str) -> set[str]:
        return {n for n, _ in model.named_modules() if any(f".{n}".endswith(f".{end}") for end in endings.split())}

    assert set(resolve_targets(model, "attention")) == named(attention)
    assert set(resolve_targets(model, "feed-forward")) == named(feed_forward)
    assert set(resolve_targets(model, "auto")) == named(auto)
    assert set(resolve_targets(model, "all-linear")) == named(attention) | named(feed_forward)
    assert resolve_targets(model, ["attention", "feed-forward"]) == resolve_targets(model, "all-linear")


def test_bert_s_groups() -> None:
    model = build_model("bert", "classify")
    within = "bert.encoder.layer.0."
    attention = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
    assert resolve_targets(model, "attention")[:4] == [within + name for name in attention]
    assert resolve_targets(model, "feed-forward")[:2] == [within + "intermediate.dense", within + "output.dense"]
    assert leaves(model, resolve_targets(model, "auto")) == {"query", "value"}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_auto_is_what_peft_takes_where_it_knows_an_architecture(family: str) -> None:
    theirs = inject_adapter_in_model(LoraConfig(fan_in_fan_out=family == "gpt2"), build_model(family, "lm"))
    taken = [name for name, module in theirs.named_modules() if isinstance(module, LoraLayer)]
    assert resolve_targets(build_model(family, "lm"), "auto") == taken


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_only_the_blocks_are_taken(family: str) -> None:
    for task in ALL_FAMILIES[family].tasks:
        model = build_model(family, task)
        stacks = [name for name, module in model.base_model.named_modules() if isinstance(module, nn.ModuleList)]
        prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
        taken = resolve_targets(model, "all-linear")
        assert all(any(name.startswith(f"{prefix}{stack}.") for stack in stacks) for name in taken)
        linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
        inside = {n for n in linear if any(n.startswith(f"{prefix}{stack}.") for stack in stacks)}
        assert set(taken) == inside


def test_routers_are_left_alone_and_shared_experts_are_not() -> None:
    sizes = SMALL | {"num_key_value_heads": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    model = plain(Qwen2MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2))
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert leaves(model, resolve_targets(model, "all-linear")) == attention | {"gate_proj", "up_proj", "down_proj"}
    left = {layer.local_name for layer in linear_layers(model) if not layer.is_targetable}
    assert left == {"lm_head", "shared_expert_gate"}
    mixtral = plain(MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4))
    assert leaves(mixtral, resolve_targets(mixtral, "all-linear")) == attention


def test_layers_whose_weights_are_read_without_calling_them_are_left_alone() -> None:
    model = plain(MambaConfig(vocab_size=120, hidden_size=32, state_size=8, num_hidden_layers=2))
    assert leaves(model, resolve_targets(model, "all-linear")) == {"in_proj"}


# DeBERTa's module was compiled by torch.jit where it is imported, before transformers 5.2x.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_embeddings_projections_and_fused_attention_of_other_encoders() -> None:
    albert = plain(AlbertConfig(**SMALL, embedding_size=16))
    assert leaves(albert, resolve_targets(albert, "all-linear")) == {
        "query",
        "key",
        "value",
        "dense",
        "ffn",
        "ffn_output",
    }
    deberta = plain(DebertaConfig(**SMALL))
    assert leaves(deberta, resolve_targets(deberta, "auto")) == {"in_proj"}


def test_patterns_name_layers_endings_and_containers() -> None:
    model = build_model("llama", "lm")
    q = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    for pattern in ("q_proj", "*.q_proj", "self_attn.q_proj", "model.layers.*.q_proj"):
        assert resolve_targets(model, [pattern]) == q
    assert resolve_targets(model, q[1]) == q[1:]
    assert resolve_targets(model, ["layers.1"]) == [n for n in resolve_targets(model, "all-linear") if ".1." in n]
    assert resolve_targets(model, ["self_attn"]) == resolve_targets(model, "attention")
    assert resolve_targets(model, "all-linear", exclude=["attention", "*.1.*"]) == [
        n for n in resolve_targets(model, "feed-forward") if ".0." in n
    ]


def test_an_ending_keeps_to_the_blocks_and_a_full_name_need_not() -> None:
    model = build_model("bert", "classify")
    assert "bert.pooler.dense" not in resolve_targets(model, ["dense"])
    assert resolve_targets(model, ["bert.pooler.dense"]) == ["bert.pooler.dense"]


@pytest.mark.parametrize(
    ("family", "task", "target", "says"),
    [
        ("llama", "lm", "q_porj", "'q_porj' matches no linear layer .*q_proj"),
        ("llama", "lm", "all-liner", "all-linear, attention"),
        ("llama", "lm", "input_layernorm", "matches no linear layer"),
        ("llama", "lm", "lm_head", "lm_head is a head.*also"),
        ("llama", "classify", "score", "score is a head"),
        ("bert", "lm", "cls.predictions.transform.dense", "is a head"),
        ("bert", "classify", "classifier", "classifier is a head"),
        ("t5", "lm", "lm_head", "lm_head is a head"),
        ("t5", "classify", "classification_head.dense", "is a head"),
    ],
)
def test_a_pattern_that_means_nothing_or_a_head_is_refused(family: str, task: Task, target: str, says: str) -> None:
    with pytest.raises(TuningError, match=f"(?s){says}"):
        resolve_targets(build_model(family, task), [target])
    with pytest.raises(TuningError):
        resolve_targets(build_model(family, task), "all-linear", exclude=[target])


def test_nothing_left_is_refused() -> None:
    with pytest.raises(TuningError, match=r"no linear layer .* is targeted"):
        resolve_targets(build_model("llama", "lm"), "attention", exclude=["self_attn"])


def test_layers_under_adapters_keep_their_names_and_adapters_are_no_layers() -> None:
    model = build_model("bert", "lm")
    bare = [layer.name for layer in linear_layers(model)]
    Adapter(model, variant="pfeiffer", size=4)
    PromptTuning(model, kind="p-tuning", length=3, encoder="mlp")
    assert any(isinstance(m, nn.Linear) and n not in bare for n, m in model.named_modules())
    assert [layer.name for layer in linear_layers(model)] == bare
    lora = inject_adapter_in_model(LoraConfig(target_modules=["q_proj", "down_proj"]), build_model("llama", "lm"))
    assert resolve_targets(lora, "all-linear") == resolve_targets(build_model("llama", "lm"), "all-linear")


class InsideTorch(nn.Module):
    """A block whose attention is torch's own: it reads the weights of its layers without calling them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4)
        self.up = nn.Linear(32, 32)


def test_torch_s_own_attention_is_left_alone() -> None:
    model = build_model("llama", "lm")
    model.base_model.layers.append(InsideTorch())
    assert [n for n in resolve_targets(model, "all-linear") if "layers.2" in n] == ["model.layers.2.up"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("group", ["all-linear", "attention", "feed-forward", "auto"])
def test_short_names_mean_the_same_to_us_and_to_peft(family: str, group: str) -> None:
    for task in FAMILIES[family].tasks:
        model = build_model(family, task)
        names = resolve_targets(model, group)
        short = short_names(model, names)
        assert resolve_targets(model, short) == names
        assert [n for n, _ in model.named_modules() if any(n == s or n.endswith(f".{s}") for s in short)] == names


def test_short_names_of_some_layers_and_of_others_than_the_blocks_are_whole() -> None:
    model = build_model("llama", "lm")
    assert short_names(model, resolve_targets(model, "attention")) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert short_names(build_model("gpt2", "lm"), resolve_targets(build_model("gpt2", "lm"), "attention")) == [
        "attn.c_attn",
        "attn.c_proj",
    ]
    assert short_names(model, ["model.layers.1.mlp.up_proj"]) == ["model.layers.1.mlp.up_proj"]
    assert short_names(build_model("bert", "classify"), ["bert.pooler.dense"]) == ["bert.pooler.dense"]


def test_transposed_layers_are_told() -> None:
    gpt2, llama = build_model("gpt2", "lm"), build_model("llama", "lm")
    assert is_transposed(gpt2.get_submodule(resolve_targets(gpt2, "auto")[0]))
    assert not is_transposed(llama.get_submodule(resolve_targets(llama, "auto")[0]))


def test_linear_layers_that_compute_in_another_way_are_left_alone() -> None:
    """DeepSeek-V4 multiplies groups of inputs by parts of one weight, which low-rank matrices of the whole do not fit."""
    model = plain(tiny_config("deepseek_v4"))
    grouped = {name for name, module in model.named_modules() if name.endswith("o_a_proj")}
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in grouped)
    assert grouped and not grouped & set(resolve_targets(model, "all-linear"))
