"""What does a model write, and how does it leave? Text on the terminal, and plain Hugging Face folders."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from postgrad.errors import ModelError, StageError
from postgrad.evaluation.held_out import behind_bos
from postgrad.evaluation.samples import text_of
from postgrad.models import machine
from postgrad.models.model import model_for
from postgrad.models.prefix_lm import KEY, prefilled, reads_prefixes
from postgrad.models.pretrained import (
    TUNING,
    Start,
    Task,
    load,
    load_tokenizer,
    locate,
    save_pretrained,
    stored_dtype,
    table_of,
)
from postgrad.models.representation import described
from postgrad.publish import publish
from postgrad.tuning.attach import read_published
from postgrad.tuning.opened import Opened, open_model, start_fingerprint


@dataclass(frozen=True)
class _Writer:
    """A model that can write, and what it reads before each text."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    before: tuple[int, ...]


def _writers(
    models: list[str], *, tokens: int, temperature: float, top_p: float, base: str | None = None, **_: Any
) -> list[_Writer]:
    """The models that write; `base` is what the first of them sits on."""
    for option, value, fits, expected in (
        ("--tokens", tokens, tokens >= 1, "1 or more"),
        ("--temperature", temperature, 0 <= temperature < math.inf, "0 or more"),
        ("--top-p", top_p, 0 < top_p <= 1, "above 0, at most 1"),
    ):
        if not fits:
            raise StageError(f"{value} is no such number", where=option, expected=expected)
    first, *others = models
    starts = [(first, locate(first, Path.cwd(), base)), *((name, locate(name, Path.cwd())) for name in others)]
    return [_writer(name, start) for name, start in starts]


def _writer(name: str, start: Start) -> _Writer:
    opened = open_model(start)
    if opened.task not in ("causal", "text-to-text"):
        raise ModelError(
            f"{name} does not write text", where="model", expected="a decoder or an encoder-decoder language model"
        )
    torch.nn.Module.to(opened.model, machine.device())
    return _Writer(name, opened.model, load_tokenizer(start.plain), opened.task, opened.frame.before)


@torch.no_grad()
def _written(
    writer: _Writer, prompt: str, *, tokens: int, temperature: float, top_p: float, seed: int, **_: Any
) -> str:
    model, tokenizer = writer.model, writer.tokenizer
    torch.manual_seed(seed)
    given = tokenizer(prompt or (tokenizer.bos_token or tokenizer.eos_token))["input_ids"]
    ids = torch.from_numpy(behind_bos(np.array(given, np.int64), writer.before, tokenizer.bos_token_id))[None]
    drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    limit = getattr(model.config, "max_position_embeddings", None)
    # An encoder-decoder writes where it has not read.
    begun = 0 if writer.task == "text-to-text" else ids.shape[1]
    if limit and begun + tokens > limit:
        if begun >= limit:
            raise ModelError(f"the text has {begun} tokens and the model {limit} positions", where="--prompt")
        tokens = limit - begun
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = ids.to(model.device)
    read = {"past_key_values": prefilled(model, ids)} if reads_prefixes(model.config) else {}
    out = model.generate(  # pyrefly: ignore[not-callable]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        pad_token_id=pad,
        **drawn,
        **read,
    )
    return text_of(tokenizer, out[0, begun:])


def write_once(models: list[str], prompt: str, **options: Any) -> dict[str, Any]:
    """Each model's continuation of a text."""
    found = [
        {"model": writer.name, "written": _written(writer, prompt, **options)} for writer in _writers(models, **options)
    ]
    if len(found) == 1:
        text = prompt + found[0]["written"]
    else:
        text = "\n\n".join(f"[{item['model']}]\n{prompt}{item['written']}" for item in found)
    return {"text": text, "prompt": prompt, "continuations": found}


def chat(models: list[str], **options: Any) -> None:
    """Ask for a text again and again, and let each model go on from it; ends with an empty line or Ctrl-D."""
    if not sys.stdin.isatty():
        raise StageError("there is nobody to ask for a text", where="generate", way_out="give one with --prompt")
    writers = _writers(models, **options)
    print("Give a text; an empty line ends.")
    while True:
        try:
            prompt = input("> ")
        except (EOFError, KeyboardInterrupt):
            break
        if not prompt.strip():
            break
        for writer in writers:
            label = f"[{writer.name}] " if len(writers) > 1 else ""
            print(f"{label}{prompt}{_written(writer, prompt, **options)}\n")


def export_model(
    name: str,
    folder: Path,
    dtype: str,
    base: str | None = None,
    others: Sequence[str] = (),
    weight: float = 1.0,
    how: str = "cat",
    density: float | None = None,
) -> dict[str, Any]:
    """Publish a plain Hugging Face folder and compare its logits, read back, with the source's.

    What stands in the model becomes part of its weights where the mathematics allows it: a soft prompt becomes rows of the
    vocabulary. With `others` (`RUN` or `RUN=WEIGHT`) low-rank adapters of one base are combined into one, in the way `how`.
    Raises `StageError` when `folder` is there already, `TuningError` for what cannot become weights, `ModelError`
    when the logits differ (the folder is kept).
    """
    if folder.exists():
        raise StageError(f"{folder} is there already", where="export", way_out="name a folder that does not exist")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise StageError(f"there is no dtype {dtype!r}", where="--dtype", expected="auto, float32, bfloat16 or float16")
    start = locate(name, Path.cwd(), base)
    wanted = stored_dtype(start) if dtype == "auto" else getattr(torch, dtype)
    opened = _combined(start, weight, others, how, density) if others else open_model(start)
    model, tokenizer = opened.model, load_tokenizer(start.plain)
    ids = torch.arange(16)[None] % table_of(model).shape[0]
    before = torch.tensor([opened.frame.before], dtype=torch.long)
    ids = torch.cat([before, ids], 1)
    for tuning in opened.tunings:  # the ids of a later prompt are those behind an earlier one's
        tuning.merge(tokenizer)
    for parameter in model.parameters():  # not the buffers: angles of positions stay in full precision
        parameter.data = parameter.data.to(wanted)
    with torch.no_grad():
        expected = model_for(model, opened.task)(**_inputs(opened.task, ids)).logits().float()
    publish(folder, lambda staged: save_pretrained(model, tokenizer, staged, dtype=wanted))
    back = load(Start(str(folder), folder.resolve()), opened.task, dtype=wanted).model
    with torch.no_grad():
        found = model_for(back, opened.task)(**_inputs(opened.task, ids)).logits().float()
        difference = (found - expected).abs().max().item()
    if difference != 0:
        raise ModelError(f"the exported model's logits differ by {difference:.2g}", where=str(folder))
    size = sum(p.stat().st_size for p in folder.iterdir())
    reader = "postgrad.load" if described(folder) else "plain transformers"
    text = f"{folder}: {str(wanted).removeprefix('torch.')}, {size:,} bytes; {reader} reads the same logits\n"
    places = list(opened.frame.before)
    if places:
        said = tokenizer.convert_ids_to_tokens(places)
        shown = "".join(said) if len(said) <= 4 else f"{said[0]}{said[1]}... to ...{said[-1]}, {len(said)} in all"
        text += f"what is set before a text is {shown}: put it before what the model is to read\n"
    if reads_prefixes(model.config):
        text += (
            f"it was trained to read a prompt in both directions ({KEY} in config.json); plain transformers does not\n"
        )
    verb = "generate" if opened.task in ("causal", "text-to-text") else "eval"
    text += f"next: {shlex.join(['postgrad', verb, str(folder)])}"
    return {"text": text, "folder": str(folder), "dtype": str(wanted).removeprefix("torch."), "bytes": size}


def _combined(start: Start, weight: float, others: Sequence[str], how: str, density: float | None) -> Opened:
    """The base of several low-rank tunings with their weighted sum in its weights."""
    from postgrad.tuning.combine import combine

    parts = [(start, weight), *((locate(name, Path.cwd()), share) for name, share in map(_weighted, others))]
    below = {start_fingerprint(part.base) if part.base else part.name: part.name for part, _ in parts}
    published = [
        (read_published(part.folder), share) for part, share in parts if part.folder and (part.folder / TUNING).exists()
    ]
    if len(below) > 1 or start.base is None or len(published) < len(parts):
        raise StageError(
            f"{' and '.join(part.name for part, _ in parts)} are no tunings of one base",
            where="--with",
            expected="runs with `tuning: {kind: lora}` that started from the same model",
        )
    opened = open_model(start.base)
    combine(opened.model, published, how, density=density).merge()  # type: ignore[bad-argument-type]
    return opened


def _weighted(text: str) -> tuple[str, float]:
    """`RUN=WEIGHT`, or a run alone, which has the weight one."""
    name, found, weight = text.rpartition("=")
    if not found:
        return text, 1.0
    try:
        return name, float(weight)
    except ValueError:
        raise StageError(f"{weight!r} is no weight", where="--with", expected="RUN=0.5") from None


def _inputs(task: Task, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Something to call a model of a task with."""
    return {"input_ids": ids, "decoder_input_ids": ids.flip(1)} if task == "text-to-text" else {"input_ids": ids}
