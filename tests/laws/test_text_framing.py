"""The law: wherever a text becomes ids, they are those of the tokenizer's own call, whatever its form."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    MBartConfig,
    MBartForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from postgrad.commands import grow
from postgrad.commands.export import export_model
from postgrad.commands.generate import load_text_models
from postgrad.commands.grow import grow_vocabulary
from postgrad.commands.score_files import load_documents, load_model_inputs
from postgrad.data.layouts.rows import IGNORED
from postgrad.data.layouts.seq2seq import Seq2SeqRows
from postgrad.data.tokens.encoder import Encoder
from postgrad.data.tokens.extend_vocabulary import ExtendedTokenizer, extend_vocabulary
from postgrad.errors import ModelError
from postgrad.evaluation.choices.loglikelihood import encode_item, score_choices
from postgrad.evaluation.held_out import HeldOutText
from postgrad.models import published_vocabulary
from postgrad.models.grow_embeddings import grow_embeddings
from postgrad.models.location import locate_model
from postgrad.models.model import wrap_model
from postgrad.models.pretrained import save_pretrained
from postgrad.plan.held_out_sets import make_held_out_set
from postgrad.plan.model_inputs import ModelInputs, unknown_notes
from postgrad.plan.objective_rows import make_rows
from tests.conftest import make_llama, new_text, old_text, write_jsonl
from tests.tiny_stages import make_t5, save_model, write_rows
from tests.tokenizer_forms import FORMS, Form

TEXTS = [*old_text(4, 5), *new_text(2, 6), "two", "Two <think> two</think> six", " six plus  two "]
DECODERS = [name for name, form in FORMS.items() if form.kind == "decoder"]
ENCODER_DECODERS = [name for name in FORMS if name not in DECODERS]
GROWABLE = [name for name in DECODERS if name not in ("unigram", "word pieces")]


def make_form_model(form: Form, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A tiny model with as many rows as tokens."""
    size, start = len(tokenizer), tokenizer.eos_token_id
    if form.kind == "decoder":
        small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        return make_llama(vocab_size=size, num_key_value_heads=1, bos_token_id=None, eos_token_id=start, **small)
    if form.kind == "t5":
        model: PreTrainedModel = make_t5(size)
    else:
        config_class, model_class = {
            "bart": (BartConfig, BartForConditionalGeneration),
            "mbart": (MBartConfig, MBartForConditionalGeneration),
        }[form.kind]
        ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": start, "bos_token_id": tokenizer.bos_token_id}
        sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in
                 (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))}  # fmt: skip
        begins = start if form.kind == "bart" else tokenizer.convert_tokens_to_ids("<a>")
        torch.manual_seed(0)
        config = config_class(
            vocab_size=size, d_model=16, max_position_embeddings=128, decoder_start_token_id=begins, **ids, **sizes
        )
        model = model_class(config).eval()
    forced = tokenizer.convert_tokens_to_ids(form.forced) if form.forced else None
    model.generation_config.forced_bos_token_id = forced
    return model


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("forms")

    def folder(name: str) -> Path:
        out = root / name.replace(" ", "-")
        if not out.exists():
            tokenizer = FORMS[name].make()
            save_model(make_form_model(FORMS[name], tokenizer), tokenizer, out)  # type: ignore[arg-type]
        return out

    return folder


def calls(folder: Path, texts: list[str], **options: bool) -> list[list[int]]:
    return AutoTokenizer.from_pretrained(folder)(texts, **options)["input_ids"]


def without_end(folder: Path, texts: list[str]) -> list[list[int]]:
    """The tokenizer's own ids without the special tokens behind a text, which a decoder goes on from."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(texts)
    out = []
    for number, ids in enumerate(encoded["input_ids"]):
        is_text = [i for i, sequence in enumerate(encoded.sequence_ids(number)) if sequence == 0]
        out.append(ids[: is_text[-1] + 1])
    return out


def read(folder: Path) -> ModelInputs:
    return load_model_inputs(locate_model(str(folder), folder), 128)


def mismatched_places(folder: Path, tmp_path: Path, inputs: ModelInputs) -> set[str]:
    """The places where a decoder reads other ids than those of the tokenizer's own call."""
    tokenizer, file = AutoTokenizer.from_pretrained(folder), write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    expected = without_end(folder, TEXTS)
    start = locate_model(str(folder), folder)
    (held_out, problem), = load_documents(start, [str(file)], "auto", None, inputs, tmp_path / "cache")  # fmt: skip
    ended = [[*ids, inputs.encoder.eos] for ids in expected]
    out = set()
    if [held_out.store.read(i).tolist() for i in range(len(TEXTS))] != ended:
        out.add("stored documents")
    prefix = len(inputs.encoder.prefix_ids)
    rows = make_rows(held_out.objective, held_out.store, replace(inputs, length=9))
    labels = [label for i in range(len(rows)) for label in rows.get_row(i, 0).labels.tolist() if label != IGNORED]
    if labels != [token for ids in ended for token in ids[max(1, prefix) :]]:
        out.add("labels")
    text = make_held_out_set(held_out, inputs, 10_000, [], problem=problem)
    assert isinstance(text, HeldOutText)
    if sorted(ids.tolist() for ids in text.documents) != sorted(ids for ids in expected if len(ids) > max(1, prefix)):
        out.add("held-out text")
    for question, answer in ((TEXTS[0][:9], " and two."), ("", "two"), ("six", " 7;")):
        item = encode_item(tokenizer, inputs.special_frame, question, [answer], empty=inputs.empty_prompt)
        both = without_end(folder, [question + answer])[0]
        if question.strip() and [*item.context, *item.choices[0]] != both:
            out.add("choices")
        if item.context[:prefix] != tuple(both[:prefix]) or (prefix and not question and len(item.context) > prefix):
            out.add("questions")
    if [list(inputs.encode_prompt(text)) for text in TEXTS] != expected:
        out.add("prompts")
    return out


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_reads_the_tokenizers_own_ids(shelf: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    folder = shelf(name)
    assert mismatched_places(folder, tmp_path, read(folder)) == set()


@pytest.mark.parametrize("name", ["bos", "two in front", "a bos without a name", "BERT's processor"])
def test_a_prefix_of_one_named_token_would_be_found(shelf: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    """The mutants: no special tokens before a text, and only the named BOS."""
    folder = shelf(name)
    inputs = read(folder)
    bos = inputs.tokenizer.bos_token_id
    for wrong in {(), () if bos is None else (bos,)} - {inputs.encoder.prefix_ids}:
        encoder = Encoder(inputs.encoder.tokenizer, wrong, inputs.encoder.eos, inputs.encoder.vocabulary)
        found = mismatched_places(folder, tmp_path / str(len(wrong)), replace(inputs, encoder=encoder))
        assert {"stored documents", "held-out text", "choices", "prompts"} <= found


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_an_encoder_decoder_reads_the_tokenizers_own_ids(
    shelf: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    folder = shelf(name)
    inputs, tokenizer = read(folder), AutoTokenizer.from_pretrained(folder)
    pairs = [(f"say {a}", f"{a} and {b}") for a in ("one", "two six") for b in ("ten", "x1 = y2;")]
    file = write_rows(tmp_path / "rows.jsonl", [{"source": a, "target": b} for a, b in pairs])
    start = locate_model(str(folder), folder)
    (held_out, _), = load_documents(start, [str(file)], "auto", None, inputs, tmp_path / "cache")  # fmt: skip
    rows = make_rows(held_out.objective, held_out.store, inputs)
    assert isinstance(rows, Seq2SeqRows)
    config = load_text_models([str(folder)])[0].model.generation_config
    forced = [] if config.forced_bos_token_id is None else [config.forced_bos_token_id]
    for i, (source, target) in enumerate(pairs):
        row = rows.get_row(i, 0)
        labels = tokenizer(text_target=target)["input_ids"]
        labels = labels if labels[: len(forced)] == forced else forced + labels
        labels = labels if tokenizer.eos_token_id in labels else [*labels, tokenizer.eos_token_id]
        assert row.inputs["input_ids"].tolist() == tokenizer(source)["input_ids"]
        assert row.labels.tolist() == labels
        assert row.inputs["decoder_input_ids"].tolist() == [config.decoder_start_token_id, *labels[:-1]]
        # A prompt and a question are a source, and an answer is behind what every target begins with.
        assert list(inputs.encode_prompt(source)) == tokenizer(source)["input_ids"]
        item = encode_item(tokenizer, inputs.special_frame, source, [target], empty=inputs.empty_prompt, separate=True)
        assert list(item.context) == tokenizer(source)["input_ids"]
        answer = list(item.choices[0])
        assert row.inputs["decoder_input_ids"].tolist()[: len(inputs.decoder_prefix)] == list(inputs.decoder_prefix)
        assert labels[len(inputs.decoder_prefix) - 1 :][: len(answer)] == answer


@pytest.mark.parametrize("name", ["BART", "language code in front", "language code behind", "T5"])
def test_choices_are_scored_behind_what_every_target_begins_with(shelf: Callable[[str], Path], name: str) -> None:
    folder = shelf(name)
    inputs, pretrained = read(folder), load_text_models([str(folder)])[0].model
    question, answers = "say one", ["one and ten", "six", "two six"]
    options = {"empty": inputs.empty_prompt, "separate": True}
    item = encode_item(inputs.tokenizer, inputs.special_frame, question, answers, **options)  # type: ignore[arg-type]
    model = wrap_model(pretrained, inputs.task).eval()
    found = score_choices(model, [item], context=64, pad=inputs.pad_id, decoder_prefix=inputs.decoder_prefix)
    for number, answer in enumerate(answers):
        labels = inputs.tokenizer(text_target=answer)["input_ids"]
        begin = len(inputs.decoder_prefix) - 1
        with torch.no_grad():
            logits = pretrained(
                input_ids=torch.tensor([inputs.tokenizer(question)["input_ids"]]),
                decoder_input_ids=torch.tensor([[inputs.decoder_start, *labels[:-1]]]),
            ).logits.log_softmax(-1)[0]
        own = labels[begin : begin + len(item.choices[number])]
        expected = sum(float(logits[begin + i, token]) for i, token in enumerate(own))
        assert found.log_likelihoods[0][number] == pytest.approx(expected, abs=1e-4)
    # The mutant: the start token alone.
    other = score_choices(model, [item], context=64, pad=inputs.pad_id)
    assert np.allclose(other.log_likelihoods[0], found.log_likelihoods[0]) is (len(inputs.decoder_prefix) == 1)


@pytest.mark.parametrize("name", ["BART", "language code in front"])
def test_what_generation_forces_and_the_tokenizer_contradicts_is_refused(
    shelf: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    tokenizer = FORMS[name].make()
    model = make_form_model(replace(FORMS[name], forced="<b>"), tokenizer)
    save_model(model, tokenizer, tmp_path / "model")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="begins every answer with <b>"):
        _ = read(tmp_path / "model").target_frame


def changed_ids(old: Path, new: Path) -> set[str]:
    """Tokens that another folder gives another id or row, and texts of old tokens that it reads otherwise."""
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (old, new))
    tables = [
        AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight.detach() for folder in (old, new)
    ]
    ids, new_ids = before.get_vocab(), after.get_vocab()
    out = {token for token, number in ids.items() if new_ids[token] != number}
    out |= {token for token, number in ids.items() if not torch.equal(tables[0][number], tables[1][new_ids[token]])}
    owners = np.bincount(list(new_ids.values()))
    out |= {token for token, number in new_ids.items() if owners[number] > 1}
    texts = [*TEXTS, *before.all_special_tokens, "".join(before.all_special_tokens)]
    known = set(ids.values())  # a text with a new token is another one by intention
    pairs = [(before(text)["input_ids"], after(text)["input_ids"]) for text in texts]
    return out | {
        text for text, (one, other) in zip(texts, pairs, strict=True) if one != other and known.issuperset(other)
    }


# -- text that a vocabulary lacks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["unigram", "word pieces"])
def test_unknown_text_is_told_and_not_scored(shelf: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    folder = shelf(name)
    inputs, start = read(folder), locate_model(str(folder), folder)
    file = write_jsonl(tmp_path / "texts.jsonl", ["one and two", "six 漢 two 字", "漢"])
    (held_out, problem), = load_documents(start, [str(file)], "auto", None, inputs, tmp_path / "cache")  # fmt: skip
    notes: list[str] = []
    text = make_held_out_set(held_out, inputs, 10_000, notes, problem=problem)
    assert isinstance(text, HeldOutText) and inputs.unknown_id is not None
    rows = [row for _, row in text.iter_rows(64)]
    labels = [label for row in rows for label in row.labels.tolist() if label != IGNORED]
    every = [token for document in text.documents for token in document[text.lead :].tolist()]
    assert labels == [token for token in every if token != inputs.unknown_id] and len(labels) < len(every)
    assert text.tokens == len(labels) == sum(row.label_count for row in rows)
    assert len(text) == 2, "a document of unknown text alone has nothing to score"
    assert len(notes) == 1 and "they are scored apart" in notes[0]
    told = unknown_notes(inputs.tokenizer, inputs.encoder, {"texts": held_out.store})
    assert len(told) == 1 and inputs.tokenizer.unk_token in told[0]
    # The mutant: all of it is scored.
    assert replace(text, unknown_id=None).tokens == len(every)
    assert unknown_notes(inputs.tokenizer, inputs.encoder, {}) == []


STRANGE = [f"quoxel zymurgy {number} breltify" for number in range(12)]


@pytest.mark.parametrize("name", GROWABLE)
def test_a_grown_vocabulary_keeps_every_old_token(shelf: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "new.jsonl", STRANGE)
    grown = grow_vocabulary(str(shelf(name)), [str(file)], tmp_path / "grown", tokens=12)
    assert changed_ids(shelf(name), grown.folder) == set()
    tokenizer = AutoTokenizer.from_pretrained(grown.folder)
    assert "quoxel zymurgy" in tokenizer.decode(tokenizer("quoxel zymurgy")["input_ids"])
    assert len(calls(grown.folder, STRANGE[:1])[0]) < len(calls(shelf(name), STRANGE[:1])[0])


@pytest.mark.parametrize("name", ["nothing", "bos", "a word added behind"])
def test_a_token_that_moves_is_never_published(
    shelf: Callable[[str], Path], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant: added tokens that the vocabulary does not have, so that new words get their ids."""

    def extend(tokenizer_json: str, texts: list[str], limit: int) -> ExtendedTokenizer:
        extended = extend_vocabulary(tokenizer_json, texts, limit)
        config = json.loads(extended.tokenizer_json)
        for token in config["added_tokens"]:
            config["model"]["vocab"].pop(token["content"], None)
        return replace(extended, tokenizer_json=json.dumps(config))

    file = write_jsonl(tmp_path / "new.jsonl", STRANGE)
    monkeypatch.setattr(grow, "extend_vocabulary", extend)
    with pytest.raises(ModelError, match="instead of"):
        grow_vocabulary(str(shelf(name)), [str(file)], tmp_path / "refused", tokens=12)
    assert not (tmp_path / "refused").exists()
    monkeypatch.setattr(published_vocabulary, "verify_ids", lambda *_: None)
    monkeypatch.setattr(published_vocabulary, "_verify_texts", lambda *_: None)
    grown = grow_vocabulary(str(shelf(name)), [str(file)], tmp_path / "grown", tokens=12)
    assert {"</s>", "<pad>"} <= changed_ids(shelf(name), grown.folder)


def test_a_row_that_changes_is_never_published(
    shelf: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutants: a row of an old token that moves, and a table that is written otherwise."""
    file = write_jsonl(tmp_path / "new.jsonl", STRANGE)

    def fill(model: PreTrainedModel, *arguments: object) -> None:
        grow_embeddings(model, *arguments)  # type: ignore[arg-type]
        model.get_input_embeddings().weight.data[3] += 1

    with monkeypatch.context() as patch:
        patch.setattr(grow, "grow_embeddings", fill)
        with pytest.raises(ModelError, match="rows of old tokens"):
            grow_vocabulary(str(shelf("bos")), [str(file)], tmp_path / "refused", tokens=12)

    def save(model: PreTrainedModel, *arguments: Any, **options: Any) -> None:
        state = {name: tensor.roll(1, 0) if tensor.ndim == 2 else tensor for name, tensor in model.state_dict().items()}
        save_pretrained(model, *arguments, **{**options, "state": state})

    monkeypatch.setattr(published_vocabulary, "save_pretrained", save)
    with pytest.raises(ModelError, match="embedding differs"):
        export_model(str(shelf("bos")), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("name", DECODERS)
def test_an_exported_folder_reads_every_text_alike(shelf: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    exported = export_model(str(shelf(name)), tmp_path / "exported")
    assert changed_ids(shelf(name), exported.folder) == set()
    for options in ({}, {"add_special_tokens": False}):
        assert calls(exported.folder, TEXTS, **options) == calls(shelf(name), TEXTS, **options)
