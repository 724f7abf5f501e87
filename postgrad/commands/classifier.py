"""What does a trained classifier say of new texts? They are read as its training rows were.

Legend: T time, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from postgrad.data.layouts.classification import truncated_lengths
from postgrad.data.layouts.rows import Row
from postgrad.data.loading.batch import collate
from postgrad.data.problem_type import ProblemType
from postgrad.data.tokens.tokenize import token_marks
from postgrad.errors import DataError, ModelError
from postgrad.hardware import machine
from postgrad.models.location import locate_model
from postgrad.models.pretrained import load_tokenizer
from postgrad.models.task import Task
from postgrad.plan.model_inputs import ModelInputs, make_encoder, make_model_inputs
from postgrad.tuning.open_model import open_model

_DEFAULT_CONTEXT = 1024
_BATCH_SIZE = 32

Text = str | tuple[str, str] | Sequence[str]
"""A text, two texts that are judged together, or (for tags) the words of a text."""


@dataclass(frozen=True)
class Classifier:
    """A trained classifier with its tokenizer, in eval mode."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    labels: tuple[str, ...]
    problem: str
    """`class`, `multi`, `number` or `tags`."""
    model_inputs: ModelInputs

    def predict(self, texts: Sequence[Text]) -> list[Any]:
        """What it says of each text: its class, the classes it has, a number, or the tag of each word.

        A word that no token begins with, or that the model has no room for, has None. Raises `DataError` for what is no text.
        """
        return [self._decode(logits, item) for logits, item in zip(self.logits(texts), texts, strict=True)]

    def logits(self, texts: Sequence[Text]) -> list[np.ndarray]:
        """The logits of each text: (C,), or for tags (words, C), not a number where a word has no tag."""
        if isinstance(texts, str):
            raise DataError("a single text", where="predict", expected="a list of texts", hint="predict([text])")
        rows = [self._make_row(text, i) for i, text in enumerate(texts)]
        out: list[np.ndarray] = [np.empty(0)] * len(rows)
        with torch.no_grad():
            for places in _batches([len(row.inputs["input_ids"]) for row in rows]):
                batch = collate([rows[i] for i in places], [0] * len(places), pad_token_id=self.model_inputs.pad_id)
                found = self.model(**batch.to(self.model.device).inputs).logits.float().cpu().numpy()
                for i, logits in zip(places, found, strict=True):
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

    def _decode(self, logits: np.ndarray, item: Text) -> Any:
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
                raise DataError("a text that is not cut into words", where=where, expected="a list of words")
            return self._word_row(text)
        if isinstance(text, str):
            return self._text_row(text, None)
        if len(text) != 2 or not all(isinstance(part, str) for part in text):
            raise DataError(f"{type(text).__name__} of {len(text)}", where=where, expected="a text, or two")
        return self._text_row(text[0], text[1])

    def _text_row(self, first: str, second: str | None) -> Row:
        frame = self.model_inputs.frame
        if second is not None and not self.model_inputs.tokenizer_frame.separator_ids:
            # Where the tokenizer sets nothing between two texts, they are one text of two lines; so they were in training.
            head, both = f"{first}\n", self._encode(f"{first}\n{second}")
            split = int(np.searchsorted(both.stops, len(head), "right"))
            one, two = both.ids[:split], both.ids[split:]
        else:
            one = self._encode(first).ids
            two = self._encode(second).ids if second is not None else np.empty(0, np.int64)
        room = self.model_inputs.length - frame.size(2 if len(two) else 1)
        kept, rest = truncated_lengths(len(one), len(two), room)
        ids_T = frame.wrap(one[:kept], two[:rest] if rest else None)
        inputs = {"input_ids": ids_T, "attention_mask": np.ones(len(ids_T), np.int64)}
        if self.model_inputs.has_token_types:
            types_T = np.zeros(len(ids_T), np.int64)
            types_T[len(ids_T) - rest - len(frame.suffix_ids) :] = 1 if rest else 0
            inputs["token_type_ids"] = types_T
        return Row(inputs, np.zeros((), np.int64), 1)

    def _word_row(self, words: Sequence[str]) -> Row:
        """The words in a row; the labels are the number of the word (from 1) that each token begins."""
        pieces = [piece for i, word in enumerate(words) for piece in ((" ", 0), (word, i + 1))][1:]
        frame, text = self.model_inputs.frame, self._encode(" ".join(words))
        numbers = token_marks(pieces, np.stack([text.starts, text.stops], 1), True)
        kept = self.model_inputs.length - frame.size(1)
        ids_T = frame.wrap(text.ids[:kept])
        labels_T = np.zeros(len(ids_T), np.int64)
        labels_T[len(frame.prefix_ids) :][: len(numbers[:kept])] = numbers[:kept]
        return Row({"input_ids": ids_T, "attention_mask": np.ones(len(ids_T), np.int64)}, labels_T, 1)

    def _encode(self, text: str) -> _EncodedText:
        found = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        places = np.array(found.offsets, np.int64).reshape(-1, 2)
        return _EncodedText(np.array(found.ids, np.int64), places[:, 0], places[:, 1])


@dataclass(frozen=True)
class _EncodedText:
    """Ids of a text, and the characters that each stands for."""

    ids: np.ndarray
    starts: np.ndarray
    stops: np.ndarray


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows of like length go together."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for begin in range(0, len(order), _BATCH_SIZE):
        yield order[begin : begin + _BATCH_SIZE]


def load(name: str, base: str | None = None) -> Classifier:
    """A trained classifier: a run, one of its checkpoints, its model folder, a tuning's folder or an exported one.

    `base`: the model that a tuning's folder sits on, when it is not where that says. Raises `ModelError` for a model that
    decides nothing, and the errors of what cannot be read.
    """
    start = locate_model(name, Path.cwd(), base)
    opened = open_model(start)
    if not opened.task.is_classifier:
        raise ModelError(
            f"{name} decides nothing: it is no classifier",
            where="load",
            expected="a model that was trained with the objective `classify`",
            hint="language models load with transformers, and answer to `postgrad generate`",
        )
    tokenizer = load_tokenizer(start)
    config: Any = AutoConfig.from_pretrained(start.name_or_path)
    context = min(getattr(config, "max_position_embeddings", None) or _DEFAULT_CONTEXT, _DEFAULT_CONTEXT)
    reading = make_model_inputs(
        opened.task, start, tokenizer, make_encoder(tokenizer, int(config.vocab_size)), length=context, seed=0
    )
    own: Any = opened.model.config
    labels = tuple(str(own.id2label[i]) for i in range(own.num_labels))
    tags = opened.task == Task.TAG
    problem = ProblemType.TAGS if tags else ProblemType.from_transformers(own.problem_type, len(labels))
    torch.nn.Module.to(opened.model, machine.default_device())
    return Classifier(opened.model.eval(), tokenizer, labels, problem, reading)
