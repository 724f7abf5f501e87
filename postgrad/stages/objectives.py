"""Which objectives can a stage name? A closed union; `build.py` makes the losses, `layouts.py` the rows they are taken on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from postgrad.stages.amounts import Part, Positive, Share

Weight = Annotated[float, Field(gt=0)]


class Objective(Part):
    """What a token, or a label, of some sources is worth."""

    weight: Weight = 1.0
    """Factor of the loss."""
    on: list[str] = []
    """Names of the sources it is taken on; left out: all that no other objective names."""


class NextTokenObjective(Objective):
    """Next-token prediction, on running text or on the answers of examples."""

    kind: Literal["next-token"]
    train_on: Literal["answers", "all"] = "answers"
    """Of rows that have answers (chats, instructions, completions): only those, or every token. Text is trained whole."""
    answers: Literal["all", "last"] = "all"
    """Of a conversation: every answer, or the last one alone, which asks less of a chat template."""
    too_long: Literal["cut-context", "cut-end", "drop"] = "cut-context"
    """What becomes of an example longer than a row; what is cut or dropped is counted."""


class PrefixLMObjective(Objective):
    """Prefix language modelling (Raffel et al. 2020): a decoder reads a prefix in both directions, and is asked for the rest.

    Of examples the prompt is the prefix and the last answer is asked for; running text is cut at a place that is drawn.
    """

    kind: Literal["prefix-lm"]
    too_long: Literal["cut-context", "cut-end", "drop"] = "cut-context"
    """What becomes of an example longer than a row; what is cut or dropped is counted."""


class MaskedObjective(Objective):
    """Masked language modelling for encoders (Devlin et al. 2019): of the chosen tokens 80 % are masked, 10 % replaced."""

    kind: Literal["masked"]
    share: Annotated[Share, Field(gt=0, lt=1)] = 0.15
    """Share of a row's tokens that are chosen."""
    whole_words: bool = False
    """Choose whole words, not pieces of them."""


class SpanCorruptionObjective(Objective):
    """Span corruption for encoder-decoders (Raffel et al. 2020): spans leave the input and are written by the decoder."""

    kind: Literal["span-corruption"]
    density: Annotated[Share, Field(gt=0, lt=1)] = 0.15
    """Share of a row's tokens that leave the input."""
    mean_span: Annotated[float, Field(ge=1)] = 3.0
    """Mean length of a span."""


class TextToTextObjective(Objective):
    """Every task as text to text: the source is read, the target written by the decoder of an encoder-decoder."""

    kind: Literal["text-to-text"]
    target_length: Positive = 128
    """Positions of the decoder."""


class ClassifyObjective(Objective):
    """A task layer on the backbone: classes, several classes at once, a number, or tags of words."""

    kind: Literal["classify"]
    labels: list[str] | None = None
    """The classes; left out: those that occur in the training rows."""
    problem: Literal["auto", "class", "multi", "number", "tags"] = "auto"
    """auto: by the rows: tags for words, multi for lists of labels, a number for fractions, else one class."""


AnyObjective = Annotated[
    NextTokenObjective
    | PrefixLMObjective
    | MaskedObjective
    | SpanCorruptionObjective
    | TextToTextObjective
    | ClassifyObjective,
    Field(discriminator="kind"),
]
