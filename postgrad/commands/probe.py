"""Probe every layer of a frozen model for labels: a linear classifier on the features of each layer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from postgrad.commands.results import Result
from postgrad.config import stage as s
from postgrad.config.objectives import ClassifyObjective
from postgrad.data.layouts.rows import IGNORED
from postgrad.data.problem_type import ProblemType
from postgrad.data.read.documents import detect_kind
from postgrad.data.read.files import RawSource
from postgrad.data.read.labels import Labels
from postgrad.data.tokens.held_out_split import held_out_mask
from postgrad.data.tokens.source_files import read_all_labels
from postgrad.data.tokens.store import TokenStore
from postgrad.data.tokens.tokenize import build_store
from postgrad.errors import DataError, ModelError, StageError, require_choice
from postgrad.evaluation.classification_metrics import MetricEstimate, compare_metrics, compute_metrics, main_metric
from postgrad.evaluation.held_out import HeldOutRows
from postgrad.evaluation.layer_features import ComputeStates, layer_features
from postgrad.evaluation.linear_probe import (
    BATCH_ITEMS,
    STRENGTHS,
    ProbeData,
    ProbeResult,
    View,
    metric_inputs,
    train_probes,
)
from postgrad.hardware import machine
from postgrad.lineage.record import Interval
from postgrad.models.auto_classes import load_config
from postgrad.models.location import ModelLocation, locate_model
from postgrad.models.model_sizes import get_model_sizes
from postgrad.models.pretrained import ClassifierSpec, load_pretrained, load_tokenizer
from postgrad.models.task import Task
from postgrad.models.task_head import Pooling, TaskHeadConfig
from postgrad.models.task_head_model import compute_hidden_states, is_decoder
from postgrad.plan.held_out_documents import HeldOutDocuments
from postgrad.plan.held_out_sets import make_held_out_set
from postgrad.plan.model_inputs import ModelInputs, make_encoder, make_model_inputs
from postgrad.plan.row_renderers import RowTemplate, make_renderer
from postgrad.plan.sources import make_text_files
from postgrad.storage.cache_folder import cache_folder
from postgrad.storage.fingerprint import fingerprint
from postgrad.tuning.open_model import open_model, start_fingerprint

_DEFAULT_CONTEXT = 512
_NO_TOKEN_LIMIT = 1 << 40
_DEV_SHARE = 0.1
_MIN_THREADED_PRODUCT = 1 << 20
"""Multiplications of a product from which a second thread pays off (two cores: .8 x at half as many, 1.4 x at twice)."""
Progress = Callable[[str, int, int], None]
"""Is called with what is computed, how much of it is done, and the total."""


def _no_progress(activity: str, done: int, total: int) -> None:
    pass


Stack = Literal["encoder", "decoder"] | None


@dataclass(frozen=True)
class _PartRows:
    """A file as rows of the task, and how many of its words exceed the context."""

    held_out: HeldOutRows
    skipped_words: int


@dataclass(frozen=True)
class FrozenFeatures:
    """The features of every layer of a model for the items of `train`, `dev` and `test`."""

    items: dict[str, ProbeData]
    documents: dict[str, int]
    kind: str
    labels: tuple[str, ...]
    problem: ProblemType
    pooling: Pooling | None
    stack: Stack
    context: int
    seconds: float
    notes: tuple[str, ...]

    @property
    def state_count(self) -> int:
        """Layers, and the embeddings."""
        return self.items["train"].states_SID.shape[0]

    @property
    def width(self) -> int:
        """Features of a layer."""
        return self.items["train"].states_SID.shape[2]

    @property
    def output_count(self) -> int:
        """Outputs of a classifier of these items."""
        return max(len(self.labels), 1)


@dataclass(frozen=True)
class LayerView(Result):
    """A linear classifier on one layer, or on several layers joined."""

    name: str
    kind: str
    """`state` (one layer), `sum`, `concat` or `mix`."""
    states: tuple[int, ...]
    """The layers that it reads; 0 is the embeddings."""
    strength: float
    """Its L2 penalty, chosen on `dev`."""
    dev: float
    """Its score on `dev`."""
    metrics: Mapping[str, Interval]
    """Its metrics on `test`."""
    against_last: Mapping[str, Interval] = field(default_factory=dict)
    """The change of each metric from the last layer; empty for the last layer itself."""
    shares: tuple[float, ...] = ()
    """Of a mix: the weight of each layer."""


@dataclass(frozen=True)
class ProbeSeconds(Result):
    """Time spent, in seconds."""

    features: float
    classifiers: float


@dataclass(frozen=True)
class LayerProbe(Result):
    """What each layer of a model encodes about the labels."""

    model: str
    train: str
    test: str
    kind: str
    """The kind of rows: `labelled` or `tagged`."""
    problem: ProblemType
    labels: tuple[str, ...]
    pooling: Pooling | None
    stack: Stack
    context: int
    """Tokens that the model reads at once."""
    items: Mapping[str, int]
    """Texts or words of each part: train, dev, test."""
    documents: Mapping[str, int]
    layers: int
    width: int
    """Features of a layer."""
    metric: str
    """The metric by which views are chosen."""
    strengths: tuple[float, ...]
    """The L2 penalties that were tried."""
    views: tuple[LayerView, ...]
    guess: Mapping[str, Interval]
    """The metrics of the most frequent label (or the mean) of `train`."""
    seconds: ProbeSeconds
    notes: tuple[str, ...]

    @property
    def best(self) -> LayerView:
        """The view with the best score on `dev`."""
        return max(self.views, key=lambda view: -view.dev if self.problem == ProblemType.NUMBER else view.dev)


def compute_frozen_features(
    model: str,
    train: str,
    test: str,
    *,
    dev: str | None = None,
    kind: str = "auto",
    pooling: str = "auto",
    stack: str = "auto",
    context: int | None = None,
    base: str | None = None,
    cache: Path | None = None,
    progress: Progress = _no_progress,
) -> FrozenFeatures:
    """Every layer's features of three files (`dev` defaults to a tenth of `train`), from the cache or one forward pass.

    Raises `DataError` for a label missing from `train` (with its file and line), `StageError` for options that do not apply to
    the rows or the model.
    """
    cache = cache or cache_folder()
    start = locate_model(model, Path.cwd(), base)
    config: Any = load_config(start.name_or_path)
    files = {"train": _source("train", train, kind), "test": _source("test", test, kind)}
    files |= {"dev": _source("dev", dev, kind)} if dev else {}
    task = Task.TAG if files["train"].kind == "tagged" else Task.CLASSIFY
    half, pooling_kind = _resolve_pooling(config, task, pooling, stack)
    labels = read_all_labels([files["train"]], cache)
    problem = labels.problem
    model_inputs = _make_model_inputs(start, config, task, context)
    notes: list[str] = []
    rows = _build_rows(files, model_inputs, labels, problem, cache, notes)
    states, device = _backbone(start, task, half, pooling_kind, model_inputs)
    identity = start_fingerprint(start) or start.name
    begin = time.perf_counter()
    items: dict[str, ProbeData] = {}
    width = int(config.get_text_config().hidden_size)
    with _use_threads((2048, width, 4 * width)):
        for part, part_rows in rows.items():
            key = fingerprint([identity, *part_rows.held_out.identity, pooling_kind, half])
            features = layer_features(
                states,
                part_rows.held_out.rows,
                cache / "features" / key,
                cache=cache,
                pooling=pooling_kind,
                pad=model_inputs.pad_id,
                device=device,
                progress=lambda done, total, part=part: progress(f"features of {part}", done, total),
            )
            items[part] = _make_items(features, part_rows.held_out, problem)
            if part_rows.skipped_words:
                notes.append(
                    f"{part}: {part_rows.skipped_words:,} words lie beyond {model_inputs.length:,} tokens and are skipped"
                )
    return FrozenFeatures(
        items,
        {part: len(part_rows.held_out) for part, part_rows in rows.items()},
        files["train"].kind,
        tuple(str(name) for name in labels.names),
        problem,
        pooling_kind,
        half,
        model_inputs.length,
        time.perf_counter() - begin,
        tuple(notes),
    )


def probe_layers(
    model: str,
    train: str,
    test: str,
    *,
    dev: str | None = None,
    kind: str = "auto",
    pooling: str = "auto",
    stack: str = "auto",
    context: int | None = None,
    base: str | None = None,
    views: list[View] | None = None,
    cache: Path | None = None,
    progress: Progress = _no_progress,
) -> LayerProbe:
    """Probe every layer of a model for the labels of `train`; penalties are chosen on `dev`, and `test` is scored once.

    `dev` defaults to a tenth of `train`. `kind`: auto, labelled or tagged. `pooling`: how the tokens of a text become one
    vector: auto, first, mean, max or last. `stack`: of an encoder-decoder, auto, encoder or decoder. `context`: tokens the
    model reads at once. Default: its own limit, up to 512. `views`: only these. Errors as for `compute_frozen_features`.
    """
    machine.tune_allocator()
    frozen = compute_frozen_features(
        str(model), str(train), str(test), dev=dev, kind=kind, pooling=pooling, stack=stack, context=context, base=base,
        cache=cache, progress=progress,
    )  # fmt: skip
    begin = time.perf_counter()
    with _use_threads((BATCH_ITEMS, frozen.width, frozen.output_count * len(STRENGTHS))):
        probes = train_probes(
            frozen.items["train"],
            frozen.items["dev"],
            frozen.items["test"],
            frozen.problem,
            frozen.output_count,
            names=frozen.labels,
            views=views,
            progress=lambda done, total: progress("classifiers", done, total),
        )
    seconds = ProbeSeconds(round(frozen.seconds, 2), round(time.perf_counter() - begin, 2))
    test_items, train_items = frozen.items["test"], frozen.items["train"]
    return LayerProbe(
        model=str(model),
        train=str(train),
        test=str(test),
        kind=frozen.kind,
        problem=frozen.problem,
        labels=frozen.labels,
        pooling=frozen.pooling,
        stack=frozen.stack,
        context=frozen.context,
        items={part: len(items) for part, items in frozen.items.items()},
        documents=frozen.documents,
        layers=frozen.state_count - 1,
        width=frozen.width,
        metric=main_metric(frozen.problem, frozen.labels)[0],
        strengths=tuple(STRENGTHS),
        views=_score_views(probes, test_items, frozen.state_count - 1, frozen.problem, frozen.labels),
        guess=_score_guess(test_items, train_items, frozen.problem, frozen.labels),
        seconds=seconds,
        notes=frozen.notes,
    )


@contextmanager
def _use_threads(product: tuple[int, int, int]) -> Iterator[None]:
    """Inside, torch uses as many threads as pay off for a matrix product of this size.

    They are not measured, as those of a run are, which records them: sums are rounded by the number of threads, and the same
    command gives the same figures.
    """
    before = torch.get_num_threads()
    cores = machine.environment_threads() or machine.core_count()
    torch.set_num_threads(cores if math.prod(product) >= _MIN_THREADED_PRODUCT else 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _source(part: str, path: str, kind: str) -> RawSource:
    """A file of labelled texts or tagged words."""
    require_choice("kind", kind, ("auto", "labelled", "tagged"), where="--kind")
    item = s.HeldOutFile.model_validate(s.expand_held_out_file(path))
    row_format = {**item.model_dump(), "hub": None}
    if kind == "auto":  # texts with labels look like text
        kind = detect_kind(make_text_files(part, row_format, Path.cwd(), part))
        kind = kind if kind == "tagged" else "labelled"
    return make_text_files(part, {**row_format, "kind": kind}, Path.cwd(), part)


def _resolve_pooling(config: Any, task: Task, pooling: str, stack: str) -> tuple[Stack, Pooling | None]:
    """The stack of the model that is probed, and how the tokens of a text become one vector."""
    require_choice("pooling", pooling, ("auto", *get_args(Pooling)), where="--pooling")
    require_choice("stack", stack, ("auto", "encoder", "decoder"), where="--stack")
    if stack != "auto" and not config.is_encoder_decoder:
        raise StageError(
            f"a {config.model_type} model has a single stack, so no {stack} can be chosen",
            where="--stack",
            expected="an encoder-decoder, or no --stack",
        )
    half: Stack = ("decoder" if stack == "decoder" else "encoder") if config.is_encoder_decoder else None
    if task == Task.TAG:
        if pooling != "auto":
            raise StageError(
                f"tags are predicted word by word, so `{pooling}` pooling does not apply",
                where="--pooling",
                expected="rows with one label for a text, or no --pooling",
            )
        return half, None
    causal = half == "decoder" or is_decoder(config)
    if pooling == "first" and causal:
        raise StageError(
            "the first token of a decoder attends only to itself",
            where="--pooling",
            expected="last, mean or max",
        )
    usual: Pooling = "mean" if half == "encoder" else "last" if causal else "first"
    return half, usual if pooling == "auto" else pooling  # type: ignore[return-value]


def _make_model_inputs(start: ModelLocation, config: Any, task: Task, context: int | None) -> ModelInputs:
    sizes = get_model_sizes(config)
    limit = sizes.positions
    if context is not None and (context < 2 or (limit and context > limit)):
        raise ModelError(
            f"a context of {context} does not fit {start.name}",
            where="--context",
            expected=f"2 to {limit}" if limit else "2 or more",
        )
    tokenizer = load_tokenizer(start.full_model)
    length = context or sizes.limit_context(_DEFAULT_CONTEXT)
    return make_model_inputs(task, start, tokenizer, make_encoder(tokenizer, sizes.vocab_size), length=length, seed=0)


def _build_rows(
    files: dict[str, RawSource],
    model_inputs: ModelInputs,
    labels: Labels,
    problem: ProblemType,
    cache: Path,
    notes: list[str],
) -> dict[str, _PartRows]:
    """The rows of each part; copies of test documents are removed from dev and train, and of dev documents from train."""
    objective = ClassifyObjective(kind="classify")
    renderer = make_renderer(objective, files["train"].kind, model_inputs, RowTemplate(), labels)
    stores = {
        name: build_store(source, model_inputs.encoder, cache, renderer=renderer) for name, source in files.items()
    }
    digests = {name: np.asarray(store.documents["digest"]) for name, store in stores.items()}
    chosen: dict[str, tuple[TokenStore, np.ndarray]] = {"test": (stores["test"], np.arange(len(stores["test"])))}
    if "dev" in stores:
        chosen["dev"] = stores["dev"], _exclude(digests["dev"], digests["test"])
        free = _exclude(digests["train"], np.concatenate([digests["test"], digests["dev"]]))
    else:
        rest = _exclude(digests["train"], digests["test"])
        is_dev = held_out_mask(digests["train"][rest], _DEV_SHARE)
        chosen["dev"], free = (stores["train"], rest[is_dev]), rest[~is_dev]
        notes.append(f"dev: {int(is_dev.sum()):,} documents of train, chosen by a hash of their content (no --dev)")
    chosen["train"] = stores["train"], free
    copies = len(stores["train"]) - len(_exclude(digests["train"], digests["test"]))
    if copies:
        notes.append(f"train: {copies:,} documents are skipped, as the test has copies of them")
    parts: dict[str, _PartRows] = {}
    for part in ("train", "dev", "test"):
        store, documents = chosen[part]
        if not len(documents):
            raise DataError(f"no document is left for `{part}`", where=part, expected="at least one document")
        held_out_documents = HeldOutDocuments(part, "learned", store, documents, objective, renderer)
        held_out = make_held_out_set(held_out_documents, model_inputs, _NO_TOKEN_LIMIT, [], problem=problem)
        assert isinstance(held_out, HeldOutRows)
        skipped_words = 0
        if problem == ProblemType.TAGS:
            words = sum(int(np.count_nonzero(np.asarray(store.marks(int(d))))) for d in documents)
            skipped_words = words - sum(row.label_count for row in held_out.rows)
        parts[part] = _PartRows(held_out, skipped_words)
    return parts


def _exclude(digests: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Indices of the documents that are not among the others."""
    return np.flatnonzero(~np.isin(digests, others))


def _backbone(
    start: ModelLocation, task: Task, half: Stack, pooling: Pooling | None, model_inputs: ModelInputs
) -> tuple[ComputeStates, torch.device]:
    """Computes all hidden states of a batch: the plain backbone, or the model of a start with its adapters."""
    device = machine.default_device()
    if start.base is None:
        form = TaskHeadConfig((0,), pooling=pooling, stack=half)
        layer = ClassifierSpec(("0", "1"), "single_label_classification", model_inputs.pad_id, 0, form)
        plain: Any = load_pretrained(start, task, layer=layer).model.to(device)  # type: ignore[bad-argument-type]
        return lambda inputs: plain.states(**inputs), device
    model: Any = open_model(start).model.to(device)  # type: ignore[bad-argument-type]
    body = model.base_model

    def states(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return compute_hidden_states(body, stack=half, **inputs)

    return states, device


def _make_items(states_SID: np.ndarray, rows: HeldOutRows, problem: ProblemType) -> ProbeData:
    if problem == ProblemType.TAGS:
        labels = [row.labels[row.labels != IGNORED] for row in rows.rows]
        return ProbeData(states_SID, np.concatenate(labels), np.repeat(rows.document_R, [len(part) for part in labels]))
    return ProbeData(states_SID, np.stack([row.labels for row in rows.rows]), rows.document_R)


def _score_views(
    probes: list[ProbeResult], test: ProbeData, last_layer: int, problem: ProblemType, names: tuple[str, ...]
) -> tuple[LayerView, ...]:
    """Every view with its metrics and its change from the last layer."""
    last = next((p for p in probes if p.view.kind == "state" and p.view.states[0] == last_layer), None)
    views = []
    for probe in probes:
        predictions_I, labels_I, item_I = metric_inputs(probe, test)
        changes: dict[str, MetricEstimate] = {}
        if last is not None and probe is not last:
            before_I = metric_inputs(last, test)[0]
            changes = compare_metrics(problem, before_I, predictions_I, labels_I, item_I, names)
        views.append(
            LayerView(
                probe.view.name,
                probe.view.kind,
                tuple(probe.view.states),
                probe.strength,
                probe.dev_score,
                _intervals(compute_metrics(problem, predictions_I, labels_I, item_I, names)),
                _intervals(changes),
                tuple(probe.share_S or ()),
            )
        )
    return tuple(views)


def _score_guess(
    test: ProbeData, train: ProbeData, problem: ProblemType, names: tuple[str, ...]
) -> Mapping[str, Interval]:
    """The metrics of the most frequent label of `train`, or of its mean."""
    if problem == ProblemType.NUMBER:
        guess = np.full(test.labels.shape, train.labels.mean())
    elif problem == ProblemType.MULTI_LABEL:
        guess = np.broadcast_to(train.labels.mean(0) > 0.5, test.labels.shape).astype(test.labels.dtype)
    else:
        guess = np.full(test.labels.shape, np.bincount(train.labels.astype(np.int64)).argmax())
    answer = ProbeResult(View("guess", "state", ()), 0.0, 0.0, guess)
    return _intervals(compute_metrics(problem, *metric_inputs(answer, test), names))


def _intervals(metrics: Mapping[str, MetricEstimate]) -> dict[str, Interval]:
    return {name: Interval(**entry) for name, entry in metrics.items()}
