"""Tunings that add modules and hooks to a frozen model: adapters, prefixes, soft prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from postgrad.tuning.extra_trainable import ExtraTrainable
from postgrad.tuning.tuning import Tuning


class SwitchableModule(nn.Module):
    """A module whose hooks do nothing while `enabled` is False."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True


class ModuleTuning(Tuning):
    """Added modules can be disabled and removed; extra trainable weights of the base's body get their old values back.

    Subclasses set `extra_trainable`, register modules with `_add_module` and keep their hooks in `_hooks`.
    """

    extra_trainable: ExtraTrainable

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._switches: list[SwitchableModule] = []
        self._added_modules: list[tuple[nn.Module, str]] = []
        self._hooks: list[RemovableHandle] = []

    def _add_module(self, parent: nn.Module, name: str, module: nn.Module) -> None:
        """Register `module` as `name`, or the first unused of `name_2`, `name_3`, ..."""
        number, unused_name = 1, name
        while hasattr(parent, unused_name):
            number += 1
            unused_name = f"{name}_{number}"
        parent.add_module(unused_name, module)
        self._added_modules.append((parent, unused_name))
        self._switches += [m for m in module.modules() if isinstance(m, SwitchableModule)]

    def disable(self) -> AbstractContextManager[None]:
        """Context in which the model computes as its base, bit for bit; a new task layer keeps its trained weights."""
        return self._disable() if self.additive else super().disable()

    @contextmanager
    def _disable(self) -> Iterator[None]:
        with self.extra_trainable.use_initial_values(), disable_modules(self._switches):
            yield

    def detach(self) -> None:
        """Remove modules and hooks; weights of the body get their old values and `requires_grad` back."""
        self.extra_trainable.restore_values()
        self._remove_modules()

    def _remove_modules(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for parent, name in self._added_modules:
            delattr(parent, name)
        self._hooks, self._added_modules = [], []
        self.extra_trainable.restore_requires_grad()


@contextmanager
def disable_modules(modules: Iterable[SwitchableModule]) -> Iterator[None]:
    """Context in which these modules are disabled."""
    enabled = [module for module in modules if module.enabled]
    for module in enabled:
        module.enabled = False
    try:
        yield
    finally:
        for module in enabled:
            module.enabled = True
