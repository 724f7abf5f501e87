"""Are low-rank adapters what their papers and PEFT say they are, and do they keep every promise of a tuning?

Legend: R rank, I inputs and O outputs of a layer; A is (R, I) and B (O, R).
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config, PreTrainedModel

from postgrad.errors import MissingExtra, TuningError
from postgrad.penalties.o_lora import OrthogonalityPenalty
from postgrad.tuning.attach import attach
from postgrad.tuning.lora import LoraAdapter, earlier_directions, from_peft, scalings
from postgrad.tuning.targets import is_transposed, resolve_targets
from postgrad.tuning.tuning import PeftFolder, Tuning, trainable_parameters
from tests.tuning import checks
from tests.tuning.families import Task, batch, build_model, logits, loss

FORMS = ("lora", "rslora", "dora", "pissa")
HEADS = {"llama": "score", "gpt2": "score", "qwen3": "score", "bert": "classifier", "t5": "classification_head"}
# One of each; the matrix of promises tries every form on every family and task.
CELLS: list[tuple[str, str, Task]] = [
    ("lora", "llama", "lm"),
    ("rslora", "gpt2", "classify"),
    ("dora", "bert", "tags"),
    ("pissa", "t5", "classify"),
]

every_cell = pytest.mark.parametrize(("form", "family", "task"), CELLS)
every_form = pytest.mark.parametrize("form", FORMS)

# transformers renamed what PEFT's wrapper asks for.
wrapped = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def attaching(form: str, family: str, task: Task, **options: Any) -> functools.partial[LoraAdapter]:
    head = [] if task == "lm" else [HEADS[family]]
    return functools.partial(LoraAdapter, **{"variant": form, "rank": 4, "also_train": head, **options})


def trained(attach: Callable[..., LoraAdapter], family: str, task: Task, steps: int = 3) -> LoraAdapter:
    """A tuning that has moved, attached to a model of its own."""
    model = build_model(family, task)
    tuning = attach(model)
    checks.train(model, tuning, family, task, steps=steps)
    return tuning


def from_options(model: PreTrainedModel, options: Mapping[str, Any]) -> Tuning:
    return attach(model, options)


def close(found: Tensor, expected: Tensor, tolerance: float = checks.TOLERANCE) -> None:
    size = max(1.0, expected.abs().max().item())
    assert (found - expected).abs().max().item() <= tolerance * size


# -- the promises of every tuning


@every_cell
def test_trains_only_what_it_should(form: str, family: str, task: Task) -> None:
    heads = [] if task == "lm" else [f"{HEADS[family]}*"]
    checks.trains_only_declared(attaching(form, family, task), family, task, base=heads)


@every_cell
def test_starts_equal_to_base(form: str, family: str, task: Task) -> None:
    exact = form in ("lora", "rslora")
    tolerance = 0.0 if exact else checks.TOLERANCE
    checks.starts_equal_to_base(attaching(form, family, task), family, task, tolerance=tolerance)


@every_cell
def test_a_batch_is_answered_as_its_rows_are_alone(form: str, family: str, task: Task) -> None:
    checks.batch_equals_single_row(attaching(form, family, task), family, task)


@pytest.mark.parametrize(("form", "family"), [("lora", "llama"), ("dora", "gpt2"), ("pissa", "t5")])
def test_generates_with_a_cache_as_without(form: str, family: str) -> None:
    checks.cache_equals_no_cache(attaching(form, family, "lm"), family)


@pytest.mark.parametrize(
    ("form", "family", "task"), [cell for cell in CELLS if cell[1] != "t5"], ids=lambda value: str(value)
)
def test_recomputed_gradients_are_the_same(form: str, family: str, task: Task) -> None:
    checks.checkpointed_gradients_equal(attaching(form, family, task), family, task)


@every_form
def test_recomputed_gradients_are_the_same_up_to_rounding_where_layers_share_a_bias(form: str) -> None:
    """T5's position bias collects the gradients of all layers, and recomputing changes the order of the sum."""

    def gradients(recompute: bool) -> dict[str, Tensor]:
        model = build_model("t5", "lm")
        if recompute:  # under its older name, which warns where both are there
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        tuning = LoraAdapter(model, variant=form, rank=4)
        model.double()
        for name, parameter in trainable_parameters(model).items():
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))).double()
            parameter.data *= 0.1
        model.train()
        loss(model, batch("t5", "lm")).backward()
        return {name: layer.grad for name, layer in tuning.directions().items() if layer.grad is not None}

    plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys() and plain
    for name, gradient in plain.items():
        close(again[name], gradient, 1e-12)


@every_cell
def test_saves_and_loads_bit_for_bit(form: str, family: str, task: Task) -> None:
    checks.save_load_bit_identical(attaching(form, family, task), family, task)


@every_cell
def test_resumes_bit_for_bit(form: str, family: str, task: Task) -> None:
    checks.resume_exact(attaching(form, family, task, dropout=0.0), family, task)


@every_cell
def test_what_is_published_answers_the_same(form: str, family: str, task: Task) -> None:
    tolerance = checks.TOLERANCE if form == "pissa" else 0.0
    checks.published_equal(attaching(form, family, task), from_options, family, task, tolerance=tolerance)


@every_cell
def test_merges_into_a_plain_model(form: str, family: str, task: Task) -> None:
    checks.merge_exact(attaching(form, family, task), family, task)


@every_cell
def test_switched_off_it_is_the_base_to_the_bit(form: str, family: str, task: Task) -> None:
    checks.off_equals_base(attaching(form, family, task), family, task)


@every_cell
def test_detached_it_leaves_nothing(form: str, family: str, task: Task) -> None:
    checks.detach_restores(attaching(form, family, task), family, task)


def test_packed_documents_do_not_see_each_other() -> None:
    checks.packed_documents_isolated(attaching("dora", "llama", "lm"), "llama")


# -- the papers' formulas, and PEFT


def peft_model(model: PreTrainedModel, form: str, rank: int, alpha: float) -> PreTrainedModel:
    """PEFT's own adapters on the same layers."""
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=set(resolve_targets(model, "all-linear")),
        fan_in_fan_out=is_transposed(model.get_submodule(resolve_targets(model, "all-linear")[0])),
        use_rslora=form == "rslora",
        use_dora=form == "dora",
        init_lora_weights="pissa" if form == "pissa" else True,
    )
    return inject_adapter_in_model(config, model)


@every_form
@pytest.mark.parametrize(("family", "task"), [("llama", "lm"), ("gpt2", "classify"), ("bert", "tags"), ("t5", "lm")])
def test_answers_and_gradients_are_peft_s(form: str, family: str, task: Task) -> None:
    model, theirs = build_model(family, task), build_model(family, task)
    tuning = LoraAdapter(model, variant=form, rank=4)
    peft_model(theirs, form, 4, tuning.alpha)
    generator = torch.Generator().manual_seed(0)
    for name, layer in ((n, m) for n, m in theirs.named_modules() if isinstance(m, LoraLayer)):
        own = model.get_submodule(name)
        for part in ("lora_A", "lora_B", *(["lora_magnitude_vector"] if form == "dora" else [])):
            mine, other = getattr(own, part)[tuning.adapter_name].weight, getattr(layer, part)["default"].weight
            if form == "pissa":
                close(mine.data.abs(), other.data.abs(), 1e-4)  # singular vectors have no sign
                mine.data.copy_(other.data)
                tuning._initial_factors[f"{name}.start_{part[-1]}.weight"].copy_(other.data)
            moved = other.data + 0.05 * torch.randn(other.shape, generator=generator)
            mine.data.copy_(moved)
            other.data.copy_(moved)
    tuning.load(tuning.state())  # a start that was changed is taken over
    inputs = batch(family, task)
    tolerance = 2e-5 if form == "pissa" else 0.0
    close(logits(model, inputs), logits(theirs, inputs), tolerance)
    loss(model, inputs).backward()
    loss(theirs, inputs).backward()
    for name, layer in ((n, m) for n, m in theirs.named_modules() if isinstance(m, LoraLayer)):
        for part in ("lora_A", "lora_B"):
            found = getattr(model.get_submodule(name), part)[tuning.adapter_name].weight.grad
            close(found, getattr(layer, part)["default"].weight.grad, 10 * tolerance)


@pytest.mark.parametrize(("form", "expected"), [("lora", 8 / 4), ("rslora", 8 / 2), ("dora", 2.0), ("pissa", 1.0)])
def test_scaling_is_as_published(form: str, expected: float) -> None:
    tuning = LoraAdapter(build_model("llama", "lm"), variant=form, rank=4)
    assert {layer.scaling[tuning.adapter_name] for layer in tuning._layers.values()} == {expected}
    if form != "pissa":
        assert set(scalings(tuning.export()).values()) == {expected}


def test_pissa_starts_from_the_largest_singular_directions() -> None:
    model = build_model("gpt2", "lm")
    weight_IO = model.transformer.h[0].attn.c_attn.weight.detach().clone()
    tuning = LoraAdapter(model, variant="pissa", rank=4)
    name = "transformer.h.0.attn.c_attn"
    state = tuning.state()
    product_OI = state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
    u, s, v = torch.linalg.svd(weight_IO.T)
    close(product_OI, u[:, :4] @ torch.diag(s[:4]) @ v[:4])
    assert torch.equal(model.transformer.h[0].attn.c_attn.weight, weight_IO)


def test_pissa_s_start_comes_from_the_state() -> None:
    """Another machine may find other singular vectors: what is taken away is what was there, not what is found anew."""
    tuning = trained(functools.partial(LoraAdapter, rank=4, variant="pissa"), "llama", "lm")
    state = {name: tensor.clone() for name, tensor in tuning.state().items()}
    for name in [name for name in state if ".start_" in name]:
        state[name] = state[name.replace(".start_", ".lora_")].clone()
    model = build_model("llama", "lm")
    expected = logits(model, batch("llama", "lm"))
    again = LoraAdapter(model, rank=4, variant="pissa")
    again.load(state)
    close(logits(model, batch("llama", "lm")), expected)
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state().items())


def test_adapters_are_fp32_and_seeded_and_leave_the_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (LoraAdapter(build_model("llama", "lm").bfloat16(), rank=4, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert {tensor.dtype for tensor in first.state().values()} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(first.state().values(), again.state().values(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.state().values(), other.state().values(), strict=True))


@every_form
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_weights_held_in_bf16_compute_and_start_near_the_base(form: str, family: str) -> None:
    """As an optimizer with fp32 masters holds them: trained ones and frozen ones."""
    model, base, inputs = build_model(family, "lm"), build_model(family, "lm"), batch(family, "lm")
    tuning = LoraAdapter(model, variant=form, rank=4)
    exact = {name: tensor.clone() for name, tensor in tuning.state().items()}
    full = logits(base, inputs)
    for parameter in (*model.parameters(), *base.parameters()):
        parameter.data = parameter.data.bfloat16()
    expected = logits(base, inputs).float()
    rounding = (expected - full).abs().max().item()
    # Of what pissa adds and takes away, each part is rounded.
    allowed = {"lora": 0.0, "rslora": 0.0, "dora": 2.0, "pissa": 5.0}[form] * rounding
    assert (logits(model, inputs).float() - expected).abs().max().item() <= allowed
    with tuning.disable():
        assert torch.equal(logits(model, inputs).float(), expected)
    loss(model, inputs).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in trainable_parameters(model).values())
    assert all(torch.equal(tensor, exact[name]) for name, tensor in tuning.state().items() if ".start_" in name)


def test_t5_s_layers_in_fp32_stay_so_under_adapters() -> None:
    """T5 asks the dtype of its last feed-forward weight before it calls the layer."""
    model = build_model("t5", "lm").bfloat16()
    for name, module in model.named_modules():
        if name.endswith(".wo"):
            module.float()
    inputs = batch("t5", "lm")
    expected = logits(model, inputs)
    LoraAdapter(model, rank=4)
    assert torch.equal(logits(model, inputs), expected)
    loss(model, inputs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable_parameters(model).values())


# -- options


def test_alpha_ranks_and_patterns() -> None:
    model = build_model("llama", "lm")
    tuning = LoraAdapter(
        model,
        rank=4,
        targets=["q_proj", "down_proj"],
        exclude=["layers.0.mlp"],
        rank_pattern={"*.1.*.q_proj": 2},
        alpha_pattern={"down_proj": 3.0},
    )
    found = {n: (a.shape[0], scalings(tuning.export())[n]) for n, a in tuning.directions().items()}
    assert found == {
        "model.layers.0.self_attn.q_proj": (4, 2.0),
        "model.layers.1.self_attn.q_proj": (2, 4.0),
        "model.layers.1.mlp.down_proj": (4, 0.75),
    }
    checks.train(model, tuning, "llama", "lm", steps=2)
    again = build_model("llama", "lm")
    attach(again, tuning.export().options).load(tuning.export().state)
    assert torch.equal(logits(again, batch("llama", "lm")), logits(model, batch("llama", "lm")))


def test_patterns_of_pissa_are_doubled_with_it() -> None:
    options = {"rank": 4, "variant": "pissa", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3.0}}
    tuning = trained(functools.partial(LoraAdapter, **options), "llama", "lm")
    again = build_model("llama", "lm")
    attach(again, tuning.export().options).load(tuning.export().state)
    close(logits(again, batch("llama", "lm")), logits(tuning.model, batch("llama", "lm")))


def test_dropout_acts_in_training_alone_and_never_on_pissa_s_start() -> None:
    model, inputs = build_model("llama", "lm"), batch("llama", "lm")
    expected = logits(model, inputs)
    tuning = LoraAdapter(model, rank=4, dropout=0.5, variant="pissa")
    close(logits(model, inputs), expected)
    model.train()
    torch.manual_seed(0)
    assert (logits(model, inputs) - expected).abs().max() > 0.1
    for layer in tuning._layers.values():
        layer.lora_B[tuning.adapter_name].weight.data.zero_()
    first, second = logits(model, inputs), logits(model, inputs)
    assert torch.equal(first, second)


def test_lora_plus_raises_the_rate_of_b() -> None:
    model = build_model("llama", "lm")
    LoraAdapter(model, rank=2)
    tuning = LoraAdapter(model, rank=2, b_rate=16.0)
    factors = {name: tuning.rate_factor(name) for name, _ in model.named_parameters()}
    raised = {name for name, factor in factors.items() if factor == 16.0}
    assert raised == {f"{name}.lora_B.{tuning.adapter_name}.weight" for name in tuning.directions()}
    assert set(factors.values()) == {1.0, 16.0}


def test_weights_that_move_besides_are_in_the_state_and_come_and_go_with_the_adapter() -> None:
    model = build_model("llama", "lm")
    before = model.model.norm.weight.detach().clone()
    tuning = LoraAdapter(model, rank=2, also_train=["*norm*"])
    checks.train(model, tuning, "llama", "lm", steps=2)
    moved = model.model.norm.weight.detach().clone()
    assert not torch.equal(moved, before) and torch.equal(tuning.state()["model.norm.weight"], moved)
    with tuning.disable():
        assert torch.equal(model.model.norm.weight, before)
    assert torch.equal(model.model.norm.weight, moved)
    tuning.detach()
    assert torch.equal(model.model.norm.weight, before)


def test_what_a_targeted_layer_has_besides_can_move() -> None:
    model = build_model("gpt2", "lm")
    tuning = LoraAdapter(model, rank=2, also_train=["*.c_attn.bias"])
    assert tuning.extra_trainable.names == [f"transformer.h.{i}.attn.c_attn.bias" for i in range(2)]
    checks.train(model, tuning, "gpt2", "lm", steps=2)
    answer = logits(model, batch("gpt2", "lm"))
    assert tuning.peft() is None
    again = build_model("gpt2", "lm")
    attach(again, tuning.export().options).load(tuning.export().state)
    assert torch.equal(logits(again, batch("gpt2", "lm")), answer)
    tuning.merge()
    close(logits(model, batch("gpt2", "lm")), answer)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"variant": "olora"}, "unknown variant 'olora'.*lora, rslora"),
        ({"variant": "doar"}, "did you mean 'dora'"),
        ({"rank": 0}, "rank is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"targets": "q_porj"}, "'q_porj' matches no linear layer"),
        ({"rank_pattern": {"nothing": 2}}, "tuning.rank_pattern: 'nothing' matches none"),
        ({"alpha_pattern": {"nothing": 2.0}}, "tuning.alpha_pattern: 'nothing' matches none"),
        ({"also_train": ["nothing"]}, "'nothing' matches no parameter"),
        ({"variant": "pissa", "rank": 33}, "the rank is 33, but .* has 32 singular directions"),
        ({"variant": "pissa", "quantization": "nf4"}, "pissa starts from .* full weights"),
        ({"variant": "dora", "quantization": "int8"}, "loses the scales"),
        ({"quantization": "fp4"}, "'fp4'"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_changes(options: dict[str, Any], says: str) -> None:
    model = build_model("llama", "lm")
    with pytest.raises(TuningError, match=f"(?s){says}"):
        LoraAdapter(model, **options)
    assert not any(isinstance(module, LoraLayer) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_quantising_without_the_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = build_model("llama", "lm")
    with pytest.raises(MissingExtra, match="pip install bitsandbytes"):
        LoraAdapter(model, quantization="nf4")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_on_a_mixture_of_experts_only_the_named_layers_are_taken_and_experts_are_said_to_stay() -> None:
    """Named the dense layers of the first block, PEFT's injection takes the experts of the second."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=120,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    names = ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]

    def taken(model: PreTrainedModel) -> list[str]:
        return [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]

    with pytest.warns(RuntimeWarning):  # of patterns for ranks and alphas that it made itself
        theirs = inject_adapter_in_model(LoraConfig(target_modules=names), AutoModelForCausalLM.from_config(config))
    assert taken(theirs) == ["model.layers.1.mlp.experts"]
    model = AutoModelForCausalLM.from_config(config)
    tuning = LoraAdapter(model, rank=2, targets=names)
    assert taken(model) == names
    assert any("experts" in note for note in tuning.notes)
    assert tuning.peft() is None
    assert LoraAdapter(AutoModelForCausalLM.from_config(config), rank=2, targets="attention").peft() is not None
    assert not LoraAdapter(build_model("llama", "lm"), rank=2).notes


# -- PEFT's folders


def written(folder: Path, peft: PeftFolder | None) -> Path:
    assert peft is not None
    (folder / "adapter_config.json").write_text(json.dumps(peft.config))
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in peft.state.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")


@wrapped
@pytest.mark.parametrize(
    ("form", "family", "task"),
    [
        *CELLS,
        ("lora", "t5", "lm"),
        ("dora", "t5", "classify"),
        ("lora", "bert", "classify"),
        ("lora", "distilbert", "classify"),
    ],
)
def test_peft_loads_what_is_published_for_it(form: str, family: str, task: Task, tmp_path: Path) -> None:
    also = ["classifier", "pre_classifier"] if family == "distilbert" else [] if task == "lm" else [HEADS[family]]
    tuning = trained(functools.partial(LoraAdapter, variant=form, rank=4, also_train=also), family, task)
    inputs = batch(family, task)
    expected = logits(tuning.model, inputs)
    folder = written(tmp_path, tuning.peft())
    theirs = PeftModel.from_pretrained(build_model(family, task), str(folder)).eval()
    tolerance = checks.TOLERANCE if form == "pissa" else 0.0
    close(logits(theirs, inputs), expected, tolerance)
    ours = build_model(family, task)
    back = from_peft(ours, *read(folder))
    close(logits(ours, inputs), expected, tolerance)
    assert back.extra_trainable.names == tuning.extra_trainable.names
    saved = json.loads((folder / "adapter_config.json").read_text())["modules_to_save"]
    assert bool(saved) == bool(also)


@wrapped
def test_peft_s_head_of_a_name_that_ends_as_another_s_is_saved_with_both(tmp_path: Path) -> None:
    tuning = trained(functools.partial(LoraAdapter, rank=4, also_train=["classifier"]), "distilbert", "classify")
    inputs = batch("distilbert", "classify")
    theirs = PeftModel.from_pretrained(
        build_model("distilbert", "classify"), str(written(tmp_path, tuning.peft()))
    ).eval()
    assert torch.equal(logits(theirs, inputs), logits(tuning.model, inputs))


@wrapped
def test_a_frozen_head_is_no_matter_to_peft(tmp_path: Path) -> None:
    tuning = trained(functools.partial(LoraAdapter, rank=4), "bert", "classify")
    theirs = PeftModel.from_pretrained(build_model("bert", "classify"), str(written(tmp_path, tuning.peft()))).eval()
    inputs = batch("bert", "classify")
    assert torch.equal(logits(theirs, inputs), logits(tuning.model, inputs))


def test_a_tied_table_that_moves_besides_has_no_place_in_peft_s_format() -> None:
    """PEFT would give the embedding new values, and leave the output with the old ones."""
    model = build_model("gpt2", "lm")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert LoraAdapter(model, rank=2, also_train=["transformer.wte"]).peft() is None
    assert LoraAdapter(build_model("llama", "lm"), rank=2, also_train=["model.embed_tokens"]).peft() is not None


def test_peft_s_configuration_is_plain_and_says_the_task() -> None:
    tasks: Sequence[tuple[str, Task, str | None]] = [
        ("llama", "lm", "CAUSAL_LM"),
        ("t5", "lm", "SEQ_2_SEQ_LM"),
        ("bert", "lm", None),
        ("gpt2", "classify", "SEQ_CLS"),
        ("bert", "tags", "TOKEN_CLS"),
    ]
    for family, task, expected in tasks:
        folder = attaching("rslora", family, task)(build_model(family, task)).peft()
        assert folder is not None
        config = json.loads(json.dumps(folder.config))
        assert config["task_type"] == expected
        assert (config["peft_type"], config["r"], config["lora_alpha"], config["use_rslora"]) == ("LORA", 4, 8, True)
        assert config["fan_in_fan_out"] == (family == "gpt2")
        assert isinstance(config["target_modules"], list) and config["inference_mode"] is True


def made_by_peft(tmp_path: Path, family: str, task: Task, **options: Any) -> tuple[PeftModel, Path]:
    """An adapter that PEFT made, with random numbers in it, and the folder that PEFT wrote."""
    torch.manual_seed(0)
    theirs = get_peft_model(build_model(family, task), LoraConfig(**options))
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    theirs.save_pretrained(str(tmp_path))
    return theirs.eval(), tmp_path


@wrapped
@pytest.mark.parametrize(
    ("family", "task", "options"),
    [
        ("llama", "lm", {"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 5}),
        ("llama", "lm", {"target_modules": "all-linear", "use_dora": True}),
        ("qwen3", "lm", {"target_modules": "all-linear", "use_rslora": True, "lora_dropout": 0.1}),
        (
            "llama",
            "lm",
            {
                "target_modules": ["q_proj", "up_proj"],
                "rank_pattern": {"layers.1.self_attn.q_proj": 2, "up_proj": 5},
                "alpha_pattern": {".*up_proj": 7},
            },
        ),
        ("gpt2", "classify", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "SEQ_CLS"}),
        ("bert", "classify", {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}),
        ("t5", "lm", {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}),
        ("t5", "classify", {"target_modules": ["q"], "modules_to_save": ["classification_head"]}),
        ("llama", "lm", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    ],
)
def test_reads_what_peft_wrote(family: str, task: Task, options: dict[str, Any], tmp_path: Path) -> None:
    theirs, folder = made_by_peft(tmp_path, family, task, **options)
    inputs = batch(family, task)
    model = build_model(family, task)
    tuning = from_peft(model, *read(folder))
    assert torch.equal(logits(model, inputs), logits(theirs, inputs))
    again = build_model(family, task)
    attach(again, tuning.export().options).load(tuning.export().state)
    assert torch.equal(logits(again, inputs), logits(theirs, inputs))


@wrapped
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head is a head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "not those of linear layers: .*embed_tokens"),
        ({"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"target_modules": ["q_proj"], "init_lora_weights": "olora"}, "changed its base"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [3]}, "trainable_token_indices is not supported"),
        ({"target_modules": ["q_proj"], "bias": "all"}, "bias: all is not supported"),
        ({"target_modules": ["q_proj"], "use_dora": True, "use_rslora": True}, "use_dora with use_rslora"),
    ],
)
@pytest.mark.filterwarnings(
    "ignore:.*embedding.*", "ignore:.*tie_word_embeddings.*", "ignore:.*save_embedding_layers.*"
)
def test_what_peft_has_and_we_have_not_is_refused(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    _, folder = made_by_peft(tmp_path, "llama", "lm", **options)
    with pytest.raises(TuningError, match=f"(?s){says}"):
        from_peft(build_model("llama", "lm"), *read(folder))


def test_another_method_and_half_an_adapter_are_refused() -> None:
    tuning = LoraAdapter(build_model("llama", "lm"), rank=2)
    folder = tuning.peft()
    assert folder is not None
    with pytest.raises(TuningError, match="PEFT's method IA3 is not LoRA"):
        from_peft(build_model("llama", "lm"), {**folder.config, "peft_type": "IA3"}, folder.state)
    half = {name: tensor for name, tensor in folder.state.items() if "layers.1.mlp.up_proj.lora_B" not in name}
    with pytest.raises(TuningError, match=r"up_proj\.lora_B"):
        from_peft(build_model("llama", "lm"), folder.config, half)
    with pytest.raises(TuningError, match="there are none"):
        from_peft(build_model("llama", "lm"), folder.config, {})
    with pytest.raises(TuningError, match="matches no linear layer"):
        from_peft(build_model("gpt2", "lm"), folder.config, folder.state)


# -- merging


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_base_in_bf16_is_not_merged_into(family: str) -> None:
    model = build_model(family, "lm").bfloat16()
    tuning = LoraAdapter(model, rank=2)
    with pytest.raises(TuningError, match=r"(?s)is torch.bfloat16.*model.float\(\)"):
        tuning.merge()
    model.float()
    tuning.merge()
    assert not any(isinstance(module, LoraLayer) for module in model.modules())


def test_numbers_that_are_not_finite_are_not_merged() -> None:
    model = build_model("llama", "lm")
    tuning = LoraAdapter(model, rank=2)
    before = [p.detach().clone() for p in model.parameters()]
    tuning.state()["model.layers.1.mlp.up_proj.lora_B.weight"][0, 0] = math.nan
    with pytest.raises(TuningError, match=r"up_proj.lora_B.weight contains NaN or infinite values"):
        tuning.merge()
    now = list(model.parameters())
    assert all(torch.equal(a, b) or b.isnan().any() for a, b in zip(before, now, strict=True))
    assert sum(bool(b.isnan().any()) for b in now) == 1


@every_form
def test_a_merged_model_has_the_plain_update(form: str) -> None:
    tuning = trained(attaching(form, "gpt2", "lm"), "gpt2", "lm")
    base = dict(build_model("gpt2", "lm").named_parameters())
    part, names = tuning.export(), list(tuning.directions())
    tuning.merge()
    for name in names:
        a_RI, b_OR = part.state[f"{name}.lora_A.weight"], part.state[f"{name}.lora_B.weight"]
        expected_OI = base[f"{name}.weight"].T + scalings(part)[name] * b_OR @ a_RI
        if form == "dora":
            magnitude_O = part.state[f"{name}.lora_magnitude_vector"]
            expected_OI = expected_OI * (magnitude_O / expected_OI.norm(dim=1))[:, None]
        close(tuning.model.get_submodule(name).weight.T, expected_OI)


# -- one adapter on another


def stacked(form: str = "lora", family: str = "llama") -> tuple[PreTrainedModel, LoraAdapter, LoraAdapter]:
    """A trained adapter, and on it another, trained too."""
    first = trained(functools.partial(LoraAdapter, rank=4, variant=form), family, "lm")
    second = LoraAdapter(first.model, rank=2, seed=1)
    checks.train(first.model, second, family, "lm", steps=3, first=10)
    return first.model, first, second


@every_form
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_earlier_adapter_stays_in_effect_and_frozen(form: str, family: str) -> None:
    first = trained(functools.partial(LoraAdapter, rank=4, variant=form), family, "lm")
    model, inputs = first.model, batch(family, "lm")
    answer, kept = logits(model, inputs), {name: t.clone() for name, t in first.state().items()}
    second = LoraAdapter(model, rank=2, seed=1)
    assert second.adapter_name != first.adapter_name
    assert torch.equal(logits(model, inputs), answer)
    assert {id(p) for p in trainable_parameters(model).values()} == {
        id(getattr(layer, part)[second.adapter_name].weight)
        for layer in second._layers.values()
        for part in ("lora_A", "lora_B")
    }
    checks.train(model, second, family, "lm", steps=3, first=10)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in first.state().items())
    after = logits(model, inputs)
    with second.disable():
        assert torch.equal(logits(model, inputs), answer)
        with first.disable():
            assert torch.equal(logits(model, inputs), logits(build_model(family, "lm"), inputs))
    assert torch.equal(logits(model, inputs), after)
    second.detach()
    assert torch.equal(logits(model, inputs), answer)
    assert {id(p) for p in first.directions().values()} <= {id(p) for p in trainable_parameters(model).values()}


@every_form
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_adapters_merge_one_after_the_other(form: str, order: tuple[int, int]) -> None:
    model, *both = stacked(form)
    expected = logits(model, batch("llama", "lm"))
    if form == "dora" and order == (1, 0):
        with pytest.raises(TuningError, match="earlier dora adapter"):
            both[1].merge()
        return
    for i in order:
        both[i].merge()
        close(logits(model, batch("llama", "lm")), expected)
    assert not any(isinstance(module, LoraLayer) for module in model.modules())


def test_merging_what_is_below_leaves_the_base_frozen() -> None:
    model, first, second = stacked()
    before = set(trainable_parameters(model))
    first.merge()
    assert set(trainable_parameters(model)) == before
    again = LoraAdapter(model, rank=2)
    assert again.adapter_name != second.adapter_name


def test_a_stack_is_made_again_from_what_was_published() -> None:
    model, first, second = stacked("pissa")
    fresh = build_model("llama", "lm")
    for part in (first.export(), second.export()):
        attach(fresh, part.options).load(part.state)
    close(logits(fresh, batch("llama", "lm")), logits(model, batch("llama", "lm")))


def test_dora_stands_on_no_other_adapter() -> None:
    model = build_model("llama", "lm")
    LoraAdapter(model, rank=2, targets=["q_proj"])
    with pytest.raises(TuningError, match="has an earlier adapter"):
        LoraAdapter(model, rank=2, variant="dora")
    LoraAdapter(model, rank=2, variant="dora", targets=["v_proj"])


def test_o_lora_keeps_out_of_the_earlier_directions() -> None:
    def overlap(strength: float) -> float:
        """What is left of the term after some steps at this strength."""
        first = trained(functools.partial(LoraAdapter, rank=4), "llama", "lm")
        model = first.model
        second = LoraAdapter(model, rank=4, seed=1)
        new, earlier = second.directions(), earlier_directions([first.export(), first.export()])
        assert earlier.keys() == new.keys()
        assert all(rows.shape == (8, new[name].shape[1]) for name, rows in earlier.items())
        assert {id(a) for a in new.values()} < {id(p) for p in trainable_parameters(model).values()}
        pair = list(new.values()), [earlier[name] for name in new]
        penalty = OrthogonalityPenalty(*pair, strength)
        optimizer = torch.optim.SGD(trainable_parameters(model).values(), lr=0.002)
        model.train()
        for step in range(25):
            optimizer.zero_grad()
            loss(model, batch("llama", "lm", seed=step)).backward()
            penalty()
            optimizer.step()
        optimizer.zero_grad()
        return OrthogonalityPenalty(*pair, 1.0)().item()

    assert overlap(1.0) < 0.6 * overlap(0.0)


def test_padded_rows_are_answered_as_alone_on_a_stack() -> None:
    def attach(model: PreTrainedModel, *, seed: int = 0) -> LoraAdapter:
        LoraAdapter(model, rank=2, variant="dora")
        return LoraAdapter(model, rank=2, seed=seed)

    checks.batch_equals_single_row(attach, "gpt2", "lm")
