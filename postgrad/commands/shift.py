"""Measure how far new text is from a model's old text, and propose replay, learning rate, warm-up and vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from postgrad.analysis import domain_shift
from postgrad.analysis.domain_shift import Fertility, ShiftEstimate
from postgrad.analysis.shift_advice import Proposal, ShiftStrength, make_proposals, shift_strength
from postgrad.commands.results import Result
from postgrad.commands.score_files import context_length, load_file_sets, score_model
from postgrad.data.read.documents import read_documents
from postgrad.data.read.files import RawSource as Files
from postgrad.errors import DataError
from postgrad.evaluation.perplexity import Scores
from postgrad.hardware import machine
from postgrad.models.auto_classes import load_config
from postgrad.models.families import count_weights
from postgrad.models.location import locate_model
from postgrad.models.pretrained import load_tokenizer
from postgrad.stats.bootstrap import ratio_interval
from postgrad.storage.cache_folder import cache_folder

_MAX_DOCUMENTS = 20_000
_MAX_SCORED_TOKENS = 100_000
"""Tokens of each text that the model scores."""


@dataclass(frozen=True)
class _Corpus:
    """One of the two texts."""

    name: str
    documents: list[str]
    passages: domain_shift.Passages
    files: list[str]


@dataclass(frozen=True)
class CorpusSummary(Result):
    """How a model and its tokenizer fare on one of the two texts."""

    files: tuple[str, ...]
    passages: int
    """Passages of 100 words."""
    fertility: Fertility
    bits: ShiftEstimate
    """The model's loss in bits per byte, with its 95 % interval."""
    tokens: int | None = None
    """Of the new text: about how many tokens it has."""

    def as_dict(self) -> dict[str, object]:
        """The result as plain data, with the fields of the fertility."""
        data = super().as_dict()
        del data["fertility"]
        return {**data, **asdict(self.fertility), "bits": self.bits.as_dict()}


@dataclass(frozen=True)
class MeasuredShift(Result):
    """How far new text is from old text, for a model."""

    model: str
    old: CorpusSummary
    new: CorpusSummary
    surprise: ShiftEstimate
    """New minus old loss in bits per byte."""
    distances: Mapping[str, ShiftEstimate]
    """Each distance with its 95 % interval, and `same`: its value between two samples of the old text."""
    strength: ShiftStrength
    """`none`, `weak` or `strong`."""
    proposals: tuple[Proposal, ...]
    """Settings to begin with, each with its reason and source."""

    def as_dict(self) -> dict[str, object]:
        """The result as plain data."""
        return {
            "model": self.model,
            "old": self.old.as_dict(),
            "new": self.new.as_dict(),
            "surprise": self.surprise.as_dict(),
            "distances": {name: estimate.as_dict() for name, estimate in self.distances.items()},
            "strength": self.strength,
            "proposals": [proposal.as_dict() for proposal in self.proposals],
        }


def measure_shift(
    model: str,
    old: Sequence[str],
    new: Sequence[str],
    *,
    base: str | None = None,
    context: int | None = None,
    cache: Path | None = None,
) -> MeasuredShift:
    """Measure how far `new` files are from `old` ones, for a model.

    `context`: tokens the model reads at once. Default: its own limit, up to 1,024. Raises `DataError` for too little text,
    and for old and new text that are the same.
    """
    machine.tune_allocator()
    cache = cache or cache_folder()
    start = locate_model(str(model), Path.cwd(), base)
    tokenizer = load_tokenizer(start)
    texts = _load_corpus("--old", list(map(str, old))), _load_corpus("--new", list(map(str, new)))
    domain_shift.refuse_same(*(text.documents for text in texts))
    unknown = [tokenizer.unk_token_id] if isinstance(tokenizer.unk_token_id, int) else []
    fertilities = [domain_shift.fertility(text.documents, _batch_encoder(tokenizer), unknown) for text in texts]
    distances = _measure_distances(texts, tokenizer)
    length = context_length(start, context)
    bits = [
        _bits_per_byte(
            list(
                score_model(
                    start,
                    load_file_sets(start, text.files, "auto", None, length, cache, limit=_MAX_SCORED_TOKENS).sets,
                    length,
                    cache,
                ).values()
            )
        )
        for text in texts
    ]
    trigrams, (old_bits, new_bits) = distances["byte trigrams"], (each.value for each in bits)
    strength = shift_strength(trigrams.value, trigrams.same or 0.0, new_bits / old_bits if old_bits > 0 else None)
    tokens = round(sum(len(d.encode()) for d in texts[1].documents) / fertilities[1].bytes_per_token)
    proposals = make_proposals(
        strength,
        tokens=tokens,
        old_bytes_per_token=fertilities[0].bytes_per_token,
        new_bytes_per_token=fertilities[1].bytes_per_token,
        unknown=fertilities[1].unknown - fertilities[0].unknown,
        parameters=count_weights(load_config(start.name_or_path)),
    )
    old_summary, new_summary = (
        CorpusSummary(tuple(text.files), len(text.passages.texts), fertility, own_bits, count)
        for text, fertility, own_bits, count in zip(texts, fertilities, bits, (None, tokens), strict=True)
    )
    return MeasuredShift(
        str(model), old_summary, new_summary, _difference(*bits), distances, strength, tuple(proposals)
    )


def _batch_encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], list[list[int]]]:
    def encode(texts: list[str]) -> list[list[int]]:
        return [e.ids for e in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    return encode


def _measure_distances(texts: tuple[_Corpus, _Corpus], tokenizer: PreTrainedTokenizerBase) -> dict[str, ShiftEstimate]:
    encode, vocab_size = _batch_encoder(tokenizer), len(tokenizer)
    ngrams = [domain_shift.ngram_counts(text.passages) for text in texts]
    return {
        "byte trigrams": domain_shift.js_divergence(*(domain_shift.byte_counts(text.passages) for text in texts)),
        "tokens": domain_shift.js_divergence(
            *(domain_shift.token_counts(text.passages, encode, vocab_size) for text in texts)
        ),
        "n-gram log-ratio": domain_shift.log_ratio(*ngrams),
        "told apart": domain_shift.classifier_auc(*ngrams),
    }


def _load_corpus(where: str, paths: Sequence[str]) -> _Corpus:
    documents = list(islice(_interleave_documents(where, paths), _MAX_DOCUMENTS))
    return _Corpus(where, documents, domain_shift.make_passages(documents, where), list(paths))


def _interleave_documents(where: str, paths: Sequence[str]) -> Iterator[str]:
    """Texts of all files in turn, so that a limit on documents treats the files alike."""
    streams = [
        (d.text for d in read_documents(Files(where, path, root=Path.cwd(), where=where)) if d.text and not d.is_empty)
        for path in paths
    ]
    while streams:
        for stream in list(streams):
            document = next(stream, None)
            if document is None:
                streams.remove(stream)
            else:
                yield document


def _bits_per_byte(scores: Sequence[Scores]) -> ShiftEstimate:
    """Bits per byte of all sets together, with its interval over documents."""
    if not scores:
        raise DataError("no text to score", where="shift")
    nats = np.concatenate([np.bincount(s.document_W, s.nats_W, len(s.bytes_N)) for s in scores]) / np.log(2)
    sizes = np.concatenate([s.bytes_N for s in scores]).astype(np.float64)
    low, high = ratio_interval(nats, sizes)
    return ShiftEstimate(float(nats.sum() / sizes.sum()), low, high)


def _difference(old: ShiftEstimate, new: ShiftEstimate) -> ShiftEstimate:
    """New minus old; the two are independent, so the half-widths add in quadrature."""
    value = new.value - old.value
    if old.low is None or old.high is None or new.low is None or new.high is None:
        return ShiftEstimate(value, None, None)
    low = value - float(np.hypot(new.value - new.low, old.high - old.value))
    high = value + float(np.hypot(new.high - new.value, old.value - old.low))
    return ShiftEstimate(value, low, high)
