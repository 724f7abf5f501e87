"""Summaries of document filters: how much a filter keeps, a histogram of the scores, and some documents of both sides.

Legend: N documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, assert_never

import numpy as np
from tokenizers import Tokenizer

from postgrad.config.document_filters import AnySelection, DsirSelection, DuplicatesSelection, PerplexitySelection
from postgrad.data.tokens.store import TokenStore
from postgrad.lineage.record import DocumentSelection

_PREVIEW_DOCUMENTS = 3
"""Documents to show of those that are kept, and of those that are dropped."""
_PREVIEW_CHARACTERS = 200
_BINS = 24


@dataclass(frozen=True)
class FilterResult:
    """The documents that a filter keeps, and the score of every document."""

    kept_indices: np.ndarray
    scores_N: np.ndarray
    unit: str
    edges: tuple[float, float] | None = None
    """The lowest and the highest score that is kept."""
    duplicate_of_N: np.ndarray | None = None
    """For each near-duplicate the document that it copies; -1 for all others."""


def describe_method(method: AnySelection) -> str:
    """What a filter keeps, in words."""
    match method:
        case DsirSelection():
            targets = ", ".join(target.path for target in method.target)
            return f"the {_percent(method.keep)} of documents most similar to {targets}"
        case PerplexitySelection():
            low, high = method.quantiles
            model = "the start model" if method.model == "start" else method.model
            return (
                f"documents between the {_percent(low)} and {_percent(high)} quantiles of bits per byte under {model}"
            )
        case DuplicatesSelection():
            return (
                f"documents that share less than {_percent(method.threshold)} of their word 5-grams with an earlier one"
            )
    assert_never(method)


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def describe_selection(steps: Sequence[DocumentSelection]) -> str:
    """How much of a source its filters keep, in a line."""
    before, after = steps[0].before, steps[-1].after
    kinds = ", then ".join(step.kind for step in steps)
    return (
        f"{after.documents:,} of {before.documents:,} documents and {after.tokens:,} of "
        f"{before.tokens:,} tokens are kept (filtered by {kinds})"
    )


def summarize_result(store: TokenStore, result: FilterResult, tokenizer: Tokenizer) -> dict[str, Any]:
    """Documents and tokens before and after a filter, a histogram of scores, and some documents of both sides."""
    table = np.asarray(store.documents)
    kept_N = np.zeros(len(store), bool)
    kept_N[result.kept_indices] = True
    previews = {
        name: _preview_documents(store, np.flatnonzero(side_N), result, tokenizer)
        for name, side_N in _kept_and_dropped(kept_N)
    }
    return {
        "before": {"documents": len(store), "tokens": store.tokens},
        "after": {"documents": len(result.kept_indices), "tokens": int(table["tokens"][result.kept_indices].sum())},
        "unit": result.unit,
        "score_bounds": list(result.edges) if result.edges else None,
        "unscored": int(np.isnan(result.scores_N).sum()) if result.unit else 0,
        "score_histogram": _compute_histogram(result.scores_N, kept_N),
        **previews,
    }


def _kept_and_dropped(kept_N: np.ndarray) -> tuple[tuple[str, np.ndarray], ...]:
    return (("kept", kept_N), ("dropped", ~kept_N))


def _preview_documents(
    store: TokenStore, document_indices: np.ndarray, result: FilterResult, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """A few documents, spread evenly over their scores (or over their order, without scores)."""
    if not len(document_indices):
        return []
    order = document_indices[np.argsort(result.scores_N[document_indices], kind="stable")]
    ranks = ((np.arange(_PREVIEW_DOCUMENTS) + 0.5) / _PREVIEW_DOCUMENTS * len(order)).astype(int)

    def text(number: int) -> str:
        whole = tokenizer.decode(store.read(number, 0, _PREVIEW_CHARACTERS).tolist(), skip_special_tokens=True)
        return " ".join(whole.split())[:_PREVIEW_CHARACTERS]

    previews: list[dict[str, Any]] = []
    for number in dict.fromkeys(order[ranks].tolist()):
        score = float(result.scores_N[number])
        preview: dict[str, Any] = {"text": text(number), "value": None if np.isnan(score) else score}
        if result.duplicate_of_N is not None and result.duplicate_of_N[number] >= 0:
            preview["duplicate_of"] = text(int(result.duplicate_of_N[number]))
        previews.append(preview)
    return previews


def _compute_histogram(scores_N: np.ndarray, kept_N: np.ndarray) -> dict[str, list[float]] | None:
    """Kept and dropped documents by score; the lowest and highest 1 % count to the outermost bins."""
    scored_N = ~np.isnan(scores_N)
    if not scored_N.any():
        return None
    low, high = np.quantile(scores_N[scored_N], [0.01, 0.99])
    if low == high:
        return None
    edges = np.linspace(low, high, _BINS + 1)
    counts = {
        name: np.histogram(scores_N[side_N & scored_N].clip(low, high), edges)[0].tolist()
        for name, side_N in _kept_and_dropped(kept_N)
    }
    return {"bin_edges": edges.tolist(), **counts}
