"""Base weights that are trained in addition to a tuning's own tensors, and how their old values come back.

A weight of the body gets its old value back while the tuning is disabled and when it is detached. A task's own layer is
new: no base has another value of it, so it keeps its trained one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from postgrad.tuning.parameter_location import task_layer_parameters
from postgrad.tuning.tuning import freeze, unfreeze

_ADAPTERS = re.compile(r"(\.base_layer)+\.")


class ExtraTrainable:
    """The parameters that patterns match, in a model that is otherwise frozen."""

    def __init__(self, model: PreTrainedModel, patterns: Sequence[str]) -> None:
        """Freeze the model except for what `patterns` match. Raises `TuningError` as `unfreeze` does."""
        self.model = model
        self._initial_requires_grad = {name: p.requires_grad for name, p in named_parameters(model).items()}
        task_layer = set(task_layer_parameters(model))
        self.names = [base_parameter_name(name) for name in unfreeze(model, patterns)]
        parameters = self.tensors()
        freeze(model)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        self._initial_values = {n: parameters[n].detach().clone() for n in self.names if n not in task_layer}

    def tensors(self) -> dict[str, nn.Parameter]:
        """The current parameters by name."""
        parameters = named_parameters(self.model) if self.names else {}
        return {name: parameters[name] for name in self.names}

    @contextmanager
    def use_initial_values(self) -> Iterator[None]:
        """Context in which weights of the body have their old values; tensors saved by autograd are valid again after it."""
        _reshard(self.model)
        tensors = self.tensors()
        trained = {name: tensors[name].detach().clone() for name in self._initial_values}
        self._copy_values(self._initial_values)
        try:
            yield
        finally:
            self._copy_values(trained)

    def restore_values(self) -> None:
        """Give weights of the body their old values for good."""
        self._copy_values(self._initial_values)

    def restore_requires_grad(self) -> None:
        """Set `requires_grad` of every parameter to what it was."""
        for name, parameter in named_parameters(self.model).items():
            if parameter.is_floating_point():
                parameter.requires_grad_(self._initial_requires_grad.get(name, parameter.requires_grad))

    def _copy_values(self, values: Mapping[str, Tensor]) -> None:
        _reshard(self.model)
        parameters = self.tensors()
        for name, value in values.items():
            target = parameters[name].data
            if isinstance(target, DTensor) and not isinstance(value, DTensor):  # taken before FSDP sharded the weight
                value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
            target.copy_(value)


def _reshard(model: nn.Module) -> None:
    """Free the weights that FSDP gathered for a forward pass: values written into them would be lost afterwards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters, by their names without adapters around their layers."""
    return {base_parameter_name(name): parameter for name, parameter in model.named_parameters()}


def base_parameter_name(name: str) -> str:
    """A parameter's name without the adapters around its layer, of which experts have several."""
    return _ADAPTERS.sub(".", name)
