"""What can be replayed when the old text is gone? Text that the start model writes itself.

Documents are drawn from the model at temperature one and without truncation, from its BOS or behind the beginnings of a few
texts: what it then writes is distributed as what it knows (self-generated replay; LAMOL, Sun et al. 2020, arXiv 1909.03329).
What repeats itself, and what is nearly a document before it, is left out and counted. Killed anywhere and started again with
the same command, it goes on behind the last whole batch and ends with the same file.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, PreTrainedTokenizerBase

from postgrad.data.duplicates import Seen, repeated
from postgrad.data.formats import read_documents
from postgrad.data.made import MADE
from postgrad.data.sources import Source as Files
from postgrad.data.tokenize import Encoder
from postgrad.errors import DataError, ModelError, StageError
from postgrad.evaluation.drawing import Drawn, drawn
from postgrad.evaluation.held_out import behind_bos
from postgrad.evaluation.samples import text_of
from postgrad.lineage.fingerprint import fingerprint
from postgrad.models import machine
from postgrad.models.model import CausalModel, model_for
from postgrad.models.pretrained import load_tokenizer, locate
from postgrad.publish import write_atomically
from postgrad.stages.reading import make_encoder
from postgrad.tuning.opened import open_model, start_fingerprint

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


def synthesize(
    model: str, out: Path, wish: Wish, beginnings: Sequence[str] = (), *, base: str | None = None
) -> Iterator[Written]:
    """Write documents to `out`, a JSONL file with `text` and how each was made.

    Raises `StageError` for a file that is there already or was begun with other options, `ModelError` for a model that does not
    write running text, `DataError` when nothing that it writes can be kept.
    """
    _check(out, wish, beginnings)
    machine.tune_allocator()
    start = locate(model, Path.cwd(), base)
    tokenizer = load_tokenizer(start.plain)
    config: Any = AutoConfig.from_pretrained(start.source)
    encoder = make_encoder(tokenizer, int(config.vocab_size))
    limit = getattr(config, "max_position_embeddings", None) or wish.longest
    if wish.longest > limit:
        raise StageError(
            f"documents of {wish.longest:,} tokens do not fit {model}, which has {limit:,} positions",
            where="--longest",
            expected=f"at most {limit:,}",
        )
    texts = _beginnings(beginnings, wish, tokenizer, encoder)
    named = start_fingerprint(start) or model
    part, kept = _part(out), _kept(out)
    state = _resumed(out, fingerprint([asdict(wish), named, [text.tolist() for text, _ in texts]]))
    opened = open_model(start)
    if opened.task != "causal":
        raise ModelError(
            f"{model} does not write running text",
            where="model",
            expected="a decoder, which was trained on running text",
        )
    view = model_for(opened.model, "causal").to(machine.device())
    assert isinstance(view, CausalModel)
    seen, left_out = Seen(wish.alike), Counter(state.left_out or {})
    with part.open("a+b") as file:
        file.truncate(state.size)
        file.seek(0)
        for line in file:
            seen.like(json.loads(line)["text"])
        stop = {encoder.eos, *([encoder.bos] if encoder.bos is not None else [])}
        while state.tokens < wish.tokens:
            numbers = range(state.next, state.next + wish.at_once)
            begun = [texts[number % len(texts)] for number in numbers]
            found = drawn(
                view,
                np.stack([behind_bos(ids, opened.frame.before, encoder.bos) for ids, _ in begun]),
                numbers,
                seed=wish.seed,
                most=wish.longest - len(begun[0][0]) - len(opened.frame.before),
                stop=stop,
                temperature=wish.temperature,
                top_p=wish.top_p,
            )
            for number, (ids, place), new in zip(numbers, begun, found, strict=True):
                if state.tokens >= wish.tokens:
                    break
                own = ids[1:] if encoder.bos is not None or not wish.beginning else ids
                text = text_of(tokenizer, np.concatenate([own, new.ids])).strip()
                reason = _unfit(text, new, seen, wish)
                if reason:
                    left_out[reason] += 1
                    continue
                told = {"by": model, "model": named, "number": number, "seed": wish.seed, "ended": new.ended}
                told |= {"temperature": wish.temperature, "top_p": wish.top_p, "from": place}
                file.write(json.dumps({"text": text, MADE: told}, ensure_ascii=False).encode() + b"\n")
                state.documents += 1
                state.ended += new.ended
                state.tokens += len(own) + len(new.ids)
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
                    way_out="raise --most-repeated or --alike, or give beginnings with --from",
                )
    part.rename(out)
    kept.rename(summary_file(out))


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
        *(f"  {number}. {text}" for number, text in enumerate(_samples(out), 1)),
        f"use it as a source: {{name: replay, path: {out}, share: 10%, role: replay}}",
        f"next: {shlex.join(['postgrad', 'init', 'stage', '--model', model, '--data', 'NEW', '--replay', str(out)])}",
    ]
    return {"text": "\n".join(lines), "file": str(out), **state}


def _samples(out: Path) -> list[str]:
    with out.open() as file:
        return [" ".join(json.loads(line)["text"].split())[:100] for line in islice(file, 3)]


def _check(out: Path, wish: Wish, beginnings: Sequence[str]) -> None:
    if out.exists():
        raise StageError(f"{out} is there already", where="--out", way_out="name another file, or remove it")
    if out.suffix != ".jsonl":
        raise StageError(f"{out.name} is no JSONL file", where="--out", expected="a name that ends in .jsonl")
    for option, value, fits, expected in (
        ("--tokens", wish.tokens, wish.tokens > 0, "above 0"),
        ("--temperature", wish.temperature, wish.temperature > 0, "above 0"),
        ("--top-p", wish.top_p, 0 < wish.top_p <= 1, "above 0, at most 1"),
        ("--beginning", wish.beginning, wish.beginning < wish.longest - 1, "fewer tokens than --longest"),
        ("--at-once", wish.at_once, wish.at_once > 0, "above 0"),
    ):
        if not fits:
            raise StageError(f"{value} is no such number", where=option, expected=expected)
    if bool(beginnings) != bool(wish.beginning):
        raise StageError(
            "beginnings need a text to come from, and a length",
            where="--from",
            expected="--from FILE --beginning 16, or neither",
        )


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


def _unfit(text: str, new: Drawn, seen: Seen, wish: Wish) -> str | None:
    """Why a document is left out; None for one that is kept, which is remembered."""
    if len(text.split()) < _FEWEST_WORDS:
        return "too short"
    if repeated(new.ids.tolist()) > wish.most_repeated:
        return "repeating themselves"
    return None if seen.like(text) is None else "nearly the same as one before"


def _part(out: Path) -> Path:
    return out.with_name(f"{out.name}.part")


def _kept(out: Path) -> Path:
    return out.with_name(f"{out.name}.part.json")


def _resumed(out: Path, of: str) -> _State:
    """Where the writing of a file stands. Raises `StageError` when it was begun with other options."""
    if not _kept(out).exists():
        return _State(of)
    state = _State(**json.loads(_kept(out).read_text()))
    if state.of != of:
        raise StageError(
            f"{_part(out)} was begun with another model or other options",
            where="--out",
            way_out=f"give those again, or remove {_part(out).name} and {_kept(out).name}",
        )
    return state
