"""Soft prompts on every architecture: against the shared promises, hand-made embeddings, PyTorch's LSTM and PEFT's prompts.

Legend: B rows, T time, P vectors of the prompt, D width.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from postgrad.errors import TuningError
from postgrad.tuning import prompt as prompt_module
from postgrad.tuning.prompt import PromptTuning, from_peft
from postgrad.tuning.prompt_encoder import LSTMEncoder
from tests.tuning import checks
from tests.tuning.families import (
    CLS,
    FAMILIES,
    LABELS,
    MASK,
    MORE_FAMILIES,
    PAD,
    SEP,
    VOCABULARY,
    Task,
    batch,
    build_model,
    logits,
    loss,
)

WIDTH = 32
LMS = list(FAMILIES)
CASES: list[tuple[str, Task]] = [
    *((name, "lm") for name in LMS),
    ("llama", "classify"),
    ("gpt2", "classify"),
    ("bert", "classify"),
    ("t5", "classify"),
    ("bert", "tags"),
]


def prompt(model: PreTrainedModel, *, seed: int = 0) -> PromptTuning:
    return PromptTuning(model, length=4, seed=seed)


def p_tuning(model: PreTrainedModel, *, seed: int = 0) -> PromptTuning:
    return PromptTuning(model, kind="p-tuning", length=4, seed=seed)


def with_mlp(model: PreTrainedModel, *, seed: int = 0) -> PromptTuning:
    return PromptTuning(model, length=4, encoder="mlp", seed=seed)


def with_backbone(model: PreTrainedModel, *, seed: int = 0) -> PromptTuning:
    return PromptTuning(model, kind="p-tuning", length=4, backbone="trained", seed=seed)


def in_double(attach: Any) -> Any:
    """The same in fp64, where a sum in another order differs by less than anything that is wrong."""

    def attached(model: PreTrainedModel, *, seed: int = 0) -> PromptTuning:
        own = attach(model, seed=seed)
        model.double()
        return own

    return attached


def words() -> PreTrainedTokenizerFast:
    """One token to each word w0, w1, ..., parted by spaces."""
    tokenizer = checks.tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    return tokenizer


def from_options(model: PreTrainedModel, options: Mapping[str, Any]) -> PromptTuning:
    return PromptTuning(model, **options, seed=5)


KINDS = pytest.mark.parametrize("attach", [prompt, p_tuning])
ON = pytest.mark.parametrize(("family", "task"), CASES)


@KINDS
@ON
def test_nothing_of_the_base_moves(attach: Any, family: str, task: Task) -> None:
    checks.trains_only_declared(attach, family, task)


@KINDS
@ON
def test_a_row_is_answered_in_its_batch_as_alone(attach: Any, family: str, task: Task) -> None:
    checks.batch_equals_single_row(attach, family, task)


@KINDS
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "t5"])
def test_generation_needs_no_cache(attach: Any, family: str) -> None:
    checks.cache_equals_no_cache(attach, family)


@KINDS
@ON
def test_recomputed_activations_give_the_same_gradients(attach: Any, family: str, task: Task) -> None:
    checks.checkpointed_gradients_equal(in_double(attach), family, task)


@pytest.mark.parametrize("attach", [prompt, p_tuning, with_mlp, with_backbone])
@pytest.mark.parametrize(("family", "task"), [("llama", "lm"), ("bert", "classify"), ("t5", "lm")])
def test_it_comes_back(attach: Any, family: str, task: Task) -> None:
    checks.save_load_bit_identical(attach, family, task)
    checks.published_equal(attach, from_options, family, task)
    checks.resume_exact(attach, family, task)


@KINDS
@ON
def test_it_becomes_rows_of_a_plain_model(attach: Any, family: str, task: Task) -> None:
    checks.merge_exact(attach, family, task, tolerance=0.0)


@KINDS
@ON
def test_it_can_be_silent_and_leave(attach: Any, family: str, task: Task) -> None:
    checks.off_equals_base(attach, family, task)
    checks.detach_restores(attach, family, task)


@KINDS
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_packed_documents_have_a_prompt_each(attach: Any, family: str) -> None:
    checks.packed_documents_isolated(attach, family)


@pytest.mark.parametrize("family", list(MORE_FAMILIES))
def test_it_works_on_other_architectures(family: str) -> None:
    checks.batch_equals_single_row(prompt, family, "lm")
    # Embeddings that scale their rows give them back divided and multiplied.
    checks.merge_exact(prompt, family, "lm", tolerance=1e-6)


# --- Where the vectors go ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "bert"])
def test_virtual_ids_anywhere_are_the_vectors_in_their_places(family: str) -> None:
    """Against `inputs_embeds` made by hand: before, between and behind words, twice, out of order, other in each row."""
    model = build_model(family, "lm")
    own = prompt(model)
    a, b, c, d = own.virtual_token_ids
    ids = torch.tensor([[CLS, a, b, 9, MASK, c, 11, d], [b, 40, 41, a, a, 7, 8, 9], [5, 6, 7, 8, 9, 10, 11, 12]])
    table = model.get_input_embeddings().weight
    rows = torch.cat([table, own.soft_prompt()]).detach()
    with torch.no_grad():
        found = model(input_ids=ids).logits
        by_hand = model(inputs_embeds=rows[ids]).logits
    assert torch.equal(found, by_hand)


def test_t5_reads_the_prompt_in_encoder_and_decoder() -> None:
    model = build_model("t5", "lm")
    own = prompt(model)
    a, b, c, d = own.virtual_token_ids
    rows = torch.cat([model.shared.weight, own.soft_prompt()]).detach()
    asked, said = torch.tensor([[a, b, 9, 10]]), torch.tensor([[PAD, c, 7, d]])
    with torch.no_grad():
        found = model(input_ids=asked, decoder_input_ids=said).logits
        by_hand = model(inputs_embeds=rows[asked], decoder_inputs_embeds=rows[said]).logits
    assert torch.equal(found, by_hand)


def test_a_classifier_still_reads_its_own_first_token() -> None:
    """BERT pools the vector at index 0, so [CLS] must stand there, whatever the template puts behind it."""
    model = build_model("bert", "classify")
    own = prompt(model)
    pooled: list[Tensor] = []
    model.bert.pooler.register_forward_pre_hook(lambda _module, args: pooled.append(args[0][:, 0]))
    ids = torch.tensor([[CLS, *own.virtual_token_ids, 20, 21, SEP]])
    model(input_ids=ids)
    hidden = model.bert(input_ids=ids, output_hidden_states=True).hidden_states
    assert torch.equal(pooled[0], hidden[-1][:, 0])
    words = model.bert.embeddings.word_embeddings
    assert torch.equal(words(ids)[0, 0], words.weight[CLS]) and torch.equal(words(ids)[0, 1:5], own.soft_prompt())


def test_gradients_reach_the_vectors_that_are_read_and_no_others() -> None:
    model = build_model("llama", "lm")
    own = prompt(model)
    ids = torch.tensor([[own.virtual_token_ids[0], own.virtual_token_ids[2], 9, 10, 11]])
    model(input_ids=ids, labels=ids.masked_fill(ids >= VOCABULARY, -100)).loss.backward()
    gradient = own.soft_prompt.vectors.grad
    assert gradient is not None
    assert gradient.abs().amax(-1).gt(0).tolist() == [True, False, True, False]


def test_a_moving_table_gets_no_gradient_from_virtual_ids() -> None:
    """The embedding is asked for id 0 in their place, which must not train it."""
    model = build_model("llama", "lm")
    own = PromptTuning(model, length=4, also_train=["model.embed_tokens"])
    ids = torch.tensor([[*own.virtual_token_ids, 9, 10, 11]])
    model(input_ids=ids, labels=ids.masked_fill(ids >= VOCABULARY, -100)).loss.backward()
    gradient = model.model.embed_tokens.weight.grad
    assert gradient.abs().amax(-1).nonzero().flatten().tolist() == [9, 10]


# --- What computes with it --------------------------------------------------------------------------------------------


@KINDS
def test_it_runs_in_bf16_copies_beside_an_fp32_table(attach: Any) -> None:
    """As the optimizer lays a model out: every weight but the table is swapped, and the table's answer is cast, after me."""
    model = build_model("llama", "lm")
    own = attach(model)
    inputs = batch("llama", "lm", virtual=range(own.first_id, own.first_id + own.num_virtual_tokens))
    exact = logits(model, inputs)
    table = model.get_input_embeddings()
    for parameter in model.parameters():
        if parameter is not table.weight:
            parameter.data = parameter.data.to(torch.bfloat16)
    table.register_forward_hook(lambda _module, _inputs, out: out.to(torch.bfloat16))
    answer = logits(model, inputs)
    assert answer.dtype == torch.bfloat16
    assert 0 < (answer.float() - exact).abs().max() < 0.1 * exact.abs().max()
    loss(model, inputs).backward()
    for parameter in own.soft_prompt.parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.bfloat16


def test_a_bf16_model_keeps_fp32_vectors() -> None:
    model = build_model("llama", "lm").to(torch.bfloat16)
    own = prompt(model)
    inputs = batch("llama", "lm", virtual=range(own.first_id, own.first_id + own.num_virtual_tokens))
    assert own.soft_prompt.vectors.dtype == torch.float32 and logits(model, inputs).dtype == torch.bfloat16
    loss(model, inputs).backward()
    assert own.soft_prompt.vectors.grad.dtype == torch.float32


@KINDS
def test_a_compiled_model_answers_the_same(attach: Any) -> None:
    model = build_model("llama", "lm")
    own = attach(model)
    inputs = batch("llama", "lm", virtual=range(own.first_id, own.first_id + own.num_virtual_tokens))
    loss(model, inputs).backward()
    expected = {name: p.grad.clone() for name, p in own.soft_prompt.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(**inputs).logits, model(**inputs).logits)
    compiled(**inputs).loss.backward()
    for name, parameter in own.soft_prompt.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], rtol=1e-5, atol=1e-8), name


def test_a_copied_model_has_a_prompt_of_its_own() -> None:
    model = build_model("llama", "lm")
    own = prompt(model)
    inputs = batch("llama", "lm", virtual=range(own.first_id, own.first_id + own.num_virtual_tokens))
    twin = copy.deepcopy(model)
    before = logits(twin, inputs)
    with torch.no_grad():
        own.soft_prompt.vectors.add_(1.0)
    assert torch.equal(logits(twin, inputs), before)
    assert not torch.equal(logits(model, inputs), before)


# --- Encoders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [None, 32, 7])
def test_the_lstm_is_the_published_one(hidden: int | None) -> None:
    """PyTorch's own LSTM with the same weights, then Linear, ReLU, Linear: the description in P-tuning's code."""
    torch.manual_seed(0)
    ours, inputs_PD = LSTMEncoder(WIDTH, hidden), torch.randn(9, WIDTH)
    inner = WIDTH // 2 if hidden is None else hidden
    theirs = nn.LSTM(WIDTH, inner, num_layers=2, bidirectional=True, batch_first=True)
    theirs.load_state_dict(
        {
            f"{name}_l{layer}{suffix}": tensor
            for cells, suffix in ((ours.forward_cells, ""), (ours.backward_cells, "_reverse"))
            for layer, cell in enumerate(cells)
            for name, tensor in cell.state_dict().items()
        }
    )
    first, _, second = ours.mlp
    assert (first.in_features, first.out_features, second.out_features) == (2 * inner, WIDTH, WIDTH)
    expected = second(torch.relu(first(theirs(inputs_PD[None])[0][0])))
    assert torch.allclose(ours(inputs_PD), expected, atol=1e-6)


@KINDS
def test_an_encoder_writes_the_same_bits_with_gradients_and_without(attach: Any) -> None:
    own = attach(build_model("llama", "lm"))
    with torch.no_grad():
        without = own.soft_prompt()
    assert torch.equal(own.soft_prompt(), without)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"length": 4}, 4 * WIDTH),
        ({"length": 20, "encoder": "mlp"}, 20 * WIDTH + 2 * (WIDTH * WIDTH + WIDTH)),
        ({"length": 20, "encoder": "mlp", "hidden": 5}, 20 * WIDTH + 2 * WIDTH * 5 + 5 + WIDTH),
        # Two directions of four gates; the second layer reads both directions of the first.
        (
            {"kind": "p-tuning"},
            9 * WIDTH + 2 * 4 * 16 * (WIDTH + 16 + 2) + 2 * 4 * 16 * (32 + 16 + 2) + 2 * (WIDTH * WIDTH + WIDTH),
        ),
        (
            {"kind": "p-tuning", "hidden": WIDTH},
            9 * WIDTH
            + 8 * WIDTH * (2 * WIDTH + 2)
            + 8 * WIDTH * (3 * WIDTH + 2)
            + 2 * WIDTH * WIDTH
            + WIDTH
            + WIDTH * WIDTH
            + WIDTH,
        ),
    ],
)
def test_parameter_counts(options: dict[str, Any], count: int) -> None:
    model = build_model("llama", "lm")
    PromptTuning(model, **options)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_final_vectors_are_not_taken_for_what_an_encoder_reads() -> None:
    """The defect that makes a resumed P-tuning silently another one."""
    published = p_tuning(build_model("llama", "lm")).export()
    with pytest.raises(TuningError, match="lacks encoder"):
        p_tuning(build_model("llama", "lm")).load(published.state)


# --- Starts -----------------------------------------------------------------------------------------------------------


def test_random_starts() -> None:
    model = build_model("llama", "lm")
    uniform = PromptTuning(model, length=60, init_scale=0.25).export().state["vectors"]
    assert 0.24 < uniform.max() <= 0.25 and -0.25 <= uniform.min() < -0.24
    lester = PromptTuning(model, length=60, init="random").export().state["vectors"]
    assert 0.49 < lester.max() <= 0.5 and abs(lester.mean()) < 0.05
    normal = PromptTuning(model, length=60, init="normal", seed=3).export().state["vectors"]
    assert 0.95 < normal.std() < 1.05
    again = PromptTuning(model, length=60, init="normal", seed=3).export().state["vectors"]
    other = PromptTuning(model, length=60, init="normal", seed=4).export().state["vectors"]
    assert torch.equal(again, normal) and not torch.equal(other, normal)


def rows_of(vectors_PD: Tensor, table_VD: Tensor) -> list[int]:
    """Which row of the table each vector is."""
    return [(table_VD == vector).all(-1).nonzero().item() for vector in vectors_PD]


def test_rows_of_the_vocabulary() -> None:
    model = build_model("llama", "lm")
    table = model.get_input_embeddings().weight
    special = words().all_special_ids
    drawn = rows_of(PromptTuning(model, length=60, init="vocabulary", tokenizer=words()).soft_prompt(), table)
    assert len(set(drawn)) == 60 and not set(drawn) & set(special) and drawn != sorted(drawn)


def test_rare_words_are_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("postgrad.tuning.prompt_init.NUM_FREQUENT", 7)
    model = build_model("llama", "lm")
    drawn = rows_of(
        PromptTuning(model, length=16, init="vocabulary").soft_prompt(), model.get_input_embeddings().weight
    )
    assert set(drawn) == set(range(7)) and len(set(drawn[:7])) == 7


def test_words_of_a_text_repeated_and_cut() -> None:
    model = build_model("llama", "lm")
    table = model.get_input_embeddings().weight
    more: dict[str, Any] = {"init": "text", "init_text": "w9 w8 w7", "tokenizer": words()}
    with pytest.raises(TuningError, match="no tokens"):
        PromptTuning(model, **{**more, "init_text": ""})
    assert rows_of(PromptTuning(model, length=7, **more).soft_prompt(), table) == [9, 8, 7, 9, 8, 7, 9]
    assert rows_of(PromptTuning(model, length=2, **more).soft_prompt(), table) == [9, 8]


def test_names_of_classes_then_the_vocabulary() -> None:
    tokenizer = words()
    model = build_model("bert", "classify")
    table = model.get_input_embeddings().weight
    own = PromptTuning(model, length=5, init="labels", init_labels=["w20 w21", "w30"], tokenizer=tokenizer)
    assert torch.equal(own.soft_prompt()[0], table[20:22].mean(0))
    assert rows_of(own.soft_prompt()[1:2], table) == [30]
    assert len(set(rows_of(own.soft_prompt()[1:], table))) == 4


def test_a_start_is_what_the_encoder_reads() -> None:
    model = build_model("llama", "lm")
    own = PromptTuning(model, length=2, encoder="mlp", init="text", init_text="w9 w8", tokenizer=words())
    assert rows_of(own.soft_prompt.vectors, model.get_input_embeddings().weight) == [9, 8]


def test_starts_are_rows_as_the_model_sees_them() -> None:
    """Gemma multiplies its rows by the root of its width."""
    model = build_model("gemma3", "lm")
    own = PromptTuning(model, length=1, init="text", init_text="w9", tokenizer=words())
    inputs = torch.tensor([[5, 9, 7]])
    same = torch.tensor([[5, own.first_id, 7]])
    assert torch.equal(model(input_ids=same).logits, model(input_ids=inputs).logits)


def test_nothing_draws_from_the_common_generator() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    p_tuning(build_model("llama", "lm")).merge()
    assert torch.equal(torch.get_rng_state(), before)


# --- Silence and stacks -----------------------------------------------------------------------------------------------


def test_the_base_refuses_virtual_ids() -> None:
    model = build_model("llama", "lm")
    own = prompt(model)
    with own.disable(), pytest.raises(TuningError, match="remove the template's virtual ids"):
        model(input_ids=torch.tensor([[own.virtual_token_ids[3], 9]]))
    model(input_ids=torch.tensor([[own.virtual_token_ids[3], 9]]))
    own.detach()
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[own.virtual_token_ids[0], 9]]))


def test_two_prompts_stand_side_by_side() -> None:
    model = build_model("t5", "lm")
    one = PromptTuning(model, length=3, seed=1)
    two = PromptTuning(model, kind="p-tuning", length=2, seed=2)
    assert one.virtual_token_ids == [120, 121, 122] and two.virtual_token_ids == [123, 124]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if n.startswith("prompt_2.")
    }
    ids = torch.tensor([[124, 120, 9, 123, 122]])
    embedded = model.shared(ids)[0]
    mine = torch.stack(
        [two.soft_prompt()[1], one.soft_prompt()[0], model.shared.weight[9], two.soft_prompt()[0], one.soft_prompt()[2]]
    )
    assert torch.equal(embedded, mine)
    with one.disable():
        assert torch.equal(model.shared(torch.tensor([[123]]))[0], two.soft_prompt()[:1])
        with pytest.raises(TuningError):
            model.shared(ids)
    answer = torch.tensor([[7, 8]])
    expected = logits(model, {"input_ids": ids, "decoder_input_ids": answer})
    with pytest.raises(TuningError, match="start at 123"):
        two.merge()
    one.merge()
    assert torch.equal(logits(model, {"input_ids": ids, "decoder_input_ids": answer})[..., :120], expected)
    two.merge()
    assert torch.equal(logits(model, {"input_ids": ids, "decoder_input_ids": answer})[..., :120], expected)
    assert len(model.shared.weight) == 125
    assert not any(name.startswith("prompt") for name, _ in model.named_parameters())


def test_a_range_is_free_again() -> None:
    model = build_model("llama", "lm")
    prompt(model).detach()
    assert prompt(model).first_id == VOCABULARY


# --- The base's own weights -------------------------------------------------------------------------------------------


def test_a_new_task_layer_moves_besides() -> None:
    def attach(model: PreTrainedModel, *, seed: int = 0) -> PromptTuning:
        return PromptTuning(model, length=4, also_train=["classifier*"], seed=seed)

    checks.trains_only_declared(attach, "bert", "classify", base=["classifier.*"])
    checks.save_load_bit_identical(attach, "bert", "classify")
    checks.published_equal(attach, from_options, "bert", "classify")


def test_the_backbone_may_move() -> None:
    checks.trains_only_declared(with_backbone, "llama", "lm", base=["*"])
    own = with_backbone(build_model("llama", "lm"))
    assert not own.additive
    with pytest.raises(TuningError, match="cannot be disabled"), own.disable():
        pass
    checks.merge_exact(with_backbone, "llama", "lm", tolerance=0.0)


# --- Merged into the vocabulary ---------------------------------------------------------------------------------------


def likes_its_prompt(family: str) -> PreTrainedModel:
    """A merged model whose last hidden state is most like the vectors of its prompt."""
    model = build_model(family, "lm")
    own = prompt(model)
    target = {"decoder_input_ids": torch.tensor([[PAD], [PAD]])} if family == "t5" else {}
    with torch.no_grad():
        hidden = model(input_ids=PROMPTS, **target, output_hidden_states=True)
        last = (hidden.decoder_hidden_states if family == "t5" else hidden.hidden_states)[-1][0, -1]
        own.soft_prompt.vectors.copy_(100 * last.expand(4, -1))
    own.merge()
    return model


PROMPTS = torch.tensor([[20, 21, 22], [23, 24, 25]])


def generated(model: PreTrainedModel) -> torch.Tensor:
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    return model.generate(PROMPTS, attention_mask=torch.ones_like(PROMPTS), **options)[:, -6:]


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_a_merged_model_never_says_its_prompt(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by its configuration alone: the new tokens have no logit of their own, but that of the least likely one."""
    model = likes_its_prompt(family)
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path).eval()
    assert generated(plain).max() < VOCABULARY
    plain.generation_config.suppress_tokens = None
    assert generated(plain).max() < VOCABULARY
    if family == "llama":
        return
    # The mutant: a head that stays tied says the prompt wherever nothing forbids it.
    monkeypatch.setattr(prompt_module, "output_is_tied", lambda _model: False)
    monkeypatch.setattr(prompt_module, "separate_output", lambda _model: nullcontext())
    tied = likes_its_prompt(family)
    assert generated(tied).max() < VOCABULARY
    tied.generation_config.suppress_tokens = None
    assert generated(tied).max() >= VOCABULARY


def test_new_rows_take_the_probability_of_the_least_likely_token() -> None:
    model = build_model("llama", "lm")
    prompt(model).merge()
    found = logits(model, batch("llama", "lm"))
    likeness = (found[..., :VOCABULARY] == found[..., VOCABULARY:].amax(-1, keepdim=True)).all(1).all(0)
    assert likeness.any() and found[..., VOCABULARY:].std(-1).max() == 0
    assert model.generation_config.suppress_tokens == [120, 121, 122, 123]


def test_an_output_bias_keeps_the_prompt_out_of_a_masked_word() -> None:
    model = build_model("bert", "lm")
    own = prompt(model)
    ids = torch.tensor([[CLS, *own.virtual_token_ids, MASK, 20, SEP]])
    expected = logits(model, {"input_ids": ids}).softmax(-1)
    own.merge()
    found = logits(model, {"input_ids": ids}).softmax(-1)
    assert torch.allclose(found[..., :VOCABULARY], expected, atol=1e-7) and found[..., VOCABULARY:].max() == 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_beams_find_the_same_answers_with_vectors_and_with_rows(family: str) -> None:
    model = build_model(family, "lm")
    own = prompt(model)
    inputs = batch(family, "lm", virtual=range(own.first_id, own.first_id + own.num_virtual_tokens))
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": PAD}
    expected = model.generate(**given, **options)
    alone = model.generate(input_ids=given["input_ids"][2:], attention_mask=given["attention_mask"][2:], **options)
    assert torch.equal(alone[0], expected[2, : alone.shape[1]])
    own.merge()
    assert torch.equal(model.generate(**given, **options), expected)


def test_the_tokenizer_spells_the_prompt() -> None:
    model, tokenizer = build_model("llama", "lm"), words()
    own = prompt(model)
    own.merge(tokenizer)
    text = "<|prompt-0|> w9 <|prompt-3|>"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == [120, 9, 123]
    assert tokenizer.decode([120, 9], skip_special_tokens=True).strip() == "w9"
    another = PromptTuning(model, length=2)
    another.merge(tokenizer)
    assert tokenizer.convert_tokens_to_ids(["<|prompt-4|>", "<|prompt-5|>"]) == [124, 125]


def test_rows_that_no_token_had_are_reserved() -> None:
    """Tables are often longer than the vocabulary; the ids must fit all the same."""
    model, tokenizer = build_model("llama", "lm"), words()
    model.resize_token_embeddings(128, mean_resizing=False)
    own = prompt(model)
    own.merge(tokenizer)
    assert tokenizer.convert_tokens_to_ids(["<|reserved-7|>", "<|prompt-0|>"]) == [127, 128]
    assert len(tokenizer) == len(model.get_input_embeddings().weight) == 132


def test_a_tokenizer_with_ids_of_mine_is_refused() -> None:
    model, tokenizer = build_model("llama", "lm"), words()
    own = prompt(model)
    tokenizer.add_tokens(["more"])
    with pytest.raises(TuningError, match="tokens up to 120"):
        own.merge(tokenizer)
    assert len(tokenizer) == 121
    own.merge()


def test_a_merged_folder_is_plain(tmp_path: Path) -> None:
    model, tokenizer = build_model("llama", "lm"), words()
    own = prompt(model)
    inputs = batch("llama", "lm", virtual=range(own.first_id, own.first_id + own.num_virtual_tokens))
    expected = logits(model, inputs)
    own.merge(tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(plain, inputs)[..., :VOCABULARY], expected)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("<|prompt-0|><|prompt-1|> w9", add_special_tokens=False)["input_ids"] == [120, 121, 9]


# --- PEFT -------------------------------------------------------------------------------------------------------------


OLD_NAMES = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # in PEFT


def peft_answer(model: PeftModel, ids: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits


IDS = torch.tensor([[20, 21, 22, 23], [30, 31, 32, 33]])


def ours_and_theirs(own: PromptTuning, theirs: PeftModel, family: str) -> tuple[Tensor, Tensor]:
    """Logits of the same unpadded words behind the prompt, by us and by PEFT."""
    lead = torch.tensor(own.virtual_token_ids).expand(len(IDS), -1)
    more = {"decoder_input_ids": IDS} if family == "t5" else {}
    ours = logits(own.model, {"input_ids": torch.cat([lead, IDS], 1), **more})
    return ours, peft_answer(theirs, IDS, **more)


@OLD_NAMES
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "t5"])
def test_peft_reads_what_we_publish(family: str) -> None:
    own = prompt(build_model(family, "lm"))
    folder = own.peft()
    assert folder is not None
    with torch.random.fork_rng():
        theirs = get_peft_model(
            build_model(family, "lm"), PromptTuningConfig(**{**folder.config, "inference_mode": False})
        )
    assert get_peft_model_state_dict(theirs)["prompt_embeddings"].shape == folder.state["prompt_embeddings"].shape
    theirs.prompt_encoder["default"].embedding.weight.data.copy_(folder.state["prompt_embeddings"])
    ours, answer = ours_and_theirs(own, theirs.eval(), family)
    assert torch.equal(ours[:, -4:], answer[:, -4:])


@OLD_NAMES
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "t5"])
@pytest.mark.parametrize(
    "config",
    [
        lambda task: PromptTuningConfig(task_type=task, num_virtual_tokens=3),
        lambda task: PromptEncoderConfig(
            task_type=task, num_virtual_tokens=3, encoder_reparameterization_type="LSTM", encoder_hidden_size=16
        ),
    ],
    ids=["prompt tuning", "p-tuning"],
)
def test_we_read_what_peft_saves(family: str, config: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = get_peft_model(build_model(family, "lm"), config("SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM")).eval()
    theirs.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    own = from_peft(build_model(family, "lm"), settings, load_file(tmp_path / "adapter_model.safetensors"))
    ours, answer = ours_and_theirs(own, theirs, family)
    assert torch.allclose(ours[:, -4:], answer[:, -4:], atol=1e-5)
    assert (
        own.num_virtual_tokens == 3 and sum(p.numel() for p in own.model.parameters() if p.requires_grad) == 3 * WIDTH
    )


@OLD_NAMES
def test_we_read_a_task_layer_that_peft_saved_besides() -> None:
    torch.manual_seed(0)
    theirs = get_peft_model(
        build_model("llama", "classify"), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    ).eval()
    with torch.no_grad():
        theirs.base_model.score.modules_to_save["default"].weight.add_(1.0)
    state = get_peft_model_state_dict(theirs)
    model = build_model("llama", "classify")
    own = from_peft(model, theirs.peft_config["default"].to_dict(), state)
    ids = torch.cat([torch.tensor([own.virtual_token_ids]), IDS[:1]], 1)
    assert torch.allclose(logits(model, {"input_ids": ids}), peft_answer(theirs, IDS[:1]), atol=1e-5)
    assert logits(model, {"input_ids": ids}).shape == (1, LABELS)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"score.weight", "prompt.vectors"}


def test_peft_gets_nothing_that_it_would_read_otherwise() -> None:
    assert p_tuning(build_model("llama", "lm")).peft() is None
    assert prompt(build_model("bert", "classify")).peft() is None
    assert prompt(build_model("bert", "lm")).peft() is None
    assert PromptTuning(build_model("llama", "lm"), length=4, also_train=["model.norm"]).peft() is None


def test_folders_that_are_not_prompts_are_refused() -> None:
    model = build_model("llama", "lm")
    before = [name for name, _ in model.named_parameters()]
    vectors = {"prompt_embeddings": torch.zeros(3, WIDTH)}
    with pytest.raises(TuningError, match="PREFIX_TUNING"):
        from_peft(model, {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}, vectors)
    with pytest.raises(TuningError, match="3 vectors for 4"):
        from_peft(model, {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}, vectors)
    with pytest.raises(TuningError, match="no vectors"):
        from_peft(model, {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}, {})
    with pytest.raises(TuningError, match="shape"):
        from_peft(
            model,
            {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3},
            {"prompt_embeddings": torch.zeros(3, WIDTH + 1)},
        )
    assert [name for name, _ in model.named_parameters()] == before


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "met"),
    [
        ({"length": 0}, "0 vectors"),
        ({"length": 64}, "64 vectors"),
        ({"kind": "instruction-prompt"}, "100 vectors"),
        ({"kind": "promt"}, "did you mean 'prompt'"),
        ({"init": "lables"}, "did you mean 'labels'"),
        ({"encoder": "lstn"}, "did you mean 'lstm'"),
        ({"backbone": "thawed"}, "one of frozen, trained"),
        ({"hidden": 5}, "has no effect"),
        ({"init_text": "w9"}, "has no effect"),
        ({"init": "text"}, "needs a text"),
        ({"init": "text", "init_text": "w9"}, "needs the model's tokenizer"),
        ({"init": "labels"}, "needs labels"),
        ({"init": "labels", "init_labels": ["w9", "w8"], "length": 1}, "2 labels do not fit"),
        ({"init": "vocabulary", "init_scale": 0.5}, "has no effect"),
        ({"also_train": ["modle.norm"]}, "matches no parameter"),
    ],
)
def test_what_cannot_be_is_told_before_anything_changes(options: dict[str, Any], met: str) -> None:
    model = build_model("llama", "lm")
    before = checks._model_structure(model)
    with pytest.raises(TuningError, match=met):
        PromptTuning(model, **options)
    assert checks._model_structure(model) == before


def test_relative_positions_have_no_limit() -> None:
    assert PromptTuning(build_model("t5", "lm"), length=600).num_virtual_tokens == 600


def test_an_embedding_that_is_more_than_a_table_is_not_merged() -> None:
    model = build_model("llama", "lm")
    own = prompt(model)
    handle = model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, out: out * 2)
    with pytest.raises(TuningError, match="more than a table"):
        own.merge()
    handle.remove()
    own.merge()
