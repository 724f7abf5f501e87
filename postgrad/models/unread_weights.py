"""A model whose weights are not read yet: each rank reads its rows of them, block by block, as the model is sharded.

Transformers builds the model from placeholders, which have the shapes of the weights in the files and take one value of memory
for each row. So names, ties, new layers, computed buffers and all checks are those of any other loading. A placeholder is NaN
everywhere: whatever is computed from it is NaN, and such a model is loaded as a whole instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from postgrad.errors import PostgradError
from postgrad.models.auto_classes import find_weight_files, load_config, load_generation_config
from postgrad.models.finite import refuse_non_finite
from postgrad.models.location import ModelLocation
from postgrad.models.pretrained import ClassifierSpec, LoadResult, load_pretrained
from postgrad.models.quantized_folders import is_quantized
from postgrad.models.task import Task
from postgrad.models.weight_files import StoredTensors


@dataclass(frozen=True)
class UnreadWeights:
    """Where the values of a model's placeholders are."""

    stored: StoredTensors
    owner: str
    """The model's name, for errors."""
    names: dict[int, str] = field(default_factory=dict)
    """The name in the files of each placeholder, by its `id`."""

    def read(self, module: nn.Module, rank: int, ranks: int, dtype: torch.dtype) -> None:
        """Give the placeholders of a module memory, and the rows of `rank` their values; the other rows have none.

        Raises `ModelError` for values that are not finite.
        """
        for parameter in module.parameters():
            if (name := self.names.pop(id(parameter), None)) is None:
                if parameter.is_floating_point() and dtype != torch.float32:
                    parameter.data = parameter.data.to(dtype)
                continue
            size = -(-len(parameter) // ranks)
            rows = slice(rank * size, (rank + 1) * size)
            # Memory that is never written to takes no room.
            values = torch.empty(parameter.shape, dtype=dtype)
            values[rows] = self.stored[name][rows]
            refuse_non_finite([(name, values[rows])], self.owner, where="model")
            parameter.data = values

    def find_computed(self, model: nn.Module) -> str | None:
        """The first parameter or buffer that was computed from placeholders; None when there is none."""
        named: Iterator[tuple[str, Tensor]] = (*model.named_parameters(), *model.named_buffers())  # type: ignore[assignment]
        return next((name for name, t in named if id(t) not in self.names and _has_nan(t)), None)


@dataclass(frozen=True)
class UnreadModel:
    """A model of placeholders, and where its weights are."""

    loaded: LoadResult
    weights: UnreadWeights

    def tensors(self) -> Mapping[str, Tensor]:
        """The weights by name, in fp32, each read when it is asked for."""
        return _NamedWeights(dict(self.loaded.model.named_parameters(remove_duplicate=False)), self.weights)


@dataclass(frozen=True)
class _NamedWeights(Mapping[str, Tensor]):
    parameters: Mapping[str, nn.Parameter]
    weights: UnreadWeights

    def __getitem__(self, name: str) -> Tensor:
        parameter = self.parameters[name]
        stored = self.weights.names.get(id(parameter))
        return parameter.detach() if stored is None else self.weights.stored[stored].float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)


def load_unread(
    start: ModelLocation, task: Task, *, layer: ClassifierSpec | None = None, attention: str | None = None
) -> UnreadModel | None:
    """The plain model of `start` with placeholders for its matrices.

    None for a model with a tuning, or whose weights are no tensors of its files as they are (stacked experts, in some
    families; quantised weights).
    """
    if start.base is not None or is_quantized(load_config(start.name_or_path)):
        return None
    stored = StoredTensors(find_weight_files(start.name_or_path))
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    is_large = {name: len(shape) > 1 and shape[0] > 1 for name, shape in shapes.items()}
    state = {name: _placeholder(shapes[name]) if is_large[name] else stored[name].clone() for name in shapes}
    names = {tensor.data_ptr(): name for name, tensor in state.items() if is_large[name]}
    try:
        loaded = load_pretrained(start, task, layer=layer, attention=attention, state=dict(state), has_values=False)
    except PostgradError:
        return None  # loading it as a whole says what is wrong
    if loaded.model.can_generate():
        loaded.model.generation_config = load_generation_config(start.name_or_path)
    weights = UnreadWeights(stored, start.name)
    for parameter in loaded.model.parameters():
        name = names.get(parameter.data_ptr())
        if name is not None and (parameter.shape, parameter.stride()) == (state[name].shape, state[name].stride()):
            weights.names[id(parameter)] = name
    return None if weights.find_computed(loaded.model) else UnreadModel(loaded, weights)


def _placeholder(shape: tuple[int, ...]) -> Tensor:
    return torch.full(shape[:1], torch.nan).as_strided(shape, (1, *[0] * (len(shape) - 1)))


def _has_nan(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isnan().any())
