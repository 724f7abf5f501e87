"""How likely is each token of a text to an encoder that sees all the others? Every token is masked, one at a time.

Legend: B batch, T time, D model width, W windows, N documents.

The pseudo-log-likelihood of a text is the sum over its tokens of `log p(token | all others)`, each predicted at a mask in
its place; the pseudo-perplexity of N tokens is `exp(-sum / N)` (Salazar et al. 2020, section 2). Unlike the loss of masked
language modelling nothing is drawn, every token counts, and nothing else is hidden. It costs a row for each token, so a
bounded number of them is scored; a batch holds rows of one window, and only what stands at the masks goes through the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from postgrad.evaluation.perplexity import BatchResult, Scores
from postgrad.models.model import Model

_TOKENS_AT_ONCE = 8192


class MaskedWindow(NamedTuple):
    """Ids as a model reads them, of shape (T,), the places that are masked in turn, and the document it is of."""

    document: int
    ids: np.ndarray
    masked_positions: np.ndarray


@dataclass(frozen=True)
class MaskedHeldOutText:
    """Texts of which each token is asked for given all the others of its window; `mask` stands in its place."""

    name: str
    role: str
    windows: tuple[MaskedWindow, ...]
    bytes: np.ndarray
    fingerprint: str
    mask_id: int

    def __len__(self) -> int:
        return len(self.bytes)

    @property
    def identity(self) -> list[Any]:
        """What decides its scores, beside the model."""
        return ["one by one", self.fingerprint, self.tokens]

    @property
    def tokens(self) -> int:
        """Scored tokens, each a row of its own."""
        return sum(len(window.masked_positions) for window in self.windows)


class _PositionBatch(NamedTuple):
    """Rows that are scored at once: places of one window."""

    window: int
    begin: int
    end: int


@torch.no_grad()
def score_masked_tokens(
    model: Model,
    texts: MaskedHeldOutText,
    *,
    context: int,
    gather: Callable[[list[BatchResult]], list[BatchResult]] | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Scores:
    """Score every token; `document_W` and so on are of windows. Ranks are shared as in `likelihood.score`.

    Windows were cut for the `context` that the model reads in.
    """
    assert all(len(window.ids) <= context for window in texts.windows)
    turns = list(_position_batches(texts))
    while len(turns) % ranks:
        turns.append(turns[-1])
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    parts: list[BatchResult] = []
    with torch.compiler.set_stance("force_eager"):
        for index in range(rank, len(turns), ranks):
            window = texts.windows[turns[index].window]
            places_B = torch.from_numpy(window.masked_positions[turns[index].begin : turns[index].end]).to(device)
            ids_T = torch.from_numpy(window.ids).to(device)
            rows_B = torch.arange(len(places_B), device=device)
            ids_BT = ids_T.repeat(len(places_B), 1)
            ids_BT[rows_B, places_B] = texts.mask_id
            output = model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT))
            assert output.head is not None, "a masked language model has a head"
            logits_BV = output.head.logits(output.hidden[rows_B, places_B]).float()
            nats_B = functional.cross_entropy(logits_BV, ids_T[places_B], reduction="none")
            parts.append((index, nats_B.double().sum().item()))
    model.train(was_training)
    found = dict(gather(parts) if gather else parts)
    nats_W = np.zeros(len(texts.windows))
    for index in range(len(dict.fromkeys(turns))):  # those that filled up the ranks come last, and count once
        nats_W[turns[index].window] += found[index]
    return Scores(
        document_W=np.array([window.document for window in texts.windows], np.int64),
        nats_W=nats_W,
        tokens_W=np.array([len(window.masked_positions) for window in texts.windows], np.int64),
        bytes_N=np.asarray(texts.bytes, np.int64),
    )


def _position_batches(texts: MaskedHeldOutText) -> Iterator[_PositionBatch]:
    """The places of each window, in groups whose rows stay within the tokens at once."""
    for number, window in enumerate(texts.windows):
        most = max(1, _TOKENS_AT_ONCE // len(window.ids))
        for begin in range(0, len(window.masked_positions), most):
            yield _PositionBatch(number, begin, min(begin + most, len(window.masked_positions)))
