"""Questions that a model asks itself: drawn where a user speaks or behind examples, answered, chosen to be various."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from postgrad.cli.render import synthesized_text
from postgrad.commands import synthesize_chat as chat_synthesis
from postgrad.commands.results import finish
from postgrad.commands.synthesize import (
    SynthesisProgress,
    SynthesisRequest,
    SynthesizedText,
    load_generator,
    summary_file,
)
from postgrad.commands.synthesize_chat import (
    FIRST_REQUEST,
    NEXT_REQUEST,
    ChatTemplate,
    Rehearsal,
    nearest_to_centers,
    select_diverse,
    synthesize_chat,
)
from postgrad.config.stage_file import parse_stage
from postgrad.data.read.files import RawSource
from postgrad.data.read.generated_text import get_generator_model
from postgrad.data.render.chat import plain_template
from postgrad.errors import DataError, ModelError, StageError
from postgrad.evaluation.generate_documents import GeneratedDocument
from postgrad.models.pretrained import save_chat_template, save_pretrained
from postgrad.plan.plan import make_plan
from tests.conftest import StageOf, make_llama, make_tokenizer, write_jsonl

WISH = SynthesisRequest(tokens=200, max_document_tokens=96, batch_size=8, max_repetition=0.9)
NUMBERS = ["one", "two", "three", "four", "five", "six"]
SIGNED = """\
{%- for message in messages %}<|begin|>{{ message["role"] }}
{{ message["content"] }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|begin|>assistant
{% endif %}"""
"""A template whose turns end in a special token."""


def conversations(count: int, seed: int) -> list[list[dict[str, str]]]:
    rng = random.Random(seed)
    out = []
    for _ in range(count):
        pair = rng.sample(NUMBERS, 2)
        asked, said = f"{pair[0]} and {pair[1]}", f"{pair[1]} and {pair[0]}."
        out.append([{"role": "user", "content": asked}, {"role": "assistant", "content": said}])
    return out


def chatting(folder: Path, template: str, seed: int, *, bos: bool = False) -> Path:
    """A tiny model that has learnt to ask and answer in a template."""
    tokenizer, model = make_tokenizer(bos=bos), make_llama(seed, max_position_embeddings=256)
    tokenizer.chat_template = template
    rows = [
        tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
        for messages in conversations(32, seed)
    ]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(200):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_pretrained(model.eval(), tokenizer, folder, dtype=torch.float32)
    save_chat_template(tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(chatting(tmp_path_factory.mktemp("plain") / "model", plain_template(""), 0))


@pytest.fixture(scope="session")
def signed(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(chatting(tmp_path_factory.mktemp("signed") / "model", SIGNED, 1, bos=True))


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def all_of(events: Iterator[SynthesisProgress | SynthesizedText]) -> SynthesizedText:
    return finish(events, SynthesizedText)


@pytest.mark.parametrize("which", ["plain", "signed"])
def test_a_model_asks_itself_and_answers(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    model, out = request.getfixturevalue(which), tmp_path / "replay.jsonl"
    last = all_of(synthesize_chat(model, out, WISH))
    found = rows(out)
    assert last.tokens >= WISH.tokens and len(found) == last.documents
    for row in found:
        question, answer = row["messages"]
        assert (question["role"], answer["role"]) == ("user", "assistant")
        assert "###" not in question["content"] and "<|" not in question["content"] + answer["content"]
        assert row["made"]["by"] == model and row["made"]["from"] == "template" and row["made"]["ended"]
    # It asks what it was asked, and has learnt to answer with the two numbers the other way round (by chance: 1 in 36).
    asked = [row["messages"][0]["content"].split(" and ") for row in found]
    known = [pair for pair in asked if len(pair) == 2 and set(pair) <= set(NUMBERS)]
    assert len(known) > 0.4 * len(asked)
    said = [row["messages"][1]["content"] for row in found]
    turned = [answer == f"{pair[1]} and {pair[0]}." for pair, answer in zip(asked, said, strict=True) if pair in known]
    assert np.mean(turned) > 0.1
    assert len({row["messages"][0]["content"] for row in found}) == len(found)  # near copies are left out
    assert "role: replay" in synthesized_text(last, [])


def test_where_a_user_speaks_is_found(plain: str, signed: str) -> None:
    turns = ChatTemplate(load_generator(plain, 96))
    assert turns.user_turn_affixes == ("### User:\n", "\n\n### Assistant:\n") and turns.user_end_tokens == set()
    turns = ChatTemplate(load_generator(signed, 96))
    assert turns.user_turn_affixes == ("<|begin|>user\n", "<|end|>\n<|begin|>assistant\n")
    assert turns.user_end_tokens == {turns.generator.tokenizer.convert_tokens_to_ids("<|end|>")}
    ids = turns.encode(turns.user_turn_affixes[0]).tolist()
    assert all(ids.count(token) == 1 for token in turns.generator.encoder.prefix_ids)  # the template's own


def test_a_stop_anywhere_makes_no_difference(plain: str, tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    rehearsal = Rehearsal(diverse_share=0.5)
    all_of(synthesize_chat(plain, whole, WISH, rehearsal))
    out = tmp_path / "stopped.jsonl"
    steps = synthesize_chat(plain, out, WISH, rehearsal)
    next(steps)
    steps.close()
    with (tmp_path / "stopped.jsonl.part").open("a") as file:
        file.write('{"messages": half a li')
    result = all_of(synthesize_chat(plain, out, WISH, rehearsal))
    assert out.read_bytes() == whole.read_bytes()
    state = json.loads(summary_file(out).read_text())
    assert state["chosen"] == len(rows(out)) == round(0.5 * state["documents"])
    assert "most diverse are kept" in synthesized_text(result, [])
    assert not list(tmp_path.glob("*.part*"))
    with pytest.raises(StageError, match="begun with another model or other options"):
        steps = synthesize_chat(plain, tmp_path / "other.jsonl", WISH)
        next(steps)
        steps.close()
        next(synthesize_chat(plain, tmp_path / "other.jsonl", WISH, Rehearsal(answer_model=plain, shots=2)))


def test_examples_are_shown_as_other_answers(plain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [messages[0]["content"] for messages in conversations(9, 5)]
    file = tmp_path / "few.jsonl"
    file.write_text("".join(json.dumps({"prompt": q, "completion": "x"}) + "\n" for q in questions))
    read: list[str] = []
    plainly = ChatTemplate.prompt_ids

    def watched(self: ChatTemplate, messages: Any) -> np.ndarray:
        read.append("\n".join(m["content"] for m in messages))
        return plainly(self, messages)

    monkeypatch.setattr(ChatTemplate, "prompt_ids", watched)
    steps = synthesize_chat(
        plain, tmp_path / "out.jsonl", replace(WISH, max_document_tokens=128), Rehearsal((str(file),), shots=2)
    )
    with pytest.raises((DataError, StopIteration)):  # so small a model asks nothing new in words it never saw
        for _ in range(200):
            next(steps)
    shown = [text.splitlines() for text in read if text.startswith(FIRST_REQUEST)]
    assert shown
    for first, one, second, other, last in shown:
        assert (first, second, last) == (FIRST_REQUEST, NEXT_REQUEST, NEXT_REQUEST)
        assert one != other or questions.count(one) > 1
        assert {one, other} <= set(questions)
    assert len({tuple(text) for text in shown}) > 3


def test_fewer_examples_are_shown_where_more_do_not_fit(plain: str) -> None:
    turns = ChatTemplate(load_generator(plain, 96))
    examples = ["one and two " * 12] * 3
    room = chat_synthesis._TokenBudget(20, 20, 60)
    ids = chat_synthesis._question_prompt(turns, WISH, Rehearsal(shots=3), examples, room, 0)
    assert len(ids) + room.question <= 256
    text = turns.generator.tokenizer.decode(ids)
    assert 1 <= text.count(examples[0].strip()) < 3
    with pytest.raises(DataError, match="does not fit"):
        chat_synthesis._question_prompt(turns, WISH, Rehearsal(shots=3), ["one and two " * 90], room, 0)


def test_another_model_answers(plain: str, signed: str, tmp_path: Path) -> None:
    out, alone = tmp_path / "both.jsonl", tmp_path / "alone.jsonl"
    all_of(synthesize_chat(plain, out, WISH, Rehearsal(answer_model=signed)))
    all_of(synthesize_chat(plain, alone, WISH))
    one, other = rows(out), rows(alone)
    assert all(row["made"]["answered_by"] == signed and row["made"]["by"] == plain for row in one)
    both = {row["made"]["number"]: row["messages"] for row in one}
    same = [(both[n], row["messages"]) for row in other if (n := row["made"]["number"]) in both]
    assert same and all(a[0] == b[0] for a, b in same)  # the questions are the first model's
    assert any(a[1] != b[1] for a, b in same)


def test_what_is_kept_is_various() -> None:
    rng = random.Random(0)
    groups = {"law": ["court", "judge", "appeal"], "food": ["oven", "butter", "flour"], "sea": ["ship", "wave", "sail"]}
    lines, of = [], {}
    for name, count in (("law", 60), ("food", 30), ("sea", 10)):
        for i in range(count):
            question = f"{name} {' '.join(rng.choices(groups[name], k=6))} {i}"
            of[question] = name
            lines.append(json.dumps({"messages": [{"role": "user", "content": question}]}) + "\n")
    rng.shuffle(lines)
    chosen = select_diverse(lines, share=0.3, seed=0)
    assert len(chosen) == 30 and [line for line in lines if line in set(chosen)] == chosen
    found = Counter(of[json.loads(line)["messages"][0]["content"]] for line in chosen)
    assert found["sea"] >= 2 and found["food"] >= 6 and found["law"] <= 21
    assert select_diverse(lines, share=1.0, seed=0) is lines
    assert select_diverse(lines, share=0.3, seed=0) == chosen


def test_what_is_nearest_to_its_own_centre_is_kept() -> None:
    """One of each sort: not the one that stands nearest to the other sort."""
    plainly = ["court judge appeal verdict", "oven butter flour sugar"]
    between = ["court judge appeal oven", "oven butter flour court"]
    questions = [*plainly * 6, *between]
    lines = [json.dumps({"messages": [{"role": "user", "content": question}]}) + "\n" for question in questions]
    chosen = [
        json.loads(line)["messages"][0]["content"] for line in select_diverse(lines, share=2 / len(lines), seed=0)
    ]
    assert sorted(chosen) == plainly


def test_clusters_have_their_part_and_the_nearest_come_first() -> None:
    cluster = np.array([0, 0, 0, 0, 1, 1, 2])
    distance = np.array([0.4, 0.1, 0.3, 0.2, 0.9, 0.5, 0.0])
    # 4/7 of 4 is 2.29, 2/7 is 1.14, 1/7 is 0.57: the largest remainder goes to the last.
    assert nearest_to_centers(cluster, distance, 4) == [1, 3, 5, 6]
    assert nearest_to_centers(cluster, distance, 7) == list(range(7))
    assert nearest_to_centers(cluster, -distance, 4) != [1, 3, 5, 6]  # a mutant that takes the farthest


def test_why_a_question_is_left_out() -> None:
    def tried(
        question: str = "one two", said: str = "three", asks: bool = True, ends: bool = True, loop: int = 1
    ) -> Any:
        new, answer = (
            GeneratedDocument(np.arange(9), asks),
            GeneratedDocument(np.concatenate([np.arange(20)] * loop), ends),
        )
        return chat_synthesis._rejection_reason(question, new, said, answer, replace(WISH, max_repetition=0.5))

    assert tried() is None and tried(loop=2) is None  # a third of the second is new, at the seam
    assert tried(asks=False) == "questions without an end"
    assert tried("one") == tried("") == "questions of fewer than two words"
    assert tried(ends=False) == "answers without an end"
    assert tried(said="") == "empty answers"
    assert tried(loop=5) == "repetitive"


def test_self_made_conversations_are_a_source(plain: str, stage_of: StageOf, tmp_path: Path) -> None:
    out = tmp_path / "replay.jsonl"
    all_of(synthesize_chat(plain, out, WISH))
    assert get_generator_model(RawSource("x", str(out), root=tmp_path, where="x")) == plain
    raw = stage_of(model=plain)
    raw["data"]["sources"][1] |= {"path": str(out), "max_passes": 100, "held_out": "20%"}
    raw["data"]["sequence_length"] = 64
    plan = make_plan(parse_stage(raw, "t"), tmp_path, tmp_path / "cache")
    source = plan.as_record().sources[1]
    assert source.kind == "chat" and source.generated_by == plain


def test_what_cannot_be_is_said(plain: str, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "replay.jsonl"
    with pytest.raises(ModelError, match="has no chat template"):
        next(synthesize_chat(str(base / "base"), out, WISH))
    few = write_jsonl(tmp_path / "few.jsonl", ["one?"])
    for wish, rehearsal, error, says in (
        (replace(WISH, prompt_tokens=3), Rehearsal(), StageError, "out of range"),
        (WISH, Rehearsal(diverse_share=0.0), StageError, "out of range"),
        (WISH, Rehearsal(shots=0), StageError, "out of range"),
        (replace(WISH, max_document_tokens=12), Rehearsal(), StageError, "leave no room"),
        (replace(WISH, max_document_tokens=1000), Rehearsal(), StageError, "do not fit"),
        (WISH, Rehearsal((str(few),)), DataError, "1 questions"),
        (WISH, Rehearsal(answer_model=str(base / "base")), ModelError, "has no chat template"),
        (WISH, Rehearsal(answer_model=str(tmp_path / "gone")), ModelError, "--answer: there is no folder"),
    ):
        with pytest.raises(error, match=says):
            next(synthesize_chat(plain, out, wish, rehearsal))
