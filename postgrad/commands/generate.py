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
from postgrad.evaluation.continuations import decode_ids
from postgrad.evaluation.held_out import insert_after_bos
from postgrad.hardware import machine
from postgrad.models.layers import get_embedding_weight
from postgrad.models.location import TUNING_FILE, ModelLocation, locate_model
from postgrad.models.model import wrap_model
from postgrad.models.prefix_lm_attention import PREFIX_LM_KEY, is_prefix_lm, prefill_prompt
from postgrad.models.pretrained import load_pretrained, load_tokenizer, save_pretrained, stored_dtype
from postgrad.models.task import Task
from postgrad.models.task_head import load_task_head_config
from postgrad.storage.atomic import publish_folder
from postgrad.tuning.folder import read_export
from postgrad.tuning.open_model import LoadedModel, open_model, start_fingerprint


@dataclass(frozen=True)
class _TextModel:
    """A model that can write, and what it reads before each text."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    virtual_tokens: tuple[int, ...]


def _load_text_models(
    models: list[str], *, tokens: int, temperature: float, top_p: float, base: str | None = None, **_: Any
) -> list[_TextModel]:
    """The models that write; `base` is what the first of them sits on."""
    for option, value, fits, expected in (
        ("--tokens", tokens, tokens >= 1, "1 or more"),
        ("--temperature", temperature, 0 <= temperature < math.inf, "0 or more"),
        ("--top-p", top_p, 0 < top_p <= 1, "above 0, at most 1"),
    ):
        if not fits:
            raise StageError(f"{value} is no such number", where=option, expected=expected)
    first, *others = models
    starts = [
        (first, locate_model(first, Path.cwd(), base)),
        *((name, locate_model(name, Path.cwd())) for name in others),
    ]
    return [_load_text_model(name, start) for name, start in starts]


def _load_text_model(name: str, start: ModelLocation) -> _TextModel:
    opened = open_model(start)
    if not opened.task.generates:
        raise ModelError(
            f"{name} does not write text", where="model", expected="a decoder or an encoder-decoder language model"
        )
    torch.nn.Module.to(opened.model, machine.default_device())
    return _TextModel(name, opened.model, load_tokenizer(start), opened.task, opened.frame.prefix_ids)


def _encode_prompt(text_model: _TextModel, prompt: str) -> np.ndarray:
    """The ids of a text to go on from, of shape (T,)."""
    tokenizer = text_model.tokenizer
    given = tokenizer(prompt or (tokenizer.bos_token or tokenizer.eos_token))["input_ids"]
    return np.array(given, np.int64)


def _encode_chat(text_model: _TextModel, messages: list[dict[str, str]]) -> np.ndarray:
    """The ids of a conversation up to where the next answer begins, of shape (T,), as rows of training have them."""
    tokenizer = text_model.tokenizer
    text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    if text_model.task.is_encoder_decoder:
        return _encode_prompt(text_model, text)
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)
    bos = tokenizer.bos_token_id
    sets_one = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return np.concatenate([[bos], ids]) if sets_one and ids[:1].tolist() != [bos] else ids


def _remaining_positions(text_model: _TextModel, length: int) -> float:
    """How many tokens can follow so many."""
    limit = getattr(text_model.model.config, "max_position_embeddings", None)
    return math.inf if not limit or text_model.task.is_encoder_decoder else limit - length


@torch.no_grad()
def _generate_text(
    text_model: _TextModel,
    prompt_ids: np.ndarray,
    *,
    tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    **_: Any,
) -> str:
    model, tokenizer = text_model.model, text_model.tokenizer
    torch.manual_seed(seed)
    ids = torch.from_numpy(insert_after_bos(prompt_ids, text_model.virtual_tokens, tokenizer.bos_token_id))[None]
    drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    room = _remaining_positions(text_model, ids.shape[1])
    if room < 1:
        limit = ids.shape[1] + int(room)
        raise ModelError(f"the text has {ids.shape[1]} tokens and the model {limit} positions", where="--prompt")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ends = model.generation_config.eos_token_id  # pyrefly: ignore[missing-attribute]
    ids = ids.to(model.device)
    read = {"past_key_values": prefill_prompt(model, ids)} if is_prefix_lm(model.config) else {}
    out = model.generate(  # pyrefly: ignore[not-callable]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=int(min(tokens, room)),
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id if ends is None else ends,
        **drawn,
        **read,
    )
    if text_model.task.is_encoder_decoder:  # it writes where it has not read
        return decode_ids(tokenizer, out[0])
    # Decoded behind what it goes on from: a space before a first word is no text to many tokenizers.
    before, added = prompt_ids.tolist(), out[0, ids.shape[1] :].tolist()
    known, whole = (decode_ids(tokenizer, np.array(part, np.int64)) for part in (before, before + added))
    return whole.removeprefix(known) if whole.startswith(known) else decode_ids(tokenizer, out[0, ids.shape[1] :])


def generate_once(models: list[str], prompt: str, *, as_chat: bool = False, **options: Any) -> dict[str, Any]:
    """Each model's continuation of a text, or with `as_chat` its answer to it in the model's chat template.

    Raises `ModelError` for a model without a chat template that is to answer.
    """
    found = []
    for writer in _load_text_models(models, **options):
        if as_chat and not writer.tokenizer.chat_template:
            raise ModelError(
                f"{writer.name} has no chat template",
                where="--chat",
                expected="a model that was trained on conversations",
            )
        given = (
            _encode_chat(writer, [{"role": "user", "content": prompt}]) if as_chat else _encode_prompt(writer, prompt)
        )
        found.append({"model": writer.name, "written": _generate_text(writer, given, **options)})
    before = "" if as_chat else prompt
    if len(found) == 1:
        text = before + found[0]["written"]
    else:
        text = "\n\n".join(f"[{item['model']}]\n{before}{item['written']}" for item in found)
    return {"text": text, "prompt": prompt, "continuations": found}


def chat(models: list[str], *, as_chat: bool = True, **options: Any) -> None:
    """Ask for a text again and again; ends with an empty line or Ctrl-D.

    A model with a chat template answers, and hears the whole conversation; any other, or each with `as_chat=False`, goes on
    from the text alone. What no longer fits before an answer is left out from the beginning.
    """
    if not sys.stdin.isatty():
        raise StageError("there is nobody to ask for a text", where="generate", hint="give one with --prompt")
    writers = _load_text_models(models, **options)
    heard: dict[int, list[dict[str, str]]] = {
        i: [] for i, writer in enumerate(writers) if as_chat and writer.tokenizer.chat_template
    }
    print("Say something; an empty line ends." if heard else "Give a text; an empty line ends.")
    while True:
        try:
            prompt = input("> ")
        except (EOFError, KeyboardInterrupt):
            break
        if not prompt.strip():
            break
        for i, writer in enumerate(writers):
            label = f"[{writer.name}] " if len(writers) > 1 else ""
            try:
                if i in heard:
                    print(f"{label}{_answer_message(writer, heard[i], prompt, **options)}\n")
                else:
                    print(f"{label}{prompt}{_generate_text(writer, _encode_prompt(writer, prompt), **options)}\n")
            except ModelError as error:  # a text that is too long; the next one may be shorter
                print(f"error: {error}\n")
                del heard.get(i, [])[-1:]


def _answer_message(
    text_model: _TextModel, history: list[dict[str, str]], message: str, *, tokens: int, **options: Any
) -> str:
    """The answer to what was said last; both are added to what was `heard`."""
    history.append({"role": "user", "content": message})
    while (
        _remaining_positions(text_model, len(text_model.virtual_tokens) + len(_encode_chat(text_model, history)))
        < tokens
        and len(history) > 2
    ):
        del history[:2]
    answer = _generate_text(text_model, _encode_chat(text_model, history), tokens=tokens, **options)
    history.append({"role": "assistant", "content": answer})
    return answer


def export_model(
    name: str,
    folder: Path,
    dtype: str,
    base: str | None = None,
    others: Sequence[str] = (),
    weight: float = 1.0,
    method: str = "cat",
    density: float | None = None,
) -> dict[str, Any]:
    """Publish a plain Hugging Face folder and compare its logits, read back, with the source's.

    What stands in the model becomes part of its weights where the mathematics allows it: a soft prompt becomes rows of the
    vocabulary. With `others` (`RUN` or `RUN=WEIGHT`) low-rank adapters of one base are combined into one, in the way `how`.
    Raises `StageError` when `folder` is there already, `TuningError` for what cannot become weights, `ModelError`
    when the logits differ (the folder is kept).
    """
    if folder.exists():
        raise StageError(f"{folder} is there already", where="export", hint="name a folder that does not exist")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise StageError(f"there is no dtype {dtype!r}", where="--dtype", expected="auto, float32, bfloat16 or float16")
    start = locate_model(name, Path.cwd(), base)
    wanted = stored_dtype(start) if dtype == "auto" else getattr(torch, dtype)
    opened = _merge_adapters(start, weight, others, method, density) if others else open_model(start)
    model, tokenizer = opened.model, load_tokenizer(start)
    ids = torch.arange(16)[None] % get_embedding_weight(model).shape[0]
    before = torch.tensor([opened.frame.prefix_ids], dtype=torch.long)
    ids = torch.cat([before, ids], 1)
    for tuning in opened.tunings:  # the ids of a later prompt are those behind an earlier one's
        tuning.merge(tokenizer)
    for parameter in model.parameters():  # not the buffers: angles of positions stay in full precision
        parameter.data = parameter.data.to(wanted)
    with torch.no_grad():
        expected = wrap_model(model, opened.task)(**_example_inputs(opened.task, ids)).logits().float()
    publish_folder(folder, lambda staged: save_pretrained(model, tokenizer, staged, dtype=wanted))
    back = load_pretrained(ModelLocation(str(folder), folder.resolve()), opened.task, dtype=wanted).model
    with torch.no_grad():
        found = wrap_model(back, opened.task)(**_example_inputs(opened.task, ids)).logits().float()
        difference = (found - expected).abs().max().item()
    if difference != 0:
        raise ModelError(f"the exported model's logits differ by {difference:.2g}", where=str(folder))
    size = sum(p.stat().st_size for p in folder.iterdir())
    reader = "postgrad.load" if load_task_head_config(folder) else "plain transformers"
    text = f"{folder}: {str(wanted).removeprefix('torch.')}, {size:,} bytes; {reader} reads the same logits\n"
    places = list(opened.frame.prefix_ids)
    if places:
        said = tokenizer.convert_ids_to_tokens(places)
        shown = "".join(said) if len(said) <= 4 else f"{said[0]}{said[1]}... to ...{said[-1]}, {len(said)} in all"
        text += f"what is set before a text is {shown}: put it before what the model is to read\n"
    if is_prefix_lm(model.config):
        text += f"it was trained to read a prompt in both directions ({PREFIX_LM_KEY} in config.json); plain transformers does not\n"
    verb = "generate" if opened.task.generates else "eval"
    text += f"next: {shlex.join(['postgrad', verb, str(folder)])}"
    return {"text": text, "folder": str(folder), "dtype": str(wanted).removeprefix("torch."), "bytes": size}


def _merge_adapters(
    start: ModelLocation, weight: float, others: Sequence[str], method: str, density: float | None
) -> LoadedModel:
    """The base of several low-rank tunings with their weighted sum in its weights."""
    from postgrad.tuning.merge_adapters import merge_adapters

    parts = [
        (start, weight),
        *((locate_model(name, Path.cwd()), share) for name, share in map(_parse_weighted_run, others)),
    ]
    below = {start_fingerprint(part.base) if part.base else part.name: part.name for part, _ in parts}
    published = [
        (read_export(part.folder), share)
        for part, share in parts
        if part.folder and (part.folder / TUNING_FILE).exists()
    ]
    if len(below) > 1 or start.base is None or len(published) < len(parts):
        raise StageError(
            f"{' and '.join(part.name for part, _ in parts)} are no tunings of one base",
            where="--with",
            expected="runs with `tuning: {kind: lora}` that started from the same model",
        )
    opened = open_model(start.base)
    merge_adapters(opened.model, published, method, density=density).merge()  # type: ignore[bad-argument-type]
    return opened


def _parse_weighted_run(text: str) -> tuple[str, float]:
    """`RUN=WEIGHT`, or a run alone, which has the weight one."""
    name, found, weight = text.rpartition("=")
    if not found:
        return text, 1.0
    try:
        return name, float(weight)
    except ValueError:
        raise StageError(f"{weight!r} is no weight", where="--with", expected="RUN=0.5") from None


def _example_inputs(task: Task, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Something to call a model of a task with."""
    return {"input_ids": ids, "decoder_input_ids": ids.flip(1)} if task.is_encoder_decoder else {"input_ids": ids}
