"""Prompted tasks before and after a stage: zero-shot or few-shot, as frozen data."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from postgrad.config.quantities import ConfigModel, Count, Name, Positive
from postgrad.config.row_format import TemplatedRowFormat

TaskMetric = Literal[
    "accuracy", "macro-F1", "MCC",
    "exact-match", "F1", "ROUGE-1", "ROUGE-2", "ROUGE-L", "BLEU", "chrF", "numeric", "Pearson", "Spearman",
    "1-Brier", "1-ECE",
]  # fmt: skip


class FewShotConfig(ConfigModel):
    """The demonstrations of a prompt: training rows without the questions of test rows."""

    path: str
    """A file, a folder or a glob with rows of the same columns."""
    sampler: Literal["random", "balanced", "bm25"] = "random"
    """random: one draw for all items; balanced: one draw with equally many per label; bm25: the nearest rows of each item."""


class TaskConfig(TemplatedRowFormat):
    """Rows of a task, prompted and scored by the model's answers."""

    name: Name
    """Name of the task."""
    path: str
    """A file, a folder or a glob with test rows."""
    role: Literal["retained", "learned"] = "retained"
    """Whether the model must retain or learn the task."""
    cluster: str | None = None
    """Task cluster; a task of a cluster that no source has is unseen. Default: none."""
    shots: Count = 0
    """Number of demonstrations before each question; those that do not fit the context are dropped from the front."""
    few_shot: FewShotConfig | None = None
    """The demonstrations; required above zero shots."""
    seeds: Positive = 1
    """Number of draws of demonstrations; their mean is the score, their spread is reported. Not with `bm25`."""
    scoring: Literal["auto", "multiple-choice", "generate"] = "auto"
    """Score the likelihood of the labels or choices, or a generated answer; auto: multiple-choice if there are any."""
    normalization: Literal["sum", "token", "byte", "character", "answer-only"] = "sum"
    """How to compare choices: by log-likelihood; by its mean per token, byte or character; or minus that after a bare
    `Answer:` (Brown et al. 2020)."""
    calibrate: bool = False
    """Contextual calibration: divide by the choice's probability with an empty question (Zhao et al. 2021)."""
    stop: list[str] | None = None
    """Strings that end a generated answer, besides the end-of-text token. Default: a newline, or an empty line, if no answer of
    the rows has one; none for conversations and encoder-decoders."""
    max_new_tokens: Positive = 64
    """Largest number of tokens of a generated answer."""
    metrics: list[TaskMetric] = []
    """Metrics; the first one is the headline. Default: accuracy (for labels also macro F1 and MCC) of choices; exact match, F1
    and ROUGE-L of generated answers, the final number, or correlations for fractions. `1-Brier` and `1-ECE` tell whether the
    probabilities of choices can be believed."""
    items: Positive = 500
    """Limit of the test rows, in the order of their content hash."""
    during_training: bool = False
    """Evaluate during training too, if a single process trains."""

    @model_validator(mode="after")
    def _check_options(self) -> TaskConfig:
        if self.shots and self.few_shot is None:
            raise ValueError(f"{self.shots} shots require `few_shot`")
        if self.seeds > 1 and self.few_shot is not None and self.few_shot.sampler == "bm25":
            raise ValueError("`bm25` is deterministic: several `seeds` would be the same")
        if self.calibrate and self.normalization == "answer-only":
            raise ValueError(
                "`calibrate` and `normalization: answer-only` both subtract the likelihood of the answer alone; use one"
            )
        if self.kind in ("text", "input_ids"):
            raise ValueError("running text has no questions; a task needs rows with answers, labels or choices")
        return self
