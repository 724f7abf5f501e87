"""Weights of fused experts as targets of LoRA: stacks of matrices in one tensor, which are no layers.

PEFT wraps the module once for each of its tensors (`target_parameters`): the innermost wrapper belongs to the first of them in
the model's order. Each wrapper adds the low-rank update of every expert to the tensor during a forward pass.

Legend: E experts, R rank of each expert's update, I inputs and O outputs of a matrix; in PEFT's layers A is (E R, I) and B
(O, R E).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from postgrad.models.experts import find_experts
from postgrad.tuning.extra_trainable import base_parameter_name
from postgrad.tuning.parameter_location import replace_module


class ExpertsLayer(ParamWrapper):
    """PEFT's wrapper, which leaves the parameters of the module in their order, and is not compiled.

    It makes a new class for the module in each forward pass, and compiled code would be compiled again for each.
    """

    @torch.compiler.disable
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The module's output with the updated tensor."""
        return super().forward(x, *args, **kwargs)

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        parameters = self.get_base_layer()._parameters
        order = list(parameters)
        try:
            with super()._activate_lora(active_adapters):
                yield
        finally:
            for name in order:  # torch puts a parameter that was replaced behind the others
                parameters[name] = parameters.pop(name)


def expert_weights(model: PreTrainedModel) -> list[str]:
    """The names of the tensors that hold a matrix of every expert, without the adapters around them."""
    return [
        base_parameter_name(f"{module_name}.{name}")
        for module_name, module in find_experts(model).items()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    ]


def is_expert_weight(model: nn.Module, name: str) -> bool:
    """Whether a name is that of a tensor and not of a layer, under any adapters."""
    path, _, local = name.rpartition(".")
    owner = list(_wrappers_and_owner(model, path))[-1]
    return isinstance(getattr(owner, local, None), nn.Parameter)


def add_expert_adapter(model: nn.Module, name: str, adapter: str, config: LoraConfig) -> ParamWrapper:
    """Add an adapter to the tensor of this name: to its wrapper if there is one, or in a new wrapper around the module."""
    existing = find_wrapper(model, name)
    if existing is not None:
        existing.update_layer(adapter, config.r, lora_alpha=config.lora_alpha, config=config)
        return existing
    path, _, local = name.rpartition(".")
    options: dict[str, Any] = {
        "parameter_name": local,
        "config": config,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
    }
    wrapper = ExpertsLayer(model.get_submodule(path), adapter, **options)
    replace_module(model, path, wrapper)
    return wrapper


def find_wrapper(model: nn.Module, name: str) -> ParamWrapper | None:
    """The wrapper of a tensor; None without one."""
    path, _, local = name.rpartition(".")
    wrappers = (module for module in _wrappers_and_owner(model, path) if isinstance(module, ParamWrapper))
    return next((wrapper for wrapper in wrappers if wrapper.parameter_name == local), None)


def remove_wrapper(model: nn.Module, name: str, wrapper: ParamWrapper) -> None:
    """Take a wrapper out of those around a module."""
    path = name.rpartition(".")[0]
    outer = next((m for m in _wrappers_and_owner(model, path) if getattr(m, "base_layer", None) is wrapper), None)
    if outer is None:
        replace_module(model, path, wrapper.base_layer)
    else:
        outer.base_layer = wrapper.base_layer


def current_name(model: nn.Module, name: str) -> str:
    """The name of a tensor under the wrappers that are around its module now."""
    path, _, local = name.rpartition(".")
    depth = len(list(_wrappers_and_owner(model, path))) - 1
    return f"{path}{depth * '.base_layer'}.{local}"


def peft_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """The names of PEFT's wrappers for these tensors, by the tensors' own names."""
    chosen = set(names)
    by_module: dict[str, list[str]] = {}
    for name in expert_weights(model):
        if name in chosen:
            by_module.setdefault(name.rpartition(".")[0], []).append(name)
    return {
        name: path + (len(tensors) - 1 - place) * ".base_layer"
        for path, tensors in by_module.items()
        for place, name in enumerate(tensors)
    }


def _wrappers_and_owner(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The wrappers around a module, from the outermost, and the module."""
    module = model.get_submodule(path)
    while isinstance(module, ParamWrapper):
        yield module
        module = module.base_layer
    yield module
