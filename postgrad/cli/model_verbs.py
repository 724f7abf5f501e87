"""Verbs that generate text and make models: generate, export, blend, grow, synthesize."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from postgrad.cli.options import (
    Base,
    Json,
    License,
    ModelArgument,
    Report,
    check_report,
    print_result,
    require_training,
)
from postgrad.errors import InterruptError, StageError


def generate(
    model: ModelArgument,
    prompt: Annotated[
        str | None,
        typer.Option(help="Prompt to continue. Without it: an interactive session."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 always takes the most likely token.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling threshold.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    compare_with: Annotated[str | None, typer.Option(help="A second model, for the same prompt.")] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Answer in the model's chat template, or continue the prompt. Default: continue a --prompt; in an interactive "
            "session answer, if the model has a template.",
        ),
    ] = None,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Generate text, or chat with a model; with --compare-with, two of them."""
    require_training()
    from postgrad.cli.render import generation_text
    from postgrad.commands import generate as commands

    models = [model, compare_with] if compare_with else [model]
    if prompt is None:
        from postgrad.cli.chat import run_chat

        options = commands.SamplingOptions(max_new_tokens, temperature, top_p, seed)
        run_chat(models, options, chat=chat is not False, base=base)
        return
    result = commands.generate(
        models, prompt, chat=bool(chat), max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed,
        base=base,
    )  # fmt: skip
    print_result(result, as_json, generation_text(result))


def export(
    model: Annotated[str, typer.Argument(help="A run, a checkpoint or a model.")],
    folder: Annotated[
        Path,
        typer.Argument(help="The Hugging Face folder to write, or a file NAME.gguf for llama.cpp; must not exist."),
    ],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto (as it is stored).")] = "auto",
    base: Base = None,
    merge_with: Annotated[
        list[str] | None,
        typer.Option(help="Another LoRA run of the same base, RUN=WEIGHT; may be repeated."),
    ] = None,
    weight: Annotated[float, typer.Option(help="With --merge-with: the weight of the first run.")] = 1.0,
    method: Annotated[
        str, typer.Option(help="How adapters are merged: cat, svd, linear, ties, dare_ties, ...")
    ] = "cat",
    density: Annotated[
        float | None,
        typer.Option(help="Fraction of the values that ties, dare and pruning keep."),
    ] = None,
    license_name: License = None,
    as_json: Json = False,
) -> None:
    """Write a plain Hugging Face folder or a GGUF file, and verify that plain transformers computes the same logits from it."""
    require_training()
    from postgrad.cli.render import export_text
    from postgrad.commands.export import export_model

    result = export_model(model, folder, dtype, base, merge_with or [], weight, method, density, license_name)
    print_result(result, as_json, export_text(result))


def blend(
    run: Annotated[str, typer.Argument(help="A finished run; in a merge also RUN=WEIGHT.")],
    weights: Annotated[
        str, typer.Option(help="Weights of the trained model, or of the merge; 0 is the start.")
    ] = "0,0.2,0.4,0.5,0.6,0.7,0.8,0.9,1",
    granularity: Annotated[str, typer.Option(help="model, or block: also each block alone.")] = "model",
    block_weights: Annotated[
        str | None,
        typer.Option(help="Factors of the weight of the blocks, first to last; fewer are interpolated, e.g. 1,0.5,0."),
    ] = None,
    merge_with: Annotated[
        list[str] | None,
        typer.Option(
            help="Another model of the same start, MODEL, MODEL=WEIGHT or MODEL=WEIGHT,WEIGHT; may be repeated. An instruct "
            "model of the base is a chat vector."
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="linear, ties, dare_linear, dare_ties, model_stock, slerp; several with commas.")
    ] = "linear",
    density: Annotated[str, typer.Option(help="Fraction of the values that ties and dare keep.")] = "20%",
    seed: Annotated[int, typer.Option(help="Seed of the values that dare drops.")] = 0,
    start: Annotated[str | None, typer.Option(help="The start of all models. Default: that of the run.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Subtract a start that a model was not trained from.")] = False,
    average: Annotated[
        str | None, typer.Option(help="Blend with the mean of so many last checkpoints; several with commas.")
    ] = None,
    decay: Annotated[
        str,
        typer.Option(
            help="With --average: the decay of the learning rate that the weights of the checkpoints stand for: linear (the "
            "plain mean), cosine, 1-sqrt, inverse-sqrt, exponential, inverse-linear; several with commas."
        ),
    ] = "linear",
    floor: Annotated[str, typer.Option(help="With --decay: its end, as a fraction of the constant rate.")] = "0",
    until: Annotated[int | None, typer.Option(help="With --average: the step of the last checkpoint.")] = None,
    max_forgetting: Annotated[
        str | None,
        typer.Option(help="Choose the most learning within this rise on retained sets, e.g. 1%."),
    ] = None,
    weight: Annotated[float | None, typer.Option(help="Choose this weight.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the chosen model here, a plain folder.")] = None,
    report: Report = None,
    as_json: Json = False,
) -> None:
    """Score the models between a run's start and its end, or a merge of several models, and write one of them."""
    require_training()
    check_report(report)
    from postgrad.cli.render import blend_text
    from postgrad.commands import blend as commands
    from postgrad.commands.weighted_models import parse_weights
    from postgrad.config.quantities import parse_share

    if average is None:
        for option, is_set in (
            ("--decay", decay != "linear"),
            ("--floor", floor != "0"),
            ("--until", until is not None),
        ):
            if is_set:
                raise StageError(f"{option} requires --average", where=option, hint="add --average N")
    result = commands.blend(
        run,
        weights=parse_weights(weights),
        granularity=granularity,
        merge=commands.MergeOptions(
            tuple(merge_with or ()),
            tuple(method.split(",")),
            parse_share(density, "--density"),
            seed,
            start,
            force,
            tuple(parse_weights(block_weights, "--block-weights")) if block_weights else (),
        ),
        average=None
        if average is None
        else commands.AverageOptions(
            tuple(_parse_count(part) for part in average.split(",")),
            tuple(decay.split(",")),
            parse_share(floor, "--floor"),
            until,
        ),
        max_forgetting=None if max_forgetting is None else parse_share(max_forgetting, "--max-forgetting"),
        weight=weight,
        out=out,
    )
    if report:
        from postgrad.commands.pages import write_page

        write_page(result, report)
    print_result(result, as_json, blend_text(result, report))


def _parse_count(text: str) -> int:
    """A number of checkpoints. Raises `StageError`."""
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise StageError(f"{text!r} is no number of checkpoints", where="--average", expected="5, or 4,8,16")
    return int(text)


def grow(
    model: Annotated[str, typer.Argument(help="A model folder, run or Hub name.")],
    files: Annotated[list[str], typer.Argument(help="New text, on which tokens are learnt.")],
    out: Annotated[Path, typer.Option(help="The plain folder to write; must not exist.")],
    tokens: Annotated[int, typer.Option(help="Tokens to add, at most.")] = 1000,
    head: Annotated[
        str, typer.Option(help="New rows of an untied output head: mean of their pieces, or zero.")
    ] = "mean",
    old: Annotated[list[str] | None, typer.Option(help="Old text, to measure how growing changes it.")] = None,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Add tokens learnt on new text to a model's vocabulary; each starts as the mean of its pieces."""
    require_training()
    from postgrad.cli.render import grown_text
    from postgrad.commands.grow import grow_vocabulary

    result = grow_vocabulary(model, files, out, tokens=tokens, head=head, old=old or [], base=base)
    print_result(result, as_json, grown_text(result))


def synthesize(
    model: Annotated[str, typer.Argument(help="The model that generates: the start model.")],
    out: Annotated[Path, typer.Option(help="The JSONL file to write.")],
    tokens: Annotated[str, typer.Option(help="Tokens of accepted text: 500k, 2M.")] = "1M",
    max_tokens: Annotated[int, typer.Option(help="Tokens of a document, at most.")] = 512,
    prompts: Annotated[
        list[str] | None,
        typer.Option(help="Texts whose first tokens begin the documents; with --chat, rows with example questions."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="With --prompts: tokens taken from each text.")] = 0,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 1 is the model's own distribution.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling threshold; below 1 the tail is never replayed.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Documents generated in parallel.")] = 32,
    max_repetition: Annotated[float, typer.Option(help="Reject documents with a larger share of repeats.")] = 0.3,
    dedup_threshold: Annotated[float, typer.Option(help="Reject documents that share more with an earlier one.")] = 0.8,
    chat: Annotated[bool, typer.Option("--chat", help="Generate questions and answers, with a chat template.")] = False,
    shots: Annotated[
        int | None,
        typer.Option(help="With --chat and --prompts: example questions before each. Default: 3."),
    ] = None,
    answer: Annotated[
        str | None,
        typer.Option(help="With --chat: a different model that writes the answers, such as the latest one."),
    ] = None,
    diverse_share: Annotated[
        str, typer.Option(help="With --chat: fraction of the conversations to keep, the most diverse.")
    ] = "100%",
    corpus: Annotated[
        list[str] | None,
        typer.Option("--from", help="Rewrite these documents, so that a small corpus can be learnt."),
    ] = None,
    forms: Annotated[
        str, typer.Option(help="With --from: what to write of each document, separated by commas.")
    ] = "restatement,questions,notes",
    held_out: Annotated[
        str,
        typer.Option(help="With --from: share of the documents whose questions are a test instead of training text."),
    ] = "10%",
    questions: Annotated[
        Path | None, typer.Option(help="With --from: the file of these questions. Default: beside --out.")
    ] = None,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Generate replay text with the model itself, or rewrite a small corpus with --from. The same command resumes."""
    require_training()
    from postgrad.cli.progress import show_token_progress
    from postgrad.cli.render import synthesized_text
    from postgrad.commands import synthesize as commands
    from postgrad.commands.synthesize_chat import DEFAULT_SHOTS, Rehearsal, synthesize_chat
    from postgrad.commands.synthesize_from import Rewriting, synthesize_from
    from postgrad.config.quantities import parse_share, parse_token_count

    budget = parse_token_count(tokens, "--tokens")
    request = commands.SynthesisRequest(
        budget, max_tokens, seed, temperature, top_p, prompt_tokens, batch_size, max_repetition, dedup_threshold
    )
    files = tuple(prompts or ())
    if corpus:
        if chat or files:
            raise StageError("--from has a text already", where="--from", expected="neither --chat nor --prompts")
        names = tuple(name.strip() for name in forms.split(",") if name.strip())
        rewriting = Rewriting(tuple(corpus), names, parse_share(held_out, "--held-out"), questions)
        events = synthesize_from(model, out, request, rewriting, base=base)
    elif chat:
        if shots is not None and not files:
            raise StageError("--shots requires --prompts", where="--shots", hint="add --prompts FILE")
        share = parse_share(diverse_share, "--diverse-share")
        rehearsal = Rehearsal(files, DEFAULT_SHOTS if shots is None else shots, answer, share)
        events = synthesize_chat(model, out, request, rehearsal, base=base)
    else:
        _require_chat(answer=answer, diverse_share=diverse_share if diverse_share != "100%" else None, shots=shots)
        events = commands.synthesize(model, out, request, files, base=base)
    try:
        result = show_token_progress(events, as_json)
    except KeyboardInterrupt:
        raise InterruptError("stopped", hint="the same command resumes; finished documents are kept") from None
    assert isinstance(result, commands.SynthesizedText)
    with out.open() as file:
        previews = [" ".join(commands.dedup_text(json.loads(line)).split())[:100] for line in islice(file, 3)]
    print_result(result, as_json, synthesized_text(result, previews))


def _require_chat(**options: object) -> None:
    """Raise `StageError` for an option that has no effect without --chat."""
    for name, value in options.items():
        if value is not None:
            option = f"--{name.replace('_', '-')}"
            raise StageError(f"{option} requires --chat", where=option, hint="add --chat")
