"""Do the kinds that move the base's own weights move what they say, and nothing else?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertModel,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from postgrad.errors import TuningError
from postgrad.models.task import Task as ModelTask
from postgrad.tuning import weight_subsets
from postgrad.tuning.parameter_location import parameter_distances
from postgrad.tuning.tuning import freeze, unfreeze
from postgrad.tuning.weight_subsets import (
    BitFit,
    BlockFinetuning,
    FullFinetuning,
    HeadFinetuning,
    NormFinetuning,
    WeightSubset,
)
from tests.model_families import make_tiny_model, tiny_config
from tests.tuning import checks
from tests.tuning.families import ALL_FAMILIES, VOCABULARY, Task, batch, build_model, logits, loss

Make = Callable[[PreTrainedModel], WeightSubset]


def numel(tuning: WeightSubset) -> int:
    return sum(t.numel() for t in tuning.state().values())


def moving(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def named(model: nn.Module, *patterns: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if any(fnmatchcase(name, p) for p in patterns)}


def steps(model: PreTrainedModel, tuning: WeightSubset, family: str, task: Task, which: Iterable[int]) -> None:
    """Plain gradient descent on the model's own loss, over all parameters that an optimizer was told of at the start."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in which:
        tuning.on_step_begin(step)
        optimizer.zero_grad()
        loss(model, batch(family, task, seed=step)).backward()
        optimizer.step()


# What moves


LM = ("llama", "gpt2", "qwen3", "bert", "t5")
KINDS: dict[str, tuple[Make, dict[str, list[str]]]] = {
    "full": (FullFinetuning, {"": ["*"]}),
    "full, decayed": (lambda m: FullFinetuning(m, layer_decay=0.5), {"": ["*"]}),
    "head": (
        lambda m: HeadFinetuning(m, untie=m.get_output_embeddings() is not None),
        {
            "": ["lm_head.*", "score.*", "classifier.*", "classification_head.*"],
            "bert": ["cls.predictions.transform.*", "cls.predictions.decoder.*", "classifier.*"],
        },
    ),
    "blocks": (
        lambda m: BlockFinetuning(m, last=1, head=False),
        {
            "llama": ["model.layers.1.*"],
            "gpt2": ["transformer.h.1.*"],
            "qwen3": ["model.layers.1.*"],
            "bert": ["bert.encoder.layer.1.*"],
            "t5": ["*encoder.block.1.*", "*decoder.block.1.*"],
        },
    ),
    "norm": (
        NormFinetuning,
        {"": ["*norm*", "*ln_*", "*LayerNorm*", "score.*", "classifier.*", "classification_head.*"]},
    ),
}


@pytest.mark.parametrize("task", ["lm", "classify"])
@pytest.mark.parametrize("family", LM)
@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_chosen_moves(kind: str, family: str, task: Task) -> None:
    make, patterns = KINDS[kind]
    model = build_model(family, task)
    tuning = make(model)
    expected = named(model, *patterns.get(family, patterns.get("", [])))
    assert moving(model) == expected == tuning.state().keys() != set()
    before = copy.deepcopy(model.state_dict())
    steps(model, tuning, family, task, (1, 2, 3))
    after = dict(model.named_parameters())
    assert {name for name, p in after.items() if not torch.equal(p, before[name])} == expected
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers() if name in before)


# Rates by depth

ROUGH = 0.5  # powers of a half are exact


def by_layer(layer: int, depth: int) -> float:
    """As published: the head is layer L + 1, blocks are 1 to L, the embeddings 0."""
    return ROUGH ** (depth + 1 - layer)


def t5(encoder: int, decoder: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config: Any = ALL_FAMILIES["t5"].config()
    return T5ForConditionalGeneration(
        T5Config(**{**config.to_dict(), "num_layers": encoder, "num_decoder_layers": decoder})
    ).eval()


RATES: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, float]]] = {
    "llama": (
        lambda: build_model("llama", "lm"),
        {
            "lm_head.weight": 1,
            "model.norm.weight": 1,
            "model.layers.1.mlp.up_proj.weight": 1 / 2,
            "model.layers.0.input_layernorm.weight": 1 / 4,
            "model.embed_tokens.weight": 1 / 8,
        },
    ),
    "gpt2, tied": (
        lambda: build_model("gpt2", "lm"),
        {
            "transformer.ln_f.bias": 1,
            "transformer.h.1.attn.c_attn.weight": 1 / 2,
            "transformer.h.0.mlp.c_proj.bias": 1 / 4,
            "transformer.wpe.weight": 1 / 8,
            "transformer.wte.weight": 1 / 8,
        },
    ),
    "bert": (
        lambda: build_model("bert", "classify"),
        {
            "classifier.weight": 1,
            "bert.pooler.dense.weight": 1,
            "bert.encoder.layer.1.output.dense.weight": 1 / 2,
            "bert.encoder.layer.0.attention.self.key.bias": 1 / 4,
            "bert.embeddings.LayerNorm.weight": 1 / 8,
            "bert.embeddings.word_embeddings.weight": 1 / 8,
        },
    ),
    "t5, each stack on its own": (
        lambda: t5(encoder=3, decoder=1),
        {
            "encoder.final_layer_norm.weight": 1,
            "decoder.final_layer_norm.weight": 1,
            "encoder.block.2.layer.0.SelfAttention.q.weight": 1 / 2,
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": 1 / 8,
            "decoder.block.0.layer.1.EncDecAttention.k.weight": 1 / 2,
            "shared.weight": 1 / 16,
        },
    ),
    "bart, a norm of the embeddings behind the blocks' list": (
        lambda: build_model("bart", "classify"),
        {
            "classification_head.dense.weight": 1,
            "model.encoder.layers.0.fc1.weight": 1 / 4,
            "model.encoder.layernorm_embedding.weight": 1 / 8,
            "model.decoder.embed_positions.weight": 1 / 8,
            "model.shared.weight": 1 / 8,
        },
    ),
    "opt, a final norm before the blocks' list": (
        lambda: build_model("opt", "lm"),
        {
            "lm_head.weight": 1,
            "model.decoder.final_layer_norm.weight": 1,
            "model.decoder.layers.1.fc1.weight": 1 / 2,
            "model.decoder.embed_positions.weight": 1 / 8,
        },
    ),
}


@pytest.mark.parametrize("case", RATES)
def test_rates_fall_from_the_top_down(case: str) -> None:
    make, table = RATES[case]
    tuning = FullFinetuning(make(), layer_decay=ROUGH)
    assert {name: tuning.rate_factor(name) for name in table} == table


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_rates_are_the_published_formula(family: str) -> None:
    model = build_model(family, "classify")
    tuning, depth = FullFinetuning(model, layer_decay=ROUGH), 2
    stack = {"llama": "model.layers", "bert": "bert.encoder.layer"}[family]
    table = {"llama": "model.embed_tokens", "bert": "bert.embeddings"}[family]
    for name, _ in model.named_parameters():
        inside = [i for i in range(depth) if name.startswith(f"{stack}.{i}.")]
        layer = inside[0] + 1 if inside else 0 if name.startswith(table) else depth + 1
        assert tuning.rate_factor(name) == by_layer(layer, depth), name


def test_without_decay_all_rates_are_one() -> None:
    model = build_model("llama", "lm")
    tuning = FullFinetuning(model)
    assert {tuning.rate_factor(name) for name in moving(model)} == {1.0}
    with pytest.raises(TuningError, match=r"layer_decay is 0"):
        FullFinetuning(model, layer_decay=0.0)


def test_a_tied_table_has_the_rate_of_the_embeddings_and_it_is_said() -> None:
    (note,) = FullFinetuning(build_model("gpt2", "lm"), layer_decay=0.9).notes
    assert "lm_head.weight is tied to transformer.wte.weight" in note
    assert FullFinetuning(build_model("llama", "lm"), layer_decay=0.9).notes == []


def test_what_is_never_called_counts_as_an_embedding() -> None:
    model = build_model("llama", "lm")
    model.model.spare = nn.Linear(2, 2)
    assert parameter_distances(model)["model.spare.weight"] == 3


# The task layer


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
def test_a_tied_head_is_refused_and_nothing_changes(family: str) -> None:
    model = build_model(family, "lm")
    before = checks._model_structure(model)
    with pytest.raises(TuningError, match=r"all of the input embedding would be trained(.|\n)*untie: true"):
        HeadFinetuning(model)
    assert checks._model_structure(model) == before


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5", "bart", "modernbert", "electra"])
def test_an_untied_head_starts_equal_moves_alone_and_is_saved_as_such(family: str, tmp_path: Path) -> None:
    model = build_model(family, "lm")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    table = model.get_input_embeddings().weight
    output = model.get_output_embeddings()
    assert output.weight is table, "this test is about tied models"
    inputs = batch(family, "lm")
    expected, count = logits(model, inputs), sum(p.numel() for p in model.parameters())

    tuning = HeadFinetuning(model, untie=True)
    assert torch.equal(logits(model, inputs), expected)
    assert output.weight is not table and output.weight.requires_grad and not table.requires_grad
    more = table.numel() + (VOCABULARY if family == "bert" else 0)  # BERT's output bias has two names as well
    assert sum(p.numel() for p in model.parameters()) == count + more
    assert "a weight of its own now" in tuning.notes[0] and f"{table.numel():,}" in tuning.notes[0]

    was = table.detach().clone()
    steps(model, tuning, family, "lm", (1, 2, 3))
    assert torch.equal(table, was) and not torch.equal(output.weight, was)
    model.tie_weights()  # as when the vocabulary grows
    assert not torch.equal(output.weight, table)

    model.save_pretrained(tmp_path)
    again, loading = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert torch.equal(logits(again.eval(), inputs), logits(model, inputs))


def test_untying_leaves_what_else_is_tied() -> None:
    model = build_model("bart", "lm")
    HeadFinetuning(model, untie=True)
    assert model.model.encoder.embed_tokens.weight is model.model.decoder.embed_tokens.weight


def test_a_bias_that_nothing_reads_any_more_does_not_count() -> None:
    model = build_model("bert", "lm")
    state = HeadFinetuning(model, untie=True).state()
    assert "cls.predictions.decoder.bias" in state and "cls.predictions.bias" not in state


def test_untying_is_not_needed_where_nothing_is_tied() -> None:
    model = build_model("llama", "lm")
    before = checks._model_structure(model)
    assert HeadFinetuning(model, untie=True).notes == []
    assert checks._model_structure(model)["configuration"] == before["configuration"]
    with pytest.raises(TuningError, match="no output embedding"):
        HeadFinetuning(build_model("bert", "classify"), untie=True)


def test_untying_is_refused_where_the_model_would_answer_differently() -> None:
    class ScaledWhenTied(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            answer = super().forward(*args, **kwargs)
            if self.config.tie_word_embeddings:
                answer.logits = answer.logits / 2
            return answer

    config = ALL_FAMILIES["llama"].config()
    config.tie_word_embeddings = True
    with pytest.raises(TuningError, match="changes when its output embedding is untied"):
        HeadFinetuning(ScaledWhenTied(config).eval(), untie=True)


def test_a_bare_backbone_has_no_task_layer() -> None:
    with pytest.raises(TuningError, match="no task layer"):
        HeadFinetuning(BertModel(ALL_FAMILIES["bert"].config()))


# Blocks


CHOICES: list[tuple[dict[str, Any], list[str]]] = [
    ({"last": 1}, ["*encoder.block.2.*", "*decoder.block.1.*"]),
    ({"last": 2}, ["*encoder.block.1.*", "*encoder.block.2.*", "*decoder.block.*"]),
    ({"last": 3}, ["*.block.*"]),
    ({"all_but_first": 1}, ["*encoder.block.1.*", "*encoder.block.2.*", "*decoder.block.1.*"]),
    ({"all_but_first": 2}, ["*encoder.block.2.*"]),
    ({"all_but_first": 0}, ["*.block.*"]),
    ({"targets": ["decoder.block.1"]}, ["decoder.block.1.*"]),
    ({"targets": ["block.0"]}, ["*.block.0.*"]),
    ({"targets": ["encoder*", "decoder.block.?"]}, ["*.block.*"]),
]


@pytest.mark.parametrize(("choice", "patterns"), CHOICES)
def test_blocks_are_counted_in_each_stack(choice: dict[str, Any], patterns: list[str]) -> None:
    model = t5(encoder=3, decoder=2)
    BlockFinetuning(model, head=False, **choice)
    assert moving(model) == named(model, *patterns)


def test_the_head_and_the_embeddings_come_besides() -> None:
    model = build_model("bert", "classify")
    BlockFinetuning(model, last=1)
    assert moving(model) == named(model, "classifier.*", "bert.pooler.*", "bert.encoder.layer.1.*")
    model = build_model("llama", "lm")
    BlockFinetuning(model, last=1, head=False, embeddings=True)
    assert moving(model) == named(model, "model.embed_tokens.*", "model.layers.1.*")
    model = build_model("llama", "lm")
    BlockFinetuning(model, all_but_first=2, head=False, embeddings=True)  # and none of the blocks
    assert moving(model) == named(model, "model.embed_tokens.*")
    model = build_model("gpt2", "lm")
    tuning = BlockFinetuning(model, last=1, also_train=["transformer.wpe"])
    assert moving(model) == named(model, "transformer.ln_f.*", "transformer.h.1.*", "transformer.wpe.*")
    assert "stays frozen" in tuning.notes[0] and "transformer.wte.weight" in tuning.notes[0]
    assert BlockFinetuning(build_model("gpt2", "lm"), last=1, embeddings=True).notes == []


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({}, "exactly one of"),
        ({"last": 1, "all_but_first": 1}, "exactly one of"),
        ({"last": 3}, "1 to 2"),
        ({"last": 0}, "1 to 2"),
        ({"all_but_first": 3}, "0 to 2"),
        ({"targets": ["model.layer.1"]}, "did you mean 'model.layers.1'"),
        ({"last": 1, "unfreeze_every": 0}, "at least 1 step"),
        ({"last": 1, "also_train": ["model.nrom"]}, "model.norm"),
    ],
)
def test_blocks_that_there_are_not_are_refused_before_anything_changes(wrong: dict[str, Any], says: str) -> None:
    model = build_model("llama", "lm")
    with pytest.raises(TuningError, match=says):
        BlockFinetuning(model, **wrong)
    assert moving(model) == named(model, "*")


THAWING: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any], list[list[str]]]] = {
    "a new task layer alone, then from the top, then the embeddings": (
        lambda: build_model("bert", "classify"),
        {"last": 2, "embeddings": True},
        [
            ["classifier.*", "bert.pooler.*"],
            ["bert.encoder.layer.1.*"],
            ["bert.encoder.layer.0.*"],
            ["bert.embeddings.*"],
        ],
    ),
    "a language model's head comes with its top block": (
        lambda: build_model("llama", "lm"),
        {"all_but_first": 0},
        [["lm_head.*", "model.norm.*", "model.layers.1.*"], ["model.layers.0.*"]],
    ),
    "one block of each stack": (
        lambda: t5(encoder=3, decoder=2),
        {"last": 3, "embeddings": True},
        [
            ["*final_layer_norm.*", "encoder.block.2.*", "decoder.block.1.*"],
            ["encoder.block.1.*", "decoder.block.0.*"],
            ["encoder.block.0.*"],
            ["shared.*"],
        ],
    ),
    "named blocks, and what moves besides is there at once": (
        lambda: build_model("gpt2", "classify"),
        {"targets": ["h.0"], "also_train": ["transformer.wpe"]},
        [["score.*", "transformer.ln_f.*", "transformer.wpe.*"], ["transformer.h.0.*"]],
    ),
}


@pytest.mark.parametrize("case", THAWING)
def test_blocks_thaw_from_the_top_as_a_function_of_the_step(case: str) -> None:
    make, options, order = THAWING[case]
    model = make()
    tuning = BlockFinetuning(model, unfreeze_every=3, **options)
    everything = named(model, *(pattern for patterns in order for pattern in patterns))
    assert moving(model) == everything, "the optimizer has to know all that will ever move"

    def due(step: int) -> set[str]:
        return named(model, *(pattern for patterns in order[: 1 + (step - 1) // 3] for pattern in patterns))

    several = list(range(1, 3 * len(order) + 2))
    for step in [*several, *reversed(several), 1, 1000]:
        tuning.on_step_begin(step)
        assert moving(model) == due(step), f"step {step}"
    assert tuning.state().keys() == everything


def test_what_is_not_due_does_not_move_and_all_has_moved_at_the_end() -> None:
    model = build_model("bert", "classify")
    tuning = BlockFinetuning(model, last=2, unfreeze_every=2, embeddings=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    before = copy.deepcopy(model.state_dict())
    seen: list[set[str]] = []
    for step in range(1, 7):
        tuning.on_step_begin(step)
        optimizer.zero_grad()
        loss(model, batch("bert", "classify", seed=step)).backward()
        optimizer.step()
        seen.append({name for name, p in model.named_parameters() if not torch.equal(p, before[name])})
    head, top = named(model, "classifier.*", "bert.pooler.*"), named(model, "bert.encoder.layer.1.*")
    assert seen[0] == seen[1] == head
    assert seen[2] == seen[3] == head | top
    assert seen[5] == tuning.state().keys()


def test_blocks_can_have_rates_by_depth_too() -> None:
    tuning = BlockFinetuning(build_model("llama", "lm"), last=2, layer_decay=ROUGH)
    assert tuning.rate_factor("model.layers.0.mlp.up_proj.weight") == 1 / 4
    assert tuning.rate_factor("model.norm.weight") == 1


# Biases and norms


def test_biases_are_counted_by_formula() -> None:
    width, inner, layers, classes, words = 32, 48, 2, 3, 120
    # Queries, keys, values, the attention's output, both halves of the feed-forward part, two norms.
    block = 4 * width + inner + width + 2 * width
    assert numel(BitFit(build_model("bert", "classify"))) == (
        width + layers * block + width + classes * width + classes  # the embeddings' norm, pooler, classifier
    )
    assert numel(BitFit(build_model("bert", "lm"))) == width + layers * block + 2 * width + words  # transform, output
    gpt2 = 3 * width + width + 4 * width + width + 2 * width
    assert numel(BitFit(build_model("gpt2", "lm"))) == layers * gpt2 + width
    key = 2 * 8
    assert numel(BitFit(build_model("qwen2", "lm"))) == layers * (width + 2 * key)


def test_some_biases_can_be_left_out() -> None:
    model = build_model("bert", "classify")
    BitFit(model, targets=["*.query.*", "*.intermediate.*"], also_train=["bert.embeddings.LayerNorm.weight"])
    assert moving(model) == named(
        model, "*query.bias", "*intermediate.dense.bias", "classifier.*", "bert.embeddings.LayerNorm.weight"
    )
    with pytest.raises(TuningError, match="no biases that match"):
        BitFit(build_model("bert", "classify"), targets=["*.nothing"])


@pytest.mark.parametrize(
    ("family", "task"), [("llama", "lm"), ("qwen3", "lm"), ("t5", "lm"), ("t5", "classify"), ("modernbert", "lm")]
)
def test_a_backbone_without_biases_is_told_what_works(family: str, task: Task) -> None:
    model = build_model(family, task)
    with pytest.raises(TuningError, match="norm trains about as few weights; head, blocks, full and lora work"):
        BitFit(model)
    assert moving(model) == named(model, "*")


def test_norms_are_counted_by_formula() -> None:
    width, layers, classes, head = 32, 2, 3, 8
    assert numel(NormFinetuning(build_model("llama", "lm"))) == (2 * layers + 1) * width
    assert (
        numel(NormFinetuning(build_model("qwen3", "lm"))) == (2 * layers + 1) * width + layers * 2 * head
    )  # of queries and keys
    assert numel(NormFinetuning(build_model("gpt2", "lm"))) == (2 * layers + 1) * 2 * width
    assert (
        numel(NormFinetuning(build_model("bert", "classify")))
        == (2 * layers + 1) * 2 * width + classes * width + classes
    )
    assert numel(NormFinetuning(build_model("t5", "lm"))) == (2 * layers + 3 * layers + 2) * width


def test_norms_are_known_by_class_and_not_by_name() -> None:
    class OddRMSNormGated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(4))

    model = build_model("llama", "lm")
    model.model.odd = OddRMSNormGated()
    model.model.layer_norm_of_name_only = nn.Linear(2, 2)
    model.model.plain = nn.LayerNorm(4, bias=False)
    found = NormFinetuning(model, also_train=["lm_head"]).state()
    assert {"model.odd.gain", "model.plain.weight", "lm_head.weight"} < found.keys()
    assert not any("name_only" in name for name in found)


def test_a_model_without_norms_is_refused() -> None:
    model = build_model("llama", "lm")
    for module in list(model.modules()):
        for name, _ in list(module.named_children()):
            if "norm" in name:
                setattr(module, name, nn.Identity())
    with pytest.raises(TuningError, match="no normalisation layers with weights"):
        NormFinetuning(model)


# The protocol


MADE: dict[str, Make] = {
    "full": FullFinetuning,
    "head": HeadFinetuning,
    "blocks": lambda m: BlockFinetuning(m, last=1, unfreeze_every=2),
    "bias": lambda m: BitFit(m, also_train=["*.wpe.weight"]),
    "norm": NormFinetuning,
}


@pytest.mark.parametrize("kind", MADE)
def test_a_state_comes_back_bit_for_bit_and_only_as_a_whole(kind: str) -> None:
    model = build_model("gpt2", "classify")
    tuning = MADE[kind](model)
    steps(model, tuning, "gpt2", "classify", (1, 2, 3))
    state = {name: t.clone() for name, t in tuning.state().items()}
    fresh = build_model("gpt2", "classify")
    again = MADE[kind](fresh)
    again.load(state)
    inputs = batch("gpt2", "classify", seed=7)
    assert torch.equal(logits(fresh, inputs), logits(model, inputs))
    assert tuning.export().options["kind"] == tuning.kind
    lacking = dict(list(state.items())[1:])
    with pytest.raises(TuningError, match="lacks"):
        again.load(lacking)
    with pytest.raises(TuningError, match="unknown tensor"):
        again.load({**state, "other": torch.zeros(1)})


@pytest.mark.parametrize("kind", MADE)
def test_there_is_no_base_to_switch_back_to(kind: str) -> None:
    tuning = MADE[kind](build_model("gpt2", "classify"))
    assert not tuning.additive
    with pytest.raises(TuningError, match="cannot be disabled"), tuning.disable():
        pass


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("out", ["detach", "merge"])
def test_taken_out_weights_stay_and_are_as_trainable_as_before(kind: str, out: str) -> None:
    model = build_model("gpt2", "classify")
    model.transformer.wte.requires_grad_(False)
    loss(model, batch("gpt2", "classify"))  # the first time, transformers notes in the configuration which loss it is
    before = checks._model_structure(model)
    tuning = MADE[kind](model)
    steps(model, tuning, "gpt2", "classify", (1, 2, 3))
    moved = copy.deepcopy(model.state_dict())
    getattr(tuning, out)()
    assert checks._model_structure(model) == before
    assert all(torch.equal(t, moved[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("kind", MADE)
def test_attaching_draws_nothing_and_leaves_modes_alone(kind: str) -> None:
    model = build_model("gpt2", "classify").train()
    model.transformer.h[0].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    MADE[kind](model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes


def test_quantised_weights_are_refused() -> None:
    model = build_model("llama", "lm")
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TuningError, match=r"up_proj.weight is int8"):
        FullFinetuning(model)
    NormFinetuning(model)


def test_blocks_that_share_their_weights_are_one() -> None:
    model = AlbertForMaskedLM(
        AlbertConfig(vocab_size=60, embedding_size=8, hidden_size=16, num_attention_heads=2, intermediate_size=24)
    )
    BlockFinetuning(model, last=1, head=False)
    assert moving(model) == named(model, "albert.encoder.albert_layer_groups.*")


# Naming parameters


def test_patterns_name_parameters_and_modules() -> None:
    model = build_model("llama", "lm")
    freeze(model)
    found = unfreeze(model, ["lm_head", "*layers.1.mlp", "model.norm.weight"])
    assert set(found) == moving(model) == named(model, "lm_head.*", "*layers.1.mlp.*", "model.norm.*")
    assert found == [name for name, _ in model.named_parameters() if name in set(found)]
    assert unfreeze(model, []) == []


@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        (["model.norm", "model.layers.1.mpl"], r"model\.layers\.1\.mlp"),
        (["classifer"], "matches no parameter of LlamaForCausalLM"),
        (["model.layers.1."], r"model\.layers\.1"),
    ],
)
def test_a_pattern_that_matches_nothing_is_told_the_nearest_names(patterns: list[str], says: str) -> None:
    model = build_model("llama", "lm")
    freeze(model)
    with pytest.raises(TuningError, match=says):
        unfreeze(model, patterns)
    assert not moving(model)


def test_the_second_name_of_a_tied_weight_is_not_enough() -> None:
    model = build_model("gpt2", "lm")
    with pytest.raises(TuningError, match=r"the same weight as transformer\.wte\.weight"):
        unfreeze(model, ["lm_head"])
    freeze(model)
    assert unfreeze(model, ["transformer.wte"]) == ["transformer.wte.weight"]
    assert len(unfreeze(model, ["*"])) == len(list(model.parameters()))


def test_what_no_folder_holds_is_not_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sinusoidal positions, which transformers computes as it loads a Marian model."""
    model = make_tiny_model(tiny_config("marian"), ModelTask.TEXT_TO_TEXT).requires_grad_()
    positions = named(model, "*.embed_positions.weight")
    assert positions and moving(model) >= positions
    FullFinetuning(model)
    assert moving(model) == named(model, "*") - positions
    monkeypatch.setattr(weight_subsets, "unsaved_names", lambda model: set())
    FullFinetuning(model)
    assert moving(model) >= positions, "the mutant: every parameter"
