"""What a model does: language modelling of three kinds, or classification of texts or words."""

from __future__ import annotations

from enum import StrEnum


class Task(StrEnum):
    """The task of a model, which decides the layer on its backbone. A task is written by its value in records and folders."""

    CAUSAL = "causal"
    MASKED = "masked"
    TEXT_TO_TEXT = "text-to-text"
    CLASSIFY = "classify"
    TAG = "tag"

    @property
    def generates(self) -> bool:
        """Whether the model generates text."""
        return self in (Task.CAUSAL, Task.TEXT_TO_TEXT)

    @property
    def is_classifier(self) -> bool:
        """Whether a task layer classifies texts or words."""
        return self in (Task.CLASSIFY, Task.TAG)

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether prompt and answer go through separate stacks."""
        return self == Task.TEXT_TO_TEXT

    @property
    def description(self) -> str:
        """The kind of model, for messages."""
        return _DESCRIPTIONS[self]

    @property
    def architecture(self) -> str:
        """The shortest name of the kind of model, for messages."""
        return _ARCHITECTURES[self]


_DESCRIPTIONS = {
    Task.CAUSAL: "a causal language model",
    Task.MASKED: "a masked language model",
    Task.TEXT_TO_TEXT: "an encoder-decoder language model",
    Task.CLASSIFY: "a text classifier",
    Task.TAG: "a token classifier",
}
_ARCHITECTURES = {
    Task.CAUSAL: "a decoder",
    Task.MASKED: "an encoder",
    Task.TEXT_TO_TEXT: "an encoder-decoder",
    Task.CLASSIFY: "a classifier",
    Task.TAG: "a token classifier",
}
