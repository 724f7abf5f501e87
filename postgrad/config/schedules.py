"""Which learning-rate schedules can a stage name? A closed union; `rates.py` makes functions of the step of them."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

from pydantic import Field, model_validator

from postgrad.config.quantities import ConfigModel, Length, Rate


def _check_descending(**rates: float) -> None:
    """Refuse rates that do not fall in the order they are given: a swapped pair is a mistake, not a wish."""
    for (above, high), (below, low) in itertools.pairwise(rates.items()):
        if low > high:
            raise ValueError(f"`{below}` ({low:g}) lies above `{above}` ({high:g})")


class ConstantSchedule(ConfigModel):
    """Warm-up, then one rate."""

    kind: Literal["constant"]
    peak: Rate
    """The rate."""
    warmup: Length = "0%"
    """From zero to `peak`."""


class DecaySchedule(ConfigModel):
    """Warm-up to `peak`, then a decay to `floor` over the rest: re-warming and re-decaying when a model is continued."""

    kind: Literal["rewarm", "cosine", "linear", "inverse-sqrt", "exponential", "1-sqrt"]
    """`rewarm` and `cosine` are the same curve."""
    peak: Rate
    """The highest rate."""
    floor: Annotated[float, Field(ge=0)]
    """The rate at the stage's last step."""
    warmup: Length = "1%"
    """From `start` to `peak`."""
    start: Annotated[float, Field(ge=0)] = 0.0
    """The rate the warm-up starts from."""

    @model_validator(mode="after")
    def _check_rates(self) -> DecaySchedule:
        _check_descending(peak=self.peak, floor=self.floor)
        return self


class FromFloorSchedule(ConfigModel):
    """No warm-up: start at the pre-training's final rate and decay on (Parmar et al. 2024)."""

    kind: Literal["from-floor"]
    start: Rate
    """The rate of the first steps."""
    floor: Annotated[float, Field(ge=0)]
    """The rate at the stage's last step."""
    shape: Literal["cosine", "linear", "exponential", "1-sqrt", "inverse-sqrt"] = "cosine"
    """Of the decay."""

    @model_validator(mode="after")
    def _check_rates(self) -> FromFloorSchedule:
        _check_descending(start=self.start, floor=self.floor)
        return self


class InfiniteSchedule(ConfigModel):
    """Warm-up, cooldown, constant, anneal: no budget has to be fixed beforehand (Ibrahim et al. 2024)."""

    kind: Literal["infinite"]
    peak: Rate
    """The highest rate."""
    constant: Rate
    """The rate of the constant phase."""
    floor: Rate
    """The rate at the end of the anneal."""
    warmup: Length = "1%"
    """From zero to `peak`."""
    cooldown: Length = "60%"
    """Length of the cooldown, from the end of the warm-up."""
    constant_until: Length = "85%"
    """Where the constant phase ends and the anneal begins, from the stage's first step; 100%: no anneal."""
    cooldown_shape: Literal["cosine", "inverse-sqrt"] = "cosine"
    """From `peak` to `constant`."""
    timescale: Annotated[float, Field(gt=0)] = 10.0
    """How bent the inverse-sqrt cooldown is."""

    @model_validator(mode="after")
    def _check_rates(self) -> InfiniteSchedule:
        _check_descending(peak=self.peak, constant=self.constant, floor=self.floor)
        return self


class WsdSchedule(ConfigModel):
    """Warm-up, stable, decay at the end (Hu et al. 2024)."""

    kind: Literal["wsd"]
    peak: Rate
    """The rate of the stable phase."""
    floor: Rate
    """The rate at the stage's last step."""
    warmup: Length = "1%"
    """From zero to `peak`."""
    decay: Length = "10%"
    """Length of the decay at the stage's end."""
    shape: Literal["1-sqrt", "linear", "cosine", "exponential", "inverse-linear"] = "1-sqrt"
    """Of the decay."""

    @model_validator(mode="after")
    def _check_rates(self) -> WsdSchedule:
        _check_descending(peak=self.peak, floor=self.floor)
        return self


class AnnealSchedule(ConfigModel):
    """Only the decay: branched from a checkpoint of a constant phase, starting at the rate that held there."""

    kind: Literal["anneal"]
    floor: Rate
    """The rate at the stage's last step."""
    start: Rate | None = None
    """Left out: the rate at the checkpoint the stage starts from."""
    shape: Literal["exponential", "1-sqrt", "linear", "cosine", "inverse-linear"] = "exponential"
    """Of the decay."""


class SchedulePiece(ConfigModel):
    """One piece of a schedule put together by hand."""

    shape: Literal["constant", "linear", "cosine", "inverse-sqrt", "exponential", "1-sqrt", "inverse-linear"]
    """Of the piece."""
    start: Annotated[float, Field(ge=0)]
    """The rate it begins with."""
    end: Annotated[float, Field(ge=0)] | None = None
    """The rate it ends with; a constant piece has none."""
    length: Length | None = None
    """The last piece may leave it out and takes the rest."""


class PiecewiseSchedule(ConfigModel):
    """Pieces one after the other."""

    kind: Literal["piecewise"]
    pieces: Annotated[list[SchedulePiece], Field(min_length=1)]
    """In their order."""

    @model_validator(mode="after")
    def _check_pieces(self) -> PiecewiseSchedule:
        for piece in self.pieces:
            if (piece.shape != "constant") == (piece.end is None):
                raise ValueError("a constant piece has no `end`; every other piece has one")
        if any(piece.length is None for piece in self.pieces[:-1]):
            raise ValueError("only the last piece may leave out its `length`")
        return self


AnySchedule = Annotated[
    ConstantSchedule
    | DecaySchedule
    | FromFloorSchedule
    | InfiniteSchedule
    | WsdSchedule
    | AnnealSchedule
    | PiecewiseSchedule,
    Field(discriminator="kind"),
]
