"""What does a model write, and how does it leave? Text on the terminal, and plain Hugging Face folders."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from postgrad.errors import ModelError, StageError
from postgrad.evaluation.samples import text_of
from postgrad.models import machine
from postgrad.models.pretrained import (
    Start,
    load_model,
    load_tokenizer,
    locate,
    save_pretrained,
    stored_dtype,
)
from postgrad.publish import publish

_Writer = tuple[str, PreTrainedModel, PreTrainedTokenizerBase]


def _writers(models: list[str], *, tokens: int, temperature: float, top_p: float, **_: Any) -> list[_Writer]:
    for option, value, fits, expected in (
        ("--tokens", tokens, tokens >= 1, "1 or more"),
        ("--temperature", temperature, 0 <= temperature < math.inf, "0 or more"),
        ("--top-p", top_p, 0 < top_p <= 1, "above 0, at most 1"),
    ):
        if not fits:
            raise StageError(f"{value} is no such number", where=option, expected=expected)
    starts = [(name, locate(name, Path.cwd())) for name in models]
    return [(name, _placed(load_model(start)), load_tokenizer(start)) for name, start in starts]


def _placed(model: PreTrainedModel) -> PreTrainedModel:
    torch.nn.Module.to(model, machine.device())
    return model


@torch.no_grad()
def _written(writer: _Writer, prompt: str, *, tokens: int, temperature: float, top_p: float, seed: int) -> str:
    _, model, tokenizer = writer
    torch.manual_seed(seed)
    inputs = tokenizer(prompt or (tokenizer.bos_token or tokenizer.eos_token), return_tensors="pt").to(model.device)
    drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    limit = getattr(model.config, "max_position_embeddings", None)
    begun = inputs["input_ids"].shape[1]
    if limit and begun + tokens > limit:
        if begun >= limit:
            raise ModelError(f"the text has {begun} tokens and the model {limit} positions", where="--prompt")
        tokens = limit - begun
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out = model.generate(  # pyrefly: ignore[not-callable]
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=tokens,
        pad_token_id=pad,
        **drawn,
    )
    return text_of(tokenizer, out[0, begun:])


def write_once(models: list[str], prompt: str, **options: Any) -> dict[str, Any]:
    """Each model's continuation of a text."""
    found = [
        {"model": writer[0], "written": _written(writer, prompt, **options)} for writer in _writers(models, **options)
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
            label = f"[{writer[0]}] " if len(writers) > 1 else ""
            print(f"{label}{prompt}{_written(writer, prompt, **options)}\n")


def export_model(name: str, folder: Path, dtype: str) -> dict[str, Any]:
    """Publish a plain Hugging Face folder and compare its logits, read back, with the source's.

    Raises `StageError` when `folder` is there already, `ModelError` when the logits differ (the folder is kept).
    """
    if folder.exists():
        raise StageError(f"{folder} is there already", where="export", way_out="name a folder that does not exist")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise StageError(f"there is no dtype {dtype!r}", where="--dtype", expected="auto, float32, bfloat16 or float16")
    start = locate(name, Path.cwd())
    wanted = stored_dtype(start) if dtype == "auto" else getattr(torch, dtype)
    model, tokenizer = load_model(start, dtype=wanted), load_tokenizer(start)
    publish(folder, lambda staged: save_pretrained(model, tokenizer, staged, dtype=wanted))
    back = load_model(Start(str(folder), folder.resolve()), dtype=wanted)
    ids = torch.arange(16)[None] % model.config.vocab_size
    with torch.no_grad():
        difference = (model(input_ids=ids).logits.float() - back(input_ids=ids).logits.float()).abs().max().item()
    if difference != 0:
        raise ModelError(f"the exported model's logits differ by {difference:.2g}", where=str(folder))
    size = sum(p.stat().st_size for p in folder.iterdir())
    text = (
        f"{folder}: {str(wanted).removeprefix('torch.')}, {size:,} bytes; plain transformers reads the same logits\n"
        f"next: {shlex.join(['postgrad', 'generate', str(folder)])}"
    )
    return {"text": text, "folder": str(folder), "dtype": str(wanted).removeprefix("torch."), "bytes": size}
