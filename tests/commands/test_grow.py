"""A model with a larger vocabulary: old rows untouched, new ones the mean of their parts, and everything goes on from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from postgrad.cli.render import grown_text, model_comparison_text
from postgrad.commands.compare import compare_models
from postgrad.commands.grow import GrownModel, grow_vocabulary
from postgrad.config.stage_file import parse_stage
from postgrad.errors import DataError, StageError
from postgrad.lineage.growth import GROWTH, read_growth
from postgrad.lineage.tree import lineage_matrix, read_lineage
from postgrad.models.grow_embeddings import grow_embeddings
from postgrad.models.pretrained import save_pretrained
from postgrad.plan.plan import make_plan
from postgrad.reports.pages.lineage_page import lineage_page
from postgrad.reports.sections.lineage_tables import lineage_table
from postgrad.run.events import RunFinished
from postgrad.run.run import run_stage
from tests.conftest import StageOf, make_llama, make_tokenizer, old_text, write_jsonl
from tests.data.test_extend_vocabulary import german


def grown(model: Path, file: Path, out: Path, **options: Any) -> GrownModel:
    return grow_vocabulary(str(model), [str(file)], out, **{"tokens": 30, **options})


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "german.jsonl", german(80))


def test_rows_are_means_of_what_stood_for_them(base: Path, text: Path, cache: Path, tmp_path: Path) -> None:
    found = grown(base / "base", text, tmp_path / "grown", old=[str(base / "old.jsonl")], cache=cache)
    before, after = (AutoModelForCausalLM.from_pretrained(f) for f in (base / "base", tmp_path / "grown"))
    old, new = (m.get_input_embeddings().weight.detach() for m in (before, after))
    assert len(new) == len(old) + found.added == found.tokens
    assert torch.equal(new[: len(old)], old)
    tokenizers = [AutoTokenizer.from_pretrained(f) for f in (base / "base", tmp_path / "grown")]
    word = "Verfassung"
    (number,) = [i for i in tokenizers[1](word)["input_ids"] if i >= len(old)][:1]
    piece = tokenizers[1].decode([number])
    parts = tokenizers[0](piece, add_special_tokens=False)["input_ids"]
    torch.testing.assert_close(new[number], old[parts].mean(0))
    assert found.new.after.bytes_per_token > 1.5 * found.new.before.bytes_per_token
    assert found.old is not None and found.old.after == found.old.before
    cost = found.old_bits
    assert cost is not None and cost == read_growth(tmp_path / "grown")
    assert cost.after > cost.before  # each new token takes some of the probability
    rows = compare_models([str(base / "base"), str(tmp_path / "grown")], [str(base / "old.jsonl")], cache=cache).rows
    assert [cost.before, cost.after] == pytest.approx([row.score.bits_per_byte for row in rows])
    assert cost.sentence() in grown_text(found)
    assert "--old FILE" in grown_text(replace(found, old_bits=None))


def test_what_the_model_says_of_old_text_is_what_it_said(base: Path, text: Path, tmp_path: Path) -> None:
    grown(base / "base", text, tmp_path / "grown")
    before, after = (AutoModelForCausalLM.from_pretrained(f) for f in (base / "base", tmp_path / "grown"))
    ids = torch.tensor([AutoTokenizer.from_pretrained(base / "base")(old_text(1)[0])["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(after(ids).logits[..., :320], before(ids).logits)


@pytest.mark.parametrize("head", ["mean", "zero"])
def test_an_output_head_of_its_own_grows_too(head: str) -> None:
    model = make_llama(tie_word_embeddings=False)
    before = model.lm_head.weight.detach().clone()
    grow_embeddings(model, {320: [3, 5], 321: [7]}, head)  # type: ignore[arg-type]
    assert torch.equal(model.lm_head.weight[:320], before)
    expected = (before[3] + before[5]) / 2 if head == "mean" else torch.zeros(32)
    torch.testing.assert_close(model.lm_head.weight[320], expected)
    assert model.config.vocab_size == 322


def test_two_stages_embeddings_first_then_all(
    base: Path, text: Path, stage_of: StageOf, cache: Path, tmp_path: Path
) -> None:
    found = grown(base / "base", text, tmp_path / "grown", old=[str(base / "old.jsonl")], cache=cache)
    start, last = tmp_path / "grown", None
    for name, tuning in (
        ("first", {"kind": "blocks", "all_but_first": found.blocks, "embeddings": True}),
        ("second", {"kind": "full"}),
    ):
        stage = stage_of(
            model=str(start),
            output=str(tmp_path / name),
            tuning=tuning,
            tokens=2000,
            data={"sequence_length": 32, "sources": [{"name": "new", "path": str(text)}]},
        )
        *_, last = run_stage(make_plan(parse_stage(stage, "t"), tmp_path, cache), command="t", cache=cache)
        assert isinstance(last, RunFinished)
        before, after = (AutoModelForCausalLM.from_pretrained(f) for f in (start, tmp_path / name / "model"))
        moved = {n for n, p in after.named_parameters() if not torch.equal(p, before.get_parameter(n))}
        blocks = {n for n in moved if ".layers." in n}
        assert "model.embed_tokens.weight" in moved and bool(blocks) == (name == "second")
        start = tmp_path / name / "model"
    lineage = lineage_matrix(read_lineage(tmp_path / "first"), lambda *_: None)
    assert lineage.growth == found.old_bits is not None
    assert lineage.growth.sentence() in lineage_table(lineage).text() and "bits per byte" in lineage_page(lineage)
    (tmp_path / "grown" / GROWTH).unlink()  # the mutant: the folder does not keep it
    assert lineage_matrix(read_lineage(tmp_path / "first"), lambda *_: None).growth is None
    text_found = model_comparison_text(compare_models([str(base / "base"), str(start)], [str(text)], cache=cache))
    assert "bits/byte" in text_found and "another tokenizer" in text_found


def test_what_cannot_be_is_said(base: Path, text: Path, tmp_path: Path) -> None:
    for options, says in (({"tokens": 0}, "at least 1"), ({"head": "half"}, "mean or zero")):
        with pytest.raises(StageError, match=says):
            grown(base / "base", text, tmp_path / "x", **options)
    with pytest.raises(StageError, match="already exists"):
        grown(base / "base", text, tmp_path)
    with pytest.raises(DataError, match="no pair of adjacent tokens occurs twice"):
        grown(base / "base", write_jsonl(tmp_path / "few.jsonl", ["a"]), tmp_path / "x")


def test_padded_rows_are_used_before_new_ones(tmp_path: Path, text: Path) -> None:
    """A table with more rows than the tokenizer has tokens."""
    save_pretrained(make_llama(vocab_size=400), make_tokenizer(), tmp_path / "padded", dtype=torch.float32)
    found = grown(tmp_path / "padded", text, tmp_path / "grown")
    assert len(AutoModelForCausalLM.from_pretrained(tmp_path / "grown").get_input_embeddings().weight) == 400
    assert found.tokens == 320 + found.added
