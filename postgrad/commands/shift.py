"""How far is new text from what a model knows, and what does that ask for?"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from postgrad.analysis import domain_shift
from postgrad.analysis.domain_shift import ShiftEstimate
from postgrad.analysis.shift_advice import make_proposals, shift_strength
from postgrad.commands.evaluate import context_length, load_file_sets, score_model
from postgrad.data.read.documents import read_documents
from postgrad.data.read.files import RawSource as Files
from postgrad.errors import DataError, StageError
from postgrad.evaluation.perplexity import Scores
from postgrad.hardware import machine
from postgrad.models.pretrained import load_tokenizer, locate_model
from postgrad.reports.html import document as shell
from postgrad.reports.pages import shift_page
from postgrad.reports.results import ShiftResult
from postgrad.stats.forgetting import bootstrap

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


def measure_shift(
    model: str,
    old: Sequence[str],
    new: Sequence[str],
    *,
    base: str | None,
    context: int | None,
    report: Path | None,
    cache: Path,
) -> dict[str, Any]:
    """Measure how far `new` files are from `old` ones, for a model.

    Raises `DataError` for too little text, and for old and new text that are one and the same, `StageError` for a page that
    would be a folder.
    """
    if report and report.is_dir():
        raise StageError(f"{report} is a folder", where="--report", expected="a file for the page")
    machine.tune_allocator()
    start = locate_model(model, Path.cwd(), base)
    tokenizer = load_tokenizer(start)
    texts = [_load_corpus("--old", old), _load_corpus("--new", new)]
    domain_shift.refuse_same(*(text.documents for text in texts))

    def encode(some: list[str]) -> list[list[int]]:
        return [found.ids for found in tokenizer.backend_tokenizer.encode_batch_fast(some, add_special_tokens=False)]

    vocabulary = len(tokenizer)
    grams = [domain_shift.ngram_counts(text.passages) for text in texts]
    unknown = [tokenizer.unk_token_id] if isinstance(tokenizer.unk_token_id, int) else []
    cuts = [domain_shift.fertility(text.documents, encode, unknown) for text in texts]
    distances = {
        "byte trigrams": domain_shift.js_divergence(*(domain_shift.byte_counts(text.passages) for text in texts)),
        "tokens": domain_shift.js_divergence(
            *(domain_shift.token_counts(text.passages, encode, vocabulary) for text in texts)
        ),
        "n-gram log-ratio": domain_shift.log_ratio(*grams),
        "told apart": domain_shift.classifier_auc(*grams),
    }
    used = context_length(start, context)
    scored = [
        score_model(
            start,
            load_file_sets(start, text.files, "auto", None, used, cache, limit=_MAX_SCORED_TOKENS).sets,
            used,
            cache,
        )
        for text in texts
    ]
    bits = [_bits_per_byte(list(found.values())) for found in scored]
    main = distances["byte trigrams"]
    strength = shift_strength(main.value, main.same or 0.0)
    tokens = round(sum(len(d.encode()) for d in texts[1].documents) / cuts[1].bytes_per_token)
    advised = make_proposals(
        strength,
        tokens=tokens,
        old_bytes_per_token=cuts[0].bytes_per_token,
        new_bytes_per_token=cuts[1].bytes_per_token,
        unknown=cuts[1].unknown - cuts[0].unknown,
    )
    found: dict[str, Any] = {
        "model": model,
        "old": {
            "files": list(old),
            "passages": len(texts[0].passages.texts),
            **asdict(cuts[0]),
            "bits": bits[0].as_dict(),
        },
        "new": {
            "files": list(new),
            "passages": len(texts[1].passages.texts),
            "tokens": tokens,
            **asdict(cuts[1]),
            "bits": bits[1].as_dict(),
        },
        "surprise": _difference(*bits).as_dict(),
        "distances": {name: estimate.as_dict() for name, estimate in distances.items()},
        "strength": strength,
        "proposals": [proposal.as_dict() for proposal in advised],
    }
    lines = _lines(found)
    if report:
        shell.write_page(report, shift_page.shift_page(ShiftResult.model_validate(found)))
        lines.append(f"report: {report}")
    lines.append(
        f"next: {shlex.join(['postgrad', 'init', 'stage', '--model', model, '--data', new[0], '--replay', old[0]])}"
    )
    return {"text": "\n".join(lines), **found}


def _load_corpus(where: str, paths: Sequence[str]) -> _Corpus:
    documents = list(islice(_interleave_documents(where, paths), _MAX_DOCUMENTS))
    return _Corpus(where, documents, domain_shift.make_passages(documents, where), list(paths))


def _interleave_documents(where: str, paths: Sequence[str]) -> Iterator[str]:
    """Texts of all files, turn by turn, so that each has its part when there are many."""
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
    """Bits per byte of all sets together, with its interval over documents (or windows, when those are few)."""
    if not scores:
        raise DataError("no text to score", where="shift")
    nats = np.concatenate([np.bincount(s.document_W, s.nats_W, len(s.bytes_N)) for s in scores]) / np.log(2)
    sizes = np.concatenate([s.bytes_N for s in scores]).astype(np.float64)
    low, high = bootstrap(nats, sizes)
    return ShiftEstimate(float(nats.sum() / sizes.sum()), low, high)


def _difference(old: ShiftEstimate, new: ShiftEstimate) -> ShiftEstimate:
    """New minus old; the two are drawn apart, so the half-widths add as variances do."""
    value = new.value - old.value
    low = value - float(np.hypot(new.value - new.low, old.high - old.value))
    high = value + float(np.hypot(new.high - new.value, old.value - old.low))
    return ShiftEstimate(value, low, high)


_DISTANCE_TITLES = {
    "byte trigrams": "divergence of byte trigrams, bits",
    "tokens": "divergence of tokens, bits",
    "n-gram log-ratio": "log-ratio of n-grams, nats",
    "told apart": "passages told apart, AUC",
}


def _lines(result: dict[str, Any]) -> list[str]:
    old, new = result["old"], result["new"]
    lines = [
        f"{result['model']}: the shift from old to new text is {result['strength']}",
        f"  {'':<36} {'value':>8} {'95 % interval':>19} {'no shift':>9}",
    ]
    for name, entry in result["distances"].items():
        lines.append(
            f"  {_DISTANCE_TITLES[name]:<36} {entry['value']:>8.3f} {_interval(entry):>19} {entry['same']:>9.3f}"
        )
    lines += [
        "",
        f"  {'':<36} {'old':>8} {'new':>8}",
        f"  {'bits per byte of the model':<36} {old['bits']['value']:>8.3f} {new['bits']['value']:>8.3f}   "
        f"new - old {result['surprise']['value']:+.3f} ({result['surprise']['low']:+.3f} to {result['surprise']['high']:+.3f})",
        f"  {'bytes per token':<36} {old['bytes_per_token']:>8.2f} {new['bytes_per_token']:>8.2f}",
        f"  {'tokens per word':<36} {old['tokens_per_word']:>8.2f} {new['tokens_per_word']:>8.2f}",
        f"  {'unknown tokens':<36} {old['unknown']:>8.2%} {new['unknown']:>8.2%}",
        "",
        "to begin with:",
    ]
    for proposal in result["proposals"]:
        lines.append(f"  {proposal['what']}: {proposal['value']}")
        lines.append(f"    {proposal['reason']} ({proposal['source']})")
    return lines


def _interval(entry: dict[str, Any]) -> str:
    return f"{entry['low']:.3f} to {entry['high']:.3f}"
