"""Bits per byte of documents under a decoder, for the perplexity filter.

Legend: N documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from postgrad.config.document_filters import PerplexitySelection
from postgrad.data.filter.data_selection import CountCallback, ignore_progress
from postgrad.data.render.frame import TextPrefix
from postgrad.data.tokens.encoder import Encoder
from postgrad.data.tokens.store import TokenStore
from postgrad.errors import ModelError, StageError
from postgrad.evaluation.held_out import HeldOutText
from postgrad.evaluation.perplexity import score_held_out
from postgrad.hardware import machine
from postgrad.models.location import ModelLocation, locate_model
from postgrad.models.model import Model, wrap_model
from postgrad.models.model_sizes import load_model_sizes
from postgrad.models.pretrained import load_tokenizer
from postgrad.models.task import Task
from postgrad.plan.model_inputs import ModelInputs, make_encoder
from postgrad.storage.array_files import read_cached_arrays, write_arrays
from postgrad.tuning.open_model import get_task, open_model

_SCORING_BATCH_TOKENS = 1 << 16
"""Tokens after which the scores are saved."""
_DEFAULT_CONTEXT_LENGTH = 1024


@dataclass(frozen=True)
class PerplexityScorer:
    """A decoder that scores documents, and how it reads them."""

    model: Model
    encoder: Encoder
    prefix: TextPrefix
    context: int


def make_scorer(method: PerplexitySelection, root: Path, model_inputs: ModelInputs, where: str) -> PerplexityScorer:
    """Load the scoring model onto the default device."""
    location = resolve_scoring_model(method, root, model_inputs.start_model, where)
    sizes = load_model_sizes(location)
    if method.model == "start":
        encoder = model_inputs.encoder
    else:
        encoder = make_encoder(load_tokenizer(location.full_model), sizes.vocab_size)
    opened = open_model(location)
    return PerplexityScorer(
        wrap_model(opened.model, Task.CAUSAL).to(machine.default_device()),
        encoder,
        TextPrefix(opened.frame.outer_ids, encoder.prefix_ids, opened.frame.prefix_ids),
        sizes.limit_context(_DEFAULT_CONTEXT_LENGTH),
    )


def resolve_scoring_model(
    method: PerplexitySelection, root: Path, start_model: ModelLocation, where: str
) -> ModelLocation:
    """The scoring model. Raises `StageError` unless it is a trained decoder, `ModelError` for a model that is missing."""
    where = f"{where}.model"
    try:
        location = start_model if method.model == "start" else locate_model(method.model, root)
    except ModelError as error:
        raise ModelError(error.problem, where=where, expected=error.expected, hint=error.hint) from None
    if location.scratch_recipe is not None:
        raise StageError(
            f"{location.name} is randomly initialized, so perplexity filtering is meaningless",
            where=where,
            expected="a trained decoder",
        )
    if get_task(location) != Task.CAUSAL:
        raise StageError(
            f"{location.name} is not a decoder, so it has no perplexity",
            where=where,
            expected="a decoder",
            hint="name one under `model`; its tokenizer may differ",
        )
    return location


def compute_bits_per_byte(
    scorer: PerplexityScorer,
    store: TokenStore,
    store_encoder: Encoder,
    tokens: int,
    partial_path: Path,
    on_progress: CountCallback = ignore_progress,
) -> np.ndarray:
    """Bits per byte of the first `tokens` tokens of every document, of shape (N,); NaN where there is nothing to predict.

    `store_encoder` wrote the store. `partial_path` holds the scores so far, and grows.
    """
    bits: list[float] = list((read_cached_arrays(partial_path, partial_path.name) or {}).get("bits", ()))
    ends = np.minimum(np.asarray(store.documents)["tokens"], tokens).cumsum()
    while len(bits) < len(store):
        first = len(bits)
        tokens_before = int(ends[first - 1]) if first else 0
        stop = max(first + 1, int(np.searchsorted(ends, tokens_before + _SCORING_BATCH_TOKENS)))
        numbers = range(first, min(stop, len(store)))
        documents, sizes = zip(
            *(_read_document(store, number, store_encoder, scorer.encoder, tokens) for number in numbers), strict=True
        )
        bits += _score_documents(scorer, documents, np.array(sizes)).tolist()
        write_arrays(partial_path, {"bits": np.array(bits)}, partial_path.name)
        on_progress(len(bits))
    return np.array(bits)


def _read_document(
    store: TokenStore, number: int, store_encoder: Encoder, encoder: Encoder, tokens: int
) -> tuple[np.ndarray, int]:
    """The first `tokens` ids of a document under the scorer's tokenizer, without an EOS, and their size in bytes."""
    ids = store.read(number).astype(np.int64)
    ids = ids[:-1] if len(ids) and ids[-1] == store_encoder.eos else ids
    size = int(store.documents["bytes"][number])
    if encoder.fingerprint != store_encoder.fingerprint:
        text = store_encoder.load().decode(ids.tolist(), skip_special_tokens=True)
        ids = np.array([*encoder.prefix_ids, *encoder.load().encode(text, add_special_tokens=False).ids], np.int64)
        size = len(text.encode())
    if len(ids) > tokens:
        ids = ids[:tokens]
        size = len(encoder.load().decode(ids.tolist(), skip_special_tokens=True).encode())
    return ids, size


def _score_documents(scorer: PerplexityScorer, documents: tuple[np.ndarray, ...], bytes_N: np.ndarray) -> np.ndarray:
    """Bits per byte of each document."""
    held_out = HeldOutText(
        "selected",
        "learned",
        documents,
        bytes_N,
        "",
        prefix=scorer.prefix,
    )
    scores = score_held_out(scorer.model, held_out, context=scorer.context)
    nats_N = np.bincount(scores.document_W, scores.nats_W, len(documents))
    is_scored_N = (np.array([len(ids) for ids in documents]) > 1) & (scores.bytes_N > 0)
    return np.where(is_scored_N, nats_N / (np.log(2) * np.maximum(scores.bytes_N, 1)), np.nan)
