"""Does a model with new blocks start as its base, learn in them alone, and stay a plain model?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MBartConfig,
    MBartForConditionalGeneration,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from postgrad.errors import TuningError
from postgrad.models.layers import get_layer_stacks
from postgrad.models.sublayers import make_probe_inputs
from postgrad.tuning.attach import attach as attach_options
from postgrad.tuning.block_expansion import BlockExpansion, BlockSlot, plan_slots
from postgrad.tuning.residual_writers import ModuleCall, find_writers, zero_output
from postgrad.tuning.tuning import Tuning
from tests.tuning import checks
from tests.tuning.families import ALL_FAMILIES, Task, batch, build_model, logits, loss

GROWS = ("llama", "gpt2", "qwen3", "t5")
CELLS: list[tuple[str, Task]] = [*((family, "lm") for family in GROWS), ("llama", "classify"), ("t5", "classify")]
HEADS = ["score.*", "classification_head.*"]


def attach(model: PreTrainedModel, *, seed: int = 0) -> Tuning:
    """One new block behind each old one."""
    return BlockExpansion(model, every=1, seed=seed)


def from_options(model: PreTrainedModel, options: Mapping[str, Any]) -> Tuning:
    return attach_options(model, options)


# What every tuning promises


@pytest.mark.parametrize(("family", "task"), CELLS)
def test_new_blocks_alone_move_and_a_tasks_own_layer(family: str, task: Task) -> None:
    checks.trains_only_declared(attach, family, task, base=[] if task == "lm" else HEADS)


@pytest.mark.parametrize(("family", "task"), CELLS)
@pytest.mark.parametrize(
    "check",
    [
        checks.starts_equal_to_base,
        checks.batch_equals_single_row,
        checks.save_load_bit_identical,
        checks.resume_exact,
        checks.checkpointed_gradients_equal,
    ],
)
def test_promises(check: Callable[[checks.Attach, str, Task], None], family: str, task: Task) -> None:
    check(attach, family, task)


@pytest.mark.parametrize(("family", "task"), CELLS)
def test_merged_it_is_a_plain_folder_of_the_same_answers(family: str, task: Task) -> None:
    checks.merge_exact(attach, family, task, tolerance=0.0)


@pytest.mark.parametrize("family", GROWS)
def test_published_it_is_the_same(family: str) -> None:
    checks.published_equal(attach, from_options, family, "lm")


@pytest.mark.parametrize("family", GROWS)
def test_switched_off_or_taken_out_the_base_is_left(family: str) -> None:
    checks.off_equals_base(attach, family, "lm")
    checks.detach_restores(attach, family, "lm")


@pytest.mark.parametrize("family", GROWS)
def test_generation_with_a_cache_is_as_without(family: str) -> None:
    checks.cache_equals_no_cache(attach, family)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_packed_documents_stay_apart(family: str) -> None:
    checks.packed_documents_isolated(attach, family)


# Where new blocks stand


def drawn(slots: Sequence[BlockSlot]) -> str:
    """Old blocks by number, new ones as a plus and the number they are copies of."""
    return " ".join(f"+{slot.source_block}" if slot.is_new else str(slot.source_block) for slot in slots)


@pytest.mark.parametrize(
    ("depth", "options", "expected"),
    [
        (4, {}, "0 1 2 3 +3"),
        (8, {}, "0 1 2 3 +3 4 5 6 7 +7"),
        (6, {}, "0 1 2 3 4 5 +5"),
        (2, {}, "0 1 +1"),
        (10, {}, "0 1 2 3 4 +4 5 6 7 8 9 +9"),
        (4, {"every": 2}, "0 1 +1 2 3 +3"),
        (4, {"every": 1}, "0 +0 1 +1 2 +2 3 +3"),
        (4, {"every": 2, "blocks": 2}, "0 1 +0 +1 2 3 +2 +3"),
        (4, {"positions": [1, 2]}, "0 1 +1 2 +2 3"),
        (4, {"positions": [3, 0]}, "0 +0 1 2 3 +3"),
        (4, {"positions": [2], "blocks": 3}, "0 1 2 +0 +1 +2 3"),
    ],
)
def test_places(depth: int, options: dict[str, Any], expected: str) -> None:
    assert drawn(plan_slots(depth, **{"blocks": 1, "every": None, "positions": None, **options})) == expected


def test_the_published_model_grows_from_32_blocks_to_40() -> None:
    slots = plan_slots(32, blocks=1, every=4, positions=None)
    assert len(slots) == 40
    assert [i for i, slot in enumerate(slots) if slot.is_new] == list(range(4, 40, 5))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"every": 1, "positions": [0]}, "one of them, or neither"),
        ({"every": 3}, "one of 1, 2"),
        ({"every": 0}, "one of 1, 2"),
        ({"positions": []}, "0 to 1"),
        ({"positions": [2]}, "0 to 1"),
        ({"positions": [-1]}, "0 to 1"),
        ({"positions": [1, 1]}, "0 to 1"),
        ({"positions": [0], "blocks": 2}, "the number of blocks up to"),
        ({"blocks": 0}, "1 to 2"),
        ({"also_train": ["model.nrom"]}, r"model\.norm"),
    ],
)
def test_places_that_there_are_not_are_refused_and_nothing_changes(wrong: dict[str, Any], says: str) -> None:
    model = build_model("llama", "lm")
    before = checks._model_structure(model)
    with pytest.raises(TuningError, match=says):
        BlockExpansion(model, **wrong)
    assert checks._model_structure(model) == before


# What a new block is


@pytest.mark.parametrize("family", GROWS)
def test_new_weights_are_counted_by_formula(family: str) -> None:
    model = build_model(family, "lm")
    blocks = [sum(p.numel() for p in block.parameters()) for stack in get_layer_stacks(model) for block in stack]
    biases = [m.weight.numel() for name, m in model.named_modules() if name.endswith("relative_attention_bias")]
    state = attach(model).state()
    # T5 has its position biases once in a stack, in the first block; a copy has none.
    assert sum(t.numel() for t in state.values()) == sum(blocks) - sum(biases)


SILENT = {
    "llama": {"self_attn.o_proj.weight", "mlp.down_proj.weight"},
    "qwen3": {"self_attn.o_proj.weight", "mlp.down_proj.weight"},
    "gpt2": {"attn.c_proj.weight", "attn.c_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"},
    "gpt-neox": {
        "attention.dense.weight",
        "attention.dense.bias",
        "mlp.dense_4h_to_h.weight",
        "mlp.dense_4h_to_h.bias",
    },
    "opt": {"self_attn.out_proj.weight", "self_attn.out_proj.bias", "fc2.weight", "fc2.bias"},
}


@pytest.mark.parametrize("family", SILENT)
def test_a_new_block_is_the_old_one_with_silent_output_projections(family: str) -> None:
    model = build_model(family, "lm")
    old = copy.deepcopy(get_layer_stacks(model)[0][1])
    BlockExpansion(model, positions=[1])
    new = dict(get_layer_stacks(model)[0][2].named_parameters())
    for name, weight in old.named_parameters():
        assert torch.equal(new[name], torch.zeros_like(weight) if name in SILENT[family] else weight), name


@pytest.mark.parametrize("family", GROWS)
def test_blocks_know_their_new_places_and_the_cache_has_as_many(family: str) -> None:
    model = build_model(family, "lm")
    with torch.no_grad():
        base = model(**make_probe_inputs(model), use_cache=True).past_key_values
    attach(model)
    for stack in get_layer_stacks(model):
        numbers = [
            {m.layer_idx for m in block.modules() if getattr(m, "layer_idx", None) is not None} for block in stack
        ]
        if any(numbers):
            assert numbers == [{i} for i in range(len(stack))]
    with torch.no_grad():
        cache = model(**make_probe_inputs(model), use_cache=True).past_key_values
    own, before = (c if isinstance(c, DynamicCache) else c.self_attention_cache for c in (cache, base))
    assert len(own.layers) == 2 * len(before.layers) == len(get_layer_stacks(model)[-1])
    for i, layer in enumerate(before.layers):
        assert torch.equal(own.layers[2 * i].keys, layer.keys), "an old block's keys are in another place of the cache"


@pytest.mark.parametrize("family", GROWS)
def test_blocks_go_by_the_models_own_configuration(family: str) -> None:
    model = build_model(family, "lm")
    known = {id(m.config) for m in model.modules() if hasattr(m, "config")}
    attach(model)
    assert {id(m.config) for m in model.modules() if hasattr(m, "config")} == known


def test_kinds_of_attention_stay_with_their_blocks() -> None:
    model = build_model("gemma2", "lm")
    assert model.config.layer_types == ["sliding_attention", "full_attention"]
    attach(model)
    assert model.config.layer_types == ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
    assert [block.self_attn.layer_type for block in model.model.layers] == model.config.layer_types


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_new_blocks_are_silent_under_dropout_too(family: str) -> None:
    model = with_dropout(family).train()
    attach(model)
    inputs = make_probe_inputs(model)
    for stack in get_layer_stacks(model):
        for block in stack:
            block.register_forward_hook(watch := Seen())
            block.watch = watch
    model(**inputs)
    for stack in get_layer_stacks(model):
        for old, new in zip(list(stack)[::2], list(stack)[1::2], strict=True):
            assert torch.equal(new.watch.output, old.watch.output)


def with_dropout(family: str) -> PreTrainedModel:
    config: Any = ALL_FAMILIES[family].config()
    config.update({"attention_dropout": 0.3, "dropout_rate": 0.3})
    return ALL_FAMILIES[family].classes["lm"].from_config(config)


class Seen:
    """Remembers what a module gave."""

    output: Tensor

    def __call__(self, _module: nn.Module, _inputs: object, output: Any) -> None:
        self.output = output if isinstance(output, Tensor) else output[0]


def test_attaching_draws_nothing_and_leaves_modes_alone() -> None:
    model: Any = with_dropout("llama").train()
    model.model.layers[0].eval()
    state = torch.get_rng_state()
    attach(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [block.training for block in model.model.layers] == [False, False, True, True]
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# Architectures


SMALL = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
OTHERS: dict[str, Callable[[], PreTrainedModel]] = {
    "a mixture of experts": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**GROUPED, **EXPERTS)),
    "with a gated shared expert": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**SMALL, num_key_value_heads=2, shared_expert_intermediate_size=8, **EXPERTS)
    ),
    "experts with biases": lambda: GptOssForCausalLM(
        GptOssConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)
    ),
    "side by side": lambda: CohereForCausalLM(CohereConfig(**SMALL)),
    "scaled sums": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, residual_multiplier=0.3)),
    "flags by layer": lambda: SmolLM3ForCausalLM(SmolLM3Config(**SMALL, num_key_value_heads=2)),
    "kinds by layer": lambda: GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=60, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]
        )
    ),
    "slopes": lambda: BloomForCausalLM(BloomConfig(vocab_size=60, hidden_size=16, n_layer=2, n_head=2)),
    "two stacks of different depths": lambda: MBartForConditionalGeneration(
        MBartConfig(
            vocab_size=60,
            d_model=16,
            encoder_layers=4,
            decoder_layers=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
        )
    ),
    "norms behind projections": lambda: build_model("olmo2", "lm"),
    "gains counted from one": lambda: build_model("gemma3", "lm"),
    "an encoder with norms first": lambda: build_model("modernbert", "lm"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_architectures_grow_and_are_loaded_plainly(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = OTHERS[case]().eval()
    inputs = make_probe_inputs(model)
    expected = logits(model, inputs)
    tuning = BlockExpansion(model, every=2)
    assert torch.equal(logits(model, inputs), expected)

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    reached: set[str] = set()
    for _ in range(3):
        optimizer.zero_grad()
        model(**inputs, labels=inputs.get("decoder_input_ids", inputs["input_ids"])).loss.backward()
        reached |= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
    assert reached == tuning.state().keys()

    trained = logits(model, inputs)
    assert not torch.equal(trained, expected)
    with tuning.disable():
        assert torch.equal(logits(model, inputs), expected)
    tuning.merge()
    model.save_pretrained(tmp_path)
    plain, loading = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert torch.equal(logits(plain.eval(), inputs), trained)


REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any], str]] = {
    "bert": (lambda: build_model("bert", "lm"), {}, "do more than add(.|\n)*Llama, Qwen, GPT-2(.|\n)*adapter and lora"),
    "bart": (lambda: build_model("bart", "lm"), {}, "do more than add"),
    "a first block that is another": (
        lambda: build_model("modernbert", "lm"),
        {"positions": [0]},
        "attn_norm is a",
    ),
    "dense blocks below experts": (
        lambda: DeepseekV3ForCausalLM(
            DeepseekV3Config(
                **SMALL,
                n_routed_experts=4,
                num_experts_per_tok=2,
                n_group=1,
                topk_group=1,
                moe_intermediate_size=8,
                first_k_dense_replace=1,
                q_lora_rank=8,
                kv_lora_rank=8,
                qk_rope_head_dim=4,
                qk_nope_head_dim=4,
                v_head_dim=8,
            )
        ),
        {"positions": [0]},
        "mlp is a DeepseekV3MoE",
    ),
    "attention scaled by the block's number": (
        lambda: scaled_by_number(),
        {"positions": [0]},
        "another kind of block .scaling",
    ),
    "another depth than its configuration says": (lambda: cut_short(), {}, "differs from its configuration"),
    "a weight for each block": (lambda: WeightForEachBlock(ALL_FAMILIES["llama"].config()), {}, "weights differs from"),
    "answers that go by depth": (lambda: averaged_over_blocks(), {}, "output changes with identity blocks"),
}


class WeightForEachBlock(LlamaForCausalLM):
    """Has a vector as long as the model is deep."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.weights = nn.Parameter(torch.ones(config.num_hidden_layers))


def averaged_over_blocks() -> PreTrainedModel:
    model = build_model("llama", "lm")

    def average(body: Any, _inputs: object, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state / len(body.layers)
        return output

    model.model.register_forward_hook(average)
    return model


def scaled_by_number() -> PreTrainedModel:
    config: Any = ALL_FAMILIES["gpt2"].config()
    config.scale_attn_by_inverse_layer_idx = True
    model = ALL_FAMILIES["gpt2"].classes["lm"].from_config(config).eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    return model


def cut_short() -> PreTrainedModel:
    model = build_model("llama", "lm")
    del model.model.layers[1]
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_grow_is_refused_and_left_as_it_was(case: str) -> None:
    make, options, says = REFUSED[case]
    model = make().eval()
    before, expected = checks._model_structure(model), logits(model, make_probe_inputs(model))
    with pytest.raises(TuningError, match=says):
        BlockExpansion(model, **options)
    assert checks._model_structure(model) == before
    assert torch.equal(logits(model, make_probe_inputs(model)), expected)


def test_other_tunings_come_after_and_not_before() -> None:
    model = build_model("llama", "lm")
    model.model.layers[0].adapter = nn.Linear(2, 2)
    with pytest.raises(TuningError, match="put expand before other tunings"):
        BlockExpansion(model)


# Silencing


def test_a_weight_that_could_never_learn_again_is_not_silenced() -> None:
    class Squared(nn.Module):
        """Zero at zero, and flat there."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2))

        def forward(self, hidden_BTD: Tensor) -> Tensor:
            return hidden_BTD @ self.weight.square()

    block = nn.ModuleDict({"odd": Squared()})
    assert not zero_output(block, ModuleCall("odd", (torch.randn(1, 3, 2),), {}))
    assert torch.equal(block["odd"].weight, torch.ones(2, 2)), "what cannot be silenced is left as it was"
    block = nn.ModuleDict({"plain": nn.Linear(2, 2)})
    assert zero_output(block, ModuleCall("plain", (torch.randn(1, 3, 2),), {}))
    assert not block["plain"].weight.any() and not block["plain"].bias.any()


def test_writers_are_what_is_added_to_the_stream() -> None:
    model = build_model("t5", "lm")
    found = find_writers(model, ["encoder.block.1", "decoder.block.0"])
    assert {name: sorted(call.module for call in calls or []) for name, calls in found.items()} == {
        "encoder.block.1": ["layer.0.SelfAttention.o", "layer.1.DenseReluDense.wo"],
        "decoder.block.0": ["layer.0.SelfAttention.o", "layer.1.EncDecAttention.o", "layer.2.DenseReluDense.wo"],
    }
    assert find_writers(build_model("bert", "lm"), ["bert.encoder.layer.0"]) == {"bert.encoder.layer.0": None}


# On and off, once and again


def test_off_within_off_is_off_once() -> None:
    model = build_model("llama", "lm")
    inputs = make_probe_inputs(model)
    expected = logits(model, inputs)
    tuning = attach(model)
    with torch.no_grad():
        for t in tuning.state().values():
            t.add_(0.1)
    tuned = logits(model, inputs)
    with tuning.disable(), tuning.disable():
        assert torch.equal(logits(model, inputs), expected)
    assert torch.equal(logits(model, inputs), tuned)
    tuning.merge()
    assert torch.equal(logits(model, inputs), tuned)
    with pytest.raises(TuningError, match="cannot be disabled"), tuning.disable():
        pass


def test_what_moves_besides_is_part_of_the_state() -> None:
    model = build_model("llama", "lm")
    tuning = BlockExpansion(model, also_train=["model.norm"])
    assert model.model.norm.weight.requires_grad and "model.norm.weight" in tuning.state()
    with pytest.raises(TuningError, match="lacks"):
        tuning.load({})


def test_a_grown_model_can_grow_again() -> None:
    model = build_model("gpt2", "lm")
    inputs = batch("gpt2", "lm")
    expected = logits(model, inputs)
    first = BlockExpansion(model, every=2)
    first.merge()
    second = BlockExpansion(model, every=3)
    assert len(model.transformer.h) == model.config.n_layer == 4
    assert torch.equal(logits(model, inputs), expected)
    loss(model, inputs).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == second.state().keys()


def test_a_frozen_base_grows_as_well_and_comes_back_frozen() -> None:
    model = build_model("llama", "lm")
    model.requires_grad_(False)
    tuning = attach(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == tuning.state().keys()
    tuning.detach()
    assert not any(p.requires_grad for p in model.parameters())
