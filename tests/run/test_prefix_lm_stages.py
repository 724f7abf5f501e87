"""A stage of a prefix language model: trained, scored, published and asked in both directions; refused where it cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from postgrad.cli.render import evaluation_text, export_text
from postgrad.commands import generate
from postgrad.commands.compare import compare_models
from postgrad.commands.evaluate import evaluate
from postgrad.commands.export import export_model
from postgrad.data.layouts.rows import IGNORED
from postgrad.errors import ModelError, StageError
from postgrad.evaluation import continuations
from postgrad.models.location import locate_model
from postgrad.models.prefix_lm_attention import PREFIX_LM_KEY, is_prefix_lm, model_prefix_mask, prefill_prompt
from postgrad.tuning.open_model import open_model, starts_as_prefix_lm
from tests.conftest import write_jsonl
from tests.run.test_task_stages import alike, begun, gradients
from tests.tiny_stages import LENGTH, QUICK_EVALUATION, Workspace, make_workspace, run_interrupted, run_trace

PREFIX = [{"kind": "prefix-lm"}]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("shelf"), tmp_path_factory.getbasetemp() / "cache")


def stage_of(shelf: Workspace, name: str, tuning: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Text and prompts with answers in one stage."""
    sources = [shelf.source("new", share=0.5), shelf.source("completion", share=0.5)]
    evaluation = {
        **QUICK_EVALUATION,
        "learned": [shelf.file("new", held_out=True), shelf.file("completion", held_out=True)],
    }
    return shelf.stage(
        name, tuning, **{"sources": sources, "objectives": PREFIX, "evaluation": evaluation, "tokens": 800, **changes}
    )


def by_hand(folder: Path, plan: Any) -> dict[str, float]:
    """Nats per token of each set, by plain transformers and a mask of four dimensions."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    out = {}
    for held_out in plan.evaluation.sets:
        nats = tokens = 0.0
        for row in held_out.rows:
            given = {name: torch.from_numpy(array)[None] for name, array in row.inputs.items()}
            mask = model_prefix_mask(model, given.pop("prefix"), given["position_ids"])
            with torch.no_grad():
                logits = model(**given, attention_mask=mask, use_cache=False).logits[0].double()
            asked = np.flatnonzero(row.labels != IGNORED)
            nats -= float(torch.log_softmax(logits, -1)[asked, row.labels[asked]].sum())
            tokens += len(asked)
        out[held_out.name] = nats / tokens
    return out


def test_it_is_learnt_and_scored_as_it_is_read(shelf: Workspace) -> None:
    raw = stage_of(shelf, "prefix")
    done = shelf.run(raw)
    assert all(change.difference < 0 for change in done.record.changes.values())
    after = {name: scores.nats for name, scores in done.record.scores.after.items()}
    assert after == pytest.approx(by_hand(done.run_folder / "model", shelf.plan(raw)), rel=1e-5)
    before = {name: scores.nats for name, scores in done.record.scores.before.items()}
    assert before == pytest.approx(by_hand(shelf.folder / "llama", shelf.plan(raw)), rel=1e-5)
    # The mutant: read causally it is another number.
    model = AutoModelForCausalLM.from_pretrained(done.run_folder / "model")
    row = next(row for row in shelf.plan(raw).evaluation.sets[0].rows if row.inputs["prefix"].sum() > 4)
    ids = torch.from_numpy(row.inputs["input_ids"])[None]
    mask = model_prefix_mask(model, torch.from_numpy(row.inputs["prefix"])[None], torch.arange(ids.shape[1])[None])
    with torch.no_grad():
        causal, both = model(input_ids=ids).logits, model(input_ids=ids, attention_mask=mask).logits
    assert not torch.allclose(causal, both, atol=1e-4)


def test_held_out_prefixes_do_not_change_with_the_seed(shelf: Workspace) -> None:
    one, other = (shelf.plan(stage_of(shelf, f"seed-{seed}", seed=seed)) for seed in (0, 5))
    for a, b in zip(one.evaluation.sets, other.evaluation.sets, strict=True):
        assert all(np.array_equal(x.inputs["prefix"], y.inputs["prefix"]) for x, y in zip(a.rows, b.rows, strict=True))
    drawn = [
        [plan.data.rows[0].get_row(i, i).inputs["prefix"].tolist() for i in range(len(plan.data.rows[0]))]
        for plan in (one, other)
    ]
    assert drawn[0] != drawn[1]


def test_loss_and_gradient_are_those_of_transformers(shelf: Workspace) -> None:
    run, batches = begun(shelf, stage_of(shelf, "loss"))
    assert {"prefix"} <= set(batches[0].inputs)
    for batch in batches:
        loss, _ = run.objectives[0](run.model(**batch.inputs), batch)
        (loss / batch.label_count).backward()
        ours = gradients(run)
        given = dict(batch.inputs)
        model = run.model.pretrained
        mask = model_prefix_mask(model, given.pop("prefix"), given["position_ids"])
        logits = model(**given, attention_mask=mask, use_cache=False).logits
        plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
        assert loss.item() / batch.label_count == pytest.approx(plain.item(), rel=1e-5)
        plain.backward()
        assert alike(ours, gradients(run))


def test_it_stands_beside_plain_text_in_one_stage(shelf: Workspace) -> None:
    objectives = [{"kind": "prefix-lm", "on": ["completion"]}, {"kind": "next-token"}]
    learned = [{"name": "answers", "path": shelf.file("completion", held_out=True), "same_format_as": "completion"}]
    evaluation = {**QUICK_EVALUATION, "learned": [*learned, shelf.file("new", held_out=True)]}
    raw = stage_of(shelf, "beside", objectives=objectives, evaluation=evaluation)
    plan = shelf.plan(raw)
    assert [rows.layout for rows in plan.data.rows] == ["packed", "prefix"]
    done = shelf.run(raw)
    assert done.record.status == "finished" and all(c.difference < 0 for c in done.record.changes.values())
    assert is_prefix_lm(AutoModelForCausalLM.from_pretrained(done.run_folder / "model").config)


def test_a_killed_run_ends_with_the_same_bits(shelf: Workspace) -> None:
    whole = shelf.run(stage_of(shelf, "whole"))
    parts = run_interrupted(shelf, stage_of(shelf, "parts"))
    assert run_trace(parts.run_folder) == run_trace(whole.run_folder)


# -- what leaves -------------------------------------------------------------------------------------------------------


def test_the_published_model_says_how_it_reads_until_it_is_trained_otherwise(shelf: Workspace) -> None:
    done = shelf.run(stage_of(shelf, "prefix"))
    checkpoint = next((done.run_folder / "checkpoints").glob("step-*"))
    for folder in (done.run_folder / "model", checkpoint):
        assert json.loads((folder / "config.json").read_text())[PREFIX_LM_KEY] is True
    # A stage that names no objective goes on as its start was made.
    raw = stage_of(shelf, "on", model="runs/prefix", objectives=[], tokens=200)
    assert [o.kind for o in shelf.plan(raw).objectives] == ["prefix-lm"]
    assert is_prefix_lm(AutoModelForCausalLM.from_pretrained(shelf.run(raw).run_folder / "model").config)
    causal = stage_of(shelf, "back", model="runs/prefix", objectives=[{"kind": "next-token"}], tokens=200)
    assert PREFIX_LM_KEY not in (shelf.run(causal).run_folder / "model" / "config.json").read_text()


@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
def test_a_tunings_folder_says_it_too(shelf: Workspace, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning = {"lora": {"rank": 2}, "prefix": {"length": 3, "hidden": 8}, "prompt": {"length": 3}}[kind]
    done = shelf.run(stage_of(shelf, f"prefix-{kind}", {"kind": kind, **tuning}, tokens=400))
    start = locate_model(str(done.run_folder), shelf.folder)
    assert starts_as_prefix_lm(start) and not starts_as_prefix_lm(start.full_model)
    opened = open_model(start)
    assert is_prefix_lm(opened.model.config)
    monkeypatch.chdir(shelf.folder)
    options = {"max_new_tokens": 6, "temperature": 0.0, "top_p": 1.0, "seed": 0}
    assert generate.generate([str(done.run_folder)], "one and two", **options).continuations
    scored = evaluate(str(done.run_folder), [shelf.file("new", held_out=True)], context=LENGTH, cache=shelf.cache)
    assert "read in both directions" in evaluation_text(scored)


def test_a_prompt_is_read_in_both_directions_and_written_on(shelf: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    done = shelf.run(stage_of(shelf, "prefix"))
    monkeypatch.chdir(shelf.folder)
    model = AutoModelForCausalLM.from_pretrained(done.run_folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(done.run_folder / "model")
    asked: list[int] = []
    monkeypatch.setattr(
        generate, "prefill_prompt", lambda model, ids: (asked.append(ids.shape[1]), prefill_prompt(model, ids))[1]
    )
    sizes = []
    for prompt in ("one and two.", "x3 = y4 * 17;\nx", "seven and nine. eight and", "x1"):
        given = tokenizer(prompt, return_tensors="pt")["input_ids"]
        ids, size = given, given.shape[1]
        for _ in range(6):
            positions = torch.arange(ids.shape[1])[None]
            mask = model_prefix_mask(model, (positions < size).long(), positions)
            with torch.no_grad():
                following = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0, -1].argmax()
            ids = torch.cat([ids, following[None, None]], 1)
            if following == tokenizer.eos_token_id:
                break
        wanted = tokenizer.decode(ids[0, size:], skip_special_tokens=True)
        found = generate.generate([str(done.run_folder)], prompt, max_new_tokens=6, temperature=0.0, top_p=1.0, seed=0)
        assert found.continuations[0].text == wanted
        sizes.append(size)
    assert asked == sizes  # so small a model might write the same from a prompt that was read causally
    told = export_text(export_model(str(done.run_folder), shelf.folder / "exported"))
    assert (
        PREFIX_LM_KEY in told
        and json.loads((shelf.folder / "exported" / "config.json").read_text())[PREFIX_LM_KEY] is True
    )


def test_models_that_read_in_other_ways_are_not_compared(shelf: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    done = shelf.run(stage_of(shelf, "prefix"))
    monkeypatch.chdir(shelf.folder)
    with pytest.raises(StageError, match="only some of these models are prefix language models"):
        compare_models(["llama", str(done.run_folder)], [shelf.file("new", held_out=True)], cache=shelf.cache)


# -- what cannot be ----------------------------------------------------------------------------------------------------


def test_attention_that_looks_back_only_is_refused(shelf: Workspace) -> None:
    compute = {"threads": 1, "dtype": "float32", "compile": False}
    with pytest.raises(StageError, match="reads its prefixes in both directions") as met:
        shelf.run(stage_of(shelf, "blocks", compute={**compute, "attention": "causal_blocks"}))
    assert met.value.where == "compute.attention"
    for attention in ("sdpa", "eager"):
        done = shelf.run(stage_of(shelf, attention, compute={**compute, "attention": attention}, tokens=200))
        assert done.record.execution.attention == attention
    assert shelf.run(stage_of(shelf, "prefix")).record.execution.attention == "sdpa"


def test_an_encoder_is_refused(shelf: Workspace) -> None:
    with pytest.raises(StageError, match="prefix-lm needs a decoder"):
        shelf.plan(stage_of(shelf, "bert", model="bert"))


def test_rows_longer_than_a_window_are_refused(shelf: Workspace) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    from tests.conftest import make_tokenizer
    from tests.tiny_stages import save_model

    config = MistralConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, sliding_window=16,
    )  # fmt: skip
    save_model(MistralForCausalLM(config).eval(), make_tokenizer(), shelf.folder / "mistral")
    with pytest.raises(ModelError, match="attention window of this model is 16"):
        shelf.run(stage_of(shelf, "window", model="mistral"))


def test_samples_are_written_as_the_model_reads(shelf: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start model's are not: it was never trained so."""
    asked: list[bool] = []
    plain = continuations.prefill_prompt
    monkeypatch.setattr(continuations, "prefill_prompt", lambda model, ids: (asked.append(True), plain(model, ids))[1])
    objectives = [{"kind": "prefix-lm", "on": ["completion"]}, {"kind": "next-token"}]
    text = "one and two. three and four. five and six. seven and eight. nine and ten. one and two. three and four. " * 2
    long = write_jsonl(shelf.folder / "long.jsonl", [text])
    evaluation = {
        **QUICK_EVALUATION,
        "samples": 1,
        "learned": [{"name": "long", "path": str(long), "same_format_as": "new"}],
    }
    done = shelf.run(stage_of(shelf, "samples", objectives=objectives, evaluation=evaluation, tokens=200))
    assert len(done.record.samples) == 1 and asked == [True]
