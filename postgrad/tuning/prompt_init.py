"""With which numbers does a soft prompt begin?

Legend: P vectors of the prompt, V rows of the input embedding, D its width.

Rows are taken as the model itself sees them: what its input embedding answers, scaled where it scales (Gemma).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from postgrad.errors import TuningError, nearest
from postgrad.models.pretrained import table_of

FREQUENT = 5000
"""Vocabularies begin with their most frequent entries; Lester et al. (2021, section 3.2) draw from this many."""


@dataclass(frozen=True)
class Start:
    """What the first values are made from; `how` is one of `STARTS`."""

    how: str
    length: int
    scale: float | None = None
    text: str | None = None
    labels: Sequence[str] | None = None
    seed: int = 0
    tokenizer: PreTrainedTokenizerBase | None = None

    def generator(self) -> torch.Generator:
        """The same draws whenever it is asked."""
        return torch.Generator().manual_seed(self.seed)


def start_PD(model: PreTrainedModel, start: Start) -> Tensor:
    """The first values, of shape (P, D), fp32 and on the embedding's device.

    Raises `TuningError` for a start that is not known, that lacks what it is made from, or that would not read an option.
    """
    if start.how not in STARTS:
        raise TuningError(
            f"'{start.how}' is no start for a prompt",
            where="tuning.start",
            expected=f"one of {', '.join(STARTS)}",
            way_out=nearest(start.how, STARTS),
        )
    for name, readers in _READERS.items():
        if getattr(start, name) is not None and start.how not in readers:
            raise TuningError(
                f"`{name}` is given, and a prompt that starts from {start.how} does not read it",
                where=f"tuning.{name}",
                expected=f"start: {' or '.join(readers)}",
                way_out=f"leave `{name}` out, or change `start`",
            )
    with torch.no_grad():
        return STARTS[start.how](model, start).to(table_of(model).device, torch.float32)


def _uniform(model: PreTrainedModel, start: Start) -> Tensor:
    """U(-scale, scale), 0.5 unless told: Lester et al. (2021, section 3.2), and Singhal et al. (2022) after them."""
    scale = 0.5 if start.scale is None else start.scale
    return (2 * torch.rand(start.length, _width(model), generator=start.generator()) - 1) * scale


def _normal(model: PreTrainedModel, start: Start) -> Tensor:
    """N(0, scale^2), 1 unless told: how the code of P-tuning (Liu et al., 2021) draws what its encoder reads."""
    scale = 1.0 if start.scale is None else start.scale
    return torch.randn(start.length, _width(model), generator=start.generator()) * scale


def _vocabulary(model: PreTrainedModel, start: Start) -> Tensor:
    """Rows of the most frequent entries, drawn without replacement while they last: Lester et al. (2021, section 3.2).

    Special tokens are left out where a tokenizer tells which they are.
    """
    special = set(start.tokenizer.all_special_ids) if start.tokenizer else set()
    frequent = [i for i in range(min(_rows(model), FREQUENT)) if i not in special]
    generator = start.generator()
    drawn: list[int] = []
    while len(drawn) < start.length:
        drawn += [frequent[i] for i in torch.randperm(len(frequent), generator=generator).tolist()]
    return _seen(model, drawn[: start.length])


def _text(model: PreTrainedModel, start: Start) -> Tensor:
    """The rows of a text's tokens, repeated or cut to the prompt's length."""
    if start.text is None:
        raise TuningError("this start needs a text", where="tuning.text", expected="text: the words to start from")
    return _seen(model, list(itertools.islice(itertools.cycle(_tokens(model, start, start.text)), start.length)))


def _labels(model: PreTrainedModel, start: Start) -> Tensor:
    """The classes' names first, each the mean of its tokens' rows; the rest from the vocabulary.

    Lester et al. (2021, section 3.2), who found it best.
    """
    if not start.labels:
        raise TuningError("this start needs labels", where="tuning.labels", expected="labels: the names of the classes")
    if len(start.labels) > start.length:
        raise TuningError(
            f"{len(start.labels)} labels do not fit a prompt of {start.length} vectors",
            where="tuning.length",
            expected=f"at least {len(start.labels)}, one vector a label",
        )
    means = [_seen(model, _tokens(model, start, label)).mean(0) for label in start.labels]
    return torch.cat([torch.stack(means), _vocabulary(model, start)[len(means) :]])


STARTS: dict[str, Callable[[PreTrainedModel, Start], Tensor]] = {
    "random": _uniform,
    "normal": _normal,
    "vocabulary": _vocabulary,
    "text": _text,
    "labels": _labels,
}
_READERS = {"text": ("text",), "labels": ("labels",), "scale": ("random", "normal")}


def _tokens(model: PreTrainedModel, start: Start, text: str) -> list[int]:
    """The ids of a text, without special tokens. Raises `TuningError` when there is no way to have them, or there are none."""
    if start.tokenizer is None:
        raise TuningError(
            f"a prompt that starts from {start.how} needs the model's tokenizer",
            where="tuning.start",
            way_out="pass `tokenizer`, or start from the vocabulary",
        )
    ids = start.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert isinstance(ids, list)
    if not ids or max(ids) >= _rows(model):
        raise TuningError(
            f"'{text}' has {'ids beyond the' if ids else 'no tokens in the'} model's vocabulary",
            where=f"tuning.{start.how}",
            expected="a text in tokens of this model",
        )
    return ids


def _seen(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """What the input embedding gives for `ids`, of shape (len(ids), D)."""
    seen = model.get_input_embeddings()(torch.tensor([ids], device=table_of(model).device))[0]
    assert isinstance(seen, Tensor)
    return seen.float()


def _rows(model: PreTrainedModel) -> int:
    return table_of(model).shape[0]


def _width(model: PreTrainedModel) -> int:
    return table_of(model).shape[1]
