"""What does the model see? Rows of each source as the loader hands them over, each token with what becomes of it.

Legend: T positions of a row.

Nothing is made for show: the rows are those of the stage's own micro-batches, from step 1 on, and what is said of a token is
read off the arrays that the model is called with. A token is `trained` when it is a label, `padding` when it only fills a row
up, else `context`. What is trained and stands in no input (the last token of a row) is a token here too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from postgrad.data.layouts.rows import IGNORED
from postgrad.data.loading.batch import Batch
from postgrad.data.loading.loader import Loader, MixtureRow
from postgrad.plan.plan import Plan

State = Literal["trained", "context", "padding"]

_WINDOW = 8
"""Tokens that are decoded together to see what the last of them adds."""
_REPLACEMENT_CHARACTER = "\ufffd"
"""What a tokenizer writes for a character of which bytes are missing."""
_MAX_CONTINUATION_BYTES = 3
"""A character of UTF-8 has as many bytes behind its first."""


@dataclass(frozen=True)
class Token:
    """A token as it is read; `said`: what is to be said in its place or of it, where that is something else."""

    id: int
    text: str
    state: State
    said: str | None = None


@dataclass(frozen=True)
class RowSegment:
    """Tokens that see one another: a document of a packed row, what an encoder reads, what a decoder writes."""

    name: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class PreviewRow:
    """A row where the stage reads it; `decision`: the label of the whole row, where it has one."""

    step: int
    position: int
    row: int
    segments: tuple[RowSegment, ...]
    row_label: str | None = None

    def count(self, state: State) -> int:
        """How many of its tokens are trained, context or padding."""
        return sum(token.state == state for strand in self.segments for token in strand.tokens)


@dataclass(frozen=True)
class PreviewSource:
    """Rows of a source in the order in which the stage reads them."""

    name: str
    layout: str
    objective: str
    available: int
    rows: tuple[PreviewRow, ...]

    def as_record(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "source": self.name,
            "layout": self.layout,
            "objective": self.objective,
            "available": self.available,
            "rows": [
                {
                    "step": row.step,
                    "position": row.position,
                    "row": row.row,
                    **{state: row.count(state) for state in ("trained", "context", "padding")},
                    "decision": row.row_label,
                    "strands": [
                        {"name": strand.name, "tokens": [vars(token) for token in strand.tokens]}
                        for strand in row.segments
                    ],
                }
                for row in self.rows
            ],
        }


def preview_rows(plan: Plan, loader: Loader, count: int) -> list[PreviewSource]:
    """The first `count` rows of each source that a stage reads, or as many as it reads of one."""
    found: dict[int, list[PreviewRow]] = defaultdict(list)
    for step in _find_preview_steps(plan, count):
        rows = [
            row
            for part in zip(loader.micro_batches(step), loader.read_batches(step), strict=True)
            for row in _split_micro_batch(*part)
        ]
        for draw, arrays in sorted(rows, key=lambda row: row[0].position):
            if len(found[draw.source]) < count:
                strands, decision = _make_row_segments(plan, draw.source, arrays)
                found[draw.source].append(PreviewRow(step, draw.position, draw.row, strands, decision))
    return [
        PreviewSource(name, rows.layout, _format_objectives(plan, source), len(rows), tuple(found[source]))
        for source, (name, rows) in enumerate(zip(plan.data.source_names, plan.data.rows, strict=True))
    ]


def _format_objectives(plan: Plan, source: int) -> str:
    """What weighs the rows of a source."""
    return " and ".join(plan.objectives[number].kind for number in plan.objective_indices[source])


def _find_preview_steps(plan: Plan, count: int) -> list[int]:
    """The steps in which the first rows of every source are read, found by counting: a source may come in late."""
    first, block = plan.stage.data.skip_steps, plan.data.mixture.block_size
    before = plan.data.mixture.counts(first * block)
    steps: set[int] = set()
    for source, planned in enumerate(plan.row_counts()):
        for number in range(1, min(count, planned) + 1):
            low, high = 0, plan.steps
            while high - low > 1:
                middle = (low + high) // 2
                enough = plan.data.mixture.counts((first + middle) * block)[source] - before[source] >= number
                low, high = (low, middle) if enough else (middle, high)
            steps.add(high)
    return sorted(steps)


def _split_micro_batch(micro_batch: Any, batch: Batch) -> list[tuple[MixtureRow, dict[str, np.ndarray]]]:
    """Each row of a micro-batch with its arrays, padding included."""
    arrays = {name: tensor.numpy() for name, tensor in batch.inputs.items()} | {"labels": batch.labels.numpy()}
    return [(draw, {name: array[i, ...] for name, array in arrays.items()}) for i, draw in enumerate(micro_batch.draws)]


def _make_row_segments(
    plan: Plan, source: int, arrays: dict[str, np.ndarray]
) -> tuple[tuple[RowSegment, ...], str | None]:
    """What stands in a row, by its layout, and the label of the whole row."""
    spell = TokenDecoder(plan.model.tokenizer, plan.model.vocab_size)
    names = plan.model.task_layer.labels if plan.model.task_layer else ()
    ids_T, labels = arrays["input_ids"], arrays["labels"]
    match plan.data.rows[source].layout:
        case "packed" | "prefix":
            return tuple(_document_segments(ids_T, labels, arrays["position_ids"], spell)), None
        case "masked":
            return (RowSegment("reads", _masked_tokens(ids_T, labels, arrays["attention_mask"], spell)),), None
        case "pairs":
            reads = _input_tokens(ids_T, arrays["attention_mask"], spell)
            return (
                RowSegment("reads", reads),
                RowSegment("writes", _decoder_tokens(arrays["decoder_input_ids"], labels, spell)),
            ), None
        case "tagged":
            tokens = _input_tokens(ids_T, arrays["attention_mask"], spell)
            tagged = tuple(
                token if label == IGNORED else replace(token, state="trained", said=names[label])
                for token, label in zip(tokens, labels.tolist(), strict=True)
            )
            return (RowSegment("reads", tagged),), None
        case _:
            return (RowSegment("reads", _input_tokens(ids_T, arrays["attention_mask"], spell)),), _describe_label(
                labels, names
            )


def _describe_label(label: np.ndarray, names: Sequence[str]) -> str:
    """A class, several classes or a number in words."""
    if label.ndim:
        return ", ".join(name for name, has in zip(names, label.tolist(), strict=True) if has) or "none of them"
    return names[int(label)] if np.issubdtype(label.dtype, np.integer) else f"{float(label):g}"


def _document_segments(
    ids_T: np.ndarray, labels_T: np.ndarray, positions_T: np.ndarray, decode: TokenDecoder
) -> list[RowSegment]:
    """A strand for each document: where positions do not go on, another one begins. What has no label at all is padding,
    but for a row's beginning, where the end of a document may stand alone."""
    starts = np.flatnonzero(np.diff(positions_T, prepend=-2) != 1).tolist()
    strands: list[RowSegment] = []
    padding: list[Token] = []
    for begin, end in zip(starts, [*starts[1:], len(ids_T)], strict=True):
        if begin and not (labels_T[begin:end] != IGNORED).any():
            padding += [Token(int(token), "", "padding") for token in ids_T[begin:end]]
        else:
            strands.append(
                RowSegment(str(len(strands) + 1), _predicted_tokens(ids_T[begin:end], labels_T[begin:end], decode))
            )
    return [*strands, RowSegment("pad", tuple(padding))] if padding else strands


def _predicted_tokens(ids_T: np.ndarray, labels_T: np.ndarray, decode: TokenDecoder) -> tuple[Token, ...]:
    """Tokens of which each is to be predicted from those before it, the last label included, which is not read."""
    last = labels_T[-1:] if labels_T[-1] != IGNORED else labels_T[:0]
    ids = [*ids_T.tolist(), *last.tolist()]
    asked = [IGNORED, *labels_T.tolist()]
    return tuple(
        Token(
            token,
            text,
            "context" if label == IGNORED else "trained",
            decode([label])[0] if label not in (IGNORED, token) else None,
        )
        for token, text, label in zip(ids, decode(ids), asked, strict=False)
    )


def _masked_tokens(
    ids_T: np.ndarray, labels_T: np.ndarray, mask_T: np.ndarray, decode: TokenDecoder
) -> tuple[Token, ...]:
    """Tokens as they are read; where one is asked for, what it was."""
    tokens = _input_tokens(ids_T, mask_T, decode)
    was = decode(np.where(labels_T == IGNORED, ids_T, labels_T).tolist())
    return tuple(
        token if label == IGNORED else replace(token, state="trained", said=text.strip() or text)
        for token, label, text in zip(tokens, labels_T.tolist(), was, strict=True)
    )


def _input_tokens(ids_T: np.ndarray, mask_T: np.ndarray, decode: TokenDecoder) -> tuple[Token, ...]:
    """Tokens that are only read; where the mask is 0 they are padding."""
    size = int(mask_T.sum())
    read = tuple(
        Token(token, text, "context")
        for token, text in zip(ids_T[:size].tolist(), decode(ids_T[:size].tolist()), strict=True)
    )
    return (*read, *(Token(token, "", "padding") for token in ids_T[size:].tolist()))


def _decoder_tokens(ids_T: np.ndarray, labels_T: np.ndarray, decode: TokenDecoder) -> tuple[Token, ...]:
    """What a decoder of its own reads and is to say."""
    size = int(np.flatnonzero(labels_T != IGNORED)[-1]) + 1
    padding = (Token(token, "", "padding") for token in ids_T[size:].tolist())
    return (*_predicted_tokens(ids_T[:size], labels_T[:size], decode), *padding)


# --- ids as text ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenDecoder:
    """The text of each of some ids in a row. Special tokens are written out, the places of trained vectors are `<v1>` ..."""

    tokenizer: PreTrainedTokenizerBase
    vocabulary: int

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """What each token adds to the text; of a character in several tokens all of it stands at the last of them."""
        out: list[str] = []
        begin = waiting = 0
        for i, token in enumerate(ids):
            if token >= len(self.tokenizer):
                out.append(f"<v{token - self.vocabulary + 1}>" if token >= self.vocabulary else f"<id {token}>")
                begin = waiting = i + 1
                continue
            window = max(begin, waiting - _WINDOW)
            before, now = self._decode_text(ids[window:waiting]), self._decode_text(ids[window : i + 1])
            goes_on = i + 1 < len(ids) and ids[i + 1] < len(self.tokenizer) and i - waiting < _MAX_CONTINUATION_BYTES
            if now.endswith(_REPLACEMENT_CHARACTER) and goes_on:
                out.append("")
                continue
            out.append(now[len(before) :] if now.startswith(before) else self._decode_text(ids[i : i + 1]))
            waiting = i + 1
        return out

    def _decode_text(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text
