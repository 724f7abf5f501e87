"""A stage's choice of layers, pooling and head: what it comes to, what has no meaning, and that all else stays as it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

import postgrad
from postgrad.check.check import check_stage
from postgrad.cli.render import export_text
from postgrad.commands.evaluate import evaluate
from postgrad.commands.export import export_model
from postgrad.config.objectives import ClassifyObjective
from postgrad.data.loading.batch import collate
from postgrad.distributed.world import World
from postgrad.errors import DataError, ModelError, StageError
from postgrad.evaluation.before_after import read_scores
from postgrad.lineage.record import SetScore
from postgrad.models.location import locate_model
from postgrad.models.task import Task
from postgrad.models.task_head import TaskHeadConfig, load_task_head_config
from postgrad.objectives.classification_loss import ClassificationLoss
from postgrad.plan.task_layer import resolve_representation
from postgrad.run.tuned_model import make_tuned_model
from postgrad.stats import bootstrap
from tests.tiny_stages import (
    LENGTH,
    QUICK_EVALUATION,
    Workspace,
    make_workspace,
    run_interrupted,
    run_trace,
    write_rows,
)

LABELLED = {"kind": "labelled"}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "DRAWS", 200)
        yield make_workspace(tmp_path_factory.mktemp("shelf"), tmp_path_factory.getbasetemp() / "cache")


def stage_of(
    shelf: Workspace, name: str, file: str, tuning: dict[str, Any] | None = None, **said: Any
) -> dict[str, Any]:
    """A classifier on rows of a file; `said` are the keys of its objective, and `model` and `start`."""
    model = said.pop("model", "bert")
    tokens = 170 if file == "tagged" else 24
    return shelf.stage(
        name,
        tuning,
        model=model,
        sources=[shelf.source(file, None if file == "tagged" else "labelled")],
        objectives=[{"kind": "classify", **said}],
        tokens=tokens,
        evaluation={**QUICK_EVALUATION, "learned": [shelf.file(file, held_out=True)]},
    )


def form_of(shelf: Workspace, model: str, task: Any, **said: Any) -> TaskHeadConfig | None:
    spec = ClassifyObjective.model_validate({"kind": "classify", **said})
    return resolve_representation([spec], locate_model(model, shelf.folder), Task(task))


# -- what a choice comes to ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "task", "said"),
    [
        ("bert", "classify", {}),
        ("bert", "classify", {"layers": "last", "pooling": "first"}),
        ("bert", "tag", {"head": "linear", "layers": -1}),
        ("bert", "tag", {"layers": 2}),
        ("llama", "classify", {"pooling": "last", "head": "linear"}),
        ("llama", "tag", {"layers": [2]}),
        ("t5", "classify", {}),
        ("t5", "classify", {"stack": "decoder"}),
        ("t5", "tag", {"stack": "encoder"}),
    ],
)
def test_what_transformers_has_is_left_to_transformers(shelf: Workspace, model: str, task: str, said: Any) -> None:
    assert form_of(shelf, model, task, **said) is None


WIDE = {"width": 768, "depth": 2}
SMALL = {"kind": "bilstm", "width": 9, "depth": 1}


@pytest.mark.parametrize(
    ("model", "task", "said", "form"),
    [
        ("bert", "classify", {"pooling": "mean"}, TaskHeadConfig((2,), pooling="mean")),
        ("bert", "classify", {"head": "linear"}, TaskHeadConfig((2,), pooling="first")),
        ("bert", "tag", {"layers": "embeddings"}, TaskHeadConfig((0,))),
        ("bert", "tag", {"layers": -2}, TaskHeadConfig((1,))),
        ("bert", "tag", {"layers": [0, -1]}, TaskHeadConfig((0, 2))),
        ("bert", "tag", {"layers": "mix"}, TaskHeadConfig((0, 1, 2), "mix")),
        ("bert", "tag", {"layers": {"mix": [1, 2]}}, TaskHeadConfig((1, 2), "mix")),
        ("bert", "tag", {"layers": {"concat": 2}}, TaskHeadConfig((1, 2))),
        ("bert", "tag", {"layers": {"sum": 2}}, TaskHeadConfig((1, 2), "sum")),
        ("bert", "tag", {"head": "bilstm"}, TaskHeadConfig((2,), head="bilstm", **WIDE)),
        ("bert", "classify", {"head": "bilstm"}, TaskHeadConfig((2,), pooling="max", head="bilstm", **WIDE)),
        ("bert", "tag", {"head": SMALL}, TaskHeadConfig((2,), head="bilstm", width=9, depth=1)),
        ("bert", "tag", {"head": "mlp", "layers": {"concat": 2}}, TaskHeadConfig((1, 2), "concat", None, "mlp", 64, 1)),
        ("llama", "classify", {"layers": 1}, TaskHeadConfig((1,), pooling="last")),
        ("t5", "classify", {"stack": "encoder"}, TaskHeadConfig((2,), pooling="mean", stack="encoder")),
        ("t5", "classify", {"layers": {"sum": 1}, "head": "mlp"},
         TaskHeadConfig((2,), "sum", "mean", "mlp", 32, 1, stack="encoder")),
        ("t5", "classify", {"layers": 1, "stack": "decoder"}, TaskHeadConfig((1,), pooling="last", stack="decoder")),
        ("t5", "tag", {"layers": 1}, TaskHeadConfig((1,), stack="encoder")),
    ],
)  # fmt: skip
def test_a_choice_is_made_in_every_part(
    shelf: Workspace, model: str, task: str, said: Any, form: TaskHeadConfig
) -> None:
    found = form_of(shelf, model, task, **said)
    assert found == TaskHeadConfig(**{**form.__dict__, "dropout": 0.0 if model != "llama" else 0.1})


def test_dropout_is_what_is_said(shelf: Workspace) -> None:
    found = form_of(shelf, "bert", "tag", head={"kind": "linear", "dropout": 0.25})
    assert found is not None and found.dropout == 0.25


@pytest.mark.parametrize(
    ("model", "file", "said", "message"),
    [
        ("bert", "labelled", {"layers": 3}, r"objectives.layers: layer 3 does not exist\n  expected: 0 .* to 2, or -1 to -3"),
        ("bert", "labelled", {"layers": -4}, "objectives.layers: layer -4 does not exist"),
        ("bert", "labelled", {"layers": [1, 9]}, "objectives.layers: layer 9"),
        ("bert", "labelled", {"layers": [1, -2]}, "a layer is named twice"),
        ("bert", "labelled", {"layers": {"sum": 4}}, "objectives.layers.sum: the model has fewer than 4 layers"),
        ("bert", "labelled", {"layers": {"concat": [3]}}, "objectives.layers.concat: layer 3"),
        ("bert", "tagged", {"pooling": "mean"}, "objectives.pooling: tags are predicted word by word"),
        ("bert", "labelled", {"stack": "encoder"}, "objectives.stack: a bert model has a single stack"),
        ("llama", "labelled", {"pooling": "first"}, "objectives.pooling: the first token of a decoder attends only to itself"),
        ("llama", "labelled", {"head": "bilstm"}, r"objectives.head: a BiLSTM over a decoder is pointless"),
        ("t5", "labelled", {"stack": "decoder", "pooling": "first"}, "the first token of a decoder"),
    ],
)  # fmt: skip
def test_a_choice_without_meaning_is_told(shelf: Workspace, model: str, file: str, said: Any, message: str) -> None:
    with pytest.raises(StageError, match=message):
        shelf.plan(stage_of(shelf, "wrong", file, model=model, **said))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"layers": "lust"}, "objectives\\[0\\].layers: .*'auto', 'last', 'embeddings' or 'mix', not 'lust'"),
        ({"layers": {"sum": 2, "mix": 2}}, "layers are combined in exactly one way"),
        ({"layers": {"average": 2}}, "there is no key 'average'"),
        ({"head": "transformer"}, "objectives\\[0\\].head"),
        ({"head": {"kind": "linear", "width": 3}}, "a head of the kind `linear` has no `width`"),
        ({"head": {"dropout": 0.5}}, "a head of the kind `auto` has no `dropout`"),
    ],
)
def test_a_choice_that_cannot_be_read_is_told(shelf: Workspace, said: Any, message: str) -> None:
    with pytest.raises(StageError, match=message):
        shelf.plan(stage_of(shelf, "wrong", "labelled", **said))


def test_two_classifiers_of_a_stage_have_one_task_layer(shelf: Workspace) -> None:
    raw = stage_of(shelf, "two", "labelled")
    raw["objectives"] = [
        {"kind": "classify", "on": ["labelled"]},
        {"kind": "classify", "on": ["again"], "layers": 1},
    ]
    raw["data"]["sources"] = [
        {**raw["data"]["sources"][0], "share": 0.5},
        {**raw["data"]["sources"][0], "name": "again", "share": 0.5},
    ]
    with pytest.raises(StageError, match="two `classify` objectives differ in `layers`"):
        shelf.plan(raw)


# -- what stays as it is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "model", "said"),
    [
        ("tagged", "bert", {"layers": "last", "head": "linear"}),
        ("labelled", "bert", {"layers": -1, "pooling": "first"}),
        ("labelled", "llama", {"layers": 2, "pooling": "last", "head": "linear"}),
    ],
)
def test_the_standard_choice_said_in_words_gives_the_same_bits(
    shelf: Workspace, file: str, model: str, said: Any
) -> None:
    unsaid = shelf.run(stage_of(shelf, f"unsaid-{model}-{file}", file, model=model)).run_folder
    in_words = shelf.run(stage_of(shelf, f"said-{model}-{file}", file, model=model, **said)).run_folder
    assert run_trace(unsaid) == run_trace(in_words)
    auto = AutoModelForTokenClassification if file == "tagged" else AutoModelForSequenceClassification
    _, loading = auto.from_pretrained(in_words / "model", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert load_task_head_config(in_words / "model") is None


# -- runs ------------------------------------------------------------------------------------------------------------------

RUNS: dict[str, tuple[str, dict[str, Any] | None, dict[str, Any]]] = {
    "bilstm on frozen layers": (
        "tagged",
        {"kind": "head"},
        {"layers": {"concat": 2}, "head": {"kind": "bilstm", "width": 8, "dropout": 0.1}},
    ),
    "mix with rates by layer": ("labelled", {"kind": "full", "layer_decay": 0.8}, {"layers": "mix", "pooling": "mean"}),
    "several classes with lora": ("multi", {"kind": "lora", "rank": 2}, {"layers": [0, -1], "head": "mlp"}),
    "a number from a decoder": ("numbered", None, {"model": "llama", "pooling": "mean"}),
    "an encoder with adapters": ("labelled", {"kind": "adapter"}, {"model": "t5", "stack": "encoder"}),
    "a decoder behind an encoder": ("labelled", {"kind": "bias"}, {"model": "t5", "stack": "decoder", "layers": 1}),
    "tags with a prefix": ("tagged", {"kind": "prefix", "length": 3}, {"model": "t5", "layers": -2}),
    "the block of a decoder": ("tagged", {"kind": "blocks", "last": 1}, {"model": "llama", "layers": {"mix": [0, 1]}}),
    "two texts": ("paired", {"kind": "head"}, {"pooling": "max"}),
}
RUNS["a decoder behind an encoder"] = ("labelled", {"kind": "norm"}, {"model": "t5", "stack": "decoder", "layers": 1})


def texts_of(file: str) -> list[Any]:
    """What `predict` is given of a file's rows."""
    made = [json.loads(line) for line in Path(file).read_text().splitlines()]
    return [
        row.get("tokens") or row.get("text") or (row["sentence1"], row["sentence2"])  # as the rows say it
        for row in made
    ]


@pytest.mark.parametrize("name", RUNS)
def test_what_is_trained_is_published_scored_and_loaded_alike(shelf: Workspace, name: str, tmp_path: Path) -> None:
    file, tuning, said = RUNS[name]
    done = shelf.run(stage_of(shelf, name.replace(" ", "-"), file, tuning, **dict(said)))
    held_out = shelf.file(file, held_out=True)
    assert 0 != done.record.changes[f"{file}-heldout"].difference < 0.1  # six steps
    outside = evaluate(str(done.run_folder), [held_out], context=LENGTH, cache=tmp_path / "scores")
    after = {name: SetScore.model_validate(score.as_dict()) for name, score in outside.sets.items()}
    assert after == done.record.scores.after
    classifier, texts = postgrad.load_classifier(str(done.run_folder)), texts_of(held_out)
    answers, kept = classifier.predict(texts), read_scores(done.run_folder / "scores" / "after.npz")[f"{file}-heldout"]
    assert sorted(_flat(answers, classifier.labels, classifier.problem)) == pytest.approx(
        sorted(kept.predictions_I.tolist()), abs=1e-5
    )
    if not tuning or tuning["kind"] not in ("adapter", "prefix"):  # which have a non-linear effect
        found = export_model(str(done.run_folder), tmp_path / "plain", "auto")
        assert "postgrad.load_classifier reads the same logits" in export_text(found)
        for here, there in zip(
            classifier.logits(texts), postgrad.load_classifier(str(tmp_path / "plain")).logits(texts), strict=True
        ):
            np.testing.assert_allclose(here, there, atol=1e-5)  # low-rank updates are added up in another order


def _flat(answers: list[Any], labels: tuple[str, ...], problem: str) -> list[float]:
    """Answers as the numbers that scores keep."""
    match problem:
        case "number":
            return answers
        case "multi":
            return [float(label in answer) for answer in answers for label in labels]
        case "tags":
            return [labels.index(tag) for answer in answers for tag in answer]
    return [labels.index(answer) for answer in answers]


@pytest.mark.parametrize("name", ["bilstm on frozen layers", "mix with rates by layer", "several classes with lora"])
def test_a_run_in_parts_ends_with_the_same_bits(shelf: Workspace, name: str) -> None:
    file, tuning, said = RUNS[name]
    whole = shelf.run(stage_of(shelf, name.replace(" ", "-"), file, tuning, **dict(said)))
    parts = run_interrupted(shelf, stage_of(shelf, f"{name.replace(' ', '-')}-parts", file, tuning, **dict(said)))
    assert run_trace(parts.run_folder) == run_trace(whole.run_folder)


def test_the_plan_says_what_is_read(shelf: Workspace) -> None:
    plan = shelf.plan(stage_of(shelf, "told", "tagged", {"kind": "head"}, layers={"concat": 2}, head=SMALL))
    said = (
        "task layer: reads layers 1, 2 concatenated, at each word's first token, with a head of the kind bilstm (1 x 9)"
    )
    assert said in check_stage(plan, cache=shelf.cache)["text"]
    usual = shelf.plan(stage_of(shelf, "told-not", "tagged", {"kind": "head"}))
    assert "task layer: reads" not in check_stage(usual, cache=shelf.cache)["text"]


def test_training_a_head_moves_nothing_else_and_saves_the_mix(shelf: Workspace) -> None:
    raw = stage_of(shelf, "head-mix", "labelled", {"kind": "head"}, layers="mix", pooling="mean")
    plan = shelf.plan(raw)
    subject = make_tuned_model(plan, World(torch.device("cpu")))
    moving = {name for name, p in subject.model.pretrained.named_parameters() if p.requires_grad}
    assert moving == {f"task_layer.{part}" for part in ("mix", "gamma", "out.weight", "out.bias")}


def test_rates_fall_from_the_task_layer_down(shelf: Workspace) -> None:
    plan = shelf.plan(stage_of(shelf, "rates", "labelled", {"kind": "full", "layer_decay": 0.5}, pooling="mean"))
    tuning = make_tuned_model(plan, World(torch.device("cpu"))).tuning
    factors = [
        tuning.rate_factor(name)
        for name in (
            "task_layer.out.weight",
            "bert.encoder.layer.1.output.dense.weight",
            "bert.encoder.layer.0.output.dense.weight",
            "bert.embeddings.word_embeddings.weight",
        )
    ]
    assert factors == [1.0, 0.5, 0.25, 0.125]


def test_the_objective_weighs_our_logits_as_the_model_itself_does(shelf: Workspace) -> None:
    """One loss, whoever computes it: ours as a sum, transformers' as a mean."""
    for file, problem in (("labelled", "class"), ("multi", "multi"), ("numbered", "number"), ("tagged", "tags")):
        plan = shelf.plan(stage_of(shelf, f"loss-{file}", file, layers=1))
        model = make_tuned_model(plan, World(torch.device("cpu"))).model.eval()
        batch = collate(
            [plan.data.rows[0].get_row(i, i) for i in range(6)], [0] * 6, pad_token_id=plan.model.inputs.pad_id
        )
        summed, _ = ClassificationLoss(problem)(model(**batch.inputs), batch)  # type: ignore[arg-type]
        mean = model.pretrained(**batch.inputs, labels=batch.labels).loss
        torch.testing.assert_close(summed / batch.label_count, mean)


def test_a_later_stage_goes_on_with_the_task_layer_it_finds(shelf: Workspace) -> None:
    file, tuning, said = RUNS["mix with rates by layer"]
    first = shelf.run(stage_of(shelf, "mix-with-rates-by-layer", file, tuning, **dict(said))).run_folder
    second = shelf.run(stage_of(shelf, "goes-on", file, {"kind": "lora", "rank": 1}, model=str(first)))
    sets = [json.loads((place / "record.json").read_text())["scores"] for place in (first, second.run_folder)]
    assert sets[1]["before"] == sets[0]["after"]
    third = stage_of(shelf, "goes-on-again", file, model=str(second.run_folder))
    form = load_task_head_config(first / "model")
    assert form is not None and shelf.plan(third).model.task_layer.form == form  # type: ignore[union-attr]
    other = shelf.plan(stage_of(shelf, "anew", file, model=str(first), layers="last", pooling="max")).model.task_layer
    assert other is not None and other.form == TaskHeadConfig((2,), pooling="max")


def test_a_task_layer_of_ours_where_transformers_has_none(shelf: Workspace, tmp_path: Path) -> None:
    """There is no BartForTokenClassification."""
    from tests.tiny_stages import save_model, t5_tokenizer
    from tests.tuning import families

    tokenizer = t5_tokenizer()
    lm = families.build_model("bart", "lm")
    lm.resize_token_embeddings(len(tokenizer))
    save_model(lm, tokenizer, tmp_path / "bart")
    form = resolve_representation(
        [ClassifyObjective(kind="classify")], locate_model(str(tmp_path / "bart"), tmp_path), Task.TAG
    )
    assert form == TaskHeadConfig((2,), stack="encoder")
    done = shelf.run(stage_of(shelf, "bart-tags", "tagged", model=str(tmp_path / "bart")))
    assert done.record.changes["tagged-heldout"].difference < 0


# -- new texts -------------------------------------------------------------------------------------------------------------


def test_texts_that_are_too_long_are_read_as_rows_are(shelf: Workspace) -> None:
    long = [
        {"text": "one and two plus three. " * 40, "label": "words"},
        {"text": "x1 = y2 * 3; " * 40, "label": "sums"},
    ]
    file = write_rows(shelf.folder / "long.jsonl", long)
    run = str(
        shelf.run(
            stage_of(
                shelf,
                "mix-with-rates-by-layer",
                *RUNS["mix with rates by layer"][:2],
                **RUNS["mix with rates by layer"][2],
            )
        ).run_folder
    )
    scored = evaluate(run, [str(file)], context=64, cache=shelf.cache)
    classifier = postgrad.load_classifier(run)
    said = classifier.predict([row["text"] for row in long])
    right = np.mean([answer == row["label"] for answer, row in zip(said, long, strict=True)])
    assert scored.sets["long"].metrics["accuracy"].value == right
    assert len(classifier._make_row(long[0]["text"], 0).inputs["input_ids"]) == 64
    assert classifier.predict([""])[0] in ("words", "sums")


def test_a_word_without_a_token_has_no_tag(shelf: Workspace) -> None:
    file, tuning, said = RUNS["bilstm on frozen layers"]
    run = shelf.run(stage_of(shelf, "bilstm-on-frozen-layers", file, tuning, **dict(said))).run_folder
    answers = postgrad.load_classifier(str(run)).predict([["one", " ", "two"], ["six"] * 100])
    assert [tag is None for tag in answers[0]] == [False, True, False]
    assert [tag is None for tag in answers[1]] == [False] * 62 + [True] * 38


def test_what_cannot_be_classified_is_told(shelf: Workspace) -> None:
    with pytest.raises(ModelError, match="is not a classifier"):
        postgrad.load_classifier(str(shelf.folder / "llama"))
    file, tuning, said = RUNS["bilstm on frozen layers"]
    run = shelf.run(stage_of(shelf, "bilstm-on-frozen-layers", file, tuning, **dict(said))).run_folder
    tagger = postgrad.load_classifier(str(run))
    with pytest.raises(DataError, match=r"texts\[1\]: a text that is not split into words"):
        tagger.predict([["one"], "two"])
    with pytest.raises(DataError, match="a single text"):
        tagger.predict("one")
    other = postgrad.load_classifier(
        str(
            shelf.run(
                stage_of(
                    shelf,
                    "mix-with-rates-by-layer",
                    *RUNS["mix with rates by layer"][:2],
                    **RUNS["mix with rates by layer"][2],
                )
            ).run_folder
        )
    )
    with pytest.raises(DataError, match="expected: a text, or two"):
        other.predict([("a", "b", "c")])
