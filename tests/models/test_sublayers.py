"""Are sub-layers found where architectures really have them?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AutoModel,
    BloomConfig,
    FalconConfig,
    GraniteConfig,
    LongformerConfig,
    MambaConfig,
    MixtralConfig,
    PreTrainedConfig,
    SwitchTransformersConfig,
)

from postgrad.models.sublayers import Block, eval_mode, find_blocks
from tests.tuning.families import FAMILIES, MORE_FAMILIES, build_model

Ends = tuple[tuple[str, str, int | None, str], ...]

ATTENTION, CROSS, FEED = "attention", "cross_attention", "feed_forward"

BERT: Ends = (
    (ATTENTION, "attention.output.dropout", None, "attention.self.query"),
    (FEED, "output.dropout", None, "intermediate.dense"),
)
LLAMA: Ends = ((ATTENTION, "self_attn", 0, "self_attn.q_proj"), (FEED, "mlp", None, "mlp.gate_proj"))
BART_ENCODER: Ends = ((ATTENTION, "self_attn", 0, "self_attn.q_proj"), (FEED, "fc2", None, "fc1"))
T5_ENCODER: Ends = (
    (ATTENTION, "layer.0.dropout", None, "layer.0.SelfAttention.q"),
    (FEED, "layer.1.dropout", None, "layer.1.DenseReluDense.wi"),
)

# First block of the encoder or only stack, and first block of the decoder where there are two stacks.
KNOWN: dict[str, tuple[Ends, ...]] = {
    "llama": (LLAMA,),
    "qwen3": (LLAMA,),
    "bert": (BERT,),
    "electra": (BERT,),
    "gpt2": (((ATTENTION, "attn", 0, "attn.c_attn"), (FEED, "mlp", None, "mlp.c_fc")),),
    "t5": (
        T5_ENCODER,
        (
            T5_ENCODER[0],
            (CROSS, "layer.1.dropout", None, "layer.1.EncDecAttention.q"),
            (FEED, "layer.2.dropout", None, "layer.2.DenseReluDense.wi"),
        ),
    ),
    "bart": (
        BART_ENCODER,
        (BART_ENCODER[0], (CROSS, "encoder_attn", 0, "encoder_attn.q_proj"), BART_ENCODER[1]),
    ),
    "opt": (BART_ENCODER,),
    "distilbert": (((ATTENTION, "attention", 0, "attention.q_lin"), (FEED, "ffn", None, "ffn.lin1")),),
    "modernbert": (((ATTENTION, "attn", 0, "attn.Wqkv"), (FEED, "mlp", None, "mlp.Wi")),),
    # Both are added to the stream at once, the feed-forward first.
    "gpt-neox": (
        (
            (FEED, "post_mlp_dropout", None, "mlp.dense_h_to_4h"),
            (ATTENTION, "post_attention_dropout", None, "attention.query_key_value"),
        ),
    ),
    # A norm stands between the sub-layer and the stream.
    "gemma2": (
        (
            (ATTENTION, "post_attention_layernorm", None, "self_attn.q_proj"),
            (FEED, "post_feedforward_layernorm", None, "mlp.gate_proj"),
        ),
    ),
    "phi3": (
        (
            (ATTENTION, "resid_attn_dropout", None, "self_attn.qkv_proj"),
            (FEED, "resid_mlp_dropout", None, "mlp.gate_up_proj"),
        ),
    ),
}

POST_LN = {"bert", "electra", "roberta", "distilbert", "bart"}


def ends(block: Block) -> Ends:
    """A block's sub-layers by the names of their modules."""
    name = {module: name for name, module in block.module.named_modules()}
    return tuple((s.name, name[s.output], s.index, name[s.entry] if s.entry else "") for s in block.sublayers)


@pytest.mark.parametrize("family", KNOWN)
def test_ends_are_those_read_in_the_architectures_own_code(family: str) -> None:
    blocks = find_blocks(build_model(family, "lm"))
    stacks = len(KNOWN[family])
    assert len(blocks) == 2 * stacks and {block.width for block in blocks} == {32}
    for stack, expected in enumerate(KNOWN[family]):
        assert ends(blocks[2 * stack]) == ends(blocks[2 * stack + 1]) == expected


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_only_post_norm_blocks_have_a_norm_behind_the_sum(family: str) -> None:
    for block in find_blocks(build_model(family, "lm")):
        assert {s.norm is not None for s in block.sublayers} == {family in POST_LN}


def test_watching_leaves_no_hook_and_no_mode_behind() -> None:
    model = build_model("t5", "lm").train()
    model.encoder.block[0].eval()
    modes = [module.training for module in model.modules()]
    find_blocks(model)
    assert [module.training for module in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_modes_come_back_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    with pytest.raises(InterruptedError), eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise InterruptedError
    assert [module.training for module in model.modules()] == [True, True, False]


SIZES = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}

# Architectures that are awkward, each in its own way.
AWKWARD: dict[str, tuple[PreTrainedConfig, Ends]] = {
    "one block that is called for every layer": (
        AlbertConfig(**SIZES, embedding_size=16),
        (
            (ATTENTION, "albert_layers.0.attention.output_dropout", None, "albert_layers.0.attention.query"),
            (FEED, "albert_layers.0.ffn_output", None, "albert_layers.0.ffn"),
        ),
    ),
    "the residual addition is inside the sub-layer": (
        BloomConfig(vocab_size=60, hidden_size=16, n_layer=2, n_head=2),
        (
            (ATTENTION, "self_attention.dense", None, "self_attention.query_key_value"),
            (FEED, "mlp.dense_4h_to_h", None, "mlp.dense_h_to_4h"),
        ),
    ),
    "attention and feed-forward are summed in place": (
        FalconConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, alibi=False),
        (
            (FEED, "mlp", None, "mlp.dense_h_to_4h"),
            (ATTENTION, "self_attention", 0, "self_attention.query_key_value"),
        ),
    ),
    "what is added is scaled": (
        GraniteConfig(**SIZES, num_key_value_heads=2, residual_multiplier=0.5),
        ((ATTENTION, "self_attn", 0, "self_attn.q_proj"), (FEED, "mlp", None, "mlp.gate_proj")),
    ),
    "experts, of which only some are called": (
        MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=1),
        ((ATTENTION, "self_attn", 0, "self_attn.q_proj"), (FEED, "mlp", None, "mlp.gate")),
    ),
    "attention is written into a buffer piece by piece": (
        LongformerConfig(**SIZES, attention_window=4, max_position_embeddings=64),
        BERT,
    ),
    "no attention but a recurrence": (
        MambaConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, state_size=4),
        ((ATTENTION, "mixer", None, "mixer.in_proj"),),
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", AWKWARD)
def test_awkward_architectures(case: str) -> None:
    config, expected = AWKWARD[case]
    torch.manual_seed(0)
    assert ends(find_blocks(AutoModel.from_config(config))[0]) == expected


def test_cross_attention_is_told_from_feed_forward_without_fused_attention() -> None:
    """With plain matrix products, keys and values come from the encoder alone."""
    model = build_model("bart", "lm")
    model.set_attn_implementation("eager")
    assert [s.name for s in find_blocks(model)[-1].sublayers] == [ATTENTION, CROSS, FEED]


def test_experts_of_an_encoder_decoder() -> None:
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=60, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=2, num_experts=2
    )
    blocks = find_blocks(AutoModel.from_config(config))
    assert [[s.name for s in b.sublayers] for b in blocks] == 2 * [[ATTENTION, FEED]] + 2 * [[ATTENTION, CROSS, FEED]]


def test_ends_that_blocks_share_are_nobodys() -> None:
    model = build_model("llama", "lm")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    assert [[s.name for s in block.sublayers] for block in find_blocks(model)] == [[ATTENTION], [ATTENTION]]


def test_an_entry_that_runs_twice_is_none() -> None:
    model = build_model("llama", "lm")
    layer = model.model.layers[0]
    layer.mlp.up_proj = layer.mlp.gate_proj
    entries = {s.name: s.entry for s in find_blocks(model)[0].sublayers}
    assert entries == {ATTENTION: layer.self_attn.q_proj, FEED: None}


def test_an_end_that_runs_twice_gives_way_to_the_one_before() -> None:
    model = build_model("gpt-neox", "lm")
    layer = model.gpt_neox.layers[0]
    layer.post_mlp_dropout = layer.post_attention_dropout
    outputs = {s.name: (s.output, s.index) for s in find_blocks(model)[0].sublayers}
    assert outputs == {ATTENTION: (layer.attention, 0), FEED: (layer.mlp, None)}


class Collected(nn.Module):
    """A feed-forward part whose answer is added to a fresh tensor first, as experts' answers are."""

    def __init__(self, fresh: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.fresh = nn.Linear(32, 32), fresh

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return self.fresh(hidden_BTD) + self.inner(hidden_BTD)


@pytest.mark.parametrize("fresh", [torch.zeros_like, lambda x: x.new_zeros(x.shape)])
def test_a_fresh_tensor_is_no_stream(fresh: Callable[[Tensor], Tensor]) -> None:
    model = build_model("llama", "lm")
    mlp = model.model.layers[0].mlp = Collected(fresh)
    assert [s.output for s in find_blocks(model)[0].sublayers if s.name == FEED] == [mlp]


@torch.library.custom_op("postgrad::packed_product", mutates_args=())
def packed_product(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight


class Packed(nn.Module):
    """A feed-forward part whose product is another library's, as that of quantised weights is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32, 32))

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return packed_product(hidden_BTD, self.weight)


def test_products_of_other_libraries_count() -> None:
    model = build_model("llama", "lm")
    mlp = model.model.layers[0].mlp = Packed()
    assert [(s.output, s.entry) for s in find_blocks(model)[0].sublayers if s.name == FEED] == [(mlp, mlp)]


def test_a_model_without_blocks_has_none() -> None:
    model = build_model("llama", "lm")
    model.model.layers = nn.ModuleList()
    assert find_blocks(model) == []
