"""Normalisation of the choices' log-likelihoods by length or by prior probability, and contextual calibration.

Legend: C choices of an item, F content-free inputs.

A long answer has a small likelihood whatever the question, and some answers are likely after any question. Normalisations:

    sum           none: log p(choice | context)                                            (Brown et al. 2020, section 2.4)
    token         log p / tokens, the mean over tokens                                     (same section)
    byte          log p / UTF-8 bytes of the choice                                        (lm-eval's acc_bytes)
    character     log p / characters of the choice                                         (lm-eval's acc_norm)
    answer-only   log p(choice | context) - log p(choice | "Answer:")                      (same section)

lm-eval measures the choice without the space between question and answer; so do `byte` and `character` when `texts` has none.
Its acc_mutual_info is `answer-only` with an empty context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from postgrad.errors import DataError, StageError, suggest_nearest

Normalization = Literal["sum", "token", "byte", "character", "answer-only"]
CONTENT_FREE = ("N/A", "", "[MASK]")
"""Content-free inputs (Zhao et al. 2021, section 5)."""


def normalize_scores(
    log_p_C: np.ndarray,
    normalization: Normalization,
    *,
    texts: Sequence[str] = (),
    tokens_C: np.ndarray | None = None,
    unconditional_C: np.ndarray | None = None,
) -> np.ndarray:
    """Scores of the choices of an item, (C,), from `log p(choice | context)` in nats; the highest is the prediction.

    `token` needs `tokens_C`; `byte` and `character` need `texts`; `answer-only` needs `unconditional_C`, the log-likelihoods
    after a context without the question. Raises `DataError` when these are missing or a choice is empty.
    """
    match normalization:
        case "sum":
            return np.asarray(log_p_C, np.float64)
        case "answer-only":
            return log_p_C - _check_values(unconditional_C, log_p_C, "unconditional_C")
        case "token":
            lengths_C = _check_values(tokens_C, log_p_C, "tokens_C")
        case "byte":
            lengths_C = _check_values([len(text.encode()) for text in texts], log_p_C, "texts")
        case "character":
            lengths_C = _check_values([len(text) for text in texts], log_p_C, "texts")
        case _:
            known = get_args(Normalization)
            raise StageError(
                f"unknown normalization '{normalization}'",
                where="evaluation.tasks.normalization",
                expected=", ".join(known),
                hint=suggest_nearest(normalization, known),
            )
    if not (lengths_C > 0).all():
        raise DataError("an empty choice cannot be normalized by its length", expected="choices with text")
    return log_p_C / lengths_C


def calibrate_scores(log_p_C: np.ndarray, content_free_FC: np.ndarray) -> np.ndarray:
    """`log q` of the choices of an item, (C,), after contextual calibration.

    `content_free_FC`: log-likelihoods of the same choices in the same prompt with a content-free input in place of the
    question (`CONTENT_FREE`): the model's bias. Their probabilities are averaged and normalised to p_cf, and the item's p to 1;
    then `q = W p` with `W = diag(p_cf)^-1`, normalised to 1 again (which changes no order).

    Zhao et al. 2021, arXiv 2102.09690, section 5; averaged before they are normalised, as in their code.
    """
    free_C = np.logaddexp.reduce(np.atleast_2d(content_free_FC), axis=0)
    q_C = np.asarray(log_p_C, np.float64) - free_C
    return q_C - np.logaddexp.reduce(q_C)


def _check_values(values: Sequence[int] | np.ndarray | None, like_C: np.ndarray, name: str) -> np.ndarray:
    """Values as float64, one for each choice."""
    out = np.asarray([] if values is None else values, np.float64)
    if out.shape != np.shape(like_C):
        raise DataError(
            f"{len(like_C)} choices and {len(out)} values", where=name, expected="one value for each choice"
        )
    return out
