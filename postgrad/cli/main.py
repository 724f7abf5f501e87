"""The verbs of the command line: each parses words and calls one function. Nothing heavy is imported before it is needed.

Exit codes: 0 done, 1 something failed, 2 bad use or bad input, 3 stopped by the user, 4 the retention gate failed.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from postgrad import __version__
from postgrad.errors import InterruptError, MissingExtra, PostgradError, StageError

if TYPE_CHECKING:
    from postgrad.studies.run_study import PreparedStudy

app = typer.Typer(
    name="postgrad",
    help="Continue a language model's training on new text, keep what it knew, and prove both.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Base = Annotated[
    str | None,
    typer.Option(help="The model that a tuning's folder sits on, when it is not where that says.", show_default=False),
]
Tasks = Annotated[
    Path | None,
    typer.Option(help="Ask the tasks of this YAML file: a list as under evaluation.tasks.", show_default=False),
]
StageFile = Annotated[Path, typer.Argument(help="The stage file (YAML).", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value, as many as you like.", show_default=False)]


def cache_folder() -> Path:
    """Where token stores and scores are kept between runs: $POSTGRAD_CACHE, or ~/.cache/postgrad."""
    named = os.environ.get("POSTGRAD_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "postgrad"


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Where everything is put.")] = Path("postgrad-demo"),
    as_json: Json = False,
) -> None:
    """See a model learn, forget and be cured: offline, in about two minutes."""
    require_training()
    from postgrad.cli.demo import run_demo

    found = run_demo(folder, as_json=as_json)
    _print(found, as_json, found.pop("text"))


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="The stage's name; NAME.yaml is written.", show_default=False)],
    data: Annotated[
        str | None, typer.Option(help="The new text, or rows: a file, folder or glob.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The model to continue: a folder, a run or a Hub name.", show_default=False)
    ] = None,
    replay: Annotated[str | None, typer.Option(help="Old text to replay.", show_default=False)] = None,
    test: Annotated[
        str | None,
        typer.Option(
            help="Rows to test with (classify, probe, few-shot); the last two keep a fifth of --data without it.",
            show_default=False,
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            help="A training strategy: continue, instruct, mixed, classify, probe, mlm, text2text, from-scratch, few-shot. "
            "What is not given is made.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite NAME.yaml.")] = False,
    as_json: Json = False,
) -> None:
    """Write a stage file for your model and text, each key explained; with --template of any training strategy."""
    require_training()
    place = _yaml_path(name)
    if template is None:
        if data is None or model is None:
            raise StageError(
                "a stage needs a text and a model",
                where="init",
                expected="--data and --model",
                hint="name a --template, for which what is not given is made",
            )
        if test is not None:
            raise StageError("rows to test are of a template", where="--test", expected="a --template")
        from postgrad.commands.init import write_stage

        found = write_stage(place, data=data, model=model, replay=replay, cache=cache_folder(), force=force)
    else:
        from postgrad.commands.init_templates import TemplateRequest, write_template

        asked = TemplateRequest(name, data, model, replay, test)
        found = write_template(place, template, asked, force=force, notify=lambda line: print(line, file=sys.stderr))
    _print(found, as_json, found.pop("text"))


@app.command()
def check(
    stage: StageFile,
    overrides: Overrides = None,
    show: Annotated[
        int, typer.Option(min=0, help="Print so many rows of each source as the model sees them.", show_default=False)
    ] = 0,
    as_json: Json = False,
) -> None:
    """Check a stage and print its plan: tokens by source, passes, the learning rate, memory and time."""
    from postgrad.check.check import check_stage

    plan = _load_plan(stage, overrides, as_json)
    found = check_stage(plan, cache=cache_folder(), show=show)
    text, shown = found.pop("text"), found.pop("shown", [])
    if as_json:
        print(json.dumps({**found, **({"shown": [source.as_record() for source in shown]} if show else {})}, indent=1))
        return
    print(text)
    if shown:
        from rich.console import Console

        from postgrad.check.preview_text import print_rows

        print()
        print_rows(shown, Console(highlight=False))
        print()
    print(f"next: {_command_line('train', stage, overrides)}")


@app.command()
def train(stage: StageFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Carry out a stage. Ctrl-C saves and stops; the same command goes on."""
    from postgrad.run.events import RunFinished
    from postgrad.run.run import run_stage
    from postgrad.run.summary import summary_text

    plan = _load_plan(stage, overrides, as_json)
    command = _command_line("train", stage, overrides)
    outcome = _watch_run(run_stage(plan, command=command, cache=cache_folder()), command, as_json)
    if not isinstance(outcome, RunFinished):  # of several processes, the first one alone tells how it ended
        return
    _print(outcome.record.as_json(), as_json, summary_text(outcome))
    if outcome.record.status == "gate-failed":
        raise typer.Exit(4)


@app.command()
def restore(
    run: Annotated[Path, typer.Argument(help="The run whose model has forgotten something.", show_default=False)],
    teacher: Annotated[
        str | None,
        typer.Option(help="The earlier model that still knows it; left out: the run's start.", show_default=False),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="Old text whose beginnings are gone on from; left out: what the run replayed.", show_default=False
        ),
    ] = None,
    retained: Annotated[
        list[str] | None,
        typer.Option(help="Held-out old text; left out: what the run was measured on.", show_default=False),
    ] = None,
    until: Annotated[str, typer.Option(help="The share of what was lost that is to be won back.")] = "90%",
    max_cost: Annotated[str, typer.Option(help="The share of what was gained that may be lost again.")] = "5%",
    steps: Annotated[int, typer.Option(min=1, help="At most so many steps.")] = 200,
    keep: Annotated[
        str, typer.Option(help="The share of new text, on which the model is held to itself; 0%: none.")
    ] = "50%",
    rate: Annotated[
        float | None, typer.Option(help="The learning rate; left out: the highest of the run.", show_default=False)
    ] = None,
    output: Annotated[str | None, typer.Option(help="The new run's folder.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Win back what a run has forgotten: its model writes, the earlier one judges every token. The same command goes on."""
    require_training()
    from postgrad.commands.restore import RestoreRequest, measure_restoration, plan_restoration, restoration_text
    from postgrad.config.quantities import parse_share
    from postgrad.run.events import RunFinished
    from postgrad.run.run import run_stage
    from postgrad.run.summary import summary_text

    wish = RestoreRequest(
        run,
        teacher,
        tuple(prompts or ()),
        tuple(retained or ()),
        parse_share(until, "--until"),
        parse_share(max_cost, "--max-cost"),
        steps,
        parse_share(keep, "--keep"),
        rate,
        output,
    )
    restoration = plan_restoration(wish, cache_folder())
    command = shlex.join(["postgrad", *sys.argv[1:]])
    outcome = _watch_run(run_stage(restoration.plan, command=command, cache=cache_folder()), command, as_json)
    if not isinstance(outcome, RunFinished):  # as in `train`
        return
    found = measure_restoration(restoration, outcome)
    head = summary_text(outcome).rsplit("\nnext: ", 1)[0]
    _print(
        {**outcome.record.as_json(), "restored": found}, as_json, f"{head}\n{restoration_text(restoration, outcome)}"
    )
    if not found["enough"]:
        raise typer.Exit(4)


@app.command()
def advise(
    stage: StageFile,
    overrides: Overrides = None,
    max_forgetting: Annotated[
        str, typer.Option(help="The largest rise of the loss on old text, as a share of it, e.g. 1%.")
    ] = "1%",
    pilots: Annotated[int, typer.Option(help="Short runs to learn from, 4 to 12.")] = 5,
    replay: Annotated[
        str | None, typer.Option(help="Old text to replay, when the stage names none.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The stage to write; left out: STAGE-advised.yaml.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Find, by short pilots, the replay and the peak rate that keep forgetting within a bound, and write that stage."""
    require_training()
    from postgrad.commands.advise import AdviceRequest, plan_advice, run_pilots, write_advice
    from postgrad.commands.advise import advise as advised
    from postgrad.config.quantities import parse_share

    wish = AdviceRequest(
        stage, tuple(overrides or ()), parse_share(max_forgetting, "--max-forgetting"), pilots, replay, out
    )
    asked = plan_advice(wish, cache_folder())
    command = shlex.join(["postgrad", *sys.argv[1:]])
    _watch_run(run_pilots(asked, command), command, as_json)
    found = write_advice(asked, advised(asked))
    _print(found, as_json, found.pop("text"))


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A model folder, run, checkpoint or Hub name.", show_default=False)],
    files: Annotated[list[str] | None, typer.Argument(help="Text to score.", show_default=False)] = None,
    tasks: Tasks = None,
    shots: Annotated[
        int | None,
        typer.Option(min=0, help="With --tasks or --harness: demonstrations before each question.", show_default=False),
    ] = None,
    harness: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval, with commas between them.", show_default=False)
    ] = None,
    harness_tasks: Annotated[
        Path | None,
        typer.Option(help="With --harness: a folder of your own task files for lm-eval.", show_default=False),
    ] = None,
    harness_limit: Annotated[
        int | None, typer.Option(min=1, help="With --harness: items of each task, at most.", show_default=False)
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens the model sees at once; default: its own, at most 1024.")
    ] = None,
    documents: Annotated[
        str, typer.Option(help="What a document is in a text file: auto, file, passages, paragraphs, lines.")
    ] = "auto",
    column: Annotated[str | None, typer.Option(help="The column that holds the text.", show_default=False)] = None,
    pseudo: Annotated[
        int, typer.Option(help="Of a masked language model: tokens of each text that are masked one at a time.")
    ] = 0,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Score any language model: on text in nats per token, perplexity and bits per byte; on tasks by what it answers."""
    if not files and tasks is None and harness is None:
        raise StageError(
            "there is nothing to score", where="eval", expected="files of text, --tasks FILE, or --harness TASKS"
        )
    if harness is None and (harness_tasks is not None or harness_limit is not None):
        raise StageError("no task of lm-eval is named", where="eval", hint="name some: --harness TASK,TASK")
    require_training()
    found: dict[str, Any] = {}
    texts: list[str] = []
    if files:
        from postgrad.commands.evaluate import evaluate_files

        found |= evaluate_files(
            model,
            files,
            context=context,
            documents=documents,
            column=column,
            base=base,
            cache=cache_folder(),
            pseudo=pseudo,
        )
        texts.append(found.pop("text"))
    if tasks is not None:
        from postgrad.commands.evaluate_tasks import evaluate_tasks

        found |= evaluate_tasks(model, tasks, shots=shots, base=base, cache=cache_folder())
        texts.append(found.pop("text"))
    if harness is not None:
        from postgrad.commands.evaluate_harness import evaluate_harness

        found |= evaluate_harness(
            model,
            harness,
            folder=harness_tasks,
            shots=shots,
            limit=harness_limit,
            context=context,
            base=base,
        )
        texts.append(found.pop("text"))
    _print(found, as_json, "\n\n".join(texts))


@app.command()
def compare(
    models: Annotated[
        list[str], typer.Argument(help="Runs of one start model, or any models (with --on).", show_default=False)
    ],
    on: Annotated[
        list[str] | None, typer.Option(help="Text to compare on; left out: what the runs held out.", show_default=False)
    ] = None,
    tasks: Tasks = None,
    report: Annotated[
        Path | None, typer.Option(help="Write a page that shows the runs side by side.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Set runs or models side by side, with paired intervals."""
    require_training()
    if tasks is not None:
        from postgrad.commands.evaluate_tasks import compare_tasks

        if on:
            raise StageError("--on and --tasks are two comparisons", where="compare", hint="ask for one at a time")
        found = compare_tasks(models, tasks, cache=cache_folder())
        _print(found, as_json, found.pop("text"))
        return
    from postgrad.commands.evaluate import compare_models, compare_runs

    found = compare_models(models, on, cache=cache_folder()) if on else compare_runs([Path(m) for m in models], report)
    _print(found, as_json, found.pop("text"))


@app.command()
def shift(
    model: Annotated[str, typer.Option(help="The model: a folder, run, checkpoint or Hub name.", show_default=False)],
    old: Annotated[
        list[str], typer.Option(help="Text the model knows; may be repeated, or its own writing.", show_default=False)
    ],
    new: Annotated[list[str], typer.Option(help="Text it is to learn; may be repeated.", show_default=False)],
    context: Annotated[
        int | None, typer.Option(help="Tokens the model sees at once; default: its own, at most 1024.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write a page here.", show_default=False)] = None,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Measure how far new text is from what a model knows, and propose replay, rate, warm-up and vocabulary."""
    require_training()
    from postgrad.commands.shift import measure_shift

    found = measure_shift(model, old, new, base=base, context=context, report=report, cache=cache_folder())
    _print(found, as_json, found.pop("text"))


@app.command()
def synthesize(
    model: Annotated[str, typer.Argument(help="The model that is to write: the start model.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The JSONL file to write.", show_default=False)],
    tokens: Annotated[str, typer.Option(help="Tokens of text to be kept: 500k, 2M.")] = "1M",
    longest: Annotated[int, typer.Option(help="Tokens of a document at most.")] = 512,
    beginnings: Annotated[
        list[str] | None,
        typer.Option(
            "--from",
            help="Texts whose first tokens the documents begin with; with --chat rows whose questions are shown as examples.",
            show_default=False,
        ),
    ] = None,
    beginning: Annotated[int, typer.Option(help="Tokens that are taken from a text, with --from.")] = 0,
    temperature: Annotated[float, typer.Option(help="1: as the model knows it.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Below 1 the unlikely is cut off, and forgotten.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    at_once: Annotated[int, typer.Option(help="Documents that are written at once.")] = 32,
    most_repeated: Annotated[float, typer.Option(help="Leave out documents with more of them in repeats.")] = 0.3,
    alike: Annotated[float, typer.Option(help="Leave out documents that share so much with one before.")] = 0.8,
    chat: Annotated[
        bool, typer.Option("--chat", help="Write questions and answers: for a model with a chat template.")
    ] = False,
    shown: Annotated[
        int | None,
        typer.Option(help="Questions shown as examples before each, with --chat and --from: 3.", show_default=False),
    ] = None,
    answer: Annotated[
        str | None, typer.Option(help="Another model that answers, with --chat: the latest one.", show_default=False)
    ] = None,
    keep: Annotated[str, typer.Option(help="Share of the conversations kept, the most various, with --chat.")] = "100%",
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Let a model write its own replay, for when the old text is gone. The same command goes on after a stop."""
    require_training()
    from postgrad.cli.progress import show_token_progress
    from postgrad.commands.synthesize import SynthesisRequest, synthesis_summary
    from postgrad.commands.synthesize import synthesize as written
    from postgrad.commands.synthesize_chat import DEFAULT_SHOTS, Rehearsal, synthesize_chat
    from postgrad.config.quantities import parse_share, parse_token_count

    wish = SynthesisRequest(
        parse_token_count(tokens, "--tokens"),
        longest,
        seed,
        temperature,
        top_p,
        beginning,
        at_once,
        most_repeated,
        alike,
    )
    given = tuple(beginnings or ())
    if chat:
        if shown is not None and not given:
            raise StageError("there are no questions to show", where="--shown", hint="give some with --from")
        rehearsal = Rehearsal(given, DEFAULT_SHOTS if shown is None else shown, answer, parse_share(keep, "--keep"))
        steps = synthesize_chat(model, out, wish, rehearsal, base=base)
    else:
        _require_chat(answer=answer, keep=keep if keep != "100%" else None, shown=shown)
        steps = written(model, out, wish, given, base=base)
    try:
        show_token_progress(steps, as_json)
    except KeyboardInterrupt:
        raise InterruptError("stopped", hint="the same command goes on; what was written is kept") from None
    found = synthesis_summary(model, out)
    _print(found, as_json, found.pop("text"))


def _require_chat(**options: object) -> None:
    """Raise `StageError` for an option that says nothing without --chat."""
    for option, value in options.items():
        if value is not None:
            raise StageError(f"--{option} is of conversations", where=f"--{option}", hint="give --chat too")


@app.command()
def grow(
    model: Annotated[str, typer.Argument(help="A model folder, run or Hub name.", show_default=False)],
    files: Annotated[list[str], typer.Argument(help="New text, in which tokens are looked for.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The plain folder to write; must not exist.", show_default=False)],
    tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 1000,
    head: Annotated[
        str, typer.Option(help="Rows of an output head of its own: mean of their parts, or zero.")
    ] = "mean",
    old: Annotated[
        list[str] | None, typer.Option(help="Old text, to see that it is cut as before.", show_default=False)
    ] = None,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Add tokens learnt on new text to a model's vocabulary, each beginning as the mean of what stood for it."""
    require_training()
    from postgrad.commands.grow import grow_vocabulary

    found = grow_vocabulary(model, files, out, tokens=tokens, head=head, old=old or [], base=base)
    _print(found, as_json, found.pop("text"))


@app.command()
def blend(
    run: Annotated[Path, typer.Argument(help="A finished run.", show_default=False)],
    sweep: Annotated[str, typer.Option(help="Weights of the trained model.")] = "0,0.2,0.4,0.5,0.6,0.7,0.8,0.9,1",
    by: Annotated[str, typer.Option(help="whole, or block: also each block by itself.")] = "whole",
    average: Annotated[
        int | None, typer.Option(min=1, help="Blend to the mean of so many last checkpoints.", show_default=False)
    ] = None,
    max_forgetting: Annotated[
        str | None,
        typer.Option(help="Choose what learnt most within this rise on retained sets, e.g. 1%.", show_default=False),
    ] = None,
    choose: Annotated[float | None, typer.Option(help="Choose this weight.", show_default=False)] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the chosen model here, a plain folder.", show_default=False)
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write a page here.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Score the models between a run's start and its end, and write the one that is wanted."""
    require_training()
    from postgrad.commands.blend import blend_run, parse_weights
    from postgrad.config.quantities import parse_share

    found = blend_run(
        run,
        sweep=parse_weights(sweep),
        granularity=by,
        average=average,
        max_forgetting=None if max_forgetting is None else parse_share(max_forgetting, "--max-forgetting"),
        choose=choose,
        out=out,
        report=report,
        cache=cache_folder(),
    )
    _print(found, as_json, found.pop("text"))


@app.command()
def study(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            help="Study files (YAML), carried out one after the other, and key.sub=value for all of them; or `init NAME`.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done, and how long it takes.")
    ] = False,
    template: Annotated[str, typer.Option(help="With `init`: paper or levers.", show_default=False)] = "levers",
    size: Annotated[str, typer.Option(help="With `init --template paper`: laptop or gpu.")] = "laptop",
    force: Annotated[bool, typer.Option("--force", help="With `init`: overwrite the files.")] = False,
    as_json: Json = False,
) -> None:
    """Carry out many stages from one base, side by side: one table, one frontier, one page. The same command goes on."""
    require_training()
    if not files:
        raise StageError("no study is named", where="study", expected="a study file, or `init NAME --template paper`")
    if files[0] == "init":
        from postgrad.studies.study_templates import write_study_template

        if len(files) != 2:
            raise StageError("a new study has one name", where="study init", expected="postgrad study init NAME")
        found = write_study_template(_yaml_path(files[1]), template, size, force=force)
        _print(found, as_json, found.pop("text"))
        return
    command = shlex.join(["postgrad", "study", *files])
    told, worst = [], 0
    overrides = [word for word in files if "=" in word and not os.path.exists(word)]
    named = [Path(word) for word in files if word not in overrides]
    if not named:
        raise StageError("no study is named", where="study", expected="a study file before key.sub=value")
    from postgrad.studies.run_study import prepare_studies

    for prepared in prepare_studies(named, cache_folder(), overrides):
        record, code = _run_study(prepared, command, dry_run, as_json)
        told.append(record)
        worst = max(worst, code)
        if code == 3:
            break
    if as_json:
        print(json.dumps(told if len(told) > 1 else told[0], indent=1))
    if worst:
        raise typer.Exit(worst)


def _run_study(prepared: PreparedStudy, command: str, dry_run: bool, as_json: bool) -> tuple[dict[str, Any], int]:
    """Carry out one study and say what came of it; what was found, and the exit code."""
    from postgrad.cli.study_progress import StudyProgress, make_study_screen, watch_study
    from postgrad.studies.outputs import outputs_text, write_outputs
    from postgrad.studies.run_study import add_time, run_study
    from postgrad.studies.study_plan import count_devices, forecast_record, forecast_study, forecast_text

    screen, begun = make_study_screen(as_json), time.perf_counter()
    try:
        outlook = forecast_study(prepared, screen.show_message)
        record = forecast_record(prepared, outlook)
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
    add_time(prepared.folder, time.perf_counter() - begun)
    standing = StudyProgress(prepared.graph, outlook.seconds)
    try:
        ended = watch_study(run_study(prepared, command=command), standing, screen)
        found = write_outputs(prepared, ended.failures)
    except KeyboardInterrupt:
        raise InterruptError("stopped at once; what was saved is kept", hint=command) from None
    if not as_json:
        print(outputs_text(prepared, found, command, stopped=ended.is_stopped))
    return found, 3 if ended.is_stopped else 1 if ended.failures else 0


@app.command()
def probe(
    model: Annotated[str, typer.Argument(help="A model folder, run, checkpoint or Hub name.", show_default=False)],
    train: Annotated[str, typer.Argument(help="Labelled texts or tagged words to learn from.", show_default=False)],
    test: Annotated[str, typer.Argument(help="The same, to be judged on, once.", show_default=False)],
    dev: Annotated[
        str | None, typer.Option(help="The same, to choose by; left out: a tenth of TRAIN.", show_default=False)
    ] = None,
    kind: Annotated[str, typer.Option(help="What the rows are: auto, labelled, tagged.")] = "auto",
    pooling: Annotated[
        str, typer.Option(help="How a text's tokens become one vector: auto, first, mean, max, last.")
    ] = "auto",
    stack: Annotated[str, typer.Option(help="Of an encoder-decoder: auto, encoder, decoder.")] = "auto",
    context: Annotated[
        int | None, typer.Option(help="Tokens the model sees at once; default: its own, at most 512.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write a page with the picture here.", show_default=False)] = None,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Probe every layer of a frozen model for labels: which layer knows what, in one pass over the text."""
    require_training()
    from postgrad.commands.probe import probe_layers

    found = probe_layers(
        model, train, test, dev=dev, kind=kind, pooling=pooling, stack=stack, context=context, base=base, report=report,
        cache=cache_folder(),
    )  # fmt: skip
    _print(found, as_json, found.pop("text"))


@app.command()
def lineage(
    run: Annotated[Path, typer.Argument(help="The last run of the lineage.", show_default=False)],
    report: Annotated[Path | None, typer.Option(help="Write the page here.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Show the stages that led to a run, and what each did to every held-out set (R matrix, BWT, FWT, forgetting)."""
    require_training()
    from postgrad.commands.evaluate import show_lineage

    found = show_lineage(run, report, cache=cache_folder())
    _print(found, as_json, found.pop("text"))


@app.command(name="report")
def write_report(
    run: Annotated[Path, typer.Argument(help="A run folder.", show_default=False)], as_json: Json = False
) -> None:
    """Write a run's page anew, also of one that is still going on."""
    from postgrad.reports.pages.rewrite_report import rewrite_report

    place = rewrite_report(run)
    _print({"report": str(place)}, as_json, f"{place}\nnext: open it in a browser")


@app.command()
def importance(
    model: Annotated[str, typer.Argument(help="A model folder, run, checkpoint or Hub name.", show_default=False)],
    files: Annotated[list[str], typer.Argument(help="Text, or rows of the model's task.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The file to write (.safetensors).", show_default=False)],
    tokens: Annotated[str, typer.Option(help="Labels to look at, such as 100k.")] = "100k",
    kind: Annotated[
        str,
        typer.Option(help="fisher (labels drawn from the model), empirical (the text's own labels; biased), or mas."),
    ] = "fisher",
    onto: Annotated[
        Path | None,
        typer.Option(help="Older importance that this is added onto, decayed (online EWC).", show_default=False),
    ] = None,
    decay: Annotated[float, typer.Option(help="What the older importance is multiplied by.")] = 0.9,
    dtype: Annotated[str, typer.Option(help="Of the file: float32 or bfloat16.")] = "float32",
    context: Annotated[
        int | None, typer.Option(help="Tokens the model sees at once; default: its own, at most 1024.")
    ] = None,
    documents: Annotated[
        str, typer.Option(help="What a document is in a text file: auto, file, passages, paragraphs, lines.")
    ] = "auto",
    column: Annotated[str | None, typer.Option(help="The column that holds the text.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Of the drawn labels and the order of the text.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Measure how much each weight matters to what a model says; an anchor holds those that matter (EWC, MAS)."""
    require_training()
    from postgrad.cli.progress import make_screen
    from postgrad.commands.importance import measure_importance

    screen = make_screen(as_json)
    try:
        found = measure_importance(
            model,
            files,
            out=out,
            tokens=tokens,
            kind=kind,
            accumulate=onto,
            decay=decay,
            dtype=dtype,
            context=context,
            documents=documents,
            column=column,
            seed=seed,
            force=force,
            base=base,
            cache=cache_folder(),
            progress=screen.show_measuring,
        )
    except KeyboardInterrupt:
        raise InterruptError("stopped; nothing was written", hint="fewer --tokens take less time") from None
    finally:
        screen.close()
    _print(found, as_json, found.pop("text"))


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A model folder, run, checkpoint or Hub name.", show_default=False)],
    prompt: Annotated[
        str | None,
        typer.Option(help="The text to go on from; left out: one is asked for, again and again.", show_default=False),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 100,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that make up this share.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    beside: Annotated[
        str | None, typer.Option(help="A second model that goes on from the same text.", show_default=False)
    ] = None,
    as_chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Answer in the model's chat template, or go on from the text; left out: answer where nothing is given by "
            "--prompt and the model has a template.",
            show_default=False,
        ),
    ] = None,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Let a model write, or talk with one; with --beside, two of them."""
    require_training()
    from postgrad.commands.generate import chat, generate_once

    options = {"tokens": tokens, "temperature": temperature, "top_p": top_p, "seed": seed, "base": base}
    models = [model, beside] if beside else [model]
    if prompt is None:
        chat(models, as_chat=as_chat is not False, **options)
        return
    found = generate_once(models, prompt, as_chat=bool(as_chat), **options)
    _print(found, as_json, found.pop("text"))


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A run, a checkpoint or a model.", show_default=False)],
    folder: Annotated[
        Path, typer.Argument(help="The Hugging Face folder to make; must not exist.", show_default=False)
    ],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto (as it is stored).")] = "auto",
    base: Base = None,
    others: Annotated[
        list[str] | None,
        typer.Option(
            "--with", help="Another LoRA run of the same base, RUN=WEIGHT; may be repeated.", show_default=False
        ),
    ] = None,
    weight: Annotated[float, typer.Option(help="The first run's weight, with --with.")] = 1.0,
    how: Annotated[str, typer.Option(help="How adapters become one: cat, svd, linear, ties, dare_ties, ...")] = "cat",
    density: Annotated[
        float | None,
        typer.Option(help="The share of numbers that ties, dare and pruning keep.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a plain Hugging Face folder, and check that plain transformers reads the same logits from it."""
    require_training()
    from postgrad.commands.generate import export_model

    found = export_model(run, folder, dtype, base, others or [], weight, how, density)
    _print(found, as_json, found.pop("text"))


def require_training() -> None:
    """Raise `MissingExtra` when what trains is not installed."""
    for package in ("torch", "transformers", "safetensors", "tokenizers"):
        if find_spec(package) is None:
            raise MissingExtra(f"this command needs {package}", hint="pip install 'postgrad[train]'")


def _load_plan(stage: Path, overrides: list[str] | None, as_json: bool) -> Any:
    from postgrad.config.stage_file import load_stage

    spec = load_stage(stage, overrides)
    require_training()
    from postgrad.cli.progress import make_screen
    from postgrad.plan.plan import make_plan

    screen = make_screen(as_json)
    try:
        return make_plan(spec, stage.resolve().parent, cache_folder(), screen.show_tokenizing)
    except KeyboardInterrupt:
        raise InterruptError(
            "stopped while the text was read", hint="the same command goes on; finished parts are kept"
        ) from None
    finally:
        screen.close()


def _watch_run(events: Iterator[Any], command: str, as_json: bool) -> Any:
    """How a run ended, shown on the way; where the user asked it to stop, the command's end, and how to go on."""
    from postgrad.cli.progress import make_screen, watch
    from postgrad.run.events import RunStopped

    try:
        outcome = watch(events, make_screen(as_json))
    except KeyboardInterrupt:
        raise InterruptError("stopped at once; what was saved is kept", hint=command) from None
    if isinstance(outcome, RunStopped):
        where = f"and saved at step {outcome.step:,} of {outcome.steps:,}" if outcome.step else "before the first step"
        told = {"status": "stopped", "step": outcome.step, "steps": outcome.steps, "next": command}
        _print(told, as_json, f"stopped {where}\nnext: {command}")
        raise typer.Exit(3)
    return outcome


def _yaml_path(name: str) -> Path:
    """The file of a new stage or study: NAME.yaml, also for who says the whole of it."""
    return Path(name.removesuffix(".yaml") + ".yaml")


def _command_line(verb: str, stage: Path, overrides: list[str] | None) -> str:
    return shlex.join(["postgrad", verb, str(stage), *(overrides or [])])


def _print(result: dict[str, Any], as_json: bool, text: str) -> None:
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        print(text)


@app.callback(invoke_without_command=True)
def _global_options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"postgrad {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; errors of ours are told without a traceback."""
    _run_guarded(app)


def _run_guarded(run: Callable[[], object]) -> None:
    try:
        run()
    except PostgradError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except SystemExit as ended:
        if ended.code == 130:  # what typer makes of Ctrl-C
            print("stopped", file=sys.stderr)
            raise SystemExit(3) from None
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:  # a file or folder that was there a moment ago, or is not ours
        print(f"error: {error.filename or 'the system'}: {error.strerror or error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
