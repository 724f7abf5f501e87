"""What a model answers to its tasks: compared as it is said, the same before and after, kept when a run is killed."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from postgrad.check.check import check_stage
from postgrad.cli import render
from postgrad.cli.main import app
from postgrad.commands.compare import compare_runs, compare_tasks
from postgrad.commands.evaluate_tasks import evaluate_tasks
from postgrad.commands.lineage import trace_lineage
from postgrad.commands.pages import write_page
from postgrad.commands.score_files import load_model_inputs
from postgrad.config.tasks import TaskConfig
from postgrad.distributed.world import World
from postgrad.errors import DataError, ModelError, ResumeError, StageError
from postgrad.evaluation.choices.loglikelihood import ChoiceItem
from postgrad.lineage.metrics import TaskRow, read_metrics
from postgrad.lineage.record import read_record
from postgrad.models.location import locate_model
from postgrad.models.model import wrap_model
from postgrad.models.pretrained import load_pretrained
from postgrad.models.task import Task
from postgrad.plan.prompted_task import PromptedTask, TaskPrompt
from postgrad.plan.task_prompts import make_prompted_task
from postgrad.reports.pages import run_page
from postgrad.reports.sections.task_section import cluster_table, task_table
from postgrad.run import task_scores
from postgrad.run.run import run_stage
from postgrad.run.task_scores import answer_tasks, choice_scores, read_answers
from tests.tiny_stages import Workspace, make_workspace, run_interrupted, run_trace, write_rows

HERE = World(torch.device("cpu"))
TASKS_HEADING = '<h2 id="tasks-h">Tasks</h2>'


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    home = tmp_path_factory.mktemp("shelf")
    return make_workspace(home, home / "cache")


def quizzes(shelf: Workspace, *names: str) -> list[dict[str, Any]]:
    """Tasks that are chosen or written, with demonstrations or without."""
    every: list[dict[str, Any]] = [
        {"name": "kinds", "path": shelf.file("labelled", held_out=True), "cluster": "sorts", "shots": 2, "seeds": 2,
         "few_shot": {"path": shelf.file("labelled"), "sampler": "balanced"}, "items": 16, "during_training": True},
        {"name": "pairs", "path": shelf.file("choices", held_out=True), "cluster": "choices", "calibrate": True},
        {"name": "named", "path": shelf.file("completion", held_out=True), "role": "learned", "max_new_tokens": 4,
         "cluster": "sorts"},
    ]  # fmt: skip
    return [each for each in every if not names or each["name"] in names]


def examined(shelf: Workspace, name: str, *tasks: str, **changes: Any) -> dict[str, Any]:
    """A stage that learns completions and is asked tasks before and after."""
    changes = {"sources": [shelf.source("completion", cluster="sorts")], **changes}
    raw = shelf.stage(name, **changes)
    raw["evaluation"] = {**shelf.text_evaluation, "tasks": quizzes(shelf, *tasks)}
    return raw


def asked_of(shelf: Workspace, path: Path | str, **changes: Any) -> PromptedTask:
    reading = load_model_inputs(locate_model(str(shelf.folder / "llama"), Path.cwd()), 1024)
    return make_prompted_task(
        TaskConfig.model_validate({"name": "quiz", "path": str(path), **changes}), reading, Path.cwd(), "tasks[0]"
    )


# -- how choices are compared ----------------------------------------------------------------------------------------

OWN, BARE, FREE = ChoiceItem((1,), ((2,), (3, 4))), ChoiceItem((5,), ((2,), (3, 4))), ChoiceItem((6,), ((2,), (3, 4)))
LOG_P = {OWN: np.array([-3.0, -4.0]), BARE: np.array([-1.0, -3.0]), FREE: np.log([0.3, 0.1])}


def compared(shelf: Workspace, by: str, *against: ChoiceItem, calibrate: bool = False) -> list[float]:
    quiz = asked_of(shelf, shelf.file("choices"))
    quiz = replace(quiz, task=quiz.task.model_copy(update={"normalization": by, "calibrate": calibrate}))
    return choice_scores(quiz, TaskPrompt("", "", 0, OWN, against), ("sé", "long"), LOG_P).tolist()


def test_choices_compared_by_hand(shelf: Workspace) -> None:
    assert compared(shelf, "sum") == [-3, -4]
    assert compared(shelf, "token") == [-3, -2]
    assert compared(shelf, "byte") == [-1, -1]  # three bytes and four
    assert compared(shelf, "character") == [-1.5, -1]
    assert compared(shelf, "answer-only", BARE) == [-2, -1]

    # Zhao et al. 2021: p / p_cf, where p_cf is over the choices alone: 0.75 and 0.25.
    def ahead(*against: ChoiceItem) -> float:
        one, two = compared(shelf, "sum", *against, calibrate=True)
        return one - two

    assert ahead(FREE) == pytest.approx(-3 - np.log(0.75) - (-4 - np.log(0.25)))
    # Of several empty questions the mean of the probabilities, not of their logarithms.
    half = ChoiceItem((7,), ((2,), (3, 4)))
    LOG_P[half] = np.log([0.1, 0.1])
    assert ahead(FREE, half) == pytest.approx(-3 - np.log(0.4) - (-4 - np.log(0.2)))


@torch.no_grad()
def test_what_is_chosen_is_the_likeliest_by_a_plain_loop(shelf: Workspace) -> None:
    quiz = asked_of(shelf, shelf.file("labelled", held_out=True), shots=1, few_shot={"path": shelf.file("labelled")})
    model = AutoModelForCausalLM.from_pretrained(shelf.folder / "llama")
    expected = []
    for prompt in quiz.prompts_KI[0]:
        found = []
        for choice in prompt.item.choices:
            ids = torch.tensor([[*prompt.item.context, *choice]])
            log_p = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
            found.append(sum(float(log_p[len(prompt.item.context) - 1 + i, c]) for i, c in enumerate(choice)))
        expected.append(quiz.choice_names_I[0][int(np.argmax(found))])
    start = locate_model(str(shelf.folder / "llama"), Path.cwd())
    answers = answer_tasks(
        wrap_model(load_pretrained(start).model, Task.CAUSAL), [quiz], load_model_inputs(start, 1024), world=HERE
    )["quiz"]
    assert answers.predictions_KI == (tuple(expected),) and answers.references_I == quiz.references_I


class _Waiting(Exception):
    """The others have not yet said what they found."""


@dataclass(frozen=True)
class _Rank(World):
    """One of several ranks, with a table in which each leaves what it found."""

    table: dict[int, object] = field(default_factory=dict)

    def all_gather(self, value: object) -> list[object]:
        self.table[self.rank] = value
        if len(self.table) < self.size:
            raise _Waiting
        return [self.table[rank] for rank in range(self.size)]


@pytest.mark.parametrize("name", ["kinds", "named"])
def test_ranks_answer_parts_that_make_a_whole(shelf: Workspace, name: str) -> None:
    (spec,) = quizzes(shelf, name)
    start = locate_model(str(shelf.folder / "llama"), Path.cwd())
    reading = load_model_inputs(start, 1024)
    quiz = make_prompted_task(TaskConfig.model_validate(spec), reading, Path.cwd(), "t")
    model = wrap_model(load_pretrained(start).model, Task.CAUSAL)
    alone = answer_tasks(model, [quiz], reading, world=HERE)[name]
    table: dict[int, object] = {}
    for rank in (0, 1):
        with pytest.raises(_Waiting):
            answer_tasks(model, [quiz], reading, world=_Rank(HERE.device, rank, 3, table=table))
    for rank in (2, 0):
        assert answer_tasks(model, [quiz], reading, world=_Rank(HERE.device, rank, 3, table=table))[name] == alone
    sizes = [len(part) for part in table.values()]  # type: ignore[arg-type]
    assert max(sizes) - min(sizes) <= 1, "each answers a part"


# -- a stage ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(shelf: Workspace) -> Path:
    return shelf.run(examined(shelf, "examined")).run_folder


def test_a_record_says_what_was_answered_before_and_after(shelf: Workspace, run: Path) -> None:
    record = read_record(run)
    by_name = {entry.name: entry for entry in record.tasks}
    assert list(by_name) == ["kinds", "pairs", "named"]
    assert (by_name["kinds"].shots, by_name["kinds"].seeds, by_name["kinds"].items) == (2, 2, 16)
    assert by_name["named"].scoring == "generate" and by_name["pairs"].scoring == "multiple-choice"
    for entry in record.tasks:
        for metric in entry.metrics:
            was, now, moved = entry.before[metric], entry.after[metric], entry.changes[metric]
            assert moved.difference == pytest.approx(now.value - was.value)
            assert was.low <= was.value <= was.high and moved.low <= moved.difference <= moved.high
    # What is written down is what the models say when they are asked again.
    tasks = shelf.folder / "tasks.json"
    tasks.write_text(json.dumps(quizzes(shelf)))
    for side, model in (("before", str(shelf.folder / "llama")), ("after", str(run))):
        again = evaluate_tasks(model, tasks, cache=shelf.folder / side).tasks
        assert [task.scores for task in again] == [getattr(task, side) for task in record.tasks]
    said = [read_answers(run / "scores" / f"tasks-{side}.json")["named"] for side in ("before", "after")]
    assert said[0].predictions_KI != said[1].predictions_KI and said[0].references_I == said[1].references_I


def test_clusters_that_were_never_trained_on_come_first(shelf: Workspace, run: Path) -> None:
    record = read_record(run)
    found = [(c.task_cluster, c.trained_on, c.tasks, c.metric) for c in record.task_clusters]
    assert found == [
        ("choices", False, ["pairs"], "accuracy"),
        ("sorts", True, ["kinds"], "accuracy"),
        ("sorts", True, ["named"], "exact-match"),
    ]
    # What an earlier stage trained on has been seen.
    raw = examined(shelf, "later", "named", "pairs", model="runs/examined")
    raw["data"]["sources"] = [shelf.source("choices", cluster="choices")]
    assert shelf.plan(raw).data.seen_clusters == {"choices", "sorts"}
    raw["model"] = str(shelf.folder / "llama")
    assert shelf.plan(raw).data.seen_clusters == {"choices"}


def test_check_says_that_several_processes_do_not_ask_during_training(shelf: Workspace) -> None:
    raw = shelf.stage("during")
    said = []
    for during in (False, True):
        task = {"name": "kinds", "path": shelf.file("labelled", held_out=True), "items": 4, "during_training": during}
        raw["evaluation"] = {**shelf.text_evaluation, "tasks": [task]}
        said.append(check_stage(shelf.plan(raw), cache=shelf.cache)["text"])
    assert ["note: kinds: evaluated only before and after training" in text for text in said] == [False, True]


def test_looks_during_training_ask_what_is_asked_for(shelf: Workspace, run: Path) -> None:
    looks = [row for row in read_metrics(run / "metrics.jsonl") if row.kind == "evaluation"]
    assert len(looks) > 2 and all(set(row.tasks) == {"kinds"} for row in looks)
    (entry,) = (e for e in read_record(run).tasks if e.name == "kinds")
    assert looks[0].tasks["kinds"] == TaskRow(metric="accuracy", value=entry.before["accuracy"].value)
    assert looks[-1].tasks["kinds"].value == entry.after["accuracy"].value


def test_looks_are_right_however_a_model_attends_while_it_is_trained(shelf: Workspace) -> None:
    """What is written goes on from a cache, which training never has."""
    compute = {"threads": 1, "dtype": "float32", "compile": False, "attention": "causal_blocks"}
    schedule = {"kind": "constant", "peak": 3e-2, "warmup": 0}
    raw = examined(shelf, "attending", "named", compute=compute, schedule=schedule, tokens=24 * 4 * 48)
    raw["evaluation"]["tasks"][0] |= {"during_training": True, "metrics": ["chrF"]}
    record = shelf.run(raw).record
    (entry,) = record.tasks
    assert entry.after["chrF"].value > entry.before["chrF"].value + 1
    looks = [row for row in read_metrics(shelf.folder / "runs/attending/metrics.jsonl") if row.kind == "evaluation"]
    assert looks[-1].tasks["named"].value == pytest.approx(entry.after["chrF"].value)


def test_the_end_and_the_page_tell_of_tasks(run: Path) -> None:
    record = read_record(run)
    table, clusters = task_table(record), cluster_table(record)
    assert table and clusters
    assert len(table.rows) == 3 + 1 + 3
    assert "trained on" in clusters.text()
    found = [(row[0].text, row[1].text) for row in clusters.rows]
    assert found == [("choices", "no"), ("sorts", "yes"), ("sorts", "yes")]
    html = run_page.run_page(record, read_metrics(run / "metrics.jsonl"))
    for text in (
        TASKS_HEADING,
        "2 shots, 2 seeds, multiple choice",
        "Task clusters, trained on and not",
        "Prompts and answers: named",
    ):
        assert text in html
    plain = run_page.run_page(record.model_copy(update={"tasks": [], "task_clusters": []}), [])
    assert TASKS_HEADING not in plain and "Tasks before and after" not in plain


def test_nothing_that_is_tested_is_trained_on(shelf: Workspace, tmp_path: Path) -> None:
    test = [json.loads(line) for line in Path(shelf.file("completion", held_out=True)).read_text().splitlines()]
    train = [json.loads(line) for line in Path(shelf.file("completion")).read_text().splitlines()]
    both = write_rows(tmp_path / "both.jsonl", [*test, *train])
    raw = examined(shelf, "copies", "named")
    raw["data"]["sources"][0]["path"] = str(both)
    plan, without = shelf.plan(raw), shelf.plan({**raw, "evaluation": shelf.text_evaluation})
    assert plan.data.rows[0].ledger.dropped > without.data.rows[0].ledger.dropped
    assert plan.data.rows[0].ledger.placed < without.data.rows[0].ledger.placed
    assert len(plan.evaluation.tasks[0].test_digests_N) == len(test)


def test_killed_and_resumed_keeps_what_was_answered_before(
    shelf: Workspace, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = examined(shelf, "parts")
    whole = read_record(run)
    parts = run_interrupted(shelf, raw)
    assert run_trace(parts.run_folder) == run_trace(run)
    assert parts.record.tasks == whole.tasks and parts.record.task_clusters == whole.task_clusters
    # Resumed at the very end: the start model is not asked again, and what it said is what was kept.
    said = []
    monkeypatch.setattr(
        task_scores,
        "answer_tasks",
        lambda model, tasks, *a, **k: said.extend(tasks) or answer_tasks(model, tasks, *a, **k),
    )
    raw = examined(shelf, "late", "pairs")
    for event in run_stage(shelf.plan(raw), command="test", cache=shelf.cache / "none"):
        if type(event).__name__ == "StepCompleted" and event.report.step == 5:  # type: ignore[union-attr]
            break
    assert len(said) == 1
    kept = read_answers(shelf.folder / "runs" / "late" / "scores" / "tasks-before.json")
    assert shelf.run(raw).record.status == "finished" and len(said) == 2
    assert read_answers(shelf.folder / "runs" / "late" / "scores" / "tasks-before.json") == kept


def test_a_stopped_run_says_what_was_answered_before(shelf: Workspace) -> None:
    raw = examined(shelf, "stopped", "pairs")
    for event in run_stage(shelf.plan(raw), command="test", cache=shelf.cache):
        if type(event).__name__ == "StepCompleted" and event.report.step == 3:  # type: ignore[union-attr]
            os.kill(os.getpid(), signal.SIGTERM)
    record = read_record(shelf.folder / "runs" / "stopped")
    assert record.status == "stopped" and record.tasks[0].before["accuracy"].value > 0
    assert record.tasks[0].after == {} and task_table(record)
    assert TASKS_HEADING in run_page.run_page(record, [])


def test_other_test_rows_are_another_stage(shelf: Workspace, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"prompt": f"{i}?", "completion": " x"} for i in range(5)])
    raw = examined(shelf, "moved")
    raw["evaluation"]["tasks"] = [{"name": "quiz", "path": str(path), "max_new_tokens": 2}]
    shelf.run(raw)
    write_rows(path, [{"prompt": f"{i}?", "completion": " y"} for i in range(5)])
    with pytest.raises(ResumeError, match=r"tasks\.quiz"):
        shelf.run(raw)


@pytest.mark.parametrize("tuning", [{"kind": "prompt", "length": 3}, {"kind": "prefix", "length": 3}, {"kind": "lora"}])
@pytest.mark.parametrize("model", ["llama", "t5"])
def test_every_sort_of_tuning_is_asked(shelf: Workspace, model: str, tuning: dict[str, Any]) -> None:
    raw = examined(shelf, f"tuned-{model}-{tuning['kind']}", "pairs", "named", model=model, tuning=tuning)
    if model == "t5":
        raw["objectives"] = [{"kind": "text-to-text"}]
        raw["evaluation"] |= {"retained": [], "learned": [shelf.file("pair", held_out=True)]}
    record = shelf.run(raw).record
    tasks = shelf.folder / "tuned.json"
    tasks.write_text(json.dumps(quizzes(shelf, "pairs", "named")))
    again = evaluate_tasks(str(shelf.folder / "runs" / raw["name"]), tasks, cache=shelf.folder / "other")
    assert [task.scores for task in again.tasks] == [task.after for task in record.tasks]


def test_a_stage_on_an_encoder_asks_nothing(shelf: Workspace) -> None:
    raw = examined(shelf, "encoder", "pairs", model="bert", sources=[shelf.source("new")])
    with pytest.raises(ModelError, match=r"evaluation\.tasks\[0\]: tasks in prompts need[\s\S]*cloze"):
        shelf.plan(raw)


# -- outside of stages ---------------------------------------------------------------------------------------------------


def test_a_second_look_is_taken_from_the_cache(shelf: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = shelf.folder / "cached.json"
    tasks.write_text(json.dumps(quizzes(shelf)))
    first = evaluate_tasks(str(shelf.folder / "llama"), tasks, cache=shelf.folder / "memo")
    monkeypatch.setattr(task_scores, "_select_choices", None)
    monkeypatch.setattr(task_scores, "_generate_answers", None)
    assert evaluate_tasks(str(shelf.folder / "llama"), tasks, cache=shelf.folder / "memo") == first
    with pytest.raises(TypeError):  # another number of shots is another question
        evaluate_tasks(str(shelf.folder / "llama"), tasks, shots=0, cache=shelf.folder / "memo")


def test_models_beside_each_other_item_by_item(shelf: Workspace, run: Path) -> None:
    tasks = shelf.folder / "beside.json"
    tasks.write_text(json.dumps(quizzes(shelf)))
    found = compare_tasks([str(shelf.folder / "llama"), str(run)], tasks, cache=shelf.cache)
    record = read_record(run)
    first, second = found.models
    assert not first.changes
    assert list(second.changes.values()) == [task.changes for task in record.tasks]
    assert f"{run}, named: exact-match +" in render.task_comparison_text(found)
    # Another context may leave other items out: the pairs are of what both were asked.
    other = compare_tasks([str(shelf.folder / "t5"), str(run)], tasks, cache=shelf.cache)
    assert {task.items for task in other.models[0].tasks} == {16, 24}


def test_runs_beside_each_other(shelf: Workspace, run: Path) -> None:
    other = shelf.run(examined(shelf, "slower", schedule={"kind": "constant", "peak": 1e-4, "warmup": 0})).run_folder
    found = compare_runs([run, other])
    write_page(found, shelf.folder / "beside.html")
    assert [(p.task, p.arm) for p in found.paired_tasks] == [
        ("kinds", "slower"), ("pairs", "slower"), ("named", "slower"),
    ]  # fmt: skip
    after = [{e.name: e.after for e in read_record(r).tasks} for r in (run, other)]
    for pair in found.paired_tasks:
        one, two = (side[pair.task][pair.metric].value for side in after)
        assert pair.difference == pytest.approx(two - one)
    text = render.run_comparison_text(found, None)
    assert "Tasks, arms side by side" in text and "named (exact-match)" in text
    assert TASKS_HEADING in (shelf.folder / "beside.html").read_text()
    # Tasks that were asked otherwise are not held against each other.
    raw = examined(shelf, "otherwise", "kinds")
    raw["evaluation"]["tasks"][0]["shots"] = 1
    assert compare_runs([run, shelf.run(raw).run_folder]).paired_tasks == ()


def test_a_lineage_needs_no_tasks(shelf: Workspace, run: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"prompt": f"{i}?", "completion": " x"} for i in range(5)])
    raw = examined(shelf, "second", model=str(run))
    raw["evaluation"]["tasks"] = [{"name": "quiz", "path": str(path), "max_new_tokens": 2}]
    place = shelf.run(raw).run_folder
    path.unlink()
    assert len(trace_lineage(place, cache=shelf.cache).R) == 3


def test_the_command_line(shelf: Workspace, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRAD_CACHE", str(shelf.cache))
    tasks = shelf.folder / "words.yaml"
    tasks.write_text(json.dumps(quizzes(shelf)))

    def said(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
        assert result.exit_code == 0
        return result.output

    text = said("eval", str(run), "--tasks", str(tasks))
    for part in ("kinds", "2 shots, 2 seeds, multiple choice", "macro-F1", "exact-match", "next: postgrad compare"):
        assert part in text
    both = json.loads(said("eval", str(run), shelf.file("old", held_out=True), "--tasks", str(tasks), "--json"))
    assert set(both["sets"]) == {"old-heldout"} and len(both["tasks"]) == 3
    assert json.loads(said("eval", str(run), "--tasks", str(tasks), "--shots", "0", "--json"))["tasks"][0]["shots"] == 0
    assert "item by item" in said("compare", str(shelf.folder / "llama"), str(run), "--tasks", str(tasks))
    with pytest.raises(StageError, match="nothing to score"):
        said("eval", str(run))
    with pytest.raises(StageError, match="different comparisons"):
        said("compare", "a", "b", "--tasks", str(tasks), "--text", "x")
    with pytest.raises(ModelError, match=r"words\.yaml: kinds: tasks in prompts need"):
        said("eval", str(shelf.folder / "bert"), "--tasks", str(tasks))
    tasks.write_text("- {name: quiz, path: nowhere.jsonl}")
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        said("eval", str(run), "--tasks", str(tasks))
