"""Do adapters sit where their publications put them, and keep every promise of a tuning?

Legend: B rows, T time, D model width.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import gelu, linear, relu, silu
from transformers import PreTrainedModel

from postgrad.errors import TuningError
from postgrad.models.sublayers import Block
from postgrad.tuning import adapter as subject
from postgrad.tuning.adapter import Adapter, Bottleneck
from postgrad.tuning.attach import attach
from postgrad.tuning.tuning import Tuning, trainable_parameters
from tests.tuning import checks
from tests.tuning.families import FAMILIES, MORE_FAMILIES, Task, batch, build_model, logits, loss, single_row

FORMS = ("houlsby", "pfeiffer", "parallel")
CASES: list[tuple[str, Task]] = [
    ("llama", "lm"),
    ("gpt2", "lm"),
    ("qwen3", "lm"),
    ("bert", "lm"),
    ("bert", "classify"),
    ("bert", "tags"),
    ("t5", "lm"),
    ("t5", "classify"),
]
DECODERS = ("llama", "gpt2", "qwen3")

# The body's norms; a masked-LM head has one that is no part of the body.
NORMS = {
    "llama": ["model.*norm*"],
    "gpt2": ["transformer.*ln_*"],
    "qwen3": ["model.*norm*"],
    "bert": ["bert.*LayerNorm*"],
    "t5": ["*layer_norm*"],
}

every_form = pytest.mark.parametrize("form", FORMS)
every_case = pytest.mark.parametrize(("family", "task"), CASES)


def attaching(form: str, **options: Any) -> functools.partial[Tuning]:
    return functools.partial(Adapter, variant=form, **{"reduction": 4, **options})


def published(model: PreTrainedModel, options: Mapping[str, Any]) -> Tuning:
    assert options["kind"] == "adapter"
    return attach(model, options)


def speak(tuning: Tuning, seed: int = 0) -> None:
    """Give every weight of a tuning some value, as if it had been trained far."""
    generator = torch.Generator().manual_seed(seed)
    tuning.load({name: t + 0.2 * torch.randn(t.shape, generator=generator) for name, t in tuning.state().items()})


# The promises of every tuning.


@every_form
@every_case
def test_trains_only_what_it_should(form: str, family: str, task: Task) -> None:
    base = NORMS[family] if form == "houlsby" else ()
    # Of a tiny relu bottleneck a unit may be dead on every token.
    checks.trains_only_declared(attaching(form, activation="gelu"), family, task, base=base)


@every_form
@every_case
def test_starts_equal_to_base(form: str, family: str, task: Task) -> None:
    checks.starts_equal_to_base(attaching(form), family, task)


@every_form
@every_case
def test_off_equals_base_also_after_training(form: str, family: str, task: Task) -> None:
    checks.off_equals_base(attaching(form), family, task)


@every_form
@every_case
def test_detach_restores(form: str, family: str, task: Task) -> None:
    checks.detach_restores(attaching(form), family, task)


@every_form
@every_case
def test_state_makes_a_fresh_attach_the_same(form: str, family: str, task: Task) -> None:
    checks.save_load_bit_identical(attaching(form), family, task)


@every_form
@every_case
def test_batch_equals_alone(form: str, family: str, task: Task) -> None:
    checks.batch_equals_single_row(attaching(form), family, task)


@every_form
@pytest.mark.parametrize("family", [*DECODERS, "t5"])
def test_cache_equals_no_cache(form: str, family: str) -> None:
    checks.cache_equals_no_cache(attaching(form), family)


@every_form
@pytest.mark.parametrize(("family", "task"), [("llama", "lm"), ("gpt2", "lm"), ("bert", "classify"), ("t5", "lm")])
def test_checkpointed_gradients_equal(form: str, family: str, task: Task) -> None:
    checks.checkpointed_gradients_equal(attaching(form), family, task)


@every_form
@pytest.mark.parametrize(("family", "task"), [("qwen3", "lm"), ("bert", "classify"), ("t5", "lm")])
def test_published_and_resumed(form: str, family: str, task: Task) -> None:
    attach = attaching(form, also_train=["classifier"] if task == "classify" else [], skip_layers=[0])
    checks.published_equal(attach, published, family, task)
    checks.resume_exact(attach, family, task)


@every_form
@pytest.mark.parametrize("family", DECODERS)
def test_packed_documents_apart(form: str, family: str) -> None:
    checks.packed_documents_isolated(attaching(form), family)


def exact_gradients(attach: functools.partial[Tuning], family: str, *, checkpointed: bool) -> dict[str, Tensor]:
    """Gradients in double precision: in single, recomputing a bare mT5 moves them by more than a tight tolerance."""
    model = build_model(family, "lm")
    speak(attach(model))
    model.double().train()
    if checkpointed:
        checks._enable_checkpointing(model, reentrant=False)
    # One row: in double precision, Gemma 2 has no finite answer for padding on the left.
    loss(model, single_row(batch(family, "lm"), 2)).backward()
    return {name: p.grad for name, p in trainable_parameters(model).items() if p.grad is not None}


@pytest.mark.slow
@every_form
@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_further_families_keep_the_promises(form: str, family: str) -> None:
    for task in MORE_FAMILIES[family].tasks:
        checks.starts_equal_to_base(attaching(form), family, task)
        checks.off_equals_base(attaching(form), family, task)
        checks.detach_restores(attaching(form), family, task)
        checks.save_load_bit_identical(attaching(form), family, task)
        checks.batch_equals_single_row(attaching(form), family, task)
    if MORE_FAMILIES[family].shape != "encoder":
        checks.cache_equals_no_cache(attaching(form), family)
    plain, recomputed = (exact_gradients(attaching(form), family, checkpointed=c) for c in (False, True))
    assert plain.keys() == recomputed.keys() and len(plain) > 4
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-10, rtol=1e-10)


# Where the publications put an adapter, written out with the model's own parts.


def answer(adapter: Bottleneck, nonlinear: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return linear(nonlinear(linear(x, adapter.down_weight, adapter.down_bias)), adapter.up_weight, adapter.up_bias)


@pytest.fixture
def hidden_BTD() -> Tensor:
    return torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))


def written_out_bert(model: Any, hidden_BTD: Tensor, form: str) -> Tensor:
    """A post-LN block: the first layer of BERT."""
    layer, home = model.bert.encoder.layer[0], model.bert.encoder.layer[0].adapter
    attention = layer.attention.output.dense(layer.attention.self(hidden_BTD)[0])
    if form == "houlsby":
        attention = attention + answer(home["attention"], silu, attention)
    middle = layer.attention.output.LayerNorm(hidden_BTD + attention)
    feed = layer.output.dense(gelu(layer.intermediate.dense(middle)))
    adapter = home["feed_forward"]
    if form == "houlsby":
        return layer.output.LayerNorm(middle + feed + answer(adapter, silu, feed))
    if form == "pfeiffer":
        total = middle + feed
        return layer.output.LayerNorm(total + answer(adapter, relu, layer.output.LayerNorm(total)))
    return layer.output.LayerNorm(middle + feed + 4.0 * answer(adapter, relu, middle))


def written_out_llama(model: Any, hidden_BTD: Tensor, form: str) -> Tensor:
    """A pre-LN block: the first layer of Llama."""
    layer, home = model.model.layers[0], model.model.layers[0].adapter
    rotary = model.model.rotary_emb(hidden_BTD, torch.arange(hidden_BTD.shape[1])[None])
    attention = layer.self_attn.forward(layer.input_layernorm(hidden_BTD), position_embeddings=rotary)[0]
    if form == "houlsby":
        attention = attention + answer(home["attention"], silu, attention)
    middle = hidden_BTD + attention
    read = layer.post_attention_layernorm(middle)
    feed = layer.mlp.down_proj(silu(layer.mlp.gate_proj(read)) * layer.mlp.up_proj(read))
    adapter = home["feed_forward"]
    said = {
        "houlsby": lambda: answer(adapter, silu, feed),
        "pfeiffer": lambda: answer(adapter, relu, feed),
        "parallel": lambda: 4.0 * answer(adapter, relu, read),
    }
    return middle + feed + said[form]()


@every_form
def test_post_ln_placement_as_published(form: str, hidden_BTD: Tensor) -> None:
    model: Any = build_model("bert", "lm")
    tuning = Adapter(model, variant=form, reduction=4, train_norms=False)
    speak(tuning)
    with torch.no_grad():
        found = model.bert.encoder.layer[0](hidden_BTD)
        with tuning.disable():  # the parts alone
            expected = written_out_bert(model, hidden_BTD, form)
            base = model.bert.encoder.layer[0](hidden_BTD)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - base).abs().max() > 0.1


@every_form
def test_pre_ln_placement_as_published(form: str, hidden_BTD: Tensor) -> None:
    model: Any = build_model("llama", "lm")
    tuning = Adapter(model, variant=form, reduction=4, train_norms=False)
    speak(tuning)
    rotary = model.model.rotary_emb(hidden_BTD, torch.arange(hidden_BTD.shape[1])[None])
    with torch.no_grad():
        found = model.model.layers[0](hidden_BTD, position_embeddings=rotary)
        with tuning.disable():
            expected = written_out_llama(model, hidden_BTD, form)
            base = model.model.layers[0](hidden_BTD, position_embeddings=rotary)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - base).abs().max() > 0.1


@pytest.mark.parametrize(
    ("family", "form", "places"),
    [
        ("llama", "houlsby", 2 * ["attention", "feed_forward"]),
        ("llama", "pfeiffer", 2 * ["feed_forward"]),
        ("t5", "parallel", 4 * ["feed_forward"]),
        ("t5", "houlsby", 2 * ["attention", "feed_forward"] + 2 * ["attention", "cross_attention", "feed_forward"]),
    ],
)
def test_encoder_decoder_and_cross_attention(family: str, form: str, places: list[str]) -> None:
    tuning = Adapter(build_model(family, "lm"), variant=form, train_norms=False)
    assert [name.rpartition(".")[2] for name in dict.fromkeys(n.rpartition(".")[0] for n in tuning.state())] == places


# Sizes and options.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("options", "m"), [({"reduction": 4}, 8), ({"size": 3}, 3), ({"reduction": 0.5}, 64)])
@pytest.mark.parametrize(
    ("form", "places"), [("houlsby", {"t5": 10}), ("pfeiffer", {"t5": 4}), ("parallel", {"t5": 4})]
)
def test_parameters_are_as_many_as_the_formula_says(
    family: str, form: str, places: dict[str, int], options: dict[str, Any], m: int
) -> None:
    """2 m d + d + m for each adapter (Houlsby et al. 2019, section 2.1)."""
    model = build_model(family, "lm")
    Adapter(model, variant=form, train_norms=False, **options)
    count = places.get(family, 4 if form == "houlsby" else 2)
    assert sum(p.numel() for p in trainable_parameters(model).values()) == count * (2 * m * 32 + 32 + m)


def test_published_settings_of_each_form() -> None:
    settings = {form: Adapter(build_model("gpt2", "lm"), variant=form).export().options for form in FORMS}
    found = {form: [o[key] for key in ("activation", "scale", "train_norms")] for form, o in settings.items()}
    assert found == {
        "houlsby": ["swish", 1.0, True],
        "pfeiffer": ["relu", 1.0, False],
        "parallel": ["relu", 4.0, False],
    }


def test_layers_left_out_stay_as_they_are() -> None:
    """AdapterDrop: encoder layers are counted before the decoder's; their norms stay too."""
    model = build_model("t5", "lm")
    tuning = Adapter(model, skip_layers=[0, 3])
    names = set(tuning.state())
    assert names and not any(name.startswith(("encoder.block.0.", "decoder.block.1.")) for name in names)
    assert any(name.startswith("encoder.block.1.layer.0.layer_norm") for name in names)
    assert "decoder.final_layer_norm.weight" in names
    assert not hasattr(model.encoder.block[0], "adapter") and hasattr(model.encoder.block[1], "adapter")


def test_what_else_moves_in_the_body_comes_back_and_a_task_layer_stays() -> None:
    model = build_model("bert", "classify")
    tuning = Adapter(model, also_train=["bert.pooler", "classifier"])
    start = {name: t.clone() for name, t in tuning.state().items()}
    speak(tuning)
    moved = {name: t.clone() for name, t in tuning.state().items()}
    now = dict(model.named_parameters())
    pooler, classifier = "bert.pooler.dense.weight", "classifier.weight"
    with tuning.disable():
        assert torch.equal(now[pooler], start[pooler]) and torch.equal(now[classifier], moved[classifier])
    assert torch.equal(now[pooler], moved[pooler])
    tuning.detach()
    assert torch.equal(now[pooler], start[pooler]) and torch.equal(now[classifier], moved[classifier])
    assert not torch.equal(start[classifier], moved[classifier])


def test_a_new_task_layer_moves() -> None:
    checks.trains_only_declared(
        attaching("pfeiffer", also_train=["classifier"], activation="gelu"), "bert", "classify", base=["classifier.*"]
    )
    checks.off_equals_base(attaching("pfeiffer", also_train=["classifier"]), "bert", "classify")
    checks.detach_restores(attaching("pfeiffer", also_train=["classifier"]), "bert", "classify")


def test_seed_decides_where_it_starts() -> None:
    def down(seed: int) -> Tensor:
        return Adapter(build_model("llama", "lm"), seed=seed).state()["model.layers.1.attention.down_weight"]

    assert torch.equal(down(1), down(1)) and not torch.equal(down(1), down(2))
    assert down(1).abs().max() <= 32**-0.5


def test_dropout_acts_in_training_alone() -> None:
    model = build_model("llama", "lm")
    speak(Adapter(model, dropout=0.5))
    inputs = batch("llama", "lm")
    assert torch.equal(logits(model, inputs), logits(model, inputs))
    model.train()
    assert not torch.equal(logits(model, inputs), logits(model, inputs))


def test_attaching_draws_nothing_that_others_draw_from() -> None:
    model = build_model("gpt2", "lm").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    before = torch.get_rng_state()
    Adapter(model)
    assert torch.equal(torch.get_rng_state(), before)


@every_form
def test_a_few_steps_teach_it_a_batch(form: str) -> None:
    model = build_model("llama", "lm")
    Adapter(model, variant=form, reduction=2)
    adam = torch.optim.Adam(trainable_parameters(model).values(), lr=1e-2)
    losses = []
    for _ in range(30):
        value = loss(model, batch("llama", "lm"))
        value.backward()
        adam.step()
        adam.zero_grad()
        losses.append(value.item())
    assert losses[-1] < 0.5 * losses[0]


# Dtypes, copies, company.


@every_form
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_bf16_copies_keep_dtype_start_and_off(form: str, family: str) -> None:
    """Weights whose data are bf16 copies, as they are while training in bf16: the base's as well as the adapters'."""
    base, model = build_model(family, "lm"), build_model(family, "lm")
    inputs = batch(family, "lm")
    tuning = Adapter(model, variant=form)
    for parameter in (*base.parameters(), *model.parameters()):
        parameter.data = parameter.data.to(torch.bfloat16)
    expected = logits(base, inputs)
    assert torch.equal(logits(model, inputs), expected)
    speak(tuning)
    assert logits(model, inputs).dtype == torch.bfloat16
    assert not torch.equal(logits(model, inputs), expected)
    with tuning.disable():
        assert torch.equal(logits(model, inputs), expected)
    loss(model, inputs).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in trainable_parameters(model).values())


@every_form
def test_fp32_adapters_follow_a_bf16_model(form: str) -> None:
    model = build_model("bert", "lm")
    tuning = Adapter(model, variant=form, train_norms=False)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    speak(tuning)
    loss(model, batch("bert", "lm")).backward()
    assert logits(model, batch("bert", "lm")).dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trainable_parameters(model).values())


def test_its_own_base_can_be_the_teacher_within_a_step() -> None:
    """Switching off between forward and backward leaves the gradients as they are."""

    def gradients(*, ask: bool) -> dict[str, Tensor]:
        model = build_model("bert", "lm")
        tuning = Adapter(model)
        speak(tuning)
        value = loss(model, batch("bert", "lm"))
        if ask:
            with tuning.disable():
                logits(model, batch("bert", "lm", seed=1))
        value.backward()
        return {name: p.grad for name, p in trainable_parameters(model).items() if p.grad is not None}

    plain, asked = gradients(ask=False), gradients(ask=True)
    assert plain.keys() == asked.keys() and len(plain) > 10
    assert all(torch.equal(plain[name], asked[name]) for name in plain)


def test_off_equals_base_where_fsdp_has_sharded_the_norms(tmp_path: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model: Any = build_model("llama", "lm")
        inputs = batch("llama", "lm")
        expected = logits(model, inputs)
        tuning = Adapter(model)
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
        loss(model, inputs).backward()
        torch.optim.SGD(trainable_parameters(model).values(), lr=0.3).step()
        tuned = logits(model, inputs)
        assert not torch.equal(tuned, expected)
        with tuning.disable():
            assert torch.equal(logits(model, inputs), expected)
        assert torch.equal(logits(model, inputs), tuned)
    finally:
        distributed.destroy_process_group()


@every_form
def test_a_copied_model_has_adapters_of_its_own(form: str) -> None:
    model = build_model("bert", "lm")
    tuning = Adapter(model, variant=form)
    speak(tuning)
    inputs = batch("bert", "lm")
    twin = copy.deepcopy(model)
    expected = logits(model, inputs)
    speak(tuning, seed=1)
    assert torch.equal(logits(twin, inputs), expected) and not torch.equal(logits(model, inputs), expected)


@every_form
@pytest.mark.parametrize("second", FORMS)
@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("last_in_first_out", [True, False])
def test_one_on_top_of_another(form: str, second: str, family: str, *, last_in_first_out: bool) -> None:
    model = build_model(family, "lm")
    inputs = batch(family, "lm")
    base = logits(model, inputs)
    lower = Adapter(model, variant=form, reduction=4)
    speak(lower)
    with_lower = logits(model, inputs)
    upper = Adapter(model, variant=second, reduction=8, seed=1, train_norms=False)
    assert torch.equal(logits(model, inputs), with_lower)
    assert all(".adapter_2." in name for name in trainable_parameters(model))
    speak(upper)
    assert not torch.equal(logits(model, inputs), with_lower)
    with upper.disable():
        assert torch.equal(logits(model, inputs), with_lower)
        with lower.disable():
            assert torch.equal(logits(model, inputs), base)
    # A state does not know what it was stacked on.
    single = build_model(family, "lm")
    Adapter(single, variant=second, reduction=8, train_norms=False).load(upper.state())
    with lower.disable():
        assert torch.equal(logits(model, inputs), logits(single, inputs))
    for tuning in (upper, lower) if last_in_first_out else (lower, upper):
        tuning.detach()
    assert torch.equal(logits(model, inputs), base)
    assert not any(isinstance(module, Bottleneck) for module in model.modules())


@every_form
@pytest.mark.parametrize("lora_first", [True, False])
def test_beside_lora(form: str, *, lora_first: bool) -> None:
    """PEFT wraps the linear layers that are there: none of the adapters', before or after."""
    model = build_model("bert", "lm")
    inputs = batch("bert", "lm")
    expected = logits(model, inputs)
    config = LoraConfig(r=2, target_modules=r".*\.(query|dense)")
    attach = [lambda: inject_adapter_in_model(config, model), lambda: attaching(form, activation="gelu")(model)]
    for step in attach if lora_first else reversed(attach):
        step()
    assert torch.equal(logits(model, inputs), expected)
    adapters = [m for m in model.modules() if isinstance(m, Bottleneck)]
    assert all("lora" not in name for adapter in adapters for name, _ in adapter.named_parameters())
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for adapter in adapters:
        nn.init.normal_(adapter.up_weight, std=0.1)
    loss(model, inputs).backward()
    assert all(a.down_weight.grad is not None and a.down_weight.grad.abs().max() > 0 for a in adapters)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@every_form
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_layer_by_layer_compilation(form: str, family: str) -> None:
    model, plain = build_model(family, "lm"), build_model(family, "lm")
    for one in (model, plain):
        speak(Adapter(one, variant=form, reduction=4))
    inputs = batch(family, "lm")
    layers = model.model.layers if family == "llama" else model.bert.encoder.layer
    for layer in layers:
        layer.compile(dynamic=False)
    # Twice: the second pass must not find what the first one left behind.
    for _ in range(2):
        torch.testing.assert_close(logits(model, inputs), logits(plain, inputs), atol=1e-4, rtol=1e-4)
    loss(model, inputs).backward()
    loss(plain, inputs).backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in trainable_parameters(model).items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@every_form
def test_a_compiled_layer_can_be_switched_off(form: str) -> None:
    model = build_model("bert", "lm")
    inputs = batch("bert", "lm")
    expected = logits(model, inputs)
    tuning = Adapter(model, variant=form)
    speak(tuning)
    for layer in model.bert.encoder.layer:
        layer.compile(dynamic=False)
    tuned = logits(model, inputs)
    with tuning.disable():
        torch.testing.assert_close(logits(model, inputs), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(model, inputs), tuned)
    assert not torch.allclose(tuned, expected, atol=1e-3)


# What cannot be.


@pytest.mark.parametrize(
    ("options", "where", "hint"),
    [
        ({"variant": "hulsby"}, "tuning.variant", "houlsby"),
        ({"reduction": 0}, "tuning.reduction", "more than 0"),
        ({"size": 0}, "tuning.size", "1 or more"),
        ({"dropout": 1.0}, "tuning.dropout", "below 1"),
        ({"activation": "gleu"}, "tuning.activation", "gelu"),
        ({"skip_layers": [2]}, "tuning.skip_layers", "0 to 1"),
        ({"skip_layers": [0, 1]}, "tuning.skip_layers", "every layer"),
        ({"also_train": ["no.such.thing"]}, "tuning", "no.such.thing"),
    ],
)
def test_options_out_of_range_are_told(options: dict[str, Any], where: str, hint: str) -> None:
    model = build_model("llama", "lm")
    with pytest.raises(TuningError) as met:
        Adapter(model, **options)
    assert met.value.where == where and hint in str(met.value)
    assert not any(isinstance(module, Bottleneck) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_a_block_without_the_places_is_named_with_its_modules() -> None:
    model: Any = build_model("llama", "lm")
    model.model.layers[1].mlp = nn.Identity()
    with pytest.raises(TuningError, match=r"no feed_forward sub-layer in model.layers.1") as met:
        Adapter(model, variant="pfeiffer")
    assert "self_attn, mlp" in str(met.value)


def test_a_model_without_blocks_is_told() -> None:
    model: Any = build_model("llama", "lm")
    model.model.layers = nn.ModuleList()
    with pytest.raises(TuningError, match="has no stack of blocks"):
        Adapter(model)


def test_what_the_feed_forward_reads_must_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    found = subject.find_blocks

    def deaf(model: PreTrainedModel) -> list[Block]:
        return [
            block._replace(sublayers=tuple(s._replace(entry=None) for s in block.sublayers)) for block in found(model)
        ]

    monkeypatch.setattr(subject, "find_blocks", deaf)
    Adapter(build_model("llama", "lm"), variant="pfeiffer")
    with pytest.raises(TuningError, match="unknown input of the feed-forward"):
        Adapter(build_model("llama", "lm"), variant="parallel")


def test_an_adapter_that_no_gradient_reaches_is_refused_and_leaves_no_trace() -> None:
    model: Any = build_model("llama", "lm")
    # The last layer's answer is thrown away.
    model.model.layers[1].register_forward_hook(lambda _module, args, _output: args[0])
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]
    with pytest.raises(TuningError, match=r"no gradient reaches the adapter at model.layers.1.attention"):
        Adapter(model)
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == before
    assert not any(m._forward_hooks for m in model.model.layers[0].modules())


def test_merging_says_why_not() -> None:
    with pytest.raises(TuningError, match="nonlinearity"):
        Adapter(build_model("llama", "lm")).merge()


def test_a_strange_state_is_refused_before_anything_is_copied() -> None:
    tuning = Adapter(build_model("llama", "lm"))
    before = {name: t.clone() for name, t in tuning.state().items()}
    with pytest.raises(TuningError, match="lacks"):
        tuning.load({})
    with pytest.raises(TuningError, match="shape"):
        tuning.load(Adapter(build_model("llama", "lm"), size=3).state())
    assert all(torch.equal(before[name], t) for name, t in tuning.state().items())


def test_notes_tell_what_was_added() -> None:
    assert Adapter(build_model("t5", "lm"), skip_layers=[0]).notes == [
        "8 adapters of width 2 in 3 of 4 blocks (attention, feed_forward, cross_attention)",
        "10 norm weights are trained too",
    ]
