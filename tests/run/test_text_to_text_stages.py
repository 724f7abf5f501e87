"""Every task as text to text: the sorts that T5 was trained on, in its authors' words, in one stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from postgrad.plan.plan import Plan
from tests.tiny_stages import QUICK_EVALUATION, Workspace, make_workspace, two_kind_texts, write_rows

TASKS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    # a row; how the source is described; what is read; what is said (Raffel et al. 2020, appendix D)
    "classes": (
        {"sentence": "five and six", "label": 0},
        {"prompt": "sst2 sentence: {sentence}", "label_words": {"0": "negative", "1": "positive"}},
        "sst2 sentence: five and six",
        "negative",
    ),
    "similarity": (
        {"sentence1": "one and two.", "sentence2": "one plus two", "label": 3.2999999523},
        {"prompt": "stsb sentence1: {sentence1} sentence2: {sentence2}", "answer": "{label:round 0.2}"},
        "stsb sentence1: one and two. sentence2: one plus two",
        "3.2",
    ),
    "questions": (
        {
            "id": "1",
            "context": "six and ten",
            "question": "what?",
            "answers": {"text": ["ten", "six"], "answer_start": [8, 0]},
        },
        {"prompt": "question: {question} context: {context}"},
        "question: what? context: six and ten",
        "ten",
    ),
    "summaries": (
        {"article": "one and two. three and four.", "highlights": "numbers", "id": "x"},
        {"prompt": "summarize: {article}"},
        "summarize: one and two. three and four.",
        "numbers",
    ),
    "translation": (
        {"translation": {"en": "one", "de": "eins"}},
        {"prompt": "translate English to German: {en}"},
        "translate English to German: one",
        "eins",
    ),
    "back": (
        {"translation": {"en": "two", "de": "zwei"}},
        {
            "columns": {"source": "translation.de", "target": "translation.en"},
            "prompt": "translate German to English: {source}",
        },
        "translate German to English: zwei",
        "two",
    ),
}


def more(name: str, count: int) -> list[dict[str, Any]]:
    """Rows of a task beside the one above."""
    out: list[dict[str, Any]] = []
    for i, (text, kind) in enumerate(two_kind_texts(count, 7)):
        text = f"{text[:16]} {i}"
        out.append(
            {
                "classes": {"sentence": text, "label": int(kind == "sums")},
                "similarity": {"sentence1": text, "sentence2": text[:8], "label": round(i % 51 / 10, 2) + 0.001},
                "questions": {
                    "id": "",
                    "context": text,
                    "question": "sort?",
                    "answers": {"text": [kind], "answer_start": [0]},
                },
                "summaries": {"article": text, "highlights": kind, "id": ""},
                "translation": {"translation": {"en": text, "de": kind}},
                "back": {"translation": {"en": kind, "de": text}},
            }[name]
        )
    return out


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    found = make_workspace(tmp_path_factory.mktemp("shelf"), tmp_path_factory.getbasetemp() / "cache")
    for i, (name, (row, *_)) in enumerate(TASKS.items()):
        write_rows(found.folder / f"{name}.jsonl", [row, *more(name, 30 + 20 * i)])
        write_rows(found.folder / f"{name}-heldout.jsonl", more(name, 200)[-10:])
    return found


def stage_of(shelf: Workspace, **changes: Any) -> dict[str, Any]:
    sources = [{**shelf.source(name), "held_out": 0.0, **said} for name, (_, said, _, _) in TASKS.items()]
    sources.append(shelf.source("old", share=0.25, held_out=0.0))
    learned = [
        {"name": f"{name}-heldout", "path": shelf.file(name, held_out=True), "same_format_as": name} for name in TASKS
    ]
    return shelf.stage(
        "tasks",
        model="t5",
        sources=sources,
        tokens=1500,
        batch={"global_batch_size": 8},
        objectives=[{"kind": "span-corruption", "on": ["old"]}, {"kind": "text-to-text", "target_length": 24}],
        evaluation={**QUICK_EVALUATION, "learned": learned, "retained": [shelf.file("old", held_out=True)]},
        data={"mixing": {"kind": "examples", "cap": 70}, "sequence_length": 64},
        **changes,
    )


@pytest.fixture(scope="module")
def plan(shelf: Workspace) -> Plan:
    return shelf.plan(stage_of(shelf))


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_read_and_answered_in_the_authors_words(shelf: Workspace, plan: Plan, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shelf.folder / "t5")
    _, _, source, target = TASKS[name]
    made = plan.data.rows[plan.data.source_names.index(name)]
    row = made.get_row(0, 0)  # rows stand in the order of the file
    assert tokenizer.decode(row.inputs["input_ids"]) == f"{source}</s>"
    assert tokenizer.decode(row.labels) == f"{target}</s>"
    assert row.inputs["decoder_input_ids"].tolist() == [0, *row.labels[:-1].tolist()]
    held_out = next(h for h in plan.evaluation.sets if h.name == f"{name}-heldout")
    assert len(held_out) == 10


def test_the_shares_are_those_of_the_mixture(plan: Plan) -> None:
    sizes = {name: min(31 + 20 * i, 70) for i, name in enumerate(TASKS)}
    wanted = {name: 0.75 * n / sum(sizes.values()) for name, n in sizes.items()}
    found = {source.name: source.share for source in plan.as_record().sources}
    assert found == pytest.approx({**wanted, "old": 0.25}, abs=0.02)


def test_all_of_them_are_learnt_in_one_stage(shelf: Workspace, tmp_path: Path) -> None:
    done = shelf.run(stage_of(shelf, output=str(tmp_path / "tasks")))
    changes = done.record.changes
    assert {name.removesuffix("-heldout") for name in changes} == {*TASKS, "old"}
    assert all(change.difference < 0 for name, change in changes.items() if name != "old-heldout")
    assert any(note.startswith("shares by examples: classes") for note in done.record.notes)
