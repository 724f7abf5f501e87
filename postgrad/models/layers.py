"""The blocks and embeddings of a model, whatever its architecture calls them."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from postgrad.errors import ModelError


def get_embedding_weight(model: PreTrainedModel) -> Tensor:
    """The input embedding's weight, of shape (V, D)."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def count_parameters(model: nn.Module) -> int:
    """The number of weights, tied ones counted once."""
    return sum(p.numel() for p in model.parameters())


def get_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks of all stacks, in order. Raises `ModelError` when there are none."""
    stacks = get_layer_stacks(model)
    return [layer for stack in stacks for layer in stack]


def get_layer_stacks(model: PreTrainedModel) -> list[nn.ModuleList]:
    """The stacks of blocks: the longest module list of the backbone, or of its encoder and of its decoder."""
    body = model.base_model
    halves = (
        [body.get_submodule(name) for name in ("encoder", "decoder")] if model.config.is_encoder_decoder else [body]
    )
    stacks: list[nn.ModuleList] = []
    for half in halves:
        lists = {name: m for name, m in half.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
        # A list inside a block (experts of a mixture) may be longer than the stack.
        outer = [m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
        if not outer:
            raise ModelError(f"no stack of layers was found in {type(model).__name__}", where="model")
        stacks.append(max(outer, key=len))
    return stacks
