"""Which documents of a source are read at all? Ways to select, as frozen data; each acts on what the one before it left."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from postgrad.config.quantities import ConfigModel, Share, TokenCount
from postgrad.config.row_format import RowFormat
from postgrad.data.filter.near_duplicates import MIN_THRESHOLD


class TargetTextFile(RowFormat):
    """Text that documents are to be like."""

    path: str
    """A file, a folder or a glob."""


def _expand_path(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


AnyTargetText = Annotated[TargetTextFile, BeforeValidator(_expand_path, json_schema_input_type=str | TargetTextFile)]


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


class DsirSelection(ConfigModel):
    """Documents that are like given texts, by importance resampling on hashed words and pairs of words (Xie et al. 2023)."""

    kind: Literal["dsir"]
    target: Annotated[
        list[AnyTargetText],
        Field(min_length=1),
        BeforeValidator(_as_list, json_schema_input_type=str | TargetTextFile | list[str | TargetTextFile]),
    ]
    """Files with the text that documents are to be like: at least 1,000 words."""
    keep: Annotated[Share, Field(gt=0)]
    """Share of the documents that is kept."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """Decides the noise of the drawing; left out: the stage's."""


class PerplexitySelection(ConfigModel):
    """Documents that a model finds neither too easy nor too hard, by its bits per byte."""

    kind: Literal["perplexity"]
    model: str = "start"
    """Who judges: `start`, or another decoder (a folder, a run or a Hub name)."""
    quantiles: tuple[Share, Share] = (0.1, 0.9)
    """Which part is kept, from the easiest documents on: two shares such as [10%, 90%]."""
    max_tokens: Annotated[TokenCount, Field(ge=2)] = 1024
    """How much of the beginning of each document is judged; documents of which nothing can be predicted are left out."""

    @field_validator("quantiles")
    @classmethod
    def _check_band(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] >= value[1]:
            raise ValueError(f"a band goes from a smaller share to a larger one, not from {value[0]:g} to {value[1]:g}")
        return value


class DuplicatesSelection(ConfigModel):
    """Documents that are not nearly the same as one before, by MinHash signatures of their runs of five words."""

    kind: Literal["duplicates"]
    threshold: Annotated[Share, Field(ge=MIN_THRESHOLD)] = 0.8
    """The share of common runs from which a document is a copy; what shares less than 70 % is not found this way."""


AnySelection = Annotated[DsirSelection | PerplexitySelection | DuplicatesSelection, Field(discriminator="kind")]
