"""What is shown of rows is what the model is called with: every label, every padding, in the order of the steps."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from postgrad.check import preview_rows as preview
from postgrad.check.preview_rows import PreviewSource, TokenDecoder, preview_rows
from postgrad.check.preview_text import print_rows
from postgrad.check.source_text import source_lines
from postgrad.data.layouts.rows import IGNORED
from postgrad.hardware.execution import Execution
from postgrad.plan.plan import Plan
from postgrad.run.build import make_loader
from tests.conftest import make_tokenizer
from tests.run.test_task_stages import CPU, mixed
from tests.tiny_stages import QUICK_EVALUATION, Workspace, bert_tokenizer, make_workspace, write_rows

EXECUTION = Execution("float32", False, "sdpa", 1, 2, False, 0.0)
CLASSIFY = [{"kind": "classify"}]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("shelf"), tmp_path_factory.getbasetemp() / "cache")


def classified(shelf: Workspace, model: str, name: str, kind: str | None = None) -> dict[str, Any]:
    learned = [shelf.file(name, held_out=True)]
    return shelf.stage(
        f"{model}-{name}",
        model=model,
        sources=[shelf.source(name, kind)],
        objectives=CLASSIFY,
        tokens=40,
        evaluation={**QUICK_EVALUATION, "learned": learned},
    )


STAGES: dict[str, Callable[[Workspace], dict[str, Any]]] = {
    "text": lambda shelf: shelf.stage("text"),
    "mixed decoder": lambda shelf: mixed(shelf, "llama"),
    "prompted": lambda shelf: mixed(shelf, "llama", tuning={"kind": "p-tuning", "template": "{2} {x} {1}"}),
    "mixed encoder-decoder": lambda shelf: mixed(shelf, "t5"),
    "prefix-lm": lambda shelf: mixed(shelf, "llama", objectives=[{"kind": "prefix-lm"}]),
    "masked": lambda shelf: shelf.stage("masked", model="bert"),
    "class": lambda shelf: classified(shelf, "bert", "labelled", "labelled"),
    "class of a decoder": lambda shelf: classified(shelf, "llama", "paired"),
    "multi": lambda shelf: classified(shelf, "bert", "multi", "labelled"),
    "number": lambda shelf: classified(shelf, "bert", "numbered", "labelled"),
    "tags": lambda shelf: classified(shelf, "bert", "tagged"),
}


def of(plan: Plan, count: int) -> list[PreviewSource]:
    return preview_rows(plan, make_loader(plan, EXECUTION, CPU), count)


def printed(sources: list[PreviewSource], width: int = 200, **options: Any) -> str:
    out = io.StringIO()
    print_rows(sources, Console(file=out, width=width, highlight=False, **options))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


# -- the law -----------------------------------------------------------------------------------------------------------


def read(plan: Plan, steps: int) -> dict[int, list[dict[str, np.ndarray]]]:
    """The rows of each source that the steps read, in the order of their micro-batches."""
    loader = make_loader(plan, EXECUTION, CPU)
    found: dict[int, list[dict[str, np.ndarray]]] = {k: [] for k in range(len(plan.data.source_names))}
    for step in range(1, steps + 1):
        for batch in loader(step, last=steps):
            arrays = {name: tensor.numpy() for name, tensor in batch.inputs.items()} | {"labels": batch.labels.numpy()}
            for i, source in enumerate(batch.source_B.tolist()):
                found[source].append({name: array[i] for name, array in arrays.items()})
    return found


def is_what_is_read(plan: Plan, count: int) -> bool:
    """Every label is shown as trained and nothing else is; ids are those that are read, padding is what is masked out."""
    rows = read(plan, plan.steps)
    for k, source in enumerate(of(plan, count)):
        assert len(source.rows) == min(count, plan.data.row_counts()[k]) > 0
        for shown, arrays in zip(source.rows, rows[k], strict=False):
            labels = arrays["labels"]
            if shown.row_label is not None:
                assert not any(t.state == "trained" for s in shown.segments for t in s.tokens)
            elif shown.count("trained") != int((labels != IGNORED).sum()):
                return False
            if "attention_mask" in arrays and "decoder_input_ids" not in arrays:
                assert shown.count("padding") == int((arrays["attention_mask"] == 0).sum())
            (ids,) = [[t.id for t in s.tokens] for s in shown.segments if s.name in ("input", "1")]
            goes_on = np.diff(arrays.get("position_ids", np.arange(len(arrays["input_ids"])))) == 1
            size = len(goes_on) + 1 if goes_on.all() else int(np.argmin(goes_on)) + 1
            if ids[:size] != arrays["input_ids"][:size].tolist():
                return False
    return True


@pytest.mark.parametrize("name", STAGES)
def test_what_is_shown_is_what_is_read(shelf: Workspace, name: str) -> None:
    assert is_what_is_read(shelf.plan(STAGES[name](shelf)), 9)


def test_rows_read_anew_would_not_be_those_of_the_steps(shelf: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: rows taken from the source in stored order, not from the loader; other tokens are masked then."""
    plan = shelf.plan(STAGES["masked"](shelf))

    def stored(part: Any, batch: Any) -> Any:
        for i, draw in enumerate(part.mixture_rows):
            row = plan.data.rows[draw.source].get_row(i, 0)
            yield draw, {**row.inputs, "labels": row.labels}

    monkeypatch.setattr(preview, "_split_micro_batch", stored)
    assert not is_what_is_read(plan, 9)


@pytest.mark.parametrize("name", ["text", "mixed decoder", "prompted"])
def test_a_pass_shows_every_label_and_all_padding_of_the_ledger(shelf: Workspace, name: str) -> None:
    """Where rows are packed nothing says what is padding but positions and labels: held against the ledger."""
    plan = shelf.plan({**STAGES[name](shelf), "tokens": 20_000})
    sources = of(plan, max(map(len, plan.data.rows)))
    for k, packed in enumerate(plan.data.rows):
        shown = {row.row: row for row in sources[k].rows}
        assert len(shown) == len(packed)
        for state, counted in (("trained", packed.ledger.trained), ("padding", packed.ledger.padding)):
            assert sum(row.count(state) for row in shown.values()) == counted


# -- by hand -------------------------------------------------------------------------------------------------------------


def only(shelf: Workspace, model: str, name: str, made: list[dict[str, Any]], length: int, **changes: Any) -> Plan:
    """A stage on a few rows that are read in one step, in stored order."""
    path = str(write_rows(shelf.folder / f"{name}.jsonl", made))
    kind = changes.pop("kind", "auto")
    words = changes.pop("words", {})
    source = {"name": name, "path": path, "held_out": 0, "max_passes": 100, "kind": kind, "label_words": words}
    evaluation = {
        **QUICK_EVALUATION,
        "learned": [{"name": "held", "path": shelf.file("old", held_out=True), "kind": "text"}],
    }
    if like := changes.pop("like", None):
        evaluation["learned"] = [{"name": "held", "path": shelf.file(like, held_out=True), "kind": kind}]
    return shelf.plan(
        shelf.stage(
            name, model=model, sources=[source], data={"sequence_length": length}, evaluation=evaluation, **changes
        )
    )


def test_packed_rows_by_hand(shelf: Workspace) -> None:
    made = [{"prompt": "one and two.", "completion": " six\n"}, {"prompt": "x1 =", "completion": " 7;"}]
    plan = only(shelf, "llama", "packed", made, 24, tokens=20)
    (source,) = of(plan, 1)
    text = printed([source])
    assert text.splitlines()[0].startswith("«trained» tokens are predicted, all others are context")
    assert "packed (next-token): the first 1 of 1 rows" in text
    body = text[text.index("  step 1") :].splitlines()
    counts = [source.rows[0].count(state) for state in ("trained", "context", "padding")]
    assert body[0] == f"  step 1, row 1: {counts[0]} trained, {counts[1]} context, {counts[2]} padding"
    assert body[1:] == [
        "      1│ one and two.« six↵",
        "       │ <|end|>»",
        "      2│ x1 =« 7;<|end|>»",
        f"    pad│ [pad×{counts[2]}]",
    ]


def test_prefixes_by_hand(shelf: Workspace) -> None:
    made = [{"prompt": "one and two.", "completion": " six\n"}]
    text = printed(of(only(shelf, "llama", "prefixed", made, 24, tokens=20, objectives=[{"kind": "prefix-lm"}]), 1))
    assert text.startswith(
        "«trained» tokens are predicted, all others are context, with bidirectional attention in prefixes; 1│ 2│ documents"
    )
    assert "1│ one and two.« six↵\n       │ <|end|>»" in text


def test_a_soft_prompt_is_shown_by_its_numbers(shelf: Workspace) -> None:
    made = [{"prompt": "x1 =", "completion": " 7;"}]
    tuning = {"kind": "p-tuning", "template": "{2} {x} {1}"}
    text = printed(of(only(shelf, "llama", "prompted", made, 24, tokens=20, tuning=tuning), 1))
    assert "1│ <v1><v2>x1 =<v3>« 7;<|end|>»" in text


def test_pairs_by_hand(shelf: Workspace) -> None:
    made = [{"source": "one and two.", "target": "six"}, {"source": "x1", "target": "seven and nine."}]
    plan = only(shelf, "t5", "pairs", made, 24, tokens=20, objectives=[{"kind": "text-to-text"}])
    text = printed(of(plan, 2))
    assert "input│ one and two.</s>" in text and "output│ <pad>«six</s>»" in text
    assert "input│ x1</s>[pad×" in text and "output│ <pad>«seven and nine.</s>»" in text


def test_masked_rows_show_what_was_there(shelf: Workspace) -> None:
    plan = only(
        shelf,
        "bert",
        "hidden",
        [{"text": "one and two"}],
        16,
        tokens=8,
        objectives=[{"kind": "masked", "share": 0.4}],
    )
    (source,) = of(plan, 8)
    for row in source.rows:
        (strand,) = row.segments
        assert [t.target or t.text.strip() for t in strand.tokens] == ["[CLS]", "one", "and", "two", "[SEP]"]
        (asked,) = [t for t in strand.tokens if t.state == "trained"]
        assert f"{asked.text}«{asked.target}»" in printed([source])
    assert any(t.text.strip() == "[MASK]" for row in source.rows for t in row.segments[0].tokens)


def test_labels_stand_behind_the_text_and_tags_below_their_words(shelf: Workspace) -> None:
    made = [
        {"text": "one and two", "labels": ["nine", "sums"]},
        {"text": "six", "labels": []},
        {"text": "ten", "labels": ["words"]},
    ]
    options = {"kind": "labelled", "objectives": CLASSIFY, "tokens": 8, "like": "multi"}
    text = printed(of(only(shelf, "bert", "any", made, 36, **options), 3))
    for reads, label in (("one and two", "nine, sums"), ("six", "no label"), ("ten", "words")):
        assert re.search(rf"    input│ \[CLS\] {reads} \[SEP\](\[pad×\d\])?\n    label│ «{label}»\n", text + "\n")
    assert "1 label trained, 5 context" in text
    made = [{"tokens": ["one", "xy", "two"], "tags": ["mark", "word", "mark"]}]
    shown = of(only(shelf, "bert", "tag", made, 24, like="tagged", objectives=CLASSIFY, tokens=8), 1)
    lines = printed(shown).splitlines()[-2:]
    assert lines[0] == "    input│ [CLS] one    x      y two    [SEP]"
    assert lines[1] == "         │       «mark» «word»   «mark»"
    narrow = printed(shown, width=30).splitlines()
    assert sum("│" in line for line in narrow) == 4


def test_a_source_that_comes_in_late_is_shown_and_one_that_never_does_is_told(shelf: Workspace) -> None:
    shifts = [{"at": "50%", "shares": {"old": 1.0}}]
    sources = [shelf.source("new", share=1.0), shelf.source("old", share=0.0, role="replay")]
    plan = shelf.plan(shelf.stage("late", sources=sources, data={"curriculum": shifts}))
    new, old = of(plan, 2)
    assert new.rows[0].step == 1 and old.rows[0].step > plan.steps // 2
    never = [shelf.source("new", share=1.0), shelf.source("old", share=0.0, role="replay")]
    _, old = of(shelf.plan(shelf.stage("never", sources=never)), 2)
    assert not old.rows and "old (next-token): this stage reads none of its rows" in printed([old])


# -- on the screen -------------------------------------------------------------------------------------------------------


def shown_with(shelf: Workspace, text: str) -> list[PreviewSource]:
    (source,) = of(only(shelf, "llama", "signs", [{"prompt": "x1", "completion": text}], 64, tokens=8), 1)
    return [source]


def test_colours_stand_for_marks_where_there_are_any(shelf: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    sources = shown_with(shelf, " 7;")
    coloured = printed(sources, force_terminal=True)
    assert "\x1b[1;32m 7;<|end|>\x1b[0m" in coloured and "«" not in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert "« 7;<|end|>»" in printed(sources, force_terminal=True)
    assert "x1« 7;<|end|>»" in printed(sources)


def test_marks_are_signs_that_the_text_has_not(shelf: Workspace) -> None:
    assert "x1⟪«7»<|end|>⟫" in printed(shown_with(shelf, "«7»"))


def test_a_terminal_obeys_nothing_that_stands_in_a_row(shelf: Workspace) -> None:
    text = printed(shown_with(shelf, " \x1b[31m7\r\b"))
    assert "\x1b" not in text and "\b" not in text and "␛[31m7" in text


# -- spelling ------------------------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(st.text(st.sampled_from("ab 1é漢🙂\n;x"), max_size=30))
def test_the_pieces_of_a_text_are_the_text(text: str) -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer(text)["input_ids"]
    spell = TokenDecoder(tokenizer, 400)
    assert "".join(spell(ids)) == text
    # Whatever stands around it: special tokens, and places of vectors.
    assert spell([0, *ids, 402, 0]) == ["<|end|>", *spell(ids), "<v3>", "<|end|>"]


def test_words_in_pieces_are_spelt_without_their_signs() -> None:
    tokenizer = bert_tokenizer()
    ids = tokenizer("one xy2, two")["input_ids"]
    assert "".join(TokenDecoder(tokenizer, len(tokenizer))(ids)) == tokenizer.decode(ids)


def test_bytes_without_their_rest_are_not_waited_for_in_vain() -> None:
    tokenizer = make_tokenizer()
    first, *rest = tokenizer("漢")["input_ids"]
    assert len(rest) > 1
    assert TokenDecoder(tokenizer, 400)([first, 401, *tokenizer("a")["input_ids"]]) == ["\ufffd", "<v2>", "a"]


# -- what was found --------------------------------------------------------------------------------------------------------


FOUND = {
    "text": ["60 rows of kind text (column text), all tokens are trained"],
    "mixed decoder": [
        '60 rows of kind completion (columns prompt, completion), rendered as "{prompt}{completion}"; '
        "only answers are trained",
        "60 rows of kind text (column text), all tokens are trained",
    ],
    "mixed encoder-decoder": [
        '60 rows of kind pair (columns source, target), rendered as "{source}" with the answer "{target}"; '
        "the answer is the target",
        "60 rows of kind text (column text), 15% of the tokens are corrupted in spans",
    ],
    "prefix-lm": ["only the last answer is trained", "the text after a random prefix is trained"],
    "masked": ["60 rows of kind text (column text), 15% of the tokens are masked"],
    "class": [
        "60 rows of kind labelled (columns text, label; 2 labels: sums, words), without a template; "
        "a task layer predicts the label"
    ],
    "multi": ["(columns text, labels; 3 labels, multi-label: nine, sums, words)"],
    "number": ["(columns text, label; numeric labels)"],
    "tags": [
        "60 rows of kind tagged (columns tokens, tags; 2 tags: mark, word)",
        "a task layer predicts a tag for each word",
    ],
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_is_told(shelf: Workspace, name: str) -> None:
    told = "\n".join(source_lines(shelf.plan(STAGES[name](shelf)).data.sources, shelf.cache))
    assert all(part in told for part in FOUND[name])


def test_what_was_found_of_words_and_files(shelf: Workspace) -> None:
    labelled = shelf.source("labelled", "labelled", prompt="{text}\nis", label_words={"words": "good", "sums": "bad"})
    (shelf.folder / "book.txt").write_text("one and two.\n\nsix and nine.\n" * 20)
    book = {"name": "book", "path": str(shelf.folder / "book.txt"), "document_unit": "paragraphs", "max_passes": 100}
    sources = [{**labelled, "share": 0.3}, {**book, "share": 0.3}, shelf.source("chat", share=0.4)]
    plan = shelf.plan(shelf.stage("found", sources=sources, evaluation=QUICK_EVALUATION))
    first, second, third = source_lines(plan.data.sources, shelf.cache)
    assert "(columns text, label; 2 labels: sums, words)" in first and 'as "{text}⏎is {label}"' in first
    assert "21 documents in text files, all tokens are trained" in second
    assert (
        "60 rows of kind chat (column messages), rendered with a plain chat template (the tokenizer has none)" in third
    )
