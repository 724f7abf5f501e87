"""The verb `probe`: features of the real rows, one look at the test, and every mistake told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel
from typer.testing import CliRunner

from postgrad.cli.main import app
from postgrad.cli.render import probe_text
from postgrad.commands.probe import LayerProbe, probe_layers
from postgrad.errors import DataError, ModelError, StageError
from postgrad.evaluation import linear_probe
from postgrad.evaluation import linear_probe as probing
from postgrad.stats import bootstrap
from tests.tiny_stages import QUICK_EVALUATION, Workspace, bert_tokenizer, make_workspace, write_rows

SPANS = ["O", "B-sum", "I-sum"]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "DRAWS", 200)
        patch.setattr(
            linear_probe.train_probes,
            "__kwdefaults__",
            {**(linear_probe.train_probes.__kwdefaults__ or {}), "steps": 60},
        )
        yield make_workspace(tmp_path_factory.mktemp("shelf"), tmp_path_factory.getbasetemp() / "cache")


def found_by(shelf: Workspace, model: str, file: str, **options: Any) -> LayerProbe:
    files = [shelf.file(file), shelf.file(file, held_out=True)]
    return probe_layers(str(shelf.folder / model), *files, cache=shelf.cache, **options)


@pytest.mark.parametrize(
    ("model", "file", "metric"),
    [
        ("bert", "labelled", "accuracy"),
        ("bert", "tagged", "accuracy"),
        ("bert", "multi", "F1"),
        ("llama", "numbered", "MSE"),
        ("llama", "labelled", "accuracy"),
        ("t5", "tagged", "accuracy"),
        ("t5", "paired", "accuracy"),
    ],
)
def test_every_layer_is_probed(shelf: Workspace, model: str, file: str, metric: str) -> None:
    found = found_by(shelf, model, file)
    names = ["embeddings", "layer 1", "layer 2", "sum of last 2", "concat of last 2", "mix of all"]
    assert [view.name for view in found.views] == names
    assert (found.layers, found.metric) == (2, metric)
    text = probe_text(found, None)
    for view in found.views:
        entry = view.metrics[metric]
        assert entry.low <= entry.value <= entry.high
        assert bool(view.against_last) == (view.name != "layer 2")
        assert f"{entry.value:.3f}" in text and view.name in text
    assert found.documents["test"] == 24 and found.documents["train"] + found.documents["dev"] <= 60
    assert "in a stage: objectives: [{kind: classify, layers: " in text
    assert text.splitlines()[-1].startswith("next: postgrad probe ")
    json.dumps(found.as_dict())  # plain data


def test_texts_of_two_kinds_are_told_apart_far_better_than_by_guessing(shelf: Workspace) -> None:
    found = found_by(shelf, "bert", "labelled", pooling="mean")
    assert found.views[2].metrics["accuracy"].value > 0.9 > found.guess["accuracy"].value


def test_features_are_the_hidden_states_of_the_rows(shelf: Workspace, tmp_path: Path) -> None:
    files = [shelf.file("labelled"), shelf.file("labelled", held_out=True)]
    probe_layers(str(shelf.folder / "bert"), *files, cache=tmp_path, pooling="mean")
    kept = sorted((tmp_path / "features").iterdir())
    assert len(kept) == 3
    sizes = {np.load(path / "features.npy").shape[1]: path / "features.npy" for path in kept}
    features = np.load(sizes[24])
    model, tokenizer = AutoModel.from_pretrained(shelf.folder / "bert"), bert_tokenizer()
    wanted = []
    for line in Path(shelf.file("labelled", held_out=True)).read_text().splitlines():
        with torch.no_grad():
            states = model(**tokenizer(json.loads(line)["text"], return_tensors="pt"), output_hidden_states=True)
        wanted.append(torch.stack(states.hidden_states)[:, 0].mean(1).numpy())
    here = features[2][np.lexsort(features[2].T)]
    there = np.stack(wanted)[:, 2]
    np.testing.assert_allclose(here, there[np.lexsort(there.T)], atol=1e-5)


def test_a_second_look_computes_no_features(shelf: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    first = found_by(shelf, "bert", "tagged")
    from postgrad.commands import probe as stage_probe

    def never(*_: Any, **__: Any) -> Any:
        return (lambda inputs: pytest.fail("the backbone was asked")), torch.device("cpu")

    monkeypatch.setattr(stage_probe, "_backbone", never)
    again = found_by(shelf, "bert", "tagged")
    assert again.views == first.views


def test_the_test_is_answered_once(shelf: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = probing._predict

    def counted(classifiers: Any, items: Any, problem: str) -> Any:
        asked.append(len(items))
        return real(classifiers, items, problem)

    monkeypatch.setattr(probing, "_predict", counted)
    found = found_by(shelf, "bert", "labelled")
    assert asked == [found.items["dev"], found.items["test"]]


def test_spans_are_scored_as_spans(shelf: Workspace) -> None:
    def tags_of(words: list[str]) -> list[str]:
        before = [False, *(word == "one" for word in words)]
        return [SPANS[0] if w in ("and", "yes") else SPANS[1 + begun] for w, begun in zip(words, before, strict=False)]

    def sentences(count: int, seed: int) -> list[dict[str, Any]]:
        rng = np.random.default_rng(seed)
        words = [[str(word) for word in rng.choice(["one", "two", "and", "yes"], 6)] for _ in range(count)]
        return [{"tokens": each, "tags": tags_of(each)} for each in words]

    files = [str(write_rows(shelf.folder / f"spans-{seed}.jsonl", sentences(80, seed))) for seed in range(3)]
    found = probe_layers(str(shelf.folder / "bert"), files[0], files[1], dev=files[2], cache=shelf.cache)
    assert found.metric == "span F1"
    assert set(found.views[0].metrics) == {"span F1", "span precision", "span recall", "accuracy", "macro F1", "MCC"}
    assert found.views[1].metrics["span F1"].value > found.guess["span F1"].value == 0


def test_copies_of_the_test_are_not_learnt_from(shelf: Workspace) -> None:
    both = Path(shelf.file("labelled")).read_text() + Path(shelf.file("labelled", held_out=True)).read_text()
    (shelf.folder / "leaking.jsonl").write_text(both)
    found = probe_layers(
        str(shelf.folder / "bert"),
        str(shelf.folder / "leaking.jsonl"),
        shelf.file("labelled", held_out=True),
        cache=shelf.cache,
    )
    assert any(note.startswith("train: 24 documents are skipped") for note in found.notes)
    assert sum(found.documents[part] for part in ("train", "dev")) <= 60


def test_words_that_no_row_has_room_for_are_counted(shelf: Workspace) -> None:
    found = found_by(shelf, "bert", "tagged", context=8)
    assert any("words lie beyond 8 tokens and are skipped" in note for note in found.notes)


def test_a_run_is_probed_with_what_stands_in_it(shelf: Workspace) -> None:
    raw = shelf.stage(
        "adapted",
        {"kind": "adapter"},
        model="bert",
        objectives=[{"kind": "masked"}],
        tokens=200,
        evaluation={**QUICK_EVALUATION, "learned": [shelf.file("new", held_out=True)]},
        sources=[shelf.source("new")],
    )
    run = shelf.run(raw).run_folder
    base, adapted = (
        probe_layers(str(m), shelf.file("labelled"), shelf.file("labelled", held_out=True), cache=shelf.cache)
        for m in (shelf.folder / "bert", run)
    )
    assert base.views[0].metrics == adapted.views[0].metrics  # nothing stands in the embeddings
    assert base.views[2].dev >= 0 and adapted.layers == 2


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_either_half_of_an_encoder_decoder(shelf: Workspace, stack: str) -> None:
    found = found_by(shelf, "t5", "labelled", stack=stack)
    assert (found.stack, found.pooling) == (stack, "mean" if stack == "encoder" else "last")


def test_a_label_that_was_never_seen_is_told_with_its_place(shelf: Workspace) -> None:
    other = write_rows(
        shelf.folder / "unseen.jsonl", [{"text": "one and two.", "label": "words"}, {"text": "x", "label": "verse"}]
    )
    with pytest.raises(DataError, match=r"unseen.jsonl:2: the label 'verse' is none of the 2 known ones"):
        probe_layers(str(shelf.folder / "bert"), shelf.file("labelled"), str(other), cache=shelf.cache)
    tags = write_rows(shelf.folder / "unseen-tags.jsonl", [{"tokens": ["one"], "tags": ["verb"]}])
    with pytest.raises(DataError, match=r"unseen-tags.jsonl:1: the label 'verb'"):
        probe_layers(str(shelf.folder / "bert"), shelf.file("tagged"), str(tags), cache=shelf.cache)


@pytest.mark.parametrize(
    ("model", "file", "options", "message"),
    [
        ("bert", "tagged", {"pooling": "mean"}, "--pooling: tags are predicted word by word"),
        ("bert", "labelled", {"pooling": "sum"}, "--pooling: there is no pooling 'sum'"),
        ("bert", "labelled", {"stack": "encoder"}, "--stack: a bert model has a single stack"),
        ("bert", "labelled", {"kind": "text"}, "--kind: there is no kind 'text'"),
        ("llama", "labelled", {"pooling": "first"}, "--pooling: the first token of a decoder"),
        ("bert", "labelled", {"context": 9999}, "--context: a context of 9999 does not fit"),
    ],
)
def test_what_has_no_meaning_is_told(shelf: Workspace, model: str, file: str, options: Any, message: str) -> None:
    with pytest.raises((StageError, ModelError), match=message):
        found_by(shelf, model, file, **options)


def test_the_command_line(shelf: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRAD_CACHE", str(shelf.cache))
    files = [shelf.file("labelled"), shelf.file("labelled", held_out=True)]
    page = tmp_path / "layers.html"
    done = CliRunner().invoke(app, ["probe", str(shelf.folder / "bert"), *files, "--report", str(page), "--json"])
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)["views"]) == 6
    text = page.read_text()
    assert "accuracy by layer" in text and "concat of last 2" in text and "<script" not in text
