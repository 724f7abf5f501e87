"""Sparse updates of a stage, a closed union, and the loss-adaptive learning rate."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from postgrad.config.quantities import ConfigModel, Method, Share, reject_bool

PositiveShare = Annotated[Share, Field(gt=0)]


class SparseUpdate(Method):
    """What all sparse updates have."""

    fingerprint_function: ClassVar[str | None] = None
    """`module:function` that fingerprints the files of the update, which must not change before a resume."""
    selection: ClassVar[str]
    """What is updated, in words."""


class MomentumUpdate(SparseUpdate):
    """MoFO: of each matrix only the entries with the largest momentum are updated; vectors are updated whole."""

    implementation: ClassVar[str] = "postgrad.run.update_masks:make_mofo"
    selection: ClassVar[str] = "the entries of each matrix with the largest momentum"
    kind: Literal["mofo"]
    share: PositiveShare = 0.1
    """Updated share of each matrix; published: 5 to 20 %."""


class MagnitudeUpdate(SparseUpdate):
    """MIGU: of each linear layer only the rows with the largest outputs on the step's text are updated; all else whole."""

    implementation: ClassVar[str] = "postgrad.run.update_masks:make_migu"
    selection: ClassVar[str] = "the rows with the largest outputs"
    kind: Literal["migu"]
    share: PositiveShare = 0.3
    """Updated share of the rows of each layer; published: 30 %."""


class SourceShieldedUpdate(SparseUpdate):
    """SSU: of each linear layer the columns (inputs) that matter most for old text keep their values; all else whole."""

    implementation: ClassVar[str] = "postgrad.run.update_masks:make_ssu"
    fingerprint_function: ClassVar[str | None] = "postgrad.run.update_masks:ssu_fingerprints"
    selection: ClassVar[str] = "the columns with the least importance"
    kind: Literal["ssu"]
    importance: str
    """A file written by the verb `importance` on old text, with `--kind activation` as published, or another kind."""
    share: PositiveShare = 0.5
    """Updated share of the columns of each layer; published: 50 %."""


AnyUpdate = Annotated[MomentumUpdate | MagnitudeUpdate | SourceShieldedUpdate, Field(discriminator="kind")]


class LossAdaptive(ConfigModel):
    """FINCH: a lower rate where the loss is higher: the schedule times min(1, initial_share * sqrt(first loss / mean loss))."""

    initial_share: PositiveShare = 0.5
    """Share of the schedule's rate at the first step; it rises to 1 as the loss falls."""
    smoothing: Annotated[float, Field(ge=0, lt=1), BeforeValidator(reject_bool)] = 0.9
    """Weight of the earlier steps in the moving average of the loss."""
