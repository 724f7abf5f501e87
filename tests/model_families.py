"""Tiny configurations and models of every model type of transformers, by rules on the names of a configuration's fields."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from postgrad.models.pretrained import _CLASSES
from postgrad.models.task import Task

VOCABULARY = 320

_NAMES = {
    Task.CAUSAL: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    Task.MASKED: modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    Task.TEXT_TO_TEXT: modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}

# The first rule whose pattern matches the whole name of a field decides its number; others keep their default.
_SIZES: tuple[tuple[str, int], ...] = tuple(
    (pattern, value)
    for value, patterns in {
        VOCABULARY: r"vocab_size|decoder_vocab_size|vocab_size_per_layer_input|unpadded_vocab_size|(src|tgt)_vocab_size",
        512: r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|max_(source|target)_positions"
        r"|max_(en|de)coder_position_embeddings",
        32: r"hidden_size|d_model|n_embd|dim|emb_dim|model_dim|embedding_size|word_embed_proj_dim|ngram_vocab_size_base"
        r"|(input|output)_embedding_size|backbone_hidden_size|lru_width|entity_emb_size|embedding_dim|kv_channels|d_latents"
        r"|moe_latent_size|(shared_expert|moe|expert|moe_shared_expert|shared|shared_experts)_intermediate_size"
        r"|expert_ffn_hidden_size|intra_bottleneck_size|true_hidden_size|adaptor_dim|out_hidden_size|projection_dim",
        64: r".*intermediate_size(_mlp)?|.*ffn_dim|n_inner|d_ff|dff|dim_ff|d_inner|ffn_hidden_size|hidden_dim"
        r"|feed_forward_size",
        4: r"num_(encoder_|decoder_|self_|cross_|)(attention_)?heads|n_heads?|(en|de)coder_attention_heads|attention_heads"
        r"|num_local_experts|num_experts|n_routed_experts|moe_num_experts|index_n_heads|swa_num_attention_heads"
        r"|linear_num_value_heads|linear_num_heads|num_mamba_heads|zero_expert_num",
        2: r"num_key_value_heads|num_kv_heads|swa_num_key_value_heads|linear_num_key_heads|.*num_experts_per_tok|moe_topk|moe_k"
        r"|top_k_experts|num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|num_(en|de)coder_layers|num_blocks"
        r"|num_self_attends_per_block|depth|indexer_kv_heads|heads_per_ngram|num_(en|de)coder_layers",
        8: r"(qk_nope_|qk_rope_|v_|index_|swa_|linear_key_|linear_value_|linear_|attention_|)head_(dim|size)|d_kv|d_head"
        r"|dim_head|mamba_(d_)?head(_dim)?|rotary_dim|indexer_head_dim|hidden_size_per_layer_input|time_step_rank|qk_head_dim",
        16: r"sliding_window(_size)?|window_size|attention_window_size|local_attention|attention_chunk_size|(q|kv|o)_lora_rank"
        r"|router_hidden_size|index_topk|laurel_rank|keep_window_size|image_size|rel_extent|gated_norm_rank|hc_lowrank",
        1: r"n_group|topk_group|first_k_dense_replace|num_dense_layers|n_shared_experts|num_shared_experts|num_mem_blocks"
        r"|interleave_moe_layer_step",
    }.items()
    for pattern in (patterns,)
)
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
_OPTIONAL = {"head_dim": 8, "num_key_value_heads": 2}
"""Fields whose default of None some families do not compute from others."""
_TOKEN = re.compile(r".*(_token_id|_token_index|_index|_idx)")
_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")


def model_types(task: Task) -> list[str]:
    """The model types that transformers maps to a language model of a task."""
    return sorted(_NAMES[task])


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """A configuration of a model of a few thousand weights, with each kind of layer that the family's default has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _make(CONFIG_MAPPING[model_type], **changes)


def tiny_config_of_task(model_type: str, task: Task) -> PreTrainedConfig:
    """A tiny configuration for a task: an encoder under a causal head is one that its configuration makes a decoder."""
    fields = {field.name for field in dataclasses.fields(CONFIG_MAPPING[model_type])}
    options = {"is_decoder": True, "causal": True} if task == Task.CAUSAL else {}
    return tiny_config(model_type, **{name: value for name, value in options.items() if name in fields})


def _make(config_class: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    numbers = dict(_numbers(config_class))
    default: Any = config_class()
    names = {field.name for field in dataclasses.fields(config_class)}
    kinds = {name: list(dict.fromkeys(getattr(default, name, None) or ())) for name in _KINDS if name in names}
    kinds = {name: values for name, values in kinds.items() if values and isinstance(values[0], str)}
    depth = max([2, *map(len, kinds.values())])
    mla = {"num_key_value_heads": 4} if "kv_lora_rank" in numbers and "num_key_value_heads" in names else {}
    layers = {
        name: 2 if depth == 2 else depth for name in numbers if name in ("num_hidden_layers", "n_layer", "num_layers")
    }
    per_layer = {name: [values[i % len(values)] for i in range(depth)] for name, values in kinds.items()}
    parts = {
        name: _make(type(getattr(default, name)))
        for name in config_class.sub_configs
        if name not in changes and isinstance(getattr(default, name, None), PreTrainedConfig)
    }
    special = _SPECIAL.get(config_class.model_type, {})
    return config_class(**{**numbers, **layers, **per_layer, **mla, **parts, **special, **changes})


def _numbers(config_class: type[PreTrainedConfig]) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(config_class):
        if field.name in _TOKENS:
            yield field.name, _TOKENS[field.name]
        elif field.name in _OPTIONAL and field.default is None:
            yield field.name, _OPTIONAL[field.name]
        elif isinstance(field.default, bool) or not isinstance(field.default, int | float):
            continue
        elif "drop" in field.name or "jitter" in field.name:
            yield field.name, 0.0 if isinstance(field.default, float) else 0
        elif isinstance(field.default, float):
            continue
        elif _TOKEN.fullmatch(field.name) and field.default >= 16:
            yield field.name, 3
        else:
            size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, field.name)), None)
            if size is not None and (size < field.default or "per_tok" in field.name):
                yield field.name, size


def make_tiny_model(
    config: PreTrainedConfig, task: Task, seed: int = 0, scale: float = 4.0, auto_class: Any = None
) -> PreTrainedModel:
    """A model of a configuration with random weights, large enough that tokens and layers matter."""
    auto = auto_class or _CLASSES[task]
    if type(config) not in auto._model_mapping:
        auto = AutoModelForImageTextToText
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = auto.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "norm" not in name:
                parameter.mul_(scale)
    return model


_SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "num_hidden_layers": 2, "attn_layer_indices": [1]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4, "n_routed_experts": 4},
    "esm": {"vocab_size": VOCABULARY, "mask_token_id": 4},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_d_state": 16},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {
        "num_kv_shared_layers": 2,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "luke": {"entity_vocab_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "neomme": {"head_dim": 16},
    **{
        f"{name}_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
        for name in ("qwen2_vl", "qwen2_5_vl")
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False},
    "roc_bert": {
        "pronunciation_vocab_size": 16,
        "shape_vocab_size": 16,
        "enable_pronunciation": False,
        "enable_shape": False,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3},
    "zaya": {"num_experts_per_tok": 1},
}
"""Fields that rules on names cannot find: they must agree with others, or their default is None."""
