"""Which tasks is a model asked before and after a stage, and how? Prompts of zero, one or a few shots, as data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from postgrad.config.quantities import ConfigModel, Positive
from postgrad.config.row_format import TemplatedRowFormat

TaskMetric = Literal[
    "accuracy", "macro-F1", "MCC",
    "exact-match", "F1", "ROUGE-1", "ROUGE-2", "ROUGE-L", "BLEU", "chrF", "numeric", "Pearson", "Spearman",
]  # fmt: skip


class FewShotConfig(ConfigModel):
    """Where the demonstrations of a prompt come from: training rows, none of which asks what a test row asks."""

    path: str
    """A file, a folder or a glob with rows of the same columns and words."""
    sampler: Literal["random", "balanced", "bm25"] = "random"
    """Drawn once for all items; drawn so that each label has as many as any other; or for each item those most like it."""


class TaskConfig(TemplatedRowFormat):
    """Rows of a task, put to the model in prompts and scored by what it answers."""

    name: Annotated[str, Field(pattern=r"^[\w.\-]+$")]
    """Names the task."""
    path: str
    """A file, a folder or a glob with test rows."""
    role: Literal["retained", "learned"] = "retained"
    """Whether the task is to be kept or to be learnt."""
    cluster: str | None = None
    """The sort of task. One that no training source names was never seen."""
    shots: Annotated[int, Field(ge=0)] = 0
    """Demonstrations before each question; what does not fit the context is left out from the front."""
    few_shot: FewShotConfig | None = None
    """Where they come from; needed above zero shots."""
    seeds: Positive = 1
    """How many draws of demonstrations are asked with: their mean is scored, their spread reported. Not with `bm25`."""
    scoring: Literal["auto", "multiple-choice", "generate"] = "auto"
    """By the likeliest of the labels or choices, or written freely; auto: multiple-choice where rows have labels or choices."""
    normalization: Literal["sum", "token", "byte", "character", "answer-only"] = "sum"
    """How choices are compared: by their log-likelihood; by its mean per token, byte or character; or against that
    behind a bare `Answer:` (Brown et al. 2020)."""
    calibrate: bool = False
    """Divide each choice's probability by that with an empty question (contextual calibration, Zhao et al. 2021)."""
    stop: list[str] | None = None
    """What ends a written answer, beside the end-of-text token; left out: a line end, or an empty line, when no answer of the
    rows has one; nothing for conversations and encoder-decoders."""
    max_new_tokens: Positive = 64
    """Tokens of a written answer."""
    metrics: list[TaskMetric] = []
    """Left out: accuracy (and macro F1 and MCC of labels) of what is chosen; of what is written exact match, F1 and ROUGE-L,
    or the final number, or correlations where answers are fractions. The first one is the headline."""
    items: Positive = 500
    """Test rows at most, in the order of their content hash."""
    during_training: bool = False
    """Ask at every look during training too, where one process trains."""

    @model_validator(mode="after")
    def _check_options(self) -> TaskConfig:
        if self.shots and self.few_shot is None:
            raise ValueError(f"{self.shots} shots need `few_shot`, the rows that are shown")
        if self.seeds > 1 and self.few_shot is not None and self.few_shot.sampler == "bm25":
            raise ValueError("`bm25` draws nothing: several `seeds` would ask the same")
        if self.calibrate and self.normalization == "answer-only":
            raise ValueError(
                "`calibrate` and `normalization: answer-only` each take the answer's own likelihood away; name one"
            )
        if self.kind in ("text", "input_ids"):
            raise ValueError("running text asks nothing; a task has rows with answers, labels or choices")
        return self
