"""How well does a model predict a text? Nats of every token, once, given what stands before it in its document.

Legend: B batch, T time, V vocabulary.

What is scored: every token of a document but its first (nothing stands before it; with a tokenizer that sets a BOS, that
is the BOS, so all of the text is scored) and never the EOS (models differ in whether they ever saw one, and it is no
part of the text). A document longer than the context is read in windows that advance by half a context; in each window
only the tokens that no earlier window scored count. Sums are taken in float64, so neither the batch size nor padding
matters beyond rounding.

Bits per byte, `nats / (ln 2 x UTF-8 bytes)`, is the only one of the three numbers that can be compared between models
with different tokenizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from postgrad.lineage.forgetting import FEWEST_DOCUMENTS, bootstrap
from postgrad.models.pretrained import CausalModel

_TOKENS_AT_ONCE = 8192
_LOGITS_AT_ONCE = 1 << 25


@dataclass(frozen=True)
class HeldOut:
    """A set of documents to be scored: ids (BOS included where the tokenizer sets one, EOS left out)."""

    name: str
    role: str
    documents: tuple[np.ndarray, ...]
    bytes: np.ndarray
    fingerprint: str
    digests: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    """Content hash of each document, to pair documents across tokenizers."""

    def first(self, tokens: int) -> HeldOut:
        """The first documents, up to so many tokens; the last one is cut. At least two tokens of one document."""
        ends = np.cumsum([len(d) for d in self.documents])
        count = min(int(np.searchsorted(ends, tokens)) + 1, len(self.documents))
        documents = list(self.documents[:count])
        sizes = self.bytes[:count].copy()
        spare = int(ends[count - 1]) - tokens if count else 0
        if spare > 0:
            cut = len(documents[-1]) - spare
            if cut < 2 and count > 1:  # a single token has nothing to score, and all of the document may be long
                return self._of(documents[:-1], sizes[:-1])
            cut = max(cut, 2)
            sizes[-1] = round(sizes[-1] * cut / len(documents[-1]))
            documents[-1] = documents[-1][:cut]
        return self._of(documents, sizes)

    def _of(self, documents: list[np.ndarray], sizes: np.ndarray) -> HeldOut:
        """The same set with only its first documents (the last may be cut)."""
        return HeldOut(self.name, self.role, tuple(documents), sizes, self.fingerprint, self.digests[: len(documents)])


@dataclass(frozen=True)
class Scores:
    """Summed nats and scored tokens of each window, and each document's bytes."""

    document_W: np.ndarray
    nats_W: np.ndarray
    tokens_W: np.ndarray
    bytes_N: np.ndarray

    @property
    def units(self) -> str:
        """What is resampled: documents, or windows when the documents are too few."""
        return "documents" if len(self.bytes_N) >= FEWEST_DOCUMENTS else "windows"

    def per_unit(self) -> tuple[np.ndarray, np.ndarray]:
        """`(nats, tokens)` of each unit."""
        if self.units == "windows":
            return self.nats_W, self.tokens_W
        count = len(self.bytes_N)
        return (
            np.bincount(self.document_W, self.nats_W, count),
            np.bincount(self.document_W, self.tokens_W, count),
        )

    @property
    def nats(self) -> float:
        """Mean nats per scored token."""
        return float(self.nats_W.sum() / max(self.tokens_W.sum(), 1))

    def summary(self) -> dict[str, float | int]:
        """Nats per token with its 95 % interval, perplexity, bits per byte, and what was counted."""
        nats, tokens = self.per_unit()
        low, high = bootstrap(nats, tokens)
        return {
            "nats": self.nats,
            "low": low,
            "high": high,
            "perplexity": math.exp(min(self.nats, 700.0)),
            "bits_per_byte": float(self.nats_W.sum()) / (math.log(2) * max(int(self.bytes_N.sum()), 1)),
            "tokens": int(self.tokens_W.sum()),
            "bytes": int(self.bytes_N.sum()),
            "documents": len(self.bytes_N),
        }


@dataclass(frozen=True)
class _Window:
    document: int
    begin: int
    end: int
    scored_from: int


def windows(length: int, context: int, document: int = 0) -> Iterator[_Window]:
    """Windows of a document that score each of its tokens but the first exactly once.

    The first window has a full context; each later one advances by half a context and scores its second half.
    """
    end = min(length, context)
    if length >= 2:
        yield _Window(document, 0, end, 1)
    while end < length:
        following = min(length, end + context // 2)
        yield _Window(document, following - context, following, end)
        end = following


@torch.no_grad()
def score(
    model: CausalModel,
    held_out: HeldOut,
    *,
    context: int,
    share: Callable[[list[tuple[int, np.ndarray]]], list[tuple[int, np.ndarray]]] | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Scores:
    """Score every document. With several ranks each scores a part and `share` puts the parts together.

    Every rank runs the same number of batches, as sharded models need.
    """
    todo = [w for i, ids in enumerate(held_out.documents) for w in windows(len(ids), context, i)]
    nats_W = np.zeros(len(todo))
    # Windows of like length go together; the order is stable, so a batch is a function of the documents alone.
    order = sorted(range(len(todo)), key=lambda i: todo[i].end - todo[i].begin)
    batches = list(_batches(order, [w.end - w.begin for w in todo]))
    while len(batches) % ranks:
        batches.append(batches[-1])
    parts: list[tuple[int, np.ndarray]] = []
    was_training = model.training
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        for index in range(rank, len(batches), ranks):
            chosen = [todo[i] for i in batches[index]]
            parts.append((index, _score_batch(model, held_out.documents, chosen)))
    model.train(was_training)
    for index, nats in share(parts) if share else parts:
        nats_W[batches[index]] = nats
    return Scores(
        document_W=np.array([w.document for w in todo], np.int64),
        nats_W=nats_W,
        tokens_W=np.array([w.end - w.scored_from for w in todo], np.int64),
        bytes_N=np.asarray(held_out.bytes, np.int64),
    )


def _batches(order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Groups whose padded size stays within the tokens at once."""
    group: list[int] = []
    for i in order:  # ascending, so the newest is the longest
        if group and (len(group) + 1) * lengths[i] > _TOKENS_AT_ONCE:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def _score_batch(model: CausalModel, documents: Sequence[np.ndarray], chosen: list[_Window]) -> np.ndarray:
    length = max(w.end - w.begin for w in chosen)
    ids = np.zeros((len(chosen), length), np.int64)
    wanted = np.zeros((len(chosen), length), bool)
    for row, w in enumerate(chosen):
        ids[row, : w.end - w.begin] = documents[w.document][w.begin : w.end]
        wanted[row, w.scored_from - w.begin : w.end - w.begin] = True
    device = next(model.parameters()).device
    ids_BT = torch.from_numpy(ids).to(device)
    # Padding stands on the right, where causal attention never looks.
    positions_BT = torch.arange(length, device=device).expand(len(chosen), -1)
    output = model(ids_BT, positions_BT)
    nats_BT = token_nats(output.hidden_BTD[:, :-1], ids_BT[:, 1:], output.head.logits)
    nats = nats_BT.double().cpu().numpy() * wanted[:, 1:]
    return nats.sum(1)


def token_nats(hidden_BTD: Tensor, labels_BT: Tensor, logits: Callable[[Tensor], Tensor]) -> Tensor:
    """`-log p(label)` of each position, of shape (B, T), without holding all logits at once."""
    flat, labels = hidden_BTD.flatten(0, 1), labels_BT.flatten()
    if not len(flat):
        return torch.zeros(labels_BT.shape, device=labels_BT.device)
    width = logits(flat[:1]).shape[-1]
    rows = max(1, _LOGITS_AT_ONCE // width)
    parts = [
        functional.cross_entropy(logits(h).float(), y, reduction="none")
        for h, y in zip(flat.split(rows), labels.split(rows), strict=True)
    ]
    return torch.cat(parts).view(labels_BT.shape)
