"""Models and runs side by side: the numbers are those of plain transformers on the same text, and the pairs are pairs."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from postgrad.cli import render
from postgrad.commands.compare import BitsPerByteChange, compare_models, compare_runs
from postgrad.commands.evaluate import TextEvaluation, evaluate
from postgrad.commands.lineage import trace_lineage
from postgrad.commands.pages import write_page
from postgrad.errors import DataError, ModelError, StageError
from postgrad.evaluation import before_after
from postgrad.lineage.record import read_record, write_record
from postgrad.models.pretrained import save_pretrained
from postgrad.stats.forgetting import LossChange
from tests.conftest import make_llama, make_tokenizer, new_text, old_text, write_jsonl
from tests.tiny_lineage import LineageRuns


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A model folder as plain transformers writes it; nothing of ours was near it."""
    make_llama(seed=3).save_pretrained(tmp_path / "foreign")
    make_tokenizer().save_pretrained(tmp_path / "foreign")
    return tmp_path / "foreign"


@torch.no_grad()
def by_hand(folder: Path, documents: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Nats and scored tokens of each document, one call of plain transformers a document."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    nats, tokens = [], []
    for text in documents:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        log_p = torch.log_softmax(model(input_ids=ids).logits[0, :-1].double(), -1)
        nats.append(-float(log_p.gather(1, ids[0, 1:, None]).sum()))
        tokens.append(ids.shape[1] - 1)
    return np.array(nats), np.array(tokens)


def evaluated(model: Path, files: list[Path], cache: Path, **options: Any) -> TextEvaluation:
    return evaluate(str(model), [str(f) for f in files], cache=cache, **options)


def short(documents: list[str]) -> list[str]:
    return [d[:60] for d in documents]  # within the model's 128 positions


def test_a_model_that_was_never_ours_is_scored(foreign: Path, cache: Path, tmp_path: Path) -> None:
    texts = short(new_text(30, 5))
    file = write_jsonl(tmp_path / "some text.jsonl", texts)
    found = evaluated(foreign, [file], cache)
    summary = found.sets["some-text"]
    nats, tokens = by_hand(foreign, texts)
    assert summary.tokens == tokens.sum()
    assert summary.nats == pytest.approx(nats.sum() / tokens.sum(), rel=1e-5)
    assert summary.bits_per_byte == pytest.approx(
        nats.sum() / math.log(2) / sum(len(t.encode()) for t in texts), rel=1e-5
    )
    assert summary.low < summary.nats < summary.high
    assert f"{summary.nats:.4f}" in render.evaluation_text(found)
    # A second look is taken from the cache, and is the same.
    assert evaluated(foreign, [file], cache) == found
    # Other weights are never given the scores of these.
    make_llama(seed=4).save_pretrained(foreign)
    assert evaluated(foreign, [file], cache).sets["some-text"].nats != summary.nats


def test_options_of_a_score(foreign: Path, cache: Path, tmp_path: Path) -> None:
    texts = new_text(10, 5)
    file = tmp_path / "text.txt"
    file.write_text("\n".join(t.replace("\n", " ") for t in texts))
    assert evaluated(foreign, [file], cache, document_unit="lines").sets["text"].documents == 10
    assert evaluated(foreign, [file], cache, document_unit="file").sets["text"].documents == 1
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"abstract": t, "text": "no"}) + "\n" for t in texts))
    assert evaluated(foreign, [rows], cache, column="abstract").sets["rows"].documents == 10
    short_context, long_context = (evaluated(foreign, [rows], cache, column="abstract", context=c) for c in (8, 128))
    assert short_context.context == 8
    a, b = (x.sets["rows"] for x in (short_context, long_context))
    assert a.tokens == b.tokens
    assert a.nats != b.nats
    twice = evaluated(foreign, [file, file], cache, document_unit="lines")
    assert set(twice.sets) == {"text", "text-2"}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("context", [129, 1, 0, -3])
def test_a_context_that_cannot_be(foreign: Path, cache: Path, base: Path, context: int) -> None:
    with pytest.raises(ModelError, match=r"--context: a context of .* does not fit[\s\S]*2 to 128"):
        evaluated(foreign, [base / "new.jsonl"], cache, context=context)


def test_a_cut_of_documents_that_does_not_exist(foreign: Path, cache: Path, base: Path) -> None:
    with pytest.raises(
        StageError,
        match=r"--document-unit: there is no document unit 'words'[\s\S]*auto, file, passages, paragraphs, lines",
    ):
        evaluated(foreign, [base / "new.jsonl"], cache, document_unit="words")


def test_text_that_is_not_there(foreign: Path, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt"):
        evaluated(foreign, [tmp_path / "nowhere.txt"], cache)


# -- models -----------------------------------------------------------------------------------------------------------


def test_models_of_one_tokenizer_are_paired_token_by_token(
    foreign: Path, base: Path, cache: Path, tmp_path: Path
) -> None:
    texts = short(new_text(40, 6))
    file = write_jsonl(tmp_path / "text.jsonl", texts)
    found = compare_models([str(base / "base"), str(foreign)], [str(file)], cache=cache)
    first, second = found.rows
    assert first.change is None and isinstance(second.change, LossChange)
    (a, tokens), (b, _) = by_hand(base / "base", texts), by_hand(foreign, texts)
    assert second.change.difference == pytest.approx((b.sum() - a.sum()) / tokens.sum(), rel=1e-3)
    assert second.change.low < second.change.difference < second.change.high
    same = compare_models([str(base / "base")] * 2, [str(file)], cache=cache).rows[1].change
    assert isinstance(same, LossChange)
    assert same.difference == same.low == same.high == 0
    assert same.verdict == "kept"


def byte_model(folder: Path) -> Path:
    """Another tokenizer: bytes, and a BOS before every text."""
    tokenizer = make_tokenizer(258, bos=True)
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.bos_token_id)]
    )
    save_pretrained(make_llama(seed=5), tokenizer, folder, dtype=torch.float32)
    return folder


def test_models_of_two_tokenizers_are_paired_document_by_document_in_bits_per_byte(
    base: Path, cache: Path, tmp_path: Path
) -> None:
    other = byte_model(tmp_path / "bytes")
    # Among them documents of a single token for one tokenizer and of two for the other: a pair must stay a pair.
    texts = [*short(old_text(40, 8)), *"abcdefghij"]
    file = write_jsonl(tmp_path / "text.jsonl", texts)
    found = compare_models([str(base / "base"), str(other)], [str(file)], cache=cache)
    assert "another tokenizer" in render.model_comparison_text(found)
    change = found.rows[1].change
    assert isinstance(change, BitsPerByteChange)
    difference, low, high = change.bits_per_byte
    kept = texts[:40]  # what both can score
    (a, _), (b, _) = by_hand(base / "base", kept), by_hand(other, kept)
    sizes = np.array([len(t.encode()) for t in kept])
    bits_a, bits_b = a / math.log(2), b / math.log(2)
    assert difference == pytest.approx((bits_b.sum() - bits_a.sum()) / sizes.sum(), rel=1e-4)
    # The interval is that of pairs; taken at random the pairs are far more spread.
    rng = np.random.default_rng(0)

    def width(pairs: np.ndarray) -> float:
        drawn = rng.integers(0, 40, (2000, 40))
        values = pairs[drawn].sum(1) / sizes[drawn].sum(1)
        return float(np.subtract(*np.quantile(values, [0.975, 0.025])))

    assert high - low == pytest.approx(width(bits_b - bits_a), rel=0.15)
    assert width(bits_b - np.roll(bits_a, 1)) > 1.5 * (high - low)


def test_one_model_is_no_comparison(base: Path, cache: Path) -> None:
    with pytest.raises(StageError, match="two or more models"):
        compare_models([str(base / "base")], [str(base / "new.jsonl")], cache=cache)


# -- runs -------------------------------------------------------------------------------------------------------------


def test_runs_of_one_start_are_paired_on_what_they_held_out(runs: LineageRuns, tmp_path: Path) -> None:
    found = compare_runs([runs.naive, runs.replay])
    write_page(found, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")
    scores = [before_after.read_scores(run / "scores" / "after.npz") for run in (runs.naive, runs.replay)]
    for item in found.paired:
        a, b = (s[item.set] for s in scores)
        assert item.difference == pytest.approx((b.nats_W.sum() - a.nats_W.sum()) / a.tokens_W.sum())
        assert item.low < item.difference < item.high
    old = next(item for item in found.paired if item.set == "old-heldout")
    assert old.high < 0  # replay forgets less
    assert {item.against for item in found.paired} == {"two"}


def test_runs_that_cannot_be_compared(runs: LineageRuns, base: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"start from different models[\s\S]*--text FILE"):
        compare_runs([runs.first, runs.naive])
    with pytest.raises(StageError, match="is not a run folder"):
        compare_runs([runs.naive, base / "base"])
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    (stopped / "record.json").write_text(json.dumps({**read_record(runs.naive).as_json(), "changes": {}}))
    with pytest.raises(StageError, match="has not finished"):
        compare_runs([runs.naive, stopped])
    record = read_record(runs.naive)
    record.fingerprints.sets["old-heldout"] = "other"
    write_record(stopped, record)
    with pytest.raises(StageError, match=r"'old-heldout' of .*stopped differs from that of"):
        compare_runs([runs.naive, stopped])


# -- a lineage --------------------------------------------------------------------------------------------------------


def test_a_lineage_measures_what_no_run_did(runs: LineageRuns, tmp_path: Path) -> None:
    found = trace_lineage(runs.naive, cache=runs.cache)
    write_page(found, tmp_path / "page.html")
    one, two = read_record(runs.first), read_record(runs.naive)
    names = [s.name for s in found.sets]
    assert names == ["old-heldout", "new-heldout"]
    assert [s.learnt_at for s in found.sets] == [1, 2]
    matrix = np.array(found.R)
    old, new = matrix[:, 0], matrix[:, 1]
    assert old[:2].tolist() == [getattr(one.scores, w)["old-heldout"].nats for w in ("before", "after")]
    assert old[2] == two.scores.after["old-heldout"].nats
    assert new[1:].tolist() == [getattr(two.scores, w)["new-heldout"].nats for w in ("before", "after")]
    assert not np.isnan(matrix).any()  # one cell no run had measured: the start model on the text of stage 2
    summary = found.summary
    assert pytest.approx(-(old[2] + new[2]) / 2) == summary.ACC
    assert pytest.approx(-(old[2] - old[1])) == summary.BWT
    assert summary.BWT < 0  # the naive stage forgot
    assert pytest.approx(new[0] - new[1]) == summary.FWT
    assert summary.forgetting == pytest.approx(-summary.BWT)
    json.dumps(found.model_dump(mode="json"), allow_nan=False)
    assert (tmp_path / "page.html").exists()


def test_the_cell_that_was_missing_is_the_start_model_on_that_text(runs: LineageRuns, base: Path, cache: Path) -> None:
    found = trace_lineage(runs.naive, cache=runs.cache)
    alone = evaluate(str(base / "base"), [str(base / "new-heldout.jsonl")], context=32, cache=cache)
    assert found.R[0][1] == pytest.approx(alone.sets["new-heldout"].nats, rel=1e-5)


def test_a_lineage_that_moved_is_still_one(runs: LineageRuns, tmp_path: Path) -> None:
    os.symlink(runs.folder, tmp_path / "moved")
    found = trace_lineage(tmp_path / "moved" / "replay", cache=runs.cache)
    assert [s.name for s in found.stages] == ["start", "one", "replay"]
    naive = trace_lineage(runs.naive, cache=runs.cache)
    assert found.summary.BWT is not None and naive.summary.BWT is not None
    assert found.summary.BWT > naive.summary.BWT
