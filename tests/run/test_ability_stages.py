"""Abilities before and after a stage: nothing lost by a model that does not change, a gate that refuses, each model's form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from postgrad.check.check import check_stage
from postgrad.cli.main import app
from postgrad.cli.render import ability_comparison_text, ability_evaluation_text
from postgrad.commands.compare import compare_abilities
from postgrad.commands.evaluate_abilities import evaluate_abilities
from postgrad.commands.pilot_stages import make_pilot_stage
from postgrad.commands.score_files import load_model_inputs
from postgrad.config.abilities import AbilitiesConfig
from postgrad.config.stage_file import parse_stage
from postgrad.errors import DataError, ModelError, StageError
from postgrad.evaluation.generation_metrics import TaskPredictions
from postgrad.evaluation.retention_gate import ability_gate
from postgrad.lineage.record import Difference, TaskRecord, read_record
from postgrad.models.location import locate_model
from postgrad.plan.ability_tasks import has_chat_form, make_ability_tasks
from postgrad.plan.model_inputs import ModelInputs
from postgrad.reports.sections.ability_section import comparison_ability_table
from postgrad.run import task_scores
from postgrad.run.summary import summary_text
from tests.conftest import make_llama, make_tokenizer
from tests.tiny_stages import Workspace, make_workspace, run_interrupted, run_trace, save_model

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
QUICK: dict[str, Any] = {"items": 3, "max_new_tokens": 4, "shots": 1}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    home = tmp_path_factory.mktemp("shelf")
    save_model(make_llama(max_position_embeddings=1024), make_tokenizer(), home / "wide")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    save_model(make_llama(max_position_embeddings=1024), tokenizer, home / "chatty")
    return make_workspace(home, home / "cache")


def probed(shelf: Workspace, name: str, abilities: Any = None, **changes: Any) -> dict[str, Any]:
    """A stage that measures abilities."""
    raw = shelf.stage(name, model=changes.pop("model", "wide"), **changes)
    return {**raw, "evaluation": {**shelf.text_evaluation, "drift_tokens": 0, "abilities": abilities or QUICK}}


def reading(shelf: Workspace, model: str) -> ModelInputs:
    return load_model_inputs(locate_model(str(shelf.folder / model), Path.cwd()), 1024)


# -- what a model reads ----------------------------------------------------------------------------------------------------


def test_a_base_model_reads_demonstrations_and_a_chat_model_its_turns(shelf: Workspace) -> None:
    base, chatty = reading(shelf, "wide"), reading(shelf, "chatty")
    config = AbilitiesConfig(only=["copying", "format", "refusal", "calibration"], items=5)
    assert (has_chat_form(base), has_chat_form(chatty)) == (False, True)
    plain, turns = make_ability_tasks(config, base, False), make_ability_tasks(config, chatty, True)
    for one, other in zip(plain, turns, strict=True):
        # The same probes, in the same order, with the same references: answers of both models are paired.
        assert one.digests_I == other.digests_I and one.references_I == other.references_I
    copying, format_, refusal, calibration = (task.prompts_KI[0][0] for task in plain)
    assert copying.text.count("Question: ") == 5 and copying.text.endswith("\nAnswer:")
    assert turns[0].prompts_KI[0][0].text.startswith("<user>") and turns[0].prompts_KI[0][0].text.endswith(
        "\n<assistant>"
    )
    assert "Question" not in turns[0].prompts_KI[0][0].text
    # Choices are compared in plain text by every model.
    assert calibration.text == turns[3].prompts_KI[0][0].text and len(calibration.item.choices) == 4
    assert plain[0].stopping.stop_strings == ("\n",) and plain[1].stopping.stop_strings == ("\n\n",)
    assert turns[0].stopping.stop_strings == ()
    assert "can't help" in refusal.text or "won't help" in refusal.text
    assert refusal.text.count("help with that.") + refusal.text.count("hurt somebody") == 2  # and two that are answered
    for task in plain:
        shown = {line for prompt in task.prompts_KI[0] for line in prompt.text.split("\n\n")[:-1]}
        assert not shown & {prompt.question for prompt in task.prompts_KI[0]}
    assert format_.num_demonstrations == 4
    again = make_ability_tasks(config, base, False)
    assert [task.fingerprint for task in again] == [task.fingerprint for task in plain]


def test_an_encoder_is_refused_and_a_short_context_says_so(shelf: Workspace) -> None:
    with pytest.raises(ModelError, match=r"evaluation.abilities: tasks in prompts need a model that generates"):
        make_ability_tasks(AbilitiesConfig(items=2), reading(shelf, "bert"), False)
    with pytest.raises(DataError, match=r"none of the 2 rows fits into 1,024 positions"):
        make_ability_tasks(
            AbilitiesConfig(items=2, only=["copying"], max_new_tokens=1024), reading(shelf, "wide"), False
        )
    tasks = make_ability_tasks(AbilitiesConfig(items=2), reading(shelf, "t5"), False)
    assert len(tasks) == 8


# -- the gate --------------------------------------------------------------------------------------------------------------


def rows(**changes: tuple[float, float, float]) -> list[TaskRecord]:
    return [
        TaskRecord(name=name, metrics=["correct"], changes={"correct": Difference(difference=d, low=low, high=high)})
        for name, (d, low, high) in changes.items()
    ]


def test_the_gate_is_of_the_upper_end_of_the_drop_and_of_each_ability() -> None:
    kept = rows(copying=(0.0, 0.0, 0.0), format=(-0.02, -0.05, 0.01))
    mean = Difference(difference=-0.01, low=-0.029, high=0.005)
    gate = ability_gate(mean, kept, 0.03)
    assert gate is not None and gate.passed and (gate.drop, gate.drop_high) == (0.01, 0.029)
    # The mutant that goes by the drop itself passes this one: only its upper end is beyond the bound.
    unsure = ability_gate(Difference(difference=-0.01, low=-0.031, high=0.011), kept, 0.03)
    assert unsure is not None and not unsure.passed and unsure.drop <= 0.03 and not unsure.lost
    # The mutant that goes by the mean alone passes this one: an ability is certainly lost.
    lost = ability_gate(mean, rows(copying=(0.1, 0.05, 0.2), format=(-0.2, -0.3, -0.04)), 0.03)
    assert lost is not None and not lost.passed and lost.lost == ["format"]
    # The mutant that goes by each ability's upper end fails this one: it is only not known well.
    vague = ability_gate(mean, rows(format=(-0.02, -0.2, 0.16)), 0.03)
    assert vague is not None and vague.passed
    one_item = ability_gate(Difference(difference=-0.5), [], 0.03)
    assert one_item is not None and not one_item.passed
    assert ability_gate(mean, kept, None) is None and ability_gate(None, kept, 0.03) is None


def test_a_model_that_does_not_change_loses_exactly_nothing(shelf: Workspace) -> None:
    still = {"kind": "constant", "peak": 1e-30, "warmup": 0}
    done = shelf.run(probed(shelf, "still", schedule=still, max_ability_drop="0%"))
    abilities = done.record.abilities
    assert abilities is not None and len(abilities.tasks) == 8 and done.record.status == "finished"
    for task in abilities.tasks:
        assert task.before == task.after
        for change in task.changes.values():
            assert (change.difference, change.low, change.high) == (0, 0, 0)
    assert abilities.change is not None and (abilities.change.low, abilities.change.high) == (0, 0)
    assert abilities.gate is not None and abilities.gate.passed and abilities.gate.drop_high == 0
    text = summary_text(done)
    assert (
        "gate on abilities passed: the mean score of abilities changed by 0.00 points of 100 (lower end 0.00)" in text
    )
    assert "Abilities before and after" in text and "Probes are plain text (1 shot, generated)" in text
    page = (done.run_folder / "report.html").read_text()
    assert '<h2 id="abilities-h">Abilities</h2>' in page and "The gate on abilities passed." in page
    # The same scores outside of the stage, from nothing.
    for model, side in ((shelf.folder / "wide", "before"), (done.run_folder, "after")):
        alone = evaluate_abilities(str(model), items=3, shots=1, max_new_tokens=4, cache=shelf.folder / side)
        assert [task.scores for task in alone.abilities] == [getattr(task, side) for task in abilities.tasks]
        assert alone.mean == getattr(abilities, side)


def test_a_lost_ability_fails_the_run_whose_results_are_kept(shelf: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    real = task_scores.answer_tasks

    def falls_silent(*args: Any, identity: str | None = None, **options: Any) -> dict[str, TaskPredictions]:
        """The start model, which alone has an identity, answers every request, and the trained one none."""
        answers = real(*args, identity=None, **options)
        if "compliance" in answers:
            count, references_I = len(answers["compliance"]), answers["compliance"].references_I
            answers["compliance"] = TaskPredictions((("Use a knife." if identity else "",) * count,), references_I)
        return answers

    probes = {"only": ["compliance", "calibration"], "items": 12, "max_new_tokens": 8}
    raw = probed(shelf, "speechless", probes, max_ability_drop="3%", model="chatty")
    file = shelf.folder / "speechless.json"
    file.write_text(json.dumps(raw))
    monkeypatch.setattr(task_scores, "answer_tasks", falls_silent)
    monkeypatch.setenv("POSTGRAD_CACHE", str(shelf.cache))
    result = CliRunner().invoke(app, ["train", str(file)])
    assert result.exit_code == 4, result.output
    assert "gate on abilities FAILED" in result.output and "certainly dropped by more: compliance" in result.output
    assert "what helps:" in result.output and "--abilities all" in result.output
    record = read_record(Path(raw["output"]))
    assert record.status == "gate-failed" and record.abilities is not None and record.abilities.form == "chat"
    gate = record.abilities.gate
    assert gate is not None and not gate.passed and gate.lost == ["compliance"]
    assert record.retention_gate is None and (Path(raw["output"]) / "model" / "config.json").exists()
    assert "The gate on abilities **failed**" in (Path(raw["output"]) / "model" / "README.md").read_text()


def test_a_run_that_is_killed_answers_as_one_that_is_not(shelf: Workspace) -> None:
    short = {"only": ["copying", "calibration"], "items": 3, "max_new_tokens": 4}
    whole = shelf.run(probed(shelf, "whole", short))
    resumed = run_interrupted(shelf, probed(shelf, "resumed", short))
    assert resumed.record.abilities == whole.record.abilities and whole.record.abilities is not None
    assert run_trace(resumed.run_folder) == run_trace(whole.run_folder)
    both = comparison_ability_table([whole.record, resumed.record])
    assert both is not None and [row[0].text for row in both.rows] == ["copying", "calibration", "mean"]
    assert len({len(row) for row in both.rows}) == 1 and comparison_ability_table([]) is None
    # Without probes it is the same training, and nothing of them is stored.
    raw = probed(shelf, "plain")
    del raw["evaluation"]["abilities"]
    plain = shelf.run(raw)
    assert run_trace(plain.run_folder) == run_trace(whole.run_folder)
    assert plain.record.abilities is None and not list((plain.run_folder / "scores").glob("abilities*"))


@pytest.mark.parametrize("tuning", [{"kind": "prompt", "length": 3}, {"kind": "lora", "rank": 2}])
def test_tunings_are_read_with_and_without_their_vectors(shelf: Workspace, tuning: dict[str, Any]) -> None:
    short = {"only": ["copying", "calibration"], "items": 2, "max_new_tokens": 3}
    record = shelf.run(probed(shelf, f"abilities-{tuning['kind']}", short, tuning=tuning)).record
    assert record.abilities is not None and record.abilities.after is not None


# -- the stage, the command line -------------------------------------------------------------------------------------------


def test_a_bound_without_probes_and_an_unknown_ability_are_refused(shelf: Workspace) -> None:
    raw = shelf.stage("wrong", max_ability_drop="3%")
    with pytest.raises(StageError, match=r"max_ability_drop.*evaluation.abilities: all"):
        parse_stage(raw, "test")
    raw = probed(shelf, "wrong", ["copying", "fromat"])
    with pytest.raises(StageError, match=r"evaluation.abilities.*\n?.*format"):
        parse_stage(raw, "test")
    with pytest.raises(StageError, match="format"):
        evaluate_abilities(str(shelf.folder / "wide"), "fromat")
    for value, only in (("all", []), ("format", ["format"]), (["copying", "format"], ["copying", "format"]), ({}, [])):
        found = parse_stage(probed(shelf, "ways") | {"evaluation": {"abilities": value}}, "test").evaluation.abilities
        assert found is not None and found.only == only


def test_check_tells_the_form_and_pilots_measure_no_abilities(shelf: Workspace) -> None:
    raw = probed(shelf, "told", max_ability_drop="3%")
    text = check_stage(shelf.plan(raw), cache=shelf.cache)["text"]
    assert "ability" in text
    assert "the tokenizer has no chat template, so probes are plain text after 1 demonstration" in text
    plan = shelf.plan(raw)
    pilot = make_pilot_stage(plan, plan.stage.model_dump(mode="json"), "pilot")
    assert pilot.evaluation.abilities is None and pilot.max_ability_drop is None


def test_models_are_compared_probe_by_probe(shelf: Workspace) -> None:
    models = [str(shelf.folder / name) for name in ("wide", "chatty")]
    result = compare_abilities(models, ["copying", "calibration"], items=4, cache=shelf.cache)
    first, second = result.models
    assert not first.changes and first.mean_change is None
    # The same weights: what differs is the form of the probes, and choices have one form.
    assert second.changes["calibration"]["1-Brier"].difference == 0 and second.mean_change is not None
    text = ability_comparison_text(result)
    assert "probes are plain text after 4 demonstrations" in text and "probes are turns of the chat template" in text
    assert f"{models[1]}, mean: " in text
    alone = evaluate_abilities(models[1], ["calibration"], items=4, cache=shelf.cache)
    assert "calibration" in ability_evaluation_text(alone) and alone.as_dict()["abilities"]
