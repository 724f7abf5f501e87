"""Pseudo-perplexity of masked language models: each token is masked in turn and predicted from all others.

Legend: B batch, T time, D model width, W windows, N documents.

The pseudo-log-likelihood of a text is the sum over its tokens of `log p(token | all others)`, each predicted at a mask in
its place; the pseudo-perplexity of N tokens is `exp(-sum / N)` (Salazar et al. 2020, section 2). Unlike the loss of masked
language modelling it is deterministic, scores every token, and masks no other one. It costs a row for each token, so a bounded
number of tokens is scored; a batch holds rows of one window, and only the masked positions go through the head.
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
    """Input ids of shape (T,), the positions that are masked in turn, and the number of the document."""

    document: int
    ids: np.ndarray
    masked_positions: np.ndarray


@dataclass(frozen=True)
class MaskedHeldOutText:
    """Texts in windows, each of whose tokens is predicted from all the others."""

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
        """What its scores depend on besides the model."""
        return ["one by one", self.fingerprint, self.tokens]

    @property
    def tokens(self) -> int:
        """Scored tokens, each a row of its own."""
        return sum(len(window.masked_positions) for window in self.windows)


class _PositionBatch(NamedTuple):
    """Masked positions of one window that are scored in one batch."""

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
    """Score every token; the arrays of the scores are of windows. Ranks share the work as in `score_held_out`.

    The windows were made for `context`.
    """
    assert all(len(window.ids) <= context for window in texts.windows)
    batches = list(_position_batches(texts))
    while len(batches) % ranks:
        batches.append(batches[-1])
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    parts: list[BatchResult] = []
    with torch.compiler.set_stance("force_eager"):
        for index in range(rank, len(batches), ranks):
            window = texts.windows[batches[index].window]
            positions_B = torch.from_numpy(window.masked_positions[batches[index].begin : batches[index].end]).to(
                device
            )
            ids_T = torch.from_numpy(window.ids).to(device)
            rows_B = torch.arange(len(positions_B), device=device)
            ids_BT = ids_T.repeat(len(positions_B), 1)
            ids_BT[rows_B, positions_B] = texts.mask_id
            output = model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT))
            assert output.head is not None, "a masked language model has a head"
            logits_BV = output.head.logits(output.hidden[rows_B, positions_B]).float()
            nats_B = functional.cross_entropy(logits_BV, ids_T[positions_B], reduction="none")
            parts.append((index, nats_B.double().sum().item()))
    model.train(was_training)
    nats = dict(gather(parts) if gather else parts)
    nats_W = np.zeros(len(texts.windows))
    for index in range(len(dict.fromkeys(batches))):  # the repeated last batches of uneven ranks count once
        nats_W[batches[index].window] += nats[index]
    return Scores(
        document_W=np.array([window.document for window in texts.windows], np.int64),
        nats_W=nats_W,
        tokens_W=np.array([len(window.masked_positions) for window in texts.windows], np.int64),
        bytes_N=np.asarray(texts.bytes, np.int64),
    )


def _position_batches(texts: MaskedHeldOutText) -> Iterator[_PositionBatch]:
    """The masked positions of each window, in groups whose rows fit the token budget."""
    for number, window in enumerate(texts.windows):
        rows = max(1, _TOKENS_AT_ONCE // len(window.ids))
        for begin in range(0, len(window.masked_positions), rows):
            yield _PositionBatch(number, begin, min(begin + rows, len(window.masked_positions)))
