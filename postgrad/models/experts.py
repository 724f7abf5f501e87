"""Mixtures of experts: the routers of a model, their balancing loss, and how many tokens each expert gets.

Legend: N tokens (rows x positions), E experts, K experts of a token.

No table of families is needed. Routers are the modules whose outputs transformers records as `router_logits`; experts are the
modules that get a token's expert numbers; and the number of experts that the balancing loss counts for a token is the one that
gives the model's own value, found by trying the model once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from postgrad.models.layers import get_embedding_weight
from postgrad.models.output_head import run_body
from postgrad.models.sublayers import eval_mode

_ROUTER_LOGITS = "router_logits"


def balancing_loss(router_logits: Sequence[Tensor], top_k: int, mask_N: Tensor | None = None) -> Tensor:
    """`E sum_e f_e p_e` over the tokens of all layers: 1 x K when balanced (Fedus et al. 2021, arXiv 2101.03961, eq. 4 to 6).

    `f_e`: assignments to expert e per token; `p_e`: the mean of its router probability. `mask_N`: which tokens count.
    """
    logits_NE = torch.cat([layer.flatten(0, -2) for layer in router_logits]).float()
    share_NE = logits_NE.softmax(-1)
    chosen_NE = torch.zeros_like(share_NE).scatter_(1, share_NE.topk(top_k, -1).indices, 1.0)
    if mask_N is not None:
        weight_N1 = mask_N.flatten().repeat(len(router_logits))[:, None].to(share_NE.dtype)
        share_NE, chosen_NE = share_NE * weight_N1, chosen_NE * weight_N1
        count = weight_N1.sum().clamp(min=1)
    else:
        count = torch.tensor(float(len(share_NE)), device=share_NE.device)
    return share_NE.shape[1] * ((chosen_NE.sum(0) / count) * (share_NE.sum(0) / count)).sum()


@dataclass(frozen=True)
class Balancing:
    """The balancing loss of a model: `coefficient` and `is_requested` are its configuration's."""

    top_k: int
    coefficient: float
    is_requested: bool
    """Whether transformers adds it to the loss of this model."""


@torch.no_grad()
def find_balancing(pretrained: PreTrainedModel) -> Balancing | None:
    """The balancing loss of a model; None for one that has none, or another than `balancing_loss`."""
    config = pretrained.config.get_text_config()
    coefficient = getattr(config, "router_aux_loss_coef", None)
    if coefficient is None or not router_parameters(pretrained):
        return None
    vocabulary = get_embedding_weight(pretrained)
    ids = (5 + torch.arange(32, device=vocabulary.device))[None] % len(vocabulary)
    with eval_mode(pretrained):
        output = run_body(pretrained, input_ids=ids, output_router_logits=True).output
    logits, own = getattr(output, _ROUTER_LOGITS, None), getattr(output, "aux_loss", None)
    if not logits or own is None:
        return None
    for top_k in range(1, logits[0].shape[-1] + 1):
        if torch.isclose(balancing_loss(logits, top_k), own.float(), rtol=1e-4):
            return Balancing(top_k, float(coefficient), bool(getattr(config, "output_router_logits", False)))
    return None


def router_parameters(pretrained: PreTrainedModel) -> list[str]:
    """The names of the weights of all routers."""
    kinds: set[type[nn.Module]] = set()
    for module in pretrained.modules():
        recorded = (getattr(module, "_can_record_outputs", None) or {}).get(_ROUTER_LOGITS)
        for recorder in recorded if isinstance(recorded, list) else [recorded]:
            kind = getattr(recorder, "target_class", None)
            kinds |= {kind} if kind else set()
    routers = [(name, module) for name, module in pretrained.named_modules() if type(module) in kinds]
    return [
        f"{name}.{part}"
        for name, module in routers
        for part, parameter in module.named_parameters()
        if not any("expert" in piece for piece in part.split(".")) and parameter.is_floating_point()
    ]


@dataclass
class ExpertLoad:
    """How many tokens each expert got, by layer."""

    counts: dict[str, Tensor] = field(default_factory=dict)
    """By name of the experts' module, of shape (E,)."""
    mask_N: Tensor | None = None
    """Which tokens of the pass count; None: all."""

    def shares(self) -> list[list[float]]:
        """The share of the assignments of each expert, layer by layer."""
        return [[round(share, 5) for share in (n / n.sum().clamp(min=1)).tolist()] for n in self.counts.values()]


def find_experts(pretrained: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules that hold the weights of several experts in one tensor, by name."""
    return {
        name: module
        for name, module in pretrained.named_modules()
        if isinstance(getattr(module, "num_experts", None), int)
        and any(p.ndim == 3 and len(p) == module.num_experts for p in module.parameters(recurse=False))
    }


@contextmanager
def record_load(pretrained: PreTrainedModel) -> Iterator[ExpertLoad]:
    """Inside, the assignments of tokens to experts are counted."""
    load = ExpertLoad()

    def make_hook(name: str, number: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def count(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            indices = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and not a.is_floating_point()]
            if len(indices) != 1:
                return
            index_NK = indices[0].flatten(0, -2)
            if load.mask_N is not None and load.mask_N.numel() == len(index_NK):
                index_NK = index_NK[load.mask_N.flatten()]
            found = torch.bincount(index_NK.flatten().cpu(), minlength=number)[:number].double()
            load.counts[name] = load.counts.get(name, torch.zeros(number, dtype=torch.float64)) + found

        return count

    with ExitStack() as hooks:
        for name, module in find_experts(pretrained).items():
            hook = make_hook(name, int(module.num_experts))  # type: ignore[bad-argument-type]
            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        yield load
