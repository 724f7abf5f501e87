"""Value types shared by the results of commands, and results as plain data for JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from postgrad.errors import InterruptError
from postgrad.lineage.record import ClassRecord, Interval, RecordPart, UnknownTokens

if TYPE_CHECKING:
    from postgrad.evaluation.perplexity import Scores

T = TypeVar("T")


class Result:
    """A typed result of a command: a frozen dataclass that prints nothing."""

    def as_dict(self) -> dict[str, object]:
        """The result as plain data, ready for JSON; optional fields that are empty are left out."""
        return cast("dict[str, object]", _plain_data(self))


def _plain_data(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: _plain_data(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if not (_is_optional(f) and getattr(value, f.name) in (None, (), {}))
        }
    if isinstance(value, RecordPart):
        return value.as_json()
    if isinstance(value, Mapping):
        return {str(key): _plain_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_data(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_optional(f: dataclasses.Field[Any]) -> bool:
    return f.default is not MISSING or f.default_factory is not MISSING


def finish(events: Iterable[object], result: type[T]) -> T:
    """Run an iterator of events to its end and return the last item, such as `finish(train(stage), RunFinished)`.

    Raises `InterruptError` when the run was stopped before its result.
    """
    last: object = None
    for event in events:
        last = event
    if not isinstance(last, result):
        raise InterruptError("stopped before the end", hint="the same call resumes")
    return last


@dataclass(frozen=True)
class PseudoPerplexity(Result):
    """Scores of tokens masked one at a time, each given all the others."""

    nats: float
    """Loss in nats per masked token."""
    low: float | None
    """Lower end of the 95 % interval of `nats`; None for a single document, which has none."""
    high: float | None
    """Upper end of the 95 % interval of `nats`."""
    perplexity: float
    tokens: int
    """Tokens that were masked."""
    bits_per_byte: float
    bytes: int
    documents: int


@dataclass(frozen=True)
class TextScore(Result):
    """A model's loss on a text."""

    nats: float
    """Loss in nats per token (of a classifier: per label)."""
    low: float | None
    """Lower end of the 95 % interval of `nats`, over resampled documents; None for a single one."""
    high: float | None
    """Upper end of the 95 % interval of `nats`."""
    perplexity: float
    """exp(nats)."""
    bits_per_byte: float
    """Loss in bits per byte of the text; comparable between tokenizers."""
    tokens: int
    """Tokens that were predicted."""
    bytes: int
    documents: int
    metrics: Mapping[str, Interval] = field(default_factory=dict)
    """Of a classifier: each metric with its 95 % interval."""
    classes: tuple[ClassRecord, ...] = ()
    """Of a classifier: precision, recall, F1 and support of each class."""
    confusion: tuple[tuple[int, ...], ...] = ()
    """Of a classifier of up to 50 classes: how often each class (row) is taken for each class (column)."""
    unknown: UnknownTokens | None = None
    """Tokens of text that the vocabulary lacks, which no other figure counts; None where there are none."""
    pseudo_perplexity: PseudoPerplexity | None = None
    """Of a masked language model, where it was requested."""


def summarize_scores(scores: Scores, pseudo: Scores | None = None) -> TextScore:
    """The typed summary of a model's scores on a text."""
    summary = scores.summary()
    metrics = {name: Interval(**entry) for name, entry in summary.pop("metrics", {}).items()}
    classes = tuple(ClassRecord(**entry) for entry in summary.pop("classes", ()))
    unknown = UnknownTokens(**found) if (found := summary.pop("unknown", None)) else None
    return TextScore(
        **summary,
        unknown=unknown,
        metrics=metrics,
        classes=classes,
        pseudo_perplexity=None if pseudo is None else PseudoPerplexity(**pseudo.summary()),
    )
