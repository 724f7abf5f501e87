"""Document filters of a source, as frozen data; each acts on what the one before it kept."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from postgrad.config.quantities import ConfigModel, Seed, Share, TokenCount
from postgrad.config.row_format import RowFormat

MIN_THRESHOLD = 0.7
"""Similarity below which MinHash bands hardly ever find near duplicates."""


class TargetTextFile(RowFormat):
    """Target text of DSIR."""

    path: str
    """A file, a folder or a glob."""


def _expand_path(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


AnyTargetText = Annotated[TargetTextFile, BeforeValidator(_expand_path, json_schema_input_type=str | TargetTextFile)]


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


class DsirSelection(ConfigModel):
    """DSIR: documents like the target texts, by importance resampling on hashed words and bigrams (Xie et al. 2023)."""

    kind: Literal["dsir"]
    target: Annotated[
        list[AnyTargetText],
        Field(min_length=1),
        BeforeValidator(_as_list, json_schema_input_type=str | TargetTextFile | list[str | TargetTextFile]),
    ]
    """Files with the target text: at least 1,000 words."""
    keep: Annotated[Share, Field(gt=0)]
    """Share of the documents to keep."""
    seed: Seed | None = None
    """Seed of the resampling. Default: that of the stage."""


class PerplexitySelection(ConfigModel):
    """Perplexity filter: documents in a band of a model's bits per byte."""

    kind: Literal["perplexity"]
    model: str = "start"
    """The scoring model: `start`, or another decoder (a folder, a run or a Hub name)."""
    quantiles: tuple[Share, Share] = (0.1, 0.9)
    """The band to keep, in shares of the documents from the lowest bits per byte on, such as [10%, 90%]."""
    max_tokens: Annotated[TokenCount, Field(ge=2)] = 1024
    """Number of first tokens of each document to score; documents too short to score are dropped."""

    @field_validator("quantiles")
    @classmethod
    def _check_band(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] >= value[1]:
            raise ValueError(f"a band goes from a smaller to a larger share, not from {value[0]:g} to {value[1]:g}")
        return value


class DuplicatesSelection(ConfigModel):
    """Near-duplicate removal by MinHash signatures of five-word shingles."""

    kind: Literal["duplicates"]
    threshold: Annotated[Share, Field(ge=MIN_THRESHOLD)] = 0.8
    """Smallest Jaccard similarity of a duplicate; at least 70 %, below which MinHash finds too few."""


AnySelection = Annotated[DsirSelection | PerplexitySelection | DuplicatesSelection, Field(discriminator="kind")]
