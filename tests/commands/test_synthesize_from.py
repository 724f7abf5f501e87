"""A rewritten corpus: forms and their filters, held-out questions, the same file after any interruption, and clear errors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from postgrad.cli.render import synthesized_text
from postgrad.commands import synthesize_from as module
from postgrad.commands.results import finish
from postgrad.commands.synthesize import SynthesisRequest, SynthesizedText
from postgrad.commands.synthesize_from import Rewriting, extract_pairs, find_mismatch, synthesize_from
from postgrad.config.stage_file import parse_stage
from postgrad.errors import DataError, StageError
from postgrad.evaluation.generate_documents import GeneratedDocument
from postgrad.models.pretrained import save_pretrained
from postgrad.plan.plan import make_plan
from tests.conftest import StageOf, make_llama, make_tokenizer, write_jsonl

PLACES = [f"{first}{last}" for first in ("Al", "Bre", "Cor") for last in ("ton", "ford", "dale", "wick")]
COLOURS = ["green", "yellow", "purple", "orange"]
WISH = SynthesisRequest(tokens=400, max_document_tokens=60, batch_size=4, dedup_threshold=1.0)


def fact(number: int) -> str:
    place, colour = PLACES[number], COLOURS[number % 4]
    return f"The old lighthouse of {place} was painted {colour} by its keeper. Ships steer by it at night."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("writer") / "writer"
    save_pretrained(make_llama(max_position_embeddings=512), make_tokenizer(), folder, dtype=torch.float32)
    return str(folder)


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    return str(write_jsonl(tmp_path / "corpus.jsonl", [fact(i) for i in range(len(PLACES))]))


def write_well(prompt: str, number: int) -> str:
    """What a good model writes after a prompt; every fifth text is a copy, and every seventh about something else."""
    place = next(place for place in PLACES if place in prompt)
    colour = next(colour for colour in COLOURS if colour in prompt)
    if prompt.endswith("Question:"):
        return (
            f" Which colour has the lighthouse of {place}?\nAnswer: {colour}\nQuestion: Who is old?\nAnswer: a whale\n"
        )
    if number % 5 == 4:
        return f"The old lighthouse of {place} was painted {colour} by its keeper."
    if number % 7 == 6:
        return "Nothing whatever can be said about these seven questions here."
    return f"By night, ships see what is {colour}: {place} has a lighthouse, whose keeper chose that colour ({number})."


@pytest.fixture
def good_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()

    def generate(model: Any, prompts: Sequence[np.ndarray], numbers: range, **_: Any) -> list[GeneratedDocument]:
        texts = [write_well(tokenizer.decode(p), n) for p, n in zip(prompts, numbers, strict=True)]
        return [GeneratedDocument(np.array(tokenizer(text)["input_ids"]), ended=True) for text in texts]

    monkeypatch.setattr(module, "generate_documents", generate)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def all_of(model: str, out: Path, corpus: str, request: SynthesisRequest = WISH, **changes: Any) -> SynthesizedText:
    return finish(
        synthesize_from(model, out, request, Rewriting((corpus,), **{"held_out": 0.25, **changes})), SynthesizedText
    )


@pytest.mark.usefixtures("good_writer")
@pytest.mark.parametrize("mutant", [None, "questions of all documents"])
def test_held_out_questions_are_not_in_the_training_text(
    mutant: str | None, model: str, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mutant:  # the training text asks about every document
        draw = module._rewrite
        everywhere = [(part, form) for part in _parts(model, corpus) for form in module.FORMS]
        monkeypatch.setattr(
            module, "_rewrite", lambda g, t, r, jobs, n: draw(g, t, r, everywhere if len(jobs) > 3 else jobs, n)
        )
    out = tmp_path / "text.jsonl"
    result = all_of(model, out, corpus, replace(WISH, tokens=5000, dedup_threshold=0.9))
    found, asked = rows(out), rows(tmp_path / "text-questions.jsonl")
    assert result.questions == len(asked) == 3 and result.questions_file == tmp_path / "text-questions.jsonl"
    assert set(result.forms) == {"restatement", "questions", "notes"} and sum(result.forms.values()) == len(found)
    tested = {next(place for place in PLACES if place in row["prompt"]) for row in asked}
    trained = {place for place in PLACES for row in found if row["form"] == "questions" and place in row["text"]}
    assert tested and (not tested & trained) == (mutant is None)
    told = {place for place in PLACES for row in found if row["form"] != "questions" and place in row["text"]}
    assert mutant or tested <= told  # their facts are in the training text all the same
    assert {row["completion"].strip() for row in asked} <= set(COLOURS) and "whale" not in out.read_text()
    assert result.left_out["copies of the document"] and result.left_out["not about the document"]
    assert "filter: {form: [notes]}" in synthesized_text(result, []) and "closed-book" in synthesized_text(result, [])


def _parts(model: str, corpus: str) -> list[Any]:
    return module._read_parts(module.load_generator(model, 60), None, WISH, Rewriting((corpus,), held_out=0.25))


@pytest.mark.usefixtures("good_writer")
def test_a_stop_anywhere_makes_no_difference(model: str, corpus: str, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    all_of(model, whole, corpus)
    steps = synthesize_from(model, out, WISH, Rewriting((corpus,), held_out=0.25))
    next(steps)
    steps.close()
    all_of(model, out, corpus)
    assert out.read_bytes() == whole.read_bytes()
    assert rows(tmp_path / "stopped-questions.jsonl") == rows(tmp_path / "whole-questions.jsonl")
    assert all_of(model, out, corpus).already_complete
    with pytest.raises(StageError, match="was not written by this command with these options"):
        all_of(model, tmp_path / "third.jsonl", corpus, seed_of(1), questions=tmp_path / "whole-questions.jsonl")


def seed_of(seed: int) -> SynthesisRequest:
    return replace(WISH, seed=seed)


@pytest.mark.usefixtures("good_writer")
def test_forms_are_mixed_by_share_and_questions_are_a_task(
    model: str, corpus: str, tmp_path: Path, stage_of: StageOf, cache: Path
) -> None:
    out = tmp_path / "text.jsonl"
    all_of(model, out, corpus, replace(WISH, tokens=1500))
    stage = stage_of()
    shares = {"restatement": 0.7, "questions": 0.3}
    stage["data"]["sources"] = [
        {"name": form, "path": str(out), "filter": {"form": [form]}, "share": share, "max_passes": 100}
        for form, share in shares.items()
    ]
    stage["evaluation"]["tasks"] = [
        {"name": "closed-book", "path": str(tmp_path / "text-questions.jsonl"), "role": "learned"}
    ]
    plan = make_plan(parse_stage(stage, "t"), tmp_path, cache)
    assert plan.data.target_shares == tuple(shares.values()) and len(plan.evaluation.tasks) == 1
    assert [source.generated_by for source in plan.as_record().sources] == [model, model]


def test_a_pair_needs_an_answer_of_the_document_and_an_end() -> None:
    text = (
        "Question: Which colour has the lighthouse of Alton?\nAnswer: Green.\n"
        "Question: Who painted it?\nAnswer: a whale\n"
        "Question: Is it green?\nAnswer: green\n"
        "Question: By whom was it painted?\nAnswer: its keeper"
    )
    assert [answer for _, answer in extract_pairs(text, fact(0), ended=True)] == ["Green.", "its keeper"]
    assert [answer for _, answer in extract_pairs(text, fact(0), ended=False)] == ["Green."]


def test_what_is_no_rewriting_is_named() -> None:
    assert find_mismatch(fact(0), fact(0), 0.8) == "copies of the document"
    assert find_mismatch("Too short a text.", fact(0), 0.8) == "too short"
    assert find_mismatch("Nobody knows anything here whatsoever.", fact(0), 0.8) == "not about the document"
    assert find_mismatch("A keeper once painted Alton's old lighthouse in green.", fact(0), 0.8) is None


def test_long_documents_are_read_in_parts(model: str, tmp_path: Path) -> None:
    texts = [fact(i) + "\n\n" for i in range(8)]
    file = str(write_jsonl(tmp_path / "long.jsonl", ["".join(texts), "one word " * 400]))
    parts = module._read_parts(
        generator := module.load_generator(model, 60), None, WISH, Rewriting((file,), held_out=0)
    )
    assert len(parts) > 4 and not any(part.is_held_out for part in parts)
    joined = "".join(part.text for part in parts)
    assert all(fact(i) in joined for i in range(8))
    for part in parts:
        for form in module.FORMS:
            assert len(module._encode_prompt(generator, None, form, part.text)) + 60 <= 512 + 4


def test_what_cannot_be_is_said(model: str, corpus: str, tmp_path: Path) -> None:
    out = tmp_path / "text.jsonl"
    few = str(write_jsonl(tmp_path / "few.jsonl", [fact(0), fact(1)]))
    for path, request, changes, error, says in (
        (few, WISH, {"held_out": 0.1}, DataError, "2 documents is too small to hold out 10%"),
        (corpus, WISH, {"forms": ("poems",)}, StageError, "'poems' is no form"),
        (corpus, WISH, {"held_out": 1.0}, StageError, "--held-out: 1.0 is out of range"),
        (corpus, replace(WISH, max_document_tokens=500), {}, StageError, "positions for a document"),
        (corpus, replace(WISH, temperature=0.01), {}, DataError, "no question about 3 parts of held-out documents"),
    ):
        with pytest.raises(error, match=says):
            all_of(model, out, path, request, **changes)
    assert not out.exists()
