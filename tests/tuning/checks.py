"""What does a tuning promise, and how is each promise tried on one model?

Legend: B rows, T time.

Every check makes its own models, attaches with the callable it is given, and raises `AssertionError` when the promise is
broken. Those that need a tuning which does something train it first, and make sure that it does.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from postgrad.tuning.tuning import Tuning, freeze, trainable_parameters
from tests.tuning.families import (
    ALL_FAMILIES,
    END,
    PAD,
    REAL,
    TASK_LAYERS,
    VOCABULARY,
    Inputs,
    Task,
    batch,
    build_model,
    first_virtual,
    logits,
    loss,
    real_logits,
)
from tests.tuning.families import single_row as row_alone


class Attach(Protocol):
    """Makes the tuning under trial; `seed` is what its fresh tensors are drawn from."""

    def __call__(self, model: PreTrainedModel, *, seed: int = 0) -> Tuning: ...


TOLERANCE = 1e-5
"""Relative to the largest logit where that is above one: a few hundred roundings of fp32."""


def trains_only_declared(attach: Attach, family: str, task: Task, *, base: Collection[str] = ()) -> None:
    """Three steps move every trainable parameter and no other; of the base's, only those that patterns of `base` name."""
    model = build_model(family, task)
    originals = dict(model.named_parameters())  # kept alive, so that no id is given away again
    of_base = {id(p): name for name, p in originals.items()}
    wanted = {name for name in originals if any(fnmatchcase(name, pattern) for pattern in base)}
    tuning = attach(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    pulled: dict[str, float] = {}

    def look() -> None:
        for name, p in trainable_parameters(model).items():
            pull = 0.0 if p.grad is None else p.grad.abs().max().item()
            pulled[name] = max(pulled.get(name, 0.0), pull)

    train(model, tuning, family, task, steps=3, on_gradients=look)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys(), "training changed which parameters there are"
    theirs = {of_base[id(p)] for name, p in after.items() if name in pulled and id(p) in of_base}
    assert theirs == wanted, (
        f"of the base's own weights, {_first_name(theirs ^ wanted)} moves or stays against the promise"
    )
    unreached = [name for name, pull in pulled.items() if pull == 0.0]
    assert not unreached, f"no gradient reached {_first_name(unreached)}"
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved <= pulled.keys(), f"{_first_name(moved - pulled.keys())} moved without being trainable"
    # A bias of keys changes no attention: its gradient is nothing but rounding, and may be lost in it.
    should = {name for name, pull in pulled.items() if pull > 1e-5}
    assert should <= moved, f"{_first_name(should - moved)} is trainable and did not move"


def starts_equal_to_base(attach: Attach, family: str, task: Task, *, tolerance: float = 0.0) -> None:
    """Attached and untrained, the model answers as its base: to the bit, unless `tolerance` is given."""
    model = build_model(family, task)
    inputs = batch(family, task)
    expected = logits(model, inputs)
    attach(model)
    answer = logits(model, inputs)
    if tolerance == 0.0:
        assert torch.equal(answer, expected), f"the start differs by {_distance(answer, expected):.2g}"
    else:
        _assert_close(answer, expected, tolerance, "the start differs from the base")


def batch_equals_single_row(attach: Attach, family: str, task: Task) -> None:
    """A row's answer does not depend on the rows it is batched with, nor on their padding."""
    model = build_model(family, task)
    tuning = _attach_and_train(attach, model, family, task)
    inputs = _virtual_batch(model, tuning, family, task, seed=90)
    for row, together in enumerate(real_logits(model, inputs)):
        single = real_logits(model, row_alone(inputs, row))[0]
        _assert_close(single, together, TOLERANCE, f"row {row} differs alone and in its batch")


def cache_equals_no_cache(attach: Attach, family: str) -> None:
    """Greedy answers to a padded batch are the same with a cache, without, and by a loop over `forward`."""
    model = build_model(family, "lm")
    tuning = _attach_and_train(attach, model, family, "lm")
    inputs = _virtual_batch(model, tuning, family, "lm", seed=91)
    seq2seq = ALL_FAMILIES[family].shape == "seq2seq"
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    looped = (_looped_answers if seq2seq else _looped_continuations)(model, prompt, new=5)
    for use_cache in (True, False):
        made = model.generate(
            **prompt,
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            use_cache=use_cache,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=PAD,
        )
        _assert_close(
            torch.stack(made.logits, 1), looped, 10 * TOLERANCE, f"generation with {use_cache=} differs from forward"
        )


def checkpointed_gradients_equal(attach: Attach, family: str, task: Task) -> None:
    """Recomputing activations changes no gradient, whether it is switched on before attaching or after."""

    first = build_model(family, task)
    state = _attach_and_train(attach, first, family, task).state()

    def gradients(
        *, before: bool = False, after: bool = False, reentrant: bool = False
    ) -> tuple[dict[str, Tensor], int]:
        model = build_model(family, task)
        if before:
            _enable_checkpointing(model, reentrant=reentrant)
        tuning = attach(model)
        tuning.load(state)
        tuning.on_step_begin(10)
        if after:
            _enable_checkpointing(model, reentrant=reentrant)
        if reentrant:
            model.enable_input_require_grads()
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        for module in model.modules():
            if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
                module.register_forward_hook(count)
        model.train()
        torch.manual_seed(0)
        loss(model, _virtual_batch(model, tuning, family, task, seed=92)).backward()
        return {name: p.grad.clone() for name, p in trainable_parameters(model).items() if p.grad is not None}, calls

    plain, calls = gradients()
    for case in ({"before": True}, {"after": True}, {"after": True, "reentrant": True}):
        found, more = gradients(**case)
        assert more > calls, f"{case}: nothing was recomputed"
        assert found.keys() == plain.keys(), (
            f"{case}: {_first_name(found.keys() ^ plain.keys())} has a gradient only in one"
        )
        for name, gradient in plain.items():
            _assert_close(found[name], gradient, TOLERANCE, f"{case}: the gradient of {name} differs")


def save_load_bit_identical(attach: Attach, family: str, task: Task) -> None:
    """A state, written and read, makes a fresh attach of another seed answer with the same bits."""
    model = build_model(family, task)
    tuning = _attach_and_train(attach, model, family, task)
    fresh = build_model(family, task)
    again = attach(fresh, seed=1)
    again.load(_file_round_trip(tuning.state()))
    inputs = _virtual_batch(model, tuning, family, task, seed=93)
    assert again.num_virtual_tokens == tuning.num_virtual_tokens
    _assert_same_bits(logits(fresh, inputs), logits(model, inputs), "the reloaded tuning answers differently")
    mine, theirs = tuning.state(), again.state()
    assert mine.keys() == theirs.keys()
    for name in mine:
        _assert_same_bits(theirs[name], mine[name], f"{name} did not come back")


def published_equal(
    attach: Attach,
    from_options: Callable[[PreTrainedModel, Mapping[str, Any]], Tuning],
    family: str,
    task: Task,
    *,
    tolerance: float = 0.0,
) -> None:
    """What is published is enough for the same answers: to the bit, unless `tolerance` is given."""
    model = build_model(family, task)
    tuning = _attach_and_train(attach, model, family, task)
    published = tuning.export()
    fresh = build_model(family, task)
    options = json.loads(json.dumps(published.options))
    assert options == published.options, "the options do not come back from a file"
    again = from_options(fresh, options)
    again.load(_file_round_trip(published.state))
    inputs = _virtual_batch(model, tuning, family, task, seed=94)
    expected, answer = logits(model, inputs), logits(fresh, inputs)
    if tolerance == 0.0:
        _assert_same_bits(answer, expected, "the published tuning answers differently")
    else:
        _assert_close(answer, expected, tolerance, "the published tuning answers differently")


def resume_exact(attach: Attach, family: str, task: Task) -> None:
    """Three steps of AdamW, saved, loaded into a fresh attach, and three more are six straight ones, bit for bit."""

    def optimizer_of(model: PreTrainedModel) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)

    model = build_model(family, task)
    straight = attach(model)
    adam = optimizer_of(model)
    train(model, straight, family, task, steps=3, optimizer=adam)
    saved, moments = _file_round_trip(straight.state()), copy.deepcopy(adam.state_dict())
    train(model, straight, family, task, steps=3, first=4, optimizer=adam)

    fresh = build_model(family, task)
    resumed = attach(fresh, seed=1)
    resumed.load(saved)
    adam = optimizer_of(fresh)
    adam.load_state_dict(moments)
    train(fresh, resumed, family, task, steps=3, first=4, optimizer=adam)

    expected, found = straight.state(), resumed.state()
    assert found.keys() == expected.keys()
    assert any(not torch.equal(expected[name], saved[name]) for name in expected), "nothing moved after the resume"
    for name in expected:
        _assert_same_bits(found[name], expected[name], f"after the resume {name} went another way")
    inputs = _virtual_batch(model, straight, family, task, seed=95)
    _assert_same_bits(logits(fresh, inputs), logits(model, inputs), "the resumed model answers differently")


def merge_exact(attach: Attach, family: str, task: Task, *, tolerance: float = TOLERANCE) -> None:
    """Merged, the model answers as before, and a plain `from_pretrained` of its folder makes the same model."""
    model = build_model(family, task)
    tuning = _attach_and_train(attach, model, family, task)
    inputs = _virtual_batch(model, tuning, family, task, seed=96)
    expected = logits(model, inputs)
    tuning.merge(tokenizer())
    answer = logits(model, inputs)
    _assert_close(answer[..., : expected.shape[-1]], expected, tolerance, "merging changed the answers")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        plain, loading = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), f"{loading}"
    _assert_same_bits(
        logits(plain.eval(), inputs), answer, "the plain model from the merged folder answers differently"
    )


def off_equals_base(attach: Attach, family: str, task: Task) -> None:
    """Switched off, a trained tuning leaves the base's very bits, even when what runs inside fails; then it is back.

    A task layer has no base to go back to, so where it moves it may be what it became.
    """
    model = build_model(family, task)
    inputs = batch(family, task, seed=97)
    tuning = _attach_and_train(attach, model, family, task)
    expected = logits(_original_base(model, family, task), inputs)
    own = _virtual_batch(model, tuning, family, task, seed=97)
    tuned = logits(model, own)
    with tuning.disable():
        _assert_same_bits(logits(model, inputs), expected, "switched off, the model does not answer as its base")
    _assert_same_bits(logits(model, own), tuned, "switched on again, the model does not answer as before")
    try:
        with tuning.disable():
            raise InterruptedError
    except InterruptedError:
        _assert_same_bits(logits(model, own), tuned, "after an error inside, the tuning stays off")


def detach_restores(attach: Attach, family: str, task: Task, *, allowed_changes: Collection[str] = ()) -> None:
    """Taken out, a tuning leaves the modules, hooks, configuration and trainability that it found, but for `leaves`."""
    model = build_model(family, task)
    inputs = batch(family, task, seed=98)
    before = _model_structure(model)
    tuning = _attach_and_train(attach, model, family, task)
    additive = tuning.additive
    tuning.detach()
    model.eval()
    after = _model_structure(model)
    for part in [p for p in before if p not in allowed_changes]:
        assert after[part] == before[part], f"{part}: {_first_difference(before[part], after[part])}"
    if additive:
        expected = logits(_original_base(model, family, task), inputs)
        _assert_same_bits(logits(model, inputs), expected, "without the tuning, the model does not answer as its base")


def packed_documents_isolated(attach: Attach, family: str) -> None:
    """Of two documents in one row, the second's answers do not change with the first, and are those it has alone."""
    model = build_model(family, "lm")
    tuning = _attach_and_train(attach, model, family, "lm")
    lead = list(_virtual_ids(model, tuning))
    second = [*lead, *range(REAL + 20, REAL + 26)]

    def answers(first: list[int]) -> Tensor:
        documents = [[*lead, *first], second] if first else [second]
        ids = torch.tensor([[t for d in documents for t in d]])
        positions = torch.tensor([[i for d in documents for i in range(len(d))]])
        with torch.no_grad():
            return model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]

    one, other, single = answers([5, 6, 7, 8]), answers([50, 61, 72, 83]), answers([])
    length = len(second)
    assert not torch.equal(one[:-length], other[:-length])
    _assert_same_bits(one[-length:], other[-length:], "the second document sees the first")
    _assert_close(one[-length:], single, TOLERANCE, "the second document is not answered as it is alone")


def stacks_on_another(attach_lower: Attach, attach: Attach, family: str, task: Task) -> None:
    """On top of another tuning, held fast, a tuning leaves it as it is, and off or taken out gives its answers again."""
    model = build_model(family, task)
    lower = _attach_and_train(attach_lower, model, family, task)
    first = first_virtual(model)
    before = batch(family, task, seed=89, virtual=range(first, first + lower.num_virtual_tokens))
    expected, kept = logits(model, before), {name: t.detach().clone() for name, t in lower.state().items()}

    def add(model: PreTrainedModel, lower: Tuning, seed: int) -> tuple[Tuning, Inputs]:
        freeze(model)
        upper = attach(model, seed=seed)
        return upper, batch(
            family, task, seed=89, virtual=range(first, first + lower.num_virtual_tokens + upper.num_virtual_tokens)
        )

    upper, after = add(model, lower, 0)
    train(model, upper, family, task, steps=3, virtual=lower.num_virtual_tokens + upper.num_virtual_tokens)
    answer = logits(model, after)
    if answer.shape == expected.shape:
        assert _distance(answer, expected) > 100 * TOLERANCE, "on top of the other, the tuning does next to nothing"
    for name, tensor in lower.state().items():
        _assert_same_bits(tensor, kept[name], f"the tuning below moved: {name}")
    with upper.disable():
        _assert_same_bits(logits(model, before), expected, "switched off, the tuning below does not answer as it did")

    fresh = build_model(family, task)
    again = attach_lower(fresh, seed=1)
    again.load(kept)
    on_top, _ = add(fresh, again, 1)
    on_top.load(_file_round_trip(upper.state()))
    _assert_same_bits(logits(fresh, after), answer, "both put on again answer differently")

    upper.detach()
    model.eval()
    _assert_same_bits(logits(model, before), expected, "taken out, the tuning below does not answer as it did")
    lower.detach()
    plain = batch(family, task, seed=89)
    _assert_same_bits(
        logits(model, plain), logits(build_model(family, task), plain), "with both taken out, the base does not answer"
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """One word to each id of the vocabulary."""
    words = {f"w{i}": i for i in range(VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token=f"w{PAD}"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=f"w{PAD}", eos_token=f"w{END}", unk_token=f"w{PAD}"
    )


def _virtual_ids(model: PreTrainedModel, tuning: Tuning) -> range:
    first = first_virtual(model)
    return range(first, first + tuning.num_virtual_tokens)


def _virtual_batch(model: PreTrainedModel, tuning: Tuning, family: str, task: Task, *, seed: int) -> Inputs:
    """A batch that calls on the tuning: with its virtual ids, where it has any."""
    return batch(family, task, seed=seed, virtual=_virtual_ids(model, tuning))


def train(
    model: PreTrainedModel,
    tuning: Tuning,
    family: str,
    task: Task,
    *,
    steps: int,
    first: int = 1,
    optimizer: torch.optim.Optimizer | None = None,
    on_gradients: Callable[[], None] = lambda: None,
    virtual: int | None = None,
) -> None:
    """Steps `first`, `first + 1`, ... each on a batch of its own, led by the first `virtual` ids (the tuning's own).

    `look` is called with the gradients in place.
    """
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    start = first_virtual(model)
    ids = range(start, start + (tuning.num_virtual_tokens if virtual is None else virtual))
    model.train()
    for step in range(first, first + steps):
        torch.manual_seed(step)  # the same dropout, however often and with whatever else the step is taken
        tuning.on_step_begin(step)
        optimizer.zero_grad()
        loss(model, batch(family, task, seed=step, virtual=ids)).backward()
        on_gradients()
        optimizer.step()
    optimizer.zero_grad()
    model.eval()


def _attach_and_train(attach: Attach, model: PreTrainedModel, family: str, task: Task) -> Tuning:
    """Attach and train until the answers are visibly the tuning's own."""
    inputs = batch(family, task, seed=99)
    expected = logits(model, inputs)
    tuning = attach(model)
    train(model, tuning, family, task, steps=3)
    answer = logits(model, _virtual_batch(model, tuning, family, task, seed=99))
    if answer.shape == expected.shape:
        assert _distance(answer, expected) > 100 * TOLERANCE, "the trained tuning does next to nothing"
    return tuning


def _original_base(model: PreTrainedModel, family: str, task: Task) -> PreTrainedModel:
    """The base as it was, with the task layer of `model`."""
    base = build_model(family, task)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in base.named_parameters():
            if task != "lm" and any(fnmatchcase(name, pattern) for pattern in TASK_LAYERS):
                p.copy_(own[name])
    return base


def _enable_checkpointing(model: PreTrainedModel, *, reentrant: bool) -> None:
    # The older name is what transformers had before 5.2x, and it warns where both are there.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


@torch.no_grad()
def _looped_continuations(model: PreTrainedModel, prompt: Inputs, *, new: int) -> Tensor:
    """The logits (B, new, V) of greedy decoding by whole forward passes, for a decoder."""
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    found = []
    for _ in range(new):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        last = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        found.append(last)
        ids = torch.cat([ids, _greedy_token(last)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return torch.stack(found, 1)


@torch.no_grad()
def _looped_answers(model: PreTrainedModel, prompt: Inputs, *, new: int) -> Tensor:
    """The logits (B, new, V) of greedy decoding by whole forward passes, for an encoder and decoder."""
    answer = torch.full((prompt["input_ids"].shape[0], 1), model.config.decoder_start_token_id)
    found = []
    for _ in range(new):
        last = model(**prompt, decoder_input_ids=answer, use_cache=False).logits[:, -1]
        found.append(last)
        answer = torch.cat([answer, _greedy_token(last)], 1)
    return torch.stack(found, 1)


def _greedy_token(logits_BV: Tensor) -> Tensor:
    """The likeliest id that is not the end (generation is told not to end either)."""
    return logits_BV.index_fill(-1, torch.tensor([END]), -torch.inf).argmax(-1, keepdim=True)


def _file_round_trip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As it comes back from safetensors."""
    return tensors_of(bytes_of(dict(state)))


_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def _model_structure(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """All of a model that a tuning could leave changed, its numbers left out."""
    modules = dict(model.named_modules())
    return {
        "modules": {name: type(m).__qualname__ for name, m in modules.items()},
        "hooks": {name: {hook: len(getattr(m, hook) or ()) for hook in _HOOKS} for name, m in modules.items()},
        "patched methods": {name: sorted(k for k, v in vars(m).items() if callable(v)) for name, m in modules.items()},
        "parameters": {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)},
        "buffers": {name: b.shape for name, b in model.named_buffers()},
        "configuration": model.config.to_dict(),
        "attention": {
            name: m.config._attn_implementation
            for name, m in modules.items()
            if hasattr(getattr(m, "config", None), "_attn_implementation")
        },
    }


def _assert_same_bits(found: Tensor, expected: Tensor, what: str) -> None:
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    assert torch.equal(found, expected), f"{what} (by {_distance(found, expected):.2g})"


def _assert_close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    size = max(1.0, expected.abs().max().item())
    distance = _distance(found, expected) / size
    assert distance <= tolerance, f"{what} by {distance:.2g}, more than {tolerance:.2g}"


def _distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def _first_name(names: Iterable[str]) -> str:
    return min(names, default="nothing")


def _first_difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    name = min(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
    return f"{name or 'the model'} was {before.get(name)} and is {after.get(name)}"
