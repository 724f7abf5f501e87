"""Penalties of a stage: a union. Each names the functions that make it and that fingerprint its files."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from postgrad.config.quantities import Method, reject_bool


def number_or_word(value: Any) -> str:
    """Tag of a word or a number, so that errors concern that alternative alone."""
    return "word" if isinstance(value, str) and not re.fullmatch(r"[\d.eE+-]+", value) else "number"


AnyStrength = Annotated[
    Annotated[Annotated[float, Field(ge=0, le=1e30), BeforeValidator(reject_bool)], Tag("number")]
    | Annotated[Literal["auto"], Tag("word")],
    Discriminator(number_or_word),
]


class PenaltyConfig(Method):
    """What all penalties have."""

    fingerprint_function: ClassVar[str | None] = None
    """`module:function` that fingerprints the files of the penalty, which must not change before a resume."""
    strength: AnyStrength
    """Factor of the penalty per trained token; with the Fisher information about old tokens / new tokens. auto: measured by a
    few probe steps before the training."""


class AnchorPenalty(PenaltyConfig):
    """A quadratic pull of the weights to a reference: L2-SP; EWC or MAS with measured importance."""

    implementation: ClassVar[str] = "postgrad.run.anchors:make_anchor"
    fingerprint_function: ClassVar[str | None] = "postgrad.run.anchors:anchor_fingerprints"
    kind: Literal["anchor"]
    importance: str | None = None
    """A file written by the verb `importance`: the importance of each weight. Default: the same for all weights."""
    normalize: bool = False
    """Divide the importance by its mean over the anchored weights, so that strengths compare with those of plain L2-SP."""
    reference: str = "start"
    """What the weights are pulled to: `start` (the start model), or a folder or run with the same weights."""
    decoupled: bool = False
    """Pull within the optimizer's step (times the learning rate, as weight decay) instead of adding to the loss."""
    targets: list[str] = []
    """Names of the anchored weights or modules, with the wildcards `*` and `?`. Default: all trained weights that the
    reference has."""
    storage: Literal["auto", "float32", "bfloat16", "mmap"] = "auto"
    """Storage of reference and importance. auto: without loss (bfloat16 where exact); mmap: the reference is read from the
    model's own files."""

    @model_validator(mode="after")
    def _check_importance(self) -> AnchorPenalty:
        if self.normalize and self.importance is None:
            raise ValueError("`normalize` requires `importance`")
        return self


AnyPenalty = AnchorPenalty
"""The union; a further penalty is added with `|`, and then with `Field(discriminator="kind")`."""
