"""Hyperparameters and tensors of a model in llama.cpp's form.

The names of tensors come from the `gguf` package; what llama.cpp stores in another order is here. The architectures are those
that transformers reads back, and whose logits were compared with llama.cpp's (`tests/models/test_gguf_file.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from postgrad.errors import ModelError, format_names
from postgrad.models.pretrained import published_tensors
from postgrad.models.tied_weights import untied_state

if TYPE_CHECKING:
    from gguf import GGUFWriter

CONVERTER_HINT = "export a folder (a name without .gguf) and convert it with llama.cpp's convert_hf_to_gguf.py"
_WHERE = "export"


def _interleave_rotary(name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
    """Rows of query and key heads, whose rotary pairs are neighbours in llama.cpp and halves in transformers."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _transpose_conv1d(name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
    is_conv1d = name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
    return tensor.T if is_conv1d else tensor


def _unchanged(name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp."""

    name: str
    activations: tuple[str, ...]
    """Those that llama.cpp computes."""
    convert: Callable[[str, Tensor, PreTrainedConfig], Tensor] = _unchanged
    has_rope: bool = True
    has_rope_factors: bool = False
    """Reads a factor for each rotary frequency from a tensor."""


ARCHITECTURES = {
    **dict.fromkeys(("llama", "mistral"), Architecture("llama", ("silu",), _interleave_rotary, has_rope_factors=True)),
    "qwen2": Architecture("qwen2", ("silu",)),
    "qwen3": Architecture("qwen3", ("silu",)),
    "gpt2": Architecture("gpt2", ("gelu_new", "gelu_pytorch_tanh"), _transpose_conv1d, has_rope=False),
}
"""By `model_type`."""


def find_architecture(config: PreTrainedConfig) -> Architecture:
    """The architecture of a model. Raises `ModelError` for one, or a setting, that is not supported."""
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise _unsupported(f"the architecture {config.model_type!r}", format_names(tuple(ARCHITECTURES), limit=8))
    activation = getattr(config, "hidden_act", None) or config.activation_function
    if activation not in found.activations:
        raise _unsupported(f"a {config.model_type} with the activation {activation!r}", " or ".join(found.activations))
    for key, usual in _USUAL_VALUES.items():
        if (value := getattr(config, key, usual)) != usual:
            raise _unsupported(f"a {config.model_type} with `{key}: {value}`", f"`{key}: {usual}`")
    return found


_USUAL_VALUES = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def _unsupported(problem: str, expected: str) -> ModelError:
    return ModelError(f"{problem} is not written", where=_WHERE, expected=expected, hint=CONVERTER_HINT)


def add_hyperparameters(writer: GGUFWriter, architecture: Architecture, config: PreTrainedConfig) -> None:
    """Write the shape of a model. Raises `ModelError` for rotary embeddings that llama.cpp computes differently."""
    writer.add_context_length(_context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if not architecture.has_rope:  # GPT-2
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    _add_rope(writer, architecture, config.rope_parameters)


def _context_length(config: PreTrainedConfig) -> int:
    """At most the sliding window: up to it llama.cpp, which attends to everything, computes the same."""
    is_full = {*(getattr(config, "layer_types", None) or ())} == {"full_attention"}
    window = None if is_full else getattr(config, "sliding_window", None)
    return min(config.max_position_embeddings, window or config.max_position_embeddings)


def _add_rope(writer: GGUFWriter, architecture: Architecture, rope: dict[str, float | str]) -> None:
    from gguf import RopeScalingType

    kind, share = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
    if share != 1.0:
        raise _unsupported(f"`partial_rotary_factor: {share}`", "rotary embeddings of whole heads")
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind != "default" and not (kind == "llama3" and architecture.has_rope_factors):
        raise _unsupported(f"`rope_type: {kind}`", "default or linear, of llama also llama3")


def iter_tensors(
    model: PreTrainedModel, architecture: Architecture, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor with its name and values in llama.cpp's form, matrices in `dtype`.

    Raises `ModelError` for a tensor that llama.cpp has no name for.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    (number,) = (number for number, name in MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = get_tensor_name_map(number, model.config.num_hidden_layers)
    for name, tensor in published_tensors(model, untied_state(model), dtype).items():
        new_name = names.get_name(name, (".weight", ".bias"))
        if new_name is None:
            raise _unsupported(f"the tensor {name}", f"tensors of llama.cpp's {architecture.name}")
        converted = architecture.convert(name, tensor, model.config)
        # Vectors and positions are added to or multiply activations in fp32.
        is_matrix = converted.ndim > 1 and not new_name.startswith("position_embd")
        yield new_name, converted.to(dtype if is_matrix else torch.float32).contiguous()
    if architecture.has_rope and model.config.rope_parameters.get("rope_type") == "llama3":
        yield "rope_freqs.weight", _rope_factors(model)


def _rope_factors(model: PreTrainedModel) -> Tensor:
    """What each rotary frequency of a Llama 3 is divided by."""
    frequencies = next(buffer for name, buffer in model.named_buffers() if name.endswith("rotary_emb.inv_freq"))
    base, size = model.config.rope_parameters["rope_theta"], 2 * frequencies.numel()
    return 1 / base ** (torch.arange(0, size, 2) / size) / frequencies.float()
