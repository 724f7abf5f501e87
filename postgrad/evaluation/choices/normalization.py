"""Which choice does a model prefer, when its log-likelihoods are made comparable? Lengths, likely answers and habits.

Legend: C choices of an item, F inputs without content.

A long answer has a small likelihood whatever the question, and some answers are likely behind anything. What is taken out:

    sum           nothing: log p(choice | context)                                         (Brown et al. 2020, section 2.4)
    token         the number of tokens: log p / tokens, the mean of a token                (there too)
    byte          the UTF-8 bytes of the choice: log p / bytes                             (lm-eval's acc_bytes)
    character     the characters of the choice: log p / characters                         (lm-eval's acc_norm)
    answer-only   how likely it is anyway: log p(choice | context) - log p(choice | "Answer:")   (Brown et al. 2020, there)

lm-eval counts the choice as it is written in the task, without the space between question and answer; so do `byte` and
`character` when they are given those texts. Its acc_mutual_info is `answer-only` behind an empty context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from postgrad.errors import DataError, StageError, suggest_nearest

Normalization = Literal["sum", "token", "byte", "character", "answer-only"]
CONTENT_FREE = ("N/A", "", "[MASK]")
"""Inputs without content (Zhao et al. 2021, section 5)."""


def normalize_scores(
    log_p_C: np.ndarray,
    normalization: Normalization,
    *,
    texts: Sequence[str] = (),
    tokens_C: np.ndarray | None = None,
    unconditional_C: np.ndarray | None = None,
) -> np.ndarray:
    """Scores of the choices of an item, (C,), the preferred one the greatest; given `log p(choice | context)` in nats.

    Needed are, for `token`, the choices' `tokens_C`; for `byte` and `character`, their `texts`; for `answer-only`, `alone_C`,
    their log-likelihoods behind a context that has no question. Raises `DataError` when that is missing or a choice is empty.
    """
    match normalization:
        case "sum":
            return np.asarray(log_p_C, np.float64)
        case "answer-only":
            return log_p_C - _check_values(unconditional_C, log_p_C, "alone_C")
        case "token":
            lengths_C = _check_values(tokens_C, log_p_C, "tokens_C")
        case "byte":
            lengths_C = _check_values([len(text.encode()) for text in texts], log_p_C, "texts")
        case "character":
            lengths_C = _check_values([len(text) for text in texts], log_p_C, "texts")
        case _:
            known = get_args(Normalization)
            raise StageError(
                f"choices cannot be compared by '{normalization}'",
                where="normalization",
                expected=", ".join(known),
                hint=suggest_nearest(normalization, known),
            )
    if not (lengths_C > 0).all():
        raise DataError(
            "a choice without any text cannot be divided by its length", expected="choices that are written out"
        )
    return log_p_C / lengths_C


def calibrate_scores(log_p_C: np.ndarray, content_free_FC: np.ndarray) -> np.ndarray:
    """`log q` of the choices of an item, (C,), after contextual calibration.

    `free_FC`: log-likelihoods of the same choices behind the same prompt, with an input that has no content in the place of
    the question (`CONTENT_FREE`); whatever is preferred there is a habit. Their probabilities are averaged and normalised to
    p_cf, and the item's p to 1; then `q = W p` with `W = diag(p_cf)^-1`, which is normalised to 1 again here so that it is a
    probability (that moves no choice before another).

    Zhao et al. 2021, arXiv 2102.09690, section 5; averaged before they are normalised, as their code does.
    """
    free_C = np.logaddexp.reduce(np.atleast_2d(content_free_FC), axis=0)
    q_C = np.asarray(log_p_C, np.float64) - free_C
    return q_C - np.logaddexp.reduce(q_C)


def _check_values(values: Sequence[int] | np.ndarray | None, like_C: np.ndarray, name: str) -> np.ndarray:
    """Values that belong to the choices one to one."""
    out = np.asarray([] if values is None else values, np.float64)
    if out.shape != np.shape(like_C):
        raise DataError(
            f"{len(like_C)} choices and {len(out)} values", where=name, expected="one value for each choice"
        )
    return out
