"""Would the checks notice? Each is given a tuning that breaks the one promise it is there for, and must fail.

A small bottleneck, made here and right in everything, passes all of them first; every mutant differs from it in one place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from postgrad.tuning.tuning import Tuning, TuningExport, copy_state, freeze
from tests.tuning import checks
from tests.tuning.families import batch, build_model, logits, real_logits, single_row


class Bottleneck(nn.Module):
    """Adds a narrow function of a layer's output to it; nothing at first, because its last matrix is zero."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.down = nn.Parameter(0.3 * torch.randn(4, width, generator=generator))
        self.up = nn.Parameter(torch.zeros(width, 4))
        self.on = True

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        if not self.on:
            return hidden_BTD
        return hidden_BTD + torch.tanh(hidden_BTD @ self.down.T) @ self.up.T


class Stand(Tuning):
    """A right tuning: one bottleneck behind each feed-forward part of a Llama."""

    kind = "stand"
    name = "narrow"

    def __init__(self, model: PreTrainedModel, *, seed: int = 0) -> None:
        super().__init__(model)
        self.was = {name: p.requires_grad for name, p in model.named_parameters()}
        freeze(model)
        generator = torch.Generator().manual_seed(seed)
        self.places = [layer.mlp for layer in model.base_model.layers]
        self.narrow = [Bottleneck(model.config.hidden_size, generator) for _ in self.places]
        self.hooks = []
        for place, narrow in zip(self.places, self.narrow, strict=True):
            setattr(place, self.name, narrow)
            self.hooks.append(place.register_forward_hook(lambda m, _, out: getattr(m, self.name)(out)))

    @contextmanager
    def disable(self) -> Iterator[None]:
        self.switch(False)
        try:
            yield
        finally:
            self.switch(True)

    def switch(self, on: bool) -> None:
        for narrow in self.narrow:
            narrow.on = on

    def tensors(self) -> dict[str, Tensor]:
        return {f"{i}.{name}": p for i, m in enumerate(self.narrow) for name, p in m.named_parameters()}

    def detach(self) -> None:
        for hook in self.hooks:
            hook.remove()
        for place in self.places:
            delattr(place, self.name)
        for name, p in self.model.named_parameters():
            p.requires_grad_(self.was[name])

    def export(self) -> TuningExport:
        return TuningExport({"kind": self.kind}, self.state())


def from_options(model: PreTrainedModel, options: Mapping[str, Any]) -> Tuning:
    return Stand(model, seed=5)


class AlsoMovesANorm(Stand):
    def __init__(self, model: PreTrainedModel, *, seed: int = 0) -> None:
        super().__init__(model, seed=seed)
        model.base_model.norm.weight.requires_grad_(True)


class DriftsUnasked(Stand):
    def on_step_begin(self, step: int) -> None:
        self.model.base_model.norm.weight.data.add_(1e-3)


class HasAWeightWithoutEffect(Stand):
    def __init__(self, model: PreTrainedModel, *, seed: int = 0) -> None:
        super().__init__(model, seed=seed)
        self.narrow[0].idle = nn.Parameter(torch.ones(3))


class StartsSomewhereElse(Stand):
    def __init__(self, model: PreTrainedModel, *, seed: int = 0) -> None:
        super().__init__(model, seed=seed)
        self.narrow[0].up.data.fill_(1e-3)


class LooksAtTheWholeBatch(Stand):
    def __init__(self, model: PreTrainedModel, *, seed: int = 0) -> None:
        super().__init__(model, seed=seed)
        self.hooks.append(self.places[0].register_forward_hook(lambda m, _, out: out + 0.1 * out.mean((0, 1))))


class ForgetsWhatCameBefore(Stand):
    """Right in one pass; wrong when the tokens come one at a time, because it looks at its neighbour."""

    def __init__(self, model: PreTrainedModel, *, seed: int = 0) -> None:
        super().__init__(model, seed=seed)
        shift = nn.functional.pad
        self.hooks.append(self.places[0].register_forward_hook(lambda m, _, out: out + shift(out, (0, 0, 1, -1))))


class OnlyTheFirstTime(Stand):
    """Works in the first pass of a step and not in the one that is recomputed."""

    def __init__(self, model: PreTrainedModel, *, seed: int = 0) -> None:
        super().__init__(model, seed=seed)
        for place, narrow in zip(self.places, self.narrow, strict=True):
            self.hooks.append(place.register_forward_hook(self.second_only(narrow)))

    @staticmethod
    def second_only(narrow: Bottleneck) -> Callable[..., Tensor]:
        count = 0

        def hook(_module: nn.Module, _inputs: object, out: Tensor) -> Tensor:
            nonlocal count
            count += torch.is_grad_enabled()
            return out * (1.0 + 0.1 * count)

        return hook


class DropsATensor(Stand):
    def state(self) -> dict[str, Tensor]:
        state = super().state()
        del state["0.down"]
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        copy_state({name: t for name, t in self.tensors().items() if name != "0.down"}, state, self.kind)


class KeepsHalfTheDigits(Stand):
    def state(self) -> dict[str, Tensor]:
        return {name: t.bfloat16().float() for name, t in super().state().items()}


class PublishesTheStart(Stand):
    def export(self) -> TuningExport:
        return TuningExport({}, {name: t * 0 for name, t in self.state().items()})


class CountsItsSteps(Stand):
    """What it learns depends on how often it was called, which its state does not say."""

    steps = 0

    def __init__(self, model: PreTrainedModel, *, seed: int = 0) -> None:
        super().__init__(model, seed=seed)
        self.narrow[0].up.register_hook(lambda g: g / (1 + self.steps))

    def on_step_begin(self, step: int) -> None:
        self.steps += 1


class StaysOn(Stand):
    def switch(self, on: bool) -> None:
        pass


class StaysOff(Stand):
    def switch(self, on: bool) -> None:
        super().switch(False)


class StaysOffAfterAnError(Stand):
    @contextmanager
    def disable(self) -> Iterator[None]:
        self.switch(False)
        yield
        self.switch(True)


class LeavesAHook(Stand):
    def detach(self) -> None:
        self.places[0].register_forward_hook(lambda *_: None)
        super().detach()


class LeavesAModule(Stand):
    def detach(self) -> None:
        super().detach()
        self.places[0].narrow = self.narrow[0]


class LeavesTheBaseFrozen(Stand):
    def detach(self) -> None:
        super().detach()
        freeze(self.model)


class LeavesAnotherAttention(Stand):
    def detach(self) -> None:
        super().detach()
        self.model.set_attn_implementation("eager")


class MergesNothing(Stand):
    def merge(self, tokenizer: object = None) -> None:
        self.detach()


class StaysInTheModel(Stand):
    def merge(self, tokenizer: object = None) -> None:
        pass


class SeesAcrossDocuments(Stand):
    def __init__(self, model: PreTrainedModel, *, seed: int = 0) -> None:
        super().__init__(model, seed=seed)
        self.hooks.append(self.places[0].register_forward_hook(lambda m, _, out: out + 0.1 * out.cumsum(1)))


class Second(Stand):
    name = "second"


class MovesWhatItStandsOn(Second):
    def on_step_begin(self, step: int) -> None:
        self.places[0].narrow.up.data.add_(1e-3)


class SilencesWhatItStandsOn(Second):
    def switch(self, on: bool) -> None:
        super().switch(on)
        self.places[0].narrow.on = on


class TakesAllHooksOut(Second):
    def detach(self) -> None:
        super().detach()
        for place in self.places:
            place._forward_hooks.clear()


def published_equal(attach: Callable[..., Tuning], family: str, task: Any) -> None:
    checks.published_equal(attach, from_options, family, task)


def with_cache(attach: Callable[..., Tuning], family: str, task: Any) -> None:
    checks.cache_equals_no_cache(attach, family)


def packed(attach: Callable[..., Tuning], family: str, task: Any) -> None:
    checks.packed_documents_isolated(attach, family)


RIGHT = [
    checks.trains_only_declared,
    checks.starts_equal_to_base,
    checks.batch_equals_single_row,
    with_cache,
    checks.checkpointed_gradients_equal,
    checks.save_load_bit_identical,
    published_equal,
    checks.resume_exact,
    checks.off_equals_base,
    checks.detach_restores,
    packed,
]


@pytest.mark.parametrize("check", RIGHT, ids=lambda check: check.__name__)
def test_a_right_tuning_passes(check: Callable[..., None]) -> None:
    check(Stand, "llama", "lm")


@pytest.mark.parametrize(
    ("check", "mutant", "why"),
    [
        (checks.trains_only_declared, AlsoMovesANorm, "norm.weight moves or stays"),
        (checks.trains_only_declared, DriftsUnasked, "norm.weight moved without"),
        (checks.trains_only_declared, HasAWeightWithoutEffect, "no gradient reached .*idle"),
        (checks.starts_equal_to_base, StartsSomewhereElse, "the start differs"),
        (checks.batch_equals_single_row, LooksAtTheWholeBatch, "alone and in its batch"),
        (with_cache, ForgetsWhatCameBefore, "generation with use_cache=True"),
        (checks.checkpointed_gradients_equal, OnlyTheFirstTime, "the gradient of"),
        (checks.save_load_bit_identical, DropsATensor, "answers differently"),
        (checks.save_load_bit_identical, KeepsHalfTheDigits, "answers differently"),
        (published_equal, PublishesTheStart, "published tuning answers differently"),
        (checks.resume_exact, DropsATensor, "went another way"),
        (checks.resume_exact, CountsItsSteps, "went another way"),
        (checks.merge_exact, MergesNothing, "merging changed"),
        (checks.merge_exact, StaysInTheModel, "unexpected_keys"),
        (checks.off_equals_base, StaysOn, "does not answer as its base"),
        (checks.off_equals_base, StaysOff, "as before"),
        (checks.off_equals_base, StaysOffAfterAnError, "stays off"),
        (checks.detach_restores, LeavesAHook, "hooks: "),
        (checks.detach_restores, LeavesAModule, "modules: "),
        (checks.detach_restores, LeavesTheBaseFrozen, "parameters: "),
        (checks.detach_restores, LeavesAnotherAttention, "attention: "),
        (packed, SeesAcrossDocuments, "sees the first"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_mutant_fails(check: Callable[..., None], mutant: type[Stand], why: str) -> None:
    with pytest.raises(AssertionError, match=why):
        check(mutant, "llama", "lm")


def test_a_tuning_that_moves_less_than_it_says_fails() -> None:
    with pytest.raises(AssertionError, match=r"norm\.weight moves or stays"):
        checks.trains_only_declared(Stand, "llama", "lm", base=["model.norm.weight"])


def test_a_right_tuning_stands_on_another() -> None:
    checks.stacks_on_another(Stand, Second, "llama", "lm")


@pytest.mark.parametrize(
    ("mutant", "why"),
    [
        (MovesWhatItStandsOn, "the tuning below moved"),
        (SilencesWhatItStandsOn, "switched off, the tuning below"),
        (TakesAllHooksOut, "taken out, the tuning below"),
    ],
)
def test_a_mutant_that_stands_on_another_fails(mutant: type[Stand], why: str) -> None:
    with pytest.raises(AssertionError, match=why):
        checks.stacks_on_another(Stand, mutant, "llama", "lm")


class PeftsPrompt(Stand):
    """PEFT's own prompt tuning: it puts its tokens left of the padding, and gives positions up."""

    def __init__(self, model: PreTrainedModel, *, seed: int = 0) -> None:
        super().__init__(model, seed=seed)
        torch.manual_seed(seed)
        length, plain = 3, model.forward
        prompted = get_peft_model(model, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=length))

        def forward(
            input_ids: Tensor | None = None,
            attention_mask: Tensor | None = None,
            labels: Tensor | None = None,
            position_ids: Tensor | None = None,
            **more: Any,
        ) -> Any:
            if input_ids is None:  # PEFT calls the model that it wraps
                return plain(attention_mask=attention_mask, labels=labels, **more)
            out = prompted(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
            out.logits = out.logits[:, length:]
            return out

        model.forward = forward


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_prompts_left_of_the_padding_fail(family: str) -> None:
    with pytest.raises(AssertionError, match="alone and in its batch"):
        checks.batch_equals_single_row(PeftsPrompt, family, "lm")


def test_the_bare_models_pass_where_positions_and_masks_are_right() -> None:
    """And fail without them: the batches themselves would show it."""
    model, inputs = build_model("gpt2", "lm"), batch("gpt2", "lm")
    for row, together in enumerate(real_logits(model, inputs)):
        assert (real_logits(model, single_row(inputs, row))[0] - together).abs().max() < checks.TOLERANCE
    for left_out in ("attention_mask", "position_ids"):
        wrong = {name: value for name, value in inputs.items() if name != left_out}
        assert (logits(model, wrong) - logits(model, inputs))[0, -1].abs().max() > 100 * checks.TOLERANCE
