"""Held-out sets: text in overlapping windows, or rows of a task, document by document.

Of a text every token is scored but its first, which has no context (none of the special tokens that a tokenizer adds before a
text is scored, and then all of the text is), never with others the token of unknown text (to predict it is no knowledge), and
never the EOS (it is no part of the text, and some models never saw one). A document longer than the context is scored in
windows that advance by half a context; each window scores only the tokens that no earlier window scored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from postgrad.data.layouts.rows import IGNORED, Row
from postgrad.data.problem_type import ProblemType
from postgrad.data.render.frame import NO_PREFIX, TextPrefix


class ScoredRow(NamedTuple):
    """A row to be scored, and the number of the document that its loss belongs to."""

    document: int
    row: Row


@dataclass(frozen=True)
class HeldOutText:
    """Texts as ids, with the special tokens that the tokenizer adds before them, without EOS."""

    name: str
    role: str
    documents: tuple[np.ndarray, ...]
    bytes: np.ndarray
    fingerprint: str
    digests: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    """Content hash of each document, to pair documents across tokenizers."""
    prefix: TextPrefix = NO_PREFIX
    """Special tokens that each document begins with, and soft prompts that are inserted at the start of each window."""
    unknown_id: int | None = None
    """The token of unknown text, which is scored apart: to predict it is no knowledge of the text."""
    scores_unknown: bool = False
    """Whether the unknown tokens are scored, and nothing else."""
    reserved_positions: int = 0
    """Positions that each window leaves free: the length of the soft prompt of the model it is compared with."""
    pad: int = 0
    problem: None = None
    """The labels are tokens."""
    has_distribution: bool = True
    label_token_ids: tuple[int, ...] = ()
    labels: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def identity(self) -> list[Any]:
        """What its scores depend on besides the model and the context."""
        apart = ["unknown tokens apart"] if self.unknown_tokens else []
        return [self.fingerprint, len(self), asdict(self.prefix), self.reserved_positions, self.unknown_id, *apart]

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return sum(len(d) for d in self.documents) - self.lead * len(self) - self.unknown_tokens

    @property
    def unknown_tokens(self) -> int:
        """Tokens of unknown text."""
        return sum(int((d[self.lead :] == self.unknown_id).sum()) for d in self.documents)

    @property
    def lead(self) -> int:
        """Tokens of each document that are not scored: its special tokens, else its first token."""
        return max(1, len(self.prefix.special_ids))

    def unknown_part(self) -> HeldOutText | None:
        """The same texts with their unknown tokens scored instead; None without any."""
        return replace(self, scores_unknown=True) if self.unknown_tokens and not self.scores_unknown else None

    def take_tokens(self, tokens: int) -> HeldOutText:
        """The first `tokens` tokens, the last document truncated; at least one scored token of one document."""
        ends = np.cumsum([len(d) for d in self.documents])
        count = min(int(np.searchsorted(ends, tokens)) + 1, len(self.documents))
        documents = list(self.documents[:count])
        sizes = self.bytes[:count].copy()
        spare = int(ends[count - 1]) - tokens if count else 0
        if spare > 0:
            cut = len(documents[-1]) - spare
            # Nothing may be left to score, and all of the document may be long.
            if cut <= self.lead and count > 1:
                return self._with_documents(documents[:-1], sizes[:-1])
            cut = max(cut, self.lead + 1)
            sizes[-1] = round(sizes[-1] * cut / len(documents[-1]))
            documents[-1] = documents[-1][:cut]
        return self._with_documents(documents, sizes)

    def _with_documents(self, documents: list[np.ndarray], sizes: np.ndarray) -> HeldOutText:
        """The same set with only its first documents (the last may be cut)."""
        digests = self.digests[: len(documents)]
        return replace(self, documents=tuple(documents), bytes=sizes, digests=digests)

    def iter_rows(self, context: int) -> Iterator[ScoredRow]:
        """The windows of every document as rows."""
        room = context - len(self.prefix.virtual_tokens) - self.reserved_positions
        for i, document in enumerate(self.documents):
            for window in windows(len(document), room, i, self.lead):
                ids = self.prefix.insert(document[window.begin : window.end])
                labels = np.full(len(ids), IGNORED, np.int64)
                fresh = window.end - window.scored_from
                labels[len(ids) - 1 - fresh : -1] = ids[len(ids) - fresh :]
                if self.unknown_id is not None:
                    labels[(labels == self.unknown_id) != self.scores_unknown] = IGNORED
                # Positions are the default ones: padding is on the right, where causal attention does not look.
                yield ScoredRow(i, Row({"input_ids": ids}, labels, int((labels != IGNORED).sum())))


@dataclass(frozen=True)
class HeldOutRows:
    """Rows of a task; `document_R` is the document of each row."""

    name: str
    role: str
    rows: tuple[Row, ...]
    document_R: np.ndarray
    bytes: np.ndarray
    fingerprint: str
    digests: np.ndarray
    tokens_N: np.ndarray
    """Tokens of each document, without its template."""
    problem: ProblemType | None = None
    """The problem type of a classifier; None where the labels are tokens."""
    labels: tuple[str, ...] = ()
    framing: tuple[tuple[int, ...], ...] = ()
    """Template ids around the texts, part of the identity of the rows."""
    pad: int = 0
    """Padding id."""
    label_token_ids: tuple[int, ...] = ()
    """Tokens of the label words of a cloze task."""

    def __len__(self) -> int:
        return len(self.bytes)

    @property
    def identity(self) -> list[Any]:
        """What its scores depend on besides the model and the context."""
        framing = [list(part) for part in self.framing]
        return [self.fingerprint, len(self), framing, self.problem, list(self.label_token_ids), list(self.labels)]

    @property
    def has_distribution(self) -> bool:
        """Whether two models' outputs can be compared as distributions."""
        return self.problem is None or self.problem.has_distribution

    def unknown_part(self) -> None:
        """The rows are scored as they are."""

    @property
    def tokens(self) -> int:
        """Scored labels."""
        return sum(row.label_count for row in self.rows)

    def take_tokens(self, tokens: int) -> HeldOutRows:
        """The first documents, up to about so many tokens; at least one."""
        count = max(1, int(np.searchsorted(np.cumsum(self.tokens_N), tokens, side="right")))
        rows = int(np.searchsorted(self.document_R, count))
        return replace(
            self,
            rows=self.rows[:rows],
            document_R=self.document_R[:rows],
            bytes=self.bytes[:count],
            digests=self.digests[:count],
            tokens_N=self.tokens_N[:count],
        )

    def iter_rows(self, context: int) -> Iterator[ScoredRow]:
        """The rows, which were made for a context already."""
        for document, row in zip(self.document_R.tolist(), self.rows, strict=True):
            yield ScoredRow(document, row)


HeldOutSet = HeldOutText | HeldOutRows


@dataclass(frozen=True)
class _Window:
    document: int
    begin: int
    end: int
    scored_from: int


def windows(length: int, context: int, document: int = 0, lead: int = 1) -> Iterator[_Window]:
    """Windows of a document that score each of its tokens but the first `lead` exactly once.

    The first window has a full context; each later one advances by half a context and scores its second half.
    """
    end = min(length, context)
    if length > lead:
        yield _Window(document, 0, end, lead)
    while end < length:
        following = min(length, end + context // 2)
        yield _Window(document, following - context, following, end)
        end = following
