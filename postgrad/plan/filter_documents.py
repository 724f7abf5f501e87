"""Document filters of a source: DSIR, perplexity bands and near-duplicate removal, with cached results.

A result is a function of the source's tokens, the filters, and the texts and models that they compare with; it is cached under
the fingerprint of all of these. Perplexity scores, the only slow part, are saved as they grow, so a stopped run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never

import numpy as np
from tokenizers import Tokenizer

from postgrad.config.document_filters import (
    AnySelection,
    AnyTargetText,
    DsirSelection,
    DuplicatesSelection,
    PerplexitySelection,
)
from postgrad.config.renamed_keys import with_fingerprint_names
from postgrad.data.filter import data_selection
from postgrad.data.read.documents import read_documents
from postgrad.data.read.files import RawSource as Files
from postgrad.data.tokens.source_files import source_fingerprint
from postgrad.data.tokens.store import TokenStore
from postgrad.errors import DataError
from postgrad.lineage.record import DocumentSelection
from postgrad.models.location import ModelLocation
from postgrad.plan.model_inputs import ModelInputs
from postgrad.plan.perplexity_filter import compute_bits_per_byte, make_scorer, resolve_scoring_model
from postgrad.plan.selection_summary import FilterResult, describe_method, summarize_result
from postgrad.storage.array_files import read_cached_arrays, write_arrays
from postgrad.storage.file_lock import file_lock
from postgrad.storage.fingerprint import fingerprint
from postgrad.tuning.open_model import start_fingerprint

_FORMAT = 3

ProgressCallback = Callable[[str, int, int], None]
"""Called with a source's name, the bytes done and the bytes in all."""


@dataclass(frozen=True)
class SelectionResult:
    """The documents that all filters keep, and a summary of each filter."""

    store: TokenStore
    steps: tuple[DocumentSelection, ...] = ()


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
    """Apply the filters of a source one after the other.

    Raises `DataError` for too little text or a filter that keeps nothing, `StageError` for a model without a likelihood.
    """
    steps: list[DocumentSelection] = []
    for number, method in enumerate(methods):
        document_filter = _DocumentFilter(method, files, f"{files.where}.select[{number}]", model_inputs, cache, seed)
        key = fingerprint([_FORMAT, store.fingerprint, document_filter.identity()])
        path = cache / "selection" / f"{key}.npz"
        with file_lock(cache / "locks" / f"{key}.lock"):
            found = _read_result(path, key)
            if found is None:
                report = _make_reporter(progress, f"{files.name} (selecting by {method.kind})", store)
                found = document_filter.apply(store, key, report)
                arrays = {"kept_indices": found[0], "summary": np.array(json.dumps(found[1]))}
                write_arrays(path, arrays, key)
        document_indices, summary = found
        store = store.select(document_indices, key)
        unscored = f"; {summary['unscored']:,} too short to be scored are dropped" if summary["unscored"] else ""
        description = describe_method(method) + unscored
        steps.append(DocumentSelection.model_validate({"kind": method.kind, "description": description, **summary}))
    return SelectionResult(store, tuple(steps))


def resolve_methods(
    methods: Sequence[AnySelection], start_model: ModelLocation, seed: int, root: Path
) -> list[dict[str, Any]]:
    """The filters for a later stage in any folder, as plain data: with absolute paths, the model and the seed."""
    start_name = str(start_model.folder) if start_model.folder else start_model.name
    resolved = []
    for method in methods:
        config = method.model_dump(mode="json")
        if isinstance(method, PerplexitySelection) and method.model == "start":
            config["model"] = start_name
        elif isinstance(method, PerplexitySelection):
            folder = (root / method.model).resolve()
            config["model"] = str(folder) if folder.is_dir() else method.model
        if isinstance(method, DsirSelection):
            config["seed"] = seed if method.seed is None else method.seed
            config["target"] = [{**target, "path": str(root / target["path"])} for target in config["target"]]
        resolved.append(config)
    return resolved


@dataclass(frozen=True)
class _DocumentFilter:
    """A filter of a source with all that its result depends on, except the documents."""

    method: AnySelection
    files: Files
    where: str
    model_inputs: ModelInputs
    cache: Path
    seed: int

    def identity(self) -> list[Any]:
        """All that decides what the filter keeps, except the documents; no paths."""
        method = self.method
        match method:
            case DsirSelection():
                targets = [
                    [source_fingerprint(files, self.cache), _target_identity(target)]
                    for target, files in zip(method.target, self._target_files(method), strict=True)
                ]
                return [method.kind, targets, method.keep, self.seed if method.seed is None else method.seed]
            case PerplexitySelection():
                scoring_model = resolve_scoring_model(
                    method, self.files.root, self.model_inputs.start_model, self.where
                )
                identity = start_fingerprint(scoring_model) or scoring_model.name
                return [method.kind, identity, list(method.quantiles), method.max_tokens]
            case DuplicatesSelection():
                return [method.kind, method.threshold]
        assert_never(method)

    def apply(
        self, store: TokenStore, key: str, on_progress: data_selection.CountCallback
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """The indices of the documents that the filter keeps, and the summary."""
        tokenizer = self.model_inputs.encoder.load()
        match self.method:
            case DsirSelection():
                result = self._apply_dsir(self.method, store, tokenizer, on_progress)
            case PerplexitySelection():
                result = self._apply_perplexity(self.method, store, key, on_progress)
            case DuplicatesSelection():
                texts = data_selection.decode_documents(store, tokenizer)
                copy_of_N = data_selection.find_near_duplicates(texts, self.method.threshold, on_progress)
                result = FilterResult(
                    np.flatnonzero(copy_of_N < 0), np.full(len(store), np.nan), "", duplicate_of_N=copy_of_N
                )
        if not len(result.kept_indices):
            raise DataError(
                f"none of the {len(store):,} documents of '{self.files.name}' is kept: {describe_method(self.method)}",
                where=self.where,
                expected="a filter that keeps some documents",
                hint="keep more",
            )
        return result.kept_indices, summarize_result(store, result, tokenizer)

    def _apply_dsir(
        self, method: DsirSelection, store: TokenStore, tokenizer: Tokenizer, on_progress: data_selection.CountCallback
    ) -> FilterResult:
        count = data_selection.share_to_count(method.keep, len(store), f"{self.where}.keep")
        target_F = data_selection.target_counts(self._target_texts(method, tokenizer), f"{self.where}.target")
        texts = data_selection.decode_documents(store, tokenizer)
        weights = data_selection.importance_weights(texts, target_F, on_progress)
        seed = self.seed if method.seed is None else method.seed
        kept_indices = data_selection.resample(weights.log_weights_N, count, seed)
        return FilterResult(kept_indices, weights.nats_per_ngram_N, "nats/n-gram")

    def _apply_perplexity(
        self, method: PerplexitySelection, store: TokenStore, key: str, on_progress: data_selection.CountCallback
    ) -> FilterResult:
        data_selection.require_documents(len(store), self.where)
        scorer = make_scorer(method, self.files.root, self.model_inputs, self.where)
        partial_path = self.cache / "selection" / f"{key}.part.npz"
        bits_N = compute_bits_per_byte(
            scorer, store, self.model_inputs.encoder, method.max_tokens, partial_path, on_progress
        )
        band = data_selection.select_band(bits_N, *method.quantiles, self.where)
        partial_path.unlink(missing_ok=True)
        return FilterResult(band.indices, bits_N, "bits/byte", (band.low, band.high))

    def _target_files(self, method: DsirSelection) -> list[Files]:
        return [
            _make_target_files(target, self.files.root, f"{self.where}.target[{number}]")
            for number, target in enumerate(method.target)
        ]

    def _target_texts(self, method: DsirSelection, tokenizer: Tokenizer) -> Iterator[str]:
        """The target texts after a round trip through the tokenizer, as the source's documents have made one."""
        for files in self._target_files(method):
            for document in read_documents(files):
                if document.text is not None:
                    ids = tokenizer.encode(document.text, add_special_tokens=False).ids
                else:
                    ids = [] if document.ids is None else document.ids.tolist()
                yield tokenizer.decode(ids, skip_special_tokens=True)


def _target_identity(target: AnyTargetText) -> dict[str, Any]:
    """What a target text adds to a filter's identity besides its files."""
    return with_fingerprint_names(target.model_dump(mode="json", exclude={"path"}), "data.sources.select.like")


def _make_target_files(target: AnyTargetText, root: Path, where: str) -> Files:
    only = {column: tuple(values) for column, values in target.filter.items()}
    return Files("like", target.path, None, target.columns, target.document_unit, root, where, target.kind, only)


def _make_reporter(progress: ProgressCallback | None, name: str, store: TokenStore) -> data_selection.CountCallback:
    if progress is None:
        return data_selection.ignore_progress
    ends = np.asarray(store.documents)["bytes"].cumsum()
    return lambda documents: progress(name, int(ends[documents - 1]), int(ends[-1]))


def _read_result(path: Path, key: str) -> tuple[np.ndarray, dict[str, Any]] | None:
    arrays = read_cached_arrays(path, key)
    return None if arrays is None else (arrays["kept_indices"], json.loads(str(arrays["summary"])))
