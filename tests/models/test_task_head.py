"""What a task layer reads: as transformers' own classifiers where they have one, and else what the formulas say."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from postgrad.errors import ModelError
from postgrad.models.location import ModelLocation
from postgrad.models.pretrained import ClassifierSpec, LoadResult, detect_task, load_pretrained
from postgrad.models.task import Task
from postgrad.models.task_head import DESCRIPTION, TaskHead, TaskHeadConfig, load_task_head_config, pool_tokens
from postgrad.models.task_head_model import make_model_class
from tests.tuning import families

LAST = TaskHeadConfig((2,))
LABELS = ("a", "b", "c")


def made(family: str, form: TaskHeadConfig, seed: int = 0, **config: Any) -> Any:
    """A model of a family that reads as `form` says, on the weights that the family's language model has in the tests."""
    lm = families.build_model(family, "lm")
    own = copy.deepcopy(lm.config)
    for key, value in {"num_labels": 3, "problem_type": "single_label_classification", **config}.items():
        setattr(own, key, value)
    torch.manual_seed(seed)
    state = {name: t for name, t in lm.state_dict().items() if "lm_head" not in name}
    return make_model_class(own, form).from_pretrained(None, config=own, state_dict=state).eval()


def bare(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in inputs.items() if name in ("input_ids", "attention_mask")}


def padded_otherwise(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same rows with their padding on the other side."""
    rows = [row[mask.bool()] for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    length = inputs["input_ids"].shape[1]
    left = inputs["attention_mask"][:, 0].all()
    out = {name: torch.zeros_like(inputs[name]) for name in ("input_ids", "attention_mask")}
    for i, row in enumerate(rows):
        where = slice(length - len(row), None) if left else slice(None, len(row))
        out["input_ids"][i, where] = row
        out["attention_mask"][i, where] = 1
    return out


# -- transformers' own ---------------------------------------------------------------------------------------------------


def own_and_ours(name: str) -> tuple[PreTrainedModel, Any]:
    """Transformers' classifier, and ours of the same choices on the same weights."""
    family, task = name.split()
    kind: families.Task = "classify" if task == "classify" else "tags"
    own: Any = families.build_model(family, kind)
    stack = {"t5": "encoder" if kind == "tags" else "decoder", "bart": "decoder"}.get(family)
    forms = {
        "llama classify": replace(LAST, pooling="last"),
        "gpt2 classify": replace(LAST, pooling="last"),
        "bert classify": replace(LAST, pooling="first", head="mlp", width=32, depth=1),
        "roberta classify": replace(LAST, pooling="first", head="mlp", width=32, depth=1),
        "t5 classify": replace(LAST, pooling="last", head="mlp", width=32, depth=1),
        "bart classify": replace(LAST, pooling="last", head="mlp", width=32, depth=1),
    }
    form = replace(forms.get(name, LAST), stack=stack)
    config = copy.deepcopy(own.config)
    torch.manual_seed(0)
    ours = make_model_class(config, form)(config).eval()
    body = {k: v for k, v in own.base_model.state_dict().items() if not k.startswith("pooler.")}
    ours.body.load_state_dict(body)
    head = getattr(own, "score", None) or getattr(own, "classifier", None) or own.classification_head
    layer = ours.task_layer
    if isinstance(head, nn.Linear):
        out, dense = head, own.bert.pooler.dense if name == "bert classify" else None
    else:
        out, dense = head.out_proj, head.dense
    with torch.no_grad():
        layer.out.weight.copy_(out.weight)
        layer.out.bias.copy_(torch.zeros(3) if out.bias is None else out.bias)
        if dense is not None:
            layer.dense[0].load_state_dict(dense.state_dict())
    return own, ours


@pytest.mark.parametrize(
    "name",
    [
        *(f"{family} classify" for family in ("bert", "roberta", "llama", "gpt2", "t5", "bart")),
        *(f"{family} tags" for family in ("bert", "distilbert", "llama", "t5")),
    ],
)
def test_logits_and_loss_are_those_of_transformers_own_classifier(name: str) -> None:
    own, ours = own_and_ours(name)
    family, task = name.split()
    inputs = families.batch(family, "classify" if task == "classify" else "tags")
    theirs, mine = own(**inputs), ours(**inputs)
    real = inputs["attention_mask"].bool() if task == "tags" else slice(None)
    torch.testing.assert_close(mine.logits[real], theirs.logits[real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mine.loss, theirs.loss, atol=1e-5, rtol=1e-5)
    ours.task_layer.form = replace(ours.form, layers=(1,))  # the mutant: another layer
    assert not torch.allclose(ours(**inputs).logits[real], theirs.logits[real], atol=1e-2)


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_the_loss_of_several_classes_and_of_numbers_is_transformers_own(family: str, problem: str) -> None:
    own, ours = own_and_ours(f"{family} classify")
    inputs = families.batch(family, "classify")
    inputs["labels"] = torch.rand(3, 3).round() if problem.startswith("multi") else torch.randn(3, 3)
    own.config.problem_type = ours.config.problem_type = problem
    torch.testing.assert_close(ours(**inputs).loss, own(**inputs).loss, atol=1e-5, rtol=1e-5)


# -- layers ----------------------------------------------------------------------------------------------------------------


def test_layers_are_joined_as_the_formulas_say() -> None:
    torch.manual_seed(0)
    states, mask_BT = [torch.randn(2, 4, 8) for _ in range(3)], torch.ones(2, 4)
    mixed = TaskHead(TaskHeadConfig((0, 1, 2), "mix"), 8, 3)
    with torch.no_grad():
        mixed.mix.copy_(torch.tensor([0.5, -1.0, 2.0]))
        mixed.gamma.fill_(1.7)
    shares = [torch.e**0.5, torch.e**-1.0, torch.e**2.0]
    by_hand = 1.7 * sum(share * h for share, h in zip(shares, states, strict=True)) / sum(shares)
    torch.testing.assert_close(mixed.join_states(states), by_hand)
    torch.testing.assert_close(mixed(states, mask_BT), mixed.out(by_hand))
    assert not torch.allclose(mixed.join_states(states), by_hand / 1.7)  # the mutant: gamma left out

    summed = TaskHead(TaskHeadConfig((0, 2), "sum"), 8, 3)
    torch.testing.assert_close(summed.join_states(states), states[0] + states[2])
    beside = TaskHead(TaskHeadConfig((2, 0)), 8, 3)
    assert beside.join_states(states).tolist() == torch.cat([states[2], states[0]], -1).tolist()


def test_an_untrained_mix_is_the_mean_of_its_layers() -> None:
    model = made("bert", TaskHeadConfig((0, 1, 2), "mix"))
    states = model.states(**bare(families.batch("bert", "tags")))
    torch.testing.assert_close(model.task_layer.join_states(states), torch.stack(states).mean(0))


@pytest.mark.parametrize(
    "family", ["bert", "llama", "t5", "bart", "modernbert", "gpt2", "opt", "distilbert", "electra"]
)
def test_states_are_the_hidden_states_of_the_plain_backbone(family: str) -> None:
    seq2seq = families.ALL_FAMILIES[family].shape == "seq2seq"
    inputs = bare(families.batch(family, "tags"))
    # With padding on the left, plain backbones with learnt positions count it, and ours does not.
    inputs = inputs if inputs["attention_mask"][:, 0].all() else padded_otherwise(inputs)
    plain: Any = families.build_model(family, "lm").base_model
    if seq2seq:
        plain = plain.get_encoder()
    with torch.no_grad():
        theirs = plain(**inputs, output_hidden_states=True).hidden_states
        ours = made(family, replace(LAST, stack="encoder" if seq2seq else None)).states(**inputs)
    assert len(ours) == 3
    for mine, their in zip(ours, theirs, strict=True):
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(mine[real], their[real], atol=1e-5, rtol=1e-5)


# -- pooling and padding -----------------------------------------------------------------------------------------------


def test_pooling_reads_the_real_tokens_alone() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, 5, 4)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    real = [hidden[0, :3], hidden[1, 2:], hidden[2]]
    by_hand = {
        "mean": torch.stack([h.mean(0) for h in real]),
        "max": torch.stack([h.amax(0) for h in real]),
        "first": torch.stack([h[0] for h in real]),
        "last": torch.stack([h[-1] for h in real]),
    }
    mutants = {"mean": hidden.mean(1), "max": hidden.amax(1), "first": hidden[:, 0], "last": hidden[:, -1]}
    for how, wanted in by_hand.items():
        torch.testing.assert_close(pool_tokens(hidden, mask, how), wanted)  # type: ignore[arg-type]
        assert not torch.allclose(mutants[how], wanted)  # padding is read
        noisy = torch.where(mask.bool()[..., None], hidden, 1e4)
        torch.testing.assert_close(pool_tokens(noisy, mask, how), wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("pooling", ["first", "mean", "max", "last"])
@pytest.mark.parametrize("head", ["linear", "bilstm"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "t5 decoder"])
def test_padding_may_stand_on_either_side(family: str, head: Any, pooling: Any) -> None:
    family, _, half = family.partition(" ")
    stack: Any = (half or "encoder") if family == "t5" else None
    model = made(family, TaskHeadConfig((0, 1, 2), "mix", pooling, head, 6 if head == "bilstm" else 0, 2, 0.0, stack))
    inputs = bare(families.batch(family, "classify"))
    other = padded_otherwise(inputs)
    assert not torch.equal(inputs["input_ids"], other["input_ids"])
    here, there = (families.logits(model, i) for i in (inputs, other))
    torch.testing.assert_close(here, there, atol=1e-5, rtol=1e-5)
    rows = [families.logits(model, families.single_row(inputs, row)) for row in range(3)]
    torch.testing.assert_close(here, torch.cat(rows), atol=1e-5, rtol=1e-5)


def test_a_bilstm_reads_each_row_as_if_it_were_alone() -> None:
    torch.manual_seed(0)
    reader = TaskHead(TaskHeadConfig((0,), head="bilstm", width=5, depth=2), 4, 3).eval()
    hidden = torch.randn(2, 6, 4)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    found = reader([hidden], mask)
    by_hand = reader.out(reader.lstm(hidden[:1, :4])[0])
    torch.testing.assert_close(found[0, :4], by_hand[0])
    mutant = reader.out(reader.lstm(hidden)[0])  # padding is read backwards first
    assert not torch.allclose(mutant[0, :4], by_hand[0], atol=1e-3)


# -- folders -----------------------------------------------------------------------------------------------------------

FORMS: dict[str, tuple[str, TaskHeadConfig]] = {
    "bert bilstm tags": ("bert", TaskHeadConfig((1, 2), head="bilstm", width=6, depth=2, dropout=0.1)),
    "bert mix": ("bert", TaskHeadConfig((0, 1, 2), "mix", "mean")),
    "llama mlp": ("llama", TaskHeadConfig((1,), pooling="max", head="mlp", width=7, depth=2)),
    "t5 encoder": ("t5", TaskHeadConfig((1, 2), "sum", "mean", stack="encoder")),
    "t5 decoder": ("t5", TaskHeadConfig((2,), "sum", "last", stack="decoder")),
    "bart encoder": ("bart", TaskHeadConfig((2,), "sum", "mean", stack="encoder")),
}


def started(tmp_path: Path, family: str) -> ModelLocation:
    """The language model of a family in a folder."""
    folder = tmp_path / family
    if not folder.exists():
        families.build_model(family, "lm").save_pretrained(folder)
    return ModelLocation(family, folder)


def opened(
    start: ModelLocation, form: TaskHeadConfig | None, seed: int = 0, labels: tuple[str, ...] = LABELS
) -> LoadResult:
    task: Task = "tag" if form is not None and form.pooling is None else "classify"
    return load_pretrained(
        start, task, layer=ClassifierSpec(labels, "single_label_classification", families.PAD, seed, form)
    )


@pytest.mark.parametrize("name", FORMS)
def test_a_folder_gives_back_the_same_logits(name: str, tmp_path: Path) -> None:
    family, form = FORMS[name]
    loaded = opened(started(tmp_path, family), form)
    assert loaded.new_weights and all(key.startswith("task_layer.") for key in loaded.new_weights)
    folder = tmp_path / "saved"
    loaded.model.save_pretrained(folder)
    inputs = bare(families.batch(family, "classify"))
    back = load_pretrained(ModelLocation("saved", folder), detect_task(ModelLocation("saved", folder)))
    assert not back.new_weights and load_task_head_config(folder) == form
    assert torch.equal(families.logits(back.model, inputs), families.logits(loaded.model, inputs))
    assert [back.model.config.id2label[i] for i in range(3)] == list(LABELS)
    page = (folder / "README.md").read_text()
    assert 'postgrad.load_classifier("THIS FOLDER")' in page and "a, b, c" in page
    # Drawn anew, it would be another classifier.
    mutant = opened(started(tmp_path, family), form, seed=1)
    assert not torch.allclose(families.logits(mutant.model, inputs), families.logits(loaded.model, inputs), atol=1e-4)


def test_the_backbone_in_a_folder_is_one_that_plain_transformers_reads(tmp_path: Path) -> None:
    for family in ("llama", "t5"):
        form = FORMS["llama mlp" if family == "llama" else "t5 encoder"][1]
        model = opened(started(tmp_path, family), form).model
        model.save_pretrained(tmp_path / f"{family}-saved")
        config = AutoConfig.from_pretrained(tmp_path / f"{family}-saved")
        assert config.architectures == ["LlamaModel" if family == "llama" else "T5EncoderModel"]
        kind = AutoModel if family == "llama" else type(model.base_model)
        plain, loading = kind.from_pretrained(tmp_path / f"{family}-saved", output_loading_info=True)
        assert not loading["missing_keys"]
        inputs = bare(families.batch(family, "classify"))
        with torch.no_grad():
            hidden = plain(**inputs).last_hidden_state
            mine = model.states(**inputs)[-1]  # type: ignore[operator]
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(hidden[real], mine[real], atol=1e-5, rtol=1e-5)


def test_a_new_task_layer_is_drawn_from_its_seed_and_nothing_else(tmp_path: Path) -> None:
    start, form = started(tmp_path, "bert"), FORMS["bert bilstm tags"][1]
    torch.manual_seed(7)
    one = opened(start, form).model.state_dict()
    torch.manual_seed(8)
    before = torch.random.get_rng_state()
    two = opened(start, form).model.state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = opened(start, form, seed=1).model.state_dict()
    assert not torch.equal(one["task_layer.out.weight"], other["task_layer.out.weight"])
    assert not torch.equal(one["task_layer.lstm.weight_ih_l0"], other["task_layer.lstm.weight_ih_l0"])


def test_other_labels_or_another_choice_take_over_what_fits(tmp_path: Path) -> None:
    form = FORMS["bert bilstm tags"][1]
    first = opened(started(tmp_path, "bert"), form).model
    folder = tmp_path / "saved"
    first.save_pretrained(folder)
    more = opened(ModelLocation("saved", folder), form, 1, ("a", "b", "c", "d"))
    assert set(more.new_weights) == {"task_layer.out.weight", "task_layer.out.bias"}
    kept, before = more.model.state_dict(), first.state_dict()
    assert torch.equal(kept["task_layer.lstm.weight_ih_l0"], before["task_layer.lstm.weight_ih_l0"])
    # The same shapes, read from other layers: nothing of the old task layer means anything.
    other = opened(ModelLocation("saved", folder), replace(form, layers=(0, 1)), 1)
    assert not torch.equal(other.model.state_dict()["task_layer.out.weight"], before["task_layer.out.weight"])
    assert len(other.new_weights) == len([name for name in before if name.startswith("task_layer.")])
    # Transformers' own classifier stands on the same backbone.
    plain = opened(ModelLocation("saved", folder), None, 1)
    assert type(plain.model).__name__ == "BertForSequenceClassification"


def test_the_decoder_of_an_encoder_decoder_is_no_part_of_its_encoder(tmp_path: Path) -> None:
    for family in ("t5", "bart"):
        model = opened(started(tmp_path, family), replace(FORMS["t5 encoder"][1], layers=(2,))).model
        assert not any("decoder" in name for name in model.state_dict())
        assert not model.config.is_encoder_decoder


@pytest.mark.parametrize("broken", ["{", '{"format": 9}', '{"format": 1, "reads": {"lairs": 3}}'])
def test_a_description_that_cannot_be_read_is_told(broken: str, tmp_path: Path) -> None:
    (tmp_path / DESCRIPTION).write_text(broken)
    with pytest.raises(ModelError, match=r"task_layer\.json: [\s\S]*a task_layer\.json of format 1"):
        load_task_head_config(tmp_path)


def test_a_frozen_backbone_has_no_dropout_and_a_moving_one_has() -> None:
    model = made("bert", replace(LAST, pooling="mean"), hidden_dropout_prob=0.5)
    inputs = bare(families.batch("bert", "classify"))
    model.body.requires_grad_(False)
    model.train()
    assert model.task_layer.training
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)
    model.body.requires_grad_(True)
    model.train()
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)
