"""Learning-rate schedules of a stage: a closed union. Each names the function that turns it into `step -> learning rate`."""

from __future__ import annotations

import itertools
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from postgrad.config.quantities import ConfigModel, Length, Method, Rate


def _check_descending(**rates: float) -> None:
    """Refuse rates that do not fall in the order given: two swapped rates are a mistake."""
    for (above, high), (below, low) in itertools.pairwise(rates.items()):
        if low > high:
            raise ValueError(f"`{below}` ({low:g}) is above `{above}` ({high:g})")


class ConstantSchedule(Method):
    """Warm-up, then a constant rate."""

    implementation: ClassVar[str] = "postgrad.plan.lr_schedule:make_constant"
    kind: Literal["constant"]
    peak: Rate
    """The constant rate."""
    warmup: Length = "0%"
    """Linear warm-up from zero to `peak`."""


class DecaySchedule(Method):
    """Warm-up to `peak`, then decay to `floor` over the rest: re-warming and re-decaying when a model is continued."""

    implementation: ClassVar[str] = "postgrad.plan.lr_schedule:make_decay"
    kind: Literal["rewarm", "cosine", "linear", "inverse-sqrt", "exponential", "1-sqrt"]
    """`rewarm` and `cosine` are the same curve."""
    peak: Rate
    """The highest rate."""
    floor: Annotated[float, Field(ge=0)]
    """The rate at the last step."""
    warmup: Length = "1%"
    """Linear warm-up from `start` to `peak`."""
    start: Annotated[float, Field(ge=0)] = 0.0
    """The rate at the start of the warm-up."""

    @model_validator(mode="after")
    def _check_rates(self) -> DecaySchedule:
        _check_descending(peak=self.peak, floor=self.floor)
        return self


class FromFloorSchedule(Method):
    """Decay without warm-up from the final rate of the pre-training (Parmar et al. 2024)."""

    implementation: ClassVar[str] = "postgrad.plan.lr_schedule:make_from_floor"
    kind: Literal["from-floor"]
    start: Rate
    """The rate of the first step."""
    floor: Annotated[float, Field(ge=0)]
    """The rate at the last step."""
    shape: Literal["cosine", "linear", "exponential", "1-sqrt", "inverse-sqrt"] = "cosine"
    """Shape of the decay."""

    @model_validator(mode="after")
    def _check_rates(self) -> FromFloorSchedule:
        _check_descending(start=self.start, floor=self.floor)
        return self


class InfiniteSchedule(Method):
    """Warm-up, cooldown, constant, anneal: the budget need not be fixed in advance (Ibrahim et al. 2024)."""

    implementation: ClassVar[str] = "postgrad.plan.lr_schedule:make_infinite"
    kind: Literal["infinite"]
    peak: Rate
    """The highest rate."""
    constant: Rate
    """The rate of the constant phase."""
    floor: Rate
    """The rate at the end of the anneal."""
    warmup: Length = "1%"
    """Linear warm-up from zero to `peak`."""
    cooldown: Length = "60%"
    """Length of the cooldown, counted from the end of the warm-up."""
    constant_until: Length = "85%"
    """End of the constant phase and start of the anneal, counted from the first step; 100%: no anneal."""
    cooldown_shape: Literal["cosine", "inverse-sqrt"] = "cosine"
    """Shape of the cooldown from `peak` to `constant`."""
    timescale: Annotated[float, Field(gt=0)] = 10.0
    """Curvature of the inverse-sqrt cooldown."""

    @model_validator(mode="after")
    def _check_rates(self) -> InfiniteSchedule:
        _check_descending(peak=self.peak, constant=self.constant, floor=self.floor)
        return self


class WsdSchedule(Method):
    """Warm-up, stable phase, decay at the end (Hu et al. 2024)."""

    implementation: ClassVar[str] = "postgrad.plan.lr_schedule:make_wsd"
    kind: Literal["wsd"]
    peak: Rate
    """The rate of the stable phase."""
    floor: Rate
    """The rate at the last step."""
    warmup: Length = "1%"
    """Linear warm-up from zero to `peak`."""
    decay: Length = "10%"
    """Length of the decay at the end of the stage."""
    shape: Literal["1-sqrt", "linear", "cosine", "exponential", "inverse-linear"] = "1-sqrt"
    """Shape of the decay."""

    @model_validator(mode="after")
    def _check_rates(self) -> WsdSchedule:
        _check_descending(peak=self.peak, floor=self.floor)
        return self


class AnnealSchedule(Method):
    """Decay only: continues from a checkpoint of a constant phase at the rate of that checkpoint."""

    implementation: ClassVar[str] = "postgrad.plan.lr_schedule:make_anneal"
    kind: Literal["anneal"]
    floor: Rate
    """The rate at the last step."""
    start: Rate | None = None
    """The rate of the first step. Default: the rate of the checkpoint that the stage starts from."""
    shape: Literal["exponential", "1-sqrt", "linear", "cosine", "inverse-linear"] = "exponential"
    """Shape of the decay."""


class SchedulePiece(ConfigModel):
    """One piece of a piecewise schedule."""

    shape: Literal["constant", "linear", "cosine", "inverse-sqrt", "exponential", "1-sqrt", "inverse-linear"]
    """Shape of the piece."""
    start: Annotated[float, Field(ge=0)]
    """The rate at its start."""
    end: Annotated[float, Field(ge=0)] | None = None
    """The rate at its end; a constant piece has none."""
    length: Length | None = None
    """Length of the piece. Default, for the last piece only: the rest of the stage."""


class PiecewiseSchedule(Method):
    """Pieces one after another."""

    implementation: ClassVar[str] = "postgrad.plan.lr_schedule:make_piecewise"
    kind: Literal["piecewise"]
    pieces: Annotated[list[SchedulePiece], Field(min_length=1)]
    """The pieces in order."""

    @model_validator(mode="after")
    def _check_pieces(self) -> PiecewiseSchedule:
        for piece in self.pieces:
            if (piece.shape != "constant") == (piece.end is None):
                raise ValueError("a constant piece has no `end`; every other piece has one")
        if any(piece.length is None for piece in self.pieces[:-1]):
            raise ValueError("only the last piece may omit its `length`")
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
