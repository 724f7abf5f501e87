"""Load a trained model: any run, checkpoint or adapter as a transformers model, or a classifier that predicts labels.

Legend: T time, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from postgrad.data.layouts.classification import truncated_lengths
from postgrad.data.layouts.rows import Row
from postgrad.data.loading.batch import collate
from postgrad.data.problem_type import ProblemType
from postgrad.data.tokens.encode import token_marks
from postgrad.errors import DataError, ModelError
from postgrad.hardware import machine
from postgrad.models.location import locate_model
from postgrad.models.model_sizes import load_model_sizes
from postgrad.models.pretrained import load_tokenizer
from postgrad.models.task import Task
from postgrad.plan.model_inputs import ModelInputs, make_encoder, make_model_inputs
from postgrad.tuning.open_model import open_model

_DEFAULT_CONTEXT = 1024
_BATCH_SIZE = 32

Text = str | tuple[str, str] | Sequence[str]
"""A text, a pair of texts, or (for tags) the words of a text."""


Prediction = str | float | list[str] | list[str | None]
"""A class, a number, the classes of a text, or the tag of each word."""


@dataclass(frozen=True)
class Classifier:
    """A trained classifier with its tokenizer, in eval mode."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    labels: tuple[str, ...]
    problem: ProblemType
    model_inputs: ModelInputs

    def predict(self, texts: Sequence[Text]) -> list[Prediction]:
        """The prediction for each text: its class, its classes, a number, or the tag of each word.

        A word without a token of its own, or beyond the context, has None. Raises `DataError` for an item that is no text.
        """
        return [self._decode(logits) for logits in self.logits(texts)]

    def logits(self, texts: Sequence[Text]) -> list[np.ndarray]:
        """The logits of each text: (C,), or for tags (words, C), NaN where a word has no tag."""
        if isinstance(texts, str):
            raise DataError(
                "predict got a single text", where="predict", expected="a list of texts", hint="predict([text])"
            )
        rows = [self._make_row(text, i) for i, text in enumerate(texts)]
        out: list[np.ndarray] = [np.empty(0)] * len(rows)
        with torch.no_grad():
            for indices in _batches([len(row.inputs["input_ids"]) for row in rows]):
                batch = collate([rows[i] for i in indices], [0] * len(indices), pad_token_id=self.model_inputs.pad_id)
                batch_logits = self.model(**batch.to(self.model.device).inputs).logits.float().cpu().numpy()
                for i, logits in zip(indices, batch_logits, strict=True):
                    out[i] = (
                        self._word_logits(logits, rows[i].labels, len(texts[i]))
                        if self.problem == ProblemType.TAGS
                        else logits
                    )
        return out

    def _word_logits(self, logits_TC: np.ndarray, word_T: np.ndarray, words: int) -> np.ndarray:
        out = np.full((words, logits_TC.shape[1]), np.nan, np.float32)
        begins = np.flatnonzero(word_T)
        out[word_T[begins] - 1] = logits_TC[begins]
        return out

    def _decode(self, logits: np.ndarray) -> Prediction:
        match self.problem:
            case ProblemType.NUMBER:
                return float(logits[0])
            case ProblemType.MULTI_LABEL:
                return [label for label, logit in zip(self.labels, logits, strict=True) if logit > 0]
            case ProblemType.TAGS:
                return [None if np.isnan(of_C).any() else self.labels[int(of_C.argmax())] for of_C in logits]
        return self.labels[int(logits.argmax())]

    def _make_row(self, text: Text, number: int) -> Row:
        where = f"texts[{number}]"
        if self.problem == ProblemType.TAGS:
            if isinstance(text, str) or not all(isinstance(word, str) for word in text):
                raise DataError("a text that is not split into words", where=where, expected="a list of words")
            return self._word_row(text)
        if isinstance(text, str):
            return self._text_row(text, None)
        if len(text) != 2 or not all(isinstance(part, str) for part in text):
            raise DataError(f"{type(text).__name__} of {len(text)}", where=where, expected="a text, or two")
        return self._text_row(text[0], text[1])

    def _text_row(self, first: str, second: str | None) -> Row:
        frame = self.model_inputs.frame
        if second is not None and not self.model_inputs.tokenizer_frame.separator_ids:
            # A tokenizer without a separator: training rows join a pair with a newline.
            head, both = f"{first}\n", self._encode(f"{first}\n{second}")
            split = int(np.searchsorted(both.stops, len(head), "right"))
            one, two = both.ids[:split], both.ids[split:]
        else:
            one = self._encode(first).ids
            two = self._encode(second).ids if second is not None else np.empty(0, np.int64)
        room = self.model_inputs.length - frame.size(2 if len(two) else 1)
        first_length, second_length = truncated_lengths(len(one), len(two), room)
        ids_T = frame.wrap(one[:first_length], two[:second_length] if second_length else None)
        inputs = {"input_ids": ids_T, "attention_mask": np.ones(len(ids_T), np.int64)}
        if self.model_inputs.has_token_types:
            types_T = np.zeros(len(ids_T), np.int64)
            types_T[len(ids_T) - second_length - len(frame.suffix_ids) :] = 1 if second_length else 0
            inputs["token_type_ids"] = types_T
        return Row(inputs, np.zeros((), np.int64), 1)

    def _word_row(self, words: Sequence[str]) -> Row:
        """A row of words; a token's label is the number of the word (from 1) that it begins, or 0."""
        pieces = [piece for i, word in enumerate(words) for piece in ((" ", 0), (word, i + 1))][1:]
        frame, text = self.model_inputs.frame, self._encode(" ".join(words))
        numbers = token_marks(pieces, np.stack([text.starts, text.stops], 1), True)
        room = self.model_inputs.length - frame.size(1)
        ids_T = frame.wrap(text.ids[:room])
        labels_T = np.zeros(len(ids_T), np.int64)
        labels_T[len(frame.prefix_ids) :][: len(numbers[:room])] = numbers[:room]
        return Row({"input_ids": ids_T, "attention_mask": np.ones(len(ids_T), np.int64)}, labels_T, 1)

    def _encode(self, text: str) -> _EncodedText:
        encoding = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        return _EncodedText(np.array(encoding.ids, np.int64), offsets[:, 0], offsets[:, 1])


@dataclass(frozen=True)
class _EncodedText:
    """Ids of a text, and the span of characters of each."""

    ids: np.ndarray
    starts: np.ndarray
    stops: np.ndarray


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of rows in batches of similar length."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for begin in range(0, len(order), _BATCH_SIZE):
        yield order[begin : begin + _BATCH_SIZE]


@dataclass(frozen=True)
class TrainedModel:
    """A transformers model in eval mode, adapters attached, with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    """`causal`, `masked`, `text-to-text`, `classify` or `tag`."""
    virtual_tokens: tuple[int, ...]
    """Ids of a soft prompt that go before every text."""


def load_model(model: str, base: str | None = None) -> TrainedModel:
    """Load a run, one of its checkpoints, a model or adapter folder, or a Hub name.

    `base`: the base model of an adapter's folder, if it has moved. Raises `ModelError` for a model that cannot be loaded.
    """
    start = locate_model(str(model), Path.cwd(), base)
    opened = open_model(start)
    torch.nn.Module.to(opened.model, machine.default_device())
    virtual_tokens = (*opened.frame.outer_ids, *opened.frame.prefix_ids)
    return TrainedModel(opened.model.eval(), load_tokenizer(start), opened.task, virtual_tokens)


def load_classifier(model: str, base: str | None = None) -> Classifier:
    """Load a trained classifier: a run, one of its checkpoints, a model or adapter folder, or an exported one.

    `base`: the base model of an adapter's folder, if it has moved. Raises `ModelError` for a model that is no classifier.
    """
    start = locate_model(str(model), Path.cwd(), base)
    opened = open_model(start)
    if not opened.task.is_classifier:
        raise ModelError(
            f"{model} is not a classifier",
            where="load_classifier",
            expected="a model that was trained with the objective `classify`",
            hint="load a language model with postgrad.load_model",
        )
    tokenizer = load_tokenizer(start)
    sizes = load_model_sizes(start)
    context = sizes.limit_context(_DEFAULT_CONTEXT)
    model_inputs = make_model_inputs(
        opened.task, start, tokenizer, make_encoder(tokenizer, sizes.vocab_size), length=context, seed=0
    )
    own_config: Any = opened.model.config
    labels = tuple(str(own_config.id2label[i]) for i in range(own_config.num_labels))
    is_tagger = opened.task == Task.TAG
    problem = ProblemType.TAGS if is_tagger else ProblemType.from_transformers(own_config.problem_type, len(labels))
    torch.nn.Module.to(opened.model, machine.default_device())
    return Classifier(opened.model.eval(), tokenizer, labels, problem, model_inputs)
