"""Rows of every kind as a model sees them, held against what was worked out by hand (`golden/`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from postgrad.config.stage_file import parse_stage
from postgrad.data.layouts import packed_text
from postgrad.data.layouts.rows import IGNORED, Row
from postgrad.data.loading import batch
from postgrad.data.loading.batch import collate
from postgrad.data.read.examples import KINDS
from postgrad.models.pretrained import save_pretrained
from postgrad.plan.plan import Plan, make_plan
from tests.conftest import make_llama

FILES = sorted((Path(__file__).parent / "golden").glob("*.json"))
TOKENIZERS = ("none", "bos", "pad-eos")
OBJECTIVES = {"decoder": "next-token", "encoder-decoder": "text-to-text", "class": "classify"}
CASES = [(file.stem, sort, name) for file in FILES for sort in OBJECTIVES for name in TOKENIZERS]
CASES = [case for case in CASES if case[1] in json.loads((FILES[0].parent / f"{case[0]}.json").read_text())]
WORDS = """one two three four five six plus is say which who yes no A B A. B. Answer: answer: question: context: sentence:
label: ### User: Assistant:"""
VOCABULARY = ["<unk>", "<s>", "</s>", "<pad>", "<start>", *WORDS.split()]
"""The first is 0, which fills packed rows up."""


def golden(kind: str) -> dict[str, Any]:
    return json.loads((FILES[0].parent / f"{kind}.json").read_text())


def made_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Words at white space; with a BOS that it sets by itself, or padding with its own EOS."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if name == "bos":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>" if name == "bos" else None,
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>" if name == "pad-eos" else "<pad>",
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each sort with each tokenizer."""
    folder = tmp_path_factory.mktemp("golden")
    size = {"vocab_size": len(VOCABULARY)}
    for name in TOKENIZERS:
        tokenizer = made_tokenizer(name)
        pad = tokenizer.pad_token_id
        bert = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        t5 = {"d_model": 8, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1, "decoder_start_token_id": 4}
        for sort, model in (
            ("decoder", make_llama(**size, eos_token_id=2, pad_token_id=pad)),
            ("class", BertForMaskedLM(BertConfig(**size, **bert, pad_token_id=pad))),
            ("encoder-decoder", T5ForConditionalGeneration(T5Config(**size, **t5, pad_token_id=pad, eos_token_id=2))),
        ):
            save_pretrained(model, tokenizer, folder / f"{sort}-{name}", dtype=torch.float32)
    return folder


def planned(home: Path, kind: str, sort: str, name: str, cache: Path, **objective: Any) -> Plan:
    rows = golden(kind)["rows"]
    if kind == "input_ids":
        rows = [{"input_ids": [VOCABULARY.index(word) for word in row["input_ids"].split()]} for row in rows]
    (home / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = {"labelled": {"sentence": "six", "label": "no"}, "tagged": {"tokens": ["six"], "tags": ["A"]}}
    other = held[kind] if sort == "class" else {"text": "six six"}
    (home / "held.jsonl").write_text(json.dumps(other) + "\n")
    said = {"kind": kind} if kind == "labelled" else {}
    raw = {
        "name": "golden",
        "model": f"{sort}-{name}",
        "tokens": 10,
        "data": {
            "sequence_length": golden(kind)["length"],
            "sources": [{"name": "rows", "path": f"{kind}.jsonl", "held_out": 0, "max_passes": 100, **said}],
        },
        "objectives": [{"kind": OBJECTIVES[sort], **objective}],
        "batch": {"global_batch_size": 2},
        "schedule": {"kind": "constant", "peak": 1e-4},
        "evaluation": {"learned": [{"name": "held", "path": "held.jsonl", "kind": "auto"}], "samples": 0},
    }
    return make_plan(parse_stage(raw, "golden"), home, cache)


def words(ids: np.ndarray) -> list[str]:
    """Ids as words; 0 stays one."""
    return ["0" if i == 0 else VOCABULARY[i] for i in ids.tolist()]


def asked(labels: np.ndarray, names: list[str] = VOCABULARY) -> list[str]:
    return ["-" if i == IGNORED else names[i] for i in labels.tolist()]


def test_every_kind_of_rows_has_its_file() -> None:
    assert {file.stem for file in FILES} == set(KINDS)
    assert all(set(golden(file.stem)["decoder"]) == set(TOKENIZERS) for file in FILES)


def met(plan: Plan, sort: str) -> dict[str, Any]:
    """What a plan's rows are, as it is written down."""
    (rows,), (leaf,) = plan.data.rows, plan.data.sources
    made = collate(
        [rows.get_row(i, i) for i in range(len(rows))], [0] * len(rows), pad_token_id=plan.model.inputs.pad_id
    )
    inputs, labels = {key: tensor.numpy() for key, tensor in made.inputs.items()}, made.labels.numpy()
    if sort == "decoder":
        store = leaf.store
        marks = [store.marks(i) for i in range(len(store))]
        assert len(rows) == 1
        return {
            "stored": [words(store.read(i)) for i in range(len(store))],
            **({"marks": [m.astype(str).tolist() for m in marks]} if marks[0] is not None else {}),
            "ids": words(inputs["input_ids"][0]),
            "labels": asked(labels[0]),
            "positions": inputs["position_ids"][0].astype(str).tolist(),
        }
    found = {
        "reads": [words(row) for row in inputs["input_ids"]],
        "masks": [row.astype(str).tolist() for row in inputs["attention_mask"]],
    }
    if sort == "encoder-decoder":
        writes = [words(row) for row in inputs["decoder_input_ids"]]
        return {**found, "writes": writes, "labels": [asked(row) for row in labels]}
    assert plan.model.task_layer is not None
    return {**found, "labels": [asked(np.atleast_1d(row), list(plan.model.task_layer.labels)) for row in labels]}


def worked_out(kind: str, sort: str, name: str) -> dict[str, Any]:
    return {
        key: [line.split() for line in value] if isinstance(value, list) else value.split()
        for key, value in golden(kind)[sort][name].items()
    }


@pytest.mark.parametrize(("kind", "sort", "name"), CASES)
def test_rows_are_those_that_were_worked_out(home: Path, cache: Path, kind: str, sort: str, name: str) -> None:
    assert met(planned(home, kind, sort, name, cache), sort) == worked_out(kind, sort, name)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_rows_that_train_the_question_the_padding_or_no_end_would_be_caught(
    home: Path, cache: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutants, each at the only place where it shows."""
    everything = met(planned(home, "chat", "decoder", name, cache, train_on="all"), "decoder")
    wanted = worked_out("chat", "decoder", name)
    assert everything["labels"] != wanted["labels"] and everything["ids"] == wanted["ids"]
    with monkeypatch.context() as patch:
        patch.setattr(batch, "IGNORED", 2)
        padded = met(planned(home, "pair", "encoder-decoder", name, cache), "encoder-decoder")
    wanted = worked_out("pair", "encoder-decoder", name)
    assert padded["labels"] != wanted["labels"] and padded["reads"] == wanted["reads"]
    with monkeypatch.context() as patch:
        patch.setattr(packed_text.PackedRows, "get_row", without_ends)
        endless = met(planned(home, "text", "decoder", name, cache), "decoder")
    assert endless["labels"] != worked_out("text", "decoder", name)["labels"]


PACKED = packed_text.PackedRows.get_row


def without_ends(rows: packed_text.PackedRows, row: int, position: int) -> Row:
    made = PACKED(rows, row, position)
    return made._replace(labels=np.where(made.labels == 2, IGNORED, made.labels))
