"""Which documents of a source does its selection leave, and what did it leave out? Found once, kept in the cache.

Legend: N documents.

A selection is a function of the tokens of a source, the ways it names and the texts and models that those look at; under the
fingerprint of all of that it lies in the cache. Only a model's judgement takes long: it is written down as it grows, so that
what was stopped goes on where it was.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never

import numpy as np
from tokenizers import Tokenizer
from transformers import AutoConfig

from postgrad.config.document_filters import (
    AnyLike,
    AnySelection,
    DsirSelection,
    DuplicatesSelection,
    PerplexitySelection,
)
from postgrad.data.filter import data_selection as ways
from postgrad.data.read.documents import read_documents
from postgrad.data.read.files import Source as Files
from postgrad.data.tokens.store import TokenStore
from postgrad.data.tokens.tokenize import Encoder, inputs_fingerprint, one_at_a_time
from postgrad.errors import DataError, ModelError, StageError
from postgrad.evaluation.held_out import HeldOut
from postgrad.evaluation.perplexity import score
from postgrad.hardware import machine
from postgrad.models.model import Model, model_for
from postgrad.models.pretrained import Start, load_tokenizer, locate
from postgrad.plan.model_inputs import Reading, make_encoder
from postgrad.storage.atomic import write_atomically
from postgrad.storage.fingerprint import fingerprint
from postgrad.tuning.open_model import open_model, start_fingerprint, task_at

_FORMAT = 2
_SHOWN = 3
"""Documents that are shown of those that are kept, and of those that are left out."""
_SHOWN_CHARACTERS = 200
_BINS = 24
_JUDGED_AT_ONCE = 1 << 16
"""Tokens after which a model's judgement is written down."""
_CONTEXT = 1024

Told = Callable[[str, int, int], None]
"""Told what is done, bytes done and bytes in all."""


@dataclass(frozen=True)
class Selected:
    """What a selection left of a source, and of each way what it did, as plain data."""

    store: TokenStore
    steps: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class _Found:
    """What one way found: the documents it keeps, a value of each document, and what is to be told."""

    chosen: np.ndarray
    values_N: np.ndarray
    unit: str
    edges: tuple[float, float] | None = None
    copy_of_N: np.ndarray | None = None


def select(
    store: TokenStore,
    asked: Sequence[AnySelection],
    files: Files,
    reading: Reading,
    cache: Path,
    *,
    seed: int,
    told: Told | None = None,
) -> Selected:
    """The documents of a store that the ways `asked` leave, one after the other.

    Raises `DataError` for too little text or a way that leaves nothing, `StageError` for a model that cannot judge.
    """
    steps: list[dict[str, Any]] = []
    for number, way in enumerate(asked):
        where = f"{files.where}.select[{number}]"
        before = store
        identity = _identity(way, files.root, where, reading, cache, seed)
        key = fingerprint([_FORMAT, store.fingerprint, identity])
        place = cache / "selections" / f"{key}.npz"
        report = _reporter(told, f"{files.name} (selecting by {way.kind})", store)
        with _alone(cache, key):
            if not place.exists():
                _write(place, _carried_out(way, before, files, where, reading, cache, key, seed, report))
        chosen, step = _read(place)
        store = before.only(chosen, key)
        short = f"; {step['unjudged']:,} too short to be judged are left out" if step["unjudged"] else ""
        steps.append({"kind": way.kind, "how": how(way) + short, **step})
    return Selected(store, tuple(steps))


def how(way: AnySelection) -> str:
    """What a way keeps, in words."""
    match way:
        case DsirSelection():
            return f"{_percent(way.keep)} of the documents, those most like {', '.join(each.path for each in way.like)}"
        case PerplexitySelection():
            low, high = way.between
            who = "the start model" if way.model == "start" else way.model
            return f"{_percent(low)} to {_percent(high)} of the documents in the order of bits per byte of {who}"
        case DuplicatesSelection():
            return (
                f"documents that share less than {_percent(way.threshold)} of their runs of five words with one before"
            )
    assert_never(way)


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def selected(steps: Sequence[dict[str, Any]]) -> str:
    """What is left of a source, in a line."""
    before, after = steps[0]["before"], steps[-1]["after"]
    kinds = ", then ".join(step["kind"] for step in steps)
    return (
        f"{after['documents']:,} of {before['documents']:,} documents are read, {after['tokens']:,} of "
        f"{before['tokens']:,} tokens (selected by {kinds})"
    )


def resolved(asked: Sequence[AnySelection], start: Start, seed: int, root: Path) -> list[dict[str, Any]]:
    """The ways as a later stage needs them, wherever it is: with the files, the model and the seed that were meant."""
    own = str(start.folder) if start.folder else start.name
    out = []
    for way in asked:
        given = way.model_dump(mode="json")
        if isinstance(way, PerplexitySelection) and way.model == "start":
            given["model"] = own
        elif isinstance(way, PerplexitySelection):
            here = (root / way.model).resolve()
            given["model"] = str(here) if here.is_dir() else way.model
        if isinstance(way, DsirSelection):
            given["seed"] = seed if way.seed is None else way.seed
            given["like"] = [{**each, "path": str(root / each["path"])} for each in given["like"]]
        out.append(given)
    return out


def _carried_out(
    way: AnySelection,
    store: TokenStore,
    files: Files,
    where: str,
    reading: Reading,
    cache: Path,
    key: str,
    seed: int,
    told: ways.Told,
) -> tuple[np.ndarray, dict[str, Any]]:
    """What a way keeps of a store, and what is to be told of it."""
    tokenizer = reading.encoder.load()
    match way:
        case DsirSelection():
            found = _dsir(way, store, files.root, where, tokenizer, seed, told)
        case PerplexitySelection():
            found = _perplexity(way, store, files.root, where, reading, cache, key, told)
        case DuplicatesSelection():
            copy_of_N = ways.copies(ways.texts_in(store, tokenizer), way.threshold, told)
            found = _Found(np.flatnonzero(copy_of_N < 0), np.full(len(store), np.nan), "", copy_of_N=copy_of_N)
    if not len(found.chosen):
        raise DataError(
            f"nothing of the {len(store):,} documents of '{files.name}' is left: {how(way)}",
            where=where,
            expected="a selection that keeps something",
            way_out="keep more",
        )
    return found.chosen, _account(store, found, tokenizer)


# --- the ways -----------------------------------------------------------------------------------------


def _dsir(
    way: DsirSelection, store: TokenStore, root: Path, where: str, tokenizer: Tokenizer, seed: int, told: ways.Told
) -> _Found:
    count = ways.as_many(way.keep, len(store), f"{where}.keep")
    target_F = ways.target_counts(_like(way, root, where, tokenizer), f"{where}.like")
    weights = ways.importance_weights(ways.texts_in(store, tokenizer), target_F, told)
    chosen = ways.resampled(weights.logs_N, count, seed if way.seed is None else way.seed)
    return _Found(chosen, weights.per_gram_N, "nats/n-gram")


def _like(way: DsirSelection, root: Path, where: str, tokenizer: Tokenizer) -> Iterator[str]:
    """The texts that documents are to be like, as the tokenizer gives them back: what it loses is lost on both sides."""
    for number, given in enumerate(way.like):
        for document in read_documents(_like_files(given, root, f"{where}.like[{number}]")):
            if document.text is not None:
                ids = tokenizer.encode(document.text, add_special_tokens=False).ids
            else:
                ids = [] if document.ids is None else document.ids.tolist()
            yield tokenizer.decode(ids, skip_special_tokens=True)


def _like_files(given: AnyLike, root: Path, where: str) -> Files:
    only = {column: tuple(values) for column, values in given.only.items()}
    return Files("like", given.path, None, given.columns, given.documents, root, where, given.kind, only)


def _perplexity(
    way: PerplexitySelection,
    store: TokenStore,
    root: Path,
    where: str,
    reading: Reading,
    cache: Path,
    key: str,
    told: ways.Told,
) -> _Found:
    low, high = way.between
    ways.enough(len(store), where)
    judge = _judge(way, root, reading, where)
    kept = cache / "selections" / f"{key}.part.npy"
    bits_N = judged(judge, store, reading.encoder, way.tokens, kept, told)
    band = ways.inside(bits_N, low, high, where)
    kept.unlink(missing_ok=True)
    return _Found(band.chosen, bits_N, "bits/byte", (band.low, band.high))


@dataclass(frozen=True)
class Judge:
    """A decoder that says how likely texts are, and how it reads them."""

    model: Model
    encoder: Encoder
    before: tuple[int, ...]
    context: int


def _judge(way: PerplexitySelection, root: Path, reading: Reading, where: str) -> Judge:
    start = _judging(way, root, reading, where)
    config: Any = AutoConfig.from_pretrained(start.source)
    own = way.model == "start"
    encoder = reading.encoder if own else make_encoder(load_tokenizer(start.plain), int(config.vocab_size))
    opened = open_model(start)
    limit = getattr(config, "max_position_embeddings", None) or _CONTEXT
    return Judge(
        model_for(opened.model, "causal").to(machine.device()), encoder, opened.frame.before, min(limit, _CONTEXT)
    )


def _judging(way: PerplexitySelection, root: Path, reading: Reading, where: str) -> Start:
    """The model that judges. Raises `StageError` when it does not say how likely a text is, `ModelError` when there is none."""
    try:
        start = reading.start if way.model == "start" else locate(way.model, root)
    except ModelError as error:
        raise ModelError(error.met, where=f"{where}.model", expected=error.expected, way_out=error.way_out) from None
    if start.made is not None:
        raise StageError(
            f"{start.name} is new: it knows nothing that documents could be judged by",
            where=f"{where}.model",
            expected="a trained decoder",
        )
    if task_at(start) != "causal":
        raise StageError(
            f"{start.name} does not say how likely a text is",
            where=f"{where}.model",
            expected="a decoder",
            way_out="name one under `model`; its tokenizer may be another",
        )
    return start


def judged(
    judge: Judge, store: TokenStore, own: Encoder, tokens: int, kept: Path, told: ways.Told = ways.unheard
) -> np.ndarray:
    """Bits per byte of the first `tokens` tokens of every document, of shape (N,); NaN where there is nothing to predict.

    `own` is the encoder of the store. `kept` holds what was judged before, and grows.
    """
    done: list[float] = np.load(kept, allow_pickle=False).tolist() if kept.exists() else []
    tokenizer, writer = own.load(), judge.encoder.load()
    alike = judge.encoder.fingerprint == own.fingerprint
    table = np.asarray(store.documents)
    sizes = np.minimum(table["tokens"], tokens).cumsum()
    while len(done) < len(store):
        first = len(done)
        begun = int(sizes[first - 1]) if first else 0
        stop = max(first + 1, int(np.searchsorted(sizes, begun + _JUDGED_AT_ONCE)))
        documents: list[np.ndarray] = []
        bytes_N: list[int] = []
        for number in range(first, min(stop, len(store))):
            ids = store.read(number).astype(np.int64)
            ids, size = ids[:-1] if len(ids) and ids[-1] == own.eos else ids, int(table["bytes"][number])
            if not alike:
                text = tokenizer.decode(ids.tolist(), skip_special_tokens=True)
                lead = [] if judge.encoder.bos is None else [judge.encoder.bos]
                ids = np.array([*lead, *writer.encode(text, add_special_tokens=False).ids], np.int64)
                size = len(text.encode())
            if len(ids) > tokens:
                ids = ids[:tokens]
                size = len(writer.decode(ids.tolist(), skip_special_tokens=True).encode())
            documents.append(ids)
            bytes_N.append(size)
        held_out = HeldOut(
            "selected", "learned", tuple(documents), np.array(bytes_N), "", before=judge.before, bos=judge.encoder.bos
        )
        scores = score(judge.model, held_out, context=judge.context)
        nats_N = np.bincount(scores.document_W, scores.nats_W, len(documents))
        known_N = (np.array([len(ids) for ids in documents]) > 1) & (scores.bytes_N > 0)
        bits_N = np.where(known_N, nats_N / (np.log(2) * np.maximum(scores.bytes_N, 1)), np.nan)
        done += bits_N.tolist()
        _write_array(kept, np.array(done))
        told(len(done))
    return np.array(done)


# --- what is told -------------------------------------------------------------------------------------


def _account(store: TokenStore, found: _Found, tokenizer: Tokenizer) -> dict[str, Any]:
    """How much was there and is left, how the values lie, and a few documents of both."""
    table = np.asarray(store.documents)
    kept_N = np.zeros(len(store), bool)
    kept_N[found.chosen] = True
    parts = {name: _shown(store, np.flatnonzero(of), found, tokenizer) for name, of in _both(kept_N)}
    return {
        "before": {"documents": len(store), "tokens": store.tokens},
        "after": {"documents": len(found.chosen), "tokens": int(table["tokens"][found.chosen].sum())},
        "unit": found.unit,
        "edges": list(found.edges) if found.edges else None,
        "unjudged": int(np.isnan(found.values_N).sum()) if found.unit else 0,
        "values": _histogram(found.values_N, kept_N),
        **parts,
    }


def _both(kept_N: np.ndarray) -> tuple[tuple[str, np.ndarray], ...]:
    return (("kept", kept_N), ("dropped", ~kept_N))


def _shown(store: TokenStore, numbers: np.ndarray, found: _Found, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """A few documents, spread evenly over their values (or their order, where they have none)."""
    if not len(numbers):
        return []
    order = numbers[np.argsort(found.values_N[numbers], kind="stable")]
    places = ((np.arange(_SHOWN) + 0.5) / _SHOWN * len(order)).astype(int)

    def text(number: int) -> str:
        whole = tokenizer.decode(store.read(number, 0, _SHOWN_CHARACTERS).tolist(), skip_special_tokens=True)
        return " ".join(whole.split())[:_SHOWN_CHARACTERS]

    out: list[dict[str, Any]] = []
    for number in dict.fromkeys(order[places].tolist()):
        value = float(found.values_N[number])
        shown: dict[str, Any] = {"text": text(number), "value": None if np.isnan(value) else value}
        if found.copy_of_N is not None and found.copy_of_N[number] >= 0:
            shown["like"] = text(int(found.copy_of_N[number]))
        out.append(shown)
    return out


def _histogram(values_N: np.ndarray, kept_N: np.ndarray) -> dict[str, list[float]] | None:
    """How many documents are kept and left out at which values; the outermost hundredths count to the last bins."""
    known = ~np.isnan(values_N)
    if not known.any():
        return None
    low, high = np.quantile(values_N[known], [0.01, 0.99])
    if low == high:
        return None
    edges = np.linspace(low, high, _BINS + 1)
    counts = {name: np.histogram(values_N[of & known].clip(low, high), edges)[0].tolist() for name, of in _both(kept_N)}
    return {"edges": edges.tolist(), **counts}


# --- what is kept -------------------------------------------------------------------------------------


def _identity(way: AnySelection, root: Path, where: str, reading: Reading, cache: Path, seed: int) -> list[Any]:
    """All that decides what a way keeps, beside the documents: never where something lies."""
    match way:
        case DsirSelection():
            named = [
                [
                    inputs_fingerprint(_like_files(given, root, f"{where}.like[{number}]"), cache),
                    given.model_dump(mode="json", exclude={"path"}),
                ]
                for number, given in enumerate(way.like)
            ]
            return [way.kind, named, way.keep, seed if way.seed is None else way.seed]
        case PerplexitySelection():
            start = _judging(way, root, reading, where)
            return [way.kind, start_fingerprint(start) or start.name, list(way.between), way.tokens]
        case DuplicatesSelection():
            return [way.kind, way.threshold]
    assert_never(way)


def _alone(cache: Path, key: str) -> AbstractContextManager[bool]:
    (cache / "locks").mkdir(parents=True, exist_ok=True)
    return one_at_a_time(cache / "locks" / f"{key}.lock")


def _reporter(told: Told | None, name: str, store: TokenStore) -> ways.Told:
    if told is None:
        return ways.unheard
    ends = np.asarray(store.documents)["bytes"].cumsum()
    return lambda documents: told(name, int(ends[documents - 1]), int(ends[-1]))


def _write(place: Path, found: tuple[np.ndarray, dict[str, Any]]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, chosen=found[0], told=np.array(json.dumps(found[1])))
    write_atomically(place, buffer.getvalue())


def _write_array(place: Path, values: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, values)
    write_atomically(place, buffer.getvalue())


def _read(place: Path) -> tuple[np.ndarray, dict[str, Any]]:
    with np.load(place, allow_pickle=False) as stored:
        return stored["chosen"], json.loads(str(stored["told"]))
