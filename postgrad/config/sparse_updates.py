"""Which ways of moving less at an update can a stage name? `build.py` makes them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from postgrad.config.quantities import ConfigModel, Share, reject_bool

PositiveShare = Annotated[Share, Field(gt=0)]


class MomentumUpdate(ConfigModel):
    """Of each matrix only the numbers with the largest momentum move (MoFO); vectors move whole."""

    kind: Literal["mofo"]
    share: PositiveShare = 0.1
    """Of the numbers of a matrix; published: 5 to 20 %."""


class MagnitudeUpdate(ConfigModel):
    """Of each linear layer only the rows with the largest outputs on the step's text move (MIGU); the rest moves whole."""

    kind: Literal["migu"]
    share: PositiveShare = 0.3
    """Of the rows of a layer; published: 30 %."""


AnyUpdate = Annotated[MomentumUpdate | MagnitudeUpdate, Field(discriminator="kind")]


class LossAdaptive(ConfigModel):
    """A lower rate where the loss is higher (FINCH): the schedule's times
    min(1, initial_share * sqrt(first loss / mean loss))."""

    initial_share: PositiveShare = 0.5
    """The share of the schedule's rate that the first step takes; it rises to all of it as the loss falls."""
    smoothing: Annotated[float, Field(ge=0, lt=1), BeforeValidator(reject_bool)] = 0.9
    """How much of the mean loss of the steps before goes into that of the next."""
