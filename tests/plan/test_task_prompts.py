"""What is read when a task is asked: every kind of rows word for word, demonstrations that never tell, prompts that fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from postgrad.commands.score_files import load_model_inputs
from postgrad.config.stage_file import load_tasks, parse_stage
from postgrad.config.tasks import TaskConfig
from postgrad.errors import DataError, ModelError, StageError
from postgrad.evaluation.generate_answers import StoppingRule
from postgrad.models.location import locate_model
from postgrad.plan import task_demonstrations
from postgrad.plan.model_inputs import ModelInputs
from postgrad.plan.prompted_task import PromptedTask, add_soft_prompts
from postgrad.plan.task_prompts import make_prompted_task
from tests.conftest import make_llama, make_tokenizer
from tests.tiny_stages import Workspace, bos_tokenizer, make_workspace, save_model, write_rows

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    home = tmp_path_factory.mktemp("shelf")
    save_model(make_llama(max_position_embeddings=512), make_tokenizer(), home / "wide")
    return make_workspace(home, home / "cache")


def reading(shelf: Workspace, model: str = "llama") -> ModelInputs:
    return load_model_inputs(locate_model(str(shelf.folder / model), Path.cwd()), 1024)


def task(path: Path | str, **changes: Any) -> TaskConfig:
    return TaskConfig.model_validate({"name": "quiz", "path": str(path), **changes})


def asked(shelf: Workspace, path: Path | str, model: str = "llama", **changes: Any) -> PromptedTask:
    return make_prompted_task(task(path, **changes), reading(shelf, model), Path.cwd(), "evaluation.tasks[0]")


def words(tokenizer: PreTrainedTokenizerFast, ids: tuple[int, ...]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


# -- word for word --------------------------------------------------------------------------------------------------------

TEST, SHOWN = 0, 1
ROWS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]], str, tuple[str, ...], tuple[str, ...]]] = {
    "labelled": (
        [{"text": "one", "label": "yes"}],
        [{"text": "two", "label": "no"}],
        "text: two\nlabel: no\n\ntext: one\nlabel: ",
        ("no", "yes"),
        ("yes",),
    ),
    "choices": (
        [{"question": "one?", "choices": ["a", "b"], "answer": 1}],
        [{"question": "two?", "choices": ["c", "d", "e"], "answer": "C"}],
        "two?\nA. c\nB. d\nC. e\nAnswer: e\n\none?\nA. a\nB. b\nAnswer: ",
        ("a", "b"),
        ("B",),
    ),
    "completion": (
        [{"prompt": "one is", "completion": " two", "references": ["2", " ii "]}],
        [{"prompt": "three is", "completion": " four"}],
        "three is four\n\none is",
        (),
        ("two", "2", "ii"),
    ),
    "pair": (
        [{"source": "one", "target": "eins", "references": "ein"}],
        [{"source": "two", "target": "zwei"}],
        "two\nzwei\n\none\n",
        (),
        ("eins", "ein"),
    ),
    "instruction": (
        [{"instruction": "Say one.", "input": "now", "output": "one"}],
        [{"instruction": "Say two.", "output": "two"}],
        "### User:\nSay two.\n\n### Assistant:\ntwo<|end|>\n\n### User:\nSay one.\n\nnow\n\n### Assistant:\n",
        (),
        ("one",),
    ),
    "chat": (
        [{"messages": [{"role": "system", "content": "Be."}, {"role": "user", "content": "one?"},
                       {"role": "assistant", "content": "1"}, {"role": "user", "content": "two?"},
                       {"role": "assistant", "content": "2"}]}],
        [{"messages": [{"role": "system", "content": "Not."}, {"role": "user", "content": "six?"},
                       {"role": "assistant", "content": "6"}]}],
        "### System:\nBe.\n\n### User:\nsix?\n\n### Assistant:\n6<|end|>\n\n### User:\none?\n\n### Assistant:\n1<|end|>"
        "\n\n### User:\ntwo?\n\n### Assistant:\n",
        (),
        ("2",),
    ),
    "question": (
        [{"question": "who?", "context": "one came", "answers": {"text": ["one", "One"], "answer_start": [0, 0]}}],
        [{"question": "how?", "context": "by foot", "answers": ["foot"]}],
        "question: how?\ncontext: by foot\nanswer: foot\n\nquestion: who?\ncontext: one came\nanswer: ",
        (),
        ("one", "One"),
    ),
    "tagged": (
        [{"tokens": ["one", "cat"], "tags": ["N", "A"]}],
        [{"tokens": ["two"], "tags": ["N"]}],
        "two\nN\n\none cat\n",
        (),
        ("N A",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(ROWS))
def test_one_shot_word_for_word(shelf: Workspace, tmp_path: Path, kind: str) -> None:
    test, shown, text, choices, references = ROWS[kind]
    path, pool = write_rows(tmp_path / "test.jsonl", test), write_rows(tmp_path / "train.jsonl", shown)
    found = asked(shelf, path, "wide", shots=1, few_shot={"path": str(pool)})
    (prompt,) = found.prompts_KI[0]
    assert (found.kind, prompt.text, prompt.num_demonstrations) == (kind, text, 1)
    assert found.is_multiple_choice == bool(choices)
    assert found.references_I == (references,) and found.choice_texts_I == ((choices,) if choices else ())
    tokenizer = make_tokenizer()
    # The ids say the same; a space before the answer belongs to the answer.
    if choices:
        assert words(tokenizer, prompt.item.context) == text.rstrip()
        assert [words(tokenizer, choice) for choice in prompt.item.choices] == [f" {choice}" for choice in choices]
    else:
        assert words(tokenizer, prompt.item.context) == text.rstrip(" ")
    zero = asked(shelf, path, "wide").prompts_KI[0][0] if kind != "labelled" else None
    if zero:
        assert text.endswith(zero.text) or kind == "chat"
        assert zero.num_demonstrations == 0


def test_words_and_templates_as_everywhere(shelf: Workspace, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"text": "one", "label": 1}, {"text": "two", "label": 0}])
    found = asked(
        shelf,
        path,
        prompt="Review: {text}\nIt is",
        answer=" {label}!",
        label_words={"0": "bad", "1": "good", "2": "fair"},
    )
    assert (
        found.choice_texts_I == ((" bad!", " good!", " fair!"),) * 2 and found.choice_names_I == (("0", "1", "2"),) * 2
    )
    assert sorted(found.references_I) == [("0",), ("1",)]
    assert {prompt.text for prompt in found.prompts_KI[0]} == {"Review: one\nIt is ", "Review: two\nIt is "}


def test_a_chat_template_asks_in_turns(shelf: Workspace, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    save_model(make_llama(), tokenizer, tmp_path / "chat")
    path = write_rows(tmp_path / "t.jsonl", [{"prompt": "one?", "completion": "1"}])
    pool = write_rows(tmp_path / "p.jsonl", [{"prompt": "two?", "completion": "2"}])
    found = make_prompted_task(
        task(path, shots=1, few_shot={"path": str(pool)}),
        load_model_inputs(locate_model(str(tmp_path / "chat"), Path.cwd()), 64),
        Path.cwd(),
        "t",
    )
    assert found.prompts_KI[0][0].text == "<user>two?\n<assistant>2<|end|>\n<user>one?\n<assistant>"
    assert found.stopping.stop_strings == () and found.references_I == (("1",),)


def test_a_bos_stands_first_and_once(shelf: Workspace, tmp_path: Path) -> None:
    tokenizer = bos_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + CHAT
    save_model(make_llama(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1), tokenizer, tmp_path / "m")
    here = load_model_inputs(locate_model(str(tmp_path / "m"), Path.cwd()), 64)
    for row in ({"prompt": "one?", "completion": "1"}, {"question": "q", "choices": ["a", "b"], "answer": 0}):
        path = write_rows(tmp_path / "t.jsonl", [row])
        context = make_prompted_task(task(path), here, Path.cwd(), "t").prompts_KI[0][0].item.context
        assert context[0] == 0 and 0 not in context[1:]


def test_an_encoder_decoder_reads_the_question_and_its_end(shelf: Workspace, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"text": "one", "label": "yes"}])
    pool = write_rows(tmp_path / "p.jsonl", [{"text": "two", "label": "no"}])
    found = asked(shelf, path, "t5", shots=1, few_shot={"path": str(pool)})
    (prompt,) = found.prompts_KI[0]
    assert prompt.text == "text: two\nlabel: no\n\ntext: one\nlabel:"
    tokenizer = reading(shelf, "t5").tokenizer
    assert words(tokenizer, prompt.item.context) == prompt.text + "</s>"  # type: ignore[arg-type]
    assert [tokenizer.decode(choice) for choice in prompt.item.choices] == ["no", "yes"]
    assert found.stopping.stop_strings == () and found.context_length == 1024


def test_a_soft_prompt_stands_around_the_question(shelf: Workspace) -> None:
    for model, tuning in (("llama", {"kind": "prompt", "length": 3}), ("t5", {"kind": "prompt", "length": 3})):
        kind = "pair" if model == "t5" else "completion"
        raw = shelf.stage("soft", tuning, model=model, sources=[shelf.source(kind)])
        raw |= {"objectives": [{"kind": "text-to-text" if model == "t5" else "next-token"}]}
        held_out = shelf.file(kind, held_out=True)
        raw["evaluation"] = {"learned": [held_out], "tasks": [{"name": "quiz", "path": held_out}]}
        plan = shelf.plan(raw)
        (before,), (after,) = plan.evaluation.tasks_before, plan.evaluation.tasks
        first = plan.model.inputs.encoder.vocabulary
        for one, other in zip(before.prompts_KI[0], after.prompts_KI[0], strict=True):
            assert other.item.context == (first, first + 1, first + 2, *one.item.context)
        assert add_soft_prompts(before, plan.model.inputs.without_tuning) == before


# -- demonstrations -----------------------------------------------------------------------------------------------------


def few(shelf: Workspace, tmp_path: Path, **changes: Any) -> PromptedTask:
    test = [{"text": f"test {i}", "label": "yes" if i % 3 else "no"} for i in range(6)]
    pool = [{"text": f"train {i}", "label": "yes" if i % 5 else "no"} for i in range(30)]
    path, train = write_rows(tmp_path / "test.jsonl", test), write_rows(tmp_path / "train.jsonl", pool)
    shown = {"path": str(train), "sampler": changes.pop("by", "random")}
    return asked(shelf, path, **{"shots": 4, "few_shot": shown, **changes})


def shown_in(text: str) -> list[str]:
    return text.split("\n\n")[:-1]


def test_seeds_change_the_demonstrations_and_nothing_else_does(shelf: Workspace, tmp_path: Path) -> None:
    found, again = few(shelf, tmp_path, seeds=4), few(shelf, tmp_path, seeds=4)
    assert [[p.text for p in prompts] for prompts in found.prompts_KI] == [
        [p.text for p in prompts] for prompts in again.prompts_KI
    ]
    assert found.fingerprint == again.fingerprint != few(shelf, tmp_path).fingerprint
    by_seed = [{tuple(shown_in(p.text)) for p in prompts} for prompts in found.prompts_KI]
    assert all(len(draws) == 1 for draws in by_seed), "one draw serves all items"
    assert len(set().union(*by_seed)) == 4
    assert [prompts[0].num_demonstrations for prompts in found.prompts_KI] == [4] * 4


def test_balanced_demonstrations_are_balanced(shelf: Workspace, tmp_path: Path) -> None:
    for seed, prompts in enumerate(few(shelf, tmp_path, by="balanced", seeds=8).prompts_KI):
        labels = [re.findall(r"label: (\w+)", each)[0] for each in shown_in(prompts[0].text)]
        assert sorted(labels) == ["no", "no", "yes", "yes"], seed
    orders = {
        tuple(re.findall(r"label: (\w+)\n", prompts[0].text))
        for prompts in few(shelf, tmp_path, by="balanced", seeds=8).prompts_KI
    }
    assert len(orders) > 2, "the order tells nothing of the labels"
    # The mutant: plain draws, of which one in five says no.
    plain = few(shelf, tmp_path, seeds=8).prompts_KI
    assert any(prompts[0].text.count("label: no") != 2 for prompts in plain)


def test_the_most_alike_are_each_items_own(shelf: Workspace, tmp_path: Path) -> None:
    test = [{"text": "red apples fall"}, {"text": "blue fish swim"}]
    pool = [{"text": f"{a} {b}"} for a in ("red apples", "blue fish", "old men", "big cars") for b in ("now", "then")]
    path = write_rows(tmp_path / "a.jsonl", [{**row, "label": "x"} for row in test])
    train = write_rows(tmp_path / "b.jsonl", [{**row, "label": "xy"[i % 2]} for i, row in enumerate(pool)])
    found = asked(shelf, path, shots=2, few_shot={"path": str(train), "sampler": "bm25"})
    for prompt in found.prompts_KI[0]:
        asks = prompt.text.split("text: ")[-1].split()[0]
        assert all(f"text: {asks}" in each for each in shown_in(prompt.text))


def test_no_row_that_is_tested_is_ever_shown(shelf: Workspace, tmp_path: Path) -> None:
    test = [{"text": f"row {i}", "label": "ab"[i % 2]} for i in range(40)]
    copies = [{**row, "label": "a"} for row in test]  # the same questions, answered otherwise
    others = [{"text": f"other {i}", "label": "ab"[i % 2]} for i in range(4)]
    path, train = write_rows(tmp_path / "t.jsonl", test), write_rows(tmp_path / "p.jsonl", [*copies, *others, *others])
    found = asked(shelf, path, shots=3, seeds=5, few_shot={"path": str(train)}, items=7)
    assert len(found) == 7
    for prompts in found.prompts_KI:
        for prompt in prompts:
            before = shown_in(prompt.text)
            assert len(before) == len(set(before)) == 3 and all("other" in each for each in before)
    assert "quiz: 40 copies of test rows are not used as demonstrations" in found.notes
    assert "quiz: 7 of 40 rows are evaluated (items: 7)" in found.notes
    with pytest.raises(
        DataError, match=r"few_shot: 5 shots need as many rows, and there are 4 \(40 more are copies of test rows"
    ):
        asked(shelf, path, shots=5, few_shot={"path": str(train)})
    with pytest.raises(
        DataError, match=r"1 shots need as many rows, and there are 0[\s\S]*another file than the test file"
    ):
        asked(shelf, path, shots=1, few_shot={"path": str(path)})


def test_a_pool_with_test_rows_would_be_met(shelf: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: no two rows are copies."""
    marks = iter(range(10**6))
    monkeypatch.setattr(task_demonstrations, "_row_digests", lambda example, words: {next(marks)})
    path = write_rows(tmp_path / "t.jsonl", [{"text": f"row {i}", "label": "ab"[i % 2]} for i in range(6)])
    found = asked(shelf, path, shots=3, seeds=5, few_shot={"path": str(path)})
    assert any("row" in each for prompts in found.prompts_KI for p in prompts for each in shown_in(p.text))


# -- what fits -------------------------------------------------------------------------------------------------------------


def test_demonstrations_that_do_not_fit_are_left_out_from_the_front(shelf: Workspace, tmp_path: Path) -> None:
    test = [{"prompt": "x " * n + "?", "completion": " yes"} for n in (1, 10, 30, 70)]
    pool = [{"prompt": f"{i} " * 12, "completion": " no"} for i in range(9)]
    path, train = write_rows(tmp_path / "t.jsonl", test), write_rows(tmp_path / "p.jsonl", pool)
    whole = asked(shelf, path, shots=5, few_shot={"path": str(train)}, max_new_tokens=4)
    assert whole.context_length == 128 and whole.skipped == {"too long for the context": 1} and len(whole) == 3
    by_length = sorted(whole.prompts_KI[0], key=lambda p: p.text.split("\n\n")[-1].count("x"))
    counts = [prompt.num_demonstrations for prompt in by_length]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]
    assert whole.num_shortened_prompts == sum(count < 5 for count in counts)
    longest = shown_in(by_length[0].text)
    for prompt in by_length:
        assert len(prompt.item.context) + 4 <= 128
        before = shown_in(prompt.text)
        assert len(before) == prompt.num_demonstrations and longest[len(longest) - len(before) :] == before
    # Room for the answer is kept, and rows are asked under every seed or under none.
    wide = asked(shelf, path, max_new_tokens=100)
    assert wide.skipped == {"too long for the context": 2}
    with pytest.raises(DataError, match=r"none of the 4 rows fits into 128 positions"):
        asked(shelf, path, max_new_tokens=128)


def test_items_are_drawn_by_their_content(shelf: Workspace, tmp_path: Path) -> None:
    test = [{"prompt": f"row {i}?", "completion": " yes"} for i in range(50)]
    one = asked(shelf, write_rows(tmp_path / "a.jsonl", test), items=10)
    other = asked(shelf, write_rows(tmp_path / "b.jsonl", test[::-1]), items=10)
    assert one.digests_I == other.digests_I and len(one) == 10
    assert one.fingerprint == other.fingerprint and one.rows_fingerprint == other.rows_fingerprint
    assert set(one.test_digests_N.tolist()) >= set(one.digests_I) and len(one.test_digests_N) == 50


# -- how it is answered ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "metrics"),
    [
        ({"text": "a", "label": "x"}, ("accuracy", "macro-F1", "MCC")),
        ({"question": "q", "choices": ["a", "b"], "answer": 0}, ("accuracy",)),
        ({"prompt": "a", "completion": "so\n#### 5"}, ("numeric",)),
        ({"prompt": "a", "completion": " 1,200"}, ("numeric",)),
        ({"prompt": "a", "completion": " 3.2"}, ("Pearson", "Spearman")),
        ({"sentence1": "a", "sentence2": "b", "label": 3.2}, ("Pearson", "Spearman")),
        ({"prompt": "a", "completion": " b"}, ("exact-match", "F1", "ROUGE-L")),
        ({"text": "a", "labels": ["x", "y"]}, ("exact-match", "F1", "ROUGE-L")),
    ],
)  # fmt: skip
def test_metrics_that_the_answers_suggest(
    shelf: Workspace, tmp_path: Path, row: dict[str, Any], metrics: tuple[str, ...]
) -> None:
    other = {**row, "text": "b", "label": "y"} if row.get("label") == "x" else row
    assert asked(shelf, write_rows(tmp_path / "t.jsonl", [row, other])).metrics == metrics


def test_a_stop_is_what_no_answer_has_inside(shelf: Workspace, tmp_path: Path) -> None:
    for answers, stop in ((["a", "b\n"], ("\n",)), (["a", "b\nc"], ("\n\n",)), (["a\n\nb", "c"], ())):
        path = write_rows(tmp_path / "t.jsonl", [{"prompt": f"{i}?", "completion": a} for i, a in enumerate(answers)])
        assert asked(shelf, path).stopping.stop_strings == stop
        assert asked(shelf, path, stop=["."], max_new_tokens=7).stopping == StoppingRule(7, (".",))
        assert asked(shelf, path, stop=[]).stopping.stop_strings == ()


def test_questions_without_content_and_a_bare_one(shelf: Workspace, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"text": "one", "label": "yes"}, {"text": "two", "label": "no"}])
    tokenizer = make_tokenizer()
    (prompt, _) = asked(shelf, path, calibrate=True).prompts_KI[0]
    assert [words(tokenizer, item.context) for item in prompt.calibration_items] == [
        "text: N/A\nlabel:", "text: \nlabel:", "text: [MASK]\nlabel:",
    ]  # fmt: skip
    assert all(item.choices == prompt.item.choices for item in prompt.calibration_items)
    (prompt, _) = asked(shelf, path, normalization="answer-only").prompts_KI[0]
    assert [words(tokenizer, item.context) for item in prompt.calibration_items] == ["Answer:"]


# -- what cannot be asked ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "changes", "error", "said"),
    [
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "z"}], {"label_words": {"x": "yes", "y": "no"}}, DataError,
         r"t\.jsonl:2: no word for the label 'z'[\s\S]*x, y"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}], {"prompt": "{test}"}, DataError,
         r"t\.jsonl:1: the template uses \{test\}[\s\S]*did you mean 'text'"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}], {"prompt": "{text} {label}"}, DataError,
         r"t\.jsonl:1: the question leaks the right choice"),
        ([{"text": "a", "label": "x"}], {"scoring": "multiple-choice"}, StageError, "there is only one label"),
        ([{"prompt": "a", "completion": "b"}], {"scoring": "multiple-choice"}, StageError, "`completion` have no choices"),
        ([{"prompt": "a", "completion": "b"}], {"normalization": "token"}, StageError,
         r"\.normalization: `normalization` compares choices"),
        ([{"prompt": "a", "completion": "b"}], {"calibrate": True}, StageError, r"\.calibrate: "),
        ([{"question": "q", "choices": ["a", "b"], "answer": 0}], {"metrics": ["F1"]}, StageError,
         r"\.metrics: `F1` is a metric of generated answers"),
        ([{"prompt": "a", "completion": ""}], {}, DataError, "empty answer"),
        ([{"body": "a"}], {}, DataError, "no column"),
        ([{"text": "running"}], {}, DataError, "no column `label"),
        ([{"prompt": "a", "completion": "b", "references": [3]}], {}, DataError, "`references` holds the number 3"),
        ([{"prompt": "a", "completion": "b", "task": "t"}], {"filter": {"task": ["u", "v"]}}, DataError,
         "no document with task u or v"),
        ([{"prompt": "a", "completion": "b"}], {"filter": {"taks": "u"}}, DataError, "no column `taks`"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_asked(
    shelf: Workspace,
    tmp_path: Path,
    made: list[dict[str, Any]],
    changes: dict[str, Any],
    error: type[Exception],
    said: str,
) -> None:
    with pytest.raises(error, match=said):
        asked(shelf, write_rows(tmp_path / "t.jsonl", made), **changes)


def test_an_encoder_is_told_what_it_can_do_instead(shelf: Workspace) -> None:
    with pytest.raises(ModelError, match=r"does not[\s\S]*masked \(a cloze\)"):
        asked(shelf, shelf.file("labelled"), "bert")


def test_only_the_rows_that_are_asked_for(shelf: Workspace, tmp_path: Path) -> None:
    made = [{"prompt": f"{i}?", "completion": "b", "task": ["add", "sub", 3][i % 3]} for i in range(9)]
    path = write_rows(tmp_path / "t.jsonl", made)
    for only, prompts in (({"task": "add"}, "036"), ({"task": ["sub", 3]}, "124578"), ({"task": "3"}, "258")):
        found = asked(shelf, path, filter=only, shots=0)
        assert sorted(p.text[0] for p in found.prompts_KI[0]) == sorted(prompts)
    # What is shown is chosen by the same columns.
    train = write_rows(tmp_path / "p.jsonl", [{**row, "prompt": f"more {row['prompt']}"} for row in made])
    found = asked(shelf, path, filter={"task": "add"}, shots=3, few_shot={"path": str(train)})
    assert {d[5] for d in shown_in(found.prompts_KI[0][0].text)} == set("036")


@pytest.mark.parametrize(
    ("written_", "said"),
    [
        ("- {name: a, path: x, shots: 2}", "2 shots require `few_shot`"),
        ("- {name: a, path: x, seeds: 2, shots: 1, few_shot: {path: y, sampler: bm25}}", "`bm25` is deterministic"),
        ("- {name: a, path: x, calibrate: true, normalization: answer-only}", "use one"),
        ("- {name: a, path: x, shot: 2}", r"tasks\[0\]\.shot: there is no key 'shot'[\s\S]*did you mean 'shots'"),
        ("- {name: a, path: x}\n- {name: a, path: y}", "two tasks are called 'a'"),
        ("- {name: a, path: x, kind: text}", "running text has no questions"),
        ("{name: a, path: x}", "a file of tasks is a list"),
        ("[", "not YAML"),
    ],
)
def test_mistakes_in_a_file_of_tasks(tmp_path: Path, written_: str, said: str) -> None:
    file = tmp_path / "tasks.yaml"
    file.write_text(written_)
    with pytest.raises(StageError, match=said):
        load_tasks(file)


def test_tasks_may_share_keys(tmp_path: Path) -> None:
    file = tmp_path / "tasks.yaml"
    file.write_text("- &one {name: a, path: x, items: 7}\n- {<<: *one, name: b, items: 9}\n- {<<: *one, name: c}")
    assert [(t.name, t.path, t.items) for t in load_tasks(file)] == [("a", "x", 7), ("b", "x", 9), ("c", "x", 7)]
    file.write_text("- &one {name: a, path: x}\n- {<<: *one, name: b, name: c}")
    with pytest.raises(StageError, match="'name' is a duplicate"):
        load_tasks(file)


def test_shots_can_be_said_for_all(tmp_path: Path) -> None:
    file = tmp_path / "tasks.yaml"
    file.write_text("- {name: a, path: x, shots: 5, few_shot: {path: y}}\n- {name: b, path: x}")
    assert [t.shots for t in load_tasks(file)] == [5, 0] and [t.shots for t in load_tasks(file, 0)] == [0, 0]
    with pytest.raises(StageError, match="3 shots require `few_shot`"):
        load_tasks(file, 3)


def test_a_stage_names_its_tasks_and_clusters() -> None:
    raw = {
        "name": "s", "model": "m", "tokens": 100, "schedule": {"kind": "constant", "peak": 1e-3},
        "data": {"sources": [{"name": "x", "path": "x", "cluster": "maths", "filter": {"task": 1}}]},
        "evaluation": {"tasks": [{"name": "q", "path": "q.jsonl", "cluster": "maths"}]},
    }  # fmt: skip
    stage = parse_stage(raw, "t")
    assert stage.data.sources[0].filter == {"task": ["1"]} and stage.evaluation.tasks[0].cluster == "maths"
    assert parse_stage(stage.model_dump(mode="json"), "t") == stage
