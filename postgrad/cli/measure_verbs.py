"""Verbs that measure models, runs and text: eval, compare, shift, probe, lineage, importance."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from postgrad.cli.options import (
    Abilities,
    Base,
    Context,
    DocumentUnit,
    Items,
    Json,
    ModelArgument,
    Report,
    Tasks,
    TextColumn,
    check_report,
    print_result,
    require_training,
)
from postgrad.errors import InterruptError, StageError


def evaluate(
    model: ModelArgument,
    files: Annotated[list[str] | None, typer.Argument(help="Text to score.")] = None,
    tasks: Tasks = None,
    shots: Annotated[
        int | None,
        typer.Option(min=0, help="With --tasks, --abilities or --harness: demonstrations before each question."),
    ] = None,
    abilities: Abilities = None,
    items: Items = 100,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="With --abilities: largest number of tokens of an answer. Default: 24 to 64, by ability."
        ),
    ] = None,
    harness: Annotated[str | None, typer.Option(help="Tasks of lm-eval, with commas between them.")] = None,
    harness_include: Annotated[
        Path | None,
        typer.Option(help="With --harness: a folder of your own task files for lm-eval."),
    ] = None,
    harness_limit: Annotated[
        int | None, typer.Option(min=1, help="With --harness: items of each task, at most.")
    ] = None,
    context: Context = None,
    document_unit: DocumentUnit = "auto",
    column: TextColumn = None,
    pseudo: Annotated[
        int,
        typer.Option(help="Pseudo-perplexity of a masked language model: tokens of each text to mask one at a time."),
    ] = 0,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Score any language model: on text in nats per token, perplexity, bits per byte; on tasks and abilities by its answers."""
    if not files and tasks is None and abilities is None and harness is None:
        raise StageError(
            "there is nothing to score",
            where="eval",
            expected="files of text, --tasks FILE, --abilities all, or --harness TASKS",
        )
    if harness is None and (harness_include is not None or harness_limit is not None):
        raise StageError("no task of lm-eval is named", where="eval", hint="add --harness TASK,TASK")
    require_training()
    from postgrad.cli import render

    record: dict[str, object] = {}
    texts: list[str] = []
    if files:
        from postgrad.commands import evaluate as commands

        scored = commands.evaluate(
            model, files, context=context, document_unit=document_unit, column=column, base=base, pseudo=pseudo
        )
        record |= scored.as_dict()
        texts.append(render.evaluation_text(scored))
    if tasks is not None:
        from postgrad.commands.evaluate_tasks import evaluate_tasks

        answered = evaluate_tasks(model, tasks, shots=shots, base=base)
        record |= answered.as_dict()
        texts.append(render.task_evaluation_text(answered))
    if abilities is not None:
        from postgrad.commands.evaluate_abilities import evaluate_abilities

        probed = evaluate_abilities(
            model, _names(abilities), items=items, shots=shots, max_new_tokens=max_new_tokens, base=base
        )
        record |= probed.as_dict()
        texts.append(render.ability_evaluation_text(probed))
    if harness is not None:
        from postgrad.commands.evaluate_harness import evaluate_harness

        outcome = evaluate_harness(
            model, harness, include=harness_include, shots=shots, limit=harness_limit, context=context, base=base
        )
        record |= {"model": model, "harness": outcome.as_dict()}
        texts.append(render.harness_text(outcome))
    print_result(record, as_json, "\n\n".join(texts))


def compare(
    models: Annotated[list[str], typer.Argument(help="Runs of one start model, or any models (with --text).")],
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text to compare on. Default: the held-out sets of the runs."),
    ] = None,
    tasks: Tasks = None,
    abilities: Abilities = None,
    items: Items = 100,
    report: Report = None,
    as_json: Json = False,
) -> None:
    """Compare runs or models, with paired intervals."""
    require_training()
    check_report(report)
    from postgrad.cli import render
    from postgrad.commands.compare import compare_abilities, compare_models, compare_runs, compare_tasks

    if sum(map(bool, (text, tasks, abilities))) > 1:
        raise StageError(
            "--text, --tasks and --abilities are different comparisons", where="compare", hint="use one at a time"
        )

    if tasks is not None:
        on_tasks = compare_tasks(models, tasks)
        print_result(on_tasks, as_json, render.task_comparison_text(on_tasks))
    elif abilities is not None:
        on_abilities = compare_abilities(models, _names(abilities), items=items)
        print_result(on_abilities, as_json, render.ability_comparison_text(on_abilities))
    elif text:
        on_text = compare_models(models, text)
        print_result(on_text, as_json, render.model_comparison_text(on_text))
    else:
        runs = compare_runs(models)
        _write_page(runs, report)
        print_result(runs, as_json, render.run_comparison_text(runs, report))


def shift(
    model: Annotated[str, typer.Option(help="The model: a folder, run, checkpoint or Hub name.")],
    old: Annotated[
        list[str],
        typer.Option(help="Text the model was trained on, or its own; may be repeated."),
    ],
    new: Annotated[list[str], typer.Option(help="Text to train on; may be repeated.")],
    context: Context = None,
    report: Report = None,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Measure how far new text is from old text, and propose replay, learning rate, warm-up and vocabulary."""
    require_training()
    check_report(report)
    from postgrad.cli.render import shift_text
    from postgrad.commands.shift import measure_shift

    result = measure_shift(model, old, new, base=base, context=context)
    _write_page(result, report)
    print_result(result, as_json, shift_text(result, report))


def probe(
    model: ModelArgument,
    train: Annotated[str, typer.Argument(help="Labelled texts or tagged words to train on.")],
    test: Annotated[str, typer.Argument(help="The same kind of rows, to test on once.")],
    dev: Annotated[
        str | None,
        typer.Option(help="The same kind of rows, to choose by. Default: a tenth of TRAIN."),
    ] = None,
    kind: Annotated[str, typer.Option(help="Kind of rows: auto, labelled, tagged.")] = "auto",
    pooling: Annotated[
        str, typer.Option(help="How a text's tokens become one vector: auto, first, mean, max, last.")
    ] = "auto",
    stack: Annotated[str, typer.Option(help="Of an encoder-decoder: auto, encoder, decoder.")] = "auto",
    context: Annotated[
        int | None,
        typer.Option(help="Tokens the model reads at once. Default: its own limit, up to 512."),
    ] = None,
    report: Report = None,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Probe every layer of a frozen model for labels, with one forward pass over the text."""
    require_training()
    check_report(report)
    from postgrad.cli.progress import ProgressLine
    from postgrad.cli.render import probe_text
    from postgrad.commands.probe import probe_layers

    with ProgressLine() as progress:
        result = probe_layers(
            model, train, test, dev=dev, kind=kind, pooling=pooling, stack=stack, context=context, base=base,
            progress=progress,
        )  # fmt: skip
    _write_page(result, report)
    print_result(result, as_json, probe_text(result, report))


def lineage(
    run: Annotated[Path, typer.Argument(help="The last run of the lineage.")],
    report: Report = None,
    as_json: Json = False,
) -> None:
    """Show the stages that led to a run, and the loss on every held-out set after each (R matrix, BWT, FWT, forgetting)."""
    require_training()
    check_report(report)
    from postgrad.cli.render import lineage_text
    from postgrad.commands.lineage import trace_lineage

    result = trace_lineage(run)
    _write_page(result, report)
    print_result(result.as_json(), as_json, lineage_text(result, run, report))


def importance(
    model: ModelArgument,
    files: Annotated[list[str], typer.Argument(help="Text, or rows of the model's task.")],
    out: Annotated[Path, typer.Option(help="The file to write (.safetensors).")],
    tokens: Annotated[str, typer.Option(help="Labels to measure, such as 100k.")] = "100k",
    kind: Annotated[
        str,
        typer.Option(
            help="fisher (labels sampled from the model), empirical (the text's own labels; biased), mas, or activation "
            "(without gradients, for sparse_update ssu)."
        ),
    ] = "fisher",
    accumulate: Annotated[
        Path | None,
        typer.Option(help="Older importance to add to, after its decay (online EWC)."),
    ] = None,
    decay: Annotated[float, typer.Option(help="Factor of the older importance.")] = 0.9,
    dtype: Annotated[str, typer.Option(help="Dtype of the file: float32 or bfloat16.")] = "float32",
    context: Context = None,
    document_unit: DocumentUnit = "auto",
    column: TextColumn = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampled labels and the order of the text.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Measure how much each weight matters to a model's predictions, for an anchor penalty (EWC, MAS)."""
    require_training()
    from postgrad.cli.progress import make_screen
    from postgrad.cli.render import importance_text
    from postgrad.commands.importance import measure_importance

    screen = make_screen(as_json)
    try:
        result = measure_importance(
            model, files, out=out, tokens=tokens, kind=kind, accumulate=accumulate, decay=decay, dtype=dtype,
            context=context, document_unit=document_unit, column=column, seed=seed, force=force, base=base,
            progress=screen.show_measuring,
        )  # fmt: skip
    except KeyboardInterrupt:
        raise InterruptError("stopped; nothing was written", hint="fewer --tokens take less time") from None
    finally:
        screen.close()
    print_result(result, as_json, importance_text(result))


def _names(option: str) -> str | list[str]:
    """The names in an option, separated by commas."""
    return option if option == "all" else [name.strip() for name in option.split(",")]


def _write_page(result: object, report: Path | None) -> None:
    if report:
        from postgrad.commands.pages import write_page

        write_page(result, report)  # type: ignore[bad-argument-type]
