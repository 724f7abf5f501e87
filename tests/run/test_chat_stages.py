"""Chat: a base model leaves with the template it was trained with, and is asked through it by everyone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from postgrad.cli.chat import run_chat
from postgrad.cli.render import generation_text
from postgrad.commands import generate
from postgrad.commands.export import export_model
from postgrad.data.render.chat import PLAIN_TEMPLATE, custom_template, plain_template
from postgrad.errors import ModelError
from postgrad.models.location import locate_model
from postgrad.models.pretrained import load_tokenizer
from tests.conftest import make_llama
from tests.tiny_stages import QUICK_EVALUATION, Workspace, bos_tokenizer, make_workspace, save_model

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.0, "top_p": 1.0, "seed": 0}
TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
CHATML = TURNS + "{% if add_generation_prompt %}<|assistant|>{% endif %}"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    found = make_workspace(tmp_path_factory.mktemp("shelf"), tmp_path_factory.getbasetemp() / "cache")
    tokenizer = bos_tokenizer()
    save_model(make_llama(vocab_size=len(tokenizer)), tokenizer, found.folder / "bos")
    asked = bos_tokenizer()
    asked.chat_template = CHATML
    save_model(make_llama(vocab_size=len(asked)), asked, found.folder / "asked")
    return found


def stage_of(
    shelf: Workspace, model: str, rows: str = "chat", tuning: dict[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    name = changes.pop("name", f"{model}-{rows}" + (f"-{tuning['kind']}" if tuning else ""))
    learned = [{"name": rows, "path": shelf.file(rows, held_out=True), "same_format_as": rows}]
    return shelf.stage(
        name, tuning, model=model, sources=[shelf.source(rows, held_out=0.0)], tokens=300,
        evaluation={**QUICK_EVALUATION, "learned": [{**learned[0], "name": "held-out"}]},
        data={"sequence_length": 96}, **changes,
    )  # fmt: skip


def first_turns(shelf: Workspace, rows: str) -> list[dict[str, str]]:
    """The conversation of the first row, without its last answer."""
    row = json.loads(Path(shelf.file(rows)).read_text().splitlines()[0])
    return row["messages"][:-1] if rows == "chat" else [{"role": "user", "content": row["instruction"]}]


@pytest.mark.parametrize("rows", ["chat", "instruction"])
@pytest.mark.parametrize("model", ["llama", "bos"])
def test_what_a_published_model_is_asked_with_is_what_it_was_trained_with(
    shelf: Workspace, model: str, rows: str
) -> None:
    raw = stage_of(shelf, model, rows)
    done = shelf.run(raw)
    tokenizer = AutoTokenizer.from_pretrained(done.run_folder / "model")
    assert tokenizer.chat_template == plain_template("<s>" * (model == "bos"))
    asked = tokenizer.apply_chat_template(
        first_turns(shelf, rows), add_generation_prompt=True, tokenize=True, return_dict=False
    )
    plan = shelf.plan(raw)
    store = plan.data.sources[0].store
    trained, marks = store.read(0), store.marks(0)
    assert marks is not None and asked == trained[: int(np.flatnonzero(marks)[0])].tolist()
    assert trained[0] == tokenizer.bos_token_id or model == "llama"
    assert trained[-1] == tokenizer.eos_token_id and marks[-1] == 1
    for checkpoint in (done.run_folder / "checkpoints").iterdir():
        assert AutoTokenizer.from_pretrained(checkpoint).chat_template == tokenizer.chat_template


def test_a_template_of_its_own_stays_and_text_brings_none(shelf: Workspace) -> None:
    kept = shelf.run(stage_of(shelf, "asked"))
    assert AutoTokenizer.from_pretrained(kept.run_folder / "model").chat_template == CHATML
    for rows in ("pair", "completion"):  # nobody was asked anything
        plain = shelf.run(stage_of(shelf, "llama", rows))
        assert AutoTokenizer.from_pretrained(plain.run_folder / "model").chat_template is None


def test_a_later_stage_words_its_rows_alike(shelf: Workspace) -> None:
    """Its scores stand in one column with those before: the same words, tokens and fingerprints."""
    for model in ("llama", "bos"):
        first = shelf.run(stage_of(shelf, model))
        one, two = (
            shelf.plan(stage_of(shelf, model)),
            shelf.plan(stage_of(shelf, f"runs/{first.run_folder.name}", name="then")),
        )
        assert two.model.tokenizer.chat_template == plain_template("<s>" * (model == "bos"))
        assert [h.fingerprint for h in one.evaluation.sets] == [h.fingerprint for h in two.evaluation.sets]
        assert one.data.sources[0].store.fingerprint == two.data.sources[0].store.fingerprint
        completion = [
            shelf.plan(stage_of(shelf, m, "completion", name="c")) for m in (model, f"runs/{first.run_folder.name}")
        ]
        assert len({plan.data.sources[0].store.fingerprint for plan in completion}) == 1


def test_the_template_stays_with_a_tuning_and_what_it_is_exported_to(
    shelf: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = shelf.run(stage_of(shelf, "bos", tuning={"kind": "lora", "rank": 2}))
    checkpoint = next((done.run_folder / "checkpoints").iterdir())
    for folder in (done.run_folder, done.run_folder / "model", checkpoint):
        assert load_tokenizer(locate_model(str(folder), shelf.folder)).chat_template == plain_template("<s>")
    assert AutoTokenizer.from_pretrained(shelf.folder / "bos").chat_template is None
    monkeypatch.chdir(shelf.folder)
    export_model(str(done.run_folder), shelf.folder / "exported", "auto")
    assert AutoTokenizer.from_pretrained(shelf.folder / "exported").chat_template == plain_template("<s>")
    # A later tuning without words of its own keeps those below.
    later = shelf.run(
        stage_of(
            shelf,
            "runs/bos-chat-lora",
            "pair",
            {"kind": "prompt", "length": 2},
            name="later",
        )
    )
    assert load_tokenizer(locate_model(str(later.run_folder), shelf.folder)).chat_template == plain_template("<s>")


def test_which_template_is_its_own() -> None:
    assert custom_template(None) is None
    assert custom_template(plain_template("<s>")) is custom_template(plain_template("")) is None
    assert custom_template("x") == "x" and custom_template({}) is None
    assert custom_template({"default": "x", "tool_use": "y"}) == {"default": "x", "tool_use": "y"}
    assert custom_template(PLAIN_TEMPLATE + " ") == PLAIN_TEMPLATE + " "


# -- on the terminal ---------------------------------------------------------------------------------------------------


def talk(monkeypatch: pytest.MonkeyPatch, models: list[str], said: list[str], **options: Any) -> None:
    lines = iter([*said, ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    chat = options.pop("chat", True)
    run_chat(models, generate.SamplingOptions(**{**GREEDY, **options}), chat=chat)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch, shelf: Workspace) -> list[str]:
    """What models read, as text, in the order in which they read it."""
    monkeypatch.chdir(shelf.folder)
    out: list[str] = []
    plain = generate._generate_text

    def spy(writer: Any, ids: np.ndarray, options: Any) -> str:
        out.append(writer.tokenizer.decode(ids))
        return plain(writer, ids, options)

    monkeypatch.setattr(generate, "_generate_text", spy)
    return out


def test_a_model_with_a_template_hears_the_conversation(
    shelf: Workspace, monkeypatch: pytest.MonkeyPatch, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    done = shelf.run(stage_of(shelf, "bos"))
    folder = done.run_folder / "model"
    talk(monkeypatch, [str(done.run_folder)], ["one and two", "and?"])
    printed = capsys.readouterr().out
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    messages: list[dict[str, str]] = []
    for said, read in zip(["one and two", "and?"], given, strict=True):
        messages.append({"role": "user", "content": said})
        ids = torch.tensor([tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)])
        assert read == tokenizer.decode(ids[0])
        assert ids[0].tolist().count(tokenizer.bos_token_id) == 1
        whole = {"attention_mask": torch.ones_like(ids), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
        out = model.generate(ids, max_new_tokens=6, do_sample=False, **whole)
        answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert f"{answer}\n\n" in printed
        messages.append({"role": "assistant", "content": answer})


def test_others_go_on_from_the_text_and_so_does_each_that_is_told_to(
    shelf: Workspace, monkeypatch: pytest.MonkeyPatch, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    done = shelf.run(stage_of(shelf, "llama"))
    talk(monkeypatch, [str(done.run_folder), "llama"], ["one and"])
    assert given == ["### User:\none and\n\n### Assistant:\n", "one and"]
    given.clear()
    talk(monkeypatch, [str(done.run_folder)], ["one and"], chat=False)
    assert given == ["one and"]
    given.clear()
    found = generate.generate([str(done.run_folder)], "one and", **GREEDY)
    assert given == ["one and"] and generation_text(found).startswith("one and")
    given.clear()
    found = generate.generate([str(done.run_folder)], "one and", chat=True, **GREEDY)
    assert given == ["### User:\none and\n\n### Assistant:\n"] and not generation_text(found).startswith("one and")
    with pytest.raises(ModelError, match="has no chat template"):
        generate.generate(["llama"], "one and", chat=True, **GREEDY)
    capsys.readouterr()


def test_what_no_longer_fits_is_left_out_from_the_beginning(
    shelf: Workspace, monkeypatch: pytest.MonkeyPatch, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    done = shelf.run(stage_of(shelf, "llama"))
    said = [f"one and two and three and four {n}" for n in range(9)]
    talk(monkeypatch, [str(done.run_folder)], said, max_new_tokens=8)
    assert len(given) == 9
    tokenizer = AutoTokenizer.from_pretrained(done.run_folder / "model")
    assert all(len(tokenizer(text)["input_ids"]) + 8 <= 128 for text in given)
    assert said[0] in given[1] and said[0] not in given[8] and said[8] in given[8] and said[7] in given[8]
    given.clear()
    capsys.readouterr()
    talk(monkeypatch, [str(done.run_folder)], ["one and two " * 60, "one"])
    assert "error: --prompt: the prompt has" in capsys.readouterr().out
    assert given[-1] == "### User:\none\n\n### Assistant:\n"  # what was too long is forgotten


def test_an_encoder_decoder_answers_behind_its_own_eos(
    shelf: Workspace, monkeypatch: pytest.MonkeyPatch, given: list[str]
) -> None:
    done = shelf.run(stage_of(shelf, "t5", objectives=[{"kind": "text-to-text", "target_length": 16}]))
    talk(monkeypatch, [str(done.run_folder)], ["one and"])
    assert given == ["### User:\none and\n\n### Assistant:\n</s>"]
