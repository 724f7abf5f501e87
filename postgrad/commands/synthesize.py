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

from postgrad.data.filter.near_duplicates import LEAST, Seen, repeated
from postgrad.data.read.documents import read_documents
from postgrad.data.read.files import Source as Files
from postgrad.data.read.generated_text import MADE
from postgrad.data.tokens.tokenize import Encoder
from postgrad.errors import DataError, ModelError, StageError
from postgrad.evaluation.continuations import text_of
from postgrad.evaluation.generate_documents import drawn
from postgrad.evaluation.held_out import behind_bos
from postgrad.hardware import machine
from postgrad.models.model import CausalModel, model_for
from postgrad.models.pretrained import load_tokenizer, locate
from postgrad.plan.model_inputs import make_encoder
from postgrad.storage.atomic import write_atomically
from postgrad.storage.fingerprint import fingerprint
from postgrad.tuning.open_model import open_model, start_fingerprint, task_at

_MOST_BEGINNINGS = 100_000
_FEWEST_WORDS = 5
_TRIES = 10
"""Documents that are drawn for each that is kept, before it is given up."""


@dataclass(frozen=True)
class Wish:
    """What is to be written."""

    tokens: int
    """Tokens of text to be kept in all."""
    longest: int
    """Tokens of a document, its beginning included."""
    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    beginning: int = 0
    """Tokens of a text that a document begins with; 0: the model's BOS alone."""
    at_once: int = 32
    most_repeated: float = 0.3
    """Documents with a larger share in runs of eight tokens that occurred before in them are left out."""
    alike: float = 0.8
    """Documents that share so much of their five-word runs with one before are left out."""


@dataclass(frozen=True)
class Written:
    """How far the writing is."""

    documents: int
    tokens: int
    wanted: int


@dataclass
class _State:
    """What is written down after each batch: everything that going on needs, beside the file itself."""

    of: str
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
    made: dict[str, Any]
    """How it was made, beside what all rows of a file have in common."""
    tokens: int
    ended: bool
    trouble: str | None = None
    """Why it is left out; None for what may be kept."""


Draw = Callable[[range], Iterable[Candidate]]
"""Draws the candidates of these numbers; each is a function of its own number."""


@dataclass(frozen=True)
class Author:
    """A decoder that writes."""

    name: str
    fingerprint: str
    view: CausalModel
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    before: tuple[int, ...]
    """A soft prompt's places, set before what it reads."""
    limit: int | None
    """Its positions."""

    @property
    def stop(self) -> set[int]:
        """What ends a text."""
        named = getattr(self.view.pretrained.generation_config, "eos_token_id", None)
        own = [self.encoder.eos, self.encoder.bos, *(named if isinstance(named, list) else [named])]
        return {token for token in own if token is not None}


def author(model: str, longest: int, base: str | None = None, where: str = "model") -> Author:
    """The model of a name, given at `where`, as one that writes.

    Raises `StageError` for texts that are longer than it reads, `ModelError` for what is no decoder, or not there.
    """
    try:
        start = locate(model, Path.cwd(), base)
    except ModelError as error:
        at = where if error.where == "model" else error.where
        raise ModelError(error.met, where=at, expected=error.expected, way_out=error.way_out) from None
    if task_at(start) != "causal":
        raise ModelError(
            f"{model} does not write running text",
            where=where,
            expected="a decoder, which was trained on running text",
        )
    tokenizer = load_tokenizer(start)
    config: Any = AutoConfig.from_pretrained(start.source)
    encoder = make_encoder(tokenizer, int(config.vocab_size))
    limit = getattr(config, "max_position_embeddings", None)
    if limit and longest > limit:
        raise StageError(
            f"documents of {longest:,} tokens do not fit {model}, which has {limit:,} positions",
            where="--longest",
            expected=f"at most {limit:,}",
        )
    opened = open_model(start)
    view = model_for(opened.model, "causal").to(machine.device())
    assert isinstance(view, CausalModel)
    return Author(model, start_fingerprint(start) or model, view, tokenizer, encoder, tuple(opened.frame.before), limit)


def synthesize(
    model: str, out: Path, wish: Wish, beginnings: Sequence[str] = (), *, base: str | None = None
) -> Iterator[Written]:
    """Write documents to `out`, a JSONL file with `text` and how each was made.

    Raises `StageError` for a file that is there already or was begun with other options, `ModelError` for a model that does not
    write running text, `DataError` when nothing that it writes can be kept.
    """
    check_wish(out, wish)
    if bool(beginnings) != bool(wish.beginning):
        raise StageError(
            "beginnings need a text to come from, and a length",
            where="--from",
            expected="--from FILE --beginning 16, or neither",
        )
    machine.tune_allocator()
    writer = author(model, wish.longest, base)
    texts = _beginnings(beginnings, wish, writer.tokenizer, writer.encoder)
    of = fingerprint([asdict(wish), writer.fingerprint, [text.tolist() for text, _ in texts]])
    yield from grown(out, wish, of, writer, partial(_documents, writer, wish, texts))
    settle(out)


def _documents(
    writer: Author, wish: Wish, texts: Sequence[tuple[np.ndarray, str]], numbers: range
) -> Iterator[Candidate]:
    """Documents of running text behind their beginnings."""
    begun = [texts[number % len(texts)] for number in numbers]
    bos = writer.encoder.bos
    found = drawn(
        writer.view,
        [behind_bos(ids, writer.before, bos) for ids, _ in begun],
        numbers,
        seed=wish.seed,
        most=wish.longest - len(begun[0][0]) - len(writer.before),
        stop=writer.stop,
        temperature=wish.temperature,
        top_p=wish.top_p,
    )
    for (ids, place), new in zip(begun, found, strict=True):
        own = ids[1:] if bos is not None or not wish.beginning else ids
        text = text_of(writer.tokenizer, np.concatenate([own, new.ids])).strip()
        short = "too short" if len(text.split()) < _FEWEST_WORDS else None
        loops = "repeating themselves" if repeated(new.ids.tolist()) > wish.most_repeated else None
        yield Candidate({"text": text}, {"from": place}, len(own) + len(new.ids), new.ended, short or loops)


def asked_or_text(row: Mapping[str, Any]) -> str:
    """The text by which near copies of a row are known: what is asked, or all of a running text."""
    return str(row["messages"][0]["content"] if "messages" in row else row["text"])


def settle(out: Path, leave: Callable[[list[str]], list[str]] | None = None) -> None:
    """Give what has grown its final name; of its lines only those that `leave` leaves."""
    if leave is None:
        part_of(out).rename(out)
    else:
        chosen = leave(part_of(out).read_text("utf-8").splitlines(keepends=True))
        state = {**json.loads(_kept(out).read_text()), "chosen": len(chosen)}
        write_atomically(out, "".join(chosen))  # what has grown stays as it is until all is settled
        write_atomically(_kept(out), json.dumps(state))
        part_of(out).unlink()
    _kept(out).rename(summary_file(out))


def grown(out: Path, wish: Wish, of: str, writer: Author, draw: Draw) -> Iterator[Written]:
    """Let what is to become `out` grow by what `draw` gives, batch after batch, until it has as many tokens as are wished for.

    `of` is the fingerprint of all that decides what is written. Raises `StageError` for what was begun with another,
    `DataError` when nearly nothing can be kept.
    """
    part, kept = part_of(out), _kept(out)
    state = _resumed(out, of)
    seen, left_out = Seen(wish.alike), Counter(state.left_out or {})
    common = {"by": writer.name, "model": writer.fingerprint, "seed": wish.seed}
    common |= {"temperature": wish.temperature, "top_p": wish.top_p}
    with part.open("a+b") as file:
        file.truncate(state.size)
        file.seek(0)
        for line in file:
            seen.like(asked_or_text(json.loads(line)))
        while state.tokens < wish.tokens:
            numbers = range(state.next, state.next + wish.at_once)
            for number, found in zip(numbers, draw(numbers), strict=True):
                if state.tokens >= wish.tokens:
                    break
                reason = found.trouble
                if reason is None and seen.like(asked_or_text(found.row)) is not None:
                    reason = "nearly the same as one before"
                if reason:
                    left_out[reason] += 1
                    continue
                made = {**common, "number": number, "ended": found.ended, **found.made}
                file.write(json.dumps({**found.row, MADE: made}, ensure_ascii=False).encode() + b"\n")
                state.documents += 1
                state.ended += found.ended
                state.tokens += found.tokens
            file.flush()
            state.next, state.size, state.left_out = numbers.stop, file.tell(), dict(left_out)
            write_atomically(kept, json.dumps(asdict(state)))
            yield Written(state.documents, state.tokens, wish.tokens)
            if state.next >= _TRIES * max(state.documents, wish.at_once):
                raise DataError(
                    f"of {state.next:,} documents {state.documents:,} could be kept ("
                    + ", ".join(f"{count:,} {reason}" for reason, count in left_out.most_common())
                    + ")",
                    where="synthesize",
                    expected="a model that writes text",
                    way_out="raise --longest for what has no end, --most-repeated or --alike for the rest; or show it how with"
                    " --from",
                )


def summary_file(out: Path) -> Path:
    """Where it is told how a file was written."""
    return out.with_name(f"{out.name}.made.json")


def told(model: str, out: Path) -> dict[str, Any]:
    """What was written, for people."""
    state = json.loads(summary_file(out).read_text())
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in state["left_out"].items()) or "none"
    lines = [
        f"{out}: {state['documents']:,} documents, {state['tokens']:,} tokens, written by {model}",
        f"  {state['ended'] / max(state['documents'], 1):.0%} ended by themselves; left out: {left_out}",
        *([f"  of these the {state['chosen']:,} most various are kept"] if "chosen" in state else []),
        *(f"  {number}. {text}" for number, text in enumerate(_samples(out), 1)),
        f"use it as a source: {{name: replay, path: {out}, share: 10%, role: replay}}",
        f"next: {shlex.join(['postgrad', 'init', 'stage', '--model', model, '--data', 'NEW', '--replay', str(out)])}",
    ]
    return {"text": "\n".join(lines), "file": str(out), **state}


def _samples(out: Path) -> list[str]:
    with out.open() as file:
        return [" ".join(asked_or_text(json.loads(line)).split())[:100] for line in islice(file, 3)]


def check_wish(out: Path, wish: Wish) -> None:
    """Raise `StageError` for a file that is there, or numbers that cannot be."""
    if out.exists():
        raise StageError(f"{out} is there already", where="--out", way_out="name another file, or remove it")
    if out.suffix != ".jsonl":
        raise StageError(f"{out.name} is no JSONL file", where="--out", expected="a name that ends in .jsonl")
    if not out.parent.is_dir():
        raise StageError(f"there is no folder {out.parent}", where="--out", way_out="make it, or name a file elsewhere")
    for option, value, fits, expected in (
        ("--tokens", wish.tokens, wish.tokens > 0, "above 0"),
        ("--longest", wish.longest, wish.longest > 1, "at least 2: where it begins, and a token to write"),
        ("--temperature", wish.temperature, 0 < wish.temperature < math.inf, "above 0"),
        ("--top-p", wish.top_p, 0 < wish.top_p <= 1, "above 0, at most 1"),
        (
            "--beginning",
            wish.beginning,
            0 <= wish.beginning < wish.longest - 1,
            "fewer tokens than --longest, not below 0",
        ),
        ("--at-once", wish.at_once, wish.at_once > 0, "above 0"),
        ("--most-repeated", wish.most_repeated, 0 <= wish.most_repeated <= 1, "a share of a document: 0 to 1"),
        ("--alike", wish.alike, LEAST <= wish.alike <= 1, f"{LEAST:g} to 1: what shares less is not found"),
    ):
        if not fits:
            raise StageError(f"{value} is no such number", where=option, expected=expected)


def _beginnings(
    files: Sequence[str], wish: Wish, tokenizer: PreTrainedTokenizerBase, encoder: Encoder
) -> list[tuple[np.ndarray, str]]:
    """What documents begin with, each with its place: the first tokens of texts, or what stands before every text."""
    # A model without a BOS has learnt that a text begins behind the end of another.
    first = encoder.bos if encoder.bos is not None else encoder.eos
    if not wish.beginning:
        return [(np.array([first]), "bos")]
    found: list[tuple[np.ndarray, str]] = []
    lead = [] if encoder.bos is None else [first]
    for path in files:
        documents = read_documents(Files("beginnings", path, root=Path.cwd(), where="--from"))
        for document in islice(documents, _MOST_BEGINNINGS):
            if document.text is None or document.empty:
                continue
            ids = tokenizer(document.text[: 32 * wish.beginning], add_special_tokens=False)["input_ids"]
            if len(ids) >= wish.beginning:
                found.append((np.array([*lead, *ids[: wish.beginning]]), document.place))
    if not found:
        raise DataError(
            f"no text of {wish.beginning} tokens",
            where="--from",
            expected="texts that are at least as long as --beginning",
        )
    return found


def part_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.part")


def _kept(out: Path) -> Path:
    return out.with_name(f"{out.name}.part.json")


def _resumed(out: Path, of: str) -> _State:
    """Where the writing of a file stands. Raises `StageError` when it was begun with other options, or cannot be read."""
    if not _kept(out).exists():
        return _State(of)
    remove = f"remove {part_of(out).name} and {_kept(out).name}"
    try:
        state = _State(**json.loads(_kept(out).read_text("utf-8")))
    except (ValueError, TypeError):
        raise StageError(
            f"{_kept(out)} is broken: it does not say where the writing of {out.name} stands",
            where="--out",
            way_out=remove,
        ) from None
    if state.of != of:
        raise StageError(
            f"{part_of(out)} was begun with another model or other options",
            where="--out",
            way_out=f"give those again, or {remove}",
        )
    return state
