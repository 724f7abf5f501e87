"""Which layer of a model knows what a task asks for? Frozen features of all layers, and a linear classifier on each."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from postgrad.config import stage as s
from postgrad.config.objectives import ClassifyObjective
from postgrad.data.layouts.rows import IGNORED
from postgrad.data.problem_type import ProblemType
from postgrad.data.read.documents import detect_kind
from postgrad.data.read.files import RawSource
from postgrad.data.read.labels import Labels
from postgrad.data.tokens.held_out_split import held_out_mask
from postgrad.data.tokens.store import TokenStore
from postgrad.data.tokens.tokenize import build_store, read_all_labels
from postgrad.errors import DataError, ModelError, StageError, suggest_nearest
from postgrad.evaluation.classification_metrics import compare_metrics, compute_metrics
from postgrad.evaluation.held_out import HeldOutRows
from postgrad.evaluation.layer_features import ComputeStates, layer_features
from postgrad.evaluation.linear_probe import (
    BATCH_ITEMS,
    STRENGTHS,
    ProbeData,
    ProbeResult,
    View,
    main_metric,
    metric_inputs,
    train_probes,
)
from postgrad.hardware import machine
from postgrad.hardware.execution import choose_threads
from postgrad.models.pretrained import ClassifierSpec, ModelLocation, load_pretrained, load_tokenizer, locate_model
from postgrad.models.task import Task
from postgrad.models.task_head import Pooling, TaskHeadConfig, compute_hidden_states, is_decoder
from postgrad.plan.held_out_sets import HeldOutDocuments, make_held_out_set
from postgrad.plan.model_inputs import ModelInputs, make_encoder, make_model_inputs
from postgrad.plan.objective_rows import RowTemplate, make_renderer
from postgrad.plan.sources import make_text_files
from postgrad.reports import results
from postgrad.reports.html import document
from postgrad.reports.pages import probe_page
from postgrad.storage.fingerprint import fingerprint
from postgrad.tuning.open_model import open_model, start_fingerprint

_DEFAULT_CONTEXT = 512
_NO_TOKEN_LIMIT = 1 << 40
_DEV_SHARE = 0.1
_PROGRESS_AFTER_SECONDS = 2.0
Stack = Literal["encoder", "decoder"] | None


@dataclass(frozen=True)
class _PartRows:
    """A file as rows of the task, and how many of its words no row has room for."""

    held_out: HeldOutRows
    skipped_words: int


@dataclass(frozen=True)
class FrozenFeatures:
    """The features of every layer of a model for the items of each part (`train`, `dev`, `test`), and what is to be told."""

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
        """How many states there are: the layers, and the embeddings."""
        return self.items["train"].states_SID.shape[0]

    @property
    def width(self) -> int:
        """Numbers of a state."""
        return self.items["train"].states_SID.shape[2]

    @property
    def output_count(self) -> int:
        """What a classifier of these items gives."""
        return max(len(self.labels), 1)


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
    cache: Path,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> FrozenFeatures:
    """Every layer's features of three files (without `dev`, that is a tenth of `train`), from the cache or one pass.

    Raises `DataError` for a label that `train` has not (with its file and line), `StageError` for options that have no
    meaning for the rows or the model.
    """
    start = locate_model(model, Path.cwd(), base)
    config: Any = AutoConfig.from_pretrained(start.name_or_path)
    files = {"train": _source("train", train, kind), "test": _source("test", test, kind)}
    files |= {"dev": _source("dev", dev, kind)} if dev else {}
    task = Task.TAG if files["train"].kind == "tagged" else Task.CLASSIFY
    half, pooled_by = _resolve_pooling(config, task, pooling, stack)
    labels = read_all_labels([files["train"]], cache)
    problem = labels.problem
    reading = _make_model_inputs(start, config, task, context)
    notes: list[str] = []
    rows = _build_rows(files, reading, labels, problem, cache, notes)
    states, device = _backbone(start, task, half, pooled_by, reading)
    identity = start_fingerprint(start) or start.name
    begun = time.perf_counter()
    items: dict[str, ProbeData] = {}
    width = int(config.get_text_config().hidden_size)
    with _use_threads((2048, width, 4 * width), device):
        for part, of_part in rows.items():
            key = fingerprint([identity, *of_part.held_out.identity, pooled_by, half])
            features = layer_features(
                states,
                of_part.held_out.rows,
                cache / "features" / f"{key}.npy",
                pooling=pooled_by,
                pad=reading.pad_id,
                device=device,
                progress=lambda done, total, part=part: progress(f"features of {part}", done, total),
            )
            items[part] = _make_items(features, of_part.held_out, problem)
            if of_part.skipped_words:
                notes.append(
                    f"{part}: {of_part.skipped_words:,} words stand behind {reading.length:,} tokens and are not read"
                )
    return FrozenFeatures(
        items,
        {part: len(of_part.held_out) for part, of_part in rows.items()},
        files["train"].kind,
        tuple(str(name) for name in labels.names),
        problem,
        pooled_by,
        half,
        reading.length,
        time.perf_counter() - begun,
        tuple(notes),
    )


def probe_layers(
    model: str,
    train: str,
    test: str,
    *,
    report: Path | None = None,
    views: list[View] | None = None,
    cache: Path,
    **options: Any,
) -> dict[str, Any]:
    """Probe every layer of a model for the labels of `train`, choose on `dev` (or a tenth of `train`), answer `test` once.

    `views`: only these. `options` and errors as for `frozen_features`.
    """
    machine.tune_allocator()
    with _ProgressLine() as tell:
        frozen = compute_frozen_features(model, train, test, cache=cache, progress=tell, **options)
        begun = time.perf_counter()
        with _use_threads((BATCH_ITEMS, frozen.width, frozen.output_count * len(STRENGTHS)), torch.device("cpu")):
            found = train_probes(
                frozen.items["train"],
                frozen.items["dev"],
                frozen.items["test"],
                frozen.problem,
                frozen.output_count,
                names=frozen.labels,
                views=views,
                progress=lambda done, total: tell("classifiers", done, total),
            )
    seconds = time.perf_counter() - begun
    result = {
        "model": model,
        "kind": frozen.kind,
        "problem": frozen.problem,
        "labels": list(frozen.labels),
        "pooling": frozen.pooling,
        "stack": frozen.stack,
        "context": frozen.context,
        "items": {part: len(items) for part, items in frozen.items.items()},
        "documents": frozen.documents,
        "layers": frozen.state_count - 1,
        "width": frozen.width,
        "metric": main_metric(frozen.problem, frozen.labels)[0],
        "strengths": list(STRENGTHS),
        **_score_views(found, frozen.items["test"], frozen.items["train"], frozen.problem, frozen.labels),
        "seconds": {"features": round(frozen.seconds, 2), "classifiers": round(seconds, 2)},
        "notes": list(frozen.notes),
    }
    return _render_result(result, train, test, report)


@contextmanager
def _use_threads(product: tuple[int, int, int], device: torch.device) -> Iterator[None]:
    """Inside, torch has as many threads as pay for a product of this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(choose_threads(None, product, device, 1)[0])
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _source(part: str, path: str, kind: str) -> RawSource:
    """A file of labelled texts or tagged words."""
    kinds = ("auto", "labelled", "tagged")
    if kind not in kinds:
        raise StageError(
            f"there is no kind {kind!r}",
            where="--kind",
            expected=", ".join(kinds),
            hint=suggest_nearest(kind, kinds),
        )
    item = s.HeldOutFile.model_validate(s.expand_held_out_file(path))
    given = {**item.model_dump(), "hub": None}
    if kind == "auto":  # texts with labels look like text
        kind = detect_kind(make_text_files(part, given, Path.cwd(), part))
        kind = kind if kind == "tagged" else "labelled"
    return make_text_files(part, {**given, "kind": kind}, Path.cwd(), part)


def _resolve_pooling(config: Any, task: Task, pooling: str, stack: str) -> tuple[Stack, Pooling | None]:
    """Which half of the model is read, and how the tokens of a text become one vector."""
    for value, option, known in (
        (pooling, "--pooling", ("auto", *get_args(Pooling))),
        (stack, "--stack", ("auto", "encoder", "decoder")),
    ):
        if value not in known:
            raise StageError(
                f"there is no {option[2:]} {value!r}",
                where=option,
                expected=", ".join(known),
                hint=suggest_nearest(value, known),
            )
    if stack != "auto" and not config.is_encoder_decoder:
        raise StageError(
            f"a {config.model_type} model has no {stack} beside something else",
            where="--stack",
            expected="an encoder-decoder, or no --stack",
        )
    half: Stack = ("decoder" if stack == "decoder" else "encoder") if config.is_encoder_decoder else None
    if task == Task.TAG:
        if pooling != "auto":
            raise StageError(
                f"tags are decided word by word, so nothing is pooled, and `{pooling}` has no meaning",
                where="--pooling",
                expected="rows with one label for a text, or no --pooling",
            )
        return half, None
    causal = half == "decoder" or is_decoder(config)
    if pooling == "first" and causal:
        raise StageError(
            "the first token of a decoder has read nothing but itself",
            where="--pooling",
            expected="last, mean or max",
        )
    usual: Pooling = "mean" if half == "encoder" else "last" if causal else "first"
    return half, usual if pooling == "auto" else pooling  # type: ignore[return-value]


def _make_model_inputs(start: ModelLocation, config: Any, task: Task, context: int | None) -> ModelInputs:
    limit = getattr(config, "max_position_embeddings", None)
    if context is not None and (context < 2 or (limit and context > limit)):
        raise ModelError(
            f"a context of {context} does not fit {start.name}",
            where="--context",
            expected=f"2 to {limit}" if limit else "2 or more",
        )
    tokenizer = load_tokenizer(start.full_model)
    length = context or min(limit or _DEFAULT_CONTEXT, _DEFAULT_CONTEXT)
    return make_model_inputs(
        task, start, tokenizer, make_encoder(tokenizer, int(config.vocab_size)), length=length, seed=0
    )


def _build_rows(
    files: dict[str, RawSource],
    model_inputs: ModelInputs,
    labels: Labels,
    problem: ProblemType,
    cache: Path,
    notes: list[str],
) -> dict[str, _PartRows]:
    """The rows of each part; what the test has is in no other part, and what the dev has not in train."""
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
        kept = _exclude(digests["train"], digests["test"])
        apart = held_out_mask(digests["train"][kept], _DEV_SHARE)
        chosen["dev"], free = (stores["train"], kept[apart]), kept[~apart]
        notes.append(f"dev: {int(apart.sum()):,} documents of train, by their content, as no --dev is given")
    chosen["train"] = stores["train"], free
    copies = len(stores["train"]) - len(_exclude(digests["train"], digests["test"]))
    if copies:
        notes.append(f"train: {copies:,} documents are left out, as the test has copies of them")
    out: dict[str, _PartRows] = {}
    for part in ("train", "dev", "test"):
        store, documents = chosen[part]
        if not len(documents):
            raise DataError(f"there is nothing to be `{part}`", where=part, expected="at least one document")
        given = HeldOutDocuments(part, "learned", store, documents, objective, renderer)
        found = make_held_out_set(given, model_inputs, _NO_TOKEN_LIMIT, [], problem=problem)
        assert isinstance(found, HeldOutRows)
        left_out = 0
        if problem == ProblemType.TAGS:
            words = sum(int(np.count_nonzero(np.asarray(store.marks(int(d))))) for d in documents)
            left_out = words - sum(row.label_count for row in found.rows)
        out[part] = _PartRows(found, left_out)
    return out


def _exclude(digests: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The documents that are none of the others."""
    return np.flatnonzero(~np.isin(digests, others))


def _backbone(
    start: ModelLocation, task: Task, half: Stack, pooling: Pooling | None, model_inputs: ModelInputs
) -> tuple[ComputeStates, torch.device]:
    """What answers a batch with all states: the plain backbone, or the model of a start with all that stands in it."""
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
        meant = [row.labels[row.labels != IGNORED] for row in rows.rows]
        return ProbeData(states_SID, np.concatenate(meant), np.repeat(rows.document_R, [len(m) for m in meant]))
    return ProbeData(states_SID, np.stack([row.labels for row in rows.rows]), rows.document_R)


def _score_views(
    results: list[ProbeResult], test: ProbeData, train: ProbeData, problem: ProblemType, names: tuple[str, ...]
) -> dict[str, Any]:
    """Every view with its metrics and its change against the last layer; and what guessing comes to."""
    last = next(
        (p for p in results if p.view.kind == "state" and p.view.states[0] == train.states_SID.shape[0] - 1), None
    )
    views = []
    for one in results:
        said_I, meant_I, item_I = metric_inputs(one, test)
        entry: dict[str, Any] = {
            "name": one.view.name,
            "kind": one.view.kind,
            "states": list(one.view.states),
            "strength": one.strength,
            "dev": one.dev_score,
            "metrics": compute_metrics(problem, said_I, meant_I, item_I, names),
        }
        if last is not None and one is not last:
            entry["against_last"] = compare_metrics(
                problem, metric_inputs(last, test)[0], said_I, meant_I, item_I, names
            )
        if one.share_S:
            entry["shares"] = list(one.share_S)
        views.append(entry)
    if problem == ProblemType.NUMBER:
        guess = np.full(test.labels.shape, train.labels.mean())
    elif problem == ProblemType.MULTI_LABEL:
        guess = np.broadcast_to(train.labels.mean(0) > 0.5, test.labels.shape).astype(test.labels.dtype)
    else:
        guess = np.full(test.labels.shape, np.bincount(train.labels.astype(np.int64)).argmax())
    answer = ProbeResult(View("guess", "state", ()), 0.0, 0.0, guess)
    return {"views": views, "guess": compute_metrics(problem, *metric_inputs(answer, test), names)}


def _render_result(result: dict[str, Any], train: str, test: str, report: Path | None) -> dict[str, Any]:
    """The result with its text; the page is written."""
    items = result["items"]
    what = "words" if result["problem"] == "tags" else "texts"
    seconds = result["seconds"]
    best = max(result["views"], key=lambda v: v["dev"] if result["problem"] != "number" else -v["dev"])
    lines = [
        probe_page.probe_table(results.ProbeResult.model_validate(result)).text(),
        "",
        f"{items['train']:,} {what} to learn from, {items['dev']:,} to choose by, {items['test']:,} to be judged on, once; "
        f"{seconds['features']:.1f} s for the features of all layers, {seconds['classifiers']:.1f} s for all classifiers",
        *result["notes"],
        f"best on dev: {best['name']}; in a stage: {_objective_text(best, result)}",
    ]
    if report:
        document.write_page(report, probe_page.probe_page(results.ProbeResult.model_validate(result)))
        lines += [f"report: {report}", "next: open it in a browser"]
    else:
        command = ["postgrad", "probe", result["model"], train, test, "--report", "layers.html"]
        lines.append(f"next: {shlex.join(command)}")
    return {"text": "\n".join(lines), **result}


def _objective_text(best: dict[str, Any], result: dict[str, Any]) -> str:
    """The choice of a view as a stage says it."""
    states, many = best["states"], len(best["states"])
    layers = {"state": states[0], "mix": "mix"}.get(best["kind"], f"{{{best['kind']}: {many}}}")
    more = f", pooling: {result['pooling']}" if result["pooling"] else ""
    more += f", stack: {result['stack']}" if result["stack"] == "decoder" else ""
    return f"objectives: [{{kind: classify, layers: {layers}{more}}}]"


class _ProgressLine:
    """How far something is, on a terminal, when it takes a while."""

    def __init__(self) -> None:
        self.start_time, self.last_shown = time.perf_counter(), 0.0

    def __call__(self, label: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if sys.stderr.isatty() and now - self.start_time > _PROGRESS_AFTER_SECONDS and now - self.last_shown > 0.2:
            self.last_shown = now
            print(f"\r{label}: {done / total:.0%}\x1b[K", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> _ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        if self.last_shown:  # nothing is left on the line
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
