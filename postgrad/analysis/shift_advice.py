"""Advice for a domain shift: replay share, peak rate, warm-up and vocabulary, each with its reason and source.

Rules of thumb from published runs, as a starting point. Short pilots, or the stage itself, measure them on the user's own text.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

ShiftStrength = Literal["none", "weak", "strong"]

STRONG_SHIFT = 0.33
"""Excess of the divergence of byte trigrams, in bits, from which a shift is strong: another language, code, no language at all.

Between real corpora of English prose it was .06 to .30, from prose to source code .34, to German .36 to .53, to molecules .87
to .92."""
NO_SHIFT = 0.02
"""... and up to which the two texts are of one kind."""
STRONG_SURPRISE = 2.0
"""The model's bits per byte of the new text over those of the old, from which a shift is strong whatever the trigrams.

A very small model forgot at most .39 nats on texts that cost it less than this, and .70 and more on all others."""
NO_SURPRISE = 1.1
"""... and up to which the model knows the new text as it knows the old."""


@dataclass(frozen=True)
class Proposal:
    """A setting with its reason and source."""

    what: str
    value: str
    reason: str
    source: str

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def shift_strength(distance: float, baseline: float, surprise: float | None = None) -> ShiftStrength:
    """The strength of a shift: that of the texts or that for the model, whichever is greater.

    Texts differ by the excess of their divergence over that of two samples of the old text. `surprise`: the model's bits per
    byte of the new text over those of the old; what a model never saw is far from it, however alike the letters.
    """
    excess, ratio = distance - baseline, surprise or 1.0
    if excess >= STRONG_SHIFT or ratio >= STRONG_SURPRISE:
        return "strong"
    return "weak" if excess > NO_SHIFT or ratio > NO_SURPRISE else "none"


LARGE_MODEL, LARGE_RATE, HIGHEST_RATE = 1_000_000_000, 2e-5, 1e-3
"""Weights from which practice trains all weights at 2e-5, and the rate that no small model exceeds here."""


def usual_peak_rate(parameters: int) -> float:
    """A peak rate to begin with when all weights of a model of so many are continued, to one digit.

    2e-5 from a billion weights on (e-Llama, Swallow, ChipNeMo: 7 to 70 billion). Below, it grows as the width shrinks, that is
    with the square root of the number of weights (the transfer rule of muP, Yang et al. 2022, arXiv 2203.03466): 6e-5 at 110
    million, near the 5e-5 that models of the size of BERT are fine-tuned at, and never above 1e-3.
    """
    rate = LARGE_RATE * max(1.0, LARGE_MODEL / max(parameters, 1)) ** 0.5
    return float(f"{min(rate, HIGHEST_RATE):.0e}")


_IBRAHIM = "Ibrahim et al. 2024, arXiv 2403.08763"
_REUSE = "Parmar et al. 2024, arXiv 2407.07263"
_REPLAY = {
    "none": ("1%", "the two texts are similar; a little replay costs nothing and guards against surprises"),
    "weak": ("5%", "at 5 % replay 78 % of the forgetting of a weak shift was gone, for .01 nats on the new text"),
    "strong": ("25%", "at 25 % replay 88 % of the forgetting of a strong shift was gone, for .05 nats on the new text"),
}


def make_proposals(
    strength: ShiftStrength,
    *,
    tokens: int,
    old_bytes_per_token: float,
    new_bytes_per_token: float,
    unknown: float,
    parameters: int | None = None,
) -> list[Proposal]:
    """Proposals for a stage on `tokens` of new text, given the tokenizer's bytes per token and unknown share.

    `parameters`: the weights of the model, which its rate follows.
    """
    share, why = _REPLAY[strength]
    out = [Proposal("replay share", share, why, f"{_IBRAHIM}, tables 2 and 4")]
    if tokens < 100_000_000:
        out.append(
            Proposal(
                "peak rate",
                "unknown" if parameters is None else f"{usual_peak_rate(parameters):.1e}",
                f"{tokens:,} tokens are few: a fifteenth to a tenth of a pre-training peak moves the weights less than "
                "a full re-warming, and more epochs make up for it; " + _rate_reason(parameters),
                "2e-5 is the practice of adapted 7B to 70B models (e-Llama, Swallow, ChipNeMo); below 1B the square root "
                "of the size, as in Yang et al. 2022, arXiv 2203.03466",
            )
        )
    elif strength == "strong":
        out.append(
            Proposal(
                "peak rate",
                "the peak of pre-training",
                "re-warming to the full peak learnt a new language best: 1.11 against 1.21 nats at a constant floor",
                f"{_IBRAHIM}, section 6",
            )
        )
    else:
        out.append(
            Proposal(
                "peak rate",
                "the floor of pre-training, up to half of its peak",
                "a weak shift gains little from a high peak (2.50 against 2.51 nats) and forgets more with it",
                f"{_IBRAHIM}, section 6; {_REUSE}",
            )
        )
    out.append(
        Proposal(
            "warm-up",
            "1%, and at least 5 steps",
            "its length makes no difference in the end; without any there is a spike. `check` tells the fewest steps",
            _IBRAHIM,
        )
    )
    out.append(_vocabulary_proposal(tokens, old_bytes_per_token / new_bytes_per_token, unknown))
    return out


def _rate_reason(parameters: int | None) -> str:
    if parameters is None:
        return "it depends on the size of the model, which is not known"
    return f"for {parameters:,} weights; try half and double of it"


def _vocabulary_proposal(tokens: int, token_ratio: float, unknown: float) -> Proposal:
    """`token_ratio`: tokens per byte of the new text over those of the old."""
    if unknown > 0.01:
        return Proposal(
            "vocabulary",
            "grow it",
            f"{unknown:.1%} of the new text's tokens are unknown to the tokenizer: what they stand for is lost",
            "a tokenizer without byte fallback",
        )
    if token_ratio < 1.5:
        return Proposal(
            "vocabulary",
            "keep it",
            f"the new text takes {token_ratio:.2f} times the tokens a byte of the old",
            _IBRAHIM,
        )
    if tokens < 1_000_000_000:
        return Proposal(
            "vocabulary",
            "keep it, or grow it by what the text needs",
            f"the new text takes {token_ratio:.2f} times the tokens a byte, so it reads slowly; new rows need text to be "
            f"learnt, and {tokens:,} tokens are few",
            "Dagan et al. 2024, arXiv 2402.01035: a full exchange pays after about 50B tokens",
        )
    return Proposal(
        "vocabulary",
        "grow it, new rows as the mean of their parts",
        f"the new text takes {token_ratio:.2f} times the tokens a byte",
        "Fujii et al. 2024 (Swallow), arXiv 2404.17790",
    )
