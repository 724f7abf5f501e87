"""What of the base's own moves besides a tuning's tensors, and how does it come back?

A weight of the body has a value to go back to, and gets it while the tuning is off and when it is taken out. A task's own
layer was new, so there is no base that had another: it stays what it became.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from postgrad.tuning.parameter_location import task_layer_parameters
from postgrad.tuning.tuning import freeze, unfreeze


class ExtraTrainable:
    """The parameters that patterns name in a model of which all else is frozen."""

    def __init__(self, model: PreTrainedModel, patterns: Sequence[str]) -> None:
        """Freeze the model, and let move what `patterns` name. Raises `TuningError`, before anything changes, as `unfreeze`."""
        self.model = model
        self._initial_requires_grad = {name: p.requires_grad for name, p in named_parameters(model).items()}
        fresh = set(task_layer_parameters(model))
        self.names = [base_parameter_name(name) for name in unfreeze(model, patterns)]
        now = self.tensors()
        freeze(model)
        for parameter in now.values():
            parameter.requires_grad_(True)
        self._initial_values = {name: now[name].detach().clone() for name in self.names if name not in fresh}

    def tensors(self) -> dict[str, nn.Parameter]:
        """The parameters that move besides, as they are now."""
        parameters = named_parameters(self.model) if self.names else {}
        return {name: parameters[name] for name in self.names}

    @contextmanager
    def use_initial_values(self) -> Iterator[None]:
        """Inside, weights of the body have their old values; what autograd kept of them is right again afterwards."""
        _reshard(self.model)
        now = {
            name: parameter.detach().clone()
            for name, parameter in self.tensors().items()
            if name in self._initial_values
        }
        self._copy_values(self._initial_values)
        try:
            yield
        finally:
            self._copy_values(now)

    def restore_values(self) -> None:
        """Give weights of the body their old values for good."""
        self._copy_values(self._initial_values)

    def restore_requires_grad(self) -> None:
        """Let move again what moved before, and nothing else."""
        for name, parameter in named_parameters(self.model).items():
            if parameter.is_floating_point():
                parameter.requires_grad_(self._initial_requires_grad.get(name, parameter.requires_grad))

    def _copy_values(self, values: Mapping[str, Tensor]) -> None:
        _reshard(self.model)
        parameters = self.tensors()
        for name, value in values.items():
            held = parameters[name].data
            split = isinstance(held, DTensor) and not isinstance(value, DTensor)
            held.copy_(distribute_tensor(value.to(held.device), held.device_mesh, held.placements) if split else value)


def _reshard(model: nn.Module) -> None:
    """Let FSDP hold its shards alone: values given to what it gathered for a forward pass would be gone after it."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by the names that they have without adapters around their layers."""
    return {base_parameter_name(name): parameter for name, parameter in model.named_parameters()}


def base_parameter_name(name: str) -> str:
    """A parameter's name without the adapters around its layer."""
    return name.replace(".base_layer.", ".")
