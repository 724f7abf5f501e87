"""Which penalties can a stage name? A closed union; `anchors.py` makes them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from postgrad.config.quantities import ConfigModel, reject_bool


def _strength_tag(value: Any) -> str:
    """Which is meant, a word or a number, so that a mistake is told of that one alone."""
    return "word" if isinstance(value, str) and not re.fullmatch(r"[\d.eE+-]+", value) else "number"


AnyStrength = Annotated[
    Annotated[Annotated[float, Field(ge=0, le=1e30), BeforeValidator(reject_bool)], Tag("number")]
    | Annotated[Literal["auto"], Tag("word")],
    Discriminator(_strength_tag),
]


class AnchorPenalty(ConfigModel):
    """A quadratic pull of the weights towards a reference: L2-SP; with measured importance EWC or MAS."""

    kind: Literal["anchor"]
    strength: AnyStrength
    """Factor, per trained token; with the Fisher information about old tokens / new tokens. auto: found by a few steps before
    the training."""
    importance: str | None = None
    """A file that the verb `importance` wrote: how much each weight matters; left out: all alike."""
    normalize: bool = False
    """Divide the importance by its mean over the weights that are held, so that strengths compare with those without one."""
    reference: str = "start"
    """What the weights are pulled to: `start`, or a folder or run whose model has the same weights."""
    decoupled: bool = False
    """Pull in the optimizer's step (times the rate, as weight decay does) instead of adding to the loss."""
    targets: list[str] = []
    """Names of weights or modules that are held (`*` and `?` stand for any letters); left out: all that move and that the
    reference has."""
    storage: Literal["auto", "float32", "bfloat16", "mmap"] = "auto"
    """Of reference and importance: auto loses nothing (bfloat16 where it is exact); mmap: the reference is read from the
    model's own files."""

    @model_validator(mode="after")
    def _check_importance(self) -> AnchorPenalty:
        if self.normalize and self.importance is None:
            raise ValueError("`normalize` is about an `importance`, and none is named")
        return self


AnyPenalty = AnchorPenalty
