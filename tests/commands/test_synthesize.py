"""A model's own text: the same file after any interruption, tagged, filtered, and told for what it is where it is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from postgrad.check.check import check_stage
from postgrad.cli.render import synthesized_text
from postgrad.commands.results import finish
from postgrad.commands.synthesize import (
    SynthesisProgress,
    SynthesisRequest,
    SynthesizedText,
    summary_file,
    synthesize,
)
from postgrad.config.stage_file import parse_stage
from postgrad.data.read.files import RawSource
from postgrad.data.read.generated_text import get_generator_model
from postgrad.errors import DataError, ModelError, StageError
from postgrad.models.location import locate_model
from postgrad.plan.plan import make_plan
from postgrad.tuning.open_model import start_fingerprint
from tests import tiny_stages
from tests.conftest import StageOf, old_text, write_jsonl

WISH = SynthesisRequest(tokens=600, max_document_tokens=40, batch_size=4)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def all_of(events: Iterator[SynthesisProgress | SynthesizedText]) -> SynthesizedText:
    return finish(events, SynthesizedText)


def test_what_was_asked_for_is_written_and_tagged(base: Path, tmp_path: Path) -> None:
    out, model = tmp_path / "replay.jsonl", str(base / "base")
    last = all_of(synthesize(model, out, WISH))
    found = rows(out)
    assert last.tokens >= 600 and len(found) == last.documents
    numbers = [row["made"]["number"] for row in found]
    assert numbers == sorted(set(numbers))
    for row in found:
        assert row["text"].strip() and row["made"]["by"] == model
        assert row["made"]["model"] == start_fingerprint(locate_model(model, Path.cwd()))
        assert row["made"]["from"] == "bos" and row["made"]["temperature"] == 1.0
    assert "role: replay" in synthesized_text(last, [])
    assert not list(tmp_path.glob("*.part*"))


def test_a_stop_anywhere_makes_no_difference(base: Path, tmp_path: Path) -> None:
    whole, model = tmp_path / "whole.jsonl", str(base / "base")
    all_of(synthesize(model, whole, WISH))
    for stop_after in (1, 3):
        out = tmp_path / f"stopped{stop_after}.jsonl"
        steps = synthesize(model, out, WISH)
        for _ in range(stop_after):
            next(steps)
        steps.close()
        with (tmp_path / f"{out.name}.part").open("a") as file:
            file.write('{"text": "half a li')  # killed while it wrote
        all_of(synthesize(model, out, WISH))
        assert out.read_bytes() == whole.read_bytes()
        kept = [json.loads(summary_file(path).read_text()) for path in (out, whole)]
        assert kept[0] == kept[1]


def test_other_options_do_not_go_on_with_a_file(base: Path, tmp_path: Path) -> None:
    out, model = tmp_path / "replay.jsonl", str(base / "base")
    steps = synthesize(model, out, WISH)
    next(steps)
    steps.close()
    with pytest.raises(StageError, match="begun with another model or other options"):
        next(synthesize(model, out, replace(WISH, seed=1)))


def test_documents_begin_as_the_given_texts_do(base: Path, tmp_path: Path) -> None:
    texts = old_text(5, 90)
    file, out = write_jsonl(tmp_path / "seeds.jsonl", texts), tmp_path / "replay.jsonl"
    all_of(synthesize(str(base / "base"), out, replace(WISH, prompt_tokens=6), [str(file)]))
    for row in rows(out):
        line = int(row["made"]["from"].rsplit(":", 1)[1])
        assert row["text"][:8] == texts[line - 1][:8]


def test_copies_and_loops_are_left_out_and_counted(base: Path, tmp_path: Path) -> None:
    """At a low temperature every document is the same one."""
    file = write_jsonl(tmp_path / "seeds.jsonl", old_text(1, 90))
    wish = replace(WISH, tokens=10_000, max_document_tokens=60, prompt_tokens=20, temperature=1e-6)
    with pytest.raises(DataError, match=r"were accepted \(.*(near-duplicates|repetitive)"):
        all_of(synthesize(str(base / "base"), tmp_path / "loop.jsonl", wish, [str(file)]))


def test_self_made_text_is_told_for_what_it_is(base: Path, stage_of: StageOf, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "replay.jsonl"
    all_of(synthesize(str(base / "base"), out, replace(WISH, tokens=1500)))
    assert get_generator_model(RawSource("x", str(out), root=tmp_path, where="x")) == str(base / "base")
    assert get_generator_model(RawSource("x", str(base / "old.jsonl"), root=tmp_path, where="x")) is None
    stage = stage_of()
    stage["data"]["sources"][1] |= {"path": str(out), "max_passes": 50}
    plan = make_plan(parse_stage(stage, "t"), tmp_path, cache)
    assert [source.generated_by for source in plan.as_record().sources] == [None, str(base / "base")]
    text = check_stage(plan, cache=cache)["text"]
    assert " synthetic " in text and f"old: synthetic text generated by {base / 'base'}" in text


def test_what_cannot_be_is_said(base: Path, tmp_path: Path) -> None:
    model, out = str(base / "base"), tmp_path / "replay.jsonl"
    for wish, begun, says in (
        (replace(WISH, max_document_tokens=1000), [], "do not fit"),
        (replace(WISH, max_document_tokens=0), [], "--max-tokens: 0 is out of range"),
        (replace(WISH, max_document_tokens=1), [], "--max-tokens: 1 is out of range"),
        (replace(WISH, prompt_tokens=-1), [], "--prompt-tokens: -1 is out of range"),
        (replace(WISH, temperature=0.0), [], "out of range"),
        (replace(WISH, temperature=float("inf")), [], "--temperature: inf is out of range"),
        (replace(WISH, max_repetition=-0.1), [], "--max-repetition: -0.1 is out of range"),
        (replace(WISH, dedup_threshold=0.2), [], "--dedup-threshold: 0.2 is out of range"),
        (replace(WISH, dedup_threshold=float("nan")), [], "--dedup-threshold: nan is out of range"),
        (replace(WISH, top_p=1.5), [], "out of range"),
        (replace(WISH, prompt_tokens=3), [], "prompts need a text"),
        (WISH, ["x.jsonl"], "prompts need a text"),
    ):
        with pytest.raises(StageError, match=says):
            next(synthesize(model, out, wish, begun))
    with pytest.raises(StageError, match="not a JSONL file"):
        next(synthesize(model, tmp_path / "replay.txt", WISH))
    with pytest.raises(StageError, match="--out: there is no folder"):
        next(synthesize(model, tmp_path / "gone" / "replay.jsonl", WISH))
    out.write_text("")
    with pytest.raises(StageError, match="already exists"):
        next(synthesize(model, out, WISH))


@pytest.mark.parametrize("state", ["{half", '{"of": "x", "surprise": 1}', "[]"])
def test_a_broken_account_is_no_traceback_and_loses_nothing(base: Path, tmp_path: Path, state: str) -> None:
    out = tmp_path / "replay.jsonl"
    (tmp_path / "replay.jsonl.part").write_text("written before")
    (tmp_path / "replay.jsonl.part.json").write_text(state)
    with pytest.raises(
        StageError, match=r"part\.json: [\s\S]*remove replay\.jsonl\.part and replay\.jsonl\.part\.json"
    ):
        next(synthesize(str(base / "base"), out, WISH))
    assert (tmp_path / "replay.jsonl.part").read_text() == "written before"


def test_an_encoder_writes_nothing(tmp_path: Path) -> None:
    tokenizer = tiny_stages.bert_tokenizer()
    folder = tiny_stages.save_model(tiny_stages.make_bert(len(tokenizer)), tokenizer, tmp_path / "bert")
    with pytest.raises(ModelError, match="is not a decoder"):
        next(synthesize(str(folder), tmp_path / "replay.jsonl", WISH))
