"""What can be replayed when the old text is gone? Text that the start model writes itself.

Documents are drawn from the model at temperature one and without truncation, from its BOS or behind the beginnings of a few
texts: what it then writes is distributed as what it knows (self-generated replay; LAMOL, Sun et al. 2020, arXiv 1909.03329).
What repeats itself, and what is nearly a document before it, is left out and counted. Killed anywhere and started again with
the same command, it goes on behind the last whole batch and ends with the same file.
"""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, PreTrainedTokenizerBase

from postgrad.data.filter.near_duplicates import MIN_THRESHOLD, NearDuplicateIndex, repetition_share
from postgrad.data.read.documents import read_documents
from postgrad.data.read.files import RawSource as Files
from postgrad.data.read.generated_text import GENERATED_COLUMN
from postgrad.data.tokens.tokenize import Encoder
from postgrad.errors import DataError, ModelError, StageError
from postgrad.evaluation.continuations import decode_ids
from postgrad.evaluation.generate_documents import generate_documents
from postgrad.evaluation.held_out import insert_after_bos
from postgrad.hardware import machine
from postgrad.models.location import locate_model
from postgrad.models.model import CausalModel, wrap_model
from postgrad.models.pretrained import load_tokenizer
from postgrad.models.task import Task
from postgrad.plan.model_inputs import make_encoder
from postgrad.storage.atomic import write_atomically
from postgrad.storage.fingerprint import fingerprint
from postgrad.tuning.open_model import get_task, open_model, start_fingerprint

_MAX_PROMPTS = 100_000
_MIN_WORDS = 5
_MAX_ATTEMPTS = 10
"""Documents that are drawn for each that is kept, before it is given up."""


@dataclass(frozen=True)
class SynthesisRequest:
    """What is to be written."""

    tokens: int
    """Tokens of text to be kept in all."""
    max_document_tokens: int
    """Tokens of a document, its beginning included."""
    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    prompt_tokens: int = 0
    """Tokens of a text that a document begins with; 0: the model's BOS alone."""
    batch_size: int = 32
    max_repetition: float = 0.3
    """Documents with a larger share in runs of eight tokens that occurred before in them are left out."""
    dedup_threshold: float = 0.8
    """Documents that share so much of their five-word runs with one before are left out."""


@dataclass(frozen=True)
class SynthesisProgress:
    """How far the writing is."""

    documents: int
    tokens: int
    target_tokens: int


@dataclass
class _SynthesisState:
    """What is written down after each batch: everything that going on needs, beside the file itself."""

    options_fingerprint: str
    next: int = 0
    size: int = 0
    documents: int = 0
    tokens: int = 0
    ended: int = 0
    left_out: dict[str, int] | None = None


@dataclass(frozen=True)
class Candidate:
    """What was drawn, before it is decided whether it is kept."""

    row: dict[str, Any]
    """What is written, without how it was made."""
    provenance: dict[str, Any]
    """How it was made, beside what all rows of a file have in common."""
    tokens: int
    ended: bool
    rejection_reason: str | None = None
    """Why it is left out; None for what may be kept."""


DrawCandidates = Callable[[range], Iterable[Candidate]]
"""Draws the candidates of these numbers; each is a function of its own number."""


@dataclass(frozen=True)
class TextGenerator:
    """A decoder that writes."""

    name: str
    fingerprint: str
    model: CausalModel
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    virtual_tokens: tuple[int, ...]
    """A soft prompt's places, set before what it reads."""
    max_positions: int | None
    """Its positions."""

    @property
    def stop_tokens(self) -> set[int]:
        """What ends a text."""
        named = getattr(self.model.pretrained.generation_config, "eos_token_id", None)
        own = [self.encoder.eos, self.encoder.bos, *(named if isinstance(named, list) else [named])]
        return {token for token in own if token is not None}


def load_generator(
    model: str, max_document_tokens: int, base: str | None = None, where: str = "model"
) -> TextGenerator:
    """The model of a name, given at `where`, as one that writes.

    Raises `StageError` for texts that are longer than it reads, `ModelError` for what is no decoder, or not there.
    """
    try:
        start = locate_model(model, Path.cwd(), base)
    except ModelError as error:
        at = where if error.where == "model" else error.where
        raise ModelError(error.problem, where=at, expected=error.expected, hint=error.hint) from None
    if get_task(start) != Task.CAUSAL:
        raise ModelError(
            f"{model} does not write running text",
            where=where,
            expected="a decoder, which was trained on running text",
        )
    tokenizer = load_tokenizer(start)
    config: Any = AutoConfig.from_pretrained(start.name_or_path)
    encoder = make_encoder(tokenizer, int(config.vocab_size))
    limit = getattr(config, "max_position_embeddings", None)
    if limit and max_document_tokens > limit:
        raise StageError(
            f"documents of {max_document_tokens:,} tokens do not fit {model}, which has {limit:,} positions",
            where="--longest",
            expected=f"at most {limit:,}",
        )
    opened = open_model(start)
    view = wrap_model(opened.model, Task.CAUSAL).to(machine.default_device())
    assert isinstance(view, CausalModel)
    return TextGenerator(
        model, start_fingerprint(start) or model, view, tokenizer, encoder, tuple(opened.frame.prefix_ids), limit
    )


def synthesize(
    model: str, out: Path, request: SynthesisRequest, prompt_files: Sequence[str] = (), *, base: str | None = None
) -> Iterator[SynthesisProgress]:
    """Write documents to `out`, a JSONL file with `text` and how each was made.

    Raises `StageError` for a file that is there already or was begun with other options, `ModelError` for a model that does not
    write running text, `DataError` when nothing that it writes can be kept.
    """
    check_request(out, request)
    if bool(prompt_files) != bool(request.prompt_tokens):
        raise StageError(
            "beginnings need a text to come from, and a length",
            where="--from",
            expected="--from FILE --beginning 16, or neither",
        )
    machine.tune_allocator()
    writer = load_generator(model, request.max_document_tokens, base)
    texts = _read_prompts(prompt_files, request, writer.tokenizer, writer.encoder)
    of = fingerprint([asdict(request), writer.fingerprint, [text.tolist() for text, _ in texts]])
    yield from generate_until_target(out, request, of, writer, partial(_generate_documents, writer, request, texts))
    finalize_output(out)


def _generate_documents(
    generator: TextGenerator, request: SynthesisRequest, prompts: Sequence[tuple[np.ndarray, str]], numbers: range
) -> Iterator[Candidate]:
    """Documents of running text behind their beginnings."""
    begun = [prompts[number % len(prompts)] for number in numbers]
    bos = generator.encoder.bos
    found = generate_documents(
        generator.model,
        [insert_after_bos(ids, generator.virtual_tokens, bos) for ids, _ in begun],
        numbers,
        seed=request.seed,
        max_new_tokens=request.max_document_tokens - len(begun[0][0]) - len(generator.virtual_tokens),
        stop_ids=generator.stop_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
    )
    for (ids, place), new in zip(begun, found, strict=True):
        own = ids[1:] if bos is not None or not request.prompt_tokens else ids
        text = decode_ids(generator.tokenizer, np.concatenate([own, new.ids])).strip()
        short = "too short" if len(text.split()) < _MIN_WORDS else None
        loops = "repeating themselves" if repetition_share(new.ids.tolist()) > request.max_repetition else None
        yield Candidate({"text": text}, {"from": place}, len(own) + len(new.ids), new.ended, short or loops)


def dedup_text(row: Mapping[str, Any]) -> str:
    """The text by which near copies of a row are known: what is asked, or all of a running text."""
    return str(row["messages"][0]["content"] if "messages" in row else row["text"])


def finalize_output(out: Path, select: Callable[[list[str]], list[str]] | None = None) -> None:
    """Give what has grown its final name; of its lines only those that `leave` leaves."""
    if select is None:
        partial_file(out).rename(out)
    else:
        chosen = select(partial_file(out).read_text("utf-8").splitlines(keepends=True))
        state = {**json.loads(_state_file(out).read_text()), "chosen": len(chosen)}
        write_atomically(out, "".join(chosen))  # what has grown stays as it is until all is settled
        write_atomically(_state_file(out), json.dumps(state))
        partial_file(out).unlink()
    _state_file(out).rename(summary_file(out))


def generate_until_target(
    out: Path, request: SynthesisRequest, options_fingerprint: str, generator: TextGenerator, draw: DrawCandidates
) -> Iterator[SynthesisProgress]:
    """Let what is to become `out` grow by what `draw` gives, batch after batch, until it has as many tokens as are wished for.

    `of` is the fingerprint of all that decides what is written. Raises `StageError` for what was begun with another,
    `DataError` when nearly nothing can be kept.
    """
    part, kept = partial_file(out), _state_file(out)
    state = _load_state(out, options_fingerprint)
    seen, left_out = NearDuplicateIndex(request.dedup_threshold), Counter(state.left_out or {})
    common = {"by": generator.name, "model": generator.fingerprint, "seed": request.seed}
    common |= {"temperature": request.temperature, "top_p": request.top_p}
    with part.open("a+b") as file:
        file.truncate(state.size)
        file.seek(0)
        for line in file:
            seen.find_or_add(dedup_text(json.loads(line)))
        while state.tokens < request.tokens:
            numbers = range(state.next, state.next + request.batch_size)
            for number, found in zip(numbers, draw(numbers), strict=True):
                if state.tokens >= request.tokens:
                    break
                reason = found.rejection_reason
                if reason is None and seen.find_or_add(dedup_text(found.row)) is not None:
                    reason = "nearly the same as one before"
                if reason:
                    left_out[reason] += 1
                    continue
                made = {**common, "number": number, "ended": found.ended, **found.provenance}
                file.write(json.dumps({**found.row, GENERATED_COLUMN: made}, ensure_ascii=False).encode() + b"\n")
                state.documents += 1
                state.ended += found.ended
                state.tokens += found.tokens
            file.flush()
            state.next, state.size, state.left_out = numbers.stop, file.tell(), dict(left_out)
            write_atomically(kept, json.dumps(asdict(state)))
            yield SynthesisProgress(state.documents, state.tokens, request.tokens)
            if state.next >= _MAX_ATTEMPTS * max(state.documents, request.batch_size):
                raise DataError(
                    f"of {state.next:,} documents {state.documents:,} could be kept ("
                    + ", ".join(f"{count:,} {reason}" for reason, count in left_out.most_common())
                    + ")",
                    where="synthesize",
                    expected="a model that writes text",
                    hint="raise --longest for what has no end, --most-repeated or --alike for the rest; or show it how with"
                    " --from",
                )


def summary_file(out: Path) -> Path:
    """Where it is told how a file was written."""
    return out.with_name(f"{out.name}.made.json")


def synthesis_summary(model: str, out: Path) -> dict[str, Any]:
    """What was written, for people."""
    state = json.loads(summary_file(out).read_text())
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in state["left_out"].items()) or "none"
    lines = [
        f"{out}: {state['documents']:,} documents, {state['tokens']:,} tokens, written by {model}",
        f"  {state['ended'] / max(state['documents'], 1):.0%} ended by themselves; left out: {left_out}",
        *([f"  of these the {state['chosen']:,} most various are kept"] if "chosen" in state else []),
        *(f"  {number}. {text}" for number, text in enumerate(_preview_lines(out), 1)),
        f"use it as a source: {{name: replay, path: {out}, share: 10%, role: replay}}",
        f"next: {shlex.join(['postgrad', 'init', 'stage', '--model', model, '--data', 'NEW', '--replay', str(out)])}",
    ]
    return {"text": "\n".join(lines), "file": str(out), **state}


def _preview_lines(out: Path) -> list[str]:
    with out.open() as file:
        return [" ".join(dedup_text(json.loads(line)).split())[:100] for line in islice(file, 3)]


def check_request(out: Path, request: SynthesisRequest) -> None:
    """Raise `StageError` for a file that is there, or numbers that cannot be."""
    if out.exists():
        raise StageError(f"{out} is there already", where="--out", hint="name another file, or remove it")
    if out.suffix != ".jsonl":
        raise StageError(f"{out.name} is no JSONL file", where="--out", expected="a name that ends in .jsonl")
    if not out.parent.is_dir():
        raise StageError(f"there is no folder {out.parent}", where="--out", hint="make it, or name a file elsewhere")
    for option, value, fits, expected in (
        ("--tokens", request.tokens, request.tokens > 0, "above 0"),
        (
            "--longest",
            request.max_document_tokens,
            request.max_document_tokens > 1,
            "at least 2: where it begins, and a token to write",
        ),
        ("--temperature", request.temperature, 0 < request.temperature < math.inf, "above 0"),
        ("--top-p", request.top_p, 0 < request.top_p <= 1, "above 0, at most 1"),
        (
            "--beginning",
            request.prompt_tokens,
            0 <= request.prompt_tokens < request.max_document_tokens - 1,
            "fewer tokens than --longest, not below 0",
        ),
        ("--at-once", request.batch_size, request.batch_size > 0, "above 0"),
        ("--most-repeated", request.max_repetition, 0 <= request.max_repetition <= 1, "a share of a document: 0 to 1"),
        (
            "--alike",
            request.dedup_threshold,
            MIN_THRESHOLD <= request.dedup_threshold <= 1,
            f"{MIN_THRESHOLD:g} to 1: what shares less is not found",
        ),
    ):
        if not fits:
            raise StageError(f"{value} is no such number", where=option, expected=expected)


def _read_prompts(
    files: Sequence[str], request: SynthesisRequest, tokenizer: PreTrainedTokenizerBase, encoder: Encoder
) -> list[tuple[np.ndarray, str]]:
    """What documents begin with, each with its place: the first tokens of texts, or what stands before every text."""
    # A model without a BOS has learnt that a text begins behind the end of another.
    first = encoder.bos if encoder.bos is not None else encoder.eos
    if not request.prompt_tokens:
        return [(np.array([first]), "bos")]
    found: list[tuple[np.ndarray, str]] = []
    lead = [] if encoder.bos is None else [first]
    for path in files:
        documents = read_documents(Files("beginnings", path, root=Path.cwd(), where="--from"))
        for document in islice(documents, _MAX_PROMPTS):
            if document.text is None or document.is_empty:
                continue
            ids = tokenizer(document.text[: 32 * request.prompt_tokens], add_special_tokens=False)["input_ids"]
            if len(ids) >= request.prompt_tokens:
                found.append((np.array([*lead, *ids[: request.prompt_tokens]]), document.location))
    if not found:
        raise DataError(
            f"no text of {request.prompt_tokens} tokens",
            where="--from",
            expected="texts that are at least as long as --beginning",
        )
    return found


def partial_file(out: Path) -> Path:
    return out.with_name(f"{out.name}.part")


def _state_file(out: Path) -> Path:
    return out.with_name(f"{out.name}.part.json")


def _load_state(out: Path, options_fingerprint: str) -> _SynthesisState:
    """Where the writing of a file stands. Raises `StageError` when it was begun with other options, or cannot be read."""
    if not _state_file(out).exists():
        return _SynthesisState(options_fingerprint)
    remove = f"remove {partial_file(out).name} and {_state_file(out).name}"
    try:
        state = _SynthesisState(**json.loads(_state_file(out).read_text("utf-8")))
    except (ValueError, TypeError):
        raise StageError(
            f"{_state_file(out)} is broken: it does not say where the writing of {out.name} stands",
            where="--out",
            hint=remove,
        ) from None
    if state.options_fingerprint != options_fingerprint:
        raise StageError(
            f"{partial_file(out)} was begun with another model or other options",
            where="--out",
            hint=f"give those again, or {remove}",
        )
    return state
