"""A preview of training rows: each token of the stage's first micro-batches, as trained, context or padding.

Legend: T positions of a row.

The rows are those of the stage's own micro-batches, and the state of a token follows from the arrays that the model gets: it is
`trained` if it is a label, `padding` if it only fills the row, else `context`. A label without an input position (the last
token of a row) is a token here too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from postgrad.data.layouts.rows import IGNORED
from postgrad.data.loading.batch import Batch
from postgrad.data.loading.loader import Loader, MicroBatchPlan, MixtureRow
from postgrad.data.loading.unpacked_rows import PACKED_LAYOUTS
from postgrad.plan.data_plan import DataPlan
from postgrad.plan.model_plan import ModelPlan
from postgrad.plan.plan import Plan

State = Literal["trained", "context", "padding"]

_WINDOW = 8
"""Tokens that are decoded together, so that the text of the last one follows from the difference."""
_REPLACEMENT_CHARACTER = "\ufffd"
"""The output of a tokenizer for an incomplete UTF-8 sequence."""
_MAX_CONTINUATION_BYTES = 3
"""Bytes of a UTF-8 character after its first."""


@dataclass(frozen=True)
class Token:
    """An input token; `target`: the text of its label (a masked token, a tag) if that differs from the input."""

    id: int
    text: str
    state: State
    target: str | None = None


@dataclass(frozen=True)
class RowSegment:
    """Tokens that attend to one another: a document of a packed row, or the input of an encoder or a decoder."""

    name: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class PreviewRow:
    """A row at its position in the stage; `row_label`: the label of the whole row, if it has one."""

    step: int
    position: int
    row: int
    segments: tuple[RowSegment, ...]
    row_label: str | None = None

    def count(self, state: State) -> int:
        """Number of its tokens in a state."""
        return sum(token.state == state for segment in self.segments for token in segment.tokens)


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
                    "label": row.row_label,
                    "segments": [
                        {"name": segment.name, "tokens": [vars(token) for token in segment.tokens]}
                        for segment in row.segments
                    ],
                }
                for row in self.rows
            ],
        }


def preview_rows(plan: Plan, loader: Loader, count: int) -> list[PreviewSource]:
    """The first `count` rows of each source in the order of the stage, or all of them if there are fewer."""
    previews: dict[int, list[PreviewRow]] = defaultdict(list)
    for step in _find_preview_steps(plan.data, count):
        rows = [
            row
            for micro_batch, batch in zip(loader.micro_batches(step), loader.read_batches(step), strict=True)
            for row in _split_micro_batch(micro_batch, batch)
        ]
        for row, arrays in sorted(rows, key=lambda row: (row[0].position, row[0].first_label)):
            if len(previews[row.source]) < count:
                segments, label = _make_row_segments(plan.model, plan.data.rows[row.source].layout, row, arrays)
                previews[row.source].append(PreviewRow(step, row.position, row.row, segments, label))
    return [
        PreviewSource(
            name,
            rows.layout if loader.packed or rows.layout not in PACKED_LAYOUTS else "unpacked",
            " and ".join(plan.objectives[number].kind for number in indices),
            len(rows),
            tuple(previews[source]),
        )
        for source, (name, rows, indices) in enumerate(
            zip(plan.data.source_names, plan.data.rows, plan.data.objective_indices, strict=True)
        )
    ]


def _find_preview_steps(data: DataPlan, count: int) -> list[int]:
    """The steps that read the first rows of each source, by binary search: a source may start late."""
    steps: set[int] = set()
    for source, num_rows in enumerate(data.row_counts()):
        for number in range(1, min(count, num_rows) + 1):
            low, high = 0, data.steps
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if data.row_counts(middle)[source] >= number else (middle, high)
            steps.add(high)
    return sorted(steps)


def _split_micro_batch(micro_batch: MicroBatchPlan, batch: Batch) -> Iterator[tuple[MixtureRow, dict[str, np.ndarray]]]:
    """Each row of a micro-batch with its arrays, padding included."""
    arrays = {name: tensor.numpy() for name, tensor in batch.inputs.items()} | {"labels": batch.labels.numpy()}
    for i, row in enumerate(micro_batch.mixture_rows):
        yield row, {name: array[i, ...] for name, array in arrays.items()}


def _make_row_segments(
    model: ModelPlan, layout: str, row: MixtureRow, arrays: dict[str, np.ndarray]
) -> tuple[tuple[RowSegment, ...], str | None]:
    """The segments of a row, by its layout, and the label of the whole row."""
    decode = TokenDecoder(model.tokenizer, model.vocab_size)
    names = model.task_layer.labels if model.task_layer else ()
    ids_T, labels = arrays["input_ids"], arrays["labels"]
    if row.document is not None:
        size = len(row.document.row.labels)
        tokens = _predicted_tokens(ids_T[:size], labels[:size], decode)
        padding = tuple(Token(int(token), "", "padding") for token in ids_T[size:])
        return (RowSegment("1", tokens), *([RowSegment("pad", padding)] if padding else [])), None
    if layout in PACKED_LAYOUTS:
        return tuple(_document_segments(ids_T, labels, arrays["position_ids"], decode)), None
    if layout == "masked":
        return (RowSegment("input", _masked_tokens(ids_T, labels, arrays["attention_mask"], decode)),), None
    inputs = _input_tokens(ids_T, arrays["attention_mask"], decode)
    if layout == "pairs":
        outputs = _decoder_tokens(arrays["decoder_input_ids"], labels, decode)
        return (RowSegment("input", inputs), RowSegment("output", outputs)), None
    if layout == "tagged":
        inputs = tuple(
            token if label == IGNORED else replace(token, state="trained", target=names[label])
            for token, label in zip(inputs, labels.tolist(), strict=True)
        )
        return (RowSegment("input", inputs),), None
    return (RowSegment("input", inputs),), _describe_label(labels, names)


def _describe_label(label: np.ndarray, names: Sequence[str]) -> str:
    """A class, several classes or a number as text."""
    if label.ndim:
        return ", ".join(name for name, has in zip(names, label.tolist(), strict=True) if has) or "no label"
    return names[int(label)] if np.issubdtype(label.dtype, np.integer) else f"{float(label):g}"


def _document_segments(
    ids_T: np.ndarray, labels_T: np.ndarray, positions_T: np.ndarray, decode: TokenDecoder
) -> list[RowSegment]:
    """A segment for each document, which begins where the positions restart; one without any label is padding.

    The first one is not: a row may begin with the last token of a document.
    """
    starts = np.flatnonzero(np.diff(positions_T, prepend=-2) != 1).tolist()
    segments: list[RowSegment] = []
    padding: list[Token] = []
    for begin, end in zip(starts, [*starts[1:], len(ids_T)], strict=True):
        if begin and not (labels_T[begin:end] != IGNORED).any():
            padding += [Token(int(token), "", "padding") for token in ids_T[begin:end]]
        else:
            tokens = _predicted_tokens(ids_T[begin:end], labels_T[begin:end], decode)
            segments.append(RowSegment(str(len(segments) + 1), tokens))
    return [*segments, RowSegment("pad", tuple(padding))] if padding else segments


def _predicted_tokens(ids_T: np.ndarray, labels_T: np.ndarray, decode: TokenDecoder) -> tuple[Token, ...]:
    """Tokens that are predicted from those before them, with the last label, which is no input."""
    last = labels_T[-1:] if labels_T[-1] != IGNORED else labels_T[:0]
    ids = [*ids_T.tolist(), *last.tolist()]
    labels = [IGNORED, *labels_T.tolist()]  # the label at a position is the token after it
    return tuple(
        Token(
            token,
            text,
            "context" if label == IGNORED else "trained",
            decode([label])[0] if label not in (IGNORED, token) else None,
        )
        for token, text, label in zip(ids, decode(ids), labels, strict=False)
    )


def _masked_tokens(
    ids_T: np.ndarray, labels_T: np.ndarray, mask_T: np.ndarray, decode: TokenDecoder
) -> tuple[Token, ...]:
    """Input tokens, with the original text of masked ones."""
    tokens = _input_tokens(ids_T, mask_T, decode)
    originals = decode(np.where(labels_T == IGNORED, ids_T, labels_T).tolist())
    return tuple(
        token if label == IGNORED else replace(token, state="trained", target=text.strip() or text)
        for token, label, text in zip(tokens, labels_T.tolist(), originals, strict=True)
    )


def _input_tokens(ids_T: np.ndarray, mask_T: np.ndarray, decode: TokenDecoder) -> tuple[Token, ...]:
    """Tokens of an input; where the mask is 0 they are padding."""
    size = int(mask_T.sum())
    ids = ids_T[:size].tolist()
    tokens = (Token(token, text, "context") for token, text in zip(ids, decode(ids), strict=True))
    return (*tokens, *(Token(token, "", "padding") for token in ids_T[size:].tolist()))


def _decoder_tokens(ids_T: np.ndarray, labels_T: np.ndarray, decode: TokenDecoder) -> tuple[Token, ...]:
    """Tokens of an encoder-decoder's decoder."""
    size = int(np.flatnonzero(labels_T != IGNORED)[-1]) + 1
    padding = (Token(token, "", "padding") for token in ids_T[size:].tolist())
    return (*_predicted_tokens(ids_T[:size], labels_T[:size], decode), *padding)


# --- ids as text ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenDecoder:
    """Decodes ids one by one: special tokens are written out, virtual tokens are `<v1>`, `<v2>` ..."""

    tokenizer: PreTrainedTokenizerBase
    vocabulary: int

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """The text that each id adds; a character in several tokens belongs to the last of them."""
        texts: list[str] = []
        begin = pending = 0
        for i, token in enumerate(ids):
            if token >= len(self.tokenizer):
                texts.append(f"<v{token - self.vocabulary + 1}>" if token >= self.vocabulary else f"<id {token}>")
                begin = pending = i + 1
                continue
            window = max(begin, pending - _WINDOW)
            before, now = self._decode_text(ids[window:pending]), self._decode_text(ids[window : i + 1])
            has_rest = i + 1 < len(ids) and ids[i + 1] < len(self.tokenizer) and i - pending < _MAX_CONTINUATION_BYTES
            if now.endswith(_REPLACEMENT_CHARACTER) and has_rest:
                texts.append("")
                continue
            texts.append(now[len(before) :] if now.startswith(before) else self._decode_text(ids[i : i + 1]))
            pending = i + 1
        return texts

    def _decode_text(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text
