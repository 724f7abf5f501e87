"""Verbs that write, check and run stages: demo, init, check, train, restore, advise, keep, study, report."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from postgrad.cli.options import (
    Json,
    Overrides,
    StageFile,
    print_result,
    require_training,
    stage_command,
    this_command,
)
from postgrad.errors import InterruptError, StageError

if TYPE_CHECKING:
    from postgrad.plan.plan import Plan
    from postgrad.studies.run_study import PreparedStudy


def demo(
    folder: Annotated[Path, typer.Argument(help="Folder of the demo's data, models and runs.")] = Path("postgrad-demo"),
    as_json: Json = False,
) -> None:
    """Watch a small model learn, forget, and retain with replay: offline, in 3 to 10 minutes on two cores."""
    require_training()
    from postgrad.cli.demo import demo_text, run_demo

    result = run_demo(folder, as_json=as_json)
    print_result(result, as_json, demo_text(result))


def init(
    name: Annotated[str, typer.Argument(help="The stage's name; NAME.yaml is written.")],
    data: Annotated[
        list[str] | None,
        typer.Option(help="The new text, or rows for a template: a file, folder or glob."),
    ] = None,
    chat: Annotated[
        str | None,
        typer.Option(
            help="Rows with answers (chats, instructions, prompts and completions), in one stage with --data."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model to continue: a folder, a run or a Hub name.")] = None,
    replay: Annotated[str | None, typer.Option(help="Old text to replay.")] = None,
    test: Annotated[
        str | None,
        typer.Option(help="Test rows (classify, probe, few-shot). Default for the last two: a fifth of --data."),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            help="A training strategy: continue, instruct, mixed, classify, probe, mlm, text2text, from-scratch, few-shot. "
            "It uses built-in data and a small model for what is not given."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite NAME.yaml.")] = False,
    as_json: Json = False,
) -> None:
    """Write a commented stage file for your model and text; with --template for any training strategy."""
    require_training()
    from postgrad.cli import render

    path = _yaml_path(name)
    if template is not None or chat is not None or len(data or ()) > 1:
        from postgrad.commands.init_templates import TemplateRequest, sort_texts, write_template

        _require_texts(template, data or [chat or ""], model)
        first, rows = sort_texts(data or (), chat)
        template = template or ("mixed" if first is not None else "instruct")
        if first is None and template != "mixed":
            first, rows = rows, None
        request = TemplateRequest(name, first, model, replay, test, rows)
        written = write_template(path, template, request, force=force, notify=lambda line: print(line, file=sys.stderr))
        print_result(written, as_json, render.template_text(written))
        return
    _require_texts(template, data, model)
    if test is not None:
        raise StageError("--test requires --template", where="--test", expected="a --template")
    from postgrad.commands.init import write_stage

    assert data and model
    stage = write_stage(path, data=data[0], model=model, replay=replay, force=force)
    print_result(stage, as_json, render.stage_text(stage))


def _require_texts(template: str | None, data: list[str] | None, model: str | None) -> None:
    """Raise `StageError` without a text and a model, which a template has."""
    if template is None and not (data and model):
        raise StageError(
            "a stage needs a text and a model",
            where="init",
            expected="--data (or --chat) and --model",
            hint="or choose a --template, which has built-in ones",
        )


def check(
    stage: StageFile,
    overrides: Overrides = None,
    show: Annotated[
        int, typer.Option(min=0, help="Print so many rows of each source as the model sees them.", show_default=False)
    ] = 0,
    world: Annotated[
        int | None,
        typer.Option(min=1, help="Instead, memory and speed of a step on so many devices that are not here."),
    ] = None,
    device: Annotated[str, typer.Option(help="Of --world: a100, h100, h200 or b200.")] = "h100",
    as_json: Json = False,
) -> None:
    """Check a stage and print its plan: tokens by source, passes, the learning rate, memory and time."""
    plan = _load_plan(stage, overrides, as_json)
    from postgrad.commands.check import check_stage, dry_run

    if world is not None:
        walked = dry_run(plan, world=world, device=device)
        print_result(walked.as_json(), as_json, "\n".join(walked.lines()))
        return
    result = check_stage(plan, show=show)
    following = f"next: {stage_command('train', stage, overrides)}"
    if as_json or not result.rows:
        print_result(result, as_json, f"{result.text}\n{following}")
        return
    from postgrad.check.preview_text import print_rows
    from postgrad.cli.terminal import make_console

    print(f"{result.text}\n")
    print_rows(list(result.rows), make_console(stderr=False))
    print(f"\n{following}")


def train(stage: StageFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Run a stage. Ctrl-C saves and stops; the same command resumes."""
    plan = _load_plan(stage, overrides, as_json)
    from postgrad.commands import train as commands
    from postgrad.run.events import RunFinished
    from postgrad.run.summary import summary_text

    command = stage_command("train", stage, overrides)
    outcome = _watch_run(commands.train(plan, command=command), command, as_json)
    if not isinstance(outcome, RunFinished):  # only the first of several processes reports the outcome
        return
    print_result(outcome.record.as_json(), as_json, summary_text(outcome))
    if outcome.record.status == "gate-failed":
        raise typer.Exit(4)


def restore(
    run: Annotated[Path, typer.Argument(help="The run that has forgotten.")],
    teacher: Annotated[
        str | None,
        typer.Option(help="The earlier model. Default: the run's start model."),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(help="Old text used as prompts. Default: the text that the run replayed."),
    ] = None,
    retained: Annotated[
        list[str] | None,
        typer.Option(help="Held-out old text. Default: the run's own retained sets."),
    ] = None,
    min_recovered: Annotated[str, typer.Option(help="Fraction of the forgetting to recover.")] = "90%",
    max_cost: Annotated[str, typer.Option(help="Fraction of the gain on new text that may be lost.")] = "5%",
    steps: Annotated[int, typer.Option(min=1, help="At most so many steps.")] = 200,
    self_distill_share: Annotated[
        str,
        typer.Option(help="Fraction of the tokens that distil the current model on new text (0% disables it)."),
    ] = "50%",
    learning_rate: Annotated[
        float | None, typer.Option(help="Learning rate. Default: a fifth of the run's peak.")
    ] = None,
    output: Annotated[str | None, typer.Option(help="The new run's folder. Default: RUN-restored.")] = None,
    as_json: Json = False,
) -> None:
    """Recover what a run has forgotten, by on-policy distillation from the earlier model. The same command resumes."""
    require_training()
    from postgrad.cli.render import restored_text
    from postgrad.commands.restore import RestoredRun, RestoreRequest, plan_restoration, run_restoration
    from postgrad.config.quantities import parse_share
    from postgrad.run.summary import summary_text
    from postgrad.storage.cache_folder import cache_folder

    request = RestoreRequest(
        run,
        teacher,
        tuple(prompts or ()),
        tuple(retained or ()),
        parse_share(min_recovered, "--min-recovered"),
        parse_share(max_cost, "--max-cost"),
        steps,
        parse_share(self_distill_share, "--self-distill-share"),
        learning_rate,
        output,
    )
    restoration, command = plan_restoration(request, cache_folder()), this_command()
    result = _watch_run(run_restoration(restoration, command, cache_folder()), command, as_json)
    if not isinstance(result, RestoredRun):  # as in `train`
        return
    head = summary_text(result.outcome).rsplit("\nnext: ", 1)[0]
    print_result(result, as_json, f"{head}\n{restored_text(result)}")
    if not result.enough:
        raise typer.Exit(4)


def advise(
    stage: StageFile,
    overrides: Overrides = None,
    max_forgetting: Annotated[str, typer.Option(help="Largest relative rise of the loss on old text, e.g. 1%.")] = "1%",
    pilots: Annotated[int, typer.Option(help="Short pilot runs, 4 to 12.")] = 5,
    replay: Annotated[str | None, typer.Option(help="Old text to replay, if the stage has none.")] = None,
    out: Annotated[Path | None, typer.Option(help="The stage file to write. Default: STAGE-advised.yaml.")] = None,
    as_json: Json = False,
) -> None:
    """Find the replay share and peak learning rate that keep forgetting within a bound, and write that stage."""
    require_training()
    from postgrad.cli.render import advice_text
    from postgrad.commands.advise import Advice, AdviceRequest, plan_advice, run_advice
    from postgrad.config.quantities import parse_share
    from postgrad.storage.cache_folder import cache_folder

    bound = parse_share(max_forgetting, "--max-forgetting")
    request = AdviceRequest(stage, tuple(overrides or ()), bound, pilots, replay, out)
    command = this_command()
    result = _watch_run(run_advice(plan_advice(request, cache_folder()), command), command, as_json)
    if isinstance(result, Advice):
        following = {"next": shlex.join(["postgrad", "train", str(result.stage)])}
        print_result({**result.as_dict(), **following}, as_json, advice_text(result))


def keep(
    stage: StageFile,
    overrides: Overrides = None,
    max_forgetting: Annotated[str, typer.Option(help="Largest relative rise of the loss on old text, e.g. 2%.")] = "1%",
    cost: Annotated[str, typer.Option(help="Tokens of all pilot runs, as a share of the run's.")] = "25%",
    equal: Annotated[
        str,
        typer.Option(help="What all combinations have alike: new-tokens (replay comes on top) or compute."),
    ] = "new-tokens",
    replay: Annotated[str | None, typer.Option(help="Old text to replay, if the stage has none.")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="Old prompts that the model continues. Default: without old text it generates its own."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The stage file to write. Default: STAGE-kept.yaml.")] = None,
    as_json: Json = False,
) -> None:
    """Choose the methods against forgetting (replay, distillation, penalty ...) for a stage by short runs, and write it."""
    require_training()
    from postgrad.cli.render import choice_text
    from postgrad.commands.keep import KeepChoice, KeepRequest, run_keep
    from postgrad.config.quantities import parse_multiple, parse_share
    from postgrad.storage.cache_folder import cache_folder

    bound, pilot_cost = parse_share(max_forgetting, "--max-forgetting"), parse_multiple(cost, "--cost")
    request = KeepRequest(stage, tuple(overrides or ()), bound, pilot_cost, equal, replay, prompts, out)
    command = this_command()
    result = _watch_run(run_keep(request, cache_folder(), command), command, as_json)
    if isinstance(result, KeepChoice):
        following = {"next": shlex.join(["postgrad", "train", str(result.stage)])}
        print_result({**result.as_dict(), **following}, as_json, choice_text(result))


def report(run: Annotated[Path, typer.Argument(help="A run folder.")], as_json: Json = False) -> None:
    """Write a run's HTML page again, also while the run is going on."""
    from postgrad.reports.pages.rewrite_report import rewrite_report

    path = rewrite_report(run)
    print_result({"report": str(path)}, as_json, f"{path}\nnext: open it in a browser")


def study(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            help="Study files (YAML), run one after the other, and key.sub=value for all of them; or `init NAME`."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the plan and the estimated time.")] = False,
    template: Annotated[str, typer.Option(help="With `init`: paper or levers.", show_default=False)] = "levers",
    size: Annotated[str, typer.Option(help="With `init --template paper`: laptop or gpu.")] = "laptop",
    force: Annotated[bool, typer.Option("--force", help="With `init`: overwrite the files.")] = False,
    as_json: Json = False,
) -> None:
    """Run many stages from one base model, side by side: one table, one frontier, one page. The same command resumes."""
    require_training()
    if not files:
        raise StageError("no study is named", where="study", expected="a study file, or `init NAME --template paper`")
    if files[0] == "init":
        from postgrad.studies.study_templates import write_study_template

        if len(files) != 2:
            raise StageError("a new study has one name", where="study init", expected="postgrad study init NAME")
        written = write_study_template(_yaml_path(files[1]), template, size, force=force)
        text = written.pop("text")
        print_result(written, as_json, text)
        return
    command = shlex.join(["postgrad", "study", *files])
    overrides = [word for word in files if "=" in word and not os.path.exists(word)]
    paths = [Path(word) for word in files if word not in overrides]
    if not paths:
        raise StageError("no study is named", where="study", expected="a study file before key.sub=value")
    from postgrad.storage.cache_folder import cache_folder
    from postgrad.studies.run_study import prepare_studies

    records, worst = [], 0
    for prepared in prepare_studies(paths, cache_folder(), overrides):
        record, code = _run_study(prepared, command, dry_run, as_json)
        records.append(record)
        worst = max(worst, code)
        if code == 3:
            break
    if as_json:
        print(json.dumps(records if len(records) > 1 else records[0], indent=1))
    if worst:
        raise typer.Exit(worst)


def _run_study(prepared: PreparedStudy, command: str, dry_run: bool, as_json: bool) -> tuple[dict[str, Any], int]:
    """Run one study; its results and the exit code."""
    from postgrad.cli.study_progress import StudyProgress, make_study_screen, watch_study
    from postgrad.studies.outputs import outputs_text, write_outputs
    from postgrad.studies.run_study import add_time, run_study
    from postgrad.studies.study_plan import count_devices, forecast_record, forecast_study, forecast_text

    screen, start_time = make_study_screen(as_json), time.perf_counter()
    try:
        forecast = forecast_study(prepared, screen.show_message)
        record = forecast_record(prepared, forecast)
    except KeyboardInterrupt:
        raise InterruptError("stopped while the study was planned; nothing was trained", hint=command) from None
    finally:
        screen.close()
    text = forecast_text(prepared, record, count_devices())
    if dry_run:
        if not as_json:
            print(f"{text}\nnext: {command}")
        return record, 0
    if not as_json:
        print(text, flush=True)
    add_time(prepared.folder, time.perf_counter() - start_time)
    progress = StudyProgress(prepared.graph, forecast.seconds)
    try:
        ended = watch_study(run_study(prepared, command=command), progress, screen)
        results = write_outputs(prepared, ended.failures)
    except KeyboardInterrupt:
        raise InterruptError("stopped at once; what was saved is kept", hint=command) from None
    if not as_json:
        print(outputs_text(prepared, results, command, stopped=ended.is_stopped))
    return results, 3 if ended.is_stopped else 1 if ended.failures else 0


def _load_plan(stage: Path, overrides: list[str] | None, as_json: bool) -> Plan:
    from postgrad.config.stage_file import load_stage

    load_stage(stage, overrides)  # a mistake in the file is reported before torch is imported
    require_training()
    from postgrad.cli.progress import make_screen
    from postgrad.commands import train as commands

    screen = make_screen(as_json)
    try:
        return commands.plan_stage(stage, overrides or (), progress=screen.show_tokenizing)
    except KeyboardInterrupt:
        raise InterruptError(
            "stopped while the text was tokenised", hint="the same command resumes; finished parts are kept"
        ) from None
    finally:
        screen.close()


def _watch_run(events: Iterator[Any], command: str, as_json: bool) -> Any:
    """Show the events of a run and return the last one; a run that was stopped ends the command."""
    from postgrad.cli.progress import make_screen, watch
    from postgrad.run.events import RunStopped

    try:
        outcome = watch(events, make_screen(as_json))
    except KeyboardInterrupt:
        raise InterruptError("stopped at once; what was saved is kept", hint=command) from None
    if isinstance(outcome, RunStopped):
        where = f"and saved at step {outcome.step:,} of {outcome.steps:,}" if outcome.step else "before the first step"
        record = {"status": "stopped", "step": outcome.step, "steps": outcome.steps, "next": command}
        print_result(record, as_json, f"stopped {where}\nnext: {command}")
        raise typer.Exit(3)
    return outcome


def _yaml_path(name: str) -> Path:
    """NAME.yaml, also for a name that has the suffix."""
    return Path(name.removesuffix(".yaml") + ".yaml")
