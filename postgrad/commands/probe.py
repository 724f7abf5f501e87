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
from postgrad.data.layouts.rows import IGNORED, held_out_mask
from postgrad.data.read.documents import source_kind
from postgrad.data.read.examples import Labels
from postgrad.data.read.files import Source
from postgrad.data.tokens.store import TokenStore
from postgrad.data.tokens.tokenize import build_store, labels_of
from postgrad.errors import DataError, ModelError, StageError, nearest
from postgrad.evaluation.classification_metrics import compared, measured
from postgrad.evaluation.held_out import HeldOutRows
from postgrad.evaluation.layer_features import States, layer_features
from postgrad.evaluation.linear_probe import ROWS, STRENGTHS, Items, Probed, View, decisions, main_metric, probe
from postgrad.hardware import machine
from postgrad.hardware.execution import threads_for
from postgrad.models.pretrained import Start, Task, TaskLayer, load, load_tokenizer, locate
from postgrad.models.task_head import Pooling, Representation, is_decoder, states_of
from postgrad.objectives.classification_loss import Problem
from postgrad.plan.held_out_sets import Chosen, as_read
from postgrad.plan.model_inputs import Reading, make_encoder, make_reading
from postgrad.plan.objective_rows import Wording, renderer_for
from postgrad.plan.sources import files_of
from postgrad.reports.html import document
from postgrad.reports.pages import probe_page
from postgrad.storage.fingerprint import fingerprint
from postgrad.tuning.open_model import open_model, start_fingerprint

_CONTEXT = 512
_LIMIT = 1 << 40
_DEV = 0.1
_TELL_AFTER = 2.0
Stack = Literal["encoder", "decoder"] | None


@dataclass(frozen=True)
class _Rows:
    """A file as rows of the task, and how many of its words no row has room for."""

    found: HeldOutRows
    left_out: int


@dataclass(frozen=True)
class Frozen:
    """The features of every layer of a model for the items of each part (`train`, `dev`, `test`), and what is to be told."""

    items: dict[str, Items]
    documents: dict[str, int]
    kind: str
    labels: tuple[str, ...]
    problem: Problem
    pooling: Pooling | None
    stack: Stack
    context: int
    seconds: float
    notes: tuple[str, ...]

    @property
    def states(self) -> int:
        """How many states there are: the layers, and the embeddings."""
        return self.items["train"].states_SID.shape[0]

    @property
    def width(self) -> int:
        """Numbers of a state."""
        return self.items["train"].states_SID.shape[2]

    @property
    def outputs(self) -> int:
        """What a classifier of these items gives."""
        return max(len(self.labels), 1)


def frozen_features(
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
) -> Frozen:
    """Every layer's features of three files (without `dev`, that is a tenth of `train`), from the cache or one pass.

    Raises `DataError` for a label that `train` has not (with its file and line), `StageError` for options that have no
    meaning for the rows or the model.
    """
    start = locate(model, Path.cwd(), base)
    config: Any = AutoConfig.from_pretrained(start.source)
    files = {"train": _source("train", train, kind), "test": _source("test", test, kind)}
    files |= {"dev": _source("dev", dev, kind)} if dev else {}
    task: Task = "tag" if files["train"].kind == "tagged" else "classify"
    half, pooled_by = _choices(config, task, pooling, stack)
    labels = labels_of([files["train"]], cache)
    problem: Problem = labels.problem  # type: ignore[assignment]
    reading = _reading(start, config, task, context)
    notes: list[str] = []
    rows = _rows(files, reading, labels, problem, cache, notes)
    states, device = _backbone(start, task, half, pooled_by, reading)
    identity = start_fingerprint(start) or start.name
    begun = time.perf_counter()
    items: dict[str, Items] = {}
    width = int(config.get_text_config().hidden_size)
    with _threads((2048, width, 4 * width), device):
        for part, of_part in rows.items():
            key = fingerprint([identity, *of_part.found.identity, pooled_by, half])
            features = layer_features(
                states,
                of_part.found.rows,
                cache / "features" / f"{key}.npy",
                pooling=pooled_by,
                pad=reading.pad,
                device=device,
                progress=lambda done, total, part=part: progress(f"features of {part}", done, total),
            )
            items[part] = _items(features, of_part.found, problem)
            if of_part.left_out:
                notes.append(
                    f"{part}: {of_part.left_out:,} words stand behind {reading.length:,} tokens and are not read"
                )
    return Frozen(
        items,
        {part: len(of_part.found) for part, of_part in rows.items()},
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
    with _Telling() as tell:
        frozen = frozen_features(model, train, test, cache=cache, progress=tell, **options)
        begun = time.perf_counter()
        with _threads((ROWS, frozen.width, frozen.outputs * len(STRENGTHS)), torch.device("cpu")):
            found = probe(
                frozen.items["train"],
                frozen.items["dev"],
                frozen.items["test"],
                frozen.problem,
                frozen.outputs,
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
        "layers": frozen.states - 1,
        "width": frozen.width,
        "metric": main_metric(frozen.problem, frozen.labels)[0],
        "strengths": list(STRENGTHS),
        **_scored(found, frozen.items["test"], frozen.items["train"], frozen.problem, frozen.labels),
        "seconds": {"features": round(frozen.seconds, 2), "classifiers": round(seconds, 2)},
        "notes": list(frozen.notes),
    }
    return _told(result, train, test, report)


@contextmanager
def _threads(product: tuple[int, int, int], device: torch.device) -> Iterator[None]:
    """Inside, torch has as many threads as pay for a product of this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads_for(None, product, device, 1)[0])
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _source(part: str, path: str, kind: str) -> Source:
    """A file of labelled texts or tagged words."""
    kinds = ("auto", "labelled", "tagged")
    if kind not in kinds:
        raise StageError(
            f"there is no kind {kind!r}", where="--kind", expected=", ".join(kinds), way_out=nearest(kind, kinds)
        )
    item = s.HeldOutFile.model_validate(s.held_out_file(path))
    given = {**item.model_dump(), "hub": None}
    if kind == "auto":  # texts with labels look like text
        kind = source_kind(files_of(part, given, Path.cwd(), part))
        kind = kind if kind == "tagged" else "labelled"
    return files_of(part, {**given, "kind": kind}, Path.cwd(), part)


def _choices(config: Any, task: Task, pooling: str, stack: str) -> tuple[Stack, Pooling | None]:
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
                way_out=nearest(value, known),
            )
    if stack != "auto" and not config.is_encoder_decoder:
        raise StageError(
            f"a {config.model_type} model has no {stack} beside something else",
            where="--stack",
            expected="an encoder-decoder, or no --stack",
        )
    half: Stack = ("decoder" if stack == "decoder" else "encoder") if config.is_encoder_decoder else None
    if task == "tag":
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


def _reading(start: Start, config: Any, task: Task, context: int | None) -> Reading:
    limit = getattr(config, "max_position_embeddings", None)
    if context is not None and (context < 2 or (limit and context > limit)):
        raise ModelError(
            f"a context of {context} does not fit {start.name}",
            where="--context",
            expected=f"2 to {limit}" if limit else "2 or more",
        )
    tokenizer = load_tokenizer(start.plain)
    length = context or min(limit or _CONTEXT, _CONTEXT)
    return make_reading(task, start, tokenizer, make_encoder(tokenizer, int(config.vocab_size)), length=length, seed=0)


def _rows(
    files: dict[str, Source], reading: Reading, labels: Labels, problem: Problem, cache: Path, notes: list[str]
) -> dict[str, _Rows]:
    """The rows of each part; what the test has is in no other part, and what the dev has not in train."""
    objective = ClassifyObjective(kind="classify")
    renderer = renderer_for(objective, files["train"].kind, reading, Wording(), labels)
    stores = {name: build_store(source, reading.encoder, cache, renderer=renderer) for name, source in files.items()}
    digests = {name: np.asarray(store.documents["digest"]) for name, store in stores.items()}
    chosen: dict[str, tuple[TokenStore, np.ndarray]] = {"test": (stores["test"], np.arange(len(stores["test"])))}
    if "dev" in stores:
        chosen["dev"] = stores["dev"], _without(digests["dev"], digests["test"])
        free = _without(digests["train"], np.concatenate([digests["test"], digests["dev"]]))
    else:
        kept = _without(digests["train"], digests["test"])
        apart = held_out_mask(digests["train"][kept], _DEV)
        chosen["dev"], free = (stores["train"], kept[apart]), kept[~apart]
        notes.append(f"dev: {int(apart.sum()):,} documents of train, by their content, as no --dev is given")
    chosen["train"] = stores["train"], free
    copies = len(stores["train"]) - len(_without(digests["train"], digests["test"]))
    if copies:
        notes.append(f"train: {copies:,} documents are left out, as the test has copies of them")
    out: dict[str, _Rows] = {}
    for part in ("train", "dev", "test"):
        store, documents = chosen[part]
        if not len(documents):
            raise DataError(f"there is nothing to be `{part}`", where=part, expected="at least one document")
        given = Chosen(part, "learned", store, documents, objective, renderer)
        found = as_read(given, reading, _LIMIT, [], problem=problem)
        assert isinstance(found, HeldOutRows)
        left_out = 0
        if problem == "tags":
            words = sum(int(np.count_nonzero(np.asarray(store.marks(int(d))))) for d in documents)
            left_out = words - sum(row.counted for row in found.rows)
        out[part] = _Rows(found, left_out)
    return out


def _without(digests: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The documents that are none of the others."""
    return np.flatnonzero(~np.isin(digests, others))


def _backbone(
    start: Start, task: Task, half: Stack, pooling: Pooling | None, reading: Reading
) -> tuple[States, torch.device]:
    """What answers a batch with all states: the plain backbone, or the model of a start with all that stands in it."""
    device = machine.device()
    if start.base is None:
        form = Representation((0,), pooling=pooling, stack=half)
        layer = TaskLayer(("0", "1"), "single_label_classification", reading.pad, 0, form)
        plain: Any = load(start, task, layer=layer).model.to(device)  # type: ignore[bad-argument-type]
        return lambda inputs: plain.states(**inputs), device
    model: Any = open_model(start).model.to(device)  # type: ignore[bad-argument-type]
    body = model.base_model

    def states(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return states_of(body, stack=half, **inputs)

    return states, device


def _items(states_SID: np.ndarray, rows: HeldOutRows, problem: Problem) -> Items:
    if problem == "tags":
        meant = [row.labels[row.labels != IGNORED] for row in rows.rows]
        return Items(states_SID, np.concatenate(meant), np.repeat(rows.document_R, [len(m) for m in meant]))
    return Items(states_SID, np.stack([row.labels for row in rows.rows]), rows.document_R)


def _scored(found: list[Probed], test: Items, train: Items, problem: Problem, names: tuple[str, ...]) -> dict[str, Any]:
    """Every view with its metrics and its change against the last layer; and what guessing comes to."""
    last = next(
        (p for p in found if p.view.kind == "state" and p.view.states[0] == train.states_SID.shape[0] - 1), None
    )
    views = []
    for one in found:
        said_I, meant_I, item_I = decisions(one, test)
        entry: dict[str, Any] = {
            "name": one.view.name,
            "kind": one.view.kind,
            "states": list(one.view.states),
            "strength": one.strength,
            "dev": one.dev,
            "metrics": measured(problem, said_I, meant_I, item_I, names),
        }
        if last is not None and one is not last:
            entry["against_last"] = compared(problem, decisions(last, test)[0], said_I, meant_I, item_I, names)
        if one.share_S:
            entry["shares"] = list(one.share_S)
        views.append(entry)
    if problem == "number":
        guess = np.full(test.meant.shape, train.meant.mean())
    elif problem == "multi":
        guess = np.broadcast_to(train.meant.mean(0) > 0.5, test.meant.shape).astype(test.meant.dtype)
    else:
        guess = np.full(test.meant.shape, np.bincount(train.meant.astype(np.int64)).argmax())
    answer = Probed(View("guess", "state", ()), 0.0, 0.0, guess)
    return {"views": views, "guess": measured(problem, *decisions(answer, test), names)}


def _told(result: dict[str, Any], train: str, test: str, report: Path | None) -> dict[str, Any]:
    """The result with its text; the page is written."""
    items = result["items"]
    what = "words" if result["problem"] == "tags" else "texts"
    seconds = result["seconds"]
    best = max(result["views"], key=lambda v: v["dev"] if result["problem"] != "number" else -v["dev"])
    lines = [
        probe_page.table(result).text(),
        "",
        f"{items['train']:,} {what} to learn from, {items['dev']:,} to choose by, {items['test']:,} to be judged on, once; "
        f"{seconds['features']:.1f} s for the features of all layers, {seconds['classifiers']:.1f} s for all classifiers",
        *result["notes"],
        f"best on dev: {best['name']}; in a stage: {_objective(best, result)}",
    ]
    if report:
        document.write(report, probe_page.probe_page(result))
        lines += [f"report: {report}", "next: open it in a browser"]
    else:
        command = ["postgrad", "probe", result["model"], train, test, "--report", "layers.html"]
        lines.append(f"next: {shlex.join(command)}")
    return {"text": "\n".join(lines), **result}


def _objective(best: dict[str, Any], result: dict[str, Any]) -> str:
    """The choice of a view as a stage says it."""
    states, many = best["states"], len(best["states"])
    layers = {"state": states[0], "mix": "mix"}.get(best["kind"], f"{{{best['kind']}: {many}}}")
    more = f", pooling: {result['pooling']}" if result["pooling"] else ""
    more += f", stack: {result['stack']}" if result["stack"] == "decoder" else ""
    return f"objectives: [{{kind: classify, layers: {layers}{more}}}]"


class _Telling:
    """How far something is, on a terminal, when it takes a while."""

    def __init__(self) -> None:
        self.begun, self.said = time.perf_counter(), 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if sys.stderr.isatty() and now - self.begun > _TELL_AFTER and now - self.said > 0.2:
            self.said = now
            print(f"\r{what}: {done / total:.0%}\x1b[K", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> _Telling:
        return self

    def __exit__(self, *_: object) -> None:
        if self.said:  # nothing is left on the line
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
