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
    AnySelection,
    AnyTargetText,
    DsirSelection,
    DuplicatesSelection,
    PerplexitySelection,
)
from postgrad.config.renamed_keys import with_fingerprint_names
from postgrad.data.filter import data_selection as ways
from postgrad.data.read.documents import read_documents
from postgrad.data.read.files import RawSource as Files
from postgrad.data.tokens.store import TokenStore
from postgrad.data.tokens.tokenize import Encoder, file_lock, source_fingerprint
from postgrad.errors import DataError, ModelError, StageError
from postgrad.evaluation.held_out import HeldOutText
from postgrad.evaluation.perplexity import score_held_out
from postgrad.hardware import machine
from postgrad.lineage.record import DocumentSelection
from postgrad.models.model import Model, wrap_model
from postgrad.models.pretrained import ModelLocation, load_tokenizer, locate_model
from postgrad.models.task import Task
from postgrad.plan.model_inputs import ModelInputs, make_encoder
from postgrad.storage.atomic import write_atomically
from postgrad.storage.fingerprint import fingerprint
from postgrad.tuning.open_model import get_task, open_model, start_fingerprint

_FORMAT = 2
_PREVIEW_DOCUMENTS = 3
"""Documents that are shown of those that are kept, and of those that are left out."""
_PREVIEW_CHARACTERS = 200
_BINS = 24
_SCORING_BATCH_TOKENS = 1 << 16
"""Tokens after which a model's judgement is written down."""
_DEFAULT_CONTEXT_LENGTH = 1024

ProgressCallback = Callable[[str, int, int], None]
"""Told what is done, bytes done and bytes in all."""


@dataclass(frozen=True)
class SelectionResult:
    """What a selection left of a source, and of each way what it did, as plain data."""

    store: TokenStore
    steps: tuple[DocumentSelection, ...] = ()


@dataclass(frozen=True)
class _MethodResult:
    """What one way found: the documents it keeps, a value of each document, and what is to be told."""

    kept_indices: np.ndarray
    scores_N: np.ndarray
    unit: str
    edges: tuple[float, float] | None = None
    duplicate_of_N: np.ndarray | None = None


def select_documents(
    store: TokenStore,
    methods: Sequence[AnySelection],
    files: Files,
    model_inputs: ModelInputs,
    cache: Path,
    *,
    seed: int,
    progress: ProgressCallback | None = None,
) -> SelectionResult:
    """The documents of a store that the ways `asked` leave, one after the other.

    Raises `DataError` for too little text or a way that leaves nothing, `StageError` for a model that cannot judge.
    """
    steps: list[DocumentSelection] = []
    for number, way in enumerate(methods):
        where = f"{files.where}.select[{number}]"
        before = store
        identity = _method_identity(way, files.root, where, model_inputs, cache, seed)
        key = fingerprint([_FORMAT, store.fingerprint, identity])
        place = cache / "selection" / f"{key}.npz"
        report = _make_reporter(progress, f"{files.name} (selecting by {way.kind})", store)
        with _lock_selection(cache, key):
            if not place.exists():
                _write_result(place, _apply_method(way, before, files, where, model_inputs, cache, key, seed, report))
        chosen, step = _read_result(place)
        store = before.select(chosen, key)
        short = f"; {step['unscored']:,} too short to be judged are left out" if step["unscored"] else ""
        description = describe_method(way) + short
        steps.append(DocumentSelection.model_validate({"kind": way.kind, "description": description, **step}))
    return SelectionResult(store, tuple(steps))


def describe_method(method: AnySelection) -> str:
    """What a way keeps, in words."""
    match method:
        case DsirSelection():
            return f"{_percent(method.keep)} of the documents, those most like {', '.join(each.path for each in method.target)}"
        case PerplexitySelection():
            low, high = method.quantiles
            who = "the start model" if method.model == "start" else method.model
            return f"{_percent(low)} to {_percent(high)} of the documents in the order of bits per byte of {who}"
        case DuplicatesSelection():
            return f"documents that share less than {_percent(method.threshold)} of their runs of five words with one before"
    assert_never(method)


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def describe_selection(steps: Sequence[dict[str, Any]]) -> str:
    """What is left of a source, in a line."""
    before, after = steps[0]["before"], steps[-1]["after"]
    kinds = ", then ".join(step["kind"] for step in steps)
    return (
        f"{after['documents']:,} of {before['documents']:,} documents are read, {after['tokens']:,} of "
        f"{before['tokens']:,} tokens (selected by {kinds})"
    )


def resolve_methods(
    methods: Sequence[AnySelection], start_model: ModelLocation, seed: int, root: Path
) -> list[dict[str, Any]]:
    """The ways as a later stage needs them, wherever it is: with the files, the model and the seed that were meant."""
    own = str(start_model.folder) if start_model.folder else start_model.name
    out = []
    for way in methods:
        given = way.model_dump(mode="json")
        if isinstance(way, PerplexitySelection) and way.model == "start":
            given["model"] = own
        elif isinstance(way, PerplexitySelection):
            here = (root / way.model).resolve()
            given["model"] = str(here) if here.is_dir() else way.model
        if isinstance(way, DsirSelection):
            given["seed"] = seed if way.seed is None else way.seed
            given["target"] = [{**each, "path": str(root / each["path"])} for each in given["target"]]
        out.append(given)
    return out


def _apply_method(
    method: AnySelection,
    store: TokenStore,
    files: Files,
    where: str,
    model_inputs: ModelInputs,
    cache: Path,
    key: str,
    seed: int,
    on_progress: ways.CountCallback,
) -> tuple[np.ndarray, dict[str, Any]]:
    """What a way keeps of a store, and what is to be told of it."""
    tokenizer = model_inputs.encoder.load()
    match method:
        case DsirSelection():
            found = _select_by_dsir(method, store, files.root, where, tokenizer, seed, on_progress)
        case PerplexitySelection():
            found = _select_by_perplexity(method, store, files.root, where, model_inputs, cache, key, on_progress)
        case DuplicatesSelection():
            copy_of_N = ways.find_near_duplicates(
                ways.decode_documents(store, tokenizer), method.threshold, on_progress
            )
            found = _MethodResult(
                np.flatnonzero(copy_of_N < 0), np.full(len(store), np.nan), "", duplicate_of_N=copy_of_N
            )
    if not len(found.kept_indices):
        raise DataError(
            f"nothing of the {len(store):,} documents of '{files.name}' is left: {describe_method(method)}",
            where=where,
            expected="a selection that keeps something",
            hint="keep more",
        )
    return found.kept_indices, _summarize_result(store, found, tokenizer)


# --- the ways -----------------------------------------------------------------------------------------


def _select_by_dsir(
    method: DsirSelection,
    store: TokenStore,
    root: Path,
    where: str,
    tokenizer: Tokenizer,
    seed: int,
    on_progress: ways.CountCallback,
) -> _MethodResult:
    count = ways.share_to_count(method.keep, len(store), f"{where}.keep")
    target_F = ways.target_counts(_read_target_texts(method, root, where, tokenizer), f"{where}.like")
    weights = ways.importance_weights(ways.decode_documents(store, tokenizer), target_F, on_progress)
    chosen = ways.resample(weights.log_weights_N, count, seed if method.seed is None else method.seed)
    return _MethodResult(chosen, weights.nats_per_ngram_N, "nats/n-gram")


def _read_target_texts(method: DsirSelection, root: Path, where: str, tokenizer: Tokenizer) -> Iterator[str]:
    """The texts that documents are to be like, as the tokenizer gives them back: what it loses is lost on both sides."""
    for number, given in enumerate(method.target):
        for document in read_documents(_make_target_files(given, root, f"{where}.target[{number}]")):
            if document.text is not None:
                ids = tokenizer.encode(document.text, add_special_tokens=False).ids
            else:
                ids = [] if document.ids is None else document.ids.tolist()
            yield tokenizer.decode(ids, skip_special_tokens=True)


def _make_target_files(target: AnyTargetText, root: Path, where: str) -> Files:
    only = {column: tuple(values) for column, values in target.filter.items()}
    return Files("like", target.path, None, target.columns, target.document_unit, root, where, target.kind, only)


def _select_by_perplexity(
    method: PerplexitySelection,
    store: TokenStore,
    root: Path,
    where: str,
    model_inputs: ModelInputs,
    cache: Path,
    key: str,
    on_progress: ways.CountCallback,
) -> _MethodResult:
    low, high = method.quantiles
    ways.require_documents(len(store), where)
    judge = _make_scorer(method, root, model_inputs, where)
    kept = cache / "selection" / f"{key}.part.npy"
    bits_N = compute_bits_per_byte(judge, store, model_inputs.encoder, method.max_tokens, kept, on_progress)
    band = ways.select_band(bits_N, low, high, where)
    kept.unlink(missing_ok=True)
    return _MethodResult(band.indices, bits_N, "bits/byte", (band.low, band.high))


@dataclass(frozen=True)
class PerplexityScorer:
    """A decoder that says how likely texts are, and how it reads them."""

    model: Model
    encoder: Encoder
    virtual_tokens: tuple[int, ...]
    context: int


def _make_scorer(method: PerplexitySelection, root: Path, model_inputs: ModelInputs, where: str) -> PerplexityScorer:
    start = _resolve_scoring_model(method, root, model_inputs, where)
    config: Any = AutoConfig.from_pretrained(start.name_or_path)
    own = method.model == "start"
    encoder = model_inputs.encoder if own else make_encoder(load_tokenizer(start.full_model), int(config.vocab_size))
    opened = open_model(start)
    limit = getattr(config, "max_position_embeddings", None) or _DEFAULT_CONTEXT_LENGTH
    return PerplexityScorer(
        wrap_model(opened.model, Task.CAUSAL).to(machine.default_device()),
        encoder,
        opened.frame.prefix_ids,
        min(limit, _DEFAULT_CONTEXT_LENGTH),
    )


def _resolve_scoring_model(
    method: PerplexitySelection, root: Path, model_inputs: ModelInputs, where: str
) -> ModelLocation:
    """The model that judges. Raises `StageError` when it does not say how likely a text is, `ModelError` when there is none."""
    try:
        start = model_inputs.start_model if method.model == "start" else locate_model(method.model, root)
    except ModelError as error:
        raise ModelError(error.problem, where=f"{where}.model", expected=error.expected, hint=error.hint) from None
    if start.scratch_recipe is not None:
        raise StageError(
            f"{start.name} is new: it knows nothing that documents could be judged by",
            where=f"{where}.model",
            expected="a trained decoder",
        )
    if get_task(start) != Task.CAUSAL:
        raise StageError(
            f"{start.name} does not say how likely a text is",
            where=f"{where}.model",
            expected="a decoder",
            hint="name one under `model`; its tokenizer may be another",
        )
    return start


def compute_bits_per_byte(
    scorer: PerplexityScorer,
    store: TokenStore,
    store_encoder: Encoder,
    tokens: int,
    partial_path: Path,
    on_progress: ways.CountCallback = ways.ignore_progress,
) -> np.ndarray:
    """Bits per byte of the first `tokens` tokens of every document, of shape (N,); NaN where there is nothing to predict.

    `own` is the encoder of the store. `kept` holds what was judged before, and grows.
    """
    done: list[float] = np.load(partial_path, allow_pickle=False).tolist() if partial_path.exists() else []
    tokenizer, writer = store_encoder.load(), scorer.encoder.load()
    alike = scorer.encoder.fingerprint == store_encoder.fingerprint
    table = np.asarray(store.documents)
    sizes = np.minimum(table["tokens"], tokens).cumsum()
    while len(done) < len(store):
        first = len(done)
        begun = int(sizes[first - 1]) if first else 0
        stop = max(first + 1, int(np.searchsorted(sizes, begun + _SCORING_BATCH_TOKENS)))
        documents: list[np.ndarray] = []
        bytes_N: list[int] = []
        for number in range(first, min(stop, len(store))):
            ids = store.read(number).astype(np.int64)
            ids, size = ids[:-1] if len(ids) and ids[-1] == store_encoder.eos else ids, int(table["bytes"][number])
            if not alike:
                text = tokenizer.decode(ids.tolist(), skip_special_tokens=True)
                lead = [] if scorer.encoder.bos is None else [scorer.encoder.bos]
                ids = np.array([*lead, *writer.encode(text, add_special_tokens=False).ids], np.int64)
                size = len(text.encode())
            if len(ids) > tokens:
                ids = ids[:tokens]
                size = len(writer.decode(ids.tolist(), skip_special_tokens=True).encode())
            documents.append(ids)
            bytes_N.append(size)
        held_out = HeldOutText(
            "selected",
            "learned",
            tuple(documents),
            np.array(bytes_N),
            "",
            virtual_tokens=scorer.virtual_tokens,
            bos=scorer.encoder.bos,
        )
        scores = score_held_out(scorer.model, held_out, context=scorer.context)
        nats_N = np.bincount(scores.document_W, scores.nats_W, len(documents))
        known_N = (np.array([len(ids) for ids in documents]) > 1) & (scores.bytes_N > 0)
        bits_N = np.where(known_N, nats_N / (np.log(2) * np.maximum(scores.bytes_N, 1)), np.nan)
        done += bits_N.tolist()
        _write_array(partial_path, np.array(done))
        on_progress(len(done))
    return np.array(done)


# --- what is told -------------------------------------------------------------------------------------


def _summarize_result(store: TokenStore, result: _MethodResult, tokenizer: Tokenizer) -> dict[str, Any]:
    """How much was there and is left, how the values lie, and a few documents of both."""
    table = np.asarray(store.documents)
    kept_N = np.zeros(len(store), bool)
    kept_N[result.kept_indices] = True
    parts = {
        name: _preview_documents(store, np.flatnonzero(of), result, tokenizer) for name, of in _kept_and_dropped(kept_N)
    }
    return {
        "before": {"documents": len(store), "tokens": store.tokens},
        "after": {"documents": len(result.kept_indices), "tokens": int(table["tokens"][result.kept_indices].sum())},
        "unit": result.unit,
        "score_bounds": list(result.edges) if result.edges else None,
        "unscored": int(np.isnan(result.scores_N).sum()) if result.unit else 0,
        "score_histogram": _compute_histogram(result.scores_N, kept_N),
        **parts,
    }


def _kept_and_dropped(kept_N: np.ndarray) -> tuple[tuple[str, np.ndarray], ...]:
    return (("kept", kept_N), ("dropped", ~kept_N))


def _preview_documents(
    store: TokenStore, document_indices: np.ndarray, result: _MethodResult, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """A few documents, spread evenly over their values (or their order, where they have none)."""
    if not len(document_indices):
        return []
    order = document_indices[np.argsort(result.scores_N[document_indices], kind="stable")]
    places = ((np.arange(_PREVIEW_DOCUMENTS) + 0.5) / _PREVIEW_DOCUMENTS * len(order)).astype(int)

    def text(number: int) -> str:
        whole = tokenizer.decode(store.read(number, 0, _PREVIEW_CHARACTERS).tolist(), skip_special_tokens=True)
        return " ".join(whole.split())[:_PREVIEW_CHARACTERS]

    out: list[dict[str, Any]] = []
    for number in dict.fromkeys(order[places].tolist()):
        value = float(result.scores_N[number])
        shown: dict[str, Any] = {"text": text(number), "value": None if np.isnan(value) else value}
        if result.duplicate_of_N is not None and result.duplicate_of_N[number] >= 0:
            shown["duplicate_of"] = text(int(result.duplicate_of_N[number]))
        out.append(shown)
    return out


def _compute_histogram(scores_N: np.ndarray, kept_N: np.ndarray) -> dict[str, list[float]] | None:
    """How many documents are kept and left out at which values; the outermost hundredths count to the last bins."""
    known = ~np.isnan(scores_N)
    if not known.any():
        return None
    low, high = np.quantile(scores_N[known], [0.01, 0.99])
    if low == high:
        return None
    edges = np.linspace(low, high, _BINS + 1)
    counts = {
        name: np.histogram(scores_N[of & known].clip(low, high), edges)[0].tolist()
        for name, of in _kept_and_dropped(kept_N)
    }
    return {"bin_edges": edges.tolist(), **counts}


# --- what is kept -------------------------------------------------------------------------------------


def _method_identity(
    method: AnySelection, root: Path, where: str, model_inputs: ModelInputs, cache: Path, seed: int
) -> list[Any]:
    """All that decides what a way keeps, beside the documents: never where something lies."""
    match method:
        case DsirSelection():
            named = [
                [
                    source_fingerprint(_make_target_files(given, root, f"{where}.target[{number}]"), cache),
                    with_fingerprint_names(given.model_dump(mode="json", exclude={"path"}), "data.sources.select.like"),
                ]
                for number, given in enumerate(method.target)
            ]
            return [method.kind, named, method.keep, seed if method.seed is None else method.seed]
        case PerplexitySelection():
            start = _resolve_scoring_model(method, root, model_inputs, where)
            return [method.kind, start_fingerprint(start) or start.name, list(method.quantiles), method.max_tokens]
        case DuplicatesSelection():
            return [method.kind, method.threshold]
    assert_never(method)


def _lock_selection(cache: Path, key: str) -> AbstractContextManager[bool]:
    (cache / "locks").mkdir(parents=True, exist_ok=True)
    return file_lock(cache / "locks" / f"{key}.lock")


def _make_reporter(progress: ProgressCallback | None, name: str, store: TokenStore) -> ways.CountCallback:
    if progress is None:
        return ways.ignore_progress
    ends = np.asarray(store.documents)["bytes"].cumsum()
    return lambda documents: progress(name, int(ends[documents - 1]), int(ends[-1]))


def _write_result(path: Path, result: tuple[np.ndarray, dict[str, Any]]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, chosen=result[0], told=np.array(json.dumps(result[1])))
    write_atomically(path, buffer.getvalue())


def _write_array(path: Path, values: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, values)
    write_atomically(path, buffer.getvalue())


def _read_result(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    with np.load(path, allow_pickle=False) as stored:
        return stored["chosen"], json.loads(str(stored["told"]))
