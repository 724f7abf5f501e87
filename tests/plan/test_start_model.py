"""Stages that begin with random weights: every task, the same bits when the cache was cleared, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from postgrad.commands.lineage import trace_lineage
from postgrad.data.tokens.held_out_split import held_out_mask
from postgrad.data.tokens.train_vocabulary import _digests_and_sizes
from postgrad.errors import DataError, ModelError, PostgradError, StageError, TuningError
from postgrad.plan import start_model
from postgrad.run.events import CheckpointSaved, StepCompleted
from postgrad.run.run import run_stage
from tests.tiny_stages import Workspace, make_workspace, run_trace

LLAMA = {"from_scratch": "llama-100k", "tokenizer": {"vocab_size": 400}}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Models, texts and rows, with a cache of their own."""
    return make_workspace(tmp_path_factory.mktemp("shelf"), tmp_path_factory.mktemp("cache"))


def begun(shelf: Workspace, name: str, model: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A stage on a new model."""
    return {**shelf.stage(name, **changes), "model": model}


TASKS: dict[str, tuple[str, dict[str, Any], str]] = {
    "causal": ("llama-100k", {}, "LlamaForCausalLM"),
    "gpt2": ("gpt2-120k", {}, "GPT2LMHeadModel"),
    "masked": ("bert-150k", {}, "BertForMaskedLM"),
    "spans": ("t5-150k", {}, "T5ForConditionalGeneration"),
    "classes": ("bert-150k", {"kind": "labelled", "objectives": [{"kind": "classify"}]}, "BertForSequenceClassification"),
    "decoder-classes": (
        "llama-100k", {"kind": "labelled", "objectives": [{"kind": "classify"}]}, "LlamaForSequenceClassification",
    ),
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_a_new_model_is_trained_from_a_uniform_guess(task: str, shelf: Workspace) -> None:
    name, asked, architecture = TASKS[task]
    changes = dict(asked)
    kind = changes.pop("kind", None)
    if kind:
        changes |= {
            "sources": [shelf.source("labelled", kind)],
            "evaluation": {"learned": [shelf.file("labelled", held_out=True)], "samples": 0},
            "tokens": 240,
            "schedule": {"kind": "constant", "peak": 3e-3},
        }
    raw = begun(shelf, task, {"from_scratch": name, "tokenizer": {"vocab_size": 400}}, **changes)
    record = shelf.run(raw).record
    before, after = record.scores.before, record.scores.after
    choices = 2 if kind else record.model.vocab_size
    for held_out in before:
        assert before[held_out].nats == pytest.approx(math.log(choices), abs=0.25), held_out
    learned = "labelled-heldout" if kind else "new-heldout"
    assert after[learned].nats < before[learned].nats - 0.05
    assert record.model.start_model == name
    made = record.model.new_model
    assert made.requested["from_scratch"] == name and made.config["model_type"] == name.split("-")[0]
    assert made.weights == pytest.approx(float(name.split("-")[1][:-1]) * 1000, rel=0.05)
    home = Path(raw["output"])
    assert json.loads((home / "model" / "config.json").read_text())["architectures"] == [architecture]
    assert "New model" in (home / "report.html").read_text()
    assert "is randomly initialized:" in record.notes[0] and "retained set" not in " ".join(record.notes)
    if kind:
        assert set(after[learned].metrics) >= {"accuracy", "macro F1"}


def test_no_held_out_document_is_looked_at(shelf: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By whatever share and file it is held out: the texts that reach the trainer are those of the plan's rows."""
    texts: list[str] = []
    learnt = start_model.train_vocabulary

    def spied(*args: Any, **kwargs: Any) -> str:
        from postgrad.data.tokens import train_vocabulary

        repeated = train_vocabulary._repeat_texts

        def seen(*given: Any) -> Any:
            for text in repeated(*given):
                texts.append(text)
                yield text

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(train_vocabulary, "_repeat_texts", seen)
            return learnt(*args, **kwargs)

    monkeypatch.setattr(start_model, "train_vocabulary", spied)
    (tmp_path / "own.jsonl").write_text(Path(shelf.file("old")).read_text())
    own = {"name": "own", "path": str(tmp_path / "own.jsonl"), "share": 0.5, "held_out": "20%", "max_passes": 100}
    new = shelf.source("new", share=0.5)
    raw = begun(shelf, "spied", {"from_scratch": "llama-100k", "tokenizer": {"vocab_size": 390}}, sources=[own, new],
                evaluation={"learned": [shelf.file("new")]})  # fmt: skip
    with pytest.raises(
        DataError, match="'new' has no tokens to train on"
    ):  # its every document is a copy of a held-out one
        shelf.plan(raw)
    digests, _ = _digests_and_sizes(
        start_model.make_text_files("own", {**own, "hub": None, "columns": {}, "document_unit": "auto"}, tmp_path, "x")
    )
    every = [json.loads(line)["text"] for line in (tmp_path / "own.jsonl").read_text().splitlines()]
    out = held_out_mask(digests, 0.2)
    assert 0 < out.sum() < len(every)
    allowed = {text for text, away in zip(every, out, strict=True) if not away}
    assert set(texts) <= allowed and len(set(texts)) >= len(allowed) // 3


def test_resumed_with_a_cleared_cache_it_ends_with_the_same_bits(shelf: Workspace, tmp_path: Path) -> None:
    whole = begun(shelf, "fresh-whole", LLAMA)
    shelf.run(whole)
    other = Workspace(shelf.folder, tmp_path / "cache")
    raw = begun(other, "fresh-parts", LLAMA)
    saved = False
    for event in run_stage(other.plan(raw), command="test", cache=other.cache):
        if saved and isinstance(event, StepCompleted):
            break
        saved |= isinstance(event, CheckpointSaved)
    shutil.rmtree(other.cache)
    other.run(raw)
    assert run_trace(Path(raw["output"])) == run_trace(Path(whole["output"]))
    # The mutant: weights of another seed are other weights.
    shelf.run(begun(shelf, "fresh-other", LLAMA, seed=1))
    assert run_trace(shelf.folder / "runs" / "fresh-other") != run_trace(Path(whole["output"]))


def test_a_made_model_that_was_damaged_is_made_again(shelf: Workspace) -> None:
    plan = shelf.plan(begun(shelf, "damaged", {**LLAMA, "dropout": "5%"}))
    assert plan.model.start.folder is not None
    weights = plan.model.start.folder / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-4] + b"\0\1\2\3")
    shelf.plan(begun(shelf, "damaged", {**LLAMA, "dropout": "5%"}))
    assert weights.read_bytes() == good


def test_a_lineage_goes_on_from_a_new_model_and_is_drawn_without_it(shelf: Workspace) -> None:
    first = begun(shelf, "one", LLAMA, evaluation={"learned": [shelf.file("old", held_out=True)], "samples": 0})
    shelf.run(first)
    second = shelf.stage("two", tuning={"kind": "lora"})
    second["model"] = first["output"]
    second["evaluation"] = {"learned": [shelf.file("new", held_out=True)], "samples": 0}
    shelf.run(second)
    found = trace_lineage(Path(second["output"]), cache=shelf.cache)
    shutil.rmtree(shelf.cache / "fresh")
    again = trace_lineage(Path(second["output"]), cache=shelf.cache)
    assert again.R == found.R
    assert found.stages[0].name == "start" and found.stages[0].model == "llama-100k"
    assert all(value is not None for row in found.R for value in row)


def test_a_configuration_with_a_new_tokenizer_or_one_that_is_there(shelf: Workspace, tmp_path: Path) -> None:
    given = json.loads((shelf.folder / "llama" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(given))
    new = shelf.plan(
        begun(shelf, "config", {"config": str(tmp_path / "config.json"), "tokenizer": {"vocab_size": 350}})
    )
    assert new.model.vocab_size == len(new.model.tokenizer) == 350 and new.model.start.scratch_recipe is not None
    assert new.model.start.scratch_recipe["config"]["hidden_size"] == given["hidden_size"]
    same = shelf.plan(
        begun(shelf, "config", {"config": str(shelf.folder / "llama"), "tokenizer": str(shelf.folder / "llama")})
    )
    assert same.model.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(shelf.folder / "llama").get_vocab()
    assert same.model.vocab_size == given["vocab_size"]
    fitted = shelf.plan(begun(shelf, "config", {"from_scratch": "gpt2-100k", "tokenizer": str(shelf.folder / "llama")}))
    assert fitted.model.vocab_size == len(fitted.model.tokenizer)


@pytest.mark.parametrize(
    ("model", "error", "said"),
    [
        (
            {"from_scratch": "lama-1M"},
            ModelError,
            r"model\.from_scratch: unknown family 'lama'[\s\S]*did you mean 'llama'",
        ),
        ({"from_scratch": "llama-1k"}, ModelError, r"model\.from_scratch: llama-1k cannot be made with a vocabulary"),
        (
            {"from_scratch": "t5-1M", "tokenizer": {"vocab_size": 340}},
            StageError,
            r"tokenizer\.vocab_size: 340 tokens are too few",
        ),
        ({"config": "nowhere/config.json"}, ModelError, r"model\.config: there is no folder nowhere/config\.json in"),
        ({"config": "old.jsonl"}, ModelError, r"old\.jsonl: broken JSON"),
        ({"config": "llama", "tokenizer": "bert-large"}, ModelError, r"tokenizer: there is no folder bert-large in"),
        (
            {"config": "narrow.json", "tokenizer": "llama"},
            ModelError,
            r"320 tokens and the configuration 100 embeddings",
        ),
        ({"config": "foreign.json", "tokenizer": "llama"}, ModelError, "auto_map"),
        ({"config": "wide.json", "tokenizer": "llama"}, ModelError, "bytes of memory are free"),
    ],
)
def test_what_cannot_be_made_is_told(
    model: dict[str, Any], error: type[PostgradError], said: str, shelf: Workspace
) -> None:
    config = json.loads((shelf.folder / "llama" / "config.json").read_text())
    (shelf.folder / "narrow.json").write_text(json.dumps({**config, "vocab_size": 100}))
    (shelf.folder / "foreign.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "x.Y"}}))
    (shelf.folder / "wide.json").write_text(json.dumps({**config, "intermediate_size": 2**26, "hidden_size": 2**20}))
    with pytest.raises(error, match=said):
        shelf.plan(begun(shelf, "refused", model))


def test_small_folders_do_not_sit_on_a_new_model(shelf: Workspace) -> None:
    with pytest.raises(
        TuningError, match=r"`lora` publishes a small folder[\s\S]*train the new model with `full` first"
    ):
        shelf.run(begun(shelf, "lora", LLAMA, tuning={"kind": "lora"}))
    head = {"kind": "blocks", "last": 1}
    assert shelf.run(begun(shelf, "blocks", LLAMA, tuning=head)).record.status == "finished"


def test_nothing_was_seen_that_could_be_replayed(shelf: Workspace) -> None:
    seen = {"name": "seen", "seen_so_far": True, "share": 0.5}
    with pytest.raises(StageError, match=r"data\.sources\[1\]: a new model has no training data"):
        shelf.plan(begun(shelf, "seen", LLAMA, sources=[shelf.source("new", share=0.5), seen]))


def test_shares_by_a_mixing_rule_are_those_of_the_documents_that_may_be_trained_on(
    shelf: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    given = start_model.train_vocabulary

    def spied(portions: Any, shares: Any, **rest: Any) -> str:
        def told(counts: Any) -> Any:
            asked.append(list(counts))
            return shares(counts)

        return given(portions, told, **rest)

    monkeypatch.setattr(start_model, "train_vocabulary", spied)
    sources = [shelf.source("new", held_out="20%"), shelf.source("old", held_out=0)]
    raw = begun(shelf, "mixed", {"from_scratch": "llama-100k", "tokenizer": {"vocab_size": 410}}, sources=sources)
    raw["data"]["mixing"] = {"kind": "examples", "cap": 30}
    plan = shelf.plan(raw)
    assert asked and asked[0][1] == 60 and 30 < asked[0][0] < 60
    assert any("shares by examples: new 50.00%" in note for note in plan.notes)


def test_a_cache_named_by_a_relative_path_serves_stages_of_other_folders(
    shelf: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    relative = Workspace(shelf.folder, Path("cache"))
    plan = relative.plan(begun(shelf, "relative", LLAMA))
    assert plan.model.start.folder is not None and plan.model.start.folder.is_relative_to(tmp_path.resolve())
