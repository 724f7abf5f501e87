"""Rows that are broken, strange or too long: each ends in an error that names file and line, or is counted and told."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from postgrad.check.plan_text import plan_lines
from postgrad.data.layouts.rows import IGNORED
from postgrad.data.tokens import tokenize
from postgrad.errors import DataError, PostgradError, StageError
from postgrad.lineage.metrics import read_metrics
from postgrad.plan.plan import Plan
from tests.tiny_stages import EXAMPLE_MAKERS, QUICK_EVALUATION, Workspace, make_workspace

CLASSIFY = [{"kind": "classify"}]
ASK, SAY = ({"role": role, "content": "six and one."} for role in ("user", "assistant"))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("shelf"), tmp_path_factory.getbasetemp() / "cache")


Planned = Callable[..., Plan]


@pytest.fixture
def planned(shelf: Workspace, tmp_path: Path) -> Planned:
    """A plan on rows in `bad.jsonl`, measured on text; keyword arguments are keys of the source or of the stage."""

    def make(rows: list[Any], **changes: Any) -> Plan:
        file = tmp_path / "bad.jsonl"
        file.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
        given = ("kind", "prompt", "answer", "label_words", "columns", "held_out")
        source = {key: changes.pop(key) for key in given if key in changes}
        learned = {"name": "held", "path": shelf.file("old", held_out=True), "kind": "text"}
        sources = [{"name": "bad", "path": str(file), "max_passes": 1e6, **source}]
        evaluation = {**QUICK_EVALUATION, "learned": [learned], **changes.pop("evaluation", {})}
        data = {"sequence_length": changes.pop("length", 64)}
        return shelf.plan(shelf.stage("bad", sources=sources, evaluation=evaluation, data=data, **changes))

    return make


def many(name: str, count: int = 20) -> list[dict[str, Any]]:
    return EXAMPLE_MAKERS[name](count, 5)


# -- errors --------------------------------------------------------------------------------------------------------------

ERRORS: dict[str, tuple[list[Any], dict[str, Any], str, tuple[str, ...]]] = {
    "two kinds": (
        [*many("completion"), {"text": "six"}],
        {},
        "bad.jsonl:21",
        ("`text` after rows of `completion`", "split it into two sources"),
    ),
    "two kinds from the first rows on": (
        [{"prompt": "a", "completion": "b"}, {"instruction": "a", "output": "b"}],
        {},
        "bad.jsonl:2",
        ("`instruction` after rows of `completion`",),
    ),
    "two kinds, the second of which would come first": (
        [{"messages": [ASK, SAY]}, {"messages": [ASK, SAY]}, {"text": "six"}],
        {},
        "bad.jsonl:3",
        ("`text` after rows of `chat`",),
    ),
    "a row of no kind": (
        [*many("pair"), {"src": "a", "trget": "b"}],
        {},
        "bad.jsonl:21",
        ("no column `source` among `src`, `trget`", "rows of `pair` like those before: `source`, `target`"),
    ),
    "rows of no kind at all": (
        [{"question": "a", "response": "b"}],
        {},
        "bad.jsonl:1",
        ("no column `text` among `question`, `response`", "columns of one of the kinds"),
    ),
    "a label nobody can be asked for": (
        many("choices"),
        {"objectives": CLASSIFY, "model": "bert"},
        "data.sources[0]",
        ("'bad' has rows of kind choices, which classify does not support", "next-token"),
    ),
    "no choices": (
        [*many("choices"), {"question": "six?", "choices": [], "answer": 0}],
        {},
        "bad.jsonl:21",
        ("0 choices", "2 to 26"),
    ),
    "an answer out of range": (
        [*many("choices"), {"question": "six?", "choices": ["a", "b"], "answer": 2}],
        {},
        "bad.jsonl:21",
        ("the answer '2' is none of the choices", "an index from 0"),
    ),
    "an answer below the range": (
        [*many("choices"), {"question": "six?", "choices": ["a", "b"], "answer": -2}],
        {},
        "bad.jsonl:21",
        ("the answer '-2' is none of the choices",),
    ),
    "a label without a word": (
        [*many("labelled"), {"text": "six", "label": "verse"}],
        {"kind": "labelled", "label_words": {"words": "A", "sums": "B"}},
        "bad.jsonl:21",
        ("no word for the label 'verse'",),
    ),
    "a label that is no name": (
        [*many("labelled"), {"text": "six", "label": 3}],
        {"kind": "labelled", "objectives": CLASSIFY, "model": "bert"},
        "bad.jsonl:21",
        ("a label that is 3, a number after labels that are text",),
    ),
    "a role that is none": (
        [*many("chat"), {"messages": [{"role": "asistant", "content": "a"}]}],
        {},
        "bad.jsonl:21",
        ("`messages` 1 has the role 'asistant'", "did you mean 'assistant'?"),
    ),
    "no JSON": ([*many("pair"), '{"source": \n'], {}, "bad.jsonl:21", ("JSON",)),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_is_an_error_with_its_line(planned: Planned, name: str) -> None:
    rows, changes, where, told = ERRORS[name]
    with pytest.raises(PostgradError) as met:
        planned(rows, **changes)
    assert met.value.where.endswith(where)
    assert all(part in str(met.value) for part in told), str(met.value)
    assert met.value.exit_code == 2


FIELDS = [
    ("completion", {"prompt": "{text}?"}, "{text}", "{prompt} {completion}"),
    ("labelled", {"kind": "labelled", "answer": "{lable}"}, "{lable}", "{text} {lines} {label}"),
    ("choices", {"prompt": "{question} {option}"}, "{option}", "{question} {choices} {answer} {letter}"),
    ("instruction", {"prompt": "{instruktion}"}, "{instruktion}", "{instruction} {input} {output} {question}"),
]


@pytest.mark.parametrize(("name", "template", "asked", "has"), FIELDS)
def test_a_field_that_no_row_has_ends_before_anything_is_tokenised(
    planned: Planned,
    shelf: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    template: dict[str, Any],
    asked: str,
    has: str,
) -> None:
    """Of a source, and of a held-out file: also when another source that is fine comes first."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("something is tokenised")

    monkeypatch.setattr(tokenize, "_build", never)
    fine = {**shelf.source("pair"), "name": "fine", "share": 0.5}
    wrong = {**shelf.source(name), **template, "share": 0.5}
    learned = {"name": "held", "path": shelf.file(name, held_out=True), **template}
    for sources, evaluation, file in (
        ([fine, wrong], {}, f"{name}.jsonl:1"),
        ([{**fine, "share": 1.0}], {"learned": [learned]}, f"{name}-heldout.jsonl:1"),
    ):
        with pytest.raises(DataError) as met:
            shelf.plan(shelf.stage("wrong", sources=sources, evaluation={**QUICK_EVALUATION, **evaluation}))
        assert f"the template uses {asked}, which the row does not have" in str(met.value)
        assert met.value.expected == has and met.value.where.endswith(file)


def test_a_chat_template_that_fails_names_the_row(planned: Planned, shelf: Workspace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shelf.folder / "llama")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if 'nine' in m.content %}{{ raise_exception('nine is not said') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    strict = shelf.folder / "strict"
    (strict).mkdir(exist_ok=True)
    for file in (shelf.folder / "llama").iterdir():
        (strict / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(strict)
    good = {"messages": [ASK, SAY]}
    bad = {"messages": [ASK, {"role": "assistant", "content": "nine"}]}
    assert planned([good] * 3, model="strict").data.sources[0].store.kind == "chat"
    with pytest.raises(DataError, match="the chat template fails on the conversation: nine is not said") as met:
        planned([good, good, bad, good], model="strict")
    assert met.value.where.endswith("bad.jsonl:3") and "another template" in met.value.hint
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }"
    tokenizer.save_pretrained(strict)
    with pytest.raises(PostgradError, match="invalid chat template") as broken:
        planned([good], model="strict")
    assert broken.value.where == "tokenizer, chat template, line 1"


@pytest.mark.parametrize("kind", ["prefix-lm", "masked", "span-corruption", "text-to-text"])
def test_an_objective_that_the_model_cannot_serve_is_told_before_a_row_is_read(shelf: Workspace, kind: str) -> None:
    model = "t5" if kind in ("prefix-lm", "masked") else "llama"
    with pytest.raises(StageError, match=f"{kind} needs") as met:
        shelf.plan(shelf.stage("unfit", model=model, objectives=[{"kind": kind}]))
    assert met.value.where == "objectives" and met.value.expected


# -- rows that are left out, and told ------------------------------------------------------------------------------------

SKIPPED: dict[str, tuple[str, dict[str, Any], str]] = {
    "an empty answer": ("completion", {"prompt": "six?", "completion": " \n"}, "empty answer"),
    "an answer that is null": ("pair", {"source": "six?", "target": None}, "empty answer"),
    "an empty instruction": ("instruction", {"instruction": "", "output": "six"}, "empty instruction"),
    "an answer first": ("chat", {"messages": [SAY, ASK, SAY]}, "an answer before any question"),
    "no answer": ("chat", {"messages": [ASK]}, "no answer"),
    "no label": ("labelled", {"text": "six", "label": None}, "no label"),
    "no words": ("tagged", {"tokens": [], "tags": []}, "no words"),
    "no right choice": ("choices", {"question": "six?", "choices": ["a", "b"], "answer": -1}, "no answer"),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_what_teaches_nothing_is_left_out_counted_and_told(planned: Planned, shelf: Workspace, name: str) -> None:
    kind, row, reason = SKIPPED[name]
    asked = {"kind": "labelled"} if kind == "labelled" else {}
    made = many(kind)
    plan = planned([*made, row, row, row], **asked)
    (leaf,) = plan.data.sources
    assert (len(leaf.store), leaf.store.skipped) == (len(made), {reason: 3})
    assert f"bad: 3 rows are skipped ({reason})" in plan.notes
    assert f"note: bad: 3 rows are skipped ({reason})" in plan_lines(plan)
    # In a held-out file too.
    file = leaf.files.root / str(leaf.files.path)
    learned = {"name": "held", "path": str(file), **asked}
    other = planned_on(shelf, kind, asked, learned)
    assert f"held: 3 rows are skipped ({reason})" in other.notes


def planned_on(shelf: Workspace, kind: str, asked: dict[str, Any], learned: dict[str, Any], **changes: Any) -> Plan:
    source = {**shelf.source(kind), **asked}
    return shelf.plan(
        shelf.stage("measured", sources=[source], evaluation={**QUICK_EVALUATION, "learned": [learned]}, **changes)
    )


@pytest.mark.parametrize("name", ["completion", "chat", "pair"])
def test_rows_of_which_nothing_can_be_learnt_are_refused(planned: Planned, name: str) -> None:
    row = {
        "completion": {"prompt": "six?", "completion": ""},
        "chat": {"messages": [ASK]},
        "pair": {"source": "six", "target": ""},
    }[name]
    with pytest.raises(DataError, match="has anything to learn") as met:
        planned([row] * 3)
    assert met.value.where.endswith("bad.jsonl:3")


# -- rows that are too long ----------------------------------------------------------------------------------------------

LONG = " ".join(["one and two."] * 40)
ROOM = 48
T2T = {"kind": "text-to-text", "target_length": 8}
TALK = [
    {"role": "user", "content": LONG},
    SAY,
    {"role": "user", "content": "x1 = y1"},
    {"role": "assistant", "content": "six"},
]
TOO_LONG: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "next-token": (
        "llama",
        {"prompt": LONG, "completion": " six"},
        {},
        "2 rows are too long; their beginning is cut",
    ),
    "next-token, end": (
        "llama",
        {"prompt": "six?", "completion": LONG},
        {"objectives": [{"kind": "next-token", "too_long": "cut-end"}]},
        "2 rows are too long; their end is cut",
    ),
    "next-token, an answer without room": (
        "llama",
        {"prompt": "six?", "completion": LONG},
        {},
        "2 rows are skipped (answer too long)",
    ),
    "next-token, drop": (
        "llama",
        {"prompt": LONG, "completion": " six"},
        {"objectives": [{"kind": "next-token", "too_long": "drop"}]},
        "2 rows are skipped (too long)",
    ),
    "prefix-lm": (
        "llama",
        {"prompt": LONG, "completion": " six"},
        {"objectives": [{"kind": "prefix-lm"}]},
        "2 rows are too long; their beginning is cut",
    ),
    "text-to-text": (
        "t5",
        {"source": LONG, "target": "six"},
        {"objectives": [T2T]},
        "2 rows are too long; the end of the source is cut",
    ),
    "text-to-text, beginning": (
        "t5",
        {"source": LONG, "target": "six"},
        {"objectives": [{**T2T, "too_long": "cut-context"}]},
        "2 rows are too long; the beginning of the source is cut",
    ),
    "text-to-text, a conversation": (
        "t5",
        {"messages": TALK},
        {"objectives": [T2T], "length": 96},
        "2 rows are too long; the beginning of the source is cut",
    ),
    "text-to-text, drop": (
        "t5",
        {"source": LONG, "target": "six"},
        {"objectives": [{**T2T, "too_long": "drop"}]},
        "2 rows are skipped (too long)",
    ),
    "text-to-text, target": (
        "t5",
        {"source": "six", "target": LONG},
        {"objectives": [T2T]},
        "2 rows are too long; the end of the target is cut",
    ),
    "class": (
        "bert",
        {"text": LONG, "label": "words"},
        {"objectives": CLASSIFY, "kind": "labelled"},
        "2 rows are too long; the end of the longer text is cut",
    ),
    "tags": (
        "bert",
        {"tokens": ["one"] * 60, "tags": ["word"] * 60},
        {"objectives": CLASSIFY},
        "2 rows are too long; their end is cut",
    ),
}
KIND_OF = {"prompt": "completion", "source": "pair", "messages": "chat", "text": "labelled", "tokens": "tagged"}


@pytest.mark.parametrize("name", TOO_LONG)
def test_what_is_too_long_is_cut_where_it_should_be_and_told(planned: Planned, shelf: Workspace, name: str) -> None:
    model, row, changes, told = TOO_LONG[name]
    kind = KIND_OF[next(iter(row))]
    asked = {"kind": "labelled"} if kind == "labelled" else {}
    held = {"name": "held", "path": shelf.file(kind, held_out=True), **asked}
    changes = {"length": ROOM, **changes}
    plan = planned([*many(kind), row, row], model=model, evaluation={"learned": [held]}, **changes)
    assert f"bad: {told}" in plan.notes
    (rows,) = plan.data.rows
    lost = rows.ledger.dropped if "skipped" in told else rows.ledger.truncated
    assert lost > 20
    # The same row where it is measured.
    measured = {"name": "held", "path": str(plan.data.sources[0].files.path), **asked}
    objectives = changes.get("objectives", [])
    there = planned_on(
        shelf, kind, asked, measured, model=model, objectives=objectives, data={"sequence_length": changes["length"]}
    )
    assert f"held: {told}" in there.notes


def ends_of(plan: Plan) -> tuple[str, str]:
    """What is read and what is said in the first row that is full."""
    (rows,) = plan.data.rows
    row = next(r for r in (rows.get_row(i, 0) for i in range(len(rows))) if len(r.inputs["input_ids"]) == ROOM)
    said = [token for token in row.labels.tolist() if token != IGNORED]
    return plan.model.tokenizer.decode(row.inputs["input_ids"]), plan.model.tokenizer.decode(said)


def test_of_a_long_conversation_the_last_question_stays(planned: Planned) -> None:
    """The mutant: cut as T5 cuts a source, the question is gone."""
    long = [{"messages": TALK}]
    read, said = ends_of(planned(long, model="t5", length=ROOM, objectives=[T2T]))
    assert "x1 = y1" in read and said.startswith("six")
    read, said = ends_of(planned(long, model="t5", length=ROOM, objectives=[{**T2T, "too_long": "cut-end"}]))
    assert "x1 = y1" not in read and said.startswith("six")


def test_no_step_is_without_a_label(shelf: Workspace, tmp_path: Path) -> None:
    """Answers without room, and an end of text that would have a row to itself: every step divides by something."""
    tokenizer = AutoTokenizer.from_pretrained(shelf.folder / "llama")
    ids = tokenizer(LONG)["input_ids"][: 2 * ROOM]  # and an EOS behind two full rows
    file = tmp_path / "full.jsonl"
    file.write_text(json.dumps({"input_ids": ids}) + "\n")
    answers = tmp_path / "answers.jsonl"
    rows = [{"prompt": "six?", "completion": LONG}, {"prompt": "six?", "completion": " six"}]
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    sources = [
        {"name": "full", "path": str(file), "share": 0.9, "held_out": 0, "max_passes": 1e6},
        {"name": "answers", "path": str(answers), "share": 0.1, "held_out": 0, "max_passes": 1e6},
    ]
    learned = {"name": "held", "path": shelf.file("old", held_out=True), "kind": "text"}
    raw = shelf.stage(
        "labels-everywhere",
        sources=sources,
        batch={"global_batch_size": 1, "micro_batch_size": 1},
        evaluation={**QUICK_EVALUATION, "learned": [learned]},
        tokens=12 * ROOM,
    )
    plan = shelf.plan(raw)
    assert [len(rows) for rows in plan.data.rows] == [
        2,
        1,
    ] and "answers: 3 rows are skipped (answer too long)" in plan.notes
    done = shelf.run(raw)
    steps = [row for row in read_metrics(done.run_folder / "metrics.jsonl") if row.kind == "step"]
    assert len(steps) == plan.steps > 8
    assert all(row.tokens > 0 and math.isfinite(row.loss) and row.loss > 0 for row in steps)


# -- labels --------------------------------------------------------------------------------------------------------------


def labels_told(shelf: Workspace, tmp_path: Path, rows: list[dict[str, Any]], role: str, **changes: Any) -> list[str]:
    file = tmp_path / "labels.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    item = {"name": "set", "path": str(file), "kind": "labelled", **changes.pop("item", {})}
    evaluation = {**QUICK_EVALUATION, "learned": [shelf.file("labelled", held_out=True)], role: [item]}
    plan = shelf.plan(
        shelf.stage("labels", sources=[shelf.source("labelled", "labelled")], evaluation=evaluation, **changes)
    )
    return [note for note in plan.notes if note.startswith("set: ") and "label" in note]


def test_labels_that_no_training_row_has_are_told(shelf: Workspace, tmp_path: Path) -> None:
    new, old = {"text": "six", "label": "verse"}, {"text": "six and", "label": "words"}
    told = ["set: 1 labels occur in no training row: verse"]
    assert labels_told(shelf, tmp_path, [new, old], "learned") == told
    assert labels_told(shelf, tmp_path, [new, old], "retained") == told
    assert labels_told(shelf, tmp_path, [old], "learned") == []
    # Rows of another task that is to be retained have labels of their own.
    assert labels_told(shelf, tmp_path, [new], "retained") == []
    assert labels_told(shelf, tmp_path, [new], "learned") == told


def test_labels_that_no_training_row_has_are_an_error_for_a_classifier(shelf: Workspace, tmp_path: Path) -> None:
    for role in ("learned", "retained"):
        with pytest.raises(DataError, match="has the label 'verse', which no training row has") as met:
            labels_told(shelf, tmp_path, [{"text": "six", "label": "verse"}], role, model="bert", objectives=CLASSIFY)
        assert met.value.where.endswith("labels.jsonl:1")
