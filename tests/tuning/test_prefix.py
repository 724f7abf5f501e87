"""Prefixes on every architecture: against attention written out by hand, real words, PEFT's prefixes and the shared promises.

Legend: B rows, T time, N prefix length, L layers, H key heads, C head width, S all numbers of one position.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BloomConfig,
    BloomForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.masking_utils import eager_mask

from postgrad.errors import TuningError
from postgrad.models.layers import get_layers
from postgrad.tuning import prefix_attention
from postgrad.tuning.attention_slots import ALTERNATIVES_HINT
from postgrad.tuning.prefix import Prefix, PrefixEncoder, from_peft
from postgrad.tuning.prefix_attention import LAYER_PREFIXES, PREFIX_IMPLEMENTATION, prefix_attention_forward
from postgrad.tuning.tuning import trainable_parameters
from tests.tuning import checks
from tests.tuning.families import (
    FAMILIES,
    MORE_FAMILIES,
    PAD,
    VOCABULARY,
    Inputs,
    Task,
    batch,
    build_model,
    logits,
    loss,
    real_logits,
)

LENGTH, HIDDEN, LAYERS, WIDTH, HEAD = 3, 16, 2, 32, 8
CASES: list[tuple[str, Task]] = [(family, task) for family, made in FAMILIES.items() for task in made.tasks]
LMS = list(FAMILIES)
DECODERS = ["llama", "gpt2", "qwen3"]
ROTARY = ["llama", "qwen3"]

PLACES: Mapping[str, Mapping[str, str]] = {
    "llama": {"decoder": "model.layers.{}.self_attn"},
    "qwen3": {"decoder": "model.layers.{}.self_attn"},
    "gemma3": {"decoder": "model.layers.{}.self_attn"},
    "mistral": {"decoder": "model.layers.{}.self_attn"},
    "gpt2": {"decoder": "transformer.h.{}.attn"},
    "bert": {"encoder": "bert.encoder.layer.{}.attention.self"},
    "modernbert": {"encoder": "model.layers.{}.attn"},
    "t5": {
        "encoder": "encoder.block.{}.layer.0.SelfAttention",
        "decoder": "decoder.block.{}.layer.0.SelfAttention",
        "cross": "decoder.block.{}.layer.1.EncDecAttention",
    },
    "bart": {
        "encoder": "model.encoder.layers.{}.self_attn",
        "decoder": "model.decoder.layers.{}.self_attn",
        "cross": "model.decoder.layers.{}.encoder_attn",
    },
}
"""Where attention stands in each language model."""


def spaced() -> PreTrainedTokenizerFast:
    """One id for each of `w5 w6 w7`."""
    tokenizer = checks.tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    return tokenizer


def prefix(model: PreTrainedModel, *, seed: int = 0) -> Prefix:
    return Prefix(model, length=LENGTH, hidden=HIDDEN, seed=seed)


def flat(model: PreTrainedModel, *, seed: int = 0) -> Prefix:
    return Prefix(model, kind="p-tuning-v2", length=LENGTH, dropout=0.0, seed=seed)


def deep(model: PreTrainedModel, *, seed: int = 0) -> Prefix:
    return Prefix(model, length=LENGTH, hidden=HIDDEN, deep=True, seed=seed)


def on_another(model: PreTrainedModel, *, seed: int = 0) -> Prefix:
    Prefix(model, kind="p-tuning-v2", length=2, dropout=0.0, seed=5)
    return prefix(model, seed=seed)


def words(model: PreTrainedModel, *, seed: int = 0) -> Prefix:
    start = "w7 w23 w41"
    return Prefix(model, length=LENGTH, hidden=HIDDEN, init_text=start, seed=seed, tokenizer=spaced())


ATTACHES = [deep, on_another, words]


def loud(tuning: Prefix, seed: int = 3) -> Prefix:
    """The same with keys and values so large that nothing about them goes unseen."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in tuning.encoder.parameters():
            p.copy_(torch.randn(p.shape))
    return tuning


def recompute(model: PreTrainedModel, *, reentrant: bool) -> None:
    # The older name is what transformers had before 5.2x, and it warns where both are there.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def anatomy(model: PreTrainedModel) -> dict[str, Any]:
    return {
        "modules": [name for name, _ in model.named_modules()],
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        "attributes": {name: sorted(vars(m)) for name, m in model.named_modules()},
        "attention": [
            m.config._attn_implementation for m in model.modules() if hasattr(getattr(m, "config", None), "sub_configs")
        ],
        "moving": {name: p.requires_grad for name, p in model.named_parameters()},
    }


@contextmanager
def attending_by(model: PreTrainedModel, name: str) -> Iterator[None]:
    configs = {id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), "sub_configs")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = name
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


# What the prefix does


BY_HAND: dict[nn.Module, tuple[Tensor, Tensor]] = {}


def attention_by_hand(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Two attentions, over the prefix and over the tokens, each with its softmax, mixed by their shares of the sum."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(2, 3) * scale
    scores = scores + (0.0 if position_bias is None else position_bias)
    scores = scores + (0.0 if attention_mask is None else attention_mask)
    out = scores.softmax(-1) @ value
    if module in BY_HAND:
        keys, values = (part.repeat_interleave(groups, 0) for part in BY_HAND[module])
        over_prefix = query @ keys.transpose(1, 2) * scale
        share = torch.sigmoid(over_prefix.logsumexp(-1) - scores.logsumexp(-1))[..., None]
        out = share * (over_prefix.softmax(-1) @ values) + (1 - share) * out
    return out.transpose(1, 2), None


AttentionInterface.register("by_hand", attention_by_hand)
AttentionMaskInterface.register("by_hand", eager_mask)


def is_attention_over_prefix_and_tokens(family: str) -> None:
    model = build_model(family, "lm")
    tuning = loud(Prefix(model, kind="p-tuning-v2", length=LENGTH))
    inputs = batch(family, "lm")
    ours = real_logits(model, inputs)
    BY_HAND.clear()
    for role, path in PLACES[family].items():
        heads = 2 if family in ("llama", "qwen3", "gemma3", "mistral") else 4
        table_NLKHC = tuning.state()[f"parts.{role}.table"].view(LENGTH, LAYERS, 2, heads, HEAD)
        for layer in range(LAYERS):
            key_HNC, value_HNC = table_NLKHC[:, layer].permute(1, 2, 0, 3)
            BY_HAND[model.get_submodule(path.format(layer))] = (key_HNC, value_HNC)
    with tuning.disable(), attending_by(model, "by_hand"):
        expected = real_logits(model, inputs)
    BY_HAND.clear()
    base = real_logits(build_model(family, "lm"), inputs)
    for row, (mine, right) in enumerate(zip(ours, expected, strict=True)):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(mine, base[row], atol=0.1)


@pytest.mark.parametrize("family", LMS)
def test_is_attention_over_prefix_and_tokens(family: str) -> None:
    is_attention_over_prefix_and_tokens(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3", "mistral", "modernbert", "bart"])
def test_is_attention_over_prefix_and_tokens_in_wider_families(family: str) -> None:
    is_attention_over_prefix_and_tokens(family)


@pytest.mark.parametrize("family", DECODERS)
def test_prefix_of_real_words_is_these_words_in_front(family: str) -> None:
    text, tokens = [7, 23, 41], torch.tensor([[90, 14, 33, 60, 8]])
    base = build_model(family, "lm")
    with torch.no_grad():
        expected = base(input_ids=torch.cat([torch.tensor([text]), tokens], 1)).logits[:, len(text) :]
    start = " ".join(f"w{i}" for i in text)
    after = torch.arange(len(text), len(text) + tokens.shape[1])[None]
    for hidden in (None, 16):
        model = build_model(family, "lm")
        Prefix(model, length=len(text), hidden=hidden, init_text=start, tokenizer=spaced())
        answer = logits(model, {"input_ids": tokens, "position_ids": after})
        torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)


def test_words_are_repeated_or_cut_to_the_length_and_cross_attention_reads_them_from_the_encoder() -> None:
    model = build_model("t5", "lm")
    ids = torch.tensor([[7, 23, 41, 7, 23]])
    with torch.no_grad():
        encoded = model.encoder(input_ids=ids).last_hidden_state[0]
        keys = [model.get_submodule(PLACES["t5"]["cross"].format(i)).k(encoded) for i in range(LAYERS)]
    for text in ("w7 w23 w41", "w7 w23 w41 w7 w23 w99"):
        tuning = Prefix(model, length=5, hidden=None, init_text=text, slots=["cross"], tokenizer=spaced())
        found = tuning.state()["parts.cross.table"].view(5, LAYERS, 2, WIDTH)
        for layer in range(LAYERS):
            torch.testing.assert_close(found[:, layer, 0], keys[layer])
        tuning.detach()


@pytest.mark.parametrize("family", LMS)
def test_two_prefixes_are_one_of_both_lengths(family: str) -> None:
    inputs = batch(family, "lm")
    model = build_model(family, "lm")
    parts = [loud(Prefix(model, kind="p-tuning-v2", length=n), seed=n) for n in (2, 3)]
    answer = logits(model, inputs)
    single = build_model(family, "lm")
    one = Prefix(single, kind="p-tuning-v2", length=5)
    one.load({name: torch.cat([part.state()[name] for part in parts]) for name in one.state()})
    torch.testing.assert_close(answer, logits(single, inputs), rtol=1e-4, atol=1e-4)


def test_slots_say_which_attention_reads_it() -> None:
    model = build_model("t5", "lm")
    tuning = Prefix(model, length=LENGTH, hidden=HIDDEN, slots=["cross", "encoder"])
    assert tuning.roles == ["encoder", "cross"]
    loss(model.train(), batch("t5", "lm")).backward()
    paths = [PLACES["t5"][role].format(i) for role in ("encoder", "cross") for i in range(LAYERS)]
    assert sorted(slot.name for slot in tuning.slots) == sorted(paths)
    assert not hasattr(model.get_submodule(PLACES["t5"]["decoder"].format(0)), LAYER_PREFIXES)
    assert all(p.grad is not None and p.grad.any() for p in trainable_parameters(model).values())


# What it costs


def scaled(counted: int, role: str, family: str) -> int:
    """S: keys and values of every layer."""
    heads = 2 if family in ("llama", "qwen3") else 4
    assert role in PLACES[family]
    return counted * LAYERS * 2 * heads * HEAD


@pytest.mark.parametrize("family", LMS)
def test_counts_are_the_publications(family: str) -> None:
    def count(**options: Any) -> int:
        model = build_model(family, "lm")
        Prefix(model, length=LENGTH, **options)
        return sum(p.numel() for p in trainable_parameters(model).values())

    n, d, m = LENGTH, WIDTH, HIDDEN
    widths = [scaled(1, role, family) for role in PLACES[family]]
    assert count(kind="p-tuning-v2") == sum(n * s for s in widths)
    assert count(hidden=m) == sum(n * d + (d + 1) * m + (m + 1) * s for s in widths)
    assert count(hidden=m, deep=True) == sum(n * d + (d + 1) * m + (m + 1) * m + (m + 1) * s for s in widths)
    assert count() == sum(n * d + (d + 1) * 512 + 513 * s for s in widths)


@pytest.mark.parametrize("deep", [False, True])
def test_mlp_is_the_publications(deep: bool) -> None:
    tuning = Prefix(build_model("llama", "lm"), length=LENGTH, hidden=HIDDEN, deep=deep)
    inner = [nn.Linear(HIDDEN, HIDDEN), nn.Tanh()] if deep else []
    out = nn.Linear(HIDDEN, scaled(1, "decoder", "llama"))
    mlp = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh(), *inner, out)
    state = {name.removeprefix("parts.decoder."): t for name, t in tuning.state().items()}
    with torch.no_grad():
        for i, layer in enumerate(m for m in mlp if isinstance(m, nn.Linear)):
            layer.weight.copy_(state[f"weights.{i}"])
            layer.bias.copy_(state[f"biases.{i}"])
        expected = mlp(state["table"])
    torch.testing.assert_close(tuning.export().state["parts.decoder.table"], expected)


def test_defaults_are_the_publications() -> None:
    model = build_model("bert", "lm")
    tuning = Prefix(model, kind="p-tuning-v2")
    assert (tuning.kind, tuning.length, tuning.hidden, tuning.dropout) == ("p-tuning-v2", 10, None, 0.1)
    spread = tuning.state()["parts.encoder.table"].std().item()
    assert spread == pytest.approx(model.config.initializer_range, rel=0.1)
    tuning = Prefix(build_model("bert", "lm"))
    assert (tuning.kind, tuning.length, tuning.hidden, tuning.dropout) == ("prefix", 10, 512, 0.0)
    assert tuning.state()["parts.encoder.table"].std().item() == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize(("family", "roles"), [("llama", 1), ("bert", 1), ("t5", 3)])
def test_keys_and_values_are_computed_once_in_a_forward_pass(family: str, roles: int) -> None:
    model = build_model(family, "lm")
    tuning = prefix(model)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    for part in tuning.encoder.parts.values():
        part.register_forward_hook(count)
    recompute(model, reentrant=False)
    loss(model.train(), batch(family, "lm")).backward()
    assert calls == roles


def masks_of(model: PreTrainedModel, inputs: Mapping[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each layer gives to SDPA as its mask."""
    seen: list[Any] = []
    sdpa = F.scaled_dot_product_attention

    def watched(*args: Any, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        seen.append(attn_mask)
        return sdpa(*args, attn_mask=attn_mask, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", watched)
        logits(model, dict(inputs))
    return seen


def test_masks_are_made_only_where_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(5, 14)[None]
    for family in ("llama", "gpt2", "bert"):
        model = build_model(family, "lm")
        prefix(model)
        assert masks_of(model, {"input_ids": ids}, monkeypatch) == [None, None]
        assert masks_of(model, {"input_ids": ids[:, :1]}, monkeypatch) == [None, None]
    positions = torch.cat([torch.arange(4), torch.arange(5)])[None]
    model = build_model("llama", "lm")
    prefix(model)
    packed = masks_of(model, {"input_ids": ids, "position_ids": positions, "use_cache": False}, monkeypatch)  # type: ignore[dict-item]
    assert [mask.shape for mask in packed] == [(1, 1, 9, LENGTH + 9)] * LAYERS
    assert bool(packed[0][..., :LENGTH].all())


@pytest.mark.parametrize("mask_of", [lambda seen: seen, lambda seen: torch.where(seen, 0.0, -1e9)])
def test_masks_of_ones_own_are_widened(mask_of: Callable[[Tensor], Tensor]) -> None:
    inputs = batch("llama", "lm")
    inputs.pop("labels")
    model = build_model("llama", "lm")
    loud(prefix(model))
    expected = logits(model, inputs)
    real = inputs["attention_mask"].bool()
    length = real.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril() & real[:, None, None]
    answer = logits(model, {**inputs, "attention_mask": mask_of(seen)})
    torch.testing.assert_close(answer[real], expected[real], rtol=1e-4, atol=1e-4)


# Training


@pytest.mark.parametrize(("family", "task"), CASES)
def test_learns_in_every_slot(family: str, task: Task) -> None:
    model = build_model(family, task)
    tuning = prefix(model)
    loss(model.train(), batch(family, task)).backward()
    for role, shares in tuning.encoder.layer_prefixes.items():
        gradient = tuning.encoder.parts[role].biases[-1].grad  # type: ignore[union-attr, index]
        assert gradient is not None
        for piece in gradient.split([size for share in shares for size in share.sizes]):
            assert piece.abs().max() > 0
    assert sum(map(len, tuning.encoder.layer_prefixes.values())) == len(tuning.slots) >= LAYERS
    mine = {id(p) for p in tuning.encoder.parameters()}
    assert {id(p) for p in model.parameters() if p.grad is not None} == mine
    assert {id(p) for p in trainable_parameters(model).values()} == mine


@pytest.mark.parametrize("attach", ATTACHES)
@pytest.mark.parametrize("family", LMS)
def test_keeps_the_shared_promises(attach: Callable[..., Prefix], family: str) -> None:
    checks.batch_equals_single_row(attach, family, "lm")
    checks.checkpointed_gradients_equal(attach, family, "lm")
    checks.save_load_bit_identical(attach, family, "lm")
    if attach is not on_another:
        checks.off_equals_base(attach, family, "lm")
        checks.detach_restores(attach, family, "lm")
        checks.published_equal(attach, lambda model, options: Prefix(model, **options), family, "lm")
    if FAMILIES[family].shape != "encoder":
        checks.cache_equals_no_cache(attach, family)
    if FAMILIES[family].shape == "decoder":
        checks.packed_documents_isolated(attach, family)


@pytest.mark.slow
@pytest.mark.parametrize("attach", [prefix, flat, on_another])
@pytest.mark.parametrize("family", ["gemma3", "mistral", "modernbert", "bart"])
def test_keeps_the_shared_promises_under_windows(attach: Callable[..., Prefix], family: str) -> None:
    checks.batch_equals_single_row(attach, family, "lm")
    checks.checkpointed_gradients_equal(attach, family, "lm")
    if MORE_FAMILIES[family].shape != "encoder":
        checks.cache_equals_no_cache(attach, family)
    if MORE_FAMILIES[family].shape == "decoder":
        checks.packed_documents_isolated(attach, family)


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generates_the_same_with_beams_and_static_caches(family: str, how: dict[str, Any]) -> None:
    model = build_model(family, "lm")
    loud(prefix(model))
    plain = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": PAD}
    same = {key: value for key, value in how.items() if key == "num_beams"}
    for rows in (3, 1):  # one row has no padding, and gets no mask
        made = batch(family, "lm", rows=rows)
        inputs = {name: made[name] for name in ("input_ids", "attention_mask")}
        expected = model.generate(**inputs, **plain, **same, use_cache=False)
        assert torch.equal(model.generate(**inputs, **plain, **how), expected)


def gradients(model: PreTrainedModel, *batches: Inputs) -> dict[str, Tensor]:
    """Of the losses of all batches, backward after the last forward."""
    torch.manual_seed(11)
    model.zero_grad()
    model.train()
    sum(loss(model, inputs) for inputs in batches).backward()  # type: ignore[union-attr]
    return {name: p.grad.clone() for name, p in trainable_parameters(model).items() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_recomputed_layers_meet_the_same_dropout(family: str, reentrant: bool) -> None:
    """Also when two forward passes come before the backward pass."""
    found = []
    for checkpointed in (False, True):
        model = build_model(family, "lm")
        Prefix(model, length=LENGTH, hidden=HIDDEN, dropout=0.5)
        model.double()
        if checkpointed:
            recompute(model, reentrant=reentrant)
        if checkpointed and reentrant:
            model.enable_input_require_grads()
        # Reentrant checkpointing goes through the table's own graph once for each layer: one batch at a time.
        batches = [batch(family, "lm", seed=seed) for seed in ((1, 2) if not reentrant else (1,))]
        found.append(gradients(model, *batches))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-12)


def test_dropout_acts_in_training_only_and_on_every_row_by_itself() -> None:
    model = build_model("bert", "lm")
    loud(Prefix(model, kind="p-tuning-v2", length=LENGTH, dropout=0.5))
    row = batch("bert", "lm", rows=1)
    inputs = {name: t.repeat(4, 1) for name, t in row.items()}
    still = logits(model, inputs)
    assert torch.equal(logits(model, inputs), still)
    torch.testing.assert_close(still[0], still[3])
    moving = logits(model.train(), inputs)
    assert not torch.allclose(moving[0], moving[3], atol=0.1)
    assert not torch.allclose(logits(model, inputs), moving, atol=0.1)


def test_the_models_own_attention_dropout_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("llama", "lm")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.25
    prefix(model)
    seen: list[float] = []
    sdpa = F.scaled_dot_product_attention

    def watched(*args: Any, dropout_p: float = 0.0, **kwargs: Any) -> Tensor:
        seen.append(dropout_p)
        return sdpa(*args, dropout_p=dropout_p, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    logits(model.train(), batch("llama", "lm"))
    logits(model.eval(), batch("llama", "lm"))
    assert seen == [0.25, 0.25, 0.0, 0.0]


def test_computes_in_the_dtype_of_what_comes_in() -> None:
    inputs = batch("llama", "lm")
    model = build_model("llama", "lm")
    tuning = prefix(model)
    exact = loss(model.train(), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(model, inputs)
    value.backward()
    torch.testing.assert_close(value, exact, rtol=0.05, atol=0.05)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in tuning.encoder.parameters())
    half = build_model("llama", "lm").to(torch.bfloat16)
    assert {p.dtype for p in prefix(half).encoder.parameters()} == {torch.float32}
    torch.testing.assert_close(loss(half.train(), inputs).float(), exact, rtol=0.05, atol=0.05)
    for p in model.parameters():  # as an optimizer with fp32 masters leaves it
        p.data, p.grad = p.data.to(torch.bfloat16), None
    value = loss(model, inputs)
    value.backward()
    torch.testing.assert_close(value.float(), exact, rtol=0.05, atol=0.05)
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in tuning.encoder.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # dynamo looks at tensors in ways that torch itself warns of
@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_layers_give_the_same_gradients_and_are_compiled_once(checkpointed: bool) -> None:
    torch._dynamo.reset()
    found, answers = [], []
    for compiled in (False, True):
        model = build_model("llama", "lm")
        tuning = Prefix(model, length=LENGTH, hidden=HIDDEN)
        if checkpointed:
            recompute(model, reentrant=False)
        for layer in get_layers(model) if compiled else ():
            layer.compile(dynamic=False)
        steps = []
        for seed in range(3):
            inputs = batch("llama", "lm", seed=seed)
            steps.append(gradients(model, inputs))
            with torch.no_grad():
                for p in tuning.encoder.parameters():
                    p.sub_(0.1 * p.grad)  # type: ignore[operator]
            # One graph for the first layer, whose input needs no gradient, and one for the others.
            with torch.compiler.set_stance("default" if seed == 0 else "fail_on_recompile"):
                steps.append(gradients(model, inputs))
        model.eval()
        answers.append(logits(model, inputs))
        with tuning.disable():
            answers.append(logits(model, inputs))
        found.append(steps)
    for plain, fast in zip(*found, strict=True):
        for name in plain:
            torch.testing.assert_close(fast[name], plain[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(answers[2:], answers[:2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(answers[0], answers[1], atol=0.01)


# Coming and going


def test_is_switched_off_alone_or_with_others() -> None:
    inputs = batch("llama", "lm")
    base = logits(build_model("llama", "lm"), inputs)
    model = build_model("llama", "lm")
    first = loud(prefix(model))
    with_first = logits(model, inputs)
    second = loud(flat(model), seed=4)
    with_both = logits(model, inputs)
    with second.disable():
        assert torch.equal(logits(model, inputs), with_first)
        with first.disable():
            assert torch.equal(logits(model, inputs), base)
        assert torch.equal(logits(model, inputs), with_first)
    with first.disable(), second.disable():
        assert torch.equal(logits(model, inputs), base)
    assert torch.equal(logits(model, inputs), with_both)


@pytest.mark.parametrize("first_out", [0, 1])
def test_is_taken_out_in_any_order(first_out: int) -> None:
    inputs = batch("t5", "lm")
    model = build_model("t5", "lm")
    model.set_attn_implementation("eager")
    base, before = logits(model, inputs), anatomy(model)
    both = [loud(prefix(model)), loud(flat(model), seed=4)]
    assert [name for name, m in model.named_children() if isinstance(m, PrefixEncoder)] == ["prefix", "prefix_2"]
    other = both[1 - first_out]
    with both[first_out].disable():
        alone = logits(model, inputs)
    both[first_out].detach()
    assert torch.equal(logits(model, inputs), alone)
    other.detach()
    after = anatomy(model)
    # What is trainable is given back as it was found, so the last one to come must be the first to go.
    parts = before.keys() if first_out else before.keys() - {"moving"}
    assert {part: after[part] for part in parts} == {part: before[part] for part in parts}
    assert torch.equal(logits(model, inputs), base)


def test_a_copy_of_the_model_goes_its_own_way() -> None:
    inputs = batch("t5", "lm")
    model = build_model("t5", "lm")
    tuning = prefix(model)
    loss(model, inputs).backward()  # keys and values with a graph are kept now
    twin = copy.deepcopy(model)
    expected = logits(model, inputs)
    assert torch.equal(logits(twin, inputs), expected)
    loud(tuning)
    assert not torch.equal(logits(model, inputs), expected)
    assert torch.equal(logits(twin, inputs), expected)


def test_published_is_the_table_alone() -> None:
    model = build_model("bert", "classify")
    tuning = Prefix(model, length=LENGTH, hidden=HIDDEN, also_train=["classifier"], slots=["encoder"])
    published = tuning.export()
    assert published.options == {
        "kind": "prefix",
        "length": LENGTH,
        "hidden": None,
        "dropout": 0.0,
        "slots": ["encoder"],
        "also_train": ["classifier"],
    }
    json.dumps(published.options)
    assert set(published.state) == {"parts.encoder.table", "classifier.weight", "classifier.bias"}
    assert published.state["parts.encoder.table"].shape == (LENGTH, scaled(1, "encoder", "bert"))
    assert set(tuning.state()) > {"parts.encoder.table", "parts.encoder.weights.0", "classifier.weight"}
    assert trainable_parameters(model).keys() >= {"classifier.weight", "classifier.bias"}


def test_the_same_seed_makes_the_same_prefix_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    states = [prefix(build_model("llama", "lm"), seed=seed).state() for seed in (0, 0, 1)]
    assert torch.equal(torch.rand(3), expected)
    for name, tensor in states[0].items():
        assert torch.equal(states[1][name], tensor)
        assert not torch.equal(states[2][name], tensor)


# PEFT


def peft_folder(family: str, folder: Path, length: int = 4) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """A folder that PEFT writes, and what its model answers to `row`."""
    torch.manual_seed(1)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length)
    theirs = get_peft_model(build_model(family, "lm"), config).eval()
    theirs.save_pretrained(folder)
    with torch.no_grad():
        expected = theirs(**row()).logits
    return (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
        expected,
    )


def row() -> Inputs:
    ids = torch.randint(5, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("family", DECODERS)
def test_is_pefts_prefix_at_positions_moved_on_by_its_length(family: str, tmp_path: Path) -> None:
    _, state, expected = peft_folder(family, tmp_path)
    model = build_model(family, "lm")
    tuning = Prefix(model, length=4, hidden=None)
    tuning.load({"parts.decoder.table": state["prompt_embeddings"]})
    positions = torch.arange(4, 13)[None].expand(2, -1)
    assert torch.equal(logits(model, {**row(), "position_ids": positions}), expected)
    assert not torch.allclose(logits(model, row()), expected, atol=0.1)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("family", ROTARY)
def test_pefts_folders_come_in_and_go_out_with_the_same_answers(family: str, tmp_path: Path) -> None:
    config, state, expected = peft_folder(family, tmp_path)
    model = build_model(family, "lm")
    tuning = from_peft(model, config, state)
    torch.testing.assert_close(logits(model, row()), expected, rtol=1e-4, atol=1e-4)
    folder = tuning.peft()
    assert folder is not None
    torch.testing.assert_close(folder.state["prompt_embeddings"], state["prompt_embeddings"], rtol=1e-5, atol=1e-5)

    mine = loud(prefix(build_model(family, "lm")))
    expected = logits(mine.model, row())
    folder = mine.peft()
    assert folder is not None
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_config.json").write_text(json.dumps(folder.config))
    save_file(folder.state, tmp_path / "out" / "adapter_model.safetensors")
    theirs = PeftModel.from_pretrained(build_model(family, "lm"), str(tmp_path / "out")).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**row()).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_learnt_positions_are_said_to_need_moving(tmp_path: Path) -> None:
    config, state, expected = peft_folder("gpt2", tmp_path)
    model = build_model("gpt2", "lm")
    tuning = from_peft(model, config, state)
    assert "shift `position_ids` by as many" in tuning.notes[-1]
    positions = torch.arange(4, 13)[None].expand(2, -1)
    assert torch.equal(logits(model, {**row(), "position_ids": positions}), expected)
    assert tuning.peft() is None


@pytest.mark.parametrize(
    ("family", "task"), [("bert", "lm"), ("t5", "lm"), ("llama", "classify"), ("mistral", "lm"), ("gpt2", "lm")]
)
def test_peft_gets_no_folder_that_would_answer_otherwise(family: str, task: Task) -> None:
    assert prefix(build_model(family, task)).peft() is None


def test_foreign_peft_folders_are_refused() -> None:
    model = build_model("llama", "lm")
    before = anatomy(model)
    vectors = torch.zeros(4, scaled(1, "decoder", "llama"))
    with pytest.raises(TuningError, match="LORA"):
        from_peft(model, {"peft_type": "LORA"}, {})
    with pytest.raises(TuningError, match="has the shape"):
        from_peft(
            model, {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}, {"prompt_embeddings": vectors[:, :-8]}
        )
    with pytest.raises(TuningError, match="a decoder"):
        from_peft(
            build_model("bert", "lm"),
            {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4},
            {"prompt_embeddings": vectors},
        )
    assert anatomy(model) == before


# What cannot be


def bloom() -> PreTrainedModel:
    return BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)).eval()


def test_models_outside_of_the_interface_are_refused() -> None:
    for model, why in ((bloom(), "attention interface"), (build_model("gemma2", "lm"), "does not support `softcap`")):
        before = anatomy(model)
        with pytest.raises(TuningError, match=why) as error:
            prefix(model)
        assert ALTERNATIVES_HINT in str(error.value)
        assert anatomy(model) == before


def test_attention_that_is_more_than_sdpa_is_refused() -> None:
    model = build_model("llama", "lm")

    def with_sink(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        out, _ = prefix_attention_forward(module, query, key, *args, **kwargs)
        return out * 0.5, None

    AttentionInterface.register("with_sink", with_sink)
    AttentionMaskInterface.register("with_sink", prefix_attention.sdpa_mask)
    model.set_attn_implementation("with_sink")
    with pytest.raises(TuningError, match="more than `sdpa` computes"):
        prefix(model)
    assert model.config._attn_implementation == "with_sink"


def test_a_prefix_that_nothing_reads_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("llama", "lm")
    before = anatomy(model)
    monkeypatch.setattr(prefix_attention, "LAYER_PREFIXES", "another_name")
    with pytest.raises(TuningError, match="does not reach the output"):
        prefix(model)
    assert anatomy(model) == before


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"kind": "prefx"}, "did you mean 'prefix'"),
        ({"length": 0}, "1 or more"),
        ({"hidden": 0}, "null for no MLP"),
        ({"hidden": None, "deep": True}, "false without an MLP"),
        ({"dropout": 1.0}, "a fraction from 0"),
        ({"slots": ["cross"]}, "some of decoder"),
        ({"slots": []}, "slots is empty"),
        ({"init_text": "w7"}, "needs the model's tokenizer"),
        ({"init_text": "", "tokenizer": spaced()}, "has no tokens"),
        ({"also_train": ["nothing.*"]}, "matches no parameter"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], why: str) -> None:
    model = build_model("llama", "lm")
    before = anatomy(model)
    with pytest.raises(TuningError, match=why):
        Prefix(model, **options)
    assert anatomy(model) == before


def test_another_attention_under_a_prefix_is_told() -> None:
    model = build_model("bert", "lm")
    tuning = prefix(model)
    model.set_attn_implementation("eager")
    with pytest.raises(TuningError, match="which ignores the prefix"):
        logits(model, batch("bert", "lm"))
    with tuning.disable():
        logits(model, batch("bert", "lm"))
    model.set_attn_implementation(Prefix.attention or "")
    assert model.config._attn_implementation == PREFIX_IMPLEMENTATION
    logits(model, batch("bert", "lm"))


def test_paged_caches_are_refused() -> None:
    model = build_model("llama", "lm")
    prefix(model)
    part = torch.zeros(1, 4, 2, HEAD)
    with pytest.raises(TuningError, match="continuous batching"):
        prefix_attention_forward(
            model.get_submodule(PLACES["llama"]["decoder"].format(0)), part, part, part, None, cache=object()
        )


def test_states_of_other_prefixes_are_refused() -> None:
    tuning = prefix(build_model("llama", "lm"))
    with pytest.raises(TuningError, match="lacks"):
        tuning.load(flat(build_model("llama", "lm")).state())
    with pytest.raises(TuningError, match="shape"):
        tuning.load({**tuning.state(), "parts.decoder.table": torch.zeros(1, WIDTH)})
    with pytest.raises(TuningError, match="a prefix adds keys and values"):
        tuning.merge()
