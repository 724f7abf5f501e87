"""Initial vectors of a soft prompt: random numbers, or rows of the input embedding.

Legend: P vectors of the prompt, D their width.

Rows are outputs of the input embedding, so scaled where the model scales them (Gemma).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from postgrad.errors import TuningError
from postgrad.models.layers import get_embedding_weight
from postgrad.tuning.tuning import check_choice

NUM_FREQUENT = 5000
"""Vocabularies begin with their most frequent entries; Lester et al. (2021, section 3.2) draw from this many."""


@dataclass(frozen=True)
class PromptInit:
    """How the initial values are computed; `method` is one of `INITIALIZERS`."""

    method: str
    length: int
    scale: float | None = None
    text: str | None = None
    labels: Sequence[str] | None = None
    seed: int = 0
    tokenizer: PreTrainedTokenizerBase | None = None

    def generator(self) -> torch.Generator:
        """A new generator; always the same draws."""
        return torch.Generator().manual_seed(self.seed)


def initial_vectors_PD(model: PreTrainedModel, init: PromptInit) -> Tensor:
    """The initial values, of shape (P, D), fp32 and on the embedding's device.

    Raises `TuningError` for an unknown method, one that lacks an input, and for an option that it would ignore.
    """
    check_choice(init.method, INITIALIZERS, "init")
    for name, methods in _OPTION_METHODS.items():
        if getattr(init, name) is not None and init.method not in methods:
            raise TuningError(
                f"`init_{name}` has no effect with `init: {init.method}`",
                where=f"tuning.init_{name}",
                expected=f"init: {' or '.join(methods)}",
                hint=f"remove `init_{name}`, or change `init`",
            )
    with torch.no_grad():
        return INITIALIZERS[init.method](model, init).to(get_embedding_weight(model).device, torch.float32)


def _uniform(model: PreTrainedModel, init: PromptInit) -> Tensor:
    """U(-scale, scale), 0.5 by default: Lester et al. (2021, section 3.2), and Singhal et al. (2022) after them."""
    scale = 0.5 if init.scale is None else init.scale
    return (2 * torch.rand(init.length, _embedding_width(model), generator=init.generator()) - 1) * scale


def _normal(model: PreTrainedModel, init: PromptInit) -> Tensor:
    """N(0, scale^2), 1 by default: the inputs of the encoder in the code of P-tuning (Liu et al., 2021)."""
    scale = 1.0 if init.scale is None else init.scale
    return torch.randn(init.length, _embedding_width(model), generator=init.generator()) * scale


def _vocabulary(model: PreTrainedModel, init: PromptInit) -> Tensor:
    """Rows of the most frequent entries, drawn without replacement while they last: Lester et al. (2021, section 3.2).

    With a tokenizer, special tokens are excluded.
    """
    special = set(init.tokenizer.all_special_ids) if init.tokenizer else set()
    frequent = [i for i in range(min(_num_embeddings(model), NUM_FREQUENT)) if i not in special]
    generator = init.generator()
    drawn: list[int] = []
    while len(drawn) < init.length:
        drawn += [frequent[i] for i in torch.randperm(len(frequent), generator=generator).tolist()]
    return _embed(model, drawn[: init.length])


def _text(model: PreTrainedModel, init: PromptInit) -> Tensor:
    """The rows of a text's tokens, repeated or cut to the prompt's length."""
    if init.text is None:
        raise TuningError("`init: text` needs a text", where="tuning.init_text", expected="the text to start from")
    return _embed(model, list(itertools.islice(itertools.cycle(_tokenize(model, init, init.text)), init.length)))


def _labels(model: PreTrainedModel, init: PromptInit) -> Tensor:
    """The classes' names first, each the mean of its tokens' rows; the rest from the vocabulary.

    The best method in Lester et al. (2021, section 3.2).
    """
    if not init.labels:
        raise TuningError(
            "`init: labels` needs labels", where="tuning.init_labels", expected="the names of the classes"
        )
    if len(init.labels) > init.length:
        raise TuningError(
            f"{len(init.labels)} labels do not fit a prompt of {init.length} vectors",
            where="tuning.length",
            expected=f"at least {len(init.labels)}, one vector per label",
        )
    means = [_embed(model, _tokenize(model, init, label)).mean(0) for label in init.labels]
    return torch.cat([torch.stack(means), _vocabulary(model, init)[len(means) :]])


INITIALIZERS: dict[str, Callable[[PreTrainedModel, PromptInit], Tensor]] = {
    "random": _uniform,
    "normal": _normal,
    "vocabulary": _vocabulary,
    "text": _text,
    "labels": _labels,
}
_OPTION_METHODS = {"text": ("text",), "labels": ("labels",), "scale": ("random", "normal")}


def _tokenize(model: PreTrainedModel, init: PromptInit, text: str) -> list[int]:
    """The ids of a text, without special tokens. Raises `TuningError` without a tokenizer, and if there are none."""
    if init.tokenizer is None:
        raise TuningError(
            f"`init: {init.method}` needs the model's tokenizer",
            where="tuning.init",
            hint="pass `tokenizer`, or use `init: vocabulary`",
        )
    ids = init.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert isinstance(ids, list)
    if not ids or max(ids) >= _num_embeddings(model):
        raise TuningError(
            f"'{text}' has {'ids beyond the' if ids else 'no tokens in the'} model's vocabulary",
            where=f"tuning.init_{init.method}",
            expected="a text in tokens of this model",
        )
    return ids


def _embed(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Outputs of the input embedding, of shape (len(ids), D)."""
    rows = model.get_input_embeddings()(torch.tensor([ids], device=get_embedding_weight(model).device))[0]
    assert isinstance(rows, Tensor)
    return rows.float()


def _num_embeddings(model: PreTrainedModel) -> int:
    return get_embedding_weight(model).shape[0]


def _embedding_width(model: PreTrainedModel) -> int:
    return get_embedding_weight(model).shape[1]
